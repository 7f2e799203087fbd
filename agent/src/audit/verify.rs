//! Is the history as it was written? Finds lines that were changed, removed or moved, in bounded memory.

use std::{
    collections::VecDeque,
    fmt,
    fs::File,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use serde::Serialize;

use super::{
    chain::{Hash, Head, Sealed},
    files::{self, Line, Lines, Part},
};

/// So many breaks, and so many notes, are named; further ones are counted.
const NAMED: usize = 100;
/// So many lines that stand where they should not are known again by the one that was behind them.
const STRAYS: usize = 8;

/// What was found.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Lines of all files, whatever they are.
    pub lines: u64,
    /// Files.
    pub files: usize,
    /// The newest line.
    pub head: Option<Head>,
    /// What is not as it was written.
    pub breaks: Vec<Break>,
    /// So many more.
    pub more_breaks: u64,
    /// What is worth knowing, and no break.
    pub notes: Vec<String>,
}

impl Report {
    /// Is everything as it was written, as far as can be told?
    #[must_use]
    pub fn is_unbroken(&self) -> bool {
        self.breaks.is_empty()
    }

    fn note(&mut self, words: String) {
        if self.notes.len() < NAMED {
            self.notes.push(words);
        }
    }

    /// Says where it is, if it is named.
    fn add(&mut self, place: &Place, kind: Kind, words: String) -> Option<usize> {
        if self.breaks.len() == NAMED {
            self.more_breaks += 1;
            return None;
        }
        self.breaks.push(Break {
            file: place.file.clone(),
            line: place.line,
            kind,
            words,
        });
        Some(self.breaks.len() - 1)
    }

    /// More is known of a break now.
    fn amend(&mut self, number: Option<usize>, kind: Kind, words: String) {
        if let Some(known) = number.and_then(|number| self.breaks.get_mut(number)) {
            (known.kind, known.words) = (kind, words);
        }
    }
}

/// One thing that is not as it was written.
#[derive(Debug, Serialize)]
pub struct Break {
    /// The file.
    pub file: String,
    /// The line of the file at which it shows, from 1; 0: the file as a whole.
    pub line: u64,
    /// What it is.
    pub kind: Kind,
    /// What it is, in words.
    pub words: String,
}

impl fmt::Display for Break {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = format!("{:?}", self.kind).to_lowercase();
        match self.line {
            0 => write!(f, "{}: {kind}: {}", self.file, self.words),
            line => write!(f, "{}:{line}: {kind}: {}", self.file, self.words),
        }
    }
}

/// What a break is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A line is not as it was written.
    Changed,
    /// Lines are missing.
    Removed,
    /// A line stands where another should, or is there twice.
    Reordered,
    /// A line is none of the history's.
    Inserted,
}

#[derive(Clone, Debug)]
struct Place {
    file: String,
    line: u64,
}

/// Lines that are not sealed, one behind the other.
#[derive(Debug)]
struct Unsealed {
    place: Place,
    count: u64,
    /// The hash over them: the next line has it if they were there when that was written.
    chain: Hash,
    is_json: bool,
    is_ended: bool,
}

/// Lines that are missing, or stand elsewhere.
#[derive(Debug)]
struct Gap {
    number: Option<usize>,
    before: Head,
    behind: Head,
}

#[derive(Debug)]
struct Check {
    report: Report,
    place: Place,
    last: Option<Head>,
    /// What the last line's hash should be, if that is not what it has.
    instead: Option<Hash>,
    unsealed: Option<Unsealed>,
    /// Lines without a chain at the beginning.
    unchained: u64,
    gap: Option<Gap>,
    strays: VecDeque<Head>,
    noted: Option<Head>,
    /// The line with that number was there.
    is_noted_seen: bool,
    /// A hash that is to be there, and whether it was.
    expected: Option<(Hash, bool)>,
}

/// Reads the history in a folder. `expected` is a hash that somebody wrote down once.
///
/// # Errors
/// When there is none, or it cannot be read.
pub fn folder(dir: &Path, expected: Option<Hash>) -> Result<Report> {
    let head = files::head(dir);
    // Before the lines: what comes meanwhile is more than it knows.
    let noted = match File::open(&head) {
        Ok(file) => files::read_head(&file),
        Err(error) => Err(error),
    };
    let parts = files::open_all(dir)
        .with_context(|| format!("cannot read the history in {}", dir.display()))?;
    if parts.is_empty() && noted.is_err() {
        bail!("there is no history in {}", dir.display());
    }
    let mut report = read(parts, noted.as_ref().ok().copied(), expected)?;
    if let (Err(problem), Some(_)) = (noted, report.head) {
        let place = Place {
            file: head.display().to_string(),
            line: 0,
        };
        let words = format!("lines that are missing at the end would not show: {problem}");
        report.add(&place, Kind::Removed, words);
    }
    Ok(report)
}

/// Reads files, oldest first, without asking how many lines there should be.
///
/// # Errors
/// When one cannot be read.
pub fn files(paths: &[PathBuf], expected: Option<Hash>) -> Result<Report> {
    let open = |path: &PathBuf| {
        let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        Ok(Part {
            path: path.clone(),
            file,
        })
    };
    let parts = paths.iter().map(open).collect::<Result<_>>()?;
    read(parts, None, expected)
}

/// `noted` is the newest line that is known to have been written.
fn read(parts: Vec<Part>, noted: Option<Head>, expected: Option<Hash>) -> Result<Report> {
    let mut check = Check {
        report: Report::default(),
        place: Place {
            file: String::new(),
            line: 0,
        },
        last: None,
        instead: None,
        unsealed: None,
        unchained: 0,
        gap: None,
        strays: VecDeque::new(),
        noted,
        is_noted_seen: false,
        expected: expected.map(|hash| (hash, hash == Hash::GENESIS)),
    };
    for Part { path, file } in parts {
        check.report.files += 1;
        check.place = Place {
            file: path.display().to_string(),
            line: 0,
        };
        let mut lines = Lines::new(file);
        while let Some(line) = lines
            .read()
            .with_context(|| format!("cannot read {}", path.display()))?
        {
            check.report.lines += 1;
            check.place.line += 1;
            check.line(&line);
        }
    }
    Ok(check.end())
}

fn lines(from: u64, to: u64) -> String {
    if from == to {
        format!("line {from} of the history is")
    } else {
        format!("lines {from} to {to} of the history are")
    }
}

impl Check {
    fn line(&mut self, line: &Line<'_>) {
        let sealed = Sealed::read(line.text).filter(|_| !line.is_overlong);
        match (sealed, self.last) {
            (None, None) => self.unchained += 1,
            (None, Some(last)) => self.unsealed(line, last),
            (Some(sealed), None) => self.first(&sealed),
            (Some(sealed), Some(last)) => {
                let unsealed = self.unsealed.take();
                if sealed.head.seq == last.seq.saturating_add(1) {
                    self.next(&sealed, last, unsealed);
                } else if sealed.head.seq > last.seq {
                    self.ahead(&sealed, last, unsealed);
                } else {
                    self.behind(&sealed, last, unsealed);
                }
            }
        }
        if let Some(sealed) = sealed {
            self.compare(&sealed);
        }
    }

    fn unsealed(&mut self, line: &Line<'_>, last: Head) {
        let unsealed = self.unsealed.get_or_insert_with(|| Unsealed {
            place: self.place.clone(),
            count: 0,
            chain: last.chain,
            is_json: true,
            is_ended: true,
        });
        unsealed.count += 1;
        unsealed.chain = unsealed.chain.over(&[line.text]);
        let is_json = || serde_json::from_slice::<serde::de::IgnoredAny>(line.text).is_ok();
        unsealed.is_json = unsealed.is_json && is_json();
        unsealed.is_ended = line.is_ended;
    }

    /// The first line that is chained.
    fn first(&mut self, sealed: &Sealed<'_>) {
        let seq = sealed.head.seq;
        if self.unchained > 0 {
            self.report.note(format!(
                "not chained: {} lines at the beginning, by an earlier version, which nothing vouches for",
                self.unchained
            ));
        }
        if seq > 1 {
            self.report.note(format!(
                "{}:{}: begins with line {seq} of the history and an unknown predecessor: older files were rotated away",
                self.place.file, self.place.line
            ));
        } else if !sealed.follows(Hash::GENESIS) {
            self.changed(sealed);
            self.instead = Some(sealed.after(Hash::GENESIS));
        }
        self.last = Some(sealed.head);
    }

    fn changed(&mut self, sealed: &Sealed<'_>) {
        let words = format!(
            "line {} of the history is not as it was written",
            sealed.head.seq
        );
        self.report.add(&self.place, Kind::Changed, words);
    }

    /// The number is the one that is due.
    fn next(&mut self, sealed: &Sealed<'_>, last: Head, unsealed: Option<Unsealed>) {
        let follows_last = sealed.follows(last.chain)
            || self.instead.is_some_and(|instead| sealed.follows(instead));
        self.last = Some(sealed.head);
        self.instead = None;
        match unsealed {
            None if follows_last => {}
            Some(unsealed) if sealed.follows(unsealed.chain) => self.vouched_for(&unsealed),
            unsealed => {
                if let Some(unsealed) = unsealed {
                    self.inserted(&unsealed);
                }
                if !follows_last {
                    self.changed(sealed);
                    self.instead = Some(sealed.after(last.chain));
                }
            }
        }
    }

    /// The next line knows these: they were there when it was written.
    fn vouched_for(&mut self, unsealed: &Unsealed) {
        let Unsealed { place, count, .. } = unsealed;
        let words = if unsealed.is_json {
            format!(
                "{count} not chained, by an earlier version; the line behind vouches for them as they are"
            )
        } else {
            "torn: the agent or the machine was ended while it was written; the line behind vouches for it as it is".to_owned()
        };
        self.report
            .note(format!("{}:{}: {words}", place.file, place.line));
    }

    fn inserted(&mut self, unsealed: &Unsealed) {
        let words = format!("{} here that the history never had", many(unsealed.count));
        self.report.add(&unsealed.place, Kind::Inserted, words);
    }

    /// The number is one of further on.
    fn ahead(&mut self, sealed: &Sealed<'_>, last: Head, unsealed: Option<Unsealed>) {
        let head = sealed.head;
        let mut from = last.seq.saturating_add(1);
        self.last = Some(head);
        self.instead = None;
        if let Some(unsealed) = unsealed {
            let words = format!(
                "{} here that cannot be read, where line {from} of the history was",
                many(unsealed.count)
            );
            self.report.add(&unsealed.place, Kind::Changed, words);
            from = from.saturating_add(unsealed.count);
        } else if head.seq == from.saturating_add(1)
            && let Some(stray) = self.strays.iter().find(|stray| sealed.follows(stray.chain))
        {
            if stray.seq != from {
                // It stands where it should, and only says that it does not.
                let words = format!("line {from} of the history has another number");
                let newest = self.report.breaks.len().checked_sub(1);
                self.report.amend(newest, Kind::Changed, words);
            }
            return;
        }
        if from < head.seq {
            let words = format!("{} missing", lines(from, head.seq - 1));
            let number = self.report.add(&self.place, Kind::Removed, words);
            self.gap = Some(Gap {
                number,
                before: last,
                behind: head,
            });
        }
    }

    /// The number is one of further back.
    fn behind(&mut self, sealed: &Sealed<'_>, last: Head, unsealed: Option<Unsealed>) {
        let head = sealed.head;
        if let Some(unsealed) = unsealed {
            self.inserted(&unsealed);
        }
        if head == last {
            let words = format!("line {} of the history is there again", head.seq);
            self.report.add(&self.place, Kind::Reordered, words);
            return;
        }
        let is_of = |gap: &&Gap| gap.before.seq < head.seq && head.seq < gap.behind.seq;
        if let Some(gap) = self.gap.as_ref().filter(is_of) {
            let Gap {
                number,
                before,
                behind,
            } = *gap;
            if behind == last && head.seq == before.seq + 2 && sealed.follows(behind.chain) {
                let words = format!("line {} of the history has another number", before.seq + 1);
                self.report.amend(number, Kind::Changed, words);
                self.gap = None;
                self.last = Some(head);
                return;
            }
            if behind == last {
                let words = format!(
                    "line {} of the history stands where line {} should",
                    behind.seq,
                    before.seq + 1
                );
                self.report.amend(number, Kind::Reordered, words);
                self.stray(behind);
                self.last = Some(head);
                self.instead = None;
                return;
            }
            let words = format!(
                "{} not here, but further on",
                lines(before.seq + 1, behind.seq - 1)
            );
            self.report.amend(number, Kind::Reordered, words);
        }
        let words = format!(
            "line {} of the history stands behind line {}",
            head.seq, last.seq
        );
        self.report.add(&self.place, Kind::Reordered, words);
        self.stray(head);
    }

    fn stray(&mut self, head: Head) {
        self.strays.truncate(STRAYS - 1);
        self.strays.push_front(head);
    }

    /// Is it the line that somebody noted?
    fn compare(&mut self, sealed: &Sealed<'_>) {
        let head = sealed.head;
        if let Some((hash, found)) = &mut self.expected {
            *found |= *hash == head.chain;
        }
        let Some(noted) = self.noted.filter(|noted| noted.seq == head.seq) else {
            return;
        };
        self.is_noted_seen = true;
        if noted != head {
            let words = format!(
                "line {} of the history is not the one that history.head names",
                head.seq
            );
            self.report.add(&self.place, Kind::Changed, words);
        }
    }

    fn end(mut self) -> Report {
        let last = self.last.map_or(0, |last| last.seq);
        if let Some(unsealed) = self.unsealed.take() {
            let Unsealed { place, count, .. } = &unsealed;
            if *count == 1 && !unsealed.is_ended {
                self.report.note(format!(
                    "{}:{}: torn: only its beginning is there; it is being written, or the agent or the machine was ended \
                     while it was",
                    place.file, place.line
                ));
            } else {
                let words = format!("{} at the end that cannot be read", many(*count));
                self.report.add(place, Kind::Changed, words);
            }
        }
        if self.last.is_none() && self.unchained > 0 {
            self.report
                .note(format!("not chained: all {} lines", self.unchained));
        }
        if let Some(noted) = self
            .noted
            .filter(|noted| noted.seq > last && !self.is_noted_seen)
        {
            let words = format!(
                "the end is missing: history.head knows {} lines, and the newest one here is line {last}",
                noted.seq
            );
            self.report.add(&self.place, Kind::Removed, words);
        }
        if let Some((hash, false)) = self.expected {
            let words =
                format!("no line has the hash {hash}: what was before it was changed, or removed");
            self.report.add(&self.place, Kind::Changed, words);
        }
        self.report.head = self.last;
        self.report
    }
}

fn many(count: u64) -> String {
    if count == 1 {
        "a line is".to_owned()
    } else {
        format!("{count} lines are")
    }
}
