//! ipset's own language: scripts for `ipset restore`, and what `ipset save` prints.

use std::{cmp::Reverse, collections::HashSet, fmt::Write as _, thread, time::Duration};

use anyhow::{Context as _, Result, anyhow};
use ipnet::IpNet;
use portcullis_engine::Subject;
use tracing::warn;

use super::{
    super::{Change, Entry, Lifetime},
    Family,
    command::{Failure, run},
};

/// The longest time-out of an ipset. A longer ban gets this one, so it must be renewed before that is over.
pub const MAX_LIFETIME: Duration = Duration::from_secs(2_147_483);

/// How often, and how long apart, a set is tried to be destroyed that a rule just removed may still hold for a moment.
const TRIES: u32 = 20;
const PAUSE: Duration = Duration::from_millis(25);

/// A set's name and what it is to be like.
#[derive(Clone, Copy, Debug)]
pub(super) struct Set {
    pub(super) name: &'static str,
    pub(super) family: &'static Family,
    pub(super) room: u32,
    /// With time-outs and counters.
    pub(super) bans: bool,
}

impl Set {
    fn shape(&self) -> String {
        let options = if self.bans { "timeout 0 counters " } else { "" };
        format!(
            "hash:net family {} {options}maxelem {}",
            self.family.inet, self.room
        )
    }

    /// Makes the set. One of that name and shape is left alone; one of another shape hands its bans over. Says whether it is
    /// a new one.
    pub(super) fn adopt(&self) -> Result<bool> {
        let Self {
            name, room, family, ..
        } = *self;
        let shape = self.shape();
        match restore(&[&format!("create {name} {shape}")]) {
            // It says the same of one that was there.
            Ok(()) => return Ok(false),
            Err(failure) if failure.reason.contains("same name already exists") => {}
            Err(failure) => {
                return Err(failure).with_context(|| format!("cannot make the ipset {name}"));
            }
        }
        let mut entries = entries(&save(name)?);
        entries.retain(|entry| family.has(entry.subject));
        let room = usize::try_from(room)?;
        if entries.len() > room {
            warn!(
                "{name} has room for {room} entries now: {} with the least time left go",
                entries.len() - room
            );
            entries.sort_by_key(|entry| match entry.lifetime {
                Lifetime::Permanent => Reverse(Duration::MAX),
                Lifetime::For(left) => Reverse(left),
            });
        }
        let members = entries.iter().take(room).map(|entry| {
            let Entry { subject, hits, .. } = entry;
            if self.bans {
                format!(
                    "{subject} timeout {} packets {hits}",
                    timeout(entry.lifetime)
                )
            } else {
                subject.to_string()
            }
        });
        self.replace(members)
            .with_context(|| format!("cannot replace the ipset {name} by one that is {shape}"))?;
        Ok(true)
    }

    /// Fills a set aside and lets it take this one's place at once.
    pub(super) fn replace(&self, members: impl Iterator<Item = String>) -> Result<()> {
        let (name, spare) = (self.name, self.family.spare);
        let mut script = format!("create {spare} {}\n", self.shape());
        for member in members {
            writeln!(script, "add {spare} {member}")?;
        }
        write!(script, "swap {spare} {name}\ndestroy {spare}\n")?;
        // One that a killed run has left.
        destroy(spare)?;
        match run("ipset", &["-exist", "restore"], script) {
            Ok(_) => Ok(()),
            Err(failure) if failure.reason.contains("type does not match") => {
                // Not one of ours, then. It can only be taken away, and for that no rule may name it.
                self.family.refill(&[])?;
                destroy(name)?;
                Ok(restore(&[&format!("rename {spare} {name}")])?)
            }
            Err(failure) => {
                destroy(spare)?;
                Err(failure.into())
            }
        }
    }
}

/// A change as lines for [`restore`]. The set of observed bans is asked first: if `mirrored`, a ban is an exception there, so
/// that of bans around one another the narrowest decides.
pub(super) fn lines(family: &Family, change: Change, mirrored: bool) -> Result<Vec<String>> {
    let (bans, observed, subject) = (family.bans, family.observed, change.subject());
    if let [low, high] = holdable(subject.net())[..] {
        return Err(anyhow!(
            "an ipset cannot hold {subject}: ban {low} and {high}"
        ));
    }
    let leave = |set| format!("del {set} {subject}");
    Ok(match change {
        Change::Ban(_, lifetime) if lifetime != OVER => {
            let enter = format!("add {bans} {subject} timeout {}", timeout(lifetime));
            let except = mirrored.then(|| exception(observed, subject, lifetime));
            std::iter::once(enter).chain(except).collect()
        }
        Change::Observe(_, lifetime) if lifetime != OVER => vec![
            format!("add {observed} {subject} timeout {}", timeout(lifetime)),
            leave(bans),
        ],
        Change::Ban(..) | Change::Observe(..) | Change::Unban(_) => {
            vec![leave(bans), leave(observed)]
        }
    })
}

const OVER: Lifetime = Lifetime::For(Duration::ZERO);

/// A line that keeps a subject out of a wider entry of the set.
pub(super) fn exception(set: &str, subject: Subject, lifetime: Lifetime) -> String {
    format!("add {set} {subject} timeout {} nomatch", timeout(lifetime))
}

/// In whole seconds, rounded up; 0 is for ever.
fn timeout(lifetime: Lifetime) -> u64 {
    match lifetime {
        Lifetime::Permanent => 0,
        Lifetime::For(left) => {
            let seconds = left
                .as_secs()
                .saturating_add(u64::from(left.subsec_nanos() > 0));
            seconds.clamp(1, MAX_LIFETIME.as_secs())
        }
    }
}

/// A prefix as an ipset can hold it: it has no room for one of length zero, but for the two halves.
pub(super) fn holdable(net: IpNet) -> Vec<IpNet> {
    if net.prefix_len() > 0 {
        return vec![net];
    }
    net.subnets(1).map(Iterator::collect).unwrap_or_default()
}

/// Has ipset carry out all lines; what is already as they want it is fine.
pub(super) fn restore(lines: &[&str]) -> Result<(), Failure> {
    if lines.is_empty() {
        return Ok(());
    }
    run("ipset", &["-exist", "restore"], lines.join("\n") + "\n").map(drop)
}

/// Has ipset carry out as many lines as it can, with an outcome for each.
pub(super) fn restore_each(lines: &[&str]) -> Vec<Result<()>> {
    let mut outcomes = Vec::with_capacity(lines.len());
    while outcomes.len() < lines.len() {
        let rest = &lines[outcomes.len()..];
        match restore(rest) {
            Ok(()) => outcomes.resize_with(lines.len(), || Ok(())),
            Err(failure) => match failure.line.filter(|line| (1..=rest.len()).contains(line)) {
                Some(line) => {
                    // ipset sends lines in lots, so it may have kept back some before this one. To carry them out
                    // twice does no harm.
                    outcomes.extend(restore_each(&rest[..line - 1]));
                    outcomes.push(Err(failure.into()));
                }
                None => outcomes.resize_with(lines.len(), || Err(failure.clone().into())),
            },
        }
    }
    outcomes
}

/// What is in a set, for [`entries`].
pub(super) fn save(set: &str) -> Result<String, Failure> {
    run("ipset", &["save", set], String::new())
}

/// Removes a set, if it is there.
pub(super) fn destroy(set: &str) -> Result<()> {
    let mut tries = 1..TRIES;
    loop {
        match run("ipset", &["destroy", set], String::new()) {
            Err(failure) if failure.reason.contains("does not exist") => return Ok(()),
            Err(failure) if failure.reason.contains("in use") && tries.next().is_some() => {
                thread::sleep(PAUSE);
            }
            done => {
                return done
                    .map(drop)
                    .with_context(|| format!("cannot remove the ipset {set}"));
            }
        }
    }
}

/// The bans in a listing; exceptions are none.
pub(super) fn entries(listing: &str) -> Vec<Entry> {
    let bans = listing.lines().filter(|line| !is_exception(line));
    bans.filter_map(entry).collect()
}

/// The exceptions in a listing.
pub(super) fn exceptions(listing: &str) -> HashSet<Subject> {
    let exceptions = listing.lines().filter(|line| is_exception(line));
    exceptions
        .filter_map(|line| Some(entry(line)?.subject))
        .collect()
}

/// `add SET 192.0.2.0/24 timeout 59 nomatch`. The word stands before a comment, if there is one.
pub(super) fn is_exception(line: &str) -> bool {
    let options = line.split(" comment ").next().unwrap_or_default();
    options
        .split_ascii_whitespace()
        .any(|word| word == "nomatch")
}

/// `add SET 192.0.2.0/24 timeout 59 packets 10 bytes 430`; what a set was not made to keep is left out.
fn entry(line: &str) -> Option<Entry> {
    let mut words = line.strip_prefix("add ")?.split_ascii_whitespace().skip(1);
    let subject = words.next()?.parse().ok()?;
    let (mut lifetime, mut hits) = (Lifetime::Permanent, 0);
    while let Some(word) = words.next() {
        match word {
            "timeout" => match words.next()?.parse().ok()? {
                0 => {}
                seconds => lifetime = Lifetime::For(Duration::from_secs(seconds)),
            },
            "packets" => hits = words.next()?.parse().ok()?,
            // The last option, and free text.
            "comment" => break,
            _ => {}
        }
    }
    Some(Entry {
        subject,
        lifetime,
        observed: false,
        hits,
        last_seen: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subject(text: &str) -> Subject {
        text.parse().unwrap()
    }

    fn listed(line: &str) -> Option<(String, Lifetime, u64)> {
        entry(line).map(|entry| (entry.subject.to_string(), entry.lifetime, entry.hits))
    }

    const fn seconds(seconds: u64) -> Lifetime {
        Lifetime::For(Duration::from_secs(seconds))
    }

    #[test]
    fn a_listing_reads_back() {
        let listing = "\
create PORTCULLIS4 hash:net family inet hashsize 1024 maxelem 9 timeout 0 counters bucketsize 12 initval 0xa953012f
add PORTCULLIS4 198.51.100.7 timeout 59 packets 10 bytes 430
add PORTCULLIS4 192.0.2.0/24 timeout 0 packets 0 bytes 0
create PORTCULLIS6 hash:net family inet6 hashsize 1024 maxelem 9 timeout 0 counters bucketsize 12 initval 0x039ecaa7
add PORTCULLIS6 2001:db8::/64 timeout 2147483 packets 18446744073709551615 bytes 0
add PORTCULLIS6 2001:db8::1 timeout 1 packets 0 bytes 0
";
        let listed: Vec<_> = listing.lines().filter_map(listed).collect();
        assert_eq!(
            listed,
            [
                ("198.51.100.7".into(), seconds(59), 10),
                ("192.0.2.0/24".into(), Lifetime::Permanent, 0),
                (
                    "2001:db8::/64".into(),
                    Lifetime::For(MAX_LIFETIME),
                    u64::MAX
                ),
                ("2001:db8::1".into(), seconds(1), 0),
            ]
        );
    }

    #[test]
    fn entries_of_other_shapes_are_bans_where_they_can_be() {
        for (line, expected) in [
            (
                "add S 192.0.2.1",
                Some(("192.0.2.1".into(), Lifetime::Permanent, 0)),
            ),
            (
                "add S 192.0.2.1 timeout 5 comment \"nomatch packets 7\"",
                Some(("192.0.2.1".into(), seconds(5), 0)),
            ),
            ("add S 192.0.2.1,tcp:80 timeout 5", None),
            ("add S 192.0.2.1 timeout", None),
            ("add S", None),
            ("create S hash:net", None),
        ] {
            assert_eq!(listed(line), expected, "{line}");
        }
    }

    #[test]
    fn a_change_is_a_line() {
        let [family, _] = &super::super::FAMILIES;
        let of = |change| lines(family, change, false).unwrap().join("; ");
        let ban = |lifetime| of(Change::Ban(subject("192.0.2.1"), lifetime));
        assert_eq!(ban(seconds(60)), "add PORTCULLIS4 192.0.2.1 timeout 60");
        assert_eq!(
            ban(Lifetime::For(Duration::from_millis(1))),
            "add PORTCULLIS4 192.0.2.1 timeout 1"
        );
        assert_eq!(
            ban(Lifetime::For(Duration::from_millis(59_001))),
            "add PORTCULLIS4 192.0.2.1 timeout 60"
        );
        let longest = "add PORTCULLIS4 192.0.2.1 timeout 2147483";
        assert_eq!(ban(seconds(2_147_484)), longest);
        assert_eq!(ban(Lifetime::For(Duration::MAX)), longest);
        assert_eq!(
            ban(Lifetime::Permanent),
            "add PORTCULLIS4 192.0.2.1 timeout 0"
        );
        let leave = "del PORTCULLIS4 192.0.2.1; del PORTCULLIS-O4 192.0.2.1";
        assert_eq!(ban(seconds(0)), leave);
        assert_eq!(of(Change::Unban(subject("192.0.2.1"))), leave);
        let all = Change::Ban(subject("::/0"), Lifetime::Permanent);
        let all = lines(family, all, false).unwrap_err();
        assert_eq!(
            all.to_string(),
            "an ipset cannot hold ::/0: ban ::/1 and 8000::/1"
        );
    }

    #[test]
    fn what_is_banned_is_an_exception_from_what_is_observed() {
        let [family, _] = &super::super::FAMILIES;
        let of = |change| lines(family, change, true).unwrap().join("; ");
        let address = subject("192.0.2.1");
        assert_eq!(
            of(Change::Ban(address, seconds(60))),
            "add PORTCULLIS4 192.0.2.1 timeout 60; add PORTCULLIS-O4 192.0.2.1 timeout 60 nomatch"
        );
        assert_eq!(
            of(Change::Observe(address, seconds(60))),
            "add PORTCULLIS-O4 192.0.2.1 timeout 60; del PORTCULLIS4 192.0.2.1"
        );
        let listing = "add S 192.0.2.1 timeout 5 nomatch packets 0 bytes 0\nadd S 192.0.2.2 timeout 5 comment \"nomatch\"\n";
        assert_eq!(exceptions(listing), HashSet::from([address]));
        assert_eq!(entries(listing).len(), 1);
    }
}
