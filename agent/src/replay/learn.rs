//! Learning from logs that were written: what is normal, and nothing else.
//!
//! Lines newer than what is known already go on where that ended. Older ones may have been learnt before, faded since, and nobody
//! can tell: they teach only hours of the day, and of clients, of which nothing is known at all.

use portcullis_engine::{Command, Engine, Saved, Timestamp, baseline, command::Action};

use super::{Audience, GROUP, Group, Plan, input::Reading, merge::Merge};

/// What has come of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Lesson {
    /// What is known now.
    pub known: baseline::Saved,
    /// Logs that were read.
    pub files: usize,
    /// Lines that taught, newer than what was known.
    pub newer: Taught,
    /// Lines that were older.
    pub older: Taught,
    /// Up to when it was known before.
    pub before: Option<Timestamp>,
    /// Lines of the future, which teach nothing.
    pub future: u64,
    /// Lines that could not be read, in whatever way.
    pub unread: u64,
    /// What could not be read, in words.
    pub problems: Vec<String>,
}

/// Lines that were read, and what they were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taught {
    /// How many.
    pub lines: u64,
    /// The first and the last time.
    pub period: Option<(Timestamp, Timestamp)>,
    /// Clients that were flagged, whose requests teach nothing.
    pub flagged: u64,
    /// Alarms for the whole site.
    pub alarms: u64,
}

/// Windows that pass after the last line, for the clients in them to be learnt from.
const REST: u64 = 12;

/// Learns from logs up to `now`, beside what is known.
pub fn learn(
    plan: &Plan,
    known: Option<baseline::Saved>,
    now: Timestamp,
    audience: &mut impl Audience,
) -> Lesson {
    let reading = Reading {
        format: plan.format.clone(),
        max_line: plan.max_line,
    };
    let mut merge = Merge::open(&plan.files, reading);
    let mut known = known.unwrap_or_default();
    let before = known.newest();
    let mut pass = Pass {
        plan,
        size: merge.size(),
        future: 0,
        now,
    };
    let mut older = Taught::default();
    if let Some(newest) = before {
        let is_older = |at: Timestamp| at.secs() <= newest;
        if let Some((learnt, taught)) = pass.learn(&mut merge, None, is_older, audience) {
            known.fill(&learnt);
            older = taught;
        }
    }
    let (known, newer) = pass
        .learn(&mut merge, Some(&known), |_| true, audience)
        .unwrap_or((known, Taught::default()));
    let skipped = merge.skipped();
    Lesson {
        known,
        files: merge.files(),
        newer,
        older,
        before: before.map(Timestamp::from_secs),
        future: pass.future,
        unread: skipped.malformed + skipped.overlong + merge.out_of_time(),
        problems: merge.problems.clone(),
    }
}

struct Pass<'a> {
    plan: &'a Plan,
    size: Option<u64>,
    future: u64,
    now: Timestamp,
}

impl Pass<'_> {
    /// An engine that reads the next lines, as long as they are wanted; none if there are none.
    fn learn(
        &mut self,
        merge: &mut Merge,
        known: Option<&baseline::Saved>,
        is_wanted: impl Fn(Timestamp) -> bool,
        audience: &mut impl Audience,
    ) -> Option<(baseline::Saved, Taught)> {
        let mut engine: Option<Engine> = None;
        let mut taught = Taught::default();
        let mut group = Group::default();
        while let Some(begin) = merge.peek().filter(|at| is_wanted(*at)) {
            while group.records.len() < GROUP
                && let Some(at) = merge.peek()
                && is_wanted(at)
            {
                if at > self.now {
                    // A clock was ahead. So are all that follow, in the order of times.
                    self.future += 1;
                    merge.pop();
                } else {
                    group.take(merge);
                }
            }
            merge.notes().iter().for_each(|words| audience.note(words));
            audience.progress(merge.read(), self.size);
            let (Some(first), Some(last)) = (group.records.first(), group.records.last()) else {
                continue;
            };
            let (first, newest) = taught.period.unwrap_or((first.at, last.at));
            taught.period = Some((first, newest.max(last.at)));
            taught.lines += group.records.len() as u64;
            let engine = engine.get_or_insert_with(|| {
                let saved = Saved {
                    baseline: known.cloned(),
                    ..Saved::default()
                };
                Engine::new(self.plan.settings.clone(), saved, begin)
            });
            group.replay(engine, merge);
            group.clear();
            taught.drain(engine);
        }
        let (Some(mut engine), Some((_, last))) = (engine, taught.period) else {
            return None;
        };
        // What is in the windows is learnt when it leaves them; silence teaches nothing.
        let window = u64::from(self.plan.settings.detect.window_secs);
        engine.pass_until(Timestamp::from_secs(last.secs() + REST * window));
        taught.drain(&mut engine);
        Some((engine.saved_baseline(), taught))
    }
}

impl Taught {
    /// No ban, offence or record comes of it.
    fn drain(&mut self, engine: &mut Engine) {
        while let Some(command) = engine.next_command() {
            match command {
                Command::Ban(_) => self.flagged += 1,
                Command::Record(event) if event.action == Action::Alarm => self.alarms += 1,
                _ => {}
            }
        }
    }
}
