//! `portcullis lines`: does the agent understand this log?

use std::{
    collections::{BTreeMap, HashSet},
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};
use portcullis_engine::{
    Subject, Timestamp,
    parse::{Format, Record},
};
use serde_json::json;

use crate::source::packed::{self, Pieces};

/// Malformed lines that are shown of each file.
const SHOWN: usize = 5;

/// What one file holds.
#[derive(Default)]
struct Summary {
    readable: u64,
    malformed: Vec<String>,
    unreadable: u64,
    first: Option<Timestamp>,
    last: Option<Timestamp>,
    clients: HashSet<Subject, foldhash::fast::RandomState>,
    proxied: u64,
    statuses: BTreeMap<u16, u64>,
}

impl Summary {
    fn add(&mut self, record: &Record) {
        self.readable += 1;
        self.first = Some(self.first.map_or(record.at, |first| first.min(record.at)));
        self.last = self.last.max(Some(record.at));
        self.clients.insert(Subject::of_client(record.client));
        self.proxied += u64::from(record.peer.is_some_and(|peer| peer != record.client));
        *self.statuses.entry(record.status / 100).or_default() += 1;
    }

    fn skip(&mut self, offset: u64, problem: &str, line: &[u8]) {
        self.unreadable += 1;
        if self.malformed.len() < SHOWN {
            let shown: String = String::from_utf8_lossy(line).chars().take(120).collect();
            self.malformed
                .push(format!("at byte {offset}: {problem}: {shown:?}"));
        }
    }

    fn write(&self, path: &str, out: &mut impl Write) -> std::io::Result<()> {
        writeln!(
            out,
            "{path}: {} lines read, {} malformed",
            self.readable, self.unreadable
        )?;
        if let (Some(first), Some(last)) = (self.first, self.last) {
            writeln!(out, "  from {first} to {last}")?;
            let statuses: Vec<String> = self
                .statuses
                .iter()
                .map(|(class, count)| format!("{count} answered {class}xx"))
                .collect();
            writeln!(
                out,
                "  {} clients, {} requests through a proxy; {}",
                self.clients.len(),
                self.proxied,
                statuses.join(", ")
            )?;
        }
        for malformed in &self.malformed {
            writeln!(out, "  {malformed}")?;
        }
        let more = self.unreadable - self.malformed.len() as u64;
        if more > 0 {
            writeln!(out, "  and {more} more")?;
        }
        Ok(())
    }
}

/// Reads files as the agent would. With `json` each record is printed, else a summary of each file.
///
/// # Errors
/// When a file cannot be read, or holds no line that can be.
pub(super) fn read(
    paths: &[PathBuf],
    format: &Format,
    max_line: usize,
    json: bool,
    out: &mut impl Write,
) -> Result<()> {
    // One that cannot be read is no reason to leave out the others.
    let mut problems = Vec::new();
    for path in paths {
        if let Err(problem) = read_one(path, format, max_line, json, out) {
            // Nobody listens any more.
            let io = problem.downcast_ref::<std::io::Error>();
            if io.is_some_and(|io| io.kind() == std::io::ErrorKind::BrokenPipe) {
                return Err(problem);
            }
            problems.push(format!("{problem:#}"));
        }
    }
    ensure!(problems.is_empty(), "{}", problems.join("\n"));
    Ok(())
}

fn read_one(
    path: &Path,
    format: &Format,
    max_line: usize,
    json: bool,
    out: &mut impl Write,
) -> Result<()> {
    let shown = path.display();
    let mut summary = Summary::default();
    for piece in Pieces::new(packed::open(path)?, max_line) {
        let piece = piece
            .with_context(|| format!("{shown} is damaged after {} lines", summary.readable))?;
        for (offset, line) in piece.lines() {
            match format.read(line) {
                _ if line.len() > max_line => summary.skip(offset, "too long", line),
                Ok(record) => {
                    summary.add(&record);
                    if json {
                        print_record(&record, out)?;
                    }
                }
                Err(problem) => summary.skip(offset, &problem.to_string(), line),
            }
        }
        if let Some(offset) = piece.cut {
            summary.skip(offset, "too long", b"");
        }
    }
    if !json {
        summary.write(&shown.to_string(), out)?;
    }
    if summary.readable == 0 {
        match summary.malformed.first() {
            Some(malformed) => bail!(
                "no line of {shown} can be read, the first one {malformed}; is it in another format (--format)?"
            ),
            None => bail!("{shown} is empty"),
        }
    }
    Ok(())
}

fn print_record(record: &Record, out: &mut impl Write) -> Result<()> {
    let millis = record.at.millis() as f64;
    let record = json!({
        "time": millis / 1000.0,
        "client": record.client,
        "status": record.status,
        "peer": record.peer,
    });
    writeln!(out, "{record}")?;
    Ok(())
}
