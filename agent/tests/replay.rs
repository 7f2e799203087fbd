//! `portcullis replay`, as it is typed.
#![expect(
    clippy::unwrap_used,
    reason = "a test panics with its evidence, its helpers too"
)]

use std::{
    fmt::Write as _,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::Value;
use tempfile::TempDir;

const START: u64 = 1_795_305_600;
const ATTACKER: &str = "203.0.113.9";

/// A site with two visitors a second, and thirty requests a second of one more in the minutes that begin at these seconds.
fn log(from: u64, to: u64, attacks: &[u64]) -> String {
    let mut text = String::new();
    let mut line = |second: u64, client: &str| {
        let at = START + second;
        let _ = writeln!(
            text,
            r#"{{"timestamp":{at},"source_ip":"{client}","status":200}}"#
        );
    };
    for second in from..to {
        line(second, &format!("198.51.100.{}", second * 2 % 40 + 1));
        line(second, &format!("198.51.100.{}", second * 2 % 40 + 2));
        if attacks
            .iter()
            .any(|begin| (*begin..begin + 60).contains(&second))
        {
            (0..30).for_each(|_| line(second, ATTACKER));
        }
    }
    text
}

struct Place {
    folder: TempDir,
    log: PathBuf,
}

/// Exit code, standard output and standard error.
type Said = (i32, String, String);

impl Place {
    fn new(text: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("access.log");
        fs::write(&log, text).unwrap();
        // Whatever configuration this host has is not meant.
        fs::write(folder.path().join("p.toml"), "").unwrap();
        Self { folder, log }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn replay_from(&self, words: &[&str], files: &[&Path], input: Stdio) -> Said {
        let done = Command::new(env!("CARGO_BIN_EXE_portcullis"))
            .arg("replay")
            .arg("--config")
            .arg(self.path("p.toml"))
            .args(words)
            .args(files)
            .stdin(input)
            .output()
            .unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (
            done.status.code().unwrap(),
            text(done.stdout),
            text(done.stderr),
        )
    }

    fn replay(&self, words: &[&str]) -> Said {
        self.replay_from(words, &[&self.log], Stdio::null())
    }
}

fn rows(said: &Said) -> Vec<Value> {
    let (code, out, err) = said;
    assert_eq!((*code, err.as_str()), (0, ""));
    let rows = out.lines().map(|row| serde_json::from_str(row).unwrap());
    rows.collect()
}

fn of<'a>(rows: &'a [Value], action: &str) -> Vec<&'a Value> {
    rows.iter().filter(|row| row["action"] == action).collect()
}

#[test]
fn the_rows_of_two_attacks_are_what_programs_expect() {
    let place = Place::new(&log(0, 6000, &[2000, 3000]));
    let said = place.replay(&["--json"]);
    let rows = rows(&said);
    assert!(rows.is_sorted_by_key(|row| row["time"].as_f64().unwrap().to_bits()));
    for row in &rows {
        let keys: Vec<&str> = row
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        let mut expected = [
            "time", "action", "subject", "tier", "until", "reasons", "rate", "mean", "stddev",
            "score",
        ];
        expected.sort_unstable();
        let mut sorted = keys.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, expected);
        assert!(row["reasons"][0].is_string(), "{row}");
    }
    let (bans, unbans) = (of(&rows, "ban"), of(&rows, "unban"));
    assert_eq!((bans.len(), unbans.len()), (2, 2), "{rows:#?}");
    for (n, (begin, length)) in [(2000, 600), (3000, 1800)].into_iter().enumerate() {
        let (ban, unban) = (bans[n], unbans[n]);
        let time = ban["time"].as_f64().unwrap();
        let second = time - START as f64;
        assert!(
            second >= f64::from(begin) && second < f64::from(begin) + 30.0,
            "{ban}"
        );
        assert_eq!(ban["subject"], ATTACKER);
        assert_eq!(ban["tier"], n + 1);
        assert_eq!(ban["until"].as_f64(), Some(time + f64::from(length)));
        for figure in ["rate", "mean", "stddev", "score"] {
            assert!(ban[figure].as_f64().unwrap() > 0.0, "{ban}");
            assert!(unban[figure].is_null(), "{unban}");
        }
        assert_eq!(unban["subject"], ATTACKER);
        assert_eq!(unban["time"], ban["until"]);
        assert!(unban["until"].is_null());
    }
    let alerts = of(&rows, "alert");
    assert!(!alerts.is_empty());
    assert!(
        alerts
            .iter()
            .all(|alert| alert["subject"] == "site" && alert["tier"].is_null())
    );
    assert_eq!(said, place.replay(&["--json"]), "twice the same");
}

#[test]
fn an_allowlisted_attacker_is_an_alert() {
    let place = Place::new(&log(0, 2100, &[2000]));
    let rows = rows(&place.replay(&["--json", "--set", "bans.allow=203.0.113.0/24"]));
    assert!(of(&rows, "ban").is_empty());
    let alerts = of(&rows, "alert");
    let alert = alerts.iter().find(|alert| alert["subject"] == ATTACKER);
    let reason = alert.unwrap()["reasons"][0].as_str().unwrap();
    assert!(
        reason.contains("on the allowlist (203.0.113.0/24: configured)"),
        "{reason}"
    );
}

#[test]
fn settings_change_the_outcome() {
    let place = Place::new(&log(0, 2100, &[2000]));
    let lenient = [
        "--json",
        "--set",
        "detect.z_score=1000",
        "--set",
        "detect.times_mean=10000",
        "--set",
        "detect.caps.ten_seconds=0",
        "--set",
        "detect.caps.window=0",
        "--set",
        "detect.caps.ten_windows=0",
    ];
    let rows_of = |words: &[&str]| rows(&place.replay(words));
    assert!(of(&rows_of(&lenient), "ban").is_empty());
    let ever = rows_of(&["--json", "--set", r#"bans.schedule=["permanent"]"#]);
    let bans = of(&ever, "ban");
    assert_eq!(bans.len(), 1);
    assert!(bans[0]["until"].is_null());
}

#[test]
fn files_in_any_order_and_standard_input_are_one_log() {
    let text = log(0, 4000, &[2000]);
    let place = Place::new(&text);
    let whole = place.replay(&["--json"]);
    assert!(!rows(&whole).is_empty());
    let (old, new) = (place.path("access.log.1"), place.path("new.log"));
    fs::write(&old, log(0, 2010, &[2000])).unwrap();
    fs::write(&new, log(2010, 4000, &[2000])).unwrap();
    let files: [&Path; 2] = [&new, &old];
    assert_eq!(place.replay_from(&["--json"], &files, Stdio::null()), whole);
    let files: [&Path; 2] = [Path::new("-"), &old];
    let input = || File::open(&new).unwrap().into();
    assert_eq!(place.replay_from(&["--json"], &files, input()), whole);
}

#[test]
fn people_get_lines_and_a_summary() {
    let place = Place::new(&log(0, 4000, &[2000]));
    let (code, out, err) = place.replay(&[]);
    assert_eq!((code, err.as_str()), (0, ""));
    for expected in [
        "] BAN 203.0.113.9 | ",
        "] UNBAN 203.0.113.9 | its time is over | ",
        "] ALARM site | ",
        "] ALL-CLEAR site | ",
        " | 10m\n",
        "\nread: 1 file, 9800 lines of 41 clients, from 2026-11-22T00:00:00.000Z to ",
        "would have been banned: 1 client, 1 ban in all:\n  203.0.113.9 once, first at 2026-11-22T00:33:",
        "requests by clients while they would have been banned: ",
    ] {
        assert!(out.contains(expected), "{expected}: {out}");
    }
    let (code, out, _) = Place::new(&log(0, 100, &[])).replay(&[]);
    assert_eq!(code, 0);
    assert!(out.contains("nobody would have been banned"), "{out}");
}

#[test]
fn what_is_wrong_is_said_with_what_to_do() {
    let place = Place::new("rubbish\n");
    for (words, code, expected) in [
        (
            &["--set", "detect.zscore=4"][..],
            64,
            "--set: unknown key detect.zscore (is detect.z_score meant?)",
        ),
        (&["--set", "detect.z_score"], 64, "write key=value"),
        (
            &["--set", "detect.z_score=0"],
            64,
            "detect.z_score = 0 must be from 0.1 to 1000",
        ),
        (
            &["--format", "apache"],
            64,
            "--format: source.format: \"apache\" is no format",
        ),
        (&["--config"], 64, "cannot be used multiple times"),
        (&["--report", "/"], 1, "is no file"),
        (
            &[],
            1,
            "none of 1 line can be read; are they in another format (--format)?",
        ),
        (&[], 1, "access.log: at byte 0: not a line of the format"),
        (&["/not/there.log"], 1, "cannot open /not/there.log"),
    ] {
        let (got, out, err) = place.replay(words);
        assert!(
            got == code && err.contains(expected),
            "{words:?}: {got} {err}"
        );
        assert_eq!(out, "");
    }
    // One that cannot be read does not hide the others.
    fs::write(&place.log, log(0, 2100, &[2000])).unwrap();
    let (code, out, err) = place.replay(&["--json", "/not/there.log"]);
    assert_eq!(code, 1);
    assert!(out.contains(r#""action":"ban""#), "{out}");
    assert!(err.contains("cannot open /not/there.log"), "{err}");
    fs::write(&place.log, "").unwrap();
    assert!(place.replay(&[]).2.contains("the logs are empty"));
}

#[test]
fn a_report_is_written_and_a_hostile_name_is_only_a_name() {
    let place = Place::new(&log(0, 4000, &[2000]));
    let hostile = place.path("<img src=x onerror=alert(1)>.log");
    fs::rename(&place.log, &hostile).unwrap();
    let report = place.path("out.html");
    let words = [
        "--report",
        report.to_str().unwrap(),
        "--set",
        "detect.z_score=2.5",
    ];
    let (code, out, err) = place.replay_from(&words, &[&hostile], Stdio::null());
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    let page = fs::read_to_string(&report).unwrap();
    assert!(page.starts_with("<!doctype html>") && page.ends_with("</html>\n"));
    assert!(page.contains("&lt;img src=x onerror=alert(1)&gt;.log"));
    assert!(!page.contains("<img"));
    assert!(page.contains("<code>detect.z_score</code></td><td><code>2.5</code>"));
    // A log is not taken for the report.
    let (code, _, err) = place.replay_from(
        &["--report", hostile.to_str().unwrap()],
        &[&report],
        Stdio::null(),
    );
    assert_eq!(code, 1);
    assert!(
        err.contains("is no report, so it is not overwritten"),
        "{err}"
    );
}
