//! Where in which file the reading stands.

use std::{
    fs::{File, Metadata},
    io,
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::PathBuf,
    time::SystemTime,
};

use serde::{Deserialize, Serialize};

/// A file, whatever it is called by now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileId {
    device: u64,
    inode: u64,
    /// Inodes are used again. Not every file system knows.
    born: Option<SystemTime>,
}

impl FileId {
    /// The file that this is said of.
    #[must_use]
    pub fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            born: metadata.created().ok(),
        }
    }
}

/// Everything before `offset` in `file` has been dealt with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// The file.
    pub file: FileId,
    /// Where it was last seen, with symbolic links followed.
    pub path: PathBuf,
    /// Bytes from its beginning; the beginning of a line, unless `cut`.
    pub offset: u64,
    /// Where the lines begin that are still in a window: these are read again after a restart. At most `offset`.
    pub rewind: u64,
    /// The offset is inside a line that is thrown away.
    pub cut: bool,
    /// What stands there before the offset.
    pub before: Fingerprint,
    /// When it was last written to.
    pub modified: SystemTime,
    /// What it begins with, if it was rotated away, read to its end and given up. It is known by that when it is packed.
    pub done: Option<Fingerprint>,
}

/// How far the reading of one log has come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Its path.
    pub log: PathBuf,
    /// Files that were rotated away, oldest first, then the one at the log's path, if there is one.
    pub files: Vec<Position>,
}

/// How far the reading of all logs has come.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// Each log.
    pub logs: Vec<Progress>,
    /// What was configured: a log that has come to a known pattern is new, one of an unknown pattern is not.
    pub patterns: Vec<PathBuf>,
    /// Lines before all this, since the first start.
    pub lines: u64,
}

impl Checkpoint {
    /// How far the reading of a log had come.
    #[must_use]
    pub fn of(&self, log: &std::path::Path) -> Option<&Progress> {
        self.logs.iter().find(|progress| progress.log == log)
    }
}

/// What stands in a file before an offset. An inode is given to a new file as soon as it is free, and a file that is copied and
/// truncated grows past its old length: neither is what was read before, and this tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// Over so many bytes; over none, every file has it.
    bytes: u16,
    hash: u64,
}

impl Fingerprint {
    /// Bytes that are enough: a line of a log has its time and its sender in it, so two lines will do.
    pub(super) const BYTES: usize = 512;

    /// Of the last bytes before an offset, at most 512 of them.
    #[must_use]
    pub fn of(text: &[u8]) -> Self {
        let text = text
            .last_chunk::<{ Self::BYTES }>()
            .map_or(text, |last| last);
        // FNV-1a (Fowler, Noll, Vo; draft-eastlake-fnv), which is the same in every version.
        let hash = text.iter().fold(0xCBF2_9CE4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01B3)
        });
        Self {
            bytes: u16::try_from(text.len()).unwrap_or_default(),
            hash,
        }
    }

    /// Of the first bytes, at most 512 of them.
    #[must_use]
    pub fn of_head(text: &[u8]) -> Self {
        Self::of(&text[..text.len().min(Self::BYTES)])
    }

    /// Does a text begin with that?
    #[must_use]
    pub fn begins(self, text: &[u8]) -> bool {
        self.bytes > 0
            && text
                .get(..self.bytes.into())
                .is_some_and(|text| Self::of(text) == self)
    }

    /// How many bytes it is over.
    #[must_use]
    pub fn bytes(self) -> u64 {
        self.bytes.into()
    }

    /// Has this file the same before the offset?
    #[must_use]
    pub fn is_of(self, file: &File, offset: u64) -> bool {
        self.bytes == 0
            || before(file, offset, self.bytes.into()).is_ok_and(|text| Self::of(&text) == self)
    }
}

/// So many bytes of a file, or all if there are fewer, before an offset.
///
/// # Errors
/// When the file is shorter, or cannot be read.
pub(super) fn before(file: &File, offset: u64, bytes: usize) -> io::Result<Vec<u8>> {
    let bytes = usize::try_from(offset).map_or(bytes, |offset| offset.min(bytes));
    let mut text = vec![0; bytes];
    file.read_exact_at(&mut text, offset - bytes as u64)?;
    Ok(text)
}
