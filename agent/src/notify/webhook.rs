//! Any program that takes JSON: the events as they are on record, as many in a request as wait, up to a bound.
//!
//! Events are in the order in which they were told. When more wait than one request takes, those about the site overtake those
//! about single addresses.

use std::path::PathBuf;

use anyhow::Result;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::{
    Limits, Taken, Told, Waiting,
    delivery::{Courier, Receiver},
    endpoint::{Address, Endpoint, Token},
};
use crate::audit::Recorded;

/// Where and how to tell.
#[derive(Clone, Debug)]
pub struct Settings {
    /// File that holds the address.
    pub url_file: PathBuf,
    /// File that holds a bearer token; none: there is none.
    pub token_file: Option<PathBuf>,
    /// How fast, and how much may wait.
    pub limits: Limits,
}

/// Reads the files.
pub(super) fn open(settings: &Settings, host: &str) -> Result<Courier<Webhook>> {
    let address = Address::read(
        &settings.url_file,
        "the webhook",
        "put it there on one line, https://…",
    )?;
    let token = settings.token_file.as_deref();
    let token = token.map(|path| Token::read(path, "the webhook's token"));
    let endpoint = Endpoint::new(address, token.transpose()?, settings.limits.timeout)?;
    let webhook = Webhook {
        host: host.to_owned(),
    };
    Ok(Courier::new(webhook, endpoint, settings.limits))
}

/// Most events in a request.
pub(super) const MOST: usize = 100;

/// See the module's documentation.
pub(super) struct Webhook {
    /// The name of this host.
    pub host: String,
}

/// What one request is about.
pub(super) struct Events {
    told: Vec<Told>,
    /// So many about single addresses were dropped since the last request.
    left_out: u64,
}

impl Receiver for Webhook {
    const NAME: &'static str = "the webhook";

    type Batch = Events;

    fn take(&mut self, waiting: &mut Waiting, _now: Instant, _is_last: bool) -> Taken<Events> {
        if waiting.told.is_empty() {
            return Taken::Nothing;
        }
        let is_of_site = |told: &&Told| !told.is_one_of_many();
        let mut site = waiting.told.iter().filter(is_of_site).count().min(MOST);
        let mut many = MOST - site;
        let mut take = |told: &Told| {
            let room = if told.is_one_of_many() {
                &mut many
            } else {
                &mut site
            };
            room.checked_sub(1).map(|left| *room = left).is_some()
        };
        let (told, rest) = waiting.told.drain(..).partition(|told| take(told));
        waiting.told = rest;
        Taken::Batch(Events {
            told: Vec::from(told),
            left_out: std::mem::take(&mut waiting.left_out).total(),
        })
    }

    fn body(&self, batch: &Events) -> Value {
        let events = batch.told.iter().map(|told| Recorded {
            event: &told.event,
            mode: Some(told.mode),
        });
        let mut body = json!({ "host": self.host, "events": events.collect::<Vec<_>>() });
        if batch.left_out > 0 {
            body["left_out"] = json!(batch.left_out);
        }
        body
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use portcullis_engine::command::Action;

    use super::*;
    use crate::notify::tests::told;

    fn taken(waiting: &mut Waiting) -> Option<Vec<Told>> {
        let mut webhook = Webhook {
            host: "edge-1".to_owned(),
        };
        match webhook.take(waiting, Instant::now(), false) {
            Taken::Batch(batch) => Some(batch.told),
            Taken::Later(_) | Taken::Nothing => None,
        }
    }

    #[test]
    fn an_event_is_what_a_line_of_the_history_is_but_for_the_chain() {
        let webhook = Webhook {
            host: "edge-1".to_owned(),
        };
        let body = webhook.body(&Events {
            told: vec![
                told(Action::Ban, Some("192.0.2.1")),
                told(Action::Alarm, None),
            ],
            left_out: 0,
        });
        let expected = json!({"host": "edge-1", "events": [
            {"time": 1_700_000_000_000_u64, "action": "ban", "subject": "192.0.2.1", "condition": "why", "mode": "enforce"},
            {"time": 1_700_000_000_000_u64, "action": "alarm", "condition": "why", "mode": "enforce"},
        ]});
        assert_eq!(body, expected, "{body:#}");
        let read: Recorded = serde_json::from_value(body["events"][0].clone()).unwrap();
        assert_eq!(read.event, told(Action::Ban, Some("192.0.2.1")).event);

        let body = webhook.body(&Events {
            told: vec![told(Action::Alarm, None)],
            left_out: 7,
        });
        assert_eq!(body["left_out"], 7);
    }

    #[test]
    fn requests_are_bounded_and_what_is_about_the_site_goes_first_only_when_there_is_no_room() {
        let ban = || told(Action::Ban, Some("192.0.2.1"));
        let alarm = || told(Action::Alarm, None);
        let mut waiting = Waiting::default();
        assert!(taken(&mut waiting).is_none());

        waiting.told = VecDeque::from([ban(), alarm(), ban()]);
        let actions: Vec<Action> = taken(&mut waiting)
            .unwrap()
            .iter()
            .map(|told| told.event.action)
            .collect();
        assert_eq!(actions, [Action::Ban, Action::Alarm, Action::Ban]);

        waiting.told = (0..MOST + 50).map(|_| ban()).chain([alarm()]).collect();
        let first = taken(&mut waiting).unwrap();
        assert_eq!(first.len(), MOST);
        assert_eq!(
            first.last().map(|told| told.event.action),
            Some(Action::Alarm)
        );
        assert_eq!(taken(&mut waiting).unwrap().len(), 51);
        assert!(waiting.told.is_empty());

        waiting.told = (0..=MOST).map(|_| alarm()).chain([ban()]).collect();
        assert_eq!(taken(&mut waiting).unwrap().len(), MOST);
        assert_eq!(taken(&mut waiting).unwrap().len(), 2);
    }
}
