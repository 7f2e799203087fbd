//! Counts tests from what the test harness prints.

use std::{fmt, ops::AddAssign};

/// How many tests ended how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    pub passed: u64,
    pub failed: u64,
    /// Ignored by an attribute, or left out for want of privileges.
    pub skipped: u64,
}

impl Summary {
    /// How many tests did run.
    pub fn ran(self) -> u64 {
        self.passed + self.failed
    }
}

impl AddAssign for Summary {
    fn add_assign(&mut self, rhs: Self) {
        self.passed += rhs.passed;
        self.failed += rhs.failed;
        self.skipped += rhs.skipped;
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            passed,
            failed,
            skipped,
        } = self;
        write!(f, "{passed} passed, {failed} failed, {skipped} skipped")
    }
}

/// Reads a harness's closing line, `test result: ok. 3 passed; 0 failed; 1 ignored; …`; none if it is another line.
pub fn parse_result(line: &str) -> Option<Summary> {
    let (_verdict, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let count = |what: &str| -> Option<u64> {
        counts
            .split("; ")
            .find_map(|part| part.strip_suffix(what)?.trim_end().parse().ok())
    };
    Some(Summary {
        passed: count("passed")?,
        failed: count("failed")?,
        skipped: count("ignored")?,
    })
}

/// Whether the line names one test in the output of `--list`.
pub fn is_listed_test(line: &str) -> bool {
    line.ends_with(": test")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_line_is_read() {
        let line = "test result: FAILED. 12 passed; 2 failed; 3 ignored; 0 measured; 1 filtered out; finished in 0.01s";
        let expected = Summary {
            passed: 12,
            failed: 2,
            skipped: 3,
        };
        assert_eq!(parse_result(line), Some(expected));
    }

    #[test]
    fn other_lines_are_not_results() {
        for line in [
            "",
            "running 3 tests",
            "test a::b ... ok",
            "test result: ok",
            "test result: ok. many passed; 0 failed; 0 ignored",
            " test result: ok. 1 passed; 0 failed; 0 ignored",
            "all doctests ran in 0.44s; merged doctests compilation took 0.31s",
        ] {
            assert_eq!(parse_result(line), None, "{line:?}");
        }
    }

    #[test]
    fn the_closing_line_adds_up() {
        let mut total = Summary::default();
        total += Summary {
            passed: 2,
            failed: 0,
            skipped: 1,
        };
        total += Summary {
            passed: 1,
            failed: 4,
            skipped: 0,
        };
        assert_eq!(total.to_string(), "3 passed, 4 failed, 1 skipped");
        assert_eq!(total.ran(), 7);
    }

    #[test]
    fn a_list_names_tests() {
        assert!(is_listed_test("verdicts::a_banned_source_is_dropped: test"));
        assert!(!is_listed_test("2 tests, 0 benchmarks"));
        assert!(!is_listed_test("speed: benchmark"));
    }
}
