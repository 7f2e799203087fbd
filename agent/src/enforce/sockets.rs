//! Destroys the TCP connections that a banned source still has with this host, so that whoever serves them is free at once.
//!
//! The kernel lists sockets over netlink (`NETLINK_SOCK_DIAG`) and destroys one by its identity. The crates for that
//! protocol cannot write the kernel's filter, so the few messages are encoded here.

use std::{
    mem,
    net::IpAddr,
    os::fd::{AsRawFd as _, OwnedFd},
};

use anyhow::{Context as _, Result, bail};
use ipnet::IpNet;
use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, connect, recv,
            send, setsockopt, socket, sockopt,
        },
        time::{TimeVal, TimeValLike as _},
    },
};
use portcullis_engine::Subject;
use procfs::sys::kernel::Version;
use tracing::debug;

use wire::{Body, Listed, Message, Target};

/// Sockets that one call destroys at most. Those beyond time out by themselves, since their packets are dropped.
pub const MAX_DESTROYED: usize = 65_536;

/// Prefixes up to which the kernel filters. It tries one after the other on every socket, holding up packets for that part
/// of its table: with 10,000 sockets, 1 takes 2 ms, 64 take 8 ms and 1,000 take 80 ms. Having all listed and searching
/// here takes 13 ms.
const MAX_FILTER: usize = 64;
/// Sockets that one system call destroys. If all are refused, the answers still fit into the usual receive buffer.
const BATCH: usize = 64;
/// Seconds that the kernel may take for an answer; it is there at once.
const PATIENCE_SECS: i64 = 2;
/// The kernel answers in pieces of at most 32 KiB.
const BUFFER: usize = 64 * 1024;

/// Since this release a socket whose program has closed it can be destroyed. Before, it lost its timer and stayed for ever
/// (mended by commit bac76cf89816, "tcp: fix forever orphan socket caused by `tcp_abort`").
const ENDS_ORPHANS: (u8, u8) = (6, 11);

const CANNOT_DESTROY: &str = "connections of banned sources stay until they time out: this kernel is built without \
     CONFIG_INET_DIAG_DESTROY (their packets are dropped all the same)";
const CANNOT_LIST: &str = "connections of banned sources stay until they time out: this kernel cannot list TCP sockets; \
     load its module tcp_diag (their packets are dropped all the same)";
const NO_RIGHTS: &str = "connections of banned sources stay until they time out: destroying sockets takes the capability \
     CAP_NET_ADMIN (their packets are dropped all the same)";

/// The TCP sockets of one network namespace: that of the thread that has opened this.
#[derive(Debug)]
pub struct Sockets {
    netlink: Netlink,
    spared: Spared,
    unavailable: Option<&'static str>,
    is_told: bool,
    skipped: u64,
}

impl Sockets {
    /// Opens the way to the kernel and asks whether it can destroy sockets. If it cannot, that is no error yet: see
    /// [`Sockets::destroy`].
    ///
    /// # Errors
    /// Without netlink; systemd's `RestrictAddressFamilies=` may forbid it.
    pub fn open() -> Result<Self> {
        let mut sockets = Self {
            netlink: Netlink::open()
                .context("cannot open a netlink socket, by which sockets are destroyed")?,
            spared: Spared {
                observed: Prefixes::default(),
                allowed: Prefixes::default(),
                orphans: !Version::current()
                    .is_ok_and(|kernel| (kernel.major, kernel.minor) >= ENDS_ORPHANS),
            },
            unavailable: None,
            is_told: false,
            skipped: 0,
        };
        sockets
            .kill(&[Target::NOBODY])
            .context("the kernel does not say whether it can destroy sockets")?;
        Ok(sockets)
    }

    /// Sets whose sockets are spared, whatever is banned: the allowlist wins over a ban that covers it.
    pub fn set_allowlist(&mut self, allow: &[IpNet]) {
        self.spared.allowed = Prefixes::new(allow.iter().copied());
    }

    /// Sets those inside banned prefixes that are only observed: their sockets are spared, too.
    pub fn set_observed(&mut self, observed: &[Subject]) {
        self.spared.observed = Prefixes::new(observed.iter().map(|subject| subject.net()));
    }

    /// Why no socket can be destroyed, where that is so: one sentence.
    #[must_use]
    pub const fn unavailable(&self) -> Option<&'static str> {
        self.unavailable
    }

    /// Subjects whose sockets were left alone because none can be destroyed.
    #[must_use]
    pub const fn skipped(&self) -> u64 {
        self.skipped
    }

    /// Destroys the connections whose remote address is in any of the subjects; how many there were, at most
    /// [`MAX_DESTROYED`]. Both ends learn of it, the program by `ECONNABORTED` and the source by a RST. Never touched:
    /// sockets that listen or are in TIME-WAIT, those to a loopback address, and those of the allowlist and of who is only
    /// observed.
    ///
    /// # Errors
    /// When the kernel refuses or does not answer. If it always will, by its build or for want of a capability, that is
    /// said once: from then on this does nothing, and [`Sockets::skipped`] counts.
    pub fn destroy(&mut self, subjects: &[Subject]) -> Result<usize> {
        let mut destroyed = 0;
        if self.unavailable.is_none() {
            let wanted = Prefixes::new(subjects.iter().map(|subject| subject.net()));
            let done = self.list(&wanted).and_then(|found| self.kill(&found));
            if done.is_err() {
                // An answer that is still to come would be in the way of the next question.
                self.netlink = Netlink::open().context("cannot open a netlink socket anew")?;
            }
            destroyed = done.context("the sockets of banned sources are not all destroyed")?;
        }
        if let Some(reason) = self.unavailable {
            self.skipped += subjects.len() as u64;
            if !mem::replace(&mut self.is_told, true) {
                bail!(reason);
            }
        }
        Ok(destroyed)
    }

    /// The sockets that are to go.
    fn list(&mut self, wanted: &Prefixes) -> nix::Result<Vec<Target>> {
        let mut found = Vec::new();
        if wanted.0.is_empty() || self.dump(wanted, &mut found)? {
            return Ok(found);
        }
        // The kernel's table was rebuilt meanwhile; if it is again, what was found will do.
        found.clear();
        self.dump(wanted, &mut found)?;
        Ok(found)
    }

    /// Has sockets listed, once; whether the kernel is sure that none is missing. They are not destroyed before the list's
    /// end, because the kernel finds its place in it by counting.
    fn dump(&mut self, wanted: &Prefixes, found: &mut Vec<Target>) -> nix::Result<bool> {
        let filter = Some(wanted.0.as_slice()).filter(|nets| nets.len() <= MAX_FILTER);
        let sequence = self.netlink.next_sequence();
        self.netlink
            .ask(&wire::list(sequence, filter.unwrap_or_default()))?;
        let mut is_whole = true;
        loop {
            for message in self.netlink.answers()? {
                if message.sequence != sequence {
                    continue;
                }
                is_whole &= !message.is_interrupted;
                match message.body {
                    Body::Socket(listed) => {
                        let is_meant = wanted.contains(listed.remote) && !self.spared.has(&listed);
                        if is_meant && found.len() < MAX_DESTROYED {
                            found.push(listed.target);
                        }
                    }
                    Body::End(None) => return Ok(is_whole),
                    Body::End(Some(Errno::ENOENT | Errno::EOPNOTSUPP)) => {
                        self.unavailable = Some(CANNOT_LIST);
                        return Ok(true);
                    }
                    Body::End(Some(problem)) => return Err(problem),
                    Body::Other => {}
                }
            }
        }
    }

    /// Destroys sockets; how many were still there.
    fn kill(&mut self, targets: &[Target]) -> nix::Result<usize> {
        let mut destroyed = 0;
        for batch in targets.chunks(BATCH) {
            let refusals = self.netlink.destroy(batch)?;
            destroyed += batch.len().saturating_sub(refusals.len());
            for refusal in refusals {
                match refusal {
                    // It has closed meanwhile. Its cookie keeps the kernel from taking another for it, or the listener.
                    Errno::ENOENT => {}
                    Errno::EPERM | Errno::EACCES => self.unavailable = Some(NO_RIGHTS),
                    Errno::EOPNOTSUPP if *batch == [Target::NOBODY] => {
                        self.unavailable = Some(CANNOT_DESTROY);
                    }
                    // One kind of socket cannot be destroyed, not all.
                    other => debug!("the socket of a banned source is not destroyed: {other}"),
                }
            }
            if self.unavailable.is_some() {
                break;
            }
        }
        Ok(destroyed)
    }
}

/// Sockets that stay.
#[derive(Debug)]
struct Spared {
    allowed: Prefixes,
    observed: Prefixes,
    /// Those that their program has closed, too.
    orphans: bool,
}

impl Spared {
    fn has(&self, listed: &Listed) -> bool {
        !listed.is_connection
            || listed.remote.is_loopback()
            || (listed.is_orphan && self.orphans)
            || self.allowed.contains(listed.remote)
            || self.observed.contains(listed.remote)
    }
}

/// Addresses, as prefixes in order of which no two overlap.
#[derive(Debug, Default)]
struct Prefixes(Vec<IpNet>);

impl Prefixes {
    fn new(nets: impl Iterator<Item = IpNet>) -> Self {
        Self(IpNet::aggregate(&nets.collect()))
    }

    fn contains(&self, address: IpAddr) -> bool {
        let after = self.0.partition_point(|net| net.network() <= address);
        after
            .checked_sub(1)
            .and_then(|index| self.0.get(index))
            .is_some_and(|net| net.contains(&address))
    }
}

/// A conversation with the kernel.
#[derive(Debug)]
struct Netlink {
    socket: OwnedFd,
    buffer: Vec<u8>,
    sequence: u32,
}

impl Netlink {
    fn open() -> nix::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkSockDiag,
        )?;
        let patience = TimeVal::seconds(PATIENCE_SECS);
        setsockopt(&socket, sockopt::ReceiveTimeout, &patience)?;
        // From now on nobody but the kernel can answer.
        connect(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        Ok(Self {
            socket,
            buffer: vec![0; BUFFER],
            sequence: 0,
        })
    }

    fn next_sequence(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sequence
    }

    fn ask(&self, requests: &[u8]) -> nix::Result<()> {
        loop {
            match send(self.socket.as_raw_fd(), requests, MsgFlags::empty()) {
                Err(Errno::EINTR) => {}
                sent => return sent.map(drop),
            }
        }
    }

    /// Waits for the next piece of the answer.
    fn answers(&mut self) -> nix::Result<impl Iterator<Item = Message>> {
        let length = loop {
            // Truncated or not, the length is that of all there was.
            match recv(
                self.socket.as_raw_fd(),
                &mut self.buffer,
                MsgFlags::MSG_TRUNC,
            ) {
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Err(Errno::ETIMEDOUT),
                length => break length?,
            }
        };
        let pieces = self.buffer.get(..length).ok_or(Errno::EMSGSIZE)?;
        Ok(wire::messages(pieces))
    }

    /// Has a few sockets destroyed; why some were not.
    fn destroy(&mut self, batch: &[Target]) -> nix::Result<Vec<Errno>> {
        let mut requests = Vec::new();
        for target in batch {
            wire::destroy(&mut requests, self.next_sequence(), target);
        }
        // The kernel answers to what it refuses, and to this when it is through.
        let last = self.next_sequence();
        wire::nothing(&mut requests, last);
        self.ask(&requests)?;
        let mut refusals = Vec::new();
        loop {
            for message in self.answers()? {
                if let Body::End(outcome) = message.body {
                    if message.sequence == last {
                        return Ok(refusals);
                    }
                    refusals.extend(outcome);
                }
            }
        }
    }
}

/// The few messages of `linux/netlink.h`, `linux/sock_diag.h` and `linux/inet_diag.h`. Numbers are in the host's
/// byte order, addresses and ports in the network's.
mod wire {
    use std::{
        iter,
        net::{IpAddr, Ipv6Addr},
    };

    use ipnet::IpNet;
    use nix::errno::Errno;

    /// `TCPDIAG_GETSOCK`: asks for a list of sockets, and is the type of those in it. It gives both families in one walk
    /// through the kernel's table, as ss(8) has it; the newer `SOCK_DIAG_BY_FAMILY` takes two.
    const LIST: u16 = 18;
    /// `SOCK_DESTROY`.
    const DESTROY: u16 = 21;
    const NOTHING: u16 = 1;
    const ERROR: u16 = 2;
    const DONE: u16 = 3;

    const REQUEST: u16 = 0x1;
    const ACKNOWLEDGE: u16 = 0x4;
    const INTERRUPTED: u16 = 0x10;
    const DUMP: u16 = 0x300;

    const V4: u8 = 2;
    const V6: u8 = 10;
    const TCP: u8 = 6;

    const ESTABLISHED: u32 = 1 << 1;
    const SYN_SENT: u32 = 1 << 2;
    const SYN_RECEIVED: u32 = 1 << 3;
    const FIN_WAIT_1: u32 = 1 << 4;
    const FIN_WAIT_2: u32 = 1 << 5;
    const CLOSE_WAIT: u32 = 1 << 8;
    const LAST_ACK: u32 = 1 << 9;
    const CLOSING: u32 = 1 << 11;
    /// States in which a program may have closed its socket.
    const CLOSED_HERE: u32 = FIN_WAIT_1 | FIN_WAIT_2 | LAST_ACK | CLOSING;
    /// States of a connection. The others are TIME-WAIT (6), CLOSED (7), LISTEN (10) and the kernel's own.
    const CONNECTION: u32 = CLOSED_HERE | ESTABLISHED | SYN_SENT | SYN_RECEIVED | CLOSE_WAIT;

    const HEADER_LEN: usize = 16;
    /// Ports (2 × 2), addresses (2 × 16), interface (4) and cookie (8).
    const ID_LEN: usize = 48;
    const REMOTE_AT: usize = 20;
    const COOKIE_AT: usize = 40;

    /// A socket by the name that the kernel has given it.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct Target {
        family: u8,
        id: [u8; ID_LEN],
    }

    impl Target {
        /// No socket at all: the kernel's cookies count from 1.
        pub(super) const NOBODY: Self = Self {
            family: V4,
            id: [0; ID_LEN],
        };
    }

    /// A socket of the list.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct Listed {
        pub(super) target: Target,
        /// Canonical: no IPv4 address in IPv6 form.
        pub(super) remote: IpAddr,
        pub(super) is_connection: bool,
        /// Its program has closed it, and the kernel is about to end it.
        pub(super) is_orphan: bool,
    }

    /// A piece of an answer.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct Message {
        pub(super) sequence: u32,
        /// The list may lack some sockets or have some twice.
        pub(super) is_interrupted: bool,
        pub(super) body: Body,
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) enum Body {
        Socket(Listed),
        /// The list, or what else was asked for, ends here; with what is wrong.
        End(Option<Errno>),
        Other,
    }

    /// A request for the connections with these remote addresses; without any, for all.
    pub(super) fn list(sequence: u32, nets: &[IpNet]) -> Vec<u8> {
        let mut body = vec![0; 4 + ID_LEN];
        body.extend(CONNECTION.to_ne_bytes());
        body.extend(0_u32.to_ne_bytes());
        if !nets.is_empty() {
            let filter = filter(nets);
            body.extend(short(4 + filter.len()).to_ne_bytes());
            body.extend(1_u16.to_ne_bytes());
            body.extend(filter);
        }
        let mut request = Vec::new();
        append(&mut request, LIST, REQUEST | DUMP, sequence, &body);
        request
    }

    /// Appends a request to destroy a socket. It is answered if it fails.
    pub(super) fn destroy(requests: &mut Vec<u8>, sequence: u32, target: &Target) {
        let mut body = vec![target.family, TCP, 0, 0];
        body.extend(CONNECTION.to_ne_bytes());
        body.extend(target.id);
        append(requests, DESTROY, REQUEST, sequence, &body);
    }

    /// Appends a request for nothing but an answer.
    pub(super) fn nothing(requests: &mut Vec<u8>, sequence: u32) {
        append(requests, NOTHING, REQUEST | ACKNOWLEDGE, sequence, &[]);
    }

    /// The header and the body, whose length is a multiple of four.
    fn append(requests: &mut Vec<u8>, kind: u16, flags: u16, sequence: u32, body: &[u8]) {
        let length = u32::from(short(HEADER_LEN + body.len()));
        requests.extend(length.to_ne_bytes());
        requests.extend(kind.to_ne_bytes());
        requests.extend(flags.to_ne_bytes());
        requests.extend(sequence.to_ne_bytes());
        requests.extend(0_u32.to_ne_bytes());
        requests.extend(body);
    }

    /// Everything here is short: `MAX_FILTER` prefixes take 2 KiB.
    fn short(length: usize) -> u16 {
        u16::try_from(length).unwrap_or(u16::MAX)
    }

    /// A program for the kernel: a socket passes if its remote address is in any of the prefixes, IPv4 ones in IPv6 form
    /// too. An instruction is `code`, then how far it is to the next one if it says yes (one byte) and if it says no
    /// (two bytes). The end of the program is a pass; four bytes further is none.
    fn filter(nets: &[IpNet]) -> Vec<u8> {
        const JUMP: u8 = 1;
        const REMOTE: u8 = 8;
        const JUMP_LEN: u8 = 4;
        const ANY_PORT: i32 = -1;

        // From the last to the first, so that what is behind is known.
        let mut program: Vec<u8> = Vec::new();
        for net in nets.iter().rev() {
            let (family, address) = match net {
                IpNet::V4(v4) => (V4, v4.network().octets().to_vec()),
                IpNet::V6(v6) => (V6, v6.network().octets().to_vec()),
            };
            let length: u8 = if family == V4 { 16 } else { 28 };
            let mut step = vec![REMOTE, length];
            step.extend(u16::from(length + JUMP_LEN).to_ne_bytes());
            step.extend([family, net.prefix_len(), 0, 0]);
            step.extend(ANY_PORT.to_ne_bytes());
            step.extend(address);
            if !program.is_empty() {
                step.extend([JUMP, JUMP_LEN]);
                step.extend(short(usize::from(JUMP_LEN) + program.len()).to_ne_bytes());
            }
            step.extend(program);
            program = step;
        }
        program
    }

    /// The messages of one piece; ends at the first that is none.
    pub(super) fn messages(pieces: &[u8]) -> impl Iterator<Item = Message> {
        let mut rest = pieces;
        iter::from_fn(move || {
            let length = usize::try_from(u32::from_ne_bytes(array(rest, 0)?)).ok()?;
            let body = rest.get(HEADER_LEN..length)?;
            let message = Message {
                sequence: u32::from_ne_bytes(array(rest, 8)?),
                is_interrupted: u16::from_ne_bytes(array(rest, 6)?) & INTERRUPTED != 0,
                body: match u16::from_ne_bytes(array(rest, 4)?) {
                    LIST => listed(body).map_or(Body::Other, Body::Socket),
                    ERROR | DONE => Body::End(problem(body)),
                    _ => Body::Other,
                },
            };
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            Some(message)
        })
    }

    fn listed(body: &[u8]) -> Option<Listed> {
        let [family, state, ..] = *body else {
            return None;
        };
        let id: [u8; ID_LEN] = array(body, 4)?;
        let remote = match family {
            V4 => IpAddr::from(array::<4>(&id, REMOTE_AT)?),
            V6 => Ipv6Addr::from(array::<16>(&id, REMOTE_AT)?).to_canonical(),
            _ => return None,
        };
        // With all bits set the kernel would not compare it.
        if array::<8>(&id, COOKIE_AT)? == [0xff; 8] {
            return None;
        }
        let inode = u32::from_ne_bytes(array(body, 4 + ID_LEN + 16)?);
        let has_state = |states: u32| states.checked_shr(state.into()).unwrap_or(0) & 1 == 1;
        Some(Listed {
            target: Target { family, id },
            remote,
            is_connection: has_state(CONNECTION),
            is_orphan: inode == 0 && has_state(CLOSED_HERE),
        })
    }

    fn problem(body: &[u8]) -> Option<Errno> {
        let code = i32::from_ne_bytes(array(body, 0)?);
        (code < 0).then(|| Errno::from_raw(code.saturating_neg()))
    }

    fn array<const LEN: usize>(bytes: &[u8], at: usize) -> Option<[u8; LEN]> {
        bytes.get(at..)?.first_chunk().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefixes(texts: &[&str]) -> Prefixes {
        Prefixes::new(texts.iter().map(|text| text.parse().unwrap()))
    }

    /// A piece of the kernel's answer: header and body.
    fn piece(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
        let mut piece = Vec::new();
        piece.extend(u32::try_from(16 + body.len()).unwrap().to_ne_bytes());
        piece.extend(kind.to_ne_bytes());
        piece.extend(flags.to_ne_bytes());
        piece.extend(7_u32.to_ne_bytes());
        piece.extend(0_u32.to_ne_bytes());
        piece.extend(body);
        piece.resize(piece.len().next_multiple_of(4), 0);
        piece
    }

    /// A socket as the kernel lists it: state, remote address and inode; its cookie is 9.
    fn socket(state: u8, remote: &str, inode: u32) -> Vec<u8> {
        let (family, remote) = match remote.parse().unwrap() {
            IpAddr::V4(v4) => (2, v4.octets().to_vec()),
            IpAddr::V6(v6) => (10, v6.octets().to_vec()),
        };
        let mut body = vec![0; 72];
        (body[0], body[1], body[44]) = (family, state, 9);
        body[24..24 + remote.len()].copy_from_slice(&remote);
        body[68..72].copy_from_slice(&inode.to_ne_bytes());
        body
    }

    fn listed(state: u8, remote: &str, inode: u32) -> Listed {
        let pieces = piece(18, 2, &socket(state, remote, inode));
        match wire::messages(&pieces).next().unwrap().body {
            Body::Socket(listed) => listed,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_address_is_found_among_nested_and_neighbouring_prefixes() {
        let some = prefixes(&[
            "192.0.2.7/32",
            "192.0.2.0/24",
            "198.51.100.4/32",
            "2001:db8:0:7::/64",
        ]);
        for (address, is_in) in [
            ("192.0.1.255", false),
            ("192.0.2.0", true),
            ("192.0.2.255", true),
            ("192.0.3.0", false),
            ("198.51.100.4", true),
            ("198.51.100.5", false),
            ("2001:db8:0:7:ffff::1", true),
            ("2001:db8:0:8::", false),
        ] {
            assert_eq!(some.contains(address.parse().unwrap()), is_in, "{address}");
        }
        // An IPv6 prefix has no IPv4 address in it, and the other way round.
        assert!(!prefixes(&["::/0"]).contains([192, 0, 2, 1].into()));
        assert!(!prefixes(&["0.0.0.0/0"]).contains("2001:db8::1".parse().unwrap()));
        assert!(!prefixes(&[]).contains([192, 0, 2, 1].into()));
    }

    #[test]
    fn listeners_and_loopback_and_the_allowlist_are_spared() {
        let mut spared = Spared {
            allowed: prefixes(&["192.0.2.9/32"]),
            observed: prefixes(&["192.0.2.10/32"]),
            orphans: true,
        };
        for (state, remote, inode, stays) in [
            (1, "192.0.2.1", 5, false),        // ESTABLISHED
            (1, "::ffff:192.0.2.1", 5, false), // the same on a dual-stack listener
            (3, "192.0.2.1", 0, false),        // SYN-RECEIVED belongs to nobody yet
            (5, "192.0.2.1", 5, false),        // FIN-WAIT-2, held open by its program
            (5, "192.0.2.1", 0, true),         // the same, closed by it
            (6, "192.0.2.1", 0, true),         // TIME-WAIT
            (10, "192.0.2.1", 5, true),        // LISTEN
            (200, "192.0.2.1", 5, true),       // no state that there is
            (1, "127.0.0.1", 5, true),
            (1, "::1", 5, true),
            (1, "::ffff:127.9.9.9", 5, true),
            (1, "192.0.2.9", 5, true),
            (1, "::ffff:192.0.2.9", 5, true),
            (1, "192.0.2.10", 5, true),
        ] {
            let listed = listed(state, remote, inode);
            assert_eq!(spared.has(&listed), stays, "state {state}, {remote}");
        }
        spared.orphans = false;
        assert!(
            !spared.has(&listed(5, "192.0.2.1", 0)),
            "a kernel that ends orphans"
        );
    }

    #[test]
    fn answers_are_told_apart() {
        let no_cookie = {
            let mut body = socket(1, "192.0.2.1", 5);
            body[44..52].fill(0xff);
            body
        };
        let pieces = [
            piece(18, 2, &no_cookie),
            piece(2, 0, &(-95_i32).to_ne_bytes()),
            piece(2, 0, &0_i32.to_ne_bytes()),
            piece(3, 2 | 0x10, &0_i32.to_ne_bytes()),
            piece(1, 0, &[]),
        ]
        .concat();
        let messages: Vec<_> = wire::messages(&pieces).collect();
        let bodies: Vec<_> = messages.iter().map(|message| message.body).collect();
        assert_eq!(
            bodies,
            [
                Body::Other,
                Body::End(Some(Errno::EOPNOTSUPP)),
                Body::End(None),
                Body::End(None),
                Body::Other
            ]
        );
        assert!(messages.iter().all(|message| message.sequence == 7));
        let interrupted = messages.iter().position(|message| message.is_interrupted);
        assert_eq!(interrupted, Some(3));
        // Cut off anywhere, it only ends sooner.
        for length in 0..pieces.len() {
            assert!(wire::messages(&pieces[..length]).count() < messages.len());
        }
    }
}
