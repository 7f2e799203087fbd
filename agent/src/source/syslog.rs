//! Nginx's `access_log syslog:…`: a datagram a line, over UDP or a Unix socket.
//!
//! Whoever can write to the socket can have anybody banned, so UDP is taken on loopback only, and a Unix socket from root and
//! one group. What the kernel's buffer cannot hold is lost, as it is with syslog; by UDP it is counted.

use std::{
    fmt, fs, io,
    net::{SocketAddr, UdpSocket},
    os::{
        fd::{AsFd, AsRawFd as _, OwnedFd},
        unix::{fs::FileTypeExt as _, fs::PermissionsExt as _, net::UnixDatagram},
    },
    path::{Path, PathBuf},
    str::FromStr,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::{
    cmsg_space,
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, setsockopt, sockopt},
};
use tokio::sync::mpsc as queue;
use tracing::{error, info, warn};

use super::{Batch, CHUNK, Counters, Piece};
use crate::runtime::clock;

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// `udp:127.0.0.1:5514`
    Udp(SocketAddr),
    /// `unix:/run/portcullis/access.sock`
    Unix(PathBuf),
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Udp(address) => write!(f, "udp:{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("udp", address)) => {
                let address: SocketAddr = address
                    .parse()
                    .map_err(|_| "must be like udp:127.0.0.1:5514".to_owned())?;
                if address.ip().is_loopback() {
                    Ok(Self::Udp(address))
                } else {
                    Err(
                        "must be on loopback: whoever reaches it can have anybody banned"
                            .to_owned(),
                    )
                }
            }
            Some(("unix", path)) if path.starts_with('/') => Ok(Self::Unix(path.into())),
            _ => Err(
                "must be like udp:127.0.0.1:5514 or unix:/run/portcullis/access.sock".to_owned(),
            ),
        }
    }
}

/// Bytes that may wait in the kernel.
const BUFFER: usize = 8 * 1024 * 1024;
/// Longer messages are cut by the kernel, and counted. Over UDP none is longer than 64 KiB: Nginx drops what would be.
const MAX_MESSAGE: usize = 256 * 1024;
/// Milliseconds between looks whether anybody still wants lines.
const POLL_MS: u16 = 500;

/// After an error.
const RETRY: Duration = Duration::from_secs(1);

/// A socket that messages come in by.
#[derive(Debug)]
pub struct Receiver {
    name: Arc<str>,
    socket: OwnedFd,
    counters: Arc<Counters>,
    /// What the kernel has lost so far, as it counts.
    lost: u32,
}

impl Receiver {
    /// Makes the socket. A Unix socket that nobody listens to any more is replaced.
    ///
    /// # Errors
    /// One sentence with the remedy.
    pub fn open(listen: &Listen, group: Option<&str>, counters: Arc<Counters>) -> Result<Self> {
        let socket: OwnedFd = match listen {
            Listen::Udp(address) => UdpSocket::bind(address)
                .with_context(|| {
                    format!("cannot listen on {listen}: choose another port in source.syslog")
                })?
                .into(),
            Listen::Unix(path) => unix(path, group)
                .with_context(|| format!("cannot listen on {listen}"))?
                .into(),
        };
        // Without the right to a large buffer the usual one has to do.
        if setsockopt(&socket, sockopt::RcvBufForce, &BUFFER).is_err() {
            setsockopt(&socket, sockopt::RcvBuf, &BUFFER)?;
        }
        setsockopt(&socket, sockopt::RxqOvfl, &1)?;
        info!("listening for syslog on {listen}");
        Ok(Self {
            name: listen.to_string().into(),
            socket,
            counters,
            lost: 0,
        })
    }

    /// Hands lines on until nobody wants them.
    pub(super) fn run(mut self, max_line: usize, to: &queue::Sender<Batch>) {
        let mut buffer = vec![0; MAX_MESSAGE];
        while !to.is_closed() {
            let mut ready = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
            match poll(&mut ready, PollTimeout::from(POLL_MS)) {
                Ok(0) | Err(Errno::EINTR) => continue,
                Ok(_) => {}
                Err(error) => {
                    self.pause("wait for", error);
                    continue;
                }
            }
            let mut bytes = Vec::new();
            while bytes.len() < CHUNK {
                match self.receive(&mut buffer) {
                    Ok(None) | Err(Errno::EINTR) => {}
                    Ok(Some(length)) => {
                        bytes.extend_from_slice(message(&buffer[..length]));
                        bytes.push(b'\n');
                    }
                    Err(Errno::EAGAIN) => break,
                    Err(error) => {
                        self.pause("receive", error);
                        break;
                    }
                }
            }
            let batch = Batch {
                log: Arc::clone(&self.name),
                piece: Piece {
                    bytes,
                    ..Piece::default()
                },
                max_line,
                feed: None,
                caught_up: false,
                progress: None,
                read: clock::boot(),
            };
            if to.blocking_send(batch).is_err() {
                return;
            }
        }
    }

    /// Want of memory passes; a socket that nobody reads would make a client invisible.
    fn pause(&self, what: &str, error: Errno) {
        error!(
            "cannot {what} syslog on {} ({error}): trying again",
            self.name
        );
        std::thread::park_timeout(RETRY);
    }

    fn receive(&mut self, buffer: &mut [u8]) -> Result<Option<usize>, Errno> {
        let mut control = cmsg_space!(u32);
        let mut parts = [io::IoSliceMut::new(buffer)];
        let received = recvmsg::<()>(
            self.socket.as_raw_fd(),
            &mut parts,
            Some(&mut control),
            MsgFlags::MSG_DONTWAIT,
        )?;
        for message in received.cmsgs()? {
            if let ControlMessageOwned::RxqOvfl(lost) = message {
                let more = lost.wrapping_sub(std::mem::replace(&mut self.lost, lost));
                self.counters
                    .syslog_lost
                    .fetch_add(more.into(), Ordering::Relaxed);
            }
        }
        self.counters.syslog.fetch_add(1, Ordering::Relaxed);
        if received.flags.contains(MsgFlags::MSG_TRUNC) {
            self.counters.overlong.fetch_add(1, Ordering::Relaxed);
            return Ok(None);
        }
        Ok(Some(received.bytes))
    }
}

/// So many messages should be able to wait at a Unix socket: they are few by default, and Nginx does not wait for room.
pub const ENOUGH_WAITING: u32 = 512;

/// How many can, at a socket that is made now; `None`: not known.
#[must_use]
pub fn can_wait() -> Option<u32> {
    let allowed = fs::read_to_string("/proc/sys/net/unix/max_dgram_qlen").ok()?;
    allowed.trim().parse().ok()
}

fn warn_of_short_queue() {
    if let Some(allowed) = can_wait().filter(|allowed| *allowed < ENOUGH_WAITING) {
        warn!(
            "only {allowed} messages can wait at a Unix socket here, and Nginx drops what finds no room: \
             `sysctl -w net.unix.max_dgram_qlen={ENOUGH_WAITING}` before the agent starts, or use UDP"
        );
    }
}

/// A Unix socket that root and a group may write to.
fn unix(path: &Path, group: Option<&str>) -> Result<UnixDatagram> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.file_type().is_socket() => {
            anyhow::bail!("something else is there: move it away, or correct source.syslog");
        }
        Ok(_) => {
            let probe = UnixDatagram::unbound()?;
            if probe.connect(path).is_ok() {
                anyhow::bail!("somebody listens there already: stop it, or correct source.syslog");
            }
            fs::remove_file(path).context("a former socket is in the way")?;
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if let Some(folder) = path.parent() {
                fs::create_dir_all(folder)
                    .with_context(|| format!("cannot make {}", folder.display()))?;
            }
        }
        Err(error) => return Err(error.into()),
    }
    warn_of_short_queue();
    let socket = UnixDatagram::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o660))?;
    if let Some(group) = group {
        let known = nix::unistd::Group::from_name(group)?;
        let group = known
            .with_context(|| format!("there is no group {group}: correct source.syslog_group"))?;
        nix::unistd::chown(path, None, Some(group.gid))?;
    }
    Ok(socket)
}

/// What Nginx has logged: the message without the head that RFC 3164 puts before it. A message without one is left as it is.
#[must_use]
pub fn message(datagram: &[u8]) -> &[u8] {
    // <190>Nov 22 18:11:06 host nginx: …; the host can be left out, and the tag chosen, but has no colon.
    let digits = datagram
        .iter()
        .skip(1)
        .take_while(|byte| byte.is_ascii_digit())
        .count();
    if datagram.first() != Some(&b'<') || !(1..=3).contains(&digits) {
        return datagram;
    }
    let rest = &datagram[1 + digits..];
    match memchr::memmem::find(rest, b": ") {
        Some(at) if rest.first() == Some(&b'>') => &rest[at + 2..],
        _ => datagram,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_head_of_a_message_is_taken_off() {
        for (datagram, text) in [
            (
                "<190>Nov 22 18:11:06 edge1 nginx: {\"a\": \"b: c\"}",
                "{\"a\": \"b: c\"}",
            ),
            ("<190>Nov  2 18:11:06 nginx: x", "x"),
            ("{\"a\": 1}", "{\"a\": 1}"),
            ("<190>nothing", "<190>nothing"),
            ("<>: x", "<>: x"),
            ("<1900>: x", "<1900>: x"),
            ("", ""),
        ] {
            assert_eq!(message(datagram.as_bytes()), text.as_bytes(), "{datagram}");
        }
    }

    #[test]
    fn only_what_cannot_be_reached_from_outside_is_listened_on() {
        for text in ["udp:127.0.0.1:5514", "udp:[::1]:5514", "unix:/run/x.sock"] {
            assert_eq!(text.parse::<Listen>().unwrap().to_string(), text);
        }
        for text in [
            "udp:0.0.0.0:514",
            "udp:192.0.2.1:514",
            "udp:5514",
            "unix:x",
            "tcp:127.0.0.1:1",
            "",
        ] {
            assert!(text.parse::<Listen>().is_err(), "{text}");
        }
        assert!(
            "udp:0.0.0.0:514"
                .parse::<Listen>()
                .unwrap_err()
                .contains("anybody")
        );
    }

    #[test]
    fn a_socket_s_place_is_taken_over_only_from_the_dead() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/access.sock");
        let listen = Listen::Unix(path.clone());
        let first = Receiver::open(&listen, None, Arc::default()).unwrap();
        let refused = Receiver::open(&listen, None, Arc::default()).unwrap_err();
        assert!(
            format!("{refused:#}").contains("listens there already"),
            "{refused:#}"
        );
        drop(first);
        drop(Receiver::open(&listen, None, Arc::default()).unwrap());
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o660
        );
        fs::remove_file(&path).unwrap();
        fs::write(&path, "mine").unwrap();
        let refused = Receiver::open(&listen, None, Arc::default()).unwrap_err();
        assert!(
            format!("{refused:#}").contains("something else"),
            "{refused:#}"
        );
        let refused = Receiver::open(
            &Listen::Unix(folder.path().join("other.sock")),
            Some("no-such-group"),
            Arc::default(),
        );
        assert!(format!("{:#}", refused.unwrap_err()).contains("source.syslog_group"));
    }
}
