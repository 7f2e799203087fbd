//! Follows several logs, by name or by pattern, each getting its turn.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Result;
use tracing::{error, info, warn};

use super::{
    Counters, Settings, Start,
    checkpoint::{Checkpoint, FileId, Progress},
    packed::Packing,
    reader::Piece,
    rotated,
    tail::Tail,
};

/// Logs that are followed at a time; further ones that a pattern matches are left out, and said.
pub const MAX_LOGS: usize = 256;
/// Patterns are looked at anew so often.
const LOOK: Duration = Duration::from_secs(1);

/// The logs.
#[derive(Debug)]
pub struct Follow {
    settings: Settings,
    /// Each with whether its last look failed.
    tails: Vec<(Tail, bool)>,
    /// Whose turn it is.
    next: usize,
    looked: Duration,
    too_many: bool,
    counters: Arc<Counters>,
}

/// What came from one of the logs.
#[derive(Debug)]
pub struct Found {
    /// Lines.
    pub piece: Piece,
    /// How far the reading of their log has come with them.
    pub progress: Progress,
}

impl Follow {
    /// Opens what there is. A log that the checkpoint does not know begins where `settings.start` says, unless it has come to
    /// a pattern that was looked at before: then all of it is new.
    ///
    /// # Errors
    /// When a log is there and cannot be read.
    pub fn open(
        settings: Settings,
        checkpoint: Option<&Checkpoint>,
        now: Duration,
        counters: Arc<Counters>,
    ) -> Result<Self> {
        let mut follow = Self {
            settings,
            tails: Vec::new(),
            next: 0,
            looked: now,
            too_many: false,
            counters,
        };
        for pattern in follow.settings.logs.clone() {
            let is_known = checkpoint.is_some_and(|checkpoint| {
                is_pattern(&pattern) && checkpoint.patterns.contains(&pattern)
            });
            let start = if is_known {
                Start::Beginning
            } else {
                follow.settings.start
            };
            for path in follow.matches(&pattern) {
                let progress = checkpoint.and_then(|checkpoint| checkpoint.of(&path));
                follow.add(&path, start, progress)?;
            }
        }
        Ok(follow)
    }

    fn add(&mut self, path: &Path, start: Start, progress: Option<&Progress>) -> Result<()> {
        let tail = Tail::open(
            path,
            start,
            self.settings.limits,
            progress,
            Arc::clone(&self.counters),
        )?;
        self.tails.push((tail, false));
        Ok(())
    }

    /// The logs that are followed.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.tails.iter().map(|(tail, _)| tail.path())
    }

    /// How far the reading of each has come.
    #[must_use]
    pub fn progress(&self) -> Vec<Progress> {
        self.tails.iter().map(|(tail, _)| tail.progress()).collect()
    }

    /// Bytes that are there and not read.
    #[must_use]
    pub fn backlog(&self) -> u64 {
        self.tails.iter().map(|(tail, _)| tail.backlog()).sum()
    }

    /// Up to `limit` bytes of the log whose turn it is, of those that have something. One that cannot be read holds up no
    /// other; that is said once, and tried again.
    pub fn read(&mut self, limit: usize, now: Duration) -> Option<Found> {
        for _ in 0..self.tails.len() {
            self.next = (self.next + 1) % self.tails.len();
            let (tail, failing) = &mut self.tails[self.next];
            match tail.read(limit, now) {
                Ok(Some(piece)) => {
                    *failing = false;
                    return Some(Found {
                        piece,
                        progress: tail.progress(),
                    });
                }
                Ok(None) => *failing = false,
                Err(problem) if !std::mem::replace(failing, true) => error!("{problem:#}"),
                Err(_) => {}
            }
        }
        None
    }

    /// Looks for logs that have come to the patterns, and lets go of those that are gone; says which have come.
    pub fn look(&mut self, now: Duration) -> Vec<PathBuf> {
        if now.saturating_sub(self.looked) < LOOK {
            return Vec::new();
        }
        self.looked = now;
        let named: BTreeSet<PathBuf> = self.settings.logs.iter().cloned().collect();
        self.tails
            .retain(|(tail, _)| named.contains(tail.path()) || !tail.is_over());
        let mut come = Vec::new();
        for pattern in named.iter().filter(|pattern| is_pattern(pattern)) {
            for path in self.matches(pattern) {
                // A log that was renamed is the same log.
                let id = fs::metadata(&path).map(|metadata| FileId::of(&metadata));
                if id.is_ok_and(|id| self.tails.iter().any(|(tail, _)| tail.knows(id))) {
                    continue;
                }
                match self.add(&path, Start::Beginning, None) {
                    Ok(()) => {
                        info!("{} is new: reading it from its beginning", path.display());
                        come.push(path);
                    }
                    Err(problem) => warn!("{problem:#}"),
                }
            }
        }
        come
    }

    /// Logs that a pattern stands for and that are not followed yet. A plain path stands for itself, be it there or not.
    fn matches(&mut self, pattern: &Path) -> Vec<PathBuf> {
        let followed =
            |path: &Path, tails: &[(Tail, bool)]| tails.iter().any(|(tail, _)| tail.path() == path);
        if !is_pattern(pattern) {
            let path = pattern.to_path_buf();
            return if followed(&path, &self.tails) {
                Vec::new()
            } else {
                vec![path]
            };
        }
        let mut logs: Vec<PathBuf> = matches(pattern)
            .into_iter()
            .filter(|path| !followed(path, &self.tails))
            .collect();
        let room = MAX_LOGS.saturating_sub(self.tails.len());
        if logs.len() > room {
            if !std::mem::replace(&mut self.too_many, true) {
                warn!(
                    "{} matches {} logs more than the {MAX_LOGS} that are followed: they are left out; make the pattern narrower",
                    pattern.display(),
                    logs.len() - room
                );
            }
            logs.truncate(room);
        }
        logs
    }
}

/// Does it stand for several files?
#[must_use]
pub fn is_pattern(path: &Path) -> bool {
    path.to_string_lossy().contains(['*', '?', '['])
}

/// The logs that patterns stand for now; a plain path stands for itself, be it there or not.
#[must_use]
pub fn logs(patterns: &[PathBuf]) -> Vec<PathBuf> {
    let each = |pattern: &PathBuf| {
        if is_pattern(pattern) {
            matches(pattern)
        } else {
            vec![pattern.clone()]
        }
    };
    let all: BTreeSet<PathBuf> = patterns.iter().flat_map(each).collect();
    all.into_iter().collect()
}

/// Those of the patterns that stand for no log now.
pub fn unmatched(patterns: &[PathBuf]) -> impl Iterator<Item = &Path> {
    patterns
        .iter()
        .map(PathBuf::as_path)
        .filter(|pattern| is_pattern(pattern) && matches(pattern).is_empty())
}

/// Files that match a pattern, without rotated ones: what is called like another match with something after it, or packed.
fn matches(pattern: &Path) -> Vec<PathBuf> {
    let all: Vec<PathBuf> = glob::glob(&pattern.to_string_lossy())
        .into_iter()
        .flatten()
        .flatten()
        .filter(|path| path.is_file() && Packing::of(path).is_none())
        .collect();
    let names: BTreeSet<&Path> = all.iter().map(PathBuf::as_path).collect();
    let is_rotation = |path: &&PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| {
            rotated::logs_of(name).any(|log| names.contains(path.with_file_name(log).as_path()))
        })
    };
    all.iter()
        .filter(|path| !is_rotation(path))
        .cloned()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_of_rotated_logs_alone_stands_for_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("a.json"), "").unwrap();
        fs::write(path("a.json.1"), "").unwrap();
        fs::write(path("b.log.gz"), "").unwrap();
        let patterns = ["*.json", "*.log*", "[x]", "not-there.json"].map(path);
        let unmatched: Vec<_> = unmatched(&patterns).collect();
        // A plain path stands for itself.
        assert_eq!(unmatched, [&patterns[1], &patterns[2]]);
        assert_eq!(logs(&patterns), [path("a.json"), path("not-there.json")]);
    }
}
