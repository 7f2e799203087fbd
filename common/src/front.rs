//! Index arithmetic of the front filters: bitmaps, two a family, that nearly all clean packets end at; and of those that
//! spare banned packets the look-up in the allowlist.
//!
//! A set bit says "something could match, look further"; a clear bit is proof that nothing does. The coarse filter is asked
//! first: it fits into a processor's own cache. While there are few bans, hardly a packet gets to the fine one.

/// An element of a filter's map: a cache line of bits, so that a million bans are entered with 32,768 of them.
pub type Line = [u64; 8];
const LINE_BITS: u32 = 512;

/// Lines of a fine filter, with a bit for each of 2^24 prefixes: 2 MiB.
pub const LINES: u32 = (1 << 24) / LINE_BITS;
/// Lines of a coarse filter, with a bit for each sixteen of those: 128 KiB. Larger ones measured no better for
/// clean packets at 10,000 bans, nor at a million, and worse for banned ones, which ask both.
pub const COARSE_LINES: u32 = LINES / 16;

/// Bit of an IPv4 address (host byte order): one bit for each /24.
#[inline(always)]
#[must_use]
pub const fn bit_v4(address: u32) -> u32 {
    address >> 8
}

/// Bit of an IPv6 /64 (its upper 64 bits in host byte order), by multiplicative hashing (Knuth, TAOCP 3, 6.4).
/// Collisions, crafted ones too, cost a look-up and nothing else.
#[inline(always)]
#[must_use]
pub const fn bit_v6(prefix: u64) -> u32 {
    (prefix.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40) as u32
}

/// Bit of the coarse filter that stands for a bit of the fine one, and for fifteen others of the same word.
#[inline(always)]
#[must_use]
pub const fn coarse(bit: u32) -> u32 {
    bit / 16
}

/// The bits of their word that share a coarse bit.
#[must_use]
pub const fn others(bit: u32) -> u64 {
    0xFFFF << (bit & 0x30)
}

/// Lines of the allowlist's filters, one a family: 8 KiB. A set bit says "the allowlist could match"; a banned packet is
/// looked up in the allowlist, which costs about as much as the ban's own look-up, only then.
pub const ALLOW_LINES: u32 = (1 << 16) / LINE_BITS;

/// Bit of an IPv4 address (host byte order) in the allowlist's filter: one bit for each /16.
#[inline(always)]
#[must_use]
pub const fn allow_bit_v4(address: u32) -> u32 {
    address >> 16
}

/// Bit of an IPv6 /64 (its upper 64 bits in host byte order) in the allowlist's filter: one bit for each /16.
#[inline(always)]
#[must_use]
pub const fn allow_bit_v6(prefix: u64) -> u32 {
    (prefix >> 48) as u32
}

/// Line that holds a bit.
#[inline(always)]
#[must_use]
pub const fn line(bit: u32) -> u32 {
    bit / LINE_BITS
}

/// Word of its line that holds a bit, 0 to 7.
#[inline(always)]
#[must_use]
pub const fn word(bit: u32) -> usize {
    (bit / 64 % 8) as usize
}

/// Mask of a bit inside its word.
#[inline(always)]
#[must_use]
pub const fn mask(bit: u32) -> u64 {
    1 << (bit & 63)
}
