//! The chain: each line ends with a hash over the line before and its own text.

use std::fmt;

use serde::{Serialize, Serializer};
use sha2::{Digest as _, Sha256};

/// SHA-256, in hexadecimal as the lines have it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Hash([u8; 64]);

impl Hash {
    /// What the very first line is chained to.
    pub const GENESIS: Self = Self([b'0'; 64]);

    /// Reads 64 lower-case digits.
    #[must_use]
    pub fn read(text: &[u8]) -> Option<Self> {
        let is_digit = |byte: &u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        let digits: [u8; 64] = text.try_into().ok()?;
        digits.iter().all(is_digit).then_some(Self(digits))
    }

    /// The hash over this one (its digits) and a text in one or more parts. `printf %s%s HASH TEXT | sha256sum` says the same.
    #[must_use]
    pub fn over(self, parts: &[&[u8]]) -> Self {
        let mut hasher = Sha256::new_with_prefix(self.0);
        for part in parts {
            hasher.update(part);
        }
        let digit = |half: u8| {
            if half < 10 {
                b'0' + half
            } else {
                b'a' + half - 10
            }
        };
        let mut digits = [0; 64];
        for (pair, byte) in digits.chunks_exact_mut(2).zip(hasher.finalize()) {
            pair[0] = digit(byte >> 4);
            pair[1] = digit(byte & 15);
        }
        Self(digits)
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(&self.0))
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Hash {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// How far the chain has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Head {
    /// Number of the newest line; the very first is 1.
    pub seq: u64,
    /// Its hash.
    pub chain: Hash,
}

impl Head {
    /// Before the first line.
    pub const GENESIS: Self = Self {
        seq: 0,
        chain: Hash::GENESIS,
    };

    /// Appends an object to `out` as the chain's next line: with its number and its hash as the last two fields.
    pub fn seal(&mut self, object: &str, out: &mut Vec<u8>) {
        let from = out.len();
        out.extend_from_slice(object.strip_suffix('}').unwrap_or(object).as_bytes());
        self.seq += 1;
        out.extend_from_slice(format!(",\"seq\":{}", self.seq).as_bytes());
        self.chain = self.chain.over(&[&out[from..], b"}"]);
        let end = format!(",\"chain\":\"{}\"}}\n", self.chain);
        out.extend_from_slice(end.as_bytes());
    }
}

/// A line that has a number and a hash, rightly or not.
#[derive(Clone, Copy, Debug)]
pub struct Sealed<'a> {
    /// What it says of itself.
    pub head: Head,
    /// The line without its hash and the closing brace.
    text: &'a [u8],
}

impl<'a> Sealed<'a> {
    /// Reads a line without its end.
    #[must_use]
    pub fn read(line: &'a [u8]) -> Option<Self> {
        let (rest, digits) = line.strip_suffix(b"\"}")?.split_last_chunk::<64>()?;
        let text = rest.strip_suffix(b",\"chain\":\"")?;
        let chain = Hash::read(digits)?;
        let number = text.iter().rposition(|byte| !byte.is_ascii_digit())? + 1;
        let (before, number) = text.split_at(number);
        if !before.ends_with(b",\"seq\":") {
            return None;
        }
        let seq = std::str::from_utf8(number).ok()?.parse().ok()?;
        Some(Self {
            head: Head { seq, chain },
            text,
        })
    }

    /// Is its text what was written behind a line with that hash?
    #[must_use]
    pub fn follows(&self, before: Hash) -> bool {
        self.after(before) == self.head.chain
    }

    /// The hash that it should have behind a line with that one.
    #[must_use]
    pub fn after(&self, before: Hash) -> Hash {
        before.over(&[self.text, b"}"])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_is_what_sha256sum_says_of_the_one_before_and_the_line_without_its_own() {
        let (mut head, mut out) = (Head::GENESIS, Vec::new());
        head.seal(r#"{"a":1}"#, &mut out);
        // printf '%064d%s' 0 '{"a":1,"seq":1}' | sha256sum
        let expected = "48b0ff626f59ed6951f80cb4b8d8a9c7a606ff20df9570478a259ce9ee3543fd";
        assert_eq!(head.chain.to_string(), expected);
        let line = format!("{{\"a\":1,\"seq\":1,\"chain\":\"{expected}\"}}\n");
        assert_eq!(String::from_utf8(out).unwrap(), line);
        let sealed = Sealed::read(line.trim_end().as_bytes()).unwrap();
        assert_eq!(sealed.head, head);
        assert!(sealed.follows(Hash::GENESIS) && !sealed.follows(head.chain));
    }

    #[test]
    fn a_line_without_number_or_hash_is_not_sealed() {
        let chain = "0".repeat(64);
        for line in [
            String::new(),
            r#"{"a":1,"mode":"observe"}"#.to_owned(),
            format!("{{\"a\":1,\"chain\":\"{chain}\"}}"),
            format!("{{\"a\":1,\"seq\":,\"chain\":\"{chain}\"}}"),
            format!("{{\"a\":1,\"seq\":99999999999999999999,\"chain\":\"{chain}\"}}"),
            format!("{{\"a\":1,\"seq\":1,\"chain\":\"{}\"}}", "A".repeat(64)),
            format!("{{\"a\":1,\"seq\":1,\"chain\":\"{chain}\"}} "),
        ] {
            assert!(Sealed::read(line.as_bytes()).is_none(), "{line}");
        }
    }
}
