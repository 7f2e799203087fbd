//! The end of a ban: whether its source has stopped, how offences are forgotten, that not all come back together, what is never
//! confirmed, and what operators allow.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test panics with its evidence"
)]

mod bench;

use std::{collections::BTreeSet, time::Duration};

use bench::{Bench, START, settings};
use portcullis_engine::{
    Command, Outcome, Refusal, Release, Saved, Settings, Subject, Term, Timestamp, Wish,
    allowlist::Why,
    command::{Action, Allowed, Change},
    ledger::Length,
};

const HOST: &str = "198.51.100.1";
const MINUTES: u64 = 60;

fn looking() -> Settings {
    Settings {
        release: Release {
            quiet: Duration::from_secs(60),
            extensions: 3,
        },
        ..settings()
    }
}

fn host() -> Subject {
    HOST.parse().unwrap()
}

impl Bench {
    fn offend(&mut self) -> Timestamp {
        self.until_banned(HOST, 1000, 200);
        self.end_of(host()).unwrap()
    }

    fn end_of(&self, subject: Subject) -> Option<Timestamp> {
        match self.engine.ban_of(subject)?.term {
            Term::Until(end) => Some(end),
            Term::Permanent => None,
        }
    }

    /// So many seconds, in which whoever is looked at has sent something so many seconds ago.
    fn pass_seen(&mut self, secs: u64, ago: Option<u64>) {
        for _ in 0..secs {
            let known = self.commands.len();
            self.pass(1);
            let looks: Vec<Subject> = self.commands[known..]
                .iter()
                .filter_map(|command| match command {
                    Command::Look(subject) => Some(*subject),
                    _ => None,
                })
                .collect();
            for subject in looks {
                self.engine
                    .looked(subject, ago.map(Duration::from_secs), self.now);
            }
            self.collect();
        }
    }

    fn looks(&self) -> usize {
        let looks = self.commands.iter();
        looks
            .filter(|command| matches!(command, Command::Look(_)))
            .count()
    }
}

#[test]
fn a_source_that_goes_on_is_kept_out_for_as_long_again_and_no_more_than_three_times() {
    let mut bench = Bench::new(looking());
    let end = bench.offend();
    for extended in 1..=3 {
        let left = bench.end_of(host()).unwrap().since(bench.now).as_secs();
        bench.pass_seen(left, Some(3));
        assert_eq!(
            bench.end_of(host()),
            Some(end + Duration::from_secs(extended * 10 * MINUTES))
        );
    }
    let told: Vec<String> = bench.told(Action::Extend);
    let words = |n| format!("still sending, the newest packet 3s ago: extended by 10m ({n} of 3)");
    assert_eq!(told, [words(1), words(2), words(3)]);
    assert_eq!(bench.told(Action::Ban).len(), 1, "it is one ban");
    let left = bench.end_of(host()).unwrap().since(bench.now).as_secs();
    bench.pass_seen(left, Some(3));
    assert_eq!(bench.bans(), Vec::<String>::new());
    assert_eq!(bench.told(Action::Unban), ["its time is over"]);
    // What comes next is the second offence.
    bench.pass(120);
    bench.offend();
    assert_eq!(bench.engine.ban_of(host()).unwrap().tier, Some(2));
}

#[test]
fn a_source_that_has_stopped_and_one_that_nobody_knows_of_are_released_on_time() {
    for ago in [Some(60), None] {
        let mut bench = Bench::new(looking());
        let end = bench.offend();
        bench.pass_seen(end.since(bench.now).as_secs(), ago);
        assert_eq!((bench.bans().len(), bench.looks()), (0, 1), "asked once");
    }
    let mut unanswered = Bench::new(looking());
    let end = unanswered.offend();
    unanswered.pass(end.since(unanswered.now).as_secs());
    assert_eq!((unanswered.bans().len(), unanswered.looks()), (0, 1));
}

#[test]
fn an_answer_that_comes_too_late_or_for_another_ban_changes_nothing() {
    let mut bench = Bench::new(looking());
    let end = bench.offend();
    bench.pass(end.since(bench.now).as_secs());
    bench.engine.looked(host(), Some(Duration::ZERO), bench.now);
    bench.collect();
    assert_eq!(bench.bans(), Vec::<String>::new());
    // An operator's ban is an operator's business.
    let length = Length::For(Duration::from_secs(60));
    let ban = bench.engine.ban(host(), length, Wish::default(), bench.now);
    ban.unwrap();
    bench.pass_seen(61, Some(0));
    assert_eq!((bench.bans().len(), bench.looks()), (0, 1));
}

#[test]
fn what_was_found_out_before_the_end_of_one_ban_is_not_held_for_the_next() {
    let mut bench = Bench::new(looking());
    let end = bench.offend();
    bench.pass_seen(end.since(bench.now).as_secs() - 1, None);
    assert_eq!(bench.looks(), 1);
    let wish = Wish {
        observe: true,
        ..Wish::default()
    };
    let ban = bench.engine.ban(host(), Length::Permanent, wish, bench.now);
    ban.unwrap();
    // Whoever is only observed can offend.
    (0..700).for_each(|_| bench.request(HOST, 200));
    assert_eq!(bench.engine.ban_of(host()).unwrap().tier, Some(2));
    let end = bench.end_of(host()).unwrap();
    bench.pass_seen(end.since(bench.now).as_secs(), Some(3));
    assert_eq!((bench.bans().len(), bench.looks()), (1, 2));
}

#[test]
fn without_it_nobody_is_looked_at() {
    let mut bench = Bench::new(settings());
    let end = bench.offend();
    bench.pass_seen(end.since(bench.now).as_secs(), Some(0));
    assert_eq!((bench.bans().len(), bench.looks()), (0, 0));
}

#[test]
fn an_offence_is_forgotten_after_so_long_without_another() {
    let tier_after = |forgive: u64, pause: u64| {
        let mut bench = Bench::new(Settings {
            forgive: Duration::from_secs(forgive),
            ..settings()
        });
        for _ in 0..2 {
            let end = bench.offend();
            bench.pass(end.since(bench.now).as_secs() + 61);
        }
        bench.pass(pause);
        bench.offend();
        bench.engine.ban_of(host()).unwrap().tier.unwrap()
    };
    assert_eq!(
        tier_after(1800, 0),
        3,
        "while it is kept out nothing is forgotten"
    );
    assert_eq!(tier_after(0, 86_400), 3, "never");
    assert_eq!(tier_after(86_400, 3600), 3);
    assert_eq!(tier_after(7200, 7200), 2, "one of two");
    assert_eq!(tier_after(3600, 8000), 1, "both");
}

#[test]
fn those_who_were_banned_together_do_not_come_back_together() {
    let ends = |jitter: f64| {
        let mut bench = Bench::new(Settings {
            jitter,
            ..settings()
        });
        for n in 0..50 {
            let client = format!("198.51.100.{n}");
            (0..700).for_each(|_| bench.request(&client, 200));
        }
        let bans = bench.engine.bans().map(|ban| ban.subject);
        let bans: Vec<Subject> = bans.collect();
        assert_eq!(bans.len(), 50);
        let ends: BTreeSet<u128> = bans
            .into_iter()
            .map(|subject| bench.end_of(subject).unwrap().since(START).as_millis())
            .collect();
        ends
    };
    assert_eq!(ends(0.0), [600_000].into());
    let spread = ends(0.5);
    assert!(spread.len() >= 49, "{spread:?}");
    assert!(spread.iter().all(|end| (600_000..=900_000).contains(end)));
    assert!(spread.last().unwrap() - spread.first().unwrap() > 200_000);
    assert_eq!(ends(0.5), spread, "computed again they are the same");
}

fn wish(confirm: Option<u64>) -> Wish {
    Wish {
        reason: "by hand".to_owned(),
        by: "root".to_owned(),
        observe: false,
        confirm: confirm.map(Duration::from_secs),
    }
}

#[test]
fn a_ban_that_nobody_confirms_is_rolled_back_and_one_that_is_confirmed_stands() {
    let mut bench = Bench::new(settings());
    let wider: Subject = "192.0.2.0/24".parse().unwrap();
    for subject in [host(), wider] {
        let ban = bench
            .engine
            .ban(subject, Length::Permanent, wish(Some(60)), bench.now);
        ban.unwrap();
    }
    bench.pass(59);
    assert_eq!(bench.end_of(host()), Some(START + Duration::from_secs(60)));
    bench.engine.confirm(wider, bench.now).unwrap();
    bench.pass(1);
    assert_eq!(bench.bans(), ["192.0.2.0/24"]);
    assert_eq!(bench.told(Action::Unban), ["nobody has confirmed it"]);
    let ban = bench.engine.ban_of(wider).unwrap();
    assert_eq!(
        (ban.term, ban.by.as_deref()),
        (Term::Permanent, Some("root"))
    );
    for (subject, refusal) in [
        (wider, Refusal::Confirmed(wider)),
        (host(), Refusal::NotBanned(host())),
    ] {
        assert_eq!(bench.engine.confirm(subject, bench.now), Err(refusal));
    }
    // What would be rolled back to is not kept.
    let again = bench
        .engine
        .ban(wider, Length::Permanent, wish(Some(60)), bench.now);
    assert_eq!(again, Err(Refusal::Standing(wider)));
}

#[test]
fn a_short_ban_does_not_wait_for_its_confirmation() {
    let mut bench = Bench::new(settings());
    let length = Length::For(Duration::from_secs(10));
    let ban = bench.engine.ban(host(), length, wish(Some(60)), bench.now);
    ban.unwrap();
    assert_eq!(bench.end_of(host()), Some(START + Duration::from_secs(10)));
}

#[test]
fn what_an_operator_allows_is_released_and_is_never_banned_until_it_is_taken_off() {
    let mut bench = Bench::new(settings());
    bench.offend();
    let allowed = Allowed {
        since: bench.now,
        by: "root".to_owned(),
        reason: "our monitor".to_owned(),
    };
    let net = "198.51.100.0/24".parse().unwrap();
    assert_eq!(bench.engine.allow(net, allowed.clone(), bench.now), Ok(1));
    bench.collect();
    assert_eq!(bench.bans(), Vec::<String>::new());
    assert_eq!(
        bench.told(Action::Unban),
        ["now on the allowlist (198.51.100.0/24: our monitor)"]
    );
    (0..700).for_each(|_| bench.request(HOST, 200));
    assert_eq!(bench.bans(), Vec::<String>::new());
    let refused = bench
        .engine
        .ban(host(), Length::Permanent, wish(None), bench.now);
    assert_eq!(
        refused,
        Err(Refusal::Allowed {
            subject: host(),
            entry: net,
            why: Why::Operator(allowed.clone()),
        })
    );
    let said = refused.unwrap_err().to_string();
    assert!(
        said.contains("`portcullis allow remove 198.51.100.0/24` first"),
        "{said}"
    );
    let covering = bench.engine.allowlist().covering(host());
    assert_eq!(covering.map(|(entry, _)| entry), Some(net));
    // It survives a restart.
    let saved = bench.commands.iter().filter_map(|command| match command {
        Command::Save(Change::Allow(net, Some(allowed))) => Some((*net, allowed.clone())),
        _ => None,
    });
    let saved = Saved {
        allow: saved.collect(),
        ..Saved::default()
    };
    let mut bench = Bench::resume(settings(), saved, bench.now);
    assert!(
        bench
            .engine
            .allowlist()
            .iter()
            .any(|(entry, _)| entry == net)
    );
    bench.engine.disallow(net, "root", bench.now).unwrap();
    assert_eq!(
        bench.engine.disallow(net, "root", bench.now),
        Err(Refusal::NotAllowed(net))
    );
    bench.offend();
    let wide = "0.0.0.0/0".parse().unwrap();
    let refused = bench.engine.allow(wide, allowed, bench.now);
    assert_eq!(refused, Err(Refusal::TooWideToAllow(wide)));
    let configured = "203.0.113.0/24".parse().unwrap();
    assert_eq!(
        bench.engine.disallow(configured, "root", bench.now),
        Err(Refusal::NotAllowed(configured))
    );
}

#[test]
fn an_extension_that_fails_at_first_is_said_to_be_in_force_when_it_is() {
    let mut bench = Bench::new(looking());
    let end = bench.offend();
    let left = end.since(bench.now).as_secs();
    bench.pass(left - 1);
    bench.engine.looked(host(), Some(Duration::ZERO), bench.now);
    let extended =
        std::iter::from_fn(|| bench.engine.next_command()).find_map(|command| match command {
            Command::Ban(ban) => Some(ban),
            _ => None,
        });
    let extended = extended.unwrap();
    let bans = bench.told(Action::Ban).len();
    for result in [Err("no room".to_owned()), Ok(()), Ok(())] {
        let outcome = Outcome::Banned(extended.clone(), result);
        bench.engine.outcome(outcome, bench.now);
        bench.collect();
    }
    assert_eq!(bench.told(Action::Fail), ["not banned yet: no room"]);
    let told = bench.told(Action::Extend);
    assert_eq!((told.len(), told[1].as_str()), (2, "in force again"));
    // Brought back by a comparison later on, it is a ban like any other.
    assert_eq!(bench.told(Action::Ban).len(), bans + 1);
}

#[test]
fn what_comes_onto_the_allowlist_between_two_runs_is_pardoned_as_it_is_within_one() {
    let mut bench = Bench::new(settings());
    bench.offend();
    let ban = bench.engine.ban_of(host()).unwrap().clone();
    let offences = bench.engine.explain(host()).offences.unwrap();
    // The former run was killed between the word of the operator and what follows from it.
    let allowed = Allowed {
        since: bench.now,
        by: "root".to_owned(),
        reason: "our monitor".to_owned(),
    };
    let saved = Saved {
        bans: vec![ban],
        offences: vec![(host(), offences)],
        allow: vec![(host().net(), allowed)],
        baseline: None,
    };
    let mut bench = Bench::resume(settings(), saved, bench.now);
    assert_eq!(bench.bans(), Vec::<String>::new());
    bench
        .engine
        .disallow(host().net(), "root", bench.now)
        .unwrap();
    bench.offend();
    assert_eq!(bench.engine.ban_of(host()).unwrap().tier, Some(1));
}
