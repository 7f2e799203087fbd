//! Other programs: never for longer than a bound, never more of what they say than a bound.

use std::{
    env, fmt,
    io::Read,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc::Receiver,
    time::Duration,
};

use super::start;

/// No command may take longer.
const LIMIT: Duration = Duration::from_secs(5);
/// No more of its output is read.
const LONGEST: u64 = 1 << 20;
/// Folders for system administration, which a user's search path may lack.
const SBIN: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];

/// What a program has said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Said {
    /// It has ended with exit code 0.
    pub(super) ok: bool,
    pub(super) out: String,
    pub(super) err: String,
}

impl Said {
    /// The last thing that it complained about, or said at all.
    pub(super) fn complaint(&self) -> &str {
        let last = |text| -> Option<&str> {
            let lines = str::lines(text).map(str::trim);
            lines.rev().find(|line| !line.is_empty())
        };
        last(&self.err)
            .or_else(|| last(&self.out))
            .unwrap_or("failed without a word")
    }
}

/// Why it has said nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// It is not installed.
    Missing,
    /// It could not be started, or took too long.
    Failed(String),
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => f.write_str("not installed"),
            Self::Failed(why) => f.write_str(why),
        }
    }
}

/// Runs a program without input, in the network namespace of the calling thread.
pub(super) fn run(program: &str, args: &[&str]) -> Result<Said, Trouble> {
    run_within(LIMIT, program, args)
}

fn run_within(limit: Duration, program: &str, args: &[&str]) -> Result<Said, Trouble> {
    let path = find(program).ok_or(Trouble::Missing)?;
    let failed = |error: std::io::Error| Trouble::Failed(format!("cannot be run: {error}"));
    let mut child = Command::new(path)
        .args(args)
        .env("LC_ALL", "C")
        .env("PATH", search_path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let (out, err) = (
        child.stdout.take().and_then(collect),
        child.stderr.take().and_then(collect),
    );
    // The end of both pipes is the end of the program, or near it.
    let hear = |pipe: Option<Receiver<String>>| pipe.and_then(|pipe| pipe.recv_timeout(limit).ok());
    let heard = hear(out).and_then(|out| Some((out, hear(err)?)));
    let Some((out, err)) = heard else {
        // Fails only if it has ended in between.
        let _ended = child.kill();
        let _status = child.wait();
        return Err(Trouble::Failed(format!(
            "took longer than {} s and was ended",
            limit.as_secs()
        )));
    };
    let status = child.wait().map_err(failed)?;
    Ok(Said {
        ok: status.success(),
        out,
        err,
    })
}

/// Reads a pipe to its end or to the bound, on a thread of its own.
fn collect(pipe: impl Read + Send + 'static) -> Option<Receiver<String>> {
    start(move || {
        let mut bytes = Vec::new();
        // What was read before an error is all that there is.
        let _read = pipe.take(LONGEST).read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

fn folders() -> Vec<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = env::split_paths(&path)
        .filter(|folder| folder.is_absolute())
        .collect();
    for folder in SBIN.map(Path::new) {
        if !folders.iter().any(|known| known == folder) {
            folders.push(folder.to_owned());
        }
    }
    folders
}

fn search_path() -> std::ffi::OsString {
    env::join_paths(folders()).unwrap_or_else(|_| SBIN.join(":").into())
}

/// Where a program is.
pub(super) fn find(program: &str) -> Option<PathBuf> {
    folders()
        .into_iter()
        .map(|folder| folder.join(program))
        .find(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_s_words_and_end_are_told_apart() {
        let said = run(
            "sh",
            &["-c", "echo out; echo first >&2; echo last >&2; exit 3"],
        )
        .unwrap();
        assert_eq!(
            (said.ok, said.out.as_str(), said.complaint()),
            (false, "out\n", "last")
        );
        assert_eq!(
            run("true", &[]).unwrap().complaint(),
            "failed without a word"
        );
        assert_eq!(run("no-such-program", &[]), Err(Trouble::Missing));
    }

    #[test]
    fn one_that_hangs_or_never_stops_talking_is_ended() {
        let hung = run_within(Duration::from_millis(50), "sleep", &["60"]).unwrap_err();
        assert!(hung.to_string().contains("was ended"), "{hung}");
        let endless = run("yes", &[]).unwrap();
        assert_eq!(endless.out.len() as u64, LONGEST);
    }
}
