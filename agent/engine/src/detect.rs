//! The ordered tests: does this rate leave the normal traffic?
//!
//! All rates are requests a second averaged over the sliding window; the baseline's mean and standard deviation are
//! those of one-second counts of the whole site. Comparing a window's *count* with them would be off by its length.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{
    baseline::{Learnt, Normal},
    caps, cusum, failures,
    time::Timestamp,
    window::Window,
};

/// When a rate is an anomaly.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Thresholds {
    /// Standard deviations above the mean; more than this flags.
    pub z_score: f64,
    /// Multiples of the mean; more than this flags.
    pub times_mean: f64,
}

/// What the detector goes by.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Length of the sliding windows in seconds.
    pub window_secs: u32,
    /// For a client that fails no more than others.
    pub ordinary: Thresholds,
    /// For a client whose answers fail much more than is normal.
    pub surge: Thresholds,
    /// A surge is a share of failing answers of so many times the normal one …
    pub surge_times_share: f64,
    /// … over at least so many requests in the window.
    pub surge_min_requests: u32,
    /// While nothing is learnt yet, a client may make so many requests a second.
    pub warm_up_ceiling: f64,
    /// How much a client may do in several spans.
    pub caps: caps::Settings,
    /// The sequential test on a client's answers.
    pub failures: failures::Settings,
    /// Thresholds and caps are multiplied by this for an address that many people seem to share; 1: they are not.
    pub room: f64,
    /// The sequential test on the site's rate.
    pub cusum: cusum::Settings,
    /// While the site's alarm stands, so many page requests of a newcomer are enough to judge how it asks. 0: it is not judged.
    pub attack_requests: u32,
    /// Attack mode goes on for so many seconds after the alarm.
    pub aftermath_secs: u32,
    /// So many banned members of a prefix get all of it banned, if nobody else there behaves: an IPv4 /24 or an IPv6 /56; twice as many of an
    /// IPv6 /48. 0: prefixes are never banned.
    pub prefix_members: u32,
}

/// The test that flagged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Test {
    /// z = (rate − mean) / stddev.
    ZScore,
    /// rate > so many × mean.
    TimesMean,
    /// The absolute ceiling of the warm-up.
    Ceiling,
    /// What clients do here in a second, ten seconds, a window or ten.
    Cap,
    /// The sequential test on failing answers.
    Failures,
    /// In attack mode: a newcomer that asks for one page again and again.
    OnePage,
    /// In attack mode: a newcomer that asks for pages that nobody else has found.
    InventedPages,
    /// In attack mode: a newcomer that asks for many pages and nothing that comes with them.
    BarePages,
    /// Several members of a prefix have been banned.
    Members,
}

/// Evidence: everything that is needed to check the verdict by hand.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Finding {
    /// Which test flagged.
    pub test: Test,
    /// The value that was exceeded, in the test's own unit (z, multiples of the mean, requests a second).
    pub threshold: f64,
    /// Were the thresholds tightened because of an error surge?
    pub surge: bool,
    /// Requests a second over the window.
    pub rate: f64,
    /// z of that rate.
    pub score: f64,
    /// The mean that it was held against, requests a second.
    pub mean: f64,
    /// The standard deviation that it was held against.
    pub stddev: f64,
    /// Where the baseline came from.
    pub learnt: Learnt,
    /// Length of the window in seconds.
    pub window_secs: u32,
    /// Requests in it.
    pub requests: u64,
    /// Those with a status of 400 or above.
    pub errors: u64,
    /// The newest request that was counted.
    pub seen: Timestamp,
    /// Requests a second by which the rate was held lower than it was estimated, because only a sample of the lines was read:
    /// three times its standard error. 0 when every line was.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub margin: f64,
    /// What was held against the threshold, in the test's own unit; 0 where that is the rate or its z.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub value: f64,
    /// Different paths that failed, counted up to sixteen.
    #[serde(default, skip_serializing_if = "is_none")]
    pub distinct: u32,
    /// Where the newest lines that were counted begin.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub samples: Vec<Sample>,
}

/// A line of a log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// The log.
    pub log: String,
    /// The byte at which the line begins.
    pub offset: u64,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde hands over references"
)]
const fn is_none(count: &u32) -> bool {
    *count == 0
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde hands over references"
)]
fn is_zero(margin: &f64) -> bool {
    *margin == 0.0
}

/// Words for the condition, as a person would say them.
impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.test {
            Test::ZScore => write!(f, "z {:.2} > {}", self.score, self.threshold)?,
            Test::TimesMean => write!(
                f,
                "{:.2} × mean > {}",
                self.rate / self.mean,
                self.threshold
            )?,
            Test::Ceiling => write!(
                f,
                "{:.2} req/s > {} during warm-up",
                self.rate, self.threshold
            )?,
            Test::Cap => write!(
                f,
                "{:.1} requests' worth in {} s > {:.1}",
                self.value, self.window_secs, self.threshold
            )?,
            Test::Failures => write!(
                f,
                "{} of {} answers failed, score {:.1} > {}",
                self.errors, self.requests, self.value, self.threshold
            )?,
            Test::OnePage => write!(
                f,
                "new during the site's alarm, {} requests for one page and nothing that comes with it",
                self.requests
            )?,
            Test::InventedPages => write!(
                f,
                "new during the site's alarm, {} requests for pages that nobody else has found",
                self.requests
            )?,
            Test::BarePages => write!(
                f,
                "new during the site's alarm, {} requests for pages and nothing that comes with them",
                self.requests
            )?,
            Test::Members => write!(
                f,
                "{:.0} of its members are banned, and nobody in it behaves",
                self.value
            )?,
        }
        if self.distinct > 0 {
            write!(f, ", {} different paths", self.distinct)?;
        }
        if self.surge {
            write!(
                f,
                ", tightened by an error surge ({} of {} failed)",
                self.errors, self.requests
            )?;
        }
        if self.margin > 0.0 {
            write!(
                f,
                ", of a sample, {:.2} req/s taken off for its error",
                self.margin
            )?;
        }
        Ok(())
    }
}

/// Requests a second, averaged over a window.
#[must_use]
#[expect(
    clippy::cast_precision_loss,
    reason = "a window never holds 2^53 requests"
)]
pub fn rate(window: &Window, window_secs: u32) -> f64 {
    window.requests() as f64 / f64::from(window_secs)
}

/// Three standard errors of that rate: nobody is flagged for the luck of a sample.
pub(crate) fn margin(window: &Window, window_secs: u32) -> f64 {
    3.0 * (window.variance() as f64).sqrt() / f64::from(window_secs)
}

/// Holds one client's window against what is normal; all thresholds are multiplied by `room`. `None`: nothing unusual.
#[must_use]
pub fn client(
    settings: &Settings,
    normal: &Normal,
    window: &Window,
    seen: Timestamp,
    room: f64,
) -> Option<Finding> {
    let surge = is_surge(settings, normal, window);
    let Thresholds {
        z_score,
        times_mean,
    } = if surge {
        settings.surge
    } else {
        settings.ordinary
    };
    let thresholds = Thresholds {
        z_score: z_score * room,
        times_mean: times_mean * room,
    };
    let rate = rate(window, settings.window_secs) - margin(window, settings.window_secs);
    let (test, threshold) = if normal.learnt == Learnt::WarmUp {
        let ceiling = settings.warm_up_ceiling * room;
        (rate > ceiling).then_some((Test::Ceiling, ceiling))
    } else {
        exceeded(thresholds, normal, rate)
    }?;
    Some(Finding {
        surge: surge && test != Test::Ceiling,
        ..finding(settings, normal, window, seen, test, threshold)
    })
}

/// Holds the window of the whole site against what is normal. Nothing is unusual during warm-up.
#[must_use]
pub fn site(
    settings: &Settings,
    normal: &Normal,
    window: &Window,
    seen: Timestamp,
) -> Option<Finding> {
    if normal.learnt == Learnt::WarmUp {
        return None;
    }
    let rate = rate(window, settings.window_secs) - margin(window, settings.window_secs);
    let (test, threshold) = exceeded(settings.ordinary, normal, rate)?;
    Some(finding(settings, normal, window, seen, test, threshold))
}

fn exceeded(thresholds: Thresholds, normal: &Normal, rate: f64) -> Option<(Test, f64)> {
    if (rate - normal.mean) / normal.stddev > thresholds.z_score {
        Some((Test::ZScore, thresholds.z_score))
    } else if rate > thresholds.times_mean * normal.mean {
        Some((Test::TimesMean, thresholds.times_mean))
    } else {
        None
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "a window never holds 2^53 requests"
)]
pub(crate) fn is_surge(settings: &Settings, normal: &Normal, window: &Window) -> bool {
    // Of a sample, as many requests as tell as much (Kish's effective sample size).
    let requests = window.requests() as f64;
    let told = requests * requests / (requests + window.variance() as f64);
    told >= f64::from(settings.surge_min_requests)
        && window.errors() as f64
            >= settings.surge_times_share * normal.error_share * window.requests() as f64
}

/// What is known of a window that a test has flagged.
pub(crate) fn finding(
    settings: &Settings,
    normal: &Normal,
    window: &Window,
    seen: Timestamp,
    test: Test,
    threshold: f64,
) -> Finding {
    let rate = rate(window, settings.window_secs);
    Finding {
        test,
        threshold,
        surge: false,
        rate,
        score: (rate - normal.mean) / normal.stddev,
        mean: normal.mean,
        stddev: normal.stddev,
        learnt: normal.learnt,
        window_secs: settings.window_secs,
        requests: window.requests(),
        errors: window.errors(),
        seen,
        margin: margin(window, settings.window_secs),
        value: 0.0,
        distinct: 0,
        samples: Vec::new(),
    }
}

impl Settings {
    /// The ordered tests with their numbers, and nothing beside them.
    #[must_use]
    pub const fn ordered() -> Self {
        Self {
            window_secs: 60,
            ordinary: Thresholds {
                z_score: 3.0,
                times_mean: 5.0,
            },
            surge: Thresholds {
                z_score: 2.0,
                times_mean: 3.0,
            },
            surge_times_share: 3.0,
            surge_min_requests: 20,
            warm_up_ceiling: 10.0,
            caps: caps::Settings {
                floors: [0.0; caps::SPANS],
                times_floor: 1.0,
            },
            failures: failures::Settings {
                score: 0.0,
                floor_refused: 0.02,
                floor_missing: 0.05,
                half_life_secs: 72.0,
                distinct: 10,
            },
            room: 1.0,
            cusum: cusum::Settings {
                drift: 3.0,
                limit: 0.0,
            },
            attack_requests: 0,
            aftermath_secs: 300,
            prefix_members: 0,
        }
    }
}

/// The ordered tests, and all that has been added to them.
impl Default for Settings {
    fn default() -> Self {
        let ordered = Self::ordered();
        Self {
            caps: caps::Settings {
                floors: [60.0, 90.0, 110.0, 515.0],
                times_floor: 4.0,
            },
            failures: failures::Settings {
                score: 15.6,
                ..ordered.failures
            },
            room: 3.0,
            cusum: cusum::Settings {
                limit: 60.0,
                ..ordered.cusum
            },
            attack_requests: 7,
            prefix_members: 5,
            ..ordered
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp::from_secs(1_000_000);

    fn settings() -> Settings {
        Settings::ordered()
    }

    fn normal(mean: f64, stddev: f64) -> Normal {
        Normal {
            mean,
            stddev,
            error_share: 0.05,
            learnt: Learnt::Recent,
            seconds: 1800,
        }
    }

    fn window(requests: u64, errors: u64) -> Window {
        let mut window = Window::default();
        (0..requests).for_each(|n| window.add(NOW.secs(), n < errors, 1));
        window
    }

    /// The least number of requests in the window, `failing` per cent of them errors, that flags; and by which test.
    fn first_flagged(normal: &Normal, failing: u64) -> (u64, Test) {
        (1..100_000)
            .find_map(|n| {
                client(&settings(), normal, &window(n, n * failing / 100), NOW, 1.0)
                    .map(|finding| (n, finding.test))
            })
            .unwrap()
    }

    #[test]
    fn the_ordered_numbers_hold_to_the_request() {
        // z > 3: 60 s × (10 + 3 × 2) req/s = 960 is not more than that, 961 is.
        assert_eq!(first_flagged(&normal(10.0, 2.0), 0), (961, Test::ZScore));
        // 5 × mean comes first where the traffic is noisy: 60 × 5 × 2 = 600.
        assert_eq!(first_flagged(&normal(2.0, 50.0), 0), (601, Test::TimesMean));
        // Tightened: z > 2, 3 × mean.
        assert_eq!(first_flagged(&normal(10.0, 2.0), 50), (841, Test::ZScore));
        assert_eq!(
            first_flagged(&normal(2.0, 50.0), 50),
            (361, Test::TimesMean)
        );
        // 3 × 5 % of failures are a surge, 14 % are not.
        assert_eq!(first_flagged(&normal(10.0, 2.0), 14), (961, Test::ZScore));
    }

    #[test]
    fn a_window_s_count_is_never_held_against_a_rate() {
        // 50 requests in a minute are 0.83 a second: nothing on a site with one a second.
        assert_eq!(
            client(&settings(), &normal(1.0, 0.5), &window(50, 0), NOW, 1.0),
            None
        );
    }

    #[test]
    fn nobody_is_flagged_for_the_luck_of_a_sample() {
        let sampled = |lines: u64, errors: u64| {
            let mut window = Window::default();
            (0..lines).for_each(|n| window.add(NOW.secs(), n < errors, 8));
            client(&settings(), &normal(1.0, 0.5), &window, NOW, 1.0)
        };
        // 150 requests a minute are the limit: 20 lines of one in eight are an estimate of 160, give or take 33.
        assert_eq!(sampled(20, 0), None);
        let finding = sampled(36, 0).unwrap();
        assert_eq!((finding.requests, finding.rate), (288, 4.8));
        let error = (36.0 * 56.0_f64).sqrt() / 60.0;
        assert!((finding.margin - 3.0 * error).abs() < 1e-9, "{finding:?}");
        assert!(
            finding.to_string().contains("2.24 req/s taken off"),
            "{finding}"
        );
        // A surge tightens the limit to 120, not the caution.
        assert_eq!(sampled(30, 30), None);
        assert!(sampled(31, 31).is_some_and(|finding| finding.surge));
    }

    #[test]
    fn warm_up_has_a_ceiling_and_no_statistics() {
        let normal = Normal {
            learnt: Learnt::WarmUp,
            ..normal(1.0, 0.5)
        };
        assert_eq!(
            client(&settings(), &normal, &window(600, 600), NOW, 1.0),
            None
        );
        let finding = client(&settings(), &normal, &window(601, 601), NOW, 1.0).unwrap();
        assert_eq!((finding.test, finding.surge), (Test::Ceiling, false));
        assert_eq!(site(&settings(), &normal, &window(60_000, 0), NOW), None);
    }

    #[test]
    fn the_evidence_says_what_was_seen() {
        let finding = client(
            &settings(),
            &normal(10.0, 2.0),
            &window(1200, 600),
            NOW,
            1.0,
        )
        .unwrap();
        assert_eq!(
            finding.to_string(),
            "z 5.00 > 2, tightened by an error surge (600 of 1200 failed)"
        );
        assert_eq!(
            (
                finding.rate,
                finding.score,
                finding.requests,
                finding.errors
            ),
            (20.0, 5.0, 1200, 600)
        );
    }
}
