//! How fast lines of the access log are read: parsed, and all the way from a file into the engine.

use std::{
    fs::File, hint::black_box, io::Write as _, path::Path, process::Command, sync::Arc, thread,
    time::Duration,
};

use anyhow::{Context as _, Error, Result, anyhow, ensure};
use nix::{
    sched::{CpuSet, sched_getcpu, sched_setaffinity},
    unistd::Pid,
};
use portcullis::{
    config::Config,
    source::{self, CHUNK, Limits, Piece, Start, tail::Tail},
};
use portcullis_engine::{Engine, Line, Saved, Timestamp, parse::Format};
use portcullis_tests::lab::{clock, wait::eventually};
use serde::Deserialize;
use serde_json::json;

use crate::{
    fail2ban::{DryRun, Filter},
    note::{Note, Wanted, median},
};

const LINES: u32 = 1_000_000;
const CLIENTS: u32 = 20_000;
/// So that nobody is banned: a banned client's lines cost less.
const LINES_A_SECOND: u32 = 1000;
const START: u64 = 1_700_000_000;

/// What is wanted of a line, and the least that can be done for it.
#[derive(Deserialize)]
struct Bare<'a> {
    timestamp: &'a str,
    source_ip: &'a str,
    #[serde(rename = "method")]
    _method: &'a str,
    #[serde(rename = "path")]
    _path: &'a str,
    status: &'a str,
    #[serde(rename = "response_size")]
    _response_size: &'a str,
}

/// A peer, and its rates as long as it does what it is to do.
struct Peer(Filter, Result<(DryRun, Vec<f64>)>);

impl Peer {
    fn new(filter: Filter, folder: &Path, log: &Path, lines: &[&[u8]]) -> Self {
        let prepare = || {
            let mut clients = Vec::new();
            for line in lines {
                let line: Bare<'_> = serde_json::from_slice(line)?;
                if filter.takes(line.status) {
                    clients.push(line.source_ip);
                }
            }
            let dry_run = DryRun::new(filter, folder, log, lines.len(), &clients)?;
            Ok((dry_run, Vec::new()))
        };
        Self(filter, prepare())
    }

    fn run(&mut self) {
        if let Ok((dry_run, rates)) = &mut self.1 {
            match dry_run.run() {
                Ok(time) => rates.push(millions_a_second(time)),
                Err(error) => self.1 = Err(error),
            }
        }
    }

    fn rate(&self) -> Result<f64, &Error> {
        self.1.as_ref().map(|(_, rates)| median(rates).0)
    }

    fn row(&self) -> Vec<String> {
        let rate = match self.rate() {
            Ok(rate) => format!("{rate:.2}"),
            Err(error) => format!("not measured: {error:#}"),
        };
        vec![self.0.name().to_owned(), rate]
    }
}

/// Measures, all of it on one core: threads and processes that are started here stay there too.
///
/// # Errors
/// When the file cannot be written or read.
pub fn measure(quick: bool, note: &mut Note) -> Result<()> {
    // A thread, so that nothing that is measured later is confined.
    thread::scope(|scope| {
        scope
            .spawn(|| {
                let mut core = CpuSet::new();
                core.set(sched_getcpu()?)?;
                sched_setaffinity(Pid::from_raw(0), &core)?;
                measure_here(quick, note)
            })
            .join()
            .map_err(|_| anyhow!("the bench has panicked"))?
    })
}

fn measure_here(quick: bool, note: &mut Note) -> Result<()> {
    eprintln!("lines of the log …");
    let rounds = if quick { 3 } else { 11 };
    let text: Arc<[u8]> = log().into();
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("access.json");
    File::create(&path)?.write_all(&text)?;
    let lines: Vec<&[u8]> = text
        .split_inclusive(|byte| *byte == b'\n')
        .map(<[u8]>::trim_ascii_end)
        .collect();

    let names = [
        "serde_json, borrowed fields",
        "parse",
        "read, parse and engine, from a file",
        "the same while it is being written, by the source's own thread",
    ];
    let format = Format::default();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let mut peers = Filter::ALL.map(|filter| Peer::new(filter, folder.path(), &path, &lines));
    let mut rates = names.map(|_| Vec::new());
    for _ in 0..rounds {
        let [bare, parsed, whole, live] = &mut rates;
        let start = clock::now();
        for line in &lines {
            let line: Bare<'_> = serde_json::from_slice(line)?;
            black_box((line.timestamp, line.source_ip, line.status));
        }
        bare.push(millions_a_second(clock::since(start)));
        let start = clock::now();
        for line in &lines {
            black_box(format.read(line)?);
        }
        parsed.push(millions_a_second(clock::since(start)));
        let tail = Tail::open(&path, Start::Beginning, LIMITS, None, Arc::default())?;
        let start = clock::now();
        read(tail)?;
        whole.push(millions_a_second(clock::since(start)));
        let time = follow(&runtime, &folder.path().join("live.json"), &text)?;
        live.push(millions_a_second(time));
        peers.iter_mut().for_each(Peer::run);
    }
    let mut rows = vec![vec![
        "on one core".to_owned(),
        "million lines a second".to_owned(),
    ]];
    for (name, rates) in names.iter().zip(&rates) {
        rows.push(vec![(*name).to_owned(), format!("{:.2}", median(rates).0)]);
    }
    rows.extend(peers.iter().map(Peer::row));
    Note::table(
        "Lines of the log",
        &format!(
            "{LINES} lines of {CLIENTS} clients, {} bytes each, as Nginx writes them.\nMedian of {rounds} interleaved rounds, on the clock. \
             fail2ban-rs is a process: its start counts, and its time only if it found what there is.",
            text.len() / LINES as usize,
        ),
        &rows,
    );
    let memory = [
        memory(folder.path(), &text, 1)?,
        memory(folder.path(), &text, 3)?,
    ];
    ratios(note, rates.map(|rates| median(&rates).0), &peers, memory);
    Ok(())
}

fn ratios(
    note: &mut Note,
    [bare, parsed, whole, live]: [f64; 4],
    peers: &[Peer],
    memory: [u64; 2],
) {
    note.ratio(
        "parse: of bare serde_json's lines a second",
        parsed / bare,
        Wanted::AtLeast(1.5),
    );
    note.ratio(
        "from a file into the engine, million lines a second",
        whole,
        Wanted::AtLeast(3.5),
    );
    // Bare serde_json made 4.5 million where the figures come from.
    note.ratio(
        "the same, of bare serde_json's lines a second",
        whole / bare,
        Wanted::AtLeast(3.5 / 4.5),
    );
    for peer in peers {
        match peer.rate() {
            Ok(rate) => note.ratio(
                &format!("the same, of {}", peer.0.name()),
                whole / rate,
                Wanted::AtLeast(1.0),
            ),
            Err(error) => note.problem(peer.0.name(), error),
        }
    }
    let [once, thrice] = memory.map(|kib| kib as f64 / 1024.0);
    note.ratio("memory of the agent, MiB", once, Wanted::AtMost(40.0));
    note.ratio(
        "memory of the agent for three times as many lines, of that",
        thrice / once,
        Wanted::AtMost(1.1),
    );
    note.ratio(
        "while it is being written, million lines a second",
        live,
        Wanted::AtLeast(2.5),
    );
    note.ratio(
        "the same, of bare serde_json's lines a second",
        live / bare,
        Wanted::AtLeast(2.5 / 4.5),
    );
}

/// The most memory that an agent needs that reads these lines, so many times over.
fn memory(folder: &Path, text: &[u8], times: usize) -> Result<u64> {
    let log = folder.join(format!("{times}.json"));
    let mut file = File::create(&log)?;
    (0..times).try_for_each(|_| file.write_all(text))?;
    let state = folder.join(format!("state-{times}"));
    let socket = state.join("control.sock");
    let config = folder.join("portcullis.toml");
    std::fs::write(
        &config,
        format!(
            "[source]\nlog = {}\nstart = \"beginning\"\ncatch_up_secs = 3600\n[enforce]\nbackends = [\"dry-run\"]\n\
             [state]\ndir = {}\n[control]\nsocket = {}\n",
            json!(log),
            json!(state),
            json!(socket),
        ),
    )?;
    let binary = std::env::current_exe()?.with_file_name("portcullis");
    let mut agent = Command::new(&binary)
        .arg("run")
        .arg("--config")
        .arg(&config)
        .env("PORTCULLIS_LOG", "error")
        .spawn()
        .with_context(|| format!("cannot start {}", binary.display()))?;
    let read = eventually(
        "the agent to have read it all",
        Duration::from_mins(5),
        || {
            ensure!(agent.try_wait()?.is_none(), "the agent has ended");
            let status = Command::new(&binary)
                .args(["status", "--json", "--socket"])
                .arg(&socket)
                .output()?;
            let status: serde_json::Value =
                serde_json::from_slice(&status.stdout).unwrap_or_default();
            let lines = status
                .pointer("/source/lines")
                .and_then(serde_json::Value::as_u64);
            Ok((lines == Some(u64::from(LINES) * times as u64)).then_some(()))
        },
    );
    let most = std::fs::read_to_string(format!("/proc/{}/status", agent.id()));
    agent.kill()?;
    agent.wait()?;
    read?;
    let kib = most?
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix("kB"))
        .context("the kernel does not say")?
        .trim()
        .parse::<u64>()?;
    Ok(kib)
}

fn millions_a_second(time: Duration) -> f64 {
    f64::from(LINES) / 1e6 / time.as_secs_f64()
}

const LIMITS: Limits = Limits {
    max_line: 262_144,
    rewind: Duration::from_secs(125),
};

/// An engine, and how many lines it was given.
struct Counted(Engine, u32);

impl Counted {
    fn new() -> Self {
        let engine = Engine::new(Config::default().engine, Saved::default(), at(0));
        Self(engine, 0)
    }

    fn take(&mut self, piece: &Piece) -> Result<()> {
        let mut group = Vec::with_capacity(16);
        let mut lines = piece.lines();
        loop {
            group.clear();
            let next = lines.by_ref().take(16);
            group.extend(next.map(|(offset, text)| Line { text, offset }));
            if group.is_empty() {
                break;
            }
            let mut malformed = None;
            self.0
                .lines(&group, at(self.1), |_, problem| malformed = Some(problem));
            if let Some(problem) = malformed {
                return Err(problem.into());
            }
            self.1 += u32::try_from(group.len())?;
        }
        while let Some(command) = self.0.next_command() {
            black_box(command);
        }
        Ok(())
    }

    fn check(&self) -> Result<()> {
        ensure!(
            self.1 == LINES && self.0.snapshot().bans == 0,
            "{} lines",
            self.1
        );
        Ok(())
    }
}

fn at(line: u32) -> Timestamp {
    Timestamp::from_secs(START + u64::from(line / LINES_A_SECOND))
}

fn read(mut tail: Tail) -> Result<()> {
    let mut counted = Counted::new();
    while let Some(piece) = tail.read(CHUNK, Duration::ZERO, &|lines| lines.len())? {
        black_box(tail.progress());
        counted.take(&piece)?;
    }
    counted.check()
}

/// A writer, the source's thread, its queue and the engine share one core: the writer's part is taken off.
fn follow(runtime: &tokio::runtime::Runtime, path: &Path, text: &Arc<[u8]>) -> Result<Duration> {
    let mut file = File::create(path)?;
    let start = clock::now();
    file.write_all(text)?;
    let writing = clock::since(start);
    file.set_len(0)?;
    drop(file);
    runtime.block_on(async {
        let mut settings = Config::default().source;
        settings.logs = vec![path.to_owned()];
        // Every line is to be read.
        settings.catch_up = Duration::from_secs(3600);
        let (sender, mut batches) = tokio::sync::mpsc::channel(source::QUEUE);
        let source = source::start(settings, None, sender).await?;
        let mut counted = Counted::new();
        let start = clock::now();
        let (path, text) = (path.to_owned(), Arc::clone(text));
        let writer = thread::spawn(move || {
            let mut file = File::options().append(true).open(path)?;
            text.chunks(64 * 1024)
                .try_for_each(|part| file.write_all(part))
        });
        while counted.1 < LINES
            && let Some(batch) = batches.recv().await
        {
            counted.take(&batch.piece)?;
        }
        let time = clock::since(start);
        writer
            .join()
            .map_err(|_| anyhow!("the writer has panicked"))??;
        drop(batches);
        for thread in source.threads {
            thread
                .join()
                .map_err(|_| anyhow!("the source has panicked"))?;
        }
        counted.check()?;
        Ok(time.saturating_sub(writing))
    })
}

fn log() -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(1);
    let mut text = Vec::new();
    for line in 0..LINES {
        let client = random.u32(..CLIENTS);
        let [_, a, b, c] = client.to_be_bytes();
        let status = if random.u8(..50) == 0 { 404 } else { 200 };
        let _infallible = writeln!(
            text,
            r#"{{"timestamp":"{}.{:03}","source_ip":"198.{}.{b}.{c}","method":"GET","path":"/catalogue/item/{:06}","status":"{status}","response_size":"{}"}}"#,
            START + u64::from(line / LINES_A_SECOND),
            line % LINES_A_SECOND,
            18 + a,
            random.u32(..1_000_000),
            random.u32(200..60_000),
        );
    }
    text
}
