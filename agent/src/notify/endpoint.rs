//! A receiver's address and token, which are secrets, and one request to it. Nothing here says them: they are read from files, and
//! are in no error, no log and no debug output.

use std::{
    fmt, fs::File, io::Read as _, net::Ipv4Addr, os::unix::fs::PermissionsExt as _, path::Path,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use jiff::fmt::rfc2822;
use reqwest::{
    Client, StatusCode, Url,
    header::{AUTHORIZATION, HeaderValue, RETRY_AFTER},
    redirect::Policy,
};
use serde_json::Value;

use super::delivery::{Failure, Post};
use crate::runtime::clock;

/// Where to post.
#[derive(Clone)]
pub(super) struct Address(Url);

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Address(…)")
    }
}

impl Address {
    /// Reads an address from a file of one line. `what` it is of, and what to put there, are for errors.
    pub(super) fn read(path: &Path, what: &str, remedy: &str) -> Result<Self> {
        let text = read_secret(path, what)?;
        Self::parse(&text).with_context(|| {
            format!(
                "{} does not hold the address of {what}: {remedy} (http:// is for loopback addresses only)",
                path.display()
            )
        })
    }

    /// Any `https` address, or `http` on the loopback. The error does not repeat the text.
    fn parse(text: &str) -> Result<Self> {
        // The parser would quietly drop a line break in the middle.
        ensure!(
            !text.contains(char::is_whitespace),
            "it has more than one word or line"
        );
        let url = Url::parse(text).ok().filter(Url::has_host);
        let url = url.context("that is no address")?;
        let is_loopback = match url.host_str() {
            Some("localhost" | "[::1]") => true,
            Some(host) => host.parse().is_ok_and(|host: Ipv4Addr| host.is_loopback()),
            None => false,
        };
        match url.scheme() {
            "https" => Ok(Self(url)),
            "http" if is_loopback => Ok(Self(url)),
            _ => bail!("the address does not begin with https://"),
        }
    }
}

/// What a receiver knows us by.
#[derive(Clone)]
pub(super) struct Token(String);

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

impl Token {
    /// Reads a token from a file of one line.
    pub(super) fn read(path: &Path, what: &str) -> Result<Self> {
        let text = read_secret(path, what)?;
        ensure!(
            !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic()),
            "{} does not hold {what}: put it there on one line, without the word Bearer",
            path.display()
        );
        Ok(Self(text))
    }
}

/// The most that such a file holds.
const MOST: u64 = 4096;

/// The one line of a file; warns when others than its owner can read it.
fn read_secret(path: &Path, what: &str) -> Result<String> {
    let shown = path.display();
    let file = File::open(path).with_context(|| {
        format!("cannot open {shown} for {what}; create it, readable by the agent alone")
    })?;
    let mode = file
        .metadata()
        .with_context(|| format!("cannot examine {shown}"))?
        .permissions()
        .mode();
    // systemd gives its credentials by access lists, which show as rights of the group.
    if mode & 0o044 != 0 && !path.starts_with("/run/credentials") {
        tracing::warn!("other users can read {what} in {shown}; run: chmod 600 {shown}");
    }
    let mut text = String::new();
    file.take(MOST + 1)
        .read_to_string(&mut text)
        .with_context(|| format!("cannot read {what} in {shown}"))?;
    ensure!(
        text.len() as u64 <= MOST,
        "{shown} is longer than {MOST} bytes: put {what} there and nothing else"
    );
    Ok(text.trim().to_owned())
}

/// Where and as whom to post.
#[derive(Debug)]
pub(super) struct Endpoint {
    client: Client,
    address: Address,
    token: Option<Token>,
    timeout: Duration,
}

impl Endpoint {
    /// `timeout` is for one request, from the start of connecting to the answer.
    pub(super) fn new(address: Address, token: Option<Token>, timeout: Duration) -> Result<Self> {
        let has_user = !address.0.username().is_empty() || address.0.password().is_some();
        ensure!(
            token.is_none() || !has_user,
            "there is a user in the address and a token beside it: a request has room for one of them, so take the other away"
        );
        // An error means that there is one already, which is just as well.
        drop(rustls::crypto::ring::default_provider().install_default());
        let https = address.0.scheme() == "https";
        let mut client = Client::builder()
            .user_agent(concat!("portcullis/", env!("CARGO_PKG_VERSION")))
            .timeout(timeout)
            .connect_timeout(timeout)
            .redirect(Policy::none())
            .no_proxy()
            .https_only(https);
        if !https {
            // Without this, a host without root certificates could not even use plain HTTP.
            client = client.tls_certs_only([]);
        }
        let client = client
            .build()
            .context("cannot set up HTTPS; is the package ca-certificates installed?")?;
        Ok(Self {
            client,
            address,
            token,
            timeout,
        })
    }

    /// Why there was no answer. reqwest's errors name the address, and those of certificates the host.
    fn unreached(&self, error: reqwest::Error) -> Failure {
        if error.is_timeout() {
            return Failure::Unreached(format!("no answer within {:?}", self.timeout));
        }
        let hint = if error.is_connect() {
            let scheme = self.address.0.scheme();
            format!(" (does it listen there, and does it speak {scheme}?)")
        } else {
            String::new()
        };
        let error = format!("{:#}", anyhow::Error::new(error.without_url()));
        let error = match self.address.0.host_str() {
            Some(host) if !host.is_empty() => error.replace(host, "…"),
            _ => error,
        };
        Failure::Unreached(format!("{error}{hint}"))
    }

    /// The receiver's word for what is wrong, such as Slack's `no_service`. Other bodies are not repeated: they may hold what was
    /// sent.
    fn error_code<'a>(&self, body: &'a [u8]) -> Option<&'a str> {
        let code = str::from_utf8(body).ok()?.trim();
        let is_word = |byte: u8| byte.is_ascii_lowercase() || byte == b'_';
        let is_secret = self.address.0.as_str().contains(code)
            || self.token.iter().any(|token| token.0.contains(code));
        ((1..=40).contains(&code.len()) && code.bytes().all(is_word) && !is_secret).then_some(code)
    }
}

impl Post for Endpoint {
    async fn post(&self, body: &Value) -> Result<(), Failure> {
        let mut request = self.client.post(self.address.0.clone()).json(body);
        if let Some(token) = &self.token {
            let mut value = HeaderValue::from_str(&format!("Bearer {}", token.0))
                .map_err(|_| Failure::Final("the token fits into no header".to_owned()))?;
            value.set_sensitive(true);
            request = request.header(AUTHORIZATION, value);
        }
        let response = request.send().await;
        let mut response = response.map_err(|error| self.unreached(error))?;
        let status = response.status();
        if status.is_success() {
            return Ok(());
        }
        let asked = response
            .headers()
            .get(RETRY_AFTER)
            .and_then(|value| retry_after(value.to_str().ok()?));
        let body = response.chunk().await.ok().flatten().unwrap_or_default();
        let mut why = format!("answer {status}");
        if let Some(code) = self.error_code(&body) {
            why = format!("{why}: {code}");
        }
        if status.is_redirection() {
            why.push_str("; redirects are not followed: configure where it leads");
        }
        if status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error() {
            Err(Failure::Busy(why, asked))
        } else {
            Err(Failure::Final(why))
        }
    }
}

/// Seconds, or the time of day until when; anything else is no wish.
fn retry_after(text: &str) -> Option<Duration> {
    let text = text.trim();
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        // More than there is room for is very long, too.
        return Some(Duration::from_secs(text.parse().unwrap_or(u64::MAX)));
    }
    let until = rfc2822::parse(text).ok()?.timestamp().as_millisecond();
    let now = clock::wall().millis();
    Some(Duration::from_millis(
        u64::try_from(until).ok()?.saturating_sub(now),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::notify::sink::Log;

    #[test]
    fn only_an_https_or_loopback_address_is_one() {
        for text in [
            "https://hooks.slack.com/services/T/B/x",
            "https://user:password@receiver.example:8443/x?y=z",
            "http://127.0.0.1:8080/x",
            "http://127.9.9.9/x",
            "http://localhost:8080/x",
            "http://[::1]:8080/x",
        ] {
            assert!(Address::parse(text).is_ok(), "{text:?} should be taken");
        }
        for text in [
            "",
            "SeCrEt",
            "//SeCrEt",
            "http://hooks.slack.com/SeCrEt",
            "http://127.0.0.1.example/SeCrEt",
            "http://localhost.example/SeCrEt",
            "http://127.0.0.1@hooks.slack.com/SeCrEt",
            "http://[::2]/SeCrEt",
            "ftp://127.0.0.1/SeCrEt",
            "file:///SeCrEt",
            "https://",
            "https://hooks.slack.com/SeCrEt\nhttps://hooks.slack.com/SeCrEt",
            "webhook = https://hooks.slack.com/SeCrEt",
        ] {
            let error = format!("{:?}", Address::parse(text).unwrap_err());
            assert!(!error.contains("SeCrEt"), "{error}");
        }
    }

    #[test]
    fn files_are_read_open_rights_are_warned_of_and_no_error_repeats_them() {
        let (log, _guard) = Log::start();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        let address = || Address::read(&path, "the webhook", "put it there");
        let token = || Token::read(&path, "the webhook's token");
        let error = format!("{:#}", address().unwrap_err());
        assert!(
            error.contains("create it") && error.contains("No such file"),
            "{error}"
        );

        let set_mode =
            |mode| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        std::fs::write(&path, "  https://receiver.example/SeCrEt\r\n").unwrap();
        set_mode(0o600);
        let read = address().unwrap();
        assert_eq!(read.0.as_str(), "https://receiver.example/SeCrEt");
        assert_eq!(format!("{read:?}"), "Address(…)");
        std::fs::write(&path, "SeCrEt\n").unwrap();
        assert_eq!(format!("{:?}", token().unwrap()), "Token(…)");
        assert_eq!(log.text(), "");
        for mode in [0o640, 0o604] {
            set_mode(mode);
            token().unwrap();
        }
        assert_eq!(log.text().matches("chmod 600").count(), 2, "{}", log.text());

        for content in [&b"Bearer SeCrEt"[..], b"", b"\xffSeCrEt", &[b'x'; 10_000]] {
            std::fs::write(&path, content).unwrap();
            for error in [
                format!("{:#}", address().unwrap_err()),
                format!("{:#}", token().unwrap_err()),
            ] {
                assert!(error.contains(path.to_str().unwrap()), "{error}");
                assert!(!error.contains("SeCrEt"), "{error}");
            }
        }
        assert!(!log.text().contains("SeCrEt"));
    }

    #[test]
    fn a_token_and_a_user_in_the_address_exclude_each_other() {
        let address = || Address::parse("https://SeCrEt:SeCrEt@receiver.example/").unwrap();
        let token = Token("SeCrEt".to_owned());
        let with_both = Endpoint::new(address(), Some(token), Duration::from_secs(1));
        let error = format!("{:?}", with_both.unwrap_err());
        assert!(
            error.contains("take the other away") && !error.contains("SeCrEt"),
            "{error}"
        );
        let endpoint = Endpoint::new(address(), None, Duration::from_secs(1)).unwrap();
        let shown = format!("{endpoint:?}");
        assert!(
            !shown.contains("SeCrEt") && !shown.contains("receiver"),
            "{shown}"
        );
    }

    #[test]
    fn the_wait_that_is_asked_for_is_in_seconds_or_until_a_time_of_day() {
        assert_eq!(retry_after(" 30 "), Some(Duration::from_secs(30)));
        let longest = Some(Duration::from_secs(u64::MAX));
        assert_eq!(retry_after("99999999999999999999"), longest);
        assert_eq!(
            retry_after("Wed, 21 Oct 2015 07:28:00 GMT"),
            Some(Duration::ZERO)
        );
        let far = retry_after("Tue, 31 Dec 2999 23:59:59 GMT").unwrap();
        assert!(far > Duration::from_hours(24), "{far:?}");
        for text in ["", "-1", "1.5", "soon", "2015-10-21"] {
            assert_eq!(retry_after(text), None, "{text}");
        }
    }
}
