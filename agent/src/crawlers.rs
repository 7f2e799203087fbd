//! Whether a banned client is a search engine's crawler, told as the search engines say: its address leads to a name in one of
//! their domains, and that name leads back to the address. The name alone is whatever the owner of the address says.

use std::{
    net::{IpAddr, ToSocketAddrs as _},
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    thread,
};

use anyhow::{Context as _, Result};
use portcullis_engine::Subject;
use tokio::sync::mpsc;
use tracing::debug;

/// Lookups at a time. A name server that does not answer keeps each busy for seconds.
const THREADS: usize = 4;
/// Clients that wait to be looked into. In a flood most never are: no crawler comes by the thousand.
const QUEUE: usize = 256;

/// A client that has proved to be a crawler, and its name.
pub type Crawler = (Subject, String);

/// A client, the address that it came from, and the domains of which it may be a crawler.
type Wanted = (Subject, IpAddr, Arc<[String]>);

/// The threads that look names up. They end when this is dropped, once the lookups under way are answered.
#[derive(Debug)]
pub struct Crawlers {
    domains: Arc<[String]>,
    wanted: SyncSender<Wanted>,
}

impl Crawlers {
    /// Starts. Whoever proves to be a crawler of one of the domains comes through the channel.
    ///
    /// # Errors
    /// When there can be no threads.
    pub fn start(domains: Vec<String>) -> Result<(Self, mpsc::Receiver<Crawler>)> {
        let (wanted, clients) = sync_channel(QUEUE);
        let (sender, crawlers) = mpsc::channel(QUEUE);
        let clients = Arc::new(Mutex::new(clients));
        for _ in 0..THREADS {
            let (clients, sender) = (Arc::clone(&clients), sender.clone());
            thread::Builder::new()
                .name("crawlers".to_owned())
                .spawn(move || work(&clients, &sender))
                .context("cannot start a thread that looks names up")?;
        }
        let crawlers_of = Self {
            domains: domains.into(),
            wanted,
        };
        Ok((crawlers_of, crawlers))
    }

    /// Looks for crawlers of these domains from now on.
    pub fn set(&mut self, domains: Vec<String>) {
        self.domains = domains.into();
    }

    /// Looks into a client, by the address that it came from, unless too many wait for that already.
    pub fn look_into(&self, client: Subject, address: IpAddr) {
        if self.domains.is_empty() {
            return;
        }
        let wanted = (client, address, Arc::clone(&self.domains));
        if let Err(TrySendError::Full(_)) = self.wanted.try_send(wanted) {
            debug!("{client} is not looked into: too many wait for that");
        }
    }
}

fn work(clients: &Mutex<Receiver<Wanted>>, crawlers: &mpsc::Sender<Crawler>) {
    loop {
        let next = clients
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .recv();
        let Ok((client, address, domains)) = next else {
            return;
        };
        if let Some(name) = verify(address, &domains)
            && crawlers.blocking_send((client, name)).is_err()
        {
            return;
        }
    }
}

/// The name by which an address is a crawler of one of the domains.
fn verify(address: IpAddr, domains: &[String]) -> Option<String> {
    let name = dns_lookup::lookup_addr(&address).ok()?;
    let name = name.trim_end_matches('.').to_ascii_lowercase();
    if !is_in(&name, domains) {
        return None;
    }
    let mut back = (name.as_str(), 0).to_socket_addrs().ok()?;
    let is_back = back.any(|found| found.ip().to_canonical() == address.to_canonical());
    is_back.then_some(name)
}

/// Is a name part of one of the domains, and not merely called alike?
#[must_use]
pub fn is_in(name: &str, domains: &[String]) -> bool {
    let is_name = name
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'));
    let is_in = |domain: &String| {
        let rest = name.strip_suffix(domain.as_str());
        rest.is_some_and(|rest| rest.ends_with('.') && rest.len() > 1)
    };
    is_name && domains.iter().any(is_in)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_in_a_domain_only_below_it() {
        let domains = ["googlebot.com".to_owned(), "search.msn.com".to_owned()];
        for (name, expected) in [
            ("crawl-66-249-66-1.googlebot.com", true),
            ("msnbot-157-55-39-1.search.msn.com", true),
            ("googlebot.com", false),
            (".googlebot.com", false),
            ("crawl.evilgooglebot.com", false),
            ("crawl.googlebot.com.example.net", false),
            ("a b.googlebot.com", false),
            ("msn.com", false),
            ("", false),
        ] {
            assert_eq!(is_in(name, &domains), expected, "{name}");
        }
    }

    #[test]
    fn an_address_that_leads_to_a_name_elsewhere_is_none() {
        let address = "127.0.0.1".parse().unwrap();
        assert_eq!(verify(address, &["googlebot.com".to_owned()]), None);
    }
}
