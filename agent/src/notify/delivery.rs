//! The way from a queue to a receiver: at the receiver's pace, and again until it is there.
//!
//! At least once: an answer that gets lost is a message that comes twice. Who cannot be reached is tried for as long as the agent
//! runs, so what an outage costs is what the queue has no room for. Who answers that it is busy or broken is tried with the same
//! request for an hour; then the next one gets its turn, for it may have been the request's fault.

use std::{sync::Arc, time::Duration};

use portcullis_engine::time::format_duration;
use serde_json::Value;
use tokio::{
    task::JoinHandle,
    time::{Instant, sleep, sleep_until},
};

use super::{Limits, Outbox, Queue, Taken, Told, Waiting, endpoint::Endpoint};

/// How what is told becomes requests.
pub(super) trait Receiver: Send + Sized + 'static {
    /// What it is called, in messages to people.
    const NAME: &'static str;

    /// What one request is about.
    type Batch: Send + Sync;

    /// Takes what the next request is about out of what waits. `is_last`: no more will come, so nothing is to be waited for.
    fn take(&mut self, waiting: &mut Waiting, now: Instant, is_last: bool) -> Taken<Self::Batch>;

    /// The request's JSON.
    fn body(&self, batch: &Self::Batch) -> Value;
}

/// One attempt to hand a request over.
pub(super) trait Post: Send + Sync + 'static {
    fn post(&self, body: &Value) -> impl Future<Output = Result<(), Failure>> + Send;
}

/// Why an attempt has failed, in words without address and token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// Refused; it would be again.
    Final(String),
    /// Answered, and worth another attempt, after as long as was asked for.
    Busy(String, Option<Duration>),
    /// Nobody has answered.
    Unreached(String),
}

/// How patient to be. Tests are less so.
#[derive(Clone, Debug)]
pub(super) struct Tempo {
    /// After the first attempt; it doubles with each.
    pub first_backoff: Duration,
    pub max_backoff: Duration,
    /// The longest wait that a receiver can ask for.
    pub max_asked: Duration,
    /// How long a request is tried that is answered, and not taken.
    pub patience: Duration,
    /// From closing to giving up.
    pub grace: Duration,
}

impl Tempo {
    pub(super) const REAL: Self = Self {
        first_backoff: Duration::from_secs(1),
        max_backoff: Duration::from_mins(1),
        max_asked: Duration::from_mins(5),
        patience: Duration::from_hours(1),
        grace: Duration::from_secs(2),
    };
}

/// Brings batches to one receiver.
pub(super) struct Courier<R, P = Endpoint> {
    receiver: R,
    post: P,
    limits: Limits,
    /// Keeps requests apart.
    not_before: Instant,
    /// Has the newest attempt failed? Then that has been said.
    in_trouble: bool,
}

impl<R: Receiver, P: Post> Courier<R, P> {
    pub(super) fn new(receiver: R, post: P, limits: Limits) -> Self {
        Self {
            receiver,
            post,
            limits,
            not_before: Instant::now(),
            in_trouble: false,
        }
    }

    /// Sends this alone, in one attempt.
    pub(super) async fn test(mut self, told: Told) -> Result<(), String> {
        let mut waiting = Waiting {
            told: [told].into(),
            ..Waiting::default()
        };
        let Taken::Batch(batch) = self.receiver.take(&mut waiting, self.not_before, true) else {
            return Err("there is nothing to send".to_owned());
        };
        let result = self.post.post(&self.receiver.body(&batch)).await;
        result.map_err(|failure| match failure {
            Failure::Busy(why, Some(asked)) => {
                format!(
                    "{why}; it asks to be left alone for {}",
                    format_duration(asked)
                )
            }
            Failure::Final(why) | Failure::Busy(why, None) | Failure::Unreached(why) => why,
        })
    }

    /// Starts the task that delivers, inside a tokio runtime.
    pub(super) fn start(self, tempo: &Tempo) -> (Outbox, JoinHandle<()>) {
        let queue = Arc::new(Queue::new(self.limits.queue));
        let outbox = Outbox::new(Arc::clone(&queue));
        (outbox, tokio::spawn(self.run(queue, tempo.clone())))
    }

    async fn run(mut self, queue: Arc<Queue>, tempo: Tempo) {
        tokio::select! {
            () = self.deliver_all(&queue, &tempo) => {}
            () = async { queue.closed().await; sleep(tempo.grace).await } => {}
        }
        let left = queue.abandon();
        if left > 0 {
            tracing::warn!(
                events = left,
                "stopped before {} was told of everything",
                R::NAME
            );
        }
    }

    async fn deliver_all(&mut self, queue: &Queue, tempo: &Tempo) {
        loop {
            // What is told while we wait here still gets into the next request.
            sleep_until(self.not_before).await;
            let Some(batch) = queue.take(&mut self.receiver).await else {
                break;
            };
            let body = self.receiver.body(&batch);
            let result = self.deliver(&body, queue, tempo).await;
            let why = result.as_ref().err().cloned();
            let events = queue.done(result);
            if let Some(why) = why {
                tracing::error!(events, "{} was not told: {why}", R::NAME);
            }
        }
    }

    async fn deliver(&mut self, body: &Value, queue: &Queue, tempo: &Tempo) -> Result<(), String> {
        let mut backoff = tempo.first_backoff;
        let mut answering_since = None;
        loop {
            let result = self.post.post(body).await;
            let now = Instant::now();
            self.not_before = now + self.limits.min_interval;
            let (why, wait) = match result {
                Ok(()) => {
                    if std::mem::take(&mut self.in_trouble) {
                        tracing::info!("{} can be told again", R::NAME);
                    }
                    return Ok(());
                }
                Err(Failure::Final(why)) => return Err(why),
                Err(Failure::Busy(why, asked)) => {
                    let since = *answering_since.get_or_insert(now);
                    if now.duration_since(since) >= tempo.patience {
                        let tried = format_duration(tempo.patience);
                        return Err(format!("{why}, and so for {tried}: given up"));
                    }
                    (
                        why,
                        asked.map_or(backoff, |asked| asked.min(tempo.max_asked)),
                    )
                }
                Err(Failure::Unreached(why)) => (why, backoff),
            };
            if !std::mem::replace(&mut self.in_trouble, true) {
                tracing::warn!(
                    "{} cannot be told now, and will be tried again: {why}",
                    R::NAME
                );
            }
            queue.stumbled(&why);
            sleep(wait).await;
            sleep_until(self.not_before).await;
            backoff = (backoff * 2).min(tempo.max_backoff);
        }
    }
}
