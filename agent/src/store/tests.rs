use std::fs;

use portcullis_engine::{
    Ban, Gate, Origin, Term,
    baseline::Learnt,
    command::Allowed,
    detect::{Finding, Sample, Test},
    ledger::Offences,
};
use redb::ReadableDatabase as _;
use tempfile::TempDir;

use super::{
    tables::{ALLOW, BANS_1, LEARNT, META, OFFENCES_1, SCHEMA},
    *,
};

const NOW: Timestamp = Timestamp::from_secs(1_000_000);

fn ban(text: &str) -> Ban {
    Ban {
        tier: Some(4),
        reason: "z 9.0 > 3".to_owned(),
        ..Ban::new(
            text.parse().unwrap(),
            Timestamp::from_secs(1),
            Term::Permanent,
            Origin::Detector,
        )
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
    type Damage = fn(Vec<u8>) -> Vec<u8>;
    let cases: [(&str, Damage); 6] = [
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
    assert!(found >= 10, "{found}");
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

/// A ban with everything that there can be.
fn full() -> Ban {
    let finding = Finding {
        test: Test::Members,
        threshold: 5.0,
        surge: true,
        rate: 1.5,
        score: 3.25,
        mean: 0.5,
        stddev: 0.25,
        learnt: Learnt::Hour(17),
        window_secs: 60,
        requests: 90,
        errors: 300,
        seen: Timestamp::from_secs(8),
        margin: 0.125,
        value: 6.0,
        distinct: 16,
        samples: vec![Sample {
            log: "/l".to_owned(),
            offset: 1_000,
        }],
    };
    Ban {
        term: Term::Until(Timestamp::from_secs(601)),
        tier: Some(1),
        finding: Some(finding),
        observe: true,
        gate: Gate::Both,
        extended: 2,
        by: Some("root".to_owned()),
        once_confirmed: Some(Term::Permanent),
        ..ban("192.0.2.7")
    }
}

/// A ledger as schema 1 had it: all in JSON, keys as text.
#[test]
fn a_ledger_of_schema_1_is_read_and_written_anew() {
    let folder = tempfile::tempdir().unwrap();
    let database = Database::create(ledger(&folder)).unwrap();
    let transaction = database.begin_write().unwrap();
    let full_1 = br#"{"subject":"192.0.2.7","since":1000,"term":{"until":601000},"tier":1,"origin":"detector",
        "reason":"z 9.0 > 3","finding":{"test":"members","threshold":5.0,"surge":true,"rate":1.5,"score":3.25,"mean":0.5,
        "stddev":0.25,"learnt":{"hour":17},"window_secs":60,"requests":90,"errors":300,"seen":8000,"margin":0.125,
        "value":6.0,"distinct":16,"samples":[{"log":"/l","offset":1000}]},"observe":true,"gate":"both","extended":2,
        "by":"root","once_confirmed":"permanent"}"#;
    let plain_1 = br#"{"subject":"2001:db8::/64","since":1000,"term":"permanent","tier":4,"origin":"detector",
        "reason":"z 9.0 > 3","finding":null}"#;
    let allowed_1 = br#"{"since":9000,"by":"root","reason":"a monitor"}"#;
    {
        let mut bans = transaction.open_table(BANS_1).unwrap();
        bans.insert("192.0.2.7", full_1.as_slice()).unwrap();
        bans.insert("2001:db8::/64", plain_1.as_slice()).unwrap();
        // It costs itself.
        bans.insert("192.0.2.8", b"{".as_slice()).unwrap();
        let mut offences = transaction.open_table(OFFENCES_1).unwrap();
        let account_1 = br#"{"count":4,"last":9000}"#;
        offences.insert("192.0.2.7", account_1.as_slice()).unwrap();
        let mut allow = transaction.open_table(ALLOW).unwrap();
        allow
            .insert("203.0.113.0/24", allowed_1.as_slice())
            .unwrap();
        let mut learnt = transaction.open_table(LEARNT).unwrap();
        learnt.insert("mode", br#""observe""#.as_slice()).unwrap();
        transaction
            .open_table(META)
            .unwrap()
            .insert("schema", 1)
            .unwrap();
    }
    transaction.commit().unwrap();
    drop(database);
    // Once from the old form, once from the new one.
    for _ in 0..2 {
        let (_, contents) = Store::open(folder.path()).unwrap();
        let saved = contents.saved;
        assert_eq!(saved.bans, [ban("2001:db8::/64"), full()]);
        let account = Offences {
            count: 4,
            last: Timestamp::from_secs(9),
        };
        assert_eq!(saved.offences, [("192.0.2.7".parse().unwrap(), account)]);
        assert_eq!(saved.allow.len(), 1);
        assert_eq!(contents.mode, Some(Mode::Observe));
    }
    let database = Database::open(ledger(&folder)).unwrap();
    let transaction = database.begin_read().unwrap();
    assert!(transaction.open_table(BANS_1).is_err());
    let meta = transaction.open_table(META).unwrap();
    assert_eq!(meta.get("schema").unwrap().unwrap().value(), SCHEMA);
}

/// These bytes are on disks. Where this fails, the change is a new schema, with a step that leads to it.
#[test]
fn the_form_of_schema_2_is_what_it_was() {
    let digit = |n: u8| char::from_digit(n.into(), 16).unwrap();
    let digits = |byte: &u8| [digit(byte >> 4), digit(byte & 15)];
    let hex = |bytes: &[u8]| -> String { bytes.iter().flat_map(digits).collect() };
    let bytes = form::ban(&full()).unwrap();
    assert_eq!(hex(&bytes), FULL);
    assert_eq!(form::read_ban(full().subject, &bytes).unwrap(), full());
    let account = Offences {
        count: 300,
        last: Timestamp::from_secs(9),
    };
    assert_eq!(hex(&form::offences(&account).unwrap()), "ac02a846");
    for (subject, key) in [
        ("192.0.2.7", "c000020720"),
        ("192.0.2.0/24", "c000020018"),
        ("2001:db8::/64", "20010db800000000000000000000000040"),
    ] {
        let subject = subject.parse().unwrap();
        let bytes = form::Key::of(subject);
        assert_eq!(hex(bytes.bytes()), key);
        assert_eq!(form::Key::subject(bytes.bytes()), Some(subject));
    }
    // Each variant has its number.
    let numbers = |numbers: Vec<postcard::Result<Vec<u8>>>| -> Vec<u8> {
        numbers.into_iter().map(|bytes| bytes.unwrap()[0]).collect()
    };
    let tests = [
        Test::ZScore,
        Test::TimesMean,
        Test::Ceiling,
        Test::Cap,
        Test::Failures,
        Test::OnePage,
        Test::InventedPages,
        Test::BarePages,
        Test::Members,
    ];
    let tests = tests.iter().map(postcard::to_stdvec).collect();
    assert_eq!(numbers(tests), [0, 1, 2, 3, 4, 5, 6, 7, 8]);
    let gates = [Gate::Wire, Gate::Nginx, Gate::Both];
    let gates = gates.iter().map(postcard::to_stdvec).collect();
    assert_eq!(numbers(gates), [0, 1, 2]);
    let learnt = [Learnt::WarmUp, Learnt::Recent, Learnt::Hour(3)];
    let learnt = learnt.iter().map(postcard::to_stdvec).collect();
    assert_eq!(numbers(learnt), [0, 1, 2]);
    let origins = [Origin::Detector, Origin::Operator];
    let origins = origins.iter().map(postcard::to_stdvec).collect();
    assert_eq!(numbers(origins), [0, 1]);
    let terms = [Term::Until(Timestamp::from_secs(0)), Term::Permanent];
    let terms = terms.iter().map(postcard::to_stdvec).collect();
    assert_eq!(numbers(terms), [0, 1]);
}

const FULL: &str = concat!(
    // Since, until 601 s, tier 1, the detector's, and why.
    "e80700a8d724010100097a20392e30203e2033",
    // The finding: members; threshold, surge, rate.
    "0108000000000000144001000000000000f83f",
    // Score, mean, deviation.
    "0000000000000a40000000000000e03f000000000000d03f",
    // Hour 17, window, requests, errors, newest; margin, value.
    "02113c5aac02c03e000000000000c03f0000000000001840",
    // Sixteen paths, one place in a log.
    "1001022f6ce807",
    // Observed, at both gates, extended twice, by root, for good once confirmed.
    "0102020104726f6f740101",
);

#[test]
fn more_than_a_lot_is_written_and_what_was_learnt_comes_last() {
    let folder = with_bans(50_000);
    let (_, contents) = Store::open(folder.path()).unwrap();
    assert_eq!(contents.saved.bans.len(), 50_000);
    let ban = Key::Ban("ffff::/16".parse().unwrap());
    let allow = Key::Allow("ffff::/16".parse().unwrap());
    assert!(ban < allow && allow < Key::Learnt("baseline"));
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
