//! Lists of bans from elsewhere, and for elsewhere: text to [`Entry`]s, bans to text. Pure: the time and its zone are arguments.
//!
//! What is not understood is said with its place and left out; the rest is read all the same. Of several entries for one
//! subject the one that keeps it out for the longest counts.

mod fail2ban;
mod json;
mod table;
mod write;

#[cfg(test)]
mod tests;

use std::{fmt, net::IpAddr, time::Duration};

use indexmap::{IndexMap, map::Entry as Slot};
use ipnet::{IpNet, Ipv4Subnets, Ipv6Subnets};
use jiff::tz::TimeZone;
use portcullis_engine::{Subject, Term, Timestamp};

pub use self::write::{Form, write};

/// More bytes of one list are not read.
pub const MAX_BYTES: u64 = 256 << 20;
/// More bans of one list are not read.
pub const MAX_ENTRIES: usize = 1_000_000;
/// A longer line, or a longer record of CSV, is not read. What fail2ban prints is one line, however long.
const MAX_LINE: usize = 64 * 1024;
/// So many problems of a list are told, the others counted.
const MAX_PROBLEMS: usize = 100;
/// Longer reasons are cut.
const MAX_REASON: usize = 200;

/// What a list is written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// An array, or an object a line.
    Json,
    /// RFC 4180, with a header.
    Csv,
    /// An address, a prefix or a range a line.
    Plain,
    /// What `fail2ban-client` prints.
    Fail2ban,
    /// What `cscli decisions list` prints as JSON or raw.
    Crowdsec,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Json => "json",
            Self::Csv => "csv",
            Self::Plain => "plain",
            Self::Fail2ban => "fail2ban",
            Self::Crowdsec => "crowdsec",
        })
    }
}

/// Who is to be banned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Whom it is about.
    pub subject: Subject,
    /// When the ban ends, if the list says so.
    pub term: Option<Term>,
    /// Why, if the list says so; without control characters, 200 characters at most.
    pub reason: Option<String>,
    /// Is it only to be counted?
    pub observe: bool,
}

impl Entry {
    /// Whatever keeps out more is more.
    fn weight(&self) -> (bool, u64) {
        let end = match self.term {
            Some(Term::Until(end)) => end.millis(),
            Some(Term::Permanent) | None => u64::MAX,
        };
        (!self.observe, end)
    }
}

/// Where in a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// On this line, from 1.
    Line(usize),
    /// In this element of an array, from 1.
    Item(usize),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Line(line) => write!(f, "line {line}"),
            Self::Item(item) => write!(f, "item {item}"),
        }
    }
}

/// What is not understood, and what would be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Where.
    pub place: Place,
    /// What is wrong there.
    pub what: String,
}

/// When and where a list is read.
#[derive(Clone, Copy, Debug)]
pub struct Here<'a> {
    /// Lengths of time count from now.
    pub now: Timestamp,
    /// fail2ban writes local time.
    pub zone: &'a TimeZone,
}

/// What a list says.
#[derive(Debug)]
pub struct List {
    /// What it is written in.
    pub format: Format,
    entries: IndexMap<Subject, Entry>,
    /// The first of what is not understood.
    pub problems: Vec<Problem>,
    /// All of what is not understood.
    pub misunderstood: usize,
    /// Bans that have ended.
    pub over: usize,
    /// Decisions that CrowdSec only simulates.
    pub simulated: usize,
    /// Decisions that are no ban, or not about an address.
    pub other: usize,
    /// Further entries for the same subject.
    pub repeated: usize,
    is_full: bool,
}

impl List {
    fn new(format: Format) -> Self {
        Self {
            format,
            entries: IndexMap::new(),
            problems: Vec::new(),
            misunderstood: 0,
            over: 0,
            simulated: 0,
            other: 0,
            repeated: 0,
            is_full: false,
        }
    }

    /// Each subject once, in the list's order.
    pub fn entries(&self) -> impl ExactSizeIterator<Item = &Entry> {
        self.entries.values()
    }

    fn problem(&mut self, place: Place, what: impl Into<String>) {
        self.misunderstood += 1;
        if self.problems.len() < MAX_PROBLEMS {
            let what = what.into();
            self.problems.push(Problem { place, what });
        }
    }

    /// Takes in what a piece of text names, unless it is over.
    fn name(
        &mut self,
        place: Place,
        text: &str,
        term: Option<Term>,
        reason: Option<&str>,
        observe: bool,
        now: Timestamp,
    ) {
        let subjects = match subjects(text) {
            Ok(subjects) => subjects,
            Err(what) => return self.problem(place, what),
        };
        if term.is_some_and(|term| term.is_over(now)) {
            self.over += 1;
            return;
        }
        let reason = reason.and_then(words);
        for subject in subjects {
            self.add(
                place,
                Entry {
                    subject,
                    term,
                    reason: reason.clone(),
                    observe,
                },
            );
        }
    }

    fn add(&mut self, place: Place, entry: Entry) {
        let is_full = self.entries.len() >= MAX_ENTRIES;
        match self.entries.entry(entry.subject) {
            Slot::Occupied(mut known) => {
                self.repeated += 1;
                if entry.weight() > known.get().weight() {
                    known.insert(entry);
                }
            }
            Slot::Vacant(slot) if !is_full => {
                slot.insert(entry);
            }
            Slot::Vacant(_) => {
                if !self.is_full {
                    self.is_full = true;
                    self.problem(
                        place,
                        format!("over {MAX_ENTRIES} bans: from here on they are left out; split the list"),
                    );
                }
            }
        }
    }
}

/// Reads a list, which is told by how it begins if no format is given. Bytes that are no UTF-8 are no part of an address.
#[must_use]
pub fn read(text: &[u8], format: Option<Format>, here: Here<'_>) -> List {
    let text = String::from_utf8_lossy(text);
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let format = format.unwrap_or_else(|| told(text));
    let mut list = List::new(format);
    match format {
        Format::Json => json::read(&mut list, text, here),
        Format::Plain => plain(&mut list, text, here),
        Format::Fail2ban => fail2ban::read(&mut list, text, here),
        Format::Crowdsec if begins_as_json(text) => json::read(&mut list, text, here),
        Format::Csv | Format::Crowdsec => table::read(&mut list, text, here),
    }
    list
}

/// What a list is written in, by how it begins.
fn told(text: &str) -> Format {
    if fail2ban::is_it(text) {
        Format::Fail2ban
    } else if begins_as_json(text) {
        Format::Json
    } else {
        table::told(text).unwrap_or(Format::Plain)
    }
}

/// Older versions of `cscli` print `null` where there are no decisions.
fn begins_as_json(text: &str) -> bool {
    let text = text.trim();
    text.starts_with(['[', '{']) || text == "null"
}

/// Lines that say something, from 1.
fn lines(text: &str) -> impl Iterator<Item = (Place, &str)> {
    let lines = text.lines().enumerate();
    lines
        .map(|(before, line)| (Place::Line(before + 1), line.trim()))
        .filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
}

/// Whatever follows an address is a comment.
fn plain(list: &mut List, text: &str, here: Here<'_>) {
    for (place, line) in lines(text) {
        if line.len() > MAX_LINE {
            list.problem(place, TOO_LONG);
            continue;
        }
        let said = line.split(['#', ';']).next().unwrap_or_default().trim();
        if said.is_empty() {
            continue;
        }
        // `192.0.2.1 - 192.0.2.9` is a range, too.
        let mut parts = said.split_whitespace();
        match (parts.next(), parts.next(), parts.next()) {
            (Some(first), Some("-"), Some(last)) => {
                let range = format!("{first}-{last}");
                list.name(place, &range, None, None, false, here.now);
            }
            (Some(first), ..) => list.name(place, first, None, None, false, here.now),
            (None, ..) => {}
        }
    }
}

const TOO_LONG: &str = "longer than 64 KiB: one ban a line is read";

/// An address, a prefix, or the prefixes that a range is made of.
fn subjects(text: &str) -> Result<Vec<Subject>, String> {
    let text = text.trim();
    let problem = match text.parse::<Subject>() {
        Ok(subject) => return Ok(vec![subject]),
        Err(problem) => problem.to_string(),
    };
    let ends = text.split_once('-').map(|(first, last)| {
        let end = |text: &str| text.trim().parse::<IpAddr>().map(|end| end.to_canonical());
        (end(first), end(last))
    });
    let nets: Vec<IpNet> = match ends {
        Some((Ok(first), Ok(last))) if first > last => {
            return Err(format!(
                "the range {text:?} ends before it begins: turn it around"
            ));
        }
        Some((Ok(IpAddr::V4(first)), Ok(IpAddr::V4(last)))) => {
            Ipv4Subnets::new(first, last, 0).map(IpNet::V4).collect()
        }
        Some((Ok(IpAddr::V6(first)), Ok(IpAddr::V6(last)))) => {
            Ipv6Subnets::new(first, last, 0).map(IpNet::V6).collect()
        }
        _ => return Err(problem),
    };
    Ok(nets.into_iter().map(Subject::of_net).collect())
}

/// When a ban ends: a time, or what is left until then.
fn end(text: &str, now: Timestamp) -> Result<Term, String> {
    if ["permanent", "never", "forever"]
        .iter()
        .any(|word| text.eq_ignore_ascii_case(word))
    {
        return Ok(Term::Permanent);
    }
    if let Some(left) = left(text) {
        return Ok(Term::Until(now + left));
    }
    let time: jiff::Timestamp = text.parse().map_err(|_| {
        let text: String = text.chars().take(64).collect();
        format!(
            "{text:?} is neither a time such as 2027-01-31T00:00:00Z nor a length of time such as 2h or 59m27.5s"
        )
    })?;
    Ok(Term::Until(moment(time)))
}

/// Before 1970 is 1970: long over in any case.
fn moment(time: jiff::Timestamp) -> Timestamp {
    Timestamp::from_millis(u64::try_from(time.as_millisecond()).unwrap_or(0))
}

/// A length of time as Go prints it and as people write it: `71h59m27.123s`, `1d 2h`. What is negative is over.
fn left(text: &str) -> Option<Duration> {
    let text = text.trim();
    let (is_over, mut rest) = text
        .strip_prefix('-')
        .map_or((false, text), |rest| (true, rest));
    let mut sum = Duration::ZERO;
    loop {
        let number = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, after) = rest.split_at(number);
        let unit = after.find(|c: char| !c.is_alphabetic());
        let (unit, after) = after.split_at(unit.unwrap_or(after.len()));
        let secs = match unit {
            "w" => 604_800.0,
            "d" => 86_400.0,
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" | "μs" => 1e-6,
            "ns" => 1e-9,
            _ => return None,
        };
        let part = number.parse::<f64>().ok()? * secs;
        sum = sum.checked_add(Duration::try_from_secs_f64(part).ok()?)?;
        rest = after.trim_start();
        if rest.is_empty() {
            return Some(if is_over { Duration::ZERO } else { sum });
        }
    }
}

/// A reason, fit for logs, terminals and messages.
fn words(text: &str) -> Option<String> {
    let words: String = text
        .chars()
        .filter(|c| !c.is_control())
        .take(MAX_REASON)
        .collect();
    (!words.trim().is_empty()).then_some(words)
}
