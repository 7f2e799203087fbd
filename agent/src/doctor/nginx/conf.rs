//! Nginx's configuration, read as Nginx reads it: words, quotes, blocks and includes.
//!
//! Not by `nginx -T`: that makes log files, temporary folders and a pid file where there are none.

use std::{
    fs,
    path::{Component, Path, PathBuf},
};

use super::identity;

/// Bounds: of a file, of files, of includes in includes, of blocks in blocks.
const LONGEST: u64 = 4 << 20;
const FILES: usize = 2000;
const DEEPEST: usize = 64;

/// A directive, with what is in its block.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Directive {
    pub(super) name: String,
    pub(super) args: Vec<String>,
    pub(super) block: Vec<Directive>,
    /// `file:line`
    pub(super) place: String,
}

impl Directive {
    /// Those of a name in its block.
    pub(super) fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Self> {
        self.block
            .iter()
            .filter(move |directive| directive.name == name)
    }
}

/// Reads a configuration and all that it includes. `root` is the root folder of the Nginx that it belongs to.
///
/// An include of `own`, the file that the agent writes bans to, stays a directive: what it says is none, can be very long, and
/// before the agent's first start it is not there.
///
/// # Errors
/// One sentence: which file cannot be read, or where it makes no sense.
pub(super) fn read(
    root: &Path,
    path: &Path,
    own: Option<&Path>,
) -> Result<(Directive, usize), String> {
    let mut files = Files {
        root,
        own,
        folder: path.parent().unwrap_or(Path::new("/")),
        read: 0,
    };
    let block = files.file(path, 0)?;
    Ok((
        Directive {
            block,
            ..Directive::default()
        },
        files.read,
    ))
}

struct Files<'a> {
    root: &'a Path,
    own: Option<&'a Path>,
    folder: &'a Path,
    read: usize,
}

impl Files<'_> {
    fn file(&mut self, path: &Path, depth: usize) -> Result<Vec<Directive>, String> {
        let shown = path.display();
        self.read += 1;
        if self.read > FILES || depth > DEEPEST {
            return Err(format!("{shown}: too many files are included"));
        }
        let real = below(self.root, path);
        let metadata =
            fs::metadata(&real).map_err(|error| format!("cannot read {shown}: {error}"))?;
        if !metadata.is_file() || metadata.len() > LONGEST {
            return Err(format!("{shown} is no configuration file"));
        }
        let bytes = fs::read(&real).map_err(|error| format!("cannot read {shown}: {error}"))?;
        let tokens = tokens(&String::from_utf8_lossy(&bytes))
            .map_err(|(line, why)| format!("{shown}:{line}: {why}"))?;
        let parsed = parse(&mut tokens.into_iter(), &shown.to_string(), 0)?;
        self.include(parsed, depth)
    }

    fn include(&mut self, block: Vec<Directive>, depth: usize) -> Result<Vec<Directive>, String> {
        let mut all = Vec::with_capacity(block.len());
        for mut directive in block {
            match directive.args.first() {
                Some(pattern) if directive.name == "include" => {
                    let pattern = self.folder.join(pattern);
                    let mut paths = expand(self.root, &pattern);
                    // It will be among them once it is there.
                    let to_come = self.own.filter(|own| !own.exists() && fits(&pattern, own));
                    paths.extend(to_come.map(Path::to_owned));
                    for path in paths {
                        if self.own.is_some_and(|own| is(self.root, &path, own)) {
                            all.push(Directive {
                                args: vec![path.to_string_lossy().into_owned()],
                                block: Vec::new(),
                                ..directive.clone()
                            });
                        } else {
                            all.append(&mut self.file(&path, depth + 1)?);
                        }
                    }
                }
                _ => {
                    directive.block =
                        self.include(std::mem::take(&mut directive.block), depth + 1)?;
                    all.push(directive);
                }
            }
        }
        Ok(all)
    }
}

/// A path as it is seen from outside of the root that it belongs to.
pub(super) fn below(root: &Path, path: &Path) -> PathBuf {
    if root == Path::new("/") {
        path.to_owned()
    } else {
        root.join(path.strip_prefix("/").unwrap_or(path))
    }
}

/// Is a path of an Nginx with this root folder that file of ours, by its name or in fact?
pub(super) fn is(root: &Path, path: &Path, file: &Path) -> bool {
    let there = below(root, path);
    let same = || identity(&there).is_some_and(|there| identity(file) == Some(there));
    (root == Path::new("/") && path.components().eq(file.components())) || same()
}

/// Does a pattern with wildcards name this file, should it come to be?
fn fits(pattern: &Path, file: &Path) -> bool {
    let parts = || pattern.components().zip(file.components());
    is_wild(&pattern.to_string_lossy())
        && pattern.components().count() == file.components().count()
        && parts().all(|(pattern, name)| {
            let name = name.as_os_str().as_encoded_bytes();
            matches(pattern.as_os_str().as_encoded_bytes(), name)
        })
}

fn is_wild(text: &str) -> bool {
    text.contains(['*', '?', '['])
}

/// The files that a pattern names, in the order of their names. A pattern without wildcards names one, there or not.
fn expand(root: &Path, pattern: &Path) -> Vec<PathBuf> {
    if !is_wild(&pattern.to_string_lossy()) {
        return vec![pattern.to_owned()];
    }
    let mut found = vec![PathBuf::from("/")];
    for component in pattern.components() {
        let Component::Normal(part) = component else {
            continue;
        };
        let part = part.to_string_lossy();
        let mut next = Vec::new();
        for path in found {
            if !is_wild(&part) {
                next.push(path.join(part.as_ref()));
                continue;
            }
            let entries = fs::read_dir(below(root, &path))
                .into_iter()
                .flatten()
                .flatten()
                .take(FILES);
            let mut names: Vec<_> = entries
                .filter_map(|entry| entry.file_name().into_string().ok())
                .collect();
            names.sort_unstable();
            let fits = |name: &String| {
                matches(part.as_bytes(), name.as_bytes())
                    && (!name.starts_with('.') || part.starts_with('.'))
            };
            next.extend(names.into_iter().filter(fits).map(|name| path.join(name)));
        }
        found = next;
    }
    found.retain(|path| below(root, path).exists());
    found
}

/// Does a name fit a pattern with `*` and `?`? Sets in brackets are taken for any one byte, as near as need be.
pub(super) fn matches(pattern: &[u8], name: &[u8]) -> bool {
    let (mut p, mut n) = (0, 0);
    // Where to go on when it does not fit: after the newest star, which takes one byte more.
    let mut retry = None;
    while n < name.len() {
        let step = match pattern.get(p) {
            Some(b'*') => {
                retry = Some((p, n));
                p += 1;
                continue;
            }
            Some(b'?') => Some(1),
            Some(b'[') => pattern[p..]
                .iter()
                .position(|byte| *byte == b']')
                .map(|end| end + 1),
            Some(byte) if *byte == name[n] => Some(1),
            _ => None,
        };
        match (step, retry) {
            (Some(step), _) => {
                p += step;
                n += 1;
            }
            (None, Some((star, taken))) => {
                (p, n) = (star + 1, taken + 1);
                retry = Some((star, taken + 1));
            }
            (None, None) => return false,
        }
    }
    pattern[p..].iter().all(|byte| *byte == b'*')
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Word(String, usize),
    End,
    Open,
    Close,
}

/// Words, `;`, `{` and `}`, or the line where they end in nothing.
fn tokens(text: &str) -> Result<Vec<Token>, (usize, &'static str)> {
    let mut tokens = Vec::new();
    let mut chars = text.chars().peekable();
    let mut line = 1;
    while let Some(c) = chars.next() {
        match c {
            '\n' => line += 1,
            c if c.is_ascii_whitespace() => {}
            ';' => tokens.push(Token::End),
            '}' => tokens.push(Token::Close),
            '{' => {
                tokens.push(Token::Open);
                if opens_code(&tokens) {
                    // Lua: braces in it are in balance, or Nginx would not take it.
                    let mut depth = 1_usize;
                    for c in chars.by_ref() {
                        match c {
                            '\n' => line += 1,
                            '{' => depth += 1,
                            '}' => depth -= 1,
                            _ => {}
                        }
                        if depth == 0 {
                            break;
                        }
                    }
                    if depth > 0 {
                        return Err((line, "a block of code does not end"));
                    }
                    tokens.push(Token::Close);
                }
            }
            '#' => while chars.next_if(|c| *c != '\n').is_some() {},
            quote @ ('"' | '\'') => {
                let (start, mut word, mut closed) = (line, String::new(), false);
                while let Some(c) = chars.next() {
                    line += usize::from(c == '\n');
                    match c {
                        c if c == quote => {
                            closed = true;
                            break;
                        }
                        '\\' => unescape(&mut word, chars.next()),
                        c => word.push(c),
                    }
                }
                if !closed {
                    return Err((start, "a quoted text does not end"));
                }
                tokens.push(Token::Word(word, start));
            }
            first => {
                let mut word = String::new();
                let mut next = Some(first);
                while let Some(c) = next {
                    match c {
                        '\\' => unescape(&mut word, chars.next()),
                        c => word.push(c),
                    }
                    let after_dollar = c == '$';
                    next = chars.next_if(|c| match c {
                        // `${name}`
                        '{' => after_dollar,
                        ';' => false,
                        c => !c.is_ascii_whitespace(),
                    });
                }
                tokens.push(Token::Word(word, line));
            }
        }
    }
    Ok(tokens)
}

/// Nginx takes the backslash away before these only.
fn unescape(word: &mut String, escaped: Option<char>) {
    match escaped {
        Some('n') => word.push('\n'),
        Some('r') => word.push('\r'),
        Some('t') => word.push('\t'),
        Some(c @ ('"' | '\'' | '\\')) => word.push(c),
        Some(c) => {
            word.push('\\');
            word.push(c);
        }
        None => word.push('\\'),
    }
}

/// Does what was opened just now hold code in another language?
fn opens_code(tokens: &[Token]) -> bool {
    let before = &tokens[..tokens.len().saturating_sub(1)];
    let start = before
        .iter()
        .rposition(|token| !matches!(token, Token::Word(..)))
        .map_or(0, |at| at + 1);
    matches!(before.get(start), Some(Token::Word(name, _)) if name.ends_with("_by_lua_block"))
}

fn parse(
    tokens: &mut std::vec::IntoIter<Token>,
    file: &str,
    depth: usize,
) -> Result<Vec<Directive>, String> {
    let mut block = Vec::new();
    let mut words: Vec<String> = Vec::new();
    let mut place = String::new();
    if depth > DEEPEST {
        return Err(format!("{file}: too many blocks in blocks"));
    }
    while let Some(token) = tokens.next() {
        match token {
            Token::Word(word, line) => {
                if words.is_empty() {
                    place = format!("{file}:{line}");
                }
                words.push(word);
            }
            Token::End | Token::Open if words.is_empty() => {
                return Err(format!("{file}: a directive without a name after {place}"));
            }
            token @ (Token::End | Token::Open) => {
                let name = words.remove(0);
                block.push(Directive {
                    name,
                    args: std::mem::take(&mut words),
                    block: if token == Token::Open {
                        parse(tokens, file, depth + 1)?
                    } else {
                        Vec::new()
                    },
                    place: place.clone(),
                });
            }
            Token::Close if depth > 0 && words.is_empty() => return Ok(block),
            Token::Close => return Err(format!("{file}: a brace too many after {place}")),
        }
    }
    if depth > 0 || !words.is_empty() {
        return Err(format!("{file}: it ends in the middle, after {place}"));
    }
    Ok(block)
}

/// Parses one text, without includes.
#[cfg(test)]
pub(super) fn parse_text(text: &str) -> Result<Directive, String> {
    let tokens = tokens(text).map_err(|(line, why)| format!("test:{line}: {why}"))?;
    Ok(Directive {
        block: parse(&mut tokens.into_iter(), "test", 0)?,
        ..Directive::default()
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn words_quotes_comments_and_blocks_are_read_as_nginx_does() {
        let text = "http { # a comment; with { signs\n  log_format a escape=json '{\"x\":\"$y\"}'\n 'it''s' \"a\\\"b\" c\\d;\n\
                    server{listen 80;} if ($a ~ \"}\") { return 404; }\n  set $x ${y}z#w; }";
        let root = parse_text(text).unwrap();
        let http = &root.block[0];
        let format = http.all("log_format").next().unwrap();
        assert_eq!(
            format.args,
            [
                "a",
                "escape=json",
                "{\"x\":\"$y\"}",
                "it",
                "s",
                "a\"b",
                "c\\d"
            ]
        );
        assert_eq!(format.place, "test:2");
        let names: Vec<_> = http
            .block
            .iter()
            .map(|directive| directive.name.as_str())
            .collect();
        assert_eq!(names, ["log_format", "server", "if", "set"]);
        assert_eq!(http.all("set").next().unwrap().args, ["$x", "${y}z#w"]);
    }

    #[test]
    fn code_in_another_language_is_left_alone() {
        let text =
            "http { content_by_lua_block { local t = { a = \"it's\" } -- '\n } access_log off; }";
        let root = parse_text(text).unwrap();
        assert_eq!(root.block[0].all("access_log").count(), 1);
    }

    #[test]
    fn what_makes_no_sense_says_where() {
        for (text, expected) in [
            ("a 'b", "test:1"),
            ("a {", "ends in the middle"),
            ("a; }", "a brace too many"),
            ("a", "ends in the middle"),
            ("; ", "without a name"),
            ("x_by_lua_block { {", "does not end"),
        ] {
            let error = parse_text(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
        assert!(
            parse_text(&"a {".repeat(100_000))
                .unwrap_err()
                .contains("too many")
        );
    }

    #[test]
    fn includes_are_followed_in_order_and_within_bounds() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        fs::create_dir(dir.path().join("sites")).unwrap();
        write("nginx.conf", "http { include sites/*.conf; include one; }");
        write("one", "one;");
        write("sites/b.conf", "b;");
        write("sites/a.conf", "a;");
        write("sites/.hidden.conf", "hidden;");
        write("sites/a.conf~", "backup;");
        let (root, files) = read(Path::new("/"), &dir.path().join("nginx.conf"), None).unwrap();
        let names: Vec<_> = root.block[0]
            .block
            .iter()
            .map(|directive| directive.name.as_str())
            .collect();
        assert_eq!((names, files), (vec!["a", "b", "one"], 4));
        // As seen from outside of a container.
        let (inside, _) = read(dir.path(), Path::new("/nginx.conf"), None).unwrap();
        assert_eq!(inside.block[0].block.len(), 3);

        write("loop", "include loop;");
        assert!(
            read(Path::new("/"), &dir.path().join("loop"), None)
                .unwrap_err()
                .contains("too many")
        );
        write("missing", "include nothing.conf;");
        assert!(
            read(Path::new("/"), &dir.path().join("missing"), None)
                .unwrap_err()
                .contains("cannot read")
        );
    }

    #[test]
    fn the_agent_s_own_file_is_found_and_not_read_be_it_there_or_not() {
        let dir = tempfile::tempdir().unwrap();
        let own = dir.path().join("conf.d/banned.conf");
        fs::create_dir(dir.path().join("conf.d")).unwrap();
        let included = |text: &str| {
            fs::write(dir.path().join("nginx.conf"), text).unwrap();
            let (root, _) = read(
                Path::new("/"),
                &dir.path().join("nginx.conf"),
                Some(own.as_path()),
            )
            .unwrap();
            let names = root.block[0].block.iter();
            names
                .map(|directive| (directive.name.clone(), directive.args.clone()))
                .collect::<Vec<_>>()
        };
        let itself = [(
            "include".to_owned(),
            vec![own.to_string_lossy().into_owned()],
        )];
        for there in [false, true] {
            if there {
                fs::write(&own, "{{{").unwrap();
            }
            for pattern in [
                "conf.d/banned.conf",
                "conf.d/*.conf",
                &own.to_string_lossy(),
            ] {
                let text = format!("http {{ include {pattern}; }}");
                assert_eq!(included(&text), itself, "{pattern} {there}");
            }
            assert_eq!(
                included("http { include conf.d/*.txt; include *.d/x*; }"),
                []
            );
        }
        // As a container has it under another name.
        let (root, _) = {
            fs::write(
                dir.path().join("nginx.conf"),
                "include /conf.d/banned.conf;",
            )
            .unwrap();
            read(dir.path(), Path::new("/nginx.conf"), Some(own.as_path())).unwrap()
        };
        assert_eq!(root.block[0].args, ["/conf.d/banned.conf"]);
    }

    #[test]
    fn wildcards_match() {
        for (pattern, name, fits) in [
            ("*.conf", "a.conf", true),
            ("*.conf", "a.conf~", false),
            ("a?c*", "abcd", true),
            ("*a*b*", "xxaxxbxx", true),
            ("*a*b", "xxaxxbxx", false),
            ("[0-9]*.log", "7x.log", true),
            ("[", "x", false),
            ("", "", true),
            ("", "x", false),
        ] {
            assert_eq!(
                matches(pattern.as_bytes(), name.as_bytes()),
                fits,
                "{pattern} {name}"
            );
        }
    }

    proptest! {
        #[test]
        fn any_text_at_all_is_survived(text in "[a-z'\"{};#$\\\\ \n]{0,200}") {
            drop(parse_text(&text));
        }
    }
}
