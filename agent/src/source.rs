//! The source: lines of the access log, complete and in order, with where they came from.
//!
//! linemux says when something happened to the file; [`tail`] reads the bytes. The two meet in a wake-up that can only
//! be set or not, so a flood of file events takes no memory. Once a second the file is looked at even without one.

pub mod checkpoint;
pub mod tail;

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{self, RecvTimeoutError, SyncSender},
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context as _, Result};
use linemux::MuxedEvents;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc as queue;
use tracing::{error, warn};

use self::{checkpoint::Checkpoint, tail::Tail};
use crate::runtime::clock;

/// Where to begin without a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// What is written from now on.
    End,
    /// What is there already, too.
    Beginning,
}

/// What the source needs to know.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The log.
    pub path: PathBuf,
    /// Where to begin without a checkpoint.
    pub start: Start,
    /// Longer lines are skipped and counted.
    pub max_line_bytes: usize,
}

/// Complete lines, as they lay in the file.
#[derive(Debug)]
pub struct Batch {
    /// The lines, each ended by a line feed but perhaps the last.
    pub bytes: Vec<u8>,
    /// Where to go on once these lines are dealt with.
    pub checkpoint: Checkpoint,
    /// When they were read, on the boot clock.
    pub read: Duration,
}

impl Batch {
    /// The lines, without their ends; empty ones are left out.
    pub fn lines(&self) -> impl Iterator<Item = &[u8]> {
        let ends = memchr::memchr_iter(b'\n', &self.bytes).chain([self.bytes.len()]);
        let lines = ends.scan(0, |start, end| {
            let line = self.bytes.get(*start..end);
            *start = end + 1;
            Some(line.unwrap_or_default())
        });
        lines
            .map(<[u8]>::trim_ascii)
            .filter(|line| !line.is_empty())
    }
}

/// Batches that may wait. When the queue is full the reader waits; the lines wait in the file.
pub const QUEUE: usize = 32;

/// What the source counts.
#[derive(Debug, Default)]
pub struct Counters {
    /// Bytes read.
    pub bytes: AtomicU64,
    /// Lines over the limit, skipped.
    pub overlong: AtomicU64,
    /// Times that another file took the log's place.
    pub rotations: AtomicU64,
    /// Times that the file became shorter under our hands.
    pub truncations: AtomicU64,
    /// Bytes in the file that are not read yet, at the last look.
    pub lag: AtomicU64,
}

/// The counters, for status pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// See [`Counters`].
    pub bytes: u64,
    /// See [`Counters`].
    pub overlong_lines: u64,
    /// See [`Counters`].
    pub rotations: u64,
    /// See [`Counters`].
    pub truncations: u64,
    /// See [`Counters`].
    pub lag_bytes: u64,
}

impl Counters {
    /// As they stand.
    #[must_use]
    pub fn status(&self) -> Status {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Status {
            bytes: read(&self.bytes),
            overlong_lines: read(&self.overlong),
            rotations: read(&self.rotations),
            truncations: read(&self.truncations),
            lag_bytes: read(&self.lag),
        }
    }
}

/// A source at work. It ends when the receiver of its batches is dropped.
#[derive(Debug)]
pub struct Source {
    /// What it counts.
    pub counters: Arc<Counters>,
    /// Its reading thread.
    pub thread: JoinHandle<()>,
}

/// The file is looked at so often even when nobody says that it has changed: file events can be lost.
const POLL: Duration = Duration::from_secs(1);
/// So many bytes are read at a time.
const CHUNK: usize = 256 * 1024;

/// Starts reading. To be called inside a tokio runtime.
///
/// # Errors
/// When files cannot be watched, or the thread cannot be started.
pub async fn start(
    settings: Settings,
    checkpoint: Option<Checkpoint>,
    to: queue::Sender<Batch>,
) -> Result<Source> {
    let (wake, woken) = mpsc::sync_channel(1);
    let mut events =
        MuxedEvents::new().context("cannot watch files: raise fs.inotify.max_user_instances")?;
    events.add_file(&settings.path).await.with_context(|| {
        format!(
            "cannot watch {}: does its folder exist, and may we read it?",
            settings.path.display()
        )
    })?;
    tokio::spawn(watch(events, wake));
    let counters = Arc::new(Counters::default());
    // Here and now: what is written from this moment on is read, however late the thread gets its turn.
    let mut tail = Tail::open(
        settings.path,
        settings.start,
        settings.max_line_bytes,
        checkpoint.as_ref(),
        Arc::clone(&counters),
    )?;
    let thread = std::thread::Builder::new()
        .name("source".to_owned())
        .spawn(move || {
            let mut failing = false;
            while !to.is_closed() {
                match tail.read(CHUNK, clock::boot()) {
                    Ok(Some(bytes)) => {
                        let batch = Batch {
                            bytes,
                            checkpoint: tail.checkpoint(),
                            read: clock::boot(),
                        };
                        if to.blocking_send(batch).is_err() {
                            return;
                        }
                        failing = false;
                        continue;
                    }
                    Ok(None) => failing = false,
                    // Said once; tried again with every wake-up.
                    Err(problem) if !std::mem::replace(&mut failing, true) => error!("{problem:#}"),
                    Err(_) => {}
                }
                // Without file events the poll has to do.
                if woken.recv_timeout(POLL) == Err(RecvTimeoutError::Disconnected) {
                    std::thread::park_timeout(POLL);
                }
            }
        })?;
    Ok(Source { counters, thread })
}

/// Turns file events into wake-ups.
async fn watch(mut events: MuxedEvents, wake: SyncSender<()>) {
    loop {
        match events.next_event().await {
            Ok(Some(_)) => {
                // Full: a wake-up is waiting already.
                if let Err(mpsc::TrySendError::Disconnected(())) = wake.try_send(()) {
                    return;
                }
            }
            Ok(None) => return,
            Err(error) => {
                warn!("cannot watch the log ({error}); looking at it once a second instead");
                return;
            }
        }
    }
}
