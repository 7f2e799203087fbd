//! `cargo xtask bench`: what a packet costs in the kernel, ours against peers, and how fast bans go in and out and lines are
//! read.
//!
//! Prints a note in Markdown. Fails only if something could not be measured; a ratio that is missed is said, not failed.

#![forbid(unsafe_code)]

#[path = "bench/bulk.rs"]
mod bulk;
#[path = "bench/cost.rs"]
mod cost;
#[path = "bench/crowd.rs"]
mod crowd;
#[path = "bench/fail2ban.rs"]
mod fail2ban;
#[path = "bench/ledger.rs"]
mod ledger;
#[path = "bench/lines.rs"]
mod lines;
#[path = "bench/live.rs"]
mod live;
#[path = "bench/note.rs"]
mod note;
#[path = "bench/source.rs"]
mod source;
#[path = "bench/subjects.rs"]
mod subjects;
#[path = "../../../ebpf/src/bin/bench/walk.rs"]
#[expect(dead_code, reason = "the steps are the kernel's")]
mod walk;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, ValueEnum};
use portcullis_tests::lab::Lab;

use note::Note;

/// See what Portcullis costs, as ratios to peers that are measured in the same run.
///
/// Everything happens in namespaces and on a BPF file system of its own. Needs root, iproute2, and for the peers xdp-tools,
/// ethtool, nftables, iptables, ipset and fail2ban-rs.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask bench --", version, max_term_width = 100)]
struct Args {
    /// Fewer and shorter runs: a first look, not figures to quote
    #[arg(long)]
    quick: bool,

    /// Only these parts
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Part::ALL)]
    parts: Vec<Part>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Nanoseconds a packet, of each program by itself
    Cost,
    /// Packets a second through a virtual link
    Live,
    /// Bans in and out by the hundred thousand
    Bulk,
    /// Lines of the access log, read and parsed
    Lines,
    /// A line's cost and the memory with a million clients
    Crowd,
    /// A ledger of a million bans: start, rest, end, and a burst of decisions
    Ledger,
}

impl Part {
    const ALL: [Self; 6] = [
        Self::Cost,
        Self::Live,
        Self::Bulk,
        Self::Lines,
        Self::Crowd,
        Self::Ledger,
    ];
}

fn main() -> ExitCode {
    if let Some(filled) = crowd::fill().or_else(ledger::fill) {
        return match filled {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{error:#}");
                ExitCode::FAILURE
            }
        };
    }
    let args = Args::parse();
    let mut note = Note::default();
    for part in Part::ALL {
        if args.parts.contains(&part)
            && let Err(error) = measure(part, args.quick, &mut note)
        {
            note.problem(format!("{part:?}"), &error);
        }
    }
    note.end()
}

fn measure(part: Part, quick: bool, note: &mut Note) -> Result<()> {
    match part {
        Part::Cost => {
            for bans in [10_000, 1_000_000] {
                cost::measure(bans, quick, note)?;
            }
            Ok(())
        }
        Part::Live => live::measure(quick, note),
        Part::Bulk => bulk::measure(&Lab::new()?, quick, note),
        Part::Lines => lines::measure(quick, note),
        Part::Crowd => crowd::measure(quick, note),
        Part::Ledger => ledger::measure(quick, note),
    }
}
