//! Index arithmetic of the front filters: bitmaps, one a family, that nearly all clean packets end at; and of the smaller
//! ones that spare banned packets the look-up in the allowlist.
//!
//! A set bit says "something could match, look further"; a clear bit is proof that nothing does.

/// Bits of one filter.
pub const BITS: u32 = 1 << 24;
/// `u64` words of one filter: 2 MiB.
pub const WORDS: u32 = BITS / 64;

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

/// Words of the allowlist's filters, one a family: 8 KiB. A set bit says "the allowlist could match"; a banned packet is
/// looked up in the allowlist, which costs about as much as the ban's own look-up, only then.
pub const ALLOW_WORDS: u32 = (1 << 16) / 64;

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

/// Word that holds a bit.
#[inline(always)]
#[must_use]
pub const fn word(bit: u32) -> u32 {
    bit >> 6
}

/// Mask of a bit inside its word.
#[inline(always)]
#[must_use]
pub const fn mask(bit: u32) -> u64 {
    1 << (bit & 63)
}
