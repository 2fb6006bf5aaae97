//! What the guests of a disk have felt lately: the latencies of their carried requests, in two windows of time.
//!
//! A job takes what was felt before it, has its own share recorded while it runs, and leaves a clean slate for what comes after. The cost is
//! a subtraction and an increment for each request, on the ring thread.

use std::time::Duration;

use super::DiskId;
use super::ask::Lost;
use super::command::gone;
use super::latency::Latencies;
use super::reactor::Reactor;
use crate::error::Error;
use crate::ring::Ring;
use crate::units::Timestamp;

/// A window: what is told is of the last one to two of them.
const WINDOW: Duration = Duration::from_secs(30);

/// See the module's header.
#[derive(Debug, Default)]
pub(super) struct Felt {
    current: Latencies,
    previous: Latencies,
    since: Timestamp,
}

impl Felt {
    /// A request was answered at `now`, after `latency`.
    pub(super) fn record(&mut self, latency: Duration, now: Timestamp) {
        self.roll(now);
        self.current.record(latency);
    }

    /// Of the last 30 to 60 seconds.
    pub(super) fn recent(&mut self, now: Timestamp) -> Latencies {
        self.roll(now);
        let mut recent = self.previous.clone();
        recent.merge(&self.current);
        recent
    }

    /// What was felt so far is over.
    pub(super) fn forget(&mut self, now: Timestamp) {
        *self = Self { since: now, ..Self::default() };
    }

    fn roll(&mut self, now: Timestamp) {
        let age = now.since(self.since);
        if age < WINDOW {
            return;
        }
        let current = std::mem::take(&mut self.current);
        self.previous = if age < 2 * WINDOW { current } else { Latencies::default() };
        self.since = now;
    }
}

impl<R: Ring> Reactor<R> {
    /// Of the last 30 to 60 seconds, but only since the last job of this disk has ended.
    pub(super) fn felt(&mut self, disk: DiskId, now: Timestamp) -> Result<Latencies, Error> {
        self.disks.get_mut(&disk).map(|disk| disk.felt.recent(now)).ok_or_else(gone)
    }
}

impl Lost for Result<Latencies, Error> {
    fn lost() -> Self {
        Err(gone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_long_ago_is_forgotten() {
        let at = |seconds: u64| Timestamp(Duration::from_secs(seconds));
        let mut felt = Felt::default();
        felt.record(Duration::from_millis(1), at(1));
        felt.record(Duration::from_millis(2), at(31));
        assert_eq!(felt.recent(at(32)).count(), 2);
        assert_eq!(felt.recent(at(62)).count(), 1);
        assert_eq!(felt.recent(at(200)).count(), 0);
        felt.record(Duration::from_millis(1), at(201));
        felt.forget(at(202));
        assert_eq!(felt.recent(at(203)).count(), 0);
    }
}
