//! What `cargo xtask bench` measures with: programs that vary the source address, and the least that others could do.
//!
//! `mutate_*` write the next source of the walk into the packet and tail-call the program under test; `inject` sends
//! such packets to an interface. The rest are programs under test: nothing at all, and one bare look-up.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]
#![expect(missing_docs, reason = "what the macro `xdp` generates has none")]
#![expect(
    unsafe_code,
    reason = "packet and map memory are raw pointers here; each use says why it is sound"
)]
#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "numbers of the width that the packet or the helper has"
)]
#![expect(
    clippy::needless_pass_by_value,
    reason = "what the macro `xdp` calls them with"
)]

#[path = "bench/walk.rs"]
mod walk;

use core::arch::asm;

use aya_ebpf::{
    bindings::xdp_action::{XDP_ABORTED, XDP_DROP, XDP_PASS},
    helpers::bpf_redirect,
    macros::{map, xdp},
    maps::{Array, HashMap, ProgramArray},
    programs::XdpContext,
};

use walk::Walk;

/// The peers' size; the bench makes ours as large.
const BANS: u32 = 2_000_000;
/// Where the source is: Ethernet's header, and what stands before it in IP's.
const SOURCE_V4: usize = 14 + 12;
const SOURCE_V6: usize = 14 + 8;

#[map]
static WALK: Array<Walk> = Array::with_max_entries(1, 0);
#[map]
static TARGET: ProgramArray = ProgramArray::with_max_entries(1, 0);
#[map]
static BARE_V4: HashMap<[u8; 4], u64> = HashMap::with_max_entries(BANS, 0);
#[map]
static BARE_V6: HashMap<[u8; 8], u64> = HashMap::with_max_entries(BANS, 0);

/// Varies the whole IPv4 source.
#[xdp]
pub fn mutate_v4(ctx: XdpContext) -> u32 {
    let (Some(source), Some(at)) = (step(), at::<4>(&ctx, SOURCE_V4)) else {
        return XDP_ABORTED;
    };
    store_u32(at, (source as u32).to_be());
    tail_call(&ctx)
}

/// Varies the /64 of the IPv6 source.
#[xdp]
pub fn mutate_v6(ctx: XdpContext) -> u32 {
    let (Some(source), Some(at)) = (step(), at::<8>(&ctx, SOURCE_V6)) else {
        return XDP_ABORTED;
    };
    store_u64(at, source.to_be());
    tail_call(&ctx)
}

/// Varies the IPv4 source, keeps the checksum right, and sends the packet.
#[xdp]
pub fn inject(ctx: XdpContext) -> u32 {
    let (Some(source), Some(at)) = (step(), at::<4>(&ctx, SOURCE_V4)) else {
        return XDP_ABORTED;
    };
    let (before, after) = (load_u32(at), (source as u32).to_be());
    // The checksum is the two bytes before the source. RFC 1624, equation 3.
    let Some(At(checksum)) = self::at::<2>(&ctx, SOURCE_V4 - 2) else {
        return XDP_ABORTED;
    };
    let checksum = checksum as *mut u16;
    let halves = |word: u32| u64::from(word & 0xFFFF) + u64::from(word >> 16);
    // SAFETY: an `At` has so many bytes behind it, and Ethernet leaves headers at multiples of two.
    let mut sum = u64::from(unsafe { !*checksum }) + halves(!before) + halves(after);
    sum = (sum & 0xFFFF) + (sum >> 16);
    sum = (sum & 0xFFFF) + (sum >> 16);
    // SAFETY: as above.
    unsafe { *checksum = !(sum as u16) };
    store_u32(at, after);
    let Some(walk) = WALK.get(0) else {
        return XDP_ABORTED;
    };
    // SAFETY: the helper takes two numbers.
    unsafe { bpf_redirect(walk.interface as u32, 0) as u32 }
}

/// Nothing, and the packet passes.
#[xdp]
pub fn pass(_ctx: XdpContext) -> u32 {
    XDP_PASS
}

/// Nothing, and the packet is dropped.
#[xdp]
pub fn drop(_ctx: XdpContext) -> u32 {
    XDP_DROP
}

/// One look-up of the IPv4 source.
#[xdp]
pub fn bare_v4(ctx: XdpContext) -> u32 {
    let Some(at) = at::<4>(&ctx, SOURCE_V4) else {
        return XDP_PASS;
    };
    match BARE_V4.get_ptr(load_u32(at).to_ne_bytes()) {
        Some(_) => XDP_DROP,
        None => XDP_PASS,
    }
}

/// One look-up of the IPv6 source's /64.
#[xdp]
pub fn bare_v6(ctx: XdpContext) -> u32 {
    let Some(at) = at::<8>(&ctx, SOURCE_V6) else {
        return XDP_PASS;
    };
    match BARE_V6.get_ptr(load_u64(at).to_ne_bytes()) {
        Some(_) => XDP_DROP,
        None => XDP_PASS,
    }
}

#[inline(always)]
fn step() -> Option<u64> {
    let walk = WALK.get_ptr_mut(0)?;
    // SAFETY: a map value of that type; the bench runs one program at a time.
    Some(unsafe { (*walk).step() })
}

#[inline(always)]
fn tail_call(ctx: &XdpContext) -> u32 {
    // SAFETY: nothing here needs dropping. It returns only if the slot is empty.
    unsafe { TARGET.tail_call(ctx, 0) };
    XDP_ABORTED
}

/// The address of `N` bytes of the packet.
#[derive(Clone, Copy)]
struct At<const N: usize>(usize);

#[inline(always)]
fn at<const N: usize>(ctx: &XdpContext, offset: usize) -> Option<At<N>> {
    let start = ctx.data() + offset;
    (start + N <= ctx.data_end()).then_some(At(start))
}

// Whole words at addresses that are multiples of two only. Rust would split them, and a load that needs two stores waits
// for both: peers, which read whole words as C programs do, would seem slower than they are.

#[inline(always)]
fn load_u32(At(from): At<4>) -> u32 {
    let word: u64;
    // SAFETY: an `At` has so many bytes behind it.
    unsafe { asm!("{word} = *(u32 *)({from} + 0)", word = out(reg) word, from = in(reg) from) };
    word as u32
}

#[inline(always)]
fn load_u64(At(from): At<8>) -> u64 {
    let word: u64;
    // SAFETY: as above.
    unsafe { asm!("{word} = *(u64 *)({from} + 0)", word = out(reg) word, from = in(reg) from) };
    word
}

#[inline(always)]
fn store_u32(At(to): At<4>, word: u32) {
    // SAFETY: as above.
    unsafe {
        asm!("*(u32 *)({to} + 0) = {word}", word = in(reg) u64::from(word), to = in(reg) to);
    }
}

#[inline(always)]
fn store_u64(At(to): At<8>, word: u64) {
    // SAFETY: as above.
    unsafe { asm!("*(u64 *)({to} + 0) = {word}", word = in(reg) word, to = in(reg) to) };
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

// The helpers that aya-ebpf calls are GPL-only in part.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
