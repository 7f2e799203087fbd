//! The ten steps.

use std::{net::IpAddr, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use portcullis_common::stats::Counter;
use portcullis_tests::lab::{
    EDGE_INTERFACE, EDGE_V4, EDGE_V6, Lab,
    agent::{self, Agent, Config},
    client_v4, client_v6, clock, kernel, latency,
    log::Appender,
    netns,
    nginx::Nginx,
    sink::Sink,
    traffic::Traffic,
    wait,
};
use serde_json::Value;

use crate::timeline::Timeline;

/// Requests a second of each legitimate client.
const LEGITIMATE: f64 = 1.5;
/// Requests a second of the attacker.
const ATTACK: f64 = 60.0;
/// First and second step of the ban schedule.
const SCHEDULE: [(&str, u64); 2] = [("6s", 6), ("15s", 15)];
/// How long the continued attack is watched while it is dropped.
const WATCH: Duration = Duration::from_secs(2);
/// An answer that takes longer is none.
const ANSWER: Duration = Duration::from_secs(1);
/// How long anything may take that should take a moment.
const SOON: Duration = Duration::from_secs(15);
/// The figures that the report is held against.
const MEDIAN_TARGET: Duration = Duration::from_millis(5);
const P99_TARGET: Duration = Duration::from_millis(50);

/// Everybody on the scene.
struct Scene {
    // Taken down in this order.
    agent: Agent,
    legitimate: Traffic,
    sink: Sink,
    nginx: Nginx,
    lab: Lab,
}

fn attacker() -> IpAddr {
    client_v4(0x4242)
}

/// Plays the whole piece.
///
/// # Errors
/// Why a step did not happen.
pub fn run(timeline: &mut Timeline, samples: usize, agent_log: bool) -> Result<()> {
    let mut scene = set_up(timeline)?;
    let names = [
        scene.lab.edge().name().to_owned(),
        scene.lab.world().name().to_owned(),
    ];
    let played = play(timeline, &mut scene, samples);
    if agent_log {
        timeline.quote("the agent's log", &scene.agent.log());
    }
    let evidence = played.is_err().then(|| scene.agent.evidence());
    drop(scene);
    let played = match evidence {
        Some(evidence) => played.map_err(|error| agent::with_evidence(&error, &evidence)),
        None => played,
    };
    played?;
    let left = netns::ip(&["netns", "list"])?;
    ensure!(
        !names.iter().any(|name| left.contains(name.as_str())),
        "a namespace was left behind: {left}"
    );
    timeline.note("namespaces, programs, mounts and files of the laboratory are gone");
    timeline.done("exit code 0 on SIGTERM; nothing left in the kernel");
    Ok(())
}

fn play(timeline: &mut Timeline, scene: &mut Scene, samples: usize) -> Result<()> {
    learn(timeline, scene)?;
    let attack = attack(timeline, scene)?;
    let ban = flagged(timeline, scene, &attack)?;
    dropped(timeline, scene, &attack)?;
    slack(timeline, scene, &ban)?;
    unbanned(timeline, scene, attack, &ban)?;
    second_offence(timeline, scene)?;
    latency_report(timeline, scene, samples)?;
    shut_down(timeline, scene)
}

fn set_up(timeline: &mut Timeline) -> Result<Scene> {
    timeline.step("a laboratory apart from this host");
    let lab = Lab::new()?;
    timeline.note(&format!(
        "namespaces {} and {}, joined by a virtual link ({EDGE_INTERFACE})",
        lab.edge().name(),
        lab.world().name()
    ));
    let nginx = Nginx::start(&lab)?;
    timeline.note(&format!(
        "{} answers on {EDGE_V4} and {EDGE_V6} and writes its JSON access log",
        Nginx::version()?
    ));
    let sink = Sink::start(&lab)?;
    timeline.note("a stand-in for Slack's webhook listens on the edge host's loopback");
    let people = [1, 2, 3, 4]
        .map(client_v4)
        .into_iter()
        .chain([1, 2].map(|network| client_v6(network, 1)));
    let people: Vec<_> = people.collect();
    let legitimate = Traffic::legitimate(&lab, &people, LEGITIMATE, 1)?;
    timeline.note(&format!(
        "{} legitimate clients (IPv4 and IPv6) come and go, {LEGITIMATE} requests a second each",
        people.len()
    ));
    let agent = Agent::start(
        &lab,
        &Config {
            window_secs: 10,
            span_secs: 60,
            warm_up_secs: 12,
            warm_up_ceiling_rps: 50.0,
            schedule: SCHEDULE
                .iter()
                .map(|(text, _)| *text)
                .chain(["permanent"])
                .collect(),
            webhook: Some(sink.url()),
            ..Config::new(nginx.log())
        },
    )?;
    let status = agent.status()?;
    let backend = text(&status, "/backend")?.to_owned();
    timeline.note(&format!(
        "the agent runs (process {}): mode {}, back end {backend}",
        agent.id(),
        text(&status, "/mode")?
    ));
    if backend.starts_with("xdp") {
        let mode = kernel::xdp_mode(lab.edge(), EDGE_INTERFACE)?;
        let mode = mode.context("the agent says xdp, but nothing is attached to the interface")?;
        timeline.note(&format!(
            "the kernel says: an XDP program is attached to {EDGE_INTERFACE}, {mode} mode"
        ));
    } else {
        bail!(
            "this kernel gives no XDP on a virtual link: the agent fell back to {backend}\n{}",
            agent.evidence()
        );
    }
    timeline.done(&format!("{}, agent with {backend}", Nginx::version()?));
    Ok(Scene {
        agent,
        legitimate,
        sink,
        nginx,
        lab,
    })
}

fn learn(timeline: &mut Timeline, scene: &Scene) -> Result<()> {
    timeline.step("what is normal on this site?");
    timeline
        .note("the demo's windows are 10 s and its warm-up 12 s (by default: 60 s and 5 min) …");
    let agent = &scene.agent;
    let mut told = clock::now();
    let normal = agent.eventually("the baseline to be learnt", Duration::from_mins(1), || {
        let status = agent.status()?;
        if clock::since(told) >= Duration::from_secs(5) {
            told = clock::now();
            let count = scene.legitimate.count();
            timeline.note(&format!(
                "learning; so far {} requests answered, {} failed",
                count.answered, count.failed
            ));
        }
        let normal = status
            .pointer("/engine/normal")
            .context("no /engine/normal in the status")?;
        Ok((normal["learnt"] != "warm_up").then(|| normal.clone()))
    })?;
    let (mean, stddev) = (number(&normal, "/mean")?, number(&normal, "/stddev")?);
    timeline.note(&format!(
        "mean {mean:.2} requests a second, standard deviation {stddev:.2}, from {} s of traffic",
        number(&normal, "/seconds")?
    ));
    let count = scene.legitimate.count();
    timeline.note(&format!(
        "so far {} requests answered, {} failed",
        count.answered, count.failed
    ));
    ensure!(
        mean > 1.0,
        "a mean of {mean} is the floor: the traffic was not seen"
    );
    no_harm(scene)?;
    timeline.done(&format!("mean {mean:.1} req/s, stddev {stddev:.1}"));
    Ok(())
}

fn attack(timeline: &mut Timeline, scene: &Scene) -> Result<Traffic> {
    let attacker = attacker();
    timeline.step(&format!(
        "{attacker} begins to make {ATTACK} requests a second"
    ));
    let attack = Traffic::attack(&scene.lab, &[attacker], "/", ATTACK)?;
    wait::eventually("the attacker's first ten answers", SOON, || {
        Ok((attack.count().answered >= 10).then_some(()))
    })?;
    timeline.note("its first requests are answered like everybody's");
    timeline.done(&format!("one source, {ATTACK} req/s"));
    Ok(attack)
}

fn flagged(timeline: &mut Timeline, scene: &Scene, attack: &Traffic) -> Result<Value> {
    timeline.step("the detector's verdict, as history.jsonl has it");
    let subject = attacker().to_string();
    let ban = scene.agent.event("ban", &subject, 1, SOON)?;
    let (_, first) = attack.first_request().context("the attack never began")?;
    let took = Duration::from_millis(millis(&ban, "/time")?.saturating_sub(first));
    timeline.note(&format!("{subject}: {}", text(&ban, "/condition")?));
    timeline.note(&format!(
        "{:.1} requests a second against a mean of {:.2} and a standard deviation of {:.2}: z = {:.1}",
        number(&ban, "/finding/rate")?,
        number(&ban, "/finding/mean")?,
        number(&ban, "/finding/stddev")?,
        number(&ban, "/finding/score")?,
    ));
    timeline.note(&format!(
        "{:.2} s after the attack's first request",
        took.as_secs_f64()
    ));
    timeline.done(&format!(
        "{}, {:.1} s after the first request",
        text(&ban, "/condition")?,
        took.as_secs_f64()
    ));
    Ok(ban)
}

fn dropped(timeline: &mut Timeline, scene: &Scene, attack: &Traffic) -> Result<()> {
    timeline.step("from now on the driver drops its packets, and only its");
    let entry = in_map(scene)?.context("the attacker is not in the kernel's map")?;
    timeline.note(&format!(
        "the kernel's map BANS_V4 holds {}; it has matched {} packets",
        attacker(),
        entry.hits
    ));
    let answered = attack.count().answered;
    timeline.note(&format!(
        "{answered} of the attacker's requests were answered before the ban"
    ));
    // What was under way when the ban came has timed out after this.
    wait::eventually("the attacker's requests to time out", SOON, || {
        Ok((attack.count().failed >= 5).then_some(()))
    })?;

    let (attack_before, people_before) = (attack.count(), scene.legitimate.count());
    let before = scene.lab.pins().counter(Counter::Dropped)?;
    wait::pause(WATCH)?;
    let dropped = scene.lab.pins().counter(Counter::Dropped)?;
    let (attack_after, people_after) = (attack.count(), scene.legitimate.count());
    timeline.note(&format!(
        "{:.0} s of the attack going on: {} requests answered, {} timed out; packets dropped {before} -> {dropped}",
        WATCH.as_secs_f64(),
        attack_after.answered - attack_before.answered,
        attack_after.failed - attack_before.failed,
    ));
    timeline.note(&format!(
        "meanwhile the legitimate clients: {} answered, {} failed",
        people_after.answered - people_before.answered,
        people_after.failed - people_before.failed,
    ));
    ensure!(
        dropped > before,
        "the kernel's counter stands still at {dropped}"
    );
    ensure!(
        attack_after.answered == attack_before.answered,
        "the attacker still gets answers"
    );
    ensure!(
        attack_after.failed > attack_before.failed,
        "the attacker's requests do not time out"
    );
    ensure!(
        people_after.answered > people_before.answered,
        "the legitimate clients get no answers"
    );
    no_harm(scene)?;
    timeline.quote(
        "portcullis status",
        &scene.agent.verb(&["status"])?.success()?,
    );
    timeline.quote("portcullis bans", &scene.agent.verb(&["bans"])?.success()?);
    timeline.done(&format!(
        "{dropped} packets dropped, no legitimate request failed"
    ));
    Ok(())
}

fn slack(timeline: &mut Timeline, scene: &Scene, ban: &Value) -> Result<()> {
    timeline.step("people are told");
    let subject = attacker().to_string();
    let message = scene
        .agent
        .eventually("a message that names the attacker", SOON, || {
            let mut messages = scene.sink.messages().into_iter();
            Ok(messages.find(|message| message.body.to_string().contains(&subject)))
        })?;
    let after = message.at_millis.saturating_sub(millis(ban, "/time")?);
    let headline = message
        .headline()
        .context("the message has no header and no text")?;
    timeline.note(&format!("{after} ms after the ban: \"{headline}\""));
    ensure!(
        after < 10_000,
        "the message came {after} ms after the ban; 10 s are allowed"
    );
    timeline.done(&format!("\"{headline}\""));
    Ok(())
}

fn unbanned(timeline: &mut Timeline, scene: &Scene, attack: Traffic, ban: &Value) -> Result<()> {
    let subject = attacker().to_string();
    let (words, seconds) = SCHEDULE[0];
    timeline.step(&format!("the first ban lasts {words} (by default: 10 min)"));
    let total = attack.stop();
    timeline.note(&format!(
        "the attacker gives up: {} requests answered, {} not",
        total.answered, total.failed
    ));
    let unban = scene.agent.event("unban", &subject, 1, SOON)?;
    let lasted =
        Duration::from_millis(millis(&unban, "/time")?.saturating_sub(millis(ban, "/time")?));
    timeline.note(&format!(
        "unbanned after {:.1} s: {}",
        lasted.as_secs_f64(),
        text(&unban, "/condition")?
    ));
    ensure!(
        in_map(scene)?.is_none(),
        "the entry is still in the kernel's map"
    );
    timeline.note("its entry is deleted from the kernel's map");
    let status = scene.lab.get(attacker(), "/", ANSWER)?;
    timeline.note(&format!("its next request is answered: {status}"));
    ensure!(status == 200, "status {status}");
    ensure!(
        lasted.as_secs_f64() > seconds as f64 - 1.0,
        "it was to last {seconds} s"
    );
    timeline.done(&format!(
        "after {:.1} s; next request answered {status}",
        lasted.as_secs_f64()
    ));
    Ok(())
}

fn second_offence(timeline: &mut Timeline, scene: &Scene) -> Result<()> {
    let subject = attacker().to_string();
    timeline.step("the attacker has learnt nothing; its account has");
    let attack = Traffic::attack(&scene.lab, &[attacker()], "/", ATTACK)?;
    let ban = scene.agent.event("ban", &subject, 2, SOON)?;
    ensure!(
        in_map(scene)?.is_some(),
        "the attacker is not in the kernel's map"
    );
    let total = attack.stop();
    let (tier, until) = (millis(&ban, "/tier")?, millis(&ban, "/term/until")?);
    let length = until.saturating_sub(millis(&ban, "/time")?).div_ceil(1000);
    timeline.note(&format!(
        "banned again after {} answered requests: tier {tier}, {length} s",
        total.answered
    ));
    let (_, longer) = SCHEDULE[1];
    ensure!(
        (tier, length) == (2, longer),
        "tier 2 and {longer} s were expected: {ban}"
    );
    no_harm(scene)?;
    timeline.done(&format!(
        "tier {tier}: {length} s instead of {} s",
        SCHEDULE[0].1
    ));
    Ok(())
}

fn latency_report(timeline: &mut Timeline, scene: &Scene, samples: usize) -> Result<()> {
    timeline.step("from a line in the log to an entry in the kernel's map");
    timeline.note(&format!(
        "{samples} more offenders, one after the other, written straight into the log …"
    ));
    let measured = latency::measure(
        &scene.agent,
        &scene.lab.pins().bans_v4()?,
        &mut Appender::open(scene.nginx.log())?,
        (0x8000..=u16::MAX).map(client_v4),
        samples,
    )?;
    let ms = |duration: Duration| format!("{:.2} ms", duration.as_secs_f64() * 1000.0);
    let (median, p99) = (measured.percentile(50), measured.percentile(99));
    let target = |met| if met { "met" } else { "MISSED" };
    timeline.note(&format!(
        "median {:>9}   target ≤ {}: {}",
        ms(median),
        ms(MEDIAN_TARGET),
        target(median <= MEDIAN_TARGET)
    ));
    timeline.note(&format!(
        "p99    {:>9}   target ≤ {}: {}",
        ms(p99),
        ms(P99_TARGET),
        target(p99 <= P99_TARGET)
    ));
    timeline.note(&format!("max    {:>9}", ms(measured.percentile(100))));
    if measured.moved > 0 {
        timeline.note(&format!(
            "{} offenders set aside: the baseline moved under them",
            measured.moved
        ));
    }
    ensure!(
        median <= MEDIAN_TARGET && p99 <= P99_TARGET,
        "a target was missed"
    );
    no_harm(scene)?;
    timeline.done(&format!(
        "median {}, p99 {} (N = {})",
        ms(median),
        ms(p99),
        measured.samples()
    ));
    Ok(())
}

fn shut_down(timeline: &Timeline, scene: &mut Scene) -> Result<()> {
    timeline.step("SIGTERM, then everything out of the kernel");
    let start = clock::now();
    let status = scene.agent.terminate(SOON)?;
    ensure!(status.success(), "the agent has ended with {status}");
    timeline.note(&format!(
        "the agent has ended with exit code 0 after {:.2} s",
        clock::since(start).as_secs_f64()
    ));
    let mode = kernel::xdp_mode(scene.lab.edge(), EDGE_INTERFACE)?;
    ensure!(
        mode.is_some(),
        "the program went with the agent: live bans must outlive it"
    );
    timeline.note("its program is still attached: bans in force outlive it");
    agent::detach(&scene.lab)?.success()?;
    let mode = kernel::xdp_mode(scene.lab.edge(), EDGE_INTERFACE)?;
    ensure!(mode.is_none(), "an XDP program is still attached");
    ensure!(
        scene.lab.pins().bans_v4().is_err(),
        "the maps are still pinned"
    );
    timeline.note("portcullis detach: program and maps are out of the kernel");
    no_harm(scene)
}

/// No legitimate request has failed, ever.
fn no_harm(scene: &Scene) -> Result<()> {
    match scene.legitimate.first_failure() {
        Some(failure) => bail!("a legitimate request failed: {failure}"),
        None => Ok(()),
    }
}

fn in_map(scene: &Scene) -> Result<Option<portcullis_common::ban::Entry>> {
    let IpAddr::V4(attacker) = attacker() else {
        bail!("the attacker has an IPv4 address")
    };
    scene.lab.pins().ban_v4(attacker)
}

fn text<'a>(value: &'a Value, pointer: &str) -> Result<&'a str> {
    value
        .pointer(pointer)
        .and_then(Value::as_str)
        .with_context(|| format!("no text {pointer} in {value}"))
}

fn number(value: &Value, pointer: &str) -> Result<f64> {
    value
        .pointer(pointer)
        .and_then(Value::as_f64)
        .with_context(|| format!("no number {pointer} in {value}"))
}

fn millis(value: &Value, pointer: &str) -> Result<u64> {
    value
        .pointer(pointer)
        .and_then(Value::as_u64)
        .with_context(|| format!("no whole number {pointer} in {value}"))
}
