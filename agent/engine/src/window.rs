//! A sliding window: requests and failures of the last so many seconds.

use std::collections::VecDeque;

/// What happened in one second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bucket {
    /// Seconds since the epoch.
    pub second: u64,
    /// Requests answered in it.
    pub requests: u32,
    /// Those of them answered with a status of 400 or above.
    pub errors: u32,
}

/// Requests of the last `length` whole seconds, the running one included. Only seconds with traffic take room, so its
/// size is bounded by its length.
#[derive(Clone, Debug, Default)]
pub struct Window {
    buckets: VecDeque<Bucket>,
    requests: u64,
    errors: u64,
}

impl Window {
    /// Adds one request at `second`, which must lie inside the window that the last [`Window::advance`] has left.
    pub fn add(&mut self, second: u64, error: bool) {
        // Lines arrive almost in order, so the place is at or near the back.
        let place = self
            .buckets
            .iter()
            .rposition(|bucket| bucket.second <= second);
        let index = match place {
            Some(index) if self.buckets[index].second == second => index,
            place => {
                let index = place.map_or(0, |index| index + 1);
                self.buckets.insert(
                    index,
                    Bucket {
                        second,
                        requests: 0,
                        errors: 0,
                    },
                );
                index
            }
        };
        let bucket = &mut self.buckets[index];
        bucket.requests = bucket.requests.saturating_add(1);
        bucket.errors = bucket.errors.saturating_add(u32::from(error));
        self.requests += 1;
        self.errors += u64::from(error);
    }

    /// Takes a client's share back out.
    pub fn subtract(&mut self, other: &Self) {
        for theirs in &other.buckets {
            let Ok(index) = self
                .buckets
                .binary_search_by_key(&theirs.second, |bucket| bucket.second)
            else {
                continue;
            };
            let ours = &mut self.buckets[index];
            let (requests, errors) = (
                theirs.requests.min(ours.requests),
                theirs.errors.min(ours.errors),
            );
            ours.requests -= requests;
            ours.errors -= errors;
            self.requests -= u64::from(requests);
            self.errors -= u64::from(errors);
        }
    }

    /// Moves the window to the seconds `(now - length, now]`; `leave` is given each bucket that falls out, oldest
    /// first. Called with time, not with lines: a silent client's rate falls too.
    pub fn advance(&mut self, now: u64, length: u64, mut leave: impl FnMut(Bucket)) {
        while let Some(bucket) = self
            .buckets
            .front()
            .copied()
            .filter(|bucket| bucket.second + length <= now)
        {
            self.buckets.pop_front();
            self.requests -= u64::from(bucket.requests);
            self.errors -= u64::from(bucket.errors);
            leave(bucket);
        }
    }

    /// Forgets everything, and gives the memory back.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// Requests in the window.
    #[must_use]
    pub const fn requests(&self) -> u64 {
        self.requests
    }

    /// Failed requests in the window.
    #[must_use]
    pub const fn errors(&self) -> u64 {
        self.errors
    }

    /// The newest second with traffic.
    #[must_use]
    pub fn newest(&self) -> Option<u64> {
        self.buckets.back().map(|bucket| bucket.second)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn count(window: &Window) -> (u64, u64) {
        (window.requests(), window.errors())
    }

    #[test]
    fn a_silent_client_loses_its_rate_with_time_alone() {
        let mut window = Window::default();
        (0..30).for_each(|_| window.add(100, true));
        window.advance(159, 60, |_| {});
        assert_eq!(count(&window), (30, 30));
        window.advance(160, 60, |_| {});
        assert_eq!(count(&window), (0, 0));
    }

    proptest! {
        /// Against the definition: a list of all requests, filtered.
        #[test]
        fn counts_are_those_of_the_last_seconds(steps in prop::collection::vec((0u64..5, 0u64..8, any::<bool>()), 1..300)) {
            const LENGTH: u64 = 10;
            let (mut window, mut all, mut now, mut left) = (Window::default(), Vec::new(), 1000, 0);
            for (pass, back, error) in steps {
                now += pass;
                window.advance(now, LENGTH, |bucket| left += bucket.requests as usize);
                window.add(now - back, error);
                all.push((now - back, error));
                let inside = || all.iter().filter(|(second, _)| second + LENGTH > now);
                let expected = (inside().count() as u64, inside().filter(|(_, error)| *error).count() as u64);
                prop_assert_eq!(count(&window), expected);
                prop_assert_eq!(left + inside().count(), all.len());
                prop_assert!(window.buckets.len() as u64 <= LENGTH);
            }
        }

        #[test]
        fn what_is_subtracted_is_as_if_it_had_never_been(requests in prop::collection::vec((0u64..10, any::<bool>(), any::<bool>()), 0..200)) {
            let (mut all, mut theirs, mut others) = (Window::default(), Window::default(), Window::default());
            for (second, error, is_theirs) in requests {
                all.add(second, error);
                if is_theirs { theirs.add(second, error) } else { others.add(second, error) }
            }
            all.subtract(&theirs);
            prop_assert_eq!(count(&all), count(&others));
        }
    }
}
