//! The ledger on disk: what must survive a restart, in an embedded database.
//!
//! redb, because it is pure Rust, one file, and survives a power cut by copy-on-write. Nobody waits for the disk: changes
//! are kept in memory, the newest of each key, and a thread writes them out together. So what waits is bounded by the
//! ledger's own bounds, and a disk that fails, or cannot be written at the start, costs durability, which is said, but no
//! ban: it is tried again until it can be. A damaged ledger is moved aside by the agent and a new one begun
//! ([`Store::recover`]); what the kernel holds is entered into that by `runtime/salvage`.

mod file;
mod form;
mod tables;

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context as _, Result};
use portcullis_engine::{Saved, Timestamp, command::Change};
use redb::Database;
use tracing::{error, info, warn};

pub use self::file::{Lock, lock_of as lock};
use self::{
    file::{Place, Trouble, guarded},
    tables::{Key, LOST, Pending},
};
use crate::{enforce::Mode, runtime::clock, source::checkpoint::Checkpoint};

#[derive(Debug, Default)]
struct Queue {
    pending: Pending,
    /// So many that were pending are being written.
    writing: usize,
    /// Why the newest try failed, until one succeeds.
    problem: Option<String>,
    /// What has become of the disk, and nobody was told of yet.
    news: Option<String>,
    /// Those who have said only a part of what belongs together.
    held: usize,
    /// No more comes.
    is_closing: bool,
}

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
    written: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        // A panic while it was held has left a complete map all the same.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The store.
#[derive(Debug)]
pub struct Store {
    shared: Arc<Shared>,
    writer: Option<JoinHandle<()>>,
}

/// While there is one, nothing is written of what is saved: see [`Store::together`].
#[derive(Debug)]
pub struct Together(Arc<Shared>);

impl Drop for Together {
    fn drop(&mut self) {
        self.0.lock().held -= 1;
        self.0.changed.notify_one();
    }
}

/// What the store held when it was opened.
#[derive(Debug, Default)]
pub struct Contents {
    /// For the engine.
    pub saved: Saved,
    /// For the source.
    pub checkpoint: Option<Checkpoint>,
    /// The mode that all this was decided in.
    pub mode: Option<Mode>,
    /// What is not here, though it was decided; the kernel may know of it.
    pub lost: Option<Lost>,
}

/// What a ledger has lost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lost {
    /// All: it was damaged.
    All {
        /// What is wrong with it.
        why: String,
        /// Where the damaged file is now; none where it could not be moved, or was before.
        aside: Option<PathBuf>,
    },
    /// The newest, perhaps: the disk cannot be written, so it could not be by a run before, either.
    Newest,
}

/// How long a disk that fails is left alone before the next try. To open a large ledger anew takes a second.
const RETRY: Duration = Duration::from_secs(2);

impl Store {
    /// Opens the database in `dir`, or makes it. What the agent would get over is an error here: see [`Store::recover`].
    ///
    /// # Errors
    /// One sentence with the remedy: another agent, no rights, a full disk, a damaged or newer database.
    pub fn open(dir: &Path) -> Result<(Self, Contents)> {
        let mut place = Place::new(dir);
        let opened = place.open().and_then(|database| {
            let contents = guarded(|| tables::read(&database))?;
            Ok((database, contents))
        });
        let (database, contents) = opened.map_err(Trouble::into_error)?;
        let writer = Writer::new(place, Some(database));
        Ok((Self::start(writer, None)?, contents))
    }

    /// As [`Store::open`], for the agent. Where the disk is full or read-only, what is there is read, and written to when it
    /// can be. A damaged database is moved aside and a new one begun: then the contents say what was lost.
    ///
    /// # Errors
    /// One sentence with the remedy: another agent, no rights, a newer database.
    pub fn recover(dir: &Path, now: Timestamp) -> Result<(Self, Contents)> {
        let mut place = Place::new(dir);
        let mut opened = place.open().and_then(|database| {
            let contents = guarded(|| tables::read(&database))?;
            Ok((Some(database), contents, None))
        });
        if let Err(Trouble::Disk(problem)) = opened {
            opened = place.peek().map(|mut contents| {
                contents.lost.get_or_insert(Lost::Newest);
                (None, contents, Some(problem))
            });
        }
        let (database, contents, problem) = match opened {
            Ok(opened) => opened,
            Err(Trouble::Damaged(why)) => {
                let why = format!("{why:#}");
                error!("{why}; a new ledger is begun");
                let (database, aside, problem) = match place.replace(now) {
                    Ok((database, aside)) => (Some(database), Some(aside), None),
                    Err(Trouble::Disk(problem)) => (None, None, Some(problem)),
                    Err(trouble) => return Err(trouble.into_error()),
                };
                let contents = Contents {
                    lost: Some(Lost::All { why, aside }),
                    ..Contents::default()
                };
                (database, contents, problem)
            }
            Err(trouble) => return Err(trouble.into_error()),
        };
        let mut writer = Writer::new(place, database);
        writer.is_begun_anew = matches!(contents.lost, Some(Lost::All { .. }));
        Ok((Self::start(writer, problem)?, contents))
    }

    fn start(mut writer: Writer, problem: Option<anyhow::Error>) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        if let Some(problem) = problem {
            writer.fail(&problem, &mut shared.lock());
        }
        let for_thread = Arc::clone(&shared);
        let writer = std::thread::Builder::new()
            .name("store".to_owned())
            .spawn(move || writer.write_all(&for_thread))
            .context("cannot start the store's thread")?;
        Ok(Self {
            shared,
            writer: Some(writer),
        })
    }

    /// Makes a change durable, soon.
    pub fn save(&self, change: &Change) {
        let (key, value) = match change {
            Change::Ban(ban) => (Key::Ban(ban.subject), written(form::ban(ban))),
            Change::Unban(subject) => (Key::Ban(*subject), None),
            Change::Offences(subject, offences) => {
                (Key::Offences(*subject), written(form::offences(offences)))
            }
            Change::Forget(subject) => (Key::Offences(*subject), None),
            Change::Allow(net, allowed) => (Key::Allow(*net), allowed.as_ref().and_then(json)),
            Change::Baseline(baseline) => (Key::Learnt("baseline"), json(baseline)),
        };
        self.put(key, value);
    }

    /// What is saved until this is dropped is on disk together, or, after a crash, not at all: a ban without the offence that it
    /// is for would be a state that never was. To be held for moments.
    #[must_use]
    pub fn together(&self) -> Together {
        self.shared.lock().held += 1;
        Together(Arc::clone(&self.shared))
    }

    /// Makes the source's position durable, soon.
    pub fn save_checkpoint(&self, checkpoint: &Checkpoint) {
        self.put(Key::Learnt("checkpoint"), json(checkpoint));
    }

    /// Makes the mode durable that everything from now on is decided in.
    pub fn save_mode(&self, mode: Mode) {
        self.put(Key::Learnt("mode"), json(&mode));
    }

    /// What could be had in place of a lost ledger was saved: from when that is on disk, this ledger stands for itself.
    pub fn is_made_up_for(&self) {
        self.put(Key::Learnt(LOST), None);
    }

    fn put(&self, key: Key, value: Option<Vec<u8>>) {
        let mut queue = self.shared.lock();
        queue.pending.insert(key, value);
        if queue.held == 0 {
            self.shared.changed.notify_one();
        }
    }

    /// Waits until all that was saved is on disk, but not longer than that, and not for a disk that fails; says whether it is.
    pub fn settle(&self, most: Duration) -> bool {
        let is_on_its_way = |queue: &mut Queue| !queue.is_settled() && queue.problem.is_none();
        let queue = self.shared.lock();
        let (queue, _) = self
            .shared
            .written
            .wait_timeout_while(queue, most, is_on_its_way)
            .unwrap_or_else(PoisonError::into_inner);
        queue.is_settled()
    }

    /// Changes that are not on disk yet.
    #[must_use]
    pub fn pending(&self) -> usize {
        let queue = self.shared.lock();
        queue.pending.len() + queue.writing
    }

    /// Why nothing can be put on disk now; it waits, and is tried again.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        self.shared.lock().problem.clone()
    }

    /// That the disk has begun to fail, or is well again, once.
    #[must_use]
    pub fn news(&self) -> Option<String> {
        self.shared.lock().news.take()
    }
}

impl Queue {
    fn is_settled(&self) -> bool {
        self.writing == 0 && self.pending.is_empty()
    }
}

impl Drop for Store {
    /// Writes what is pending, once.
    fn drop(&mut self) {
        self.shared.lock().is_closing = true;
        self.shared.changed.notify_one();
        if let Some(writer) = self.writer.take()
            && writer.join().is_err()
        {
            error!("the store's thread has panicked");
        }
    }
}

fn json<T: serde::Serialize>(value: &T) -> Option<Vec<u8>> {
    written(serde_json::to_vec(value))
}

fn written<E: fmt::Display>(value: Result<Vec<u8>, E>) -> Option<Vec<u8>> {
    value
        .inspect_err(|error| error!("a change of the ledger cannot be written down: {error}"))
        .ok()
}

/// The thread that writes.
struct Writer {
    place: Place,
    /// None until it can be opened: at a start with a full disk, and after an error, since redb refuses everything then.
    database: Option<Database>,
    /// What is pending stands for all that a damaged database held.
    is_begun_anew: bool,
    is_failing: bool,
}

impl Writer {
    const fn new(place: Place, database: Option<Database>) -> Self {
        Self {
            place,
            database,
            is_begun_anew: false,
            is_failing: false,
        }
    }

    fn write_all(mut self, shared: &Shared) {
        loop {
            let mut queue = shared
                .changed
                .wait_while(shared.lock(), |queue| {
                    (queue.pending.is_empty() || queue.held > 0) && !queue.is_closing
                })
                .unwrap_or_else(PoisonError::into_inner);
            let (changes, closing) = (std::mem::take(&mut queue.pending), queue.is_closing);
            queue.writing = changes.len();
            drop(queue);
            if changes.is_empty() && closing {
                return;
            }
            let result = self.write(&changes);
            let mut queue = shared.lock();
            queue.writing = 0;
            match result {
                Ok(()) => self.succeed(&mut queue),
                Err(problem) => {
                    for (key, value) in changes {
                        // What has come meanwhile is newer.
                        queue.pending.entry(key).or_insert(value);
                    }
                    self.fail(&problem, &mut queue);
                    if closing {
                        error!("{} changes of the ledger are lost", queue.pending.len());
                        return;
                    }
                    shared.written.notify_all();
                    drop(
                        shared
                            .changed
                            .wait_timeout_while(queue, RETRY, |queue| !queue.is_closing),
                    );
                    continue;
                }
            }
            drop(queue);
            shared.written.notify_all();
        }
    }

    fn write(&mut self, changes: &Pending) -> Result<()> {
        let database = match self.database.take() {
            Some(database) => database,
            None => self.reopen()?,
        };
        let written = guarded(|| tables::write(&database, changes));
        match written {
            Ok(()) => {
                self.database = Some(database);
                Ok(())
            }
            Err(trouble) => {
                // To be opened anew: until then redb does nothing after an error, and its closing may panic as well.
                drop(guarded(|| {
                    drop(database);
                    Ok(())
                }));
                Err(self.explained(trouble))
            }
        }
    }

    /// Opens the database again, or for the first time: what is pending goes into what is there.
    fn reopen(&mut self) -> Result<Database> {
        match self.place.open() {
            Ok(database) => Ok(database),
            // The disk was in the way of it at the start.
            Err(Trouble::Damaged(_)) if self.is_begun_anew => {
                let replaced = self.place.replace(clock::wall());
                let (database, aside) = replaced.map_err(|trouble| self.explained(trouble))?;
                warn!("the damaged ledger is {} now", aside.display());
                Ok(database)
            }
            Err(trouble) => Err(self.explained(trouble)),
        }
    }

    fn explained(&self, trouble: Trouble) -> anyhow::Error {
        match trouble {
            Trouble::Damaged(why) => why.context(format!(
                "{} was damaged while the agent runs: restart it, and it begins a new one with the bans that the kernel has",
                self.place.path().display()
            )),
            trouble => trouble.into_error(),
        }
    }

    fn fail(&mut self, problem: &anyhow::Error, queue: &mut Queue) {
        let words = format!("{problem:#}");
        if !std::mem::replace(&mut self.is_failing, true) {
            let news = format!(
                "cannot write {}: {words}; bans are enforced all the same, but what is decided would not survive a restart",
                self.place.path().display()
            );
            error!("{news}");
            queue.news = Some(news);
        }
        queue.problem = Some(words);
    }

    fn succeed(&mut self, queue: &mut Queue) {
        queue.problem = None;
        if std::mem::replace(&mut self.is_failing, false) {
            let news = format!(
                "{} can be written again: what was decided meanwhile is in it",
                self.place.path().display()
            );
            info!("{news}");
            queue.news = Some(news);
        }
    }
}

#[cfg(test)]
mod tests;
