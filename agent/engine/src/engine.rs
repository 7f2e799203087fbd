//! The engine: lines, time, operators' words and outcomes in; commands out.

use std::{cmp::Reverse, collections::VecDeque, time::Duration};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::{
    baseline::{self, Baseline, Normal, Second},
    clients::Clients,
    command::{Action, Change, Command, Event, Outcome},
    detect::{self, Finding},
    ledger::{Ban, Full, Ledger, Length, Offences, Origin, Term},
    parse::{self, Malformed, Record},
    subject::Subject,
    time::{Timestamp, format_duration},
    window::Window,
};

/// Everything that the engine goes by.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// How normal traffic is learnt.
    pub baseline: baseline::Settings,
    /// When a rate is an anomaly.
    pub detect: detect::Settings,
    /// Ban lengths of the first, second … offence; the last one repeats.
    pub schedule: Vec<Length>,
    /// Never banned.
    pub allow: Vec<IpNet>,
    /// Clients whose windows are kept.
    pub max_clients: usize,
    /// Bans at a time.
    pub max_bans: usize,
    /// Subjects whose offences are remembered.
    pub max_offenders: usize,
}

/// What a former run has left.
#[derive(Clone, Debug, Default)]
pub struct Saved {
    /// Bans that stood.
    pub bans: Vec<Ban>,
    /// Accounts.
    pub offences: Vec<(Subject, Offences)>,
    /// What had been learnt.
    pub baseline: Option<baseline::Saved>,
}

/// Why an operator's request is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The allowlist always wins.
    #[error(
        "{subject} is on the allowlist ({entry}); take it off there first if it really is to be banned"
    )]
    Allowed {
        /// Who was to be banned.
        subject: Subject,
        /// The entry of the allowlist.
        entry: IpNet,
    },
    /// Too large a part of the internet.
    #[error("{0} is too wide: the widest bans are /8 (IPv4) and /16 (IPv6)")]
    TooWide(Subject),
    /// No room.
    #[error(transparent)]
    Full(#[from] Full),
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
    /// Records older than the window: neither counted nor banned for.
    pub late: u64,
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

/// How long an allowlisted client may misbehave before it is told again.
const REFUSAL_SILENCE: Duration = Duration::from_mins(10);
/// Built-in part of the allowlist: what never comes from outside.
const LOOPBACK: [&str; 2] = ["127.0.0.0/8", "::1/128"];

/// See the crate's documentation.
#[derive(Debug)]
pub struct Engine {
    settings: Settings,
    /// All traffic, for the site's alarm.
    site: Window,
    /// Traffic of clients that nothing is held against: what leaves this window is learnt. A client that is flagged
    /// takes its share with it, so its attack never enters the baseline.
    legitimate: Window,
    /// The next second to learn; `None` before the first input.
    learn_from: Option<u64>,
    /// Seconds of the last pause between requests that was longer than the window.
    long_pause: u64,
    baseline: Baseline,
    clients: Clients,
    ledger: Ledger,
    alarm: Option<Alarm>,
    now: Timestamp,
    totals: Totals,
    commands: VecDeque<Command>,
}

impl Engine {
    /// An engine that goes on where `saved` ended, at `now`. Bans that ran out meanwhile, and bans of what has come
    /// onto the allowlist, are lifted by its first commands.
    #[must_use]
    pub fn new(mut settings: Settings, saved: Saved, now: Timestamp) -> Self {
        settings
            .allow
            .extend(LOOPBACK.iter().filter_map(|net| net.parse::<IpNet>().ok()));
        let baseline = match &saved.baseline {
            Some(saved) => Baseline::restore(settings.baseline.clone(), saved, now),
            None => Baseline::new(settings.baseline.clone()),
        };
        let mut engine = Self {
            site: Window::default(),
            legitimate: Window::default(),
            learn_from: None,
            long_pause: 0,
            baseline,
            clients: Clients::new(settings.max_clients),
            ledger: Ledger::new(
                settings.schedule.clone(),
                settings.max_bans,
                settings.max_offenders,
            ),
            alarm: None,
            now,
            totals: Totals::default(),
            commands: VecDeque::new(),
            settings,
        };
        for (subject, offences) in saved.offences {
            if let Some(forgotten) = engine.ledger.set_offences(subject, offences) {
                engine.command(Command::Save(Change::Forget(forgotten)));
            }
        }
        // Should there be less room than there was, the ones that end soonest go, and no operator's.
        let mut bans = saved.bans;
        bans.sort_by_key(|ban| {
            let end = match ban.term {
                Term::Permanent => Timestamp::MAX,
                Term::Until(end) => end,
            };
            (ban.origin == Origin::Detector, Reverse(end), ban.subject)
        });
        for ban in bans {
            let entry = engine.allowed(ban.subject);
            if let Some(entry) = entry {
                engine.lift(ban, format!("now on the allowlist ({entry})"));
            } else if let Err(full) = engine.ledger.insert(ban.clone()) {
                engine.lift(ban, full.to_string());
            }
        }
        engine.tick(now);
        engine
    }

    /// Takes in one line of the log.
    ///
    /// # Errors
    /// The line's fault; it is counted, and the engine goes on.
    pub fn line(&mut self, line: &[u8], now: Timestamp) -> Result<(), Malformed> {
        match parse::parse(line) {
            Ok(record) => {
                self.record(&record, now);
                Ok(())
            }
            Err(malformed) => {
                self.totals.malformed += 1;
                Err(malformed)
            }
        }
    }

    /// Takes in one request.
    pub fn record(&mut self, record: &Record, now: Timestamp) {
        if now.secs() != self.now.secs() {
            self.tick(now);
        }
        self.totals.lines += 1;
        // A log clock ahead of ours must not put requests where they would never leave the window.
        let (second, window) = (record.at.secs().min(now.secs()), self.window_secs());
        if second + window <= now.secs() {
            self.totals.late += 1;
            return;
        }
        let (subject, error) = (Subject::of_client(record.client), record.status >= 400);
        self.site.add(second, error);
        if self.ledger.is_banned(subject) {
            self.totals.from_banned += 1;
            return;
        }
        self.legitimate.add(second, error);
        let client = self.clients.touch(subject, now.secs(), window);
        client.window.add(second, error);
        if let Some(finding) = detect::client(
            &self.settings.detect,
            self.baseline.normal(),
            &client.window,
            record.at,
        ) {
            self.flag(subject, finding, now);
        }
    }

    /// Lets time pass. To be called at least once a second, or whenever a test wants time to pass.
    pub fn tick(&mut self, now: Timestamp) {
        let window = self.window_secs();
        if self
            .site
            .newest()
            .max(self.learn_from)
            .is_some_and(|newest| newest > now.secs() + window)
        {
            // The clock was set back by more than a window: what was counted would stay for ever.
            self.site.clear();
            self.legitimate.clear();
            self.clients.clear();
            self.learn_from = None;
        }
        self.now = now;
        self.site.advance(now.secs(), window, |_| {});
        self.learn(now.secs());
        if self.baseline.recompute(now) {
            self.command(Command::Save(Change::Baseline(Box::new(
                self.baseline.save(),
            ))));
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
            self.command(Command::Record(Event::new(now, Action::Baseline, words)));
        }
        self.watch_site(now);
        while let Some(subject) = self.ledger.next_over(now) {
            if let Some(ban) = self.ledger.remove(subject) {
                self.lift(ban, "its time is over".to_owned());
            }
        }
        self.clients.sweep(now.secs(), window);
    }

    /// Bans by an operator's word; with `observe`, only counts what that would drop. An earlier ban of the same subject is
    /// replaced.
    ///
    /// # Errors
    /// [`Refusal`]: on the allowlist, too wide, or no room.
    pub fn ban(
        &mut self,
        subject: Subject,
        length: Length,
        reason: String,
        observe: bool,
        now: Timestamp,
    ) -> Result<(), Refusal> {
        if let Some(entry) = self.allowed(subject) {
            return Err(Refusal::Allowed { subject, entry });
        }
        let widest = if matches!(subject.net(), IpNet::V4(_)) {
            8
        } else {
            16
        };
        if subject.net().prefix_len() < widest {
            return Err(Refusal::TooWide(subject));
        }
        let term = length.from(now);
        self.make_room(subject, term, Origin::Operator);
        let ban = Ban {
            subject,
            since: now,
            term,
            tier: None,
            origin: Origin::Operator,
            reason,
            finding: None,
            observe,
        };
        self.enforce(ban)?;
        Ok(())
    }

    /// Lifts a ban by an operator's word, and strikes the subject's account: whoever was wrongly banned does not start
    /// at the second tier.
    ///
    /// # Errors
    /// [`Refusal::NotBanned`].
    pub fn unban(&mut self, subject: Subject, reason: String) -> Result<(), Refusal> {
        let ban = self
            .ledger
            .remove(subject)
            .ok_or(Refusal::NotBanned(subject))?;
        if self.ledger.forgive(subject) {
            self.command(Command::Save(Change::Forget(subject)));
        }
        self.lift(ban, reason);
        Ok(())
    }

    /// Takes in what became of a command.
    pub fn outcome(&mut self, outcome: Outcome, now: Timestamp) {
        let event = match outcome {
            Outcome::Banned(ban, Ok(())) => {
                Event::of_ban(now, Action::Ban, &ban, ban.reason.clone())
            }
            Outcome::Banned(ban, Err(error)) => {
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

    /// The ban of exactly this subject.
    #[must_use]
    pub fn ban_of(&self, subject: Subject) -> Option<&Ban> {
        self.ledger.get(subject)
    }

    /// Who is never banned.
    #[must_use]
    pub fn allowlist(&self) -> &[IpNet] {
        &self.settings.allow
    }

    /// What to keep of the learning when the agent stops.
    #[must_use]
    pub fn saved_baseline(&self) -> baseline::Saved {
        self.baseline.save()
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
        self.settings
            .allow
            .iter()
            .copied()
            .find(|entry| Subject::of_net(*entry).covers(subject))
    }

    /// A client has left the normal traffic.
    fn flag(&mut self, subject: Subject, finding: Finding, now: Timestamp) {
        // Banned or not, what it has done is no normal traffic.
        if let Some(client) = self.clients.get_mut(subject) {
            self.legitimate
                .subtract(&std::mem::take(&mut client.window));
        }
        // Part of a /64 being allowed must not be undone by a ban of all of it.
        let entry = self
            .settings
            .allow
            .iter()
            .copied()
            .find(|entry| Subject::of_net(*entry).overlaps(subject));
        if let Some(entry) = entry {
            self.refuse(
                subject,
                finding,
                &format!("on the allowlist ({entry})"),
                now,
            );
            return;
        }
        let term = self.ledger.next_length(subject).from(now);
        if !self.make_room(subject, term, Origin::Detector) {
            self.refuse(
                subject,
                finding,
                &Full(self.settings.max_bans).to_string(),
                now,
            );
            return;
        }
        self.clients.remove(subject);
        let (tier, length, offences, forgotten) = self.ledger.offend(subject, now);
        let ban = Ban {
            subject,
            since: now,
            term: length.from(now),
            tier: Some(tier),
            origin: Origin::Detector,
            reason: finding.to_string(),
            finding: Some(finding),
            observe: false,
        };
        if self.enforce(ban).is_ok() {
            self.totals.bans += 1;
        }
        self.command(Command::Save(Change::Offences(subject, offences)));
        // Last: after a jump of the clock it can be the subject's own account that has to go.
        if let Some(forgotten) = forgotten {
            self.command(Command::Save(Change::Forget(forgotten)));
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
        self.command(Command::Ban(ban.clone()));
        self.command(Command::Save(Change::Ban(ban)));
        Ok(())
    }

    /// A finding without a ban: told once in a while, since it repeats with every request.
    fn refuse(&mut self, subject: Subject, finding: Finding, why: &str, now: Timestamp) {
        let window = self.window_secs();
        let client = self.clients.touch(subject, now.secs(), window);
        if client.refusal_told_until > now {
            return;
        }
        client.refusal_told_until = now + REFUSAL_SILENCE;
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
        self.command(Command::Save(Change::Unban(ban.subject)));
        self.command(Command::Unban(ban, cause));
    }

    /// Learns the seconds that have left the window. One window late, so that whoever is flagged meanwhile takes their
    /// requests out first. A pause between requests is learnt with the request that ends it, unless it is unheard of:
    /// longer than the window, and than twice the last such pause. A log that has broken must not teach that nobody
    /// comes; a site whose visitors come in bursts must.
    fn learn(&mut self, now: u64) {
        let window = self.window_secs();
        let mut next = self.learn_from.unwrap_or(now);
        let (baseline, long_pause) = (&mut self.baseline, &mut self.long_pause);
        // Half of what is known must not be silence.
        let longest_pause = u64::from(self.settings.baseline.span_secs / 2);
        self.legitimate.advance(now, window, |bucket| {
            if bucket.second < next {
                return;
            }
            let pause = bucket.second - next;
            if pause <= window.max((2 * *long_pause).min(longest_pause)) {
                for silent in next..bucket.second {
                    baseline.learn(silent, Second::default());
                }
            }
            if pause > window {
                *long_pause = pause;
            }
            let traffic = Second {
                requests: bucket.requests,
                errors: bucket.errors,
            };
            baseline.learn(bucket.second, traffic);
            next = bucket.second + 1;
        });
        self.learn_from = Some(next);
    }

    /// All traffic together: an alarm that is raised once and cleared once, never a ban.
    fn watch_site(&mut self, now: Timestamp) {
        let finding = detect::site(
            &self.settings.detect,
            self.baseline.normal(),
            &self.site,
            now,
        );
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
            }
            (None, Some(alarm)) if now.since(alarm.flagged).as_secs() >= self.window_secs() => {
                self.alarm = None;
                let lasted = format_duration(now.since(alarm.since));
                let condition = format!("all traffic together is back to normal after {lasted}");
                self.command(Command::Record(Event::new(
                    now,
                    Action::AllClear,
                    condition,
                )));
            }
            (None, _) => {}
        }
    }
}
