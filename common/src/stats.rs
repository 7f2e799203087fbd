//! Why a packet was dropped or passed, as counters.

/// Index into the per-CPU array `STATS`. A clean packet is not counted: it need not pay for it.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// Dropped: a live ban, enforced.
    Dropped = 0,
    /// Passed, but would have been dropped: a live ban, observed.
    WouldDrop = 1,
    /// Passed: banned, but on the allowlist.
    Allowed = 2,
    /// Passed: the ban is past its deadline and not yet removed.
    Expired = 3,
    /// Passed: too short for the header that it announces, or with the wrong IP version.
    Malformed = 4,
    /// Passed: neither IPv4 nor IPv6 (ARP, LLDP, more than two VLAN tags …).
    NotIp = 5,
    /// Passed: the front filter let it through to the exact look-up, which found nothing.
    Neighbour = 6,
    /// Passed: settings missing or of another schema version.
    Unconfigured = 7,
}

impl Counter {
    /// How many there are.
    pub const COUNT: u32 = 8;

    /// All counters, in index order.
    pub const ALL: [Self; Self::COUNT as usize] = [
        Self::Dropped,
        Self::WouldDrop,
        Self::Allowed,
        Self::Expired,
        Self::Malformed,
        Self::NotIp,
        Self::Neighbour,
        Self::Unconfigured,
    ];

    /// Name in status, metrics and reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Dropped => "dropped",
            Self::WouldDrop => "would_drop",
            Self::Allowed => "allowed",
            Self::Expired => "expired",
            Self::Malformed => "malformed",
            Self::NotIp => "not_ip",
            Self::Neighbour => "neighbour",
            Self::Unconfigured => "unconfigured",
        }
    }
}
