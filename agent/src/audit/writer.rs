//! The thread that writes.

use std::{
    collections::VecDeque,
    fs::{File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use portcullis_engine::{Event, command::Action};
use tracing::{error, info, warn};

use super::{
    Settings, Shared,
    chain::Head,
    files::{self, End},
};
use crate::{runtime::clock, source::checkpoint::FileId};

/// How long a disk that fails is left alone before the next try.
const RETRY: Duration = Duration::from_secs(1);
/// What is written is put on the platter this often: a power cut costs as much history at most.
const SYNC: Duration = Duration::from_secs(1);
/// As much is written at a time: a burst is few calls.
const CHUNK: usize = 256 * 1024;

/// What is open.
struct Open {
    file: File,
    id: FileId,
    /// Length up to which it is as it should be.
    length: u64,
    head_file: File,
    head: Head,
    /// The file's last line lacks its end, which is written first.
    is_unended: bool,
    /// What is to be put on record of how the files were found.
    found: Vec<String>,
}

/// See the module's documentation.
pub(super) struct Writer {
    dir: PathBuf,
    settings: Settings,
    open: Option<Open>,
    /// The file that was written to last, and how far it is as it should be.
    sound: Option<(FileId, u64)>,
    /// The newest line that was written by this one.
    head: Option<Head>,
    /// Something was written that may not be on the platter.
    is_dirty: bool,
    synced: Duration,
    is_failing: bool,
    /// The last rotation failed.
    is_stuck: bool,
    /// None is tried before the next time that the disk is waited for.
    is_resting: bool,
}

impl Writer {
    pub(super) fn new(dir: &Path, settings: Settings) -> Self {
        Self {
            dir: dir.to_owned(),
            settings,
            open: None,
            sound: None,
            head: None,
            is_dirty: false,
            synced: Duration::ZERO,
            is_failing: false,
            is_stuck: false,
            is_resting: false,
        }
    }

    /// Writes what comes until no more does.
    pub(super) fn write_all(&mut self, shared: &Shared) {
        let mut lines = VecDeque::new();
        loop {
            let wait = self.is_dirty.then_some(SYNC);
            let is_last = shared.take(&mut lines, CHUNK, wait);
            match self.write(&mut lines) {
                Ok(()) => shared.lock().problem = None,
                Err(problem) => {
                    self.fail(&problem);
                    shared.lock().problem = Some(problem.to_string());
                    // At the end each line has its one try.
                    if shared.lock().is_closing {
                        let mut queue = shared.lock();
                        queue.lost += (lines.len() + queue.lines.len()) as u64;
                        queue.lines.clear();
                        break;
                    }
                    shared.pause(RETRY);
                    continue;
                }
            }
            if is_last && lines.is_empty() {
                break;
            }
            if self.is_dirty && clock::boot().saturating_sub(self.synced) >= SYNC {
                self.sync();
            }
        }
        if self.is_dirty {
            self.sync();
        }
        let lost = shared.lock().lost;
        if lost > 0 {
            let path = files::current(&self.dir);
            error!("{lost} events never came into {}", path.display());
        }
    }

    fn fail(&mut self, problem: &io::Error) {
        self.open = None;
        if !std::mem::replace(&mut self.is_failing, true) {
            let path = files::current(&self.dir);
            error!(
                "cannot write {}: {problem}; bans are enforced all the same, and what happens is put on record when it can be",
                path.display()
            );
        }
    }

    /// Writes the first of these lines, some of them or all.
    fn write(&mut self, lines: &mut VecDeque<String>) -> io::Result<()> {
        if lines.is_empty() {
            return Ok(());
        }
        let mut open = match self.open.take() {
            Some(open) => open,
            None => self.open()?,
        };
        let (mut chunk, mut head) = (Vec::with_capacity(CHUNK + CHUNK / 4), open.head);
        if open.is_unended {
            chunk.push(b'\n');
        }
        for words in &open.found {
            let notice = Event::new(clock::wall(), Action::Notice, words.clone());
            if let Some(line) = super::as_json(&notice, None) {
                head.seal(&line, &mut chunk);
            }
        }
        let mut count = 0;
        for line in &*lines {
            let (before, mut next) = (chunk.len(), head);
            next.seal(line, &mut chunk);
            let length = open.length + chunk.len() as u64;
            let is_first = open.length == 0 && before == 0;
            if length > self.settings.max_bytes && !is_first && !self.is_resting {
                chunk.truncate(before);
                break;
            }
            head = next;
            count += 1;
            if chunk.len() >= CHUNK {
                break;
            }
        }
        if chunk.is_empty() {
            return self.rotate(open);
        }
        self.is_dirty = true;
        if let Err(problem) = open.file.write_all(&chunk) {
            // Half a line before a full disk would spoil the next one too. If it cannot be cut off, it is when it is opened again.
            let _uncut = open.file.set_len(open.length);
            return Err(problem);
        }
        lines.drain(..count);
        open.length += chunk.len() as u64;
        (open.head, open.is_unended) = (head, false);
        open.found.clear();
        (self.head, self.sound) = (Some(head), Some((open.id, open.length)));
        self.open = Some(open);
        if std::mem::take(&mut self.is_failing) {
            let path = files::current(&self.dir);
            info!("{} can be written again", path.display());
        }
        Ok(())
    }

    /// Opens the file for appending, or makes it, and finds out how to go on.
    fn open(&mut self) -> io::Result<Open> {
        let mut options = OpenOptions::new();
        options.read(true).create(true).mode(0o640);
        // Without a head nothing is written: a line that it might know of could be taken away unseen.
        let head_file = options.clone().write(true).open(files::head(&self.dir))?;
        let file = options.append(true).open(files::current(&self.dir))?;
        let metadata = file.metadata()?;
        let (id, mut length) = (FileId::of(&metadata), metadata.len());
        if let Some((same, sound)) = self.sound
            && same == id
            && sound < length
        {
            file.set_len(sound)?;
            length = sound;
        }
        self.sound = Some((id, length));
        let end = End::of(&files::open_all(&self.dir)?);
        let is_new = head_file.metadata()?.len() == 0;
        let noted = match self.head {
            Some(head) => Some(head),
            None if is_new => None,
            None => files::read_head(&head_file)
                .inspect_err(|problem| warn!("cannot read history.head: {problem}"))
                .ok(),
        };
        let (head, mut found) = go_on(end, noted);
        if self.settings.keep == 0 && end.last.is_none() {
            // They were rotated away.
            found.clear();
        }
        if end.torn > 0 {
            found.push(format!(
                "the line before this one is torn: its last {} bytes are all that came of it, the agent or the machine was ended \
                 while it was written",
                end.torn
            ));
        }
        for words in &found {
            warn!("the history: {words}");
        }
        if noted.is_none() {
            files::write_head(&head_file, &head)?;
            head_file.sync_data()?;
        }
        Ok(Open {
            file,
            id,
            length,
            head_file,
            head,
            is_unended: end.torn > 0 || end.is_unended,
            found,
        })
    }

    /// Moves the file away; the next line opens a new one. Where that cannot be, the file grows on: better than none.
    fn rotate(&mut self, open: Open) -> io::Result<()> {
        self.open = Some(open);
        self.sync();
        let steps = files::rotation(&self.dir, self.settings.keep);
        let taken = steps.and_then(|steps| steps.iter().try_for_each(files::Step::take));
        if let Err(problem) = taken {
            self.is_resting = true;
            if !std::mem::replace(&mut self.is_stuck, true) {
                let path = files::current(&self.dir);
                error!("cannot rotate {}: {problem}; it grows on", path.display());
            }
            return Ok(());
        }
        self.is_stuck = false;
        self.open = None;
        File::open(&self.dir)?.sync_all()
    }

    /// Puts what was written on the platter, and then the head: so that the head never knows of a line that a power cut took.
    fn sync(&mut self) {
        self.synced = clock::boot();
        (self.is_dirty, self.is_resting) = (false, false);
        let Some(open) = &self.open else { return };
        let synced = open.file.sync_data();
        if let Err(problem) = synced.and_then(|()| files::write_head(&open.head_file, &open.head)) {
            error!(
                "{} may not survive a power cut: {problem}",
                files::current(&self.dir).display()
            );
            return;
        }
        // Somebody may have moved or deleted it: what is written now would go with it.
        let there = std::fs::metadata(files::current(&self.dir));
        if there.ok().map(|there| FileId::of(&there)) != Some(open.id) {
            self.open = None;
        }
    }
}

/// The number and hash to go on from, by how the files end and what the head knows; and what is wrong with them. Where they do not
/// agree, the chain goes on from the head: so the break stays where everybody can see it.
fn go_on(end: End, noted: Option<Head>) -> (Head, Vec<String>) {
    let from_files = end.last.map(|(last, chain)| Head {
        seq: last.seq,
        chain,
    });
    match (end.last, from_files, noted) {
        (_, None, None) => (Head::GENESIS, Vec::new()),
        (_, Some(head), None) => {
            // A number is left out, so that this shows whoever verifies it, too.
            let words = "history.head is missing or damaged: nobody knows whether lines are missing before this one";
            let head = Head {
                seq: head.seq + 1,
                ..head
            };
            (head, vec![words.to_owned()])
        }
        (Some((last, _)), Some(_), Some(noted)) if noted.seq == last.seq && noted != last => {
            let words = format!("line {} is not the one that history.head names", last.seq);
            (noted, vec![words])
        }
        (_, Some(head), Some(noted)) if noted.seq <= head.seq => (head, Vec::new()),
        (last, _, Some(noted)) => {
            let known = last.map_or(0, |(last, _)| last.seq);
            let words = (noted.seq > 0).then(|| {
                format!(
                    "lines up to {} were written, the files end with line {known}",
                    noted.seq
                )
            });
            (noted, words.into_iter().collect())
        }
    }
}
