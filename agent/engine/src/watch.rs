//! The tests beside the ordered ones: on one client, by what it does rather than how much.
//!
//! What is normal here comes from the other clients: which pages they find, which of them fail even for those who behave, how much
//! one of them does. While the site's alarm stands (attack mode) newcomers are held to how they ask, since their rate cannot tell
//! them from people.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use crate::{
    baseline::Normal,
    caps::{self, Population, SPANS, UNIT},
    clients::Client,
    detect::{self, Finding, Settings, Test},
    failures::{Answer, SITE_FAILS},
    habits::{Habits, Manner, Noted, Place, SLICES},
    parse::{Record, TargetKind},
    paths::{self, Paths},
    regulars::Regulars,
    subject::Subject,
    window::Window,
};

/// Habits are kept of clients with so many requests in the window, or one that failed; with one less while the site is attacked.
const HABITS_FROM: u64 = 3;
/// What people do now and then, too, asks for so many times the requests: some load no images, and some find what nobody else does.
const MANY: f64 = 4.0;
/// What newcomers do is counted over so many of their requests.
const NEWCOMERS_MEMORY: u64 = 1024;
/// Half of what is known of others' answers is gone after so many seconds.
const STANDING_HALF_LIFE: f64 = 60.0;
/// Shares of others' answers say something from so many on.
const STANDING_LEAST: f64 = 10.0;
/// For so long the site is taken to fail once it did.
const SITE_FAILS_SECS: u64 = 900;
/// A site whose requests are at least to this share for what comes with pages has visitors who load it.
const HAS_ASSETS: f64 = 0.2;

/// Shares of answers and kinds of requests, of those who behave, fading with time.
#[derive(Debug, Default)]
struct Standing {
    at: u64,
    fine: f64,
    refused: f64,
    missing: f64,
    /// Who failed last: one client's failures are one voice.
    last: u32,
    /// The second until which the site is taken to fail, in either way, after those who behave have said so: soon none of them is
    /// left who could say it again.
    refuses_until: u64,
    misses_until: u64,
}

impl Standing {
    fn add(&mut self, answer: Answer, client: u32, second: u64) {
        if second > self.at {
            let elapsed = (second - self.at) as f64;
            let kept = (-elapsed / STANDING_HALF_LIFE).exp2();
            for share in [&mut self.fine, &mut self.refused, &mut self.missing] {
                *share *= kept;
            }
            self.at = second;
        }
        match answer {
            Answer::Fine => self.fine += 1.0,
            Answer::Refused | Answer::Missing if self.last == client => {}
            Answer::Refused => self.refused += 1.0,
            Answer::Missing => self.missing += 1.0,
            Answer::Neither => {}
        }
        if matches!(answer, Answer::Refused | Answer::Missing) {
            self.last = client;
        }
        let (refused, missing) = self.measured();
        if refused >= SITE_FAILS {
            self.refuses_until = second + SITE_FAILS_SECS;
        }
        if missing >= SITE_FAILS {
            self.misses_until = second + SITE_FAILS_SECS;
        }
    }

    fn measured(&self) -> (f64, f64) {
        let all = self.fine + self.refused + self.missing;
        if all < STANDING_LEAST {
            return (0.0, 0.0);
        }
        (self.refused / all, self.missing / all)
    }

    /// Shares of refused and of missing answers.
    fn shares(&self, second: u64) -> (f64, f64) {
        let (refused, missing) = self.measured();
        let held = |share: f64, until: u64| {
            let fails = (until.saturating_sub(SITE_FAILS_SECS)..until).contains(&second);
            if fails { share.max(SITE_FAILS) } else { share }
        };
        (
            held(refused, self.refuses_until),
            held(missing, self.misses_until),
        )
    }
}

/// An attack on the whole site.
#[derive(Clone, Copy, Debug, Default)]
struct Attack {
    /// Who was first seen from this second on is a newcomer.
    newcomers_from: u64,
    /// Requests of newcomers.
    of_newcomers: u64,
    /// Of these for what comes with pages, for pages that nobody else has found, and again for the same page.
    with_pages: u64,
    invented: u64,
    again: u64,
}

impl Attack {
    fn note(&mut self, habits: &Habits, noted: Noted, is_known: bool) {
        if self.of_newcomers >= NEWCOMERS_MEMORY {
            for count in [
                &mut self.of_newcomers,
                &mut self.with_pages,
                &mut self.invented,
                &mut self.again,
            ] {
                *count /= 2;
            }
        }
        if !is_newcomer(habits, self) {
            return;
        }
        self.of_newcomers += 1;
        self.with_pages += u64::from(!noted.is_page);
        self.invented += u64::from(noted.is_page && !is_known);
        self.again += u64::from(noted.is_page && !noted.is_fresh);
    }

    /// Is it so much of what newcomers do, in tenths? A crowd does little of it.
    const fn is_what_they_do(&self, count: u64, tenths: u64) -> bool {
        10 * count >= tenths * self.of_newcomers
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Watch {
    paths: Paths,
    pub population: Population,
    regulars: Regulars,
    standing: Standing,
    /// Requests for what comes with pages, and all with a path; halved now and then.
    with_pages: f64,
    with_paths: f64,
    attack: Option<Attack>,
}

impl Watch {
    pub fn new(settings: &Settings, saved: Option<&caps::Saved>) -> Self {
        Self {
            paths: Paths::default(),
            population: saved.map_or_else(
                || Population::new(&settings.caps),
                |saved| Population::restore(&settings.caps, saved),
            ),
            regulars: Regulars::default(),
            standing: Standing::default(),
            with_pages: 0.0,
            with_paths: 0.0,
            attack: None,
        }
    }

    /// The site's alarm has been raised, or its aftermath is over.
    pub fn attack(&mut self, newcomers_from: Option<u64>) {
        self.attack = match (newcomers_from, self.attack) {
            (Some(_), Some(attack)) => Some(attack),
            (Some(newcomers_from), None) => Some(Attack {
                newcomers_from,
                ..Attack::default()
            }),
            (None, _) => None,
        };
    }

    /// Does an attack on the whole site go on, or its aftermath?
    pub const fn is_attacked(&self) -> bool {
        self.attack.is_some()
    }

    /// Has it been here before, and nothing was held against it?
    pub fn is_regular(&self, subject: Subject) -> bool {
        self.regulars.contains(subject)
    }

    /// Has somebody come with the attack that goes on?
    pub fn is_newcomer(&self, habits: &Habits) -> bool {
        let attack = self.attack.as_ref();
        attack.is_some_and(|attack| is_newcomer(habits, attack))
    }

    /// Is a member of a network somebody for whose sake it is not banned? Not who came with the attack and asks as it does. Of an
    /// IPv6 network, which as a rule is one customer's, nor who came with it and has hardly done anything yet.
    pub fn is_spared(&self, subject: Subject, client: &Client) -> bool {
        let Some(attack) = &self.attack else {
            return true;
        };
        match &client.habits {
            Some(habits) if is_newcomer(habits, attack) => {
                let manner = habits.manner();
                manner.with_pages > 0.1 || manner.lead < 0.6 && manner.known > 0.2
            }
            Some(_) => true,
            None => !subject.is_v6() || client.window.oldest() < Some(attack.newcomers_from),
        }
    }

    /// Has somebody of an IPv4 network been here before, of those who `counts`?
    pub fn has_regulars_in(&self, prefix: Ipv4Net, counts: impl Fn(Subject) -> bool) -> bool {
        let hosts = prefix.network().to_bits()..=prefix.broadcast().to_bits();
        hosts
            .map(|bits| Subject::of_client(Ipv4Addr::from(bits).into()))
            .any(|host| self.regulars.contains(host) && counts(host))
    }

    /// A client has gone that nothing was held against. Who came with an attack is no regular of it.
    pub fn gone(&mut self, subject: Subject, client: &Client, now: u64) {
        let came_with_it = self.attack.is_some_and(|attack| match &client.habits {
            Some(habits) => is_newcomer(habits, &attack),
            None => true,
        });
        if came_with_it {
            return;
        }
        self.regulars.add(subject, now);
        let peaks = client
            .habits
            .as_ref()
            .map_or([1; SPANS], |habits| habits.peaks);
        self.population.learn(peaks);
    }

    /// Takes in a request of a client, which is in its window already, and says whether it leaves the normal traffic by any of the
    /// tests. `weight`: it stands for so many. `second` lies in the window, which ends at `clock`.
    #[expect(clippy::too_many_arguments, reason = "all of them are looked at")]
    pub fn client(
        &mut self,
        settings: &Settings,
        normal: &Normal,
        subject: Subject,
        client: &mut Client,
        record: &Record,
        place: Place,
        (second, clock): (u64, u64),
        weight: u32,
    ) -> Option<Finding> {
        let mark = paths::mark(subject);
        let answer = Answer::of(record);
        let page = record
            .target
            .filter(|target| target.kind == TargetKind::Page)
            .map(|target| target.path);
        let is_known = match page {
            Some(path) if answer == Answer::Fine => self.paths.found(path, mark, second),
            _ => false,
        };
        self.note_kind(record);
        let habits_from = HABITS_FROM - u64::from(self.is_attacked());
        if client.habits.is_none()
            && (client.window.requests() >= habits_from || record.status >= 400)
        {
            let first = client.window.oldest().unwrap_or(second);
            let is_regular = self.regulars.contains(subject);
            client.habits = Some(Box::new(Habits::new(narrow(first), is_regular)));
        }
        let Some(habits) = &mut client.habits else {
            client.window.exert(second, UNIT.saturating_mul(weight));
            return self.ordered(settings, normal, &client.window, None, record);
        };
        let was_fine = habits.behaves();
        let noted = habits.note(record, narrow(second), is_known);
        habits.sample(place);
        let effort = noted.effort.saturating_mul(weight);
        client.window.exert(second, effort);
        let for_long = noted.for_long.saturating_mul(weight);
        habits.add(narrow(second), settings.window_secs, for_long);
        if let Some(attack) = &mut self.attack {
            attack.note(habits, noted, is_known);
        }
        if was_fine {
            let answer = if record.status < 400 {
                Answer::Fine
            } else {
                answer
            };
            self.standing.add(answer, mark, second);
            if answer == Answer::Missing
                && let Some(path) = page
            {
                self.paths.failed(path, mark, second);
            }
        }
        let window = &client.window;
        self.ordered(settings, normal, window, Some(habits), record)
            .or_else(|| self.capped(settings, normal, window, habits, clock, record))
            .or_else(|| {
                let answer = match page {
                    // Whoever behaves fails there, too.
                    Some(path)
                        if answer == Answer::Missing && self.paths.is_broken(path, second) =>
                    {
                        Answer::Neither
                    }
                    _ => answer,
                };
                let normal_shares = self.standing.shares(second);
                let path = record.target.map(|target| target.path);
                let verdict = habits.series.add(
                    &settings.failures,
                    answer,
                    path,
                    narrow(second),
                    normal_shares,
                )?;
                Some(Finding {
                    value: verdict.score,
                    requests: verdict.answers.into(),
                    errors: verdict.failures.into(),
                    distinct: verdict.distinct,
                    ..detect::finding(
                        settings,
                        normal,
                        window,
                        record.at,
                        Test::Failures,
                        settings.failures.score,
                    )
                })
            })
            .or_else(|| self.attacking(settings, normal, window, habits, record))
    }

    fn note_kind(&mut self, record: &Record) {
        let Some(target) = record.target else {
            return;
        };
        self.with_paths += 1.0;
        if target.kind != TargetKind::Page {
            self.with_pages += 1.0;
        }
        if self.with_paths >= 10_000.0 {
            self.with_paths /= 2.0;
            self.with_pages /= 2.0;
        }
    }

    /// The ordered tests, with more room for an address that many share.
    fn ordered(
        &self,
        settings: &Settings,
        normal: &Normal,
        window: &Window,
        habits: Option<&Habits>,
        record: &Record,
    ) -> Option<Finding> {
        let finding = detect::client(settings, normal, window, record.at, 1.0)?;
        match self.room(settings, habits) {
            room if room > 1.0 => detect::client(settings, normal, window, record.at, room),
            _ => Some(finding),
        }
    }

    /// How much more room than others a client is given.
    pub fn room(&self, settings: &Settings, habits: Option<&Habits>) -> f64 {
        let Some(habits) = habits else {
            return 1.0;
        };
        let manner = habits.manner();
        let loads_pages = match self.share_with_pages() {
            share if share >= HAS_ASSETS => manner.with_pages >= share / 2.0,
            _ => manner.agents >= 4,
        };
        let is_crowd = manner.requests >= 40
            && manner.lead <= 0.3
            && manner.failed <= 0.1
            && manner.known >= 0.5
            && loads_pages;
        if is_crowd {
            settings.room.max(1.0)
        } else {
            1.0
        }
    }

    fn share_with_pages(&self) -> f64 {
        if self.with_paths < 100.0 {
            return 0.0;
        }
        self.with_pages / self.with_paths
    }

    /// Holds a client's effort in each span against the caps.
    fn capped(
        &self,
        settings: &Settings,
        normal: &Normal,
        window: &Window,
        habits: &mut Habits,
        clock: u64,
        record: &Record,
    ) -> Option<Finding> {
        let caps = *self.population.caps();
        let spans = spans(settings);
        let efforts = efforts(window, habits, clock);
        for (peak, effort) in habits.peaks.iter_mut().zip(efforts) {
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "a peak that is higher is as high as that"
            )]
            let reached = effort.min(65_535.0) as u16;
            *peak = reached.max(*peak);
        }
        // Nobody is flagged for the luck of a sample.
        let margin = 3.0 * (window.variance() as f64).sqrt();
        let is_over =
            |span: usize, room: f64| caps[span] > 0.0 && efforts[span] - margin > caps[span] * room;
        if !(0..SPANS).any(|span| is_over(span, 1.0)) {
            return None;
        }
        let room = self.room(settings, Some(habits));
        let span = (0..SPANS).find(|span| is_over(*span, room))?;
        let length = spans[span];
        let rate = efforts[span] / f64::from(length);
        Some(Finding {
            value: efforts[span],
            window_secs: length,
            rate,
            score: (rate - normal.mean) / normal.stddev,
            ..detect::finding(
                settings,
                normal,
                window,
                record.at,
                Test::Cap,
                caps[span] * room,
            )
        })
    }

    /// While the site is attacked: does a newcomer ask as the attackers do?
    fn attacking(
        &self,
        settings: &Settings,
        normal: &Normal,
        window: &Window,
        habits: &Habits,
        record: &Record,
    ) -> Option<Finding> {
        let attack = self.attack.as_ref()?;
        if !is_newcomer(habits, attack) {
            return None;
        }
        let Manner {
            requests,
            with_pages,
            known,
            lead,
            ..
        } = habits.manner();
        let pages = f64::from(requests) * (1.0 - with_pages);
        let least = f64::from(settings.attack_requests);
        let site_loads_pages = self.share_with_pages() >= HAS_ASSETS;
        if settings.attack_requests == 0 || with_pages > 0.1 || record.target.is_none() {
            return None;
        }
        let is_one_page = attack.is_what_they_do(attack.again, 5)
            && lead >= 0.6
            && pages >= if site_loads_pages { least } else { 1.3 * least };
        let is_invented =
            attack.is_what_they_do(attack.invented, 8) && known <= 0.2 && pages >= MANY * least;
        let is_bare = site_loads_pages
            && attack.is_what_they_do(attack.of_newcomers - attack.with_pages, 8)
            && with_pages <= 0.02
            && pages >= MANY * least;
        let test = if is_one_page {
            Test::OnePage
        } else if is_invented {
            Test::InventedPages
        } else if is_bare {
            Test::BarePages
        } else {
            return None;
        };
        Some(Finding {
            value: pages,
            requests: requests.into(),
            ..detect::finding(settings, normal, window, record.at, test, least)
        })
    }
}

/// The spans in seconds.
pub const fn spans(settings: &Settings) -> [u32; SPANS] {
    let window = settings.window_secs;
    let ten = if window < 10 { window } else { 10 };
    [1, ten, window, window * SLICES]
}

/// A client's effort in each span, in requests of full effort.
pub fn efforts(window: &Window, habits: &Habits, clock: u64) -> [f64; SPANS] {
    let efforts = [
        window.effort_since(clock),
        window.effort_since(clock.saturating_sub(9)),
        window.effort_since(0),
        habits.effort().into(),
    ];
    efforts.map(|effort| effort as f64 / f64::from(UNIT))
}

fn is_newcomer(habits: &Habits, attack: &Attack) -> bool {
    u64::from(habits.since) >= attack.newcomers_from && !habits.is_regular
}

/// Seconds since the epoch, as they are kept of each client.
fn narrow(second: u64) -> u32 {
    u32::try_from(second).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_site_that_failed_is_taken_to_fail_when_nobody_is_left_who_could_say_so() {
        let mut standing = Standing::default();
        (0..20).for_each(|client| standing.add(Answer::Fine, client, 1000));
        assert_eq!(standing.shares(1000), (0.0, 0.0));
        (0..5).for_each(|_| standing.add(Answer::Missing, 7, 1001));
        assert!(standing.shares(1001).1 < SITE_FAILS, "one voice");
        (0..7).for_each(|client| standing.add(Answer::Missing, client, 1002));
        assert!(standing.shares(1002).1 >= SITE_FAILS);
        standing.add(Answer::Missing, 1, 1500);
        assert_eq!(standing.measured(), (0.0, 0.0), "too little is left");
        assert_eq!(standing.shares(1500), (0.0, SITE_FAILS));
        assert_eq!(standing.shares(1002 + SITE_FAILS_SECS), (0.0, 0.0));
        assert_eq!(standing.shares(10), (0.0, 0.0), "the clock was set back");
    }
}
