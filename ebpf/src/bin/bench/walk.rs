//! The random walk over source addresses: which of them are banned, and which the next packet has.
//!
//! Shared as a source file with the tests' `bench`, so that both sides mean the same addresses; hence only `core`.
//!
//! Addresses are numbered by a permutation, so those of different numbers are different ones: the first so many numbers
//! are banned, all others are clean, and neither side needs a list.

/// Where the walk stands, and where it may go.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Walk {
    /// Of the generator, xorshift64 (Marsaglia, "Xorshift RNGs", 2003); not zero.
    pub state: u64,
    /// First number that is drawn.
    pub first: u64,
    /// How many numbers are drawn from, at most 2^32.
    pub span: u64,
    /// Width of an address, see [`permute`].
    pub bits: u64,
    /// Added to every address.
    pub base: u64,
    /// Index of the interface that `inject` sends to.
    pub interface: u64,
}

impl Walk {
    /// The next address.
    #[inline(always)]
    pub fn step(&mut self) -> u64 {
        let mut state = self.state;
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        self.state = state;
        let number = self.first + (((state >> 32) * self.span) >> 32);
        self.base + permute(number, self.bits)
    }
}

/// The address of a number: a permutation of all numbers of `bits` bits (2 to 64), as murmur's finalizer is.
#[inline(always)]
pub fn permute(number: u64, bits: u64) -> u64 {
    let (mask, half) = (u64::MAX >> (64 - bits), bits / 2);
    let mut address = number;
    for factor in [0xBF58_476D_1CE4_E5B9, 0x94D0_49BB_1331_11EB] {
        address = address.wrapping_mul(factor) & mask;
        address ^= address >> half;
    }
    address
}
