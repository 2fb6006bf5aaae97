//! Live disks: disks that are written while they are copied, as they were at one instant.
//!
//! ```
//! use engine::live::{BackupOptions, DiskOptions, Engine, EngineOptions};
//!
//! # let directory = tempfile::tempdir()?;
//! # let path = |name: &str| directory.path().join(name).display().to_string();
//! # let (disk_path, backup_path) = (path("disk.img"), path("backup.img"));
//! # std::fs::write(&disk_path, vec![1; 1 << 20])?;
//! let engine = Engine::start(&EngineOptions::default())?;
//! let disk = engine.open_disk(&DiskOptions { path: disk_path, writable: true })?;
//! let backup = engine.start_backup(&disk, &BackupOptions::new(backup_path))?;
//! // The instant has passed: the disk goes on, and what is written now is not in the backup.
//! disk.write(4096, vec![2; 4096])?;
//! println!("{:?} after {:?}", backup.job.wait().outcome, backup.job.progress().elapsed);
//! # assert!(matches!(backup.job.wait().outcome, engine::job::Outcome::Complete));
//! # assert!(std::fs::read(path("backup.img"))? == vec![1; 1 << 20]);
//! # assert_eq!(std::fs::read(path("disk.img"))?[4096], 2);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! An embedder that writes by itself takes a permit before each write, [`LiveDisk::begin_write`], and drops it after; `examples/appliance.rs`
//! is a whole one, with two disks at one instant.
//!
//! A guest write copies before it, then takes a [`Permit`], and holds it until its data is on the source. The parts:
//!
//! | module | its idea |
//! |---|---|
//! | `gate`, `slot` | Permits are counted; guests are held back while t0 is taken. |
//! | `jobs` | The list of the disk's jobs, which tells a guest what is still to be copied. |
//! | `admission` | Asks the two in the order that makes t0 an instant. |
//! | `own_write`, `begin_write`, `waits` | What those who write by themselves wait for, and how. |
//! | `carrier` | Guest I/O that the engine carries: a state machine on the ring thread. |
//! | `reactor`, `hosted`, `host` | The loop of the ring thread over many disks and jobs. |
//! | `reads` | The reads of a job's snapshot, and whose turn it is. |
//! | `disks`, `places` | The disks in turns; whose the places on the ring are. |
//! | `starts`, `groups`, `ends` | How jobs start, stand, and end together; the last steps of each. |
//! | `death` | What becomes of everybody when the ring thread dies. |
//! | `controller` | How much of the sweep is in flight. |
//! | `command`, `ask` | What other threads ask for, how they get answers. |
//! | `room`, `memory` | Who has which part of the arena, and the places on the ring. |
//! | `exports` | Disks and snapshots served over NBD. |
//! | `engine`, `disk`, `backup`, `opened`, `listing` | The handles; which disks are open; which jobs there are. |
//! | `call_off` | What becomes of a start that nobody wants any more. |
//! | `latency`, `felt` | What guests felt. |

mod admission;
mod ask;
mod asks;
mod backup;
mod begin_write;
mod call_off;
pub mod carrier;
mod command;
mod controller;
mod death;
mod disk;
#[cfg(test)]
mod disk_tests;
mod disks;
#[cfg(all(test, feature = "sim"))]
mod disks_tests;
mod ends;
mod engine;
mod exports;
mod felt;
mod gate;
mod groups;
mod host;
mod hosted;
mod jobs;
mod latency;
mod listing;
mod memory;
mod opened;
mod own_write;
mod places;
#[cfg(feature = "sim")]
mod planted;
mod reactor;
mod reads;
mod room;
#[cfg(feature = "sim")]
pub mod sim;
#[cfg(feature = "sim")]
mod sim_writers;
mod slot;
mod starts;
#[cfg(test)]
mod tests;
mod token;
#[cfg(all(test, feature = "sim"))]
mod turns_tests;
#[cfg(all(test, feature = "sim"))]
mod waiting_tests;
mod waits;
#[cfg(all(test, feature = "sim"))]
mod writers_tests;

pub use self::admission::Permit;
pub(crate) use self::ask::may_wait;
pub use crate::modes::CbwErrorPolicy;

pub use self::backup::{Backup, BackupOptions, FleeceOptions, Snapshot};
pub use self::call_off::CallOff;
pub use self::carrier::IoRequest;
pub use self::command::GroupFailure;
pub use self::controller::SweepDepth;
pub use self::disk::{BeginWrite, Io, LiveDisk, read};
pub use self::engine::{DiskOptions, Engine, EngineEnd, EngineOptions};
pub use self::exports::{
    Export, ExportOptions, ExportSource, NbdListener, NbdOptions, NbdServer, NotAccepted, Removal,
};
pub use self::latency::{GuestLatencies, Latencies};
pub use self::listing::RunningJob;
// Not for embedders: for the engine's own benches and model checks, which are crates of their own.
#[doc(hidden)]
pub use self::{
    admission::{Attempt, attempt, attempt_unnested},
    gate::{Entry, Gate, WaitTicket},
    jobs::{JobId, JobList, Watch},
    slot::Pass,
};

/// Names a disk on an engine, for as long as that lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct DiskId(pub(crate) u64);
