//! The kernel: its version, what it lets us load, and with what rights and memory.

use std::{fs, path::Path};

use aya::{EbpfLoader, programs::Xdp};
use nix::{
    sys::{
        statfs::{BPF_FS_MAGIC, statfs},
        statvfs::{FsFlags, statvfs},
    },
    unistd::{AccessFlags, access},
};
use portcullis_common::names;

use super::{Check, Plan};
use crate::enforce::xdp::OBJECT;

/// XDP links came with it.
const NEEDED: (u32, u32) = (5, 9);
const RECOMMENDED: (u32, u32) = (5, 15);

pub(super) fn checks(plan: &Plan) -> Vec<Check> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let rights = Rights::of(&status);
    let mut all = vec![
        version(plan, &read("/proc/sys/kernel/osrelease")),
        self::rights(plan, &rights),
    ];
    if plan.xdp {
        all.push(bpffs(plan));
        all.push(program(plan, &rights));
        all.push(jit(&read("/proc/sys/net/core/bpf_jit_enable")));
        all.push(unprivileged(&read(
            "/proc/sys/kernel/unprivileged_bpf_disabled",
        )));
        let there = Path::new("/sys/kernel/btf/vmlinux").exists();
        all.push(Check::pass(
            "BTF",
            format!(
                "{}; the XDP program needs none",
                if there {
                    "the kernel has it"
                } else {
                    "the kernel has none"
                }
            ),
        ));
        all.push(memory(plan));
    }
    all
}

fn read(path: &str) -> String {
    fs::read_to_string(path)
        .unwrap_or_default()
        .trim()
        .to_owned()
}

/// Major and minor number of the running kernel.
pub(super) fn release() -> Option<(u32, u32)> {
    release_of(&read("/proc/sys/kernel/osrelease"))
}

fn release_of(text: &str) -> Option<(u32, u32)> {
    let number = |text: &str| {
        let digits = text
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(text.len());
        text[..digits].parse().ok()
    };
    let mut parts = text.split('.');
    Some((number(parts.next()?)?, number(parts.next()?)?))
}

fn version(plan: &Plan, text: &str) -> Check {
    let name = "kernel";
    let upgrade = "upgrade to 5.15 or later";
    match release_of(text) {
        None => Check::skipped(name, format!("its version cannot be read: {text:?}")),
        Some(release) if release < NEEDED && plan.xdp => Check::bad(
            plan.without_xdp,
            name,
            format!("{text}: XDP that outlives the agent came with 5.9"),
            upgrade,
        ),
        Some(release) if release < RECOMMENDED && plan.xdp => Check::warn(
            name,
            format!("{text}: enough, but younger ones have XDP in more drivers"),
            upgrade,
        ),
        Some(_) => Check::pass(name, text),
    }
}

/// What this process may do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Rights {
    uid: Option<u32>,
    effective: u64,
}

const NET_ADMIN: u32 = 12;
const SYS_ADMIN: u32 = 21;
const PERFMON: u32 = 38;
const BPF: u32 = 39;

impl Rights {
    /// From /proc/self/status.
    fn of(status: &str) -> Self {
        let field = |name: &str| {
            status
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        };
        Self {
            // Real, effective, saved, of the file system.
            uid: field("Uid").and_then(|ids| ids.split_ascii_whitespace().nth(1)?.parse().ok()),
            effective: field("CapEff")
                .and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok())
                .unwrap_or_default(),
        }
    }

    const fn has(self, capability: u32) -> bool {
        self.effective & (1 << capability) != 0
    }

    /// What is missing to load and attach XDP programs.
    fn lacking(self, xdp: bool) -> Vec<&'static str> {
        let mut lacking = Vec::new();
        if !self.has(NET_ADMIN) {
            lacking.push("CAP_NET_ADMIN");
        }
        if xdp && !self.has(SYS_ADMIN) {
            if !self.has(BPF) {
                lacking.push("CAP_BPF");
            }
            if !self.has(PERFMON) {
                lacking.push("CAP_PERFMON");
            }
        }
        lacking
    }
}

fn rights(plan: &Plan, rights: &Rights) -> Check {
    let name = "rights";
    if !plan.xdp && !plan.iptables {
        return Check::skipped(name, "none are needed with the configured back ends");
    }
    let who = rights
        .uid
        .map_or("this process".to_owned(), |uid| format!("uid {uid}"));
    let lacking = rights.lacking(plan.xdp);
    if !lacking.is_empty() {
        return Check::fail(
            name,
            format!("{who} lacks {}", lacking.join(", ")),
            "run as root, or give the service CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON (AmbientCapabilities=); look again with the \
             service's rights, as much of the rest could not be seen either",
        );
    }
    // In a user namespace of its own, root is not root: BPF and the host's interfaces are not its.
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    if !is_whole(&map) {
        return Check::warn(
            name,
            format!("{who} in a user namespace: its capabilities do not reach the host's kernel"),
            "run it on the host, or in a container without a user namespace",
        );
    }
    Check::pass(name, format!("{who} with all capabilities that are needed"))
}

/// Are all users of the host mapped to themselves?
fn is_whole(uid_map: &str) -> bool {
    let fields: Vec<&str> = uid_map.split_ascii_whitespace().collect();
    fields.is_empty() || fields == ["0", "0", "4294967295"]
}

fn bpffs(plan: &Plan) -> Check {
    let name = "BPF file system";
    let dir = &plan.config.enforce.pin_dir;
    let Some(there) = dir.ancestors().find(|dir| dir.exists()) else {
        return Check::skipped(name, format!("{} cannot be looked at", dir.display()));
    };
    let shown = dir.display();
    match statfs(there) {
        Err(error) => Check::skipped(
            name,
            format!("{} cannot be looked at: {error}", there.display()),
        ),
        Ok(kind) if kind.filesystem_type() != BPF_FS_MAGIC => Check::bad(
            plan.without_xdp,
            name,
            format!("{shown} is not on one, so bans could not outlive the agent"),
            "`mount -t bpf bpf /sys/fs/bpf` (systemd does it at boot), or correct enforce.pin_dir",
        ),
        Ok(_) if statvfs(there).is_ok_and(|stat| stat.flags().contains(FsFlags::ST_RDONLY)) => {
            Check::bad(
                plan.without_xdp,
                name,
                format!("{shown} is mounted read-only"),
                "`mount -o remount,rw /sys/fs/bpf`; in a systemd unit: ReadWritePaths=/sys/fs/bpf",
            )
        }
        Ok(_) if access(there, AccessFlags::W_OK | AccessFlags::X_OK).is_err() => Check::bad(
            plan.without_xdp,
            name,
            format!("{} is not writable", there.display()),
            "run as root, or make a folder there that belongs to the service, and name it in enforce.pin_dir",
        ),
        Ok(_) => Check::pass(
            name,
            format!(
                "{shown} {}",
                if dir.exists() {
                    "is on one"
                } else {
                    "will be made on one"
                }
            ),
        ),
    }
}

/// Loads the program with small maps, attaches and pins nothing, and lets it go again.
fn program(plan: &Plan, rights: &Rights) -> Check {
    let name = "XDP program";
    if !rights.lacking(true).is_empty() {
        return Check::skipped(name, "loading it takes rights that are lacking");
    }
    let load = || -> anyhow::Result<Option<u32>> {
        let mut loader = EbpfLoader::new();
        for map in [names::BANS_V4, names::BANS_V6] {
            loader.map_max_entries(map, 16);
        }
        let mut ebpf = loader.load(OBJECT)?;
        let program = ebpf
            .program_mut(names::PROGRAM)
            .ok_or_else(|| anyhow::anyhow!("the object has no program of ours"))?;
        let program: &mut Xdp = program.try_into()?;
        program.load()?;
        Ok(program.info()?.verified_instruction_count())
    };
    match load() {
        Ok(steps) => Check::pass(
            name,
            format!(
                "the kernel takes it{}",
                steps.map_or(String::new(), |steps| format!(
                    ", verified in {steps} steps"
                ))
            ),
        ),
        Err(error) => {
            // A verifier's log is for developers; its last line says what is the matter.
            let text = format!("{error:#}");
            let last = text
                .lines()
                .rfind(|line| !line.trim().is_empty())
                .unwrap_or_default();
            Check::bad(
                plan.without_xdp,
                name,
                format!(
                    "the kernel refuses it: {}",
                    if text.lines().count() > 2 {
                        last
                    } else {
                        &text
                    }
                ),
                "a kernel of 5.15 or later with CONFIG_BPF_SYSCALL, without lockdown=confidentiality; `portcullis load` shows the whole \
                 refusal",
            )
        }
    }
}

fn jit(value: &str) -> Check {
    let name = "JIT";
    match value {
        "1" => Check::pass(name, "on"),
        "2" => Check::warn(
            name,
            "on, and writing to the kernel's log",
            "sysctl -w net.core.bpf_jit_enable=1",
        ),
        "0" => Check::warn(
            name,
            "off: the XDP program is interpreted, several times slower",
            "sysctl -w net.core.bpf_jit_enable=1, and the same in /etc/sysctl.d",
        ),
        _ => Check::skipped(
            name,
            "net.core.bpf_jit_enable cannot be seen from this network namespace",
        ),
    }
}

fn unprivileged(value: &str) -> Check {
    let name = "unprivileged BPF";
    match value {
        "1" | "2" => Check::pass(name, "off: only the privileged load programs"),
        "0" => Check::warn(
            name,
            "on: every local user can load programs into the kernel",
            "sysctl -w kernel.unprivileged_bpf_disabled=2, and the same in /etc/sysctl.d; the guard does not need it",
        ),
        _ => Check::skipped(
            name,
            "the kernel does not say (kernel.unprivileged_bpf_disabled)",
        ),
    }
}

/// Bytes of kernel memory that the maps take, about: each entry with its key, value and list head, the table of buckets,
/// and the rest (front filters, tries, counters).
fn map_bytes(max_bans: u64) -> u64 {
    const REST: u64 = 8 << 20;
    let table = |key: u64| max_bans * (48 + key + 24) + max_bans.next_power_of_two() * 16;
    table(8) + table(8) + REST
}

fn memory(plan: &Plan) -> Check {
    let needed = map_bytes(plan.config.engine.max_bans as u64);
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limits = fs::read_to_string("/proc/self/limits").unwrap_or_default();
    // Until 5.11 maps counted as locked memory, and the agent does not raise that limit.
    let locked = if release().is_some_and(|release| release < (5, 11)) {
        locked_limit(&limits)
    } else {
        None
    };
    judge_memory(needed, available(&meminfo), locked, cgroup_limit(&own))
}

fn judge_memory(
    needed: u64,
    available: Option<u64>,
    locked: Option<u64>,
    cgroup: Option<u64>,
) -> Check {
    let name = "memory";
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    let lower = "lower bans.max_bans";
    if let Some(limit) = locked.filter(|limit| *limit < needed) {
        return Check::warn(
            name,
            format!(
                "the maps lock about {} MiB, and {} KiB may be locked (this kernel is older than 5.11)",
                mib(needed),
                limit >> 10
            ),
            format!("LimitMEMLOCK=infinity in the service, or {lower}"),
        );
    }
    if let Some(limit) = cgroup.filter(|limit| *limit < needed.saturating_mul(2)) {
        return Check::warn(
            name,
            format!(
                "the maps take about {} MiB, and this control group may have {} MiB",
                mib(needed),
                mib(limit)
            ),
            format!("raise MemoryMax=, or {lower}"),
        );
    }
    let Some(available) = available else {
        return Check::skipped(
            name,
            format!(
                "the maps take about {} MiB; what is free is not known",
                mib(needed)
            ),
        );
    };
    let found = format!(
        "the maps take about {} MiB of {} MiB available",
        mib(needed),
        mib(available)
    );
    if needed.saturating_mul(4) > available {
        Check::warn(name, found, lower)
    } else {
        Check::pass(name, found)
    }
}

/// From /proc/meminfo, in bytes.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.split_ascii_whitespace()
        .next()?
        .parse::<u64>()
        .ok()?
        .checked_mul(1024)
}

/// The soft limit from /proc/self/limits, in bytes; `None` if there is none.
fn locked_limit(limits: &str) -> Option<u64> {
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max locked memory"))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

/// The tightest memory limit of the control group (version 2) and those above it.
fn cgroup_limit(own: &str) -> Option<u64> {
    let path = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let root = Path::new("/sys/fs/cgroup");
    let mut limits = Vec::new();
    for dir in root
        .join(path)
        .ancestors()
        .take_while(|dir| dir.starts_with(root))
    {
        let limit = fs::read_to_string(dir.join("memory.max")).unwrap_or_default();
        limits.extend(limit.trim().parse::<u64>().ok());
    }
    limits.into_iter().min()
}

#[cfg(test)]
mod tests {
    use super::{super::Outcome, *};
    use crate::config::Config;

    fn plan() -> Plan {
        Plan::new(&Config::default())
    }

    #[test]
    fn releases_of_all_makes_are_read() {
        for (text, expected) in [
            ("6.1.0-28-amd64", Some((6, 1))),
            ("5.15.153.1-microsoft-standard-WSL2", Some((5, 15))),
            ("4.18.0-553.el8_10.x86_64", Some((4, 18))),
            ("6.12-rc1", Some((6, 12))),
            ("", None),
            ("six.one", None),
            ("99999999999999999999.1", None),
        ] {
            assert_eq!(release_of(text), expected, "{text}");
        }
        assert_eq!(
            version(&plan(), "4.18.0").outcome,
            Outcome::Warn,
            "iptables is there still"
        );
        assert_eq!(version(&plan(), "5.10.0").outcome, Outcome::Warn);
        assert_eq!(version(&plan(), "6.1.0").outcome, Outcome::Pass);
        let only = Plan::new(&Config::parse("[enforce]\nbackends = [\"xdp-native\"]").unwrap());
        assert_eq!(version(&only, "4.18.0").outcome, Outcome::Fail);
    }

    #[test]
    fn rights_are_read_from_the_process_s_status() {
        let root = Rights::of("Name:\tx\nUid:\t0\t0\t0\t0\nCapEff:\t000001ffffffffff\n");
        assert_eq!((root.uid, root.lacking(true)), (Some(0), vec![]));
        let nobody = Rights::of("Uid:\t1000\t65534\t1000\t1000\nCapEff:\t0000000000000000\n");
        assert_eq!((nobody.uid, nobody.lacking(true).len()), (Some(65534), 3));
        // CAP_NET_ADMIN, CAP_PERFMON, CAP_BPF.
        let service = Rights::of("CapEff:\t000000c000001000");
        assert_eq!(service.lacking(true), Vec::<&str>::new());
        assert_eq!(
            Rights::of("CapEff:\t0000000000001000").lacking(false),
            Vec::<&str>::new()
        );
        assert_eq!(Rights::of("CapEff: zz\nUid:"), Rights::default());
    }

    #[test]
    fn a_user_namespace_is_told() {
        assert!(is_whole("         0          0 4294967295\n") && is_whole(""));
        assert!(!is_whole("         0     100000      65536\n"));
    }

    #[test]
    fn switches_are_judged() {
        assert_eq!(
            [jit("1"), jit("0"), jit("2"), jit("")].map(|check| check.outcome),
            [
                Outcome::Pass,
                Outcome::Warn,
                Outcome::Warn,
                Outcome::Skipped
            ]
        );
        assert_eq!(
            [unprivileged("2"), unprivileged("0"), unprivileged("?")].map(|check| check.outcome),
            [Outcome::Pass, Outcome::Warn, Outcome::Skipped]
        );
    }

    #[test]
    fn memory_is_weighed_against_each_limit() {
        let needed = map_bytes(1 << 20);
        assert!((180 << 20..230 << 20).contains(&needed), "{needed}");
        let outcome =
            |available, locked, cgroup| judge_memory(needed, available, locked, cgroup).outcome;
        assert_eq!(outcome(Some(8 << 30), None, None), Outcome::Pass);
        assert_eq!(outcome(Some(256 << 20), None, None), Outcome::Warn);
        assert_eq!(outcome(Some(8 << 30), Some(64 << 10), None), Outcome::Warn);
        assert_eq!(outcome(Some(8 << 30), None, Some(256 << 20)), Outcome::Warn);
        assert_eq!(outcome(None, None, None), Outcome::Skipped);

        assert_eq!(
            available("MemTotal: 1 kB\nMemAvailable:    8 kB\n"),
            Some(8192)
        );
        assert_eq!(available("MemAvailable: 18446744073709551615 kB"), None);
        assert_eq!(
            locked_limit(
                "Max locked memory         65536                65536                bytes"
            ),
            Some(65536)
        );
        assert_eq!(
            locked_limit(
                "Max locked memory         unlimited            unlimited            bytes"
            ),
            None
        );
        assert_eq!(cgroup_limit("12:memory:/x\n"), None);
    }
}
