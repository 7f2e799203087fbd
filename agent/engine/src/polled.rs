//! Paths that visitors ask for again and again when nothing is wrong, since the script of a page does: what is new, how the match
//! stands. When many come at once they ask for these, too.

use std::collections::BTreeMap;

/// Paths that are kept; the one that has kept still the longest gives way.
const MAX_PATHS: usize = 256;
/// So many different clients have to do it, within so many seconds.
const VOICES: usize = 3;
const FORGET_SECS: u64 = 86_400;

#[derive(Clone, Copy, Debug)]
struct Voices {
    clients: [(u32, u64); VOICES],
    newest: u64,
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Polled {
    paths: BTreeMap<u32, Voices>,
}

impl Polled {
    /// A client asks for little else than this path.
    pub fn note(&mut self, path: u32, client: u32, second: u64) {
        if self.paths.len() >= MAX_PATHS && !self.paths.contains_key(&path) {
            let stillest = self.paths.iter().min_by_key(|(_, voices)| voices.newest);
            let Some((stillest, _)) = stillest.map(|(path, voices)| (*path, voices.newest)) else {
                return;
            };
            self.paths.remove(&stillest);
        }
        let voices = self.paths.entry(path).or_insert(Voices {
            clients: [(0, 0); VOICES],
            newest: second,
        });
        voices.newest = voices.newest.max(second);
        let known = voices.clients.iter().position(|(one, _)| *one == client);
        voices.clients[..=known.unwrap_or(VOICES - 1)].rotate_right(1);
        voices.clients[0] = (client, second);
    }

    /// Do visitors ask for it again and again?
    #[must_use]
    pub fn contains(&self, path: u32, second: u64) -> bool {
        let is_recent =
            |(client, at): &(u32, u64)| *client != 0 && second.saturating_sub(*at) < FORGET_SECS;
        let voices = self.paths.get(&path);
        voices.is_some_and(|voices| voices.clients.iter().all(is_recent))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_clients_make_a_path_one_that_is_polled() {
        let mut polled = Polled::default();
        for client in [7, 8, 7, 8] {
            polled.note(1, client, 1000);
            assert!(!polled.contains(1, 1000));
        }
        polled.note(1, 9, 1000);
        assert!(polled.contains(1, 1000) && !polled.contains(2, 1000));
        assert!(polled.contains(1, 87_399) && !polled.contains(1, 87_400));
    }

    #[test]
    fn it_is_bounded_and_the_stillest_path_gives_way() {
        let mut polled = Polled::default();
        (1..=3).for_each(|client| polled.note(0, client, 1000));
        for path in 1..10_000 {
            (1..=3).for_each(|client| polled.note(path, client, 1000 + u64::from(path)));
            polled.note(0, 1, 1000 + u64::from(path));
        }
        assert_eq!(polled.paths.len(), MAX_PATHS);
        let contains = |path| polled.contains(path, 11_000);
        assert!(contains(0) && contains(9_999) && !contains(1));
    }
}
