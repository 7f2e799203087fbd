//! The history: every decision, one JSON object a line, written by a thread of its own.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{self, SyncSender, TrySendError},
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context as _, Result};
use portcullis_engine::Event;
use serde::Serialize;
use tracing::{error, info};

use crate::enforce::Mode;

/// One line of the history.
#[derive(Debug, Serialize)]
struct Line<'a> {
    #[serde(flatten)]
    event: &'a Event,
    /// What happened to packets when it was decided.
    mode: Mode,
}

/// Lines that may wait for the disk, here and in the writer's hands. Past that, new ones are lost to the history, and
/// counted; what they tell of is done all the same.
const QUEUE: usize = 16_384;
/// How long a disk that fails is left alone before the next try.
const RETRY: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
struct Shared {
    lost: AtomicU64,
    closing: AtomicBool,
}

/// The history.
#[derive(Debug)]
pub struct History {
    queue: Option<SyncSender<String>>,
    shared: Arc<Shared>,
    writer: Option<JoinHandle<()>>,
}

impl History {
    /// Opens the file for appending, or makes it (readable by its owner and group only: it holds addresses of people).
    ///
    /// # Errors
    /// When it cannot be written to.
    pub fn open(path: &Path) -> Result<Self> {
        let file = open(path).with_context(|| {
            format!(
                "cannot write the history {}: correct state.dir, or its rights",
                path.display()
            )
        })?;
        let (queue, lines) = mpsc::sync_channel(QUEUE);
        let path = path.to_owned();
        let shared = Arc::new(Shared::default());
        let for_thread = Arc::clone(&shared);
        let writer = std::thread::Builder::new()
            .name("history".to_owned())
            .spawn(move || write_all(file, &path, &lines, &for_thread))
            .context("cannot start the history's thread")?;
        Ok(Self {
            queue: Some(queue),
            shared,
            writer: Some(writer),
        })
    }

    /// Puts an event on record, soon.
    pub fn record(&self, event: &Event, mode: Mode) {
        let Some(queue) = &self.queue else { return };
        let line = match serde_json::to_string(&Line { event, mode }) {
            Ok(line) => line,
            Err(error) => {
                error!("an event cannot be written as JSON: {error}");
                return;
            }
        };
        if let Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) = queue.try_send(line)
            && self.shared.lost.fetch_add(1, Ordering::Relaxed) == 0
        {
            error!(
                "the disk does not keep up with the history: events are lost to it (counted in the status)"
            );
        }
    }

    /// Events that never came into the history.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.shared.lost.load(Ordering::Relaxed)
    }
}

impl Drop for History {
    /// Writes what waits, once.
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::Release);
        self.queue = None;
        if let Some(writer) = self.writer.take()
            && writer.join().is_err()
        {
            error!("the history's thread has panicked");
        }
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o640)
        .open(path)
}

fn write_all(mut file: File, path: &Path, lines: &mpsc::Receiver<String>, shared: &Shared) {
    let mut failing = false;
    for mut line in lines {
        line.push('\n');
        loop {
            match append(&mut file, line.as_bytes()) {
                Ok(()) => {
                    if std::mem::take(&mut failing) {
                        info!("{} can be written again", path.display());
                    }
                    break;
                }
                Err(problem) if !failing => {
                    failing = true;
                    error!(
                        "cannot write {}: {problem}; bans are enforced all the same",
                        path.display()
                    );
                }
                // At the end each line has its one try.
                Err(_) if shared.closing.load(Ordering::Acquire) => {
                    shared.lost.fetch_add(1, Ordering::Relaxed);
                    break;
                }
                Err(_) => {
                    std::thread::park_timeout(RETRY);
                    // The file system may have come back read-write, or the file have been moved away to make room.
                    if let Ok(fresh) = open(path) {
                        file = fresh;
                    }
                }
            }
        }
    }
    let lost = shared.lost.load(Ordering::Relaxed);
    if lost > 0 {
        error!("{lost} events never came into {}", path.display());
    }
}

/// Appends a line whole or not at all: half a line before a full disk would spoil the next one too.
fn append(file: &mut File, line: &[u8]) -> io::Result<()> {
    let before = file.metadata()?.len();
    let result = file.write_all(line);
    if result.is_err() {
        file.set_len(before)?;
    }
    result
}
