//! Builds the kernel program and leaves it in `OUT_DIR`, where `enforce::xdp` embeds it from.

use std::{path::Path, process::ExitCode};

use anyhow::{Result, anyhow};
use aya_build::Package;

#[path = "../xtask/src/toolchain.rs"]
mod toolchain;

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Cargo shows this line by itself, without the build script's whole output around it.
            println!("cargo::error={error:#}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<()> {
    // What aya-build does not see: it watches the program's own folder.
    for path in [
        "../common",
        "../Cargo.toml",
        "../Cargo.lock",
        "../.cargo/config.toml",
    ] {
        println!("cargo::rerun-if-changed={path}");
    }
    println!("cargo::rerun-if-env-changed={}", toolchain::TOOLCHAIN_ENV);

    toolchain::linker(Path::new("..")).map_err(|problem| anyhow!(problem))?;
    let toolchain = toolchain::choose().map_err(|problem| anyhow!(problem))?;
    aya_build::build_ebpf(
        [Package {
            name: toolchain::PACKAGE,
            root_dir: "../ebpf",
            ..Package::default()
        }],
        aya_build::Toolchain::Custom(&toolchain.name),
    )
}
