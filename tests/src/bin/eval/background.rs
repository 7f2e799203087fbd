//! Legitimate traffic: made up, or from traces.

use std::{collections::BTreeSet, net::IpAddr};

use portcullis_engine::parse::{Target, TargetKind};

use super::{
    site::{BARE, BUSY, Person, QUIET, Site, Size, address},
    trace::Trace,
    traffic::{Dice, Request, path, sort},
};

const MINUTE: u64 = 60_000;
/// So long is there only legitimate traffic before anything is put in.
const WARM_UP: u64 = 45 * MINUTE;
/// What is put in may last so long.
pub const LONGEST: u64 = 150 * MINUTE;
/// Made-up traffic by itself lasts so long.
const CLEAN: u64 = 6 * 60 * MINUTE;
/// Some Tuesday morning.
const EPOCH: u64 = 1_709_625_600_000;

/// A kind of legitimate traffic.
#[derive(Debug)]
pub struct Background {
    /// Its name in tables.
    pub name: &'static str,
    source: Source,
}

#[derive(Debug)]
enum Source {
    Made(Size),
    Trace(Trace),
}

/// A stretch of legitimate traffic, and when something may be put in.
#[derive(Debug)]
pub struct Scene<'a> {
    visits: Visits<'a>,
    /// In order.
    pub requests: Vec<Request>,
    /// When something is put in.
    pub onset: u64,
    /// Pages that were asked for before, each as often as it was.
    pub pages: Vec<Target>,
    /// The page most asked for.
    pub landing: Target,
    /// Clients that came before.
    pub seen: Vec<IpAddr>,
}

/// Where further visits come from.
#[derive(Debug)]
enum Visits<'a> {
    Made(Box<Site>),
    Trace(&'a Trace),
}

impl Background {
    /// The made-up ones. Each trial has a site and people of its own.
    pub fn made() -> [Self; 3] {
        [("quiet", QUIET), ("busy", BUSY), ("bare", BARE)].map(|(name, size)| Self {
            name,
            source: Source::Made(size),
        })
    }

    /// A trace.
    pub fn of_trace(name: &'static str, trace: Trace) -> Self {
        Self {
            name,
            source: Source::Trace(trace),
        }
    }

    /// Nothing but legitimate traffic, for hours. A trace has only one such stretch: all of it.
    pub fn clean(&self, seed: u64) -> Option<Vec<Request>> {
        match &self.source {
            Source::Made(size) => {
                let site = Site::new(*size, seed);
                let mut dice = Dice::new(&format!("{} alone", self.name), seed);
                let start = EPOCH + seed * 7 * 60 * MINUTE;
                Some(site.traffic(&mut dice, start, start + CLEAN))
            }
            Source::Trace(trace) => (seed == 0).then(|| trace.requests.clone()),
        }
    }

    /// Legitimate traffic with room for something to be put in.
    pub fn scene(&self, seed: u64) -> Scene<'_> {
        let mut dice = Dice::new(self.name, seed);
        let (visits, requests, onset) = match &self.source {
            Source::Made(size) => {
                let site = Site::new(*size, seed);
                let start = EPOCH + seed * 53 * MINUTE;
                let onset = start + WARM_UP + dice.bits() % MINUTE;
                let requests = site.traffic(&mut dice, start, onset + LONGEST);
                (Visits::Made(Box::new(site)), requests, onset)
            }
            Source::Trace(trace) => {
                let first = trace.requests.first().map_or(0, |request| request.at);
                let last = trace.requests.last().map_or(0, |request| request.at);
                let room = last.saturating_sub(first + WARM_UP + LONGEST).max(1);
                let onset = first + WARM_UP + dice.bits() % room;
                let requests = cut(&trace.requests, onset - WARM_UP, onset + LONGEST);
                (Visits::Trace(trace), requests.to_vec(), onset)
            }
        };
        let before = cut(&requests, 0, onset);
        let is_page =
            |request: &&Request| request.target.kind == TargetKind::Page && request.status < 400;
        let pages: Vec<Target> = before
            .iter()
            .filter(is_page)
            .map(|request| request.target)
            .collect();
        let seen: BTreeSet<IpAddr> = before.iter().map(|request| request.client).collect();
        Scene {
            visits,
            landing: commonest(&pages),
            pages,
            seen: seen.into_iter().collect(),
            requests,
            onset,
        }
    }
}

fn commonest(pages: &[Target]) -> Target {
    let mut paths: Vec<u32> = pages.iter().map(|page| page.path).collect();
    paths.sort_unstable();
    let best = paths
        .chunk_by(|one, other| one == other)
        .max_by_key(|same| same.len())
        .and_then(|same| same.first());
    let found = best.and_then(|best| pages.iter().find(|page| page.path == *best));
    found.copied().unwrap_or_else(|| path("/"))
}

/// Those from one time up to another.
pub fn cut(requests: &[Request], from: u64, until: u64) -> &[Request] {
    let begin = requests.partition_point(|request| request.at < from);
    let end = requests.partition_point(|request| request.at < until);
    requests.get(begin..end).unwrap_or_default()
}

impl Scene<'_> {
    /// Adds a visit of somebody as they come to this site, beginning at a time; with the page most asked for first, if that
    /// is where everybody goes.
    pub fn visit(
        &self,
        dice: &mut Dice,
        person: Person,
        lands: bool,
        at: u64,
        all: &mut Vec<Request>,
    ) {
        match &self.visits {
            Visits::Made(site) => {
                let landing = if lands { 0 } else { dice.below(30) };
                site.session(dice, person, landing, at, all);
            }
            Visits::Trace(trace) => {
                let Some(session) = dice.pick(&trace.sessions) else {
                    return;
                };
                if lands {
                    all.push(Request {
                        at,
                        client: person.client,
                        target: self.landing,
                        status: 200,
                        agent: person.agent,
                        is_form: false,
                    });
                }
                all.extend(session.iter().map(|step| Request {
                    at: at + step.after,
                    client: person.client,
                    target: step.target,
                    status: step.status,
                    agent: person.agent,
                    is_form: false,
                }));
            }
        }
    }

    /// Somebody who has not been here before.
    pub fn stranger(&self, dice: &mut Dice) -> Person {
        Person {
            client: address(dice),
            agent: self.agent(dice),
            returns: false,
        }
    }

    /// Some browser, where the log has user agents.
    pub fn agent(&self, dice: &mut Dice) -> Option<u32> {
        dice.pick(&self.requests).and_then(|request| request.agent)
    }

    /// A page, as popular ones are asked for.
    pub fn page(&self, dice: &mut Dice) -> Target {
        dice.pick(&self.pages).copied().unwrap_or(self.landing)
    }

    /// Each page once, in any order.
    pub fn all_pages(&self, dice: &mut Dice) -> Vec<Target> {
        let mut pages = self.pages.clone();
        pages.sort_by_key(|page| page.path);
        pages.dedup();
        dice.shuffle(&mut pages);
        pages
    }
}

/// Two lists, each in order, as one.
pub fn merged(one: &[Request], other: &[Request]) -> Vec<Request> {
    let mut all = [one, other].concat();
    sort(&mut all);
    all
}
