//! Slack's incoming webhook: delivery at Slack's pace.
//!
//! At least once: an answer that gets lost is a message that comes twice. Incoming webhooks cannot change a message, so
//! a flood of bans is told in digests, each about what happened since the last: the first two messages come at once, then
//! one comes every ten times the least interval.

mod message;

use std::{
    fmt, fs::File, io::Read, net::Ipv4Addr, os::unix::fs::PermissionsExt, path::Path, str::FromStr,
    sync::Arc, time::Duration,
};

use anyhow::{Context, Result, bail};
use reqwest::{Client, StatusCode, Url, header::RETRY_AFTER, redirect::Policy};
use serde_json::Value;
use tokio::{
    task::JoinHandle,
    time::{Instant, sleep, sleep_until},
};

use super::{Notifier, Queue};

/// Where and how to tell.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Slack's address for us; see [`read_webhook`].
    pub webhook: Webhook,
    /// The name of this host, for people.
    pub host: String,
    /// Address of the dashboard, for the link.
    pub dashboard: Option<String>,
    /// Address of the runbook, for the link.
    pub runbook: Option<String>,
    /// From the end of one request to the start of the next. Slack takes one a second. Digests are ten times as far
    /// apart.
    pub min_interval: Duration,
    /// So many events may wait; at least one.
    pub queue: usize,
    /// For one request, from the start of connecting to the answer.
    pub timeout: Duration,
}

/// A webhook's address. It is a secret, so it neither displays nor debugs; nothing here logs it.
#[derive(Clone)]
pub struct Webhook(Url);

impl fmt::Debug for Webhook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Webhook(…)")
    }
}

/// Any `https` address, or `http` on the loopback. Errors do not repeat the text.
impl FromStr for Webhook {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let text = text.trim();
        let url = Url::parse(text).ok().filter(Url::has_host);
        let loopback = match url.as_ref().and_then(Url::host_str) {
            Some("localhost" | "[::1]") => true,
            Some(host) => host
                .parse()
                .is_ok_and(|address: Ipv4Addr| address.is_loopback()),
            None => false,
        };
        match url {
            // The parser would quietly drop a line break in the middle.
            Some(url)
                if !text.contains(char::is_whitespace)
                    && (url.scheme() == "https" || url.scheme() == "http" && loopback) =>
            {
                Ok(Self(url))
            }
            _ => bail!(
                "not a webhook: put the one line that Slack shows for it there, https://hooks.slack.com/services/… (http:// is for loopback addresses only)"
            ),
        }
    }
}

/// Reads a webhook's address from a file of one line; warns when others than its owner can read it.
///
/// # Errors
/// When the file cannot be read or holds something else, with the remedy and without the content.
pub fn read_webhook(path: &Path) -> Result<Webhook> {
    let shown = path.display();
    let file = File::open(path).with_context(|| {
        format!(
            "cannot open the Slack webhook's file {shown}; create it, readable by the agent alone"
        )
    })?;
    let mode = file
        .metadata()
        .with_context(|| format!("cannot examine {shown}"))?
        .permissions()
        .mode();
    // systemd gives its credentials by access lists, which show as rights of the group.
    if mode & 0o044 != 0 && !path.starts_with("/run/credentials") {
        tracing::warn!("other users can read the Slack webhook in {shown}; run: chmod 600 {shown}");
    }
    let mut text = String::new();
    file.take(4096)
        .read_to_string(&mut text)
        .with_context(|| format!("cannot read {shown}"))?;
    text.parse()
        .with_context(|| format!("{shown} does not hold a Slack webhook"))
}

/// Starts the task that delivers. It ends once the notifier is closed (or its last clone dropped) and everything is
/// delivered, two seconds later at the latest. Call it inside a tokio runtime.
///
/// # Errors
/// When HTTPS cannot be set up.
pub fn start(settings: Settings) -> Result<(Notifier, JoinHandle<()>)> {
    start_at(settings, &Tempo::SLACK)
}

/// How patient to be. Tests are less so.
#[derive(Clone, Debug)]
struct Tempo {
    first_backoff: Duration,
    max_backoff: Duration,
    /// From closing to giving up.
    grace: Duration,
}

impl Tempo {
    const SLACK: Self = Self {
        first_backoff: Duration::from_secs(1),
        max_backoff: Duration::from_mins(1),
        grace: Duration::from_secs(2),
    };
}

/// So often is a message tried; with the real tempo, that is over two minutes.
const ATTEMPTS: u32 = 8;
/// The longest wait that Slack can ask for.
const MAX_RETRY_AFTER: Duration = Duration::from_mins(5);
/// Digests are this many times the least interval apart.
const DIGEST_SPACING: u32 = 10;

fn start_at(settings: Settings, tempo: &Tempo) -> Result<(Notifier, JoinHandle<()>)> {
    // An error means that there is one already, which is just as well.
    drop(rustls::crypto::ring::default_provider().install_default());
    let https = settings.webhook.0.scheme() == "https";
    let mut client = Client::builder()
        .user_agent(concat!("portcullis/", env!("CARGO_PKG_VERSION")))
        .timeout(settings.timeout)
        .connect_timeout(settings.timeout)
        .redirect(Policy::none())
        .no_proxy()
        .https_only(https);
    if !https {
        // Without this, a host without root certificates could not even use plain HTTP.
        client = client.tls_certs_only([]);
    }
    let client = client
        .build()
        .context("cannot set up HTTPS for Slack; is the package ca-certificates installed?")?;
    let queue = Arc::new(Queue::new(settings.queue));
    let notifier = Notifier::new(Arc::clone(&queue));
    let task = tokio::spawn(run(
        queue,
        Slack {
            client,
            settings,
            tempo: tempo.clone(),
            not_before: Instant::now(),
        },
    ));
    Ok((notifier, task))
}

async fn run(queue: Arc<Queue>, mut slack: Slack) {
    let grace = slack.tempo.grace;
    tokio::select! {
        () = slack.deliver_all(&queue) => {}
        () = async { queue.closed().await; sleep(grace).await } => {}
    }
    let left = queue.abandon();
    if left > 0 {
        tracing::warn!(events = left, "stopped before Slack was told of everything");
    }
}

struct Slack {
    client: Client,
    settings: Settings,
    tempo: Tempo,
    /// Keeps requests apart.
    not_before: Instant,
}

enum Failure {
    /// It would fail again.
    Final(String),
    /// Worth another attempt, after as long as was asked for.
    Passing(String, Option<Duration>),
}

impl Slack {
    async fn deliver_all(&mut self, queue: &Queue) {
        let mut gather_until = self.not_before;
        let mut crowded_until = self.not_before;
        loop {
            // What is told while we wait here still gets into the next message.
            sleep_until(self.not_before).await;
            let Some(batch) = queue.take(gather_until).await else {
                break;
            };
            let result = self
                .deliver(&message::payload(&batch, &self.settings), queue)
                .await;
            if let Err(why) = &result {
                tracing::error!(events = batch.told.len(), "Slack was not told: {why}");
            }
            if batch.is_about_addresses() {
                let now = Instant::now();
                let spacing = self.settings.min_interval.saturating_mul(DIGEST_SPACING);
                // Two messages close together are how a flood begins.
                if batch.is_digest() || now < crowded_until {
                    gather_until = now + spacing;
                }
                crowded_until = now + spacing;
            }
            queue.done(result);
        }
    }

    async fn deliver(&mut self, payload: &Value, queue: &Queue) -> Result<(), String> {
        let mut backoff = self.tempo.first_backoff;
        let mut attempt = 1;
        loop {
            let result = self.post(payload).await;
            self.not_before = Instant::now() + self.settings.min_interval;
            match result {
                Ok(()) => return Ok(()),
                Err(Failure::Final(why)) => return Err(why),
                Err(Failure::Passing(why, _)) if attempt == ATTEMPTS => {
                    return Err(format!("{why} (attempt {attempt}, the last)"));
                }
                Err(Failure::Passing(why, asked)) => {
                    tracing::debug!(attempt, "Slack will be told again: {why}");
                    queue.stumbled(&why);
                    sleep(asked.unwrap_or(backoff)).await;
                    sleep_until(self.not_before).await;
                }
            }
            backoff = (backoff * 2).min(self.tempo.max_backoff);
            attempt += 1;
        }
    }

    async fn post(&self, payload: &Value) -> Result<(), Failure> {
        let request = self
            .client
            .post(self.settings.webhook.0.clone())
            .json(payload);
        // reqwest's errors name the address.
        let mut response = request.send().await.map_err(|error| {
            Failure::Passing(
                format!("{:#}", anyhow::Error::new(error.without_url())),
                None,
            )
        })?;
        let status = response.status();
        if status.is_success() {
            return Ok(());
        }
        let asked = response
            .headers()
            .get(RETRY_AFTER)
            .and_then(|value| retry_after(value.to_str().ok()?));
        let body = response.chunk().await.ok().flatten().unwrap_or_default();
        let why = match error_code(&body, &self.settings.webhook) {
            Some(code) => format!("answer {status}: {code}"),
            None => format!("answer {status}"),
        };
        if status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error() {
            Err(Failure::Passing(why, asked))
        } else {
            Err(Failure::Final(why))
        }
    }
}

/// Slack writes seconds. HTTP's other form, a date, counts as no wish.
fn retry_after(text: &str) -> Option<Duration> {
    let secs = text.trim().parse().ok()?;
    Some(Duration::from_secs(secs).min(MAX_RETRY_AFTER))
}

/// Slack's word for what is wrong, such as `no_service`. Other bodies are not repeated: they may hold the address.
fn error_code<'a>(body: &'a [u8], webhook: &Webhook) -> Option<&'a str> {
    let code = str::from_utf8(body).ok()?.trim();
    let is_code = (1..=40).contains(&code.len())
        && code
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte == b'_');
    (is_code && !webhook.0.as_str().contains(code)).then_some(code)
}

#[cfg(test)]
mod tests {
    use std::{
        io::{self, Write},
        sync::Mutex,
    };

    use portcullis_engine::command::Action;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpListener, TcpSocket, TcpStream},
        sync::mpsc,
        time::timeout,
    };

    use super::*;
    use crate::notify::{Status, tests::told};

    const SECRET: &str = "/services/T0000/B0000/SeCrEtSeCrEt";
    const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok";

    /// A stand-in for Slack: gives these answers in turn, the last one for ever, and reports each request when it is in.
    struct Sink {
        address: String,
        requests: mpsc::UnboundedReceiver<(Instant, Value)>,
    }

    impl Sink {
        async fn start(answers: &[&str]) -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = format!("http://{}{SECRET}", listener.local_addr().unwrap());
            let answers: Vec<String> = answers.iter().map(ToString::to_string).collect();
            let (report, requests) = mpsc::unbounded_channel();
            tokio::spawn(async move {
                let mut held = Vec::new();
                let mut answers = answers.into_iter().peekable();
                while let Ok((mut stream, _)) = listener.accept().await {
                    let Some((line, body)) = request(&mut stream).await else {
                        continue;
                    };
                    assert_eq!(line, format!("POST {SECRET} HTTP/1.1"));
                    if report.send((Instant::now(), body)).is_err() {
                        break;
                    }
                    let answer = answers.peek().cloned().unwrap();
                    // The client may have given up.
                    drop(stream.write_all(answer.as_bytes()).await);
                    if answers.len() > 1 {
                        answers.next();
                    }
                    if answer.is_empty() {
                        held.push(stream);
                    }
                }
            });
            Self { address, requests }
        }

        fn settings(&self) -> Settings {
            settings(&self.address)
        }

        async fn next(&mut self) -> (Instant, Value) {
            timeout(Duration::from_secs(20), self.requests.recv())
                .await
                .expect("no request came")
                .unwrap()
        }

        /// Requests that came and were not looked at.
        fn rest(&mut self) -> Vec<Value> {
            std::iter::from_fn(|| self.requests.try_recv().ok())
                .map(|(_, body)| body)
                .collect()
        }
    }

    /// The request's first line and its body; `None` when the client breaks off.
    async fn request(stream: &mut TcpStream) -> Option<(String, Value)> {
        let mut bytes = Vec::new();
        loop {
            if stream.read_buf(&mut bytes).await.ok()? == 0 {
                return None;
            }
            let text = String::from_utf8_lossy(&bytes);
            let Some((head, body)) = text.split_once("\r\n\r\n") else {
                continue;
            };
            let head = head.to_ascii_lowercase();
            let length = head
                .lines()
                .find_map(|line| line.strip_prefix("content-length: "))
                .unwrap();
            if body.len() == length.parse::<usize>().unwrap() {
                assert!(head.contains("content-type: application/json"), "{head}");
                let line = text.lines().next().unwrap().to_owned();
                return Some((line, serde_json::from_str(body).unwrap()));
            }
        }
    }

    fn settings(webhook: &str) -> Settings {
        Settings {
            webhook: webhook.parse().unwrap(),
            host: "edge-1".to_owned(),
            dashboard: None,
            runbook: None,
            min_interval: Duration::from_millis(1),
            queue: 256,
            timeout: Duration::from_secs(10),
        }
    }

    const HURRY: Tempo = Tempo {
        first_backoff: Duration::from_millis(1),
        max_backoff: Duration::from_millis(4),
        grace: Duration::from_secs(20),
    };

    fn answer(status: &str, more: &str) -> String {
        format!("HTTP/1.1 {status}\r\nConnection: close\r\n{more}")
    }

    fn header(payload: &Value) -> &str {
        payload["blocks"][0]["text"]["text"].as_str().unwrap()
    }

    fn tell(notifier: &Notifier, action: Action, subject: Option<&str>) {
        notifier.tell(&told(action, subject).event, false);
    }

    /// Closes, waits for the end of the task, and sees that every event is accounted for.
    async fn finish(notifier: Notifier, task: JoinHandle<()>, told: u64) -> Status {
        notifier.close();
        timeout(Duration::from_secs(30), task)
            .await
            .expect("the task does not end")
            .unwrap();
        let status = notifier.status();
        assert_eq!(status.queued, 0, "{status:?}");
        assert_eq!(
            status.sent + status.failed + status.dropped,
            told,
            "{status:?}"
        );
        status
    }

    /// What is logged on this thread, at every level.
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl Write for Log {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(buf);
            Ok(buf.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Log {
        fn start() -> (Self, tracing::subscriber::DefaultGuard) {
            let log = Self::default();
            let writer = log.clone();
            let subscriber = tracing_subscriber::fmt()
                .with_max_level(tracing::Level::TRACE)
                .with_ansi(false)
                .with_writer(move || writer.clone())
                .finish();
            (log, tracing::subscriber::set_default(subscriber))
        }

        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }
    }

    #[tokio::test]
    async fn what_is_told_arrives_except_the_baseline() {
        let mut sink = Sink::start(&[OK]).await;
        let (notifier, task) = start_at(sink.settings(), &HURRY).unwrap();
        tell(&notifier, Action::Baseline, None);
        tell(&notifier, Action::Start, None);
        tell(&notifier, Action::Ban, Some("192.0.2.1"));
        assert_eq!(
            header(&sink.next().await.1),
            "🔵 Portcullis has started · edge-1"
        );
        assert_eq!(header(&sink.next().await.1), "🟠 Banned 192.0.2.1 · edge-1");
        let status = finish(notifier, task, 2).await;
        assert_eq!(
            status,
            Status {
                configured: true,
                sent: 2,
                ..Status::default()
            }
        );
        assert!(sink.rest().is_empty());
    }

    #[tokio::test]
    async fn fifty_bans_are_one_message_and_news_of_the_site_overtakes_the_next_ones() {
        let mut sink = Sink::start(&[OK]).await;
        let min_interval = Duration::from_millis(100);
        let (notifier, task) = start_at(
            Settings {
                min_interval,
                ..sink.settings()
            },
            &HURRY,
        )
        .unwrap();
        for n in 0..50 {
            tell(&notifier, Action::Ban, Some(&format!("192.0.2.{n}")));
        }
        let (first, digest) = sink.next().await;
        assert_eq!(header(&digest), "🟠 50 bans · edge-1");
        tell(&notifier, Action::Ban, Some("198.51.100.1"));
        tell(&notifier, Action::Alarm, None);
        tell(&notifier, Action::Unban, Some("198.51.100.1"));
        assert_eq!(
            header(&sink.next().await.1),
            "🔴 The site's traffic is not normal · edge-1"
        );
        let (second, digest) = sink.next().await;
        assert_eq!(header(&digest), "🟠 1 ban, 1 unban · edge-1");
        assert!(
            second - first >= min_interval * DIGEST_SPACING,
            "{:?}",
            second - first
        );
        assert_eq!(finish(notifier, task, 53).await.sent, 53);
    }

    #[tokio::test]
    async fn one_ban_after_the_other_is_a_flood_too() {
        let mut sink = Sink::start(&[OK]).await;
        let min_interval = Duration::from_millis(100);
        let (notifier, task) = start_at(
            Settings {
                min_interval,
                ..sink.settings()
            },
            &HURRY,
        )
        .unwrap();
        let mut times = Vec::new();
        for n in 0..3 {
            tell(&notifier, Action::Ban, Some(&format!("192.0.2.{n}")));
            times.push(sink.next().await.0);
        }
        assert!(
            times[2] - times[1] >= min_interval * DIGEST_SPACING,
            "{times:?}"
        );
        assert_eq!(finish(notifier, task, 3).await.sent, 3);
    }

    #[tokio::test]
    async fn messages_keep_their_distance() {
        let mut sink = Sink::start(&[OK]).await;
        let min_interval = Duration::from_millis(150);
        let (notifier, task) = start_at(
            Settings {
                min_interval,
                ..sink.settings()
            },
            &HURRY,
        )
        .unwrap();
        for _ in 0..4 {
            tell(&notifier, Action::Notice, None);
        }
        let mut last = sink.next().await.0;
        for _ in 0..3 {
            let next = sink.next().await.0;
            assert!(next - last >= min_interval, "{:?}", next - last);
            last = next;
        }
        finish(notifier, task, 4).await;
    }

    #[tokio::test]
    async fn retry_after_is_honoured() {
        let slow_down = answer(
            "429 Too Many Requests",
            "Retry-After: 1\r\nContent-Length: 0\r\n\r\n",
        );
        let mut sink = Sink::start(&[&slow_down, OK]).await;
        let (notifier, task) = start_at(sink.settings(), &HURRY).unwrap();
        tell(&notifier, Action::Alarm, None);
        let (first, first_body) = sink.next().await;
        let (second, second_body) = sink.next().await;
        assert!(
            second - first >= Duration::from_secs(1),
            "{:?}",
            second - first
        );
        assert_eq!(first_body, second_body);
        assert_eq!(finish(notifier, task, 1).await.sent, 1);
        assert!(sink.rest().is_empty());
    }

    #[test]
    fn the_wait_that_slack_asks_for_is_bounded() {
        assert_eq!(retry_after(" 30 "), Some(Duration::from_secs(30)));
        assert_eq!(retry_after("86400"), Some(MAX_RETRY_AFTER));
        for text in [
            "",
            "-1",
            "soon",
            "Wed, 21 Oct 2015 07:28:00 GMT",
            "99999999999999999999",
        ] {
            assert_eq!(retry_after(text), None, "{text}");
        }
    }

    #[tokio::test]
    async fn a_passing_failure_ends_in_one_delivery() {
        let broken = answer("500 Internal Server Error", "Content-Length: 0\r\n\r\n");
        // A server that hangs up without an answer counts as one, too.
        let mut sink = Sink::start(&[&broken, "HTTP/1.1 ", OK]).await;
        let (notifier, task) = start_at(sink.settings(), &HURRY).unwrap();
        tell(&notifier, Action::Alarm, None);
        let (_, body) = sink.next().await;
        assert_eq!(sink.next().await.1, body);
        assert_eq!(sink.next().await.1, body);
        let status = finish(notifier, task, 1).await;
        assert_eq!(
            status,
            Status {
                configured: true,
                sent: 1,
                ..Status::default()
            }
        );
        assert!(sink.rest().is_empty());
    }

    #[tokio::test]
    async fn a_server_that_stays_broken_is_given_up() {
        let broken = answer("503 Service Unavailable", "Content-Length: 0\r\n\r\n");
        let mut sink = Sink::start(&[&broken]).await;
        let (notifier, task) = start_at(sink.settings(), &HURRY).unwrap();
        tell(&notifier, Action::Alarm, None);
        let status = finish(notifier, task, 1).await;
        assert_eq!(sink.rest().len(), ATTEMPTS as usize);
        assert_eq!(status.failed, 1);
        let why = "answer 503 Service Unavailable (attempt 8, the last)";
        assert_eq!(status.last_error.as_deref(), Some(why));
    }

    #[tokio::test]
    async fn a_server_that_never_answers_is_left_in_time() {
        let mut sink = Sink::start(&["", OK]).await;
        let timeout = Duration::from_millis(200);
        let (notifier, task) = start_at(
            Settings {
                timeout,
                ..sink.settings()
            },
            &HURRY,
        )
        .unwrap();
        tell(&notifier, Action::Alarm, None);
        let (first, _) = sink.next().await;
        assert!(sink.next().await.0 - first < Duration::from_secs(10));
        // The second answer may be late as well on a busy machine; that is another attempt, not a loss.
        assert_eq!(finish(notifier, task, 1).await.sent, 1);
    }

    #[tokio::test]
    async fn a_refusal_is_final_and_the_address_is_nowhere() {
        let (log, _guard) = Log::start();
        let echo = format!("{SECRET} was not found");
        let echo = answer(
            "404 Not Found",
            &format!("Content-Length: {}\r\n\r\n{echo}", echo.len()),
        );
        let known = answer("403 Forbidden", "Content-Length: 13\r\n\r\naction_denied");
        let away = answer(
            "302 Found",
            &format!("Location: {SECRET}/elsewhere\r\nContent-Length: 0\r\n\r\n"),
        );
        let reset = answer("200 O", "");
        let mut sink = Sink::start(&[&echo, &known, &away, &reset]).await;
        let settings = sink.settings();
        let mut seen = vec![format!("{settings:?} {:?}", settings.webhook)];
        let (notifier, task) = start_at(settings, &HURRY).unwrap();
        let mut errors = Vec::new();
        for _ in 0..3 {
            tell(&notifier, Action::Notice, None);
            sink.next().await;
            while notifier.status().queued > 0 {
                tokio::task::yield_now().await;
            }
            errors.push(notifier.status().last_error.unwrap());
        }
        assert_eq!(
            errors,
            [
                "answer 404 Not Found",
                "answer 403 Forbidden: action_denied",
                "answer 302 Found"
            ]
        );
        assert!(sink.rest().is_empty(), "a refusal was tried again");

        tell(&notifier, Action::Notice, None);
        seen.push(format!("{notifier:?} {:?} {errors:?}", notifier.status()));
        let status = finish(notifier, task, 4).await;
        assert_eq!(status.failed, 4, "{status:?}");
        seen.extend([
            format!("{status:?}"),
            serde_json::to_string(&status).unwrap(),
            log.text(),
        ]);
        let seen = seen.join("\n");
        assert!(
            seen.contains("Slack was not told: answer 404 Not Found"),
            "the log was not caught: {seen}"
        );
        for secret in [SECRET, "SeCrEt", "/services", "B0000"] {
            assert!(!seen.contains(secret), "{secret} shows in: {seen}");
        }
    }

    #[tokio::test]
    async fn a_dead_sink_fills_the_queue_and_holds_up_nobody() {
        let (log, _guard) = Log::start();
        // Nobody listens there, and nobody else gets the port.
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = format!("http://{}{SECRET}", socket.local_addr().unwrap());
        let tempo = Tempo {
            first_backoff: Duration::from_mins(1),
            max_backoff: Duration::from_mins(1),
            grace: Duration::from_millis(50),
        };
        let (notifier, task) = start_at(
            Settings {
                queue: 4,
                ..settings(&address)
            },
            &tempo,
        )
        .unwrap();
        tell(&notifier, Action::Alarm, None);
        while notifier.status().last_error.is_none() {
            tokio::task::yield_now().await;
        }
        let start = Instant::now();
        for n in 0..10_000 {
            tell(
                &notifier,
                Action::Ban,
                Some(&format!("10.0.{}.{}", n / 256, n % 256)),
            );
        }
        assert!(
            start.elapsed() < Duration::from_secs(5),
            "telling took {:?}",
            start.elapsed()
        );
        let status = notifier.status();
        assert_eq!((status.queued, status.dropped, status.sent), (5, 9996, 0));
        let why = status.last_error.unwrap();
        assert!(why.contains("refused") && !why.contains("SeCrEt"), "{why}");

        // In the middle of a minute's wait, the task still ends in time, and says what is lost.
        let status = finish(notifier, task, 10_001).await;
        assert_eq!(status.dropped, 10_001);
        let log = log.text();
        assert!(
            log.contains("stopped before Slack was told of everything") && !log.contains("SeCrEt"),
            "{log}"
        );
    }

    #[tokio::test]
    async fn closing_delivers_what_waits_and_what_comes_later_is_dropped() {
        let mut sink = Sink::start(&[OK]).await;
        let (notifier, task) = start_at(sink.settings(), &HURRY).unwrap();
        tell(&notifier, Action::Ban, Some("192.0.2.1"));
        tell(&notifier, Action::Ban, Some("192.0.2.2"));
        tell(&notifier, Action::Stop, None);
        notifier.close();
        tell(&notifier, Action::Alarm, None);
        let status = finish(notifier, task, 4).await;
        assert_eq!((status.sent, status.dropped), (3, 1));
        let bodies = sink.rest();
        let headers: Vec<&str> = bodies.iter().map(header).collect();
        assert_eq!(
            headers,
            ["🟠 2 bans · edge-1", "🔵 Portcullis stops · edge-1"]
        );
    }

    #[tokio::test]
    async fn the_task_ends_with_the_last_notifier() {
        let mut sink = Sink::start(&[OK]).await;
        let (notifier, task) = start_at(sink.settings(), &HURRY).unwrap();
        let clone = notifier.clone();
        drop(notifier);
        tell(&clone, Action::Stop, None);
        drop(clone);
        timeout(Duration::from_secs(30), task)
            .await
            .expect("the task does not end")
            .unwrap();
        assert_eq!(sink.rest().len(), 1);
    }

    #[tokio::test]
    async fn https_is_set_up_without_a_provider_installed_elsewhere() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("https://{}{SECRET}", listener.local_addr().unwrap());
        let (notifier, task) = start_at(
            settings(&address),
            &Tempo {
                grace: Duration::ZERO,
                ..HURRY
            },
        )
        .unwrap();
        tell(&notifier, Action::Start, None);
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut hello = [0; 3];
        stream.read_exact(&mut hello).await.unwrap();
        assert_eq!(hello[..2], [22, 3], "not the start of a TLS handshake");
        finish(notifier, task, 1).await;
    }

    #[test]
    fn only_an_https_or_loopback_address_is_a_webhook() {
        for text in [
            "https://hooks.slack.com/services/T/B/x",
            " https://hooks.slack.com/services/T/B/x\r\n",
            "http://127.0.0.1:8080/x",
            "http://127.9.9.9/x",
            "http://localhost:8080/x",
            "http://[::1]:8080/x",
        ] {
            assert!(text.parse::<Webhook>().is_ok(), "{text:?} should be taken");
        }
        for text in [
            "",
            "SeCrEt",
            "//SeCrEt",
            "http://hooks.slack.com/SeCrEt",
            "http://127.0.0.1.example/SeCrEt",
            "http://localhost.example/SeCrEt",
            "http://127.0.0.1@hooks.slack.com/SeCrEt",
            "http://[::2]/SeCrEt",
            "ftp://127.0.0.1/SeCrEt",
            "file:///SeCrEt",
            "https://",
            "https://hooks.slack.com/SeCrEt\nhttps://hooks.slack.com/SeCrEt",
            "webhook = https://hooks.slack.com/SeCrEt",
        ] {
            let error = text.parse::<Webhook>().unwrap_err();
            let error = format!("{error:#} {error:?}");
            assert!(
                error.contains("https://hooks.slack.com/services/…"),
                "{error}"
            );
            assert!(!error.contains("SeCrEt"), "{error}");
        }
    }

    #[test]
    fn a_webhook_s_file_is_read_and_open_rights_are_warned_of() {
        let (log, _guard) = Log::start();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("slack");
        let error = format!("{:#}", read_webhook(&path).unwrap_err());
        assert!(
            error.contains("create it") && error.contains("No such file"),
            "{error}"
        );

        std::fs::write(&path, format!("https://hooks.slack.com{SECRET}\n")).unwrap();
        let set_mode =
            |mode| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        set_mode(0o600);
        let webhook = read_webhook(&path).unwrap();
        assert_eq!(
            webhook.0.as_str(),
            format!("https://hooks.slack.com{SECRET}")
        );
        assert_eq!(log.text(), "");
        for mode in [0o640, 0o604] {
            set_mode(mode);
            read_webhook(&path).unwrap();
        }
        assert_eq!(log.text().matches("chmod 600").count(), 2, "{}", log.text());

        for content in [&b"SeCrEt"[..], b"", b"\xffSeCrEt", &[b'x'; 10_000]] {
            std::fs::write(&path, content).unwrap();
            let error = format!("{:#}", read_webhook(&path).unwrap_err());
            assert!(
                error.contains(path.to_str().unwrap()) && !error.contains("SeCrEt"),
                "{error}"
            );
        }
        assert!(!log.text().contains("SeCrEt"));
    }
}
