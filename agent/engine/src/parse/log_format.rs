//! A `log_format` of nginx.conf, taken apart.

/// A piece of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// Written as it stands. Never empty.
    Text(String),
    /// The name of a variable, without `$`.
    Variable(String),
}

/// The variables that hold the time, the most exact one first.
pub(super) const TIMES: [&str; 3] = ["msec", "time_iso8601", "time_local"];

/// Those that hold the path, first the one that has only that and as it was sent.
pub(super) const PATHS: [&str; 3] = ["request_uri", "uri", "request"];

/// The one that holds the user agent.
pub(super) const AGENT: &str = "http_user_agent";

/// What a variable can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// An address, `unix:`, `-`, or nothing.
    Address,
    /// Digits and dots, `-`, or nothing.
    Number,
    /// Anything without spaces, and not written by clients.
    Word,
    /// So many bytes.
    Wide(usize),
    /// Whatever a client likes, save a double quote.
    Free,
}

impl Kind {
    /// Of the variable of this name. Nginx lets no one define these names anew.
    pub(super) fn of(name: &str) -> Self {
        match name {
            "remote_addr" | "realip_remote_addr" | "server_addr" => Self::Address,
            "msec"
            | "status"
            | "body_bytes_sent"
            | "bytes_sent"
            | "request_time"
            | "request_length"
            | "connection"
            | "connection_requests"
            | "remote_port"
            | "realip_remote_port"
            | "server_port"
            | "pid" => Self::Number,
            "hostname" | "request_method" | "scheme" | "server_name" => Self::Word,
            "time_iso8601" => Self::Wide(25),
            "time_local" => Self::Wide(26),
            "request_id" => Self::Wide(32),
            _ => Self::Free,
        }
    }

    /// What the variable of this name could hold.
    pub(super) fn sample(name: &str) -> &'static str {
        match (name, Self::of(name)) {
            ("msec", _) => "1795371066.123",
            ("time_iso8601", _) => "2026-11-22T18:11:06+00:00",
            ("time_local", _) => "22/Nov/2026:18:11:06 +0000",
            (_, Self::Address) => "192.0.2.1",
            (_, Self::Number) => "200",
            _ => "x",
        }
    }

    /// Whether a value can have this byte in it. Meaningful where the width is not fixed.
    pub(super) const fn has(self, byte: u8) -> bool {
        match self {
            Self::Address => {
                matches!(byte, b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F' | b'.' | b':' | b'-' | b'u' | b'n' | b'i' | b'x')
            }
            Self::Number => matches!(byte, b'0'..=b'9' | b'.' | b'-'),
            Self::Word => byte != b' ',
            Self::Wide(_) | Self::Free => true,
        }
    }
}

/// Does it write JSON?
pub(super) fn is_json(parts: &[Part]) -> bool {
    matches!(parts.first(), Some(Part::Text(text)) if text.trim_start().starts_with('{'))
}

/// The parts of a format, given as the text between its quotes or as the whole directive.
pub(super) fn parts(text: &str) -> Result<Vec<Part>, String> {
    let text = text.trim();
    let format = if text.starts_with("log_format") || text.starts_with('\'') {
        of_directive(text)?
    } else {
        unescaped(text)
    };
    if let Some(odd) = format.chars().find(|c| matches!(c, '\\' | '\n' | '\r')) {
        return Err(format!(
            "the log_format has {odd:?} in it, which makes its lines ambiguous: leave it out"
        ));
    }
    let mut parts = Vec::new();
    let mut rest = format.as_str();
    while let Some((text, after)) = rest.split_once('$') {
        if !text.is_empty() {
            parts.push(Part::Text(text.to_owned()));
        }
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let (name, after) = match after.strip_prefix('{') {
            Some(braced) => braced.split_once('}').unwrap_or(("", braced)),
            None => after.split_at(after.find(|c| !is_name(c)).unwrap_or(after.len())),
        };
        if name.is_empty() || !name.chars().all(is_name) {
            return Err(format!(
                "a $ in the log_format is not followed by a variable's name: {:?}",
                rest.chars().take(40).collect::<String>()
            ));
        }
        parts.push(Part::Variable(name.to_owned()));
        rest = after;
    }
    if !rest.is_empty() {
        parts.push(Part::Text(rest.to_owned()));
    }
    Ok(parts)
}

/// The text of a directive: all of its quoted pieces.
fn of_directive(text: &str) -> Result<String, String> {
    let words = words(text)?;
    let mut pieces = words.as_slice();
    if let ["log_format", _name, rest @ ..] =
        &pieces.iter().map(String::as_str).collect::<Vec<_>>()[..]
    {
        let escape = rest.first().and_then(|word| word.strip_prefix("escape="));
        if escape == Some("none") {
            return Err(
                "with escape=none whoever sends a double quote can forge every field: write escape=json in its place"
                    .to_owned(),
            );
        }
        pieces = &pieces[2 + usize::from(escape.is_some())..];
    }
    Ok(pieces.concat())
}

/// The words of one directive, as Nginx takes them.
fn words(text: &str) -> Result<Vec<String>, String> {
    let mut words = Vec::new();
    let mut rest = text.trim_start();
    while let Some(first) = rest.chars().next() {
        if let Some(after) = rest.strip_prefix(';') {
            if after.trim().is_empty() {
                break;
            }
            return Err("the log_format goes on after its semicolon: give one alone".to_owned());
        }
        if first == '#' {
            rest = rest
                .split_once('\n')
                .map_or("", |(_, after)| after)
                .trim_start();
            continue;
        }
        let quoted = matches!(first, '\'' | '"');
        let body = if quoted { &rest[1..] } else { rest };
        let mut escaped = false;
        let end = body.find(|c: char| {
            let ends = !escaped
                && if quoted {
                    c == first
                } else {
                    c.is_whitespace() || c == ';'
                };
            escaped = !escaped && c == '\\';
            ends
        });
        let end = match end {
            None if quoted => {
                return Err(format!(
                    "the log_format lacks the {first} that ends its text"
                ));
            }
            end => end.unwrap_or(body.len()),
        };
        words.push(unescaped(&body[..end]));
        rest = body[end + usize::from(quoted)..].trim_start();
    }
    Ok(words)
}

/// A text of nginx.conf with its escapes undone.
fn unescaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        let meant = match (c, chars.peek()) {
            ('\\', Some(next @ ('"' | '\'' | '\\'))) => Some(*next),
            ('\\', Some('t')) => Some('\t'),
            ('\\', Some('r')) => Some('\r'),
            ('\\', Some('n')) => Some('\n'),
            _ => None,
        };
        if meant.is_some() {
            chars.next();
        }
        out.push(meant.unwrap_or(c));
    }
    out
}
