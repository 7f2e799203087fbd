//! `eval`: the judge of the detector, in a build of its own profile.

use std::path::PathBuf;

use anyhow::{Context as _, Result};

use crate::{
    setup::{self, Purpose},
    sh,
};

/// Binary and profile of the judge.
const EVAL: &str = "eval";

#[derive(Debug, clap::Args)]
pub struct Eval {
    /// Folder of real traces; those that are there are judged too
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,

    /// Trials of each scenario on each background [default: 20]
    #[arg(long, value_name = "N")]
    seeds: Option<u64>,

    /// Only these scenarios; an unknown name lists them all
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    only: Vec<String>,

    /// Only on these backgrounds: quiet, busy, or a trace's
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    on: Vec<String>,

    /// A key of the configuration, such as `detect.z_score=4`; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,

    /// Tables in Markdown
    #[arg(long)]
    markdown: bool,
}

pub fn run(eval: &Eval) -> Result<()> {
    setup::ensure(Purpose::Build)?;
    sh::run(sh::cargo().args([
        "build",
        "--profile",
        EVAL,
        "--package",
        "portcullis-tests",
        "--bin",
        EVAL,
    ]))?;
    let mut command = sh::command(sh::target_dir().join(EVAL).join(EVAL));
    // File names are relative to where the user is.
    command
        .args(args(eval))
        .current_dir(std::env::current_dir()?);
    sh::exec(&mut command).context("the judge cannot be started")
}

fn args(eval: &Eval) -> Vec<std::ffi::OsString> {
    let mut args = Vec::new();
    let mut option = |name: &str, value: &std::ffi::OsStr| args.extend([name.into(), value.into()]);
    if let Some(data) = &eval.data {
        option("--data", data.as_os_str());
    }
    if let Some(seeds) = eval.seeds {
        option("--seeds", seeds.to_string().as_ref());
    }
    for (name, values) in [
        ("--only", &eval.only),
        ("--on", &eval.on),
        ("--set", &eval.set),
    ] {
        for value in values {
            option(name, value.as_ref());
        }
    }
    if eval.markdown {
        args.push("--markdown".into());
    }
    args
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_asked_for_is_handed_on() {
        let eval = Eval {
            data: Some("traces".into()),
            seeds: Some(5),
            only: vec!["botnet".to_owned(), "ramp".to_owned()],
            on: Vec::new(),
            set: vec!["detect.z_score=4".to_owned()],
            markdown: true,
        };
        let words = args(&eval).join(" ".as_ref());
        assert_eq!(
            words.to_string_lossy(),
            "--data traces --seeds 5 --only botnet --only ramp --set detect.z_score=4 --markdown"
        );
    }
}
