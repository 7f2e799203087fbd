//! Whom a count, a ban or an allowance is about.

use std::{
    fmt,
    hash::{Hash, Hasher},
    net::{IpAddr, Ipv6Addr},
    str::FromStr,
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

/// A source of traffic: one IPv4 address, an IPv6 /64 (what one customer gets, so that a fresh address for each
/// request does not help), or any wider or narrower prefix that an operator names.
///
/// Always in canonical form: host bits are zero, and an IPv4-mapped IPv6 address is its IPv4 self.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Subject(IpNet);

/// Prefix length by which IPv6 clients are counted and banned.
pub const CLIENT_V6: u8 = 64;

/// How tables hash subjects: quickly, and seeded at random, as whoever sends requests chooses the keys. No table's order
/// depends on it.
pub(crate) type Hashing = foldhash::fast::RandomState;

/// In as few words as it can be: it is done for every line.
impl Hash for Subject {
    fn hash<H: Hasher>(&self, state: &mut H) {
        match self.0 {
            IpNet::V4(net) => {
                let address = u64::from(u32::from(net.addr()));
                state.write_u64(address << 8 | u64::from(net.prefix_len()));
            }
            IpNet::V6(net) => {
                let [high, low] = [net.addr().to_bits() >> 64, net.addr().to_bits()];
                #[expect(clippy::cast_possible_truncation, reason = "halves of the address")]
                let (high, low) = (high as u64, low as u64);
                state.write_u64(high);
                state.write_u64(low ^ u64::from(net.prefix_len()));
            }
        }
    }
}

impl Subject {
    /// The subject that a client's requests are counted under.
    #[must_use]
    pub fn of_client(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(address) => Self(IpNet::V4(Ipv4Net::from(address))),
            IpAddr::V6(address) => Self(truncated(address, CLIENT_V6)),
        }
    }

    /// A prefix in canonical form.
    #[must_use]
    pub fn of_net(net: IpNet) -> Self {
        match net {
            IpNet::V6(v6) if v6.prefix_len() >= 96 => match v6.addr().to_ipv4_mapped() {
                Some(v4) => Self(
                    Ipv4Net::new(v4, v6.prefix_len() - 96)
                        .map_or(net, IpNet::V4)
                        .trunc(),
                ),
                None => Self(net.trunc()),
            },
            _ => Self(net.trunc()),
        }
    }

    /// The address as a number: all of an IPv4 address, the first 64 bits of an IPv6 one.
    #[must_use]
    pub fn bits(self) -> u64 {
        match self.0 {
            IpNet::V4(net) => net.addr().to_bits().into(),
            IpNet::V6(net) => (net.addr().to_bits() >> 64) as u64,
        }
    }

    /// The prefix.
    #[must_use]
    pub const fn net(self) -> IpNet {
        self.0
    }

    /// Is it IPv6?
    #[must_use]
    pub const fn is_v6(self) -> bool {
        matches!(self.0, IpNet::V6(_))
    }

    /// Is it what a single client is banned as: an IPv4 address or an IPv6 /64?
    #[must_use]
    pub fn is_client(self) -> bool {
        Self::of_client(self.0.addr()) == self
    }

    /// The prefix of this length around it; `None` where that would be narrower, or no prefix length at all.
    #[must_use]
    pub fn widened(self, length: u8) -> Option<Self> {
        if length > self.0.prefix_len() {
            return None;
        }
        let net = IpNet::new(self.0.addr(), length).ok()?;
        Some(Self(net.trunc()))
    }

    /// Is every address of `other` in here?
    #[must_use]
    pub fn covers(self, other: Self) -> bool {
        self.0.contains(&other.0)
    }

    /// Do the two share an address?
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        self.covers(other) || other.covers(self)
    }
}

fn truncated(address: Ipv6Addr, prefix: u8) -> IpNet {
    IpNet::V6(Ipv6Net::new_assert(address, prefix)).trunc()
}

/// An address without its length where that is all of it; a prefix otherwise.
impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.prefix_len() == self.0.max_prefix_len() {
            self.0.addr().fmt(f)
        } else {
            self.0.fmt(f)
        }
    }
}

/// What is wrong with the text of a subject.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is neither an IP address nor a prefix such as 192.0.2.0/24 or 2001:db8::/64")]
pub struct NotASubject(String);

/// An address or a prefix. A single IPv6 address stays one: only clients are widened to their /64.
impl FromStr for Subject {
    type Err = NotASubject;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let net = text
            .parse::<IpAddr>()
            .map(IpNet::from)
            .or_else(|_| text.parse::<IpNet>());
        net.map(Self::of_net)
            .map_err(|_| NotASubject(text.chars().take(64).collect()))
    }
}

impl From<Subject> for String {
    fn from(subject: Subject) -> Self {
        subject.to_string()
    }
}

impl TryFrom<String> for Subject {
    type Error = NotASubject;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(text: &str) -> String {
        Subject::of_client(text.parse().unwrap()).to_string()
    }

    #[test]
    fn a_mapped_address_is_its_ipv4_self() {
        assert_eq!(client("::ffff:192.0.2.1"), "192.0.2.1");
        assert_eq!(
            "::ffff:192.0.2.1".parse::<Subject>().unwrap().to_string(),
            "192.0.2.1"
        );
        assert_eq!(
            "::ffff:192.0.2.0/120"
                .parse::<Subject>()
                .unwrap()
                .to_string(),
            "192.0.2.0/24"
        );
    }

    #[test]
    fn an_ipv6_client_is_its_64() {
        assert_eq!(client("2001:db8:0:7:aaaa::1"), "2001:db8:0:7::/64");
        assert_eq!(client("2001:db8:0:7:bbbb::2"), "2001:db8:0:7::/64");
    }

    #[test]
    fn text_reads_back_and_host_bits_go() {
        for (text, canonical) in [
            ("192.0.2.1", "192.0.2.1"),
            ("192.0.2.77/24", "192.0.2.0/24"),
            ("2001:db8::1", "2001:db8::1"),
            ("2001:db8::1/64", "2001:db8::/64"),
        ] {
            assert_eq!(text.parse::<Subject>().unwrap().to_string(), canonical);
        }
        for text in [
            "",
            "localhost",
            "192.0.2.1/33",
            "192.0.2.256",
            "2001:db8::/129",
            "192.0.2.1 ",
        ] {
            assert!(
                text.parse::<Subject>().is_err(),
                "{text:?} should be refused"
            );
        }
    }
}
