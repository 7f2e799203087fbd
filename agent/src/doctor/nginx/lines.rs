//! What a log has been given last: can the agent read it, and whose requests are they?

use std::{
    fs::File,
    io::{self, Read as _, Seek as _, SeekFrom},
    path::Path,
};

use super::super::{Check, Plan};
use crate::source::{Piece, packed::Packing};

/// So much of the end of a log is read.
const LAST: u64 = 64 * 1024;
/// Fewer requests than this say nothing of whose they are: a balancer's own look at Nginx is one.
const TELLING: usize = 20;

/// `log` is a file that can be read.
pub(super) fn checks(plan: &Plan, log: &Path) -> Vec<Check> {
    let name = "log lines";
    if Packing::of(log).is_some() {
        return vec![Check::skipped(
            name,
            "it is packed: nobody writes to it any more",
        )];
    }
    match last(log, LAST) {
        Ok(piece) => judge(plan, log, &piece),
        Err(error) => vec![Check::fail(
            name,
            format!("{} cannot be read: {error}", log.display()),
            "see what is wrong with its file system",
        )],
    }
}

/// The whole lines among the last bytes of a file.
fn last(path: &Path, bytes: u64) -> io::Result<Piece> {
    let mut file = File::open(path)?;
    let mut start = file.metadata()?.len().saturating_sub(bytes);
    // The byte before it says whether a line begins there.
    let before = start.min(1);
    start -= before;
    file.seek(SeekFrom::Start(start))?;
    let mut text = Vec::new();
    file.take(bytes + before).read_to_end(&mut text)?;
    text.truncate(memchr::memrchr(b'\n', &text).map_or(0, |end| end + 1));
    if before > 0 {
        let first = memchr::memchr(b'\n', &text).map_or(text.len(), |end| end + 1);
        text.drain(..first);
        start += first as u64;
    }
    Ok(Piece {
        bytes: text,
        start,
        ..Piece::default()
    })
}

fn judge(plan: &Plan, log: &Path, piece: &Piece) -> Vec<Check> {
    let name = "log lines";
    let source = &plan.config.source;
    let mut clients = Vec::new();
    let (mut malformed, mut first) = (0_usize, None);
    for (offset, line) in piece.lines() {
        let problem = if line.len() > source.limits.max_line {
            "longer than source.max_line_bytes allows".to_owned()
        } else {
            match plan.config.engine.format.read(line) {
                Ok(record) => {
                    clients.push(record.client);
                    continue;
                }
                Err(problem) => problem.to_string(),
            }
        };
        malformed += 1;
        first.get_or_insert((offset, problem));
    }
    let all = clients.len() + malformed;
    let remedy = format!(
        "`portcullis lines {}` shows what is wrong with them: correct source.format, or the log_format",
        log.display()
    );
    let check = match first {
        None if all == 0 => Check::skipped(name, "no line is there yet"),
        None => Check::pass(name, format!("the last {all} can be read")),
        Some((offset, problem)) if clients.is_empty() => Check::fail(
            name,
            format!(
                "none of the last {all} can be read; the first of them, at byte {offset}, is {problem}"
            ),
            remedy,
        ),
        Some((offset, problem)) => Check::warn(
            name,
            format!(
                "{malformed} of the last {all} cannot be read; the first of them, at byte {offset}, is {problem}"
            ),
            remedy,
        ),
    };
    let proxies = &plan.config.engine.proxies;
    let is_proxy = |client| proxies.iter().any(|proxy| proxy.contains(client));
    let only_proxies = clients.len() >= TELLING && clients.iter().all(is_proxy);
    let proxied = only_proxies.then(|| {
        Check::warn(
            "log clients",
            format!(
                "the last {} requests all have a proxy of source.proxies for their client, and no proxy is ever banned",
                clients.len()
            ),
            "have Nginx take clients' addresses from its proxies: set_real_ip_from for each, and real_ip_header",
        )
    });
    [Some(check), proxied].into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{super::super::Outcome, *};
    use crate::config::Config;

    const GOOD: &str = r#"{"timestamp":"1700000000.1","source_ip":"192.0.2.1","status":"200"}"#;

    /// Of a log with this text.
    fn checked(config: &str, text: &str) -> Vec<Check> {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("access.json");
        fs::write(&log, text).unwrap();
        checks(&Plan::new(&Config::parse(config).unwrap()), &log)
    }

    #[test]
    fn lines_are_judged_by_the_agent_s_own_parser() {
        let of = |text: &str| {
            let checks = checked("", text);
            assert_eq!(checks.len(), 1, "{checks:#?}");
            (checks[0].outcome, checks[0].found.clone())
        };
        let good = format!("{GOOD}\n{GOOD}\n");
        assert_eq!(
            of(&good),
            (Outcome::Pass, "the last 2 can be read".to_owned())
        );
        let (outcome, found) = of(&format!("{good}what\n{GOOD}\nis this\n"));
        let at = format!("at byte {}, is not", good.len());
        assert!(
            outcome == Outcome::Warn && found.starts_with("2 of the last 5") && found.contains(&at),
            "{outcome:?} {found}"
        );
        let (outcome, found) = of("\nwhat\nis this\n");
        assert!(
            outcome == Outcome::Fail
                && found.starts_with("none of the last 2")
                && found.contains("at byte 1, is not"),
            "{outcome:?} {found}"
        );
        // Whose end is not written yet.
        assert_eq!(of(&format!("{GOOD}\n{{\"timest")).0, Outcome::Pass);
        for none in ["", "\n\n", "{\"timest"] {
            assert_eq!(of(none).0, Outcome::Skipped, "{none:?}");
        }
    }

    #[test]
    fn the_remedy_names_the_verb_that_shows_more() {
        let checks = checked("", "what\n");
        let remedy = checks[0].remedy.as_deref().unwrap();
        assert!(remedy.starts_with("`portcullis lines /"), "{remedy}");
    }

    #[test]
    fn one_that_is_too_long_is_not_read() {
        let long = GOOD.replace("200\"", &format!("200\",\"path\":\"{}\"", "x".repeat(2000)));
        let config = "[source]\nmax_line_bytes = 1024";
        let checks = checked(config, &format!("{GOOD}\n{long}\n"));
        assert!(
            checks[0].outcome == Outcome::Warn && checks[0].found.contains("max_line_bytes"),
            "{checks:#?}"
        );
    }

    #[test]
    fn of_a_long_log_the_whole_lines_at_its_end_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        fs::write(&log, "one\ntwo\nthree\nfo").unwrap();
        for (bytes, start, text) in [
            (100, 0, "one\ntwo\nthree\n"),
            (16, 0, "one\ntwo\nthree\n"),
            (15, 4, "two\nthree\n"),
            (12, 4, "two\nthree\n"),
            (11, 8, "three\n"),
            (7, 14, ""),
            (1, 15, ""),
        ] {
            let piece = last(&log, bytes).unwrap();
            let read = str::from_utf8(&piece.bytes).unwrap();
            if text.is_empty() {
                assert_eq!(read, "", "{bytes}");
            } else {
                assert_eq!((read, piece.start), (text, start), "{bytes}");
            }
        }
        assert!(last(&folder.path().join("none"), 1).is_err());
    }

    #[test]
    fn what_cannot_be_read_or_is_packed_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let plan = Plan::new(&Config::default());
        assert_eq!(checks(&plan, folder.path())[0].outcome, Outcome::Fail);
        let packed = checks(&plan, &folder.path().join("log.gz"));
        assert_eq!(packed[0].outcome, Outcome::Skipped);
    }

    #[test]
    fn requests_that_are_all_the_proxies_own_are_told() {
        let of = |config: &str, lines: usize, other: &str| {
            let text = format!("{}{other}", format!("{GOOD}\n").repeat(lines));
            checked(config, &text).len()
        };
        let proxied = "[source]\nproxies = ['192.0.2.0/24']";
        assert_eq!(of(proxied, TELLING, ""), 2);
        assert_eq!(of(proxied, TELLING - 1, ""), 1);
        assert_eq!(of("", TELLING, ""), 1);
        let client = GOOD.replace("192.0.2.1", "203.0.113.7");
        assert_eq!(of(proxied, TELLING, &format!("{client}\n")), 1);
    }
}
