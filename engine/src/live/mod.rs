//! Live disks: what guest threads and the ring thread share about a disk that is written while it is copied.
//!
//! A guest write copies before it, then takes a [`Permit`], and holds it until its data is on the source. The parts are
//! the gate (`gate`, `slot`), which counts permits and holds guests back while t0 is taken; the list of the disk's jobs
//! (`jobs`), which tells a guest what is still to be copied; and `admission`, which asks the two in the order that
//! makes t0 an instant.

mod admission;
mod gate;
mod jobs;
mod slot;
#[cfg(all(test, not(loom)))]
mod tests;

pub use self::admission::Permit;
// Not for embedders: for the engine's own benches and model checks, which are crates of their own.
#[doc(hidden)]
pub use self::{
    admission::{Attempt, attempt, attempt_unnested},
    gate::{Entry, Gate, WaitTicket},
    jobs::{JobId, JobList, Watch},
    slot::Pass,
};
