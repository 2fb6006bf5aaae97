//! The end of a ring thread that did not come to its end: the ring broke, or something of ours panicked.
//!
//! # Order
//! All jobs are detached, all barriers are let down for ever; then those who wait for copies and snapshots go, before anything that may take its
//! time. Then the ring goes, and the exports with their clients; only then are commands that were not taken answered, and none come any more: one who has
//! to have put-off discards forgotten before his write must not be told that they are while one is under way. Then every request is answered with the
//! error, for none of them is under way any more; then every job is told that it has failed. Who is told something looks again, and finds
//! no job and no barrier any more. Nothing
//! waits for a thread that is gone. (A callback that panics is no death: see `crate::foreign`.)

use std::sync::Arc;

use super::ends::run_aside;
use super::hosted::HostedDisk;
use super::reactor::{Job, Reactor};
use crate::error::Error;
use crate::ring::Ring;

impl<R: Ring> Reactor<R> {
    /// The ring is broken or something has panicked: let everybody go. See the module's header.
    pub(super) fn die(mut self, reason: &str) {
        let error = Arc::new(Error::engine_died("engine", reason.to_owned()));
        let engine = self.ring.name();
        // One who is told looks again, and must find no job any more.
        for disk in self.disks.values() {
            for (_, job) in &self.jobs {
                disk.shared.jobs().detach(job.watch.id());
            }
        }
        self.disks.values().for_each(|disk| disk.shared.gate().poison());
        let mut jobs: Vec<Job> = self.jobs.drain().collect();
        for Job { asks, reads, .. } in &mut jobs {
            asks.clear();
            reads.clear();
        }
        let mut answers = Vec::new();
        for disk in self.disks.values_mut() {
            answers.extend(disk.take_askers());
        }
        let open: Vec<_> = self.disks.values_mut().filter_map(HostedDisk::take_source).collect();
        run_aside("engine-close", move |_| drop(open));
        // The ring goes first, and with it what is in flight; then what is served, whose clients have lost their sockets.
        let (ending, inbox) = (self.ending.take(), Arc::clone(&self.inbox));
        drop(self);
        inbox.close();
        drop(answers);
        for job in jobs {
            let Job { mut runner, look, .. } = job;
            // Its end is to be the last that has the target.
            drop(look);
            let (error, ending) = (Arc::clone(&error), ending.clone());
            let Some(at_end) = runner.take_at_end() else {
                runner.shared().died(engine, error, |_| {});
                continue;
            };
            let shared = Arc::clone(runner.shared());
            // Which guests have no part in any more.
            drop(runner);
            run_aside("engine-end", move |_| {
                shared.died(engine, error, at_end);
                drop(ending);
            });
        }
    }
}
