//! A ledger that is damaged, or that the disk has no room for: nobody is let in for it.

use std::{collections::BTreeMap, fs, net::IpAddr, path::Path, time::Duration};

use anyhow::{Result, ensure};
use portcullis_tests::lab::{
    Lab,
    agent::{self, Agent, Config},
    client_v4, client_v6,
    disk::Disk,
    log::Appender,
    nginx::Nginx,
};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(20);
const ANSWER: Duration = Duration::from_millis(700);

/// Bans by subject: what is left of each.
fn bans(agent: &Agent) -> Result<BTreeMap<String, Option<u64>>> {
    let row = |ban: &Value| {
        let subject = ban["subject"].as_str().unwrap_or_default().to_owned();
        (subject, ban["remaining_secs"].as_u64())
    };
    Ok(agent.bans()?.iter().map(row).collect())
}

fn is_out(lab: &Lab, client: IpAddr) -> Result<()> {
    ensure!(lab.get(client, "/", ANSWER).is_err(), "{client} is let in");
    Ok(())
}

fn verbs(agent: &Agent, verbs: &[&[&str]]) -> Result<()> {
    for words in verbs {
        agent.verb(words)?.success()?;
    }
    Ok(())
}

/// All that was decided is on disk.
fn is_durable(agent: &Agent) -> Result<()> {
    agent.eventually("the ledger to be on disk", SOON, || {
        let status = agent.status()?;
        let is = status["store_pending"] == 0 && status["store_error"].is_null();
        Ok(is.then_some(()))
    })
}

/// The word that the agent has given of something.
fn notice(agent: &Agent, words: &str) -> Result<String> {
    agent.eventually(&format!("word of: {words}"), SOON, || {
        let history = agent.history()?;
        let conditions = history
            .iter()
            .filter_map(|event| event["condition"].as_str());
        let mut said = conditions.filter(|condition| condition.contains(words));
        Ok(said.next_back().map(str::to_owned))
    })
}

fn survives_damage(backends: Vec<&'static str>) -> Result<()> {
    let lab = Lab::new()?;
    let nginx = Nginx::start(&lab)?;
    let config = Config {
        backends,
        ..Config::new(nginx.log())
    };
    let mut agent = Agent::start(&lab, &config)?;
    verbs(
        &agent,
        &[
            &["ban", "198.19.0.1", "--for", "1h"],
            &["ban", "198.19.0.2"],
            &["ban", "2001:db8:1:7::/64", "--for", "2h"],
            &["ban", "198.19.4.0/24", "--for", "1h"],
            &["ban", "198.19.0.9", "--for", "1h", "--observe"],
            &["allow", "add", "203.0.113.0/24", "--reason", "a monitor"],
        ],
    )?;
    let before = bans(&agent)?;
    agent.kill()?;
    fs::write(lab.dir().join("state/ledger.redb"), vec![0x5a; 70_000])?;
    let mut agent = Agent::start(&lab, &config)?;
    let clients = [
        client_v4(1),
        client_v4(2),
        client_v4(4 * 256 + 7),
        client_v6(7, 1),
    ];
    for client in clients {
        is_out(&lab, client)?;
    }
    ensure!(lab.get(client_v4(9), "/", ANSWER)? == 200, "only observed");
    let after = bans(&agent)?;
    ensure!(before.keys().eq(after.keys()), "{before:?} {after:?}");
    for (subject, left) in &after {
        let was = before[subject];
        let is_near = match (was, *left) {
            (Some(was), Some(left)) => left <= was && left + 60 > was,
            (was, left) => was == left,
        };
        ensure!(is_near, "{subject}: {left:?} instead of {was:?}");
    }
    for ban in agent.bans()? {
        ensure!(ban["tier"].is_null(), "{ban}");
        let is_observed = ban["observe"] == true;
        ensure!(is_observed == (ban["subject"] == "198.19.0.9"), "{ban}");
    }
    let said = notice(&agent, "the ledger was damaged")?;
    for words in [
        "5 bans",
        "ledger.redb.damaged-",
        "1 entries of the allowlist",
    ] {
        ensure!(said.contains(words), "{said}");
    }
    let allowed = agent.verb(&["allow", "list"])?.success()?;
    ensure!(allowed.contains("203.0.113.0/24"), "{allowed}");
    // It is a ledger like any other.
    is_durable(&agent)?;
    agent.kill()?;
    let mut agent = Agent::start(&lab, &config)?;
    ensure!(bans(&agent)?.keys().eq(before.keys()));
    is_out(&lab, clients[0])?;
    agent.terminate(SOON)?;
    Ok(())
}

#[test]
fn a_damaged_ledger_lets_nobody_in() -> Result<()> {
    survives_damage(vec!["xdp-native", "xdp-generic"])
}

#[test]
fn a_damaged_ledger_lets_nobody_in_with_iptables() -> Result<()> {
    survives_damage(vec!["iptables"])
}

#[test]
fn what_was_only_observed_is_not_enforced_because_the_ledger_was_damaged() -> Result<()> {
    let lab = Lab::new()?;
    let nginx = Nginx::start(&lab)?;
    let mut config = Config::new(nginx.log());
    config.mode = "observe";
    let mut agent = Agent::start(&lab, &config)?;
    verbs(&agent, &[&["ban", "198.19.0.1", "--for", "1h"]])?;
    agent.kill()?;
    fs::write(lab.dir().join("state/ledger.redb"), b"")?;
    config.mode = "enforce";
    let agent = Agent::start(&lab, &config)?;
    ensure!(lab.get(client_v4(1), "/", ANSWER)? == 200);
    ensure!(agent.bans()?.is_empty());
    Ok(())
}

#[test]
fn an_agent_whose_first_start_finds_the_disk_full_bans_and_has_it_on_disk_later() -> Result<()> {
    let lab = Lab::new()?;
    let nginx = Nginx::start(&lab)?;
    let config = Config::new(nginx.log());
    let disk = Disk::new(&lab.dir().join(config.state), "16m")?;
    disk.fill();
    let mut agent = Agent::start(&lab, &config)?;
    Appender::open(nginx.log())?.requests(client_v4(1), config.allowance() + 1)?;
    agent.eventually("the ban", SOON, || {
        Ok(is_out(&lab, client_v4(1)).is_ok().then_some(()))
    })?;
    let status = agent.status()?;
    ensure!(status["store_error"].is_string(), "{status}");
    ensure!(status["store_pending"].as_u64() > Some(0), "{status}");
    let shown = agent.verb(&["status"])?.success()?;
    ensure!(shown.contains("would not survive a restart"), "{shown}");
    // The kernel knows, if nobody else does.
    agent.kill()?;
    let mut agent = Agent::start(&lab, &config)?;
    is_out(&lab, client_v4(1))?;
    ensure!(bans(&agent)?.len() == 1, "{:?}", bans(&agent)?);
    disk.make_room()?;
    is_durable(&agent)?;
    notice(&agent, "cannot write")?;
    notice(&agent, "can be written again")?;
    agent.kill()?;
    let mut agent = Agent::start(&lab, &config)?;
    ensure!(bans(&agent)?.len() == 1, "{:?}", bans(&agent)?);
    is_out(&lab, client_v4(1))?;
    agent.terminate(SOON)?;
    Ok(())
}

#[test]
fn an_agent_on_a_disk_that_fills_up_goes_on_and_has_all_on_disk_later() -> Result<()> {
    let lab = Lab::new()?;
    let nginx = Nginx::start(&lab)?;
    let config = Config::new(nginx.log());
    let disk = Disk::new(&lab.dir().join(config.state), "16m")?;
    let mut agent = Agent::start(&lab, &config)?;
    is_durable(&agent)?;
    disk.fill();
    // More than there is room for in the file.
    let addresses = (0..20_000u32).map(|n| format!("198.51.{}.{}", n >> 8, n & 255));
    let list = addresses.collect::<Vec<_>>().join("\n");
    let file = lab.dir().join("list");
    fs::write(&file, list)?;
    let file = file.to_string_lossy().into_owned();
    verbs(&agent, &[&["import", &file, "--for", "1h"]])?;
    agent.eventually("the disk to fail", SOON, || {
        Ok(agent.status()?["store_error"].is_string().then_some(()))
    })?;
    disk.make_room()?;
    is_durable(&agent)?;
    let before = bans(&agent)?.len();
    agent.kill()?;
    let mut agent = Agent::start(&lab, &config)?;
    ensure!(before == bans(&agent)?.len() && before > 19_000, "{before}");
    agent.terminate(SOON)?;
    Ok(())
}

#[test]
fn a_ledger_on_a_read_only_disk_is_read_and_written_later() -> Result<()> {
    let lab = Lab::new()?;
    let nginx = Nginx::start(&lab)?;
    let config = Config::new(nginx.log());
    let disk = Disk::new(&lab.dir().join(config.state), "16m")?;
    let mut agent = Agent::start(&lab, &config)?;
    verbs(&agent, &[&["ban", "198.19.0.1", "--for", "1h"]])?;
    is_durable(&agent)?;
    // In the middle of its work: the database is to be repaired.
    agent.kill()?;
    agent::detach(&lab)?;
    disk.set_read_only(true)?;
    let mut agent = Agent::start(&lab, &config)?;
    is_out(&lab, client_v4(1))?;
    verbs(&agent, &[&["ban", "198.19.0.2", "--for", "1h"]])?;
    let mut second = Agent::launch(&lab, &config)?;
    ensure!(!second.wait(SOON)?.success());
    ensure!(agent.log().contains("another agent is running"));
    disk.set_read_only(false)?;
    is_durable(&agent)?;
    agent.kill()?;
    let mut agent = Agent::start(&lab, &config)?;
    ensure!(bans(&agent)?.len() == 2, "{:?}", bans(&agent)?);
    agent.terminate(SOON)?;
    Ok(())
}

#[test]
fn a_damaged_ledger_on_a_read_only_disk_lets_nobody_in_and_is_replaced_later() -> Result<()> {
    let lab = Lab::new()?;
    let nginx = Nginx::start(&lab)?;
    let config = Config::new(nginx.log());
    let disk = Disk::new(&lab.dir().join(config.state), "16m")?;
    let mut agent = Agent::start(&lab, &config)?;
    verbs(&agent, &[&["ban", "198.19.0.1", "--for", "1h"]])?;
    agent.kill()?;
    fs::write(ledger(&disk), b"oops")?;
    disk.set_read_only(true)?;
    let mut agent = Agent::start(&lab, &config)?;
    is_out(&lab, client_v4(1))?;
    disk.set_read_only(false)?;
    is_durable(&agent)?;
    notice(&agent, "the ledger was damaged")?;
    agent.kill()?;
    ensure!(fs::read(ledger(&disk))? != b"oops");
    let mut agent = Agent::start(&lab, &config)?;
    ensure!(bans(&agent)?.len() == 1, "{:?}", bans(&agent)?);
    is_out(&lab, client_v4(1))?;
    agent.terminate(SOON)?;
    Ok(())
}

fn ledger(disk: &Disk) -> std::path::PathBuf {
    Path::new(disk.path()).join("ledger.redb")
}
