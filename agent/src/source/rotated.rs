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

/// The file that a position was said of, where that stands, under the name that it has after a rotation.
pub(super) fn find_plain(log: &Path, position: &Position) -> Option<Reader> {
    let same = |path: &Path| {
        let reader = Reader::resume(path, position).ok()??;
        (reader.id == position.file).then_some(reader)
    };
    // Most often it is where it was: a link has been switched to another.
    same(&position.path).or_else(|| {
        let beside = beside(log, &position.path);
        let mut plain = beside
            .iter()
            .filter(|(path, ..)| Packing::of(path).is_none());
        let (path, ..) = plain.find(|(_, id, _)| *id == position.file)?;
        same(path)
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
    let (packed, plain): (Vec<_>, Vec<_>) = beside(log, &position.path)
        .into_iter()
        .partition(|(path, ..)| Packing::of(path).is_some());
    let is_log = |path: &PathBuf| path.canonicalize().ok() == log.canonicalize().ok();
    let copies = plain.iter().map(|(path, ..)| path);
    let copy = copies
        .filter(|path| is_rotation(path, log, &position.path) && !is_log(path))
        .find_map(|path| Reader::resume(path, position).ok().flatten());
    copy.or_else(|| {
        // Packing keeps the time of the last line, or has a later one.
        let mut packed: Vec<_> = packed
            .into_iter()
            .filter(|(path, _, modified)| {
                is_rotation(path, log, &position.path) && *modified >= position.modified
            })
            .collect();
        packed.sort_by_key(|(.., modified)| *modified);
        let mut tried = packed.iter().take(MAX_UNPACKED);
        tried.find_map(|(path, ..)| Reader::resume(path, position).ok().flatten())
    })
}

/// What was written and rotated away entirely since a file was last read: oldest first, without those that are known, and
/// without copies of them.
pub(super) fn since(
    log: &Path,
    last: &Position,
    known: &[&Reader],
    done: &[&Position],
) -> Vec<Reader> {
    let current = log.canonicalize().ok();
    let beside = beside(log, &last.path);
    let mut newer: Vec<_> = beside
        .iter()
        .filter(|(path, id, modified)| {
            // One that is being packed is still there itself.
            let is_half_packed = Packing::of(path).is_some()
                && beside
                    .iter()
                    .any(|(other, ..)| *other == path.with_extension(""));
            *modified >= last.modified
                && is_rotation(path, log, &last.path)
                && path.canonicalize().ok() != current
                && !is_half_packed
                && !known.iter().any(|reader| reader.id == *id)
        })
        .collect();
    newer.sort_by_key(|(_, _, modified)| *modified);
    let heads: Vec<Vec<u8>> = known
        .iter()
        .filter_map(|reader| reader.head().ok())
        .collect();
    let open = |(path, ..): &&(PathBuf, _, _)| {
        let reader = Reader::open(path).ok()?;
        let head = reader.head().ok()?;
        let is_known = heads.contains(&head)
            || done
                .iter()
                .any(|position| position.done.is_some_and(|done| done.begins(&head)));
        (!head.is_empty() && !is_known).then_some(reader)
    };
    newer.iter().filter_map(open).collect()
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

/// The files in a log's folder, and in that of the file that it was, with when they were last written to.
fn beside(log: &Path, former: &Path) -> Vec<(PathBuf, FileId, SystemTime)> {
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
        Some((path, FileId::of(&metadata), metadata.modified().ok()?))
    };
    entries.filter_map(file).collect()
}

#[cfg(test)]
mod tests {
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
}
