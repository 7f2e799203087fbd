//! `portcullis replay`: what is printed of one.

use std::{
    io::{self, IsTerminal as _, Write},
    time::Duration,
};

use anyhow::{Result, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use portcullis_engine::{Event, Term, Timestamp, command::Action, time::format_duration};
use serde::Serialize;

use crate::{
    replay::{self, Audience, Plan, Summary, report::Report},
    runtime::clock,
};

/// Those who would have been banned, in the summary.
const SHOWN: usize = 10;
/// Work that takes less needs no bar.
const PATIENCE: Duration = Duration::from_secs(1);

/// Replays and prints. Without `json`, a summary follows the decisions.
///
/// # Errors
/// When a log cannot be read, or no line of any, after what could be read is out; or when it cannot be printed.
pub(super) fn print(
    plan: &Plan,
    mut report: Option<&mut Report>,
    json: bool,
    out: impl Write,
) -> Result<()> {
    let mut printer = Printer::new(out, json);
    let summary = replay::run(plan, report.as_deref_mut(), &mut printer)?;
    printer.finish(&summary)?;
    let mut problems = summary.problems.clone();
    if summary.lines > 0 {
        if let Some(report) = report {
            report.write(&summary)?;
        }
    } else if summary.malformed + summary.overlong > 0 {
        problems.push(format!(
            "none of {} can be read; are they in another format (--format)? `portcullis lines FILE` shows what is in one",
            plural(summary.malformed + summary.overlong, "line")
        ));
    } else if problems.is_empty() {
        problems.push("there is no line to replay: the logs are empty".to_owned());
    }
    ensure!(problems.is_empty(), "{}", problems.join("\n"));
    Ok(())
}

/// Prints decisions to `out`, and how far it is to standard error.
pub(super) struct Printer<W> {
    out: W,
    json: bool,
    begun: Duration,
    is_terminal: bool,
    bar: Option<ProgressBar>,
}

impl<W: Write> Printer<W> {
    pub(super) fn new(out: W, json: bool) -> Self {
        Self {
            out,
            json,
            begun: clock::boot(),
            is_terminal: io::stderr().is_terminal(),
            bar: None,
        }
    }

    /// Ends the bar.
    pub(super) fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    /// Ends the bar, prints the summary where people read, and hands on what was printed.
    fn finish(&mut self, summary: &Summary) -> io::Result<()> {
        self.clear();
        if !self.json {
            write_summary(summary, &mut self.out)?;
        }
        self.out.flush()
    }
}

impl<W: Write> Audience for Printer<W> {
    fn event(&mut self, event: &Event) -> io::Result<()> {
        let line = if self.json {
            let Some(row) = Row::of(event) else {
                return Ok(());
            };
            serde_json::to_string(&row)?
        } else {
            event.line(false)
        };
        let out = &mut self.out;
        match &self.bar {
            // Both may be on the same screen.
            Some(bar) => bar.suspend(|| {
                writeln!(out, "{line}")?;
                out.flush()
            }),
            None => writeln!(out, "{line}"),
        }
    }

    fn note(&mut self, words: &str) {
        let say = || eprintln!("portcullis: {words}");
        match &self.bar {
            Some(bar) => bar.suspend(say),
            None => say(),
        }
    }

    fn progress(&mut self, read: u64, of: Option<u64>) {
        if !self.is_terminal {
            return;
        }
        if self.bar.is_none() {
            let elapsed = clock::boot().saturating_sub(self.begun);
            if elapsed < PATIENCE {
                return;
            }
            // The rate shown is that from now on.
            let bar = bar(of).with_elapsed(elapsed).with_position(read);
            bar.reset_eta();
            self.bar = Some(bar);
        }
        if let Some(bar) = &self.bar {
            bar.set_position(read);
        }
    }
}

fn bar(of: Option<u64>) -> ProgressBar {
    let (bar, template) = match of {
        Some(of) => (
            ProgressBar::new(of),
            "{bar:40} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left",
        ),
        None => (
            ProgressBar::new_spinner(),
            "{spinner} {bytes}, {bytes_per_sec}",
        ),
    };
    // A template that does not hold leaves the plain one.
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

/// A decision, for programs.
#[derive(Serialize)]
struct Row {
    time: f64,
    action: &'static str,
    subject: String,
    tier: Option<u32>,
    until: Option<f64>,
    reasons: [String; 1],
    rate: Option<f64>,
    mean: Option<f64>,
    stddev: Option<f64>,
    score: Option<f64>,
}

/// Epoch seconds.
fn seconds(at: Timestamp) -> f64 {
    at.millis() as f64 / 1000.0
}

impl Row {
    fn of(event: &Event) -> Option<Self> {
        let action = match event.action {
            Action::Ban => "ban",
            Action::Unban => "unban",
            Action::Alarm | Action::Refuse => "alert",
            _ => return None,
        };
        let until = match (event.action, event.term) {
            (Action::Ban, Some(Term::Until(end))) => Some(seconds(end)),
            _ => None,
        };
        // The evidence is that of the ban, not of its end.
        let finding = event
            .finding
            .as_ref()
            .filter(|_| event.action != Action::Unban);
        Some(Self {
            time: seconds(event.time),
            action,
            subject: event
                .subject
                .map_or_else(|| "site".to_owned(), |subject| subject.to_string()),
            tier: event.tier,
            until,
            reasons: [event.condition.clone()],
            rate: finding.map(|finding| finding.rate),
            mean: finding.map(|finding| finding.mean),
            stddev: finding.map(|finding| finding.stddev),
            score: finding.map(|finding| finding.score),
        })
    }
}

pub(super) fn plural(count: u64, one: &str) -> String {
    match count {
        1 => format!("1 {one}"),
        count => format!("{count} {one}s"),
    }
}

fn write_summary(summary: &Summary, out: &mut impl Write) -> io::Result<()> {
    let Some((first, last)) = summary.period else {
        return Ok(());
    };
    let over = if summary.clients.is_exact {
        ""
    } else {
        "over "
    };
    writeln!(
        out,
        "\nread: {}, {} of {over}{}, from {first} to {last} ({})",
        plural(summary.files as u64, "file"),
        plural(summary.lines, "line"),
        plural(summary.clients.count as u64, "client"),
        format_duration(last.since(first))
    )?;
    let skipped = [
        (summary.malformed, "malformed"),
        (summary.overlong, "too long (source.max_line_bytes)"),
        (
            summary.out_of_time,
            "out of time (none beside them is of that time)",
        ),
        (
            summary.late,
            "too late (older than the window when their turn came)",
        ),
    ];
    let skipped: Vec<String> = skipped
        .iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, what)| format!("{count} {what}"))
        .collect();
    if !skipped.is_empty() {
        writeln!(out, "left out: {}", skipped.join(", "))?;
    }
    write_banned(summary, out)?;
    writeln!(
        out,
        "alarms for the whole site: {}; bans refused (allowlist, proxy, full table): {}",
        summary.alarms, summary.refusals
    )?;
    let share = summary.from_banned as f64 / summary.lines.max(1) as f64 * 100.0;
    writeln!(
        out,
        "requests by clients while they would have been banned: {} ({share:.1} % of all)",
        summary.from_banned
    )
}

fn write_banned(summary: &Summary, out: &mut impl Write) -> io::Result<()> {
    let over = if summary.more_banned { "over " } else { "" };
    let (bans, subjects) = (summary.bans, summary.banned.len() as u64);
    if bans == 0 {
        return writeln!(out, "nobody would have been banned");
    }
    let colon = if subjects == 0 { "" } else { ":" };
    writeln!(
        out,
        "would have been banned: {over}{}, {} in all{colon}",
        plural(subjects, "client"),
        plural(bans, "ban")
    )?;
    for (subject, times) in summary.banned.iter().take(SHOWN) {
        let often = match times.bans {
            1 => "once".to_owned(),
            2 => "twice".to_owned(),
            times => format!("{times} times"),
        };
        let standing = if times.standing.is_some() {
            ", and still at the end"
        } else {
            ""
        };
        writeln!(
            out,
            "  {subject} {often}, first at {}, for {} together{standing}",
            times.first,
            format_duration(times.banned)
        )?;
    }
    match subjects.saturating_sub(SHOWN as u64) {
        0 => Ok(()),
        more => writeln!(out, "  and {over}{more} more"),
    }
}
