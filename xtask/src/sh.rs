//! External commands: each is shown before it runs, and a failure names it.

use std::{
    env,
    ffi::OsStr,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

/// The workspace's root.
pub fn root() -> PathBuf {
    // Cargo sets it at run time; the compiled-in path serves a binary started by hand.
    let manifest_dir =
        env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    let manifest_dir = Path::new(&manifest_dir);
    manifest_dir.parent().unwrap_or(manifest_dir).to_owned()
}

/// Cargo's target folder.
pub fn target_dir() -> PathBuf {
    // `join` keeps an absolute path as it is.
    root().join(env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into()))
}

/// A command that runs in the workspace's root and sees the environment that the user's own shell would give it.
///
/// `cargo xtask` is a `cargo run`, which adds variables. Handed on, they would make Cargo rebuild crates whose build
/// scripts look at them, back and forth between `cargo xtask build` and `cargo build`.
pub fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.current_dir(root());
    for (name, _) in env::vars_os() {
        if is_set_by_cargo_run(&name.to_string_lossy()) {
            command.env_remove(name);
        }
    }
    command
}

fn is_set_by_cargo_run(name: &str) -> bool {
    name.starts_with("CARGO_PKG_")
        || name.starts_with("CARGO_MANIFEST_")
        // From [env] in .cargo/config.toml.
        || matches!(name, "RUSTC_BOOTSTRAP" | "CARGO_TERM_QUIET")
}

/// The Cargo that runs this.
pub fn cargo() -> Command {
    command(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// Runs a command to its end.
pub fn run(command: &mut Command) -> Result<()> {
    show(command);
    run_unshown(command)
}

/// Runs a command to its end that has been shown in another way.
pub fn run_unshown(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("cannot start `{}`", line(command)))?;
    if !status.success() {
        bail!("`{}` failed ({status})", line(command));
    }
    Ok(())
}

/// Becomes the command; returns only if it cannot be started.
pub fn exec(command: &mut Command) -> Result<()> {
    show(command);
    let error = command.exec();
    Err(error).with_context(|| format!("cannot start `{}`", line(command)))
}

/// Shows the command that is about to run.
pub fn show(command: &Command) {
    eprintln!("+ {}", line(command));
}

/// The command as one would type it at the workspace's root.
fn line(command: &Command) -> String {
    let set = command.get_envs().filter_map(|(name, value)| {
        let value = value?.to_string_lossy();
        Some(format!(
            "{}={}",
            name.to_string_lossy(),
            quote(&shorten(&value))
        ))
    });
    let program = command.get_program().to_string_lossy();
    // `CARGO` is a full path into rustup's folder; nobody types that.
    let program = if program.ends_with("/cargo") {
        "cargo".into()
    } else {
        shorten(&program)
    };
    let args = command
        .get_args()
        .map(|arg| quote(&shorten(&arg.to_string_lossy())));
    set.chain([program])
        .chain(args)
        .collect::<Vec<_>>()
        .join(" ")
}

/// Paths in the workspace, relative to its root.
fn shorten(word: &str) -> String {
    let prefix = format!("{}/", root().display());
    word.strip_prefix(&prefix).unwrap_or(word).to_owned()
}

fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-+=:,./@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shown_command_can_be_typed() {
        let mut command = Command::new("/usr/lib/x/cargo");
        command
            .env("RUSTDOCFLAGS", "-D warnings")
            .arg("test")
            .arg(root().join("target/it's"));
        assert_eq!(
            line(&command),
            r"RUSTDOCFLAGS='-D warnings' cargo test 'target/it'\''s'"
        );
    }

    #[test]
    fn variables_that_make_cargo_rebuild_are_not_handed_on() {
        for name in ["CARGO_PKG_VERSION", "CARGO_MANIFEST_DIR", "RUSTC_BOOTSTRAP"] {
            assert!(is_set_by_cargo_run(name), "{name}");
        }
        for name in ["CARGO_HOME", "CARGO_TARGET_DIR", "RUSTUP_TOOLCHAIN", "PATH"] {
            assert!(!is_set_by_cargo_run(name), "{name}");
        }
    }
}
