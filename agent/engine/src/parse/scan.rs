//! The line as Nginx writes it, read in one pass. Whatever is not exactly so is left to `serde_json`, which is right about
//! everything; a test holds the two against each other.

use std::net::{IpAddr, Ipv4Addr};

use super::Record;
use crate::time::Timestamp;

/// The record of a line that is one flat object of ASCII keys, and strings and numbers without escapes, in which each of the
/// three fields stands once. `None` for every other line, good or bad.
pub(super) fn scan(line: &[u8]) -> Option<Record> {
    let mut rest = Rest(line);
    let (mut at, mut client, mut status) = (None, None, None);
    rest.take(b'{')?;
    loop {
        rest.take(b'"')?;
        let key = rest.string()?;
        rest.spaces();
        rest.take(b':')?;
        rest.spaces();
        let value = if rest.take(b'"').is_some() {
            Value::String(rest.string()?)
        } else {
            Value::Number(rest.number()?)
        };
        match key {
            b"timestamp" if at.is_none() => at = Some(timestamp(value)?),
            b"source_ip" if client.is_none() => client = Some(address(value)?),
            b"status" if status.is_none() => status = Some(code(value)?),
            b"timestamp" | b"source_ip" | b"status" => return None,
            // `serde_json` wants UTF-8 of it.
            key if !key.is_ascii() => return None,
            _ => {}
        }
        rest.spaces();
        if rest.take(b',').is_none() {
            break;
        }
        rest.spaces();
    }
    rest.take(b'}')?;
    rest.0.is_empty().then_some(())?;
    Some(Record {
        at: at?,
        client: client?,
        status: status?,
    })
}

#[derive(Clone, Copy)]
enum Value<'a> {
    String(&'a [u8]),
    Number(&'a [u8]),
}

impl<'a> Value<'a> {
    const fn text(self) -> &'a [u8] {
        match self {
            Self::String(text) | Self::Number(text) => text,
        }
    }
}

/// Epoch seconds, with at most three digits of a fraction. Every such number is exact in milliseconds, as it is when it goes
/// through a floating-point number.
fn timestamp(value: Value<'_>) -> Option<Timestamp> {
    let text = value.text();
    let point = text.iter().position(|byte| *byte == b'.');
    let (whole, fraction) = match point {
        Some(point) => (&text[..point], &text[point + 1..]),
        None => (text, &b""[..]),
    };
    if point.is_some() && fraction.is_empty() || fraction.len() > 3 {
        return None;
    }
    let millis = match fraction.len() {
        0 => 0,
        len => digits(fraction)? * 10_u64.pow(3 - u32::try_from(len).ok()?),
    };
    // Far below the end of time.
    (whole.len() <= 10).then_some(())?;
    Some(Timestamp::from_millis(digits(whole)? * 1000 + millis))
}

fn address(value: Value<'_>) -> Option<IpAddr> {
    let Value::String(text) = value else {
        return None;
    };
    if let Some(address) = dotted(text) {
        return Some(address.into());
    }
    let address: IpAddr = str::from_utf8(text).ok()?.parse().ok()?;
    Some(address.to_canonical())
}

/// Four numbers up to 255, without leading zeros.
fn dotted(text: &[u8]) -> Option<Ipv4Addr> {
    let mut octets = [0u8; 4];
    let (mut place, mut digits) = (0, 0);
    for byte in text {
        let octet = octets.get_mut(place)?;
        match byte {
            b'0'..=b'9' if digits == 0 || *octet > 0 => {
                *octet = octet.checked_mul(10)?.checked_add(byte - b'0')?;
                digits += 1;
            }
            b'.' if digits > 0 => (place, digits) = (place + 1, 0),
            _ => return None,
        }
    }
    (place == 3 && digits > 0).then(|| octets.into())
}

fn code(value: Value<'_>) -> Option<u16> {
    let text = value.text();
    (text.len() <= 3).then_some(())?;
    u16::try_from(digits(text)?).ok()
}

/// A number of at least one digit and few enough of them.
fn digits(text: &[u8]) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0, |number, byte| {
        byte.is_ascii_digit()
            .then(|| number * 10 + u64::from(byte - b'0'))
    })
}

/// What is not read yet.
struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn take(&mut self, byte: u8) -> Option<()> {
        let (first, rest) = self.0.split_first()?;
        (*first == byte).then(|| self.0 = rest)
    }

    fn spaces(&mut self) {
        while self.take(b' ').is_some() {}
    }

    /// Up to the quote that ends it; none with an escape or a control character before that.
    #[inline(always)]
    fn string(&mut self) -> Option<&'a [u8]> {
        let end = special(self.0)?;
        let (text, rest) = self.0.split_at(end);
        self.0 = rest;
        self.take(b'"')?;
        Some(text)
    }

    /// A number as JSON writes it, without sign and exponent.
    fn number(&mut self) -> Option<&'a [u8]> {
        let end = self
            .0
            .iter()
            .position(|byte| !byte.is_ascii_digit() && *byte != b'.')?;
        let (text, rest) = self.0.split_at(end);
        self.0 = rest;
        let is_number = match text {
            [b'0'] | [b'0', b'.', _, ..] => true,
            [first, ..] => first.is_ascii_digit() && *first != b'0',
            [] => false,
        };
        let parts = text.split(|byte| *byte == b'.').count();
        (is_number && parts <= 2 && text.last() != Some(&b'.')).then_some(text)
    }
}

/// Where the first quote, backslash or control character is. Eight bytes at a time (Mycroft's test for a byte in a word; the
/// lowest byte that it finds is one, those above it may not be).
#[inline(always)]
fn special(text: &[u8]) -> Option<usize> {
    const ONES: u64 = 0x0101_0101_0101_0101;
    const HIGH: u64 = 0x8080_8080_8080_8080;
    const fn zero(word: u64) -> u64 {
        word.wrapping_sub(ONES) & !word & HIGH
    }
    let (words, rest) = text.as_chunks::<8>();
    for (index, word) in words.iter().enumerate() {
        let word = u64::from_le_bytes(*word);
        let quote = zero(word ^ (ONES * u64::from(b'"')));
        let escape = zero(word ^ (ONES * u64::from(b'\\')));
        let control = word.wrapping_sub(ONES * 0x20) & !word & HIGH;
        let found = quote | escape | control;
        if found != 0 {
            return Some(index * 8 + found.trailing_zeros() as usize / 8);
        }
    }
    let found = rest
        .iter()
        .position(|byte| matches!(byte, b'"' | b'\\' | ..0x20))?;
    Some(words.len() * 8 + found)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::read, *};

    /// Whatever this reads, `serde_json` reads the same.
    fn agree(line: &[u8]) -> Option<Record> {
        let scanned = scan(line);
        if let Some(record) = scanned {
            let right = read(line);
            assert!(
                right.as_ref().is_ok_and(|right| *right == record),
                "{}: {record:?}, not {right:?}",
                String::from_utf8_lossy(line)
            );
        }
        scanned
    }

    #[test]
    fn what_nginx_writes_is_read_here() {
        for line in [
            r#"{"timestamp":"1700000000.123","source_ip":"192.0.2.1","method":"GET","path":"/","status":"404","response_size":"153"}"#,
            r#"{"timestamp":1700000000.123,"source_ip":"192.0.2.1","method":"GET","path":"/","status":404,"response_size":153}"#,
            r#"{"timestamp":"1700000000","source_ip":"::ffff:192.0.2.1","path":"/ü?q=a b","status":"200"}"#,
            r#"{"status" : 0, "source_ip" : "2001:db8::1", "timestamp" : 0.5}"#,
            r#"{"timestamp":0,"source_ip":"192.0.2.1","user_agent":"","status":"007"}"#,
        ] {
            assert!(agree(line.as_bytes()).is_some(), "{line}");
        }
    }

    #[test]
    fn everything_else_is_left_to_serde_json() {
        for line in [
            "",
            "{",
            "{}",
            r#"{"timestamp":1,"source_ip":"192.0.2.1","status":200} "#,
            r#"{"timestamp":1,"source_ip":"192.0.2.1","status":200}}"#,
            r#"{"timestamp":1,"source_ip":"192.0.2.1","status":200,}"#,
            r#"{"timestamp":01,"source_ip":"192.0.2.1","status":200}"#,
            r#"{"timestamp":1.,"source_ip":"192.0.2.1","status":200}"#,
            r#"{"timestamp":"1.","source_ip":"192.0.2.1","status":200}"#,
            r#"{"timestamp":1.2.3,"source_ip":"192.0.2.1","status":200}"#,
            r#"{"timestamp":"1.2345","source_ip":"192.0.2.1","status":200}"#,
            r#"{"timestamp":1,"source_ip":"192.0.2.1","status":2000}"#,
            r#"{"timestamp":1,"source_ip":"192.0.2.1","source_ip":"192.0.2.2","status":200}"#,
            r#"{"timestamp":1,"source_ip":"192.0.2.1","path":"\"","status":200}"#,
            r#"{"timestamp":1,"source_ip":"192.0.2.1","more":{},"status":200}"#,
            r#"{"timestamp":1,"source_ip":"192.0.2.1","more":null,"status":200}"#,
            "{\"timestamp\":1,\"source_ip\":\"192.0.2.1\",\"path\":\"a\tb\",\"status\":200}",
        ] {
            assert!(agree(line.as_bytes()).is_none(), "{line}");
        }
    }

    #[test]
    fn an_ipv4_address_is_what_the_standard_library_takes_for_one() {
        for text in [
            "0.0.0.0",
            "255.255.255.255",
            "192.0.2.1",
            "01.2.3.4",
            "1.2.3.04",
            "00.0.0.0",
            "1.2.3",
            "1.2.3.4.5",
            "1..2.3",
            ".1.2.3.4",
            "1.2.3.4.",
            "256.1.1.1",
            "1.1.1.999",
            "1.1.1.1 ",
            "",
            "1",
            "a.b.c.d",
            "1.2.3.-4",
        ] {
            assert_eq!(dotted(text.as_bytes()), text.parse().ok(), "{text}");
        }
    }

    #[test]
    fn the_first_special_byte_is_found_wherever_it_stands() {
        for length in 0..40 {
            for at in 0..length {
                for byte in [b'"', b'\\', 0, 0x1F] {
                    // What could be taken for one by a borrow from below.
                    for other in [b'!', b'#', b'[', b']', 0x20, 0x7F, 0x80, 0xFF] {
                        let mut text = vec![other; length];
                        text[at] = byte;
                        assert_eq!(special(&text), Some(at));
                        text[at] = other;
                        assert_eq!(special(&text), None);
                    }
                }
            }
        }
    }

    /// A line as it should be, with some bytes of it replaced, taken out or put in.
    fn bent() -> impl Strategy<Value = Vec<u8>> {
        let lines = prop::sample::select(vec![
            r#"{"timestamp":"1700000000.123","source_ip":"192.0.2.1","method":"GET","path":"/a","status":"404"}"#,
            r#"{"timestamp":1700000000.5,"source_ip":"2001:db8::1","path":"/é","status":200,"x":1.5}"#,
        ]);
        let byte = prop_oneof![
            prop::sample::select(br#"{}":,\.0123456789aeE+- []u"#.to_vec()),
            any::<u8>()
        ];
        let bends = prop::collection::vec((any::<prop::sample::Index>(), byte, 0..3), 0..4);
        (lines, bends).prop_map(|(line, bends)| {
            let mut line = line.as_bytes().to_vec();
            for (at, byte, how) in bends {
                let at = at.index(line.len());
                match how {
                    0 => line[at] = byte,
                    1 => line.insert(at, byte),
                    _ => drop(line.remove(at)),
                }
            }
            line
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 20_000, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn a_bent_line_is_read_as_serde_json_reads_it(line in bent()) {
            agree(&line);
        }

        #[test]
        fn a_time_is_what_serde_json_makes_of_it(secs in 0u64..20_000_000_000, fraction in "[0-9]{0,4}", quoted: bool) {
            let point = if fraction.is_empty() { "" } else { "." };
            let quote = if quoted { "\"" } else { "" };
            let line = format!(
                r#"{{"timestamp":{quote}{secs}{point}{fraction}{quote},"source_ip":"192.0.2.1","status":200}}"#
            );
            agree(line.as_bytes());
        }
    }
}
