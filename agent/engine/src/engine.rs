//! The engine: lines, time, operators' words and outcomes in; commands out.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use indexmap::IndexSet;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::{
    allowlist::{Allowlist, Why},
    baseline::{self, Baseline, Normal, Second},
    blast::{self, Blast, Suspect},
    clients::{Client, Clients},
    command::{Action, Allowed, Change, Command, Event, Outcome},
    cusum::Cusum,
    detect::{self, Finding, Sample, Test},
    explain::{self, Explanation, Spared},
    habits::{Habits, Place},
    ledger::{Ban, Full, Gate, Ledger, Length, Offences, Origin, Term, Weight},
    parse::{Format, Malformed, Record},
    prefixes::Prefixes,
    subject::Subject,
    time::{Timestamp, format_duration},
    watch::Watch,
    window::Window,
};

/// Everything that the engine goes by.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// How the log is written.
    pub format: Format,
    /// How normal traffic is learnt.
    pub baseline: baseline::Settings,
    /// When a rate is an anomaly.
    pub detect: detect::Settings,
    /// Ban lengths of the first, second … offence; the last one repeats.
    pub schedule: Vec<Length>,
    /// An offence is forgotten after so long without another; zero: never.
    pub forgive: Duration,
    /// Bans last longer by up to this share of their length, so that who was banned together does not return together.
    pub jitter: f64,
    /// What is looked at before a ban ends.
    pub release: Release,
    /// How many bans the detector may make, and of whom.
    pub blast: blast::Settings,
    /// Never banned.
    pub allow: Vec<IpNet>,
    /// Proxies that Nginx takes clients' addresses from. Never banned.
    pub proxies: Vec<IpNet>,
    /// What becomes of a client that came through one, when it is flagged.
    pub proxied: Proxied,
    /// Clients whose windows are kept.
    pub max_clients: usize,
    /// Bans at a time.
    pub max_bans: usize,
    /// Subjects whose offences are remembered.
    pub max_offenders: usize,
}

/// What becomes of a flagged client that came through a proxy. No packet has its address, so a ban at the wire would do nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Proxied {
    /// People are told.
    #[default]
    Tell,
    /// It is banned in Nginx.
    Ban,
}

/// A ban that an operator wishes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wish {
    /// Why.
    pub reason: String,
    /// Who.
    pub by: String,
    /// It only counts what it would drop.
    pub observe: bool,
    /// It ends after so long unless it is confirmed.
    pub confirm: Option<Duration>,
}

/// Before a detector's ban ends, whether its source is still sending: whoever is not kept out any more would only be banned again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Release {
    /// A source that has sent nothing for so long has stopped. Zero: it is not looked at.
    pub quiet: Duration,
    /// A ban is extended so often at most, each time by the length that it had; then it ends whatever its source does.
    pub extensions: u32,
}

/// A line of a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Line<'a> {
    /// What it says, without its end.
    pub text: &'a [u8],
    /// The byte of its log at which it begins.
    pub offset: u64,
}

/// How lines were come by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feed {
    /// A former run has read them already; they are read again to know what it knew.
    pub again: bool,
    /// There is more to read than what was written just now. Windows then move with the lines, not with the clock.
    pub behind: bool,
    /// Lines of the present come in between. What is read while `behind` then teaches nothing, since those would be counted
    /// long before what came before them.
    pub mixed: bool,
    /// Of so many lines one was read, at random; 1: all.
    pub one_in: u32,
}

impl Default for Feed {
    fn default() -> Self {
        Self {
            again: false,
            behind: false,
            mixed: false,
            one_in: 1,
        }
    }
}

/// What a former run has left.
#[derive(Clone, Debug, Default)]
pub struct Saved {
    /// Bans that stood.
    pub bans: Vec<Ban>,
    /// Accounts.
    pub offences: Vec<(Subject, Offences)>,
    /// What operators had put on the allowlist.
    pub allow: Vec<(IpNet, Allowed)>,
    /// What had been learnt.
    pub baseline: Option<baseline::Saved>,
}

/// Why an operator's request is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The allowlist always wins.
    #[error(
        "{subject} is on the allowlist ({entry}: {why}); {}",
        way_off(why, entry)
    )]
    Allowed {
        /// Who was to be banned.
        subject: Subject,
        /// The entry of the allowlist.
        entry: IpNet,
        /// Why it is on it.
        why: Why,
    },
    /// Too large a part of the internet.
    #[error("{0} is too wide: the widest bans are /8 (IPv4) and /16 (IPv6)")]
    TooWide(Subject),
    /// No room.
    #[error(transparent)]
    Full(#[from] Full),
    /// Rolled back, it would not be as it was before.
    #[error("{0} is banned already: lift that ban first, or ban without --confirm")]
    Standing(Subject),
    /// Nothing to confirm.
    #[error("the ban of {0} needs no confirmation")]
    Confirmed(Subject),
    /// Nothing to take off the allowlist.
    #[error(
        "{0} is on the allowlist by no operator's word; `portcullis allow list` shows what is, and why"
    )]
    NotAllowed(IpNet),
    /// Nobody would be left to ban.
    #[error(
        "{0} is too wide: the widest entries are /8 (IPv4) and /16 (IPv6); mode = \"observe\" bans nobody"
    )]
    TooWideToAllow(IpNet),
    /// The allowlist is full.
    #[error(
        "the allowlist has {0} entries of operators: take some off, or name wider networks in bans.allow"
    )]
    AllowlistFull(usize),
    /// Nothing to lift.
    #[error("{0} is not banned; `portcullis bans` lists what is")]
    NotBanned(Subject),
}

/// Totals since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Lines read into a record.
    pub lines: u64,
    /// Lines that could not be.
    pub malformed: u64,
    /// Lines that a former run had read, read again to know what it knew.
    pub again: u64,
    /// Records older than the window when they were read: nobody is banned for them.
    pub late: u64,
    /// Clients that would have been flagged for such.
    pub late_findings: u64,
    /// Records of clients that came through a proxy.
    pub proxied: u64,
    /// Records of clients that were banned already.
    pub from_banned: u64,
    /// Bans decided by the detector.
    pub bans: u64,
    /// Bans that the allowlist or a full table prevented.
    pub refusals: u64,
    /// Bans that gave way to others in a full table.
    pub gave_way: u64,
}

/// The state, for status pages.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    /// When it was taken.
    pub time: Timestamp,
    /// What is normal.
    pub normal: Normal,
    /// Requests a second of the whole site, averaged over the window.
    pub rate: f64,
    /// z of that rate.
    pub score: f64,
    /// Since when the site's alarm stands.
    pub alarm_since: Option<Timestamp>,
    /// Since when bans of the detector have to wait, for there were too many.
    pub held_since: Option<Timestamp>,
    /// Clients whose windows are kept.
    pub clients: usize,
    /// Clients that had to give way in a full table.
    pub clients_evicted: u64,
    /// Bans that stand.
    pub bans: usize,
    /// Totals since the start.
    pub totals: Totals,
}

/// A site alarm that stands.
#[derive(Clone, Copy, Debug)]
struct Alarm {
    since: Timestamp,
    flagged: Timestamp,
}

/// Seconds by which lines may be late before their second is held against what is normal.
const SETTLED: u64 = 2;

/// Proxies that are known by what they do, besides those that are configured; further ones are not kept.
const MAX_PROXIES: usize = 1024;
/// In seconds.
const DAY: u64 = 86_400;
/// In a second so many IPv6 networks are looked at for members who behave; others have to wait for another member's ban, a minute
/// later.
const MAX_LOOKS: u32 = 4;
/// Sources are looked at so long before their bans end.
const LOOK_BEFORE: Duration = Duration::from_secs(2);
/// Entries that operators may add to the allowlist while the agent runs.
const MAX_ALLOWED: usize = 4096;
/// Logs whose names are kept for evidence.
const MAX_LOGS: usize = 1024;
/// So many lines are looked up at a time.
const GROUP: usize = 16;
/// So many who are not banned although they should be are told of in that time.
const MAX_REFUSED: usize = 16_384;
/// How long an allowlisted client may misbehave before it is told again.
const REFUSAL_SILENCE: Duration = Duration::from_mins(10);
/// Built-in part of the allowlist: what never comes from outside.
const LOOPBACK: [&str; 2] = ["127.0.0.0/8", "::1/128"];

/// See the crate's documentation.
#[derive(Debug)]
pub struct Engine {
    settings: Settings,
    feed: Feed,
    /// The second that the windows stand at; `None` before the first input.
    clock: Option<u64>,
    allow: Allowlist,
    /// Entries that operators have made there.
    allowed_by_operators: usize,
    /// Peers that were seen to bring others' addresses.
    seen_proxies: usize,
    newest_proxy: Option<IpAddr>,
    /// People know that proxies are configured and the log has no peers.
    blind_told: bool,
    /// Lines were read behind the time since people were last told what became of them.
    catching_up: bool,
    /// Late lines and findings by then.
    late_told: (u64, u64),
    /// All traffic, for the site's alarm.
    site: Window,
    /// Traffic of clients that nothing is held against: what leaves this window is learnt. A client that is flagged
    /// takes its share with it, so its attack never enters the baseline.
    legitimate: Window,
    /// The next second to learn; `None` before the first input.
    learn_from: Option<u64>,
    /// Seconds before this one were learnt by former runs.
    known_until: u64,
    /// Seconds of the last pause between requests that was longer than the window.
    long_pause: u64,
    baseline: Baseline,
    clients: Clients,
    ledger: Ledger,
    /// Bans that end soon, and whose sources are being looked at.
    looked_at: BTreeSet<Subject>,
    /// Bans that were extended, of which the back end has not told yet; and whether it has failed so far.
    extended: BTreeMap<Subject, bool>,
    watch: Watch,
    prefixes: Prefixes,
    blast: Blast,
    /// IPv6 networks that may be looked at in this second.
    looks: u32,
    /// Until when the refusal of a ban (the client is allowlisted, the table is full) need not be told again.
    refused: BTreeMap<Subject, Timestamp>,
    /// The second in which it was last looked whose time that was.
    swept: u64,
    cusum: Cusum,
    /// The next second that the site's sum takes in.
    sum_from: Option<u64>,
    alarm: Option<Alarm>,
    /// When the last alarm ended.
    aftermath: Option<Timestamp>,
    /// The logs that lines came from, in the order in which they were first named.
    logs: IndexSet<Arc<str>>,
    /// The log that lines come from now.
    log: u16,
    now: Timestamp,
    totals: Totals,
    commands: VecDeque<Command>,
}

impl Engine {
    /// An engine that goes on where `saved` ended, at `now`. Bans that ran out meanwhile, and bans of what has come
    /// onto the allowlist, are lifted by its first commands.
    #[must_use]
    pub fn new(settings: Settings, saved: Saved, now: Timestamp) -> Self {
        let mut allow = Allowlist::default();
        for (net, why) in configured(&settings) {
            allow.add(net, why);
        }
        let allowed_by_operators = saved.allow.len();
        for (net, allowed) in saved.allow {
            allow.add(net, Why::Operator(allowed));
        }
        let baseline = match &saved.baseline {
            Some(saved) => Baseline::restore(settings.baseline.clone(), saved, now),
            None => Baseline::new(settings.baseline.clone()),
        };
        let mut engine = Self {
            feed: Feed::default(),
            clock: None,
            allow,
            allowed_by_operators,
            seen_proxies: 0,
            newest_proxy: None,
            blind_told: false,
            catching_up: false,
            late_told: (0, 0),
            site: Window::default(),
            legitimate: Window::default(),
            // What is learnt already is not learnt again, and the time since is a pause only if it was short.
            learn_from: baseline
                .newest()
                .filter(|_| baseline.is_recent())
                .map(|newest| newest + 1),
            known_until: baseline.newest().map_or(0, |newest| newest + 1),
            long_pause: 0,
            baseline,
            clients: Clients::new(settings.max_clients),
            ledger: Ledger::new(
                settings.schedule.clone(),
                settings.max_bans,
                settings.max_offenders,
                settings.forgive,
            ),
            looked_at: BTreeSet::new(),
            extended: BTreeMap::new(),
            watch: Watch::new(
                &settings.detect,
                saved
                    .baseline
                    .as_ref()
                    .map(|saved| (&saved.population, &saved.usual)),
            ),
            prefixes: Prefixes::default(),
            blast: Blast::default(),
            looks: MAX_LOOKS,
            refused: BTreeMap::new(),
            swept: 0,
            cusum: Cusum::default(),
            sum_from: None,
            alarm: None,
            aftermath: None,
            logs: IndexSet::new(),
            log: 0,
            now,
            totals: Totals::default(),
            commands: VecDeque::new(),
            settings,
        };
        engine.restore(saved.bans, saved.offences, now);
        engine.release(now);
        engine
    }

    /// Takes over what a former run has left.
    fn restore(
        &mut self,
        mut bans: Vec<Ban>,
        mut offences: Vec<(Subject, Offences)>,
        now: Timestamp,
    ) {
        for (subject, account) in offences
            .iter_mut()
            .filter(|(_, account)| account.last > now)
        {
            account.last = now;
            self.command(Command::Save(Change::Offences(*subject, *account)));
        }
        for forgotten in self.ledger.restore_offences(offences) {
            self.command(Command::Save(Change::Forget(forgotten)));
        }
        // Made by a clock that was ahead: such a ban has not begun, so all of it is still to come, and no more.
        for ban in bans.iter_mut().filter(|ban| ban.since > now) {
            let ahead = ban.since.since(now).as_millis();
            let back = i64::try_from(ahead).map_or(i64::MIN, |ahead| -ahead);
            *ban = ban.clone().shifted(back);
            self.command(Command::Save(Change::Ban(ban.clone())));
        }
        let is_allowed = |ban: &mut Ban| self.allowed(ban.subject).is_some();
        for ban in bans.extract_if(.., is_allowed).collect::<Vec<_>>() {
            if let Some(entry) = self.allowed(ban.subject) {
                // As if it had come onto it while the agent ran.
                self.settle(ban.subject, true, now);
                self.lift(ban, format!("now on the allowlist ({entry})"));
            }
        }
        // Should there be less room than there was, the ones that end soonest go, and no operator's.
        let room = self.settings.max_bans;
        if bans.len() > room {
            bans.sort_by_key(|ban| {
                let end = match ban.term {
                    Term::Permanent => Timestamp::MAX,
                    Term::Until(end) => end,
                };
                (ban.origin == Origin::Detector, Reverse(end), ban.subject)
            });
            for ban in bans.split_off(room) {
                self.lift(ban, Full(room).to_string());
            }
        }
        self.ledger.restore(bans);
    }

    /// Goes by other settings from now on; caps follow with the next computation of what is normal. What was made at the
    /// start stays as it is: the window, the sizes of tables, the log's format, and what is done about proxies. Thresholds that
    /// are meant for another window are not heeded; says whether they are.
    pub fn reconfigure(&mut self, settings: Settings, now: Timestamp) -> bool {
        let old = &self.settings;
        let is_same_window = settings.detect.window_secs == old.detect.window_secs;
        let (baseline, detect) = if is_same_window {
            (settings.baseline, settings.detect)
        } else {
            (old.baseline.clone(), old.detect.clone())
        };
        let settings = Settings {
            format: old.format.clone(),
            baseline,
            detect,
            proxies: old.proxies.clone(),
            proxied: old.proxied,
            max_clients: old.max_clients,
            max_bans: old.max_bans,
            max_offenders: old.max_offenders,
            ..settings
        };
        self.baseline.set(settings.baseline.clone());
        self.ledger.set(settings.schedule.clone(), settings.forgive);
        self.settings = settings;
        let allow = self.settings.allow.iter();
        let allow = allow.map(|net| (*net, Why::Configured)).collect();
        self.replace_allowed(|why| *why == Why::Configured, allow, now);
        is_same_window
    }

    /// The log that the lines which follow come from. Of very many logs the names of later ones are not kept.
    pub fn log(&mut self, name: &Arc<str>) {
        if self
            .logs
            .get_index(self.log.into())
            .is_some_and(|log| log == name)
        {
            return;
        }
        let known = self.logs.get_index_of(name);
        let index = known.unwrap_or_else(|| {
            if self.logs.len() < MAX_LOGS {
                self.logs.insert_full(Arc::clone(name)).0
            } else {
                MAX_LOGS
            }
        });
        self.log = u16::try_from(index).unwrap_or(u16::MAX);
    }

    /// How the lines that follow are come by.
    pub fn feed(&mut self, feed: Feed) {
        self.catching_up |= feed.behind;
        self.feed = feed;
    }

    /// Takes in lines of the log. Those that cannot be read are counted and given to `malformed`, with the reason.
    pub fn lines<'a>(
        &mut self,
        lines: &[Line<'a>],
        now: Timestamp,
        mut malformed: impl FnMut(&'a [u8], Malformed),
    ) {
        for group in lines.chunks(GROUP) {
            let mut records = [None; GROUP];
            for (line, record) in group.iter().zip(&mut records) {
                match self.settings.format.read(line.text) {
                    Ok(mut read) => {
                        read.offset = line.offset;
                        *record = Some((read, Subject::of_client(read.client)));
                    }
                    Err(problem) => {
                        self.totals.malformed += u64::from(!self.feed.again);
                        malformed(line.text, problem);
                    }
                }
            }
            // One after the other without anything between, so that the memory of all is fetched at once.
            let places = records.map(|record| self.clients.place(record?.1));
            for (record, place) in records.into_iter().zip(places) {
                if let Some((record, subject)) = record {
                    self.count(&record, subject, place, now);
                }
            }
        }
    }

    /// Takes in requests of the past, in the order of their times, each as if it came at its own; time passes between them.
    pub fn replay(&mut self, records: &[Record]) {
        for group in records.chunks(GROUP) {
            let mut places = [None; GROUP];
            for (record, place) in group.iter().zip(&mut places) {
                *place = self.clients.place(Subject::of_client(record.client));
            }
            for (record, place) in group.iter().zip(places) {
                let now = self.now.max(record.at);
                self.pass_until(now);
                self.count(record, Subject::of_client(record.client), place, now);
            }
        }
    }

    /// Lets time pass up to a moment, as it does for a running agent: a second at a time while anything is under way.
    pub fn pass_until(&mut self, now: Timestamp) {
        while self.now.secs() < now.secs() {
            let next = self.now.secs() + 1;
            // Nobody is watched any more: what is left is that bans end, and the hours change.
            let is_quiet = self.clients.is_empty()
                && self.site.requests() == 0
                && self.alarm.is_none()
                && self.aftermath.is_none();
            let stride = match self.ledger.next_end() {
                _ if !is_quiet => next,
                // Of a long silence its last day says it all.
                end if now.secs() - self.now.secs() > 2 * DAY => {
                    let end = end.map_or(u64::MAX, |end| end.millis().div_ceil(1000));
                    end.min(now.secs() - DAY)
                }
                _ => self.next_change(),
            };
            self.tick(Timestamp::from_secs(stride.clamp(next, now.secs())));
        }
    }

    /// The next second at which something changes although nobody comes.
    fn next_change(&self) -> u64 {
        let minute = self.now.secs() + u64::from(self.settings.baseline.recompute_secs);
        let end = self.ledger.next_end();
        let end = end.map(|end| end.millis().div_ceil(1000));
        end.map_or(minute, |end| end.min(minute))
    }

    /// Takes in one request.
    pub fn record(&mut self, record: &Record, now: Timestamp) {
        let subject = Subject::of_client(record.client);
        self.count(record, subject, None, now);
    }

    fn count(&mut self, record: &Record, subject: Subject, place: Option<usize>, now: Timestamp) {
        if now.secs() != self.now.secs() {
            self.tick(now);
        }
        let Feed {
            again,
            behind,
            one_in: weight,
            ..
        } = self.feed;
        if again {
            self.totals.again += 1;
        } else {
            self.totals.lines += 1;
        }
        // A log clock ahead of ours must not put requests where they would never leave the window.
        let (second, window) = (record.at.secs().min(now.secs()), self.window_secs());
        let is_late = second + window <= now.secs();
        self.totals.late += u64::from(is_late && !again);
        if behind && self.clock.is_none_or(|clock| clock < second) {
            self.pass(second);
        }
        let clock = *self.clock.get_or_insert(second);
        if second + window <= clock {
            return;
        }
        let gate = self.gate(record);
        let error = record.status >= 400;
        self.site.add(second, error, weight);
        if self.ledger.keeps_out(subject, gate) {
            self.totals.from_banned += 1;
            return;
        }
        // What it had done by then is settled.
        if behind && self.ledger.is_settled(subject, record.at) {
            return;
        }
        self.legitimate.add(second, error, weight);
        let scarcity = self.clients.scarcity();
        let mut client = self.clients.touch(subject, place, clock, window);
        client.window.add(second, error, weight);
        if client.habits.is_none() && self.watch.is_worth_watching(client, scarcity) {
            let first = client.window.oldest().unwrap_or(second);
            let habits = self.watch.habits(subject, first);
            // Who was found and had to wait, and goes on, is on no further visit.
            if habits.is_regular && !self.refused.contains_key(&subject) {
                self.blast.visit(second);
            }
            let given = self.clients.give_habits(subject, habits, clock, window);
            let Some(given) = given else {
                return;
            };
            client = given;
        }
        let normal = self.baseline.normal();
        let line = Place {
            log: self.log,
            offset: record.offset,
        };
        let detect = &self.settings.detect;
        let seconds = (second, clock);
        let finding = self.watch.client(
            detect, normal, subject, client, record, line, seconds, weight,
        );
        if let Some(mut finding) = finding {
            // Banned or not, what it has done is no normal traffic.
            let Client {
                window: mut done,
                habits,
            } = self.clients.strip(subject);
            finding.samples = samples(&self.logs, habits.as_deref().map(Habits::samples));
            if let Some(habits) = &habits {
                self.watch.flagged(subject, &finding, habits);
            }
            self.legitimate.subtract(&done);
            // Behind the time, most of it may be over: would the rest do?
            let is_ordered = matches!(finding.test, Test::ZScore | Test::TimesMean | Test::Ceiling);
            let is_over = is_ordered && clock < now.secs() && {
                done.advance(now.secs(), window, |_| {});
                let room = self.watch.room(detect, habits.as_deref(), second);
                detect::client(detect, normal, &done, record.at, room).is_none()
            };
            if is_late || is_over {
                self.totals.late_findings += u64::from(!again);
            } else {
                let suspect = Suspect {
                    subject,
                    address: Some(record.client),
                    finding,
                    gate,
                    is_regular: self.watch.is_regular(subject) && !self.has_offended(subject),
                };
                self.flag(suspect, now);
            }
        }
    }

    /// Has it anything on its account?
    fn has_offended(&self, subject: Subject) -> bool {
        let offences = self.ledger.offences(subject);
        offences.is_some_and(|offences| offences.count > 0)
    }

    /// Where the client of a request can be kept out. Without the peer's address, and with proxies in front, nobody can tell
    /// whose packets they were.
    fn gate(&mut self, record: &Record) -> Gate {
        let proxy = match record.peer {
            Some(peer) if peer == record.client => return Gate::Wire,
            None if self.settings.proxies.is_empty() => return Gate::Wire,
            proxy => proxy,
        };
        self.totals.proxied += u64::from(!self.feed.again);
        if proxy.is_none() && !std::mem::replace(&mut self.blind_told, true) {
            let words = "the log does not say whose connections they were (realip_remote_addr), so every client is taken for one \
                         that came through a proxy, and nobody is banned at the wire";
            self.command(Command::Record(Event::new(self.now, Action::Notice, words)));
        }
        if let Some(proxy) = proxy
            && self.newest_proxy != Some(proxy)
        {
            self.newest_proxy = Some(proxy);
            self.meet(proxy);
        }
        Gate::Nginx
    }

    /// Whoever Nginx takes others' addresses from is a proxy, and a ban of it would cut off everybody behind it.
    fn meet(&mut self, proxy: IpAddr) {
        let subject = Subject::of_client(proxy);
        if self.allowed(subject).is_some() || self.seen_proxies >= MAX_PROXIES {
            return;
        }
        self.seen_proxies += 1;
        self.allow.add(subject.net(), Why::SeenProxy);
        let words = format!(
            "{proxy} is a proxy, since Nginx takes its clients' addresses from it: it is not banned from now on; name it in \
             source.proxies"
        );
        self.command(Command::Record(Event::new(self.now, Action::Notice, words)));
        if let Some(ban) = self.ledger.get(subject)
            && ban.origin == Origin::Detector
            && let Some(ban) = self.ledger.remove(subject)
        {
            self.lift(ban, "it is a proxy".to_owned());
        }
    }

    /// The clock was set by so many milliseconds, and it is `now` since. Bans last as long as was decided all the same.
    pub fn clock_set(&mut self, millis: i64, now: Timestamp) {
        self.ledger.shift(millis);
        self.blast.shift(millis);
        self.allow.shift(millis);
        for until in self.refused.values_mut() {
            *until = until.shifted(millis);
        }
        let bans = self.ledger.bans().cloned().map(Change::Ban);
        let accounts = self.ledger.accounts();
        let accounts = accounts.map(|(subject, offences)| Change::Offences(subject, offences));
        let saves: Vec<Change> = bans.chain(accounts).collect();
        for change in saves {
            self.command(Command::Save(change));
        }
        let by = format_duration(Duration::from_millis(millis.unsigned_abs()));
        let way = if millis < 0 { "back" } else { "forward" };
        let words = format!("the clock was set {way} by {by}: bans last as long as was decided");
        self.command(Command::Record(Event::new(now, Action::Notice, words)));
    }

    /// Lets time pass. To be called at least once a second, or whenever a test wants time to pass.
    pub fn tick(&mut self, now: Timestamp) {
        self.now = now;
        self.looks = MAX_LOOKS;
        let newest = self.site.newest().max(self.learn_from);
        let newest = newest.max(Some(self.known_until));
        if newest.is_some_and(|newest| newest > now.secs() + self.window_secs()) {
            // The clock was set back by more than a window: what was counted would stay for ever.
            self.site.clear();
            self.legitimate.clear();
            self.clients.clear();
            self.watch.set_back(now.secs());
            self.prefixes = Prefixes::default();
            self.refused.clear();
            self.learn_from = None;
            self.known_until = 0;
            self.clock = None;
        }
        if !self.feed.behind {
            self.pass(now.secs());
            if std::mem::take(&mut self.catching_up) {
                self.tell_late();
            }
        }
        self.release(now);
        self.ban_held(now);
        if now.secs() != self.swept {
            self.swept = now.secs();
            self.refused.retain(|_, until| *until > now);
        }
        if self.allow.expire(now) {
            self.command(Command::Allowlist);
        }
    }

    /// Bans the worst of those that had to wait, as far as there is room for them now.
    fn ban_held(&mut self, now: Timestamp) {
        let is_attacked = self.watch.is_attacked();
        while let Some(suspect) = self.blast.worst(&self.settings.blast, is_attacked, now) {
            // Somebody of a network may have come since it was looked at.
            if suspect.address.is_some() || !self.has_others(suspect.subject) {
                self.flag(suspect, now);
            }
        }
        if let Some(lasted) = self.blast.over(now) {
            let words = format!(
                "the detector makes all its bans again; some had to wait for {}",
                format_duration(lasted)
            );
            self.command(Command::Record(Event::new(now, Action::Resume, words)));
        }
    }

    fn tell_late(&mut self) {
        let (late, findings) = (self.totals.late, self.totals.late_findings);
        let (told, findings_told) = std::mem::replace(&mut self.late_told, (late, findings));
        if late == told {
            return;
        }
        let words = format!(
            "{} lines were older than {} when they were read: they were learnt from, and nobody was banned for them ({} clients \
             would have been)",
            late - told,
            format_duration(Duration::from_secs(self.window_secs())),
            findings - findings_told,
        );
        self.command(Command::Record(Event::new(self.now, Action::Notice, words)));
    }

    /// Moves the windows to a second, of the clock or of the log.
    fn pass(&mut self, second: u64) {
        let window = self.window_secs();
        self.clock = Some(second);
        self.sum(second);
        self.site.advance(second, window, |_| {});
        self.learn(second);
        self.recompute(second);
        // Nobody need get up for what is over.
        if second + window > self.now.secs() {
            self.watch_site(self.now);
            self.watch_attack(self.now);
        }
        let (watch, ledger, refused) = (&mut self.watch, &self.ledger, &self.refused);
        self.clients.sweep(second, window, |subject, client| {
            let offences = ledger.offences(subject);
            let is_clean = offences.is_none_or(|offences| offences.count == 0);
            if is_clean && !refused.contains_key(&subject) {
                watch.gone(subject, client, second);
            }
        });
    }

    /// Holds the seconds that are settled against what is normal, one by one.
    fn sum(&mut self, second: u64) {
        let until = second.saturating_sub(SETTLED);
        let from = self.sum_from.unwrap_or(until);
        if until.abs_diff(from) > self.window_secs() {
            self.cusum.clear();
        } else if self.baseline.normal().learnt != baseline::Learnt::WarmUp {
            for second in from..until {
                let requests = f64::from(self.site.at(second));
                self.cusum.add(
                    &self.settings.detect.cusum,
                    self.baseline.normal(),
                    requests,
                );
            }
        }
        self.sum_from = Some(until);
    }

    fn recompute(&mut self, second: u64) {
        if !self.baseline.recompute(Timestamp::from_secs(second)) {
            return;
        }
        let caps = &self.settings.detect.caps;
        self.watch.population.compute(caps, second);
        let learnt = Change::Baseline(Box::new(self.saved_baseline()));
        let is_baseline = |command: &Command| matches!(command, Command::Save(Change::Baseline(_)));
        // Of those that nobody has fetched the newest is enough.
        self.commands.retain(|command| !is_baseline(command));
        self.command(Command::Save(learnt));
        let Normal {
            mean,
            stddev,
            error_share,
            learnt,
            seconds,
        } = *self.baseline.normal();
        let learnt = match learnt {
            baseline::Learnt::WarmUp => "still warming up".to_owned(),
            baseline::Learnt::Recent => "from the recent past".to_owned(),
            baseline::Learnt::Hour(hour) => format!("from hour {hour} UTC"),
        };
        let errors = error_share * 100.0;
        let words = format!(
            "mean {mean:.2} req/s, stddev {stddev:.2}, errors {errors:.1} %, {seconds} s {learnt}"
        );
        self.command(Command::Record(Event::new(
            self.now,
            Action::Baseline,
            words,
        )));
    }

    /// Releases those whose time is over.
    fn release(&mut self, now: Timestamp) {
        self.now = now;
        self.look(now);
        while let Some(subject) = self.ledger.next_over(now) {
            if let Some(ban) = self.ledger.remove(subject) {
                self.settle(subject, false, now);
                let cause = match ban.once_confirmed {
                    Some(_) => "nobody has confirmed it",
                    None => "its time is over",
                };
                self.lift(ban, cause.to_owned());
            }
        }
    }

    /// Asks whether those are still sending whose time is nearly over.
    fn look(&mut self, now: Timestamp) {
        let Release { quiet, extensions } = self.settings.release;
        if quiet.is_zero() {
            return;
        }
        let soon = self.ledger.ending(now + LOOK_BEFORE).filter(|ban| {
            ban.origin == Origin::Detector
                && !ban.term.is_over(now)
                && ban.extended < extensions
                && ban.gate.has_wire()
                && !self.looked_at.contains(&ban.subject)
        });
        let soon: Vec<Subject> = soon.map(|ban| ban.subject).collect();
        for subject in soon {
            self.looked_at.insert(subject);
            self.command(Command::Look(subject));
        }
    }

    /// The newest packet of a source that was looked at came so long ago; `None`: there was none, or nobody can say.
    pub fn looked(&mut self, subject: Subject, ago: Option<Duration>, now: Timestamp) {
        let Release { quiet, extensions } = self.settings.release;
        // It may have ended meanwhile, or be another one by now.
        if !self.looked_at.remove(&subject) {
            return;
        }
        let Some(ago) = ago.filter(|ago| *ago < quiet) else {
            // Not asked again before its end.
            self.looked_at.insert(subject);
            return;
        };
        let Some(ban) = self.ledger.get(subject).cloned() else {
            return;
        };
        let (Some(tier), Term::Until(end)) = (ban.tier, ban.term) else {
            return;
        };
        let length = self.lasting(subject, self.ledger.length_of(tier), end);
        let ban = Ban {
            term: length.from(end),
            extended: ban.extended + 1,
            ..ban
        };
        let (ago, by) = (format_duration(ago), length);
        let by = match by {
            Length::For(by) => format_duration(by),
            Length::Permanent => "for good".to_owned(),
        };
        let words = format!(
            "still sending, the newest packet {ago} ago: extended by {by} ({} of {extensions})",
            ban.extended
        );
        let event = Event::of_ban(now, Action::Extend, &ban, words);
        if self.enforce(ban).is_ok() {
            self.extended.insert(subject, false);
            self.command(Command::Record(event));
        }
    }

    /// A length of the schedule with its jitter: as good as random, and the same whenever it is computed again.
    fn lasting(&self, subject: Subject, length: Length, from: Timestamp) -> Length {
        match length {
            Length::For(length) => {
                let mixed = (subject.bits() ^ from.millis()).wrapping_mul(0x9E37_79B9_7F4A_7C15);
                let share = (mixed >> 11) as f64 / (1_u64 << 53) as f64;
                Length::For(length + length.mul_f64(self.settings.jitter.clamp(0.0, 1.0) * share))
            }
            Length::Permanent => Length::Permanent,
        }
    }

    fn settle(&mut self, subject: Subject, pardoned: bool, now: Timestamp) {
        let Some((offences, forgotten)) = self.ledger.settle(subject, pardoned, now) else {
            return;
        };
        self.command(Command::Save(Change::Offences(subject, offences)));
        if let Some(forgotten) = forgotten {
            self.command(Command::Save(Change::Forget(forgotten)));
        }
    }

    /// Bans by an operator's word. An earlier ban of the same subject is replaced.
    ///
    /// # Errors
    /// [`Refusal`]: on the allowlist, too wide, or no room.
    pub fn ban(
        &mut self,
        subject: Subject,
        length: Length,
        wish: Wish,
        now: Timestamp,
    ) -> Result<(), Refusal> {
        let Wish {
            reason,
            by,
            observe,
            confirm,
        } = wish;
        if confirm.is_some() && self.ledger.get(subject).is_some() {
            return Err(Refusal::Standing(subject));
        }
        if let Some((entry, reasons)) = self.allow.covering(subject)
            && let Some(why) = reasons.first().cloned()
        {
            return Err(Refusal::Allowed {
                subject,
                entry,
                why,
            });
        }
        if is_too_wide(subject.net()) {
            return Err(Refusal::TooWide(subject));
        }
        let wanted = length.from(now);
        let term = match (confirm.map(|within| now + within), wanted) {
            (Some(soon), Term::Until(end)) => Term::Until(soon.min(end)),
            (Some(soon), Term::Permanent) => Term::Until(soon),
            (None, wanted) => wanted,
        };
        self.blast.forget(subject);
        self.make_room(subject, wanted, Origin::Operator);
        // Whether it comes through a proxy is not known of somebody who was not seen.
        let gate = match self.settings.proxied {
            Proxied::Tell => Gate::Wire,
            Proxied::Ban => Gate::Both,
        };
        let ban = Ban {
            reason,
            observe,
            gate,
            by: Some(by),
            once_confirmed: confirm.map(|_| wanted),
            ..Ban::new(subject, now, term, Origin::Operator)
        };
        self.enforce(ban)?;
        Ok(())
    }

    /// Lets a ban stand that an operator has made on approval.
    ///
    /// # Errors
    /// [`Refusal::NotBanned`], [`Refusal::Confirmed`].
    pub fn confirm(&mut self, subject: Subject, now: Timestamp) -> Result<(), Refusal> {
        let ban = self.ledger.get(subject).cloned();
        let mut ban = ban.ok_or(Refusal::NotBanned(subject))?;
        let wanted = ban.once_confirmed.take();
        ban.term = wanted.ok_or(Refusal::Confirmed(subject))?;
        ban.since = now;
        Ok(self.enforce(ban)?)
    }

    /// Lifts a ban by an operator's word, and strikes the subject's account: whoever was wrongly banned does not start
    /// at the second tier.
    ///
    /// # Errors
    /// [`Refusal::NotBanned`].
    pub fn unban(
        &mut self,
        subject: Subject,
        reason: String,
        now: Timestamp,
    ) -> Result<(), Refusal> {
        let ban = self
            .ledger
            .remove(subject)
            .ok_or(Refusal::NotBanned(subject))?;
        self.blast.forget(subject);
        self.settle(subject, true, now);
        self.lift(ban, reason);
        Ok(())
    }

    /// Takes in what became of a command.
    pub fn outcome(&mut self, outcome: Outcome, now: Timestamp) {
        let event = match outcome {
            Outcome::Banned(ban, Ok(())) if self.extended.contains_key(&ban.subject) => {
                // That it goes on has been said, unless that it does not has been said since.
                if self.extended.remove(&ban.subject) != Some(true) {
                    return;
                }
                Event::of_ban(now, Action::Extend, &ban, "in force again")
            }
            Outcome::Banned(ban, Ok(())) => {
                Event::of_ban(now, Action::Ban, &ban, ban.reason.clone())
            }
            Outcome::Banned(ban, Err(error)) => {
                if let Some(has_failed) = self.extended.get_mut(&ban.subject) {
                    *has_failed = true;
                }
                Event::of_ban(now, Action::Fail, &ban, format!("not banned yet: {error}"))
            }
            Outcome::Unbanned(ban, cause, Ok(())) => Event::of_ban(now, Action::Unban, &ban, cause),
            Outcome::Unbanned(ban, cause, Err(error)) => Event::of_ban(
                now,
                Action::Fail,
                &ban,
                format!("not unbanned yet ({cause}): {error}"),
            ),
        };
        self.command(Command::Record(event));
    }

    /// The next thing to do.
    pub fn next_command(&mut self) -> Option<Command> {
        self.commands.pop_front()
    }

    /// All bans, in a reproducible order.
    pub fn bans(&self) -> impl ExactSizeIterator<Item = &Ban> {
        self.ledger.bans()
    }

    /// All bans as they are now, to be looked at elsewhere ([`Ledger::shared_bans`]).
    #[must_use]
    pub fn shared_bans(&self) -> Vec<Arc<Ban>> {
        self.ledger.shared_bans()
    }

    /// The ban of exactly this subject.
    #[must_use]
    pub fn ban_of(&self, subject: Subject) -> Option<&Ban> {
        self.ledger.get(subject)
    }

    /// What is known of a subject.
    #[must_use]
    pub fn explain(&self, asked: Subject) -> Explanation {
        // A single address may be banned by an operator, but it is counted with its client.
        let is_address = asked.net().prefix_len() == asked.net().max_prefix_len();
        let subject = if is_address {
            Subject::of_client(asked.net().addr())
        } else {
            asked
        };
        let of = explain::Of {
            settings: &self.settings.detect,
            normal: self.baseline.normal(),
            watch: &self.watch,
            clock: self.clock.unwrap_or(self.now.secs()),
        };
        let client = self.clients.get(subject).and_then(|client| {
            let places = client.habits.as_deref().map(Habits::samples);
            of.known(subject, client, samples(&self.logs, places))
        });
        let inside = |ban: &&Ban| asked.covers(ban.subject) && ban.subject != asked;
        let (next_tier, next) = self.ledger.next_step(subject, Weight::Full, self.now);
        Explanation {
            asked,
            subject,
            time: self.now,
            bans: self.ledger.around(asked).cloned().collect(),
            bans_inside: if is_address {
                0
            } else {
                self.ledger.bans().filter(inside).count()
            },
            offences: self.ledger.offences(subject),
            next_tier,
            next_secs: explain::secs(next),
            // A single address may be on it, and its client not.
            spared: self
                .spared_by(asked)
                .filter(|spared| spared.is_whole)
                .or_else(|| self.spared_by(subject)),
            refused_until: self
                .refused
                .get(&subject)
                .copied()
                .filter(|until| *until > self.now),
            is_regular: subject.is_client() && self.watch.is_regular(subject),
            client,
            normal: *self.baseline.normal(),
            alarm_since: self.alarm.map(|alarm| alarm.since),
            is_attacked: self.watch.is_attacked(),
        }
    }

    /// What keeps a subject from being banned; what covers it before what covers a part of it.
    fn spared_by(&self, subject: Subject) -> Option<Spared> {
        let covering = self.allow.covering(subject);
        let (entry, reasons) = covering.or_else(|| self.allow.inside(subject))?;
        Some(Spared {
            entry,
            why: reasons.first()?.clone(),
            is_whole: covering.is_some(),
        })
    }

    /// Who is never banned, and why.
    #[must_use]
    pub const fn allowlist(&self) -> &Allowlist {
        &self.allow
    }

    /// Puts a network on the allowlist by an operator's word, and lifts the bans of what is in it. Returns how many those were.
    ///
    /// # Errors
    /// [`Refusal::TooWideToAllow`], [`Refusal::AllowlistFull`].
    pub fn allow(
        &mut self,
        net: IpNet,
        allowed: Allowed,
        now: Timestamp,
    ) -> Result<usize, Refusal> {
        let whole = Subject::of_net(net);
        let net = whole.net();
        if is_too_wide(net) {
            return Err(Refusal::TooWideToAllow(net));
        }
        let is_renewed = self.allow.by_operators().any(|(other, _)| other == net);
        if self.allowed_by_operators >= MAX_ALLOWED && !is_renewed {
            return Err(Refusal::AllowlistFull(MAX_ALLOWED));
        }
        self.allowed_by_operators += usize::from(!is_renewed);
        let words = format!(
            "{net} is never banned from now on, by {}: {}",
            allowed.by, allowed.reason
        );
        self.command(Command::Save(Change::Allow(net, Some(allowed.clone()))));
        self.allow.add(net, Why::Operator(allowed));
        self.command(Command::Allowlist);
        self.command(Command::Record(Event {
            subject: Some(whole),
            origin: Some(Origin::Operator),
            ..Event::new(now, Action::Notice, words)
        }));
        Ok(self.spare(&[whole], now))
    }

    /// Takes off the allowlist by an operator's word what an operator has put on it.
    ///
    /// # Errors
    /// [`Refusal::NotAllowed`].
    pub fn disallow(&mut self, net: IpNet, by: &str, now: Timestamp) -> Result<(), Refusal> {
        let net = Subject::of_net(net).net();
        if !self.allow.by_operators().any(|(other, _)| other == net) {
            return Err(Refusal::NotAllowed(net));
        }
        self.allowed_by_operators -= 1;
        self.allow
            .remove(net, |why| matches!(why, Why::Operator(_)));
        self.command(Command::Save(Change::Allow(net, None)));
        self.command(Command::Allowlist);
        let words = format!("{net} may be banned again, by {by}");
        self.command(Command::Record(Event {
            subject: Some(Subject::of_net(net)),
            origin: Some(Origin::Operator),
            ..Event::new(now, Action::Notice, words)
        }));
        Ok(())
    }

    /// Who is on the allowlist for what they are to this host, or for their names; in place of who was so far.
    pub fn surround(&mut self, entries: Vec<(IpNet, Why)>, now: Timestamp) {
        self.replace_allowed(
            |why| matches!(why, Why::Host(_) | Why::Name(_)),
            entries,
            now,
        );
    }

    fn replace_allowed(
        &mut self,
        is_of_kind: impl Fn(&Why) -> bool,
        entries: Vec<(IpNet, Why)>,
        now: Timestamp,
    ) {
        let before = self.allow.enforced();
        self.allow.replace(is_of_kind, entries);
        let after = self.allow.enforced();
        if before == after {
            return;
        }
        self.command(Command::Allowlist);
        let come: Vec<Subject> = after.difference(&before).copied().collect();
        self.spare(&come, now);
    }

    /// Crawlers of these names have to prove that they are such again.
    pub fn forget_crawlers(&mut self, is_meant: impl Fn(&str) -> bool) {
        if self.allow.forget_named(is_meant) {
            self.command(Command::Allowlist);
        }
    }

    /// A client that was to be looked into is the crawler of this name: it is not banned any more.
    pub fn verified(&mut self, client: Subject, name: &str, now: Timestamp) {
        if self.allow.add_crawler(client, name.to_owned(), now) {
            let words = format!(
                "{client} is a crawler that is what it says ({name}): it is not banned for a day"
            );
            self.command(Command::Record(Event {
                subject: Some(client),
                ..Event::new(now, Action::Notice, words)
            }));
        }
        self.command(Command::Allowlist);
        self.spare(&[client], now);
        // It is no reason to ban its neighbours, who are likely to be the like of it.
        self.prefixes.forget(client);
        let around = self.ledger.around(client);
        let around =
            around.filter(|ban| ban.origin == Origin::Detector && !ban.subject.is_client());
        let around: Vec<Subject> = around.map(|ban| ban.subject).collect();
        for network in around {
            if let Some(ban) = self.ledger.remove(network) {
                self.settle(network, true, now);
                self.lift(ban, format!("the crawler {client} is in it"));
            }
        }
    }

    /// Lifts the bans of what has come onto the allowlist, and strikes the accounts. Returns how many those were.
    fn spare(&mut self, come: &[Subject], now: Timestamp) -> usize {
        for subject in come {
            self.blast.forget(*subject);
        }
        let is_host =
            |subject: &Subject| subject.net().prefix_len() == subject.net().max_prefix_len();
        let spared: Vec<(Subject, IpNet)> = if come.iter().all(is_host) {
            let own = come.iter().filter_map(|host| self.ledger.get(*host));
            own.map(|ban| (ban.subject, ban.subject.net())).collect()
        } else {
            let mut list = Allowlist::default();
            for subject in come {
                list.add(subject.net(), Why::Configured);
            }
            let bans = self.ledger.bans().map(|ban| ban.subject);
            bans.filter_map(|subject| Some((subject, list.covering(subject)?.0)))
                .collect()
        };
        for (subject, entry) in &spared {
            if let Some(ban) = self.ledger.remove(*subject) {
                self.settle(*subject, true, now);
                let why = self.allow.covering(*subject);
                let why = why.and_then(|(_, reasons)| reasons.first());
                let why = why.map(Why::to_string).unwrap_or_default();
                let entry = Subject::of_net(*entry);
                self.lift(ban, format!("now on the allowlist ({entry}: {why})"));
            }
        }
        spared.len()
    }

    /// What to keep of the learning when the agent stops.
    #[must_use]
    pub fn saved_baseline(&self) -> baseline::Saved {
        let mut saved = self.baseline.save();
        saved.population = self.watch.population.save();
        saved.usual = self.watch.usual.clone();
        saved
    }

    /// The state, for status pages.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let normal = *self.baseline.normal();
        let rate = detect::rate(&self.site, self.settings.detect.window_secs);
        Snapshot {
            time: self.now,
            normal,
            rate,
            score: (rate - normal.mean) / normal.stddev,
            alarm_since: self.alarm.map(|alarm| alarm.since),
            held_since: self.blast.since(),
            clients: self.clients.len(),
            clients_evicted: self.clients.evictions(),
            bans: self.ledger.bans().len(),
            totals: self.totals,
        }
    }

    fn window_secs(&self) -> u64 {
        u64::from(self.settings.detect.window_secs)
    }

    fn command(&mut self, command: Command) {
        self.commands.push_back(command);
    }

    /// The entry of the allowlist that covers a subject.
    fn allowed(&self, subject: Subject) -> Option<IpNet> {
        self.allow.covering(subject).map(|(entry, _)| entry)
    }

    /// A client has left the normal traffic.
    fn flag(&mut self, suspect: Suspect, now: Timestamp) {
        let (subject, gate) = (suspect.subject, suspect.gate);
        // Part of a /64 being allowed must not be undone by a ban of all of it.
        if let Some((entry, reasons)) = self.allow.touching(subject) {
            let because = reasons.first().map(Why::to_string).unwrap_or_default();
            let why = format!("on the allowlist ({entry}: {because})");
            self.refuse(subject, suspect.finding, &why, now);
            return;
        }
        if gate.has_nginx() && self.settings.proxied == Proxied::Tell {
            let through = self
                .newest_proxy
                .map_or(String::new(), |proxy| format!(" {proxy}"));
            let why = format!(
                "it came through the proxy{through}, so a ban at the wire would do nothing; with enforce.nginx.include it would be banned in Nginx"
            );
            self.refuse(subject, suspect.finding, &why, now);
            return;
        }
        // Banned, but not where it came in: what keeps it out is to do so there, too. That is no offence more.
        if let Some(standing) = self.ledger.get(subject).filter(|ban| !ban.observe) {
            let ban = Ban {
                gate: standing.gate.and(gate),
                ..standing.clone()
            };
            self.clients.remove(subject);
            // It is in the table: there is room for it.
            let _never_full = self.enforce(ban);
            return;
        }
        let (is_told, is_attacked) = (self.blast.since().is_some(), self.watch.is_attacked());
        let Some(because) = self
            .blast
            .hold(&self.settings.blast, &suspect, is_attacked, now)
        else {
            self.ban_suspect(suspect, now);
            return;
        };
        if !is_told {
            let words = format!(
                "{because}: further ones wait, the worst come first; look whom it bans (portcullis bans), and if they are to be, \
                 raise bans.max_per_minute or bans.max_regulars"
            );
            self.command(Command::Record(Event::new(now, Action::Hold, words)));
        }
        let why = format!("it has to wait: {because}");
        self.refuse(subject, suspect.finding, &why, now);
    }

    fn ban_suspect(&mut self, suspect: Suspect, now: Timestamp) {
        let Suspect {
            subject,
            address,
            finding,
            gate,
            is_regular,
        } = suspect;
        self.clients.remove(subject);
        let weight = self.weight(&finding);
        let next = self.ledger.next_step(subject, weight, now).1;
        let term = self.lasting(subject, next, now).from(now);
        if !self.make_room(subject, term, Origin::Detector) {
            self.refuse(
                subject,
                finding,
                &Full(self.settings.max_bans).to_string(),
                now,
            );
            return;
        }
        let (tier, length, offences, forgotten) = self.ledger.offend(subject, weight, now);
        let term = self.lasting(subject, length, now).from(now);
        let ban = Ban {
            tier: Some(tier),
            reason: finding.to_string(),
            finding: Some(finding),
            gate,
            ..Ban::new(subject, now, term, Origin::Detector)
        };
        if self.enforce(ban).is_ok() {
            self.totals.bans += 1;
            self.blast
                .banned(&self.settings.blast, subject, is_regular, now);
            if let Some(address) = address {
                self.command(Command::Verify(subject, address));
            }
        }
        self.command(Command::Save(Change::Offences(subject, offences)));
        // Last: after a jump of the clock it can be the subject's own account that has to go.
        if let Some(forgotten) = forgotten {
            self.command(Command::Save(Change::Forget(forgotten)));
        }
        self.ban_network(subject, gate, now);
    }

    /// Bans a network so many of whose clients were banned that the rest of it is theirs, too.
    fn ban_network(&mut self, subject: Subject, gate: Gate, now: Timestamp) {
        let least = self.settings.detect.prefix_members;
        for (prefix, members) in self.prefixes.note(subject, least, now) {
            // To look for members of an IPv6 network means to look at all clients.
            if prefix.is_v6() && self.looks == 0 {
                continue;
            }
            self.looks -= u32::from(prefix.is_v6());
            if self.ledger.get(prefix).is_none() && !self.has_others(prefix) {
                let finding = Finding {
                    value: members as f64,
                    ..detect::finding(
                        &self.settings.detect,
                        self.baseline.normal(),
                        &Window::default(),
                        now,
                        Test::Members,
                        f64::from(least),
                    )
                };
                let suspect = Suspect {
                    subject: prefix,
                    address: None,
                    finding,
                    gate,
                    is_regular: false,
                };
                self.flag(suspect, now);
            }
        }
    }

    /// Is anybody known to belong to a network who behaves?
    fn has_others(&self, prefix: Subject) -> bool {
        // Whoever of it is known and not banned behaves, if they did not come with an attack.
        let has_regulars = match prefix.net() {
            IpNet::V4(net) => {
                let is_free = |host| self.ledger.get(host).is_none();
                self.watch.has_regulars_in(net, is_free)
            }
            IpNet::V6(_) => false,
        };
        // What was refused lately is on record here, too, and behaves as little as what was banned.
        let is_spared = |subject: Subject, client: &Client| {
            !self.refused.contains_key(&subject) && self.watch.is_spared(subject, client)
        };
        has_regulars || self.clients.has_any_in(prefix, is_spared)
    }

    /// Who does a little too much for a long time may be a program of somebody's customer: it is kept out, and not for good.
    fn weight(&self, finding: &Finding) -> Weight {
        let is_slow = finding.window_secs > self.settings.detect.window_secs;
        if finding.test == Test::Cap && is_slow {
            Weight::Light
        } else {
            Weight::Full
        }
    }

    /// Sees that there is room for a ban in the table; another one may have to give way. Says whether there is.
    fn make_room(&mut self, subject: Subject, term: Term, origin: Origin) -> bool {
        if self.ledger.bans().len() < self.settings.max_bans || self.ledger.get(subject).is_some() {
            return true;
        }
        let Some(victim) = self.ledger.gives_way(term, origin) else {
            return false;
        };
        if let Some(ban) = self.ledger.remove(victim) {
            if self.totals.gave_way == 0 {
                let words = format!(
                    "the ban table is full ({} bans): from now on the bans that end soonest give way to longer ones; raise bans.max_bans",
                    self.settings.max_bans
                );
                self.command(Command::Record(Event::new(self.now, Action::Notice, words)));
            }
            self.totals.gave_way += 1;
            self.lift(ban, format!("gave way to {subject} in a full table"));
        }
        true
    }

    fn enforce(&mut self, ban: Ban) -> Result<(), Full> {
        self.ledger.insert(ban.clone())?;
        // What was found out before the end of another ban of the same subject is not about this one.
        self.looked_at.remove(&ban.subject);
        self.command(Command::Ban(ban.clone()));
        self.command(Command::Save(Change::Ban(ban)));
        Ok(())
    }

    /// A finding without a ban: told once in a while, since it repeats with every request.
    fn refuse(&mut self, subject: Subject, finding: Finding, why: &str, now: Timestamp) {
        if self.refused.len() >= MAX_REFUSED || self.refused.contains_key(&subject) {
            return;
        }
        self.refused.insert(subject, now + REFUSAL_SILENCE);
        self.totals.refusals += 1;
        let condition = format!("{finding}, but {why}");
        let event = Event {
            subject: Some(subject),
            finding: Some(finding),
            origin: Some(Origin::Detector),
            ..Event::new(now, Action::Refuse, condition)
        };
        self.command(Command::Record(event));
    }

    /// A ban that is out of the ledger goes out of the world too.
    fn lift(&mut self, ban: Ban, cause: String) {
        self.looked_at.remove(&ban.subject);
        self.extended.remove(&ban.subject);
        self.command(Command::Save(Change::Unban(ban.subject)));
        self.command(Command::Unban(ban, cause, self.now));
    }

    /// Learns the seconds that have left the window. One window late, so that whoever is flagged meanwhile takes their
    /// requests out first; nothing while the site is attacked. A pause between requests is learnt with the request that ends
    /// it, unless it is unheard of: longer than the window, and than twice the last such pause. A log that has broken must
    /// not teach that nobody comes; a site whose visitors come in bursts must.
    fn learn(&mut self, now: u64) {
        let window = self.window_secs();
        let freeze = u64::from(self.settings.baseline.freeze_secs);
        let stands = |alarm: Alarm| self.now.since(alarm.since).as_secs() < freeze;
        let is_frozen = self.watch.is_attacked() && self.alarm.is_some_and(stands);
        if self.feed.behind && self.feed.mixed || is_frozen {
            self.legitimate.advance(now, window, |_| {});
            self.learn_from = None;
            return;
        }
        let mut next = self.learn_from.unwrap_or(now).max(self.known_until);
        let (baseline, long_pause) = (&mut self.baseline, &mut self.long_pause);
        // Half of what is known must not be silence.
        let longest_pause = u64::from(self.settings.baseline.span_secs / 2);
        self.legitimate.advance(now, window, |bucket| {
            let second = u64::from(bucket.second);
            if second < next {
                return;
            }
            let pause = second - next;
            if pause <= window.max((2 * *long_pause).min(longest_pause)) {
                for silent in next..second {
                    baseline.learn(silent, Second::default());
                }
            }
            if pause > window {
                *long_pause = pause;
            }
            let traffic = Second {
                requests: bucket.requests,
                errors: bucket.errors,
                variance: bucket.variance,
            };
            baseline.learn(second, traffic);
            next = second + 1;
        });
        self.learn_from = Some(next);
    }

    /// All traffic together: an alarm that is raised once and cleared once, never a ban.
    fn watch_site(&mut self, now: Timestamp) {
        // A clock that was set back must not keep the alarm standing until it is as late again.
        if let Some(alarm) = &mut self.alarm {
            alarm.since = alarm.since.min(now);
            alarm.flagged = alarm.flagged.min(now);
        }
        self.aftermath = self.aftermath.map(|ended| ended.min(now));
        let finding = self.site_finding(now);
        match (finding, self.alarm) {
            (Some(_), Some(alarm)) => {
                self.alarm = Some(Alarm {
                    flagged: now,
                    ..alarm
                });
            }
            (Some(finding), None) => {
                self.alarm = Some(Alarm {
                    since: now,
                    flagged: now,
                });
                let condition = format!("all traffic together: {finding}");
                let event = Event {
                    finding: Some(finding),
                    ..Event::new(now, Action::Alarm, condition)
                };
                self.command(Command::Record(event));
                self.aftermath = None;
            }
            (None, Some(alarm)) if now.since(alarm.flagged).as_secs() >= self.window_secs() => {
                self.alarm = None;
                self.aftermath = Some(now);
                let lasted = format_duration(now.since(alarm.since));
                let condition = format!("all traffic together is back to normal after {lasted}");
                self.command(Command::Record(Event::new(
                    now,
                    Action::AllClear,
                    condition,
                )));
            }
            (None, None) => {
                let aftermath = u64::from(self.settings.detect.aftermath_secs);
                if self
                    .aftermath
                    .is_some_and(|ended| now.since(ended).as_secs() >= aftermath)
                {
                    self.aftermath = None;
                    self.watch.attack(None);
                }
            }
            (None, Some(_)) => {}
        }
    }

    /// While the alarm stands and it is not only what is banned already, the site is attacked.
    fn watch_attack(&mut self, now: Timestamp) {
        let Some(alarm) = self.alarm else {
            return;
        };
        let detect = &self.settings.detect;
        let normal = self.baseline.normal();
        if !self.watch.is_attacked()
            && detect::site(detect, normal, &self.legitimate, now).is_some()
        {
            let onset = alarm.since.secs().saturating_sub(self.window_secs());
            self.watch.attack(Some(onset));
        }
    }

    /// The ordered tests decide; the sum confirms that it is more than a passing burst.
    fn site_finding(&self, now: Timestamp) -> Option<Finding> {
        let detect = &self.settings.detect;
        let normal = self.baseline.normal();
        let ordered = detect::site(detect, normal, &self.site, now);
        let is_lasting = self.cusum.sum() > detect.cusum.limit;
        ordered.filter(|_| detect.cusum.limit <= 0.0 || is_lasting)
    }
}

/// What to do about an entry of the allowlist, for whoever wants somebody banned all the same.
fn way_off(why: &Why, entry: &IpNet) -> String {
    match why {
        Why::Loopback => "it never comes from outside".to_owned(),
        Why::Configured | Why::Name(_) => {
            "take it out of bans.allow and `portcullis reload`, if it really is to be banned".to_owned()
        }
        Why::Proxy => "take it out of source.proxies and restart, if it is no proxy".to_owned(),
        Why::SeenProxy => "if it is no proxy, correct Nginx's set_real_ip_from and restart".to_owned(),
        Why::Host(_) => {
            "with bans.allow_host = false it could be, and so could this host's own addresses".to_owned()
        }
        Why::Crawler(_) => {
            "take its domain out of bans.crawlers and `portcullis reload`, if it really is to be banned".to_owned()
        }
        Why::Operator(_) => {
            format!("`portcullis allow remove {entry}` first, if it really is to be banned")
        }
    }
}

/// What the configuration says of who is never banned.
fn configured(settings: &Settings) -> impl Iterator<Item = (IpNet, Why)> {
    let loopback = LOOPBACK.iter().filter_map(|net| net.parse::<IpNet>().ok());
    let configured = settings.allow.iter().copied();
    let proxies = settings.proxies.iter().copied();
    loopback
        .map(|net| (net, Why::Loopback))
        .chain(configured.map(|net| (net, Why::Configured)))
        .chain(proxies.map(|net| (net, Why::Proxy)))
}

/// Too large a part of the internet for one entry, of bans or of the allowlist?
const fn is_too_wide(net: IpNet) -> bool {
    match net {
        IpNet::V4(net) => net.prefix_len() < 8,
        IpNet::V6(net) => net.prefix_len() < 16,
    }
}

fn samples(logs: &IndexSet<Arc<str>>, places: Option<&[Place]>) -> Vec<Sample> {
    let places = places.unwrap_or_default().iter();
    let name = |place: &Place| {
        let log = logs.get_index(place.log.into());
        log.map_or_else(String::new, ToString::to_string)
    };
    places
        .map(|place| Sample {
            log: name(place),
            offset: place.offset,
        })
        .collect()
}
