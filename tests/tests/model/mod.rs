//! A small model of the ledger, written from what the manual promises and not from the engine: who is banned until when, what is
//! on whose account, and whom operators have allowed. [`rig`] holds the real thing against it.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::allow_attributes,
    reason = "each test crate uses its part"
)]
#![expect(clippy::panic, reason = "a test panics with its evidence")]

pub mod kernel;
pub mod rig;
pub mod steps;

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    path::Path,
};

use portcullis_engine::Subject;
use proptest::test_runner::{Config, RngSeed, TestRunner};
use tempfile::TempDir;

use self::{rig::Met, steps::Step};

/// Bans at a time; an import meets it.
pub const MAX_BANS: usize = 30;
/// Accounts that are kept.
pub const MAX_OFFENDERS: usize = 16;
/// A source that has sent nothing for so long has stopped. Seconds.
pub const QUIET: u64 = 60;
/// A ban is extended so often.
pub const EXTENSIONS: u32 = 2;
/// Sources are looked at so long before their bans end. Milliseconds.
const LOOK_BEFORE: u64 = 2000;

/// Runs so many random sequences of fewer steps than that. Their seed is 1954; `PROPTEST_RNG_SEED` and `PROPTEST_CASES` say otherwise.
pub fn run(cases: u32, most: usize, test: impl Fn(&[Step]) -> Met) {
    let default = Config::default();
    let or = |name: &str| env::var_os(name).is_some();
    let config = Config {
        cases: if or("PROPTEST_CASES") {
            default.cases
        } else {
            cases
        },
        rng_seed: if or("PROPTEST_RNG_SEED") {
            default.rng_seed
        } else {
            RngSeed::Fixed(1954)
        },
        failure_persistence: None,
        max_shrink_iters: 2000,
        ..default
    };
    let met = std::cell::RefCell::new(Met::default());
    let mut runner = TestRunner::new(config);
    let result = runner.run(&steps::steps(most), |steps| {
        *met.borrow_mut() += test(&steps);
        Ok(())
    });
    if let Err(failure) = result {
        panic!("{failure}");
    }
    let met = met.into_inner();
    println!("{met:?}");
    assert!(
        met.is_all(),
        "sequences that never get there prove nothing: {met:?}"
    );
}

/// A folder in memory where there is such: this is about what is written, and not about how long a disk takes for that.
pub fn folder() -> TempDir {
    let memory = Path::new("/dev/shm");
    let folder = if memory.is_dir() {
        tempfile::tempdir_in(memory)
    } else {
        tempfile::tempdir()
    };
    folder.unwrap()
}

/// A ban. Times are milliseconds of the day's clock; no end: it is for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    pub since: u64,
    pub end: Option<u64>,
    /// None: an operator's.
    pub tier: Option<u32>,
    pub observe: bool,
    pub extended: u32,
    /// When it is to end once it is confirmed.
    pub wanted: Option<Wanted>,
}

/// What a ban is to be once it is confirmed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    pub end: Option<u64>,
}

/// What somebody has on his account.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Account {
    pub count: u32,
    pub last: u64,
}

/// What survives a restart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ledger {
    pub bans: BTreeMap<Subject, Standing>,
    pub accounts: BTreeMap<Subject, Account>,
    pub allowed: BTreeSet<Subject>,
}

/// What an operator has configured. Lengths are milliseconds, none is for good; an empty schedule knows nothing else.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    pub schedule: Vec<Option<u64>>,
    /// An offence is forgotten after so long; 0: never.
    pub forgive: u64,
    pub allow: BTreeSet<Subject>,
}

impl Rules {
    fn step(&self, count: u32) -> (u32, Option<u64>) {
        let steps = u32::try_from(self.schedule.len()).unwrap().max(1);
        let step = count.clamp(1, steps);
        let length = self.schedule.get(step as usize - 1);
        (step, length.copied().flatten())
    }
}

/// The ledger, and what is known besides until the agent ends.
#[derive(Clone, Debug, Default)]
pub struct Model {
    pub ledger: Ledger,
    pub rules: Rules,
    /// Bans whose sources were looked at, or are about to be.
    asked: BTreeSet<Subject>,
}

const fn after(now: u64, length: Option<u64>) -> Option<u64> {
    match length {
        Some(length) => Some(now + length),
        None => None,
    }
}

fn shifted(at: u64, millis: i64) -> u64 {
    at.checked_add_signed(millis).unwrap()
}

impl Standing {
    fn shifted(self, millis: i64) -> Self {
        Self {
            since: shifted(self.since, millis),
            end: self.end.map(|end| shifted(end, millis)),
            wanted: self.wanted.map(|wanted| Wanted {
                end: wanted.end.map(|end| shifted(end, millis)),
            }),
            ..self
        }
    }
}

impl Model {
    /// Entries of the allowlist, whoever has made them.
    pub fn allowlist(&self) -> BTreeSet<Subject> {
        &self.ledger.allowed | &self.rules.allow
    }

    fn is_allowed(&self, subject: Subject) -> bool {
        self.allowlist().iter().any(|entry| entry.covers(subject))
    }

    /// What the kernel makes of a packet: the narrowest ban around its source decides, the allowlist before all.
    pub fn drops(&self, source: Subject) -> bool {
        !self.is_allowed(source) && self.is_kept_out(source)
    }

    fn is_kept_out(&self, source: Subject) -> bool {
        let around = self.ledger.bans.iter();
        let around = around.filter(|(subject, _)| subject.covers(source));
        let narrowest = around.max_by_key(|(subject, _)| subject.net().prefix_len());
        narrowest.is_some_and(|(_, ban)| !ban.observe)
    }

    /// Time has come to this; returns whose sources are to be looked at.
    pub fn pass(&mut self, now: u64) -> BTreeSet<Subject> {
        let is_soon = |subject: &Subject, ban: &Standing| {
            let is_due = ban
                .end
                .is_some_and(|end| end > now && end <= now + LOOK_BEFORE);
            is_due
                && ban.tier.is_some()
                && ban.extended < EXTENSIONS
                && !self.asked.contains(subject)
        };
        let bans = self.ledger.bans.iter();
        let looks: BTreeSet<Subject> = bans
            .filter(|(subject, ban)| is_soon(subject, ban))
            .map(|(subject, _)| *subject)
            .collect();
        self.asked.extend(&looks);
        let bans = self.ledger.bans.iter();
        let over: Vec<Subject> = bans
            .filter(|(_, ban)| ban.end.is_some_and(|end| end <= now))
            .map(|(subject, _)| *subject)
            .collect();
        for subject in over {
            self.lift(subject);
            if let Some(account) = self.ledger.accounts.get_mut(&subject) {
                account.last = now;
            }
        }
        looks
    }

    /// Its source has been looked at.
    pub fn looked(&mut self, subject: Subject, is_sending: bool) {
        if !is_sending || !self.asked.remove(&subject) {
            return;
        }
        let ban = self.ledger.bans.get_mut(&subject);
        if let Some(ban) = ban
            && let (Some(tier), Some(end)) = (ban.tier, ban.end)
        {
            ban.end = after(end, self.rules.step(tier).1);
            ban.extended += 1;
        }
    }

    /// A client does what no visitor does.
    pub fn offend(&mut self, client: Subject, now: u64) {
        let is_spared = self.allowlist().iter().any(|entry| entry.overlaps(client));
        if is_spared || self.is_kept_out(client) {
            return;
        }
        let account = self.ledger.accounts.get(&client);
        let count = account.map_or(0, |account| {
            let silent = now.saturating_sub(account.last);
            let forgiven = silent.checked_div(self.rules.forgive).unwrap_or(0);
            account
                .count
                .saturating_sub(u32::try_from(forgiven).unwrap_or(u32::MAX))
        });
        let (tier, length) = self.rules.step(count + 1);
        let end = after(now, length);
        if !self.make_room(client, end, true) {
            return;
        }
        self.enter(
            client,
            Standing {
                since: now,
                end,
                tier: Some(tier),
                observe: false,
                extended: 0,
                wanted: None,
            },
        );
        let count = count + 1;
        self.settle(client, Account { count, last: now });
    }

    /// An operator bans; lengths are milliseconds.
    pub fn ban(
        &mut self,
        subject: Subject,
        length: Option<u64>,
        observe: bool,
        confirm: Option<u64>,
        now: u64,
    ) -> bool {
        let is_standing = self.ledger.bans.contains_key(&subject);
        let wanted = after(now, length);
        let is_refused = confirm.is_some() && is_standing || self.is_allowed(subject);
        if is_refused || !self.make_room(subject, wanted, false) {
            return false;
        }
        let end = match (wanted, confirm.map(|within| now + within)) {
            (Some(wanted), Some(soon)) => Some(wanted.min(soon)),
            (wanted, soon) => soon.or(wanted),
        };
        self.enter(
            subject,
            Standing {
                since: now,
                end,
                tier: None,
                observe,
                extended: 0,
                wanted: confirm.map(|_| Wanted { end: wanted }),
            },
        );
        true
    }

    pub fn confirm(&mut self, subject: Subject, now: u64) -> bool {
        let ban = self.ledger.bans.get(&subject).copied();
        let Some((ban, wanted)) = ban.and_then(|ban| Some((ban, ban.wanted?))) else {
            return false;
        };
        self.enter(
            subject,
            Standing {
                since: now,
                end: wanted.end,
                wanted: None,
                ..ban
            },
        );
        true
    }

    pub fn unban(&mut self, subject: Subject, now: u64) -> bool {
        let was_banned = self.lift(subject);
        if was_banned {
            self.pardon(subject, now);
        }
        was_banned
    }

    pub fn allow(&mut self, whole: Subject, now: u64) {
        self.ledger.allowed.insert(whole);
        self.spare(now);
    }

    pub fn disallow(&mut self, whole: Subject) -> bool {
        self.ledger.allowed.remove(&whole)
    }

    pub fn configure(&mut self, rules: Rules, now: u64) {
        self.rules = rules;
        self.spare(now);
    }

    /// The clock was set: bans last as long as was decided.
    pub fn set_clock(&mut self, millis: i64) {
        for ban in self.ledger.bans.values_mut() {
            *ban = ban.shifted(millis);
        }
        for account in self.ledger.accounts.values_mut() {
            account.last = shifted(account.last, millis);
        }
    }

    /// A new run begins with this, by these rules. Returns whose sources are to be looked at.
    pub fn restart(&mut self, ledger: Ledger, rules: Rules, now: u64) -> BTreeSet<Subject> {
        *self = Self {
            ledger,
            rules,
            asked: BTreeSet::new(),
        };
        for ban in self.ledger.bans.values_mut() {
            // It has not begun: all of it is still to come, and no more.
            let ahead = ban.since.saturating_sub(now);
            *ban = ban.shifted(-i64::try_from(ahead).unwrap());
        }
        for account in self.ledger.accounts.values_mut() {
            account.last = account.last.min(now);
        }
        self.spare(now);
        self.pass(now)
    }

    /// The times at which something may happen by itself, after this.
    pub fn next_times(&self, now: u64) -> impl Iterator<Item = u64> {
        let ends = self.ledger.bans.values().filter_map(|ban| ban.end);
        ends.flat_map(|end| [end.saturating_sub(LOOK_BEFORE - 500), end + 100])
            .filter(move |at| *at > now)
    }

    fn enter(&mut self, subject: Subject, ban: Standing) {
        // What was found out about another ban is not about this one.
        self.asked.remove(&subject);
        self.ledger.bans.insert(subject, ban);
    }

    fn lift(&mut self, subject: Subject) -> bool {
        self.asked.remove(&subject);
        self.ledger.bans.remove(&subject).is_some()
    }

    fn pardon(&mut self, subject: Subject, now: u64) {
        self.settle(
            subject,
            Account {
                count: 0,
                last: now,
            },
        );
    }

    /// Of too many accounts the stillest is forgotten.
    fn settle(&mut self, subject: Subject, account: Account) {
        self.ledger.accounts.insert(subject, account);
        if self.ledger.accounts.len() > MAX_OFFENDERS {
            let accounts = self.ledger.accounts.iter();
            let stillest = accounts.min_by_key(|(subject, account)| (account.last, **subject));
            let stillest = *stillest.unwrap().0;
            self.ledger.accounts.remove(&stillest);
        }
    }

    /// Nobody on the allowlist is banned, nor is anything held against him.
    fn spare(&mut self, now: u64) {
        let bans = self.ledger.bans.keys().copied();
        let spared: Vec<Subject> = bans.filter(|subject| self.is_allowed(*subject)).collect();
        for subject in spared {
            self.unban(subject, now);
        }
    }

    /// In a full table the detector's ban that ends soonest gives way to a longer one, or to an operator's.
    fn make_room(&mut self, subject: Subject, end: Option<u64>, by_detector: bool) -> bool {
        let bans = &self.ledger.bans;
        if bans.len() < MAX_BANS || bans.contains_key(&subject) {
            return true;
        }
        let endings = bans.iter().filter(|(_, ban)| ban.tier.is_some());
        let endings = endings.filter_map(|(subject, ban)| Some((ban.end?, *subject)));
        let Some((soonest, victim)) = endings.min() else {
            return false;
        };
        let gives_way = !by_detector || end.is_none_or(|end| soonest < end);
        gives_way && self.lift(victim)
    }
}
