//! Each script runs against `qemu-storage-daemon` and against our daemon, and both tell the same: replies, events and images.
//!
//! # What is compared
//! Replies in their order, events in the order in which a job had them, and the bytes of every image. Before that the documented
//! differences are taken out (`peer::normal`): time stamps; our own members, whose names begin with `x-`; `busy`; pauses that
//! QEMU makes whenever it changes its graph; how far a job was when it was stopped; how replies and events stand between each other; the
//! version. What differs on purpose besides has a test of its own in `intended`. `docs/qemu-compatibility.md` tells of all of it.
//!
//! Skipped where `qemu-storage-daemon` is not installed.

mod errors;
mod guests;
mod intended;
mod jobs;
#[path = "../support/kernel.rs"]
#[allow(dead_code, reason = "every test program uses its own part of this")]
mod kernel;
mod peer;
mod refusals;
#[path = "../support/mod.rs"]
mod support;
mod wire;
