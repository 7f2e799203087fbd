//! `log_format`s that are not JSON, matched so that no value that a client writes can pass for another.
//!
//! Nginx never leaves a raw double quote in a value. So format and line are both cut there, and the n-th stretch of the one
//! goes with the n-th stretch of the other. Within a stretch, all that clients write is one hole: what is needed is matched
//! from the left up to it, and from the right back to it. A path or a user agent is read where it is all of the hole, a
//! method beside it, too.

use std::fmt;

use memchr::memchr2;

use super::{
    Field, Malformed, Record, clipped,
    log_format::{AGENT, Kind, PATHS, Part, TIMES},
    target, value,
};

/// A format, as far as it is read.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Template {
    stretches: Vec<Stretch>,
    /// So many of them, from the first on, a line has to have.
    needed: usize,
}

/// What lies between two double quotes.
#[derive(Clone, Debug, Default, PartialEq)]
struct Stretch {
    /// Matched from its beginning.
    left: Vec<Piece>,
    /// Matched back from its end, the last one first.
    right: Vec<Piece>,
    /// What lies between these two, where it can be told what that is.
    middle: Option<Middle>,
    /// A double quote ends it.
    closed: bool,
}

/// What a line need not have to be read.
#[derive(Clone, Debug, PartialEq)]
struct Middle {
    left: Vec<Piece>,
    right: Vec<Piece>,
    /// Something may be between them: what clients write.
    is_open: bool,
    /// Which of the fields that is.
    hole: Option<Field>,
}

#[derive(Clone, Debug, PartialEq)]
enum Piece {
    Text(String),
    Variable {
        name: String,
        kind: Kind,
        field: Option<Field>,
    },
}

impl Template {
    /// Compiles a format.
    pub(super) fn new(parts: &[Part]) -> Result<Self, String> {
        let has = |name: &str| {
            parts
                .iter()
                .any(|part| matches!(part, Part::Variable(other) if other == name))
        };
        if !has("remote_addr") {
            return Err("the log_format has no $remote_addr: add it; headers such as $http_x_forwarded_for are what clients write, and are never taken for their address".to_owned());
        }
        if !has("status") {
            return Err("the log_format has no $status: add it".to_owned());
        }
        let mut refusal =
            "the log_format has no time: add $msec, $time_iso8601 or $time_local".to_owned();
        // The most exact one that can be had; of several refusals, the last is of the most common one.
        for time in TIMES.into_iter().filter(|time| has(time)) {
            match Self::with_time(parts, time) {
                Ok(template) => return Ok(template),
                Err(why) => refusal = why,
            }
        }
        Err(refusal)
    }

    fn with_time(parts: &[Part], time: &str) -> Result<Self, String> {
        let mut stretches = vec![Vec::new()];
        let mut seen: Vec<&str> = Vec::new();
        for part in parts {
            match part {
                Part::Text(text) => {
                    for (place, text) in text.split('"').enumerate() {
                        if place > 0 {
                            stretches.push(Vec::new());
                        }
                        if let (false, Some(pieces)) = (text.is_empty(), stretches.last_mut()) {
                            pieces.push(Piece::Text(text.to_owned()));
                        }
                    }
                }
                Part::Variable(name) => {
                    let first = !seen.contains(&name.as_str());
                    seen.push(name);
                    let field = match name.as_str() {
                        "remote_addr" => Some(Field::Client),
                        "status" => Some(Field::Status),
                        "realip_remote_addr" => Some(Field::Peer),
                        "request_method" => Some(Field::Method),
                        name if name == time => Some(Field::Time),
                        _ => None,
                    };
                    if let Some(pieces) = stretches.last_mut() {
                        pieces.push(Piece::Variable {
                            name: name.clone(),
                            kind: Kind::of(name),
                            field: field.filter(|_| first),
                        });
                    }
                }
            }
        }
        let holes: Vec<Option<&str>> = stretches.iter().map(|pieces| hole(pieces)).collect();
        let path = PATHS.into_iter().find(|path| holes.contains(&Some(path)));
        let field = |hole: &str| match hole {
            AGENT => Some(Field::Agent),
            hole if Some(hole) == path => Some(Field::Path),
            // The path is read elsewhere.
            "request" => Some(Field::Method),
            _ => None,
        };
        let count = stretches.len();
        let mut compiled = stretches
            .iter()
            .zip(holes)
            .enumerate()
            .map(|(place, (pieces, hole))| {
                Stretch::new(pieces, hole.and_then(field), place + 1 < count)
            })
            .collect::<Result<Vec<_>, _>>()?;
        let up_to_last = |is_read: fn(&Stretch) -> bool| {
            compiled
                .iter()
                .rposition(is_read)
                .map_or(0, |last| last + 1)
        };
        let (needed, wanted) = (
            up_to_last(Stretch::is_needed),
            up_to_last(Stretch::is_wanted),
        );
        compiled.truncate(needed.max(wanted));
        Ok(Self {
            stretches: compiled,
            needed,
        })
    }

    /// The same format, for lines that end after the last value that is needed, too, or go on otherwise.
    pub(super) fn open_ended(mut self) -> Self {
        if let Some(last) = self.stretches[..self.needed].last_mut()
            && let Some(middle) = &mut last.middle
            && let Some(text) = last.left.pop_if(|piece| matches!(piece, Piece::Text(_)))
        {
            middle.left.insert(0, text);
        }
        self
    }

    /// Reads one line.
    pub(super) fn read(&self, line: &[u8], key: u64) -> Result<Record, Malformed> {
        let mut found = Found::default();
        let mut rest = Some(line);
        // As soon as something is not as in the format, what else is wanted could stand in another place.
        let mut fits = true;
        for (place, stretch) in self.stretches.iter().enumerate() {
            let (text, after) = match rest {
                Some(rest) if fits || place < self.needed => cut(rest),
                None if place < self.needed => return Err(no("further double quote", line)),
                _ => break,
            };
            fits &= stretch.read(text, after.is_some(), &mut found)?;
            rest = after;
        }
        found.record(key)
    }
}

/// The variable that is all that clients write in a stretch, if it can be told where it begins and ends.
fn hole(pieces: &[Piece]) -> Option<&str> {
    let mut free = pieces
        .iter()
        .enumerate()
        .filter(|(_, piece)| piece.is_free());
    let (Some((place, Piece::Variable { name, .. })), None) = (free.next(), free.next()) else {
        return None;
    };
    tells(&pieces[..=place], &pieces[place..]).then_some(name)
}

/// Can it be told where what clients write begins, after what is in front of it, and ends, before what is behind it?
fn tells(front: &[Piece], back: &[Piece]) -> bool {
    let (front, back): (Vec<_>, Vec<_>) = (front.iter().collect(), back.iter().rev().collect());
    ends(&front, first_byte).is_ok() && ends(&back, last_byte).is_ok()
}

impl Stretch {
    fn new(pieces: &[Piece], wanted: Option<Field>, closed: bool) -> Result<Self, String> {
        let (first, last) = (
            pieces.iter().position(Piece::is_free),
            pieces.iter().rposition(Piece::is_free),
        );
        let (front, back) = match (first, last) {
            (Some(first), Some(last)) => {
                if let Some(needed) = pieces[first..last].iter().find(|piece| piece.is_needed()) {
                    let (before, after) = (&pieces[first], &pieces[last]);
                    return Err(format!(
                        "{needed} stands between {before} and {after}, in which clients could write another one: put {before} or {after} into double quotes, or move {needed} to the front"
                    ));
                }
                (&pieces[..=first], &pieces[last..])
            }
            _ => (pieces, &[][..]),
        };
        let left = needed(front.iter().collect(), first_byte)?;
        let right = needed(back.iter().rev().collect(), last_byte)?;
        let middle = tells(front, back).then(|| {
            let end = first.unwrap_or(pieces.len());
            let begin = last.map_or(end, |last| last + 1);
            Middle {
                left: pieces[left.len()..end].to_vec(),
                right: pieces[begin..pieces.len() - right.len()]
                    .iter()
                    .rev()
                    .cloned()
                    .collect(),
                is_open: first.is_some(),
                hole: wanted,
            }
        });
        Ok(Self {
            left,
            right,
            middle,
            closed,
        })
    }

    const fn is_needed(&self) -> bool {
        !self.left.is_empty() || !self.right.is_empty()
    }

    fn is_wanted(&self) -> bool {
        self.middle.as_ref().is_some_and(|middle| {
            let mut pieces = middle.left.iter().chain(&middle.right);
            middle.hole.is_some() || pieces.any(|piece| piece.field().is_some())
        })
    }

    /// Whether all of it is as in the format, as far as that can be told.
    fn read<'a>(
        &self,
        mut text: &'a [u8],
        closed: bool,
        found: &mut Found<'a>,
    ) -> Result<bool, Malformed> {
        for piece in &self.left {
            text = piece
                .strip_front(text, found)
                .ok_or_else(|| no(piece, text))?;
        }
        // What has been cut off could end as its client likes.
        if self.closed && !closed && !self.right.is_empty() {
            return Err(no("closing double quote", text));
        }
        for piece in &self.right {
            text = piece
                .strip_back(text, found)
                .ok_or_else(|| no(piece, text))?;
        }
        let fits = |middle: &Middle| {
            let method = found.method;
            let fits = middle.read(text, found).is_some();
            if !fits {
                // What has been taken for it may be something else.
                found.method = method;
            }
            fits
        };
        Ok(self.closed == closed && self.middle.as_ref().is_none_or(fits))
    }
}

impl Middle {
    fn read<'a>(&self, text: &'a [u8], found: &mut Found<'a>) -> Option<()> {
        let mut from = self.left.iter();
        let text = from.try_fold(text, |text, piece| piece.strip_front(text, found))?;
        let mut back = self.right.iter();
        let text = back.try_fold(text, |text, piece| piece.strip_back(text, found))?;
        found.set(self.hole, text);
        (self.is_open || text.is_empty()).then_some(())
    }
}

impl Piece {
    const fn is_free(&self) -> bool {
        matches!(
            self,
            Self::Variable {
                kind: Kind::Free,
                ..
            }
        )
    }

    const fn field(&self) -> Option<Field> {
        match self {
            Self::Text(_) => None,
            Self::Variable { field, .. } => *field,
        }
    }

    /// A method is read where it stands, but no line needs one.
    const fn is_needed(&self) -> bool {
        !matches!(self.field(), None | Some(Field::Method))
    }

    /// Refuses a value that could go on into the piece that is read after it. `near` is the byte of a text that is met first.
    fn ends_before(&self, next: &Self, near: fn(&str) -> Option<u8>) -> Result<(), String> {
        let ends = match (self, next) {
            (
                Self::Text(_)
                | Self::Variable {
                    kind: Kind::Wide(_),
                    ..
                },
                _,
            ) => true,
            (Self::Variable { kind, .. }, Self::Text(text)) => {
                near(text).is_none_or(|byte| !kind.has(byte))
            }
            (Self::Variable { .. }, Self::Variable { .. }) => false,
        };
        ends.then_some(()).ok_or_else(|| {
            format!(
                "it cannot be told {self} from {next} beside it: put a space between them, or one of them into double quotes"
            )
        })
    }

    fn strip_front<'a>(&self, text: &'a [u8], found: &mut Found<'a>) -> Option<&'a [u8]> {
        match self {
            Self::Text(expected) => text.strip_prefix(expected.as_bytes()),
            Self::Variable { kind, field, .. } => {
                let end = match kind {
                    Kind::Wide(width) => *width,
                    kind => text
                        .iter()
                        .position(|byte| !kind.has(*byte))
                        .unwrap_or(text.len()),
                };
                let (value, rest) = text.split_at_checked(end)?;
                found.set(*field, value);
                Some(rest)
            }
        }
    }

    fn strip_back<'a>(&self, text: &'a [u8], found: &mut Found<'a>) -> Option<&'a [u8]> {
        match self {
            Self::Text(expected) => text.strip_suffix(expected.as_bytes()),
            Self::Variable { kind, field, .. } => {
                let start = match kind {
                    Kind::Wide(width) => text.len().checked_sub(*width)?,
                    kind => text
                        .iter()
                        .rposition(|byte| !kind.has(*byte))
                        .map_or(0, |last| last + 1),
                };
                let (rest, value) = text.split_at(start);
                found.set(*field, value);
                Some(rest)
            }
        }
    }
}

fn first_byte(text: &str) -> Option<u8> {
    text.bytes().next()
}

fn last_byte(text: &str) -> Option<u8> {
    text.bytes().last()
}

/// Refuses pieces, in the order of reading, of which one could go on into the next.
fn ends(pieces: &[&Piece], near: fn(&str) -> Option<u8>) -> Result<(), String> {
    let mut pairs = pieces.windows(2);
    pairs.try_for_each(|pair| pair[0].ends_before(pair[1], near))
}

/// As many of the pieces, in the order of reading, as are needed, and the text after them: it tells a line of another format.
fn needed(pieces: Vec<&Piece>, near: fn(&str) -> Option<u8>) -> Result<Vec<Piece>, String> {
    let count = pieces
        .iter()
        .rposition(|piece| piece.is_needed())
        .map_or(0, |last| last + 1);
    ends(&pieces[..pieces.len().min(count + 1)], near)?;
    let is_text = |piece: &&Piece| matches!(piece, Piece::Text(_));
    let text = count > 0 && pieces.get(count).is_some_and(is_text);
    let count = count + usize::from(text);
    Ok(pieces.into_iter().take(count).cloned().collect())
}

/// As it stands in the format.
impl fmt::Display for Piece {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) => write!(f, "{text:?}"),
            Self::Variable { name, .. } => write!(f, "${name}"),
        }
    }
}

/// The values of a line.
#[derive(Default)]
struct Found<'a> {
    time: &'a [u8],
    client: &'a [u8],
    status: &'a [u8],
    peer: &'a [u8],
    path: &'a [u8],
    agent: &'a [u8],
    method: &'a [u8],
}

impl<'a> Found<'a> {
    const fn set(&mut self, field: Option<Field>, value: &'a [u8]) {
        match field {
            Some(Field::Time) => self.time = value,
            Some(Field::Client) => self.client = value,
            Some(Field::Status) => self.status = value,
            Some(Field::Peer) => self.peer = value,
            Some(Field::Path) => self.path = value,
            Some(Field::Agent) => self.agent = value,
            Some(Field::Method) => self.method = value,
            None => {}
        }
    }

    fn record(&self, key: u64) -> Result<Record, Malformed> {
        let malformed = |name: &str, text: &[u8]| Malformed::Address {
            field: name.to_owned(),
            value: clipped(text),
        };
        let at = value::time(self.time).ok_or_else(|| no("time", self.time))?;
        let client =
            value::address(self.client).ok_or_else(|| malformed("$remote_addr", self.client))?;
        let status =
            value::status(self.status).ok_or_else(|| no("status from 0 to 999", self.status))?;
        let (target, requested) = target::target(self.path, key).unzip();
        Ok(Record {
            peer: value::peer(self.peer)
                .map_err(|_| malformed("$realip_remote_addr", self.peer))?,
            target,
            method: target::method(self.method).or(requested.flatten()),
            agent: target::agent(self.agent, key),
            ..Record::new(at, client, status)
        })
    }
}

fn no(expected: impl fmt::Display, text: &[u8]) -> Malformed {
    Malformed::Template {
        expected: expected.to_string(),
        text: clipped(text),
    }
}

/// Up to the first double quote, and what comes after it. A backslash takes the next byte with it: so values are escaped.
fn cut(line: &[u8]) -> (&[u8], Option<&[u8]>) {
    let mut from = 0;
    while let Some(found) = line.get(from..).and_then(|rest| memchr2(b'"', b'\\', rest)) {
        let at = from + found;
        if line[at] == b'"' {
            return (&line[..at], Some(&line[at + 1..]));
        }
        from = at + 2;
    }
    (line, None)
}
