//! One open file of a log: its bytes as whole lines, and where it stands.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Read, Seek as _, SeekFrom},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::atomic::Ordering,
    time::{Duration, SystemTime},
};

use nix::fcntl::OFlag;

use super::{
    CHUNK, Counters, Limits,
    checkpoint::{FileId, Fingerprint, Position, before},
    packed::Packing,
};

/// Where a reader stood is noted at most so often.
const MARK: Duration = Duration::from_secs(5);
/// Lines further back than so many bytes are not read again, however young they are.
const MAX_REWIND: u64 = 256 * 1024 * 1024;

/// Lines of one file.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Piece {
    /// Whole lines, as they lie in the file; the last one of a file that is given up may have no end.
    pub bytes: Vec<u8>,
    /// Where they begin.
    pub start: u64,
    /// A former run has read them.
    pub again: bool,
    /// Where a line begins that is too long to be kept, and is thrown away.
    pub cut: Option<u64>,
}

/// How many bytes of whole lines may be handed on now.
pub type Ripe<'a> = &'a dyn Fn(&[u8]) -> usize;

enum Contents {
    Plain(File),
    Packed(Packed),
}

/// A file whose text has no end that could be asked for, and no way back but to its beginning. Its name may be another's by
/// now: whatever is asked of it, the open file is.
struct Packed {
    file: File,
    packing: Packing,
    text: Box<dyn Read + Send>,
    /// What it begins with.
    head: Vec<u8>,
}

impl Packed {
    fn open(file: File, packing: Packing) -> io::Result<Self> {
        let mut packed = Self {
            text: packing.unpack(file.try_clone()?)?,
            file,
            packing,
            head: Vec::new(),
        };
        packed.head = packed.next(Fingerprint::BYTES as u64)?;
        packed.rewind()?;
        Ok(packed)
    }

    fn rewind(&mut self) -> io::Result<()> {
        self.file.rewind()?;
        self.text = self.packing.unpack(self.file.try_clone()?)?;
        Ok(())
    }

    /// Says how many bytes there were to skip.
    fn skip(&mut self, bytes: u64) -> io::Result<u64> {
        io::copy(&mut (&mut self.text).take(bytes), &mut io::sink())
    }

    fn next(&mut self, bytes: u64) -> io::Result<Vec<u8>> {
        let mut next = Vec::new();
        (&mut self.text).take(bytes).read_to_end(&mut next)?;
        Ok(next)
    }
}

/// One open file.
pub(super) struct Reader {
    contents: Contents,
    pub id: FileId,
    path: PathBuf,
    /// Where the next read begins.
    offset: u64,
    /// Whole lines that were read and wait to be handed on.
    held: Vec<u8>,
    /// So many bytes of those were handed on already.
    handed_on: usize,
    /// The beginning of a line whose end is not written yet, after those; `offset` is behind it.
    partial: Vec<u8>,
    /// The rest of the current line is thrown away: it is too long.
    cut: bool,
    /// The last bytes before the current line, at most [`Fingerprint::BYTES`] of them, as they were read.
    recent: Vec<u8>,
    /// Where a former run stood, which has read what is before that.
    resumed: Option<Position>,
    /// Beginnings of lines, and when they were reached, oldest first.
    marks: VecDeque<(Duration, u64)>,
    modified: SystemTime,
    /// There was nothing more at the last look; of a packed file that is its end.
    is_over: bool,
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}@{}", self.path.display(), self.offset)
    }
}

impl Reader {
    /// Opens a file at its beginning.
    pub fn open(path: &Path) -> io::Result<Self> {
        let link = path.symlink_metadata()?;
        let path = path.canonicalize()?;
        // A pipe would keep us waiting for its writer.
        let file = File::options()
            .read(true)
            .custom_flags(OFlag::O_NONBLOCK.bits())
            .open(&path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::other("it is no regular file"));
        }
        // As the kernel has it with links in /tmp: nobody is to have us read what only we can.
        if link.is_symlink() && link.uid() != 0 && link.uid() != metadata.uid() {
            return Err(io::Error::other(
                "the link belongs neither to root nor to the owner of what it leads to",
            ));
        }
        let contents = match Packing::of(&path) {
            None => Contents::Plain(file),
            Some(packing) => Contents::Packed(Packed::open(file, packing)?),
        };
        Ok(Self {
            contents,
            id: FileId::of(&metadata),
            path,
            offset: 0,
            held: Vec::new(),
            handed_on: 0,
            partial: Vec::new(),
            cut: false,
            recent: Vec::new(),
            resumed: None,
            marks: VecDeque::new(),
            modified: metadata.modified()?,
            is_over: false,
        })
    }

    /// Opens a file where a former run has left it: where the lines begin that it is to read again. `None`: it is another
    /// file, or one that has been truncated.
    pub fn resume(path: &Path, position: &Position) -> io::Result<Option<Self>> {
        let mut reader = Self::open(path)?;
        if let Contents::Packed(packed) = &mut reader.contents {
            let told = position.before.bytes().min(position.offset);
            let stands = position.offset - told;
            if packed.skip(stands)? < stands
                || Fingerprint::of(&packed.next(told)?) != position.before
            {
                return Ok(None);
            }
            packed.rewind()?;
        } else if !reader.is_at(position) {
            return Ok(None);
        }
        reader.go_to(position)?;
        Ok(Some(reader))
    }

    /// Where it was when it was opened, with symbolic links followed.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// When it was last written to, at the last look.
    pub const fn modified(&self) -> SystemTime {
        self.modified
    }

    pub const fn is_packed(&self) -> bool {
        matches!(self.contents, Contents::Packed(_))
    }

    /// Could this plain file be the one that a position was said of?
    pub fn is_at(&self, position: &Position) -> bool {
        match &self.contents {
            Contents::Plain(file) => position.before.is_of(file, position.offset),
            Contents::Packed(_) => false,
        }
    }

    /// Goes on from a position of this file, a little before it.
    pub fn go_to(&mut self, position: &Position) -> io::Result<()> {
        let rewind = position.rewind.min(position.offset);
        match &mut self.contents {
            Contents::Plain(file) => {
                self.recent = before(file, rewind, Fingerprint::BYTES)?;
            }
            Contents::Packed(packed) => {
                let skip = rewind.saturating_sub(Fingerprint::BYTES as u64);
                packed.skip(skip)?;
                self.recent = packed.next(rewind - skip)?;
            }
        }
        self.offset = rewind;
        self.resumed = Some(position.clone());
        self.held.clear();
        self.handed_on = 0;
        self.partial.clear();
        self.cut = position.cut && rewind == position.offset;
        self.marks.clear();
        Ok(())
    }

    /// Reads what has been truncated and written again.
    pub fn begin_anew(&mut self) {
        self.offset = 0;
        self.held.clear();
        self.handed_on = 0;
        self.partial.clear();
        self.cut = false;
        self.recent.clear();
        self.resumed = None;
        self.marks.clear();
    }

    /// From its end on; in the middle of a line that is being written, the rest of that is no line.
    pub fn start_at_end(&mut self) -> io::Result<()> {
        let Contents::Plain(file) = &self.contents else {
            return Ok(());
        };
        self.offset = file.metadata()?.len();
        self.recent = before(file, self.offset, Fingerprint::BYTES)?;
        self.cut = self.recent.last().is_some_and(|last| *last != b'\n');
        Ok(())
    }

    /// What it begins with.
    pub fn head(&self) -> io::Result<Vec<u8>> {
        match &self.contents {
            Contents::Plain(file) => {
                let length = file.metadata()?.len().min(Fingerprint::BYTES as u64);
                before(file, length, Fingerprint::BYTES)
            }
            Contents::Packed(packed) => Ok(packed.head.clone()),
        }
    }

    /// Bytes that are there and not handed on. Of a packed file nobody knows.
    pub fn backlog(&self) -> u64 {
        self.held().map_or(0, <[u8]>::len) as u64 + self.unread()
    }

    fn unread(&self) -> u64 {
        match &self.contents {
            Contents::Plain(file) => {
                let length = file
                    .metadata()
                    .map_or(self.offset, |metadata| metadata.len());
                length.saturating_sub(self.offset)
            }
            // More than one read, until its end is seen.
            Contents::Packed(_) if self.is_over => 0,
            Contents::Packed(_) => 2 * CHUNK as u64,
        }
    }

    /// The next lines, if they were read and wait to be handed on.
    pub fn held(&self) -> Option<&[u8]> {
        let held = &self.held[self.handed_on..];
        (!held.is_empty()).then_some(held)
    }

    /// Everything before this was handed on.
    fn here(&self) -> u64 {
        self.offset - (self.held.len() - self.handed_on + self.partial.len()) as u64
    }

    /// Does no name lead to it any more?
    pub fn is_deleted(&self) -> bool {
        match &self.contents {
            Contents::Plain(file) => file.metadata().is_ok_and(|metadata| metadata.nlink() == 0),
            Contents::Packed(_) => false,
        }
    }

    /// Is what was read still there? Not if the file was truncated, even if it has grown past its old length since. A disk
    /// that fails says nothing about that: what was read must not be read again for it.
    pub fn is_as_read(&self) -> io::Result<bool> {
        let Contents::Plain(file) = &self.contents else {
            return Ok(true);
        };
        if file.metadata()?.len() < self.offset {
            return Ok(false);
        }
        let held = self.held().unwrap_or_default();
        let read = [self.recent.as_slice(), held, &self.partial].concat();
        match before(file, self.offset, read.len()) {
            Ok(there) => Ok(there == read),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Where to go on once everything that was handed on is dealt with.
    pub fn position(&self) -> Position {
        if let Some(resumed) = self.resumed.as_ref().filter(|_| self.is_reading_again()) {
            return resumed.clone();
        }
        let offset = self.here();
        Position {
            file: self.id,
            path: self.path.clone(),
            offset,
            rewind: self.marks.front().map_or(offset, |(_, mark)| *mark),
            cut: self.cut,
            before: Fingerprint::of(&self.recent),
            modified: self.modified,
            done: None,
        }
    }

    /// Does it go on where a former run has left it?
    pub const fn is_resumed(&self) -> bool {
        self.resumed.is_some()
    }

    /// Has a former run read what comes next?
    pub fn is_reading_again(&self) -> bool {
        let resumed = self.resumed.as_ref();
        resumed.is_some_and(|resumed| self.here() < resumed.offset)
    }

    /// These bytes are dealt with.
    fn pass(&mut self, bytes: &[u8]) {
        self.recent
            .extend_from_slice(&bytes[bytes.len().saturating_sub(Fingerprint::BYTES)..]);
        let surplus = self.recent.len().saturating_sub(Fingerprint::BYTES);
        self.recent.drain(..surplus);
    }

    /// Notes where the current line begins, and forgets what is too old to be read again.
    fn mark(&mut self, now: Duration, rewind: Duration) {
        let here = self.here();
        if self
            .marks
            .back()
            .is_none_or(|(when, _)| now.saturating_sub(*when) >= MARK)
        {
            self.marks.push_back((now, here));
        }
        let is_old = |(when, mark): &(Duration, u64)| {
            now.saturating_sub(*when) >= rewind || here - mark > MAX_REWIND
        };
        // The newest of the old ones is where a window begins.
        while self.marks.get(1).is_some_and(is_old) {
            self.marks.pop_front();
        }
        if self.marks.len() == 1 && here - self.marks[0].1 > MAX_REWIND {
            self.marks[0] = (now, here);
        }
    }

    /// The whole lines among the next `limit` bytes, as far as they are `ripe`. An empty piece means that there was something,
    /// but no such line; `None` that there was nothing.
    pub fn read(
        &mut self,
        limit: usize,
        limits: &Limits,
        now: Duration,
        counters: &Counters,
        ripe: Ripe<'_>,
    ) -> io::Result<Option<Piece>> {
        if !self.cut {
            self.mark(now, limits.rewind);
        }
        if self.held().is_some() {
            let (start, again) = (self.here(), self.is_reading_again());
            return Ok(Some(Piece {
                bytes: self.next_ripe(ripe),
                start,
                again,
                cut: None,
            }));
        }
        // A piece is either all read again or all new.
        let resumed = self.resumed.as_ref().map_or(0, |resumed| resumed.offset);
        let again = resumed.saturating_sub(self.offset);
        let limit = match again {
            0 => limit as u64,
            again => again.min(limit as u64),
        };
        let before = self.partial.len();
        // Never more than is read: a batch that waits is to take up no more than it holds.
        let room = usize::try_from(self.unread().min(limit)).unwrap_or_default();
        let mut bytes = Vec::with_capacity(before + room);
        bytes.append(&mut self.partial);
        let start = self.offset - before as u64;
        let result = match &mut self.contents {
            Contents::Plain(file) => {
                file.seek(SeekFrom::Start(self.offset))?;
                if let Ok(metadata) = file.metadata()
                    && let Ok(modified) = metadata.modified()
                {
                    self.modified = modified;
                }
                file.take(limit).read_to_end(&mut bytes)
            }
            Contents::Packed(packed) => (&mut packed.text).take(limit).read_to_end(&mut bytes),
        };
        let read = bytes.len() - before;
        self.offset += read as u64;
        counters.bytes.fetch_add(read as u64, Ordering::Relaxed);
        self.is_over = read == 0;
        if read == 0 {
            self.partial = bytes;
            return result.map(|_| None);
        }
        let end = memchr::memrchr(b'\n', &bytes).map_or(0, |last| last + 1);
        self.partial = bytes.split_off(end);
        let mut piece = Piece {
            bytes,
            start,
            again: again > 0,
            cut: None,
        };
        if self.cut && !piece.bytes.is_empty() {
            let end = memchr::memchr(b'\n', &piece.bytes).map_or(piece.bytes.len(), |at| at + 1);
            let rest = piece.bytes.split_off(end);
            self.pass(&piece.bytes);
            piece.bytes = rest;
            piece.start += end as u64;
            self.cut = false;
        }
        self.held = std::mem::take(&mut piece.bytes);
        piece.bytes = self.next_ripe(ripe);
        // What waits comes first.
        if self.held().is_none() && !self.cut && self.partial.len() > limits.max_line {
            self.drop_hole();
            if self.partial.len() > limits.max_line {
                piece.cut = Some(self.offset - self.partial.len() as u64);
                self.cut = true;
            }
        }
        if self.cut {
            let thrown_away = std::mem::take(&mut self.partial);
            self.pass(&thrown_away);
        }
        Ok(Some(piece))
    }

    /// Of the lines that are held, those that are ripe.
    fn next_ripe(&mut self, ripe: Ripe<'_>) -> Vec<u8> {
        let held = self.held().unwrap_or_default();
        let ripe = ripe(held);
        // Most often all of them are, and need not be copied.
        let bytes = if self.handed_on == 0 && ripe == held.len() {
            std::mem::take(&mut self.held)
        } else {
            held[..ripe].to_vec()
        };
        self.handed_on += ripe;
        if self.handed_on >= self.held.len() {
            self.held.clear();
            self.handed_on = 0;
        }
        self.pass(&bytes);
        bytes
    }

    /// Who writes on at an old offset into a truncated file leaves a hole before it, which reads as zeros: no line.
    fn drop_hole(&mut self) {
        let end = self.partial.iter().position(|byte| *byte != 0);
        let hole: Vec<u8> = self
            .partial
            .drain(..end.unwrap_or(self.partial.len()))
            .collect();
        self.pass(&hole);
    }

    /// What a file that is given up ends with, if its last line has no end.
    pub fn last_words(&mut self, limits: &Limits) -> Option<Piece> {
        let bytes = std::mem::take(&mut self.partial);
        self.pass(&bytes);
        (!bytes.is_empty() && !self.cut && bytes.len() <= limits.max_line).then(|| Piece {
            start: self.offset - bytes.len() as u64,
            bytes,
            again: self.is_reading_again(),
            cut: None,
        })
    }
}
