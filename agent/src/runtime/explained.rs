//! What is known of one subject: by the engine, and by the back end that keeps it out.

use portcullis_engine::Explanation;
use serde::{Deserialize, Serialize};

use crate::enforce::{Backend, Entry, Mode};

/// Everything that `portcullis explain` says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Explained {
    /// What the engine knows.
    #[serde(flatten)]
    pub known: Explanation,
    /// What happens to banned sources.
    pub mode: Mode,
    /// Which back end is at work.
    pub backend: Backend,
    /// Where.
    pub place: String,
    /// The deciding ban as the back end has it; none if it has not.
    pub entry: Option<Held>,
}

/// A ban as the back end has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// Packets that it has matched.
    pub hits: u64,
    /// How long ago the newest of them was.
    pub last_seen_secs: Option<u64>,
}

impl Explained {
    /// Takes in what the back end has.
    pub(super) fn with(mut self, entries: &[Entry]) -> Self {
        let deciding = self.known.bans.first().map(|ban| ban.subject);
        let entry = entries.iter().find(|entry| Some(entry.subject) == deciding);
        self.entry = entry.map(|entry| Held {
            hits: entry.hits,
            last_seen_secs: entry.last_seen.map(|ago| ago.as_secs()),
        });
        self
    }
}
