//! The blast radius: how many bans the detector may make, and of whom, before people have looked.
//!
//! A detector that is wrong about one visitor is wrong about many, and soon. So it makes at most so many bans a minute, and
//! bans of those who have been here before only up to a share of their visits. Past either, whoever is found waits; with time
//! there is room again, and it goes to the worst first: to those who were found most often meanwhile.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, VecDeque},
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
/// Sources that wait; further ones are not banned until they are found again.
const MAX_HELD: usize = 16_384;

/// Somebody who would be banned.
#[derive(Clone, Debug, PartialEq)]
pub struct Suspect {
    /// Who.
    pub subject: Subject,
    /// The address that the last request came from; none for a prefix.
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
    /// How often it was found since it waits.
    times: u32,
    newest: Timestamp,
}

/// What came to pass in a span of time.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    /// When it began, in its seconds or minutes.
    at: u64,
    bans: u32,
    visits: u32,
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Blast {
    /// Bans by second, of a minute.
    seconds: VecDeque<Tally>,
    /// What regulars did and what was done to them, by minute.
    minutes: VecDeque<Tally>,
    held: BTreeMap<Subject, Waiting>,
    /// Somebody has to wait since then, and the last time.
    holding: Option<(Timestamp, Timestamp)>,
}

impl Blast {
    /// Somebody who has been here before has come again.
    pub fn visit(&mut self, second: u64) {
        newest(&mut self.minutes, second / MINUTE, MINUTES).visits += 1;
    }

    /// A ban was made.
    pub fn banned(&mut self, subject: Subject, is_regular: bool, now: Timestamp) {
        self.held.remove(&subject);
        newest(&mut self.seconds, now.secs(), MINUTE).bans += 1;
        if is_regular {
            newest(&mut self.minutes, now.secs() / MINUTE, MINUTES).bans += 1;
        }
    }

    /// The clock was set back: what was counted would stay for ever.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// Bans that may be made now.
    fn room(&self, settings: &Settings, now: Timestamp) -> u32 {
        if settings.per_minute == 0 {
            return u32::MAX;
        }
        let bans = recent(&self.seconds, now.secs(), MINUTE).map(|tally| tally.bans);
        settings.per_minute.saturating_sub(bans.sum())
    }

    /// Bans of regulars that may be made now.
    fn room_for_regulars(&self, settings: &Settings, now: Timestamp) -> u32 {
        if settings.regulars >= 1.0 {
            return u32::MAX;
        }
        let recent = || recent(&self.minutes, now.secs() / MINUTE, MINUTES);
        let bans: u32 = recent().map(|tally| tally.bans).sum();
        let visits: u32 = recent().map(|tally| tally.visits).sum();
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a share of a count"
        )]
        let allowed = (f64::from(visits) * settings.regulars) as u32;
        allowed.max(FEW).saturating_sub(bans)
    }

    /// What keeps this ban from being made now, in words, if anything does; whoever it is waits then.
    pub fn hold(
        &mut self,
        settings: &Settings,
        suspect: &Suspect,
        now: Timestamp,
    ) -> Option<String> {
        let because = if self.room(settings, now) == 0 {
            format!(
                "the detector has made {} bans within a minute",
                settings.per_minute
            )
        } else if suspect.is_regular && self.room_for_regulars(settings, now) == 0 {
            format!(
                "the detector has banned {:.0} % of the visitors who had been here before",
                settings.regulars * 100.0
            )
        } else {
            return None;
        };
        let since = self.holding.map_or(now, |(since, _)| since);
        self.holding = Some((since, now));
        if let Some(waiting) = self.held.get_mut(&suspect.subject) {
            waiting.suspect.clone_from(suspect);
            waiting.times += 1;
            waiting.newest = now;
        } else if self.held.len() < MAX_HELD {
            let waiting = Waiting {
                suspect: suspect.clone(),
                times: 1,
                newest: now,
            };
            self.held.insert(suspect.subject, waiting);
        }
        Some(because)
    }

    /// Those for whom there is room now, the worst first. Who has not been found for a minute has stopped.
    pub fn worst(&mut self, settings: &Settings, now: Timestamp) -> Vec<Suspect> {
        if self.held.is_empty() {
            return Vec::new();
        }
        self.held
            .retain(|_, held| now.since(held.newest).as_secs() < MINUTE);
        let mut room = self.room(settings, now);
        let mut for_regulars = self.room_for_regulars(settings, now);
        if room == 0 {
            return Vec::new();
        }
        let mut all: Vec<&Waiting> = self.held.values().collect();
        all.sort_by_key(|held| (Reverse(held.times), held.suspect.subject));
        let mut worst = Vec::new();
        for held in all {
            let suspect = &held.suspect;
            if room == 0 || suspect.is_regular && for_regulars == 0 {
                continue;
            }
            room -= 1;
            for_regulars -= u32::from(suspect.is_regular);
            worst.push(suspect.clone());
        }
        for suspect in &worst {
            self.held.remove(&suspect.subject);
        }
        worst
    }

    /// For how long somebody had to wait, once nobody has had to for a minute; said once.
    pub fn over(&mut self, now: Timestamp) -> Option<Duration> {
        let (since, last) = self.holding?;
        if now.since(last).as_secs() < MINUTE {
            return None;
        }
        self.holding = None;
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

/// The tally of now, after those that are over are forgotten.
fn newest(tallies: &mut VecDeque<Tally>, at: u64, span: u64) -> &mut Tally {
    while tallies.front().is_some_and(|tally| tally.at + span <= at) {
        tallies.pop_front();
    }
    let is_there = tallies.back().is_some_and(|tally| tally.at >= at);
    if !is_there {
        tallies.push_back(Tally {
            at,
            ..Tally::default()
        });
    }
    let last = tallies.len() - 1;
    &mut tallies[last]
}

fn recent(tallies: &VecDeque<Tally>, at: u64, span: u64) -> impl Iterator<Item = &Tally> {
    tallies.iter().filter(move |tally| tally.at + span > at)
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

    /// Bans if it may.
    fn flag(blast: &mut Blast, settings: &Settings, suspect: &Suspect, now: Timestamp) -> bool {
        let may = blast.hold(settings, suspect, now).is_none();
        if may {
            blast.banned(suspect.subject, suspect.is_regular, now);
        }
        may
    }

    fn after(secs: u64) -> Timestamp {
        AT + Duration::from_secs(secs)
    }

    #[test]
    fn a_minute_has_room_for_so_many_and_then_the_worst_come_first() {
        let settings = Settings {
            per_minute: 10,
            regulars: 1.0,
        };
        let mut blast = Blast::default();
        let made = (0..30).filter(|n| flag(&mut blast, &settings, &suspect(*n, false), AT));
        assert_eq!(made.count(), 10);
        assert_eq!(blast.since(), Some(AT));
        // The twentieth is found again and again; the others once more each.
        for n in [20, 20, 20, 25, 25, 12] {
            assert!(!flag(&mut blast, &settings, &suspect(n, false), after(30)));
        }
        assert!(blast.worst(&settings, after(59)).is_empty());
        let worst = blast.worst(&settings, after(61));
        let who: Vec<Subject> = worst.iter().map(|suspect| suspect.subject).collect();
        let expected = [20, 25, 12].map(|n| suspect(n, false).subject);
        assert_eq!(
            who, expected,
            "who was found once, a minute ago, has stopped"
        );
        for suspect in worst {
            blast.banned(suspect.subject, false, after(61));
        }
        assert_eq!(blast.room(&settings, after(61)), 7);
        assert_eq!(blast.over(after(89)), None);
        assert_eq!(blast.over(after(90)), Some(Duration::from_secs(90)));
        assert_eq!((blast.over(after(91)), blast.since()), (None, None));
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
        // Ten minutes later all that is forgotten; but few are few, however few come.
        let later = after(600);
        let made = (500..600).filter(|n| flag(&mut blast, &settings, &suspect(*n, true), later));
        assert_eq!(made.count(), 20);
    }

    #[test]
    fn what_waits_is_bounded() {
        let settings = Settings {
            per_minute: 1,
            regulars: 1.0,
        };
        let mut blast = Blast::default();
        for n in 0..20_000 {
            flag(&mut blast, &settings, &suspect(n, false), AT);
        }
        assert_eq!(blast.held.len(), MAX_HELD);
        (0..10_000).for_each(|n| blast.banned(suspect(0, true).subject, true, after(n)));
        assert!(blast.seconds.len() <= 60 && blast.minutes.len() <= 10);
    }
}
