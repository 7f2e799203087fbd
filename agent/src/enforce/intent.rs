//! What is to be in force, as the thread that owns the back end knows it, and how the kernel is held against it.
//!
//! A comparison goes in steps of some thousand entries, so that with a million bans a new one waits for a few milliseconds
//! and not for a second. Changes may come between two steps: they change the intent too, so they are no drift.

use std::{collections::HashMap, time::Duration};

use anyhow::Result;
use indexmap::IndexMap;
use portcullis_engine::Subject;
use tracing::warn;

use super::{Change, Cursor, Drift, Enforcer, Entry, Lifetime};
use crate::runtime::clock;

/// How far an entry's end may be from what is wanted before it counts as drift: clocks are read one after the other, and
/// ipset counts whole seconds.
const TOLERANCE: Duration = Duration::from_secs(3);

/// Bans that a step looks at.
const STEP: usize = if cfg!(test) { 3 } else { 4096 };

/// A ban as it is to be.
#[derive(Clone, Copy, Debug)]
struct Wanted {
    /// On the boot clock; none for a permanent one.
    end: Option<Duration>,
    observed: bool,
    /// The newest comparison that has found it in the kernel, or needs not look for it.
    seen: u32,
}

/// All bans that are to be in force.
#[derive(Debug, Default)]
pub struct Intent {
    bans: IndexMap<Subject, Wanted, foldhash::fast::RandomState>,
    /// Comparisons so far.
    comparison: u32,
    stage: Stage,
}

/// Where a comparison is.
#[derive(Clone, Copy, Debug, Default)]
enum Stage {
    /// None is under way.
    #[default]
    Idle,
    /// The kernel's entries from there on are still to be read.
    Reading(Cursor),
    /// The first so many bans are still to be looked at: are they among what was read?
    Searching(usize),
}

/// What a step has found and done.
#[derive(Debug, Default)]
pub struct Step {
    /// What was not as it should be.
    pub drift: Drift,
    /// Bans that are in force again.
    pub repaired: Vec<Change>,
    /// Whose bans or releases failed.
    pub failed: Vec<Subject>,
    /// It was the last one.
    pub is_last: bool,
}

impl FromIterator<Change> for Intent {
    fn from_iter<I: IntoIterator<Item = Change>>(changes: I) -> Self {
        let changes = changes.into_iter();
        let mut intent = Self::default();
        intent.bans.reserve(changes.size_hint().0);
        let now = clock::boot();
        for change in changes {
            intent.note_at(change, now);
        }
        intent
    }
}

impl Intent {
    /// How many bans.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bans.len()
    }

    /// Are there none?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bans.is_empty()
    }

    /// From now on this is to be so.
    pub fn note(&mut self, change: Change) {
        self.note_at(change, clock::boot());
    }

    fn note_at(&mut self, change: Change, now: Duration) {
        let (subject, lifetime, observed) = match change {
            Change::Ban(subject, lifetime) => (subject, lifetime, false),
            Change::Observe(subject, lifetime) => (subject, lifetime, true),
            Change::Unban(subject) => {
                self.bans.swap_remove(&subject);
                return;
            }
        };
        let wanted = Wanted {
            end: match lifetime {
                Lifetime::For(left) => Some(now + left),
                Lifetime::Permanent => None,
            },
            observed,
            seen: self.comparison,
        };
        self.bans.insert(subject, wanted);
    }

    /// Those inside a subject, but not itself, that are only observed.
    #[must_use]
    pub fn observed_inside(&self, subject: Subject) -> Vec<Subject> {
        let inside = |other: &Subject| *other != subject && subject.covers(*other);
        let observed = self.bans.iter().filter(|(_, wanted)| wanted.observed);
        observed.map(|(other, _)| *other).filter(inside).collect()
    }

    /// Begins a comparison, unless one is under way.
    pub fn compare(&mut self) {
        if !self.is_comparing() {
            self.comparison = self.comparison.wrapping_add(1);
            self.stage = Stage::Reading(Cursor::default());
        }
    }

    /// Is a comparison under way?
    #[must_use]
    pub const fn is_comparing(&self) -> bool {
        !matches!(self.stage, Stage::Idle)
    }

    /// Goes on with the comparison, and repairs what it finds.
    ///
    /// # Errors
    /// When the kernel's entries cannot be read; the comparison has ended then.
    pub fn step(&mut self, enforcer: &mut dyn Enforcer) -> Result<Step> {
        let mut step = Step::default();
        let changes = match std::mem::take(&mut self.stage) {
            Stage::Idle => Vec::new(),
            Stage::Reading(from) => {
                let (entries, next) = enforcer.entries_from(from)?;
                let changes = self.hold(&entries, enforcer.longest(), &mut step.drift);
                self.stage = next.map_or(Stage::Searching(self.bans.len()), Stage::Reading);
                changes
            }
            Stage::Searching(left) => {
                // Whoever is removed meanwhile leaves its place to the last one, which was looked at first.
                let left = left.min(self.bans.len());
                let from = left.saturating_sub(STEP);
                let changes = self.search(from..left, enforcer.longest(), &mut step.drift);
                if from > 0 {
                    self.stage = Stage::Searching(from);
                }
                changes
            }
        };
        repair(enforcer, &changes, &mut step);
        step.is_last = !self.is_comparing();
        Ok(step)
    }

    /// Are so many bans, picked at random, in force as they should be? Where that cannot be told without reading all, nobody
    /// looks.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn looks_right(&self, enforcer: &mut dyn Enforcer, of: usize) -> Result<bool> {
        if !enforcer.looks_up() {
            return Ok(true);
        }
        let picked = fastrand::choose_multiple(0..self.bans.len(), of);
        let (now, longest) = (clock::boot(), enforcer.longest());
        let picked = picked.into_iter().filter_map(|n| self.bans.get_index(n));
        // One whose time is nearly over may be gone by now.
        let picked: Vec<(&Subject, &Wanted)> = picked
            .filter(|(_, wanted)| wanted.end.is_none_or(|end| end > now + TOLERANCE))
            .collect();
        let subjects: Vec<Subject> = picked.iter().map(|(subject, _)| **subject).collect();
        let found = enforcer.entries_of(&subjects)?;
        let found: HashMap<Subject, Entry> = found
            .into_iter()
            .map(|entry| (entry.subject, entry))
            .collect();
        Ok(picked.iter().all(|(subject, wanted)| {
            let entry = found.get(subject);
            entry.is_some_and(|entry| wanted.is_met(entry, now, longest))
        }))
    }

    /// Holds entries against what is wanted; returns what is to be changed. What nobody asked for goes here, before what is
    /// missing comes: it may hold the room for it.
    fn hold(
        &mut self,
        entries: &[Entry],
        longest: Option<Duration>,
        drift: &mut Drift,
    ) -> Vec<Change> {
        let now = clock::boot();
        let mut changes = Vec::new();
        for entry in entries {
            let Some(wanted) = self.bans.get_mut(&entry.subject) else {
                // The kernel ignores one past its time.
                drift.foreign += u64::from(entry.lifetime != Lifetime::For(Duration::ZERO));
                changes.push(Change::Unban(entry.subject));
                continue;
            };
            wanted.seen = self.comparison;
            if !wanted.is_met(entry, now, longest) {
                drift.altered += 1;
                let (lifetime, _) = wanted.lifetime(now, longest);
                changes.push(wanted.change(entry.subject, lifetime));
            }
        }
        changes
    }

    /// Looks for bans that were not among what was read.
    fn search(
        &mut self,
        range: std::ops::Range<usize>,
        longest: Option<Duration>,
        drift: &mut Drift,
    ) -> Vec<Change> {
        let now = clock::boot();
        let comparison = self.comparison;
        let mut changes = Vec::new();
        let bans = self.bans.get_range_mut(range).into_iter().flatten();
        for (subject, wanted) in bans.filter(|(_, wanted)| wanted.seen != comparison) {
            wanted.seen = comparison;
            let (lifetime, _) = wanted.lifetime(now, longest);
            // One whose time is over is about to be lifted.
            if lifetime != Lifetime::For(Duration::ZERO) {
                drift.missing += 1;
                changes.push(wanted.change(*subject, lifetime));
            }
        }
        changes
    }
}

impl Wanted {
    /// What the entry's lifetime is to be now, and how far it may be from that.
    fn lifetime(&self, now: Duration, longest: Option<Duration>) -> (Lifetime, Duration) {
        match (self.end.map(|end| end.saturating_sub(now)), longest) {
            (None, _) => (Lifetime::Permanent, TOLERANCE),
            // As long as can be; renewed when half of it is gone.
            (Some(left), Some(longest)) if left > longest => (Lifetime::For(longest), longest / 2),
            (Some(left), _) => (Lifetime::For(left), TOLERANCE),
        }
    }

    /// Is an entry as it is to be?
    fn is_met(&self, entry: &Entry, now: Duration, longest: Option<Duration>) -> bool {
        let (lifetime, tolerance) = self.lifetime(now, longest);
        entry.observed == self.observed
            && match (entry.lifetime, lifetime) {
                (Lifetime::Permanent, Lifetime::Permanent) => true,
                (Lifetime::For(found), Lifetime::For(wanted)) => {
                    found.abs_diff(wanted) <= tolerance
                }
                _ => false,
            }
    }

    const fn change(&self, subject: Subject, lifetime: Lifetime) -> Change {
        if self.observed {
            Change::Observe(subject, lifetime)
        } else {
            Change::Ban(subject, lifetime)
        }
    }
}

fn repair(enforcer: &mut dyn Enforcer, changes: &[Change], step: &mut Step) {
    let mut problem = None;
    for (change, result) in changes.iter().zip(enforcer.apply(changes)) {
        match (result, change) {
            (Ok(()), Change::Ban(..) | Change::Observe(..)) => step.repaired.push(*change),
            (Ok(()), Change::Unban(_)) => {}
            (Err(error), change) => {
                step.drift.failed += 1;
                step.failed.push(change.subject());
                problem.get_or_insert(error);
            }
        }
    }
    if let Some(problem) = problem {
        warn!(
            "{} changes cannot be made, the first because: {problem:#}",
            step.drift.failed
        );
    }
}

/// Makes a whole comparison at once; returns what had to be repaired, and which bans are in force again.
///
/// # Errors
/// When the kernel's entries cannot be read.
pub fn reconcile(enforcer: &mut dyn Enforcer, intent: &mut Intent) -> Result<(Drift, Vec<Change>)> {
    let (mut drift, mut repaired) = (Drift::default(), Vec::new());
    intent.compare();
    while intent.is_comparing() {
        let mut step = intent.step(enforcer)?;
        drift += step.drift;
        repaired.append(&mut step.repaired);
    }
    Ok((drift, repaired))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::enforce::{Backend, Counters, Mode, Page};

    /// A kernel that is read two entries at a time and has room for so many.
    #[derive(Default)]
    struct Kernel {
        entries: BTreeMap<u32, (Lifetime, bool)>,
        room: usize,
    }

    fn subject(n: u32) -> Subject {
        Subject::of_client(std::net::Ipv4Addr::from(n).into())
    }

    fn number(subject: Subject) -> u32 {
        match subject.net().addr() {
            std::net::IpAddr::V4(address) => address.into(),
            std::net::IpAddr::V6(_) => unreachable!("no test makes one"),
        }
    }

    impl Enforcer for Kernel {
        fn backend(&self) -> Backend {
            Backend::DryRun
        }

        fn place(&self) -> String {
            String::new()
        }

        fn set_mode(&mut self, _mode: Mode) -> Result<()> {
            Ok(())
        }

        fn set_allowlist(&mut self, _allow: &[ipnet::IpNet]) -> Result<()> {
            Ok(())
        }

        fn apply(&mut self, changes: &[Change]) -> Vec<Result<()>> {
            let mut apply = |change: &Change| {
                let n = number(change.subject());
                let (lifetime, observed) = match *change {
                    Change::Ban(_, lifetime) => (lifetime, false),
                    Change::Observe(_, lifetime) => (lifetime, true),
                    Change::Unban(_) => {
                        self.entries.remove(&n);
                        return Ok(());
                    }
                };
                if self.entries.len() >= self.room && !self.entries.contains_key(&n) {
                    anyhow::bail!("no room");
                }
                self.entries.insert(n, (lifetime, observed));
                Ok(())
            };
            changes.iter().map(&mut apply).collect()
        }

        fn entries_from(&mut self, from: Cursor) -> Result<Page<Entry>> {
            let rest = self.entries.range(from.at.unwrap_or(0)..);
            let entries: Vec<Entry> = rest
                .take(2)
                .map(|(n, (lifetime, observed))| Entry {
                    subject: subject(*n),
                    lifetime: *lifetime,
                    observed: *observed,
                    hits: 0,
                    last_seen: None,
                })
                .collect();
            let next = entries.last().map(|entry| Cursor {
                place: 0,
                at: Some(number(entry.subject) + 1),
            });
            Ok((entries, next))
        }

        fn looks_up(&self) -> bool {
            true
        }

        fn counters(&mut self) -> Result<Counters> {
            Ok(Vec::new())
        }

        fn activate(&mut self) -> Result<bool> {
            Ok(false)
        }

        fn detach(&mut self) -> Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_few_bans_that_are_looked_at_tell_what_is_missing_or_altered() {
        let mut kernel = Kernel {
            room: 100,
            ..Kernel::default()
        };
        let bans = (0..50).map(|n| Change::Ban(subject(n), LONG));
        let bans: Vec<Change> = bans.collect();
        kernel.apply(&bans);
        let intent: Intent = bans.into_iter().collect();
        assert!(intent.looks_right(&mut kernel, 20).unwrap());
        assert!(intent.looks_right(&mut kernel, 1000).unwrap());
        kernel.apply(&[Change::Observe(subject(7), LONG)]);
        assert!(!intent.looks_right(&mut kernel, 50).unwrap());
        kernel.apply(&[Change::Ban(subject(7), LONGER)]);
        assert!(!intent.looks_right(&mut kernel, 50).unwrap());
        kernel.apply(&[Change::Ban(subject(7), LONG)]);
        assert!(intent.looks_right(&mut kernel, 50).unwrap());
        kernel.apply(&[Change::Unban(subject(7))]);
        assert!(!intent.looks_right(&mut kernel, 50).unwrap());
        assert!(Intent::default().looks_right(&mut kernel, 50).unwrap());
    }

    const LONG: Lifetime = Lifetime::For(Duration::from_secs(600));
    const LONGER: Lifetime = Lifetime::For(Duration::from_secs(6000));

    fn change() -> impl Strategy<Value = Change> {
        let lifetime = prop_oneof![Just(LONG), Just(LONGER), Just(Lifetime::Permanent)];
        (0u32..24, lifetime, 0..3).prop_map(|(n, lifetime, kind)| match kind {
            0 => Change::Ban(subject(n), lifetime),
            1 => Change::Observe(subject(n), lifetime),
            _ => Change::Unban(subject(n)),
        })
    }

    /// As [`Intent`] says it: the lifetime's end is within the tolerance of the other's.
    fn is_as(kernel: &Kernel, model: &BTreeMap<u32, (Lifetime, bool)>) -> bool {
        kernel.entries.len() == model.len()
            && model.iter().all(|(n, wanted)| {
                kernel.entries.get(n).is_some_and(|found| {
                    found.1 == wanted.1
                        && match (found.0, wanted.0) {
                            (Lifetime::For(found), Lifetime::For(wanted)) => {
                                found.abs_diff(wanted) <= TOLERANCE
                            }
                            (found, wanted) => found == wanted,
                        }
                })
            })
    }

    fn model(changes: &[Change]) -> BTreeMap<u32, (Lifetime, bool)> {
        let mut kernel = Kernel {
            room: usize::MAX,
            ..Kernel::default()
        };
        kernel.apply(changes).into_iter().for_each(drop);
        kernel.entries
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Whatever the kernel had, and whatever changes come between the steps.
        #[test]
        fn a_comparison_makes_the_kernel_what_is_wanted(
            wanted in prop::collection::vec(change(), 0..40),
            there in prop::collection::vec(change(), 0..40),
            meanwhile in prop::collection::vec(prop::option::of(change()), 0..30),
        ) {
            let mut intent: Intent = wanted.iter().copied().collect();
            let mut kernel = Kernel { entries: model(&there), room: usize::MAX };
            let mut all = wanted;
            intent.compare();
            let mut meanwhile = meanwhile.into_iter();
            while intent.is_comparing() {
                intent.step(&mut kernel).unwrap();
                if let Some(Some(change)) = meanwhile.next() {
                    kernel.apply(&[change]).remove(0).unwrap();
                    intent.note(change);
                    all.push(change);
                }
            }
            prop_assert_eq!(intent.len(), model(&all).len());
            prop_assert!(is_as(&kernel, &model(&all)), "{:?}", kernel.entries);
            let (drift, repaired) = reconcile(&mut kernel, &mut intent).unwrap();
            prop_assert!(drift.is_none() && repaired.is_empty(), "{}", drift);
        }
    }

    #[test]
    fn what_was_there_is_counted_by_what_was_wrong_with_it() {
        let ban = |n| Change::Ban(subject(n), LONG);
        let mut intent: Intent = (0..10).map(ban).collect();
        let mut kernel = Kernel {
            room: 10,
            ..Kernel::default()
        };
        let there = [
            ban(0),
            Change::Ban(subject(1), LONGER),
            Change::Observe(subject(2), LONG),
            ban(77),
            Change::Ban(subject(78), Lifetime::For(Duration::ZERO)),
        ];
        kernel.apply(&there).into_iter().for_each(drop);
        let (drift, repaired) = reconcile(&mut kernel, &mut intent).unwrap();
        let expected = Drift {
            missing: 7,
            altered: 2,
            foreign: 1,
            ..Drift::default()
        };
        assert_eq!((drift, repaired.len()), (expected, 9));
    }

    #[test]
    fn what_does_not_fit_is_counted_and_tried_again() {
        let mut intent: Intent = (0..10).map(|n| Change::Ban(subject(n), LONG)).collect();
        let mut kernel = Kernel {
            room: 6,
            ..Kernel::default()
        };
        let (drift, repaired) = reconcile(&mut kernel, &mut intent).unwrap();
        assert_eq!((drift.missing, drift.failed, repaired.len()), (10, 4, 6));
        kernel.room = 20;
        let (drift, repaired) = reconcile(&mut kernel, &mut intent).unwrap();
        assert_eq!((drift.missing, drift.failed, repaired.len()), (4, 0, 4));
    }

    #[test]
    fn a_ban_whose_time_is_over_is_not_missed() {
        let over = Change::Ban(subject(1), Lifetime::For(Duration::ZERO));
        let mut intent = Intent::from_iter([over]);
        let mut kernel = Kernel {
            room: 6,
            ..Kernel::default()
        };
        let (drift, repaired) = reconcile(&mut kernel, &mut intent).unwrap();
        assert!(drift.is_none() && repaired.is_empty(), "{drift}");
    }
}
