//! `build-ebpf`: the kernel program alone. In the agent's own build, `agent/build.rs` does this through aya-build.

use std::{env, process::Command};

use anyhow::{Context as _, Result, anyhow};

use crate::{
    setup::{self, Purpose},
    sh,
    toolchain::{self, PACKAGE, TARGET},
};

/// What aya-build passes too: the architecture that the kernel's structures are read for, and BTF.
fn rustflags() -> String {
    let arch = format!("--cfg=bpf_target_arch=\"{}\"", env::consts::ARCH);
    [arch.as_str(), "-Cdebuginfo=2", "-Clink-arg=--btf"].join(" ")
}

/// Builds the program and prints where it is.
pub fn build() -> Result<()> {
    setup::ensure(Purpose::Build)?;
    sh::run(cargo("build")?.arg("--release"))?;
    let object = sh::target_dir()
        .join("ebpf")
        .join(TARGET)
        .join("release")
        .join(PACKAGE);
    let size = object
        .metadata()
        .with_context(|| format!("no object at {}", object.display()))?
        .len();
    println!("{} ({size} bytes)", object.display());
    Ok(())
}

/// A Cargo command for the kernel program, with the compiler that can build it.
///
/// It has a target folder of its own: two Cargos of different versions in one would wait for each other's lock.
pub fn cargo(subcommand: &str) -> Result<Command> {
    let toolchain = toolchain::choose().map_err(|problem| anyhow!(problem))?;
    let mut command = sh::command("rustup");
    command
        .args([
            "run",
            &toolchain.name,
            "cargo",
            subcommand,
            "--package",
            PACKAGE,
        ])
        .args(["--target", TARGET, "--target-dir"])
        .arg(sh::target_dir().join("ebpf"))
        .env("RUSTFLAGS", rustflags());
    if toolchain.build_std {
        command.args(["-Z", "build-std=core"]);
    }
    Ok(command)
}

/// Binary and feature of the kernel programs that the bench measures with.
pub const BENCH: &str = "bench";

/// As [`cargo`], for the bench's kernel programs.
pub fn cargo_for_bench(subcommand: &str) -> Result<Command> {
    let mut command = cargo(subcommand)?;
    command
        .args(["--features", BENCH, "--bin", BENCH])
        // As in .cargo/config.toml; that binary is a crate of its own, and loads whole words by inline assembly.
        .env(
            "RUSTC_BOOTSTRAP",
            format!("aya_ebpf,portcullis_ebpf,{BENCH}"),
        );
    Ok(command)
}
