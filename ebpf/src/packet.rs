//! All pointer arithmetic on packets, bounds-checked, in this file alone.

use aya_ebpf::programs::XdpContext;
use portcullis_common::stats::Counter;

/// Source address of a packet.
pub enum Source {
    /// IPv4, in network order.
    V4([u8; 4]),
    /// IPv6.
    V6(V6),
}

/// An IPv6 address as its two halves, each in network order as it lies in memory.
#[derive(Clone, Copy)]
pub struct V6 {
    /// The /64.
    pub network: [u8; 8],
    /// The interface identifier.
    pub interface: [u8; 8],
}

impl V6 {
    /// The /64 as a number, for the front filter.
    #[inline(always)]
    pub fn prefix(self) -> u64 {
        u64::from_be_bytes(self.network)
    }

    /// All sixteen bytes.
    #[inline(always)]
    pub fn octets(self) -> [u8; 16] {
        // SAFETY: two arrays of eight bytes have the size of one of sixteen, and no invalid values.
        unsafe { core::mem::transmute([self.network, self.interface]) }
    }
}

const ETH_IPV4: u16 = 0x0800;
const ETH_IPV6: u16 = 0x86DD;
/// Tags: 802.1Q, 802.1ad, and the value that was used for stacking before it.
const ETH_VLAN: [u16; 3] = [0x8100, 0x88A8, 0x9100];
const VLAN_TAGS: usize = 2;

/// The headers below are `packed(2)`: Ethernet leaves the network header at an address that is a multiple of two,
/// not of four, and not every architecture may load a wider word there.
#[repr(C, packed(2))]
struct Ethernet {
    addresses: [u16; 6],
    kind: u16,
}

#[repr(C, packed(2))]
struct Vlan {
    control: u16,
    kind: u16,
}

#[repr(C, packed(2))]
struct Ipv4 {
    version_and_length: u8,
    service: u8,
    middle: [u16; 5],
    source: [u16; 2],
    destination: [u16; 2],
}

#[repr(C, packed(2))]
struct Ipv6 {
    version_and_class: u8,
    flow: u8,
    middle: [u16; 3],
    source: [u16; 8],
    destination: [u16; 8],
}

const _: () = assert!(size_of::<Ethernet>() == 14 && size_of::<Vlan>() == 4);
const _: () = assert!(size_of::<Ipv4>() == 20 && size_of::<Ipv6>() == 40);

/// Finds the source address.
///
/// # Errors
/// `Malformed` for a packet that ends inside a header or names another IP version than its Ethernet type;
/// `NotIp` for every other protocol.
#[inline(always)]
pub fn source(ctx: &XdpContext) -> Result<Source, Counter> {
    let mut kind = {
        let ethernet: *const Ethernet = at(ctx, 0)?;
        // SAFETY: `at` has checked the bounds.
        u16::from_be(unsafe { (*ethernet).kind })
    };
    let mut offset = size_of::<Ethernet>();
    for _ in 0..VLAN_TAGS {
        if !ETH_VLAN.contains(&kind) {
            break;
        }
        let tag: *const Vlan = at(ctx, offset)?;
        // SAFETY: `at` has checked the bounds.
        kind = u16::from_be(unsafe { (*tag).kind });
        offset += size_of::<Vlan>();
    }
    match kind {
        ETH_IPV4 => {
            let header: *const Ipv4 = at(ctx, offset)?;
            // SAFETY: `at` has checked the bounds of the whole header.
            let (version, [a, b]) =
                unsafe { ((*header).version_and_length >> 4, (*header).source) };
            if version != 4 {
                return Err(Counter::Malformed);
            }
            let ([a, b], [c, d]) = (a.to_ne_bytes(), b.to_ne_bytes());
            Ok(Source::V4([a, b, c, d]))
        }
        ETH_IPV6 => {
            let header: *const Ipv6 = at(ctx, offset)?;
            // SAFETY: `at` has checked the bounds of the whole header.
            let (version, words) = unsafe { ((*header).version_and_class >> 4, (*header).source) };
            if version != 6 {
                return Err(Counter::Malformed);
            }
            let half = |from: usize| -> [u8; 8] {
                let words = [
                    words[from],
                    words[from + 1],
                    words[from + 2],
                    words[from + 3],
                ];
                // SAFETY: four words of two bytes have the size of eight bytes, and no invalid values.
                unsafe { core::mem::transmute(words) }
            };
            Ok(Source::V6(V6 {
                network: half(0),
                interface: half(4),
            }))
        }
        _ => Err(Counter::NotIp),
    }
}

/// An IPv4 address as IPv6 writes it.
#[inline(always)]
pub fn mapped([a, b, c, d]: [u8; 4]) -> [u8; 16] {
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xFF, 0xFF, a, b, c, d]
}

/// Bytes of the packet's first buffer.
#[inline(always)]
#[expect(
    clippy::cast_possible_truncation,
    reason = "a buffer is at most a few pages"
)]
pub fn length(ctx: &XdpContext) -> u32 {
    (ctx.data_end() - ctx.data()) as u32
}

/// Index of the interface that the packet came in by.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "32 bits in the context")]
pub fn interface(ctx: &XdpContext) -> u32 {
    ctx.ingress_ifindex() as u32
}

/// A pointer to a `T` at `offset`, if the packet holds all of it.
#[inline(always)]
fn at<T>(ctx: &XdpContext, offset: usize) -> Result<*const T, Counter> {
    let start = ctx.data() + offset;
    if start + size_of::<T>() > ctx.data_end() {
        return Err(Counter::Malformed);
    }
    Ok(start as *const T)
}
