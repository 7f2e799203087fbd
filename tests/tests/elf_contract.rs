//! The built kernel object against `portcullis-common`: names and sizes are what both sides believe.

use aya_obj::Object;
use portcullis_common::{ban::Entry, front, names, settings::Settings, stats::Counter};

#[test]
fn maps_and_program_are_what_the_contract_says() {
    let object = Object::parse(portcullis::enforce::xdp::OBJECT).unwrap();
    let programs: Vec<&str> = object.programs.keys().map(String::as_str).collect();
    assert_eq!(programs, [names::PROGRAM]);
    assert_eq!(object.license.to_str(), Ok("Dual MIT/GPL"));
    let entry = size_of::<Entry>();
    for (name, key, value) in [
        (names::BANS_V4, 4, entry),
        (names::BANS_V6, 8, entry),
        (names::BANS_V6_HOST, 16, entry),
        (names::CIDR_V4, 4 + 4, entry),
        (names::CIDR_V6, 4 + 16, entry),
        (names::ALLOW_V4, 4 + 4, 4),
        (names::ALLOW_V6, 4 + 16, 4),
        (names::FRONT_V4, 4, 64),
        (names::FRONT_V6, 4, 64),
        (names::COARSE_V4, 4, 64),
        (names::COARSE_V6, 4, 64),
        (names::ALLOW_FRONT_V4, 4, 64),
        (names::ALLOW_FRONT_V6, 4, 64),
        (names::STATS, 4, 8),
        (names::SAMPLES, 0, 0),
        (names::SETTINGS, 4, size_of::<Settings>()),
    ] {
        let map = object
            .maps
            .get(name)
            .unwrap_or_else(|| panic!("no map {name}"));
        assert_eq!(
            (map.key_size() as usize, map.value_size() as usize),
            (key, value),
            "{name}"
        );
        assert!(name.len() <= 15, "{name} is too long for the kernel");
    }
    assert_eq!(object.maps[names::FRONT_V4].max_entries(), front::LINES);
    assert_eq!(
        object.maps[names::COARSE_V4].max_entries(),
        front::COARSE_LINES
    );
    assert_eq!(
        object.maps[names::ALLOW_FRONT_V4].max_entries(),
        front::ALLOW_LINES
    );
    assert_eq!(
        object.maps[names::STATS].max_entries() as usize,
        Counter::ALL.len()
    );
    // No LRU, which forgets; no fixed hash seed, which invites collisions; preallocated.
    for name in [names::BANS_V4, names::BANS_V6, names::BANS_V6_HOST] {
        assert_eq!(
            (object.maps[name].map_type(), object.maps[name].map_flags()),
            (1, 0),
            "{name}"
        );
    }
}
