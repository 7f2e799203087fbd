//! Plays requests to the engine and says what came of it.

use std::collections::{BTreeMap, BTreeSet};

use portcullis_engine::{
    Command, Engine, Saved, Settings, Subject, Timestamp, command::Action, parse::Record,
};

use super::{scenario::Scenario, traffic::Request};

/// A ban that was made.
#[derive(Clone, Debug)]
pub struct Banned {
    /// Milliseconds since the epoch.
    pub at: u64,
    /// Whom it keeps out.
    pub subject: Subject,
    /// The test that flagged.
    pub test: String,
    /// The evidence in words.
    pub reason: String,
}

/// All that the engine did.
#[derive(Debug, Default)]
pub struct Deeds {
    /// In their order.
    pub bans: Vec<Banned>,
    /// When the site's alarm was raised, in milliseconds since the epoch.
    pub alarms: Vec<u64>,
    /// When it ended.
    pub all_clears: Vec<u64>,
}

/// An engine at work, and what it has done.
#[derive(Debug)]
pub struct Watch {
    engine: Engine,
    deeds: Deeds,
}

impl Watch {
    /// A new agent, which knows nothing.
    pub fn new(settings: &Settings, now: u64) -> Self {
        let now = Timestamp::from_millis(now);
        Self {
            engine: Engine::new(settings.clone(), Saved::default(), now),
            deeds: Deeds::default(),
        }
    }

    /// Takes in requests in their order.
    pub fn see(&mut self, records: &[Record]) {
        self.engine.replay(records);
        self.drain();
    }

    /// Lets time pass to the end.
    pub fn end(mut self, until: u64) -> Deeds {
        self.engine.pass_until(Timestamp::from_millis(until));
        self.drain();
        self.deeds
    }

    fn drain(&mut self) {
        while let Some(command) = self.engine.next_command() {
            match command {
                Command::Ban(ban) => {
                    let test = ban.finding.map(|finding| format!("{:?}", finding.test));
                    self.deeds.bans.push(Banned {
                        at: ban.since.millis(),
                        subject: ban.subject,
                        test: test.unwrap_or_default(),
                        reason: ban.reason,
                    });
                }
                Command::Record(event) if event.action == Action::Alarm => {
                    self.deeds.alarms.push(event.time.millis());
                }
                Command::Record(event) if event.action == Action::AllClear => {
                    self.deeds.all_clears.push(event.time.millis());
                }
                Command::Record(_)
                | Command::Unban(..)
                | Command::Save(_)
                | Command::Look(_)
                | Command::Allowlist
                | Command::Verify(..) => {}
            }
        }
    }
}

/// Plays all requests to a new agent.
pub fn replay(settings: &Settings, requests: &[Request], until: u64) -> Deeds {
    let start = requests.first().map_or(until, |request| request.at);
    let mut watch = Watch::new(settings, start);
    for some in requests.chunks(4096) {
        let records: Vec<Record> = some.iter().map(Request::record).collect();
        watch.see(&records);
    }
    watch.end(until)
}

/// What came of one trial. Times are milliseconds since the attack began.
#[derive(Clone, Debug, Default)]
pub struct Trial {
    /// When each source was first banned.
    pub sources: Vec<Option<u64>>,
    /// The attack's requests that came through before.
    pub through: u64,
    /// When the site's alarm was raised, or 0 where it stood already.
    pub alarm: Option<u64>,
    /// How many of the attackers' bans each test made.
    pub tests: BTreeMap<String, u64>,
    /// Who was banned and should not have been.
    pub wrong: Vec<Banned>,
    /// Legitimate requests.
    pub legitimate: u64,
    /// Milliseconds in all.
    pub lasted: u64,
    /// Alarms that were raised in all.
    pub alarms: u64,
    /// Alarms that were raised before the attack.
    pub early: u64,
    /// When the attack began, in milliseconds since the epoch.
    pub from: u64,
}

/// Judges what was done when a scenario was played on a background.
pub fn judge(
    settings: &Settings,
    scenario: &Scenario,
    scene: &super::background::Scene<'_>,
    seed: u64,
) -> Trial {
    let play = scenario.play(scene, seed);
    let requests = play.requests();
    let deeds = replay(settings, &requests, play.until + 1000);
    trial(
        &deeds,
        &requests,
        &play.attackers,
        play.from,
        play.until,
        scenario.is_one,
    )
}

/// Holds deeds against who is an attacker.
pub fn trial(
    deeds: &Deeds,
    requests: &[Request],
    attackers: &BTreeSet<Subject>,
    from: u64,
    until: u64,
    is_one: bool,
) -> Trial {
    let covers = Covers::new(&deeds.bans);
    let mut trial = Trial {
        from,
        lasted: until - requests.first().map_or(until, |request| request.at),
        ..Trial::default()
    };
    let mut legitimate = BTreeSet::new();
    // Of each of the attack's requests, whether a ban kept it out.
    let mut kept_out = Vec::new();
    for request in requests {
        let subject = Subject::of_client(request.client);
        if attackers.contains(&subject) {
            let is_out = covers.first(subject).is_some_and(|at| at < request.at);
            trial.through += u64::from(!is_out);
            kept_out.push((request.at, is_out));
        } else {
            trial.legitimate += 1;
            legitimate.insert(subject);
        }
    }
    let since = |at: u64| at.saturating_sub(from);
    trial.sources = if is_one {
        vec![quenched(&kept_out).map(since)]
    } else {
        attackers
            .iter()
            .map(|attacker| covers.first(*attacker).map(since))
            .collect()
    };
    for ban in &deeds.bans {
        let hits = |all: &BTreeSet<Subject>| {
            if ban.subject.is_client() {
                all.contains(&ban.subject)
            } else {
                all.iter().any(|one| ban.subject.covers(*one))
            }
        };
        if hits(attackers) {
            *trial.tests.entry(ban.test.clone()).or_default() += 1;
        }
        if hits(&legitimate) {
            trial.wrong.push(ban.clone());
        }
    }
    trial.alarms = deeds.alarms.len() as u64;
    trial.early = deeds.alarms.iter().filter(|at| **at < from).count() as u64;
    let stood = {
        let before = |times: &[u64]| times.iter().filter(|at| **at < from).max().copied();
        before(&deeds.alarms) > before(&deeds.all_clears)
    };
    trial.alarm = if stood {
        Some(0)
    } else {
        let mut later = deeds.alarms.iter().filter(|at| **at >= from);
        later.next().map(|at| since(*at))
    };
    trial
}

/// From when on hardly any of the attack's requests came through: of two hundred in a row no more than four.
fn quenched(kept_out: &[(u64, bool)]) -> Option<u64> {
    let is_over = |some: &&[(u64, bool)]| some.iter().filter(|(_, is_out)| !is_out).count() <= 4;
    let first = kept_out.windows(200).find(is_over)?;
    first.first().map(|(at, _)| *at)
}

/// Who was banned from when on.
struct Covers {
    clients: BTreeMap<Subject, u64>,
    prefixes: Vec<(Subject, u64)>,
}

impl Covers {
    fn new(bans: &[Banned]) -> Self {
        let (mut clients, mut prefixes) = (BTreeMap::new(), Vec::new());
        for ban in bans {
            if ban.subject.is_client() {
                clients.entry(ban.subject).or_insert(ban.at);
            } else {
                prefixes.push((ban.subject, ban.at));
            }
        }
        Self { clients, prefixes }
    }

    fn first(&self, subject: Subject) -> Option<u64> {
        let prefixes = self.prefixes.iter();
        let around = prefixes
            .filter(|(prefix, _)| prefix.covers(subject))
            .map(|(_, at)| *at);
        around.chain(self.clients.get(&subject).copied()).min()
    }
}

#[cfg(test)]
mod tests {
    use super::super::traffic::path;
    use super::*;

    fn request(at: u64, client: &str) -> Request {
        Request {
            at,
            client: client.parse().unwrap(),
            target: path("/"),
            status: 200,
            agent: None,
            is_form: false,
        }
    }

    fn ban(at: u64, subject: &str) -> Banned {
        Banned {
            at,
            subject: subject.parse().unwrap(),
            test: "Test".to_owned(),
            reason: String::new(),
        }
    }

    #[test]
    fn a_ban_of_a_prefix_contains_its_sources_and_wrongs_its_neighbours() {
        let requests = [
            request(1_000, "10.0.0.1"),
            request(5_000, "203.0.113.1"),
            request(6_000, "203.0.113.2"),
            request(7_000, "203.0.113.9"),
            request(9_000, "203.0.113.1"),
        ];
        let attackers = ["203.0.113.1", "203.0.113.2"].map(|text| text.parse().unwrap());
        let deeds = Deeds {
            bans: vec![ban(8_000, "203.0.113.0/24")],
            alarms: vec![6_500],
            all_clears: Vec::new(),
        };
        let trial = trial(&deeds, &requests, &attackers.into(), 5_000, 10_000, false);
        assert_eq!(trial.sources, [Some(3_000), Some(3_000)]);
        assert_eq!((trial.through, trial.legitimate), (2, 2));
        assert_eq!(trial.alarm, Some(1_500));
        assert_eq!(trial.tests["Test"], 1);
        assert_eq!(trial.wrong.len(), 1);
    }

    #[test]
    fn an_alarm_that_stands_already_needs_no_other() {
        let requests = [request(0, "10.0.0.1")];
        let raised = |alarms: &[u64], all_clears: &[u64]| {
            let deeds = Deeds {
                bans: Vec::new(),
                alarms: alarms.to_vec(),
                all_clears: all_clears.to_vec(),
            };
            trial(&deeds, &requests, &BTreeSet::new(), 5_000, 10_000, false).alarm
        };
        assert_eq!(raised(&[1_000], &[]), Some(0));
        assert_eq!(raised(&[1_000], &[2_000]), None);
        assert_eq!(raised(&[1_000, 7_000], &[2_000]), Some(2_000));
    }

    #[test]
    fn changing_addresses_are_stopped_when_hardly_any_comes_through() {
        let all: Vec<(u64, bool)> = (0..600_u64)
            .map(|second| (second * 1000, second >= 100 && second % 100 != 0))
            .collect();
        // Four that come through are few: three before it, and one after.
        assert_eq!(quenched(&all), Some(98_000));
        assert_eq!(quenched(&[(0, false), (100_000, false)]), None);
    }
}
