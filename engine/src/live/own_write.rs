//! One who writes to a disk by himself, from his call to his permit.
//!
//! # Model
//! A small state machine, which the three forms of `begin_write` share: they differ in how they wait, not in what for. It says what
//! is to be waited for next, and is asked again when that is over.
//!
//! # Discards that were put off
//! A discard that the engine has put off is told to be done before it is carried out. So whoever writes later by himself
//! must have it forgotten first, or it would take his new data with it. A disk says by a flag whether there are any, and says so before
//! the first of them is told to be done. Who has his permit in hand looks at it; if it is set, he gives the permit back, asks the ring thread to take his
//! range out, and begins again. From then on until he has his permit, nothing of his range is put off any more (`waits`), however long he waits for
//! a barrier or a copy, or does not look: it is forgotten before anybody is told that it is done, and before anything of it is carried out. So what is put off when he writes was told to be done after he had his permit, at the same time as
//! his write, and he who writes at the same time as a discard has no right to either order.
//!
//! The look comes after the permit because a barrier puts discards off by itself: who has waited at one finds the flag set by then, for to enter
//! the gate acquires what to lower the barrier has released.
//!
//! # The clock
//! There is none here: time counts while a job is asked, and the ring thread tells with its answer how long that was (`asks`). Who waits at a barrier, or
//! does not look, uses up nobody's time.

use std::sync::{Arc, Weak};

use super::admission::{Attempt, Permit};
use super::asks::{Copied, Waited, Wish};
use super::disk::DiskShared;
use crate::error::Error;
use crate::units::ByteRange;

/// What is to be done next.
pub(super) enum Step {
    /// Nothing: write.
    Granted(Permit),
    /// Wait until the barrier is lowered.
    AtBarrier,
    /// Have discards that were put off forgotten in the range, and none put off there as long as he is about to write.
    Forget(Weak<Writer>),
    /// Have that copied; so long jobs were asked before. What comes of it is to be told: [`OwnWrite::copied`].
    Copy(Wish, Waited),
}

/// One who is about to write by himself, and had discards forgotten for that: lives until he has his permit, or goes.
pub(super) struct Writer;

/// See the module's header.
#[derive(Clone)]
pub(super) struct OwnWrite {
    pub(super) range: ByteRange,
    /// As long as it lives, nothing of the range is put off.
    writer: Option<Arc<Writer>>,
    /// For how long jobs were asked.
    waited: Waited,
}

impl OwnWrite {
    pub(super) fn new(range: ByteRange) -> Self {
        Self { range, writer: None, waited: Waited::default() }
    }

    /// What is next; `attempt` tries to get a permit.
    pub(super) fn next(&mut self, disk: &DiskShared, attempt: impl FnOnce(ByteRange) -> Attempt) -> Step {
        match attempt(self.range) {
            Attempt::Granted(permit) if self.writer.is_none() && disk.has_discards_put_off() => {
                drop(permit);
                let writer = Arc::new(Writer);
                let step = Step::Forget(Arc::downgrade(&writer));
                self.writer = Some(writer);
                step
            }
            Attempt::Granted(permit) => {
                self.writer = None;
                Step::Granted(permit)
            }
            Attempt::AtBarrier => Step::AtBarrier,
            Attempt::Copy(job, clusters) => {
                Step::Copy(Wish { job, clusters, range: self.range }, self.waited.clone())
            }
        }
    }

    /// Take in what came of the copies.
    ///
    /// # Errors
    /// When they cannot be made: nothing may be written.
    pub(super) fn copied(&mut self, copied: Copied) -> Result<(), Error> {
        self.waited = copied.waited;
        copied.outcome.map_err(|error| Error::clone(&error))
    }
}

#[cfg(test)]
mod tests {
    use super::super::DiskId;
    use super::super::admission::attempt;
    use super::super::jobs::{JobId, Watch};
    use super::*;
    use crate::interval_set::IntervalSet;
    use crate::ring::Wake;
    use crate::units::{ClusterRange, ClusterSize, Geometry, Length};

    struct Nobody;

    impl Wake for Nobody {
        fn wake(&self) {}
    }

    fn at(disk: &DiskShared) -> impl FnOnce(ByteRange) -> Attempt {
        |range| attempt(disk.gate(), disk.jobs(), range)
    }

    const LENGTH: u64 = 1 << 30;

    fn disk() -> Arc<DiskShared> {
        DiskShared::new(DiskId(0), Arc::from("disk"), Length(LENGTH), Arc::new(Nobody))
    }

    fn watch(disk: &DiskShared, number: u64) -> Arc<Watch> {
        let geometry = Geometry::new(Length(LENGTH), ClusterSize::DEFAULT);
        let set = Arc::new(IntervalSet::new(geometry.clusters()).unwrap());
        let watch = Arc::new(Watch::new(JobId(number), set, geometry));
        disk.jobs().attach(Arc::clone(&watch));
        watch
    }

    #[test]
    fn discards_that_were_put_off_are_forgotten_first_and_once() {
        let disk = disk();
        let mut write = OwnWrite::new(ByteRange::new(0, 10));
        assert!(matches!(write.next(&disk, at(&disk)), Step::Granted(_)));
        disk.set_discards_put_off(true);
        let mut write = OwnWrite::new(ByteRange::new(0, 10));
        let Step::Forget(writer) = write.next(&disk, at(&disk)) else { panic!("there are some") };
        assert_eq!(writer.strong_count(), 1);
        assert!(matches!(write.next(&disk, at(&disk)), Step::Granted(_)));
        assert_eq!(writer.strong_count(), 0, "he has his permit");
        disk.set_discards_put_off(false);
        assert!(matches!(OwnWrite::new(ByteRange::new(0, 10)).next(&disk, at(&disk)), Step::Granted(_)));
    }

    #[test]
    fn who_has_waited_looks_for_discards_that_were_put_off_meanwhile() {
        let disk = disk();
        let watch = watch(&disk, 1);
        let mut write = OwnWrite::new(ByteRange::new(0, 10));
        assert!(matches!(write.next(&disk, at(&disk)), Step::Copy(..)));
        watch.set().mark_done(ClusterRange::new(0, 1));
        disk.gate().raise();
        assert!(matches!(write.next(&disk, at(&disk)), Step::AtBarrier));
        disk.set_discards_put_off(true);
        assert!(disk.gate().is_drained());
        disk.gate().lower();
        assert!(matches!(write.next(&disk, at(&disk)), Step::Forget(_)));
        disk.gate().raise();
        assert!(disk.gate().is_drained(), "he has given his permit back");
        disk.gate().lower();
        assert!(matches!(write.next(&disk, at(&disk)), Step::Granted(_)));
    }
}
