//! `portcullis import` and `portcullis export` against an agent, all as they are typed; with the back end that touches nothing.
#![expect(
    clippy::unwrap_used,
    reason = "a test panics with its evidence, its helpers too"
)]

mod place;

use std::{fmt::Write as _, fs, process::Output, time::Duration};

use place::{Place, text as stdout};
use portcullis::runtime::clock;

/// An agent that has no lines to read.
fn started() -> Place {
    let mut place = Place::new(&["192.0.2.0/24"]);
    place.start();
    place
}

fn export(place: &Place, words: &[&str]) -> String {
    let output = place.ask(&[&["export"], words].concat());
    assert!(output.status.success(), "{output:?}");
    stdout(&output)
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// But for since when.
fn without_since(export: &str) -> Vec<String> {
    let line = |line: &str| {
        let mut ban: serde_json::Value = serde_json::from_str(line).unwrap();
        ban["since"].take();
        ban.to_string()
    };
    export.lines().map(line).collect()
}

#[test]
fn what_is_refused_or_not_understood_is_said_and_the_rest_is_in_force() {
    let place = started();
    let list = "192.0.2.7\n198.51.100.1 # a guest\nnobody\n10.0.0.0/7\n198.51.100.0/30\n";
    fs::write(place.path("list"), list).unwrap();
    let dry = place.ask(&["import", "--dry-run", "list"]);
    assert_eq!(dry.status.code(), Some(1), "a line is not understood");
    assert!(
        stdout(&dry).contains("198.51.100.1  until it is lifted  imported\n"),
        "{dry:?}"
    );
    assert_eq!(export(&place, &[]), "");

    let output = place.ask(&["import", "list"]);
    assert_eq!(output.status.code(), Some(1));
    let said = stdout(&output);
    assert!(
        said.starts_with("2 banned, 0 for as long already, 2 refused\n"),
        "{said}"
    );
    assert!(
        said.contains("refused: 192.0.2.7 is on the allowlist (192.0.2.0/24: configured); take it out of bans.allow"),
        "{said}"
    );
    assert!(said.contains("10.0.0.0/7 is too wide"), "{said}");
    let said = stderr(&output);
    assert!(
        said.contains("list, line 3: \"nobody\" is neither an IP address"),
        "{said}"
    );
    assert!(
        said.contains("list (plain): 4 bans read, 1 line not understood\n"),
        "{said}"
    );
    assert_eq!(
        export(&place, &["--format", "plain"]),
        "198.51.100.0/30\n198.51.100.1\n"
    );

    // Who is banned for good stays so; `--for` gives the others an end.
    fs::write(place.path("list"), "198.51.100.1\n198.51.100.9\n").unwrap();
    let output = place.ask(&["import", "--for", "2h", "--reason", "again", "list"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(
        stdout(&output),
        "1 banned, 1 for as long already, 0 refused\n"
    );
    let csv = export(&place, &["--format", "csv"]);
    let ours = csv
        .lines()
        .find(|line| line.starts_with("198.51.100.9,"))
        .unwrap();
    assert!(ours.ends_with(",,operator,again,false"), "{csv}");
    assert!(
        csv.contains(",permanent,,operator,imported,false\n"),
        "{csv}"
    );

    let output = place.ask(&["import", "nowhere"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("cannot read nowhere"),
        "{output:?}"
    );
    let output = place.ask(&["import", "--format", "xml", "list"]);
    assert_eq!(output.status.code(), Some(64));
}

#[test]
fn bans_move_from_agent_to_agent_with_their_ends() {
    let (from, to) = (started(), started());
    for words in [
        &[
            "ban",
            "198.51.100.7",
            "--for",
            "90m",
            "--reason",
            "two, \"words\"",
        ][..],
        &["ban", "2001:db8:7::/64", "--observe"],
        &["ban", "203.0.113.0/24"],
    ] {
        let output = from.ask(words);
        assert!(output.status.success(), "{output:?}");
    }
    let exported = export(&from, &["--all"]);
    assert_eq!(exported.lines().count(), 3, "{exported}");
    for form in ["json", "csv"] {
        fs::write(to.path("bans"), export(&from, &["--format", form])).unwrap();
        let output = to.ask(&["import", "bans"]);
        assert!(output.status.success(), "{output:?}");
        assert_eq!(without_since(&export(&to, &[])), without_since(&exported));
    }
    // And what `bans` prints.
    let bans = from.ask(&["bans", "--json", "--sort", "until"]);
    fs::write(to.path("bans"), bans.stdout).unwrap();
    let output = to.ask(&["import", "bans"]);
    assert_eq!(
        stdout(&output),
        "0 banned, 3 for as long already, 0 refused\n"
    );
    let sorted = stdout(&from.ask(&["bans", "--sort", "until"]));
    let first = sorted.lines().nth(1).unwrap();
    assert!(first.starts_with("198.51.100.7 "), "{sorted}");
}

#[test]
fn ten_thousands_of_addresses_take_seconds() {
    let place = started();
    let mut list = String::new();
    for n in 0..20_000_u32 {
        let _ = writeln!(list, "10.{}.{}.{}", n >> 16, n >> 8 & 255, n & 255);
    }
    fs::write(place.path("list"), list).unwrap();
    let begin = clock::boot();
    let output = place.ask(&["import", "list"]);
    let took = clock::boot().saturating_sub(begin);
    assert_eq!(
        stdout(&output),
        "20000 banned, 0 for as long already, 0 refused\n",
        "{output:?}"
    );
    println!("20,000 addresses took {took:?}");
    assert!(took < Duration::from_secs(60), "{took:?}");
    assert_eq!(
        export(&place, &["--format", "plain"]).lines().count(),
        20_000
    );
}

#[test]
fn a_reason_that_is_too_long_is_said_to_be_and_one_that_is_long_is_cut() {
    let place = started();
    let ban = |length: usize| {
        let reason = "x".repeat(length);
        place.ask(&["ban", "203.0.113.7", "--reason", &reason])
    };
    let refused = ban(70_000);
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    assert!(stderr(&refused).contains("shorten what was typed"));
    assert!(ban(10_000).status.success());
    assert!(export(&place, &[]).contains(&"x".repeat(200)));
    assert!(!export(&place, &[]).contains(&"x".repeat(201)));
}
