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

    /// The same through a proxy, which says whose request it passes on.
    ///
    /// # Errors
    /// When no answer comes within the time-out.
    pub fn get_through(
        &self,
        proxy: IpAddr,
        client: IpAddr,
        path: &str,
        timeout: Duration,
    ) -> anyhow::Result<u16> {
        let header = format!("X-Forwarded-For: {client}\r\n");
        self.world()
            .run(|| get_with(proxy, path, &header, timeout))?
            .with_context(|| format!("GET {path} from {client} through {proxy}"))
    }
}

/// Asks Nginx for a path; to be called on a thread that is in the clients' namespace. Connecting and reading may take
/// `timeout` each.
///
/// # Errors
/// When no answer comes.
pub fn get(client: IpAddr, path: &str, timeout: Duration) -> Result<u16> {
    get_with(client, path, "", timeout)
}

fn get_with(client: IpAddr, path: &str, header: &str, timeout: Duration) -> Result<u16> {
    let mut stream = connect(client, timeout)?;
    stream.write_all(
        format!("GET {path} HTTP/1.1\r\nHost: edge.example\r\n{header}Connection: close\r\n\r\n")
            .as_bytes(),
    )?;
    let mut answer = Vec::new();
    match stream.take(MAX_ANSWER).read_to_end(&mut answer) {
        // Whom this very request got banned, Nginx has answered before it wrote the line; then the agent ends the
        // connection, often before the client has read what it was sent.
        Err(error) if error.kind() == ErrorKind::ConnectionReset && !answer.is_empty() => {}
        Err(error) => return Err(error),
        Ok(_) => {}
    }
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

/// Many requests on one connection, all sent before the first answer is read; returns how many were answered.
///
/// # Errors
/// When the answers do not come.
pub fn get_many(client: IpAddr, count: usize, timeout: Duration) -> Result<usize> {
    const REQUEST: &str = "GET / HTTP/1.1\r\nHost: edge.example\r\n\r\n";
    const LAST: &str = "GET / HTTP/1.1\r\nHost: edge.example\r\nConnection: close\r\n\r\n";
    let mut stream = connect(client, timeout)?;
    let mut requests = REQUEST.repeat(count.saturating_sub(1));
    requests.push_str(LAST);
    stream.write_all(requests.as_bytes())?;
    let mut answers = String::new();
    stream.read_to_string(&mut answers)?;
    Ok(answers.matches("HTTP/1.1 200").count())
}

fn connect(client: IpAddr, timeout: Duration) -> Result<TcpStream> {
    connect_to(client, server_for(client), timeout)
}

/// Connects to any service of the edge host; to be called as [`get`].
///
/// # Errors
/// When there is no connection within the time-out.
pub fn connect_to(client: IpAddr, server: SocketAddr, timeout: Duration) -> Result<TcpStream> {
    let socket = Socket::new(
        Domain::for_address(server),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    socket.bind(&SocketAddr::new(client, 0).into())?;
    socket.connect_timeout(&server.into(), timeout)?;
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    Ok(stream)
}

fn status(answer: &[u8]) -> Option<u16> {
    let code = answer.strip_prefix(b"HTTP/1.1 ")?.get(..3)?;
    str::from_utf8(code).ok()?.parse().ok()
}
