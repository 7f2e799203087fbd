//! Reads declared keys out of a TOML table, and keeps what was declared, what was wrong and what was left over.

use std::{fmt::Write as _, ops::RangeInclusive, path::PathBuf};

use toml::{Table, Value};

/// See the module's documentation. A key that cannot be read has its default, so that reading goes on and every problem
/// is found.
pub(super) struct Reader {
    root: Table,
    section: String,
    /// Dotted names of everything declared: for suggestions.
    declared: Vec<String>,
    sections: Vec<String>,
    problems: Vec<String>,
    documentation: String,
}

impl Reader {
    pub(super) fn new(root: Table) -> Self {
        Self {
            root,
            section: String::new(),
            declared: Vec::new(),
            sections: Vec::new(),
            problems: Vec::new(),
            documentation: String::new(),
        }
    }

    /// The keys that follow are in this section.
    pub(super) fn section(&mut self, name: &str, doc: &str) {
        name.clone_into(&mut self.section);
        self.sections.push(name.to_owned());
        self.comment(doc, "\n");
        let _ = writeln!(self.documentation, "[{name}]");
    }

    pub(super) fn problem(&mut self, problem: String) {
        self.problems.push(problem);
    }

    /// What was wrong, unknown keys included, and the documented file.
    pub(super) fn finish(mut self) -> (Vec<String>, String) {
        let root = std::mem::take(&mut self.root);
        self.leftovers("", &root);
        (self.problems, self.documentation)
    }

    /// A whole number.
    pub(super) fn whole(
        &mut self,
        key: &str,
        default: u32,
        range: RangeInclusive<u32>,
        doc: &str,
    ) -> u32 {
        let value = self.take(key, &default.to_string(), doc);
        let wanted = format!(
            "must be a whole number from {} to {}",
            range.start(),
            range.end()
        );
        self.checked(key, value, default, &wanted, |value| {
            u32::try_from(value.as_integer()?)
                .ok()
                .filter(|number| range.contains(number))
        })
    }

    /// A number with a fraction; a whole one will do.
    pub(super) fn number(
        &mut self,
        key: &str,
        default: f64,
        range: RangeInclusive<f64>,
        doc: &str,
    ) -> f64 {
        let value = self.take(key, &format!("{default:?}"), doc);
        let wanted = format!("must be from {} to {}", range.start(), range.end());
        self.checked(key, value, default, &wanted, |value| {
            let number = value
                .as_float()
                .or_else(|| Some(value.as_integer()? as f64))?;
            Some(number).filter(|number| range.contains(number))
        })
    }

    /// A yes or no.
    pub(super) fn switch(&mut self, key: &str, default: bool, doc: &str) -> bool {
        let value = self.take(key, &default.to_string(), doc);
        self.checked(key, value, default, "must be true or false", Value::as_bool)
    }

    /// One of a few words; the first is the default.
    pub(super) fn choice<T: Copy>(&mut self, key: &str, choices: &[(&str, T)], doc: &str) -> T {
        let value = self.take(key, &format!("{:?}", choices[0].0), doc);
        let words: Vec<String> = choices
            .iter()
            .map(|(word, _)| format!("{word:?}"))
            .collect();
        let wanted = format!("must be {}", words.join(" or "));
        self.checked(key, value, choices[0].1, &wanted, |value| {
            let text = value.as_str()?;
            choices
                .iter()
                .find(|(word, _)| *word == text)
                .map(|(_, choice)| *choice)
        })
    }

    /// An absolute path.
    pub(super) fn path(&mut self, key: &str, default: &str, doc: &str) -> PathBuf {
        let value = self.take(key, &format!("{default:?}"), doc);
        self.checked(
            key,
            value,
            PathBuf::from(default),
            "must be an absolute path",
            |value| {
                value
                    .as_str()
                    .map(PathBuf::from)
                    .filter(|path| path.is_absolute())
            },
        )
    }

    /// An absolute path, or nothing.
    pub(super) fn optional_path(&mut self, key: &str, doc: &str) -> Option<PathBuf> {
        let value = self.take(key, "\"\"", doc);
        self.checked(
            key,
            value,
            None,
            "must be an absolute path, or empty",
            |value| match value.as_str()? {
                "" => Some(None),
                path => Some(Some(PathBuf::from(path)))
                    .filter(|path| path.as_ref().is_some_and(|path| path.is_absolute())),
            },
        )
    }

    /// A text, or nothing.
    pub(super) fn optional_text(&mut self, key: &str, doc: &str) -> Option<String> {
        let value = self.take(key, "\"\"", doc);
        let text = self.checked(key, value, String::new(), "must be a text", |value| {
            Some(value.as_str()?.to_owned())
        });
        Some(text).filter(|text| !text.is_empty())
    }

    /// A text that is not empty.
    pub(super) fn text(&mut self, key: &str, default: &str, doc: &str) -> String {
        let value = self.take(key, &format!("{default:?}"), doc);
        self.checked(
            key,
            value,
            default.to_owned(),
            "must be a text that is not empty",
            |value| {
                value
                    .as_str()
                    .filter(|text| !text.is_empty())
                    .map(str::to_owned)
            },
        )
    }

    /// A list of texts, each of which is read by `parse`; a single text will do.
    pub(super) fn list<T>(
        &mut self,
        key: &str,
        default: &[&str],
        doc: &str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Vec<T> {
        let value = self.take(key, &format!("{default:?}"), doc);
        let default = || {
            default
                .iter()
                .map(|text| (*text).to_owned())
                .collect::<Vec<_>>()
        };
        let texts =
            self.checked(
                key,
                value,
                default(),
                "must be a list of texts",
                |value| match value {
                    Value::String(text) => Some(vec![text.clone()]),
                    value => value
                        .as_array()?
                        .iter()
                        .map(|item| item.as_str().map(str::to_owned))
                        .collect(),
                },
            );
        let mut items = Vec::with_capacity(texts.len());
        for text in texts {
            match parse(&text) {
                Ok(item) => items.push(item),
                Err(problem) => {
                    let name = self.dotted(key);
                    self.problems.push(format!("{name}: {text:?} {problem}"));
                }
            }
        }
        items
    }

    fn checked<T>(
        &mut self,
        key: &str,
        value: Option<Value>,
        default: T,
        wanted: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> T {
        let Some(value) = value else { return default };
        if let Some(read) = read(&value) {
            return read;
        }
        let name = self.dotted(key);
        self.problems.push(format!("{name} = {value} {wanted}"));
        default
    }

    /// Takes a key out of the table and writes it into the documentation.
    fn take(&mut self, key: &str, default: &str, doc: &str) -> Option<Value> {
        self.declared.push(self.dotted(key));
        self.comment(doc, if self.section.is_empty() { "\n" } else { "" });
        let _ = writeln!(self.documentation, "{key} = {default}");
        let section = self.section.clone();
        let parts = section.split('.').filter(|part| !part.is_empty());
        let mut table = &mut self.root;
        for part in parts {
            table = table.get_mut(part)?.as_table_mut()?;
        }
        table.remove(key)
    }

    fn dotted(&self, key: &str) -> String {
        if self.section.is_empty() {
            key.to_owned()
        } else {
            format!("{}.{key}", self.section)
        }
    }

    fn comment(&mut self, doc: &str, before: &str) {
        self.documentation.push_str(before);
        let mut line = String::from("#");
        for word in doc.split_whitespace() {
            if line.chars().count() + word.chars().count() > 110 {
                let _ = writeln!(self.documentation, "{line}");
                line = String::from("#");
            }
            line.push(' ');
            line.push_str(word);
        }
        let _ = writeln!(self.documentation, "{line}");
    }

    fn leftovers(&mut self, prefix: &str, table: &Table) {
        for (key, value) in table {
            let name = if prefix.is_empty() {
                key.clone()
            } else {
                format!("{prefix}.{key}")
            };
            let inside = format!("{name}.");
            match value {
                Value::Table(inner)
                    if self
                        .sections
                        .iter()
                        .any(|s| *s == name || s.starts_with(&inside)) =>
                {
                    self.leftovers(&name, inner);
                }
                Value::Table(_) => {
                    let hint = suggestion(&name, &self.sections);
                    self.problems.push(format!("unknown section {name}{hint}"));
                }
                _ => {
                    let hint = suggestion(&name, &self.declared);
                    self.problems.push(format!("unknown key {name}{hint}"));
                }
            }
        }
    }
}

/// The declared name that a mistyped one is closest to.
fn suggestion(name: &str, declared: &[String]) -> String {
    let closest = declared
        .iter()
        .map(|other| (strsim::jaro_winkler(name, other), other));
    match closest.max_by(|a, b| a.0.total_cmp(&b.0)) {
        Some((likeness, other)) if likeness > 0.9 => format!(" (is {other} meant?)"),
        _ => String::new(),
    }
}
