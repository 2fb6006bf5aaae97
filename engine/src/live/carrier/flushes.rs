//! Flushes of a disk whose data goes through the page cache: after one that has failed no later one is believed.
//!
//! The kernel tells of a write-back that failed once, to the flush that happens to come first, and takes the pages for stored from then on. The next
//! flush succeeds, although what its guest was told is written may be lost. So all flushes fail from then on, until the disk is opened
//! anew. One that has succeeded while others were in flight is told when these have ended: one of them may have been told of what concerns it.
//!
//! Of direct I/O the write itself tells what has failed, and nothing is kept here. A file system makes a part of one of its blocks zero in the page
//! cache, though: from the first zeros that begin or end within one, a disk is one whose data goes there.

use std::collections::{BTreeSet, VecDeque};

use nix::errno::Errno;

use super::{Carrier, CarrierBug, CarrierPlan, Doing, Failure, Key, Task};
use crate::error::{Error, Operation};
use crate::piece::Fault;
use crate::units::ByteRange;

/// Bytes of a block of a file system, at most: a page.
const FILE_SYSTEM_BLOCK: u64 = 4096;

/// See the module's header.
#[derive(Debug)]
pub(super) struct Flushes {
    /// Whether data of the disk goes through the page cache.
    cached: bool,
    next: u64,
    in_flight: BTreeSet<u64>,
    /// They have succeeded, and wait for those in flight with a smaller number than theirs here; in the order in which they were done.
    waiting: VecDeque<(u64, Key)>,
    /// What the first that failed came to, and every one since.
    failed: Option<Error>,
}

impl Flushes {
    pub(super) fn new(plan: &CarrierPlan) -> Self {
        let cached = is_cached(plan) && !plan.has_bug(CarrierBug::FlushBelievedAgain);
        Self { cached, next: 0, in_flight: BTreeSet::new(), waiting: VecDeque::new(), failed: None }
    }

    /// `range` is about to be made zero without data.
    pub(super) fn zeroing(&mut self, range: ByteRange) {
        let within = |at: u64| !at.is_multiple_of(FILE_SYSTEM_BLOCK);
        self.cached |= within(range.offset) || within(range.end());
    }

    /// One is given out; its number.
    pub(super) fn begin(&mut self) -> u64 {
        self.next += 1;
        self.in_flight.insert(self.next);
        self.next
    }

    /// Why none is given out any more.
    pub(super) fn failed(&self) -> Option<&Error> {
        self.failed.as_ref()
    }

    /// One that waits for nothing any more.
    fn settled(&mut self) -> Option<Key> {
        let &(before, key) = self.waiting.front()?;
        if self.in_flight.first().is_some_and(|&oldest| oldest < before) {
            return None;
        }
        self.waiting.pop_front();
        Some(key)
    }
}

/// Whether data of the disk goes through the page cache: all of it, or that of a block that the disk ends within.
fn is_cached(plan: &CarrierPlan) -> bool {
    plan.file.direct_alignment.is_none_or(|block| !plan.length.0.is_multiple_of(block.into()))
}

impl<P> Carrier<P> {
    /// A flush has completed.
    pub(super) fn on_flushed(&mut self, task: &Task, result: Result<(), Errno>) {
        let Err(errno) = result else {
            self.requests[task.request].running().operations -= 1;
            // It waits for those that are in flight by now, if they matter.
            let before = if self.flushes.cached { self.flushes.next + 1 } else { 0 };
            self.flushes.waiting.push_back((before, task.request));
            return self.flush_over(task);
        };
        let failure = failure_of(errno);
        if self.flushes.cached && self.flushes.failed.is_none() {
            let error = self.error_of(failure).advise(
                "what was written before may be lost, and no flush of this disk succeeds any more: see the kernel's log, mend the cause, \
                 then close the disk and open it again",
            );
            self.flushes.failed = Some(error);
        }
        self.failed(task, failure.fault);
    }

    /// Nothing of `task` is in flight any more. If it was a flush, others may have waited for it.
    pub(super) fn flush_over(&mut self, task: &Task) {
        let Doing::Flush(number) = task.doing else { return };
        self.flushes.in_flight.remove(&number);
        while let Some(key) = self.flushes.settled() {
            if self.flushes.failed.is_some() {
                self.requests[key].running().failure = Some(failure_of(Errno::EIO));
            }
            self.end_window(key);
        }
    }
}

fn failure_of(errno: Errno) -> Failure {
    Failure { operation: Operation::Flush, range: ByteRange::new(0, 0), fault: Fault::Errno(errno) }
}
