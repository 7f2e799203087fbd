//! What the demo prints: elapsed time, steps, evidence, and a summary.

use std::{
    env,
    io::{IsTerminal as _, stdout},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::Result;
use portcullis_tests::lab::{clock, wait};

/// The steps, in order.
const STEPS: [&str; 10] = [
    "Set-up",
    "Baseline learnt",
    "Attack",
    "Flagged",
    "Banned and dropped",
    "Slack",
    "Unbanned",
    "Second offence",
    "Latency",
    "Shutdown",
];

/// 128 + SIGINT, as a shell has it.
const INTERRUPTED: u8 = 130;

const BOLD: &str = "\x1b[1m";
const DIM: &str = "\x1b[2m";
const GREEN: &str = "\x1b[32m";
const RED: &str = "\x1b[31m";

/// The timeline on standard output.
#[derive(Debug)]
pub struct Timeline {
    start: Instant,
    colour: bool,
    /// Steps that happened: when they were finished, and the evidence in short.
    done: Vec<(Duration, String)>,
}

impl Timeline {
    /// Prints what is going to be seen.
    pub fn start() -> Self {
        let colour =
            stdout().is_terminal() && env::var_os("NO_COLOR").is_none_or(|no| no.is_empty());
        let timeline = Self {
            start: clock::now(),
            colour,
            done: Vec::new(),
        };
        println!("{}", timeline.paint(BOLD, "Portcullis: an attack on a real Nginx, from the first request until the gate opens again"));
        println!(
            "In two network namespaces of its own; nothing of this host's network is touched."
        );
        timeline
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour {
            format!("{code}{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }

    fn time(&self, at: Duration) -> String {
        self.paint(DIM, &format!("{:6.1} s", at.as_secs_f64()))
    }

    /// Begins the next step.
    pub fn step(&self, what: &str) {
        let number = self.done.len();
        let name = STEPS.get(number).copied().unwrap_or_default();
        let title = self.paint(BOLD, &format!("{}/{} {name}", number + 1, STEPS.len()));
        println!("\n{}  {title}: {what}", self.time(clock::since(self.start)));
    }

    /// Says what has been seen.
    pub fn note(&self, text: &str) {
        println!("{}    {text}", self.time(clock::since(self.start)));
    }

    /// Shows a program's output.
    pub fn quote(&self, command: &str, output: &str) {
        self.note(&format!("$ {command}"));
        for line in output.trim_end().lines() {
            println!("              {}", self.paint(DIM, line));
        }
    }

    /// Ends the step; `evidence` goes into the summary.
    pub fn done(&mut self, evidence: &str) {
        let at = clock::since(self.start);
        println!("{}    {}", self.time(at), self.paint(GREEN, "ok"));
        self.done.push((at, evidence.to_owned()));
    }

    /// Prints the summary and says what the exit code is.
    pub fn end(&self, result: Result<()>) -> ExitCode {
        println!("\n{}", self.paint(BOLD, "Summary"));
        for (number, name) in STEPS.iter().enumerate() {
            let (verdict, evidence) = match self.done.get(number) {
                Some((_, evidence)) => (self.paint(GREEN, "ok     "), evidence.as_str()),
                None if number == self.done.len() && result.is_err() => {
                    (self.paint(RED, "FAILED "), "see below")
                }
                None => ("-      ".to_owned(), "not reached"),
            };
            println!("  {verdict} {:>2}  {name:<20} {evidence}", number + 1);
        }
        let total = clock::since(self.start).as_secs_f64();
        match result {
            Ok(()) => {
                println!("All {} steps happened, in {total:.0} s.", STEPS.len());
                ExitCode::SUCCESS
            }
            Err(_) if wait::check_interrupt().is_err() => {
                println!("Interrupted after {total:.0} s; everything was taken down.");
                ExitCode::from(INTERRUPTED)
            }
            Err(error) => {
                let name = STEPS.get(self.done.len()).copied().unwrap_or("Clean-up");
                let number = self.done.len() + 1;
                println!(
                    "{}",
                    self.paint(
                        RED,
                        &format!("Failed after {total:.0} s, in step {number} ({name}).")
                    )
                );
                eprintln!("error: {name}: {error:#}");
                ExitCode::FAILURE
            }
        }
    }
}
