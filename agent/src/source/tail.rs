//! Reads a growing file by bytes: through rotation, truncation and half-written lines, none lost and none invented.

use std::{
    collections::VecDeque,
    fs::{self, File},
    io::{self, Read as _, Seek as _, SeekFrom},
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result};
use tracing::{info, warn};

use super::{
    Counters, Start,
    checkpoint::{Checkpoint, FileId, Fingerprint, Position, before},
};

/// A rotated file is read on until nothing has come for so long: Nginx writes to it until it is told to reopen.
const LINGER: Duration = Duration::from_secs(30);
/// Rotated files that are read on at a time; the oldest is given up for a further one.
const MAX_LINGERING: usize = 8;

/// The file at a path, and the files that were there before and are still written to.
#[derive(Debug)]
pub struct Tail {
    path: PathBuf,
    max_line: usize,
    current: Option<Reader>,
    /// Oldest first, each with the time at which it last gave something, once it was looked at.
    lingering: VecDeque<(Reader, Option<Duration>)>,
    counters: Arc<Counters>,
}

impl Tail {
    /// Opens the file at `path`, if it is there yet: where `checkpoint` says, or else where `start` says. A file that
    /// appears later is read from its beginning. What was rotated away meanwhile is read to its end first.
    ///
    /// # Errors
    /// When the file is there and cannot be read.
    pub fn open(
        path: PathBuf,
        start: Start,
        max_line: usize,
        checkpoint: Option<&Checkpoint>,
        counters: Arc<Counters>,
    ) -> Result<Self> {
        let mut current = match Reader::open(&path) {
            Ok(reader) => Some(reader),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                return Err(error).with_context(|| {
                    format!(
                        "cannot read {}: give the agent the right to",
                        path.display()
                    )
                });
            }
        };
        let mut lingering = VecDeque::new();
        for position in checkpoint.into_iter().flatten() {
            if let Some(reader) = &mut current
                && reader.id == position.file
                && reader.is_at(position)
            {
                reader.go_to(position.offset);
            } else if let Some(mut rotated) = find(&path, position) {
                rotated.go_to(position.offset);
                lingering.push_back((rotated, None));
            } else {
                warn!(
                    "a file that {} was before is gone: what was written to it after the last stop is lost",
                    path.display()
                );
            }
        }
        if let (Some(reader), None, Start::End) = (&mut current, checkpoint, start) {
            reader.start_at_end();
        }
        Ok(Self {
            path,
            max_line,
            current,
            lingering,
            counters,
        })
    }

    /// Reads up to `limit` bytes and returns the lines that are complete. `None`: there is nothing now; nothing
    /// complete is an empty text. `now` is the boot clock.
    ///
    /// # Errors
    /// When the file can be seen but not read; to be tried again.
    pub fn read(&mut self, limit: usize, now: Duration) -> Result<Option<Vec<u8>>> {
        let mut index = 0;
        while let Some((reader, last)) = self.lingering.get_mut(index) {
            let lines = reader.read(limit, self.max_line, &self.counters);
            // One that cannot be read is given up in time, as one that is silent is; the log itself goes on.
            let lines = lines.unwrap_or_else(|error| {
                warn!("cannot read a rotated log on: {error}");
                None
            });
            if let Some(lines) = lines {
                *last = Some(now);
                return Ok(Some(lines));
            }
            let silent = now.saturating_sub(*last.get_or_insert(now));
            if silent < LINGER && self.lingering.len() <= MAX_LINGERING {
                index += 1;
            } else if let Some((mut reader, _)) = self.lingering.remove(index)
                && let Some(words) = reader.last_words(self.max_line)
            {
                return Ok(Some(words));
            }
        }
        if let Some(reader) = &mut self.current {
            let as_read = reader
                .is_as_read()
                .with_context(|| format!("cannot read {}", self.path.display()))?;
            if !as_read {
                warn!(
                    "{} was truncated: reading it from its beginning",
                    self.path.display()
                );
                self.counters.truncations.fetch_add(1, Ordering::Relaxed);
                // Who truncates a log has copied it before; what was not read yet is there.
                let position = reader.position();
                if let Some(mut copy) = find(&self.path, &position) {
                    copy.go_to(position.offset);
                    self.lingering.push_back((copy, Some(now)));
                }
                reader.go_to(0);
                return Ok(Some(Vec::new()));
            }
            let length = reader.length().unwrap_or(reader.offset);
            self.counters
                .lag
                .store(length.saturating_sub(reader.offset), Ordering::Relaxed);
            let lines = reader.read(limit, self.max_line, &self.counters);
            if let Some(lines) =
                lines.with_context(|| format!("cannot read {}", self.path.display()))?
            {
                return Ok(Some(lines));
            }
        }
        let has_moved = self.follow(now)?;
        Ok(has_moved.then(Vec::new))
    }

    /// Where to go on once all lines that were returned so far are dealt with.
    #[must_use]
    pub fn checkpoint(&self) -> Checkpoint {
        let lingering = self.lingering.iter().map(|(reader, _)| reader);
        lingering
            .chain(&self.current)
            .map(Reader::position)
            .collect()
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
                let fresh = Reader::open(&self.path)
                    .with_context(|| format!("cannot open {}", self.path.display()))?;
                info!(
                    "{} is a new file: reading it from its beginning",
                    self.path.display()
                );
                if let Some(old) = self.current.replace(fresh) {
                    self.counters.rotations.fetch_add(1, Ordering::Relaxed);
                    self.lingering.push_back((old, Some(now)));
                }
                Ok(true)
            }
            // Between a rename and the creation of its successor there is no file; the old one is read on.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => {
                Err(error).with_context(|| format!("cannot look at {}", self.path.display()))
            }
        }
    }
}

/// One open file.
#[derive(Debug)]
struct Reader {
    file: File,
    id: FileId,
    /// Where the next read begins.
    offset: u64,
    /// The beginning of a line whose end is not written yet; `offset` is behind it.
    partial: Vec<u8>,
    /// The rest of the current line is thrown away: it is too long.
    skipping: bool,
    /// The last bytes before the current line, at most [`Fingerprint::BYTES`] of them, as they were read.
    recent: Vec<u8>,
}

impl Reader {
    fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let id = FileId::of(&file.metadata()?);
        Ok(Self {
            file,
            id,
            offset: 0,
            partial: Vec::new(),
            skipping: false,
            recent: Vec::new(),
        })
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    /// Goes on at the beginning of a line.
    fn go_to(&mut self, offset: u64) {
        self.offset = offset;
        self.recent = before(&self.file, offset, Fingerprint::BYTES).unwrap_or_default();
        self.partial.clear();
        self.skipping = false;
    }

    /// Could this be the file that a position was said of?
    fn is_at(&self, position: &Position) -> bool {
        position.before.is_of(&self.file, position.offset)
    }

    /// Is what was read still there? Not if the file was truncated, even if it has grown past its old length since. A disk
    /// that fails says nothing about that: what was read must not be read again for it.
    fn is_as_read(&self) -> io::Result<bool> {
        let read = [self.recent.as_slice(), &self.partial].concat();
        if self.length()? < self.offset {
            return Ok(false);
        }
        match before(&self.file, self.offset, read.len()) {
            Ok(there) => Ok(there == read),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn position(&self) -> Position {
        Position {
            file: self.id,
            offset: self.offset - self.partial.len() as u64,
            before: Fingerprint::of(&self.recent),
        }
    }

    /// These bytes are dealt with.
    fn pass(&mut self, bytes: &[u8]) {
        self.recent
            .extend_from_slice(&bytes[bytes.len().saturating_sub(Fingerprint::BYTES)..]);
        let surplus = self.recent.len().saturating_sub(Fingerprint::BYTES);
        self.recent.drain(..surplus);
    }

    /// From its end on; in the middle of a line that is being written, the rest of that is no line.
    fn start_at_end(&mut self) {
        let Ok(length @ 1..) = self.length() else {
            return;
        };
        self.offset = length;
        let mut last = [0];
        let read = self
            .file
            .seek(SeekFrom::Start(length - 1))
            .and_then(|_| self.file.read_exact(&mut last));
        self.recent = before(&self.file, length, Fingerprint::BYTES).unwrap_or_default();
        self.skipping = read.is_err() || last != *b"\n";
    }

    /// The complete lines among the next `limit` bytes. An empty text means that there was something, but no complete
    /// line yet; `None` that there was nothing.
    fn read(
        &mut self,
        limit: usize,
        max_line: usize,
        counters: &Counters,
    ) -> io::Result<Option<Vec<u8>>> {
        self.file.seek(SeekFrom::Start(self.offset))?;
        let mut bytes = std::mem::take(&mut self.partial);
        let before = bytes.len();
        let result = (&self.file).take(limit as u64).read_to_end(&mut bytes);
        let read = bytes.len() - before;
        self.offset += read as u64;
        counters.bytes.fetch_add(read as u64, Ordering::Relaxed);
        if read == 0 {
            self.partial = bytes;
            return result.map(|_| None);
        }
        let end = memchr::memrchr(b'\n', &bytes).map_or(0, |last| last + 1);
        self.partial = bytes.split_off(end);
        let mut lines = bytes;
        self.pass(&lines);
        if self.skipping && !lines.is_empty() {
            let end = lines
                .iter()
                .position(|byte| *byte == b'\n')
                .map_or(lines.len(), |first| first + 1);
            lines.drain(..end);
            self.skipping = false;
        }
        if !self.skipping && self.partial.len() > max_line {
            counters.overlong.fetch_add(1, Ordering::Relaxed);
            self.skipping = true;
        }
        if self.skipping {
            let skipped = std::mem::take(&mut self.partial);
            self.pass(&skipped);
        }
        drop_overlong(&mut lines, max_line, counters);
        Ok(Some(lines))
    }

    /// What a file that is given up ends with, if its last line has no end.
    fn last_words(&mut self, max_line: usize) -> Option<Vec<u8>> {
        let words = std::mem::take(&mut self.partial);
        (!words.is_empty() && !self.skipping && words.len() <= max_line).then_some(words)
    }
}

fn drop_overlong(lines: &mut Vec<u8>, max_line: usize, counters: &Counters) {
    let mut start = 0;
    let mut ends = memchr::memchr_iter(b'\n', lines).chain([lines.len()]);
    let fits = |end: usize| {
        let length = end.saturating_sub(std::mem::replace(&mut start, end + 1));
        length <= max_line
    };
    if ends.all(fits) {
        return;
    }
    let mut kept = Vec::with_capacity(lines.len());
    for line in lines.split_inclusive(|byte| *byte == b'\n') {
        if line.len() > max_line + 1 {
            counters.overlong.fetch_add(1, Ordering::Relaxed);
        } else {
            kept.extend_from_slice(line);
        }
    }
    *lines = kept;
}

/// The file that a position was said of among those beside `path`: what it is called after its rotation, or else a copy of it.
fn find(path: &Path, position: &Position) -> Option<Reader> {
    let entries = fs::read_dir(path.parent()?).ok()?;
    let mut copy = None;
    for entry in entries.filter_map(Result::ok) {
        // No pipe, which would keep us waiting.
        let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
        if !is_file || entry.path() == path {
            continue;
        }
        let Some(reader) = Reader::open(&entry.path())
            .ok()
            .filter(|reader| reader.is_at(position))
        else {
            continue;
        };
        if reader.id == position.file {
            return Some(reader);
        }
        // Every file begins with nothing.
        if position.offset > 0 {
            copy = Some(reader);
        }
    }
    copy
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use proptest::prelude::*;

    use super::*;

    const MAX_LINE: usize = 40;

    struct Bench {
        folder: tempfile::TempDir,
        tail: Tail,
        now: Duration,
    }

    impl Bench {
        fn new(start: Start, before: &str) -> Self {
            let folder = tempfile::tempdir().unwrap();
            if !before.is_empty() {
                fs::write(folder.path().join("log"), before).unwrap();
            }
            let tail = Tail::open(
                folder.path().join("log"),
                start,
                MAX_LINE,
                None,
                Arc::default(),
            )
            .unwrap();
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
        }

        /// Everything that there is to read, in small pieces.
        fn drain(&mut self) -> String {
            let mut all = Vec::new();
            while let Some(lines) = self.tail.read(7, self.now).unwrap() {
                all.extend(lines);
            }
            String::from_utf8(all).unwrap()
        }

        fn restart(&mut self) {
            let checkpoint = self.tail.checkpoint();
            self.tail = Tail::open(
                self.path("log"),
                Start::End,
                MAX_LINE,
                Some(&checkpoint),
                Arc::default(),
            )
            .unwrap();
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
        assert_eq!(bench.tail.counters.status().rotations, 1);
    }

    #[test]
    fn a_rotation_while_the_agent_is_down_loses_nothing() {
        let mut bench = Bench::new(Start::Beginning, "one\ntwo\n");
        assert_eq!(bench.drain(), "one\ntwo\n");
        bench.append("log", "three\n");
        fs::rename(bench.path("log"), bench.path("log.1")).unwrap();
        bench.append("log", "four\n");
        bench.restart();
        assert_eq!(bench.drain(), "three\nfour\n");
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
        assert_eq!(bench.tail.counters.status().truncations, 1);
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
        assert_eq!(bench.tail.counters.status().truncations, 2);
    }

    #[test]
    fn what_was_not_read_before_a_truncation_is_read_from_the_copy() {
        let mut bench = Bench::new(Start::Beginning, "one\n");
        assert_eq!(bench.drain(), "one\n");
        bench.append("log", "two\nthree\n");
        fs::copy(bench.path("log"), bench.path("log.1")).unwrap();
        File::create(bench.path("log")).unwrap();
        bench.append("log", "four\n");
        assert_eq!(bench.drain(), "two\nthree\nfour\n");
        // And while nobody was there to see it.
        bench.append("log", "five\n");
        fs::copy(bench.path("log"), bench.path("log.2")).unwrap();
        File::create(bench.path("log")).unwrap();
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
    fn a_log_that_cannot_be_read_is_said_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("loop");
        std::os::unix::fs::symlink(&path, &path).unwrap();
        let said = Tail::open(path, Start::End, MAX_LINE, None, Arc::default()).unwrap_err();
        assert!(said.to_string().contains("cannot read"), "{said:#}");
    }

    #[test]
    fn an_overlong_line_is_counted_and_its_neighbours_stay() {
        let long = "x".repeat(MAX_LINE * 3);
        let mut bench = Bench::new(Start::Beginning, &format!("one\n{long}\ntwo\n"));
        assert_eq!(bench.drain(), "one\ntwo\n");
        let exact = "y".repeat(MAX_LINE);
        bench.append("log", &format!("{exact}\n{exact}y\nend\n"));
        let lines = bench.tail.read(4096, bench.now).unwrap().unwrap();
        assert_eq!(String::from_utf8(lines).unwrap(), format!("{exact}\nend\n"));
        assert_eq!(bench.tail.counters.status().overlong_lines, 2);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Write(u8),
        WriteHalf,
        Rotate,
        WriteToRotated,
        CopyAndTruncate,
        Read,
        Restart,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (1u8..5).prop_map(Step::Write),
            1 => Just(Step::WriteHalf),
            1 => Just(Step::Rotate),
            1 => Just(Step::WriteToRotated),
            1 => Just(Step::CopyAndTruncate),
            3 => Just(Step::Read),
            1 => Just(Step::Restart),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

        /// Whatever happens to the file, the lines that come out are those that went in: none lost, none doubled, in
        /// order within each file.
        #[test]
        fn the_lines_read_are_the_lines_written(steps in prop::collection::vec(step(), 1..60)) {
            let mut bench = Bench::new(Start::Beginning, "");
            let (mut line, mut half, mut generation) = (0, false, 0);
            let (mut written, mut read) = (Vec::new(), String::new());
            for step in steps {
                match step {
                    Step::Write(lines) => for _ in 0..lines {
                        line += 1;
                        let rest = if std::mem::take(&mut half) { "" } else { "line " };
                        bench.append("log", &format!("{rest}{line}\n"));
                        written.push(format!("line {line}"));
                    },
                    Step::WriteHalf => if !half {
                        bench.append("log", "line ");
                        half = true;
                    },
                    Step::Rotate => if !half && bench.path("log").exists() {
                        generation += 1;
                        // A tail can only follow a file that it has seen, if not read.
                        bench.tail.follow(bench.now).unwrap();
                        fs::rename(bench.path("log"), bench.path(&format!("log.{generation}"))).unwrap();
                        bench.append("log", "");
                    },
                    Step::WriteToRotated => if generation > 0 {
                        line += 1;
                        bench.append(&format!("log.{generation}"), &format!("line {line}\n"));
                        written.push(format!("line {line}"));
                    },
                    // What has never been read of, nothing is known of.
                    Step::CopyAndTruncate => if !half && bench.path("log").exists() {
                        generation += 1;
                        for _ in 0..2 {
                            read += &bench.drain();
                            line += 1;
                            bench.append("log", &format!("line {line}\n"));
                            written.push(format!("line {line}"));
                        }
                        fs::copy(bench.path("log"), bench.path(&format!("log.{generation}"))).unwrap();
                        File::create(bench.path("log")).unwrap();
                        // A tail that looks after the next truncation only has missed this one.
                        read += &bench.drain();
                    },
                    Step::Read => read += &bench.drain(),
                    Step::Restart => bench.restart(),
                }
            }
            if half {
                bench.append("log", "end\n");
                written.push("line end".to_owned());
            }
            read += &bench.drain();
            let mut read: Vec<&str> = read.lines().collect();
            read.sort_unstable();
            written.sort_unstable();
            prop_assert_eq!(read, written);
        }
    }
}
