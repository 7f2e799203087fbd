//! A front filter as the agent keeps it: the kernel's bitmaps and how many entries stand behind each bit.

use anyhow::{Result, anyhow};
use aya::maps::{Array, MapData};
use portcullis_common::front::{Line, coarse, line, mask, others, word};

use super::{batch, explain};

/// One filter.
pub(super) struct FrontFilter {
    fine: Bitmap,
    /// Where there is one: a bit for each group of the fine bits that is set while any of those is.
    coarse: Option<Bitmap>,
    /// Entries behind each fine bit. One that has reached the greatest number stays set for ever: that costs a look-up.
    entries: Vec<u16>,
}

impl FrontFilter {
    /// Over maps that are all zeros, as fresh ones are.
    pub(super) fn new(fine: Array<MapData, Line>, coarse: Option<Array<MapData, Line>>) -> Self {
        let fine = Bitmap::new(fine);
        Self {
            // Zeros take no memory until they are written to.
            entries: vec![0; fine.bits()],
            fine,
            coarse: coarse.map(Bitmap::new),
        }
    }

    /// One more entry stands behind a bit, once it is written.
    pub(super) fn add(&mut self, bit: u32) {
        let entries = &mut self.entries[bit as usize];
        *entries = entries.saturating_add(1);
        if *entries == 1 {
            self.fine.set(bit, true);
            if let Some(bits) = &mut self.coarse {
                bits.set(coarse(bit), true);
            }
        }
    }

    /// One entry less stands behind a bit, once it is written.
    pub(super) fn remove(&mut self, bit: u32) {
        let entries = &mut self.entries[bit as usize];
        if matches!(*entries, 0 | u16::MAX) {
            return;
        }
        *entries -= 1;
        if *entries == 0 {
            self.fine.set(bit, false);
            if let Some(bits) = &mut self.coarse
                && self.fine.word(bit) & others(bit) == 0
            {
                bits.set(coarse(bit), false);
            }
        }
    }

    /// Writes what has changed.
    ///
    /// # Errors
    /// When the kernel refuses; what it has not got is written the next time.
    pub(super) fn write(&mut self) -> Result<()> {
        self.fine.write()?;
        self.coarse.as_mut().map_or(Ok(()), Bitmap::write)
    }
}

/// A bitmap. The agent is its only writer, so a line is written whole from the copy here.
struct Bitmap {
    map: Array<MapData, Line>,
    lines: Vec<Line>,
    /// Lines that the kernel does not have yet; each once.
    changed: Vec<u32>,
    is_changed: Vec<bool>,
}

impl Bitmap {
    fn new(map: Array<MapData, Line>) -> Self {
        let lines = map.len() as usize;
        Self {
            map,
            lines: vec![Line::default(); lines],
            changed: Vec::new(),
            is_changed: vec![false; lines],
        }
    }

    const fn bits(&self) -> usize {
        self.lines.len() * size_of::<Line>() * 8
    }

    /// The word that holds a bit.
    fn word(&self, bit: u32) -> u64 {
        self.lines[line(bit) as usize][word(bit)]
    }

    fn set(&mut self, bit: u32, set: bool) {
        let index = line(bit);
        let value = &mut self.lines[index as usize][word(bit)];
        let before = *value;
        if set {
            *value |= mask(bit);
        } else {
            *value &= !mask(bit);
        }
        if *value != before && !std::mem::replace(&mut self.is_changed[index as usize], true) {
            self.changed.push(index);
        }
    }

    fn write(&mut self) -> Result<()> {
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
