//! What a replay comes to.

use std::{cmp::Reverse, collections::HashSet, time::Duration};

use foldhash::fast::RandomState;
use indexmap::IndexMap;
use portcullis_engine::{Event, Snapshot, Subject, Timestamp, command::Action, parse::Record};

use super::merge::Merge;

/// Clients that are told apart; of more it is said that there are more.
const MAX_CLIENTS: usize = 1 << 20;
/// Subjects whose bans are counted one by one.
const MAX_BANNED: usize = 1 << 16;

/// How many clients there were.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clients {
    /// At least so many …
    pub count: usize,
    /// … and no more.
    pub is_exact: bool,
}

/// How often somebody would have been banned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Times {
    /// So often.
    pub bans: u64,
    /// The first time.
    pub first: Timestamp,
    /// The bans together, until the end of the logs.
    pub banned: Duration,
    /// Since when, if at the end of the logs still.
    pub standing: Option<Timestamp>,
}

/// What a replay comes to.
#[derive(Clone, Debug)]
pub struct Summary {
    /// Logs that were read.
    pub files: usize,
    /// Lines read into a record.
    pub lines: u64,
    /// Lines that could not be.
    pub malformed: u64,
    /// Lines that are too long.
    pub overlong: u64,
    /// Lines whose time no other line confirms.
    pub out_of_time: u64,
    /// Lines older than the window when their turn came: they count for nobody.
    pub late: u64,
    /// Those who sent requests.
    pub clients: Clients,
    /// The first and the last time.
    pub period: Option<(Timestamp, Timestamp)>,
    /// Requests of clients while they would have been banned.
    pub from_banned: u64,
    /// Bans.
    pub bans: u64,
    /// Who would have been banned, those first for whom it would have been most often.
    pub banned: Vec<(Subject, Times)>,
    /// There are more.
    pub more_banned: bool,
    /// Bans that were refused: the allowlist, a proxy, a full table.
    pub refusals: u64,
    /// Alarms for the whole site.
    pub alarms: u64,
    /// What could not be read, in words.
    pub problems: Vec<String>,
}

/// Counts what a summary needs.
#[derive(Debug, Default)]
pub(super) struct Tally {
    first: Option<Timestamp>,
    pub(super) last: Option<Timestamp>,
    clients: HashSet<Subject, RandomState>,
    banned: IndexMap<Subject, Times, RandomState>,
    more_banned: bool,
    bans: u64,
    refusals: u64,
    alarms: u64,
}

impl Tally {
    pub(super) fn add(&mut self, records: &[Record]) {
        for record in records {
            self.first = Some(self.first.map_or(record.at, |first| first.min(record.at)));
            self.last = self.last.max(Some(record.at));
            if self.clients.len() <= MAX_CLIENTS {
                self.clients.insert(Subject::of_client(record.client));
            }
        }
    }

    pub(super) fn event(&mut self, event: &Event) {
        match (event.action, event.subject) {
            (Action::Ban, Some(subject)) => {
                self.bans += 1;
                if self.banned.len() >= MAX_BANNED && !self.banned.contains_key(&subject) {
                    self.more_banned = true;
                    return;
                }
                let times = self.banned.entry(subject).or_insert(Times {
                    bans: 0,
                    first: event.time,
                    banned: Duration::ZERO,
                    standing: None,
                });
                times.bans += 1;
                times.standing = Some(event.time);
            }
            (Action::Unban, Some(subject)) => {
                if let Some(times) = self.banned.get_mut(&subject)
                    && let Some(since) = times.standing.take()
                {
                    times.banned += event.time.since(since);
                }
            }
            (Action::Refuse, _) => self.refusals += 1,
            (Action::Alarm, _) => self.alarms += 1,
            _ => {}
        }
    }

    /// `end` is how the engine stood at the end, if there was anything to replay.
    pub(super) fn summary(self, merge: &Merge, end: Option<&Snapshot>) -> Summary {
        let mut banned: Vec<(Subject, Times)> = self.banned.into_iter().collect();
        for (_, times) in &mut banned {
            if let (Some(since), Some(last)) = (times.standing, self.last) {
                times.banned += last.since(since);
            }
        }
        banned.sort_by_key(|(subject, times)| {
            (
                Reverse(times.bans),
                Reverse(times.banned),
                times.first,
                *subject,
            )
        });
        let skipped = merge.skipped();
        Summary {
            files: merge.files(),
            lines: merge.lines(),
            malformed: skipped.malformed,
            overlong: skipped.overlong,
            out_of_time: merge.out_of_time(),
            late: end.map_or(0, |end| end.totals.late),
            clients: Clients {
                count: self.clients.len().min(MAX_CLIENTS),
                is_exact: self.clients.len() <= MAX_CLIENTS,
            },
            period: self.first.zip(self.last),
            from_banned: end.map_or(0, |end| end.totals.from_banned),
            bans: self.bans,
            banned,
            more_banned: self.more_banned,
            refusals: self.refusals,
            alarms: self.alarms,
            problems: merge.problems.clone(),
        }
    }
}
