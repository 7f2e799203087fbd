use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    thread::sleep,
};

use portcullis_engine::Timestamp;
use proptest::prelude::*;
use tempfile::TempDir;

use super::{
    verify::{Kind, Report},
    *,
};

const LARGE: Settings = Settings {
    max_bytes: 1 << 30,
    keep: 8,
};

fn event(number: u64) -> Event {
    let subject = format!("192.0.2.{}", number % 256).parse().unwrap();
    Event {
        subject: Some(subject),
        ..Event::new(
            Timestamp::from_secs(number),
            Action::Refuse,
            format!("number {number}"),
        )
    }
}

/// A run of the agent that records so many events.
fn run(dir: &Path, settings: Settings, events: u64) {
    let history = History::open(dir, settings).unwrap();
    for number in 0..events {
        history.record(&event(number), Mode::Enforce);
    }
    drop(history);
}

fn report(dir: &Path) -> Report {
    verify::folder(dir, None).unwrap()
}

fn unbroken(dir: &Path) -> Report {
    let report = report(dir);
    assert!(report.is_unbroken(), "{report:#?}");
    report
}

/// What is on record in words, oldest first.
fn conditions(dir: &Path) -> Vec<String> {
    let lines = parts(dir).into_iter().flat_map(|(_, lines)| lines);
    let recorded = lines.filter_map(|line| serde_json::from_slice::<Recorded>(&line).ok());
    recorded.map(|recorded| recorded.event.condition).collect()
}

/// All files with their lines, oldest first.
fn parts(dir: &Path) -> Vec<(PathBuf, Vec<Vec<u8>>)> {
    let parts = files::open_all(dir).unwrap().into_iter();
    let lines = |path: &Path| {
        let bytes = fs::read(path).unwrap();
        let lines = bytes.split_inclusive(|byte| *byte == b'\n');
        lines.map(<[u8]>::to_vec).collect()
    };
    parts
        .map(|part| {
            let lines = lines(&part.path);
            (part.path, lines)
        })
        .collect()
}

fn copy(from: &Path) -> TempDir {
    let to = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.path().join(entry.file_name())).unwrap();
    }
    to
}

fn until(what: &str, is_so: impl Fn() -> bool) {
    let came = (0..200).any(|_| {
        sleep(Duration::from_millis(50));
        is_so()
    });
    assert!(came, "{what} has not come");
}

#[test]
fn a_burst_is_on_record_to_the_last_line() {
    let folder = tempfile::tempdir().unwrap();
    let history = History::open(folder.path(), LARGE).unwrap();
    for number in 0..100_000 {
        // As long as a ban with its evidence.
        let event = Event::new(
            Timestamp::from_secs(number),
            Action::Ban,
            format!("{number:0700}"),
        );
        history.record(&event, Mode::Enforce);
    }
    assert_eq!(history.lost(), 0);
    drop(history);
    let report = unbroken(folder.path());
    assert_eq!((report.lines, report.notes.len()), (100_000, 0));
    assert_eq!(report.head.unwrap().seq, 100_000);
}

#[test]
fn a_restart_goes_on_with_the_chain_and_strangers_cannot_read_it() {
    let folder = tempfile::tempdir().unwrap();
    for _ in 0..3 {
        run(folder.path(), LARGE, 5);
    }
    let report = unbroken(folder.path());
    assert_eq!((report.lines, report.notes.len()), (15, 0));
    for path in [files::current(folder.path()), files::head(folder.path())] {
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o027, 0, "{}", path.display());
    }
}

#[test]
fn what_was_rotated_away_is_no_break_and_no_more_is_kept_than_configured() {
    for keep in [0, 1, 3] {
        let folder = tempfile::tempdir().unwrap();
        let settings = Settings {
            max_bytes: 1000,
            keep,
        };
        for _ in 0..4 {
            run(folder.path(), settings, 20);
        }
        let report = unbroken(folder.path());
        assert_eq!(report.files, keep as usize + 1);
        assert_eq!(report.head.unwrap().seq, 80, "{report:#?}");
        assert!(report.notes[0].contains("unknown predecessor"));
        for (path, _) in parts(folder.path()) {
            assert!(fs::metadata(path).unwrap().len() <= 1000);
        }
        let fewer = Settings {
            max_bytes: 1000,
            keep: keep / 2,
        };
        run(folder.path(), fewer, 20);
        assert_eq!(unbroken(folder.path()).files, keep as usize / 2 + 1);
    }
}

#[test]
fn a_rotation_that_is_cut_short_loses_nothing() {
    let origin = tempfile::tempdir().unwrap();
    let settings = |keep| Settings {
        max_bytes: 1000,
        keep,
    };
    run(origin.path(), settings(5), 22);
    let steps = files::rotation(origin.path(), 5).unwrap().len();
    assert!(steps > 3, "{steps} steps");
    for taken in 0..=steps {
        let folder = copy(origin.path());
        for step in &files::rotation(folder.path(), 5).unwrap()[..taken] {
            step.take().unwrap();
        }
        assert_eq!(unbroken(folder.path()).lines, 22, "after {taken} steps");
        run(folder.path(), settings(9), 22);
        let report = unbroken(folder.path());
        assert_eq!((report.lines, report.notes.len()), (44, 0), "{report:#?}");
    }
}

#[test]
fn a_line_that_a_crash_has_torn_anywhere_is_called_that_and_chained_on() {
    let origin = tempfile::tempdir().unwrap();
    run(origin.path(), LARGE, 2);
    let head = fs::read(files::head(origin.path())).unwrap();
    let before = fs::metadata(files::current(origin.path())).unwrap().len();
    run(origin.path(), LARGE, 1);
    // The head is written after the lines.
    fs::write(files::head(origin.path()), head).unwrap();
    let length = fs::metadata(files::current(origin.path())).unwrap().len();
    for cut in before..=length {
        let folder = copy(origin.path());
        let file = fs::File::options()
            .write(true)
            .open(files::current(folder.path()))
            .unwrap();
        file.set_len(cut).unwrap();
        let is_torn = before < cut && cut < length - 1;
        let is_said = |report: &Report| report.notes.iter().any(|note| note.contains("torn"));
        assert_eq!(is_said(&unbroken(folder.path())), is_torn, "cut at {cut}");
        // Once more before the next line.
        for _ in 0..2 {
            run(folder.path(), LARGE, 1);
            assert_eq!(is_said(&unbroken(folder.path())), is_torn, "cut at {cut}");
        }
        let conditions = conditions(folder.path());
        let notices = conditions.iter().filter(|words| words.contains("torn"));
        assert_eq!(notices.count(), usize::from(is_torn), "{conditions:?}");
        if is_torn {
            // Nobody may use it to write something else there.
            let path = files::current(folder.path());
            let mut bytes = fs::read(&path).unwrap();
            bytes[usize::try_from(before).unwrap()] ^= 1;
            fs::write(&path, bytes).unwrap();
            let broken = report(folder.path());
            assert_eq!(broken.breaks[0].line, 3, "{broken:#?}");
        }
    }
}

#[test]
fn a_torn_beginning_of_a_file_is_chained_on_too() {
    let folder = tempfile::tempdir().unwrap();
    run(folder.path(), LARGE, 3);
    fs::rename(
        files::current(folder.path()),
        folder.path().join("history.jsonl.1"),
    )
    .unwrap();
    fs::write(files::current(folder.path()), "{\"ti").unwrap();
    run(folder.path(), LARGE, 3);
    let report = unbroken(folder.path());
    assert!(report.notes[0].contains("jsonl:1: torn"), "{report:#?}");
}

#[test]
fn missing_lines_at_the_end_show_and_go_on_showing() {
    for left in [0, 3] {
        let folder = tempfile::tempdir().unwrap();
        run(folder.path(), LARGE, 5);
        let (path, lines) = parts(folder.path()).remove(0);
        fs::write(&path, lines[..left].concat()).unwrap();
        let broken = report(folder.path());
        assert_eq!(broken.breaks[0].kind, Kind::Removed, "{broken:#?}");
        run(folder.path(), LARGE, 5);
        assert!(conditions(folder.path())[left].contains("lines up to 5 were written"));
        if left > 0 {
            let broken = report(folder.path());
            let found = &broken.breaks[0];
            assert_eq!((found.line, found.kind), (4, Kind::Removed), "{found}");
        }
    }
    let folder = tempfile::tempdir().unwrap();
    run(folder.path(), LARGE, 5);
    fs::remove_file(files::current(folder.path())).unwrap();
    assert!(!report(folder.path()).is_unbroken());
}

#[test]
fn a_history_without_its_head_is_not_taken_for_whole() {
    let folder = tempfile::tempdir().unwrap();
    run(folder.path(), LARGE, 5);
    fs::remove_file(files::head(folder.path())).unwrap();
    let broken = report(folder.path()).breaks.remove(0);
    assert!(
        broken.to_string().contains("history.head: removed"),
        "{broken}"
    );
    run(folder.path(), LARGE, 1);
    // And the hole stays where it was.
    let report = report(folder.path());
    assert_eq!((report.lines, report.breaks.len()), (7, 1), "{report:#?}");
    assert!(conditions(folder.path())[5].contains("missing or damaged"));
}

#[test]
fn a_history_that_was_forged_whole_is_found_by_a_head_that_was_written_down() {
    let folder = tempfile::tempdir().unwrap();
    run(folder.path(), LARGE, 5);
    let noted = unbroken(folder.path()).head.unwrap().chain;
    run(folder.path(), LARGE, 5);
    let report = verify::folder(folder.path(), Some(noted)).unwrap();
    assert!(report.is_unbroken(), "{report:#?}");
    let forged = tempfile::tempdir().unwrap();
    run(forged.path(), LARGE, 4);
    run(forged.path(), LARGE, 6);
    assert_eq!(unbroken(forged.path()).lines, 10);
    let report = verify::folder(forged.path(), Some(noted)).unwrap();
    assert!(!report.is_unbroken());
}

#[test]
fn lines_of_an_earlier_version_are_accepted_for_what_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let old = "{\"time\":\"1970-01-01T00:00:01.000Z\",\"action\":\"stop\",\"condition\":\"x\",\"mode\":\"observe\"}\n";
    fs::write(files::current(folder.path()), old.repeat(3)).unwrap();
    assert!(unbroken(folder.path()).notes[0].contains("all 3 lines"));
    run(folder.path(), LARGE, 5);
    let report = unbroken(folder.path());
    assert_eq!((report.lines, report.head.unwrap().seq), (8, 5));
    assert!(report.notes[0].starts_with("not chained: 3 lines"));
    // Back to that version for a while.
    let (path, lines) = parts(folder.path()).remove(0);
    fs::write(&path, [lines.concat(), old.as_bytes().to_vec()].concat()).unwrap();
    run(folder.path(), LARGE, 5);
    let report = unbroken(folder.path());
    assert!(report.notes[1].contains("earlier version"), "{report:#?}");
}

#[test]
fn what_is_no_line_is_read_in_bounded_memory_and_found() {
    let folder = tempfile::tempdir().unwrap();
    run(folder.path(), LARGE, 4);
    let (path, lines) = parts(folder.path()).remove(0);
    for junk in [vec![b'x'; 5 * MAX_LINE], vec![0xff; 10], Vec::new()] {
        let junk = [junk, b"\n".to_vec()].concat();
        fs::write(
            &path,
            [lines[..2].concat(), junk, lines[2..].concat()].concat(),
        )
        .unwrap();
        let broken = report(folder.path());
        assert_eq!((broken.breaks.len(), broken.lines), (1, 5), "{broken:#?}");
        let found = &broken.breaks[0];
        assert_eq!((found.line, found.kind), (3, Kind::Inserted), "{found}");
    }
}

#[test]
fn without_a_folder_it_starts_all_the_same_and_writes_later() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("state");
    let history = History::open(&dir, LARGE).unwrap();
    for number in 0..1000 {
        history.record(&event(number), Mode::Observe);
    }
    fs::create_dir(&dir).unwrap();
    until("the history", || files::current(&dir).exists());
    history.record(&event(1000), Mode::Observe);
    assert_eq!(history.lost(), 0);
    drop(history);
    assert_eq!(unbroken(&dir).lines, 1001);
}

#[test]
fn what_is_lost_is_on_record() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("state");
    let history = History::with_room(&dir, LARGE, CHUNK_AND_MORE).unwrap();
    let mut recorded = 0;
    while history.lost() < 7 {
        history.record(&event(recorded), Mode::Observe);
        recorded += 1;
    }
    fs::create_dir(&dir).unwrap();
    until("room", || history.shared.lock().lines.is_empty());
    history.record(&event(recorded), Mode::Observe);
    drop(history);
    let conditions = conditions(&dir);
    assert_eq!(unbroken(&dir).lines, recorded - 7 + 2);
    let before_last = &conditions[conditions.len() - 2];
    assert!(
        before_last.starts_with("7 events before this one are lost"),
        "{before_last}"
    );
}

/// More than the writer takes at a time.
const CHUNK_AND_MORE: usize = 400 * 1024;

#[test]
fn a_disk_that_stays_full_delays_the_end_by_no_more_than_a_try() {
    let folder = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("/dev/full", files::current(folder.path())).unwrap();
    let history = History::open(folder.path(), LARGE).unwrap();
    for number in 0..1000 {
        history.record(&event(number), Mode::Observe);
    }
    let shared = Arc::clone(&history.shared);
    drop(history);
    assert_eq!(shared.lock().lost, 1000);
}

#[test]
fn a_file_that_is_deleted_under_it_is_made_anew_and_missed() {
    let folder = tempfile::tempdir().unwrap();
    let history = History::open(folder.path(), LARGE).unwrap();
    history.record(&event(1), Mode::Observe);
    let is_there = || files::current(folder.path()).exists();
    until("the file", is_there);
    fs::remove_file(files::current(folder.path())).unwrap();
    let mut number = 1;
    while !is_there() {
        number += 1;
        assert!(number < 200, "it is not made anew");
        sleep(Duration::from_millis(50));
        history.record(&event(number), Mode::Observe);
    }
    drop(history);
    let conditions = conditions(folder.path());
    assert!(conditions[0].contains("were written"), "{conditions:?}");
    assert_eq!(conditions.last().unwrap(), &format!("number {number}"));
}

#[derive(Clone, Debug)]
enum Damage {
    Remove,
    Change(prop::sample::Index, u8),
    Swap,
    Repeat,
}

fn damage() -> impl Strategy<Value = Damage> {
    prop_oneof![
        Just(Damage::Remove),
        (any::<prop::sample::Index>(), 1..=255_u8).prop_map(|(at, by)| Damage::Change(at, by)),
        Just(Damage::Swap),
        Just(Damage::Repeat),
    ]
}

/// Does that to one line, and says where it should show, and as what, if that is sure.
fn inflict(
    damage: &Damage,
    which: prop::sample::Index,
    parts: &mut [(PathBuf, Vec<Vec<u8>>)],
) -> ((usize, usize), Option<Kind>) {
    let of_part = |(part, (_, lines)): (usize, &(PathBuf, Vec<Vec<u8>>))| {
        (0..lines.len()).map(move |line| (part, line))
    };
    let places: Vec<(usize, usize)> = parts.iter().enumerate().flat_map(of_part).collect();
    // Without the first line nobody knows that there was one: older files are rotated away.
    let which = 1 + which.index(places.len() - 2);
    let (part, line) = places[which];
    match damage {
        Damage::Remove => {
            parts[part].1.remove(line);
            let next = places.get(which + 1).filter(|(next, _)| *next != part);
            let shows = next.map_or((part, line), |(next, _)| (*next, 0));
            (shows, Some(Kind::Removed))
        }
        Damage::Change(at, by) => {
            let text = &mut parts[part].1[line];
            let at = at.index(text.len() - 1);
            let changed = text[at] ^ by;
            // The end of a line would be another damage.
            text[at] = if changed == b'\n' {
                text[at] ^ 1
            } else {
                changed
            };
            ((part, line), None)
        }
        Damage::Swap => {
            let (other_part, other) = places[which + 1];
            let mine = parts[part].1[line].clone();
            let other = std::mem::replace(&mut parts[other_part].1[other], mine);
            parts[part].1[line] = other;
            ((part, line), Some(Kind::Reordered))
        }
        Damage::Repeat => {
            let again = parts[part].1[line].clone();
            parts[part].1.insert(line, again);
            ((part, line + 1), Some(Kind::Reordered))
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is done to one line shows at that line, wherever files begin and end.
    #[test]
    fn one_damaged_line_is_found_where_it_is(
        events in 4..30_u64,
        max_bytes in 200..4000_u64,
        damages in prop::collection::vec((any::<prop::sample::Index>(), damage()), 10),
    ) {
        let origin = tempfile::tempdir().unwrap();
        let settings = Settings { max_bytes, keep: 100 };
        run(origin.path(), settings, events);
        let sound = report(origin.path());
        prop_assert!(sound.is_unbroken() && sound.lines == events && sound.notes.is_empty(), "{sound:#?}");
        for (number, (which, damage)) in damages.iter().enumerate() {
            let folder = copy(origin.path());
            let mut parts = parts(folder.path());
            let ((part, line), kind) = inflict(damage, *which, &mut parts);
            for (path, lines) in &parts {
                fs::write(path, lines.concat()).unwrap();
            }
            let broken = report(folder.path());
            let expected = (parts[part].0.display().to_string(), line as u64 + 1);
            let first = broken.breaks.first().map(|first| (first.file.clone(), first.line));
            prop_assert_eq!(first, Some(expected), "{:?}: {:#?}", damage, broken);
            if let Some(kind) = kind {
                prop_assert_eq!(broken.breaks[0].kind, kind, "{:?}: {:#?}", damage, broken);
                prop_assert_eq!(broken.breaks.len(), 1, "{:?}: {:#?}", damage, broken);
            }
            // An agent that goes on does not cover it up.
            if number == 0 {
                run(folder.path(), settings, 3);
                prop_assert!(!report(folder.path()).is_unbroken(), "{:?}", damage);
            }
        }
    }

    /// However large files may be and whenever the agent is started again, the chain holds.
    #[test]
    fn any_rotation_verifies(
        runs in prop::collection::vec((0..40_u64, 200..4000_u64), 1..5),
    ) {
        let folder = tempfile::tempdir().unwrap();
        for (events, max_bytes) in &runs {
            run(folder.path(), Settings { max_bytes: *max_bytes, keep: 500 }, *events);
        }
        let events: u64 = runs.iter().map(|(events, _)| events).sum();
        if events > 0 {
            let report = unbroken(folder.path());
            prop_assert_eq!((report.lines, report.notes.len()), (events, 0));
        }
    }
}
