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
    failures::{Answer, Reply},
    habits::{self, Habits, Manner, Noted, Place, SLICES},
    parse::{Method, Record, TargetKind},
    paths::{self, Paths},
    polled::Polled,
    regulars::Regulars,
    standing::Standing,
    subject::Subject,
    time::Timestamp,
    usual::Usual,
    window::Window,
};

/// Habits are kept of clients with so many requests in the window, or one that failed; with one less while the site is attacked.
/// Twice as many, and one failure more, for each step by which the room for habits is scarcer.
const HABITS_FROM: u64 = 3;
/// What people do now and then, too, asks for so many times the requests: some load no images, and some find what nobody else does.
const MANY: f64 = 4.0;
/// What newcomers do is counted over so many of their requests.
const NEWCOMERS_MEMORY: u64 = 1024;
/// Whoever comes in so many of an agent's first seconds was here before it …
const FIRST_SECS: u64 = 10;
/// … and what they do in so many is what they usually do.
const SETTLING_SECS: u64 = 600;
/// The script of a page asks for so long at least; an attack is noticed before.
const POLLS_SECS: u32 = 120;
/// A program that asks for one thing for ever comes in so many of an agent's first seconds, and stays for longer than that.
const FIRST_SECS_OF_PROGRAMS: u64 = 60;
const STAYS_SECS: u32 = 1800;
/// A site whose requests are at least to this share for what comes with pages has visitors who load it.
const HAS_ASSETS: f64 = 0.2;
/// Whoever asks for what comes with pages to half of the site's share, and at least to this, asks as visitors do.
const FEW_ASSETS: f64 = 0.1;

/// An attack on the whole site.
#[derive(Clone, Copy, Debug, Default)]
struct Attack {
    /// Who was first seen from this second on is a newcomer.
    newcomers_from: u64,
    /// Requests of newcomers.
    of_newcomers: u64,
    /// Of these for what comes with pages, for pages, for pages that nobody else has found, and again for the same page.
    with_pages: u64,
    pages: u64,
    invented: u64,
    again: u64,
}

impl Attack {
    fn note(&mut self, habits: &Habits, noted: Noted, is_known: bool) {
        if self.of_newcomers >= NEWCOMERS_MEMORY {
            for count in [
                &mut self.of_newcomers,
                &mut self.with_pages,
                &mut self.pages,
                &mut self.invented,
                &mut self.again,
            ] {
                *count /= 2;
            }
        }
        if !is_newcomer(habits, self) || noted.is_polled {
            return;
        }
        self.of_newcomers += 1;
        self.with_pages += u64::from(noted.is_shown);
        self.pages += u64::from(noted.is_page);
        self.invented += u64::from(noted.is_page && !is_known);
        self.again += u64::from(noted.is_page && !noted.is_fresh);
    }

    /// Is it so much of what newcomers do, in tenths? A crowd does little of it.
    const fn is_what_they_do(&self, count: u64, tenths: u64) -> bool {
        10 * count >= tenths * self.of_newcomers
    }

    /// Is half of what they ask for a page that they had asked for before?
    const fn is_again(&self) -> bool {
        2 * self.again >= self.pages
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Watch {
    paths: Paths,
    pub population: Population,
    regulars: Regulars,
    standing: Standing,
    polled: Polled,
    pub usual: Usual,
    /// When the first request came, if nothing had been learnt by then.
    began: Option<u64>,
    is_cold: bool,
    /// Requests for what comes with pages, and all with a path; halved now and then.
    with_pages: f64,
    with_paths: f64,
    attack: Option<Attack>,
}

impl Watch {
    pub fn new(settings: &Settings, saved: Option<(&caps::Saved, &Usual)>) -> Self {
        Self {
            paths: Paths::default(),
            population: saved.map_or_else(
                || Population::new(&settings.caps),
                |(saved, _)| Population::restore(&settings.caps, saved),
            ),
            regulars: Regulars::default(),
            standing: Standing::default(),
            polled: Polled::default(),
            usual: saved.map_or_else(Usual::default, |(_, usual)| usual.clone().restore()),
            began: None,
            is_cold: saved
                .is_none_or(|(population, usual)| population.is_empty() && usual.is_empty()),
            with_pages: 0.0,
            with_paths: 0.0,
            attack: None,
        }
    }

    /// The clock was set back: what fades with time would not fade until it is as late again.
    pub fn set_back(&mut self, now: u64) {
        self.standing = Standing::default();
        self.is_cold = false;
        if let Some(attack) = &mut self.attack {
            attack.newcomers_from = attack.newcomers_from.min(now);
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
                manner.with_pages > (self.share_with_pages() / 2.0).max(FEW_ASSETS)
                    || manner.lead < 0.6 && manner.known > 0.2
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

    /// Something is held against a client.
    pub fn flagged(&mut self, subject: Subject, finding: &Finding, habits: &Habits) {
        let effort = f64::from(habits.effort()) / f64::from(UNIT);
        self.usual
            .unlearn(subject, effort, finding.test == Test::Cap);
    }

    /// Are habits to be kept of a client of which none are yet?
    pub fn is_worth_watching(&self, client: &Client, scarcity: u32) -> bool {
        let least = HABITS_FROM - u64::from(self.is_attacked());
        client.window.requests() >= least << scarcity || client.window.errors() > scarcity.into()
    }

    /// What is known of the habits of a client that was first seen in this second.
    pub fn habits(&self, subject: Subject, first: u64) -> Box<Habits> {
        let is_regular = self.regulars.contains(subject);
        Box::new(Habits::new(narrow(first), is_regular))
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
        let began = *self.began.get_or_insert(second);
        let mark = paths::mark(subject);
        let page = record
            .target
            .filter(|target| target.kind == TargetKind::Page)
            .map(|target| target.path);
        let answer = Answer::of(record);
        let is_known = match page {
            Some(path) if matches!(record.status, 200..300 | 304) => {
                self.paths.found(path, mark, second)
            }
            _ => false,
        };
        // What attackers ask for is not what comes with this site's pages.
        if self.attack.is_none() {
            self.note_kind(record);
        }
        let Some(habits) = &mut client.habits else {
            let effort = habits::effort(record).saturating_mul(weight);
            client.window.exert(second, effort);
            return self.ordered(settings, normal, &client.window, None, record);
        };
        let was_fine = habits.behaves();
        let is_polled = page.is_some_and(|path| self.polled.contains(path, second));
        let noted = habits.note(record, narrow(second), is_known, is_polled);
        habits.sample(place);
        let effort = noted.effort.saturating_mul(weight);
        client.window.exert(second, effort);
        let for_long = noted.for_long.saturating_mul(weight);
        if let Some(done) = habits.add(narrow(second), settings.window_secs, for_long) {
            let effort = f64::from(done) / f64::from(UNIT);
            let was_first = u64::from(habits.since) < began + FIRST_SECS;
            let from_the_start = was_first && self.is_young(second);
            self.usual.note(subject, effort, from_the_start, second);
        }
        if let Some(attack) = &mut self.attack {
            attack.note(habits, noted, is_known);
        } else if let Some(path) = habits.polls()
            && is_visitor(habits, began)
        {
            self.polled.note(path, mark, second);
        }
        // What others have found is there: if it is not now, that is the site's doing.
        let was_there = page.is_some_and(|path| self.paths.is_known(path, mark, second));
        let only_asks = record.method == Some(Method::Safe);
        let answer = match (answer, page) {
            // It was let in there, or somewhere here before: its session is over.
            (Answer::Refused, Some(path))
                if only_asks && (habits.is_regular || habits.was_given(path)) =>
            {
                Answer::Neither
            }
            _ => answer,
        };
        self.stand(record, answer, was_there, was_fine, mark, second);
        let answer = match (answer, page) {
            (Answer::Missing, Some(path)) if was_there || self.paths.is_broken(path, second) => {
                Answer::Neither
            }
            (Answer::Fine, Some(path))
                if only_asks && !noted.is_fresh && !habits.series.has_failed_at(path) =>
            {
                habits.give(path);
                answer
            }
            _ => answer,
        };
        let reply = Reply {
            answer,
            path: record.target.map(|target| target.path),
            is_fresh: noted.is_fresh,
            method: record.method,
            at: if record.at.secs() == second {
                record.at
            } else {
                Timestamp::from_secs(second)
            },
        };
        let window = &client.window;
        self.ordered(settings, normal, window, Some(habits), record)
            .or_else(|| self.capped(settings, normal, subject, window, habits, clock, record))
            .or_else(|| {
                let normal_shares = self.standing.shares(second);
                let verdict = habits
                    .series
                    .add(&settings.failures, reply, normal_shares)?;
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

    /// Takes in how somebody was answered: what it says of the site.
    fn stand(
        &mut self,
        record: &Record,
        answer: Answer,
        was_there: bool,
        was_fine: bool,
        mark: u32,
        second: u64,
    ) {
        if was_fine
            && answer == Answer::Missing
            && let Some(target) = record.target
            && target.kind == TargetKind::Page
        {
            self.paths.failed(target.path, mark, second);
        }
        // What was there and is not says the same whoever asks for it.
        let is_gone = was_there
            && matches!(record.status, 404 | 410)
            && record.method != Some(Method::Unsafe);
        let speaks = was_fine || is_gone;
        if speaks {
            let answer = if record.status < 400 {
                Answer::Fine
            } else {
                answer
            };
            self.standing.add(answer, was_there, mark, second);
        }
    }

    fn note_kind(&mut self, record: &Record) {
        let Some(target) = record.target else {
            return;
        };
        let is_answered = record.status < 400 && target.kind != TargetKind::Unbidden;
        if target.kind == TargetKind::Page || is_answered {
            self.with_paths += 1.0;
        }
        if target.kind != TargetKind::Page && is_answered {
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
        match self.room(settings, habits, record.at.secs()) {
            room if room > 1.0 => detect::client(settings, normal, window, record.at, room),
            _ => Some(finding),
        }
    }

    /// How much more room than others a client is given.
    pub fn room(&self, settings: &Settings, habits: Option<&Habits>, second: u64) -> f64 {
        let Some(habits) = habits else {
            return 1.0;
        };
        let manner = habits.manner();
        let loads_pages = match self.share_with_pages() {
            share if share >= HAS_ASSETS => manner.with_pages >= share / 2.0,
            _ => manner.agents >= 4,
        };
        let is_crowd = manner.requests >= 40
            && manner.pages >= 10
            && manner.lead <= 0.3
            && manner.failed <= 0.1
            && (manner.known >= 0.5 || self.is_young(second))
            && loads_pages;
        if is_crowd {
            settings.room.max(1.0)
        } else {
            1.0
        }
    }

    /// Is it too early for any page to be known?
    fn is_young(&self, second: u64) -> bool {
        let began = self.began.unwrap_or(second);
        self.is_cold && second < began + SETTLING_SECS
    }

    /// How many times the caps a client may do, since it usually does.
    pub fn usual(&self, subject: Subject) -> f64 {
        let cap = self.population.caps()[SPANS - 1] / f64::from(SLICES);
        self.usual.room(subject, cap)
    }

    fn share_with_pages(&self) -> f64 {
        if self.with_paths < 100.0 {
            return 0.0;
        }
        self.with_pages / self.with_paths
    }

    /// Holds a client's effort in each span against the caps.
    #[expect(clippy::too_many_arguments, reason = "all of them are looked at")]
    fn capped(
        &self,
        settings: &Settings,
        normal: &Normal,
        subject: Subject,
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
        let shared = self.room(settings, Some(habits), clock);
        let usual = self.usual(subject);
        // What is usual is so for long; nobody need be quick.
        let rooms: [f64; SPANS] = std::array::from_fn(|span| match span {
            0 | 1 => shared,
            _ => shared.max(usual),
        });
        let span = (0..SPANS).find(|span| is_over(*span, rooms[*span]))?;
        let room = rooms[span];
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
            pages,
            with_pages,
            known,
            lead,
            ..
        } = habits.manner();
        let pages = f64::from(pages);
        let least = f64::from(settings.attack_requests);
        let share = self.share_with_pages();
        let site_loads_pages = share >= HAS_ASSETS;
        let is_bare = with_pages <= (share / 2.0).max(FEW_ASSETS);
        if settings.attack_requests == 0 || !is_bare || record.target.is_none() {
            return None;
        }
        let is_one_page = attack.is_again()
            && lead >= 0.6
            && pages >= if site_loads_pages { least } else { 1.3 * least };
        let is_invented =
            attack.is_what_they_do(attack.invented, 8) && known <= 0.2 && pages >= MANY * least;
        let loads_nothing = site_loads_pages
            && attack.is_what_they_do(attack.of_newcomers - attack.with_pages, 8)
            && with_pages <= 0.02
            && pages >= MANY * least;
        let test = if is_one_page {
            Test::OnePage
        } else if is_invented {
            Test::InventedPages
        } else if loads_nothing {
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

/// Is it somebody with a page open, and not a program that asks for one thing for ever?
const fn is_visitor(habits: &Habits, began: u64) -> bool {
    let came_later = habits.since as u64 > began + FIRST_SECS_OF_PROGRAMS;
    habits.stays(POLLS_SECS) && (habits.looks_around() || came_later && !habits.stays(STAYS_SECS))
}

fn is_newcomer(habits: &Habits, attack: &Attack) -> bool {
    u64::from(habits.since) >= attack.newcomers_from && !habits.is_regular
}

/// Seconds since the epoch, as they are kept of each client.
fn narrow(second: u64) -> u32 {
    u32::try_from(second).unwrap_or(u32::MAX)
}
