//! One run of adjacent clusters on its way: read, inspected, written, or read back.
//!
//! # Model
//! A transfer holds the claims on its clusters, a run of slots for their bytes, and for each cluster the number of tasks (writes,
//! zeroings, the checksum) that must still succeed. A cluster's claim is completed the moment its last task has succeeded,
//! whatever its neighbours do; the slots go back together when the whole transfer has ended. A cluster one of whose tasks failed keeps
//! its claim until the transfer has ended and is released then, to be tried again alone.
//!
//! The transfer itself does nothing but this bookkeeping, so it can be followed on paper; the copier drives it.

use super::piece::{Fault, Piece};
use super::slots::SlotRun;
use super::tally::Was;
use crate::error::Operation;
use crate::interval_set::Claim;
use crate::ring::BufferRange;
use crate::units::{ByteRange, ClusterIndex, ClusterRange, Geometry};

/// Names a transfer among those in flight.
pub(super) type TransferId = usize;

/// What reading back a cluster must give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Expected {
    /// Contents with the checksum `digest`, of which `written` bytes were written.
    Digest {
        /// See above.
        digest: u128,
        /// See above.
        written: u32,
    },
    /// Zeros, noted as this.
    Zeros(Was),
}

impl Expected {
    /// As what the cluster was counted.
    pub(super) fn was(self) -> Was {
        match self {
            Self::Digest { written, .. } => Was::Data { written },
            Self::Zeros(was) => was,
        }
    }
}

/// What a transfer is for.
#[derive(Debug)]
pub(super) enum Purpose {
    /// Copying. `alone`: a single cluster tried again, with the retries that failed so far.
    Copy {
        /// See above.
        alone: Option<u32>,
    },
    /// Bringing clusters that are held in the fleece file to the target. `alone`: as above.
    Drain {
        /// See above.
        alone: Option<u32>,
    },
    /// Reading back and comparing, one expectation a cluster.
    Verify(Vec<Expected>),
}

/// What a cluster turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Category {
    /// Data, written to the target.
    Data,
    /// Read, and all zero.
    Zeros,
    /// No part of the copy.
    Uncovered,
    /// Data, written to this slot of the fleece file.
    Fleeced {
        /// See above.
        slot: u32,
    },
}

/// One cluster of a transfer.
#[derive(Clone, Copy, Debug)]
pub(super) struct ClusterWork {
    /// Tasks that must still end.
    tasks: u32,
    failed: bool,
    /// Its claim was completed (for a verification: it was compared).
    settled: bool,
    /// It goes to the fleece file as well, for a guest who waits for it.
    helped: bool,
    /// Its claim was completed before it was settled: it is in the fleece file.
    early: bool,
    pub(super) category: Category,
}

impl ClusterWork {
    /// Whether something that must still end keeps it from being settled, and nobody has helped it yet.
    pub(super) fn may_be_helped(&self) -> bool {
        self.tasks > 0 && !self.failed && !self.helped
    }

    pub(super) fn is_settled(&self) -> bool {
        self.settled
    }

    pub(super) fn is_early(&self) -> bool {
        self.early
    }
}

/// Why a transfer's cluster failed, for the error message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) fault: Fault,
    pub(super) operation: Operation,
    pub(super) range: ByteRange,
}

/// See the module's header.
#[derive(Debug)]
pub(super) struct Transfer {
    pub(super) purpose: Purpose,
    /// The request of a guest for which it was made.
    pub(super) guest: Option<super::guests::CbwId>,
    /// A guest waits for it: its operations go before the sweep's.
    pub(super) urgent: bool,
    /// It is the sweep's, made in the slots of one who has read the snapshot.
    pub(super) aside: bool,
    pub(super) clusters: ClusterRange,
    /// Bytes of `clusters`; they start at the first slot's start.
    pub(super) bytes: ByteRange,
    /// What of `bytes` is written unless it is zero; ascending, disjoint.
    pub(super) data: Vec<ByteRange>,
    pub(super) slots: SlotRun,
    claims: Vec<Claim>,
    work: Vec<ClusterWork>,
    /// Operations in flight or queued for it.
    pub(super) outstanding: u32,
    /// First failure met.
    pub(super) failure: Option<Failure>,
    /// What it wrote cannot be believed (a flush failed meanwhile), or was too little (the target's blanks are not zero after
    /// all): none of its clusters may be completed.
    pub(super) tainted: bool,
    /// Checksums of the clusters, once they are there.
    pub(super) digests: Vec<u128>,
    /// Bytes written as data.
    pub(super) written: u64,
    /// Its data was read, and its writes were started.
    pub(super) is_written_out: bool,
    slot_bytes: u32,
}

impl Transfer {
    pub(super) fn new(purpose: Purpose, clusters: ClusterRange, geometry: Geometry, slots: SlotRun) -> Self {
        assert!(!clusters.is_empty(), "a transfer has clusters");
        let work = ClusterWork {
            tasks: 0,
            failed: false,
            settled: false,
            helped: false,
            early: false,
            category: Category::Data,
        };
        let count = usize::try_from(clusters.count()).expect("bounded by the slots");
        Self {
            purpose,
            guest: None,
            urgent: false,
            aside: false,
            clusters,
            bytes: geometry.bytes_of(clusters),
            data: Vec::new(),
            slots,
            claims: Vec::new(),
            work: vec![work; count],
            outstanding: 0,
            failure: None,
            tainted: false,
            digests: Vec::new(),
            written: 0,
            is_written_out: false,
            slot_bytes: u32::try_from(geometry.cluster_size().bytes()).expect("at most 4 MiB"),
        }
    }

    /// Give it the claim on its clusters.
    pub(super) fn with_claim(mut self, claim: Claim) -> Self {
        assert_eq!(claim.range(), self.clusters, "the claim is on the transfer's clusters");
        self.claims.push(claim);
        self
    }

    /// Where `range` lies in the arena.
    pub(super) fn buffer_of(&self, range: ByteRange) -> BufferRange {
        assert!(
            range.offset >= self.bytes.offset && range.end() <= self.bytes.end(),
            "{range} outside {}",
            self.bytes
        );
        let skip = u32::try_from(range.offset - self.bytes.offset).expect("within the arena");
        let length = u32::try_from(range.length).expect("within the arena");
        self.slots.buffer(self.slot_bytes).part(skip, length)
    }

    /// A piece that moves `range`.
    pub(super) fn piece(&self, direction: super::piece::Direction, range: ByteRange) -> Piece {
        Piece::new(direction, range, self.buffer_of(range).start)
    }

    /// Whether all of `range`, which is contiguous, was taken for data. Else its holes were not read: the slots hold what was in
    /// them before.
    pub(super) fn reads_whole(&self, range: ByteRange) -> bool {
        self.data.iter().any(|data| data.offset <= range.offset && range.end() <= data.end())
    }

    fn index(&self, cluster: ClusterIndex) -> usize {
        assert!(self.clusters.contains(cluster), "{cluster:?} is not of {:?}", self.clusters);
        usize::try_from(cluster.0 - self.clusters.start.0).expect("bounded by the slots")
    }

    pub(super) fn work(&self, cluster: ClusterIndex) -> &ClusterWork {
        &self.work[self.index(cluster)]
    }

    pub(super) fn set_category(&mut self, cluster: ClusterIndex, category: Category) {
        let index = self.index(cluster);
        self.work[index].category = category;
    }

    /// One more task for each of `clusters`.
    pub(super) fn add_task(&mut self, clusters: ClusterRange) {
        for cluster in clusters.iter() {
            let index = self.index(cluster);
            assert!(!self.work[index].settled, "{cluster:?} is settled");
            self.work[index].tasks += 1;
        }
    }

    /// A task over `clusters` has succeeded. Gives those that have none left and may be settled, as contiguous ranges.
    pub(super) fn task_done(&mut self, clusters: ClusterRange) -> Vec<ClusterRange> {
        for cluster in clusters.iter() {
            let index = self.index(cluster);
            assert!(self.work[index].tasks > 0, "{cluster:?} had a task");
            self.work[index].tasks -= 1;
        }
        self.settleable(clusters)
    }

    /// A task over `clusters` has failed for good.
    pub(super) fn task_failed(&mut self, clusters: ClusterRange, failure: Failure) {
        for cluster in clusters.iter() {
            let index = self.index(cluster);
            self.work[index].tasks = self.work[index].tasks.saturating_sub(1);
            self.work[index].failed = true;
        }
        self.failure.get_or_insert(failure);
    }

    /// Which of `clusters` have no task left, have not failed and are not settled, as contiguous ranges.
    pub(super) fn settleable(&self, clusters: ClusterRange) -> Vec<ClusterRange> {
        let mut ranges: Vec<ClusterRange> = Vec::new();
        if self.tainted {
            return ranges;
        }
        for cluster in clusters.iter() {
            let work = self.work(cluster);
            if work.tasks > 0 || work.failed || work.settled {
                continue;
            }
            match ranges.last_mut() {
                // Those without a claim apart from those with one.
                Some(last) if last.end == cluster && self.work(last.start).early == work.early => {
                    last.end = ClusterIndex(cluster.0 + 1);
                }
                _ => ranges.push(ClusterRange::new(cluster.0, cluster.0 + 1)),
            }
        }
        ranges
    }

    /// Mark `clusters` as settled and take their claim out.
    pub(super) fn settle(&mut self, clusters: ClusterRange) -> Option<Claim> {
        for cluster in clusters.iter() {
            let index = self.index(cluster);
            let work = &mut self.work[index];
            assert!(work.tasks == 0 && !work.failed && !work.settled, "{cluster:?} may be settled");
            work.settled = true;
        }
        self.take_claim(clusters)
    }

    /// `cluster` goes to the fleece file as well.
    pub(super) fn set_helped(&mut self, cluster: ClusterIndex) {
        let index = self.index(cluster);
        self.work[index].helped = true;
    }

    /// Take out the claim on `cluster`, whose tasks go on.
    pub(super) fn take_early(&mut self, cluster: ClusterIndex) -> Claim {
        let index = self.index(cluster);
        assert!(!self.work[index].settled && !self.work[index].early, "{cluster:?} is claimed");
        self.work[index].early = true;
        self.take_claim(super::one(cluster)).expect("it is claimed")
    }

    fn take_claim(&mut self, clusters: ClusterRange) -> Option<Claim> {
        let at = self
            .claims
            .iter()
            .position(|claim| claim.range().start <= clusters.start && clusters.end <= claim.range().end)?;
        let mut claim = self.claims.swap_remove(at);
        if claim.range().end > clusters.end {
            let rest = claim.split_off(clusters.end);
            self.claims.push(rest);
        }
        if claim.range().start < clusters.start {
            let wanted = claim.split_off(clusters.start);
            self.claims.push(claim);
            claim = wanted;
        }
        Some(claim)
    }

    /// The clusters that are not settled, when everything has ended.
    pub(super) fn unsettled(&self) -> impl Iterator<Item = ClusterIndex> + '_ {
        assert_eq!(self.outstanding, 0, "an operation of the transfer is under way");
        self.clusters.iter().filter(|&cluster| !self.work(cluster).settled)
    }

    /// Of a verification: the clusters that are not settled, with what they should hold.
    pub(super) fn unverified(&self) -> Vec<(ClusterIndex, Expected)> {
        let Purpose::Verify(expected) = &self.purpose else { return Vec::new() };
        self.unsettled().map(|cluster| (cluster, expected[self.index(cluster)])).collect()
    }

    /// What is still claimed, whatever is under way: the copier is going away.
    pub(super) fn abandon(mut self) -> Vec<Claim> {
        std::mem::take(&mut self.claims)
    }

    /// What is still claimed, to be released.
    pub(super) fn into_claims(mut self) -> (Vec<Claim>, SlotRun) {
        assert_eq!(self.outstanding, 0, "an operation of the transfer is under way");
        (std::mem::take(&mut self.claims), self.slots)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::copier::slots::Slots;
    use crate::interval_set::IntervalSet;
    use crate::units::{ClusterCount, ClusterSize, Length};

    #[test]
    fn clusters_are_settled_one_by_one_and_the_failed_ones_stay_claimed() {
        let geometry = Geometry::new(Length(10 << 16), ClusterSize::DEFAULT);
        let set = IntervalSet::new(geometry.clusters()).unwrap();
        let claim = set.claim_first(ClusterRange::new(2, 6), ClusterCount(4)).unwrap();
        let mut slots = Slots::new(4, 0);
        let run = slots.take(0, 4);
        let mut transfer =
            Transfer::new(Purpose::Copy { alone: None }, claim.range(), geometry, run).with_claim(claim);
        transfer.add_task(ClusterRange::new(2, 4));
        transfer.add_task(ClusterRange::new(4, 5));
        transfer.add_task(ClusterRange::new(3, 4));
        assert_eq!(transfer.settleable(transfer.clusters), [ClusterRange::new(5, 6)]);
        set.complete(transfer.settle(ClusterRange::new(5, 6)).unwrap());
        assert_eq!(transfer.task_done(ClusterRange::new(2, 4)), [ClusterRange::new(2, 3)]);
        set.complete(transfer.settle(ClusterRange::new(2, 3)).unwrap());
        let failure = Failure {
            fault: Fault::NothingWritten,
            operation: Operation::Write,
            range: geometry.bytes_of(ClusterRange::new(4, 5)),
        };
        transfer.task_failed(ClusterRange::new(4, 5), failure);
        assert_eq!(transfer.task_done(ClusterRange::new(3, 4)), [ClusterRange::new(3, 4)]);
        set.complete(transfer.settle(ClusterRange::new(3, 4)).unwrap());
        assert_eq!(transfer.unsettled().collect::<Vec<_>>(), [ClusterIndex(4)]);
        let (claims, run) = transfer.into_claims();
        for claim in claims {
            assert_eq!(claim.range(), ClusterRange::new(4, 5));
            set.release(claim);
        }
        slots.give_back(&run);
        assert_eq!(set.count_done(), ClusterCount(3));
    }
}
