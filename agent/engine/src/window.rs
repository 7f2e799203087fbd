//! A sliding window: requests and failures of the last so many seconds.

use smallvec::SmallVec;

/// What happened in one second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bucket {
    /// Seconds since the epoch; enough until the year 2106.
    pub second: u32,
    /// Requests answered in it.
    pub requests: u32,
    /// Those of them answered with a status of 400 or above.
    pub errors: u32,
    /// Variance of `requests`, where they were estimated from a sample of the lines.
    pub variance: u32,
    /// What they were as effort, in [`crate::caps::UNIT`]s; kept of clients.
    pub effort: u32,
}

/// Requests of the last `length` whole seconds, the running one included. Only seconds with traffic take room, so its
/// size is bounded by its length.
#[derive(Clone, Debug, Default)]
pub struct Window {
    /// In order. Most clients come in few seconds: those lie beside the sums, a cache line away.
    buckets: SmallVec<[Bucket; 4]>,
    requests: u64,
    errors: u64,
    variance: u64,
}

impl Window {
    /// Adds a request at `second`, which must lie inside the window that the last [`Window::advance`] has left. It stands
    /// for `weight` requests (at least 1): of so many lines one was read, at random. The sums are then estimates without
    /// bias, whose variance is the sum of w² − w (Horvitz and Thompson, JASA 1952).
    pub fn add(&mut self, second: u64, error: bool, weight: u32) {
        let second = u32::try_from(second).unwrap_or(u32::MAX);
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
                        variance: 0,
                        effort: 0,
                    },
                );
                index
            }
        };
        let bucket = &mut self.buckets[index];
        let added = |counter: &mut u32, sum: &mut u64, more: u32| {
            let new = counter.saturating_add(more);
            *sum += u64::from(new - *counter);
            *counter = new;
        };
        added(&mut bucket.requests, &mut self.requests, weight);
        if error {
            added(&mut bucket.errors, &mut self.errors, weight);
        }
        if weight > 1 {
            let variance = weight.saturating_mul(weight - 1);
            added(&mut bucket.variance, &mut self.variance, variance);
        }
    }

    /// Says what effort the request was that was last added at `second`.
    pub fn exert(&mut self, second: u64, effort: u32) {
        let bucket = self
            .buckets
            .iter_mut()
            .rfind(|bucket| u64::from(bucket.second) == second);
        if let Some(bucket) = bucket {
            bucket.effort = bucket.effort.saturating_add(effort);
        }
    }

    /// Effort from a second on.
    #[must_use]
    pub fn effort_since(&self, second: u64) -> u64 {
        let newest = self.buckets.iter().rev();
        newest
            .take_while(|bucket| u64::from(bucket.second) >= second)
            .map(|bucket| u64::from(bucket.effort))
            .sum()
    }

    /// Requests in one second.
    #[must_use]
    pub fn at(&self, second: u64) -> u32 {
        let found = self
            .buckets
            .binary_search_by_key(&second, |bucket| bucket.second.into());
        found.map_or(0, |index| self.buckets[index].requests)
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
            let taken = |counter: &mut u32, sum: &mut u64, less: u32| {
                let less = less.min(*counter);
                *counter -= less;
                *sum -= u64::from(less);
            };
            taken(&mut ours.requests, &mut self.requests, theirs.requests);
            taken(&mut ours.errors, &mut self.errors, theirs.errors);
            taken(&mut ours.variance, &mut self.variance, theirs.variance);
        }
    }

    /// Moves the window to the seconds `(now - length, now]`; `leave` is given each bucket that falls out, oldest
    /// first. Called with time, not with lines: a silent client's rate falls too.
    pub fn advance(&mut self, now: u64, length: u64, mut leave: impl FnMut(Bucket)) {
        let is_over = |bucket: &Bucket| u64::from(bucket.second) + length <= now;
        if !self.buckets.first().is_some_and(is_over) {
            return;
        }
        let over = self.buckets.partition_point(is_over);
        for bucket in self.buckets.drain(..over) {
            self.requests -= u64::from(bucket.requests);
            self.errors -= u64::from(bucket.errors);
            self.variance -= u64::from(bucket.variance);
            leave(bucket);
        }
    }

    /// Forgets everything, and gives the memory back.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// Requests in the window; an estimate if lines were sampled.
    #[must_use]
    pub const fn requests(&self) -> u64 {
        self.requests
    }

    /// Failed requests in the window.
    #[must_use]
    pub const fn errors(&self) -> u64 {
        self.errors
    }

    /// Variance of that estimate; 0 if every line was read.
    #[must_use]
    pub const fn variance(&self) -> u64 {
        self.variance
    }

    /// The oldest second with traffic.
    #[must_use]
    pub fn oldest(&self) -> Option<u64> {
        self.buckets.first().map(|bucket| bucket.second.into())
    }

    /// The newest second with traffic.
    #[must_use]
    pub fn newest(&self) -> Option<u64> {
        self.buckets.last().map(|bucket| bucket.second.into())
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
        (0..30).for_each(|_| window.add(100, true, 1));
        window.advance(159, 60, |_| {});
        assert_eq!(count(&window), (30, 30));
        window.advance(160, 60, |_| {});
        assert_eq!(count(&window), (0, 0));
    }

    #[test]
    fn a_sample_is_an_estimate_with_its_variance() {
        let mut window = Window::default();
        (0..10).for_each(|n| window.add(100 + n / 5, n == 0, 8));
        assert_eq!(count(&window), (80, 8));
        assert_eq!(window.variance(), 10 * (64 - 8));
        window.advance(160, 60, |_| {});
        assert_eq!((window.requests(), window.variance()), (40, 5 * 56));
        let theirs = window.clone();
        window.subtract(&theirs);
        assert_eq!((window.requests(), window.variance()), (0, 0));
    }

    #[test]
    fn counts_that_are_full_stay_in_step() {
        let mut window = Window::default();
        (0..3).for_each(|_| window.add(100, true, u32::MAX));
        assert_eq!(count(&window), (u32::MAX.into(), u32::MAX.into()));
        window.advance(160, 60, |_| {});
        assert_eq!((count(&window), window.variance()), ((0, 0), 0));
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
                window.add(now - back, error, 1);
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
                all.add(second, error, 1);
                if is_theirs { theirs.add(second, error, 1) } else { others.add(second, error, 1) }
            }
            all.subtract(&theirs);
            prop_assert_eq!(count(&all), count(&others));
        }
    }
}
