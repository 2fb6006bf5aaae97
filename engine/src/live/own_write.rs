//! One who writes to a disk by himself, from his call to his permit.
//!
//! # Model
//! A small state machine, which the three forms of `begin_write` share: they differ in how they wait, not in what for. It says what
//! is to be waited for next, and is asked again when that is over.
//!
//! # Discards that were put off
//! A discard that the engine has put off is told to be done before it is carried out. So whoever writes later by himself
//! must have it forgotten first, or it would take his new data with it. A disk says by a flag whether there are any; while there are, every
//! such writer asks the ring thread to take his range out, before anything else. The flag is set before the discard is told to be done, and a
//! writer who comes at the same time as a discard has no right to either order; but he who has waited for a copy looks again, lest a
//! discard that was told to be done meanwhile take away what is read after both.
//!
//! # The clock
//! The time-out of a copy counts from the moment at which the guest asks, and goes on when it has to ask another job: that one was asked beside the
//! first (`asks`), and has had as much time, unless the request is so large that only its beginning was. A large request goes
//! piece by piece, and each further piece has its own time. Time at a barrier is nobody's: it starts anew after one.

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
    /// Have discards that were put off forgotten in the range.
    Forget,
    /// Have that copied; this long was waited for it already.
    Copy(Wish, Duration),
}

/// See the module's header.
#[derive(Clone, Copy)]
pub(super) struct OwnWrite {
    pub(super) range: ByteRange,
    /// What was asked for is not to be carried out any more.
    forgotten: bool,
    /// When it first asked for copies.
    since: Option<Instant>,
    /// Where it asked for copies last.
    last: Option<(JobId, ClusterIndex)>,
}

impl OwnWrite {
    pub(super) fn new(range: ByteRange) -> Self {
        Self { range, forgotten: false, since: None, last: None }
    }

    pub(super) fn next(&mut self, disk: &DiskShared, ask: Ask) -> Step {
        if !self.forgotten && disk.has_discards_put_off() {
            self.forgotten = true;
            return Step::Forget;
        }
        match ask(disk.gate(), disk.jobs(), self.range) {
            Attempt::Granted(permit) => Step::Granted(permit),
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
                self.forgotten = false;
                let since = self.since.get_or_insert_with(Instant::now);
                Step::Copy(Wish { job, clusters, range: self.range }, since.elapsed())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

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
        assert!(matches!(write.next(&disk, attempt), Step::Forget));
        assert!(matches!(write.next(&disk, attempt), Step::Granted(_)));
        disk.set_discards_put_off(false);
        assert!(matches!(OwnWrite::new(ByteRange::new(0, 10)).next(&disk, attempt), Step::Granted(_)));
    }

    #[test]
    fn who_has_waited_for_a_copy_looks_for_discards_again() {
        let disk = disk();
        let watch = watch(&disk, 1);
        let mut write = OwnWrite::new(ByteRange::new(0, 10));
        disk.set_discards_put_off(true);
        assert!(matches!(write.next(&disk, attempt), Step::Forget));
        assert!(matches!(write.next(&disk, attempt), Step::Copy(..)));
        watch.set().mark_done(ClusterRange::new(0, 1));
        assert!(matches!(write.next(&disk, attempt), Step::Forget));
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
