//! How fast lines of the access log are read: parsed, and all the way from a file into the engine.

use std::{fs::File, hint::black_box, io::Write as _, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, ensure};
use portcullis::{
    config::Config,
    source::{Batch, Start, tail::Tail},
};
use portcullis_engine::{Engine, Saved, Timestamp, parse};
use portcullis_tests::lab::clock;
use serde::Deserialize;

use crate::note::{Note, Wanted, median};

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

/// Measures.
///
/// # Errors
/// When the file cannot be written or read.
pub fn measure(quick: bool, note: &mut Note) -> Result<()> {
    eprintln!("lines of the log …");
    let rounds = if quick { 3 } else { 11 };
    let text = log();
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
    ];
    let mut rates = names.map(|_| Vec::new());
    for _ in 0..rounds {
        let [bare, parsed, whole] = &mut rates;
        let start = clock::now();
        for line in &lines {
            let line: Bare<'_> = serde_json::from_slice(line)?;
            black_box((line.timestamp, line.source_ip, line.status));
        }
        bare.push(millions_a_second(clock::since(start)));
        let start = clock::now();
        for line in &lines {
            black_box(parse::parse(line)?);
        }
        parsed.push(millions_a_second(clock::since(start)));
        let tail = Tail::open(path.clone(), Start::Beginning, 65_536, None, Arc::default())?;
        let start = clock::now();
        read(tail)?;
        whole.push(millions_a_second(clock::since(start)));
    }
    let mut rows = vec![vec![
        "one thread".to_owned(),
        "million lines a second".to_owned(),
    ]];
    for (name, rates) in names.iter().zip(&rates) {
        rows.push(vec![(*name).to_owned(), format!("{:.2}", median(rates).0)]);
    }
    Note::table(
        "Lines of the log",
        &format!(
            "{LINES} lines of {CLIENTS} clients, {} bytes each, as Nginx writes them.\nMedian of {rounds} interleaved rounds, on the clock.",
            text.len() / LINES as usize
        ),
        &rows,
    );
    let [bare, parsed, whole] = rates.map(|rates| median(&rates).0);
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
    Ok(())
}

fn millions_a_second(time: Duration) -> f64 {
    f64::from(LINES) / 1e6 / time.as_secs_f64()
}

fn read(mut tail: Tail) -> Result<()> {
    let at = |line: u32| Timestamp::from_secs(START + u64::from(line / LINES_A_SECOND));
    let mut engine = Engine::new(Config::default().engine, Saved::default(), at(0));
    let mut count = 0;
    while let Some(bytes) = tail.read(256 * 1024, Duration::ZERO)? {
        let batch = Batch {
            bytes,
            checkpoint: tail.checkpoint(),
            read: Duration::ZERO,
        };
        for line in batch.lines() {
            engine.line(line, at(count)).context("a line of our own")?;
            count += 1;
        }
        while let Some(command) = engine.next_command() {
            black_box(command);
        }
    }
    ensure!(
        count == LINES && engine.snapshot().bans == 0,
        "{count} lines"
    );
    Ok(())
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
