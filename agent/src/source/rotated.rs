//! Finds what a log has become: the files that were rotated away from its path, as they are called now.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::SystemTime,
};

use super::{
    checkpoint::{FileId, Position},
    packed::Packing,
    reader::Reader,
};

/// A rotated log that is compressed has to be unpacked up to where the reading stood: so many of them are tried.
const MAX_UNPACKED: usize = 4;
/// A folder is looked at anew so often while it changes under the look.
const MAX_LOOKS: usize = 50;

/// A file of the folder: what it is called now, and when it was last written to.
#[derive(Debug)]
struct Entry {
    path: PathBuf,
    id: FileId,
    modified: SystemTime,
    /// It is called like a rotation of the log.
    is_rotation: bool,
}

/// The file that a position was said of, where that stands, under the name that it has after a rotation.
pub(super) fn find_plain(log: &Path, position: &Position) -> Option<Reader> {
    let same = |path: &Path| {
        let reader = Reader::resume(path, position).ok()??;
        (reader.id == position.file).then_some(reader)
    };
    // Most often it is where it was: a link has been switched to another.
    same(&position.path).or_else(|| {
        let among = |beside: &[Entry]| {
            let mut plain = beside
                .iter()
                .filter(|entry| Packing::of(&entry.path).is_none());
            same(&plain.find(|entry| entry.id == position.file)?.path)
        };
        steadily(log, &position.path, among, Option::is_some)
    })
}

/// The same, or else a copy of it, or what it was packed to.
pub(super) fn find(log: &Path, position: &Position) -> Option<Reader> {
    if let Some(reader) = find_plain(log, position) {
        return Some(reader);
    }
    // Every file begins with nothing.
    if position.offset == 0 {
        return None;
    }
    let is_log = |path: &Path| path.canonicalize().ok() == log.canonicalize().ok();
    let resume = |entry: &Entry| Reader::resume(&entry.path, position).ok().flatten();
    let among = |beside: &[Entry]| {
        let (mut packed, plain): (Vec<_>, Vec<_>) = beside
            .iter()
            .filter(|entry| entry.is_rotation && !is_log(&entry.path))
            .partition(|entry| Packing::of(&entry.path).is_some());
        plain.into_iter().find_map(resume).or_else(|| {
            // Packing keeps the time of the last line, or has a later one.
            packed.retain(|entry| entry.modified >= position.modified);
            packed.sort_by_key(|entry| entry.modified);
            packed.into_iter().take(MAX_UNPACKED).find_map(resume)
        })
    };
    steadily(log, &position.path, among, Option::is_some)
}

/// What was written and rotated away entirely since a file was last read: oldest first, without those that are known, and
/// without copies of them.
pub(super) fn since(
    log: &Path,
    last: &Position,
    known: &[&Reader],
    done: &[&Position],
) -> Vec<Reader> {
    let open = |entry: &Entry| {
        let reader = Reader::open(&entry.path).ok()?;
        let head = reader.head().ok()?;
        (!head.is_empty()).then_some((reader, head))
    };
    let is_done = |head: &[u8]| {
        let mut done = done.iter().filter_map(|position| position.done);
        done.any(|done| done.begins(head))
    };
    let among = |beside: &[Entry]| {
        let current = log.canonicalize().ok();
        let mut newer: Vec<_> = beside
            .iter()
            .filter(|entry| {
                let path = &entry.path;
                // One that is being packed is still there itself.
                let is_half_packed = Packing::of(path).is_some()
                    && beside
                        .iter()
                        .any(|other| other.path == path.with_extension(""));
                entry.modified >= last.modified
                    && entry.is_rotation
                    && path.canonicalize().ok() != current
                    && !is_half_packed
                    && !known.iter().any(|reader| reader.id == entry.id)
            })
            .collect();
        newer.sort_by_key(|entry| entry.modified);
        let opened: Vec<_> = newer.into_iter().filter_map(open).collect();
        // Only now: a file that was just begun when the look began can have been packed since.
        let heads: Vec<_> = known
            .iter()
            .filter_map(|reader| reader.head().ok())
            .collect();
        let unknown = opened
            .into_iter()
            .filter(|(_, head)| !heads.contains(head) && !is_done(head));
        unknown.map(|(reader, _)| reader).collect()
    };
    steadily(log, &last.path, among, |_| false)
}

/// Looks for something among the files beside a log. A rotation renames one after the other: who lists the folder meanwhile
/// can miss a file under its old name and under its new one, and open another under the name that it was listed with. So
/// what was found counts when the folder is the same after the look, or when it `is_certain` by itself. A folder that
/// is never at rest has the last look's answer.
fn steadily<T>(
    log: &Path,
    former: &Path,
    look: impl Fn(&[Entry]) -> T,
    is_certain: impl Fn(&T) -> bool,
) -> T {
    let mut seen = beside(log, former);
    for _ in 1..MAX_LOOKS {
        let found = look(&seen);
        if is_certain(&found) {
            return found;
        }
        let now = beside(log, former);
        // Whatever else comes and goes there is none of our business.
        let rotations = |files: &[Entry]| -> Vec<(PathBuf, FileId)> {
            let rotations = files.iter().filter(|file| file.is_rotation);
            rotations.map(|file| (file.path.clone(), file.id)).collect()
        };
        if rotations(&seen) == rotations(&now) {
            return found;
        }
        seen = now;
    }
    look(&seen)
}

/// Is a file called like a log that was rotated away: `access.log.1`, `access.log-20261122.gz`, `access-20261122.log`?
fn is_rotation(path: &Path, log: &Path, former: &Path) -> bool {
    let name = |path: &Path| Some(path.file_name()?.to_str()?.to_owned());
    let Some(rotated) = name(path) else {
        return false;
    };
    [log, former]
        .into_iter()
        .filter_map(name)
        .any(|log| is_called_after(&rotated, &log))
}

/// See [`is_rotation`]; of file names.
pub(super) fn is_called_after(rotated: &str, log: &str) -> bool {
    logs_of(rotated).any(|name| name == log)
}

/// What a log may be called of which this is a rotation: a number or a date is put behind its name, or, by logrotate's
/// `extension`, before its extension. `access-2.log` is no rotation of `access.log`, but another log.
pub(super) fn logs_of(rotated: &str) -> impl Iterator<Item = String> {
    let plain = [".gz", ".zst", ".xz"]
        .iter()
        .find_map(|packed| rotated.strip_suffix(packed))
        .unwrap_or(rotated);
    let behind = before_number(plain).map(str::to_owned);
    let inside = plain
        .rsplit_once('.')
        .and_then(|(stem, extension)| Some(format!("{}.{extension}", before_number(stem)?)));
    behind.into_iter().chain(inside)
}

/// What stands before `.7`, `-20261122` or `-2026-11-22`.
fn before_number(name: &str) -> Option<&str> {
    let before = name.trim_end_matches(|c: char| c.is_ascii_digit() || c == '-');
    let number = &name[before.len()..];
    let digits = number.bytes().filter(u8::is_ascii_digit).count();
    if let Some(before) = before.strip_suffix('.') {
        return (digits == number.len() && digits > 0 || digits >= 8).then_some(before);
    }
    (number.starts_with('-') && digits >= 8).then_some(before)
}

/// The files in a log's folder, and in that of the file that it was, by their names.
fn beside(log: &Path, former: &Path) -> Vec<Entry> {
    let mut folders: Vec<&Path> = [log, former].into_iter().filter_map(Path::parent).collect();
    folders.dedup();
    let entries = folders
        .into_iter()
        .filter_map(|folder| fs::read_dir(folder).ok())
        .flatten();
    let file = |entry: io::Result<fs::DirEntry>| {
        let path = entry.ok()?.path();
        // No pipe, which would keep us waiting; no link, since what it leads to lies somewhere itself.
        let metadata = fs::symlink_metadata(&path)
            .ok()
            .filter(fs::Metadata::is_file)?;
        Some(Entry {
            id: FileId::of(&metadata),
            modified: metadata.modified().ok()?,
            is_rotation: is_rotation(&path, log, former),
            path,
        })
    };
    let mut files: Vec<Entry> = entries.filter_map(file).collect();
    files.sort_unstable_by(|a, b| a.path.cmp(&b.path));
    files
}

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeSet,
        sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    };

    use super::*;

    #[test]
    fn rotations_are_known_by_their_names() {
        let log = "access.json";
        for rotated in [
            "access.json.1",
            "access.json.2.gz",
            "access.json-20261122",
            "access.json-20261122.zst",
            "access-20261122.json",
            "access-20261122.json.gz",
            "access.1.json",
        ] {
            assert!(is_called_after(rotated, log), "{rotated}");
        }
        for other in [
            "access.json",
            "access.jsonl",
            "access-shop.json",
            "access-2.json",
            "access_8443.json",
            "access.json.shop",
            "access.json-2",
            "access.json.extract-1",
            "error.json.1",
            "other-access.json.1",
            "access.log.1",
        ] {
            assert!(!is_called_after(other, log), "{other}");
        }
    }

    #[test]
    fn what_is_renamed_under_the_look_is_found_once_all_the_same() {
        const FILES: usize = 60;
        let folder = tempfile::tempdir().unwrap();
        let name = |number: usize| folder.path().join(format!("log.{number}"));
        let log = folder.path().join("log");
        fs::write(&log, "now\n").unwrap();
        let current = Reader::open(&log).unwrap();
        let last = Position {
            modified: SystemTime::UNIX_EPOCH,
            ..current.position()
        };
        for number in 1..=FILES {
            fs::write(name(number), format!("{number}\n")).unwrap();
        }
        let (is_over, looks) = (AtomicBool::new(false), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            // As logrotate does: the last one first, each to the next number. Between two rotations a look comes to
            // its end, which most often began before them.
            scope.spawn(|| {
                for first in 1.. {
                    for number in (first..first + FILES).rev() {
                        fs::rename(name(number), name(number + 1)).unwrap();
                    }
                    let before = looks.load(Ordering::Relaxed);
                    while looks.load(Ordering::Relaxed) == before {
                        if is_over.load(Ordering::Relaxed) {
                            return;
                        }
                        std::thread::yield_now();
                    }
                }
            });
            let found: Vec<(usize, usize)> = (0..100)
                .map(|_| {
                    let found = since(&log, &last, &[&current], &[]);
                    let heads: BTreeSet<_> = found.iter().map(|file| file.head().ok()).collect();
                    looks.fetch_add(1, Ordering::Relaxed);
                    (found.len(), heads.len())
                })
                .collect();
            is_over.store(true, Ordering::Relaxed);
            assert_eq!(found, vec![(FILES, FILES); 100]);
        });
    }
}
