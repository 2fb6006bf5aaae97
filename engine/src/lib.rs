//! High-throughput, point-in-time copy engine for disks, built on io_uring.
//!
//! The engine is two halves with one seam between them. The *logic* (the copier, its parts and the job's lifecycle) is
//! a set of plain state machines that take typed events and return typed requests; it never does I/O. The *ring*
//! carries those requests out: `io_uring`, a thread pool, or a deterministic simulation. See `ARCHITECTURE.md`.

pub mod compare;
pub mod copier;
pub mod copy;
pub mod error;
mod foreign;
pub mod interval_set;
pub mod job;
pub mod live;
pub mod map;
pub mod modes;
pub mod nbd;
mod piece;
pub mod ring;
pub mod storage;
mod sync;
pub mod units;
