//! `portcullis history` and `portcullis audit verify` over what an agent has left behind that was killed; with the back end that
//! touches nothing.
#![expect(
    clippy::unwrap_used,
    reason = "a test panics with its evidence, its helpers too"
)]

mod place;

use std::fs;

use place::{Place, text};
use serde_json::Value;

#[test]
fn what_agents_that_were_killed_have_recorded_is_whole_and_found_by_address() {
    let mut place = Place::new(&[]);
    for round in 0..3 {
        place.start();
        for subject in ["192.0.2.7", "192.0.2.0/24", "198.51.100.1"] {
            let reason = format!("round {round}\u{7}");
            let banned = place.ask(&["ban", subject, "--for", "1h", "--reason", &reason]);
            assert!(banned.status.success(), "{banned:?}");
        }
        let running = place.read(&["audit", "verify"]);
        assert!(running.status.success(), "{running:?}");
        place.kill();
        let killed = place.read(&["audit", "verify"]);
        assert!(killed.status.success(), "{killed:?}");
    }
    // The last one was ended in the middle of a line.
    let history = place.path("state/history.jsonl");
    let whole = fs::read_to_string(&history).unwrap();
    fs::write(&history, format!("{whole}{}", &whole[..100])).unwrap();
    place.start();
    place.kill();
    let verified = text(&place.read(&["audit", "verify"]));
    let (notes, sum) = verified.trim_end().rsplit_once('\n').unwrap();
    assert!(notes.contains(": torn: the agent"), "{verified}");
    assert!(sum.contains(" lines in 1 file, unbroken; head "), "{sum}");

    let said = text(&place.read(&["history", "192.0.2.7"]));
    let lines: Vec<&str> = said.lines().collect();
    for (round, pair) in lines.chunks(2).enumerate() {
        let (inside, around) = (format!(" 192.0.2.7 | round {round}"), " 192.0.2.0/24 | ");
        assert!(
            pair[0].contains(&inside) && pair[1].contains(around),
            "{said}"
        );
    }
    assert!(lines.len() >= 2 && !said.contains('\u{7}'), "{said}");
    let inside = text(&place.read(&["history", "192.0.0.0/16", "--json"]));
    assert_eq!(inside.lines().count(), lines.len());
    for line in inside.lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        assert!(line["chain"].is_string(), "{line}");
    }
    let nobody = text(&place.read(&["history", "203.0.113.1"]));
    assert_eq!(nobody, "nothing is on record of 203.0.113.1\n");

    // Somebody was never there.
    let forged: Vec<&str> = whole
        .lines()
        .filter(|line| !line.contains("198.51.100.1"))
        .collect();
    fs::write(&history, forged.join("\n") + "\n").unwrap();
    let verified = place.read(&["audit", "verify"]);
    assert_eq!(verified.status.code(), Some(1));
    let said = text(&verified);
    assert!(said.contains(": removed: line "), "{said}");
    assert!(said.contains(", BROKEN in "), "{said}");
    let verified = place.read(&["audit", "verify", "--json"]);
    let verified: Value = serde_json::from_slice(&verified.stdout).unwrap();
    assert_eq!(verified["breaks"][0]["kind"], "removed", "{verified}");
}

#[test]
fn without_a_history_that_is_said() {
    let place = Place::new(&[]);
    for words in [&["audit", "verify"][..], &["history", "192.0.2.1"]] {
        let output = place.read(words);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
    }
    let output = place.read(&["audit", "verify", "--head", "abc"]);
    assert_eq!(output.status.code(), Some(64), "{output:?}");
}
