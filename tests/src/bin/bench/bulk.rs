//! Bans in and out by the hundred thousand, through the trait that the agent uses.

use std::time::Duration;

use anyhow::{Result, ensure};
use portcullis::enforce::{Change, Drift, Enforcer as _, Intent, xdp::Flavour};
use portcullis_tests::lab::{Lab, clock};

use crate::{
    note::{Note, Wanted, median},
    source::Family,
    subjects,
};

const MANY: u32 = 1_000_000;
const NEW: u32 = 100_000;

/// Measures.
///
/// # Errors
/// When the kernel refuses.
pub fn measure(lab: &Lab, quick: bool, note: &mut Note) -> Result<()> {
    eprintln!("bans in bulk …");
    let rounds = if quick { 1 } else { 3 };
    let names = [
        "restore 1,000,000 bans into empty maps",
        "100,000 new bans beside them",
        "read back all entries and hit counters",
        "take the 100,000 away",
        "a new run adopts 1,000,000 bans",
        "it compares them with what is wanted, in steps",
        "the longest of these steps, for which a new ban may wait",
    ];
    let mut times = names.map(|_| Vec::new());
    for _ in 0..rounds {
        let mut ours = subjects::back_end(lab, "lo", Flavour::Native)?;
        let mut lap = {
            let mut times = times.iter_mut();
            move |time: Duration| {
                if let Some(times) = times.next() {
                    times.push(time.as_secs_f64() * 1e3);
                }
            }
        };
        let bans = Family::V4.bans(0..MANY);
        lap(timed(|| subjects::apply(&mut ours, &bans))?);
        let new = Family::V4.bans(MANY..MANY + NEW);
        lap(timed(|| subjects::apply(&mut ours, &new))?);
        let mut entries = 0;
        lap(timed(|| {
            entries = ours.entries()?.len();
            Ok(())
        })?);
        ensure!(
            entries == (MANY + NEW) as usize,
            "{entries} entries are read back"
        );
        let gone: Vec<_> = new
            .into_iter()
            .map(|change| Change::Unban(change.subject()))
            .collect();
        lap(timed(|| subjects::apply(&mut ours, &gone))?);
        drop(ours);
        let mut next = None;
        lap(timed(|| {
            next = Some(subjects::back_end(lab, "lo", Flavour::Native)?);
            Ok(())
        })?);
        let Some(mut next) = next else { continue };
        let mut intent: Intent = bans.iter().copied().collect();
        let mut longest = Duration::ZERO;
        lap(timed(|| {
            intent.compare();
            while intent.is_comparing() {
                let mut found = Drift::default();
                longest = longest.max(timed(|| {
                    found = intent.step(&mut next)?.drift;
                    Ok(())
                })?);
                ensure!(found.is_none(), "{found}");
            }
            Ok(())
        })?);
        lap(longest);
        next.detach()?;
    }
    let mut rows = vec![vec!["through the back end".to_owned(), "ms".to_owned()]];
    for (name, times) in names.iter().zip(&times) {
        rows.push(vec![(*name).to_owned(), format!("{:.1}", median(times).0)]);
    }
    Note::table(
        "Bans in bulk",
        &format!(
            "IPv4, random addresses, `Xdp` called as the agent calls it.\nMedian of {rounds}, on the clock."
        ),
        &rows,
    );
    for (index, bound) in [(0, 1000.0), (1, 100.0), (2, 1000.0)] {
        let what = format!("{}, ms", names[index]);
        note.ratio(&what, median(&times[index]).0, Wanted::AtMost(bound));
    }
    Ok(())
}

fn timed(job: impl FnOnce() -> Result<()>) -> Result<Duration> {
    let start = clock::now();
    job()?;
    Ok(clock::since(start))
}
