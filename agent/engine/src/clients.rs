//! The clients whose windows are kept: a bounded table that holds on to the heavy ones.

use std::net::Ipv4Addr;

use indexmap::{IndexMap, map::Entry};
use ipnet::IpNet;

use crate::{
    habits::{Habits, SLICES},
    subject::{Hashing, Subject},
    window::Window,
};

/// What is known of one client.
#[derive(Clone, Debug, Default)]
pub struct Client {
    /// Its requests.
    pub window: Window,
    /// What it does beyond how much, of one that comes more than a few times.
    pub habits: Option<Box<Habits>>,
}

impl Client {
    /// Is there nothing more to know of it? Its window is at `now`.
    fn is_gone(&self, now: u64, length: u64) -> bool {
        let habits = self.habits.as_ref();
        self.window.requests() == 0
            && habits
                .is_none_or(|habits| u64::from(habits.last) + length * u64::from(SLICES) <= now)
    }
}

/// How many clients a full table looks at to find the one that gives way.
const CANDIDATES: usize = 16;

/// Of so many clients one may have habits, which take more room than all the rest; but at least so many in all may.
const HABITS_OF: usize = 4;
const LEAST_HABITS: usize = 1024;

/// How many clients are looked at for silence whenever time passes.
const SWEEP: usize = 512;

/// A table of at most so many clients. When it is full a new client takes the place of the one with the fewest
/// requests among a few; the few are taken in turn, so no client is safe by where it stands, and a heavy one
/// practically always stays. An attacker with many addresses can push out light clients (whose count starts again) but
/// not another attacker.
#[derive(Debug)]
pub struct Clients {
    table: IndexMap<Subject, Client, Hashing>,
    max: usize,
    hand: usize,
    evictions: u64,
    /// How many clients have habits, and may have.
    habits: usize,
    max_habits: usize,
}

impl Clients {
    /// A table for at most `max` clients (at least one).
    #[must_use]
    pub fn new(max: usize) -> Self {
        Self {
            table: IndexMap::default(),
            max: max.max(1),
            hand: 0,
            evictions: 0,
            habits: 0,
            max_habits: (max / HABITS_OF).max(LEAST_HABITS),
        }
    }

    /// Where the client's entry stands now, for [`Clients::touch`] to look there first: asked of several clients before the
    /// first is touched, the memory of all of them is fetched at once.
    #[must_use]
    pub fn place(&self, subject: Subject) -> Option<usize> {
        let (place, _, client) = self.table.get_full(&subject)?;
        // What `touch` looks at, so that it is fetched too: that second never comes.
        (client.window.oldest() != Some(u32::MAX.into())).then_some(place)
    }

    /// The client's entry, moved to `now`, and made if it is new. It may have moved from its place.
    pub fn touch(
        &mut self,
        subject: Subject,
        place: Option<usize>,
        now: u64,
        length: u64,
    ) -> &mut Client {
        let stands = |place: &usize| {
            let entry = self.table.get_index(*place);
            entry.is_some_and(|(there, _)| *there == subject)
        };
        if let Some(place) = place.filter(stands) {
            let client = &mut self.table[place];
            client.window.advance(now, length, |_| {});
            return client;
        }
        if self.table.len() >= self.max && !self.table.contains_key(&subject) {
            self.evict(now, length);
        }
        let client = match self.table.entry(subject) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(Client::default()),
        };
        client.window.advance(now, length, |_| {});
        client
    }

    /// What is known of a client; its window may be at an earlier time.
    #[must_use]
    pub fn get(&self, subject: Subject) -> Option<&Client> {
        self.table.get(&subject)
    }

    /// Gives a client habits, and returns its entry, if it has one. Where as many as may have them do, those of the client with
    /// the fewest requests among a few are dropped; if none of these has fewer, the client has to wait for its next request.
    pub fn give_habits(
        &mut self,
        subject: Subject,
        habits: Box<Habits>,
        now: u64,
        length: u64,
    ) -> Option<&mut Client> {
        let requests = self.table.get(&subject)?.window.requests();
        let is_room = self.habits < self.max_habits || self.drop_habits(requests, now, length);
        let client = self.table.get_mut(&subject)?;
        if is_room && client.habits.is_none() {
            client.habits = Some(habits);
            self.habits += 1;
        }
        Some(client)
    }

    /// How scarce the room for habits is: 0 while half of it is free, up to 5 when all of it is taken.
    #[must_use]
    pub const fn scarcity(&self) -> u32 {
        let eighths = 8 * self.habits / self.max_habits;
        match eighths {
            0..4 => 0,
            4 => 1,
            5 => 2,
            6 => 3,
            7 => 4,
            _ => 5,
        }
    }

    /// Drops the habits of somebody with fewer requests, if there is anybody.
    fn drop_habits(&mut self, requests: u64, now: u64, length: u64) -> bool {
        let mut lightest = None;
        let mut least = requests;
        for _ in 0..CANDIDATES.min(self.table.len()) {
            self.step(self.table.len());
            let Some((_, client)) = self.table.get_index_mut(self.hand) else {
                return false;
            };
            client.window.advance(now, length, |_| {});
            if client.habits.is_some() && client.window.requests() < least {
                least = client.window.requests();
                lightest = Some(self.hand);
            }
            self.hand += 1;
        }
        let client = lightest.and_then(|index| self.table.get_index_mut(index));
        let Some((_, client)) = client else {
            return false;
        };
        client.habits = None;
        self.habits -= 1;
        true
    }

    /// Takes from a client all that is known of it, and leaves its entry.
    pub fn strip(&mut self, subject: Subject) -> Client {
        let client = self.table.get_mut(&subject);
        let client = client.map(std::mem::take).unwrap_or_default();
        self.habits -= usize::from(client.habits.is_some());
        client
    }

    /// Forgets a client.
    pub fn remove(&mut self, subject: Subject) {
        self.strip(subject);
        self.table.swap_remove(&subject);
    }

    /// Forgets some of those that have fallen silent, and gives them to `gone`. Called as time passes.
    pub fn sweep(&mut self, now: u64, length: u64, mut gone: impl FnMut(Subject, &Client)) {
        for _ in 0..SWEEP.min(self.table.len()) {
            self.step(self.table.len());
            let Some((subject, client)) = self.table.get_index_mut(self.hand) else {
                return;
            };
            client.window.advance(now, length, |_| {});
            if client.is_gone(now, length) {
                gone(*subject, client);
                self.habits -= usize::from(client.habits.is_some());
                self.table.swap_remove_index(self.hand);
            } else {
                self.hand += 1;
            }
        }
    }

    fn evict(&mut self, now: u64, length: u64) {
        let mut lightest = None;
        for _ in 0..CANDIDATES.min(self.table.len()) {
            self.step(self.table.len());
            let Some((_, client)) = self.table.get_index_mut(self.hand) else {
                return;
            };
            client.window.advance(now, length, |_| {});
            let requests = client.window.requests();
            if lightest.is_none_or(|(least, _)| requests < least) {
                lightest = Some((requests, self.hand));
            }
            self.hand += 1;
        }
        if let Some((_, index)) = lightest
            && let Some((_, client)) = self.table.swap_remove_index(index)
        {
            self.habits -= usize::from(client.habits.is_some());
            self.evictions += 1;
        }
    }

    /// The hand goes round.
    const fn step(&mut self, len: usize) {
        if self.hand >= len {
            self.hand = 0;
        }
    }

    /// Is anybody known who belongs to a network and is to be spared? Asked seldom: for an IPv6 network all are looked at.
    #[must_use]
    pub fn has_any_in(
        &self,
        prefix: Subject,
        is_spared: impl Fn(Subject, &Client) -> bool,
    ) -> bool {
        let is_known = |host: Ipv4Addr| {
            let subject = Subject::of_client(host.into());
            let client = self.table.get(&subject);
            client.is_some_and(|client| is_spared(subject, client))
        };
        match prefix.net() {
            IpNet::V4(net) if net.prefix_len() >= 24 => (net.network().to_bits()
                ..=net.broadcast().to_bits())
                .any(|bits| is_known(bits.into())),
            _ => self
                .table
                .iter()
                .any(|(subject, client)| prefix.covers(*subject) && is_spared(*subject, client)),
        }
    }

    /// Forgets everybody.
    pub fn clear(&mut self) {
        self.table.clear();
        self.habits = 0;
    }

    /// Clients in the table.
    #[must_use]
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// Is nobody in the table?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    /// How many clients had to give way so far.
    #[must_use]
    pub const fn evictions(&self) -> u64 {
        self.evictions
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subject(n: u32) -> Subject {
        Subject::of_client(Ipv4Addr::from(0x0A00_0000 + n).into())
    }

    #[test]
    fn a_churn_of_light_clients_does_not_push_out_a_heavy_one() {
        let mut clients = Clients::new(64);
        for _ in 0..100 {
            clients
                .touch(subject(0), None, 1000, 60)
                .window
                .add(1000, false, 1);
        }
        for n in 1..10_000 {
            clients
                .touch(subject(n), None, 1000, 60)
                .window
                .add(1000, false, 1);
            assert!(clients.len() <= 64);
        }
        assert_eq!(
            clients.touch(subject(0), None, 1000, 60).window.requests(),
            100
        );
        assert!(clients.evictions() > 9_000);
    }

    #[test]
    fn habits_are_bounded_and_the_lightest_client_loses_them() {
        let mut clients = Clients::new(8192);
        assert_eq!((clients.max_habits, clients.scarcity()), (2048, 0));
        let mut come = |n, requests| {
            for _ in 0..requests {
                clients
                    .touch(subject(n), None, 1000, 60)
                    .window
                    .add(1000, false, 1);
            }
            let given = clients.give_habits(subject(n), Box::default(), 1000, 60);
            (
                given.unwrap().habits.is_some(),
                clients.habits,
                clients.scarcity(),
            )
        };
        assert_eq!(come(0, 100), (true, 1, 0));
        let mut scarcities = std::collections::BTreeSet::new();
        for n in 1..8000 {
            let (_, habits, scarcity) = come(n, 1 + n / 1000);
            assert!(habits <= 2048);
            scarcities.insert(scarcity);
        }
        assert_eq!(
            scarcities.into_iter().collect::<Vec<_>>(),
            [0, 1, 2, 3, 4, 5]
        );
        assert!(clients.get(subject(0)).unwrap().habits.is_some());
        // What goes makes room.
        let with_habits: Vec<u32> = (0..8000)
            .filter(|n| clients.get(subject(*n)).unwrap().habits.is_some())
            .collect();
        assert_eq!(with_habits.len(), clients.habits);
        with_habits[..1000]
            .iter()
            .for_each(|n| clients.remove(subject(*n)));
        assert!(clients.strip(subject(with_habits[1000])).habits.is_some());
        assert_eq!(clients.habits, with_habits.len() - 1001);
        (0..100).for_each(|n| clients.sweep(2000 + n, 60, |_, _| {}));
        assert_eq!((clients.len(), clients.habits), (0, 0));
    }

    #[test]
    fn an_entry_is_found_wherever_it_has_moved() {
        let mut clients = Clients::new(64);
        for n in 0..3 {
            clients
                .touch(subject(n), None, 1000, 60)
                .window
                .add(1000, false, 1);
        }
        let place = clients.place(subject(2));
        clients.remove(subject(0));
        for place in [place, Some(0), Some(99), None] {
            let client = clients.touch(subject(2), place, 1000, 60);
            assert_eq!(client.window.requests(), 1);
        }
        assert_eq!(clients.len(), 2);
    }

    #[test]
    fn the_silent_are_forgotten_in_time() {
        let mut clients = Clients::new(10_000);
        for n in 0..2_000 {
            clients
                .touch(subject(n), None, 1000, 60)
                .window
                .add(1000, false, 1);
        }
        (0..8).for_each(|n| clients.sweep(1030 + n, 60, |_, _| {}));
        assert_eq!(clients.len(), 2_000);
        (0..8).for_each(|n| clients.sweep(1060 + n, 60, |_, _| {}));
        assert!(clients.is_empty());
    }
}
