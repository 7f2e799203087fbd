//! The files: what they are called, how they are rotated, how they end.

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fs::{self, File},
    io::{self, BufRead as _, BufReader, Read},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use super::chain::{Hash, Head, Sealed};
use crate::source::checkpoint::FileId;

const NAME: &str = "history.jsonl";

/// Longer lines are none of the history's.
pub const MAX_LINE: usize = 1 << 20;

/// The file that is written to.
#[must_use]
pub fn current(dir: &Path) -> PathBuf {
    dir.join(NAME)
}

/// The newest number and hash that are surely on disk; what a shortened history is found by.
#[must_use]
pub fn head(dir: &Path) -> PathBuf {
    dir.join("history.head")
}

/// The file that was rotated away so many times.
fn rotated(dir: &Path, number: u32) -> PathBuf {
    dir.join(format!("{NAME}.{number}"))
}

/// The numbers of rotated files, the newest first.
fn numbers(dir: &Path) -> io::Result<BTreeSet<u32>> {
    let number = |name: &OsStr| {
        let number = name.to_str()?.strip_prefix(NAME)?.strip_prefix('.')?;
        let read: u32 = number.parse().ok().filter(|number| *number > 0)?;
        // `.01` is not ours.
        (read.to_string() == number).then_some(read)
    };
    let mut numbers = BTreeSet::new();
    for entry in fs::read_dir(dir)? {
        numbers.extend(number(&entry?.file_name()));
    }
    Ok(numbers)
}

/// One file of the history, open.
#[derive(Debug)]
pub struct Part {
    /// Where it was.
    pub path: PathBuf,
    /// The file, whatever it is called by now.
    pub file: File,
}

/// Opens all files there are, and returns them oldest first. A rotation meanwhile does no harm.
///
/// # Errors
/// When one that is there cannot be opened.
pub fn open_all(dir: &Path) -> io::Result<Vec<Part>> {
    // The newest first, and each number's next one, too: a file that is renamed meanwhile is met again, never missed.
    let there = numbers(dir)?;
    let further = there.iter().map(|number| number.saturating_add(1));
    let all: BTreeSet<u32> = there.iter().copied().chain(further).chain([0, 1]).collect();
    let (mut parts, mut seen) = (Vec::new(), Vec::new());
    for number in all {
        let path = match number {
            0 => current(dir),
            number => rotated(dir, number),
        };
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => {
                let problem = format!("cannot open {}: {error}", path.display());
                return Err(io::Error::new(error.kind(), problem));
            }
        };
        let id = FileId::of(&file.metadata()?);
        if !seen.contains(&id) {
            seen.push(id);
            parts.push(Part { path, file });
        }
    }
    parts.reverse();
    Ok(parts)
}

/// A step of a rotation. After any of them the files are whole, and in order by their numbers.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Give this the other name, and replace what has it.
    Rename(PathBuf, PathBuf),
    /// Delete this.
    Remove(PathBuf),
}

impl Step {
    /// Takes it.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn take(&self) -> io::Result<()> {
        match self {
            Self::Rename(from, to) => fs::rename(from, to),
            Self::Remove(path) => fs::remove_file(path),
        }
    }
}

/// What makes room at the current file's name, and leaves so many rotated files. A crash leaves a number free, and what is
/// behind that one stays where it is the next time: nothing older is thrown away than must be.
///
/// # Errors
/// When the folder cannot be read.
pub fn rotation(dir: &Path, keep: u32) -> io::Result<Vec<Step>> {
    let there = numbers(dir)?;
    let too_old = there.iter().rev().take_while(|number| **number > keep);
    let mut steps: Vec<Step> = too_old
        .map(|number| Step::Remove(rotated(dir, *number)))
        .collect();
    if keep == 0 {
        steps.push(Step::Remove(current(dir)));
        return Ok(steps);
    }
    let free = (1..keep)
        .find(|number| !there.contains(number))
        .unwrap_or(keep);
    let shift = (1..free).rev();
    steps.extend(shift.map(|number| Step::Rename(rotated(dir, number), rotated(dir, number + 1))));
    steps.push(Step::Rename(current(dir), rotated(dir, 1)));
    Ok(steps)
}

/// A line as it was read.
#[derive(Debug)]
pub struct Line<'a> {
    /// Without its end; of an overlong one the beginning.
    pub text: &'a [u8],
    /// It is longer than [`MAX_LINE`].
    pub is_overlong: bool,
    /// Its end is there.
    pub is_ended: bool,
}

/// Reads line by line, in bounded memory.
#[derive(Debug)]
pub struct Lines<R> {
    reader: BufReader<R>,
    line: Vec<u8>,
}

impl<R: Read> Lines<R> {
    /// From the file's beginning.
    pub fn new(file: R) -> Self {
        Self {
            reader: BufReader::with_capacity(256 * 1024, file),
            line: Vec::new(),
        }
    }

    /// The next one, if there is one.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn read(&mut self) -> io::Result<Option<Line<'_>>> {
        self.line.clear();
        let most = MAX_LINE as u64 + 1;
        (&mut self.reader)
            .take(most)
            .read_until(b'\n', &mut self.line)?;
        if self.line.is_empty() {
            return Ok(None);
        }
        let mut is_ended = self.line.pop_if(|byte| *byte == b'\n').is_some();
        let is_overlong = self.line.len() > MAX_LINE;
        if is_overlong {
            // What is thrown away counts for nothing but its end.
            is_ended = self.reader.skip_until(b'\n')? > 0;
        }
        Ok(Some(Line {
            text: &self.line,
            is_overlong,
            is_ended,
        }))
    }
}

/// Where files end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct End {
    /// The newest sealed line, and the hash to go on from: the lines behind it that are not sealed are in it, so that nobody can
    /// change them either.
    pub last: Option<(Head, Hash)>,
    /// Bytes behind the newest end of a line, which make no whole one.
    pub torn: u64,
    /// The newest line lacks its end, and nothing else.
    pub is_unended: bool,
}

/// As much is looked at to find where a file ends: a sealed line, and what a crash may have left behind it.
const WINDOW: u64 = 4 << 20;

impl End {
    /// Where these files end, oldest first. One that cannot be read is passed over.
    #[must_use]
    pub fn of(parts: &[Part]) -> Self {
        let is_sealed = |part: &Part| {
            let mut end = Self::default();
            end.go_on(&part.file).is_ok() && end.last.is_some()
        };
        let from = parts.iter().rposition(is_sealed).unwrap_or(0);
        let mut end = Self::default();
        for part in &parts[from..] {
            let _unread = end.go_on(&part.file);
        }
        end
    }

    fn go_on(&mut self, file: &File) -> io::Result<()> {
        (self.torn, self.is_unended) = (0, false);
        let metadata = file.metadata()?;
        // A device has no end.
        if !metadata.is_file() {
            return Ok(());
        }
        let from = metadata.len().saturating_sub(WINDOW);
        let mut bytes = vec![0; usize::try_from(metadata.len() - from).unwrap_or(0)];
        file.read_exact_at(&mut bytes, from)?;
        let mut lines = bytes.split_inclusive(|byte| *byte == b'\n');
        // Its beginning is elsewhere.
        if from > 0
            && let Some(piece) = lines.next()
            && !piece.ends_with(b"\n")
        {
            self.torn = piece.len() as u64;
        }
        for line in lines {
            let text = line.strip_suffix(b"\n");
            self.is_unended = text.is_none();
            let text = text.unwrap_or(line);
            match (Sealed::read(text), &mut self.last) {
                (Some(sealed), last) => *last = Some((sealed.head, sealed.head.chain)),
                (None, Some((_, chain))) => *chain = chain.over(&[text]),
                (None, None) => {}
            }
            if self.is_unended && Sealed::read(text).is_none() {
                (self.torn, self.is_unended) = (text.len() as u64, false);
            }
        }
        Ok(())
    }
}

/// Length of the file that holds the head: always the same, so that it is overwritten in place and needs no room on a full disk.
const HEAD_LENGTH: usize = 128;

/// Reads the head.
///
/// # Errors
/// When it cannot be read, or is damaged.
pub fn read_head(file: &File) -> io::Result<Head> {
    let mut bytes = [0; HEAD_LENGTH];
    file.read_exact_at(&mut bytes, 0)?;
    let damaged = || io::Error::new(io::ErrorKind::InvalidData, "it is damaged");
    let value: serde_json::Value = serde_json::from_slice(&bytes).map_err(|_| damaged())?;
    let chain = value["chain"].as_str();
    let chain = chain.and_then(|text| Hash::read(text.as_bytes()));
    match (value["seq"].as_u64(), chain) {
        (Some(seq), Some(chain)) => Ok(Head { seq, chain }),
        _ => Err(damaged()),
    }
}

/// Overwrites the head.
///
/// # Errors
/// When the disk refuses.
pub fn write_head(file: &File, head: &Head) -> io::Result<()> {
    let text = serde_json::to_string(head)?;
    let line = format!("{text:width$}\n", width = HEAD_LENGTH - 1);
    file.write_all_at(line.as_bytes(), 0)
}
