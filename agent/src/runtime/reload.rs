//! The configuration read anew while the agent runs: all of it, or nothing when anything is wrong with it.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, anyhow, bail};
use portcullis_engine::{Event, command::Action};
use serde::{Deserialize, Serialize};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::oneshot,
    task::JoinHandle,
};
use tracing::error;

use super::Agent;
use crate::{
    config::{Adjusted, Input, default_of},
    control::Reply,
    crawlers,
    notify::Notifier,
};

/// Listens for the signal that asks for it.
///
/// # Errors
/// When it cannot be listened to.
pub(super) fn hang_up() -> Result<Signal> {
    signal(SignalKind::hangup()).context("cannot listen to SIGHUP")
}

/// What has come of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reloaded {
    /// What holds from now on.
    pub changed: Vec<SettingChange>,
    /// What the file says otherwise and what cannot change while the agent runs.
    pub needs_restart: Vec<SettingChange>,
}

/// A setting that is not what it was; its values as TOML.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SettingChange {
    /// Its dotted name.
    pub key: String,
    /// What it was.
    pub from: String,
    /// What the file says now.
    pub to: String,
}

impl std::fmt::Display for SettingChange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{}: {} -> {}",
            self.key,
            short(&self.from),
            short(&self.to)
        )
    }
}

/// A list of thousands of addresses is known by its beginning.
fn short(value: &str) -> String {
    const MOST: usize = 80;
    if value.chars().count() <= MOST {
        return value.to_owned();
    }
    let begin: String = value.chars().take(MOST).collect();
    format!("{begin}…")
}

/// What the agent goes by now, and where that comes from.
#[derive(Debug)]
pub(super) struct Running {
    input: Input,
    /// Keys that are not what they are by default.
    differing: BTreeMap<String, String>,
    needs_restart: Vec<SettingChange>,
    is_being_read: bool,
}

impl Running {
    pub(super) fn new(input: Input, adjusted: &Adjusted) -> Self {
        Self {
            input,
            differing: adjusted.differing.iter().cloned().collect(),
            needs_restart: Vec::new(),
            is_being_read: false,
        }
    }

    /// The keys that the file has changed and that still are what they were at the start.
    pub(super) fn needs_restart(&self) -> Vec<String> {
        let keys = self.needs_restart.iter();
        keys.map(|change| change.key.clone()).collect()
    }

    /// What is different from now on; what is meant for another window `waits` until there is one.
    fn change(&mut self, adjusted: &Adjusted, waits: bool) -> Reloaded {
        let wanted: BTreeMap<String, String> = adjusted.differing.iter().cloned().collect();
        let keys: std::collections::BTreeSet<&String> =
            self.differing.keys().chain(wanted.keys()).collect();
        let value = |of: &BTreeMap<String, String>, key: &str| {
            let given = of.get(key).cloned();
            given.or_else(|| default_of(key)).unwrap_or_default()
        };
        let change = |key: &&String| SettingChange {
            key: (*key).clone(),
            from: value(&self.differing, key),
            to: value(&wanted, key),
        };
        let changes = keys.iter().map(change);
        let changes = changes.filter(|change| change.from != change.to);
        let (changed, needs_restart): (Vec<_>, Vec<_>) = changes
            .partition(|change| is_live(&change.key) && !(waits && is_by_window(&change.key)));
        for change in &changed {
            match wanted.get(&change.key) {
                Some(value) => self.differing.insert(change.key.clone(), value.clone()),
                None => self.differing.remove(&change.key),
            };
        }
        self.needs_restart.clone_from(&needs_restart);
        Reloaded {
            changed,
            needs_restart,
        }
    }
}

/// Can it change while the agent runs? The others are what threads, tables and the kernel's maps were made with.
fn is_live(key: &str) -> bool {
    const SECTIONS: [&str; 4] = ["detect.", "bans.", "slack.", "webhook."];
    const BUT: [&str; 4] = [
        "detect.window_secs",
        "detect.max_clients",
        "bans.max_bans",
        "bans.max_offenders",
    ];
    SECTIONS.iter().any(|section| key.starts_with(section)) && !BUT.contains(&key)
}

/// Is it said of a window, so that it means something else in another one?
fn is_by_window(key: &str) -> bool {
    key.starts_with("detect.") || key == "bans.prefix_members"
}

/// A configuration that was read and checked, and whoever it says is to be told; or what is wrong.
type Read = Result<(Adjusted, Notifier, Vec<JoinHandle<()>>)>;

/// A configuration that was read anew, by whose wish, and who waits for the answer.
pub(super) struct ReadAnew {
    read: Read,
    who: String,
    reply: Option<oneshot::Sender<Reply>>,
}

impl Agent {
    /// Has the configuration read; nobody waits for the disk. One at a time: whoever asks meanwhile is told so.
    pub(super) fn reload(&mut self, who: &str, reply: Option<oneshot::Sender<Reply>>) {
        if std::mem::replace(&mut self.running.is_being_read, true) {
            let why = "the configuration is being read already: ask again in a moment".to_owned();
            if let Some(reply) = reply {
                drop(reply.send(Reply::refused(why)));
            }
            return;
        }
        let (input, who) = (self.running.input.clone(), who.to_owned());
        let read_anew = self.read_anew.0.clone();
        tokio::spawn(async move {
            let read = tokio::task::spawn_blocking(move || read(&input)).await;
            let read = read.unwrap_or_else(|_| bail!("the configuration cannot be read"));
            drop(read_anew.send(ReadAnew { read, who, reply }).await);
        });
    }

    /// Goes by a configuration that was read, as far as that is possible while the agent runs.
    pub(super) fn go_by(&mut self, new: ReadAnew) {
        let ReadAnew { read, who, reply } = new;
        self.running.is_being_read = false;
        let now = self.now();
        let result = read.map(|(adjusted, notifier, couriers)| {
            std::mem::replace(&mut self.notifier, notifier).close();
            self.couriers.retain(|courier| !courier.is_finished());
            self.couriers.extend(couriers);
            let config = &adjusted.config;
            let waits = !self.engine.reconfigure(config.engine.clone(), now);
            self.crawlers.set(config.crawlers.clone());
            self.engine
                .forget_crawlers(|name| !crawlers::is_in(name, &config.crawlers));
            self.surroundings.set(config.surroundings.clone());
            self.running.change(&adjusted, waits)
        });
        let words = match &result {
            Ok(reloaded) => in_words(reloaded),
            Err(problem) => {
                error!("{problem:#}");
                format!("{problem:#}").replace('\n', "; ")
            }
        };
        let words = format!("configuration read anew, by {who}: {words}");
        self.record(&Event::new(now, Action::Notice, words));
        if let Some(reply) = reply {
            drop(reply.send(Reply::of(result)));
        }
    }
}

fn read(input: &Input) -> Read {
    let adjusted = input.load_again().map_err(|problems| {
        anyhow!("the new configuration is refused, and the one before goes on to hold:\n{problems}")
    })?;
    // What the files with addresses hold may be new although nothing else is.
    let (notifier, couriers) = Notifier::renew(&adjusted.config)
        .context("the new configuration is refused, and the one before goes on to hold")?;
    Ok((adjusted, notifier, couriers))
}

fn in_words(reloaded: &Reloaded) -> String {
    let list = |changes: &[SettingChange]| {
        let changes: Vec<String> = changes.iter().map(ToString::to_string).collect();
        changes.join("; ")
    };
    let mut words = match reloaded.changed.as_slice() {
        [] => "nothing has changed".to_owned(),
        changed => list(changed),
    };
    if !reloaded.needs_restart.is_empty() {
        words = format!(
            "{words}; only after a restart: {}",
            list(&reloaded.needs_restart)
        );
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adjusted(differing: &[(&str, &str)]) -> Adjusted {
        Adjusted {
            config: crate::config::Config::default(),
            differing: differing
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect(),
        }
    }

    fn said(changes: &[SettingChange]) -> Vec<String> {
        changes.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn what_cannot_change_is_said_until_it_is_as_it_was() {
        let at_start = adjusted(&[("bans.quiet_secs", "30"), ("mode", "\"enforce\"")]);
        let mut running = Running::new(Input::default(), &at_start);
        let reloaded = running.change(
            &adjusted(&[
                ("mode", "\"observe\""),
                ("detect.z_score", "4.0"),
                ("detect.max_clients", "5000"),
            ]),
            false,
        );
        assert_eq!(
            said(&reloaded.changed),
            ["bans.quiet_secs: 30 -> 60", "detect.z_score: 3.0 -> 4.0"]
        );
        assert_eq!(
            said(&reloaded.needs_restart),
            [
                "detect.max_clients: 100000 -> 5000",
                "mode: \"enforce\" -> \"observe\""
            ]
        );
        assert_eq!(running.needs_restart(), ["detect.max_clients", "mode"]);
        let reloaded = running.change(
            &adjusted(&[("mode", "\"enforce\""), ("detect.z_score", "4.0")]),
            false,
        );
        assert_eq!(reloaded, Reloaded::default());
        assert!(running.needs_restart().is_empty());
        assert_eq!(in_words(&reloaded), "nothing has changed");
        // What is said of another window waits for it.
        let other = [
            ("detect.window_secs", "30"),
            ("detect.z_score", "5.0"),
            ("bans.jitter", "0.1"),
        ];
        let reloaded = running.change(&adjusted(&other), true);
        let changed = [
            "bans.jitter: 0.0 -> 0.1",
            "mode: \"enforce\" -> \"observe\"",
        ];
        assert_eq!(said(&reloaded.changed), changed[..1]);
        assert_eq!(
            said(&reloaded.needs_restart),
            [
                "detect.window_secs: 60 -> 30",
                "detect.z_score: 4.0 -> 5.0",
                changed[1],
            ]
        );
    }

    #[test]
    fn a_long_list_is_cut() {
        let change = SettingChange {
            key: "bans.allow".to_owned(),
            from: "[]".to_owned(),
            to: format!("[{}]", "\"192.0.2.1\", ".repeat(5000)),
        };
        assert!(change.to_string().chars().count() < 120, "{change}");
    }
}
