//! Where the agent lives: its state, its socket, its clock, and whether it is at work.

use std::{
    fs,
    os::unix::{ffi::OsStrExt as _, fs::FileTypeExt as _, net::UnixStream},
    path::Path,
};

use nix::{
    sys::{
        statfs::{self, FsType, statfs},
        statvfs::{FsFlags, statvfs},
    },
    unistd::{AccessFlags, Group, access},
};

use super::{Check, Plan, command};
use crate::{
    audit,
    config::Config,
    control::{self, AskError, Request},
    runtime::Status,
};

pub(super) fn checks(plan: &Plan) -> Vec<Check> {
    let Config {
        state_dir, history, ..
    } = &plan.config;
    vec![state(state_dir, *history), socket(plan), clock()]
}

/// The folder, or the first above it that is there.
fn nearest(dir: &Path) -> Option<&Path> {
    dir.ancestors().find(|dir| dir.exists())
}

/// What keeps a folder from being written to, or made.
pub(super) fn unwritable(dir: &Path) -> Option<(String, String)> {
    let shown = dir.display();
    let Some(there) = nearest(dir) else {
        return Some((
            format!("{shown} cannot be looked at"),
            "correct the path, or its rights".to_owned(),
        ));
    };
    if !there.is_dir() {
        return Some((
            format!("{} is no folder", there.display()),
            "move it away, or correct the path".to_owned(),
        ));
    }
    if statvfs(there).is_ok_and(|stat| stat.flags().contains(FsFlags::ST_RDONLY)) {
        return Some((
            format!("{} is on a read-only file system", there.display()),
            format!("remount it; in a systemd unit: ReadWritePaths={shown}"),
        ));
    }
    access(there, AccessFlags::W_OK | AccessFlags::X_OK)
        .err()
        .map(|error| {
            (
                format!("{} is not writable: {}", there.display(), error.desc()),
                format!("run as root, or make {shown} and give it to the service's user"),
            )
        })
}

/// Room that the ledger takes with a hundred thousand bans and offenders, while it is written anew.
const LEDGER: u64 = 64 << 20;

/// Room that is still needed: the history grows to its bound.
fn room(dir: &Path, history: audit::Settings) -> u64 {
    let files = fs::read_dir(dir).into_iter().flatten().flatten();
    let of_history = files.filter(|file| file.file_name().as_bytes().starts_with(b"history.jsonl"));
    let there: u64 = of_history
        .filter_map(|file| Some(file.metadata().ok()?.len()))
        .sum();
    let all = history
        .max_bytes
        .saturating_mul(u64::from(history.keep) + 1);
    all.saturating_sub(there).saturating_add(LEDGER)
}

fn state(dir: &Path, history: audit::Settings) -> Check {
    let name = "state folder";
    let shown = dir.display();
    if let Some((found, remedy)) = unwritable(dir) {
        return Check::fail(name, found, remedy);
    }
    let there = nearest(dir).unwrap_or(dir);
    let kind = statfs(there).ok().map(|stat| stat.filesystem_type());
    if let Some(volatile) = kind.and_then(volatile) {
        return Check::warn(
            name,
            format!(
                "{shown} is on {volatile}: bans, offences and what was learnt are lost with it"
            ),
            "set state.dir to a folder on a disk (in a container: a volume)",
        );
    }
    if let Some(remote) = kind.and_then(remote) {
        return Check::warn(
            name,
            format!(
                "{shown} is on {remote}: a network that hangs costs history, and its locks are not to be relied on"
            ),
            "set state.dir to a folder on a local disk",
        );
    }
    let free = statvfs(there)
        .ok()
        .map(|stat| stat.blocks_available().saturating_mul(stat.fragment_size()));
    let mib = |bytes: u64| bytes >> 20;
    let room = room(dir, history);
    match free {
        Some(free) if free < room => Check::warn(
            name,
            format!(
                "{shown} has {} MiB left, and ledger and history may take {} MiB more; a full disk costs history",
                mib(free),
                mib(room)
            ),
            "make room, or lower history.max_bytes or history.keep",
        ),
        _ => {
            let is = if dir.exists() {
                "is writable"
            } else {
                "can be made"
            };
            let free = free.map_or(String::new(), |free| format!(", {} MiB free", mib(free)));
            Check::pass(name, format!("{shown} {is}{free}"))
        }
    }
}

fn volatile(kind: FsType) -> Option<&'static str> {
    const RAMFS: i64 = 0x8584_58f6;
    if kind == statfs::TMPFS_MAGIC {
        Some("a tmpfs")
    } else if kind.0 == RAMFS {
        Some("a ramfs")
    } else if kind == statfs::OVERLAYFS_SUPER_MAGIC {
        Some("a container's own layer (overlayfs)")
    } else {
        None
    }
}

fn remote(kind: FsType) -> Option<&'static str> {
    if kind == statfs::NFS_SUPER_MAGIC {
        Some("NFS")
    } else if kind == statfs::FUSE_SUPER_MAGIC {
        Some("FUSE")
    } else {
        None
    }
}

fn socket(plan: &Plan) -> Check {
    let control = &plan.config.control;
    let keys = ["control.socket", "control.group"];
    socket_at(
        "control socket",
        &control.socket,
        control.group.as_deref(),
        keys,
    )
}

/// Can a Unix socket be made there, for a group? Named are the configuration's keys of both.
pub(super) fn socket_at(
    name: &str,
    path: &Path,
    group: Option<&str>,
    [path_key, group_key]: [&str; 2],
) -> Check {
    let shown = path.display();
    // The kernel's limit for the path of a socket.
    if path.as_os_str().len() > 107 {
        return Check::fail(
            name,
            format!("{shown} is longer than the 107 bytes that a socket's path may have"),
            format!("correct {path_key}"),
        );
    }
    if let Some(group) = group
        && matches!(Group::from_name(group), Ok(None))
    {
        return Check::fail(
            name,
            format!("there is no group {group:?}"),
            format!("`groupadd {group}`, or correct {group_key}"),
        );
    }
    if fs::symlink_metadata(path).is_ok_and(|there| !there.file_type().is_socket()) {
        return Check::fail(
            name,
            format!("{shown} is something else than a socket"),
            format!("correct {path_key}, or move away what is there"),
        );
    }
    match unwritable(path.parent().unwrap_or(Path::new("/"))) {
        Some((found, remedy)) => Check::fail(name, found, remedy),
        None => Check::pass(
            name,
            format!("{shown}{}", if path.exists() { "" } else { " can be made" }),
        ),
    }
}

fn clock() -> Check {
    let said = command::run(
        "timedatectl",
        &["show", "--property=NTP", "--property=NTPSynchronized"],
    );
    let answer = said
        .ok()
        .filter(|said| said.ok)
        .map(|said| said.out)
        .unwrap_or_default();
    let stamp = Path::new("/run/systemd/timesync/synchronized").exists();
    synchronised(&answer, stamp)
}

fn synchronised(timedatectl: &str, stamp: bool) -> Check {
    let name = "clock";
    let says = |line: &str| timedatectl.lines().any(|other| other.trim() == line);
    if says("NTPSynchronized=yes") || stamp {
        Check::pass(name, "synchronised")
    } else if says("NTPSynchronized=no") {
        let service = if says("NTP=yes") {
            "a time service is on, and has not reached its servers"
        } else {
            "no time service is on"
        };
        Check::warn(
            name,
            format!("not synchronised: {service}; hours of the day and ends of bans go by it"),
            "`timedatectl set-ntp true`, or install chrony",
        )
    } else {
        Check::skipped(
            name,
            "not known whether it is synchronised (no timedatectl)",
        )
    }
}

/// Is an agent running, and how is it?
pub(super) fn agent(plan: &Plan) -> Vec<Check> {
    let name = "agent";
    let socket = &plan.config.control.socket;
    // Nobody there is the ordinary case before the first start, and no fault.
    if UnixStream::connect(socket).is_err() {
        let left = plan.xdp && has_links(&plan.config.enforce.pin_dir);
        return vec![if left {
            Check::warn(
                name,
                "none is running, and XDP programs of an earlier run are in force: bans end on time, and no new ones come",
                "start it (`portcullis run`), or take everything out (`portcullis detach`)",
            )
        } else {
            Check::skipped(name, format!("none is running at {}", socket.display()))
        }];
    }
    vec![match control::ask::<Status>(socket, &Request::Status) {
        Ok(status) => running(&status),
        Err(AskError::Refused(why)) => Check::skipped(
            name,
            format!("one is running, and does not say how it is: {why}"),
        ),
        Err(AskError::Unreachable(error)) => Check::warn(
            name,
            format!("one is running, and does not answer as it should: {error:#}"),
            "start it again (`systemctl restart portcullis`)",
        ),
    }]
}

fn running(status: &Status) -> Check {
    let name = "agent";
    let own = env!("CARGO_PKG_VERSION");
    let found = format!(
        "running: {} on {}, mode {:?}",
        status.backend, status.place, status.mode
    )
    .to_lowercase();
    if let Some(error) = &status.enforce_error {
        return Check::fail(
            name,
            format!("{found}; the newest change of the kernel failed: {error}"),
            "see `portcullis status` and the agent's log",
        );
    }
    if let Some(unreadable) = status.unreadable.first() {
        return Check::fail(
            name,
            format!("{found}; {unreadable}"),
            "correct source.format, or the log_format; see `portcullis status`",
        );
    }
    if let Some(error) = status.nginx.as_ref().and_then(|nginx| nginx.error.as_ref()) {
        return Check::warn(
            name,
            format!("{found}; the newest change of Nginx's include failed: {error}"),
            "put right what Nginx says; see `portcullis status`",
        );
    }
    if status.version != own {
        return Check::warn(
            name,
            format!(
                "{found}; it is of version {}, and this is {own}",
                status.version
            ),
            "start it again, so that the newer one takes over",
        );
    }
    Check::pass(name, found)
}

/// Is a link of ours pinned, of this version or another one?
fn has_links(pin_dir: &Path) -> bool {
    let versions = fs::read_dir(pin_dir).into_iter().flatten().flatten();
    versions.into_iter().any(|version| {
        fs::read_dir(version.path().join("links")).is_ok_and(|mut links| links.next().is_some())
    })
}

#[cfg(test)]
mod tests {
    use super::{super::Outcome, *};
    use crate::{enforce::nginx, runtime::Unreadable};

    #[test]
    fn a_state_folder_that_is_to_be_made_is_judged_by_the_one_above_it() {
        let above = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let history = Config::default().history;
        let check = state(&above.path().join("not/yet"), history);
        assert_ne!(check.outcome, Outcome::Fail, "{check:?}");
        fs::write(above.path().join("file"), "").unwrap();
        assert_eq!(
            state(&above.path().join("file/below"), history).outcome,
            Outcome::Fail
        );
    }

    #[test]
    fn the_history_s_room_is_what_it_does_not_have_yet() {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let history = audit::Settings {
            max_bytes: 1000,
            keep: 2,
        };
        assert_eq!(room(folder.path(), history), LEDGER + 3000);
        fs::write(folder.path().join("history.jsonl"), [0; 600]).unwrap();
        fs::write(folder.path().join("history.jsonl.1"), [0; 900]).unwrap();
        fs::write(folder.path().join("history.head"), [0; 100]).unwrap();
        assert_eq!(room(folder.path(), history), LEDGER + 1500);
        let endless = audit::Settings {
            max_bytes: u64::MAX,
            keep: 2,
        };
        let check = state(folder.path(), endless);
        assert!(check.found.contains("may take"), "{check:?}");
    }

    #[test]
    fn memory_is_no_disk() {
        assert_eq!(volatile(statfs::TMPFS_MAGIC), Some("a tmpfs"));
        assert_eq!(volatile(statfs::EXT4_SUPER_MAGIC), None);
        assert_eq!(remote(statfs::NFS_SUPER_MAGIC), Some("NFS"));
    }

    #[test]
    fn the_socket_s_path_and_group_are_checked() {
        let folder = tempfile::tempdir().unwrap();
        let mut config = Config::default();
        config.control.socket = folder.path().join("control.sock");
        assert_eq!(socket(&Plan::new(&config)).outcome, Outcome::Pass);
        config.control.group = Some("no-such-group".into());
        assert_eq!(socket(&Plan::new(&config)).outcome, Outcome::Fail);
        config.control.group = None;
        fs::write(&config.control.socket, "").unwrap();
        assert_eq!(socket(&Plan::new(&config)).outcome, Outcome::Fail);
        config.control.socket = folder.path().join("x".repeat(120));
        assert!(socket(&Plan::new(&config)).found.contains("107"));
    }

    #[test]
    fn the_clock_is_read_from_what_timedatectl_says() {
        assert_eq!(
            synchronised("NTP=yes\nNTPSynchronized=yes\n", false).outcome,
            Outcome::Pass
        );
        assert!(
            synchronised("NTP=yes\nNTPSynchronized=no\n", false)
                .found
                .contains("has not reached")
        );
        assert!(
            synchronised("NTP=no\nNTPSynchronized=no\n", false)
                .found
                .contains("no time service")
        );
        assert_eq!(synchronised("", false).outcome, Outcome::Skipped);
        assert_eq!(
            synchronised("System has not been booted with systemd", true).outcome,
            Outcome::Pass
        );
    }

    #[test]
    fn an_agent_that_sees_or_does_nothing_is_told() {
        let outcome = |change: &dyn Fn(&mut Status)| {
            let mut status = Status::sample();
            change(&mut status);
            let check = running(&status);
            (check.outcome, check.found)
        };
        assert_eq!(outcome(&|_| {}).0, Outcome::Pass);
        assert_eq!(
            outcome(&|s| s.version = "0.0.0".to_owned()).0,
            Outcome::Warn
        );
        let error = Some("no room".to_owned());
        let failed = outcome(&|s| s.enforce_error = error.clone());
        assert!(failed.0 == Outcome::Fail && failed.1.ends_with("no room"));
        let (judged, found) = outcome(&|s| {
            s.unreadable.push(Unreadable {
                log: "/a.json".to_owned(),
                lines: 20,
                first: Some(0),
                problem: "no JSON".to_owned(),
            });
        });
        assert_eq!(judged, Outcome::Fail);
        assert!(found.contains("lines of /a.json can be read"), "{found}");
        let (judged, found) = outcome(&|s| {
            s.nginx = Some(nginx::Status {
                error: Some("nginx -t: exit status: 1".to_owned()),
                ..nginx::Status::default()
            });
        });
        assert_eq!(judged, Outcome::Warn);
        assert!(found.contains("nginx -t"), "{found}");
    }

    #[test]
    fn no_agent_is_no_fault() {
        let mut config = Config::default();
        config.control.socket = "/no/such/socket".into();
        config.enforce.pin_dir = "/no/such/pins".into();
        assert_eq!(agent(&Plan::new(&config))[0].outcome, Outcome::Skipped);
    }
}
