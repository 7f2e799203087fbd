//! `portcullis explain` and the agent that it asks, both as they are typed; with the back end that touches nothing.
#![expect(
    clippy::unwrap_used,
    reason = "a test panics with its evidence, its helpers too"
)]

mod place;

use std::{
    fmt::Write as _,
    fs::{self, OpenOptions},
    io::Write as _,
    path::PathBuf,
    process::{Command, Output},
};

use place::{Place, text};
use portcullis::runtime::clock;
use serde_json::Value;

const ATTACKER: &str = "203.0.113.9";

impl Place {
    fn explain(&self, words: &[&str]) -> Output {
        self.ask(&[&["explain"], words].concat())
    }

    fn json(&self, subject: &str) -> Value {
        let output = self.explain(&[subject, "--json"]);
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn write(&self, client: &str, requests: usize) {
        let now = clock::wall().secs();
        let mut text = String::new();
        for _ in 0..requests {
            let _ = writeln!(
                text,
                r#"{{"timestamp":{now},"source_ip":"{client}","status":200}}"#
            );
        }
        let mut log = OpenOptions::new()
            .append(true)
            .open(self.path("access.log"))
            .unwrap();
        log.write_all(text.as_bytes()).unwrap();
    }
}

#[test]
fn an_agent_explains_a_ban_by_lines_that_are_where_it_says() {
    let mut place = Place::new(&["192.0.2.0/24"]);
    place.start();
    place.write("198.51.100.7", 5);
    place.write(ATTACKER, 1000);
    place.until("the ban", || !place.json(ATTACKER)["bans"][0].is_null());
    let ban = &place.json(ATTACKER)["bans"][0];
    let log = fs::read_to_string(place.path("access.log")).unwrap();
    let samples = ban["finding"]["samples"].as_array().unwrap();
    assert_eq!(samples.len(), 3, "{ban}");
    for sample in samples {
        assert_eq!(
            sample["log"].as_str().map(PathBuf::from),
            Some(place.path("access.log"))
        );
        let offset = usize::try_from(sample["offset"].as_u64().unwrap()).unwrap();
        assert!(log.as_bytes()[offset - 1] == b'\n', "{sample}");
        assert!(log[offset..].lines().next().unwrap().contains(ATTACKER));
    }
    place.until("the back end", || {
        text(&place.explain(&[ATTACKER])).contains("only observed: nothing is dropped")
    });
    let said = text(&place.explain(&[ATTACKER]));
    assert!(said.contains("portcullis unban 203.0.113.9"), "{said}");
    // The command that it shows shows a line.
    let shown = said.lines().find_map(|line| {
        let line = line.trim();
        line.starts_with("tail -c").then_some(line)
    });
    let line = Command::new("sh")
        .args(["-c", shown.unwrap()])
        .output()
        .unwrap();
    let line: Value = serde_json::from_slice(&line.stdout).unwrap();
    assert_eq!(line["source_ip"], ATTACKER);

    let said = text(&place.explain(&["198.51.100.7"]));
    assert!(said.contains("198.51.100.7 is not banned\n"), "{said}");
    assert!(said.contains("5 requests in the last 1m"), "{said}");
    let said = text(&place.explain(&["192.0.2.7"]));
    assert!(said.contains("192.0.2.0/24 is on the allowlist"), "{said}");
    let said = text(&place.explain(&["2001:db8::1"]));
    assert!(
        said.contains("2001:db8::/64\nnothing is known of 2001:db8::1"),
        "{said}"
    );
}

#[test]
fn without_an_agent_there_is_no_answer() {
    let output = Place::new(&["192.0.2.0/24"]).explain(&[ATTACKER]);
    assert_eq!(output.status.code(), Some(69));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("is the agent running?"), "{said}");
    let output = Place::new(&["192.0.2.0/24"]).explain(&["localhost"]);
    assert_eq!(output.status.code(), Some(64));
}
