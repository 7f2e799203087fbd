//! Portcullis: the shell around the engine. Reads the log, carries out what the engine decides, answers the operator.
//!
//! `ARCHITECTURE.md` beside this crate is the map.
#![deny(unsafe_code)]

pub mod audit;
pub mod cli;
pub mod config;
pub mod control;
pub mod crawlers;
pub mod doctor;
pub mod enforce;
pub mod exchange;
pub mod host;
pub mod notify;
pub mod replay;
pub mod runtime;
pub mod source;
pub mod store;
pub mod surroundings;
