//! Writing to an access log as Nginx would: one write(2) with `O_APPEND`.

use std::{
    fs::{File, OpenOptions},
    io::Write as _,
    net::IpAddr,
    path::Path,
};

use anyhow::{Context as _, Result};

use super::clock;

/// One line, with its line break, of a request that is answered now.
#[must_use]
pub fn line(source: IpAddr, status: u16) -> String {
    let now = clock::epoch_millis();
    format!(
        r#"{{"timestamp":"{}.{:03}","source_ip":"{source}","realip_remote_addr":"{source}","method":"GET","path":"/","status":"{status}","response_size":"3","user_agent":"","request_time":"0.000","request_id":"00000000000000000000000000000000"}}{}"#,
        now / 1000,
        now % 1000,
        '\n'
    )
}

/// An access log, open for appending.
#[derive(Debug)]
pub struct Appender(File);

impl Appender {
    /// Opens or makes the log.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(path);
        Ok(Self(file.with_context(|| {
            format!("cannot open {}", path.display())
        })?))
    }

    /// Appends bytes in one system call.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.0
            .write_all(bytes)
            .context("cannot write to the access log")
    }

    /// Appends so many lines of one client, in one system call.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn requests(&mut self, source: IpAddr, count: u64) -> Result<()> {
        let lines: String = (0..count).map(|_| line(source, 200)).collect();
        self.append(lines.as_bytes())
    }
}
