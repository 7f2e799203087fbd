//! Batch system calls, which aya 0.14 does not have: many entries a call. The one file with `unsafe` in the agent.
#![expect(
    unsafe_code,
    reason = "bpf(2) takes addresses; each call says why its own are sound"
)]

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _},
};

use aya::{
    Pod,
    maps::{IterableMap, MapData},
};
use nix::libc;

use crate::enforce::Page;

/// `BPF_MAP_LOOKUP_BATCH`, as in the kernel's `enum bpf_cmd`.
const LOOKUP: libc::c_int = 24;
/// `BPF_MAP_UPDATE_BATCH`.
const UPDATE: libc::c_int = 26;

/// Entries that are read with one call. A bucket that holds more than there is room for is asked for again with more.
const CHUNK: usize = 4096;

/// The part of the kernel's `union bpf_attr` that batch commands use.
#[repr(C)]
#[derive(Default)]
struct Attr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// Writes entries of a hash map or an array, in order; returns how many were written, and what stopped it before the end.
pub(super) fn update<K: Pod, V: Pod>(
    map: &impl IterableMap<K, V>,
    keys: &[K],
    values: &[V],
) -> (usize, Option<io::Error>) {
    let count = keys.len().min(values.len());
    let Ok(wanted) = u32::try_from(count) else {
        return (0, Some(io::ErrorKind::InvalidInput.into()));
    };
    if wanted == 0 {
        return (0, None);
    }
    let mut attr = Attr {
        keys: keys.as_ptr() as u64,
        values: values.as_ptr() as u64,
        count: wanted,
        map_fd: descriptor(map.map()),
        ..Attr::default()
    };
    // SAFETY: both slices hold `count` plain values and outlive the call, which only reads them. aya has seen that the map's
    // sizes are those of `K` and `V`.
    let result = unsafe { bpf(UPDATE, &mut attr) };
    match result {
        Ok(()) => (count, None),
        // The kernel says how many it has done; an error before the first leaves the field as it was.
        Err(error) if attr.count < wanted => (attr.count as usize, Some(error)),
        Err(error) => (0, Some(error)),
    }
}

/// Reads about [`CHUNK`] entries of a hash map, from a bucket on; none is its first. Returns the bucket to go on with, unless
/// that was all. Entries that come or go meanwhile may or may not be among them.
///
/// # Errors
/// What the kernel says.
pub(super) fn read<K: Pod + Default, V: Pod>(
    map: &impl IterableMap<K, V>,
    blank: V,
    from: Option<u32>,
) -> io::Result<Page<(K, V), u32>> {
    let mut chunk = CHUNK;
    let first = from.unwrap_or_default();
    let mut next = 0u32;
    loop {
        let (mut keys, mut values) = (vec![K::default(); chunk], vec![blank; chunk]);
        let mut attr = Attr {
            in_batch: if from.is_some() {
                &raw const first as u64
            } else {
                0
            },
            out_batch: &raw mut next as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: u32::try_from(chunk).unwrap_or(u32::MAX),
            map_fd: descriptor(map.map()),
            ..Attr::default()
        };
        // SAFETY: both vectors hold `count` plain values, for which every bit pattern is valid; they, `first` and `next`
        // outlive the call, and nothing else refers to them. aya has seen that the map's sizes are those of `K` and `V`.
        let result = unsafe { bpf(LOOKUP, &mut attr) };
        let is_last = match result {
            Ok(()) => false,
            Err(error) => match error.raw_os_error() {
                Some(libc::ENOENT) => true,
                Some(libc::ENOSPC) => {
                    chunk *= 2;
                    continue;
                }
                Some(libc::EINTR) => continue,
                _ => return Err(error),
            },
        };
        let entries = keys.into_iter().zip(values).take(attr.count as usize);
        return Ok((entries.collect(), (!is_last).then_some(next)));
    }
}

fn descriptor(map: &MapData) -> u32 {
    // Descriptors of open files are not negative.
    map.fd().as_fd().as_raw_fd().unsigned_abs()
}

/// # Safety
/// The addresses in `attr` must be valid for what `command` does with them.
unsafe fn bpf(command: libc::c_int, attr: &mut Attr) -> io::Result<()> {
    // SAFETY: `attr` is as large as is said; its addresses are the caller's promise.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attr, size_of::<Attr>()) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
