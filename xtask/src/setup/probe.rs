//! What is on this machine. Reads files and asks the tools themselves; changes nothing and needs no network.

use std::{
    collections::BTreeSet,
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Result, anyhow};

use super::{BASE, CLIPPY, FAIL2BAN, FAIL2BAN_VERSION, LINKER, LINKER_VERSION, Need, PEERS};
use crate::{sh, toolchain};

/// What was found.
#[derive(Debug, Default)]
pub struct Found {
    /// Those packages' files that are here.
    pub packages: BTreeSet<&'static str>,
    /// The toolchain that can build the kernel program.
    pub toolchain: Option<String>,
    /// Whether Debian's compiler could be that toolchain once it has a name.
    pub debian_compiler: bool,
    /// Whether the linker is here, runs and has the right version.
    pub linker: bool,
    /// Whether fail2ban-rs is here, runs and has the right version.
    pub fail2ban: bool,
    /// Components that the lints need of the host's toolchain.
    pub missing_components: Vec<&'static str>,
}

impl Found {
    pub fn look() -> Self {
        let toolchain = toolchain::choose().ok().map(|toolchain| toolchain.name);
        Self {
            packages: [BASE, LINKER, CLIPPY, PEERS]
                .iter()
                .copied()
                .flatten()
                .filter(|need| is_here(need.file))
                .map(|need| need.package)
                .collect(),
            debian_compiler: toolchain::has_prebuilt_core(Path::new("/usr"))
                && is_here("/usr/bin/rustc")
                && is_here("/usr/bin/cargo"),
            toolchain,
            linker: linker_works(),
            fail2ban: fail2ban_works(),
            missing_components: missing_components(),
        }
    }

    pub fn has(&self, need: &Need) -> bool {
        self.packages.contains(need.package)
    }
}

/// What decides whether packages can be installed here.
#[derive(Clone, Copy, Debug)]
pub struct Host {
    pub is_root: bool,
    pub is_debian_12: bool,
    pub has_rustup: bool,
}

impl Host {
    pub fn look() -> Self {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        Self {
            is_root: status.lines().any(|line| {
                line.starts_with("Uid:") && line.split_whitespace().nth(2) == Some("0")
            }),
            is_debian_12: is_debian_12(&fs::read_to_string("/etc/os-release").unwrap_or_default()),
            has_rustup: is_here("rustup"),
        }
    }

    pub fn can_install(self) -> bool {
        self.is_root && self.is_debian_12
    }
}

/// Refuses an override that names an unfit toolchain: no installation would mend that.
pub fn check_override() -> Result<()> {
    if env::var_os(toolchain::TOOLCHAIN_ENV).is_some() {
        toolchain::choose().map_err(|problem| anyhow!(problem))?;
    }
    Ok(())
}

/// Whether a process of that name runs.
pub fn is_running(name: &str) -> bool {
    fs::read_dir("/proc").is_ok_and(|entries| {
        entries.flatten().any(|process| {
            fs::read_to_string(process.path().join("comm"))
                .is_ok_and(|comm| comm.trim_end() == name)
        })
    })
}

fn is_debian_12(os_release: &str) -> bool {
    let has = |wanted: &str| {
        os_release
            .lines()
            .any(|line| line.replace('"', "") == wanted)
    };
    has("ID=debian") && has("VERSION_ID=12")
}

/// Whether a file is here; a bare name is a program, looked for where root's programs are too.
fn is_here(file: &str) -> bool {
    if file.contains('/') {
        return Path::new(file).exists();
    }
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .any(|folder| folder.join(file).is_file())
}

fn linker_works() -> bool {
    let Ok(linker) = toolchain::linker(&sh::root()) else {
        return false;
    };
    // It is started, not only looked at: it does not run without the LLVM that it was built against.
    let Ok(output) = Command::new(&linker).arg("--version").output() else {
        return false;
    };
    let ours = linker.starts_with(sh::root());
    let version = String::from_utf8_lossy(&output.stdout);
    output.status.success() && (!ours || version.trim_end().ends_with(LINKER_VERSION))
}

fn fail2ban_works() -> bool {
    Command::new(sh::root().join(FAIL2BAN))
        .arg("--version")
        .output()
        .is_ok_and(|output| {
            let version = String::from_utf8_lossy(&output.stdout);
            output.status.success() && version.trim_end().ends_with(FAIL2BAN_VERSION)
        })
}

fn missing_components() -> Vec<&'static str> {
    let Some(cargo) = env::var_os("CARGO").map(PathBuf::from) else {
        return Vec::new();
    };
    [("cargo-clippy", "clippy"), ("cargo-fmt", "rustfmt")]
        .into_iter()
        .filter(|(program, _)| !cargo.with_file_name(program).is_file())
        .map(|(_, component)| component)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debian_12_is_told_from_others() {
        assert!(is_debian_12(
            "NAME=\"Debian GNU/Linux\"\nVERSION_ID=\"12\"\nID=debian\n"
        ));
        assert!(!is_debian_12("VERSION_ID=\"13\"\nID=debian\n"));
        assert!(!is_debian_12(
            "VERSION_ID=\"12\"\nID=other\nID_LIKE=debian\n"
        ));
        assert!(!is_debian_12(""));
    }

    #[test]
    fn a_process_is_found_by_its_name() {
        let own = fs::read_to_string("/proc/self/comm").unwrap();
        assert!(is_running(own.trim_end()));
        assert!(!is_running("no-such-process"));
    }
}
