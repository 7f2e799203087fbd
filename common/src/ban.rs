//! A ban as the kernel sees it.

/// Deadline of a ban that does not end by itself.
pub const PERMANENT: u64 = u64::MAX;

/// `Entry::flags`: count packets of this source but let them pass, whatever the global mode.
pub const OBSERVE: u32 = 1;

/// Where the prefix length of a CIDR ban begins in `Entry::flags`. A trie only ever answers with the longest prefix that
/// matches; with its length the program can look behind one that has run out.
pub const PREFIX_SHIFT: u32 = 8;

/// Value of every ban map (exact and CIDR).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// End of the ban in nanoseconds on `CLOCK_BOOTTIME`; [`PERMANENT`] never ends. The kernel checks it, so a
    /// ban ends on time with a dead agent too.
    pub deadline: u64,
    /// Packets matched while the ban was live, dropped or observed.
    pub hits: u64,
    /// Time of the newest such packet, in whole seconds on `CLOCK_BOOTTIME`; 0 when there was none.
    pub last_seen: u32,
    /// Bit set of [`OBSERVE`]; in a CIDR ban also its prefix length, from bit [`PREFIX_SHIFT`] on.
    pub flags: u32,
}

const _: () = assert!(size_of::<Entry>() == Entry::SIZE as usize && align_of::<Entry>() == 8);

impl Entry {
    /// Size in bytes, as the kernel counts it.
    pub const SIZE: u32 = 24;

    /// A fresh entry that nothing has matched yet.
    #[must_use]
    pub const fn new(deadline: u64, flags: u32) -> Self {
        Self {
            deadline,
            hits: 0,
            last_seen: 0,
            flags,
        }
    }
}
