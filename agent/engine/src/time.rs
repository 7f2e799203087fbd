//! A point in time, given by the caller: nothing in this crate reads a clock.

use std::{fmt, ops::Add, time::Duration};

use serde::{Deserialize, Serialize};

/// Milliseconds since the Unix epoch.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Timestamp(u64);

impl Timestamp {
    /// The latest time that is accepted from outside: the end of the year 9999.
    pub const MAX: Self = Self(253_402_300_799_999);

    /// From milliseconds since the epoch; later than [`Timestamp::MAX`] becomes that.
    #[must_use]
    pub const fn from_millis(millis: u64) -> Self {
        if millis > Self::MAX.0 {
            Self::MAX
        } else {
            Self(millis)
        }
    }

    /// From whole seconds since the epoch; later than [`Timestamp::MAX`] becomes that.
    #[must_use]
    pub const fn from_secs(secs: u64) -> Self {
        Self::from_millis(secs.saturating_mul(1000))
    }

    /// Milliseconds since the epoch.
    #[must_use]
    pub const fn millis(self) -> u64 {
        self.0
    }

    /// Whole seconds since the epoch.
    #[must_use]
    pub const fn secs(self) -> u64 {
        self.0 / 1000
    }

    /// The same moment by a clock that was set by so many milliseconds.
    #[must_use]
    pub const fn shifted(self, millis: i64) -> Self {
        Self::from_millis(self.0.saturating_add_signed(millis))
    }

    /// Time from `earlier` to `self`; zero where `earlier` is later.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Timestamp {
    type Output = Self;

    fn add(self, duration: Duration) -> Self {
        Self::from_millis(
            self.0
                .saturating_add(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)),
        )
    }
}

/// RFC 3339 in UTC, with milliseconds.
impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = i64::try_from(self.0)
            .ok()
            .and_then(|millis| jiff::Timestamp::from_millisecond(millis).ok());
        match time {
            Some(time) => write!(f, "{time:.3}"),
            None => write!(f, "{} ms", self.0),
        }
    }
}

/// A duration as people write it: `10m`, `2h`, `1h 30m`, `90s`.
///
/// # Errors
/// What is wrong with the text, for a person.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let hint = "write a length of time such as 90s, 10m, 2h or 1d";
    let text = text.trim();
    // jiff leaves days out of absolute durations because they can have 23 or 25 hours; a ban of a day has 24.
    let (days, rest) = match text.split_once('d') {
        Some((days, rest)) => (
            days.trim().parse::<u64>().map_err(|_| hint.to_owned())?,
            rest.trim(),
        ),
        None => (0, text),
    };
    let rest = if rest.is_empty() && days > 0 {
        Duration::ZERO
    } else {
        let parsed: jiff::SignedDuration = rest.parse().map_err(|_| hint.to_owned())?;
        Duration::try_from(parsed).map_err(|_| format!("must not be negative; {hint}"))?
    };
    days.checked_mul(86_400)
        .and_then(|secs| Duration::from_secs(secs).checked_add(rest))
        .ok_or_else(|| format!("is too long; {hint}"))
}

/// A duration as [`parse_duration`] reads it, to the second: `10m`, `2h`, `1d 2h`; `0s` for less than a second.
#[must_use]
pub fn format_duration(duration: Duration) -> String {
    let secs = duration.as_secs();
    let parts = [
        (secs / 86_400, 'd'),
        (secs / 3600 % 24, 'h'),
        (secs / 60 % 60, 'm'),
        (secs % 60, 's'),
    ];
    let parts: Vec<String> = parts
        .iter()
        .filter(|(n, _)| *n > 0)
        .map(|(n, unit)| format!("{n}{unit}"))
        .collect();
    if parts.is_empty() {
        "0s".to_owned()
    } else {
        parts.join(" ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_back_as_they_were_written() {
        for (text, secs) in [
            ("10m", 600),
            ("2h", 7200),
            ("1h 30m", 5400),
            ("90s", 90),
            ("1d", 86_400),
            ("1d 1s", 86_401),
        ] {
            let duration = parse_duration(text).unwrap();
            assert_eq!(duration.as_secs(), secs, "{text}");
            assert_eq!(
                parse_duration(&format_duration(duration)).unwrap(),
                duration,
                "{text}"
            );
        }
        for text in [
            "",
            "soon",
            "-5m",
            "10",
            "d",
            "99999999999999999999d",
            "213503982334602d",
        ] {
            assert!(parse_duration(text).is_err(), "{text:?} should be refused");
        }
    }

    #[test]
    fn the_far_future_is_capped_not_wrapped() {
        assert_eq!(Timestamp::MAX + Duration::MAX, Timestamp::MAX);
        assert_eq!(Timestamp::from_secs(u64::MAX), Timestamp::MAX);
        assert_eq!(
            Timestamp::from_secs(1_700_000_000).to_string(),
            "2023-11-14T22:13:20.000Z"
        );
    }
}
