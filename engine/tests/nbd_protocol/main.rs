//! The NBD server's protocol as a client sees it: rule by rule, and in random sessions against a naive client and a naive disk.
//!
//! The client (`client`) has the protocol's numbers of its own and knows nothing of the engine's. In the random sessions (`seeded`) it sends legal and
//! illegal requests, cut anywhere, to a disk that answers in any order and is bad in places; it checks every byte that it gets, that
//! every request has one final reply, and that memory stays within its limits. `SEEDS=10000` runs more of them, `FIRST=n` begins elsewhere.

#![allow(clippy::cast_possible_truncation, reason = "lengths and offsets in these tests are small")]

mod bounds;
mod client;
mod cuts;
mod endings;
mod handshake;
mod reads;
mod rules;
mod seeded;
#[path = "../support/seeds.rs"]
mod seeds;
mod session;
mod writes;
