//! What the program tells of a packet now and then: one in so many that a live ban has matched.

/// One sampled packet.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// When, in nanoseconds on `CLOCK_BOOTTIME`.
    pub time: u64,
    /// Source address; an IPv4 one is mapped (`::ffff:a.b.c.d`).
    pub source: [u8; 16],
    /// Bytes of the frame, as far as they lie in its first buffer.
    pub length: u32,
    /// Index of the interface that it came in by.
    pub interface: u32,
    /// [`crate::stats::Counter`] that it was counted under: dropped or would-drop.
    pub counter: u32,
    /// Always zero; keeps the size a multiple of eight.
    pub reserved: u32,
}

impl Sample {
    /// Size in bytes.
    pub const SIZE: usize = 40;

    /// From the bytes of a ring buffer entry; `None` when it is of another size.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; Self::SIZE] = bytes.try_into().ok()?;
        let word = |at: usize| -> Option<u32> {
            Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
        };
        Some(Self {
            time: u64::from_ne_bytes(bytes.get(..8)?.try_into().ok()?),
            source: bytes.get(8..24)?.try_into().ok()?,
            length: word(24)?,
            interface: word(28)?,
            counter: word(32)?,
            reserved: word(36)?,
        })
    }
}

const _: () = assert!(size_of::<Sample>() == Sample::SIZE && align_of::<Sample>() == 8);
