//! The history: every decision, one JSON object a line, chained by hash, written by a thread of its own.
//!
//! Nobody waits for the disk. What is recorded waits in memory, bounded, until the thread has written it; a disk that is full or
//! fails costs history when that bound is reached, which is said, counted, and put on record once it can be.

pub mod chain;
pub mod files;
pub mod verify;
mod writer;

use std::{
    collections::VecDeque,
    path::Path,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context as _, Result};
use portcullis_engine::{Event, command::Action};
use serde::{Deserialize, Serialize};
use tracing::error;

use self::{files::MAX_LINE, writer::Writer};
use crate::enforce::Mode;

/// How much history is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// A file that would become longer is rotated away.
    pub max_bytes: u64,
    /// Rotated files that stay.
    pub keep: u32,
}

/// One line of the history. Its last two fields, `seq` and `chain`, are the chain's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Recorded<E = Event> {
    /// What has happened.
    #[serde(flatten)]
    pub event: E,
    /// What happened to packets when it was decided. None where the history speaks of itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<Mode>,
}

fn as_json(event: &Event, mode: Option<Mode>) -> Option<String> {
    match serde_json::to_string(&Recorded { event, mode }) {
        // With room for the chain's fields.
        Ok(line) if line.len() < MAX_LINE - 256 => return Some(line),
        Ok(line) => error!(
            "an event of {} bytes is too long for the history",
            line.len()
        ),
        Err(error) => error!("an event cannot be written as JSON: {error}"),
    }
    None
}

/// Lines that may wait for the disk, in bytes: some 150,000 bans with their evidence. Past that, new ones are lost to the
/// history, and counted; what they tell of is done all the same.
const QUEUE: usize = 128 << 20;

#[derive(Debug, Default)]
struct Queue {
    lines: VecDeque<String>,
    /// Of all of these.
    bytes: usize,
    /// Events that never come into the history.
    lost: u64,
    /// Those of them that no line speaks of yet.
    unsaid: u64,
    /// Why the newest try failed, until one succeeds.
    problem: Option<String>,
    /// No more comes.
    is_closing: bool,
}

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        // A panic while it was held has left a complete queue all the same.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves lines to the writer's, up to so many bytes; waits for some that long at most, or for ever. Says whether no more comes.
    fn take(&self, lines: &mut VecDeque<String>, most: usize, wait: Option<Duration>) -> bool {
        let nothing =
            |queue: &mut Queue| lines.is_empty() && queue.lines.is_empty() && !queue.is_closing;
        let queue = self.lock();
        let mut queue = if let Some(wait) = wait {
            let waited = self.changed.wait_timeout_while(queue, wait, nothing);
            waited.unwrap_or_else(PoisonError::into_inner).0
        } else {
            let waited = self.changed.wait_while(queue, nothing);
            waited.unwrap_or_else(PoisonError::into_inner)
        };
        let mut taken = lines.iter().map(String::len).sum::<usize>();
        while taken < most
            && let Some(line) = queue.lines.pop_front()
        {
            queue.bytes -= line.len();
            taken += line.len();
            lines.push_back(line);
        }
        queue.is_closing && queue.lines.is_empty()
    }

    /// Lets that time pass, unless it is to end.
    fn pause(&self, time: Duration) {
        let queue = self.lock();
        drop(
            self.changed
                .wait_timeout_while(queue, time, |queue| !queue.is_closing),
        );
    }
}

/// The history.
#[derive(Debug)]
pub struct History {
    shared: Arc<Shared>,
    writer: Option<JoinHandle<()>>,
    /// Bytes that may wait.
    room: usize,
}

impl History {
    /// Opens the history in a folder, soon: what keeps it from being written is said, and tried again until it can be. Its files
    /// are readable by owner and group only, for they hold addresses of people.
    ///
    /// # Errors
    /// When there can be no thread.
    pub fn open(dir: &Path, settings: Settings) -> Result<Self> {
        Self::with_room(dir, settings, QUEUE)
    }

    fn with_room(dir: &Path, settings: Settings, room: usize) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let (mut writer, for_thread) = (Writer::new(dir, settings), Arc::clone(&shared));
        let writer = std::thread::Builder::new()
            .name("history".to_owned())
            .spawn(move || writer.write_all(&for_thread))
            .context("cannot start the history's thread")?;
        Ok(Self {
            shared,
            writer: Some(writer),
            room,
        })
    }

    /// Puts an event on record, soon.
    pub fn record(&self, event: &Event, mode: Mode) {
        let line = as_json(event, Some(mode));
        let mut queue = self.shared.lock();
        let Some(line) = line.filter(|line| queue.bytes + line.len() <= self.room) else {
            queue.lost += 1;
            queue.unsaid += 1;
            if queue.lost == 1 {
                error!(
                    "the disk does not keep up with the history: events are lost to it (counted in the status)"
                );
            }
            return;
        };
        if queue.unsaid > 0 {
            let words = format!(
                "{} events before this one are lost to the history: the disk did not keep up",
                queue.unsaid
            );
            let notice = Event::new(event.time, Action::Notice, words);
            if let Some(notice) = as_json(&notice, None) {
                queue.unsaid = 0;
                queue.bytes += notice.len();
                queue.lines.push_back(notice);
            }
        }
        queue.bytes += line.len();
        queue.lines.push_back(line);
        drop(queue);
        self.shared.changed.notify_one();
    }

    /// Why nothing can be put on record now; it waits, and is tried again.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        self.shared.lock().problem.clone()
    }

    /// Events that never came into the history.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.shared.lock().lost
    }
}

impl Drop for History {
    /// Writes what waits, once.
    fn drop(&mut self) {
        self.shared.lock().is_closing = true;
        self.shared.changed.notify_one();
        if let Some(writer) = self.writer.take()
            && writer.join().is_err()
        {
            error!("the history's thread has panicked");
        }
    }
}

#[cfg(test)]
mod tests;
