//! XDP's place in the packets' way: taken, kept, given back, handed from one run to the next; over real packets.
#![expect(clippy::unwrap_used, reason = "a test panics with its evidence")]

use std::{fs, net::IpAddr, time::Duration};

use aya::{
    Ebpf,
    programs::{Xdp as Program, XdpMode},
};
use portcullis::{
    config,
    enforce::{
        Backend, Change, Chosen, Enforcer as _, Lifetime, Mode, choose, iptables,
        xdp::{Flavour, OBJECT, Options, Xdp, remove_leftovers},
    },
};
use portcullis_common::{SCHEMA, names, stats::Counter};
use portcullis_tests::lab::{
    EDGE_INTERFACE,
    bans::{LONG, ban, change, client, counter, entry},
    client_v4, client_v6, clock,
    container::{CONTAINER_INTERFACE, CONTAINER_OTHER, CONTAINER_V4},
    crossing::{Crossing, Way},
    echo::Flood,
    kernel::{xdp_mode, xdp_program},
    wait::eventually,
};

const SOON: Duration = Duration::from_secs(10);
const BOTH: [&str; 2] = [EDGE_INTERFACE, CONTAINER_INTERFACE];
const BANNED: IpAddr = client_v4(66);
const BANNED_V6: IpAddr = client_v6(6, 1);
const OTHER: IpAddr = client_v4(67);

/// Makes each scenario a test of its own for both flavours.
macro_rules! in_every_mode {
    ($($scenario:ident),* $(,)?) => {
        in_every_mode!(native, Native, $($scenario)*);
        in_every_mode!(generic, Generic, $($scenario)*);
    };
    ($name:ident, $flavour:ident, $($scenario:ident)*) => {
        mod $name {
            use super::Flavour;

            $(#[test]
            fn $scenario() {
                super::$scenario(Flavour::$flavour);
            })*
        }
    };
}

in_every_mode! {
    every_interface_is_guarded_until_it_is_no_longer_named,
    an_interface_that_comes_back_is_guarded_again,
    an_interface_is_guarded_by_its_name,
    a_link_that_somebody_unpins_is_put_back,
    a_stranger_s_program_is_neither_evicted_nor_joined,
    a_stranger_s_program_on_one_interface_leaves_the_other_guarded,
    no_packet_slips_through_while_the_program_is_replaced,
    no_packet_slips_through_when_the_agent_dies,
    a_ban_ends_on_its_deadline_with_no_agent,
    no_packet_slips_through_while_another_schema_is_replaced,
    leftovers_are_taken_out_whatever_schema_they_are_of,
}

/// An edge host with two interfaces: to the world, and to the container.
struct Site {
    crossing: Crossing,
    flavour: Flavour,
}

impl Site {
    /// Runs a scenario on the edge host.
    fn run(flavour: Flavour, scenario: impl FnOnce(&Self) + Send) {
        let site = Self {
            crossing: Crossing::new().unwrap(),
            flavour,
        };
        let edge = site.crossing.lab().edge();
        edge.run(|| scenario(&site)).unwrap();
    }

    fn open(&self, interfaces: &[&str]) -> Xdp {
        self.open_in(self.flavour, interfaces)
    }

    fn open_in(&self, flavour: Flavour, interfaces: &[&str]) -> Xdp {
        let options = Options {
            interfaces: interfaces.iter().map(|name| (*name).to_owned()).collect(),
            pin_dir: self.crossing.lab().pin_dir(),
            max_bans: 1000,
            sample_one_in: 0,
        };
        Xdp::open(&options, flavour, Mode::Enforce).unwrap()
    }

    /// With the clients that these tests ban in force, on both interfaces.
    fn guard(&self, interfaces: &[&str]) -> Xdp {
        let mut xdp = self.open(interfaces);
        let banned = [BANNED, BANNED_V6, CONTAINER_OTHER].map(client);
        ban(&mut xdp, &banned);
        assert!(xdp.activate().unwrap());
        xdp
    }

    /// As the agent starts, with the clients that these tests ban in its ledger.
    #[track_caller]
    fn start(&self, backends: &[Backend], interfaces: &[&str]) -> Chosen {
        let config = config::Enforce {
            interfaces: interfaces.iter().map(|name| (*name).to_owned()).collect(),
            backends: backends.to_vec(),
            pin_dir: self.crossing.lab().pin_dir(),
            ..config::Config::default().enforce
        };
        let bans = [BANNED, BANNED_V6].map(|banned| Change::Ban(client(banned), LONG));
        choose(
            &config,
            Mode::Enforce,
            1000,
            &[],
            bans.into_iter().collect(),
        )
        .unwrap()
    }

    fn mode(&self) -> &'static str {
        match self.flavour {
            Flavour::Native => "native",
            Flavour::Generic => "generic",
        }
    }

    /// How a program sits on an interface.
    #[track_caller]
    fn mode_on(&self, interface: &str) -> Option<&'static str> {
        xdp_mode(self.crossing.lab().edge(), interface).unwrap()
    }

    #[track_caller]
    fn program_on(&self, interface: &str) -> Option<u64> {
        xdp_program(self.crossing.lab().edge(), interface).unwrap()
    }

    /// Where the link of an interface is pinned.
    fn pin(&self, interface: &str) -> std::path::PathBuf {
        let pins = self.crossing.lab().pin_dir().join(format!("v{SCHEMA}"));
        pins.join(format!("links/{}:{interface}", self.mode()))
    }

    #[track_caller]
    fn guards_the_world(&self) {
        self.crossing.is_dropped(BANNED);
        self.crossing.is_dropped(BANNED_V6);
        self.crossing.passes(OTHER);
    }

    #[track_caller]
    fn guards_the_container(&self) {
        self.crossing.is_dropped_from_container(CONTAINER_OTHER);
        self.crossing.passes_from_container(CONTAINER_V4.into());
    }

    fn dropped(&self) -> u64 {
        let pins = self.crossing.lab().pins();
        pins.counter(Counter::Dropped).unwrap()
    }

    /// Waits until so many more packets have been dropped.
    #[track_caller]
    fn drops_more(&self, packets: u64) {
        let before = self.dropped();
        let dropping = eventually(&format!("{packets} more drops"), SOON, || {
            Ok((self.dropped() >= before + packets).then_some(()))
        });
        assert!(dropping.is_ok(), "{dropping:?}, {} so far", self.dropped());
    }
}

/// A program of somebody else's on an interface.
struct Stranger {
    ebpf: Ebpf,
    interface: &'static str,
}

impl Stranger {
    fn on(interface: &'static str, flavour: Flavour) -> Self {
        // A copy of ours does as well as any other: it has no bans.
        let mut ebpf = Ebpf::load(OBJECT).unwrap();
        let program: &mut Program = ebpf
            .program_mut(names::PROGRAM)
            .unwrap()
            .try_into()
            .unwrap();
        program.load().unwrap();
        let mode = match flavour {
            Flavour::Native => XdpMode::Driver,
            Flavour::Generic => XdpMode::Skb,
        };
        program.attach(interface, mode).unwrap();
        Self { ebpf, interface }
    }

    /// Waits for it, too: a process that another test is about to start has a copy of the link's descriptor for a moment.
    fn leave(self, site: &Site) {
        drop(self.ebpf);
        eventually("the stranger to be gone", SOON, || {
            Ok(site.program_on(self.interface).is_none().then_some(()))
        })
        .unwrap();
    }
}

/// An interface is not taken, and the reason names the program that has it.
#[track_caller]
fn refuses(xdp: &mut Xdp, interface: &str, theirs: u64) {
    let said = format!("{:#}", xdp.activate().unwrap_err());
    assert!(
        said.contains(&format!("(id {theirs}, ")) && said.contains(interface),
        "{said}"
    );
}

fn every_interface_is_guarded_until_it_is_no_longer_named(flavour: Flavour) {
    Site::run(flavour, |site| {
        let mut xdp = site.guard(&BOTH);
        assert_eq!(xdp.place(), "edge0, edge1");
        assert_eq!(BOTH.map(|name| site.mode_on(name)), [Some(site.mode()); 2]);
        site.guards_the_world();
        site.guards_the_container();
        assert_eq!(counter(&mut xdp, "dropped"), 5);
        assert_eq!(entry(&mut xdp, client(CONTAINER_OTHER)).unwrap().hits, 1);
        drop(xdp);

        let mut next = site.open(&[EDGE_INTERFACE]);
        next.activate().unwrap();
        eventually("the other one to be released", SOON, || {
            Ok(site.mode_on(CONTAINER_INTERFACE).is_none().then_some(()))
        })
        .unwrap();
        site.crossing.passes_from_container(CONTAINER_OTHER);
        site.guards_the_world();
    });
}

fn an_interface_that_comes_back_is_guarded_again(flavour: Flavour) {
    Site::run(flavour, |site| {
        let mut xdp = site.guard(&BOTH);
        site.guards_the_container();
        let container = site.crossing.container();
        container.disconnect().unwrap();
        for _ in 0..2 {
            let said = format!("{:#}", xdp.activate().unwrap_err());
            assert!(said.contains("edge1"), "{said}");
        }
        assert_eq!(site.mode_on(EDGE_INTERFACE), Some(site.mode()));
        container.connect().unwrap();
        site.crossing.passes_from_container(CONTAINER_OTHER);
        assert!(xdp.activate().unwrap(), "there was something to put back");
        assert!(!xdp.activate().unwrap(), "there was nothing any more");
        site.guards_the_container();
        site.guards_the_world();

        // And it may come back between two looks.
        container.disconnect().unwrap();
        container.connect().unwrap();
        assert!(xdp.activate().unwrap(), "there was something to put back");
        site.guards_the_container();
        site.guards_the_world();
    });
}

fn an_interface_is_guarded_by_its_name(flavour: Flavour) {
    Site::run(flavour, |site| {
        let mut xdp = site.guard(&BOTH);
        let edge = site.crossing.lab().edge();
        edge.ip(&[
            &format!("link set dev {CONTAINER_INTERFACE} down"),
            &format!("link set dev {CONTAINER_INTERFACE} name other"),
        ])
        .unwrap();
        let said = format!("{:#}", xdp.activate().unwrap_err());
        assert!(
            said.contains("there is no interface edge1 any more"),
            "{said}"
        );
        assert_eq!(
            site.mode_on("other"),
            Some(site.mode()),
            "rather too much than too little"
        );
        // Something else is called so now.
        edge.ip(&[&format!(
            "link add {CONTAINER_INTERFACE} type veth peer name peer"
        )])
        .unwrap();
        assert!(xdp.activate().unwrap(), "it was not guarded");
        assert!(!xdp.activate().unwrap());
        assert_eq!(site.mode_on(CONTAINER_INTERFACE), Some(site.mode()));
        eventually("the old one to be released", SOON, || {
            Ok(site.mode_on("other").is_none().then_some(()))
        })
        .unwrap();
        edge.ip(&[&format!("link del {CONTAINER_INTERFACE}"), "link del other"])
            .unwrap();
        site.crossing.container().connect().unwrap();
        assert!(xdp.activate().unwrap(), "that is a third one");
        site.guards_the_container();
        site.guards_the_world();
    });
}

fn a_link_that_somebody_unpins_is_put_back(flavour: Flavour) {
    Site::run(flavour, |site| {
        let mut xdp = site.guard(&[EDGE_INTERFACE]);
        for _ in 0..2 {
            fs::remove_file(site.pin(EDGE_INTERFACE)).unwrap();
            eventually("the kernel to detach it", SOON, || {
                Ok(site.mode_on(EDGE_INTERFACE).is_none().then_some(()))
            })
            .unwrap();
            site.crossing.passes(BANNED);
            assert!(xdp.activate().unwrap(), "there was something to put back");
            assert!(!xdp.activate().unwrap(), "there was nothing any more");
            site.guards_the_world();
        }
        // What was put back outlives the agent like what was there first.
        drop(xdp);
        site.guards_the_world();
    });
}

fn a_stranger_s_program_is_neither_evicted_nor_joined(flavour: Flavour) {
    Site::run(flavour, |site| {
        let stranger = Stranger::on(CONTAINER_INTERFACE, flavour);
        let theirs = site.program_on(CONTAINER_INTERFACE).unwrap();
        let mut xdp = site.open(&BOTH);
        ban(&mut xdp, &[client(BANNED)]);
        refuses(&mut xdp, CONTAINER_INTERFACE, theirs);
        drop(xdp);
        assert_eq!(site.program_on(CONTAINER_INTERFACE), Some(theirs));
        eventually("nothing of a start that failed to be left", SOON, || {
            Ok(site.mode_on(EDGE_INTERFACE).is_none().then_some(()))
        })
        .unwrap();
        site.crossing.passes(BANNED);
        assert!(!site.crossing.lab().pin_dir().exists());

        stranger.leave(site);
        drop(site.guard(&BOTH));
        site.guards_the_container();
    });
}

fn a_stranger_s_program_on_one_interface_leaves_the_other_guarded(flavour: Flavour) {
    Site::run(flavour, |site| {
        let mut xdp = site.guard(&BOTH);
        let container = site.crossing.container();
        container.disconnect().unwrap();
        container.connect().unwrap();
        let stranger = Stranger::on(CONTAINER_INTERFACE, flavour);
        let theirs = site.program_on(CONTAINER_INTERFACE).unwrap();
        for _ in 0..2 {
            refuses(&mut xdp, CONTAINER_INTERFACE, theirs);
            assert_eq!(site.program_on(CONTAINER_INTERFACE), Some(theirs));
            site.guards_the_world();
        }
        // The next run finds it so, too.
        drop(xdp);
        let mut next = site.open(&BOTH);
        refuses(&mut next, CONTAINER_INTERFACE, theirs);
        drop(next);
        assert_eq!(site.program_on(CONTAINER_INTERFACE), Some(theirs));
        site.guards_the_world();

        let mut next = site.open(&BOTH);
        refuses(&mut next, CONTAINER_INTERFACE, theirs);
        stranger.leave(site);
        assert!(next.activate().unwrap(), "now there is room");
        site.guards_the_container();
        site.guards_the_world();
    });
}

fn no_packet_slips_through_while_the_program_is_replaced(flavour: Flavour) {
    Site::run(flavour, |site| {
        let mut xdp = site.guard(&[EDGE_INTERFACE]);
        let floods = [
            site.crossing.flood(BANNED, Way::In).unwrap(),
            site.crossing.flood(BANNED_V6, Way::Through).unwrap(),
        ];
        let mut programs = vec![site.program_on(EDGE_INTERFACE)];
        for _ in 0..20 {
            site.drops_more(50);
            let mut next = site.open(&[EDGE_INTERFACE]);
            site.drops_more(50);
            assert!(!next.activate().unwrap(), "it was attached all the time");
            xdp = next;
            programs.push(site.program_on(EDGE_INTERFACE));
        }
        site.drops_more(50);
        let sent: u64 = floods.into_iter().map(Flood::stop).sum();
        assert_eq!(
            [BANNED, BANNED_V6].map(|banned| site.crossing.received(banned)),
            [0, 0],
            "packets of {sent} got through"
        );
        programs.dedup();
        assert_eq!(programs.len(), 21, "each run had a program of its own");
        let dropped = counter(&mut xdp, "dropped");
        assert!((2050..=sent).contains(&dropped), "{dropped} of {sent}");
        let hits = [BANNED, BANNED_V6].map(|banned| entry(&mut xdp, client(banned)).unwrap().hits);
        assert_eq!(hits.iter().sum::<u64>(), dropped, "{hits:?}");
        site.crossing.passes(OTHER);
    });
}

fn no_packet_slips_through_when_the_agent_dies(flavour: Flavour) {
    Site::run(flavour, |site| {
        let xdp = site.guard(&BOTH);
        let flood = site.crossing.flood(BANNED, Way::Through).unwrap();
        site.drops_more(100);
        // As the kernel sees it: every descriptor is closed, nothing is taken back.
        drop(xdp);
        site.drops_more(1000);
        site.guards_the_world();
        site.guards_the_container();
        drop(flood);
        assert_eq!(site.crossing.received(BANNED), 0);
    });
}

fn a_ban_ends_on_its_deadline_with_no_agent(flavour: Flavour) {
    Site::run(flavour, |site| {
        let mut xdp = site.guard(&[EDGE_INTERFACE]);
        let length = Duration::from_secs(1);
        let start = clock::now();
        change(
            &mut xdp,
            &[Change::Ban(client(BANNED), Lifetime::For(length))],
        );
        drop(xdp);
        let flood = site.crossing.flood(BANNED, Way::In).unwrap();
        site.drops_more(50);
        eventually("the first packet after the ban", SOON, || {
            Ok((site.crossing.received(BANNED) > 0).then_some(()))
        })
        .unwrap();
        let lasted = clock::since(start);
        drop(flood);
        assert!(lasted >= length, "{lasted:?}");
        assert!(lasted < length * 2, "{lasted:?}");
        let pins = site.crossing.lab().pins();
        assert!(pins.counter(Counter::Expired).unwrap() > 0);
        site.crossing.passes(BANNED);
        site.crossing.is_dropped(BANNED_V6);
        // The next run sees that its time is over, and makes nothing of it.
        let mut next = site.open(&[EDGE_INTERFACE]);
        let found = entry(&mut next, client(BANNED)).unwrap();
        assert_eq!(found.lifetime, Lifetime::For(Duration::ZERO));
    });
}

fn no_packet_slips_through_while_another_schema_is_replaced(flavour: Flavour) {
    Site::run(flavour, |site| {
        drop(site.guard(&[EDGE_INTERFACE]));
        let old = site.program_on(EDGE_INTERFACE);
        let flood = site.crossing.flood(BANNED, Way::In).unwrap();
        site.drops_more(50);
        let pin_dir = site.crossing.lab().pin_dir();
        fs::rename(pin_dir.join(format!("v{SCHEMA}")), pin_dir.join("v0")).unwrap();

        let mut xdp = site.open(&[EDGE_INTERFACE]);
        // The ledger has the bans: maps of another schema are not read.
        let banned = [BANNED, BANNED_V6].map(client);
        ban(&mut xdp, &banned);
        xdp.activate().unwrap();
        assert_ne!(site.program_on(EDGE_INTERFACE), old);
        // In the new maps: it is the new program that drops.
        site.drops_more(50);
        drop(flood);
        assert_eq!(site.crossing.received(BANNED), 0, "packets got through");
        assert!(!pin_dir.join("v0").exists(), "the old pins are still there");
        drop(xdp);
        site.guards_the_world();
    });
}

fn leftovers_are_taken_out_whatever_schema_they_are_of(flavour: Flavour) {
    Site::run(flavour, |site| {
        let pin_dir = site.crossing.lab().pin_dir();
        for schema in [SCHEMA, 0] {
            drop(site.guard(&BOTH));
            let dir = pin_dir.join(format!("v{SCHEMA}"));
            fs::rename(dir, pin_dir.join(format!("v{schema}"))).unwrap();
            site.guards_the_world();
            assert!(remove_leftovers(&pin_dir).unwrap());
            assert_eq!(BOTH.map(|name| site.mode_on(name)), [None; 2], "v{schema}");
            assert!(!pin_dir.exists(), "v{schema}");
            site.crossing.passes(BANNED);
            assert!(!remove_leftovers(&pin_dir).unwrap());
        }
    });
}

#[test]
fn a_run_that_wants_another_mode_takes_over_what_is_attached() {
    Site::run(Flavour::Generic, |site| {
        drop(site.guard(&[EDGE_INTERFACE]));
        let flood = site.crossing.flood(BANNED, Way::In).unwrap();
        site.drops_more(50);
        let mut xdp = site.open_in(Flavour::Native, &[EDGE_INTERFACE]);
        xdp.activate().unwrap();
        assert_eq!(xdp.backend(), Backend::XdpGeneric);
        site.drops_more(50);
        drop(flood);
        assert_eq!(site.crossing.received(BANNED), 0);
        assert_eq!(site.mode_on(EDGE_INTERFACE), Some("generic"));
    });
}

#[test]
fn where_one_driver_has_no_native_xdp_all_are_guarded_in_generic_mode() {
    Site::run(Flavour::Generic, |site| {
        for _ in 0..5 {
            // The first takes native XDP, and is given back for the second, which has none.
            let interfaces = [EDGE_INTERFACE, CONTAINER_INTERFACE, "lo"];
            let backends = [Backend::XdpNative, Backend::XdpGeneric];
            let mut chosen = site.start(&backends, &interfaces);
            assert_eq!(chosen.enforcer.backend(), Backend::XdpGeneric);
            let [why] = chosen.refused.as_slice() else {
                unreachable!("{:?}", chosen.refused)
            };
            assert!(why.contains("the driver of lo has no native XDP"), "{why}");
            assert_eq!(
                interfaces.map(|name| site.mode_on(name)),
                [Some("generic"); 3]
            );
            site.guards_the_world();
            chosen.enforcer.detach().unwrap();
        }
    });
}

#[test]
fn an_interface_without_ethernet_is_left_to_iptables() {
    Site::run(Flavour::Native, |site| {
        let edge = site.crossing.lab().edge();
        edge.ip(&["tuntap add dev tun0 mode tun"]).unwrap();
        let backends = [Backend::XdpNative, Backend::XdpGeneric, Backend::Iptables];
        let mut chosen = site.start(&backends, &[EDGE_INTERFACE, "tun0"]);
        assert_eq!(chosen.enforcer.backend(), Backend::Iptables);
        for why in &chosen.refused {
            assert!(why.contains("tun0 carries no Ethernet"), "{why}");
        }
        site.guards_the_world();
        chosen.enforcer.detach().unwrap();
    });
}

#[test]
fn iptables_stands_in_while_a_stranger_has_the_interface_and_gives_way_without_a_gap() {
    Site::run(Flavour::Native, |site| {
        let backends = [Backend::XdpNative, Backend::XdpGeneric, Backend::Iptables];
        let stranger = Stranger::on(EDGE_INTERFACE, Flavour::Native);
        let theirs = site.program_on(EDGE_INTERFACE).unwrap();
        let chosen = site.start(&backends, &[EDGE_INTERFACE]);
        assert_eq!(chosen.enforcer.backend(), Backend::Iptables);
        assert_eq!(chosen.refused.len(), 2, "{:?}", chosen.refused);
        for why in &chosen.refused {
            assert!(why.contains(&format!("(id {theirs}, ")), "{why}");
        }
        assert_eq!(site.program_on(EDGE_INTERFACE), Some(theirs));
        site.guards_the_world();
        drop(chosen);
        stranger.leave(site);

        let flood = site.crossing.flood(BANNED, Way::Through).unwrap();
        let mut chosen = site.start(&backends, &[EDGE_INTERFACE]);
        assert_eq!(chosen.enforcer.backend(), Backend::XdpNative);
        site.drops_more(50);
        drop(flood);
        assert_eq!(site.crossing.received(BANNED), 0);
        site.guards_the_world();
        assert!(
            !iptables::remove_leftovers().unwrap(),
            "nothing was left of it"
        );
        chosen.enforcer.detach().unwrap();
    });
}
