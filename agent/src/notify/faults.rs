//! What receivers do wrong, tried on both kinds of them over real connections. (What takes hours is in `pace`.)

use std::{os::unix::fs::PermissionsExt as _, path::Path, time::Duration};

use portcullis_engine::command::Action;
use serde_json::Value;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpSocket},
    task::JoinHandle,
    time::{Instant, timeout},
};

use super::{
    Limits, Outbox, Status,
    delivery::Tempo,
    sink::{Log, OK, SECRET, Sink, answer, bare},
    slack,
    tests::{finish, told},
    webhook,
};
use crate::{config::Config, enforce::Mode};

const TOKEN: &str = "ToKeN-of-the-test";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Slack,
    Webhook,
}

const BOTH: [Kind; 2] = [Kind::Slack, Kind::Webhook];

const HURRY: Tempo = Tempo {
    first_backoff: Duration::from_millis(1),
    max_backoff: Duration::from_millis(4),
    max_asked: Duration::from_mins(5),
    patience: Duration::from_hours(1),
    grace: Duration::from_secs(20),
};

/// The time that these tests take is the one that waits.
const LIMITS: Limits = Limits {
    min_interval: Duration::from_millis(1),
    queue: 256,
    timeout: Duration::from_secs(10),
};

/// A configuration that tells both kinds at this address, by files.
fn config(dir: &Path, address: &str, limits: Limits) -> Config {
    let file = |name: &str, content: &str| {
        let path = dir.join(name);
        std::fs::write(&path, content).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        path
    };
    Config {
        slack: Some(slack::Settings {
            webhook_file: file("address", &format!("{address}\n")),
            dashboard: None,
            runbook: None,
            limits,
        }),
        webhook: Some(webhook::Settings {
            url_file: file("address", &format!("{address}\n")),
            token_file: Some(file("token", &format!("{TOKEN}\n"))),
            limits,
        }),
        ..Config::default()
    }
}

/// Starts a courier of one kind.
fn start(kind: Kind, address: &str, limits: Limits, tempo: &Tempo) -> (Outbox, JoinHandle<()>) {
    let dir = TempDir::new().unwrap();
    let config = config(dir.path(), address, limits);
    match kind {
        Kind::Slack => slack::open(&config.slack.unwrap(), "edge-1")
            .unwrap()
            .start(tempo),
        Kind::Webhook => webhook::open(&config.webhook.unwrap(), "edge-1")
            .unwrap()
            .start(tempo),
    }
}

fn tell(outbox: &Outbox, action: Action, subject: Option<&str>) {
    outbox.tell(&told(action, subject).event, Mode::Enforce);
}

/// What happened, whichever kind the message is of.
fn says(kind: Kind, body: &Value) -> String {
    match kind {
        Kind::Slack => body["blocks"][0]["text"]["text"]
            .as_str()
            .unwrap()
            .to_owned(),
        Kind::Webhook => {
            assert_eq!(body["host"], "edge-1");
            body["events"].as_array().unwrap()[0]["action"]
                .as_str()
                .unwrap()
                .to_owned()
        }
    }
}

fn is_alarm(kind: Kind, body: &Value) -> bool {
    let alarm = match kind {
        Kind::Slack => "🔴 The site's traffic is not normal · edge-1",
        Kind::Webhook => "alarm",
    };
    says(kind, body) == alarm
}

const fn sent(count: u64) -> Status {
    Status {
        configured: true,
        sent: count,
        failed: 0,
        dropped: 0,
        queued: 0,
        last_error: None,
    }
}

/// Tells of an alarm; the sink must get it as often as that, always the same, and nothing else.
async fn comes_in_the_end(answers: &[&str], attempts: usize, limits: Limits, tempo: &Tempo) {
    for kind in BOTH {
        let mut sink = Sink::start(answers).await;
        let (outbox, task) = start(kind, &sink.address, limits, tempo);
        tell(&outbox, Action::Alarm, None);
        let first = sink.next().await.body;
        assert!(is_alarm(kind, &first), "{first:#}");
        for _ in 1..attempts {
            assert_eq!(sink.next().await.body, first, "{kind:?}");
        }
        assert_eq!(finish(outbox, task, 1).await, sent(1), "{kind:?}");
        assert!(sink.rest().is_empty(), "{kind:?}");
    }
}

#[tokio::test]
async fn what_is_told_arrives_with_the_token_where_there_is_one() {
    for kind in BOTH {
        let mut sink = Sink::start(&[OK]).await;
        let (outbox, task) = start(kind, &sink.address, LIMITS, &HURRY);
        tell(&outbox, Action::Alarm, None);
        let request = sink.next().await;
        assert!(is_alarm(kind, &request.body), "{:#}", request.body);
        let token = format!("authorization: bearer {TOKEN}").to_ascii_lowercase();
        assert_eq!(
            request.head.contains(&token),
            kind == Kind::Webhook,
            "{}",
            request.head
        );
        assert_eq!(finish(outbox, task, 1).await, sent(1));
    }
}

#[tokio::test]
async fn a_wait_that_is_asked_for_is_honoured() {
    for (kind, status) in [
        (Kind::Slack, "429 Too Many Requests"),
        (Kind::Webhook, "503 Busy"),
    ] {
        let busy = answer(status, "Retry-After: 1\r\nContent-Length: 0\r\n\r\n");
        let mut sink = Sink::start(&[&busy, OK]).await;
        let (outbox, task) = start(kind, &sink.address, LIMITS, &HURRY);
        tell(&outbox, Action::Alarm, None);
        let (first, second) = (sink.next().await, sink.next().await);
        let wait = second.at - first.at;
        assert!(wait >= Duration::from_secs(1), "{kind:?}: {wait:?}");
        assert_eq!(first.body, second.body);
        assert_eq!(finish(outbox, task, 1).await, sent(1));
        assert!(sink.rest().is_empty());
    }
}

/// None of these waits for long.
#[tokio::test]
async fn a_wait_that_is_no_time_or_absurdly_long_keeps_nobody() {
    let tempo = Tempo {
        max_asked: Duration::from_millis(20),
        ..HURRY
    };
    for wait in [
        "soon",
        "",
        "-5",
        "1e9",
        "86400",
        "99999999999999999999999",
        "Tue, 31 Dec 2999 23:59:59 GMT",
        "Wed, 21 Oct 2015 07:28:00 GMT",
    ] {
        let more = format!("Retry-After: {wait}\r\nContent-Length: 0\r\n\r\n");
        let busy = answer("429 Too Many Requests", &more);
        comes_in_the_end(&[&busy, OK], 2, LIMITS, &tempo).await;
    }
}

#[tokio::test]
async fn a_passing_failure_ends_in_one_delivery() {
    let broken = bare("500 Internal Server Error");
    // A server that hangs up without an answer counts as one, too.
    comes_in_the_end(&[&broken, "HTTP/1.1 ", OK], 3, LIMITS, &HURRY).await;
}

#[tokio::test]
async fn a_receiver_that_never_answers_is_left_in_time() {
    for kind in BOTH {
        let mut sink = Sink::start(&["", OK]).await;
        let limits = Limits {
            timeout: Duration::from_millis(200),
            ..LIMITS
        };
        let (outbox, task) = start(kind, &sink.address, limits, &HURRY);
        tell(&outbox, Action::Alarm, None);
        let first = sink.next().await.at;
        let wait = sink.next().await.at - first;
        assert!(wait < Duration::from_secs(10), "{kind:?}: {wait:?}");
        // The second answer may be late as well on a busy machine; that is another attempt, not a loss.
        assert_eq!(finish(outbox, task, 1).await, sent(1));
    }
}

#[tokio::test]
async fn a_receiver_that_comes_up_late_is_told_what_has_waited() {
    for kind in BOTH {
        // Nobody listens there yet, and nobody else gets the port.
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = format!("http://{}{SECRET}", socket.local_addr().unwrap());
        let (outbox, task) = start(kind, &address, LIMITS, &HURRY);
        tell(&outbox, Action::Alarm, None);
        let why = stumbles(&outbox).await;
        assert!(
            why.contains("refused") && !why.contains("127.0.0.1"),
            "{why}"
        );
        tell(&outbox, Action::AllClear, None);
        let mut sink = Sink::on(socket.listen(8).unwrap(), &[OK]);
        assert!(is_alarm(kind, &sink.next().await.body));
        let resolved = says(kind, &sink.next().await.body);
        assert!(
            resolved.contains("Resolved") || resolved == "all_clear",
            "{resolved}"
        );
        assert_eq!(finish(outbox, task, 2).await, sent(2));
    }
}

/// Why the newest attempt has failed, once one has.
async fn stumbles(outbox: &Outbox) -> String {
    let stumbled = async {
        loop {
            if let Some(why) = outbox.status().last_error {
                return why;
            }
            tokio::task::yield_now().await;
        }
    };
    timeout(Duration::from_secs(20), stumbled)
        .await
        .expect("no attempt has failed")
}

#[tokio::test]
async fn a_receiver_without_tls_at_an_https_address_is_not_told_and_it_is_said_why() {
    for (kind, greeting) in [
        (Kind::Slack, OK),
        (Kind::Webhook, OK),
        (Kind::Slack, ""),
        (Kind::Webhook, ""),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("https://{}{SECRET}", listener.local_addr().unwrap());
        let tempo = Tempo {
            grace: Duration::ZERO,
            ..HURRY
        };
        let (outbox, task) = start(kind, &address, LIMITS, &tempo);
        tell(&outbox, Action::Alarm, None);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut hello = [0; 3];
                stream.read_exact(&mut hello).await.unwrap();
                assert_eq!(hello[..2], [22, 3], "not the start of a TLS handshake");
                // Plain HTTP, or nothing: the connection is closed.
                drop(stream.write_all(greeting.as_bytes()).await);
            }
        });
        let why = stumbles(&outbox).await;
        assert!(why.contains("does it speak https?"), "{why}");
        assert!(!why.contains("127.0.0.1"), "{why}");
        let status = finish(outbox, task, 1).await;
        assert_eq!((status.sent, status.dropped), (0, 1));
    }
}

#[tokio::test]
async fn messages_keep_their_distance_and_their_order() {
    for kind in BOTH {
        let busy = bare("429 Too Many Requests");
        let mut sink = Sink::start(&[OK, OK, &*busy, OK, &*busy, OK]).await;
        let limits = Limits {
            min_interval: Duration::from_millis(50),
            ..LIMITS
        };
        let (outbox, task) = start(kind, &sink.address, limits, &HURRY);
        let mut came = Vec::new();
        for round in 0..4 {
            let action = [Action::Alarm, Action::AllClear][round % 2];
            tell(&outbox, action, None);
            while outbox.status().sent <= round as u64 {
                tokio::task::yield_now().await;
            }
            let new = sink.rest();
            let alarm = action == Action::Alarm;
            assert!(
                new.iter()
                    .all(|request| is_alarm(kind, &request.body) == alarm)
            );
            came.extend(new.into_iter().map(|request| request.at));
        }
        assert_eq!(
            came.len(),
            6,
            "what was turned away comes again, before the next"
        );
        for pair in came.windows(2) {
            let distance = pair[1] - pair[0];
            assert!(distance >= limits.min_interval, "{kind:?}: {distance:?}");
        }
        finish(outbox, task, 4).await;
    }
}

#[tokio::test]
async fn a_refusal_is_final_and_no_secret_is_anywhere() {
    for kind in BOTH {
        let (log, _guard) = Log::start();
        let echo = |what: &str| {
            answer(
                "404 Not Found",
                &format!("Content-Length: {}\r\n\r\n{what}", what.len()),
            )
        };
        let known = answer("403 Forbidden", "Content-Length: 13\r\n\r\naction_denied");
        let away = answer(
            "302 Found",
            &format!("Location: {SECRET}/elsewhere\r\nContent-Length: 0\r\n\r\n"),
        );
        let answers = [
            echo(&format!("{SECRET} was not found")),
            echo(&format!("{TOKEN} is nobody's")),
            known,
            away,
            answer("200 O", ""),
        ];
        let mut sink = Sink::start(&answers).await;
        let dir = TempDir::new().unwrap();
        let config = config(dir.path(), &sink.address, LIMITS);
        let mut seen = vec![format!("{:?} {:?}", config.slack, config.webhook)];
        let (outbox, task) = start(kind, &sink.address, LIMITS, &HURRY);
        let mut errors = Vec::new();
        for _ in 0..4 {
            tell(&outbox, Action::Notice, None);
            sink.next().await;
            while outbox.status().queued > 0 {
                tokio::task::yield_now().await;
            }
            errors.push(outbox.status().last_error.unwrap());
        }
        assert_eq!(
            errors,
            [
                "answer 404 Not Found",
                "answer 404 Not Found",
                "answer 403 Forbidden: action_denied",
                "answer 302 Found; redirects are not followed: configure where it leads"
            ]
        );
        assert!(sink.rest().is_empty(), "a refusal was tried again");

        seen.push(format!("{outbox:?} {:?} {errors:?}", outbox.status()));
        let status = finish(outbox, task, 4).await;
        assert_eq!(status.failed, 4, "{status:?}");
        seen.extend([serde_json::to_string(&status).unwrap(), log.text()]);
        let seen = seen.join("\n");
        assert!(
            seen.contains("was not told: answer 404 Not Found"),
            "the log was not caught: {seen}"
        );
        for secret in [SECRET, "SeCrEt", "/services", "B0000", "ToKeN"] {
            assert!(!seen.contains(secret), "{secret} shows in: {seen}");
        }
    }
}

#[tokio::test]
async fn a_dead_receiver_fills_the_queue_and_holds_up_nobody() {
    for kind in BOTH {
        let (log, _guard) = Log::start();
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = format!("http://{}{SECRET}", socket.local_addr().unwrap());
        let tempo = Tempo {
            first_backoff: Duration::from_mins(1),
            grace: Duration::from_millis(50),
            ..HURRY
        };
        let limits = Limits { queue: 4, ..LIMITS };
        let (outbox, task) = start(kind, &address, limits, &tempo);
        tell(&outbox, Action::Alarm, None);
        stumbles(&outbox).await;
        let start = Instant::now();
        for n in 0..10_000 {
            let subject = format!("10.0.{}.{}", n / 256, n % 256);
            tell(&outbox, Action::Ban, Some(&subject));
        }
        let took = start.elapsed();
        assert!(took < Duration::from_secs(5), "telling took {took:?}");
        let status = outbox.status();
        assert_eq!((status.queued, status.dropped, status.sent), (5, 9996, 0));

        // In the middle of a minute's wait, the task still ends in time, and says what is lost.
        let status = finish(outbox, task, 10_001).await;
        assert_eq!(status.dropped, 10_001);
        let log = log.text();
        assert!(
            log.contains("was told of everything") && !log.contains("SeCrEt"),
            "{log}"
        );
    }
}

#[tokio::test]
async fn a_test_message_says_of_each_receiver_whether_it_has_it() {
    let event = told(Action::Notice, None).event;
    assert!(super::test(&Config::default(), &event).await.is_empty());

    let refusal = answer("404 Not Found", "Content-Length: 10\r\n\r\nno_service");
    let mut sink = Sink::start(&[OK.to_owned(), refusal]).await;
    let dir = TempDir::new().unwrap();
    let config = config(dir.path(), &sink.address, LIMITS);
    let tried = super::test(&config, &event).await;
    let said: Vec<_> = tried
        .iter()
        .map(|tried| (tried.section, &tried.result))
        .collect();
    assert_eq!(said[0], ("slack", &Ok(())));
    let why = Err("answer 404 Not Found: no_service".to_owned());
    assert_eq!(said[1], ("webhook", &why));
    assert_eq!(sink.rest().len(), 2);
}

#[test]
fn a_receiver_that_cannot_be_told_is_shown_in_the_status() {
    let (log, _guard) = Log::start();
    let dir = TempDir::new().unwrap();
    let config = config(dir.path(), "SeCrEt", LIMITS);
    let (notifier, tasks) = super::Notifier::start(&config);
    assert!(tasks.is_empty());
    for status in [notifier.slack(), notifier.webhook()] {
        assert!(status.configured);
        let why = status.last_error.unwrap();
        assert!(why.contains("https://") && !why.contains("SeCrEt"), "{why}");
    }
    assert!(
        log.text().contains("is not told of anything"),
        "{}",
        log.text()
    );
    assert!(!log.text().contains("SeCrEt"));
}
