//! The front filter as the agent keeps it: the kernel's bitmap and how many bans stand behind each bit.

use std::collections::{BTreeSet, HashMap};

use anyhow::Result;
use aya::maps::{Array, MapData};
use portcullis_common::front::{WORDS, mask, word};

use super::explain;

/// One family's filter. The agent is its only writer, so a word is written whole from the copy here.
pub(super) struct FrontFilter {
    map: Array<MapData, u64>,
    words: Vec<u64>,
    bans: HashMap<u32, u32>,
    /// Words that the kernel does not have yet.
    changed: BTreeSet<u32>,
}

impl FrontFilter {
    /// Over a map that is all zeros, as a fresh one is.
    pub(super) fn new(map: Array<MapData, u64>) -> Self {
        Self {
            map,
            words: vec![0; WORDS as usize],
            bans: HashMap::new(),
            changed: BTreeSet::new(),
        }
    }

    /// One more ban stands behind a bit, once it is written.
    pub(super) fn add(&mut self, bit: u32) {
        let bans = self.bans.entry(bit).or_insert(0);
        *bans += 1;
        if *bans == 1 {
            self.set(bit, true);
        }
    }

    /// One ban less stands behind a bit, once it is written.
    pub(super) fn remove(&mut self, bit: u32) {
        let Some(bans) = self.bans.get_mut(&bit) else {
            return;
        };
        *bans -= 1;
        if *bans == 0 {
            self.bans.remove(&bit);
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
            self.changed.insert(index);
        }
    }

    /// Writes what has changed.
    ///
    /// # Errors
    /// When the kernel refuses; what it has not got is written the next time.
    pub(super) fn write(&mut self) -> Result<()> {
        while let Some(index) = self.changed.first().copied() {
            let value = self.words.get(index as usize).copied().unwrap_or_default();
            self.map.set(index, value, 0).map_err(explain::write)?;
            self.changed.pop_first();
        }
        Ok(())
    }
}
