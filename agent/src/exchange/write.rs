//! Bans as text that [`read`](super::read) takes, and other programs.

use std::io::{self, Write};

use portcullis_engine::{Ban, Origin, Subject, Term};
use serde::Serialize;

/// How bans are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// An object a line.
    Json,
    /// RFC 4180, with a header.
    Csv,
    /// The subject alone, one a line: without its end it is banned for good where that is read.
    Plain,
}

/// Times as RFC 3339.
#[derive(Debug, Serialize)]
struct Row<'a> {
    subject: Subject,
    since: String,
    /// None when it is permanent.
    until: Option<String>,
    tier: Option<u32>,
    origin: Origin,
    reason: &'a str,
    observe: bool,
}

impl<'a> Row<'a> {
    fn of(ban: &'a Ban) -> Self {
        Self {
            subject: ban.subject,
            since: ban.since.to_string(),
            until: match ban.term {
                Term::Until(end) => Some(end.to_string()),
                Term::Permanent => None,
            },
            tier: ban.tier,
            origin: ban.origin,
            reason: &ban.reason,
            observe: ban.observe,
        }
    }
}

/// Writes bans.
///
/// # Errors
/// As the output has.
pub fn write(bans: &[Ban], form: Form, out: &mut impl Write) -> io::Result<()> {
    if form == Form::Csv {
        writeln!(out, "subject,since,until,tier,origin,reason,observe")?;
    }
    for ban in bans {
        let row = Row::of(ban);
        match form {
            Form::Json => {
                serde_json::to_writer(&mut *out, &row)?;
                writeln!(out)?;
            }
            Form::Csv => writeln!(
                out,
                "{},{},{},{},{},{},{}",
                row.subject,
                row.since,
                row.until.as_deref().unwrap_or("permanent"),
                row.tier.map_or_else(String::new, |tier| tier.to_string()),
                match row.origin {
                    Origin::Detector => "detector",
                    Origin::Operator => "operator",
                },
                quoted(row.reason),
                row.observe
            )?,
            Form::Plain => writeln!(out, "{}", row.subject)?,
        }
    }
    Ok(())
}

/// A cell, in quotation marks where it needs them.
fn quoted(text: &str) -> String {
    if text.contains(['"', ',', '\n', '\r']) {
        format!("\"{}\"", text.replace('"', "\"\""))
    } else {
        text.to_owned()
    }
}
