//! One absurd time must not carry all that follows into the past.

use std::time::Duration;

use portcullis_engine::parse::Record;

/// A line that is further ahead than this of all before it has to be confirmed by the next one.
const LEAP: Duration = Duration::from_hours(1);
/// So far ahead the last line of a log is believed, which no other can confirm.
const LAST: Duration = Duration::from_hours(24);

/// Holds back lines of one log whose times leap ahead, until the next line shows whether time did. A line that the next one is
/// far behind is dropped.
#[derive(Debug, Default)]
pub(super) struct Guard {
    newest: Option<Record>,
    held: Option<Record>,
    /// Lines that were dropped.
    pub(super) dropped: u64,
}

impl Guard {
    /// Takes the next line; hands on what is believed.
    pub(super) fn admit(&mut self, record: Record, to: &mut Vec<Record>) {
        if let Some(held) = self.held.take() {
            if record.at + LEAP < held.at {
                self.dropped += 1;
            } else {
                self.pass(held, to);
            }
        }
        match self.newest {
            Some(newest) if record.at <= newest.at + LEAP => self.pass(record, to),
            _ => self.held = Some(record),
        }
    }

    /// There are no more lines.
    pub(super) fn finish(&mut self, to: &mut Vec<Record>) {
        let Some(held) = self.held.take() else { return };
        if self.newest.is_none_or(|newest| held.at <= newest.at + LAST) {
            self.pass(held, to);
        } else {
            self.dropped += 1;
        }
    }

    fn pass(&mut self, record: Record, to: &mut Vec<Record>) {
        if self.newest.is_none_or(|newest| newest.at < record.at) {
            self.newest = Some(record);
        }
        to.push(record);
    }
}

#[cfg(test)]
mod tests {
    use portcullis_engine::Timestamp;

    use super::*;

    /// Seconds that come through, and how many did not.
    fn through(seconds: &[u64]) -> (Vec<u64>, u64) {
        let (mut guard, mut to) = (Guard::default(), Vec::new());
        for second in seconds {
            let at = Timestamp::from_secs(*second);
            guard.admit(Record::new(at, [192, 0, 2, 1].into(), 200), &mut to);
        }
        guard.finish(&mut to);
        (
            to.iter().map(|record| record.at.secs()).collect(),
            guard.dropped,
        )
    }

    #[test]
    fn what_nobody_confirms_is_dropped() {
        const YEAR: u64 = 365 * 86_400;
        for (seconds, expected, dropped) in [
            (&[10, 11, 12][..], &[10, 11, 12][..], 0),
            // In disorder, as workers write.
            (&[10, 9, 12], &[10, 9, 12], 0),
            (&[10, 11, YEAR, 12], &[10, 11, 12], 1),
            (&[YEAR, 11, 12], &[11, 12], 1),
            (&[10, YEAR, 2 * YEAR, 12], &[10, YEAR, 12], 1),
            // A pause.
            (&[10, 7210, 7211], &[10, 7210, 7211], 0),
            (&[10, YEAR, YEAR + 1], &[10, YEAR, YEAR + 1], 0),
            // The last ones.
            (&[YEAR], &[YEAR], 0),
            (&[10, 7210], &[10, 7210], 0),
            (&[10, YEAR], &[10], 1),
            (&[], &[], 0),
        ] {
            assert_eq!(
                through(seconds),
                (expected.to_vec(), dropped),
                "{seconds:?}"
            );
        }
    }
}
