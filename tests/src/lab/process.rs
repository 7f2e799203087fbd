//! A program that ends with the laboratory.

use std::{
    os::unix::process::CommandExt as _,
    process::{Child, Command, ExitStatus},
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::{
    sys::signal::{Signal, kill, killpg},
    unistd::Pid,
};

use super::{netns::NetNs, wait::eventually};

/// A running program and its children; killed on drop.
#[derive(Debug)]
pub struct Process {
    name: &'static str,
    child: Child,
    /// Set once the program is known to have ended.
    status: Option<ExitStatus>,
}

impl Process {
    /// Starts a program in a namespace, and in a process group of its own: a Ctrl-C is for the demo, which ends its
    /// programs in good order.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(name: &'static str, namespace: &NetNs, command: &mut Command) -> Result<Self> {
        Ok(Self {
            name,
            child: namespace.spawn(command.process_group(0))?,
            status: None,
        })
    }

    /// Process number.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    fn pid(&self) -> Result<Pid> {
        Ok(Pid::from_raw(i32::try_from(self.child.id())?))
    }

    /// Sends a signal to the program, not to its children.
    ///
    /// # Errors
    /// When it has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(self.pid()?, signal).with_context(|| format!("cannot send {signal} to {}", self.name))
    }

    /// How it has ended, if it has.
    ///
    /// # Errors
    /// When the system does not say.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        if self.status.is_none() {
            self.status = self.child.try_wait()?;
        }
        Ok(self.status)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it goes on for longer than that.
    pub fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        eventually(&format!("{} to end", self.name), timeout, || self.ended())
    }

    /// `kill -9`, and waits for the end.
    ///
    /// # Errors
    /// When it does not end.
    pub fn kill(&mut self) -> Result<()> {
        self.signal(Signal::SIGKILL)?;
        self.wait(Duration::from_secs(5)).map(|_killed| ())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.status.is_none() {
            if let Ok(pid) = self.pid() {
                let _ended_just_now = killpg(pid, Signal::SIGKILL);
            }
            let _reaped = self.child.wait();
        }
    }
}
