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
//! waits for at most does not grow with what he writes. With his answer he hears for how long each job was asked for him by then; he
//! brings that along when he asks again ([`Waited`]). Between an answer and his next question, which may be long where it is a future that nobody polls, nobody
//! is asked anything, and no time goes by; nor does it for a job that has answered beside another: that has copied all it was asked for, or it has failed,
//! until he comes to ask it himself. A job that was not asked with the others, because it had not started or had too many who ask, has all of its time.

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
use crate::units::{ByteRange, ClusterRange, Timestamp};

/// Most guests with an I/O path of their own who wait for copies of a job, and most that are asked beside.
pub(super) const MAX_ASKS: usize = 65_536;

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

/// For how long jobs were asked to copy for a guest's request, all its pieces together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Waited(Vec<(JobId, Duration)>);

impl Waited {
    /// How long `job` was asked.
    pub(super) fn of(&self, job: JobId) -> Duration {
        let asked = self.0.iter().find(|&&(other, _)| other == job);
        asked.map_or(Duration::ZERO, |&(_, time)| time)
    }

    /// A job was asked that long.
    #[cfg(test)]
    pub(super) fn of_test(job: JobId, seconds: u64) -> Self {
        Self(vec![(job, Duration::from_secs(seconds))])
    }

    /// From when on the time of `job` counts, which is asked at `now`.
    fn since(&self, job: JobId, now: Timestamp) -> Timestamp {
        Timestamp(now.0.saturating_sub(self.of(job)))
    }

    /// `job` was asked that long by now.
    fn set(&mut self, job: JobId, time: Duration) {
        match self.0.iter_mut().find(|(other, _)| *other == job) {
            Some((_, before)) => *before = time,
            None => self.0.push((job, time)),
        }
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
    since: Timestamp,
    /// Until when, if it has answered beside another: it is asked nothing any more.
    until: Option<Timestamp>,
}

impl Question {
    /// How long it was asked by `now`.
    fn time(&self, now: Timestamp) -> Duration {
        self.until.unwrap_or(now).since(self.since)
    }
}

/// A copy that a job was asked for.
pub(super) struct Ask {
    pub(super) asker: Asker,
    question: Question,
    /// What was asked beside it, of other jobs.
    beside: Vec<Question>,
    /// For how long jobs were asked for the same request before; those that are not asked now, too.
    before: Waited,
}

impl Ask {
    /// For how long jobs were asked for that request by `now`.
    pub(super) fn waited(&self, now: Timestamp) -> Waited {
        let mut waited = self.before.clone();
        for asked in self.beside.iter().chain([&self.question]) {
            waited.set(asked.job, asked.time(now));
        }
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

/// Have jobs copy for a guest at `now`, for whose request they were asked so long before.
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
            let since = waited.since(job.watch.id(), now);
            let asker = Asker::Beside(wish.job, with);
            beside.push(job.ask(clusters, asker, Vec::new(), Waited::default(), since));
        }
    }
    let since = waited.since(wish.job, now);
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
        let question = Question { job: self.watch.id(), id, since, until: None };
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

/// Some jobs have answered beside others, `now`: each with what it was asked with. They are asked nothing any more, so their clocks stand.
pub(super) fn stop_clocks(jobs: &mut Slab<Job>, answered: &[(JobId, (JobId, CbwId))], now: Timestamp) {
    for &(answered, (id, with)) in answered {
        // The other one may be over, too.
        let ask = jobs.iter_mut().find(|(_, job)| job.watch.id() == id);
        let Some(ask) = ask.and_then(|(_, job)| job.asks.0.get_mut(&with)) else { continue };
        ask.beside.iter_mut().filter(|asked| asked.job == answered).for_each(|asked| asked.until = Some(now));
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

    #[test]
    fn a_request_has_one_clock_for_each_job() {
        let at = |seconds| Timestamp(Duration::from_secs(seconds));
        let question = |job, since, until: Option<u64>| Question {
            job: JobId(job),
            id: CbwId(0),
            since: at(since),
            until: until.map(at),
        };
        // Of the first piece: job 2 beside job 1, and done before it.
        let mut ask = Ask {
            asker: Asker::Beside(JobId(1), CbwId(0)),
            question: question(1, 10, None),
            beside: vec![question(2, 10, Some(12))],
            before: Waited::default(),
        };
        let waited = ask.waited(at(15));
        let of = |waited: &Waited| [1, 2, 3].map(|job| waited.of(JobId(job)).as_secs());
        assert_eq!(of(&waited), [5, 2, 0]);
        assert_eq!([1, 2, 3].map(|job| waited.since(JobId(job), at(100))), [at(95), at(98), at(100)]);
        // Of the second, a while later: job 1 has that already, and its time is not forgotten.
        ask.question = Question { since: waited.since(JobId(2), at(100)), ..question(2, 0, None) };
        ask.beside = Vec::new();
        ask.before = waited;
        assert_eq!(of(&ask.waited(at(103))), [5, 5, 0]);
    }
}
