//! The README's commands, run. (Its two `cargo xtask` commands are run by `.ci/run`, its Nginx lines by every laboratory.)

use anyhow::{Context as _, Result, bail};
use portcullis_tests::{
    lab::{
        Lab,
        agent::{self, Agent, Config},
        nginx::Nginx,
        sink::Sink,
    },
    readme,
};
use serde_json::Value;

#[test]
#[expect(
    clippy::too_many_lines,
    reason = "one command of the README after the other"
)]
fn every_command_of_the_readme_works() -> Result<()> {
    let lab = Lab::new()?;
    let nginx = Nginx::start(&lab)?;
    let sink = Sink::start(&lab)?;
    let config = Config {
        webhook: Some(sink.url()),
        ..Config::new(nginx.log())
    };
    let mut agent = Agent::start(&lab, &config)?;
    let mut seen = Vec::new();
    for command in readme::commands() {
        let words: Vec<&str> = command.iter().map(String::as_str).collect();
        let verb = *words.first().context("no verb")?;
        seen.push(verb.to_owned());
        match verb {
            // The agent that is running was started by it.
            "run" if words.len() == 1 => {}
            "config" => {
                let printed = agent::plain(&lab, &["config"])?.success()?;
                let file = lab.dir().join("documented.toml");
                std::fs::write(&file, redirected(&words, &printed)?)?;
                let file = file.to_string_lossy();
                agent::plain(&lab, &["check", "--config", &file])?.success()?;
            }
            "lines" => {
                let log = nginx.log().to_string_lossy();
                let read = agent::plain(&lab, &["lines", &log])?.success()?;
                assert!(read.contains("lines read, 0 malformed"), "{read}");
            }
            "replay" => {
                let (log, page) = (nginx.log(), lab.dir().join("replay.html"));
                let (log, page) = (log.to_string_lossy(), page.to_string_lossy());
                let words: Vec<&str> = words
                    .iter()
                    .map(|word| match *word {
                        word if word.starts_with("/var/log/nginx/") => &*log,
                        "replay.html" => &*page,
                        word => word,
                    })
                    .collect();
                let said = agent::plain(&lab, &words)?.success()?;
                assert!(said.contains("would have been banned"), "{said}");
                if words.contains(&&*page) {
                    let page = std::fs::read_to_string(&*page)?;
                    assert!(page.contains("<h2>Traffic</h2>"), "{page}");
                }
            }
            // What others print is read by tests of its own.
            "import" => {
                let list = lab.dir().join("list");
                std::fs::write(&list, "198.51.100.77\n")?;
                let list = list.to_string_lossy();
                let words: Vec<&str> = words
                    .iter()
                    .map(|word| if *word == "-" { &*list } else { *word })
                    .collect();
                drop(agent.verb(&words)?.success()?);
            }
            "export" => {
                let words: Vec<&str> = words.into_iter().take_while(|word| *word != ">").collect();
                drop(agent.verb(&words)?.success()?);
            }
            // Beside the agent, whose state is in use.
            "learn" => {
                let log = nginx.log().to_string_lossy();
                let state = format!("state.dir={}", lab.dir().join("learnt").display());
                let words = ["learn", "--set", &*state, &*log];
                let said = agent::plain(&lab, &words)?.success()?;
                assert!(said.contains("known now, by hour of the day"), "{said}");
            }
            "history" | "audit" => {
                let config = lab.dir().join("portcullis.toml");
                let config = config.to_string_lossy();
                let words = [&words[..], &["--config", &*config]].concat();
                let said = agent::plain(&lab, &words)?.success()?;
                let expected = ["unbroken; head ", "nothing is on record of"];
                assert!(expected.iter().any(|part| said.contains(part)), "{said}");
            }
            "notify" => {
                let config = lab.dir().join("portcullis.toml");
                let config = config.to_string_lossy();
                let words = [&words[..], &["--config", &*config]].concat();
                let said = agent::plain(&lab, &words)?.success()?;
                assert_eq!(said, "slack     delivered\n");
            }
            "--help" => drop(agent::plain(&lab, &words)?.success()?),
            "status" | "bans" | "explain" | "ban" | "unban" | "confirm" | "allow" | "reload" => {
                drop(agent.verb(&words)?.success()?);
            }
            // In a laboratory some of it is as it should not be; what counts is that it says so.
            "doctor" if words.len() == 1 => {
                let config = lab.dir().join("portcullis.toml");
                let config = config.to_string_lossy();
                let answer = agent::plain(&lab, &["doctor", "--json", "--config", &config])?;
                let checks: Vec<Value> = serde_json::from_str(&answer.stdout)?;
                let names: Vec<&Value> = checks.iter().map(|check| &check["name"]).collect();
                assert!(checks.len() > 15, "{names:?}");
                assert!(matches!(answer.code, Some(0 | 1)), "{answer:?}");
            }
            // Follows for ever; the end-to-end tests do.
            "drops" if words.len() == 1 => {
                drop(agent::plain(&lab, &["drops", "--help"])?.success()?);
            }
            "detach" => {}
            _ => bail!(
                "the README shows `portcullis {}`, which no test runs",
                command.join(" ")
            ),
        }
    }
    for expected in ["run", "config", "status", "bans", "ban", "unban", "detach"] {
        assert!(
            seen.iter().any(|verb| verb == expected),
            "{expected} is not in the README: {seen:?}"
        );
    }
    let file = lab.dir().join("proxies.toml");
    std::fs::write(&file, readme::toml_snippet())?;
    let file = file.to_string_lossy();
    agent::plain(&lab, &["check", "--config", &file])?.success()?;
    agent.terminate(std::time::Duration::from_secs(10))?;
    agent::detach(&lab)?.success()?;
    Ok(())
}

/// What `portcullis config > FILE` leaves in the file.
fn redirected<'a>(words: &[&str], printed: &'a str) -> Result<&'a str> {
    match words {
        ["config"] | ["config", ">", _] => Ok(printed),
        other => bail!("not understood: {other:?}"),
    }
}
