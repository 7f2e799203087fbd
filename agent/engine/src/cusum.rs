//! A cumulative sum on the site's rate: does it stay above what is normal, however little?
//!
//! Page's test (Biometrika 1954), for floods as Siris and Papagalou use it (Application of Anomaly Detection Algorithms for
//! Detecting SYN Flooding Attacks, GLOBECOM 2004), in units of the standard deviation.

use crate::baseline::Normal;

/// What the test goes by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// Standard deviations above the mean that are taken off each second.
    pub drift: f64,
    /// The sum that flags. 0: the test is off.
    pub limit: f64,
}

/// The sum.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cusum {
    sum: f64,
}

impl Cusum {
    /// Takes in one second of `requests`.
    pub fn add(&mut self, settings: &Settings, normal: &Normal, requests: f64) {
        let score = (requests - normal.mean) / normal.stddev;
        // Twice the limit is enough to know; more would keep an alarm standing long after its cause.
        self.sum = (self.sum + score - settings.drift).clamp(0.0, 2.0 * settings.limit);
    }

    /// The sum, in standard deviations times seconds.
    #[must_use]
    pub const fn sum(&self) -> f64 {
        self.sum
    }

    /// Forgets everything.
    pub const fn clear(&mut self) {
        self.sum = 0.0;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::baseline::Learnt;

    const NORMAL: Normal = Normal {
        mean: 4.0,
        stddev: 2.0,
        error_share: 0.05,
        learnt: Learnt::Recent,
        seconds: 1800,
    };

    fn settings(limit: f64) -> Settings {
        Settings { drift: 3.0, limit }
    }

    #[test]
    fn what_is_above_the_drift_adds_up_and_what_is_below_takes_it_back() {
        let mut cusum = Cusum::default();
        let mut add = |requests| {
            cusum.add(&settings(60.0), &NORMAL, requests);
            cusum.sum()
        };
        // (24 − 4) / 2 − 3.
        assert_eq!(
            [add(24.0), add(24.0), add(4.0), add(0.0)],
            [7.0, 14.0, 11.0, 6.0]
        );
        assert_eq!([add(10.0), add(0.0), add(0.0)], [6.0, 1.0, 0.0]);
        assert_eq!(add(1e9), 120.0, "twice the limit");
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, rng_seed: prop::test_runner::RngSeed::Fixed(1954), ..ProptestConfig::default() })]

        /// Without its ceiling, Page's sum is how far the walk stands above its lowest point.
        #[test]
        fn the_sum_is_how_far_the_walk_is_above_its_lowest(counts in prop::collection::vec(0_u32..40, 1..300)) {
            let mut cusum = Cusum::default();
            let (mut walk, mut lowest) = (0.0_f64, 0.0_f64);
            for requests in counts {
                cusum.add(&settings(1e9), &NORMAL, f64::from(requests));
                walk += (f64::from(requests) - 4.0) / 2.0 - 3.0;
                lowest = lowest.min(walk);
                prop_assert_eq!(cusum.sum(), walk - lowest);
            }
        }

        #[test]
        fn off_it_stays_at_nothing(counts in prop::collection::vec(0_u32..4000, 1..50)) {
            let mut cusum = Cusum::default();
            for requests in counts {
                cusum.add(&settings(0.0), &NORMAL, f64::from(requests));
                prop_assert_eq!(cusum.sum(), 0.0);
            }
        }
    }
}
