//! The XDP program: drops packets of banned sources in the driver, passes everything else.
//!
//! It fails open: whatever it cannot parse, look up or understand passes and is counted. The one `match` below is
//! the only place where a finding becomes a verdict.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]
#![expect(missing_docs, reason = "what the macro `xdp` generates has none")]
#![expect(
    unsafe_code,
    reason = "packet and map memory are raw pointers here; packet.rs and maps.rs say why each is sound"
)]

mod filter;
mod maps;
mod packet;

use aya_ebpf::{bindings::xdp_action, macros::xdp, programs::XdpContext};
use aya_log_ebpf::warn;
use portcullis_common::stats::Counter;

use crate::filter::{Banned, PassReason};

/// Entry point; its name is `portcullis_common::names::PROGRAM`.
#[xdp]
#[expect(
    clippy::needless_pass_by_value,
    reason = "what the macro calls it with"
)]
pub fn portcullis(ctx: XdpContext) -> u32 {
    match filter::decide(&ctx) {
        Ok(Banned) => xdp_action::XDP_DROP,
        Err(PassReason::Clean | PassReason::Observed) => xdp_action::XDP_PASS,
        Err(PassReason::Counted(counter)) => {
            let earlier = maps::count(counter);
            // Once a CPU: this path must stay as cheap as any other when every packet takes it.
            if counter == Counter::Unconfigured && earlier == 0 {
                warn!(
                    &ctx,
                    "no settings of this program's schema version: passing everything"
                );
            }
            xdp_action::XDP_PASS
        }
    }
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
