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
