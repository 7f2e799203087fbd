//! The back end that touches nothing: bans are kept in memory. For trying things out without rights, and for tests.

use std::{collections::BTreeMap, time::Duration};

use anyhow::Result;
use ipnet::IpNet;
use portcullis_engine::Subject;

use super::{Backend, Change, Counters, Enforcer, Entry, Lifetime, Mode};
use crate::runtime::clock;

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct DryRun {
    /// When each ban ends, on the boot clock.
    bans: BTreeMap<Subject, Option<Duration>>,
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
            match *change {
                Change::Ban(subject, Lifetime::For(left)) => {
                    self.bans.insert(subject, Some(now + left))
                }
                Change::Ban(subject, Lifetime::Permanent) => self.bans.insert(subject, None),
                Change::Unban(subject) => self.bans.remove(&subject),
            };
        }
        changes.iter().map(|_| Ok(())).collect()
    }

    fn entries(&mut self) -> Result<Vec<Entry>> {
        let now = clock::boot();
        let entry = |(subject, end): (&Subject, &Option<Duration>)| Entry {
            subject: *subject,
            lifetime: end.map_or(Lifetime::Permanent, |end| {
                Lifetime::For(end.saturating_sub(now))
            }),
            hits: 0,
            last_seen: None,
        };
        Ok(self.bans.iter().map(entry).collect())
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
