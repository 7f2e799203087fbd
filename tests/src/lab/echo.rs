//! UDP echo services, clients that ask them, and a sender that does not stop.

use std::{
    collections::BTreeMap,
    io::ErrorKind,
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context as _, Result};

use super::netns::NetNs;

const PORT: u16 = 7;
/// How soon a service notices that it is to stop.
const STEP: Duration = Duration::from_millis(20);
/// An answer that takes longer is none.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long an answer may be overtaken by the answer to a later packet, on the same way.
const OVERTAKEN: Duration = Duration::from_millis(30);

/// How many packets came from each address.
type Received = Arc<Mutex<BTreeMap<IpAddr, u64>>>;

/// An echo service that counts its clients' packets; ends on drop.
#[derive(Debug)]
pub struct Echo {
    address: SocketAddr,
    received: Received,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Echo {
    /// Starts a service on one address of a namespace.
    ///
    /// # Errors
    /// When it has no such address.
    pub fn start(namespace: &NetNs, address: IpAddr) -> Result<Self> {
        let address = SocketAddr::new(address, PORT);
        let socket = bind(namespace, address)?;
        socket.set_read_timeout(Some(STEP))?;
        let (received, stop) = (Received::default(), Arc::<AtomicBool>::default());
        let shared = (Arc::clone(&received), Arc::clone(&stop));
        let thread = thread::spawn(move || serve(&socket, &shared.0, &shared.1));
        Ok(Self {
            address,
            received,
            stop,
            thread: Some(thread),
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Packets that came from a client.
    #[must_use]
    pub fn received(&self, client: IpAddr) -> u64 {
        let received = self.received.lock().unwrap_or_else(PoisonError::into_inner);
        received.get(&client).copied().unwrap_or_default()
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

fn serve(socket: &UdpSocket, received: &Received, stop: &AtomicBool) {
    let mut packet = [0; 1 << 12];
    while !stop.load(Ordering::Relaxed) {
        if let Ok((length, client)) = socket.recv_from(&mut packet) {
            *received
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .entry(client.ip())
                .or_default() += 1;
            // Nobody may be there any more.
            let _unsent = socket.send_to(packet.get(..length).unwrap_or_default(), client);
        }
    }
}

/// Sends one packet to each service and says which of them answered. To be called where they must answer: it waits.
///
/// # Errors
/// When the client's address cannot be used in that namespace.
pub fn ask(
    from: &NetNs,
    client: IpAddr,
    services: &[SocketAddr],
    packet: &[u8],
) -> Result<Vec<bool>> {
    from.run(|| {
        let asked = Asked::new(client, services, packet)?;
        asked.answers(PATIENCE)
    })?
}

/// The same where they must not answer. A packet of the witness, who is not kept out, follows on the same way: once that
/// is answered, an answer to the client would have come.
///
/// # Errors
/// When the witness gets no answer, so that the client's silence proves nothing.
pub fn ask_in_vain(
    from: &NetNs,
    client: IpAddr,
    witness: IpAddr,
    services: &[SocketAddr],
    packet: &[u8],
) -> Result<Vec<bool>> {
    from.run(|| {
        let asked = Asked::new(client, services, packet)?;
        let answered = Asked::new(witness, services, packet)?.answers(PATIENCE)?;
        anyhow::ensure!(
            answered.iter().all(|answered| *answered),
            "the witness {witness} gets answers from {services:?}: {answered:?}"
        );
        asked.answers(OVERTAKEN)
    })?
}

/// A packet on its way to several services.
struct Asked<'a> {
    socket: UdpSocket,
    services: &'a [SocketAddr],
}

impl<'a> Asked<'a> {
    fn new(client: IpAddr, services: &'a [SocketAddr], packet: &[u8]) -> Result<Self> {
        let socket = UdpSocket::bind((client, 0)).with_context(|| format!("cannot be {client}"))?;
        for service in services {
            socket
                .send_to(packet, service)
                .with_context(|| format!("cannot send from {client} to {service}"))?;
        }
        Ok(Self { socket, services })
    }

    fn answers(&self, patience: Duration) -> Result<Vec<bool>> {
        let mut answered = vec![false; self.services.len()];
        self.socket.set_read_timeout(Some(patience))?;
        while answered.contains(&false) {
            match self.socket.recv_from(&mut [0; 16]) {
                Ok((_, from)) => {
                    for (service, answered) in self.services.iter().zip(&mut answered) {
                        *answered |= *service == from;
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error).context("cannot wait for an answer"),
            }
        }
        Ok(answered)
    }
}

/// A client that sends as fast as it can, until it is stopped or dropped.
#[derive(Debug)]
pub struct Flood {
    sent: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Flood {
    /// Starts sending.
    ///
    /// # Errors
    /// When the client's address cannot be used in that namespace.
    pub fn start(from: &NetNs, client: IpAddr, service: SocketAddr) -> Result<Self> {
        let socket = bind(from, SocketAddr::new(client, 0))?;
        let (sent, stop) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let shared = (Arc::clone(&sent), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            let (sent, stop) = shared;
            while !stop.load(Ordering::Relaxed) {
                for _ in 0..8 {
                    let is_sent = socket.send_to(b"!", service).is_ok();
                    sent.fetch_add(u64::from(is_sent), Ordering::Relaxed);
                }
                // Leaves half of two processors to what is tested.
                thread::sleep(Duration::from_micros(50));
            }
        });
        Ok(Self {
            sent,
            stop,
            thread: Some(thread),
        })
    }

    /// Packets so far.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Ends it; packets altogether.
    #[must_use]
    pub fn stop(mut self) -> u64 {
        self.halt();
        self.sent()
    }

    fn halt(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.halt();
    }
}

fn bind(namespace: &NetNs, address: SocketAddr) -> Result<UdpSocket> {
    namespace
        .run(|| UdpSocket::bind(address))?
        .with_context(|| format!("cannot use {address} in {}", namespace.name()))
}
