//! What an interface is, whose XDP program it has, and what keeps native XDP from it.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use aya::programs::loaded_programs;
use nix::{
    errno::Errno,
    unistd::{SysconfVar, sysconf},
};
use portcullis_engine::Timestamp;

use super::{
    kernel,
    netlink::{self, Channels, Link},
};

/// An interface.
#[derive(Clone, Debug, Default)]
pub(crate) struct Device {
    pub(super) link: Link,
    /// As /sys names it; `None` for most virtual ones.
    pub(super) driver: Option<String>,
    /// `None` where the kernel cannot say.
    pub(super) features: Option<u64>,
    pub(super) offloads: BTreeSet<String>,
    /// Of virtio: the hypervisor hands on merged or unchecked packets, and cannot be told to stop it.
    pub(super) merged: bool,
    pub(super) channels: Option<Channels>,
    /// The bond, bridge or team that it is a member of.
    pub(super) master: Option<String>,
    /// What it stands on.
    pub(super) lower: Option<String>,
}

/// Drivers with native XDP, for kernels that cannot say themselves (before 6.3).
const NATIVE: [&str; 38] = [
    "atlantic",
    "bnxt_en",
    "bonding",
    "cpsw",
    "dpaa2_eth",
    "dpaa_eth",
    "ena",
    "enetc",
    "fec",
    "fsl_dpa",
    "fsl_dpaa2_eth",
    "fsl_enetc",
    "funeth",
    "gve",
    "hv_netvsc",
    "i40e",
    "ice",
    "igb",
    "igc",
    "ixgbe",
    "ixgbevf",
    "mana",
    "mlx4_core",
    "mlx5_core",
    "mvneta",
    "mvpp2",
    "netsec",
    "nfp",
    "qede",
    "rvu_nicpf",
    "sfc",
    "stmmac",
    "thunder-nicvf",
    "tsnep",
    "tun",
    "veth",
    "virtio_net",
    "vmxnet3",
];
/// `NETDEV_XDP_ACT_BASIC`: the driver can drop and pass.
const BASIC: u64 = 1;

impl Device {
    pub(crate) fn read(interface: &str) -> Result<Self, Errno> {
        let link = netlink::link(interface)?;
        let name = |index: Option<u32>| {
            let name = nix::net::if_::if_indextoname(index?).ok()?;
            name.into_string().ok()
        };
        Ok(Self {
            driver: driver(&link),
            merged: virtio_merges(&link),
            features: netlink::xdp_features(link.index),
            offloads: netlink::offloads(link.index).unwrap_or_default(),
            channels: netlink::channels(link.index),
            master: name(link.master),
            // A veth's other end may be in another namespace, and its number mean nothing in this one.
            lower: link
                .lower
                .filter(|_| link.kind.as_deref() != Some("veth"))
                .and_then(|lower| name(Some(lower))),
            link,
        })
    }

    /// What drives it: the driver, or the kind of virtual interface.
    pub(super) fn made_by(&self) -> Option<&str> {
        self.driver
            .as_deref()
            .or(self.link.kind.as_deref())
            .map(|name| if name == "bond" { "bonding" } else { name })
    }

    /// Can its driver do native XDP, set up as it is? `None` when that is not known.
    pub(super) fn has_native(&self) -> Option<bool> {
        if let Some(features) = self.features {
            return Some(features & BASIC != 0);
        }
        let made_by = self.made_by()?;
        Some(NATIVE.contains(&made_by))
    }

    /// Identifiers of its XDP programs, each with where it runs.
    pub(super) fn programs(&self) -> Vec<(u32, &'static str)> {
        let Link {
            native,
            generic,
            hardware_program,
            ..
        } = &self.link;
        [
            (native, "native"),
            (generic, "generic"),
            (hardware_program, "in the hardware"),
        ]
        .into_iter()
        .filter_map(|(id, place)| Some(((*id)?, place)))
        .collect()
    }
}

/// Identifiers of the XDP programs on an interface.
pub(crate) fn programs_on(interface: &str) -> Result<Vec<u32>, Errno> {
    let link = netlink::link(interface)?;
    let programs = [link.native, link.generic, link.hardware_program];
    Ok(programs.into_iter().flatten().collect())
}

/// What frames an interface carries, as ARP numbers it, if the XDP program cannot read them.
pub(crate) fn unreadable(interface: &str) -> Result<Option<u16>, Errno> {
    let hardware = netlink::link(interface)?.hardware;
    Ok((!is_ethernet(hardware)).then_some(hardware))
}

/// Are these Ethernet's frames? As ARP numbers them; those of the loopback interface are.
pub(super) const fn is_ethernet(hardware: u16) -> bool {
    matches!(hardware, 1 | 772)
}

/// Through its bus and not through /sys/class/net, which shows the interfaces of the namespace that it was mounted in.
fn device_folder(link: &Link) -> Option<PathBuf> {
    let (bus, device) = link.device.as_ref()?;
    let is_name = |name: &str| !name.is_empty() && !name.contains('/') && !name.starts_with('.');
    (is_name(bus) && is_name(device))
        .then(|| Path::new("/sys/bus").join(bus).join("devices").join(device))
}

fn driver(link: &Link) -> Option<String> {
    let path = fs::read_link(device_folder(link)?.join("driver")).ok()?;
    Some(path.file_name()?.to_str()?.to_owned())
}

fn virtio_merges(link: &Link) -> bool {
    let is_virtio = link.device.as_ref().is_some_and(|(bus, _)| bus == "virtio");
    let bits = device_folder(link)
        .filter(|_| is_virtio)
        .and_then(|folder| fs::read_to_string(folder.join("features")).ok());
    bits.is_some_and(|bits| merges(bits.trim()))
}

/// From the features that a virtio network device was given, a digit each, as virtio numbers them.
fn merges(bits: &str) -> bool {
    const CONTROL: usize = 2;
    /// Checksums, TSO for IPv4, for IPv6, with ECN, UFO, USO for IPv4, for IPv6.
    const MERGES: [usize; 7] = [1, 7, 8, 9, 10, 54, 55];
    let has = |bit: usize| bits.as_bytes().get(bit) == Some(&b'1');
    !has(CONTROL) && MERGES.into_iter().any(has)
}

/// Who has loaded a program, and when: `program "xdp_dispatcher" (id 77, loaded 2026-11-22 12:00:03Z by uid 0)`.
pub(crate) fn program(id: u32) -> String {
    let info = loaded_programs().flatten().find(|info| info.id() == id);
    let Some(info) = info else {
        return format!("program id {id}");
    };
    let loaded = info
        .loaded_at()
        .and_then(|at| at.duration_since(std::time::UNIX_EPOCH).ok())
        .map(|since| Timestamp::from_millis(u64::try_from(since.as_millis()).unwrap_or(u64::MAX)));
    phrase(info.name(), id, loaded, info.created_by_uid())
}

/// The name of a program.
pub(super) fn program_name(id: u32) -> Option<String> {
    let info = loaded_programs().flatten().find(|info| info.id() == id)?;
    Some(info.name_as_str()?.to_owned())
}

fn phrase(name: &[u8], id: u32, loaded: Option<Timestamp>, uid: Option<u32>) -> String {
    let name = super::printable(&String::from_utf8_lossy(name));
    let name = if name.is_empty() {
        "without a name".to_owned()
    } else {
        format!("{name:?}")
    };
    let loaded = loaded.map_or(String::new(), |loaded| {
        format!(", loaded {}", to_the_second(loaded))
    });
    let by = uid.map_or(String::new(), |uid| format!(" by uid {uid}"));
    format!("program {name} (id {id}{loaded}{by})")
}

/// `2026-11-22 12:00:03Z`
pub(super) fn to_the_second(at: Timestamp) -> String {
    let text = Timestamp::from_secs(at.secs()).to_string();
    let text = text
        .split_once('.')
        .map_or(text.as_str(), |(seconds, _)| seconds);
    format!("{}Z", text.replacen('T', " ", 1))
}

/// The XDP program that keeps others from an interface: its own, or that of the bond or bridge that it is a member of.
pub(crate) fn holder(device: &Device) -> Option<String> {
    if let Some((id, _)) = device.programs().first() {
        return Some(program(*id));
    }
    let master = device.master.as_deref()?;
    let link = netlink::link(master).ok()?;
    let above = Device {
        link,
        ..Device::default()
    };
    let (id, _) = *above.programs().first()?;
    Some(format!(
        "{} on {master}, which it is a member of",
        program(id)
    ))
}

/// What keeps native XDP from an interface, a clause each, with the remedy.
pub(crate) fn hindrances(device: &Device) -> Vec<String> {
    hindrances_on(
        device,
        kernel::release().unwrap_or((u32::MAX, 0)),
        page(),
        cpus(),
    )
}

fn hindrances_on(device: &Device, release: (u32, u32), page: u32, cpus: u32) -> Vec<String> {
    let name = &device.link.name;
    let mut all = Vec::new();
    let most = largest_mtu(page);
    if device.link.mtu > most && device.link.kind.as_deref() != Some("bond") && name != "lo" {
        all.push(format!(
            "its MTU of {} leaves no room in a page of {page} bytes for what XDP needs: lower it (`ip link set dev {name} \
             mtu {most}`; some drivers take less)",
            device.link.mtu
        ));
    }
    if device.offloads.contains("rx-lro") {
        all.push(format!(
            "LRO is on: switch it off (`ethtool -K {name} lro off`)"
        ));
    }
    if device.merged {
        all.push(
            "the hypervisor merges packets for it (GRO-HW, checksums) and cannot be told to stop: give the guest \
             `guest_csum=off,guest_tso4=off,guest_tso6=off,guest_ecn=off,guest_ufo=off`, or `ctrl_guest_offloads=on`"
                .to_owned(),
        );
    }
    let made_by = device.made_by().unwrap_or_default();
    if let Some(Channels { now, most }) = device.channels {
        match made_by {
            "virtio_net" if release < (5, 13) && now.saturating_add(cpus) > most => all.push(format!(
                "it has {most} queue pairs, and virtio on this kernel wants {now} and one more for each of {cpus} CPUs: \
                 use fewer (`ethtool -L {name} combined N`), give the guest more, or a kernel of 5.13 or later"
            )),
            "ena" | "gve" if now.saturating_mul(2) > most => all.push(format!(
                "{now} of its {most} queues are in use, and this driver needs as many again for XDP: `ethtool -L {name} \
                 combined {}`",
                (most / 2).max(1)
            )),
            _ => {}
        }
    }
    let on = device.lower.as_deref().unwrap_or("the interface below it");
    match device.link.kind.as_deref() {
        Some(kind @ ("vlan" | "macvlan" | "ipvlan")) => {
            all.push(format!(
                "it is a {kind} interface, and those have no native XDP: guard {on}"
            ));
        }
        Some("bridge") => {
            all.push("it is a bridge, and those have no native XDP: guard its ports".to_owned());
        }
        Some("team") => all.push(
            "it is a team, and those have no native XDP: use a bond, or guard its members"
                .to_owned(),
        ),
        Some("bond") if release < (5, 15) => {
            all.push(
                "it is a bond, and those have native XDP from kernel 5.15 on: guard its members"
                    .to_owned(),
            );
        }
        Some("bond")
            if device
                .features
                .is_some_and(|features| features & BASIC == 0) =>
        {
            all.push(
                "it is a bond, and not all of its members have native XDP, or its mode has none"
                    .to_owned(),
            );
        }
        _ => {}
    }
    if let (Some(kind @ ("bond" | "team")), Some(master)) =
        (device.link.member_of.as_deref(), &device.master)
    {
        all.push(format!(
            "it is a member of the {kind} {master}: guard {master}"
        ));
    }
    all
}

/// The largest MTU that fits a page with XDP's head room (256), the kernel's tail (320), an Ethernet header and two tags.
pub(super) const fn largest_mtu(page: u32) -> u32 {
    page.saturating_sub(256 + 320 + 22)
}

pub(super) fn page() -> u32 {
    let size = sysconf(SysconfVar::PAGE_SIZE).ok().flatten();
    size.and_then(|size| u32::try_from(size).ok())
        .unwrap_or(4096)
}

fn cpus() -> u32 {
    let count = sysconf(SysconfVar::_NPROCESSORS_CONF).ok().flatten();
    count
        .and_then(|count| u32::try_from(count).ok())
        .unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(name: &str) -> Device {
        Device {
            link: Link {
                name: name.into(),
                mtu: 1500,
                hardware: 1,
                ..Link::default()
            },
            ..Device::default()
        }
    }

    fn found(device: &Device) -> String {
        hindrances_on(device, (6, 1), 4096, 4).join("; ")
    }

    #[test]
    fn each_hindrance_is_named_with_its_remedy() {
        let mut plain = device("eth0");
        assert_eq!(found(&plain), "");
        plain.link.mtu = 9000;
        plain.offloads.insert("rx-lro".into());
        let both = found(&plain);
        assert!(
            both.contains("mtu 3498") && both.contains("lro off"),
            "{both}"
        );
        assert_eq!(
            hindrances_on(&plain, (6, 1), 65_536, 4).len(),
            1,
            "larger pages take larger packets"
        );

        let mut member = device("eth1");
        (member.link.member_of, member.master) = (Some("bond".into()), Some("bond0".into()));
        assert!(found(&member).contains("guard bond0"));

        let mut vlan = device("eth0.7");
        (vlan.link.kind, vlan.lower) = (Some("vlan".into()), Some("eth0".into()));
        assert!(found(&vlan).contains("guard eth0"));
    }

    #[test]
    fn queues_matter_to_the_drivers_that_need_more_of_them() {
        let mut virtio = device("eth0");
        (virtio.driver, virtio.channels) = (
            Some("virtio_net".into()),
            Some(Channels { now: 4, most: 4 }),
        );
        assert_eq!(
            found(&virtio),
            "",
            "since 5.13 it makes do with what it has"
        );
        assert!(hindrances_on(&virtio, (5, 10), 4096, 4)[0].contains("5.13"));
        virtio.driver = Some("ena".into());
        assert!(found(&virtio).contains("combined 2"));
        virtio.channels = Some(Channels {
            now: u32::MAX,
            most: 1,
        });
        assert!(found(&virtio).contains("combined 1"));
    }

    #[test]
    fn a_hypervisor_that_merges_and_cannot_be_stopped_is_told() {
        let bits = |set: &[usize]| -> String {
            (0..64)
                .map(|bit| if set.contains(&bit) { '1' } else { '0' })
                .collect()
        };
        assert!(merges(&bits(&[0, 1, 5])) && merges(&bits(&[7])));
        assert!(!merges(&bits(&[0, 1, 2, 7, 8])), "it can be told to stop");
        assert!(!merges("") && !merges("x") && !merges(&bits(&[])));
        let mut virtio = device("eth0");
        virtio.merged = true;
        assert!(found(&virtio).contains("guest_csum=off"));
    }

    #[test]
    fn a_driver_s_ability_is_asked_of_the_kernel_and_then_of_the_list() {
        let mut unknown = device("eth0");
        assert_eq!(unknown.has_native(), None);
        unknown.driver = Some("e1000e".into());
        assert_eq!(unknown.has_native(), Some(false));
        unknown.driver = Some("virtio_net".into());
        assert_eq!(unknown.has_native(), Some(true));
        unknown.features = Some(0);
        assert_eq!(unknown.has_native(), Some(false));
        assert!(NATIVE.is_sorted());
    }

    #[test]
    fn a_program_is_named_with_its_time_and_owner() {
        let at = Timestamp::from_millis(1_795_348_803_999);
        assert_eq!(
            phrase(b"xdp_dispatcher", 77, Some(at), Some(0)),
            r#"program "xdp_dispatcher" (id 77, loaded 2026-11-22 12:00:03Z by uid 0)"#
        );
        assert_eq!(phrase(b"", 5, None, None), "program without a name (id 5)");
        assert!(!phrase(b"a\x1b[2J\xff", 5, None, None).contains('\u{1b}'));
        assert_eq!(program(u32::MAX), format!("program id {}", u32::MAX));
    }
}
