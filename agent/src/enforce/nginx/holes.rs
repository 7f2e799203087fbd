//! What Nginx is to refuse of banned networks. It knows no allowlist: who is on it has to be left out, network by network.

use std::collections::BTreeSet;

use ipnet::IpNet;
use portcullis_engine::Subject;

/// Networks of which none covers another, in order.
#[derive(Debug, Default)]
pub(super) struct Holes(Vec<Subject>);

impl FromIterator<IpNet> for Holes {
    fn from_iter<I: IntoIterator<Item = IpNet>>(allowed: I) -> Self {
        // In order, what covers a network comes before it, with nothing between the two but what it covers as well.
        let sorted: BTreeSet<Subject> = allowed.into_iter().map(Subject::of_net).collect();
        let mut widest: Vec<Subject> = Vec::new();
        for net in sorted {
            if !widest.last().is_some_and(|around| around.covers(net)) {
                widest.push(net);
            }
        }
        Self(widest)
    }
}

impl Holes {
    /// The fewest networks that hold every address of each banned one, and none of the holes'. Of nested bans the same
    /// networks are left, so a hole adds at most as many as its prefix is longer than that of the widest ban around it:
    /// 24 for an IPv4 address, 48 for an IPv6 client, as bans are no wider than a /8 or a /16.
    pub(super) fn cut(&self, banned: &BTreeSet<Subject>) -> BTreeSet<Subject> {
        let mut left = BTreeSet::new();
        for ban in banned {
            let after = self.0.partition_point(|hole| hole <= ban);
            let around = after.checked_sub(1).and_then(|before| self.0.get(before));
            if around.is_some_and(|hole| hole.covers(*ban)) {
                continue;
            }
            let (_, rest) = self.0.split_at(after);
            let (inside, _) = rest.split_at(rest.partition_point(|hole| ban.covers(*hole)));
            split(*ban, inside, &mut left);
        }
        left
    }
}

/// Halves a network until each half is free of holes or one itself.
fn split(net: Subject, holes: &[Subject], left: &mut BTreeSet<Subject>) {
    match holes {
        [] => {
            left.insert(net);
        }
        [hole, ..] if *hole == net => {}
        _ => {
            let Ok(halves) = net.net().subnets(net.net().prefix_len() + 1) else {
                // Holes are inside, so it is no single address.
                return;
            };
            let mut holes = holes;
            for half in halves.map(Subject::of_net) {
                // No address is IPv4-mapped here: the half that would hold these is not those of IPv4.
                if half.is_v6() != net.is_v6() {
                    continue;
                }
                let (inside, others) =
                    holes.split_at(holes.partition_point(|hole| half.covers(*hole)));
                split(half, inside, left);
                holes = others;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::*;

    fn nets(texts: &[&str]) -> BTreeSet<Subject> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn holes(allowed: &BTreeSet<Subject>) -> Holes {
        allowed.iter().map(|subject| subject.net()).collect()
    }

    fn left(banned: &[&str], allowed: &[&str]) -> Vec<String> {
        let left = holes(&nets(allowed)).cut(&nets(banned));
        left.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn what_is_allowed_is_left_out_of_what_is_banned() {
        assert_eq!(
            left(
                &["192.0.2.0/29", "198.51.100.7", "203.0.113.0/24"],
                &[
                    "192.0.2.3",
                    "198.51.100.0/24",
                    "203.0.113.0/25",
                    "10.0.0.0/8"
                ]
            ),
            [
                "192.0.2.0/31",
                "192.0.2.2",
                "192.0.2.4/30",
                "203.0.113.128/25"
            ]
        );
        assert_eq!(
            left(&["2001:db8::/32"], &["2001:db8:8000::/34"]),
            ["2001:db8::/33", "2001:db8:c000::/34"]
        );
        assert_eq!(
            left(&["192.0.2.0/24"], &["192.0.2.0/24", "192.0.2.7"]),
            [""; 0]
        );
        assert_eq!(left(&["192.0.2.7"], &["192.0.2.6"]), ["192.0.2.7"]);
    }

    #[test]
    fn a_split_network_has_no_half_that_is_read_as_ipv4() {
        let left = left(&["::fffe:0:0/95"], &["::fffe:0:0/96"]);
        assert_eq!(left, [""; 0], "its other half is that of mapped addresses");
    }

    #[test]
    fn no_hole_costs_more_lines_than_its_prefix_has_bits() {
        let allowed = (0..4096_u32).map(|n| Ipv4Addr::from(0x0A00_0007 | n << 12));
        let allowed: Holes = allowed.map(|address| IpAddr::V4(address).into()).collect();
        let wide = allowed.cut(&nets(&["10.0.0.0/8"])).len();
        assert!(wide <= 4096 * 24, "{wide}");
        let nested = nets(&["10.0.0.0/8", "10.0.0.0/9", "10.0.0.0/12", "10.0.0.0/24"]);
        assert_eq!(allowed.cut(&nested).len(), wide);
    }

    /// Networks in 256 addresses at the end of a family's documentation prefix.
    fn networks(is_v6: bool) -> impl Strategy<Value = BTreeSet<Subject>> {
        let net = (any::<u8>(), 0_u8..=8).prop_map(move |(byte, length)| {
            let net = IpNet::new(address(is_v6, byte), if is_v6 { 120 } else { 24 } + length);
            Subject::of_net(net.unwrap())
        });
        prop::collection::btree_set(net, 0..10)
    }

    fn address(is_v6: bool, byte: u8) -> IpAddr {
        if is_v6 {
            Ipv6Addr::from(0x2001_0db8_u128 << 96 | u128::from(byte)).into()
        } else {
            Ipv4Addr::from(0xC000_0200 | u32::from(byte)).into()
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, cases: 512, ..ProptestConfig::default() })]

        /// As if each address were looked at; and no network could be left out, or be one with its neighbour.
        #[test]
        fn every_banned_address_is_left_unless_it_is_allowed(
            (is_v6, banned, allowed) in any::<bool>().prop_flat_map(|is_v6| (Just(is_v6), networks(is_v6), networks(is_v6))),
        ) {
            let holes = holes(&allowed);
            let left = holes.cut(&banned);
            let has = |nets: &BTreeSet<Subject>, address: IpAddr| nets.iter().any(|net| net.net().contains(&address));
            for byte in 0..=255 {
                let address = address(is_v6, byte);
                let is_refused = has(&banned, address) && !has(&allowed, address);
                prop_assert_eq!(has(&left, address), is_refused, "{}", address);
            }
            for ban in &banned {
                let alone = holes.cut(&BTreeSet::from([*ban]));
                prop_assert!(alone.is_subset(&left));
                for net in &alone {
                    let Some(around) = net.net().supernet().map(Subject::of_net) else { continue };
                    let is_free = !allowed.iter().any(|hole| hole.overlaps(around));
                    prop_assert!(net == ban || !is_free, "{} could be {}", net, around);
                }
            }
            let bits: usize = allowed.iter().map(|hole| usize::from(hole.net().prefix_len())).sum();
            prop_assert!(left.len() <= banned.len() + bits);
        }
    }
}
