//! The agent under test, its configuration, and everything that it says.

use std::{
    env,
    ffi::OsStr,
    fs::{self, OpenOptions},
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Error, Result, anyhow, bail};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::{EDGE_INTERFACE, EDGE_V4, Lab, process::Process, wait};

/// Names the agent's binary; without it, the one beside this program is taken.
pub const BINARY_ENV: &str = "PORTCULLIS_BIN";

/// Long enough for a debug build to load its program on a machine that is busy with other tests.
const START: Duration = Duration::from_secs(20);
/// Lines of the agent's log that an error shows.
const TAIL: usize = 30;
const EVIDENCE: &str = "the agent's log ends with:";

/// The agent's configuration. The defaults suit a test: nothing is learnt, and whoever makes more than 50 requests in
/// five seconds is banned, so a verdict needs no waiting and is exact to the request.
#[derive(Clone, Debug)]
pub struct Config {
    /// `enforce` or `observe`.
    pub mode: &'static str,
    /// The access log.
    pub log: PathBuf,
    /// `end` or `beginning`.
    pub start: &'static str,
    /// Length of the sliding windows.
    pub window_secs: u32,
    /// Traffic that the baseline covers.
    pub span_secs: u32,
    /// How much is to be seen before anything counts as learnt.
    pub warm_up_secs: u32,
    /// What a client may do until then.
    pub warm_up_ceiling_rps: f64,
    /// Ban lengths.
    pub schedule: Vec<&'static str>,
    /// A source that has sent nothing for so long is released at the end of its ban; 0: each is.
    pub quiet_secs: u32,
    /// Room for bans, of each family.
    pub max_bans: u32,
    /// Never banned, besides the edge host itself.
    pub allow: Vec<String>,
    /// Back ends, in order of preference.
    pub backends: Vec<&'static str>,
    /// How often the kernel is compared with the ledger.
    pub reconcile_secs: u32,
    /// Where Slack messages go.
    pub webhook: Option<String>,
    /// Interfaces to guard.
    pub interfaces: Vec<&'static str>,
    /// The state folder's name.
    pub state: &'static str,
    /// Are there the tests beside the ordered ones, with their defaults? Without them a verdict is exact to the request.
    pub additions: bool,
    /// More lines of the section `source`.
    pub source: String,
    /// More sections.
    pub sections: String,
}

impl Config {
    /// The defaults, for this log.
    #[must_use]
    pub fn new(log: &Path) -> Self {
        Self {
            mode: "enforce",
            log: log.to_owned(),
            start: "end",
            window_secs: 5,
            span_secs: 3600,
            warm_up_secs: 3600,
            warm_up_ceiling_rps: 10.0,
            schedule: vec!["10m", "30m", "permanent"],
            quiet_secs: 0,
            max_bans: 65_536,
            allow: Vec::new(),
            backends: vec!["xdp-native", "xdp-generic", "iptables"],
            reconcile_secs: 1,
            webhook: None,
            interfaces: vec![EDGE_INTERFACE],
            state: STATE,
            additions: false,
            source: String::new(),
            sections: String::new(),
        }
    }

    /// Requests in a window that a client may make during warm-up; the next one is too many.
    #[must_use]
    pub fn allowance(&self) -> u64 {
        // Whole numbers by the definition of both.
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "small and positive"
        )]
        let allowance = (self.warm_up_ceiling_rps * f64::from(self.window_secs)) as u64;
        allowance
    }

    /// As TOML; JSON's strings, numbers and arrays are TOML's too.
    fn toml(&self, lab: &Lab) -> String {
        let allow: Vec<_> = [EDGE_V4.to_string()]
            .into_iter()
            .chain(self.allow.iter().cloned())
            .collect();
        let slack = self.webhook.as_ref().map_or_else(String::new, |_| {
            format!(
                "[slack]\nwebhook_file = {}\n",
                json!(lab.dir().join("webhook"))
            )
        });
        let (additions, members) = if self.additions {
            ("", "")
        } else {
            (ORDERED_ALONE, "prefix_members = 0\n")
        };
        format!(
            "mode = {mode}
[source]
log = {log}
start = {start}
{source}
[detect]
window_secs = {window}
z_score = 3.0
times_mean = 5.0
[detect.baseline]
span_secs = {span}
recompute_secs = 2
hour_min_secs = 3600
warm_up_secs = {warm_up}
warm_up_ceiling_rps = {ceiling:?}
floor_mean_rps = 1.0
floor_stddev_rps = 0.5
{additions}[bans]
{members}schedule = {schedule}
quiet_secs = {quiet}
max_bans = {max_bans}
allow = {allow}
[enforce]
interfaces = {interfaces}
backends = {backends}
pin_dir = {pin_dir}
reconcile_secs = {reconcile}
sample_one_in = 1
{slack}[state]
dir = {state}
[control]
socket = {socket}
{sections}",
            mode = json!(self.mode),
            source = self.source,
            sections = self.sections,
            log = json!(self.log),
            start = json!(self.start),
            window = self.window_secs,
            span = self.span_secs,
            warm_up = self.warm_up_secs,
            ceiling = self.warm_up_ceiling_rps,
            schedule = json!(self.schedule),
            quiet = self.quiet_secs,
            max_bans = self.max_bans,
            allow = json!(allow),
            interfaces = json!(self.interfaces),
            backends = json!(self.backends),
            pin_dir = json!(lab.pin_dir()),
            reconcile = self.reconcile_secs,
            state = json!(lab.dir().join(self.state)),
            socket = json!(socket(lab)),
        )
    }
}

/// Switches the tests off that stand beside the ordered ones.
const ORDERED_ALONE: &str = "growth_per_hour = 0
freeze_secs = 0
[detect.caps]
second = 0
ten_seconds = 0
window = 0
ten_windows = 0
shared_address = 1
[detect.failures]
score = 0
[detect.site]
cusum_limit = 0
newcomer_requests = 0
";

/// Name of the usual state folder.
const STATE: &str = "state";

fn state_dir(lab: &Lab) -> PathBuf {
    lab.dir().join(STATE)
}

fn file(lab: &Lab) -> PathBuf {
    lab.dir().join("portcullis.toml")
}

fn socket(lab: &Lab) -> PathBuf {
    lab.dir().join("control.sock")
}

/// The agent's binary.
///
/// # Errors
/// When there is none.
pub fn binary() -> Result<PathBuf> {
    if let Some(path) = env::var_os(BINARY_ENV) {
        return Ok(path.into());
    }
    // target/debug/demo or target/debug/deps/kernel_…
    let own = env::current_exe().context("cannot find my own program")?;
    own.ancestors()
        .skip(1)
        .take(2)
        .map(|folder| folder.join("portcullis"))
        .find(|path| path.is_file())
        .with_context(|| {
            format!(
                "no agent beside {}; `cargo build --bins` makes it, or set {BINARY_ENV}",
                own.display()
            )
        })
}

/// What a verb has answered.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Exit code; none if a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Answer {
    /// Standard output, if the verb was successful.
    ///
    /// # Errors
    /// What it said otherwise.
    pub fn success(self) -> Result<String> {
        if self.code != Some(0) {
            bail!("exit code {:?}: {}{}", self.code, self.stdout, self.stderr);
        }
        Ok(self.stdout)
    }
}

/// A running agent; killed on drop.
#[derive(Debug)]
pub struct Agent {
    process: Process,
    lab: Lab,
    config: Config,
}

impl Agent {
    /// Starts the agent in the edge namespace and waits until it answers.
    ///
    /// # Errors
    /// When it ends or does not answer; with its log.
    pub fn start(lab: &Lab, config: &Config) -> Result<Self> {
        let mut agent = Self::launch(lab, config)?;
        agent.ready()?;
        Ok(agent)
    }

    /// Starts the agent without waiting for anything.
    ///
    /// # Errors
    /// When there is no binary, or the laboratory's folder is gone.
    pub fn launch(lab: &Lab, config: &Config) -> Result<Self> {
        let file = file(lab);
        fs::write(&file, config.toml(lab))?;
        if let Some(webhook) = &config.webhook {
            fs::write(lab.dir().join("webhook"), format!("{webhook}\n"))?;
        }
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(log_file(lab))?;
        let process = Process::start(
            "portcullis",
            lab.edge(),
            Command::new(binary()?)
                .args([OsStr::new("run"), OsStr::new("--config"), file.as_os_str()])
                .stdin(Stdio::null())
                .stdout(log.try_clone()?)
                .stderr(log),
        )?;
        Ok(Self {
            process,
            lab: lab.clone(),
            config: config.clone(),
        })
    }

    /// Writes another configuration into the file that it was started with; it is not told.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn rewrite(&self, config: &Config) -> Result<()> {
        Ok(fs::write(file(&self.lab), config.toml(&self.lab))?)
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// When it has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.process.signal(signal)
    }

    fn ready(&mut self) -> Result<()> {
        let answers = wait::eventually("the agent to answer", START, || {
            if let Some(status) = self.process.ended()? {
                bail!("the agent has ended with {status}");
            }
            Ok(self.status().ok())
        });
        answers
            .map(|_status| ())
            .map_err(|error| with_evidence(&error, &self.evidence()))
    }

    /// Its configuration.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Runs a verb of the command line against it.
    ///
    /// # Errors
    /// When the binary cannot be run. A verb that fails is an [`Answer`].
    pub fn verb(&self, words: &[&str]) -> Result<Answer> {
        verb(&self.lab, words)
    }

    /// `portcullis status`.
    ///
    /// # Errors
    /// When it fails or prints no JSON.
    pub fn status(&self) -> Result<Value> {
        self.json(&["status"])
    }

    /// `portcullis bans`.
    ///
    /// # Errors
    /// When it fails or prints no array.
    pub fn bans(&self) -> Result<Vec<Value>> {
        match self.json(&["bans"])? {
            Value::Array(bans) => Ok(bans),
            other => bail!("not an array: {other}"),
        }
    }

    fn json(&self, words: &[&str]) -> Result<Value> {
        let text = self
            .verb(&[words, &["--json"]].concat())?
            .success()
            .map_err(|error| with_evidence(&error, &self.evidence()))?;
        serde_json::from_str(&text).with_context(|| format!("not JSON: {text}"))
    }

    /// A figure of the status, by JSON pointer.
    ///
    /// # Errors
    /// When it is not there.
    pub fn figure(&self, pointer: &str) -> Result<u64> {
        figure(&self.status()?, pointer)
    }

    /// All events of its history so far, of this run and of earlier ones. A line that is being written is left out.
    ///
    /// # Errors
    /// When a whole line is no JSON.
    pub fn history(&self) -> Result<Vec<Value>> {
        let path = state_dir(&self.lab).join("history.jsonl");
        let Ok(text) = fs::read_to_string(&path) else {
            return Ok(Vec::new());
        };
        text.split_inclusive('\n')
            .filter_map(|line| line.strip_suffix('\n'))
            .map(|line| serde_json::from_str(line).with_context(|| format!("history: {line}")))
            .collect()
    }

    /// Events of one kind about one subject, oldest first.
    ///
    /// # Errors
    /// As [`Agent::history`].
    pub fn events(&self, action: &str, subject: &str) -> Result<Vec<Value>> {
        let mut events = self.history()?;
        events.retain(|event| event["action"] == action && event["subject"] == subject);
        Ok(events)
    }

    /// Polls as [`wait::eventually`], with the agent's log in the error.
    ///
    /// # Errors
    /// When the time is over, or an error of the poll itself.
    pub fn eventually<T>(
        &self,
        what: &str,
        timeout: Duration,
        poll: impl FnMut() -> Result<Option<T>>,
    ) -> Result<T> {
        wait::eventually(what, timeout, poll)
            .map_err(|error| with_evidence(&error, &self.evidence()))
    }

    /// Waits for the so-manieth event (from 1) of a kind about a subject.
    ///
    /// # Errors
    /// When the time is over.
    pub fn event(
        &self,
        action: &str,
        subject: &str,
        number: usize,
        timeout: Duration,
    ) -> Result<Value> {
        self.eventually(
            &format!("{action} no. {number} of {subject}"),
            timeout,
            || Ok(self.events(action, subject)?.into_iter().nth(number - 1)),
        )
    }

    /// The end of its log, for an error message.
    #[must_use]
    pub fn evidence(&self) -> String {
        let lines = self.log();
        let lines: Vec<_> = lines.lines().collect();
        let tail = lines.get(lines.len().saturating_sub(TAIL)..).unwrap_or(&[]);
        format!("{EVIDENCE}\n    {}\n", tail.join("\n    "))
    }

    /// Its log.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read(log_file(&self.lab))
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// Process number.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Sends SIGTERM and waits for the end.
    ///
    /// # Errors
    /// When it goes on.
    pub fn terminate(&mut self, timeout: Duration) -> Result<ExitStatus> {
        self.process.signal(Signal::SIGTERM)?;
        self.wait(timeout)
    }

    /// Waits until it ends by itself.
    ///
    /// # Errors
    /// When it goes on.
    pub fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        self.process
            .wait(timeout)
            .map_err(|error| with_evidence(&error, &self.evidence()))
    }

    /// `kill -9`.
    ///
    /// # Errors
    /// When it has ended before.
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill()
    }
}

/// A whole number in a status, by JSON pointer.
///
/// # Errors
/// When it is not there.
pub fn figure(status: &Value, pointer: &str) -> Result<u64> {
    let value = status.pointer(pointer).and_then(Value::as_u64);
    value.with_context(|| format!("no whole number {pointer} in {status}"))
}

/// The error, with the evidence below it; once.
#[must_use]
pub fn with_evidence(error: &Error, evidence: &str) -> Error {
    let words = format!("{error:#}");
    if words.contains(EVIDENCE) {
        anyhow!(words)
    } else {
        anyhow!("{words}\n{evidence}")
    }
}

/// Runs a verb of the command line against the laboratory's control socket, whether or not an agent listens.
///
/// # Errors
/// When the binary cannot be run.
pub fn verb(lab: &Lab, words: &[&str]) -> Result<Answer> {
    run(
        lab,
        Command::new(binary()?)
            .args(words)
            .arg("--socket")
            .arg(socket(lab)),
    )
}

/// Runs a verb that needs no agent.
///
/// # Errors
/// When the binary cannot be run.
pub fn plain(lab: &Lab, words: &[&str]) -> Result<Answer> {
    run(lab, Command::new(binary()?).args(words))
}

/// `portcullis detach`: takes everything out of the kernel.
///
/// # Errors
/// When the binary cannot be run.
pub fn detach(lab: &Lab) -> Result<Answer> {
    run(
        lab,
        Command::new(binary()?)
            .args(["detach", "--config"])
            .arg(lab.dir().join("portcullis.toml")),
    )
}

fn run(lab: &Lab, command: &mut Command) -> Result<Answer> {
    let child = lab.edge().spawn(
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped()),
    )?;
    let output = child.wait_with_output()?;
    Ok(Answer {
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

fn log_file(lab: &Lab) -> PathBuf {
    lab.dir().join("agent.log")
}
