//! What a crowd costs: time a line and memory, with a thousand and with a million clients watched, and with ten million that come
//! and go.

use std::{
    hint::black_box,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use fastrand::Rng;
use portcullis::config::Config;
use portcullis_engine::{
    Engine, Saved, Settings, Timestamp,
    parse::{Record, Target},
};

use portcullis_tests::lab::clock;

use super::note::{Note, Wanted, median};

const START: u64 = 1_700_000_000;
const THOUSAND: u32 = 1_000;
const MILLION: u32 = 1_000_000;
/// Seconds in which each of a million clients comes once: as seldom as they can and all be in the window.
const EVERY: u32 = 50;
/// Each of a thousand comes as often as it can and not be flagged: what passes with time costs a line little there, too.
const EVERY_OF_FEW: u32 = 2;
/// Lines of which the time is taken.
const TIMED: u32 = 2_000_000;

/// Measures and notes it all.
pub fn measure(quick: bool, note: &mut Note) -> Result<()> {
    let rounds = if quick { 3 } else { 7 };
    let (mut few, mut many) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        few.push(nanoseconds(THOUSAND, EVERY_OF_FEW)?);
        many.push(nanoseconds(MILLION, EVERY)?);
    }
    let ((few, _), (many, _)) = (median(&few), median(&many));
    let row = |what: &str, figure: String| vec![what.to_owned(), figure];
    let kinds = [
        ("a million clients", "crowd-v4", 200.0),
        (
            "ten million IPv4 addresses, the default bound",
            "churn-v4",
            200.0,
        ),
        (
            "ten million IPv6 /64s, the default bound",
            "churn-v6",
            200.0,
        ),
    ];
    let mut rows = vec![
        row("", "measured".to_owned()),
        row("ns a line, a thousand clients", format!("{few:.0}")),
        row("ns a line, a million clients", format!("{many:.0}")),
    ];
    for (what, kind, bound) in kinds {
        let grown = in_a_process_of_its_own(kind)?;
        rows.push(row(&format!("MiB, {what}"), format!("{grown:.0}")));
        note.ratio(
            &format!("memory, MiB: {what}"),
            grown,
            Wanted::AtMost(bound),
        );
    }
    Note::table(
        "A crowd",
        &format!(
            "Records into the engine, clients in random order (a seed each round), a thousand each once in {EVERY_OF_FEW} s, a million each once in {EVERY} s; medians of {rounds} \
             interleaved rounds of {TIMED} lines. Memory is what a process of its own has needed at most."
        ),
        &rows,
    );
    note.ratio(
        "a line with a million clients, of one with a thousand",
        many / few,
        Wanted::AtMost(2.0),
    );
    Ok(())
}

fn settings(max_clients: u32) -> Settings {
    let mut settings = Config::default().engine;
    settings.max_clients = max_clients as usize;
    settings
}

/// A crowd in which each client asks for a page now and then.
struct Crowd {
    engine: Engine,
    clients: u32,
    every: u32,
    rng: Rng,
    order: Vec<u32>,
    second: u64,
    of_second: u32,
    pages: Vec<Target>,
}

impl Crowd {
    fn new(clients: u32, every: u32) -> Self {
        let pages = (0..500).map(|page| Target::of(format!("/page/{page}").as_bytes(), 0));
        Self {
            engine: Engine::new(
                settings(MILLION),
                Saved::default(),
                Timestamp::from_secs(START),
            ),
            clients,
            every,
            rng: Rng::with_seed(clients.into()),
            order: Vec::new(),
            second: START,
            of_second: 0,
            pages: pages.collect(),
        }
    }

    /// So many requests, at their times; how long the engine took, in nanoseconds.
    fn play(&mut self, lines: u32) -> f64 {
        let a_second = (self.clients / self.every).max(1);
        let mut records = Vec::with_capacity(16_384);
        let (mut left, mut took) = (lines, 0.0);
        while left > 0 {
            records.clear();
            while records.len() < 16_384 && left > 0 {
                if self.order.is_empty() {
                    self.order = (0..self.clients).collect();
                    self.rng.shuffle(&mut self.order);
                }
                let Some(client) = self.order.pop() else {
                    continue;
                };
                if self.of_second == a_second {
                    self.of_second = 0;
                    self.second += 1;
                }
                self.of_second += 1;
                let address = IpAddr::from(Ipv4Addr::from(0x0B00_0000 + client));
                records.push(Record {
                    target: self.rng.choice(&self.pages).copied(),
                    ..Record::new(Timestamp::from_secs(self.second), address, 200)
                });
                left -= 1;
            }
            let start = clock::now();
            self.engine.replay(&records);
            took += clock::since(start).as_nanos() as f64;
            while let Some(command) = self.engine.next_command() {
                black_box(command);
            }
        }
        took
    }
}

fn nanoseconds(clients: u32, every: u32) -> Result<f64> {
    let mut crowd = Crowd::new(clients, every);
    // Everybody is there, and what is normal is known.
    crowd.play((clients * 3).max(clients / every * 700));
    let took = crowd.play(TIMED);
    let snapshot = crowd.engine.snapshot();
    ensure!(
        snapshot.bans == 0 && snapshot.clients >= clients as usize * 95 / 100,
        "{} clients and {} bans",
        snapshot.clients,
        snapshot.bans
    );
    Ok(took / f64::from(TIMED))
}

/// Tells the process what it is to fill its memory with.
const KIND: &str = "PORTCULLIS_BENCH_CROWD";

/// If this process was started to fill its memory, it does so and prints how much that took.
pub fn fill() -> Option<Result<()>> {
    let kind = std::env::var(KIND).ok()?;
    Some(fill_with(&kind))
}

fn fill_with(kind: &str) -> Result<()> {
    match kind {
        "crowd-v4" => {
            let mut crowd = Crowd::new(MILLION, EVERY);
            crowd.play(3 * MILLION);
            ensure!(
                crowd.engine.snapshot().clients > 950_000,
                "not all are there"
            );
        }
        kind => {
            let defaults = Config::default().engine;
            let bound = defaults.max_clients;
            let mut engine = Engine::new(defaults, Saved::default(), Timestamp::from_secs(START));
            let mut records = Vec::with_capacity(1000);
            for number in 0..10 * MILLION {
                let client = match kind {
                    "churn-v6" => {
                        Ipv6Addr::from((0x2001_0DB8_u128 << 96) | (u128::from(number) << 64)).into()
                    }
                    _ => IpAddr::from(Ipv4Addr::from(0x0B00_0000 + number)),
                };
                let at = Timestamp::from_secs(START + u64::from(number / 100_000));
                records.push(Record::new(at, client, 404));
                if records.len() == 1000 {
                    engine.replay(&records);
                    records.clear();
                    while let Some(command) = engine.next_command() {
                        black_box(command);
                    }
                }
            }
            ensure!(engine.snapshot().clients <= bound, "more than the bound");
        }
    }
    let status = std::fs::read_to_string("/proc/self/status")?;
    let most = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    println!("{}", most.context("the kernel does not say")?.trim());
    Ok(())
}

/// MiB.
fn in_a_process_of_its_own(kind: &str) -> Result<f64> {
    let output = Command::new(std::env::current_exe()?)
        .env(KIND, kind)
        .output()?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let text = String::from_utf8(output.stdout)?;
    let kib = text.trim().strip_suffix("kB").context("not in kB")?.trim();
    Ok(kib.parse::<f64>()? / 1024.0)
}
