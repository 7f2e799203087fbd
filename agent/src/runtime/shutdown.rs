//! When to stop: SIGTERM and SIGINT.

use anyhow::{Context as _, Result};
use tokio::signal::unix::{SignalKind, signal as listen};

/// Listens from now on; the future is ready when the agent is told to stop, and says by what.
///
/// # Errors
/// When the signals cannot be listened to.
pub fn signal() -> Result<impl Future<Output = &'static str>> {
    let mut terminate = listen(SignalKind::terminate()).context("cannot listen to SIGTERM")?;
    let mut interrupt = listen(SignalKind::interrupt()).context("cannot listen to SIGINT")?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        }
    })
}
