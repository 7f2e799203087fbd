//! The traps that other implementations fell into, each by name, and the engine's promises as properties.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test panics with its evidence"
)]

mod bench;

use std::{net::IpAddr, time::Duration};

use bench::{Bench, START, record, settings};
use portcullis_engine::{
    Ban, Command, Engine, Feed, Gate, Origin, Outcome, Proxied, Refusal, Saved, Settings, Subject,
    Term, Timestamp, Wish,
    allowlist::Why,
    baseline::Learnt,
    command::{Action, Change},
    ledger::{Length, Offences},
    parse::Record,
};
use proptest::prelude::*;

#[test]
fn a_count_of_a_minute_is_not_held_against_statistics_of_seconds() {
    let mut bench = Bench::new(settings());
    bench.everyday(700, 2);
    let normal = bench.engine.snapshot().normal;
    assert_eq!((normal.learnt, normal.mean), (Learnt::Recent, 2.0));
    // 120 requests in a minute are two a second: normal, though far above 2 + 3 × 0.5 or 5 × 2.
    for _ in 0..120 {
        bench.request("198.51.100.1", 200);
    }
    assert_eq!(bench.bans(), Vec::<String>::new());
    // z > 3 begins at 2 + 3 × 0.5 = 3.5 a second: the 211th in the window.
    assert_eq!(bench.until_banned("198.51.100.1", 1000, 200), 211 - 120);
}

#[test]
fn a_silent_client_is_not_banned_again_on_release() {
    let mut bench = Bench::new(settings());
    bench.everyday(700, 2);
    bench.until_banned("198.51.100.1", 50, 200);
    // What was under way when the ban came.
    for _ in 0..500 {
        bench.request("198.51.100.1", 499);
    }
    bench.everyday(601, 2);
    assert_eq!(bench.bans(), Vec::<String>::new());
    bench.request("198.51.100.1", 200);
    assert_eq!(bench.bans(), Vec::<String>::new());
    assert_eq!(
        (
            bench.events(Action::Ban).len(),
            bench.events(Action::Unban).len()
        ),
        (1, 1)
    );
}

#[test]
fn an_attack_never_enters_the_baseline() {
    let (mut quiet, mut attacked) = (Bench::new(settings()), Bench::new(settings()));
    quiet.everyday(1000, 2);
    attacked.everyday(700, 2);
    for second in 0..300 {
        for _ in 0..40 {
            attacked.request("198.51.100.1", 200);
        }
        // As in observe mode: the banned source's requests go on arriving.
        attacked.everyday(1, 2);
        assert_eq!(
            attacked.engine.bans().len(),
            usize::from(second >= 5),
            "second {second}"
        );
    }
    // What single clients do is learnt of those who did not come with the attack.
    let site = |bench: &Bench| {
        let mut saved = serde_json::to_value(bench.engine.saved_baseline()).unwrap();
        saved["population"].take();
        saved
    };
    assert_eq!(site(&attacked), site(&quiet));
    assert_eq!(
        attacked.engine.snapshot().normal,
        quiet.engine.snapshot().normal
    );
}

#[test]
fn a_permanent_ban_is_neither_released_nor_forgotten() {
    let mut bench = Bench::new(settings());
    bench.everyday(700, 2);
    for (tier, minutes) in [(1, Some(10)), (2, Some(30)), (3, Some(120)), (4, None)] {
        bench.until_banned("198.51.100.1", 50, 200);
        let ban = bench.engine.bans().next().unwrap();
        assert_eq!(ban.tier, Some(tier));
        match (minutes, ban.term) {
            (Some(minutes), Term::Until(end)) => {
                assert_eq!(end.since(ban.since), Duration::from_secs(60 * minutes));
                bench.pass(60 * minutes);
                assert_eq!(bench.bans(), Vec::<String>::new());
                bench.everyday(700, 2);
            }
            (None, Term::Permanent) => {}
            other => panic!("{other:?}"),
        }
    }
    bench.now = bench.now + Duration::from_secs(86_400 * 365 * 10);
    bench.pass(5);
    assert_eq!(bench.bans(), ["198.51.100.1"]);
}

#[test]
fn bans_and_offences_outlive_a_restart() {
    let mut bench = Bench::new(settings());
    bench.everyday(700, 2);
    bench.until_banned("198.51.100.1", 50, 200);
    bench.until_banned("198.51.100.2", 50, 200);
    let mut saved = Saved {
        baseline: Some(bench.engine.saved_baseline()),
        ..Saved::default()
    };
    for command in &bench.commands {
        match command {
            Command::Save(Change::Ban(ban)) => saved.bans.push(ban.clone()),
            Command::Save(Change::Offences(subject, offences)) => {
                saved.offences.push((*subject, *offences));
            }
            _ => {}
        }
    }
    // Down for five minutes: both still banned. The tier is remembered too.
    let mut bench = Bench::resume(
        settings(),
        saved.clone(),
        bench.now + Duration::from_secs(300),
    );
    let mut bans = bench.bans();
    bans.sort();
    assert_eq!(bans, ["198.51.100.1", "198.51.100.2"]);
    assert_eq!(bench.engine.snapshot().normal.mean, 2.0);
    bench.everyday(400, 2);
    assert_eq!(bench.bans(), Vec::<String>::new());
    bench.until_banned("198.51.100.1", 50, 200);
    assert_eq!(bench.engine.bans().next().unwrap().tier, Some(2));
    // Down for an hour: both have run out meanwhile, and the world is told so.
    let bench = Bench::resume(settings(), saved, bench.now + Duration::from_secs(3600));
    assert_eq!(bench.bans(), Vec::<String>::new());
    assert_eq!(bench.events(Action::Unban).len(), 2);
}

#[test]
fn an_allowlisted_address_is_in_no_command_and_no_record_says_it_was_banned() {
    let mut bench = Bench::new(settings());
    bench.everyday(700, 2);
    for _ in 0..2000 {
        bench.request("203.0.113.9", 200);
    }
    assert_eq!(bench.bans(), Vec::<String>::new());
    assert!(bench.events(Action::Ban).is_empty());
    let refused = bench.events(Action::Refuse);
    assert_eq!(refused.len(), 1, "told once, not with every request");
    assert!(
        refused[0]
            .condition
            .contains("on the allowlist (203.0.113.0/24: configured)"),
        "{}",
        refused[0]
    );
    let subject = "203.0.113.9".parse().unwrap();
    let refusal = bench
        .engine
        .ban(subject, Length::Permanent, Wish::default(), bench.now);
    assert!(
        matches!(refusal, Err(Refusal::Allowed { .. })),
        "{refusal:?}"
    );
    assert!(
        bench
            .engine
            .ban(
                "127.0.0.1".parse().unwrap(),
                Length::Permanent,
                Wish::default(),
                bench.now
            )
            .is_err()
    );
}

#[test]
fn a_64_with_an_allowlisted_address_in_it_is_not_banned() {
    let mut settings = settings();
    settings.allow.push("2001:db8:0:7::53/128".parse().unwrap());
    let mut bench = Bench::new(settings);
    bench.everyday(700, 2);
    for _ in 0..2000 {
        bench.request("2001:db8:0:7::bad", 200);
    }
    assert_eq!(bench.bans(), Vec::<String>::new());
}

#[test]
fn what_came_onto_the_allowlist_is_released_at_the_next_start() {
    let ban = Ban::new(
        "203.0.113.9".parse().unwrap(),
        START,
        Term::Permanent,
        Origin::Operator,
    );
    let saved = Saved {
        bans: vec![ban],
        ..Saved::default()
    };
    let bench = Bench::resume(settings(), saved, START);
    assert_eq!(bench.bans(), Vec::<String>::new());
    let is_it = |command: &Command| matches!(command, Command::Unban(ban, ..) if ban.subject.to_string() == "203.0.113.9");
    assert!(bench.commands.iter().any(is_it), "{:?}", bench.commands);
}

#[test]
fn a_night_without_traffic_makes_nobody_an_anomaly() {
    let mut bench = Bench::new(settings());
    bench.pass(2000);
    // A visitor in the morning: 100 requests in a minute, as a page with its assets makes them.
    for _ in 0..100 {
        bench.request("198.51.100.1", 200);
    }
    assert_eq!(bench.bans(), Vec::<String>::new());
}

#[test]
fn a_log_that_breaks_does_not_teach_that_nobody_comes() {
    let mut bench = Bench::new(settings());
    bench.everyday(900, 100);
    let normal = bench.engine.snapshot().normal;
    // Nothing comes out of the log for an hour; then it does again, as before.
    bench.pass(3600);
    bench.everyday(120, 100);
    assert_eq!(bench.bans(), Vec::<String>::new());
    let after = bench.engine.snapshot().normal;
    assert!(
        (after.mean - normal.mean).abs() < 1.0,
        "{normal:?} {after:?}"
    );
}

#[test]
fn visitors_who_come_in_bursts_are_learnt_with_the_pauses_between() {
    let mut bench = Bench::new(settings());
    for _ in 0..30 {
        for n in 0..30 {
            bench.request(&format!("10.1.1.{n}"), 200);
        }
        bench.pass(90);
    }
    let normal = bench.engine.snapshot().normal;
    assert!(normal.mean < 1.5, "{normal:?}");
    bench.until_banned("198.51.100.1", 20, 200);
}

#[test]
fn a_flagged_client_that_is_not_banned_teaches_nothing_either() {
    let (mut quiet, mut attacked) = (Bench::new(settings()), Bench::new(settings()));
    quiet.everyday(1700, 2);
    attacked.everyday(700, 2);
    for _ in 0..1000 {
        for _ in 0..50 {
            attacked.request("203.0.113.9", 200);
        }
        attacked.everyday(1, 2);
    }
    let (quiet, attacked) = (
        quiet.engine.snapshot().normal,
        attacked.engine.snapshot().normal,
    );
    assert!(
        (quiet.mean - attacked.mean).abs() < 0.2,
        "{quiet:?} {attacked:?}"
    );
}

#[test]
fn with_less_room_than_before_it_is_the_short_bans_that_go() {
    let ban = |n: u8, secs: Option<u64>, origin| {
        Ban::new(
            Subject::of_client([198, 51, 100, n].into()),
            START,
            secs.map_or(Term::Permanent, |secs| {
                Term::Until(START + Duration::from_secs(secs))
            }),
            origin,
        )
    };
    let saved = Saved {
        bans: vec![
            ban(1, Some(600), Origin::Detector),
            ban(2, None, Origin::Detector),
            ban(3, Some(60), Origin::Operator),
            ban(4, Some(7200), Origin::Detector),
        ],
        ..Saved::default()
    };
    let bench = Bench::resume(
        Settings {
            max_bans: 3,
            ..settings()
        },
        saved,
        START,
    );
    let mut left = bench.bans();
    left.sort();
    assert_eq!(left, ["198.51.100.2", "198.51.100.3", "198.51.100.4"]);
}

#[test]
fn a_clock_that_went_ahead_and_came_back_does_not_stop_the_learning() {
    let mut bench = Bench::new(settings());
    bench.everyday(400, 2);
    let before = bench.now;
    bench.now = before + Duration::from_secs(86_400 * 365);
    bench.pass(3);
    bench.now = before;
    bench.everyday(2000, 8);
    let normal = bench.engine.snapshot().normal;
    assert!(normal.mean > 5.0, "{normal:?}");
}

#[test]
fn in_the_first_minute_the_ceiling_holds() {
    let mut bench = Bench::new(settings());
    bench.pass(5);
    assert_eq!(bench.until_banned("198.51.100.1", 1000, 200), 601);
    assert_eq!(
        bench.events(Action::Ban)[0].condition,
        "10.02 req/s > 10 during warm-up"
    );
    assert!(bench.events(Action::Alarm).is_empty());
}

#[test]
fn a_mapped_address_and_its_ipv4_self_are_one_client() {
    let mut bench = Bench::new(settings());
    bench.everyday(700, 2);
    for n in 0..211 {
        bench.request(
            if n % 2 == 0 {
                "198.51.100.1"
            } else {
                "::ffff:198.51.100.1"
            },
            200,
        );
    }
    assert_eq!(bench.bans(), ["198.51.100.1"]);
}

#[test]
fn a_fresh_ipv6_address_for_each_request_does_not_help() {
    let mut bench = Bench::new(settings());
    bench.everyday(700, 2);
    for n in 0..211 {
        bench.request(&format!("2001:db8:0:7::{n:x}"), 200);
    }
    assert_eq!(bench.bans(), ["2001:db8:0:7::/64"]);
}

#[test]
fn failing_answers_tighten_the_thresholds() {
    let mut bench = Bench::new(settings());
    bench.everyday(700, 2);
    // z > 2 begins at 2 + 2 × 0.5 = 3 a second: the 181st in the window.
    assert_eq!(bench.until_banned("198.51.100.1", 1000, 404), 181);
    let finding = bench.events(Action::Ban)[0].finding.clone().unwrap();
    assert!(finding.surge && finding.threshold == 2.0, "{finding:?}");
}

#[test]
fn all_traffic_together_is_an_alarm_once_and_never_a_ban() {
    let mut bench = Bench::new(settings());
    bench.everyday(700, 2);
    for second in 0..120 {
        for n in 0..20 {
            bench.request(&format!("192.0.2.{}", (second * 20 + n) % 250), 200);
        }
        bench.pass(1);
    }
    assert_eq!(bench.events(Action::Alarm).len(), 1);
    bench.everyday(200, 2);
    assert_eq!(bench.events(Action::AllClear).len(), 1);
    assert_eq!(bench.bans(), Vec::<String>::new());
}

#[test]
fn requests_from_before_the_window_ban_nobody() {
    let mut bench = Bench::new(settings());
    bench.everyday(700, 2);
    for age in 60..2060 {
        let at = Timestamp::from_secs(bench.now.secs() - age);
        let record = record(at, "198.51.100.1", None);
        bench.engine.record(&record, bench.now);
    }
    assert_eq!(bench.bans(), Vec::<String>::new());
    assert_eq!(bench.engine.snapshot().totals.late, 2000);
}

#[test]
fn a_log_clock_ahead_of_ours_does_not_hide_a_client_or_keep_it_for_ever() {
    let mut bench = Bench::new(settings());
    bench.everyday(700, 2);
    for _ in 0..210 {
        let record = record(Timestamp::MAX, "198.51.100.1", None);
        bench.engine.record(&record, bench.now);
    }
    bench.pass(60);
    bench.request("198.51.100.1", 200);
    assert_eq!(bench.bans(), Vec::<String>::new(), "the window has passed");
    bench.pass(700);
    assert_eq!(bench.engine.snapshot().clients, 0);
}

#[test]
fn an_operator_s_pardon_starts_the_schedule_anew() {
    let mut bench = Bench::new(settings());
    bench.everyday(700, 2);
    bench.until_banned("198.51.100.1", 50, 200);
    let subject = "198.51.100.1".parse().unwrap();
    bench
        .engine
        .unban(subject, "a mistake".to_owned(), bench.now)
        .unwrap();
    bench.collect();
    // It is kept that there was a pardon: what is read again after a restart is not held against it.
    let pardoned = Offences {
        count: 0,
        last: bench.now,
    };
    assert_eq!(
        bench.engine.unban(subject, String::new(), bench.now),
        Err(Refusal::NotBanned(subject))
    );
    assert!(
        bench
            .commands
            .contains(&Command::Save(Change::Offences(subject, pardoned)))
    );
    bench.until_banned("198.51.100.1", 50, 200);
    assert_eq!(bench.engine.bans().next().unwrap().tier, Some(1));
}

#[test]
fn a_failed_ban_is_on_record_as_failed() {
    let mut engine = Engine::new(settings(), Saved::default(), START);
    let subject: Subject = "198.51.100.1".parse().unwrap();
    engine
        .ban(subject, Length::Permanent, Wish::default(), START)
        .unwrap();
    while let Some(command) = engine.next_command() {
        if let Command::Ban(ban) = command {
            engine.outcome(
                Outcome::Banned(ban, Err("the map is full".to_owned())),
                START,
            );
            break;
        }
    }
    let rest: Vec<_> = std::iter::from_fn(|| engine.next_command()).collect();
    let said = |command: &Command| matches!(command, Command::Record(event) if event.action == Action::Fail);
    assert!(rest.iter().any(said), "{rest:?}");
    assert!(
        !rest.iter().any(
            |command| matches!(command, Command::Record(event) if event.action == Action::Ban)
        )
    );
}

#[derive(Clone, Debug)]
enum Input {
    Request { client: u8, status: u16, skew: i64 },
    Pass(u64),
    Jump(i64),
    Ban(u8),
    Unban(u8),
}

fn input() -> impl Strategy<Value = Input> {
    let skew = prop_oneof![8 => Just(0i64), 1 => -100i64..100];
    prop_oneof![
        30 => (0u8..12, prop_oneof![Just(200u16), Just(404)], skew)
            .prop_map(|(client, status, skew)| Input::Request { client, status, skew }),
        6 => (0u64..20).prop_map(Input::Pass),
        1 => prop_oneof![-4000i64..4000, Just(-10_000_000), Just(10_000_000)].prop_map(Input::Jump),
        1 => (0u8..12).prop_map(Input::Ban),
        1 => (0u8..12).prop_map(Input::Unban),
    ]
}

/// Clients 10 and 11 are on the allowlist.
fn client(n: u8) -> IpAddr {
    if n < 10 {
        [198, 51, 100, n].into()
    } else {
        [203, 0, 113, n].into()
    }
}

/// A small site, so that a few hundred inputs reach every path and bound.
fn small() -> Settings {
    let mut settings = settings();
    settings.detect.window_secs = 5;
    settings.detect.warm_up_ceiling = 3.0;
    settings.baseline.span_secs = 30;
    settings.baseline.warm_up_secs = 10;
    settings.baseline.recompute_secs = 3;
    settings.schedule = vec![
        Length::For(Duration::from_secs(5)),
        Length::For(Duration::from_secs(20)),
        Length::Permanent,
    ];
    settings.max_clients = 6;
    settings.max_bans = 4;
    settings.max_offenders = 3;
    settings
}

fn play(inputs: &[Input]) -> (Engine, Vec<Command>) {
    let mut now = START;
    let mut engine = Engine::new(small(), Saved::default(), now);
    let mut commands = Vec::new();
    for input in inputs {
        match *input {
            Input::Request {
                client: n,
                status,
                skew,
            } => {
                let at = Timestamp::from_millis(now.millis().saturating_add_signed(skew * 1000));
                let record = Record::new(at, client(n), status);
                for _ in 0..5 {
                    engine.record(&record, now);
                }
            }
            Input::Pass(secs) => {
                now = now + Duration::from_secs(secs);
                engine.tick(now);
            }
            Input::Jump(secs) => {
                now = Timestamp::from_millis(now.millis().saturating_add_signed(secs * 1000));
                engine.tick(now);
            }
            Input::Ban(n) => {
                let length = Length::For(Duration::from_secs(10));
                drop(engine.ban(Subject::of_client(client(n)), length, Wish::default(), now));
            }
            Input::Unban(n) => {
                drop(engine.unban(Subject::of_client(client(n)), "by hand".to_owned(), now));
            }
        }
        commands.extend(std::iter::from_fn(|| engine.next_command()));
        // Bounds hold, and every ban that stands has an end ahead or none by its tier.
        assert!(engine.bans().len() <= 4);
        assert!(engine.snapshot().clients <= 6);
        for ban in engine.bans() {
            match ban.term {
                Term::Until(end) => assert!(
                    end > now || !matches!(input, Input::Pass(_) | Input::Jump(_)),
                    "{ban:?} at {now}"
                ),
                Term::Permanent => assert_eq!((ban.tier, ban.origin), (Some(3), Origin::Detector)),
            }
        }
    }
    (engine, commands)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_same_input_gives_the_same_commands(inputs in prop::collection::vec(input(), 0..200)) {
        prop_assert_eq!(play(&inputs).1, play(&inputs).1);
    }

    /// Whatever happens, and however the clock jumps: an allowlisted address is in no command, bans and their ends
    /// alternate, and what is saved is what stands.
    #[test]
    fn the_world_is_told_a_consistent_story(inputs in prop::collection::vec(input(), 0..300)) {
        let (engine, commands) = play(&inputs);
        let (mut in_force, mut saved, mut accounts) =
            (std::collections::BTreeSet::new(), std::collections::BTreeMap::new(), std::collections::BTreeMap::<Subject, Offences>::new());
        for command in commands {
            match command {
                Command::Ban(ban) => {
                    prop_assert!(!ban.subject.to_string().starts_with("203."), "{:?}", ban);
                    in_force.insert(ban.subject);
                }
                Command::Unban(ban, ..) => prop_assert!(in_force.remove(&ban.subject), "{:?} was not banned", ban),
                Command::Save(Change::Ban(ban)) => { saved.insert(ban.subject, ban); }
                Command::Save(Change::Unban(subject)) => { saved.remove(&subject); }
                Command::Save(Change::Offences(subject, offences)) => { accounts.insert(subject, offences); }
                Command::Save(Change::Forget(subject)) => { accounts.remove(&subject); }
                Command::Save(Change::Baseline(_) | Change::Allow(..))
                | Command::Look(_)
                | Command::Allowlist
                | Command::Verify(..)
                | Command::Record(_) => {}
            }
        }
        let stands: std::collections::BTreeMap<_, _> = engine.bans().map(|ban| (ban.subject, ban.clone())).collect();
        prop_assert_eq!(in_force, stands.keys().copied().collect());
        prop_assert_eq!(saved, stands);
        prop_assert!(accounts.len() <= 3);
    }
}

const BEHIND: Feed = Feed {
    again: false,
    behind: true,
    mixed: false,
    one_in: 1,
};
const AGAIN: Feed = Feed {
    again: true,
    ..BEHIND
};

fn secs_before(now: Timestamp, secs: u64) -> Timestamp {
    Timestamp::from_secs(now.secs() - secs)
}

#[test]
fn what_was_written_while_the_agent_was_down_is_learnt_from_and_bans_nobody() {
    let mut bench = Bench::new(settings());
    bench.feed(BEHIND);
    for ago in (61..2400).rev() {
        let at = secs_before(bench.now, ago);
        for n in 0..2 {
            let client = format!("192.0.2.{}", (ago * 2 + n) % 250);
            bench.read(&record(at, &client, None));
        }
        // An attack that is over.
        if (1000..1200).contains(&ago) {
            (0..20).for_each(|_| bench.read(&record(at, "198.51.100.1", None)));
        }
    }
    bench.feed(Feed::default());
    bench.pass(1);
    assert_eq!(bench.bans(), Vec::<String>::new());
    let snapshot = bench.engine.snapshot();
    assert_eq!(snapshot.normal.learnt, Learnt::Recent);
    assert!(
        snapshot.normal.seconds >= 1500,
        "{} seconds",
        snapshot.normal.seconds
    );
    assert!(
        (1.9..2.5).contains(&snapshot.normal.mean),
        "what was flagged is not learnt: {}",
        snapshot.normal.mean
    );
    assert!(snapshot.totals.late_findings > 0);
    assert_eq!(snapshot.alarm_since, None);
    let notices = bench.notices();
    assert_eq!(notices.len(), 1, "{notices:?}");
    assert!(notices[0].contains("nobody was banned"), "{notices:?}");
}

#[test]
fn a_flood_that_is_read_late_is_found_by_the_time_of_its_lines() {
    let mut bench = Bench::new(settings());
    bench.everyday(700, 2);
    // 4 req/s are 220 requests in the 55 s of a window that are read, and 210 are allowed in 60 s.
    bench.feed(BEHIND);
    let start = bench.now.secs();
    for second in start..start + 60 {
        bench.now = Timestamp::from_secs(second + 5);
        for _ in 0..4 {
            bench.read(&record(Timestamp::from_secs(second), "198.51.100.1", None));
        }
    }
    assert_eq!(bench.bans(), ["198.51.100.1"]);
}

#[test]
fn what_is_older_than_the_window_does_not_help_to_ban() {
    let mut bench = Bench::new(settings());
    bench.everyday(700, 2);
    bench.feed(BEHIND);
    let old = secs_before(bench.now, 70);
    bench.now = bench.now + Duration::from_secs(50);
    (0..210).for_each(|_| bench.read(&record(old, "198.51.100.1", None)));
    // One that is young enough, and as many again as are allowed.
    let young = secs_before(bench.now, 59);
    (0..200).for_each(|_| bench.read(&record(young, "198.51.100.1", None)));
    assert_eq!(bench.bans(), Vec::<String>::new());
    bench.feed(Feed::default());
    bench.pass(1);
    assert_eq!(bench.bans(), Vec::<String>::new());
}

#[test]
fn lines_of_the_present_among_old_ones_teach_nothing_false() {
    let mut bench = Bench::new(settings());
    bench.everyday(700, 100);
    let before = bench.engine.saved_baseline();
    bench.now = bench.now + Duration::from_secs(600);
    bench.feed(Feed {
        mixed: true,
        ..BEHIND
    });
    for ago in (0..600).rev() {
        let at = secs_before(bench.now, ago);
        if ago % 60 == 0 {
            bench.read(&record(bench.now, "192.0.2.1", None));
        }
        for n in 0..100 {
            bench.read(&record(at, &format!("192.0.3.{n}"), None));
        }
    }
    bench.feed(Feed::default());
    bench.pass(61);
    let after = bench.engine.snapshot().normal;
    assert!((after.mean - 100.0).abs() < 1.0, "{after:?}, {before:?}");
}

#[test]
fn a_sample_of_steady_traffic_is_learnt_as_steady() {
    let mut bench = Bench::new(settings());
    bench.feed(Feed {
        one_in: 8,
        ..Feed::default()
    });
    // 96 requests a second, of which 12 are read, give or take: a fixed pattern with the variance of a sample.
    for second in 0..900_u64 {
        let read = [7, 10, 12, 14, 17, 12][usize::try_from(second % 6).unwrap()];
        for n in 0..read {
            bench.request(&format!("10.2.{}.{n}", second % 200), 200);
        }
        bench.pass(1);
    }
    let normal = bench.engine.snapshot().normal;
    assert!((normal.mean - 96.0).abs() < 2.0, "{normal:?}");
    // Unmended it would be 26.
    assert!(normal.stddev < 6.0, "{normal:?}");
}

#[test]
fn what_is_read_again_after_a_restart_restores_what_was_known() {
    let lines = |from: u64, to: u64| {
        (from..to).flat_map(|second| {
            (0..3).map(move |n| {
                let client = format!("192.0.2.{}", (second * 3 + n) % 100);
                record(Timestamp::from_secs(second), &client, None)
            })
        })
    };
    let (start, stop) = (START.secs(), START.secs() + 1000);
    let mut first = Bench::new(settings());
    for record in lines(start, stop) {
        first.now = record.at;
        first.read(&record);
    }
    first.pass(1);
    // Killed: the baseline is the one of the last minute.
    let baseline = first
        .commands
        .iter()
        .rev()
        .find_map(|command| match command {
            Command::Save(Change::Baseline(saved)) => Some(saved.as_ref().clone()),
            _ => None,
        });
    let saved = Saved {
        baseline,
        ..Saved::default()
    };
    let mut second = Bench::resume(settings(), saved, first.now);
    second.feed(AGAIN);
    for record in lines(stop - 130, stop) {
        second.read(&record);
    }
    second.feed(Feed::default());
    first.pass(61);
    second.pass(61);
    assert_eq!(
        first.engine.saved_baseline(),
        second.engine.saved_baseline()
    );
    let (first, second) = (first.engine.snapshot(), second.engine.snapshot());
    assert_eq!((first.rate, first.clients), (second.rate, second.clients));
    assert_eq!((second.totals.lines, second.totals.again), (0, 390));
}

#[test]
fn nobody_pays_twice_for_lines_that_are_read_again() {
    let mut first = Bench::new(settings());
    first.everyday(700, 2);
    let at = first.now;
    (0..300).for_each(|_| first.request("198.51.100.1", 200));
    (0..300).for_each(|_| first.request("198.51.100.2", 200));
    assert_eq!(first.bans(), ["198.51.100.1", "198.51.100.2"]);
    first.pass(1);
    let pardoned = "198.51.100.2".parse().unwrap();
    first
        .engine
        .unban(pardoned, "a mistake".to_owned(), first.now)
        .unwrap();
    first.collect();
    let mut offences = std::collections::BTreeMap::new();
    for command in &first.commands {
        if let Command::Save(Change::Offences(subject, account)) = command {
            offences.insert(*subject, *account);
        }
    }
    let saved = Saved {
        bans: first.engine.bans().cloned().collect(),
        allow: Vec::new(),
        offences: offences.into_iter().collect(),
        baseline: Some(first.engine.saved_baseline()),
    };
    let mut second = Bench::resume(settings(), saved, first.now);
    second.feed(AGAIN);
    for client in ["198.51.100.1", "198.51.100.2"] {
        (0..300).for_each(|_| second.read(&record(at, client, None)));
    }
    second.feed(Feed::default());
    second.request("198.51.100.2", 200);
    assert_eq!(second.bans(), ["198.51.100.1"], "as before");
    assert_eq!(second.engine.snapshot().totals.bans, 0);
    // Pardoned is not allowed for ever, and starts at the first step.
    (0..300).for_each(|_| second.request("198.51.100.2", 200));
    assert_eq!(second.bans(), ["198.51.100.1", "198.51.100.2"]);
    assert_eq!(second.engine.ban_of(pardoned).unwrap().tier, Some(1));
}

#[test]
fn a_sample_of_a_flood_finds_it_and_its_estimate_is_true() {
    let mut bench = Bench::new(settings());
    bench.everyday(700, 2);
    bench.feed(Feed {
        one_in: 8,
        ..Feed::default()
    });
    // 8,000 requests of an attacker, of which every eighth is read.
    let mut read = 0;
    while bench.bans().is_empty() {
        bench.request("198.51.100.1", 200);
        read += 1;
        assert!(read < 1000);
    }
    let finding = bench
        .engine
        .ban_of("198.51.100.1".parse().unwrap())
        .unwrap()
        .finding
        .clone()
        .unwrap();
    assert_eq!(finding.requests, 8 * read);
    assert!(finding.margin > 0.0 && read > 20, "{finding:?}");
}

fn behind_a_proxy(proxied: Proxied) -> Bench {
    let mut bench = Bench::new(Settings {
        proxies: vec!["10.0.0.0/8".parse().unwrap()],
        proxied,
        ..settings()
    });
    bench.everyday(700, 2);
    bench
}

#[test]
fn a_client_behind_a_proxy_is_told_of_and_never_banned_at_the_wire() {
    let mut bench = behind_a_proxy(Proxied::Tell);
    let attack = record(bench.now, "198.51.100.1", Some("10.0.0.5"));
    (0..1000).for_each(|_| bench.read(&attack));
    assert_eq!(bench.bans(), Vec::<String>::new());
    let told = bench.told(Action::Refuse);
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].contains("through the proxy 10.0.0.5"), "{told:?}");
    // One that came without it is.
    let attack = record(bench.now, "198.51.100.2", Some("198.51.100.2"));
    (0..1000).for_each(|_| bench.read(&attack));
    assert_eq!(bench.bans(), ["198.51.100.2"]);
    // And where the log does not say whose connection it was, nobody is.
    let attack = record(bench.now, "198.51.100.3", None);
    (0..1000).for_each(|_| bench.read(&attack));
    assert_eq!(bench.bans(), ["198.51.100.2"]);
    assert_eq!(bench.told(Action::Refuse).len(), 2);
    let notices = bench.notices();
    assert!(
        notices.len() == 1 && notices[0].contains("realip_remote_addr"),
        "{notices:?}"
    );
}

#[test]
fn a_client_behind_a_proxy_is_banned_in_nginx_where_that_is_configured() {
    let mut bench = behind_a_proxy(Proxied::Ban);
    let attack = record(bench.now, "198.51.100.1", Some("10.0.0.5"));
    (0..1000).for_each(|_| bench.read(&attack));
    let ban = bench
        .engine
        .ban_of("198.51.100.1".parse().unwrap())
        .unwrap();
    assert_eq!((ban.gate, ban.tier), (Gate::Nginx, Some(1)));
    assert_eq!(bench.bans(), ["198.51.100.1"], "and only once");
}

#[test]
fn who_is_banned_at_the_wire_and_comes_through_a_proxy_is_kept_out_there_too() {
    let mut bench = behind_a_proxy(Proxied::Ban);
    let direct = record(bench.now, "198.51.100.1", Some("198.51.100.1"));
    (0..300).for_each(|_| bench.read(&direct));
    let subject = "198.51.100.1".parse().unwrap();
    let before = bench.engine.ban_of(subject).unwrap().clone();
    assert_eq!(before.gate, Gate::Wire);
    bench.pass(5);
    let proxied = record(bench.now, "198.51.100.1", Some("10.0.0.5"));
    (0..300).for_each(|_| bench.read(&proxied));
    let expected = Ban {
        gate: Gate::Both,
        ..before
    };
    assert_eq!(
        bench.engine.ban_of(subject),
        Some(&expected),
        "the same offence"
    );
}

#[test]
fn who_is_allowed_is_left_out_of_a_network_s_ban_in_nginx_which_stays() {
    let mut bench = behind_a_proxy(Proxied::Ban);
    for banned in ["198.51.100.0/24", "198.51.100.7", "198.51.100.8"] {
        let subject = banned.parse().unwrap();
        let ban = bench
            .engine
            .ban(subject, Length::Permanent, Wish::default(), bench.now);
        ban.unwrap();
        assert_eq!(bench.engine.ban_of(subject).unwrap().gate, Gate::Both);
    }
    let monitor = vec![(
        "198.51.100.7/32".parse().unwrap(),
        Why::Name("monitor.test".to_owned()),
    )];
    bench.engine.surround(monitor, bench.now);
    bench.collect();
    assert_eq!(bench.bans(), ["198.51.100.0/24", "198.51.100.8"]);
}

#[test]
fn a_proxy_is_never_banned_be_it_configured_or_only_seen() {
    let mut bench = behind_a_proxy(Proxied::Ban);
    let health_check = record(bench.now, "10.0.0.5", Some("10.0.0.5"));
    (0..1000).for_each(|_| bench.read(&health_check));
    assert_eq!(bench.bans(), Vec::<String>::new());
    assert!(bench.told(Action::Refuse)[0].contains("10.0.0.0/8"));
    // Nobody has named this one.
    bench.read(&record(bench.now, "198.51.100.1", Some("192.0.2.77")));
    let requests = record(bench.now, "192.0.2.77", Some("192.0.2.77"));
    (0..1000).for_each(|_| bench.read(&requests));
    assert_eq!(bench.bans(), Vec::<String>::new());
    let said = bench.notices().concat();
    assert!(said.contains("192.0.2.77 is a proxy"), "{said}");
    let refused = bench.engine.ban(
        "192.0.2.77".parse().unwrap(),
        Length::Permanent,
        Wish::default(),
        bench.now,
    );
    assert!(
        matches!(refused, Err(Refusal::Allowed { .. })),
        "{refused:?}"
    );
}
