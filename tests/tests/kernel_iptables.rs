//! What is particular to the iptables back end: other people's rules and sets, other people's changes to ours, and
//! commands that fail. What it has in common with the others is in `kernel_enforcers`.
#![expect(clippy::unwrap_used, reason = "a test panics with its evidence")]

use std::{
    env,
    net::IpAddr,
    process::{Command, Stdio},
    time::Duration,
};

use portcullis::enforce::{
    Change, Enforcer as _, Intent, Lifetime, Mode,
    iptables::{Iptables, MAX_LIFETIME, remove_leftovers},
    reconcile,
};
use portcullis_engine::Subject;
use portcullis_tests::lab::{
    Lab,
    bans::{self, LONG, change, client, counter, entry},
    client_v4, client_v6 as v6, clock,
    crossing::{Crossing, Way},
    tools::{self, Flavour, Tools},
    wait::eventually,
};

const SOON: Duration = Duration::from_secs(10);
const FAMILIES: [&str; 2] = ["iptables", "ip6tables"];

/// Makes each scenario a test of its own for every flavour.
macro_rules! on_every_flavour {
    ($($scenario:ident),* $(,)?) => {
        on_every_flavour!(nft, Nft, $($scenario)*);
        on_every_flavour!(legacy, Legacy, $($scenario)*);
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

on_every_flavour! {
    detach_leaves_the_rules_of_others_and_nothing_else,
    the_jump_is_first_and_single_and_where_docker_sends_packets,
    a_rule_that_somebody_puts_before_ours_goes_behind_it,
    what_somebody_makes_of_the_observed_is_mended,
    activation_repairs_whatever_was_flushed,
    the_chain_is_refilled_without_a_gap,
    a_set_of_another_type_is_replaced_unless_somebody_uses_it,
    leftovers_of_an_earlier_run_are_removed,
    a_mode_that_cannot_be_set_for_both_families_is_set_for_neither,
}

/// Runs a job on the edge host, with that flavour for its iptables.
fn on_edge(lab: &Lab, flavour: Flavour, job: impl FnOnce(&Tools) + Send) {
    let inside = || {
        let tools = Tools::new().unwrap();
        tools.iptables(flavour).unwrap();
        job(&tools);
    };
    lab.edge().run(inside).unwrap();
}

fn guarded(
    flavour: Flavour,
    max_bans: u32,
    scenario: impl FnOnce(&Crossing, &mut Iptables) + Send,
) {
    let site = Crossing::new().unwrap();
    on_edge(site.lab(), flavour, |_| {
        let mut iptables = Iptables::open(Mode::Enforce, max_bans).unwrap();
        assert!(iptables.activate().unwrap());
        scenario(&site, &mut iptables);
    });
}

const fn v4(high: u8, low: u8) -> IpAddr {
    client_v4(u16::from_be_bytes([high, low]))
}

fn ban(iptables: &mut Iptables, addresses: &[IpAddr]) {
    let subjects: Vec<_> = addresses.iter().copied().map(client).collect();
    bans::ban(iptables, &subjects);
}

/// Runs one of iptables' programs; another laboratory's may hold the lock.
#[track_caller]
fn iptables(program: &str, arguments: &str) -> String {
    let words: Vec<_> = [program, "-w"]
        .into_iter()
        .chain(arguments.split(' '))
        .collect();
    tools::run(&words).unwrap()
}

#[track_caller]
fn both(arguments: &str) {
    for program in FAMILIES {
        iptables(program, arguments);
    }
}

#[track_caller]
fn ipset(arguments: &str) -> String {
    let words: Vec<_> = ["ipset"].into_iter().chain(arguments.split(' ')).collect();
    tools::run(&words).unwrap()
}

fn rules() -> String {
    FAMILIES.map(|program| iptables(program, "-S")).concat()
}

/// Everything that iptables and ipset know.
fn state() -> String {
    rules() + &ipset("save")
}

/// A rule that was just removed holds its set for a moment.
fn destroy_all_sets() {
    eventually("the sets to go", SOON, || {
        Ok(tools::run(&["ipset", "destroy"]).ok())
    })
    .unwrap();
}

fn detach_leaves_the_rules_of_others_and_nothing_else(flavour: Flavour) {
    on_edge(&Lab::new().unwrap(), flavour, |_| {
        both("-N DOCKER-USER");
        both("-A FORWARD -j DOCKER-USER");
        both("-P FORWARD ACCEPT");
        for program in FAMILIES {
            let comment = ["--comment", "a -j PORTCULLIS"];
            let rule = "-w -A INPUT -p tcp --dport 22 -j ACCEPT -m comment";
            let words: Vec<_> = [program]
                .into_iter()
                .chain(rule.split(' '))
                .chain(comment)
                .collect();
            tools::run(&words).unwrap();
        }
        ipset("create other hash:ip");
        ipset("add other 192.0.2.1");
        let before = state();
        let mut iptables = Iptables::open(Mode::Enforce, 100).unwrap();
        iptables
            .set_allowlist(&["192.0.2.0/24".parse().unwrap()])
            .unwrap();
        ban(&mut iptables, &[v4(0, 66), v6(6, 1)]);
        assert!(iptables.activate().unwrap());
        assert!(!iptables.activate().unwrap(), "nothing to put back");
        assert_ne!(state(), before);
        iptables.detach().unwrap();
        assert_eq!(state(), before);
    });
}

fn the_jump_is_first_and_single_and_where_docker_sends_packets(flavour: Flavour) {
    guarded(flavour, 100, |site, back_end| {
        /// Where in a chain the jump to ours is.
        fn jump(chain: &str) -> Option<usize> {
            let listing = iptables("iptables", &format!("-S {chain}"));
            let wanted = format!("-A {chain} -j PORTCULLIS");
            listing.lines().skip(1).position(|line| line == wanted)
        }
        let jumps = || {
            let listing = iptables("iptables", "-S");
            listing.matches("-j PORTCULLIS\n").count()
        };
        assert_eq!(
            (jump("INPUT"), jump("FORWARD"), jumps()),
            (Some(0), Some(0), 2)
        );
        assert_eq!(back_end.place(), "FORWARD, INPUT");

        // Docker starts: its rules go first, and accept.
        iptables("iptables", "-N DOCKER-USER");
        iptables("iptables", "-I FORWARD 1 -j ACCEPT");
        iptables("iptables", "-I FORWARD 1 -j DOCKER-USER");
        ban(back_end, &[v4(0, 66)]);
        let flood = site.flood(v4(0, 66), Way::Through).unwrap();
        eventually("Docker to let the banned client through", SOON, || {
            Ok((site.received(v4(0, 66)) > 0).then_some(()))
        })
        .unwrap();
        drop(flood);
        assert!(back_end.activate().unwrap());
        assert_eq!(
            (jump("INPUT"), jump("DOCKER-USER"), jump("FORWARD"), jumps()),
            (Some(0), Some(0), None, 2)
        );
        assert_eq!(
            back_end.place(),
            "DOCKER-USER, FORWARD, INPUT",
            "IPv6 has no Docker"
        );
        let before = counter(back_end, "dropped");
        site.is_dropped(v4(0, 66));
        assert_eq!(counter(back_end, "dropped"), before + 2, "each packet once");

        // Docker goes, its chain stays.
        iptables("iptables", "-D FORWARD -j DOCKER-USER");
        assert!(back_end.activate().unwrap());
        assert_eq!(
            (jump("DOCKER-USER"), jump("FORWARD"), jumps()),
            (None, Some(0), 2)
        );
        site.is_dropped(v4(0, 66));
    });
}

fn a_rule_that_somebody_puts_before_ours_goes_behind_it(flavour: Flavour) {
    guarded(flavour, 100, |site, back_end| {
        ban(back_end, &[v4(0, 66), v6(6, 1)]);
        for program in FAMILIES {
            iptables(program, "-I INPUT 1 -j ACCEPT");
            iptables(program, "-I FORWARD 1 -j ACCEPT");
        }
        site.passes(v4(0, 66));
        assert!(back_end.activate().unwrap());
        site.is_dropped(v4(0, 66));
        site.is_dropped(v6(6, 1));
        assert!(!back_end.activate().unwrap());
        both("-D INPUT -j ACCEPT");
        both("-D FORWARD -j ACCEPT");
    });
}

fn what_somebody_makes_of_the_observed_is_mended(flavour: Flavour) {
    guarded(flavour, 100, |site, back_end| {
        let (address, around) = (v4(0, 66), "198.19.0.0/24".parse().unwrap());
        let mut intent = Intent::from_iter([Change::Ban(client(address), LONG)]);
        ban(back_end, &[address]);
        // Nothing is observed, but for a stranger's hand.
        ipset("add PORTCULLIS-O4 198.19.0.66");
        ipset("add PORTCULLIS-O4 198.19.0.128/25");
        site.passes(address);
        let (drift, _) = reconcile(back_end, &mut intent).unwrap();
        assert_eq!((drift.foreign, drift.failed), (1, 0), "{drift}");
        site.is_dropped(address);
        let (drift, _) = reconcile(back_end, &mut intent).unwrap();
        assert!(drift.is_none(), "{drift}");

        let observe = Change::Observe(around, LONG);
        change(back_end, &[observe]);
        intent.note(observe);
        for harm in [
            "flush PORTCULLIS-O4",
            "del PORTCULLIS-O4 198.19.0.66",
            "add PORTCULLIS-O4 198.19.0.66 -exist",
        ] {
            ipset(harm);
            let (drift, _) = reconcile(back_end, &mut intent).unwrap();
            assert!(!drift.is_none() && drift.failed == 0, "{harm}: {drift}");
            site.is_dropped(address);
            site.passes(v4(0, 67));
            let (drift, _) = reconcile(back_end, &mut intent).unwrap();
            assert!(drift.is_none(), "{harm}: {drift}");
        }
        // A run with room for more makes the sets anew.
        let mut next = Iptables::open(Mode::Enforce, 200).unwrap();
        let (drift, _) = reconcile(&mut next, &mut intent).unwrap();
        assert!(drift.is_none(), "{drift}");
        site.is_dropped(address);
        site.passes(v4(0, 67));
    });
}

fn activation_repairs_whatever_was_flushed(flavour: Flavour) {
    guarded(flavour, 100, |site, back_end| {
        back_end
            .set_allowlist(&["198.19.0.70/32".parse().unwrap()])
            .unwrap();
        let banned = [v4(0, 66), v4(0, 70), v6(6, 1)];
        ban(back_end, &banned);
        let whole = rules();
        #[track_caller]
        fn repaired(site: &Crossing, back_end: &mut Iptables, whole: &str) {
            assert!(
                back_end.activate().unwrap(),
                "there was something to repair"
            );
            assert_eq!(rules(), whole);
            site.is_dropped(v4(0, 66));
            site.is_dropped(v6(6, 1));
            site.passes(v4(0, 70));
            assert!(!back_end.activate().unwrap(), "all is as it should be");
        }
        for flush in [
            "-F",
            "-F INPUT",
            "-F PORTCULLIS",
            "-D PORTCULLIS 1",
            "-I PORTCULLIS 1 -j RETURN",
        ] {
            both(flush);
            repaired(site, back_end, &whole);
        }
        // Rules, chains, then the sets' entries, then the sets.
        both("-F");
        both("-X");
        ipset("flush");
        assert_eq!(back_end.entries().unwrap(), []);
        destroy_all_sets();
        assert_eq!(back_end.entries().unwrap(), [], "sets are made again");
        both("-F");
        both("-X");
        destroy_all_sets();
        ban(back_end, &banned);
        both("-F");
        repaired(site, back_end, &whole);
    });
}

fn the_chain_is_refilled_without_a_gap(flavour: Flavour) {
    guarded(flavour, 100, |site, back_end| {
        ban(back_end, &[v4(0, 66)]);
        let flood = site.flood(v4(0, 66), Way::In).unwrap();
        let mut rounds = 0;
        while rounds < 30 || flood.sent() < 2000 {
            // After the rule that drops, so that it changes no verdict by itself.
            iptables("iptables", "-A PORTCULLIS -j RETURN");
            assert!(back_end.activate().unwrap());
            rounds += 1;
        }
        let sent = flood.stop();
        assert_eq!(site.received(v4(0, 66)), 0, "a banned packet got through");
        let counted = counter(back_end, "dropped");
        assert!((1..=sent).contains(&counted), "{counted} of {sent}");
    });
}

fn a_set_of_another_type_is_replaced_unless_somebody_uses_it(flavour: Flavour) {
    let site = Crossing::new().unwrap();
    on_edge(site.lab(), flavour, |_| {
        ipset("create PORTCULLIS4 hash:ip timeout 0 comment");
        ipset("add PORTCULLIS4 198.19.0.66 timeout 600 comment old");
        ipset("create PORTCULLIS-A4 hash:ip,port");
        ipset("create PORTCULLIS6 hash:net family inet");
        ipset("create PORTCULLIS-T4 bitmap:port range 0-9");
        iptables("iptables", "-N PORTCULLIS");
        iptables(
            "iptables",
            "-A PORTCULLIS -m set --match-set PORTCULLIS4 src -j DROP",
        );
        let mut back_end = Iptables::open(Mode::Enforce, 100).unwrap();
        back_end.activate().unwrap();
        site.is_dropped(v4(0, 66));
        ban(&mut back_end, &[v6(6, 1)]);
        site.is_dropped(v6(6, 1));
        back_end.detach().unwrap();
        assert_eq!(ipset("-n list"), "");

        ipset("create PORTCULLIS4 hash:ip");
        iptables(
            "iptables",
            "-A INPUT -m set --match-set PORTCULLIS4 src -j ACCEPT",
        );
        let error = Iptables::open(Mode::Enforce, 100).unwrap_err();
        assert!(format!("{error:#}").contains("in use"), "{error:#}");
        assert!(ipset("list -t").contains("Type: hash:ip\n"));
    });
}

fn leftovers_of_an_earlier_run_are_removed(flavour: Flavour) {
    on_edge(&Lab::new().unwrap(), flavour, |_| {
        iptables("iptables", "-P FORWARD ACCEPT");
        iptables("ip6tables", "-P FORWARD ACCEPT");
        let before = state();
        assert!(!remove_leftovers().unwrap());
        let mut iptables = Iptables::open(Mode::Enforce, 10).unwrap();
        iptables.activate().unwrap();
        drop(iptables);
        assert!(remove_leftovers().unwrap());
        assert_eq!(state(), before);
        assert!(!remove_leftovers().unwrap());
        ipset("create PORTCULLIS-T6 hash:ip");
        assert!(remove_leftovers().unwrap());
        assert_eq!(state(), before);
    });
}

fn a_mode_that_cannot_be_set_for_both_families_is_set_for_neither(flavour: Flavour) {
    let lab = Lab::new().unwrap();
    on_edge(&lab, flavour, |tools| {
        let script = "input=$(cat)\n\
                      case $input in *DROP*) echo 'ip6tables-restore: out of luck' >&2; exit 4;; esac\n\
                      echo \"$input\" | \"$real\" \"$@\"";
        tools
            .script("ip6tables-restore", script, lab.dir())
            .unwrap();
        let mut iptables = Iptables::open(Mode::Observe, 100).unwrap();
        iptables.activate().unwrap();
        let observed = rules();
        let error = iptables.set_mode(Mode::Enforce).unwrap_err();
        assert_eq!(
            format!("{error:#}"),
            "cannot write the chain PORTCULLIS: ip6tables-restore: out of luck"
        );
        assert_eq!(rules(), observed);
    });
}

#[test]
fn a_full_set_refuses_what_it_cannot_hold_and_takes_the_rest() {
    guarded(Flavour::Nft, 1000, |site, iptables| {
        let mut changes: Vec<_> = (0x100..0x100 + 1010)
            .map(|number| Change::Ban(client(client_v4(number)), LONG))
            .collect();
        changes.insert(500, Change::Ban("0.0.0.0/0".parse().unwrap(), LONG));
        changes.push(Change::Ban(client(v6(6, 1)), LONG));
        changes.push(Change::Unban(client(v4(1, 0))));
        changes.push(Change::Ban(client(v4(0, 66)), LONG));
        changes.push(Change::Ban(client(v4(0, 67)), LONG));
        let results = iptables.apply(&changes);
        let failed: Vec<_> = results
            .iter()
            .enumerate()
            .filter_map(|(number, result)| Some((number, result.as_ref().err()?.to_string())))
            .collect();
        let full = "ipset: Hash is full, cannot add more elements".to_owned();
        let whole = "an ipset cannot hold 0.0.0.0/0: ban 0.0.0.0/1 and 128.0.0.0/1".to_owned();
        let expected: Vec<_> = [(500, whole)]
            .into_iter()
            .chain((1001..1011).map(|number| (number, full.clone())))
            .chain([(results.len() - 1, full.clone())])
            .collect();
        assert_eq!(failed, expected);
        assert_eq!(iptables.entries().unwrap().len(), 1001);
        site.is_dropped(v6(6, 1));
        site.is_dropped(v4(0, 66));
        site.passes(v4(0, 67));
        site.passes(v4(1, 0));
    });
}

#[test]
fn a_lifetime_beyond_the_kernel_s_is_cut() {
    guarded(Flavour::Nft, 10, |_, iptables| {
        let banned = client(v4(0, 66));
        change(
            iptables,
            &[Change::Ban(banned, Lifetime::For(MAX_LIFETIME * 2))],
        );
        let left = entry(iptables, banned).unwrap().lifetime;
        assert!(
            matches!(left, Lifetime::For(left) if MAX_LIFETIME.abs_diff(left) < SOON),
            "{left:?}"
        );
    });
}

#[test]
fn a_set_of_another_size_hands_its_bans_over_without_a_gap() {
    guarded(Flavour::Nft, 100, |site, iptables| {
        ban(iptables, &[v4(0, 66), v6(6, 1)]);
        let prefix: Subject = "198.19.8.0/22".parse().unwrap();
        change(iptables, &[Change::Ban(prefix, Lifetime::Permanent)]);
        site.is_dropped(v4(0, 66));
        let mut larger = Iptables::open(Mode::Enforce, 101).unwrap();
        let exact = entry(&mut larger, client(v4(0, 66))).unwrap();
        assert_eq!(exact.hits, 2, "counters go on");
        assert!(
            matches!(exact.lifetime, Lifetime::For(left) if left > Duration::from_secs(500)),
            "{exact:?}"
        );
        let kept = entry(&mut larger, prefix).unwrap();
        assert_eq!(kept.lifetime, Lifetime::Permanent);

        let before = site.received(v4(0, 66));
        let flood = site.flood(v4(0, 66), Way::In).unwrap();
        let mut room = 101;
        while room < 130 || flood.sent() < 2000 {
            room += 1;
            let mut next = Iptables::open(Mode::Enforce, room).unwrap();
            next.activate().unwrap();
        }
        let sent = flood.stop();
        let received = site.received(v4(0, 66));
        assert_eq!(received, before, "packets of {sent} got through");
        assert!(ipset("save -t").contains(&format!("maxelem {room} ")));

        // Less room than entries: those that would end first go.
        let brief = Change::Ban(client(v4(0, 67)), Lifetime::For(Duration::from_secs(60)));
        change(iptables, &[brief]);
        let mut small = Iptables::open(Mode::Enforce, 2).unwrap();
        let entries = small.entries().unwrap();
        assert_eq!(
            entries.len(),
            3,
            "two of IPv4, one of IPv6 among {entries:?}"
        );
        site.is_dropped(v4(0, 66));
        site.is_dropped(v4(8, 1));
        site.passes(v4(0, 67));
    });
}

/// Why the back end does not start with a script in the place of ipset.
fn refused_with_ipset(script: &str) -> String {
    let (lab, mut said) = (Lab::new().unwrap(), String::new());
    on_edge(&lab, Flavour::Nft, |tools| {
        tools.script("ipset", script, lab.dir()).unwrap();
        said = format!("{:#}", Iptables::open(Mode::Enforce, 100).unwrap_err());
    });
    said
}

#[test]
fn a_command_that_hangs_is_ended() {
    let start = clock::now();
    // Its child keeps the pipes open for longer.
    let said = refused_with_ipset("sleep 15");
    assert_eq!(
        said,
        "cannot make the ipset PORTCULLIS4: ipset: took longer than 10 s and was killed"
    );
    assert!(clock::since(start) < Duration::from_secs(15));
}

#[test]
fn a_kernel_without_the_module_is_named_with_the_remedy() {
    let said = refused_with_ipset("echo 'ipset v7.17: Cannot open session to kernel.' >&2\nexit 1");
    assert!(said.contains("modprobe -a ip_set_hash_net"), "{said}");
}

#[test]
fn without_rights_it_says_what_is_to_be_done() {
    const BOUNDED: &str = "PORTCULLIS_TESTS_WITHOUT_RIGHTS";
    if env::var_os(BOUNDED).is_some() {
        println!("SAYS {:#}", Iptables::open(Mode::Enforce, 100).unwrap_err());
        return;
    }
    // This test once more, as a root that may not change the network.
    let lab = Lab::new().unwrap();
    let mut command = Command::new("setpriv");
    command
        .arg("--bounding-set=-net_admin,-net_raw")
        .arg(env::current_exe().unwrap())
        .args(["--exact", "without_rights_it_says_what_is_to_be_done"])
        .arg("--nocapture")
        .env(BOUNDED, "1")
        .stdout(Stdio::piped());
    let child = lab.edge().spawn(&mut command).unwrap();
    let said = child.wait_with_output().unwrap().stdout;
    let said = String::from_utf8_lossy(&said);
    assert!(
        said.contains(
            "SAYS cannot make the ipset PORTCULLIS4: ipset: not permitted: run the agent as root"
        ),
        "{said}"
    );
}
