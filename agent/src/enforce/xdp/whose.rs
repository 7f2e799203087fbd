//! Why an interface does not take the program: whose is there already, and what is in the way of native XDP.

use std::path::Path;

use anyhow::{Result, bail};
use aya::programs::links::{FdLink, PinnedLink};

use super::{Flavour, pins::Pins};
use crate::doctor::device::{self, Device};

/// Whose XDP program is attached to an interface, or to the bond that it is a member of:
/// `program "xdp_dispatcher" (id 77, loaded 2026-11-22 12:00:03Z by uid 0)`. `None` when there is none or it is not known.
pub(super) fn holder(interface: &str) -> Option<String> {
    device::holder(&Device::read(interface).ok()?)
}

/// What is in the way of native XDP on an interface, a clause each, with the remedy. Empty when nothing is known.
pub(super) fn hindrances(interface: &str) -> Vec<String> {
    Device::read(interface).map_or(Vec::new(), |device| device::hindrances(&device))
}

/// Is this program on an interface? Where that is not known, it is taken to be.
pub(super) fn has(interface: &str, program: u32) -> bool {
    device::programs_on(interface).map_or(true, |programs| programs.contains(&program))
}

/// Why the program could not read what comes in through an interface.
///
/// # Errors
/// Then: one sentence with the remedy.
pub(super) fn check_readable(interface: &str) -> Result<()> {
    match device::unreadable(interface) {
        Ok(Some(hardware)) => bail!(
            "{interface} carries no Ethernet (type {hardware}), and XDP would let everything pass: guard the interface below \
             it, or leave it to iptables"
        ),
        Ok(None) | Err(_) => Ok(()),
    }
}

/// The program that a pinned link of ours holds an interface with, by its identifier. Of this version or another one:
/// the agent takes that over.
pub(crate) fn ours(pin_dir: &Path, interface: &str) -> Option<u32> {
    let pins = Pins::at(pin_dir);
    let mut links = Flavour::ALL.into_iter().flat_map(|flavour| {
        let others = pins.links_of_other_schemas(interface, flavour.name());
        std::iter::once(pins.link(interface, flavour.name())).chain(others)
    });
    links.find_map(|link| {
        let link = FdLink::from(PinnedLink::from_pin(link).ok()?);
        // Detached by somebody, it has none.
        link.info()
            .ok()
            .map(|info| info.program_id())
            .filter(|id| *id != 0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_nothing_is_known_nothing_is_said() {
        assert_eq!(holder("no-such-iface"), None);
        assert_eq!(hindrances("no-such-iface"), Vec::<String>::new());
        assert_eq!(
            hindrances("a name that is far too long for an interface"),
            Vec::<String>::new()
        );
        assert_eq!(ours(Path::new("/no/such/folder"), "eth0"), None);
    }
}
