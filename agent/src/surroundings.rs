//! Who is never banned by what is around this host: its addresses, gateways, name servers, who is logged in, and what
//! configured names stand for. All of that changes while the agent runs, so it is looked at again and again.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use dns_lookup::{LookupErrorKind, getaddrinfo};
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

/// What the threads share.
#[derive(Debug, Default)]
struct Shared {
    settings: Mutex<Settings>,
    /// What names stand for. While a name server does not answer, what it has said before holds.
    known: Mutex<BTreeMap<String, Vec<IpAddr>>>,
    /// Names that have no address.
    unknown: Mutex<BTreeSet<String>>,
}

/// The threads that look: one at this host, and one at names, since a name server may take long to answer. They end when this is
/// dropped, or soon after.
#[derive(Debug)]
pub struct Surroundings {
    shared: Arc<Shared>,
    wake_host: SyncSender<()>,
    wake_names: SyncSender<()>,
}

impl Surroundings {
    /// Starts to look. Returns what was seen at first; what changes comes through the channel. A name that has no answer within a
    /// few seconds is waited for no longer: it is on the list as soon as it has one.
    ///
    /// # Errors
    /// When there can be no threads.
    pub fn start(settings: Settings) -> Result<(Self, Entries, mpsc::Receiver<Entries>)> {
        let has_names = !settings.names.is_empty();
        let shared = Arc::new(Shared {
            settings: Mutex::new(settings),
            ..Shared::default()
        });
        let (wake_host, host_woken) = sync_channel(1);
        let (wake_names, names_woken) = sync_channel(1);
        let (first_sender, first) = sync_channel(1);
        let spawn = |name: &str, work: Box<dyn FnOnce() + Send>| {
            let thread = thread::Builder::new().name(name.to_owned()).spawn(work);
            thread.context("cannot start a thread that looks at what is around this host")
        };
        let names = Arc::clone(&shared);
        let wake = wake_host.clone();
        let look_up = move || {
            loop {
                if names.look_up() {
                    let _ = wake.try_send(());
                }
                let _ = first_sender.try_send(());
                if names_woken.recv_timeout(AGAIN) == Err(RecvTimeoutError::Disconnected) {
                    return;
                }
            }
        };
        drop(spawn("names", Box::new(look_up))?);
        if has_names && first.recv_timeout(PATIENCE).is_err() {
            warn!(
                "no answer for the names in bans.allow yet: they are not on the allowlist until there is one"
            );
        }
        let at_first = shared.look();
        let (sender, receiver) = mpsc::channel(1);
        let (host, newest) = (Arc::clone(&shared), at_first.clone());
        let look = move || watch(&host, newest, &host_woken, &sender);
        drop(spawn("surroundings", Box::new(look))?);
        let surroundings = Self {
            shared,
            wake_host,
            wake_names,
        };
        Ok((surroundings, at_first, receiver))
    }

    /// Looks at these things from now on, soon.
    pub fn set(&self, settings: Settings) {
        *locked(&self.shared.settings) = settings;
        // One that is woken already has yet to read them.
        let _ = self.wake_names.try_send(());
        let _ = self.wake_host.try_send(());
    }

    /// Names that have no address.
    #[must_use]
    pub fn names_without_address(&self) -> Vec<String> {
        locked(&self.shared.unknown).iter().cloned().collect()
    }
}

fn watch(shared: &Shared, mut newest: Entries, woken: &Receiver<()>, told: &mpsc::Sender<Entries>) {
    loop {
        // Those who wake are two: it is the loop that must have gone.
        if woken.recv_timeout(AGAIN) == Err(RecvTimeoutError::Disconnected) || told.is_closed() {
            return;
        }
        let entries = shared.look();
        if entries != newest {
            for (net, why) in entries.iter().filter(|entry| !newest.contains(entry)) {
                info!("{net} is never banned: {why}");
            }
            for (net, why) in newest.iter().filter(|entry| !entries.contains(entry)) {
                info!("{net} may be banned, as it is no more {why}");
            }
            if told.blocking_send(entries.clone()).is_err() {
                return;
            }
            newest = entries;
        }
    }
}

fn locked<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Everybody who is to be spared now.
    fn look(&self) -> Entries {
        let Settings { host, names } = locked(&self.settings).clone();
        let host = host.then(host::protected).unwrap_or_default();
        let mut entries: Entries = host
            .into_iter()
            .map(|(net, what)| (net, Why::Host(what.to_owned())))
            .collect();
        let known = locked(&self.known);
        for name in &names {
            let nets = known.get(name).into_iter().flatten();
            let nets = nets.copied().map(IpNet::from);
            entries.extend(nets.map(|net| (net, Why::Name(name.clone()))));
        }
        entries.sort_by_key(|(net, _)| *net);
        entries
    }

    /// Asks what names stand for; says whether that has changed.
    fn look_up(&self) -> bool {
        let names = locked(&self.settings).names.clone();
        let before = locked(&self.known).clone();
        locked(&self.known).retain(|name, _| names.contains(name));
        locked(&self.unknown).retain(|name| names.contains(name));
        for name in &names {
            match addresses(name) {
                Answer::Addresses(addresses) => {
                    locked(&self.unknown).remove(name);
                    locked(&self.known).insert(name.clone(), addresses);
                }
                Answer::NoneNow(problem) if before.contains_key(name) => {
                    debug!(
                        "{name} (bans.allow) has no answer now: {problem}; the one before holds"
                    );
                }
                // Said once, and in the status.
                Answer::NoneNow(problem) | Answer::Never(problem) => {
                    locked(&self.known).remove(name);
                    if locked(&self.unknown).insert(name.clone()) {
                        warn!(
                            "{name} (bans.allow) has no address: {problem}; correct the name, or see to its name server"
                        );
                    }
                }
            }
        }
        *locked(&self.known) != before
    }
}

/// What a name server says.
enum Answer {
    Addresses(Vec<IpAddr>),
    /// It does not answer.
    NoneNow(String),
    /// There are none.
    Never(String),
}

fn addresses(name: &str) -> Answer {
    let found = match getaddrinfo(Some(name), None, None) {
        Ok(found) => found,
        Err(error) => {
            let kind = error.kind();
            let error = io::Error::from(error).to_string();
            return match kind {
                LookupErrorKind::NoName | LookupErrorKind::NoData => Answer::Never(error),
                _ => Answer::NoneNow(error),
            };
        }
    };
    let found = found
        .flatten()
        .map(|found| found.sockaddr.ip().to_canonical());
    // This would be everybody's.
    let mut addresses: Vec<IpAddr> = found.filter(|address| !address.is_unspecified()).collect();
    addresses.sort_unstable();
    addresses.dedup();
    addresses.truncate(MAX_ADDRESSES);
    if addresses.is_empty() {
        return Answer::Never("the answer is empty".to_owned());
    }
    Answer::Addresses(addresses)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No name server is asked for this.
    const NO_NAME: &str = "no..name";

    #[test]
    fn names_and_the_host_are_on_the_list_and_change_with_the_settings() {
        let settings = Settings {
            host: false,
            names: vec!["localhost".to_owned(), NO_NAME.to_owned()],
        };
        let (surroundings, first, mut changes) = Surroundings::start(settings).unwrap();
        let is_localhost = |(net, why): &(IpNet, Why)| {
            net.addr().is_loopback() && *why == Why::Name("localhost".to_owned())
        };
        assert!(
            !first.is_empty() && first.iter().all(is_localhost),
            "{first:?}"
        );
        assert_eq!(surroundings.names_without_address(), [NO_NAME]);
        let wanted = Settings {
            host: true,
            names: Vec::new(),
        };
        surroundings.set(wanted);
        let changed = changes.blocking_recv().unwrap();
        assert!(!changed.iter().any(is_localhost), "{changed:?}");
        let own = Why::Host("an address of this host".to_owned());
        assert!(changed.iter().any(|(_, why)| *why == own), "{changed:?}");
        drop(surroundings);
        assert!(changes.blocking_recv().is_none(), "the threads have ended");
    }

    #[test]
    fn a_name_that_is_gone_spares_nobody() {
        let name = NO_NAME.to_owned();
        let shared = Shared::default();
        locked(&shared.settings).names = vec![name.clone()];
        let address: IpAddr = "192.0.2.1".parse().unwrap();
        locked(&shared.known).insert(name.clone(), vec![address]);
        assert_eq!(
            shared.look(),
            [(IpNet::from(address), Why::Name(name.clone()))]
        );
        assert!(shared.look_up() && shared.look().is_empty());
        assert!(locked(&shared.unknown).contains(&name));
        *locked(&shared.settings) = Settings::default();
        shared.look_up();
        assert!(locked(&shared.known).is_empty() && locked(&shared.unknown).is_empty());
    }
}
