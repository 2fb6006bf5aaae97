//! Bugs of the reactor that are put in on purpose, to see that the tests catch them.
//!
//! Those of a single copy are in the copier; these are about who may write when. Each is a place where the reactor, or a guest with an I/O
//! path of its own, would ask something and does not.

use super::DiskId;
use super::gate::Gate;
use crate::copier::plan::PlantedBug;
use crate::units::ByteRange;

/// Which bug, and what it has to remember.
#[derive(Debug, Default)]
pub(super) struct Planted {
    pub(super) bug: Option<PlantedBug>,
    /// What is about to be discarded.
    discarding: Option<ByteRange>,
    /// Guests that have looked at the jobs before, by where they write.
    looked: Vec<(DiskId, ByteRange)>,
}

impl Planted {
    pub(super) fn has(&self, bug: PlantedBug) -> bool {
        self.bug == Some(bug)
    }

    /// The carrier asks whether `range` may be discarded now: whether it is told so in any case.
    pub(super) fn discards(&mut self, range: ByteRange) -> bool {
        let planted = self.has(PlantedBug::DiscardNotCopied);
        self.discarding = planted.then_some(range);
        planted
    }

    /// Somebody wants to change `range`: a pass for which nobody looks at the jobs.
    pub(super) fn pass(&mut self, disk: DiskId, gate: &Gate, range: ByteRange) -> Option<super::Attempt> {
        let discards = self.discarding.take() == Some(range);
        let at = self.looked.iter().position(|&looked| looked == (disk, range));
        if !discards && at.is_none() {
            return None;
        }
        let attempt = super::admission::attempt_without_a_look(gate);
        if let (Some(at), super::Attempt::Granted(_)) = (at, &attempt) {
            self.looked.swap_remove(at);
        }
        Some(attempt)
    }

    /// For which bytes somebody who wants to change `range` looks at the jobs.
    pub(super) fn looked_at(&self, range: ByteRange) -> ByteRange {
        let tail =
            if self.has(PlantedBug::TailForgotten) { range.length.saturating_sub(1).min(4096) } else { 0 };
        ByteRange::new(range.offset, range.length - tail)
    }

    /// Somebody who wants to change `range` has to have clusters copied first.
    pub(super) fn looked(&mut self, disk: DiskId, range: ByteRange) {
        if self.has(PlantedBug::NoSecondLook) {
            self.looked.push((disk, range));
        }
    }
}
