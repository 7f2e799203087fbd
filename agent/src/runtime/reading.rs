//! What the loop knows of the lines that come in: how far they have been dealt with, which of them are left out, and when to say
//! so.

use std::{collections::BTreeMap, path::PathBuf, sync::atomic::Ordering, time::Duration};

use portcullis_engine::Feed;
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
/// Decisions that are later than this are said to be.
const LATE: Duration = Duration::from_secs(10);
/// Reading has caught up when it has been up to date, and read every line, for so long.
const CALM: Duration = Duration::from_secs(30);

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
    ) -> Vec<&'a [u8]> {
        let one_in = batch.feed.map_or(1, |feed| feed.one_in);
        let mut taken = Vec::with_capacity(GROUP);
        for (_, line) in lines {
            self.lines += u64::from(!batch.is_again());
            if line.len() > batch.max_line {
                self.overlong(batch, line, counters);
            } else if one_in <= 1 || self.random.u32(..one_in) == 0 {
                taken.push(line);
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
        self.malformed(batch, line, &problem);
    }

    /// Shows a line that could not be read, now and then.
    pub fn malformed(&mut self, batch: &Batch, line: &[u8], problem: &str) {
        if batch.is_again() {
            return;
        }
        let within = line.as_ptr().addr() - batch.piece.bytes.as_ptr().addr();
        let shown: String = String::from_utf8_lossy(line).chars().take(200).collect();
        self.show(batch, batch.piece.start + within as u64, problem, &shown);
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
