//! The peer that reads the log: fail2ban-rs in its dry run, a process of its own that begins and ends in the time taken.

use std::{
    collections::HashSet,
    env,
    fmt::Write as _,
    fs::File,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use portcullis_tests::lab::clock;
use serde_json::json;

/// Names its program; `cargo xtask bench` sets it.
const PROGRAM_ENV: &str = "PORTCULLIS_BENCH_FAIL2BAN_RS";
/// More lines than any client has here: nobody is banned, as with us, because a banned client's lines cost it less too.
/// It takes room for so many times of each client, so a round number beyond all reason would be to its disadvantage.
const MAX_RETRY: u32 = 100;

/// What it looks for in a line. It takes out the address and the time; a status it can only ask for.
#[derive(Clone, Copy, Debug)]
pub enum Filter {
    /// Every line's client: what the engine is given.
    EveryLine,
    /// The clients of 404s, as fail2ban is commonly used.
    NotFound,
}

impl Filter {
    pub const ALL: [Self; 2] = [Self::EveryLine, Self::NotFound];

    pub fn name(self) -> &'static str {
        match self {
            Self::EveryLine => "fail2ban-rs dry run, every line's client",
            Self::NotFound => "fail2ban-rs dry run, the clients of 404s, a line in 50",
        }
    }

    pub fn takes(self, status: &str) -> bool {
        match self {
            Self::EveryLine => true,
            Self::NotFound => status == "404",
        }
    }

    /// The fastest that was found of those that say the same. Beginning with the address, the second is looked for from
    /// its rare end, more than twice as fast as from the `"source_ip":"` that each line has.
    fn expression(self) -> &'static str {
        match self {
            Self::EveryLine => r#""source_ip":"<HOST>""#,
            Self::NotFound => r#"<HOST>","method":"[^"]*","path":"[^"]*","status":"404""#,
        }
    }
}

/// A dry run that can be repeated.
#[derive(Debug)]
pub struct DryRun {
    program: PathBuf,
    config: PathBuf,
    log: PathBuf,
    report: PathBuf,
    /// What the report has to say: lines, those that the filter takes, and their clients.
    expected: String,
}

impl DryRun {
    /// Prepares it for a log of so many lines, of which the filter is to take those of `clients`.
    ///
    /// # Errors
    /// When it is not installed or its configuration cannot be written.
    pub fn new(
        filter: Filter,
        folder: &Path,
        log: &Path,
        lines: usize,
        clients: &[&str],
    ) -> Result<Self> {
        let program = env::var_os(PROGRAM_ENV)
            .map(PathBuf::from)
            .filter(|program| program.is_file())
            .context("it is not installed; `cargo xtask bench` does that")?;
        let config = folder.join(format!("{filter:?}.toml"));
        std::fs::write(
            &config,
            format!(
                "[global]\n[jail.bench]\nlog_path = {}\ndate_format = \"epoch\"\nfilter = ['{}']\n\
                 max_retry = {MAX_RETRY}\nignoreself = false\n",
                json!(log),
                filter.expression(),
            ),
        )?;
        let distinct: HashSet<_> = clients.iter().collect();
        Ok(Self {
            program,
            config,
            log: log.to_owned(),
            report: folder.join(format!("{filter:?}.txt")),
            expected: format!(
                "Lines: {lines} Matches: {} Unique IPs: {}",
                clients.len(),
                distinct.len()
            ),
        })
    }

    /// How long one took, from its start to its end.
    ///
    /// # Errors
    /// When it fails, or its report is not of what the log has: then its time says nothing.
    pub fn run(&self) -> Result<Duration> {
        // Into a file: it writes line by line, and whoever read them from a pipe would share its core.
        let report = File::create(&self.report)?;
        let start = clock::now();
        let status = Command::new(&self.program)
            .arg("--config")
            .arg(&self.config)
            .arg("dry-run")
            .arg(&self.log)
            .stdout(report)
            .status()
            .with_context(|| format!("cannot start {}", self.program.display()))?;
        let time = clock::since(start);
        ensure!(status.success(), "it has failed ({status})");
        let found = summary(&std::fs::read_to_string(&self.report)?);
        ensure!(
            found == self.expected,
            "it found \"{found}\", and there is \"{}\"",
            self.expected
        );
        Ok(time)
    }
}

/// The figures of a report, without its list of addresses. It counts those it would ban only if there are any.
fn summary(report: &str) -> String {
    let mut summary = String::new();
    for line in report.lines() {
        if let Some((name @ ("Lines" | "Matches" | "Unique IPs" | "Would ban"), figure)) =
            line.trim().split_once(':')
        {
            let space = if summary.is_empty() { "" } else { " " };
            let _infallible = write!(summary, "{space}{name}: {}", figure.trim());
        }
    }
    summary
}
