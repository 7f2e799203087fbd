//! What is asked for on this site: which paths several clients find, and which fail even for those who behave.
//!
//! A table of fixed size. Nobody can fill it with words of their own for long: a path that only one client has asked for gives way
//! to any other.

use crate::subject::Subject;

/// A path that nobody has asked for in so many minutes is no longer known.
const FORGET_MINS: u32 = 24 * 60;
/// A path that failed for those who behave stays known as broken for so many minutes.
const BROKEN_MINS: u32 = 60;
/// A path that was first found so many minutes ago is known, whoever found it: a site may have one visitor only.
const OLD_MINS: u32 = 10;
/// Places in the table.
const PLACES: usize = 1 << 16;

#[derive(Clone, Copy, Debug, Default)]
struct Place {
    path: u32,
    /// The minutes when it was first and last found.
    since: u32,
    minute: u32,
    /// Who asked for it first; 0 once a second client has.
    first: u32,
    /// Who behaves and was told that it is not there; and the minute.
    failed: u32,
    failed_minute: u32,
    /// Somebody else was, too.
    is_broken: bool,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Paths {
    places: Vec<Place>,
}

impl Default for Paths {
    fn default() -> Self {
        Self {
            places: vec![Place::default(); PLACES],
        }
    }
}

impl Paths {
    /// Notes that a client has found a path. Says whether somebody else had found it before, or anybody long ago.
    pub fn found(&mut self, path: u32, client: u32, second: u64) -> bool {
        let minute = minute_of(second);
        let place = &mut self.places[path as usize % PLACES];
        if place.path == path && place.minute != 0 && !is_old(place.minute, minute, FORGET_MINS) {
            place.minute = minute;
            if place.first == client {
                return is_old(place.since, minute, OLD_MINS);
            }
            place.first = 0;
            return true;
        }
        let is_known = place.minute != 0 && place.first == 0;
        if !is_known || is_old(place.minute, minute, FORGET_MINS) {
            // That it has failed is known still.
            let before = if place.path == path {
                *place
            } else {
                Place::default()
            };
            *place = Place {
                path,
                since: minute,
                minute,
                first: client,
                ..before
            };
        }
        false
    }

    /// Has somebody else found it within a day?
    #[must_use]
    pub fn is_known(&self, path: u32, client: u32, second: u64) -> bool {
        let place = &self.places[path as usize % PLACES];
        place.path == path
            && place.minute != 0
            && place.first != client
            && !is_old(place.minute, minute_of(second), FORGET_MINS)
    }

    /// Notes that a path failed for a client who behaves.
    pub fn failed(&mut self, path: u32, client: u32, second: u64) {
        let minute = minute_of(second);
        let place = &mut self.places[path as usize % PLACES];
        if place.path != path {
            let is_known = place.minute != 0 && place.first == 0;
            if is_known && !is_old(place.minute, minute, FORGET_MINS) {
                return;
            }
            // Nobody has found it.
            *place = Place {
                path,
                ..Place::default()
            };
        }
        let is_recent = place.failed != 0 && !is_old(place.failed_minute, minute, BROKEN_MINS);
        place.is_broken = is_recent && (place.is_broken || place.failed != client);
        place.failed = client;
        place.failed_minute = minute;
    }

    /// Does it fail for those who behave, too?
    #[must_use]
    pub fn is_broken(&self, path: u32, second: u64) -> bool {
        let place = &self.places[path as usize % PLACES];
        place.path == path
            && place.is_broken
            && !is_old(place.failed_minute, minute_of(second), BROKEN_MINS)
    }
}

/// What stands for a client in the table; never 0.
#[must_use]
pub fn mark(client: Subject) -> u32 {
    let bits = client.bits();
    let mixed = (bits.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) as u32;
    mixed.max(1)
}

fn minute_of(second: u64) -> u32 {
    u32::try_from(second / 60).unwrap_or(u32::MAX).max(1)
}

const fn is_old(minute: u32, now: u32, least: u32) -> bool {
    now.abs_diff(minute) >= least
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_700_000_000;

    #[test]
    fn a_path_is_known_once_somebody_else_has_found_it() {
        let mut paths = Paths::default();
        assert!(!paths.found(7, 1, NOW));
        assert!(!paths.found(7, 1, NOW + 500), "the same one");
        assert!(!paths.is_known(7, 1, NOW) && paths.is_known(7, 2, NOW));
        assert!(paths.found(7, 1, NOW + 640), "the same one, long ago");
        assert!(paths.found(7, 2, NOW));
        assert!(paths.found(7, 1, NOW));
        assert!(paths.is_known(7, 1, NOW) && !paths.is_known(8, 1, NOW));
        // For a day.
        let day = 86_400;
        assert!(paths.found(7, 3, NOW + day - 60));
        assert!(!paths.found(7, 3, NOW + 2 * day));
    }

    #[test]
    fn who_was_told_that_a_path_is_not_there_has_not_found_it() {
        let mut paths = Paths::default();
        paths.failed(7, 1, NOW);
        assert!(!paths.found(7, 2, NOW));
        assert!(paths.found(7, 1, NOW));
    }

    #[test]
    fn a_path_is_broken_once_two_who_behave_have_failed_there_and_for_an_hour() {
        let mut paths = Paths::default();
        paths.failed(7, 1, NOW);
        paths.failed(7, 1, NOW);
        assert!(!paths.is_broken(7, NOW), "one voice");
        // It is found in between.
        paths.found(7, 3, NOW);
        paths.failed(7, 2, NOW);
        assert!(paths.is_broken(7, NOW + 3500));
        assert!(!paths.is_broken(8, NOW));
        assert!(!paths.is_broken(7, NOW + 3700));
        paths.failed(7, 2, NOW + 3700);
        assert!(!paths.is_broken(7, NOW + 3700), "one voice again");
    }

    #[test]
    fn words_of_one_client_s_own_give_way_and_what_two_have_found_does_not() {
        let mut paths = Paths::default();
        let (ours, theirs) = (7, 7 + u32::try_from(PLACES).unwrap());
        paths.found(theirs, 1, NOW);
        paths.found(ours, 2, NOW);
        assert!(paths.found(ours, 3, NOW));
        paths.found(theirs, 1, NOW);
        paths.failed(theirs, 1, NOW);
        assert!(paths.found(ours, 2, NOW));
        assert!(!paths.found(theirs, 4, NOW));
    }
}
