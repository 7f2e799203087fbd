//! Bans in a file that Nginx includes, for sources whose packets come from a trusted proxy: the network card cannot tell
//! them from others. One thread writes the file, has Nginx test and read it, and sees that it stays; nobody waits for it.
//!
//! Nginx refuses all of a network, so banned networks are written without the parts that are on the allowlist.
//!
//! A reload makes Nginx start new workers, so changes are gathered and reloads kept apart. What Nginx does not take is
//! undone and tried again.

mod command;
mod holes;
mod include;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use ipnet::IpNet;
use portcullis_engine::{Ban, Outcome, Subject};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::Sender;
use tracing::{error, info, warn};

use self::{holes::Holes, include::Include};
use crate::runtime::clock;

/// The file is looked at so often, and what has failed is tried again.
const EVERY: Duration = if cfg!(test) {
    Duration::from_millis(100)
} else {
    Duration::from_secs(30)
};

/// How a ban is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// `deny 203.0.113.7;`, for `http`, `server` or `location`. Nginx goes through them one by one for each request, but for
    /// those that a `return` or `rewrite` answers before.
    Deny,
    /// `203.0.113.7 1;`, for a `geo` block, which finds any of many at once. It includes no wildcards, only full names.
    Geo,
}

/// Where bans are written and how Nginx is told.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The file that Nginx includes. Nobody else writes it.
    pub include: PathBuf,
    /// How a ban is written in it.
    pub form: Form,
    /// The command, with its arguments, that fails if Nginx would not take its configuration.
    pub test: Vec<String>,
    /// The command that makes Nginx read its configuration.
    pub reload: Vec<String>,
    /// From one attempt to have it read to the next. Nginx reads some time after the command that says so has ended; what is
    /// tried next should not be what it finds then, so some seconds.
    pub min_interval: Duration,
    /// A command that takes longer is killed.
    pub timeout: Duration,
}

impl Settings {
    /// As Nginx usually is.
    #[must_use]
    pub fn new(include: PathBuf, form: Form) -> Self {
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        Self {
            include,
            form,
            test: words(&["nginx", "-t"]),
            reload: words(&["nginx", "-s", "reload"]),
            min_interval: Duration::from_secs(5),
            timeout: Duration::from_secs(10),
        }
    }

    /// Has Nginx test its configuration.
    ///
    /// # Errors
    /// When it would not take it, or does not answer in time: with the last that it has said.
    pub fn test(&self) -> Result<()> {
        command::run(&self.test, self.timeout)
    }

    /// Never with a configuration that does not pass the test: Nginx would log that and go on, and nobody would know.
    fn test_and_reload(&self) -> Result<()> {
        self.test()?;
        command::run(&self.reload, self.timeout)
    }
}

/// How bans by way of Nginx do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Bans that Nginx has read.
    pub entries: usize,
    /// Subjects whose newest change it has not.
    pub pending: usize,
    /// Times that it has read the file.
    pub reloads: u64,
    /// Times that somebody else had changed the file.
    pub drift: u64,
    /// Changes that were overtaken by a newer one of the same subject, and are on no record.
    pub overtaken: u64,
    /// Why the newest attempt failed, until one succeeds.
    pub error: Option<String>,
}

/// Bans by way of Nginx, as the runtime sees them.
#[derive(Debug)]
pub struct Nginx {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    /// Whoever drops this waits no longer.
    patience: Duration,
}

impl Nginx {
    /// Makes these the bans of the file, without those who are allowed, and starts the thread that does. What becomes of
    /// changes goes to `outcomes`.
    ///
    /// Runs no command: the thread has Nginx read the file if it was another one.
    ///
    /// # Errors
    /// One sentence with the remedy, when the file cannot be written or is somebody else's.
    pub fn start(
        settings: Settings,
        in_force: impl IntoIterator<Item = Subject>,
        allowed: impl IntoIterator<Item = IpNet>,
        outcomes: Sender<Outcome>,
    ) -> Result<Self> {
        for command in [&settings.test, &settings.reload] {
            ensure!(
                !command.is_empty(),
                "the commands that test and reload Nginx cannot be empty"
            );
        }
        let include = Include::new(&settings.include, settings.form)?;
        let (said, is_unread) = include.open()?;
        let patience = 4 * settings.timeout + Duration::from_secs(5);
        let shared = Arc::new(Shared::default());
        let hands = Hands {
            settings,
            include,
            wanted: in_force.into_iter().collect(),
            holes: allowed.into_iter().collect(),
            said,
            is_unread,
            owed: Owed::default(),
            not_before: Duration::ZERO,
            outcomes,
            shared: Arc::clone(&shared),
        };
        let thread = std::thread::Builder::new()
            .name("nginx".to_owned())
            .spawn(move || hands.work())
            .context("cannot start the thread that writes Nginx's include")?;
        Ok(Self {
            shared,
            thread: Some(thread),
            patience,
        })
    }

    /// Has a ban written. One that is only observed keeps nobody out, so it has no line.
    pub fn ban(&self, ban: Ban) {
        self.change(Change::Ban(ban));
    }

    /// Has a ban taken out, for this reason.
    pub fn unban(&self, ban: Ban, cause: String) {
        self.change(Change::Unban(ban, cause));
    }

    /// Has these left out of every ban, and nobody else. Nginx knows soon; nobody is told when.
    pub fn allow(&self, allowed: impl IntoIterator<Item = IpNet>) {
        let holes = allowed.into_iter().collect();
        self.shared.desk().holes = Some(holes);
        self.shared.woken.notify_all();
    }

    fn change(&self, change: Change) {
        let mut desk = self.shared.desk();
        let overtaken = desk.changes.add(change);
        desk.status.overtaken += overtaken;
        drop(desk);
        self.shared.woken.notify_all();
    }

    /// How it does.
    #[must_use]
    pub fn status(&self) -> Status {
        let desk = self.shared.desk();
        let mut status = desk.status.clone();
        status.pending += desk.changes.0.len();
        status
    }

    /// Is the thread still there? It ends by itself only by a bug.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.thread
            .as_ref()
            .is_some_and(|thread| !thread.is_finished())
    }

    /// No more changes: the thread tries once what it has not tried yet, and ends. Does not wait for it. What stands in the
    /// file stays.
    pub fn close(&mut self) {
        self.shared.desk().is_closed = true;
        self.shared.woken.notify_all();
    }
}

impl Drop for Nginx {
    /// Waits for the thread's end, but not for ever.
    fn drop(&mut self) {
        self.close();
        let desk = self.shared.desk();
        let waited = self
            .shared
            .woken
            .wait_timeout_while(desk, self.patience, |desk| !desk.is_left);
        let is_left = waited.unwrap_or_else(PoisonError::into_inner).0.is_left;
        match self.thread.take() {
            Some(thread) if is_left => {
                if thread.join().is_err() {
                    error!("the thread that writes Nginx's include has panicked");
                }
            }
            _ => error!("the thread that writes Nginx's include hangs and is left behind"),
        }
    }
}

/// Is the file there? Changes nothing.
///
/// # Errors
/// When it cannot be read, or is somebody else's.
pub fn is_there(settings: &Settings) -> Result<bool> {
    let include = Include::new(&settings.include, settings.form)?;
    let there = include.read()?;
    if let Some(content) = &there {
        include.claim(content)?;
    }
    Ok(there.is_some())
}

/// Whom the file that an earlier run has left bans: of a network with allowed parts, the networks that were left of it. They
/// keep out whom that one did, so they can stand for it; each is lifted by itself. Changes nothing.
///
/// # Errors
/// When it cannot be read, or is somebody else's.
pub fn left(settings: &Settings) -> Result<BTreeSet<Subject>> {
    let include = Include::new(&settings.include, settings.form)?;
    let content = include.read()?.unwrap_or_default();
    include.claim(&content)?;
    Ok(include::banned(&content).unwrap_or_default())
}

/// Takes every ban out of the file, and has Nginx read it. Says whether there was anything. Not while an agent writes it.
///
/// # Errors
/// When the file cannot be written or is somebody else's; or when Nginx could not be told: the bans are out of the file all
/// the same, and the next call tells Nginx.
pub fn clear(settings: &Settings) -> Result<bool> {
    let include = Include::new(&settings.include, settings.form)?;
    let content = include.read()?.unwrap_or_default();
    include.claim(&content)?;
    if !include::has_lines(&content) && !include.is_on_trial() {
        return Ok(false);
    }
    // There is nothing to go back to. What makes it a trial is that a call that fails leaves a trace of it.
    let empty = include.text(&BTreeSet::new());
    include.try_out(&empty, &empty)?;
    settings.test_and_reload().with_context(|| {
        format!(
            "{} holds no bans any more, but Nginx has not read it",
            settings.include.display()
        )
    })?;
    include.keep()?;
    Ok(true)
}

/// What both sides see.
#[derive(Debug, Default)]
struct Shared {
    desk: Mutex<Desk>,
    /// Something has come to the desk, or the thread has left it.
    woken: Condvar,
}

impl Shared {
    /// Never held for long.
    fn desk(&self) -> MutexGuard<'_, Desk> {
        // Nothing that is done while it is held can panic halfway.
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug, Default)]
struct Desk {
    /// Not taken by the thread yet.
    changes: Owed,
    /// The newest allowlist; likewise.
    holes: Option<Holes>,
    /// But for what is pending here.
    status: Status,
    is_closed: bool,
    /// The thread has ended.
    is_left: bool,
}

impl Desk {
    fn is_clear(&self) -> bool {
        self.changes.0.is_empty() && self.holes.is_none()
    }
}

/// A change whose outcome is told.
#[derive(Clone, Debug, PartialEq)]
enum Change {
    Ban(Ban),
    Unban(Ban, String),
}

impl Change {
    fn outcome(self, result: Result<(), String>) -> Outcome {
        match self {
            Self::Ban(ban) => Outcome::Banned(ban, result),
            Self::Unban(ban, cause) => Outcome::Unbanned(ban, cause, result),
        }
    }

    const fn ban(&self) -> &Ban {
        let (Self::Ban(ban) | Self::Unban(ban, _)) = self;
        ban
    }

    const fn is_ban(&self) -> bool {
        matches!(self, Self::Ban(_))
    }
}

/// Changes whose success is still to be told, in the order in which they came for a subject. Of each subject at most the
/// newest ban and the newest release: so many that each operator is answered, and no more than the ledger's bound allows.
#[derive(Debug, Default)]
struct Owed(BTreeMap<Subject, Vec<Debt>>);

#[derive(Debug)]
struct Debt {
    change: Change,
    /// Its failure has been told, once.
    has_failed: bool,
}

impl Owed {
    /// Adds the newest change of a subject; returns how many it overtakes that will never have had an outcome.
    fn add(&mut self, change: Change) -> u64 {
        let debts = self.0.entry(change.ban().subject).or_default();
        let is_overtaken = |debt: &mut Debt| {
            // Whoever has had an answer needs no other once the wish is another one.
            debt.has_failed || debt.change.is_ban() == change.is_ban()
        };
        let overtaken = debts.extract_if(.., is_overtaken);
        let unanswered = overtaken.filter(|debt| !debt.has_failed).count() as u64;
        debts.push(Debt {
            change,
            has_failed: false,
        });
        unanswered
    }
}

/// The thread's side.
struct Hands {
    settings: Settings,
    include: Include,
    /// Whom the ledger has banned, as far as is known here.
    wanted: BTreeSet<Subject>,
    /// Who is not to be refused for that.
    holes: Holes,
    /// What the file said when it was last left.
    said: Vec<u8>,
    /// Nginx may have read something else than what the file said then.
    is_unread: bool,
    owed: Owed,
    /// The next attempt, on the boot clock.
    not_before: Duration,
    outcomes: Sender<Outcome>,
    shared: Arc<Shared>,
}

impl Hands {
    fn work(mut self) {
        self.begin();
        loop {
            let is_last = self.wait();
            if !(is_last && self.shared.desk().is_clear()) {
                self.round();
            }
            if is_last {
                return;
            }
        }
    }

    /// The file as an earlier run has left it becomes what the ledger says.
    fn begin(&mut self) {
        let lines = self.holes.cut(&self.wanted);
        match include::banned(&self.said) {
            Some(banned) if banned != lines => info!(
                "{} names {} networks, and is to name {}",
                self.settings.include.display(),
                banned.len(),
                lines.len()
            ),
            None if include::has_lines(&self.said) => self.note_drift(),
            _ => {}
        }
        if self.said != self.include.text(&lines) || self.is_unread {
            self.round();
            return;
        }
        self.shared.desk().status.entries = self.wanted.len();
        if let Err(problem) = self.settings.test() {
            warn!(
                "Nginx would not take its configuration as it is, so it will take no ban: {problem:#}"
            );
        }
    }

    /// Until there is something to do; says whether it is the last.
    fn wait(&self) -> bool {
        let check = clock::boot() + EVERY;
        let mut desk = self.shared.desk();
        while !desk.is_closed {
            let due = if desk.is_clear() {
                check.max(self.not_before)
            } else {
                self.not_before
            };
            let left = due.saturating_sub(clock::boot());
            if left.is_zero() {
                break;
            }
            let woken = self.shared.woken.wait_timeout(desk, left);
            desk = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        desk.is_closed
    }

    /// Makes true whatever is wanted by now, together, and tells those who wait for it.
    fn round(&mut self) {
        self.take();
        match self.converge() {
            Ok(()) => self.succeed(),
            Err(problem) => self.fail(&format!("{problem:#}")),
        }
    }

    fn take(&mut self) {
        let mut desk = self.shared.desk();
        if let Some(holes) = desk.holes.take() {
            self.holes = holes;
        }
        let changes = std::mem::take(&mut desk.changes);
        for debt in changes.0.into_values().flatten() {
            let subject = debt.change.ban().subject;
            if debt.change.is_ban() && !debt.change.ban().observe {
                self.wanted.insert(subject);
            } else {
                self.wanted.remove(&subject);
            }
            desk.status.overtaken += self.owed.add(debt.change);
        }
        desk.status.pending = self.owed.0.len();
    }

    /// Makes the file say what is wanted, and Nginx read it, if that is not so already.
    fn converge(&mut self) -> Result<()> {
        let content = self.include.text(&self.holes.cut(&self.wanted));
        if self.include.read()?.as_ref() != Some(&self.said) {
            self.note_drift();
        }
        if content == self.said && !self.is_unread {
            return Ok(());
        }
        let result = self.have_read(&content);
        self.not_before = clock::boot() + self.settings.min_interval;
        result
    }

    /// Makes the file say this, and Nginx read it; or leaves both as they were.
    fn have_read(&mut self, content: &[u8]) -> Result<()> {
        // Until it has: a reload that failed may have been one all the same.
        self.is_unread = true;
        let taken = self
            .include
            .try_out(content, &self.said)
            .and_then(|()| self.settings.test_and_reload());
        if let Err(problem) = taken {
            return Err(match self.include.undo() {
                Ok(_) => problem,
                Err(worse) => anyhow!("{problem:#}; {worse:#}"),
            });
        }
        content.clone_into(&mut self.said);
        self.is_unread = false;
        self.shared.desk().status.reloads += 1;
        if let Err(problem) = self.include.keep() {
            warn!("the next start will reload Nginx without need: {problem:#}");
        }
        Ok(())
    }

    fn note_drift(&mut self) {
        warn!(
            "{} was changed by somebody else and is written again",
            self.settings.include.display()
        );
        self.shared.desk().status.drift += 1;
        // What is not as it was left may have been read.
        self.is_unread = true;
    }

    fn succeed(&mut self) {
        let owed = std::mem::take(&mut self.owed);
        let mut desk = self.shared.desk();
        desk.status.entries = self.wanted.len();
        desk.status.pending = 0;
        let error = desk.status.error.take();
        drop(desk);
        if error.is_some() {
            info!("Nginx takes bans again");
        }
        for debt in owed.0.into_values().flatten() {
            self.tell(debt.change.outcome(Ok(())));
        }
    }

    fn fail(&mut self, problem: &str) {
        let before = self.shared.desk().status.error.replace(problem.to_owned());
        // It comes back with every try; once is enough in the log.
        if before.as_deref() != Some(problem) {
            error!("Nginx does not take the bans of the ledger: {problem}");
        }
        let debts = self.owed.0.values_mut().flatten();
        let untold: Vec<Change> = debts
            .filter_map(|debt| {
                let is_told = std::mem::replace(&mut debt.has_failed, true);
                (!is_told).then(|| debt.change.clone())
            })
            .collect();
        for change in untold {
            self.tell(change.outcome(Err(problem.to_owned())));
        }
    }

    fn tell(&self, outcome: Outcome) {
        // The runtime drains the outcomes until the end; without it nobody is there to be told.
        drop(self.outcomes.blocking_send(outcome));
    }
}

impl Drop for Hands {
    /// By a panic too.
    fn drop(&mut self) {
        self.shared.desk().is_left = true;
        self.shared.woken.notify_all();
    }
}

#[cfg(test)]
mod tests;
