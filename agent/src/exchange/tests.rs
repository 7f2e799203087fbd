use std::fmt::Write as _;

use portcullis_engine::{Ban, Origin};
use proptest::prelude::*;

use super::*;

/// 2027-01-15T08:00:00Z.
const NOW: Timestamp = Timestamp::from_secs(1_800_000_000);

fn listed(text: &str, format: Option<Format>) -> List {
    // Berlin's time: an hour ahead of UTC in winter, two in summer.
    let zone = TimeZone::posix("CET-1CEST,M3.5.0,M10.5.0/3").unwrap();
    let here = Here {
        now: NOW,
        zone: &zone,
    };
    read(text.as_bytes(), format, here)
}

/// All of a list, as it was taken: entries, what was left out, problems.
fn said(text: &str) -> String {
    let list = listed(text, None);
    let mut out = format!("{}\n", list.format);
    for entry in list.entries() {
        let end = match entry.term {
            None => "?".to_owned(),
            Some(Term::Permanent) => "for good".to_owned(),
            Some(Term::Until(end)) => end.to_string(),
        };
        let reason = entry.reason.as_deref().unwrap_or("-");
        let observe = if entry.observe { ", observed" } else { "" };
        let _ = writeln!(out, "{} {end} {reason}{observe}", entry.subject);
    }
    for (count, what) in [
        (list.over, "over"),
        (list.simulated, "simulated"),
        (list.other, "other"),
        (list.repeated, "repeated"),
    ] {
        if count > 0 {
            let _ = writeln!(out, "{count} {what}");
        }
    }
    for problem in &list.problems {
        let _ = writeln!(out, "{}: {}", problem.place, problem.what);
    }
    out
}

#[track_caller]
fn check(text: &str, expected: &str) {
    assert_eq!(said(text), expected);
}

#[test]
fn a_plain_list_has_comments_ranges_and_mistakes() {
    check(
        "# collected by hand\n\
         192.0.2.1\n\
         \n\
         192.0.2.77/24 ; the whole office\r\n\
         2001:db8::1 # one host\n\
         ::ffff:198.51.100.3\n\
         198.51.100.4-198.51.100.9\n\
         203.0.113.1 - 203.0.113.2\n\
         203.0.113.9-203.0.113.1\n\
         192.0.2.1 again\n\
         localhost\n\
         192.0.2.300\n",
        "plain\n\
         192.0.2.1 ? -\n\
         192.0.2.0/24 ? -\n\
         2001:db8::1 ? -\n\
         198.51.100.3 ? -\n\
         198.51.100.4/30 ? -\n\
         198.51.100.8/31 ? -\n\
         203.0.113.1 ? -\n\
         203.0.113.2 ? -\n\
         1 repeated\n\
         line 9: the range \"203.0.113.9-203.0.113.1\" ends before it begins: turn it around\n\
         line 11: \"localhost\" is neither an IP address nor a prefix such as 192.0.2.0/24 or 2001:db8::/64\n\
         line 12: \"192.0.2.300\" is neither an IP address nor a prefix such as 192.0.2.0/24 or 2001:db8::/64\n",
    );
}

#[test]
fn csv_goes_by_its_header() {
    check(
        "country,IP,Reason,Until,duration\r\n\
         DE,192.0.2.1,\"guesses, and \"\"shouts\"\"\",2027-01-31T00:00:00+01:00,\r\n\
         DE,192.0.2.2,\"two\nlines\",,1d 2h\r\n\
         DE,192.0.2.3,,,3600\n\
         DE,192.0.2.4,,permanent,\n\
         DE,192.0.2.5,,2026-12-31T00:00:00Z,\n\
         DE,192.0.2.6,,tomorrow,\n\
         DE,,nobody,,\n\
         DE,192.0.2.7\n\
         DE,192.0.2.8,\"open,,\n\
         DE,192.0.2.9,,,",
        "csv\n\
         192.0.2.1 2027-01-30T23:00:00.000Z guesses, and \"shouts\"\n\
         192.0.2.2 2027-01-16T10:00:00.000Z twolines\n\
         192.0.2.3 2027-01-15T09:00:00.000Z -\n\
         192.0.2.4 for good -\n\
         192.0.2.7 ? -\n\
         192.0.2.9 ? -\n\
         1 over\n\
         line 8: \"tomorrow\" is neither a time such as 2027-01-31T00:00:00Z nor a length of time such as 2h or 59m27.5s\n\
         line 9: it names no address (subject, ip, address or value)\n\
         line 11: a quotation mark is never closed\n",
    );
    let list = listed("192.0.2.1,x\n192.0.2.2,y\n", Some(Format::Csv));
    assert_eq!((list.entries().len(), list.misunderstood), (0, 1));
    assert!(list.problems[0].what.contains("no header"), "{list:?}");
}

#[test]
fn json_is_an_array_or_an_object_a_line() {
    let expected = "json\n\
                    192.0.2.1 2027-01-31T00:00:00.000Z it guesses\n\
                    192.0.2.2 for good -, observed\n";
    check(
        r#"{"subject":"192.0.2.1","until":"2027-01-31T00:00:00Z","reason":"it guesses","tier":2}
{"subject":"192.0.2.2","until":null,"observe":true}
"#,
        expected,
    );
    check(
        r#" [ {"ip": "192.0.2.1", "expires": "2027-01-31T00:00:00Z", "reason": "it guesses"},
              {"value": "192.0.2.2", "term": "permanent", "observe": true} ]"#,
        expected,
    );
    check(
        "{\n \"subject\": \"192.0.2.1\",\n \"until\": \"2027-01-31T00:00:00Z\", \"reason\": \"it guesses\"\n}\n\
         {\n \"subject\": \"192.0.2.2\",\n \"until\": null, \"observe\": true\n}\n",
        expected,
    );
    check(
        "[\"192.0.2.1\", 7, {\"reason\": \"nobody\"}, {\"subject\": \"192.0.2.2\"}, {\"subject\": ",
        "json\n\
         192.0.2.1 ? -\n\
         192.0.2.2 ? -\n\
         item 2: neither an object nor an address in quotation marks\n\
         item 3: it names no address (subject, ip, address or value)\n\
         line 1: no JSON from here on, what came before was read: EOF while parsing a value at line 1 column 77\n",
    );
    check(
        "{\"subject\":\"192.0.2.1\"}\n{\"subject\"\n{\"subject\":\"192.0.2.2\"}\n",
        "json\n\
         192.0.2.1 ? -\n\
         192.0.2.2 ? -\n\
         line 2: no JSON: EOF while parsing an object at line 1 column 10\n",
    );
}

#[test]
fn what_bans_prints_is_read_too() {
    let ban = Ban {
        tier: Some(1),
        reason: "z 3.5 > 3".to_owned(),
        ..Ban::new(
            "192.0.2.1".parse().unwrap(),
            NOW,
            Term::Until(Timestamp::from_secs(1_800_000_600)),
            Origin::Detector,
        )
    };
    let text = serde_json::to_string_pretty(&[ban]).unwrap();
    check(
        &text,
        "json\n192.0.2.1 2027-01-15T08:10:00.000Z z 3.5 > 3\n",
    );
}

/// As `cscli decisions list -o json` prints it, shortened.
const ALERTS: &str = r#"[
  {
    "capacity": 5,
    "created_at": "2027-01-15T07:59:00Z",
    "decisions": [
      {
        "duration": "3h59m49s",
        "id": 276009,
        "origin": "crowdsec",
        "scenario": "crowdsecurity/ssh-bf",
        "scope": "Ip",
        "simulated": false,
        "type": "ban",
        "value": "192.0.2.1"
      },
      {
        "duration": "-2m10.5s",
        "origin": "crowdsec",
        "scenario": "crowdsecurity/ssh-bf",
        "scope": "Ip",
        "simulated": false,
        "type": "ban",
        "value": "192.0.2.2"
      }
    ],
    "events": [],
    "scenario": "crowdsecurity/ssh-bf",
    "source": {"scope": "Ip", "value": "192.0.2.1", "ip": "192.0.2.1"}
  },
  {
    "decisions": [
      {"duration": "71h59m27.123s", "origin": "cscli", "scenario": "manual 'ban' from 'host'", "scope": "Range", "type": "ban", "value": "198.51.100.0/24"},
      {"duration": "4h", "origin": "crowdsec", "scenario": "http-probing", "scope": "Ip", "type": "captcha", "value": "192.0.2.3"},
      {"duration": "4h", "origin": "crowdsec", "scenario": "http-probing", "scope": "Ip", "simulated": true, "type": "ban", "value": "192.0.2.4"},
      {"duration": "4h", "origin": "lists", "scenario": "far away", "scope": "Country", "type": "ban", "value": "AQ"}
    ]
  },
  {"decisions": null}
]"#;

#[test]
fn crowdsec_s_bans_of_addresses_are_taken() {
    check(
        ALERTS,
        "crowdsec\n\
         192.0.2.1 2027-01-15T11:59:49.000Z crowdsecurity/ssh-bf\n\
         198.51.100.0/24 2027-01-18T07:59:27.123Z manual 'ban' from 'host'\n\
         1 over\n\
         1 simulated\n\
         2 other\n",
    );
    check(
        "id,source,ip,reason,action,country,as,events_count,expiration,simulated,alert_id\n\
         276009,crowdsec,Ip:192.0.2.1,crowdsecurity/ssh-bf,ban,FR,64496 Example,7,3h59m49.5s,false,33459\n\
         276010,crowdsec,Ip:2001:db8::1,crowdsecurity/ssh-bf,ban,,,7,59m1s,false,33460\n\
         276011,cscli,Range:198.51.100.0/24,manual,ban,,,0,1h,false,33461\n\
         276012,crowdsec,Ip:192.0.2.3,http-probing,(simul)ban,,,7,1h,true,33462\n\
         276013,crowdsec,Country:AQ,far away,ban,,,7,1h,false,33463\n",
        "crowdsec\n\
         192.0.2.1 2027-01-15T11:59:49.500Z crowdsecurity/ssh-bf\n\
         2001:db8::1 2027-01-15T08:59:01.000Z crowdsecurity/ssh-bf\n\
         198.51.100.0/24 2027-01-15T09:00:00.000Z manual\n\
         1 simulated\n\
         1 other\n",
    );
    for none in ["null\n", "[]\n", ""] {
        let list = listed(none, Some(Format::Crowdsec));
        assert_eq!((list.entries().len(), list.misunderstood), (0, 0), "{none}");
    }
}

#[test]
fn whatever_fail2ban_client_prints_is_read() {
    check(
        "[{'sshd': ['192.0.2.1', '2001:db8::1']}, {'nginx-http-auth': []}, {'recidive': ['192.0.2.1', 'nobody', ?]}]\n",
        "fail2ban\n\
         192.0.2.1 ? fail2ban: sshd\n\
         2001:db8::1 ? fail2ban: sshd\n\
         1 repeated\n\
         line 1: \"nobody\" is neither an IP address nor a prefix such as 192.0.2.0/24 or 2001:db8::/64\n\
         line 1: \"?\" is not what `fail2ban-client banned` prints\n",
    );
    // Local time, in winter and in summer.
    check(
        "192.0.2.1 \t2027-01-15 09:00:00 + 600 = 2027-01-15 09:10:00\n\
         192.0.2.2 \t2027-01-15 08:00:00 + 600 = 2027-01-15 08:10:00\n\
         192.0.2.3 \t2027-01-15 09:00:00 + -1 = 9999-12-31 23:59:59\n\
         2001:db8::1 \t2027-01-15 09:00:00 + 15552000 = 2027-07-14 10:00:00\n\
         192.0.2.4 \t2027-01-15 09:00:00 + 600 = soon enough\n",
        "fail2ban\n\
         192.0.2.1 2027-01-15T08:10:00.000Z fail2ban\n\
         192.0.2.3 for good fail2ban\n\
         2001:db8::1 2027-07-14T08:00:00.000Z fail2ban\n\
         1 over\n\
         line 5: \"soon\" \"enough\" is no time such as 2027-05-01 10:10:00\n",
    );
    check(
        "Status for the jail: sshd\n\
         |- Filter\n\
         |  |- Currently failed:\t1\n\
         |  |- Total failed:\t12\n\
         |  `- File list:\t/var/log/auth.log\n\
         `- Actions\n\
         \u{20}  |- Currently banned:\t2\n\
         \u{20}  |- Total banned:\t3\n\
         \u{20}  `- Banned IP list:\t192.0.2.1 192.0.2.2\n",
        "fail2ban\n\
         192.0.2.1 ? fail2ban: sshd\n\
         192.0.2.2 ? fail2ban: sshd\n",
    );
    // `get JAIL banip`, with a separator of one's own.
    let list = listed("192.0.2.1 192.0.2.2\n", Some(Format::Fail2ban));
    assert_eq!((list.entries().len(), list.misunderstood), (2, 0));
}

#[test]
fn of_several_entries_for_a_subject_the_longest_counts() {
    check(
        "ip,duration,reason\n192.0.2.1,1h,one\n192.0.2.1,3h,three\n192.0.2.1,2h,two\n",
        "csv\n192.0.2.1 2027-01-15T11:00:00.000Z three\n2 repeated\n",
    );
}

#[test]
fn a_list_has_bounds() {
    let mut text = String::new();
    for n in 0..=MAX_ENTRIES {
        let _ = writeln!(text, "10.{}.{}.{}", n >> 16, n >> 8 & 255, n & 255);
    }
    text += "10.0.0.0\n";
    let list = listed(&text, None);
    assert_eq!(list.entries().len(), MAX_ENTRIES);
    assert_eq!((list.misunderstood, list.repeated), (1, 1));
    assert_eq!(list.problems[0].place, Place::Line(MAX_ENTRIES + 1));

    let long = "1".repeat(MAX_LINE + 1);
    for text in [
        format!("192.0.2.1\n{long}\n192.0.2.2\n"),
        format!("ip,reason\n192.0.2.1,\n192.0.2.7,\"{long}\"\n192.0.2.2,\n"),
        format!("{{\"ip\":\"192.0.2.1\"}}\n{{\"ip\":\"{long}\"}}\n{{\"ip\":\"192.0.2.2\"}}\n"),
    ] {
        let list = listed(&text, None);
        assert_eq!(list.entries().len(), 2, "{:?}", list.problems);
        assert_eq!(list.misunderstood, 1, "{:?}", list.problems);
    }
    let list = listed(&"no address\n".repeat(1000), None);
    assert_eq!(
        (list.problems.len(), list.misunderstood),
        (MAX_PROBLEMS, 1000)
    );
}

#[test]
fn what_is_no_text_is_no_address() {
    let zone = TimeZone::UTC;
    let here = Here {
        now: NOW,
        zone: &zone,
    };
    let list = read(b"\xef\xbb\xbf192.0.2.1\n192.0.2.2\xff\n", None, here);
    assert_eq!((list.entries().len(), list.misunderstood), (1, 1));
}

#[test]
fn lengths_of_time_are_go_s_and_ours() {
    for (text, millis) in [
        ("3h59m49s", 14_389_000),
        ("71h59m27.123s", 259_167_123),
        ("1d 2h", 93_600_000),
        ("300ms", 300),
        ("1.5h", 5_400_000),
        ("-3m2s", 0),
        ("0s", 0),
    ] {
        let read = left(text).map(|left| left.as_millis());
        assert_eq!(read, Some(millis), "{text}");
    }
    for text in ["", "-", "soon", "10", "h", "1y", ".s", "1h x", "1e9s"] {
        assert_eq!(left(text), None, "{text}");
    }
}

fn any_subject() -> impl Strategy<Value = Subject> {
    let v4 = (any::<u32>(), 8..=32u8)
        .prop_map(|(bits, length)| ipnet::Ipv4Net::new(bits.into(), length).unwrap().into());
    let v6 = (any::<u128>(), 16..=128u8)
        .prop_map(|(bits, length)| ipnet::Ipv6Net::new(bits.into(), length).unwrap().into());
    prop_oneof![v4, v6].prop_map(Subject::of_net)
}

prop_compose! {
    fn any_ban()(
        subject in any_subject(),
        left in proptest::option::of(1..4_000_000_000_000_u64),
        reason in "[^\\pC]{0,20}[^\\pC\\pZ]",
        observe in any::<bool>(),
    ) -> Ban {
        Ban {
            reason,
            observe,
            ..Ban::new(
                subject,
                NOW,
                left.map_or(Term::Permanent, |left| Term::Until(NOW + Duration::from_millis(left))),
                Origin::Operator,
            )
        }
    }
}

proptest! {
    #[test]
    fn what_is_exported_is_imported(bans in proptest::collection::vec(any_ban(), 0..20)) {
        let bans: IndexMap<Subject, Ban> = bans.into_iter().map(|ban| (ban.subject, ban)).collect();
        for (form, format) in [(Form::Json, Format::Json), (Form::Csv, Format::Csv), (Form::Plain, Format::Plain)] {
            let mut text = Vec::new();
            let all: Vec<Ban> = bans.values().cloned().collect();
            write(&all, form, &mut text).unwrap();
            let text = String::from_utf8(text).unwrap();
            let list = listed(&text, None);
            if !bans.is_empty() {
                prop_assert_eq!(list.format, format);
            }
            prop_assert_eq!(list.misunderstood, 0, "{:?}", list.problems);
            let expected: Vec<Entry> = bans.values().map(|ban| Entry {
                subject: ban.subject,
                term: (form != Form::Plain).then_some(ban.term),
                reason: (form != Form::Plain).then(|| ban.reason.clone()),
                observe: form != Form::Plain && ban.observe,
            }).collect();
            prop_assert_eq!(list.entries().cloned().collect::<Vec<_>>(), expected, "{}", text);
        }
    }

    #[test]
    fn nothing_that_is_read_is_too_much(
        bytes in proptest::collection::vec(any::<u8>(), 0..200),
        odd in "([\\[\\]{}'\",:\\\\\n#;+= -]|ip|until|192\\.0\\.2\\.1|2001:db8::|/24|null|decisions|Ip:|1h|IP list:|\\PC){0,40}",
    ) {
        for text in [&bytes[..], odd.as_bytes()] {
            for format in [None, Some(Format::Json), Some(Format::Csv), Some(Format::Plain), Some(Format::Fail2ban), Some(Format::Crowdsec)] {
                let here = Here { now: NOW, zone: &TimeZone::UTC };
                let list = read(text, format, here);
                prop_assert!(list.problems.len() <= list.misunderstood);
            }
        }
    }
}
