//! What a request asked for, as far as the detector looks at it: which path, and of what kind.

use std::hash::{BuildHasher as _, Hasher as _};

use foldhash::fast::FixedState;

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
    /// What browsers, phones and well-behaved robots ask for unbidden, be it there or not.
    Unbidden,
}

const ASSETS: [&[u8]; 29] = [
    b"avif", b"bmp", b"css", b"eot", b"gif", b"ico", b"jpeg", b"jpg", b"js", b"jxl", b"m4a",
    b"m4s", b"mjs", b"mp3", b"mp4", b"mpeg", b"mpg", b"ogg", b"otf", b"png", b"svg", b"ts", b"ttf",
    b"wasm", b"webm", b"webp", b"woff", b"woff2", b"xbm",
];

/// Folders that sites keep such things in, with or without an extension.
const FOLDERS: [&[u8]; 24] = [
    b"_next",
    b"assets",
    b"avatar",
    b"avatars",
    b"build",
    b"cdn",
    b"css",
    b"dist",
    b"font",
    b"fonts",
    b"image",
    b"images",
    b"img",
    b"imgs",
    b"js",
    b"media",
    b"photo",
    b"photos",
    b"pics",
    b"static",
    b"thumb",
    b"thumbnails",
    b"thumbs",
    b"uploads",
];

/// Programs: nobody asks for these unbidden, wherever they are said to lie.
const PROGRAMS: [&[u8]; 7] = [b"php", b"asp", b"aspx", b"jsp", b"cgi", b"exe", b"sh"];

impl Target {
    /// From a path with or without a query, or a whole `$request` (`GET /path HTTP/1.1`), as it stands in the log. `key` keeps
    /// clients from finding paths that pass for one another.
    #[must_use]
    pub fn of(text: &[u8], key: u64) -> Self {
        let mut words = text.split(|byte| *byte == b' ');
        let (first, second) = (words.next().unwrap_or_default(), words.next());
        // A method has no slash and is followed by the path.
        let path = match second {
            Some(second) if !first.contains(&b'/') => second,
            _ => first,
        };
        let end = path.iter().position(|byte| matches!(byte, b'?' | b'#'));
        let path = &path[..end.unwrap_or(path.len())];
        let mut hasher = FixedState::with_seed(key).build_hasher();
        hasher.write(path);
        let hash = hasher.finish();
        Self {
            #[expect(clippy::cast_possible_truncation, reason = "half of a hash is a hash")]
            path: (hash ^ (hash >> 32)) as u32,
            kind: Kind::of(path),
        }
    }
}

impl Kind {
    fn of(path: &[u8]) -> Self {
        let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
        let dot = name.iter().rposition(|byte| *byte == b'.');
        let extension = dot.map_or(&[][..], |dot| &name[dot + 1..]);
        let is = |known: &[&[u8]]| known.iter().any(|one| extension.eq_ignore_ascii_case(one));
        if is(&PROGRAMS) {
            return Self::Page;
        }
        let begins = |text: &[u8]| {
            name.get(..text.len())
                .is_some_and(|head| head.eq_ignore_ascii_case(text))
        };
        let unbidden = begins(b"favicon")
            || begins(b"apple-touch-icon")
            || begins(b"sitemap")
            || begins(b"browserconfig.xml")
            || begins(b"manifest.json")
            || begins(b"site.webmanifest")
            || path == b"/robots.txt"
            || path == b"/ads.txt"
            || path.starts_with(b"/.well-known/")
            || extension.eq_ignore_ascii_case(b"map");
        // What is called a page is one, whatever its folder.
        let is_in_folder = !matches!(extension, b"html" | b"htm") && !name.is_empty() && {
            let mut folders = path.split(|byte| *byte == b'/').skip(1);
            let first_two = [folders.next(), folders.next()];
            first_two.into_iter().flatten().any(|folder| {
                folder.len() < path.len().saturating_sub(1)
                    && FOLDERS
                        .iter()
                        .any(|known| folder.eq_ignore_ascii_case(known))
            })
        };
        if unbidden {
            Self::Unbidden
        } else if is(&ASSETS) || is_in_folder {
            Self::Asset
        } else {
            Self::Page
        }
    }
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
            ("/image/60844/productModel/200x200", Kind::Asset),
            ("/shop/Static/x", Kind::Asset),
            ("/images", Kind::Page),
            ("/images/", Kind::Page),
            ("/images/tour.html", Kind::Page),
            ("/static/shell.php", Kind::Page),
            ("/shop/a/static/x", Kind::Page),
            ("/a.png/b", Kind::Page),
            ("GET /x.js HTTP/1.1", Kind::Asset),
            ("GET /x y.js HTTP/1.1", Kind::Page),
        ] {
            assert_eq!(Target::of(path.as_bytes(), 0).kind, kind, "{path}");
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
