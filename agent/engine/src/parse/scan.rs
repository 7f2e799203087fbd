//! The line as Nginx writes it, read in one pass. Whatever is not exactly so is left to `serde_json`, which is right about
//! everything; a test holds the two against each other.

use super::{Field, Fields, Record, target, value};

/// The record of a line that is one flat object of ASCII keys, and strings and numbers without escapes, in which no field
/// stands twice. `None` for every other line, good or bad.
pub(super) fn scan(line: &[u8], fields: &Fields, key: u64) -> Option<Record> {
    is_plain(line).then_some(())?;
    let mut rest = Rest(line);
    let (mut at, mut client, mut status, mut peer) = (None, None, None, None);
    let (mut path, mut agent, mut method) = (None, None, None);
    rest.take(b"{\"")?;
    loop {
        let name = rest.string()?;
        // Most formats have no spaces here, and it pays to take two bytes at once.
        let mut quoted = rest.take(b":\"").is_some();
        if !quoted {
            rest.spaces();
            rest.take(b":")?;
            rest.spaces();
            quoted = rest.take(b"\"").is_some();
        }
        let value = if quoted {
            Value::String(rest.string()?)
        } else {
            Value::Number(rest.number()?)
        };
        match (fields.of_key(name), value) {
            (Some(Field::Time), Value::String(text)) if at.is_none() => {
                at = Some(value::time(text)?);
            }
            (Some(Field::Time), Value::Number(text)) if at.is_none() => {
                at = Some(value::epoch(text)?);
            }
            (Some(Field::Client), Value::String(text)) if client.is_none() => {
                client = Some(value::address(text)?);
            }
            (Some(Field::Status), Value::String(text) | Value::Number(text))
                if status.is_none() =>
            {
                status = Some(value::status(text)?);
            }
            (Some(Field::Peer), Value::String(text)) if peer.is_none() => {
                peer = Some(value::peer(text).ok()?);
            }
            (Some(Field::Path), Value::String(text)) if path.is_none() => path = Some(text),
            (Some(Field::Agent), Value::String(text)) if agent.is_none() => agent = Some(text),
            (Some(Field::Method), Value::String(text)) if method.is_none() => method = Some(text),
            (Some(_), _) => return None,
            // `serde_json` wants UTF-8 of it.
            (None, _) if !name.is_ascii() => return None,
            (None, _) => {}
        }
        if rest.take(b",\"").is_none() {
            rest.spaces();
            if rest.take(b",").is_none() {
                break;
            }
            rest.spaces();
            rest.take(b"\"")?;
        }
    }
    rest.take(b"}")?;
    rest.0.is_empty().then_some(())?;
    let (target, requested) = path.and_then(|text| target::target(text, key)).unzip();
    Some(Record {
        peer: peer.flatten(),
        target,
        method: method.and_then(target::method).or(requested.flatten()),
        agent: agent.and_then(|text| target::agent(text, key)),
        ..Record::new(at?, client?, status?)
    })
}

#[derive(Clone, Copy)]
enum Value<'a> {
    String(&'a [u8]),
    Number(&'a [u8]),
}

/// What is not read yet.
struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn take<const N: usize>(&mut self, bytes: &[u8; N]) -> Option<()> {
        self.0 = self.0.strip_prefix(bytes)?;
        Some(())
    }

    fn spaces(&mut self) {
        while self.take(b" ").is_some() {}
    }

    /// Up to the quote that ends it.
    #[inline(always)]
    fn string(&mut self) -> Option<&'a [u8]> {
        let (text, rest) = self.0.split_at_checked(quote(self.0)?)?;
        self.0 = rest.get(1..)?;
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

/// Is there neither an escape nor a control character? Of all bytes at once, without a branch, which is vectorised.
fn is_plain(line: &[u8]) -> bool {
    let odd = |byte: u8| u8::from(byte < 0x20) | u8::from(byte == b'\\');
    line.iter().fold(0, |seen, byte| seen | odd(*byte)) == 0
}

/// Where the first quote is. Eight bytes at a time (Mycroft's test for a byte in a word; the lowest byte that it finds is one,
/// those above it may not be).
#[inline(always)]
fn quote(text: &[u8]) -> Option<usize> {
    const ONES: u64 = 0x0101_0101_0101_0101;
    const HIGH: u64 = 0x8080_8080_8080_8080;
    let (words, rest) = text.as_chunks::<8>();
    for (index, word) in words.iter().enumerate() {
        let word = u64::from_le_bytes(*word) ^ (ONES * u64::from(b'"'));
        let found = word.wrapping_sub(ONES) & !word & HIGH;
        if found != 0 {
            return Some(index * 8 + found.trailing_zeros() as usize / 8);
        }
    }
    let found = rest.iter().position(|byte| *byte == b'"')?;
    Some(words.len() * 8 + found)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::json::exactly, *};

    /// Whatever this reads, `serde_json` reads the same, with the default names and with others.
    fn agree(line: &[u8]) -> Option<Record> {
        let others = Fields {
            time: "time".to_owned(),
            client: "remote".to_owned(),
            status: "code".to_owned(),
            peer: "via".to_owned(),
            path: "request".to_owned(),
            user_agent: "ua".to_owned(),
            method: "verb".to_owned(),
        };
        agree_with(line, &Fields::default()).or(agree_with(line, &others))
    }

    fn agree_with(line: &[u8], fields: &Fields) -> Option<Record> {
        let scanned = scan(line, fields, 7);
        if let Some(record) = scanned {
            let right = exactly(line, fields, Some(7));
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
            r#"{"timestamp":"2026-11-22T18:11:06+00:00","source_ip":"192.0.2.1","status":"200","realip_remote_addr":"10.0.0.1"}"#,
            r#"{"time":"22/Nov/2026:18:11:06 +0000","remote":"192.0.2.1","code":404,"via":"","status":"x"}"#,
            r#"{"time":1,"remote":"192.0.2.1","code":404,"request":"GET /a?b HTTP/1.1","ua":"curl/8.5.0","path":1,"user_agent":2}"#,
            r#"{"timestamp":1,"source_ip":"192.0.2.1","path":"","user_agent":"-","method":"-","status":200}"#,
            r#"{"timestamp":1,"source_ip":"192.0.2.1","method":"","path":"POST /a HTTP/1.1","status":200}"#,
            r#"{"time":1,"remote":"192.0.2.1","code":404,"request":"- /","verb":"GET /a HTTP/1.1","method":1}"#,
        ] {
            assert!(agree(line.as_bytes()).is_some(), "{line}");
        }
        // What clients write need not be UTF-8.
        for name in ["path", "user_agent", "method", "other"] {
            let line = [
                br#"{"timestamp":1,"source_ip":"192.0.2.1","status":200,""#,
                name.as_bytes(),
                b"\":\"/\xff\xc3\"}",
            ]
            .concat();
            assert!(agree(&line).is_some(), "{name}");
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
            r#"{"timestamp":1,"source_ip":"192.0.2.1","path":1,"status":200}"#,
            r#"{"timestamp":1,"source_ip":"192.0.2.1","path":"/a","path":"/a","status":200}"#,
            r#"{"timestamp":1,"source_ip":"192.0.2.1","user_agent":"","user_agent":"a","status":200}"#,
            r#"{"timestamp":1,"source_ip":"192.0.2.1","method":1,"status":200}"#,
            r#"{"timestamp":1,"source_ip":"192.0.2.1","method":"GET","method":"GET","status":200}"#,
            r#"{"timestamp":1,"source_ip":"192.0.2.1","method":"\u0047ET","status":200}"#,
            "{\"timestamp\":1,\"source_ip\":\"192.0.2.1\",\"path\":\"a\tb\",\"status\":200}",
        ] {
            assert!(agree(line.as_bytes()).is_none(), "{line}");
        }
    }

    #[test]
    fn the_first_quote_is_found_wherever_it_stands() {
        for length in 0..40 {
            for at in 0..length {
                // What could be taken for one by a borrow from below.
                for other in [b'!', b'#', 0x20, 0x21, 0x23, 0x7F, 0x80, 0xA2, 0xFF] {
                    let mut text = vec![other; length];
                    text[at] = b'"';
                    assert_eq!(quote(&text), Some(at));
                    text[at] = other;
                    assert_eq!(quote(&text), None);
                }
            }
        }
    }

    #[test]
    fn an_escape_or_a_control_character_is_seen_wherever_it_stands() {
        for length in 0..70 {
            let mut text = vec![b' '; length];
            for at in 0..length {
                for (byte, plain) in [
                    (0, false),
                    (0x1F, false),
                    (b'\\', false),
                    (0x7F, true),
                    (0xFF, true),
                ] {
                    text[at] = byte;
                    assert_eq!(is_plain(&text), plain);
                }
                text[at] = b' ';
            }
        }
    }

    /// A line as it should be, with some bytes of it replaced, taken out or put in.
    fn bent() -> impl Strategy<Value = Vec<u8>> {
        let lines = prop::sample::select(vec![
            r#"{"timestamp":"1700000000.123","source_ip":"192.0.2.1","method":"GET","path":"/a","status":"404"}"#,
            r#"{"timestamp":1700000000.5,"source_ip":"2001:db8::1","path":"/é","status":200,"x":1.5}"#,
            r#"{"timestamp":"2026-11-22T18:11:06+00:00","realip_remote_addr":"-","source_ip":"192.0.2.1","status":200}"#,
            r#"{"time":"22/Nov/2026:18:11:06 +0000","remote":"192.0.2.1","code":404,"via":"10.0.0.1","status":"x"}"#,
            r#"{"timestamp":1,"source_ip":"192.0.2.1","status":200,"path":"/a.css","user_agent":"curl/8.5.0"}"#,
            r#"{"time":1,"request":"GET /a?b HTTP/1.1","ua":"-","remote":"192.0.2.1","code":404,"ub":"x"}"#,
            r#"{"time":1,"verb":"-","request":"POST /a","remote":"192.0.2.1","code":404,"verc":"GET"}"#,
        ]);
        let byte = prop_oneof![
            prop::sample::select(br#"{}":,\.0123456789aeE+- []u/"#.to_vec()),
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
        fn a_method_is_what_serde_json_makes_of_it(method in "(GET|POST|HEAD|get|-)?[ /a-]?", path in "(GET|POST|-)?[ /]{0,2}[a -]{0,2}", turned: bool) {
            let (method, path) = (format!(r#""method":"{method}""#), format!(r#""path":"{path}""#));
            let (one, other) = if turned { (path, method) } else { (method, path) };
            let line = format!(r#"{{"timestamp":1,{one},"source_ip":"192.0.2.1",{other},"status":200}}"#);
            prop_assert!(agree(line.as_bytes()).is_some());
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
