//! Knows whether reading is behind the writing, and keeps decisions timely when more is written than can be read: then of so
//! many lines only one is read, at random.

use std::time::Duration;

/// At most so many lines stand for by one.
pub const MAX_ONE_IN: u32 = 64;
/// The pace is judged over so long.
const JUDGE: Duration = Duration::from_millis(250);

/// How fast lines are worked on, and which share of them.
#[derive(Debug)]
pub struct Pace {
    /// What is there is to be read in so long.
    target: Duration,
    one_in: u32,
    /// Since when there has been more than one piece to read, and the bytes passed since.
    busy: Option<(Duration, u64)>,
}

impl Pace {
    /// A pace that keeps what is not read within `target` of being read.
    #[must_use]
    pub const fn new(target: Duration) -> Self {
        Self {
            target,
            one_in: 1,
            busy: None,
        }
    }

    /// Of so many lines one is to be read.
    #[must_use]
    pub const fn one_in(&self) -> u32 {
        self.one_in
    }

    /// So many bytes were handed on; so many are left, of which one read takes `chunk`. The share is halved for as long as
    /// it would take longer than the target to read what is left, and doubled when it would take less than a quarter of it.
    pub fn passed(&mut self, now: Duration, bytes: u64, left: u64, chunk: u64) {
        let (since, passed) = self.busy.get_or_insert((now, 0));
        *passed += bytes;
        let judged = now.saturating_sub(*since);
        if left <= chunk {
            // An idle reader says nothing about how fast it could be.
            self.busy = None;
            self.one_in = (self.one_in / 2).max(1);
        } else if judged >= JUDGE {
            let needed = judged.as_secs_f64() * left as f64 / (*passed).max(1) as f64;
            if needed > self.target.as_secs_f64() {
                self.one_in = (self.one_in * 2).min(MAX_ONE_IN);
            } else if needed < self.target.as_secs_f64() / 4.0 {
                self.one_in = (self.one_in / 2).max(1);
            }
            self.busy = Some((now, 0));
        }
    }
}

/// Whether what is read was written just now.
#[derive(Debug)]
pub struct CatchUp {
    /// So many bytes are still older than that. `None`: caught up.
    left: Option<u64>,
}

/// Nothing was read yet.
impl Default for CatchUp {
    fn default() -> Self {
        Self {
            left: Some(u64::MAX),
        }
    }
}

impl CatchUp {
    /// Is what is read next older?
    #[must_use]
    pub const fn is_behind(&self) -> bool {
        self.left.is_some()
    }

    /// So many bytes were handed on; so many are left, of which one read takes `chunk`. Reading is behind from when more than
    /// that is left, until all that was left at some moment has been handed on.
    pub fn passed(&mut self, bytes: u64, left: u64, chunk: u64) {
        self.left = if left > chunk {
            Some(u64::MAX)
        } else {
            let older = self.left.map(|older| older.saturating_sub(bytes).min(left));
            older.filter(|older| *older > 0)
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_there_is_older_to_its_last_byte() {
        let mut catch_up = CatchUp::default();
        assert!(catch_up.is_behind());
        // Little, but perhaps of hours; and meanwhile more is written.
        for left in [500, 400, 300, 200] {
            catch_up.passed(200, left, CHUNK);
            assert_eq!(catch_up.is_behind(), left > 200, "{left}");
        }
        catch_up.passed(200, CHUNK, CHUNK);
        assert!(!catch_up.is_behind(), "one read's worth is no arrears");
        catch_up.passed(200, CHUNK + 1, CHUNK);
        assert!(catch_up.is_behind());
        catch_up.passed(CHUNK, 0, CHUNK);
        assert!(!catch_up.is_behind());
    }

    const CHUNK: u64 = 256 * 1024;

    /// Writes so many MB a second into a log of which so many can be worked on; returns for how long, at most, reading was
    /// behind, and the share at the end.
    fn run(written: u64, speed: u64, secs: u64) -> (Duration, u32) {
        let mut pace = Pace::new(Duration::from_secs(2));
        let (mut left, mut worst) = (0, 0);
        for step in 0..secs * 100 {
            left += written * 10_000;
            let read = left.min(speed * 10_000 * u64::from(pace.one_in()));
            left -= read;
            worst = worst.max(left / written);
            pace.passed(Duration::from_millis(10 * step), read, left, CHUNK);
        }
        (Duration::from_micros(worst), pace.one_in())
    }

    #[test]
    fn every_line_is_read_while_that_keeps_up() {
        assert_eq!(run(50, 100, 60), (Duration::ZERO, 1));
    }

    #[test]
    fn a_flood_is_never_far_ahead() {
        for (written, speed) in [(200, 100), (1000, 100), (30, 1)] {
            let (worst, one_in) = run(written, speed, 120);
            assert!(worst < Duration::from_secs(5), "{worst:?} behind");
            assert!(one_in > 1);
        }
    }

    #[test]
    fn a_flood_beyond_all_measure_leaves_a_stated_share() {
        assert_eq!(run(10_000, 1, 60).1, MAX_ONE_IN);
    }

    #[test]
    fn a_burst_after_silence_is_no_reason() {
        let mut pace = Pace::new(Duration::from_secs(2));
        pace.passed(Duration::from_secs(1), 1000, 0, CHUNK);
        pace.passed(Duration::from_secs(60), 1000, 100 * CHUNK, CHUNK);
        pace.passed(Duration::from_millis(60_010), CHUNK, 99 * CHUNK, CHUNK);
        assert_eq!(pace.one_in(), 1);
    }

    #[test]
    fn when_the_flood_is_over_every_line_counts_again() {
        let mut pace = Pace::new(Duration::from_secs(2));
        let mut left = 1_000_000_000;
        let mut now = Duration::ZERO;
        while left > 0 {
            let read = left.min(100_000 * u64::from(pace.one_in()));
            left -= read;
            now += Duration::from_millis(10);
            pace.passed(now, read, left, CHUNK);
        }
        (0..8).for_each(|_| pace.passed(now, 0, 0, CHUNK));
        assert_eq!(pace.one_in(), 1);
    }
}
