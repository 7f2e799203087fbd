//! From a line of Nginx's JSON access log to a record.
//!
//! The client's address is taken from its one field, which Nginx itself wrote, and from nowhere else. The rest of the
//! line is written by whoever sends requests: one stray byte must not make it unreadable.

mod scan;

use std::{borrow::Cow, fmt, net::IpAddr};

use serde::{
    Deserialize,
    de::{Error, Unexpected, Visitor},
};

use crate::time::Timestamp;

/// What the detector needs of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// When the request was logged.
    pub at: Timestamp,
    /// Field `source_ip`; an IPv4-mapped address is already IPv4.
    pub client: IpAddr,
    /// Field `status`, 0 to 999.
    pub status: u16,
}

/// Why a line is not a record.
#[derive(Debug, thiserror::Error)]
pub enum Malformed {
    /// No JSON, or a field is missing or of the wrong kind.
    #[error("not an object with the fields timestamp, source_ip and status: {0}")]
    Json(serde_json::Error),
    /// `source_ip` holds something else, such as `unix:`.
    #[error("source_ip is not an IP address: {0:?}")]
    Address(String),
}

/// Reads one line, without its line break.
///
/// # Errors
/// [`Malformed`] when time, address or status cannot be had, even after stray bytes have been made readable.
pub fn parse(line: &[u8]) -> Result<Record, Malformed> {
    if let Some(record) = scan::scan(line) {
        return Ok(record);
    }
    match read(line) {
        Err(Malformed::Json(first)) => match repaired(line) {
            Some(repaired) => read(&repaired),
            None => Err(Malformed::Json(first)),
        },
        result => result,
    }
}

#[derive(Deserialize)]
struct Line<'a> {
    #[serde(deserialize_with = "timestamp")]
    timestamp: Timestamp,
    #[serde(borrow)]
    source_ip: Cow<'a, str>,
    #[serde(deserialize_with = "status")]
    status: u16,
}

fn read(line: &[u8]) -> Result<Record, Malformed> {
    let line: Line<'_> = serde_json::from_slice(line).map_err(Malformed::Json)?;
    let client: IpAddr = line
        .source_ip
        .parse()
        .map_err(|_| Malformed::Address(line.source_ip.chars().take(64).collect()))?;
    Ok(Record {
        at: line.timestamp,
        client: client.to_canonical(),
        status: line.status,
    })
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

fn timestamp<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Timestamp, D::Error> {
    struct Time;

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
            if let Ok(secs) = text.parse::<f64>() {
                return self.visit_f64(secs);
            }
            let time = text.parse::<jiff::Timestamp>().ok();
            time.and_then(|time| u64::try_from(time.as_millisecond()).ok())
                .map(Timestamp::from_millis)
                .ok_or_else(|| E::invalid_value(Unexpected::Str(text), &self))
        }
    }

    deserializer.deserialize_any(Time)
}

fn status<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<u16, D::Error> {
    struct Status;

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

    deserializer.deserialize_any(Status)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ok(line: &[u8]) -> (u64, String, u16) {
        let record =
            parse(line).unwrap_or_else(|e| panic!("{}: {e}", String::from_utf8_lossy(line)));
        (record.at.millis(), record.client.to_string(), record.status)
    }

    #[test]
    fn numbers_may_be_strings_and_times_epoch_or_iso() {
        let expected = (1_700_000_000_123, "192.0.2.1".to_owned(), 404);
        for line in [
            r#"{"timestamp":"1700000000.123","source_ip":"192.0.2.1","method":"GET","path":"/","status":"404","response_size":"153"}"#,
            r#"{"timestamp":1700000000.123,"source_ip":"192.0.2.1","method":"GET","path":"/","status":404,"response_size":153}"#,
            r#"{"status":404,"timestamp":"2023-11-14T22:13:20.123+00:00","source_ip":"::ffff:192.0.2.1"}"#,
            r#" {"status":404,"timestamp":"2023-11-14T23:13:20.123+01:00","source_ip":"192.0.2.1","more":{"nested":[1,{}]}} "#,
        ] {
            assert_eq!(ok(line.as_bytes()), expected, "{line}");
        }
    }

    #[test]
    fn one_stray_byte_does_not_hide_a_client() {
        for path in [
            &b"/\xff\xfe"[..],
            b"/\\x22\\xC3",
            b"/\x01\x1f\ttab",
            b"/\\\\x41 \\q \xe2\x82",
            b"/\\\xff",
        ] {
            let line = [
                br#"{"timestamp":1,"source_ip":"192.0.2.1","path":""#,
                path,
                br#"","status":200}"#,
            ]
            .concat();
            assert_eq!(
                ok(&line).1,
                "192.0.2.1",
                "{}",
                String::from_utf8_lossy(path)
            );
        }
    }

    #[test]
    fn addresses_elsewhere_in_the_line_are_nobody() {
        let line = br#"{"timestamp":1,"path":"/?source_ip=198.51.100.7&x=\",\"source_ip\":\"198.51.100.7","source_ip":"192.0.2.1","user_agent":"198.51.100.7","status":200}"#;
        assert_eq!(ok(line).1, "192.0.2.1");
    }

    #[test]
    fn what_cannot_be_read_is_refused_with_its_reason() {
        for (line, reason) in [
            ("", "EOF"),
            ("GET / 200", "expected value"),
            ("{}", "missing field"),
            (
                r#"{"timestamp":1,"source_ip":"192.0.2.1"}"#,
                "missing field `status`",
            ),
            (
                r#"{"timestamp":"now","source_ip":"192.0.2.1","status":200}"#,
                "epoch seconds or ISO 8601",
            ),
            (
                r#"{"timestamp":"NaN","source_ip":"192.0.2.1","status":200}"#,
                "epoch seconds or ISO 8601",
            ),
            (
                r#"{"timestamp":1e300,"source_ip":"192.0.2.1","status":200}"#,
                "epoch seconds or ISO 8601",
            ),
            (
                r#"{"timestamp":-5,"source_ip":"192.0.2.1","status":200}"#,
                "epoch seconds or ISO 8601",
            ),
            (
                r#"{"timestamp":1,"source_ip":"192.0.2.1","status":2000}"#,
                "0 to 999",
            ),
            (
                r#"{"timestamp":1,"source_ip":"unix:","status":200}"#,
                "source_ip is not an IP address",
            ),
            (
                r#"{"timestamp":1,"source_ip":"192.0.2.1, 198.51.100.7","status":200}"#,
                "source_ip is not an IP address",
            ),
            (
                r#"{"timestamp":1,"source_ip":"192.0.2.1","status":200} {"#,
                "trailing characters",
            ),
        ] {
            let error = parse(line.as_bytes()).expect_err(line).to_string();
            assert!(error.contains(reason), "{line}: {error}");
        }
    }

    proptest! {
        /// Whatever bytes an attacker gets into a value, the address is the one of the field or the line is refused.
        #[test]
        fn no_value_can_become_the_address(value in prop::collection::vec(any::<u8>().prop_filter("a quote ends the value", |b| *b != b'"'), 0..60)) {
            let line = [br#"{"timestamp":1,"path":""#, value.as_slice(), br#"","source_ip":"192.0.2.1","status":200}"#].concat();
            if let Ok(record) = parse(&line) {
                prop_assert_eq!(record.client.to_string(), "192.0.2.1");
            }
        }

        #[test]
        fn no_input_panics(line in prop::collection::vec(any::<u8>(), 0..200)) {
            drop(parse(&line));
        }
    }
}
