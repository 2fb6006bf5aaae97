//! How long guests waited: a histogram of bounded size, and what a guest that comes at a random instant would see.
//!
//! # Why two kinds of percentile
//! A guest that sends its next request when the last one is done sends none while it is stalled. One stall of a second among ten thousand
//! requests of 0.1 ms is then one request in ten thousand, although half of the time was spent in it. So besides the plain
//! percentiles there are corrected ones: the wait of a request that arrives at a random instant. One that arrives *t* into a request
//! of length *l* waits *l − t*, so the share of instants with a wait above *x* is Σ max(0, *l* − *x*) / Σ *l*.

use std::time::Duration;

/// Buckets of a power of two: values are told apart within 1/32, about 3 %.
const SUB_BITS: u32 = 5;
const SUB: usize = 1 << SUB_BITS;
/// Up to 2^43 ns, about 2.4 hours; longer counts as that.
const MAX_BITS: u32 = 43;
const BUCKETS: usize = (MAX_BITS - SUB_BITS + 1) as usize * SUB;

/// Latencies that were measured. 10 KiB, however many.
#[derive(Clone, Debug)]
pub struct Latencies {
    counts: Vec<u64>,
    count: u64,
    sum: u128,
    longest: Duration,
}

/// What the guests of a disk felt before a job and during it: the latencies of requests that the engine carried.
#[derive(Clone, Debug, Default)]
pub struct GuestLatencies {
    /// In the last 30 to 60 seconds before it.
    pub before: Latencies,
    /// From its t0 to its end.
    pub during: Latencies,
}

impl Default for Latencies {
    fn default() -> Self {
        Self { counts: vec![0; BUCKETS], count: 0, sum: 0, longest: Duration::ZERO }
    }
}

/// The bucket of a value in nanoseconds.
fn bucket_of(nanos: u64) -> usize {
    let nanos = nanos.min((1 << MAX_BITS) - 1);
    let small = usize::try_from(nanos).expect("43 bits");
    if small < SUB {
        return small;
    }
    let shift = nanos.ilog2() - SUB_BITS;
    let octave = usize::try_from(shift).expect("small") + 1;
    octave * SUB + (small >> shift) - SUB
}

/// The middle of a bucket, in nanoseconds.
fn middle_of(bucket: usize) -> f64 {
    if bucket < SUB {
        return bucket as f64;
    }
    let shift = u32::try_from(bucket / SUB - 1).expect("few octaves");
    let width = (1_u64 << shift) as f64;
    (SUB + bucket % SUB) as f64 * width + (width - 1.0) / 2.0
}

impl Latencies {
    /// One more.
    pub fn record(&mut self, latency: Duration) {
        let nanos = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        self.counts[bucket_of(nanos)] += 1;
        self.count += 1;
        self.sum += u128::from(nanos);
        self.longest = self.longest.max(latency);
    }

    /// Add those of `other`.
    pub fn merge(&mut self, other: &Self) {
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
        self.count += other.count;
        self.sum += other.sum;
        self.longest = self.longest.max(other.longest);
    }

    /// How many.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The longest, exactly.
    #[must_use]
    pub fn longest(&self) -> Duration {
        self.longest
    }

    /// Their mean; zero for none.
    #[must_use]
    pub fn mean(&self) -> Duration {
        let mean = self.sum.checked_div(u128::from(self.count)).unwrap_or(0);
        Duration::from_nanos(u64::try_from(mean).unwrap_or(u64::MAX))
    }

    /// What the share `quantile` (0 to 1) of the requests did not exceed; zero for none.
    #[must_use]
    pub fn plain(&self, quantile: f64) -> Duration {
        let wanted = (quantile.clamp(0.0, 1.0) * self.count as f64).ceil().max(1.0);
        let mut seen = 0;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen as f64 >= wanted {
                return self.capped(middle_of(bucket));
            }
        }
        Duration::ZERO
    }

    /// What a request that arrives at a random instant does not exceed with probability `quantile`; see the module. Zero for none.
    #[must_use]
    pub fn corrected(&self, quantile: f64) -> Duration {
        let total: f64 = self.pairs().map(|(value, count)| value * count).sum();
        let target = (1.0 - quantile.clamp(0.0, 1.0)) * total;
        // From the longest down: above `x` lie `number` requests with the sum `sum`, so the excess is sum - number * x.
        let (mut number, mut sum) = (0.0, 0.0);
        let mut pairs: Vec<(f64, f64)> = self.pairs().collect();
        while let Some((value, count)) = pairs.pop() {
            number += count;
            sum += value * count;
            let next = pairs.last().map_or(0.0, |&(next, _)| next);
            if sum - number * next >= target {
                return self.capped(((sum - target) / number).max(0.0));
            }
        }
        Duration::ZERO
    }

    /// How many took how long, by powers of two of a microsecond: up to what time (the next ones more than that), and how many. Where there
    /// are none, nothing is told.
    pub fn histogram(&self) -> impl Iterator<Item = (Duration, u64)> {
        let mut octaves = std::collections::BTreeMap::new();
        for (bucket, &count) in self.counts.iter().enumerate().filter(|(_, count)| **count > 0) {
            let mut up_to = Duration::from_micros(1);
            while (up_to.as_nanos() as f64) < middle_of(bucket) {
                up_to *= 2;
            }
            *octaves.entry(up_to).or_insert(0) += count;
        }
        octaves.into_iter()
    }

    /// Middles and counts of the buckets that are not empty, ascending.
    fn pairs(&self) -> impl Iterator<Item = (f64, f64)> + '_ {
        let full = self.counts.iter().enumerate().filter(|(_, count)| **count > 0);
        full.map(|(bucket, &count)| (middle_of(bucket), count as f64))
    }

    /// The middle of the last bucket may lie beyond the longest.
    fn capped(&self, nanos: f64) -> Duration {
        Duration::from_secs_f64(nanos / 1e9).min(self.longest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(found: Duration, wanted: Duration) {
        let (found, wanted) = (found.as_secs_f64(), wanted.as_secs_f64());
        assert!((found - wanted).abs() <= wanted * 0.04 + 1e-9, "{found} instead of {wanted}");
    }

    #[test]
    fn buckets_ascend_and_hold_what_they_say() {
        let mut last = 0;
        for nanos in (0..10_000).chain((14..43).map(|bits| 1 << bits)).chain([u64::MAX]) {
            let bucket = bucket_of(nanos);
            assert!(bucket >= last && bucket < BUCKETS, "{nanos}");
            last = bucket;
            let nanos = nanos.min(1 << MAX_BITS);
            assert!((middle_of(bucket) - nanos as f64).abs() <= nanos as f64 / 32.0 + 1.0, "{nanos}");
        }
    }

    #[test]
    fn plain_percentiles_hide_a_stall_and_corrected_ones_show_it() {
        let mut latencies = Latencies::default();
        for _ in 0..10_000 {
            latencies.record(Duration::from_micros(100));
        }
        latencies.record(Duration::from_secs(1));
        close(latencies.plain(0.999), Duration::from_micros(100));
        // Two seconds, half of them stalled: one instant in ten has a wait of 0.8 s or more.
        close(latencies.corrected(0.9), Duration::from_millis(800));
        assert_eq!(latencies.longest(), Duration::from_secs(1));
        assert_eq!(latencies.count(), 10_001);
    }

    #[test]
    fn equal_latencies_are_waited_for_in_part() {
        let mut latencies = Latencies::default();
        for _ in 0..100 {
            latencies.record(Duration::from_millis(10));
        }
        close(latencies.plain(0.5), Duration::from_millis(10));
        close(latencies.corrected(0.5), Duration::from_millis(5));
        close(latencies.mean(), Duration::from_millis(10));
    }

    #[test]
    fn a_histogram_has_them_all_by_powers_of_two() {
        let mut latencies = Latencies::default();
        let micros = [0, 1, 3, 4, 90, 100, 1000, u64::MAX / 1000];
        micros.into_iter().for_each(|micros| latencies.record(Duration::from_micros(micros)));
        let told: Vec<_> = latencies.histogram().collect();
        let expected = [(1, 2), (4, 2), (128, 2), (1024, 1), (1 << 34, 1)];
        assert_eq!(told, expected.map(|(micros, count)| (Duration::from_micros(micros), count)));
    }

    #[test]
    fn none_is_zero_and_merging_adds() {
        let mut all = Latencies::default();
        assert_eq!((all.plain(0.5), all.corrected(0.99), all.mean()), Default::default());
        let mut one = Latencies::default();
        one.record(Duration::from_millis(3));
        all.merge(&one);
        all.merge(&one);
        assert_eq!(all.count(), 2);
        close(all.plain(1.0), Duration::from_millis(3));
    }
}
