//! `portcullis notify test`, as it is typed; and what an agent tells.
#![expect(
    clippy::unwrap_used,
    reason = "a test panics with its evidence, its helpers too"
)]

mod place;

use std::{
    fmt::Write as _,
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpListener,
    process::Command,
    sync::mpsc::{Receiver, channel},
    thread,
    time::Duration,
};

use place::{Place, text};
use serde_json::Value;
use tempfile::TempDir;

/// Exit code, standard output and standard error.
type Said = (i32, String, String);

/// Answers every request with this status, and hands over its body.
fn receiver(status: &'static str) -> (String, Receiver<Value>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}/SeCrEt", listener.local_addr().unwrap());
    let (sender, bodies) = channel();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = BufReader::new(stream.unwrap());
            let (mut length, mut line) = (0, String::new());
            while line != "\r\n" {
                line.clear();
                stream.read_line(&mut line).unwrap();
                if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                    length = value.trim().parse().unwrap();
                }
            }
            let mut body = vec![0; length];
            stream.read_exact(&mut body).unwrap();
            let answer =
                format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n");
            stream.get_mut().write_all(answer.as_bytes()).unwrap();
            if sender.send(serde_json::from_slice(&body).unwrap()).is_err() {
                break;
            }
        }
    });
    (address, bodies)
}

/// A body, when it has come.
fn next(bodies: &Receiver<Value>) -> Value {
    bodies.recv_timeout(Duration::from_secs(20)).unwrap()
}

/// With files that hold these addresses.
fn test(slack: Option<&str>, webhook: Option<&str>) -> Said {
    let folder = TempDir::new().unwrap();
    let mut config = String::new();
    for (section, key, address) in [
        ("slack", "webhook_file", slack),
        ("webhook", "url_file", webhook),
    ] {
        if let Some(address) = address {
            let file = folder.path().join(section);
            fs::write(&file, address).unwrap();
            let _ = writeln!(config, "[{section}]\n{key} = \"{}\"", file.display());
        }
    }
    run(&folder, &config)
}

fn run(folder: &TempDir, config: &str) -> Said {
    let file = folder.path().join("p.toml");
    fs::write(&file, config).unwrap();
    let done = Command::new(env!("CARGO_BIN_EXE_portcullis"))
        .args(["notify", "test", "--config"])
        .arg(file)
        .env("PORTCULLIS_LOG", "trace")
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    let said = (
        done.status.code().unwrap(),
        text(done.stdout),
        text(done.stderr),
    );
    assert!(!format!("{said:?}").contains("SeCrEt"), "{said:?}");
    said
}

#[test]
fn everybody_who_is_configured_gets_a_message() {
    let (slack, to_slack) = receiver("200 OK");
    let (webhook, to_webhook) = receiver("204 No Content");
    let (code, out, err) = test(Some(&slack), Some(&webhook));
    assert_eq!(out, "slack     delivered\nwebhook   delivered\n", "{err}");
    assert_eq!(code, 0);
    let to_slack = next(&to_slack).to_string();
    assert!(to_slack.contains("nothing has happened"), "{to_slack}");
    let to_webhook = next(&to_webhook);
    let event = &to_webhook["events"][0];
    assert_eq!(event["action"], "notice");
    assert_eq!(event["mode"], "observe");
    assert!(
        event["condition"].as_str().unwrap().contains("a test"),
        "{event}"
    );
}

#[test]
fn one_who_does_not_get_it_is_said_with_the_reason_and_by_the_exit_code() {
    let (slack, to_slack) = receiver("200 OK");
    let (webhook, to_webhook) = receiver("401 Unauthorized");
    let (code, out, _) = test(Some(&slack), Some(&webhook));
    assert_eq!(
        out,
        "slack     delivered\nwebhook   not delivered: answer 401 Unauthorized\n"
    );
    assert_eq!(code, 1);
    drop((next(&to_slack), next(&to_webhook)));

    // Nobody listens there.
    let (code, out, _) = test(Some("http://127.0.0.1:1/SeCrEt"), None);
    assert!(
        out.starts_with("slack     not delivered: ") && out.contains("refused"),
        "{out}"
    );
    assert_eq!(code, 1);

    let (code, out, _) = test(None, Some("http://receiver.example/SeCrEt"));
    assert!(
        out.starts_with("webhook   not delivered: ") && out.contains("https://"),
        "{out}"
    );
    assert_eq!(code, 1);
}

#[test]
fn without_anybody_it_says_what_to_configure() {
    let (code, out, err) = test(None, None);
    assert_eq!((code, out.as_str()), (64, ""));
    for part in ["slack.webhook_file", "webhook.url_file"] {
        assert!(err.contains(part), "{err}");
    }

    let folder = TempDir::new().unwrap();
    let (code, _, err) = run(&folder, "[webhook]\ntoken_file = \"/run/token\"\n");
    assert_eq!(code, 64);
    assert!(err.contains("webhook.url_file is not"), "{err}");
}

#[test]
fn an_agent_tells_programs_what_it_puts_on_record() {
    let (address, bodies) = receiver("200 OK");
    let mut place = Place::new(&[]);
    let (file, config) = (place.path("webhook"), place.path("p.toml"));
    fs::write(&file, address).unwrap();
    let mut text_of = fs::read_to_string(&config).unwrap();
    let _ = writeln!(
        text_of,
        "[webhook]\nurl_file = \"{}\"\nmin_interval_ms = 100",
        file.display()
    );
    fs::write(&config, text_of).unwrap();
    place.start();
    let banned = place.ask(&["ban", "192.0.2.7", "--for", "1h", "--reason", "why \"so\""]);
    assert!(banned.status.success(), "{banned:?}");

    let mut events = Vec::new();
    while !events.iter().any(|event: &Value| event["action"] == "ban") {
        let body = next(&bodies);
        assert!(
            body["host"].is_string() && body.get("left_out").is_none(),
            "{body}"
        );
        events.extend(body["events"].as_array().unwrap().clone());
    }
    let record = || {
        let history = fs::read_to_string(place.path("state/history.jsonl")).unwrap_or_default();
        let lines = history.lines().map(|line| {
            let mut line: Value = serde_json::from_str(line).unwrap();
            let chained = line.as_object_mut().unwrap();
            assert!(chained.remove("seq").is_some() && chained.remove("chain").is_some());
            line
        });
        let told = lines.filter(|line| line["action"] != "baseline");
        told.collect::<Vec<_>>()
    };
    place.until("the ban on record", || record().len() == events.len());
    assert_eq!(events, record());

    let status = || -> Value {
        let status = text(&place.ask(&["status", "--json"]));
        serde_json::from_str(&status).unwrap()
    };
    // It has the events before the agent has its answer.
    place.until("the count", || status()["webhook"]["queued"] == 0);
    let status = status();
    assert_eq!(status["slack"]["configured"], false);
    assert_eq!(status["webhook"]["sent"], events.len());
    assert_eq!(status["webhook"]["last_error"], Value::Null);
    let shown = text(&place.ask(&["status"]));
    let line = format!(
        "webhook   {} sent, 0 waiting, 0 failed, 0 dropped",
        events.len()
    );
    assert!(shown.lines().any(|shown| shown == line), "{shown}");
}
