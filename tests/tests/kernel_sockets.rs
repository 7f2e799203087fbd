//! Connections that a source has when it is banned: destroyed in the kernel, with those of everybody else left alone.

use std::{
    fs,
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use portcullis::enforce::sockets::Sockets;
use portcullis_engine::Subject;
use portcullis_tests::lab::{
    EDGE_V4, EDGE_V6, Lab,
    agent::{Agent, Config},
    client_v4, client_v6,
    log::Appender,
    nginx::Nginx,
    server_for,
    wait::eventually,
};
use socket2::{Domain, Protocol, Socket, Type};

/// Everything that should take a moment, on a machine that is busy with other tests.
const SOON: Duration = Duration::from_secs(15);
/// A server of these tests' own; Nginx has port 80.
const PORT: u16 = 8080;

/// A connection from the world, by its two ends.
struct Pair {
    client: TcpStream,
    server: TcpStream,
}

impl Pair {
    /// Connects to a server of ours and takes the connection there.
    fn new(lab: &Lab, server: &TcpListener, client: IpAddr) -> Result<Self> {
        let address = SocketAddr::new(server_for(client).ip(), PORT);
        let client = connect(lab, client, address)?;
        let (server, _) = server.accept()?;
        server.set_read_timeout(Some(SOON))?;
        Ok(Self { client, server })
    }

    /// Does a byte get through?
    fn lives(&mut self) -> bool {
        self.client.write_all(b"?").is_ok() && self.server.read_exact(&mut [0]).is_ok()
    }

    /// Have both ends been told?
    fn is_destroyed(&mut self) -> Result<()> {
        let at_server = self.server.read(&mut [0]).map_err(|error| error.kind());
        ensure!(
            at_server == Err(ErrorKind::ConnectionAborted),
            "the server: {at_server:?}"
        );
        let at_client = self.client.read(&mut [0]).map_err(|error| error.kind());
        ensure!(
            at_client == Err(ErrorKind::ConnectionReset),
            "the client: {at_client:?}"
        );
        Ok(())
    }
}

/// A connection out of the clients' namespace.
fn connect(lab: &Lab, client: IpAddr, server: SocketAddr) -> Result<TcpStream> {
    lab.world().run(|| {
        let kind = (Domain::for_address(server), Type::STREAM, Protocol::TCP);
        let socket = Socket::new(kind.0, kind.1, Some(kind.2))?;
        socket.bind(&SocketAddr::new(client, 0).into())?;
        socket.connect_timeout(&server.into(), SOON)?;
        socket.set_read_timeout(Some(SOON))?;
        Ok(socket.into())
    })?
}

/// A server on the edge host.
fn listen(lab: &Lab, address: IpAddr) -> Result<TcpListener> {
    lab.edge()
        .run(|| TcpListener::bind(SocketAddr::new(address, PORT)))?
        .with_context(|| format!("cannot listen on {address}"))
}

/// Destroys in the edge host's namespace.
fn open(lab: &Lab) -> Result<Sockets> {
    let sockets = lab.edge().run(Sockets::open)??;
    ensure!(
        sockets.unavailable().is_none(),
        "{:?}",
        sockets.unavailable()
    );
    Ok(sockets)
}

fn subjects(texts: &[&str]) -> Result<Vec<Subject>> {
    Ok(texts
        .iter()
        .map(|text| text.parse())
        .collect::<Result<_, _>>()?)
}

#[test]
fn a_subjects_connections_are_destroyed_and_the_others_live() -> Result<()> {
    let lab = Lab::new()?;
    let servers = [listen(&lab, EDGE_V4.into())?, listen(&lab, EDGE_V6.into())?];
    let mut sockets = open(&lab)?;
    let (attacker, person) = (client_v4(666), client_v4(667));
    let (attacker_v6, other_host, person_v6) = (client_v6(7, 1), client_v6(7, 2), client_v6(8, 1));
    let mut bad = Pair::new(&lab, &servers[0], attacker)?;
    let mut good = Pair::new(&lab, &servers[0], person)?;
    let mut bad_v6 = Pair::new(&lab, &servers[1], attacker_v6)?;
    let mut same_net = Pair::new(&lab, &servers[1], other_host)?;
    let mut good_v6 = Pair::new(&lab, &servers[1], person_v6)?;

    assert_eq!(sockets.destroy(&subjects(&["203.0.113.1"])?)?, 0);
    assert!(bad.lives() && bad_v6.lives(), "nobody was meant");

    let banned = [attacker, attacker_v6].map(Subject::of_client);
    assert_eq!(sockets.destroy(&banned)?, 3);
    for pair in [&mut bad, &mut bad_v6, &mut same_net] {
        pair.is_destroyed()?;
    }
    assert!(good.lives() && good_v6.lives(), "a bystander was hit");
    // The servers still listen.
    assert!(Pair::new(&lab, &servers[0], attacker)?.lives());
    assert!(Pair::new(&lab, &servers[1], attacker_v6)?.lives());
    Ok(())
}

#[test]
fn ipv4_connections_of_a_dual_stack_listener_are_found_by_their_ipv4_address() -> Result<()> {
    let lab = Lab::new()?;
    let server = listen(&lab, "::".parse()?)?;
    let mut sockets = open(&lab)?;
    let mut bad = Pair::new(&lab, &server, client_v4(0x0201))?;
    let mut good = Pair::new(&lab, &server, client_v4(0x0301))?;
    let mut good_v6 = Pair::new(&lab, &server, client_v6(1, 1))?;
    assert!(bad.server.peer_addr()?.is_ipv6(), "{:?}", bad.server);
    assert_eq!(sockets.destroy(&subjects(&["198.19.2.0/24"])?)?, 1);
    bad.is_destroyed()?;
    // Every IPv6 source is none of IPv4.
    assert_eq!(sockets.destroy(&subjects(&["::/0"])?)?, 1);
    good_v6.is_destroyed()?;
    assert!(good.lives());
    Ok(())
}

#[test]
fn the_allowlist_and_loopback_are_spared_and_half_closed_connections_are_not() -> Result<()> {
    let lab = Lab::new()?;
    let server = listen(&lab, "::".parse()?)?;
    let mut sockets = open(&lab)?;
    let allowed = client_v4(9);
    sockets.set_allowlist(&[allowed.into()]);
    let mut kept = Pair::new(&lab, &server, allowed)?;
    let half = Pair::new(&lab, &server, client_v4(8))?;
    half.server.shutdown(Shutdown::Write)?;
    let mut own = lab.edge().run(|| -> Result<Pair> {
        let client = TcpStream::connect(("127.0.0.1", PORT))?;
        let (server, _) = server.accept()?;
        Ok(Pair { client, server })
    })??;
    let everybody = subjects(&["0.0.0.0/0", "::/0", "127.0.0.0/8", "::1"])?;
    assert_eq!(sockets.destroy(&everybody)?, 1);
    assert!(kept.lives(), "allowed");
    assert!(own.lives(), "the host's own");
    Ok(())
}

#[test]
fn many_subjects_at_once_are_found_too() -> Result<()> {
    let lab = Lab::new()?;
    let server = listen(&lab, EDGE_V4.into())?;
    let mut sockets = open(&lab)?;
    let mut bad = (0..50)
        .map(|n| Pair::new(&lab, &server, client_v4(n * 4)))
        .collect::<Result<Vec<_>>>()?;
    let mut good = Pair::new(&lab, &server, client_v4(1))?;
    // More than the kernel's filter is given.
    let banned: Vec<_> = (0..1000)
        .map(|n| Subject::of_client(client_v4(n * 4)))
        .collect();
    assert_eq!(sockets.destroy(&banned)?, bad.len());
    for pair in &mut bad {
        pair.is_destroyed()?;
    }
    assert!(good.lives());
    Ok(())
}

/// What Nginx's worker holds open, by its own count of descriptors: sockets of clients among them.
fn is_held_by_nginx(lab: &Lab, client: IpAddr) -> Result<bool> {
    let IpAddr::V4(client) = client else {
        return Ok(false);
    };
    let address = format!(" {:08X}:", u32::from(client).swap_bytes());
    let table = lab
        .edge()
        .run(|| fs::read_to_string("/proc/thread-self/net/tcp"))??;
    Ok(table.contains(&address))
}

/// A request whose headers never end: it costs the attacker nothing, and a connection of Nginx's for a minute.
fn slow_request(lab: &Lab, client: IpAddr) -> Result<TcpStream> {
    let mut stream = connect(lab, client, server_for(client))?;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: edge.example\r\n")?;
    eventually("Nginx to take the connection", SOON, || {
        Ok(is_held_by_nginx(lab, client)?.then_some(()))
    })?;
    Ok(stream)
}

#[test]
fn nginx_is_freed_at_once_and_serves_on() -> Result<()> {
    let lab = Lab::new()?;
    let nginx = Nginx::start(&lab)?;
    let mut sockets = open(&lab)?;
    let attacker = client_v4(666);
    let mut slow = slow_request(&lab, attacker)?;
    assert_eq!(sockets.destroy(&[Subject::of_client(attacker)])?, 1);
    let told = slow.read(&mut [0]).map_err(|error| error.kind());
    assert_eq!(told, Err(ErrorKind::ConnectionReset));
    assert!(!is_held_by_nginx(&lab, attacker)?);
    assert_eq!(lab.get(client_v4(1), "/", SOON)?, 200);
    drop(nginx);
    Ok(())
}

#[test]
fn a_ban_ends_the_connections_of_its_source() -> Result<()> {
    let lab = Lab::new()?;
    let nginx = Nginx::start(&lab)?;
    let agent = Agent::start(&lab, &Config::new(nginx.log()))?;
    let mut log = Appender::open(nginx.log())?;
    let (attacker, person) = (client_v4(666), client_v4(667));
    let mut slow = slow_request(&lab, attacker)?;
    let _patient = slow_request(&lab, person)?;
    log.requests(attacker, agent.config().allowance() + 1)?;
    agent.event("ban", &attacker.to_string(), 1, SOON)?;
    agent.eventually("the attacker's connection to go", SOON, || {
        Ok((!is_held_by_nginx(&lab, attacker)?).then_some(()))
    })?;
    let told = slow.read(&mut [0]).map_err(|error| error.kind());
    assert_eq!(told, Err(ErrorKind::ConnectionReset));
    assert!(is_held_by_nginx(&lab, person)?, "a bystander was hit");
    Ok(())
}

#[test]
fn in_observe_mode_connections_stay() -> Result<()> {
    let lab = Lab::new()?;
    let nginx = Nginx::start(&lab)?;
    let agent = Agent::start(
        &lab,
        &Config {
            mode: "observe",
            ..Config::new(nginx.log())
        },
    )?;
    let mut log = Appender::open(nginx.log())?;
    let attacker = client_v4(666);
    let _slow = slow_request(&lab, attacker)?;
    log.requests(attacker, agent.config().allowance() + 1)?;
    agent.event("ban", &attacker.to_string(), 1, SOON)?;
    // Whatever the ban sets off is done when the next change has gone the same way.
    log.requests(client_v4(667), agent.config().allowance() + 1)?;
    agent.event("ban", &client_v4(667).to_string(), 1, SOON)?;
    assert!(is_held_by_nginx(&lab, attacker)?);
    Ok(())
}
