//! The speed limit: a virtual clock that runs ahead of the real one by what has been spent.
//!
//! Each byte costs `1 / speed` seconds of the virtual clock. A cluster may be claimed while the virtual clock is at most one burst
//! ahead of now; time in which nothing was spent is not saved up beyond that burst. The burst is 100 ms worth, or one
//! cluster if that is more, so the limit is smooth; and since costs are kept exactly (in nanoseconds, with the remainder), the long-run
//! rate is the limit.

use std::time::Duration;

use crate::units::{Speed, Timestamp};

/// Worth of a burst in time.
const BURST: Duration = Duration::from_millis(100);
const NANOS: u128 = 1_000_000_000;

/// See the module's header.
#[derive(Debug)]
pub(super) struct Throttle {
    speed: Option<Speed>,
    cluster_bytes: u64,
    /// When everything spent so far is paid for.
    paid: Timestamp,
    /// Parts of a nanosecond spent on top, in units of `1 / speed` nanoseconds.
    remainder: u128,
}

impl Throttle {
    pub(super) fn new(speed: Option<Speed>, cluster_bytes: u64) -> Self {
        Self { speed, cluster_bytes, paid: Timestamp::default(), remainder: 0 }
    }

    /// Change the limit; what was spent under the old one is forgotten, nothing is saved up.
    pub(super) fn set_speed(&mut self, speed: Option<Speed>, now: Timestamp) {
        if self.speed != speed {
            self.speed = speed;
            self.paid = now.after(self.burst().unwrap_or_default());
            self.remainder = 0;
        }
    }

    fn cost(speed: Speed, bytes: u64) -> Duration {
        let nanos = u128::from(bytes) * NANOS / u128::from(speed.0.get());
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    fn burst(&self) -> Option<Duration> {
        self.speed.map(|speed| BURST.max(Self::cost(speed, self.cluster_bytes)))
    }

    /// Bytes that may be spent at `now`: whole clusters, 0 if none. `None`: no limit.
    pub(super) fn allowance(&self, now: Timestamp) -> Option<u64> {
        let speed = self.speed?;
        let ahead = self.paid.since(now);
        let free = self.burst()?.saturating_sub(ahead);
        let bytes = free.as_nanos() * u128::from(speed.0.get()) / NANOS;
        // One nanosecond of rounding must not turn a cluster that is due into none.
        let clusters = (bytes + u128::from(speed.0.get()).div_ceil(NANOS)) / u128::from(self.cluster_bytes);
        Some(u64::try_from(clusters * u128::from(self.cluster_bytes)).unwrap_or(u64::MAX))
    }

    /// When the next cluster may be claimed; `None`: now, or there is no limit.
    pub(super) fn next_at(&self, now: Timestamp) -> Option<Timestamp> {
        if self.allowance(now)? > 0 {
            return None;
        }
        let speed = self.speed?;
        let behind = self.burst()?.saturating_sub(Self::cost(speed, self.cluster_bytes));
        Some(Timestamp(self.paid.0.saturating_sub(behind)).max(now.after(Duration::from_nanos(1))))
    }

    /// Spend `bytes` for a guest, which does not wait: at most one burst of debt is left to the sweep.
    pub(super) fn spend_for_guest(&mut self, bytes: u64, now: Timestamp) {
        let (before, burst) = (self.paid, self.burst().unwrap_or_default());
        self.spend(bytes, now);
        let most = now.after(burst * 2).max(before);
        if self.paid > most {
            self.paid = most;
            self.remainder = 0;
        }
    }

    /// Spend `bytes`.
    pub(super) fn spend(&mut self, bytes: u64, now: Timestamp) {
        let Some(speed) = self.speed else { return };
        let speed = u128::from(speed.0.get());
        if self.paid < now {
            self.paid = now;
            self.remainder = 0;
        }
        let owed = u128::from(bytes) * NANOS + self.remainder;
        self.remainder = owed % speed;
        self.paid = self.paid.after(Duration::from_nanos(u64::try_from(owed / speed).unwrap_or(u64::MAX)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::num::NonZeroU64;

    const CLUSTER: u64 = 65536;

    fn speed(bytes: u64) -> Option<Speed> {
        NonZeroU64::new(bytes).map(Speed)
    }

    /// Bytes spent in `seconds` by a sweep that claims `run` bytes whenever it may, acting only at `next_at`.
    fn spent_in(limit: u64, seconds: u64, run: u64) -> u64 {
        let mut throttle = Throttle::new(speed(limit), CLUSTER);
        let (mut now, mut total) = (Timestamp::default(), 0);
        while now.0 < Duration::from_secs(seconds) {
            let allowance = throttle.allowance(now).unwrap();
            if allowance > 0 {
                let bytes = allowance.min(run);
                throttle.spend(bytes, now);
                total += bytes;
            } else {
                let next = throttle.next_at(now).unwrap();
                assert!(next > now, "time goes on");
                now = next;
            }
        }
        total
    }

    #[test]
    fn the_rate_over_ten_seconds_is_within_two_percent_or_a_cluster() {
        for limit in [1, 1000, 65_536, 100_000, 1 << 20, 123_456_789, 5 << 30] {
            for run in [CLUSTER, 16 * CLUSTER] {
                let spent = spent_in(limit, 10, run);
                let want = limit * 10;
                let slack = (want / 50).max(CLUSTER);
                assert!(spent.abs_diff(want) <= slack, "limit {limit}: {spent} of {want}");
            }
        }
    }

    #[test]
    fn a_burst_is_one_cluster_or_a_tenth_of_a_second() {
        let slow = Throttle::new(speed(65_536), CLUSTER);
        assert_eq!(slow.allowance(Timestamp(Duration::from_secs(60))), Some(CLUSTER));
        let fast = Throttle::new(speed(100 << 20), CLUSTER);
        assert_eq!(fast.allowance(Timestamp(Duration::from_secs(60))), Some(160 * CLUSTER));
    }

    #[test]
    fn a_change_takes_hold_without_a_burst() {
        let mut throttle = Throttle::new(None, CLUSTER);
        let now = Timestamp(Duration::from_secs(5));
        assert_eq!(throttle.allowance(now), None);
        throttle.set_speed(speed(1 << 20), now);
        assert_eq!(throttle.allowance(now), Some(0));
        let next = throttle.next_at(now).unwrap();
        assert!(next.since(now) <= BURST);
        assert_eq!(throttle.allowance(next), Some(CLUSTER));
        throttle.set_speed(None, next);
        assert_eq!(throttle.allowance(next), None);
    }
}
