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
//! It is the ring's, and runs for each job while that is asked. With his answer a guest hears for how long each job was asked for him, and for what; he
//! brings that along when he asks again ([`Waited`]). Between an answer and his next question, which may be long where it is a future that nobody polls, nobody
//! is asked anything, and no time goes by; nor does it for a job that has failed beside another, until he comes to ask it himself. A job that was not
//! asked with the others, because it had not started or had too many who ask, has all of its time, and so has what a job was not asked for before: the
//! next piece of a large request.

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

/// For how long jobs were asked to copy for a guest: each up to where it was asked for last, and how long for that.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Waited(Vec<(JobId, ClusterIndex, Duration)>);

impl Waited {
    /// How long `job` was asked for all of `clusters`.
    pub(super) fn of(&self, job: JobId, clusters: ClusterRange) -> Duration {
        let asked = self.0.iter().find(|&&(other, end, _)| other == job && clusters.end <= end);
        asked.map_or(Duration::ZERO, |&(_, _, time)| time)
    }

    /// A job was asked that long, whatever for.
    #[cfg(test)]
    pub(super) fn of_test(job: JobId, seconds: u64) -> Self {
        Self(vec![(job, ClusterIndex(u64::MAX), Duration::from_secs(seconds))])
    }

    /// The moments from which the times of jobs count that are asked at `now`.
    pub(super) fn since(&self, now: Timestamp) -> impl Fn(JobId, ClusterRange) -> Timestamp + use<> {
        let waited = self.clone();
        move |job, clusters| Timestamp(now.0.saturating_sub(waited.of(job, clusters)))
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

/// What a job was asked for, and from when on its time counts.
#[derive(Clone, Copy)]
struct Question {
    job: JobId,
    id: CbwId,
    end: ClusterIndex,
    since: Timestamp,
    /// Until when, if it has failed: nobody is asked any more.
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
}

impl Ask {
    /// For how long all of these were asked by `now`.
    pub(super) fn waited(&self, now: Timestamp) -> Waited {
        let questions = self.beside.iter().chain([&self.question]);
        Waited(questions.map(|asked| (asked.job, asked.end, asked.time(now))).collect())
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

/// Have jobs copy for a guest, for whom each was asked since then for what it is to copy. `false`: the job that he wishes to has ended meanwhile; he looks
/// again and does not find it.
pub(super) fn ask_jobs(
    jobs: &mut Slab<Job>,
    wish: Wish,
    asker: Asker,
    since: impl Fn(JobId, ClusterRange) -> Timestamp,
) -> Result<(), Asker> {
    let found = jobs.iter().find(|(_, job)| job.watch.id() == wish.job && job.attached);
    let Some((index, disk)) = found.map(|(index, job)| (index, job.disk)) else { return Err(asker) };
    let with = CbwId(jobs[index].next_ask);
    let mut beside = Vec::new();
    for (_, job) in
        jobs.iter_mut().filter(|&(other, ref job)| other != index && job.disk == disk && job.attached)
    {
        if job.asks.len() >= MAX_ASKS {
            continue;
        }
        if let Some(clusters) = job.watch.undone(wish.range) {
            let since = since(job.watch.id(), clusters);
            beside.push(job.ask(clusters, Asker::Beside(wish.job, with), Vec::new(), since));
        }
    }
    jobs[index].ask(wish.clusters, asker, beside, since(wish.job, wish.clusters));
    Ok(())
}

impl Job {
    fn ask(
        &mut self,
        clusters: ClusterRange,
        asker: Asker,
        beside: Vec<Question>,
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
        self.asks.0.insert(id, Ask { asker, question, beside });
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

/// What some jobs were asked beside others has failed, `now`: each with what it was asked with. They are asked nothing any more, so their clocks stand.
pub(super) fn stop_clocks(jobs: &mut Slab<Job>, failed: &[(JobId, (JobId, CbwId))], now: Timestamp) {
    for &(failed, (id, with)) in failed {
        // The other one may be over, too.
        let ask = jobs.iter_mut().find(|(_, job)| job.watch.id() == id);
        let Some(ask) = ask.and_then(|(_, job)| job.asks.0.get_mut(&with)) else { continue };
        ask.beside.iter_mut().filter(|asked| asked.job == failed).for_each(|asked| asked.until = Some(now));
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
    fn time_counts_for_what_was_asked_all_that_time() {
        let second = Duration::from_secs(1);
        let waited =
            Waited(vec![(JobId(1), ClusterIndex(256), second), (JobId(2), ClusterIndex(3), 2 * second)]);
        let of = |job, start, end| waited.of(JobId(job), ClusterRange::new(start, end));
        assert_eq!([of(1, 0, 256), of(1, 200, 256), of(2, 0, 3)], [second, second, 2 * second]);
        assert_eq!([of(1, 256, 300), of(1, 200, 300), of(2, 0, 4)], [Duration::ZERO; 3], "another piece");
        assert_eq!(of(3, 0, 1), Duration::ZERO, "it was not asked");
    }
}
