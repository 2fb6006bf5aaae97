//! Copies of live disks over the simulated ring: the product's own reactor, carrier and copier under guests of two kinds, jobs that come and go,
//! faults, targets that are slow or stuck, and operators who cannot keep their hands still.
//!
//! What is checked: the target of a job that says complete holds, on its medium, the disk as it was at t0, byte for byte, however guests have
//! written meanwhile; the live disk holds what the guests were told; reads and flushes tell the truth; nobody waits without end, least of all for
//! a job that is paused, throttled or stuck; the sweep keeps to its bounds; a dead engine lets everybody go.
//!
//! `LIVE_SIM_SEEDS=100000 LIVE_SIM_FIRST=0 cargo test --release -p engine --test live_simulation seeded` runs more seeds; a
//! failure names its seed, and `LIVE_SIM_FIRST=<seed> LIVE_SIM_SEEDS=1` repeats it.

mod beside;
mod blame;
mod by_hand;
mod directed;
mod exhaustive;
mod fleeced;
mod guests;
mod oracle;
mod planted;
mod random;
mod readers;
mod run;
mod scenario;
mod seeded;
#[path = "../support/seeds.rs"]
mod seeds;
mod seen;
#[path = "../support/shadow.rs"]
mod shadow;
