//! What every back end does, over real packets to the host itself and through it to a container. Nothing here knows
//! which back end it is, except [`BackEnd`].
#![expect(clippy::unwrap_used, reason = "a test panics with its evidence")]

use std::{net::IpAddr, time::Duration};

use ipnet::IpNet;
use portcullis::enforce::{
    Change, Drift, Enforcer, Intent, Lifetime, Mode,
    iptables::Iptables,
    reconcile,
    xdp::{self, Xdp},
};
use portcullis_engine::Subject;
use portcullis_tests::lab::{
    EDGE_INTERFACE, Lab,
    bans::{LONG, ban, change, client, counter, entry},
    client_v4, client_v6 as v6, clock,
    crossing::{Crossing, Way},
    tools::{self, Tools},
    wait::eventually,
};

const MAX_BANS: u32 = 20_000;
const SOON: Duration = Duration::from_secs(10);

/// What drops packets. XDP sits on the interface to the world, so what is forwarded passes it too.
#[derive(Clone, Copy)]
enum BackEnd {
    Xdp(xdp::Flavour),
    Iptables(tools::Flavour),
}

impl BackEnd {
    const XDP_NATIVE: Self = Self::Xdp(xdp::Flavour::Native);
    const XDP_GENERIC: Self = Self::Xdp(xdp::Flavour::Generic);
    const IPTABLES_NFT: Self = Self::Iptables(tools::Flavour::Nft);
    const IPTABLES_LEGACY: Self = Self::Iptables(tools::Flavour::Legacy);

    fn open(self, lab: &Lab, mode: Mode) -> Box<dyn Enforcer> {
        match self {
            Self::Xdp(flavour) => {
                let options = xdp::Options {
                    interfaces: vec![EDGE_INTERFACE.to_owned()],
                    pin_dir: lab.pin_dir(),
                    max_bans: MAX_BANS,
                    sample_one_in: 0,
                };
                Box::new(Xdp::open(&options, flavour, mode).unwrap())
            }
            Self::Iptables(_) => Box::new(Iptables::open(mode, MAX_BANS).unwrap()),
        }
    }

    /// Runs a scenario on the guarded host.
    fn on_edge(self, scenario: impl FnOnce(&Crossing) + Send) {
        let site = Crossing::new().unwrap();
        let inside = || {
            if let Self::Iptables(flavour) = self {
                Tools::new().unwrap().iptables(flavour).unwrap();
            }
            scenario(&site);
        };
        site.lab().edge().run(inside).unwrap();
    }

    /// The same with the back end in force.
    fn guarded(self, mode: Mode, scenario: impl FnOnce(&Crossing, &mut dyn Enforcer) + Send) {
        self.on_edge(|site| {
            let mut enforcer = self.open(site.lab(), mode);
            assert!(enforcer.activate().unwrap(), "nothing was there before");
            scenario(site, &mut *enforcer);
            enforcer.detach().unwrap();
        });
    }
}

/// Makes each scenario a test of its own for every back end.
macro_rules! on_every_back_end {
    ($($scenario:ident),* $(,)?) => {
        on_every_back_end!(xdp_native, BackEnd::XDP_NATIVE, $($scenario)*);
        on_every_back_end!(xdp_generic, BackEnd::XDP_GENERIC, $($scenario)*);
        on_every_back_end!(iptables_nft, BackEnd::IPTABLES_NFT, $($scenario)*);
        on_every_back_end!(iptables_legacy, BackEnd::IPTABLES_LEGACY, $($scenario)*);
    };
    ($name:ident, $back_end:expr, $($scenario:ident)*) => {
        mod $name {
            use super::BackEnd;

            $(#[test]
            fn $scenario() {
                super::$scenario($back_end);
            })*
        }
    };
}

on_every_back_end! {
    a_banned_client_is_dropped_and_its_neighbours_pass,
    prefixes_and_single_ipv6_addresses_are_banned_as_they_are_named,
    no_fragment_of_a_banned_client_gets_through,
    the_allowlist_wins_over_every_ban,
    observing_only_counts_and_the_mode_can_be_switched,
    a_ban_ends_in_time_without_the_agent,
    a_ban_can_be_renewed_made_permanent_and_ended,
    bans_stand_while_no_agent_runs_and_the_next_one_adopts_them,
    a_new_agent_s_mode_is_in_force_from_activation,
    nothing_is_dropped_before_activation_nor_after_detach,
    what_differs_from_the_ledger_is_found_and_repaired,
    a_ban_may_only_be_observed_and_the_narrowest_decides,
    an_entry_that_somebody_takes_out_of_the_allowlist_is_put_back,
    ten_thousand_bans_go_in_at_once,
    the_allowlist_is_replaced_without_a_gap,
}

const fn v4(high: u8, low: u8) -> IpAddr {
    client_v4(u16::from_be_bytes([high, low]))
}

fn subject(text: &str) -> Subject {
    text.parse().unwrap()
}

fn nets(texts: &[&str]) -> Vec<IpNet> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn listed(enforcer: &mut dyn Enforcer) -> Vec<String> {
    let entries = enforcer.entries().unwrap();
    let mut listed: Vec<_> = entries
        .iter()
        .map(|entry| entry.subject.to_string())
        .collect();
    listed.sort();
    listed
}

fn a_banned_client_is_dropped_and_its_neighbours_pass(on: BackEnd) {
    on.guarded(Mode::Enforce, |site, enforcer| {
        ban(enforcer, &[client(v4(0, 66)), client(v6(6, 1))]);
        site.is_dropped(v4(0, 66));
        site.passes(v4(0, 65));
        site.passes(v4(0, 67));
        // The whole /64, and nothing but.
        site.is_dropped(v6(6, 1));
        site.is_dropped(v6(6, 999));
        site.passes(v6(5, 1));
        site.passes(v6(7, 1));
        assert_eq!(counter(enforcer, "dropped"), 6);
        assert_eq!(entry(enforcer, client(v4(0, 66))).unwrap().hits, 2);
        assert_eq!(entry(enforcer, client(v6(6, 1))).unwrap().hits, 4);

        change(
            enforcer,
            &[
                Change::Unban(client(v4(0, 66))),
                Change::Unban(client(v6(6, 1))),
                Change::Unban(client(v4(9, 9))),
            ],
        );
        site.passes(v4(0, 66));
        site.passes(v6(6, 1));
        assert_eq!(enforcer.entries().unwrap(), []);
        assert_eq!(counter(enforcer, "dropped"), 6);
    });
}

fn prefixes_and_single_ipv6_addresses_are_banned_as_they_are_named(on: BackEnd) {
    on.guarded(Mode::Enforce, |site, enforcer| {
        let named = ["198.19.8.0/22", "2001:db8:1:100::/56", "2001:db8:1:7::1"];
        ban(enforcer, &named.map(subject));
        for inside in [v4(8, 0), v4(11, 255), v6(0x100, 1), v6(0x1ff, 1), v6(7, 1)] {
            site.is_dropped(inside);
        }
        for outside in [v4(7, 255), v4(12, 0), v6(0xff, 1), v6(0x200, 1), v6(7, 2)] {
            site.passes(outside);
        }
        assert_eq!(listed(enforcer), named);
        // The wider ban outlasts the narrower one.
        ban(enforcer, &[client(v4(9, 9))]);
        change(enforcer, &[Change::Unban(client(v4(9, 9)))]);
        site.is_dropped(v4(9, 9));
    });
}

fn no_fragment_of_a_banned_client_gets_through(on: BackEnd) {
    on.guarded(Mode::Enforce, |site, enforcer| {
        ban(enforcer, &[client(v4(0, 66)), subject("2001:db8:1:6::/64")]);
        site.passes_in_fragments(v4(0, 65));
        site.passes_in_fragments(v6(5, 1));
        site.is_dropped_in_fragments(v4(0, 66));
        site.is_dropped_in_fragments(v6(6, 1));
    });
}

fn the_allowlist_wins_over_every_ban(on: BackEnd) {
    on.guarded(Mode::Enforce, |site, enforcer| {
        ban(
            enforcer,
            &[
                client(v4(0, 66)),
                subject("198.19.8.0/22"),
                client(v6(6, 1)),
                subject("2001:db8:1:100::/56"),
            ],
        );
        let allow = nets(&[
            "198.19.0.64/26",
            "198.19.9.9/32",
            "2001:db8:1:6::/64",
            "2001:db8:1:101::5/128",
        ]);
        enforcer.set_allowlist(&allow).unwrap();
        for allowed in [v4(0, 66), v4(9, 9), v6(6, 1), v6(0x101, 5)] {
            site.passes(allowed);
        }
        for other in [v4(9, 8), v4(9, 10), v6(0x101, 6)] {
            site.is_dropped(other);
        }
        // Those that would otherwise have been dropped, not every packet of an allowed client.
        assert_eq!(counter(enforcer, "allowed"), 8);
        site.passes(v4(0, 70));
        assert_eq!(counter(enforcer, "allowed"), 8);

        enforcer.set_allowlist(&nets(&["198.19.9.9/32"])).unwrap();
        site.passes(v4(9, 9));
        site.is_dropped(v4(0, 66));
        enforcer
            .set_allowlist(&nets(&["0.0.0.0/0", "::/0"]))
            .unwrap();
        site.passes(v4(0, 66));
        site.passes(v6(6, 1));
        enforcer.set_allowlist(&[]).unwrap();
        site.is_dropped(v4(9, 9));
        site.is_dropped(v6(6, 1));
    });
}

fn observing_only_counts_and_the_mode_can_be_switched(on: BackEnd) {
    on.guarded(Mode::Observe, |site, enforcer| {
        let totals = |enforcer: &mut dyn Enforcer| {
            ["dropped", "would_drop"].map(|name| counter(enforcer, name))
        };
        ban(enforcer, &[client(v4(0, 66)), client(v6(6, 1))]);
        site.passes(v4(0, 66));
        site.passes(v6(6, 1));
        assert_eq!(totals(enforcer), [0, 4]);
        assert_eq!(entry(enforcer, client(v4(0, 66))).unwrap().hits, 2);

        enforcer.set_mode(Mode::Enforce).unwrap();
        site.is_dropped(v4(0, 66));
        site.is_dropped(v6(6, 1));
        assert_eq!(totals(enforcer), [4, 4], "totals outlive the switch");

        enforcer.set_mode(Mode::Observe).unwrap();
        site.passes(v4(0, 66));
        assert_eq!(totals(enforcer), [4, 6]);
    });
}

fn a_ban_ends_in_time_without_the_agent(on: BackEnd) {
    on.on_edge(|site| {
        let mut enforcer = on.open(site.lab(), Mode::Enforce);
        enforcer.activate().unwrap();
        let length = Duration::from_secs(2);
        let short = Lifetime::For(length);
        ban(&mut *enforcer, &[client(v4(0, 67))]);
        let start = clock::now();
        change(
            &mut *enforcer,
            &[
                Change::Ban(client(v4(0, 66)), short),
                Change::Ban(client(v6(6, 1)), short),
            ],
        );
        drop(enforcer);
        site.is_dropped(v4(0, 66));
        site.is_dropped(v6(6, 1));
        let flood = site.flood(v4(0, 66), Way::Through).unwrap();
        eventually("the first packet after the ban", SOON, || {
            Ok((site.received(v4(0, 66)) > 0).then_some(()))
        })
        .unwrap();
        let lasted = clock::since(start);
        drop(flood);
        assert!(lasted >= length, "{lasted:?}");
        assert!(lasted < length + Duration::from_secs(2), "{lasted:?}");
        site.passes(v4(0, 66));
        site.passes(v6(6, 1));
        site.is_dropped(v4(0, 67));
    });
}

fn a_ban_can_be_renewed_made_permanent_and_ended(on: BackEnd) {
    on.guarded(Mode::Enforce, |site, enforcer| {
        let banned = client(v4(0, 66));
        let for_secs = |secs| Change::Ban(banned, Lifetime::For(Duration::from_secs(secs)));
        #[track_caller]
        fn left(enforcer: &mut dyn Enforcer, banned: Subject) -> u64 {
            match entry(enforcer, banned).unwrap().lifetime {
                Lifetime::For(left) => left.as_secs(),
                Lifetime::Permanent => u64::MAX,
            }
        }
        change(enforcer, &[for_secs(30)]);
        site.is_dropped(v4(0, 66));
        assert!((15..=30).contains(&left(enforcer, banned)));
        change(enforcer, &[for_secs(300)]);
        assert!((285..=300).contains(&left(enforcer, banned)));
        change(enforcer, &[for_secs(100)]);
        assert!((85..=100).contains(&left(enforcer, banned)));
        assert_eq!(entry(enforcer, banned).unwrap().hits, 2, "counters go on");
        change(enforcer, &[Change::Ban(banned, Lifetime::Permanent)]);
        assert_eq!(left(enforcer, banned), u64::MAX);
        site.is_dropped(v4(0, 66));
        assert_eq!(entry(enforcer, banned).unwrap().hits, 4);
        change(
            enforcer,
            &[Change::Ban(banned, Lifetime::For(Duration::ZERO))],
        );
        site.passes(v4(0, 66));
        // In order, within a batch.
        change(
            enforcer,
            &[
                Change::Ban(banned, LONG),
                Change::Unban(banned),
                Change::Ban(client(v4(0, 67)), LONG),
                Change::Unban(client(v4(0, 67))),
                Change::Ban(client(v4(0, 67)), LONG),
            ],
        );
        site.passes(v4(0, 66));
        site.is_dropped(v4(0, 67));
    });
}

fn bans_stand_while_no_agent_runs_and_the_next_one_adopts_them(on: BackEnd) {
    on.on_edge(|site| {
        let mut first = on.open(site.lab(), Mode::Enforce);
        first.activate().unwrap();
        first.set_allowlist(&nets(&["198.19.0.70/32"])).unwrap();
        ban(
            &mut *first,
            &[client(v4(0, 66)), client(v4(0, 70)), client(v6(6, 1))],
        );
        drop(first);
        site.is_dropped(v4(0, 66));

        let mut second = on.open(site.lab(), Mode::Enforce);
        assert_eq!(
            listed(&mut *second),
            ["198.19.0.66", "198.19.0.70", "2001:db8:1:6::/64"]
        );
        assert_eq!(entry(&mut *second, client(v4(0, 66))).unwrap().hits, 2);
        assert_eq!(counter(&mut *second, "dropped"), 2);
        site.passes(v4(0, 70));
        second.activate().unwrap();
        site.is_dropped(v4(0, 66));
        site.is_dropped(v6(6, 1));
        site.passes(v4(0, 70));
        drop(second);
        site.is_dropped(v6(6, 1));
        on.open(site.lab(), Mode::Enforce).detach().unwrap();
        site.passes(v6(6, 1));
    });
}

fn a_new_agent_s_mode_is_in_force_from_activation(on: BackEnd) {
    on.guarded(Mode::Observe, |site, enforcer| {
        ban(enforcer, &[client(v4(0, 66)), client(v6(6, 1))]);
        let mut second = on.open(site.lab(), Mode::Enforce);
        site.passes(v4(0, 66));
        second.set_allowlist(&nets(&["198.19.0.66/32"])).unwrap();
        second.activate().unwrap();
        site.passes(v4(0, 66));
        site.is_dropped(v6(6, 1));
        assert_eq!(counter(&mut *second, "would_drop"), 2);
        let mut third = on.open(site.lab(), Mode::Enforce);
        third.set_mode(Mode::Observe).unwrap();
        site.is_dropped(v6(6, 1));
        third.activate().unwrap();
        site.passes(v6(6, 1));
    });
}

fn nothing_is_dropped_before_activation_nor_after_detach(on: BackEnd) {
    on.on_edge(|site| {
        let mut enforcer = on.open(site.lab(), Mode::Enforce);
        ban(&mut *enforcer, &[client(v4(0, 66)), client(v6(6, 1))]);
        site.passes(v4(0, 66));
        assert!(enforcer.activate().unwrap());
        assert!(
            !enforcer.activate().unwrap(),
            "there was nothing to put back"
        );
        site.is_dropped(v4(0, 66));
        site.is_dropped(v6(6, 1));
        enforcer.detach().unwrap();
        site.passes(v4(0, 66));
        site.passes(v6(6, 1));
        enforcer.detach().unwrap();
    });
}

fn what_differs_from_the_ledger_is_found_and_repaired(on: BackEnd) {
    on.guarded(Mode::Enforce, |site, enforcer| {
        let wanted = [
            Change::Ban(client(v4(0, 66)), LONG),
            Change::Ban(client(v6(6, 1)), LONG),
            Change::Ban(subject("198.19.8.0/22"), Lifetime::Permanent),
            Change::Ban(subject("2001:db8:1:7::1"), LONG),
        ];
        let mut intent: Intent = wanted.into_iter().collect();
        change(
            enforcer,
            &[
                Change::Ban(wanted[0].subject(), Lifetime::For(Duration::from_secs(30))),
                Change::Ban(wanted[2].subject(), LONG),
                wanted[3],
                Change::Ban(client(v4(0, 67)), LONG),
                Change::Ban(subject("2001:db8:1:100::/56"), LONG),
            ],
        );
        let (drift, repaired) = reconcile(enforcer, &mut intent).unwrap();
        let expected = Drift {
            missing: 1,
            altered: 2,
            foreign: 2,
            ..Drift::default()
        };
        assert_eq!(drift, expected);
        let sorted = |changes: &[Change]| {
            let mut subjects: Vec<Subject> =
                changes.iter().map(|change| change.subject()).collect();
            subjects.sort_unstable();
            subjects
        };
        assert_eq!(sorted(&repaired), sorted(&wanted[..3]));
        for banned in [v4(0, 66), v6(6, 1), v4(9, 9), v6(7, 1)] {
            site.is_dropped(banned);
        }
        for other in [v4(0, 67), v6(0x100, 1), v6(7, 2)] {
            site.passes(other);
        }
        let (drift, repaired) = reconcile(enforcer, &mut intent).unwrap();
        assert!(drift.is_none() && repaired.is_empty(), "{drift}");
    });
}

fn a_ban_may_only_be_observed_and_the_narrowest_decides(on: BackEnd) {
    on.guarded(Mode::Enforce, |site, enforcer| {
        let (address, around) = (client(v4(0, 66)), subject("198.19.0.0/24"));
        let (one_of_64, of_64) = (subject("2001:db8:1:6::1"), client(v6(6, 1)));
        change(
            enforcer,
            &[
                Change::Ban(client(v4(1, 1)), LONG),
                Change::Observe(address, LONG),
                Change::Observe(of_64, LONG),
            ],
        );
        site.passes(v4(0, 66));
        site.passes(v6(6, 1));
        site.is_dropped(v4(1, 1));
        assert_eq!(counter(enforcer, "would_drop"), 4, "two ways each");
        let found = entry(enforcer, address).unwrap();
        assert!(found.observed && found.hits == 2, "{found:?}");
        assert!(!entry(enforcer, client(v4(1, 1))).unwrap().observed);

        // Inside a wider ban, and around a narrower one.
        change(
            enforcer,
            &[Change::Ban(around, LONG), Change::Ban(one_of_64, LONG)],
        );
        site.passes(v4(0, 66));
        site.is_dropped(v4(0, 67));
        site.is_dropped(v6(6, 1));
        site.passes(v6(6, 2));

        // The other way round.
        change(
            enforcer,
            &[
                Change::Ban(address, LONG),
                Change::Observe(around, LONG),
                Change::Ban(of_64, LONG),
                Change::Observe(one_of_64, LONG),
            ],
        );
        site.is_dropped(v4(0, 66));
        site.passes(v4(0, 67));
        site.passes(v6(6, 1));
        site.is_dropped(v6(6, 2));
        assert_eq!(enforcer.entries().unwrap().len(), 5);

        // What somebody makes of it is found, and the next run finds the same.
        let wanted = [
            Change::Ban(address, LONG),
            Change::Ban(around, LONG),
            Change::Ban(of_64, LONG),
            Change::Observe(one_of_64, LONG),
            Change::Ban(client(v4(1, 1)), LONG),
        ];
        let mut intent: Intent = wanted.into_iter().collect();
        let (drift, _) = reconcile(enforcer, &mut intent).unwrap();
        assert_eq!((drift.altered, drift.failed), (1, 0), "{drift}");
        site.is_dropped(v4(0, 67));
        let mut next = on.open(site.lab(), Mode::Enforce);
        let (drift, _) = reconcile(next.as_mut(), &mut intent).unwrap();
        assert!(drift.is_none(), "{drift}");
        change(
            next.as_mut(),
            &[Change::Observe(address, LONG), Change::Unban(one_of_64)],
        );
        next.activate().unwrap();
        site.passes(v4(0, 66));
        site.is_dropped(v4(0, 67));
        site.is_dropped(v6(6, 1));
        change(
            next.as_mut(),
            &[Change::Unban(address), Change::Unban(around)],
        );
        site.passes(v4(0, 67));
    });
}

fn an_entry_that_somebody_takes_out_of_the_allowlist_is_put_back(on: BackEnd) {
    on.guarded(Mode::Enforce, |site, enforcer| {
        ban(enforcer, &[subject("198.19.0.0/24"), client(v6(6, 1))]);
        enforcer
            .set_allowlist(&nets(&["198.19.0.66/32", "2001:db8:1:6::1/128"]))
            .unwrap();
        assert!(!enforcer.activate().unwrap());
        // Another run is somebody else.
        let mut other = on.open(site.lab(), Mode::Enforce);
        other.set_allowlist(&nets(&["198.19.0.70/32"])).unwrap();
        site.is_dropped(v4(0, 66));
        site.is_dropped(v6(6, 1));
        assert!(enforcer.activate().unwrap());
        site.passes(v4(0, 66));
        site.passes(v6(6, 1));
        site.is_dropped(v4(0, 70));
        assert!(!enforcer.activate().unwrap());
    });
}

fn ten_thousand_bans_go_in_at_once(on: BackEnd) {
    on.guarded(Mode::Enforce, |site, enforcer| {
        let subjects: Vec<_> = (0x100..0x100 + 5_000)
            .flat_map(|number| [client_v4(number), v6(number, 1)])
            .map(client)
            .collect();
        ban(enforcer, &subjects);
        assert_eq!(enforcer.entries().unwrap().len(), subjects.len());
        site.is_dropped(v4(1, 0));
        site.is_dropped(v6(0x100, 1));
        site.passes(v4(0, 1));
        let changes: Vec<_> = subjects.iter().copied().map(Change::Unban).collect();
        change(enforcer, &changes);
        assert_eq!(enforcer.entries().unwrap(), []);
        site.passes(v4(1, 0));
    });
}

fn the_allowlist_is_replaced_without_a_gap(on: BackEnd) {
    on.guarded(Mode::Enforce, |site, enforcer| {
        ban(enforcer, &[subject("198.19.0.0/16")]);
        let allow = nets(&["198.19.0.1/32"]);
        let more: Vec<_> = (1..200).map(|low| IpNet::from(v4(0, low))).collect();
        enforcer.set_allowlist(&allow).unwrap();
        let flood = site.flood(v4(0, 1), Way::In).unwrap();
        let mut rounds = 0;
        while rounds < 30 || flood.sent() < 2000 {
            enforcer.set_allowlist(&more).unwrap();
            enforcer.set_allowlist(&allow).unwrap();
            rounds += 1;
        }
        let sent = flood.stop();
        assert_eq!(counter(enforcer, "dropped"), 0, "of {sent}");
        site.is_dropped(v4(0, 2));
    });
}
