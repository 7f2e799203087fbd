//! `portcullis learn`, as it is typed, and an engine that begins with what it has left.
#![expect(
    clippy::unwrap_used,
    reason = "a test panics with its evidence, its helpers too"
)]

use std::{fmt::Write as _, fs, path::PathBuf, process::Command};

use portcullis::{
    config::Config,
    store::{Contents, Store},
};
use portcullis_engine::{
    Engine, Feed, Line, Saved, Timestamp,
    baseline::{self, Learnt},
};
use tempfile::TempDir;

/// A midnight.
const START: u64 = 1_700_006_400;
const HOUR: u64 = 3600;
const DAY: u64 = 86_400;
const ATTACKER: &str = "203.0.113.9";

/// A site with so many visitors a second, and thirty requests a second of one more in the minutes that begin at these seconds.
fn log(from: u64, to: u64, visitors: u64, attacks: &[u64]) -> String {
    let mut text = String::new();
    let mut line = |second: u64, client: &str| {
        let at = START + second;
        let _ = writeln!(
            text,
            r#"{{"timestamp":{at},"source_ip":"{client}","status":200}}"#
        );
    };
    for second in from..to {
        for visitor in 0..visitors {
            line(
                second,
                &format!("198.51.100.{}", (second * visitors + visitor) % 200 + 1),
            );
        }
        if attacks
            .iter()
            .any(|begin| (*begin..begin + 60).contains(&second))
        {
            (0..30).for_each(|_| line(second, ATTACKER));
        }
    }
    text
}

struct Place(TempDir);

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("state");
        let config = format!("[state]\ndir = \"{}\"\n", state.display());
        fs::write(folder.path().join("p.toml"), config).unwrap();
        Self(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Exit code, standard output and standard error.
    fn learn(&self, texts: &[&str]) -> (i32, String, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_portcullis"));
        command.args(["learn", "--config"]).arg(self.path("p.toml"));
        for (n, text) in texts.iter().enumerate() {
            let log = self.path(&format!("{n}.log"));
            fs::write(&log, text).unwrap();
            command.arg(log);
        }
        let done = command.output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        let code = done.status.code().unwrap();
        (code, text(done.stdout), text(done.stderr))
    }

    fn taught(&self, texts: &[&str]) -> String {
        let (code, out, err) = self.learn(texts);
        assert_eq!((code, err.as_str()), (0, ""), "{out}");
        out
    }

    fn contents(&self) -> Contents {
        Store::open(&self.path("state")).unwrap().1
    }

    fn known(&self) -> baseline::Saved {
        self.contents().saved.baseline.unwrap()
    }

    /// Hours of which something is known, their means, rounded, and the minutes that they rest on.
    fn hours(&self) -> Vec<(u8, u32, u32)> {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "small"
        )]
        let rounded = |figure: f64| figure.round() as u32;
        let known = self.known();
        known
            .hours()
            .map(|hour| (hour.hour, rounded(hour.mean), rounded(hour.seconds / 60.0)))
            .collect()
    }
}

#[test]
fn a_first_start_is_warm_after_two_hours_of_an_old_log() {
    let place = Place::new();
    let said = place.taught(&[&log(0, 2 * HOUR, 2, &[])]);
    for expected in [
        "read: 1 file, 14400 lines, from 2023-11-15T00:00:00.000Z to 2023-11-15T01:59:59.000Z (1h 59m 59s)\n",
        "\n     0    2.00    0.00  59m 59s\n     1    2.00    0.00  1h\n",
        "\nthe recent past: 30m up to 2023-11-15T01:59:59.000Z; it counts for a start before 2023-11-15T02:29:59.000Z\n",
        "\none client may do, in full requests: 60 in 1s, 90 in 10s, ",
    ] {
        assert!(said.contains(expected), "{expected}: {said}");
    }
    let contents = place.contents();
    assert!(contents.saved.bans.is_empty() && contents.saved.offences.is_empty());
    assert!(contents.checkpoint.is_none() && contents.mode.is_none());
    let at = |second: u64| {
        let saved = Saved {
            baseline: Some(place.known()),
            ..Saved::default()
        };
        let at = Timestamp::from_secs(START + second);
        let engine = Engine::new(Config::default().engine, saved, at);
        engine.snapshot().normal.learnt
    };
    assert_eq!(at(DAY + 60), Learnt::Hour(0));
    assert_eq!(at(7 * DAY + HOUR + 60), Learnt::Hour(1));
    assert_eq!(at(2 * HOUR + 60), Learnt::Recent);
    assert_eq!(at(DAY + 2 * HOUR), Learnt::WarmUp);
}

#[test]
fn attacks_teach_nothing_and_leave_no_bans() {
    let place = Place::new();
    let said = place.taught(&[&log(0, HOUR, 2, &[2000, 3000])]);
    assert!(said.contains("what taught nothing: 2 bans, "), "{said}");
    // Nor does what goes on while the alarm stands.
    assert_eq!(place.hours(), [(0, 2, 53)]);
    let saved = place.contents().saved;
    assert!(saved.bans.is_empty() && saved.offences.is_empty());
}

#[test]
fn what_is_known_is_added_to_and_never_learnt_twice() {
    let place = Place::new();
    let day = log(DAY, DAY + HOUR, 4, &[]);
    place.taught(&[&day]);
    let known = place.known();
    let said = place.taught(&[&day]);
    assert!(
        said.contains(
            "known before: up to 2023-11-16T00:59:59.000Z; 0 lines are newer. 14400 lines are older"
        ),
        "{said}"
    );
    assert_eq!(place.known(), known);
    // The day before teaches only the hour of which nothing is known, the next one both.
    place.taught(&[&log(0, 2 * HOUR, 8, &[])]);
    assert_eq!(place.hours(), [(0, 4, 60), (1, 8, 60)]);
    place.taught(&[&log(DAY, DAY + 2 * HOUR, 4, &[])]);
    assert_eq!(place.hours(), [(0, 4, 60), (1, 5, 90)]);
    assert_eq!(place.known().newest(), Some(START + DAY + 2 * HOUR - 1));
}

#[test]
fn an_agent_that_reads_the_same_log_long_after_learns_nothing_twice() {
    let place = Place::new();
    let text = log(0, HOUR, 2, &[]);
    place.taught(&[&text]);
    let saved = Saved {
        baseline: Some(place.known()),
        ..Saved::default()
    };
    let now = Timestamp::from_secs(START + 3 * HOUR);
    let mut engine = Engine::new(Config::default().engine, saved, now);
    engine.feed(Feed {
        behind: true,
        ..Feed::default()
    });
    let more = log(HOUR, 2 * HOUR, 2, &[]);
    for text in text.lines().chain(more.lines()) {
        let line = Line {
            text: text.as_bytes(),
            offset: 0,
        };
        engine.lines(&[line], now, |_, _| {});
    }
    let known = engine.saved_baseline();
    let hours = known.hours().map(|hour| hour.seconds).collect::<Vec<_>>();
    assert_eq!(hours.len(), 2);
    assert!(hours.iter().all(|seconds| *seconds <= 3600.0), "{hours:?}");
    assert!(hours[1] > 3400.0, "{hours:?}");
}

#[test]
fn it_keeps_all_or_nothing_and_not_beside_an_agent() {
    let place = Place::new();
    let (code, _, err) = place.learn(&["rubbish\n"]);
    assert_eq!(code, 1);
    assert!(
        err.contains("none of 1 line can be read; are they in another format"),
        "{err}"
    );
    let missing = Command::new(env!("CARGO_BIN_EXE_portcullis"))
        .args(["learn", "--config"])
        .args([
            place.path("p.toml"),
            place.path("0.log"),
            "/not/there".into(),
        ])
        .output()
        .unwrap();
    let err = String::from_utf8(missing.stderr).unwrap();
    assert_eq!(missing.status.code(), Some(1));
    assert!(
        err.contains("cannot open /not/there") && err.contains("nothing of these logs was kept"),
        "{err}"
    );
    let future = r#"{"timestamp":99999999999,"source_ip":"192.0.2.1","status":200}"#;
    let (code, _, err) = place.learn(&[future]);
    assert_eq!(code, 1);
    assert!(err.contains("1 line of the future"), "{err}");
    assert!(place.contents().saved.baseline.is_none());
    let (_agent, _) = Store::open(&place.path("state")).unwrap();
    let (code, out, err) = place.learn(&[&log(0, 10, 1, &[])]);
    assert_eq!((code, out.as_str()), (75, ""));
    assert!(
        err.contains("stop the agent first: another agent is running"),
        "{err}"
    );
}
