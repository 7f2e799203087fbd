//! The blast radius: how many bans the detector may make, and of whom, before people have looked.
//!
//! A detector that is wrong about one visitor is wrong about many, and soon. So it makes at most so many bans a minute, and
//! bans of those who have been here before only up to a share of their visits. Past either, whoever is found waits; as there is
//! room again it goes to the worst first: to networks, which make room themselves, and to those who were found most often meanwhile.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::IpAddr,
    time::Duration,
};

use crate::{detect::Finding, ledger::Gate, subject::Subject, time::Timestamp};

/// How much may be done.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// Bans of the detector in any minute; 0: any number.
    pub per_minute: u32,
    /// Bans of those who have been here before, as a share of their visits, of the last ten minutes both; 1: all of them.
    pub regulars: f64,
}

impl Settings {
    /// Any number of bans, of anybody.
    pub const ANY: Self = Self {
        per_minute: 0,
        regulars: 1.0,
    };
}

/// So many of those who have been here before may be banned in ten minutes, however few there are.
const FEW: u32 = 20;
/// Minutes over which visits and bans of regulars are counted.
const MINUTES: u64 = 10;
const MINUTE: u64 = 60;
/// Sources that wait; at the bound the one that was found least often gives way, of these the one that was found longest ago.
const MAX_HELD: usize = 16_384;
/// While the site is attacked, those who have been here before and were found so often are held back no longer: they go on.
const AGAIN: u32 = 2;

/// Somebody who would be banned.
#[derive(Clone, Debug, PartialEq)]
pub struct Suspect {
    /// Who.
    pub subject: Subject,
    /// The address that the last request came from; none for a network.
    pub address: Option<IpAddr>,
    /// Why.
    pub finding: Finding,
    /// Where it is to be kept out.
    pub gate: Gate,
    /// It has been here before, and nothing was held against it.
    pub is_regular: bool,
}

#[derive(Debug)]
struct Waiting {
    suspect: Suspect,
    place: Place,
}

/// How bad somebody is who waits, the worst last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    is_network: bool,
    /// How often it was found since it waits.
    times: u32,
    newest: Timestamp,
    subject: Subject,
}

/// What regulars did and what was done to them in a minute.
#[derive(Clone, Copy, Debug)]
struct Tally {
    minute: u64,
    bans: u32,
    visits: u32,
}

/// Bans that may be made now: half of what a minute allows at once, and the other half a minute, evenly. So no minute has more.
#[derive(Clone, Copy, Debug)]
struct Tokens {
    left: f64,
    filled: Timestamp,
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Blast {
    tokens: Option<Tokens>,
    minutes: VecDeque<Tally>,
    held: BTreeMap<Subject, Waiting>,
    order: BTreeSet<Place>,
    /// Somebody has to wait since then, and the last time.
    holding: Option<(Timestamp, Timestamp)>,
}

impl Blast {
    /// Somebody who has been here before has come again.
    pub fn visit(&mut self, second: u64) {
        self.minute(second).visits += 1;
    }

    /// A ban was made.
    pub fn banned(
        &mut self,
        settings: &Settings,
        subject: Subject,
        is_regular: bool,
        now: Timestamp,
    ) {
        self.forget(subject);
        // Where any number may be made, none is owed should that change.
        self.tokens = (settings.per_minute > 0).then(|| Tokens {
            left: self.fill(settings, now) - 1.0,
            filled: now,
        });
        if is_regular {
            self.minute(now.secs()).bans += 1;
        }
    }

    /// What was found of somebody is settled otherwise.
    pub fn forget(&mut self, subject: Subject) {
        if let Some(waiting) = self.held.remove(&subject) {
            self.order.remove(&waiting.place);
        }
    }

    /// The clock was set by so many milliseconds. Visits and bans of regulars are counted anew.
    pub fn shift(&mut self, millis: i64) {
        self.minutes.clear();
        self.tokens = self.tokens.map(|tokens| Tokens {
            filled: tokens.filled.shifted(millis),
            ..tokens
        });
        self.holding = self
            .holding
            .map(|(since, last)| (since.shifted(millis), last.shifted(millis)));
        for waiting in self.held.values_mut() {
            waiting.place.newest = waiting.place.newest.shifted(millis);
        }
        self.order = self.held.values().map(|waiting| waiting.place).collect();
    }

    fn minute(&mut self, second: u64) -> &mut Tally {
        let minute = second / MINUTE;
        while let Some(oldest) = self.minutes.front()
            && oldest.minute + MINUTES <= minute
        {
            self.minutes.pop_front();
        }
        if self.minutes.back().is_none_or(|last| last.minute < minute) {
            self.minutes.push_back(Tally {
                minute,
                bans: 0,
                visits: 0,
            });
        }
        let last = self.minutes.len() - 1;
        &mut self.minutes[last]
    }

    /// Bans that may be made now.
    fn fill(&self, settings: &Settings, now: Timestamp) -> f64 {
        let half = f64::from(settings.per_minute) / 2.0;
        // Of the smallest settings at least one.
        let most = half.max(1.0);
        self.tokens.map_or(most, |tokens| {
            let since = now.since(tokens.filled).as_secs_f64();
            (tokens.left + since * half / MINUTE as f64).min(most)
        })
    }

    /// Is there room for a ban?
    fn has_room(&self, settings: &Settings, now: Timestamp) -> bool {
        settings.per_minute == 0 || self.fill(settings, now) >= 1.0
    }

    /// Bans of regulars that were made, and that may be made.
    fn of_regulars(&self, settings: &Settings, now: Timestamp) -> (u32, u32) {
        let minute = now.secs() / MINUTE;
        let recent = self.minutes.iter();
        let recent = recent.filter(|tally| tally.minute + MINUTES > minute);
        let (bans, visits) = recent.fold((0, 0), |(bans, visits), tally| {
            (bans + tally.bans, visits + tally.visits)
        });
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a share of a count"
        )]
        let allowed = (f64::from(visits) * settings.regulars) as u32;
        (bans, allowed.max(FEW).saturating_sub(bans))
    }

    /// Is somebody's ban held back for the sake of those who have been here before?
    fn is_spared(
        &self,
        settings: &Settings,
        suspect: &Suspect,
        times: u32,
        is_attacked: bool,
        now: Timestamp,
    ) -> bool {
        let goes_on = is_attacked && times >= AGAIN;
        suspect.is_regular
            && settings.regulars < 1.0
            && !goes_on
            && self.of_regulars(settings, now).1 == 0
    }

    /// What keeps this ban from being made now, in words, if anything does; whoever it is waits then.
    pub fn hold(
        &mut self,
        settings: &Settings,
        suspect: &Suspect,
        is_attacked: bool,
        now: Timestamp,
    ) -> Option<String> {
        let waiting = self.held.get(&suspect.subject);
        let times = waiting.map_or(0, |waiting| waiting.place.times) + 1;
        let because = if !self.has_room(settings, now) {
            format!(
                "the detector makes {} bans a minute at most",
                settings.per_minute
            )
        } else if self.is_spared(settings, suspect, times, is_attacked, now) {
            let (bans, _) = self.of_regulars(settings, now);
            format!(
                "the detector has banned {bans} visitors within ten minutes who had been here before"
            )
        } else {
            return None;
        };
        let since = self.holding.map_or(now, |(since, _)| since);
        self.holding = Some((since, now));
        self.forget(suspect.subject);
        let place = Place {
            is_network: suspect.address.is_none(),
            times,
            newest: now,
            subject: suspect.subject,
        };
        self.order.insert(place);
        let suspect = suspect.clone();
        self.held.insert(place.subject, Waiting { suspect, place });
        if self.held.len() > MAX_HELD
            && let Some(least) = self.order.pop_first()
        {
            self.held.remove(&least.subject);
        }
        Some(because)
    }

    /// The worst of those for whom there is room now. Who has not been found for a minute has stopped.
    pub fn worst(
        &mut self,
        settings: &Settings,
        is_attacked: bool,
        now: Timestamp,
    ) -> Option<Suspect> {
        if self.held.is_empty() || !self.has_room(settings, now) {
            return None;
        }
        let mut found = None;
        let mut stopped = Vec::new();
        for place in self.order.iter().rev() {
            let Some(waiting) = self.held.get(&place.subject) else {
                continue;
            };
            if now.since(place.newest).as_secs() >= MINUTE {
                stopped.push(place.subject);
            } else if !self.is_spared(settings, &waiting.suspect, place.times, is_attacked, now) {
                found = Some(waiting.suspect.clone());
                break;
            }
        }
        for subject in stopped {
            self.forget(subject);
        }
        let found = found?;
        self.forget(found.subject);
        Some(found)
    }

    /// For how long somebody had to wait, once nobody has had to for a minute; said once.
    pub fn over(&mut self, now: Timestamp) -> Option<Duration> {
        let (since, last) = self.holding?;
        if now.since(last).as_secs() < MINUTE {
            return None;
        }
        self.holding = None;
        self.held.clear();
        self.order.clear();
        Some(now.since(since))
    }

    /// Does anybody have to wait, or had to within a minute?
    #[must_use]
    pub const fn since(&self) -> Option<Timestamp> {
        match self.holding {
            Some((since, _)) => Some(since),
            None => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        baseline::{Learnt, Normal},
        detect,
        window::Window,
    };

    fn suspect(n: u32, is_regular: bool) -> Suspect {
        let address: IpAddr = std::net::Ipv4Addr::from(n).into();
        Suspect {
            subject: Subject::of_client(address),
            address: Some(address),
            finding: detect::finding(
                &detect::Settings::ordered(),
                &Normal {
                    mean: 1.0,
                    stddev: 1.0,
                    error_share: 0.0,
                    learnt: Learnt::Recent,
                    seconds: 1800,
                },
                &Window::default(),
                AT,
                detect::Test::Cap,
                1.0,
            ),
            gate: Gate::Wire,
            is_regular,
        }
    }

    const AT: Timestamp = Timestamp::from_secs(6_000_000);

    fn after(secs: u64) -> Timestamp {
        AT + Duration::from_secs(secs)
    }

    /// Bans if it may.
    fn flag(blast: &mut Blast, settings: &Settings, suspect: &Suspect, now: Timestamp) -> bool {
        let may = blast.hold(settings, suspect, false, now).is_none();
        if may {
            blast.banned(settings, suspect.subject, suspect.is_regular, now);
        }
        may
    }

    /// Bans the worst while there is room; who they were, as numbers.
    fn ban_worst(blast: &mut Blast, settings: &Settings, now: Timestamp) -> Vec<u32> {
        let mut banned = Vec::new();
        while let Some(suspect) = blast.worst(settings, false, now) {
            blast.banned(settings, suspect.subject, suspect.is_regular, now);
            banned.push(u32::try_from(suspect.subject.bits()).unwrap());
        }
        banned
    }

    #[test]
    fn a_minute_has_room_for_so_many_and_the_worst_come_first() {
        let settings = Settings {
            per_minute: 20,
            regulars: 1.0,
        };
        let mut blast = Blast::default();
        let made = (0..30).filter(|n| flag(&mut blast, &settings, &suspect(*n, false), AT));
        assert_eq!(made.count(), 10, "half of it at once");
        assert_eq!(blast.since(), Some(AT));
        // The twentieth is found again and again; some others once more.
        for n in [20, 20, 20, 25, 25, 12] {
            assert!(!flag(&mut blast, &settings, &suspect(n, false), after(1)));
        }
        assert_eq!(ban_worst(&mut blast, &settings, after(5)), [0; 0]);
        assert_eq!(ban_worst(&mut blast, &settings, after(6)), [20]);
        assert_eq!(ban_worst(&mut blast, &settings, after(18)), [25, 12]);
        assert_eq!(ban_worst(&mut blast, &settings, after(59)).len(), 6);
        // Who was found a minute ago has stopped.
        assert_eq!(ban_worst(&mut blast, &settings, after(62)), [0; 0]);
        assert_eq!(blast.over(after(62)), Some(Duration::from_secs(62)));
        assert_eq!((blast.over(after(62)), blast.since()), (None, None));
    }

    #[test]
    fn no_minute_has_more_and_a_network_comes_before_all_others() {
        let settings = Settings {
            per_minute: 60,
            regulars: 1.0,
        };
        let mut blast = Blast::default();
        let mut bans = Vec::new();
        for second in 0..300 {
            let now = after(second);
            for n in 0..20 {
                let n = u32::try_from(second).unwrap() * 20 + n;
                if flag(&mut blast, &settings, &suspect(n, false), now) {
                    bans.push(second);
                }
            }
            let made = ban_worst(&mut blast, &settings, now).len();
            bans.extend(std::iter::repeat_n(second, made));
        }
        for from in 0..240 {
            let within = bans.iter().filter(|at| (from..from + 60).contains(*at));
            assert!((29..=60).contains(&within.count()), "from {from}");
        }
        let network = Suspect {
            address: None,
            ..suspect(9999, false)
        };
        assert!(!flag(&mut blast, &settings, &suspect(1, false), after(299)));
        assert!(!flag(&mut blast, &settings, &network, after(299)));
        assert!(!flag(&mut blast, &settings, &suspect(1, false), after(299)));
        let worst = blast.worst(&settings, false, after(301)).unwrap();
        assert_eq!(worst.subject, network.subject);
    }

    #[test]
    fn what_was_made_without_a_limit_is_not_owed_once_there_is_one() {
        let mut blast = Blast::default();
        for n in 0..1000 {
            assert!(flag(&mut blast, &Settings::ANY, &suspect(n, false), AT));
        }
        let settings = Settings {
            per_minute: 20,
            regulars: 1.0,
        };
        let made = (0..30).filter(|n| flag(&mut blast, &settings, &suspect(*n, false), AT));
        assert_eq!(made.count(), 10);
    }

    #[test]
    fn of_regulars_a_share_and_of_strangers_all() {
        let settings = Settings {
            per_minute: 0,
            regulars: 0.1,
        };
        let mut blast = Blast::default();
        (0..500).for_each(|_| blast.visit(AT.secs()));
        let made = (0..200).filter(|n| flag(&mut blast, &settings, &suspect(*n, true), AT));
        assert_eq!(made.count(), 50);
        let strangers = (200..400).filter(|n| flag(&mut blast, &settings, &suspect(*n, false), AT));
        assert_eq!(strangers.count(), 200);
        // In an attack, who goes on has shown what it is.
        assert!(
            blast
                .hold(&settings, &suspect(500, true), true, AT)
                .is_some()
        );
        assert_eq!(blast.hold(&settings, &suspect(500, true), true, AT), None);
        assert!(
            blast
                .hold(&settings, &suspect(501, true), false, AT)
                .is_some()
        );
        assert!(
            blast
                .hold(&settings, &suspect(501, true), false, AT)
                .is_some()
        );
        // Ten minutes later all that is forgotten; but few are few, however few come.
        let later = after(600);
        let made = (600..700).filter(|n| flag(&mut blast, &settings, &suspect(*n, true), later));
        assert_eq!(made.count(), 20);
    }

    #[test]
    fn what_waits_is_bounded_and_the_worst_stay() {
        let settings = Settings {
            per_minute: 2,
            regulars: 1.0,
        };
        let mut blast = Blast::default();
        assert!(flag(&mut blast, &settings, &suspect(0, false), AT));
        for _ in 0..3 {
            assert!(!flag(&mut blast, &settings, &suspect(1, false), AT));
        }
        for n in 2..20_000 {
            assert!(!flag(&mut blast, &settings, &suspect(n, false), after(1)));
        }
        assert_eq!((blast.held.len(), blast.order.len()), (MAX_HELD, MAX_HELD));
        assert_eq!(ban_worst(&mut blast, &settings, after(59)), [0; 0]);
        let worst = blast.worst(&settings, false, after(60));
        assert_eq!(
            worst.unwrap().subject,
            suspect(19_999, false).subject,
            "the first has stopped"
        );
        (0..10_000).for_each(|n| blast.visit(after(n).secs()));
        assert!(blast.minutes.len() <= 10);
    }

    #[test]
    fn a_clock_that_is_set_changes_nobody_s_turn() {
        let settings = Settings {
            per_minute: 2,
            regulars: 1.0,
        };
        for millis in [86_400_000, -86_400_000] {
            let mut blast = Blast::default();
            assert!(flag(&mut blast, &settings, &suspect(0, false), AT));
            assert!(!flag(&mut blast, &settings, &suspect(1, false), after(30)));
            blast.shift(millis);
            let at = |secs| after(secs).shifted(millis);
            assert_eq!(blast.since(), Some(at(30)));
            assert_eq!(ban_worst(&mut blast, &settings, at(59)), [0; 0]);
            assert_eq!(ban_worst(&mut blast, &settings, at(60)), [1]);
        }
    }
}
