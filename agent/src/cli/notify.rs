//! `portcullis notify`: does word reach people?

use std::fmt::Write as _;

use anyhow::{Context as _, anyhow};
use portcullis_engine::{Event, command::Action};

use super::{Failure, USAGE, log, print};
use crate::{config::Config, notify, runtime::clock};

/// Sends a test message to everybody who is configured, and prints what has come of it; says whether all have it.
pub(super) fn test(config: &Config) -> Result<bool, Failure> {
    if config.slack.is_none() && config.webhook.is_none() {
        return Err(Failure(
            USAGE,
            anyhow!(
                "nobody is configured: put the address of a webhook into a file that only the agent can read, and name that \
                 file in slack.webhook_file, or in webhook.url_file for any other receiver of JSON"
            ),
        ));
    }
    let _log = log();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let event = Event::new(
        clock::wall(),
        Action::Notice,
        "a test by `portcullis notify test`: nothing has happened",
    );
    let all = runtime.block_on(notify::test(config, &event));
    let mut out = String::new();
    for notify::Tried { section, result } in &all {
        let said = match result {
            Ok(()) => "delivered".to_owned(),
            Err(why) => format!("not delivered: {why}"),
        };
        let _ = writeln!(out, "{section:<10}{said}");
    }
    print(&out)?;
    Ok(all.iter().all(|tried| tried.result.is_ok()))
}
