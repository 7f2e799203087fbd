//! What is put into legitimate traffic, and what is wanted of the detector then.

use std::collections::BTreeSet;

use portcullis_engine::Subject;

use super::{
    attacks,
    background::{Scene, cut, merged},
    innocents,
    traffic::{Dice, Request, sort},
};

/// Something that is put into legitimate traffic.
pub struct Scenario {
    /// Its name in tables, and for `--only`.
    pub name: String,
    /// Is anybody to be banned?
    pub is_attack: bool,
    /// It is over after so many milliseconds.
    pub lasts: u64,
    /// The agent starts in the same minute.
    pub is_cold: bool,
    /// Its sources are no more than one source's changing addresses: it is over when hardly any request comes through.
    pub is_one: bool,
    /// Requests a second so many milliseconds after it began, where that grows.
    pub rate: Option<fn(u64) -> f64>,
    /// What is wanted.
    pub goals: Vec<Goal>,
    make: Make,
}

type Make = Box<dyn Fn(&Scene<'_>, &mut Dice, &mut Play) + Send + Sync>;

/// What is wanted of the detector; times in seconds.
#[derive(Clone, Copy, Debug)]
pub enum Goal {
    /// This share of sources is banned while it lasts.
    Caught(f64),
    /// Half of the sources are banned within this time.
    Median(f64),
    /// Within a time, this share of sources is banned.
    Within(f64, f64),
    /// The site's alarm stands, as a median.
    Alarm(f64),
    /// Always banned before it has reached so many requests a second.
    Before(f64),
    /// Nobody is banned.
    NoBan,
}

/// The requests of one trial.
#[derive(Debug, Default)]
pub struct Play {
    /// When it begins and ends.
    pub from: u64,
    /// See above.
    pub until: u64,
    /// Legitimate traffic, which may have to be changed.
    pub background: Vec<Request>,
    /// What is put in.
    pub injected: Vec<Request>,
    /// Who of these is to be banned.
    pub attackers: BTreeSet<Subject>,
}

impl Play {
    /// Puts requests in.
    pub fn put(&mut self, requests: impl IntoIterator<Item = Request>) {
        self.injected.extend(requests);
    }

    /// Puts an attacker's requests in.
    pub fn attack(&mut self, requests: impl IntoIterator<Item = Request>) {
        for request in requests {
            self.attackers.insert(Subject::of_client(request.client));
            self.injected.push(request);
        }
    }

    /// All requests, in order.
    pub fn requests(&self) -> Vec<Request> {
        let mut injected = self.injected.clone();
        injected.retain(|request| request.at < self.until);
        sort(&mut injected);
        merged(&self.background, &injected)
    }
}

impl Scenario {
    /// An attack that lasts so many seconds.
    pub fn attack(
        name: impl Into<String>,
        secs: u64,
        goals: &[Goal],
        make: impl Fn(&Scene<'_>, &mut Dice, &mut Play) + Send + Sync + 'static,
    ) -> Self {
        Self {
            name: name.into(),
            is_attack: true,
            lasts: secs * 1000,
            is_cold: false,
            is_one: false,
            rate: None,
            goals: goals.to_vec(),
            make: Box::new(make),
        }
    }

    /// Something that nobody must be banned for.
    pub fn innocent(
        name: impl Into<String>,
        secs: u64,
        make: impl Fn(&Scene<'_>, &mut Dice, &mut Play) + Send + Sync + 'static,
    ) -> Self {
        Self {
            is_attack: false,
            ..Self::attack(name, secs, &[Goal::NoBan], make)
        }
    }

    /// The same, met by an agent that has just started.
    pub fn cold(self) -> Self {
        Self {
            name: format!("cold-{}", self.name),
            is_cold: true,
            ..self
        }
    }

    /// All there are.
    pub fn all() -> Vec<Self> {
        let mut all = attacks::all();
        all.extend(innocents::all());
        all
    }

    /// One trial.
    pub fn play(&self, scene: &Scene<'_>, seed: u64) -> Play {
        let mut dice = Dice::new(&self.name, seed);
        let (from, until) = (scene.onset, scene.onset + self.lasts);
        let begin = if self.is_cold {
            from - 5_000 - dice.bits() % 50_000
        } else {
            0
        };
        let mut play = Play {
            from,
            until,
            background: cut(&scene.requests, begin, until).to_vec(),
            ..Play::default()
        };
        (self.make)(scene, &mut dice, &mut play);
        play
    }
}
