//! The file of the database: who may have it, what becomes of a damaged one, and how it is read where it cannot be written.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

use anyhow::{Result, anyhow};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use portcullis_engine::Timestamp;
use redb::{Builder, Database, StorageBackend as _, backends::InMemoryBackend};
use tracing::warn;

use super::{Contents, tables};

/// So many damaged ledgers are kept, the newest.
const DAMAGED_KEPT: usize = 3;
/// Pages that redb keeps in memory: by default it would be a gigabyte, for a ledger that is read once.
const CACHE: usize = 32 << 20;

/// Why there is no database to work with.
#[derive(Debug)]
pub(super) enum Trouble {
    /// For an operator to solve: another agent, no rights, another version's.
    Refused(anyhow::Error),
    /// The disk is full, or must not be written.
    Disk(anyhow::Error),
    /// The file is not what was written.
    Damaged(anyhow::Error),
}

impl Trouble {
    pub(super) fn context(self, words: String) -> Self {
        match self {
            Self::Refused(why) => Self::Refused(why.context(words)),
            Self::Disk(why) => Self::Disk(why.context(words)),
            Self::Damaged(why) => Self::Damaged(why.context(words)),
        }
    }

    pub(super) fn into_error(self) -> anyhow::Error {
        match self {
            Self::Refused(why) | Self::Disk(why) => why,
            Self::Damaged(why) => why.context(
                "the ledger is damaged: start the agent, which begins a new one with the bans that the kernel has",
            ),
        }
    }
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::ReadOnlyFilesystem => {
                Self::Disk(error.into())
            }
            ErrorKind::InvalidData | ErrorKind::UnexpectedEof => Self::Damaged(error.into()),
            // A sector that cannot be read.
            _ if error.raw_os_error() == Some(Errno::EIO as i32) => Self::Damaged(error.into()),
            _ => Self::Refused(error.into()),
        }
    }
}

impl<E: Into<redb::Error>> From<Redb<E>> for Trouble {
    fn from(Redb(error): Redb<E>) -> Self {
        match error.into() {
            redb::Error::Io(error) => error.into(),
            // Whatever came first has been said.
            error @ redb::Error::PreviousIo => Self::Disk(error.into()),
            redb::Error::DatabaseAlreadyOpen | redb::Error::LockProtocolMismatch => {
                Self::Refused(anyhow!(ANOTHER))
            }
            // redb's own newer format looks so to an older redb. There is no variant for it.
            redb::Error::Corrupted(what) if what.starts_with("Expected file format version") => {
                Self::Refused(anyhow!("{what}: {NEWER}"))
            }
            error => Self::Damaged(error.into()),
        }
    }
}

/// An error of redb, of whichever kind.
#[derive(Debug)]
pub(super) struct Redb<E>(pub(super) E);

/// Makes one of redb's errors ours.
pub(super) fn checked<T, E: Into<redb::Error>>(result: Result<T, E>) -> Result<T, Trouble> {
    result.map_err(|error| Redb(error).into())
}

pub(super) const NEWER: &str =
    "it was written by another version of Portcullis: use that version, or move it away";
const ANOTHER: &str =
    "another agent is running: there can be one on a host (`portcullis status` shows it)";

/// redb trusts its file, so a damaged one may make it panic. What the job has opened is not used after that.
pub(super) fn guarded<T>(job: impl FnOnce() -> Result<T, Trouble>) -> Result<T, Trouble> {
    catch_unwind(AssertUnwindSafe(job)).unwrap_or_else(|panic| {
        let words = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied());
        Err(Trouble::Damaged(anyhow!(
            "the database has panicked: {}",
            words.unwrap_or("it does not say why")
        )))
    })
}

/// Held by whoever works with a state folder; by the kernel, so it ends with the process.
#[derive(Debug)]
pub struct Lock(#[expect(dead_code, reason = "held, not used")] Flock<File>);

/// The state folder, as far as it is the ledger's.
#[derive(Debug)]
pub(super) struct Place {
    dir: PathBuf,
    path: PathBuf,
    /// None where the disk is in the way of one.
    lock: Option<Lock>,
}

impl Place {
    pub(super) fn new(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            path: dir.join("ledger.redb"),
            lock: None,
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Sees that there is the folder, and that nobody else works with it.
    pub(super) fn claim(&mut self) -> Result<(), Trouble> {
        // It holds addresses of people.
        let mut folder = fs::DirBuilder::new();
        let made = folder.recursive(true).mode(0o750).create(&self.dir);
        made.map_err(|error| {
            Trouble::from(error).context(format!(
                "cannot make the state folder {}: correct state.dir, or its rights",
                self.dir.display()
            ))
        })?;
        if self.lock.is_none() {
            self.lock = Some(lock(&self.dir)?);
        }
        Ok(())
    }

    /// Opens the database, or makes one where there is none, and brings it to this version's form.
    pub(super) fn open(&mut self) -> Result<Database, Trouble> {
        self.claim()?;
        if !self.path.exists() {
            return self.make(false);
        }
        let opened = guarded(|| {
            let mut builder = builder();
            // A file that was altered behind redb's back is found out now, and not by a panic some day.
            builder.set_check_integrity_on_open(true);
            let database = checked(builder.open(&self.path))?;
            tables::prepare(&database)?;
            Ok(database)
        });
        opened.map_err(|trouble| self.named(trouble))
    }

    /// What the database holds, from a copy in memory: nothing is written, so a disk that is full or read-only is no
    /// hindrance. A database that a crash has left is repaired there, too. Takes as much memory as the file is long.
    pub(super) fn peek(&self) -> Result<Contents, Trouble> {
        let bytes = match fs::read(&self.path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Contents::default()),
            Err(error) => return Err(self.named(error.into())),
        };
        let read = guarded(|| {
            if bytes.is_empty() {
                return Err(Trouble::Damaged(anyhow!("it is empty")));
            }
            let copy = InMemoryBackend::new();
            copy.set_len(bytes.len() as u64)?;
            copy.write(0, &bytes)?;
            drop(bytes);
            let database = checked(builder().create_with_backend(copy))?;
            tables::prepare(&database)?;
            tables::read(&database)
        });
        read.map_err(|trouble| self.named(trouble))
    }

    fn named(&self, trouble: Trouble) -> Trouble {
        match trouble {
            // Begins with these words wherever it is met.
            Trouble::Refused(why) if why.to_string() == ANOTHER => Trouble::Refused(why),
            other => other.context(format!("cannot open {}", self.path.display())),
        }
    }

    /// Makes a new database and puts it in the old one's place, if there is one, at once: at no time is there a ledger
    /// that is neither.
    fn make(&self, is_replacement: bool) -> Result<Database, Trouble> {
        let fresh = self.dir.join("ledger.redb.new");
        let made = guarded(|| {
            remove(&fresh)?;
            // Whoever can open the ledger can hold its lock.
            let mut options = OpenOptions::new();
            drop(
                options
                    .write(true)
                    .create_new(true)
                    .mode(0o600)
                    .open(&fresh)?,
            );
            let database = checked(builder().create(&fresh))?;
            tables::begin(&database, is_replacement)?;
            Ok(database)
        });
        let made = made.and_then(|database| {
            fs::rename(&fresh, &self.path)?;
            File::open(&self.dir)?.sync_all()?;
            Ok(database)
        });
        made.map_err(|trouble| {
            // Half a one would only take up room.
            drop(remove(&fresh));
            trouble.context(format!("cannot make {}", self.path.display()))
        })
    }

    /// Keeps the damaged file beside the ledger, and begins a new one that knows of it. Returns where the old one is.
    pub(super) fn replace(&mut self, now: Timestamp) -> Result<(Database, PathBuf), Trouble> {
        self.claim()?;
        self.forget_damaged(DAMAGED_KEPT - 1);
        let mut secs = now.secs();
        let aside = loop {
            let path = self.dir.join(format!("{DAMAGED}{secs}"));
            if !path.exists() {
                break path;
            }
            secs += 1;
        };
        let linked = fs::hard_link(&self.path, &aside);
        // Where there are no hard links, there is no ledger for a moment.
        let moved = linked.or_else(|_| fs::rename(&self.path, &aside));
        moved.map_err(|error| {
            Trouble::from(error).context(format!("cannot move {} aside", self.path.display()))
        })?;
        match self.make(true) {
            Ok(database) => Ok((database, aside)),
            Err(trouble) => {
                // As it was, so that the next try finds it.
                drop(fs::rename(&aside, &self.path).and_then(|()| remove(&aside)));
                Err(trouble)
            }
        }
    }

    fn forget_damaged(&self, keep: usize) {
        let mut damaged: Vec<(u64, PathBuf)> = fs::read_dir(&self.dir)
            .into_iter()
            .flatten()
            .filter_map(|entry| {
                let path = entry.ok()?.path();
                let secs = path.file_name()?.to_str()?.strip_prefix(DAMAGED)?;
                Some((secs.parse().ok()?, path))
            })
            .collect();
        damaged.sort_unstable();
        damaged.truncate(damaged.len().saturating_sub(keep));
        for (_, path) in damaged {
            if let Err(error) = remove(&path) {
                warn!("cannot remove {}: {error}", path.display());
            }
        }
    }
}

/// Behind it, in seconds since 1970, when it was found.
const DAMAGED: &str = "ledger.redb.damaged-";

/// Takes the lock of a state folder. Not the database's own: that is none where the file is damaged, or cannot be opened.
fn lock(dir: &Path) -> Result<Lock, Trouble> {
    let path = dir.join("ledger.lock");
    // Whoever can open it can hold it.
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false).mode(0o600);
    let opened = options.open(&path).or_else(|error| {
        let there = (error.kind() == ErrorKind::ReadOnlyFilesystem).then(|| File::open(&path));
        there.and_then(Result::ok).ok_or(error)
    });
    let file = opened.map_err(|error| {
        Trouble::from(error).context(format!(
            "cannot open {}: correct its rights",
            path.display()
        ))
    })?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Lock(lock)),
        Err((_, Errno::EWOULDBLOCK)) => Err(Trouble::Refused(anyhow!(ANOTHER))),
        Err((_, error)) => Err(Trouble::from(io::Error::from(error))
            .context(format!("cannot lock {}", path.display()))),
    }
}

/// Takes the lock of a state folder that an agent works with; `None` where there is no such folder, and so nothing to share.
///
/// # Errors
/// When another agent holds it, or it cannot be had.
pub fn lock_of(dir: &Path) -> Result<Option<Lock>> {
    if !dir.exists() {
        return Ok(None);
    }
    match lock(dir) {
        Ok(lock) => Ok(Some(lock)),
        // Nobody can have made one.
        Err(Trouble::Disk(_)) => Ok(None),
        Err(trouble) => Err(trouble.into_error()),
    }
}

fn builder() -> Builder {
    let mut builder = Builder::new();
    builder.set_cache_size(CACHE);
    builder
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        done => done,
    }
}
