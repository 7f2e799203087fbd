//! What keeps a running agent from doing harm: names and crawlers that are never banned, who is logged in, and a configuration
//! that is read anew.

use std::{
    fs,
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    os::{
        fd::OwnedFd,
        unix::{fs::PermissionsExt as _, process::CommandExt as _},
    },
    path::Path,
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use portcullis_tests::lab::{
    EDGE_V4, Lab,
    agent::{Agent, Config},
    client::connect_to,
    client_v4,
    log::Appender,
    nginx::Nginx,
    process::Process,
    tools::Tools,
};
use serde_json::Value;

/// Everything that should take a moment, on a machine that is busy with other tests.
const SOON: Duration = Duration::from_secs(15);

/// An edge host whose names are looked up in a file.
struct Site {
    agent: Agent,
    log: Appender,
    _nginx: Nginx,
    lab: Lab,
    _tools: Tools,
}

impl Site {
    fn new(hosts: &str, change: impl FnOnce(&mut Config)) -> Result<Self> {
        let lab = Lab::new()?;
        let tools = Tools::new()?;
        let own = lab.dir().join("hosts");
        fs::write(&own, hosts)?;
        tools.file(Path::new("/etc/hosts"), &own)?;
        let nginx = Nginx::start(&lab)?;
        let mut config = Config::new(nginx.log());
        change(&mut config);
        let agent = Agent::start(&lab, &config)?;
        let log = Appender::open(nginx.log())?;
        Ok(Self {
            agent,
            log,
            _nginx: nginx,
            lab,
            _tools: tools,
        })
    }

    fn offend(&mut self, source: IpAddr) -> Result<()> {
        let enough = self.agent.config().allowance() + 1;
        self.log.requests(source, enough)
    }

    fn is_banned(&self, source: IpAddr) -> Result<bool> {
        let IpAddr::V4(address) = source else {
            anyhow::bail!("{source} is no IPv4 address");
        };
        Ok(self.lab.pins().ban_v4(address)?.is_some())
    }

    fn reload(&self) -> Result<String> {
        self.agent.verb(&["reload"])?.success()
    }
}

fn condition(event: &Value) -> Result<&str> {
    event["condition"]
        .as_str()
        .context("an event without condition")
}

#[test]
fn names_are_never_banned_wherever_they_move_and_crawlers_once_they_have_proved_to_be_such()
-> Result<()> {
    let [monitor, crawler, liar, moved] = [1, 2, 3, 4].map(client_v4);
    let hosts = |monitor: IpAddr| {
        format!(
            "127.0.0.1 localhost\n{monitor} monitor.test\n{crawler} crawl-2.googlebot.com\n{liar} crawl-3.googlebot.com.test\n"
        )
    };
    let mut site = Site::new(&hosts(monitor), |config| {
        config.allow = vec!["monitor.test".to_owned()];
    })?;
    site.offend(monitor)?;
    let refused = site.agent.event("refuse", &monitor.to_string(), 1, SOON)?;
    ensure!(condition(&refused)?.contains("monitor.test"), "{refused}");
    let listed = site.agent.verb(&["allow", "list"])?.success()?;
    ensure!(listed.contains("monitor.test (bans.allow)"), "{listed}");

    site.offend(crawler)?;
    site.agent.event("unban", &crawler.to_string(), 1, SOON)?;
    ensure!(!site.is_banned(crawler)?);
    let why = site
        .agent
        .verb(&["explain", &crawler.to_string()])?
        .success()?;
    ensure!(
        why.contains("is never banned") && why.contains("crawl-2.googlebot.com"),
        "{why}"
    );
    site.offend(crawler)?;
    site.agent.event("refuse", &crawler.to_string(), 1, SOON)?;

    site.offend(liar)?;
    site.agent.event("ban", &liar.to_string(), 1, SOON)?;
    site.offend(moved)?;
    site.agent.event("ban", &moved.to_string(), 1, SOON)?;
    // The monitor gets another address.
    fs::write(site.lab.dir().join("hosts"), hosts(moved))?;
    let said = site.reload()?;
    ensure!(said == "nothing has changed\n", "{said}");
    let lifted = site.agent.event("unban", &moved.to_string(), 1, SOON)?;
    ensure!(condition(&lifted)?.contains("allowlist"), "{lifted}");
    site.agent
        .eventually("the kernel to release it", SOON, || {
            Ok((!site.is_banned(moved)?).then_some(()))
        })?;
    site.offend(monitor)?;
    site.agent.event("ban", &monitor.to_string(), 1, SOON)?;
    ensure!(site.is_banned(liar)?, "nobody asked for its release");
    Ok(())
}

/// A process as sshd has one for each connection, named as it names it; it holds the connection until it is killed.
fn sshd(site: &Site, connection: TcpStream, title: &str) -> Result<Process> {
    let program = site.lab.dir().join("sshd");
    if !program.exists() {
        fs::copy("/bin/sleep", &program)?;
    }
    let mut command = Command::new(program);
    command
        .arg0(title)
        .arg("600")
        .stdin(OwnedFd::from(connection));
    Process::start("sshd", site.lab.edge(), &mut command)
}

#[test]
fn who_is_logged_in_over_ssh_is_never_banned_and_who_has_only_connected_is() -> Result<()> {
    let [admin, guesser] = [1, 2].map(client_v4);
    let mut site = Site::new("127.0.0.1 localhost\n", |_| {})?;
    let door = SocketAddr::new(EDGE_V4.into(), 2222);
    let listener = site.lab.edge().run(|| TcpListener::bind(door))??;
    let connect = |client| -> Result<(TcpStream, TcpStream)> {
        let there = site.lab.world().run(|| connect_to(client, door, SOON))??;
        Ok((there, listener.accept()?.0))
    };
    let (_there, connection) = connect(admin)?;
    let session = sshd(&site, connection, "sshd: alice@pts/0")?;
    let (_there_too, connection) = connect(guesser)?;
    let _guess = sshd(&site, connection, "sshd: bob [net]")?;
    // Anybody can call a process of theirs so; its parent here is root's, and no sshd.
    let poser = client_v4(3);
    let (_there_as_well, connection) = connect(poser)?;
    let folder = tempfile::tempdir()?;
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755))?;
    let program = folder.path().join("sshd");
    fs::copy("/bin/sleep", &program)?;
    let mut command = Command::new(program);
    command.arg0("sshd: eve@pts/0").arg("600");
    command.stdin(OwnedFd::from(connection)).uid(65_534);
    let _pose = Process::start("sshd", site.lab.edge(), &mut command)?;
    site.reload()?;
    let who = site.agent.eventually("the session to be seen", SOON, || {
        let listed = site.agent.verb(&["allow", "list"])?.success()?;
        Ok(listed.contains("logged in over SSH").then_some(listed))
    })?;
    ensure!(
        who.contains(&admin.to_string())
            && !who.contains(&guesser.to_string())
            && !who.contains(&poser.to_string()),
        "{who}"
    );
    site.offend(admin)?;
    site.agent.event("refuse", &admin.to_string(), 1, SOON)?;
    site.offend(guesser)?;
    site.agent.event("ban", &guesser.to_string(), 1, SOON)?;
    // Logged out, it is a client like any other.
    drop(session);
    site.reload()?;
    site.agent.eventually("the session to be over", SOON, || {
        let listed = site.agent.verb(&["allow", "list"])?.success()?;
        Ok((!listed.contains("logged in over SSH")).then_some(()))
    })
}

#[test]
fn a_configuration_that_is_read_anew_holds_at_once_or_not_at_all() -> Result<()> {
    let [first, second, third] = [1, 2, 3].map(client_v4);
    let mut site = Site::new("127.0.0.1 localhost\n", |_| {})?;
    site.offend(first)?;
    site.agent.event("ban", &first.to_string(), 1, SOON)?;

    let config = Config {
        schedule: vec!["20m"],
        allow: vec![second.to_string()],
        mode: "observe",
        ..site.agent.config().clone()
    };
    site.agent.rewrite(&config)?;
    let said = site.reload()?;
    for expected in [
        "bans.schedule: [\"10m\", \"30m\", \"permanent\"] -> [\"20m\"]",
        "bans.allow: ",
        "only after a restart: mode: \"enforce\" -> \"observe\"",
    ] {
        ensure!(said.contains(expected), "{expected}: {said}");
    }
    let status = site.agent.status()?;
    ensure!(
        status["mode"] == "enforce" && status["needs_restart"][0] == "mode",
        "{status}"
    );
    site.offend(second)?;
    site.agent.event("refuse", &second.to_string(), 1, SOON)?;
    site.offend(third)?;
    let ban = site.agent.event("ban", &third.to_string(), 1, SOON)?;
    let length = ban.pointer("/term/until").and_then(Value::as_u64);
    let length = length.unwrap_or(0) - ban["since"].as_u64().unwrap_or(0);
    ensure!(length == 20 * 60 * 1000, "{ban}");
    ensure!(site.is_banned(first)?, "what stands stays");

    // Wrong in one place: nothing of it holds.
    let wrong = Config {
        schedule: vec!["1m"],
        allow: vec!["192.0.2.0/40".to_owned()],
        ..config.clone()
    };
    site.agent.rewrite(&wrong)?;
    let answer = site.agent.verb(&["reload"])?;
    ensure!(answer.code == Some(1), "{answer:?}");
    ensure!(
        answer.stderr.contains("192.0.2.0/40") && answer.stderr.contains("goes on to hold"),
        "{answer:?}"
    );
    // By the signal, as a service manager does it.
    site.agent.rewrite(&Config {
        schedule: vec!["30m"],
        ..config
    })?;
    site.agent.signal(Signal::SIGHUP)?;
    site.agent
        .eventually("the configuration to be read", SOON, || {
            let told = site.agent.history()?;
            let is_it = |event: &&Value| {
                let words = event["condition"].as_str().unwrap_or_default();
                words.contains("by a hang-up signal: bans.schedule: [\"20m\"] -> [\"30m\"]")
            };
            Ok(told.iter().find(is_it).map(drop))
        })
}
