//! What operators ask for through the control socket, and what they are answered.
use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use ipnet::IpNet;
use portcullis_engine::{
    Ban, Refusal, Subject, Term, Timestamp, Wish, allowlist::Why, command::Allowed, ledger::Length,
};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::{Agent, Status, allowed};
use crate::{
    control::{Asked, Reply, Request},
    enforce::{self, Lifetime, worker::Job},
};

/// What `portcullis ban` answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Banned {
    /// When the ban ends.
    pub term: Term,
    /// Are its packets only counted?
    pub observed: bool,
    /// Parts of the subject that the allowlist keeps out of it.
    pub spared: Vec<IpNet>,
}

/// One entry of the allowlist, as `portcullis allow list` shows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AllowRow {
    /// Which network.
    pub net: IpNet,
    /// Why it is on it.
    pub why: String,
    /// When an operator has put it there.
    pub since: Option<Timestamp>,
    /// Which.
    pub by: Option<String>,
}

/// One ban, as `portcullis bans` shows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BanRow {
    /// The ban.
    #[serde(flatten)]
    pub ban: Ban,
    /// Packets that it has matched; none when the kernel has no entry for it.
    pub hits: Option<u64>,
    /// How long ago the newest of them was.
    pub last_seen_secs: Option<u64>,
    /// What is left of it; none when it is permanent.
    pub remaining_secs: Option<u64>,
}

/// What an operator waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Awaited {
    Ban,
    Unban,
}

impl Agent {
    pub(super) fn request(&mut self, asked: Asked) {
        let Asked { request, by, reply } = asked;
        let now = self.now();
        match request {
            Request::Status => {
                let status = self.status();
                let (sender, counters) = oneshot::channel();
                self.worker.ask(Job::Counters(sender));
                answer(counters, reply, move |counters| {
                    with_counters(status, counters)
                });
            }
            Request::Bans => {
                let bans = self.engine.shared_bans();
                let (sender, entries) = oneshot::channel();
                self.worker.ask(Job::Entries(sender));
                answer(entries, reply, move |entries| rows(bans, &entries, now));
            }
            Request::Explain { subject } => {
                let explained = self.explained(subject);
                if explained.known.bans.is_empty() {
                    drop(reply.send(Reply::done(&explained)));
                    return;
                }
                let (sender, entries) = oneshot::channel();
                let bans = explained.known.bans.iter();
                let bans = bans.map(|ban| ban.subject).collect();
                self.worker.ask(Job::Look(bans, sender));
                answer(entries, reply, move |entries| explained.with(&entries));
            }
            Request::Ban {
                subject,
                secs,
                reason,
                observe,
                confirm_secs,
            } => {
                let wish = Wish {
                    reason: fit(&reason),
                    by,
                    observe,
                    confirm: confirm_secs.map(Duration::from_secs),
                };
                let length = secs.map_or(Length::Permanent, |secs| {
                    Length::For(Duration::from_secs(secs))
                });
                match self.engine.ban(subject, length, wish, now) {
                    Ok(()) => self.waiting.push((subject, Awaited::Ban, reply)),
                    Err(refusal) => drop(reply.send(Reply::refused(refusal.to_string()))),
                }
            }
            Request::BanMany { bans } => self.ban_many(bans, &by, reply),
            Request::Unban { subject } => {
                match self
                    .engine
                    .unban(subject, "lifted by an operator".to_owned(), now)
                {
                    Ok(()) => self.waiting.push((subject, Awaited::Unban, reply)),
                    Err(refusal) => {
                        let why = self.explain_refusal(subject, &refusal);
                        drop(reply.send(Reply::refused(why)));
                    }
                }
            }
            Request::Confirm { subject } => match self.engine.confirm(subject, now) {
                Ok(()) => self.waiting.push((subject, Awaited::Ban, reply)),
                Err(refusal) => drop(reply.send(Reply::refused(refusal.to_string()))),
            },
            Request::Allow { net, reason } => {
                let allowed = Allowed {
                    since: now,
                    by,
                    reason: fit(&reason),
                };
                match self.engine.allow(net, allowed, now) {
                    Ok(lifted) => self.enforce_allowlist(reply, lifted),
                    Err(refusal) => drop(reply.send(Reply::refused(refusal.to_string()))),
                }
            }
            Request::Disallow { net } => match self.engine.disallow(net, &by, now) {
                Ok(()) => {
                    let still = self.engine.allowlist().covering(Subject::of_net(net));
                    let still = still.map(|(net, _)| net);
                    self.enforce_allowlist(reply, still);
                }
                Err(refusal) => drop(reply.send(Reply::refused(refusal.to_string()))),
            },
            Request::Allowlist => drop(reply.send(Reply::done(&self.allowlist()))),
            Request::UnbanAll => self.unban_all(reply),
            Request::Reload => self.reload(&by, Some(reply)),
        }
    }

    fn unban_all(&mut self, reply: oneshot::Sender<Reply>) {
        let now = self.now();
        let subjects: Vec<Subject> = self.engine.bans().map(|ban| ban.subject).collect();
        let lifted = subjects.into_iter().filter(|subject| {
            self.engine
                .unban(
                    *subject,
                    "lifted by an operator, with all others".to_owned(),
                    now,
                )
                .is_ok()
        });
        let lifted = lifted.count();
        self.dispatch(None);
        self.lifted.push((lifted, reply));
        self.answer_lifted();
    }

    /// Has the back end spare who is allowed now, and answers then.
    fn enforce_allowlist<A: Serialize + Send + 'static>(
        &mut self,
        reply: oneshot::Sender<Reply>,
        said: A,
    ) {
        self.dispatch(None);
        let (sender, done) = oneshot::channel();
        self.worker.allow(allowed(&self.engine), sender);
        answer(done, reply, move |()| said);
    }

    /// Who is never banned, and why.
    fn allowlist(&self) -> Vec<AllowRow> {
        let rows = self.engine.allowlist().iter().map(|(net, reasons)| {
            let by_operator = reasons.iter().find_map(|why| match why {
                Why::Operator(allowed) => Some(allowed),
                _ => None,
            });
            let why: Vec<String> = reasons.iter().map(Why::to_string).collect();
            let why = why.join("; ");
            AllowRow {
                net,
                why,
                since: by_operator.map(|allowed| allowed.since),
                by: by_operator.map(|allowed| allowed.by.clone()),
            }
        });
        rows.collect()
    }

    /// Whoever has lifted all bans is answered when the back end has them all: behind them in its queue.
    pub(super) fn answer_lifted(&mut self) {
        if self.worker.aside() > 0 {
            return;
        }
        for (lifted, reply) in std::mem::take(&mut self.lifted) {
            let (sender, done) = oneshot::channel();
            self.worker.ask(Job::Counters(sender));
            answer(done, reply, move |_| lifted);
        }
    }

    /// Whom the allowlist keeps out of a ban.
    pub(super) fn spared(&self, subject: Subject) -> Vec<IpNet> {
        let inside = self.engine.allowlist().all_inside(subject);
        inside.map(|(net, _)| net).collect()
    }

    /// Whoever asks to lift the ban of an address usually means the one that keeps it out.
    fn explain_refusal(&self, subject: Subject, refusal: &Refusal) -> String {
        let around = self.engine.bans().find(|ban| ban.subject.covers(subject));
        match around {
            Some(ban) => format!(
                "{subject} is banned as part of {}: lift that ban",
                ban.subject
            ),
            None => refusal.to_string(),
        }
    }
}

/// An operator's reason goes into logs, terminals and messages.
pub(super) fn fit(reason: &str) -> String {
    let chars = reason.chars().filter(|c| !c.is_control());
    chars.take(200).collect()
}

/// Answers a request once the back end has; without the runtime's loop waiting for it.
fn answer<T: Send + 'static, A: Serialize>(
    from: oneshot::Receiver<Result<T>>,
    reply: oneshot::Sender<Reply>,
    make: impl FnOnce(T) -> A + Send + 'static,
) {
    tokio::spawn(async move {
        let read = from.await.context("the back end is too busy to answer");
        let read = read.and_then(|read| read).map(make);
        drop(reply.send(Reply::of(read)));
    });
}

fn with_counters(mut status: Status, counters: enforce::Counters) -> Status {
    status.counters = counters
        .into_iter()
        .map(|(name, count)| (name.to_owned(), count))
        .collect();
    status
}

fn rows(bans: Vec<Arc<Ban>>, entries: &[enforce::Entry], now: Timestamp) -> Vec<BanRow> {
    let entries: std::collections::HashMap<Subject, &enforce::Entry> =
        entries.iter().map(|entry| (entry.subject, entry)).collect();
    let mut rows: Vec<BanRow> = bans
        .into_iter()
        .map(|ban| {
            let entry = entries.get(&ban.subject);
            BanRow {
                hits: entry.map(|entry| entry.hits),
                last_seen_secs: entry
                    .and_then(|entry| entry.last_seen)
                    .map(|ago| ago.as_secs()),
                remaining_secs: match Lifetime::of(ban.term, now) {
                    Lifetime::For(left) => Some(left.as_secs()),
                    Lifetime::Permanent => None,
                },
                ban: Arc::unwrap_or_clone(ban),
            }
        })
        .collect();
    rows.sort_unstable_by(|a, b| {
        b.ban
            .since
            .cmp(&a.ban.since)
            .then(a.ban.subject.cmp(&b.ban.subject))
    });
    rows
}
