//! The map statics behind small functions.
//!
//! Bans live in preallocated HASH maps: no allocation under load, and no LRU, which would forget bans silently. The
//! kernel's random hash seed stays on: it is what stops collision attacks. Sizes are set by the agent at load.

use core::{
    arch::asm,
    ptr::{addr_of, addr_of_mut},
};

use aya_ebpf::{
    helpers::{bpf_jiffies64, bpf_ktime_get_boot_ns},
    macros::map,
    maps::{Array, HashMap, LpmTrie, PerCpuArray, RingBuf, lpm_trie::Key},
};
use portcullis_common::{
    ban::Entry,
    event::Sample,
    front::{self, Line},
    settings::Settings,
    stats::Counter,
};

use crate::packet::V6;

const DEFAULT_BANS: u32 = 1 << 20;
const PREFIXES: u32 = 1 << 14;
/// Room for 5,000 samples that nobody has read yet; further ones are not told of.
const SAMPLES_BYTES: u32 = 1 << 18;

#[map]
static BANS_V4: HashMap<[u8; 4], Entry> = HashMap::with_max_entries(DEFAULT_BANS, 0);
#[map]
static BANS_V6: HashMap<[u8; 8], Entry> = HashMap::with_max_entries(DEFAULT_BANS, 0);
#[map]
static BANS_V6_HOST: HashMap<[u8; 16], Entry> = HashMap::with_max_entries(PREFIXES, 0);
#[map]
static CIDR_V4: LpmTrie<[u8; 4], Entry> = LpmTrie::with_max_entries(PREFIXES, 0);
#[map]
static CIDR_V6: LpmTrie<[u8; 16], Entry> = LpmTrie::with_max_entries(PREFIXES, 0);
#[map]
static ALLOW_V4: LpmTrie<[u8; 4], u32> = LpmTrie::with_max_entries(PREFIXES, 0);
#[map]
static ALLOW_V6: LpmTrie<[u8; 16], u32> = LpmTrie::with_max_entries(PREFIXES, 0);
#[map]
static FRONT_V4: Array<Line> = Array::with_max_entries(front::LINES, 0);
#[map]
static FRONT_V6: Array<Line> = Array::with_max_entries(front::LINES, 0);
#[map]
static COARSE_V4: Array<Line> = Array::with_max_entries(front::COARSE_LINES, 0);
#[map]
static COARSE_V6: Array<Line> = Array::with_max_entries(front::COARSE_LINES, 0);
#[map]
static ALLOW_FRONT_V4: Array<Line> = Array::with_max_entries(front::ALLOW_LINES, 0);
#[map]
static ALLOW_FRONT_V6: Array<Line> = Array::with_max_entries(front::ALLOW_LINES, 0);
#[map]
static STATS: PerCpuArray<u64> = PerCpuArray::with_max_entries(Counter::COUNT, 0);
#[map]
static CLOCK: PerCpuArray<Now> = PerCpuArray::with_max_entries(1, 0);
#[map]
static SAMPLES: RingBuf = RingBuf::with_byte_size(SAMPLES_BYTES, 0);
#[map]
static SETTINGS: Array<Settings> = Array::with_max_entries(1, 0);

/// Could an IPv4 ban match?
#[inline(always)]
pub fn front_v4(address: [u8; 4]) -> bool {
    let bit = front::bit_v4(u32::from_be_bytes(address));
    front_bit(&COARSE_V4, front::coarse(bit)) && front_bit(&FRONT_V4, bit)
}

/// Could a ban of this /64, or of an address in it, match?
#[inline(always)]
pub fn front_v6(prefix: u64) -> bool {
    let bit = front::bit_v6(prefix);
    front_bit(&COARSE_V6, front::coarse(bit)) && front_bit(&FRONT_V6, bit)
}

#[inline(always)]
fn front_bit(lines: &Array<Line>, bit: u32) -> bool {
    lines
        .get(front::line(bit))
        .is_some_and(|line| line[front::word(bit)] & front::mask(bit) != 0)
}

/// The ban of one IPv4 address.
#[inline(always)]
pub fn ban_v4(address: [u8; 4]) -> Option<*mut Entry> {
    BANS_V4.get_ptr_mut(address)
}

/// The ban of an address's /64.
#[inline(always)]
pub fn ban_v6(address: V6) -> Option<*mut Entry> {
    BANS_V6.get_ptr_mut(address.network)
}

/// The ban of one IPv6 address.
#[inline(always)]
pub fn ban_v6_host(address: V6) -> Option<*mut Entry> {
    BANS_V6_HOST.get_ptr_mut(address.octets())
}

/// The longest IPv4 prefix under a ban, of at most so many bits, that holds the address.
#[inline(always)]
pub fn cidr_v4(address: [u8; 4], length: u32) -> Option<*mut Entry> {
    CIDR_V4
        .get(Key::new(length, address))
        .map(|entry| core::ptr::from_ref(entry).cast_mut())
}

/// The longest IPv6 prefix under a ban, of at most so many bits, that holds the address.
#[inline(always)]
pub fn cidr_v6(address: V6, length: u32) -> Option<*mut Entry> {
    CIDR_V6
        .get(Key::new(length, address.octets()))
        .map(|entry| core::ptr::from_ref(entry).cast_mut())
}

/// Is the address on the allowlist?
#[inline(always)]
pub fn allowed_v4(address: [u8; 4]) -> bool {
    let bit = front::allow_bit_v4(u32::from_be_bytes(address));
    front_bit(&ALLOW_FRONT_V4, bit) && ALLOW_V4.get(Key::new(32, address)).is_some()
}

/// Is the address on the allowlist?
#[inline(always)]
pub fn allowed_v6(address: V6) -> bool {
    let bit = front::allow_bit_v6(address.prefix());
    front_bit(&ALLOW_FRONT_V6, bit) && ALLOW_V6.get(Key::new(128, address.octets())).is_some()
}

/// What the agent has told us to do.
#[inline(always)]
pub fn settings() -> Option<&'static Settings> {
    SETTINGS.get(0)
}

/// End of the ban, in nanoseconds on `CLOCK_BOOTTIME`.
#[inline(always)]
pub fn deadline(entry: *mut Entry) -> u64 {
    // SAFETY: a map value; the kernel recycles a deleted one but does not free it under a running program. The same
    // holds for the three functions below.
    unsafe { addr_of!((*entry).deadline).read_volatile() }
}

/// Flags of the ban.
#[inline(always)]
pub fn flags(entry: *mut Entry) -> u32 {
    // SAFETY: see `deadline`.
    unsafe { addr_of!((*entry).flags).read_volatile() }
}

/// Records that a packet matched.
#[inline(always)]
pub fn hit(entry: *mut Entry, now: Now) {
    // Shared between CPUs, hence atomic; the target has the instruction, but core has no `AtomicU64::fetch_add` for it.
    // SAFETY: see `deadline`; the field is eight bytes and aligned to them.
    unsafe {
        asm!(
            "lock *(u64 *)({hits} + 0) += {one}",
            hits = in(reg) addr_of_mut!((*entry).hits),
            one = in(reg) 1u64,
            options(nostack),
        );
    }
    // SAFETY: see `deadline`; any of several racing CPUs may win.
    unsafe { addr_of_mut!((*entry).last_seen).write_volatile(now.seconds) };
}

/// Is the packet that was counted after so many others one of those that are told of? By multiplicative hashing of its
/// number (Knuth, TAOCP 3, 6.4), which spreads them evenly and costs less than a random number.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "the number wraps")]
pub fn is_sampled(earlier: u64, below: u32) -> bool {
    (earlier as u32).wrapping_mul(0x9E37_79B1) < below
}

/// Tells of a packet, if somebody has read enough of the earlier ones.
#[inline(always)]
pub fn tell(sample: Sample) {
    if let Some(mut entry) = SAMPLES.reserve::<Sample>(0) {
        entry.write(sample);
        entry.submit(0);
    }
}

/// Counts one packet; returns the counter's value before it.
#[inline(always)]
pub fn count(counter: Counter) -> u64 {
    let Some(total) = STATS.get_ptr_mut(counter as u32) else {
        return 1;
    };
    // SAFETY: the slot belongs to this CPU, and a program is not preempted by another run of itself.
    unsafe {
        let earlier = *total;
        *total = earlier + 1;
        earlier
    }
}

/// A reading of `CLOCK_BOOTTIME`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Now {
    /// In nanoseconds.
    pub nanos: u64,
    /// The kernel's tick that it was read in.
    tick: u64,
    /// In whole seconds.
    pub seconds: u32,
    reserved: u32,
}

/// `CLOCK_BOOTTIME`, behind by at most one tick of the kernel (1 to 10 ms), and by as much as the kernel's own count of them is
/// late, as on a virtual machine that is not let run.
///
/// Reading the clock costs more than all else that is done to a banned packet, the number of the tick next to nothing: each
/// CPU reads the clock once a tick.
#[inline(always)]
pub fn now() -> Now {
    // SAFETY: the helper reads a number.
    let tick = unsafe { bpf_jiffies64() };
    let kept = CLOCK.get_ptr_mut(0);
    if let Some(kept) = kept {
        // SAFETY: the slot belongs to this CPU.
        let kept = unsafe { *kept };
        if kept.tick == tick {
            return kept;
        }
    }
    let nanos = clock();
    #[expect(clippy::cast_possible_truncation, reason = "136 years of uptime fit")]
    let seconds = (nanos / 1_000_000_000) as u32;
    let now = Now {
        nanos,
        tick,
        seconds,
        reserved: 0,
    };
    if let Some(kept) = kept {
        // SAFETY: as above.
        unsafe { *kept = now };
    }
    now
}

/// `CLOCK_BOOTTIME` in nanoseconds.
#[inline(always)]
pub fn clock() -> u64 {
    // SAFETY: the helper reads a clock.
    unsafe { bpf_ktime_get_boot_ns() }
}
