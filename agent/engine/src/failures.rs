//! A sequential test on a client's answers: does it fail as scanners and password guessers do?
//!
//! Wald's sequential probability ratio test, one-sided as a CUSUM: each answer moves a score by the logarithm of how much likelier
//! it is from somebody who guesses than from anybody else, and the score never falls below nothing (Page, Biometrika 1954; on
//! failing connections Jung, Paxson, Berger and Balakrishnan, Fast Portscan Detection Using Sequential Hypothesis Testing, IEEE
//! S&P 2004). Time takes the score back, so that a program that asks in vain now and then is no guesser.
//!
//! What a page's scripts do when a session has run out looks like guessing and is not: they are refused all at once, on several
//! paths, and again a little later. So refusals count once a second, several paths at once only as a broad try, and whoever then
//! fills in a form begins anew.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{
    parse::{Method, Record, TargetKind},
    time::Timestamp,
};

/// What the test goes by.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Score that flags: the logarithm of how much likelier a guesser is. 0: the test is off.
    pub score: f64,
    /// Least share of refused answers (401, 403) that counts as normal.
    pub floor_refused: f64,
    /// Least share of other failing answers that counts as normal.
    pub floor_missing: f64,
    /// Half of the score is gone after so many seconds.
    pub half_life_secs: f64,
    /// Answers such as 404 flag only if so many different paths failed.
    pub distinct: u32,
}

/// Share of failing answers of somebody who guesses.
const GUESSER_REFUSED: f64 = 0.98;
const GUESSER_MISSING: f64 = 0.8;
/// Where so many of the answers fail to those who behave, it is the site that fails: nothing is held against anybody.
pub const SITE_FAILS: f64 = 0.25;
/// Different paths that are kept of a client; more need not be told apart.
const MAX_DISTINCT: usize = 16;

/// Where forms were sent and refused, the score lasts so many times as long.
const SENT_LASTS: f64 = 1.25;
/// What the scripts of a page ask for is refused within such a time …
const AT_ONCE: Duration = Duration::from_secs(1);
/// … and what is asked for twice, as by a second click, within that.
const TWICE: Duration = Duration::from_millis(250);

/// How an answer counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// As one that did not fail.
    Fine,
    /// Not let in: what guessed passwords get.
    Refused,
    /// Not there, not understood, or not for everybody's eyes: what guessed paths get.
    Missing,
    /// Not at all: the server's own fault, a limit that was set, or what browsers ask for unbidden.
    Neither,
}

impl Answer {
    /// How the answer to a request counts.
    #[must_use]
    pub fn of(record: &Record) -> Self {
        let kind = record.target.map(|target| target.kind);
        match (record.status, kind) {
            _ if record.method == Some(Method::Preflight) => Self::Neither,
            // Sent elsewhere: whether it is there, nobody knows yet. (What is sent and let in is sent on, too.)
            (300..304 | 305..400, _) if record.method == Some(Method::Safe) => Self::Neither,
            // What comes with a page says nothing of who asks for it.
            (0..400, Some(TargetKind::Unbidden | TargetKind::Asset | TargetKind::Filed)) => {
                Self::Neither
            }
            (0..400, _) => Self::Fine,
            (401, _) => Self::Refused,
            // A page that lacks its pictures fails for everybody who opens it.
            (_, Some(TargetKind::Unbidden | TargetKind::Asset)) => Self::Neither,
            (403, _) if record.method != Some(Method::Safe) => Self::Refused,
            (400 | 403 | 404 | 405 | 406 | 410 | 414 | 421 | 431 | 444 | 451, _) => Self::Missing,
            _ => Self::Neither,
        }
    }
}

/// An answer, and what it was an answer to.
#[derive(Clone, Copy, Debug)]
pub struct Reply {
    /// How it counts.
    pub answer: Answer,
    /// The path, where the log has it.
    pub path: Option<u32>,
    /// The client had not asked for it before.
    pub is_fresh: bool,
    /// Does the request only ask, where the log says so?
    pub method: Option<Method>,
    /// When.
    pub at: Timestamp,
}

/// What a client's answers have come to.
#[derive(Clone, Debug, Default)]
pub struct Series {
    score: f32,
    /// The second of the newest answer.
    at: u32,
    /// When the newest refusal was counted, and its path.
    refused_at: Timestamp,
    door: u32,
    answers: u32,
    failures: u32,
    /// Of these the refusals, without those of several paths at once; and what was missing at different paths.
    refused: u32,
    missing: u32,
    paths: smallvec::SmallVec<[u32; 4]>,
    /// Several paths were refused at that time.
    at_once: bool,
    /// It was for something that was sent.
    was_sent: bool,
    /// Something that was sent has been refused, and not only something that was asked for.
    sent: bool,
    /// It has begun anew with the first thing that it sent.
    anew: bool,
}

/// Why a series flags.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// The score.
    pub score: f64,
    /// Answers since the score last stood at nothing.
    pub answers: u32,
    /// Those of them that failed.
    pub failures: u32,
    /// Different paths that failed, counted up to sixteen.
    pub distinct: u32,
}

impl Series {
    /// Takes in an answer. `normal` are the shares of refused and of missing answers that others get now.
    pub fn add(
        &mut self,
        settings: &Settings,
        reply: Reply,
        normal: (f64, f64),
    ) -> Option<Verdict> {
        let Reply { answer, at, .. } = reply;
        let of_the_site = match answer {
            Answer::Refused => normal.0,
            Answer::Missing => normal.1,
            Answer::Fine | Answer::Neither => 0.0,
        };
        let is_off = settings.score <= 0.0;
        if is_off || answer == Answer::Neither || of_the_site >= SITE_FAILS {
            return None;
        }
        let refused = normal.0.max(settings.floor_refused);
        let missing = normal.1.max(settings.floor_missing);
        let of_refused = (GUESSER_REFUSED / refused).ln();
        let of_missing = (GUESSER_MISSING / missing).ln();
        let second = u32::try_from(at.secs()).unwrap_or(u32::MAX);
        let elapsed = f64::from(second.saturating_sub(self.at));
        let kept = (-elapsed / self.half_life(settings)).exp2();
        self.at = self.at.max(second);
        if answer == Answer::Refused && self.is_first_sent(reply.method) {
            *self = Self {
                anew: true,
                at: self.at,
                ..Self::default()
            };
        }
        let step = match answer {
            Answer::Refused if self.was_just_refused(reply) => match reply.path {
                Some(path) if path != self.door && !self.at_once && !self.was_sent => {
                    self.at_once = true;
                    self.refused -= 1;
                    of_missing - of_refused
                }
                _ => 0.0,
            },
            Answer::Refused => of_refused,
            Answer::Missing => of_missing,
            // Whoever is let in, or finds something: as little likely as the less telling of the two says.
            _ => self.worth(reply) * ((1.0 - GUESSER_REFUSED) / (1.0 - refused)).ln(),
        };
        let score = f64::from(self.score) * kept + step;
        if score <= 0.0 {
            *self = Self {
                at: self.at,
                ..Self::default()
            };
            return None;
        }
        #[expect(
            clippy::cast_possible_truncation,
            reason = "a score needs no more digits"
        )]
        let short = score as f32;
        self.score = short;
        let counts = answer != Answer::Refused || !self.was_just_refused(reply);
        self.answers += u32::from(counts);
        if answer == Answer::Fine {
            return None;
        }
        self.failures += u32::from(counts);
        if answer == Answer::Refused && counts {
            self.refused += 1;
            self.refused_at = at;
            self.door = reply.path.unwrap_or_default();
            self.at_once = false;
            self.was_sent = reply.method == Some(Method::Unsafe);
            self.sent |= reply.method == Some(Method::Unsafe);
        }
        let is_new = reply.path.is_none_or(|path| !self.paths.contains(&path));
        self.missing += u32::from(answer == Answer::Missing && is_new);
        if let Some(path) = reply.path
            && self.paths.len() < MAX_DISTINCT
            && is_new
        {
            self.paths.push(path);
        }
        #[expect(clippy::cast_possible_truncation, reason = "sixteen at most")]
        let distinct = self.paths.len() as u32;
        // Where the log has no paths, twice as many failures stand for them.
        let is_broad = match reply.path {
            Some(_) => distinct >= settings.distinct,
            None => self.failures >= 2 * settings.distinct,
        };
        let is_guesser = self.is_at_a_door() || is_broad;
        (score > settings.score && is_guesser).then_some(Verdict {
            score,
            answers: self.answers,
            failures: self.failures,
            distinct,
        })
    }

    /// People do not send a form again and again: that is remembered for longer.
    fn half_life(&self, settings: &Settings) -> f64 {
        let times = if self.sent { SENT_LASTS } else { 1.0 };
        times * settings.half_life_secs
    }

    /// Is this the first thing that was sent and refused, after others that were only asked for?
    fn is_first_sent(&self, method: Option<Method>) -> bool {
        method == Some(Method::Unsafe) && self.was_refused() && !self.sent && !self.anew
    }

    fn was_refused(&self) -> bool {
        self.refused_at != Timestamp::from_secs(0)
    }

    /// Refusals at once are one, and a line that comes late is none.
    fn was_just_refused(&self, reply: Reply) -> bool {
        let is_other = reply.path.is_some_and(|path| path != self.door);
        let least = if is_other { AT_ONCE } else { TWICE };
        self.was_refused() && reply.at < self.refused_at + least
    }

    /// Do nearly all of its failures come from trying to get in? What is missing at one path again and again hides nothing.
    const fn is_at_a_door(&self) -> bool {
        self.refused > 0 && self.refused >= 3 * self.missing
    }

    /// How much an answer that did not fail speaks for the client. Of somebody who has sent what was refused a page that it knows
    /// already says nothing, or every guess could be paid for with the form that it is sent from; nor does the form itself.
    fn worth(&self, reply: Reply) -> f64 {
        let Some(path) = reply.path.filter(|_| self.sent) else {
            return 1.0;
        };
        if self.paths.contains(&path) {
            let is_form = reply.method == Some(Method::Safe);
            return if is_form { 0.0 } else { 1.0 };
        }
        match (reply.is_fresh, self.is_at_a_door()) {
            (false, _) => 0.0,
            (true, true) => 0.25,
            (true, false) => 1.0,
        }
    }

    /// How it stands at second `at`, with the score faded by then.
    #[must_use]
    pub fn standing(&self, settings: &Settings, at: u32) -> Verdict {
        let elapsed = f64::from(at.saturating_sub(self.at));
        Verdict {
            score: f64::from(self.score) * (-elapsed / self.half_life(settings)).exp2(),
            answers: self.answers,
            failures: self.failures,
            distinct: u32::try_from(self.paths.len()).unwrap_or(u32::MAX),
        }
    }

    /// Has the client failed at this path since the score last stood at nothing?
    #[must_use]
    pub fn has_failed_at(&self, path: u32) -> bool {
        self.paths.contains(&path)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn settings() -> Settings {
        Settings {
            score: 13.8,
            floor_refused: 0.02,
            floor_missing: 0.05,
            half_life_secs: 75.0,
            distinct: 10,
        }
    }

    fn reply(answer: Answer, path: Option<u32>, at: u32) -> Reply {
        Reply {
            answer,
            path,
            is_fresh: true,
            method: None,
            at: Timestamp::from_secs(at.into()),
        }
    }

    /// The score after replies at a page, each by its answer, method, path and second.
    fn score(replies: &[(Answer, Method, u32, u32)]) -> f64 {
        let mut series = Series::default();
        for (answer, method, path, at) in replies {
            let reply = Reply {
                is_fresh: *path < 100,
                method: Some(*method),
                ..reply(*answer, Some(*path), *at)
            };
            series.add(&settings(), reply, (0.0, 0.0));
        }
        f64::from(series.score)
    }

    const REFUSED: f64 = 3.8918;
    const MISSING: f64 = 2.7726;

    #[test]
    fn refusals_of_one_second_are_one_and_of_several_paths_a_broad_try() {
        use Answer::Refused;
        use Method::{Safe, Unsafe};
        let close = |one: f64, other: f64| assert!((one - other).abs() < 1e-3, "{one} {other}");
        close(score(&[(Refused, Unsafe, 1, 10)]), REFUSED);
        close(score(&[(Refused, Unsafe, 1, 10); 9]), REFUSED);
        let parts = |at| [1, 2, 3, 4, 5, 6].map(|path| (Refused, Safe, path, at));
        close(score(&parts(10)), MISSING);
        let twice = [parts(10), parts(10)].concat();
        close(score(&twice), MISSING);
        let faded = 0.5_f64.powf(1.0 / 75.0);
        close(
            score(&[parts(10), parts(11)].concat()),
            MISSING * (1.0 + faded),
        );
        // A line that is late is none more.
        close(
            score(&[(Refused, Unsafe, 1, 10), (Refused, Unsafe, 1, 9)]),
            REFUSED,
        );
    }

    #[test]
    fn whoever_sends_a_form_after_pages_were_refused_begins_anew_and_only_once() {
        use Answer::Refused;
        use Method::{Safe, Unsafe};
        let page = |at| (Refused, Safe, 1, at);
        let form = |at| (Refused, Unsafe, 2, at);
        let close = |one: f64, other: f64| assert!((one - other).abs() < 0.3, "{one} {other}");
        close(score(&[page(1), page(2), page(3), form(4)]), REFUSED);
        close(score(&[form(1), page(2), page(3), form(4)]), 4.0 * REFUSED);
        let in_turn = [page(1), form(2), page(3), form(4), page(5), form(6)];
        close(score(&in_turn), 5.0 * REFUSED);
    }

    #[test]
    fn neither_the_form_nor_a_page_seen_before_pays_for_guesses_and_being_let_in_does() {
        use Answer::{Fine, Refused};
        use Method::{Safe, Unsafe};
        let close = |one: f64, other: f64| assert!((one - other).abs() < 0.3, "{one} {other}");
        let guesses = [(Refused, Unsafe, 101, 1), (Refused, Unsafe, 101, 2)];
        let after = |reply| score(&[&guesses[..], &[reply]].concat());
        close(after((Fine, Safe, 101, 3)), 2.0 * REFUSED);
        close(after((Fine, Safe, 102, 3)), 2.0 * REFUSED);
        close(after((Fine, Unsafe, 101, 3)), REFUSED);
        close(after((Fine, Safe, 7, 3)), 1.75 * REFUSED);
        // Of pages that are refused to programs first, and then not.
        assert_eq!(score(&[(Refused, Safe, 101, 1), (Fine, Safe, 101, 1)]), 0.0);
    }

    /// The definition: the score is the largest sum of faded steps over all answers from some one on to the newest, or nothing;
    /// what is counted begins where that sum does. Returns score, answers, failures, whether these are at a door, and different paths.
    fn by_definition(
        all: &[(Answer, Option<u32>, u32)],
        normal: (f64, f64),
    ) -> (f64, usize, usize, bool, usize) {
        let (refused, missing) = (normal.0.max(0.02), normal.1.max(0.05));
        let step = |answer| match answer {
            Answer::Refused => (0.98 / refused).ln(),
            Answer::Missing => (0.8 / missing).ln(),
            _ => (0.02 / (1.0 - refused)).ln(),
        };
        let Some((_, _, now)) = all.last() else {
            return (0.0, 0, 0, false, 0);
        };
        let mut sum = 0.0;
        let mut best = (0.0, all.len());
        for (place, (answer, _, at)) in all.iter().enumerate().rev() {
            sum += step(*answer) * (-f64::from(now - at) / 75.0).exp2();
            if sum >= best.0 {
                best = (sum, place);
            }
        }
        let counted = &all[best.1..];
        let failed = || {
            counted
                .iter()
                .filter(|(answer, ..)| *answer != Answer::Fine)
        };
        let paths: std::collections::BTreeSet<_> =
            failed().filter_map(|(_, path, _)| *path).collect();
        let refused = failed()
            .filter(|(answer, ..)| *answer == Answer::Refused)
            .count();
        // Sixteen paths are kept; what is missing at one of them again is nothing new.
        let mut kept = Vec::new();
        let mut missing = 0;
        for (answer, path, _) in failed() {
            let is_new = path.is_none_or(|path| !kept.contains(&path));
            missing += usize::from(*answer == Answer::Missing && is_new);
            if let Some(path) = path
                && is_new
                && kept.len() < 16
            {
                kept.push(*path);
            }
        }
        let is_at_a_door = refused > 0 && refused >= 3 * missing;
        (
            best.0,
            counted.len(),
            failed().count(),
            is_at_a_door,
            paths.len(),
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, rng_seed: prop::test_runner::RngSeed::Fixed(1954), ..ProptestConfig::default() })]

        #[test]
        fn the_score_is_that_of_the_definition(
            answers in prop::collection::vec((0_u8..10, prop::option::of(0_u32..40), 1_u32..30), 1..150),
            normal in (0.0..0.2, 0.0..0.2),
            letting_in in 0_u8..8,
        ) {
            let (mut series, mut all, mut now) = (Series::default(), Vec::new(), 1000);
            for (kind, path, pass) in answers {
                let answer = match kind {
                    9 => Answer::Neither,
                    kind if kind < letting_in => Answer::Fine,
                    kind if kind % 2 == 0 => Answer::Refused,
                    _ => Answer::Missing,
                };
                now += pass;
                // An answer that is fine speaks for the client in full where the log has no paths.
                let path = path.filter(|_| answer != Answer::Fine);
                let verdict = series.add(&settings(), reply(answer, path, now), normal);
                if answer == Answer::Neither {
                    prop_assert_eq!(verdict, None);
                    continue;
                }
                all.push((answer, path, now));
                let (score, counted, failures, is_at_a_door, distinct) = by_definition(&all, normal);
                prop_assert!((f64::from(series.score) - score).abs() < 1e-3 * score.max(1.0), "{} {}", series.score, score);
                // Sums that are next to nothing begin anew or not by the last digit.
                if score > 1e-3 {
                    prop_assert_eq!((series.answers as usize, series.failures as usize), (counted, failures));
                    prop_assert_eq!(series.paths.len(), distinct.min(16));
                }
                let is_broad = if path.is_some() { distinct.min(16) >= 10 } else { failures >= 20 };
                let is_guesser = is_at_a_door || is_broad;
                if (score - 13.8).abs() > 0.02 {
                    prop_assert_eq!(verdict.is_some(), answer != Answer::Fine && score > 13.8 && is_guesser);
                }
                if let Some(verdict) = verdict {
                    prop_assert_eq!((verdict.answers as usize, verdict.failures as usize), (counted, failures));
                }
            }
        }
    }

    #[test]
    fn where_the_site_itself_fails_nothing_is_held_against_anybody() {
        let flagged = |share: f64, answer| {
            let mut series = Series::default();
            (0..100).any(|n| {
                let reply = reply(answer, Some(n), 1000 + n);
                series.add(&settings(), reply, (share, share)).is_some()
            })
        };
        for answer in [Answer::Refused, Answer::Missing] {
            assert!(flagged(0.24, answer));
            assert!(!flagged(0.25, answer));
        }
    }

    #[test]
    fn with_no_score_to_reach_the_test_is_off() {
        let off = Settings {
            score: 0.0,
            ..settings()
        };
        let mut series = Series::default();
        assert!((0..100).all(|n| {
            let reply = reply(Answer::Refused, Some(n), 1000 + n);
            series.add(&off, reply, (0.0, 0.0)).is_none()
        }));
    }

    #[test]
    fn a_late_line_neither_fades_the_score_nor_turns_back_its_time() {
        let mut series = Series::default();
        let mut add = |at| {
            series.add(&settings(), reply(Answer::Missing, None, at), (0.0, 0.0));
            f64::from(series.score)
        };
        let step = 16_f64.ln();
        assert!((add(1000) - step).abs() < 1e-5);
        assert!((add(990) - 2.0 * step).abs() < 1e-5);
        assert!((add(1000) - 3.0 * step).abs() < 1e-5);
        assert!((add(1075) - 2.5 * step).abs() < 1e-5);
    }
}
