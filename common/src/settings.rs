//! What the agent tells the program to do: one value in the map `SETTINGS`.

/// Drop what is banned; without it, count and pass.
pub const ENFORCE: u32 = 1;
/// At least one IPv4 CIDR ban exists.
pub const CIDR_V4: u32 = 1 << 1;
/// At least one IPv6 CIDR ban exists: the front filter of IPv6, which knows /64s only, is not asked.
pub const CIDR_V6: u32 = 1 << 2;
/// At least one IPv6 /128 ban exists.
pub const HOST_V6: u32 = 1 << 3;

/// The program's settings.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// [`crate::SCHEMA`] of the agent that wrote them. A program that finds another passes everything.
    pub schema: u32,
    /// Bit set of [`ENFORCE`], [`CIDR_V4`], [`CIDR_V6`], [`HOST_V6`].
    pub flags: u32,
    /// A packet that a live ban has matched is told of when a hash of its number, of 32 bits, is below this; 0: never.
    pub sample_below: u32,
}

impl Settings {
    /// [`Settings::sample_below`] for one packet in `n`; 0 for none.
    #[must_use]
    pub const fn one_in(n: u32) -> u32 {
        match n {
            0 => 0,
            n => u32::MAX / n,
        }
    }
}

const _: () = assert!(size_of::<Settings>() == 12 && align_of::<Settings>() == 4);
