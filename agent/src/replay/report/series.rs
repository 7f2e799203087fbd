//! How much the heaviest clients sent over time.

use std::cmp::Reverse;

use foldhash::fast::RandomState;
use indexmap::IndexMap;
use portcullis_engine::Subject;

/// Clients that are kept; when there are more, the lightest go.
const MAX: usize = 2048;
/// Those that stay then.
const KEPT: usize = 512;

/// What one client sent.
#[derive(Clone, Debug, Default)]
pub(super) struct Client {
    /// Requests in all, since it was last forgotten.
    pub(super) requests: u64,
    /// Number of a stretch of time, and the requests in it.
    pub(super) bins: Vec<(u64, u64)>,
}

impl Client {
    fn add(&mut self, place: u64, requests: u64) {
        match self.bins.last_mut() {
            // Lines in disorder are in the newest.
            Some((last, count)) if *last >= place => *count += requests,
            _ => self.bins.push((place, requests)),
        }
    }

    /// Most requests in a stretch of time.
    pub(super) fn peak(&self) -> u64 {
        self.bins.iter().map(|(_, count)| *count).max().unwrap_or(0)
    }
}

/// A bounded number of clients. One that is light for long and heavy later is counted from then on.
#[derive(Debug, Default)]
pub(super) struct Series {
    width: u64,
    clients: IndexMap<Subject, Client, RandomState>,
}

impl Series {
    /// One request, in the stretch of this number; they are so many seconds long.
    pub(super) fn add(&mut self, client: Subject, place: u64, width: u64) {
        if self.width != width {
            let factor = (width / self.width.max(1)).max(1);
            if self.width > 0 {
                self.clients
                    .values_mut()
                    .for_each(|client| widen(client, factor));
            }
            self.width = width;
        }
        let entry = self.clients.entry(client).or_default();
        entry.requests += 1;
        entry.add(place, 1);
        if self.clients.len() > MAX {
            self.clients
                .sort_by_cached_key(|subject, client| (Reverse(client.requests), *subject));
            self.clients.truncate(KEPT);
        }
    }

    /// Those with the highest rates.
    pub(super) fn top(&self, count: usize) -> Vec<(Subject, &Client)> {
        let mut all: Vec<(Subject, &Client)> = self
            .clients
            .iter()
            .map(|(subject, client)| (*subject, client))
            .collect();
        all.sort_by_cached_key(|(subject, client)| (Reverse(client.peak()), *subject));
        all.truncate(count);
        all
    }
}

fn widen(client: &mut Client, factor: u64) {
    for (place, requests) in std::mem::take(&mut client.bins) {
        client.add(place / factor, requests);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(number: u32) -> Subject {
        Subject::of_client(std::net::Ipv4Addr::from_bits(number).into())
    }

    #[test]
    fn the_heavy_ones_stay_among_many_that_come_once() {
        let mut series = Series::default();
        for number in 0..100_000 {
            series.add(client(1_000_000 + number), u64::from(number) / 100, 15);
            if number % 10 == 0 {
                series.add(client(number / 10 % 5), u64::from(number) / 100, 15);
            }
        }
        assert!(series.clients.len() <= MAX);
        let top: Vec<(Subject, u64)> = series
            .top(5)
            .iter()
            .map(|(subject, client)| (*subject, client.requests))
            .collect();
        let expected: Vec<(Subject, u64)> = (0..5).map(|n| (client(n), 2000)).collect();
        assert_eq!(top, expected);
    }

    #[test]
    fn what_was_sent_stays_the_same_when_stretches_widen() {
        let mut series = Series::default();
        for place in [7, 8, 8, 9, 8] {
            series.add(client(1), place, 15);
        }
        series.add(client(2), 3, 60);
        let top = series.top(2);
        assert_eq!(top[0].1.bins, [(1, 1), (2, 4)]);
        assert_eq!((top[0].1.requests, top[0].1.peak()), (5, 4));
    }
}
