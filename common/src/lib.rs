//! The contract between the XDP program and user space: map layouts, counters and names.
//!
//! Everything here is `repr(C)` without padding and without `bool` (whose invalid bit patterns would be
//! undefined behaviour when read back from a map); sizes are asserted at compile time, and the test
//! `elf_contract` holds the built object against them.
#![no_std]

pub mod ban;
pub mod event;
pub mod front;
pub mod names;
pub mod settings;
pub mod stats;

/// Version of the map layouts. Raised on every incompatible change; it is part of the pin directory's name,
/// so two versions never share a map.
pub const SCHEMA: u32 = 1;

// SAFETY: `repr(C)`, `Copy`, no padding (asserted beside each type), every bit pattern is valid.
#[cfg(feature = "user")]
#[expect(
    unsafe_code,
    reason = "aya's marker for types that may be copied as bytes"
)]
mod pod {
    // SAFETY: see the comment of this module.
    unsafe impl aya::Pod for super::ban::Entry {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::settings::Settings {}
}
