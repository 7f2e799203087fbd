//! What single clients usually do here, of those that do much: the office that sends most of the traffic, the health check each
//! second, the partner's program. What has been normal of one of them for hours is no anomaly of it.
//!
//! A client's level is its effort a window, averaged over the last hours in which it came. It rises slowly: whoever does twice as
//! much every half hour is ahead of it. Who was here before the agent was, as far as one can tell, has it from the beginning.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::subject::Subject;

/// Clients whose levels are kept; the lowest level gives way, and half of it is gone when its client has not come for a week.
const MAX_CLIENTS: usize = 512;
/// Who does less in a window is none of them, in requests of full effort.
const LEAST: f64 = 15.0;
/// The level comes nearer to what was done in a window by these shares, up and down.
const RISES: f64 = 1.0 / 180.0;
const FALLS: f64 = 1.0 / 600.0;
/// Twice the level is usual, too.
const ROOM: f64 = 2.0;
const WEEK: f64 = 7.0 * 86_400.0;
/// But no client has more than so many times the room of any other.
const MOST: f64 = 16.0;

/// What is kept of one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
struct Level {
    /// Requests of full effort in a window.
    effort: f64,
    /// The second in which it was last seen.
    seen: u64,
}

/// See the module's documentation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Usual {
    clients: BTreeMap<Subject, Level>,
    /// The second in which somebody last took another one's place.
    #[serde(skip)]
    replaced: u64,
}

impl Usual {
    /// What a former run has saved, without values that no run can have written.
    #[must_use]
    pub fn restore(mut self) -> Self {
        self.clients
            .retain(|_, level| level.effort.is_finite() && (0.0..=1e9).contains(&level.effort));
        while self.clients.len() > MAX_CLIENTS {
            self.clients.pop_last();
        }
        self
    }

    /// A client has done so much in a window, and nothing is held against it. `from_the_start`: it was here before anything was
    /// learnt.
    pub fn note(&mut self, client: Subject, effort: f64, from_the_start: bool, second: u64) {
        if let Some(level) = self.clients.get_mut(&client) {
            let share = if effort > level.effort { RISES } else { FALLS };
            level.effort += share * (effort - level.effort);
            if from_the_start {
                level.effort = level.effort.max(effort);
            }
            level.seen = second;
            return;
        }
        if effort < LEAST {
            return;
        }
        if self.clients.len() >= MAX_CLIENTS {
            // To find the lowest takes time, and a crowd of passers-by is to cost little.
            if self.replaced == second {
                return;
            }
            self.replaced = second;
            let now = |level: &Level| {
                let silent = second.saturating_sub(level.seen) as f64;
                level.effort * (-silent / WEEK).exp2()
            };
            let lowest = self.clients.iter();
            let lowest = lowest.min_by(|(_, one), (_, other)| now(one).total_cmp(&now(other)));
            if let Some(lowest) = lowest.map(|(client, _)| *client) {
                self.clients.remove(&lowest);
            }
        }
        let effort = if from_the_start {
            effort
        } else {
            RISES * effort
        };
        let level = Level {
            effort,
            seen: second,
        };
        self.clients.insert(client, level);
    }

    /// What a client has done lately is held against it: so much is no longer usual as that may have taught; and where it is just
    /// that it did too much, half of the rest.
    pub fn unlearn(&mut self, client: Subject, effort: f64, was_too_much: bool) {
        if let Some(level) = self.clients.get_mut(&client) {
            let times = if was_too_much { 0.5 } else { 1.0 };
            level.effort = times * (level.effort - RISES * effort).max(0.0);
        }
    }

    /// Is no client known to do much?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.clients.is_empty()
    }

    /// How many times a cap of so much a window a client may do.
    #[must_use]
    pub fn room(&self, client: Subject, cap: f64) -> f64 {
        let level = self.clients.get(&client).map_or(0.0, |level| level.effort);
        if cap <= 0.0 {
            return 1.0;
        }
        (ROOM * level / cap).clamp(1.0, MOST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(n: u32) -> Subject {
        Subject::of_client(std::net::Ipv4Addr::from(n).into())
    }

    fn after(windows: impl Iterator<Item = f64>) -> f64 {
        let mut usual = Usual::default();
        for (n, effort) in (0..).zip(windows) {
            usual.note(client(1), effort, false, 60 * n);
        }
        usual.room(client(1), 50.0)
    }

    #[test]
    fn what_was_usual_for_hours_has_room_twice_over() {
        assert!(after(std::iter::repeat_n(50.0, 10)) <= 1.0);
        // 1 − e^−1 of it after three hours: 2 × 0.63.
        let hours = after(std::iter::repeat_n(50.0, 180));
        assert!((1.2..1.35).contains(&hours), "{hours}");
        let day = after(std::iter::repeat_n(50.0, 1440));
        assert!((1.99..=2.0).contains(&day), "{day}");
        // A weekend of silence takes nothing away, and a quiet evening little.
        let evening = std::iter::repeat_n(50.0, 600).chain(std::iter::repeat_n(5.0, 120));
        assert!((1.6..1.8).contains(&after(evening)));
        assert_eq!(after(std::iter::repeat_n(5000.0, 1440)), MOST);
    }

    #[test]
    fn a_ramp_is_ahead_of_its_own_past() {
        // Twice as much every five minutes, and every hour: at no time does the level come to half of it.
        for minutes in [5.0, 60.0] {
            let mut usual = Usual::default();
            for n in 0..600_u32 {
                let effort = 20.0 * (f64::from(n) / minutes).exp2();
                usual.note(client(1), effort, false, u64::from(60 * n));
                let room = usual.room(client(1), 51.5);
                assert!(
                    effort < 51.5 || room * 51.5 < effort || room == MOST,
                    "{n} {room}"
                );
            }
        }
    }

    #[test]
    fn being_flagged_again_and_again_makes_nothing_usual() {
        let mut usual = Usual::default();
        usual.note(client(2), 500.0, true, 0);
        for round in 0..100 {
            for who in [client(1), client(2)] {
                (0..9).for_each(|n| usual.note(who, 60.0, false, 600 * round + 60 * n));
                usual.unlearn(who, 9.0 * 60.0, false);
            }
            assert!(usual.room(client(1), 50.0) <= 1.0);
            assert!(round > 5 || usual.room(client(2), 50.0) > 15.0);
        }
    }

    #[test]
    fn who_was_here_first_is_known_at_once() {
        let mut usual = Usual::default();
        usual.note(client(1), 60.0, true, 0);
        assert_eq!(usual.room(client(1), 50.0), 2.4);
        usual.note(client(3), 60.0, true, 0);
        usual.unlearn(client(3), 0.0, true);
        assert_eq!(usual.room(client(3), 50.0), 1.2);
        assert_eq!(usual.room(client(2), 50.0), 1.0);
        assert_eq!(usual.room(client(1), 0.0), 1.0);
    }

    #[test]
    fn it_is_bounded_and_restored_within_bounds() {
        let mut usual = Usual::default();
        usual.note(client(10_000), 60.0, true, 0);
        for n in 0..10_000 {
            usual.note(client(n), 600.0, false, n.into());
        }
        assert_eq!(usual.clients.len(), MAX_CLIENTS);
        assert!(
            usual.room(client(10_000), 50.0) > 2.0,
            "passers-by push out nobody"
        );
        let text = serde_json::to_string(&usual).unwrap();
        let read: Usual = serde_json::from_str(&text).unwrap();
        assert_eq!(read.restore().clients, usual.clients);
        usual
            .clients
            .values_mut()
            .for_each(|level| level.effort = -1.0);
        assert!(usual.restore().clients.is_empty());
    }
}
