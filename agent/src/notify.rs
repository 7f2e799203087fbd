//! Word to people, and to programs. Events go into a bounded queue for each receiver and out by a task of its own; nobody ever
//! waits for either.
//!
//! At a queue's bound the oldest event about a single address makes room (a flood is made of these, and they stay counted), then
//! the oldest of all; an event about a single address never pushes out one about the site. What is dropped here is still in
//! `history.jsonl`.

mod delivery;
mod endpoint;
#[cfg(test)]
mod faults;
#[cfg(test)]
mod pace;
#[cfg(test)]
mod sink;
pub mod slack;
pub mod webhook;

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result};
use portcullis_engine::{Event, command::Action};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::Notify,
    task::JoinHandle,
    time::{Instant, timeout_at},
};

use self::delivery::{Courier, Receiver};
use crate::{config::Config, enforce::Mode, host};

/// How fast and how patiently a receiver is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// From the end of one request to the start of the next.
    pub min_interval: Duration,
    /// So many events may wait; at least one.
    pub queue: usize,
    /// For one request, from the start of connecting to the answer.
    pub timeout: Duration,
}

/// How it is going with a receiver. Counts are of events since the start, or since the configuration was read anew; `sent + failed + dropped + queued` is all that were
/// told.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Is there anybody to tell?
    pub configured: bool,
    /// Delivered.
    pub sent: u64,
    /// Refused by the receiver, or given up after it has failed for long.
    pub failed: u64,
    /// Not delivered because the queue was full or the agent stopped.
    pub dropped: u64,
    /// Waiting, or being delivered.
    pub queued: u64,
    /// Why the newest attempt failed, until one succeeds. Never holds an address or a token.
    pub last_error: Option<String>,
}

/// Everybody who is to be told. Cheap to clone; when the last clone is dropped, the tasks behind it end as after
/// [`Notifier::close`].
#[derive(Clone, Debug, Default)]
pub struct Notifier {
    slack: Outbox,
    webhook: Outbox,
}

impl Notifier {
    /// Starts a task for each receiver that is configured; they end once the notifier is closed and everything is delivered, two
    /// seconds later at the latest. Call it inside a tokio runtime. A receiver that cannot be told keeps nobody from guarding: its
    /// status says why.
    pub fn start(config: &Config) -> (Self, Vec<JoinHandle<()>>) {
        let host = host::name();
        let (slack, slack_task) = opened(config.slack.as_ref().map(|to| slack::open(to, &host)));
        let (webhook, webhook_task) =
            opened(config.webhook.as_ref().map(|to| webhook::open(to, &host)));
        let tasks = [slack_task, webhook_task].into_iter().flatten().collect();
        (Self { slack, webhook }, tasks)
    }

    /// As [`Notifier::start`], for receivers that all can be told.
    ///
    /// # Errors
    /// Why one of them cannot be; then nothing is started.
    pub fn renew(config: &Config) -> Result<(Self, Vec<JoinHandle<()>>)> {
        let host = host::name();
        let slack = config.slack.as_ref().map(|to| slack::open(to, &host));
        let slack = slack.transpose().context("slack")?;
        let webhook = config.webhook.as_ref().map(|to| webhook::open(to, &host));
        let webhook = webhook.transpose().context("webhook")?;
        let (slack, slack_task) = opened(slack.map(Ok));
        let (webhook, webhook_task) = opened(webhook.map(Ok));
        let tasks = [slack_task, webhook_task].into_iter().flatten().collect();
        Ok((Self { slack, webhook }, tasks))
    }

    /// Passes an event on to everybody; returns at once, whatever state the receivers are in. `mode` is what happened to packets
    /// when it was decided: a message about a ban that drops nothing says so.
    pub fn tell(&self, event: &Event, mode: Mode) {
        // The baseline is computed anew every few minutes: nothing to call people for.
        if event.action != Action::Baseline {
            self.slack.tell(event, mode);
            self.webhook.tell(event, mode);
        }
    }

    /// Asks the tasks to deliver what waits and to end; it takes a few seconds at most. What is told from now on is dropped.
    pub fn close(&self) {
        self.slack.close();
        self.webhook.close();
    }

    /// How it is going with Slack.
    #[must_use]
    pub fn slack(&self) -> Status {
        self.slack.status()
    }

    /// How it is going with the generic webhook.
    #[must_use]
    pub fn webhook(&self) -> Status {
        self.webhook.status()
    }
}

fn opened<R: Receiver>(courier: Option<Result<Courier<R>>>) -> (Outbox, Option<JoinHandle<()>>) {
    match courier {
        None => (Outbox::default(), None),
        Some(Ok(courier)) => {
            let (outbox, task) = courier.start(&delivery::Tempo::REAL);
            (outbox, Some(task))
        }
        Some(Err(problem)) => {
            tracing::error!("{} is not told of anything: {problem:#}", R::NAME);
            (Outbox::Nowhere(format!("{problem:#}").into()), None)
        }
    }
}

/// Waits for the tasks of a notifier that is closed.
///
/// # Errors
/// When one has panicked.
pub async fn ended(tasks: Vec<JoinHandle<()>>) -> Result<()> {
    for task in tasks {
        task.await
            .context("a task that delivers messages has panicked")?;
    }
    Ok(())
}

/// What has come of a test message.
#[derive(Debug)]
pub struct Tried {
    /// The receiver, as its section of the configuration is called.
    pub section: &'static str,
    /// Delivered, or why not; without address and token.
    pub result: Result<(), String>,
}

/// Sends this event to every receiver that is configured, one attempt each, and needs no agent. Nothing comes back where nothing
/// is configured.
pub async fn test(config: &Config, event: &Event) -> Vec<Tried> {
    let host = host::name();
    let told = Told {
        event: event.clone(),
        mode: config.mode,
    };
    let mut all = Vec::new();
    if let Some(to) = &config.slack {
        all.push(tried("slack", slack::open(to, &host), &told).await);
    }
    if let Some(to) = &config.webhook {
        all.push(tried("webhook", webhook::open(to, &host), &told).await);
    }
    all
}

async fn tried<R: Receiver>(
    section: &'static str,
    courier: Result<Courier<R>>,
    told: &Told,
) -> Tried {
    let result = match courier {
        Ok(courier) => courier.test(told.clone()).await,
        Err(problem) => Err(format!("{problem:#}")),
    };
    Tried { section, result }
}

/// Where to tell one receiver.
#[derive(Clone, Debug, Default)]
enum Outbox {
    /// Nobody is to be told.
    #[default]
    Nobody,
    /// Somebody is, but cannot be, for this reason.
    Nowhere(Arc<str>),
    Task(Arc<Mouth>),
}

impl Outbox {
    fn new(queue: Arc<Queue>) -> Self {
        Self::Task(Arc::new(Mouth(queue)))
    }

    fn tell(&self, event: &Event, mode: Mode) {
        if let Self::Task(mouth) = self {
            mouth.0.push(Told {
                event: event.clone(),
                mode,
            });
        }
    }

    fn close(&self) {
        if let Self::Task(mouth) = self {
            mouth.0.close();
        }
    }

    fn status(&self) -> Status {
        match self {
            Self::Nobody => Status::default(),
            Self::Nowhere(why) => Status {
                configured: true,
                last_error: Some(why.as_ref().to_owned()),
                ..Status::default()
            },
            Self::Task(mouth) => mouth.0.status(),
        }
    }
}

/// Closes the queue when nobody is left to speak into it.
#[derive(Debug)]
struct Mouth(Arc<Queue>);

impl Drop for Mouth {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// An event as it was told.
#[derive(Clone, Debug)]
struct Told {
    event: Event,
    mode: Mode,
}

impl Told {
    /// Was nothing dropped for it?
    fn is_observed(&self) -> bool {
        self.event.observe || self.mode == Mode::Observe
    }

    /// Is it about one address, so that there may be very many of the kind?
    fn is_one_of_many(&self) -> bool {
        MANY.contains(&self.event.action) && self.event.subject.is_some()
    }
}

/// What may happen to very many addresses at a time.
const MANY: [Action; 5] = [
    Action::Ban,
    Action::Unban,
    Action::Extend,
    Action::Fail,
    Action::Refuse,
];

/// So many events about single addresses, by kind, and by whether they were only observed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Tally([[u64; 2]; MANY.len()]);

impl Tally {
    fn of(told: &[Told]) -> Self {
        let mut tally = Self::default();
        for told in told {
            tally.add(told);
        }
        tally
    }

    fn add(&mut self, told: &Told) {
        let kind = MANY.iter().position(|action| *action == told.event.action);
        if let Some(counts) = kind.and_then(|kind| self.0.get_mut(kind)) {
            counts[usize::from(told.is_observed())] += 1;
        }
    }

    /// What is in either.
    fn with(mut self, other: &Self) -> Self {
        let counts = self.0.iter_mut().flatten();
        for (count, more) in counts.zip(other.0.iter().flatten()) {
            *count += more;
        }
        self
    }

    /// Kind, whether only observed, and how many; only what there is.
    fn iter(&self) -> impl Iterator<Item = (Action, bool, u64)> {
        let all = MANY.iter().zip(&self.0).flat_map(|(action, counts)| {
            [false, true]
                .into_iter()
                .zip(counts)
                .map(move |(observed, count)| (*action, observed, *count))
        });
        all.filter(|(_, _, count)| *count > 0)
    }

    fn total(&self) -> u64 {
        self.0.iter().flatten().sum()
    }
}

/// What has been told to one receiver and not yet delivered. Many speak, one task takes.
#[derive(Debug)]
struct Queue {
    state: Mutex<State>,
    bound: usize,
    changed: Notify,
    closed: Notify,
}

#[derive(Debug, Default)]
struct State {
    waiting: Waiting,
    in_flight: u64,
    closed: bool,
    status: Status,
}

/// What a receiver takes its batches from.
#[derive(Debug, Default)]
struct Waiting {
    told: VecDeque<Told>,
    /// Those about single addresses that had to make room since the last batch of these.
    left_out: Tally,
}

/// What a receiver makes of what waits.
enum Taken<B> {
    /// The next request is about this.
    Batch(B),
    /// Nothing before that time, unless something else is told.
    Later(Instant),
    /// Nothing.
    Nothing,
}

impl Queue {
    fn new(bound: usize) -> Self {
        Self {
            state: Mutex::default(),
            bound: bound.max(1),
            changed: Notify::new(),
            closed: Notify::new(),
        }
    }

    /// Held for moments only and never across an await. A panic elsewhere leaves nothing half-done in here.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, told: Told) {
        self.state().push(told, self.bound);
        self.changed.notify_one();
    }

    fn close(&self) {
        self.state().closed = true;
        self.changed.notify_one();
        self.closed.notify_one();
    }

    /// Resolves once closed; for one caller.
    async fn closed(&self) {
        self.closed.notified().await;
    }

    /// What the next request is about; `None` when closed and empty.
    async fn take<R: Receiver>(&self, receiver: &mut R) -> Option<R::Batch> {
        loop {
            let until = {
                let mut state = self.state();
                match state.take(receiver, Instant::now()) {
                    Taken::Batch(batch) => return Some(batch),
                    _ if state.closed => return None,
                    Taken::Later(until) => Some(until),
                    Taken::Nothing => None,
                }
            };
            match until {
                // Either is a reason to look again.
                Some(until) => drop(timeout_at(until, self.changed.notified()).await),
                None => self.changed.notified().await,
            }
        }
    }

    /// An attempt failed; there will be more.
    fn stumbled(&self, why: &str) {
        self.state().status.last_error = Some(why.to_owned());
    }

    /// What was taken last is delivered, or given up. Returns how many events that were.
    fn done(&self, result: Result<(), String>) -> u64 {
        let mut state = self.state();
        let count = std::mem::take(&mut state.in_flight);
        match result {
            Ok(()) => state.status.sent += count,
            Err(_) => state.status.failed += count,
        }
        state.status.last_error = result.err();
        count
    }

    /// Nobody takes any more. Returns how many events are left behind.
    fn abandon(&self) -> u64 {
        let mut state = self.state();
        state.closed = true;
        let left = state.waiting.told.len() as u64 + std::mem::take(&mut state.in_flight);
        state.waiting.told.clear();
        state.status.dropped += left;
        left
    }

    fn status(&self) -> Status {
        let state = self.state();
        Status {
            configured: true,
            queued: state.waiting.told.len() as u64 + state.in_flight,
            ..state.status.clone()
        }
    }
}

impl State {
    fn push(&mut self, told: Told, bound: usize) {
        if self.closed {
            self.status.dropped += 1;
            return;
        }
        let waiting = &mut self.waiting;
        waiting.told.push_back(told);
        if waiting.told.len() > bound {
            // The newcomer takes part: it goes itself when all before it are about the site.
            let one_of_many = waiting.told.iter().position(Told::is_one_of_many);
            if let Some(told) = waiting.told.remove(one_of_many.unwrap_or(0)) {
                waiting.left_out.add(&told);
            }
            self.status.dropped += 1;
        }
    }

    fn take<R: Receiver>(&mut self, receiver: &mut R, now: Instant) -> Taken<R::Batch> {
        let before = self.waiting.told.len();
        let taken = receiver.take(&mut self.waiting, now, self.closed);
        self.in_flight = before.saturating_sub(self.waiting.told.len()) as u64;
        taken
    }
}

#[cfg(test)]
mod tests {
    use portcullis_engine::Timestamp;
    use tokio::time::timeout;

    use super::*;

    pub(super) fn told(action: Action, subject: Option<&str>) -> Told {
        let mut event = Event::new(Timestamp::from_secs(1_700_000_000), action, "why");
        event.subject = subject.map(|text| text.parse().unwrap());
        Told {
            event,
            mode: Mode::Enforce,
        }
    }

    /// Closes, waits for the end of the task, and sees that every event is accounted for.
    pub(super) async fn finish(outbox: Outbox, task: JoinHandle<()>, told: u64) -> Status {
        outbox.close();
        timeout(Duration::from_secs(30), task)
            .await
            .expect("the task does not end")
            .unwrap();
        let status = outbox.status();
        assert_eq!(status.queued, 0, "{status:?}");
        assert_eq!(
            status.sent + status.failed + status.dropped,
            told,
            "{status:?}"
        );
        status
    }

    fn actions(told: &[Told]) -> Vec<Action> {
        told.iter().map(|told| told.event.action).collect()
    }

    #[test]
    fn a_full_queue_drops_single_addresses_first_and_the_oldest_of_them() {
        let mut state = State::default();
        state.push(told(Action::Alarm, None), 3);
        for n in 1..=4 {
            state.push(told(Action::Ban, Some(&format!("192.0.2.{n}"))), 3);
        }
        let left: Vec<_> = state
            .waiting
            .told
            .iter()
            .map(|told| told.event.subject)
            .collect();
        let subject = |n: u8| Some(format!("192.0.2.{n}").parse().unwrap());
        assert_eq!(left, [None, subject(3), subject(4)]);
        assert_eq!(
            (state.status.dropped, state.waiting.left_out.total()),
            (2, 2)
        );

        for _ in 0..3 {
            state.push(told(Action::AllClear, None), 3);
        }
        assert_eq!(
            actions(state.waiting.told.make_contiguous()),
            [Action::AllClear; 3],
            "then the oldest of all"
        );
        state.push(told(Action::Ban, Some("192.0.2.9")), 3);
        assert_eq!(
            actions(state.waiting.told.make_contiguous()),
            [Action::AllClear; 3],
            "a ban pushes out no other news"
        );
        assert_eq!(
            (state.status.dropped, state.waiting.left_out.total()),
            (6, 5)
        );
    }

    #[test]
    fn off_takes_everything_and_does_nothing() {
        let notifier = Notifier::default();
        notifier.tell(&told(Action::Alarm, None).event, Mode::Enforce);
        notifier.close();
        assert_eq!(notifier.slack(), Status::default());
        assert_eq!(notifier.webhook(), Status::default());
    }
}
