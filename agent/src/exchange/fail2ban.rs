//! What `fail2ban-client` prints: `banned` (lists and dictionaries as Python writes them), `get JAIL banip`, also `--with-time`
//! (local time), and `status JAIL`.

use jiff::{civil::DateTime, tz::TimeZone};
use portcullis_engine::Term;

use super::{Here, List, Place, moment};

/// Is this what it prints, and nobody else?
pub(super) fn is_it(text: &str) -> bool {
    let text = text.trim_start();
    if let Some(inside) = text.strip_prefix('[') {
        let is_bracket = |c: char| c == '[' || c == '{' || c.is_whitespace();
        return inside.trim_start_matches(is_bracket).starts_with('\'');
    }
    let first = text.lines().next().unwrap_or_default();
    first.starts_with(STATUS) || first.contains(BANNED) || end(first, &TimeZone::UTC).is_some()
}

/// How the status of a jail begins; its name follows.
const STATUS: &str = "Status for the jail:";
/// The addresses follow, all on one line. Older versions leave out the `Banned`.
const BANNED: &str = "IP list:";
/// What else there is in the status of a jail.
const BESIDE: [&str; 8] = [
    "Filter",
    "filter",
    "Actions",
    "action",
    "Currently ",
    "Total ",
    "File list:",
    "Journal matches:",
];

pub(super) fn read(list: &mut List, text: &str, here: Here<'_>) {
    if text.trim_start().starts_with('[') {
        return python(list, text, here);
    }
    let mut reason = None;
    for (place, line) in super::lines(text) {
        let bare = line.trim_start_matches(['|', '`', '-', ' ']);
        if BESIDE.iter().any(|name| bare.starts_with(name)) {
            continue;
        }
        if let Some(jail) = line.strip_prefix(STATUS) {
            reason = Some(format!("fail2ban: {}", jail.trim()));
        } else if let Some((_, addresses)) = line.split_once(BANNED) {
            for address in addresses.split_whitespace() {
                list.name(place, address, None, reason.as_deref(), false, here.now);
            }
        } else if let Some((address, term)) = end(line, here.zone) {
            let reason = Some("fail2ban");
            match term {
                Ok(term) => list.name(place, address, Some(term), reason, false, here.now),
                Err(what) => list.problem(place, what),
            }
        } else {
            for address in line.split_whitespace() {
                list.name(place, address, None, Some("fail2ban"), false, here.now);
            }
        }
    }
}

/// The address of a line with times, and when its ban ends: `192.0.2.1 2027-05-01 10:00:00 + 600 = 2027-05-01 10:10:00`; for `-1`
/// seconds is for good.
fn end<'a>(line: &'a str, zone: &TimeZone) -> Option<(&'a str, Result<Term, String>)> {
    let words: Vec<&str> = line.split_whitespace().take(9).collect();
    let [address, _, _, "+", secs, "=", date, time] = words[..] else {
        return None;
    };
    if secs.starts_with('-') {
        return Some((address, Ok(Term::Permanent)));
    }
    let end: Result<DateTime, _> = format!("{date} {time}").parse();
    let end = end.and_then(|end| zone.to_timestamp(end));
    let term = end
        .map(|end| Term::Until(moment(end)))
        .map_err(|_| format!("{date:?} {time:?} is no time such as 2027-05-01 10:10:00"));
    Some((address, term))
}

/// `[{'sshd': ['192.0.2.1', '2001:db8::1']}, {'nginx': []}]`: what is before a colon is a jail, what else is quoted an address.
fn python(list: &mut List, text: &str, here: Here<'_>) {
    let (mut rest, mut line) = (text, 1);
    let mut reason = None;
    while let Some(c) = rest.chars().next() {
        let place = Place::Line(line);
        match c {
            '\'' | '"' => {
                let (quoted, after) = string(&rest[1..], c);
                rest = after;
                if after.trim_start().starts_with(':') {
                    reason = Some(format!("fail2ban: {quoted}"));
                } else {
                    let reason = reason.as_deref().or(Some("fail2ban"));
                    list.name(place, &quoted, None, reason, false, here.now);
                }
                continue;
            }
            '\n' => line += 1,
            '[' | ']' | '{' | '}' | ',' | ':' => {}
            c if c.is_whitespace() => {}
            _ => {
                let odd = rest.find(['[', ']', '{', '}', ',', ':', '\'', '"', '\n']);
                let (odd, after) = rest.split_at(odd.unwrap_or(rest.len()));
                let odd: String = odd.trim().chars().take(64).collect();
                list.problem(
                    place,
                    format!("{odd:?} is not what `fail2ban-client banned` prints"),
                );
                rest = after;
                continue;
            }
        }
        rest = &rest[c.len_utf8()..];
    }
}

/// What is quoted, and what follows it. Nothing that is an address needs a backslash; what has one stays as it is.
fn string(text: &str, quote: char) -> (String, &str) {
    let mut is_escaped = false;
    let end = text.find(|c: char| {
        let is_end = c == quote && !is_escaped;
        is_escaped = c == '\\' && !is_escaped;
        is_end
    });
    match end {
        Some(end) => (text[..end].to_owned(), &text[end + 1..]),
        None => (text.to_owned(), ""),
    }
}
