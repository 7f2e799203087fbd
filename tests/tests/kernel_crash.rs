//! `kill -9` before every single write of a ban and of its end, to the ledger and to the kernel's maps: a real agent, nothing built
//! into it, is traced and killed at each of them in turn. The order of the writes is the agent's own; the crash points are counted,
//! not drawn, so there is no seed.

use std::{
    collections::BTreeSet,
    io::{BufRead as _, BufReader},
    process::{Child, Command, Stdio},
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use portcullis::enforce::xdp;
use portcullis_tests::lab::{
    Lab,
    agent::{self, Agent, Config},
    nginx::Nginx,
};

const SOON: Duration = Duration::from_secs(20);
/// More than any change makes.
const MOST: u32 = 120;

/// Kills an agent before its so-manieth write.
struct Killer {
    child: Child,
    said: Option<JoinHandle<Vec<String>>>,
}

impl Killer {
    fn start(agent: &Agent, at: u32) -> Result<Self> {
        let program = agent::binary()?.with_file_name("killer");
        let mut child = Command::new(&program)
            .args([agent.id().to_string(), at.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}: `cargo build --bins`", program.display()))?;
        let mut out = BufReader::new(child.stdout.take().context("no output")?);
        let mut line = String::new();
        out.read_line(&mut line)?;
        ensure!(line.trim() == "ready", "the killer says {line:?}");
        let said = std::thread::spawn(move || out.lines().map_while(Result::ok).collect());
        Ok(Self {
            child,
            said: Some(said),
        })
    }

    /// Lets the agent go, if it is still there; whether it was killed, and before which write.
    fn end(mut self) -> Result<Option<String>> {
        drop(self.child.stdin.take());
        let status = self.child.wait()?;
        ensure!(status.success(), "the killer has failed");
        let said = self.said.take().context("ended twice")?.join();
        let said = said.unwrap_or_default();
        let is_killed = said.last().is_some_and(|line| line == "killed");
        Ok(is_killed.then(|| said[said.len() - 2].clone()))
    }
}

impl Drop for Killer {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ended = self.child.wait();
    }
}

fn in_ledger(agent: &Agent) -> Result<BTreeSet<String>> {
    let bans = agent.bans()?;
    let subjects = bans.iter().filter_map(|ban| ban["subject"].as_str());
    Ok(subjects.map(str::to_owned).collect())
}

fn in_kernel(lab: &Lab) -> Result<BTreeSet<String>> {
    let left = xdp::left(&lab.pin_dir())?;
    Ok(left
        .bans
        .iter()
        .map(|ban| ban.subject.to_string())
        .collect())
}

/// All that was decided is on disk: from here on it is a promise.
fn is_durable(agent: &Agent) -> Result<()> {
    agent.eventually("the ledger to be on disk", SOON, || {
        let status = agent.status()?;
        Ok((status["store_pending"] == 0).then_some(()))
    })
}

/// One agent after another, each killed before a write of its own.
struct Run {
    agent: Agent,
    lab: Lab,
    config: Config,
    /// What the ledger had promised.
    promised: BTreeSet<String>,
    points: Vec<String>,
}

impl Run {
    /// Makes a change while a killer waits for its so-manieth write; says whether the killer came to it.
    fn change(&mut self, verb: &[&str], subject: &str, at: u32) -> Result<bool> {
        let mut after = self.promised.clone();
        if verb[0] == "ban" {
            after.insert(subject.to_owned());
        } else {
            after.remove(subject);
        }
        let killer = Killer::start(&self.agent, at)?;
        // Whether it is answered does not matter: only what is on disk is promised.
        let answer = self.agent.verb(verb)?;
        let mut is_killed = answer.code != Some(0);
        if !is_killed {
            // The answer does not wait for the disk.
            let durable = loop {
                match self.agent.status() {
                    Ok(status) if status["store_pending"] == 0 => break true,
                    Ok(_) => {}
                    Err(_) => break false,
                }
            };
            is_killed = !durable;
        }
        if !is_killed {
            self.promised.clone_from(&after);
        }
        let point = killer.end()?;
        let Some(point) = point else {
            ensure!(!is_killed, "nobody has killed it: {answer:?}");
            ensure!(in_kernel(&self.lab)? == after);
            return Ok(false);
        };
        self.points.push(format!("{} at {point}", verb[0]));
        self.agent.wait(SOON)?;
        let kernel = in_kernel(&self.lab)?;
        self.agent = Agent::start(&self.lab, &self.config)?;
        let ledger = in_ledger(&self.agent)?;
        let why =
            format!("killed before {point} of {verb:?}: {ledger:?}, the kernel had {kernel:?}");
        ensure!(ledger == self.promised || ledger == after, "{why}");
        ensure!(in_kernel(&self.lab)? == ledger, "{why}");
        let status = self.agent.status()?;
        ensure!(status["store_error"].is_null(), "{why}: {status}");
        is_durable(&self.agent)?;
        self.promised = ledger;
        Ok(true)
    }
}

#[test]
fn an_agent_that_is_killed_before_any_write_keeps_what_was_promised() -> Result<()> {
    let lab = Lab::new()?;
    let nginx = Nginx::start(&lab)?;
    let config = Config {
        backends: vec!["xdp-native", "xdp-generic"],
        ..Config::new(nginx.log())
    };
    let agent = Agent::start(&lab, &config)?;
    let mut run = Run {
        agent,
        lab,
        config,
        promised: BTreeSet::new(),
        points: Vec::new(),
    };
    // One that stands all the time.
    run.agent.verb(&["ban", "198.19.9.9"])?.success()?;
    is_durable(&run.agent)?;
    run.promised.insert("198.19.9.9".to_owned());
    for (kind, subjects) in [("v4", "198.19.1"), ("prefix", "198.19")] {
        let subject = |n: u32| match kind {
            "v4" => format!("{subjects}.{n}"),
            _ => format!("{subjects}.{n}.0/24"),
        };
        for verb in ["ban", "unban"] {
            let (mut at, mut is_killed) = (1, true);
            while is_killed {
                ensure!(at < MOST, "a change with more than {MOST} writes");
                let subject = subject(at + 10);
                if verb == "unban" && !run.promised.contains(&subject) {
                    run.agent.verb(&["ban", &subject])?.success()?;
                    is_durable(&run.agent)?;
                    run.promised.insert(subject.clone());
                }
                is_killed = run.change(&[verb, &subject], &subject, at)?;
                at += 1;
            }
        }
    }
    let points: BTreeSet<&String> = run.points.iter().collect();
    eprintln!("killed {} times, before: {points:#?}", run.points.len());
    for what in [
        "pwrite of the ledger",
        "fdatasync of the ledger",
        "bpf command",
    ] {
        let is_hit = |verb| move |point: &&String| point.starts_with(verb) && point.contains(what);
        for verb in ["ban ", "unban "] {
            ensure!(
                run.points.iter().any(|point| is_hit(verb)(&point)),
                "{verb}{what}"
            );
        }
    }
    Ok(())
}
