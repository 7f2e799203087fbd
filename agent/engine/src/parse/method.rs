//! Whether a request only asks, or is to change something.

/// As far as the detector looks at a request's method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// It only asks: a safe method (RFC 9110, section 9.2.1, and the IANA registry of methods).
    Safe,
    /// It is to change something, as a form that is sent does; or nobody knows it.
    Unsafe,
    /// It asks what may be asked, as browsers do by themselves: `OPTIONS`, or `TRACE`.
    Preflight,
}

/// Those that programs and people use.
const SAFE: [&[u8]; 5] = [b"GET", b"HEAD", b"PROPFIND", b"REPORT", b"SEARCH"];

impl Method {
    /// From the word that stands in the log.
    #[must_use]
    pub fn of(word: &[u8]) -> Self {
        if SAFE.contains(&word) {
            Self::Safe
        } else if matches!(word, b"OPTIONS" | b"TRACE") {
            Self::Preflight
        } else {
            Self::Unsafe
        }
    }
}
