//! What keeps the detector from doing harm: who is on the allowlist for what, how many bans it may make, clocks that are set, and
//! settings that change while it runs.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test panics with its evidence"
)]

mod bench;

use std::time::Duration;

use bench::{Bench, START, settings};
use ipnet::IpNet;
use portcullis_engine::{
    Ban, Command, Origin, Saved, Settings, Subject, Term, Timestamp, Wish,
    allowlist::Why,
    blast,
    command::{Action, Allowed, Change},
    ledger::{Length, Offences},
};

const DAY: u64 = 86_400;

fn subject(text: &str) -> Subject {
    text.parse().unwrap()
}

fn net(text: &str) -> IpNet {
    subject(text).net()
}

fn after(secs: u64) -> Timestamp {
    START + Duration::from_secs(secs)
}

impl Bench {
    fn allowlists(&self) -> usize {
        let written = self.commands.iter();
        written
            .filter(|command| **command == Command::Allowlist)
            .count()
    }

    fn looked_into(&self) -> Vec<Subject> {
        let commands = self.commands.iter();
        let asked = commands.filter_map(|command| match command {
            Command::Verify(client, _) => Some(*client),
            _ => None,
        });
        asked.collect()
    }

    fn end_of(&self, text: &str) -> Option<Term> {
        self.engine.ban_of(subject(text)).map(|ban| ban.term)
    }
}

#[test]
fn who_comes_into_the_surroundings_is_released_and_who_leaves_can_be_banned() {
    let mut bench = Bench::new(settings());
    bench.until_banned("198.51.100.1", 1000, 200);
    let gateway = vec![(net("198.51.100.1"), Why::Host("a gateway".to_owned()))];
    bench.engine.surround(gateway.clone(), bench.now);
    bench.collect();
    assert_eq!(bench.bans(), Vec::<String>::new());
    assert_eq!(
        bench.told(Action::Unban),
        ["now on the allowlist (198.51.100.1: a gateway)"]
    );
    assert_eq!(bench.allowlists(), 1);
    // The same again is no change.
    bench.engine.surround(gateway, bench.now);
    bench.collect();
    assert_eq!(bench.allowlists(), 1);
    for _ in 0..2000 {
        bench.request("198.51.100.1", 200);
    }
    let refused = bench.told(Action::Refuse);
    assert!(
        refused[0].contains("on the allowlist (198.51.100.1/32: a gateway)"),
        "{refused:?}"
    );
    bench.engine.surround(Vec::new(), bench.now);
    bench.collect();
    assert_eq!(bench.allowlists(), 2);
    bench.until_banned("198.51.100.1", 1000, 200);
}

#[test]
fn what_an_operator_allows_outlives_that_it_is_a_gateway_no_more() {
    let mut bench = Bench::new(settings());
    let gateway = vec![(net("198.51.100.1"), Why::Host("a gateway".to_owned()))];
    bench.engine.surround(gateway, bench.now);
    let allowed = Allowed {
        since: bench.now,
        by: "root".to_owned(),
        reason: "a monitor".to_owned(),
    };
    bench
        .engine
        .allow(net("198.51.100.1"), allowed, bench.now)
        .unwrap();
    bench.engine.surround(Vec::new(), bench.now);
    let length = Length::Permanent;
    let refused = bench
        .engine
        .ban(subject("198.51.100.1"), length, Wish::default(), bench.now);
    refused.unwrap_err();
    bench
        .engine
        .disallow(net("198.51.100.1"), "root", bench.now)
        .unwrap();
    let ban = bench
        .engine
        .ban(subject("198.51.100.1"), length, Wish::default(), bench.now);
    ban.unwrap();
}

#[test]
fn a_crawler_that_proves_to_be_one_is_released_for_a_day() {
    let mut bench = Bench::new(settings());
    bench.until_banned("2001:db8::7", 1000, 200);
    let crawler = subject("2001:db8::/64");
    assert_eq!(bench.looked_into(), [crawler]);
    let name = "crawl-7.search.example.net";
    bench.engine.verified(crawler, name, bench.now);
    bench.collect();
    assert_eq!(bench.bans(), Vec::<String>::new());
    assert_eq!(bench.engine.explain(crawler).offences.unwrap().count, 0);
    for _ in 0..2000 {
        bench.request("2001:db8::8", 200);
    }
    assert_eq!(bench.bans(), Vec::<String>::new());
    let spared = bench.engine.explain(crawler).spared.unwrap();
    assert_eq!(spared.why, Why::Crawler(name.to_owned()));
    let known = bench.now;
    bench.engine.tick(known + Duration::from_secs(DAY));
    bench.collect();
    assert_eq!(bench.engine.explain(crawler).spared, None);
    assert_eq!(bench.allowlists(), 2);
}

#[test]
fn nobody_asks_for_the_name_of_a_network_or_of_whom_an_operator_bans() {
    let mut bench = Bench::new(settings());
    let length = Length::Permanent;
    for text in ["198.51.100.1", "192.0.2.0/24"] {
        let ban = bench
            .engine
            .ban(subject(text), length, Wish::default(), bench.now);
        ban.unwrap();
    }
    bench.collect();
    assert!(bench.looked_into().is_empty());
}

fn cautious(per_minute: u32, regulars: f64) -> Settings {
    Settings {
        blast: blast::Settings {
            per_minute,
            regulars,
        },
        ..settings()
    }
}

/// All of them at once, far above everything that is normal.
fn flood(bench: &mut Bench, clients: std::ops::Range<u32>, times: u32) {
    for n in clients {
        let client = format!("198.51.{}.{}", n / 250, n % 250 + 1);
        for _ in 0..times {
            bench.request(&client, 200);
        }
    }
}

#[test]
fn past_so_many_bans_a_minute_people_are_told_and_the_worst_come_first() {
    let mut bench = Bench::new(cautious(20, 1.0));
    bench.everyday(400, 2);
    flood(&mut bench, 0..30, 900);
    assert_eq!(bench.bans().len(), 10, "half of it at once");
    let held = bench.told(Action::Hold);
    assert_eq!(held.len(), 1);
    assert!(
        held[0].contains("20 bans a minute at most") && held[0].contains("bans.max_per_minute"),
        "{held:?}"
    );
    assert!(bench.engine.snapshot().held_since.is_some());
    let refused = bench.told(Action::Refuse);
    assert_eq!(refused.len(), 20);
    assert!(refused[0].contains("but it has to wait"), "{refused:?}");
    // One goes on worse than all others, and is the next.
    flood(&mut bench, 29..30, 4000);
    bench.everyday(6, 2);
    assert_eq!(bench.bans().len(), 11);
    assert!(bench.engine.ban_of(subject("198.51.0.30")).is_some());
    bench.everyday(53, 2);
    assert_eq!(bench.bans().len(), 19);
    bench.everyday(60, 2);
    assert_eq!(bench.bans().len(), 19, "those who stopped are not banned");
    assert_eq!(bench.told(Action::Resume).len(), 1);
    assert_eq!(bench.engine.snapshot().held_since, None);
    assert_eq!(bench.told(Action::Hold).len(), 1, "said once");
}

#[test]
fn what_an_operator_has_said_of_somebody_who_waits_is_not_undone() {
    let mut bench = Bench::new(cautious(2, 1.0));
    bench.everyday(400, 2);
    flood(&mut bench, 0..3, 900);
    let waiting = subject("198.51.0.3");
    let length = Length::Permanent;
    bench
        .engine
        .ban(waiting, length, Wish::default(), bench.now)
        .unwrap();
    bench
        .engine
        .unban(waiting, "a mistake".to_owned(), bench.now)
        .unwrap();
    bench.collect();
    bench.everyday(59, 2);
    assert!(bench.engine.ban_of(waiting).is_none());
    assert!(bench.engine.ban_of(subject("198.51.0.1")).is_some());
}

#[test]
fn a_network_that_had_to_wait_is_looked_at_again() {
    for comes in [false, true] {
        let mut settings = cautious(10, 1.0);
        settings.detect.prefix_members = 5;
        let mut bench = Bench::new(settings);
        bench.everyday(400, 2);
        for n in 0..5 {
            for _ in 0..900 {
                bench.request(&format!("2001:db8:0:{n}::1"), 200);
            }
        }
        assert_eq!(bench.bans().len(), 5);
        assert_eq!(bench.told(Action::Hold).len(), 1);
        if comes {
            bench.request("2001:db8:0:9::1", 200);
        }
        bench.everyday(20, 2);
        let network = bench.engine.ban_of(subject("2001:db8::/56"));
        assert_eq!(network.is_none(), comes);
    }
}

#[test]
fn a_crawler_s_network_is_not_banned_for_its_sake() {
    let mut settings = settings();
    settings.detect.prefix_members = 5;
    let mut bench = Bench::new(settings);
    bench.everyday(400, 2);
    for n in 0..5 {
        for _ in 0..900 {
            bench.request(&format!("2001:db8:0:{n}::1"), 200);
        }
    }
    assert_eq!(bench.bans().len(), 6);
    let crawler = subject("2001:db8:0:3::/64");
    bench
        .engine
        .verified(crawler, "crawl.example.net", bench.now);
    bench.collect();
    assert!(bench.engine.ban_of(subject("2001:db8::/56")).is_none());
    assert_eq!(bench.bans().len(), 4);
}

#[test]
fn many_who_are_refused_cost_no_more_than_few() {
    let mut bench = Bench::new(Settings {
        max_clients: 40_000,
        ..cautious(2, 1.0)
    });
    // The ceiling of the warm-up is passed by the first 601 requests of each.
    let told = |bench: &Bench| bench.told(Action::Refuse).len();
    flood(&mut bench, 0..40, 601);
    assert_eq!(told(&bench), 39);
    bench.pass(601);
    // What was told is told anew ten minutes later, and what is over is kept no longer.
    flood(&mut bench, 0..40, 601);
    assert!(told(&bench) > 70, "{}", told(&bench));
}

#[test]
fn what_is_on_the_allowlist_for_another_reason_is_written_when_the_back_end_is_to_know() {
    let mut bench = Bench::new(settings());
    // A proxy that was seen is spared by the detector alone.
    let record = bench::record(bench.now, "198.51.100.7", Some("192.0.2.80"));
    bench.read(&record);
    assert_eq!(bench.allowlists(), 0);
    let configured = Settings {
        allow: vec![net("192.0.2.80")],
        ..settings()
    };
    bench.engine.reconfigure(configured, bench.now);
    bench.collect();
    assert_eq!(bench.allowlists(), 1);
    bench.engine.reconfigure(settings(), bench.now);
    bench.collect();
    assert_eq!(bench.allowlists(), 2);
    assert!(
        bench
            .engine
            .allowlist()
            .covering(subject("192.0.2.80"))
            .is_some()
    );
}

#[test]
fn of_those_who_had_been_here_before_a_share_and_of_strangers_all() {
    let mut settings = Settings {
        max_clients: 10_000,
        max_bans: 1000,
        ..cautious(0, 0.25)
    };
    // A few visitors more are no anomaly here.
    settings.baseline.floor_stddev = 5.0;
    let mut bench = Bench::new(settings);
    bench.everyday(400, 5);
    // Visitors who came, behaved, left, and have come again.
    for away in [700, 0] {
        for n in 0..120 {
            flood(&mut bench, n..n + 1, 4);
            bench.everyday(u64::from(n % 2), 5);
        }
        bench.everyday(away, 5);
    }
    // Now all that they do looks wrong.
    flood(&mut bench, 0..120, 3000);
    assert_eq!(bench.bans().len(), 30, "a quarter of their visits");
    let held = bench.told(Action::Hold);
    assert!(held[0].contains("has banned 30 visitors"), "{held:?}");
    // Strangers are not spared by that.
    flood(&mut bench, 500..540, 3000);
    let strangers = bench.bans().len() - 30;
    assert!(strangers >= 38, "{strangers} of 40");
}

#[test]
fn bans_last_as_long_as_was_decided_whatever_becomes_of_the_clock() {
    for millis in [86_400_000_i64, -86_400_000, -300_000] {
        let mut bench = Bench::new(settings());
        bench.everyday(400, 2);
        bench.until_banned("198.51.100.1", 1000, 200);
        let wish = Wish {
            confirm: Some(Duration::from_secs(60)),
            ..Wish::default()
        };
        let length = Length::For(Duration::from_secs(7200));
        bench
            .engine
            .ban(subject("192.0.2.1"), length, wish, bench.now)
            .unwrap();
        bench.collect();
        let crawler = subject("192.0.2.99");
        bench
            .engine
            .verified(crawler, "crawl.example.net", bench.now);
        let old = bench.now;
        bench.now = old.shifted(millis);
        bench.engine.clock_set(millis, bench.now);
        bench.engine.tick(bench.now);
        bench.collect();
        let ten_minutes = Term::Until(bench.now + Duration::from_secs(600));
        assert_eq!(bench.end_of("198.51.100.1"), Some(ten_minutes));
        let notices = bench.notices();
        assert!(
            notices
                .iter()
                .any(|words| words.contains("the clock was set")),
            "{notices:?}"
        );
        assert!(bench.engine.explain(crawler).spared.is_some());
        // On disk, too, with the account.
        let saved = bench
            .commands
            .iter()
            .rev()
            .find_map(|command| match command {
                Command::Save(Change::Ban(ban)) if ban.subject == subject("198.51.100.1") => {
                    Some(ban.clone())
                }
                _ => None,
            });
        assert_eq!(saved.unwrap().since, bench.now);
        let account = bench.engine.explain(subject("198.51.100.1")).offences;
        assert_eq!(account.unwrap().last, bench.now);
        bench.pass(599);
        assert_eq!(
            bench.bans(),
            ["198.51.100.1"],
            "the other was not confirmed"
        );
        bench.pass(1);
        assert_eq!(bench.bans(), Vec::<String>::new());
        // Traffic is watched on.
        bench.until_banned("198.51.100.2", 1000, 200);
    }
}

#[test]
fn a_ban_that_the_clock_had_put_off_begins_with_the_start() {
    let made = after(3 * DAY);
    let ban = |text, term| Ban {
        tier: Some(2),
        ..Ban::new(subject(text), made, term, Origin::Detector)
    };
    let half_an_hour = Duration::from_secs(1800);
    let saved = Saved {
        bans: vec![
            ban("198.51.100.1", Term::Until(made + half_an_hour)),
            ban("198.51.100.2", Term::Permanent),
        ],
        offences: vec![(
            subject("198.51.100.1"),
            Offences {
                count: 2,
                last: made,
            },
        )],
        ..Saved::default()
    };
    let mut bench = Bench::resume(settings(), saved, START);
    let end = Term::Until(START + half_an_hour);
    assert_eq!(bench.end_of("198.51.100.1"), Some(end));
    assert_eq!(bench.end_of("198.51.100.2"), Some(Term::Permanent));
    let account = bench.engine.explain(subject("198.51.100.1")).offences;
    assert_eq!(account.unwrap().last, START);
    bench.pass(1800);
    assert_eq!(bench.bans(), ["198.51.100.2"]);
}

#[test]
fn settings_change_while_it_runs_and_what_stands_stays() {
    let mut bench = Bench::new(settings());
    bench.everyday(400, 2);
    bench.until_banned("198.51.100.1", 1000, 200);
    let end = bench.end_of("198.51.100.1");
    let five_minutes = Length::For(Duration::from_secs(300));
    let mut changed = Settings {
        schedule: vec![five_minutes],
        allow: vec![net("198.51.100.9")],
        max_bans: 1,
        ..settings()
    };
    changed.detect.ordinary.times_mean = 50.0;
    changed.detect.ordinary.z_score = 500.0;
    assert!(bench.engine.reconfigure(changed.clone(), bench.now));
    bench.collect();
    assert_eq!(bench.end_of("198.51.100.1"), end);
    assert_eq!(bench.allowlists(), 1);
    let allows = |bench: &Bench, text| bench.engine.allowlist().covering(subject(text)).is_some();
    assert!(allows(&bench, "198.51.100.9") && !allows(&bench, "203.0.113.9"));
    assert!(allows(&bench, "127.0.0.1"), "what is built in stays");
    // A hundred times the mean in place of five.
    let needed = bench.until_banned("198.51.100.2", 1000, 200);
    assert!(needed > 3000, "{needed}");
    let now = bench.now;
    let Some(Term::Until(end)) = bench.end_of("198.51.100.2") else {
        panic!("not banned until a time");
    };
    assert_eq!(end.since(now), Duration::from_secs(300));
    // What is meant for another window is not heeded; the rest is.
    changed.detect.window_secs = 10;
    changed.detect.ordinary.times_mean = 1.0;
    changed.schedule = vec![Length::Permanent];
    assert!(!bench.engine.reconfigure(changed, bench.now));
    assert!(bench.until_banned("198.51.100.3", 1000, 200) > 3000);
    assert_eq!(bench.end_of("198.51.100.3"), Some(Term::Permanent));
}
