//! The back end that touches nothing: bans are kept in memory. For trying things out without rights, and for tests.

use std::{collections::BTreeMap, time::Duration};

use anyhow::Result;
use ipnet::IpNet;
use portcullis_engine::Subject;

use super::{Backend, Change, Counters, Cursor, Enforcer, Entry, Lifetime, Mode, Page};
use crate::runtime::clock;

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct DryRun {
    /// When each ban ends, on the boot clock, and whether it is only observed.
    bans: BTreeMap<Subject, (Option<Duration>, bool)>,
}

impl Enforcer for DryRun {
    fn backend(&self) -> Backend {
        Backend::DryRun
    }

    fn place(&self) -> String {
        "nowhere".to_owned()
    }

    fn set_mode(&mut self, _mode: Mode) -> Result<()> {
        Ok(())
    }

    fn set_allowlist(&mut self, _allow: &[IpNet]) -> Result<()> {
        Ok(())
    }

    fn apply(&mut self, changes: &[Change]) -> Vec<Result<()>> {
        let now = clock::boot();
        for change in changes {
            let (subject, lifetime, observed) = match *change {
                Change::Ban(subject, lifetime) => (subject, lifetime, false),
                Change::Observe(subject, lifetime) => (subject, lifetime, true),
                Change::Unban(subject) => {
                    self.bans.remove(&subject);
                    continue;
                }
            };
            let end = match lifetime {
                Lifetime::For(left) => Some(now + left),
                Lifetime::Permanent => None,
            };
            self.bans.insert(subject, (end, observed));
        }
        changes.iter().map(|_| Ok(())).collect()
    }

    fn entries_from(&mut self, _from: Cursor) -> Result<Page<Entry>> {
        let now = clock::boot();
        let entry = |(subject, (end, observed)): (&Subject, &(Option<Duration>, bool))| Entry {
            subject: *subject,
            observed: *observed,
            lifetime: end.map_or(Lifetime::Permanent, |end| {
                Lifetime::For(end.saturating_sub(now))
            }),
            hits: 0,
            last_seen: None,
        };
        Ok((self.bans.iter().map(entry).collect(), None))
    }

    fn counters(&mut self) -> Result<Counters> {
        Ok(Vec::new())
    }

    fn activate(&mut self) -> Result<bool> {
        Ok(false)
    }

    fn detach(&mut self) -> Result<()> {
        self.bans.clear();
        Ok(())
    }
}
