//! Which compiler and which linker build the kernel program.
//!
//! Shared as a source file with `agent/build.rs`, so that both always choose the same; hence only the standard library.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Overrides the choice: the name of any rustup toolchain that can build for [`TARGET`].
pub const TOOLCHAIN_ENV: &str = "PORTCULLIS_BPF_TOOLCHAIN";

/// The name under which `cargo xtask setup` links Debian's compiler into rustup.
pub const LINKED_TOOLCHAIN: &str = "portcullis-bpf";

/// Rustup's own way, where its `rust-src` component is installed.
pub const NIGHTLY_TOOLCHAIN: &str = "nightly";

/// The kernel program's target. The agent runs on little-endian machines only.
pub const TARGET: &str = "bpfel-unknown-none";

/// The kernel program's package and binary.
pub const PACKAGE: &str = "portcullis-ebpf";

/// Overrides the linker, here as in Cargo itself.
const LINKER_ENV: &str = "CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER";

/// Where the linker is, under the workspace root; `.cargo/config.toml` says the same to Cargo.
const LINKER: &str = "target/tools/bin/bpf-linker";

/// A rustup toolchain that can build the kernel program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Toolchain {
    /// As rustup knows it.
    pub name: String,
    /// Whether `core` has to be compiled first, from `rust-src`; else it comes prebuilt.
    pub build_std: bool,
}

/// Chooses the toolchain: the one asked for by [`TOOLCHAIN_ENV`], else Debian's, else nightly.
///
/// # Errors
///
/// One sentence with the remedy, when none of them can build for [`TARGET`].
pub fn choose() -> Result<Toolchain, String> {
    if let Ok(name) = env::var(TOOLCHAIN_ENV) {
        return probe(&name).ok_or_else(|| {
            format!(
                "{TOOLCHAIN_ENV} names the toolchain `{name}`, which cannot build for {TARGET}: \
                 it has neither a prebuilt `core` for it nor (on nightly) the `rust-src` component"
            )
        });
    }
    [LINKED_TOOLCHAIN, NIGHTLY_TOOLCHAIN]
        .into_iter()
        .find_map(probe)
        .ok_or_else(|| {
            format!("no Rust toolchain here can build for {TARGET}: run `cargo xtask setup`")
        })
}

/// Finds the linker that Cargo will be using.
///
/// # Errors
///
/// One sentence with the remedy, when it is not there.
pub fn linker(workspace_root: &Path) -> Result<PathBuf, String> {
    let linker = env::var_os(LINKER_ENV).map_or_else(|| workspace_root.join(LINKER), PathBuf::from);
    // A bare name is left to Cargo, which searches PATH.
    if linker.is_file() || linker.components().count() == 1 {
        Ok(linker)
    } else {
        Err(format!(
            "bpf-linker is not at {}: run `cargo xtask setup`",
            linker.display()
        ))
    }
}

/// Whether the toolchain called `name` can build for [`TARGET`], and how.
fn probe(name: &str) -> Option<Toolchain> {
    let sysroot = PathBuf::from(rustc(name, &["--print", "sysroot"])?);
    let prebuilt = has_prebuilt_core(&sysroot);
    let build_std = !prebuilt
        && sysroot
            .join("lib/rustlib/src/rust/library/core/src/lib.rs")
            .is_file()
        && rustc(name, &["--version"])?.contains("nightly");
    (prebuilt || build_std).then(|| Toolchain {
        name: name.to_owned(),
        build_std,
    })
}

/// Whether the compiler installed there has a compiled `core` for [`TARGET`].
pub fn has_prebuilt_core(sysroot: &Path) -> bool {
    fs::read_dir(sysroot.join("lib/rustlib").join(TARGET).join("lib")).is_ok_and(|files| {
        files
            .flatten()
            .any(|file| file.file_name().to_string_lossy().starts_with("libcore-"))
    })
}

/// What `rustc` of that toolchain prints; none where there is no such toolchain, or no rustup.
fn rustc(toolchain: &str, args: &[&str]) -> Option<String> {
    let output = Command::new("rustup")
        .args(["run", toolchain, "rustc"])
        .args(args)
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}
