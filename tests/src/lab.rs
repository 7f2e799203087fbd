//! A laboratory for the whole job, apart from the host's own network: the namespace `edge` with Nginx and the agent, the
//! namespace `world` with all clients, and a virtual link between them.
//!
//! ```text
//!   world                                    edge
//!   198.19.0.0/16, 2001:db8:1::/48           198.18.0.1, 2001:db8::1
//!   (every address is a client's)  world0 ──── edge0   Nginx, portcullis, Slack's stand-in
//! ```
//!
//! Whatever is made here is removed on drop, after a panic too. What a killed run has left behind, the next one removes.

pub mod agent;
pub mod bans;
pub mod client;
pub mod clock;
pub mod container;
pub mod crossing;
pub mod disk;
pub mod echo;
pub mod kernel;
pub mod latency;
pub mod log;
pub mod netns;
pub mod nginx;
pub mod process;
pub mod sink;
pub mod stale;
pub mod tools;
pub mod traffic;
pub mod wait;

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::{
        Arc, Once,
        atomic::{AtomicU32, Ordering},
    },
};

use anyhow::{Context as _, Result, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tempfile::TempDir;

use netns::NetNs;

/// The edge host's interface.
pub const EDGE_INTERFACE: &str = "edge0";
/// The edge host.
pub const EDGE_V4: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);
/// The edge host.
pub const EDGE_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
/// The router that all clients are behind: the edge host's only neighbour.
pub const WORLD_V4: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 2);

/// A client's address: one of 65,536 for benchmarks (RFC 2544).
#[must_use]
pub const fn client_v4(number: u16) -> IpAddr {
    let [high, low] = number.to_be_bytes();
    IpAddr::V4(Ipv4Addr::new(198, 19, high, low))
}

/// A client's address: a host of one of 65,536 networks, each a /64, for documentation (RFC 3849).
#[must_use]
pub const fn client_v6(network: u16, host: u16) -> IpAddr {
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 1, network, 0, 0, 0, host))
}

/// Nginx's address as a client of the given address sees it.
#[must_use]
pub const fn server_for(client: IpAddr) -> SocketAddr {
    match client {
        IpAddr::V4(_) => SocketAddr::new(IpAddr::V4(EDGE_V4), 80),
        IpAddr::V6(_) => SocketAddr::new(IpAddr::V6(EDGE_V6), 80),
    }
}

/// The laboratory. Clones are the same one; it is taken down with the last of them.
#[derive(Clone, Debug)]
pub struct Lab(Arc<Parts>);

/// In the order in which they are taken down.
#[derive(Debug)]
struct Parts {
    edge: NetNs,
    world: NetNs,
    _bpffs: Bpffs,
    dir: TempDir,
}

impl Lab {
    /// Sets the laboratory up: namespaces, link, addresses, routes, a folder and a private bpffs in it.
    ///
    /// # Errors
    /// Without root, iproute2 or bpffs; nothing is left behind.
    pub fn new() -> Result<Self> {
        static CLEANED: Once = Once::new();
        static COUNT: AtomicU32 = AtomicU32::new(0);
        if !nix::unistd::geteuid().is_root() {
            bail!("network namespaces need root; run it with sudo");
        }
        CLEANED.call_once(stale::clean);

        let name = format!(
            "{}{}-{}",
            stale::PREFIX,
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        let dir = tempfile::Builder::new()
            .prefix(&format!("{name}-"))
            .tempdir()
            .context("cannot make a temporary folder")?;
        let bpffs = Bpffs::mount(dir.path().join("bpf"))?;
        let edge = NetNs::create(format!("{name}-edge"))?;
        let world = NetNs::create(format!("{name}-world"))?;
        let lab = Self(Arc::new(Parts {
            edge,
            world,
            _bpffs: bpffs,
            dir,
        }));
        lab.connect()
            .context("cannot join the two namespaces by a link")?;
        Ok(lab)
    }

    fn connect(&self) -> Result<()> {
        let (edge, world) = (self.edge(), self.world());
        // IPv4 lets every address of a local route be bound; IPv6 wants to be told.
        world.sysctl("net/ipv6/ip_nonlocal_bind", "1")?;
        let link = format!(
            "link add edge0 address 02:00:00:00:00:01 netns {} type veth \
             peer name world0 address 02:00:00:00:00:02 netns {}",
            edge.name(),
            world.name()
        );
        netns::ip(&link.split_whitespace().collect::<Vec<_>>())?;
        // IPv6 does not look for its neighbours in the link's first second, so it is told them.
        edge.ip(&[
            "link set lo up",
            "addr add 198.18.0.1/30 dev edge0",
            "addr add 2001:db8::1/64 dev edge0 nodad",
            "link set edge0 up",
            "route add 198.19.0.0/16 via 198.18.0.2",
            "route add 2001:db8:1::/48 via 2001:db8::2",
            "neigh add 2001:db8::2 lladdr 02:00:00:00:00:02 dev edge0 nud permanent",
        ])?;
        world.ip(&[
            "link set lo up",
            "addr add 198.18.0.2/30 dev world0",
            "addr add 2001:db8::2/64 dev world0 nodad",
            "link set world0 up",
            "route add local 198.19.0.0/16 dev lo",
            "route add local 2001:db8:1::/48 dev lo",
            "neigh add 2001:db8::1 lladdr 02:00:00:00:00:01 dev world0 nud permanent",
        ])
    }

    /// The namespace of Nginx and the agent.
    #[must_use]
    pub fn edge(&self) -> &NetNs {
        &self.0.edge
    }

    /// The namespace of the clients.
    #[must_use]
    pub fn world(&self) -> &NetNs {
        &self.0.world
    }

    /// The laboratory's own folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.0.dir.path()
    }

    /// Where the agent pins its maps: inside the laboratory's own bpffs.
    #[must_use]
    pub fn pin_dir(&self) -> PathBuf {
        self.dir().join("bpf/portcullis")
    }

    /// The pinned maps.
    #[must_use]
    pub fn pins(&self) -> kernel::Pins {
        kernel::Pins::new(&self.pin_dir())
    }
}

/// A BPF file system of its own; unmounted on drop.
#[derive(Debug)]
pub struct Bpffs(PathBuf);

impl Bpffs {
    /// Mounts one on a new folder.
    ///
    /// # Errors
    /// Without root, or when there is such a folder.
    pub fn mount(path: PathBuf) -> Result<Self> {
        std::fs::create_dir(&path)
            .with_context(|| format!("cannot make the folder {}", path.display()))?;
        mount(
            Some("bpf"),
            &path,
            Some("bpf"),
            MsFlags::empty(),
            None::<&str>,
        )
        .with_context(|| format!("cannot mount a bpffs at {}", path.display()))?;
        Ok(Self(path))
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        if let Err(error) = umount2(&self.0, MntFlags::MNT_DETACH) {
            eprintln!("cannot unmount {}: {error}", self.0.display());
        }
    }
}
