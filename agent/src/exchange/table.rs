//! Rows with named columns: CSV, and what JSON and CrowdSec have in common with it.

use std::time::Duration;

use portcullis_engine::{Subject, Term};

use super::{Format, Here, List, MAX_LINE, Place, end, left};

/// What a column is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Column {
    Subject,
    End,
    Length,
    Reason,
    Kind,
    Scope,
    Simulated,
    Observe,
}

/// Of the names that are known.
pub(super) fn column(name: &str) -> Option<Column> {
    Some(match name.trim().to_ascii_lowercase().as_str() {
        "subject" | "ip" | "address" | "value" => Column::Subject,
        "until" | "expiration" | "expires" => Column::End,
        "duration" => Column::Length,
        "reason" | "scenario" => Column::Reason,
        "action" | "type" => Column::Kind,
        "scope" => Column::Scope,
        "simulated" => Column::Simulated,
        "observe" => Column::Observe,
        _ => return None,
    })
}

/// One ban, or what is left out, in the words of the list.
#[derive(Debug, Default)]
pub(super) struct Row {
    subject: String,
    end: String,
    length: String,
    reason: String,
    kind: String,
    scope: String,
    simulated: String,
    observe: String,
    /// Where no words are needed.
    pub(super) term: Option<Term>,
}

impl Row {
    /// Of two columns about the same the first that says something counts.
    pub(super) fn set(&mut self, column: Column, text: &str) {
        let cell = match column {
            Column::Subject => &mut self.subject,
            Column::End => &mut self.end,
            Column::Length => &mut self.length,
            Column::Reason => &mut self.reason,
            Column::Kind => &mut self.kind,
            Column::Scope => &mut self.scope,
            Column::Simulated => &mut self.simulated,
            Column::Observe => &mut self.observe,
        };
        if cell.is_empty() {
            text.clone_into(cell);
        }
    }

    /// Says that it is only simulated, as what it is part of is.
    pub(super) fn simulate(&mut self) {
        "true".clone_into(&mut self.simulated);
    }

    /// What it says goes into the list.
    pub(super) fn add_to(&self, list: &mut List, place: Place, here: Here<'_>) {
        let (scope, subject) = self.scope_and_subject();
        let kind = self.kind.trim().to_ascii_lowercase();
        // So `cscli` marks what is simulated, in one more way.
        let (is_marked, kind) = kind
            .strip_prefix("(simul)")
            .map_or((false, kind.as_str()), |kind| (true, kind));
        let is_of_address = ["", "ip", "range"]
            .iter()
            .any(|known| scope.eq_ignore_ascii_case(known));
        if !matches!(kind, "" | "ban") || !is_of_address {
            list.other += 1;
            return;
        }
        if is_marked || is_true(&self.simulated) {
            list.simulated += 1;
            return;
        }
        if subject.is_empty() {
            return list.problem(place, "it names no address (subject, ip, address or value)");
        }
        let term = match self.end(here) {
            Ok(term) => term,
            Err(what) => return list.problem(place, what),
        };
        let observe = is_true(&self.observe);
        let reason = Some(self.reason.as_str());
        list.name(place, subject, term, reason, observe, here.now);
    }

    /// Raw, CrowdSec writes the one before the other: `Range:192.0.2.0/24`.
    fn scope_and_subject(&self) -> (&str, &str) {
        let (scope, subject) = (self.scope.trim(), self.subject.trim());
        match subject.split_once(':') {
            // `dead:beef::` is an address.
            Some((before, after))
                if before.chars().all(char::is_alphabetic)
                    && subject.parse::<Subject>().is_err() =>
            {
                (before, after.trim())
            }
            _ => (scope, subject),
        }
    }

    fn end(&self, here: Here<'_>) -> Result<Option<Term>, String> {
        if !self.end.trim().is_empty() {
            return end(self.end.trim(), here.now).map(Some);
        }
        let length = self.length.trim();
        if length.is_empty() {
            return Ok(self.term);
        }
        // Without a unit it is seconds.
        let secs = length.parse().ok().map(Duration::from_secs);
        match secs.or_else(|| left(length)) {
            Some(left) => Ok(Some(Term::Until(here.now + left))),
            None => end(length, here.now).map(Some),
        }
    }
}

fn is_true(text: &str) -> bool {
    let text = text.trim();
    text.eq_ignore_ascii_case("true") || text == "1"
}

/// Is it CSV, and whose?
pub(super) fn told(text: &str) -> Option<Format> {
    let (_, line) = super::lines(text).next()?;
    let (Ok(names), _) = record(line) else {
        return None;
    };
    let has = |name: &str| names.iter().any(|known| known == name);
    let is_header = names
        .iter()
        .any(|name| column(name) == Some(Column::Subject));
    is_header.then(|| {
        if has("expiration") && has("alert_id") {
            Format::Crowdsec
        } else {
            Format::Csv
        }
    })
}

pub(super) fn read(list: &mut List, text: &str, here: Here<'_>) {
    let mut columns: Option<Vec<Option<Column>>> = None;
    let (mut rest, mut line) = (text, 1);
    while !rest.is_empty() {
        let (cells, taken) = record(rest);
        let (taken, after) = rest.split_at(taken);
        let place = Place::Line(line);
        line += taken.bytes().filter(|byte| *byte == b'\n').count();
        rest = after;
        if taken.trim().is_empty() || taken.starts_with('#') {
            continue;
        }
        let cells = match cells {
            Ok(cells) => cells,
            Err(what) => {
                list.problem(place, what);
                continue;
            }
        };
        let Some(columns) = &columns else {
            let named: Vec<_> = cells.iter().map(|name| column(name)).collect();
            if !named.contains(&Some(Column::Subject)) {
                let what = "it begins with no header that names a column of addresses (subject, ip, address or value); is it \
                            in another format (--format)?";
                return list.problem(place, what);
            }
            columns = Some(named);
            continue;
        };
        let mut row = Row::default();
        for (column, cell) in columns.iter().zip(&cells) {
            if let Some(column) = column {
                row.set(*column, cell);
            }
        }
        row.add_to(list, place, here);
    }
}

/// The cells of the record that a text begins with, and how many bytes it takes up. After what is not understood comes the next
/// line.
fn record(text: &str) -> (Result<Vec<String>, &'static str>, usize) {
    let this_line = || text.find('\n').map_or(text.len(), |end| end + 1);
    let (mut cells, mut cell, mut is_quoted) = (Vec::new(), String::new(), false);
    let mut chars = text.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        if at > MAX_LINE {
            let what = if is_quoted {
                "a quotation mark is not closed within 64 KiB: close it"
            } else {
                super::TOO_LONG
            };
            return (Err(what), this_line());
        }
        match c {
            '"' if is_quoted => {
                if chars.next_if(|(_, next)| *next == '"').is_some() {
                    cell.push('"');
                } else {
                    is_quoted = false;
                }
            }
            '"' if cell.is_empty() => is_quoted = true,
            ',' if !is_quoted => cells.push(std::mem::take(&mut cell)),
            '\r' if !is_quoted && matches!(chars.peek(), None | Some((_, '\n'))) => {}
            '\n' if !is_quoted => {
                cells.push(cell);
                return (Ok(cells), at + 1);
            }
            c => cell.push(c),
        }
    }
    if is_quoted {
        return (Err("a quotation mark is never closed"), this_line());
    }
    cells.push(cell);
    (Ok(cells), text.len())
}
