//! A replay: the engine over logs that were written, at the time that their lines have. Says what the agent would have done.
//!
//! Needs no rights but to read the files, and changes nothing. The same logs and settings always give the same answer.

mod guard;
mod input;
pub mod learn;
mod merge;
pub mod report;
mod tally;

use std::{collections::HashMap, io, path::PathBuf};

use anyhow::Result;
use portcullis_engine::{
    Command, Engine, Event, Saved, Settings, Subject, Timestamp,
    command::Action,
    parse::{Format, Record},
};

pub use self::tally::{Clients, Summary, Times};
use self::{input::Reading, merge::Merge, report::Report, tally::Tally};

/// What is to be replayed.
#[derive(Debug)]
pub struct Plan {
    /// The logs, plain or packed; `-` is standard input.
    pub files: Vec<PathBuf>,
    /// How their lines are written.
    pub format: Format,
    /// Longer lines are skipped and counted.
    pub max_line: usize,
    /// What the engine goes by.
    pub settings: Settings,
}

/// Who is told of what is found, while it is found.
pub trait Audience {
    /// A decision: a ban and its end, a refusal, an alarm and its end, a notice. Their times never go back.
    ///
    /// # Errors
    /// Ends the replay, with this error.
    fn event(&mut self, event: &Event) -> io::Result<()>;

    /// Something that is wrong with the logs, in words.
    fn note(&mut self, words: &str);

    /// So many bytes of the logs have been read, of so many where that is known.
    fn progress(&mut self, read: u64, of: Option<u64>);
}

/// So many records are handed on at a time.
const GROUP: usize = 256;

/// Replays. What could not be read is in the summary, after all that could.
///
/// # Errors
/// That of the audience.
pub fn run(
    plan: &Plan,
    mut report: Option<&mut Report>,
    audience: &mut impl Audience,
) -> Result<Summary> {
    let reading = Reading {
        format: plan.format.clone(),
        max_line: plan.max_line,
    };
    let mut merge = Merge::open(&plan.files, reading);
    let mut replay = Replay::default();
    let size = merge.size();
    let mut group = Group::default();
    let mut engine = None;
    while let Some(begin) = merge.peek() {
        // The report looks at the engine once in each of its stretches of time.
        let stretch = |at: Timestamp| report.as_ref().map(|report| report.stretch(at));
        let first = stretch(begin);
        while group.records.len() < GROUP
            && let Some(at) = merge.peek()
            && stretch(at) == first
        {
            group.take(&mut merge);
        }
        let engine = engine
            .get_or_insert_with(|| Engine::new(plan.settings.clone(), Saved::default(), begin));
        group.replay(engine, &merge);
        replay.tally.add(&group.records);
        replay.drain(engine, report.as_deref_mut(), audience)?;
        if let Some(report) = report.as_deref_mut() {
            report.add(&group.records, &engine.snapshot());
        }
        group.clear();
        merge.notes().iter().for_each(|words| audience.note(words));
        audience.progress(merge.read(), size);
    }
    merge.notes().iter().for_each(|words| audience.note(words));
    let mut end = None;
    if let (Some(mut engine), Some(last)) = (engine, replay.tally.last) {
        engine.pass_until(last);
        replay.drain(&mut engine, report, audience)?;
        end = Some(engine.snapshot());
    }
    Ok(replay.tally.summary(&merge, end.as_ref()))
}

/// Records that are handed on together, and which log each is of.
#[derive(Default)]
struct Group {
    records: Vec<Record>,
    logs: Vec<usize>,
}

impl Group {
    /// The line that was peeked at.
    fn take(&mut self, merge: &mut Merge) {
        if let Some((log, record)) = merge.pop() {
            self.logs.push(log);
            self.records.push(record);
        }
    }

    /// One log after the other, since evidence names them.
    fn replay(&self, engine: &mut Engine, merge: &Merge) {
        let mut rest = &self.records[..];
        for run in self.logs.chunk_by(|a, b| a == b) {
            if let Some(name) = run.first().and_then(|log| merge.name(*log)) {
                engine.log(name);
            }
            let (records, more) = rest.split_at(run.len());
            engine.replay(records);
            rest = more;
        }
    }

    fn clear(&mut self) {
        self.records.clear();
        self.logs.clear();
    }
}

/// What is known of a replay while it goes on.
#[derive(Default)]
struct Replay {
    tally: Tally,
    /// Since when each ban stands: one that is only put in force somewhere else, too, is no new one.
    standing: HashMap<Subject, Timestamp, foldhash::fast::RandomState>,
    /// The time of the last event.
    told: Timestamp,
}

impl Replay {
    fn drain(
        &mut self,
        engine: &mut Engine,
        mut report: Option<&mut Report>,
        audience: &mut impl Audience,
    ) -> io::Result<()> {
        while let Some(command) = engine.next_command() {
            let Some(mut event) = self.event(command) else {
                continue;
            };
            // Some are of the second and others of its thousandth.
            event.time = event.time.max(self.told);
            self.told = event.time;
            self.tally.event(&event);
            if let Some(report) = report.as_deref_mut() {
                report.event(&event);
            }
            audience.event(&event)?;
        }
        Ok(())
    }

    /// What people are told of a command, as if it had been carried out at once.
    fn event(&mut self, command: Command) -> Option<Event> {
        match command {
            Command::Ban(ban) => {
                let known = self.standing.insert(ban.subject, ban.since);
                let event = Event::of_ban(ban.since, Action::Ban, &ban, ban.reason.clone());
                (known != Some(ban.since)).then_some(event)
            }
            Command::Unban(ban, cause, at) => {
                self.standing.remove(&ban.subject);
                Some(Event::of_ban(at, Action::Unban, &ban, cause))
            }
            Command::Record(event) => match event.action {
                Action::Alarm
                | Action::AllClear
                | Action::Hold
                | Action::Resume
                | Action::Refuse
                | Action::Notice => Some(event),
                _ => None,
            },
            // Nobody is kept out, so nobody can be seen to stop; and nobody's name can be asked for as it was then.
            Command::Look(_) | Command::Verify(..) | Command::Allowlist | Command::Save(_) => None,
        }
    }
}

#[cfg(test)]
mod tests;
