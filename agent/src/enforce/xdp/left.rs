//! What an earlier run has left pinned, read without a program of our own: for a ledger that is lost.

use std::path::Path;

use anyhow::{Context as _, Result};
use aya::{
    maps::{Array, HashMap, LpmTrie, Map, MapData, MapInfo},
    programs::{
        links::{FdLink, PinnedLink},
        loaded_programs,
    },
};
use ipnet::IpNet;
use portcullis_common::{
    ban::Entry as Value,
    names,
    settings::{self, Settings},
};
use portcullis_engine::Subject;

use super::{
    allowed, entry_of, host_v4, host_v6, network_v6, pins::Pins, prefixes_v4, prefixes_v6, some,
};
use crate::{
    enforce::{Left, Mode},
    runtime::clock,
};

/// What is pinned under this folder, by this version's layout of maps; nothing where there is nothing.
///
/// # Errors
/// When a map that is there cannot be read.
pub fn left(pin_dir: &Path) -> Result<Left> {
    let pins = Pins::at(pin_dir);
    let mut values = hash(&pins, names::BANS_V4, host_v4)?;
    values.extend(hash(&pins, names::BANS_V6, network_v6)?);
    values.extend(hash(&pins, names::BANS_V6_HOST, host_v6)?);
    if let Some(map) = pinned(&pins, names::CIDR_V4)? {
        values.extend(prefixes_v4(&Map::LpmTrie(map).try_into()?)?);
    }
    if let Some(map) = pinned(&pins, names::CIDR_V6)? {
        values.extend(prefixes_v6(&Map::LpmTrie(map).try_into()?)?);
    }
    let mut allow = Vec::new();
    if let (Some(v4), Some(v6)) = (
        pinned(&pins, names::ALLOW_V4)?,
        pinned(&pins, names::ALLOW_V6)?,
    ) {
        let v4: LpmTrie<_, _, _> = Map::LpmTrie(v4).try_into()?;
        let v6: LpmTrie<_, _, _> = Map::LpmTrie(v6).try_into()?;
        allow.extend(allowed(&v4, &v6)?);
    }
    let now = clock::boot();
    let bans = values.iter();
    Ok(Left {
        bans: bans
            .map(|(subject, value)| entry_of(*subject, value, now))
            .collect(),
        allow,
        mode: mode(&pins),
        problems: Vec::new(),
    })
}

fn pinned(pins: &Pins, name: &str) -> Result<Option<MapData>> {
    let path = pins.map(name);
    if !path.exists() {
        return Ok(None);
    }
    let map = MapData::from_pin(&path);
    map.map(Some)
        .with_context(|| format!("cannot open the pin {}", path.display()))
}

fn hash<K: aya::Pod + Default>(
    pins: &Pins,
    name: &str,
    net: impl Fn(K) -> Result<IpNet>,
) -> Result<Vec<(Subject, Value)>> {
    let Some(map) = pinned(pins, name)? else {
        return Ok(Vec::new());
    };
    let map: HashMap<_, K, Value> = Map::HashMap(map).try_into()?;
    let (mut all, mut next) = some(&map, None, &net)?;
    while next.is_some() {
        let values;
        (values, next) = some(&map, next, &net)?;
        all.extend(values);
    }
    Ok(all)
}

/// What the program at work does with bans. Its settings are not pinned: they are found among the maps of the program behind
/// a pinned link.
fn mode(pins: &Pins) -> Option<Mode> {
    let link = pins.pinned_links().into_iter().find_map(|pin| {
        let link = FdLink::from(PinnedLink::from_pin(pin).ok()?);
        Some(link.info().ok()?.program_id())
    })?;
    let program = loaded_programs()
        .flatten()
        .find(|program| program.id() == link)?;
    let is_settings = |id: &u32| {
        MapInfo::from_id(*id).is_ok_and(|map| {
            map.name_as_str()
                .is_some_and(|name| name == names::SETTINGS)
        })
    };
    let map = program.map_ids().ok()??.into_iter().find(is_settings)?;
    let map = MapData::from_id(map).ok()?;
    let settings: Array<_, Settings> = Map::Array(map).try_into().ok()?;
    let flags = settings.get(&0, 0).ok()?.flags;
    Some(if flags & settings::ENFORCE == 0 {
        Mode::Observe
    } else {
        Mode::Enforce
    })
}
