//! The one file of this crate that reads clocks: an experiment has no time but the real one.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::time::{ClockId, clock_gettime};

/// Now, for measuring.
#[must_use]
#[expect(
    clippy::disallowed_methods,
    reason = "the demo and the tests measure real time"
)]
pub fn now() -> Instant {
    Instant::now()
}

/// Time since an instant.
#[must_use]
pub fn since(start: Instant) -> Duration {
    now().saturating_duration_since(start)
}

/// Time that this process has had a processor for, all its threads together.
#[must_use]
pub fn processor() -> Duration {
    // Every kernel has it.
    clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

/// Milliseconds since the epoch, as log lines and the agent's history have them.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "log lines carry the real time")]
pub fn epoch_millis() -> u64 {
    let since_epoch = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX)
}
