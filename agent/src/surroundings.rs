//! Who is never banned by what is around this host: its addresses, gateways, name servers, who is logged in, and what
//! configured names stand for. All of that changes while the agent runs, so it is looked at again and again, by a thread of
//! its own: the answer of a name server can take long.

use std::{
    collections::BTreeMap,
    net::{IpAddr, ToSocketAddrs as _},
    sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use ipnet::IpNet;
use portcullis_engine::allowlist::Why;
use tokio::sync::mpsc;
use tracing::{debug, info, warn};

use crate::host;

/// What is looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// The host itself, its gateways, name servers and SSH sessions.
    pub host: bool,
    /// Names of hosts.
    pub names: Vec<String>,
}

/// Who is to be on the allowlist, and why.
pub type Entries = Vec<(IpNet, Why)>;

/// Time from one look to the next.
const AGAIN: Duration = Duration::from_secs(30);
/// At the start, names are waited for so long.
const PATIENCE: Duration = Duration::from_secs(3);
/// Addresses of one name; further ones are left out.
const MAX_ADDRESSES: usize = 64;

/// The thread that looks. It ends when this is dropped, or soon after.
#[derive(Debug)]
pub struct Surroundings {
    settings: SyncSender<Settings>,
}

impl Surroundings {
    /// Starts to look. Returns what was seen at first; what changes comes through the channel. A name that has no answer within a
    /// few seconds is waited for no longer: it is on the list as soon as it has one.
    ///
    /// # Errors
    /// When there can be no thread.
    pub fn start(settings: Settings) -> Result<(Self, Entries, mpsc::Receiver<Entries>)> {
        let (sender, receiver) = mpsc::channel(1);
        let (first_sender, first) = sync_channel(1);
        let (settings_sender, changes) = sync_channel(1);
        // What this host is like takes no waiting.
        let mut at_first = look(
            &Settings {
                names: Vec::new(),
                ..settings.clone()
            },
            &mut BTreeMap::new(),
        );
        let has_names = !settings.names.is_empty();
        thread::Builder::new()
            .name("surroundings".to_owned())
            .spawn(move || watch(settings, &changes, &first_sender, &sender))
            .context("cannot start the thread that looks at what is around this host")?;
        if has_names {
            if let Ok(entries) = first.recv_timeout(PATIENCE) {
                at_first = entries;
            } else {
                warn!(
                    "no answer for the names in bans.allow yet: they are not on the allowlist until there is one"
                );
            }
        }
        let surroundings = Self {
            settings: settings_sender,
        };
        Ok((surroundings, at_first, receiver))
    }

    /// Looks at other things from now on, soon. Says whether it will: it has not if it was told a moment ago.
    pub fn set(&self, settings: Settings) -> bool {
        self.settings.try_send(settings).is_ok()
    }
}

fn watch(
    mut settings: Settings,
    changes: &Receiver<Settings>,
    first: &SyncSender<Entries>,
    told: &mpsc::Sender<Entries>,
) {
    let mut known = BTreeMap::new();
    let mut newest = look(&settings, &mut known);
    // Whoever has waited too long hears it as a change.
    let mut is_told = !settings.names.is_empty() && first.try_send(newest.clone()).is_ok();
    loop {
        if !is_told && told.blocking_send(newest.clone()).is_err() {
            return;
        }
        match changes.recv_timeout(AGAIN) {
            Ok(changed) => settings = changed,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        let entries = look(&settings, &mut known);
        is_told = entries == newest;
        newest = entries;
    }
}

/// Everybody who is to be spared now. `known` is what names have stood for: while a name server does not answer, that holds.
fn look(settings: &Settings, known: &mut BTreeMap<String, Vec<IpAddr>>) -> Entries {
    let mut entries: Entries = Vec::new();
    if settings.host {
        let host = host::protected().into_iter();
        entries.extend(host.map(|(net, what)| (net, Why::Host(what.to_owned()))));
    }
    known.retain(|name, _| settings.names.contains(name));
    for name in &settings.names {
        match addresses(name) {
            Ok(addresses) => {
                if known.get(name) != Some(&addresses) {
                    info!("{name} is never banned (bans.allow): {addresses:?}");
                }
                known.insert(name.clone(), addresses);
            }
            Err(problem) if known.contains_key(name) => {
                debug!("{name} (bans.allow) has no address now: {problem}; the ones before hold");
            }
            Err(problem) => warn!(
                "{name} (bans.allow) has no address: {problem}; correct the name, or see to its name server"
            ),
        }
        let nets = known.get(name).into_iter().flatten();
        entries.extend(nets.map(|address| (IpNet::from(*address), Why::Name(name.clone()))));
    }
    entries.sort_by_key(|(net, _)| *net);
    entries
}

fn addresses(name: &str) -> Result<Vec<IpAddr>, String> {
    let found = (name, 0)
        .to_socket_addrs()
        .map_err(|error| error.to_string())?;
    let mut addresses: Vec<IpAddr> = found.map(|found| found.ip().to_canonical()).collect();
    addresses.sort_unstable();
    addresses.dedup();
    // This would be everybody's.
    addresses.retain(|address| !address.is_unspecified());
    addresses.truncate(MAX_ADDRESSES);
    if addresses.is_empty() {
        return Err("the answer is empty".to_owned());
    }
    Ok(addresses)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_the_host_are_on_the_list_and_change_with_the_settings() {
        let settings = Settings {
            host: false,
            names: vec!["localhost".to_owned(), "no.such.name.invalid".to_owned()],
        };
        let (surroundings, first, mut changes) = Surroundings::start(settings).unwrap();
        let is_localhost = |(net, why): &(IpNet, Why)| {
            net.addr().is_loopback() && *why == Why::Name("localhost".to_owned())
        };
        assert!(
            !first.is_empty() && first.iter().all(is_localhost),
            "{first:?}"
        );
        let wanted = Settings {
            host: true,
            names: Vec::new(),
        };
        assert!(surroundings.set(wanted));
        let changed = changes.blocking_recv().unwrap();
        assert!(!changed.iter().any(is_localhost), "{changed:?}");
        let own = Why::Host("an address of this host".to_owned());
        assert!(changed.iter().any(|(_, why)| *why == own), "{changed:?}");
        drop(surroundings);
        assert!(changes.blocking_recv().is_none(), "the thread has ended");
    }

    #[test]
    fn what_a_name_stood_for_holds_while_it_has_no_answer() {
        let settings = Settings {
            host: false,
            names: vec!["no.such.name.invalid".to_owned()],
        };
        let address: IpAddr = "192.0.2.1".parse().unwrap();
        let mut known = BTreeMap::from([(settings.names[0].clone(), vec![address])]);
        let entries = look(&settings, &mut known);
        let why = Why::Name("no.such.name.invalid".to_owned());
        assert_eq!(entries, [(IpNet::from(address), why)]);
        look(&Settings::default(), &mut known);
        assert!(known.is_empty());
    }
}
