//! Packets a second through a virtual link, all of them from banned sources.
//!
//! Frames are injected in `test_run`'s live mode and redirected into the link's far end, so that the near end receives
//! them in its NAPI: what guards it there is measured. Sender and receiver share a processor, as they do in a driver.

use std::{
    any::Any,
    io::Write as _,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::{
    Ebpf,
    programs::{TestRun as _, TestRunAttrs, TestRunOptions, XdpMode},
};
use portcullis::enforce::{Enforcer, Mode, iptables::Iptables, xdp::Flavour};
use portcullis_tests::lab::{EDGE_INTERFACE, Lab};

use crate::{
    note::{Note, Wanted, median},
    source::{Family, Sources, rewind},
    subjects::{self, MAX_BANS},
};

const FAMILY: Family = Family::V4Routable;
const FAR_END: &str = "world0";
/// As a driver takes them from its ring at once.
const BATCH: u32 = 64;

/// A way to drop packets that come in at [`EDGE_INTERFACE`]. What it returns keeps it in force.
type SetUp = fn(&Lab, u32) -> Result<Box<dyn Any>>;

const DROP: &str = "bare XDP_DROP";
const OURS: &str = "portcullis, native";

struct Guarded {
    name: String,
    bans: u32,
    lab: Lab,
    _guard: Box<dyn Any>,
    packets: u32,
    times: Vec<f64>,
}

/// Measures.
///
/// # Errors
/// When frames cannot be injected; a peer that is not installed is noted as a problem instead.
pub fn measure(quick: bool, note: &mut Note) -> Result<()> {
    eprintln!("packets a second through a virtual link …");
    let mut sender = subjects::object(1)?;
    let (few, many) = (10_000, 1_000_000);
    let mut plan: Vec<(&str, u32, SetUp)> = vec![
        (DROP, few, bare_drop),
        ("XDP, one bare hash look-up", few, bare_look_up),
        (OURS, few, native),
        ("portcullis, generic", few, generic),
        ("nftables, netdev ingress set", few, nftables),
        ("portcullis, iptables and ipset", few, ipset),
        ("iptables, one rule a ban", few, rules),
    ];
    if !quick {
        plan.push(("XDP, one bare hash look-up", many, bare_look_up));
        plan.push((OURS, many, native));
    }
    let length = Duration::from_millis(if quick { 50 } else { 100 });
    let rounds = if quick { 11 } else { 31 };
    let mut all = Vec::new();
    for (name, bans, set_up) in plan {
        match guarded(name, bans, set_up, &mut sender, length) {
            Ok(guarded) => all.push(guarded),
            Err(error) => note.problem(name, &error),
        }
    }
    for _ in 0..rounds {
        for guarded in &mut all {
            let time = guarded.run(&mut sender, guarded.packets)?;
            guarded.times.push(time);
        }
    }

    let bare = all
        .iter()
        .find(|guarded| guarded.name == DROP)
        .map(|guarded| median(&guarded.times).0)
        .context("the bare drop is missing")?;
    let head = [
        "",
        "bans",
        "ns a packet",
        "packets a second",
        "of bare drop",
    ];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for guarded in &all {
        let (time, least) = median(&guarded.times);
        rows.push(vec![
            guarded.name.clone(),
            guarded.bans.to_string(),
            format!("{time:.0} ({least:.0})"),
            format!("{:.2} M", 1e3 / time),
            format!("{:.3}", bare / time),
        ]);
        if guarded.name == OURS && guarded.bans == few {
            let what = "live, 10000 bans: of bare XDP_DROP's packets a second";
            note.ratio(what, bare / time, Wanted::AtLeast(0.95));
        }
    }
    Note::table(
        "Live on a virtual link, every source banned",
        &format!(
            "IPv4, 60 bytes, random banned sources, injected by `BPF_PROG_TEST_RUN` in live mode ({BATCH} at once) and received \
             in veth's NAPI on the same processor.\nMedian (least) of {rounds} interleaved runs of about {} ms by the kernel's account; injecting is part of it; every packet is seen to have been dropped.",
            length.as_millis()
        ),
        &rows,
    );
    Ok(())
}

fn guarded(
    name: &str,
    bans: u32,
    set_up: SetUp,
    sender: &mut Ebpf,
    length: Duration,
) -> Result<Guarded> {
    let lab = Lab::new()?;
    // With it, veth receives in NAPI whether it has an XDP program or not.
    tool(
        &lab,
        "ethtool",
        "ethtool",
        &["-K", EDGE_INTERFACE, "gro", "on"],
        "",
    )?;
    let guard = set_up(&lab, bans).context("cannot set up")?;
    let mut guarded = Guarded {
        name: name.to_owned(),
        bans,
        lab,
        _guard: guard,
        packets: 0,
        times: Vec::new(),
    };
    // Finds out how many packets fill the time, and warms up.
    guarded.packets = 1 << 10;
    loop {
        // The least of some: one that was interrupted says nothing.
        let mut least = f64::INFINITY;
        for _ in 0..3 {
            least = least.min(guarded.run(sender, guarded.packets)?);
        }
        let time = least * f64::from(guarded.packets) / 1e9;
        if time * 1.5 > length.as_secs_f64() || guarded.packets >= 1 << 24 {
            return Ok(guarded);
        }
        guarded.packets *= 2;
    }
}

impl Guarded {
    /// Nanoseconds a packet; all must be received, and dropped.
    ///
    /// When others keep the processor busy, the kernel leaves receiving to a thread of its own, and the sender, which does
    /// not wait for it, overruns the link. Such a run is made again.
    fn run(&self, sender: &mut Ebpf, packets: u32) -> Result<f64> {
        let mut received = 0;
        for _ in 0..10 {
            let time;
            (time, received) = self.try_run(sender, packets)?;
            if received >= u64::from(packets) * 99 / 100 {
                return Ok(time.as_secs_f64() * 1e9);
            }
        }
        bail!("of {packets} packets only {received} were received, ten times over")
    }

    /// How long a packet took by the kernel's account, which leaves out setting up, taking down (an RCU grace period, more than
    /// a hundred thousand packets take) and when others had the processor; and how many packets were received.
    fn try_run(&self, sender: &mut Ebpf, packets: u32) -> Result<(Duration, u64)> {
        let interface = self
            .lab
            .world()
            .run(|| nix::net::if_::if_nametoindex(FAR_END))??;
        rewind(sender, FAMILY, Sources::Banned, self.bans, interface)?;
        let before = Seen::now(&self.lab)?;
        let program = subjects::program(sender, "inject")?;
        let frame = FAMILY.packet();
        let time = self.lab.world().run(|| {
            let mut options = TestRunOptions::new();
            options.data_in = Some(&frame);
            options.repeat = packets;
            options.attrs = TestRunAttrs::new().xdp_live_frames(BATCH);
            program.test_run(options).map(|result| result.duration)
        })??;
        let after = Seen::now(&self.lab)?;
        let passed = after.delivered - before.delivered;
        // A neighbour solicitation may be among them.
        ensure!(passed <= 10, "of {packets} packets {passed} passed");
        Ok((time, after.received - before.received))
    }
}

/// Counters of the receiving namespace.
struct Seen {
    /// Packets at the interface.
    received: u64,
    /// Packets of IPv4 that were passed on to their protocol.
    delivered: u64,
}

impl Seen {
    fn now(lab: &Lab) -> Result<Self> {
        let read = |name: &str| std::fs::read_to_string(format!("/proc/thread-self/net/{name}"));
        let (dev, snmp) = lab.edge().run(|| (read("dev"), read("snmp")))?;
        let (dev, snmp) = (dev?, snmp?);
        let interface = dev
            .lines()
            .find_map(|line| line.trim().strip_prefix(EDGE_INTERFACE)?.strip_prefix(':'))
            .context("the interface is gone")?;
        let ip: Vec<&str> = snmp
            .lines()
            .filter(|line| line.starts_with("Ip:"))
            .collect();
        let &[names, values] = ip.as_slice() else {
            bail!("/proc/net/snmp has no counters of IPv4");
        };
        let delivered = names
            .split_whitespace()
            .zip(values.split_whitespace())
            .find(|(name, _)| *name == "InDelivers");
        let number = |word: Option<&str>| {
            word.and_then(|word| word.parse().ok())
                .context("not a counter")
        };
        Ok(Self {
            received: number(interface.split_whitespace().nth(1))?,
            delivered: number(delivered.map(|(_, value)| value))?,
        })
    }
}

fn bare_drop(lab: &Lab, _bans: u32) -> Result<Box<dyn Any>> {
    attach(lab, subjects::object(1)?, "drop")
}

fn bare_look_up(lab: &Lab, bans: u32) -> Result<Box<dyn Any>> {
    let mut bench = subjects::object(MAX_BANS)?;
    subjects::fill_bare(&mut bench, FAMILY, bans)?;
    attach(lab, bench, "bare_v4")
}

fn attach(lab: &Lab, mut bench: Ebpf, name: &str) -> Result<Box<dyn Any>> {
    let program = subjects::program(&mut bench, name)?;
    lab.edge()
        .run(|| program.attach(EDGE_INTERFACE, XdpMode::Driver))??;
    Ok(Box::new(bench))
}

fn native(lab: &Lab, bans: u32) -> Result<Box<dyn Any>> {
    ours(lab, bans, Flavour::Native)
}

fn generic(lab: &Lab, bans: u32) -> Result<Box<dyn Any>> {
    ours(lab, bans, Flavour::Generic)
}

fn ours(lab: &Lab, bans: u32, flavour: Flavour) -> Result<Box<dyn Any>> {
    let xdp = lab.edge().run(|| {
        let mut xdp = subjects::back_end(lab, EDGE_INTERFACE, flavour)?;
        subjects::apply(&mut xdp, &FAMILY.bans(0..bans))?;
        xdp.activate()?;
        anyhow::Ok(xdp)
    })??;
    Ok(Box::new(xdp))
}

fn ipset(lab: &Lab, bans: u32) -> Result<Box<dyn Any>> {
    lab.edge().run(|| {
        let mut iptables = Iptables::open(Mode::Enforce, MAX_BANS)?;
        for result in iptables.apply(&FAMILY.bans(0..bans)) {
            result?;
        }
        iptables.activate()
    })??;
    Ok(Box::new(()))
}

fn nftables(lab: &Lab, bans: u32) -> Result<Box<dyn Any>> {
    let elements: Vec<String> = addresses(bans).collect();
    let script = format!(
        "table netdev bench {{
            set bans {{ type ipv4_addr; size {MAX_BANS}; elements = {{ {} }}; }}
            chain ingress {{ type filter hook ingress device {EDGE_INTERFACE} priority 0; ip saddr @bans counter drop; }}
        }}",
        elements.join(", ")
    );
    tool(lab, "nftables", "nft", &["-f", "-"], &script)?;
    Ok(Box::new(()))
}

fn rules(lab: &Lab, bans: u32) -> Result<Box<dyn Any>> {
    let rules: Vec<String> = addresses(bans)
        .map(|address| format!("-A INPUT -s {address} -j DROP"))
        .collect();
    let script = format!("*filter\n{}\nCOMMIT\n", rules.join("\n"));
    tool(lab, "iptables", "iptables-restore", &[], &script)?;
    Ok(Box::new(()))
}

fn addresses(bans: u32) -> impl Iterator<Item = String> {
    (0..bans).map(|number| FAMILY.address(number).to_string())
}

/// Runs a program on the edge host.
fn tool(lab: &Lab, package: &str, program: &str, arguments: &[&str], input: &str) -> Result<()> {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .stdin(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = lab
        .edge()
        .spawn(&mut command)
        .with_context(|| format!("is package {package} installed?"))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes())?;
    }
    let output = child.wait_with_output()?;
    ensure!(
        output.status.success(),
        "{program}: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}
