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
//! a barrier or a copy, or does not look. So what is put off when he writes was told to be done after he had his permit, at the same time as
//! his write, and he who writes at the same time as a discard has no right to either order.
//!
//! The look comes after the permit because a barrier puts discards off by itself: who has waited at one finds the flag set by then, for to enter
//! the gate acquires what to lower the barrier has released.
//!
//! # The clock
//! The time-out of a copy counts from the moment at which the guest asks, and goes on when it has to ask another job: that one was asked beside the
//! first (`asks`), and has had as much time, unless the request is so large that only its beginning was. A large request goes
//! piece by piece, and each further piece has its own time. Time at a barrier is nobody's: it starts anew after one.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::admission::{Attempt, Permit};
use super::asks::Wish;
use super::disk::DiskShared;
use super::gate::Gate;
use super::jobs::{JobId, JobList, MOST_AT_A_TIME};
use crate::units::{ByteRange, ClusterIndex};

/// How a permit is asked for: nested or not.
pub(super) type Ask = fn(&Gate, &JobList, ByteRange) -> Attempt;

/// What is to be done next.
pub(super) enum Step {
    /// Nothing: write.
    Granted(Permit),
    /// Wait until the barrier is lowered.
    AtBarrier,
    /// Have discards that were put off forgotten in the range, and none put off there as long as he is about to write.
    Forget(Weak<Writer>),
    /// Have that copied; this long was waited for it already.
    Copy(Wish, Duration),
}

/// One who is about to write by himself, and had discards forgotten for that: lives until he has his permit, or goes.
pub(super) struct Writer;

/// See the module's header.
#[derive(Clone)]
pub(super) struct OwnWrite {
    pub(super) range: ByteRange,
    /// As long as it lives, nothing of the range is put off.
    writer: Option<Arc<Writer>>,
    /// When it first asked for copies.
    since: Option<Instant>,
    /// Where it asked for copies last.
    last: Option<(JobId, ClusterIndex)>,
}

impl OwnWrite {
    pub(super) fn new(range: ByteRange) -> Self {
        Self { range, writer: None, since: None, last: None }
    }

    pub(super) fn next(&mut self, disk: &DiskShared, ask: Ask) -> Step {
        match ask(disk.gate(), disk.jobs(), self.range) {
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
            Attempt::AtBarrier => {
                self.since = None;
                Step::AtBarrier
            }
            Attempt::Copy(job, clusters) => {
                let another = |(other, start)| {
                    // Of a large request only the first piece was asked beside.
                    if other == job { start < clusters.start } else { self.range.length > MOST_AT_A_TIME }
                };
                if self.last.is_some_and(another) {
                    self.since = None;
                }
                self.last = Some((job, clusters.start));
                let since = self.since.get_or_insert_with(Instant::now);
                Step::Copy(Wish { job, clusters, range: self.range }, since.elapsed())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::DiskId;
    use super::super::admission::attempt;
    use super::super::jobs::Watch;
    use super::*;
    use crate::interval_set::IntervalSet;
    use crate::ring::Wake;
    use crate::units::{ClusterRange, ClusterSize, Geometry, Length};

    struct Nobody;

    impl Wake for Nobody {
        fn wake(&self) {}
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
        assert!(matches!(write.next(&disk, attempt), Step::Granted(_)));
        disk.set_discards_put_off(true);
        let mut write = OwnWrite::new(ByteRange::new(0, 10));
        let Step::Forget(writer) = write.next(&disk, attempt) else { panic!("there are some") };
        assert_eq!(writer.strong_count(), 1);
        assert!(matches!(write.next(&disk, attempt), Step::Granted(_)));
        assert_eq!(writer.strong_count(), 0, "he has his permit");
        disk.set_discards_put_off(false);
        assert!(matches!(OwnWrite::new(ByteRange::new(0, 10)).next(&disk, attempt), Step::Granted(_)));
    }

    #[test]
    fn who_has_waited_looks_for_discards_that_were_put_off_meanwhile() {
        let disk = disk();
        let watch = watch(&disk, 1);
        let mut write = OwnWrite::new(ByteRange::new(0, 10));
        assert!(matches!(write.next(&disk, attempt), Step::Copy(..)));
        watch.set().mark_done(ClusterRange::new(0, 1));
        disk.gate().raise();
        assert!(matches!(write.next(&disk, attempt), Step::AtBarrier));
        disk.set_discards_put_off(true);
        assert!(disk.gate().is_drained());
        disk.gate().lower();
        assert!(matches!(write.next(&disk, attempt), Step::Forget(_)));
        disk.gate().raise();
        assert!(disk.gate().is_drained(), "he has given his permit back");
        disk.gate().lower();
        assert!(matches!(write.next(&disk, attempt), Step::Granted(_)));
    }

    fn asked(write: &mut OwnWrite, disk: &DiskShared) -> (JobId, ClusterRange, Duration) {
        match write.next(disk, attempt) {
            Step::Copy(wish, waited) => (wish.job, wish.clusters, waited),
            _ => panic!("there is something to copy"),
        }
    }

    #[test]
    fn the_clock_goes_on_from_job_to_job_that_were_asked_together() {
        let pause = Duration::from_millis(200);
        for (bytes, goes_on) in [(MOST_AT_A_TIME, true), (MOST_AT_A_TIME + 1, false)] {
            let disk = disk();
            let watches = [watch(&disk, 1), watch(&disk, 2)];
            let mut write = OwnWrite::new(ByteRange::new(0, bytes));
            let (job, clusters, _) = asked(&mut write, &disk);
            assert_eq!((job, clusters), (JobId(1), ClusterRange::new(0, 256)));
            std::thread::sleep(pause);
            watches[0].set().mark_done(ClusterRange::new(0, 16384));
            let (job, clusters, waited) = asked(&mut write, &disk);
            assert_eq!((job, clusters), (JobId(2), ClusterRange::new(0, 256)));
            assert_eq!(waited >= pause, goes_on, "{bytes} bytes: {waited:?}");
        }
    }

    #[test]
    fn the_clock_starts_anew_with_a_piece() {
        let pause = Duration::from_millis(200);
        let disk = disk();
        let watch = watch(&disk, 1);
        let mut write = OwnWrite::new(ByteRange::new(0, 4 * MOST_AT_A_TIME));
        let (_, clusters, _) = asked(&mut write, &disk);
        std::thread::sleep(pause);
        watch.set().mark_done(clusters);
        let (_, clusters, waited) = asked(&mut write, &disk);
        assert_eq!(clusters, ClusterRange::new(256, 512));
        assert!(waited < pause, "another piece: {waited:?}");
    }
}
