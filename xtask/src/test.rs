//! `test`: every test of the workspace by plain `cargo test`, counted.

mod summary;

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context as _, Result};

use crate::{
    agent, fail,
    setup::{self, Purpose},
    sh,
};
use summary::{Summary, is_listed_test, parse_result};

/// The package whose test binaries may need privileges.
const TESTS: &str = "portcullis-tests";

/// What the name of a test binary begins with if it needs privileges.
const PRIVILEGED: &str = "kernel_";

/// Exit code where privileged tests were left out and nobody said that this is all right.
const LEFT_OUT: u8 = 3;

#[derive(Clone, Copy, Debug, clap::Args)]
pub struct Args {
    /// Leave out the tests that need root, and accept a run without them
    #[arg(long)]
    unprivileged: bool,
}

/// What is to be run, and how that came about.
#[derive(Debug, PartialEq, Eq)]
struct Scope {
    /// Test binaries that are left out.
    left_out: Vec<String>,
    /// Test binaries of [`TESTS`] that run.
    kept: Vec<String>,
}

impl Scope {
    fn new(binaries: Vec<String>, privileged: bool) -> Self {
        let (left_out, kept) = binaries
            .into_iter()
            .partition(|name| !privileged && name.starts_with(PRIVILEGED));
        Self { left_out, kept }
    }

    /// The arguments of each `cargo test` that is needed.
    fn runs(&self) -> Vec<Vec<String>> {
        let owned = |words: &[&str]| words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();
        if self.left_out.is_empty() {
            return vec![Vec::new()];
        }
        // Cargo cannot leave out one test binary; it can be given all others.
        let mut rest = owned(&["--package", TESTS, "--lib", "--bins"]);
        for name in &self.kept {
            rest.extend(owned(&["--test", name]));
        }
        let others = owned(&[
            "--workspace",
            "--exclude",
            TESTS,
            "--exclude",
            crate::toolchain::PACKAGE,
        ]);
        vec![others, rest]
    }
}

/// Runs the tests; the very last line printed is the summary.
pub fn run(args: Args) -> ExitCode {
    match run_tests(args) {
        Ok(code) => code,
        Err(error) => fail(&error),
    }
}

fn run_tests(args: Args) -> Result<ExitCode> {
    setup::ensure(Purpose::Build)?;
    let status = fs::read_to_string("/proc/self/status").context("cannot read own capabilities")?;
    let lacking = lacking_privileges(&status);
    let scope = Scope::new(
        test_binaries(&sh::root().join("tests/tests"))?,
        lacking.is_none() && !args.unprivileged,
    );

    // `cargo test` builds no other package's binary, and tests that cross crates start the agent's.
    let agent = agent::binaries()?;
    let mut total = Summary::default();
    let mut cargo_failed = false;
    for arguments in scope.runs() {
        let mut command = sh::cargo();
        command
            .args(["test", "--no-fail-fast"])
            .args(arguments)
            .env(agent::BINARY_ENV, &agent);
        let (summary, success) = stream(&mut command)?;
        total += summary;
        cargo_failed |= !success;
    }
    total.skipped += count_left_out(&scope)?;
    Ok(report(
        &scope,
        total,
        cargo_failed,
        args,
        lacking.as_deref(),
    ))
}

/// Runs one `cargo test`, passing its output on while counting; also whether Cargo was content.
fn stream(command: &mut Command) -> Result<(Summary, bool)> {
    sh::show(command);
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start cargo")?;
    let mut total = Summary::default();
    if let Some(stdout) = child.stdout.take() {
        let mut stdout = BufReader::new(stdout);
        let mut line = Vec::new();
        // Not `lines()`: a test may print bytes that are no UTF-8.
        while stdout
            .read_until(b'\n', &mut line)
            .context("cannot read cargo's output")?
            > 0
        {
            let text = String::from_utf8_lossy(&line);
            print!("{text}");
            if let Some(summary) = parse_result(text.trim_end()) {
                total += summary;
            }
            line.clear();
        }
    }
    Ok((total, child.wait()?.success()))
}

/// How many tests the binaries hold that are left out: they are built, and asked, but not run.
fn count_left_out(scope: &Scope) -> Result<u64> {
    if scope.left_out.is_empty() {
        return Ok(0);
    }
    let mut command = sh::cargo();
    command.args(["test", "--quiet", "--package", TESTS]);
    for name in &scope.left_out {
        command.args(["--test", name]);
    }
    command.args(["--", "--list"]).stderr(Stdio::inherit());
    sh::show(&command);
    let output = command.output().context("cannot start cargo")?;
    let tests = String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter(|line| is_listed_test(line))
        .count();
    Ok(u64::try_from(tests)?)
}

fn report(
    scope: &Scope,
    mut total: Summary,
    cargo_failed: bool,
    args: Args,
    lacking: Option<&str>,
) -> ExitCode {
    println!();
    if !scope.left_out.is_empty() {
        let why = lacking.unwrap_or("--unprivileged was given");
        println!("Left out, because {why}:");
        for name in &scope.left_out {
            println!("  tests/tests/{name}.rs");
        }
    }
    if cargo_failed && total.failed == 0 {
        // Otherwise the closing line would look like success.
        println!(
            "cargo failed although no test did: a crate did not compile, or a test binary ended early (see above)."
        );
        total.failed = 1;
    } else if total.ran() == 0 {
        println!("No test ran at all.");
        total.failed = 1;
    }
    let code = exit_code(total, !scope.left_out.is_empty() && !args.unprivileged);
    if code == LEFT_OUT {
        println!("Not a full run: run it as root, or accept that with --unprivileged.");
    }
    println!("{total}");
    ExitCode::from(code)
}

fn exit_code(total: Summary, left_out_unasked: bool) -> u8 {
    if total.failed > 0 || total.ran() == 0 {
        1
    } else if left_out_unasked {
        LEFT_OUT
    } else {
        0
    }
}

/// What keeps the process that has this `/proc/…/status` from the privileged tests, if anything.
fn lacking_privileges(status: &str) -> Option<String> {
    let fields: BTreeMap<_, _> = status
        .lines()
        .filter_map(|line| line.split_once(':'))
        .collect();
    let effective_uid = fields
        .get("Uid")
        .and_then(|ids| ids.split_whitespace().nth(1));
    if effective_uid != Some("0") {
        return Some("this is not root".to_owned());
    }
    let capabilities = fields
        .get("CapEff")
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0);
    // Numbers from capabilities(7). Network namespaces and mounts need CAP_SYS_ADMIN, which includes CAP_BPF.
    let missing: Vec<_> = [("CAP_NET_ADMIN", 12), ("CAP_SYS_ADMIN", 21)]
        .into_iter()
        .filter(|(_, bit)| capabilities & (1 << bit) == 0)
        .map(|(name, _)| name)
        .collect();
    (!missing.is_empty()).then(|| format!("this root lacks {}", missing.join(" and ")))
}

/// The names of the test binaries in a folder, as Cargo finds them.
fn test_binaries(folder: &Path) -> Result<Vec<String>> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Ok(Vec::new());
    };
    let mut names = Vec::new();
    for entry in entries {
        let path = entry.context("cannot list the test binaries")?.path();
        let is_binary =
            path.extension().is_some_and(|e| e == "rs") || path.join("main.rs").is_file();
        if let (true, Some(name)) = (is_binary, path.file_stem()) {
            names.push(name.to_string_lossy().into_owned());
        }
    }
    names.sort_unstable();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: &str = "Name:\txtask\nUid:\t0\t0\t0\t0\nCapEff:\t000001fffeffffff\n";

    fn binaries() -> Vec<String> {
        ["kernel_xdp", "replay"].map(str::to_owned).to_vec()
    }

    #[test]
    fn full_root_lacks_nothing() {
        assert_eq!(lacking_privileges(ROOT), None);
    }

    #[test]
    fn a_user_and_a_bounded_root_lack_something() {
        let user = ROOT.replace("Uid:\t0\t0", "Uid:\t1000\t1000");
        assert_eq!(
            lacking_privileges(&user).as_deref(),
            Some("this is not root")
        );
        let bounded = ROOT.replace("000001fffeffffff", "00000000a80435fb");
        assert_eq!(
            lacking_privileges(&bounded).as_deref(),
            Some("this root lacks CAP_SYS_ADMIN")
        );
        assert!(lacking_privileges("").is_some());
    }

    #[test]
    fn root_runs_everything_in_one_go() {
        let scope = Scope::new(binaries(), true);
        assert_eq!(scope.runs(), [Vec::<String>::new()]);
        assert_eq!(scope.left_out, Vec::<String>::new());
    }

    #[test]
    fn others_run_all_but_the_privileged_binaries() {
        let scope = Scope::new(binaries(), false);
        assert_eq!(scope.left_out, ["kernel_xdp"]);
        let runs = scope.runs().concat();
        assert!(runs.contains(&"replay".to_owned()), "{runs:?}");
        assert!(!runs.contains(&"kernel_xdp".to_owned()), "{runs:?}");
    }

    #[test]
    fn only_a_full_run_without_failures_is_green() {
        let passed = Summary {
            passed: 3,
            failed: 0,
            skipped: 1,
        };
        assert_eq!(exit_code(passed, false), 0);
        assert_eq!(exit_code(passed, true), LEFT_OUT);
        assert_eq!(
            exit_code(
                Summary {
                    failed: 1,
                    ..passed
                },
                true
            ),
            1
        );
        assert_eq!(exit_code(Summary::default(), false), 1);
    }
}
