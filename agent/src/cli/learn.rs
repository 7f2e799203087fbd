//! `portcullis learn`: what is learnt of logs, kept, and printed.

use std::{fmt::Write as _, io, path::Path, time::Duration};

use anyhow::{Result, ensure};
use portcullis_engine::{
    Event, Timestamp, baseline, command::Change, explain::spans, time::format_duration,
};

use super::replay::{Printer, plural};
use crate::{
    replay::{
        Audience, Plan,
        learn::{self, Lesson},
    },
    runtime::clock,
    store::Store,
};

/// How long the disk may take.
const SETTLE: Duration = Duration::from_secs(30);

/// Learns, keeps what was learnt in the store, and says what that is.
///
/// # Errors
/// When a log cannot be read, or no line of any: then nothing is kept. Or when the disk fails.
pub(super) fn learn(
    plan: &Plan,
    known: Option<baseline::Saved>,
    store: &Store,
    folder: &Path,
) -> Result<String> {
    let mut quiet = Quiet(Printer::new(io::sink(), true));
    let lesson = learn::learn(plan, known, clock::wall(), &mut quiet);
    quiet.0.clear();
    let mut problems = lesson.problems.clone();
    if problems.is_empty() && lesson.newer.lines + lesson.older.lines == 0 {
        problems.push(match (lesson.unread, lesson.future) {
            (0, 0) => "there is no line to learn from: the logs are empty".to_owned(),
            (0, future) => format!("{} of the future, and no other: is the clock right?", plural(future, "line")),
            (unread, _) => format!(
                "none of {} can be read; are they in another format (--format)? `portcullis lines FILE` shows what is in one",
                plural(unread, "line")
            ),
        });
    }
    ensure!(
        problems.is_empty(),
        "{}\nnothing of these logs was kept",
        problems.join("\n")
    );
    store.save(&Change::Baseline(Box::new(lesson.known.clone())));
    ensure!(
        store.settle(SETTLE),
        "{} cannot be written: nothing was kept",
        folder.display()
    );
    Ok(summary(plan, &lesson, folder))
}

/// Only how far it is and what is wrong is told while it goes on.
struct Quiet(Printer<io::Sink>);

impl Audience for Quiet {
    fn event(&mut self, _event: &Event) -> io::Result<()> {
        Ok(())
    }

    fn note(&mut self, words: &str) {
        self.0.note(words);
    }

    fn progress(&mut self, read: u64, of: Option<u64>) {
        self.0.progress(read, of);
    }
}

fn summary(plan: &Plan, lesson: &Lesson, folder: &Path) -> String {
    let Lesson { newer, older, .. } = lesson;
    let mut out = String::new();
    let mut say = |words: String| {
        let _ = writeln!(out, "{words}");
    };
    let of_both = [older.period, newer.period];
    let periods = || of_both.iter().flatten();
    let first = periods().map(|(first, _)| *first).min();
    let last = periods().map(|(_, last)| *last).max();
    if let (Some(first), Some(last)) = (first, last) {
        say(format!(
            "read: {}, {}, from {first} to {last} ({})",
            plural(lesson.files as u64, "file"),
            plural(older.lines + newer.lines, "line"),
            format_duration(last.since(first))
        ));
    }
    if lesson.unread + lesson.future > 0 {
        say(format!(
            "left out: {} that cannot be read, {} of the future",
            plural(lesson.unread, "line"),
            lesson.future
        ));
    }
    if let Some(before) = lesson.before {
        say(format!(
            "known before: up to {before}; {} newer. {} older: since those may have been learnt already, they taught only hours \
             (and, if none was known, clients) of which nothing was known",
            verb(newer.lines),
            verb(older.lines)
        ));
    }
    say(format!(
        "what taught nothing: {}, {} for the whole site",
        plural(older.flagged + newer.flagged, "ban"),
        plural(older.alarms + newer.alarms, "alarm")
    ));
    say("known now, by hour of the day (UTC), requests a second:".to_owned());
    say("  hour    mean  stddev  from".to_owned());
    let least = f64::from(plan.settings.baseline.hour_min_secs);
    for hour in lesson.known.hours() {
        let length = seconds(hour.seconds);
        let few = if hour.seconds < least {
            format!(" (not used before it is {})", seconds(least))
        } else {
            String::new()
        };
        say(format!(
            "  {:>4} {:>7.2} {:>7.2}  {length}{few}",
            hour.hour, hour.mean, hour.stddev
        ));
    }
    if let (Some(newest), rolling @ 1..) = (lesson.known.newest(), lesson.known.rolling()) {
        let span = Duration::from_secs(plan.settings.baseline.span_secs.into());
        let newest = Timestamp::from_secs(newest);
        say(format!(
            "the recent past: {} up to {newest}; it counts for a start before {}",
            seconds(rolling as f64),
            newest + span
        ));
    }
    let detect = &plan.settings.detect;
    let caps: Vec<String> = spans(detect)
        .iter()
        .zip(lesson.known.caps())
        .map(|(secs, cap)| format!("{cap:.0} in {}", seconds(f64::from(*secs))))
        .collect();
    if !caps.is_empty() {
        say(format!(
            "one client may do, in full requests: {}",
            caps.join(", ")
        ));
    }
    say(format!(
        "kept in {}: the next start of the agent begins with it",
        folder.display()
    ));
    out
}

fn verb(lines: u64) -> String {
    match lines {
        1 => "1 line is".to_owned(),
        lines => format!("{lines} lines are"),
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "seconds of a few days"
)]
fn seconds(seconds: f64) -> String {
    format_duration(Duration::from_secs(seconds as u64))
}
