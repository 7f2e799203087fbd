//! A ledger of a million bans: how long a start takes, what it costs to have them and to let some go, and a burst of decisions.

use std::{
    collections::HashMap,
    fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use portcullis::{
    audit::{History, Settings as HistorySettings, verify},
    config::Config,
    enforce::{
        self, Chosen, Enforcer as _, Intent, Lifetime, Mode,
        worker::{Job, Worker},
        xdp::{self, Flavour},
    },
    store::Store,
};
use portcullis_engine::{
    Ban, Engine, Event, Origin, Outcome, Saved, Subject, Term, Timestamp,
    baseline::Learnt,
    command::{Action, Change},
    detect::{Finding, Sample, Test},
    ledger::Offences,
};
use portcullis_tests::lab::{
    Lab,
    agent::{Agent, Config as AgentConfig},
    clock,
    nginx::Nginx,
    wait::eventually,
};
use tempfile::TempDir;
use tokio::sync::mpsc;

use crate::{
    note::{Note, Wanted, median},
    source::Family,
    subjects,
};

const MILLION: u32 = 1_000_000;
/// Decisions of the burst.
const BURST: u32 = 100_000;
/// A second, where they come at a pace.
const PACE: f64 = 20_000.0;
/// Longer than a bench.
const LASTS: Duration = Duration::from_secs(86_400);

/// Measures.
///
/// # Errors
/// When something fails, or is lost.
pub fn measure(quick: bool, note: &mut Note) -> Result<()> {
    start(quick, note)?;
    expiry(note)?;
    for pace in [Some(PACE), None] {
        note_burst(pace, note)?;
    }
    idle(quick, note)
}

fn subject(number: u32) -> Subject {
    Subject::of_client(Family::V4Routable.address(number))
}

fn now() -> Timestamp {
    Timestamp::from_millis(clock::epoch_millis())
}

/// A ban as the detector makes it, with all its evidence.
fn ban(number: u32, since: Timestamp) -> Ban {
    let spread = Duration::from_millis(u64::from(number % 600_000));
    let noise = f64::from(number % 1000) / 7.0;
    let sample = |n: u64| Sample {
        log: "/var/log/nginx/access.log".to_owned(),
        offset: u64::from(number) * 300 + n * 211,
    };
    Ban {
        tier: Some(number % 3 + 1),
        reason: format!("{noise:.2} req/s is more than 5 times the mean of 1.07"),
        finding: Some(Finding {
            test: Test::TimesMean,
            threshold: 5.0,
            surge: false,
            rate: noise,
            score: noise / 0.9,
            mean: 1.07 + noise / 100.0,
            stddev: 0.93 + noise / 300.0,
            learnt: Learnt::Recent,
            window_secs: 60,
            requests: u64::from(number % 5000),
            errors: u64::from(number % 50),
            seen: since,
            margin: 0.0,
            value: 0.0,
            distinct: 0,
            samples: (0..3).map(sample).collect(),
        }),
        ..Ban::new(
            subject(number),
            since,
            Term::Until(since + LASTS + spread),
            Origin::Detector,
        )
    }
}

/// Tells the process where it is to make a ledger.
const DIR: &str = "PORTCULLIS_BENCH_LEDGER";

/// If this process was started to make a ledger of a million bans, it does so and prints how long that took, in milliseconds,
/// and how much memory.
pub fn fill() -> Option<Result<()>> {
    let dir = std::env::var_os(DIR)?;
    Some(fill_in(Path::new(&dir)))
}

fn fill_in(dir: &Path) -> Result<()> {
    let (store, _) = Store::open(dir)?;
    let at = now();
    let start = clock::now();
    for number in 0..MILLION {
        store.save(&Change::Ban(ban(number, at)));
        let offences = Offences { count: 1, last: at };
        store.save(&Change::Offences(subject(number), offences));
    }
    let handed = clock::since(start);
    ensure!(store.settle(Duration::from_secs(600)), "not settled");
    let all = clock::since(start);
    store.save_mode(Mode::Enforce);
    drop(store);
    let status = fs::read_to_string("/proc/self/status")?;
    let most = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let most = most.context("the kernel does not say")?.trim();
    let most: u64 = most
        .strip_suffix("kB")
        .context("not in kB")?
        .trim()
        .parse()?;
    println!("{} {} {}", handed.as_millis(), all.as_millis(), most / 1024);
    Ok(())
}

/// Has a process of its own make the ledger; how long it took to hand all over and to write it, and how much memory.
fn filled(dir: &Path) -> Result<[f64; 3]> {
    let output = Command::new(std::env::current_exe()?)
        .env(DIR, dir)
        .output()?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{error}");
    let text = String::from_utf8(output.stdout)?;
    let figures = text.split_whitespace().map(str::parse);
    let figures: Vec<f64> = figures.collect::<Result<_, _>>()?;
    figures.try_into().ok().context("not three figures")
}

fn settings() -> portcullis_engine::Settings {
    let mut settings = Config::default().engine;
    settings.max_bans = subjects::MAX_BANS as usize;
    settings
}

fn start(quick: bool, note: &mut Note) -> Result<()> {
    eprintln!("start of a million bans …");
    let epoch = clock::now();
    let folder = TempDir::new()?;
    let [handed, written, memory] = filled(folder.path())?;
    let length = fs::metadata(folder.path().join("ledger.redb"))?.len();
    let names = [
        "open the ledger, check it and read it",
        "make the engine of it",
        "list what is to be in force",
        "load the program, make the maps",
        "enter the bans into the maps",
        "in force, all together",
    ];
    let mut times = names.map(|_| [Vec::new(), Vec::new()]);
    let rounds = if quick { 1 } else { 3 };
    for _ in 0..rounds {
        let lab = Lab::new()?;
        let begin = [clock::processor(), clock::since(epoch)];
        let mut last = begin;
        let mut all = times.iter_mut();
        let mut lap = |from: Option<[Duration; 2]>| {
            let now = [clock::processor(), clock::since(epoch)];
            let from = from.unwrap_or(last);
            for (times, (now, from)) in all
                .next()
                .into_iter()
                .flatten()
                .zip(now.into_iter().zip(from))
            {
                times.push((now.saturating_sub(from)).as_secs_f64() * 1e3);
            }
            last = now;
        };
        let (store, contents) = Store::recover(folder.path(), now())?;
        lap(None);
        let engine = Engine::new(settings(), contents.saved, now());
        lap(None);
        let at = now();
        let change = |ban: &Ban| enforce::Change::Ban(ban.subject, Lifetime::of(ban.term, at));
        let mut intent: Intent = engine.bans().map(change).collect();
        lap(None);
        let mut ours = subjects::back_end(&lab, "lo", Flavour::Native)?;
        lap(None);
        let (drift, _) = enforce::reconcile(&mut ours, &mut intent)?;
        lap(None);
        lap(Some(begin));
        ensure!(drift.missing == u64::from(MILLION), "{drift}");
        ours.detach()?;
        drop(store);
    }
    let head = ["start", "ms", "ms of processor"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for (name, [processor, times]) in names.iter().zip(&times) {
        rows.push(vec![
            (*name).to_owned(),
            format!("{:.0}", median(times).0),
            format!("{:.0}", median(processor).0),
        ]);
    }
    for (name, figure) in [
        (
            "before that: save all of it, until the last is handed over",
            handed,
        ),
        ("… until it is on disk", written),
        ("MiB that the process that saved it needed at most", memory),
        ("MiB of ledger", length as f64 / 1_048_576.0),
    ] {
        rows.push(vec![name.to_owned(), format!("{figure:.0}"), String::new()]);
    }
    Note::table(
        "A ledger of a million bans",
        &format!(
            "1,000,000 IPv4 bans with a finding and three places in a log each, 1,000,000 accounts. `Store`, `Engine`, `Intent` and \
             `Xdp` called as the agent calls them at a start after which nothing is in the kernel. The file is in the page cache.\n\
             Median of {rounds}, on the clock; the processor's time is that of all threads, and says more where others use the machine."
        ),
        &rows,
    );
    let what = "a million bans, from the start until all are in force, ms";
    note.ratio(what, median(&times[5][1]).0, Wanted::AtMost(3000.0));
    Ok(())
}

/// A look whether any ban's time is over, with a million bans.
fn expiry(note: &mut Note) -> Result<()> {
    eprintln!("bans that end …");
    let begin = Timestamp::from_secs(1_700_000_000);
    let mut rows = vec![vec!["bans that end".to_owned(), "µs".to_owned()]];
    let mut figures = Vec::new();
    for ending in [0u32, 100, 1_000, 10_000, 100_000] {
        let mut times = Vec::new();
        for _ in 0..3 {
            let bans = (0..MILLION).map(|number| {
                let length = if number < ending { 60 } else { 3600 };
                let term = Term::Until(begin + Duration::from_secs(length));
                Ban {
                    term,
                    ..ban(number, begin)
                }
            });
            let saved = Saved {
                bans: bans.collect(),
                ..Saved::default()
            };
            let mut engine = Engine::new(settings(), saved, begin);
            // Who is looked at before the end is released all the same when nobody answers.
            engine.tick(begin + Duration::from_secs(30));
            while engine.next_command().is_some() {}
            let start = clock::now();
            engine.tick(begin + Duration::from_secs(61));
            let mut lifted = 0;
            while let Some(command) = engine.next_command() {
                lifted += u32::from(matches!(command, portcullis_engine::Command::Unban(..)));
            }
            times.push(clock::since(start).as_secs_f64() * 1e6);
            ensure!(lifted == ending, "{lifted} of {ending} are lifted");
        }
        let (time, _) = median(&times);
        rows.push(vec![ending.to_string(), format!("{time:.1}")]);
        figures.push(time);
    }
    Note::table(
        "A look at a million bans, some of which end",
        "`Engine::tick` and its commands, with the evidence of each ban for the history. Median of 3.",
        &rows,
    );
    note.ratio(
        "a look at a million bans of which none ends, µs",
        figures[0],
        Wanted::AtMost(100.0),
    );
    // 100 times as many.
    note.ratio(
        "100,000 that end, of 1,000 that end: times as long",
        figures[4] / figures[2],
        Wanted::AtMost(300.0),
    );
    Ok(())
}

/// What has come of a burst.
struct Burst {
    /// From a decision to its being in force, in milliseconds.
    latencies: Vec<f64>,
    /// From the first decision to the last one in force.
    took: Duration,
    /// Entries in the kernel, in the ledger, lines of the history.
    all: [u64; 3],
}

/// Decisions as they come, carried out as the agent does it: to the ledger, to the back end, and on record when they are in force.
fn burst(pace: Option<f64>) -> Result<Burst> {
    let lab = Lab::new()?;
    let folder = TempDir::new()?;
    let ours = subjects::back_end(&lab, "lo", Flavour::Native)?;
    let (store, _) = Store::open(folder.path())?;
    let history = History::open(
        folder.path(),
        HistorySettings {
            max_bytes: 1 << 30,
            keep: 8,
        },
    )?;
    let (sender, mut outcomes) = mpsc::channel(1024);
    let chosen = Chosen {
        enforcer: Box::new(ours),
        refused: Vec::new(),
        intent: Intent::default(),
        sockets: None,
    };
    let mut worker = Worker::start(chosen, sender)?;
    let mut decided: HashMap<Subject, Instant> = HashMap::new();
    let (mut latencies, mut made) = (Vec::new(), 0u32);
    let begin = clock::now();
    while latencies.len() < BURST as usize {
        let mut is_idle = true;
        while let Ok(outcome) = outcomes.try_recv() {
            is_idle = false;
            let Outcome::Banned(ban, result) = outcome else {
                continue;
            };
            ensure!(result.is_ok(), "{}: {result:?}", ban.subject);
            let at = decided.get(&ban.subject).context("nobody decided that")?;
            latencies.push(clock::since(*at).as_secs_f64() * 1e3);
            let event = Event::of_ban(now(), Action::Ban, &ban, ban.reason.clone());
            history.record(&event, Mode::Enforce);
        }
        worker.catch_up();
        let due = pace.map_or(BURST, |pace| {
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "small and positive"
            )]
            let due = (clock::since(begin).as_secs_f64() * pace) as u32;
            due.min(BURST)
        });
        // As many as the lines of a batch may bring.
        for _ in 0..due.saturating_sub(made).min(256) {
            is_idle = false;
            let ban = ban(made, now());
            decided.insert(ban.subject, clock::now());
            store.save(&Change::Ban(ban.clone()));
            worker.change(Job::Ban {
                lifetime: Lifetime::For(LASTS),
                ban: Box::new(ban),
                made: portcullis::runtime::clock::boot(),
                read: None,
            });
            made += 1;
        }
        if is_idle {
            // Nothing is due: the processor is for those who have work.
            std::thread::sleep(Duration::from_micros(50));
        }
    }
    let took = clock::since(begin);
    worker.close();
    drop(worker);
    ensure!(
        store.settle(Duration::from_secs(120)),
        "the ledger is not on disk"
    );
    drop((history, store));
    let held = xdp::left(&lab.pin_dir())?.bans.len();
    let report = verify::folder(folder.path(), None)?;
    let saved = Store::open(folder.path())?.1.saved.bans.len();
    let all = [held as u64, saved as u64, report.lines];
    ensure!(
        all == [u64::from(BURST); 3] && report.is_unbroken(),
        "{all:?} {report:#?}"
    );
    Ok(Burst {
        latencies,
        took,
        all,
    })
}

/// Measures a burst, and notes it.
fn note_burst(pace: Option<f64>, note: &mut Note) -> Result<()> {
    let how = pace.map_or_else(
        || "as fast as possible".to_owned(),
        |pace| format!("{pace:.0} a second"),
    );
    eprintln!("a burst of decisions, {how} …");
    let Burst {
        mut latencies,
        took,
        all,
    } = burst(pace)?;
    latencies.sort_unstable_by(f64::total_cmp);
    let at = |share: f64| {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "an index"
        )]
        let index = (share * (latencies.len() - 1) as f64) as usize;
        latencies[index]
    };
    let rows = [
        ("", "measured".to_owned()),
        ("decisions", BURST.to_string()),
        (
            "entries in the kernel, in the ledger, lines of the history",
            format!("{all:?}"),
        ),
        (
            "a second, from the first decision to the last one in force",
            format!("{:.0}", f64::from(BURST) / took.as_secs_f64()),
        ),
        (
            "ms from decision to in force: median",
            format!("{:.2}", at(0.5)),
        ),
        ("p99", format!("{:.2}", at(0.99))),
        ("most", format!("{:.2}", at(1.0))),
    ];
    let rows: Vec<_> = rows
        .into_iter()
        .map(|(what, figure)| vec![what.to_owned(), figure])
        .collect();
    Note::table(
        &format!("A burst of decisions, {how}"),
        "A thread that does with each decision what the agent's loop does: ledger, back end, and on record when the outcome comes \
         back. New bans of IPv4 with all their evidence into XDP's maps; the latency ends when the outcome is read. Then the \
         entries of the pinned maps are counted, the history is verified, and the ledger is read.",
        &rows,
    );
    if pace.is_some() {
        note.ratio(
            "a burst of 100,000 decisions, 20,000 a second: p99 from decision to in force, ms",
            at(0.99),
            Wanted::AtMost(10.0),
        );
    }
    Ok(())
}

/// Ticks of the processor that a process has used.
fn ticks(process: u32) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat"))?;
    // Behind the name, which may hold anything: state, …; user and system time are the 14th and 15th of all.
    let (_, rest) = stat.rsplit_once(')').context("no name")?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let field = |at: usize| {
        fields
            .get(at)
            .context("a field is missing")?
            .parse()
            .context("not a number")
    };
    let (user, system): (f64, f64) = (field(11)?, field(12)?);
    Ok(user + system)
}

/// A real agent with a million bans and nothing to do.
fn idle(quick: bool, note: &mut Note) -> Result<()> {
    eprintln!("a real agent with a million bans …");
    let lab = Lab::new()?;
    let nginx = Nginx::start(&lab)?;
    let config = AgentConfig {
        max_bans: subjects::MAX_BANS,
        reconcile_secs: 8,
        ..AgentConfig::new(nginx.log())
    };
    filled(&lab.dir().join(config.state))?;
    let begin = clock::now();
    let agent = Agent::launch(&lab, &config)?;
    eventually("the agent to answer", Duration::from_secs(60), || {
        Ok(agent.status().ok())
    })?;
    let start = clock::since(begin);
    let held = xdp::left(&lab.pin_dir())?.bans.len();
    ensure!(held == MILLION as usize, "{held} entries");
    let (settle, length) = if quick { (10, 16) } else { (20, 48) };
    // What is measured is a stretch of time, after what the start has left to do.
    std::thread::sleep(Duration::from_secs(settle));
    let (before, from) = (ticks(agent.id())?, clock::now());
    std::thread::sleep(Duration::from_secs(length));
    let used = (ticks(agent.id())? - before) / 100.0;
    let share = used / clock::since(from).as_secs_f64() * 100.0;
    let status = fs::read_to_string(format!("/proc/{}/status", agent.id()))?;
    let memory = |field: &str| -> Result<f64> {
        let value = status.lines().find_map(|line| line.strip_prefix(field));
        let value = value
            .and_then(|value| value.trim().strip_suffix("kB"))
            .context("no memory")?;
        Ok(value.trim().parse::<f64>()? / 1024.0)
    };
    let rows = [
        ("", "measured".to_owned()),
        (
            "ms from the start of the process until it answers",
            format!("{:.0}", start.as_secs_f64() * 1e3),
        ),
        ("entries in the kernel then", held.to_string()),
        ("% of a core, doing nothing", format!("{share:.2}")),
        ("MiB", format!("{:.0}", memory("VmRSS:")?)),
        ("MiB at most", format!("{:.0}", memory("VmHWM:")?)),
    ];
    let rows: Vec<_> = rows
        .into_iter()
        .map(|(what, figure)| vec![what.to_owned(), figure])
        .collect();
    Note::table(
        "An agent with a million bans",
        &format!(
            "The binary, in a namespace, with the ledger of above and no traffic. Time of the processor by /proc/PID/stat over {length} s, \
             with a comparison of kernel and ledger every {} s, as by default.",
            config.reconcile_secs
        ),
        &rows,
    );
    note.ratio(
        "an idle agent with a million bans, % of a core",
        share,
        Wanted::AtMost(1.0),
    );
    Ok(())
}
