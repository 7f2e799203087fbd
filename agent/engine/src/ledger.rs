//! The ledger: who is banned until when, and what everybody has on their account. It is the intent; the enforcers
//! converge to it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

use crate::{
    detect::Finding,
    subject::{Hashing, Subject},
    time::Timestamp,
};

/// When a ban ends. "For ever" and "not at all" are different things, so neither is an absent time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Term {
    /// Then.
    Until(Timestamp),
    /// Not by itself.
    Permanent,
}

impl Term {
    /// The same end by a clock that was set by so many milliseconds.
    #[must_use]
    pub const fn shifted(self, millis: i64) -> Self {
        match self {
            Self::Until(end) => Self::Until(end.shifted(millis)),
            Self::Permanent => Self::Permanent,
        }
    }

    /// Has it ended?
    #[must_use]
    pub fn is_over(self, now: Timestamp) -> bool {
        matches!(self, Self::Until(end) if end <= now)
    }
}

/// How long a ban lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Length {
    /// So long.
    For(Duration),
    /// Until somebody lifts it.
    Permanent,
}

impl Length {
    /// Longer ones are as long as this: a hundred years, which every clock that counts them can hold.
    pub const LONGEST: Duration = Duration::from_secs(100 * 365 * 86_400);

    /// The term of a ban that starts now.
    #[must_use]
    pub fn from(self, now: Timestamp) -> Term {
        match self {
            Self::For(duration) => Term::Until(now + duration.min(Self::LONGEST)),
            Self::Permanent => Term::Permanent,
        }
    }
}

/// Who decided on a ban.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// A detector.
    Detector,
    /// A person.
    Operator,
}

/// Where a ban keeps its subject out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gate {
    /// At the network card or in the host's firewall, by the address that packets have.
    #[default]
    Wire,
    /// In Nginx, by the address that it has from a trusted proxy; and by that of a connection without one.
    Nginx,
    /// At both.
    Both,
}

impl Gate {
    /// At the wire, perhaps among others?
    #[must_use]
    pub const fn has_wire(self) -> bool {
        matches!(self, Self::Wire | Self::Both)
    }

    /// In Nginx, perhaps among others?
    #[must_use]
    pub const fn has_nginx(self) -> bool {
        matches!(self, Self::Nginx | Self::Both)
    }

    /// At each of either.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Wire, Self::Wire) => Self::Wire,
            (Self::Nginx, Self::Nginx) => Self::Nginx,
            _ => Self::Both,
        }
    }

    #[expect(
        clippy::trivially_copy_pass_by_ref,
        reason = "serde hands over references"
    )]
    pub(crate) fn is_wire(&self) -> bool {
        *self == Self::Wire
    }
}

/// One ban.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ban {
    /// Whom it keeps out.
    pub subject: Subject,
    /// When it was decided.
    pub since: Timestamp,
    /// When it ends.
    pub term: Term,
    /// Step of the schedule, from 1; none for an operator's ban.
    pub tier: Option<u32>,
    /// Who decided.
    pub origin: Origin,
    /// Why, in words.
    pub reason: String,
    /// The evidence, for a detector's ban.
    pub finding: Option<Finding>,
    /// Its packets are counted and pass, whatever the mode.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub observe: bool,
    /// Where.
    #[serde(default, skip_serializing_if = "Gate::is_wire")]
    pub gate: Gate,
    /// How often it was extended, since its subject went on sending.
    #[serde(default, skip_serializing_if = "is_none")]
    pub extended: u32,
    /// Which operator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<String>,
    /// When it is to end once it is confirmed; until then it ends soon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub once_confirmed: Option<Term>,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde hands over references"
)]
const fn is_none(count: &u32) -> bool {
    *count == 0
}

impl Ban {
    /// A ban at the wire by no detector and of no step: what is to be different is put in its place.
    #[must_use]
    pub const fn new(subject: Subject, since: Timestamp, term: Term, origin: Origin) -> Self {
        Self {
            subject,
            since,
            term,
            tier: None,
            origin,
            reason: String::new(),
            finding: None,
            observe: false,
            gate: Gate::Wire,
            extended: 0,
            by: None,
            once_confirmed: None,
        }
    }

    /// The same ban by a clock that was set by so many milliseconds: as long, and ending at the same moment.
    #[must_use]
    pub fn shifted(self, millis: i64) -> Self {
        Self {
            since: self.since.shifted(millis),
            term: self.term.shifted(millis),
            once_confirmed: self.once_confirmed.map(|term| term.shifted(millis)),
            ..self
        }
    }
}

/// How much an offence weighs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weight {
    /// It earns whatever the schedule says.
    Full,
    /// It never keeps anybody out for good, unless the schedule knows nothing else.
    Light,
}

/// What a subject has on its account.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offences {
    /// How often it was flagged, since an operator last pardoned it.
    pub count: u32,
    /// The newest time that something was settled: it was flagged, its ban ended, or it was pardoned. Requests up to then are
    /// held against it no more.
    pub last: Timestamp,
}

/// The bound that stopped a ban.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the ban table is full ({0} bans; key bans.max_bans)")]
pub struct Full(pub usize);

/// Bans and offences, both bounded: in a full ban table the detector's ban that ends soonest gives way to a longer one or
/// an operator's ([`Ledger::gives_way`]), else the new one is refused; a full offence table forgets the offender that has
/// kept still the longest.
#[derive(Debug)]
pub struct Ledger {
    schedule: Vec<Length>,
    max_bans: usize,
    max_offenders: usize,
    /// An offence is forgotten after so long without another; zero: never.
    forgive: Duration,
    /// Shared, so that all of them can be handed out quickly.
    bans: IndexMap<Subject, Arc<Ban>, Hashing>,
    ends: BTreeSet<(Timestamp, Subject)>,
    /// Those of them that may give way: the detector's.
    yielding: BTreeSet<(Timestamp, Subject)>,
    /// How many bans there are of each prefix length that is not a client's own: a client is looked up once for each.
    wide: BTreeMap<(bool, u8), usize>,
    offences: HashMap<Subject, Offences, Hashing>,
    stillest: BTreeSet<(Timestamp, Subject)>,
}

impl Ledger {
    /// An empty ledger. `schedule` holds the ban lengths of the first, second … offence; the last one repeats. An
    /// empty schedule means every ban is permanent. An offence is forgotten after `forgive` without another; zero: never.
    #[must_use]
    pub fn new(
        schedule: Vec<Length>,
        max_bans: usize,
        max_offenders: usize,
        forgive: Duration,
    ) -> Self {
        Self {
            schedule,
            max_bans,
            max_offenders,
            forgive,
            bans: IndexMap::default(),
            ends: BTreeSet::new(),
            yielding: BTreeSet::new(),
            wide: BTreeMap::new(),
            offences: HashMap::default(),
            stillest: BTreeSet::new(),
        }
    }

    /// Goes by another schedule, and forgives otherwise, from now on. What is decided stays.
    pub fn set(&mut self, schedule: Vec<Length>, forgive: Duration) {
        self.schedule = schedule;
        self.forgive = forgive;
    }

    /// Counts an offence; returns the step of the schedule that it has earned (from 1), that step's length, the new
    /// account, and whose account had to be forgotten to make room.
    pub fn offend(
        &mut self,
        subject: Subject,
        weight: Weight,
        now: Timestamp,
    ) -> (u32, Length, Offences, Option<Subject>) {
        let count = self.standing(subject, now);
        let (step, length) = self.step(count.saturating_add(1), weight);
        // A light one never brings anybody to where the next one is for good.
        let finite = self
            .schedule
            .iter()
            .take_while(|length| **length != Length::Permanent);
        let most = u32::try_from(finite.count().saturating_sub(1)).unwrap_or(u32::MAX);
        let count = match weight {
            Weight::Light => count.max(most.min(count.saturating_add(1))),
            Weight::Full => count.saturating_add(1),
        };
        let offences = Offences { count, last: now };
        let forgotten = self.set_offences(subject, offences);
        (step, length, offences, forgotten)
    }

    /// The step of the schedule that the next offence earns (from 1), and its length.
    #[must_use]
    pub fn next_step(&self, subject: Subject, weight: Weight, now: Timestamp) -> (u32, Length) {
        self.step(self.standing(subject, now).saturating_add(1), weight)
    }

    /// Offences that are not forgotten yet.
    fn standing(&self, subject: Subject, now: Timestamp) -> u32 {
        let Some(offences) = self.offences(subject) else {
            return 0;
        };
        let silent = now.since(offences.last).as_millis();
        let forgotten = silent.checked_div(self.forgive.as_millis()).unwrap_or(0);
        let forgotten = u32::try_from(forgotten).unwrap_or(u32::MAX);
        offences.count.saturating_sub(forgotten)
    }

    /// The bans that keep a subject out, narrowest first: the first one decides.
    pub fn around(&self, subject: Subject) -> impl Iterator<Item = &Ban> {
        let lengths = (0..=subject.net().prefix_len()).rev();
        let around = lengths.filter_map(move |length| subject.widened(length));
        around.filter_map(|subject| self.get(subject))
    }

    fn step(&self, count: u32, weight: Weight) -> (u32, Length) {
        let mut step = (count as usize).min(self.schedule.len().max(1));
        let is_for_good = |step: usize| self.schedule.get(step - 1) == Some(&Length::Permanent);
        while weight == Weight::Light && step > 1 && is_for_good(step) {
            step -= 1;
        }
        let length = self.schedule.get(step - 1).copied();
        (
            u32::try_from(step).unwrap_or(u32::MAX),
            length.unwrap_or(Length::Permanent),
        )
    }

    /// Puts an account into the table; returns whose had to be forgotten.
    pub fn set_offences(&mut self, subject: Subject, offences: Offences) -> Option<Subject> {
        if let Some(old) = self.offences.insert(subject, offences) {
            self.stillest.remove(&(old.last, subject));
        }
        self.stillest.insert((offences.last, subject));
        if self.offences.len() <= self.max_offenders {
            return None;
        }
        let (_, forgotten) = self.stillest.pop_first()?;
        self.offences.remove(&forgotten);
        Some(forgotten)
    }

    /// The clock was set by so many milliseconds: all times move with it.
    pub fn shift(&mut self, millis: i64) {
        let bans = self.shared_bans();
        for ban in bans {
            // It is in the table: there is room for it.
            let _never_full = self.insert(Arc::unwrap_or_clone(ban).shifted(millis));
        }
        let offences: Vec<(Timestamp, Subject)> =
            std::mem::take(&mut self.stillest).into_iter().collect();
        for (last, subject) in offences {
            let last = last.shifted(millis);
            if let Some(account) = self.offences.get_mut(&subject) {
                account.last = last;
                self.stillest.insert((last, subject));
            }
        }
    }

    /// All accounts, the stillest first.
    pub fn accounts(&self) -> impl Iterator<Item = (Subject, Offences)> {
        let subjects = self.stillest.iter().map(|(_, subject)| *subject);
        subjects.filter_map(|subject| Some((subject, self.offences(subject)?)))
    }

    /// Enters the accounts that a former run has left; returns whose there is no room for. Much quicker than one by one.
    pub fn restore_offences(&mut self, mut accounts: Vec<(Subject, Offences)>) -> Vec<Subject> {
        accounts.sort_unstable_by_key(|(subject, account)| (account.last, *subject));
        let stillest = accounts.len().saturating_sub(self.max_offenders);
        let forgotten = accounts.drain(..stillest).map(|(subject, _)| subject);
        let forgotten = forgotten.collect();
        let times = accounts.iter();
        self.stillest = times
            .map(|(subject, account)| (account.last, *subject))
            .collect();
        self.offences = accounts.into_iter().collect();
        forgotten
    }

    /// What is on a subject's account is settled now; pardoned, it starts at the first step again. Returns the account to keep,
    /// if there is one or it must be known that it was pardoned, and whose had to be forgotten.
    pub fn settle(
        &mut self,
        subject: Subject,
        pardoned: bool,
        now: Timestamp,
    ) -> Option<(Offences, Option<Subject>)> {
        let old = self.offences(subject);
        let count = match old {
            // What is forgotten is so from now on: whoever was kept out could not offend.
            Some(old) if !pardoned => old.count,
            None if !pardoned => return None,
            _ => 0,
        };
        let offences = Offences { count, last: now };
        Some((offences, self.set_offences(subject, offences)))
    }

    /// Is what a client did at a time settled, with itself or as part of a prefix?
    #[must_use]
    pub fn is_settled(&self, client: Subject, at: Timestamp) -> bool {
        let widest = if client.is_v6() { 16 } else { 8 };
        !self.offences.is_empty()
            && (widest..=client.net().prefix_len())
                .filter_map(|length| client.widened(length))
                .any(|subject| {
                    let account = self.offences.get(&subject);
                    account.is_some_and(|account| at <= account.last)
                })
    }

    /// What a subject has on its account.
    #[must_use]
    pub fn offences(&self, subject: Subject) -> Option<Offences> {
        self.offences.get(&subject).copied()
    }

    /// Enters a ban; one of the same subject is replaced.
    ///
    /// # Errors
    /// [`Full`] when the table has no room for another subject.
    pub fn insert(&mut self, ban: Ban) -> Result<(), Full> {
        if self.bans.len() >= self.max_bans && !self.bans.contains_key(&ban.subject) {
            return Err(Full(self.max_bans));
        }
        self.remove(ban.subject);
        if let Term::Until(end) = ban.term {
            self.ends.insert((end, ban.subject));
            if ban.origin == Origin::Detector {
                self.yielding.insert((end, ban.subject));
            }
        }
        if !ban.subject.is_client() {
            *self.wide.entry(kind(ban.subject)).or_insert(0) += 1;
        }
        self.bans.insert(ban.subject, Arc::new(ban));
        Ok(())
    }

    /// Enters the bans that a former run has left, for which there is room. Much quicker than one by one.
    pub fn restore(&mut self, bans: Vec<Ban>) {
        let bans = bans.into_iter();
        self.bans = bans.map(|ban| (ban.subject, Arc::new(ban))).collect();
        let ends = self.bans.values().filter_map(|ban| match ban.term {
            Term::Until(end) => Some((end, ban.subject, ban.origin)),
            Term::Permanent => None,
        });
        let ends: Vec<(Timestamp, Subject, Origin)> = ends.collect();
        let by_detector = ends
            .iter()
            .filter(|(.., origin)| *origin == Origin::Detector);
        self.yielding = by_detector
            .map(|(end, subject, _)| (*end, *subject))
            .collect();
        self.ends = ends
            .into_iter()
            .map(|(end, subject, _)| (end, subject))
            .collect();
        self.wide.clear();
        let subjects = self.bans.keys();
        for subject in subjects.filter(|subject| !subject.is_client()) {
            *self.wide.entry(kind(*subject)).or_insert(0) += 1;
        }
    }

    /// Takes a ban out.
    pub fn remove(&mut self, subject: Subject) -> Option<Ban> {
        let ban = self.bans.swap_remove(&subject)?;
        if let Term::Until(end) = ban.term {
            self.ends.remove(&(end, subject));
            self.yielding.remove(&(end, subject));
        }
        if !subject.is_client()
            && let Some(count) = self.wide.get_mut(&kind(subject))
        {
            *count -= 1;
            if *count == 0 {
                self.wide.remove(&kind(subject));
            }
        }
        Some(Arc::unwrap_or_clone(ban))
    }

    /// The next ban whose time is over.
    #[must_use]
    pub fn next_over(&self, now: Timestamp) -> Option<Subject> {
        self.ends
            .first()
            .filter(|(end, _)| *end <= now)
            .map(|(_, subject)| *subject)
    }

    /// Bans that end up to a moment, the first to end first.
    pub fn ending(&self, until: Timestamp) -> impl Iterator<Item = &Ban> {
        let due = self.ends.iter().take_while(move |(end, _)| *end <= until);
        due.filter_map(|(_, subject)| self.get(*subject))
    }

    /// The length of a step of the schedule, from 1.
    #[must_use]
    pub fn length_of(&self, step: u32) -> Length {
        self.step(step.max(1), Weight::Full).1
    }

    /// When the next ban ends.
    #[must_use]
    pub fn next_end(&self) -> Option<Timestamp> {
        self.ends.first().map(|(end, _)| *end)
    }

    /// Whose ban gives way to a new one in a full table: the detector's ban that ends soonest, if it ends before the new
    /// one or the new one is an operator's. Operators' bans and permanent ones never give way.
    #[must_use]
    pub fn gives_way(&self, term: Term, origin: Origin) -> Option<Subject> {
        let (end, subject) = self.yielding.first()?;
        let outlasted = match term {
            Term::Until(new_end) => *end < new_end,
            Term::Permanent => true,
        };
        (outlasted || origin == Origin::Operator).then_some(*subject)
    }

    /// The ban of exactly this subject.
    #[must_use]
    pub fn get(&self, subject: Subject) -> Option<&Ban> {
        self.bans.get(&subject).map(Arc::as_ref)
    }

    /// Is a client that came in by this gate kept out, by a ban of its own or by that of a prefix around it? The narrowest decides,
    /// as in the kernel: whoever is only observed can offend, and so can who is banned at another gate.
    #[must_use]
    pub fn keeps_out(&self, client: Subject, by: Gate) -> bool {
        if self.bans.is_empty() {
            return false;
        }
        let around = self
            .wide
            .keys()
            .rev()
            .filter(|(is_v6, _)| client.is_v6() == *is_v6)
            .filter_map(|(_, length)| client.widened(*length));
        std::iter::once(client)
            .chain(around)
            .find_map(|subject| self.get(subject))
            .is_some_and(|ban| !ban.observe && (by.is_wire() || ban.gate.has_nginx()))
    }

    /// All bans, in no particular but a reproducible order.
    pub fn bans(&self) -> impl ExactSizeIterator<Item = &Ban> {
        self.bans.values().map(Arc::as_ref)
    }

    /// The same as they are now, for whoever looks at them elsewhere: far quicker than copies of their evidence.
    #[must_use]
    pub fn shared_bans(&self) -> Vec<Arc<Ban>> {
        self.bans.values().cloned().collect()
    }
}

/// Family and prefix length.
fn kind(subject: Subject) -> (bool, u8) {
    (subject.is_v6(), subject.net().prefix_len())
}

#[cfg(test)]
mod tests {
    use super::*;

    const T0: Timestamp = Timestamp::from_secs(1_000);

    fn subject(text: &str) -> Subject {
        text.parse().unwrap()
    }

    fn ban(text: &str, term: Term) -> Ban {
        Ban::new(subject(text), T0, term, Origin::Operator)
    }

    fn ledger() -> Ledger {
        let minutes = |n: u64| Length::For(Duration::from_secs(n * 60));
        Ledger::new(
            vec![minutes(10), minutes(30), minutes(120), Length::Permanent],
            3,
            2,
            Duration::ZERO,
        )
    }

    #[test]
    fn each_offence_earns_the_next_step_and_the_last_one_repeats() {
        let mut ledger = ledger();
        let steps: Vec<_> = (0..5)
            .map(|_| ledger.offend(subject("192.0.2.1"), Weight::Full, T0))
            .map(|(step, length, ..)| (step, length))
            .collect();
        let minutes = |n: u64| Length::For(Duration::from_secs(n * 60));
        let expected = [
            (1, minutes(10)),
            (2, minutes(30)),
            (3, minutes(120)),
            (4, Length::Permanent),
            (4, Length::Permanent),
        ];
        assert_eq!(steps, expected);
        let light = ledger.next_step(subject("192.0.2.1"), Weight::Light, T0);
        assert_eq!(light, (3, minutes(120)));
        let mut light = || {
            let (step, length, offences, _) =
                ledger.offend(subject("192.0.2.2"), Weight::Light, T0);
            (step, length, offences.count)
        };
        let steps: Vec<_> = (0..4).map(|_| light()).collect();
        let expected = [
            (1, minutes(10), 1),
            (2, minutes(30), 2),
            (3, minutes(120), 2),
            (3, minutes(120), 2),
        ];
        assert_eq!(steps, expected);
        let full = ledger.next_step(subject("192.0.2.2"), Weight::Full, T0);
        assert_eq!(full, (3, minutes(120)));
    }

    #[test]
    fn permanent_is_neither_over_nor_absent() {
        let mut ledger = ledger();
        ledger.insert(ban("192.0.2.1", Term::Permanent)).unwrap();
        assert!(ledger.keeps_out(subject("192.0.2.1"), Gate::Wire));
        assert_eq!(ledger.next_over(Timestamp::MAX), None);
        assert!(!Term::Permanent.is_over(Timestamp::MAX));
    }

    #[test]
    fn bans_end_in_order_and_a_replaced_one_ends_at_its_new_time() {
        let mut ledger = ledger();
        let at = Timestamp::from_secs;
        ledger
            .insert(ban("192.0.2.1", Term::Until(at(1_100))))
            .unwrap();
        ledger
            .insert(ban("192.0.2.2", Term::Until(at(1_050))))
            .unwrap();
        ledger
            .insert(ban("192.0.2.1", Term::Until(at(1_200))))
            .unwrap();
        assert_eq!(ledger.next_over(at(1_049)), None);
        assert_eq!(ledger.next_over(at(1_150)), Some(subject("192.0.2.2")));
        ledger.remove(subject("192.0.2.2"));
        assert_eq!(ledger.next_over(at(1_199)), None);
        assert_eq!(ledger.next_over(at(1_200)), Some(subject("192.0.2.1")));
    }

    #[test]
    fn a_prefix_ban_covers_its_clients_until_it_is_lifted() {
        let mut ledger = ledger();
        ledger.insert(ban("192.0.2.0/24", Term::Permanent)).unwrap();
        assert!(ledger.keeps_out(subject("192.0.2.9"), Gate::Wire));
        ledger.remove(subject("192.0.2.0/24"));
        assert!(!ledger.keeps_out(subject("192.0.2.9"), Gate::Wire));
    }

    #[test]
    fn whoever_is_only_observed_is_not_banned() {
        let mut ledger = ledger();
        let observed = |text| Ban {
            observe: true,
            ..ban(text, Term::Permanent)
        };
        ledger.insert(observed("192.0.2.0/24")).unwrap();
        ledger.insert(observed("192.0.2.9")).unwrap();
        assert!(!ledger.keeps_out(subject("192.0.2.9"), Gate::Wire));
        ledger.insert(ban("192.0.0.0/16", Term::Permanent)).unwrap();
        assert!(
            !ledger.keeps_out(subject("192.0.2.9"), Gate::Wire),
            "the narrowest decides"
        );
        assert!(!ledger.keeps_out(subject("192.0.2.8"), Gate::Wire));
        assert!(ledger.keeps_out(subject("192.0.3.1"), Gate::Wire));
        ledger.insert(ban("192.0.2.0/24", Term::Permanent)).unwrap();
        assert!(ledger.keeps_out(subject("192.0.2.8"), Gate::Wire));
    }

    #[test]
    fn a_full_ban_table_refuses_and_still_renews() {
        let mut ledger = ledger();
        for n in 1..=3 {
            ledger
                .insert(ban(&format!("192.0.2.{n}"), Term::Permanent))
                .unwrap();
        }
        assert_eq!(
            ledger.insert(ban("192.0.2.4", Term::Permanent)),
            Err(Full(3))
        );
        assert_eq!(ledger.insert(ban("192.0.2.3", Term::Until(T0))), Ok(()));
        assert_eq!(ledger.bans().len(), 3);
    }

    #[test]
    fn in_a_full_table_the_detector_s_ban_that_ends_soonest_gives_way() {
        let mut ledger = ledger();
        let at = Timestamp::from_secs;
        let by = |text, term, origin| Ban {
            origin,
            ..ban(text, term)
        };
        ledger
            .insert(by("192.0.2.1", Term::Until(at(1_100)), Origin::Operator))
            .unwrap();
        ledger
            .insert(by("192.0.2.2", Term::Until(at(1_200)), Origin::Detector))
            .unwrap();
        ledger
            .insert(by("192.0.2.3", Term::Permanent, Origin::Detector))
            .unwrap();
        let gives_way = |term, origin| ledger.gives_way(term, origin);
        let second = Some(subject("192.0.2.2"));
        assert_eq!(gives_way(Term::Until(at(1_300)), Origin::Detector), second);
        assert_eq!(gives_way(Term::Permanent, Origin::Detector), second);
        assert_eq!(
            gives_way(Term::Until(at(1_150)), Origin::Detector),
            None,
            "a shorter one is not worth it"
        );
        assert_eq!(gives_way(Term::Until(at(1_150)), Origin::Operator), second);
        // By an operator's word now, it gives way no more.
        ledger
            .insert(by("192.0.2.2", Term::Until(at(1_200)), Origin::Operator))
            .unwrap();
        assert_eq!(ledger.gives_way(Term::Permanent, Origin::Operator), None);
        ledger
            .insert(by("192.0.2.2", Term::Until(at(1_200)), Origin::Detector))
            .unwrap();
        assert_eq!(ledger.gives_way(Term::Permanent, Origin::Operator), second);
        ledger.remove(subject("192.0.2.2"));
        assert_eq!(ledger.gives_way(Term::Permanent, Origin::Operator), None);
    }

    #[test]
    fn a_full_offence_table_forgets_the_stillest() {
        let mut ledger = ledger();
        for (n, second) in [(1, 10), (2, 20), (1, 30)] {
            ledger.offend(
                subject(&format!("192.0.2.{n}")),
                Weight::Full,
                Timestamp::from_secs(second),
            );
        }
        let (.., forgotten) =
            ledger.offend(subject("192.0.2.3"), Weight::Full, Timestamp::from_secs(40));
        assert_eq!(forgotten, Some(subject("192.0.2.2")));
        assert_eq!(
            ledger
                .offences(subject("192.0.2.1"))
                .map(|offences| offences.count),
            Some(2)
        );
        assert_eq!(ledger.offences(subject("192.0.2.2")), None);
    }
}
