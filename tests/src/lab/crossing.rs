//! Every way into and through the edge host, over both families, with somebody at its end who answers.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use anyhow::Result;

use super::{
    EDGE_V4, EDGE_V6, Lab, WORLD_V4,
    container::{CONTAINER_V4, CONTAINER_V6, Container},
    echo::{self, Echo, Flood},
};

/// The clients' router: nobody bans it.
const WORLD_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2);
/// More than a link carries in one piece.
const FRAGMENTED: [u8; 4000] = [b'?'; 4000];

/// Where a packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// To the edge host itself.
    In,
    /// To the container behind it.
    Through,
}

/// An edge host with a container behind it, and an echo service on each.
#[derive(Debug)]
pub struct Crossing {
    // Taken down in this order.
    v4: [Echo; 2],
    v6: [Echo; 2],
    container: Container,
    lab: Lab,
}

impl Crossing {
    /// Sets it up in a laboratory of its own.
    ///
    /// # Errors
    /// As [`Lab::new`].
    pub fn new() -> Result<Self> {
        let lab = Lab::new()?;
        let container = Container::new(&lab)?;
        let (edge, inner) = (lab.edge(), container.namespace());
        Ok(Self {
            v4: [
                Echo::start(edge, EDGE_V4.into())?,
                Echo::start(inner, CONTAINER_V4.into())?,
            ],
            v6: [
                Echo::start(edge, EDGE_V6.into())?,
                Echo::start(inner, CONTAINER_V6.into())?,
            ],
            container,
            lab,
        })
    }

    /// The laboratory.
    #[must_use]
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// The container.
    #[must_use]
    pub fn container(&self) -> &Container {
        &self.container
    }

    fn echoes(&self, client: IpAddr) -> &[Echo; 2] {
        match client {
            IpAddr::V4(_) => &self.v4,
            IpAddr::V6(_) => &self.v6,
        }
    }

    /// Where a client of that family finds the service at the end of a way.
    #[must_use]
    pub fn service(&self, client: IpAddr, way: Way) -> SocketAddr {
        let [edge, inner] = self.echoes(client);
        match way {
            Way::In => edge.address(),
            Way::Through => inner.address(),
        }
    }

    fn services(&self, client: IpAddr) -> [SocketAddr; 2] {
        [Way::In, Way::Through].map(|way| self.service(client, way))
    }

    /// Packets of a client that came to the end of any way.
    #[must_use]
    pub fn received(&self, client: IpAddr) -> u64 {
        let echoes = self.echoes(client);
        echoes.iter().map(|echo| echo.received(client)).sum()
    }

    /// A client reaches the end of every way, with one packet each.
    ///
    /// # Panics
    /// When it does not.
    #[track_caller]
    pub fn passes(&self, client: IpAddr) {
        self.passes_with(client, b"?");
    }

    /// The same with packets that are sent in fragments.
    ///
    /// # Panics
    /// When one does not arrive.
    #[track_caller]
    pub fn passes_in_fragments(&self, client: IpAddr) {
        self.passes_with(client, &FRAGMENTED);
    }

    #[track_caller]
    fn passes_with(&self, client: IpAddr, packet: &[u8]) {
        let answered = echo::ask(self.lab.world(), client, &self.services(client), packet);
        assert!(
            matches!(answered.as_deref(), Ok([true, true])),
            "{client} reaches edge host and container: {answered:?}"
        );
    }

    /// A client reaches the end of no way, with one packet each.
    ///
    /// # Panics
    /// When it does, or nobody else does either.
    #[track_caller]
    pub fn is_dropped(&self, client: IpAddr) {
        self.is_dropped_with(client, b"?");
    }

    /// The same with packets that are sent in fragments.
    ///
    /// # Panics
    /// When one arrives.
    #[track_caller]
    pub fn is_dropped_in_fragments(&self, client: IpAddr) {
        self.is_dropped_with(client, &FRAGMENTED);
    }

    #[track_caller]
    fn is_dropped_with(&self, client: IpAddr, packet: &[u8]) {
        let witness = match client {
            IpAddr::V4(_) => IpAddr::from(WORLD_V4),
            IpAddr::V6(_) => IpAddr::from(WORLD_V6),
        };
        let before = self.received(client);
        let services = self.services(client);
        let answered = echo::ask_in_vain(self.lab.world(), client, witness, &services, packet);
        assert!(
            matches!(answered.as_deref(), Ok([false, false])),
            "{client} reaches edge host and container: {answered:?}"
        );
        assert_eq!(
            self.received(client),
            before,
            "{client} gets no answers, but its packets arrive"
        );
    }

    /// A client sends to the end of a way as fast as it can.
    ///
    /// # Errors
    /// When it is no address of a client.
    pub fn flood(&self, client: IpAddr, way: Way) -> Result<Flood> {
        Flood::start(self.lab.world(), client, self.service(client, way))
    }

    /// The container's address reaches the edge host: it comes in by the other interface.
    ///
    /// # Panics
    /// When it does not.
    #[track_caller]
    pub fn passes_from_container(&self, address: IpAddr) {
        let services = [self.service(address, Way::In)];
        let answered = echo::ask(self.container.namespace(), address, &services, b"?");
        assert!(
            matches!(answered.as_deref(), Ok([true])),
            "{address} reaches the edge host: {answered:?}"
        );
    }

    /// The container's address does not reach the edge host, while the container's first one does.
    ///
    /// # Panics
    /// When it does, or neither does.
    #[track_caller]
    pub fn is_dropped_from_container(&self, address: IpAddr) {
        let witness = IpAddr::from(CONTAINER_V4);
        let services = [self.service(address, Way::In)];
        let from = self.container.namespace();
        let answered = echo::ask_in_vain(from, address, witness, &services, b"?");
        assert!(
            matches!(answered.as_deref(), Ok([false])),
            "{address} reaches the edge host: {answered:?}"
        );
    }
}
