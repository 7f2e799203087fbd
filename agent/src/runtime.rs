//! The loop around the engine: inputs in, by priority; commands out, waiting for none of them.

pub mod clock;
mod explained;
mod many;
mod reading;
mod reload;
mod requests;
mod salvage;
pub mod shutdown;

use std::{
    collections::BTreeMap,
    hash::{BuildHasher as _, RandomState},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Result, bail};
use ipnet::IpNet;
use portcullis_engine::{
    Ban, Command, Engine, Event, Feed, Origin, Outcome, Saved, Snapshot, Subject, Timestamp,
    command::{Action, Change},
    ledger::Offences,
};
use serde::{Deserialize, Serialize};
use tokio::{
    signal::unix::Signal,
    sync::{mpsc, oneshot},
    task::JoinHandle,
    time::{MissedTickBehavior, interval, timeout},
};
use tracing::{debug, error, info, warn};

use self::{clock::Steps, reading::Reading, reload::Running, requests::Awaited};
pub use self::{
    explained::{Explained, Held},
    many::BannedMany,
    reading::Unreadable,
    reload::{Reloaded, SettingChange},
    requests::{AllowRow, BanRow, Banned},
};
use crate::{
    audit::History,
    config::{self, Adjusted, Config, Input},
    control::{self, Asked, Reply},
    crawlers::{Crawler, Crawlers},
    enforce::{
        self, Backend, Drift, Lifetime, Mode,
        nginx::{self, Nginx},
        worker::{Job, Latency, Worker},
    },
    notify::{self, Notifier},
    source::{self, Batch, follow},
    store::{self, Store},
    surroundings::{self, Surroundings},
};

/// Outcomes and requests that may wait; whoever sends more waits.
const QUEUE: usize = 1024;
/// So many sources are looked at by the back end at a time.
const LOOKED_AT: usize = 4096;
/// Time passes for the engine so often.
const TICK: Duration = Duration::from_millis(250);
/// At the start, how long the disk may take to know from where on the logs are read.
const SETTLE: Duration = Duration::from_secs(5);
/// The source's position is made durable so often.
const SAVE_CHECKPOINT: Duration = Duration::from_secs(1);

/// At the end, the back end is waited for so long from one outcome to the next.
const LAST_OUTCOME: Duration = Duration::from_secs(5);

/// Everything that `portcullis status` says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// This agent's version.
    pub version: String,
    /// How long it has been running.
    pub uptime_secs: u64,
    /// What happens to banned sources.
    pub mode: Mode,
    /// Which back end is at work.
    pub backend: Backend,
    /// Where.
    pub place: String,
    /// Why the back ends before it are not.
    pub refused: Vec<String>,
    /// The engine.
    pub engine: Snapshot,
    /// Bans by step of the schedule; step 0 holds those without one.
    pub bans_by_tier: BTreeMap<u32, usize>,
    /// Packets by reason.
    pub counters: BTreeMap<String, u64>,
    /// From a line being read to its ban being in force.
    pub latency: Latency,
    /// What the kernel had to be brought back from.
    pub drift: Drift,
    /// Connections of banned sources that were ended.
    pub ended_connections: u64,
    /// Why the newest change of the kernel failed, until one succeeds.
    pub enforce_error: Option<String>,
    /// Changes that wait for the back end beside its queue.
    pub enforce_aside: usize,
    /// Changes that were overtaken there by newer ones, and are on no record.
    pub enforce_overtaken: u64,
    /// The logs.
    pub source: source::Status,
    /// Those whose newest lines cannot be read.
    pub unreadable: Vec<Unreadable>,
    /// Bans in Nginx, where that is configured.
    pub nginx: Option<nginx::Status>,
    /// Word to people, by Slack.
    pub slack: notify::Status,
    /// Word to programs, by the generic webhook.
    pub webhook: notify::Status,
    /// Changes of the ledger that are not on disk yet.
    pub store_pending: usize,
    /// Why none of them can be put there now.
    pub store_error: Option<String>,
    /// Events that never came into the history.
    pub history_lost: u64,
    /// Why nothing can be put into the history now.
    pub history_error: Option<String>,
    /// What the configuration file says otherwise than the agent does, until it is started anew.
    pub needs_restart: Vec<String>,
    /// Names on the allowlist that have no address, so that nobody is spared for them.
    pub names_without_address: Vec<String>,
}

#[cfg(test)]
impl Status {
    /// Of an agent at its start.
    pub(crate) fn sample() -> Self {
        let engine = Engine::new(
            Config::default().engine,
            Saved::default(),
            Timestamp::from_millis(0),
        );
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_secs: 0,
            mode: Mode::Observe,
            backend: Backend::DryRun,
            place: "nowhere".to_owned(),
            refused: Vec::new(),
            engine: engine.snapshot(),
            bans_by_tier: BTreeMap::new(),
            counters: BTreeMap::new(),
            latency: Latency::default(),
            drift: Drift::default(),
            ended_connections: 0,
            enforce_error: None,
            enforce_aside: 0,
            enforce_overtaken: 0,
            source: source::Status::default(),
            unreadable: Vec::new(),
            nginx: None,
            slack: notify::Status::default(),
            webhook: notify::Status::default(),
            store_pending: 0,
            store_error: None,
            history_lost: 0,
            history_error: None,
            needs_restart: Vec::new(),
            names_without_address: Vec::new(),
        }
    }
}

/// Runs the agent until it is told to stop. What it comes from is read anew when somebody wishes that.
///
/// # Errors
/// What kept it from starting, one sentence with the remedy; or what broke it.
pub async fn run(adjusted: Adjusted, input: Input) -> Result<()> {
    let (stop, hang_up) = (shutdown::signal()?, reload::hang_up()?);
    let running = Running::new(input, &adjusted);
    let config = adjusted.config;
    // A clock that is set while the agent starts is noticed, too: the ledger is worked on by the time that it had here.
    let mut steps = Steps::default();
    let (now, _) = steps.now();
    let (store, mut contents) = Store::recover(&config.state_dir, now)?;
    // Names may take seconds; meanwhile nobody else need wait.
    let settings = config.surroundings.clone();
    let (surroundings, around, surrounded) =
        tokio::task::spawn_blocking(|| Surroundings::start(settings)).await??;
    let (crawlers, verified) = Crawlers::start(config.crawlers.clone())?;
    let salvaged = salvage::salvage(&mut contents, &config, &around, now);
    let forgotten = forget_observed(&mut contents, config.mode, now);
    let history = History::open(&config.state_dir, config.history)?;
    let (notifier, couriers) = Notifier::start(&config);

    let engine = start_engine(&config, around, contents.saved, now);
    let allow = allowed(&engine);
    let max_bans = u32::try_from(config.engine.max_bans).unwrap_or(u32::MAX);

    // Everything that says that another agent is here, before the kernel is touched: it would lose its bans to us.
    let uses_pins = |backend: &Backend| matches!(backend, Backend::XdpNative | Backend::XdpGeneric);
    let _lock = if config.enforce.backends.iter().any(uses_pins) {
        enforce::xdp::lock(&config.enforce.pin_dir)?
    } else {
        None
    };
    let (request_sender, requests) = mpsc::channel(QUEUE);
    let socket = control::serve(&config.control, request_sender)?;

    // The logs too: a start that cannot be is not to touch the kernel. Lines wait until the loop takes them.
    let (batch_sender, batches) = mpsc::channel(source::QUEUE);
    let source = source::start(
        config.source.clone(),
        contents.checkpoint.clone(),
        batch_sender,
    )
    .await?;
    let reading = Reading::new(&config.source, contents.checkpoint, source.progress);

    let (nginx, nginx_outcomes) = start_nginx(config.nginx, &engine, config.mode)?;

    // What the ledger holds is in force before the first line is worked on.
    let intent = intent(&engine, now);
    let chosen = {
        let (enforce, mode) = (config.enforce.clone(), config.mode);
        tokio::task::spawn_blocking(move || {
            enforce::choose(&enforce, mode, max_bans, &allow, intent)
        })
        .await??
    };
    let (outcome_sender, outcomes) = mpsc::channel(QUEUE);
    let worker = Worker::start(chosen, outcome_sender)?;

    let mut agent = Agent {
        mode: config.mode,
        started: clock::boot(),
        steps,
        engine,
        surroundings,
        crawlers,
        running,
        worker,
        store,
        history,
        notifier,
        couriers,
        counters: source.counters,
        threads: source.threads,
        reading,
        nginx,
        nginx_outcomes,
        waiting: Vec::new(),
        looked: mpsc::channel(QUEUE),
        read_anew: mpsc::channel(1),
        many: Vec::new(),
        lifted: Vec::new(),
    };
    agent.store.save_mode(config.mode);
    agent.save_checkpoint();
    agent.make_up(salvaged, now);
    // Whatever happens from now on, it is known what was written since: the loop answers nobody before. A disk that fails has
    // been said to, and keeps nobody from enforcing.
    agent.store.settle(SETTLE);
    agent.forget(forgotten, now);
    agent.announce(&config.source.logs, now);
    let mut inputs = Inputs {
        batches,
        outcomes,
        requests,
        surrounded,
        verified,
        hang_up,
    };
    let result = agent.work(stop, &mut inputs, &config.enforce).await;

    drop(socket);
    let why = result
        .as_ref()
        .map_or_else(|error| format!("{error:#}"), |signal| (*signal).to_owned());
    let couriers = std::mem::take(&mut agent.couriers);
    agent.stop(&why, inputs.outcomes).await;
    notify::ended(couriers).await?;
    result.map(drop)
}

/// What was only observed, and is not held against anybody.
struct Forgotten {
    changes: Vec<Change>,
    words: String,
}

/// The first day of enforcement does not begin with what was decided while nothing was dropped: whoever was never kept
/// out has had no warning. Operators' bans stay.
fn forget_observed(
    contents: &mut store::Contents,
    mode: Mode,
    now: Timestamp,
) -> Option<Forgotten> {
    if contents.mode != Some(Mode::Observe) || mode != Mode::Enforce {
        return None;
    }
    let saved = &mut contents.saved;
    let (kept, observed): (Vec<Ban>, Vec<Ban>) = std::mem::take(&mut saved.bans)
        .into_iter()
        .partition(|ban| ban.origin == Origin::Operator);
    // Settled: what is read again of those times is not held against anybody either.
    for (_, offences) in &mut saved.offences {
        *offences = Offences {
            count: 0,
            last: now,
        };
    }
    let offences = saved.offences.clone();
    let words = format!(
        "from observe to enforce mode: {} bans and the offences of {} sources that were only observed are forgotten; {} bans \
         by operators are enforced from now on",
        observed.len(),
        offences.len(),
        kept.len()
    );
    saved.bans = kept;
    let bans = observed.into_iter().map(|ban| Change::Unban(ban.subject));
    let offences = offences
        .into_iter()
        .map(|(subject, settled)| Change::Offences(subject, settled));
    Some(Forgotten {
        changes: bans.chain(offences).collect(),
        words,
    })
}

/// An engine that protects this host, too.
fn start_engine(
    config: &Config,
    around: surroundings::Entries,
    saved: Saved,
    now: Timestamp,
) -> Engine {
    let mut settings = config.engine.clone();
    // Standard hashers are keyed at random.
    let key = RandomState::new().hash_one(now.millis());
    settings.format = settings.format.keyed(key);
    for (net, why) in &around {
        debug!("{net} is never banned: {why}");
    }
    let mut engine = Engine::new(settings, saved, now);
    engine.surround(around, now);
    // Until the source says that the end of the logs is reached.
    engine.feed(Feed {
        behind: true,
        ..Feed::default()
    });
    engine
}

/// Bans in Nginx, if that is configured; and what becomes of them.
fn start_nginx(
    settings: Option<nginx::Settings>,
    engine: &Engine,
    mode: Mode,
) -> Result<(Option<Nginx>, mpsc::Receiver<Outcome>)> {
    // Without the thread nobody has the sender, so that nobody waits for outcomes.
    let (sender, outcomes) = mpsc::channel(QUEUE);
    let start = |settings| {
        let in_force = in_nginx(engine, mode);
        Nginx::start(settings, in_force, allowed(engine), sender)
    };
    Ok((settings.map(start).transpose()?, outcomes))
}

struct Agent {
    mode: Mode,
    started: Duration,
    steps: Steps,
    engine: Engine,
    surroundings: Surroundings,
    crawlers: Crawlers,
    running: Running,
    worker: Worker,
    store: Store,
    history: History,
    notifier: Notifier,
    couriers: Vec<JoinHandle<()>>,
    counters: std::sync::Arc<source::Counters>,
    threads: Vec<std::thread::JoinHandle<()>>,
    reading: Reading,
    nginx: Option<Nginx>,
    nginx_outcomes: mpsc::Receiver<Outcome>,
    /// Operators who wait for a change to be in force; as many as there are connections, which are bounded.
    waiting: Vec<(Subject, Awaited, oneshot::Sender<Reply>)>,
    /// Entries of those whose bans end soon.
    looked: (
        mpsc::Sender<Vec<enforce::Entry>>,
        mpsc::Receiver<Vec<enforce::Entry>>,
    ),
    /// Configurations that were read anew.
    read_anew: (
        mpsc::Sender<reload::ReadAnew>,
        mpsc::Receiver<reload::ReadAnew>,
    ),
    /// Those who wait for many; likewise.
    many: Vec<many::Waiting>,
    /// Those who wait for all bans to be lifted, and how many those were.
    lifted: Vec<(usize, oneshot::Sender<Reply>)>,
}

/// What comes in from outside, besides what the agent has asked for itself.
struct Inputs {
    batches: mpsc::Receiver<Batch>,
    outcomes: mpsc::Receiver<Outcome>,
    requests: mpsc::Receiver<Asked>,
    surrounded: mpsc::Receiver<surroundings::Entries>,
    verified: mpsc::Receiver<Crawler>,
    hang_up: Signal,
}

impl Agent {
    /// Says that it has started, on what, and what it reads.
    fn announce(&self, logs: &[PathBuf], now: Timestamp) {
        let observing = match self.mode {
            Mode::Observe => ", observe mode: nothing is dropped",
            Mode::Enforce => ", enforce mode",
        };
        let words = format!(
            "{} on {}{observing}",
            self.worker.backend, self.worker.place
        );
        self.record(&Event::new(now, Action::Start, words));
        for log in logs {
            info!("following {}", log.display());
        }
        for pattern in follow::unmatched(logs) {
            warn!(
                "{} matches no file now: nothing is read by it until one comes; if it should match, correct source.log",
                pattern.display()
            );
        }
    }

    async fn work(
        &mut self,
        stop: impl Future<Output = &'static str>,
        inputs: &mut Inputs,
        config: &config::Enforce,
    ) -> Result<&'static str> {
        tokio::pin!(stop);
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut reconcile, mut repair) = (interval(config.reconcile), interval(config.repair));
        for timer in [&mut reconcile, &mut repair] {
            timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
            timer.reset();
        }
        self.dispatch(None);
        loop {
            // In order of urgency; each but the last is rare or bounded, so the lines get their turn.
            tokio::select! {
                biased;
                signal = &mut stop => return Ok(signal),
                Some(outcome) = inputs.outcomes.recv() => self.outcome(outcome),
                Some(outcome) = self.nginx_outcomes.recv() => self.outcome_of_nginx(outcome),
                Some(entries) = self.looked.1.recv() => {
                    let now = self.now();
                    for entry in entries {
                        self.engine.looked(entry.subject, entry.last_seen, now);
                    }
                }
                Some(asked) = inputs.requests.recv() => self.request(asked),
                Some(()) = inputs.hang_up.recv() => self.reload("a hang-up signal", None),
                Some(read) = self.read_anew.1.recv() => self.go_by(read),
                Some(entries) = inputs.surrounded.recv() => {
                    let now = self.now();
                    self.engine.surround(entries, now);
                }
                Some((client, name)) = inputs.verified.recv() => {
                    let now = self.now();
                    self.engine.verified(client, &name, now);
                }
                _ = tick.tick() => self.pass()?,
                _ = reconcile.tick() => self.worker.reconcile(),
                _ = repair.tick() => self.worker.repair(),
                batch = inputs.batches.recv() => match batch {
                    Some(batch) => self.batch(batch),
                    None => bail!("the thread that reads the log has ended"),
                },
            }
            self.dispatch(None);
        }
    }

    /// Lets time pass, and looks after everything that has to be looked at now and then.
    fn pass(&mut self) -> Result<()> {
        let now = self.now();
        self.engine.tick(now);
        self.save_checkpoint();
        let pace = self.reading.news(&self.counters, clock::boot());
        let complaint = self.reading.complaint(clock::boot());
        let (recovery, disk) = (self.reading.recovery(), self.store.news());
        for news in [pace, complaint, recovery, disk].into_iter().flatten() {
            self.record(&Event::new(clock::wall(), Action::Notice, news));
        }
        self.worker.catch_up();
        self.answer_lifted();
        self.waiting.retain(|(_, _, reply)| !reply.is_closed());
        self.many.retain(many::Waiting::is_awaited);
        if self
            .threads
            .iter()
            .any(std::thread::JoinHandle::is_finished)
        {
            bail!("a thread that reads the log has ended");
        }
        if !self.worker.is_alive() {
            bail!(
                "the thread of the back end has ended; bans that stand are still enforced by the kernel"
            );
        }
        Ok(())
    }

    fn batch(&mut self, batch: Batch) {
        self.engine.feed(self.reading.feed(&batch));
        // One without lines only says how far reading is.
        if !batch.piece.bytes.is_empty() {
            self.engine.log(&batch.log);
        }
        let mut lines = batch.piece.lines();
        loop {
            let group = self.reading.take(&batch, &mut lines, &self.counters);
            if group.is_empty() {
                break;
            }
            let (now, reading, mut malformed) =
                (now(&mut self.steps, &mut self.engine), &mut self.reading, 0);
            self.engine.lines(&group, now, |line, problem| {
                malformed += 1;
                reading.malformed(&batch, line, &problem.to_string(), clock::boot());
            });
            if malformed < group.len() {
                self.reading.readable(&batch);
            }
            // At once: the next packet of whoever was flagged by these lines is to be dropped.
            self.dispatch(Some(batch.read));
        }
        drop(lines);
        if batch.caught_up {
            self.engine.feed(Feed::default());
            // From here on it is now.
            let now = self.now();
            self.engine.tick(now);
        }
        self.reading.done(batch, &self.counters);
    }

    fn save_checkpoint(&mut self) {
        if let Some(checkpoint) = self.reading.checkpoint(clock::boot(), SAVE_CHECKPOINT) {
            self.store.save_checkpoint(&checkpoint);
        }
    }

    /// What was only observed is gone from the disk too.
    fn forget(&self, forgotten: Option<Forgotten>, now: Timestamp) {
        let Some(forgotten) = forgotten else { return };
        for change in &forgotten.changes {
            self.store.save(change);
        }
        self.record(&Event::new(now, Action::Notice, forgotten.words));
    }

    /// Carries out what the engine wants done; `read` is when the lines were read that it follows from, on the boot clock.
    fn dispatch(&mut self, read: Option<Duration>) {
        let mut looked_at = Vec::new();
        let mut together = None;
        while let Some(command) = self.engine.next_command() {
            match command {
                Command::Ban(ban) => {
                    if ban.gate.has_nginx() {
                        self.ban_in_nginx(&ban);
                    }
                    if ban.gate.has_wire() {
                        self.worker.change(Job::Ban {
                            lifetime: Lifetime::of(ban.term, clock::wall()),
                            ban: Box::new(ban),
                            made: clock::boot(),
                            read,
                        });
                    }
                }
                Command::Unban(ban, cause, _) => {
                    if ban.gate.has_nginx() {
                        self.unban_in_nginx(&ban, &cause);
                    }
                    if ban.gate.has_wire() {
                        self.worker.change(Job::Unban(Box::new(ban), cause));
                    }
                }
                Command::Look(subject) => looked_at.push(subject),
                Command::Allowlist => self.spare(),
                Command::Verify(client, address) => self.crawlers.look_into(client, address),
                Command::Save(change) => {
                    together.get_or_insert_with(|| self.store.together());
                    self.store.save(&change);
                }
                Command::Record(event) => self.record(&event),
            }
        }
        drop(together);
        if !looked_at.is_empty() {
            self.look(&looked_at);
        }
    }

    /// Has everybody who enforces spare who is allowed now: before the bans that follow from that, so that these are one
    /// change of Nginx with it.
    fn spare(&mut self) {
        let allowed = allowed(&self.engine);
        if let Some(nginx) = &self.nginx {
            nginx.allow(allowed.iter().copied());
        }
        // Should that fail, the next comparison finds it.
        let (sender, _) = oneshot::channel();
        self.worker.allow(allowed, sender);
    }

    /// The time of day, after the engine has been told if somebody has set the clock.
    fn now(&mut self) -> Timestamp {
        now(&mut self.steps, &mut self.engine)
    }

    /// Asks the back end how long ago these have sent anything. Without an answer they are released.
    fn look(&mut self, subjects: &[Subject]) {
        // Others do not know when a packet came.
        if !matches!(
            self.worker.backend,
            Backend::XdpNative | Backend::XdpGeneric
        ) {
            return;
        }
        for some in subjects.chunks(LOOKED_AT) {
            let (sender, entries) = oneshot::channel();
            self.worker.ask(Job::Look(some.to_vec(), sender));
            let looked = self.looked.0.clone();
            tokio::spawn(async move {
                if let Ok(Ok(entries)) = entries.await {
                    drop(looked.send(entries).await);
                }
            });
        }
    }

    fn ban_in_nginx(&mut self, ban: &Ban) {
        match &self.nginx {
            // Nginx cannot count what it would refuse.
            _ if ban.observe || self.mode == Mode::Observe => {
                self.outcome_of_nginx(Outcome::Banned(ban.clone(), Ok(())));
            }
            Some(nginx) => nginx.ban(ban.clone()),
            None => {
                let problem = "enforce.nginx.include is not configured any more".to_owned();
                self.outcome_of_nginx(Outcome::Banned(ban.clone(), Err(problem)));
            }
        }
    }

    fn unban_in_nginx(&mut self, ban: &Ban, cause: &str) {
        match &self.nginx {
            Some(nginx) if !ban.observe && self.mode == Mode::Enforce => {
                nginx.unban(ban.clone(), cause.to_owned());
            }
            _ => self.outcome_of_nginx(Outcome::Unbanned(ban.clone(), cause.to_owned(), Ok(()))),
        }
    }

    /// What became of a ban in Nginx. Where it is at the wire, too, that speaks for both unless this has failed.
    fn outcome_of_nginx(&mut self, outcome: Outcome) {
        let (Outcome::Banned(ban, result) | Outcome::Unbanned(ban, _, result)) = &outcome;
        if result.is_err() || !ban.gate.has_wire() {
            self.outcome(outcome);
        }
    }

    fn record(&self, event: &Event) {
        let observed = event.observe || self.mode == Mode::Observe;
        match event.action {
            Action::Baseline => debug!("{}", event.line(observed)),
            Action::Fail | Action::Alarm | Action::Hold => warn!("{}", event.line(observed)),
            _ => info!("{}", event.line(observed)),
        }
        self.history.record(event, self.mode);
        self.notifier.tell(event, self.mode);
    }

    fn outcome(&mut self, outcome: Outcome) {
        let (ban, wish, result) = match &outcome {
            Outcome::Banned(ban, result) => (ban, Awaited::Ban, result),
            Outcome::Unbanned(ban, _, result) => (ban, Awaited::Unban, result),
        };
        // A detector's ban of the same subject is not the answer to an operator's wish.
        let is_answer = wish == Awaited::Unban || ban.origin == Origin::Operator;
        let is_it = |waiting: &mut (Subject, Awaited, _)| {
            is_answer && (waiting.0, waiting.1) == (ban.subject, wish)
        };
        if is_answer && wish == Awaited::Ban {
            self.hear_of_many(ban.subject, result.as_ref().err());
        }
        let answered: Vec<_> = self.waiting.extract_if(.., is_it).collect();
        for (subject, _, reply) in answered {
            let answer = match (result, wish) {
                (Ok(()), Awaited::Ban) => Reply::done(&Banned {
                    term: ban.term,
                    observed: ban.observe || self.mode == Mode::Observe,
                    spared: self.spared(ban.subject),
                }),
                (Ok(()), Awaited::Unban) => Reply::done(&1),
                (Err(problem), Awaited::Ban) => {
                    Reply::refused(format!("{subject} is not banned yet: {problem}"))
                }
                (Err(problem), Awaited::Unban) => {
                    Reply::refused(format!("{subject} is not released yet: {problem}"))
                }
            };
            drop(reply.send(answer));
        }
        let now = self.now();
        self.engine.outcome(outcome, now);
    }

    fn explained(&self, subject: Subject) -> Explained {
        Explained {
            known: self.engine.explain(subject),
            mode: self.mode,
            backend: self.worker.backend,
            place: self.worker.place.clone(),
            entry: None,
        }
    }

    fn status(&self) -> Status {
        let health = self.worker.health();
        let mut bans_by_tier = BTreeMap::new();
        for ban in self.engine.bans() {
            *bans_by_tier.entry(ban.tier.unwrap_or(0)).or_insert(0) += 1;
        }
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_secs: clock::boot().saturating_sub(self.started).as_secs(),
            mode: self.mode,
            backend: self.worker.backend,
            place: self.worker.place.clone(),
            refused: self.worker.refused.clone(),
            engine: self.engine.snapshot(),
            bans_by_tier,
            counters: BTreeMap::new(),
            latency: health.latency(),
            drift: health.drift,
            ended_connections: health.ended_connections,
            enforce_error: health.error().map(str::to_owned),
            enforce_aside: self.worker.aside(),
            enforce_overtaken: self.worker.overtaken(),
            source: self.counters.status(self.reading.lines(), clock::boot()),
            unreadable: self.reading.unreadable().cloned().collect(),
            nginx: self.nginx.as_ref().map(Nginx::status),
            slack: self.notifier.slack(),
            webhook: self.notifier.webhook(),
            store_pending: self.store.pending(),
            store_error: self.store.problem(),
            history_lost: self.history.lost(),
            history_error: self.history.problem(),
            needs_restart: self.running.needs_restart(),
            names_without_address: self.surroundings.names_without_address(),
        }
    }

    /// Puts everything that is known where it survives. The kernel goes on dropping what it drops.
    async fn stop(mut self, why: &str, mut outcomes: mpsc::Receiver<Outcome>) {
        self.dispatch(None);
        // What is aside has been decided, and is gone from the ledger: it is done before the end.
        while self.worker.aside() > 0 {
            let Ok(Some(outcome)) = timeout(LAST_OUTCOME, outcomes.recv()).await else {
                error!("{} changes never reached the back end", self.worker.aside());
                break;
            };
            self.outcome(outcome);
            self.dispatch(None);
            self.worker.catch_up();
        }
        self.worker.close();
        // What was decided is done, and goes on record, before the last word.
        while let Ok(Some(outcome)) = timeout(LAST_OUTCOME, outcomes.recv()).await {
            self.outcome(outcome);
            self.dispatch(None);
        }
        if let Some(nginx) = &mut self.nginx {
            nginx.close();
        }
        while let Ok(Some(outcome)) = timeout(LAST_OUTCOME, self.nginx_outcomes.recv()).await {
            self.outcome_of_nginx(outcome);
            self.dispatch(None);
        }
        self.record(&Event::new(clock::wall(), Action::Stop, why));
        if let Some(checkpoint) = self.reading.checkpoint(clock::boot(), Duration::ZERO) {
            self.store.save_checkpoint(&checkpoint);
        }
        let baseline = Box::new(self.engine.saved_baseline());
        self.store.save(&Change::Baseline(baseline));
        self.notifier.close();
    }
}

fn now(steps: &mut Steps, engine: &mut Engine) -> Timestamp {
    let (now, set_by) = steps.now();
    if let Some(millis) = set_by {
        engine.clock_set(millis, now);
    }
    now
}

/// Whom the back end and Nginx are to spare.
fn allowed(engine: &Engine) -> Vec<IpNet> {
    let spared = engine.allowlist().enforced().into_iter();
    spared.map(Subject::net).collect()
}

/// What Nginx should refuse, but for those who are allowed.
fn in_nginx(engine: &Engine, mode: Mode) -> Vec<Subject> {
    let is_there = |ban: &&Ban| mode == Mode::Enforce && ban.gate.has_nginx() && !ban.observe;
    let bans = engine.bans().filter(is_there);
    bans.map(|ban| ban.subject).collect()
}

/// What the kernel should have.
fn intent(engine: &Engine, now: Timestamp) -> enforce::Intent {
    let change = |ban: &Ban| {
        let lifetime = Lifetime::of(ban.term, now);
        if ban.observe {
            enforce::Change::Observe(ban.subject, lifetime)
        } else {
            enforce::Change::Ban(ban.subject, lifetime)
        }
    };
    let bans = engine.bans().filter(|ban| ban.gate.has_wire());
    bans.map(change).collect()
}
