//! Logs that are compressed, as rotated ones are, and standard input.

use std::{
    fs::File,
    io::{self, BufReader, Read},
    path::Path,
};

use anyhow::{Context as _, Result};

use super::{CHUNK, Piece};

/// What unpacking may take; a file that asks for more is damaged, or somebody's trap. `xz -9` asks for 65 MiB.
const MAX_MEMORY_KIB: u32 = 80 * 1024;

/// How a file is compressed, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// `.gz`
    Gzip,
    /// `.zst`
    Zstd,
    /// `.xz`
    Xz,
}

impl Packing {
    /// `None`: it is not.
    #[must_use]
    pub fn of(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()? {
            "gz" => Some(Self::Gzip),
            "zst" => Some(Self::Zstd),
            "xz" => Some(Self::Xz),
            _ => None,
        }
    }

    /// What it is by its first bytes, whatever it is called.
    fn of_head(head: &[u8]) -> Option<Self> {
        // RFC 1952, RFC 8878 and the .xz file format.
        let is = |magic: &[u8]| head.starts_with(magic);
        if is(b"\x1f\x8b") {
            Some(Self::Gzip)
        } else if is(b"\x28\xb5\x2f\xfd") {
            Some(Self::Zstd)
        } else if is(b"\xfd7zXZ\0") {
            Some(Self::Xz)
        } else {
            None
        }
    }

    /// The text of such a file. A file that is damaged or cut off is an error where the damage is, after what is whole.
    ///
    /// # Errors
    /// When it does not begin as such files do.
    pub fn unpack(self, file: impl Read + Send + 'static) -> io::Result<Box<dyn Read + Send>> {
        let file = BufReader::with_capacity(64 * 1024, file);
        Ok(match self {
            Self::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(file)),
            Self::Zstd => Box::new(Zstd { file, frame: None }),
            Self::Xz => Box::new(lzma_rust2::XzReader::new_mem_limit(
                file,
                true,
                MAX_MEMORY_KIB,
            )),
        })
    }
}

/// Frame after frame: tools that append to a compressed file write several.
struct Zstd<R> {
    file: BufReader<R>,
    frame: Option<Box<ruzstd::decoding::FrameDecoder>>,
}

impl<R: Read> Read for Zstd<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        use io::BufRead as _;
        use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            let Some(frame) = &mut self.frame else {
                if self.file.fill_buf()?.is_empty() {
                    return Ok(0);
                }
                let mut frame = Box::new(FrameDecoder::new());
                frame.set_max_window_size(u64::from(MAX_MEMORY_KIB) * 1024);
                frame.init(&mut self.file).map_err(io::Error::other)?;
                self.frame = Some(frame);
                continue;
            };
            while frame.can_collect() < buffer.len() && !frame.is_finished() {
                let wanted = buffer.len() - frame.can_collect();
                frame
                    .decode_blocks(&mut self.file, BlockDecodingStrategy::UptoBytes(wanted))
                    .map_err(io::Error::other)?;
            }
            match frame.read(buffer)? {
                0 => self.frame = None,
                read => return Ok(read),
            }
        }
    }
}

/// The text of a log as a whole: a file, or `-` for standard input, compressed or not, which its first bytes tell.
///
/// # Errors
/// When it cannot be opened, or not read.
pub fn open(path: &Path) -> Result<Box<dyn Read + Send>> {
    if path == Path::new("-") {
        return unpacked(io::stdin(), path);
    }
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    unpacked(file, path)
}

/// The text of what is open already; `name` is for messages.
///
/// # Errors
/// When it cannot be read.
pub fn unpacked(mut file: impl Read + Send + 'static, name: &Path) -> Result<Box<dyn Read + Send>> {
    let mut head = Vec::new();
    (&mut file)
        .take(6)
        .read_to_end(&mut head)
        .with_context(|| format!("cannot read {}", name.display()))?;
    let packing = Packing::of_head(&head);
    let file = io::Cursor::new(head).chain(file);
    match packing {
        None => Ok(Box::new(file)),
        Some(packing) => packing
            .unpack(file)
            .with_context(|| format!("cannot unpack {}", name.display())),
    }
}

/// The lines of a text from its beginning to its end, a piece at a time.
pub struct Pieces {
    text: Box<dyn Read + Send>,
    max_line: usize,
    /// Bytes before `partial`.
    offset: u64,
    partial: Vec<u8>,
    /// The rest of the current line is thrown away: it is too long.
    cut: bool,
    is_over: bool,
}

impl Pieces {
    /// Of a text; lines longer than `max_line` bytes are left out.
    #[must_use]
    pub fn new(text: Box<dyn Read + Send>, max_line: usize) -> Self {
        Self {
            text,
            max_line,
            offset: 0,
            partial: Vec::new(),
            cut: false,
            is_over: false,
        }
    }

    fn piece(&mut self) -> io::Result<Piece> {
        let mut bytes = std::mem::take(&mut self.partial);
        let before = bytes.len();
        let result = (&mut self.text).take(CHUNK as u64).read_to_end(&mut bytes);
        // What is whole comes before what is damaged.
        if let Err(error) = result
            && bytes.len() == before
        {
            return Err(error);
        }
        self.is_over = bytes.len() == before;
        let end = if self.is_over {
            bytes.len()
        } else {
            memchr::memrchr(b'\n', &bytes).map_or(0, |last| last + 1)
        };
        self.partial = bytes.split_off(end);
        let mut piece = Piece {
            start: self.offset,
            bytes,
            ..Piece::default()
        };
        self.offset += end as u64;
        if self.cut && end > 0 {
            let end = memchr::memchr(b'\n', &piece.bytes).map_or(end, |at| at + 1);
            piece.bytes.drain(..end);
            piece.start += end as u64;
            self.cut = false;
        }
        if self.partial.len() > self.max_line {
            piece.cut = (!self.cut).then_some(self.offset);
            self.cut = true;
            self.offset += self.partial.len() as u64;
            self.partial.clear();
        }
        Ok(piece)
    }
}

impl Iterator for Pieces {
    type Item = io::Result<Piece>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.is_over {
            return None;
        }
        let piece = self.piece();
        self.is_over |= piece.is_err();
        Some(piece)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    const ALL: [(&str, Packing); 3] = [
        ("log.gz", Packing::Gzip),
        ("log.zst", Packing::Zstd),
        ("log.xz", Packing::Xz),
    ];

    fn packed(packing: Packing, text: &[u8]) -> Vec<u8> {
        match packing {
            Packing::Gzip => {
                let mut gzip =
                    flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                gzip.write_all(text).unwrap();
                gzip.finish().unwrap()
            }
            Packing::Zstd => {
                ruzstd::encoding::compress_to_vec(text, ruzstd::encoding::CompressionLevel::Fastest)
            }
            Packing::Xz => {
                let mut xz =
                    lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::default())
                        .unwrap();
                xz.write_all(text).unwrap();
                xz.finish().unwrap()
            }
        }
    }

    fn lines(path: &Path) -> io::Result<Vec<(u64, String)>> {
        let mut lines = Vec::new();
        for piece in Pieces::new(open(path).unwrap(), 100) {
            let piece = piece?;
            let text = |line: &[u8]| String::from_utf8(line.to_vec()).unwrap();
            lines.extend(piece.lines().map(|(at, line)| (at, text(line))));
        }
        Ok(lines)
    }

    fn expected() -> Vec<(u64, String)> {
        vec![(0, "one".to_owned()), (4, "two".to_owned())]
    }

    #[test]
    fn packed_logs_are_read_even_if_they_were_packed_piece_by_piece() {
        let folder = tempfile::tempdir().unwrap();
        for (name, packing) in ALL {
            let path = folder.path().join(name);
            assert_eq!(Packing::of(&path), Some(packing));
            let both = [packed(packing, b"one\n"), packed(packing, b"two\n")].concat();
            std::fs::write(&path, both).unwrap();
            assert_eq!(lines(&path).unwrap(), expected(), "{name}");
            // Whatever it is called.
            let other = folder.path().join("packed");
            std::fs::rename(&path, &other).unwrap();
            assert_eq!(lines(&other).unwrap(), expected(), "{name}");
            std::fs::write(&path, "one\ntwo").unwrap();
            assert_eq!(lines(&path).unwrap(), expected(), "{name}");
        }
    }

    #[test]
    fn of_a_damaged_file_what_is_whole_is_read_and_the_damage_is_said() {
        let folder = tempfile::tempdir().unwrap();
        for (name, packing) in ALL {
            let path = folder.path().join(name);
            let mut bytes = packed(packing, b"one\ntwo\n");
            bytes.extend(packed(packing, &b"three\n".repeat(1000)));
            bytes.truncate(bytes.len() - 12);
            std::fs::write(&path, bytes).unwrap();
            assert!(lines(&path).is_err(), "{name}");
            let first = Pieces::new(open(&path).unwrap(), 100)
                .next()
                .unwrap()
                .unwrap();
            assert!(first.bytes.starts_with(b"one\ntwo\n"), "{name}");
        }
        let path = folder.path().join("log");
        std::fs::write(&path, b"\x1f\x8bno gzip").unwrap();
        assert!(lines(&path).is_err());
    }

    #[test]
    fn a_last_line_without_an_end_is_a_line_and_one_too_long_is_told() {
        let text = format!("one\n{}\ntwo", "x".repeat(CHUNK + 1000));
        let mut pieces = Pieces::new(Box::new(io::Cursor::new(text.into_bytes())), 100);
        let all: Vec<Piece> = pieces.by_ref().map(Result::unwrap).collect();
        let cuts: Vec<u64> = all.iter().filter_map(|piece| piece.cut).collect();
        assert_eq!(cuts, [4]);
        let lines: Vec<_> = all.iter().flat_map(Piece::lines).collect();
        let end = 4 + CHUNK as u64 + 1001;
        assert_eq!(lines, [(0, &b"one"[..]), (end, b"two")]);
    }
}
