//! Word to people. Events go into a bounded queue and out by a task of its own; nobody ever waits for it.
//!
//! At the queue's bound the oldest event about a single address makes room (a flood is made of these, and the digest says
//! how many are missing), then the oldest of all; an event about a single address never pushes out one about the site.
//! What is dropped here is still in `history.jsonl`.

pub mod slack;

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use portcullis_engine::{Event, command::Action};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::Notify,
    time::{Instant, timeout_at},
};

/// Where to tell. Cheap to clone; when the last clone is dropped, the task behind it ends as after [`Notifier::close`].
#[derive(Clone, Debug)]
pub struct Notifier(To);

#[derive(Clone, Debug)]
enum To {
    /// Nobody is to be told.
    Nobody,
    /// Somebody is, but cannot be, for this reason.
    Nowhere(Arc<str>),
    Task(Arc<Mouth>),
}

/// How it is going. Counts are of events since the start; `sent + failed + dropped + queued` is all that were told.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Is there anybody to tell?
    pub configured: bool,
    /// Delivered.
    pub sent: u64,
    /// Refused by the receiver, or given up after the last attempt.
    pub failed: u64,
    /// Not delivered because the queue was full or the agent stopped.
    pub dropped: u64,
    /// Waiting, or being delivered.
    pub queued: u64,
    /// Why the newest attempt failed, until one succeeds. Never holds the webhook's address.
    pub last_error: Option<String>,
}

impl Notifier {
    /// Tells nobody.
    #[must_use]
    pub const fn off() -> Self {
        Self(To::Nobody)
    }

    /// Tells nobody, and says in its status why: a guard does not stay away because it cannot call.
    #[must_use]
    pub fn broken(why: &str) -> Self {
        Self(To::Nowhere(why.into()))
    }

    fn new(queue: Arc<Queue>) -> Self {
        Self(To::Task(Arc::new(Mouth(queue))))
    }

    /// Passes an event on; returns at once, whatever state the receiver is in. `observed`: bans are only counted in this
    /// mode, nothing is dropped, and the message must say so.
    pub fn tell(&self, event: &Event, observed: bool) {
        // The baseline is computed anew every few minutes: nothing to call people for.
        if let (To::Task(mouth), true) = (&self.0, event.action != Action::Baseline) {
            mouth.0.push(Told {
                event: event.clone(),
                observed,
            });
        }
    }

    /// Asks the task to deliver what waits and to end; it takes a few seconds at most. What is told from now on is
    /// dropped.
    pub fn close(&self) {
        if let To::Task(mouth) = &self.0 {
            mouth.0.close();
        }
    }

    /// How it is going.
    #[must_use]
    pub fn status(&self) -> Status {
        match &self.0 {
            To::Nobody => Status::default(),
            To::Nowhere(why) => Status {
                configured: true,
                last_error: Some(why.as_ref().to_owned()),
                ..Status::default()
            },
            To::Task(mouth) => mouth.0.status(),
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
    observed: bool,
}

impl Told {
    /// Is it about one address, so that there may be very many of the kind?
    fn is_one_of_many(&self) -> bool {
        let action = self.event.action;
        matches!(
            action,
            Action::Ban | Action::Unban | Action::Extend | Action::Fail | Action::Refuse
        ) && self.event.subject.is_some()
    }
}

/// What one message is about: one event, or every waiting one about a single address.
#[derive(Debug)]
struct Batch {
    /// Never empty.
    told: Vec<Told>,
    /// So many more of the kind were dropped since the last digest.
    left_out: u64,
}

impl Batch {
    fn is_about_addresses(&self) -> bool {
        self.told.iter().any(Told::is_one_of_many)
    }

    fn is_digest(&self) -> bool {
        self.told.len() > 1 || self.left_out > 0
    }
}

/// What has been told and not yet delivered. Many speak, one task takes.
#[derive(Debug)]
struct Queue {
    state: Mutex<State>,
    bound: usize,
    changed: Notify,
    closed: Notify,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Told>,
    left_out: u64,
    in_flight: u64,
    closed: bool,
    status: Status,
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

    /// What the next message is about; `None` when closed and empty. Until `gather_until`, events about single addresses
    /// are left to gather, and the others overtake them.
    async fn take(&self, gather_until: Instant) -> Option<Batch> {
        loop {
            let gathering = {
                let mut state = self.state();
                let gathering = !state.closed && Instant::now() < gather_until;
                if let Some(batch) = state.next(gathering) {
                    return Some(batch);
                }
                if state.closed {
                    return None;
                }
                !state.waiting.is_empty()
            };
            if gathering {
                // Either is a reason to look again.
                let _ = timeout_at(gather_until, self.changed.notified()).await;
            } else {
                self.changed.notified().await;
            }
        }
    }

    /// An attempt failed; there will be more.
    fn stumbled(&self, why: &str) {
        self.state().status.last_error = Some(why.to_owned());
    }

    /// What was taken last is delivered, or given up.
    fn done(&self, result: Result<(), String>) {
        let mut state = self.state();
        let count = std::mem::take(&mut state.in_flight);
        match result {
            Ok(()) => state.status.sent += count,
            Err(_) => state.status.failed += count,
        }
        state.status.last_error = result.err();
    }

    /// Nobody takes any more. Returns how many events are left behind.
    fn abandon(&self) -> u64 {
        let mut state = self.state();
        state.closed = true;
        let left = state.waiting.len() as u64 + std::mem::take(&mut state.in_flight);
        state.waiting.clear();
        state.status.dropped += left;
        left
    }

    fn status(&self) -> Status {
        let state = self.state();
        Status {
            configured: true,
            queued: state.waiting.len() as u64 + state.in_flight,
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
        self.waiting.push_back(told);
        if self.waiting.len() > bound {
            // The newcomer takes part: it goes itself when all before it are about the site.
            let one_of_many = self.waiting.iter().position(Told::is_one_of_many);
            self.waiting.remove(one_of_many.unwrap_or(0));
            self.left_out += u64::from(one_of_many.is_some());
            self.status.dropped += 1;
        }
    }

    fn next(&mut self, gathering: bool) -> Option<Batch> {
        let first = self
            .waiting
            .iter()
            .position(|told| !(gathering && told.is_one_of_many()))?;
        let batch = if self.waiting[first].is_one_of_many() {
            let (many, rest) = self.waiting.drain(..).partition(Told::is_one_of_many);
            self.waiting = rest;
            Batch {
                told: Vec::from(many),
                left_out: std::mem::take(&mut self.left_out),
            }
        } else {
            Batch {
                told: self.waiting.remove(first).into_iter().collect(),
                left_out: 0,
            }
        };
        self.in_flight = batch.told.len() as u64;
        Some(batch)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use portcullis_engine::Timestamp;
    use tokio::time::timeout;

    use super::*;

    pub(super) fn told(action: Action, subject: Option<&str>) -> Told {
        let mut event = Event::new(Timestamp::from_secs(1_700_000_000), action, "why");
        event.subject = subject.map(|text| text.parse().unwrap());
        Told {
            event,
            observed: false,
        }
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
            .iter()
            .map(|told| told.event.subject)
            .collect();
        let subject = |n: u8| Some(format!("192.0.2.{n}").parse().unwrap());
        assert_eq!(left, [None, subject(3), subject(4)]);
        assert_eq!((state.status.dropped, state.left_out), (2, 2));

        for _ in 0..3 {
            state.push(told(Action::AllClear, None), 3);
        }
        assert_eq!(
            actions(state.waiting.make_contiguous()),
            [Action::AllClear; 3],
            "then the oldest of all"
        );
        state.push(told(Action::Ban, Some("192.0.2.9")), 3);
        assert_eq!(
            actions(state.waiting.make_contiguous()),
            [Action::AllClear; 3],
            "a ban pushes out no other news"
        );
        assert_eq!((state.status.dropped, state.left_out), (6, 5));
    }

    #[test]
    fn bans_that_wait_become_one_batch_and_other_news_keeps_its_place() {
        let mut state = State::default();
        state.push(told(Action::Start, None), 9);
        state.push(told(Action::Ban, Some("192.0.2.1")), 9);
        state.push(told(Action::Alarm, None), 9);
        state.push(told(Action::Unban, Some("192.0.2.1")), 9);
        state.push(told(Action::Notice, Some("192.0.2.1")), 9);
        let mut batches = Vec::new();
        while let Some(batch) = state.next(false) {
            batches.push(actions(&batch.told));
        }
        let expected = [
            vec![Action::Start],
            vec![Action::Ban, Action::Unban],
            vec![Action::Alarm],
            vec![Action::Notice],
        ];
        assert_eq!(batches, expected);
    }

    #[test]
    fn while_bans_gather_other_news_overtakes_them() {
        let mut state = State::default();
        state.push(told(Action::Ban, Some("192.0.2.1")), 9);
        assert!(state.next(true).is_none());
        state.push(told(Action::Alarm, None), 9);
        assert_eq!(
            state.next(true).map(|batch| actions(&batch.told)),
            Some(vec![Action::Alarm])
        );
        assert!(state.next(true).is_none());
        assert_eq!(
            state.next(false).map(|batch| actions(&batch.told)),
            Some(vec![Action::Ban])
        );
    }

    #[tokio::test]
    async fn closing_ends_the_gathering() {
        let queue = Queue::new(9);
        queue.push(told(Action::Ban, Some("192.0.2.1")));
        let far = Instant::now() + Duration::from_hours(1);
        let taken = timeout(Duration::from_millis(20), queue.take(far)).await;
        assert!(taken.is_err(), "taken too early: {taken:?}");
        queue.close();
        let taken = timeout(Duration::from_secs(20), queue.take(far))
            .await
            .unwrap();
        assert_eq!(taken.map(|batch| batch.told.len()), Some(1));
        assert!(queue.take(far).await.is_none());
    }

    #[test]
    fn off_takes_everything_and_does_nothing() {
        let notifier = Notifier::off();
        notifier.tell(&told(Action::Alarm, None).event, false);
        notifier.close();
        assert_eq!(notifier.status(), Status::default());
    }
}
