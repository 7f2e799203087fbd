//! What looks odd and is nobody's fault: nobody must be banned for it.

use std::net::Ipv4Addr;

use portcullis_engine::parse::TargetKind;

use super::{
    background::{Scene, cut},
    scenario::{Play, Scenario},
    site::Person,
    traffic::{Dice, Request, agent, millis, path},
};

/// All of them.
pub fn all() -> Vec<Scenario> {
    let mut all = vec![
        Scenario::innocent("flash-crowd", 1800, flash_crowd),
        Scenario::innocent("nat-50", 1800, nat),
        Scenario::innocent("nat-50-no-agents", 1800, |scene, dice, play| {
            nat(scene, dice, play);
            for request in play.background.iter_mut().chain(&mut play.injected) {
                request.agent = None;
            }
        }),
    ];
    for (name, rate) in [
        ("crawler-0.2", 0.2),
        ("crawler-0.5", 0.5),
        ("crawler-0.8", 0.8),
    ] {
        all.push(Scenario::innocent(name, 1800, move |scene, dice, play| {
            crawler(scene, rate, dice, play);
        }));
    }
    for (name, gap, page, status) in [
        ("monitor-10s", 10.0, "/", 200),
        ("monitor-60s", 60.0, "/", 200),
        ("feed-60s", 60.0, "/feed.xml", 304),
        ("poller-2s", 2.0, "/api/v1/news", 304),
        ("health-1s", 1.0, "/health", 200),
    ] {
        all.push(Scenario::innocent(name, 9000, move |scene, dice, play| {
            every(gap, page, status, scene, dice, play);
        }));
    }
    all.push(Scenario::innocent("broken-page", 1800, broken_page));
    all.push(Scenario::innocent("iphones", 1800, iphones));
    all.push(Scenario::innocent(
        "mistyped-password",
        900,
        mistyped_password,
    ));
    all.push(Scenario::innocent("expired-token", 1800, expired_token));
    all.push(Scenario::innocent("expired-session", 1800, expired_session));
    all.push(Scenario::innocent("forgotten-tab", 3600, forgotten_tab));
    all.push(Scenario::innocent("live-crowd", 1800, live_crowd));
    for (name, people) in [("office-20", 20), ("office-100", 100)] {
        all.push(Scenario::innocent(name, 9000, move |scene, dice, play| {
            office(people, scene, dice, play);
        }));
    }
    all.push(Scenario::innocent(
        "outage-502",
        900,
        |scene, dice, play| {
            outage(502, 180, scene, dice, play);
        },
    ));
    all.push(Scenario::innocent("all-404", 900, |scene, dice, play| {
        outage(404, 300, scene, dice, play);
    }));
    all.push(Scenario::innocent("nat-50", 1800, nat).cold());
    all.push(
        Scenario::innocent("crawler-0.8", 1800, |scene, dice, play| {
            crawler(scene, 0.8, dice, play);
        })
        .cold(),
    );
    all
}

/// Everybody comes to one page at once, most of them within the first minutes, and many have been here before.
fn flash_crowd(scene: &Scene<'_>, dice: &mut Dice, play: &mut Play) {
    let minutes = dice.between(5.0, 10.0);
    let mut visits = Vec::new();
    for _ in 0..500 {
        // Three of four within the first half of it.
        let after = (dice.exponential() * minutes * 60.0 / 3.0).min(minutes * 60.0);
        let mut person = scene.stranger(dice);
        if dice.chance(0.6)
            && let Some(known) = dice.pick(&scene.seen)
        {
            person.client = *known;
            person.returns = true;
        }
        scene.visit(dice, person, true, play.from + millis(after), &mut visits);
    }
    play.put(visits);
}

/// Fifty people behind one address.
fn nat(scene: &Scene<'_>, dice: &mut Dice, play: &mut Play) {
    let client = Ipv4Addr::new(61, 7, 7, 7).into();
    let mut visits = Vec::new();
    for _ in 0..50 {
        let person = Person {
            client,
            ..scene.stranger(dice)
        };
        // Each comes once or twice in half an hour.
        for start in dice.arrivals(1.0 / 1200.0, play.from, play.until) {
            scene.visit(dice, person, false, start, &mut visits);
        }
    }
    play.put(visits);
}

/// A search engine: first robots.txt, then page after page, each once.
fn crawler(scene: &Scene<'_>, rate: f64, dice: &mut Dice, play: &mut Play) {
    let mut pages = scene.all_pages(dice).into_iter();
    let times = dice.arrivals(rate, play.from, play.until);
    let requests: Vec<Request> = times
        .into_iter()
        .enumerate()
        .map(|(count, at)| {
            let target = if count == 0 {
                path("/robots.txt")
            } else {
                // What nobody has asked for lately is crawled, too.
                pages
                    .next()
                    .unwrap_or_else(|| path(&format!("/archive/{count}.html")))
            };
            Request {
                at,
                client: Ipv4Addr::new(66, 249, 66, 1).into(),
                target,
                status: if dice.chance(0.01) { 404 } else { 200 },
                agent: Some(agent("a search engine")),
                is_form: false,
            }
        })
        .collect();
    play.put(requests);
}

/// A program that asks for one path again and again.
fn every(gap: f64, page: &str, status: u16, scene: &Scene<'_>, dice: &mut Dice, play: &mut Play) {
    let who = scene.stranger(dice);
    let mut at = play.from as f64 / 1000.0;
    // It was there before.
    if let Some(first) = play.background.first() {
        at -= ((play.from - first.at) as f64 / 1000.0 / gap).floor() * gap;
    }
    let mut requests = Vec::new();
    while millis(at) < play.until {
        requests.push(Request {
            at: millis(at + dice.between(0.0, 0.2)),
            client: who.client,
            target: path(page),
            status: if dice.chance(0.05) { 200 } else { status },
            agent: Some(agent(page)),
            is_form: false,
        });
        at += gap;
    }
    play.put(requests);
}

/// After a bad deploy the most popular page lacks twelve assets, for everybody.
fn broken_page(scene: &Scene<'_>, dice: &mut Dice, play: &mut Play) {
    let missing: Vec<_> = (0..12)
        .map(|asset| path(&format!("/assets/new-{asset}.js")))
        .collect();
    let views = cut(&play.background, play.from, play.until)
        .iter()
        .filter(|request| request.target == scene.landing);
    let mut requests = Vec::new();
    for view in views {
        for target in &missing {
            requests.push(Request {
                at: view.at + 100 + millis(dice.between(0.0, 1.5)),
                target: *target,
                status: 404,
                ..*view
            });
        }
    }
    play.put(requests);
}

/// Twenty iPhones, each of which asks for icons that are not there.
fn iphones(scene: &Scene<'_>, dice: &mut Dice, play: &mut Play) {
    const ICONS: [&str; 6] = [
        "/apple-touch-icon-120x120-precomposed.png",
        "/apple-touch-icon-120x120.png",
        "/apple-touch-icon-precomposed.png",
        "/apple-touch-icon.png",
        "/apple-touch-icon-152x152-precomposed.png",
        "/apple-touch-icon-152x152.png",
    ];
    let mut requests = Vec::new();
    for _ in 0..20 {
        let person = scene.stranger(dice);
        let start = play.from + millis(dice.between(0.0, 900.0));
        scene.visit(dice, person, false, start, &mut requests);
        for icon in ICONS {
            requests.push(Request {
                at: start + 300 + millis(dice.between(0.0, 1.5)),
                client: person.client,
                target: path(icon),
                status: 404,
                agent: person.agent,
                is_form: false,
            });
        }
    }
    play.put(requests);
}

/// Ten people who type their password wrong four times, then right.
fn mistyped_password(scene: &Scene<'_>, dice: &mut Dice, play: &mut Play) {
    let mut requests = Vec::new();
    for _ in 0..10 {
        let person = scene.stranger(dice);
        let mut at = play.from + millis(dice.between(0.0, 300.0));
        for status in [401, 401, 401, 401, 200] {
            requests.push(Request {
                at,
                client: person.client,
                target: path("/login"),
                status,
                agent: person.agent,
                is_form: true,
            });
            at += millis(dice.between(4.0, 15.0));
        }
        scene.visit(dice, person, false, at, &mut requests);
    }
    play.put(requests);
}

/// Five phones with an app whose token has run out: told so ten times, half a minute apart, then logged in again.
fn expired_token(scene: &Scene<'_>, dice: &mut Dice, play: &mut Play) {
    let mut requests = Vec::new();
    for _ in 0..5 {
        let person = scene.stranger(dice);
        let start = play.from + millis(dice.between(0.0, 300.0));
        for count in 0..40 {
            let (page, status) = match count {
                0..10 => ("/api/v1/inbox", 401),
                10 => ("/api/v1/token", 200),
                _ => ("/api/v1/inbox", 200),
            };
            requests.push(Request {
                at: start + count * 30_000 + millis(dice.between(0.0, 0.5)),
                client: person.client,
                target: path(page),
                status,
                agent: Some(agent("an app")),
                is_form: false,
            });
        }
    }
    play.put(requests);
}

/// Ten people whose session has run out: the page's scripts are refused all at once, try again three times, and a form asks for the
/// password, which is mistyped once.
fn expired_session(scene: &Scene<'_>, dice: &mut Dice, play: &mut Play) {
    let mut requests = Vec::new();
    for _ in 0..10 {
        let person = scene.stranger(dice);
        let start = play.from + millis(dice.between(0.0, 900.0));
        let ask = |at, page: &str, status, is_form| Request {
            at,
            client: person.client,
            target: path(page),
            status,
            agent: person.agent,
            is_form,
        };
        requests.push(ask(start, "/app", 200, false));
        for wait in [1000, 2000, 4000, 8000] {
            for part in 0..6 {
                let at = start + wait + millis(dice.between(0.0, 0.3));
                requests.push(ask(at, &format!("/api/v1/part{part}"), 401, false));
            }
        }
        requests.push(ask(start + 25_000, "/api/v1/login", 401, true));
        requests.push(ask(start + 35_000, "/api/v1/login", 200, true));
        scene.visit(dice, person, false, start + 36_000, &mut requests);
    }
    play.put(requests);
}

/// Five tabs that ask for news each five seconds and are left open after the session has ended.
fn forgotten_tab(scene: &Scene<'_>, dice: &mut Dice, play: &mut Play) {
    let mut requests = Vec::new();
    for _ in 0..5 {
        let person = scene.stranger(dice);
        let mut at = play.from + millis(dice.between(0.0, 300.0));
        let ends = at + 600_000;
        while at < play.until {
            requests.push(Request {
                at,
                client: person.client,
                target: path("/api/v1/inbox"),
                status: if at < ends { 200 } else { 401 },
                agent: person.agent,
                is_form: false,
            });
            at += 5_000;
        }
    }
    play.put(requests);
}

/// A page whose script asks what is new each few seconds: one visitor a minute, until something happens and four hundred come.
fn live_crowd(scene: &Scene<'_>, dice: &mut Dice, play: &mut Play) {
    let first = play.background.first().map_or(play.from, |first| first.at);
    let mut starts = dice.arrivals(1.0 / 60.0, first, play.from);
    for _ in 0..400 {
        let after = (dice.exponential() * 120.0).min(600.0);
        starts.push(play.from + millis(after));
    }
    let mut requests = Vec::new();
    for start in starts {
        let person = scene.stranger(dice);
        scene.visit(dice, person, true, start, &mut requests);
        let stays = start + millis(dice.between(60.0, 600.0));
        let mut at = start + 1000;
        while at < stays.min(play.until) {
            requests.push(Request {
                at,
                client: person.client,
                target: path("/api/live"),
                status: 200,
                agent: person.agent,
                is_form: false,
            });
            at += 5_000 + millis(dice.between(0.0, 0.2));
        }
    }
    play.put(requests);
}

/// All that comes is from one address, behind which so many people work: each opens the site every five minutes.
fn office(people: u32, scene: &Scene<'_>, dice: &mut Dice, play: &mut Play) {
    let first = play.background.first().map_or(play.from, |first| first.at);
    play.background.clear();
    let client = Ipv4Addr::new(61, 7, 7, 7).into();
    let mut visits = Vec::new();
    for _ in 0..people {
        let person = Person {
            client,
            returns: true,
            ..scene.stranger(dice)
        };
        for start in dice.arrivals(1.0 / 300.0, first, play.until) {
            scene.visit(dice, person, false, start, &mut visits);
        }
    }
    play.put(visits);
}

/// For a while everybody gets this answer to everything, and those who asked for a page try again.
fn outage(status: u16, secs: u64, _: &Scene<'_>, dice: &mut Dice, play: &mut Play) {
    let end = play.from + secs * 1000;
    let mut again = Vec::new();
    for request in &mut play.background {
        if !(play.from..end).contains(&request.at) {
            continue;
        }
        request.status = status;
        if request.target.kind == TargetKind::Page {
            let mut at = request.at;
            while dice.chance(0.5) {
                at += millis(dice.between(2.0, 10.0));
                again.push(Request { at, ..*request });
            }
        }
    }
    play.put(again.into_iter().filter(|request| request.at < end));
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    #[test]
    fn nobody_here_is_an_attacker_and_every_one_of_them_does_something() {
        let backgrounds = super::super::background::Background::made();
        let scene = backgrounds[0].scene(1);
        for scenario in all() {
            let play = scenario.play(&scene, 1);
            assert!(play.attackers.is_empty(), "{}", scenario.name);
            assert!(!play.injected.is_empty(), "{}", scenario.name);
        }
    }

    #[test]
    fn a_crowd_is_front_loaded_and_half_of_it_was_here_before() {
        let backgrounds = super::super::background::Background::made();
        let scene = backgrounds[1].scene(1);
        let crowd = all().into_iter().find(|one| one.name == "flash-crowd");
        let play = crowd.unwrap().play(&scene, 1);
        let mut clients: Vec<IpAddr> = play.injected.iter().map(|request| request.client).collect();
        clients.sort();
        clients.dedup();
        let seen = clients
            .iter()
            .filter(|one| scene.seen.contains(one))
            .count();
        let share = seen as f64 / clients.len() as f64;
        assert!((0.4..0.75).contains(&share), "{share}");
        let early = play
            .injected
            .iter()
            .filter(|request| request.at < play.from + 300_000)
            .count();
        assert!(early * 2 > play.injected.len());
    }
}
