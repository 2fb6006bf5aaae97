//! One copy and its job, without a ring: what the handles ask for goes to the copier, what happens in the copier goes to
//! the handles.
//!
//! The loop that owns a ring calls it: [`Runner::take_requests`], [`Runner::poll`], push, [`Runner::published`],
//! [`Runner::conclusion`], wait, [`Runner::on_completion`]. A loop may carry one runner (`driver`) or many (`live`).

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use super::handle::Shared;
use super::{IoStatus, JobEvent, JobResult, Lifecycle, Outcome, Progress, Status};
use crate::copier::{Copier, Ending, Event, Places};
use crate::error::Error;
use crate::ring::{Arena, Completion, Op, Token};
use crate::units::Timestamp;

/// Runs once when the copy is over and before anybody is told, to clean up and to add to the result.
pub(crate) type AtEnd = Box<dyn FnOnce(&mut JobResult) + Send>;

/// See the module's header.
pub(crate) struct Runner {
    pub(crate) copier: Copier,
    shared: Arc<Shared>,
    seen: Option<u64>,
    started: Timestamp,
    rate: RateMeter,
    paused_on: Option<String>,
    ending: Option<Ending>,
    at_end: Option<AtEnd>,
    over: bool,
}

impl Runner {
    /// A runner for a job whose handle was given out already; to be started.
    pub(crate) fn new(
        mut copier: Copier,
        shared: Arc<Shared>,
        at_end: Option<AtEnd>,
        now: Timestamp,
    ) -> Self {
        copier.ask_before_complete();
        Self {
            copier,
            shared,
            seen: None,
            started: now,
            rate: RateMeter::default(),
            paused_on: None,
            ending: None,
            at_end,
            over: false,
        }
    }

    /// The copy begins.
    pub(crate) fn start(&mut self, now: Timestamp) {
        self.started = now;
        self.shared.with_lifecycle(Lifecycle::start);
    }

    /// When the copy began.
    pub(crate) fn started(&self) -> Timestamp {
        self.started
    }

    /// What the job shares with its handles.
    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Take out what was to run at the end: the loop is going away before that, or has it run elsewhere.
    pub(crate) fn take_at_end(&mut self) -> Option<AtEnd> {
        self.at_end.take()
    }

    /// Whether the job has ended.
    pub(crate) fn is_over(&self) -> bool {
        self.over
    }

    /// Have the copier act at `now` and give the operations that find `places`. `true`: there is more to do at once.
    pub(crate) fn poll(&mut self, now: Timestamp, places: Places, out: &mut Vec<(Token, Op)>) -> bool {
        // Before the requests: one that was made since an error stopped the copier knows nothing of that, and must not pass for its resumption.
        self.take_events();
        self.take_requests(now);
        let more = self.copier.poll(now, places, out);
        // With a cancel that was accepted meanwhile it is not complete: the next turn takes it.
        if self.copier.asks_to_complete() && self.shared.refuse_cancels() {
            self.copier.complete();
        }
        self.take_events();
        if self.copier.is_ending() && !self.copier.is_complete() {
            // What is in flight may take long yet.
            self.shared.with_lifecycle(Lifecycle::abort);
        }
        let progress = self.progress(now);
        self.shared.publish(progress);
        more
    }

    /// End the job without a result, as if its handle had asked for it; also when only the others of its group are not done. `false`: its end is
    /// being written down, or it is ending already.
    pub(crate) fn cancel(&mut self) -> bool {
        let done = matches!(self.ending, Some(Ending::Complete)) && !self.over;
        if done {
            self.ending = Some(Ending::Cancelled);
        }
        let cancelled = self.copier.cancel() || done;
        if cancelled {
            self.shared.with_lifecycle(Lifecycle::abort);
        }
        cancelled
    }

    /// End the job with `error` although its work is done, as long as only the others of its group keep it.
    pub(crate) fn fail(&mut self, error: Arc<Error>) {
        if matches!(self.ending, Some(Ending::Complete)) && !self.over {
            self.ending = Some(Ending::Failed(error));
            self.shared.with_lifecycle(Lifecycle::abort);
        }
    }

    /// Hand a completion to the copier.
    pub(crate) fn on_completion(&mut self, completion: Completion, arena: &Arena, now: Timestamp) {
        self.copier.on_completion(completion, arena, now);
    }

    fn take_requests(&mut self, now: Timestamp) {
        let version = self.shared.version();
        if self.seen == Some(version) {
            return;
        }
        self.seen = Some(version);
        let requests = self.shared.requests();
        self.copier.set_speed(requests.speed, now);
        self.copier.set_paused(requests.pause);
        if !requests.pause || self.shared.with_lifecycle(|lifecycle| lifecycle.io_status()) == IoStatus::Ok {
            self.paused_on = None;
        }
        if requests.cancel {
            // In `pending` the copy is complete but the job has not concluded: it can still be cancelled. One that has failed meanwhile has
            // failed.
            let pending = matches!(self.ending, Some(Ending::Complete));
            if self.copier.cancel() || pending {
                self.shared.with_lifecycle(Lifecycle::abort);
            }
            if pending {
                self.ending = Some(Ending::Cancelled);
            }
        }
    }

    /// Tell what has happened in the copier.
    pub(crate) fn take_events(&mut self) {
        for event in self.copier.take_events() {
            match event {
                Event::Stopped { io_status, error } => {
                    self.paused_on = Some(error.to_string());
                    self.shared.stopped(io_status, error.to_string());
                }
                Event::Error { error, action } => self.shared.tell(JobEvent::Error { error: &error, action }),
                Event::Drained => self.shared.with_lifecycle(Lifecycle::drained),
                Event::Notice(notice) => self.shared.notice(notice),
                Event::Finished(ending) => {
                    match ending {
                        Ending::Complete => self.shared.with_lifecycle(Lifecycle::finished),
                        Ending::Failed(_) | Ending::Cancelled => self.shared.with_lifecycle(Lifecycle::abort),
                    }
                    self.ending = Some(ending);
                }
            }
        }
    }

    /// When the copier is through and the job may conclude: cleans up and gives the result, once. The loop lets go of the job's files and
    /// then calls [`Self::conclude`].
    pub(crate) fn conclusion(&mut self, now: Timestamp, engine: &'static str) -> Option<JobResult> {
        let mut result = self.verdict(now, engine)?;
        if let Some(at_end) = self.at_end.take() {
            at_end(&mut result);
        }
        Some(result)
    }

    /// The same with nothing cleaned up: see [`Self::take_at_end`].
    pub(crate) fn verdict(&mut self, now: Timestamp, engine: &'static str) -> Option<JobResult> {
        if self.over {
            return None;
        }
        let ending = self.ending.as_ref()?;
        // From here on a cancel is refused; one that was accepted before is taken first.
        if !self.shared.decide() {
            return None;
        }
        let skipped = self.copier.skipped_ranges();
        let outcome = match ending {
            Ending::Complete if skipped.is_empty() => Outcome::Complete,
            Ending::Complete => Outcome::CompleteWithSkipped,
            Ending::Failed(error) => Outcome::Failed(Arc::clone(error)),
            Ending::Cancelled => Outcome::Cancelled,
        };
        let result = JobResult {
            outcome,
            progress: self.progress(now),
            skipped,
            verified: self.copier.is_verified(),
            durable: true,
            elapsed: now.since(self.started),
            engine,
            resumable: self.copier.is_resumable(),
            resumable_bytes: self.copier.mapped_bytes(),
            map_removed: self.copier.map_was_removed(),
            guests: None,
            notices: self.shared.notices(),
        };
        self.over = true;
        Some(result)
    }

    /// Tell everybody. Whoever is told may use the job's disks at once, so they were let go before.
    pub(crate) fn conclude(&self, result: JobResult) {
        assert!(self.over, "a job concludes after its end");
        self.shared.end(result);
    }

    fn progress(&mut self, now: Timestamp) -> Progress {
        let counters = self.copier.counters();
        self.rate.sample(now, counters.done);
        let rate = self.rate.rate();
        let left = counters.total - counters.done - counters.skipped;
        let time_left = (rate > 0).then(|| Duration::from_secs_f64(left as f64 / rate as f64));
        Progress {
            total: counters.total,
            done: counters.done,
            copied: counters.copied,
            holes: counters.holes,
            zeros: counters.zeros,
            uncovered: counters.uncovered,
            resumed: counters.resumed,
            skipped: counters.skipped,
            verified: counters.verified,
            retries: counters.retries,
            in_flight: counters.in_flight,
            fleeced: self.copier.fleeced_bytes(),
            rate,
            time_left,
            paused_on: self.paused_on.clone(),
            elapsed: now.since(self.started),
            ..empty_progress(counters.total)
        }
    }
}

/// Progress before anything was done.
pub(crate) fn empty_progress(total: u64) -> Progress {
    Progress {
        status: Status::Created,
        io_status: IoStatus::Ok,
        total,
        done: 0,
        copied: 0,
        holes: 0,
        zeros: 0,
        uncovered: 0,
        resumed: 0,
        skipped: 0,
        verified: 0,
        retries: 0,
        in_flight: 0,
        fleeced: 0,
        rate: 0,
        time_left: None,
        speed: None,
        paused_on: None,
        elapsed: Duration::ZERO,
    }
}

/// The rate over the last seconds, from samples a quarter of a second apart.
#[derive(Debug, Default)]
struct RateMeter {
    samples: VecDeque<(Timestamp, u64)>,
}

impl RateMeter {
    const SPACING: Duration = Duration::from_millis(250);
    const SAMPLES: usize = 16;

    fn sample(&mut self, now: Timestamp, done: u64) {
        let due = self.samples.back().is_none_or(|(last, _)| now.since(*last) >= Self::SPACING);
        if due {
            if self.samples.len() == Self::SAMPLES {
                self.samples.pop_front();
            }
            self.samples.push_back((now, done));
        }
    }

    /// Bytes a second, 0 while there are no two samples.
    fn rate(&self) -> u64 {
        let (Some(first), Some(last)) = (self.samples.front(), self.samples.back()) else { return 0 };
        let nanos = last.0.since(first.0).as_nanos();
        if nanos == 0 {
            return 0;
        }
        let bytes = u128::from(last.1.saturating_sub(first.1));
        u64::try_from(bytes * 1_000_000_000 / nanos).unwrap_or(u64::MAX)
    }
}
