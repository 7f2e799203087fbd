//! What the demo and the tests share: a laboratory in network namespaces, with real Nginx, clients, attackers and the
//! agent itself.

#![forbid(unsafe_code)]

pub mod lab;
pub mod readme;
