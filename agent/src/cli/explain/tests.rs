use portcullis_engine::{
    allowlist::Why,
    baseline::Normal,
    explain::{Failing, Span},
    failures::Verdict,
    ledger::Offences,
};

use super::*;
use crate::{enforce::Backend, runtime::Held};

const NOW: Timestamp = Timestamp::from_secs(1_795_305_660);

fn explained(subject: &str) -> Explained {
    let subject: Subject = subject.parse().unwrap();
    Explained {
        known: Explanation {
            asked: subject,
            subject,
            time: NOW,
            bans: Vec::new(),
            bans_inside: 0,
            offences: None,
            next_tier: 1,
            next_secs: Some(600),
            spared: None,
            refused_until: None,
            is_regular: false,
            client: None,
            normal: Normal {
                mean: 1.12,
                stddev: 1.06,
                error_share: 0.05,
                learnt: Learnt::Recent,
                seconds: 1800,
            },
            alarm_since: None,
            is_attacked: false,
        },
        mode: Mode::Enforce,
        backend: Backend::XdpNative,
        place: "eth0".to_owned(),
        entry: None,
    }
}

fn finding(test: Test) -> Finding {
    Finding {
        test,
        threshold: 3.0,
        surge: false,
        rate: 4.3,
        score: 3.0,
        mean: 1.12,
        stddev: 1.06,
        learnt: Learnt::Hour(14),
        window_secs: 60,
        requests: 258,
        errors: 0,
        seen: NOW,
        margin: 0.0,
        value: 0.0,
        distinct: 0,
        samples: Vec::new(),
    }
}

fn ban(subject: &str, finding: Option<Finding>) -> Ban {
    Ban {
        subject: subject.parse().unwrap(),
        since: NOW,
        term: Term::Until(NOW + Duration::from_mins(10)),
        tier: finding.is_some().then_some(1),
        origin: if finding.is_some() {
            Origin::Detector
        } else {
            Origin::Operator
        },
        reason: "a \x1b[2Jword".to_owned(),
        finding,
        observe: false,
        gate: Gate::Wire,
        extended: 0,
        by: None,
        once_confirmed: None,
    }
}

fn client() -> Known {
    Known {
        window_secs: 60,
        requests: 42,
        errors: 3,
        rate: 0.7,
        margin: 0.0,
        since: NOW,
        last: NOW,
        score: -0.4,
        times_mean: 0.63,
        limits: Limits::Normal {
            z_score: 3.0,
            times_mean: 5.0,
            is_surge: false,
        },
        spans: vec![
            Span {
                secs: 1,
                effort: 2.0,
                cap: 60.0,
            },
            Span {
                secs: 600,
                effort: 103.25,
                cap: 515.0,
            },
        ],
        failures: Some(Failing {
            now: Verdict {
                score: 2.1,
                answers: 9,
                failures: 3,
                distinct: 2,
            },
            limit: 13.8,
            distinct_limit: 10,
        }),
        room: 1.0,
        usual: 1.0,
        is_newcomer: false,
        manner: None,
        samples: Vec::new(),
    }
}

#[test]
fn a_ban_is_explained_on_one_screen() {
    let mut of = explained("203.0.113.9");
    let sample = |log: &str, offset| Sample {
        log: log.to_owned(),
        offset,
    };
    let samples = vec![
        sample("/var/log/nginx/my access.log", 1234),
        sample("/var/log/nginx/my access.log", 0),
    ];
    of.known.bans = vec![ban(
        "203.0.113.9",
        Some(Finding {
            samples,
            ..finding(Test::ZScore)
        }),
    )];
    of.known.offences = Some(Offences {
        count: 1,
        last: NOW,
    });
    (of.known.next_tier, of.known.next_secs) = (2, Some(1800));
    of.entry = Some(Held {
        hits: 77,
        last_seen_secs: Some(3),
    });
    assert_eq!(
        words(&of),
        "203.0.113.9 is banned since 2026-11-22T00:01:00.000Z, until 2026-11-22T00:11:00.000Z (10m left), tier 1\n\
         where     at the wire (xdp-native on eth0); in force; 77 packets matched, the newest 3s ago\n\
         why       too many requests: it sent 258 requests in 1m, 4.30 a second. That is 3.0 standard deviations above normal (z); more than 3 flags\n\
         normal    the whole site: mean 1.12 a second, standard deviation 1.06 (learnt from hour 14 UTC)\n\
         lines     /var/log/nginx/my access.log at byte 1234, 0\n\
         \x20         tail -c +1235 '/var/log/nginx/my access.log' | head -n 1\n\
         account   1 offence, last dealt with at 2026-11-22T00:01:00.000Z; the next one bans it for 30m (tier 2)\n\
         to do     `portcullis unban 203.0.113.9` lifts the ban and forgets its offences\n\
         \x20         `portcullis allow add 203.0.113.9` keeps it from ever being banned\n"
    );
}

#[test]
fn every_test_has_words() {
    let with = |test, change: fn(&mut Finding)| {
        let mut found = finding(test);
        change(&mut found);
        cause(&found)
    };
    let all: [(_, fn(&mut Finding), _); 10] = [
        (
            Test::ZScore,
            |found| (found.surge, found.errors) = (true, 200),
            "(z); more than 3 flags; the limit was tightened since 200 of 258 failed",
        ),
        (
            Test::TimesMean,
            |found| found.threshold = 3.5,
            "That is 3.8 times the mean of the whole site; more than 3.5 times flags",
        ),
        (
            Test::Ceiling,
            |_| {},
            "Nothing was learnt yet, and until then more than 3 a second flags",
        ),
        (
            Test::Cap,
            |found| (found.window_secs, found.value, found.threshold) = (10, 95.0, 90.0),
            "within 10s counts as 95 full requests; more than 90 flags",
        ),
        (
            Test::Failures,
            |found| {
                (found.requests, found.errors, found.distinct) = (12, 11, 10);
                (found.value, found.threshold) = (14.2, 13.8);
            },
            "11 of 12 answers, 10 different paths or more. Score 14.2; more than 13.8 flags",
        ),
        (
            Test::Failures,
            |found| (found.errors, found.value) = (11, 14.2),
            "Score 14.2; more than 3 flags",
        ),
        (
            Test::OnePage,
            |found| (found.value, found.requests) = (8.0, 9),
            "asked for one page again and again and for nothing that comes with one: 8 pages in 9 requests",
        ),
        (
            Test::InventedPages,
            |found| found.value = 22.0,
            "pages that nobody else has found: 22 in 258 requests",
        ),
        (
            Test::BarePages,
            |found| found.value = 22.0,
            "for nothing of what browsers load with them: 22 in 258 requests",
        ),
        (
            Test::Members,
            |found| (found.value, found.threshold) = (6.0, 5.0),
            "6 of its members are banned, and nobody in it behaves; from 5 on all of it is",
        ),
    ];
    for (test, change, expected) in all {
        let said = with(test, change);
        assert!(said.contains(expected), "{test:?}: {said}");
    }
}

#[test]
fn where_a_ban_holds_and_whether_it_does_is_said() {
    let said = |change: fn(&mut Explained)| {
        let mut of = explained("203.0.113.9");
        of.known.bans = vec![ban("203.0.113.9", None)];
        change(&mut of);
        words(&of)
    };
    let held = Some(Held {
        hits: 0,
        last_seen_secs: None,
    });
    assert!(said(|_| {}).contains("NOT in force: the back end has no entry for it"));
    let mut of = explained("203.0.113.9");
    (of.known.bans, of.entry, of.mode) = (vec![ban("203.0.113.9", None)], held, Mode::Observe);
    let observed = words(&of);
    assert!(
        observed.contains("only observed: nothing is dropped; 0 packets matched\n"),
        "{observed}"
    );
    assert!(observed.contains("why       a  [2Jword\n"), "{observed}");
    assert!(observed.contains("left), by an operator\n"), "{observed}");
    let nginx = said(|of| of.known.bans[0].gate = Gate::Nginx);
    assert!(
        nginx.contains("in Nginx, since it came through a proxy; in force"),
        "{nginx}"
    );
    let ever = said(|of| of.known.bans[0].term = Term::Permanent);
    assert!(ever.contains("Z, for good, by an operator"), "{ever}");
}

#[test]
fn a_ban_around_is_named_and_is_what_is_to_be_lifted() {
    let mut of = explained("2001:db8:1:2::/64");
    of.known.asked = "2001:db8:1:2::7".parse().unwrap();
    of.known.bans = vec![
        ban("2001:db8:1::/56", Some(finding(Test::Members))),
        ban("2001:db8::/32", None),
    ];
    let said = words(&of);
    for expected in [
        "2001:db8:1:2::7 is counted and banned with its network, 2001:db8:1:2::/64\n",
        "2001:db8:1:2::7 is banned as part of 2001:db8:1::/56 since ",
        "also      2001:db8::/32 is banned until ",
        "`portcullis unban 2001:db8:1::/56` lifts the ban and forgets its offences, for everybody in it\n",
    ] {
        assert!(said.contains(expected), "{expected}: {said}");
    }
}

#[test]
fn who_is_not_banned_is_told_how_far_it_is_from_it() {
    let mut of = explained("198.51.100.7");
    of.known.client = Some(client());
    let said = words(&of);
    assert_eq!(
        said,
        "198.51.100.7 is not banned\n\
         now       42 requests in the last 1m, 3 failed; first seen 2026-11-22T00:01:00.000Z, last 2026-11-22T00:01:00.000Z\n\
         rate      0.70 a second: z -0.4 of 3, 0.6 of 5 times the mean\n\
         normal    the whole site: mean 1.12 a second, standard deviation 1.06 (learnt from the recent past)\n\
         work      full requests: 2 of 60 in 1s, 103 of 515 in 10m\n\
         failures  score 2.1 of 13.8: 3 of 9 answers failed, 2 of 10 different paths\n\
         account   no offence; the next one bans it for 10m (tier 1)\n\
         to do     `portcullis allow add 198.51.100.7` keeps it from ever being banned\n"
    );
    let mut near = client();
    near.spans[1].effort = 500.0;
    of.known.client = Some(near);
    let said = words(&of);
    assert!(
        said.starts_with(
            "198.51.100.7 is not banned, but close to it: its work is at 97 % of what flags\n"
        ),
        "{said}"
    );
    let shared = Known {
        room: 3.0,
        usual: 2.5,
        limits: Limits::Ceiling(30.0),
        ..client()
    };
    of.known.client = Some(shared);
    of.known.refused_until = Some(NOW);
    let said = words(&of);
    for expected in [
        "0.70 a second of 30 (nothing is learnt yet)\n",
        "many people seem to share it: its limits are 3 times as high\n",
        "it has done much for long: the limits of its spans are 2.5 times as high\n",
        "flagged   within the last minutes, and not banned",
    ] {
        assert!(said.contains(expected), "{expected}: {said}");
    }
}

#[test]
fn who_is_spared_is_told_why() {
    let mut of = explained("198.51.100.7");
    let mut said = |entry: &str, why, is_whole| {
        of.known.spared = Some(Spared {
            entry: entry.parse().unwrap(),
            why,
            is_whole,
        });
        words(&of)
    };
    assert_eq!(
        said("198.51.100.0/24", Why::Configured, true),
        "198.51.100.7 is never banned\nspared    198.51.100.0/24 is on the allowlist: configured\n"
    );
    let proxy = said("198.51.100.7/32", Why::SeenProxy, true);
    assert!(
        proxy.contains("198.51.100.7 is on the allowlist: a proxy: Nginx takes"),
        "{proxy}"
    );
    let part = said("198.51.100.7/32", Why::Configured, false);
    assert!(part.contains("is not banned\n"), "{part}");
    assert!(
        part.contains("a part of it, so that the detector"),
        "{part}"
    );
}

#[test]
fn of_who_is_unknown_nothing_is_made_up() {
    assert_eq!(
        words(&explained("192.0.2.1")),
        "nothing is known of 192.0.2.1: no recent request, no ban, no offence, no entry of the allowlist\n"
    );
    let said = words(&explained("192.0.2.0/24"));
    assert!(
        said.contains("neither it nor a part of it is banned"),
        "{said}"
    );
    let mut of = explained("192.0.2.1");
    of.known.is_regular = true;
    let said = words(&of);
    assert!(
        said.contains("is not banned\nnow       it has been here"),
        "{said}"
    );
    let mut of = explained("192.0.2.0/24");
    of.known.bans_inside = 2;
    let said = words(&of);
    assert!(said.contains("there are 2 bans of parts of it"), "{said}");
}

#[test]
fn hostile_names_of_logs_stay_names() {
    let mut page = Page::default();
    let sample = |log: &str| Sample {
        log: log.to_owned(),
        offset: 9,
    };
    lines(
        &[
            sample("/a\x1b[2J"),
            sample("/b'; rm"),
            sample("udp:127.0.0.1:514"),
        ],
        &mut page,
    );
    assert_eq!(
        page.0,
        "lines     /a [2J at byte 9\n          /b'; rm at byte 9\n          tail -c +10 '/b'\\''; rm' | head -n 1\n          \
         came by udp:127.0.0.1:514, and are kept nowhere\n"
    );
}

#[test]
fn what_programs_are_told_reads_back() {
    let mut of = explained("203.0.113.9");
    of.known.bans = vec![ban("203.0.113.9", Some(finding(Test::Cap)))];
    of.known.client = Some(client());
    of.entry = Some(Held {
        hits: 1,
        last_seen_secs: None,
    });
    let text = serde_json::to_string(&of).unwrap();
    assert_eq!(serde_json::from_str::<Explained>(&text).unwrap(), of);
}
