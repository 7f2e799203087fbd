//! Who is never banned, and why.
//!
//! Several things may say so of the same network; it is on the list while one of them does.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, mem,
    net::IpAddr,
    time::Duration,
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::{command::Allowed, subject::Subject, time::Timestamp};

/// Why a network is on the list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    /// It never comes from outside.
    Loopback,
    /// The configuration names it.
    Configured,
    /// It is a proxy by the configuration.
    Proxy,
    /// It is this to the host: an address of its own, its gateway …
    Host(String),
    /// It is what this name stands for now.
    Name(String),
    /// It is a search engine's crawler of this name: its address leads to the name, and the name to its address.
    Crawler(String),
    /// An operator has put it there.
    Operator(Allowed),
    /// It was seen to bring others' addresses, so that a ban of it would cut off everybody behind it.
    SeenProxy,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Loopback => f.write_str("this host itself"),
            Self::Configured => f.write_str("configured"),
            Self::Proxy => f.write_str("a proxy (source.proxies)"),
            Self::Host(what) => f.write_str(what),
            Self::Name(name) => write!(f, "{name} (bans.allow)"),
            Self::Crawler(name) => write!(f, "a crawler that is what it says, {name}"),
            Self::Operator(allowed) => f.write_str(&allowed.reason),
            Self::SeenProxy => f.write_str("a proxy: Nginx takes its clients' addresses from it"),
        }
    }
}

impl Why {
    /// Is it the same kind of reason?
    fn is_like(&self, other: &Self) -> bool {
        mem::discriminant(self) == mem::discriminant(other)
    }
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Allowlist {
    /// Never without a reason, and never with two of a kind.
    entries: BTreeMap<Subject, Vec<Why>>,
    /// Families and prefix lengths in it, with how many there are of each.
    lengths: BTreeMap<(bool, u8), usize>,
    /// Crawlers, by the time until which they are taken for such.
    crawlers: BTreeSet<(Timestamp, Subject)>,
}

/// How long a crawler is taken for one, in seconds: addresses change hands.
const CRAWLER_SECS: u64 = 86_400;
/// Crawlers at a time; the one that has been known the longest makes room.
const MAX_CRAWLERS: usize = 4096;

impl Allowlist {
    /// Puts a network on the list; another reason of the same kind is replaced. Says whether it was not on it.
    pub fn add(&mut self, net: IpNet, why: Why) -> bool {
        let subject = Subject::of_net(net);
        let is_new = !self.entries.contains_key(&subject);
        let reasons = self.entries.entry(subject).or_default();
        match reasons.iter_mut().find(|other| other.is_like(&why)) {
            Some(other) => *other = why,
            None => reasons.push(why),
        }
        if is_new {
            *self.lengths.entry(kind(subject)).or_insert(0) += 1;
        }
        is_new
    }

    /// Takes reasons away from a network; says whether that has taken it off the list.
    pub fn remove(&mut self, net: IpNet, is_over: impl Fn(&Why) -> bool) -> bool {
        let subject = Subject::of_net(net);
        let Some(reasons) = self.entries.get_mut(&subject) else {
            return false;
        };
        reasons.retain(|why| !is_over(why));
        if !reasons.is_empty() {
            return false;
        }
        self.entries.remove(&subject);
        if let Some(count) = self.lengths.get_mut(&kind(subject)) {
            *count -= 1;
            if *count == 0 {
                self.lengths.remove(&kind(subject));
            }
        }
        true
    }

    /// Puts these in place of everything that is on the list for reasons of some kinds.
    pub fn replace(&mut self, is_of_kind: impl Fn(&Why) -> bool, entries: Vec<(IpNet, Why)>) {
        let of_kind = self.entries.iter();
        let of_kind = of_kind.filter(|(_, reasons)| reasons.iter().any(&is_of_kind));
        let of_kind: Vec<IpNet> = of_kind.map(|(subject, _)| subject.net()).collect();
        for net in of_kind {
            self.remove(net, &is_of_kind);
        }
        for (net, why) in entries {
            self.add(net, why);
        }
    }

    /// Whom the back end is to spare: a proxy that was only seen is spared by the detector alone.
    #[must_use]
    pub fn enforced(&self) -> BTreeSet<Subject> {
        let spared = self.entries.iter();
        let spared = spared.filter(|(_, reasons)| reasons.iter().any(|why| *why != Why::SeenProxy));
        spared.map(|(subject, _)| *subject).collect()
    }

    /// Takes a client for the crawler of that name for a day. Says whether it was not on the list.
    pub fn add_crawler(&mut self, client: Subject, name: String, now: Timestamp) -> bool {
        self.crawlers.retain(|(_, known)| *known != client);
        if self.crawlers.len() >= MAX_CRAWLERS
            && let Some((_, oldest)) = self.crawlers.pop_first()
        {
            self.remove(oldest.net(), is_crawler);
        }
        let until = now + Duration::from_secs(CRAWLER_SECS);
        self.crawlers.insert((until, client));
        self.add(client.net(), Why::Crawler(name))
    }

    /// Nobody is taken for a crawler any longer than is proper. Says whether somebody has gone off the list.
    pub fn expire(&mut self, now: Timestamp) -> bool {
        self.forget_crawlers(|until, _| until <= now)
    }

    /// Crawlers of these names are taken for such no longer. Says whether there were any.
    pub fn forget_named(&mut self, is_meant: impl Fn(&str) -> bool) -> bool {
        self.forget_crawlers(|_, name| is_meant(name))
    }

    fn forget_crawlers(&mut self, is_over: impl Fn(Timestamp, &str) -> bool) -> bool {
        let entries = &self.entries;
        let name = |client: &Subject| {
            let mut reasons = entries.get(client)?.iter();
            reasons.find_map(|why| match why {
                Why::Crawler(name) => Some(name.as_str()),
                _ => None,
            })
        };
        let is_over = |(until, client): &(Timestamp, Subject)| {
            is_over(*until, name(client).unwrap_or_default())
        };
        let over: Vec<_> = self.crawlers.extract_if(.., is_over).collect();
        let gone = over
            .into_iter()
            .filter(|(_, client)| self.remove(client.net(), is_crawler));
        gone.count() > 0
    }

    /// The clock was set by so many milliseconds.
    pub fn shift(&mut self, millis: i64) {
        let crawlers = mem::take(&mut self.crawlers).into_iter();
        let shifted = crawlers.map(|(until, client)| (until.shifted(millis), client));
        self.crawlers = shifted.collect();
    }

    /// The entry that covers a subject, the narrowest of several, and its reasons.
    #[must_use]
    pub fn covering(&self, subject: Subject) -> Option<(IpNet, &[Why])> {
        let lengths = self.lengths.keys().rev();
        let lengths = lengths.filter(|(is_v6, _)| *is_v6 == subject.is_v6());
        lengths
            .filter_map(|(_, length)| subject.widened(*length))
            .find_map(|around| Some((around.net(), self.entries.get(&around)?.as_slice())))
    }

    /// The first entry that is a part of a subject, and its reasons.
    #[must_use]
    pub fn inside(&self, subject: Subject) -> Option<(IpNet, &[Why])> {
        self.all_inside(subject).next()
    }

    /// The entries that are a part of a subject, or all of it.
    pub fn all_inside(&self, subject: Subject) -> impl Iterator<Item = (IpNet, &[Why])> {
        // Networks are in the order of their first addresses, the wider before the narrower.
        let last = Subject::of_net(IpNet::from(last_address(subject)));
        let inside = self.entries.range(subject..=last);
        inside.map(|(subject, reasons)| (subject.net(), reasons.as_slice()))
    }

    /// The entry that shares an address with a subject; one that covers it before one that is a part of it.
    #[must_use]
    pub fn touching(&self, subject: Subject) -> Option<(IpNet, &[Why])> {
        self.covering(subject).or_else(|| self.inside(subject))
    }

    /// All of it, in order.
    pub fn iter(&self) -> impl Iterator<Item = (IpNet, &[Why])> {
        let entries = self.entries.iter();
        entries.map(|(subject, reasons)| (subject.net(), reasons.as_slice()))
    }

    /// What is on it by operators' words.
    pub fn by_operators(&self) -> impl Iterator<Item = (IpNet, &Allowed)> {
        self.iter().filter_map(|(net, reasons)| {
            reasons.iter().find_map(|why| match why {
                Why::Operator(allowed) => Some((net, allowed)),
                _ => None,
            })
        })
    }
}

const fn is_crawler(why: &Why) -> bool {
    matches!(why, Why::Crawler(_))
}

/// Family and prefix length.
fn kind(subject: Subject) -> (bool, u8) {
    (subject.is_v6(), subject.net().prefix_len())
}

fn last_address(subject: Subject) -> IpAddr {
    match subject.net() {
        IpNet::V4(net) => net.broadcast().into(),
        IpNet::V6(net) => net.broadcast().into(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse::<Subject>().unwrap().net()
    }

    fn subject(text: &str) -> Subject {
        text.parse().unwrap()
    }

    #[test]
    fn a_network_is_on_the_list_while_anything_says_so() {
        let mut list = Allowlist::default();
        assert!(list.add(net("192.0.2.0/24"), Why::Configured));
        assert!(!list.add(net("192.0.2.0/24"), Why::Host("its gateway".to_owned())));
        assert!(!list.remove(net("192.0.2.0/24"), |why| *why == Why::Configured));
        assert!(list.covering(subject("192.0.2.7")).is_some());
        assert!(list.remove(net("192.0.2.0/24"), |_| true));
        assert!(list.covering(subject("192.0.2.7")).is_none());
        assert!(list.lengths.is_empty());
    }

    #[test]
    fn what_is_put_in_place_of_a_kind_leaves_the_others_alone() {
        let mut list = Allowlist::default();
        let host = |what: &str| Why::Host(what.to_owned());
        let is_host = |why: &Why| matches!(why, Why::Host(_));
        list.add(net("192.0.2.1"), Why::Configured);
        let first = vec![
            (net("192.0.2.1"), host("its gateway")),
            (net("192.0.2.2"), host("its own")),
        ];
        list.replace(is_host, first);
        let second = vec![
            (net("192.0.2.2"), host("its gateway")),
            (net("192.0.2.3"), host("its own")),
        ];
        list.replace(is_host, second);
        let all: Vec<(IpNet, Vec<Why>)> = list
            .iter()
            .map(|(net, reasons)| (net, reasons.to_vec()))
            .collect();
        let expected = [
            (net("192.0.2.1"), vec![Why::Configured]),
            (net("192.0.2.2"), vec![host("its gateway")]),
            (net("192.0.2.3"), vec![host("its own")]),
        ];
        assert_eq!(all, expected);
        list.replace(is_host, Vec::new());
        assert_eq!(list.enforced(), BTreeSet::from([subject("192.0.2.1")]));
        list.add(net("192.0.2.9"), Why::SeenProxy);
        assert_eq!(list.enforced().len(), 1);
        list.add(net("192.0.2.9"), Why::Configured);
        assert_eq!(list.enforced().len(), 2);
        assert_eq!(list.lengths.values().sum::<usize>(), 2);
    }

    #[test]
    fn crawlers_are_such_for_a_day_and_their_number_is_bounded() {
        let mut list = Allowlist::default();
        let at = Timestamp::from_secs;
        let crawler = |n: u32| Subject::of_client(std::net::Ipv4Addr::from(n).into());
        for n in 1..=4097 {
            list.add_crawler(crawler(n), "crawl.example.net".to_owned(), at(u64::from(n)));
        }
        assert_eq!(list.iter().count(), MAX_CRAWLERS);
        assert!(list.covering(crawler(1)).is_none());
        assert!(!list.expire(at(2 + CRAWLER_SECS - 1)));
        assert!(list.expire(at(2 + CRAWLER_SECS)));
        assert!(list.covering(crawler(2)).is_none());
        // Seen again, it is known for another day.
        list.add_crawler(crawler(3), "crawl.example.net".to_owned(), at(5_000));
        list.expire(at(4_999 + CRAWLER_SECS));
        assert_eq!(list.iter().count(), 1);
        assert!(list.covering(crawler(3)).is_some());
    }

    fn networks() -> impl Strategy<Value = Subject> {
        let v4 = (0_u32..64, 24_u8..=32).prop_map(|(bits, length)| {
            IpNet::new(std::net::Ipv4Addr::from(0xC000_0200 | bits).into(), length)
        });
        let v6 = (0_u128..16, 60_u8..=66).prop_map(|(bits, length)| {
            let address = 0x2001_0db8_u128 << 96 | bits << 63;
            IpNet::new(std::net::Ipv6Addr::from(address).into(), length)
        });
        prop_oneof![v4, v6].prop_map(|net| Subject::of_net(net.unwrap()))
    }

    proptest! {
        /// As if each entry were looked at.
        #[test]
        fn it_answers_as_a_plain_list_does(
            entries in proptest::collection::vec(networks(), 0..12),
            removed in proptest::collection::vec(networks(), 0..6),
            asked in networks(),
        ) {
            let mut list = Allowlist::default();
            for entry in &entries {
                list.add(entry.net(), Why::Configured);
            }
            for entry in &removed {
                list.remove(entry.net(), |_| true);
            }
            let plain: BTreeSet<Subject> = entries
                .into_iter()
                .filter(|entry| !removed.contains(entry))
                .collect();
            let covered = plain.iter().any(|entry| entry.covers(asked));
            prop_assert_eq!(list.covering(asked).is_some(), covered);
            let touched = plain.iter().any(|entry| entry.overlaps(asked));
            prop_assert_eq!(list.touching(asked).is_some(), touched);
            let inside = plain.iter().filter(|entry| asked.covers(**entry)).count();
            prop_assert_eq!(list.all_inside(asked).count(), inside);
        }
    }
}
