//! `build`, `load`, `run`, `demo`: build the agent, then hand over to it.

use std::{
    ffi::{OsStr, OsString},
    path::PathBuf,
};

use anyhow::Result;
use clap::ValueEnum;

use crate::{
    setup::{self, Purpose},
    sh,
};

/// Tells the demo and the tests where the agent's binary is.
pub const BINARY_ENV: &str = "PORTCULLIS_BIN";

#[derive(Debug, clap::Args)]
pub struct Load {
    /// The interface to attach to
    #[arg(long, visible_alias = "interface", value_name = "IFACE")]
    iface: String,

    /// Where in the receive path: in the driver (native), behind it (generic), or the first of these that works
    #[arg(long, value_enum, default_value_t = Mode::Auto)]
    mode: Mode,

    /// Take the program off the interface again instead
    #[arg(long)]
    detach: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Mode {
    Auto,
    Native,
    Generic,
}

#[derive(Debug, Default, clap::Args)]
pub struct Run {
    /// The agent's configuration; without it, defaults
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// The access log to follow [default: the configured one]
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,

    /// Ban for real; without it, and unless the configuration says so, nothing is dropped
    #[arg(long)]
    enforce: bool,

    /// More arguments for `portcullis run`
    #[arg(last = true, value_name = "EXTRA")]
    extra: Vec<OsString>,
}

#[derive(Debug, clap::Args)]
pub struct Demo {
    /// Arguments for the demo itself; see `cargo xtask demo -- --help`
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "ARGS"
    )]
    args: Vec<OsString>,
}

/// Builds every binary that is not for the kernel, and says where the agent's is.
///
/// Always the same set of packages: a smaller one would select other features of shared dependencies and compile them
/// again for the next verb.
pub fn binaries() -> Result<PathBuf> {
    sh::run(sh::cargo().args(["build", "--bins"]))?;
    Ok(binary("debug", "portcullis"))
}

fn binary(profile: &str, name: &str) -> PathBuf {
    sh::target_dir().join(profile).join(name)
}

pub fn build(release: bool) -> Result<()> {
    setup::ensure(Purpose::Build)?;
    let binary = if release {
        sh::run(sh::cargo().args(["build", "--release", "--package", "portcullis"]))?;
        binary("release", "portcullis")
    } else {
        binaries()?
    };
    println!("{}", binary.display());
    Ok(())
}

pub fn load(load: &Load) -> Result<()> {
    setup::ensure(Purpose::Build)?;
    let agent = binaries()?;
    sh::exec(sh::command(agent).args(load_args(load)))
}

fn load_args(load: &Load) -> Vec<OsString> {
    let mode = match load.mode {
        Mode::Auto => "auto",
        Mode::Native => "native",
        Mode::Generic => "generic",
    };
    let mut args: Vec<OsString> = ["load", "--interface", &load.iface, "--mode", mode]
        .map(OsString::from)
        .into();
    if load.detach {
        args.push("--detach".into());
    }
    args
}

pub fn run(run: &Run) -> Result<()> {
    setup::ensure(Purpose::Build)?;
    let agent = binaries()?;
    sh::exec(
        sh::command(agent)
            .args(run_args(run))
            // File names are relative to where the user is.
            .current_dir(std::env::current_dir()?),
    )
}

fn run_args(run: &Run) -> Vec<OsString> {
    let mut args = vec![OsString::from("run")];
    let mut option = |name: &str, value: &OsStr| args.extend([name.into(), value.to_owned()]);
    if let Some(config) = &run.config {
        option("--config", config.as_os_str());
    }
    if let Some(log) = &run.log {
        option("--log", log.as_os_str());
    }
    if run.enforce {
        option("--mode", OsStr::new("enforce"));
    } else if run.config.is_none() {
        // A configuration that was named says its mode itself.
        option("--mode", OsStr::new("observe"));
    }
    args.extend(run.extra.iter().cloned());
    args
}

pub fn demo(demo: &Demo) -> Result<()> {
    setup::ensure(Purpose::Build)?;
    let agent = binaries()?;
    sh::exec(
        sh::command(binary("debug", "demo"))
            .args(&demo.args)
            .env(BINARY_ENV, agent),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(run: &Run) -> String {
        let args = run_args(run);
        args.iter()
            .map(|a| a.to_string_lossy())
            .collect::<Vec<_>>()
            .join(" ")
    }

    #[test]
    fn run_without_arguments_observes() {
        assert_eq!(words(&Run::default()), "run --mode observe");
    }

    #[test]
    fn a_configuration_keeps_its_own_log_and_mode() {
        let run = Run {
            config: Some("p.toml".into()),
            ..Run::default()
        };
        assert_eq!(words(&run), "run --config p.toml");
    }

    #[test]
    fn what_is_asked_for_overrides_the_configuration() {
        let run = Run {
            config: Some("p.toml".into()),
            log: Some("a.log".into()),
            enforce: true,
            extra: vec!["--interface".into(), "eth1".into()],
        };
        assert_eq!(
            words(&run),
            "run --config p.toml --log a.log --mode enforce --interface eth1"
        );
    }

    #[test]
    fn load_hands_over_its_arguments() {
        let load = Load {
            iface: "eth0".into(),
            mode: Mode::Native,
            detach: true,
        };
        assert_eq!(
            load_args(&load),
            [
                "load",
                "--interface",
                "eth0",
                "--mode",
                "native",
                "--detach"
            ]
        );
    }
}
