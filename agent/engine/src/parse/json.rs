//! Lines of one JSON object each.

use std::{borrow::Cow, fmt, net::IpAddr};

use serde::{
    Deserializer,
    de::{DeserializeSeed, Error, IgnoredAny, MapAccess, Unexpected, Visitor},
};

use super::{
    Field, Fields, Malformed, Method, Record, Target, clipped,
    log_format::{AGENT, Kind, PATHS, Part, TIMES},
    scan, target, value,
};
use crate::time::Timestamp;

/// Reads one line.
pub(super) fn read(line: &[u8], fields: &Fields, key: u64) -> Result<Record, Malformed> {
    if let Some(record) = scan::scan(line, fields, key) {
        return Ok(record);
    }
    match repairing(line, fields, Some(key)) {
        // Perhaps no text stands where a path, a user agent or a method should.
        Err(Malformed::Json { .. }) => repairing(line, fields, None),
        result => result,
    }
}

/// Reads a line as it is, or else with what is no JSON made readable.
fn repairing(line: &[u8], fields: &Fields, key: Option<u64>) -> Result<Record, Malformed> {
    match exactly(line, fields, key) {
        Err(malformed @ Malformed::Json { .. }) => match repaired(line) {
            Some(repaired) => exactly(&repaired, fields, key),
            None => Err(malformed),
        },
        result => result,
    }
}

/// The names under which a JSON `log_format` writes what is read. For what a line need not have and the format does not write,
/// `others` has the name.
pub(super) fn fields(parts: &[Part], others: Fields) -> Result<Fields, String> {
    let (mut text, mut sample) = (String::new(), String::new());
    let mut quoted = false;
    for part in parts {
        match part {
            Part::Text(part) => {
                quoted ^= part.matches('"').count() % 2 == 1;
                text.push_str(part);
                sample.push_str(part);
            }
            Part::Variable(name) => {
                if !quoted && Kind::of(name) != Kind::Number {
                    return Err(format!(
                        "${name} stands outside of double quotes, where not all that it can hold is JSON: write \"${name}\""
                    ));
                }
                let quote = if quoted { "" } else { "\"" };
                text.extend([quote, "$", name, quote]);
                sample.push_str(Kind::sample(name));
            }
        }
    }
    let object: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&text)
        .map_err(|error| format!("the log_format begins with {{ but is no JSON object: {error}"))?;
    if let Some(key) = object.keys().find(|key| key.contains('$')) {
        return Err(format!(
            "the key {key:?} holds a variable, so clients could name fields: write a fixed key"
        ));
    }
    let key_of = |variable: &str| {
        object
            .iter()
            .find(|(_, value)| {
                value.as_str().and_then(|value| value.strip_prefix('$')) == Some(variable)
            })
            .map(|(key, _)| key.clone())
    };
    let missing = |variables: &str| {
        format!(
            "the log_format has no key whose whole value is {variables}: add one, not inside another object, such as {}",
            r#""timestamp":"$msec", "source_ip":"$remote_addr" or "status":"$status""#
        )
    };
    let first_of = |variables: [&str; 3]| variables.into_iter().find_map(key_of);
    let fields = Fields {
        time: first_of(TIMES).ok_or_else(|| missing("$msec, $time_iso8601 or $time_local"))?,
        client: key_of("remote_addr").ok_or_else(|| missing("$remote_addr"))?,
        status: key_of("status").ok_or_else(|| missing("$status"))?,
        peer: key_of("realip_remote_addr").unwrap_or(others.peer),
        path: first_of(PATHS).unwrap_or(others.path),
        user_agent: key_of(AGENT).unwrap_or(others.user_agent),
        method: key_of("request_method")
            .or_else(|| key_of("request"))
            .unwrap_or(others.method),
    };
    fields.check_needed()?;
    match read(sample.as_bytes(), &fields, 0) {
        Ok(_) => Ok(fields),
        Err(malformed) => Err(format!(
            "lines of this log_format could not be read; a sample is {malformed}"
        )),
    }
}

/// A line as serde has it: the addresses, or the beginning of what stands in their place.
struct Line {
    at: Timestamp,
    client: Result<IpAddr, String>,
    status: u16,
    peer: Option<Result<IpAddr, String>>,
    target: Option<Target>,
    agent: Option<u32>,
    method: Option<Method>,
}

/// Reads a line that is JSON as it is. Without a key for hashes, path, user agent and method are passed over, whatever they
/// are; with one, each has to be a text or null.
pub(super) fn exactly(line: &[u8], fields: &Fields, key: Option<u64>) -> Result<Record, Malformed> {
    let mut deserializer = serde_json::Deserializer::from_slice(line);
    let line = Object { fields, key }
        .deserialize(&mut deserializer)
        .and_then(|line| deserializer.end().map(|()| line))
        .map_err(|error| Malformed::Json {
            fields: format!("{}, {} and {}", fields.time, fields.client, fields.status),
            error,
        })?;
    let malformed = |field: &str, value| Malformed::Address {
        field: field.to_owned(),
        value,
    };
    let client = line
        .client
        .map_err(|value| malformed(&fields.client, value))?;
    Ok(Record {
        peer: match line.peer {
            None => None,
            Some(Ok(peer)) => Some(peer),
            Some(Err(text)) => {
                value::peer(text.as_bytes()).map_err(|_| malformed(&fields.peer, text))?
            }
        },
        target: line.target,
        method: line.method,
        agent: line.agent,
        ..Record::new(line.at, client, line.status)
    })
}

struct Object<'a> {
    fields: &'a Fields,
    key: Option<u64>,
}

impl<'de> DeserializeSeed<'de> for Object<'_> {
    type Value = Line;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Line, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Object<'_> {
    type Value = Line;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Line, A::Error> {
        let Object {
            fields,
            key: hashes,
        } = self;
        let (mut at, mut client, mut status, mut peer) = (None, None, None, None);
        let (mut path, mut agent, mut method) = (None, None, None);
        while let Some(key) = map.next_key_seed(Key(fields))? {
            let (name, again) = match (key, hashes) {
                (Some(Field::Time), _) => (
                    &fields.time,
                    at.replace(map.next_value_seed(Time)?).is_some(),
                ),
                (Some(Field::Client), _) => (
                    &fields.client,
                    client.replace(map.next_value_seed(Address)?).is_some(),
                ),
                (Some(Field::Status), _) => (
                    &fields.status,
                    status.replace(map.next_value_seed(Status)?).is_some(),
                ),
                (Some(Field::Peer), _) => (
                    &fields.peer,
                    peer.replace(map.next_value_seed(Address)?).is_some(),
                ),
                // Twice is none.
                (Some(Field::Path), Some(key)) => {
                    let text = map.next_value_seed(Text(target::target, key))?;
                    path = Some(text.filter(|_| path.is_none()));
                    continue;
                }
                (Some(Field::Agent), Some(key)) => {
                    let text = map.next_value_seed(Text(target::agent, key))?;
                    agent = Some(text.filter(|_| agent.is_none()));
                    continue;
                }
                (Some(Field::Method), Some(key)) => {
                    let text = map.next_value_seed(Text(|text, _| target::method(text), key))?;
                    method = Some(text.filter(|_| method.is_none()));
                    continue;
                }
                _ => {
                    map.next_value::<IgnoredAny>()?;
                    continue;
                }
            };
            if again {
                return Err(A::Error::custom(format_args!("duplicate field `{name}`")));
            }
        }
        let missing = |name: &str| A::Error::custom(format_args!("missing field `{name}`"));
        let (target, requested) = path.flatten().unzip();
        Ok(Line {
            at: at.ok_or_else(|| missing(&fields.time))?,
            client: client.ok_or_else(|| missing(&fields.client))?,
            status: status.ok_or_else(|| missing(&fields.status))?,
            peer,
            target,
            agent: agent.flatten(),
            method: method.flatten().or(requested.flatten()),
        })
    }
}

struct Key<'a>(&'a Fields);

impl<'de> DeserializeSeed<'de> for Key<'_> {
    type Value = Option<Field>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_identifier(self)
    }
}

impl Visitor<'_> for Key<'_> {
    type Value = Option<Field>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: Error>(self, key: &str) -> Result<Self::Value, E> {
        Ok(self.0.of_key(key.as_bytes()))
    }
}

struct Address;

impl<'de> DeserializeSeed<'de> for Address {
    type Value = Result<IpAddr, String>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Address {
    type Value = Result<IpAddr, String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an IP address")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
        Ok(value::address(text.as_bytes()).ok_or_else(|| clipped(text.as_bytes())))
    }
}

/// What is made, with a key, of a text that clients write: of its bytes, which need not be UTF-8.
struct Text<T>(fn(&[u8], u64) -> Option<T>, u64);

impl<'de, T> DeserializeSeed<'de> for Text<T> {
    type Value = Option<T>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Option<T>, D::Error> {
        deserializer.deserialize_option(self)
    }
}

impl<'de, T> Visitor<'de> for Text<T> {
    type Value = Option<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text")
    }

    fn visit_none<E: Error>(self) -> Result<Option<T>, E> {
        Ok(None)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Option<T>, D::Error> {
        deserializer.deserialize_bytes(self)
    }

    fn visit_bytes<E: Error>(self, text: &[u8]) -> Result<Option<T>, E> {
        Ok((self.0)(text, self.1))
    }
}

struct Time;

impl<'de> DeserializeSeed<'de> for Time {
    type Value = Timestamp;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Timestamp, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl Visitor<'_> for Time {
    type Value = Timestamp;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a time as epoch seconds or ISO 8601")
    }

    fn visit_u64<E: Error>(self, secs: u64) -> Result<Timestamp, E> {
        Some(Timestamp::from_secs(secs))
            .filter(|time| *time < Timestamp::MAX)
            .ok_or_else(|| E::invalid_value(Unexpected::Unsigned(secs), &self))
    }

    fn visit_f64<E: Error>(self, secs: f64) -> Result<Timestamp, E> {
        let millis = (secs * 1000.0).round();
        #[expect(clippy::cast_precision_loss, reason = "the bound is far below 2^53")]
        if !(0.0..Timestamp::MAX.millis() as f64).contains(&millis) {
            return Err(E::invalid_value(Unexpected::Float(secs), &self));
        }
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "checked just above"
        )]
        Ok(Timestamp::from_millis(millis as u64))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Timestamp, E> {
        if let Some(time) = value::time(text.as_bytes()) {
            return Ok(time);
        }
        match text.parse() {
            Ok(secs) => self.visit_f64(secs),
            Err(_) => Err(E::invalid_value(Unexpected::Str(text), &self)),
        }
    }
}

struct Status;

impl<'de> DeserializeSeed<'de> for Status {
    type Value = u16;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<u16, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl Visitor<'_> for Status {
    type Value = u16;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a status from 0 to 999")
    }

    fn visit_u64<E: Error>(self, status: u64) -> Result<u16, E> {
        u16::try_from(status)
            .ok()
            .filter(|status| *status < 1000)
            .ok_or_else(|| E::invalid_value(Unexpected::Unsigned(status), &self))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<u16, E> {
        match text.parse::<u64>() {
            Ok(status) => self.visit_u64(status),
            Err(_) => Err(E::invalid_value(Unexpected::Str(text), &self)),
        }
    }
}

/// The line with what is no JSON made readable: invalid UTF-8, raw control characters, and the `\xNN` that Nginx
/// writes without `escape=json`. `None` when there is nothing to repair. Quotes and structure are left alone, so no
/// value can become a field.
fn repaired(line: &[u8]) -> Option<Vec<u8>> {
    let text = String::from_utf8_lossy(line);
    let mut out = String::with_capacity(text.len() + 64);
    let mut changed = matches!(text, Cow::Owned(_));
    let mut rest = text.as_ref();
    while let Some(at) = rest.find(|c: char| c == '\\' || c < ' ') {
        let (before, from) = rest.split_at(at);
        out.push_str(before);
        let byte = from.as_bytes()[0];
        let hex = from
            .get(2..4)
            .filter(|hex| hex.bytes().all(|digit| digit.is_ascii_hexdigit()));
        rest = match (byte, from.as_bytes().get(1), hex) {
            (b'\\', Some(b'x'), Some(hex)) => {
                out.push_str("\\u00");
                out.push_str(hex);
                changed = true;
                &from[4..]
            }
            // An escape of JSON is two characters that belong together: `\\x41` is a backslash and `x41`.
            (b'\\', Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' | b'u'), _) => {
                out.push_str(&from[..2]);
                &from[2..]
            }
            _ => {
                out.push(if byte == b'\\' { '\u{FFFD}' } else { ' ' });
                changed = true;
                &from[1..]
            }
        };
    }
    out.push_str(rest);
    changed.then(|| out.into_bytes())
}
