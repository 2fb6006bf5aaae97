//! What becomes of clusters that failed.

use std::sync::Arc;

use super::checkpoint::Stage;
use super::piece::Fault;
use super::retry::{Verdict, verdict};
use super::tally::Was;
use super::transfer::{Expected, Failure};
use super::{Copier, Ending, Event, one};
use crate::error::{Error, ErrorKind, Operation};
use crate::job::IoStatus;
use crate::modes::ErrorPolicy;
use crate::units::{ClusterIndex, ClusterRange, Timestamp};

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

    /// The error that tells of `failure`.
    pub(super) fn error_of(&self, failure: Failure) -> Error {
        let Failure { fault, operation, range } = failure;
        let path = self.path_of(operation);
        if operation == Operation::CopyBeforeWrite {
            return self.fleece_is_full(failure);
        }
        match fault {
            Fault::Errno(errno) => Error::io(operation, path, Some(range), errno),
            Fault::EndOfStorage if operation == Operation::Read => Error::source_shrank(path, range),
            Fault::EndOfStorage if operation == Operation::ReadFleece => {
                let errno = nix::errno::Errno::EIO;
                Error::new(ErrorKind::Io(errno), operation, path, "it has become shorter").at(range)
            }
            Fault::EndOfStorage => {
                Error::new(ErrorKind::VerifyMismatch, operation, path, "the target has become shorter")
                    .at(range)
            }
            Fault::NothingWritten => {
                Error::new(ErrorKind::Io(nix::errno::Errno::EIO), operation, path, "nothing was written")
                    .at(range)
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
        match verdict {
            Verdict::Fail => self.end_with(Ending::Failed(error)),
            Verdict::Pause(io_status) => {
                self.retries.add(cluster, attempts, now);
                self.stop(io_status, error);
            }
            Verdict::Retry(pause) => self.retries.add(cluster, attempts + 1, now.after(pause)),
            Verdict::Skip => self.skip(cluster, error),
        }
    }

    /// Pause on `error`.
    pub(super) fn stop(&mut self, io_status: IoStatus, error: Arc<Error>) {
        if self.stopped.is_none() {
            self.stopped = Some(Arc::clone(&error));
            self.drained_said = false;
            self.events.push(Event::Stopped { io_status, error });
        }
    }

    /// Leave `cluster` out.
    pub(super) fn skip(&mut self, cluster: ClusterIndex, error: Arc<Error>) {
        let marked = self.set.mark_done(one(cluster));
        assert_eq!(marked.0, 1, "a cluster to leave out is free");
        self.leave_out(cluster, error);
    }

    /// `cluster`, which is done for guests, is no part of the copy.
    pub(super) fn leave_out(&mut self, cluster: ClusterIndex, error: Arc<Error>) {
        self.tally.settled_clusters += 1;
        self.skipped_bytes += self.plan.geometry.bytes_of(one(cluster)).length;
        self.checkpoints.on_settled(1);
        self.skipped.insert(cluster, Arc::clone(&error));
        if self.skipped.len() > self.plan.limits.skipped_ranges {
            let reason = format!("more than {} clusters cannot be copied", self.plan.limits.skipped_ranges);
            let error =
                Error::new(ErrorKind::Io(nix::errno::Errno::EIO), Operation::Copy, error.path(), reason);
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
        if unsettled.len() > 1 && failure.fault != Fault::Mismatch {
            return verification.take_apart(unsettled.into_iter());
        }
        verification.failed.extend(unsettled.into_iter().map(|(cluster, _)| (cluster, Some(failure))));
    }

    /// Clusters that failed their verification, or were not verified any more: they are not done after all.
    pub(super) fn reopen_unverified(
        &mut self,
        failed: Vec<(ClusterIndex, Was, Option<Failure>)>,
        now: Timestamp,
    ) {
        for (cluster, was, failure) in failed {
            let reopened = self.set.reopen(one(cluster));
            assert_eq!(reopened.0, 1, "a cluster that was read back was done");
            let range = self.plan.geometry.bytes_of(one(cluster));
            self.tally.withdraw(was, range.length);
            self.checkpoints.dirty = true;
            let Some(failure) = failure else { continue };
            // Whatever the target's blanks were believed to be, this one was not what it should be.
            self.blank_is_zero = false;
            if self.ending.is_some() {
                continue;
            }
            let attempts = self.mismatches.entry(cluster).or_insert(0);
            *attempts += 1;
            let attempts = *attempts - 1;
            self.apply_verdict(cluster, attempts, Failure { range, ..failure }, now);
        }
    }
}
