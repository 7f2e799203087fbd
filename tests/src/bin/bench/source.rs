//! Source addresses: which are banned, the packets that come from them, and the walk over them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context as _, Result};
use aya::{Ebpf, maps::Array};
use portcullis::enforce::{Change, Lifetime};
use portcullis_engine::Subject;
use portcullis_tests::lab::EDGE_V4;

use crate::walk::{Walk, permute};

/// Where every walk begins.
const SEED: u64 = 0x5EED_0001;

/// A set of addresses, numbered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// All of IPv4.
    V4,
    /// 128.0.0.0/2: the largest part without an address that the kernel drops by itself.
    V4Routable,
    /// The first address of every /64.
    V6,
}

/// What the walk goes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sources {
    /// All that are not banned.
    Clean,
    /// All that are.
    Banned,
}

impl Family {
    const fn bits(self) -> u64 {
        match self {
            Self::V4 => 32,
            Self::V4Routable => 30,
            Self::V6 => 64,
        }
    }

    const fn base(self) -> u64 {
        match self {
            Self::V4Routable => 0x8000_0000,
            Self::V4 | Self::V6 => 0,
        }
    }

    /// The address of a number; the first so many are banned.
    pub fn address(self, number: u32) -> IpAddr {
        let address = self.base() + permute(number.into(), self.bits());
        match self {
            Self::V6 => Ipv6Addr::from_bits((u128::from(address) << 64) + 1).into(),
            // Less than 2^32 by `bits`.
            Self::V4 | Self::V4Routable => {
                Ipv4Addr::from_bits(u32::try_from(address).unwrap_or(u32::MAX)).into()
            }
        }
    }

    /// Bans of these numbers.
    pub fn bans(self, numbers: std::ops::Range<u32>) -> Vec<Change> {
        numbers
            .map(|number| {
                Change::Ban(
                    Subject::of_client(self.address(number)),
                    Lifetime::Permanent,
                )
            })
            .collect()
    }

    /// The shortest UDP packet that Ethernet carries: 60 bytes, 62 of IPv6.
    pub fn packet(self) -> Vec<u8> {
        let mut packet = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        if self == Self::V6 {
            packet.extend([0x86, 0xDD, 0x60, 0, 0, 0, 0, 8, 17, 64]);
            packet.extend(Ipv6Addr::from_bits(1).octets());
            packet.extend(Ipv6Addr::LOCALHOST.octets());
        } else {
            packet.extend([0x08, 0, 0x45, 0, 0, 46, 0, 1, 0, 0, 64, 17]);
            packet.extend(checksum().to_be_bytes());
            packet.extend([0; 4]);
            packet.extend(EDGE_V4.octets());
        }
        let (length, udp): (usize, u8) = if self == Self::V6 { (62, 8) } else { (60, 26) };
        packet.extend([0, 7, 0, 7, 0, udp, 0, 0]);
        packet.resize(length, 0);
        packet
    }
}

/// Of the IPv4 header above.
fn checksum() -> u16 {
    let [a, b, c, d] = EDGE_V4.octets();
    let words = [
        0x4500,
        46,
        1,
        0,
        0x4011,
        u16::from_be_bytes([a, b]),
        u16::from_be_bytes([c, d]),
    ];
    !words.into_iter().fold(0, |sum: u16, word| {
        let (sum, carry) = sum.overflowing_add(word);
        sum + u16::from(carry)
    })
}

/// Sets the walk back to its beginning.
///
/// # Errors
/// When the map cannot be written.
pub fn rewind(
    bench: &mut Ebpf,
    family: Family,
    sources: Sources,
    bans: u32,
    interface: u32,
) -> Result<()> {
    let (first, span) = match sources {
        Sources::Banned => (0, bans.into()),
        Sources::Clean => (bans.into(), (1 << family.bits().min(32)) - u64::from(bans)),
    };
    let walk = Walk {
        state: SEED,
        first,
        span,
        bits: family.bits(),
        base: family.base(),
        interface: interface.into(),
    };
    let Walk {
        state,
        first,
        span,
        bits,
        base,
        interface,
    } = walk;
    let map = bench.map_mut("WALK").context("the object has no walk")?;
    Array::<_, [u64; 6]>::try_from(map)?.set(0, [state, first, span, bits, base, interface], 0)?;
    Ok(())
}
