//! The ledger on disk: what must survive a restart, in an embedded database.
//!
//! redb, because it is pure Rust, one file, survives a power cut by copy-on-write, and locks its file, so a second agent
//! on the same state cannot start. Nobody waits for the disk: changes are kept in memory, the newest of each key, and a
//! thread writes them out together. So what waits is bounded by the ledger's own bounds, and a disk that fails costs
//! durability, which is said, but no ban.

use std::{
    collections::BTreeMap,
    fs::OpenOptions,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::Path,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use portcullis_engine::{Saved, command::Change};
use redb::{Database, DatabaseError, ReadableDatabase as _, ReadableTable as _, TableDefinition};
use serde::de::DeserializeOwned;
use tracing::{error, info, warn};

use crate::{enforce::Mode, source::checkpoint::Checkpoint};

/// Version of the tables' contents.
const SCHEMA: u64 = 1;
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
/// Subject → [`portcullis_engine::Ban`] as JSON.
const BANS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("bans");
/// Subject → [`portcullis_engine::ledger::Offences`] as JSON.
const OFFENCES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("offences");
/// Network → [`portcullis_engine::command::Allowed`] as JSON.
const ALLOW: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("allow");
/// `baseline`, `checkpoint` and `mode`, as JSON.
const LEARNT: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("learnt");

/// A table of the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Table {
    Bans,
    Offences,
    Allow,
    Learnt,
}

/// Newest value of each key that is not on disk yet; `None` deletes.
type Pending = BTreeMap<(Table, String), Option<Vec<u8>>>;

#[derive(Debug, Default)]
struct Queue {
    pending: Pending,
    /// What was pending is being written.
    is_writing: bool,
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

/// What the store held when it was opened.
#[derive(Debug, Default)]
pub struct Contents {
    /// For the engine.
    pub saved: Saved,
    /// For the source.
    pub checkpoint: Option<Checkpoint>,
    /// The mode that all this was decided in.
    pub mode: Option<Mode>,
}

/// How long a disk that fails is left alone before the next try.
const RETRY: Duration = Duration::from_secs(1);

impl Store {
    /// Opens the database in `dir`, or makes it.
    ///
    /// # Errors
    /// One sentence with the remedy: another agent, no rights, a damaged or newer database.
    pub fn open(dir: &Path) -> Result<(Self, Contents)> {
        // It holds addresses of people; and whoever can open the ledger can hold its lock.
        let mut folder = std::fs::DirBuilder::new();
        folder
            .recursive(true)
            .mode(0o750)
            .create(dir)
            .with_context(|| {
                format!(
                    "cannot make the state folder {}: correct state.dir, or its rights",
                    dir.display()
                )
            })?;
        let path = dir.join("ledger.redb");
        drop(
            OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&path)
                .with_context(|| format!("cannot open {}: correct its rights", path.display()))?,
        );
        let database = Database::create(&path).map_err(|error| match error {
            DatabaseError::DatabaseAlreadyOpen => anyhow::anyhow!(
                "another agent is running with {}: there can be one on a host (`portcullis status` shows it)",
                path.display()
            ),
            error => anyhow::Error::new(error).context(format!(
                "cannot open {}: if it is damaged, move it away and start again with an empty ledger",
                path.display()
            )),
        })?;
        let contents =
            read(&database).with_context(|| format!("cannot read {}", path.display()))?;
        let shared = Arc::new(Shared::default());
        let for_thread = Arc::clone(&shared);
        let writer = std::thread::Builder::new()
            .name("store".to_owned())
            .spawn(move || write_all(&database, &path, &for_thread))
            .context("cannot start the store's thread")?;
        Ok((
            Self {
                shared,
                writer: Some(writer),
            },
            contents,
        ))
    }

    /// Makes a change durable, soon.
    pub fn save(&self, change: &Change) {
        let (table, key, value) = match change {
            Change::Ban(ban) => (Table::Bans, ban.subject.to_string(), json(ban)),
            Change::Unban(subject) => (Table::Bans, subject.to_string(), None),
            Change::Offences(subject, offences) => {
                (Table::Offences, subject.to_string(), json(offences))
            }
            Change::Forget(subject) => (Table::Offences, subject.to_string(), None),
            Change::Allow(net, allowed) => (
                Table::Allow,
                net.to_string(),
                allowed.as_ref().and_then(json),
            ),
            Change::Baseline(baseline) => (Table::Learnt, "baseline".to_owned(), json(baseline)),
        };
        self.put(table, key, value);
    }

    /// Makes the source's position durable, soon.
    pub fn save_checkpoint(&self, checkpoint: &Checkpoint) {
        self.put(Table::Learnt, "checkpoint".to_owned(), json(checkpoint));
    }

    /// Makes the mode durable that everything from now on is decided in.
    pub fn save_mode(&self, mode: Mode) {
        self.put(Table::Learnt, "mode".to_owned(), json(&mode));
    }

    fn put(&self, table: Table, key: String, value: Option<Vec<u8>>) {
        self.shared.lock().pending.insert((table, key), value);
        self.shared.changed.notify_one();
    }

    /// Waits until all that was saved is on disk, but not longer than that; says whether it is.
    pub fn settle(&self, most: Duration) -> bool {
        let is_on_its_way = |queue: &mut Queue| queue.is_writing || !queue.pending.is_empty();
        let queue = self.shared.lock();
        let (queue, waited) = self
            .shared
            .written
            .wait_timeout_while(queue, most, is_on_its_way)
            .unwrap_or_else(PoisonError::into_inner);
        drop(queue);
        !waited.timed_out()
    }

    /// Changes that are not on disk yet.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.shared.lock().pending.len()
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
    serde_json::to_vec(value)
        .inspect_err(|error| error!("a change cannot be written as JSON: {error}"))
        .ok()
}

fn write_all(database: &Database, path: &Path, shared: &Shared) {
    let mut failing = false;
    loop {
        let mut queue = shared
            .changed
            .wait_while(shared.lock(), |queue| {
                queue.pending.is_empty() && !queue.is_closing
            })
            .unwrap_or_else(PoisonError::into_inner);
        let (changes, closing) = (std::mem::take(&mut queue.pending), queue.is_closing);
        queue.is_writing = true;
        drop(queue);
        if changes.is_empty() && closing {
            return;
        }
        let result = write(database, &changes);
        let mut queue = shared.lock();
        queue.is_writing = false;
        match result {
            Ok(()) if failing => {
                info!("{} can be written again", path.display());
                failing = false;
            }
            Ok(()) => {}
            Err(problem) => {
                if !failing {
                    error!(
                        "cannot write {}: {problem:#}; bans are enforced all the same, but would not survive a restart",
                        path.display()
                    );
                }
                failing = true;
                for (key, value) in changes {
                    // What has come meanwhile is newer.
                    queue.pending.entry(key).or_insert(value);
                }
                if closing {
                    error!("{} changes of the ledger are lost", queue.pending.len());
                    return;
                }
                drop(
                    shared
                        .changed
                        .wait_timeout_while(queue, RETRY, |queue| !queue.is_closing),
                );
            }
        }
        shared.written.notify_all();
    }
}

fn write(database: &Database, changes: &Pending) -> Result<()> {
    let transaction = database.begin_write()?;
    {
        let mut bans = transaction.open_table(BANS)?;
        let mut offences = transaction.open_table(OFFENCES)?;
        let mut allow = transaction.open_table(ALLOW)?;
        let mut learnt = transaction.open_table(LEARNT)?;
        for ((table, key), value) in changes {
            let table = match table {
                Table::Bans => &mut bans,
                Table::Offences => &mut offences,
                Table::Allow => &mut allow,
                Table::Learnt => &mut learnt,
            };
            match value {
                Some(value) => table.insert(key.as_str(), value.as_slice())?,
                None => table.remove(key.as_str())?,
            };
        }
    }
    transaction.commit()?;
    Ok(())
}

fn read(database: &Database) -> Result<Contents> {
    let transaction = database.begin_write()?;
    {
        let mut meta = transaction.open_table(META)?;
        let schema = meta.get("schema")?.map(|schema| schema.value());
        match schema {
            None => drop(meta.insert("schema", SCHEMA)?),
            Some(SCHEMA) => {}
            Some(other) => bail!(
                "it was written by another version of Portcullis (schema {other}, this one knows {SCHEMA}): use that version, or move it away"
            ),
        }
        // So that reading finds them.
        for table in [BANS, OFFENCES, ALLOW, LEARNT] {
            transaction.open_table(table)?;
        }
    }
    transaction.commit()?;
    let transaction = database.begin_read()?;
    let mut contents = Contents::default();
    for item in transaction.open_table(BANS)?.iter()? {
        let (key, value) = item?;
        contents
            .saved
            .bans
            .extend(decoded(key.value(), value.value()));
    }
    for item in transaction.open_table(OFFENCES)?.iter()? {
        let (key, value) = item?;
        if let (Ok(subject), Some(offences)) =
            (key.value().parse(), decoded(key.value(), value.value()))
        {
            contents.saved.offences.push((subject, offences));
        }
    }
    for item in transaction.open_table(ALLOW)?.iter()? {
        let (key, value) = item?;
        if let (Ok(net), Some(allowed)) = (key.value().parse(), decoded(key.value(), value.value()))
        {
            contents.saved.allow.push((net, allowed));
        }
    }
    let learnt = transaction.open_table(LEARNT)?;
    contents.saved.baseline = learnt
        .get("baseline")?
        .and_then(|value| decoded("baseline", value.value()));
    contents.checkpoint = learnt
        .get("checkpoint")?
        .and_then(|value| decoded("checkpoint", value.value()));
    contents.mode = learnt
        .get("mode")?
        .and_then(|value| decoded("mode", value.value()));
    Ok(contents)
}

/// One damaged value costs itself, not the ledger.
fn decoded<T: DeserializeOwned>(key: &str, value: &[u8]) -> Option<T> {
    serde_json::from_slice(value)
        .inspect_err(|error| warn!("the ledger's value of {key} is unreadable: {error}"))
        .ok()
}

#[cfg(test)]
mod tests {
    use portcullis_engine::{Ban, Origin, Term, Timestamp, command::Allowed, ledger::Offences};

    use super::*;

    fn ban(text: &str) -> Ban {
        Ban {
            subject: text.parse().unwrap(),
            since: Timestamp::from_secs(1),
            term: Term::Permanent,
            tier: Some(4),
            origin: Origin::Detector,
            reason: "z 9.0 > 3".to_owned(),
            finding: None,
            observe: false,
            gate: portcullis_engine::Gate::Wire,
            extended: 0,
            by: None,
            once_confirmed: None,
        }
    }

    #[test]
    fn what_was_saved_is_there_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let (store, contents) = Store::open(folder.path()).unwrap();
        assert!(contents.saved.bans.is_empty() && contents.checkpoint.is_none());
        let offences = Offences {
            count: 4,
            last: Timestamp::from_secs(9),
        };
        store.save(&Change::Ban(ban("192.0.2.1")));
        store.save(&Change::Ban(ban("2001:db8::/64")));
        store.save(&Change::Offences("192.0.2.1".parse().unwrap(), offences));
        store.save(&Change::Unban("2001:db8::/64".parse().unwrap()));
        let allowed = Allowed {
            since: Timestamp::from_secs(9),
            by: "root".to_owned(),
            reason: "a monitor".to_owned(),
        };
        let nets = ["203.0.113.0/24", "2001:db8:7::/48"].map(|net| net.parse().unwrap());
        for net in nets {
            store.save(&Change::Allow(net, Some(allowed.clone())));
        }
        store.save(&Change::Allow(nets[1], None));
        store.save_checkpoint(&Checkpoint::default());
        assert!(store.settle(Duration::from_mins(1)));
        assert_eq!(store.pending(), 0);
        drop(store);
        let (_store, contents) = Store::open(folder.path()).unwrap();
        assert_eq!(contents.saved.bans, [ban("192.0.2.1")]);
        assert_eq!(
            contents.saved.offences,
            [("192.0.2.1".parse().unwrap(), offences)]
        );
        assert_eq!(contents.saved.allow, [(nets[0], allowed)]);
        assert_eq!(contents.checkpoint, Some(Checkpoint::default()));
    }

    #[test]
    fn a_second_agent_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (_store, _) = Store::open(folder.path()).unwrap();
        let error = Store::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains("another agent is running"), "{error}");
    }

    #[test]
    fn a_newer_ledger_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        drop(Store::open(folder.path()).unwrap());
        let database = Database::open(folder.path().join("ledger.redb")).unwrap();
        let transaction = database.begin_write().unwrap();
        transaction
            .open_table(META)
            .unwrap()
            .insert("schema", SCHEMA + 1)
            .unwrap();
        transaction.commit().unwrap();
        drop(database);
        let error = format!("{:#}", Store::open(folder.path()).unwrap_err());
        assert!(error.contains("another version"), "{error}");
    }
}
