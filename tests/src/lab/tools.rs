//! Other programs under the names that the agent starts, for one thread and its children only: mounted over the host's,
//! in a mount namespace of the thread's own. The host's alternatives and this process's search path stay as they are.

use std::{
    collections::BTreeSet,
    env, fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

/// The names under which one program does iptables' work.
const IPTABLES: [&str; 4] = [
    "iptables",
    "ip6tables",
    "iptables-restore",
    "ip6tables-restore",
];

/// The two programs that a host can have as its iptables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavour {
    /// Rules are nftables'.
    Nft,
    /// Rules are in the kernel's older tables.
    Legacy,
}

impl Flavour {
    const fn program(self) -> &'static str {
        match self {
            Self::Nft => "xtables-nft-multi",
            Self::Legacy => "xtables-legacy-multi",
        }
    }

    /// As it calls itself.
    const fn name(self) -> &'static str {
        match self {
            Self::Nft => "(nf_tables)",
            Self::Legacy => "(legacy)",
        }
    }
}

/// Programs that differ from the host's on the thread that made this, for as long as it runs.
#[derive(Debug)]
pub struct Tools(());

impl Tools {
    /// Gives the calling thread a view of the file system of its own, for good.
    ///
    /// # Errors
    /// Without root.
    pub fn new() -> Result<Self> {
        unshare(CloneFlags::CLONE_NEWNS).context("cannot make a mount namespace")?;
        let flags = MsFlags::MS_REC | MsFlags::MS_SLAVE;
        mount(None::<&str>, "/", None::<&str>, flags, None::<&str>)
            .context("cannot keep mounts from the host")?;
        Ok(Self(()))
    }

    /// Makes one flavour what `iptables` and its relatives are.
    ///
    /// # Errors
    /// When the host does not have both.
    pub fn iptables(&self, flavour: Flavour) -> Result<()> {
        let wanted = real(flavour.program())?;
        let preferred: BTreeSet<PathBuf> = IPTABLES
            .iter()
            .map(|name| real(name))
            .collect::<Result<_>>()?;
        for other in preferred.iter().filter(|other| **other != wanted) {
            cover(other, &wanted)?;
        }
        for name in ["iptables", "ip6tables"] {
            let version = run(&[name, "--version"])?;
            ensure!(version.contains(flavour.name()), "{name} is {version}");
        }
        Ok(())
    }

    /// Puts a file of one's own in the place of one of the host's.
    ///
    /// # Errors
    /// When there is no such file.
    pub fn file(&self, target: &Path, by: &Path) -> Result<()> {
        cover(target, by)
    }

    /// Puts a shell script in the place of a program. The script finds the program itself as `"$real"`.
    ///
    /// # Errors
    /// When there is no such program.
    pub fn script(&self, name: &str, script: &str, folder: &Path) -> Result<()> {
        let program = real(name)?;
        // One program has several names; the others are to be what they were.
        let kept = folder.join(format!("{name}-kept"));
        fs::create_dir(&kept)?;
        fs::copy(&program, kept.join("program")).context("cannot keep the program")?;
        for name in IPTABLES.iter().copied().chain([name]) {
            if !kept.join(name).exists() {
                symlink("program", kept.join(name))?;
            }
        }
        let path = folder.join(format!("{name}-script"));
        let text = format!(
            "#!/bin/sh\nreal={}/${{0##*/}}\n[ \"${{0##*/}}\" = {name} ] || exec \"$real\" \"$@\"\n{script}\n",
            kept.display()
        );
        fs::write(&path, text)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        cover(&program, &path)
    }
}

fn cover(target: &Path, by: &Path) -> Result<()> {
    mount(
        Some(by),
        target,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .with_context(|| format!("cannot mount {} over {}", by.display(), target.display()))
}

/// The file that runs under a name, links followed.
fn real(name: &str) -> Result<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .filter_map(|folder| folder.join(name).canonicalize().ok())
        .find(|path| path.is_file())
        .with_context(|| format!("there is no program {name} (package iptables or ipset)"))
}

/// Runs a program in the calling thread's namespaces and returns what it printed.
///
/// # Errors
/// What it said when it failed.
pub fn run(words: &[&str]) -> Result<String> {
    let (program, arguments) = words.split_first().context("no program")?;
    let output = Command::new(program)
        .args(arguments)
        .env("LC_ALL", "C")
        .output()
        .with_context(|| format!("cannot start {program}"))?;
    ensure!(
        output.status.success(),
        "{}: {}",
        words.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
