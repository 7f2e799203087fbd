//! The history on a disk that is full, or read-only.

use std::{path::Path, time::Duration};

use anyhow::Result;
use portcullis::{
    audit::{History, Settings, verify},
    enforce::Mode,
};
use portcullis_engine::{Event, Timestamp, command::Action};
use portcullis_tests::lab::{
    Lab,
    agent::{Agent, Config},
    client_v4,
    disk::Disk,
    log::Appender,
    nginx::Nginx,
    wait::eventually,
};
use tempfile::TempDir;

const SOON: Duration = Duration::from_secs(10);
const SETTINGS: Settings = Settings {
    max_bytes: 1 << 30,
    keep: 8,
};

fn record(history: &History, numbers: std::ops::Range<u64>) {
    for number in numbers {
        let event = Event::new(
            Timestamp::from_secs(number),
            Action::Refuse,
            "x".repeat(200),
        );
        history.record(&event, Mode::Enforce);
    }
}

fn fails(history: &History) -> Result<()> {
    eventually("a try that fails", SOON, || Ok(history.problem().map(drop)))
}

fn lines(dir: &Path) -> u64 {
    verify::folder(dir, None).map_or(0, |report| report.lines)
}

#[test]
fn a_disk_that_is_full_at_the_start_and_later_costs_no_line() -> Result<()> {
    let folder = TempDir::new()?;
    let disk = Disk::new(&folder.path().join("state"), "256k")?;
    disk.fill();
    let history = History::open(disk.path(), SETTINGS)?;
    record(&history, 0..100);
    fails(&history)?;
    assert_eq!(lines(disk.path()), 0);
    disk.make_room()?;
    eventually("the first lines", SOON, || {
        Ok((lines(disk.path()) == 100).then_some(()))
    })?;
    disk.fill();
    record(&history, 100..300);
    fails(&history)?;
    let report = verify::folder(disk.path(), None)?;
    assert!(report.is_unbroken() && report.lines < 300, "{report:#?}");
    disk.make_room()?;
    eventually("the others", SOON, || {
        Ok((lines(disk.path()) == 300).then_some(()))
    })?;
    assert_eq!(history.lost(), 0);
    drop(history);
    let report = verify::folder(disk.path(), None)?;
    assert!(
        report.is_unbroken() && report.notes.is_empty(),
        "{report:#?}"
    );
    Ok(())
}

#[test]
fn a_disk_that_is_read_only_at_the_start_costs_no_line() -> Result<()> {
    let folder = TempDir::new()?;
    let disk = Disk::new(&folder.path().join("state"), "256k")?;
    disk.set_read_only(true)?;
    let history = History::open(disk.path(), SETTINGS)?;
    record(&history, 0..100);
    fails(&history)?;
    disk.set_read_only(false)?;
    eventually("the lines", SOON, || {
        Ok((lines(disk.path()) == 100).then_some(()))
    })?;
    drop(history);
    assert!(verify::folder(disk.path(), None)?.is_unbroken());
    Ok(())
}

#[test]
fn an_agent_on_a_full_disk_starts_and_bans_and_has_it_on_record_later() -> Result<()> {
    let lab = Lab::new()?;
    let nginx = Nginx::start(&lab)?;
    let config = Config::new(nginx.log());
    let disk = Disk::new(&lab.dir().join(config.state), "8m")?;
    // It has been here before.
    Agent::start(&lab, &config)?.terminate(SOON)?;
    disk.fill();
    let mut agent = Agent::start(&lab, &config)?;
    Appender::open(nginx.log())?.requests(client_v4(1), config.allowance() + 1)?;
    agent.eventually("the ban", SOON, || {
        let answer = lab.get(client_v4(1), "/", Duration::from_secs(1));
        Ok(answer.is_err().then_some(()))
    })?;
    agent.eventually("word of the disk", SOON, || {
        Ok(agent.log().contains("cannot write").then_some(()))
    })?;
    disk.make_room()?;
    agent.event("ban", "198.19.0.1", 1, SOON)?;
    agent.terminate(SOON)?;
    let report = verify::folder(disk.path(), None)?;
    assert!(report.is_unbroken(), "{report:#?}");
    Ok(())
}
