use std::{
    fs,
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    os::unix::{
        fs::{MetadataExt as _, PermissionsExt as _},
        process::CommandExt as _,
    },
    path::Path,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
};

use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use portcullis_engine::{Origin, Term, Timestamp};
use proptest::prelude::*;
use tempfile::TempDir;
use tokio::sync::mpsc::{self, Receiver};

use super::*;

/// Nothing in these tests takes as long.
const LONG: Duration = Duration::from_secs(30);

fn subject(text: &str) -> Subject {
    text.parse().unwrap()
}

fn ban(text: &str) -> Ban {
    Ban {
        gate: portcullis_engine::Gate::Nginx,
        ..Ban::new(
            subject(text),
            Timestamp::from_secs(1_000),
            Term::Permanent,
            Origin::Operator,
        )
    }
}

/// Waits until something is so.
fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = clock::boot() + LONG;
    while !is_so() {
        assert!(clock::boot() < end, "not so in time: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A folder with a stand-in for Nginx, which does as files in that folder say.
struct Bench {
    folder: TempDir,
    settings: Settings,
    sender: Sender<Outcome>,
    outcomes: Receiver<Outcome>,
}

/// Says what it was started for, shows what a wildcard would match, waits while it is held, hangs, fails.
const SCRIPT: &str = r#"
cd "$1"
echo "$2" >> "log"
echo *.conf >> seen
while [ -e "hold" ]; do sleep 0.01; done
if [ -e "$2-hangs" ]; then echo "waiting for Godot" >&2; sleep 600; fi
if [ -e "$2-fails" ]; then echo "nginx: [emerg] it is $2" >&2; exit 1; fi
if [ "$2" = "reload" ]; then cp banned.conf loaded; fi
echo "$2 is over" >> log
"#;

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let script = folder.path().join("nginx.sh");
        fs::write(&script, SCRIPT).unwrap();
        let command = |verb: &str| {
            let words = [
                "sh",
                script.to_str().unwrap(),
                folder.path().to_str().unwrap(),
                verb,
            ];
            words.map(str::to_owned).to_vec()
        };
        let settings = Settings {
            test: command("test"),
            reload: command("reload"),
            min_interval: Duration::ZERO,
            timeout: LONG,
            ..Settings::new(folder.path().join("banned.conf"), Form::Deny)
        };
        let (sender, outcomes) = mpsc::channel(16);
        Self {
            folder,
            settings,
            sender,
            outcomes,
        }
    }

    /// Started, and done with what there is to do at a start.
    fn start(&self, in_force: &[&str]) -> Nginx {
        let in_force: BTreeSet<Subject> = in_force.iter().map(|text| subject(text)).collect();
        let include = Include::new(&self.settings.include, self.settings.form).unwrap();
        let is_right = include.read().unwrap() == Some(include.text(&in_force));
        let tested = self.count("test is over");
        let nginx = Nginx::start(self.settings.clone(), in_force, [], self.sender.clone()).unwrap();
        eventually("the start is over", || {
            let status = nginx.status();
            let is_tested = self.count("test is over") > tested;
            status.reloads == 1 || status.error.is_some() || is_right && is_tested
        });
        nginx
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn set(&self, name: &str) {
        fs::write(self.path(name), "").unwrap();
    }

    fn unset(&self, name: &str) {
        fs::remove_file(self.path(name)).unwrap();
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    /// The lines of a file that are no comments.
    fn lines_of(&self, name: &str) -> Vec<String> {
        let text = self.read(name);
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        lines.map(str::to_owned).collect()
    }

    fn lines(&self) -> usize {
        self.lines_of("banned.conf").len()
    }

    /// How often a command was started.
    fn count(&self, verb: &str) -> usize {
        self.read("log")
            .lines()
            .filter(|line| *line == verb)
            .count()
    }

    /// The next outcome: of a ban or not, whose, and why it failed.
    fn outcome(&mut self) -> (bool, String, Result<(), String>) {
        let mut outcome = None;
        eventually("an outcome", || {
            outcome = self.outcomes.try_recv().ok();
            outcome.is_some()
        });
        match outcome.unwrap() {
            Outcome::Banned(ban, result) => (true, ban.subject.to_string(), result),
            Outcome::Unbanned(ban, _, result) => (false, ban.subject.to_string(), result),
        }
    }

    fn is_done(&mut self, is_ban: bool, text: &str) {
        assert_eq!(self.outcome(), (is_ban, text.to_owned(), Ok(())));
    }

    fn has_failed(&mut self, is_ban: bool, text: &str, why: &str) {
        let (was_ban, whose, result) = self.outcome();
        let problem = result.unwrap_err();
        assert_eq!((was_ban, whose.as_str()), (is_ban, text), "{problem}");
        assert!(problem.contains(why), "{problem}");
    }
}

#[test]
fn a_ban_is_written_and_read_and_so_is_its_end() {
    let mut bench = Bench::new();
    let nginx = bench.start(&["198.51.100.0/24"]);
    assert_eq!(bench.lines_of("loaded"), ["deny 198.51.100.0/24;"]);
    nginx.ban(ban("203.0.113.7"));
    bench.is_done(true, "203.0.113.7");
    assert_eq!(
        bench.lines_of("loaded"),
        ["deny 198.51.100.0/24;", "deny 203.0.113.7;"]
    );
    let mode = fs::metadata(&bench.settings.include)
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o7777, 0o644);
    nginx.unban(ban("198.51.100.0/24"), "over".to_owned());
    bench.is_done(false, "198.51.100.0/24");
    assert_eq!(bench.lines_of("loaded"), ["deny 203.0.113.7;"]);
    let expected = Status {
        entries: 1,
        reloads: 3,
        ..Status::default()
    };
    assert_eq!(nginx.status(), expected);
    drop(nginx);
    assert_eq!(bench.lines(), 1, "what stands stays");
}

#[test]
fn a_ban_that_stands_is_renewed_without_a_reload() {
    let mut bench = Bench::new();
    let nginx = bench.start(&["203.0.113.7"]);
    nginx.ban(ban("203.0.113.7"));
    bench.is_done(true, "203.0.113.7");
    assert_eq!(nginx.status().reloads, 1);
}

#[test]
fn who_is_allowed_is_left_out_of_a_ban_from_the_start_and_whenever_that_changes() {
    let mut bench = Bench::new();
    let net = |text: &str| subject(text).net();
    let in_force = [subject("192.0.2.0/30")];
    let start = |bench: &Bench, allowed: &[&str]| {
        let allowed = allowed.iter().map(|text| net(text));
        let sender = bench.sender.clone();
        Nginx::start(bench.settings.clone(), in_force, allowed, sender).unwrap()
    };
    let nginx = start(&bench, &["192.0.2.1"]);
    eventually("it is read", || nginx.status().reloads == 1);
    let split = ["deny 192.0.2.0;", "deny 192.0.2.2/31;"];
    assert_eq!(bench.lines_of("loaded"), split);
    eventually("it is one ban", || nginx.status().entries == 1);
    // What is no part of a ban changes nothing.
    nginx.allow(["192.0.2.1", "198.51.100.7"].map(net));
    nginx.allow([]);
    eventually("the hole is closed", || nginx.status().reloads == 2);
    assert_eq!(bench.lines_of("loaded"), ["deny 192.0.2.0/30;"]);
    nginx.allow([net("192.0.2.0/24")]);
    eventually("nothing is left of it", || nginx.status().reloads == 3);
    assert_eq!(bench.lines(), 0);
    nginx.ban(ban("203.0.113.0/31"));
    bench.is_done(true, "203.0.113.0/31");
    nginx.allow([net("192.0.2.1"), net("203.0.113.1")]);
    eventually("both have a hole", || nginx.status().reloads == 5);
    assert_eq!(
        bench.lines_of("loaded"),
        ["deny 192.0.2.0;", "deny 192.0.2.2/31;", "deny 203.0.113.0;"]
    );
    nginx.unban(ban("203.0.113.0/31"), String::new());
    bench.is_done(false, "203.0.113.0/31");
    assert_eq!(bench.lines_of("loaded"), split);
    drop(nginx);
    // What is left of a run is told network by network, and is right for the next one.
    let left: Vec<String> = left(&bench.settings)
        .unwrap()
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(left, ["192.0.2.0", "192.0.2.2/31"]);
    let tested = bench.count("test is over");
    let nginx = start(&bench, &["192.0.2.1"]);
    eventually("it is tested", || bench.count("test is over") > tested);
    let status = nginx.status();
    assert_eq!((status.reloads, status.drift), (0, 0));
}

#[test]
fn a_hole_that_nginx_was_not_told_of_is_told_of_at_the_end_or_tried_again() {
    let mut bench = Bench::new();
    let mut nginx = bench.start(&["192.0.2.0/31"]);
    bench.set("test-fails");
    nginx.allow([subject("192.0.2.1").net()]);
    eventually("it is said", || nginx.status().error.is_some());
    assert_eq!(bench.lines_of("loaded"), ["deny 192.0.2.0/31;"]);
    bench.unset("test-fails");
    eventually("it is read", || {
        let status = nginx.status();
        status.reloads == 2 && status.error.is_none()
    });
    drop(nginx);
    bench.settings.min_interval = Duration::from_secs(3600);
    nginx = bench.start(&["192.0.2.0/31"]);
    nginx.allow([subject("192.0.2.1").net()]);
    nginx.close();
    drop(nginx);
    assert_eq!(bench.lines_of("loaded"), ["deny 192.0.2.0;"]);
}

#[test]
fn a_start_with_another_form_writes_it_at_once_and_accuses_nobody() {
    let mut bench = Bench::new();
    drop(bench.start(&["203.0.113.7"]));
    for (form, line) in [
        (Form::Geo, "203.0.113.7 1;"),
        (Form::Deny, "deny 203.0.113.7;"),
    ] {
        bench.settings.form = form;
        assert_eq!(
            left(&bench.settings).unwrap(),
            [subject("203.0.113.7")].into()
        );
        let nginx = bench.start(&["203.0.113.7"]);
        let status = nginx.status();
        assert_eq!((status.reloads, status.drift), (1, 0));
        assert_eq!(bench.lines_of("loaded"), [line]);
    }
}

#[test]
fn whoever_is_only_observed_has_no_line() {
    let mut bench = Bench::new();
    let nginx = bench.start(&["203.0.113.7"]);
    let observed = Ban {
        observe: true,
        ..ban("203.0.113.7")
    };
    nginx.ban(observed);
    bench.is_done(true, "203.0.113.7");
    assert_eq!(bench.lines(), 0);
}

#[test]
fn changes_that_come_during_a_reload_are_one_more_reload() {
    let mut bench = Bench::new();
    let nginx = bench.start(&[]);
    let before = nginx.status().reloads;
    bench.set("hold");
    let tests = bench.count("test");
    nginx.ban(ban("203.0.113.0"));
    eventually("the first is tested", || bench.count("test") > tests);
    for n in 1..=200 {
        nginx.ban(ban(&format!("203.0.113.{n}")));
    }
    assert_eq!(nginx.status().pending, 201);
    bench.unset("hold");
    for _ in 0..=200 {
        assert_eq!(bench.outcome().2, Ok(()));
    }
    let status = nginx.status();
    assert_eq!(
        (status.reloads - before, status.entries, status.pending),
        (2, 201, 0)
    );
}

#[test]
fn the_first_change_after_a_quiet_time_goes_at_once_and_the_next_waits_or_goes_at_the_end() {
    let mut bench = Bench::new();
    drop(bench.start(&[]));
    bench.settings.min_interval = Duration::from_secs(3600);
    let mut nginx = bench.start(&[]);
    nginx.ban(ban("203.0.113.1"));
    bench.is_done(true, "203.0.113.1");
    nginx.ban(ban("203.0.113.2"));
    nginx.unban(ban("203.0.113.1"), "over".to_owned());
    assert_eq!(nginx.status().pending, 2);
    nginx.close();
    bench.is_done(false, "203.0.113.1");
    bench.is_done(true, "203.0.113.2");
    drop(nginx);
    assert_eq!(bench.lines_of("loaded"), ["deny 203.0.113.2;"]);
    assert_eq!(bench.count("reload"), 3);
}

#[test]
fn of_what_waits_for_a_subject_each_kind_is_answered_once_in_order() {
    let mut bench = Bench::new();
    let nginx = bench.start(&[]);
    bench.set("hold");
    let tests = bench.count("test");
    nginx.ban(ban("192.0.2.1"));
    eventually("the first is tested", || bench.count("test") > tests);
    nginx.ban(ban("203.0.113.7"));
    nginx.ban(ban("203.0.113.7"));
    nginx.unban(ban("203.0.113.7"), "a mistake".to_owned());
    nginx.unban(ban("192.0.2.1"), "over".to_owned());
    nginx.ban(ban("192.0.2.1"));
    bench.unset("hold");
    bench.is_done(true, "192.0.2.1");
    bench.is_done(false, "192.0.2.1");
    bench.is_done(true, "192.0.2.1");
    bench.is_done(true, "203.0.113.7");
    bench.is_done(false, "203.0.113.7");
    assert_eq!(bench.lines_of("loaded"), ["deny 192.0.2.1;"]);
    assert_eq!(nginx.status().overtaken, 1);
}

#[test]
fn what_does_not_pass_the_test_is_undone_said_once_and_tried_again() {
    let mut bench = Bench::new();
    let nginx = bench.start(&["192.0.2.1"]);
    let before = bench.read("banned.conf");
    bench.set("test-fails");
    nginx.ban(ban("203.0.113.7"));
    bench.has_failed(
        true,
        "203.0.113.7",
        "exit status: 1: nginx: [emerg] it is test",
    );
    assert_eq!(bench.read("banned.conf"), before);
    assert!(nginx.status().error.unwrap().contains("it is test"));
    let tests = bench.count("test");
    eventually("it is tried again", || bench.count("test") > tests + 2);
    assert_eq!(
        bench.count("reload"),
        1,
        "never with what does not pass the test"
    );
    nginx.ban(ban("203.0.113.8"));
    bench.has_failed(true, "203.0.113.8", "it is test");
    bench.unset("test-fails");
    bench.is_done(true, "203.0.113.7");
    bench.is_done(true, "203.0.113.8");
    let expected = Status {
        entries: 3,
        reloads: 2,
        ..Status::default()
    };
    assert_eq!(nginx.status(), expected);
    assert_eq!(bench.lines_of("loaded").len(), 3);
}

#[test]
fn a_reload_that_fails_is_undone_and_nginx_reads_what_was_undone() {
    let mut bench = Bench::new();
    let nginx = bench.start(&[]);
    let before = bench.read("banned.conf");
    bench.set("reload-fails");
    nginx.ban(ban("203.0.113.7"));
    bench.has_failed(true, "203.0.113.7", "it is reload");
    eventually("it is put back", || bench.read("banned.conf") == before);
    nginx.unban(ban("203.0.113.7"), "a mistake".to_owned());
    bench.has_failed(false, "203.0.113.7", "it is reload");
    // The file is right, but whether Nginx has read it so is not known.
    bench.unset("reload-fails");
    bench.is_done(false, "203.0.113.7");
    assert_eq!(bench.read("loaded"), before);
    assert_eq!(nginx.status().reloads, 2);
}

#[test]
fn a_command_that_hangs_is_killed_and_its_change_undone() {
    let mut bench = Bench::new();
    drop(bench.start(&[]));
    bench.settings.timeout = Duration::from_secs(1);
    let nginx = bench.start(&[]);
    let before = bench.read("banned.conf");
    bench.set("reload-hangs");
    nginx.ban(ban("203.0.113.7"));
    bench.has_failed(
        true,
        "203.0.113.7",
        "took longer than 1s and was killed: waiting for Godot",
    );
    bench.unset("reload-hangs");
    bench.is_done(true, "203.0.113.7");
    assert_ne!(bench.read("loaded"), before);
}

#[test]
fn a_command_that_is_not_there_is_no_reason_not_to_start() {
    let mut bench = Bench::new();
    bench.settings.test = vec!["/nowhere/nginx".to_owned(), "-t".to_owned()];
    let nginx = Nginx::start(bench.settings.clone(), [], [], bench.sender.clone()).unwrap();
    nginx.ban(ban("203.0.113.7"));
    bench.has_failed(
        true,
        "203.0.113.7",
        "/nowhere/nginx -t cannot be started: No such file",
    );
    assert_eq!((bench.lines(), bench.count("reload")), (0, 0));
    bench.settings.reload.clear();
    assert!(Nginx::start(bench.settings.clone(), [], [], bench.sender.clone()).is_err());
}

#[test]
fn a_file_that_cannot_be_written_is_said_and_tried_again() {
    let mut bench = Bench::new();
    let nginx = bench.start(&["192.0.2.1"]);
    let before = bench.read("banned.conf");
    let obstacle = bench.path(".banned.conf.fresh.tmp");
    fs::create_dir(&obstacle).unwrap();
    nginx.ban(ban("203.0.113.7"));
    bench.has_failed(true, "203.0.113.7", "cannot write");
    assert_eq!(bench.read("banned.conf"), before);
    fs::remove_dir(&obstacle).unwrap();
    bench.is_done(true, "203.0.113.7");
    assert_eq!(bench.lines_of("loaded").len(), 2);
}

#[test]
fn a_restart_writes_nothing_when_nothing_has_changed() {
    let bench = Bench::new();
    drop(bench.start(&["203.0.113.7", "2001:db8::/64"]));
    let before = fs::metadata(&bench.settings.include).unwrap();
    let nginx = bench.start(&["2001:db8::/64", "203.0.113.7"]);
    assert_eq!(nginx.status().reloads, 0);
    drop(nginx);
    let after = fs::metadata(&bench.settings.include).unwrap();
    assert_eq!(
        (before.ino(), before.mtime_nsec()),
        (after.ino(), after.mtime_nsec())
    );
    assert_eq!((bench.count("test"), bench.count("reload")), (2, 1));
    drop(bench.start(&["203.0.113.7"]));
    assert_eq!(bench.lines_of("loaded"), ["deny 203.0.113.7;"]);
}

#[test]
fn a_configuration_that_does_not_pass_the_test_is_no_reason_not_to_start() {
    let mut bench = Bench::new();
    bench.set("test-fails");
    let nginx = bench.start(&["203.0.113.7"]);
    eventually("it is said", || nginx.status().error.is_some());
    assert_eq!(bench.lines(), 0, "a file is there, as Nginx includes it");
    assert!(bench.settings.include.exists());
    bench.unset("test-fails");
    eventually("it is made good", || nginx.status().entries == 1);
    assert_eq!(bench.lines_of("loaded"), ["deny 203.0.113.7;"]);
    assert!(
        bench.outcomes.try_recv().is_err(),
        "these bans were told long ago"
    );
}

#[test]
fn what_a_killed_run_was_trying_is_undone_and_nginx_reads_it_anew() {
    let bench = Bench::new();
    drop(bench.start(&["203.0.113.7"]));
    fs::copy(
        &bench.settings.include,
        bench.path(".banned.conf.former.tmp"),
    )
    .unwrap();
    fs::write(bench.path(".banned.conf.fresh.tmp"), "half").unwrap();
    fs::write(&bench.settings.include, "nobody has tested this").unwrap();
    let nginx = bench.start(&["203.0.113.7"]);
    eventually("it is read", || nginx.status().reloads == 1);
    assert_eq!(bench.lines_of("loaded"), ["deny 203.0.113.7;"]);
    assert_eq!(nginx.status().drift, 0);
    eventually("nothing is left", || {
        let hidden = |entry: &fs::DirEntry| entry.file_name().to_string_lossy().starts_with('.');
        !fs::read_dir(bench.folder.path())
            .unwrap()
            .flatten()
            .any(|entry| hidden(&entry))
    });
}

#[test]
fn edits_of_the_file_are_overwritten_and_counted() {
    let bench = Bench::new();
    let nginx = bench.start(&["203.0.113.7"]);
    let right = bench.read("banned.conf");
    for (drift, edited) in [(1, Some("allow all;")), (2, Some("")), (3, None)] {
        match edited {
            Some(text) => fs::write(&bench.settings.include, text).unwrap(),
            None => fs::remove_file(&bench.settings.include).unwrap(),
        }
        eventually("it is noticed", || nginx.status().reloads == 1 + drift);
        assert_eq!(nginx.status().drift, drift);
        assert_eq!(
            (bench.read("banned.conf"), bench.read("loaded")),
            (right.clone(), right.clone())
        );
    }
    drop(nginx);
    fs::write(&bench.settings.include, format!("{right}allow all;\n")).unwrap();
    let nginx = bench.start(&["203.0.113.7"]);
    eventually("it is read", || nginx.status().reloads == 1);
    assert_eq!(nginx.status().drift, 1, "of edits while it was away too");
    assert_eq!(bench.read("loaded"), right);
}

#[test]
fn the_file_of_somebody_else_and_a_folder_that_is_not_there_are_refused() {
    let mut bench = Bench::new();
    let start = |bench: &Bench| {
        let started = Nginx::start(bench.settings.clone(), [], [], bench.sender.clone());
        format!("{:#}", started.unwrap_err())
    };
    fs::write(&bench.settings.include, "user www-data;\n").unwrap();
    assert!(start(&bench).contains("is not a file of Portcullis: empty it"));
    assert!(clear(&bench.settings).is_err());
    assert_eq!(bench.read("banned.conf"), "user www-data;\n");
    bench.settings.include = bench.path("nowhere/banned.conf");
    let refused = start(&bench);
    assert!(
        refused.contains("nowhere: create that folder") && refused.contains("No such file"),
        "{refused}"
    );
    bench.settings.include = PathBuf::from("/");
    assert!(start(&bench).contains("names no file"));
    assert_eq!(bench.count("test"), 0);
}

#[test]
fn whoever_reads_the_file_never_sees_a_part_of_it() {
    let mut bench = Bench::new();
    let nginx = bench.start(&[]);
    let include = Include::new(&bench.settings.include, Form::Deny).unwrap();
    let is_over = AtomicBool::new(false);
    let network = |n: u32| format!("10.{n}.0.0/16");
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut sizes = BTreeSet::new();
            while !is_over.load(Ordering::Relaxed) {
                let content = include.read().unwrap().expect("it is always there");
                let banned = include::banned(&content);
                sizes.insert(banned.expect("it is always whole").len());
            }
            sizes
        });
        for round in 0..20 {
            for n in 0..250 {
                if round % 2 == 0 {
                    nginx.ban(ban(&network(n)));
                } else {
                    nginx.unban(ban(&network(n)), String::new());
                }
            }
            for _ in 0..250 {
                assert_eq!(bench.outcome().2, Ok(()));
            }
        }
        is_over.store(true, Ordering::Relaxed);
        let sizes = reader.join().unwrap();
        assert!(sizes.contains(&0) && sizes.contains(&250), "{sizes:?}");
    });
}

#[test]
fn no_wildcard_matches_the_files_beside_it() {
    let mut bench = Bench::new();
    let nginx = bench.start(&[]);
    nginx.ban(ban("203.0.113.7"));
    bench.is_done(true, "203.0.113.7");
    let seen = bench.read("seen");
    assert!(seen.lines().all(|line| line == "banned.conf"), "{seen}");
}

#[test]
fn clearing_takes_every_ban_out_and_says_whether_there_was_one() {
    let bench = Bench::new();
    assert!(!clear(&bench.settings).unwrap());
    assert!(!bench.settings.include.exists());
    drop(bench.start(&["203.0.113.7"]));
    assert!(clear(&bench.settings).unwrap());
    assert_eq!((bench.lines(), bench.count("reload")), (0, 2));
    assert_eq!(bench.read("loaded"), bench.read("banned.conf"));
    assert!(!clear(&bench.settings).unwrap());
    assert_eq!(bench.count("reload"), 2);
}

#[test]
fn clearing_that_nginx_is_not_told_of_is_told_by_the_next_one() {
    let bench = Bench::new();
    drop(bench.start(&["203.0.113.7"]));
    bench.set("reload-fails");
    let problem = format!("{:#}", clear(&bench.settings).unwrap_err());
    assert!(
        problem.contains("no bans any more, but Nginx has not read it: "),
        "{problem}"
    );
    assert_eq!(bench.lines(), 0);
    bench.unset("reload-fails");
    assert!(clear(&bench.settings).unwrap());
    assert!(!clear(&bench.settings).unwrap());
}

#[test]
fn the_end_does_not_wait_for_anybody_who_listens() {
    let bench = Bench::new();
    let nginx = bench.start(&[]);
    for n in 0..100 {
        nginx.ban(ban(&format!("203.0.113.{n}")));
    }
    let Bench {
        outcomes, folder, ..
    } = bench;
    drop(outcomes);
    drop(nginx);
    let text = fs::read_to_string(folder.path().join("loaded")).unwrap();
    assert_eq!(text.matches("deny").count(), 100);
}

/// A step of what may happen.
#[derive(Clone, Debug)]
enum Step {
    Ban(u8, bool),
    Unban(u8),
    Allow(BTreeSet<u8>),
    Round { passes: bool },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0u8..4, prop::bool::weighted(0.2)).prop_map(|(n, observe)| Step::Ban(n, observe)),
        (0u8..4).prop_map(Step::Unban),
        prop::collection::btree_set(0u8..4, 0..4).prop_map(Step::Allow),
        any::<bool>().prop_map(|passes| Step::Round { passes }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 48, ..ProptestConfig::default() })]

    /// Whatever fails in between, the file becomes what was asked for, and every change has one last answer unless it was
    /// overtaken.
    #[test]
    fn every_change_is_answered_or_overtaken(steps in prop::collection::vec(step(), 0..30)) {
        let bench = Bench::new();
        let (outcomes, mut told) = mpsc::channel(1000);
        let mut settings = bench.settings.clone();
        settings.reload = vec!["true".to_owned()];
        let include = Include::new(&settings.include, settings.form).unwrap();
        let (said, is_unread) = include.open().unwrap();
        let mut hands = Hands {
            settings,
            include,
            wanted: BTreeSet::new(),
            holes: Holes::default(),
            said,
            is_unread,
            owed: Owed::default(),
            not_before: Duration::ZERO,
            outcomes,
            shared: Arc::default(),
        };
        let (mut model, mut allowed) = (BTreeSet::new(), BTreeSet::new());
        let mut newest = BTreeMap::new();
        let mut changes = 0;
        let numbered = |n: u8, number: u64| Ban {
            since: Timestamp::from_secs(number),
            ..ban(&format!("192.0.2.{n}"))
        };
        for step in steps.into_iter().chain([Step::Round { passes: true }]) {
            let change = match step {
                Step::Ban(n, observe) => Change::Ban(Ban { observe, ..numbered(n, changes) }),
                Step::Allow(numbers) => {
                    allowed = numbers.into_iter().map(|n| numbered(n, 0).subject).collect();
                    let holes = allowed.iter().map(|subject| subject.net()).collect();
                    hands.shared.desk().holes = Some(holes);
                    continue;
                }
                Step::Unban(n) => Change::Unban(numbered(n, changes), String::new()),
                Step::Round { passes } => {
                    let command = if passes { "true" } else { "false" };
                    hands.settings.test = vec![command.to_owned()];
                    hands.round();
                    continue;
                }
            };
            let subject = change.ban().subject;
            if change.is_ban() && !change.ban().observe {
                model.insert(subject);
            } else {
                model.remove(&subject);
            }
            newest.insert(subject, changes);
            changes += 1;
            let mut desk = hands.shared.desk();
            let overtaken = desk.changes.add(change);
            desk.status.overtaken += overtaken;
        }
        let lines = model.difference(&allowed).copied().collect();
        prop_assert_eq!(hands.include.read().unwrap().unwrap(), hands.include.text(&lines));
        let mut answers: BTreeMap<u64, Vec<bool>> = BTreeMap::new();
        while let Ok(outcome) = told.try_recv() {
            let (Outcome::Banned(ban, result) | Outcome::Unbanned(ban, _, result)) = outcome;
            answers.entry(ban.since.secs()).or_default().push(result.is_ok());
        }
        let status = hands.shared.desk().status.clone();
        prop_assert_eq!(answers.len() as u64 + status.overtaken, changes);
        let right: [&[bool]; 3] = [&[true], &[false], &[false, true]];
        prop_assert!(answers.values().all(|results| right.contains(&results.as_slice())), "{:?}", answers);
        prop_assert!(newest.values().all(|number| answers[number].last() == Some(&true)), "{:?}", answers);
        prop_assert_eq!((status.pending, status.entries, status.drift), (0, model.len(), 0));
    }
}

const NGINX: &str = "/usr/sbin/nginx";

/// The real one, on a port of its own.
struct Server {
    master: Child,
    port: u16,
    stop: Vec<String>,
}

impl Server {
    fn start(bench: &mut Bench, form: Form) -> Self {
        let folder = bench.folder.path().to_str().unwrap().to_owned();
        // Free now; nobody else is likely to take it.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let (outside, inside) = match form {
            Form::Deny => ("", "include banned*;"),
            Form::Geo => (
                "geo $banned { default 0; include banned.conf; }",
                "if ($banned) { return 403; }",
            ),
        };
        let temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|what| format!("{what}_temp_path {folder}/{what};"))
            .concat();
        let user = if nix::unistd::geteuid().is_root() {
            "user root;"
        } else {
            ""
        };
        let config = format!(
            "{user} daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;\n\
             events {{ worker_connections 64; }}\n\
             http {{ access_log off; {temporary} {outside}\n\
             server {{ listen 127.0.0.1:{port}; root {folder}/www; {inside} }} }}\n"
        );
        fs::write(bench.path("nginx.conf"), config).unwrap();
        fs::create_dir(bench.path("www")).unwrap();
        fs::write(bench.path("www/index.html"), "hello").unwrap();
        let config = bench.path("nginx.conf");
        let command = |arguments: &[&str]| -> Vec<String> {
            let words = [NGINX, "-p", folder.as_str(), "-c", config.to_str().unwrap()];
            words
                .iter()
                .chain(arguments)
                .map(|word| (*word).to_owned())
                .collect()
        };
        bench.settings.form = form;
        bench.settings.test = command(&["-t"]);
        bench.settings.reload = command(&["-s", "reload"]);
        // As after a start of the agent: Nginx does not start without it.
        fs::write(&bench.settings.include, "").unwrap();
        let start = command(&[]);
        let master = Command::new(&start[0])
            .args(&start[1..])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .unwrap();
        let server = Self {
            master,
            port,
            stop: command(&["-s", "stop"]),
        };
        eventually("Nginx answers", || {
            server.get().is_some() && bench.path("pid").exists()
        });
        server
    }

    /// Is this the answer of its only worker? Workers of before a reload answer too, until they have ended.
    fn answers(&self, status: u16) -> bool {
        let master = self.master.id();
        let children = fs::read_to_string(format!("/proc/{master}/task/{master}/children"));
        let workers = children.unwrap_or_default().split_whitespace().count();
        workers == 1 && self.get() == Some(status)
    }

    /// The status of the answer to a request.
    fn get(&self) -> Option<u16> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).ok()?;
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        answer.split(' ').nth(1)?.parse().ok()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let stopped = command::run(&self.stop, LONG);
        if stopped.is_err() {
            let _gone = killpg(
                Pid::from_raw(self.master.id().cast_signed()),
                Signal::SIGKILL,
            );
        }
        let _status = self.master.wait();
    }
}

fn in_effect_in_the_real_one(form: Form) {
    if !Path::new(NGINX).exists() {
        eprintln!("{NGINX} is not installed: nothing is tested");
        return;
    }
    let mut bench = Bench::new();
    let server = Server::start(&mut bench, form);
    let others = ["198.51.100.0/24", "2001:db8:1:2::/64", "2001:db8::1"];
    let in_force = others.iter().map(|text| subject(text));
    let nginx = Nginx::start(bench.settings.clone(), in_force, [], bench.sender.clone()).unwrap();
    eventually("it is read", || nginx.status().reloads == 1);
    assert_eq!(server.get(), Some(200));
    for around in ["127.0.0.1", "127.0.0.0/8"] {
        nginx.ban(ban(around));
        bench.is_done(true, around);
        eventually("the ban is in effect", || server.answers(403));
        nginx.unban(ban(around), String::new());
        bench.is_done(false, around);
        eventually("its end is in effect", || server.answers(200));
    }
    // What Nginx says of a mistake elsewhere in its configuration.
    let config = bench.read("nginx.conf");
    fs::write(bench.path("nginx.conf"), format!("{config}nonsense;\n")).unwrap();
    nginx.ban(ban("127.0.0.1"));
    bench.has_failed(true, "127.0.0.1", "unknown directive \"nonsense\"");
    assert_eq!(server.get(), Some(200));
    fs::write(bench.path("nginx.conf"), config).unwrap();
    bench.is_done(true, "127.0.0.1");
    eventually("the ban is in effect", || server.answers(403));
    drop(nginx);
    assert!(clear(&bench.settings).unwrap());
    eventually("no ban is in effect", || server.answers(200));
}

#[test]
fn in_the_real_nginx_a_denied_address_is_kept_out() {
    in_effect_in_the_real_one(Form::Deny);
}

#[test]
fn in_the_real_nginx_an_address_of_the_map_is_kept_out() {
    in_effect_in_the_real_one(Form::Geo);
}
