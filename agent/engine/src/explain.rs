//! What is known of one subject: numbers and evidence, no words.

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::{
    allowlist::Why,
    baseline::{Learnt, Normal},
    caps::SPANS,
    clients::Client,
    detect::{self, Sample, Settings, Thresholds},
    failures::Verdict,
    habits::{Habits, Manner},
    ledger::{Ban, Length, Offences},
    subject::Subject,
    time::Timestamp,
    watch::{self, Watch},
};

pub use crate::watch::spans;

/// Everything that is known of a subject.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Explanation {
    /// What was asked for.
    pub asked: Subject,
    /// Whom its requests are counted under; an IPv6 address is part of its /64. Of a prefix, the prefix.
    pub subject: Subject,
    /// When this was known.
    pub time: Timestamp,
    /// The bans that keep it out, narrowest first: the first one decides.
    pub bans: Vec<Ban>,
    /// Of a prefix, how many bans there are of parts of it.
    pub bans_inside: usize,
    /// What it has on its account.
    pub offences: Option<Offences>,
    /// The step of the schedule that its next offence earns, from 1.
    pub next_tier: u32,
    /// How long it would be banned then; none is for good.
    pub next_secs: Option<u64>,
    /// Why it is never banned.
    pub spared: Option<Spared>,
    /// It was flagged a moment ago and could not be banned; until then that is not told again.
    pub refused_until: Option<Timestamp>,
    /// It has been here within a day or so, and nothing was held against it.
    pub is_regular: bool,
    /// Its requests, if some are known.
    pub client: Option<Known>,
    /// What they are held against.
    pub normal: Normal,
    /// Since when the site's alarm stands.
    pub alarm_since: Option<Timestamp>,
    /// The site is attacked, or was just now: newcomers are held to how they ask.
    pub is_attacked: bool,
}

/// An entry that keeps a subject from being banned.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spared {
    /// The entry.
    pub entry: IpNet,
    /// Why it is on the allowlist.
    pub why: Why,
    /// It covers the subject; otherwise only a part of it, which keeps the detector from banning the whole.
    pub is_whole: bool,
}

/// What is known of a client's requests, and how far they are from what flags.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Known {
    /// Length of the window in seconds.
    pub window_secs: u32,
    /// Requests in it.
    pub requests: u64,
    /// Those that failed.
    pub errors: u64,
    /// Requests a second over the window.
    pub rate: f64,
    /// What is taken off that rate for the error of a sample.
    pub margin: f64,
    /// When it was first seen, of those requests or, if it is known for longer, of all.
    pub since: Timestamp,
    /// When it was last seen.
    pub last: Timestamp,
    /// z of the rate.
    pub score: f64,
    /// The rate as multiples of the mean.
    pub times_mean: f64,
    /// Rates that flag it.
    pub limits: Limits,
    /// What it has done in each of several spans.
    pub spans: Vec<Span>,
    /// The test on its failing answers.
    pub failures: Option<Failing>,
    /// Its address is taken for one that many people share; limits are as much higher. 1: it is not.
    pub room: f64,
    /// What it may do in each span is as much more, since it usually does much. 1: it does not.
    pub usual: f64,
    /// It has come with the attack that goes on.
    pub is_newcomer: bool,
    /// How it asks.
    pub manner: Option<Manner>,
    /// Where its newest lines begin.
    pub samples: Vec<Sample>,
}

/// Rates above which a client is flagged.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Limits {
    /// Nothing is learnt yet: requests a second.
    Ceiling(f64),
    /// Held against what is normal.
    Normal {
        /// Standard deviations above the mean.
        z_score: f64,
        /// Multiples of the mean.
        times_mean: f64,
        /// They are tightened, since its requests fail.
        is_surge: bool,
    },
}

/// How much a client has done in a span.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Span {
    /// Its length in seconds.
    pub secs: u32,
    /// In requests of full effort.
    pub effort: f64,
    /// What flags; 0: nothing does.
    pub cap: f64,
}

/// How a client's answers stand.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Failing {
    /// Score and counts.
    #[serde(flatten)]
    pub now: Verdict,
    /// The score that flags.
    pub limit: f64,
    /// Different paths that must have failed, unless it is not let in.
    pub distinct_limit: u32,
}

/// What [`Known`] is made of.
pub(crate) struct Of<'a> {
    pub settings: &'a Settings,
    pub normal: &'a Normal,
    pub watch: &'a Watch,
    pub clock: u64,
}

impl Of<'_> {
    pub(crate) fn known(
        &self,
        subject: Subject,
        client: &Client,
        samples: Vec<Sample>,
    ) -> Option<Known> {
        let Self {
            settings,
            normal,
            watch,
            clock,
        } = *self;
        let second = u32::try_from(clock).unwrap_or(u32::MAX);
        let mut window = client.window.clone();
        window.advance(clock, settings.window_secs.into(), |_| {});
        let mut habits = client.habits.clone();
        if let Some(habits) = &mut habits {
            habits.slide(second, settings.window_secs);
        }
        let habits = habits.as_deref();
        let since = habits.map_or_else(|| window.oldest(), |habits| Some(habits.since.into()));
        let last = habits.map_or_else(|| window.newest(), |habits| Some(habits.last.into()));
        let room = watch.room(settings, habits, clock);
        let usual = watch.usual(subject);
        let rate = detect::rate(&window, settings.window_secs);
        let margin = detect::margin(&window, settings.window_secs);
        let held = rate - margin;
        let spans = habits.map_or_else(Vec::new, |habits| {
            let (secs, caps) = (spans(settings), watch.population.caps());
            let efforts = watch::efforts(&window, habits, clock);
            let span = |span| Span {
                secs: secs[span],
                effort: efforts[span],
                cap: caps[span] * if span < 2 { room } else { room.max(usual) },
            };
            (0..SPANS).map(span).collect()
        });
        let failures = habits.filter(|_| settings.failures.score > 0.0);
        Some(Known {
            window_secs: settings.window_secs,
            requests: window.requests(),
            errors: window.errors(),
            rate,
            margin,
            since: Timestamp::from_secs(since?),
            last: Timestamp::from_secs(last?),
            score: (held - normal.mean) / normal.stddev,
            times_mean: held / normal.mean,
            limits: if normal.learnt == Learnt::WarmUp {
                Limits::Ceiling(settings.warm_up_ceiling * room)
            } else {
                let is_surge = detect::is_surge(settings, normal, &window);
                let Thresholds {
                    z_score,
                    times_mean,
                } = if is_surge {
                    settings.surge
                } else {
                    settings.ordinary
                };
                Limits::Normal {
                    z_score: z_score * room,
                    times_mean: times_mean * room,
                    is_surge,
                }
            },
            spans,
            failures: failures.map(|habits| Failing {
                now: habits.series.standing(&settings.failures, second),
                limit: settings.failures.score,
                distinct_limit: settings.failures.distinct,
            }),
            room,
            usual,
            is_newcomer: habits.is_some_and(|habits| watch.is_newcomer(habits)),
            manner: habits.map(Habits::manner),
            samples,
        })
    }
}

/// Seconds of a ban; none is for good.
pub(crate) fn secs(length: Length) -> Option<u64> {
    match length {
        Length::For(length) => Some(length.as_secs()),
        Length::Permanent => None,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        baseline,
        engine::{Engine, Saved, Wish},
        parse::{Fields, Format, Record},
    };

    const START: u64 = 1_000_000;

    fn engine(allow: &[&str]) -> Engine {
        let settings = crate::Settings {
            format: Format::new("auto", Fields::default()).unwrap(),
            baseline: baseline::Settings {
                span_secs: 1800,
                recompute_secs: 60,
                hour_min_secs: 1800,
                warm_up_secs: 120,
                floor_mean: 1.0,
                floor_stddev: 1.0,
                floor_error_share: 0.05,
                growth_per_hour: 0.0,
                freeze_secs: 0,
            },
            detect: Settings::default(),
            schedule: vec![Length::For(std::time::Duration::from_secs(600))],
            allow: allow.iter().map(|net| net.parse().unwrap()).collect(),
            proxies: Vec::new(),
            proxied: crate::Proxied::Tell,
            forgive: std::time::Duration::ZERO,
            jitter: 0.0,
            release: crate::Release {
                quiet: std::time::Duration::ZERO,
                extensions: 0,
            },
            blast: crate::blast::Settings::ANY,
            max_clients: 1000,
            max_bans: 1000,
            max_offenders: 1000,
        };
        let mut engine = Engine::new(settings, Saved::default(), Timestamp::from_secs(START));
        engine.log(&Arc::from("/log"));
        engine
    }

    /// Requests of one client, each in a second of its own.
    fn come(engine: &mut Engine, client: &str, requests: u64, status: u16) {
        let records: Vec<Record> = (0..requests)
            .map(|n| Record {
                offset: 100 * n,
                ..Record::new(
                    Timestamp::from_secs(START + n),
                    client.parse().unwrap(),
                    status,
                )
            })
            .collect();
        engine.replay(&records);
    }

    fn of(engine: &Engine, subject: &str) -> Explanation {
        engine.explain(subject.parse().unwrap())
    }

    #[test]
    fn a_client_is_known_by_its_requests_until_it_has_gone() {
        let mut engine = engine(&[]);
        come(&mut engine, "2001:db8::1", 15, 404);
        let known = of(&engine, "2001:db8::2");
        assert_eq!(known.subject.to_string(), "2001:db8::/64");
        let client = known.client.unwrap();
        assert_eq!((client.requests, client.errors), (15, 15));
        assert_eq!(client.limits, Limits::Ceiling(10.0));
        assert_eq!(client.since, Timestamp::from_secs(START));
        assert_eq!(client.samples[0].log, "/log");
        assert_eq!(client.samples[0].offset, 1400);
        let failing = client.failures.unwrap();
        assert!(failing.now.score > 0.0 && failing.limit > 13.0);
        assert!(client.spans[2].effort > client.spans[1].effort);
        // Time alone takes it all back.
        engine.pass_until(Timestamp::from_secs(START + 200));
        let client = of(&engine, "2001:db8::1").client.unwrap();
        assert_eq!((client.requests, client.rate), (0, 0.0));
        assert_eq!(client.spans[2].effort, 0.0);
        assert!(client.failures.unwrap().now.score < failing.now.score / 2.0);
        engine.pass_until(Timestamp::from_secs(START + 2000));
        let known = of(&engine, "2001:db8::1");
        assert!(known.client.is_none() && known.is_regular);
    }

    #[test]
    fn a_ban_comes_with_its_evidence_and_what_comes_next() {
        let mut engine = engine(&["192.0.2.128/25"]);
        let second = Timestamp::from_secs(START);
        let record = Record::new(second, "192.0.2.7".parse().unwrap(), 200);
        engine.replay(&vec![record; 1000]);
        let known = of(&engine, "192.0.2.7");
        assert_eq!(known.bans.len(), 1);
        let finding = known.bans[0].finding.as_ref().unwrap();
        assert_eq!(finding.samples.len(), 3);
        assert_eq!(known.offences.unwrap().count, 1);
        assert_eq!((known.next_tier, known.next_secs), (1, Some(600)));
        assert_eq!(known.spared, None);
        let around = of(&engine, "192.0.2.0/24");
        assert_eq!((around.bans.len(), around.bans_inside), (0, 1));
        assert!(!around.spared.unwrap().is_whole);
        assert!(of(&engine, "192.0.2.200").spared.unwrap().is_whole);
        let length = Length::Permanent;
        let prefix = "192.0.2.0/26".parse().unwrap();
        engine.ban(prefix, length, Wish::default(), second).unwrap();
        let bans = of(&engine, "192.0.2.7").bans;
        let subjects: Vec<String> = bans.iter().map(|ban| ban.subject.to_string()).collect();
        assert_eq!(subjects, ["192.0.2.7", "192.0.2.0/26"]);
        assert_eq!(of(&engine, "192.0.2.8").bans.len(), 1);
        let known = of(&engine, "192.0.2.99");
        assert!(known.client.is_none() && known.bans.is_empty() && !known.is_regular);
    }
}
