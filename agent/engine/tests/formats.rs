//! Lines as Nginx writes them, with whatever clients send in them: the record is Nginx's, never the client's.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test panics with its evidence"
)]

use std::net::IpAddr;

use portcullis_engine::{
    Timestamp,
    parse::{Fields, Format, Record},
};
use proptest::prelude::*;

const COMBINED: &str = r#"$remote_addr - $remote_user [$time_local] "$request" $status $body_bytes_sent "$http_referer" "$http_user_agent""#;

fn format(text: &str) -> Format {
    Format::new(text, Fields::default()).unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn read(format: &Format, line: &[u8]) -> Record {
    format
        .read(line)
        .unwrap_or_else(|error| panic!("{}: {error}", String::from_utf8_lossy(line)))
}

fn record(secs: u64, client: &str, status: u16) -> Record {
    Record::new(Timestamp::from_secs(secs), client.parse().unwrap(), status)
}

#[test]
fn combined_lines_of_nginx_and_apache_are_read() {
    let same = [
        format("combined"),
        format("auto"),
        format(COMBINED),
        format(&format!("log_format main '{COMBINED}';")),
        format(
            r#"
            log_format  main  escape=default  # as it was shipped
                '$remote_addr - $remote_user [$time_local] "$request" '
                '$status $body_bytes_sent "$http_referer" '
                '"$http_user_agent"' ;
            "#,
        ),
    ];
    for format in same {
        for (line, expected) in [
            (
                r#"2001:db8:85a3::8a2e:370:7334 - - [22/Oct/2021:02:28:56 -0700] "GET /Datasets%20Description/ftp.html HTTP/1.1" 200 1486 "-" "Mozilla/5.0 (compatible; AhrefsBot/7.0; +http://ahrefs.com/robot/)""#,
                record(1_634_894_936, "2001:db8:85a3::8a2e:370:7334", 200),
            ),
            (
                r#"::ffff:192.0.2.1 - mallory [22/Nov/2026:18:11:06 +0000] "\x16\x03\x01\x02" 400 157 "-" "-" "198.51.100.7""#,
                record(1_795_371_066, "192.0.2.1", 400),
            ),
            (
                r#"192.0.2.1 - - [22/Nov/2026:18:11:06 +0000] "GET /a\"b\\ HTTP/1.1" 404 153 "x\"" "198.51.100.7""#,
                record(1_795_371_066, "192.0.2.1", 404),
            ),
            (
                r#"192.0.2.1 - - [22/Nov/2026:18:11:06 +0000] "" 000 0 "-" "-""#,
                record(1_795_371_066, "192.0.2.1", 0),
            ),
        ] {
            assert_eq!(read(&format, line.as_bytes()), expected, "{line}");
        }
    }
    // The common format, and formats that go on otherwise after the status.
    for rest in ["200 1486", "200", r#"200 0.001 "-""#, "200 "] {
        let line = format!(r#"192.0.2.1 - - [22/Nov/2026:18:11:06 +0000] "GET / HTTP/1.1" {rest}"#);
        assert_eq!(
            read(&format("combined"), line.as_bytes()),
            record(1_795_371_066, "192.0.2.1", 200)
        );
    }
}

#[test]
fn a_line_of_another_format_is_refused() {
    let combined = format("combined");
    for (line, reason) in [
        ("", r#"no " - " in """#),
        (
            r#"unix: - - [22/Nov/2026:18:11:06 +0000] "GET / HTTP/1.1" 200 1"#,
            "$remote_addr is not an IP address",
        ),
        // Who logs $proxy_add_x_forwarded_for has the client's word first.
        (
            r#"198.51.100.7, 192.0.2.1 - - [22/Nov/2026:18:11:06 +0000] "GET / HTTP/1.1" 200 1"#,
            r#"no " - ""#,
        ),
        (
            r#"shop.example 192.0.2.1 - - [22/Nov/2026:18:11:06 +0000] "GET / HTTP/1.1" 200 1"#,
            r#"no " - ""#,
        ),
        (
            r#"192.0.2.1 - - [22/Nov/2026:18:11:06] "GET / HTTP/1.1" 200 1"#,
            "no $time_local",
        ),
        (
            r#"192.0.2.1 - - [22/Nuv/2026:18:11:06 +0000] "GET / HTTP/1.1" 200 1"#,
            "no time",
        ),
        (
            r#"192.0.2.1 - - [22/Nov/2026:18:11:06 +0000] "GET / HTTP/1.1" 2000 1"#,
            "no status",
        ),
        (
            r#"192.0.2.1 - - [22/Nov/2026:18:11:06 +0000] "GET / HTTP/1.1" - 1"#,
            "no status",
        ),
        (
            r#"192.0.2.1 - - [22/Nov/2026:18:11:06 +0000] "GET / HTTP/1.1\" 200 1"#,
            "no further double quote",
        ),
        (
            "192.0.2.1 - - [22/Nov/2026:18:11:06 +0000] ",
            "no closing double quote",
        ),
        (
            r#"{"timestamp":1,"source_ip":"192.0.2.1","status":200}"#,
            r#"no " - ""#,
        ),
    ] {
        let error = combined.read(line.as_bytes()).expect_err(line).to_string();
        assert!(error.contains(reason), "{line}: {error}");
    }
}

/// Formats, and whether the time in them has milliseconds and the line a peer.
const FORMATS: [(&str, bool, bool); 6] = [
    (COMBINED, false, false),
    (
        r#"$remote_addr ($realip_remote_addr) [$time_iso8601] "$host" "$request" $uri rt=$request_time $status $msec"#,
        true,
        true,
    ),
    (
        r#""$http_user_agent"|$msec|$remote_user:$status|$remote_addr|"$request"|$args"#,
        true,
        false,
    ),
    (
        "$request$time_local$request_id $remote_addr, $status",
        false,
        false,
    ),
    (
        r#"{"time":"$msec","ua":"$http_user_agent","ip":"$remote_addr","request":"$request","status":$status,"via":"$realip_remote_addr","user":"$remote_user"}"#,
        true,
        true,
    ),
    (
        r#"{"user":"$remote_user","time":"$time_local","ip":"$remote_addr","request":"$request","status":"$status"}"#,
        false,
        false,
    ),
];

/// A value as Nginx writes it into the log.
fn escaped(value: &[u8], json: bool) -> Vec<u8> {
    let mut out = Vec::new();
    if value.is_empty() && !json {
        out.push(b'-');
    }
    for byte in value {
        match (*byte, json) {
            (b'"' | b'\\', true) => out.extend([b'\\', *byte]),
            (b'\n', true) => out.extend(br"\n"),
            (b'\t', true) => out.extend(br"\t"),
            (0..0x20, true) => out.extend(format!("\\u{byte:04X}").bytes()),
            (b'"' | b'\\' | 0..0x20 | 0x7F.., false) => {
                out.extend(format!("\\x{byte:02X}").bytes());
            }
            (byte, _) => out.push(byte),
        }
    }
    out
}

/// A line with Nginx's values for Nginx's variables, and clients' for all others, in turn.
fn line(format: &str, record: &Record, json: bool, hostile: &[Vec<u8>]) -> Vec<u8> {
    let mut hostile = hostile.iter().cycle();
    let mut pieces = format.split('$');
    let mut line = pieces.next().unwrap_or_default().as_bytes().to_vec();
    for piece in pieces {
        let end = piece
            .find(|c: char| !c.is_ascii_alphanumeric() && c != '_')
            .unwrap_or(piece.len());
        let (name, text) = piece.split_at(end);
        let at = jiff::Timestamp::from_millisecond(record.at.millis().try_into().unwrap()).unwrap();
        let value = match name {
            "remote_addr" => record.client.to_string().into_bytes(),
            "realip_remote_addr" => record
                .peer
                .map_or("-".to_owned(), |peer| peer.to_string())
                .into_bytes(),
            "status" => format!("{:03}", record.status).into_bytes(),
            "msec" => format!("{}.{:03}", record.at.secs(), record.at.millis() % 1000).into_bytes(),
            "time_local" => at
                .strftime("%d/%b/%Y:%H:%M:%S +0000")
                .to_string()
                .into_bytes(),
            "time_iso8601" => at
                .strftime("%Y-%m-%dT%H:%M:%S+00:00")
                .to_string()
                .into_bytes(),
            "request_time" | "body_bytes_sent" => b"0.123".to_vec(),
            "request_id" => b"0123456789abcdef0123456789abcdef".to_vec(),
            _ => escaped(hostile.next().unwrap(), json),
        };
        line.extend(value);
        line.extend(text.bytes());
    }
    line
}

/// What a client might send to be somebody else, or nobody.
fn hostile() -> impl Strategy<Value = Vec<u8>> {
    let fragments = [
        " ",
        "\"",
        "\\",
        "\\\"",
        "\\x22",
        "-",
        " - ",
        "[",
        "] ",
        " [",
        "|",
        ":",
        ",",
        "{",
        "}",
        "\n",
        "\t",
        "500",
        " 500 ",
        "\" 500 ",
        "|500|",
        "198.51.100.7",
        "198.51.100.7 - ",
        " (198.51.100.7) [",
        "|198.51.100.7|",
        ":500|198.51.100.7|",
        "2001:db8::bad",
        "[01/Jan/2020:00:00:00 +0000]",
        "01/Jan/2020:00:00:00 +0000",
        "2020-01-01T00:00:00+00:00",
        "1577836800.000",
        " 500 1577836800.000",
        "\" 500 1577836800.000",
        "] \"GET / HTTP/1.1\" 500 ",
        "\",\"ip\":\"198.51.100.7\",\"x\":\"",
        "\"ip\"",
        "é",
    ];
    let piece = prop_oneof![
        4 => prop::sample::select(fragments.to_vec()).prop_map(|text| text.as_bytes().to_vec()),
        1 => prop::collection::vec(any::<u8>(), 1..4),
    ];
    prop::collection::vec(piece, 0..6).prop_map(|pieces| pieces.concat())
}

fn records() -> impl Strategy<Value = Record> {
    let address = prop_oneof![
        any::<[u8; 4]>().prop_map(IpAddr::from),
        any::<[u8; 16]>().prop_map(|octets| IpAddr::from(octets).to_canonical()),
    ];
    (
        0..4_102_444_800_000_u64,
        address.clone(),
        0..1000_u16,
        prop::option::of(address),
    )
        .prop_map(|(millis, client, status, peer)| Record {
            peer,
            ..Record::new(Timestamp::from_millis(millis), client, status)
        })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_client_is_lost_or_passes_for_another(
        mut record in records(),
        json: bool,
        hostile in prop::collection::vec(hostile(), 1..4),
        which in 0..FORMATS.len(),
    ) {
        let (text, millis, peer) = FORMATS[which];
        // Unquoted in JSON, a status of two digits would be no number.
        if text.starts_with('{') {
            record.status = record.status.max(100);
        }
        let line = line(text, &record, json, &hostile);
        let expected = Record {
            at: if millis { record.at } else { Timestamp::from_secs(record.at.secs()) },
            peer: record.peer.filter(|_| peer),
            ..record
        };
        prop_assert_eq!(read(&format(text), &line), expected, "{}", String::from_utf8_lossy(&line));
        if text == COMBINED {
            prop_assert_eq!(read(&Format::default(), &line), expected);
        }
    }

    /// A line that has lost bytes is refused, or it is still about Nginx's client.
    #[test]
    fn a_line_cut_short_accuses_nobody_else(
        record in records(),
        hostile in prop::collection::vec(hostile(), 1..4),
        cut: prop::sample::Index,
    ) {
        let line = line(COMBINED, &record, false, &hostile);
        if let Ok(read) = format(COMBINED).read(&line[..cut.index(line.len())]) {
            prop_assert_eq!((read.client, read.at.secs()), (record.client, record.at.secs()));
        }
    }
}
