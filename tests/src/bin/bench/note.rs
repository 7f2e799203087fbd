//! What is printed: tables in Markdown, and which of the wanted ratios were met.

use std::{fmt::Write as _, process::ExitCode};

use anyhow::Error;

/// The note as it grows.
#[derive(Debug, Default)]
pub struct Note {
    ratios: String,
    problems: Vec<String>,
}

/// A bound that the project has set itself.
#[derive(Clone, Copy, Debug)]
pub enum Wanted {
    AtMost(f64),
    AtLeast(f64),
}

impl Note {
    /// Prints a table; the first row is its head.
    pub fn table(title: &str, method: &str, rows: &[Vec<String>]) {
        println!("\n### {title}\n\n{method}\n");
        for (index, row) in rows.iter().enumerate() {
            println!("| {} |", row.join(" | "));
            if index == 0 {
                println!("|---|{}", "--:|".repeat(row.len().saturating_sub(1)));
            }
        }
    }

    /// Takes down a figure that something is wanted of.
    pub fn ratio(&mut self, what: &str, found: f64, wanted: Wanted) {
        let (is_met, sign, bound) = match wanted {
            Wanted::AtMost(bound) => (found <= bound, '≤', bound),
            Wanted::AtLeast(bound) => (found >= bound, '≥', bound),
        };
        let verdict = if is_met { "met" } else { "**missed**" };
        let _infallible = writeln!(
            self.ratios,
            "| {what} | {found:.2} | {sign} {bound} | {verdict} |"
        );
    }

    /// Takes down what could not be measured.
    pub fn problem(&mut self, what: impl Into<String>, error: &Error) {
        let problem = format!("{}: {error:#}", what.into());
        eprintln!("not measured: {problem}");
        self.problems.push(problem);
    }

    /// Prints the ratios and what is missing.
    pub fn end(&self) -> ExitCode {
        if !self.ratios.is_empty() {
            println!(
                "\n### Wanted\n\n| figure | found | wanted | |\n|---|--:|--:|---|\n{}",
                self.ratios
            );
        }
        for problem in &self.problems {
            println!("Not measured: {problem}");
        }
        if self.problems.is_empty() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }
}

/// The middle one, and the least.
pub fn median(samples: &[f64]) -> (f64, f64) {
    let mut sorted = samples.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let at = |index: usize| sorted.get(index).copied().unwrap_or(f64::NAN);
    (at(sorted.len() / 2), at(0))
}
