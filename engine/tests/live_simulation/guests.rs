//! The guests of a live disk: those whose I/O the engine carries, and those who take permits and write by themselves.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use engine::error::Error;
use engine::live::Permit;
use engine::live::carrier::{IoId, IoOutcome, IoRequest};
use engine::live::sim::{Pending, SimBeginWrite, SimDisk, SimEngine};
use engine::ring::sim::SharedWorld;
use engine::units::{ByteRange, Timestamp};
use fastrand::Rng;

use crate::blame::Blame;
use crate::oracle::Job;
use crate::scenario::{BLOCK, DiskSpec, Path};
use crate::seen::Seen;
use crate::shadow::{Content, Shadow, data};

/// What a guest waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    /// Also zeros.
    Write,
    Discard,
    Flush,
}

/// A request that the engine carries.
struct Carried {
    kind: Kind,
    pending: Pending<IoOutcome>,
    since: Timestamp,
}

/// What one who writes by himself does once he may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    Write,
    /// Whole blocks become holes.
    Punch,
    /// He changes his mind.
    Nothing,
}

impl Act {
    /// What it leaves.
    fn content(self, id: IoId) -> Option<Content> {
        match self {
            Self::Write => Some(Content::Data(id)),
            Self::Punch => Some(Content::Zeros),
            Self::Nothing => None,
        }
    }
}

/// How one who writes by himself waits for his permit.
enum Waiting {
    /// When he looks next; as soon as he is woken, or later, or for nothing.
    Future { future: SimBeginWrite, woken: Arc<Woken>, look_at: Option<Timestamp> },
    /// What he was told, on the ring thread or at once.
    Callback(Arc<Mutex<Option<Result<Permit, Error>>>>),
}

#[derive(Default)]
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Waiting {
    /// His permit, or why there is none. A future is only asked if he `looks`.
    fn answer(&mut self, looks: bool) -> Option<Result<Permit, Error>> {
        match self {
            Self::Callback(told) => told.lock().unwrap().take(),
            Self::Future { future, woken, look_at } if looks => {
                *look_at = None;
                woken.0.store(false, Ordering::Relaxed);
                let waker = Waker::from(Arc::clone(woken));
                match Pin::new(future).poll(&mut Context::from_waker(&waker)) {
                    Poll::Ready(permit) => Some(permit),
                    Poll::Pending => None,
                }
            }
            Self::Future { .. } => None,
        }
    }

    /// When he looks next of his own accord.
    fn next_look(&self) -> Option<Timestamp> {
        match self {
            Self::Future { woken, look_at, .. } => {
                look_at.or_else(|| woken.0.load(Ordering::Relaxed).then(Timestamp::default))
            }
            Self::Callback(_) => None,
        }
    }
}

enum Stage {
    Waiting(Waiting),
    /// Writes at that time.
    Holding {
        _permit: Permit,
        until: Timestamp,
    },
    /// He does without.
    Refused(Error),
}

struct Own {
    id: IoId,
    range: ByteRange,
    act: Act,
    stage: Stage,
    since: Timestamp,
}

/// The guests of one disk. See the module's header.
pub(crate) struct Guests {
    pub(crate) disk: SimDisk,
    number: usize,
    spec: DiskSpec,
    rng: Rng,
    shadow: Shadow,
    carried: BTreeMap<IoId, Carried>,
    own: Vec<Own>,
    submitted: u64,
    next_at: Timestamp,
    /// Whether a flush that succeeds has brought everything to the medium.
    pub(crate) flushes_hold: bool,
    /// One has failed.
    flush_lost: bool,
    /// Longest wait of a request.
    pub(crate) longest: Duration,
}

impl Guests {
    pub(crate) fn new(disk: SimDisk, number: usize, spec: &DiskSpec, initial: Vec<u8>, seed: u64) -> Self {
        Self {
            disk,
            number,
            spec: spec.clone(),
            rng: Rng::with_seed(seed),
            shadow: Shadow::new(initial),
            carried: BTreeMap::new(),
            own: Vec::new(),
            submitted: 0,
            next_at: Timestamp::default(),
            flushes_hold: true,
            flush_lost: false,
            longest: Duration::ZERO,
        }
    }

    fn under_way(&self) -> usize {
        self.carried.len() + self.own.len()
    }

    fn may_submit(&self) -> bool {
        self.submitted < self.spec.requests && self.under_way() < self.spec.at_a_time
    }

    /// Whether they have done all that they want.
    pub(crate) fn are_gone(&self) -> bool {
        self.submitted == self.spec.requests && self.under_way() == 0
    }

    /// Whether they ask nothing more of the engine. Permits may be out: those need no disk.
    pub(crate) fn need_no_disk(&self) -> bool {
        let holds = |own: &Own| matches!(own.stage, Stage::Holding { .. });
        self.submitted == self.spec.requests && self.carried.is_empty() && self.own.iter().all(holds)
    }

    /// When they do something next of their own accord.
    pub(crate) fn next_event(&self) -> Option<Timestamp> {
        let own = self.own.iter().filter_map(|own| match &own.stage {
            Stage::Holding { until, .. } => Some(*until),
            Stage::Waiting(waiting) => waiting.next_look(),
            Stage::Refused(_) => None,
        });
        own.chain(self.may_submit().then_some(self.next_at)).min()
    }

    /// Do what is due at `now`, before the engine's turn.
    pub(crate) fn act(
        &mut self,
        engine: &mut SimEngine,
        world: &SharedWorld,
        jobs: &[Job],
        now: Timestamp,
        seen: &mut Seen,
    ) -> Result<(), String> {
        while self.may_submit() && self.next_at <= now {
            self.next_at = now.after(self.random_time(self.spec.pace * 2));
            self.submit(engine, now);
        }
        let mut at = 0;
        while at < self.own.len() {
            if self.step(at, now, seen) {
                at += 1;
                continue;
            }
            let Own { id, range, act, stage, since } = self.own.swap_remove(at);
            if matches!(stage, Stage::Holding { .. }) {
                self.longest = self.longest.max(now.since(since));
                jobs.iter().try_for_each(|job| job.check_copied(self.number, range, world))?;
                self.write(world, id, range, act);
            }
        }
        let steps = engine.take_steps();
        seen.at_barrier += steps.at_barrier;
        seen.copies += steps.copies;
        seen.forgot += steps.forgot;
        self.leave(seen);
        Ok(())
    }

    fn random_time(&mut self, most: Duration) -> Duration {
        Duration::from_nanos(self.rng.u64(..=u64::try_from(most.as_nanos()).unwrap()))
    }

    /// Somebody goes without waiting for his answer; what he asked for may happen or not.
    fn leave(&mut self, seen: &mut Seen) {
        if self.spec.patient || self.rng.u8(..200) > 0 || self.carried.is_empty() {
            return;
        }
        let at = self.rng.usize(..self.carried.len());
        let id = *self.carried.keys().nth(at).expect("so many");
        let gone = self.carried.remove(&id).expect("just seen");
        seen.left += 1;
        if matches!(gone.kind, Kind::Read | Kind::Flush) {
            self.shadow.looked(id, None).expect("nothing was found");
        }
    }

    /// A range of this kind's part of the disk.
    fn range(&mut self, own: bool) -> ByteRange {
        let split = self.spec.length / 2 / BLOCK * BLOCK;
        let part = match (self.spec.path, own) {
            (Path::Both, true) => ByteRange::between(split, self.spec.length),
            (Path::Both, false) => ByteRange::between(0, split),
            _ => ByteRange::between(0, self.spec.length),
        };
        let rng = &mut self.rng;
        let most = [700, 5000, 20_000, 80_000][rng.usize(..4)].min(part.length);
        let start = part.offset + rng.u64(..part.length.max(1));
        let mut range = ByteRange::new(start, rng.u64(..=most));
        if rng.u8(..3) == 0 {
            let unit = [512, BLOCK][rng.usize(..2)];
            range = ByteRange::new(start / unit * unit, range.length.next_multiple_of(unit));
        }
        ByteRange::between(range.offset.min(part.end()), range.end().min(part.end()))
    }

    fn submit(&mut self, engine: &SimEngine, now: Timestamp) {
        let id = IoId(self.submitted);
        self.submitted += 1;
        let own = match self.spec.path {
            Path::Carried => false,
            Path::Own => true,
            Path::Both | Path::Mixed => self.rng.bool(),
        };
        let range = self.range(own);
        if own {
            return self.submit_own(engine, id, range, now);
        }
        let bytes = usize::try_from(range.length).unwrap();
        let choice = self.rng.u8(..20);
        let choice = if self.spec.path == Path::Mixed { 9 + choice % 3 * 5 } else { choice };
        let (kind, request) = match choice {
            0..9 => (Kind::Write, IoRequest::Write { offset: range.offset, data: data(id, range) }),
            9..13 => (Kind::Read, IoRequest::Read { range, buffer: vec![0xEE; bytes] }),
            13..16 => (Kind::Discard, IoRequest::Discard { range }),
            16..19 => {
                (Kind::Write, IoRequest::WriteZeroes { range, may_unmap: self.rng.bool(), only_fast: false })
            }
            _ => (Kind::Flush, IoRequest::Flush),
        };
        match (kind, &request) {
            (Kind::Write, IoRequest::Write { .. }) => self.shadow.change(id, range, Content::Data(id)),
            (Kind::Write, _) => self.shadow.change(id, range, Content::Zeros),
            (Kind::Discard, _) => self.shadow.change(id, range, Content::Undefined),
            (Kind::Read, _) => self.shadow.look(id, range),
            (Kind::Flush, _) => self.shadow.look(id, ByteRange::new(0, self.spec.length)),
        }
        let pending = engine.io(&self.disk, request);
        self.carried.insert(id, Carried { kind, pending, since: now });
    }

    fn submit_own(&mut self, engine: &SimEngine, id: IoId, mut range: ByteRange, now: Timestamp) {
        let act = match self.rng.u8(..8) {
            0 => Act::Nothing,
            1 | 2 => Act::Punch,
            _ => Act::Write,
        };
        if act == Act::Punch {
            let start = range.offset.next_multiple_of(BLOCK);
            range = ByteRange::between(start, (range.end() / BLOCK * BLOCK).max(start));
        }
        if range.is_empty() {
            return;
        }
        let waiting = if self.rng.bool() {
            let future = engine.begin_write(&self.disk, range);
            Waiting::Future { future, woken: Arc::default(), look_at: Some(now) }
        } else {
            let told = Arc::new(Mutex::new(None));
            let tells = Arc::clone(&told);
            // If he has gone by then, his permit goes at once.
            engine.begin_write_with(&self.disk, range, move |permit| *tells.lock().unwrap() = Some(permit));
            Waiting::Callback(told)
        };
        self.own.push(Own { id, range, act, stage: Stage::Waiting(waiting), since: now });
    }

    /// One who is woken looks at once, or takes his time; now and then somebody looks for nothing.
    fn looks(&mut self, at: usize, now: Timestamp) -> bool {
        let Stage::Waiting(Waiting::Future { woken, look_at, .. }) = &mut self.own[at].stage else {
            return false;
        };
        if look_at.is_none() && woken.0.load(Ordering::Relaxed) {
            let most = match self.rng.u8(..16) {
                0 if !self.spec.patient => 60_000,
                1..4 => 2000,
                4..8 => 30,
                _ => 0,
            };
            *look_at = Some(now.after(Duration::from_micros(self.rng.u64(0..=most))));
        }
        look_at.is_some_and(|at| at <= now) || self.rng.u8(..64) == 0
    }

    /// One who writes by himself does what he can; `false`: he is through.
    fn step(&mut self, at: usize, now: Timestamp, seen: &mut Seen) -> bool {
        let gives_up = !self.spec.patient && self.rng.u16(..500) == 0;
        let looks = self.looks(at, now);
        match &mut self.own[at].stage {
            // He does not wait. What goes on for him does no harm.
            Stage::Waiting(_) if gives_up => false,
            Stage::Waiting(_) => {
                self.take_permit(at, looks, now, seen);
                true
            }
            Stage::Holding { until, .. } => *until > now,
            Stage::Refused(_) => true,
        }
    }

    /// Take in his permit, if it is there. What he does with it comes after what was told to be done before.
    fn take_permit(&mut self, at: usize, looks: bool, now: Timestamp, seen: &mut Seen) {
        let hold = self.random_time(self.spec.hold);
        let own = &mut self.own[at];
        let Stage::Waiting(waiting) = &mut own.stage else { return };
        match waiting.answer(looks) {
            None => {}
            Some(Ok(permit)) => {
                seen.granted += 1;
                own.stage = Stage::Holding { _permit: permit, until: now.after(hold) };
                if let Some(content) = own.act.content(own.id) {
                    self.shadow.change(own.id, own.range, content);
                }
            }
            Some(Err(error)) => own.stage = Stage::Refused(error),
        }
    }

    fn write(&mut self, world: &SharedWorld, id: IoId, range: ByteRange, act: Act) {
        let mut world = world.borrow_mut();
        let disk = world.disk(self.number);
        match act {
            Act::Write => disk.fill(range.offset, &data(id, range)),
            Act::Punch => disk.punch(range.offset / BLOCK..range.end() / BLOCK),
            Act::Nothing => {}
        }
        if act.content(id).is_some() {
            self.shadow.changed(id, Some(true));
        }
    }

    /// Take in the answers that the engine has given by `now`.
    pub(crate) fn take_answers(
        &mut self,
        world: &SharedWorld,
        now: Timestamp,
        (blame, jobs): (&Blame<'_>, &[Job]),
        seen: &mut Seen,
    ) -> Result<(), String> {
        // Who has got his permit in this turn may have got it before others were told what ends in it.
        for at in 0..self.own.len() {
            self.take_permit(at, false, now, seen);
        }
        let ids: Vec<IoId> = self.carried.keys().copied().collect();
        for id in ids {
            let Some(outcome) = self.carried[&id].pending.take() else { continue };
            let Carried { kind, since, .. } = self.carried.remove(&id).expect("just seen");
            self.longest = self.longest.max(now.since(since));
            let changes = kind == Kind::Write;
            seen.answer(!blame.may_fail_request(jobs, self.number, changes, since));
            // After a flush that has failed all others may fail with its words, where data goes through the page cache (the simulation of guest I/O
            // knows when they must).
            let of_another =
                |error: &Error| error.to_string().contains("no flush of this disk succeeds any more");
            let excused =
                kind == Kind::Flush && self.flush_lost && outcome.result.as_ref().is_err_and(of_another);
            let judged = outcome.result.as_ref().err().filter(|_| !excused).map_or(Ok(()), |error| {
                blame.request(jobs, (self.number, true, changes), (since, now), error)
            });
            self.flush_lost |= kind == Kind::Flush && outcome.result.is_err();
            judged
                .and_then(|()| self.take_outcome(id, kind, outcome, world, seen))
                .map_err(|wrong| format!("disk {}, {kind:?} {id:?}: {wrong}", self.number))?;
        }
        for own in self.own.extract_if(.., |own| matches!(own.stage, Stage::Refused(_))) {
            let Stage::Refused(error) = own.stage else { unreachable!("just seen") };
            seen.answer(!blame.may_fail_request(jobs, self.number, true, own.since));
            blame
                .request(jobs, (self.number, false, true), (own.since, now), &error)
                .map_err(|wrong| format!("disk {}, a copy for {}: {wrong}", self.number, own.range))?;
            seen.refused += 1;
        }
        Ok(())
    }

    fn take_outcome(
        &mut self,
        id: IoId,
        kind: Kind,
        outcome: IoOutcome,
        world: &SharedWorld,
        seen: &mut Seen,
    ) -> Result<(), String> {
        let result = outcome.result;
        seen.failed += u64::from(result.is_err());
        let is_full = |error: &Error| error.reason().contains("fleece file is full");
        seen.fleece_refused += u64::from(result.as_ref().err().is_some_and(is_full));
        match kind {
            Kind::Write | Kind::Discard => self.shadow.changed(id, Some(result.is_ok())),
            Kind::Read => {
                seen.read += u64::from(result.is_ok());
                self.shadow.looked(id, result.ok().as_deref())?;
            }
            Kind::Flush => {
                let whole = result.is_ok() && self.flushes_hold;
                seen.flushed += u64::from(whole);
                let medium = whole.then(|| world.borrow_mut().disk(self.number).medium().to_vec());
                self.shadow.looked(id, medium.as_deref())?;
            }
        }
        Ok(())
    }

    /// The engine has died: everybody has an answer, and whoever writes by himself goes on.
    pub(crate) fn outlive(
        &mut self,
        engine: &mut SimEngine,
        world: &SharedWorld,
        now: Timestamp,
        judges: (&Blame<'_>, &[Job]),
        seen: &mut Seen,
    ) -> Result<(), String> {
        let waits = |own: &&Own| matches!(own.stage, Stage::Waiting(_));
        let waiting = self.own.iter().filter(waits).count();
        let carried = self.carried.len();
        for (id, Carried { kind, pending, .. }) in std::mem::take(&mut self.carried) {
            let outcome = pending.take().ok_or_else(|| format!("{kind:?} {id:?} waits for the dead"))?;
            // What had ended before may be told yet.
            self.take_outcome(id, kind, outcome, world, seen)?;
        }
        // One may have been refused before.
        self.take_answers(world, now, judges, seen)?;
        seen.orphaned += (carried + waiting) as u64;
        for at in 0..self.own.len() {
            self.take_permit(at, true, now, seen);
        }
        self.take_answers(world, now, judges, seen)?;
        if let Some(own) = self.own.iter().find(waits) {
            return Err(format!("{} waits for the dead", own.range));
        }
        for own in std::mem::take(&mut self.own) {
            self.write(world, own.id, own.range, own.act);
        }
        // One who comes later writes, too.
        let late = engine.begin_write(&self.disk, ByteRange::new(0, self.spec.length));
        let mut late = Waiting::Future { future: late, woken: Arc::default(), look_at: None };
        match late.answer(true) {
            Some(Ok(_)) => Ok(()),
            Some(Err(error)) => Err(format!("nobody writes beside the dead: {error}")),
            None => Err("one who comes after its death waits for the engine".into()),
        }
    }

    /// Longest time for which one of them has waited by now; `None`: some have gone, and nobody knows how long what they asked for waits.
    pub(crate) fn waits(&self, now: Timestamp) -> Option<Duration> {
        let waits = |own: &&Own| !matches!(own.stage, Stage::Holding { .. });
        let own = self.own.iter().filter(waits).map(|own| own.since);
        let since = self.carried.values().map(|carried| carried.since).chain(own);
        let longest = since.map(|since| now.since(since)).max().unwrap_or_default();
        self.spec.patient.then_some(longest)
    }

    /// Whether the disk holds what the guests left there.
    pub(crate) fn check(&mut self, world: &SharedWorld) -> Result<(), String> {
        let view = world.borrow_mut().disk(self.number).view().to_vec();
        self.shadow.check(&view).map_err(|wrong| format!("disk {}: {wrong}", self.number))
    }

    /// Who still waits, for messages.
    pub(crate) fn tell(&self) -> String {
        let carried: Vec<_> = self.carried.iter().map(|(id, carried)| (id, carried.kind)).collect();
        let own = self.own.iter().map(|own| match &own.stage {
            Stage::Waiting(Waiting::Future { woken, look_at, .. }) => {
                format!("{} waits, woken {:?}, looks at {look_at:?}", own.range, woken.0)
            }
            Stage::Waiting(Waiting::Callback(_)) => format!("{} waits to be called", own.range),
            Stage::Holding { .. } => format!("{} holds", own.range),
            Stage::Refused(_) => format!("{} was refused", own.range),
        });
        format!("disk {}: {carried:?} {:?}", self.number, own.collect::<Vec<_>>())
    }
}
