//! A network namespace of one's own.
//!
//! Threads enter the network namespace and nothing else: `ip netns exec` would also replace /sys.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::Write as _,
    panic::resume_unwind,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
};

use anyhow::{Context as _, Result, bail};
use nix::{
    sched::{CloneFlags, setns},
    sys::signal::SigSet,
};

/// Where iproute2 keeps the namespaces that have a name.
pub(super) const NAMED: &str = "/run/netns";

/// A named network namespace; deleted on drop.
#[derive(Debug)]
pub struct NetNs {
    name: String,
}

impl NetNs {
    /// Makes a namespace.
    ///
    /// # Errors
    /// Without root or iproute2, or when the name is taken.
    pub fn create(name: String) -> Result<Self> {
        ip(&["netns", "add", &name])?;
        Ok(Self { name })
    }

    /// Its name, as `ip netns` shows it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    fn path(&self) -> PathBuf {
        Path::new(NAMED).join(&self.name)
    }

    /// Moves the calling thread in, for good.
    ///
    /// # Errors
    /// When the namespace is gone.
    pub fn enter(&self) -> Result<()> {
        let path = self.path();
        let handle =
            File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
        setns(handle, CloneFlags::CLONE_NEWNET)
            .with_context(|| format!("cannot enter {}", self.name))
    }

    /// Runs a job inside, on a thread of its own.
    ///
    /// # Errors
    /// When the namespace is gone.
    pub fn run<T: Send>(&self, job: impl FnOnce() -> T + Send) -> Result<T> {
        thread::scope(|scope| {
            let inside = scope.spawn(|| self.enter().map(|()| job()));
            inside.join().unwrap_or_else(|panic| resume_unwind(panic))
        })
    }

    /// Starts a program inside, with no signal blocked.
    ///
    /// # Errors
    /// When the namespace is gone or the program cannot be started.
    pub fn spawn(&self, command: &mut Command) -> Result<Child> {
        let program = command.get_program().to_owned();
        self.run(|| -> Result<Child> {
            // A child inherits the mask, and the demo blocks signals in its own threads.
            SigSet::empty().thread_set_mask()?;
            Ok(command.spawn()?)
        })?
        .with_context(|| format!("cannot start {}", program.display()))
    }

    /// Sets a value under /proc/sys, as this namespace has it.
    ///
    /// # Errors
    /// When there is no such value.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = Path::new("/proc/sys").join(key);
        self.run(|| fs::write(&path, value))?
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// Runs commands of ip(8) inside.
    ///
    /// # Errors
    /// What ip said of the first that failed.
    pub fn ip(&self, commands: &[&str]) -> Result<()> {
        let mut child = Command::new("ip")
            .args(["-n", &self.name, "-batch", "-"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start ip (package iproute2)")?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(commands.join("\n").as_bytes())?;
            stdin.write_all(b"\n")?;
        }
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!(
                "ip in {}: {}",
                self.name,
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(())
    }
}

impl Drop for NetNs {
    fn drop(&mut self) {
        if let Err(error) = ip(&["netns", "del", &self.name]) {
            eprintln!("cannot delete {}: {error:#}", self.name);
        }
    }
}

/// Runs ip(8) and returns what it printed.
///
/// # Errors
/// What it said when it failed.
pub fn ip<S: AsRef<OsStr>>(arguments: &[S]) -> Result<String> {
    let output = Command::new("ip")
        .args(arguments)
        .output()
        .context("cannot start ip (package iproute2)")?;
    if !output.status.success() {
        let words: Vec<_> = arguments
            .iter()
            .map(|word| word.as_ref().to_string_lossy())
            .collect();
        bail!(
            "ip {}: {}",
            words.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
