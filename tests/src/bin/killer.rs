//! `killer PID N`: kills a process with SIGKILL before the N-th time (from 1) that it writes its ledger or a map of the kernel.
//!
//! So a test can end a real agent, with nothing built into it, at each place where it matters. Every thread is traced. Prints
//! `ready` when it watches, a line for each such write, and `killed` behind the last one. Ends when the process does, or when its
//! own standard input does: then the process goes on.

#![forbid(unsafe_code)]

use std::{
    collections::HashMap,
    fs,
    io::{Read as _, Write as _},
    process::ExitCode,
};

use anyhow::{Context as _, Result, bail};
use nix::{
    errno::Errno,
    libc::{self, c_long},
    sys::{
        ptrace::{self, Options},
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};

/// Commands of bpf(2) that change a map: `BPF_MAP_UPDATE_ELEM`, `…_DELETE_ELEM`, `…_UPDATE_BATCH`, `…_DELETE_BATCH`.
const MAP_CHANGES: [u64; 4] = [2, 3, 26, 27];
/// `PTRACE_EVENT_STOP`: a thread that was interrupted, or a new one.
const EVENT_STOP: i32 = 128;

fn main() -> ExitCode {
    match trace() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("killer: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn say(words: &str) {
    let mut out = std::io::stdout();
    // Whoever has started this may be gone; then there is nobody to tell.
    let _told = writeln!(out, "{words}").and_then(|()| out.flush());
}

fn trace() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let mut number = || -> Result<i32> {
        let argument = arguments.next().context("usage: killer PID N")?;
        argument.parse().context("usage: killer PID N")
    };
    let (process, at) = (Pid::from_raw(number()?), number()?);
    let options = Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_TRACECLONE;
    // Threads that come meanwhile are found in the next round; those of a traced one are traced from their beginning.
    let mut inside: HashMap<Pid, bool> = HashMap::new();
    loop {
        let mut is_complete = true;
        for entry in fs::read_dir(format!("/proc/{process}/task"))? {
            let thread = entry?.file_name();
            let thread = thread.to_str().context("a thread's number")?.parse()?;
            let thread = Pid::from_raw(thread);
            if inside.contains_key(&thread) {
                continue;
            }
            match ptrace::seize(thread, options) {
                Ok(()) => {
                    ptrace::interrupt(thread)?;
                    inside.insert(thread, false);
                    is_complete = false;
                }
                // By its parent's tracing, or it has ended.
                Err(Errno::EPERM | Errno::ESRCH) => {
                    inside.insert(thread, false);
                }
                Err(error) => bail!("cannot trace {thread}: {error}"),
            }
        }
        if is_complete {
            break;
        }
    }
    // Without the test nobody needs this: its end is this one's, and lets the process go.
    std::thread::spawn(|| {
        let _end = std::io::stdin().read(&mut [0]);
        #[expect(clippy::exit, reason = "the main thread waits for the process")]
        std::process::exit(0);
    });
    say("ready");
    let mut writes = 0;
    loop {
        let (thread, signal) = match waitpid(Pid::from_raw(-1), Some(WaitPidFlag::__WALL)) {
            Ok(WaitStatus::PtraceSyscall(thread)) => {
                let inside = inside.entry(thread).or_default();
                *inside = !*inside;
                if *inside && let Some(write) = write_of(process, thread) {
                    writes += 1;
                    say(&format!("{writes} {write}"));
                    if writes == at {
                        kill(process, Signal::SIGKILL)?;
                        say("killed");
                        return Ok(());
                    }
                }
                (thread, None)
            }
            Ok(WaitStatus::PtraceEvent(thread, _, event)) => {
                if event == EVENT_STOP {
                    inside.insert(thread, false);
                }
                (thread, None)
            }
            Ok(WaitStatus::Stopped(thread, signal)) => (thread, Some(signal)),
            Ok(_) | Err(Errno::EINTR) => continue,
            Err(Errno::ECHILD) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        match ptrace::syscall(thread, signal) {
            // It has ended meanwhile.
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// What the call that a thread is about to make writes, if that is the ledger or a map.
fn write_of(process: Pid, thread: Pid) -> Option<String> {
    let call = fs::read_to_string(format!("/proc/{process}/task/{thread}/syscall")).ok()?;
    let mut words = call.split_whitespace();
    let number: c_long = words.next()?.parse().ok()?;
    let first = u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok()?;
    if number == libc::SYS_bpf {
        return MAP_CHANGES
            .contains(&first)
            .then(|| format!("bpf command {first}"));
    }
    let name = match number {
        libc::SYS_write => "write",
        libc::SYS_pwrite64 => "pwrite",
        libc::SYS_fsync => "fsync",
        libc::SYS_fdatasync => "fdatasync",
        libc::SYS_ftruncate => "ftruncate",
        libc::SYS_fallocate => "fallocate",
        _ => return None,
    };
    let file = fs::read_link(format!("/proc/{process}/fd/{first}")).ok()?;
    let is_ledger = file.file_name()?.to_str()? == "ledger.redb";
    is_ledger.then(|| format!("{name} of the ledger"))
}
