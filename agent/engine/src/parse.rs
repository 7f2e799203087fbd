//! From a line of Nginx's access log to a record.
//!
//! Address, time and status are taken from where Nginx itself wrote them, and from nowhere else. The rest of the line is
//! written by whoever sends requests: one stray byte must not make it unreadable, and no value may pass for another.

mod json;
mod log_format;
mod method;
mod scan;
mod target;
mod template;
mod value;

use std::net::IpAddr;

use self::template::Template;
pub use self::{
    method::Method,
    target::{Kind as TargetKind, Target},
};
use crate::time::Timestamp;

/// What the detector needs of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// When the request was logged.
    pub at: Timestamp,
    /// Who sent it; an IPv4-mapped address is already IPv4.
    pub client: IpAddr,
    /// The answer's status, 0 to 999.
    pub status: u16,
    /// The other end of the TCP connection, where the log has it: the client or a proxy in front.
    pub peer: Option<IpAddr>,
    /// What was asked for, where the log has it.
    pub target: Option<Target>,
    /// Does it only ask, where the log says so?
    pub method: Option<Method>,
    /// Hash of the `User-Agent`, where the log has it.
    pub agent: Option<u32>,
    /// The byte of its log at which the line begins; whoever reads the line sets it.
    pub offset: u64,
}

impl Record {
    /// A record of what every log has.
    #[must_use]
    pub const fn new(at: Timestamp, client: IpAddr, status: u16) -> Self {
        Self {
            at,
            client,
            status,
            peer: None,
            target: None,
            method: None,
            agent: None,
            offset: 0,
        }
    }
}

/// The names of the JSON fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fields {
    /// Epoch seconds, ISO 8601, or a time as in the combined format.
    pub time: String,
    /// Nginx's `$remote_addr`.
    pub client: String,
    /// Nginx's `$status`.
    pub status: String,
    /// Nginx's `$realip_remote_addr`. From here on, a line need not have them.
    pub peer: String,
    /// Nginx's `$request_uri`, `$uri` or `$request`.
    pub path: String,
    /// Nginx's `$http_user_agent`.
    pub user_agent: String,
    /// Nginx's `$request_method` or `$request`. A path that is a whole `$request` says it, too.
    pub method: String,
}

impl Default for Fields {
    fn default() -> Self {
        Self {
            time: "timestamp".to_owned(),
            client: "source_ip".to_owned(),
            status: "status".to_owned(),
            peer: "realip_remote_addr".to_owned(),
            path: "path".to_owned(),
            user_agent: "user_agent".to_owned(),
            method: "method".to_owned(),
        }
    }
}

impl Fields {
    /// Which one a key is.
    #[inline(always)]
    fn of_key(&self, key: &[u8]) -> Option<Field> {
        // The first byte tells most of them apart, without a call.
        let is = |name: &str| {
            let name = name.as_bytes();
            key.first() == name.first() && key == name
        };
        if is(&self.time) {
            Some(Field::Time)
        } else if is(&self.client) {
            Some(Field::Client)
        } else if is(&self.status) {
            Some(Field::Status)
        } else if is(&self.peer) {
            Some(Field::Peer)
        } else if is(&self.path) {
            Some(Field::Path)
        } else if is(&self.user_agent) {
            Some(Field::Agent)
        } else if is(&self.method) {
            Some(Field::Method)
        } else {
            None
        }
    }

    fn check(&self) -> Result<(), String> {
        distinct(&[
            &self.time,
            &self.client,
            &self.status,
            &self.peer,
            &self.path,
            &self.user_agent,
            &self.method,
        ])
    }

    /// Of the rest, [`Fields::of_key`] takes the first: they are never a reason to refuse a `log_format`.
    fn check_needed(&self) -> Result<(), String> {
        distinct(&[&self.time, &self.client, &self.status, &self.peer])
    }
}

fn distinct(names: &[&String]) -> Result<(), String> {
    if names.iter().any(|name| name.is_empty()) {
        return Err("a field's name is empty: write the key that the log has".to_owned());
    }
    for (place, name) in names.iter().enumerate() {
        if names[..place].contains(name) {
            return Err(format!(
                "{name:?} names two fields: time, client, status, peer, path, user_agent and method each need a key of their own"
            ));
        }
    }
    Ok(())
}

/// What is read from a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    Time,
    Client,
    Status,
    Peer,
    Path,
    Agent,
    Method,
}

/// How the lines of a log are written.
#[derive(Clone, Debug, PartialEq)]
pub struct Format {
    kind: Kind,
    /// Of the hashes of what clients write.
    key: u64,
}

#[derive(Clone, Debug, PartialEq)]
enum Kind {
    Json(Fields),
    Template(Template),
    /// Each line one or the other.
    Auto(Fields, Template),
}

const COMBINED: &str = r#"$remote_addr - $remote_user [$time_local] "$request" $status $body_bytes_sent "$http_referer" "$http_user_agent""#;

/// `auto`, with the default names.
impl Default for Format {
    fn default() -> Self {
        Self {
            kind: Kind::Auto(Fields::default(), combined()),
            key: 0,
        }
    }
}

#[expect(
    clippy::expect_used,
    reason = "a constant, which every use and test of the default format compiles"
)]
fn combined() -> Template {
    log_format::parts(COMBINED)
        .and_then(|parts| Template::new(&parts))
        .expect("the combined format has all that is needed")
        .open_ended()
}

impl Format {
    /// From `auto`, `json`, `combined`, or a `log_format` of nginx.conf: its text, or the whole directive. With `auto` each
    /// line that begins with `{` is JSON, and every other one combined. `fields` are the names for JSON; a `log_format`
    /// that writes JSON brings its own.
    ///
    /// # Errors
    /// Why lines of such a format could not be read, or not safely, and what to do about it.
    pub fn new(text: &str, fields: Fields) -> Result<Self, String> {
        fields.check()?;
        let kind = match text.trim() {
            "auto" => Kind::Auto(fields, combined()),
            "json" => Kind::Json(fields),
            "combined" => Kind::Template(combined()),
            text if text.contains('$') => {
                let parts = log_format::parts(text)?;
                if log_format::is_json(&parts) {
                    Kind::Json(json::fields(&parts, fields)?)
                } else {
                    Kind::Template(Template::new(&parts)?)
                }
            }
            text => {
                return Err(format!(
                    "{text:?} is no format: write auto, json, combined, or the log_format as it stands in nginx.conf"
                ));
            }
        };
        Ok(Self { kind, key: 0 })
    }

    /// With a key for the hashes of paths and user agents, which keeps clients from finding paths that pass for one another; a
    /// replay uses 0.
    #[must_use]
    pub fn keyed(self, key: u64) -> Self {
        Self { key, ..self }
    }

    /// Reads one line, without its line break.
    ///
    /// # Errors
    /// [`Malformed`] when time, address or status cannot be had, even after stray bytes have been made readable.
    pub fn read(&self, line: &[u8]) -> Result<Record, Malformed> {
        match &self.kind {
            Kind::Json(fields) => json::read(line, fields, self.key),
            Kind::Template(template) => template.read(line, self.key),
            Kind::Auto(fields, combined) => {
                if line.trim_ascii_start().first() == Some(&b'{') {
                    json::read(line, fields, self.key)
                } else {
                    combined.read(line, self.key)
                }
            }
        }
    }
}

/// Why a line is not a record.
#[derive(Debug, thiserror::Error)]
pub enum Malformed {
    /// No JSON, or a field is missing or of the wrong kind.
    #[error("not an object with the fields {fields}: {error}")]
    Json {
        /// Those that a line has to have.
        fields: String,
        /// What is wrong.
        error: serde_json::Error,
    },
    /// The field of an address holds something else, such as `unix:`.
    #[error("{field} is not an IP address: {value:?}")]
    Address {
        /// Its name in the log's format.
        field: String,
        /// The beginning of what it holds.
        value: String,
    },
    /// Not what the `log_format` writes.
    #[error("not a line of the format: no {expected} in {text:?}")]
    Template {
        /// The part of the format that is not there.
        expected: String,
        /// The beginning of the text where it should be.
        text: String,
    },
}

/// The beginning of a text, for a message.
fn clipped(text: &[u8]) -> String {
    String::from_utf8_lossy(text).chars().take(64).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn format(text: &str) -> Format {
        Format::new(text, Fields::default()).unwrap()
    }

    fn parse(line: &[u8]) -> Result<Record, Malformed> {
        format("json").read(line)
    }

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

    #[test]
    fn the_peer_is_read_where_the_log_has_it() {
        let v4 = IpAddr::from([10, 0, 0, 1]);
        for (peer, expected) in [
            ("", None),
            (r#","realip_remote_addr":"""#, None),
            (r#","realip_remote_addr":"-""#, None),
            (r#","realip_remote_addr":"10.0.0.1""#, Some(v4)),
            (r#","realip_remote_addr":"::ffff:10.0.0.1""#, Some(v4)),
            (r#","realip_remote_addr":"10.0.0.1","x":{}"#, Some(v4)),
            (r#","realip_remote_addr":"-","x":{}"#, None),
            (
                r#","realip_remote_addr":"unix:""#,
                Some([127, 0, 0, 1].into()),
            ),
            (
                r#","realip_remote_addr":"unix:","x":{}"#,
                Some([127, 0, 0, 1].into()),
            ),
        ] {
            let line = format!(r#"{{"timestamp":1,"source_ip":"192.0.2.1","status":200{peer}}}"#);
            let record = parse(line.as_bytes()).unwrap();
            assert_eq!(record.peer, expected, "{line}");
            assert_eq!(record.client, IpAddr::from([192, 0, 2, 1]));
        }
        for (peer, reason) in [
            (r#""unix:x""#, "realip_remote_addr is not an IP address"),
            (
                r#""10.0.0.1:80""#,
                "realip_remote_addr is not an IP address",
            ),
            ("null", "an IP address"),
            (
                r#""10.0.0.1","realip_remote_addr":"10.0.0.2""#,
                "duplicate field `realip_remote_addr`",
            ),
        ] {
            let line = format!(
                r#"{{"timestamp":1,"source_ip":"192.0.2.1","status":200,"realip_remote_addr":{peer}}}"#
            );
            let error = parse(line.as_bytes()).expect_err(&line).to_string();
            assert!(error.contains(reason), "{line}: {error}");
        }
    }

    #[test]
    fn the_fields_have_the_names_that_they_are_given() {
        let names = |time: &str, client: &str, status: &str, peer: &str| Fields {
            time: time.to_owned(),
            client: client.to_owned(),
            status: status.to_owned(),
            peer: peer.to_owned(),
            ..Fields::default()
        };
        let json = Format::new("json", names("time", "remote \"addr\"", "étât", "via")).unwrap();
        let record = json
            .read(r#"{"time":"22/Nov/2026:18:11:06 +0000","remote \"addr\"":"192.0.2.1","\u00e9tât":"404","via":"10.0.0.1","source_ip":"198.51.100.7","status":200,"timestamp":0}"#.as_bytes())
            .unwrap();
        assert_eq!(record.at.millis(), 1_795_371_066_000);
        assert_eq!(record.client, IpAddr::from([192, 0, 2, 1]));
        assert_eq!(
            (record.status, record.peer),
            (404, Some([10, 0, 0, 1].into()))
        );
        let error = json.read(b"{}").unwrap_err().to_string();
        assert!(error.contains("missing field `time`"), "{error}");
        let error = json
            .read(br#"{"time":1,"remote \"addr\"":"x","\u00e9t\u00e2t":200}"#)
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            r#"remote "addr" is not an IP address: "x""#
        );

        for (fields, reason) in [
            (names("", "b", "c", "d"), "empty"),
            (names("a", "b", "c", ""), "empty"),
            (names("a", "b", "a", "d"), r#""a" names two fields"#),
            (names("a", "b", "c", "path"), r#""path" names two fields"#),
            (
                names("a", "b", "c", "method"),
                r#""method" names two fields"#,
            ),
        ] {
            let error = Format::new("auto", fields).unwrap_err();
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn a_field_that_stands_twice_is_nobody_s() {
        for line in [
            r#"{"timestamp":1,"source_ip":"192.0.2.1","source_ip":"198.51.100.7","status":200}"#,
            r#"{"timestamp":1,"source_ip":"192.0.2.1","source\u005fip":"198.51.100.7","status":200}"#,
            r#"{"timestamp":1,"x":{},"source_ip":"192.0.2.1","status":200,"source_ip":"192.0.2.1"}"#,
        ] {
            let error = parse(line.as_bytes()).expect_err(line).to_string();
            assert!(
                error.contains("duplicate field `source_ip`"),
                "{line}: {error}"
            );
        }
    }

    #[test]
    fn nested_values_are_passed_over_however_deep() {
        let deep = 200_000;
        for (open, close) in [("[", "]"), (r#"{"source_ip":"#, "}")] {
            let line = format!(
                r#"{{"timestamp":1,"more":{}1{},"source_ip":"192.0.2.1","status":200}}"#,
                open.repeat(deep),
                close.repeat(deep)
            );
            assert_eq!(ok(line.as_bytes()).1, "192.0.2.1");
        }
        let open = format!(r#"{{"timestamp":1,"more":{}"#, "[".repeat(deep));
        assert!(parse(open.as_bytes()).is_err());
    }

    #[test]
    fn odd_numbers_and_a_byte_order_mark_do_no_harm() {
        for number in [
            "1e400",
            "-0",
            "1E-999",
            "123456789012345678901234567890",
            "0.1e+5",
        ] {
            for line in [
                format!(
                    r#"{{"timestamp":1,"size":{number},"source_ip":"192.0.2.1","status":200}}"#
                ),
                format!(r#"{{"timestamp":{number},"source_ip":"192.0.2.1","status":200}}"#),
                format!(r#"{{"timestamp":1,"source_ip":"192.0.2.1","status":{number}}}"#),
            ] {
                if let Ok(record) = parse(line.as_bytes()) {
                    assert_eq!(record.client, IpAddr::from([192, 0, 2, 1]), "{line}");
                }
            }
        }
        let marked = "\u{FEFF}{\"timestamp\":1,\"source_ip\":\"192.0.2.1\",\"status\":200}";
        for text in ["auto", "json", "combined"] {
            assert!(format(text).read(marked.as_bytes()).is_err());
        }
    }

    #[test]
    fn auto_takes_an_object_for_json_and_the_rest_for_combined() {
        let auto = Format::default();
        assert_eq!(auto, format(" auto "));
        for line in [
            r#"{"timestamp":1795371066,"source_ip":"192.0.2.1","status":404}"#,
            r#"  {"timestamp":1795371066,"source_ip":"192.0.2.1","status":404}"#,
            r#"192.0.2.1 - - [22/Nov/2026:18:11:06 +0000] "GET / HTTP/1.1" 404 153 "-" "curl/8.5.0""#,
        ] {
            let record = auto.read(line.as_bytes()).unwrap();
            assert_eq!(record.at.millis(), 1_795_371_066_000, "{line}");
            assert_eq!((record.client, record.status), ([192, 0, 2, 1].into(), 404));
        }
        for (line, reason) in [
            ("{", "EOF"),
            ("", "no \" - \" in \"\""),
            (" 192.0.2.1 - - [22/Nov/2026:18:11:06 +0000]", "no \" - \""),
        ] {
            let error = auto.read(line.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(reason), "{line}: {error}");
        }
        let error = Format::new("apache", Fields::default()).unwrap_err();
        assert!(
            error.contains("write auto, json, combined, or the log_format"),
            "{error}"
        );
    }

    #[test]
    fn a_log_format_that_writes_json_names_its_fields() {
        for text in [
            r#"{"t":"$time_local","m":"$msec","who":"$remote_addr","ua":"$http_user_agent","code":$status,"via":"${realip_remote_addr}"}"#,
            r#"log_format j escape=json '{' '"m":$msec,"who":"$remote_addr",' # by hand
                '"ua":"$http_user_agent","code":"${status}","via":"$realip_remote_addr"}';"#,
            r#"log_format j "{\"m\":\"$msec\",\"who\":\"$remote_addr\",\"code\":$status,\"via\":\"$realip_remote_addr\"}";"#,
        ] {
            let record = format(text)
                .read(br#"{"t":"x","m":"1700000000.123","who":"192.0.2.1","ua":"{\"who\":\"198.51.100.7\"}","code":404,"via":"10.0.0.1"}"#)
                .unwrap();
            let at = Timestamp::from_millis(1_700_000_000_123);
            let expected = Record {
                peer: Some([10, 0, 0, 1].into()),
                agent: target::agent(br#"{"who":"198.51.100.7"}"#, 0)
                    .filter(|_| text.contains("$http_user_agent")),
                ..Record::new(at, [192, 0, 2, 1].into(), 404)
            };
            assert_eq!(record, expected, "{text}");
        }
        let local = format(r#"{"time":"$time_local","remote":"$remote_addr","status":"$status"}"#);
        let record = local
            .read(br#"{"time":"22/Nov/2026:18:11:06 +0000","remote":"2001:db8::1","status":"200"}"#)
            .unwrap();
        assert_eq!(record.at.millis(), 1_795_371_066_000);
        assert_eq!(record.client.to_string(), "2001:db8::1");
    }

    /// Each with what its refusal says.
    fn refused(formats: &[(&str, &str)]) {
        for (text, reason) in formats {
            let error = Format::new(text, Fields::default()).expect_err(text);
            assert!(error.contains(reason), "{text}: {error}");
        }
    }

    #[test]
    fn a_log_format_without_what_is_needed_is_refused() {
        refused(&[
            ("$status [$time_local]", "no $remote_addr: add it"),
            (
                r#"$http_x_forwarded_for [$time_local] "$request" $status"#,
                "never taken for their address",
            ),
            (r#"$remote_addr [$time_local] "$request""#, "no $status"),
            (r#"$remote_addr "$request" $status"#, "no time: add $msec"),
        ]);
    }

    #[test]
    fn a_log_format_whose_values_clients_could_forge_is_refused() {
        refused(&[
            (
                "$remote_addr $http_host $status $uri [$time_local]",
                "put $http_host or $uri into double quotes, or move $status",
            ),
            (
                r#"$host $remote_addr - $remote_user [$time_local] "$request" $status"#,
                "$remote_addr stands between $host and $remote_user",
            ),
            (
                r#"$remote_addr - "$request" $http_referer $status $http_user_agent $msec"#,
                "$status stands between",
            ),
            (
                "$realip_remote_addr - $uri $remote_addr $args [$time_local] $status",
                "$remote_addr stands between $uri and $args",
            ),
            (
                r#"$uri $realip_remote_addr $args "$remote_addr" [$time_local] $status"#,
                "$realip_remote_addr stands between",
            ),
            (
                "$remote_addr$status [$time_local]",
                "told $remote_addr from $status",
            ),
            (
                "$remote_addr:$remote_port [$time_local] $status",
                r#"told $remote_addr from ":""#,
            ),
            (
                "$remote_addr$remote_user [$time_local] $status",
                "told $remote_addr from $remote_user",
            ),
            (
                "$remote_addr [$time_local] $request_time$status",
                "told $request_time from $status",
            ),
            (
                "$remote_addr [$time_local] $request$status",
                "told $status from $request",
            ),
            (
                "$remote_addr [$time_local] $status$request",
                "told $status from $request",
            ),
            (
                "$remote_addr [$time_local] $status-$request",
                r#"told $status from "-""#,
            ),
        ]);
    }

    #[test]
    fn a_log_format_that_nginx_would_read_otherwise_is_refused() {
        refused(&[
            (r"$remote_addr [$time_local] $http_x\5$status", "ambiguous"),
            ("$remote_addr [$time_local] $status\n$request", "ambiguous"),
            (
                "$remote_addr [$time_local] $status $",
                "not followed by a variable's name",
            ),
            (
                "$remote_addr [$time_local] $status ${request",
                "not followed by a variable's name",
            ),
            (
                "log_format main escape=none '$remote_addr [$time_local] $status';",
                "write escape=json in its place",
            ),
            (
                "log_format main '$remote_addr [$time_local] $status;",
                "lacks the '",
            ),
            (
                "log_format main '$remote_addr'; access_log x;",
                "give one alone",
            ),
        ]);
    }

    #[test]
    fn a_log_format_whose_json_could_not_be_read_is_refused() {
        refused(&[
            (
                r#"{"time":"$msec","ip":"$remote_addr","status":"$status""#,
                "is no JSON object",
            ),
            (
                r#"{"time":"$msec","ip":"$remote_addr","s":"$status $x"}"#,
                "whose whole value is $status",
            ),
            (
                r#"{"time":"$msec","status":"$status","http":{"ip":"$remote_addr"}}"#,
                "whose whole value is $remote_addr",
            ),
            (
                r#"{"ip":"$remote_addr","status":"$status"}"#,
                "$msec, $time_iso8601 or $time_local",
            ),
            (
                r#"{"time":"$msec","ip":"$http_x_real_ip","status":"$status"}"#,
                "whose whole value is $remote_addr",
            ),
            (
                r#"{"time":"$msec","ip":"$remote_addr","status":"$status","up":$upstream_response_time}"#,
                r#"write "$upstream_response_time""#,
            ),
            (
                r#"{"time":"$msec","ip":"$remote_addr","status":"$status","$arg_x":1}"#,
                "write a fixed key",
            ),
            (
                r#"{"time":"$msec","ip":"$remote_addr","status":"$status","ip":"$remote_addr"}"#,
                "duplicate field `ip`",
            ),
            (
                r#"{"time":"$msec","ip":"$remote_addr","status":"$status","realip_remote_addr":"$http_x"}"#,
                "realip_remote_addr is not an IP address",
            ),
        ]);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

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
            for text in ["auto", "json", "combined", r#"{"m":$msec,"a":"$remote_addr","s":$status}"#, "$request $request_id [$time_iso8601] $remote_addr $status"] {
                drop(format(text).read(&line));
            }
        }

        #[test]
        fn no_text_of_a_format_panics(text in r#"(log_format a |)['" ${}\\;:a-z]{0,6}(\$(remote_addr|status|msec|time_local|request|host|pid)['" ;\[\]:-]{0,2}){0,7}.{0,5}"#, line in prop::collection::vec(any::<u8>(), 0..100)) {
            if let Ok(format) = Format::new(&text, Fields::default()) {
                drop(format.read(&line));
            }
        }
    }
}
