//! A real Nginx, with the access log that the agent reads, as the README has operators set it up.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::Signal;

use super::{EDGE_V4, EDGE_V6, Lab, WORLD_V4, process::Process, wait::eventually};
use crate::readme;

/// Nginx on port 80 of the edge host: `/` is a page, `/login` answers 401, everything else 404.
#[derive(Debug)]
pub struct Nginx {
    process: Process,
    log: PathBuf,
    _lab: Lab,
}

impl Nginx {
    /// Starts Nginx and waits until it answers.
    ///
    /// # Errors
    /// When it is not installed or does not start; with its own words.
    pub fn start(lab: &Lab) -> Result<Self> {
        Self::start_with(lab, "", "")
    }

    /// The same with more directives of its `http` and `server` blocks.
    ///
    /// # Errors
    /// See [`Nginx::start`].
    pub fn start_with(lab: &Lab, http: &str, server: &str) -> Result<Self> {
        let home = lab.dir().join("nginx");
        fs::create_dir_all(home.join("pages"))
            .with_context(|| format!("cannot make the folder {}", home.display()))?;
        fs::write(home.join("pages/index.html"), "<p>The service.</p>\n")?;
        fs::write(home.join("nginx.conf"), configuration(&home, http, server))?;
        let errors = home.join("error.log");
        let mut process = Process::start(
            "nginx",
            lab.edge(),
            Command::new("nginx")
                .arg("-p")
                .arg(&home)
                .arg("-c")
                .arg(home.join("nginx.conf"))
                .arg("-e")
                .arg(&errors)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null()),
        )
        .context("is nginx installed (package nginx-light)?")?;
        let log = home.join("access.json");
        eventually("Nginx to answer", Duration::from_secs(10), || {
            if let Some(status) = process.ended()? {
                bail!("Nginx has ended with {status}");
            }
            Ok(lab
                .get(WORLD_V4.into(), "/", Duration::from_secs(1))
                .is_ok_and(|status| status == 200)
                .then_some(()))
        })
        .with_context(|| fs::read_to_string(&errors).unwrap_or_default())?;
        Ok(Self {
            process,
            log,
            _lab: lab.clone(),
        })
    }

    /// Its access log.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Its folder, which holds `nginx.conf`.
    #[must_use]
    pub fn home(&self) -> &Path {
        self.log.parent().unwrap_or(&self.log)
    }

    /// Its master process.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Makes it open its logs anew, as after a rotation.
    ///
    /// # Errors
    /// When it has ended.
    pub fn reopen_logs(&self) -> Result<()> {
        self.process.signal(Signal::SIGUSR1)
    }

    /// Its version, as it names itself.
    ///
    /// # Errors
    /// When it is not installed.
    pub fn version() -> Result<String> {
        let output = Command::new("nginx").arg("-v").output()?;
        let words = String::from_utf8_lossy(&output.stderr);
        Ok(words
            .rsplit(' ')
            .next()
            .unwrap_or_default()
            .trim()
            .to_owned())
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        // In good order where that is possible, so that the worker is waited for by its master.
        if self.process.signal(Signal::SIGTERM).is_ok() {
            let _killed_next = self.process.wait(Duration::from_secs(2));
        }
    }
}

fn configuration(home: &Path, http: &str, server: &str) -> String {
    let home = home.display();
    let log = readme::nginx_snippet().replace(
        "/var/log/nginx/portcullis.json",
        &format!("{home}/access.json"),
    );
    format!(
        "user root;
worker_processes 1;
daemon off;
pid {home}/nginx.pid;
error_log {home}/error.log notice;
events {{ worker_connections 4096; }}
http {{
    {log}
    client_body_temp_path {home}/body;
    proxy_temp_path {home}/proxy;
    fastcgi_temp_path {home}/fastcgi;
    uwsgi_temp_path {home}/uwsgi;
    scgi_temp_path {home}/scgi;
    default_type text/html;
    {http}
    server {{
        {server}
        listen {EDGE_V4}:80 backlog=4096;
        listen [{EDGE_V6}]:80 backlog=4096;
        root {home}/pages;
        location = /login {{ return 401; }}
    }}
}}
"
    )
}
