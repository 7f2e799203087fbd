//! The source: lines of the access log, complete and in order, with where they came from.
//!
//! linemux says when something happened to a file; [`tail`] reads the bytes. The two meet in a wake-up that can only
//! be set or not, so a flood of file events takes no memory. Once a second the files are looked at even without one. What
//! Nginx sends as syslog comes in beside them.

pub mod checkpoint;
pub mod follow;
pub mod pace;
pub mod packed;
mod reader;
mod rotated;
pub mod syslog;
pub mod tail;

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
        mpsc::{self, RecvTimeoutError, SyncSender},
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context as _, Result};
use linemux::MuxedEvents;
use portcullis_engine::{Feed, parse::Format};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc as queue;
use tracing::warn;

pub use self::reader::{Piece, Ripe};
use self::{
    checkpoint::{Checkpoint, Progress},
    follow::Follow,
    pace::{CatchUp, Pace},
};
use crate::runtime::clock;

/// Where to begin without a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// What is written from now on.
    End,
    /// What is there already, too.
    Beginning,
}

/// Bounds of what is read.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Longer lines are skipped and counted.
    pub max_line: usize,
    /// Lines read in so long before a stop are read again after it, to know what was known.
    pub rewind: Duration,
}

/// What the source needs to know.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The logs; names may hold `*`, `?` and `[…]`.
    pub logs: Vec<PathBuf>,
    /// Where to begin without a checkpoint.
    pub start: Start,
    /// How the lines are written: of several logs the one that is furthest behind comes first.
    pub format: Format,
    /// No log is handed on further than so much ahead of another that has lines to give. Much shorter than a window, where what
    /// comes so late is still counted.
    pub ahead_secs: u64,
    /// Bounds.
    pub limits: Limits,
    /// What is there is to be read in so long, if need be by a sample.
    pub catch_up: Duration,
    /// Where Nginx sends syslog to.
    pub syslog: Vec<syslog::Listen>,
    /// The group that may write to a Unix socket of those, besides root.
    pub syslog_group: Option<String>,
}

/// Whole lines, as they lay in the file.
#[derive(Debug)]
pub struct Batch {
    /// The log, as people call it.
    pub log: Arc<str>,
    /// The lines.
    pub piece: Piece,
    /// Longer lines are to be skipped and counted.
    pub max_line: usize,
    /// How they were come by; what comes by syslog was written just now.
    pub feed: Option<Feed>,
    /// What comes after them was written just now.
    pub caught_up: bool,
    /// Where to go on once these lines are dealt with; syslog has no such place.
    pub progress: Option<Progress>,
    /// When they were read, on the boot clock.
    pub read: Duration,
}

impl Batch {
    /// Has a former run read these lines?
    #[must_use]
    pub fn is_again(&self) -> bool {
        self.piece.again
    }
}

impl Piece {
    /// The lines and where they begin in the file, without their ends and what is white or zero around them; empty ones are
    /// left out.
    pub fn lines(&self) -> impl Iterator<Item = (u64, &[u8])> {
        let ends = memchr::memchr_iter(b'\n', &self.bytes).chain([self.bytes.len()]);
        let lines = ends.scan(0, |start, end| {
            let (at, line) = (*start, self.bytes.get(*start..end).unwrap_or_default());
            *start = end + 1;
            // A hole in a file reads as zeros.
            let zeros = line.iter().take_while(|byte| **byte == 0).count();
            let line = line[zeros..].trim_ascii();
            Some((self.start + (at + zeros) as u64, line))
        });
        lines.filter(|(_, line)| !line.is_empty())
    }
}

/// Batches that may wait. When the queue is full the reader waits; the lines wait in the file.
pub const QUEUE: usize = 8;

/// What the source counts.
#[derive(Debug, Default)]
pub struct Counters {
    /// Bytes read.
    pub bytes: AtomicU64,
    /// Lines over the limit, skipped.
    pub overlong: AtomicU64,
    /// Times that another file took a log's place.
    pub rotations: AtomicU64,
    /// Times that a file became shorter under our hands.
    pub truncations: AtomicU64,
    /// Bytes in the files that are not read yet, at the last look.
    pub lag: AtomicU64,
    /// When there was last no more than one read's worth of them, in milliseconds of the boot clock.
    pub caught_up: AtomicU64,
    /// Of so many lines one is read; 0 before the first look.
    pub one_in: AtomicU32,
    /// Logs that are followed.
    pub logs: AtomicU64,
    /// Messages by syslog.
    pub syslog: AtomicU64,
    /// Those that the kernel had no room for.
    pub syslog_lost: AtomicU64,
}

/// The counters, for status pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// See [`Counters`].
    pub logs: u64,
    /// Lines dealt with since the first start of all, each once.
    pub lines: u64,
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
    /// Lines are decided on at most so many seconds after they were written.
    pub lag_secs: u64,
    /// Of so many lines one is read.
    pub one_in: u32,
    /// See [`Counters`].
    pub syslog: u64,
    /// See [`Counters`].
    pub syslog_lost: u64,
}

impl Counters {
    /// As they stand; `lines` and the boot clock are told.
    #[must_use]
    pub fn status(&self, lines: u64, now: Duration) -> Status {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Status {
            logs: read(&self.logs),
            lines,
            bytes: read(&self.bytes),
            overlong_lines: read(&self.overlong),
            rotations: read(&self.rotations),
            truncations: read(&self.truncations),
            lag_bytes: read(&self.lag),
            lag_secs: self.behind(now).as_secs(),
            one_in: self.one_in(),
            syslog: read(&self.syslog),
            syslog_lost: read(&self.syslog_lost),
        }
    }

    /// Of so many lines one is read.
    #[must_use]
    pub fn one_in(&self) -> u32 {
        self.one_in.load(Ordering::Relaxed).max(1)
    }

    /// For how long there has been more to read than one read's worth.
    #[must_use]
    pub fn behind(&self, now: Duration) -> Duration {
        let caught_up = Duration::from_millis(self.caught_up.load(Ordering::Relaxed));
        if self.lag.load(Ordering::Relaxed) <= CHUNK as u64 {
            Duration::ZERO
        } else {
            now.saturating_sub(caught_up)
        }
    }

    fn look(&self, backlog: u64, now: Duration) {
        self.lag.store(backlog, Ordering::Relaxed);
        if backlog <= CHUNK as u64 {
            let now = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
            self.caught_up.store(now, Ordering::Relaxed);
        }
    }
}

/// A source at work. It ends when the receiver of its batches is dropped.
#[derive(Debug)]
pub struct Source {
    /// What it counts.
    pub counters: Arc<Counters>,
    /// How far the reading of each log had come when it was opened.
    pub progress: Vec<Progress>,
    /// Its threads.
    pub threads: Vec<JoinHandle<()>>,
}

/// Files are looked at so often even when nobody says that they have changed: file events can be lost.
const POLL: Duration = Duration::from_secs(1);
/// While much is left to read, how much that is is looked at so often.
const LOOK: Duration = Duration::from_millis(20);
/// So many bytes are read at a time.
pub const CHUNK: usize = 256 * 1024;

/// Starts reading. To be called inside a tokio runtime.
///
/// # Errors
/// When files cannot be watched or read, a socket cannot be made, or a thread cannot be started.
pub async fn start(
    settings: Settings,
    checkpoint: Option<Checkpoint>,
    to: queue::Sender<Batch>,
) -> Result<Source> {
    let counters = Arc::new(Counters::default());
    let mut threads = Vec::new();
    for listen in &settings.syslog {
        let receiver = syslog::Receiver::open(
            listen,
            settings.syslog_group.as_deref(),
            Arc::clone(&counters),
        )?;
        let (to, max_line) = (to.clone(), settings.limits.max_line);
        let thread = std::thread::Builder::new().name("syslog".to_owned());
        threads.push(thread.spawn(move || receiver.run(max_line, &to))?);
    }
    let (wake, woken) = mpsc::sync_channel(1);
    let (come, comers) = queue::channel(follow::MAX_LOGS);
    let mut events =
        MuxedEvents::new().context("cannot watch files: raise fs.inotify.max_user_instances")?;
    let now = clock::boot();
    counters.look(0, now);
    // Here and now: what is written from this moment on is read, however late the thread gets its turn.
    let follow = Follow::open(
        settings.clone(),
        checkpoint.as_ref(),
        now,
        Arc::clone(&counters),
    )?;
    for path in follow.paths() {
        events.add_file(path).await.with_context(|| {
            format!(
                "cannot watch {}: does its folder exist, and may we read it?",
                path.display()
            )
        })?;
    }
    let progress = follow.progress();
    tokio::spawn(watch(events, comers, wake));
    let reading = Reading {
        mixed: !settings.syslog.is_empty(),
        follow,
        max_line: settings.limits.max_line,
        pace: Pace::new(settings.catch_up),
        woken,
        come,
        to,
        counters: Arc::clone(&counters),
    };
    let thread = std::thread::Builder::new().name("source".to_owned());
    threads.push(thread.spawn(move || reading.run())?);
    Ok(Source {
        counters,
        progress,
        threads,
    })
}

/// The thread that reads the files.
struct Reading {
    follow: Follow,
    /// Lines come by syslog, too.
    mixed: bool,
    max_line: usize,
    pace: Pace,
    woken: mpsc::Receiver<()>,
    come: queue::Sender<PathBuf>,
    to: queue::Sender<Batch>,
    counters: Arc<Counters>,
}

impl Reading {
    fn run(mut self) {
        let mut catch_up = CatchUp::default();
        // What there was left to read, and when that was looked at.
        let (mut backlog, mut looked) = (0, Duration::ZERO);
        while !self.to.is_closed() {
            let found = self.follow.read(CHUNK, clock::boot());
            let now = clock::boot();
            let bytes = found.as_ref().map_or(0, |found| found.piece.bytes.len()) as u64;
            // With many logs it takes longer to look at all of them than to read from one.
            if found.is_some() && backlog > CHUNK as u64 && now.saturating_sub(looked) < LOOK {
                backlog = backlog.saturating_sub(bytes);
            } else {
                (backlog, looked) = (self.follow.backlog(), now);
            }
            self.counters.look(backlog, now);
            self.pace.passed(now, bytes, backlog, CHUNK as u64);
            let behind = catch_up.is_behind();
            let left = if found.is_some() { backlog } else { 0 };
            catch_up.passed(bytes, left, CHUNK as u64);
            let one_in = self.pace.one_in();
            self.counters.one_in.store(one_in, Ordering::Relaxed);
            let is_idle = found.is_none();
            // That the end is reached is said even where there was nothing to read on the way.
            if !is_idle || behind {
                let (piece, progress) = found.map_or_else(Default::default, |found| {
                    (found.piece, Some(found.progress))
                });
                let batch = Batch {
                    log: progress.as_ref().map_or_else(
                        || "".into(),
                        |progress| progress.log.to_string_lossy().into(),
                    ),
                    feed: Some(Feed {
                        again: piece.again,
                        behind,
                        mixed: self.mixed,
                        one_in,
                    }),
                    piece,
                    max_line: self.max_line,
                    caught_up: !catch_up.is_behind(),
                    progress,
                    read: now,
                };
                if self.to.blocking_send(batch).is_err() {
                    return;
                }
            }
            for path in self.follow.look(now) {
                // Full: the poll will have to do.
                drop(self.come.try_send(path));
            }
            let logs = self.follow.paths().count() as u64;
            self.counters.logs.store(logs, Ordering::Relaxed);
            // Without file events the poll has to do.
            if is_idle && self.woken.recv_timeout(POLL) == Err(RecvTimeoutError::Disconnected) {
                std::thread::park_timeout(POLL);
            }
        }
    }
}

/// Turns file events into wake-ups.
async fn watch(
    mut events: MuxedEvents,
    mut comers: queue::Receiver<PathBuf>,
    wake: SyncSender<()>,
) {
    loop {
        let event = tokio::select! {
            event = events.next_event() => event,
            Some(path) = comers.recv() => {
                if let Err(error) = events.add_file(&path).await {
                    warn!("cannot watch {} ({error}); looking at it once a second instead", path.display());
                }
                continue;
            }
        };
        match event {
            Ok(Some(_)) => {
                // Full: a wake-up is waiting already.
                if let Err(mpsc::TrySendError::Disconnected(())) = wake.try_send(()) {
                    return;
                }
            }
            Ok(None) => return,
            Err(error) => {
                warn!("cannot watch the logs ({error}); looking at them once a second instead");
                return;
            }
        }
    }
}
