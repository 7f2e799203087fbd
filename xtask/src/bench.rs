//! `bench`: the benches, in a release build.

use anyhow::{Context as _, Result};

use crate::{
    ebpf::{self, BENCH},
    setup::{self, Purpose},
    sh,
    toolchain::TARGET,
};

/// Tells the bench where its kernel programs are.
const OBJECT_ENV: &str = "PORTCULLIS_BENCH_OBJECT";

/// Tells the bench where the peer is that reads the log.
const FAIL2BAN_ENV: &str = "PORTCULLIS_BENCH_FAIL2BAN_RS";

/// Package of the bench.
const PACKAGE: &str = "portcullis-tests";

#[derive(Debug, clap::Args)]
pub struct Bench {
    /// Fewer and shorter runs: a first look, not figures to quote
    #[arg(long)]
    quick: bool,

    /// Only these parts [default: all]
    #[arg(long, value_delimiter = ',', value_parser = ["cost", "live", "bulk", "lines", "crowd"])]
    parts: Vec<String>,
}

pub fn run(bench: &Bench) -> Result<()> {
    setup::ensure(Purpose::Bench)?;
    sh::run(ebpf::cargo_for_bench("build")?.arg("--release"))?;
    let object = sh::target_dir()
        .join("ebpf")
        .join(TARGET)
        .join("release")
        .join(BENCH);
    // The agent itself, too: its memory is measured.
    sh::run(sh::cargo().args([
        "build",
        "--release",
        "--package",
        PACKAGE,
        "--package",
        "portcullis",
        "--bin",
        BENCH,
        "--bin",
        "portcullis",
    ]))?;
    let binary = sh::target_dir().join("release").join(BENCH);
    // What else runs here disturbs it less.
    let mut command = sh::command("nice");
    command
        .args(["-n", "-20"])
        .arg(binary)
        .env(OBJECT_ENV, object)
        .env(FAIL2BAN_ENV, sh::root().join(setup::FAIL2BAN));
    if bench.quick {
        command.arg("--quick");
    }
    if !bench.parts.is_empty() {
        command.args(["--parts", &bench.parts.join(",")]);
    }
    sh::exec(&mut command).context("the bench cannot be started")
}
