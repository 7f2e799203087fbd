//! The engine, the ledger on disk and a back end, driven as the runtime's loop does it, and held against the model. The two slow
//! hands, the thread of the back end and that of the ledger, are queues here: a crash loses what is still in them.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fs,
    ops::AddAssign,
    path::PathBuf,
    time::Duration,
};

use ipnet::IpNet;
use portcullis::{
    enforce::{self, Drift, Entry, Intent, Lifetime},
    runtime::clock,
    store::Store,
};
use portcullis_engine::{
    Ban, Command, Engine, Gate, Origin, Outcome, Proxied, Release, Saved, Settings, Subject, Term,
    Timestamp, Wish,
    allowlist::Why,
    baseline, blast,
    command::{Allowed, Change},
    detect,
    ledger::{Length, Offences},
    parse::{Format, Record},
};

use super::{
    Account, EXTENSIONS, Ledger, MAX_BANS, MAX_OFFENDERS, Model, QUIET, Rules, Standing, Wanted,
    kernel::Kernel,
    steps::{Happens, Meddling, Step, allowable, clients, probes, rules, subjects},
};

const START: u64 = 1_700_000_000_000;
/// How far an entry's end may be from what is wanted: what a comparison puts up with, and how long a step takes.
const TOLERANCE: Duration = Duration::from_secs(5);
/// Longer than the disk takes.
const SOON: Duration = Duration::from_secs(20);
/// Requests of a client in one second that are more than any visitor's.
const FLOOD: usize = 12;

/// What survives the agent, besides the kernel.
pub enum Disk {
    /// A folder with a real ledger.
    Folder(PathBuf, Option<Store>),
    /// As if it were one.
    Memory(Box<Memory>),
}

#[derive(Default)]
pub struct Memory {
    bans: BTreeMap<Subject, Ban>,
    accounts: BTreeMap<Subject, Offences>,
    allow: BTreeMap<IpNet, Allowed>,
}

impl Disk {
    fn open(&mut self, now: Timestamp) -> Saved {
        match self {
            Self::Folder(folder, store) => {
                let (opened, contents) = Store::recover(folder, now).unwrap();
                assert_eq!(contents.lost, None);
                assert_eq!(opened.problem(), None);
                *store = Some(opened);
                contents.saved
            }
            Self::Memory(memory) => Saved {
                bans: memory.bans.values().cloned().collect(),
                offences: memory.accounts.iter().map(|(s, o)| (*s, *o)).collect(),
                allow: memory.allow.iter().map(|(n, a)| (*n, a.clone())).collect(),
                baseline: None,
            },
        }
    }

    /// All of these are on disk after it.
    fn write(&mut self, changes: &[Change]) {
        match self {
            Self::Folder(_, store) => {
                let store = store.as_ref().unwrap();
                let together = store.together();
                for change in changes {
                    store.save(change);
                }
                drop(together);
                assert!(store.settle(SOON), "{:?}", store.problem());
            }
            Self::Memory(memory) => {
                for change in changes {
                    memory.write(change);
                }
            }
        }
    }

    /// The process is gone. After a crash the file is as it was while it was worked with.
    fn leave(&mut self, is_crash: bool) {
        let Self::Folder(folder, store) = self else {
            return;
        };
        let (ledger, copy) = (folder.join("ledger.redb"), folder.join("crashed"));
        if is_crash {
            fs::copy(&ledger, &copy).unwrap();
        }
        drop(store.take());
        if is_crash {
            fs::rename(&copy, &ledger).unwrap();
        }
    }
}

impl Memory {
    fn write(&mut self, change: &Change) {
        match change {
            Change::Ban(ban) => drop(self.bans.insert(ban.subject, ban.clone())),
            Change::Unban(subject) => drop(self.bans.remove(subject)),
            Change::Offences(subject, account) => {
                self.accounts.insert(*subject, *account);
            }
            Change::Forget(subject) => {
                self.accounts.remove(subject);
            }
            Change::Allow(net, Some(allowed)) => drop(self.allow.insert(*net, allowed.clone())),
            Change::Allow(net, None) => drop(self.allow.remove(net)),
            Change::Baseline(_) => {}
        }
    }
}

/// What waits for the back end.
enum Job {
    Ban(Ban, Lifetime, Duration),
    Unban(Ban, String),
    Look(Subject),
    Allow(Vec<IpNet>),
}

/// See the module's documentation.
pub struct Rig {
    kernel: Kernel,
    disk: Disk,
    engine: Engine,
    intent: Intent,
    model: Model,
    now: u64,
    /// Rules of the file, which the next start reads.
    configured: Rules,
    /// Who goes on sending.
    sending: BTreeSet<Subject>,
    jobs: VecDeque<Job>,
    /// What waits for the disk, and the step that it comes from.
    saves: VecDeque<(usize, Change)>,
    step: usize,
    /// The ledger after each step since the one that is on disk, that included.
    past: VecDeque<(usize, Ledger)>,
    /// When each entry in the kernel is to end, on the boot clock; none: never.
    ends: BTreeMap<Subject, Option<Duration>>,
    /// What the sequence has come across.
    pub met: Met,
}

/// How much a sequence, or all of them, came across: a test that never gets there proves nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Met {
    pub bans: usize,
    pub extended: usize,
    pub crashes: usize,
    /// Crashes that lost something that was decided.
    pub losses: usize,
    pub reconciled: usize,
    pub drift: Drift,
    pub full: usize,
}

impl Met {
    /// Has it come across all that it is to?
    pub const fn is_all(&self) -> bool {
        let Drift {
            missing,
            altered,
            foreign,
            ..
        } = self.drift;
        let times = [self.bans, self.extended, self.losses, self.full];
        let [bans, extended, losses, full] = times;
        bans > 0
            && extended > 0
            && losses > 0
            && full > 0
            && missing > 0
            && altered > 0
            && foreign > 0
    }
}

impl AddAssign for Met {
    fn add_assign(&mut self, other: Self) {
        self.bans += other.bans;
        self.extended += other.extended;
        self.crashes += other.crashes;
        self.losses += other.losses;
        self.reconciled += other.reconciled;
        self.drift += other.drift;
        self.full += other.full;
    }
}

impl Rig {
    pub fn new(kernel: Kernel, disk: Disk) -> Self {
        let now = Timestamp::from_millis(START);
        let mut rig = Self {
            kernel,
            disk,
            engine: Engine::new(settings(&rules(0)), Saved::default(), now),
            intent: Intent::default(),
            model: Model::default(),
            now: START,
            configured: rules(0),
            sending: clients()
                .into_iter()
                .step_by(2)
                .map(|(_, client)| client)
                .collect(),
            jobs: VecDeque::new(),
            saves: VecDeque::new(),
            step: 0,
            past: VecDeque::from([(0, Ledger::default())]),
            ends: BTreeMap::new(),
            met: Met::default(),
        };
        rig.start();
        rig
    }

    pub fn run(&mut self, steps: &[Step]) {
        for step in steps {
            self.happen(step.happens, step);
            self.work(step);
        }
        self.reconcile();
    }

    fn at(&self) -> Timestamp {
        Timestamp::from_millis(self.now)
    }

    /// The slow hands do some of what waits.
    fn work(&mut self, step: &Step) {
        self.do_jobs(self.jobs.len() * step.kernel / 4);
        self.flush(self.saves.len() * step.disk / 4);
    }

    fn happen(&mut self, happens: Happens, step: &Step) {
        match happens {
            Happens::Offence(client) => self.offend(client),
            Happens::Pass(span) => self.pass(self.now + span, step),
            Happens::Sleep(span) => self.tick(self.now + span),
            Happens::ToNextEnd(by) => {
                let ends = self.model.ledger.bans.values().filter_map(|ban| ban.end);
                if let Some(end) = ends.min() {
                    let until = end.checked_add_signed(by).unwrap();
                    self.pass(until.max(self.now), step);
                }
            }
            Happens::Sends(client, is_sending) => {
                let (_, subject) = clients()[client];
                if is_sending {
                    self.sending.insert(subject);
                } else {
                    self.sending.remove(&subject);
                }
            }
            Happens::Ban {
                whom,
                length,
                observe,
                confirm,
            } => self.ban(subjects()[whom], length, observe, confirm),
            Happens::Import {
                from,
                count,
                length,
            } => {
                for n in from..from + count {
                    let subject = Subject::of_client([198, 19, 1, n].into());
                    self.ban(subject, length, false, None);
                }
            }
            Happens::Confirm(which) => self.confirm(which),
            Happens::Unban(which) => {
                self.unban(self.standing(which).unwrap_or(subjects()[0]));
            }
            Happens::UnbanAll => {
                let bans: Vec<Subject> = self.engine.bans().map(|ban| ban.subject).collect();
                for subject in bans {
                    self.unban(subject);
                }
            }
            Happens::Allow(net) => self.allow(allowable()[net]),
            Happens::Disallow(net) => self.disallow(allowable()[net]),
            Happens::Configure {
                rules: number,
                is_reloaded,
            } => {
                self.configured = rules(number);
                if is_reloaded {
                    self.reload();
                }
            }
            Happens::SetClock(millis) => self.set_clock(millis),
            Happens::Meddle(meddling, which) => {
                let subject = match meddling {
                    Meddling::Add | Meddling::AddOver => None,
                    _ => self.standing(which),
                };
                let others = subjects();
                let subject = subject.unwrap_or(others[which % others.len()]);
                self.kernel.meddle(meddling, subject);
            }
            Happens::Reconcile => self.reconcile(),
            Happens::Restart {
                is_crash,
                down,
                set_by,
            } => self.restart(is_crash, down, set_by),
        }
    }

    /// One of those who are banned.
    fn standing(&self, which: usize) -> Option<Subject> {
        let bans = &self.model.ledger.bans;
        bans.keys().nth(which % bans.len().max(1)).copied()
    }

    fn offend(&mut self, client: usize) {
        let (address, subject) = clients()[client];
        let now = self.at();
        for _ in 0..FLOOD {
            self.engine.record(&Record::new(now, address, 200), now);
        }
        let before = self.model.ledger.bans.len();
        self.model.offend(subject, self.now);
        self.met.bans += usize::from(self.model.ledger.bans.len() > before);
        self.dispatch();
    }

    /// The agent sees time pass: whenever something is due, at the latest.
    fn pass(&mut self, until: u64, step: &Step) {
        while self.now < until {
            let next = self.model.next_times(self.now).min().unwrap_or(until);
            self.tick(next.min(until));
            self.work(step);
        }
    }

    fn tick(&mut self, now: u64) {
        self.now = now;
        self.engine.tick(self.at());
        let looks = self.model.pass(now);
        let looked = self.dispatch();
        assert_eq!(looked, looks, "whose sources are looked at");
    }

    fn ban(&mut self, subject: Subject, length: Option<u64>, observe: bool, confirm: Option<u64>) {
        let wish = Wish {
            reason: "by hand".to_owned(),
            by: "root".to_owned(),
            observe,
            confirm: confirm.map(Duration::from_millis),
        };
        let is_banned = self.engine.ban(subject, of_millis(length), wish, self.at());
        let is_full = self.model.ledger.bans.len() == MAX_BANS;
        self.met.full += usize::from(is_full);
        let expected = self.model.ban(subject, length, observe, confirm, self.now);
        assert_eq!(is_banned.is_ok(), expected, "{subject}: {is_banned:?}");
        self.dispatch();
    }

    fn confirm(&mut self, which: usize) {
        let waiting = self.model.ledger.bans.iter();
        let waiting = waiting.filter(|(_, ban)| ban.wanted.is_some());
        let waiting: Vec<Subject> = waiting.map(|(subject, _)| *subject).collect();
        let others = subjects();
        let subject = waiting
            .get(which % waiting.len().max(1))
            .unwrap_or(&others[which % others.len()]);
        let confirmed = self.engine.confirm(*subject, self.at());
        let expected = self.model.confirm(*subject, self.now);
        assert_eq!(confirmed.is_ok(), expected, "{subject}: {confirmed:?}");
        self.dispatch();
    }

    fn unban(&mut self, subject: Subject) {
        let lifted = self.engine.unban(subject, String::new(), self.at());
        let expected = self.model.unban(subject, self.now);
        assert_eq!(lifted.is_ok(), expected, "{subject}: {lifted:?}");
        self.dispatch();
    }

    fn allow(&mut self, whole: Subject) {
        let allowed = Allowed {
            since: self.at(),
            by: "root".to_owned(),
            reason: String::new(),
        };
        self.engine.allow(whole.net(), allowed, self.at()).unwrap();
        self.model.allow(whole, self.now);
        self.dispatch();
    }

    fn disallow(&mut self, whole: Subject) {
        let done = self.engine.disallow(whole.net(), "root", self.at());
        assert_eq!(done.is_ok(), self.model.disallow(whole), "{whole}");
        self.dispatch();
    }

    fn reload(&mut self) {
        let now = self.at();
        assert!(self.engine.reconfigure(settings(&self.configured), now));
        self.model.configure(self.configured.clone(), self.now);
        self.dispatch();
    }

    fn set_clock(&mut self, millis: i64) {
        self.now = self.now.checked_add_signed(millis).unwrap();
        self.engine.clock_set(millis, self.at());
        self.model.set_clock(millis);
        // What the kernel has ends at the same moment.
        let ends = self.ends.clone();
        self.dispatch();
        self.ends = ends;
        self.tick(self.now);
    }

    /// Takes what the engine wants done, as a step that is decided. Returns whose sources are to be looked at.
    fn dispatch(&mut self) -> BTreeSet<Subject> {
        let mut looks = BTreeSet::new();
        let mut is_allowlist_new = false;
        self.step += 1;
        while let Some(command) = self.engine.next_command() {
            match command {
                Command::Ban(ban) => {
                    let lifetime = Lifetime::of(ban.term, self.at());
                    self.jobs.push_back(Job::Ban(ban, lifetime, clock::boot()));
                }
                Command::Unban(ban, cause, _) => self.jobs.push_back(Job::Unban(ban, cause)),
                Command::Look(subject) => {
                    looks.insert(subject);
                }
                Command::Allowlist => is_allowlist_new = true,
                Command::Save(change) => self.saves.push_back((self.step, change)),
                Command::Verify(..) | Command::Record(_) => {}
            }
        }
        self.jobs
            .extend(looks.iter().map(|subject| Job::Look(*subject)));
        if is_allowlist_new {
            self.jobs.push_back(Job::Allow(self.allowlist()));
        }
        self.is_decided();
        looks
    }

    /// What the engine knows is what the model says.
    fn is_decided(&mut self) {
        let bans: BTreeMap<Subject, Standing> = self.engine.bans().map(standing).collect();
        assert_eq!(bans, self.model.ledger.bans, "at {}", self.now);
        let allowed = self.engine.allowlist().by_operators();
        let allowed: BTreeSet<Subject> = allowed.map(|(net, _)| Subject::of_net(net)).collect();
        assert_eq!(allowed, self.model.ledger.allowed);
        // One at a time, since it takes long; all of them are looked at on disk.
        let clients = clients();
        let (_, client) = clients[self.step % clients.len()];
        let account = self.engine.explain(client).offences.map(account);
        assert_eq!(
            account.as_ref(),
            self.model.ledger.accounts.get(&client),
            "{client}"
        );
        let before = self.past.back().map(|(_, ledger)| ledger.clone());
        let before = before.unwrap_or_default();
        let boot = clock::boot();
        for (subject, ban) in &bans {
            let old = before.bans.get(subject);
            // Whatever is decided anew is entered anew.
            if old != Some(ban) {
                self.ends.insert(*subject, self.boot_end(ban, boot));
            }
        }
        self.ends.retain(|subject, _| bans.contains_key(subject));
        self.past.push_back((self.step, self.model.ledger.clone()));
        if self.saves.is_empty() {
            self.flush(0);
        }
    }

    fn boot_end(&self, ban: &Standing, boot: Duration) -> Option<Duration> {
        let left = |end: u64| Duration::from_millis(end.saturating_sub(self.now));
        ban.end.map(|end| boot + left(end))
    }

    fn allowlist(&self) -> Vec<IpNet> {
        let entries = self.engine.allowlist().iter();
        entries
            .filter(|(_, reasons)| reasons.iter().any(|why| *why != Why::SeenProxy))
            .map(|(net, _)| net)
            .collect()
    }

    /// The back end does so much of what waits for it; changes in a row together.
    fn do_jobs(&mut self, most: usize) {
        let mut jobs: VecDeque<Job> = self.jobs.drain(..most).collect();
        while let Some(job) = jobs.pop_front() {
            match job {
                Job::Look(subject) => {
                    let ago = self
                        .sending
                        .contains(&subject)
                        .then_some(Duration::from_secs(3));
                    let is_extended = self.model.ledger.clone();
                    self.engine.looked(subject, ago, self.at());
                    self.model.looked(subject, ago.is_some());
                    self.met.extended += usize::from(self.model.ledger != is_extended);
                    self.dispatch();
                }
                Job::Allow(allow) => self.kernel.enforcer().set_allowlist(&allow).unwrap(),
                change => {
                    jobs.push_front(change);
                    self.change(&mut jobs);
                }
            }
        }
    }

    fn change(&mut self, jobs: &mut VecDeque<Job>) {
        let (mut changes, mut outcomes) = (Vec::new(), Vec::new());
        while let Some(Job::Ban(..) | Job::Unban(..)) = jobs.front() {
            match jobs.pop_front() {
                Some(Job::Ban(ban, lifetime, made)) => {
                    changes.push(change(&ban, lifetime.after(made)));
                    outcomes.push(Outcome::Banned(ban, Ok(())));
                }
                Some(Job::Unban(ban, cause)) => {
                    changes.push(enforce::Change::Unban(ban.subject));
                    outcomes.push(Outcome::Unbanned(ban, cause, Ok(())));
                }
                _ => unreachable!("it was looked at"),
            }
        }
        let results = self.kernel.enforcer().apply(&changes);
        for change in &changes {
            self.intent.note(*change);
        }
        for (outcome, result) in outcomes.into_iter().zip(results) {
            // A stranger's entry may be in its place: then the comparison makes room.
            let result = result.map_err(|problem| format!("{problem:#}"));
            let outcome = match outcome {
                Outcome::Banned(ban, _) => Outcome::Banned(ban, result),
                Outcome::Unbanned(ban, cause, _) => Outcome::Unbanned(ban, cause, result),
            };
            self.engine.outcome(outcome, self.at());
        }
        self.dispatch();
    }

    /// So much of what waits is on disk now; of a step all or nothing.
    fn flush(&mut self, most: usize) {
        let next = self.saves.get(most).map(|(step, _)| *step);
        let most = self
            .saves
            .iter()
            .take_while(|(step, _)| Some(*step) != next);
        let most = most.count();
        let changes: Vec<Change> = self.saves.drain(..most).map(|(_, change)| change).collect();
        if !changes.is_empty() {
            self.disk.write(&changes);
        }
        let durable = next.map_or(self.step, |step| step - 1);
        while self.past.get(1).is_some_and(|(step, _)| *step <= durable) {
            self.past.pop_front();
        }
    }

    /// After a comparison the kernel has what the model says, and another one finds nothing.
    fn reconcile(&mut self) {
        while !self.jobs.is_empty() {
            self.do_jobs(self.jobs.len());
        }
        self.kernel.enforcer().activate().unwrap();
        let drift = self.compare();
        self.met.reconciled += 1;
        self.met.drift += drift;
        assert_eq!(drift.failed, 0, "{drift}");
        self.is_in_force();
        let drift = self.compare();
        assert!(drift.is_none(), "{drift}");
    }

    fn compare(&mut self) -> Drift {
        let (drift, _) = enforce::reconcile(self.kernel.enforcer(), &mut self.intent).unwrap();
        drift
    }

    fn is_in_force(&mut self) {
        let entries = self.kernel.enforcer().entries().unwrap();
        let found: BTreeMap<Subject, Entry> = entries.iter().map(|e| (e.subject, *e)).collect();
        let boot = clock::boot();
        let left = |end: Option<Duration>| end.map(|end| end.saturating_sub(boot));
        // What ends within moments may have, by the kernel's clock, which goes on by itself.
        let is_ending = |subject: &Subject| {
            let left = self.ends.get(subject).copied().and_then(left);
            left.is_some_and(|left| left < TOLERANCE)
        };
        let wanted = self.model.ledger.bans.iter();
        let wanted: BTreeMap<Subject, bool> = wanted
            .filter(|(subject, _)| found.contains_key(*subject) || !is_ending(subject))
            .map(|(subject, ban)| (*subject, ban.observe))
            .collect();
        let observed: BTreeMap<Subject, bool> = found
            .iter()
            .map(|(s, entry)| (*s, entry.observed))
            .collect();
        assert_eq!(observed, wanted, "the kernel's entries, and the model's");
        let allowlist = self.model.allowlist();
        for (subject, entry) in &found {
            let is_allowed = allowlist.iter().any(|allowed| allowed.covers(*subject));
            assert!(!is_allowed, "{subject} is never to be banned");
            let is_right = match (entry.lifetime, left(self.ends[subject])) {
                (Lifetime::Permanent, None) => true,
                (Lifetime::For(found), Some(wanted)) => found.abs_diff(wanted) <= TOLERANCE,
                _ => false,
            };
            assert!(
                is_right,
                "{entry:?}, and not {:?}",
                left(self.ends[subject])
            );
        }
        for source in probes() {
            let subject = Subject::of_net(source.into());
            let mut around = self.ends.keys().filter(|ban| ban.covers(subject));
            if !around.any(is_ending)
                && let Some(drops) = self.kernel.drops(source)
            {
                assert_eq!(drops, self.model.drops(subject), "a packet of {source}");
            }
        }
    }

    fn restart(&mut self, is_crash: bool, down: u64, set_by: i64) {
        if is_crash {
            self.met.crashes += 1;
            self.met.losses += usize::from(!self.saves.is_empty());
            self.jobs.clear();
            self.saves.clear();
        } else {
            // Whoever is looked at at the end is not extended: nobody takes the answer any more.
            self.jobs.retain(|job| !matches!(job, Job::Look(_)));
            self.do_jobs(self.jobs.len());
            let baseline = Box::new(self.engine.saved_baseline());
            self.saves
                .push_back((self.step, Change::Baseline(baseline)));
            self.flush(self.saves.len());
        }
        self.kernel.leave();
        self.disk.leave(is_crash);
        self.now = (self.now + down).checked_add_signed(set_by).unwrap();
        self.start();
    }

    fn start(&mut self) {
        let now = self.at();
        let saved = self.disk.open(now);
        let found = self.found(&saved);
        self.engine = Engine::new(settings(&self.configured), saved, now);
        let rules = self.configured.clone();
        let looks = self.model.restart(found.clone(), rules, self.now);
        self.past = VecDeque::from([(self.step, found)]);

        self.kernel.open();
        let allow = self.allowlist();
        self.kernel.enforcer().set_allowlist(&allow).unwrap();
        let bans = self.engine.bans();
        self.intent = bans
            .map(|ban| change(ban, Lifetime::of(ban.term, now)))
            .collect();
        let drift = self.compare();
        assert_eq!(drift.failed, 0, "{drift}");
        self.kernel.enforcer().activate().unwrap();
        let looked = self.dispatch();
        assert_eq!(looked, looks, "whose sources are looked at, at the start");
        let boot = clock::boot();
        let bans = self.model.ledger.bans.iter();
        self.ends = bans
            .map(|(s, ban)| (*s, self.boot_end(ban, boot)))
            .collect();
        self.is_in_force();
    }

    /// What is on disk is what was decided by then.
    fn found(&self, saved: &Saved) -> Ledger {
        let accounts = saved.offences.iter();
        let found = Ledger {
            bans: saved.bans.iter().map(standing).collect(),
            accounts: accounts
                .map(|(s, offences)| (*s, account(*offences)))
                .collect(),
            allowed: saved
                .allow
                .iter()
                .map(|(net, _)| Subject::of_net(*net))
                .collect(),
        };
        assert_eq!(
            Some(&found),
            self.past.front().map(|(_, ledger)| ledger),
            "what is on disk"
        );
        found
    }
}

fn settings(rules: &Rules) -> Settings {
    Settings {
        format: Format::default(),
        baseline: baseline::Settings {
            span_secs: 1800,
            recompute_secs: 60,
            hour_min_secs: u32::MAX,
            // Nothing is ever learnt: who offends does so by the ceiling.
            warm_up_secs: u32::MAX,
            floor_mean: 1.0,
            floor_stddev: 0.5,
            floor_error_share: 0.05,
            growth_per_hour: 0.0,
            freeze_secs: 0,
        },
        detect: detect::Settings {
            // Ten requests within a window.
            warm_up_ceiling: 0.16,
            ..detect::Settings::ordered()
        },
        schedule: rules.schedule.iter().copied().map(of_millis).collect(),
        forgive: Duration::from_millis(rules.forgive),
        jitter: 0.0,
        release: Release {
            quiet: Duration::from_secs(QUIET),
            extensions: EXTENSIONS,
        },
        blast: blast::Settings::ANY,
        allow: rules.allow.iter().map(|entry| entry.net()).collect(),
        proxies: Vec::new(),
        proxied: Proxied::Tell,
        max_clients: 100,
        max_bans: MAX_BANS,
        max_offenders: MAX_OFFENDERS,
    }
}

fn of_millis(length: Option<u64>) -> Length {
    length.map_or(Length::Permanent, |length| {
        Length::For(Duration::from_millis(length))
    })
}

fn change(ban: &Ban, lifetime: Lifetime) -> enforce::Change {
    if ban.observe {
        enforce::Change::Observe(ban.subject, lifetime)
    } else {
        enforce::Change::Ban(ban.subject, lifetime)
    }
}

const fn end(term: Term) -> Option<u64> {
    match term {
        Term::Until(end) => Some(end.millis()),
        Term::Permanent => None,
    }
}

fn account(offences: Offences) -> Account {
    Account {
        count: offences.count,
        last: offences.last.millis(),
    }
}

fn standing(ban: &Ban) -> (Subject, Standing) {
    assert_eq!(
        ban.origin == Origin::Detector,
        ban.tier.is_some(),
        "{ban:?}"
    );
    assert_eq!(ban.gate, Gate::Wire);
    let standing = Standing {
        since: ban.since.millis(),
        end: end(ban.term),
        tier: ban.tier,
        observe: ban.observe,
        extended: ban.extended,
        wanted: ban.once_confirmed.map(|term| Wanted { end: end(term) }),
    };
    (ban.subject, standing)
}
