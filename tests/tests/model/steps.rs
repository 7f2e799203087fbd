//! What may happen, at random.

use std::net::IpAddr;

use portcullis_engine::Subject;
use proptest::prelude::*;

use super::Rules;

const SECOND: u64 = 1000;
const MINUTE: u64 = 60 * SECOND;
const HOUR: u64 = 60 * MINUTE;
const DAY: u64 = 24 * HOUR;

/// Something that happens, and how much of what follows from it is done before the next thing does.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    pub happens: Happens,
    /// So many quarters of what waits for the kernel.
    pub kernel: usize,
    /// So many quarters of what waits for the disk.
    pub disk: usize,
}

/// Times are milliseconds; indices are into the lists below.
#[derive(Clone, Copy, Debug)]
pub enum Happens {
    /// A client does what no visitor does.
    Offence(usize),
    /// Time passes, and the agent sees it pass.
    Pass(u64),
    /// The machine sleeps.
    Sleep(u64),
    /// Time passes up to a ban's next end, and so much more or less.
    ToNextEnd(i64),
    /// Whether somebody goes on sending.
    Sends(usize, bool),
    Ban {
        whom: usize,
        length: Option<u64>,
        observe: bool,
        confirm: Option<u64>,
    },
    /// Many bans at once.
    Import {
        from: u8,
        count: u8,
        length: Option<u64>,
    },
    /// The ban that waits for that, and otherwise one that does not.
    Confirm(usize),
    /// One of those that stand.
    Unban(usize),
    UnbanAll,
    Allow(usize),
    Disallow(usize),
    /// The configuration is another one from now on, or from the next start on.
    Configure {
        rules: usize,
        is_reloaded: bool,
    },
    SetClock(i64),
    /// Somebody else is at the kernel's maps: at one of those that stand, or at any.
    Meddle(Meddling, usize),
    Reconcile,
    /// An orderly end or a crash, and a new start.
    Restart {
        is_crash: bool,
        down: u64,
        set_by: i64,
    },
}

#[derive(Clone, Copy, Debug)]
pub enum Meddling {
    Delete,
    Add,
    AddOver,
    Observe,
    Prolong,
}

/// Addresses of clients, and as whom they are banned.
pub fn clients() -> Vec<(IpAddr, Subject)> {
    let addresses = [
        "198.19.0.1",
        "198.19.0.2",
        "198.19.0.3",
        "198.19.0.9",
        "2001:db8:1:1::7",
        "2001:db8:1:2::7",
    ];
    let addresses = addresses.map(|address| address.parse::<IpAddr>().unwrap());
    addresses
        .map(|address| (address, Subject::of_client(address)))
        .to_vec()
}

/// Whom operators ban, and strangers enter.
pub fn subjects() -> Vec<Subject> {
    let others = [
        "198.19.0.0/30",
        "198.19.0.0/24",
        "2001:db8:1::/60",
        "2001:db8:1:1::5",
    ];
    let others = others.map(|subject| subject.parse::<Subject>().unwrap());
    let clients = clients().into_iter().map(|(_, subject)| subject);
    clients.chain(others).collect()
}

/// What operators allow.
pub fn allowable() -> Vec<Subject> {
    let all = [
        "198.19.0.2",
        "198.19.0.0/31",
        "198.19.0.0/29",
        "2001:db8:1:2::/64",
        "2001:db8:1:1::9",
        "198.19.1.0/28",
    ];
    all.map(|subject| subject.parse().unwrap()).to_vec()
}

/// Whose packets are looked at.
pub fn probes() -> Vec<IpAddr> {
    let others = [
        "198.19.0.200",
        "198.19.1.3",
        "2001:db8:1:1::5",
        "2001:db8:1:1::9",
        "2001:db8:1:f::1",
        "198.19.9.9",
    ];
    let others = others.map(|address| address.parse().unwrap());
    let clients = clients().into_iter().map(|(address, _)| address);
    clients.chain(others).collect()
}

/// Configurations.
pub fn rules(number: usize) -> Rules {
    match number {
        0 => Rules {
            schedule: vec![Some(10 * MINUTE), Some(30 * MINUTE), Some(2 * HOUR), None],
            ..Rules::default()
        },
        1 => Rules {
            schedule: vec![Some(5 * MINUTE)],
            forgive: HOUR,
            ..Rules::default()
        },
        2 => Rules {
            schedule: vec![Some(HOUR), None],
            forgive: DAY,
            allow: ["198.19.0.3", "2001:db8:1:2::/64"]
                .map(|net| net.parse().unwrap())
                .into(),
        },
        _ => Rules::default(),
    }
}

fn length() -> impl Strategy<Value = Option<u64>> {
    prop_oneof![
        Just(Some(MINUTE)),
        Just(Some(10 * MINUTE)),
        Just(Some(HOUR)),
        Just(Some(DAY)),
        Just(None),
    ]
}

fn span() -> impl Strategy<Value = u64> {
    prop_oneof![
        2 => 1..5 * SECOND,
        3 => 10 * SECOND..5 * MINUTE,
        3 => 5 * MINUTE..HOUR,
        1 => HOUR..5 * HOUR,
    ]
}

fn set_by() -> impl Strategy<Value = i64> {
    let day = i64::try_from(DAY).unwrap();
    prop_oneof![
        Just(day),
        Just(-day),
        Just(-day / 24),
        Just(-20_000),
        Just(90_000),
    ]
}

fn happens() -> impl Strategy<Value = Happens> {
    use Happens as H;
    let whom = || 0..subjects().len();
    let client = || 0..clients().len();
    let net = || 0..allowable().len();
    let meddling = prop_oneof![
        2 => Just(Meddling::Delete),
        1 => Just(Meddling::Add),
        1 => Just(Meddling::AddOver),
        1 => Just(Meddling::Observe),
        1 => Just(Meddling::Prolong),
    ];
    let confirm =
        prop_oneof![3 => Just(None), 1 => Just(Some(MINUTE)), 1 => Just(Some(5 * MINUTE))];
    let ban = (whom(), length(), prop::bool::weighted(0.25), confirm);
    let ban = ban.prop_map(|(whom, length, observe, confirm)| H::Ban {
        whom,
        length,
        observe,
        confirm,
    });
    let import = (0_u8..40, 10_u8..40, length());
    let import = import.prop_map(|(from, count, length)| H::Import {
        from,
        count,
        length,
    });
    let restart = (
        any::<bool>(),
        prop_oneof![Just(0), span()],
        prop_oneof![4 => Just(0), 1 => set_by()],
    );
    let restart = restart.prop_map(|(not_crash, down, set_by)| H::Restart {
        is_crash: !not_crash,
        down,
        set_by,
    });
    let configure = (0_usize..4, any::<bool>());
    let configure = configure.prop_map(|(rules, is_reloaded)| H::Configure { rules, is_reloaded });
    let end = prop_oneof![2 => Just(-1500), 1 => Just(100), 1 => Just(0)];
    prop_oneof![
        12 => client().prop_map(H::Offence),
        5 => span().prop_map(H::Pass),
        2 => span().prop_map(H::Sleep),
        8 => end.prop_map(H::ToNextEnd),
        4 => (client(), any::<bool>()).prop_map(|(client, sends)| H::Sends(client, sends)),
        7 => ban,
        2 => import,
        3 => any::<usize>().prop_map(H::Confirm),
        4 => any::<usize>().prop_map(H::Unban),
        1 => Just(H::UnbanAll),
        2 => net().prop_map(H::Allow),
        2 => net().prop_map(H::Disallow),
        2 => configure,
        2 => set_by().prop_map(H::SetClock),
        7 => (meddling, any::<usize>()).prop_map(|(meddling, whom)| H::Meddle(meddling, whom)),
        4 => Just(H::Reconcile),
        5 => restart,
    ]
}

pub fn steps(most: usize) -> impl Strategy<Value = Vec<Step>> {
    let quarters = |all, none| prop_oneof![all => Just(4_usize), none => Just(0), 1 => 1_usize..4];
    let step = (happens(), quarters(6, 1), quarters(2, 3));
    let step = step.prop_map(|(happens, kernel, disk)| Step {
        happens,
        kernel,
        disk,
    });
    prop::collection::vec(step, 1..most)
}
