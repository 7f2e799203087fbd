//! `portcullis doctor`: what on this host stands in the guard's way, and what to do about it.
//!
//! It only looks: nothing on the host is changed. What it finds out by trying (an ipset, an iptables rule, a load of the
//! kernel program), it tries in a network namespace of its own or without attaching. The one command of an operator's that it
//! runs is the one that tests Nginx's configuration, and that only while an Nginx runs, which has made by then what such a test
//! makes. Every section has a time limit of its own, so a hung file system or command costs that section and nothing else.

mod command;
pub(crate) mod device;
mod firewall;
mod interface;
mod kernel;
mod netlink;
mod nginx;
mod place;

use std::{
    env,
    fmt::Write as _,
    io::{self, IsTerminal as _},
    sync::mpsc::{self, Receiver},
    thread,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::{
    config::Config,
    enforce::{Backend, Mode},
    runtime::clock,
};

/// How a check has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// As it should be.
    Pass,
    /// The guard works, but less well than it could.
    Warn,
    /// The guard does not work, or its bans would do harm or nothing.
    Fail,
    /// Could not be looked at, or does not matter here.
    Skipped,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// What it is, in a few words.
    pub name: String,
    /// How it is.
    pub outcome: Outcome,
    /// What was seen.
    pub found: String,
    /// What to do about it; `None` when nothing needs to be done.
    pub remedy: Option<String>,
}

impl Check {
    fn pass(name: impl Into<String>, found: impl AsRef<str>) -> Self {
        Self::new(name, Outcome::Pass, found.as_ref(), None)
    }

    fn skipped(name: impl Into<String>, found: impl AsRef<str>) -> Self {
        Self::new(name, Outcome::Skipped, found.as_ref(), None)
    }

    fn warn(name: impl Into<String>, found: impl AsRef<str>, remedy: impl AsRef<str>) -> Self {
        Self::bad(Outcome::Warn, name, found, remedy)
    }

    fn fail(name: impl Into<String>, found: impl AsRef<str>, remedy: impl AsRef<str>) -> Self {
        Self::bad(Outcome::Fail, name, found, remedy)
    }

    fn bad(
        outcome: Outcome,
        name: impl Into<String>,
        found: impl AsRef<str>,
        remedy: impl AsRef<str>,
    ) -> Self {
        Self::new(name, outcome, found.as_ref(), Some(remedy.as_ref()))
    }

    fn new(name: impl Into<String>, outcome: Outcome, found: &str, remedy: Option<&str>) -> Self {
        Self {
            name: printable(&name.into()),
            outcome,
            found: printable(found),
            remedy: remedy.map(printable),
        }
    }
}

/// Names and files are other people's: nothing of them may steer a terminal or fill a screen.
fn printable(text: &str) -> String {
    const LONGEST: usize = 1000;
    let mut out = String::with_capacity(text.len().min(LONGEST));
    for (count, c) in text.chars().enumerate() {
        if count == LONGEST {
            out.push('…');
            break;
        }
        out.push(if c.is_control() { '\u{fffd}' } else { c });
    }
    out
}

/// What the checks go by.
#[derive(Clone, Debug)]
struct Plan {
    config: Config,
    /// XDP is one of the back ends.
    xdp: bool,
    /// How bad it is when XDP does not work: bad if nothing is tried after it.
    without_xdp: Outcome,
    /// iptables is one of the back ends.
    iptables: bool,
    /// How bad it is when iptables does not work: bad if nothing is tried before it.
    without_iptables: Outcome,
    /// How bad it is when a ban would do harm or nothing: bad if bans are enforced.
    harm: Outcome,
}

impl Plan {
    fn new(config: &Config) -> Self {
        let has = |backend| config.enforce.backends.contains(&backend);
        let xdp = has(Backend::XdpNative) || has(Backend::XdpGeneric);
        let iptables = has(Backend::Iptables);
        let unless = |other| if other { Outcome::Warn } else { Outcome::Fail };
        Self {
            config: config.clone(),
            xdp,
            without_xdp: unless(iptables || has(Backend::DryRun)),
            iptables,
            without_iptables: unless(xdp || has(Backend::DryRun)),
            harm: unless(config.mode == Mode::Observe),
        }
    }
}

/// No section may take longer. It holds several commands, each with a bound of its own.
const LIMIT: Duration = Duration::from_secs(20);

type Section = fn(&Plan) -> Vec<Check>;

/// Looks at everything. Takes as long as the slowest section, at most twenty seconds.
#[must_use]
pub fn run(config: &Config) -> Vec<Check> {
    let sections: [(&str, Section); 8] = [
        ("kernel", kernel::checks),
        ("interfaces", interface::checks),
        ("firewall", firewall::checks),
        ("Nginx", nginx::checks),
        ("syslog", nginx::syslog::checks),
        ("Nginx include", nginx::include::checks),
        ("state", place::checks),
        ("agent", place::agent),
    ];
    let plan = Plan::new(config);
    // A new thread is in its parent's network namespace.
    let running: Vec<_> = sections
        .into_iter()
        .map(|(name, section)| {
            let plan = plan.clone();
            (name, start(move || section(&plan)))
        })
        .collect();
    // All have started by now, so all have the same time.
    let end = clock::boot() + LIMIT;
    let collect = |(name, answer): (&str, Option<Receiver<_>>)| {
        let left = end.saturating_sub(clock::boot());
        let answer = answer.and_then(|answer| answer.recv_timeout(left).ok());
        answer.unwrap_or_else(|| {
            vec![Check::warn(
                name,
                format!("could not be looked at within {} s", LIMIT.as_secs()),
                "see what is hung: a network file system, or a process in state D (`ps -eo pid,stat,wchan,cmd`)",
            )]
        })
    };
    running.into_iter().flat_map(collect).collect()
}

/// Does something on a thread of its own, so that its answer need not be waited for for ever.
fn start<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<Receiver<T>> {
    let (sender, receiver) = mpsc::channel();
    let thread = thread::Builder::new().name("doctor".to_owned());
    thread
        .spawn(move || {
            // Nobody listens any more when it comes too late.
            let _late = sender.send(work());
        })
        .ok()?;
    Some(receiver)
}

/// Is there nothing that must be put right? Decides the exit code.
#[must_use]
pub fn is_sound(checks: &[Check]) -> bool {
    checks.iter().all(|check| check.outcome != Outcome::Fail)
}

/// As a person reads it: a line each, the remedy under it, the sum last. In plain ASCII where standard output is no
/// terminal, or one without UTF-8.
#[must_use]
pub fn show(checks: &[Check]) -> String {
    let locale = ["LC_ALL", "LC_CTYPE", "LANG"]
        .into_iter()
        .filter_map(|name| env::var(name).ok())
        .find(|value| !value.is_empty())
        .unwrap_or_default();
    render(checks, io::stdout().is_terminal() && speaks_utf8(&locale))
}

fn speaks_utf8(locale: &str) -> bool {
    let locale = locale.to_ascii_lowercase();
    locale.contains("utf-8") || locale.contains("utf8")
}

fn render(checks: &[Check], unicode: bool) -> String {
    let text = |text: &str| {
        if unicode {
            text.to_owned()
        } else {
            ascii(text)
        }
    };
    let width = checks
        .iter()
        .map(|check| text(&check.name).chars().count())
        .max()
        .unwrap_or_default()
        .min(32);
    let mut out = String::new();
    for check in checks {
        let sign = match (check.outcome, unicode) {
            (Outcome::Pass, true) => "✓",
            (Outcome::Warn, true) => "!",
            (Outcome::Fail, true) => "✗",
            (Outcome::Skipped, true) => "–",
            (Outcome::Pass, false) => "ok  ",
            (Outcome::Warn, false) => "warn",
            (Outcome::Fail, false) => "FAIL",
            (Outcome::Skipped, false) => "-   ",
        };
        let _ = writeln!(
            out,
            "{sign} {:<width$}  {}",
            text(&check.name),
            text(&check.found)
        );
        if let Some(remedy) = &check.remedy {
            let indent = sign.chars().count() + 1 + width + 2;
            let arrow = if unicode { "→" } else { "->" };
            let _ = writeln!(out, "{:indent$}{arrow} {}", "", text(remedy));
        }
    }
    let count = |outcome| {
        checks
            .iter()
            .filter(|check| check.outcome == outcome)
            .count()
    };
    let sum = format!(
        "{} passed, {} warned, {} failed, {} skipped",
        count(Outcome::Pass),
        count(Outcome::Warn),
        count(Outcome::Fail),
        count(Outcome::Skipped)
    );
    let verdict = if !is_sound(checks) {
        "not fit to guard: put right what failed"
    } else if count(Outcome::Warn) > 0 {
        "fit to guard, and could be better"
    } else {
        "fit to guard"
    };
    let _ = writeln!(out, "\n{sum}: {verdict}");
    out
}

/// The few signs beyond ASCII that are used here have a counterpart in it.
fn ascii(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '…' => out.push_str("..."),
            '≥' => out.push_str(">="),
            '→' => out.push_str("->"),
            '–' => out.push('-'),
            c if c.is_ascii() => out.push(c),
            _ => out.push('?'),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples() -> Vec<Check> {
        vec![
            Check::pass("kernel", "6.1.0"),
            Check::warn("MTU of eth0", "9000", "lower it …"),
            Check::fail("Nginx log", "nobody writes it", "add an access_log"),
            Check::skipped("clock", "unknown"),
        ]
    }

    #[test]
    fn each_line_has_its_sign_and_the_remedy_stands_under_it() {
        assert_eq!(
            render(&samples(), true),
            "✓ kernel       6.1.0\n\
             ! MTU of eth0  9000\n               → lower it …\n\
             ✗ Nginx log    nobody writes it\n               → add an access_log\n\
             – clock        unknown\n\n\
             1 passed, 1 warned, 1 failed, 1 skipped: not fit to guard: put right what failed\n"
        );
        let plain = render(&samples(), false);
        assert!(plain.is_ascii(), "{plain}");
        assert!(plain.contains("FAIL Nginx log"), "{plain}");
        assert!(plain.contains("-> lower it ..."), "{plain}");
        assert!(render(&[], true).contains("0 failed"));
    }

    #[test]
    fn only_a_failure_is_one() {
        assert!(!is_sound(&samples()));
        assert!(is_sound(&samples()[..2]));
    }

    #[test]
    fn what_others_have_named_cannot_steer_a_terminal() {
        let check = Check::pass("a\u{1b}[2Jb", format!("x\n✓ fake\u{7}{}", "y".repeat(5000)));
        assert_eq!(check.name, "a\u{fffd}[2Jb");
        assert!(!check.found.contains('\n') && check.found.chars().count() == 1001);
    }

    #[test]
    fn json_has_the_four_fields_always() {
        let json = serde_json::to_value(samples()).unwrap();
        assert_eq!(json[0]["outcome"], "pass");
        assert!(json[0]["remedy"].is_null());
        assert_eq!(json[2]["remedy"], "add an access_log");
        assert_eq!(json[1].as_object().unwrap().len(), 4);
        let back: Vec<Check> = serde_json::from_value(json).unwrap();
        assert_eq!(back, samples());
    }

    #[test]
    fn it_is_as_bad_as_what_remains_to_be_tried() {
        let plan = |backends: &str, mode: &str| {
            Plan::new(
                &Config::parse(&format!(
                    "mode = \"{mode}\"\n[enforce]\nbackends = [{backends}]"
                ))
                .unwrap(),
            )
        };
        let all = plan(r#""xdp-native", "xdp-generic", "iptables""#, "observe");
        assert_eq!(
            (all.without_xdp, all.without_iptables, all.harm),
            (Outcome::Warn, Outcome::Warn, Outcome::Warn)
        );
        let only = plan(r#""xdp-native""#, "enforce");
        assert_eq!(
            (only.without_xdp, only.iptables, only.harm),
            (Outcome::Fail, false, Outcome::Fail)
        );
    }

    #[test]
    fn a_terminal_is_asked_for_its_encoding() {
        assert!(speaks_utf8("de_DE.UTF-8") && speaks_utf8("C.utf8"));
        assert!(!speaks_utf8("C") && !speaks_utf8("de_DE@euro"));
    }
}
