//! What normal traffic looks like: requests a second, as mean and standard deviation over the recent past, and by
//! hour of the day.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::{caps, time::Timestamp, usual::Usual};

/// How the baseline is learnt.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Seconds of traffic that the rolling baseline covers.
    pub span_secs: u32,
    /// The statistics are computed anew every so many seconds.
    pub recompute_secs: u32,
    /// An hour's slot is preferred once it holds so many seconds.
    pub hour_min_secs: u32,
    /// Nothing counts as learnt before so many seconds have been seen.
    pub warm_up_secs: u32,
    /// Least mean, requests a second: on a quieter site than this a handful of requests is no anomaly.
    pub floor_mean: f64,
    /// Least standard deviation, requests a second.
    pub floor_stddev: f64,
    /// Least share of failing answers that counts as normal.
    pub floor_error_share: f64,
    /// Mean and deviation may rise by this factor in an hour, whatever is seen; 0: by any.
    pub growth_per_hour: f64,
    /// Nothing is learnt while the site's alarm stands, for so many seconds at most; what does not end is no attack. 0: it is.
    pub freeze_secs: u32,
}

/// One second of traffic, as the baseline sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Second {
    /// Requests answered in it.
    pub requests: u32,
    /// Those with a status of 400 or above.
    pub errors: u32,
    /// Variance of `requests`, where they were estimated from a sample: it is no unrest of the traffic.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub variance: u32,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde hands over references"
)]
fn is_zero(variance: &u32) -> bool {
    *variance == 0
}

impl Second {
    /// Square of the requests, without what sampling has added to it on average.
    fn square(self) -> u64 {
        (u64::from(self.requests) * u64::from(self.requests)).saturating_sub(self.variance.into())
    }
}

/// Where the figures of [`Normal`] come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Learnt {
    /// Too little has been seen; absolute ceilings hold instead.
    WarmUp,
    /// The rolling span.
    Recent,
    /// The slot of this hour of the day, UTC.
    Hour(u8),
}

/// What is normal, with the floors applied. Rates are requests a second, statistics over one-second counts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Normal {
    /// Mean of the requests a second.
    pub mean: f64,
    /// Their (population) standard deviation.
    pub stddev: f64,
    /// Share of answers with a status of 400 or above, 0 to 1.
    pub error_share: f64,
    /// Where mean and standard deviation come from.
    pub learnt: Learnt,
    /// How many seconds they rest on.
    pub seconds: u32,
}

/// Sums over seconds; `f64` because the slots fade. Exact below 2^53.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Sums {
    seconds: f64,
    requests: f64,
    squares: f64,
}

impl Sums {
    fn add(&mut self, second: Second) {
        let requests = f64::from(second.requests);
        self.seconds += 1.0;
        self.requests += requests;
        self.squares += second.square() as f64;
    }

    fn fade(&mut self) {
        self.seconds /= 2.0;
        self.requests /= 2.0;
        self.squares /= 2.0;
    }

    fn mean_and_stddev(&self) -> (f64, f64) {
        if self.seconds <= 0.0 {
            return (0.0, 0.0);
        }
        let mean = self.requests / self.seconds;
        (
            mean,
            (self.squares / self.seconds - mean * mean).max(0.0).sqrt(),
        )
    }

    fn is_plausible(&self) -> bool {
        [self.seconds, self.requests, self.squares]
            .iter()
            .all(|sum| sum.is_finite() && *sum >= 0.0)
    }
}

/// One hour of the day. What earlier days have taught fades by half each time the hour comes round again, so a slot
/// follows the seasons without forgetting yesterday.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Slot {
    /// Days since the epoch when it was last added to.
    day: u64,
    sums: Sums,
}

/// What survives a restart.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Saved {
    /// The newest second in it.
    newest: u64,
    recent: Vec<Second>,
    hours: Vec<Slot>,
    /// What single clients do.
    #[serde(default)]
    pub(crate) population: caps::Saved,
    /// And which of them do much.
    #[serde(default)]
    pub(crate) usual: Usual,
}

/// What is known of an hour of the day, UTC.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hour {
    /// Which one.
    pub hour: u8,
    /// How many seconds that rests on; less for older days.
    pub seconds: f64,
    /// Mean of the requests a second.
    pub mean: f64,
    /// Their standard deviation.
    pub stddev: f64,
}

impl Saved {
    /// The newest second that it may know.
    #[must_use]
    pub fn newest(&self) -> Option<u64> {
        // A run that began long after the one before has dropped the rolling part, and with it the very second.
        let of_hours = self.slots().map(|(hour, slot)| {
            let end = (hour as u64 + 1) * 3600 - 1;
            slot.day.saturating_mul(86_400).saturating_add(end)
        });
        match self.newest {
            0 => of_hours.max(),
            newest => Some(newest),
        }
    }

    /// Takes what is known elsewhere of hours, and of clients, of which nothing is known here.
    pub fn fill(&mut self, other: &Self) {
        self.hours.resize(24, Slot::default());
        for (ours, theirs) in self.hours.iter_mut().zip(&other.hours) {
            if ours.sums.seconds <= 0.0 {
                *ours = *theirs;
            }
        }
        if self.population.is_empty() {
            self.population = other.population.clone();
            self.usual = other.usual.clone();
        }
    }

    /// The hours of which something is known.
    pub fn hours(&self) -> impl Iterator<Item = Hour> {
        self.slots().map(|(hour, slot)| {
            let (mean, stddev) = slot.sums.mean_and_stddev();
            Hour {
                hour: u8::try_from(hour).unwrap_or(u8::MAX),
                seconds: slot.sums.seconds,
                mean,
                stddev,
            }
        })
    }

    /// How much one client may do in each span, as far as that was learnt.
    #[must_use]
    pub fn caps(&self) -> &[f64] {
        self.population.caps()
    }

    /// Seconds of the rolling part, the last of them [`Saved::newest`].
    #[must_use]
    pub const fn rolling(&self) -> usize {
        self.recent.len()
    }

    fn slots(&self) -> impl Iterator<Item = (usize, &Slot)> {
        let hours = self.hours.iter().take(24).enumerate();
        hours.filter(|(_, slot)| slot.sums.seconds > 0.0 && slot.sums.is_plausible())
    }
}

/// The baseline.
#[derive(Clone, Debug)]
pub struct Baseline {
    settings: Settings,
    recent: VecDeque<Second>,
    /// Sums over `recent`: exact, so that adding and removing for years leaves no drift.
    requests: u64,
    squares: u128,
    errors: u64,
    newest: u64,
    hours: [Slot; 24],
    normal: Normal,
    computed: u64,
}

impl Baseline {
    /// An empty baseline.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        let normal = Normal {
            mean: settings.floor_mean,
            stddev: settings.floor_stddev,
            error_share: settings.floor_error_share,
            learnt: Learnt::WarmUp,
            seconds: 0,
        };
        Self {
            recent: VecDeque::with_capacity(settings.span_secs as usize),
            settings,
            requests: 0,
            squares: 0,
            errors: 0,
            newest: 0,
            hours: [Slot::default(); 24],
            normal,
            computed: 0,
        }
    }

    /// Goes by other settings with the next computation.
    pub fn set(&mut self, settings: Settings) {
        self.settings = settings;
    }

    /// A baseline as it was saved, for a run that starts at `now`. The rolling part is dropped where it is older than
    /// its span; values that no run can have written are dropped too.
    #[must_use]
    pub fn restore(settings: Settings, saved: &Saved, now: Timestamp) -> Self {
        let mut baseline = Self::new(settings);
        let age = now.secs().checked_sub(saved.newest);
        if age.is_some_and(|age| age < u64::from(baseline.settings.span_secs)) {
            saved
                .recent
                .iter()
                .for_each(|second| baseline.push_recent(*second));
        }
        // Nothing is learnt twice, however long ago that was.
        if age.is_some() {
            baseline.newest = saved.newest;
        }
        for (ours, theirs) in baseline.hours.iter_mut().zip(&saved.hours) {
            if theirs.sums.is_plausible() && theirs.day <= now.secs() / 86_400 {
                *ours = *theirs;
            }
        }
        baseline.compute(now);
        baseline
    }

    /// What to keep for a restart.
    #[must_use]
    pub fn save(&self) -> Saved {
        Saved {
            newest: self.newest,
            recent: self.recent.iter().copied().collect(),
            hours: self.hours.to_vec(),
            population: caps::Saved::default(),
            usual: Usual::default(),
        }
    }

    /// The newest second that it has learnt.
    #[must_use]
    pub fn newest(&self) -> Option<u64> {
        Some(self.newest).filter(|newest| *newest > 0)
    }

    /// Does it know of the recent past?
    #[must_use]
    pub fn is_recent(&self) -> bool {
        !self.recent.is_empty()
    }

    /// Learns one second of legitimate traffic; seconds without any are learnt too.
    pub fn learn(&mut self, second: u64, traffic: Second) {
        self.push_recent(traffic);
        self.newest = second;
        let slot = &mut self.hours[hour_of(second)];
        let day = second / 86_400;
        if day != slot.day {
            slot.sums.fade();
            slot.day = day;
        }
        slot.sums.add(traffic);
    }

    fn push_recent(&mut self, traffic: Second) {
        let square = |second: Second| u128::from(second.square());
        while self.recent.len() >= self.settings.span_secs as usize {
            let Some(oldest) = self.recent.pop_front() else {
                break;
            };
            self.requests -= u64::from(oldest.requests);
            self.errors -= u64::from(oldest.errors);
            self.squares -= square(oldest);
        }
        self.recent.push_back(traffic);
        self.requests += u64::from(traffic.requests);
        self.errors += u64::from(traffic.errors);
        self.squares += square(traffic);
    }

    /// Computes the statistics anew if it is time to; says whether it did. During warm-up it is always time, so that
    /// the end of it is not missed.
    pub fn recompute(&mut self, now: Timestamp) -> bool {
        let due = now.secs().abs_diff(self.computed) >= u64::from(self.settings.recompute_secs);
        let warm = self.normal.learnt == Learnt::WarmUp
            && self.recent.len() >= self.settings.warm_up_secs as usize;
        if due || warm {
            self.compute(now);
        }
        due || warm
    }

    #[expect(
        clippy::cast_precision_loss,
        reason = "sums of counts over hours stay far below 2^53"
    )]
    fn compute(&mut self, now: Timestamp) {
        let hour = hour_of(now.secs());
        let slot = &self.hours[hour].sums;
        let recent = self.recent.len() as f64;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "hours and spans fit in u32"
        )]
        let (learnt, seconds, (mean, stddev)) =
            if slot.seconds >= f64::from(self.settings.hour_min_secs) {
                (
                    Learnt::Hour(hour as u8),
                    slot.seconds as u32,
                    slot.mean_and_stddev(),
                )
            } else if self.recent.len() >= self.settings.warm_up_secs as usize {
                let sums = Sums {
                    seconds: recent,
                    requests: self.requests as f64,
                    squares: self.squares as f64,
                };
                (Learnt::Recent, recent as u32, sums.mean_and_stddev())
            } else {
                (Learnt::WarmUp, recent as u32, (0.0, 0.0))
            };
        let error_share = if self.requests == 0 {
            0.0
        } else {
            self.errors as f64 / self.requests as f64
        };
        let (mut mean, mut stddev) = (
            mean.max(self.settings.floor_mean),
            stddev.max(self.settings.floor_stddev),
        );
        // What grows faster than sites do is not learnt as it comes.
        // From one slot to the next it is no growth: both are known.
        let is_growth = match (self.normal.learnt, learnt) {
            (Learnt::WarmUp, _) | (_, Learnt::WarmUp) => false,
            (Learnt::Hour(was), Learnt::Hour(is)) => was == is,
            _ => true,
        };
        if self.settings.growth_per_hour > 0.0 && is_growth {
            let hours = now.secs().saturating_sub(self.computed) as f64 / 3600.0;
            let growth = self.settings.growth_per_hour.powf(hours);
            mean = mean.min(self.normal.mean * growth.max(1.0));
            stddev = stddev.min(self.normal.stddev * growth.max(1.0));
        }
        self.normal = Normal {
            mean,
            stddev,
            error_share: error_share.max(self.settings.floor_error_share),
            learnt,
            seconds,
        };
        self.computed = now.secs();
    }

    /// What is normal, as of the last computation.
    #[must_use]
    pub const fn normal(&self) -> &Normal {
        &self.normal
    }
}

fn hour_of(second: u64) -> usize {
    (second / 3600 % 24) as usize
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn settings() -> Settings {
        Settings {
            span_secs: 1800,
            recompute_secs: 60,
            hour_min_secs: 900,
            warm_up_secs: 300,
            floor_mean: 1.0,
            floor_stddev: 0.5,
            floor_error_share: 0.05,
            growth_per_hour: 0.0,
            freeze_secs: 0,
        }
    }

    fn learn(
        baseline: &mut Baseline,
        seconds: std::ops::Range<u64>,
        requests: impl Fn(u64) -> u32,
    ) {
        for second in seconds {
            baseline.learn(
                second,
                Second {
                    requests: requests(second),
                    errors: 0,
                    variance: 0,
                },
            );
            baseline.recompute(Timestamp::from_secs(second));
        }
    }

    #[test]
    fn what_is_known_of_an_hour_is_not_filled_from_elsewhere() {
        let (mut ours, mut theirs) = (Baseline::new(settings()), Baseline::new(settings()));
        learn(&mut ours, 90_000..90_100, |_| 4);
        learn(&mut theirs, 3600..10_800, |_| 9);
        let mut saved = ours.save();
        saved.fill(&theirs.save());
        let hours: Vec<_> = saved.hours().map(|hour| (hour.hour, hour.mean)).collect();
        assert_eq!(hours, [(1, 4.0), (2, 9.0)]);
        assert_eq!(saved.newest(), Some(90_099));
        assert_eq!(saved.rolling(), 100);
        // Without the rolling part, the hours' own days say it.
        saved.newest = 0;
        assert_eq!(saved.newest(), Some(86_400 + 2 * 3600 - 1));
        assert_eq!(Saved::default().newest(), None);
        let mut empty = Saved::default();
        empty.fill(&theirs.save());
        assert_eq!(empty.hours().count(), 2);
    }

    #[test]
    fn nothing_is_learnt_before_the_warm_up_ends_and_it_ends_on_time() {
        let mut baseline = Baseline::new(settings());
        learn(&mut baseline, 0..299, |_| 7);
        assert_eq!(baseline.normal().learnt, Learnt::WarmUp);
        learn(&mut baseline, 299..300, |_| 7);
        assert_eq!(
            (baseline.normal().learnt, baseline.normal().mean),
            (Learnt::Recent, 7.0)
        );
    }

    #[test]
    fn a_night_without_variance_has_the_floors() {
        let mut baseline = Baseline::new(settings());
        learn(&mut baseline, 0..600, |_| 0);
        let normal = baseline.normal();
        assert_eq!(
            (normal.mean, normal.stddev, normal.error_share),
            (1.0, 0.5, 0.05)
        );
    }

    #[test]
    fn the_current_hour_is_preferred_once_it_holds_enough_and_fades_by_the_day() {
        let mut baseline = Baseline::new(settings());
        learn(&mut baseline, 3000..3600, |_| 4);
        learn(&mut baseline, 3600..4499, |_| 10);
        assert_eq!(baseline.normal().learnt, Learnt::Recent);
        learn(&mut baseline, 4499..4560, |_| 10);
        assert_eq!(
            (baseline.normal().learnt, baseline.normal().mean),
            (Learnt::Hour(1), 10.0)
        );
        // The same hour a day later, at half the weight: 960 old seconds of 10 count as 480.
        let day = 86_400;
        learn(&mut baseline, day + 3600..day + 3600 + 480, |_| 30);
        baseline.compute(Timestamp::from_secs(day + 4081));
        assert_eq!(
            (baseline.normal().learnt, baseline.normal().mean),
            (Learnt::Hour(1), 20.0)
        );
    }

    #[test]
    fn what_was_saved_comes_back_and_stale_minutes_do_not() {
        let mut baseline = Baseline::new(settings());
        learn(&mut baseline, 7200..8400, |second| {
            u32::try_from(second % 7).unwrap()
        });
        let text = serde_json::to_string(&baseline.save()).unwrap();
        let saved: Saved = serde_json::from_str(&text).unwrap();
        let soon = Baseline::restore(settings(), &saved, Timestamp::from_secs(8460));
        assert_eq!(soon.save(), baseline.save());
        assert_eq!(soon.normal().learnt, Learnt::Hour(2));
        let tomorrow = Baseline::restore(settings(), &saved, Timestamp::from_secs(8460 + 86_400));
        assert!(tomorrow.recent.is_empty());
        assert_eq!(
            tomorrow.normal().learnt,
            Learnt::Hour(2),
            "the hour's slot is a day's knowledge and is kept"
        );
        let past = Baseline::restore(settings(), &saved, Timestamp::from_secs(60));
        assert_eq!(
            past.normal().learnt,
            Learnt::WarmUp,
            "a clock set back learns anew"
        );
    }

    proptest! {
        /// Against the textbook's two passes over the same seconds.
        #[test]
        fn mean_and_stddev_are_those_of_the_last_span(counts in prop::collection::vec(0u32..5000, 300..700)) {
            let span = 400;
            let mut baseline = Baseline::new(Settings { span_secs: span, hour_min_secs: 9999, ..settings() });
            for (second, requests) in counts.iter().enumerate() {
                baseline.learn(second as u64, Second { requests: *requests, ..Second::default() });
            }
            baseline.compute(Timestamp::from_secs(counts.len() as u64));
            let last: Vec<f64> = counts.iter().rev().take(span as usize).map(|n| f64::from(*n)).collect();
            let mean = last.iter().sum::<f64>() / last.len() as f64;
            let variance = last.iter().map(|n| (n - mean) * (n - mean)).sum::<f64>() / last.len() as f64;
            let normal = baseline.normal();
            prop_assert!((normal.mean - mean.max(1.0)).abs() < 1e-6, "{} {}", normal.mean, mean);
            prop_assert!((normal.stddev - variance.sqrt().max(0.5)).abs() < 1e-6, "{} {}", normal.stddev, variance.sqrt());
        }
    }
}
