//! The XDP back end: bans as entries of BPF maps, dropped in the driver.
//!
//! Link, ban maps, allowlist and counters are pinned under `<pin_dir>/v<SCHEMA>`, so they outlive the agent: bans go on
//! being enforced, and each ends at its deadline, which the kernel checks. The front filter and the settings belong to
//! one load of the program. A new agent adopts the pins, fills the front filter from them, enters what the ledger
//! holds, and only then replaces the program through the link: no packet of a banned source passes in between.

mod batch;
mod explain;
mod front;
mod left;
mod noted;
mod pins;
mod verify;
pub(crate) mod whose;

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::RangeInclusive,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap, LpmTrie, MapData, PerCpuArray, lpm_trie::Key},
    programs::{
        ProgramError, Xdp as Program, XdpMode,
        links::{FdLink, PinnedLink},
        xdp::XdpLink,
    },
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use portcullis_common::{
    SCHEMA,
    ban::{self, Entry as Value},
    front as layout, names,
    settings::{self, Settings},
    stats::Counter,
};
use portcullis_engine::Subject;
use tracing::{info, warn};

use self::{front::FrontFilter, noted::Noted, pins::Pins};
pub use self::{
    left::left,
    pins::{Lock, lock},
};
use super::{Backend, Change, Counters, Cursor, Enforcer, Entry, Lifetime, Mode, Page};
use crate::runtime::clock;

/// The kernel program, as it was built with this agent.
pub static OBJECT: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/portcullis-ebpf"));

/// What the back end needs to know.
#[derive(Clone, Debug)]
pub struct Options {
    /// Interfaces to guard; at least one.
    pub interfaces: Vec<String>,
    /// Folder on a BPF file system.
    pub pin_dir: PathBuf,
    /// Room for so many bans of each family.
    pub max_bans: u32,
    /// One packet in so many of banned sources is told of through the ring buffer; 0: none.
    pub sample_one_in: u32,
}

/// Where in the receive path the program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavour {
    /// In the driver.
    Native,
    /// In the kernel's generic receive path.
    Generic,
}

impl Flavour {
    const ALL: [Self; 2] = [Self::Native, Self::Generic];

    const fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Generic => "generic",
        }
    }

    const fn mode(self) -> XdpMode {
        match self {
            Self::Native => XdpMode::Driver,
            Self::Generic => XdpMode::Skb,
        }
    }
}

/// New bans that are entered with one system call.
const TOGETHER: usize = 4096;

/// The back end.
pub struct Xdp {
    interfaces: Vec<String>,
    /// How interfaces are attached to that are not yet.
    wanted: Flavour,
    /// How those are that an earlier run had attached, or else as wanted.
    flavour: Flavour,
    pins: Pins,
    /// Owns the program; dropping it detaches what is not pinned.
    ebpf: Ebpf,
    logger: Option<aya_log::EbpfLogger<&'static dyn log::Log>>,
    bans_v4: HashMap<MapData, [u8; 4], Value>,
    bans_v6: HashMap<MapData, [u8; 8], Value>,
    bans_v6_host: HashMap<MapData, [u8; 16], Value>,
    cidr_v4: LpmTrie<MapData, [u8; 4], Value>,
    cidr_v6: LpmTrie<MapData, [u8; 16], Value>,
    allow_v4: LpmTrie<MapData, [u8; 4], u32>,
    allow_v6: LpmTrie<MapData, [u8; 16], u32>,
    front_v4: FrontFilter,
    front_v6: FrontFilter,
    allow_front_v4: FrontFilter,
    allow_front_v6: FrontFilter,
    /// Prefixes that stand behind the bits of the two.
    fronted: BTreeSet<IpNet>,
    /// What the allowlist is to be; `None` until it is set: until then an earlier run's is in force.
    allow: Option<BTreeSet<IpNet>>,
    stats: PerCpuArray<MapData, u64>,
    settings: Array<MapData, Settings>,
    mode: Mode,
    sample_below: u32,
    /// Flags that the program has.
    written_flags: u32,
    /// Attached to every interface once.
    active: bool,
    /// Every subject whose entry the program looks for.
    noted: Noted,
    /// How many of them are in the maps that the program asks only when told to.
    hosts_v6: usize,
    prefixes_v4: usize,
    prefixes_v6: usize,
}

impl std::fmt::Debug for Xdp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Xdp")
            .field("interfaces", &self.interfaces)
            .field("flavour", &self.flavour)
            .finish_non_exhaustive()
    }
}

/// Where a subject's entry lives.
enum Slot {
    V4([u8; 4]),
    V6([u8; 8]),
    V6Host([u8; 16]),
    CidrV4(Key<[u8; 4]>),
    CidrV6(Key<[u8; 16]>),
}

impl Slot {
    fn of(subject: Subject) -> Self {
        match subject.net() {
            IpNet::V4(net) if net.prefix_len() == 32 => Self::V4(net.addr().octets()),
            IpNet::V4(net) => Self::CidrV4(key_v4(net)),
            IpNet::V6(net) => match net.prefix_len() {
                64 => Self::V6(upper(net.addr()).to_be_bytes()),
                128 => Self::V6Host(net.addr().octets()),
                _ => Self::CidrV6(key_v6(net)),
            },
        }
    }
}

impl Xdp {
    /// Loads the program, adopting the maps of an earlier run. Nothing is attached yet.
    ///
    /// # Errors
    /// One sentence with the remedy: no BPF file system, no rights, no interface, another agent, a kernel that refuses.
    pub fn open(options: &Options, flavour: Flavour, mode: Mode) -> Result<Self> {
        if options.interfaces.is_empty() {
            bail!("no interface to guard: name one in enforce.interfaces");
        }
        for interface in &options.interfaces {
            nix::net::if_::if_nametoindex(interface.as_str()).map_err(|_| {
                anyhow!("there is no interface {interface}: correct enforce.interfaces (`ip link` lists what is there)")
            })?;
            whose::check_readable(interface)?;
        }
        let pins = Pins::open(&options.pin_dir, options.max_bans)?;
        Self::load(options, flavour, mode, pins.clone())
            .inspect_err(|_| pins.remove_unless_attached())
    }

    /// The loaded program: to run crafted packets through it, and to measure what it costs.
    ///
    /// # Errors
    /// Never, with an object that this crate has embedded.
    pub fn program(&mut self) -> Result<&mut Program> {
        program(&mut self.ebpf)
    }

    fn load(options: &Options, flavour: Flavour, mode: Mode, pins: Pins) -> Result<Self> {
        let mut loader = EbpfLoader::new();
        for name in names::PINNED {
            loader.map_pin_path(name, pins.map(name));
        }
        for name in [names::BANS_V4, names::BANS_V6] {
            loader.map_max_entries(name, options.max_bans);
        }
        let mut ebpf = loader.load(OBJECT).map_err(explain::load)?;
        let loaded = program(&mut ebpf)?;
        verify::load(|| loaded.load()).map_err(explain::load)?;
        // Only rare paths of the program log, so not being able to read that is no reason not to start.
        let logger = aya_log::EbpfLogger::init(&mut ebpf)
            .inspect_err(|error| warn!("messages of the XDP program cannot be read: {error}"))
            .ok();
        let mut map = |name| {
            ebpf.take_map(name)
                .with_context(|| format!("the embedded object has no map {name}"))
        };
        let mut xdp = Self {
            interfaces: options.interfaces.clone(),
            wanted: flavour,
            flavour,
            pins,
            logger,
            bans_v4: map(names::BANS_V4)?.try_into()?,
            bans_v6: map(names::BANS_V6)?.try_into()?,
            bans_v6_host: map(names::BANS_V6_HOST)?.try_into()?,
            cidr_v4: map(names::CIDR_V4)?.try_into()?,
            cidr_v6: map(names::CIDR_V6)?.try_into()?,
            allow_v4: map(names::ALLOW_V4)?.try_into()?,
            allow_v6: map(names::ALLOW_V6)?.try_into()?,
            front_v4: FrontFilter::new(
                map(names::FRONT_V4)?.try_into()?,
                Some(map(names::COARSE_V4)?.try_into()?),
            ),
            front_v6: FrontFilter::new(
                map(names::FRONT_V6)?.try_into()?,
                Some(map(names::COARSE_V6)?.try_into()?),
            ),
            allow_front_v4: FrontFilter::new(map(names::ALLOW_FRONT_V4)?.try_into()?, None),
            allow_front_v6: FrontFilter::new(map(names::ALLOW_FRONT_V6)?.try_into()?, None),
            fronted: BTreeSet::new(),
            allow: None,
            stats: map(names::STATS)?.try_into()?,
            settings: map(names::SETTINGS)?.try_into()?,
            mode,
            sample_below: Settings::one_in(options.sample_one_in),
            written_flags: 0,
            active: false,
            noted: Noted::default(),
            hosts_v6: 0,
            prefixes_v4: 0,
            prefixes_v6: 0,
            ebpf,
        };
        let mut next = Some(Cursor::default());
        while let Some(from) = next {
            let values;
            (values, next) = xdp.values_from(from)?;
            for (subject, _) in values {
                xdp.note_found(subject);
            }
        }
        xdp.write_counts()?;
        let allowed = xdp.allowed()?;
        xdp.front_allowed(&allowed)?;
        xdp.write_settings()?;
        if xdp.noted.len() > 0 {
            info!("adopted {} bans of an earlier run", xdp.noted.len());
        }
        Ok(xdp)
    }

    /// What the kernel has of a subject.
    fn value_of(&self, subject: Subject) -> Result<Option<Value>> {
        let value = match Slot::of(subject) {
            Slot::V4(key) => self.bans_v4.get(&key, 0),
            Slot::V6(key) => self.bans_v6.get(&key, 0),
            Slot::V6Host(key) => self.bans_v6_host.get(&key, 0),
            // A trie answers with the longest prefix that is not longer than the key: this one, if it is there.
            Slot::CidrV4(_) | Slot::CidrV6(_) if !self.noted.contains(subject) => return Ok(None),
            Slot::CidrV4(key) => self.cidr_v4.get(&key, 0),
            Slot::CidrV6(key) => self.cidr_v6.get(&key, 0),
        };
        match value {
            Ok(value) => Ok(Some(value)),
            Err(error) if explain::is_not_found(&error) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Writes an entry, or renews one that is there.
    fn put(&mut self, subject: Subject, entry: Value) -> Result<()> {
        // Its counters go on.
        let value = match self.value_of(subject)? {
            Some(Value {
                hits, last_seen, ..
            }) => Value {
                hits,
                last_seen,
                ..entry
            },
            None => entry,
        };
        match Slot::of(subject) {
            Slot::V4(key) => self.bans_v4.insert(key, value, 0),
            Slot::V6(key) => self.bans_v6.insert(key, value, 0),
            Slot::V6Host(key) => self.bans_v6_host.insert(key, value, 0),
            Slot::CidrV4(key) => self.cidr_v4.insert(&key, value, 0),
            Slot::CidrV6(key) => self.cidr_v6.insert(&key, value, 0),
        }
        .map_err(|error| explain::put(error, subject))?;
        self.note_found(subject);
        Ok(())
    }

    /// Deletes an entry, if it is there.
    fn delete(&mut self, subject: Subject) -> Result<()> {
        let deleted = match Slot::of(subject) {
            Slot::V4(key) => self.bans_v4.remove(&key),
            Slot::V6(key) => self.bans_v6.remove(&key),
            Slot::V6Host(key) => self.bans_v6_host.remove(&key),
            Slot::CidrV4(key) => self.cidr_v4.remove(&key),
            Slot::CidrV6(key) => self.cidr_v6.remove(&key),
        };
        match deleted {
            Err(error) if !explain::is_not_found(&error) => Err(error.into()),
            _ => {
                if self.noted.remove(subject) {
                    self.count(subject, false);
                }
                Ok(())
            }
        }
    }

    /// An entry is in its map, by our hand or somebody else's: it counts once, however often it is met, so that taking it away
    /// takes nobody else's bit.
    fn note_found(&mut self, subject: Subject) {
        if self.noted.insert(subject) {
            self.count(subject, true);
        }
    }

    /// Keeps what the program asks first (the bits of the front filter, the flags) in step with the maps, here.
    fn count(&mut self, subject: Subject, added: bool) {
        let counter = match Slot::of(subject) {
            Slot::V4(_) | Slot::V6(_) => None,
            Slot::V6Host(_) => Some(&mut self.hosts_v6),
            Slot::CidrV4(_) => Some(&mut self.prefixes_v4),
            Slot::CidrV6(_) => Some(&mut self.prefixes_v6),
        };
        if let Some(counter) = counter {
            *counter = if added {
                *counter + 1
            } else {
                counter.saturating_sub(1)
            };
        }
        let (filter, bits) = match subject.net() {
            IpNet::V4(net) => (&mut self.front_v4, bits(net)),
            // Wider prefixes than a /64 are not in the filter; their flag makes the program go past it.
            IpNet::V6(net) if net.prefix_len() < 64 => return,
            IpNet::V6(net) => {
                let bit = layout::bit_v6(upper(net.addr()));
                (&mut self.front_v6, bit..=bit)
            }
        };
        for bit in bits {
            if added {
                filter.add(bit);
            } else {
                filter.remove(bit);
            }
        }
    }

    /// Brings what `count` has changed into the kernel. What could not be written is written with the next change.
    fn write_counts(&mut self) -> Result<()> {
        self.front_v4.write()?;
        self.front_v6.write()?;
        if self.flags() != self.written_flags {
            self.write_settings()?;
        }
        Ok(())
    }

    fn flags(&self) -> u32 {
        let flag = |set: bool, flag: u32| if set { flag } else { 0 };
        flag(self.mode == Mode::Enforce, settings::ENFORCE)
            | flag(self.prefixes_v4 > 0, settings::CIDR_V4)
            | flag(self.prefixes_v6 > 0, settings::CIDR_V6)
            | flag(self.hosts_v6 > 0, settings::HOST_V6)
    }

    fn write_settings(&mut self) -> Result<()> {
        let flags = self.flags();
        let settings = Settings {
            schema: SCHEMA,
            flags,
            sample_below: self.sample_below,
        };
        self.settings.set(0, settings, 0).map_err(explain::write)?;
        self.written_flags = flags;
        Ok(())
    }

    /// Enters many new bans, which are noted already, with few system calls; one result for each, in order.
    fn put_new(&mut self, bans: &[(Subject, Value)]) -> Vec<Result<()>> {
        let mut results: Vec<Result<()>> = bans.iter().map(|_| Ok(())).collect();
        let (mut v4, mut v6) = (Bulk::default(), Bulk::default());
        for (index, (subject, entry)) in bans.iter().enumerate() {
            match Slot::of(*subject) {
                Slot::V4(key) => v4.push(index, key, *entry),
                Slot::V6(key) => v6.push(index, key, *entry),
                _ => {
                    self.noted.remove(*subject);
                    results[index] = self.put(*subject, *entry);
                }
            }
        }
        let failed = v4.write(&self.bans_v4).chain(v6.write(&self.bans_v6));
        for (index, error) in failed.collect::<Vec<_>>() {
            let (subject, _) = bans[index];
            self.noted.remove(subject);
            results[index] = Err(explain::put(error, subject));
        }
        for ((subject, _), result) in bans.iter().zip(&results) {
            if result.is_ok() && matches!(Slot::of(*subject), Slot::V4(_) | Slot::V6(_)) {
                self.count(*subject, true);
            }
        }
        results
    }

    /// What the kernel's allowlist holds.
    fn allowed(&self) -> Result<BTreeSet<IpNet>> {
        allowed(&self.allow_v4, &self.allow_v6)
    }

    /// Makes the kernel's allowlist what it is to be; says whether it was not. New entries come first, then the old ones
    /// go: nobody who is on both lists is off it in between.
    fn fill_allowlist(&mut self) -> Result<bool> {
        let Some(wanted) = self.allow.clone() else {
            return Ok(false);
        };
        let found = self.allowed()?;
        let both = &wanted | &found;
        self.front_allowed(&both)?;
        for net in wanted.difference(&found) {
            match net {
                IpNet::V4(net) => self.allow_v4.insert(&key_v4(*net), 0, 0),
                IpNet::V6(net) => self.allow_v6.insert(&key_v6(*net), 0, 0),
            }
            .map_err(explain::write)?;
        }
        for net in found.difference(&wanted) {
            match net {
                IpNet::V4(net) => self.allow_v4.remove(&key_v4(*net)),
                IpNet::V6(net) => self.allow_v6.remove(&key_v6(*net)),
            }?;
        }
        self.front_allowed(&wanted)?;
        Ok(found != wanted)
    }

    /// Makes the program look for these prefixes in the allowlist, and for no others.
    fn front_allowed(&mut self, nets: &BTreeSet<IpNet>) -> Result<()> {
        let (v4, v6) = (&mut self.allow_front_v4, &mut self.allow_front_v6);
        let mut front = |net: &IpNet, change: fn(&mut FrontFilter, u32)| {
            let filter = match net {
                IpNet::V4(_) => &mut *v4,
                IpNet::V6(_) => &mut *v6,
            };
            allow_bits(*net).for_each(|bit| change(filter, bit));
        };
        for net in nets.difference(&self.fronted) {
            front(net, FrontFilter::add);
        }
        for net in self.fronted.difference(nets) {
            front(net, FrontFilter::remove);
        }
        self.fronted.clone_from(nets);
        self.allow_front_v4.write()?;
        self.allow_front_v6.write()
    }

    /// Some entries of the ban maps, as they are there, and where to go on.
    fn values_from(&self, from: Cursor) -> Result<Page<(Subject, Value)>> {
        let (values, next) = match from.place {
            0 => some(&self.bans_v4, from.at, host_v4)?,
            1 => some(&self.bans_v6, from.at, network_v6)?,
            2 => some(&self.bans_v6_host, from.at, host_v6)?,
            3 => (prefixes_v4(&self.cidr_v4)?, None),
            _ => (prefixes_v6(&self.cidr_v6)?, None),
        };
        let next = next.map_or_else(
            || from.next_place(5),
            |at| {
                Some(Cursor {
                    at: Some(at),
                    ..from
                })
            },
        );
        Ok((values, next))
    }

    /// Attaches one interface: through the pinned link where there is one, so that no packet slips past between the
    /// old program and the new one. Says whether there was none that worked.
    fn attach(&mut self, interface: &str) -> Result<bool> {
        for flavour in Flavour::ALL {
            let pin = self.pins.link(interface, flavour.name());
            if !pin.exists() {
                continue;
            }
            match self.replace(&pin) {
                // The link follows what it was made for, even under another name.
                Ok(()) if nix::net::if_::if_nametoindex(interface).is_err() => {
                    bail!(
                        "there is no interface {interface} any more; what it was is guarded under its new name"
                    );
                }
                Ok(()) if !whose::has(interface, self.program()?.info()?.id()) => {
                    warn!(
                        "what was guarded as {interface} is called something else now: guarding the one that is called so"
                    );
                    self.pins.release(interface);
                }
                Ok(()) => {
                    if flavour != self.wanted && !self.active {
                        info!(
                            "{interface} stays in {} mode, as an earlier run attached it: `portcullis detach` before a start changes that",
                            flavour.name()
                        );
                    }
                    self.flavour = flavour;
                    return Ok(false);
                }
                // The interface that it was attached to is gone, or somebody has detached it.
                Err(error) if explain::is_severed(&error) => {
                    warn!("the program was detached from {interface}: attaching anew");
                    std::fs::remove_file(&pin)
                        .with_context(|| format!("cannot remove {}", pin.display()))?;
                }
                Err(error) => {
                    return Err(error.context(format!(
                        "cannot take over the program on {interface}; the old one goes on"
                    )));
                }
            }
        }
        self.pins.make()?;
        // A program with another layout of maps: those of this one are filled, so one switch replaces it.
        for flavour in Flavour::ALL {
            for pin in self.pins.links_of_other_schemas(interface, flavour.name()) {
                if let Err(error) = self.replace(&pin) {
                    warn!("{} cannot be taken over: {error:#}", pin.display());
                    continue;
                }
                FdLink::from(PinnedLink::from_pin(&pin)?)
                    .pin(self.pins.link(interface, flavour.name()))
                    .with_context(|| format!("cannot pin the link of {interface}"))?;
                std::fs::remove_file(&pin)
                    .with_context(|| format!("cannot remove {}", pin.display()))?;
                self.flavour = flavour;
                return Ok(false);
            }
        }
        let program = program(&mut self.ebpf)?;
        let id = program
            .attach(interface, self.wanted.mode())
            .map_err(|error| explain::attach(error, interface, self.wanted.name()))?;
        let link = FdLink::try_from(program.take_link(id)?).map_err(|_| {
            anyhow!("this kernel has no XDP links (they came with 5.9), so a ban would end with the agent: upgrade it")
        })?;
        // A link that is pinned outlives its descriptor.
        link.pin(self.pins.link(interface, self.wanted.name()))
            .with_context(|| format!("cannot pin the link of {interface}"))?;
        self.flavour = self.wanted;
        Ok(true)
    }

    /// Makes this program the one behind a pinned link; nothing happens where it is that already. Fails where the link is
    /// attached to nothing any more.
    fn replace(&mut self, pin: &Path) -> Result<()> {
        let link = XdpLink::try_from(FdLink::from(PinnedLink::from_pin(pin)?))?;
        let program = program(&mut self.ebpf)?;
        let id = program.attach_to_link(link)?;
        // The pin keeps it attached; the descriptor is not needed.
        drop(program.take_link(id)?);
        Ok(())
    }
}

/// An entry of the kernel's, for people and for the engine.
fn entry_of(subject: Subject, value: &Value, now: Duration) -> Entry {
    Entry {
        subject,
        lifetime: match value.deadline {
            ban::PERMANENT => Lifetime::Permanent,
            deadline => Lifetime::For(Duration::from_nanos(deadline).saturating_sub(now)),
        },
        observed: value.flags & ban::OBSERVE != 0,
        hits: value.hits,
        last_seen: (value.hits > 0)
            .then(|| now.saturating_sub(Duration::from_secs(u64::from(value.last_seen)))),
    }
}

impl Enforcer for Xdp {
    fn backend(&self) -> Backend {
        match self.flavour {
            Flavour::Native => Backend::XdpNative,
            Flavour::Generic => Backend::XdpGeneric,
        }
    }

    fn place(&self) -> String {
        self.interfaces.join(", ")
    }

    fn set_mode(&mut self, mode: Mode) -> Result<()> {
        let before = std::mem::replace(&mut self.mode, mode);
        self.write_settings().inspect_err(|_| self.mode = before)
    }

    fn set_allowlist(&mut self, allow: &[IpNet]) -> Result<()> {
        let nets = allow.iter().map(|net| Subject::of_net(*net).net());
        self.allow = Some(nets.collect());
        self.fill_allowlist().map(drop)
    }

    fn apply(&mut self, changes: &[Change]) -> Vec<Result<()>> {
        let now = clock::boot();
        let mut results = Vec::with_capacity(changes.len());
        // New bans in a row are entered together.
        let mut new: Vec<(Subject, Value)> = Vec::new();
        for change in changes {
            let entry = match *change {
                Change::Ban(subject, lifetime) => Some(value(subject, lifetime, 0, now)),
                Change::Observe(subject, lifetime) => {
                    Some(value(subject, lifetime, ban::OBSERVE, now))
                }
                Change::Unban(_) => None,
            };
            let subject = change.subject();
            match entry {
                Some(entry) if self.noted.insert(subject) => new.push((subject, entry)),
                entry => {
                    results.append(&mut self.put_new(&new));
                    new.clear();
                    results.push(match entry {
                        Some(entry) => self.put(subject, entry),
                        None => self.delete(subject),
                    });
                }
            }
            if new.len() == TOGETHER {
                results.append(&mut self.put_new(&new));
                new.clear();
            }
        }
        results.append(&mut self.put_new(&new));
        if let Err(error) = self.write_counts() {
            // Entries that the program does not look for are no bans. The filter is written with the next change.
            let why = format!("{error:#}");
            for (change, result) in changes.iter().zip(&mut results) {
                if result.is_ok() && !matches!(change, Change::Unban(_)) {
                    *result = Err(anyhow!("{why}"));
                }
            }
        }
        results
    }

    fn entries_from(&mut self, from: Cursor) -> Result<Page<Entry>> {
        let now = clock::boot();
        let (values, next) = self.values_from(from)?;
        for (subject, _) in &values {
            self.note_found(*subject);
        }
        self.write_counts()?;
        let entries = values.into_iter();
        let entries = entries.map(|(subject, value)| entry_of(subject, &value, now));
        Ok((entries.collect(), next))
    }

    fn entries_of(&mut self, subjects: &[Subject]) -> Result<Vec<Entry>> {
        let now = clock::boot();
        let entry = |subject: &Subject| {
            let value = self.value_of(*subject).transpose()?;
            Some(value.map(|value| entry_of(*subject, &value, now)))
        };
        subjects.iter().filter_map(entry).collect()
    }

    fn looks_up(&self) -> bool {
        true
    }

    fn counters(&mut self) -> Result<Counters> {
        if let Some(logger) = &mut self.logger {
            logger.flush();
        }
        Counter::ALL
            .into_iter()
            .map(|counter| {
                let each_cpu = self.stats.get(&(counter as u32), 0)?;
                Ok((counter.name(), each_cpu.iter().sum()))
            })
            .collect()
    }

    fn activate(&mut self) -> Result<bool> {
        // An entry that somebody took out of it would be a banned innocent.
        let (refilled, mut done) = match self.fill_allowlist() {
            Ok(refilled) => (refilled, Ok(())),
            Err(error) => (false, Err(error)),
        };
        let mut attached = Vec::new();
        for interface in self.interfaces.clone() {
            match self.attach(&interface) {
                Ok(true) => attached.push(interface),
                Ok(false) => {}
                // The others are guarded all the same.
                Err(error) => done = done.and(Err(error)),
            }
        }
        if !self.active && done.is_err() {
            // What an earlier run had attached stays.
            for interface in &attached {
                self.pins.release(interface);
            }
            self.pins.remove_unless_attached();
        } else {
            self.pins.release_links_except(&self.interfaces);
            if !self.active {
                self.pins.remove_other_schemas();
            }
            self.active = true;
        }
        done.map(|()| refilled || !attached.is_empty())
    }

    fn detach(&mut self) -> Result<()> {
        // Links that this run has taken over are still held here.
        if let Ok(program) = program(&mut self.ebpf) {
            match program.unload() {
                Ok(()) | Err(ProgramError::NotLoaded) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.pins.remove()
    }
}

/// Takes out of the kernel whatever a run with this pin folder has left there.
///
/// # Errors
/// When a pin cannot be removed.
pub fn remove_leftovers(pin_dir: &Path) -> Result<bool> {
    let pins = Pins::at(pin_dir);
    let found = pins.exist();
    pins.remove_other_schemas();
    pins.remove()?;
    Ok(found)
}

/// Some entries of a hash map, and the bucket to go on with.
fn some<K: aya::Pod + Default>(
    map: &HashMap<MapData, K, Value>,
    from: Option<u32>,
    net: impl Fn(K) -> Result<IpNet>,
) -> Result<Page<(Subject, Value), u32>> {
    let (entries, next) =
        batch::read(map, Value::new(0, 0), from).context("cannot read a ban map")?;
    let entries = entries
        .into_iter()
        .map(|(key, value)| Ok((Subject::of_net(net(key)?), value)));
    Ok((entries.collect::<Result<_>>()?, next))
}

fn host_v4(octets: [u8; 4]) -> Result<IpNet> {
    prefix_of(Ipv4Addr::from(octets).into(), 32)
}

fn network_v6(octets: [u8; 8]) -> Result<IpNet> {
    let address = u128::from(u64::from_be_bytes(octets)) << 64;
    prefix_of(Ipv6Addr::from(address).into(), 64)
}

fn host_v6(octets: [u8; 16]) -> Result<IpNet> {
    prefix_of(Ipv6Addr::from(octets).into(), 128)
}

/// All entries of a trie.
fn prefixes_v4(map: &LpmTrie<MapData, [u8; 4], Value>) -> Result<Vec<(Subject, Value)>> {
    map.iter()
        .map(|item| {
            let (key, value) = item?;
            let net = prefix_of(Ipv4Addr::from(key.data()).into(), key.prefix_len())?;
            Ok((Subject::of_net(net), value))
        })
        .collect()
}

/// All entries of a trie.
fn prefixes_v6(map: &LpmTrie<MapData, [u8; 16], Value>) -> Result<Vec<(Subject, Value)>> {
    map.iter()
        .map(|item| {
            let (key, value) = item?;
            let net = prefix_of(Ipv6Addr::from(key.data()).into(), key.prefix_len())?;
            Ok((Subject::of_net(net), value))
        })
        .collect()
}

/// What an allowlist in the kernel holds. A stranger's key may have bits behind its prefix; to the kernel it is the same one.
fn allowed(
    v4: &LpmTrie<MapData, [u8; 4], u32>,
    v6: &LpmTrie<MapData, [u8; 16], u32>,
) -> Result<BTreeSet<IpNet>> {
    let v4 = v4.keys().map(|key| {
        let key = key?;
        Ok(prefix_of(Ipv4Addr::from(key.data()).into(), key.prefix_len())?.trunc())
    });
    let v6 = v6.keys().map(|key| {
        let key = key?;
        Ok(prefix_of(Ipv6Addr::from(key.data()).into(), key.prefix_len())?.trunc())
    });
    v4.chain(v6).collect()
}

/// New entries of one map, each with its place among the changes.
struct Bulk<K> {
    places: Vec<usize>,
    keys: Vec<K>,
    values: Vec<Value>,
}

impl<K> Default for Bulk<K> {
    fn default() -> Self {
        Self {
            places: Vec::new(),
            keys: Vec::new(),
            values: Vec::new(),
        }
    }
}

impl<K: aya::Pod> Bulk<K> {
    fn push(&mut self, place: usize, key: K, value: Value) {
        self.places.push(place);
        self.keys.push(key);
        self.values.push(value);
    }

    /// Writes all that can be written; returns the others, each with its reason.
    fn write(self, map: &HashMap<MapData, K, Value>) -> impl Iterator<Item = (usize, io::Error)> {
        let mut failed = Vec::new();
        let mut from = 0;
        while from < self.keys.len() {
            let (written, error) = batch::update(map, &self.keys[from..], &self.values[from..]);
            from += written;
            if let Some(error) = error {
                failed.push((self.places[from], error));
                from += 1;
            }
        }
        failed.into_iter()
    }
}

fn program(ebpf: &mut Ebpf) -> Result<&mut Program> {
    let program = ebpf
        .program_mut(names::PROGRAM)
        .context("the embedded object has no program of ours")?;
    Ok(program.try_into()?)
}

/// The entry of a new ban. A CIDR ban knows its own length, so that the program can look behind it when it has run out.
fn value(subject: Subject, lifetime: Lifetime, flags: u32, now: Duration) -> Value {
    let deadline = match lifetime {
        Lifetime::Permanent => ban::PERMANENT,
        Lifetime::For(left) => u64::try_from((now + left).as_nanos()).unwrap_or(ban::PERMANENT),
    };
    let length = match Slot::of(subject) {
        Slot::CidrV4(key) => key.prefix_len(),
        Slot::CidrV6(key) => key.prefix_len(),
        Slot::V4(_) | Slot::V6(_) | Slot::V6Host(_) => 0,
    };
    Value::new(deadline, flags | length << ban::PREFIX_SHIFT)
}

fn prefix_of(address: IpAddr, prefix: u32) -> Result<IpNet> {
    let prefix = u8::try_from(prefix).context("a prefix length in a map")?;
    IpNet::new(address, prefix).context("a prefix length in a map")
}

fn key_v4(net: Ipv4Net) -> Key<[u8; 4]> {
    Key::new(net.prefix_len().into(), net.addr().octets())
}

fn key_v6(net: Ipv6Net) -> Key<[u8; 16]> {
    Key::new(net.prefix_len().into(), net.addr().octets())
}

fn upper(address: Ipv6Addr) -> u64 {
    u64::from_be_bytes(address.octets().first_chunk().copied().unwrap_or_default())
}

/// The bits of the front filter that an IPv4 prefix covers.
fn bits(net: Ipv4Net) -> RangeInclusive<u32> {
    layout::bit_v4(net.network().into())..=layout::bit_v4(net.broadcast().into())
}

/// The bits of the allowlist's front filter that a prefix covers.
fn allow_bits(net: IpNet) -> RangeInclusive<u32> {
    match net {
        IpNet::V4(net) => {
            let bit = |address: Ipv4Addr| layout::allow_bit_v4(address.into());
            bit(net.network())..=bit(net.broadcast())
        }
        IpNet::V6(net) => {
            let bit = |address: Ipv6Addr| layout::allow_bit_v6(upper(address));
            bit(net.network())..=bit(net.broadcast())
        }
    }
}
