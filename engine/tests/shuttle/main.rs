//! The lock-free parts under shuttle: larger cases than loom can finish, in orders chosen at random. Run with
//! `cargo test -p engine --features shuttle --test shuttle`; `SHUTTLE_RUNS=100000` for more.
//!
//! shuttle reports a deadlock, so a wake-up that is lost shows without further ado, and a failure prints a schedule that repeats it. It takes
//! atomics for sequentially consistent: what orderings are needed is loom's matter.
//!
//! Bookkeeping of the tests themselves is in standard atomics and locks: shuttle runs one thread at a time, and switches at
//! modelled operations only.

mod gate;
mod interval_set;

use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::{Config, Runner};

/// Priorities change so often in a run of the second kind, beside those at its start.
const CHANGES: usize = 3;

/// Run `case` in many orders: some with every switch at random, some that let a thread run on for long.
fn check(runs: usize, case: impl Fn() + Send + Sync + Copy + 'static) {
    let runs = std::env::var("SHUTTLE_RUNS").map_or(runs, |runs| runs.parse().expect("a number"));
    let mut config = Config::new();
    config.stack_size = 1 << 17;
    // Of atomics that are sequentially consistent: see above.
    config.silence_warnings = true;
    Runner::new(RandomScheduler::new(runs), config.clone()).run(case);
    Runner::new(PctScheduler::new(CHANGES, runs), config).run(case);
}
