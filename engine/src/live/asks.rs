//! Copies before a guest's write: asked of all jobs at once, waited for one after the other.
//!
//! # Model
//! A guest finds the first job that has not copied what he is about to change, and asks that one. With it the other jobs of the disk are
//! asked *beside* it for what they have not copied of his range. So jobs copy for him at the same time; and the time of each counts from
//! the moment at which he came, without one whose target does not answer using up that of the others, which have copied long before
//! he comes to them.
//!
//! Nobody waits for what is asked beside, and the write may never come: should it fail, or take too long, nothing happens until the guest asks for himself.
//! A job that has started while he waited was not asked; its time counts from its start.
//!
//! What is asked beside lives as long as what it was asked with: when that is answered, or nobody wants it any more, it is forgotten. The
//! guest looks again then and asks for himself what is missing.
//!
//! # The clock
//! It is the ring's, and runs for each job while that is asked. A request has one clock for each job, however many pieces it is copied in: what a guest
//! waits for at most does not grow with what he writes. (Where what he asked for comes in several requests, as from a client of an export, each
//! brings along what those before it have spent: `exports::client`.) With his answer he hears for how long each job was asked for him by then; he
//! brings that along when he asks again ([`Waited`]). Between an answer and his next question, which may be long where it is a future that nobody polls, nobody
//! is asked anything, and no time goes by; nor does it for a job that has failed beside another, until he comes to ask it himself. What was asked beside costs a
//! job nothing where it is copied by the time he comes, however late: he has not waited for it. A job that was not asked at all by then has all of its time.
//!
//! A ring thread that stands still (a stopped process, a host without time for it) copies nothing and hears of nothing: that is nobody's time ([`stand_still`]). To
//! know of it the thread wakes every [`TICK`] while guests' time counts. So much of each turn counts however long it takes: no guest waits without end for a
//! thread that is held up again and again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use slab::Slab;

use super::ask::{Answer, Lost};
use super::carrier::CopyWait;
use super::jobs::JobId;
use super::reactor::Job;
use crate::copier::guests::CbwId;
use crate::error::Error;
use crate::units::{ByteRange, ClusterIndex, ClusterRange, Timestamp};

/// Most guests with an I/O path of their own who wait for copies of a job, and most that are asked beside.
pub(super) const MAX_ASKS: usize = 65_536;

/// How often the ring thread wakes at least while guests' time counts. It has stood still where that took twice as long.
pub(super) const TICK: Duration = Duration::from_millis(250);

/// What a guest is to have copied before his write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wish {
    /// The first job that has not copied everything.
    pub(super) job: JobId,
    /// What is to be copied by that job.
    pub(super) clusters: ClusterRange,
    /// What he is about to change: for the other jobs.
    pub(super) range: ByteRange,
}

/// For how long a guest has waited for jobs to copy for a request of his, all its pieces together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Waited(Vec<Spent>);

/// What a request has spent of the time of one job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Spent {
    job: JobId,
    time: Duration,
    /// What it would be with the last time the job was asked beside another, for what lies before that cluster: if it still lacks something of that.
    beside: Option<(ClusterIndex, Duration)>,
}

impl Waited {
    /// What is spent of the time of `job`, whose first clusters to be copied are `clusters`.
    fn of(&self, job: JobId, clusters: ClusterRange) -> Duration {
        match self.0.iter().find(|spent| spent.job == job) {
            Some(&Spent { beside: Some((end, time)), .. }) if clusters.start < end => time,
            spent => spent.map_or(Duration::ZERO, |spent| spent.time),
        }
    }

    /// A job was asked that long.
    #[cfg(test)]
    pub(super) fn of_test(job: JobId, seconds: u64) -> Self {
        Self(vec![Spent { job, time: Duration::from_secs(seconds), beside: None }])
    }

    /// From when on the time of `job` counts, which is asked for `clusters` at `now`.
    fn since(&self, job: JobId, clusters: ClusterRange, now: Timestamp) -> Timestamp {
        Timestamp(now.0.saturating_sub(self.of(job, clusters)))
    }

    /// Whether nothing is spent of anybody's time.
    pub(super) fn is_nothing(&self) -> bool {
        self.0.is_empty()
    }

    /// What is spent for a request of which two parts have spent this much, perhaps at the same time: of each job's time the more.
    pub(super) fn merge(&mut self, other: &Self) {
        for more in &other.0 {
            let spent = self.entry(more.job);
            spent.time = spent.time.max(more.time);
            spent.beside = spent.beside.max(more.beside);
        }
    }

    fn entry(&mut self, job: JobId) -> &mut Spent {
        let found = self.0.iter().position(|spent| spent.job == job);
        let at = found.unwrap_or_else(|| {
            self.0.push(Spent { job, time: Duration::ZERO, beside: None });
            self.0.len() - 1
        });
        &mut self.0[at]
    }
}

/// What came of asking for copies.
#[derive(Debug)]
pub(super) struct Copied {
    pub(super) outcome: Result<(), Arc<Error>>,
    pub(super) waited: Waited,
}

impl Lost for Copied {
    /// Without a ring thread there is no job, and nothing to copy before a write.
    fn lost() -> Self {
        Self { outcome: Ok(()), waited: Waited::default() }
    }
}

/// Who waits for a copy-before-write.
pub(super) enum Asker {
    Guest(Answer<Copied>),
    Carrier(CopyWait),
    /// Nobody yet: it was asked beside that one.
    Beside(JobId, CbwId),
}

/// What a job was asked, and from when on its time counts.
#[derive(Clone, Copy)]
struct Question {
    job: JobId,
    id: CbwId,
    end: ClusterIndex,
    since: Timestamp,
    /// Until when, if it has failed beside another: it is asked nothing any more.
    until: Option<Timestamp>,
}

impl Question {
    /// How long it was asked by `now`.
    fn time(&self, now: Timestamp) -> Duration {
        self.until.unwrap_or(now).since(self.since)
    }

    /// So long nobody could answer.
    fn stand_still(&mut self, time: Duration) {
        if self.until.is_none() {
            self.since = self.since.after(time);
        }
    }
}

/// A copy that a job was asked for.
pub(super) struct Ask {
    pub(super) asker: Asker,
    question: Question,
    /// What was asked beside it, of other jobs.
    beside: Vec<Question>,
    /// What was spent for the same request before; of the time of jobs that are not asked now, too.
    before: Waited,
}

impl Ask {
    /// What is spent for that request by `now`.
    pub(super) fn waited(&self, now: Timestamp) -> Waited {
        let mut waited = self.before.clone();
        for asked in &self.beside {
            waited.entry(asked.job).beside = Some((asked.end, asked.time(now)));
        }
        let Question { job, .. } = self.question;
        *waited.entry(job) = Spent { job, time: self.question.time(now), beside: None };
        waited
    }

    fn forget_beside(&self, beside: &mut Vec<(JobId, CbwId)>) {
        beside.extend(self.beside.iter().map(|asked| (asked.job, asked.id)));
    }
}

/// The copies that one job was asked for.
#[derive(Default)]
pub(super) struct Asks(BTreeMap<CbwId, Ask>);

impl Asks {
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Drop them all: whoever waits is answered so.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// One is answered, `beside` gets what is to be forgotten with it ([`forget_beside`]).
    pub(super) fn answered(&mut self, id: CbwId, beside: &mut Vec<(JobId, CbwId)>) -> Ask {
        let ask = self.0.remove(&id).expect("every request has its asker");
        ask.forget_beside(beside);
        ask
    }
}

/// Have jobs copy for a guest at `now`, for whose request so much of their time was spent before.
///
/// # Errors
/// The job that he wishes to has ended meanwhile: he looks again and does not find it.
pub(super) fn ask_jobs(
    jobs: &mut Slab<Job>,
    wish: Wish,
    asker: Asker,
    waited: Waited,
    now: Timestamp,
) -> Result<(), (Asker, Waited)> {
    let found = jobs.iter().find(|(_, job)| job.watch.id() == wish.job && job.attached);
    let Some((index, disk)) = found.map(|(index, job)| (index, job.disk)) else {
        return Err((asker, waited));
    };
    let with = CbwId(jobs[index].next_ask);
    let mut beside = Vec::new();
    for (_, job) in
        jobs.iter_mut().filter(|&(other, ref job)| other != index && job.disk == disk && job.attached)
    {
        if job.asks.len() >= MAX_ASKS {
            continue;
        }
        if let Some(clusters) = job.watch.undone(wish.range) {
            let since = waited.since(job.watch.id(), clusters, now);
            let asker = Asker::Beside(wish.job, with);
            beside.push(job.ask(clusters, asker, Vec::new(), Waited::default(), since));
        }
    }
    let since = waited.since(wish.job, wish.clusters, now);
    jobs[index].ask(wish.clusters, asker, beside, waited, since);
    Ok(())
}

impl Job {
    fn ask(
        &mut self,
        clusters: ClusterRange,
        asker: Asker,
        beside: Vec<Question>,
        before: Waited,
        since: Timestamp,
    ) -> Question {
        let id = CbwId(self.next_ask);
        self.next_ask += 1;
        // Before that there was nothing to ask it for.
        let since = since.max(self.runner.started());
        if matches!(asker, Asker::Beside(..)) {
            self.runner.copier.copy_beside(id, clusters, since);
        } else {
            self.runner.copier.copy_before_write(id, clusters, since);
        }
        let question = Question { job: self.watch.id(), id, end: clusters.end, since, until: None };
        self.asks.0.insert(id, Ask { asker, question, beside, before });
        self.controller.on_guest(since, self.asks.len());
        question
    }
}

/// What it was asked with is over. What is under way goes on.
pub(super) fn forget_beside(jobs: &mut Slab<Job>, beside: &[(JobId, CbwId)]) {
    for &(id, ask) in beside {
        if let Some((_, job)) = jobs.iter_mut().find(|(_, job)| job.watch.id() == id)
            && job.asks.0.remove(&ask).is_some()
        {
            job.runner.copier.forget_cbw(ask);
        }
    }
}

/// Some jobs have failed beside others, `now`: each with what it was asked with. They are asked nothing any more, so their clocks stand.
pub(super) fn stop_clocks(jobs: &mut Slab<Job>, failed: &[(JobId, (JobId, CbwId))], now: Timestamp) {
    for &(failed, (id, with)) in failed {
        // The other one may be over, too.
        let ask = jobs.iter_mut().find(|(_, job)| job.watch.id() == id);
        let Some(ask) = ask.and_then(|(_, job)| job.asks.0.get_mut(&with)) else { continue };
        ask.beside.iter_mut().filter(|asked| asked.job == failed).for_each(|asked| asked.until = Some(now));
    }
}

/// The ring thread has stood still for `time`: no guest has waited so long for any job.
pub(super) fn stand_still(jobs: &mut Slab<Job>, time: Duration) {
    for (_, job) in jobs.iter_mut() {
        job.runner.copier.put_off_deadlines(time);
        for ask in job.asks.0.values_mut() {
            ask.question.stand_still(time);
            ask.beside.iter_mut().for_each(|asked| asked.stand_still(time));
        }
    }
}

/// Copies that nobody waits for any more are not begun, and do not run into the time-out of their job.
pub(super) fn forget_unwanted(jobs: &mut Slab<Job>) {
    let mut beside = Vec::new();
    for (_, job) in jobs.iter_mut() {
        let copier = &mut job.runner.copier;
        job.asks.0.retain(|&id, ask| {
            let wanted = !matches!(&ask.asker, Asker::Guest(answer) if !answer.is_wanted());
            if !wanted {
                copier.forget_cbw(id);
                ask.forget_beside(&mut beside);
            }
            wanted
        });
    }
    forget_beside(jobs, &beside);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Job 1 was asked for two pieces, and job 2 beside it, for both and for more.
    #[test]
    fn a_request_has_one_clock_for_each_job() {
        let at = |seconds| Timestamp(Duration::from_secs(seconds));
        let question = |job, end, since| Question {
            job: JobId(job),
            id: CbwId(0),
            end: ClusterIndex(end),
            since: at(since),
            until: None,
        };
        let mut ask = Ask {
            asker: Asker::Beside(JobId(1), CbwId(0)),
            question: question(1, 8, 10),
            beside: vec![question(2, 8, 10)],
            before: Waited::default(),
        };
        let waited = ask.waited(at(15));
        let of = |waited: &Waited, start| {
            [1, 2, 3].map(|job| waited.of(JobId(job), ClusterRange::new(start, 20)).as_secs())
        };
        assert_eq!(of(&waited, 7), [5, 5, 0], "job 2 still lacks a cluster of the first piece");
        assert_eq!(of(&waited, 8), [5, 0, 0], "it has copied them all, beside job 1");
        let first = ClusterRange::new(7, 20);
        assert_eq!(waited.since(JobId(2), first, at(100)), at(95));
        // He comes to it, a while later, and waits for 3 s more.
        ask.question = question(2, 8, 95);
        ask.beside = Vec::new();
        ask.before = waited;
        let mut waited = ask.waited(at(103));
        assert_eq!(of(&waited, 0), [5, 8, 0], "whatever is asked for next");
        assert_eq!(of(&waited, 8), [5, 8, 0]);
        // Beside job 1 for the next piece: 4 s of which 3 nobody could answer; then it has failed.
        ask.question = Question { since: at(195), ..question(1, 16, 0) };
        ask.beside = vec![Question { since: at(192), ..question(2, 16, 0) }];
        ask.before = waited;
        for asked in ask.beside.iter_mut().chain([&mut ask.question]) {
            asked.stand_still(Duration::from_secs(3));
        }
        ask.beside[0].until = Some(at(204));
        ask.beside[0].stand_still(Duration::from_secs(3));
        waited = ask.waited(at(210));
        assert_eq!(of(&waited, 12), [12, 9, 0]);
        assert_eq!(of(&waited, 16), [12, 8, 0]);
    }
}
