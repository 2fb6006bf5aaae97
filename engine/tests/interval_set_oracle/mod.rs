//! A naive interval set, one enum value a cluster, and a driver that runs any sequence of operations on it and on the
//! real one and compares everything that can be seen after each. Used by the property tests and by the fuzz target.
//!
//! What is driven is a [`Subject`], so that the tests can also drive sets with planted bugs and see them caught.

use std::sync::{Arc, Mutex};

use engine::interval_set::{
    Cancellation, Claim, ClusterState, Found, IntervalSet, Registration, Ticket, Waiter,
};
use engine::units::{ClusterCount, ClusterIndex, ClusterRange};

/// Largest set driven; each step looks at every cluster.
pub(crate) const MAX_CLUSTERS: u64 = 300;

/// The set under test, at the points where a planted bug can sit.
pub(crate) trait Subject {
    /// The set that answers everything else.
    fn set(&self) -> &IntervalSet;

    fn claim_first(&self, within: ClusterRange, max: ClusterCount) -> Option<Claim> {
        self.set().claim_first(within, max)
    }

    fn wait_for(&self, cluster: ClusterIndex, waiter: Waiter) -> Registration {
        self.set().wait_for(cluster, waiter)
    }

    fn release(&self, claim: Claim) {
        self.set().release(claim);
    }
}

impl Subject for IntervalSet {
    fn set(&self) -> &IntervalSet {
        self
    }
}

/// One step, as raw numbers that proptest and the fuzzer make up and that always mean something.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Raw {
    pub(crate) kind: u8,
    pub(crate) a: u16,
    pub(crate) b: u16,
}

/// One step, decoded for a set of some size.
#[derive(Clone, Copy, Debug)]
enum Op {
    ClaimFirst(ClusterRange, ClusterCount),
    ClaimFree(ClusterRange),
    /// Which of the live claims, and where in it, modulo what there is.
    Split(usize, u64),
    Scatter(usize),
    Complete(usize),
    Release(usize),
    Wait(ClusterIndex),
    Cancel(usize),
    MarkDone(ClusterRange),
    Reopen(ClusterRange),
    Query(ClusterRange),
    Close,
}

/// A position from 0 to `clusters`, every other one at a border of words.
fn position(raw: u16, clusters: u64) -> u64 {
    let raw = u64::from(raw);
    if raw % 2 == 0 {
        return (raw / 2) % (clusters + 1);
    }
    let border = (raw / 16) % (clusters / 32 + 2) * 32;
    (border + raw / 2 % 5).saturating_sub(2).min(clusters)
}

impl Raw {
    fn decode(self, clusters: u64) -> Op {
        let (p, q) = (position(self.a, clusters), position(self.b, clusters));
        // Now and then the whole disk.
        let range = if self.a == self.b { (0, clusters) } else { (p.min(q), p.max(q)) };
        let range = ClusterRange::new(range.0, range.1);
        let which = usize::from(self.a);
        match self.kind % 16 {
            0 | 1 => Op::ClaimFirst(range, ClusterCount(u64::from(self.b >> 8) % 40 + 1)),
            2 | 3 => Op::ClaimFree(range),
            4 => Op::Split(which, u64::from(self.b)),
            5 => Op::Scatter(which),
            6 | 7 => Op::Complete(which),
            8 => Op::Release(which),
            9 | 10 if p < clusters => Op::Wait(ClusterIndex(p)),
            11 => Op::Cancel(which),
            12 => Op::MarkDone(range),
            13 => Op::Reopen(range),
            14 if self.b % 64 == 7 => Op::Close,
            _ => Op::Query(range),
        }
    }
}

struct Waiting {
    number: u64,
    cluster: ClusterIndex,
    ticket: Ticket,
}

/// Both sets, and what is held of the real one.
struct Driver<'a, S: Subject> {
    subject: &'a S,
    clusters: u64,
    /// The oracle: to copy, copying or done; whether somebody waits follows from `waiting`.
    model: Vec<ClusterState>,
    claims: Vec<Claim>,
    waiting: Vec<Waiting>,
    /// Numbers of the waiters woken and not yet accounted for.
    woken: Arc<Mutex<Vec<u64>>>,
    next_waiter: u64,
    closed: bool,
}

/// What the oracle says when the sets differ.
pub(crate) type Difference = String;

/// Runs `steps` on `subject` and on the oracle, then ends all that is still held.
///
/// # Errors
/// If the two differ in anything.
pub(crate) fn drive<S: Subject>(subject: &S, steps: impl IntoIterator<Item = Raw>) -> Result<(), Difference> {
    let clusters = subject.set().clusters().0;
    assert!(clusters <= MAX_CLUSTERS, "too large to be compared at every step");
    let mut driver = Driver {
        subject,
        clusters,
        model: (0..clusters).map(|_| ClusterState::ToCopy).collect(),
        claims: Vec::new(),
        waiting: Vec::new(),
        woken: Arc::default(),
        next_waiter: 0,
        closed: false,
    };
    let result = driver.run(steps);
    // With a difference found the claims may be on anything; they are not given back.
    driver.claims.drain(..).for_each(std::mem::forget);
    result
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, real: T, oracle: T) -> Result<(), Difference> {
    if real == oracle { Ok(()) } else { Err(format!("{what}: the set says {real:?}, the oracle {oracle:?}")) }
}

impl<S: Subject> Driver<'_, S> {
    fn run(&mut self, steps: impl IntoIterator<Item = Raw>) -> Result<(), Difference> {
        for raw in steps {
            let op = raw.decode(self.clusters);
            self.step(op).and_then(|()| self.compare()).map_err(|error| format!("{op:?}: {error}"))?;
        }
        while let Some(claim) = self.claims.pop() {
            self.end(claim, ClusterState::ToCopy)?;
        }
        same("waiters left", self.waiting.len(), 0)?;
        self.compare()
    }

    fn step(&mut self, op: Op) -> Result<(), Difference> {
        match op {
            Op::ClaimFirst(within, max) => self.claim_first(within, max),
            Op::ClaimFree(range) => self.claim_free(range),
            Op::Split(which, at) => self.split(which, at),
            Op::Scatter(which) => {
                if let Some(claim) = self.take_claim(which) {
                    self.claims.extend(claim.into_clusters());
                }
                Ok(())
            }
            Op::Complete(which) => self.take_claim(which).map_or(Ok(()), |c| self.end(c, ClusterState::Done)),
            Op::Release(which) => {
                self.take_claim(which).map_or(Ok(()), |c| self.end(c, ClusterState::ToCopy))
            }
            Op::Wait(cluster) => self.wait(cluster),
            Op::Cancel(which) => self.cancel(which),
            Op::MarkDone(range) => self.mark_done(range),
            Op::Reopen(range) => {
                let changed = self.replace(range, ClusterState::Done, ClusterState::ToCopy);
                same("reopened", self.subject.set().reopen(range), changed)
            }
            Op::Query(range) => self.query(range),
            Op::Close => self.close(),
        }
    }

    fn at(&self, cluster: ClusterIndex) -> ClusterState {
        self.model[usize::try_from(cluster.0).unwrap()]
    }

    fn put(&mut self, cluster: ClusterIndex, state: ClusterState) {
        self.model[usize::try_from(cluster.0).unwrap()] = state;
    }

    fn replace(&mut self, range: ClusterRange, from: ClusterState, to: ClusterState) -> ClusterCount {
        let hit: Vec<_> = range.iter().filter(|&cluster| self.at(cluster) == from).collect();
        hit.iter().for_each(|&cluster| self.put(cluster, to));
        ClusterCount(hit.len() as u64)
    }

    /// The maximal runs of clusters of `range` in `state`.
    fn runs(&self, range: ClusterRange, state: ClusterState) -> Vec<ClusterRange> {
        let mut runs: Vec<ClusterRange> = Vec::new();
        for cluster in range.iter().filter(|&cluster| self.at(cluster) == state) {
            match runs.last_mut() {
                Some(run) if run.end == cluster => run.end.0 += 1,
                _ => runs.push(ClusterRange::new(cluster.0, cluster.0 + 1)),
            }
        }
        runs
    }

    fn claimed(&mut self, claim: Claim) -> Result<(), Difference> {
        let range = claim.range();
        self.claims.push(claim);
        for cluster in range.iter() {
            match self.at(cluster) {
                ClusterState::ToCopy => self.put(cluster, ClusterState::Copying),
                ClusterState::Done => return Err(format!("claim on cluster {}, which is done", cluster.0)),
                _ => return Err(format!("double claim on cluster {}", cluster.0)),
            }
        }
        Ok(())
    }

    fn claim_first(&mut self, within: ClusterRange, max: ClusterCount) -> Result<(), Difference> {
        let expected = self
            .runs(within, ClusterState::ToCopy)
            .first()
            .map(|run| ClusterRange::new(run.start.0, run.end.0.min(run.start.0 + max.0)));
        let claim = self.subject.claim_first(within, max);
        let real = claim.as_ref().map(Claim::range);
        claim.map_or(Ok(()), |claim| self.claimed(claim))?;
        same("claim_first", real, expected)
    }

    fn claim_free(&mut self, range: ClusterRange) -> Result<(), Difference> {
        let free = self.runs(range, ClusterState::ToCopy);
        let busy = self.runs(range, ClusterState::Copying);
        let (mut claims, mut others) = (Vec::new(), Vec::new());
        self.subject.set().claim_free(range, &mut |found| match found {
            Found::Claimed(claim) => claims.push(claim),
            Found::Busy(range) => others.push(range),
        });
        let real: Vec<_> = claims.iter().map(Claim::range).collect();
        for claim in claims {
            self.claimed(claim)?;
        }
        same("claimed", real, free)?;
        same("busy", others, busy)
    }

    fn take_claim(&mut self, which: usize) -> Option<Claim> {
        (!self.claims.is_empty()).then(|| self.claims.swap_remove(which % self.claims.len()))
    }

    fn split(&mut self, which: usize, at: u64) -> Result<(), Difference> {
        let Some(mut claim) = self.take_claim(which) else { return Ok(()) };
        let whole = claim.range();
        if whole.count() > 1 {
            let at = ClusterIndex(whole.start.0 + 1 + at % (whole.count() - 1));
            let rest = claim.split_off(at);
            same("back of a split", rest.range(), ClusterRange { start: at, end: whole.end })?;
            same("front of a split", claim.range(), ClusterRange { start: whole.start, end: at })?;
            self.claims.push(rest);
        }
        self.claims.push(claim);
        Ok(())
    }

    /// Ends a claim and expects its waiters, and them alone, to be woken.
    fn end(&mut self, claim: Claim, state: ClusterState) -> Result<(), Difference> {
        let range = claim.range();
        range.iter().for_each(|cluster| self.put(cluster, state));
        if state == ClusterState::Done {
            self.subject.set().complete(claim);
        } else {
            self.subject.release(claim);
        }
        let expected: Vec<_> =
            self.waiting.extract_if(.., |w| range.contains(w.cluster)).map(|w| w.number).collect();
        self.woken(expected)
    }

    /// Accounts for the waiters woken since the last call.
    fn woken(&self, mut expected: Vec<u64>) -> Result<(), Difference> {
        let mut real = std::mem::take(&mut *self.woken.lock().unwrap());
        real.sort_unstable();
        expected.sort_unstable();
        same("woken", real, expected)
    }

    fn wait(&mut self, cluster: ClusterIndex) -> Result<(), Difference> {
        let number = self.next_waiter;
        self.next_waiter += 1;
        let log = Arc::clone(&self.woken);
        let waiter = Waiter::callback(move || log.lock().unwrap().push(number));
        let busy = self.at(cluster) == ClusterState::Copying;
        match self.subject.wait_for(cluster, waiter) {
            Registration::Registered { ticket, first } => {
                same("registered", true, busy && !self.closed)?;
                same("first", first, !self.waiting.iter().any(|w| w.cluster == cluster))?;
                self.waiting.push(Waiting { number, cluster, ticket });
                Ok(())
            }
            Registration::AlreadyReleased(_) => same("already released", true, !busy),
            Registration::Closed(_) => same("closed", true, busy && self.closed),
        }
    }

    fn cancel(&mut self, which: usize) -> Result<(), Difference> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let waiting = self.waiting.swap_remove(which % self.waiting.len());
        same("cancelled", self.subject.set().cancel(waiting.ticket), Cancellation::Removed)
    }

    fn mark_done(&mut self, range: ClusterRange) -> Result<(), Difference> {
        // Its precondition: nobody is at work there.
        if !self.runs(range, ClusterState::Copying).is_empty() {
            return Ok(());
        }
        let changed = self.replace(range, ClusterState::ToCopy, ClusterState::Done);
        same("marked done", self.subject.set().mark_done(range), changed)
    }

    fn close(&mut self) -> Result<(), Difference> {
        self.subject.set().close();
        self.closed = true;
        let expected = self.waiting.drain(..).map(|w| w.number).collect();
        self.woken(expected)
    }

    fn query(&self, range: ClusterRange) -> Result<(), Difference> {
        let set = self.subject.set();
        let done = range.iter().all(|cluster| self.at(cluster) == ClusterState::Done);
        same("is_done", set.is_done(range), done)?;
        let waited_for = self.waiting.iter().any(|w| range.contains(w.cluster));
        same("has_waiters", set.has_waiters(range), waited_for)?;
        let next = (range.start.0..self.clusters).map(ClusterIndex);
        let next = next.into_iter().find(|&cluster| self.at(cluster) != ClusterState::Done);
        same("next_not_done", set.next_not_done(range.start), next)?;
        let find =
            |wanted: &dyn Fn(ClusterState) -> bool| range.iter().find(|&cluster| wanted(self.at(cluster)));
        same("first_not_done", set.first_not_done(range), find(&|state| state != ClusterState::Done))?;
        same("first_done", set.first_done(range), find(&|state| state == ClusterState::Done))?;
        same("first_to_copy", set.first_to_copy(range), find(&|state| state == ClusterState::ToCopy))?;
        let idle = [ClusterState::Done, ClusterState::ToCopy];
        same("first_busy", set.first_busy(range), find(&|state| !idle.contains(&state)))
    }

    /// Everything that can be seen without changing it.
    fn compare(&self) -> Result<(), Difference> {
        let set = self.subject.set();
        self.woken(Vec::new())?;
        for cluster in set.all().iter() {
            let waited_for = self.waiting.iter().any(|w| w.cluster == cluster);
            let expected = match self.at(cluster) {
                ClusterState::Copying if waited_for => ClusterState::CopyingWithWaiters,
                state => state,
            };
            same(&format!("cluster {}", cluster.0), set.state(cluster), expected)?;
        }
        let runs = self.runs(set.all(), ClusterState::Done);
        same("count_done", set.count_done().0, runs.iter().map(|run| run.count()).sum())?;
        same("done_ranges", set.done_ranges().collect(), runs)
    }
}
