//! How the site stands: which share of answers fails for those who have given no reason to doubt them. Where the site itself fails,
//! nobody is to be blamed for it.

use crate::failures::{Answer, SITE_FAILS};

/// Half of what is known of others' answers is gone after so many seconds.
const HALF_LIFE: f64 = 60.0;
/// Shares of others' answers say something from so many on …
const LEAST: f64 = 10.0;
/// … and when so many different clients have failed, each of them within two half-lives: one or two would hide all who guess …
const VOICES: usize = 3;
/// … and so many where it is not known that there was anything.
const STRANGE_VOICES: usize = 8;
/// What one client says is counted once in so many seconds.
const SAYS_AGAIN: u64 = 20;
/// For so long the site is taken to fail once it did: soon nobody is left who could say it again.
const FAILS_SECS: u64 = 900;

/// One way to fail.
#[derive(Debug)]
struct Way<const VOICES: usize> {
    answers: f64,
    /// Who failed last, and when.
    voices: [(u32, u64); VOICES],
    /// The second until which the site is taken to fail in this way.
    until: u64,
}

impl<const VOICES: usize> Default for Way<VOICES> {
    fn default() -> Self {
        Self {
            answers: 0.0,
            voices: [(0, 0); VOICES],
            until: 0,
        }
    }
}

impl<const VOICES: usize> Way<VOICES> {
    fn add(&mut self, client: u32, second: u64) {
        let known = self.voices.iter().position(|(one, _)| *one == client);
        let before = known.map_or(0, |place| self.voices[place].1);
        if known.is_some() && second < before + SAYS_AGAIN {
            return;
        }
        self.answers += 1.0;
        self.voices[..=known.unwrap_or(VOICES - 1)].rotate_right(1);
        self.voices[0] = (client, second);
    }

    fn share(&self, all: f64, second: u64) -> f64 {
        let is_recent = |(_, at): &(u32, u64)| second.saturating_sub(*at) as f64 <= 2.0 * HALF_LIFE;
        if all >= LEAST && self.voices.iter().all(is_recent) {
            self.answers / all
        } else {
            0.0
        }
    }

    /// Does it fail now? Then it is taken to fail for a while.
    fn settle(&mut self, all: f64, second: u64) {
        if self.share(all, second) >= SITE_FAILS {
            self.until = second + FAILS_SECS;
        }
    }

    fn held(&self, all: f64, second: u64) -> f64 {
        let share = self.share(all, second);
        let fails = (self.until.saturating_sub(FAILS_SECS)..self.until).contains(&second);
        if fails { share.max(SITE_FAILS) } else { share }
    }
}

/// Counts of answers, fading with time.
#[derive(Debug, Default)]
pub struct Standing {
    at: u64,
    fine: f64,
    refused: Way<VOICES>,
    missing: Way<VOICES>,
    strange: Way<STRANGE_VOICES>,
}

impl Standing {
    /// Takes in an answer. `was_there`: others have found it before.
    pub fn add(&mut self, answer: Answer, was_there: bool, client: u32, second: u64) {
        if second > self.at {
            let elapsed = (second - self.at) as f64;
            let kept = (-elapsed / HALF_LIFE).exp2();
            for count in [
                &mut self.fine,
                &mut self.refused.answers,
                &mut self.missing.answers,
                &mut self.strange.answers,
            ] {
                *count *= kept;
            }
            self.at = second;
        }
        match answer {
            Answer::Fine => self.fine += 1.0,
            Answer::Refused => self.refused.add(client, second),
            Answer::Missing if was_there => self.missing.add(client, second),
            Answer::Missing => self.strange.add(client, second),
            Answer::Neither => return,
        }
        let all = self.all();
        self.refused.settle(all, second);
        self.missing.settle(all, second);
        self.strange.settle(all, second);
    }

    /// Shares of refused and of missing answers.
    #[must_use]
    pub fn shares(&self, second: u64) -> (f64, f64) {
        let all = self.all();
        let missing = self.missing.held(all, second);
        let strange = self.strange.held(all, second);
        (self.refused.held(all, second), missing.max(strange))
    }

    fn all(&self) -> f64 {
        self.fine + self.refused.answers + self.missing.answers + self.strange.answers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_site_that_failed_is_taken_to_fail_when_nobody_is_left_who_could_say_so() {
        let mut standing = Standing::default();
        (0..20).for_each(|client| standing.add(Answer::Fine, true, client, 1000));
        assert_eq!(standing.shares(1000), (0.0, 0.0));
        (1..8).for_each(|client| standing.add(Answer::Missing, true, client, 1002));
        assert!(standing.shares(1002).1 >= SITE_FAILS);
        standing.add(Answer::Missing, true, 1, 1500);
        assert_eq!(standing.shares(1500), (0.0, SITE_FAILS));
        assert_eq!(standing.shares(1002 + FAILS_SECS), (0.0, 0.0));
        assert_eq!(standing.shares(10), (0.0, 0.0), "the clock was set back");
    }

    #[test]
    fn one_or_two_who_fail_again_and_again_are_not_the_site() {
        for (answer, was_there, voices) in [
            (Answer::Refused, true, 3),
            (Answer::Missing, true, 3),
            (Answer::Missing, false, 8),
        ] {
            let mut standing = Standing::default();
            let share = |standing: &Standing| {
                let (refused, missing) = standing.shares(1000);
                refused.max(missing)
            };
            (0..8).for_each(|client| standing.add(Answer::Fine, true, client, 1000));
            for n in 0..100 {
                standing.add(answer, was_there, 7 + n % (voices - 1), 1000);
                assert_eq!(share(&standing), 0.0);
            }
            standing.add(answer, was_there, 99, 1000);
            assert!(share(&standing) >= SITE_FAILS);
        }
    }
}
