//! Putting bans in force: one trait, several back ends, one thread that owns the one in use.

pub mod dry_run;
mod intent;
pub mod iptables;
pub mod nginx;
pub mod sockets;
pub mod worker;
pub mod xdp;

use std::{fmt, ops::AddAssign, time::Duration};

use anyhow::{Context as _, Result, anyhow};
use ipnet::IpNet;
use portcullis_engine::{Subject, Term, Timestamp};
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

pub use self::intent::{Intent, reconcile};
use self::sockets::Sockets;
use crate::{config, runtime::clock};

/// What happens to packets of banned sources.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// They are counted and pass.
    Observe,
    /// They are dropped.
    Enforce,
}

/// A way to put bans in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Backend {
    /// XDP in the network driver.
    XdpNative,
    /// XDP in the kernel's generic receive path, for drivers without it.
    XdpGeneric,
    /// iptables and ipset.
    Iptables,
    /// Nothing at all: bans are kept in memory, for trying things out without rights.
    DryRun,
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::XdpNative => "xdp-native",
            Self::XdpGeneric => "xdp-generic",
            Self::Iptables => "iptables",
            Self::DryRun => "dry-run",
        })
    }
}

/// How long an entry is to live, from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lifetime {
    /// The kernel ends it by itself after so long.
    For(Duration),
    /// Until it is taken away.
    Permanent,
}

impl Lifetime {
    /// What is left of a ban at `now`.
    #[must_use]
    pub fn of(term: Term, now: Timestamp) -> Self {
        match term {
            Term::Until(end) => Self::For(end.since(now)),
            Term::Permanent => Self::Permanent,
        }
    }

    /// What is left now of what was left at `made`, on the boot clock.
    #[must_use]
    pub fn after(self, made: Duration) -> Self {
        match self {
            Self::For(left) => Self::For(left.saturating_sub(clock::boot().saturating_sub(made))),
            Self::Permanent => Self::Permanent,
        }
    }
}

/// A change of what is in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Enter a ban, or give one that stands a new lifetime (its counters go on).
    Ban(Subject, Lifetime),
    /// As [`Change::Ban`], but its packets are counted and pass, whatever the mode. Of bans around one another the narrowest
    /// decides.
    Observe(Subject, Lifetime),
    /// Take a ban away; fine if it is not there.
    Unban(Subject),
}

impl Change {
    /// Whom it is about.
    #[must_use]
    pub const fn subject(self) -> Subject {
        match self {
            Self::Ban(subject, _) | Self::Observe(subject, _) | Self::Unban(subject) => subject,
        }
    }
}

/// A ban as the kernel has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Whom it keeps out.
    pub subject: Subject,
    /// What is left of it; zero when its time is over and it was not taken away yet.
    pub lifetime: Lifetime,
    /// Its packets pass, whatever the mode.
    pub observed: bool,
    /// Packets that it matched.
    pub hits: u64,
    /// How long ago the newest of them was; `None` when there was none or the back end does not know.
    pub last_seen: Option<Duration>,
}

/// Some of many, and where to go on; none at the end.
pub type Page<T, C = Cursor> = (Vec<T>, Option<C>);

/// Where to go on reading entries; the default is the beginning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cursor {
    /// Of the places where bans are.
    place: usize,
    /// In that place, as the kernel counts; none at its beginning.
    at: Option<u32>,
}

impl Cursor {
    /// At the beginning of the next place, if there is another one.
    fn next_place(self, places: usize) -> Option<Self> {
        let place = self.place + 1;
        (place < places).then_some(Self { place, at: None })
    }
}

/// Totals of packets since the back end was set up, by reason, in a fixed order. Names are those of
/// [`portcullis_common::stats::Counter`]; a back end leaves out what it cannot count.
pub type Counters = Vec<(&'static str, u64)>;

/// A back end. All calls block for at most a few milliseconds a change and are made from one thread.
pub trait Enforcer: Send {
    /// Which one this is.
    fn backend(&self) -> Backend;

    /// Where it is at work, for people: interfaces, or chains.
    fn place(&self) -> String;

    /// The longest lifetime that an entry can have, where there is such a bound: longer ones are renewed before they end.
    fn longest(&self) -> Option<Duration> {
        None
    }

    /// Sets what happens to packets of banned sources.
    ///
    /// # Errors
    /// When the kernel refuses; the mode is then as it was.
    fn set_mode(&mut self, mode: Mode) -> Result<()>;

    /// Replaces the allowlist, which wins over every ban.
    ///
    /// # Errors
    /// When the kernel refuses; entries that could be written are in force.
    fn set_allowlist(&mut self, allow: &[IpNet]) -> Result<()>;

    /// Carries changes out, in order; one result for each.
    fn apply(&mut self, changes: &[Change]) -> Vec<Result<()>>;

    /// Some thousand of the bans that the kernel has, those past their time included. One that stays meanwhile is met exactly
    /// once.
    ///
    /// # Errors
    /// When the kernel refuses.
    fn entries_from(&mut self, from: Cursor) -> Result<Page<Entry>>;

    /// Every ban that the kernel has, those past their time included.
    ///
    /// # Errors
    /// When the kernel refuses.
    fn entries(&mut self) -> Result<Vec<Entry>> {
        let (mut all, mut next) = (Vec::new(), Some(Cursor::default()));
        while let Some(from) = next {
            let mut some;
            (some, next) = self.entries_from(from)?;
            all.append(&mut some);
        }
        Ok(all)
    }

    /// The entries of these few subjects, as far as there are any.
    ///
    /// # Errors
    /// When the kernel refuses.
    fn entries_of(&mut self, subjects: &[Subject]) -> Result<Vec<Entry>> {
        let mut all = self.entries()?;
        all.retain(|entry| subjects.contains(&entry.subject));
        Ok(all)
    }

    /// Are the entries of a few read without reading all?
    fn looks_up(&self) -> bool {
        false
    }

    /// Totals of packets.
    ///
    /// # Errors
    /// When the kernel refuses.
    fn counters(&mut self) -> Result<Counters>;

    /// Lets packets meet the bans: attaches to the interfaces, or inserts the rules. Called when what must be in force has
    /// been entered; until then nothing is dropped that was not dropped before. Called again and again later: puts back
    /// what somebody has taken away, and says whether there was anything to put back.
    ///
    /// # Errors
    /// One sentence with the remedy. The first time, nothing of ours is left attached that was not before.
    fn activate(&mut self) -> Result<bool>;

    /// Takes everything of ours out of the kernel.
    ///
    /// # Errors
    /// When something could not be taken out; the rest is.
    fn detach(&mut self) -> Result<()>;
}

/// What had to be done to bring the kernel to what the ledger says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drift {
    /// Bans that the kernel did not have.
    pub missing: u64,
    /// Bans whose end was another one.
    pub altered: u64,
    /// Entries that nobody had asked for. Those past their time do not count: the kernel ignores them.
    pub foreign: u64,
    /// Times that the back end had been taken out of the packets' way: detached, its rules flushed, its allowlist altered.
    pub detached: u64,
    /// Repairs that failed.
    pub failed: u64,
}

impl Drift {
    /// Was the kernel as it should be?
    #[must_use]
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

impl AddAssign for Drift {
    fn add_assign(&mut self, other: Self) {
        self.missing += other.missing;
        self.altered += other.altered;
        self.foreign += other.foreign;
        self.detached += other.detached;
        self.failed += other.failed;
    }
}

impl fmt::Display for Drift {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} missing, {} altered, {} foreign, {} times detached; {} repairs failed",
            self.missing, self.altered, self.foreign, self.detached, self.failed
        )
    }
}

/// A back end at work, and why those before it are not.
pub struct Chosen {
    /// The back end; everything in force.
    pub enforcer: Box<dyn Enforcer>,
    /// One sentence for each back end that was tried in vain.
    pub refused: Vec<String>,
    /// What is in force.
    pub intent: Intent,
    /// Ends the connections that a source has when it is banned; none where that is not wanted or cannot be had.
    pub sockets: Option<Sockets>,
}

/// Sets up the first back end that works: allowlist first, then the bans, and only then its place in the packets' way.
///
/// # Errors
/// When none works: every reason, a line each.
pub fn choose(
    config: &config::Enforce,
    mode: Mode,
    max_bans: u32,
    allow: &[IpNet],
    mut intent: Intent,
) -> Result<Chosen> {
    let mut refused = Vec::new();
    for backend in &config.backends {
        match open(*backend, config, mode, max_bans)
            .and_then(|enforcer| set_up(enforcer, allow, &mut intent))
        {
            Ok(enforcer) => {
                info!("{} is at work on {}", enforcer.backend(), enforcer.place());
                remove_others(enforcer.backend(), config);
                let sockets = sockets(enforcer.backend(), config, mode, allow);
                return Ok(Chosen {
                    enforcer,
                    refused,
                    intent,
                    sockets,
                });
            }
            Err(error) => {
                let reason = format!("{backend}: {error:#}");
                warn!("{reason}");
                refused.push(reason);
            }
        }
    }
    Err(anyhow!("no back end works:\n{}", refused.join("\n")))
}

fn open(
    backend: Backend,
    config: &config::Enforce,
    mode: Mode,
    max_bans: u32,
) -> Result<Box<dyn Enforcer>> {
    let xdp = |flavour| -> Result<Box<dyn Enforcer>> {
        let interfaces = match config.interfaces.as_slice() {
            [] => vec![crate::host::default_interface()?],
            named => named.to_vec(),
        };
        let options = xdp::Options {
            interfaces,
            pin_dir: config.pin_dir.clone(),
            max_bans,
            sample_one_in: config.sample_one_in,
        };
        Ok(Box::new(xdp::Xdp::open(&options, flavour, mode)?))
    };
    match backend {
        Backend::XdpNative => xdp(xdp::Flavour::Native),
        Backend::XdpGeneric => xdp(xdp::Flavour::Generic),
        Backend::Iptables => Ok(Box::new(iptables::Iptables::open(mode, max_bans)?)),
        Backend::DryRun => Ok(Box::new(dry_run::DryRun::default())),
    }
}

fn set_up(
    mut enforcer: Box<dyn Enforcer>,
    allow: &[IpNet],
    intent: &mut Intent,
) -> Result<Box<dyn Enforcer>> {
    enforcer
        .set_allowlist(allow)
        .context("the allowlist cannot be put in force")?;
    // A ban that does not fit is said and tried again; the others are worth a start. Nothing at all is not.
    let (drift, repaired) = reconcile(enforcer.as_mut(), intent)?;
    let none = repaired.is_empty() && drift.missing == intent.len() as u64;
    if drift.failed > 0 && none && !intent.is_empty() {
        return Err(anyhow!("no ban of the ledger can be put in force"));
    }
    enforcer.activate()?;
    Ok(enforcer)
}

/// In observe mode nothing happens to anybody, so nothing to connections either.
fn sockets(
    backend: Backend,
    config: &config::Enforce,
    mode: Mode,
    allow: &[IpNet],
) -> Option<Sockets> {
    if !config.end_connections || mode == Mode::Observe || backend == Backend::DryRun {
        return None;
    }
    match Sockets::open() {
        Ok(mut sockets) => {
            sockets.set_allowlist(allow);
            Some(sockets)
        }
        Err(problem) => {
            warn!("connections of banned sources stay until they time out: {problem:#}");
            None
        }
    }
}

/// What another back end has left in the kernel would go on dropping, and no unban would reach it.
fn remove_others(chosen: Backend, config: &config::Enforce) {
    let removed = match chosen {
        Backend::XdpNative | Backend::XdpGeneric => iptables::remove_leftovers(),
        Backend::Iptables => xdp::remove_leftovers(&config.pin_dir),
        Backend::DryRun => return,
    };
    match removed {
        Ok(true) => info!("what an earlier run had left with another back end is taken out"),
        Ok(false) => {}
        Err(problem) => warn!(
            "what an earlier run may have left with another back end is still there: {problem:#}"
        ),
    }
}

/// What an earlier run has left in the kernel, whichever back end has put it there. Changes nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Left {
    /// Bans, those past their time included.
    pub bans: Vec<Entry>,
    /// The allowlist: what was configured, what the host needs, and what operators had added. The kernel cannot tell one
    /// from the other.
    pub allow: Vec<IpNet>,
    /// What happened to packets of banned sources, where that can be told.
    pub mode: Option<Mode>,
    /// What could not be read.
    pub problems: Vec<String>,
}

/// Looks at what there is: in the maps that are pinned, and in the ipsets.
#[must_use]
pub fn left(config: &config::Enforce) -> Left {
    let mut all = Left::default();
    for left in [xdp::left(&config.pin_dir), iptables::left()] {
        match left {
            Ok(left) => {
                all.bans.extend(left.bans);
                all.allow.extend(left.allow);
                all.mode = all.mode.or(left.mode);
            }
            Err(problem) => all.problems.push(format!("{problem:#}")),
        }
    }
    all
}

/// Takes everything of ours out of the kernel, whichever back end has put it there; says what there was.
///
/// # Errors
/// When something cannot be taken out.
pub fn remove_all(config: &config::Enforce) -> Result<Vec<String>> {
    let mut removed = Vec::new();
    if xdp::remove_leftovers(&config.pin_dir)? {
        removed.push(format!(
            "XDP links and maps under {}",
            config.pin_dir.display()
        ));
    }
    if iptables::remove_leftovers()? {
        removed.push("the iptables chain and its sets".to_owned());
    }
    Ok(removed)
}
