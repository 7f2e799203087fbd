//! The only place that reads a clock.
#![expect(clippy::disallowed_methods, reason = "this is where they are allowed")]

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::time::{ClockId, clock_gettime};
use portcullis_engine::Timestamp;

/// The time of day. A clock set before 1970 reads as 1970.
#[must_use]
pub fn wall() -> Timestamp {
    let since_epoch = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    Timestamp::from_millis(u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX))
}

/// Time since the machine booted, sleep included: the clock that the kernel program's deadlines are on. Never jumps.
#[must_use]
pub fn boot() -> Duration {
    // Cannot fail for a clock that every supported kernel has.
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from)
}

/// How long the calling thread has had a processor.
#[must_use]
pub fn of_thread() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

/// Notices that somebody has set the clock: the time of day and the time since boot do not go on together then. What is less
/// than a leap second or the work of a time server that slews is none of that.
#[derive(Debug, Default)]
pub struct Steps {
    /// The time of day at boot, in milliseconds, as of the last look.
    offset: Option<i64>,
}

/// Readings of the two clocks that are further apart were interrupted.
const TOGETHER: Duration = Duration::from_millis(50);
/// In milliseconds.
const LEAP: u64 = 1500;

impl Steps {
    /// The time of day, and by how many milliseconds the clock was set since the last look, if it was.
    pub fn now(&mut self) -> (Timestamp, Option<i64>) {
        let mut before = boot();
        let mut now = wall();
        // Bounded: a machine that is always interrupted here has other troubles.
        for _ in 0..100 {
            let after = boot();
            if after.saturating_sub(before) < TOGETHER {
                break;
            }
            (before, now) = (after, wall());
        }
        (now, self.step(now, before))
    }

    fn step(&mut self, wall: Timestamp, boot: Duration) -> Option<i64> {
        let [wall, boot] = [u128::from(wall.millis()), boot.as_millis()];
        let offset = i64::try_from(wall).ok()? - i64::try_from(boot).ok()?;
        let before = self.offset.replace(offset)?;
        let by = offset - before;
        (by.unsigned_abs() > LEAP).then_some(by)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_clock_that_is_set_steps() {
        let mut steps = Steps::default();
        let mut look = |wall: u64, boot: u64| {
            steps.step(
                Timestamp::from_millis(1_700_000_000_000 + wall),
                Duration::from_millis(boot),
            )
        };
        assert_eq!(
            look(0, 5_000),
            None,
            "nothing is known before the first look"
        );
        assert_eq!(look(250, 5_250), None);
        // Asleep for an hour: both go on.
        assert_eq!(look(3_600_250, 3_605_250), None);
        // A leap second, and back; slewed for long.
        assert_eq!(look(3_599_500, 3_605_500), None);
        assert_eq!(look(3_601_000, 3_606_000), None);
        assert_eq!(look(7_202_000, 7_206_000), None);
        assert_eq!(look(93_602_000, 7_206_000), Some(86_400_000));
        assert_eq!(look(93_602_250, 7_206_250), None, "said once");
        assert_eq!(look(7_202_500, 7_206_500), Some(-86_400_000));
    }

    #[test]
    fn a_clock_that_nobody_sets_does_not_step() {
        let mut steps = Steps::default();
        assert!((0..1000).all(|_| steps.now().1.is_none()));
    }
}
