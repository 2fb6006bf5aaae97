use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

use super::*;
use crate::interval_set::{Cancellation, IntervalSet, Waiter};
use crate::ring::Wake;
use crate::units::{ByteRange, ClusterCount, ClusterRange, ClusterSize, Geometry, Length};

/// Counts how often the ring thread would be woken.
#[derive(Default)]
struct Bell(AtomicUsize);

impl Bell {
    fn rung(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

impl Wake for Bell {
    fn wake(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

fn gate() -> (Arc<Gate>, Arc<Bell>) {
    let bell = Arc::new(Bell::default());
    (Gate::new(bell.clone()), bell)
}

fn enter(gate: &Gate) -> Pass {
    match gate.enter() {
        Entry::Admitted(pass) => pass,
        Entry::AtBarrier => panic!("the barrier is up"),
    }
}

fn is_held_back(gate: &Gate) -> bool {
    matches!(gate.enter(), Entry::AtBarrier)
}

/// Runs `work` on a thread of its own.
fn elsewhere<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    thread::scope(|scope| scope.spawn(work).join().unwrap())
}

/// A waiter, and how often it was woken.
fn waiter() -> (Waiter, Arc<Bell>) {
    let bell = Arc::new(Bell::default());
    let rings = bell.clone();
    (Waiter::callback(move || rings.wake()), bell)
}

#[test]
fn what_crosses_threads_may() {
    fn is_send<T: Send>() {}
    fn is_shared<T: Send + Sync>() {}
    is_send::<Permit>();
    is_shared::<Gate>();
    is_shared::<JobList>();
}

#[test]
fn the_gate_is_drained_when_the_last_pass_is_back_and_the_ring_thread_is_told() {
    let (gate, bell) = gate();
    let mine = enter(&gate);
    drop(enter(&gate));
    let theirs = elsewhere(|| enter(&gate));
    gate.raise();
    assert!(!gate.is_drained());
    drop(theirs);
    assert_eq!(bell.rung(), 1);
    assert!(!gate.is_drained());
    drop(mine);
    assert_eq!(bell.rung(), 2);
    assert!(gate.is_drained());
    gate.lower();
    drop(enter(&gate));
    assert_eq!(bell.rung(), 2, "without a barrier nobody is woken");
}

#[test]
fn who_comes_to_the_barrier_waits_until_it_is_lowered() {
    let (gate, _) = gate();
    drop(enter(&gate));
    gate.raise();
    assert!(is_held_back(&gate), "a thread that was here before");
    assert!(elsewhere(|| is_held_back(&gate)), "and one that was not");
    assert!(gate.is_drained(), "who was held back left nothing behind");
    let (waiter, bell) = waiter();
    let ticket = gate.wait(waiter).unwrap();
    assert!(!gate.wait_blocking(Some(Duration::from_millis(1))));
    assert_eq!(bell.rung(), 0);
    gate.lower();
    assert_eq!(bell.rung(), 1);
    assert_eq!(gate.cancel(ticket), Cancellation::AlreadyWoken);
    assert_eq!(bell.rung(), 1);
    let passes = [enter(&gate), elsewhere(|| enter(&gate))];
    drop(passes);
}

#[test]
fn a_barrier_that_is_down_is_not_waited_for() {
    let (gate, _) = gate();
    let (waiter, bell) = waiter();
    let waiter = gate.wait(waiter).unwrap_err();
    assert!(gate.wait_blocking(None));
    gate.raise();
    let ticket = gate.wait(waiter).unwrap();
    assert_eq!(gate.cancel(ticket), Cancellation::Removed);
    gate.lower();
    assert_eq!(bell.rung(), 0, "it was cancelled");
}

#[test]
fn a_waiter_that_panics_does_not_keep_the_others_asleep() {
    let (gate, _) = gate();
    gate.raise();
    let _first = gate.wait(Waiter::callback(|| panic!("as planned"))).unwrap();
    let (waiter, bell) = waiter();
    let _second = gate.wait(waiter).unwrap();
    assert!(catch_unwind(AssertUnwindSafe(|| gate.lower())).is_err());
    assert_eq!(bell.rung(), 1);
    drop(enter(&gate));
}

#[test]
fn a_thread_with_a_pass_is_let_through_unless_it_asks_not_to_be() {
    let (gate, bell) = gate();
    let outer = enter(&gate);
    gate.raise();
    let inner = enter(&gate);
    assert!(matches!(gate.enter_unnested(), Entry::AtBarrier));
    assert!(elsewhere(|| is_held_back(&gate)), "nesting is a matter of one thread");
    drop(outer);
    let innermost = enter(&gate);
    drop(inner);
    assert_eq!(bell.rung(), 0, "a pass of this thread is out all the time");
    drop(innermost);
    assert_eq!(bell.rung(), 1);
    assert!(is_held_back(&gate));
    assert!(gate.is_drained());
}

#[test]
fn passes_outlive_their_thread_and_their_gate() {
    let (gate, bell) = gate();
    let pass = thread::spawn({
        let gate = gate.clone();
        move || enter(&gate)
    });
    let pass = pass.join().unwrap();
    gate.raise();
    assert!(!gate.is_drained());
    let mine = {
        gate.lower();
        let mine = enter(&gate);
        gate.raise();
        mine
    };
    drop(pass);
    assert_eq!(bell.rung(), 1);
    elsewhere(|| drop(mine));
    assert_eq!(bell.rung(), 2);
    assert!(gate.is_drained());
    gate.lower();
    let last = enter(&gate);
    gate.raise();
    drop(gate);
    drop(last);
    assert_eq!(bell.rung(), 2, "the barrier went with the gate");
}

#[test]
fn a_panic_gives_the_pass_back() {
    let (gate, _) = gate();
    let panicked = thread::spawn({
        let gate = gate.clone();
        move || {
            let _pass = enter(&gate);
            panic!("as planned");
        }
    });
    assert!(panicked.join().is_err());
    gate.raise();
    assert!(gate.is_drained());
}

#[test]
fn threads_that_ended_are_forgotten() {
    let (gate, _) = gate();
    let (give, take) = mpsc::channel();
    for number in 0..10_000 {
        let (visited, give) = (gate.clone(), give.clone());
        let visit = thread::spawn(move || {
            let pass = enter(&visited);
            if number % 2_500 == 0 {
                give.send(pass).unwrap();
            }
        });
        visit.join().unwrap();
        assert!(gate.slots() <= 32, "{} slots after {number} threads", gate.slots());
    }
    gate.raise();
    assert_eq!(gate.slots(), 4, "those whose passes are out");
    assert!(!gate.is_drained());
    drop(take);
    assert!(gate.is_drained());
}

#[test]
fn gates_that_are_gone_are_forgotten_and_many_are_told_apart() {
    let gates: Vec<_> = (0..20).map(|_| gate().0).collect();
    let passes: Vec<_> = gates.iter().map(|gate| enter(gate)).collect();
    for _ in 0..3 {
        for gate in gates.iter().rev() {
            drop(enter(gate));
        }
    }
    for (gate, pass) in gates.iter().zip(passes) {
        gate.raise();
        assert!(!gate.is_drained());
        drop(pass);
        assert!(gate.is_drained());
    }
    drop(gates);
    for _ in 0..1000 {
        drop(enter(&gate().0));
        assert!(slot::kept() <= 2, "{} slots kept", slot::kept());
    }
}

/// Destructors of thread-local values run in no particular order, and may write to a disk.
#[test]
fn a_thread_may_enter_while_it_ends() {
    struct AtEnd(Arc<Gate>, mpsc::Sender<Entry>);
    impl Drop for AtEnd {
        fn drop(&mut self) {
            self.1.send(self.0.enter()).unwrap();
        }
    }
    thread_local! {
        static EARLY: RefCell<Option<AtEnd>> = const { RefCell::new(None) };
        static LATE: RefCell<Option<AtEnd>> = const { RefCell::new(None) };
    }
    let (gate, _) = gate();
    let visit = || {
        let (send, receive) = mpsc::channel();
        let at_end = AtEnd(gate.clone(), send.clone());
        EARLY.set(Some(at_end));
        drop(gate.enter());
        LATE.set(Some(AtEnd(gate.clone(), send)));
        receive
    };
    let entries = elsewhere(visit);
    assert_eq!(entries.iter().filter(|entry| matches!(entry, Entry::Admitted(_))).count(), 2);
    let pass = elsewhere(visit).recv().unwrap();
    gate.raise();
    assert!(!gate.is_drained(), "its pass counts");
    drop(pass);
    assert!(gate.is_drained());
    let entries = elsewhere(visit);
    assert_eq!(entries.iter().filter(|entry| matches!(entry, Entry::AtBarrier)).count(), 2);
    assert!(gate.is_drained());
}

#[test]
fn a_poisoned_gate_lets_everybody_through_and_is_never_drained() {
    let (gate, _) = gate();
    gate.raise();
    let (waiter, bell) = waiter();
    let _ticket = gate.wait(waiter).unwrap();
    gate.poison();
    gate.poison();
    assert_eq!(bell.rung(), 1);
    drop(enter(&gate));
    assert!(!gate.is_drained());
    gate.lower();
    gate.raise();
    assert!(!is_held_back(&gate));
    assert!(gate.wait_blocking(None));
}

#[test]
fn a_gate_that_goes_wakes_those_who_wait_at_it() {
    let (gate, _) = gate();
    gate.raise();
    let (waiter, bell) = waiter();
    let _ticket = gate.wait(waiter).unwrap();
    drop(gate);
    assert_eq!(bell.rung(), 1);
}

#[test]
#[should_panic(expected = "up already")]
fn one_barrier_at_a_time() {
    let (gate, _) = gate();
    gate.raise();
    gate.raise();
}

const CLUSTER: u64 = 1 << 16;

/// A job over `clusters` clusters and a little more.
fn job(number: u64, clusters: u64) -> Arc<Watch> {
    let geometry = Geometry::new(Length(clusters * CLUSTER + 1), ClusterSize::DEFAULT);
    let set = Arc::new(IntervalSet::new(geometry.clusters()).unwrap());
    Arc::new(Watch::new(JobId(number), set, geometry))
}

#[test]
fn the_first_job_that_lacks_a_cluster_is_named() {
    let jobs = JobList::default();
    let all = ByteRange::new(0, 4 * CLUSTER);
    assert_eq!(jobs.first_undone(all), None);
    let watches = [job(7, 4), job(8, 4)];
    watches.iter().for_each(|watch| jobs.attach(watch.clone()));
    assert_eq!(jobs.first_undone(all), Some((JobId(7), ClusterRange::new(0, 4))));
    watches[0].set().mark_done(ClusterRange::new(0, 4));
    assert_eq!(jobs.first_undone(all), Some((JobId(8), ClusterRange::new(0, 4))));
    watches[1].set().mark_done(ClusterRange::new(1, 3));
    let inside = ByteRange::new(CLUSTER, 2 * CLUSTER);
    assert_eq!(jobs.first_undone(inside), None);
    let one_byte_more = ByteRange::new(CLUSTER - 1, 2 * CLUSTER + 1);
    assert_eq!(jobs.first_undone(one_byte_more), Some((JobId(8), ClusterRange::new(0, 3))));
    let one_byte_after = ByteRange::new(CLUSTER, 2 * CLUSTER + 1);
    assert_eq!(jobs.first_undone(one_byte_after), Some((JobId(8), ClusterRange::new(3, 4))));
    assert!(jobs.detach(JobId(8)).is_some());
    assert!(jobs.detach(JobId(8)).is_none());
    assert_eq!(jobs.first_undone(all), None);
    assert_eq!(format!("{jobs:?}"), "[JobId(7)]");
}

#[test]
fn what_is_no_part_of_the_copy_needs_none() {
    let jobs = JobList::new();
    jobs.attach(job(1, 2));
    assert_eq!(jobs.first_undone(ByteRange::new(CLUSTER, 0)), None);
    assert_eq!(jobs.first_undone(ByteRange::new(3 * CLUSTER, 5)), None, "the disk has grown");
    let across = jobs.first_undone(ByteRange::new(2 * CLUSTER, 5 * CLUSTER));
    assert_eq!(across, Some((JobId(1), ClusterRange::new(2, 3))));
    let nowhere = JobList::new();
    let geometry = Geometry::new(Length(0), ClusterSize::DEFAULT);
    let set = Arc::new(IntervalSet::new(ClusterCount(0)).unwrap());
    nowhere.attach(Arc::new(Watch::new(JobId(1), set, geometry)));
    assert_eq!(nowhere.first_undone(ByteRange::new(0, 1)), None);
}

#[test]
fn a_large_write_is_copied_piece_by_piece() {
    let jobs = JobList::new();
    let watch = job(1, 4000);
    jobs.attach(watch.clone());
    let all = ByteRange::new(0, 3000 * CLUSTER);
    assert_eq!(jobs.first_undone(all), Some((JobId(1), ClusterRange::new(0, 256))));
    watch.set().mark_done(ClusterRange::new(0, 256));
    assert_eq!(jobs.first_undone(all), Some((JobId(1), ClusterRange::new(256, 512))));
    watch.set().mark_done(ClusterRange::new(256, 2900));
    assert_eq!(jobs.first_undone(all), Some((JobId(1), ClusterRange::new(2900, 3000))));
}

#[test]
fn what_may_be_discarded_is_found_run_by_run() {
    let jobs = JobList::new();
    let all = ByteRange::new(0, 4 * CLUSTER);
    assert_eq!(jobs.first_done(all), Some(all), "without jobs everything may");
    let watches = [job(1, 4), job(2, 4)];
    watches.iter().for_each(|watch| jobs.attach(watch.clone()));
    assert_eq!(jobs.first_done(all), None);
    watches[0].set().mark_done(ClusterRange::new(1, 4));
    assert_eq!(jobs.first_done(all), None, "the other has copied nothing");
    watches[1].set().mark_done(ClusterRange::new(0, 3));
    assert_eq!(jobs.first_done(all), Some(ByteRange::between(CLUSTER, 3 * CLUSTER)));
    let inside = ByteRange::new(CLUSTER + 5, 10);
    assert_eq!(jobs.first_done(inside), Some(inside));
    assert_eq!(jobs.first_done(ByteRange::new(3, CLUSTER)), Some(ByteRange::between(CLUSTER, CLUSTER + 3)));
}

/// A disk of 64 TiB: each look at all of it would take a second and more.
#[test]
fn a_discard_looks_at_its_own_range_only() {
    let jobs = JobList::new();
    let (before, all) = (std::time::Instant::now(), 1 << 30);
    let watch = job(1, all);
    jobs.attach(watch.clone());
    for number in 0..20_000 {
        let range = ByteRange::new(number * 100 * CLUSTER, 512 * CLUSTER);
        assert_eq!(jobs.first_done(range), None);
    }
    assert!(before.elapsed() < Duration::from_secs(20), "{:?}", before.elapsed());
}

#[test]
fn a_detached_job_is_let_go_of() {
    let jobs = JobList::new();
    jobs.attach(job(1, 1));
    jobs.attach(job(2, 1));
    let watch = jobs.detach(JobId(1)).unwrap();
    let mut left = 10_000;
    // Other tests of this process pin epochs, too.
    while Arc::strong_count(&watch) > 1 && left > 0 {
        JobList::collect();
        thread::sleep(Duration::from_micros(100));
        left -= 1;
    }
    assert_eq!(Arc::strong_count(&watch), 1);
    let other: Weak<_> = Arc::downgrade(jobs.detach(JobId(2)).as_ref().unwrap());
    drop(jobs);
    while other.strong_count() > 0 && left > 0 {
        JobList::collect();
        thread::sleep(Duration::from_micros(100));
        left -= 1;
    }
    assert_eq!(other.strong_count(), 0);
}

#[test]
fn a_write_is_granted_or_held_back_or_has_to_copy_first() {
    let ((gate, _), jobs) = (gate(), JobList::new());
    let range = ByteRange::new(0, 1);
    let Attempt::Granted(permit) = attempt(&gate, &jobs, range) else { panic!("nothing is in the way") };
    gate.raise();
    assert!(matches!(attempt_unnested(&gate, &jobs, range), Attempt::AtBarrier));
    let Attempt::Granted(nested) = attempt(&gate, &jobs, range) else {
        panic!("a permit of this thread is out")
    };
    drop(permit);
    assert!(!gate.is_drained());
    drop(nested);
    assert!(matches!(attempt(&gate, &jobs, range), Attempt::AtBarrier));
    assert!(gate.is_drained());
    let watch = job(3, 1);
    jobs.attach(watch.clone());
    gate.lower();
    let Attempt::Copy(JobId(3), clusters) = attempt(&gate, &jobs, range) else { panic!("nothing is copied") };
    assert_eq!(clusters, ClusterRange::new(0, 1));
    gate.raise();
    assert!(gate.is_drained(), "who has to copy holds no pass");
    gate.lower();
    watch.set().mark_done(clusters);
    assert!(matches!(attempt(&gate, &jobs, range), Attempt::Granted(_)));
}
