//! The disks of a ring thread: how they come, act in turns, and go.
//!
//! # Turns
//! The guests of a disk get the places on the ring that `places` gives them: what one disk has in flight, be it for ever, is bounded, and every disk
//! has some that nobody else takes. The rest is for whoever comes first, so each turn of the ring thread begins with another disk.
//!
//! The questions of clients, where a disk has data, come before its requests: there are few of them at a time (`hosted`).
//!
//! # The end of a disk
//! It goes when its last handle is gone and nothing of it is left to do: no job, no start that is under way, no request, no discard that was put off.
//! What was open is closed elsewhere (`ends`), for that may take its time.

use std::ops::Bound;
use std::sync::Arc;

use super::DiskId;
use super::ask::Lost;
use super::carrier::{CarrierPlan, IoOutcome, IoRequest};
use super::disk::DiskShared;
use super::ends::close;
use super::exports::Question;
use super::host::Host;
use super::hosted::{HostedDisk, IoAsker};
use super::opened::Opened;
use super::places::{Division, Taken};
use super::reactor::{Reactor, tell};
use super::room::Share;
use super::token::{Owner, token_of};
use crate::copier::plan::Side;
use crate::error::{Error, Operation, Refusal};
use crate::ring::Ring;
use crate::units::Timestamp;

/// What its carrier has to know of a disk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Carried {
    /// Of direct I/O; `None`: buffered.
    pub(super) direct_alignment: Option<u32>,
    /// Whether zeros that keep their space are never written one by one.
    pub(super) keep_is_fast: bool,
}

impl<R: Ring> Reactor<R> {
    pub(super) fn add_disk(
        &mut self,
        file: R::File,
        how: Carried,
        shared: Arc<DiskShared>,
        opened: Option<Arc<Opened>>,
        share: Share,
    ) -> Result<(), Error> {
        let file = self.ring.add_file(file).map_err(|failure| {
            let (name, reason) = (shared.name().to_string(), "the ring does not take it");
            Error::refused(Refusal::Unavailable, Operation::OpenSource, name, reason).because(failure)
        })?;
        let side = Side { file, name: shared.name(), direct_alignment: how.direct_alignment, remote: false };
        let plan = CarrierPlan {
            file: side.clone(),
            length: shared.length(),
            keep_is_fast: how.keep_is_fast,
            buffers: share.memory(),
            limits: self.carrier_limits,
            #[cfg(feature = "sim")]
            planted: None,
        };
        let disk = HostedDisk::new(side, shared, share, opened, plan);
        self.disks.insert(disk.shared.id(), disk);
        Ok(())
    }

    /// A request for disk `id`.
    pub(super) fn submit(&mut self, id: DiskId, request: IoRequest, asker: IoAsker, now: Timestamp) {
        let Some(disk) = self.disks.get_mut(&id) else {
            return tell(asker, IoOutcome::lost(), &mut self.exports);
        };
        if let Err((asker, error)) = disk.submit(request, asker, now) {
            return tell(asker, IoOutcome::new(Err(error)), &mut self.exports);
        }
        let together = disk.carrier.requests_under_way();
        for (_, job) in &mut self.jobs {
            if job.disk == id {
                job.controller.on_guest(now, together);
            }
        }
    }

    /// A question for disk `id`.
    pub(super) fn ask(&mut self, id: DiskId, question: Question) {
        match self.disks.get_mut(&id) {
            Some(disk) => disk.ask(question),
            None => self.exports.not_answered(&question),
        }
    }

    /// How the places on the ring are divided, and who has them.
    pub(super) fn places(&self) -> (Division, Taken) {
        let division = Division::of(self.ring.capacity());
        let of_guests = self.disks.values().map(|disk| division.beyond_own(disk.in_flight)).sum();
        let of_jobs = self.jobs.iter().map(|(_, job)| job.runner.copier.beyond(division.own())).sum();
        (division, Taken { in_flight: self.ring.in_flight(), of_guests, of_jobs })
    }

    /// Let the disks act; `true`: there is more to do at once.
    pub(super) fn poll_disks(&mut self, now: Timestamp) -> bool {
        let first = self.first_disk;
        let next = self.disks.range((Bound::Excluded(first), Bound::Unbounded)).next();
        self.first_disk = next.map_or(DiskId(0), |(&id, _)| id);
        let from_first = (Bound::Included(first), Bound::Unbounded);
        let rest = (Bound::Unbounded, Bound::Excluded(first));
        let more = self.poll_some_disks(from_first, now);
        self.poll_some_disks(rest, now) || more
    }

    fn poll_some_disks(&mut self, part: (Bound<DiskId>, Bound<DiskId>), now: Timestamp) -> bool {
        let mut more = false;
        let (division, mut taken) = self.places();
        for (&id, disk) in self.disks.range_mut(part) {
            taken.in_flight = self.ring.in_flight();
            let mut room = division.for_disk(taken, disk.in_flight);
            taken.of_guests -= division.beyond_own(disk.in_flight);
            while room > 0
                && let Some(question) = disk.next_question()
            {
                let (token, op) = question.op(disk.side.file);
                self.ring.push(token, op);
                disk.in_flight += 1;
                room -= 1;
            }
            let mut host = Host {
                disk: &disk.shared,
                jobs: &mut self.jobs,
                now,
                #[cfg(feature = "sim")]
                planted: &mut self.planted,
            };
            more |= disk.carrier.poll(now, room, self.ring.arena_mut(), &mut host, &mut self.ops);
            // Before anybody is told that his discard is done.
            if disk.carrier.has_discards_put_off() {
                self.forgetting.iter().for_each(|wait| wait.forget(disk));
            }
            disk.shared.set_discards_put_off(disk.carrier.has_discards_put_off());
            disk.in_flight += self.ops.len();
            taken.of_guests += division.beyond_own(disk.in_flight);
            for (token, op) in self.ops.drain(..) {
                self.ring.push(token_of(Owner::Disk(id), token), op);
            }
            for (asker, since, outcome) in disk.take_outcomes() {
                tell(asker, outcome, &mut self.exports);
                let latency = now.since(since);
                disk.felt.record(latency, now);
                for (_, job) in self.jobs.iter_mut().filter(|(_, job)| job.disk == id) {
                    job.guests.during.record(latency);
                }
            }
            more |= disk.feed();
        }
        more
    }

    /// Let go of disks that are over; whether there were any.
    pub(super) fn remove_closed_disks(&mut self) -> bool {
        let jobs = &self.jobs;
        let raised = self.raised.as_ref();
        let used = |id: DiskId| {
            jobs.iter().any(|(_, job)| job.disk == id) || raised.is_some_and(|raised| raised.needs(id))
        };
        let gone: Vec<DiskId> = self
            .disks
            .iter()
            .filter(|(id, disk)| disk.closing && disk.is_idle() && !used(**id))
            .map(|(&id, _)| id)
            .collect();
        for id in &gone {
            let disk = self.disks.remove(id).expect("it is there");
            let storage = self.ring.remove_file(disk.side.file);
            let (source, kept) = disk.into_rest();
            close(storage, source, kept, self.ending.clone());
        }
        !gone.is_empty()
    }
}
