//! `cargo xtask eval`: judges the detector. Legitimate traffic is replayed at log time with attacks, and with what only looks
//! like one, put in at known times.
//!
//! Prints tables. The same seeds give the same figures on every machine. A figure that is missed is said, not failed.

#![forbid(unsafe_code)]

#[path = "eval/attacks.rs"]
mod attacks;
#[path = "eval/background.rs"]
mod background;
#[path = "eval/innocents.rs"]
mod innocents;
#[path = "eval/judge.rs"]
mod judge;
#[path = "eval/real.rs"]
mod real;
#[path = "eval/report.rs"]
mod report;
#[path = "eval/scenario.rs"]
mod scenario;
#[path = "eval/site.rs"]
mod site;
#[path = "eval/stats.rs"]
mod stats;
#[path = "eval/trace.rs"]
mod trace;
#[path = "eval/traffic.rs"]
mod traffic;

use std::{
    collections::BTreeSet,
    path::PathBuf,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use anyhow::{Context as _, Result, bail};
use clap::Parser;
use portcullis::config::Config;
use portcullis_engine::Settings;

use background::Background;
use judge::Trial;
use report::{Score, Table};
use scenario::Scenario;

/// Judge the detector: what it catches, how soon, and whom it bans by mistake.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask eval --", version, max_term_width = 100)]
struct Args {
    /// Folder of real traces; those that are there are judged too
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,

    /// Trials of each scenario on each background
    #[arg(long, default_value_t = 20, value_name = "N")]
    seeds: u64,

    /// Only these scenarios; `clean` stands for legitimate traffic alone
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    only: Vec<String>,

    /// Only on these backgrounds
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    on: Vec<String>,

    /// A key of the configuration, such as detect.z_score=4
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,

    /// Tables in Markdown
    #[arg(long)]
    markdown: bool,
}

impl Args {
    fn wants(&self, scenario: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|name| name == scenario)
    }

    fn wants_on(&self, background: &str) -> bool {
        self.on.is_empty() || self.on.iter().any(|name| name == background)
    }
}

/// Legitimate traffic alone, in `--only`.
const CLEAN: &str = "clean";

fn main() -> Result<()> {
    let args = Args::parse();
    let settings = settings(&args.set)?;
    let mut scenarios = Scenario::all();
    check_names(&args, &scenarios)?;
    scenarios.retain(|scenario| args.wants(&scenario.name));
    let mut backgrounds = Vec::from(Background::made());
    let real = args
        .data
        .as_deref()
        .map(real::Real::load)
        .transpose()?
        .unwrap_or_default();
    backgrounds.extend(real.backgrounds());
    backgrounds.retain(|background| args.wants_on(background.name));

    let mut jobs: Vec<Job<'_>> = Vec::new();
    if args.wants(real::SECONDS) {
        jobs.extend(real.seconds.as_ref().map(Job::Seconds));
    }
    for background in &backgrounds {
        // The longest first, so that no processor is left alone with one at the end.
        for seed in 0..args.seeds {
            if args.wants(CLEAN) {
                jobs.push(Job::Clean(background, seed));
            }
        }
    }
    for background in &backgrounds {
        for seed in 0..args.seeds {
            jobs.push(Job::Scene(background, seed));
        }
    }
    let done = in_parallel(&jobs, |job| job.run(&settings, &scenarios));

    let mut score = Score::default();
    let mut clean = Table::new("Legitimate traffic alone", &report::CLEAN);
    let mut attacks = Table::new("Attacks", &report::ATTACKS);
    let mut innocents = Table::new("What only looks like an attack", &report::INNOCENTS);
    let of = |background: &Background, is_clean: bool| -> Vec<&Vec<Trial>> {
        let of_it = jobs.iter().zip(&done).filter(|(job, _)| match job {
            Job::Clean(on, _) => is_clean && on.name == background.name,
            Job::Scene(on, _) => !is_clean && on.name == background.name,
            Job::Seconds(_) => false,
        });
        of_it.map(|(_, done)| done).collect()
    };
    for background in &backgrounds {
        let trials: Vec<Trial> = of(background, true)
            .into_iter()
            .flatten()
            .cloned()
            .collect();
        if !trials.is_empty() {
            clean.row(report::clean(background.name, &trials, &mut score));
        }
    }
    for (place, scenario) in scenarios.iter().enumerate() {
        for background in &backgrounds {
            let trials: Vec<Trial> = of(background, false)
                .iter()
                .filter_map(|trials| trials.get(place).cloned())
                .collect();
            let (table, row): (_, fn(&_, &_, &_, &mut _) -> _) = if scenario.is_attack {
                (&mut attacks, report::attack)
            } else {
                (&mut innocents, report::innocent)
            };
            table.row(row(scenario, background.name, &trials, &mut score));
        }
    }
    let mut text = String::new();
    for table in [clean, attacks, innocents] {
        text += &table.show(args.markdown);
    }
    for (job, done) in jobs.iter().zip(&done) {
        if let (Job::Seconds(_), Some(trial)) = (job, done.first()) {
            text += &real::seconds(trial, &mut score).show(args.markdown);
        }
    }
    if args.wants(real::LOGS) {
        text += &real.logs(&settings, &mut score).show(args.markdown);
    }
    println!(
        "{text}\n{} of {} wanted figures met",
        score.met, score.wanted
    );
    Ok(())
}

/// The engine's settings by default, or with some keys set.
fn settings(set: &[String]) -> Result<Settings> {
    let mut text = String::new();
    for pair in set {
        let (key, value) = pair
            .split_once('=')
            .with_context(|| format!("{pair:?} is no KEY=VALUE"))?;
        let (key, value) = (key.trim(), value.trim());
        // What is neither a number nor a list nor true or false is a text.
        let is_bare = value.starts_with(['"', '\'', '['])
            || value.parse::<f64>().is_ok()
            || value.parse::<bool>().is_ok();
        text += &if is_bare {
            format!("{key} = {value}\n")
        } else {
            format!("{key} = {value:?}\n")
        };
    }
    let config = Config::parse(&text).context("--set does not fit the configuration")?;
    Ok(config.engine)
}

fn check_names(args: &Args, scenarios: &[Scenario]) -> Result<()> {
    let mut names: BTreeSet<&str> = scenarios.iter().map(|one| one.name.as_str()).collect();
    names.extend([CLEAN, real::SECONDS, real::LOGS]);
    let known = |name: &&String| names.contains(name.as_str());
    if let Some(unknown) = args.only.iter().find(|name| !known(name)) {
        let names: Vec<&str> = names.into_iter().collect();
        bail!(
            "no scenario is called {unknown:?}; there are: {}",
            names.join(", ")
        );
    }
    Ok(())
}

/// What one thread does at a time.
enum Job<'a> {
    Seconds(&'a Vec<u32>),
    Clean(&'a Background, u64),
    /// All scenarios on the same traffic.
    Scene(&'a Background, u64),
}

impl Job<'_> {
    fn run(&self, settings: &Settings, scenarios: &[Scenario]) -> Vec<Trial> {
        match self {
            Self::Seconds(counts) => vec![real::play_seconds(settings, counts)],
            Self::Clean(background, seed) => {
                let Some(requests) = background.clean(*seed) else {
                    return Vec::new();
                };
                let end = requests.last().map_or(0, |request| request.at) + 1000;
                let deeds = judge::replay(settings, &requests, end);
                vec![judge::trial(
                    &deeds,
                    &requests,
                    &BTreeSet::new(),
                    end,
                    end,
                    false,
                )]
            }
            Self::Scene(background, seed) => {
                if scenarios.is_empty() {
                    return Vec::new();
                }
                let scene = background.scene(*seed);
                let one = |scenario| judge::judge(settings, scenario, &scene, *seed);
                scenarios.iter().map(one).collect()
            }
        }
    }
}

/// Does all jobs on all processors; the results are in the order of the jobs.
fn in_parallel<J: Sync, R: Send>(jobs: &[J], run: impl Fn(&J) -> R + Sync) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let done = Mutex::new(Vec::new());
    let work = || {
        while let Some((place, job)) = {
            let place = next.fetch_add(1, Ordering::Relaxed);
            jobs.get(place).map(|job| (place, job))
        } {
            let result = run(job);
            let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
            done.push((place, result));
        }
    };
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(work);
        }
    });
    let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    done.sort_by_key(|(place, _)| *place);
    done.into_iter().map(|(_, result)| result).collect()
}
