//! Follows one log by bytes: through rotation, truncation and half-written lines, none lost and none invented.

use std::{
    collections::VecDeque,
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result};
use tracing::{info, warn};

use super::{
    Counters, Limits, Start,
    checkpoint::{FileId, Fingerprint, Position, Progress},
    reader::{Piece, Reader, Ripe},
    rotated,
};

/// A rotated file is read on until nothing has come for so long: Nginx writes to it until it is told to reopen.
const LINGER: Duration = Duration::from_secs(30);
/// Rotated files that are read on at a time; the oldest is given up for a further one.
const MAX_LINGERING: usize = 8;
/// So many bytes are of one file alone.
const TELLING: u64 = 64;
/// Files that were given up and would be known again after a restart, should anything have come to them.
const MAX_DONE: usize = 8;

/// The file at a path, and the files that were there before and are still written to.
#[derive(Debug)]
pub struct Tail {
    path: PathBuf,
    limits: Limits,
    current: Option<Reader>,
    /// Oldest first, each with the time at which it last gave something, once it was looked at.
    lingering: VecDeque<(Reader, Option<Duration>)>,
    /// Where those stand that were given up, oldest first.
    done: VecDeque<Position>,
    /// The file that was at the path before: what was rotated away unseen came after it.
    last: Option<Position>,
    /// When the newest of those was written to: what is older was found already. While a look takes its time, what it finds can be
    /// newer than the file at the path.
    found: Option<SystemTime>,
    counters: Arc<Counters>,
}

impl Tail {
    /// Opens the file at `path`, if it is there yet: where `progress` says, or else where `start` says. A file that
    /// appears later is read from its beginning. What was rotated away meanwhile is read to its end first.
    ///
    /// # Errors
    /// When the file is there and cannot be read.
    pub fn open(
        path: &Path,
        start: Start,
        limits: Limits,
        progress: Option<&Progress>,
        counters: Arc<Counters>,
    ) -> Result<Self> {
        let cannot_read = || {
            format!(
                "cannot read {}: give the agent the right to",
                path.display()
            )
        };
        let current = match Reader::open(path) {
            Ok(reader) => Some(reader),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error).with_context(cannot_read),
        };
        let mut tail = Self {
            path: path.to_owned(),
            limits,
            current,
            lingering: VecDeque::new(),
            done: VecDeque::new(),
            last: None,
            found: None,
            counters,
        };
        match (progress, start, &mut tail.current) {
            (Some(progress), ..) => tail.resume(progress).with_context(cannot_read)?,
            (None, Start::End, Some(current)) => {
                current.start_at_end().with_context(cannot_read)?;
            }
            _ => {}
        }
        Ok(tail)
    }

    /// Goes on where a former run ended.
    fn resume(&mut self, progress: &Progress) -> io::Result<()> {
        // From when on files may have been missed.
        let mut since = progress.files.last();
        for position in progress.files.iter().rev() {
            // Devices are numbered anew at a boot; what was read tells.
            if let Some(current) = &mut self.current
                && !current.is_resumed()
                && position.done.is_none()
                && (current.id == position.file || position.before.bytes() >= TELLING)
                && current.is_at(position)
            {
                current.go_to(position)?;
                // It has never left its place: nothing was rotated away.
                since = since.filter(|since| since.file != position.file || position.offset == 0);
            } else if position.done.is_some() {
                // Packed, it is at its end, and not unpacked for that.
                match rotated::find_plain(&self.path, position) {
                    Some(rotated) if rotated.backlog() > 0 => {
                        self.lingering.push_front((rotated, None));
                    }
                    _ if position.done == Some(Fingerprint::default()) => {}
                    _ => self.done.push_front(position.clone()),
                }
            } else if let Some(rotated) = rotated::find(&self.path, position) {
                self.lingering.push_front((rotated, None));
            } else {
                since = Some(position);
                // A file of which nothing was read is not known by what it holds.
                if position.offset > 0 {
                    warn!(
                        "a file that {} was before is gone: what was written to it after the last stop is lost",
                        self.path.display()
                    );
                }
            }
        }
        // Several rotations may have gone by.
        if let Some(since) = since {
            self.look_for_missed(since);
            self.last = Some(since.clone());
        }
        Ok(())
    }

    /// Between two looks a log can be rotated more than once: what was written and rotated away unseen is read, too.
    /// Says how many files that were.
    fn look_for_missed(&mut self, last: &Position) -> u64 {
        let lingering = self.lingering.iter().map(|(reader, _)| reader);
        let known: Vec<&Reader> = lingering.chain(&self.current).collect();
        let done: Vec<&Position> = self.done.iter().collect();
        let last = Position {
            modified: self
                .found
                .map_or(last.modified, |found| found.max(last.modified)),
            ..last.clone()
        };
        let missed = rotated::since(&self.path, &last, &known, &done);
        self.found = missed.iter().map(Reader::modified).max().or(self.found);
        for reader in &missed {
            info!(
                "{} was rotated away unseen: reading it, too",
                reader.path().display()
            );
        }
        let found = missed.len() as u64;
        self.lingering
            .extend(missed.into_iter().map(|reader| (reader, None)));
        // A copy may be older than the file that was found first.
        self.lingering
            .make_contiguous()
            .sort_by_key(|(reader, _)| reader.modified());
        found
    }

    /// Reads up to `limit` bytes and returns the lines that are whole and ripe. `None`: there is nothing now; a piece without
    /// lines: something has come, but no such line. `now` is the boot clock.
    ///
    /// # Errors
    /// When the file can be seen but not read; to be tried again.
    pub fn read(&mut self, limit: usize, now: Duration, ripe: Ripe<'_>) -> Result<Option<Piece>> {
        if let Some(piece) = self.read_rotated(limit, now, ripe) {
            return Ok(Some(piece));
        }
        let cannot_read = || format!("cannot read {}", self.path.display());
        if let Some(reader) = &mut self.current {
            if reader.held().is_none() && !reader.is_as_read().with_context(cannot_read)? {
                warn!(
                    "{} was truncated: reading it from its beginning",
                    self.path.display()
                );
                self.counters.truncations.fetch_add(1, Ordering::Relaxed);
                // Who truncates a log has copied it before; what was not read yet is there.
                let mut position = reader.position();
                position.rewind = position.offset;
                reader.begin_anew();
                if let Some(copy) = rotated::find(&self.path, &position)
                    && copy.id != position.file
                {
                    self.lingering.push_back((copy, Some(now)));
                }
                self.look_for_missed(&position);
                return Ok(Some(Piece::default()));
            }
            let piece = reader.read(limit, &self.limits, now, &self.counters, ripe);
            if let Some(piece) = piece.with_context(cannot_read)? {
                return Ok(Some(piece));
            }
        }
        let has_moved = self.follow(now)?;
        Ok(has_moved.then(Piece::default))
    }

    /// What comes from files that were rotated away. One that stays silent is given up.
    fn read_rotated(&mut self, limit: usize, now: Duration, ripe: Ripe<'_>) -> Option<Piece> {
        let mut index = 0;
        let mut surplus = self.lingering.len().saturating_sub(MAX_LINGERING);
        while let Some((reader, last)) = self.lingering.get_mut(index) {
            let piece = reader.read(limit, &self.limits, now, &self.counters, ripe);
            // One that cannot be read is given up in time, as one that is silent is; the log itself goes on.
            let piece = piece.unwrap_or_else(|error| {
                warn!("cannot read a rotated log on: {error}");
                None
            });
            if let Some(piece) = piece {
                *last = Some(now);
                return Some(piece);
            }
            let silent = now.saturating_sub(*last.get_or_insert(now));
            // Nobody writes to a packed one.
            if silent < LINGER && surplus == 0 && !reader.is_packed() {
                index += 1;
                continue;
            }
            surplus = surplus.saturating_sub(1);
            if let Some((mut reader, _)) = self.lingering.remove(index) {
                let words = reader.last_words(&self.limits);
                self.give_up(&reader);
                if words.is_some() {
                    return words;
                }
            }
        }
        None
    }

    /// Another file takes the log's place, or none.
    fn linger(&mut self, old: Reader, now: Duration) {
        self.last = Some(old.position());
        self.lingering.push_back((old, Some(now)));
    }

    fn give_up(&mut self, reader: &Reader) {
        let position = reader.position();
        if position.offset == 0 {
            return;
        }
        if self.done.len() >= MAX_DONE {
            self.done.pop_front();
        }
        let head = reader.head().unwrap_or_default();
        self.done.push_back(Position {
            done: Some(Fingerprint::of_head(&head)),
            ..position
        });
    }

    /// Where to go on once all lines that were returned so far are dealt with.
    #[must_use]
    pub fn progress(&self) -> Progress {
        let lingering = self.lingering.iter().map(|(reader, _)| reader);
        let open = lingering.chain(&self.current).map(Reader::position);
        let mut files: Vec<Position> = self.done.iter().cloned().chain(open).collect();
        // Without a file at the path, from when on the next one may be missed.
        if let Some(last) = self.last.as_ref().filter(|_| self.current.is_none())
            && !files.iter().any(|position| position.file == last.file)
        {
            files.push(Position {
                done: Some(Fingerprint::default()),
                ..last.clone()
            });
        }
        Progress {
            log: self.path.clone(),
            files,
        }
    }

    /// The next lines, if they were read and were not ripe.
    #[must_use]
    pub fn held(&self) -> Option<&[u8]> {
        let lingering = self.lingering.iter().map(|(reader, _)| reader);
        lingering.chain(&self.current).find_map(Reader::held)
    }

    /// Bytes that are there and not handed on.
    #[must_use]
    pub fn backlog(&self) -> u64 {
        let lingering = self.lingering.iter().map(|(reader, _)| reader);
        lingering.chain(&self.current).map(Reader::backlog).sum()
    }

    /// The log's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Is the log gone, and everything read that was written to it?
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.current.is_none() && self.lingering.is_empty()
    }

    /// Is this one of the files that are being read, or were?
    pub(super) fn knows(&self, file: FileId) -> bool {
        let lingering = self.lingering.iter().map(|(reader, _)| reader);
        lingering
            .chain(&self.current)
            .any(|reader| reader.id == file)
            || self.done.iter().any(|position| position.file == file)
    }

    /// The current file is read to its end: is it still the one at the path? Says whether another has taken its place.
    fn follow(&mut self, now: Duration) -> Result<bool> {
        match fs::metadata(&self.path) {
            Ok(metadata)
                if self
                    .current
                    .as_ref()
                    .is_some_and(|reader| reader.id == FileId::of(&metadata)) =>
            {
                Ok(false)
            }
            Ok(_) => {
                let fresh = match Reader::open(&self.path) {
                    // Gone again: the next look sees what comes.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
                    opened => {
                        opened.with_context(|| format!("cannot open {}", self.path.display()))?
                    }
                };
                info!(
                    "{} is a new file: reading it from its beginning",
                    self.path.display()
                );
                if let Some(old) = self.current.replace(fresh) {
                    self.counters.rotations.fetch_add(1, Ordering::Relaxed);
                    self.linger(old, now);
                }
                if let Some(last) = self.last.take() {
                    let missed = self.look_for_missed(&last);
                    self.counters.rotations.fetch_add(missed, Ordering::Relaxed);
                }
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // Between a rename and the creation of its successor there is no file, and the old one is read on. A deleted
                // one would take up the disk for as long as we hold it.
                if self.current.as_ref().is_some_and(Reader::is_deleted)
                    && let Some(old) = self.current.take()
                {
                    self.linger(old, now);
                }
                Ok(false)
            }
            Err(error) => {
                Err(error).with_context(|| format!("cannot look at {}", self.path.display()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Write as _, time::Duration};

    use proptest::prelude::*;

    use super::*;

    const LIMITS: Limits = Limits {
        max_line: 40,
        rewind: Duration::from_secs(20),
    };
    /// File times are set by hand: those of the kernel have the grain of its tick.
    const EPOCH: Duration = Duration::from_secs(1_700_000_000);

    const ALL: Ripe<'_> = &|lines| lines.len();

    struct Bench {
        folder: tempfile::TempDir,
        tail: Tail,
        now: Duration,
    }

    fn open(path: &Path, start: Start, progress: Option<&Progress>) -> Tail {
        Tail::open(path, start, LIMITS, progress, Arc::default()).unwrap()
    }

    fn text(piece: &Piece) -> String {
        String::from_utf8(piece.bytes.clone()).unwrap()
    }

    impl Bench {
        fn new(start: Start, before: &str) -> Self {
            let folder = tempfile::tempdir().unwrap();
            if !before.is_empty() {
                fs::write(folder.path().join("log"), before).unwrap();
            }
            let tail = open(&folder.path().join("log"), start, None);
            Self {
                folder,
                tail,
                now: Duration::from_secs(1),
            }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.folder.path().join(name)
        }

        fn append(&self, name: &str, text: &str) {
            let mut file = File::options()
                .append(true)
                .create(true)
                .open(self.path(name))
                .unwrap();
            file.write_all(text.as_bytes()).unwrap();
            self.stamp(&file);
        }

        fn stamp(&self, file: &File) {
            file.set_modified(SystemTime::UNIX_EPOCH + EPOCH + self.now)
                .unwrap();
        }

        /// As `logrotate` does: what is written between the copy and the truncation is lost to everybody.
        fn copy_and_truncate(&self, copy: &str) {
            fs::copy(self.path("log"), self.path(copy)).unwrap();
            self.stamp(&File::options().append(true).open(self.path(copy)).unwrap());
            self.stamp(&File::create(self.path("log")).unwrap());
        }

        fn pack(&self, name: &str, packing: &str) {
            let plain = fs::read(self.path(name)).unwrap();
            let modified = fs::metadata(self.path(name)).unwrap().modified().unwrap();
            let packed = match packing {
                "gz" => {
                    let mut gzip =
                        flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                    gzip.write_all(&plain).unwrap();
                    gzip.finish().unwrap()
                }
                "zst" => ruzstd::encoding::compress_to_vec(
                    plain.as_slice(),
                    ruzstd::encoding::CompressionLevel::Fastest,
                ),
                _ => panic!("{packing}"),
            };
            let mut file = File::create(self.path(&format!("{name}.{packing}"))).unwrap();
            file.write_all(&packed).unwrap();
            file.set_modified(modified).unwrap();
            fs::remove_file(self.path(name)).unwrap();
        }

        /// Everything that there is to read, in small pieces, without what is read again.
        fn drain(&mut self) -> String {
            let mut all = String::new();
            while let Some(piece) = self.tail.read(7, self.now, ALL).unwrap() {
                if !piece.again {
                    all += &text(&piece);
                }
            }
            all
        }

        fn restart(&mut self) {
            let progress = self.tail.progress();
            self.tail = open(&self.path("log"), Start::End, Some(&progress));
        }
    }

    #[test]
    fn a_half_written_line_waits_for_its_end() {
        let mut bench = Bench::new(Start::Beginning, "one\ntw");
        assert_eq!(bench.drain(), "one\n");
        bench.append("log", "o\nthree");
        assert_eq!(bench.drain(), "two\n");
        bench.restart();
        bench.append("log", "\n");
        assert_eq!(
            bench.drain(),
            "three\n",
            "a restart in the middle of a line begins it anew"
        );
    }

    #[test]
    fn from_the_end_means_from_the_next_line() {
        let mut bench = Bench::new(Start::End, "old\nhalf");
        bench.append("log", " old\nnew\n");
        assert_eq!(bench.drain(), "new\n");
    }

    #[test]
    fn a_file_that_comes_later_is_read_whole() {
        let mut bench = Bench::new(Start::End, "");
        assert_eq!(bench.drain(), "");
        bench.append("log", "first\n");
        assert_eq!(bench.drain(), "first\n");
    }

    #[test]
    fn a_rotated_file_is_read_on_while_it_is_written_to() {
        let mut bench = Bench::new(Start::Beginning, "one\n");
        assert_eq!(bench.drain(), "one\n");
        bench.append("log", "two\n");
        fs::rename(bench.path("log"), bench.path("log.1")).unwrap();
        bench.append("log", "four\n");
        bench.append("log.1", "thr");
        assert_eq!(bench.drain(), "two\nfour\n");
        bench.append("log.1", "ee\n");
        assert_eq!(bench.drain(), "three\n");
        bench.now += LINGER;
        assert_eq!(bench.drain(), "");
        assert!(bench.tail.lingering.is_empty());
        assert_eq!(bench.tail.counters.rotations.load(Ordering::Relaxed), 1);
        // Should anything have come to it after all, a restart finds it.
        bench.append("log.1", "late\n");
        bench.restart();
        assert_eq!(bench.drain(), "late\n");
    }

    #[test]
    fn rotations_while_the_agent_is_down_lose_nothing() {
        let mut bench = Bench::new(Start::Beginning, "one\ntwo\n");
        assert_eq!(bench.drain(), "one\ntwo\n");
        bench.now += Duration::from_secs(1);
        bench.append("log", "three\n");
        fs::rename(bench.path("log"), bench.path("log.1")).unwrap();
        bench.now += Duration::from_secs(1);
        bench.append("log", "four\n");
        bench.restart();
        assert_eq!(bench.drain(), "three\nfour\n");
        bench.restart();
        assert_eq!(bench.drain(), "");
        // Several of them, packed.
        for (name, packing) in [("log.8", "gz"), ("log.9", "zst")] {
            bench.now += Duration::from_secs(1);
            bench.append("log", &format!("{name}\n"));
            fs::rename(bench.path("log"), bench.path(name)).unwrap();
            bench.pack(name, packing);
        }
        bench.append("log", "end\n");
        bench.restart();
        assert_eq!(bench.drain(), "log.8\nlog.9\nend\n");
        bench.restart();
        assert_eq!(bench.drain(), "");
    }

    #[test]
    fn a_file_copied_and_truncated_is_read_from_its_beginning() {
        let mut bench = Bench::new(Start::Beginning, "one\ntwo\n");
        assert_eq!(bench.drain(), "one\ntwo\n");
        File::create(bench.path("log")).unwrap();
        bench.append("log", "new\n");
        assert_eq!(bench.drain(), "new\n");
        assert_eq!(bench.tail.counters.truncations.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_file_truncated_and_grown_past_its_old_length_is_read_from_its_beginning() {
        let mut bench = Bench::new(Start::Beginning, "one\ntwo\n");
        assert_eq!(bench.drain(), "one\ntwo\n");
        File::create(bench.path("log")).unwrap();
        bench.append("log", "three\nfour\nfive\n");
        assert_eq!(bench.drain(), "three\nfour\nfive\n");
        // Half a line was read of the file as it was before.
        bench.append("log", "si");
        assert_eq!(bench.drain(), "");
        File::create(bench.path("log")).unwrap();
        bench.append("log", "three\nfour\nfive\nseven\n");
        assert_eq!(bench.drain(), "three\nfour\nfive\nseven\n");
        assert_eq!(bench.tail.counters.truncations.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn what_was_not_read_before_a_truncation_is_read_from_the_copy() {
        let mut bench = Bench::new(Start::Beginning, "one\n");
        assert_eq!(bench.drain(), "one\n");
        bench.append("log", "two\nthree\n");
        bench.copy_and_truncate("log.1");
        bench.append("log", "four\n");
        assert_eq!(bench.drain(), "two\nthree\nfour\n");
        // And while nobody was there to see it.
        bench.now += Duration::from_secs(1);
        bench.append("log", "five\n");
        bench.copy_and_truncate("log.2");
        bench.append("log", "six, and longer than before\n");
        bench.restart();
        assert_eq!(bench.drain(), "five\nsix, and longer than before\n");
        bench.restart();
        assert_eq!(bench.drain(), "");
    }

    #[test]
    fn a_new_file_with_an_old_one_s_inode_is_a_new_file() {
        let mut bench = Bench::new(Start::Beginning, "one\ntwo\n");
        assert_eq!(bench.drain(), "one\ntwo\n");
        // The same file to the kernel, whatever was in it.
        fs::write(bench.path("log"), "three\nfour\nfive\n").unwrap();
        bench.restart();
        assert_eq!(bench.drain(), "three\nfour\nfive\n");
    }

    #[test]
    fn a_link_that_is_switched_leads_to_the_new_file_and_back_to_what_was_left() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("days")).unwrap();
        let mut bench = Bench::new(Start::Beginning, "");
        let switch = |bench: &Bench, day: &str| {
            bench.append(&format!("days/{day}"), &format!("{day}\n"));
            drop(fs::remove_file(bench.path("log")));
            std::os::unix::fs::symlink(bench.path(&format!("days/{day}")), bench.path("log"))
                .unwrap();
        };
        fs::create_dir(bench.path("days")).unwrap();
        switch(&bench, "monday");
        assert_eq!(bench.drain(), "monday\n");
        switch(&bench, "tuesday");
        bench.append("days/monday", "late on monday\n");
        assert_eq!(bench.drain(), "late on monday\ntuesday\n");
        // While nobody was there to see it, and in another folder than the link's.
        bench.append("days/tuesday", "late on tuesday\n");
        switch(&bench, "wednesday");
        bench.restart();
        assert_eq!(bench.drain(), "late on tuesday\nwednesday\n");
    }

    #[test]
    fn a_deleted_log_is_read_to_its_end_and_let_go() {
        let mut bench = Bench::new(Start::Beginning, "one\n");
        assert_eq!(bench.drain(), "one\n");
        bench.append("log", "two\n");
        fs::remove_file(bench.path("log")).unwrap();
        assert_eq!(bench.drain(), "two\n");
        bench.now += LINGER;
        assert_eq!(bench.drain(), "");
        assert!(bench.tail.is_over(), "it takes up the disk no longer");
        bench.append("log", "three\n");
        assert_eq!(bench.drain(), "three\n");
    }

    #[test]
    fn a_log_that_cannot_be_read_is_said_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("loop");
        std::os::unix::fs::symlink(&path, &path).unwrap();
        let said = Tail::open(&path, Start::End, LIMITS, None, Arc::default()).unwrap_err();
        assert!(said.to_string().contains("cannot read"), "{said:#}");
        // One that would keep us waiting, too.
        let pipe = folder.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let said = Tail::open(&pipe, Start::End, LIMITS, None, Arc::default()).unwrap_err();
        assert!(format!("{said:#}").contains("no regular file"), "{said:#}");
    }

    #[test]
    fn a_line_too_long_to_be_kept_is_said_with_its_place_and_its_neighbours_stay() {
        let long = "x".repeat(LIMITS.max_line * 3);
        let mut bench = Bench::new(Start::Beginning, &format!("one\n{long}"));
        let mut cut = Vec::new();
        while let Some(piece) = bench.tail.read(7, bench.now, ALL).unwrap() {
            cut.extend(piece.cut);
        }
        assert_eq!(cut, [4]);
        // In the middle of it.
        bench.restart();
        bench.append("log", "xxx\ntwo\n");
        assert_eq!(bench.drain(), "two\n");
    }

    #[test]
    fn a_hole_in_the_file_hides_no_line() {
        let mut bench = Bench::new(Start::Beginning, "one\n");
        assert_eq!(bench.drain(), "one\n");
        // A writer that does not append goes on where it was.
        File::options()
            .write(true)
            .open(bench.path("log"))
            .unwrap()
            .set_len(10_000)
            .unwrap();
        bench.append("log", "two\n");
        let mut lines = Vec::new();
        while let Some(piece) = bench.tail.read(4096, bench.now, ALL).unwrap() {
            lines.extend(
                piece
                    .lines()
                    .map(|(at, line)| (at, String::from_utf8(line.to_vec()).unwrap())),
            );
        }
        assert_eq!(lines, [(10_000, "two".to_owned())]);
    }

    #[test]
    fn lines_are_given_with_their_places_and_without_what_is_around_them() {
        let piece = Piece {
            bytes: b"one\r\n\n  two\t\r\n\0\0three\nfour".to_vec(),
            start: 100,
            ..Piece::default()
        };
        let lines: Vec<_> = piece.lines().collect();
        assert_eq!(
            lines,
            [
                (100, &b"one"[..]),
                (106, b"two"),
                (116, b"three"),
                (122, b"four")
            ]
        );
    }

    #[test]
    fn after_a_restart_the_lines_of_the_last_moments_come_again_and_are_said_to() {
        let mut bench = Bench::new(Start::Beginning, "");
        for second in 0..60 {
            bench.append("log", &format!("{second}\n"));
            assert_eq!(bench.drain(), format!("{second}\n"));
            bench.now += Duration::from_secs(1);
        }
        bench.append("log", "60\n");
        bench.restart();
        let (mut again, mut new) = (String::new(), String::new());
        while let Some(piece) = bench.tail.read(7, bench.now, ALL).unwrap() {
            if piece.again {
                again += &text(&piece);
                // Whoever stops now has lost nothing either.
                let next = open(&bench.path("log"), Start::End, Some(&bench.tail.progress()));
                assert!(next.backlog() > 0);
            } else {
                new += &text(&piece);
            }
        }
        assert_eq!(new, "60\n");
        let again: Vec<u32> = again.lines().map(|line| line.parse().unwrap()).collect();
        assert_eq!(again.last(), Some(&59));
        assert!((20..=26).contains(&again.len()), "{again:?}");
    }

    #[test]
    fn short_new_lines_behind_a_long_old_one_are_new() {
        for length in 1..40 {
            let old = format!("{}\n", "x".repeat(length));
            let mut bench = Bench::new(Start::Beginning, &old);
            assert_eq!(bench.drain(), old);
            bench.append("log", "a\nb\nc\n");
            bench.restart();
            let mut read = [String::new(), String::new()];
            while let Some(piece) = bench.tail.read(7, bench.now, ALL).unwrap() {
                read[usize::from(piece.again)] += &text(&piece);
            }
            assert_eq!(read, ["a\nb\nc\n".to_owned(), old]);
        }
    }

    /// What happens to a log.
    #[derive(Clone, Debug)]
    enum Step {
        Write(u8),
        /// The beginning of a line; what is written next is its end.
        WriteHalf,
        /// Renamed; the writer goes on with the old file until it is told to reopen the log.
        Rename,
        Reopen,
        CopyAndTruncate,
        Delete,
        SwitchLink,
        /// The oldest file that was rotated away, while nobody writes to it.
        Pack,
        Read,
        /// So many pieces of seven bytes.
        ReadSome(u8),
        Save,
        /// Stopped and started again.
        Restart,
        /// Killed: what was read since the last saved progress is read again.
        Kill,
        Pass(u8),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            8 => (1u8..5).prop_map(Step::Write),
            2 => Just(Step::WriteHalf),
            3 => Just(Step::Rename),
            4 => Just(Step::Reopen),
            2 => Just(Step::CopyAndTruncate),
            1 => Just(Step::Delete),
            1 => Just(Step::SwitchLink),
            1 => Just(Step::Pack),
            4 => Just(Step::Read),
            4 => (1u8..5).prop_map(Step::ReadSome),
            3 => Just(Step::Save),
            1 => Just(Step::Restart),
            2 => Just(Step::Kill),
            2 => (1u8..40).prop_map(Step::Pass),
        ]
    }

    /// Interprets steps, and holds what is read against what was written.
    struct World {
        bench: Bench,
        writer: File,
        half: bool,
        /// The writer's file has another name by now.
        renamed: bool,
        /// What stands behind `log.1`, `log.2` and so on, the names of files that were rotated away.
        rotated: VecDeque<&'static str>,
        links: u32,
        lines: u32,
        written: Vec<String>,
        read: Vec<String>,
        saved: (Progress, usize),
    }

    impl World {
        fn new() -> Self {
            let bench = Bench::new(Start::Beginning, "");
            let writer = File::create_new(bench.path("log")).unwrap();
            let saved = (bench.tail.progress(), 0);
            let mut world = Self {
                bench,
                writer,
                half: false,
                renamed: false,
                rotated: VecDeque::new(),
                links: 0,
                lines: 0,
                written: Vec::new(),
                read: Vec::new(),
                saved,
            };
            world.reopen();
            // Of a log that has never been seen nobody knows what it is called after its rotation.
            world.read_all();
            world.save();
            world
        }

        /// As logrotate does: every file that was rotated away gets the next number; the first is the one to come.
        fn make_room(&mut self) -> String {
            let path = |number, ending| self.bench.path(&format!("log.{number}{ending}"));
            for (index, ending) in self.rotated.iter().enumerate().rev() {
                fs::rename(path(index + 1, ending), path(index + 2, ending)).unwrap();
            }
            self.rotated.push_front("");
            "log.1".to_owned()
        }

        fn reopen(&mut self) {
            self.finish();
            let log = self.bench.path("log");
            self.writer = File::options().append(true).create(true).open(log).unwrap();
            self.bench.stamp(&self.writer);
            self.renamed = false;
        }

        fn put(&mut self, text: &str) {
            self.writer.write_all(text.as_bytes()).unwrap();
            self.bench.stamp(&self.writer);
        }

        fn write(&mut self) {
            self.lines += 1;
            let line = format!("line {}", self.lines);
            let start = if std::mem::take(&mut self.half) { 5 } else { 0 };
            self.put(&format!("{}\n", &line[start..]));
            self.written.push(line);
        }

        fn finish(&mut self) {
            if self.half {
                self.write();
            }
        }

        /// One piece; says whether there was any.
        fn read_one(&mut self) -> bool {
            let Some(piece) = self.bench.tail.read(7, self.bench.now, ALL).unwrap() else {
                return false;
            };
            for line in text(&piece).lines() {
                if piece.again {
                    assert!(
                        self.read.contains(&line.to_owned()),
                        "{line:?} is said to come again"
                    );
                } else {
                    self.read.push(line.to_owned());
                }
            }
            true
        }

        fn read_all(&mut self) {
            while self.read_one() {}
        }

        fn save(&mut self) {
            self.saved = (self.bench.tail.progress(), self.read.len());
        }

        fn start(&mut self) {
            self.read.truncate(self.saved.1);
            self.bench.tail = open(&self.bench.path("log"), Start::End, Some(&self.saved.0));
        }

        fn take(&mut self, step: &Step) {
            self.bench.now += Duration::from_millis(100);
            match step {
                Step::Write(lines) => (0..*lines).for_each(|_| self.write()),
                Step::WriteHalf if !self.half => {
                    self.half = true;
                    self.put("line ");
                }
                Step::Rename if !self.renamed => {
                    let name = self.make_room();
                    fs::rename(self.bench.path("log"), self.bench.path(&name)).unwrap();
                    self.renamed = true;
                }
                Step::Reopen if self.renamed => self.reopen(),
                // Half a line would be in the copy, and its end in the log.
                Step::CopyAndTruncate if !self.renamed && !self.half => {
                    let name = self.make_room();
                    // A file of which nothing was read looks as if nothing had happened to it.
                    self.write();
                    self.read_all();
                    self.write();
                    self.bench.copy_and_truncate(&name);
                }
                // What is deleted is known to nobody but who has it open.
                Step::Delete if !self.renamed => {
                    self.finish();
                    self.read_all();
                    self.write();
                    fs::remove_file(self.bench.path("log")).unwrap();
                    self.read_all();
                    self.save();
                    self.reopen();
                }
                Step::SwitchLink if !self.renamed => {
                    self.links += 1;
                    let name = format!("log.{}", 1000 + self.links);
                    self.finish();
                    // Of several switches between two looks only the last can be seen.
                    self.read_all();
                    self.save();
                    drop(File::create(self.bench.path(&name)).unwrap());
                    std::os::unix::fs::symlink(self.bench.path(&name), self.bench.path("link"))
                        .unwrap();
                    if fs::symlink_metadata(self.bench.path("log"))
                        .unwrap()
                        .is_file()
                    {
                        let former = self.make_room();
                        fs::rename(self.bench.path("log"), self.bench.path(&former)).unwrap();
                    }
                    fs::rename(self.bench.path("link"), self.bench.path("log")).unwrap();
                    self.reopen();
                }
                Step::Pack => {
                    let is_plain = |index: &usize| {
                        let path = self.bench.path(&format!("log.{}", index + 1));
                        fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_file())
                    };
                    let quiet = usize::from(self.renamed)..self.rotated.len();
                    if let Some(oldest) = quiet.rev().find(is_plain) {
                        self.bench.pack(&format!("log.{}", oldest + 1), "gz");
                        self.rotated[oldest] = ".gz";
                    }
                }
                Step::Read => self.read_all(),
                Step::ReadSome(pieces) => {
                    for _ in 0..*pieces {
                        self.read_one();
                    }
                }
                Step::Save => self.save(),
                Step::Restart => {
                    self.save();
                    self.start();
                }
                Step::Kill => self.start(),
                Step::Pass(secs) => {
                    // Nginx is told to reopen before anybody gives its old file up.
                    if self.renamed {
                        self.reopen();
                    }
                    self.read_all();
                    self.bench.now += Duration::from_secs((*secs).into());
                }
                _ => {}
            }
        }

        fn check(&mut self) {
            // In the end Nginx has a log.
            self.reopen();
            self.read_all();
            let sorted = |lines: &[String]| {
                let mut lines = lines.to_vec();
                lines.sort_unstable();
                lines
            };
            assert_eq!(sorted(&self.read), sorted(&self.written));
        }
    }

    #[test]
    fn a_packed_log_is_itself_under_whatever_name() {
        let rotate = |world: &mut World, packed: u8| {
            for _ in 0..3 {
                for step in [Step::Rename, Step::Reopen, Step::Write(2)] {
                    world.take(&step);
                }
            }
            (0..packed).for_each(|_| world.take(&Step::Pack));
        };
        for pieces in 0..30 {
            let mut world = World::new();
            world.take(&Step::Write(2));
            world.read_all();
            rotate(&mut world, 2);
            // In the middle of what was rotated away unseen, all names change.
            world.take(&Step::ReadSome(pieces));
            rotate(&mut world, 3);
            world.check();
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

        /// Whatever happens to the file and to the agent, the lines that come out are those that went in: none lost, none
        /// doubled.
        #[test]
        fn the_lines_read_are_the_lines_written(steps in prop::collection::vec(step(), 1..60)) {
            let mut world = World::new();
            for step in &steps {
                world.take(step);
            }
            world.check();
        }
    }
}
