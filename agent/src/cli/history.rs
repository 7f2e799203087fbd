//! `portcullis history` and `portcullis audit verify`: what is on record, and whether it is as it was written.

use std::{fmt::Write as _, io::Write, path::Path};

use anyhow::{Context as _, Result, ensure};
use portcullis_engine::Subject;

use crate::{
    audit::{
        Recorded,
        files::{self, Lines},
        verify::Report,
    },
    enforce::Mode,
};

/// Prints all lines about a subject, what is around it and what is inside it, oldest first.
///
/// # Errors
/// When there is no history, or it cannot be read.
pub(super) fn print(dir: &Path, subject: Subject, json: bool, out: &mut impl Write) -> Result<()> {
    let parts = files::open_all(dir)
        .with_context(|| format!("cannot read the history in {}", dir.display()))?;
    ensure!(
        !parts.is_empty(),
        "there is no history in {}",
        dir.display()
    );
    let (mut found, mut unreadable) = (0_u64, 0_u64);
    for part in parts {
        let mut lines = Lines::new(part.file);
        while let Some(line) = lines
            .read()
            .with_context(|| format!("cannot read {}", part.path.display()))?
        {
            let recorded = serde_json::from_slice::<Recorded>(line.text);
            let Ok(Recorded { event, mode }) = recorded else {
                // One that is being written will be readable.
                unreadable += u64::from(line.is_ended);
                continue;
            };
            if !event.subject.is_some_and(|of| of.overlaps(subject)) {
                continue;
            }
            found += 1;
            if json {
                out.write_all(line.text)?;
                out.write_all(b"\n")?;
            } else {
                let observed = event.observe || mode == Some(Mode::Observe);
                // It may hold an operator's words; a terminal must not be told what to do by them.
                let line = event.line(observed).replace(char::is_control, " ");
                writeln!(out, "{line}")?;
            }
        }
    }
    if found == 0 && !json {
        writeln!(out, "nothing is on record of {subject}")?;
    }
    if unreadable > 0 {
        eprintln!("{unreadable} lines cannot be read; `portcullis audit verify` says more");
    }
    Ok(())
}

/// What is broken, what is worth knowing, and the sum of it.
pub(super) fn verdict(report: &Report) -> String {
    let mut out = String::new();
    for broken in &report.breaks {
        let _ = writeln!(out, "{broken}");
    }
    if report.more_breaks > 0 {
        let _ = writeln!(out, "and {} more", report.more_breaks);
    }
    for note in &report.notes {
        let _ = writeln!(out, "{note}");
    }
    let breaks = report.breaks.len() as u64 + report.more_breaks;
    let unbroken = if report.is_unbroken() {
        "unbroken".to_owned()
    } else {
        format!("BROKEN in {}", count(breaks, "place"))
    };
    let head = report
        .head
        .map_or_else(|| "none".to_owned(), |head| head.chain.to_string());
    let _ = writeln!(
        out,
        "{} in {}, {unbroken}; head {head}",
        count(report.lines, "line"),
        count(report.files as u64, "file"),
    );
    out
}

fn count(number: u64, what: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {what}{plural}")
}
