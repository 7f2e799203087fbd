//! A made-up site and the people who visit it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use portcullis_engine::parse::Target;

use super::traffic::{Dice, Popularity, Request, agent, millis, path, sort};

/// How large and how busy a site is.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Requests a second.
    pub rate: f64,
    /// Pages.
    pub pages: usize,
    /// Addresses that visit it again and again.
    pub people: usize,
    /// Galleries opened an hour, with hundreds of pictures each.
    pub galleries: f64,
    /// Do its assets come from elsewhere? Then the log has only pages, and what their scripts ask for.
    pub elsewhere: bool,
}

/// About 0.7 requests a second.
pub const QUIET: Size = Size {
    rate: 0.7,
    pages: 300,
    people: 2_000,
    galleries: 0.0,
    elsewhere: false,
};

/// About 4 requests a second.
pub const BUSY: Size = Size {
    rate: 4.0,
    pages: 5_000,
    people: 10_000,
    galleries: 3.0,
    elsewhere: false,
};

/// About 2 requests a second, none of them for assets.
pub const BARE: Size = Size {
    rate: 2.0,
    pages: 2_000,
    people: 10_000,
    galleries: 0.0,
    elsewhere: true,
};

/// Somebody with a browser.
#[derive(Clone, Copy, Debug)]
pub struct Person {
    /// Their address.
    pub client: IpAddr,
    /// Their browser.
    pub agent: Option<u32>,
    /// They have been here before, and have the common assets.
    pub returns: bool,
}

/// A page and what a browser fetches with it.
#[derive(Clone, Debug)]
struct Page {
    target: Target,
    /// On every page.
    common: usize,
    own: Vec<Target>,
    /// A link on it that is broken.
    broken: Option<Target>,
}

/// A made-up site.
#[derive(Clone, Debug)]
pub struct Site {
    size: Size,
    pages: Vec<Page>,
    popularity: Popularity,
    common: Vec<Target>,
    interfaces: Vec<Target>,
    icons: Vec<Target>,
    gallery: Vec<Target>,
    people: Vec<Person>,
    sessions_a_second: f64,
}

/// Pictures of the galleries.
const PICTURES: usize = 4_000;

impl Site {
    /// Always the same for the same size and seed.
    pub fn new(size: Size, seed: u64) -> Self {
        let mut dice = Dice::new("site", seed);
        let agents: Vec<u32> = (0..40)
            .map(|name| agent(&format!("browser {name}")))
            .collect();
        let agent_popularity = Popularity::zipf(agents.len());
        let mut people: Vec<Person> = (0..size.people)
            .map(|_| Person {
                client: address(&mut dice),
                agent: agents.get(agent_popularity.draw(&mut dice)).copied(),
                returns: dice.chance(0.4),
            })
            .collect();
        people.sort_by_key(|person| person.client);
        people.dedup_by_key(|person| person.client);
        dice.shuffle(&mut people);
        let pages = (0..size.pages)
            .map(|page| {
                let total = 3 + dice.below(10);
                let common = 2 + dice.below(4).min(total - 2);
                Page {
                    target: path(&if page == 0 {
                        "/".to_owned()
                    } else {
                        format!("/page/{page}.html")
                    }),
                    common,
                    own: (common..total)
                        .map(|asset| path(&format!("/img/{page}-{asset}.jpg")))
                        .collect(),
                    broken: (page % 40 == 19).then(|| path(&format!("/img/{page}-gone.png"))),
                }
            })
            .collect();
        let mut site = Self {
            size,
            pages,
            popularity: Popularity::zipf(size.pages),
            common: [
                "/css/main.css",
                "/js/app.js",
                "/js/menu.js",
                "/logo.svg",
                "/font.woff2",
            ]
            .map(path)
            .to_vec(),
            interfaces: ["/api/session", "/api/menu", "/api/prices", "/api/related"]
                .map(path)
                .to_vec(),
            icons: [
                "/favicon.ico",
                "/apple-touch-icon.png",
                "/apple-touch-icon-precomposed.png",
            ]
            .map(path)
            .to_vec(),
            gallery: (0..PICTURES)
                .map(|picture| path(&format!("/gallery/{picture}.webp")))
                .collect(),
            people,
            sessions_a_second: 0.0,
        };
        let mut requests = Vec::new();
        const SAMPLE: usize = 2_000;
        for _ in 0..SAMPLE {
            site.visit(&mut dice, 0, &mut requests);
        }
        // What galleries add is left out of the account: they are few.
        site.sessions_a_second = size.rate * SAMPLE as f64 / requests.len() as f64;
        site
    }

    /// All requests of a stretch of time, in order.
    pub fn traffic(&self, dice: &mut Dice, from: u64, until: u64) -> Vec<Request> {
        let mut all = Vec::new();
        // Who came before it began is still here.
        const BEFORE: u64 = 1_200_000;
        for at in dice.arrivals(self.sessions_a_second, from - BEFORE, until) {
            self.visit(dice, at, &mut all);
        }
        if self.size.galleries > 0.0 {
            for at in dice.arrivals(self.size.galleries / 3600.0, from - BEFORE, until) {
                if let Some(person) = self.person(dice) {
                    self.shop(dice, person, at, &mut all);
                }
            }
        }
        all.retain(|request| (from..until).contains(&request.at));
        sort(&mut all);
        all
    }

    /// One of the regulars; some come much more often than others.
    fn person(&self, dice: &mut Dice) -> Option<Person> {
        let place = dice.share() * dice.share() * self.people.len() as f64;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "below a length"
        )]
        self.people.get(place as usize).copied()
    }

    fn visit(&self, dice: &mut Dice, at: u64, all: &mut Vec<Request>) {
        if let Some(person) = self.person(dice) {
            let landing = self.popularity.draw(dice);
            self.session(dice, person, landing, at, all);
        }
    }

    /// A visit that begins with this page, by its rank.
    pub fn session(
        &self,
        dice: &mut Dice,
        person: Person,
        landing: usize,
        at: u64,
        all: &mut Vec<Request>,
    ) {
        let ask = |at, target, status| Request {
            at,
            client: person.client,
            target,
            status,
            agent: person.agent,
            is_form: false,
        };
        let mut at = at;
        let mut cached = if person.returns { self.common.len() } else { 0 };
        for view in 0..dice.geometric(4.0) {
            let rank = if view == 0 {
                landing
            } else {
                self.popularity.draw(dice)
            };
            let Some(page) = self.pages.get(rank) else {
                return;
            };
            all.push(ask(at, page.target, 200));
            let soon = |dice: &mut Dice| at + 100 + millis(dice.between(0.0, 1.6));
            if self.size.elsewhere {
                for interface in &self.interfaces[..dice.below(self.interfaces.len() + 1)] {
                    all.push(ask(soon(dice), *interface, 200));
                }
            } else {
                for common in self.common.iter().take(page.common).skip(cached) {
                    all.push(ask(soon(dice), *common, 200));
                }
                cached = cached.max(page.common);
                for own in &page.own {
                    // Whoever returns has some of them, and asks whether others are still the same.
                    if !person.returns || dice.chance(0.7) {
                        let is_same = person.returns && dice.chance(0.3);
                        all.push(ask(soon(dice), *own, if is_same { 304 } else { 200 }));
                    }
                }
            }
            if let Some(broken) = page.broken
                && !self.size.elsewhere
            {
                all.push(ask(soon(dice), broken, 404));
            }
            if view == 0 && dice.chance(0.03) {
                for icon in &self.icons[..=dice.below(self.icons.len())] {
                    all.push(ask(soon(dice), *icon, 404));
                }
            }
            at += millis(dice.log_normal(20.0, 1.0).clamp(2.0, 900.0));
        }
    }

    /// The heaviest that a shop's own customers were seen to do: 44 requests in 1 s, 222 in 10 s, 239 in 60 s, 425 in 600 s.
    pub fn shop(&self, dice: &mut Dice, person: Person, at: u64, all: &mut Vec<Request>) {
        // Most do less than the heaviest.
        let much = if dice.chance(0.25) {
            1.0
        } else {
            dice.between(0.4, 1.0)
        };
        let mut picture = dice.below(self.gallery.len());
        for (from, until, count) in [
            (0.0, 1.0, 43.0),
            (1.0, 10.0, 178.0),
            (10.0, 60.0, 17.0),
            (60.0, 600.0, 186.0),
        ] {
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "at most 186"
            )]
            let count = (count * much) as u32;
            for place in 0..count {
                // Evenly, so that no shorter stretch holds more than was seen.
                let share = (f64::from(place) + dice.share()) / f64::from(count);
                picture = (picture + 1) % self.gallery.len();
                let is_page = place % 40 == 0;
                let target = if is_page {
                    self.pages[self.popularity.draw(dice)].target
                } else {
                    self.gallery[picture]
                };
                all.push(Request {
                    at: at + millis(from + (until - from) * share),
                    client: person.client,
                    target,
                    status: 200,
                    agent: person.agent,
                    is_form: false,
                });
            }
        }
    }
}

/// Some address of the internet, none of the reserved ones. As it is in life, some share a prefix with many others.
pub fn address(dice: &mut Dice) -> IpAddr {
    let [kind, block, third, fourth, fifth, sixth, rest @ ..] = dice.bits().to_be_bytes();
    let word = |high: u8, low: u8| u16::from_be_bytes([high, low]);
    let (site, subnet, host) = (
        word(third, fourth),
        word(fifth, sixth),
        u16::from_be_bytes(rest),
    );
    match kind % 20 {
        // A mobile carrier: each customer a /64, thousands of them in a few /48.
        0..3 => Ipv6Addr::new(0x2a02, 0x3000, u16::from(block % 4), subnet, 0, 0, 0, host).into(),
        // Homes: each a /56.
        3..6 => {
            let block = 0x0c00 | u16::from(block % 8);
            Ipv6Addr::new(0x2a01, block, site, subnet & 0xff00, 0, 0, 0, host).into()
        }
        // Offices and universities: neighbours in one /24.
        6 => Ipv4Addr::new(62, 40, block % 20, third).into(),
        _ => Ipv4Addr::new(20 + block % 40, third, fourth, fifth).into(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    fn hours(size: Size, hours: u64) -> Vec<Request> {
        let from = 1_700_000_000_000;
        let mut dice = Dice::new("test", 1);
        Site::new(size, 1).traffic(&mut dice, from, from + hours * 3_600_000)
    }

    #[test]
    fn the_sites_are_as_busy_as_they_are_said_to_be_and_fail_as_little() {
        for (size, length) in [(QUIET, 24), (BUSY, 8), (BARE, 12)] {
            let all = hours(size, length);
            let rate = all.len() as f64 / (length as f64 * 3600.0);
            assert!((rate / size.rate - 1.0).abs() < 0.1, "{rate}");
            assert!(all.is_sorted_by_key(|request| request.at));
            let failed = all.iter().filter(|request| request.status == 404).count();
            let share = failed as f64 / all.len() as f64;
            assert!((0.004..0.008).contains(&share), "{share}");
            let clients: BTreeSet<IpAddr> = all.iter().map(|request| request.client).collect();
            assert!(clients.len() > size.people / 3, "{}", clients.len());
        }
    }

    #[test]
    fn nobody_does_more_than_the_heaviest_customers_were_seen_to_do() {
        let site = Site::new(BUSY, 1);
        let mut dice = Dice::new("test", 2);
        let mut most = BTreeMap::new();
        for _ in 0..200 {
            let mut all = Vec::new();
            let person = site.person(&mut dice).unwrap();
            site.shop(&mut dice, person, 0, &mut all);
            sort(&mut all);
            for window in [1_000, 10_000, 60_000, 600_000] {
                for (place, request) in all.iter().enumerate() {
                    let end = all.partition_point(|later| later.at < request.at + window);
                    let most = most.entry(window).or_insert(0);
                    *most = end.saturating_sub(place).max(*most);
                }
            }
        }
        for (most, seen) in most.into_values().zip([44, 222, 239, 425]) {
            assert!((seen - 1..=seen).contains(&most), "{most}, not {seen}");
        }
    }

    #[test]
    fn nobody_lives_at_an_attackers_address() {
        let mut dice = Dice::new("test", 3);
        for _ in 0..10_000 {
            let text = address(&mut dice).to_string();
            for reserved in [
                "198.18.",
                "198.19.",
                "198.51.100.",
                "203.0.113.",
                "2001:db8:",
            ] {
                assert!(!text.starts_with(reserved), "{text}");
            }
        }
    }
}
