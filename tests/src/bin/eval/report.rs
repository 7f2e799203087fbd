//! Tables, and which of the wanted figures were met.

use std::{collections::BTreeMap, fmt::Write as _};

use super::{
    judge::Trial,
    scenario::{Goal, Scenario},
    stats::{confidence, quantile, share_within},
};

/// A table.
#[derive(Debug)]
pub struct Table {
    title: &'static str,
    head: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// Without rows.
    pub fn new(title: &'static str, head: &[&'static str]) -> Self {
        Self {
            title,
            head: head.to_vec(),
            rows: Vec::new(),
        }
    }

    /// Adds one.
    pub fn row(&mut self, row: Vec<String>) {
        self.rows.push(row);
    }

    /// Adds some.
    pub fn rows(&mut self, rows: impl IntoIterator<Item = Vec<String>>) {
        self.rows.extend(rows);
    }

    /// As text or Markdown; nothing if it has no rows.
    pub fn show(&self, markdown: bool) -> String {
        if self.rows.is_empty() {
            return String::new();
        }
        let head: Vec<String> = self.head.iter().map(ToString::to_string).collect();
        let width = |column: usize| {
            let cells = self.rows.iter().chain([&head]);
            cells
                .filter_map(|row| row.get(column))
                .map(|cell| cell.chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..head.len()).map(width).collect();
        let rule = widths.iter().map(|width| "-".repeat(*width)).collect();
        let mut text = if markdown {
            format!("\n## {}\n\n", self.title)
        } else {
            format!("\n{}\n", self.title)
        };
        for row in [&head, &rule].into_iter().chain(&self.rows) {
            let cells = row.iter().zip(&widths).map(|(cell, width)| {
                let blank = " ".repeat(width - cell.chars().count());
                format!("{cell}{blank}")
            });
            let line = cells
                .collect::<Vec<_>>()
                .join(if markdown { " | " } else { "  " });
            let line = line.trim_end();
            let _ = if markdown {
                writeln!(text, "| {line} |")
            } else {
                writeln!(text, "{line}")
            };
        }
        text
    }
}

/// How many of the wanted figures were met.
#[derive(Clone, Copy, Debug, Default)]
pub struct Score {
    /// These …
    pub met: u32,
    /// … of these.
    pub wanted: u32,
}

impl Score {
    /// Counts one, and says it.
    pub fn count(&mut self, is_met: bool) -> &'static str {
        self.wanted += 1;
        self.met += u32::from(is_met);
        if is_met { "met" } else { "MISSED" }
    }
}

/// Milliseconds as seconds; without any it never happened.
pub fn secs(millis: Option<u64>) -> String {
    millis.map_or("never".to_owned(), |millis| {
        format!("{:.1}", millis as f64 / 1000.0)
    })
}

fn percent(share: f64) -> String {
    format!("{:.0}%", share * 100.0)
}

/// Columns of [`attack`].
pub const ATTACKS: [&str; 13] = [
    "attack",
    "on",
    "caught",
    "median s",
    "p95 s",
    "through",
    "alarm s",
    "in 60 s",
    "in 120 s",
    "in 180 s",
    "flagged by",
    "false bans",
    "wanted",
];

/// What came of an attack in all its trials.
pub fn attack(scenario: &Scenario, on: &str, trials: &[Trial], score: &mut Score) -> Vec<String> {
    let figures = Figures::of(scenario, trials);
    let in_secs = |secs: u64| {
        if figures.is_many {
            percent(share_within(&figures.sources, secs * 1000))
        } else {
            String::new()
        }
    };
    let mut wanted: Vec<String> = scenario
        .goals
        .iter()
        .map(|goal| figures.hold(goal, score))
        .collect();
    if let Some(rate) = scenario.rate {
        let at = |millis: Option<u64>| {
            millis.map_or("never".to_owned(), |at| format!("{:.2}/s", rate(at)))
        };
        let median = quantile(&figures.sources, 0.5);
        wanted.push(format!("caught at {} (median)", at(median)));
    }
    vec![
        scenario.name.clone(),
        on.to_owned(),
        percent(share_within(&figures.sources, scenario.lasts)),
        secs(quantile(&figures.sources, 0.5)),
        secs(quantile(&figures.sources, 0.95)),
        quantile(&figures.through, 0.5).map_or(String::new(), |count| count.to_string()),
        secs(quantile(&figures.alarms, 0.5)),
        in_secs(60),
        in_secs(120),
        in_secs(180),
        tests(&figures.tests),
        figures.wrong.to_string(),
        wanted.join("; "),
    ]
}

/// Tests with how often each flagged.
pub fn tests(tests: &BTreeMap<String, u64>) -> String {
    let words = tests.iter().map(|(test, count)| format!("{test} {count}"));
    words.collect::<Vec<_>>().join(", ")
}

/// Of all trials together.
struct Figures<'a> {
    scenario: &'a Scenario,
    sources: Vec<Option<u64>>,
    through: Vec<Option<u64>>,
    alarms: Vec<Option<u64>>,
    tests: BTreeMap<String, u64>,
    wrong: usize,
    is_many: bool,
}

impl<'a> Figures<'a> {
    fn of(scenario: &'a Scenario, trials: &[Trial]) -> Self {
        let mut tests = BTreeMap::new();
        for trial in trials {
            for (test, count) in &trial.tests {
                *tests.entry(test.clone()).or_default() += count;
            }
        }
        Self {
            scenario,
            sources: trials
                .iter()
                .flat_map(|trial| trial.sources.clone())
                .collect(),
            through: trials.iter().map(|trial| Some(trial.through)).collect(),
            alarms: trials.iter().map(|trial| trial.alarm).collect(),
            tests,
            wrong: trials.iter().map(|trial| trial.wrong.len()).sum(),
            is_many: trials.iter().any(|trial| trial.sources.len() > 1),
        }
    }

    fn hold(&self, goal: &Goal, score: &mut Score) -> String {
        let at_most = |figure: Option<u64>, most: f64| {
            figure.is_some_and(|millis| millis as f64 <= most * 1000.0)
        };
        let (words, is_met) = match *goal {
            Goal::Caught(least) => {
                let share = share_within(&self.sources, self.scenario.lasts);
                (format!("caught ≥ {}", percent(least)), share >= least)
            }
            Goal::Median(most) => (
                format!("median ≤ {most} s"),
                at_most(quantile(&self.sources, 0.5), most),
            ),
            Goal::Within(time, least) => (
                format!("≥ {} in {time} s", percent(least)),
                share_within(&self.sources, super::traffic::millis(time)) >= least,
            ),
            Goal::Alarm(most) => (
                format!("alarm ≤ {most} s"),
                at_most(quantile(&self.alarms, 0.5), most),
            ),
            Goal::Before(most) => {
                let rate =
                    |at: &Option<u64>| self.scenario.rate.zip(*at).map(|(rate, at)| rate(at));
                let worst = self
                    .sources
                    .iter()
                    .map(|at| rate(at).unwrap_or(f64::INFINITY))
                    .fold(0.0, f64::max);
                (format!("before {most}/s"), worst < most)
            }
            Goal::NoBan => ("no ban".to_owned(), self.wrong == 0),
        };
        format!("{words}: {}", score.count(is_met))
    }
}

/// Columns of [`innocent`].
pub const INNOCENTS: [&str; 7] = [
    "innocent",
    "on",
    "trials",
    "false bans",
    "flagged by",
    "alarms",
    "wanted",
];

/// What came of something innocent in all its trials.
pub fn innocent(scenario: &Scenario, on: &str, trials: &[Trial], score: &mut Score) -> Vec<String> {
    let figures = Figures::of(scenario, trials);
    let raised: u64 = trials.iter().map(|trial| trial.alarms - trial.early).sum();
    let goals = scenario.goals.iter();
    let wanted: Vec<String> = goals.map(|goal| figures.hold(goal, score)).collect();
    vec![
        scenario.name.clone(),
        on.to_owned(),
        trials.len().to_string(),
        figures.wrong.to_string(),
        tests_of(trials),
        raised.to_string(),
        wanted.join("; "),
    ]
}

/// How often each test flagged somebody by mistake.
fn tests_of(trials: &[Trial]) -> String {
    let mut counts = BTreeMap::new();
    for ban in trials.iter().flat_map(|trial| &trial.wrong) {
        *counts.entry(ban.test.clone()).or_default() += 1;
    }
    tests(&counts)
}

/// Columns of [`clean`].
pub const CLEAN: [&str; 9] = [
    "legitimate traffic",
    "hours",
    "requests",
    "false bans",
    "flagged by",
    "a million requests",
    "95 %",
    "alarms a day",
    "wanted",
];

/// What came of nothing but legitimate traffic.
pub fn clean(on: &str, trials: &[Trial], score: &mut Score) -> Vec<String> {
    let alarms: u64 = trials.iter().map(|trial| trial.alarms).sum();
    let lasted: u64 = trials.iter().map(|trial| trial.lasted).sum();
    let days = lasted as f64 / 86_400_000.0;
    let [requests, wrong, tests, share, range] = mistaken(trials);
    let is_met = trials.iter().all(|trial| trial.wrong.is_empty());
    vec![
        on.to_owned(),
        format!("{:.0}", days * 24.0),
        requests,
        wrong,
        tests,
        share,
        range,
        format!("{:.2}", alarms as f64 / days),
        format!("no ban: {}", score.count(is_met)),
    ]
}

/// Columns of [`bystanders`].
pub const BYSTANDERS: [&str; 6] = [
    "while attacks went on",
    "requests",
    "false bans",
    "flagged by",
    "a million requests",
    "95 %",
];

/// Who was banned by mistake while others attacked.
pub fn bystanders(on: &str, trials: &[Trial]) -> Vec<String> {
    [on.to_owned()]
        .into_iter()
        .chain(mistaken(trials))
        .collect()
}

/// Legitimate requests, false bans, by which tests, how many a million requests, and in what range that lies.
fn mistaken(trials: &[Trial]) -> [String; 5] {
    let requests: u64 = trials.iter().map(|trial| trial.legitimate).sum();
    let wrong: u64 = trials.iter().map(|trial| trial.wrong.len() as u64).sum();
    let (low, high) = confidence(wrong, requests);
    [
        requests.to_string(),
        wrong.to_string(),
        tests_of(trials),
        format!("{:.2}", wrong as f64 * 1e6 / requests.max(1) as f64),
        format!("{:.2} to {:.2}", low * 1e6, high * 1e6),
    ]
}

/// Columns of [`mistakes`].
pub const MISTAKES: [&str; 7] = [
    "false ban in",
    "on",
    "seed",
    "after s",
    "subject",
    "test",
    "reason",
];

/// The first few who were banned by mistake in the trials of one scenario, each with its seed, and how many more there are.
pub fn mistakes(scenario: &str, on: &str, trials: &[(u64, Trial)]) -> Vec<Vec<String>> {
    const FEW: usize = 4;
    let row = |seed: String, after: String, ban: [String; 3]| {
        let mut row = vec![scenario.to_owned(), on.to_owned(), seed, after];
        row.extend(ban);
        row
    };
    let all = trials.iter().flat_map(|(seed, trial)| {
        let of_one = trial.wrong.iter();
        of_one.map(move |ban| (seed, ban.at as f64 - trial.from as f64, ban))
    });
    let mut rows: Vec<Vec<String>> = all
        .clone()
        .take(FEW)
        .map(|(seed, after, ban)| {
            let what = [
                ban.subject.to_string(),
                ban.test.clone(),
                ban.reason.clone(),
            ];
            row(seed.to_string(), format!("{:.1}", after / 1000.0), what)
        })
        .collect();
    let more = all.count().saturating_sub(FEW);
    if more > 0 {
        let what = [String::new(), String::new(), format!("{more} more")];
        rows.push(row(String::new(), String::new(), what));
    }
    rows
}
