//! A front filter as the agent keeps it: the kernel's bitmap and how many entries stand behind each bit.

use anyhow::{Result, anyhow};
use aya::maps::{Array, MapData};
use portcullis_common::front::{Line, line, mask, word};

use super::{batch, explain};

/// One filter. The agent is its only writer, so a line is written whole from the copy here.
pub(super) struct FrontFilter {
    map: Array<MapData, Line>,
    lines: Vec<Line>,
    /// Entries behind each bit. One that has reached the greatest number stays set for ever: that costs a look-up.
    entries: Vec<u16>,
    /// Lines that the kernel does not have yet; each once.
    changed: Vec<u32>,
    is_changed: Vec<bool>,
}

impl FrontFilter {
    /// Over a map that is all zeros, as a fresh one is.
    pub(super) fn new(map: Array<MapData, Line>) -> Self {
        let lines = map.len() as usize;
        Self {
            map,
            lines: vec![Line::default(); lines],
            // Zeros take no memory until they are written to.
            entries: vec![0; lines * Line::default().len() * 64],
            changed: Vec::new(),
            is_changed: vec![false; lines],
        }
    }

    /// One more entry stands behind a bit, once it is written.
    pub(super) fn add(&mut self, bit: u32) {
        let entries = &mut self.entries[bit as usize];
        *entries = entries.saturating_add(1);
        if *entries == 1 {
            self.lines[line(bit) as usize][word(bit)] |= mask(bit);
            self.note(bit);
        }
    }

    /// One entry less stands behind a bit, once it is written.
    pub(super) fn remove(&mut self, bit: u32) {
        let entries = &mut self.entries[bit as usize];
        if !matches!(*entries, 0 | u16::MAX) {
            *entries -= 1;
            if *entries == 0 {
                self.lines[line(bit) as usize][word(bit)] &= !mask(bit);
                self.note(bit);
            }
        }
    }

    fn note(&mut self, bit: u32) {
        let index = line(bit);
        if !std::mem::replace(&mut self.is_changed[index as usize], true) {
            self.changed.push(index);
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
                .set(index, self.lines[index as usize], 0)
                .map_err(explain::write)?,
            _ => {
                let lines: Vec<Line> = self
                    .changed
                    .iter()
                    .map(|index| self.lines[*index as usize])
                    .collect();
                let (_, error) = batch::update(&self.map, &self.changed, &lines);
                if let Some(error) = error {
                    return Err(anyhow!(error).context("cannot write a map"));
                }
            }
        }
        for index in self.changed.drain(..) {
            self.is_changed[index as usize] = false;
        }
        Ok(())
    }
}
