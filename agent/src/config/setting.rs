//! Single settings given in place of what the configuration file says, as on a command line.

use std::{fmt, str::FromStr};

use toml::{Table, Value};

/// One of the configuration's keys, and its value.
#[derive(Clone, Debug, PartialEq)]
pub struct Setting {
    key: String,
    value: Value,
    /// How people gave it, for messages.
    given: String,
}

impl Setting {
    /// A setting that people give by a name of its own.
    #[must_use]
    pub fn text(option: &str, key: &str, value: &str) -> Self {
        Self {
            key: key.to_owned(),
            value: Value::String(value.to_owned()),
            given: option.to_owned(),
        }
    }

    /// A list that people give by a name of its own.
    #[must_use]
    pub fn list(option: &str, key: &str, values: Vec<String>) -> Self {
        Self {
            key: key.to_owned(),
            value: Value::Array(values.into_iter().map(Value::String).collect()),
            given: option.to_owned(),
        }
    }

    /// Puts it into a configuration. Whether there is such a key is found out when that is read.
    pub(super) fn apply(&self, root: &mut Table) -> Result<(), String> {
        let mut parts: Vec<&str> = self.key.split('.').collect();
        let last = parts.pop().unwrap_or_default();
        let mut table = root;
        for part in parts {
            let inner = table
                .entry(part)
                .or_insert_with(|| Value::Table(Table::new()));
            table = inner.as_table_mut().ok_or_else(|| {
                format!("{}: {part} is a key itself and has none in it", self.given)
            })?;
        }
        table.insert(last.to_owned(), self.value.clone());
        Ok(())
    }
}

/// `detect.z_score=4`: the value is TOML; what is none is a text.
impl FromStr for Setting {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let hint = "write key=value, such as detect.z_score=4 or bans.schedule='[\"5m\", \"permanent\"]'; \
                    `portcullis config` lists the keys";
        let (key, value) = text.split_once('=').ok_or(hint)?;
        let (key, value) = (key.trim(), value.trim());
        if key.split('.').any(str::is_empty) {
            return Err(hint.to_owned());
        }
        let value = match format!("value = {value}").parse::<Table>() {
            Ok(mut table) if table.len() == 1 => table.remove("value").ok_or(hint)?,
            // Begun as TOML and not ended as such is a mistake, not a word.
            Err(error) if value.starts_with(['[', '{', '"', '\'']) => {
                return Err(format!("{key}: {value} is no TOML: {}", error.message()));
            }
            _ => Value::String(value.to_owned()),
        };
        Ok(Self {
            key: key.to_owned(),
            value,
            given: "--set".to_owned(),
        })
    }
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}={}", self.given, self.key, self.value)
    }
}

/// A problem that one of the settings has made names it.
pub(super) fn blamed(settings: &[Setting], problem: String) -> String {
    let is_about = |setting: &&Setting| {
        let rest = problem.split_once(setting.key.as_str());
        rest.is_some_and(|(_, rest)| !rest.starts_with(|c: char| c.is_alphanumeric() || c == '_'))
    };
    match settings.iter().find(is_about) {
        Some(setting) => format!("{}: {problem}", setting.given),
        None => problem,
    }
}

/// The keys of a configuration that are not what they are by default.
pub(super) fn differing(table: &Table) -> Vec<(String, String)> {
    let defaults = super::documentation().parse::<Table>().unwrap_or_default();
    let mut found = Vec::new();
    collect("", table, &defaults, &mut found);
    found
}

/// What a key is by default, by its dotted name, as TOML.
pub fn default_of(key: &str) -> Option<String> {
    let defaults = super::documentation().parse::<Table>().ok()?;
    let mut parts = key.split('.');
    let first = defaults.get(parts.next()?)?;
    let value = parts.try_fold(first, |value, part| value.get(part))?;
    Some(value.to_string())
}

fn collect(prefix: &str, table: &Table, defaults: &Table, found: &mut Vec<(String, String)>) {
    for (key, value) in table {
        let name = format!("{prefix}{key}");
        let default = defaults.get(key);
        if let Value::Table(inner) = value {
            let none = Table::new();
            let defaults = default.and_then(Value::as_table).unwrap_or(&none);
            collect(&format!("{name}."), inner, defaults, found);
        } else if !default.is_some_and(|default| is_same(value, default)) {
            found.push((name, value.to_string()));
        }
    }
}

/// A number may be written with or without a fraction, and a list of one text without its brackets.
fn is_same(one: &Value, other: &Value) -> bool {
    let number = |value: &Value| {
        value
            .as_float()
            .or_else(|| Some(value.as_integer()? as f64))
    };
    match (number(one), number(other)) {
        (Some(one), Some(other)) => one == other,
        _ => one == other || other.as_array().is_some_and(|all| *all == [one.clone()]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Problems};

    fn loaded(settings: &[&str]) -> Result<super::super::Adjusted, String> {
        let settings: Result<Vec<Setting>, _> = settings.iter().map(|text| text.parse()).collect();
        Config::load_with(None, &settings?).map_err(|Problems(all)| all.join("\n"))
    }

    #[test]
    fn any_key_can_be_set_and_what_differs_is_known() {
        let adjusted = loaded(&[
            "detect.z_score=4",
            "detect.times_mean = 5",
            "detect.baseline.span_secs=900",
            "detect.baseline.warm_up_secs=10",
            r#"bans.schedule=["5m","permanent"]"#,
            "bans.allow=192.0.2.0/24",
            r#"source.format=$remote_addr [$time_local] "$request" $status"#,
            "mode=enforce",
        ])
        .unwrap();
        assert_eq!(adjusted.config.engine.detect.ordinary.z_score, 4.0);
        assert_eq!(adjusted.config.engine.schedule.len(), 2);
        assert_eq!(adjusted.config.engine.allow.len(), 1);
        let mut keys: Vec<&str> = adjusted
            .differing
            .iter()
            .map(|(key, _)| key.as_str())
            .collect();
        keys.sort_unstable();
        assert_eq!(
            keys,
            [
                "bans.allow",
                "bans.schedule",
                "detect.baseline.span_secs",
                "detect.baseline.warm_up_secs",
                "detect.z_score",
                "mode",
                "source.format"
            ]
        );
        assert_eq!(loaded(&[]).unwrap().differing, []);
    }

    #[test]
    fn the_last_of_two_holds() {
        let adjusted = loaded(&["detect.z_score=4", "detect.z_score=5.5"]).unwrap();
        assert_eq!(adjusted.config.engine.detect.ordinary.z_score, 5.5);
    }

    #[test]
    fn what_is_wrong_is_said_as_of_the_file_and_where_it_came_from() {
        for (setting, expected) in [
            (
                "detect.zscore=3",
                "--set: unknown key detect.zscore (is detect.z_score meant?)",
            ),
            (
                "detect.z_score=low",
                r#"--set: detect.z_score = "low" must be from 0.1 to 1000"#,
            ),
            ("detect.z_score", "write key=value"),
            (".z=1", "write key=value"),
            ("=1", "write key=value"),
            (
                r#"bans.schedule=["5m""#,
                r#"bans.schedule: ["5m" is no TOML"#,
            ),
            ("mode.x=1", r#"mode = { x = 1 } must be "observe" or"#),
            (
                "source.format=apache",
                "--set: source.format: \"apache\" is no format",
            ),
            (
                "detect.baseline.warm_up_secs=86400",
                "--set: detect.baseline.warm_up_secs = 86400 must not be above",
            ),
            (
                "detect.z_score=4\nspeed=1",
                "--set: detect.z_score = \"\"\"",
            ),
        ] {
            let error = loaded(&[setting]).unwrap_err();
            assert!(error.contains(expected), "{setting}: {error}");
        }
        let error = loaded(&["mode=observe", "mode.x=1"]).unwrap_err();
        assert!(error.contains("mode is a key itself"), "{error}");
    }

    #[test]
    fn a_file_s_own_problems_are_the_file_s() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("p.toml");
        std::fs::write(&path, "[detect]\nz_score = 4.0\ntimes_mean = 5\n").unwrap();
        let setting = "detect.surge.z_score=3".parse().unwrap();
        let Ok(adjusted) = Config::load_with(Some(&path), &[setting]) else {
            panic!("refused");
        };
        assert_eq!(adjusted.config.engine.detect.ordinary.z_score, 4.0);
        assert_eq!(adjusted.differing.len(), 2);
        std::fs::write(&path, "speed = 1").unwrap();
        let Problems(all) = Config::load_with(Some(&path), &[]).unwrap_err();
        assert!(all[0].contains("p.toml: unknown key speed"), "{all:?}");
    }
}
