//! A disk as the ring thread has it: its carrier, and who waits for what of it.
//!
//! Besides requests there are *questions* of clients of exports, where it has data. Few of them are on the ring at a time: a disk that takes its time
//! over them keeps no places that others could use, nor its own from requests.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use nix::errno::Errno;

use super::admission::Permit;
use super::ask::Answer;
use super::asks::Waited;
use super::carrier::{Carrier, CarrierPlan, IoId, IoOutcome, IoRequest};
use super::controller::Passers;
use super::disk::DiskShared;
use super::exports::{Question, ServedIo};
use super::felt::Felt;
use super::opened::Opened;
use super::room::Share;
use crate::copier::plan::Side;
use crate::error::{Error, ErrorKind, Operation};
use crate::storage::OpenedSource;
use crate::units::Timestamp;

/// Most requests of callers that a disk has, under way or waiting. Each has its own buffer, so this is a bound on memory for those who send
/// without waiting. Those of clients of exports do not count, nor are they refused: their connections bound them, in number and in bytes, and
/// they have nobody to tell that he is to come again.
const MAX_OF_CALLERS: usize = 16_384;

/// Most questions of a disk on the ring. Those that wait for that are bounded by what each client may have under way.
pub(super) const MAX_QUESTIONS: usize = 2;

/// Who waits for the outcome of a request.
pub(super) enum IoAsker {
    /// Whoever called a method of the disk.
    Caller(Answer<IoOutcome>),
    /// A client of an export.
    Client(ServedIo),
}

/// A request that waits for room in the carrier.
struct Queued {
    request: IoRequest,
    asker: IoAsker,
    since: Timestamp,
}

/// See the module's header.
pub(super) struct HostedDisk {
    pub(super) shared: Arc<DiskShared>,
    pub(super) side: Side,
    pub(super) carrier: Carrier<Permit>,
    /// Kept until it has left the ring.
    share: Share,
    /// Kept until it is closed.
    opened: Option<Arc<Opened>>,
    /// With the moment at which each request came.
    askers: BTreeMap<IoId, (IoAsker, Timestamp)>,
    /// Those who write to it by themselves.
    pub(super) passers: Passers,
    /// What its guests felt of late.
    pub(super) felt: Felt,
    queue: VecDeque<Queued>,
    /// Requests of callers that have no outcome yet.
    of_callers: usize,
    /// In the order in which they came.
    questions: VecDeque<Question>,
    /// Of the questions those on the ring.
    asked: usize,
    /// Operations on the ring, questions included.
    pub(super) in_flight: usize,
    next_io: u64,
    /// Its last handle is gone: it goes when nothing is left to do.
    pub(super) closing: bool,
    /// What its handles had open.
    source: Option<Box<OpenedSource>>,
}

impl HostedDisk {
    pub(super) fn new(
        side: Side,
        shared: Arc<DiskShared>,
        share: Share,
        opened: Option<Arc<Opened>>,
        plan: CarrierPlan,
    ) -> Self {
        Self {
            side,
            carrier: Carrier::new(plan),
            share,
            opened,
            askers: BTreeMap::new(),
            passers: Passers::default(),
            felt: Felt::default(),
            queue: VecDeque::new(),
            of_callers: 0,
            questions: VecDeque::new(),
            asked: 0,
            in_flight: 0,
            next_io: 0,
            closing: false,
            source: None,
            shared,
        }
    }

    /// Take a request.
    ///
    /// # Errors
    /// When it is a caller's, and callers have too many already.
    pub(super) fn submit(
        &mut self,
        request: IoRequest,
        asker: IoAsker,
        now: Timestamp,
    ) -> Result<(), (IoAsker, Error)> {
        let is_caller = matches!(asker, IoAsker::Caller(_));
        if is_caller && self.of_callers >= MAX_OF_CALLERS {
            let name = self.shared.name().to_string();
            return Err((asker, too_many(Operation::Queue, name, MAX_OF_CALLERS)));
        }
        self.of_callers += usize::from(is_caller);
        self.queue.push_back(Queued { request, asker, since: now });
        self.feed();
        Ok(())
    }

    /// Hand the carrier as many requests as it has room for; whether there were any.
    pub(super) fn feed(&mut self) -> bool {
        let mut fed = false;
        while self.carrier.has_room() {
            let Some(Queued { request, asker, since }) = self.queue.pop_front() else { break };
            let id = IoId(self.next_io);
            self.next_io += 1;
            let waited = match &asker {
                IoAsker::Caller(_) => Waited::default(),
                IoAsker::Client(io) => io.waited.clone(),
            };
            self.askers.insert(id, (asker, since));
            self.carrier.submit_part(id, request, waited);
            fed = true;
        }
        fed
    }

    /// A client wants to know where it has data.
    pub(super) fn ask(&mut self, question: Question) {
        self.questions.push_back(question);
    }

    /// The next question to push, if there is one and not too many are on the ring.
    pub(super) fn next_question(&mut self) -> Option<Question> {
        let question = if self.asked < MAX_QUESTIONS { self.questions.pop_front() } else { None };
        self.asked += usize::from(question.is_some());
        question
    }

    /// A question has left the ring.
    pub(super) fn question_ended(&mut self) {
        self.asked -= 1;
        self.in_flight -= 1;
    }

    /// What has ended since the last call: who waits for it, and since when.
    pub(super) fn take_outcomes(&mut self) -> Vec<(IoAsker, Timestamp, IoOutcome)> {
        let (askers, of_callers) = (&mut self.askers, &mut self.of_callers);
        let outcomes = self.carrier.take_outcomes().into_iter();
        let with_asker = |(id, outcome)| {
            let (asker, since) = askers.remove(&id).expect("every request has its asker");
            *of_callers -= usize::from(matches!(asker, IoAsker::Caller(_)));
            (asker, since, outcome)
        };
        outcomes.map(with_asker).collect()
    }

    /// Whoever waits for a request: the ring thread is going. Dropped, they are answered.
    pub(super) fn take_askers(&mut self) -> Vec<IoAsker> {
        let submitted = std::mem::take(&mut self.askers).into_values().map(|(asker, _)| asker);
        self.of_callers = 0;
        let queued = std::mem::take(&mut self.queue).into_iter().map(|queued| queued.asker);
        submitted.chain(queued).collect()
    }

    /// The last handle is gone, and leaves what it had open.
    pub(super) fn close(&mut self, source: Option<Box<OpenedSource>>) {
        self.closing = true;
        self.source = source;
    }

    /// What its handles had open, where they have left that.
    pub(super) fn take_source(&mut self) -> Option<Box<OpenedSource>> {
        self.source.take()
    }

    /// What its handles had open, and what is kept until that is closed: its name, which nobody else opens before. Its part of the room is free at
    /// once, for nothing of it is on the ring any more.
    pub(super) fn into_rest(self) -> (Option<Box<OpenedSource>>, impl Send + 'static) {
        drop(self.share);
        (self.source, self.opened)
    }

    /// Whether nothing is left to do, discards that were put off included.
    pub(super) fn is_idle(&self) -> bool {
        self.in_flight == 0
            && self.questions.is_empty()
            && self.queue.is_empty()
            && self.carrier.is_idle()
            && self.carrier.deferred_bytes() == 0
    }
}

/// A request that is one too many.
pub(super) fn too_many(operation: Operation, name: String, most: usize) -> Error {
    let reason = format!("{most} requests are waiting already");
    Error::new(ErrorKind::Io(Errno::EAGAIN), operation, name, reason).advise("send fewer requests at a time")
}
