//! Guests of a [`SimEngine`] with an I/O path of their own: the product's own `begin_write`, as a future and with a callback.
//!
//! Simulated sockets do not leave their thread, and with them neither does the box in which commands are left; callbacks may. So what these guests ask is
//! left in a box of its own, and goes over at the beginning of the next turn.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};

use crossbeam::queue::SegQueue;
use parking_lot::Mutex;

use super::DiskId;
use super::admission::{Attempt, Permit, attempt_unnested};
use super::ask::Answer;
use super::asks::{Copied, Waited, Wish};
use super::begin_write::{Begin, Desk, begin_with};
use super::command::Command;
use super::disk::DiskShared;
use super::own_write::{OwnWrite, Writer};
use super::planted::Planted;
use super::sim::{SimDisk, SimEngine};
use crate::copier::plan::PlantedBug;
use crate::error::Error;
use crate::ring::Wake;
use crate::ring::sim::SimSocket;
use crate::units::ByteRange;

/// What such guests have met since the last look.
#[derive(Clone, Copy, Debug, Default)]
pub struct SimSteps {
    /// Barriers.
    pub at_barrier: u64,
    /// Copies to wait for.
    pub copies: u64,
    /// Discards that were put off.
    pub forgot: u64,
}

enum Question {
    Forget(DiskId, ByteRange, Weak<Writer>, Answer<Result<(), Arc<Error>>>),
    Copy(Wish, Waited, Answer<Copied>),
}

/// What all of them share.
pub(super) struct Writers {
    questions: SegQueue<Question>,
    left: Arc<AtomicBool>,
    waker: Arc<dyn Wake>,
    dead: AtomicBool,
    planted: Mutex<Planted>,
    steps: [AtomicU64; 3],
}

impl Writers {
    /// Those of an engine: the flag of its box, and what wakes its ring.
    pub(super) fn new(left: Arc<AtomicBool>, waker: Arc<dyn Wake>) -> Arc<Self> {
        Arc::new(Self {
            questions: SegQueue::new(),
            left,
            waker,
            dead: AtomicBool::new(false),
            planted: Mutex::default(),
            steps: Default::default(),
        })
    }

    pub(super) fn plant(&self, bug: Option<PlantedBug>) {
        self.planted.lock().bug = bug;
    }

    /// The ring thread is gone: nobody takes a question any more.
    pub(super) fn die(&self) {
        self.dead.store(true, Ordering::SeqCst);
        while self.questions.pop().is_some() {}
    }

    fn ask(&self, question: Question) {
        self.questions.push(question);
        if self.dead.load(Ordering::SeqCst) {
            self.die();
        } else {
            self.waker.wake();
        }
    }

    fn count(&self, step: usize) {
        self.steps[step].fetch_add(1, Ordering::Relaxed);
    }

    fn take_steps(&self) -> SimSteps {
        let [at_barrier, copies, forgot] =
            [0, 1, 2].map(|step: usize| self.steps[step].swap(0, Ordering::Relaxed));
        SimSteps { at_barrier, copies, forgot }
    }

    /// What was asked since the last turn, as the ring thread takes it.
    pub(super) fn take(&self) -> Option<Command<usize, SimSocket>> {
        Some(match self.questions.pop()? {
            Question::Forget(disk, range, writer, answer) => {
                Command::ForgetDiscards { disk, range, writer, answer }
            }
            Question::Copy(wish, waited, answer) => Command::Copy { wish, waited, answer },
        })
    }
}

/// Where one of them asks.
#[derive(Clone)]
struct SimDesk {
    disk: Arc<DiskShared>,
    writers: Arc<Writers>,
}

impl Desk for SimDesk {
    fn shared(&self) -> &Arc<DiskShared> {
        &self.disk
    }

    fn forget(&self, range: ByteRange, writer: Weak<Writer>, answer: Answer<Result<(), Arc<Error>>>) {
        self.writers.count(2);
        if self.writers.planted.lock().has(PlantedBug::DiscardNotForgotten) {
            return answer.give(Ok(()));
        }
        self.writers.ask(Question::Forget(self.disk.id(), range, writer, answer));
    }

    fn copy(&self, wish: Wish, waited: Waited, answer: Answer<Copied>) {
        self.writers.count(1);
        self.writers.ask(Question::Copy(wish, waited, answer));
    }

    fn left(&self) -> &Arc<AtomicBool> {
        &self.writers.left
    }

    fn attempt(&self, range: ByteRange) -> Attempt {
        let (disk, gate, mut planted) = (self.disk.id(), self.disk.gate(), self.writers.planted.lock());
        let passed = planted.pass(disk, gate, range);
        let look = || attempt_unnested(gate, self.disk.jobs(), planted.looked_at(range));
        let attempt = passed.unwrap_or_else(look);
        match attempt {
            Attempt::Granted(_) => {}
            Attempt::AtBarrier => self.writers.count(0),
            Attempt::Copy(..) => planted.looked(disk, range),
        }
        attempt
    }
}

/// A permit to come, as [`super::BeginWrite`].
#[must_use = "a future does nothing unless it is polled"]
pub struct SimBeginWrite(Begin<SimDesk>);

impl Future for SimBeginWrite {
    type Output = Result<Permit, Error>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.poll(context)
    }
}

impl SimEngine {
    fn desk(&self, disk: &SimDisk) -> SimDesk {
        SimDesk { disk: Arc::clone(&disk.0), writers: Arc::clone(self.writers()) }
    }

    /// A guest is about to write by himself. Goes on when the engine has died.
    pub fn begin_write(&self, disk: &SimDisk, range: ByteRange) -> SimBeginWrite {
        SimBeginWrite(Begin::new(self.desk(disk), OwnWrite::new(range)))
    }

    /// The same with a callback.
    pub fn begin_write_with(
        &self,
        disk: &SimDisk,
        range: ByteRange,
        call: impl FnOnce(Result<Permit, Error>) + Send + 'static,
    ) {
        begin_with(self.desk(disk), Ok(OwnWrite::new(range)), call);
    }

    /// What such guests have met since the last call.
    #[must_use]
    pub fn take_steps(&self) -> SimSteps {
        self.writers().take_steps()
    }
}
