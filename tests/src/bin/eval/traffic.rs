//! Requests as they would stand in a log, and the dice that they are made with.

use std::net::IpAddr;

use portcullis_engine::{
    Timestamp,
    parse::{Method, Record, Target},
};

/// One request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Milliseconds since the epoch.
    pub at: u64,
    /// Who sent it.
    pub client: IpAddr,
    /// What was asked for.
    pub target: Target,
    /// How it was answered.
    pub status: u16,
    /// Hash of the user agent, where the log has it.
    pub agent: Option<u32>,
    /// It sends a form, and does not only ask.
    pub is_form: bool,
}

impl Request {
    /// As the engine takes it.
    pub fn record(&self) -> Record {
        Record {
            target: Some(self.target),
            agent: self.agent,
            method: Some(if self.is_form {
                Method::Unsafe
            } else {
                Method::Safe
            }),
            ..Record::new(Timestamp::from_millis(self.at), self.client, self.status)
        }
    }
}

/// The target of a path. The key is the same everywhere, so that runs are comparable.
pub fn path(text: &str) -> Target {
    Target::of(text.as_bytes(), 0)
}

/// Stands for a user agent.
pub fn agent(name: &str) -> u32 {
    path(name).path
}

/// Seeded chance: the same seed and purpose give the same requests on every machine.
#[derive(Clone, Debug)]
pub struct Dice(fastrand::Rng);

impl Dice {
    /// Dice of their own for each purpose, so that a scenario that is added or left out changes no other.
    pub fn new(purpose: &str, seed: u64) -> Self {
        // FNV-1a: stable, unlike the standard library's hashes.
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        for byte in purpose.bytes().chain(seed.to_le_bytes()) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        Self(fastrand::Rng::with_seed(hash))
    }

    /// From 0 up to 1.
    pub fn share(&mut self) -> f64 {
        self.0.f64()
    }

    /// True with this probability.
    pub fn chance(&mut self, probability: f64) -> bool {
        self.share() < probability
    }

    /// A whole number below `bound`; 0 where there is none.
    pub fn below(&mut self, bound: usize) -> usize {
        if bound == 0 { 0 } else { self.0.usize(..bound) }
    }

    /// Any number.
    pub fn bits(&mut self) -> u64 {
        self.0.u64(..)
    }

    /// From `low` up to `high`.
    pub fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.share()
    }

    /// One of them; `None` if there are none.
    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> Option<&'a T> {
        of.get(self.below(of.len()))
    }

    /// In any order.
    pub fn shuffle<T>(&mut self, all: &mut [T]) {
        self.0.shuffle(all);
    }

    /// Time to the next arrival in units of the mean gap.
    pub fn exponential(&mut self) -> f64 {
        // The share is never 1, so this is never the logarithm of 0.
        -(1.0 - self.share()).ln()
    }

    /// Log-normal with this median; `sigma` is the standard deviation of the logarithm.
    pub fn log_normal(&mut self, median: f64, sigma: f64) -> f64 {
        let radius = (2.0 * self.exponential()).sqrt();
        let normal = radius * (std::f64::consts::TAU * self.share()).cos();
        median * (sigma * normal).exp()
    }

    /// How often until it ends, at least once, with this mean.
    pub fn geometric(&mut self, mean: f64) -> u64 {
        let mut count = 1;
        while count < 1000 && !self.chance(1.0 / mean) {
            count += 1;
        }
        count
    }

    /// Poisson arrivals at `rate` a second, as milliseconds from `from` up to `until`.
    pub fn arrivals(&mut self, rate: f64, from: u64, until: u64) -> Vec<u64> {
        let mut all = Vec::new();
        let mut at = 0.0;
        loop {
            at += self.exponential() / rate;
            let millis = from + millis(at);
            if millis >= until {
                return all;
            }
            all.push(millis);
        }
    }
}

/// Seconds as whole milliseconds; negative ones are none.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "log times are far below 2^53 ms; casts saturate"
)]
pub fn millis(secs: f64) -> u64 {
    (secs * 1000.0) as u64
}

/// Zipf's law: the n-th of a list is asked for with a weight of 1/n.
#[derive(Clone, Debug)]
pub struct Popularity(Vec<f64>);

impl Popularity {
    /// Over so many.
    pub fn zipf(count: usize) -> Self {
        let mut sum = 0.0;
        let sums = (1..=count).map(|rank| {
            sum += 1.0 / rank as f64;
            sum
        });
        Self(sums.collect())
    }

    /// One of them, from 0.
    pub fn draw(&self, dice: &mut Dice) -> usize {
        let total = self.0.last().copied().unwrap_or(0.0);
        let drawn = dice.share() * total;
        self.0
            .partition_point(|sum| *sum <= drawn)
            .min(self.0.len().saturating_sub(1))
    }
}

/// In the order of their times. Stable, so that a client's own order stays.
pub fn sort(requests: &mut [Request]) {
    requests.sort_by_key(|request| request.at);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_and_purpose_give_the_same_and_others_do_not() {
        let draw = |purpose, seed| Dice::new(purpose, seed).bits();
        assert_eq!(draw("a", 1), draw("a", 1));
        assert_ne!(draw("a", 1), draw("a", 2));
        assert_ne!(draw("a", 1), draw("b", 1));
    }

    #[test]
    fn arrivals_have_the_rate_and_the_spread_of_a_poisson_process() {
        let all = Dice::new("test", 1).arrivals(5.0, 1_000_000, 11_000_000);
        // 10,000 s at 5/s: 50,000 with a standard deviation of 224.
        assert!((49_000..51_000).contains(&all.len()), "{}", all.len());
        assert!(all.is_sorted());
        assert!(all.iter().all(|at| (1_000_000..11_000_000).contains(at)));
        // Counts a second of a Poisson process vary as much as their mean.
        let mut counts = vec![0_u32; 10_000];
        for at in &all {
            counts[usize::try_from((at - 1_000_000) / 1000).unwrap()] += 1;
        }
        let variance = counts
            .iter()
            .map(|count| (f64::from(*count) - 5.0).powi(2))
            .sum::<f64>()
            / 10_000.0;
        assert!((4.7..5.3).contains(&variance), "{variance}");
    }

    #[test]
    fn think_times_have_their_median() {
        let mut dice = Dice::new("test", 2);
        let mut times: Vec<f64> = (0..10_001).map(|_| dice.log_normal(20.0, 1.0)).collect();
        times.sort_by(f64::total_cmp);
        let (median, upper) = (times[5000], times[8413]);
        assert!((19.0..21.0).contains(&median), "{median}");
        // One standard deviation up is a factor of e.
        assert!((50.0..59.0).contains(&upper), "{upper}");
    }

    #[test]
    fn the_first_page_is_asked_for_as_often_as_zipf_says() {
        let (popularity, mut dice) = (Popularity::zipf(300), Dice::new("test", 3));
        let draws = (0..20_000).map(|_| popularity.draw(&mut dice));
        let first = draws.filter(|page| *page == 0).count();
        // The 300th harmonic number is 6.2827: 1/6.2827 of 20,000 is 3,183, standard deviation 52.
        assert!((2_970..3_400).contains(&first), "{first}");
    }

    #[test]
    fn the_number_of_pages_has_its_mean() {
        let mut dice = Dice::new("test", 4);
        let sum: u64 = (0..20_000).map(|_| dice.geometric(4.0)).sum();
        assert!((78_000..82_000).contains(&sum), "{sum}");
    }
}
