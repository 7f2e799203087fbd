//! The pure core of Portcullis: log lines and time in, commands and evidence out.
//!
//! No clock, no files, no sockets, no randomness: `Cargo.toml` proves the first three, `.clippy.toml` bans the rest.
//! Inputs enter through [`Engine`]'s methods, each with the time at which it happens; what is to be done comes out of
//! [`Engine::next_command`]. The only way back from the world is [`Engine::outcome`], an ordinary input, so a
//! recorded run replays to the same commands.
#![forbid(unsafe_code)]

pub mod allowlist;
pub mod baseline;
pub mod blast;
pub mod caps;
pub mod clients;
pub mod command;
pub mod cusum;
pub mod detect;
mod engine;
pub mod explain;
pub mod failures;
pub mod habits;
pub mod ledger;
pub mod parse;
mod paths;
mod polled;
mod prefixes;
mod regulars;
mod standing;
pub mod subject;
pub mod time;
mod usual;
mod watch;
pub mod window;

pub use command::{Command, Event, Outcome};
pub use engine::{Engine, Feed, Line, Proxied, Refusal, Release, Saved, Settings, Snapshot, Wish};
pub use explain::Explanation;
pub use ledger::{Ban, Gate, Origin, Term};
pub use subject::Subject;
pub use time::Timestamp;
