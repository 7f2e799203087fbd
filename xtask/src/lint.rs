//! `lint`: formatting, clippy and documentation, of the kernel program too.

use anyhow::Result;

use crate::{
    ebpf,
    setup::{self, Purpose},
    sh,
    toolchain::PACKAGE,
};

/// Checks everything and stops at the first kind of fault.
pub fn run() -> Result<()> {
    setup::ensure(Purpose::Lint)?;
    sh::run(sh::cargo().args(["fmt", "--all", "--check"]))?;
    let host = ["--workspace", "--exclude", PACKAGE];
    sh::run(
        sh::cargo()
            .arg("clippy")
            .args(host)
            .args(["--all-targets", "--", "-Dwarnings"]),
    )?;
    // The kernel program is no program of the host: it is linted for its own target, by its own compiler's clippy.
    sh::run(ebpf::cargo("clippy")?.args(["--", "-Dwarnings"]))?;
    sh::run(
        sh::cargo()
            .args(["doc", "--no-deps", "--document-private-items"])
            .args(host)
            .env("RUSTDOCFLAGS", "-Dwarnings"),
    )
}
