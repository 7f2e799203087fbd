//! What the loop knows of the lines that come in: how far they have been dealt with, which of them are left out, which logs cannot
//! be read, and when to say so.

use std::{
    collections::BTreeMap,
    fmt,
    path::PathBuf,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use portcullis_engine::{Feed, Line};
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::clock;
use crate::source::{
    self, Batch, Counters,
    checkpoint::{Checkpoint, Progress},
};

/// So many lines are worked on at a time.
pub(super) const GROUP: usize = 16;
/// A malformed line is shown in the log at most so often; all are counted.
const SHOW_MALFORMED: Duration = Duration::from_secs(10);
/// After so many lines in a row that could not be read, a log is said to be unreadable: in the wrong format, as a rule.
const UNREADABLE: u64 = 20;
/// That is said at most so often, of all such logs together: clients or several servers may write to one in turns.
const SAY_UNREADABLE: Duration = Duration::from_mins(10);
/// One that is given no more lines is forgotten after so long: it may be gone.
const FORGET: Duration = Duration::from_hours(24);
/// So many logs with malformed lines are known at a time.
const MAX_UNREADABLE: usize = 512;
/// So many of them are named.
const NAMED: usize = 5;
/// Decisions that are later than this are said to be.
const LATE: Duration = Duration::from_secs(10);
/// Reading has caught up when it has been up to date, and read every line, for so long.
const CALM: Duration = Duration::from_secs(30);

/// A log of which the newest lines cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unreadable {
    /// The log, or the place where syslog comes in.
    pub log: String,
    /// Lines since the last one that could be read.
    pub lines: u64,
    /// Where the first of them begins in the file; syslog has no such place.
    pub first: Option<u64>,
    /// What is wrong with it.
    pub problem: String,
}

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            log,
            lines,
            first,
            problem,
        } = self;
        match first {
            Some(first) => write!(
                f,
                "none of the newest {lines} lines of {log} can be read; the first of them, at byte {first}, is {problem}; \
                 `portcullis lines {log}` shows more"
            ),
            None => write!(
                f,
                "none of the newest {lines} messages by {log} can be read; the first of them is {problem}"
            ),
        }
    }
}

/// What is kept of one that may come to be unreadable.
struct Suspect {
    state: Unreadable,
    /// Its newest line, on the boot clock.
    newest: Duration,
    /// People have been told.
    said: bool,
}

/// See the module's documentation.
pub(super) struct Reading {
    progress: BTreeMap<PathBuf, Progress>,
    patterns: Vec<PathBuf>,
    /// Lines dealt with since the first start.
    lines: u64,
    /// There is something to save.
    is_new: bool,
    /// When it was last saved, on the boot clock.
    saved: Duration,
    /// Which lines of a sample are read.
    random: fastrand::Rng,
    /// Malformed lines since one was last shown, and when that was.
    unshown: u64,
    shown: Option<Duration>,
    /// Logs with malformed lines and none since that could be read.
    suspects: BTreeMap<Arc<str>, Suspect>,
    /// When people were last told of such.
    said_unreadable: Option<Duration>,
    /// Of which people were told, and which could be read since.
    recovered: Vec<String>,
    /// While people have been told that reading is behind: when it last was.
    behind: Option<Duration>,
    /// How the newest lines of the files were come by.
    feed: Feed,
}

impl Reading {
    /// Goes on from where a former run ended, and the logs were opened.
    pub fn new(
        settings: &source::Settings,
        checkpoint: Option<Checkpoint>,
        opened: Vec<Progress>,
    ) -> Self {
        let checkpoint = checkpoint.unwrap_or_default();
        // One that is gone from a pattern has no place to go on at.
        let is_there =
            |progress: &Progress| progress.log.exists() || settings.logs.contains(&progress.log);
        let known = checkpoint.logs.into_iter().filter(is_there);
        let progress = known.chain(opened);
        Self {
            progress: progress
                .map(|progress| (progress.log.clone(), progress))
                .collect(),
            patterns: settings.logs.clone(),
            lines: checkpoint.lines,
            is_new: true,
            // At once: whatever happens next, what comes from now on is known to be new.
            saved: Duration::ZERO,
            random: fastrand::Rng::new(),
            unshown: 0,
            shown: None,
            suspects: BTreeMap::new(),
            said_unreadable: None,
            recovered: Vec::new(),
            behind: None,
            feed: Feed {
                behind: true,
                ..Feed::default()
            },
        }
    }

    /// How the lines of a batch were come by. Those of syslog know nothing of the files that they come in beside.
    pub fn feed(&mut self, batch: &Batch) -> Feed {
        match batch.feed {
            Some(feed) => {
                self.feed = Feed {
                    behind: feed.behind && !batch.caught_up,
                    ..Feed::default()
                };
                feed
            }
            None => Feed {
                mixed: true,
                ..self.feed
            },
        }
    }

    /// Lines dealt with since the first start.
    pub const fn lines(&self) -> u64 {
        self.lines
    }

    /// Of the next lines of a batch those that are to be worked on, at most [`GROUP`].
    pub fn take<'a>(
        &mut self,
        batch: &'a Batch,
        lines: &mut impl Iterator<Item = (u64, &'a [u8])>,
        counters: &Counters,
    ) -> Vec<Line<'a>> {
        let one_in = batch.feed.map_or(1, |feed| feed.one_in);
        let mut taken = Vec::with_capacity(GROUP);
        for (offset, text) in lines {
            self.lines += u64::from(!batch.is_again());
            if text.len() > batch.max_line {
                self.overlong(batch, text, counters);
            } else if one_in <= 1 || self.random.u32(..one_in) == 0 {
                taken.push(Line { text, offset });
                if taken.len() == GROUP {
                    break;
                }
            }
        }
        taken
    }

    fn overlong(&mut self, batch: &Batch, line: &[u8], counters: &Counters) {
        if !batch.is_again() {
            counters.overlong.fetch_add(1, Ordering::Relaxed);
        }
        let problem = format!(
            "longer than source.max_line_bytes = {} allows",
            batch.max_line
        );
        if !batch.is_again() {
            self.show_line(batch, line, &problem);
        }
    }

    /// A line could not be read.
    pub fn malformed(&mut self, batch: &Batch, line: &[u8], problem: &str, now: Duration) {
        if batch.is_again() {
            return;
        }
        self.suspect(batch, line, problem, now);
        self.show_line(batch, line, problem);
    }

    fn suspect(&mut self, batch: &Batch, line: &[u8], problem: &str, now: Duration) {
        let is_full = self.suspects.len() >= MAX_UNREADABLE;
        if is_full && !self.suspects.contains_key(&batch.log) {
            return;
        }
        let first = || Suspect {
            state: Unreadable {
                // Its name may be anybody's, and is printed on terminals.
                log: batch.log.replace(char::is_control, " "),
                lines: 0,
                first: batch.feed.map(|_| offset(batch, line)),
                problem: problem.chars().take(200).collect(),
            },
            newest: now,
            said: false,
        };
        let suspect = self.suspects.entry(Arc::clone(&batch.log));
        let suspect = suspect.or_insert_with(first);
        suspect.state.lines += 1;
        suspect.newest = now;
    }

    /// Lines of a batch could be read.
    pub fn readable(&mut self, batch: &Batch) {
        if !batch.is_again()
            && let Some(suspect) = self.suspects.remove(&batch.log)
            && suspect.said
        {
            self.recovered.push(suspect.state.log);
        }
    }

    /// What people should be told of logs that they were told of, and that can be read again.
    pub fn recovery(&mut self) -> Option<String> {
        let mut logs = std::mem::take(&mut self.recovered);
        let more = logs.len().saturating_sub(NAMED);
        logs.truncate(NAMED);
        if more > 0 {
            logs.push(format!("{more} more"));
        }
        (!logs.is_empty()).then(|| format!("these lines can be read again: {}", logs.join("; ")))
    }

    /// The logs that cannot be read.
    pub fn unreadable(&self) -> impl Iterator<Item = &Unreadable> {
        let states = self.suspects.values().map(|suspect| &suspect.state);
        states.filter(|state| state.lines >= UNREADABLE)
    }

    /// Shows a line that could not be read, now and then.
    fn show_line(&mut self, batch: &Batch, line: &[u8], problem: &str) {
        let shown: String = String::from_utf8_lossy(line).chars().take(200).collect();
        self.show(batch, offset(batch, line), problem, &shown);
    }

    fn show(&mut self, batch: &Batch, offset: u64, problem: &str, shown: &str) {
        self.unshown += 1;
        let now = clock::boot();
        if self
            .shown
            .is_some_and(|shown| now.saturating_sub(shown) < SHOW_MALFORMED)
        {
            return;
        }
        warn!(
            "{} malformed lines were skipped, the newest one at byte {offset} of {} because it is {problem}: {shown:?}",
            self.unshown, batch.log
        );
        self.shown = Some(now);
        self.unshown = 0;
    }

    /// The lines of a batch are dealt with.
    pub fn done(&mut self, batch: Batch, counters: &Counters) {
        if let Some(offset) = batch.piece.cut.filter(|_| !batch.is_again()) {
            counters.overlong.fetch_add(1, Ordering::Relaxed);
            let problem = format!(
                "longer than source.max_line_bytes = {} allows",
                batch.max_line
            );
            self.show(&batch, offset, &problem, "");
        }
        if let Some(progress) = batch.progress {
            self.progress.insert(progress.log.clone(), progress);
        }
        self.is_new = true;
    }

    /// What is to be saved, if there is something new and the last was long enough ago.
    pub fn checkpoint(&mut self, now: Duration, least: Duration) -> Option<Checkpoint> {
        if !self.is_new || now.saturating_sub(self.saved) < least {
            return None;
        }
        self.is_new = false;
        self.saved = now;
        Some(Checkpoint {
            logs: self.progress.values().cloned().collect(),
            patterns: self.patterns.clone(),
            lines: self.lines,
        })
    }

    /// What people should be told of logs that cannot be read, once of each until it can.
    pub fn complaint(&mut self, now: Duration) -> Option<String> {
        self.suspects
            .retain(|_, suspect| now.saturating_sub(suspect.newest) < FORGET);
        if self
            .said_unreadable
            .is_some_and(|said| now.saturating_sub(said) < SAY_UNREADABLE)
        {
            return None;
        }
        let mut new: Vec<String> = Vec::new();
        for suspect in self.suspects.values_mut() {
            if suspect.state.lines >= UNREADABLE && !suspect.said {
                suspect.said = true;
                new.push(suspect.state.to_string());
            }
        }
        let more = new.len().saturating_sub(NAMED);
        new.truncate(NAMED);
        if more > 0 {
            new.push(format!("so it is with {more} more"));
        }
        if new.is_empty() {
            return None;
        }
        self.said_unreadable = Some(now);
        Some(format!(
            "nobody is watched by these lines: {}",
            new.join("; ")
        ))
    }

    /// What people should be told of the reading's pace, if that has changed.
    pub fn news(&mut self, counters: &Counters, now: Duration) -> Option<String> {
        let (behind, one_in) = (counters.behind(now), counters.one_in());
        let lags = behind > LATE || one_in > 1;
        match (self.behind, lags) {
            (None, true) => {
                self.behind = Some(now);
                let lag = counters.lag.load(Ordering::Relaxed) / 1024 / 1024;
                let sample = if one_in > 1 {
                    format!("; of {one_in} lines one is read, at random, and stands for the others")
                } else {
                    String::new()
                };
                Some(format!(
                    "more is logged than can be read: {lag} MiB are not read yet, {} s behind{sample}",
                    behind.as_secs()
                ))
            }
            (Some(_), true) => {
                self.behind = Some(now);
                None
            }
            (Some(last), false) if now.saturating_sub(last) >= CALM => {
                self.behind = None;
                Some("the reading of the log has caught up; every line is read".to_owned())
            }
            _ => None,
        }
    }
}

/// Where a line of a batch begins in its file.
fn offset(batch: &Batch, line: &[u8]) -> u64 {
    let within = line.as_ptr().addr() - batch.piece.bytes.as_ptr().addr();
    batch.piece.start + within as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::Config, source::Piece};

    const LOG: &str = "/var/log/nginx/a.json";
    const SYSLOG: &str = "udp:127.0.0.1:5514";
    const START: Duration = Duration::from_secs(100);

    fn reading() -> Reading {
        Reading::new(&Config::default().source, None, Vec::new())
    }

    fn batch(log: &str, lines: usize) -> Batch {
        Batch {
            log: log.into(),
            piece: Piece {
                bytes: b"what\n".repeat(lines),
                start: 1000,
                ..Piece::default()
            },
            max_line: 100,
            feed: log.starts_with('/').then(Feed::default),
            caught_up: false,
            progress: None,
            read: START,
        }
    }

    /// None of so many lines can be read.
    fn fail(reading: &mut Reading, batch: &Batch, now: Duration) {
        for (_, line) in batch.piece.lines() {
            reading.malformed(batch, line, "no JSON", now);
        }
    }

    #[test]
    fn lines_are_taken_with_their_places_in_the_file() {
        let batch = batch(LOG, 3);
        let (mut reading, mut lines) = (reading(), batch.piece.lines());
        let taken = reading.take(&batch, &mut lines, &Counters::default());
        let places = taken.iter().map(|line| (line.text, line.offset));
        let places: Vec<_> = places.collect();
        assert_eq!(
            places,
            [(&b"what"[..], 1000), (b"what", 1005), (b"what", 1010)]
        );
    }

    #[test]
    fn a_log_of_malformed_lines_only_is_said_once_until_one_can_be_read() {
        let mut reading = reading();
        let most = batch(LOG, 19);
        fail(&mut reading, &most, START);
        assert_eq!(reading.complaint(START), None);
        assert_eq!(reading.unreadable().count(), 0);
        fail(&mut reading, &batch(LOG, 2), START);
        let said = reading.complaint(START).unwrap();
        for expected in [
            "the newest 21 lines of /var/log/nginx/a.json",
            "at byte 1000, is no JSON",
            "`portcullis lines /var/log/nginx/a.json`",
        ] {
            assert!(said.contains(expected), "{expected}: {said}");
        }
        let later = START + SAY_UNREADABLE;
        fail(&mut reading, &most, later);
        assert_eq!(reading.complaint(later), None, "it has been said");
        assert_eq!(reading.unreadable().next().unwrap().lines, 40);

        assert_eq!(reading.recovery(), None);
        reading.readable(&most);
        assert_eq!(reading.unreadable().count(), 0);
        let said = reading.recovery().unwrap();
        assert_eq!(said, "these lines can be read again: /var/log/nginx/a.json");
        reading.readable(&most);
        assert_eq!(reading.recovery(), None, "once");
        fail(&mut reading, &most, later);
        assert_eq!(reading.complaint(later), None, "not enough again");
        fail(&mut reading, &most, later);
        assert!(reading.complaint(later).is_some());
    }

    #[test]
    fn logs_are_told_apart_and_said_together_now_and_then() {
        let mut reading = reading();
        for log in [LOG, SYSLOG] {
            fail(&mut reading, &batch(log, 15), START);
        }
        assert_eq!(reading.complaint(START), None);
        fail(&mut reading, &batch(LOG, 5), START);
        assert!(!reading.complaint(START).unwrap().contains(SYSLOG));
        for log in [SYSLOG, "/1", "/2", "/3", "/4", "/5"] {
            fail(&mut reading, &batch(log, 20), START);
        }
        assert_eq!(reading.complaint(START), None, "not that often");
        let said = reading.complaint(START + SAY_UNREADABLE).unwrap();
        assert!(
            !said.contains(LOG) && said.contains("lines of /5"),
            "{said}"
        );
        assert!(said.ends_with("so it is with 1 more"), "{said}");
        let by_syslog = reading.unreadable().last().unwrap();
        assert_eq!((by_syslog.first, by_syslog.lines), (None, 35));
        assert!(!by_syslog.to_string().contains("byte"), "{by_syslog}");
    }

    #[test]
    fn what_is_read_again_after_a_restart_says_nothing() {
        let mut reading = reading();
        let mut again = batch(LOG, 30);
        again.piece.again = true;
        fail(&mut reading, &again, START);
        assert_eq!(reading.complaint(START), None);
        fail(&mut reading, &batch(LOG, 30), START);
        reading.readable(&again);
        assert!(reading.complaint(START).is_some());
    }

    #[test]
    fn as_many_are_known_as_there_is_room_for_and_silent_ones_are_forgotten() {
        let mut reading = reading();
        for log in 0..MAX_UNREADABLE + 10 {
            fail(&mut reading, &batch(&format!("/{log}"), 20), START);
        }
        assert_eq!(reading.unreadable().count(), MAX_UNREADABLE);
        let end = START + FORGET;
        fail(&mut reading, &batch("/0", 1), end);
        assert!(reading.complaint(end).is_some());
        assert_eq!(reading.unreadable().count(), 1);
    }
}
