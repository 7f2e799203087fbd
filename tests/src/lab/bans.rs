//! A back end in the hands of a test.

use std::{net::IpAddr, time::Duration};

use portcullis::enforce::{Change, Enforcer, Entry, Lifetime};
use portcullis_engine::Subject;

/// Longer than any test.
pub const LONG: Lifetime = Lifetime::For(Duration::from_secs(600));

/// Carries changes out.
///
/// # Panics
/// When one fails.
#[track_caller]
pub fn change(enforcer: &mut dyn Enforcer, changes: &[Change]) {
    let results = enforcer.apply(changes);
    assert_eq!(results.len(), changes.len(), "one result for each change");
    for (result, change) in results.iter().zip(changes) {
        assert!(result.is_ok(), "{change:?}: {result:?}");
    }
}

/// Bans for longer than any test.
///
/// # Panics
/// When one fails.
#[track_caller]
pub fn ban(enforcer: &mut dyn Enforcer, subjects: &[Subject]) {
    let changes: Vec<_> = subjects
        .iter()
        .map(|subject| Change::Ban(*subject, LONG))
        .collect();
    change(enforcer, &changes);
}

/// As whom a client is banned.
#[must_use]
pub fn client(address: IpAddr) -> Subject {
    Subject::of_client(address)
}

/// What the kernel has of a subject.
///
/// # Panics
/// When it cannot be read.
#[track_caller]
pub fn entry(enforcer: &mut dyn Enforcer, subject: Subject) -> Option<Entry> {
    let entries = enforcer.entries();
    assert!(entries.is_ok(), "{entries:?}");
    let mut entries = entries.into_iter().flatten();
    entries.find(|entry| entry.subject == subject)
}

/// A total, by its name.
///
/// # Panics
/// When the back end does not have it.
#[track_caller]
pub fn counter(enforcer: &mut dyn Enforcer, name: &str) -> u64 {
    let counters = enforcer.counters();
    assert!(
        counters
            .iter()
            .flatten()
            .any(|(counter, _)| *counter == name),
        "{name} among {counters:?}"
    );
    let mut counters = counters.into_iter().flatten();
    counters
        .find(|(counter, _)| *counter == name)
        .map_or(0, |(_, total)| total)
}
