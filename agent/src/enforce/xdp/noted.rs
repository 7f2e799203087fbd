//! The subjects that have an entry in the kernel, as far as is known here.

use std::collections::HashSet;

use ipnet::IpNet;
use portcullis_engine::Subject;

/// Whoever is banned chooses the keys, so the hash is seeded at random; it is quick, as there can be a million.
type Set<T> = HashSet<T, foldhash::fast::RandomState>;

/// A set of subjects; the two kinds that there are many of take little room.
#[derive(Debug, Default)]
pub(super) struct Noted {
    addresses_v4: Set<u32>,
    networks_v6: Set<u64>,
    others: Set<Subject>,
}

/// What a subject is in the set.
enum Key {
    AddressV4(u32),
    NetworkV6(u64),
    Other(Subject),
}

impl From<Subject> for Key {
    fn from(subject: Subject) -> Self {
        match subject.net() {
            IpNet::V4(net) if net.prefix_len() == 32 => Self::AddressV4(net.addr().to_bits()),
            IpNet::V6(net) if net.prefix_len() == 64 => Self::NetworkV6(super::upper(net.addr())),
            _ => Self::Other(subject),
        }
    }
}

impl Noted {
    /// Says whether it was not there.
    pub(super) fn insert(&mut self, subject: Subject) -> bool {
        match subject.into() {
            Key::AddressV4(key) => self.addresses_v4.insert(key),
            Key::NetworkV6(key) => self.networks_v6.insert(key),
            Key::Other(key) => self.others.insert(key),
        }
    }

    /// Says whether it was there.
    pub(super) fn remove(&mut self, subject: Subject) -> bool {
        match subject.into() {
            Key::AddressV4(key) => self.addresses_v4.remove(&key),
            Key::NetworkV6(key) => self.networks_v6.remove(&key),
            Key::Other(key) => self.others.remove(&key),
        }
    }

    pub(super) fn contains(&self, subject: Subject) -> bool {
        match subject.into() {
            Key::AddressV4(key) => self.addresses_v4.contains(&key),
            Key::NetworkV6(key) => self.networks_v6.contains(&key),
            Key::Other(key) => self.others.contains(&key),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.addresses_v4.len() + self.networks_v6.len() + self.others.len()
    }
}
