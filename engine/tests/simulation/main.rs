//! The copy, whole, over the simulated ring: the product's own copier and driver under seeds, faults, cancels and crashes.
//!
//! What is checked after every run: the job's word is true. If it says complete, the target's *medium* (what a power loss would leave) equals
//! the source; if it says complete with skipped clusters, it equals the source everywhere else and the list is exact; if it says that it can be
//! resumed, a resume from the map ends with a target that equals the source.
//!
//! `SIM_SEEDS=100000 SIM_FIRST=0 cargo test --release -p engine --test simulation seeded` runs more seeds; a failure
//! names its seed, and `SIM_FIRST=<seed> SIM_SEEDS=1` repeats it.

mod by_hand;
mod consent;
mod exhaustive;
mod maps;
mod oracle;
mod planted;
mod run;
mod scenario;
mod seeded;
#[path = "../support/seeds.rs"]
mod seeds;
mod skipping;
mod traced;
mod verification;
mod withdrawal;
