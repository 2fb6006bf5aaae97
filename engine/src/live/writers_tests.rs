//! Those who write by themselves, turn by turn, over the simulated ring: futures that are polled when it suits.

use std::future::Future;
use std::num::NonZeroU64;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use super::GroupFailure;
use super::admission::{Attempt, Permit};
use super::carrier::IoRequest;
use super::jobs::{JobId, MOST_AT_A_TIME};
use super::sim::{SimBeginWrite, SimJob};
use super::turns_tests::{Bench, CLUSTER, PATIENCE};
use crate::error::Error;
use crate::modes::ErrorPolicy;
use crate::ring::sim::{Disk, DiskTraits};
use crate::units::{ByteRange, ClusterRange, Speed};

/// What one who writes by himself has; he is not woken.
fn poll(write: &mut SimBeginWrite) -> Option<Result<Permit, Error>> {
    match Pin::new(write).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(permit) => Some(permit),
        Poll::Pending => None,
    }
}

impl Bench {
    /// Have a permit that was waited for long enough: all that it waits for has come.
    fn permit(&mut self, mut write: SimBeginWrite) -> Permit {
        let permit = self.turn_until(|_| poll(&mut write));
        permit.expect("nothing fails")
    }

    /// Two copies of the disk with these time-outs, whose sweeps get nowhere.
    fn two_slow_jobs(&mut self, timeouts: [Duration; 2]) -> Vec<JobId> {
        let target = Disk::sparse(usize::try_from(self.length).unwrap(), DiskTraits::default());
        self.world.borrow_mut().add_disk(target);
        let [first, second] = timeouts.map(|timeout| self.job(ErrorPolicy::Report, Some(timeout)));
        let jobs = vec![first, SimJob { target: 2, ..second }];
        let (handles, started) = self.engine.start(jobs, GroupFailure::GoOn, PATIENCE);
        for handle in &handles {
            handle.set_speed(NonZeroU64::new(1).map(Speed)).unwrap();
        }
        self.turn_until(|_| started.take()).unwrap()
    }

    /// What was not carried out when that is told is on the ring at most.
    fn discard(&mut self, start: u64, end: u64) {
        let range = ByteRange::between(start * CLUSTER, end * CLUSTER);
        let discard = self.engine.io(&self.disk, IoRequest::Discard { range });
        let told = self.turn_until_with(|bench| bench.engine.act().and_then(|_| discard.take()));
        assert!(told.result.is_ok());
    }

    fn holds(&self, cluster: u64, byte: u8) -> bool {
        let bytes =
            usize::try_from(cluster * CLUSTER).unwrap()..usize::try_from((cluster + 1) * CLUSTER).unwrap();
        self.world.borrow_mut().disk(0).view()[bytes].iter().all(|&here| here == byte)
    }
}

/// The barrier of a start that gives up. `first`: he had discards forgotten before it was up.
#[test]
fn what_is_discarded_while_a_guest_waits_at_a_barrier_is_discarded_before_his_write() {
    for first in [true, false] {
        let mut bench = Bench::new();
        let (handle, started) = bench.ask_for(bench.job(ErrorPolicy::Report, None), PATIENCE);
        handle.set_speed(NonZeroU64::new(1).map(Speed)).unwrap();
        let id = bench.turn_until(|_| started.take()).unwrap()[0];
        let copied = bench.engine.copy(id, ClusterRange::new(10, 11));
        assert!(bench.turn_until(|_| copied.take()).is_ok());
        bench.discard(15, 16);
        let range = ByteRange::new(10 * CLUSTER, CLUSTER);
        let Attempt::Granted(held) = bench.engine.attempt(&bench.disk, range) else { panic!("it is copied") };
        let mut write = bench.engine.begin_write(&bench.disk, range);
        if first {
            assert!(poll(&mut write).is_none(), "one is put off");
            bench.turn();
        }
        let timeout = Duration::from_millis(100);
        let (_, starts) = bench.ask_for(bench.job(ErrorPolicy::Report, None), timeout);
        bench.turn();
        assert!(poll(&mut write).is_none(), "the barrier is up");
        bench.discard(10, 11);
        // What comes with the barrier's coming down is on the ring then, and has not happened.
        assert!(bench.turn_until_with(|bench| bench.engine.act().and_then(|_| starts.take())).is_err());
        let permit = bench.permit(write);
        bench.world.borrow_mut().disk(0).fill(range.offset, &[9; 8192]);
        drop((permit, held));
        handle.cancel().unwrap();
        bench.turn_for(timeout);
        assert!(bench.holds(10, 9), "first: {first}");
        assert!(bench.holds(15, 0), "first: {first}");
    }
}

/// He has had discards forgotten, and is in no hurry: what of the next one could be carried out at once comes before his write, too.
#[test]
fn what_is_discarded_before_a_guest_looks_again_is_discarded_before_his_write() {
    let mut bench = Bench::new();
    let (handle, started) = bench.ask_for(bench.job(ErrorPolicy::Report, None), PATIENCE);
    handle.set_speed(NonZeroU64::new(1).map(Speed)).unwrap();
    bench.turn_until(|_| started.take()).unwrap();
    bench.discard(10, 11);
    let range = ByteRange::new(10 * CLUSTER, CLUSTER);
    let mut write = bench.engine.begin_write(&bench.disk, range);
    assert!(poll(&mut write).is_none(), "it is not copied");
    bench.turn_until(|bench| {
        matches!(bench.engine.attempt(&bench.disk, range), Attempt::Granted(_)).then_some(())
    });
    // It is told.
    bench.turn();
    assert!(poll(&mut write).is_none(), "one is put off");
    // He is answered. None is left to be looked at, and the next one would be looked at once.
    bench.turn_for(Duration::from_millis(25));
    bench.discard(10, 13);
    let permit = poll(&mut write).expect("he was answered").expect("nothing fails");
    bench.world.borrow_mut().disk(0).fill(range.offset, &[9; 8192]);
    drop(permit);
    bench.turn_for(Duration::from_millis(100));
    assert!(bench.holds(11, 7), "it is not copied");
    assert!(bench.holds(10, 9), "he wrote that after the discard was told to be done");
    handle.cancel().unwrap();
    bench.turn_for(Duration::from_millis(100));
    assert!(bench.holds(10, 9));
    assert!(bench.holds(11, 0) && bench.holds(12, 0));
}

/// Two jobs, of which the second could not copy while the first did; and a guest who is in no hurry.
#[test]
fn between_an_answer_and_the_next_question_nobodys_time_goes_by() {
    for pause in [Duration::ZERO, Duration::from_secs(10)] {
        let mut bench = Bench::new();
        let timeout = Duration::from_millis(500);
        let ids = bench.two_slow_jobs([timeout, timeout]);
        // All slots of the second are taken.
        bench.world.borrow_mut().disk(2).set_stuck();
        let many = bench.engine.copy(ids[1], ClusterRange::new(1, 9));
        bench.turn_for(Duration::from_millis(5));
        let range = ByteRange::new(15 * CLUSTER, 1);
        let mut write = bench.engine.begin_write(&bench.disk, range);
        assert!(poll(&mut write).is_none());
        bench.turn_for(Duration::from_millis(100));
        bench.world.borrow_mut().disk(2).set_free();
        drop(many);
        bench.turn_for(pause);
        assert!(bench.engine.jobs().count() == 2 && poll(&mut write).is_none(), "the second has not copied");
        drop(bench.permit(write));
        assert_eq!(bench.engine.jobs().filter(|job| !job.fails).count(), 2, "{pause:?}");
    }
}

/// The second fails beside the first, at once, for a reason that has gone since; the first keeps its guest for much longer than the second may.
#[test]
fn a_copy_that_has_failed_beside_another_has_the_rest_of_its_time() {
    for carried in [false, true] {
        let mut bench = Bench::new();
        bench.two_slow_jobs([Duration::from_secs(30), Duration::from_millis(500)]);
        let range = ByteRange::new(15 * CLUSTER, 512);
        bench.world.borrow_mut().disk(1).set_stuck();
        bench.world.borrow_mut().disk(2).set_bad(range);
        let write = IoRequest::Write { offset: range.offset, data: vec![9; 512] };
        let write = carried.then(|| bench.engine.io(&bench.disk, write));
        let mut own = bench.engine.begin_write(&bench.disk, range);
        assert!(carried || poll(&mut own).is_none());
        bench.turn_for(Duration::from_millis(100));
        bench.world.borrow_mut().disk(2).repair();
        bench.turn_for(Duration::from_secs(2));
        assert!(write.as_ref().is_none_or(|write| write.take().is_none()), "the first is stuck");
        bench.world.borrow_mut().disk(1).set_free();
        match write {
            Some(write) => assert!(bench.turn_until(|_| write.take()).result.is_ok()),
            None => drop(bench.permit(own)),
        }
        let fails = bench.engine.jobs().filter(|job| job.fails).count();
        assert_eq!((fails, bench.engine.jobs().count()), (0, 2), "carried: {carried}");
        let copied = bench.world.borrow_mut().disk(2).view()[usize::try_from(range.offset).unwrap()];
        assert_eq!(copied, 7, "carried: {carried}");
    }
}

/// How many of two copies, of which the second has half a minute, fail for one write of four pieces, for each of which the target of one does not answer for 12 s.
fn fail_for_four_pieces(carried: bool, stuck: usize) -> usize {
    let piece = if carried { 2 * CLUSTER } else { MOST_AT_A_TIME };
    let mut bench = Bench::of(5 * piece);
    bench.two_slow_jobs([300, 30].map(Duration::from_secs));
    let range = ByteRange::new(0, 4 * piece);
    let data = if carried { vec![9; usize::try_from(range.length).unwrap()] } else { Vec::new() };
    bench.world.borrow_mut().disk(stuck).set_stuck();
    let write = carried.then(|| bench.engine.io(&bench.disk, IoRequest::Write { offset: 0, data }));
    let mut own = bench.engine.begin_write(&bench.disk, range);
    let mut permit = None;
    let mut asks = |bench: &mut Bench, asked| {
        if !carried && permit.is_none() {
            permit = poll(&mut own);
        }
        matches!(bench.engine.attempt(&bench.disk, asked), Attempt::Granted(_)).then_some(())
    };
    for at in 0..4 {
        let asked = ByteRange::new(at * piece, piece);
        let next = bench.engine.now().after(Duration::from_secs(12));
        bench.turn_until(|bench| {
            assert!(asks(bench, asked).is_none() || at >= 2, "it does not answer");
            (bench.engine.now() >= next).then_some(())
        });
        bench.world.borrow_mut().disk(stuck).set_free();
        bench.turn_until(|bench| asks(bench, asked));
        bench.world.borrow_mut().disk(stuck).set_stuck();
    }
    match write {
        Some(write) => assert!(bench.turn_until(|_| write.take()).result.is_ok()),
        None => drop(permit.unwrap_or_else(|| Ok(bench.permit(own)))),
    }
    assert_eq!(bench.engine.jobs().count(), 2, "one that fails has not concluded");
    bench.engine.jobs().filter(|job| job.fails).count()
}

/// However large it is: a guest that waits for 48 s has waited for too long, though for no piece of it.
#[test]
fn a_large_write_has_its_time_once_and_not_for_each_piece() {
    for carried in [true, false] {
        assert_eq!(fail_for_four_pieces(carried, 2), 1, "carried: {carried}");
    }
}

/// The second copies each piece at once, and waits with the guest for the first.
#[test]
fn a_copy_that_is_done_beside_another_has_the_rest_of_its_time_for_the_next_piece() {
    for carried in [true, false] {
        assert_eq!(fail_for_four_pieces(carried, 1), 0, "carried: {carried}");
    }
}

/// A write of eight pieces, of which each is copied within a moment; and in one turn after the other the ring thread stands still, for longer than guests wait at most.
#[test]
fn while_the_ring_thread_stands_still_nobodys_time_goes_by() {
    for turn in 0.. {
        let mut bench = Bench::new();
        bench.two_slow_jobs([30, 30].map(Duration::from_secs));
        let data = vec![9; usize::try_from(16 * CLUSTER).unwrap()];
        let write = bench.engine.io(&bench.disk, IoRequest::Write { offset: 0, data });
        (0..turn).for_each(|_| bench.turn());
        if let Some(outcome) = write.take() {
            assert!(turn > 30 && outcome.result.is_ok(), "it takes {turn} turns");
            break;
        }
        let wait = bench.engine.act().expect("it has not ended");
        bench.engine.stand_still(Duration::from_secs(40));
        bench.engine.wait(wait);
        assert!(bench.turn_until(|_| write.take()).result.is_ok());
        let sound = bench.engine.jobs().filter(|job| !job.fails).count();
        assert_eq!(sound, 2, "it stood still in turn {turn}");
    }
}

/// The second has used up its time beside the first, for the first piece, and is slow with the others; its guest never waits for it alone, but for moments.
#[test]
fn a_copy_that_was_late_beside_another_and_is_there_has_its_time_for_the_next_piece() {
    let mut bench = Bench::new();
    bench.two_slow_jobs([300, 30].map(Duration::from_secs));
    bench.world.borrow_mut().disk(1).set_stuck();
    bench.world.borrow_mut().disk(2).set_stuck();
    let data = vec![9; usize::try_from(8 * CLUSTER).unwrap()];
    let write = bench.engine.io(&bench.disk, IoRequest::Write { offset: 0, data });
    bench.turn_for(Duration::from_secs(31));
    bench.world.borrow_mut().disk(2).set_free();
    bench.world.borrow_mut().disk(2).set_slowness(20);
    bench.turn_for(Duration::from_secs(9));
    bench.world.borrow_mut().disk(1).set_free();
    assert!(bench.turn_until(|_| write.take()).result.is_ok());
    assert_eq!(bench.engine.jobs().filter(|job| !job.fails).count(), 2);
}

/// The time for which they were asked together is that of both.
#[test]
fn time_for_which_jobs_were_asked_together_goes_by_for_both() {
    let mut bench = Bench::new();
    bench.two_slow_jobs([400, 500].map(Duration::from_millis));
    bench.world.borrow_mut().disk(1).set_stuck();
    bench.world.borrow_mut().disk(2).set_stuck();
    let before = bench.engine.now();
    let write = bench.engine.begin_write(&bench.disk, ByteRange::new(15 * CLUSTER, 1));
    drop(bench.permit(write));
    let waited = bench.engine.now().since(before);
    assert!(waited >= Duration::from_millis(500) && waited < Duration::from_millis(550), "{waited:?}");
    assert!(bench.engine.jobs().all(|job| job.fails), "both have waited for too long");
}
