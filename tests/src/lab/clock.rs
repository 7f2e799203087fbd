//! The one file of this crate that reads clocks: an experiment has no time but the real one.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

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

/// Milliseconds since the epoch, as log lines and the agent's history have them.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "log lines carry the real time")]
pub fn epoch_millis() -> u64 {
    let since_epoch = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX)
}
