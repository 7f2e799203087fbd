//! What this host is like: the interface to guard, and who must never be banned.

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, Ipv6Addr},
};

use anyhow::{Context as _, Result};
use ipnet::IpNet;
use nix::ifaddrs::getifaddrs;
use procfs::{
    net::{TcpNetEntry, TcpState},
    process::{FDTarget, Process},
};
use tracing::warn;

/// The interface of the default route, IPv4's first.
///
/// # Errors
/// When there is none.
pub fn default_interface() -> Result<String> {
    let v4 = routes_v4()
        .into_iter()
        .filter(|route| route.is_default)
        .min_by_key(|route| route.metric);
    let v6 = || {
        routes_v6()
            .into_iter()
            .filter(|route| route.is_default)
            .min_by_key(|route| route.metric)
    };
    let route = v4.or_else(v6).context(
        "no default route to take the interface from: name the interfaces to guard in enforce.interfaces",
    )?;
    Ok(route.interface)
}

/// Addresses that must never be banned, each with the reason: this host's own, its gateways and name servers, and the
/// peers of SSH sessions. As of now.
#[must_use]
pub fn protected() -> Vec<(IpNet, &'static str)> {
    let mut all = Vec::new();
    let mut add = |address: IpAddr, why| {
        let address = address.to_canonical();
        if !address.is_unspecified() && !all.iter().any(|(net, _)| *net == IpNet::from(address)) {
            all.push((IpNet::from(address), why));
        }
    };
    match getifaddrs() {
        Ok(interfaces) => {
            for address in interfaces.filter_map(|interface| interface.address) {
                if let Some(v4) = address.as_sockaddr_in() {
                    add(v4.ip().into(), "an address of this host");
                } else if let Some(v6) = address.as_sockaddr_in6() {
                    add(v6.ip().into(), "an address of this host");
                }
            }
        }
        Err(error) => {
            warn!("this host's own addresses are unknown: {error}; list them in bans.allow");
        }
    }
    for route in routes_v4().into_iter().chain(routes_v6()) {
        add(route.gateway, "a gateway");
    }
    // systemd-resolved has those that it asks in a file of its own.
    for file in ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"] {
        for server in resolvers(&fs::read_to_string(file).unwrap_or_default()) {
            add(server, "a name server");
        }
    }
    for peer in ssh_peers() {
        add(peer, "logged in over SSH");
    }
    all
}

struct Route {
    interface: String,
    gateway: IpAddr,
    metric: u32,
    is_default: bool,
}

fn routes_v4() -> Vec<Route> {
    let routes = procfs::net::route().unwrap_or_default();
    let route = |route: procfs::net::RouteEntry| Route {
        is_default: route.destination.is_unspecified() && route.mask.is_unspecified(),
        interface: route.iface,
        gateway: route.gateway.into(),
        metric: route.metrics,
    };
    routes.into_iter().map(route).collect()
}

fn routes_v6() -> Vec<Route> {
    let text = fs::read_to_string("/proc/net/ipv6_route").unwrap_or_default();
    text.lines().filter_map(route_v6).collect()
}

/// A line of `/proc/net/ipv6_route`: destination, its prefix length, source, its prefix length, next hop, metric,
/// reference count, use count, flags, interface; numbers in hexadecimal.
fn route_v6(line: &str) -> Option<Route> {
    /// The route rejects; it leads nowhere.
    const REJECT: u32 = 0x0200;
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    let [
        destination,
        length,
        _,
        _,
        gateway,
        metric,
        _,
        _,
        flags,
        interface,
    ] = fields.as_slice()
    else {
        return None;
    };
    let address = |hex: &str| u128::from_str_radix(hex, 16).ok().map(Ipv6Addr::from);
    let rejects = u32::from_str_radix(flags, 16).ok()? & REJECT != 0;
    Some(Route {
        interface: (*interface).to_owned(),
        gateway: address(gateway)?.into(),
        metric: u32::from_str_radix(metric, 16).ok()?,
        is_default: address(destination)?.is_unspecified()
            && *length == "00"
            && *interface != "lo"
            && !rejects,
    })
}

fn resolvers(resolv_conf: &str) -> Vec<IpAddr> {
    let server = |line: &str| {
        let address = line.trim().strip_prefix("nameserver")?.trim();
        // A link-local server carries its interface: fe80::1%eth0.
        address.split('%').next()?.parse().ok()
    };
    resolv_conf.lines().filter_map(server).collect()
}

/// Peers of SSH sessions whose user has proved who they are, and of the session that this process itself was started from.
/// Whoever has only connected is nobody yet: guessing passwords must not lead onto the allowlist.
fn ssh_peers() -> Vec<IpAddr> {
    let held = session_sockets();
    let mut peers = Vec::new();
    if !held.is_empty() {
        let tables = [procfs::net::tcp(), procfs::net::tcp6()];
        let entries = tables.into_iter().flatten().flatten();
        let sockets: Vec<Socket> = entries.map(Socket::from).collect();
        peers = session_peers(&sockets, &held);
    }
    let own = std::env::var("SSH_CONNECTION").unwrap_or_default();
    peers.extend(
        own.split(' ')
            .next()
            .and_then(|address| address.parse::<IpAddr>().ok()),
    );
    peers
}

/// Inodes of the sockets of sshd's processes behind whose doors somebody is logged in.
fn session_sockets() -> BTreeSet<u64> {
    let processes = procfs::process::all_processes().into_iter().flatten();
    // Anybody can call a process of their own anything, but not one of root's, nor make root's their parent.
    let is_session = |process: &Process| {
        let Ok(stat) = process.stat() else {
            return false;
        };
        let title = || Some(process.cmdline().ok()?.join(" "));
        stat.comm.starts_with("sshd")
            && title().is_some_and(|title| is_logged_in(&title))
            && (is_root(process)
                || Process::new(stat.ppid).is_ok_and(|parent| is_sshd_of_root(&parent)))
    };
    let sessions = processes.flatten().filter(is_session);
    let files = sessions.filter_map(|process| process.fd().ok()).flatten();
    files
        .flatten()
        .filter_map(|file| match file.target {
            FDTarget::Socket(inode) => Some(inode),
            _ => None,
        })
        .collect()
}

fn is_root(process: &Process) -> bool {
    process
        .status()
        .is_ok_and(|status| [status.ruid, status.euid] == [0, 0])
}

fn is_sshd_of_root(process: &Process) -> bool {
    let is_sshd = process
        .stat()
        .is_ok_and(|stat| stat.comm.starts_with("sshd"));
    is_sshd && is_root(process)
}

/// OpenSSH names its processes: `sshd: alice [priv]` and `[net]` before somebody is logged in, `sshd: alice@pts/0` for who is.
fn is_logged_in(title: &str) -> bool {
    let title = title.trim();
    let session = title
        .strip_prefix("sshd: ")
        .or_else(|| title.strip_prefix("sshd-session: "));
    session.is_some_and(|session| session.contains('@') && !session.ends_with(']'))
}

/// A TCP socket of this host, as far as it matters here.
struct Socket {
    is_listening: bool,
    is_connected: bool,
    port: u16,
    peer: IpAddr,
    inode: u64,
}

impl From<TcpNetEntry> for Socket {
    fn from(entry: TcpNetEntry) -> Self {
        Self {
            is_listening: entry.state == TcpState::Listen,
            is_connected: entry.state == TcpState::Established,
            port: entry.local_address.port(),
            peer: entry.remote_address.ip(),
            inode: entry.inode,
        }
    }
}

/// Who is at the other end of the sessions' connections. A session may hold others: of ports that it forwards, to which it
/// connects itself or on which it listens.
fn session_peers(sockets: &[Socket], held: &BTreeSet<u64>) -> Vec<IpAddr> {
    let is_door = |port: u16| {
        sockets
            .iter()
            .any(|door| door.is_listening && door.port == port && !held.contains(&door.inode))
    };
    let is_session = |socket: &&Socket| {
        socket.is_connected && held.contains(&socket.inode) && is_door(socket.port)
    };
    let sessions = sockets.iter().filter(is_session);
    sessions.map(|socket| socket.peer).collect()
}

/// What this host is called, for messages.
#[must_use]
pub fn name() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = name.trim();
    if name.is_empty() {
        "localhost".to_owned()
    } else {
        name.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_servers_are_found_among_everything_else() {
        let text = "# a comment\nsearch example.org\nnameserver 192.0.2.53\n nameserver\t2001:db8::53\nnameserver fe80::1%eth0\nnameserver nobody\noptions ndots:1\n";
        let expected: Vec<IpAddr> = ["192.0.2.53", "2001:db8::53", "fe80::1"]
            .iter()
            .map(|a| a.parse().unwrap())
            .collect();
        assert_eq!(resolvers(text), expected);
    }

    #[test]
    fn a_default_route_of_ipv6_is_told_from_a_rejecting_one() {
        let zeros = "0".repeat(32);
        let gateway = "fe80000000000000000000000000000a";
        let line = |flags, interface| {
            format!(
                "{zeros} 00 {zeros} 00 {gateway} 00000400 00000001 00000000 {flags} {interface}"
            )
        };
        let route = route_v6(&line("00000003", "eth0")).unwrap();
        assert!(route.is_default);
        assert_eq!(
            (
                route.gateway.to_string(),
                route.metric,
                route.interface.as_str()
            ),
            ("fe80::a".to_owned(), 1024, "eth0")
        );
        assert!(!route_v6(&line("00200200", "lo")).unwrap().is_default);
        assert!(route_v6("garbage").is_none());
    }

    #[test]
    fn only_who_is_logged_in_has_a_session() {
        for (title, expected) in [
            ("sshd: alice@pts/0", true),
            ("sshd-session: root@notty", true),
            ("sshd: alice@pts/0,pts/1 ", true),
            ("sshd: alice [priv]", false),
            ("sshd: bob@example.org [net]", false),
            ("sshd: [accepted]", false),
            ("sshd: unknown [net]", false),
            (
                "sshd: /usr/sbin/sshd -D [listener] 0 of 10-100 startups",
                false,
            ),
            ("/usr/sbin/sshd -D -o x@y", false),
            ("", false),
        ] {
            assert_eq!(is_logged_in(title), expected, "{title}");
        }
    }

    #[test]
    fn a_session_s_peer_is_at_its_door_and_not_at_a_port_that_it_forwards() {
        let socket = |is_listening: bool, port, peer: &str, inode| Socket {
            is_listening,
            is_connected: !is_listening,
            port,
            peer: peer.parse().unwrap(),
            inode,
        };
        let sockets = [
            socket(true, 2222, "0.0.0.0", 1),
            socket(false, 2222, "198.51.100.7", 2),
            // Somebody who has not logged in; whom the session connects to, and who comes to a port that it forwards.
            socket(false, 2222, "198.51.100.8", 3),
            socket(false, 50_000, "198.51.100.9", 4),
            socket(true, 8080, "0.0.0.0", 5),
            socket(false, 8080, "198.51.100.10", 6),
        ];
        let held = BTreeSet::from([2, 4, 5, 6]);
        let peer: IpAddr = "198.51.100.7".parse().unwrap();
        assert_eq!(session_peers(&sockets, &held), [peer]);
    }

    #[test]
    fn this_host_s_own_addresses_are_protected() {
        let protected = protected();
        assert!(
            protected
                .iter()
                .any(|(net, _)| net.to_string() == "127.0.0.1/32"),
            "{protected:?}"
        );
    }
}
