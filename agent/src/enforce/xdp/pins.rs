//! The folder of pins: what outlives the agent in the kernel.
//!
//! `<pin_dir>/v<SCHEMA>/<MAP>` and `<pin_dir>/v<SCHEMA>/links/<flavour>:<interface>`. A BPF file system reserves dots in
//! names, which VLAN interfaces have (`eth0.100`); they are written as colons, which no interface's name holds.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, anyhow};
use aya::{
    maps::{MapInfo, MapType},
    programs::links::{FdLink, PinnedLink},
};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};
use portcullis_common::{SCHEMA, ban::Entry, names, stats::Counter};
use tracing::warn;

/// The folder.
#[derive(Clone, Debug)]
pub(super) struct Pins {
    root: PathBuf,
    dir: PathBuf,
}

impl Pins {
    /// The folder, wherever it is.
    pub(super) fn at(pin_dir: &Path) -> Self {
        Self {
            root: pin_dir.to_owned(),
            dir: pin_dir.join(format!("v{SCHEMA}")),
        }
    }

    /// The folder, made if need be; pinned maps that do not fit this build and configuration are unpinned, so that new
    /// ones take their place. The program that uses the old ones keeps them until it is replaced.
    ///
    /// # Errors
    /// When it is not on a BPF file system, or not writable.
    pub(super) fn open(pin_dir: &Path, max_bans: u32) -> Result<Self> {
        let pins = Self::at(pin_dir);
        if !is_on_bpf_fs(pin_dir)? {
            return Err(anyhow!(
                "{} is not on a BPF file system, so bans could not outlive the agent: `mount -t bpf bpf /sys/fs/bpf`, or \
                 set enforce.pin_dir",
                pin_dir.display()
            ));
        }
        pins.make()?;
        for name in names::PINNED {
            let path = pins.map(name);
            if !path.exists() {
                continue;
            }
            let found = MapInfo::from_pin(&path)
                .with_context(|| format!("cannot open the pin {}", path.display()))?;
            let found = (
                found.map_type()?,
                found.key_size(),
                found.value_size(),
                found.max_entries(),
            );
            let expected = shape(name, max_bans);
            let fits = found.0 == expected.0
                && (found.1, found.2) == (expected.1, expected.2)
                && expected.3.is_none_or(|entries| entries == found.3);
            if !fits {
                warn!(
                    "the pinned map {name} has another shape ({found:?}) than wanted ({expected:?}): making it anew"
                );
                fs::remove_file(&path)
                    .with_context(|| format!("cannot remove {}", path.display()))?;
            }
        }
        Ok(pins)
    }

    /// Makes the folders, if need be.
    ///
    /// # Errors
    /// When that is not possible.
    pub(super) fn make(&self) -> Result<()> {
        fs::create_dir_all(self.links())
            .with_context(|| format!("cannot make {}", self.links().display()))
    }

    /// Where a map is pinned.
    pub(super) fn map(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Where the link of an interface is pinned.
    pub(super) fn link(&self, interface: &str, flavour: &str) -> PathBuf {
        self.links()
            .join(format!("{flavour}:{}", interface.replace('.', ":")))
    }

    fn links(&self) -> PathBuf {
        self.dir.join("links")
    }

    /// Links of an interface that another version of Portcullis has pinned, with another layout of maps.
    pub(super) fn links_of_other_schemas(&self, interface: &str, flavour: &str) -> Vec<PathBuf> {
        let name = self.link(interface, flavour);
        let name = name.file_name().unwrap_or_default();
        let others = self.other_schemas().into_iter();
        others
            .map(|dir| dir.join("links").join(name))
            .filter(|pin| pin.exists())
            .collect()
    }

    /// Folders of other versions.
    fn other_schemas(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.root).into_iter().flatten();
        // Another tool may have folders beside ours.
        let is_schema = |path: &PathBuf| {
            let name = path.file_name().and_then(|name| name.to_str());
            name.and_then(|name| name.strip_prefix('v'))
                .is_some_and(|number| number.parse::<u32>().is_ok())
        };
        let is_other =
            |path: &PathBuf| *path != self.dir && is_schema(path) && path.join("links").is_dir();
        entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(is_other)
            .collect()
    }

    /// Takes away what other versions have left, once nothing of it is in use.
    pub(super) fn remove_other_schemas(&self) {
        for dir in self.other_schemas() {
            warn!(
                "what another version has left in {} is taken away",
                dir.display()
            );
            let other = Self {
                root: self.root.clone(),
                dir,
            };
            if let Err(error) = other.remove() {
                warn!("{error:#}");
            }
        }
    }

    /// Is anything pinned?
    pub(super) fn exist(&self) -> bool {
        self.dir.exists() || !self.other_schemas().is_empty()
    }

    /// Where links are pinned, of whatever interface.
    pub(super) fn pinned_links(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.links()).into_iter().flatten();
        entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .collect()
    }

    /// Detaches from an interface.
    pub(super) fn release(&self, interface: &str) {
        for path in self.pinned_links() {
            if guarded(&path).as_deref() == Some(interface)
                && let Err(error) = unpin(&path)
            {
                warn!("cannot remove {}: {error}", path.display());
            }
        }
    }

    /// Detaches from interfaces that are no longer guarded.
    pub(super) fn release_links_except(&self, interfaces: &[String]) {
        let pinned = self.pinned_links();
        let pinned: BTreeSet<String> = pinned.iter().filter_map(|path| guarded(path)).collect();
        for interface in pinned.iter().filter(|name| !interfaces.contains(name)) {
            warn!("{interface} is no longer guarded: detaching from it");
            self.release(interface);
        }
    }

    /// After a failed start: takes the maps away again, unless a program of an earlier run works with them.
    pub(super) fn remove_unless_attached(&self) {
        if self.pinned_links().is_empty()
            && let Err(error) = self.remove()
        {
            warn!("{error:#}");
        }
    }

    /// Takes everything away: links first, so that nothing is dropped by a program whose bans are half gone.
    ///
    /// # Errors
    /// When a pin cannot be removed.
    pub(super) fn remove(&self) -> Result<()> {
        for dir in [self.links(), self.dir.clone()] {
            for entry in fs::read_dir(&dir).into_iter().flatten() {
                let path = entry?.path();
                unpin(&path).with_context(|| format!("cannot remove {}", path.display()))?;
            }
            remove_dir(&dir)?;
        }
        // Stays where it holds another schema's folder, or is the operator's own.
        drop(fs::remove_dir(&self.root));
        Ok(())
    }
}

/// Removes a pin. A link's last reference is a descriptor then: the kernel detaches at once when that is closed, but some
/// time later when a pin goes.
fn unpin(path: &Path) -> io::Result<()> {
    let link = PinnedLink::from_pin(path).map(FdLink::from);
    fs::remove_file(path)?;
    drop(link);
    Ok(())
}

/// The interface whose link is pinned there.
fn guarded(path: &Path) -> Option<String> {
    let (_, interface) = path.file_name()?.to_str()?.split_once(':')?;
    Some(interface.replace(':', "."))
}

/// Held by the agent that works with a pin folder, for as long as it runs; by the kernel, so it ends with the process.
#[derive(Debug)]
pub struct Lock(#[expect(dead_code, reason = "held, not used")] Flock<File>);

/// Takes the lock of a pin folder; `None` where there is no BPF file system, and so nothing to share.
///
/// # Errors
/// When another agent holds it.
pub fn lock(pin_dir: &Path) -> Result<Option<Lock>> {
    if !is_on_bpf_fs(pin_dir)? {
        return Ok(None);
    }
    let opened = fs::create_dir_all(pin_dir)
        // Nobody else can open it, so nobody else can hold the lock.
        .and_then(|()| fs::set_permissions(pin_dir, fs::Permissions::from_mode(0o700)))
        .and_then(|()| File::open(pin_dir));
    let folder = match opened {
        Ok(folder) => folder,
        // Whoever may not use it shares nothing through it; XDP will say so itself.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Ok(None),
        Err(error) => {
            return Err(error).with_context(|| format!("cannot use {}", pin_dir.display()));
        }
    };
    match Flock::lock(folder, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(Lock(lock))),
        Err((_, Errno::EWOULDBLOCK)) => Err(anyhow!(
            "another agent is running with {}: there can be one on a host (`portcullis status` shows it)",
            pin_dir.display()
        )),
        Err((_, error)) => Err(error).with_context(|| format!("cannot lock {}", pin_dir.display())),
    }
}

fn is_on_bpf_fs(pin_dir: &Path) -> Result<bool> {
    let there = pin_dir
        .ancestors()
        .find(|dir| dir.exists())
        .unwrap_or(Path::new("/"));
    let kind = statfs(there).with_context(|| format!("cannot look at {}", there.display()))?;
    Ok(kind.filesystem_type() == BPF_FS_MAGIC)
}

fn remove_dir(dir: &Path) -> Result<()> {
    match fs::remove_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.with_context(|| format!("cannot remove {}", dir.display())),
    }
}

/// Type, key size, value size and, where the configuration decides it, number of entries of a pinned map.
fn shape(name: &str, max_bans: u32) -> (MapType, u32, u32, Option<u32>) {
    const VALUE: u32 = Entry::SIZE;
    match name {
        names::BANS_V4 => (MapType::Hash, 4, VALUE, Some(max_bans)),
        names::BANS_V6 => (MapType::Hash, 8, VALUE, Some(max_bans)),
        names::BANS_V6_HOST => (MapType::Hash, 16, VALUE, None),
        names::CIDR_V4 => (MapType::LpmTrie, 8, VALUE, None),
        names::CIDR_V6 => (MapType::LpmTrie, 20, VALUE, None),
        names::SAMPLES => (MapType::RingBuf, 0, 0, None),
        names::ALLOW_V4 => (MapType::LpmTrie, 8, 4, None),
        names::ALLOW_V6 => (MapType::LpmTrie, 20, 4, None),
        _ => (MapType::PerCpuArray, 4, 8, Some(Counter::COUNT)),
    }
}
