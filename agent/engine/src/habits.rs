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
/// Words of the filter of paths that the client has asked for.
const SEEN_WORDS: usize = 8;
/// Pages that it was given again are kept so many, the newest.
const GIVEN: usize = 16;
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
    /// … for pages …
    pages: u32,
    /// … of these for pages that others had found …
    known: u32,
    /// … and all those that failed.
    failed: u32,
    /// The page that it asks for most, if it asks for one more than for all others together; by how much.
    favourite: u32,
    lead: u32,
    seen: Filter<SEEN_WORDS>,
    given: [u32; GIVEN],
    /// A bit for each user agent, hashed.
    agents: u32,
    /// The test on its answers.
    pub series: Series,
    places: [Place; SAMPLES],
}

/// A set of paths of which all is forgotten when half of its bits are set; some that are not in it seem to be.
#[derive(Clone, Copy, Debug)]
struct Filter<const WORDS: usize>([u64; WORDS]);

impl<const WORDS: usize> Default for Filter<WORDS> {
    fn default() -> Self {
        Self([0; WORDS])
    }
}

impl<const WORDS: usize> Filter<WORDS> {
    const fn place(path: u32) -> (usize, u64) {
        ((path >> 6) as usize % WORDS, 1 << (path % 64))
    }

    /// Was the path not in it? From now on it is.
    fn is_new(&mut self, path: u32) -> bool {
        if self.0.iter().map(|word| word.count_ones()).sum::<u32>() as usize > 32 * WORDS {
            self.0 = [0; WORDS];
        }
        let (word, bit) = Self::place(path);
        let is_new = self.0[word] & bit == 0;
        self.0[word] |= bit;
        is_new
    }
}

/// Effort of a request of which no more is known than what the log says.
#[must_use]
pub fn effort(record: &Record) -> u32 {
    match record.target.map(|target| target.kind) {
        None => WITHOUT_A_PATH,
        Some(TargetKind::Page) => UNIT,
        Some(_) => WITH_A_PAGE,
    }
}

/// How a client asks, as shares of its requests.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manner {
    /// Requests that the shares are of.
    pub requests: u32,
    /// Those for pages.
    pub pages: u32,
    /// Of those that were answered, for what comes with a page.
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
    /// It was for what comes with a page, and answered.
    pub is_shown: bool,
    /// It was for what scripts ask for, which is neither.
    pub is_polled: bool,
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
            is_shown: false,
            is_page: false,
            is_polled: false,
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

    /// Notes a request. `is_known`: somebody else has found the path before. `is_polled`: scripts of pages ask for it.
    pub fn note(&mut self, record: &Record, second: u32, is_known: bool, is_polled: bool) -> Noted {
        self.last = self.last.max(second);
        if self.requests >= MEMORY {
            for count in [
                &mut self.requests,
                &mut self.with_pages,
                &mut self.pages,
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
            return Noted::of(effort(record));
        };
        if target.kind != TargetKind::Page {
            // Anybody can ask for pictures that are not there, and browsers ask for icons unbidden.
            let is_shown = record.status < 400 && target.kind != TargetKind::Unbidden;
            self.with_pages += u32::from(is_shown);
            return Noted {
                is_shown,
                ..Noted::of(effort(record))
            };
        }
        let is_fresh = self.seen.is_new(target.path);
        let noted = Noted {
            effort: if is_fresh && is_known { FRESH } else { UNIT },
            for_long: match (is_fresh, is_known) {
                (true, true) => FRESH_FOR_LONG,
                (true, false) => STRANGE_FOR_LONG,
                (false, _) => UNIT,
            },
            is_shown: false,
            is_page: !is_polled,
            is_polled,
            is_fresh,
        };
        if is_polled {
            return noted;
        }
        self.pages += 1;
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
        noted
    }

    /// The client was given a page that it had seen before, and had only to ask.
    pub fn give(&mut self, path: u32) {
        if !self.was_given(path) {
            self.given.rotate_right(1);
            self.given[0] = path;
        }
    }

    /// Was it given that page more than once?
    #[must_use]
    pub fn was_given(&self, path: u32) -> bool {
        self.given.contains(&path)
    }

    /// The path that it asks for and little else, each time that it has done so five times more.
    #[must_use]
    pub const fn polls(&self) -> Option<u32> {
        let is_most = 10 * self.lead >= 6 * self.pages;
        if is_most && self.lead >= 5 && self.lead.is_multiple_of(5) {
            Some(self.favourite)
        } else {
            None
        }
    }

    /// Has it asked for anything but one page?
    #[must_use]
    pub const fn looks_around(&self) -> bool {
        self.lead < self.pages || self.with_pages > 0
    }

    /// Has it been here for so many seconds?
    #[must_use]
    pub const fn stays(&self, secs: u32) -> bool {
        self.last.saturating_sub(self.since) >= secs
    }

    /// Adds effort to the longest span. Returns what had come together in the newest slice, if this one begins another.
    pub fn add(&mut self, second: u32, window: u32, effort: u32) -> Option<u32> {
        let newest = (
            self.slice,
            self.slices[self.slice as usize % SLICES as usize],
        );
        self.slide(second, window);
        let done = (newest.0 != 0 && newest.0 != self.slice).then_some(newest.1);
        let number = second / window.max(1);
        // A line that is a little late belongs to a slice before the newest.
        if self.slice - number.min(self.slice) < SLICES {
            let slice = &mut self.slices[number as usize % SLICES as usize];
            *slice = slice.saturating_add(effort);
        }
        done
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
        Manner {
            requests: self.requests,
            pages: self.pages,
            with_pages: of(self.with_pages, self.pages + self.with_pages),
            known: of(self.known, self.pages),
            lead: of(self.lead, self.pages),
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
            habits.note(&request(n % 2, TargetKind::Page), 1000, n > 4, false);
            (0..3).for_each(|_| {
                habits.note(&request(9, TargetKind::Asset), 1000, false, false);
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
            habits.note(&request(1, TargetKind::Page), 1000, false, false);
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
                habits.note(&request(path, TargetKind::Page), 1000, false, false);
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
                habits.note(&request(path, kind), 1000, is_known, false);
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
