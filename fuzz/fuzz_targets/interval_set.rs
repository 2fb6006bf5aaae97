//! Any sequence of operations on an interval set of any small size, against the naive oracle of the property tests.
//! Any difference, and any assertion that fails in the set, is a crash.
#![no_main]

use arbitrary::Arbitrary;
use engine::interval_set::IntervalSet;
use engine::units::ClusterCount;
use libfuzzer_sys::fuzz_target;

#[path = "../../engine/tests/interval_set_oracle/mod.rs"]
mod interval_set_oracle;

use interval_set_oracle::{MAX_CLUSTERS, Raw, drive};

/// As the oracle looks at every cluster after every step, longer inputs only make the fuzzer slow.
const MAX_STEPS: usize = 200;

#[derive(Arbitrary, Debug)]
struct Input {
    clusters: u16,
    steps: Vec<(u8, u16, u16)>,
}

fuzz_target!(|input: Input| {
    let clusters = u64::from(input.clusters) % (MAX_CLUSTERS + 1);
    let set = IntervalSet::new(ClusterCount(clusters)).expect("a small set fits in memory");
    let steps = input.steps.iter().take(MAX_STEPS).map(|&(kind, a, b)| Raw { kind, a, b });
    if let Err(difference) = drive(&set, steps) {
        panic!("{difference}");
    }
});
