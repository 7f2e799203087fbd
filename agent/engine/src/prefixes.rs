//! Networks from which several clients were banned.
//!
//! IPv4 by /24; IPv6, whose clients are /64s, by /56 and by /48. Bounded: the network that has kept still the longest is forgotten.

use std::collections::{BTreeMap, BTreeSet};

use crate::{subject::Subject, time::Timestamp};

/// Networks that are remembered.
const MAX_NETWORKS: usize = 16_384;
/// A network in which nobody was banned for so long is forgotten.
const FORGET_SECS: u64 = 3600;
/// An IPv4 network is not banned before so long after its first member was, and no network looked at again for so long.
const PAUSE_SECS: u64 = 60;
/// Prefix lengths, and by how much more members each asks for.
const V4: [(u8, u32); 1] = [(24, 1)];
const V6: [(u8, u32); 2] = [(56, 1), (48, 2)];

#[derive(Debug)]
struct Network {
    /// When the first of them was banned.
    since: Timestamp,
    members: BTreeSet<Subject>,
    newest: Timestamp,
    looked: Timestamp,
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Prefixes {
    networks: BTreeMap<Subject, Network>,
    /// By when somebody of them was last banned.
    stillest: BTreeSet<(Timestamp, Subject)>,
}

impl Prefixes {
    /// A client was banned: the networks around it, narrowest first, in which at least `least` have been (twice as many for a
    /// /48), with how many there are. 0: never.
    pub fn note(&mut self, client: Subject, least: u32, now: Timestamp) -> Vec<(Subject, usize)> {
        if least == 0 || !client.is_client() {
            return Vec::new();
        }
        let lengths: &[(u8, u32)] = if client.is_v6() { &V6 } else { &V4 };
        let mut full = Vec::new();
        for (length, times) in lengths {
            let Some(prefix) = client.widened(*length) else {
                continue;
            };
            let network = self.networks.entry(prefix).or_insert(Network {
                since: now,
                members: BTreeSet::new(),
                newest: now,
                looked: Timestamp::from_secs(0),
            });
            if now.since(network.newest).as_secs() >= FORGET_SECS {
                network.members.clear();
                network.since = now;
            }
            self.stillest.remove(&(network.newest, prefix));
            self.stillest.insert((now, prefix));
            network.newest = now;
            let least = least.saturating_mul(*times) as usize;
            // More than are asked for need not be known.
            if network.members.len() < least.saturating_mul(4) {
                network.members.insert(client);
            }
            // An IPv4 network has many masters: those who behave have had the time to be seen.
            let is_ripe = client.is_v6() || now.since(network.since).as_secs() >= PAUSE_SECS;
            if is_ripe
                && network.members.len() >= least
                && now.since(network.looked).as_secs() >= PAUSE_SECS
            {
                network.looked = now;
                full.push((prefix, network.members.len()));
            }
        }
        while self.networks.len() > MAX_NETWORKS
            && let Some((_, stillest)) = self.stillest.pop_first()
        {
            self.networks.remove(&stillest);
        }
        full
    }
}

impl Prefixes {
    /// Nothing is held against a client any more.
    pub fn forget(&mut self, client: Subject) {
        for (length, _) in V4.iter().chain(&V6) {
            let network = client.widened(*length);
            if let Some(network) = network.and_then(|network| self.networks.get_mut(&network)) {
                network.members.remove(&client);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const NOW: Timestamp = Timestamp::from_secs(1_000_000);

    fn noted(prefixes: &mut Prefixes, client: &str, now: Timestamp) -> Vec<String> {
        let client = Subject::of_client(client.parse().unwrap());
        let full = prefixes.note(client, 3, now);
        full.iter()
            .map(|(prefix, members)| format!("{prefix} {members}"))
            .collect()
    }

    #[test]
    fn the_third_member_makes_a_network_full_and_the_same_one_does_not() {
        let mut prefixes = Prefixes::default();
        for client in ["192.0.2.1", "192.0.2.2", "192.0.2.2", "198.51.100.1"] {
            assert!(noted(&mut prefixes, client, NOW).is_empty(), "{client}");
        }
        assert!(
            noted(&mut prefixes, "192.0.2.3", NOW).is_empty(),
            "not at once"
        );
        let later = NOW + Duration::from_secs(60);
        assert_eq!(noted(&mut prefixes, "192.0.2.3", later), ["192.0.2.0/24 3"]);
        assert!(
            noted(&mut prefixes, "192.0.2.4", later).is_empty(),
            "not again at once"
        );
        let later = later + Duration::from_secs(60);
        assert_eq!(noted(&mut prefixes, "192.0.2.5", later), ["192.0.2.0/24 5"]);
        let much_later = later + Duration::from_secs(3600);
        assert!(noted(&mut prefixes, "192.0.2.6", much_later).is_empty());
    }

    #[test]
    fn ipv6_networks_are_56s_and_48s() {
        let mut prefixes = Prefixes::default();
        for n in 1..=2 {
            assert!(noted(&mut prefixes, &format!("2001:db8:0:{n}::1"), NOW).is_empty());
        }
        assert_eq!(
            noted(&mut prefixes, "2001:db8:0:3::1", NOW),
            ["2001:db8::/56 3"]
        );
        for n in 1..=2 {
            let client = format!("2001:db8:0:{n}00::1");
            assert!(noted(&mut prefixes, &client, NOW).is_empty());
        }
        assert_eq!(
            noted(&mut prefixes, "2001:db8:0:300::1", NOW),
            ["2001:db8::/48 6"]
        );
    }

    #[test]
    fn a_million_networks_take_no_more_room_than_the_bound() {
        let mut prefixes = Prefixes::default();
        for n in 0..40_000_u32 {
            let client = std::net::Ipv4Addr::from(n << 8);
            noted(
                &mut prefixes,
                &client.to_string(),
                NOW + Duration::from_millis(n.into()),
            );
        }
        assert_eq!(prefixes.networks.len(), MAX_NETWORKS);
    }
}
