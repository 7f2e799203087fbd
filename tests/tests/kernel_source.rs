//! The source on real parts: Nginx, logrotate, syslog, a proxy in front, an agent that is killed. Each test has a laboratory of
//! its own.

use std::{
    fmt::Write as _,
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use portcullis_tests::lab::{
    Lab,
    agent::{Agent, Config},
    client_v4, clock,
    log::{self, Appender},
    nginx::Nginx,
    traffic::Traffic,
    wait::{eventually, pause},
};

/// Everything that should take a moment, on a machine that is busy with other tests.
const SOON: Duration = Duration::from_secs(30);
const ANSWER: Duration = Duration::from_millis(700);

/// Lines of a log and of everything that it was rotated to.
fn lines_of(log: &Path) -> Result<u64> {
    let name = log
        .file_name()
        .context("no name")?
        .to_string_lossy()
        .into_owned();
    let mut lines = 0;
    for entry in fs::read_dir(log.parent().context("no folder")?)? {
        let path = entry?.path();
        let beside = path.file_name().unwrap_or_default().to_string_lossy();
        if !beside.starts_with(&name) {
            continue;
        }
        let text = if path.extension().is_some_and(|extension| extension == "gz") {
            let unpacked = Command::new("gzip").arg("-dc").arg(&path).output()?;
            ensure!(unpacked.status.success(), "{} is damaged", path.display());
            unpacked.stdout
        } else {
            fs::read(&path)?
        };
        lines += String::from_utf8(text)?.lines().count() as u64;
    }
    Ok(lines)
}

/// Waits until the agent has dealt with so many lines since its first start.
fn has_dealt_with(agent: &Agent, lines: u64) -> Result<()> {
    agent.eventually(&format!("{lines} lines to be dealt with"), SOON, || {
        let dealt = agent.figure("/source/lines")?;
        ensure!(dealt <= lines, "{dealt} lines dealt with, {lines} written");
        Ok((dealt == lines).then_some(()))
    })
}

fn rotate(lab: &Lab, log: &Path, how: &str) -> Result<()> {
    let file = lab.dir().join("logrotate.conf");
    fs::write(
        &file,
        format!(
            "{} {{\n su root root\n rotate 1000\n{how}\n}}\n",
            log.display()
        ),
    )?;
    let rotated = Command::new("logrotate")
        .args(["--force", "--state"])
        .arg(lab.dir().join("logrotate.state"))
        .arg(&file)
        .output()
        .context("is logrotate installed?")?;
    let said = String::from_utf8_lossy(&rotated.stderr);
    ensure!(rotated.status.success(), "logrotate: {said}");
    Ok(())
}

#[test]
fn a_hundred_rotations_under_load_lose_no_line_and_double_none() -> Result<()> {
    let lab = Lab::new()?;
    let nginx = Nginx::start(&lab)?;
    let mut config = Config::new(nginx.log());
    // Nobody is to be banned.
    config.warm_up_ceiling_rps = 1e6;
    config.start = "beginning";
    let agent = Agent::start(&lab, &config)?;
    let traffic = Traffic::load(&lab, &[client_v4(1), client_v4(2)])?;
    let pid = nginx.home().join("nginx.pid");
    let reopen = format!(
        "create 0640 root root\n postrotate\n kill -USR1 $(cat {})\n endscript",
        pid.display()
    );
    for _ in 0..100 {
        let target = traffic.count().answered + 200;
        eventually("more answers", SOON, || {
            Ok((traffic.count().answered >= target).then_some(()))
        })?;
        rotate(
            &lab,
            nginx.log(),
            &format!(" compress\n delaycompress\n {reopen}"),
        )?;
        // What Nginx writes into a file that is being packed is lost to everybody.
        eventually("Nginx to write to its new log", SOON, || {
            Ok((fs::metadata(nginx.log())?.len() > 0).then_some(()))
        })?;
    }
    let count = traffic.stop();
    // And the one that asked whether Nginx was there.
    let written = count.answered + 1;
    // Nginx writes its line after the answer; logrotate loses nothing either.
    eventually("all lines in the logs", SOON, || {
        let there = lines_of(nginx.log())?;
        ensure!(there <= written, "{there} lines there, {written} written");
        Ok((there == written).then_some(()))
    })?;
    assert!(
        written > 20_000 && count.failed == 0,
        "{written} lines, {count:?}"
    );
    has_dealt_with(&agent, written)?;
    assert_eq!(agent.figure("/engine/totals/lines")?, written);
    assert_eq!(agent.figure("/engine/totals/malformed")?, 0);
    // Two that come between two looks are one to it, and no line of the file between is missed.
    let rotations = agent.figure("/source/rotations")?;
    assert!((50..=100).contains(&rotations), "{rotations}");
    Ok(())
}

#[test]
fn logs_that_are_copied_and_truncated_are_read_once_too() -> Result<()> {
    let lab = Lab::new()?;
    let folder = lab.dir().join("logs");
    fs::create_dir(&folder)?;
    let path = folder.join("access.json");
    let mut log = Appender::open(&path)?;
    let mut config = Config::new(&path);
    config.warm_up_ceiling_rps = 1e6;
    let agent = Agent::start(&lab, &config)?;
    for round in 0..20 {
        // Of a file of which nothing was read nobody could tell that it was truncated.
        log.requests(client_v4(round), 1)?;
        has_dealt_with(&agent, 100 * u64::from(round) + 1)?;
        log.requests(client_v4(round), 49)?;
        // What is written between copy and truncation is lost to everybody, so nothing is.
        rotate(&lab, &path, " copytruncate")?;
        log.requests(client_v4(round), 50)?;
        has_dealt_with(&agent, 100 * (u64::from(round) + 1))?;
    }
    assert_eq!(lines_of(&path)?, 2000);
    Ok(())
}

#[test]
fn an_agent_that_is_killed_again_and_again_deals_with_every_line_once() -> Result<()> {
    let lab = Lab::new()?;
    let path = lab.dir().join("access.json");
    let mut log = Appender::open(&path)?;
    let mut config = Config::new(&path);
    config.warm_up_ceiling_rps = 1e6;
    let mut agent = Agent::start(&lab, &config)?;
    let mut written = 0;
    for round in 0..8_u16 {
        for burst in 0..10 {
            log.requests(client_v4(round), 20 + burst)?;
            written += 20 + burst;
            pause(Duration::from_millis(u64::from(17 * round % 60)))?;
        }
        agent.kill()?;
        log.requests(client_v4(round), 7)?;
        written += 7;
        // Rotated, and rotated again, while nobody was there.
        if round % 3 == 0 {
            for rotation in 0..2 {
                fs::rename(
                    &path,
                    lab.dir().join(format!("access.json.{round}{rotation}")),
                )?;
                log = Appender::open(&path)?;
                log.requests(client_v4(round), 5)?;
                written += 5;
                pause(Duration::from_millis(20))?;
            }
        }
        agent = Agent::start(&lab, &config)?;
        has_dealt_with(&agent, written)?;
    }
    Ok(())
}

#[test]
fn an_attack_that_was_under_way_is_not_forgotten_by_a_restart() -> Result<()> {
    let lab = Lab::new()?;
    let path = lab.dir().join("access.json");
    let mut log = Appender::open(&path)?;
    let mut config = Config::new(&path);
    config.window_secs = 60;
    config.warm_up_ceiling_rps = 1.0;
    let mut agent = Agent::start(&lab, &config)?;
    log.requests(client_v4(1), 50)?;
    log.requests(client_v4(2), 61)?;
    agent.event("ban", "198.19.0.2", 1, SOON)?;
    agent.verb(&["unban", "198.19.0.2"])?.success()?;
    has_dealt_with(&agent, 111)?;
    assert!(agent.terminate(SOON)?.success());
    let agent = Agent::start(&lab, &config)?;
    // 61 requests in a minute are one too many, whoever counted the first fifty.
    log.requests(client_v4(1), 11)?;
    agent.event("ban", "198.19.0.1", 1, SOON)?;
    // And what was pardoned is not held against anybody again.
    log.requests(client_v4(2), 10)?;
    has_dealt_with(&agent, 132)?;
    assert_eq!(agent.events("ban", "198.19.0.2")?.len(), 1);
    assert_eq!(agent.figure("/engine/totals/lines")?, 21);
    Ok(())
}

#[test]
fn several_logs_are_followed_and_new_ones_found() -> Result<()> {
    let lab = Lab::new()?;
    let folder = lab.dir().join("logs");
    fs::create_dir(&folder)?;
    let write = |name: &str, source: u16, count: u64| {
        Appender::open(&folder.join(name))?.requests(client_v4(source), count)
    };
    write("shop.json", 1, 10)?;
    write("blog.json", 1, 10)?;
    write("shop.json.1", 9, 500)?;
    let mut config = Config::new(&folder.join("*.json*"));
    config.source = format!("syslog = []\nformat = {:?}", "auto");
    let agent = Agent::start(&lab, &config)?;
    agent.eventually("the logs to be followed", SOON, || {
        Ok((agent.figure("/source/logs")? == 2).then_some(()))
    })?;
    // What was there is old, what comes is not, wherever it comes.
    write("shop.json", 1, 26)?;
    write("blog.json", 1, 25)?;
    agent.event("ban", "198.19.0.1", 1, SOON)?;
    write("wiki.json", 2, 51)?;
    agent.event("ban", "198.19.0.2", 1, SOON)?;
    // A rotation makes no new log of the old one.
    fs::rename(folder.join("shop.json"), folder.join("shop.json.2"))?;
    write("shop.json", 3, 51)?;
    agent.event("ban", "198.19.0.3", 1, SOON)?;
    has_dealt_with(&agent, 26 + 25 + 51 + 51)?;
    assert_eq!(agent.figure("/source/logs")?, 3);
    assert_eq!(agent.bans()?.len(), 3);
    Ok(())
}

#[test]
fn nginx_s_syslog_is_read_over_udp_and_a_unix_socket() -> Result<()> {
    let lab = Lab::new()?;
    let socket = lab.dir().join("access.sock");
    lab.edge().sysctl("net/unix/max_dgram_qlen", "512")?;
    let mut config = Config::new(&lab.dir().join("no.json"));
    config.source = format!(
        "syslog = [\"udp:127.0.0.1:5514\", \"unix:{}\"]",
        socket.display()
    );
    let agent = Agent::start(&lab, &config)?;
    let server = format!(
        "location = /udp {{ access_log syslog:server=127.0.0.1:5514,tag=edge portcullis; return 200; }}
         location = /unix {{ access_log syslog:server=unix:{},nohostname portcullis; return 200; }}
         location = /combined {{ access_log syslog:server=127.0.0.1:5514; return 200; }}",
        socket.display()
    );
    let _nginx = Nginx::start_with(&lab, "", &server)?;
    for (number, path) in (1..).zip(["/udp", "/unix", "/combined"]) {
        let source = client_v4(number);
        for _ in 0..=agent.config().allowance() {
            assert_eq!(lab.get(source, path, ANSWER)?, 200);
        }
        agent.event("ban", &source.to_string(), 1, SOON)?;
        assert!(lab.get(source, path, ANSWER).is_err(), "{path}");
    }
    assert!(agent.figure("/source/syslog")? >= 153);
    assert_eq!(agent.figure("/source/syslog_lost")?, 0);
    assert_eq!(agent.figure("/engine/totals/malformed")?, 0);
    Ok(())
}

/// An edge host behind a proxy, with an agent that bans its clients in Nginx, or only tells of them.
fn behind_a_proxy(include: bool) -> Result<(Agent, Nginx, PathBuf, Lab)> {
    let lab = Lab::new()?;
    let file = lab.dir().join("denied.conf");
    fs::write(&file, "")?;
    let http = format!(
        "set_real_ip_from {PROXY}; real_ip_header X-Forwarded-For; include {};",
        file.display()
    );
    let nginx = Nginx::start_with(&lab, &http, "")?;
    let mut config = Config::new(nginx.log());
    config.source = format!("proxies = [\"{PROXY}\"]");
    if include {
        let home = nginx.home().display();
        let command = format!(
            "\"nginx\", \"-p\", \"{home}\", \"-c\", \"{home}/nginx.conf\", \"-e\", \"{home}/error.log\""
        );
        config.sections = format!(
            "[enforce.nginx]\ninclude = \"{}\"\ntest = [{command}, \"-t\"]\nreload = [{command}, \"-s\", \"reload\"]\nmin_interval_secs = 1\n",
            file.display()
        );
    }
    let agent = Agent::start(&lab, &config)?;
    Ok((agent, nginx, file, lab))
}

const PROXY: IpAddr = client_v4(0xFFFE);

#[test]
fn a_client_behind_a_proxy_is_refused_by_nginx_and_its_proxy_and_neighbours_are_not() -> Result<()>
{
    let (mut agent, nginx, file, lab) = behind_a_proxy(true)?;
    let (attacker, neighbour) = (client_v4(1), client_v4(2));
    let get = |client| lab.get_through(PROXY, client, "/", ANSWER);
    for _ in 0..=agent.config().allowance() {
        get(attacker)?;
    }
    agent.event("ban", "198.19.0.1", 1, SOON)?;
    eventually("Nginx to refuse it", SOON, || {
        Ok((get(attacker)? == 403).then_some(()))
    })?;
    assert_eq!(get(neighbour)?, 200);
    assert_eq!(lab.get(PROXY, "/", ANSWER)?, 200, "the proxy itself");
    assert_eq!(
        lab.pins().ban_v4(std::net::Ipv4Addr::new(198, 19, 0, 1))?,
        None
    );
    let ban = agent.events("ban", "198.19.0.1")?.remove(0);
    assert_eq!(ban["gate"], "nginx", "{ban}");
    // Who comes without the proxy is banned as always; and the proxy's own requests are nobody's attack.
    for _ in 0..=agent.config().allowance() {
        // From some request on it is not answered any more.
        drop(lab.get(client_v4(3), "/", ANSWER));
        lab.get(PROXY, "/", ANSWER)?;
    }
    agent.event("ban", "198.19.0.3", 1, SOON)?;
    assert!(lab.get(client_v4(3), "/", ANSWER).is_err());
    assert_eq!(lab.get(PROXY, "/", ANSWER)?, 200);
    assert!(agent.events("ban", &PROXY.to_string())?.is_empty());
    // It outlives the agent, and an operator lifts it.
    agent.kill()?;
    assert_eq!(get(attacker)?, 403);
    let config = agent.config().clone();
    let agent = Agent::start(&lab, &config)?;
    agent.verb(&["unban", "198.19.0.1"])?.success()?;
    eventually("Nginx to answer it again", SOON, || {
        Ok((get(attacker)? == 200).then_some(()))
    })?;
    drop(agent);
    // And everything is taken out with the rest.
    let banned = fs::read_to_string(&file)?;
    assert!(!banned.contains("deny"), "{banned}");
    drop(nginx);
    Ok(())
}

#[test]
fn who_is_allowed_inside_a_network_that_nginx_refuses_is_answered_while_it_is_allowed() -> Result<()>
{
    let (agent, _nginx, _file, lab) = behind_a_proxy(true)?;
    let [monitor, other, neighbour] = [7, 8, 9].map(client_v4);
    let get = |client| lab.get_through(PROXY, client, "/", ANSWER);
    let is_answered = |client, status: u16| {
        let what = format!("{client} to be answered {status}");
        eventually(&what, SOON, || Ok((get(client)? == status).then_some(())))
    };
    let done = |words: &[&str]| agent.verb(words)?.success();
    done(&["allow", "add", "198.19.0.7"])?;
    let said = done(&["ban", "198.19.0.0/24"])?;
    ensure!(said.contains("198.19.0.7"), "{said}");
    is_answered(neighbour, 403)?;
    assert_eq!(get(monitor)?, 200, "never refused");
    // Workers of before a reload answer, too, until they have ended.
    is_answered(other, 403)?;
    // It holds for who comes without the proxy as well.
    assert!(lab.get(neighbour, "/", ANSWER).is_err());
    assert_eq!(lab.get(monitor, "/", ANSWER)?, 200);
    // At run time, with the ban in force.
    done(&["allow", "add", "198.19.0.8"])?;
    is_answered(other, 200)?;
    assert_eq!((get(monitor)?, get(neighbour)?), (200, 403));
    done(&["allow", "remove", "198.19.0.8"])?;
    is_answered(other, 403)?;
    assert_eq!((get(monitor)?, get(neighbour)?), (200, 403));
    assert_eq!(agent.bans()?.len(), 1, "the network's ban stands");
    assert_eq!(agent.figure("/nginx/drift")?, 0);
    Ok(())
}

#[test]
fn of_a_client_behind_a_proxy_people_are_told_where_nginx_is_not_to_be_touched() -> Result<()> {
    let (agent, _nginx, file, lab) = behind_a_proxy(false)?;
    for _ in 0..=agent.config().allowance() {
        lab.get_through(PROXY, client_v4(1), "/", ANSWER)?;
    }
    let told = agent.event("refuse", "198.19.0.1", 1, SOON)?;
    let condition = told["condition"].as_str().unwrap_or_default();
    assert!(
        condition.contains("through the proxy 198.19.255.254"),
        "{told}"
    );
    assert_eq!(lab.get_through(PROXY, client_v4(1), "/", ANSWER)?, 200);
    assert_eq!(fs::read_to_string(file)?, "");
    assert_eq!(agent.bans()?.len(), 0);
    Ok(())
}

#[test]
fn a_backlog_does_not_delay_the_detection_of_what_happens_now() -> Result<()> {
    let lab = Lab::new()?;
    let path = lab.dir().join("access.json");
    // Written ten minutes ago by a thousand clients.
    let old = clock::epoch_millis() / 1000 - 600;
    let mut text = String::new();
    for number in 0..600_000_u64 {
        let [high, low] = u16::try_from(number % 1000)
            .unwrap_or_default()
            .to_be_bytes();
        let _infallible = writeln!(
            text,
            "{{\"timestamp\":\"{}.000\",\"source_ip\":\"10.7.{high}.{low}\",\"method\":\"GET\",\"path\":\"/\",\"status\":\"200\",\"response_size\":\"3\"}}",
            old + number / 2000
        );
    }
    fs::write(&path, text)?;
    let mut log = Appender::open(&path)?;
    let mut config = Config::new(&path);
    config.start = "beginning";
    config.source = "catch_up_secs = 1".to_owned();
    config.warm_up_ceiling_rps = 20.0;
    let agent = Agent::start(&lab, &config)?;
    // An attack of now, at the end of it all.
    let start = clock::now();
    let lines: String = (0..2000).map(|_| log::line(client_v4(1), 200)).collect();
    log.append(lines.as_bytes())?;
    agent.event("ban", "198.19.0.1", 1, Duration::from_secs(10))?;
    eprintln!(
        "banned {} ms after the last line",
        clock::since(start).as_millis()
    );
    has_dealt_with(&agent, 602_000)?;
    // It is said, and nobody else has to pay for it.
    for words in ["one is read, at random", "nobody was banned for them"] {
        agent.eventually(words, SOON, || {
            let is_it = |event: &serde_json::Value| {
                event["action"] == "notice" && event["condition"].to_string().contains(words)
            };
            Ok(agent.history()?.iter().any(is_it).then_some(()))
        })?;
    }
    assert_eq!(agent.bans()?.len(), 1);
    Ok(())
}

#[test]
fn logs_that_are_behind_are_learnt_as_one() -> Result<()> {
    let lab = Lab::new()?;
    let old = clock::epoch_millis() / 1000 - 1200;
    // Twenty requests a second in one log, and in the other ten every tenth second.
    let line = |second: u64, client: u64| {
        format!(
            "{{\"timestamp\":\"{}\",\"source_ip\":\"10.7.{}.{client}\",\"status\":\"200\"}}\n",
            old + second,
            second % 200,
        )
    };
    let busy = (0..1200).flat_map(|second| (0..20).map(move |client| line(second, client)));
    let sparse = (0..120).flat_map(|tenth| (0..10).map(move |client| line(10 * tenth, client)));
    fs::write(lab.dir().join("a.json"), busy.collect::<String>())?;
    fs::write(lab.dir().join("b.json"), sparse.collect::<String>())?;
    let mut config = Config::new(&lab.dir().join("*.json"));
    config.start = "beginning";
    // Every line is to be read, not a sample.
    config.source = "catch_up_secs = 60".to_owned();
    config.warm_up_secs = 600;
    config.warm_up_ceiling_rps = 1e6;
    let agent = Agent::start(&lab, &config)?;
    has_dealt_with(&agent, 25_200)?;
    agent.eventually("a mean of both", SOON, || {
        let mean = agent.status()?["engine"]["normal"]["mean"].as_f64();
        Ok(mean.filter(|mean| (20.8..21.2).contains(mean)))
    })?;
    assert_eq!(agent.figure("/engine/totals/lines")?, 25_200);
    Ok(())
}
