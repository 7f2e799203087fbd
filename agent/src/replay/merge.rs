//! Several logs as one, in the order of their lines' times.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use portcullis_engine::{Timestamp, parse::Record};

use super::input::{Input, Notes, Reading, Skipped};

/// See the module's documentation. Of lines of the same time, those of the log that was named first come first.
pub(super) struct Merge {
    reading: Reading,
    inputs: Vec<Input>,
    names: Vec<Arc<str>>,
    /// The next line of each log but the current one.
    waiting: BinaryHeap<Reverse<(Timestamp, usize)>>,
    current: Option<usize>,
    read: Arc<AtomicU64>,
    /// What could not be read, in words.
    pub(super) problems: Vec<String>,
    /// What may be said beside.
    notes: Notes,
}

impl Merge {
    /// Opens all logs. One that cannot be read is a problem, and no reason to leave out the others.
    pub(super) fn open(paths: &[PathBuf], reading: Reading) -> Self {
        let mut merge = Self {
            reading,
            inputs: Vec::new(),
            names: Vec::new(),
            waiting: BinaryHeap::new(),
            current: None,
            read: Arc::default(),
            problems: Vec::new(),
            notes: Notes::default(),
        };
        let mut known = BTreeMap::new();
        for path in paths {
            let mut input = match Input::open(path, &merge.read) {
                Ok(input) => input,
                Err(problem) => {
                    merge.problems.push(format!("{problem:#}"));
                    continue;
                }
            };
            // Two names of one log must not count everything twice.
            if let Some(other) = known.insert(input.identity(), path) {
                let (path, other) = (path.display(), other.display());
                merge
                    .notes
                    .words
                    .push(format!("{path} is the same as {other}, and is read once"));
                continue;
            }
            match input.first(&merge.reading, &mut merge.notes) {
                Ok(Some(at)) => merge.waiting.push(Reverse((at, merge.inputs.len()))),
                Ok(None) => input.close(),
                Err(problem) => merge.problems.push(format!("{problem:#}")),
            }
            merge.names.push(input.name.to_string_lossy().into());
            merge.inputs.push(input);
        }
        merge
    }

    /// The time of the next line.
    pub(super) fn peek(&mut self) -> Option<Timestamp> {
        loop {
            if let Some(place) = self.current {
                if let Some(at) = self.peek_at(place) {
                    if self
                        .waiting
                        .peek()
                        .is_none_or(|Reverse(next)| (at, place) <= *next)
                    {
                        return Some(at);
                    }
                    self.waiting.push(Reverse((at, place)));
                }
                self.current = None;
            }
            let Reverse((_, place)) = self.waiting.pop()?;
            self.current = Some(place);
        }
    }

    /// The line that was peeked at, and which log it is of.
    pub(super) fn pop(&mut self) -> Option<(usize, Record)> {
        let place = self.current?;
        Some((place, self.inputs.get_mut(place)?.pop()?))
    }

    /// What a log is called.
    pub(super) fn name(&self, log: usize) -> Option<&Arc<str>> {
        self.names.get(log)
    }

    fn peek_at(&mut self, place: usize) -> Option<Timestamp> {
        let input = self.inputs.get_mut(place)?;
        match input.peek(&self.reading, &mut self.notes) {
            Ok(Some(at)) => return Some(at),
            Ok(None) => {}
            Err(problem) => self.problems.push(format!("{problem:#}")),
        }
        input.close();
        None
    }

    /// Logs that could be opened.
    pub(super) fn files(&self) -> usize {
        self.inputs.len()
    }

    /// Bytes of all logs as they lie on disk; `None` where nobody knows beforehand.
    pub(super) fn size(&self) -> Option<u64> {
        self.inputs.iter().map(|input| input.size).sum()
    }

    /// Those that have been read.
    pub(super) fn read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    /// What people are to be told since the last time.
    pub(super) fn notes(&mut self) -> Vec<String> {
        std::mem::take(&mut self.notes.words)
    }

    /// Lines that were read into a record.
    pub(super) fn lines(&self) -> u64 {
        self.inputs.iter().map(|input| input.lines).sum()
    }

    /// How many were not.
    pub(super) fn skipped(&self) -> Skipped {
        let mut all = Skipped::default();
        for Input { skipped, .. } in &self.inputs {
            all.malformed += skipped.malformed;
            all.overlong += skipped.overlong;
        }
        all
    }

    /// Lines that were dropped because of their time.
    pub(super) fn out_of_time(&self) -> u64 {
        self.inputs.iter().map(Input::out_of_time).sum()
    }
}
