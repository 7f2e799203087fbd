//! A front filter as the agent keeps it: the kernel's bitmap and how many entries stand behind each bit.

use std::collections::HashMap;

use anyhow::{Result, anyhow};
use aya::maps::{Array, MapData};
use portcullis_common::front::{mask, word};

use super::{batch, explain};

/// One filter. The agent is its only writer, so a word is written whole from the copy here.
pub(super) struct FrontFilter {
    map: Array<MapData, u64>,
    words: Vec<u64>,
    entries: HashMap<u32, u32, foldhash::fast::RandomState>,
    /// Words that the kernel does not have yet; each once.
    changed: Vec<u32>,
    /// Which words those are: a bit for each.
    is_changed: Vec<u64>,
}

impl FrontFilter {
    /// Over a map that is all zeros, as a fresh one is.
    pub(super) fn new(map: Array<MapData, u64>) -> Self {
        let words = map.len() as usize;
        Self {
            map,
            words: vec![0; words],
            entries: HashMap::default(),
            changed: Vec::new(),
            is_changed: vec![0; words.div_ceil(64)],
        }
    }

    /// There are so many more to come.
    pub(super) fn reserve(&mut self, entries: usize) {
        self.entries.reserve(entries);
    }

    /// One more entry stands behind a bit, once it is written.
    pub(super) fn add(&mut self, bit: u32) {
        let entries = self.entries.entry(bit).or_insert(0);
        *entries += 1;
        if *entries == 1 {
            self.set(bit, true);
        }
    }

    /// One entry less stands behind a bit, once it is written.
    pub(super) fn remove(&mut self, bit: u32) {
        let Some(entries) = self.entries.get_mut(&bit) else {
            return;
        };
        *entries -= 1;
        if *entries == 0 {
            self.entries.remove(&bit);
            self.set(bit, false);
        }
    }

    fn set(&mut self, bit: u32, set: bool) {
        let index = word(bit);
        if let Some(value) = self.words.get_mut(index as usize) {
            if set {
                *value |= mask(bit);
            } else {
                *value &= !mask(bit);
            }
            let changed = &mut self.is_changed[word(index) as usize];
            if *changed & mask(index) == 0 {
                *changed |= mask(index);
                self.changed.push(index);
            }
        }
    }

    /// Writes what has changed.
    ///
    /// # Errors
    /// When the kernel refuses; what it has not got is written the next time.
    pub(super) fn write(&mut self) -> Result<()> {
        match self.changed[..] {
            [] => return Ok(()),
            // The usual case: one ban.
            [index] => self
                .map
                .set(index, self.words[index as usize], 0)
                .map_err(explain::write)?,
            _ => {
                let values: Vec<u64> = self
                    .changed
                    .iter()
                    .map(|index| self.words[*index as usize])
                    .collect();
                let (_, error) = batch::update(&self.map, &self.changed, &values);
                if let Some(error) = error {
                    return Err(anyhow!(error).context("cannot write a map"));
                }
            }
        }
        for index in self.changed.drain(..) {
            self.is_changed[word(index) as usize] &= !mask(index);
        }
        Ok(())
    }
}
