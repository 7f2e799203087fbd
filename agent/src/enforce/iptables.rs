//! The back end for hosts without XDP: three ipsets and one chain for each family, however many bans there are.
//!
//! A ban is an entry of a set, never a rule. It carries its time-out, so it ends without the agent; sets and chain
//! outlive the agent, and the next one adopts them. Works through the `iptables` that the host prefers, nft or legacy.
//!
//! A clean packet costs a look-up, and another one in a set that is mostly empty; only a banned one meets the allowlist:
//!
//! ```text
//!   in neither PORTCULLIS4 nor PORTCULLIS-O4   return
//!   in PORTCULLIS-A4                           return             counted: allowed
//!   in PORTCULLIS-O4                           return             counted: would_drop
//!   in PORTCULLIS4                             drop, or nothing   counted: dropped, or would_drop
//! ```
//!
//! Bans that are only observed are in PORTCULLIS-O4. As soon as there are any, every other ban is an exception (`nomatch`) there,
//! so that of bans around one another the narrowest decides, as in XDP.
//!
//! A set is listed and read as a whole: with a million bans a comparison holds up new ones for some two seconds.

mod command;
mod sets;

use std::{collections::BTreeSet, mem, path::Path, time::Duration};

use anyhow::{Context as _, Result, anyhow};
use ipnet::IpNet;
use portcullis_common::stats::Counter;
use portcullis_engine::Subject;
use tracing::warn;

use self::{
    command::{Failure, run},
    sets::{
        Set, destroy, entries, exception, exceptions, holdable, is_exception, lines, restore,
        restore_each, save,
    },
};
use super::{Backend, Change, Counters, Cursor, Enforcer, Entry, Left, Mode, Page};

pub use self::sets::MAX_LIFETIME;

const CHAIN: &str = "PORTCULLIS";
/// Room in the allowlist; a set takes memory only for what is in it.
const MAX_ALLOWED: u32 = 1 << 20;
/// How many seconds iptables waits for another one to finish.
const LOCK_WAIT: &str = "5";

/// What has another name in IPv6.
#[derive(Debug)]
struct Family {
    v6: bool,
    iptables: &'static str,
    iptables_restore: &'static str,
    inet: &'static str,
    bans: &'static str,
    observed: &'static str,
    allow: &'static str,
    /// Where a set is filled that is to take another one's place.
    spare: &'static str,
}

static FAMILIES: [Family; 2] = [
    Family {
        v6: false,
        iptables: "iptables",
        iptables_restore: "iptables-restore",
        inet: "inet",
        bans: "PORTCULLIS4",
        observed: "PORTCULLIS-O4",
        allow: "PORTCULLIS-A4",
        spare: "PORTCULLIS-T4",
    },
    Family {
        v6: true,
        iptables: "ip6tables",
        iptables_restore: "ip6tables-restore",
        inet: "inet6",
        bans: "PORTCULLIS6",
        observed: "PORTCULLIS-O6",
        allow: "PORTCULLIS-A6",
        spare: "PORTCULLIS-T6",
    },
];

/// Those that the kernel knows, in the calling thread's network namespace.
fn families() -> &'static [Family] {
    let has_v6 = Path::new("/proc/thread-self/net/if_inet6").exists();
    if has_v6 { &FAMILIES } else { &FAMILIES[..1] }
}

/// The back end.
#[derive(Debug)]
pub struct Iptables {
    mode: Mode,
    max_bans: u32,
    families: &'static [Family],
    /// Until it is, an earlier run's rules may be at work, and stay as they are.
    is_active: bool,
    /// `None` until it is set: until then an earlier run's is in force.
    allow: Option<BTreeSet<Subject>>,
    /// Some ban is, or was, only observed: every other one is an exception in the set of those.
    mirrored: bool,
    /// What rules had counted that were replaced since.
    counted: Totals,
    /// Chains that jump to ours.
    place: BTreeSet<&'static str>,
}

impl Iptables {
    /// Makes sets and chain, with room for `max_bans` of each family, or adopts those of an earlier run. What that one
    /// dropped goes on being dropped, and nothing else.
    ///
    /// # Errors
    /// One sentence with the remedy: a program is not installed, no rights, a kernel without ipset.
    pub fn open(mode: Mode, max_bans: u32) -> Result<Self> {
        let mut iptables = Self {
            mode,
            max_bans: max_bans.max(1),
            families: families(),
            is_active: false,
            allow: None,
            mirrored: false,
            counted: Totals::default(),
            place: BTreeSet::from(["INPUT", "FORWARD"]),
        };
        if !iptables.families.iter().any(|family| family.v6) {
            warn!("this kernel has no IPv6: only IPv4 is guarded");
        }
        iptables.prepare()?;
        for family in iptables.families {
            if !entries(&save(family.observed)?).is_empty() {
                iptables.mirror()?;
            }
        }
        Ok(iptables)
    }

    /// Makes sets, and once active the chain too, as they should be, whatever is there. Says whether chain or allowlist was
    /// not.
    fn prepare(&mut self) -> Result<bool> {
        let (mut refilled, mut replaced) = (false, false);
        for family in self.families {
            for set in [family.bans, family.observed] {
                replaced |= family.ban_set(set, self.max_bans).adopt()?;
            }
            family.allow_set().adopt()?;
            refilled |= self.fill_chain(family)?;
        }
        if replaced && self.mirrored {
            self.mirror()?;
        }
        Ok(self.fill_allowlist()? || refilled)
    }

    /// After a set was missing.
    fn prepare_anew(&mut self) -> Result<()> {
        self.prepare()?;
        if self.mirrored {
            self.mirror()?;
        }
        Ok(())
    }

    /// Makes every ban an exception in the set of observed ones.
    fn mirror(&mut self) -> Result<()> {
        let mut lines = Vec::new();
        for family in self.families {
            let bans = entries(&save(family.bans)?);
            let except = |ban: &Entry| exception(family.observed, ban.subject, ban.lifetime);
            lines.extend(bans.iter().map(except));
        }
        let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
        restore(&lines).context("cannot keep bans and observed bans apart")?;
        self.mirrored = true;
        Ok(())
    }

    /// What is in force of a family. A ban that is no exception from the observed ones, though it should be, counts as one of
    /// them: its packets may pass.
    fn bans_of(&mut self, family: &Family) -> Result<Vec<Entry>> {
        let listings = || Ok::<_, Failure>((save(family.bans)?, save(family.observed)?));
        let (bans, observed) = match listings() {
            Ok(listings) => listings,
            Err(_) => self.prepare_anew().and_then(|()| Ok(listings()?))?,
        };
        let (mut bans, mut observed_bans) = (entries(&bans), entries(&observed));
        for ban in &mut observed_bans {
            ban.observed = true;
        }
        if self.mirrored {
            let exceptions = exceptions(&observed);
            for ban in &mut bans {
                ban.observed = !exceptions.contains(&ban.subject);
            }
        } else if !observed_bans.is_empty() {
            // Somebody else has put it there.
            self.mirror()?;
        }
        bans.append(&mut observed_bans);
        Ok(bans)
    }

    fn fill_chain(&mut self, family: &Family) -> Result<bool> {
        let wanted = family.rules(self.mode);
        let found = family.listed()?;
        if let Some(found) = &found
            && (!self.is_active || found.iter().map(|rule| &rule.text).eq(&wanted))
        {
            return Ok(false);
        }
        family.refill(&wanted)?;
        // Packets between the listing and the refill met the rules all the same; they are in no total.
        self.counted.add(family, &found.unwrap_or_default());
        Ok(true)
    }

    /// Makes the allowlist what it is to be; says whether it was not.
    fn fill_allowlist(&self) -> Result<bool> {
        let mut refilled = Ok(false);
        for family in self.families {
            let Some(allow) = &self.allow else { break };
            let wanted: BTreeSet<Subject> = allow
                .iter()
                .filter(|subject| family.has(**subject))
                .flat_map(|subject| holdable(subject.net()))
                .map(Subject::of_net)
                .collect();
            let filled = family.fill_allowlist(&wanted).with_context(|| {
                format!("cannot write the allowlist to the ipset {}", family.allow)
            });
            refilled = match (refilled, filled) {
                (Err(error), _) | (_, Err(error)) => Err(error),
                (Ok(one), Ok(other)) => Ok(one || other),
            };
        }
        refilled
    }

    fn lines(&self, change: Change) -> Result<Vec<String>> {
        let subject = change.subject();
        match self.families.iter().find(|family| family.has(subject)) {
            Some(family) => lines(family, change, self.mirrored),
            // No packet of IPv6 comes in, so there is nothing to keep out: a comment.
            None => Ok(vec![format!("# {subject}")]),
        }
    }
}

impl Enforcer for Iptables {
    fn backend(&self) -> Backend {
        Backend::Iptables
    }

    fn place(&self) -> String {
        self.place.iter().copied().collect::<Vec<_>>().join(", ")
    }

    fn longest(&self) -> Option<Duration> {
        Some(MAX_LIFETIME)
    }

    fn set_mode(&mut self, mode: Mode) -> Result<()> {
        let before = mem::replace(&mut self.mode, mode);
        let done = self
            .families
            .iter()
            .try_for_each(|family| self.fill_chain(family).map(drop));
        if done.is_err() {
            self.mode = before;
            for family in self.families {
                if let Err(error) = self.fill_chain(family) {
                    warn!(
                        "the rules of {} may be of either mode: {error:#}",
                        family.iptables
                    );
                }
            }
        }
        done
    }

    /// Each family's list is replaced at once or stays as it was.
    fn set_allowlist(&mut self, allow: &[IpNet]) -> Result<()> {
        self.allow = Some(allow.iter().map(|net| Subject::of_net(*net)).collect());
        self.fill_allowlist().map(drop)
    }

    /// A renewed ban keeps its counters, as ipset leaves alone what `add -exist` does not name. So does a new ban of a
    /// source whose last one is over but which the kernel has not collected yet; it does so every few minutes.
    fn apply(&mut self, changes: &[Change]) -> Vec<Result<()>> {
        let observes = |change: &Change| matches!(change, Change::Observe(..));
        if !self.mirrored
            && changes.iter().any(observes)
            && let Err(error) = self.mirror()
        {
            let why = format!("{error:#}");
            return changes.iter().map(|_| Err(anyhow!("{why}"))).collect();
        }
        let lines: Vec<_> = changes.iter().map(|change| self.lines(*change)).collect();
        let batch: Vec<_> = lines
            .iter()
            .flatten()
            .flatten()
            .map(String::as_str)
            .collect();
        let mut outcomes = Vec::new();
        if let Err(failure) = restore(&batch) {
            // Somebody may have taken our sets away.
            if failure.reason.contains("does not exist")
                && let Err(error) = self.prepare_anew()
            {
                warn!("cannot set up ipset and iptables again: {error:#}");
            }
            outcomes = restore_each(&batch);
        }
        let mut outcomes = outcomes.into_iter();
        lines
            .into_iter()
            .map(|lines| {
                let own = outcomes.by_ref().take(lines?.len());
                own.collect::<Result<()>>()
            })
            .collect()
    }

    /// A family at a time. ipset does not show entries past their time.
    fn entries_from(&mut self, from: Cursor) -> Result<Page<Entry>> {
        let families = self.families;
        let Some(family) = families.get(from.place) else {
            return Ok((Vec::new(), None));
        };
        Ok((self.bans_of(family)?, from.next_place(families.len())))
    }

    fn counters(&mut self) -> Result<Counters> {
        let mut totals = self.counted;
        for family in self.families {
            totals.add(family, &family.listed()?.unwrap_or_default());
        }
        Ok(vec![
            (Counter::Dropped.name(), totals.dropped),
            (Counter::WouldDrop.name(), totals.would_drop),
            (Counter::Allowed.name(), totals.allowed),
        ])
    }

    /// Makes whatever is missing, so it also repairs what somebody has flushed.
    fn activate(&mut self) -> Result<bool> {
        self.is_active = true;
        let refilled = self.prepare()?;
        let (mut place, mut inserted) = (BTreeSet::new(), Vec::new());
        let moved = self.families.iter().try_fold(false, |moved, family| {
            Ok(family.insert_jumps(&mut place, &mut inserted)? || moved)
        });
        if let Ok(moved) = moved {
            self.place = place;
            return Ok(refilled || moved);
        }
        for (family, chain) in inserted {
            if let Err(error) = family.remove_jumps(chain) {
                warn!("the jump from {chain} stays: {error:#}");
            }
        }
        moved
    }

    fn detach(&mut self) -> Result<()> {
        remove(self.families)
    }
}

/// What an earlier run has left in the kernel; nothing where there is nothing. Changes nothing.
///
/// # Errors
/// When a set that is there cannot be read.
pub fn left() -> Result<Left> {
    let mut left = Left::default();
    if our_sets()?.is_empty() {
        return Ok(left);
    }
    for family in families() {
        for (set, observed) in [(family.bans, false), (family.observed, true)] {
            let bans = listed(set)?.into_iter();
            left.bans.extend(bans.map(|ban| Entry { observed, ..ban }));
        }
        let allow = listed(family.allow)?.into_iter();
        left.allow.extend(allow.map(|entry| entry.subject.net()));
        if let Some(rules) = family.listed()? {
            let [.., drop] = family.rules(Mode::Enforce);
            let drops = rules.iter().any(|rule| rule.text == drop);
            left.mode = Some(if drops { Mode::Enforce } else { Mode::Observe });
        }
    }
    Ok(left)
}

/// The entries of a set; none where there is no such set.
fn listed(set: &str) -> Result<Vec<Entry>> {
    match save(set) {
        Ok(listing) => Ok(entries(&listing)),
        Err(failure) if failure.reason.contains("does not exist") => Ok(Vec::new()),
        Err(failure) => Err(failure).with_context(|| format!("cannot list the ipset {set}")),
    }
}

/// Which of our sets there are. Where there are none there is no rule of ours, as a rule keeps its set.
fn our_sets() -> Result<Vec<String>> {
    let sets = match run("ipset", &["-n", "list"], String::new()) {
        Err(failure) if failure.is_unavailable => return Ok(Vec::new()),
        sets => sets.context("cannot list the ipsets")?,
    };
    let is_ours = |set: &&str| FAMILIES.iter().any(|family| family.sets().contains(set));
    Ok(sets.lines().filter(is_ours).map(str::to_owned).collect())
}

/// Takes out what an earlier run has left in the kernel; says whether there was anything.
///
/// # Errors
/// When something could not be taken out; the rest is.
pub fn remove_leftovers() -> Result<bool> {
    if our_sets()?.is_empty() {
        return Ok(false);
    }
    remove(families())?;
    Ok(true)
}

fn remove(families: &[Family]) -> Result<()> {
    let mut done = Ok(());
    for family in families {
        for chain in ["INPUT", "FORWARD", "DOCKER-USER"] {
            done = done.and(family.remove_jumps(chain));
        }
        done = done.and(family.remove_chain());
        for set in family.sets() {
            done = done.and(destroy(set));
        }
    }
    done
}

impl Family {
    fn has(&self, subject: Subject) -> bool {
        matches!(subject.net(), IpNet::V6(_)) == self.v6
    }

    const fn ban_set(&'static self, name: &'static str, room: u32) -> Set {
        Set {
            name,
            family: self,
            room,
            bans: true,
        }
    }

    const fn allow_set(&'static self) -> Set {
        Set {
            name: self.allow,
            family: self,
            room: MAX_ALLOWED,
            bans: false,
        }
    }

    const fn sets(&self) -> [&'static str; 4] {
        [self.bans, self.observed, self.allow, self.spare]
    }

    fn fill_allowlist(&'static self, wanted: &BTreeSet<Subject>) -> Result<bool> {
        let listing = save(self.allow)?;
        let found: BTreeSet<Subject> = entries(&listing)
            .into_iter()
            .map(|entry| entry.subject)
            .collect();
        if found == *wanted && !listing.lines().any(is_exception) {
            return Ok(false);
        }
        let members = wanted.iter().map(Subject::to_string);
        self.allow_set().replace(members)?;
        Ok(true)
    }

    /// What the chain is to hold, word for word as iptables lists it.
    fn rules(&self, mode: Mode) -> [String; 4] {
        let Self {
            bans,
            observed,
            allow,
            ..
        } = self;
        let verdict = match mode {
            Mode::Observe => "",
            Mode::Enforce => " -j DROP",
        };
        let not_in = |set| format!("-m set ! --match-set {set} src ! --update-counters");
        [
            format!("-A {CHAIN} {} {} -j RETURN", not_in(bans), not_in(observed)),
            format!("-A {CHAIN} -m set --match-set {allow} src -j RETURN"),
            format!("-A {CHAIN} -m set --match-set {observed} src -j RETURN"),
            format!("-A {CHAIN} -m set --match-set {bans} src{verdict}"),
        ]
    }

    /// Makes the chain or replaces its rules, in one transaction: no packet meets half of them.
    fn refill(&self, rules: &[String]) -> Result<()> {
        let script = format!("*filter\n:{CHAIN} - [0:0]\n{}\nCOMMIT\n", rules.join("\n"));
        run(
            self.iptables_restore,
            &["-w", LOCK_WAIT, "--noflush"],
            script,
        )
        .with_context(|| format!("cannot write the chain {CHAIN}"))?;
        Ok(())
    }

    /// What the chain holds; `None` if there is none.
    fn listed(&self) -> Result<Option<Vec<Rule>>> {
        match self.run(&["-v", "-S", CHAIN]) {
            Ok(listing) => Ok(Some(
                listing
                    .lines()
                    .filter(|line| line.starts_with("-A "))
                    .map(Rule::from)
                    .collect(),
            )),
            Err(failure) if failure.code == Some(1) => Ok(None),
            Err(failure) => Err(failure).with_context(|| format!("cannot list the chain {CHAIN}")),
        }
    }

    /// At which places of a chain another one is jumped to without a condition, from 0; none if there is no such chain.
    fn jumps(&self, from: &str, to: &str) -> Result<Vec<usize>> {
        let jump = format!("-A {from} -j {to}");
        match self.run(&["-S", from]) {
            Ok(listing) => Ok(listing
                .lines()
                .filter(|line| line.starts_with("-A "))
                .enumerate()
                .filter(|(_, rule)| *rule == jump)
                .map(|(place, _)| place)
                .collect()),
            Err(failure) if failure.code == Some(1) => Ok(Vec::new()),
            Err(failure) => Err(failure).with_context(|| format!("cannot list the chain {from}")),
        }
    }

    /// Puts the one jump to our chain before all other rules, in one transaction.
    fn put_first(&self, chain: &str, jumps: usize) -> Result<()> {
        let remove = format!("-D {chain} -j {CHAIN}\n").repeat(jumps);
        let script = format!("*filter\n{remove}-I {chain} 1 -j {CHAIN}\nCOMMIT\n");
        run(
            self.iptables_restore,
            &["-w", LOCK_WAIT, "--noflush"],
            script,
        )
        .with_context(|| format!("cannot jump from {chain}"))?;
        Ok(())
    }

    /// Lets packets meet our chain before all else, whether they are for this host or forwarded.
    ///
    /// At every start Docker puts rules that accept before all others in FORWARD, so ours is where it sends packets
    /// before. Not if it is no longer there: it leaves that chain behind.
    fn insert_jumps(
        &'static self,
        place: &mut BTreeSet<&'static str>,
        inserted: &mut Vec<(&'static Self, &'static str)>,
    ) -> Result<bool> {
        let docker = !self.jumps("FORWARD", "DOCKER-USER")?.is_empty();
        let (forward, other) = if docker {
            ("DOCKER-USER", "FORWARD")
        } else {
            ("FORWARD", "DOCKER-USER")
        };
        let mut moved = false;
        for chain in ["INPUT", forward] {
            let jumps = self.jumps(chain, CHAIN)?;
            if jumps != [0] {
                self.put_first(chain, jumps.len())?;
                moved = true;
                if jumps.is_empty() {
                    inserted.push((self, chain));
                }
            }
            place.insert(chain);
        }
        // Not twice: it would count twice.
        self.remove_jumps(other)?;
        Ok(moved)
    }

    fn remove_jumps(&self, chain: &str) -> Result<()> {
        for _ in self.jumps(chain, CHAIN)? {
            self.run(&["-D", chain, "-j", CHAIN])
                .with_context(|| format!("cannot remove the jump from {chain}"))?;
        }
        Ok(())
    }

    fn remove_chain(&self) -> Result<()> {
        if self.listed()?.is_some() {
            self.run(&["-F", CHAIN])
                .with_context(|| format!("cannot empty the chain {CHAIN}"))?;
            self.run(&["-X", CHAIN])
                .with_context(|| format!("cannot remove the chain {CHAIN}"))?;
        }
        Ok(())
    }

    fn run(&self, args: &[&str]) -> Result<String, Failure> {
        run(
            self.iptables,
            &[&["-w", LOCK_WAIT], args].concat(),
            String::new(),
        )
    }
}

/// A rule in our chain.
#[derive(Debug, PartialEq, Eq)]
struct Rule {
    /// Without its counters.
    text: String,
    packets: u64,
}

/// From a line such as `-A PORTCULLIS -m set --match-set PORTCULLIS4 src -c 20 860 -j DROP`.
impl From<&str> for Rule {
    fn from(line: &str) -> Self {
        let counted = line.split_once(" -c ").and_then(|(matches, rest)| {
            let mut words = rest.splitn(3, ' ');
            let packets = words.next()?.parse().ok()?;
            let target = words
                .nth(1)
                .map_or(String::new(), |target| format!(" {target}"));
            Some(Self {
                text: format!("{matches}{target}"),
                packets,
            })
        });
        counted.unwrap_or_else(|| Self {
            text: line.into(),
            packets: 0,
        })
    }
}

/// Packets, by what became of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Totals {
    dropped: u64,
    would_drop: u64,
    allowed: u64,
}

impl Totals {
    fn add(&mut self, family: &Family, listed: &[Rule]) {
        let [.., drop] = family.rules(Mode::Enforce);
        let [_, allow, observed, observe] = family.rules(Mode::Observe);
        for Rule { text, packets } in listed {
            if *text == drop {
                self.dropped += packets;
            } else if *text == observed || *text == observe {
                self.would_drop += packets;
            } else if *text == allow {
                self.allowed += packets;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_reads_back_with_and_without_a_target() {
        let [family, _] = &FAMILIES;
        let listing = [
            "-A PORTCULLIS -m set ! --match-set PORTCULLIS4 src ! --update-counters -m set ! --match-set PORTCULLIS-O4 src \
             ! --update-counters -c 7 700 -j RETURN",
            "-A PORTCULLIS -m set --match-set PORTCULLIS-A4 src -c 3 300 -j RETURN",
            "-A PORTCULLIS -m set --match-set PORTCULLIS-O4 src -c 4 400 -j RETURN",
            "-A PORTCULLIS -m set --match-set PORTCULLIS4 src -c 20 860 -j DROP",
        ];
        let enforced = listing.map(Rule::from);
        assert_eq!(
            enforced.each_ref().map(|rule| rule.text.clone()),
            family.rules(Mode::Enforce)
        );
        let observed = Rule::from("-A PORTCULLIS -m set --match-set PORTCULLIS4 src -c 5 430");
        assert_eq!(observed.text, family.rules(Mode::Observe)[3]);

        let mut totals = Totals::default();
        totals.add(family, &enforced);
        totals.add(
            family,
            &[
                observed,
                Rule::from("-A PORTCULLIS -j ACCEPT"),
                Rule::from("-A PORTCULLIS -c 9"),
            ],
        );
        assert_eq!(
            totals,
            Totals {
                dropped: 20,
                would_drop: 9,
                allowed: 3
            }
        );
    }

    #[test]
    fn each_change_goes_to_the_set_of_its_family() {
        let mut iptables = Iptables {
            mode: Mode::Enforce,
            max_bans: 1,
            families: &FAMILIES,
            is_active: false,
            allow: None,
            mirrored: false,
            counted: Totals::default(),
            place: BTreeSet::new(),
        };
        let (v4, v6) = (
            "192.0.2.1".parse().unwrap(),
            "2001:db8::/64".parse().unwrap(),
        );
        let line = |iptables: &Iptables, subject| {
            let lines = iptables.lines(Change::Unban(subject)).unwrap();
            lines.join("; ")
        };
        let ipv4 = "del PORTCULLIS4 192.0.2.1; del PORTCULLIS-O4 192.0.2.1";
        assert_eq!(line(&iptables, v4), ipv4);
        let ipv6 = "del PORTCULLIS6 2001:db8::/64; del PORTCULLIS-O6 2001:db8::/64";
        assert_eq!(line(&iptables, v6), ipv6);
        iptables.families = &FAMILIES[..1];
        assert_eq!(line(&iptables, v6), "# 2001:db8::/64");
    }
}
