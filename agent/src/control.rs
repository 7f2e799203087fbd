//! The control socket: one JSON request a line, one JSON reply a line, for root and one group.
//!
//! The socket's mode keeps everybody else out, and the peer's credentials are checked once more, as the kernel gives them.

use std::{
    ffi::CString,
    fs, io,
    os::unix::fs::{FileTypeExt as _, PermissionsExt as _, chown},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail};
use ipnet::IpNet;
use nix::unistd::{Gid, Group, Uid, User, getgrouplist};
use portcullis_engine::{Subject, Term};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{UnixListener, UnixStream},
    sync::{Semaphore, mpsc, oneshot},
    time::timeout,
};
use tracing::{debug, warn};

use crate::config;

/// What can be asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "verb", deny_unknown_fields)]
pub enum Request {
    /// How it goes.
    Status,
    /// Every ban.
    Bans,
    /// What is known of somebody.
    Explain {
        /// Of whom.
        subject: Subject,
    },
    /// Ban by an operator's word.
    Ban {
        /// Whom.
        subject: Subject,
        /// For how many seconds; for ever when there is none.
        secs: Option<u64>,
        /// Why.
        reason: String,
        /// Only count what it would drop.
        #[serde(default)]
        observe: bool,
        /// It ends after so many seconds unless it is confirmed.
        #[serde(default)]
        confirm_secs: Option<u64>,
    },
    /// Let a ban stand that was made on approval.
    Confirm {
        /// Whose.
        subject: Subject,
    },
    /// Put a network on the allowlist.
    Allow {
        /// Which.
        net: IpNet,
        /// Why.
        reason: String,
    },
    /// Take one off that an operator has put on it.
    Disallow {
        /// Which.
        net: IpNet,
    },
    /// What is on the allowlist.
    Allowlist,
    /// Ban many by an operator's word, but leave alone who is banned for as long already. As many as a request has room for.
    BanMany {
        /// Whom.
        bans: Vec<Wanted>,
    },
    /// Lift a ban.
    Unban {
        /// Whose.
        subject: Subject,
    },
    /// Lift every ban.
    UnbanAll,
    /// Read the configuration anew.
    Reload,
}

/// A request, by whom, and where its reply goes.
#[derive(Debug)]
pub struct Asked {
    /// What is asked.
    pub request: Request,
    /// The user's name.
    pub by: String,
    /// For the answer.
    pub reply: oneshot::Sender<Reply>,
}

/// One of many bans.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wanted {
    /// Whom.
    pub subject: Subject,
    /// Until when.
    pub term: Term,
    /// Why.
    pub reason: String,
    /// Only count what it would drop.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub observe: bool,
}

/// What is answered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// It is done, or this is the answer.
    Done(Value),
    /// It was not done, and why.
    Refused(String),
}

impl Reply {
    /// An answer.
    pub fn done<T: Serialize>(value: &T) -> Self {
        serde_json::to_value(value)
            .map_or_else(|error| Self::Refused(error.to_string()), Self::Done)
    }

    /// A refusal.
    #[must_use]
    pub fn refused(why: String) -> Self {
        Self::Refused(why)
    }

    /// An answer that may have failed.
    pub fn of<T: Serialize>(result: Result<T>) -> Self {
        result.map_or_else(
            |error| Self::Refused(format!("{error:#}")),
            |value| Self::done(&value),
        )
    }
}

/// Connections at a time; further ones wait to be accepted.
const CONNECTIONS: usize = 32;
/// A longer request is refused.
pub(crate) const MAX_REQUEST: u64 = 64 * 1024;
/// Whoever says nothing for so long is disconnected; whoever waits for an answer for so long is told so.
const PATIENCE: Duration = Duration::from_secs(10);
/// A longer reply is not read: about ten million bans.
const MAX_REPLY: u64 = 4 << 30;

/// The socket; removed when dropped.
#[derive(Debug)]
pub struct Socket {
    path: PathBuf,
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            debug!("cannot remove {}: {error}", self.path.display());
        }
    }
}

/// Starts answering. Requests go to `to`, each with where its reply goes. To be called inside a tokio runtime.
///
/// # Errors
/// When another agent answers there already, the group does not exist, or the socket cannot be made.
pub fn serve(settings: &config::Control, to: mpsc::Sender<Asked>) -> Result<Socket> {
    let path = &settings.socket;
    let group = settings.group.as_deref().map(group_id).transpose()?;
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        bail!(
            "another agent answers at {}: there can be one on a host (`portcullis status` shows it)",
            path.display()
        );
    }
    // What an agent that was killed has left; nothing else is removed.
    if let Ok(there) = fs::symlink_metadata(path) {
        if !there.file_type().is_socket() {
            bail!(
                "{} is there and is no socket: correct control.socket",
                path.display()
            );
        }
        fs::remove_file(path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    let listener = UnixListener::bind(path).with_context(|| {
        format!(
            "cannot make the control socket {}: correct control.socket, or its folder's rights",
            path.display()
        )
    })?;
    // Before the rights are as they should be, root alone can connect if the umask is sane, and the check of the peer
    // holds in any case.
    fs::set_permissions(
        path,
        fs::Permissions::from_mode(if group.is_some() { 0o660 } else { 0o600 }),
    )?;
    if let Some(group) = group {
        chown(path, None, Some(group.as_raw()))
            .with_context(|| format!("cannot give {} to its group", path.display()))?;
    }
    tokio::spawn(accept(listener, group, to));
    Ok(Socket { path: path.clone() })
}

fn group_id(name: &str) -> Result<Gid> {
    let group =
        Group::from_name(name).with_context(|| format!("cannot look up the group {name}"))?;
    Ok(group
        .with_context(|| {
            format!(
                "there is no group {name}: make it (`groupadd {name}`) or correct control.group"
            )
        })?
        .gid)
}

async fn accept(listener: UnixListener, group: Option<Gid>, to: mpsc::Sender<Asked>) {
    let free = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(permit) = Arc::clone(&free).acquire_owned().await else {
            return;
        };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                warn!("a control connection could not be accepted: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let to = to.clone();
        tokio::spawn(async move {
            if let Err(error) = converse(stream, group, to).await {
                debug!("a control connection has ended: {error:#}");
            }
            drop(permit);
        });
    }
}

async fn converse(
    mut stream: UnixStream,
    group: Option<Gid>,
    to: mpsc::Sender<Asked>,
) -> Result<()> {
    let peer = stream.peer_cred()?;
    let (uid, gid) = (Uid::from_raw(peer.uid()), Gid::from_raw(peer.gid()));
    let may = is_allowed(uid, gid, group);
    let by = match User::from_uid(uid) {
        Ok(Some(user)) => user.name,
        _ => format!("user {uid}"),
    };
    let (reader, mut writer) = stream.split();
    let mut reader = BufReader::new(reader);
    loop {
        let mut line = String::new();
        let read = timeout(
            PATIENCE,
            (&mut reader).take(MAX_REQUEST).read_line(&mut line),
        )
        .await??;
        if read == 0 {
            return Ok(());
        }
        let is_cut = line.len() as u64 >= MAX_REQUEST && !line.ends_with('\n');
        let reply = if is_cut {
            Reply::refused(format!(
                "a request of more than {MAX_REQUEST} bytes: shorten what was typed"
            ))
        } else if may {
            match serde_json::from_str::<Request>(&line) {
                Ok(request) => ask_agent(request, by.clone(), &to).await,
                Err(error) => Reply::refused(format!("not a request: {error}")),
            }
        } else {
            warn!("user {uid} was refused at the control socket");
            Reply::refused("only root and the configured control.group may do that".to_owned())
        };
        let mut text = serde_json::to_vec(&reply)?;
        text.push(b'\n');
        timeout(PATIENCE, writer.write_all(&text)).await??;
        if !line.ends_with('\n') {
            bail!("a request over {MAX_REQUEST} bytes");
        }
    }
}

async fn ask_agent(request: Request, by: String, to: &mpsc::Sender<Asked>) -> Reply {
    let (reply, answer) = oneshot::channel();
    let asked = async {
        let asked = Asked { request, by, reply };
        to.send(asked).await.ok()?;
        answer.await.ok()
    };
    match timeout(PATIENCE, asked).await {
        Ok(Some(reply)) => reply,
        Ok(None) => Reply::refused("the agent is stopping".to_owned()),
        Err(_) => Reply::refused(
            "the agent is too busy to answer; what was asked may still be done".to_owned(),
        ),
    }
}

/// Root, or a member of the group: by its primary group as the kernel says it, or by the group database.
fn is_allowed(uid: Uid, gid: Gid, group: Option<Gid>) -> bool {
    let Some(group) = group else {
        return uid.is_root();
    };
    if uid.is_root() || gid == group {
        return true;
    }
    let Ok(Some(user)) = User::from_uid(uid) else {
        return false;
    };
    let Ok(name) = CString::new(user.name) else {
        return false;
    };
    getgrouplist(&name, user.gid).is_ok_and(|groups| groups.contains(&group))
}

/// Asks the agent behind a socket, from another process.
///
/// # Errors
/// When nobody answers there, or it refuses: its reason.
pub fn ask<T: DeserializeOwned>(socket: &Path, request: &Request) -> Result<T, AskError> {
    use std::io::{BufRead as _, Read as _, Write as _};

    let unreachable = |error: io::Error| {
        let remedy = match error.kind() {
            io::ErrorKind::PermissionDenied => "only root and the configured control.group may",
            _ => {
                "is the agent running? (`portcullis run` starts it; --socket names another socket)"
            }
        };
        AskError::Unreachable(
            anyhow!(error).context(format!("cannot reach {}: {remedy}", socket.display())),
        )
    };
    let mut stream = std::os::unix::net::UnixStream::connect(socket).map_err(unreachable)?;
    // Longer than the agent's own patience, so that its word comes first.
    stream
        .set_read_timeout(Some(PATIENCE * 2))
        .map_err(unreachable)?;
    let mut line =
        serde_json::to_vec(request).map_err(|error| AskError::Unreachable(error.into()))?;
    line.push(b'\n');
    stream.write_all(&line).map_err(unreachable)?;
    let mut answer = Vec::new();
    io::BufReader::new(stream.take(MAX_REPLY))
        .read_until(b'\n', &mut answer)
        .map_err(unreachable)?;
    let reply = serde_json::from_slice(&answer).map_err(|error| {
        AskError::Unreachable(anyhow!(error).context("the agent's answer cannot be read"))
    })?;
    match reply {
        Reply::Done(value) => serde_json::from_value(value).map_err(|error| {
            AskError::Unreachable(anyhow!(error).context("the agent is of another version"))
        }),
        Reply::Refused(why) => Err(AskError::Refused(why)),
    }
}

/// Why an answer was not had.
#[derive(Debug)]
pub enum AskError {
    /// Nobody has answered.
    Unreachable(anyhow::Error),
    /// The agent says no.
    Refused(String),
}
