//! Many bans by one request: decided at once, answered when the back end has told of each.

use std::collections::BTreeSet;

use portcullis_engine::{Ban, Subject, Term, Wish, ledger::Length};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::{Agent, requests::fit};
use crate::control::{Reply, Wanted};

/// What has come of many bans.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BannedMany {
    /// So many are in force that were not before, or not for as long.
    pub banned: usize,
    /// So many stood already, for as long at least.
    pub stood: usize,
    /// So many have ended.
    pub over: usize,
    /// Who is not banned, and why.
    pub refused: Vec<(Subject, String)>,
    /// Who is banned but not kept out yet, and why: that is tried again.
    pub failed: Vec<(Subject, String)>,
}

/// Somebody who waits for many bans to be in force.
#[derive(Debug)]
pub(super) struct Waiting {
    missing: BTreeSet<Subject>,
    answer: BannedMany,
    reply: oneshot::Sender<Reply>,
}

impl Waiting {
    /// Is there still somebody?
    pub(super) fn is_awaited(&self) -> bool {
        !self.reply.is_closed()
    }

    fn answer(self) {
        drop(self.reply.send(Reply::done(&self.answer)));
    }
}

impl Agent {
    pub(super) fn ban_many(&mut self, bans: Vec<Wanted>, by: &str, reply: oneshot::Sender<Reply>) {
        let now = self.now();
        let mut waiting = Waiting {
            missing: BTreeSet::new(),
            answer: BannedMany::default(),
            reply,
        };
        for wanted in bans {
            let Wanted { subject, term, .. } = wanted;
            let length = match term {
                Term::Until(end) if end <= now => {
                    waiting.answer.over += 1;
                    continue;
                }
                Term::Until(end) => Length::For(end.since(now)),
                Term::Permanent => Length::Permanent,
            };
            let known = self.engine.ban_of(subject);
            if known.is_some_and(|ban| keeps_out_as_much(ban, &wanted)) {
                waiting.answer.stood += 1;
                continue;
            }
            let wish = Wish {
                reason: fit(&wanted.reason),
                by: by.to_owned(),
                observe: wanted.observe,
                confirm: None,
            };
            match self.engine.ban(subject, length, wish, now) {
                Ok(()) => {
                    waiting.missing.insert(subject);
                }
                Err(refusal) => waiting.answer.refused.push((subject, refusal.to_string())),
            }
        }
        if waiting.missing.is_empty() {
            waiting.answer();
        } else {
            self.many.push(waiting);
        }
    }

    /// Tells whoever waits for it what became of a ban.
    pub(super) fn hear_of_many(&mut self, subject: Subject, problem: Option<&String>) {
        for waiting in &mut self.many {
            if !waiting.missing.remove(&subject) {
                continue;
            }
            match problem {
                None => waiting.answer.banned += 1,
                Some(problem) => waiting.answer.failed.push((subject, problem.clone())),
            }
        }
        let is_done = |waiting: &mut Waiting| waiting.missing.is_empty();
        for waiting in self.many.extract_if(.., is_done) {
            waiting.answer();
        }
    }
}

/// Would the new ban add nothing?
fn keeps_out_as_much(ban: &Ban, wanted: &Wanted) -> bool {
    let lasts = match (ban.term, wanted.term) {
        (Term::Permanent, _) => true,
        (Term::Until(_), Term::Permanent) => false,
        (Term::Until(end), Term::Until(wanted)) => end >= wanted,
    };
    match (ban.observe, wanted.observe) {
        // It would be let in again.
        (false, true) => true,
        (true, false) => false,
        _ => lasts && ban.gate.has_wire(),
    }
}

#[cfg(test)]
mod tests {
    use portcullis_engine::{Origin, Timestamp};

    use super::*;

    #[test]
    fn a_ban_stands_against_whatever_would_let_in_sooner() {
        let term = |secs: Option<u64>| match secs {
            Some(secs) => Term::Until(Timestamp::from_secs(secs)),
            None => Term::Permanent,
        };
        let stands = |(known, is_observed), (wanted, observe)| {
            let ban = Ban {
                observe: is_observed,
                ..Ban::new(
                    "192.0.2.1".parse().unwrap(),
                    Timestamp::from_secs(1),
                    term(known),
                    Origin::Operator,
                )
            };
            let wanted = Wanted {
                subject: ban.subject,
                term: term(wanted),
                reason: String::new(),
                observe,
            };
            keeps_out_as_much(&ban, &wanted)
        };
        assert!(stands((Some(10), false), (Some(10), false)));
        assert!(!stands((Some(10), false), (Some(11), false)));
        assert!(!stands((Some(10), false), (None, false)));
        assert!(stands((None, false), (Some(11), false)));
        assert!(stands((Some(10), false), (None, true)), "it is kept out");
        assert!(!stands((None, true), (Some(10), false)), "it is let in");
        assert!(stands((None, true), (Some(10), true)));
    }
}
