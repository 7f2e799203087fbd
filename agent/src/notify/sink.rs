//! For tests: a receiver on the loopback, and what is logged.

use std::{
    io::{self, Write},
    sync::{Arc, Mutex},
    time::Duration,
};

use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    time::{Instant, timeout},
};

/// The path of the sink's address.
pub(super) const SECRET: &str = "/services/T0000/B0000/SeCrEtSeCrEt";
pub(super) const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok";

/// An answer after which the connection is closed.
pub(super) fn answer(status: &str, more: &str) -> String {
    format!("HTTP/1.1 {status}\r\nConnection: close\r\n{more}")
}

/// An answer without a body.
pub(super) fn bare(status: &str) -> String {
    answer(status, "Content-Length: 0\r\n\r\n")
}

/// What came, and when it was in.
#[derive(Debug)]
pub(super) struct Request {
    pub at: Instant,
    /// In small letters.
    pub head: String,
    pub body: Value,
}

/// Gives these answers in turn, the last one for ever, and reports each request when it is in. An empty answer is none at all:
/// the connection stays open.
pub(super) struct Sink {
    pub address: String,
    requests: mpsc::UnboundedReceiver<Request>,
}

impl Sink {
    pub(super) async fn start<A: ToString>(answers: &[A]) -> Self {
        Self::on(TcpListener::bind("127.0.0.1:0").await.unwrap(), answers)
    }

    pub(super) fn on<A: ToString>(listener: TcpListener, answers: &[A]) -> Self {
        let address = format!("http://{}{SECRET}", listener.local_addr().unwrap());
        let answers: Vec<String> = answers.iter().map(ToString::to_string).collect();
        let (report, requests) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            let mut held = Vec::new();
            let mut answers = answers.into_iter().peekable();
            while let Ok((mut stream, _)) = listener.accept().await {
                let Some(request) = request(&mut stream).await else {
                    continue;
                };
                let line = format!("POST {SECRET} HTTP/1.1").to_ascii_lowercase();
                assert_eq!(request.head.lines().next(), Some(&*line));
                if report.send(request).is_err() {
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

    pub(super) async fn next(&mut self) -> Request {
        timeout(Duration::from_secs(20), self.requests.recv())
            .await
            .expect("no request came")
            .unwrap()
    }

    /// Requests that came and were not looked at.
    pub(super) fn rest(&mut self) -> Vec<Request> {
        std::iter::from_fn(|| self.requests.try_recv().ok()).collect()
    }
}

/// `None` when the client breaks off.
async fn request(stream: &mut TcpStream) -> Option<Request> {
    let mut bytes = Vec::new();
    loop {
        if stream.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
        let text = String::from_utf8_lossy(&bytes);
        let Some((head, body)) = text.split_once("\r\n\r\n") else {
            continue;
        };
        let lower = head.to_ascii_lowercase();
        let length = lower
            .lines()
            .find_map(|line| line.strip_prefix("content-length: "))
            .unwrap();
        if body.len() == length.parse::<usize>().unwrap() {
            assert!(lower.contains("content-type: application/json"), "{head}");
            return Some(Request {
                at: Instant::now(),
                body: serde_json::from_str(body).unwrap(),
                head: lower,
            });
        }
    }
}

/// What is logged on this thread, at every level.
#[derive(Clone, Default)]
pub(super) struct Log(Arc<Mutex<Vec<u8>>>);

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
    pub(super) fn start() -> (Self, tracing::subscriber::DefaultGuard) {
        let log = Self::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::TRACE)
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .finish();
        (log, tracing::subscriber::set_default(subscriber))
    }

    pub(super) fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}
