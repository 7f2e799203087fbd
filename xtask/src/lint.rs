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
    for mut clippy in [ebpf::cargo("clippy")?, ebpf::cargo_for_bench("clippy")?] {
        sh::run(clippy.args(["--", "-Dwarnings"]))?;
    }
    sh::run(
        sh::cargo()
            .args(["doc", "--no-deps", "--document-private-items"])
            .args(host)
            .env("RUSTDOCFLAGS", "-Dwarnings"),
    )
}
