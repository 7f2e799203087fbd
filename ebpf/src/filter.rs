//! The decision: is the source of this packet under a live, enforced ban?
//!
//! Ordered so that clean traffic pays for the parse and one bit of the front filter. Only the source address is
//! read, which sits in the fixed header of both families: fragments, extension headers and unknown transports are
//! filtered like everything else.

use aya_ebpf::programs::XdpContext;
use portcullis_common::{
    SCHEMA,
    ban::{Entry, OBSERVE, PREFIX_SHIFT},
    event::Sample,
    settings::{self, Settings},
    stats::Counter,
};

use crate::{
    maps::{self, Now},
    packet::{self, Source},
};

/// The packet's source is banned and the ban is enforced; counted already.
pub struct Banned;

/// Why a packet passes.
#[derive(Clone, Copy)]
pub enum PassReason {
    /// No ban could match.
    Clean,
    /// A ban matched and is not enforced; counted already.
    Observed,
    /// Worth a counter.
    Counted(Counter),
}

impl From<Counter> for PassReason {
    #[inline(always)]
    fn from(counter: Counter) -> Self {
        Self::Counted(counter)
    }
}

/// Decides about one packet.
#[inline(always)]
pub fn decide(ctx: &XdpContext) -> Result<Banned, PassReason> {
    match packet::source(ctx)? {
        Source::V4(address) => {
            if !maps::front_v4(address) {
                return Err(PassReason::Clean);
            }
            let settings = configured()?;
            let now = maps::now();
            let entry = find_v4(address, settings.flags, now)?;
            if maps::allowed_v4(address) {
                return Err(Counter::Allowed.into());
            }
            matched(ctx, entry, now, settings, || packet::mapped(address))
        }
        Source::V6(address) => {
            // A CIDR ban is not in the front filter of IPv6, so its flag is read first.
            let settings = configured()?;
            if settings.flags & settings::CIDR_V6 == 0 && !maps::front_v6(address.prefix()) {
                return Err(PassReason::Clean);
            }
            let now = maps::now();
            let entry = find_v6(address, settings.flags, now)?;
            if maps::allowed_v6(address) {
                return Err(Counter::Allowed.into());
            }
            matched(ctx, entry, now, settings, || address.octets())
        }
    }
}

/// The packet's source is under a live ban: counts it, tells of it now and then, and drops it if that is wanted.
#[inline(always)]
fn matched(
    ctx: &XdpContext,
    entry: *mut Entry,
    now: Now,
    settings: &Settings,
    source: impl FnOnce() -> [u8; 16],
) -> Result<Banned, PassReason> {
    maps::hit(entry, now);
    let observed = settings.flags & settings::ENFORCE == 0 || maps::flags(entry) & OBSERVE != 0;
    let counter = if observed {
        Counter::WouldDrop
    } else {
        Counter::Dropped
    };
    let earlier = maps::count(counter);
    if maps::is_sampled(earlier, settings.sample_below) {
        maps::tell(Sample {
            time: now.nanos,
            source: source(),
            length: packet::length(ctx),
            interface: packet::interface(ctx),
            counter: counter as u32,
            reserved: 0,
        });
    }
    if observed {
        return Err(PassReason::Observed);
    }
    Ok(Banned)
}

#[inline(always)]
fn configured() -> Result<&'static Settings, PassReason> {
    match maps::settings() {
        Some(settings) if settings.schema == SCHEMA => Ok(settings),
        _ => Err(Counter::Unconfigured.into()),
    }
}

/// The most specific live ban. One past its deadline must not hide a live one that covers it.
#[inline(always)]
fn find_v4(address: [u8; 4], flags: u32, now: Now) -> Result<*mut Entry, Counter> {
    match live(maps::ban_v4(address), now, Counter::Neighbour) {
        Err(reason) if flags & settings::CIDR_V4 != 0 => {
            cidr(32, now, reason, |length| maps::cidr_v4(address, length))
        }
        found => found,
    }
}

/// As [`find_v4`]: the single address, then prefixes longer than a /64, the /64, and wider prefixes.
#[inline(always)]
fn find_v6(address: packet::V6, flags: u32, now: Now) -> Result<*mut Entry, Counter> {
    let mut host = Err(Counter::Neighbour);
    if flags & settings::HOST_V6 != 0 {
        host = live(maps::ban_v6_host(address), now, Counter::Neighbour);
    }
    let Err(reason) = host else {
        return host;
    };
    let network = live(maps::ban_v6(address), now, reason);
    if flags & settings::CIDR_V6 == 0 {
        return network;
    }
    let otherwise = network.err().unwrap_or(reason);
    let prefix = cidr(128, now, otherwise, |length| maps::cidr_v6(address, length));
    match (network, prefix) {
        (Ok(_), Ok(prefix)) if length(prefix) > 64 => Ok(prefix),
        (Ok(network), _) => Ok(network),
        (Err(_), prefix) => prefix,
    }
}

/// Prefix length of a CIDR ban.
#[inline(always)]
fn length(entry: *mut Entry) -> u32 {
    (maps::flags(entry) >> PREFIX_SHIFT) & 0xFF
}

/// So many prefixes inside one another may have run out before the agent has removed the first.
const NESTED: u32 = 8;

/// The longest live prefix of at most `longest` bits: past those that have run out, the next longer ones are asked.
#[inline(always)]
fn cidr(
    mut longest: u32,
    now: Now,
    mut otherwise: Counter,
    look_up: impl Fn(u32) -> Option<*mut Entry>,
) -> Result<*mut Entry, Counter> {
    for _ in 0..NESTED {
        let Some(entry) = look_up(longest) else {
            return Err(otherwise);
        };
        match live(Some(entry), now, otherwise) {
            Ok(entry) => return Ok(entry),
            Err(reason) => otherwise = reason,
        }
        let own = length(entry);
        if own == 0 || own > longest {
            return Err(otherwise);
        }
        longest = own - 1;
    }
    Err(otherwise)
}

/// More than a tick of the kernel, and so as a rule more than [`maps::now`] is behind.
const TICK: u64 = 20_000_000;

/// The entry, if it is there and its deadline has not passed; else `otherwise`, or `Expired`. The agent that should
/// have removed it may be late or dead. Nothing is ever deleted in the data path.
#[inline(always)]
fn live(entry: Option<*mut Entry>, now: Now, otherwise: Counter) -> Result<*mut Entry, Counter> {
    let entry = entry.ok_or(otherwise)?;
    let deadline = maps::deadline(entry);
    // The clock itself is asked only close to the end; a permanent ban is never close to it.
    if deadline <= now.nanos + TICK && deadline <= maps::clock() {
        return Err(Counter::Expired);
    }
    Ok(entry)
}
