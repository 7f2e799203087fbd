//! Names of the program and its maps, at most 15 bytes each (the kernel's limit).

/// The XDP program.
pub const PROGRAM: &str = "portcullis";

/// Exact IPv4 bans: `[u8; 4]` (network order) → [`crate::ban::Entry`].
pub const BANS_V4: &str = "BANS_V4";
/// Bans of an IPv6 /64: `[u8; 8]` → [`crate::ban::Entry`].
pub const BANS_V6: &str = "BANS_V6";
/// Bans of one IPv6 address: `[u8; 16]` → [`crate::ban::Entry`].
pub const BANS_V6_HOST: &str = "BANS_V6_HOST";
/// IPv4 CIDR bans: longest prefix match → [`crate::ban::Entry`].
pub const CIDR_V4: &str = "CIDR_V4";
/// IPv6 CIDR bans: longest prefix match → [`crate::ban::Entry`].
pub const CIDR_V6: &str = "CIDR_V6";
/// IPv4 allowlist: longest prefix match → `u32` (unused).
pub const ALLOW_V4: &str = "ALLOW_V4";
/// IPv6 allowlist: longest prefix match → `u32` (unused).
pub const ALLOW_V6: &str = "ALLOW_V6";
/// Fine front filter of IPv4: [`crate::front::LINES`] lines.
pub const FRONT_V4: &str = "FRONT_V4";
/// Fine front filter of IPv6: [`crate::front::LINES`] lines.
pub const FRONT_V6: &str = "FRONT_V6";
/// Coarse front filter of IPv4: [`crate::front::COARSE_LINES`] lines.
pub const COARSE_V4: &str = "COARSE_V4";
/// Coarse front filter of IPv6: [`crate::front::COARSE_LINES`] lines.
pub const COARSE_V6: &str = "COARSE_V6";
/// Front filter of the IPv4 allowlist: [`crate::front::ALLOW_LINES`] lines.
pub const ALLOW_FRONT_V4: &str = "ALLOW_FRONT_V4";
/// Front filter of the IPv6 allowlist: [`crate::front::ALLOW_LINES`] lines.
pub const ALLOW_FRONT_V6: &str = "ALLOW_FRONT_V6";
/// Per-CPU totals by [`crate::stats::Counter`].
pub const STATS: &str = "STATS";
/// Ring buffer of [`crate::event::Sample`].
pub const SAMPLES: &str = "SAMPLES";
/// One [`crate::settings::Settings`].
pub const SETTINGS: &str = "SETTINGS";

/// The maps that are pinned, so that they outlive the agent and are shared by an old program and its replacement. Front
/// filters and settings belong to one load of the program.
pub const PINNED: [&str; 9] = [
    BANS_V4,
    BANS_V6,
    BANS_V6_HOST,
    CIDR_V4,
    CIDR_V6,
    ALLOW_V4,
    ALLOW_V6,
    STATS,
    SAMPLES,
];
