//! Waiting for a condition instead of for a while.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Result, bail};

use super::clock;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Ends every wait of this process, now and later, with an error, so that everything is taken down in good order.
pub fn interrupt() {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

/// Fails once [`interrupt`] was called.
///
/// # Errors
/// Then.
pub fn check_interrupt() -> Result<()> {
    if INTERRUPTED.load(Ordering::Relaxed) {
        bail!("interrupted");
    }
    Ok(())
}

/// Polls until there is something; at least once.
///
/// # Errors
/// When the time is over, or an error of the poll itself.
pub fn eventually<T>(
    what: &str,
    timeout: Duration,
    mut poll: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let start = clock::now();
    loop {
        check_interrupt()?;
        if let Some(found) = poll()? {
            return Ok(found);
        }
        if clock::since(start) >= timeout {
            bail!("waited {:.1} s for this: {what}", timeout.as_secs_f64());
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Sleeps in short steps, so that an interrupt is noticed. For pacing only; a condition is awaited by [`eventually`].
///
/// # Errors
/// When interrupted.
pub fn pause(time: Duration) -> Result<()> {
    let start = clock::now();
    loop {
        check_interrupt()?;
        let left = time.saturating_sub(clock::since(start));
        if left.is_zero() {
            return Ok(());
        }
        thread::sleep(left.min(Duration::from_millis(50)));
    }
}
