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
    process::ExitCode,
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
use real::Real;
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

    /// A key of the configuration, such as `detect.z_score=4`
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

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(text) => {
            println!("{text}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// All that was asked for, as tables.
fn run(args: &Args) -> Result<String> {
    let settings = settings(&args.set)?;
    let mut scenarios = Scenario::all();
    let real = match &args.data {
        Some(folder) => Real::load(folder)?,
        None => Real::default(),
    };
    let mut backgrounds = Vec::from(Background::made());
    backgrounds.extend(real.backgrounds());
    check_names(args, &scenarios, &backgrounds)?;
    scenarios.retain(|scenario| args.wants(&scenario.name));
    backgrounds.retain(|background| args.wants_on(background.name));

    let mut score = Score::default();
    let asks_seconds = args.wants(real::SECONDS) && args.on.is_empty();
    let counts = real.seconds.as_ref().filter(|_| asks_seconds);
    let (mut text, seconds) = thread::scope(|scope| {
        // It is one long run: it begins first.
        let seconds = counts.map(|counts| scope.spawn(|| real::play_seconds(&settings, counts)));
        let text = judge_all(args, &settings, &scenarios, &backgrounds, &mut score);
        (text, seconds.map(thread::ScopedJoinHandle::join))
    });
    match seconds {
        Some(Ok(trial)) => text += &real::seconds(&trial, &mut score).show(args.markdown),
        Some(Err(_)) => bail!("{} came to no end", real::SECONDS),
        None => {}
    }
    if args.wants(real::LOGS) && args.on.is_empty() {
        text += &real.logs(&settings, &mut score).show(args.markdown);
    }
    let Score { met, wanted } = score;
    Ok(format!("{text}\n{met} of {wanted} wanted figures met"))
}

/// Every scenario on every background, and every background alone.
fn judge_all(
    args: &Args,
    settings: &Settings,
    scenarios: &[Scenario],
    backgrounds: &[Background],
    score: &mut Score,
) -> String {
    let mut jobs: Vec<Job<'_>> = Vec::new();
    for on in backgrounds {
        for seed in 0..args.seeds {
            if args.wants(CLEAN) {
                jobs.push(Job {
                    on,
                    seed,
                    scenarios: None,
                });
            }
            if !scenarios.is_empty() {
                jobs.push(Job {
                    on,
                    seed,
                    scenarios: Some(scenarios),
                });
            }
        }
    }
    let done = in_parallel(&jobs, |job| job.run(settings));
    // Trials with their seeds: of a background alone, or of one scenario on it.
    let of = |on: &Background, place: Option<usize>| -> Vec<(u64, Trial)> {
        let of_it = jobs.iter().zip(&done).filter(|(job, _)| {
            job.on.name == on.name && job.scenarios.is_some() == place.is_some()
        });
        let one = |(job, trials): (&Job<'_>, &Vec<Trial>)| {
            Some((job.seed, trials.get(place.unwrap_or(0))?.clone()))
        };
        of_it.filter_map(one).collect()
    };
    let bare = |trials: &[(u64, Trial)]| -> Vec<Trial> {
        trials.iter().map(|(_, trial)| trial.clone()).collect()
    };

    let mut clean = Table::new("Legitimate traffic alone", &report::CLEAN);
    let mut attacks = Table::new("Attacks", &report::ATTACKS);
    let mut bystanders = Table::new("Bystanders of attacks", &report::BYSTANDERS);
    let mut innocents = Table::new("What only looks like an attack", &report::INNOCENTS);
    let mut mistakes = Table::new("Banned by mistake", &report::MISTAKES);
    for on in backgrounds {
        let trials = of(on, None);
        if !trials.is_empty() {
            clean.row(report::clean(on.name, &bare(&trials), score));
            mistakes.rows(report::mistakes(CLEAN, on.name, &trials));
        }
    }
    let mut beside: Vec<Vec<Trial>> = backgrounds.iter().map(|_| Vec::new()).collect();
    for (place, scenario) in scenarios.iter().enumerate() {
        for (on, beside) in backgrounds.iter().zip(&mut beside) {
            let trials = of(on, Some(place));
            mistakes.rows(report::mistakes(&scenario.name, on.name, &trials));
            let trials = bare(&trials);
            if scenario.is_attack {
                attacks.row(report::attack(scenario, on.name, &trials, score));
                beside.extend(trials);
            } else {
                innocents.row(report::innocent(scenario, on.name, &trials, score));
            }
        }
    }
    for (on, beside) in backgrounds.iter().zip(&beside) {
        if !beside.is_empty() {
            bystanders.row(report::bystanders(on.name, beside));
        }
    }
    [clean, attacks, bystanders, innocents, mistakes]
        .iter()
        .map(|table| table.show(args.markdown))
        .collect()
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
        let value = if is_bare {
            value.to_owned()
        } else {
            format!("{value:?}")
        };
        for part in [key, " = ", &value, "\n"] {
            text.push_str(part);
        }
    }
    let config = Config::parse(&text).context("--set does not fit the configuration")?;
    Ok(config.engine)
}

/// A name that there is not is a mistake, and not nothing to do.
fn check_names(args: &Args, scenarios: &[Scenario], backgrounds: &[Background]) -> Result<()> {
    let mut names: BTreeSet<&str> = scenarios.iter().map(|one| one.name.as_str()).collect();
    names.extend([CLEAN, real::SECONDS, real::LOGS]);
    let grounds: BTreeSet<&str> = backgrounds.iter().map(|one| one.name).collect();
    for (asked, there_are) in [(&args.only, names), (&args.on, grounds)] {
        if let Some(unknown) = asked.iter().find(|name| !there_are.contains(name.as_str())) {
            let there_are: Vec<&str> = there_are.into_iter().collect();
            bail!("there is no {unknown:?}, but: {}", there_are.join(", "));
        }
    }
    Ok(())
}

/// What one thread does at a time.
struct Job<'a> {
    on: &'a Background,
    seed: u64,
    /// All on the same traffic; `None`: that by itself.
    scenarios: Option<&'a [Scenario]>,
}

impl Job<'_> {
    fn run(&self, settings: &Settings) -> Vec<Trial> {
        if let Some(scenarios) = self.scenarios {
            let scene = self.on.scene(self.seed);
            let one = |scenario| judge::judge(settings, scenario, &scene, self.seed);
            return scenarios.iter().map(one).collect();
        }
        let Some(requests) = self.on.clean(self.seed) else {
            return Vec::new();
        };
        let start = requests.first().map_or(0, |request| request.at);
        let end = requests.last().map_or(0, |request| request.at) + 1000;
        let deeds = judge::replay(settings, &requests, end);
        vec![judge::trial(
            &deeds,
            &requests,
            &BTreeSet::new(),
            start,
            end,
            false,
        )]
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
