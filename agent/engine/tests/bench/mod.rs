//! What the tests of the engine have in common: an engine with a hand on its clock.
#![allow(
    dead_code,
    clippy::allow_attributes,
    unreachable_pub,
    reason = "each test crate uses its part"
)]

use std::{net::IpAddr, time::Duration};

use portcullis_engine::{
    Command, Engine, Event, Feed, Outcome, Proxied, Release, Saved, Settings, Subject, Timestamp,
    baseline, blast,
    command::Action,
    detect,
    ledger::Length,
    parse::{Format, Record},
};

/// The ordered numbers.
pub fn settings() -> Settings {
    let minutes = |n: u64| Length::For(Duration::from_secs(60 * n));
    Settings {
        format: Format::default(),
        baseline: baseline::Settings {
            span_secs: 1800,
            recompute_secs: 60,
            hour_min_secs: 900,
            warm_up_secs: 300,
            floor_mean: 1.0,
            floor_stddev: 0.5,
            floor_error_share: 0.05,
            growth_per_hour: 0.0,
            freeze_secs: 0,
        },
        detect: detect::Settings::ordered(),
        schedule: vec![minutes(10), minutes(30), minutes(120), Length::Permanent],
        allow: vec!["203.0.113.0/24".parse().unwrap()],
        proxies: Vec::new(),
        proxied: Proxied::Tell,
        forgive: Duration::ZERO,
        jitter: 0.0,
        release: Release {
            quiet: Duration::ZERO,
            extensions: 0,
        },
        blast: blast::Settings::ANY,
        max_clients: 1000,
        max_bans: 100,
        max_offenders: 100,
    }
}

/// An engine with a hand on its clock. Time passes a second at a time, as it does for the agent.
pub struct Bench {
    pub engine: Engine,
    pub now: Timestamp,
    pub commands: Vec<Command>,
}

pub const START: Timestamp = Timestamp::from_secs(1_700_000_000);

impl Bench {
    pub fn new(settings: Settings) -> Self {
        Self::resume(settings, Saved::default(), START)
    }

    pub fn resume(settings: Settings, saved: Saved, now: Timestamp) -> Self {
        let engine = Engine::new(settings, saved, now);
        let mut bench = Self {
            engine,
            now,
            commands: Vec::new(),
        };
        bench.collect();
        bench
    }

    /// Commands are carried out at once and in full.
    pub fn collect(&mut self) {
        while let Some(command) = self.engine.next_command() {
            match &command {
                Command::Ban(ban) => self
                    .engine
                    .outcome(Outcome::Banned(ban.clone(), Ok(())), self.now),
                Command::Unban(ban, cause, _) => self.engine.outcome(
                    Outcome::Unbanned(ban.clone(), cause.clone(), Ok(())),
                    self.now,
                ),
                Command::Look(_)
                | Command::Allowlist
                | Command::Verify(..)
                | Command::Save(_)
                | Command::Record(_) => {}
            }
            self.commands.push(command);
        }
    }

    pub fn request(&mut self, client: &str, status: u16) {
        let record = Record::new(
            self.now,
            client.parse::<IpAddr>().unwrap().to_canonical(),
            status,
        );
        self.engine.record(&record, self.now);
        self.collect();
    }

    pub fn pass(&mut self, secs: u64) {
        for _ in 0..secs {
            self.now = self.now + Duration::from_secs(1);
            self.engine.tick(self.now);
            self.collect();
        }
    }

    /// So many seconds of everyday traffic: each second, `rate` requests of as many clients, one in fifty failing.
    pub fn everyday(&mut self, secs: u64, rate: u64) {
        for _ in 0..secs {
            for n in 0..rate {
                let number = self.now.secs() * rate + n;
                let status = if number.is_multiple_of(50) { 404 } else { 200 };
                self.request(
                    &format!("10.1.{}.{}", number / 200 % 5, number % 200),
                    status,
                );
            }
            self.pass(1);
        }
    }

    /// Requests of one client until it is banned, at so many a second; how many there were.
    pub fn until_banned(&mut self, client: &str, rate: u64, status: u16) -> u64 {
        let subject = Subject::of_client(client.parse().unwrap());
        for requests in 1..100_000 {
            self.request(client, status);
            if self.engine.ban_of(subject).is_some() {
                return requests;
            }
            if requests % rate == 0 {
                self.everyday(1, 2);
            }
        }
        panic!("{client} is never banned: {:?}", self.engine.snapshot());
    }

    pub fn events(&self, action: Action) -> Vec<&Event> {
        let commands = self.commands.iter();
        let events = commands.filter_map(|command| match command {
            Command::Record(event) if event.action == action => Some(event),
            _ => None,
        });
        events.collect()
    }

    pub fn bans(&self) -> Vec<String> {
        self.engine
            .bans()
            .map(|ban| ban.subject.to_string())
            .collect()
    }
}

/// A request of `client` at a time of its own, through `peer` if that is said.
pub fn record(at: Timestamp, client: &str, peer: Option<&str>) -> Record {
    Record {
        peer: peer.map(|peer| peer.parse().unwrap()),
        ..Record::new(at, client.parse().unwrap(), 200)
    }
}

impl Bench {
    pub fn feed(&mut self, feed: Feed) {
        self.engine.feed(feed);
    }

    /// A line that is read now, whenever it was written.
    pub fn read(&mut self, record: &Record) {
        self.engine.record(record, self.now);
        self.collect();
    }

    pub fn notices(&self) -> Vec<String> {
        self.told(Action::Notice)
    }

    pub fn told(&self, action: Action) -> Vec<String> {
        let told = self.commands.iter().filter_map(|command| match command {
            Command::Record(event) if event.action == action => Some(event.condition.clone()),
            _ => None,
        });
        told.collect()
    }
}
