//! What a client does, beyond how much: kept of those that come more than a few times.

use serde::{Deserialize, Serialize};

use crate::{
    caps::{FRESH, FRESH_FOR_LONG, SPANS, STRANGE_FOR_LONG, UNIT, WITH_A_PAGE, WITHOUT_A_PATH},
    failures::Series,
    parse::{Record, TargetKind},
};

/// Windows that the longest span covers.
pub const SLICES: u32 = 10;
/// Counts are halved when there are so many: what was long ago matters less.
const MEMORY: u32 = 512;
/// Bits of the filter of paths that the client has asked for; it is emptied when half of it is set.
const SEEN_WORDS: usize = 8;
const HALF_SEEN: u32 = 256;
/// Places of its newest lines that are kept.
pub const SAMPLES: usize = 3;

/// Where a line lies that was counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Which log, by the order in which the engine was told of them.
    pub log: u16,
    /// The byte at which the line begins.
    pub offset: u64,
}

/// See the module's documentation.
#[derive(Clone, Debug, Default)]
pub struct Habits {
    /// The second in which it was first seen.
    pub since: u32,
    /// The second in which it was last seen.
    pub last: u32,
    /// It had been here before.
    pub is_regular: bool,
    slices: [u32; SLICES as usize],
    /// Number of the newest slice.
    slice: u32,
    /// The most that it did in each span, in requests of full effort.
    pub peaks: [u16; SPANS],
    requests: u32,
    /// Of these for what comes with a page …
    with_pages: u32,
    /// … for pages that others had found …
    known: u32,
    /// … and those that failed.
    failed: u32,
    /// The page that it asks for most, if it asks for one more than for all others together; by how much.
    favourite: u32,
    lead: u32,
    seen: [u64; SEEN_WORDS],
    /// A bit for each user agent, hashed.
    agents: u32,
    /// The test on its answers.
    pub series: Series,
    places: [Place; SAMPLES],
}

/// How a client asks, as shares of its requests.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manner {
    /// Requests that the shares are of.
    pub requests: u32,
    /// For what comes with a page.
    pub with_pages: f64,
    /// Of the pages, those that others had found.
    pub known: f64,
    /// By how much one page outweighs all others together: 1 is a single page, 0 none in particular.
    pub lead: f64,
    /// That failed.
    pub failed: f64,
    /// Different user agents, up to 32, a little less if there are many.
    pub agents: u32,
}

/// What a request was to the habits of its client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Noted {
    /// How much effort it was, in [`UNIT`]s; and how much in the longest span.
    pub effort: u32,
    /// See there.
    pub for_long: u32,
    /// It was for a page …
    pub is_page: bool,
    /// … that the client had not asked for before.
    pub is_fresh: bool,
}

impl Noted {
    const fn of(effort: u32) -> Self {
        Self {
            effort,
            for_long: effort,
            is_page: false,
            is_fresh: false,
        }
    }
}

impl Habits {
    /// Of a client that was first seen in second `since`.
    #[must_use]
    pub fn new(since: u32, is_regular: bool) -> Self {
        Self {
            since,
            is_regular,
            ..Self::default()
        }
    }

    /// Notes a request. `is_known`: somebody else has found the path before.
    pub fn note(&mut self, record: &Record, second: u32, is_known: bool) -> Noted {
        self.last = self.last.max(second);
        if self.requests >= MEMORY {
            for count in [
                &mut self.requests,
                &mut self.with_pages,
                &mut self.known,
                &mut self.failed,
                &mut self.lead,
            ] {
                *count /= 2;
            }
        }
        self.requests += 1;
        self.failed += u32::from(record.status >= 400);
        if let Some(agent) = record.agent {
            self.agents |= 1 << (agent % 32);
        }
        let Some(target) = record.target else {
            return Noted::of(WITHOUT_A_PATH);
        };
        if target.kind != TargetKind::Page {
            self.with_pages += 1;
            return Noted::of(WITH_A_PAGE);
        }
        self.known += u32::from(is_known);
        // The majority vote of Boyer and Moore (MJRTY, 1981).
        if self.lead == 0 {
            self.favourite = target.path;
        }
        if self.favourite == target.path {
            self.lead += 1;
        } else {
            self.lead -= 1;
        }
        let is_fresh = self.is_new(target.path);
        Noted {
            effort: if is_fresh && is_known { FRESH } else { UNIT },
            for_long: match (is_fresh, is_known) {
                (true, true) => FRESH_FOR_LONG,
                (true, false) => STRANGE_FOR_LONG,
                (false, _) => UNIT,
            },
            is_page: true,
            is_fresh,
        }
    }

    /// Is a path new to this client? From now on it is not.
    fn is_new(&mut self, path: u32) -> bool {
        if self.seen.iter().map(|word| word.count_ones()).sum::<u32>() > HALF_SEEN {
            self.seen = [0; SEEN_WORDS];
        }
        let word = &mut self.seen[(path >> 6) as usize % SEEN_WORDS];
        let bit = 1_u64 << (path % 64);
        let is_new = *word & bit == 0;
        *word |= bit;
        is_new
    }

    /// Adds effort to the longest span.
    pub fn add(&mut self, second: u32, window: u32, effort: u32) {
        self.slide(second, window);
        let number = second / window.max(1);
        // A line that is a little late belongs to a slice before the newest.
        if self.slice - number.min(self.slice) < SLICES {
            let slice = &mut self.slices[number as usize % SLICES as usize];
            *slice = slice.saturating_add(effort);
        }
    }

    /// Lets time pass for the longest span.
    pub fn slide(&mut self, second: u32, window: u32) {
        let number = second / window.max(1);
        if number <= self.slice {
            return;
        }
        if number - self.slice >= SLICES {
            self.slices = [0; SLICES as usize];
        } else {
            for gone in self.slice + 1..=number {
                self.slices[gone as usize % SLICES as usize] = 0;
            }
        }
        self.slice = number;
    }

    /// Effort in the longest span.
    #[must_use]
    pub fn effort(&self) -> u32 {
        self.slices
            .iter()
            .fold(0, |sum, slice| sum.saturating_add(*slice))
    }

    /// Keeps the place of a line.
    pub fn sample(&mut self, place: Place) {
        self.places.rotate_right(1);
        self.places[0] = place;
    }

    /// The places of the newest lines, newest first.
    #[must_use]
    pub fn samples(&self) -> &[Place] {
        let count = (self.requests as usize).min(SAMPLES);
        &self.places[..count]
    }

    /// How it asks.
    #[must_use]
    pub fn manner(&self) -> Manner {
        let of = |count: u32, all: u32| f64::from(count) / f64::from(all.max(1));
        let pages = self.requests - self.with_pages.min(self.requests);
        Manner {
            requests: self.requests,
            with_pages: of(self.with_pages, self.requests),
            known: of(self.known, pages),
            lead: of(self.lead, pages),
            failed: of(self.failed, self.requests),
            agents: self.agents.count_ones(),
        }
    }

    /// Has it found more than it has not, and something at all?
    #[must_use]
    pub const fn behaves(&self) -> bool {
        let fine = self.requests - self.failed;
        fine >= 5 && fine >= self.failed
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::{parse::Target, time::Timestamp};

    fn request(path: u32, kind: TargetKind) -> Record {
        Record {
            target: Some(Target { path, kind }),
            ..Record::new(Timestamp::from_secs(1000), [192, 0, 2, 1].into(), 200)
        }
    }

    #[test]
    fn what_it_asks_for_is_told_in_shares() {
        let mut habits = Habits::new(1000, false);
        for n in 0..10 {
            habits.note(&request(n % 2, TargetKind::Page), 1000, n > 4);
            (0..3).for_each(|_| {
                habits.note(&request(9, TargetKind::Asset), 1000, false);
            });
        }
        let manner = habits.manner();
        assert_eq!(
            (
                manner.requests,
                manner.with_pages,
                manner.known,
                manner.lead
            ),
            (40, 0.75, 0.5, 0.0)
        );
    }

    #[test]
    fn the_newest_three_lines_are_kept() {
        let mut habits = Habits::default();
        for offset in 0..5 {
            habits.note(&request(1, TargetKind::Page), 1000, false);
            habits.sample(Place { log: 0, offset });
            let kept: Vec<_> = habits.samples().iter().map(|place| place.offset).collect();
            let expected: Vec<_> = (0..=offset).rev().take(3).collect();
            assert_eq!(kept, expected);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, rng_seed: prop::test_runner::RngSeed::Fixed(1954), ..ProptestConfig::default() })]

        /// Against the definition: all that was added, of the ten windows (from the epoch on) that end with the newest.
        #[test]
        fn effort_is_that_of_the_last_ten_windows(
            window in 1_u32..70,
            steps in prop::collection::vec((prop_oneof![8 => 0_u32..30, 1 => 0_u32..2000], 0_u32..100, 0_u32..50), 1..200),
        ) {
            let (mut habits, mut all, mut now) = (Habits::default(), Vec::new(), 1_700_000_000);
            for (pass, back, effort) in steps {
                now += pass;
                habits.add(now, window, 0);
                habits.add(now - back, window, effort);
                all.push((now - back, effort));
                let inside = all.iter().filter(|(second, _)| now / window - second / window < SLICES);
                prop_assert_eq!(habits.effort(), inside.map(|(_, effort)| effort).sum::<u32>());
            }
        }

        /// What the vote promises: no page outweighs all others by more than the lead, and the favourite was asked for that often.
        #[test]
        fn the_lead_is_bounded_by_true_counts(pages in prop::collection::vec(prop_oneof![2 => Just(1_u32), 1 => 0_u32..6], 1..500)) {
            let (mut habits, mut counts) = (Habits::default(), BTreeMap::new());
            for (all, path) in (1_i64..).zip(pages) {
                habits.note(&request(path, TargetKind::Page), 1000, false);
                *counts.entry(path).or_insert(0_i64) += 1;
                let lead = i64::from(habits.lead);
                for (path, count) in &counts {
                    let most = if *path == habits.favourite { lead } else { -lead };
                    prop_assert!(2 * count - all <= most.max(0), "{path} {habits:?}");
                }
                prop_assert!(lead <= counts.get(&habits.favourite).copied().unwrap_or(0));
            }
        }

        #[test]
        fn shares_stay_shares_however_long_it_goes_on(kinds in prop::collection::vec((0_u32..3, any::<bool>(), any::<bool>()), 500..1200)) {
            let mut habits = Habits::default();
            for (path, is_page, is_known) in kinds {
                let kind = if is_page { TargetKind::Page } else { TargetKind::Asset };
                habits.note(&request(path, kind), 1000, is_known);
                let manner = habits.manner();
                prop_assert!(manner.requests <= MEMORY);
                for share in [manner.with_pages, manner.known, manner.lead, manner.failed] {
                    // Halves are rounded down.
                    prop_assert!((0.0..=1.02).contains(&share), "{manner:?}");
                }
            }
        }
    }
}
