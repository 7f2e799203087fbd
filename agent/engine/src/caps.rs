//! How much one client may ask for in a second, in ten, in a window and in ten windows.
//!
//! What counts is effort: requests, of which those that browsers make for a page by themselves count for less. The caps are learnt
//! from the population of clients, not from the site's total, which says nothing of what one of them does. They begin at floors,
//! follow what one client in a thousand reaches, and never rise above so many times the floors, so that nobody can teach them
//! everything.

use serde::{Deserialize, Serialize};

/// Effort of one request that counts in full; fractions are whole numbers in this unit.
pub const UNIT: u32 = 20;
/// Of one for a path that is new to the client and known to others: what somebody does who looks around.
pub const FRESH: u32 = 11;
/// The same in the longest span: looking around for so long is work, too.
pub const FRESH_FOR_LONG: u32 = 16;
/// And for a path that is new to the client and known to nobody.
pub const STRANGE_FOR_LONG: u32 = 18;
/// Of one for what comes with a page.
pub const WITH_A_PAGE: u32 = 5;

/// Of one of which the log does not say what was asked for: something in between.
pub const WITHOUT_A_PATH: u32 = 7;

/// The spans: a second, ten seconds, a window, ten windows.
pub const SPANS: usize = 4;

/// What the caps go by.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Requests of full effort that a client may make in each of the spans, at least. 0: that span is not looked at.
    pub floors: [f64; SPANS],
    /// The caps may rise to so many times the floors; 1: nothing is learnt.
    pub times_floor: f64,
}

/// Floors for windows of another length than 60 s.
#[must_use]
pub fn in_proportion(floors: [f64; SPANS], window_secs: u32) -> [f64; SPANS] {
    let times = f64::from(window_secs) / 60.0;
    let [second, ten, window, windows] = floors;
    [second, ten, window * times, windows * times]
}

impl Saved {
    pub(crate) fn is_empty(&self) -> bool {
        self.clients <= 0.0
    }

    pub(crate) fn caps(&self) -> &[f64] {
        &self.caps
    }
}

/// Caps may rise by this factor in an hour.
const GROWTH_PER_HOUR: f64 = 1.5;
/// Above what so many clients of a thousand reach …
const PER_THOUSAND: f64 = 1.0;
/// … and at least so many clients in all …
const LEAST_CLIENTS: f64 = 5.0;
/// … caps stand by this factor.
const ROOM: f64 = 1.5;
/// Steps of the histograms for each doubling.
const STEPS: f64 = 4.0;
const LEVELS: usize = 56;
/// What was learnt fades by half each time that so many clients have come.
const MEMORY: f64 = 100_000.0;

/// What the population of clients does.
#[derive(Clone, Debug, PartialEq)]
pub struct Population {
    /// For each span, how many clients peaked at each level.
    peaks: [[f64; LEVELS]; SPANS],
    clients: f64,
    caps: [f64; SPANS],
    computed: u64,
}

/// What survives a restart.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Saved {
    peaks: Vec<Vec<f64>>,
    clients: f64,
    caps: Vec<f64>,
}

impl Population {
    /// Nothing is known yet.
    #[must_use]
    pub const fn new(settings: &Settings) -> Self {
        Self {
            peaks: [[0.0; LEVELS]; SPANS],
            clients: 0.0,
            caps: settings.floors,
            computed: 0,
        }
    }

    /// What a former run has saved; values that no run can have written are dropped.
    #[must_use]
    pub fn restore(settings: &Settings, saved: &Saved) -> Self {
        let mut population = Self::new(settings);
        let is_count = |count: &f64| count.is_finite() && *count >= 0.0 && *count <= 1e9;
        let whole = saved.peaks.len() == SPANS
            && saved.caps.len() == SPANS
            && saved.peaks.iter().all(|span| span.len() == LEVELS)
            && saved
                .peaks
                .iter()
                .flatten()
                .chain(&saved.caps)
                .all(is_count)
            && is_count(&saved.clients);
        if whole {
            for (ours, theirs) in population.peaks.iter_mut().zip(&saved.peaks) {
                ours.copy_from_slice(theirs);
            }
            population.clients = saved.clients;
            for (span, cap) in population.caps.iter_mut().enumerate() {
                let floor = settings.floors[span];
                *cap = saved.caps[span].clamp(floor, floor * settings.times_floor.max(1.0));
            }
        }
        population
    }

    /// What to keep for a restart.
    #[must_use]
    pub fn save(&self) -> Saved {
        Saved {
            peaks: self.peaks.iter().map(|span| span.to_vec()).collect(),
            clients: self.clients,
            caps: self.caps.to_vec(),
        }
    }

    /// Learns from a client that nothing was held against, now that it has gone: what it reached in each span, in requests of full
    /// effort.
    pub fn learn(&mut self, peaks: [u16; SPANS]) {
        for (levels, peak) in self.peaks.iter_mut().zip(peaks) {
            levels[level(f64::from(peak))] += 1.0;
        }
        self.clients += 1.0;
        if self.clients > MEMORY {
            self.clients /= 2.0;
            self.peaks
                .iter_mut()
                .flatten()
                .for_each(|count| *count /= 2.0);
        }
    }

    /// Computes the caps anew.
    pub fn compute(&mut self, settings: &Settings, second: u64) {
        let hours = match self.computed {
            0 => 1.0 / 60.0,
            computed => (second.saturating_sub(computed).min(3600) as f64) / 3600.0,
        };
        self.computed = second;
        let least = LEAST_CLIENTS.max(self.clients * PER_THOUSAND / 1000.0);
        for span in 0..SPANS {
            let floor = settings.floors[span];
            let mut above = 0.0;
            let reached = (0..LEVELS).rev().find(|level| {
                above += self.peaks[span][*level];
                above >= least
            });
            let learnt = reached.map_or(0.0, |level| ROOM * top_of(level));
            let grown = self.caps[span] * GROWTH_PER_HOUR.powf(hours);
            let highest = floor * settings.times_floor.max(1.0);
            self.caps[span] = learnt.min(grown).clamp(floor, highest);
        }
    }

    /// Requests of full effort that a client may make in each of the spans.
    #[must_use]
    pub const fn caps(&self) -> &[f64; SPANS] {
        &self.caps
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a logarithm of a count is small, and not negative"
)]
fn level(peak: f64) -> usize {
    ((peak.max(1.0).log2() * STEPS) as usize).min(LEVELS - 1)
}

fn top_of(level: usize) -> f64 {
    ((level + 1) as f64 / STEPS).exp2()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Settings {
        Settings {
            floors: [60.0, 90.0, 110.0, 450.0],
            times_floor: 4.0,
        }
    }

    #[test]
    fn a_population_that_does_more_is_given_more_and_no_single_client_decides() {
        let mut population = Population::new(&settings());
        (0..2000).for_each(|_| population.learn([3, 10, 20, 40]));
        (0..4).for_each(|_| population.learn([900, 900, 900, 900]));
        for hour in 1..20 {
            population.compute(&settings(), hour * 3600);
        }
        assert_eq!(population.caps(), &settings().floors);
        (0..6).for_each(|_| population.learn([10, 150, 200, 10_000]));
        for hour in 20..40 {
            population.compute(&settings(), hour * 3600);
        }
        let caps = population.caps();
        assert_eq!(caps[0], 60.0);
        assert!((225.0..300.0).contains(&caps[1]), "{caps:?}");
        assert!((300.0..400.0).contains(&caps[2]), "{caps:?}");
        assert_eq!(caps[3], 1800.0, "four times the floor and no more");
    }

    #[test]
    fn each_peak_lies_below_the_top_of_its_level_and_above_that_of_the_one_before() {
        assert_eq!(
            [level(0.0), level(1.0), level(2.0), level(4.0)],
            [0, 0, 4, 8]
        );
        for peak in 1..=16_383_u32 {
            let peak = f64::from(peak);
            let level = level(peak);
            assert!(peak < top_of(level), "{peak}");
            assert!(
                level == 0 || peak >= top_of(level - 1) * (1.0 - 1e-12),
                "{peak}"
            );
        }
        assert_eq!(level(65_535.0), LEVELS - 1);
    }

    #[test]
    fn caps_rise_by_half_an_hour_at_most() {
        let mut population = Population::new(&settings());
        (0..100).for_each(|_| population.learn([500, 500, 500, 500]));
        population.compute(&settings(), 3600);
        population.compute(&settings(), 7200);
        assert!(
            population.caps()[2] <= 110.0 * 1.5 * 1.01,
            "{:?}",
            population.caps()
        );
    }

    #[test]
    fn what_was_saved_comes_back_and_nonsense_does_not() {
        let mut population = Population::new(&settings());
        (0..100).for_each(|_| population.learn([100, 150, 200, 500]));
        population.compute(&settings(), 3600);
        let saved = population.save();
        let restored = Population::restore(&settings(), &saved);
        assert_eq!(restored.save(), saved);
        let nonsense = Saved {
            clients: f64::NAN,
            ..saved
        };
        assert_eq!(
            Population::restore(&settings(), &nonsense),
            Population::new(&settings())
        );
    }
}
