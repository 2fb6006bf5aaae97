//! What becomes of clusters that failed.

use std::sync::Arc;

use nix::errno::Errno;

use super::checkpoint::Stage;
use super::piece::Fault;
use super::plan::Side;
use super::retry::{Verdict, verdict};
use super::transfer::{Expected, Failure};
use super::verify::Unverified;
use super::{Copier, Ending, Event, one};
use crate::error::{Error, ErrorKind, Operation};
use crate::job::{ErrorAction, IoStatus};
use crate::modes::ErrorPolicy;
use crate::units::{ByteRange, ClusterIndex, ClusterRange, Timestamp};

/// The two sides of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SideName {
    Source,
    Target,
}

/// On which side `operation` works.
pub(super) fn side_of(operation: Operation) -> SideName {
    if operation == Operation::Read { SideName::Source } else { SideName::Target }
}

impl Copier {
    fn policy_of(&self, operation: Operation) -> ErrorPolicy {
        match side_of(operation) {
            SideName::Source => self.plan.on_source_error,
            SideName::Target => self.plan.on_target_error,
        }
    }

    /// The side that `operation` works on.
    fn plan_side(&self, operation: Operation) -> &Side {
        match side_of(operation) {
            SideName::Source => &self.plan.source,
            SideName::Target => &self.plan.target,
        }
    }

    /// The system, or the server that the side is at, said `errno`.
    pub(super) fn io_error(&self, operation: Operation, range: Option<ByteRange>, errno: Errno) -> Error {
        let path = self.path_of(operation);
        let at_server = self.plan_side(operation).remote && operation != Operation::ReadFleece;
        let error = if at_server { Error::io_at_server } else { Error::io };
        error(operation, path, range, errno)
    }

    /// The error that tells of `failure`.
    pub(super) fn error_of(&self, failure: Failure) -> Error {
        let Failure { fault, operation, range } = failure;
        let path = self.path_of(operation);
        if operation == Operation::CopyBeforeWrite {
            return self.fleece_is_full(failure);
        }
        match fault {
            Fault::Errno(errno) | Fault::Lost(errno) => self.io_error(operation, Some(range), errno),
            Fault::EndOfStorage if operation == Operation::Read => Error::source_shrank(path, range),
            Fault::EndOfStorage if operation == Operation::ReadFleece => {
                let errno = nix::errno::Errno::EIO;
                Error::new(ErrorKind::Io(errno), operation, path, "it has become shorter")
                    .at(range)
                    .advise("see who truncates it, and back up again")
            }
            Fault::EndOfStorage => {
                Error::new(ErrorKind::VerifyMismatch, operation, path, "the target has become shorter")
                    .at(range)
                    .advise("see who truncates it, and copy again while nothing does")
            }
            Fault::NothingWritten => {
                let whose = if self.plan_side(operation).remote { "server" } else { "kernel" };
                Error::new(ErrorKind::Io(Errno::EIO), operation, path, "nothing was written")
                    .at(range)
                    .advise(format!(
                        "the target takes nothing there and does not say why: see the {whose}'s log"
                    ))
            }
            Fault::Mismatch => Error::verify_mismatch(path, range),
        }
    }

    /// The clusters `unsettled` of a copy of `clusters` were released: take them apart, or go by the policy.
    pub(super) fn copy_failed(
        &mut self,
        unsettled: &[ClusterIndex],
        clusters: ClusterRange,
        alone: Option<u32>,
        failure: Option<Failure>,
        tainted: bool,
        now: Timestamp,
    ) {
        if unsettled.is_empty() || self.ending.is_some() {
            return;
        }
        let Some(failure) = failure.filter(|_| clusters.count() == 1) else {
            assert!(tainted || failure.is_some(), "unsettled clusters have a reason");
            for &cluster in unsettled {
                self.retries.add(cluster, alone.unwrap_or(0), now);
            }
            return;
        };
        let cluster = unsettled[0];
        self.apply_verdict(cluster, alone.unwrap_or(0), failure, now);
    }

    fn apply_verdict(&mut self, cluster: ClusterIndex, attempts: u32, failure: Failure, now: Timestamp) {
        let policy = self.policy_of(failure.operation);
        let verdict = verdict(policy, failure.fault, attempts, &self.plan.limits);
        let error = Arc::new(self.error_of(failure));
        tracing::info!(%error, ?policy, ?verdict, attempts, "cluster failed");
        self.tell_error(&error, verdict);
        match verdict {
            Verdict::Fail => self.end_with(Ending::Failed(error)),
            Verdict::Pause(io_status) => {
                self.retries.add(cluster, attempts, now);
                self.failed_in_pause += 1;
                self.stop(io_status, error);
            }
            Verdict::Retry(pause) => self.retries.add(cluster, attempts + 1, now.after(pause)),
            Verdict::Skip => self.skip(cluster, error),
        }
    }

    /// Tell of an error and of what its policy makes of it, unless the copy ends for another reason already.
    pub(super) fn tell_error(&mut self, error: &Arc<Error>, verdict: Verdict) {
        if self.ending.is_some() {
            return;
        }
        let action = match verdict {
            Verdict::Fail => ErrorAction::Report,
            Verdict::Pause(_) => ErrorAction::Stop,
            Verdict::Retry(_) | Verdict::Skip => ErrorAction::Ignore,
        };
        self.events.push(Event::Error { error: Arc::clone(error), action });
    }

    /// Pause on `error`, which was told.
    pub(super) fn stop(&mut self, io_status: IoStatus, error: Arc<Error>) {
        let is_told =
            |event: &Event| matches!(event, Event::Error { error: told, .. } if Arc::ptr_eq(told, &error));
        debug_assert!(self.events.iter().any(is_told), "a pause that nobody is told the reason of: {error}");
        if self.stopped.is_none() {
            self.stopped = Some(Arc::clone(&error));
            self.drained_said = false;
            self.events.push(Event::Stopped { io_status, error });
        }
    }

    /// Leave `cluster`, which is free, out. Of a live disk it stays free as long as no guest changes it: who is about to tries
    /// once more.
    fn skip(&mut self, cluster: ClusterIndex, error: Arc<Error>) {
        if self.plan.live.is_some() {
            return self.leave_out(cluster, error);
        }
        self.skip_for_good(cluster, error);
    }

    /// Leave `cluster`, which is free, out, and let guests change it.
    pub(super) fn skip_for_good(&mut self, cluster: ClusterIndex, error: Arc<Error>) {
        let marked = self.set.mark_done(one(cluster));
        assert_eq!(marked.0, 1, "a cluster to leave out is free");
        self.leave_out(cluster, error);
    }

    /// Let guests change what of `clusters` was left out.
    pub(super) fn give_up_skipped(&mut self, clusters: ClusterRange) {
        let mut at = clusters.start;
        while let Some(range) = self.skipped.next_from(at).filter(|range| range.start < clusters.end) {
            let (start, end) = (range.start.max(at), range.end.min(clusters.end));
            self.set.mark_done(ClusterRange { start, end });
            at = range.end;
        }
    }

    /// A guest has claimed `clusters` to copy them: what of them was left out is not any more, unless that fails.
    pub(super) fn give_second_chance(&mut self, clusters: ClusterRange) {
        if self.skipped.count() == 0 {
            return;
        }
        for cluster in clusters.iter().filter(|&cluster| self.skipped.remove(cluster)) {
            self.tally.settled_clusters -= 1;
            self.skipped_bytes -= self.plan.geometry.bytes_of(one(cluster)).length;
            self.second_chances.insert(cluster);
        }
    }

    /// `cluster` is no part of the copy.
    pub(super) fn leave_out(&mut self, cluster: ClusterIndex, error: Arc<Error>) {
        self.tally.settled_clusters += 1;
        self.skipped_bytes += self.plan.geometry.bytes_of(one(cluster)).length;
        self.checkpoints.on_settled(1);
        self.keep_space(one(cluster));
        self.skipped.add(cluster, Arc::clone(&error));
        self.second_chances.remove(&cluster);
        self.mismatches.remove(&cluster);
        if self.skipped.count() > self.plan.limits.skipped_ranges {
            let reason = format!("more than {} ranges cannot be copied", self.plan.limits.skipped_ranges);
            let error = Error::new(ErrorKind::Io(Errno::EIO), Operation::Copy, error.path(), reason);
            self.end_with(Ending::Failed(Arc::new(error)));
        }
    }

    /// A run was read back; `unsettled` of it did not compare equal, or could not be read.
    pub(super) fn verification_ended(
        &mut self,
        unsettled: Vec<(ClusterIndex, Expected)>,
        failure: Option<Failure>,
    ) {
        let Stage::Verifying(verification) = &mut self.checkpoints.stage else {
            unreachable!("read back in a verification only")
        };
        verification.running -= 1;
        let Some(failure) = failure else { return };
        // When the job ends, a read that was to go on does not: its clusters are passed over with the rest.
        let given_up = self.ending.is_some() && failure.fault == Fault::Errno(Errno::ECANCELED);
        if given_up || (unsettled.len() > 1 && failure.fault != Fault::Mismatch) {
            return verification.take_apart(unsettled.into_iter());
        }
        let failures = verification.failed(unsettled.into_iter(), failure);
        if failures >= self.plan.limits.mismatches {
            verification.abandon();
        }
        // One is enough, when it ends the job.
        let policy = self.policy_of(failure.operation);
        if verdict(policy, failure.fault, 0, &self.plan.limits) == Verdict::Fail {
            self.end_with(Ending::Failed(Arc::new(self.error_of(failure))));
        }
    }

    /// Clusters that failed their verification, or were not verified any more: they are not done after all.
    pub(super) fn reopen_unverified(&mut self, unverified: &[Unverified], now: Timestamp) {
        let mut untold: Option<(Failure, u64)> = None;
        for &Unverified { clusters, was, failure } in unverified {
            let reopened = self.set.reopen(clusters);
            assert_eq!(reopened.0, clusters.count(), "clusters to be read back were done");
            let range = self.plan.geometry.bytes_of(clusters);
            self.tally.withdraw(was, clusters.count(), range.length);
            self.checkpoints.dirty = true;
            let Some(failure) = failure else {
                self.rewind_to(clusters.start);
                continue;
            };
            // Whatever the target's blanks were believed to be, this one was not what it should be.
            self.blanks_are_not_zero();
            let failure = Failure { range, ..failure };
            if self.ending.is_some() {
                untold.get_or_insert((failure, 0)).1 += clusters.count();
                continue;
            }
            let cluster = clusters.start;
            let attempts = self.mismatches.entry(cluster).or_insert(0);
            *attempts += 1;
            let attempts = *attempts - 1;
            self.apply_verdict(cluster, attempts, failure, now);
        }
        if let Some((first, clusters)) = untold {
            self.tell_unverified(first, clusters);
        }
    }

    /// The job is ending, and no policy is asked about `clusters` clusters that failed their verification: say so, unless that is why it ends.
    fn tell_unverified(&mut self, first: Failure, clusters: u64) {
        if matches!(&self.ending, Some(Ending::Failed(error)) if error.operation() == Operation::Verify) {
            return;
        }
        let more = match clusters {
            1 => String::new(),
            _ => format!(" (the first of {clusters} clusters)"),
        };
        self.events.push(Event::Notice(format!("found while ending: {}{more}", self.error_of(first))));
    }
}
