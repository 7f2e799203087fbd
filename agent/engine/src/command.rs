//! What the engine asks of the world, and what the world answers.

use std::{fmt, net::IpAddr, time::Duration};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::{
    baseline,
    detect::Finding,
    ledger::{Ban, Gate, Offences, Origin, Term},
    subject::Subject,
    time::{Timestamp, format_duration},
};

/// One thing to do. The shell carries commands out in order, each kind by its own means, and waits for none.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// Put this ban in force; answered by [`Outcome::Banned`].
    Ban(Ban),
    /// Take this ban away, for this reason; answered by [`Outcome::Unbanned`]. Decided at that time.
    Unban(Ban, String, Timestamp),
    /// Look whether whom this bans is still sending; answered by [`crate::Engine::looked`], or not at all.
    Look(Subject),
    /// Have the back end spare whom the allowlist names now ([`crate::Engine::allowlist`]).
    Allowlist,
    /// Find out whether a client that was just banned is a search engine's crawler, by the address that it came from; answered by
    /// [`crate::Engine::verified`] if it is, or not at all.
    Verify(Subject, IpAddr),
    /// Make the ledger on disk say this.
    Save(Change),
    /// Put it on record and tell people.
    Record(Event),
}

/// A change of what must survive a restart.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// A ban was decided.
    Ban(Ban),
    /// A ban has ended.
    Unban(Subject),
    /// What a subject has on its account.
    Offences(Subject, Offences),
    /// What a subject had on its account is forgotten.
    Forget(Subject),
    /// An operator has put a network on the allowlist, or taken it off.
    Allow(IpNet, Option<Allowed>),
    /// What has been learnt.
    Baseline(Box<baseline::Saved>),
}

/// Who has put a network on the allowlist, when and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Allowed {
    /// When.
    pub since: Timestamp,
    /// Who.
    pub by: String,
    /// Why.
    pub reason: String,
}

/// What became of a command.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// This ban is in force, or why it is not.
    Banned(Ban, Result<(), String>),
    /// This ban, lifted for this reason, is gone, or why it is not.
    Unbanned(Ban, String, Result<(), String>),
}

/// Something that goes on record. Serialises to one object of `history.jsonl`; displays as the one-line form
/// `[time] ACTION subject | condition | rate | baseline | duration`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// When it was decided.
    pub time: Timestamp,
    /// What happened.
    pub action: Action,
    /// Whom it concerns; `None` for the whole site or the agent itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<Subject>,
    /// Why, in words.
    pub condition: String,
    /// The evidence, where a detector spoke.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finding: Option<Finding>,
    /// Which step of the ban schedule, from 1; absent for bans without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tier: Option<u32>,
    /// When the ban was decided, where it is about one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Timestamp>,
    /// When the ban ends, where it is about one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub term: Option<Term>,
    /// Who decided, where that applies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Origin>,
    /// The ban it is about only counts packets, whatever the mode.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub observe: bool,
    /// Where that ban keeps its subject out.
    #[serde(default, skip_serializing_if = "Gate::is_wire")]
    pub gate: Gate,
}

/// What an [`Event`] says has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// A ban is in force (in observe mode: counted, not dropped).
    Ban,
    /// A ban has ended and its entry is gone.
    Unban,
    /// A ban was to end, and its source is still sending: it goes on.
    Extend,
    /// A ban was not made: allowlisted, or the ban table is full.
    Refuse,
    /// The back end could not carry a ban or its end out; the reconciliation tries again.
    Fail,
    /// The site as a whole left its normal traffic. Never bans anybody.
    Alarm,
    /// The site is back to normal.
    AllClear,
    /// The detector would make more bans than it may before people have looked: some have to wait.
    Hold,
    /// None has to wait any more.
    Resume,
    /// The baseline was computed anew.
    Baseline,
    /// The agent has started.
    Start,
    /// The agent stops.
    Stop,
    /// Something the operator should know and that fits nothing above.
    Notice,
}

impl Action {
    /// In capitals, for the one-line form.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ban => "BAN",
            Self::Unban => "UNBAN",
            Self::Extend => "EXTEND",
            Self::Refuse => "REFUSE",
            Self::Fail => "FAIL",
            Self::Alarm => "ALARM",
            Self::AllClear => "ALL-CLEAR",
            Self::Hold => "HOLD",
            Self::Resume => "RESUME",
            Self::Baseline => "BASELINE",
            Self::Start => "START",
            Self::Stop => "STOP",
            Self::Notice => "NOTICE",
        }
    }
}

impl Event {
    /// An event about nobody in particular.
    #[must_use]
    pub fn new(time: Timestamp, action: Action, condition: impl Into<String>) -> Self {
        Self {
            time,
            action,
            subject: None,
            condition: condition.into(),
            finding: None,
            tier: None,
            since: None,
            term: None,
            origin: None,
            observe: false,
            gate: Gate::Wire,
        }
    }

    /// An event about a ban.
    #[must_use]
    pub fn of_ban(
        time: Timestamp,
        action: Action,
        ban: &Ban,
        condition: impl Into<String>,
    ) -> Self {
        Self {
            time,
            action,
            subject: Some(ban.subject),
            condition: condition.into(),
            finding: ban.finding.clone(),
            tier: ban.tier,
            since: Some(ban.since),
            term: Some(ban.term),
            origin: Some(ban.origin),
            observe: ban.observe,
            gate: ban.gate,
        }
    }

    /// How long the ban was to last, or, where it has ended, how long it has stood; `None` without a ban or an end.
    #[must_use]
    pub fn duration(&self) -> Option<Duration> {
        match (self.action, self.since?, self.term?) {
            (Action::Unban, since, _) => Some(self.time.since(since)),
            (_, since, Term::Until(end)) => Some(end.since(since)),
            (_, _, Term::Permanent) => None,
        }
    }
}

impl Event {
    /// The one-line form. A ban that was only observed is not called one.
    #[must_use]
    pub fn line(&self, observed: bool) -> String {
        let action = match self.action {
            Action::Ban if observed => "WOULD-BAN",
            Action::Unban if observed => "WOULD-UNBAN",
            Action::Extend if observed => "WOULD-EXTEND",
            action => action.name(),
        };
        let subject = self
            .subject
            .map_or_else(|| "site".to_owned(), |subject| subject.to_string());
        let (rate, baseline) = match &self.finding {
            Some(finding) => (
                format!("{:.2} req/s", finding.rate),
                format!(
                    "mean {:.2} stddev {:.2} z {:.1}",
                    finding.mean, finding.stddev, finding.score
                ),
            ),
            None => ("-".to_owned(), "-".to_owned()),
        };
        let duration = match (self.duration(), self.term) {
            (Some(duration), _) => format_duration(duration),
            (None, Some(Term::Permanent)) => "permanent".to_owned(),
            (None, _) => "-".to_owned(),
        };
        let gate = if self.gate == Gate::Nginx {
            " (in Nginx)"
        } else {
            ""
        };
        format!(
            "[{}] {action} {subject} | {}{gate} | {rate} | {baseline} | {duration}",
            self.time, self.condition
        )
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.line(false))
    }
}
