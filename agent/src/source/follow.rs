//! Follows several logs, by name or by pattern, and hands their lines on in the order of their times.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Result;
use portcullis_engine::parse::Format;
use tracing::{error, info, warn};

use super::{
    Counters, Settings, Start,
    checkpoint::{Checkpoint, FileId, Progress},
    packed::Packing,
    reader::Piece,
    rotated,
    tail::Tail,
};

/// Logs that are followed at a time; further ones that a pattern matches are left out, and said.
pub const MAX_LOGS: usize = 256;
/// Patterns are looked at anew so often.
const LOOK: Duration = Duration::from_secs(1);

/// What has come to a log in so short a time is of the present.
const REST: Duration = Duration::from_secs(1);

/// The logs.
#[derive(Debug)]
pub struct Follow {
    settings: Settings,
    followed: Vec<Followed>,
    /// Whose turn it is, of those that are equally far behind.
    next: usize,
    looked: Duration,
    too_many: bool,
    counters: Arc<Counters>,
}

#[derive(Debug)]
struct Followed {
    tail: Tail,
    /// Its last look failed.
    is_failing: bool,
    /// The time of its next line is not earlier than this, in epoch seconds; 0 until a line with a time was read, so what cannot
    /// be read comes first.
    front: u64,
    /// When it was read to its end, on the boot clock, if the others have not had their turns since.
    ended: Option<Duration>,
}

impl Followed {
    /// It was just read to its end, and the others come first now, even if its clock is behind theirs and more comes all the
    /// time.
    fn rests(&self, now: Duration) -> bool {
        self.ended
            .is_some_and(|ended| now.saturating_sub(ended) < REST)
    }
}

/// What came from one of the logs.
#[derive(Debug)]
pub struct Found {
    /// Lines.
    pub piece: Piece,
    /// How far the reading of their log has come with them.
    pub progress: Progress,
}

impl Follow {
    /// Opens what there is. A log that the checkpoint does not know begins where `settings.start` says, unless it has come to
    /// a pattern that was looked at before: then all of it is new.
    ///
    /// # Errors
    /// When a log is there and cannot be read.
    pub fn open(
        settings: Settings,
        checkpoint: Option<&Checkpoint>,
        now: Duration,
        counters: Arc<Counters>,
    ) -> Result<Self> {
        let mut follow = Self {
            settings,
            followed: Vec::new(),
            next: 0,
            looked: now,
            too_many: false,
            counters,
        };
        for pattern in follow.settings.logs.clone() {
            let is_known = checkpoint.is_some_and(|checkpoint| {
                is_pattern(&pattern) && checkpoint.patterns.contains(&pattern)
            });
            let start = if is_known {
                Start::Beginning
            } else {
                follow.settings.start
            };
            for path in follow.matches(&pattern) {
                let progress = checkpoint.and_then(|checkpoint| checkpoint.of(&path));
                follow.add(&path, start, progress)?;
            }
        }
        Ok(follow)
    }

    fn add(&mut self, path: &Path, start: Start, progress: Option<&Progress>) -> Result<()> {
        let tail = Tail::open(
            path,
            start,
            self.settings.limits,
            progress,
            Arc::clone(&self.counters),
        )?;
        self.followed.push(Followed {
            tail,
            is_failing: false,
            front: 0,
            ended: None,
        });
        Ok(())
    }

    fn tails(&self) -> impl Iterator<Item = &Tail> {
        self.followed.iter().map(|followed| &followed.tail)
    }

    /// The logs that are followed.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.tails().map(Tail::path)
    }

    /// How far the reading of each has come.
    #[must_use]
    pub fn progress(&self) -> Vec<Progress> {
        self.tails().map(Tail::progress).collect()
    }

    /// Bytes that are there and not handed on.
    #[must_use]
    pub fn backlog(&self) -> u64 {
        self.tails().map(Tail::backlog).sum()
    }

    /// Up to `limit` bytes of the log whose next line is the oldest, of those that have something. One that cannot be read holds
    /// up no other; that is said once, and tried again.
    pub fn read(&mut self, limit: usize, now: Duration) -> Option<Found> {
        // With one log there is nobody to wait for.
        let is_one_of_several = self.followed.len() > 1;
        // Those that may have something.
        let all = 0..self.followed.len();
        let (mut waiting, mut resting): (Vec<usize>, Vec<usize>) =
            all.partition(|index| !self.followed[*index].rests(now));
        loop {
            let Some(index) = self.turn(&waiting) else {
                if resting.is_empty() {
                    return None;
                }
                waiting = std::mem::take(&mut resting);
                for index in &waiting {
                    self.followed[*index].ended = None;
                }
                continue;
            };
            let bound = self.bound(index, &waiting);
            let format = &self.settings.format;
            let ripe = |lines: &[u8]| bound.map_or(lines.len(), |bound| ripe(format, lines, bound));
            let followed = &mut self.followed[index];
            let read = followed.tail.read(limit, now, &ripe);
            followed.is_failing = match &read {
                Ok(_) => false,
                Err(problem) => {
                    if !followed.is_failing {
                        error!("{problem:#}");
                    }
                    true
                }
            };
            let Ok(Some(piece)) = read else {
                waiting.retain(|other| *other != index);
                continue;
            };
            let held = followed.tail.held();
            if is_one_of_several {
                let next = held.and_then(|lines| oldest(format, lines));
                if let Some((_, time)) = next.or_else(|| newest(format, &piece.bytes)) {
                    followed.front = time;
                }
            }
            // All of it is younger than what another may have.
            if piece.bytes.is_empty() && held.is_some() {
                continue;
            }
            self.next = index + 1;
            followed.ended = (followed.tail.backlog() == 0).then_some(now);
            return Some(Found {
                piece,
                progress: followed.tail.progress(),
            });
        }
    }

    /// Whose turn it is: the one furthest behind, and in turn those that are equally far.
    fn turn(&self, waiting: &[usize]) -> Option<usize> {
        let (before, after) = waiting.split_at(waiting.partition_point(|index| *index < self.next));
        let in_turn = after.iter().chain(before).copied();
        in_turn.min_by_key(|index| self.followed[*index].front)
    }

    /// Lines of this log up to then may be handed on. `None`: all, since there is no other to wait for.
    fn bound(&self, index: usize, waiting: &[usize]) -> Option<u64> {
        let others = waiting.iter().filter(|other| **other != index);
        let fronts = others.map(|other| self.followed[*other].front);
        fronts.min().map(|front| front + self.settings.ahead_secs)
    }

    /// Looks for logs that have come to the patterns, and lets go of those that are gone; says which have come.
    pub fn look(&mut self, now: Duration) -> Vec<PathBuf> {
        if now.saturating_sub(self.looked) < LOOK {
            return Vec::new();
        }
        self.looked = now;
        let named: BTreeSet<PathBuf> = self.settings.logs.iter().cloned().collect();
        self.followed
            .retain(|Followed { tail, .. }| named.contains(tail.path()) || !tail.is_over());
        let mut come = Vec::new();
        for pattern in named.iter().filter(|pattern| is_pattern(pattern)) {
            for path in self.matches(pattern) {
                // A log that was renamed is the same log.
                let id = fs::metadata(&path).map(|metadata| FileId::of(&metadata));
                if id.is_ok_and(|id| self.tails().any(|tail| tail.knows(id))) {
                    continue;
                }
                match self.add(&path, Start::Beginning, None) {
                    Ok(()) => {
                        info!("{} is new: reading it from its beginning", path.display());
                        come.push(path);
                    }
                    Err(problem) => warn!("{problem:#}"),
                }
            }
        }
        come
    }

    /// Logs that a pattern stands for and that are not followed yet. A plain path stands for itself, be it there or not.
    fn matches(&mut self, pattern: &Path) -> Vec<PathBuf> {
        let mut logs = if is_pattern(pattern) {
            matches(pattern)
        } else {
            vec![pattern.to_path_buf()]
        };
        logs.retain(|log| self.paths().all(|path| path != log));
        if !is_pattern(pattern) {
            return logs;
        }
        let room = MAX_LOGS.saturating_sub(self.followed.len());
        if logs.len() > room {
            if !std::mem::replace(&mut self.too_many, true) {
                warn!(
                    "{} matches {} logs more than the {MAX_LOGS} that are followed: they are left out; make the pattern narrower",
                    pattern.display(),
                    logs.len() - room
                );
            }
            logs.truncate(room);
        }
        logs
    }
}

fn time(format: &Format, line: &[u8]) -> Option<u64> {
    let record = format.read(line.trim_ascii()).ok()?;
    Some(record.at.secs())
}

/// Where the last line begins that has a time, and that.
fn newest(format: &Format, lines: &[u8]) -> Option<(usize, u64)> {
    let mut lines = lines.trim_ascii_end();
    while !lines.is_empty() {
        let start = memchr::memrchr(b'\n', lines).map_or(0, |end| end + 1);
        if let Some(time) = time(format, &lines[start..]) {
            return Some((start, time));
        }
        lines = lines[..start].trim_ascii_end();
    }
    None
}

/// Where the first line ends that has a time, and that.
fn oldest(format: &Format, lines: &[u8]) -> Option<(usize, u64)> {
    let mut start = 0;
    for end in memchr::memchr_iter(b'\n', lines) {
        if let Some(time) = time(format, &lines[start..end]) {
            return Some((end + 1, time));
        }
        start = end + 1;
    }
    None
}

/// How many bytes of these lines, which are in the order of their times, are of lines up to `bound`. Lines without a time go
/// with those after them.
fn ripe(format: &Format, lines: &[u8], bound: u64) -> usize {
    // Up to `ripe` they may go, from `late` on they may not.
    let (mut ripe, mut late) = match newest(format, lines) {
        Some((start, time)) if time > bound => (0, start),
        _ => return lines.len(),
    };
    while ripe < late {
        let middle = ripe + (late - ripe) / 2;
        let start = memchr::memrchr(b'\n', &lines[ripe..middle]).map_or(ripe, |end| ripe + end + 1);
        match oldest(format, &lines[start..late]) {
            Some((end, time)) if time <= bound => ripe = start + end,
            _ => late = start,
        }
    }
    ripe
}

/// Does it stand for several files?
#[must_use]
pub fn is_pattern(path: &Path) -> bool {
    path.to_string_lossy().contains(['*', '?', '['])
}

/// The logs that patterns stand for now; a plain path stands for itself, be it there or not.
#[must_use]
pub fn logs(patterns: &[PathBuf]) -> Vec<PathBuf> {
    let each = |pattern: &PathBuf| {
        if is_pattern(pattern) {
            matches(pattern)
        } else {
            vec![pattern.clone()]
        }
    };
    let all: BTreeSet<PathBuf> = patterns.iter().flat_map(each).collect();
    all.into_iter().collect()
}

/// Those of the patterns that stand for no log now.
pub fn unmatched(patterns: &[PathBuf]) -> impl Iterator<Item = &Path> {
    patterns
        .iter()
        .map(PathBuf::as_path)
        .filter(|pattern| is_pattern(pattern) && matches(pattern).is_empty())
}

/// Files that match a pattern, without rotated ones: what is called like another match with something after it, or packed.
fn matches(pattern: &Path) -> Vec<PathBuf> {
    let all: Vec<PathBuf> = glob::glob(&pattern.to_string_lossy())
        .into_iter()
        .flatten()
        .flatten()
        .filter(|path| path.is_file() && Packing::of(path).is_none())
        .collect();
    let names: BTreeSet<&Path> = all.iter().map(PathBuf::as_path).collect();
    let is_rotation = |path: &&PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| {
            rotated::logs_of(name).any(|log| names.contains(path.with_file_name(log).as_path()))
        })
    };
    all.iter()
        .filter(|path| !is_rotation(path))
        .cloned()
        .collect()
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Write as _};

    use proptest::prelude::*;

    use super::*;
    use crate::source::Limits;

    const LOGS: usize = 3;
    const AHEAD: u64 = 5;

    fn line(time: u64, number: usize) -> String {
        format!(
            "{{\"timestamp\":{time},\"source_ip\":\"192.0.2.1\",\"status\":200,\"n\":{number}}}\n"
        )
    }

    #[test]
    fn a_pattern_of_rotated_logs_alone_stands_for_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("a.json"), "").unwrap();
        fs::write(path("a.json.1"), "").unwrap();
        fs::write(path("b.log.gz"), "").unwrap();
        let patterns = ["*.json", "*.log*", "[x]", "not-there.json"].map(path);
        let unmatched: Vec<_> = unmatched(&patterns).collect();
        // A plain path stands for itself.
        assert_eq!(unmatched, [&patterns[1], &patterns[2]]);
        assert_eq!(logs(&patterns), [path("a.json"), path("not-there.json")]);
    }

    #[test]
    fn lines_up_to_a_time_are_found_whatever_is_among_them() {
        let format = Format::default();
        let times = [3, 3, 4, 7, 7, 9];
        for garbage in 0..=times.len() {
            let mut lines = Vec::new();
            for (number, time) in times.into_iter().enumerate() {
                if number == garbage {
                    lines.push((time, "no line\n".to_owned()));
                }
                lines.push((time, line(time, number)));
            }
            let text: String = lines.iter().map(|(_, line)| line.as_str()).collect();
            for bound in 0..=10 {
                let ripe = ripe(&format, text.as_bytes(), bound);
                let wanted: usize = lines
                    .iter()
                    .filter(|(time, _)| *time <= bound)
                    .map(|(_, line)| line.len())
                    .sum();
                let garbage = "no line\n".len();
                assert!(
                    (wanted.saturating_sub(garbage)..=wanted + garbage).contains(&ripe),
                    "{ripe} of {text} up to {bound}"
                );
                assert!(ripe == 0 || text.as_bytes()[ripe - 1] == b'\n');
            }
        }
        assert_eq!(ripe(&format, b"", 1), 0);
        assert_eq!(ripe(&format, b"none\nof these\n", 1), 14);
    }

    #[derive(Clone, Debug)]
    enum Step {
        /// So many lines to one of the logs, each so many seconds after the one before.
        Write(usize, u8, u8),
        /// Lines that nobody can read.
        Garbage(usize),
        Rotate(usize),
        /// Pieces of so many bytes.
        Read(u8, u16),
        Restart,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => (0..LOGS, 1..20_u8, 0..20_u8).prop_map(|(log, lines, gap)| Step::Write(log, lines, gap)),
            1 => (0..LOGS).prop_map(Step::Garbage),
            1 => (0..LOGS).prop_map(Step::Rotate),
            4 => (1..20_u8, 1..2000_u16).prop_map(|(pieces, bytes)| Step::Read(pieces, bytes)),
            1 => Just(Step::Restart),
        ]
    }

    struct World {
        folder: tempfile::TempDir,
        follow: Follow,
        time: u64,
        written: usize,
        /// Numbers and times of lines.
        read: Vec<(usize, u64)>,
        now: Duration,
        rotations: usize,
    }

    impl World {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            for log in 0..LOGS {
                File::create_new(folder.path().join(format!("{log}.log"))).unwrap();
            }
            Self {
                follow: Self::open(folder.path(), None),
                folder,
                time: 1_700_000_000,
                written: 0,
                read: Vec::new(),
                now: Duration::from_secs(1),
                rotations: 0,
            }
        }

        fn open(folder: &Path, checkpoint: Option<&Checkpoint>) -> Follow {
            let settings = Settings {
                logs: vec![folder.join("*.log")],
                start: Start::Beginning,
                format: Format::default(),
                ahead_secs: AHEAD,
                limits: Limits {
                    max_line: 4096,
                    rewind: Duration::from_secs(60),
                },
                catch_up: Duration::from_secs(2),
                syslog: Vec::new(),
                syslog_group: None,
            };
            Follow::open(settings, checkpoint, Duration::ZERO, Arc::default()).unwrap()
        }

        fn log(&self, log: usize) -> PathBuf {
            self.folder.path().join(format!("{log}.log"))
        }

        fn put(&self, log: usize, text: &str) {
            let mut file = File::options().append(true).open(self.log(log)).unwrap();
            file.write_all(text.as_bytes()).unwrap();
        }

        fn read_one(&mut self, bytes: usize) -> bool {
            let Some(found) = self.follow.read(bytes, self.now) else {
                return false;
            };
            let lines = found.piece.lines().filter(|_| !found.piece.again);
            for (_, line) in lines {
                let text = String::from_utf8_lossy(line).into_owned();
                if let Some((_, number)) = text.trim_end_matches('}').rsplit_once("\"n\":") {
                    let time = time(&Format::default(), line).unwrap();
                    self.read.push((number.parse().unwrap(), time));
                }
            }
            true
        }

        fn take(&mut self, step: &Step) {
            self.now += Duration::from_millis(100);
            match *step {
                Step::Write(log, lines, gap) => {
                    for _ in 0..lines {
                        self.put(log, &line(self.time, self.written));
                        self.written += 1;
                        self.time += u64::from(gap);
                        self.now += Duration::from_secs(gap.into());
                    }
                }
                Step::Garbage(log) => self.put(log, "no line\nnor this one\n"),
                Step::Rotate(log) => {
                    // Of several rotations between two looks, another test.
                    while self.read_one(4096) {}
                    self.rotations += 1;
                    let away = format!("{log}.log.{}", self.rotations);
                    fs::rename(self.log(log), self.folder.path().join(away)).unwrap();
                    File::create_new(self.log(log)).unwrap();
                    while self.read_one(4096) {}
                }
                Step::Read(pieces, bytes) => {
                    for _ in 0..pieces {
                        self.read_one(bytes.into());
                    }
                }
                Step::Restart => {
                    let checkpoint = Checkpoint {
                        logs: self.follow.progress(),
                        ..Checkpoint::default()
                    };
                    self.follow = Self::open(self.folder.path(), Some(&checkpoint));
                }
            }
        }
    }

    #[test]
    fn a_clock_that_is_behind_holds_up_no_other_log() {
        let mut world = World::new();
        while world.read_one(4096) {}
        let mut waited = 0;
        for number in 0..100 {
            // There is always something new in the log whose clock is an hour behind, and in one that nobody can read.
            world.put(0, &line(world.time - 3600, 2 * number));
            world.put(1, "no line\n");
            world.put(2, &line(world.time, 2 * number + 1));
            world.time += 1;
            for _ in 0..2 {
                assert!(world.read_one(4096));
            }
            let other = world.read.iter().filter(|(number, _)| number % 2 == 1);
            waited = waited.max(number + 1 - other.count());
        }
        assert!(waited <= 3, "{waited} lines waited at a time");
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

        /// However far behind one another the logs are, their lines come out in the order of their times, but for a little, and
        /// each once.
        #[test]
        fn several_logs_are_one_stream(steps in prop::collection::vec(step(), 1..40)) {
            let mut world = World::new();
            for step in &steps {
                world.take(step);
            }
            while world.read_one(300) {}
            let mut newest = 0;
            for (number, time) in &world.read {
                prop_assert!(newest <= time + AHEAD + REST.as_secs(), "line {number} comes {} s late", newest - time);
                newest = newest.max(*time);
            }
            let mut numbers: Vec<usize> = world.read.iter().map(|(number, _)| *number).collect();
            numbers.sort_unstable();
            prop_assert_eq!(numbers, (0..world.written).collect::<Vec<_>>());
        }
    }
}
