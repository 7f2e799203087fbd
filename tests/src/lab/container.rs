//! A container behind the edge host: what is for it is forwarded, as Docker forwards it.
//!
//! ```text
//!   world                   edge                      container
//!   world0 ──────── edge0   edge1 ──────── inner0   198.18.1.2, 2001:db8:2::2
//! ```

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::Result;

use super::{
    Lab,
    netns::{self, NetNs},
};

/// The edge host's interface to the container.
pub const CONTAINER_INTERFACE: &str = "edge1";
/// The container.
pub const CONTAINER_V4: Ipv4Addr = Ipv4Addr::new(198, 18, 1, 2);
/// The container.
pub const CONTAINER_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 2);
/// Another address of the container.
pub const CONTAINER_OTHER: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 18, 1, 66));

/// The container's namespace and its link.
#[derive(Debug)]
pub struct Container {
    namespace: NetNs,
    lab: Lab,
}

impl Container {
    /// Puts a container behind a laboratory's edge host, which forwards from now on.
    ///
    /// # Errors
    /// When ip(8) or the kernel refuses.
    pub fn new(lab: &Lab) -> Result<Self> {
        lab.edge().sysctl("net/ipv4/ip_forward", "1")?;
        lab.edge().sysctl("net/ipv6/conf/all/forwarding", "1")?;
        lab.world().ip(&[
            "route add 198.18.1.0/24 via 198.18.0.1",
            "route add 2001:db8:2::/64 via 2001:db8::1",
        ])?;
        let container = Self {
            namespace: NetNs::create(format!("{}-container", lab.edge().name()))?,
            lab: lab.clone(),
        };
        container.connect()?;
        Ok(container)
    }

    /// The container's namespace.
    #[must_use]
    pub fn namespace(&self) -> &NetNs {
        &self.namespace
    }

    /// Makes the link between edge host and container.
    ///
    /// # Errors
    /// When there is one.
    pub fn connect(&self) -> Result<()> {
        let edge = self.lab.edge();
        let link = format!(
            "link add edge1 address 02:00:00:00:01:01 netns {} type veth \
             peer name inner0 address 02:00:00:00:01:02 netns {}",
            edge.name(),
            self.namespace.name()
        );
        netns::ip(&link.split_whitespace().collect::<Vec<_>>())?;
        edge.ip(&[
            "addr add 198.18.1.1/24 dev edge1",
            "addr add 2001:db8:2::1/64 dev edge1 nodad",
            "link set edge1 up",
            "neigh add 2001:db8:2::2 lladdr 02:00:00:00:01:02 dev edge1 nud permanent",
        ])?;
        self.namespace.ip(&[
            "link set lo up",
            "addr add 198.18.1.2/24 dev inner0",
            "addr add 198.18.1.66/24 dev inner0",
            "addr add 2001:db8:2::2/64 dev inner0 nodad",
            "link set inner0 up",
            "neigh add 2001:db8:2::1 lladdr 02:00:00:00:01:01 dev inner0 nud permanent",
            "route add default via 198.18.1.1",
            "route add default via 2001:db8:2::1",
        ])
    }

    /// Takes the link away, and both of its interfaces.
    ///
    /// # Errors
    /// When there is none.
    pub fn disconnect(&self) -> Result<()> {
        self.lab
            .edge()
            .ip(&[&format!("link del {CONTAINER_INTERFACE}")])
    }
}
