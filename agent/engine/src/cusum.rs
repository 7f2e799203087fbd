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
