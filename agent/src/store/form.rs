//! How bans and accounts are written: a million of them are to be read in a second, which JSON would take several for.
//!
//! `postcard` writes the fields of these forms one after the other, without their names, and the number of a variant. So a field
//! that comes or goes, here or in a type of the engine that is used as it is, and a variant that changes its place, is another
//! schema; a test knows the bytes.

use std::{
    borrow::Cow,
    net::{Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;
use portcullis_engine::{
    Ban, Gate, Origin, Subject, Term, Timestamp,
    baseline::Learnt,
    detect::{Finding, Sample, Test},
    ledger::Offences,
};
use serde::{Deserialize, Serialize};

/// A subject as a key: its address and its prefix length.
#[derive(Clone, Copy, Debug)]
pub(super) struct Key {
    bytes: [u8; 17],
    length: usize,
}

impl Key {
    pub(super) fn of(subject: Subject) -> Self {
        let mut bytes = [0; 17];
        let length = match subject.net() {
            IpNet::V4(net) => {
                bytes[..4].copy_from_slice(&net.addr().octets());
                4
            }
            IpNet::V6(net) => {
                bytes[..16].copy_from_slice(&net.addr().octets());
                16
            }
        };
        bytes[length] = subject.net().prefix_len();
        Self {
            bytes,
            length: length + 1,
        }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    /// The subject; none of bytes that are no key.
    pub(super) fn subject(bytes: &[u8]) -> Option<Subject> {
        let (prefix, address) = bytes.split_last()?;
        let address = match address.len() {
            4 => Ipv4Addr::from(<[u8; 4]>::try_from(address).ok()?).into(),
            _ => Ipv6Addr::from(<[u8; 16]>::try_from(address).ok()?).into(),
        };
        let net = IpNet::new(address, *prefix).ok()?;
        Some(Subject::of_net(net))
    }
}

/// [`Ban`], but for its subject, which is the key.
#[derive(Serialize, Deserialize)]
struct BanForm<'a> {
    since: Timestamp,
    term: Term,
    tier: Option<u32>,
    origin: Origin,
    #[serde(borrow)]
    reason: Cow<'a, str>,
    finding: Option<FindingForm<'a>>,
    observe: bool,
    gate: Gate,
    extended: u32,
    by: Option<Cow<'a, str>>,
    once_confirmed: Option<Term>,
}

/// [`Finding`].
#[derive(Serialize, Deserialize)]
struct FindingForm<'a> {
    test: Test,
    threshold: f64,
    surge: bool,
    rate: f64,
    score: f64,
    mean: f64,
    stddev: f64,
    learnt: Learnt,
    window_secs: u32,
    requests: u64,
    errors: u64,
    seen: Timestamp,
    margin: f64,
    value: f64,
    distinct: u32,
    samples: Cow<'a, [Sample]>,
}

/// A ban, but for its subject.
pub(super) fn ban(ban: &Ban) -> postcard::Result<Vec<u8>> {
    let finding = ban.finding.as_ref().map(|finding| {
        let Finding {
            test,
            threshold,
            surge,
            rate,
            score,
            mean,
            stddev,
            learnt,
            window_secs,
            requests,
            errors,
            seen,
            margin,
            value,
            distinct,
            samples,
        } = finding;
        FindingForm {
            test: *test,
            threshold: *threshold,
            surge: *surge,
            rate: *rate,
            score: *score,
            mean: *mean,
            stddev: *stddev,
            learnt: *learnt,
            window_secs: *window_secs,
            requests: *requests,
            errors: *errors,
            seen: *seen,
            margin: *margin,
            value: *value,
            distinct: *distinct,
            samples: Cow::Borrowed(samples),
        }
    });
    let Ban {
        subject: _,
        since,
        term,
        tier,
        origin,
        reason,
        finding: _,
        observe,
        gate,
        extended,
        by,
        once_confirmed,
    } = ban;
    postcard::to_stdvec(&BanForm {
        since: *since,
        term: *term,
        tier: *tier,
        origin: *origin,
        reason: Cow::Borrowed(reason),
        finding,
        observe: *observe,
        gate: *gate,
        extended: *extended,
        by: by.as_deref().map(Cow::Borrowed),
        once_confirmed: *once_confirmed,
    })
}

/// A ban, read back.
pub(super) fn read_ban(subject: Subject, bytes: &[u8]) -> postcard::Result<Ban> {
    let form: BanForm<'_> = postcard::from_bytes(bytes)?;
    let finding = form.finding.map(|form| Finding {
        test: form.test,
        threshold: form.threshold,
        surge: form.surge,
        rate: form.rate,
        score: form.score,
        mean: form.mean,
        stddev: form.stddev,
        learnt: form.learnt,
        window_secs: form.window_secs,
        requests: form.requests,
        errors: form.errors,
        seen: form.seen,
        margin: form.margin,
        value: form.value,
        distinct: form.distinct,
        samples: form.samples.into_owned(),
    });
    Ok(Ban {
        subject,
        since: form.since,
        term: form.term,
        tier: form.tier,
        origin: form.origin,
        reason: form.reason.into_owned(),
        finding,
        observe: form.observe,
        gate: form.gate,
        extended: form.extended,
        by: form.by.map(Cow::into_owned),
        once_confirmed: form.once_confirmed,
    })
}

/// An account.
pub(super) fn offences(offences: &Offences) -> postcard::Result<Vec<u8>> {
    postcard::to_stdvec(offences)
}

/// An account, read back.
pub(super) fn read_offences(bytes: &[u8]) -> postcard::Result<Offences> {
    postcard::from_bytes(bytes)
}
