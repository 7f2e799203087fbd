//! From a kernel's errno to one sentence with the remedy.

use std::{error::Error, io};

use anyhow::{Error as Report, anyhow};
use aya::{
    maps::MapError,
    programs::{ProgramError, xdp::XdpError},
};
use ipnet::IpNet;
use nix::errno::Errno;
use portcullis_engine::Subject;

use super::whose;

/// The kernel's error number at the root of an error, if there is one.
pub(super) fn errno(error: &(dyn Error + 'static)) -> Option<Errno> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(code) = error
            .downcast_ref::<io::Error>()
            .and_then(io::Error::raw_os_error)
        {
            return Some(Errno::from_raw(code));
        }
        if let Some(ProgramError::XdpError(XdpError::NetlinkError(error))) =
            error.downcast_ref::<ProgramError>()
        {
            return error.raw_os_error().map(Errno::from_raw);
        }
        next = error.source();
    }
    None
}

/// Why the program or its maps could not be loaded.
pub(super) fn load<E: Error + Send + Sync + 'static>(error: E) -> Report {
    let remedy = match errno(&error) {
        Some(Errno::EPERM | Errno::EACCES) => {
            "no right to load BPF programs: run as root, or give the service CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON"
        }
        Some(Errno::ENOMEM | Errno::E2BIG) => {
            "no memory for the ban maps: lower bans.max_bans or raise the memory limit"
        }
        Some(Errno::ENOSYS) => {
            "this kernel has no BPF system call: use a kernel with CONFIG_BPF_SYSCALL"
        }
        _ => "the kernel refuses the XDP program",
    };
    Report::new(error).context(remedy)
}

/// Why the program could not be attached.
pub(super) fn attach(error: ProgramError, interface: &str, flavour: &str) -> Report {
    // Only the driver's path has these.
    let hindrances = || match flavour {
        "native" => whose::hindrances(interface).join("; "),
        _ => String::new(),
    };
    let remedy = match errno(&error) {
        Some(Errno::EBUSY | Errno::EEXIST) => format!(
            "{} is attached to {interface} and is left alone: detach it if it is not needed (`ip -details link show \
             {interface}` shows it)",
            whose::holder(interface).unwrap_or_else(|| "another XDP program".to_owned())
        ),
        Some(Errno::EOPNOTSUPP) => match hindrances() {
            none if none.is_empty() => format!("the driver of {interface} has no {flavour} XDP"),
            known => {
                format!("the driver of {interface} has no {flavour} XDP as it is set up: {known}")
            }
        },
        // A veth whose MTU is too large says ERANGE.
        Some(Errno::EINVAL | Errno::ERANGE | Errno::ENOMEM | Errno::ENOSPC) => match hindrances() {
            none if none.is_empty() => format!(
                "the driver of {interface} refuses {flavour} XDP as it is set up: an MTU above one page, LRO, or too few \
                 queues are the usual reasons (`dmesg` names it)"
            ),
            known => {
                format!("the driver of {interface} refuses {flavour} XDP as it is set up: {known}")
            }
        },
        Some(Errno::EPERM | Errno::EACCES) => {
            "no right to attach XDP programs: run as root, or give the service CAP_NET_ADMIN"
                .to_owned()
        }
        Some(Errno::ENODEV) => format!("there is no interface {interface} any more"),
        _ => format!("cannot attach to {interface} in {flavour} mode"),
    };
    Report::new(error).context(remedy)
}

/// Why an entry could not be written.
pub(super) fn write(error: MapError) -> Report {
    match errno(&error) {
        Some(Errno::E2BIG | Errno::ENOSPC) => anyhow!("the kernel's map is full"),
        Some(Errno::ENOMEM) => anyhow!("the kernel has no memory for another prefix"),
        _ => Report::new(error).context("cannot write to a BPF map"),
    }
}

/// Why a ban could not be written.
pub(super) fn put<E: Error + Send + Sync + 'static>(error: E, subject: Subject) -> Report {
    let remedy = match (errno(&error), subject.net(), subject.net().prefix_len()) {
        (Some(Errno::E2BIG | Errno::ENOSPC), IpNet::V4(_), 32)
        | (Some(Errno::E2BIG | Errno::ENOSPC), IpNet::V6(_), 64) => "raise bans.max_bans",
        (Some(Errno::E2BIG | Errno::ENOSPC), ..) => {
            "there is room for 16,384 prefixes and as many single IPv6 addresses: ban fewer, wider ones"
        }
        _ => return Report::new(error).context("cannot write to a BPF map"),
    };
    anyhow!("the kernel's map for {subject} is full: {remedy}")
}

/// Is a link attached to nothing any more?
pub(super) fn is_severed(error: &Report) -> bool {
    let number = error.chain().find_map(errno);
    matches!(number, Some(Errno::ENOLINK | Errno::ENODEV))
}

/// Was it just not there?
pub(super) fn is_not_found(error: &MapError) -> bool {
    matches!(error, MapError::KeyNotFound) || errno(error) == Some(Errno::ENOENT)
}
