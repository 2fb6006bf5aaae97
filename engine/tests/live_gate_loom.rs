//! The gate, its barrier and the list of jobs under loom: every interleaving, and every value that the memory model lets a
//! load return, of cases as small as show the point. Run with
//! `cargo test -p engine --features loom --test live_gate_loom`.
//!
//! The starter sleeps until it is woken and guests wait without a timeout, so a wake-up that is lost is a deadlock, which
//! loom reports. What a guest does under its pass is a write to a cell that nothing else protects, which the starter
//! reads at t0: loom reports a race if the two are not in order. Bookkeeping of the tests themselves is in standard
//! atomics: they are no part of the model.
//!
//! Passes, gates and threads that end touch modelled words in their destructors, so a model that panics aborts the
//! process while it cleans up, after the message. What is planted here is therefore counted rather than asserted.
//!
//! loom takes SeqCst accesses for acquire and release. That costs these models nothing: the gate has none.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use engine::interval_set::{Cancellation, IntervalSet, Waiter};
use engine::live::{Attempt, Entry, Gate, JobId, JobList, Pass, Watch, attempt};
use engine::ring::Wake;
use engine::units::{ByteRange, ClusterSize, Geometry, Length};
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread::{self, Thread};

const BYTES: ByteRange = ByteRange::new(0, 512);

fn model(preemptions: Option<usize>, case: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = preemptions;
    builder.check(case);
}

/// Wakes the starter's thread. As with a ring, a call while it is awake is kept.
struct Starter(Thread);

impl Wake for Starter {
    fn wake(&self) {
        self.0.unpark();
    }
}

/// The contents of the source.
struct Source(UnsafeCell<u32>);

// SAFETY: the tests reach it only under a pass or at t0; that this suffices is what loom checks.
unsafe impl Sync for Source {}
// SAFETY: a number, at home in any thread.
unsafe impl Send for Source {}

/// A disk with its gate and jobs. The thread that makes it is the one that starts jobs.
struct Disk {
    gate: std::sync::Arc<Gate>,
    jobs: JobList,
    source: Source,
    /// The barrier is up and the gate was found drained.
    is_t0: AtomicBool,
    /// A job is past its t0.
    is_live: AtomicBool,
}

impl Disk {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            gate: Gate::new(std::sync::Arc::new(Starter(thread::current()))),
            jobs: JobList::new(),
            source: Source(UnsafeCell::new(0)),
            is_t0: AtomicBool::new(false),
            is_live: AtomicBool::new(false),
        })
    }

    /// Takes t0: returns what the source holds then.
    fn take_t0(&self, at_t0: impl FnOnce()) -> u32 {
        self.gate.raise();
        while !self.gate.is_drained() {
            thread::park();
        }
        self.is_t0.store(true, Ordering::Relaxed);
        // SAFETY: loom panics on a race before the pointer is used.
        let seen = self.source.0.with(|source| unsafe { *source });
        at_t0();
        assert!(self.gate.is_drained(), "drained, then no longer");
        self.is_t0.store(false, Ordering::Relaxed);
        self.gate.lower();
        seen
    }

    /// Attaches a job that has copied nothing.
    fn attach_job(&self) {
        let geometry = Geometry::new(Length(1), ClusterSize::DEFAULT);
        let set = std::sync::Arc::new(IntervalSet::new(geometry.clusters()).unwrap());
        self.jobs.attach(std::sync::Arc::new(Watch::new(JobId(1), set, geometry)));
        self.is_live.store(true, Ordering::Relaxed);
    }

    fn enter(&self) -> Pass {
        loop {
            match self.gate.enter() {
                Entry::Admitted(pass) => return pass,
                Entry::AtBarrier => assert!(self.gate.wait_blocking(None)),
            }
        }
    }

    /// By whoever holds a pass; only one guest in each model writes.
    fn write(&self) {
        self.look_around();
        // SAFETY: loom panics on a race before the pointer is used.
        self.source.0.with_mut(|source| unsafe { *source += 1 });
        self.look_around();
    }

    /// The same without a write, for more guests than one.
    fn look_around(&self) {
        assert!(!self.is_t0.load(Ordering::Relaxed), "t0 is taken with a pass out");
    }
}

/// What a guest does with the disk, on a thread of its own.
fn guest<R: 'static>(disk: &Arc<Disk>, work: impl FnOnce(&Disk) -> R + 'static) -> thread::JoinHandle<R> {
    let disk = disk.clone();
    thread::spawn(move || work(&disk))
}

#[test]
fn a_write_is_before_t0_or_after_it() {
    static BEFORE: [AtomicU32; 2] = [const { AtomicU32::new(0) }; 2];
    model(None, || {
        let disk = Disk::new();
        let guest = guest(&disk, |disk| {
            let pass = disk.enter();
            disk.write();
            drop(pass);
        });
        let seen = disk.take_t0(|| ());
        BEFORE[usize::try_from(seen).unwrap()].fetch_add(1, Ordering::Relaxed);
        guest.join().unwrap();
    });
    let [after, before] = [0, 1].map(|seen| BEFORE[seen].load(Ordering::Relaxed));
    assert!(before > 0 && after > 0, "{before} executions wrote before t0, {after} after it");
}

/// The guest's slot exists before the barrier is raised, so that only the slot's word is between the two.
#[test]
fn a_guest_that_was_there_before_is_held_back_as_well() {
    model(Some(3), || {
        let disk = Disk::new();
        let guest = guest(&disk, |disk| {
            for _ in 0..2 {
                let pass = disk.enter();
                disk.write();
                drop(pass);
            }
        });
        let seen = disk.take_t0(|| ());
        assert!(seen <= 2);
        guest.join().unwrap();
    });
}

#[test]
fn the_gate_is_drained_when_both_guests_are_out() {
    model(Some(2), || {
        let disk = Disk::new();
        let guests = [(); 2].map(|()| {
            guest(&disk, |disk| {
                let pass = disk.enter();
                disk.look_around();
                drop(pass);
            })
        });
        disk.take_t0(|| ());
        guests.into_iter().for_each(|guest| guest.join().unwrap());
    });
}

/// One guest at two barriers in a row: it must not take the second for the first, nor be woken for nothing.
#[test]
fn two_starts_in_a_row() {
    model(Some(2), || {
        let disk = Disk::new();
        let guest = guest(&disk, |disk| {
            let pass = disk.enter();
            disk.write();
            drop(pass);
        });
        let first = disk.take_t0(|| ());
        let second = disk.take_t0(|| ());
        assert!(first <= second);
        guest.join().unwrap();
    });
}

#[test]
fn a_nested_pass_is_let_through_the_barrier() {
    model(Some(3), || {
        let disk = Disk::new();
        let guest = guest(&disk, |disk| {
            let outer = disk.enter();
            let Entry::Admitted(inner) = disk.gate.enter() else { panic!("a pass of this thread is out") };
            drop(outer);
            disk.write();
            drop(inner);
        });
        disk.take_t0(|| ());
        guest.join().unwrap();
    });
}

/// The outer pass comes back on another thread while its own thread enters once more: it is let through or not, by
/// whichever is first.
#[test]
fn a_pass_that_is_given_away_lets_its_thread_through_while_it_is_out() {
    model(Some(2), || {
        let disk = Disk::new();
        let guest = guest(&disk, |disk| {
            let outer = disk.enter();
            let other = thread::spawn(move || drop(outer));
            if let Entry::Admitted(inner) = disk.gate.enter() {
                disk.write();
                drop(inner);
            }
            other.join().unwrap();
        });
        disk.take_t0(|| ());
        guest.join().unwrap();
    });
}

/// The thread ends and its slot is an orphan, which the gate forgets when it raises the barrier, but not while its pass is
/// out.
#[test]
fn a_pass_counts_when_its_thread_has_ended() {
    model(Some(2), || {
        let disk = Disk::new();
        let first = guest(&disk, Disk::enter);
        let second = guest(&disk, move |disk| {
            let pass = first.join().unwrap();
            disk.write();
            drop(pass);
        });
        let seen = disk.take_t0(|| ());
        assert!(seen <= 1);
        second.join().unwrap();
    });
}

#[test]
fn a_waiter_is_either_cancelled_or_woken() {
    model(None, || {
        let disk = Disk::new();
        let woken = Arc::new(AtomicU32::new(0));
        disk.gate.raise();
        let count = woken.clone();
        let waiter = Waiter::callback(move || {
            count.fetch_add(1, Ordering::Relaxed);
        });
        let ticket = disk.gate.wait(waiter).unwrap();
        let guest = guest(&disk, |disk| disk.gate.cancel(ticket) == Cancellation::Removed);
        disk.gate.lower();
        let cancelled = guest.join().unwrap();
        assert_eq!(woken.load(Ordering::Relaxed), u32::from(!cancelled));
    });
}

#[test]
fn a_poisoned_gate_lets_everybody_go() {
    model(Some(3), || {
        let disk = Disk::new();
        let guest = guest(&disk, |disk| drop(disk.enter()));
        disk.gate.raise();
        disk.gate.poison();
        assert!(!disk.gate.is_drained());
        guest.join().unwrap();
    });
}

/// A job starts while a guest writes. Says in how many executions the guest, as `permitted` says, was permitted to write
/// without a copy, and held its pass, after t0.
fn passed_by(permitted: impl Fn(&Disk) -> Option<Pass> + Copy + Send + Sync + 'static) -> u32 {
    let counts = [(); 2].map(|()| std::sync::Arc::new(AtomicU32::new(0)));
    let [passed_by, copied] = counts.clone();
    model(Some(3), move || {
        let disk = Disk::new();
        let [passed_by, copied] = [&passed_by, &copied].map(std::sync::Arc::clone);
        let guest = guest(&disk, move |disk| {
            let Some(pass) = permitted(disk) else {
                copied.fetch_add(1, Ordering::Relaxed);
                return;
            };
            if disk.is_live.load(Ordering::Relaxed) {
                passed_by.fetch_add(1, Ordering::Relaxed);
            } else {
                disk.write();
            }
            drop(pass);
        });
        disk.take_t0(|| disk.attach_job());
        guest.join().unwrap();
    });
    let [passed_by, copied] = counts.map(|count| count.load(Ordering::Relaxed));
    assert!(copied > 0, "no execution in which the guest came after t0");
    passed_by
}

#[test]
fn a_write_after_t0_sees_the_job() {
    let permitted = |disk: &Disk| {
        let pass = disk.enter();
        disk.jobs.first_undone(BYTES).is_none().then_some(pass)
    };
    assert_eq!(passed_by(permitted), 0);
}

/// A guest that was there before needs no lock to enter after t0: all that it has of t0 it has from its slot's word.
#[test]
fn a_guest_that_was_there_before_sees_the_job_as_well() {
    let permitted = |disk: &Disk| {
        drop(disk.enter());
        let pass = disk.enter();
        disk.jobs.first_undone(BYTES).is_none().then_some(pass)
    };
    assert_eq!(passed_by(permitted), 0);
}

/// The models can fail: a guest that looks at the list before it enters may miss the job.
#[test]
fn a_guest_that_looks_before_it_enters_may_miss_the_job() {
    let permitted = |disk: &Disk| {
        if disk.jobs.first_undone(BYTES).is_some() {
            return None;
        }
        Some(disk.enter())
    };
    assert!(passed_by(permitted) > 0);
}

/// The same with the function that guests call, which does it in the right order.
#[test]
fn an_attempt_is_granted_before_t0_or_told_to_copy() {
    model(Some(3), || {
        let disk = Disk::new();
        let guest = guest(&disk, |disk| {
            loop {
                match attempt(&disk.gate, &disk.jobs, BYTES) {
                    Attempt::Granted(permit) => {
                        assert!(!disk.is_live.load(Ordering::Relaxed), "a write after t0 without a copy");
                        disk.write();
                        return drop(permit);
                    }
                    Attempt::Copy(job, _) => return assert_eq!(job, JobId(1)),
                    Attempt::AtBarrier => assert!(disk.gate.wait_blocking(None)),
                }
            }
        });
        disk.take_t0(|| disk.attach_job());
        guest.join().unwrap();
    });
}

/// It is the barrier that makes t0 an instant: a job that is attached without one is missed by a write under way.
#[test]
fn a_job_that_is_attached_without_a_barrier_may_be_missed() {
    static MISSED: AtomicU32 = AtomicU32::new(0);
    model(Some(3), || {
        let disk = Disk::new();
        let guest = guest(&disk, |disk| {
            if let Attempt::Granted(permit) = attempt(&disk.gate, &disk.jobs, BYTES) {
                thread::yield_now();
                MISSED.fetch_add(u32::from(disk.is_live.load(Ordering::Relaxed)), Ordering::Relaxed);
                drop(permit);
            }
        });
        disk.attach_job();
        guest.join().unwrap();
    });
    assert!(MISSED.load(Ordering::Relaxed) > 0);
}
