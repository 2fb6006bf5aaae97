//! The client's side of NBD: rule by rule, with streams that are cut anywhere, and against servers that send anything.
//!
//! What a server sends is put together here with the protocol's numbers, not with the engine's (`server`). Who drives the state machines (`driver`) knows of
//! each byte of a read whether and how often it has come, and checks after every step what must hold whatever comes.

#![allow(clippy::cast_possible_truncation, reason = "lengths and offsets in these tests are small")]

mod driver;
mod hostile;
mod negotiation;
mod rules;
mod server;
