//! Runs `iptables` and `ipset`: never through a shell, never for longer than a bound, and with one sentence when it fails.

use std::{
    env, fmt,
    io::{self, Read, Write as _},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::mpsc::{self, Receiver},
    thread,
    time::Duration,
};

/// Bound for a command; a microsecond for each byte of input comes on top (ipset takes a tenth of that).
const LIMIT: Duration = Duration::from_secs(10);

/// A command that did not do what it was to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    program: String,
    /// Exit code; `None` if it could not be started or was ended.
    pub(super) code: Option<i32>,
    /// The program or its kernel module is not there, so nothing of ours is there either.
    pub(super) is_unavailable: bool,
    /// The one line of the input, from 1, that is at fault.
    pub(super) line: Option<usize>,
    /// What is wrong, with the remedy where there is one.
    pub(super) reason: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.program, self.reason)
    }
}

impl std::error::Error for Failure {}

impl Failure {
    fn new(program: &str, reason: impl Into<String>) -> Self {
        Self {
            program: program.into(),
            code: None,
            is_unavailable: false,
            line: None,
            reason: reason.into(),
        }
    }

    /// From what the program wrote to standard error.
    fn of_output(program: &str, code: Option<i32>, stderr: &str) -> Self {
        let said = stderr.lines().map(str::trim).filter(|line| {
            !(line.is_empty() || line.starts_with('#') || line.starts_with("Try `"))
        });
        let said = said.collect::<Vec<_>>().join("; ");
        // "ipset v7.17: Error in line 3: Hash is full", "iptables v1.8.9 (nf_tables): Chain …"
        let said = match said.split_once(": ") {
            Some((name, rest)) if name.split(' ').next() == Some(program) => rest,
            _ => &said,
        };
        let (line, said) = said
            .strip_prefix("Error in line ")
            .and_then(|rest| rest.split_once(": "))
            .map_or((None, said), |(line, rest)| (line.parse().ok(), rest));
        let says = |signs: &[&str]| signs.iter().any(|sign| said.contains(sign));
        let failure = if says(&DENIED) {
            Self::new(program, "not permitted: run the agent as root")
        } else if says(&LACKING) {
            Self {
                is_unavailable: true,
                ..Self::new(
                    program,
                    format!("the kernel lacks a module: {MODPROBE} ({said})"),
                )
            }
        } else if said.is_empty() {
            Self::new(program, "failed without a word")
        } else {
            Self {
                line,
                ..Self::new(program, said)
            }
        };
        Self { code, ..failure }
    }
}

/// What both programs, and both flavours of iptables, say without rights.
const DENIED: [&str; 2] = ["ermission denied", "not permitted"];
/// What they say when the kernel cannot do it.
const LACKING: [&str; 4] = [
    "missing kernel module",
    "insmod",
    "Cannot open session to kernel",
    "not supported",
];
const MODPROBE: &str = "modprobe -a ip_set_hash_net xt_set iptable_filter ip6table_filter";

/// Runs a program in the network namespace of the calling thread, with `input` as its standard input, and returns what
/// it printed.
///
/// # Errors
/// When it is not installed, fails, or takes longer than the bound; it is killed then.
pub(super) fn run(program: &str, args: &[&str], input: String) -> Result<String, Failure> {
    let fail = |reason: String| Failure::new(program, reason);
    let path = find(program).ok_or_else(|| Failure {
        is_unavailable: true,
        ..fail(format!(
            "not installed: apt-get install {}",
            package(program)
        ))
    })?;
    let mut child = Command::new(path)
        .args(args)
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| fail(format!("cannot be started: {error}")))?;
    let spoken = converse(&mut child, input);
    if spoken.is_err() {
        // Fails only if it has ended in between.
        let _ended = child.kill();
    }
    // Whatever has closed its output, or was killed, is ending.
    let status = child
        .wait()
        .map_err(|error| fail(format!("cannot be waited for: {error}")))?;
    let (stdout, stderr) = spoken.map_err(|error| fail(error.to_string()))?;
    if status.success() {
        Ok(stdout)
    } else {
        Err(Failure::of_output(program, status.code(), &stderr))
    }
}

/// Feeds a program and collects what it says, at the same time, so that neither waits for the other's pipe to drain.
fn converse(child: &mut Child, input: String) -> io::Result<(String, String)> {
    let (Some(mut stdin), Some(stdout), Some(stderr)) =
        (child.stdin.take(), child.stdout.take(), child.stderr.take())
    else {
        return Err(io::Error::other("has no pipes"));
    };
    let limit = LIMIT + Duration::from_micros(input.len() as u64);
    let (stdout, stderr) = (collect(stdout)?, collect(stderr)?);
    // A program that stops reading gives the reason itself.
    thread::Builder::new().spawn(move || stdin.write_all(input.as_bytes()))?;
    let late = |_| {
        io::Error::other(format!(
            "took longer than {} s and was killed",
            limit.as_secs()
        ))
    };
    Ok((
        stdout.recv_timeout(limit).map_err(late)?,
        stderr.recv_timeout(limit).map_err(late)?,
    ))
}

/// Reads a pipe to its end, on a thread of its own.
fn collect(mut pipe: impl Read + Send + 'static) -> io::Result<Receiver<String>> {
    let (sender, receiver) = mpsc::channel();
    thread::Builder::new().spawn(move || {
        let mut bytes = Vec::new();
        if pipe.read_to_end(&mut bytes).is_ok() {
            // Nobody listens any more when it comes too late.
            let _late = sender.send(String::from_utf8_lossy(&bytes).into_owned());
        }
    })?;
    Ok(receiver)
}

fn package(program: &str) -> &str {
    if program == "ipset" {
        "ipset"
    } else {
        "iptables"
    }
}

/// Where a program is. A service's search path may lack the folders for system administration.
fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = env::split_paths(&path).filter(|folder| folder.is_absolute());
    folders
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|folder| folder.join(program))
        .find(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(program: &str, stderr: &str) -> (Option<usize>, String) {
        let failure = Failure::of_output(program, Some(1), stderr);
        (failure.line, failure.reason)
    }

    #[test]
    fn a_failure_is_one_sentence_without_the_program_s_version() {
        assert_eq!(
            reason(
                "ipset",
                "ipset v7.17: Error in line 1000: Hash is full, cannot add more elements\n"
            ),
            (Some(1000), "Hash is full, cannot add more elements".into())
        );
        assert_eq!(
            reason(
                "iptables-restore",
                "# Warning: iptables-legacy tables present\niptables-restore v1.8.9 (nf_tables): Set P doesn't exist.\n\n\
                 Error occurred at line: 3\nTry `iptables-restore -h' for more information.\n"
            ),
            (
                None,
                "Set P doesn't exist.; Error occurred at line: 3".into()
            )
        );
        assert_eq!(reason("ipset", ""), (None, "failed without a word".into()));
    }

    #[test]
    fn a_failure_names_the_remedy() {
        for denied in [
            "ipset v7.17: Kernel error received: Operation not permitted",
            "iptables v1.8.9 (nf_tables): Could not fetch rule set generation id: Permission denied (you must be root)",
            "Fatal: can't open lock file /run/xtables.lock: Permission denied",
        ] {
            assert!(reason("ipset", denied).1.contains("as root"), "{denied}");
        }
        for lacking in [
            "ipset v7.17: Cannot open session to kernel.",
            "Warning: Extension set revision 0 not supported, missing kernel module?\niptables: No chain by that name.",
            "iptables v1.8.9 (legacy): can't initialize iptables table `filter': Table does not exist (do you need to insmod?)",
        ] {
            assert!(
                reason("iptables", lacking).1.contains("modprobe"),
                "{lacking}"
            );
        }
        let missing = run("no-such-program", &[], String::new()).unwrap_err();
        assert_eq!(
            missing.to_string(),
            "no-such-program: not installed: apt-get install iptables"
        );
    }

    #[test]
    fn more_than_a_pipe_holds_goes_in_and_out() {
        let text = "0123456789abcde\n".repeat(1 << 18);
        assert_eq!(run("cat", &[], text.clone()).unwrap(), text);
        // Neither reads its input nor minds the writer.
        assert_eq!(run("true", &[], text).unwrap(), "");
    }
}
