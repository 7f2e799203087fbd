use std::fs;

use portcullis_engine::{Ban, Origin, Term, command::Allowed, ledger::Offences};
use tempfile::TempDir;

use super::{
    tables::{META, SCHEMA},
    *,
};

const NOW: Timestamp = Timestamp::from_secs(1_000_000);

fn ban(text: &str) -> Ban {
    Ban {
        subject: text.parse().unwrap(),
        since: Timestamp::from_secs(1),
        term: Term::Permanent,
        tier: Some(4),
        origin: Origin::Detector,
        reason: "z 9.0 > 3".to_owned(),
        finding: None,
        observe: false,
        gate: portcullis_engine::Gate::Wire,
        extended: 0,
        by: None,
        once_confirmed: None,
    }
}

#[test]
fn what_was_saved_is_there_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let (store, contents) = Store::open(folder.path()).unwrap();
    assert!(contents.saved.bans.is_empty() && contents.checkpoint.is_none());
    let offences = Offences {
        count: 4,
        last: Timestamp::from_secs(9),
    };
    store.save(&Change::Ban(ban("192.0.2.1")));
    store.save(&Change::Ban(ban("2001:db8::/64")));
    store.save(&Change::Offences("192.0.2.1".parse().unwrap(), offences));
    store.save(&Change::Unban("2001:db8::/64".parse().unwrap()));
    let allowed = Allowed {
        since: Timestamp::from_secs(9),
        by: "root".to_owned(),
        reason: "a monitor".to_owned(),
    };
    let nets = ["203.0.113.0/24", "2001:db8:7::/48"].map(|net| net.parse().unwrap());
    for net in nets {
        store.save(&Change::Allow(net, Some(allowed.clone())));
    }
    store.save(&Change::Allow(nets[1], None));
    store.save_checkpoint(&Checkpoint::default());
    assert!(store.settle(Duration::from_mins(1)));
    assert_eq!(store.pending(), 0);
    drop(store);
    let (_store, contents) = Store::open(folder.path()).unwrap();
    assert_eq!(contents.saved.bans, [ban("192.0.2.1")]);
    assert_eq!(
        contents.saved.offences,
        [("192.0.2.1".parse().unwrap(), offences)]
    );
    assert_eq!(contents.saved.allow, [(nets[0], allowed)]);
    assert_eq!(contents.checkpoint, Some(Checkpoint::default()));
}

#[test]
fn a_second_agent_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (_store, _) = Store::open(folder.path()).unwrap();
    let error = Store::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("another agent is running"), "{error}");
}

fn ledger(folder: &TempDir) -> PathBuf {
    folder.path().join("ledger.redb")
}

/// A folder with a ledger of so many bans.
fn with_bans(count: u32) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let (store, _) = Store::open(folder.path()).unwrap();
    for n in 0..count {
        let address = std::net::Ipv4Addr::from(0xc000_0200 + n);
        store.save(&Change::Ban(ban(&address.to_string())));
    }
    assert!(store.settle(Duration::from_mins(1)));
    folder
}

fn damaged(folder: &TempDir) -> Vec<String> {
    let names = fs::read_dir(folder.path()).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.filter(|name| name.contains("damaged")).collect();
    names.sort();
    names
}

fn set_schema(folder: &TempDir, schema: u64) {
    let database = Database::open(ledger(folder)).unwrap();
    let transaction = database.begin_write().unwrap();
    let mut meta = transaction.open_table(META).unwrap();
    meta.insert("schema", schema).unwrap();
    drop(meta);
    transaction.commit().unwrap();
}

#[test]
fn a_newer_ledger_is_left_alone() {
    let folder = with_bans(1);
    set_schema(&folder, SCHEMA + 1);
    let error = format!("{:#}", Store::open(folder.path()).unwrap_err());
    assert!(error.contains("another version"), "{error}");
    let error = format!("{:#}", Store::recover(folder.path(), NOW).unwrap_err());
    assert!(error.contains("another version"), "{error}");
    // A file of a redb to come.
    set_schema(&folder, SCHEMA);
    let mut bytes = fs::read(ledger(&folder)).unwrap();
    for slot in [64, 192] {
        assert_eq!(bytes[slot], 3);
        bytes[slot] = 4;
    }
    fs::write(ledger(&folder), &bytes).unwrap();
    let error = format!("{:#}", Store::recover(folder.path(), NOW).unwrap_err());
    assert!(error.contains("another version"), "{error}");
    assert_eq!(fs::read(ledger(&folder)).unwrap(), bytes);
    assert!(damaged(&folder).is_empty());
}

#[test]
fn a_ledger_that_may_not_be_read_is_an_error() {
    let folder = with_bans(1);
    fs::remove_file(ledger(&folder)).unwrap();
    fs::create_dir(ledger(&folder)).unwrap();
    let error = format!("{:#}", Store::recover(folder.path(), NOW).unwrap_err());
    assert!(error.contains("cannot open"), "{error}");
    assert!(damaged(&folder).is_empty());
}

#[test]
fn a_damaged_ledger_is_kept_aside_and_a_new_one_begun() {
    let cases: [(&str, fn(Vec<u8>) -> Vec<u8>); 6] = [
        ("empty", |_| Vec::new()),
        ("garbage", |bytes| vec![0xa5; bytes.len()]),
        ("short garbage", |_| b"oops".to_vec()),
        ("cut in half", |bytes| bytes[..bytes.len() / 2].to_vec()),
        ("its head overwritten", |mut bytes| {
            bytes[..4096].fill(0);
            bytes
        }),
        ("its pages overwritten", |mut bytes| {
            bytes[4096..].fill(0x5a);
            bytes
        }),
    ];
    for (what, damage) in cases {
        let folder = with_bans(100);
        let bytes = damage(fs::read(ledger(&folder)).unwrap());
        fs::write(ledger(&folder), &bytes).unwrap();
        let error = format!("{:#}", Store::open(folder.path()).unwrap_err());
        assert!(error.contains("start the agent"), "{what}: {error}");
        let (store, contents) = Store::recover(folder.path(), NOW).unwrap();
        assert!(contents.saved.bans.is_empty(), "{what}");
        let aside = folder.path().join("ledger.redb.damaged-1000000");
        let lost = contents.lost.unwrap();
        let is_there = matches!(&lost, Lost::All { aside: Some(there), .. } if *there == aside);
        assert!(is_there, "{what}: {lost:?}");
        assert_eq!(fs::read(aside).unwrap(), bytes, "{what}");
        store.save(&Change::Ban(ban("192.0.2.1")));
        assert!(store.settle(Duration::from_mins(1)));
        drop(store);
        // Not made up for: the next start is to do that.
        let (store, contents) = Store::recover(folder.path(), NOW).unwrap();
        assert!(matches!(contents.lost, Some(Lost::All { aside: None, .. })));
        assert_eq!(contents.saved.bans, [ban("192.0.2.1")]);
        store.is_made_up_for();
        drop(store);
        let (_, contents) = Store::recover(folder.path(), NOW).unwrap();
        assert_eq!(contents.lost, None);
        assert_eq!(contents.saved.bans, [ban("192.0.2.1")]);
    }
}

#[test]
fn three_damaged_ledgers_are_kept() {
    let folder = with_bans(1);
    for n in 0..5 {
        fs::write(ledger(&folder), b"oops").unwrap();
        let now = NOW + Duration::from_secs(n / 2);
        drop(Store::recover(folder.path(), now).unwrap());
    }
    let kept = ["1000002", "1000003", "1000004"].map(|secs| format!("ledger.redb.damaged-{secs}"));
    assert_eq!(damaged(&folder), kept);
}

/// Wherever a file is hit: it is whole, or known to be damaged, and never an error or a panic.
#[test]
fn a_byte_that_was_altered_anywhere_is_noticed_or_does_no_harm() {
    let folder = with_bans(200);
    let (store, _) = Store::open(folder.path()).unwrap();
    drop(store);
    let whole = fs::read(ledger(&folder)).unwrap();
    let mut random = fastrand::Rng::with_seed(7);
    let mut found = 0;
    for round in 0..150 {
        let mut bytes = whole.clone();
        // Most of the file is unused: half of the rounds hit where it is not.
        let used: Vec<usize> = (0..bytes.len()).filter(|at| bytes[*at] != 0).collect();
        let at = match round % 2 {
            0 => used[random.usize(..used.len())],
            _ => random.usize(..bytes.len()),
        };
        bytes[at] ^= 1 << random.u8(..8);
        fs::write(ledger(&folder), &bytes).unwrap();
        let (store, contents) = Store::recover(folder.path(), NOW).unwrap();
        match contents.lost {
            Some(_) => found += 1,
            None => assert_eq!(contents.saved.bans.len(), 200, "byte {at}"),
        }
        drop(store);
    }
    assert!(found > 20, "{found}");
}

#[test]
fn the_lock_holds_whatever_the_ledger_is() {
    let folder = with_bans(1);
    fs::write(ledger(&folder), b"oops").unwrap();
    let lock = lock(folder.path()).unwrap();
    for opened in [
        Store::open(folder.path()),
        Store::recover(folder.path(), NOW),
    ] {
        let error = opened.unwrap_err().to_string();
        assert!(error.starts_with("another agent is running"), "{error}");
    }
    drop(lock);
    Store::recover(folder.path(), NOW).unwrap();
}

#[test]
fn what_belongs_together_is_on_disk_together_or_not_at_all() {
    let folder = with_bans(1);
    let (store, _) = Store::open(folder.path()).unwrap();
    let bans_after_a_crash = || {
        let crashed = tempfile::tempdir().unwrap();
        fs::copy(ledger(&folder), ledger(&crashed)).unwrap();
        Store::open(crashed.path()).unwrap().1.saved.bans.len()
    };
    let together = store.together();
    store.save(&Change::Ban(ban("192.0.2.77")));
    // Far longer than the writer needs to begin.
    assert!(!store.settle(Duration::from_millis(300)));
    assert_eq!((store.pending(), bans_after_a_crash()), (1, 1));
    store.save(&Change::Ban(ban("192.0.2.78")));
    drop(together);
    assert!(store.settle(Duration::from_mins(1)));
    assert_eq!(bans_after_a_crash(), 3);
    // An end does not wait for it.
    let _together = store.together();
    store.save(&Change::Ban(ban("192.0.2.79")));
    drop(store);
    assert_eq!(bans_after_a_crash(), 4);
}
