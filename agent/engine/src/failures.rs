//! A sequential test on a client's answers: does it fail as scanners and password guessers do?
//!
//! Wald's sequential probability ratio test, one-sided as a CUSUM: each answer moves a score by the logarithm of how much likelier
//! it is from somebody who guesses than from anybody else, and the score never falls below nothing (Page, Biometrika 1954; on
//! failing connections Jung, Paxson, Berger and Balakrishnan, Fast Portscan Detection Using Sequential Hypothesis Testing, IEEE
//! S&P 2004). Time takes the score back, so that a program that asks in vain now and then is no guesser.

use serde::{Deserialize, Serialize};

use crate::parse::{Record, TargetKind};

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

/// How an answer counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// As one that did not fail.
    Fine,
    /// Not let in: what guessed passwords get.
    Refused,
    /// Not there, or not understood: what guessed paths get.
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
            // What comes with a page says nothing of who asks for it.
            (0..400, Some(TargetKind::Unbidden | TargetKind::Asset | TargetKind::Filed)) => {
                Self::Neither
            }
            (0..400, _) => Self::Fine,
            (401, _) => Self::Refused,
            // A page that lacks its pictures fails for everybody who opens it.
            (_, Some(TargetKind::Unbidden | TargetKind::Asset)) => Self::Neither,
            (403, _) => Self::Refused,
            (400 | 404 | 405 | 406 | 410 | 414 | 421 | 431 | 444 | 451, _) => Self::Missing,
            _ => Self::Neither,
        }
    }
}

/// What a client's answers have come to.
#[derive(Clone, Debug, Default)]
pub struct Series {
    score: f32,
    /// The second of the newest answer.
    at: u32,
    answers: u32,
    failures: u32,
    refused: u32,
    paths: smallvec::SmallVec<[u32; 4]>,
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
    /// Takes in an answer of second `at`. `normal` are the shares of refused and of missing answers that others get now.
    /// `distinct` is wanted only where the log has paths.
    pub fn add(
        &mut self,
        settings: &Settings,
        answer: Answer,
        path: Option<u32>,
        at: u32,
        normal: (f64, f64),
    ) -> Option<Verdict> {
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
        let elapsed = f64::from(at.saturating_sub(self.at));
        let faded = f64::from(self.score) * (-elapsed / settings.half_life_secs).exp2();
        self.at = self.at.max(at);
        let step = match answer {
            Answer::Refused => (GUESSER_REFUSED / refused).ln(),
            Answer::Missing => (GUESSER_MISSING / missing).ln(),
            // Whoever is let in, or finds something: as little likely as the less telling of the two says.
            _ => ((1.0 - GUESSER_REFUSED) / (1.0 - refused)).ln(),
        };
        let score = faded + step;
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
        let kept = score as f32;
        self.score = kept;
        self.answers += 1;
        if answer == Answer::Fine {
            return None;
        }
        self.failures += 1;
        self.refused += u32::from(answer == Answer::Refused);
        if let Some(path) = path
            && self.paths.len() < MAX_DISTINCT
            && !self.paths.contains(&path)
        {
            self.paths.push(path);
        }
        #[expect(clippy::cast_possible_truncation, reason = "sixteen at most")]
        let distinct = self.paths.len() as u32;
        // Where the log has no paths, twice as many failures stand for them.
        let is_broad = match path {
            Some(_) => distinct >= settings.distinct,
            None => self.failures >= 2 * settings.distinct,
        };
        let is_at_a_door = 4 * self.refused >= 3 * self.failures;
        let is_guesser = is_at_a_door || is_broad;
        (score > settings.score && is_guesser).then_some(Verdict {
            score,
            answers: self.answers,
            failures: self.failures,
            distinct,
        })
    }

    /// How it stands at second `at`, with the score faded by then.
    #[must_use]
    pub fn standing(&self, settings: &Settings, at: u32) -> Verdict {
        let elapsed = f64::from(at.saturating_sub(self.at));
        Verdict {
            score: f64::from(self.score) * (-elapsed / settings.half_life_secs).exp2(),
            answers: self.answers,
            failures: self.failures,
            distinct: u32::try_from(self.paths.len()).unwrap_or(u32::MAX),
        }
    }

    /// Has the client failed at all since the score last stood at nothing?
    #[must_use]
    pub const fn has_failed(&self) -> bool {
        self.failures > 0
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

    /// The definition: the score is the largest sum of faded steps over all answers from some one on to the newest, or nothing;
    /// what is counted begins where that sum does. Returns score, answers, failures, refused, and different paths.
    fn by_definition(
        all: &[(Answer, Option<u32>, u32)],
        normal: (f64, f64),
    ) -> (f64, usize, usize, usize, usize) {
        let (refused, missing) = (normal.0.max(0.02), normal.1.max(0.05));
        let step = |answer| match answer {
            Answer::Refused => (0.98 / refused).ln(),
            Answer::Missing => (0.8 / missing).ln(),
            _ => (0.02 / (1.0 - refused)).ln(),
        };
        let Some((_, _, now)) = all.last() else {
            return (0.0, 0, 0, 0, 0);
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
        (
            best.0,
            counted.len(),
            failed().count(),
            refused,
            paths.len(),
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, rng_seed: prop::test_runner::RngSeed::Fixed(1954), ..ProptestConfig::default() })]

        #[test]
        fn the_score_is_that_of_the_definition(
            answers in prop::collection::vec((0_u8..10, prop::option::of(0_u32..40), 0_u32..30), 1..150),
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
                let verdict = series.add(&settings(), answer, path, now, normal);
                if answer == Answer::Neither {
                    prop_assert_eq!(verdict, None);
                    continue;
                }
                all.push((answer, path, now));
                let (score, counted, failures, refused, distinct) = by_definition(&all, normal);
                prop_assert!((f64::from(series.score) - score).abs() < 1e-3 * score.max(1.0), "{} {}", series.score, score);
                // Sums that are next to nothing begin anew or not by the last digit.
                if score > 1e-3 {
                    prop_assert_eq!((series.answers as usize, series.failures as usize), (counted, failures));
                    prop_assert_eq!(series.paths.len(), distinct.min(16));
                }
                let is_broad = if path.is_some() { distinct.min(16) >= 10 } else { failures >= 20 };
                let is_guesser = 4 * refused >= 3 * failures || is_broad;
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
                series
                    .add(&settings(), answer, Some(n), 1000, (share, share))
                    .is_some()
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
            series
                .add(&off, Answer::Refused, Some(n), 1000, (0.0, 0.0))
                .is_none()
        }));
    }

    #[test]
    fn a_late_line_neither_fades_the_score_nor_turns_back_its_time() {
        let mut series = Series::default();
        let mut add = |at| {
            series.add(&settings(), Answer::Refused, None, at, (0.0, 0.0));
            f64::from(series.score)
        };
        let step = 49_f64.ln();
        assert!((add(1000) - step).abs() < 1e-5);
        assert!((add(990) - 2.0 * step).abs() < 1e-5);
        assert!((add(1000) - 3.0 * step).abs() < 1e-5);
        assert!((add(1075) - 2.5 * step).abs() < 1e-5);
    }
}
