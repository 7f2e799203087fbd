//! The kernel in the hands of the agent, and of somebody else.

use std::{
    net::{IpAddr, Ipv6Addr},
    path::PathBuf,
    time::Duration,
};

use aya::{
    maps::{HashMap, LpmTrie, Map, MapData, lpm_trie::Key},
    programs::{TestRun as _, TestRunOptions},
};
use ipnet::IpNet;
use portcullis::{
    enforce::{
        Change, Enforcer, Lifetime, Mode,
        dry_run::DryRun,
        iptables::{self, Iptables},
        xdp::{self, Flavour, Lock, Options, Xdp},
    },
    runtime::clock,
};
use portcullis_common::{
    SCHEMA,
    ban::{self, Entry},
    names,
};
use portcullis_engine::Subject;

use super::{MAX_BANS, steps::Meddling};

/// What is in force, and outlives the agent.
pub enum Kernel {
    Xdp(Box<Pinned>),
    /// Sets in the calling thread's namespace; none while no agent runs.
    Ipset(Option<Iptables>),
    /// As if it were one: the entries stay.
    DryRun(DryRun),
}

/// Pinned maps, and whoever works with them.
pub struct Pinned {
    options: Options,
    running: Option<(Xdp, Option<Lock>)>,
}

/// What a stranger's entries live for.
const STRANGE: Duration = Duration::from_secs(7777);

impl Kernel {
    /// A folder of pins on an interface, without what an earlier case has left there.
    pub fn xdp(pin_dir: PathBuf, interface: &str) -> Self {
        xdp::remove_leftovers(&pin_dir).unwrap();
        let options = Options {
            interfaces: vec![interface.to_owned()],
            pin_dir,
            max_bans: u32::try_from(MAX_BANS).unwrap(),
            sample_one_in: 0,
        };
        Self::Xdp(Box::new(Pinned {
            options,
            running: None,
        }))
    }

    /// The sets of this namespace, without what an earlier case has left there.
    pub fn ipset() -> Self {
        iptables::remove_leftovers().unwrap();
        Self::Ipset(None)
    }

    /// A new run of the agent takes it over.
    pub fn open(&mut self) {
        if let Self::Ipset(running) = self {
            *running = Some(sets());
        }
        if let Self::Xdp(pinned) = self {
            let Pinned { options, running } = pinned.as_mut();
            assert!(running.is_none(), "there is one agent");
            let lock = xdp::lock(&options.pin_dir).unwrap();
            let xdp = Xdp::open(options, Flavour::Native, Mode::Enforce).unwrap();
            *running = Some((xdp, lock));
        }
    }

    /// The agent is gone, in whichever way.
    pub fn leave(&mut self) {
        match self {
            Self::Xdp(pinned) => pinned.running = None,
            Self::Ipset(running) => *running = None,
            Self::DryRun(_) => {}
        }
    }

    pub fn enforcer(&mut self) -> &mut dyn Enforcer {
        match self {
            Self::Xdp(pinned) => &mut pinned.running.as_mut().unwrap().0,
            Self::Ipset(running) => running.as_mut().unwrap(),
            Self::DryRun(kernel) => kernel,
        }
    }

    /// Is a packet of this source dropped? None where there is nothing that could.
    pub fn drops(&mut self, source: IpAddr) -> Option<bool> {
        let Self::Xdp(pinned) = self else {
            return None;
        };
        let packet = packet(source);
        let mut options = TestRunOptions::new();
        options.data_in = Some(&packet);
        let program = pinned.running.as_mut().unwrap().0.program().unwrap();
        Some(program.test_run(options).unwrap().return_value == 1)
    }

    /// Somebody else does this; the agent knows nothing of it.
    pub fn meddle(&mut self, meddling: Meddling, subject: Subject) {
        let found = self.enforcer().entries_of(&[subject]).unwrap().pop();
        let is_observed = found.is_some_and(|entry| entry.observed);
        let lifetime = found.map_or(Lifetime::For(STRANGE), |entry| entry.lifetime);
        // One thing at a time is another than it should be.
        let change = match meddling {
            Meddling::Delete => Change::Unban(subject),
            Meddling::AddOver => Change::Ban(subject, Lifetime::For(Duration::ZERO)),
            Meddling::Observe if is_observed => Change::Ban(subject, lifetime),
            Meddling::Observe => Change::Observe(subject, lifetime),
            Meddling::Prolong if is_observed => Change::Observe(subject, Lifetime::For(STRANGE)),
            Meddling::Add | Meddling::Prolong => Change::Ban(subject, Lifetime::For(STRANGE)),
        };
        // Without room for it nothing happens.
        match self {
            Self::Xdp(pinned) => pinned.change(change),
            Self::Ipset(_) => drop(sets().apply(&[change])),
            Self::DryRun(kernel) => drop(kernel.apply(&[change])),
        }
    }
}

fn sets() -> Iptables {
    Iptables::open(Mode::Enforce, u32::try_from(MAX_BANS).unwrap()).unwrap()
}

impl Pinned {
    fn map(&self, name: &str) -> MapData {
        let folder = self.options.pin_dir.join(format!("v{SCHEMA}"));
        MapData::from_pin(folder.join(name)).unwrap()
    }

    /// Behind the agent's back: of what the program looks for it learns nothing either.
    fn change(&self, change: Change) {
        let subject = change.subject();
        let entry = match change {
            Change::Ban(_, lifetime) => Some((lifetime, 0)),
            Change::Observe(_, lifetime) => Some((lifetime, ban::OBSERVE)),
            Change::Unban(_) => None,
        };
        let deadline = |lifetime| match lifetime {
            Lifetime::For(left) => u64::try_from((clock::boot() + left).as_nanos()).unwrap(),
            Lifetime::Permanent => ban::PERMANENT,
        };
        let length = subject.net().prefix_len();
        let exact = entry.map(|(lifetime, flags)| Entry::new(deadline(lifetime), flags));
        let wide = exact.map(|exact| {
            let flags = exact.flags | u32::from(length) << ban::PREFIX_SHIFT;
            Entry::new(exact.deadline, flags)
        });
        match subject.net() {
            IpNet::V4(net) if length == 32 => {
                self.write(names::BANS_V4, net.addr().octets(), exact);
            }
            IpNet::V6(net) if length == 64 => {
                let octets = net.addr().octets();
                let network = octets.first_chunk::<8>().unwrap();
                self.write(names::BANS_V6, *network, exact);
            }
            IpNet::V6(net) if length == 128 => {
                self.write(names::BANS_V6_HOST, net.addr().octets(), exact);
            }
            IpNet::V4(net) => {
                let map = Map::LpmTrie(self.map(names::CIDR_V4));
                write_wide(map, Key::new(length.into(), net.addr().octets()), wide);
            }
            IpNet::V6(net) => {
                let map = Map::LpmTrie(self.map(names::CIDR_V6));
                write_wide(map, Key::new(length.into(), net.addr().octets()), wide);
            }
        }
    }

    /// Without room for it, or without it being there, nothing happens.
    fn write<const N: usize>(&self, name: &str, key: [u8; N], entry: Option<Entry>)
    where
        [u8; N]: aya::Pod,
    {
        let map = Map::HashMap(self.map(name));
        let mut map: HashMap<_, [u8; N], Entry> = map.try_into().unwrap();
        drop(match entry {
            Some(entry) => map.insert(key, entry, 0),
            None => map.remove(&key),
        });
    }
}

fn write_wide<const N: usize>(map: Map, key: Key<[u8; N]>, entry: Option<Entry>)
where
    [u8; N]: aya::Pod,
{
    let mut map: LpmTrie<MapData, [u8; N], Entry> = map.try_into().unwrap();
    drop(match entry {
        Some(entry) => map.insert(&key, entry, 0),
        None => map.remove(&key),
    });
}

/// The least that the program looks at: an Ethernet and an IP header, and eight bytes.
fn packet(source: IpAddr) -> Vec<u8> {
    let mut bytes = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    match source {
        IpAddr::V4(source) => {
            bytes.extend([0x08, 0x00, 0x45, 0, 0, 28, 0, 1, 0, 0, 64, 6, 0, 0]);
            bytes.extend(source.octets());
            bytes.extend([198, 18, 0, 1]);
        }
        IpAddr::V6(source) => {
            bytes.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 8, 6, 64]);
            bytes.extend(source.octets());
            bytes.extend(Ipv6Addr::LOCALHOST.octets());
        }
    }
    bytes.extend([0; 8]);
    bytes
}
