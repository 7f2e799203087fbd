//! A page that shows a replay: one file that needs no other, no network and no script.
//!
//! What is kept for it is bounded, however long the logs are.

mod bins;
mod page;
mod series;
mod svg;

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};
use indexmap::IndexMap;
use portcullis_engine::{
    Event, Snapshot, Subject, Timestamp, baseline::Learnt, command::Action, ledger::Term,
    parse::Record,
};

use self::{bins::Bins, series::Series};
use super::Summary;

/// Banned subjects that have a row on the time line, and bars in one.
const MAX_ROWS: usize = 100;
const MAX_BARS: usize = 200;
/// Decisions that stand in the table.
const MAX_EVENTS: usize = 500;
/// Alarms that are marked.
const MAX_ALARMS: usize = 200;

/// All that the page tells besides the replay itself.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Names of the logs.
    pub files: Vec<String>,
    /// Keys that are not what they are by default.
    pub differing: Vec<(String, String)>,
    /// Standard deviations above the mean at which the band of what is normal ends.
    pub z_score: f64,
}

/// Traffic in one stretch of time.
#[derive(Clone, Copy, Debug, Default)]
struct Traffic {
    requests: u64,
    /// Those of clients while they would have been banned.
    banned: u64,
    /// Requests in the busiest second.
    peak: u64,
    /// Mean and standard deviation, once there are any.
    normal: Option<(f64, f64)>,
}

impl bins::Bin for Traffic {
    fn merge(&mut self, later: Self) {
        self.requests += later.requests;
        self.banned += later.banned;
        self.peak = self.peak.max(later.peak);
        self.normal = later.normal.or(self.normal);
    }
}

/// One ban.
#[derive(Clone, Debug)]
struct Bar {
    since: Timestamp,
    /// `None`: it stood at the end.
    until: Option<Timestamp>,
    tier: u32,
    term: Option<Term>,
    reason: String,
}

/// Collects what the page shows.
#[derive(Debug)]
pub struct Report {
    path: PathBuf,
    facts: Facts,
    traffic: Bins<Traffic>,
    clients: Series,
    rows: IndexMap<Subject, Vec<Bar>>,
    more_rows: bool,
    events: Vec<Event>,
    /// Decisions, those included that are not in the table.
    decisions: u64,
    alarms: Vec<(Timestamp, Option<Timestamp>)>,
    /// The second that is being counted, and its requests.
    second: (u64, u64),
    from_banned: u64,
}

impl Report {
    /// A report that will be written there. That it can be is seen to before the work begins.
    ///
    /// # Errors
    /// When it cannot be written, or what is there is no report.
    pub fn new(path: &Path, facts: Facts) -> Result<Self> {
        let shown = path.display();
        ensure!(
            path != Path::new("-"),
            "a report is not written to standard output: name a file (--report out.html)"
        );
        if let Ok(metadata) = fs::metadata(path) {
            ensure!(
                metadata.is_file(),
                "{shown} is no file: name one for the report"
            );
            ensure!(
                metadata.len() == 0 || is_report(path)?,
                "{shown} is there and is no report, so it is not overwritten: name another file for the report"
            );
        }
        let beside = beside(path);
        File::create(&beside).with_context(|| format!("cannot write a report to {shown}"))?;
        fs::remove_file(&beside).with_context(|| format!("cannot write a report to {shown}"))?;
        Ok(Self {
            path: path.to_owned(),
            facts,
            traffic: Bins::default(),
            clients: Series::default(),
            rows: IndexMap::new(),
            more_rows: false,
            events: Vec::new(),
            decisions: 0,
            alarms: Vec::new(),
            second: (0, 0),
            from_banned: 0,
        })
    }

    /// Which stretch of time a moment is in; the engine is to be looked at once in each.
    pub(super) fn stretch(&self, at: Timestamp) -> u64 {
        at.secs() / self.traffic.width()
    }

    /// Records of one stretch of time, and how the engine stood after them.
    pub(super) fn add(&mut self, records: &[Record], after: &Snapshot) {
        for record in records {
            let second = record.at.secs();
            if self.second.0 == second {
                self.second.1 += 1;
            } else {
                self.second = (second, 1);
            }
            let peak = self.second.1;
            let traffic = self.traffic.at(second);
            traffic.requests += 1;
            traffic.peak = traffic.peak.max(peak);
            let (place, width) = (self.traffic.place(second), self.traffic.width());
            self.clients
                .add(Subject::of_client(record.client), place, width);
        }
        let Some(last) = records.last() else { return };
        let traffic = self.traffic.at(last.at.secs());
        traffic.banned += after.totals.from_banned - self.from_banned;
        self.from_banned = after.totals.from_banned;
        let normal = after.normal;
        traffic.normal = (normal.learnt != Learnt::WarmUp).then_some((normal.mean, normal.stddev));
    }

    /// A decision.
    pub(super) fn event(&mut self, event: &Event) {
        match (event.action, event.subject) {
            (Action::Ban, Some(subject)) => self.banned(subject, event),
            (Action::Unban, Some(subject)) => {
                let bar = self.rows.get_mut(&subject).and_then(|bars| bars.last_mut());
                if let Some(bar) = bar.filter(|bar| bar.until.is_none()) {
                    bar.until = Some(event.time);
                }
            }
            (Action::Alarm, _) if self.alarms.len() < MAX_ALARMS => {
                self.alarms.push((event.time, None));
            }
            (Action::AllClear, _) => {
                if let Some((_, end @ None)) = self.alarms.last_mut() {
                    *end = Some(event.time);
                }
            }
            _ => {}
        }
        if matches!(event.action, Action::Unban | Action::AllClear) {
            return;
        }
        self.decisions += 1;
        if self.events.len() < MAX_EVENTS {
            self.events.push(event.clone());
        }
    }

    fn banned(&mut self, subject: Subject, event: &Event) {
        if self.rows.len() >= MAX_ROWS && !self.rows.contains_key(&subject) {
            self.more_rows = true;
            return;
        }
        let bars = self.rows.entry(subject).or_default();
        if bars.len() < MAX_BARS {
            bars.push(Bar {
                since: event.time,
                until: None,
                tier: event.tier.unwrap_or(1),
                term: event.term,
                reason: event.condition.clone(),
            });
        }
    }

    /// Writes the page: whole, or not at all.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, summary: &Summary) -> Result<()> {
        let page = page::page(self, summary);
        let beside = beside(&self.path);
        let written = File::create(&beside)
            .and_then(|mut file| {
                file.write_all(page.as_bytes())?;
                file.sync_all()
            })
            .and_then(|()| fs::rename(&beside, &self.path));
        if let Err(error) = written {
            // It may never have come to be.
            drop(fs::remove_file(&beside));
            bail!(
                "cannot write the report to {}: {error}",
                self.path.display()
            );
        }
        Ok(())
    }
}

/// What every report begins with.
const HEAD: &str = "<!doctype html>\n<!-- portcullis replay -->\n";

/// Is a file that is there a report of ours?
fn is_report(path: &Path) -> Result<bool> {
    let mut head = Vec::new();
    File::open(path)
        .and_then(|file| file.take(HEAD.len() as u64).read_to_end(&mut head))
        .with_context(|| format!("cannot read {}", path.display()))?;
    Ok(head == HEAD.as_bytes())
}

/// Where the page is written before it takes its place.
fn beside(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    path.with_file_name(name)
}

#[cfg(test)]
mod tests;
