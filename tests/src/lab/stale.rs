//! Removes what killed runs have left behind. A name holds the process that made it; what a living process made is left
//! alone.

use std::{fs, path::Path};

use nix::{
    mount::{MntFlags, umount2},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::netns::{self, NAMED};

/// What the names of namespaces and folders begin with; the process comes next.
pub const PREFIX: &str = "portcullis-lab-";

/// Cleans up as far as it can; another run may be doing the same.
pub fn clean() {
    for name in names(Path::new(NAMED)) {
        if is_stale(&name) {
            for process in netns::ip(&["netns", "pids", &name])
                .unwrap_or_default()
                .lines()
            {
                if let Ok(process) = process.trim().parse() {
                    let _gone = kill(Pid::from_raw(process), Signal::SIGKILL);
                }
            }
            let _gone = netns::ip(&["netns", "del", &name]);
        }
    }
    let temporary = std::env::temp_dir();
    for name in names(&temporary) {
        if is_stale(&name) {
            let folder = temporary.join(&name);
            let _unmounted = umount2(&folder.join("bpf"), MntFlags::MNT_DETACH);
            let _gone = fs::remove_dir_all(&folder);
        }
    }
}

fn names(folder: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect()
}

fn is_stale(name: &str) -> bool {
    owner(name).is_some_and(|process| !Path::new("/proc").join(process.to_string()).exists())
}

fn owner(name: &str) -> Option<u32> {
    let (process, _) = name.strip_prefix(PREFIX)?.split_once('-')?;
    process.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_our_own_have_an_owner() {
        assert_eq!(owner("portcullis-lab-4711-0-edge"), Some(4711));
        assert_eq!(owner("portcullis-lab-4711-12-Xy7"), Some(4711));
        for other in [
            "portcullis-lab-x-0-edge",
            "portcullis-lab-4711",
            "portcullis-4711-0",
            "prod",
        ] {
            assert_eq!(owner(other), None, "{other}");
        }
    }

    #[test]
    fn what_a_living_process_made_is_not_stale() {
        assert!(!is_stale(&format!("{PREFIX}{}-0-edge", std::process::id())));
        // Above the largest process number that Linux gives out.
        assert!(is_stale(&format!("{PREFIX}4194305-0-edge")));
    }
}
