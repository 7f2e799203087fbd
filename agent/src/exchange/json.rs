//! JSON: what `portcullis export` and `portcullis bans --json` print, what `cscli decisions list -o json` does, and lists like them.
//!
//! One element of an array is in memory at a time.

use std::fmt;

use portcullis_engine::Term;
use serde::{
    Deserialize as _, Deserializer as _,
    de::{SeqAccess, Visitor},
};
use serde_json::{Deserializer, Map, Value};

use super::{
    Format, Here, List, MAX_LINE, Place, TOO_LONG,
    table::{Column, Row, column},
};

pub(super) fn read(list: &mut List, text: &str, here: Here<'_>) {
    let start = text.trim_start();
    if start.starts_with('[') {
        let mut from = Deserializer::from_str(text);
        let read = from.deserialize_seq(Items { list, here });
        if let Err(error) = read.and_then(|()| from.end()) {
            broken(list, &error);
        }
        return;
    }
    let first = start.lines().next().unwrap_or_default();
    if first.len() > MAX_LINE || serde_json::from_str::<Value>(first).is_ok() {
        for (place, line) in super::lines(text) {
            match serde_json::from_str(line) {
                _ if line.len() > MAX_LINE => list.problem(place, TOO_LONG),
                Ok(value) => take(list, place, &value, here),
                Err(error) => list.problem(place, format!("no JSON: {error}")),
            }
        }
        return;
    }
    // Objects over several lines, one after the other.
    let values = Deserializer::from_str(text).into_iter();
    for (before, value) in values.enumerate() {
        match value {
            Ok(value) => take(list, Place::Item(before + 1), &value, here),
            Err(error) => return broken(list, &error),
        }
    }
}

fn broken(list: &mut List, error: &serde_json::Error) {
    list.problem(
        Place::Line(error.line()),
        format!("no JSON from here on, what came before was read: {error}"),
    );
}

/// The elements of an array, as they are read.
struct Items<'a> {
    list: &'a mut List,
    here: Here<'a>,
}

impl<'de> Visitor<'de> for Items<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of bans")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        let mut item = 0;
        while let Some(value) = items.next_element()? {
            item += 1;
            take(self.list, Place::Item(item), &value, self.here);
        }
        Ok(())
    }
}

/// A ban, or an alert of CrowdSec's with its decisions.
fn take(list: &mut List, place: Place, value: &Value, here: Here<'_>) {
    match value {
        Value::Null => {}
        Value::String(subject) => {
            let mut row = Row::default();
            row.set(Column::Subject, subject);
            row.add_to(list, place, here);
        }
        Value::Object(alert) => match alert.get("decisions") {
            None => row(alert).add_to(list, place, here),
            Some(decisions) => {
                list.format = Format::Crowdsec;
                for decision in decisions.as_array().into_iter().flatten() {
                    let Value::Object(decision) = decision else {
                        list.problem(place, "a decision that is no object");
                        continue;
                    };
                    let mut row = row(decision);
                    if alert.get("simulated") == Some(&Value::Bool(true)) {
                        row.simulate();
                    }
                    row.add_to(list, place, here);
                }
            }
        },
        _ => list.problem(place, "neither an object nor an address in quotation marks"),
    }
}

fn row(object: &Map<String, Value>) -> Row {
    let mut row = Row::default();
    for (name, value) in object {
        // So `portcullis bans --json` has it.
        if name == "term" {
            row.term = Term::deserialize(value).ok();
        }
        let Some(column) = column(name) else { continue };
        match value {
            Value::String(text) => row.set(column, text),
            Value::Number(number) => row.set(column, &number.to_string()),
            Value::Bool(is_so) => row.set(column, &is_so.to_string()),
            // So `portcullis export` has it.
            Value::Null if column == Column::End => row.term = Some(Term::Permanent),
            Value::Null | Value::Array(_) | Value::Object(_) => {}
        }
    }
    row
}
