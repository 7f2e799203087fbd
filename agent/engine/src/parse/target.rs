//! What a request asked for, as far as the detector looks at it: which path, and of what kind.

use std::hash::{BuildHasher as _, Hasher as _};

use foldhash::fast::FixedState;
use memchr::{memchr, memchr2, memrchr};

use super::Method;

/// What a request asked for. Paths are attackers' words: they are told apart by a keyed hash, and never kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// Hash of the path without its query.
    pub path: u32,
    /// Of what kind it is.
    pub kind: Kind,
}

/// Kinds of paths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// What a person or a program asks for.
    Page,
    /// What a browser fetches with a page: style sheets, scripts, images, fonts, media.
    Asset,
    /// What lies in a folder of such things, under any name.
    Filed,
    /// What browsers, phones and well-behaved robots ask for unbidden, be it there or not.
    Unbidden,
}

const ASSETS: [u64; 39] = words([
    b"aac", b"flac", b"m3u8", b"m4v", b"mov", b"mpd", b"mvt", b"opus", b"pbf", b"vtt", b"avif",
    b"bmp", b"css", b"eot", b"gif", b"ico", b"jpeg", b"jpg", b"js", b"jxl", b"m4a", b"m4s", b"mjs",
    b"mp3", b"mp4", b"mpeg", b"mpg", b"ogg", b"otf", b"png", b"svg", b"ts", b"ttf", b"wasm",
    b"webm", b"webp", b"woff", b"woff2", b"xbm",
]);

/// Folders that sites keep such things in, with or without an extension.
const FOLDERS: [u64; 23] = words([
    b"_next", b"assets", b"avatar", b"avatars", b"build", b"cdn", b"css", b"dist", b"font",
    b"fonts", b"image", b"images", b"img", b"imgs", b"js", b"media", b"photo", b"photos", b"pics",
    b"static", b"thumb", b"thumbs", b"uploads",
]);

/// Pages, wherever they lie.
const PAGES: [u64; 2] = words([b"html", b"htm"]);

/// Programs: nobody asks for these unbidden, wherever they are said to lie.
const PROGRAMS: [u64; 7] = words([b"php", b"asp", b"aspx", b"jsp", b"cgi", b"exe", b"sh"]);

const MAP: u64 = word(b"map");

/// How the names of what is asked for unbidden begin, and what they may end on.
const UNBIDDEN: [(&[u8], &[u64]); 9] = [
    (b"favicon", &words([b"ico", b"png", b"svg", b"gif"])),
    (b"apple-touch-icon", &words([b"png"])),
    (b"sitemap", &words([b"xml", b"gz"])),
    (b"browserconfig.xml", &words([b"xml"])),
    (b"manifest.json", &words([b"json"])),
    (b"site.webmanifest", &[0]),
    // What file managers look for in every folder.
    (b".ds_store", &[0]),
    (b"desktop.ini", &words([b"ini"])),
    (b"thumbs.db", &words([b"db"])),
];

impl Target {
    /// From a path with or without a query, or a whole `$request` (`GET /path HTTP/1.1`), as it stands in the log. `key` keeps
    /// clients from finding paths that pass for one another.
    #[must_use]
    pub fn of(text: &[u8], key: u64) -> Self {
        Self::of_path(parts(text).1, key)
    }

    fn of_path(path: &[u8], key: u64) -> Self {
        let end = memchr2(b'?', b'#', path);
        let path = &path[..end.unwrap_or(path.len())];
        Self {
            path: hash(path, key),
            kind: Kind::of(path),
        }
    }
}

/// The method, if there is one, and the path of what [`Target::of`] takes.
fn parts(text: &[u8]) -> (&[u8], &[u8]) {
    match word_of(text) {
        // A method has no slash and is followed by the path.
        (first, Some(rest)) if memchr(b'/', first).is_none() => (first, word_of(rest).0),
        (first, _) => (b"", first),
    }
}

/// Up to the first space, and what comes after it.
fn word_of(text: &[u8]) -> (&[u8], Option<&[u8]>) {
    memchr(b' ', text).map_or((text, None), |end| (&text[..end], text.get(end + 1..)))
}

/// What a log's field of the path holds, if it holds anything: the target, and the method where it is a whole `$request`.
pub(super) fn target(text: &[u8], key: u64) -> Option<(Target, Option<Method>)> {
    is_there(text).then(|| {
        let (first, path) = parts(text);
        (Target::of_path(path, key), method(first))
    })
}

/// The method that a log's field holds, if it holds any: by itself, or with the rest of a `$request`.
pub(super) fn method(text: &[u8]) -> Option<Method> {
    let word = word_of(text).0;
    is_there(word).then(|| Method::of(word))
}

/// Hash of the `User-Agent` that a log's field holds, if it holds any.
pub(super) fn agent(text: &[u8], key: u64) -> Option<u32> {
    is_there(text).then(|| hash(text, key))
}

/// Nginx writes one of the two where there is no value.
const fn is_there(text: &[u8]) -> bool {
    !matches!(text, b"" | b"-")
}

#[expect(clippy::cast_possible_truncation, reason = "half of a hash is a hash")]
fn hash(text: &[u8], key: u64) -> u32 {
    let mut hasher = FixedState::with_seed(key).build_hasher();
    hasher.write(text);
    let hash = hasher.finish();
    (hash ^ (hash >> 32)) as u32
}

impl Kind {
    fn of(path: &[u8]) -> Self {
        let name = memrchr(b'/', path).map_or(path, |slash| &path[slash + 1..]);
        let extension = memrchr(b'.', name).map_or(0, |dot| word(&name[dot + 1..]));
        if PROGRAMS.contains(&extension) || is_odd(path) {
            return Self::Page;
        }
        // The first byte tells most names, without a call.
        let is_one = |(text, extensions): &(&[u8], &[u64])| {
            name.first().map(u8::to_ascii_lowercase) == text.first().copied()
                && extensions.contains(&if extensions == &[0] { 0 } else { extension })
                && name
                    .get(..text.len())
                    .is_some_and(|head| head.eq_ignore_ascii_case(text))
        };
        let unbidden = extension == MAP
            || name.starts_with(b"._")
            || UNBIDDEN.iter().any(is_one)
            || path == b"/robots.txt"
            || path == b"/ads.txt"
            || path.starts_with(b"/.well-known/");
        if unbidden {
            Self::Unbidden
        } else if ASSETS.contains(&extension) {
            Self::Asset
        } else if !PAGES.contains(&extension) && !name.is_empty() && is_in_folder(path) {
            Self::Filed
        } else {
            Self::Page
        }
    }
}

/// Is it written as nobody writes a path to such a thing: with a way back, an escape or a double slash in it, or through a program?
/// Nginx may make another path of it.
fn is_odd(path: &[u8]) -> bool {
    let is_program = |folder: &[u8]| {
        memrchr(b'.', folder).is_some_and(|dot| PROGRAMS.contains(&word(&folder[dot + 1..])))
    };
    let mut folders = path
        .strip_prefix(b"/")
        .unwrap_or(path)
        .split(|byte| *byte == b'/');
    let escapes = |triple: &[u8]| {
        let [b'%', digits @ ..] = triple else {
            return false;
        };
        [b"2e", b"2f", b"5c", b"00"]
            .iter()
            .any(|odd| digits.eq_ignore_ascii_case(*odd))
    };
    memchr(b';', path).is_some()
        || memchr(b'%', path).is_some() && path.windows(3).any(escapes)
        || folders.any(|folder| folder == b".." || folder == b"." || is_program(folder))
        || path.windows(2).any(|pair| pair == b"//")
}

/// Is the first or the second folder one of those?
fn is_in_folder(path: &[u8]) -> bool {
    let mut rest = path.strip_prefix(b"/").unwrap_or(path);
    for _ in 0..2 {
        let Some(end) = memchr(b'/', rest) else {
            return false;
        };
        if FOLDERS.contains(&word(&rest[..end])) {
            return true;
        }
        rest = &rest[end + 1..];
    }
    false
}

/// Up to seven bytes in lower case, and how many, in one number, which is compared at once. 0 of more.
const fn word(text: &[u8]) -> u64 {
    if text.len() > 7 {
        return 0;
    }
    let (mut word, mut at) = (1, 0);
    while at < text.len() {
        word = word << 8 | text[at].to_ascii_lowercase() as u64;
        at += 1;
    }
    word
}

const fn words<const N: usize>(texts: [&[u8]; N]) -> [u64; N] {
    let (mut words, mut at) = ([0; N], 0);
    while at < N {
        words[at] = word(texts[at]);
        at += 1;
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_known_by_its_kind() {
        for (path, kind) in [
            ("/", Kind::Page),
            ("", Kind::Page),
            ("/index.html?x=/a.css", Kind::Page),
            ("/a/b.CSS?v=3", Kind::Asset),
            ("/logo.png#top", Kind::Asset),
            ("/apple-touch-icon-120x120-precomposed.png", Kind::Unbidden),
            ("/favicon.ico", Kind::Unbidden),
            ("/robots.txt", Kind::Unbidden),
            ("/a/robots.txt", Kind::Page),
            ("/app.js.map", Kind::Unbidden),
            ("/.well-known/security.txt", Kind::Unbidden),
            ("/.well-known/shell.php", Kind::Page),
            ("/favicon.php", Kind::Page),
            ("/png", Kind::Page),
            ("/image/60844/productModel/200x200", Kind::Filed),
            ("/shop/Static/x", Kind::Filed),
            ("/js/../login", Kind::Page),
            ("/js/%2e%2e/login.css", Kind::Page),
            ("/js//login.css", Kind::Page),
            ("/wp-login.php/x.css", Kind::Page),
            ("/login;x.css", Kind::Page),
            ("/a%20b.png", Kind::Asset),
            ("/sitemap1.php.bak", Kind::Page),
            ("/sitemap-posts.xml.gz", Kind::Unbidden),
            ("/favicon-32x32.png", Kind::Unbidden),
            ("/favicon.zip", Kind::Page),
            ("/dav/._notes.txt", Kind::Unbidden),
            ("/dav/.DS_Store", Kind::Unbidden),
            ("/live/stream.m3u8?x=1", Kind::Asset),
            ("/images", Kind::Page),
            ("/images/", Kind::Page),
            ("/images/tour.html", Kind::Page),
            ("/static/shell.php", Kind::Page),
            ("/shop/a/static/x", Kind::Page),
            ("/a.png/b", Kind::Page),
            ("GET /x.js HTTP/1.1", Kind::Asset),
            ("GET /x y.js HTTP/1.1", Kind::Page),
            ("/x.", Kind::Page),
            ("/x.\0js", Kind::Page),
            ("/x.wooooooff", Kind::Page),
            ("/x.woff2", Kind::Asset),
            ("/SiteMap-3.xml.gz", Kind::Unbidden),
            ("GET ", Kind::Page),
        ] {
            assert_eq!(Target::of(path.as_bytes(), 0).kind, kind, "{path}");
        }
    }

    #[test]
    fn a_whole_request_says_its_method_and_a_path_says_none() {
        for (text, expected) in [
            ("GET /x HTTP/1.1", Some(Method::Safe)),
            ("GET ", Some(Method::Safe)),
            ("POST /x y HTTP/1.1", Some(Method::Unsafe)),
            ("get /x", Some(Method::Unsafe)),
            ("GET", None),
            ("/GET /x", None),
            ("- /x", None),
            (" /x", None),
        ] {
            let (target, method) = target(text.as_bytes(), 7).unwrap();
            assert_eq!(method, expected, "{text}");
            assert_eq!(target, Target::of(text.as_bytes(), 7));
        }
        assert_eq!((target(b"", 7), target(b"-", 7)), (None, None));
    }

    #[test]
    fn a_method_is_the_first_word_of_its_field() {
        for (text, expected) in [
            ("GET", Some(Method::Safe)),
            ("PROPFIND", Some(Method::Safe)),
            ("GET /x HTTP/1.1", Some(Method::Safe)),
            ("PATCH", Some(Method::Unsafe)),
            ("\u{16}\u{3}\u{1}", Some(Method::Unsafe)),
            ("", None),
            ("-", None),
            (" /x", None),
        ] {
            assert_eq!(method(text.as_bytes()), expected, "{text}");
        }
    }

    #[test]
    fn a_path_is_the_same_with_any_query_and_another_key_hashes_it_anew() {
        let of = |text: &str, key| Target::of(text.as_bytes(), key).path;
        assert_eq!(of("/a?x=1", 7), of("/a?x=2", 7));
        assert_eq!(of("POST /a?x=1 HTTP/1.1", 7), of("/a", 7));
        assert_ne!(of("/a", 7), of("/b", 7));
        assert_ne!(of("/a", 7), of("/a", 8));
    }
}
