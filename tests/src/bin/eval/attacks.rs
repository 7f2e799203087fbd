//! Attacks. They come from addresses that are reserved for examples and benches, where nobody lives.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use portcullis_engine::parse::Target;

use super::{
    background::Scene,
    scenario::{Goal, Play, Scenario},
    traffic::{Dice, Request, agent, millis, path},
};

/// What an attacker asks for.
#[derive(Clone, Copy, Debug)]
enum Aim {
    /// The front page.
    One,
    /// The page that most people ask for.
    Landing,
    /// Pages as popular as they are.
    Known,
    /// Never the same, never heard of, and answered all the same.
    Unknown,
}

impl Aim {
    fn target(self, scene: &Scene<'_>, dice: &mut Dice) -> Target {
        match self {
            Self::One => path("/"),
            Self::Landing => scene.landing,
            Self::Known => scene.page(dice),
            Self::Unknown => path(&format!("/search/{:016x}", dice.bits())),
        }
    }
}

/// All attacks.
pub fn all() -> Vec<Scenario> {
    let mut all = Vec::new();
    for (name, rate, secs, goals) in [
        (
            "20",
            20.0,
            600,
            [Goal::Median(8.0), Goal::Caught(0.99)].as_slice(),
        ),
        ("5", 5.0, 600, &[Goal::Median(30.0), Goal::Caught(0.99)]),
        ("1", 1.0, 1800, &[Goal::Median(600.0), Goal::Caught(0.9)]),
    ] {
        for (suffix, aim) in [
            ("", Aim::One),
            ("-known", Aim::Known),
            ("-unknown", Aim::Unknown),
        ] {
            all.push(single(
                format!("single-{name}{suffix}"),
                rate,
                secs,
                aim,
                goals,
            ));
        }
    }
    all.push(single("20".to_owned(), 20.0, 300, Aim::One, &[]).cold());
    all.push(single("5".to_owned(), 5.0, 300, Aim::One, &[]).cold());
    all.push(Scenario::attack(
        "scanner",
        300,
        &[Goal::Median(10.0)],
        |_, dice, play| {
            let who = Attacker::single(dice);
            let requests = who.flood(2.0, play, dice, |dice| {
                (
                    path(&format!(
                        "/{:x}/admin{}.php",
                        dice.bits() % 999,
                        dice.bits()
                    )),
                    404,
                )
            });
            play.attack(requests);
        },
    ));
    all.extend(guessers());
    all.extend(botnets());
    all.push(ramp());
    all.push(rotating("v6-in-64", |dice| v6(0x7, dice.bits())));
    all.push(rotating("v6-in-56", |dice| {
        v6(0x0700 | dice.bits() & 0xff, dice.bits())
    }));
    all.push(rotating("v6-in-48", |dice| {
        v6(dice.bits() & 0xffff, dice.bits())
    }));
    all.push(neighbours());
    all
}

fn guessers() -> Vec<Scenario> {
    let mut all = Vec::new();
    for (name, sources, rate, is_form, goal) in [
        ("guessing", 1, 0.5, true, Goal::Median(30.0)),
        ("guessing-50", 50, 0.1, true, Goal::Within(120.0, 0.95)),
        ("guessing-basic", 1, 0.5, false, Goal::Median(30.0)),
        (
            "guessing-basic-50",
            50,
            0.1,
            false,
            Goal::Within(120.0, 0.95),
        ),
    ] {
        all.push(Scenario::attack(
            name,
            600,
            &[goal],
            move |_, dice, play| {
                for who in Attacker::many(sources, dice) {
                    let guesses = who.flood(rate, play, dice, guess);
                    play.attack(if is_form { sent(guesses) } else { guesses });
                }
            },
        ));
    }
    all.push(Scenario::attack(
        "guessing-form",
        600,
        &[Goal::Median(30.0)],
        |_, dice, play| {
            let who = Attacker::single(dice);
            let guesses = sent(who.flood(0.5, play, dice, guess));
            // Each time the form is fetched first, for the token in it.
            let forms = guesses.iter().map(|guess| Request {
                at: guess.at - 200,
                status: 200,
                is_form: false,
                ..*guess
            });
            let forms: Vec<_> = forms.collect();
            play.attack(forms);
            play.attack(guesses);
        },
    ));
    all
}

fn botnets() -> Vec<Scenario> {
    let mut all = Vec::new();
    all.push(Scenario::attack(
        "botnet-favicon",
        300,
        &[Goal::Alarm(30.0), Goal::Within(90.0, 0.95)],
        |_, dice, play| {
            for who in Attacker::many(200, dice) {
                let requests = who.flood(0.3, play, dice, |dice| {
                    let is_icon = dice.chance(1.0 / 6.0);
                    (path(if is_icon { "/favicon.ico" } else { "/" }), 200)
                });
                play.attack(requests);
            }
        },
    ));
    for (name, aim, goal) in [
        ("botnet", Aim::One, Goal::Within(60.0, 0.95)),
        ("botnet-landing", Aim::Landing, Goal::Within(60.0, 0.95)),
        ("botnet-known", Aim::Known, Goal::Within(180.0, 0.7)),
        ("botnet-unknown", Aim::Unknown, Goal::Within(180.0, 0.7)),
    ] {
        all.push(Scenario::attack(
            name,
            300,
            &[Goal::Alarm(30.0), goal],
            move |scene, dice, play| {
                for who in Attacker::many(200, dice) {
                    let requests =
                        who.flood(0.3, play, dice, |dice| (aim.target(scene, dice), 200));
                    play.attack(requests);
                }
            },
        ));
    }
    all
}

fn single(name: String, rate: f64, secs: u64, aim: Aim, goals: &[Goal]) -> Scenario {
    Scenario::attack(name, secs, goals, move |scene, dice, play| {
        let who = Attacker::single(dice);
        let requests = who.flood(rate, play, dice, |dice| (aim.target(scene, dice), 200));
        play.attack(requests);
    })
}

/// Somebody with a program.
#[derive(Clone, Copy, Debug)]
struct Attacker {
    client: IpAddr,
    agent: u32,
}

impl Attacker {
    fn single(dice: &mut Dice) -> Self {
        Self {
            client: host(dice.below(254)),
            agent: agent("a program"),
        }
    }

    /// Scattered, each with a browser's name.
    fn many(count: usize, dice: &mut Dice) -> Vec<Self> {
        let first = dice.below(100_000);
        let one = |place: usize| Self {
            client: bot(first + place * 331),
            agent: agent(&format!("browser {}", place % 40)),
        };
        (0..count).map(one).collect()
    }

    /// Asks at random times, as often as `rate` says, for whatever comes up.
    fn flood(
        self,
        rate: f64,
        play: &Play,
        dice: &mut Dice,
        mut what: impl FnMut(&mut Dice) -> (Target, u16),
    ) -> Vec<Request> {
        let times = dice.arrivals(rate, play.from, play.until);
        let ask = |at| {
            let (target, status) = what(dice);
            Request {
                at,
                client: self.client,
                target,
                status,
                agent: Some(self.agent),
                is_form: false,
            }
        };
        times.into_iter().map(ask).collect()
    }
}

/// One of 198.51.100.0/24.
fn host(number: usize) -> IpAddr {
    let [.., last] = number.to_be_bytes();
    Ipv4Addr::new(198, 51, 100, last).into()
}

/// One of 198.18.0.0/15.
fn bot(number: usize) -> IpAddr {
    let [.., high, middle, low] = number.to_be_bytes();
    Ipv4Addr::new(198, 18 + (high & 1), middle, low).into()
}

/// One of `2001:db8::/32`: the rest of a /64's number, and of an address in it.
fn v6(subnet: u64, interface: u64) -> IpAddr {
    let prefix = 0x2001_0db8_0042_0000 | subnet;
    Ipv6Addr::from(u128::from(prefix) << 64 | u128::from(interface)).into()
}

/// A guess at a password; now and then one is right.
fn guess(dice: &mut Dice) -> (Target, u16) {
    let status = if dice.chance(0.97) { 401 } else { 200 };
    (path("/login"), status)
}

/// The same as forms that are sent.
fn sent(mut requests: Vec<Request>) -> Vec<Request> {
    for request in &mut requests {
        request.is_form = true;
    }
    requests
}

/// From 0.05 to 25 requests a second, twice as many every five minutes.
fn ramp() -> Scenario {
    const START: f64 = 0.05;
    const DOUBLES: f64 = 300.0;
    let mut ramp = Scenario::attack("ramp", 2700, &[Goal::Before(5.0)], |_, dice, play| {
        let who = Attacker::single(dice);
        // Expected requests so far, whose inverse is the time at which so many have come.
        let scale = START * DOUBLES / std::f64::consts::LN_2;
        let mut expected = 0.0;
        let mut requests = Vec::new();
        loop {
            expected += dice.exponential();
            let at =
                play.from + millis(DOUBLES * (expected / scale).ln_1p() / std::f64::consts::LN_2);
            if at >= play.until {
                break;
            }
            requests.push(Request {
                at,
                client: who.client,
                target: path("/"),
                status: 200,
                agent: Some(who.agent),
                is_form: false,
            });
        }
        play.attack(requests);
    });
    ramp.rate = Some(|millis| START * (millis as f64 / 1000.0 / DOUBLES).exp2());
    ramp
}

/// Twenty in one /24, and three people who live there too.
fn neighbours() -> Scenario {
    Scenario::attack("v4-in-24", 600, &[], |scene, dice, play| {
        let address = |last| IpAddr::from(Ipv4Addr::new(203, 0, 113, last));
        for last in 10..30 {
            let who = Attacker {
                client: address(last),
                agent: agent("a program"),
            };
            let requests = who.flood(1.0, play, dice, |_| (path("/"), 200));
            play.attack(requests);
        }
        for last in [7, 100, 201] {
            let mut visits = Vec::new();
            for start in dice.arrivals(1.0 / 200.0, play.from - 300_000, play.until) {
                let person = super::site::Person {
                    client: address(last),
                    ..scene.stranger(dice)
                };
                scene.visit(dice, person, false, start, &mut visits);
            }
            play.put(visits);
        }
    })
}

/// Another address for every request.
fn rotating(name: &str, client: fn(&mut Dice) -> IpAddr) -> Scenario {
    let mut rotating = Scenario::attack(name, 300, &[], move |_, dice, play| {
        let who = Attacker::single(dice);
        let mut requests = who.flood(20.0, play, dice, |_| (path("/"), 200));
        for request in &mut requests {
            request.client = client(dice);
        }
        play.attack(requests);
    });
    rotating.is_one = true;
    rotating
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ramp_doubles_every_five_minutes_up_to_25_a_second() {
        let ramp = ramp();
        let rate = ramp.rate.unwrap();
        assert!((rate(0) - 0.05).abs() < 1e-9);
        assert!((rate(2_700_000) - 25.6).abs() < 1e-9);
        let backgrounds = super::super::background::Background::made();
        let scene = backgrounds[0].scene(1);
        let play = ramp.play(&scene, 1);
        let count = |begin: u64, end: u64| {
            let within = |request: &&Request| {
                (play.from + begin * 1000..play.from + end * 1000).contains(&request.at)
            };
            play.injected.iter().filter(within).count() as f64
        };
        // The integral of the rate: 300/ln 2 × (25.6 − 0.05) = 11,058 in all, half of them (5,540) in the last five minutes.
        assert!((count(0, 2700) / 11_058.0 - 1.0).abs() < 0.05);
        assert!((count(2400, 2700) / 5_540.0 - 1.0).abs() < 0.05);
    }

    #[test]
    fn attackers_come_from_reserved_addresses_only() {
        let backgrounds = super::super::background::Background::made();
        let scene = backgrounds[0].scene(3);
        for scenario in all() {
            let play = scenario.play(&scene, 3);
            assert!(!play.attackers.is_empty(), "{}", scenario.name);
            for attacker in &play.attackers {
                let text = attacker.to_string();
                let reserved = [
                    "198.18.",
                    "198.19.",
                    "198.51.100.",
                    "203.0.113.",
                    "2001:db8:",
                ];
                assert!(
                    reserved.iter().any(|prefix| text.starts_with(prefix)),
                    "{}: {text}",
                    scenario.name
                );
            }
        }
    }

    #[test]
    fn sources_are_as_many_and_as_quick_as_they_are_said_to_be() {
        let backgrounds = super::super::background::Background::made();
        let scene = backgrounds[0].scene(2);
        let scenarios = all();
        for (name, sources, rate) in [
            ("single-20", 1, 20.0),
            ("guessing-50", 50, 5.0),
            ("botnet", 200, 60.0),
            ("v6-in-64", 1, 20.0),
            ("v4-in-24", 20, 20.0),
        ] {
            let scenario = scenarios.iter().find(|one| one.name == name).unwrap();
            let play = scenario.play(&scene, 2);
            assert_eq!(play.attackers.len(), sources, "{name}");
            let is_attackers = |request: &&Request| {
                play.attackers
                    .contains(&portcullis_engine::Subject::of_client(request.client))
            };
            let count = play.injected.iter().filter(is_attackers).count() as f64;
            let wanted = rate * scenario.lasts as f64 / 1000.0;
            assert!((count / wanted - 1.0).abs() < 0.06, "{name}: {count}");
        }
    }
}
