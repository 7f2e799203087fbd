//! Who is never banned by what is around this host: its addresses, gateways, name servers, who is logged in, and what
//! configured names stand for. All of that changes while the agent runs, so it is looked at again and again, by a thread of
//! its own: the answer of a name server can take long.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, ToSocketAddrs as _},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
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
    settings: Arc<Mutex<Settings>>,
    wake: SyncSender<()>,
    unknown: Arc<Mutex<BTreeSet<String>>>,
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
        let (wake, woken) = sync_channel(1);
        let unknown = Arc::default();
        // What this host is like takes no waiting.
        let mut at_first = of_host(&settings);
        let has_names = !settings.names.is_empty();
        let settings = Arc::new(Mutex::new(settings));
        thread::Builder::new()
            .name("surroundings".to_owned())
            .spawn({
                let (settings, names) = (Arc::clone(&settings), Names::new(&unknown));
                move || watch(&settings, names, &woken, &first_sender, &sender)
            })
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
            settings,
            wake,
            unknown,
        };
        Ok((surroundings, at_first, receiver))
    }

    /// Looks at these things from now on, soon.
    pub fn set(&self, settings: Settings) {
        *locked(&self.settings) = settings;
        // Woken already, the thread has yet to read them.
        let _ = self.wake.try_send(());
    }

    /// Names that have never had an address since they were configured.
    #[must_use]
    pub fn names_without_address(&self) -> Vec<String> {
        locked(&self.unknown).iter().cloned().collect()
    }
}

fn watch(
    settings: &Mutex<Settings>,
    mut names: Names,
    woken: &Receiver<()>,
    first: &SyncSender<Entries>,
    told: &mpsc::Sender<Entries>,
) {
    let at_first = locked(settings).clone();
    let mut newest = look(&at_first, &mut names);
    // Whoever has waited too long hears it as a change.
    let mut is_told = !at_first.names.is_empty() && first.try_send(newest.clone()).is_ok();
    loop {
        if !is_told && told.blocking_send(newest.clone()).is_err() {
            return;
        }
        if woken.recv_timeout(AGAIN) == Err(RecvTimeoutError::Disconnected) {
            return;
        }
        let wanted = locked(settings).clone();
        let entries = look(&wanted, &mut names);
        is_told = entries == newest;
        newest = entries;
    }
}

fn locked<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Everybody who is to be spared now.
fn look(settings: &Settings, names: &mut Names) -> Entries {
    let mut entries = of_host(settings);
    names.look_up(&settings.names);
    for (name, addresses) in &names.known {
        let nets = addresses.iter().copied().map(IpNet::from);
        entries.extend(nets.map(|net| (net, Why::Name(name.clone()))));
    }
    entries.sort_by_key(|(net, _)| *net);
    entries
}

fn of_host(settings: &Settings) -> Entries {
    let host = settings.host.then(host::protected).unwrap_or_default();
    let entries = host.into_iter();
    entries
        .map(|(net, what)| (net, Why::Host(what.to_owned())))
        .collect()
}

/// What names stand for.
struct Names {
    /// While a name server does not answer, what it has said before holds.
    known: BTreeMap<String, Vec<IpAddr>>,
    /// Names that have had no answer yet.
    unknown: Arc<Mutex<BTreeSet<String>>>,
}

impl Names {
    fn new(unknown: &Arc<Mutex<BTreeSet<String>>>) -> Self {
        Self {
            known: BTreeMap::new(),
            unknown: Arc::clone(unknown),
        }
    }

    fn look_up(&mut self, names: &[String]) {
        self.known.retain(|name, _| names.contains(name));
        self.unknown().retain(|name| names.contains(name));
        for name in names {
            match addresses(name) {
                Ok(addresses) => {
                    if self.known.get(name) != Some(&addresses) {
                        info!("{name} is never banned (bans.allow): {addresses:?}");
                    }
                    self.unknown().remove(name);
                    self.known.insert(name.clone(), addresses);
                }
                Err(problem) if self.known.contains_key(name) => {
                    debug!("{name} (bans.allow) has no address now: {problem}; those before hold");
                }
                // Said once, and in the status.
                Err(problem) => {
                    if self.unknown().insert(name.clone()) {
                        warn!(
                            "{name} (bans.allow) has no address: {problem}; correct the name, or see to its name server"
                        );
                    }
                }
            }
        }
    }

    fn unknown(&self) -> MutexGuard<'_, BTreeSet<String>> {
        locked(&self.unknown)
    }
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
        assert_eq!(
            surroundings.names_without_address(),
            ["no.such.name.invalid"]
        );
        surroundings.set(wanted);
        let changed = changes.blocking_recv().unwrap();
        assert!(!changed.iter().any(is_localhost), "{changed:?}");
        let own = Why::Host("an address of this host".to_owned());
        assert!(changed.iter().any(|(_, why)| *why == own), "{changed:?}");
        assert!(surroundings.names_without_address().is_empty());
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
        let mut names = Names::new(&Arc::default());
        names.known.insert(settings.names[0].clone(), vec![address]);
        let entries = look(&settings, &mut names);
        let why = Why::Name("no.such.name.invalid".to_owned());
        assert_eq!(entries, [(IpNet::from(address), why)]);
        assert!(names.unknown().is_empty(), "it is known what it stood for");
        look(&Settings::default(), &mut names);
        assert!(names.known.is_empty());
    }
}
