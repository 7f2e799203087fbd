//! Where in which file the reading stands.

use std::{fs::Metadata, os::unix::fs::MetadataExt as _};

use serde::{Deserialize, Serialize};

/// A file, whatever it is called by now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    /// The file that this is said of.
    #[must_use]
    pub fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
        }
    }
}

/// Everything before `offset` in `file` has been dealt with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// The file.
    pub file: FileId,
    /// Bytes from its beginning; always the beginning of a line.
    pub offset: u64,
}

/// All files that are being read: rotated ones that may still grow, oldest first, then the one at the log's path.
pub type Checkpoint = Vec<Position>;
