//! What the database holds, and how.

use std::{collections::BTreeMap, panic::resume_unwind, thread};

use anyhow::anyhow;
use ipnet::IpNet;
use portcullis_engine::{Ban, Subject, ledger::Offences};
use redb::{
    Database, ReadableDatabase as _, ReadableTable as _, ReadableTableMetadata, TableDefinition,
    TableError,
};
use serde::de::DeserializeOwned;
use tracing::{info, warn};

use super::{
    Contents, Lost,
    file::{NEWER, Trouble, checked},
    form,
};

/// Version of the tables' contents.
///
/// 1: every value is JSON, every key text. 2: bans and accounts are as [`form`] writes them.
pub(super) const SCHEMA: u64 = 2;
pub(super) const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
/// Subject → [`portcullis_engine::Ban`].
const BANS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("bans-2");
/// Subject → [`portcullis_engine::ledger::Offences`].
const OFFENCES: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("offences-2");
/// Network → [`portcullis_engine::command::Allowed`] as JSON.
pub(super) const ALLOW: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("allow");
/// `baseline`, `checkpoint` and `mode`, as JSON; and [`LOST`].
pub(super) const LEARNT: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("learnt");

/// What schema 1 had them in.
pub(super) const BANS_1: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("bans");
/// What schema 1 had them in.
pub(super) const OFFENCES_1: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("offences");

/// There as long as what the kernel holds is not in a ledger that was begun in a damaged one's place: a start that was cut
/// short is made up for by the next one.
pub(super) const LOST: &str = "lost";

/// What is written under one key. What was learnt comes last: the place in the logs is never ahead of what was decided by their
/// lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Key {
    Ban(Subject),
    Offences(Subject),
    Allow(IpNet),
    Learnt(&'static str),
}

/// Newest value of each key that is not on disk yet; `None` deletes.
pub(super) type Pending = BTreeMap<Key, Option<Vec<u8>>>;

/// Makes the tables of a new database.
pub(super) fn begin(database: &Database, is_replacement: bool) -> Result<(), Trouble> {
    let transaction = checked(database.begin_write())?;
    {
        let mut meta = checked(transaction.open_table(META))?;
        checked(meta.insert("schema", SCHEMA))?;
        for table in [BANS, OFFENCES] {
            checked(transaction.open_table(table))?;
        }
        checked(transaction.open_table(ALLOW))?;
        let mut learnt = checked(transaction.open_table(LEARNT))?;
        if is_replacement {
            checked(learnt.insert(LOST, b"true".as_slice()))?;
        }
    }
    checked(transaction.commit())
}

/// Brings a database to this version's form, unless it is another one's.
pub(super) fn prepare(database: &Database) -> Result<(), Trouble> {
    let transaction = checked(database.begin_read())?;
    let schema = match transaction.open_table(META) {
        Ok(meta) => checked(meta.get("schema"))?.map(|schema| schema.value()),
        // Made, and nothing more.
        Err(TableError::TableDoesNotExist(_)) => None,
        Err(error) => return checked(Err(error)),
    };
    drop(transaction);
    // A step at a time; each ends with its schema written, in the same transaction.
    match schema {
        None => begin(database, false),
        Some(SCHEMA) => Ok(()),
        Some(1) => from_1_to_2(database),
        Some(other) => Err(Trouble::Refused(anyhow!(
            "schema {other}, this one knows {SCHEMA}: {NEWER}"
        ))),
    }
}

/// Bans and accounts were JSON.
fn from_1_to_2(database: &Database) -> Result<(), Trouble> {
    let transaction = checked(database.begin_write())?;
    {
        let mut bans = checked(transaction.open_table(BANS))?;
        for item in checked(checked(transaction.open_table(BANS_1))?.iter())? {
            let (key, value) = checked(item)?;
            let ban: Option<Ban> = decoded(key.value(), value.value());
            if let Some((ban, bytes)) =
                ban.and_then(|ban| Some((ban.subject, form::ban(&ban).ok()?)))
            {
                checked(bans.insert(form::Key::of(ban).bytes(), bytes.as_slice()))?;
            }
        }
        let mut offences = checked(transaction.open_table(OFFENCES))?;
        for item in checked(checked(transaction.open_table(OFFENCES_1))?.iter())? {
            let (key, value) = checked(item)?;
            let account: Option<Offences> = decoded(key.value(), value.value());
            let bytes = account.and_then(|account| form::offences(&account).ok());
            if let (Ok(subject), Some(bytes)) = (key.value().parse(), bytes) {
                checked(offences.insert(form::Key::of(subject).bytes(), bytes.as_slice()))?;
            }
        }
        checked(checked(transaction.open_table(META))?.insert("schema", 2))?;
    }
    for old in [BANS_1, OFFENCES_1] {
        checked(transaction.delete_table(old))?;
    }
    checked(transaction.commit())?;
    info!("the ledger is written in a new form, which an older version does not read");
    Ok(())
}

/// Changes that are written together. Each lot takes up memory until it is on disk.
const LOT: usize = 20_000;

/// Writes all changes, in their order, some at a time: where the machine is stopped in between, the first ones are there.
pub(super) fn write(database: &Database, changes: &Pending) -> Result<(), Trouble> {
    let mut changes = changes.iter().peekable();
    while changes.peek().is_some() {
        write_lot(database, changes.by_ref().take(LOT))?;
    }
    Ok(())
}

fn write_lot<'a>(
    database: &Database,
    changes: impl Iterator<Item = (&'a Key, &'a Option<Vec<u8>>)>,
) -> Result<(), Trouble> {
    let transaction = checked(database.begin_write())?;
    {
        let mut bans = checked(transaction.open_table(BANS))?;
        let mut offences = checked(transaction.open_table(OFFENCES))?;
        let mut allow = checked(transaction.open_table(ALLOW))?;
        let mut learnt = checked(transaction.open_table(LEARNT))?;
        for (key, value) in changes {
            let value = value.as_deref();
            match key {
                Key::Ban(subject) => put(&mut bans, &form::Key::of(*subject).bytes(), value),
                Key::Offences(subject) => {
                    put(&mut offences, &form::Key::of(*subject).bytes(), value)
                }
                Key::Allow(net) => put(&mut allow, &net.to_string().as_str(), value),
                Key::Learnt(name) => put(&mut learnt, name, value),
            }?;
        }
    }
    checked(transaction.commit())
}

fn put<K: redb::Key + 'static>(
    table: &mut redb::Table<'_, K, &'static [u8]>,
    key: &K::SelfType<'_>,
    value: Option<&[u8]>,
) -> Result<(), Trouble> {
    match value {
        Some(value) => drop(checked(table.insert(key, value))?),
        None => drop(checked(table.remove(key))?),
    }
    Ok(())
}

pub(super) fn read(database: &Database) -> Result<Contents, Trouble> {
    // Bans take longest; the accounts are read meanwhile.
    let (contents, offences) = thread::scope(|scope| {
        let offences = scope.spawn(|| read_offences(database));
        let contents = read_all_but_offences(database);
        let offences = offences.join();
        (
            contents,
            offences.unwrap_or_else(|panic| resume_unwind(panic)),
        )
    });
    let mut contents = contents?;
    contents.saved.offences = offences?;
    Ok(contents)
}

fn read_offences(database: &Database) -> Result<Vec<(Subject, Offences)>, Trouble> {
    let transaction = checked(database.begin_read())?;
    let table = checked(transaction.open_table(OFFENCES))?;
    let mut all = Vec::with_capacity(length(&table)?);
    for item in checked(table.iter())? {
        let (key, value) = checked(item)?;
        if let Some(subject) = subject(key.value())
            && let Some(offences) = readable(key.value(), form::read_offences(value.value()))
        {
            all.push((subject, offences));
        }
    }
    Ok(all)
}

fn read_all_but_offences(database: &Database) -> Result<Contents, Trouble> {
    let transaction = checked(database.begin_read())?;
    let mut contents = Contents::default();
    let saved = &mut contents.saved;
    let table = checked(transaction.open_table(BANS))?;
    saved.bans.reserve_exact(length(&table)?);
    for item in checked(table.iter())? {
        let (key, value) = checked(item)?;
        let ban = subject(key.value()).map(|subject| form::read_ban(subject, value.value()));
        saved
            .bans
            .extend(ban.and_then(|ban| readable(key.value(), ban)));
    }
    for item in checked(checked(transaction.open_table(ALLOW))?.iter())? {
        let (key, value) = checked(item)?;
        if let (Ok(net), Some(allowed)) = (key.value().parse(), decoded(key.value(), value.value()))
        {
            saved.allow.push((net, allowed));
        }
    }
    for item in checked(checked(transaction.open_table(LEARNT))?.iter())? {
        let (key, value) = checked(item)?;
        let (key, value) = (key.value(), value.value());
        match key {
            "baseline" => saved.baseline = decoded(key, value),
            "checkpoint" => contents.checkpoint = decoded(key, value),
            "mode" => contents.mode = decoded(key, value),
            LOST => {
                contents.lost = Some(Lost::All {
                    why: "a start that was to make up for a damaged ledger was cut short"
                        .to_owned(),
                    aside: None,
                });
            }
            _ => {}
        }
    }
    Ok(contents)
}

fn length(table: &impl ReadableTableMetadata) -> Result<usize, Trouble> {
    Ok(usize::try_from(checked(table.len())?).unwrap_or_default())
}

fn subject(key: &[u8]) -> Option<Subject> {
    let subject = form::Key::subject(key);
    if subject.is_none() {
        warn!("the ledger's key {key:?} is unreadable");
    }
    subject
}

fn readable<T>(key: &[u8], value: postcard::Result<T>) -> Option<T> {
    value
        .inspect_err(|error| {
            let subject = form::Key::subject(key).map(|subject| subject.to_string());
            let subject = subject.unwrap_or_default();
            warn!("the ledger's value of {subject} is unreadable: {error}");
        })
        .ok()
}

/// One damaged value costs itself, not the ledger.
fn decoded<T: DeserializeOwned>(key: &str, value: &[u8]) -> Option<T> {
    serde_json::from_slice(value)
        .inspect_err(|error| warn!("the ledger's value of {key} is unreadable: {error}"))
        .ok()
}
