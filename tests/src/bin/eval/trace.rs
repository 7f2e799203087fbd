//! Real traffic from files, where they are present.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Read as _},
    net::{IpAddr, Ipv4Addr},
    path::Path,
};

use anyhow::{Context as _, Result, bail};
use portcullis::source::packed;
use portcullis_engine::parse::{Format, Target};

use super::traffic::{Request, agent, sort};

/// A log of legitimate traffic.
#[derive(Clone, Debug)]
pub struct Trace {
    /// In order.
    pub requests: Vec<Request>,
    /// Visits of single clients.
    pub sessions: Vec<Vec<Step>>,
}

/// One request of a visit.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// Milliseconds since the visit began.
    pub after: u64,
    /// What was asked for.
    pub target: Target,
    /// How it was answered.
    pub status: u16,
}

/// Who is silent for so long has gone.
const SESSION_GAP: u64 = 1_800_000;

impl Trace {
    /// Of requests in any order.
    pub fn new(mut requests: Vec<Request>) -> Self {
        sort(&mut requests);
        let mut by_client: BTreeMap<IpAddr, Vec<&Request>> = BTreeMap::new();
        for request in &requests {
            by_client.entry(request.client).or_default().push(request);
        }
        let sessions = by_client
            .values()
            .flat_map(|all| all.chunk_by(|one, next| next.at - one.at < SESSION_GAP))
            .map(|visit| {
                let begin = visit.first().map_or(0, |request| request.at);
                let step = |request: &&Request| Step {
                    after: request.at - begin,
                    target: request.target,
                    status: request.status,
                };
                visit.iter().map(step).collect()
            })
            .collect();
        Self { requests, sessions }
    }

    /// Several copies over one another, each begun at another time and by clients of its own: busier, and every client keeps
    /// its pace.
    pub fn overlaid(&self, copies: u32) -> Self {
        let (Some(first), Some(last)) = (self.requests.first(), self.requests.last()) else {
            return self.clone();
        };
        let (start, length) = (first.at, last.at - first.at + 1);
        let shift = length / u64::from(copies.max(1));
        let all = (0..copies).flat_map(|copy| {
            self.requests.iter().map(move |request| Request {
                at: start + (request.at - start + u64::from(copy) * shift) % length,
                client: other_self(request.client, copy),
                ..*request
            })
        });
        Self::new(all.collect())
    }

    /// Without one client, and its requests.
    pub fn without(self, client: IpAddr) -> (Self, Vec<Request>) {
        let (its, others) = self
            .requests
            .into_iter()
            .partition(|request| request.client == client);
        (Self::new(others), its)
    }

    /// Who sent the most.
    pub fn heaviest(&self) -> Option<IpAddr> {
        let mut counts: BTreeMap<IpAddr, usize> = BTreeMap::new();
        for request in &self.requests {
            *counts.entry(request.client).or_default() += 1;
        }
        let heaviest = counts.into_iter().max_by_key(|(_, count)| *count);
        heaviest.map(|(client, _)| client)
    }
}

fn other_self(client: IpAddr, copy: u32) -> IpAddr {
    match client {
        // Hosts are within 10/8.
        IpAddr::V4(v4) => Ipv4Addr::from(u32::from(v4).wrapping_add(copy << 24)).into(),
        IpAddr::V6(_) => client,
    }
}

/// The NASA trace: host, logname, time, method, URL, response, bytes, separated by tabs.
pub fn nasa(file: &Path) -> Result<Trace> {
    let mut hosts = BTreeMap::new();
    let mut requests = Vec::new();
    for line in lines(file)?.iter().skip(1) {
        let mut fields = line.split(|byte| *byte == b'\t');
        let mut field = || fields.next().unwrap_or_default();
        let (host, _, time, _, url, status) =
            (field(), field(), field(), field(), field(), field());
        let number = |text: &[u8]| std::str::from_utf8(text).ok()?.parse::<u64>().ok();
        let (Some(secs), Some(status)) = (number(time), number(status)) else {
            bail!("{}: a line without time or status", file.display());
        };
        let next = u32::try_from(hosts.len()).unwrap_or(u32::MAX);
        let host = *hosts.entry(host.to_vec()).or_insert(next);
        requests.push(Request {
            at: secs * 1000,
            client: scattered(host),
            target: Target::of(url, 0),
            status: u16::try_from(status).unwrap_or(0),
            agent: None,
            is_form: false,
        });
    }
    Ok(Trace::new(requests))
}

/// An address in 10/8 for each number; following numbers are no neighbours.
pub fn scattered(number: u32) -> IpAddr {
    let place = number.wrapping_mul(0x009e_3779) & 0x00ff_ffff;
    Ipv4Addr::from(0x0a00_0000 | place).into()
}

/// A log in the combined format. Lines that are none are left out.
pub fn combined(file: &Path) -> Result<Trace> {
    let format = Format::default();
    let mut requests = Vec::new();
    for line in lines(file)? {
        let Ok(record) = format.read(&line) else {
            continue;
        };
        // Quotation marks in values are escaped, so every second piece is a value.
        let mut quoted = line.split(|byte| *byte == b'"').skip(1).step_by(2);
        let request = quoted.next().unwrap_or_default();
        let browser = quoted
            .nth(1)
            .filter(|name| !name.is_empty() && *name != b"-");
        requests.push(Request {
            at: record.at.millis(),
            client: record.client,
            target: Target::of(request, 0),
            status: record.status,
            agent: browser.map(|name| agent(&String::from_utf8_lossy(name))),
            is_form: false,
        });
    }
    Ok(Trace::new(requests))
}

fn lines(file: &Path) -> Result<Vec<Vec<u8>>> {
    BufReader::new(packed::open(file)?)
        .split(b'\n')
        .collect::<Result<_, _>>()
        .with_context(|| format!("cannot read {}", file.display()))
}

/// Requests in each second, separated by blanks.
pub fn counts(file: &Path) -> Result<Vec<u32>> {
    let mut text = String::new();
    packed::open(file)?
        .read_to_string(&mut text)
        .with_context(|| format!("cannot read {}", file.display()))?;
    text.split_ascii_whitespace()
        .map(|count| count.parse().context("a count is no number"))
        .collect()
}
