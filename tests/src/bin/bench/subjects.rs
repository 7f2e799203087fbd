//! What is measured: the bench's own object, our back end, and xdp-filter.

use std::{env, net::IpAddr, path::Path};

use anyhow::{Context as _, Result};
use aya::{
    Ebpf, EbpfLoader, Pod,
    maps::{HashMap, PerCpuHashMap, PerCpuValues},
    programs::{ProgramFd, Xdp as Program},
    util::nr_cpus,
};
use portcullis::enforce::{
    Change, Enforcer as _, Mode,
    xdp::{Flavour, Options, Xdp},
};
use portcullis_tests::lab::Lab;

use crate::source::Family;

/// Names the bench's object; `cargo xtask bench` sets it.
const OBJECT_ENV: &str = "PORTCULLIS_BENCH_OBJECT";
/// Room for bans, the same for all that can be told.
pub const MAX_BANS: u32 = 2_000_000;
/// An allowlist as an edge host has one: itself, its gateway, name servers, who manages it. None is a source of the walks
/// but by a chance that [`crate::cost`] would notice.
const ALLOW: [&str; 10] = [
    "127.0.0.1/32",
    "198.18.0.1/32",
    "198.18.0.2/32",
    "192.0.2.53/32",
    "192.0.2.54/32",
    "203.0.113.0/28",
    "::1/128",
    "2001:db8::1/128",
    "2001:db8::2/128",
    "2001:db8:53::/64",
];
/// As many as xdp-filter has room for.
pub const XDP_FILTER_MAX: u32 = 10_000;

/// Loads the bench's object, its hash tables with room for so many.
///
/// # Errors
/// When it is not there or the kernel refuses.
pub fn object(max_bans: u32) -> Result<Ebpf> {
    let path = env::var_os(OBJECT_ENV)
        .with_context(|| format!("{OBJECT_ENV} is not set; run `cargo xtask bench`"))?;
    let mut ebpf = EbpfLoader::new()
        .map_max_entries("BARE_V4", max_bans)
        .map_max_entries("BARE_V6", max_bans)
        .load_file(&path)
        .with_context(|| format!("cannot load {}", path.display()))?;
    for (name, program) in ebpf.programs_mut() {
        let program: &mut Program = program.try_into()?;
        program
            .load()
            .with_context(|| format!("cannot load {name}"))?;
    }
    Ok(ebpf)
}

/// A program of an object.
///
/// # Errors
/// When it has none of that name.
pub fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Program> {
    let program = ebpf
        .program_mut(name)
        .with_context(|| format!("the object has no program {name}"))?;
    Ok(program.try_into()?)
}

/// A handle of a loaded program, for a tail call.
///
/// # Errors
/// When there is none of that name.
pub fn handle(ebpf: &mut Ebpf, name: &str) -> Result<ProgramFd> {
    Ok(program(ebpf, name)?.fd()?.try_clone()?)
}

/// Enters the first bans in a bare hash table.
///
/// # Errors
/// When the kernel refuses.
pub fn fill_bare(ebpf: &mut Ebpf, family: Family, bans: u32) -> Result<()> {
    fn fill<K: Pod>(ebpf: &mut Ebpf, name: &str, keys: impl Iterator<Item = K>) -> Result<()> {
        let map = ebpf.map_mut(name).context("the object has no such map")?;
        let mut map: HashMap<_, K, u64> = map.try_into()?;
        for key in keys {
            map.insert(key, 0, 0)?;
        }
        Ok(())
    }
    let addresses = (0..bans).map(|number| family.address(number));
    let v4 = addresses.clone().filter_map(|address| match address {
        IpAddr::V4(address) => Some(address.octets()),
        IpAddr::V6(_) => None,
    });
    let v6 = addresses.filter_map(|address| match address {
        IpAddr::V6(address) => address.octets().first_chunk::<8>().copied(),
        IpAddr::V4(_) => None,
    });
    fill(ebpf, "BARE_V4", v4)?;
    fill(ebpf, "BARE_V6", v6)
}

/// Our back end with an allowlist, on an interface of the calling thread's namespace.
///
/// # Errors
/// When the kernel refuses.
pub fn back_end(lab: &Lab, interface: &str, flavour: Flavour) -> Result<Xdp> {
    let options = Options {
        interfaces: vec![interface.to_owned()],
        pin_dir: lab.pin_dir(),
        max_bans: MAX_BANS,
        sample_one_in: 100,
    };
    let mut xdp = Xdp::open(&options, flavour, Mode::Enforce)?;
    let allow: Vec<_> = ALLOW
        .iter()
        .map(|net| net.parse())
        .collect::<Result<_, _>>()?;
    xdp.set_allowlist(&allow)?;
    Ok(xdp)
}

/// Makes changes that are all expected to be possible.
///
/// # Errors
/// The first that was not.
pub fn apply(xdp: &mut Xdp, changes: &[Change]) -> Result<()> {
    xdp.apply(changes).into_iter().collect()
}

/// Loads xdp-filter as Debian ships it, with the first bans of both families as sources to drop.
///
/// The object is loaded by itself, which is in its favour: `xdp-filter load` would put libxdp's dispatcher before it.
///
/// # Errors
/// When it is not installed or the kernel refuses.
pub fn xdp_filter(lab: &Lab, name: &str, bans: u32) -> Result<Ebpf> {
    // `MAP_FLAG_SRC` in its sources; the upper bits count packets.
    const SOURCE: u64 = 1;
    let path = format!("/usr/lib/{}-linux-gnu/bpf/{name}.o", env::consts::ARCH);
    let pins = lab.dir().join("bpf").join(name);
    std::fs::create_dir(&pins)?;
    let mut ebpf = EbpfLoader::new()
        .default_map_pin_directory(&pins)
        .load_file(Path::new(&path))
        .with_context(|| format!("cannot load {path} (package xdp-tools)"))?;
    program(&mut ebpf, name)?.load()?;
    let value = || PerCpuValues::try_from(vec![SOURCE; nr_cpus().map_err(|(_, error)| error)?]);
    {
        let map = ebpf.map_mut("filter_ipv4").context("no map filter_ipv4")?;
        let mut map: PerCpuHashMap<_, u32, u64> = map.try_into()?;
        for number in 0..bans {
            if let IpAddr::V4(address) = Family::V4.address(number) {
                map.insert(address.to_bits().to_be(), value()?, 0)?;
            }
        }
    }
    let map = ebpf.map_mut("filter_ipv6").context("no map filter_ipv6")?;
    let mut map: PerCpuHashMap<_, [u8; 16], u64> = map.try_into()?;
    for number in 0..bans {
        if let IpAddr::V6(address) = Family::V6.address(number) {
            map.insert(address.octets(), value()?, 0)?;
        }
    }
    Ok(ebpf)
}
