//! What is judged on real traces only.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use portcullis_engine::{Settings, Subject, parse::Record};

use super::{
    background::Background,
    judge::{Deeds, Trial, Watch, replay, trial},
    report::{Score, Table, tests},
    trace::{self, Trace, scattered},
    traffic::{Dice, Popularity, Request, path},
};

/// Name, in `--only`, of the counts a second of two months.
pub const SECONDS: &str = "nasa-seconds";
/// Name, in `--only`, of small labelled logs.
pub const LOGS: &str = "logs";

/// The real traces that are there.
#[derive(Debug, Default)]
pub struct Real {
    traces: Vec<(&'static str, Trace)>,
    /// Requests in each second of 58 days from 1 July 1995.
    pub seconds: Option<Vec<u32>>,
    logs: Vec<Log>,
}

/// A log in which it is known who is to be flagged.
#[derive(Debug)]
struct Log {
    name: String,
    requests: Vec<Request>,
    offenders: BTreeSet<Subject>,
}

/// Of its 58 requests 48 are for different paths that are not there: no visitor of `secrepo-2018`.
const SCANNER: Ipv4Addr = Ipv4Addr::new(202, 115, 12, 166);

impl Real {
    /// Those that are in a folder.
    pub fn load(folder: &Path) -> Result<Self> {
        let file = |name: &str| Some(folder.join(name)).filter(|file| file.exists());
        let mut real = Self::default();
        if let Some(file) = file("nasa_19950801.tsv.xz") {
            let nasa = trace::nasa(&file)?;
            let busy = nasa.overlaid(6);
            real.traces.extend([("nasa", nasa), ("nasa-busy", busy)]);
        }
        for (name, log) in [
            ("secrepo-2018", "secrepo_2018-12-15.log.xz"),
            ("secrepo-2021", "secrepo_2021-10.log.xz"),
        ] {
            let Some(file) = file(log) else { continue };
            let mut trace = trace::combined(&file)?;
            let whole = trace.requests.clone();
            let mut offenders = Vec::new();
            // One of them holds somebody who tried thousands of names.
            for (what, offender) in [
                ("enumerator", trace.heaviest()),
                ("scanner", Some(SCANNER.into())),
            ] {
                let Some(offender) = offender else { continue };
                let (others, its) = trace.clone().without(offender);
                if its.len() > 1_000 || what == "scanner" && !its.is_empty() {
                    let alone = format!("{name}: {what} alone");
                    real.logs.push(Log::new(alone, its, &[offender]));
                    offenders.push(offender);
                    trace = others;
                }
            }
            if !offenders.is_empty() {
                let log = Log::new(format!("{name}: whole log"), whole, &offenders);
                real.logs.push(log);
            }
            real.traces.push((name, trace));
        }
        if let Some(file) = file("nasa_persec_1995jul-aug.txt.xz") {
            real.seconds = Some(trace::counts(&file)?);
        }
        if let Some(hub) = file("crowdsec-hub") {
            real.logs.extend(labelled(&hub)?);
        }
        Ok(real)
    }

    /// Those that attacks can be put into.
    pub fn backgrounds(&self) -> Vec<Background> {
        let of = |(name, trace): &(&'static str, Trace)| Background::of_trace(name, trace.clone());
        self.traces.iter().map(of).collect()
    }

    /// Plays each labelled log alone to an agent that has just started.
    pub fn logs(&self, settings: &Settings, score: &mut Score) -> Table {
        let head = [
            "log alone",
            "requests",
            "offenders",
            "theirs",
            "flagged",
            "after",
            "flagged by",
            "others banned",
            "wanted",
        ];
        let mut table = Table::new("Logs alone", &head);
        for log in &self.logs {
            table.row(log.judge(settings, score));
        }
        table
    }
}

impl Log {
    fn new(name: String, requests: Vec<Request>, offenders: &[IpAddr]) -> Self {
        let mut log = Self {
            name,
            requests: Trace::new(requests).requests,
            offenders: offenders.iter().copied().map(Subject::of_client).collect(),
        };
        log.shorten();
        log
    }

    /// Lines of several years stand in one log: nobody waits for longer than two hours.
    fn shorten(&mut self) {
        const LONGEST: u64 = 7_200_000;
        let (mut last, mut taken) = (None, 0);
        for request in &mut self.requests {
            let gap = last.map_or(0, |last| request.at - last);
            last = Some(request.at);
            taken += gap.saturating_sub(LONGEST);
            request.at -= taken;
        }
    }

    fn judge(&self, settings: &Settings, score: &mut Score) -> Vec<String> {
        let end = self.requests.last().map_or(0, |request| request.at) + 1000;
        let start = self.requests.first().map_or(0, |request| request.at);
        let deeds = replay(settings, &self.requests, end);
        let result = trial(&deeds, &self.requests, &self.offenders, start, end, false);
        let theirs = self.requests.len() as u64 - result.legitimate;
        let flagged = result.sources.iter().flatten().count();
        let is_whole = flagged == self.offenders.len();
        let mut wanted = Vec::new();
        if theirs >= 100 {
            let is_met = is_whole && result.through <= 100;
            wanted.push(format!("≤ 100 requests: {}", score.count(is_met)));
        }
        if self.offenders.is_empty() {
            wanted.push(format!("no ban: {}", score.count(result.wrong.is_empty())));
        }
        vec![
            self.name.clone(),
            self.requests.len().to_string(),
            self.offenders.len().to_string(),
            theirs.to_string(),
            flagged.to_string(),
            if flagged > 0 {
                result.through.to_string()
            } else {
                "-".to_owned()
            },
            tests(&result.tests),
            result.wrong.len().to_string(),
            wanted.join("; "),
        ]
    }
}

/// Logs of the hub: a folder each, with a log and assertions that name who is to be found. Without any, nobody is.
fn labelled(hub: &Path) -> Result<Vec<Log>> {
    let mut folders: Vec<PathBuf> = fs::read_dir(hub)
        .with_context(|| format!("cannot read {}", hub.display()))?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.is_dir())
        .collect();
    folders.sort();
    let mut logs = Vec::new();
    for folder in folders {
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        let mut requests = Vec::new();
        for entry in fs::read_dir(&folder)?.flatten() {
            if entry.path().extension().is_some_and(|end| end == "log") {
                requests.extend(trace::combined(&entry.path())?.requests);
            }
        }
        // Some are logs of something else than requests.
        if requests.is_empty() {
            continue;
        }
        let asserted = fs::read_to_string(folder.join("scenario.assert")).unwrap_or_default();
        let offenders = named(&asserted);
        // Loopback and private addresses stand for real ones here, and the first are never banned.
        let mut stand_ins = BTreeMap::new();
        let mut stand_in = |client: IpAddr| {
            let next = u32::try_from(stand_ins.len()).unwrap_or(u32::MAX);
            *stand_ins
                .entry(client)
                .or_insert_with(|| Ipv4Addr::from(0xc612_0000 + next * 257).into())
        };
        for request in &mut requests {
            request.client = stand_in(request.client);
        }
        let offenders: Vec<IpAddr> = offenders.into_iter().map(stand_in).collect();
        logs.push(Log::new(name.into_owned(), requests, &offenders));
    }
    Ok(logs)
}

/// Addresses that are said to be found: `results[0].Overflow.Sources["192.0.2.1"].IP == …`.
fn named(assertions: &str) -> BTreeSet<IpAddr> {
    let addresses = assertions.lines().filter_map(|line| {
        let (_, rest) = line.split_once("Sources[\"")?;
        let (address, _) = rest.split_once('"')?;
        address.parse::<IpAddr>().ok()
    });
    addresses.map(|address| address.to_canonical()).collect()
}

/// Counts a second, as requests of so many people that nobody is heavy.
pub fn play_seconds(settings: &Settings, counts: &[u32]) -> Trial {
    // 1 July 1995, midnight in Florida.
    const START: u64 = 804_571_200;
    const PEOPLE: u32 = 50_000;
    let mut dice = Dice::new(SECONDS, 0);
    let popularity = Popularity::zipf(300);
    let targets: Vec<_> = (0..300)
        .map(|page| path(&format!("/{page}{}", [".html", ".gif", ".gif"][page % 3])))
        .collect();
    let mut watch = Watch::new(settings, START * 1000);
    let mut records: Vec<Record> = Vec::new();
    let (mut at, mut total) = (START * 1000, 0_u32);
    for count in counts {
        for place in 0..*count {
            let request = Request {
                at: at + u64::from(place) * 1000 / u64::from(*count),
                client: scattered(total % PEOPLE),
                target: targets[popularity.draw(&mut dice)],
                status: if dice.chance(0.007) { 404 } else { 200 },
                agent: None,
                is_form: false,
            };
            records.push(request.record());
            total = total.wrapping_add(1);
        }
        at += 1000;
        if records.len() >= 4096 {
            watch.see(&records);
            records.clear();
        }
    }
    watch.see(&records);
    let Deeds { bans, alarms, .. } = watch.end(at);
    let day_13 = (START + 12 * 86_400) * 1000;
    Trial {
        legitimate: u64::from(total),
        lasted: at - START * 1000,
        alarms: alarms.len() as u64,
        // On 13 July: there is no attack to be early for.
        early: alarms
            .iter()
            .filter(|alarm| (day_13..day_13 + 86_400_000).contains(*alarm))
            .count() as u64,
        from: START * 1000,
        wrong: bans,
        ..Trial::default()
    }
}

/// What came of [`play_seconds`].
pub fn seconds(trial: &Trial, score: &mut Score) -> Table {
    let days = trial.lasted as f64 / 86_400_000.0;
    let a_day = trial.alarms as f64 / days;
    let head = [
        "days",
        "requests",
        "alarms",
        "alarms a day",
        "on 13 July",
        "false bans",
        "wanted",
    ];
    let mut table = Table::new("Two months of NASA's seconds", &head);
    table.row(vec![
        format!("{days:.1}"),
        trial.legitimate.to_string(),
        trial.alarms.to_string(),
        format!("{a_day:.2}"),
        trial.early.to_string(),
        trial.wrong.len().to_string(),
        format!(
            "≤ 0.1 a day: {}; none on 13 July: {}; no ban: {}",
            score.count(a_day <= 0.1),
            score.count(trial.early == 0),
            score.count(trial.wrong.is_empty()),
        ),
    ]);
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offenders_are_those_whom_the_assertions_name() {
        let text = r#"len(results) == 1
"192.0.2.1" in results[0].Overflow.GetSources()
results[0].Overflow.Sources["192.0.2.1"].IP == "192.0.2.1"
results[1].Overflow.Sources["2001:0db8::7"].GetScope() == "Ip""#;
        let found: Vec<String> = named(text).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["192.0.2.1", "2001:db8::7"]);
    }
}
