//! Lines as Nginx writes them, with whatever clients send in them: the record is Nginx's, never the client's.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test panics with its evidence"
)]

use std::{
    collections::BTreeMap,
    hash::{BuildHasher as _, Hasher as _},
    net::IpAddr,
};

use foldhash::fast::FixedState;
use portcullis_engine::{
    Timestamp,
    parse::{Fields, Format, Method, Record, Target},
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

fn is_there(text: &[u8]) -> bool {
    !matches!(text, b"" | b"-")
}

fn target(text: &[u8]) -> Option<Target> {
    is_there(text).then(|| Target::of(text, 0))
}

fn agent(text: &[u8]) -> Option<u32> {
    let mut hasher = FixedState::with_seed(0).build_hasher();
    hasher.write(text);
    let hash = hasher.finish();
    is_there(text).then(|| u32::try_from((hash ^ (hash >> 32)) & 0xFFFF_FFFF).unwrap())
}

/// Of the first word.
fn method(text: &[u8]) -> Option<Method> {
    let word = text.split(|byte| *byte == b' ').next()?;
    is_there(word).then(|| Method::of(word))
}

/// Of a `$request`, which begins with one.
fn requested(text: &[u8]) -> Option<Method> {
    let end = text.iter().position(|byte| *byte == b' ')?;
    let word = &text[..end];
    method(word).filter(|_| !word.contains(&b'/'))
}

/// With a method that only asks.
fn safe(record: Record) -> Record {
    Record {
        method: Some(Method::Safe),
        ..record
    }
}

/// What was asked for, and by what.
fn asked(record: Record, path: &str, user_agent: &str) -> Record {
    Record {
        target: target(path.as_bytes()),
        agent: agent(user_agent.as_bytes()),
        ..record
    }
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
                safe(asked(
                    record(1_634_894_936, "2001:db8:85a3::8a2e:370:7334", 200),
                    "/Datasets%20Description/ftp.html",
                    "Mozilla/5.0 (compatible; AhrefsBot/7.0; +http://ahrefs.com/robot/)",
                )),
            ),
            (
                r#"::ffff:192.0.2.1 - mallory [22/Nov/2026:18:11:06 +0000] "\x16\x03\x01\x02" 400 157 "-" "-" "198.51.100.7""#,
                asked(
                    record(1_795_371_066, "192.0.2.1", 400),
                    r"\x16\x03\x01\x02",
                    "-",
                ),
            ),
            (
                r#"192.0.2.1 - - [22/Nov/2026:18:11:06 +0000] "GET /a\"b\\ HTTP/1.1" 404 153 "x\"" "198.51.100.7""#,
                safe(asked(
                    record(1_795_371_066, "192.0.2.1", 404),
                    r#"/a\"b\\"#,
                    "198.51.100.7",
                )),
            ),
            (
                r#"192.0.2.1 - - [22/Nov/2026:18:11:06 +0000] "POST /a HTTP/1.1" 404 153 "-" "-""#,
                Record {
                    method: Some(Method::Unsafe),
                    ..asked(record(1_795_371_066, "192.0.2.1", 404), "/a", "-")
                },
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
    for rest in [
        "200 1486",
        "200",
        r#"200 0.001 "-""#,
        "200 ",
        r#"200 1486 "-" "curl"#,
        r#"200 1486 0.001 "-" "curl/8.5.0""#,
        r#"200 1486 "-"  "curl/8.5.0""#,
        r#"200 1486 "-", "curl/8.5.0""#,
        r#"200 - "192.0.2.9" upstream "curl/8.5.0""#,
        r#"200 "-" "-" "curl/8.5.0""#,
    ] {
        let line = format!(r#"192.0.2.1 - - [22/Nov/2026:18:11:06 +0000] "GET / HTTP/1.1" {rest}"#);
        assert_eq!(
            read(&format("combined"), line.as_bytes()),
            safe(asked(record(1_795_371_066, "192.0.2.1", 200), "/", "")),
            "{line}"
        );
    }
}

#[test]
fn path_user_agent_and_method_are_read_from_json_however_it_is_written() {
    let expected = |client: &str| {
        safe(asked(
            record(1_795_371_066, client, 404),
            "/a/b.css?x=1",
            "curl/8.5.0",
        ))
    };
    let own = format(
        r#"{"t":"$msec","ip":"$remote_addr","s":"$status","r":"$request","u":"$uri","path":"$http_x","target":"$request_uri","ua":"$http_user_agent"}"#,
    );
    let all = format(
        r#"{"t":"$msec","ip":"$remote_addr","s":"$status","target":"$request_uri","m":"$request_method","method":"$http_x","r":"$request","ua":"$http_user_agent"}"#,
    );
    let one = format(
        r#"{"t":"$msec","ip":"$remote_addr","s":"$status","r":"$request","ua":"$http_user_agent"}"#,
    );
    let none = format(
        r#"{"t":"$msec","ip":"$remote_addr","s":"$status","path":"$uri$is_args$args","user_agent":"as $http_user_agent"}"#,
    );
    for (format, line) in [
        (
            &format("json"),
            r#"{"timestamp":1795371066,"source_ip":"192.0.2.1","method":"GET","path":"/a/b.css?x=1","status":404,"user_agent":"curl/8.5.0"}"#,
        ),
        (
            &format("json"),
            r#"{"timestamp":1795371066,"source_ip":"192.0.2.1","path":"GET /a/b.css?x=1 HTTP/1.1","status":404,"user_agent":"curl/8.5.0"}"#,
        ),
        // By way of serde_json.
        (
            &format("json"),
            r#"{"timestamp":1795371066,"source_ip":"192.0.2.1","method":"G\u0045T","path":"\/a\u002fb.css?x=1","status":404,"user_agent":"\u0063url\/8.5.0","x":{}}"#,
        ),
        (
            &format("json"),
            r#"{"timestamp":1795371066,"source_ip":"192.0.2.1","path":"GET \/a\u002fb.css?x=1","method":null,"status":404,"user_agent":"\u0063url\/8.5.0","x":{}}"#,
        ),
        // Repaired.
        (
            &format("auto"),
            r#"{"timestamp":1795371066,"source_ip":"192.0.2.1","method":"GE\x54","path":"\x2Fa/b.css?x=1","status":404,"user_agent":"curl\x2f8.5.0"}"#,
        ),
        (
            &own,
            r#"{"t":"1795371066.000","ip":"192.0.2.1","s":"404","r":"GET /z HTTP/1.1","u":"/z","path":"/z","target":"/a/b.css?x=1","ua":"curl/8.5.0","user_agent":"z"}"#,
        ),
        (
            &all,
            r#"{"t":"1795371066.000","ip":"192.0.2.1","s":"404","target":"/a/b.css?x=1","m":"GET","method":"POST","r":"POST /z","ua":"curl/8.5.0"}"#,
        ),
        (
            &one,
            r#"{"t":"1795371066.000","ip":"192.0.2.1","s":"404","r":"GET /a/b.css?x=1 HTTP/1.1","path":"/z","ua":"curl/8.5.0"}"#,
        ),
        (
            &none,
            r#"{"t":"1795371066.000","ip":"192.0.2.1","s":"404","path":"/a/b.css?x=1","user_agent":"curl/8.5.0","method":"GET"}"#,
        ),
    ] {
        assert_eq!(
            read(format, line.as_bytes()),
            expected("192.0.2.1"),
            "{line}"
        );
    }
}

#[test]
fn path_user_agent_and_method_are_no_reason_to_lose_a_line() {
    let with = |more: &str| {
        let line = format!(r#"{{"timestamp":1,"source_ip":"192.0.2.1"{more},"status":200}}"#);
        read(&format("json"), line.as_bytes())
    };
    let plain = record(1, "192.0.2.1", 200);
    for more in [
        "",
        r#","path":"","user_agent":"","method":"""#,
        r#","path":"-","user_agent":"-","method":"-""#,
        r#","path":null,"user_agent":null,"method":null"#,
        r#","path":1,"user_agent":-1.5e400,"method":2"#,
        r#","path":{"source_ip":"198.51.100.7"},"user_agent":["a"],"method":{}"#,
        r#","method":"GET","method":"GET""#,
        r#","method":"GET","m\u0065thod":"POST","method":"GET""#,
        r#","method":"GET","method":null"#,
        r#","method":false"#,
        r#","path":true,"user_agent":[[[{}]]]"#,
        r#","path":"/a","path":"/a","user_agent":"a","user_agent":"a","user_agent":"a""#,
        r#","path":"/a","p\u0061th":"/b","path":"/c""#,
        r#","path":"/a","path":null"#,
    ] {
        assert_eq!(with(more), plain, "{more}");
    }
    // The one is not lost with the other.
    assert_eq!(
        with(r#","path":"/a","user_agent":null"#),
        asked(plain, "/a", "")
    );
    assert_eq!(
        with(r#","path":"/a","path":"/a","user_agent":"b""#),
        asked(plain, "", "b")
    );
    assert_eq!(
        with(r#","method":"GET","path":"/a","method":"GET""#),
        asked(plain, "/a", "")
    );
    assert_eq!(
        with(r#","path":"POST /a","path":"/a","method":"GET""#),
        safe(plain)
    );
    let deep = "[".repeat(200_000) + &"]".repeat(200_000);
    assert_eq!(with(&format!(r#","path":{deep}"#)), plain);
    // What no client can make Nginx write: surrogates by themselves.
    let odd = with(r#","path":"/\ud800","user_agent":"\udc00\ud800","method":"\ud800""#);
    assert_eq!((odd.client, odd.status), (plain.client, plain.status));
    // A log_format whose names are in the way was, and is, read.
    let taken = format(r#"{"path":"$msec","user_agent":"$remote_addr","method":$status}"#);
    let line = br#"{"path":"1.000","user_agent":"192.0.2.1","method":200}"#;
    assert_eq!(read(&taken, line), plain);
}

#[test]
fn path_user_agent_and_method_are_read_where_it_can_be_told_what_they_are() {
    let begin = "192.0.2.1 [22/Nov/2026:18:11:06 +0000] 200 ";
    for (rest, values, path, user_agent, said) in [
        (
            r#""$request" "$uri" "$http_user_agent""#,
            r#""GET /a HTTP/1.1" "/b" "c""#,
            "/b",
            "c",
            "GET",
        ),
        (
            r#""$request" $uri "$http_user_agent""#,
            r#""GET /a HTTP/1.1" /b d "c""#,
            "/b d",
            "c",
            "GET",
        ),
        (
            r#""$uri$args" "$request" $request_id"#,
            r#""/b?c" "GET /a HTTP/1.1" x"#,
            "/a",
            "",
            "GET",
        ),
        (
            r#""$request_method $request_uri" ua=$http_user_agent"#,
            r#""GET /a?b" ua=c "#,
            "/a?b",
            "c ",
            "GET",
        ),
        (
            r#"$request_method "$uri" "$http_user_agent""#,
            r#"POST "/a" "c""#,
            "/a",
            "c",
            "POST",
        ),
        // Which is which?
        ("$request_uri $http_user_agent", "/a b", "", "", ""),
        (
            r#"$request_uri $host "$http_user_agent""#,
            r#"/a b "c""#,
            "",
            "c",
            "",
        ),
        (
            r#""$pid$uri" "$server_addr:$server_port" "$http_user_agent""#,
            r#""1/a" "::1:80" "c""#,
            "",
            "c",
            "",
        ),
        // Not as in the format.
        (
            r#""$http_referer" "$request" [$pid] "$http_user_agent""#,
            r#""-" "GET /a HTTP/1.1" [x] "c""#,
            "/a",
            "",
            "GET",
        ),
        (
            r#""$http_referer" "$request_uri""#,
            r#""-" "/a"#,
            "",
            "",
            "",
        ),
        (r#""$http_referer" "$request_uri""#, r#""-""#, "", "", ""),
    ] {
        let format = format(&format!("$remote_addr [$time_local] $status {rest}"));
        let line = format!("{begin}{values}");
        assert_eq!(
            read(&format, line.as_bytes()),
            Record {
                method: method(said.as_bytes()),
                ..asked(record(1_795_371_066, "192.0.2.1", 200), path, user_agent)
            },
            "{rest}: {line}"
        );
    }
}

#[test]
fn a_method_is_read_beside_what_clients_write() {
    for (rest, values, said) in [
        (r#""$request_method""#, r#""GET""#, "GET"),
        (r#""$request_method""#, r#""-""#, ""),
        (
            r#"$host $request_method "$request" "$request_method""#,
            r#"x PUT "" "PUT""#,
            "PUT",
        ),
        // Of several such values, before the first and after the last.
        (
            r#""$request_method $http_x $uri""#,
            r#""GET a b /c""#,
            "GET",
        ),
        (
            r#""$uri $http_x $request_method""#,
            r#""/c POST GET""#,
            "GET",
        ),
        (r#""$uri $request_method $http_x""#, r#""/c POST GET""#, ""),
        // Which is which?
        ("$request_method|$uri", "GET|/a", ""),
        // Not as in the format.
        (r#""$request_method" "$http_x""#, r#""GE"#, ""),
        ("$request_method [$pid]", "GET /a", ""),
    ] {
        let format = format(&format!("$remote_addr [$time_local] $status {rest}"));
        let line = format!("192.0.2.1 [22/Nov/2026:18:11:06 +0000] 200 {values}");
        let expected = Record {
            method: method(said.as_bytes()),
            ..record(1_795_371_066, "192.0.2.1", 200)
        };
        assert_eq!(read(&format, line.as_bytes()), expected, "{rest}: {line}");
    }
}

#[test]
fn another_key_hashes_anew() {
    for line in [
        r#"{"timestamp":1795371066,"source_ip":"192.0.2.1","method":"GET","path":"/a","status":200,"user_agent":"curl"}"#,
        r#"{"timestamp":1795371066,"source_ip":"192.0.2.1","method":"GET","path":"\/a","status":200,"user_agent":"curl"}"#,
        r#"192.0.2.1 - - [22/Nov/2026:18:11:06 +0000] "GET /a HTTP/1.1" 200 1 "-" "curl""#,
    ] {
        let plain = read(&format("auto"), line.as_bytes());
        let asked = asked(record(1_795_371_066, "192.0.2.1", 200), "/a", "curl");
        assert_eq!(plain, safe(asked));
        let keyed = |key| read(&format("auto").keyed(key), line.as_bytes());
        assert_eq!(keyed(0), plain);
        assert_eq!(keyed(7).target, Some(Target::of(b"/a", 7)));
        assert_ne!(keyed(7).target, plain.target);
        assert_ne!(keyed(7).agent, plain.agent);
        assert_ne!(keyed(7).agent, keyed(8).agent);
        assert_eq!(keyed(7).client, plain.client);
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

/// Formats, whether the time in them has milliseconds and the line a peer, and of which variables path, user agent and
/// method are.
const FORMATS: [(&str, bool, bool, &str, &str, &str); 9] = [
    (
        COMBINED,
        false,
        false,
        "request",
        "http_user_agent",
        "request",
    ),
    (
        r#"$remote_addr ($realip_remote_addr) [$time_iso8601] "$host" "$request" $uri rt=$request_time $status $msec"#,
        true,
        true,
        "uri",
        "",
        "request",
    ),
    (
        r#""$http_user_agent"|$msec|$remote_user:$status|$remote_addr|"$request"|$args"#,
        true,
        false,
        "request",
        "http_user_agent",
        "request",
    ),
    (
        "$request$time_local$request_id $remote_addr, $status",
        false,
        false,
        "request",
        "",
        "request",
    ),
    (
        r#"{"time":"$msec","ua":"$http_user_agent","ip":"$remote_addr","request":"$request","status":$status,"via":"$realip_remote_addr","user":"$remote_user"}"#,
        true,
        true,
        "request",
        "http_user_agent",
        "request",
    ),
    (
        r#"{"user":"$remote_user","time":"$time_local","ip":"$remote_addr","request":"$request","status":"$status"}"#,
        false,
        false,
        "request",
        "",
        "request",
    ),
    (
        r#"{"request":"$request","time":"$msec","path":"$request_uri","ip":"$remote_addr","status":"$status","agent":"$http_user_agent"}"#,
        true,
        false,
        "request_uri",
        "http_user_agent",
        "request",
    ),
    (
        r#"{"request":"$request","path":"$uri","verb":"$request_method","ip":"$remote_addr","status":"$status","time":"$msec"}"#,
        true,
        false,
        "uri",
        "",
        "request_method",
    ),
    (
        r#"$remote_addr $status [$time_local] $request_uri $host "$request_method $uri ($http_user_agent)" "$http_user_agent""#,
        false,
        false,
        "",
        "http_user_agent",
        "request_method",
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

/// What such a value is to whoever reads the log: as it is written, or in JSON what that means.
fn meant(value: &[u8], json: bool, in_json: bool) -> Vec<u8> {
    match (in_json, json) {
        (false, _) => escaped(value, json),
        (true, true) => value.to_vec(),
        (true, false) if value.is_empty() => b"-".to_vec(),
        // `\xNN` is the character of that number.
        (true, false) => value
            .iter()
            .copied()
            .map(char::from)
            .collect::<String>()
            .into_bytes(),
    }
}

/// A line with Nginx's values for Nginx's variables, and clients' for all others, in turn; and those of the clients.
fn line<'a>(
    format: &'a str,
    record: &Record,
    json: bool,
    hostile: &[Vec<u8>],
) -> (Vec<u8>, BTreeMap<&'a str, Vec<u8>>) {
    let mut values = BTreeMap::new();
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
            "request_method" => match record.method {
                Some(Method::Safe) => b"GET".to_vec(),
                Some(Method::Unsafe) => b"POST".to_vec(),
                Some(Method::Preflight) => b"OPTIONS".to_vec(),
                None => escaped(b"", json),
            },
            "request_id" => b"0123456789abcdef0123456789abcdef".to_vec(),
            _ => {
                let value = values
                    .entry(name)
                    .or_insert_with(|| hostile.next().unwrap().clone());
                escaped(value, json)
            }
        };
        line.extend(value);
        line.extend(text.bytes());
    }
    (line, values)
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
        "GET /",
        "POST /a HTTP/1.1",
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
        prop::option::of(prop::sample::select(vec![
            Method::Safe,
            Method::Unsafe,
            Method::Preflight,
        ])),
    )
        .prop_map(|(millis, client, status, peer, method)| Record {
            peer,
            method,
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
        let (text, millis, peer, path, user_agent, said) = FORMATS[which];
        let in_json = text.starts_with('{');
        // Unquoted in JSON, a status of two digits would be no number.
        if in_json {
            record.status = record.status.max(100);
        }
        let (line, values) = line(text, &record, json, &hostile);
        let value = |name| values.get(name).map(|value| meant(value, json, in_json));
        let expected = Record {
            at: if millis { record.at } else { Timestamp::from_secs(record.at.secs()) },
            peer: record.peer.filter(|_| peer),
            target: value(path).and_then(|text| target(&text)),
            agent: value(user_agent).and_then(|text| agent(&text)),
            method: match said {
                "request_method" => record.method,
                said if said == path => None,
                said => value(said).and_then(|text| method(&text)),
            }
            .or_else(|| value(path).and_then(|text| requested(&text))),
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
        let (line, values) = line(COMBINED, &record, false, &hostile);
        if let Ok(read) = format(COMBINED).read(&line[..cut.index(line.len())]) {
            prop_assert_eq!((read.client, read.at.secs()), (record.client, record.at.secs()));
            let request = escaped(&values["request"], false);
            prop_assert_eq!((read.target, read.method), (target(&request), requested(&request)));
            let whole = agent(&escaped(&values["http_user_agent"], false));
            prop_assert!(read.agent.is_none() || read.agent == whole);
        }
    }
}
