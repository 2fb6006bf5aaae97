//! Which seeds a simulation runs: some, or those that the environment names.

use std::ops::Range;

/// `<prefix>FIRST` and `<prefix>SEEDS` of the environment, or the first `count`.
///
/// # Panics
/// When they are no numbers.
pub(crate) fn seeds(prefix: &str, count: u64) -> Range<u64> {
    let from_environment = |name: &str, default: u64| {
        let value = std::env::var(format!("{prefix}{name}"));
        value.map_or(default, |value| value.parse().expect("a number"))
    };
    let first = from_environment("FIRST", 0);
    first..first + from_environment("SEEDS", count)
}
