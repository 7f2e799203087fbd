//! The whole job on real parts, piece by piece. Each test has a laboratory of its own.
//!
//! Where it does not matter that a request is a real one, its line is written straight into Nginx's log: then a verdict
//! is exact to the request. The agents of these tests learn nothing unless a test says so; their ceiling is 50 requests
//! in five seconds.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use portcullis_common::stats::Counter;
use portcullis_tests::lab::{
    EDGE_INTERFACE, Lab,
    agent::{self, Agent, Config},
    client_v4, client_v6, clock, kernel,
    log::{self, Appender},
    nginx::Nginx,
    sink::{Mood, Sink},
    traffic::Traffic,
    wait::{eventually, pause},
};
use serde_json::{Value, json};

/// Everything that should take a moment, on a machine that is busy with other tests.
const SOON: Duration = Duration::from_secs(15);
/// An answer that takes longer is none.
const ANSWER: Duration = Duration::from_millis(700);

/// An edge host with Nginx and an agent.
struct Site {
    // Taken down in this order.
    agent: Agent,
    log: Appender,
    nginx: Nginx,
    lab: Lab,
}

impl Site {
    fn new(change: impl FnOnce(&mut Config)) -> Result<Self> {
        let lab = Lab::new()?;
        let nginx = Nginx::start(&lab)?;
        let mut config = Config::new(nginx.log());
        change(&mut config);
        let agent = Agent::start(&lab, &config)?;
        let log = Appender::open(nginx.log())?;
        Ok(Self {
            agent,
            log,
            nginx,
            lab,
        })
    }

    /// Makes an offender out of a source, with lines in the log; returns the so-manieth ban's event.
    fn offend(&mut self, source: IpAddr, number: usize) -> Result<Value> {
        let enough = self.agent.config().allowance() + 1;
        self.log.requests(source, enough)?;
        self.agent.event("ban", &subject(source), number, SOON)
    }

    fn answers(&self, source: IpAddr) -> bool {
        self.lab
            .get(source, "/", ANSWER)
            .is_ok_and(|status| status == 200)
    }

    /// A ban is in force: no answer, and the kernel says why.
    fn is_dropped(&self, source: IpAddr) -> Result<()> {
        let before = self.lab.pins().counter(Counter::Dropped)?;
        ensure!(!self.answers(source), "{source} gets an answer");
        let after = self.lab.pins().counter(Counter::Dropped)?;
        ensure!(
            after > before,
            "no answer, but no packet was dropped either"
        );
        Ok(())
    }

    fn in_map(&self, source: IpAddr) -> Result<bool> {
        let pins = self.lab.pins();
        Ok(match source {
            IpAddr::V4(address) => pins.ban_v4(address)?.is_some(),
            IpAddr::V6(address) => pins.ban_v6(address)?.is_some(),
        })
    }

    /// Waits until the agent has read so many lines altogether.
    fn has_read(&self, lines: u64) -> Result<()> {
        self.agent
            .eventually(&format!("{lines} lines to be read"), SOON, || {
                let read = self.agent.figure("/engine/totals/lines")?;
                ensure!(read <= lines, "{read} lines read, {lines} written");
                Ok((read == lines).then_some(()))
            })
    }
}

/// Under which name a client is counted and banned.
fn subject(client: IpAddr) -> String {
    match client {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            format!("{}/64", Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0))
        }
    }
}

fn v4(address: IpAddr) -> Result<Ipv4Addr> {
    match address {
        IpAddr::V4(address) => Ok(address),
        IpAddr::V6(_) => bail!("{address} is no IPv4 address"),
    }
}

/// Length of a ban in seconds. Its event is a moment younger than the ban itself.
fn length_secs(ban: &Value) -> Result<u64> {
    let until = ban
        .pointer("/term/until")
        .and_then(Value::as_u64)
        .with_context(|| format!("no end in {ban}"))?;
    let since = ban["time"]
        .as_u64()
        .with_context(|| format!("no time in {ban}"))?;
    Ok((until - since).div_ceil(1000))
}

fn printed(lab: &Lab, program: &str, arguments: &[&str]) -> Result<String> {
    let child = lab
        .edge()
        .spawn(Command::new(program).args(arguments).stdout(Stdio::piped()))?;
    Ok(String::from_utf8_lossy(&child.wait_with_output()?.stdout).into_owned())
}

#[test]
fn an_attacker_is_found_banned_and_dropped_while_others_go_on() -> Result<()> {
    let lab = Lab::new()?;
    let nginx = Nginx::start(&lab)?;
    let people: Vec<_> = (1..=4)
        .map(client_v4)
        .chain((1..=2).map(|n| client_v6(n, 1)))
        .collect();
    let legitimate = Traffic::legitimate(&lab, &people, 2.0, 7)?;
    let agent = Agent::start(
        &lab,
        &Config {
            window_secs: 3,
            span_secs: 60,
            warm_up_secs: 4,
            warm_up_ceiling_rps: 50.0,
            ..Config::new(nginx.log())
        },
    )?;
    agent.eventually("the baseline to be learnt", SOON, || {
        Ok(
            (agent.status()?.pointer("/engine/normal/learnt") == Some(&json!("recent")))
                .then_some(()),
        )
    })?;

    let attacker = client_v4(666);
    let attack = Traffic::attack(&lab, &[attacker], "/", 100.0)?;
    let ban = agent.event("ban", &subject(attacker), 1, SOON)?;
    let finding = &ban["finding"];
    assert_ne!(finding["test"], "ceiling", "learnt figures decide: {ban}");
    let (rate, mean) = (
        finding["rate"].as_f64().unwrap(),
        finding["mean"].as_f64().unwrap(),
    );
    assert!(rate > mean && mean > 3.0, "{ban}");
    assert_eq!((&ban["tier"], length_secs(&ban)?), (&json!(1), 600));

    // What was under way has timed out once a few have.
    eventually("requests to time out", SOON, || {
        Ok((attack.count().failed >= 5).then_some(()))
    })?;
    let (before, people_before) = (attack.count(), legitimate.count());
    let dropped = lab.pins().counter(Counter::Dropped)?;
    eventually("a hundred more packets to be dropped", SOON, || {
        Ok((lab.pins().counter(Counter::Dropped)? >= dropped + 100).then_some(()))
    })?;
    assert_eq!(
        attack.count().answered,
        before.answered,
        "the attacker still gets answers"
    );
    assert!(
        legitimate.count().answered > people_before.answered,
        "the others get none"
    );
    assert_eq!(legitimate.first_failure(), None);
    let entry = lab.pins().ban_v4(v4(attacker)?)?.context("no entry")?;
    assert!(entry.hits >= 100, "{entry:?}");
    assert_eq!(agent.bans()?.len(), 1);
    Ok(())
}

#[test]
fn a_ban_comes_with_the_request_that_is_one_too_many_and_no_earlier() -> Result<()> {
    let mut site = Site::new(|_| {})?;
    let (source, allowance) = (client_v4(1), site.agent.config().allowance());
    site.log.requests(source, allowance)?;
    site.has_read(allowance)?;
    assert_eq!(site.agent.bans()?, Vec::<Value>::new());
    site.log.requests(source, 1)?;
    let ban = site.agent.event("ban", &subject(source), 1, SOON)?;
    assert_eq!(ban["finding"]["requests"], allowance + 1, "{ban}");
    site.is_dropped(source)
}

#[test]
fn a_scanner_and_a_guesser_are_dropped_long_before_their_rate_tells_and_a_visitor_is_not()
-> Result<()> {
    let lab = Lab::new()?;
    let nginx = Nginx::start(&lab)?;
    let mut config = Config::new(nginx.log());
    config.additions = true;
    config.window_secs = 60;
    let agent = Agent::start(&lab, &config)?;
    let (scanner, guesser, visitor) = (client_v4(1), client_v4(2), client_v6(3, 1));
    // Who is banned for it may not see the end of the last answer.
    let ask = |client, path: &str| drop(lab.get(client, path, ANSWER));
    for n in 0..10 {
        ask(scanner, &format!("/missing/{n}.php"));
        ask(visitor, "/");
        ask(visitor, "/logo.png");
        ask(visitor, "/missing/page");
    }
    // What is refused at once counts once, so it takes its time.
    let guesses = Traffic::attack(&lab, &[guesser], "/login", 3.0)?;
    for (client, words) in [
        (scanner, "10 of 10 answers failed"),
        (guesser, "5 of 5 answers failed"),
    ] {
        let ban = agent.event("ban", &subject(client), 1, SOON)?;
        let condition = ban["condition"].as_str().unwrap_or_default();
        ensure!(condition.contains(words), "{ban}");
        let log = ban["finding"]["samples"][0]["log"].as_str();
        ensure!(log == nginx.log().to_str(), "{ban}");
        ensure!(lab.get(client, "/", ANSWER).is_err(), "{client}");
    }
    ensure!(lab.get(visitor, "/", ANSWER)? == 200, "the visitor is out");
    drop(guesses);
    Ok(())
}

#[test]
fn at_the_end_of_a_ban_the_next_packet_passes() -> Result<()> {
    let mut site = Site::new(|config| config.schedule = vec!["2s", "10m"])?;
    let source = client_v4(1);
    let ban = site.offend(source, 1)?;
    site.is_dropped(source)?;
    let unban = site.agent.event("unban", &subject(source), 1, SOON)?;
    assert!(!site.in_map(source)?, "the entry is still there");
    assert!(site.answers(source), "{}", site.agent.evidence());
    let lasted = unban["time"].as_u64().unwrap() - ban["time"].as_u64().unwrap();
    assert!((2000..4000).contains(&lasted), "{lasted} ms");
    Ok(())
}

#[test]
fn a_source_that_goes_on_is_kept_out_for_longer_and_released_when_it_has_stopped() -> Result<()> {
    let site = Site::new(|config| {
        config.schedule = vec!["4s", "10m"];
        config.quiet_secs = 1;
    })?;
    let source = client_v4(1);
    let attack = Traffic::attack(&site.lab, &[source], "/", 50.0)?;
    let ban = site.agent.event("ban", &subject(source), 1, SOON)?;
    let extended = site.agent.event("extend", &subject(source), 1, SOON)?;
    drop(attack);
    let condition = extended["condition"].as_str().unwrap_or_default();
    ensure!(condition.starts_with("still sending"), "{extended}");
    site.is_dropped(source)?;
    let unban = site.agent.event("unban", &subject(source), 1, SOON)?;
    ensure!(unban["condition"] == "its time is over", "{unban}");
    ensure!(site.answers(source), "{}", site.agent.evidence());
    let lasted = unban["time"].as_u64().unwrap() - ban["time"].as_u64().unwrap();
    ensure!(lasted >= 8000, "{lasted} ms");
    ensure!(
        site.agent.events("ban", &subject(source))?.len() == 1,
        "one offence"
    );
    Ok(())
}

#[test]
fn what_an_operator_allows_passes_at_once_and_after_a_restart() -> Result<()> {
    let mut site = Site::new(|_| {})?;
    let source = client_v4(1);
    let name = source.to_string();
    site.offend(source, 1)?;
    site.is_dropped(source)?;
    let check = |site: &Site| site.agent.verb(&["allow", "check", &name]);
    ensure!(check(&site)?.code == Some(1), "it can be banned");
    let words = ["allow", "add", "198.19.0.0/24", "--reason", "our monitor"];
    let added = site.agent.verb(&words)?.success()?;
    ensure!(added.contains("1 ban lifted"), "{added}");
    ensure!(site.answers(source), "{}", site.agent.evidence());
    // Bans around it spare it, in the kernel, too.
    site.agent.verb(&["ban", "198.19.0.0/16"])?.success()?;
    ensure!(site.answers(source), "{}", site.agent.evidence());
    let config = site.agent.config().clone();
    site.agent.terminate(SOON)?;
    site.agent = Agent::start(&site.lab, &config)?;
    ensure!(site.answers(source), "{}", site.agent.evidence());
    ensure!(check(&site)?.code == Some(0), "it cannot be banned");
    let list = site.agent.verb(&["allow", "list"])?.success()?;
    ensure!(
        list.contains("198.19.0.0/24") && list.contains("our monitor (root"),
        "{list}"
    );
    let removed = site.agent.verb(&["allow", "remove", "198.19.0.0/24"])?;
    removed.success()?;
    site.is_dropped(source)?;
    let again = site.agent.verb(&["allow", "remove", "198.19.0.0/24"])?;
    ensure!(again.code == Some(1), "{again:?}");
    ensure!(again.stderr.contains("by no operator's word"), "{again:?}");
    Ok(())
}

#[test]
fn a_ban_on_approval_is_rolled_back_unless_it_is_confirmed() -> Result<()> {
    let site = Site::new(|_| {})?;
    let (kept, not) = (client_v4(1), client_v4(2));
    for source in [kept, not] {
        let name = source.to_string();
        site.agent
            .verb(&["ban", &name, "--confirm", "3s"])?
            .success()?;
        site.is_dropped(source)?;
    }
    site.agent
        .verb(&["confirm", &kept.to_string()])?
        .success()?;
    let unban = site.agent.event("unban", &subject(not), 1, SOON)?;
    ensure!(unban["condition"] == "nobody has confirmed it", "{unban}");
    ensure!(site.answers(not), "{}", site.agent.evidence());
    site.is_dropped(kept)?;
    let again = site.agent.verb(&["confirm", &kept.to_string()])?;
    ensure!(again.stderr.contains("needs no confirmation"), "{again:?}");
    Ok(())
}

#[test]
fn a_second_offence_is_banned_for_longer_even_after_a_restart() -> Result<()> {
    let mut site = Site::new(|config| config.schedule = vec!["1s", "20m", "permanent"])?;
    let source = client_v4(1);
    let first = site.offend(source, 1)?;
    assert_eq!((&first["tier"], length_secs(&first)?), (&json!(1), 1));
    site.agent.event("unban", &subject(source), 1, SOON)?;
    let config = site.agent.config().clone();
    site.agent.terminate(SOON)?;
    site.agent = Agent::start(&site.lab, &config)?;
    let second = site.offend(source, 2)?;
    assert_eq!((&second["tier"], length_secs(&second)?), (&json!(2), 1200));
    Ok(())
}

fn a_ban_outlives(end: impl FnOnce(&mut Agent) -> Result<()>) -> Result<()> {
    let mut site = Site::new(|_| {})?;
    let (source, other) = (client_v4(1), client_v4(2));
    site.offend(source, 1)?;
    site.is_dropped(source)?;
    let config = site.agent.config().clone();
    let ban = site.agent.bans()?.pop().context("no ban")?;
    let attack = Traffic::attack(&site.lab, &[source], "/", 100.0)?;
    let (dropped, pins) = (site.lab.pins().counter(Counter::Dropped)?, site.lab.pins());
    let more = |packets: u64| {
        eventually(&format!("{packets} packets to be dropped"), SOON, || {
            Ok((pins.counter(Counter::Dropped)? >= dropped + packets).then_some(()))
        })
    };
    more(50)?;

    end(&mut site.agent)?;
    more(100).context("without an agent")?;
    assert!(site.answers(other), "the gate is closed for everybody");

    site.agent = Agent::start(&site.lab, &config)?;
    more(200).context("with a new agent")?;
    assert!(site.answers(other), "the gate is closed for everybody");
    let kept = site.agent.bans()?;
    assert_eq!(kept.len(), 1, "{kept:?}");
    for key in ["subject", "tier", "term", "reason"] {
        assert_eq!(kept[0][key], ban[key], "{key}");
    }
    assert_eq!(
        attack.stop().answered,
        0,
        "a packet slipped past during the restart"
    );
    // And it is the new agent's to lift.
    site.agent.verb(&["unban", &subject(source)])?.success()?;
    assert!(site.answers(source), "{}", site.agent.evidence());
    Ok(())
}

#[test]
fn a_ban_outlives_an_agent_that_is_stopped() -> Result<()> {
    a_ban_outlives(|agent| agent.terminate(SOON).map(|_status| ()))
}

#[test]
fn a_ban_outlives_an_agent_that_is_killed() -> Result<()> {
    a_ban_outlives(Agent::kill)
}

#[test]
fn a_ban_ends_on_time_although_the_agent_is_dead() -> Result<()> {
    let mut site = Site::new(|config| config.schedule = vec!["3s"])?;
    let source = client_v4(1);
    site.offend(source, 1)?;
    site.agent.kill()?;
    site.is_dropped(source)?;
    eventually("the next request to be answered", SOON, || {
        Ok(site.answers(source).then_some(()))
    })?;
    assert!(site.in_map(source)?, "nobody has deleted the entry");
    assert!(site.lab.pins().counter(Counter::Expired)? > 0);
    Ok(())
}

#[test]
fn what_was_logged_while_the_agent_was_away_is_read_when_it_returns() -> Result<()> {
    let mut site = Site::new(|config| config.window_secs = 60)?;
    let config = site.agent.config().clone();
    site.log.requests(client_v4(1), 1)?;
    site.has_read(1)?;
    site.agent.terminate(SOON)?;
    site.log.requests(client_v4(2), config.allowance() + 1)?;
    site.agent = Agent::start(&site.lab, &config)?;
    site.agent.event("ban", &subject(client_v4(2)), 1, SOON)?;
    assert_eq!(
        site.agent.figure("/engine/totals/lines")?,
        config.allowance() + 1,
        "and nothing is read twice"
    );
    Ok(())
}

#[test]
fn observe_mode_drops_nobody_and_counts_what_it_would_drop() -> Result<()> {
    let mut site = Site::new(|config| config.mode = "observe")?;
    let source = client_v4(1);
    site.offend(source, 1)?;
    assert!(site.in_map(source)?);
    assert!(site.answers(source), "{}", site.agent.evidence());
    let pins = site.lab.pins();
    assert!(pins.counter(Counter::WouldDrop)? > 0);
    assert_eq!(pins.counter(Counter::Dropped)?, 0);
    assert_eq!(site.agent.status()?["mode"], "observe");
    Ok(())
}

#[test]
fn an_attacker_on_the_allowlist_is_never_banned() -> Result<()> {
    let (source, peer) = (client_v4(0x0101), client_v4(0x0102));
    let mut site = Site::new(|config| config.allow = vec!["198.19.1.0/24".to_owned()])?;
    site.log.requests(source, 500)?;
    let refusal = site.agent.event("refuse", &subject(source), 1, SOON)?;
    assert!(
        refusal["condition"]
            .as_str()
            .unwrap()
            .contains("198.19.1.0/24"),
        "{refusal}"
    );
    let by_hand = site
        .agent
        .verb(&["ban", &peer.to_string(), "--for", "1h"])?;
    assert_eq!(by_hand.code, Some(1), "{by_hand:?}");
    assert!(by_hand.stderr.contains("allowlist"), "{by_hand:?}");
    for address in [source, peer] {
        assert!(!site.in_map(address)?, "{address}");
        assert!(site.answers(address), "{address}");
        assert_eq!(
            site.agent.events("ban", &subject(address))?,
            Vec::<Value>::new()
        );
    }
    Ok(())
}

#[test]
fn an_ipv6_attacker_that_rotates_inside_its_64_is_banned_as_one() -> Result<()> {
    let site = Site::new(|_| {})?;
    let rotating: Vec<_> = (1..=64).map(|host| client_v6(7, host)).collect();
    let attack = Traffic::attack(&site.lab, &rotating, "/", 100.0)?;
    let ban = site.agent.event("ban", "2001:db8:1:7::/64", 1, SOON)?;
    drop(attack);
    assert_eq!(
        ban["finding"]["requests"],
        site.agent.config().allowance() + 1,
        "{ban}"
    );
    site.is_dropped(client_v6(7, 0xffff))
        .context("an address of the /64 that was never seen")?;
    assert!(site.answers(client_v6(8, 1)), "the neighbouring /64");
    Ok(())
}

#[test]
fn lines_that_cannot_be_read_neither_stop_the_reader_nor_lose_their_neighbours() -> Result<()> {
    let mut site = Site::new(|_| {})?;
    let source = client_v4(1);
    let allowance = site.agent.config().allowance();
    let mut good = 0;
    let mut bytes = Vec::new();
    let long = format!("{}\n", "x".repeat(100_000));
    let bad: [&[u8]; 8] = [
        b"not JSON at all\n",
        b"{\"timestamp\":\"1\",\"source_ip\":\n",
        b"\xff\xfe\x00\x80\n",
        b"{}\n",
        b"[1,2,3]\n",
        b"{\"timestamp\":\"1\",\"source_ip\":\"unix:\",\"status\":\"200\"}\n",
        b"{\"timestamp\":\"soon\",\"source_ip\":\"198.19.0.1\",\"status\":\"200\"}\n",
        long.as_bytes(),
    ];
    for line in bad {
        bytes.extend_from_slice(log::line(source, 200).as_bytes());
        bytes.extend_from_slice(line);
        good += 1;
    }
    // A line that comes in two halves is one line.
    let half = log::line(source, 200);
    let (head, tail) = half.split_at(half.len() / 2);
    bytes.extend_from_slice(head.as_bytes());
    site.log.append(&bytes)?;
    site.has_read(good)?;
    site.log.append(tail.as_bytes())?;
    good += 1;
    site.has_read(good)?;
    assert_eq!(site.agent.bans()?, Vec::<Value>::new());
    let status = site.agent.status()?;
    // The over-long line need not be counted as malformed.
    let malformed = status
        .pointer("/engine/totals/malformed")
        .and_then(Value::as_u64);
    assert!(malformed.is_some_and(|n| (7..=8).contains(&n)), "{status}");

    site.log.requests(source, allowance - good)?;
    site.has_read(allowance)?;
    assert_eq!(site.agent.bans()?, Vec::<Value>::new());
    site.log.requests(source, 1)?;
    site.agent.event("ban", &subject(source), 1, SOON)?;
    Ok(())
}

#[test]
fn a_client_cannot_get_another_address_banned_nor_hide_its_own() -> Result<()> {
    let site = Site::new(|_| {})?;
    let (attacker, victim) = (client_v4(1), client_v4(2));
    let path = "/?\",\"source_ip\":\"198.19.0.2\",\"x\":\"\\x22\u{ff}";
    let attack = Traffic::attack(&site.lab, &[attacker], path, 100.0)?;
    site.agent.event("ban", &subject(attacker), 1, SOON)?;
    drop(attack);
    assert_eq!(site.agent.figure("/engine/totals/malformed")?, 0);
    assert!(site.answers(victim));
    assert_eq!(site.agent.bans()?.len(), 1);
    Ok(())
}

#[test]
fn a_slack_that_is_down_or_hangs_delays_no_ban() -> Result<()> {
    let lab = Lab::new()?;
    let (nginx, sink) = (Nginx::start(&lab)?, Sink::start(&lab)?);
    let agent = Agent::start(
        &lab,
        &Config {
            webhook: Some(sink.url()),
            ..Config::new(nginx.log())
        },
    )?;
    let mut log = Appender::open(nginx.log())?;
    for (number, mood) in (0..).zip([Mood::Down, Mood::Hung, Mood::Broken, Mood::Busy]) {
        sink.set_mood(mood);
        for offender in (0..5).map(|n| client_v4(0x100 * (number + 1) + n)) {
            log.requests(offender, agent.config().allowance() + 1)?;
            let start = clock::now();
            agent.eventually(&format!("a ban while Slack is {mood:?}"), SOON, || {
                lab.pins().ban_v4(v4(offender)?)
            })?;
            let took = clock::since(start);
            assert!(
                took < Duration::from_secs(1),
                "{took:?} while Slack is {mood:?}"
            );
        }
    }
    assert_eq!(agent.bans()?.len(), 20);
    Ok(())
}

#[test]
fn slack_is_told_once_it_is_back() -> Result<()> {
    let lab = Lab::new()?;
    let (nginx, sink) = (Nginx::start(&lab)?, Sink::start(&lab)?);
    let agent = Agent::start(
        &lab,
        &Config {
            webhook: Some(sink.url()),
            ..Config::new(nginx.log())
        },
    )?;
    sink.set_mood(Mood::Busy);
    let source = client_v4(1);
    Appender::open(nginx.log())?.requests(source, agent.config().allowance() + 1)?;
    agent.eventually("a message to be turned away", SOON, || {
        Ok(sink
            .messages()
            .iter()
            .any(|message| message.status == Some(429))
            .then_some(()))
    })?;
    sink.set_mood(Mood::Well);
    let message = agent.eventually("a message about the ban", SOON, || {
        let names = source.to_string();
        let mut messages = sink.messages().into_iter();
        Ok(messages.find(|message| {
            message.status == Some(200) && message.body.to_string().contains(&names)
        }))
    })?;
    assert!(
        message
            .headline()
            .is_some_and(|headline| headline.len() <= 150),
        "{}",
        message.body
    );
    assert!(
        !agent.log().contains("secret-of-the-lab"),
        "the webhook's address is in the log"
    );
    Ok(())
}

#[test]
fn a_second_agent_refuses_to_start_and_the_first_goes_on() -> Result<()> {
    let mut site = Site::new(|_| {})?;
    let mut second = Agent::launch(&site.lab, site.agent.config())?;
    let status = second.wait(SOON)?;
    assert_eq!(status.code(), Some(75), "{}", second.evidence());
    assert!(
        second.log().contains("another agent"),
        "{}",
        second.evidence()
    );
    site.offend(client_v4(1), 1)?;
    site.is_dropped(client_v4(1))
}

#[test]
fn an_agent_with_another_ledger_refuses_before_it_touches_a_ban() -> Result<()> {
    let mut site = Site::new(|_| {})?;
    site.offend(client_v4(1), 1)?;
    let other = Config {
        state: "other-state",
        ..site.agent.config().clone()
    };
    let mut second = Agent::launch(&site.lab, &other)?;
    assert_eq!(second.wait(SOON)?.code(), Some(75), "{}", second.evidence());
    assert_eq!(site.agent.figure("/drift/missing")?, 0);
    site.is_dropped(client_v4(1))
}

#[test]
fn a_start_that_fails_leaves_in_force_what_an_earlier_run_had_attached() -> Result<()> {
    let mut site = Site::new(|_| {})?;
    site.offend(client_v4(1), 1)?;
    site.agent.terminate(SOON)?;
    let wrong = Config {
        interfaces: vec![EDGE_INTERFACE, "nowhere0"],
        backends: vec!["xdp-native", "xdp-generic"],
        ..site.agent.config().clone()
    };
    let mut second = Agent::launch(&site.lab, &wrong)?;
    assert_eq!(second.wait(SOON)?.code(), Some(69), "{}", second.evidence());
    assert!(
        second.log().contains("no interface nowhere0"),
        "{}",
        second.evidence()
    );
    site.is_dropped(client_v4(1))
}

#[test]
fn a_history_that_cannot_be_written_delays_neither_a_ban_nor_the_end() -> Result<()> {
    let lab = Lab::new()?;
    let nginx = Nginx::start(&lab)?;
    let config = Config::new(nginx.log());
    let state = lab.dir().join(config.state);
    fs::create_dir(&state)?;
    std::os::unix::fs::symlink("/dev/full", state.join("history.jsonl"))?;
    let mut agent = Agent::start(&lab, &config)?;
    Appender::open(nginx.log())?.requests(client_v4(1), config.allowance() + 1)?;
    agent.eventually("the ban", SOON, || {
        Ok(lab.get(client_v4(1), "/", ANSWER).is_err().then_some(()))
    })?;
    assert_eq!(agent.terminate(SOON)?.code(), Some(0));
    assert!(agent.log().contains("cannot write"), "{}", agent.evidence());
    Ok(())
}

#[test]
fn a_file_in_the_control_socket_s_place_is_not_removed() -> Result<()> {
    let lab = Lab::new()?;
    let nginx = Nginx::start(&lab)?;
    fs::write(lab.dir().join("control.sock"), "precious")?;
    let mut agent = Agent::launch(&lab, &Config::new(nginx.log()))?;
    assert_eq!(agent.wait(SOON)?.code(), Some(1), "{}", agent.evidence());
    assert_eq!(
        fs::read_to_string(lab.dir().join("control.sock"))?,
        "precious"
    );
    Ok(())
}

#[test]
fn load_keeps_its_hands_off_what_an_agent_works_with() -> Result<()> {
    let mut site = Site::new(|_| {})?;
    site.offend(client_v4(1), 1)?;
    let pins = site.lab.pin_dir();
    let pins = pins.to_string_lossy();
    for extra in [&[][..], &["--detach"]] {
        let words = ["load", "--interface", EDGE_INTERFACE, "--pin-dir", &*pins];
        let answer = agent::plain(&site.lab, &[&words, extra].concat())?;
        assert!(
            answer.code == Some(75) && answer.stderr.contains("stop the agent first"),
            "{answer:?}"
        );
    }
    site.is_dropped(client_v4(1))
}

#[test]
fn from_observe_to_enforce_nobody_is_kept_out_for_what_was_only_observed() -> Result<()> {
    let mut site = Site::new(|config| config.mode = "observe")?;
    site.offend(client_v4(1), 1)?;
    let by_hand = site.agent.verb(&["ban", "198.19.9.0/24"])?.success()?;
    assert!(
        by_hand.contains("only observed: its packets are counted"),
        "{by_hand}"
    );
    site.agent.terminate(SOON)?;
    let enforce = Config {
        mode: "enforce",
        ..site.agent.config().clone()
    };
    site.agent = Agent::start(&site.lab, &enforce)?;
    assert!(site.answers(client_v4(1)), "{}", site.agent.evidence());
    site.is_dropped(client_v4(0x0909))?;
    assert!(
        site.agent
            .log()
            .contains("1 bans and the offences of 1 sources"),
        "{}",
        site.agent.evidence()
    );
    let ban = site.offend(client_v4(1), 2)?;
    assert_eq!(ban["tier"], 1, "the schedule starts anew");
    Ok(())
}

#[test]
fn a_log_that_cannot_be_watched_is_said_before_the_kernel_is_touched() -> Result<()> {
    let lab = Lab::new()?;
    let config = Config::new(&lab.dir().join("absent/access.json"));
    let mut agent = Agent::launch(&lab, &config)?;
    assert_eq!(agent.wait(SOON)?.code(), Some(1), "{}", agent.evidence());
    assert_eq!(kernel::xdp_mode(lab.edge(), EDGE_INTERFACE)?, None);
    Ok(())
}

#[test]
fn drops_shows_packets_of_banned_sources_as_they_come() -> Result<()> {
    let mut site = Site::new(|_| {})?;
    site.offend(client_v4(1), 1)?;
    site.offend(client_v6(1, 1), 1)?;
    for source in [client_v4(1), client_v6(1, 1)] {
        site.is_dropped(source)?;
    }
    let pins = site.lab.pin_dir();
    let pins = pins.to_string_lossy();
    let words = [
        "drops",
        "--all",
        "--count",
        "2",
        "--json",
        "--pin-dir",
        &*pins,
    ];
    let shown = agent::plain(&site.lab, &words)?.success()?;
    let rows = shown
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<Vec<Value>, _>>()?;
    assert_eq!(rows.len(), 2, "{shown}");
    for row in &rows {
        assert_eq!(
            (&row["interface"], &row["verdict"]),
            (&json!(EDGE_INTERFACE), &json!("dropped")),
            "{shown}"
        );
    }
    assert_eq!(rows[0]["source"], json!(client_v4(1).to_string()));
    Ok(())
}

#[test]
fn another_version_s_program_is_replaced_without_a_gap() -> Result<()> {
    let mut site = Site::new(|_| {})?;
    site.offend(client_v4(1), 1)?;
    site.agent.terminate(SOON)?;
    // As if it had been pinned by a version with another layout of maps.
    let pins = site.lab.pin_dir();
    fs::rename(pins.join("v1"), pins.join("v0"))?;
    assert!(!site.answers(client_v4(1)));
    let attack = Traffic::attack(&site.lab, &[client_v4(1)], "/", 100.0)?;
    let config = site.agent.config().clone();
    site.agent = Agent::start(&site.lab, &config)?;
    site.is_dropped(client_v4(1))?;
    assert_eq!(attack.stop().answered, 0, "{}", site.agent.evidence());
    assert!(pins.join("v1/links").exists() && !pins.join("v0").exists());
    Ok(())
}

fn the_whole_job_with(backend: &'static str) -> Result<()> {
    let mut site = Site::new(|config| {
        config.backends = vec![backend];
        config.schedule = vec!["4s", "10m"];
    })?;
    assert_eq!(site.agent.status()?["backend"], backend);
    for (number, source) in [client_v4(1), client_v6(1, 1)].into_iter().enumerate() {
        assert!(site.answers(source));
        site.offend(source, 1)?;
        assert!(!site.answers(source), "{source} gets an answer");
        assert!(
            site.answers(client_v4(2)) && site.answers(client_v6(2, 1)),
            "others get none"
        );
        let hits = site
            .agent
            .bans()?
            .iter()
            .map(|ban| ban["hits"].as_u64().unwrap_or(0))
            .sum::<u64>();
        assert!(hits > 0, "no packet matched the ban of {source}");
        let dropped = site.agent.figure("/counters/dropped")?;
        assert!(dropped > number as u64, "{dropped} packets dropped");
        site.agent.event("unban", &subject(source), 1, SOON)?;
        assert!(
            site.answers(source),
            "{source} gets no answer after its ban"
        );
        let second = site.offend(source, 2)?;
        assert_eq!(second["tier"], 2);
        assert!(!site.answers(source), "{source} gets an answer");
    }
    Ok(())
}

#[test]
fn native_xdp_does_the_whole_job() -> Result<()> {
    the_whole_job_with("xdp-native")
}

#[test]
fn generic_xdp_does_the_whole_job() -> Result<()> {
    the_whole_job_with("xdp-generic")
}

#[test]
fn iptables_does_the_whole_job() -> Result<()> {
    the_whole_job_with("iptables")
}

#[test]
fn bans_by_iptables_outlive_the_agent_until_they_are_detached() -> Result<()> {
    let mut site = Site::new(|config| config.backends = vec!["iptables"])?;
    let sources = [client_v4(1), client_v6(1, 1)];
    for source in sources {
        site.offend(source, 1)?;
    }
    site.agent.kill()?;
    for source in sources {
        assert!(!site.answers(source), "{source} gets an answer");
    }
    agent::detach(&site.lab)?.success()?;
    for source in sources {
        assert!(site.answers(source), "{source} gets no answer");
    }
    for (program, arguments) in [
        ("iptables", &["-S"][..]),
        ("ip6tables", &["-S"]),
        ("ipset", &["list", "-n"]),
    ] {
        let left = printed(&site.lab, program, arguments)?;
        assert!(
            !left.to_lowercase().contains("portcullis"),
            "{program}: {left}"
        );
    }
    Ok(())
}

#[test]
fn detach_takes_everything_out_of_the_kernel() -> Result<()> {
    let mut site = Site::new(|_| {})?;
    assert_eq!(
        kernel::xdp_mode(site.lab.edge(), EDGE_INTERFACE)?,
        Some("native")
    );
    let source = client_v4(1);
    site.offend(source, 1)?;
    site.agent.terminate(SOON)?;
    agent::detach(&site.lab)?.success()?;
    assert_eq!(kernel::xdp_mode(site.lab.edge(), EDGE_INTERFACE)?, None);
    assert!(site.answers(source));
    let pins = site.lab.pin_dir();
    assert!(
        !pins.exists() || fs::read_dir(&pins)?.next().is_none(),
        "pins are left"
    );
    agent::detach(&site.lab)?
        .success()
        .context("a second time")?;
    Ok(())
}

#[test]
fn an_entry_that_somebody_deleted_is_put_back() -> Result<()> {
    let mut site = Site::new(|_| {})?;
    let source = client_v4(1);
    site.offend(source, 1)?;
    site.lab.pins().bans_v4()?.remove(&v4(source)?.octets())?;
    site.agent.eventually("the entry to come back", SOON, || {
        Ok(site.in_map(source)?.then_some(()))
    })?;
    site.is_dropped(source)
}

#[test]
fn iptables_rules_that_somebody_flushed_are_put_back() -> Result<()> {
    let mut site = Site::new(|config| config.backends = vec!["iptables"])?;
    let sources = [client_v4(1), client_v6(1, 1)];
    for source in sources {
        site.offend(source, 1)?;
    }
    for program in ["iptables", "ip6tables"] {
        printed(&site.lab, program, &["-F"])?;
    }
    printed(&site.lab, "ipset", &["flush"])?;
    for source in sources {
        site.agent
            .eventually(&format!("{source} to be kept out again"), SOON, || {
                Ok((!site.answers(source)).then_some(()))
            })?;
    }
    Ok(())
}

#[test]
fn another_program_on_the_interface_stays_and_the_next_back_end_does_the_job() -> Result<()> {
    let lab = Lab::new()?;
    let nginx = Nginx::start(&lab)?;
    // It is our own program, but neither the agent's link nor its pins.
    let other = lab.dir().join("bpf/other");
    let load = |extra: &[&str]| {
        let mut command = Command::new(agent::binary()?);
        command
            .args([
                "load",
                "--interface",
                EDGE_INTERFACE,
                "--mode",
                "native",
                "--pin-dir",
            ])
            .arg(&other)
            .args(extra)
            .stdout(Stdio::null());
        let status = lab.edge().spawn(&mut command)?.wait()?;
        ensure!(status.success(), "portcullis load: {status}");
        Ok(())
    };
    load(&[])?;
    let agent = Agent::start(&lab, &Config::new(nginx.log()))?;
    let status = agent.status()?;
    assert_eq!(status["backend"], "iptables", "{status}");
    let why = status["refused"].to_string();
    assert!(
        why.contains("xdp-native") && why.contains("xdp-generic"),
        "{status}"
    );
    assert_eq!(
        kernel::xdp_mode(lab.edge(), EDGE_INTERFACE)?,
        Some("native"),
        "the other program is gone"
    );
    Appender::open(nginx.log())?.requests(client_v4(1), agent.config().allowance() + 1)?;
    agent.event("ban", &subject(client_v4(1)), 1, SOON)?;
    assert!(lab.get(client_v4(1), "/", ANSWER).is_err());
    load(&["--detach"])
}

#[test]
fn rotating_the_log_loses_no_line() -> Result<()> {
    let site = Site::new(|_| {})?;
    let before = fs::read_to_string(site.nginx.log())?.lines().count() as u64;
    // Too many sources for any to be flagged.
    let crowd: Vec<_> = (0..500).map(|n| client_v4(0x1000 + n)).collect();
    let traffic = Traffic::attack(&site.lab, &crowd, "/", 150.0)?;
    for round in 1..=3 {
        let target = traffic.count().answered + 100;
        eventually("a hundred more answers", SOON, || {
            Ok((traffic.count().answered >= target).then_some(()))
        })?;
        fs::rename(
            site.nginx.log(),
            site.nginx.log().with_extension(format!("json.{round}")),
        )?;
        // Until it is told, Nginx goes on writing to the renamed file.
        pause(Duration::from_millis(200))?;
        site.nginx.reopen_logs()?;
    }
    let target = traffic.count().answered + 100;
    eventually("a hundred more answers", SOON, || {
        Ok((traffic.count().answered >= target).then_some(()))
    })?;
    let count = traffic.stop();
    assert_eq!(count.failed, 0);
    site.has_read(count.answered)?;
    assert_eq!(site.agent.figure("/engine/totals/malformed")?, 0);

    let written = (1..=3)
        .map(|round| site.nginx.log().with_extension(format!("json.{round}")))
        .chain([site.nginx.log().to_owned()])
        .map(|path| Ok(fs::read_to_string(path)?.lines().count() as u64))
        .sum::<Result<u64>>()?;
    assert_eq!(
        written,
        count.answered + before,
        "what Nginx itself has written"
    );
    Ok(())
}

#[test]
fn bans_by_hand_take_effect_at_once_and_exit_codes_tell() -> Result<()> {
    let site = Site::new(|_| {})?;
    let source = client_v4(1);
    let name = source.to_string();
    let verb = |words: &[&str]| site.agent.verb(words);

    verb(&["ban", &name, "--for", "1h", "--reason", "a test"])?.success()?;
    site.is_dropped(source)?;
    let ban = site.agent.bans()?.pop().context("no ban")?;
    assert_eq!(
        (&ban["subject"], &ban["reason"], &ban["origin"]),
        (&json!(name), &json!("a test"), &json!("operator"))
    );
    assert!(verb(&["bans"])?.success()?.contains(&name));

    verb(&["unban", &name])?.success()?;
    assert!(site.answers(source), "{}", site.agent.evidence());
    let again = verb(&["unban", &name])?;
    assert!(
        again.code == Some(1) && again.stderr.contains("not banned"),
        "{again:?}"
    );

    let nonsense = verb(&["ban", "everybody"])?;
    assert!(
        nonsense.code == Some(64) && nonsense.stderr.contains("everybody"),
        "{nonsense:?}"
    );

    // Prefixes, and all at once.
    verb(&["ban", "198.19.2.0/24", "--for", "1h"])?.success()?;
    verb(&["ban", "2001:db8:1:2::/64", "--for", "1h"])?.success()?;
    assert!(!site.answers(client_v4(0x0203)) && !site.answers(client_v6(2, 3)));
    assert!(site.answers(client_v4(0x0303)) && site.answers(client_v6(3, 3)));
    verb(&["unban", "--all"])?.success()?;
    assert!(site.answers(client_v4(0x0203)) && site.answers(client_v6(2, 3)));
    assert_eq!(site.agent.bans()?, Vec::<Value>::new());

    let lab = site.lab.clone();
    drop(site);
    let nobody = agent::verb(&lab, &["status"])?;
    assert!(
        nobody.code == Some(69) && nobody.stderr.contains("is the agent running?"),
        "{nobody:?}"
    );
    Ok(())
}

#[test]
fn a_ban_that_is_only_observed_counts_and_spares_no_attacker() -> Result<()> {
    let mut site = Site::new(|_| {})?;
    let said = site
        .agent
        .verb(&["ban", "198.19.0.0/16", "--observe"])?
        .success()?;
    assert!(said.contains("counted, not dropped"), "{said}");
    let honest = client_v4(7);
    assert!(site.answers(honest), "{}", site.agent.evidence());
    eventually("its packets to be counted", SOON, || {
        let ban = site.agent.bans()?.pop().context("no ban")?;
        Ok((ban["hits"].as_u64() > Some(0) && ban["observe"] == true).then_some(()))
    })?;
    let shown = site.agent.verb(&["bans"])?.success()?;
    assert!(shown.contains("operator, observed"), "{shown}");
    // Whoever attacks from there is banned all the same.
    let attacker = client_v4(1);
    site.offend(attacker, 1)?;
    site.is_dropped(attacker)?;
    assert!(site.answers(honest));
    let would_ban = site
        .agent
        .history()?
        .into_iter()
        .find(|event| event["observe"] == true);
    assert_eq!(would_ban.context("not on record")?["action"], "ban");
    Ok(())
}

#[test]
fn sigterm_ends_the_agent_with_exit_code_0_within_seconds() -> Result<()> {
    let mut site = Site::new(|_| {})?;
    site.offend(client_v4(1), 1)?;
    let status = site.agent.terminate(Duration::from_secs(5))?;
    assert_eq!(status.code(), Some(0));
    let last = site.agent.history()?.pop().context("no history")?;
    assert_eq!(last["action"], "stop", "{last}");
    Ok(())
}

#[test]
fn a_slack_that_hangs_does_not_keep_the_agent_from_ending() -> Result<()> {
    let lab = Lab::new()?;
    let (nginx, sink) = (Nginx::start(&lab)?, Sink::start(&lab)?);
    sink.set_mood(Mood::Hung);
    let mut agent = Agent::start(
        &lab,
        &Config {
            webhook: Some(sink.url()),
            ..Config::new(nginx.log())
        },
    )?;
    let mut log = Appender::open(nginx.log())?;
    for offender in (1..=5).map(client_v4) {
        log.requests(offender, agent.config().allowance() + 1)?;
        agent.event("ban", &subject(offender), 1, SOON)?;
    }
    let status = agent.terminate(Duration::from_secs(8))?;
    assert_eq!(status.code(), Some(0));
    Ok(())
}

#[test]
fn a_wrong_configuration_is_refused_with_exit_code_64_and_all_its_faults() -> Result<()> {
    let lab = Lab::new()?;
    let mut config = Config::new(&lab.dir().join("access.json"));
    (config.mode, config.start) = ("on", "middle");
    let mut agent = Agent::launch(&lab, &config)?;
    let status = agent.wait(SOON)?;
    assert_eq!(status.code(), Some(64));
    for fault in ["mode", "source.start"] {
        assert!(
            agent.log().contains(fault),
            "{fault} is not in: {}",
            agent.log()
        );
    }
    assert_eq!(kernel::xdp_mode(lab.edge(), EDGE_INTERFACE)?, None);
    Ok(())
}
