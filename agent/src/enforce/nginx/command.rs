//! Nginx's own commands: never for longer than a bound, never more of what they say than explains a failure.

use std::{
    io::Read as _,
    os::{fd::AsFd as _, unix::process::CommandExt as _},
    process::{Child, ChildStderr, Command, ExitStatus, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::{Signal, killpg},
    unistd::Pid,
};

use crate::runtime::clock;

/// So long after its end at most is a command found to have ended. Most are found at once, by the end of what they say.
const STEP: Duration = Duration::from_millis(20);
/// What was killed is waited for so long; only a process that hangs in the kernel takes longer.
const LAST_WAIT: Duration = Duration::from_secs(1);
/// Of its words so many bytes are kept, and the last so many characters told.
const KEPT: usize = 4096;
const TOLD: usize = 300;

/// Runs a command without a shell and without input. One that takes longer than `limit` is killed, and all that it has
/// started with it.
///
/// # Errors
/// When it cannot be started, fails, or takes too long: with the last that it has said.
pub(super) fn run(command: &[String], limit: Duration) -> Result<()> {
    let name = command.join(" ");
    let (program, arguments) = command.split_first().context("no command is given")?;
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .with_context(|| format!("{name} cannot be started"))?;
    let mut words = Words {
        pipe: child.stderr.take(),
        kept: Vec::new(),
    };
    let Some(status) = wait(&mut child, &mut words, limit)? else {
        kill(&mut child, &mut words)?;
        bail!(
            "{name} took longer than {limit:?} and was killed{}",
            words.told()
        );
    };
    if !status.success() {
        words.listen_to_the_end();
        bail!("{name}: {status}{}", words.told());
    }
    Ok(())
}

/// How a command has ended, if it has in this time.
fn wait(child: &mut Child, words: &mut Words, limit: Duration) -> Result<Option<ExitStatus>> {
    let end = clock::boot() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        let left = end.saturating_sub(clock::boot());
        if left.is_zero() {
            return Ok(None);
        }
        words.listen(left.min(STEP));
    }
}

/// Ends a command's whole process group. Nobody else has waited for it, so the group is still its own.
fn kill(child: &mut Child, words: &mut Words) -> Result<()> {
    killpg(Pid::from_raw(child.id().cast_signed()), Signal::SIGKILL)?;
    wait(child, words, LAST_WAIT)?;
    Ok(())
}

/// What a command says on its standard error.
struct Words {
    /// Until its end.
    pipe: Option<ChildStderr>,
    /// The last of it.
    kept: Vec<u8>,
}

impl Words {
    /// Waits for more, but no longer than this; says whether there was any.
    fn listen(&mut self, within: Duration) -> bool {
        let timeout = PollTimeout::try_from(within).unwrap_or(PollTimeout::ZERO);
        let Some(pipe) = &mut self.pipe else {
            // A command that has closed it and goes on.
            let _nothing = poll(&mut [], timeout);
            return false;
        };
        let ready = poll(&mut [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)], timeout);
        if !ready.is_ok_and(|ready| ready > 0) {
            return false;
        }
        let mut some = [0; KEPT];
        let read = pipe.read(&mut some).unwrap_or(0);
        if read == 0 {
            self.pipe = None;
        }
        self.kept.extend_from_slice(&some[..read]);
        self.kept.drain(..self.kept.len().saturating_sub(KEPT));
        read > 0
    }

    /// What is in the pipe already. What the command has started may go on talking, so it is not waited for, and the pipe
    /// not read for ever.
    fn listen_to_the_end(&mut self) {
        for _ in 0..64 {
            if !self.listen(Duration::ZERO) {
                return;
            }
        }
    }

    /// The last of it on one line, behind a colon; nothing if nothing was said.
    fn told(&self) -> String {
        let text = String::from_utf8_lossy(&self.kept);
        let lines: Vec<&str> = text
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty())
            .collect();
        let line: Vec<char> = lines
            .join("; ")
            .chars()
            .filter(|char| !char.is_control())
            .collect();
        let last: String = line.iter().skip(line.len().saturating_sub(TOLD)).collect();
        if last.is_empty() {
            last
        } else {
            format!(": {last}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, limit: Duration) -> Result<()> {
        run(&["sh", "-c", script].map(str::to_owned), limit)
    }

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn a_failure_is_told_with_the_last_words_on_one_line() {
        let problem =
            shell("printf 'first\\n\\033[1mlast\\a\\n\\n' >&2; exit 3", LONG).unwrap_err();
        let problem = problem.to_string();
        assert!(
            problem.ends_with("exit status: 3: first; [1mlast"),
            "{problem}"
        );
        let silent = shell("exit 4", LONG).unwrap_err().to_string();
        assert!(silent.ends_with("exit status: 4"), "{silent}");
        let killed = shell("kill -9 $$", LONG).unwrap_err().to_string();
        assert!(killed.contains("signal: 9"), "{killed}");
        let missing = run(&["/nowhere/nginx".to_owned()], LONG).unwrap_err();
        assert_eq!(
            format!("{missing:#}"),
            "/nowhere/nginx cannot be started: No such file or directory (os error 2)"
        );
        assert!(run(&[], LONG).is_err());
    }

    #[test]
    fn one_that_says_much_is_heard_to_its_end_and_told_in_short() {
        let script =
            "head -c 3000000 /dev/zero | tr '\\0' x >&2; echo >&2; echo the end >&2; exit 1";
        let problem = shell(script, LONG).unwrap_err().to_string();
        let told = problem.rsplit(": ").next().unwrap();
        assert!(told.ends_with("x; the end"), "{problem}");
        assert_eq!(told.chars().count(), TOLD);
    }

    #[test]
    fn one_that_hangs_is_killed_with_all_that_it_has_started() {
        let folder = tempfile::tempdir().unwrap();
        let started = folder.path().join("started");
        let script = format!(
            "echo waiting >&2; sleep 600 & echo $! > {}; wait",
            started.display()
        );
        let before = clock::boot();
        let problem = shell(&script, Duration::from_millis(500)).unwrap_err();
        assert!(
            problem
                .to_string()
                .ends_with("took longer than 500ms and was killed: waiting"),
            "{problem}"
        );
        assert!(clock::boot().saturating_sub(before) < LONG);
        let pid = std::fs::read_to_string(started).unwrap();
        let state = || std::fs::read_to_string(format!("/proc/{}/stat", pid.trim()));
        // It is gone, or a zombie that nobody has waited for yet.
        let is_gone = || state().is_ok_and(|stat| !stat.contains(") Z ")).eq(&false);
        while !is_gone() {
            assert!(clock::boot().saturating_sub(before) < LONG, "{:?}", state());
            std::thread::yield_now();
        }
    }

    #[test]
    fn neither_who_keeps_the_pipe_nor_who_closes_it_is_waited_for() {
        let before = clock::boot();
        // It goes on in a session of its own, as a daemon does.
        shell("setsid sleep 5 & exit 0", LONG).unwrap();
        assert!(clock::boot().saturating_sub(before) < Duration::from_secs(4));
        shell("exec 2>&-; sleep 0.1; exit 0", LONG).unwrap();
    }
}
