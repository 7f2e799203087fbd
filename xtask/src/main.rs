//! Portcullis's chores: set-up, builds, demo, tests, lints.
//!
//! Run as `cargo xtask VERB`. One file a verb or small group of verbs; this one only says which verbs there are.

#![forbid(unsafe_code)]

mod agent;
mod bench;
mod ebpf;
mod eval;
mod lint;
mod setup;
mod sh;
mod test;
mod toolchain;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Portcullis's chores.
///
/// The two to begin with are `cargo xtask demo` and `cargo xtask test`. Both set up what they need first.
#[derive(Debug, Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    version,
    max_term_width = 100
)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Install what a build needs and this machine lacks
    ///
    /// On Debian 12 as root it says what is missing and why, then installs it: packages, a rustup link to Debian's
    /// compiler (it carries a `core` for the kernel's target) and bpf-linker, under target/tools. A rustup nightly that
    /// has the rust-src component is used instead of Debian's compiler. Elsewhere it names what is missing, prints the
    /// commands to get it, and fails. Nothing missing: it does nothing, at once. Nginx is installed but neither started
    /// nor enabled.
    Setup,

    /// Build the kernel program alone and print where its object is
    BuildEbpf,

    /// Set up, then build the agent with the kernel program inside
    Build {
        /// Optimise, as for an installation
        #[arg(long)]
        release: bool,
    },

    /// Attach the kernel program alone to an interface, without an agent
    ///
    /// Builds the agent and hands over to `portcullis load`. With no bans in its maps the program passes everything.
    Load(agent::Load),

    /// Build the agent and start it on this host
    ///
    /// Hands over to `portcullis run`. Without a configuration it watches the interface of the default route and Nginx's
    /// usual log, and only observes: it says what it would ban and drops nothing.
    Run(agent::Run),

    /// See the main job work from end to end, in namespaces that it makes and removes
    ///
    /// Sets up, builds, then runs Nginx behind a virtual link with legitimate clients and an attacker, and shows on a
    /// timeline how the attacker is found, banned, dropped in the driver and let in again. Needs root; touches nothing of
    /// the host's own network. Fails if any step did not happen.
    Demo(agent::Demo),

    /// Run every test, those that need the kernel included
    ///
    /// Sets up first. The last line is `N passed, N failed, N skipped`. Exit code: 0 if all passed; 1 if one failed, the
    /// build failed or nothing ran; 3 if tests that need root were left out and --unprivileged did not accept that.
    Test(test::Args),

    /// Measure what a packet costs in the kernel and how fast lines are read, beside peers, and how fast bans go in and out
    ///
    /// Needs root, and for the peers the packages xdp-tools, ethtool and nftables, and fail2ban-rs, which it builds. Prints
    /// a note in Markdown that says which of the wanted ratios were met. Fails only if something could not be measured.
    Bench(bench::Bench),

    /// Judge the detector: what it catches, how soon, and whom it bans by mistake
    ///
    /// Replays legitimate traffic, made up and from traces, with attacks put in. Needs neither root nor a network. Prints
    /// tables that say which of the wanted figures were met. A quick look: `cargo xtask eval --seeds 5 --only botnet,ramp`.
    Eval(eval::Eval),

    /// Check formatting, lints and documentation of every crate
    Lint,
}

fn main() -> ExitCode {
    let done = match Cli::parse().verb {
        Verb::Setup => setup::run(),
        Verb::BuildEbpf => ebpf::build(),
        Verb::Build { release } => agent::build(release),
        Verb::Load(load) => agent::load(&load),
        Verb::Run(run) => agent::run(&run),
        Verb::Demo(demo) => agent::demo(&demo),
        Verb::Test(args) => return test::run(args),
        Verb::Bench(bench) => bench::run(&bench),
        Verb::Eval(eval) => eval::run(&eval),
        Verb::Lint => lint::run(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

/// Prints an error with its causes; the exit code for it.
fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("error: {error:#}");
    ExitCode::FAILURE
}

#[cfg(test)]
mod tests {
    use super::Cli;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
