//! What the database holds, and how.

use std::collections::BTreeMap;

use anyhow::anyhow;
use redb::{Database, ReadableDatabase as _, ReadableTable as _, TableDefinition, TableError};
use serde::de::DeserializeOwned;
use tracing::warn;

use super::{
    Contents, Lost,
    file::{NEWER, Trouble, checked},
};

/// Version of the tables' contents.
pub(super) const SCHEMA: u64 = 1;
pub(super) const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
/// Subject → [`portcullis_engine::Ban`] as JSON.
const BANS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("bans");
/// Subject → [`portcullis_engine::ledger::Offences`] as JSON.
const OFFENCES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("offences");
/// Network → [`portcullis_engine::command::Allowed`] as JSON.
const ALLOW: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("allow");
/// `baseline`, `checkpoint` and `mode`, as JSON; and [`LOST`].
const LEARNT: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("learnt");

/// There as long as what the kernel holds is not in a ledger that was begun in a damaged one's place: a start that was cut
/// short is made up for by the next one.
pub(super) const LOST: &str = "lost";

/// A table of the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Table {
    Bans,
    Offences,
    Allow,
    Learnt,
}

/// Newest value of each key that is not on disk yet; `None` deletes.
pub(super) type Pending = BTreeMap<(Table, String), Option<Vec<u8>>>;

/// Makes the tables of a new database.
pub(super) fn begin(database: &Database, is_replacement: bool) -> Result<(), Trouble> {
    let transaction = checked(database.begin_write())?;
    {
        let mut meta = checked(transaction.open_table(META))?;
        checked(meta.insert("schema", SCHEMA))?;
        for table in [BANS, OFFENCES, ALLOW] {
            checked(transaction.open_table(table))?;
        }
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
    match schema {
        None => begin(database, false),
        Some(SCHEMA) => Ok(()),
        Some(other) => Err(Trouble::Refused(anyhow!(
            "schema {other}, this one knows {SCHEMA}: {NEWER}"
        ))),
    }
}

pub(super) fn write(database: &Database, changes: &Pending) -> Result<(), Trouble> {
    let transaction = checked(database.begin_write())?;
    {
        let mut bans = checked(transaction.open_table(BANS))?;
        let mut offences = checked(transaction.open_table(OFFENCES))?;
        let mut allow = checked(transaction.open_table(ALLOW))?;
        let mut learnt = checked(transaction.open_table(LEARNT))?;
        for ((table, key), value) in changes {
            let table = match table {
                Table::Bans => &mut bans,
                Table::Offences => &mut offences,
                Table::Allow => &mut allow,
                Table::Learnt => &mut learnt,
            };
            match value {
                Some(value) => {
                    drop(checked(table.insert(key.as_str(), value.as_slice()))?);
                }
                None => drop(checked(table.remove(key.as_str()))?),
            }
        }
    }
    checked(transaction.commit())
}

pub(super) fn read(database: &Database) -> Result<Contents, Trouble> {
    let transaction = checked(database.begin_read())?;
    let mut contents = Contents::default();
    let mut each = |table, take: &mut dyn FnMut(&mut Contents, &str, &[u8])| {
        let table = checked(transaction.open_table(table))?;
        for item in checked(table.iter())? {
            let (key, value) = checked(item)?;
            take(&mut contents, key.value(), value.value());
        }
        Ok::<(), Trouble>(())
    };
    each(BANS, &mut |contents, key, value| {
        contents.saved.bans.extend(decoded(key, value));
    })?;
    each(OFFENCES, &mut |contents, key, value| {
        if let (Ok(subject), Some(offences)) = (key.parse(), decoded(key, value)) {
            contents.saved.offences.push((subject, offences));
        }
    })?;
    each(ALLOW, &mut |contents, key, value| {
        if let (Ok(net), Some(allowed)) = (key.parse(), decoded(key, value)) {
            contents.saved.allow.push((net, allowed));
        }
    })?;
    each(LEARNT, &mut |contents, key, value| match key {
        "baseline" => contents.saved.baseline = decoded(key, value),
        "checkpoint" => contents.checkpoint = decoded(key, value),
        "mode" => contents.mode = decoded(key, value),
        LOST => {
            contents.lost = Some(Lost::All {
                why: "a start that was to make up for a damaged ledger was cut short".to_owned(),
                aside: None,
            });
        }
        _ => {}
    })?;
    Ok(contents)
}

/// One damaged value costs itself, not the ledger.
fn decoded<T: DeserializeOwned>(key: &str, value: &[u8]) -> Option<T> {
    serde_json::from_slice(value)
        .inspect_err(|error| warn!("the ledger's value of {key} is unreadable: {error}"))
        .ok()
}
