//! One log that is replayed: its lines as records, in the order in which it has them.

use std::{
    fs::File,
    io::{self, Read, Seek as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use anyhow::{Context as _, Error, Result};
use portcullis_engine::{
    Timestamp,
    parse::{Format, Record},
};

use super::guard::Guard;
use crate::source::{
    Piece,
    packed::{self, Pieces},
};

/// How lines are read.
#[derive(Clone, Debug)]
pub(super) struct Reading {
    pub(super) format: Format,
    pub(super) max_line: usize,
}

/// What people are told while logs are read.
#[derive(Debug)]
pub(super) struct Notes {
    pub(super) words: Vec<String>,
    /// Lines that may still be shown because they cannot be read; further ones are only counted.
    left: usize,
}

impl Default for Notes {
    fn default() -> Self {
        Self {
            words: Vec::new(),
            left: 5,
        }
    }
}

impl Notes {
    fn show(&mut self, name: &Path, offset: u64, problem: &str) {
        if self.left > 0 {
            self.left -= 1;
            let name = name.display();
            self.words
                .push(format!("{name}: at byte {offset}: {problem}"));
        }
    }
}

/// How many lines were no records.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Skipped {
    pub(super) malformed: u64,
    pub(super) overlong: u64,
}

/// One log. It is unpacked only while its lines are due: of many packed logs few are at a time.
pub(super) struct Input {
    pub(super) name: PathBuf,
    /// `None` for standard input.
    file: Option<File>,
    /// Its bytes as they lie on disk; `None` where nobody knows beforehand, and what is read is read once.
    pub(super) size: Option<u64>,
    pieces: Option<Pieces>,
    /// Why there are no more lines, once those before are out.
    damage: Option<Error>,
    ready: Vec<Record>,
    next: usize,
    guard: Guard,
    pub(super) skipped: Skipped,
    /// Lines that were read into a record.
    pub(super) lines: u64,
    read: Arc<AtomicU64>,
}

impl Input {
    /// Opens a file; `-` is standard input. What is read of it is added to `read`.
    pub(super) fn open(path: &Path, read: &Arc<AtomicU64>) -> Result<Self> {
        let mut input = Self {
            name: path.to_owned(),
            file: None,
            size: None,
            pieces: None,
            damage: None,
            ready: Vec::new(),
            next: 0,
            guard: Guard::default(),
            skipped: Skipped::default(),
            lines: 0,
            read: Arc::clone(read),
        };
        if path != Path::new("-") {
            let cannot = || format!("cannot open {}", path.display());
            let file = File::open(path).with_context(cannot)?;
            let metadata = file.metadata().with_context(cannot)?;
            input.size = metadata.is_file().then_some(metadata.len());
            input.file = Some(file);
        }
        Ok(input)
    }

    /// Which file it is; `None` for standard input.
    pub(super) fn identity(&self) -> Option<(u64, u64)> {
        let metadata = self.file.as_ref()?.metadata().ok()?;
        Some((metadata.dev(), metadata.ino()))
    }

    /// The time of its first line, `None` if none can be read. A file is let go of again until that time has come.
    pub(super) fn first(
        &mut self,
        reading: &Reading,
        notes: &mut Notes,
    ) -> Result<Option<Timestamp>> {
        if self.size.is_none() {
            return self.peek(reading, notes);
        }
        // What is read twice counts once, and is told of once.
        let read = std::mem::take(&mut self.read);
        let mut own = Notes::default();
        let first = self.peek(reading, &mut own);
        self.read = read;
        if let Ok(Some(_)) = first {
            *self = Self {
                pieces: None,
                damage: None,
                ready: Vec::new(),
                next: 0,
                guard: Guard::default(),
                skipped: Skipped::default(),
                lines: 0,
                name: std::mem::take(&mut self.name),
                file: self.file.take(),
                size: self.size,
                read: Arc::clone(&self.read),
            };
        } else {
            notes.words.append(&mut own.words);
            notes.left = notes.left.min(own.left);
        }
        first
    }

    /// The time of the next line.
    pub(super) fn peek(
        &mut self,
        reading: &Reading,
        notes: &mut Notes,
    ) -> Result<Option<Timestamp>> {
        while self.next >= self.ready.len() {
            self.ready.clear();
            self.next = 0;
            if let Some(damage) = self.damage.take() {
                return Err(damage);
            }
            if !self.fill(reading, notes)? {
                return Ok(None);
            }
        }
        Ok(self.ready.get(self.next).map(|record| record.at))
    }

    /// The line that was peeked at.
    pub(super) fn pop(&mut self) -> Option<Record> {
        let record = self.ready.get(self.next).copied();
        self.next += usize::from(record.is_some());
        record
    }

    /// Lines that were dropped because of their time.
    pub(super) fn out_of_time(&self) -> u64 {
        self.guard.dropped
    }

    /// Lets go of what a log needs that has no more lines.
    pub(super) fn close(&mut self) {
        self.pieces = None;
        self.file = None;
        self.ready = Vec::new();
    }

    /// Reads a piece. `false`: there is none.
    fn fill(&mut self, reading: &Reading, notes: &mut Notes) -> Result<bool> {
        if self.pieces.is_none() {
            self.pieces = Some(self.begin(reading.max_line)?);
        }
        match self.pieces.as_mut().and_then(Iterator::next) {
            Some(Ok(piece)) => self.take(&piece, reading, notes),
            Some(Err(error)) => {
                let (name, lines) = (self.name.display(), self.lines);
                self.damage = Some(
                    Error::new(error).context(format!("{name} is damaged after {lines} lines")),
                );
                self.guard.finish(&mut self.ready);
            }
            None => {
                self.guard.finish(&mut self.ready);
                return Ok(!self.ready.is_empty());
            }
        }
        Ok(true)
    }

    fn begin(&mut self, max_line: usize) -> Result<Pieces> {
        let name = &self.name;
        let text = match &mut self.file {
            None => packed::unpacked(counted(io::stdin(), &self.read), name)?,
            Some(file) => {
                let cannot = || format!("cannot read {}", name.display());
                if self.size.is_some() {
                    file.rewind().with_context(cannot)?;
                }
                let file = file.try_clone().with_context(cannot)?;
                packed::unpacked(counted(file, &self.read), name)?
            }
        };
        Ok(Pieces::new(text, max_line))
    }

    fn take(&mut self, piece: &Piece, reading: &Reading, notes: &mut Notes) {
        for (offset, line) in piece.lines() {
            if line.len() > reading.max_line {
                self.overlong(offset, notes);
                continue;
            }
            match reading.format.read(line) {
                Ok(mut record) => {
                    record.offset = offset;
                    self.lines += 1;
                    self.guard.admit(record, &mut self.ready);
                }
                Err(problem) => {
                    self.skipped.malformed += 1;
                    let line: String = String::from_utf8_lossy(line).chars().take(120).collect();
                    notes.show(&self.name, offset, &format!("{problem}: {line:?}"));
                }
            }
        }
        if let Some(offset) = piece.cut {
            self.overlong(offset, notes);
        }
    }

    fn overlong(&mut self, offset: u64, notes: &mut Notes) {
        self.skipped.overlong += 1;
        notes.show(&self.name, offset, "too long (source.max_line_bytes)");
    }
}

struct Counted<R> {
    inner: R,
    read: Arc<AtomicU64>,
}

fn counted<R: Read>(inner: R, read: &Arc<AtomicU64>) -> Counted<R> {
    let read = Arc::clone(read);
    Counted { inner, read }
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.read.fetch_add(read as u64, Ordering::Relaxed);
        Ok(read)
    }
}
