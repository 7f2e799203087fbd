//! `cargo xtask demo`: the main job from end to end on real parts, as a timeline with evidence. Fails if any step did not
//! happen.

#![forbid(unsafe_code)]

#[path = "demo/steps.rs"]
mod steps;
#[path = "demo/timeline.rs"]
mod timeline;

use std::{process::ExitCode, thread};

use clap::Parser;
use nix::sys::signal::{SigSet, Signal};
use portcullis_tests::lab::wait;

use timeline::Timeline;

/// See Portcullis's main job work from end to end.
///
/// Sets up two network namespaces of its own with a real Nginx behind a virtual link, legitimate clients and an attacker;
/// runs the agent there and shows how the attacker is found, banned, dropped in the driver and let in again. Nothing of
/// the host's own network is touched. Needs root, iproute2, nginx and a kernel with bpffs. The exit code is 0 only if
/// every step happened.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask demo --", version, max_term_width = 100)]
struct Args {
    /// Offenders of which the latency report is made
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u16).range(20..=10_000))]
    samples: u16,

    /// Print the agent's whole log at the end
    #[arg(long)]
    agent_log: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if let Err(error) = end_in_good_order_on_signals() {
        eprintln!("error: cannot wait for signals: {error}");
        return ExitCode::FAILURE;
    }
    let mut timeline = Timeline::start();
    let result = steps::run(&mut timeline, args.samples.into(), args.agent_log);
    timeline.end(result)
}

/// A first SIGINT or SIGTERM ends every wait with an error, so that the laboratory is taken down; a second one ends the
/// demo at once.
fn end_in_good_order_on_signals() -> nix::Result<()> {
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    // Threads inherit it, so the one below gets all of them.
    signals.thread_block()?;
    thread::spawn(move || -> ! {
        if signals.wait().is_ok() {
            wait::interrupt();
        }
        let _ends_at_once = signals.thread_unblock();
        loop {
            thread::park();
        }
    });
    Ok(())
}
