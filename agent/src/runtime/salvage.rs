//! What a ledger has lost is made up for by what the kernel still holds: nobody is let in because a file was damaged, or because
//! the disk was full when he was banned.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use portcullis_engine::{
    Ban, Event, Gate, Origin, Saved, Subject, Term, Timestamp,
    command::{Action, Allowed, Change},
    ledger::Length,
};

use super::Agent;
use crate::{
    config::Config,
    enforce::{self, Lifetime, nginx},
    store::{Contents, Lost},
    surroundings,
};

const REASON: &str = "found in the kernel, and not in the ledger";
const REASON_IN_NGINX: &str = "found in Nginx's include, and not in the ledger";

/// What was adopted.
#[derive(Debug, PartialEq)]
pub(super) struct Salvaged {
    /// For the ledger on disk.
    pub(super) changes: Vec<Change>,
    /// For people, if there is anything to say.
    pub(super) words: Option<String>,
}

/// Puts what the kernel and Nginx hold in the place of what a ledger has lost; `None` where that is nothing.
pub(super) fn salvage(
    contents: &mut Contents,
    config: &Config,
    around: &surroundings::Entries,
    now: Timestamp,
) -> Option<Salvaged> {
    let lost = contents.lost.clone()?;
    let mut left = enforce::left(&config.enforce);
    let in_nginx = config.nginx.as_ref().map(nginx::left).transpose();
    let in_nginx = in_nginx.unwrap_or_else(|problem| {
        left.problems.push(format!("{problem:#}"));
        None
    });
    // What is on the allowlist by configuration, or for this host's sake, comes from there.
    let known = super::start_engine(config, around.clone(), Saved::default(), now);
    let known: BTreeSet<IpNet> = known.allowlist().iter().map(|(net, _)| net).collect();
    let length = config.engine.schedule.first().copied();
    let first = length.unwrap_or(Length::Permanent).from(now);
    Some(adopt(
        contents,
        &lost,
        &left,
        &in_nginx.unwrap_or_default(),
        &known,
        first,
        now,
    ))
}

impl Agent {
    /// Has what was adopted written down, and tells people of it.
    pub(super) fn make_up(&self, salvaged: Option<Salvaged>, now: Timestamp) {
        let Some(salvaged) = salvaged else { return };
        for change in &salvaged.changes {
            self.store.save(change);
        }
        // Behind them: until it is on disk, they are owed.
        self.store.is_made_up_for();
        if let Some(words) = salvaged.words {
            self.record(&Event::new(now, Action::Notice, words));
        }
    }
}

/// What is in the ledger already, from a start that was cut short, stays. How long bans in Nginx were to last is not known:
/// they last as long as a first one.
fn adopt(
    contents: &mut Contents,
    lost: &Lost,
    left: &enforce::Left,
    in_nginx: &BTreeSet<Subject>,
    known: &BTreeSet<IpNet>,
    first: Term,
    now: Timestamp,
) -> Salvaged {
    contents.mode = contents.mode.or(left.mode);
    let stood: BTreeSet<Subject> = contents.saved.bans.iter().map(|ban| ban.subject).collect();
    let mut bans: BTreeMap<Subject, Ban> = BTreeMap::new();
    for entry in &left.bans {
        let term = match entry.lifetime {
            Lifetime::Permanent => Term::Permanent,
            // Its time is over.
            Lifetime::For(left) if left.is_zero() => continue,
            Lifetime::For(left) => Term::Until(now + left),
        };
        let ban = ban(entry.subject, term, REASON, now);
        let observe = entry.observed;
        bans.insert(entry.subject, Ban { observe, ..ban });
    }
    for subject in in_nginx {
        let new = Ban {
            gate: Gate::Nginx,
            ..ban(*subject, first, REASON_IN_NGINX, now)
        };
        bans.entry(*subject)
            .and_modify(|ban| ban.gate = Gate::Both)
            .or_insert(new);
    }
    bans.retain(|subject, _| !stood.contains(subject));
    let there: BTreeSet<IpNet> = contents.saved.allow.iter().map(|(net, _)| *net).collect();
    let allow = left.allow.iter().copied();
    // A ledger that was read knows who is allowed; what else the kernel spares was configured once.
    let allow = allow.filter(|_| *lost != Lost::Newest);
    let allow: BTreeSet<IpNet> = allow.collect();
    let allow: Vec<(IpNet, Allowed)> = allow
        .into_iter()
        .filter(|net| !known.contains(net) && !there.contains(net))
        .map(|net| {
            let allowed = Allowed {
                since: now,
                by: "portcullis".to_owned(),
                reason: REASON.to_owned(),
            };
            (net, allowed)
        })
        .collect();
    let words = words(lost, left, bans.len(), allow.len());
    let bans: Vec<Ban> = bans.into_values().collect();
    let changes = bans.iter().cloned().map(Change::Ban);
    let allowed = allow.iter().cloned();
    let allowed = allowed.map(|(net, allowed)| Change::Allow(net, Some(allowed)));
    let changes = changes.chain(allowed).collect();
    contents.saved.bans.extend(bans);
    contents.saved.allow.extend(allow);
    Salvaged { changes, words }
}

fn ban(subject: Subject, term: Term, reason: &str, now: Timestamp) -> Ban {
    // A detector's ban may give way in a full table, and an operator's word is nobody's to invent. It is on nobody's account.
    Ban {
        reason: reason.to_owned(),
        ..Ban::new(subject, now, term, Origin::Detector)
    }
}

fn words(lost: &Lost, left: &enforce::Left, bans: usize, allow: usize) -> Option<String> {
    let problems = if left.problems.is_empty() {
        String::new()
    } else {
        format!("; could not be read: {}", left.problems.join("; "))
    };
    let (why, aside) = match lost {
        Lost::All { why, aside } => (why, aside),
        Lost::Newest if bans == 0 && problems.is_empty() => return None,
        Lost::Newest => {
            return Some(format!(
                "the ledger cannot be written, and may be older than the kernel: {bans} bans that only the kernel or Nginx \
                 holds were adopted{problems}"
            ));
        }
    };
    let aside = aside.as_deref().map_or_else(String::new, |path| {
        format!("; the damaged file is {}", path.display())
    });
    let allowed = if allow == 0 {
        "no entry of the allowlist by operators was found".to_owned()
    } else {
        format!(
            "{allow} entries of the allowlist that are not configured were kept as an operator's (`portcullis allow list`; \
             remove those that were not)"
        )
    };
    Some(format!(
        "the ledger was damaged and a new one is begun: {why}{aside}. {bans} bans that the kernel or Nginx holds were adopted; \
         {allowed}{problems}. Lost are offence accounts, the evidence of bans, who had decided on them, and the baseline, which \
         is learnt again"
    ))
}

#[cfg(test)]
mod tests {
    use std::{path::PathBuf, time::Duration};

    use super::*;
    use crate::enforce::{Entry, Mode};

    const NOW: Timestamp = Timestamp::from_secs(1_000);

    fn entry(subject: &str, lifetime: Lifetime, observed: bool) -> Entry {
        Entry {
            subject: subject.parse().unwrap(),
            lifetime,
            observed,
            hits: 0,
            last_seen: None,
        }
    }

    fn lost() -> Lost {
        Lost::All {
            why: "Invalid magic number".to_owned(),
            aside: Some(PathBuf::from("/s/ledger.redb.damaged-1000")),
        }
    }

    const fn secs(secs: u64) -> Lifetime {
        Lifetime::For(Duration::from_secs(secs))
    }

    #[test]
    fn what_the_kernel_holds_is_in_the_ledger_as_long_as_there() {
        let left = enforce::Left {
            bans: vec![
                entry("192.0.2.1", secs(60), false),
                entry("192.0.2.2", Lifetime::Permanent, false),
                entry("2001:db8::/64", secs(9), true),
                entry("192.0.2.3", secs(0), false),
            ],
            allow: vec![
                "203.0.113.0/24".parse().unwrap(),
                "198.51.100.7/32".parse().unwrap(),
            ],
            mode: Some(Mode::Observe),
            problems: vec!["no rights".to_owned()],
        };
        let known = BTreeSet::from(["198.51.100.7/32".parse().unwrap()]);
        let nginx = ["192.0.2.1", "192.0.2.9"].map(|subject| subject.parse().unwrap());
        let first = Term::Until(Timestamp::from_secs(1_600));
        let mut contents = Contents::default();
        let nginx = BTreeSet::from(nginx);
        let salvaged = adopt(&mut contents, &lost(), &left, &nginx, &known, first, NOW);
        let until = |secs| Term::Until(Timestamp::from_secs(secs));
        let bans = contents.saved.bans.iter();
        let bans: Vec<_> = bans
            .map(|ban| (ban.subject.to_string(), ban.term, ban.observe, ban.gate))
            .collect();
        assert_eq!(
            bans,
            [
                ("192.0.2.1".to_owned(), until(1_060), false, Gate::Both),
                ("192.0.2.2".to_owned(), Term::Permanent, false, Gate::Wire),
                ("192.0.2.9".to_owned(), until(1_600), false, Gate::Nginx),
                ("2001:db8::/64".to_owned(), until(1_009), true, Gate::Wire),
            ]
        );
        let is_nobodys = |ban: &Ban| ban.tier.is_none() && ban.origin == Origin::Detector;
        assert!(contents.saved.bans.iter().all(is_nobodys));
        let allow: Vec<_> = contents.saved.allow.iter().map(|(net, _)| *net).collect();
        assert_eq!(allow, ["203.0.113.0/24".parse().unwrap()]);
        assert_eq!(contents.mode, Some(Mode::Observe));
        assert_eq!(salvaged.changes.len(), 5);
        for words in [
            "ledger.redb.damaged-1000",
            "4 bans",
            "1 entries",
            "no rights",
        ] {
            let said = salvaged.words.as_ref().unwrap();
            assert!(said.contains(words), "{said}");
        }
    }

    #[test]
    fn a_ledger_that_could_not_be_written_gets_the_bans_that_it_lacks() {
        let left = enforce::Left {
            bans: vec![
                entry("192.0.2.1", secs(60), false),
                entry("192.0.2.2", secs(60), false),
            ],
            allow: vec!["203.0.113.0/24".parse().unwrap()],
            ..enforce::Left::default()
        };
        let (none, known) = (BTreeSet::new(), BTreeSet::new());
        let mut contents = Contents::default();
        let known_ban = ban("192.0.2.1".parse().unwrap(), Term::Permanent, "", NOW);
        contents.saved.bans.push(known_ban.clone());
        let mut again = || {
            let (lost, first) = (Lost::Newest, Term::Permanent);
            adopt(&mut contents, &lost, &left, &none, &known, first, NOW)
        };
        let (first, second) = (again(), again());
        assert_eq!((first.changes.len(), second.changes.len()), (1, 0));
        assert!(first.words.unwrap().contains("1 bans"));
        assert_eq!(second.words, None);
        assert_eq!(contents.saved.bans[0], known_ban);
        assert!(contents.saved.allow.is_empty());
    }

    #[test]
    fn a_start_that_was_cut_short_is_made_up_for() {
        let left = enforce::Left {
            bans: vec![entry("192.0.2.1", secs(60), false)],
            ..enforce::Left::default()
        };
        let (none, known) = (BTreeSet::new(), BTreeSet::new());
        let mut contents = Contents::default();
        let again = |contents: &mut Contents| {
            let first = Term::Permanent;
            adopt(contents, &lost(), &left, &none, &known, first, NOW).changes
        };
        assert_eq!(again(&mut contents).len(), 1);
        assert_eq!(again(&mut contents).len(), 0);
        assert_eq!(contents.saved.bans.len(), 1);
    }
}
