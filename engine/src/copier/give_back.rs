//! Space that was reserved on a new target before t0, and is not needed.
//!
//! # Model
//! Of a live disk nobody knows before t0 what will have to be written, and reserving later would keep direct I/O from the target. So space is reserved
//! for all data at once, and what turns out to be zero, or not covered, or (sync `none`) was never copied keeps its space, since
//! nothing is written there. At the end, when everything is copied and before the last flush, the space of all clusters that hold no data is given back, in
//! windows as large as there are. No guest waits for the target any more then.
//!
//! # Safety
//! Whatever was written to the target as data, or may have been (what was left out), is *kept*; everything else reads as zeros,
//! before as after. An error is of no consequence: the space stays.

use super::bits::ClusterBits;
use super::{Copier, Task};
use crate::ring::{Op, ZeroMethod};
use crate::units::{ByteRange, ClusterCount, ClusterIndex, ClusterRange};

/// Requests in flight.
const MAX_IN_FLIGHT: u32 = 4;
/// Space is given back in whole blocks of this size.
const GRAIN: u64 = 4096;

/// See the module's header.
#[derive(Debug)]
pub(super) struct GiveBack {
    /// Clusters that hold data, or may.
    kept: ClusterBits,
    next: ClusterIndex,
    in_flight: u32,
    /// It is of no use: the target has no such operation.
    refused: bool,
}

impl GiveBack {
    pub(super) fn new(clusters: ClusterCount) -> Self {
        Self { kept: ClusterBits::new(clusters), next: ClusterIndex(0), in_flight: 0, refused: false }
    }

    pub(super) fn is_idle(&self) -> bool {
        self.in_flight == 0
    }
}

impl Copier {
    /// `clusters` hold data on the target, or may.
    pub(super) fn keep_space(&mut self, clusters: ClusterRange) {
        if let Some(give_back) = &mut self.give_back {
            give_back.kept.set(clusters);
        }
    }

    /// Everything is copied: give back what holds nothing. `false`: that is done.
    pub(super) fn gives_back(&mut self) -> bool {
        let geometry = self.plan.geometry;
        let window =
            ClusterCount((self.plan.limits.allocation_window_max / geometry.cluster_size().bytes()).max(1));
        while let Some(give_back) = &mut self.give_back {
            if give_back.in_flight == MAX_IN_FLIGHT || give_back.refused {
                break;
            }
            let Some(clusters) = give_back.kept.next_clear(give_back.next, window) else { break };
            give_back.next = clusters.end;
            let bytes = geometry.bytes_of(clusters);
            let end = bytes.end() - bytes.end() % GRAIN;
            if end <= bytes.offset {
                continue;
            }
            give_back.in_flight += 1;
            let range = ByteRange::between(bytes.offset, end);
            let op = Op::WriteZeroes { file: self.plan.target.file, range, method: ZeroMethod::Unmap };
            self.push(Task::GiveBack, op);
        }
        self.give_back.as_ref().is_some_and(|give_back| !give_back.is_idle())
    }

    pub(super) fn on_given_back(&mut self, refused: bool) {
        let give_back = self.give_back.as_mut().expect("it gives back");
        give_back.in_flight -= 1;
        give_back.refused |= refused;
    }
}
