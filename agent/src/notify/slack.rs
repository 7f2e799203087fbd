//! Slack's incoming webhook.
//!
//! Such a webhook cannot change a message, so a flood is told in digests that grow rarer, each with the running total: the first
//! two messages come at once, the next one ten times the least interval later, then thirty, then sixty times. When nothing more has
//! come in such a time, a last message says so, with the sum.

mod message;

use std::{path::PathBuf, time::Duration};

use anyhow::Result;
use portcullis_engine::Timestamp;
use serde_json::Value;
use tokio::time::Instant;

use super::{
    Limits, Taken, Tally, Told, Waiting,
    delivery::{Courier, Receiver},
    endpoint::{Address, Endpoint},
};

/// Where and how to tell.
#[derive(Clone, Debug)]
pub struct Settings {
    /// File that holds the webhook's address.
    pub webhook_file: PathBuf,
    /// Address of the dashboard, for the link.
    pub dashboard: Option<String>,
    /// Address of the runbook, for the link.
    pub runbook: Option<String>,
    /// How fast, and how much may wait. Slack takes one message a second.
    pub limits: Limits,
}

/// Reads the file.
pub(super) fn open(settings: &Settings, host: &str) -> Result<Courier<Slack>> {
    let address = Address::read(
        &settings.webhook_file,
        "the Slack webhook",
        "put the one line that Slack shows for it there, https://hooks.slack.com/services/…",
    )?;
    let endpoint = Endpoint::new(address, None, settings.limits.timeout)?;
    let links = Links {
        dashboard: settings.dashboard.clone(),
        runbook: settings.runbook.clone(),
    };
    let slack = Slack::new(host, links, settings.limits.min_interval);
    Ok(Courier::new(slack, endpoint, settings.limits))
}

/// What is in every message.
#[derive(Clone, Debug, Default)]
pub(super) struct Links {
    pub dashboard: Option<String>,
    pub runbook: Option<String>,
}

/// See the module's documentation.
pub(super) struct Slack {
    /// The name of this host, for people.
    host: String,
    links: Links,
    min_interval: Duration,
    /// While events about single addresses follow one another closely.
    flood: Option<Flood>,
}

/// What one message is about.
#[derive(Debug)]
pub(super) enum News {
    /// One event.
    One(Box<Told>),
    /// Everything that waits about single addresses, or that a flood of these is over.
    Digest(Box<Digest>),
}

/// See [`News`].
#[derive(Debug, Default)]
pub(super) struct Digest {
    told: Vec<Told>,
    /// So many more of the kind had to make room in the queue.
    left_out: Tally,
    /// Since the flood began, this included.
    so_far: Option<SoFar>,
}

impl Digest {
    /// Of those that are new with this message.
    fn new_ones(&self) -> Tally {
        Tally::of(&self.told).with(&self.left_out)
    }
}

/// What a flood amounts to.
#[derive(Clone, Copy, Debug)]
struct SoFar {
    all: Tally,
    span: Option<Span>,
    is_over: bool,
}

/// The first and the newest of some events.
#[derive(Clone, Copy, Debug)]
struct Span {
    first: Timestamp,
    newest: Timestamp,
}

impl Span {
    fn of(told: &[Told]) -> Option<Self> {
        let times = || told.iter().map(|told| told.event.time);
        Some(Self {
            first: times().min()?,
            newest: times().max()?,
        })
    }

    fn with(self, other: Self) -> Self {
        Self {
            first: self.first.min(other.first),
            newest: self.newest.max(other.newest),
        }
    }
}

/// Events about single addresses that follow one another closely.
#[derive(Debug)]
struct Flood {
    so_far: SoFar,
    /// Digests that had to wait for their time; more than none make it one.
    waited: usize,
    /// Does the next one have to?
    gathers: bool,
    /// Until then. When nothing new has come by then, it is over.
    until: Instant,
}

/// From one digest of a flood to the next, in least intervals.
const SPACING: [u32; 3] = [10, 30, 60];

impl Slack {
    pub(super) fn new(host: &str, links: Links, min_interval: Duration) -> Self {
        Self {
            host: host.to_owned(),
            links,
            min_interval,
            flood: None,
        }
    }

    /// Takes everything about single addresses.
    fn gather(&mut self, waiting: &mut Waiting, now: Instant) -> News {
        let (many, rest) = waiting.told.drain(..).partition(Told::is_one_of_many);
        waiting.told = rest;
        let mut digest = Digest {
            told: Vec::from(many),
            left_out: std::mem::take(&mut waiting.left_out),
            so_far: None,
        };
        let before = self.flood.take();
        // After a single message, such a time without another is the end of it.
        let before = before.filter(|flood| flood.gathers || now < flood.until);

        let (mut all, mut span) = (digest.new_ones(), Span::of(&digest.told));
        let is_one = all.total() == 1;
        let mut waited = 0;
        if let Some(before) = &before {
            all = all.with(&before.so_far.all);
            span = match (span, before.so_far.span) {
                (Some(new), Some(old)) => Some(new.with(old)),
                (new, old) => new.or(old),
            };
            waited = before.waited + usize::from(before.gathers);
        }
        let so_far = SoFar {
            all,
            span,
            is_over: false,
        };
        digest.so_far = (waited > 0).then_some(so_far);
        let spacing = SPACING[waited.min(SPACING.len() - 1)];
        self.flood = Some(Flood {
            so_far,
            waited,
            // Two messages close together are how a flood begins.
            gathers: before.is_some() || !is_one,
            until: now + self.min_interval.saturating_mul(spacing),
        });
        if is_one
            && waited == 0
            && let Some(told) = digest.told.pop()
        {
            return News::One(Box::new(told));
        }
        News::Digest(Box::new(digest))
    }

    /// What there is to say when nothing waits that may be told now.
    fn calm(&mut self, now: Instant, is_last: bool) -> Taken<News> {
        match self.flood.take() {
            Some(flood) if now < flood.until && !is_last => {
                let until = flood.until;
                self.flood = Some(flood);
                Taken::Later(until)
            }
            Some(flood) if flood.waited > 0 && now >= flood.until => {
                let so_far = Some(SoFar {
                    is_over: true,
                    ..flood.so_far
                });
                Taken::Batch(News::Digest(Box::new(Digest {
                    so_far,
                    ..Digest::default()
                })))
            }
            _ => Taken::Nothing,
        }
    }
}

impl Receiver for Slack {
    const NAME: &'static str = "Slack";

    type Batch = News;

    /// News of the site overtake those of single addresses only while these have to wait.
    fn take(&mut self, waiting: &mut Waiting, now: Instant, is_last: bool) -> Taken<News> {
        let gathers = |flood: &Flood| flood.gathers && now < flood.until && !is_last;
        let gathers = self.flood.as_ref().is_some_and(gathers);
        let site = waiting.told.iter().position(|told| !told.is_one_of_many());
        let site = site.filter(|place| *place == 0 || gathers);
        if let Some(told) = site.and_then(|place| waiting.told.remove(place)) {
            return Taken::Batch(News::One(Box::new(told)));
        }
        if !gathers && (!waiting.told.is_empty() || waiting.left_out.total() > 0) {
            return Taken::Batch(self.gather(waiting, now));
        }
        self.calm(now, is_last)
    }

    fn body(&self, news: &News) -> Value {
        message::payload(news, self)
    }
}
