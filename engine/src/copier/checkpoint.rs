//! What is known to be on stable storage, and how a later run learns of it.
//!
//! # Order
//! 1. *Capture*: the set of done clusters is taken down. Nothing that completes later belongs to this checkpoint.
//! 2. *Flush*: submitted after the capture, so it covers every write of a captured cluster.
//! 3. *Verify* (if asked for): what was captured since the last checkpoint is read back; what differs leaves the captured set.
//! 4. *Claim*: the captured set is now durable, and is published in the map.
//!
//! A flush that fails says nothing about which writes were lost, and says it only once: everything captured or completed since the last
//! good flush is withdrawn (copied again, if the policy lets the job go on). It is never retried and believed.

use crate::units::{ClusterIndex, ClusterRange, Timestamp};

use super::plan::Limits;
use super::tally::Tally;
use super::verify::Verification;

/// Where a checkpoint stands.
#[derive(Debug)]
pub(super) enum Stage {
    /// None under way.
    Idle,
    /// The flush is.
    Flushing,
    /// The window is read back.
    Verifying(Box<Verification>),
    /// The map is written (or removed, at the end of a complete copy).
    Publishing,
}

/// The set of done clusters as it was before a flush was submitted.
#[derive(Clone, Debug, Default)]
pub(super) struct Captured {
    /// Ascending, disjoint, not adjacent.
    pub(super) done: Vec<ClusterRange>,
    /// The counters that go with it.
    pub(super) tally: Tally,
    /// Whether nothing was left to copy.
    pub(super) complete: bool,
}

impl Captured {
    /// Whether `cluster` is among them.
    pub(super) fn holds(&self, cluster: ClusterIndex) -> bool {
        let at = self.done.partition_point(|range| range.end <= cluster);
        self.done.get(at).is_some_and(|range| range.start <= cluster)
    }
}

/// See the module's header.
#[derive(Debug)]
pub(super) struct Checkpoints {
    pub(super) stage: Stage,
    /// Of the checkpoint under way.
    pub(super) captured: Captured,
    /// What the last good flush covered (and verification agreed with).
    pub(super) durable: Captured,
    /// Something was written since the last capture; also true until the first flush.
    pub(super) dirty: bool,
    /// The map does not show all that is durable, because it could not be written.
    pub(super) map_stale: bool,
    /// It was said that the map cannot be written.
    pub(super) map_failure_said: bool,
    /// It was said that it can be written again.
    pub(super) map_mended_said: bool,
    /// A map was written (or was there to resume from).
    pub(super) map_written: bool,
    /// Bytes that it calls done.
    pub(super) mapped_bytes: u64,
    /// Bytes that the version which is being written calls done.
    pub(super) publishing_bytes: u64,
    /// Since something new last became durable (a flush of nothing says nothing of those that failed). A write-back between the flush and the claim counts.
    pub(super) failed_flushes: u32,
    last_start: Timestamp,
    bytes_since: u64,
}

impl Checkpoints {
    pub(super) fn new(resumed: Captured, map_written: bool) -> Self {
        Self {
            stage: Stage::Idle,
            captured: Captured::default(),
            map_mended_said: false,
            map_written,
            mapped_bytes: resumed.tally.done(),
            publishing_bytes: 0,
            durable: resumed,
            dirty: true,
            map_stale: false,
            map_failure_said: false,
            failed_flushes: 0,
            last_start: Timestamp::default(),
            bytes_since: 0,
        }
    }

    pub(super) fn is_idle(&self) -> bool {
        matches!(self.stage, Stage::Idle)
    }

    /// `bytes` were settled.
    pub(super) fn on_settled(&mut self, bytes: u64) {
        self.dirty = true;
        self.bytes_since += bytes;
    }

    /// All that was settled since the last one that succeeded is taken back: nothing of it is there to be flushed.
    pub(super) fn withdraw(&mut self) {
        self.stage = Stage::Idle;
        self.dirty = true;
        self.bytes_since = 0;
    }

    /// Bytes settled since the last capture.
    pub(super) fn bytes_since(&self) -> u64 {
        self.bytes_since
    }

    /// Whether the next one is due.
    pub(super) fn is_due(&self, now: Timestamp, limits: &Limits) -> bool {
        self.is_idle()
            && self.dirty
            && self.bytes_since > 0
            && (self.bytes_since >= limits.checkpoint_bytes || now >= self.due_at(limits))
    }

    /// When the next one is due at the latest.
    pub(super) fn due_at(&self, limits: &Limits) -> Timestamp {
        self.last_start.after(limits.checkpoint_interval)
    }

    /// Whether time alone will make one due.
    pub(super) fn awaits_time(&self) -> bool {
        self.is_idle() && self.dirty && self.bytes_since > 0
    }

    /// The set was captured and the flush is being submitted.
    pub(super) fn begin(&mut self, captured: Captured, now: Timestamp) {
        assert!(self.is_idle(), "one checkpoint at a time");
        self.captured = captured;
        self.stage = Stage::Flushing;
        self.dirty = false;
        self.bytes_since = 0;
        self.last_start = now;
    }
}

/// `ranges` without what lies in `others`; both ascending and disjoint.
pub(super) fn subtract(ranges: &[ClusterRange], others: &[ClusterRange]) -> Vec<ClusterRange> {
    let mut rest = Vec::new();
    let mut others = others.iter().peekable();
    for range in ranges {
        let mut start = range.start;
        while let Some(other) = others.peek() {
            if other.start >= range.end {
                break;
            }
            if start < other.start {
                rest.push(ClusterRange { start, end: other.start });
            }
            start = start.max(other.end);
            if other.end > range.end {
                break;
            }
            others.next();
        }
        if start < range.end {
            rest.push(ClusterRange { start, end: range.end });
        }
    }
    rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_subtracted_as_sets_are() {
        let mut rng = fastrand::Rng::with_seed(3);
        let random = |rng: &mut fastrand::Rng| {
            let mut ranges = Vec::new();
            let mut at = rng.u64(0..3);
            while at < 40 {
                let end = at + rng.u64(1..6);
                ranges.push(ClusterRange::new(at, end));
                at = end + rng.u64(1..5);
            }
            ranges
        };
        for _ in 0..500 {
            let (some, others) = (random(&mut rng), random(&mut rng));
            let rest = subtract(&some, &others);
            let holds =
                |ranges: &[ClusterRange], at| ranges.iter().any(|range| range.contains(ClusterIndex(at)));
            for at in 0..50 {
                assert_eq!(
                    holds(&rest, at),
                    holds(&some, at) && !holds(&others, at),
                    "{at} of {some:?} - {others:?}"
                );
            }
            assert!(rest.iter().all(|range| !range.is_empty()));
        }
    }
}
