//! The XDP program's verdicts: crafted packets straight into it (`BPF_PROG_TEST_RUN`), no interface needed.
#![expect(clippy::unwrap_used, reason = "a test panics with its evidence")]

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsFd as _, AsRawFd as _},
    path::PathBuf,
    time::Duration,
};

use aya::{
    maps::{HashMap, Map, MapData, RingBuf},
    programs::{TestRun as _, TestRunOptions},
};
use ipnet::IpNet;
use portcullis::enforce::{
    Change, Enforcer as _, Intent, Lifetime, Mode, reconcile,
    xdp::{Flavour, Options, Xdp, lock},
};
use portcullis_common::{ban, event::Sample, names, stats::Counter};
use portcullis_engine::Subject;
use portcullis_tests::lab::Bpffs;
use proptest::prelude::*;

const DROP: u32 = 1;
const PASS: u32 = 2;

/// A BPF file system of the test's own, so that nothing of the host's is touched.
struct BpfFs {
    // Unmounted before its folder goes.
    mount: Bpffs,
    _folder: tempfile::TempDir,
}

impl BpfFs {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self {
            mount: Bpffs::mount(folder.path().join("bpf")).unwrap(),
            _folder: folder,
        }
    }

    fn pin_dir(&self) -> PathBuf {
        self.mount.path().join("portcullis")
    }
}

struct Bench {
    xdp: Xdp,
    _fs: BpfFs,
}

impl Bench {
    fn new(mode: Mode) -> Self {
        let fs = BpfFs::new();
        Self {
            xdp: open(&fs, mode),
            _fs: fs,
        }
    }

    fn ban(&mut self, subject: &str) {
        self.change(Change::Ban(subject.parse().unwrap(), Lifetime::Permanent));
    }

    fn change(&mut self, change: Change) {
        for result in self.xdp.apply(&[change]) {
            result.unwrap();
        }
    }

    fn verdict(&mut self, packet: &[u8]) -> u32 {
        let mut options = TestRunOptions::new();
        options.data_in = Some(packet);
        self.xdp
            .program()
            .unwrap()
            .test_run(options)
            .unwrap()
            .return_value
    }

    fn counters(&mut self) -> BTreeMap<&'static str, u64> {
        let counters = self.xdp.counters().unwrap();
        counters
            .into_iter()
            .filter(|(_, count)| *count > 0)
            .collect()
    }
}

fn open(fs: &BpfFs, mode: Mode) -> Xdp {
    let options = Options {
        interfaces: vec!["lo".to_owned()],
        pin_dir: fs.pin_dir(),
        max_bans: 4096,
        sample_one_in: 0,
    };
    Xdp::open(&options, Flavour::Native, mode).unwrap()
}

const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86DD;

fn frame(tags: &[u16], kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    for tag in tags {
        frame.extend(tag.to_be_bytes());
        frame.extend([0, 100]);
    }
    frame.extend(kind.to_be_bytes());
    frame.extend(payload);
    frame
}

/// An IP header of the source's family, and eight bytes of payload. `protocol` and `fragment` (in units of 8 bytes) are
/// what an evader would play with.
fn header(source: IpAddr, protocol: u8, fragment: u16) -> (u16, Vec<u8>) {
    match source {
        IpAddr::V4(source) => {
            let mut bytes = vec![0x45, 0, 0, 28, 0, 1];
            bytes.extend(fragment.to_be_bytes());
            bytes.extend([64, protocol, 0, 0]);
            bytes.extend(source.octets());
            bytes.extend([198, 18, 255, 1]);
            bytes.extend([0; 8]);
            (IPV4, bytes)
        }
        IpAddr::V6(source) => {
            let mut bytes = vec![0x60, 0, 0, 0, 0, 8, protocol, 64];
            bytes.extend(source.octets());
            bytes.extend(Ipv6Addr::LOCALHOST.octets());
            bytes.extend([0; 8]);
            (IPV6, bytes)
        }
    }
}

fn packet(source: &str) -> Vec<u8> {
    let (kind, bytes) = header(source.parse().unwrap(), 6, 0);
    frame(&[], kind, &bytes)
}

#[test]
fn only_a_banned_source_is_dropped() {
    let mut bench = Bench::new(Mode::Enforce);
    bench.ban("192.0.2.1");
    bench.ban("2001:db8:0:7::/64");
    for (source, verdict) in [
        ("192.0.2.1", DROP),
        ("192.0.2.2", PASS),
        ("192.0.3.1", PASS),
        ("2001:db8:0:7::1", DROP),
        ("2001:db8:0:7:ffff::9", DROP),
        ("2001:db8:0:8::1", PASS),
    ] {
        assert_eq!(bench.verdict(&packet(source)), verdict, "{source}");
    }
    // Clean packets are not counted; the neighbour that shares a bit of the front filter is.
    assert_eq!(
        bench.counters(),
        BTreeMap::from([("dropped", 3), ("neighbour", 1)])
    );
}

#[test]
fn neither_tags_nor_fragments_nor_unknown_protocols_get_round_a_ban() {
    let mut bench = Bench::new(Mode::Enforce);
    bench.ban("192.0.2.1");
    bench.ban("2001:db8:0:7::/64");
    for source in ["192.0.2.1", "2001:db8:0:7::1"] {
        for tags in [
            &[][..],
            &[0x8100],
            &[0x88A8, 0x8100],
            &[0x8100, 0x8100],
            &[0x9100, 0x8100],
        ] {
            // ICMP, TCP, UDP, hop-by-hop, routing, fragment header, GRE, ESP, SCTP, reserved.
            for protocol in [1, 6, 17, 0, 43, 44, 47, 50, 132, 255] {
                for fragment in [0, 0x2000, 0xB9, 0x20B9] {
                    let (kind, bytes) = header(source.parse().unwrap(), protocol, fragment);
                    let verdict = bench.verdict(&frame(tags, kind, &bytes));
                    assert_eq!(verdict, DROP, "{source} {tags:x?} {protocol} {fragment}");
                }
            }
        }
    }
}

#[test]
fn what_cannot_be_read_passes_and_is_counted() {
    let mut bench = Bench::new(Mode::Enforce);
    bench.ban("192.0.2.1");
    let (_, v4) = header("192.0.2.1".parse().unwrap(), 6, 0);
    let (_, v6) = header("2001:db8::1".parse().unwrap(), 6, 0);
    for runt in [
        frame(&[], IPV4, &v4[..19]),
        frame(&[], IPV6, &v6[..39]),
        frame(&[], IPV4, &v6),
        frame(&[], IPV6, &v4),
        frame(&[], IPV4, &[]),
        frame(&[0x8100], IPV4, &v4[..10]),
        frame(&[], 0x8100, &[]),
    ] {
        assert_eq!(bench.verdict(&runt), PASS, "{runt:x?}");
    }
    assert_eq!(bench.counters(), BTreeMap::from([("malformed", 7)]));
    for other in [
        frame(&[], 0x0806, &[0; 28]),
        frame(&[0x8100, 0x8100, 0x8100], IPV4, &v4),
    ] {
        assert_eq!(bench.verdict(&other), PASS, "{other:x?}");
    }
    assert_eq!(bench.counters()["not_ip"], 2);
}

#[test]
fn observing_counts_and_passes_and_the_mode_is_switched_at_run_time() {
    let mut bench = Bench::new(Mode::Observe);
    bench.ban("192.0.2.1");
    assert_eq!(bench.verdict(&packet("192.0.2.1")), PASS);
    bench.xdp.set_mode(Mode::Enforce).unwrap();
    assert_eq!(bench.verdict(&packet("192.0.2.1")), DROP);
    bench.xdp.set_mode(Mode::Observe).unwrap();
    assert_eq!(bench.verdict(&packet("192.0.2.1")), PASS);
    assert_eq!(
        bench.counters(),
        BTreeMap::from([("dropped", 1), ("would_drop", 2)])
    );
    let entries = bench.xdp.entries().unwrap();
    assert_eq!((entries.len(), entries[0].hits), (1, 3));
    assert!(entries[0].last_seen.unwrap() < Duration::from_secs(5));
}

#[test]
fn the_kernel_ends_a_ban_on_its_deadline_by_itself() {
    let mut bench = Bench::new(Mode::Enforce);
    let subject: Subject = "192.0.2.1".parse().unwrap();
    bench.change(Change::Ban(
        subject,
        Lifetime::For(Duration::from_secs(1000)),
    ));
    assert_eq!(bench.verdict(&packet("192.0.2.1")), DROP);
    bench.change(Change::Ban(subject, Lifetime::For(Duration::ZERO)));
    assert_eq!(bench.verdict(&packet("192.0.2.1")), PASS);
    assert_eq!(
        bench.counters(),
        BTreeMap::from([("dropped", 1), ("expired", 1)])
    );
    // A dead one does not hide a live one around it.
    bench.ban("192.0.2.0/24");
    assert_eq!(bench.verdict(&packet("192.0.2.1")), DROP);
}

#[test]
fn the_allowlist_wins_over_every_kind_of_ban() {
    let mut bench = Bench::new(Mode::Enforce);
    for ban in [
        "192.0.2.1",
        "192.0.2.0/24",
        "2001:db8:0:7::/64",
        "2001:db8::/32",
        "2001:db8:0:7::1",
    ] {
        bench.ban(ban);
    }
    let allow: Vec<IpNet> = ["192.0.2.1/32", "2001:db8:0:7::1/128"]
        .iter()
        .map(|net| net.parse().unwrap())
        .collect();
    bench.xdp.set_allowlist(&allow).unwrap();
    for (source, verdict) in [
        ("192.0.2.1", PASS),
        ("192.0.2.2", DROP),
        ("2001:db8:0:7::1", PASS),
        ("2001:db8:0:7::2", DROP),
        ("2001:db8:ffff::1", DROP),
    ] {
        assert_eq!(bench.verdict(&packet(source)), verdict, "{source}");
    }
    bench.xdp.set_allowlist(&[]).unwrap();
    assert_eq!(bench.verdict(&packet("192.0.2.1")), DROP);
}

#[test]
fn deleting_a_ban_lets_the_next_packet_pass() {
    let mut bench = Bench::new(Mode::Enforce);
    for subject in [
        "192.0.2.1",
        "192.0.2.2",
        "2001:db8:0:7::/64",
        "2001:db8::9",
        "10.0.0.0/8",
        "2001:db8:1::/48",
    ] {
        let (subject, source) = (
            subject.parse::<Subject>().unwrap(),
            subject.split('/').next().unwrap().to_owned(),
        );
        bench.change(Change::Ban(subject, Lifetime::Permanent));
        assert_eq!(bench.verdict(&packet(&source)), DROP, "{subject}");
        bench.change(Change::Unban(subject));
        assert_eq!(bench.verdict(&packet(&source)), PASS, "{subject}");
        bench.change(Change::Unban(subject));
    }
    assert!(bench.xdp.entries().unwrap().is_empty());
}

#[test]
fn prefixes_that_have_run_out_hide_no_live_one_around_them() {
    let mut bench = Bench::new(Mode::Enforce);
    bench.ban("10.0.0.0/8");
    bench.ban("2001:db8::/32");
    for dead in [
        "10.1.0.0/16",
        "10.1.2.0/24",
        "10.1.2.0/28",
        "10.1.2.3",
        "2001:db8::/48",
        "2001:db8::/56",
        "2001:db8::/64",
        "2001:db8::1",
    ] {
        bench.change(Change::Ban(
            dead.parse().unwrap(),
            Lifetime::For(Duration::ZERO),
        ));
    }
    for source in [
        "10.1.2.3",
        "10.1.2.200",
        "10.1.9.9",
        "10.9.9.9",
        "2001:db8::1",
        "2001:db8::2",
        "2001:db8:0:1::1",
    ] {
        assert_eq!(bench.verdict(&packet(source)), DROP, "{source}");
    }
    bench.change(Change::Ban(
        "10.0.0.0/8".parse().unwrap(),
        Lifetime::For(Duration::ZERO),
    ));
    let before = bench.counters().get("expired").copied().unwrap_or(0);
    assert_eq!(bench.verdict(&packet("10.1.2.3")), PASS);
    assert_eq!(bench.counters()["expired"], before + 1);
}

#[test]
fn a_sample_of_what_is_banned_is_told_of_and_nothing_else() {
    let fs = BpfFs::new();
    let options = Options {
        interfaces: vec!["lo".to_owned()],
        pin_dir: fs.pin_dir(),
        max_bans: 16,
        sample_one_in: 1,
    };
    let mut bench = Bench {
        xdp: Xdp::open(&options, Flavour::Native, Mode::Enforce).unwrap(),
        _fs: BpfFs::new(),
    };
    let map = MapData::from_pin(fs.pin_dir().join("v1").join(names::SAMPLES)).unwrap();
    let mut samples: RingBuf<MapData> = Map::RingBuf(map).try_into().unwrap();
    bench.ban("192.0.2.1");
    bench.ban("2001:db8:0:7::/64");
    for source in ["192.0.2.1", "192.0.2.2", "203.0.113.1", "2001:db8:0:7::9"] {
        bench.verdict(&packet(source));
    }
    bench.xdp.set_mode(Mode::Observe).unwrap();
    bench.verdict(&packet("192.0.2.1"));
    let mut told = Vec::new();
    while let Some(item) = samples.next() {
        let sample = Sample::from_bytes(&item).unwrap();
        told.push((
            Ipv6Addr::from(sample.source).to_canonical().to_string(),
            sample.counter,
            sample.length,
        ));
    }
    let [dropped, would_drop] = [Counter::Dropped as u32, Counter::WouldDrop as u32];
    assert_eq!(
        told,
        [
            ("192.0.2.1".to_owned(), dropped, 42),
            ("2001:db8:0:7::9".to_owned(), dropped, 62),
            ("192.0.2.1".to_owned(), would_drop, 42)
        ]
    );
    // Nobody reads: what does not fit is not told of, and verdicts are as ever.
    bench.xdp.set_mode(Mode::Enforce).unwrap();
    for _ in 0..10_000 {
        assert_eq!(bench.verdict(&packet("192.0.2.1")), DROP);
    }
}

/// Kernel memory of a map in bytes, as the kernel itself accounts for it.
fn memory(map: &MapData) -> u64 {
    let info = format!("/proc/self/fdinfo/{}", map.fd().as_fd().as_raw_fd());
    let text = std::fs::read_to_string(info).unwrap();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("memlock:"))
        .unwrap();
    line.trim().parse().unwrap()
}

#[test]
fn the_maps_take_no_more_memory_than_budgeted() {
    const MIB: u64 = 1 << 20;
    let fs = BpfFs::new();
    let options = Options {
        interfaces: vec!["lo".to_owned()],
        pin_dir: fs.pin_dir(),
        max_bans: 1 << 20,
        sample_one_in: 0,
    };
    let _xdp = Xdp::open(&options, Flavour::Native, Mode::Observe).unwrap();
    let mut all = 0;
    // Preallocated for 1,048,576 bans of each family; prefixes are allocated one by one.
    for (name, budget) in [
        (names::BANS_V4, 104 * MIB),
        (names::BANS_V6, 104 * MIB),
        (names::BANS_V6_HOST, 2 * MIB),
        (names::CIDR_V4, MIB),
        (names::CIDR_V6, MIB),
        (names::ALLOW_V4, MIB),
        (names::ALLOW_V6, MIB),
        (names::STATS, MIB),
        (names::SAMPLES, MIB),
    ] {
        let map = MapData::from_pin(fs.pin_dir().join("v1").join(name)).unwrap();
        let memory = memory(&map);
        assert!(memory <= budget, "{name}: {memory} bytes");
        all += memory;
    }
    assert!(
        all + 4 * MIB <= 220 * MIB,
        "{all} bytes, and 4 MiB of front filters"
    );
}

#[test]
fn a_full_map_says_so_and_keeps_what_it_has() {
    let fs = BpfFs::new();
    let options = Options {
        interfaces: vec!["lo".to_owned()],
        pin_dir: fs.pin_dir(),
        max_bans: 16,
        sample_one_in: 0,
    };
    let mut xdp = Xdp::open(&options, Flavour::Native, Mode::Enforce).unwrap();
    let changes: Vec<Change> = (0..64)
        .map(|n| {
            Change::Ban(
                Subject::of_client(Ipv4Addr::new(192, 0, 2, n).into()),
                Lifetime::Permanent,
            )
        })
        .collect();
    let results = xdp.apply(&changes);
    let refused: Vec<String> = results
        .into_iter()
        .filter_map(|result| Some(result.err()?.to_string()))
        .collect();
    assert!(refused.len() >= 40, "{}", refused.len());
    assert!(
        refused
            .iter()
            .all(|why| why.contains("raise bans.max_bans")),
        "{refused:?}"
    );
    assert_eq!(xdp.entries().unwrap().len(), 64 - refused.len());
}

#[test]
fn a_new_run_adopts_the_bans_and_their_counters() {
    let fs = BpfFs::new();
    let mut first = Bench {
        xdp: open(&fs, Mode::Enforce),
        _fs: BpfFs::new(),
    };
    first.ban("192.0.2.1");
    first.ban("2001:db8::/40");
    first.ban("2001:db8::77");
    first.verdict(&packet("192.0.2.1"));
    drop(first);
    let mut second = Bench {
        xdp: open(&fs, Mode::Enforce),
        _fs: BpfFs::new(),
    };
    for source in ["192.0.2.1", "2001:db8::77", "2001:db8:ff::1"] {
        assert_eq!(second.verdict(&packet(source)), DROP, "{source}");
    }
    let entries = second.xdp.entries().unwrap();
    let hits = entries
        .iter()
        .find(|entry| entry.subject.to_string() == "192.0.2.1")
        .unwrap()
        .hits;
    assert_eq!(
        (entries.len(), hits, second.counters()["dropped"]),
        (3, 2, 4)
    );
}

#[test]
fn maps_of_another_size_are_made_anew() {
    let fs = BpfFs::new();
    drop(open(&fs, Mode::Enforce));
    let options = Options {
        interfaces: vec!["lo".to_owned()],
        pin_dir: fs.pin_dir(),
        max_bans: 8192,
        sample_one_in: 0,
    };
    let mut xdp = Xdp::open(&options, Flavour::Native, Mode::Enforce).unwrap();
    let changes: Vec<Change> = (0..6000u32)
        .map(|n| {
            Change::Ban(
                Subject::of_client(Ipv4Addr::from(0x0A00_0000 + n).into()),
                Lifetime::Permanent,
            )
        })
        .collect();
    assert!(xdp.apply(&changes).iter().all(Result::is_ok));
}

#[test]
fn a_folder_on_no_bpf_file_system_is_refused_with_the_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let options = Options {
        interfaces: vec!["lo".to_owned()],
        pin_dir: folder.path().join("portcullis"),
        max_bans: 16,
        sample_one_in: 0,
    };
    let error = Xdp::open(&options, Flavour::Native, Mode::Observe).unwrap_err();
    assert!(
        error.to_string().contains("mount -t bpf bpf /sys/fs/bpf"),
        "{error:#}"
    );
    assert!(!folder.path().join("portcullis").exists());
}

#[test]
fn an_interface_that_is_not_there_is_named() {
    let fs = BpfFs::new();
    let options = Options {
        interfaces: vec!["lo".to_owned(), "nowhere0".to_owned()],
        pin_dir: fs.pin_dir(),
        max_bans: 16,
        sample_one_in: 0,
    };
    let error = Xdp::open(&options, Flavour::Native, Mode::Observe).unwrap_err();
    assert!(
        error.to_string().contains("there is no interface nowhere0"),
        "{error:#}"
    );
    assert!(!fs.pin_dir().exists());
}

#[test]
fn what_a_stranger_puts_into_a_map_takes_nobody_s_ban_with_it() {
    let fs = BpfFs::new();
    let mut bench = Bench {
        xdp: open(&fs, Mode::Enforce),
        _fs: BpfFs::new(),
    };
    bench.ban("10.9.0.3");
    bench.ban("10.9.1.0/24");
    let pins = fs.pin_dir().join("v1");
    let map = MapData::from_pin(pins.join(names::BANS_V4)).unwrap();
    let mut map: HashMap<_, [u8; 4], ban::Entry> = Map::HashMap(map).try_into().unwrap();
    map.insert([10, 9, 0, 77], ban::Entry::new(ban::PERMANENT, 0), 0)
        .unwrap();
    let map = MapData::from_pin(pins.join(names::BANS_V6_HOST)).unwrap();
    let mut map: HashMap<_, [u8; 16], ban::Entry> = Map::HashMap(map).try_into().unwrap();
    map.insert([9; 16], ban::Entry::new(ban::PERMANENT, 0), 0)
        .unwrap();

    let mut intent: Intent = ["10.9.0.3", "10.9.1.0/24"]
        .map(|subject| Change::Ban(subject.parse().unwrap(), Lifetime::Permanent))
        .into_iter()
        .collect();
    let (drift, _) = reconcile(&mut bench.xdp, &mut intent).unwrap();
    assert_eq!((drift.foreign, drift.missing, drift.failed), (2, 0, 0));
    for (source, verdict) in [("10.9.0.3", DROP), ("10.9.1.9", DROP), ("10.9.0.77", PASS)] {
        assert_eq!(bench.verdict(&packet(source)), verdict, "{source}");
    }
    // And what somebody deletes is put back once, and goes for good when it is lifted.
    let map = MapData::from_pin(pins.join(names::BANS_V4)).unwrap();
    let mut map: HashMap<_, [u8; 4], ban::Entry> = Map::HashMap(map).try_into().unwrap();
    map.remove(&[10, 9, 0, 3]).unwrap();
    let (drift, repaired) = reconcile(&mut bench.xdp, &mut intent).unwrap();
    let repaired: Vec<String> = repaired
        .iter()
        .map(|change| change.subject().to_string())
        .collect();
    assert_eq!((drift.missing, repaired), (1, vec!["10.9.0.3".to_owned()]));
    assert_eq!(bench.verdict(&packet("10.9.0.3")), DROP);
    bench.change(Change::Unban("10.9.0.3".parse().unwrap()));
    let before = bench.counters();
    assert_eq!(bench.verdict(&packet("10.9.0.3")), PASS);
    assert_eq!(
        bench.counters(),
        before,
        "its bit is gone, so the packet is clean"
    );
}

#[test]
fn bans_that_do_not_fit_are_counted_and_the_others_are_in_force() {
    let fs = BpfFs::new();
    let options = Options {
        interfaces: vec!["lo".to_owned()],
        pin_dir: fs.pin_dir(),
        max_bans: 16,
        sample_one_in: 0,
    };
    let mut xdp = Xdp::open(&options, Flavour::Native, Mode::Enforce).unwrap();
    let ban = |n| {
        let client = Subject::of_client(Ipv4Addr::new(192, 0, 2, n).into());
        Change::Ban(client, Lifetime::Permanent)
    };
    let mut intent: Intent = (0..64).map(ban).collect();
    let (drift, repaired) = reconcile(&mut xdp, &mut intent).unwrap();
    assert_eq!(drift.missing, 64);
    assert_eq!(drift.failed + repaired.len() as u64, 64);
    assert_eq!(xdp.entries().unwrap().len(), repaired.len());
    // What goes makes room for what comes, in the same round.
    let other = Change::Ban("198.51.100.1".parse().unwrap(), Lifetime::Permanent);
    let (drift, repaired) = reconcile(&mut xdp, &mut Intent::from_iter([other])).unwrap();
    assert_eq!((drift.failed, repaired.len()), (0, 1));
}

#[test]
fn there_is_one_agent_to_a_pin_folder() {
    let fs = BpfFs::new();
    let held = lock(&fs.pin_dir()).unwrap();
    let error = lock(&fs.pin_dir()).unwrap_err().to_string();
    assert!(error.starts_with("another agent is running"), "{error}");
    drop(held);
    assert!(lock(&fs.pin_dir()).unwrap().is_some());
    let folder = tempfile::tempdir().unwrap();
    assert!(
        lock(folder.path()).unwrap().is_none(),
        "there is nothing to share there"
    );
}

/// Few bits, so that bans, allowances and packets meet often.
fn address() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        (0u8..3, 0u8..4).prop_map(|(c, d)| IpAddr::from([192, 0, c, d])),
        (0u16..3, 0u16..3)
            .prop_map(|(net, host)| IpAddr::from([0x2001, 0xdb8, 0, net, 0, 0, 0, host])),
    ]
}

fn net() -> impl Strategy<Value = IpNet> {
    (
        address(),
        prop::sample::select(vec![
            8u8, 22, 23, 24, 30, 31, 32, 40, 62, 63, 64, 65, 126, 127, 128,
        ]),
    )
        .prop_map(|(address, length)| {
            let length = if address.is_ipv4() {
                16 + length % 17
            } else {
                length.max(16)
            };
            IpNet::new(address, length).unwrap().trunc()
        })
}

#[derive(Clone, Debug)]
enum Step {
    Ban(IpNet),
    Observe(IpNet),
    Unban(IpNet),
    Allow(Vec<IpNet>),
    Packet(IpAddr),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => net().prop_map(Step::Ban),
        1 => net().prop_map(Step::Observe),
        1 => net().prop_map(Step::Unban),
        1 => prop::collection::vec(net(), 0..3).prop_map(Step::Allow),
        8 => address().prop_map(Step::Packet),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    /// Many changes in one call are the same as one after the other: entries, front filter and flags included.
    #[test]
    fn changes_together_are_as_changes_one_by_one(
        rounds in prop::collection::vec(prop::collection::vec((net(), any::<bool>()), 0..60), 1..4),
        probes in prop::collection::vec(address(), 1..30),
    ) {
        let mut bench = Bench::new(Mode::Enforce);
        let mut banned = Vec::<IpNet>::new();
        for round in rounds {
            let mut changes = Vec::new();
            for (net, ban) in round {
                let subject = Subject::of_net(net);
                banned.retain(|other| *other != net);
                if ban {
                    banned.push(net);
                    changes.push(Change::Ban(subject, Lifetime::Permanent));
                } else {
                    changes.push(Change::Unban(subject));
                }
            }
            prop_assert!(bench.xdp.apply(&changes).iter().all(Result::is_ok));
            for source in &probes {
                let hit = banned.iter().any(|net| net.contains(source));
                let (kind, bytes) = header(*source, 6, 0);
                let verdict = bench.verdict(&frame(&[], kind, &bytes));
                prop_assert_eq!(verdict, if hit { DROP } else { PASS }, "{} among {:?}", source, banned);
            }
        }
        let mut found: Vec<IpNet> = bench.xdp.entries().unwrap().iter().map(|entry| entry.subject.net()).collect();
        found.sort_unstable();
        banned.sort_unstable();
        prop_assert_eq!(&found, &banned);
        // And everything goes again, without a bit left behind.
        let changes: Vec<Change> = banned.iter().map(|net| Change::Unban(Subject::of_net(*net))).collect();
        bench.xdp.apply(&changes);
        let before = bench.counters().get("neighbour").copied();
        for source in &probes {
            let (kind, bytes) = header(*source, 6, 0);
            prop_assert_eq!(bench.verdict(&frame(&[], kind, &bytes)), PASS);
        }
        prop_assert_eq!(bench.counters().get("neighbour").copied(), before);
    }
}

#[test]
fn a_map_that_fills_up_in_the_middle_of_a_load_takes_what_fits() {
    let fs = BpfFs::new();
    let options = Options {
        interfaces: vec!["lo".to_owned()],
        pin_dir: fs.pin_dir(),
        max_bans: 1000,
        sample_one_in: 0,
    };
    let mut xdp = Xdp::open(&options, Flavour::Native, Mode::Enforce).unwrap();
    let changes: Vec<Change> = (0..3000u32)
        .map(|n| {
            Change::Ban(
                Subject::of_client(Ipv4Addr::from(0x0A00_0000 + n).into()),
                Lifetime::Permanent,
            )
        })
        .collect();
    let results = xdp.apply(&changes);
    let entered = results.iter().filter(|result| result.is_ok()).count();
    assert!((1000..1100).contains(&entered), "{entered}");
    let mut entries: Vec<Subject> = xdp
        .entries()
        .unwrap()
        .iter()
        .map(|entry| entry.subject)
        .collect();
    entries.sort_unstable();
    let said: Vec<Subject> = changes
        .iter()
        .zip(&results)
        .filter_map(|(change, result)| match change {
            Change::Ban(subject, _) if result.is_ok() => Some(*subject),
            _ => None,
        })
        .collect();
    assert_eq!(entries, said, "each result is the truth about its own ban");
}

#[test]
fn of_bans_around_one_another_the_narrowest_live_one_decides() {
    let mut bench = Bench::new(Mode::Enforce);
    // Each kind of prefix has another place in the kernel.
    let nested = [
        "2001:db8::/32",
        "2001:db8::/64",
        "2001:db8::/96",
        "2001:db8::1/128",
    ];
    for observed in 0..nested.len() {
        for over in 0..nested.len() {
            for (index, net) in nested.iter().enumerate() {
                let subject = net.parse().unwrap();
                bench.change(Change::Unban(subject));
                let lifetime = if index == over {
                    Lifetime::For(Duration::ZERO)
                } else {
                    Lifetime::Permanent
                };
                bench.change(if index == observed {
                    Change::Observe(subject, lifetime)
                } else {
                    Change::Ban(subject, lifetime)
                });
            }
            let narrowest = |widest: usize| (0..=widest).rev().find(|index| *index != over);
            for (source, widest) in [
                ("2001:db8::1", 3),
                ("2001:db8::2", 2),
                ("2001:db8::1:0:0:2", 1),
            ] {
                let verdict = if narrowest(widest) == Some(observed) {
                    PASS
                } else {
                    DROP
                };
                let (kind, bytes) = header(source.parse().unwrap(), 6, 0);
                assert_eq!(
                    bench.verdict(&frame(&[], kind, &bytes)),
                    verdict,
                    "{source}: {} is observed, {} is over",
                    nested[observed],
                    nested[over]
                );
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    /// Against the definition: dropped is who is in no allowed prefix and in some banned one, the narrowest of which is not
    /// only observed.
    #[test]
    fn every_verdict_is_the_model_s(steps in prop::collection::vec(step(), 1..80)) {
        let mut bench = Bench::new(Mode::Enforce);
        let (mut banned, mut allowed) = (BTreeMap::<IpNet, bool>::new(), Vec::<IpNet>::new());
        for step in steps {
            match step {
                Step::Ban(net) => {
                    bench.change(Change::Ban(Subject::of_net(net), Lifetime::Permanent));
                    banned.insert(net, true);
                }
                Step::Observe(net) => {
                    bench.change(Change::Observe(Subject::of_net(net), Lifetime::Permanent));
                    banned.insert(net, false);
                }
                Step::Unban(net) => {
                    bench.change(Change::Unban(Subject::of_net(net)));
                    banned.remove(&net);
                }
                Step::Allow(nets) => {
                    bench.xdp.set_allowlist(&nets).unwrap();
                    allowed = nets;
                }
                Step::Packet(source) => {
                    let around = banned.iter().filter(|(net, _)| net.contains(&source));
                    let narrowest = around.max_by_key(|(net, _)| net.prefix_len());
                    let is_allowed = allowed.iter().any(|net| net.contains(&source));
                    let hit = narrowest.is_some_and(|(_, drops)| *drops) && !is_allowed;
                    let (kind, bytes) = header(source, 6, 0);
                    let verdict = bench.verdict(&frame(&[], kind, &bytes));
                    prop_assert_eq!(verdict, if hit { DROP } else { PASS }, "{} among {:?} but {:?}", source, banned, allowed);
                }
            }
            let mut found: Vec<IpNet> = bench.xdp.entries().unwrap().iter().map(|entry| entry.subject.net()).collect();
            found.sort_unstable();
            let expected: Vec<IpNet> = banned.keys().copied().collect();
            prop_assert_eq!(found, expected);
        }
    }
}
