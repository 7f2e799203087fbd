//! Who has been here before: clients that came and went, and that nothing was held against.
//!
//! Two Bloom filters of fixed size (Bloom, CACM 1970); when the newer one is full or a day old it takes the place of the older
//! one. So a client is known for a day at least, unless more than two hundred thousand others come meanwhile.

use crate::subject::Subject;

const WORDS: usize = 1 << 15;
const BITS: u64 = (WORDS as u64) * 64;
/// Clients that one filter takes: every tenth stranger or so would pass for a regular then.
const ROOM: usize = 200_000;
const DAY: u64 = 86_400;
/// Multipliers that make bits of a client: odd, and as good as random.
const MIXERS: [u64; 3] = [
    0x9E37_79B9_7F4A_7C15,
    0xC2B2_AE3D_27D4_EB4F,
    0x1656_67B1_9E37_79F9,
];

/// See the module's documentation.
#[derive(Debug)]
pub struct Regulars {
    newer: Vec<u64>,
    older: Vec<u64>,
    count: usize,
    since: u64,
}

impl Default for Regulars {
    fn default() -> Self {
        Self {
            newer: vec![0; WORDS],
            older: vec![0; WORDS],
            count: 0,
            since: 0,
        }
    }
}

impl Regulars {
    /// A client has been here.
    pub fn add(&mut self, client: Subject, now: u64) {
        if self.count >= ROOM || now.abs_diff(self.since) >= DAY {
            std::mem::swap(&mut self.newer, &mut self.older);
            self.newer.fill(0);
            self.count = 0;
            self.since = now;
        }
        if !Self::is_in(&self.newer, client) {
            self.count += 1;
        }
        for (word, bit) in bits(client) {
            self.newer[word] |= bit;
        }
    }

    /// Has it been here?
    #[must_use]
    pub fn contains(&self, client: Subject) -> bool {
        Self::is_in(&self.newer, client) || Self::is_in(&self.older, client)
    }

    fn is_in(words: &[u64], client: Subject) -> bool {
        bits(client)
            .iter()
            .all(|(word, bit)| words[*word] & bit != 0)
    }
}

fn bits(client: Subject) -> [(usize, u64); 3] {
    let key = client.bits();
    MIXERS.map(|mixer| {
        let mixed = (key ^ (key >> 29)).wrapping_mul(mixer);
        let place = (mixed >> 20) % BITS;
        let word = (place / 64) as usize;
        (word, 1 << (place % 64))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(n: u32) -> Subject {
        Subject::of_client(std::net::Ipv4Addr::from(n).into())
    }

    #[test]
    fn who_was_here_is_known_for_a_day_and_strangers_are_strangers() {
        let mut regulars = Regulars::default();
        (0..50_000).for_each(|n| regulars.add(client(n), 1000));
        assert!((0..50_000).all(|n| regulars.contains(client(n))));
        let taken = (100_000..200_000)
            .filter(|n| regulars.contains(client(*n)))
            .count();
        assert!(taken < 1000, "{taken} of 100,000 strangers");
        regulars.add(client(60_000), 1000 + DAY);
        assert!(regulars.contains(client(7)));
        regulars.add(client(60_001), 1000 + 2 * DAY);
        assert!(!regulars.contains(client(7)));
        assert!(regulars.contains(client(60_000)));
    }
}
