//! What a packet costs in each program, by `BPF_PROG_TEST_RUN`.
//!
//! Each run sends the same random walk of sources through the mutator, which tail-calls one program. What mutator and
//! empty program take in the same round is taken off. Time is the thread's on the processor, so that others who run
//! meanwhile cost less than they would on a clock.

use std::os::fd::{AsFd as _, AsRawFd as _};

use anyhow::{Context as _, Result, bail, ensure};
use aya::{
    Ebpf,
    maps::{MapInfo, ProgramArray},
    programs::{ProgramFd, TestRun as _, TestRunOptions},
};
use nix::time::{ClockId, clock_gettime};
use portcullis::enforce::xdp::{Flavour, Xdp};
use portcullis_tests::lab::Lab;

use crate::{
    note::{Note, Wanted, median},
    source::{Family, Sources, rewind},
    subjects::{self, MAX_BANS, XDP_FILTER_MAX},
};

const DROP: u32 = 1;
const PASS: u32 = 2;

/// Rows of the table.
const OURS: &str = "portcullis";
const BARE: &str = "one bare hash look-up";
const XDP_FILTER: [(&str, &str); 2] = [
    ("xdp-filter, addresses only", "xdpfilt_alw_ip"),
    ("xdp-filter, all features", "xdpfilt_alw_all"),
];

const COLUMNS: [(&str, Family, Sources); 4] = [
    ("clean IPv4", Family::V4, Sources::Clean),
    ("banned IPv4", Family::V4, Sources::Banned),
    ("clean IPv6", Family::V6, Sources::Clean),
    ("banned IPv6", Family::V6, Sources::Banned),
];

/// A program that packets are sent through.
struct Subject {
    name: &'static str,
    program: ProgramFd,
}

/// Measures with so many bans of each family.
///
/// # Errors
/// When that is not possible; a peer that is not installed is noted as a problem instead.
pub fn measure(bans: u32, quick: bool, note: &mut Note) -> Result<()> {
    eprintln!("a packet's cost, {bans} bans of each family …");
    let lab = Lab::new()?;
    let mut bench = subjects::object(MAX_BANS)?;
    let mut ours = subjects::back_end(&lab, "lo", Flavour::Native)?;
    for family in [Family::V4, Family::V6] {
        subjects::fill_bare(&mut bench, family, bans)?;
        subjects::apply(&mut ours, &family.bans(0..bans))?;
    }
    let mut filters = Vec::new();
    for (name, object) in XDP_FILTER {
        if bans > XDP_FILTER_MAX {
            continue;
        }
        match subjects::xdp_filter(&lab, object, bans) {
            Ok(filter) => filters.push((name, object, filter)),
            Err(error) => note.problem(name, &error),
        }
    }

    let (packets, rounds) = if quick {
        (200_000, 10)
    } else {
        (1_000_000, 15)
    };
    let mut columns = Vec::new();
    for (_, family, sources) in COLUMNS {
        let empty = match sources {
            Sources::Clean => "pass",
            Sources::Banned => "drop",
        };
        let bare = match family {
            Family::V6 => "bare_v6",
            Family::V4 | Family::V4Routable => "bare_v4",
        };
        let mut subjects = vec![
            (
                "mutator and empty program",
                subjects::handle(&mut bench, empty)?,
            ),
            (OURS, ours.program()?.fd()?.try_clone()?),
            (BARE, subjects::handle(&mut bench, bare)?),
        ];
        for (name, object, filter) in &mut filters {
            subjects.push((*name, subjects::handle(filter, object)?));
        }
        let subjects: Vec<_> = subjects
            .into_iter()
            .map(|(name, program)| Subject { name, program })
            .collect();
        let mut walk = Mutator {
            bench: &mut bench,
            family,
            sources,
            bans,
        };
        columns.push(walk.measure(&subjects, packets, rounds)?);
    }
    report(bans, packets, rounds, &columns, note);
    // The same with more bans: they are allocated at once.
    if bans <= XDP_FILTER_MAX {
        memory(&mut ours)?;
    }
    Ok(())
}

/// The mutator, and what it is told.
struct Mutator<'a> {
    bench: &'a mut Ebpf,
    family: Family,
    sources: Sources,
    bans: u32,
}

/// Of each subject: nanoseconds a packet, above those of the first subject in the same round.
type Column = Vec<(&'static str, Vec<f64>)>;

impl Mutator<'_> {
    fn measure(&mut self, subjects: &[Subject], packets: u32, rounds: u32) -> Result<Column> {
        for subject in subjects {
            self.check(subject)?;
            self.run(subject, packets)?;
        }
        let mut column: Column = subjects
            .iter()
            .map(|subject| (subject.name, Vec::new()))
            .collect();
        for _ in 0..rounds {
            let mut empty = 0.0;
            for (subject, (_, samples)) in subjects.iter().zip(&mut column) {
                let time = self.run(subject, packets)?;
                samples.push(time - empty);
                if empty == 0.0 {
                    empty = time;
                }
            }
        }
        Ok(column)
    }

    /// Sends one packet after another and sees that each has the verdict it should.
    fn check(&mut self, subject: &Subject) -> Result<()> {
        self.begin(subject)?;
        let wanted = match self.sources {
            Sources::Clean => PASS,
            Sources::Banned => DROP,
        };
        for _ in 0..100 {
            let verdict = self.send(1)?;
            ensure!(
                verdict == wanted,
                "{} answers {verdict} where {wanted} is right ({:?}, {:?})",
                subject.name,
                self.family,
                self.sources
            );
        }
        Ok(())
    }

    /// Nanoseconds a packet.
    fn run(&mut self, subject: &Subject, packets: u32) -> Result<f64> {
        self.begin(subject)?;
        let time = || clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID);
        let start = time()?;
        self.send(packets)?;
        let spent = time()? - start;
        Ok(std::time::Duration::from(spent).as_secs_f64() * 1e9 / f64::from(packets))
    }

    fn begin(&mut self, subject: &Subject) -> Result<()> {
        rewind(self.bench, self.family, self.sources, self.bans, 0)?;
        let target = self.bench.map_mut("TARGET").context("no map TARGET")?;
        ProgramArray::try_from(target)?.set(0, &subject.program, 0)?;
        Ok(())
    }

    /// Returns the last verdict.
    fn send(&mut self, packets: u32) -> Result<u32> {
        let mutator = match self.family {
            Family::V6 => "mutate_v6",
            Family::V4 | Family::V4Routable => "mutate_v4",
        };
        let packet = self.family.packet();
        let mut options = TestRunOptions::new();
        options.data_in = Some(&packet);
        options.repeat = packets;
        Ok(subjects::program(self.bench, mutator)?
            .test_run(options)?
            .return_value)
    }
}

fn report(bans: u32, packets: u32, rounds: u32, columns: &[Column], note: &mut Note) {
    let mut rows = vec![vec!["ns a packet".to_owned()]];
    rows[0].extend(COLUMNS.map(|(name, ..)| name.to_owned()));
    for (index, (name, _)) in columns.first().into_iter().flatten().enumerate() {
        let mut row = vec![(*name).to_owned()];
        for column in columns {
            let samples = column.get(index).map_or(&[][..], |(_, samples)| samples);
            let (middle, least) = median(samples);
            row.push(format!("{middle:.1} ({least:.1})"));
        }
        rows.push(row);
    }
    Note::table(
        &format!("A packet's cost with {bans} bans of each family"),
        &format!(
            "`BPF_PROG_TEST_RUN`, random sources by a mutator that tail-calls the program; all but the first row less \
             mutator and empty program.\nMedian (least) of {rounds} interleaved runs of {packets} packets; processor time of the thread; hash maps for {MAX_BANS}."
        ),
        &rows,
    );
    let figure = |column: usize, name: &str| {
        let (_, samples) = columns
            .get(column)?
            .iter()
            .find(|(other, _)| *other == name)?;
        Some(median(samples).0)
    };
    let [(addresses_only, _), _] = XDP_FILTER;
    let few = bans <= XDP_FILTER_MAX;
    let clean = if few { 0.25 } else { 0.3 };
    for (index, peer, bound) in [
        (0, BARE, Some(clean)),
        (0, addresses_only, few.then_some(0.4)),
        (1, addresses_only, few.then_some(0.7)),
        (2, BARE, Some(clean)),
        (2, addresses_only, few.then_some(0.4)),
        (3, addresses_only, few.then_some(0.7)),
    ] {
        if let (Some(ours), Some(theirs), Some(bound)) =
            (figure(index, OURS), figure(index, peer), bound)
        {
            let what = format!("{}, {bans} bans: of {peer}", COLUMNS[index].0);
            note.ratio(&what, ours / theirs, Wanted::AtMost(bound));
        }
    }
}

/// Prints what our maps take.
fn memory(ours: &mut Xdp) -> Result<()> {
    let ids = ours.program()?.info()?.map_ids()?;
    let Some(ids) = ids else {
        bail!("this kernel does not say which maps a program uses");
    };
    let (mut rows, mut total) = (Vec::new(), 0);
    for id in ids {
        let map = MapInfo::from_id(id)?;
        let bytes = memlock(&map)?;
        total += bytes;
        rows.push((
            map.name_as_str().unwrap_or("?").to_owned(),
            map.max_entries().to_string(),
            bytes,
        ));
    }
    rows.sort_unstable_by_key(|(name, ..)| name.clone());
    rows.push(("all".to_owned(), String::new(), total));
    let head = ["map", "entries", "MiB"].map(str::to_owned).into();
    let rows: Vec<_> = std::iter::once(head)
        .chain(rows.into_iter().map(|(name, entries, bytes)| {
            vec![
                name,
                entries,
                format!("{:.2}", bytes as f64 / f64::from(1 << 20)),
            ]
        }))
        .collect();
    Note::table(
        "Memory of our maps",
        "`memlock` of each map, from /proc/self/fdinfo.",
        &rows,
    );
    Ok(())
}

fn memlock(map: &MapInfo) -> Result<u64> {
    let handle = map.fd()?;
    let path = format!("/proc/self/fdinfo/{}", handle.as_fd().as_raw_fd());
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    text.lines()
        .find_map(|line| line.strip_prefix("memlock:")?.trim().parse().ok())
        .with_context(|| format!("{path} has no memlock"))
}
