//! The thread that owns the back end, and knows what is to be in force. The runtime hands it work and never waits for it.
//!
//! Changes that find the queue full are kept aside, the newest of each subject (so as many as the ledger has), and handed
//! over later. A comparison or a repair is not queued while one is waiting. What goes through all bans goes in steps, with
//! changes between them; comparisons take a hundredth of a processor at most, and with so many bans that they have to be rarer for that,
//! a few bans are looked at in between.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, SyncSender, TryRecvError, TrySendError},
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context as _, Result};
use ipnet::IpNet;
use portcullis_engine::{Ban, Outcome, Subject};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc as queue, oneshot};
use tracing::{error, warn};

use super::{
    Backend, Change, Chosen, Counters, Cursor, Drift, Enforcer, Entry, Intent, Lifetime,
    sockets::Sockets,
};
use crate::runtime::clock;

/// Work that may wait.
const QUEUE: usize = 65_536;
/// Changes that are handed to the back end at a time.
const BATCH: usize = 1024;
/// Comparisons are so many times as far apart as they take of a processor.
const PACE: u32 = 100;
/// One that takes less is made whenever it is asked for.
const SHORT: Duration = Duration::from_millis(10);
/// Bans that are looked at when it is too soon for a comparison: of a loss of one in a hundred the chance to be missed is
/// 0.99^512, less than one in a hundred.
const PROBES: usize = 512;

/// One piece of work. Lifetimes count from `made`, on the boot clock: a job may wait.
#[derive(Debug)]
pub enum Job {
    /// Put a ban in force.
    Ban {
        /// The ban. Boxed, as all of the queue's room is taken up from the start.
        ban: Box<Ban>,
        /// How long it is to last.
        lifetime: Lifetime,
        /// When that was said.
        made: Duration,
        /// When the line behind it was read, on the boot clock; none for an operator's ban.
        read: Option<Duration>,
    },
    /// Take a ban away, for this reason.
    Unban(Box<Ban>, String),
    /// Compare the kernel's bans with what is to be in force.
    Reconcile,
    /// See that the back end is still in the packets' way.
    Repair,
    /// Read every ban that the kernel has.
    Entries(oneshot::Sender<Result<Vec<Entry>>>),
    /// Read the entries of some.
    Look(Vec<Subject>, oneshot::Sender<Result<Vec<Entry>>>),
    /// Replace the allowlist.
    Allow(Vec<IpNet>, oneshot::Sender<Result<()>>),
    /// Read the totals of packets.
    Counters(oneshot::Sender<Result<Counters>>),
}

/// From a line being read to its ban being in force, over the newest so many bans. Milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    /// Bans that it is over.
    pub bans: usize,
    /// Half of them were in force sooner.
    pub median_ms: f64,
    /// 99 % of them were in force sooner.
    pub p99_ms: f64,
    /// The slowest.
    pub max_ms: f64,
}

/// How the back end does.
#[derive(Clone, Debug, Default)]
pub struct Health {
    latencies: Vec<Duration>,
    next: usize,
    /// Sum of what had to be repaired.
    pub drift: Drift,
    /// Connections of banned sources that were ended.
    pub ended_connections: u64,
    /// Why the newest change failed, until one succeeds.
    change_error: Option<String>,
    /// Why the newest comparison failed, until one succeeds.
    reconcile_error: Option<String>,
    /// Why the newest repair failed, until one succeeds.
    repair_error: Option<String>,
}

/// Latencies that are kept.
const LATENCIES: usize = 1024;

impl Health {
    fn note_latency(&mut self, latency: Duration) {
        if self.latencies.len() < LATENCIES {
            self.latencies.push(latency);
        } else {
            self.latencies[self.next] = latency;
        }
        self.next = (self.next + 1) % LATENCIES;
    }

    /// What is wrong now.
    #[must_use]
    pub fn error(&self) -> Option<&str> {
        let errors = [
            &self.repair_error,
            &self.reconcile_error,
            &self.change_error,
        ];
        errors.into_iter().flatten().map(String::as_str).next()
    }

    /// Over the newest bans.
    #[must_use]
    pub fn latency(&self) -> Latency {
        let mut sorted = self.latencies.clone();
        sorted.sort_unstable();
        let at = |share: f64| {
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "an index into a short list"
            )]
            let index = (share * sorted.len().saturating_sub(1) as f64).round() as usize;
            sorted
                .get(index)
                .map_or(0.0, |latency| latency.as_secs_f64() * 1000.0)
        };
        Latency {
            bans: sorted.len(),
            median_ms: at(0.5),
            p99_ms: at(0.99),
            max_ms: at(1.0),
        }
    }
}

/// The worker, as the runtime sees it.
#[derive(Debug)]
pub struct Worker {
    jobs: Option<SyncSender<Job>>,
    thread: Option<JoinHandle<()>>,
    shared: Arc<Shared>,
    /// Changes that found the queue full: the newest of each subject.
    aside: BTreeMap<Subject, Job>,
    /// Changes that were overtaken by a newer one of the same subject while they were aside; they are on no record.
    overtaken: u64,
    /// The newest allowlist, if it found the queue full.
    allow_aside: Option<Job>,
    /// Which back end it is.
    pub backend: Backend,
    /// Where that is at work.
    pub place: String,
    /// Why those before it are not.
    pub refused: Vec<String>,
}

/// What both sides see.
#[derive(Debug, Default)]
struct Shared {
    health: Mutex<Health>,
    reconcile_waits: AtomicBool,
    repair_waits: AtomicBool,
}

impl Shared {
    fn health(&self) -> MutexGuard<'_, Health> {
        // A panic while it was held has left figures all the same.
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Worker {
    /// Starts the thread. What becomes of bans goes to `outcomes`.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(chosen: Chosen, outcomes: queue::Sender<Outcome>) -> Result<Self> {
        let Chosen {
            enforcer,
            refused,
            intent,
            sockets,
        } = chosen;
        let (jobs, queue) = mpsc::sync_channel(QUEUE);
        let shared = Arc::new(Shared::default());
        let (backend, place) = (enforcer.backend(), enforcer.place());
        let hands = Hands {
            enforcer,
            intent,
            sockets,
            outcomes,
            shared: Arc::clone(&shared),
            owed: BTreeMap::new(),
            drift: Drift::default(),
            failed: BTreeSet::new(),
            spent: Duration::ZERO,
            next: Duration::ZERO,
            listings: VecDeque::new(),
        };
        let thread = std::thread::Builder::new()
            .name("enforce".to_owned())
            .spawn(move || hands.work(&queue))
            .context("cannot start the thread of the back end")?;
        Ok(Self {
            jobs: Some(jobs),
            thread: Some(thread),
            shared,
            aside: BTreeMap::new(),
            overtaken: 0,
            allow_aside: None,
            backend,
            place,
            refused,
        })
    }

    /// Hands over a change.
    pub fn change(&mut self, job: Job) {
        let subject = match &job {
            Job::Ban { ban, .. } | Job::Unban(ban, _) => ban.subject,
            _ => return,
        };
        // In order: nothing overtakes what is aside.
        let job = if self.aside.is_empty() {
            self.hand(job)
        } else {
            Some(job)
        };
        let Some(job) = job else { return };
        if self.aside.is_empty() {
            warn!("the back end does not keep up: changes are kept aside until it does");
        }
        if self.aside.insert(subject, job).is_some() {
            self.overtaken += 1;
        }
    }

    /// Hands over what is aside, as far as there is room. To be called now and then.
    pub fn catch_up(&mut self) {
        if let Some(job) = self.allow_aside.take()
            && let Some(job) = self.hand(job)
        {
            self.allow_aside = Some(job);
            return;
        }
        while let Some((subject, job)) = self.aside.pop_first() {
            if let Some(job) = self.hand(job) {
                self.aside.insert(subject, job);
                return;
            }
        }
    }

    /// Replaces the allowlist, soon: where there is no room for that now the newest one waits, and whoever waits for the answer.
    pub fn allow(&mut self, allow: Vec<IpNet>, reply: oneshot::Sender<Result<()>>) {
        self.allow_aside = self.hand(Job::Allow(allow, reply));
    }

    /// Has a comparison made, unless one is waiting or under way.
    pub fn reconcile(&mut self) {
        if !self.shared.reconcile_waits.swap(true, Ordering::AcqRel)
            && self.hand(Job::Reconcile).is_some()
        {
            self.shared.reconcile_waits.store(false, Ordering::Release);
        }
    }

    /// Has the back end's place in the packets' way seen to, unless that is waiting.
    pub fn repair(&mut self) {
        if !self.shared.repair_waits.swap(true, Ordering::AcqRel)
            && self.hand(Job::Repair).is_some()
        {
            self.shared.repair_waits.store(false, Ordering::Release);
        }
    }

    /// Asks something; where there is no room, whoever waits for the answer sees its sender dropped.
    pub fn ask(&mut self, job: Job) {
        drop(self.hand(job));
    }

    /// The job back, if there is no room for it.
    fn hand(&self, job: Job) -> Option<Job> {
        match self.jobs.as_ref()?.try_send(job) {
            Ok(()) => None,
            Err(TrySendError::Full(job) | TrySendError::Disconnected(job)) => Some(job),
        }
    }

    /// No more work: the thread does what waits, and ends.
    pub fn close(&mut self) {
        self.catch_up();
        self.jobs = None;
    }

    /// Changes that are aside.
    #[must_use]
    pub fn aside(&self) -> usize {
        self.aside.len()
    }

    /// Changes that are on no record.
    #[must_use]
    pub const fn overtaken(&self) -> u64 {
        self.overtaken
    }

    /// Is the thread still there? It ends by itself only by a bug.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.thread
            .as_ref()
            .is_some_and(|thread| !thread.is_finished())
    }

    /// How it does.
    #[must_use]
    pub fn health(&self) -> Health {
        self.shared.health().clone()
    }
}

impl Drop for Worker {
    /// Ends the thread once its queue is empty. What is pinned in the kernel stays.
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            error!("the thread of the back end has panicked");
        }
    }
}

/// A change whose outcome is told.
enum Told {
    Banned { ban: Ban, read: Option<Duration> },
    Unbanned(Ban, String),
}

/// The thread's side.
struct Hands {
    enforcer: Box<dyn Enforcer>,
    intent: Intent,
    sockets: Option<Sockets>,
    outcomes: queue::Sender<Outcome>,
    shared: Arc<Shared>,
    /// Bans that could not be put in force, until a comparison has done it or they are lifted.
    owed: BTreeMap<Subject, Ban>,
    /// What the comparison that is under way has found so far, and whose bans could not be put in force since it began.
    drift: Drift,
    failed: BTreeSet<Subject>,
    /// How long it has had a processor, and when the next one may begin, on the boot clock.
    spent: Duration,
    next: Duration,
    /// Those who want to see all bans; as many as there are connections, which are bounded.
    listings: VecDeque<Listing>,
}

/// Bans that somebody wants to see, as far as they are read.
struct Listing {
    entries: Vec<Entry>,
    next: Cursor,
    reply: oneshot::Sender<Result<Vec<Entry>>>,
}

impl Hands {
    /// Jobs as they come, and a step of what takes long after each, and as long as there are none.
    fn work(mut self, jobs: &mpsc::Receiver<Job>) {
        loop {
            let job = if self.intent.is_comparing() || !self.listings.is_empty() {
                match jobs.try_recv() {
                    Ok(job) => Some(job),
                    Err(TryRecvError::Empty) => None,
                    Err(TryRecvError::Disconnected) => return,
                }
            } else {
                match jobs.recv() {
                    Ok(job) => Some(job),
                    Err(_) => return,
                }
            };
            if let Some(job) = job.and_then(|job| self.apply(job, jobs)) {
                self.attend(job);
            }
            self.compare();
            self.list();
        }
    }

    /// Begins a comparison, if there is a reason to or the newest one was long enough ago.
    fn begin_comparison(&mut self) {
        let is_due = clock::boot() >= self.next || !self.owed.is_empty();
        // What cannot be looked at is for the comparison to say.
        let mut looks_right = || self.intent.looks_right(self.enforcer.as_mut(), PROBES);
        if is_due || !looks_right().unwrap_or(false) {
            self.failed.clear();
            self.spent = Duration::ZERO;
            self.intent.compare();
        } else {
            self.shared.reconcile_waits.store(false, Ordering::Release);
        }
    }

    /// A step of the comparison that is under way.
    fn compare(&mut self) {
        if !self.intent.is_comparing() {
            return;
        }
        let began = clock::of_thread();
        let step = self.intent.step(self.enforcer.as_mut());
        self.spent += clock::of_thread().saturating_sub(began);
        let found = match step {
            Ok(step) => {
                self.drift += step.drift;
                self.failed.extend(step.failed);
                self.end_connections(&step.repaired);
                if !step.is_last {
                    return;
                }
                let spent = std::mem::take(&mut self.spent);
                let pause = if spent < SHORT {
                    Duration::ZERO
                } else {
                    spent * PACE
                };
                self.next = clock::boot() + pause;
                self.settle();
                Ok(std::mem::take(&mut self.drift))
            }
            Err(problem) => {
                // What was repaired before was drift all the same.
                self.shared.health().drift += std::mem::take(&mut self.drift);
                Err(problem)
            }
        };
        note(&mut self.shared.health(), found, |health| {
            &mut health.reconcile_error
        });
        self.shared.reconcile_waits.store(false, Ordering::Release);
    }

    /// After a comparison every ban is in force but those that have failed since it began.
    fn settle(&mut self) {
        let failed = std::mem::take(&mut self.failed);
        let in_force: Vec<Ban> = self
            .owed
            .extract_if(.., |subject, _| !failed.contains(subject))
            .map(|(_, ban)| ban)
            .collect();
        for ban in in_force {
            // It may have been entered at the first try although that was said to have failed.
            if !ban.observe {
                self.end_connections(&[Change::Ban(ban.subject, Lifetime::Permanent)]);
            }
            self.tell(Outcome::Banned(ban, Ok(())));
        }
    }

    /// A step for whoever wants to see all bans, and has not gone away meanwhile.
    fn list(&mut self) {
        let Some(mut listing) = self.listings.pop_front() else {
            return;
        };
        if listing.reply.is_closed() {
            return;
        }
        match self.enforcer.entries_from(listing.next) {
            Ok((mut entries, next)) => {
                listing.entries.append(&mut entries);
                match next {
                    Some(next) => {
                        listing.next = next;
                        self.listings.push_front(listing);
                    }
                    None => drop(listing.reply.send(Ok(listing.entries))),
                }
            }
            Err(problem) => drop(listing.reply.send(Err(problem))),
        }
    }

    /// Applies as many changes as wait already, together; returns the first job that is none.
    fn apply(&mut self, first: Job, jobs: &mpsc::Receiver<Job>) -> Option<Job> {
        let (mut changes, mut told, mut other) = (Vec::new(), Vec::new(), None);
        let mut next = Some(first);
        while let Some(job) = next.take() {
            match job {
                Job::Ban {
                    ban,
                    lifetime,
                    made,
                    read,
                } => {
                    let lifetime = lifetime.after(made);
                    changes.push(if ban.observe {
                        Change::Observe(ban.subject, lifetime)
                    } else {
                        Change::Ban(ban.subject, lifetime)
                    });
                    told.push(Told::Banned { ban: *ban, read });
                }
                Job::Unban(ban, cause) => {
                    changes.push(Change::Unban(ban.subject));
                    told.push(Told::Unbanned(*ban, cause));
                }
                job => {
                    other = Some(job);
                    break;
                }
            }
            next = (changes.len() < BATCH)
                .then(|| jobs.try_recv().ok())
                .flatten();
        }
        if changes.is_empty() {
            return other;
        }
        let results = self.enforcer.apply(&changes);
        let now = clock::boot();
        // Whatever became of them: what failed is drift, and tried again.
        for change in &changes {
            self.intent.note(*change);
        }
        let in_force: Vec<Change> = changes
            .iter()
            .zip(&results)
            .filter(|(_, result)| result.is_ok())
            .map(|(change, _)| *change)
            .collect();
        for (told, result) in told.into_iter().zip(results) {
            let result = result.map_err(|problem| format!("{problem:#}"));
            let mut health = self.shared.health();
            health.change_error = result.as_ref().err().cloned();
            if let Told::Banned {
                read: Some(read), ..
            } = &told
                && result.is_ok()
            {
                health.note_latency(now.saturating_sub(*read));
            }
            drop(health);
            let outcome = match told {
                Told::Banned { ban, .. } => {
                    if result.is_err() {
                        self.failed.insert(ban.subject);
                        self.owed.insert(ban.subject, ban.clone());
                    } else {
                        self.owed.remove(&ban.subject);
                    }
                    Outcome::Banned(ban, result)
                }
                Told::Unbanned(ban, cause) => {
                    self.owed.remove(&ban.subject);
                    Outcome::Unbanned(ban, cause, result)
                }
            };
            self.tell(outcome);
        }
        self.end_connections(&in_force);
        other
    }

    /// What a banned source still holds open would bind Nginx's workers until it times out. Done last: no ban waits for
    /// it but the next batch.
    fn end_connections(&mut self, in_force: &[Change]) {
        let Some(sockets) = &mut self.sockets else {
            return;
        };
        let banned: Vec<Subject> = in_force
            .iter()
            .filter(|change| matches!(change, Change::Ban(..)))
            .map(|change| change.subject())
            .collect();
        if banned.is_empty() {
            return;
        }
        let wide = banned.iter().filter(|subject| !subject.is_client());
        let observed: Vec<Subject> = wide
            .flat_map(|subject| self.intent.observed_inside(*subject))
            .collect();
        sockets.set_observed(&observed);
        match sockets.destroy(&banned) {
            Ok(ended) => self.shared.health().ended_connections += ended as u64,
            Err(problem) => warn!("{problem:#}"),
        }
    }

    /// Does a job that is no change.
    fn attend(&mut self, job: Job) {
        match job {
            Job::Reconcile if !self.intent.is_comparing() => self.begin_comparison(),
            Job::Repair => {
                let found = self.enforcer.activate().map(|anew| Drift {
                    detached: anew.into(),
                    ..Drift::default()
                });
                note(&mut self.shared.health(), found, |health| {
                    &mut health.repair_error
                });
                self.shared.repair_waits.store(false, Ordering::Release);
            }
            // Whoever asked may have gone away: then nothing is read, and nobody is there to be told.
            Job::Entries(reply) => self.listings.push_back(Listing {
                entries: Vec::new(),
                next: Cursor::default(),
                reply,
            }),
            Job::Look(subjects, reply) if !reply.is_closed() => {
                drop(reply.send(self.enforcer.entries_of(&subjects)));
            }
            Job::Allow(allow, reply) => {
                if let Some(sockets) = &mut self.sockets {
                    sockets.set_allowlist(&allow);
                }
                drop(reply.send(self.enforcer.set_allowlist(&allow)));
            }
            Job::Counters(reply) if !reply.is_closed() => {
                drop(reply.send(self.enforcer.counters()));
            }
            Job::Ban { .. }
            | Job::Unban(..)
            | Job::Reconcile
            | Job::Look(..)
            | Job::Counters(_) => {}
        }
    }

    fn tell(&self, outcome: Outcome) {
        // The runtime drains the outcomes until the end; without it nobody is there to be told.
        drop(self.outcomes.blocking_send(outcome));
    }
}

/// What a comparison or repair has found.
fn note(
    health: &mut Health,
    found: Result<Drift>,
    error: impl Fn(&mut Health) -> &mut Option<String>,
) {
    match found {
        Ok(drift) => {
            health.drift += drift;
            *error(health) = (drift.failed > 0).then(|| {
                format!(
                    "{} differences between ledger and kernel cannot be mended",
                    drift.failed
                )
            });
            if !drift.is_none() {
                warn!("the kernel had drifted and was brought back: {drift}");
            }
        }
        Err(problem) => {
            let problem = format!("{problem:#}");
            // It comes back with every try; once is enough in the log.
            if error(health).as_ref() != Some(&problem) {
                error!("the kernel cannot be brought back to the ledger: {problem}");
            }
            *error(health) = Some(problem);
        }
    }
}

#[cfg(test)]
mod tests {
    use portcullis_engine::{Origin, Term, Timestamp};

    use std::sync::atomic::AtomicUsize;

    use super::*;
    use crate::enforce::{Mode, Page, dry_run::DryRun};

    /// A back end that stands still while the test holds the gate, and refuses one subject while told to, or says so.
    struct Gated {
        lies: bool,
        inner: DryRun,
        gate: Arc<Mutex<()>>,
        refuses: Arc<Mutex<Option<Subject>>>,
    }

    impl Enforcer for Gated {
        fn backend(&self) -> Backend {
            Backend::DryRun
        }

        fn place(&self) -> String {
            String::new()
        }

        fn set_mode(&mut self, _mode: Mode) -> Result<()> {
            Ok(())
        }

        fn set_allowlist(&mut self, _allow: &[IpNet]) -> Result<()> {
            Ok(())
        }

        fn apply(&mut self, changes: &[Change]) -> Vec<Result<()>> {
            drop(self.gate.lock().unwrap());
            let refused = *self.refuses.lock().unwrap();
            let apply = |change: &Change| match change {
                Change::Ban(subject, _) if Some(*subject) == refused => {
                    if self.lies {
                        self.inner.apply(&[*change]);
                    }
                    anyhow::bail!("no room")
                }
                change => self.inner.apply(&[*change]).remove(0),
            };
            changes.iter().map(apply).collect()
        }

        fn entries_from(&mut self, from: Cursor) -> Result<Page<Entry>> {
            self.inner.entries_from(from)
        }

        fn counters(&mut self) -> Result<Counters> {
            Ok(Vec::new())
        }

        fn activate(&mut self) -> Result<bool> {
            Ok(false)
        }

        fn detach(&mut self) -> Result<()> {
            Ok(())
        }
    }

    struct Bench {
        worker: Worker,
        outcomes: queue::Receiver<Outcome>,
        gate: Arc<Mutex<()>>,
        refuses: Arc<Mutex<Option<Subject>>>,
    }

    impl Bench {
        fn entries(&mut self) -> Vec<Entry> {
            let (reply, entries) = oneshot::channel();
            self.worker.ask(Job::Entries(reply));
            entries.blocking_recv().unwrap().unwrap()
        }
    }

    fn bench() -> Bench {
        bench_with(false)
    }

    fn bench_with(lies: bool) -> Bench {
        let (gate, refuses) = (Arc::default(), Arc::default());
        let enforcer = Box::new(Gated {
            lies,
            inner: DryRun::default(),
            gate: Arc::clone(&gate),
            refuses: Arc::clone(&refuses),
        });
        let (sender, outcomes) = queue::channel(4 * QUEUE);
        let chosen = Chosen {
            enforcer,
            refused: Vec::new(),
            intent: Intent::default(),
            sockets: None,
        };
        Bench {
            worker: Worker::start(chosen, sender).unwrap(),
            outcomes,
            gate,
            refuses,
        }
    }

    fn ban(n: u32) -> Job {
        let subject = Subject::of_client(std::net::Ipv4Addr::from(n).into());
        let since = Timestamp::from_secs(1);
        let ban = Ban::new(subject, since, Term::Permanent, Origin::Operator);
        Job::Ban {
            ban: Box::new(ban),
            lifetime: Lifetime::Permanent,
            made: clock::boot(),
            read: None,
        }
    }

    #[test]
    fn what_a_slow_back_end_has_no_room_for_is_done_later_and_told() {
        let mut bench = bench();
        let held = bench.gate.lock().unwrap();
        let all = u32::try_from(QUEUE).unwrap() + 5000;
        (0..all).for_each(|n| bench.worker.change(ban(n)));
        assert!(
            bench.worker.aside() >= 5000 - BATCH,
            "{}",
            bench.worker.aside()
        );
        // What is aside is not to be in force yet, so it is not missed.
        bench.worker.reconcile();
        drop(held);
        let mut told = 0;
        while told < all {
            bench.worker.catch_up();
            told += u32::from(bench.outcomes.blocking_recv().is_some());
        }
        assert_eq!((bench.worker.aside(), bench.worker.overtaken()), (0, 0));
        let entries = bench.entries();
        assert_eq!(entries.len(), all as usize);
        assert!(bench.worker.health().drift.is_none());
    }

    #[test]
    fn a_ban_that_failed_is_told_when_a_comparison_has_put_it_in_force() {
        let mut bench = bench();
        let subject = Subject::of_client(std::net::Ipv4Addr::from(7).into());
        *bench.refuses.lock().unwrap() = Some(subject);
        bench.worker.change(ban(7));
        let outcome = bench.outcomes.blocking_recv();
        assert!(
            matches!(outcome, Some(Outcome::Banned(_, Err(_)))),
            "{outcome:?}"
        );
        assert!(bench.worker.health().error().is_some());
        *bench.refuses.lock().unwrap() = None;
        bench.worker.reconcile();
        let outcome = bench.outcomes.blocking_recv();
        assert!(
            matches!(outcome, Some(Outcome::Banned(_, Ok(())))),
            "{outcome:?}"
        );
    }

    #[test]
    fn a_ban_that_is_in_force_although_it_was_said_to_have_failed_is_told() {
        let mut bench = bench_with(true);
        *bench.refuses.lock().unwrap() = Some(Subject::of_client([0, 0, 0, 7].into()));
        bench.worker.change(ban(7));
        let outcome = bench.outcomes.blocking_recv();
        assert!(
            matches!(outcome, Some(Outcome::Banned(_, Err(_)))),
            "{outcome:?}"
        );
        bench.worker.reconcile();
        let outcome = bench.outcomes.blocking_recv();
        assert!(
            matches!(outcome, Some(Outcome::Banned(_, Ok(())))),
            "{outcome:?}"
        );
    }

    /// A back end that takes a while to read, and that others have their hands in.
    #[derive(Clone, Default)]
    struct Slow {
        inner: Arc<Mutex<DryRun>>,
        reads: Arc<AtomicUsize>,
    }

    impl Enforcer for Slow {
        fn backend(&self) -> Backend {
            Backend::DryRun
        }

        fn place(&self) -> String {
            String::new()
        }

        fn set_mode(&mut self, _mode: Mode) -> Result<()> {
            Ok(())
        }

        fn set_allowlist(&mut self, _allow: &[IpNet]) -> Result<()> {
            Ok(())
        }

        fn apply(&mut self, changes: &[Change]) -> Vec<Result<()>> {
            self.inner.lock().unwrap().apply(changes)
        }

        fn entries_from(&mut self, from: Cursor) -> Result<Page<Entry>> {
            self.reads.fetch_add(1, Ordering::Relaxed);
            let began = clock::of_thread();
            while clock::of_thread().saturating_sub(began) <= SHORT {}
            self.inner.lock().unwrap().entries_from(from)
        }

        fn entries_of(&mut self, subjects: &[Subject]) -> Result<Vec<Entry>> {
            self.inner.lock().unwrap().entries_of(subjects)
        }

        fn looks_up(&self) -> bool {
            true
        }

        fn counters(&mut self) -> Result<Counters> {
            Ok(Vec::new())
        }

        fn activate(&mut self) -> Result<bool> {
            Ok(false)
        }

        fn detach(&mut self) -> Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_comparison_that_takes_long_is_made_rarely_unless_something_is_wrong() {
        let slow = Slow::default();
        let (sender, _outcomes) = queue::channel(QUEUE);
        let subjects = [7, 8].map(|n: u8| Subject::of_client([0, 0, 0, n].into()));
        let bans = subjects.map(|subject| Change::Ban(subject, Lifetime::Permanent));
        let mut hands = Hands {
            enforcer: Box::new(slow.clone()),
            intent: bans.into_iter().collect(),
            sockets: None,
            outcomes: sender,
            shared: Arc::default(),
            owed: BTreeMap::new(),
            drift: Drift::default(),
            failed: BTreeSet::new(),
            spent: Duration::ZERO,
            next: Duration::ZERO,
            listings: VecDeque::new(),
        };
        let mut reconcile = || {
            hands.attend(Job::Reconcile);
            while hands.intent.is_comparing() {
                hands.compare();
            }
            (
                slow.reads.load(Ordering::Relaxed),
                hands.shared.health().drift.missing,
            )
        };
        assert_eq!(reconcile(), (1, 2));
        for _ in 0..5 {
            assert_eq!(reconcile(), (1, 2), "it is too soon, and all is well");
        }
        slow.inner
            .lock()
            .unwrap()
            .apply(&[Change::Unban(subjects[1])]);
        assert_eq!(reconcile(), (2, 3));
        assert_eq!(reconcile(), (2, 3));
    }

    #[test]
    fn one_comparison_waits_at_a_time_and_the_end_does_what_waits() {
        let mut bench = bench();
        let held = bench.gate.lock().unwrap();
        bench.worker.change(ban(1));
        // Far more than there is room for, were each of them queued.
        for _ in 0..2 * QUEUE {
            bench.worker.reconcile();
            bench.worker.repair();
        }
        bench.worker.change(ban(2));
        assert_eq!(bench.worker.aside(), 0);
        drop(held);
        bench.worker.close();
        let outcomes: Vec<Outcome> =
            std::iter::from_fn(|| bench.outcomes.blocking_recv()).collect();
        assert_eq!(outcomes.len(), 2);
    }

    #[test]
    fn latencies_are_those_of_the_newest_bans() {
        let mut health = Health::default();
        for n in 0..2 * LATENCIES {
            health.note_latency(Duration::from_millis(if n < LATENCIES { 500 } else { 2 }));
        }
        let latency = health.latency();
        assert_eq!(
            (latency.bans, latency.median_ms, latency.max_ms),
            (LATENCIES, 2.0, 2.0)
        );
    }
}
