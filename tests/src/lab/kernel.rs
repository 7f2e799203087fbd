//! What the kernel itself says: the pinned maps, and what is attached to an interface.

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use aya::{
    Pod,
    maps::{HashMap, IterableMap as _, Map, MapData, MapError, PerCpuArray},
};
use portcullis_common::{SCHEMA, ban::Entry, names, stats::Counter};
use serde_json::Value;

use super::netns::{self, NetNs};

/// The agent's pinned maps. Each look is a fresh one.
#[derive(Clone, Debug)]
pub struct Pins(PathBuf);

/// The exact IPv4 bans.
pub type BansV4 = HashMap<MapData, [u8; 4], Entry>;

impl Pins {
    /// The maps below the agent's `enforce.pin_dir`.
    #[must_use]
    pub fn new(pin_dir: &Path) -> Self {
        Self(pin_dir.join(format!("v{SCHEMA}")))
    }

    fn open(&self, name: &str) -> Result<MapData> {
        let path = self.0.join(name);
        MapData::from_pin(&path)
            .with_context(|| format!("cannot open the pinned map {}", path.display()))
    }

    /// The exact IPv4 bans, for looking often.
    ///
    /// # Errors
    /// When the map is not pinned, or is another.
    pub fn bans_v4(&self) -> Result<BansV4> {
        Ok(HashMap::try_from(Map::HashMap(self.open(names::BANS_V4)?))?)
    }

    /// The kernel's entry for an IPv4 address.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn ban_v4(&self, address: Ipv4Addr) -> Result<Option<Entry>> {
        entry(&self.bans_v4()?, address.octets())
    }

    /// The kernel's entry for the /64 of an IPv6 address.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn ban_v6(&self, address: Ipv6Addr) -> Result<Option<Entry>> {
        let map: HashMap<_, [u8; 8], Entry> =
            HashMap::try_from(Map::HashMap(self.open(names::BANS_V6)?))?;
        let network = (address.to_bits() >> 64) as u64;
        entry(&map, network.to_be_bytes())
    }

    /// A total of packets, over all processors.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn counter(&self, counter: Counter) -> Result<u64> {
        let map: PerCpuArray<_, u64> =
            PerCpuArray::try_from(Map::PerCpuArray(self.open(names::STATS)?))?;
        Ok(map.get(&(counter as u32), 0)?.iter().sum())
    }
}

/// Looks up one ban.
///
/// # Errors
/// When the map cannot be read.
pub fn entry<K: Pod>(map: &HashMap<MapData, K, Entry>, key: K) -> Result<Option<Entry>> {
    match map.get(&key, 0) {
        Ok(entry) => Ok(Some(entry)),
        Err(MapError::KeyNotFound) => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot read {:?}", map.map().info())),
    }
}

/// How an XDP program sits on an interface: `native`, `generic`, `offload`, or `None` without any.
///
/// # Errors
/// When there is no such interface.
pub fn xdp_mode(namespace: &NetNs, interface: &str) -> Result<Option<&'static str>> {
    Ok(match xdp(namespace, interface, "mode")? {
        None => None,
        // XDP_ATTACHED_* of linux/if_link.h.
        Some(1) => Some("native"),
        Some(2) => Some("generic"),
        Some(3) => Some("offload"),
        Some(_) => Some("several"),
    })
}

/// The number of the XDP program on an interface, if there is one.
///
/// # Errors
/// When there is no such interface.
pub fn xdp_program(namespace: &NetNs, interface: &str) -> Result<Option<u64>> {
    xdp(namespace, interface, "prog/id")
}

fn xdp(namespace: &NetNs, interface: &str, what: &str) -> Result<Option<u64>> {
    let text = netns::ip(&[
        "-n",
        namespace.name(),
        "-j",
        "link",
        "show",
        "dev",
        interface,
    ])?;
    let links: Value = serde_json::from_str(&text).context("cannot read what ip printed")?;
    Ok(links
        .pointer(&format!("/0/xdp/{what}"))
        .and_then(Value::as_u64))
}
