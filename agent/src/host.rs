//! What this host is like: the interface to guard, and who must never be banned.

use std::{
    fs,
    net::{IpAddr, Ipv6Addr},
};

use anyhow::{Context as _, Result};
use ipnet::IpNet;
use nix::ifaddrs::getifaddrs;
use procfs::net::{TcpNetEntry, TcpState};
use tracing::warn;

/// The port whose peers are taken for whoever manages the host.
const SSH: u16 = 22;

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
/// peers of SSH sessions.
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
    for server in resolvers(&fs::read_to_string("/etc/resolv.conf").unwrap_or_default()) {
        add(server, "a name server");
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

/// Peers of established connections to the SSH port, and of the session that this process itself was started from.
fn ssh_peers() -> Vec<IpAddr> {
    let tables = [procfs::net::tcp(), procfs::net::tcp6()];
    let entries = tables.into_iter().flatten().flatten();
    let is_session = |entry: &TcpNetEntry| {
        entry.state == TcpState::Established && entry.local_address.port() == SSH
    };
    let mut peers: Vec<IpAddr> = entries
        .filter(is_session)
        .map(|entry| entry.remote_address.ip())
        .collect();
    let own = std::env::var("SSH_CONNECTION").unwrap_or_default();
    peers.extend(
        own.split(' ')
            .next()
            .and_then(|address| address.parse::<IpAddr>().ok()),
    );
    peers
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
