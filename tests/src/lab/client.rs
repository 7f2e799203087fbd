//! One HTTP request from any address of the world.

use std::{
    io::{Error, ErrorKind, Read as _, Result, Write as _},
    net::{IpAddr, SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::Context as _;
use socket2::{Domain, Protocol, Socket, Type};

use super::{Lab, server_for};

/// Longest answer that is read.
const MAX_ANSWER: u64 = 64 * 1024;

impl Lab {
    /// Asks Nginx for a path, from a client's address; the status of the answer.
    ///
    /// # Errors
    /// When no answer comes within the time-out, among others because the address is banned.
    pub fn get(&self, client: IpAddr, path: &str, timeout: Duration) -> anyhow::Result<u16> {
        self.world()
            .run(|| get(client, path, timeout))?
            .with_context(|| format!("GET {path} from {client}"))
    }
}

/// Asks Nginx for a path; to be called on a thread that is in the clients' namespace. Connecting and reading may take
/// `timeout` each.
///
/// # Errors
/// When no answer comes.
pub fn get(client: IpAddr, path: &str, timeout: Duration) -> Result<u16> {
    let server = server_for(client);
    let socket = Socket::new(
        Domain::for_address(server),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    socket.bind(&SocketAddr::new(client, 0).into())?;
    socket.connect_timeout(&server.into(), timeout)?;
    let mut stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    stream.write_all(
        format!("GET {path} HTTP/1.1\r\nHost: edge.example\r\nConnection: close\r\n\r\n")
            .as_bytes(),
    )?;
    let mut answer = Vec::new();
    stream.take(MAX_ANSWER).read_to_end(&mut answer)?;
    status(&answer).ok_or_else(|| {
        Error::new(
            ErrorKind::InvalidData,
            format!(
                "not an HTTP answer: {:?}",
                String::from_utf8_lossy(answer.get(..60).unwrap_or(&answer))
            ),
        )
    })
}

fn status(answer: &[u8]) -> Option<u16> {
    let code = answer.strip_prefix(b"HTTP/1.1 ")?.get(..3)?;
    str::from_utf8(code).ok()?.parse().ok()
}
