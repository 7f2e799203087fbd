//! Slack's stand-in: takes webhook messages and keeps them.

use std::{
    io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::{Lab, clock};

/// What the sink does with a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mood {
    /// Takes it.
    Well,
    /// Answers 429 with a Retry-After of one second.
    Busy,
    /// Answers 500.
    Broken,
    /// Accepts the connection and never answers.
    Hung,
    /// Refuses the connection.
    Down,
}

/// A message that was taken, or turned away.
#[derive(Clone, Debug)]
pub struct Message {
    /// When it had arrived, for measuring.
    pub at: Instant,
    /// The same, in milliseconds since the epoch.
    pub at_millis: u64,
    /// What was said to it; none by a sink that hangs.
    pub status: Option<u16>,
    /// The payload; null if it was no JSON.
    pub body: Value,
}

impl Message {
    /// The text of its first header block, else of the message itself.
    #[must_use]
    pub fn headline(&self) -> Option<&str> {
        let blocks = self
            .body
            .get("blocks")
            .or_else(|| self.body.pointer("/attachments/0/blocks"))
            .and_then(Value::as_array);
        blocks
            .into_iter()
            .flatten()
            .filter(|block| block.get("type").and_then(Value::as_str) == Some("header"))
            .find_map(|block| block.pointer("/text/text"))
            .or_else(|| self.body.get("text"))
            .and_then(Value::as_str)
    }
}

#[derive(Debug)]
struct State {
    mood: Mood,
    messages: Vec<Message>,
    /// Connections that wait for an answer that does not come.
    hung: Vec<TcpStream>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    stop: AtomicBool,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A webhook on the edge host's loopback.
#[derive(Debug)]
pub struct Sink {
    address: SocketAddr,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Sink {
    /// Starts listening.
    ///
    /// # Errors
    /// When the edge namespace is gone.
    pub fn start(lab: &Lab) -> Result<Self> {
        let listener = lab
            .edge()
            .run(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))?
            .context("cannot listen for webhook messages")?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                mood: Mood::Well,
                messages: Vec::new(),
                hung: Vec::new(),
            }),
            stop: AtomicBool::new(false),
        });
        let (lab, ours) = (lab.clone(), Arc::clone(&shared));
        let (entered, told) = std::sync::mpsc::channel();
        let thread = thread::spawn(move || {
            // To listen again after being down.
            let inside = lab.edge().enter();
            drop(lab);
            if entered.send(inside).is_ok() {
                serve(&ours, address, listener);
            }
        });
        told.recv()??;
        Ok(Self {
            address,
            shared,
            thread: Some(thread),
        })
    }

    /// The webhook's address, as it stands in the agent's file.
    #[must_use]
    pub fn url(&self) -> String {
        format!(
            "http://{}/services/T000/B000/secret-of-the-lab",
            self.address
        )
    }

    /// Sets what it does with messages from now on.
    pub fn set_mood(&self, mood: Mood) {
        let mut state = self.shared.state();
        state.mood = mood;
        if mood != Mood::Hung {
            state.hung.clear();
        }
    }

    /// All messages so far, those turned away included.
    #[must_use]
    pub fn messages(&self) -> Vec<Message> {
        self.shared.state().messages.clone()
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

fn serve(shared: &Arc<Shared>, address: SocketAddr, listener: TcpListener) {
    let mut listener = Some(listener);
    while !shared.stop.load(Ordering::Relaxed) {
        if shared.state().mood == Mood::Down {
            listener = None;
        } else if listener.is_none() {
            listener = TcpListener::bind(address).ok();
        }
        let next = listener.as_ref().and_then(|listener| {
            listener.set_nonblocking(true).ok()?;
            listener.accept().ok()
        });
        match next {
            Some((stream, _)) => {
                let shared = Arc::clone(shared);
                // A connection that is slow must not keep the others waiting.
                thread::spawn(move || {
                    if let Err(error) = take(&shared, stream) {
                        eprintln!("the webhook's stand-in: {error:#}");
                    }
                });
            }
            None => thread::sleep(Duration::from_millis(2)),
        }
    }
}

/// Takes messages from one connection until the other side closes it.
fn take(shared: &Shared, stream: TcpStream) -> Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut reader = BufReader::new(stream);
    while let Some(body) = request(&mut reader)? {
        let mut state = shared.state();
        let answer = match state.mood {
            Mood::Well => Some((200, "OK")),
            Mood::Busy => Some((429, "Too Many Requests\r\nRetry-After: 1")),
            Mood::Broken => Some((500, "Internal Server Error")),
            Mood::Hung | Mood::Down => None,
        };
        state.messages.push(Message {
            at: clock::now(),
            at_millis: clock::epoch_millis(),
            status: answer.map(|(status, _)| status),
            body: serde_json::from_slice(&body).unwrap_or_default(),
        });
        let Some((status, words)) = answer else {
            state.hung.push(reader.into_inner());
            return Ok(());
        };
        drop(state);
        reader
            .get_mut()
            .write_all(
                format!("HTTP/1.1 {status} {words}\r\nContent-Length: 2\r\n\r\nok").as_bytes(),
            )
            .context("cannot answer")?;
    }
    Ok(())
}

/// Reads one request with a Content-Length; `None` when there is none any more.
fn request(reader: &mut BufReader<TcpStream>) -> Result<Option<Vec<u8>>> {
    let mut length = 0;
    let mut line = String::new();
    loop {
        line.clear();
        match reader.read_line(&mut line) {
            Ok(0) => return Ok(None),
            Ok(_) => {}
            // A connection that is kept for later and not used.
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::ConnectionReset
                ) =>
            {
                return Ok(None);
            }
            Err(error) => return Err(error).context("cannot read a request"),
        }
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = value.trim().parse().context("Content-Length")?;
        }
        if line.trim_end().is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    reader
        .read_exact(&mut body)
        .context("cannot read a payload")?;
    Ok(Some(body))
}
