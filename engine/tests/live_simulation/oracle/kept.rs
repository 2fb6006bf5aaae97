//! Whether the old contents of what guests change are kept: on the target, or in a slot of the fleece file.
//!
//! Which slot that is nobody is asked: any will do. What was in the fleece file alone must be on the target's medium before its slot is
//! used again, for nothing else outlasts a target that loses what was not flushed.

use engine::job::JobResult;
use engine::ring::sim::{SharedWorld, World};
use engine::units::ByteRange;

use super::Job;
use crate::seen::Seen;

impl Job {
    fn cluster_bytes(&self) -> usize {
        usize::try_from(self.spec.cluster).unwrap()
    }

    /// As they were at t0, those of the cluster that begins at byte `at`.
    fn old(&self, at: usize) -> &[u8] {
        let t0 = self.t0.as_ref().expect("it has started");
        &t0[at..t0.len().min(at + self.cluster_bytes())]
    }

    /// Where clusters begin that are in the copy and not in `view` any more.
    fn changed(&self, view: &[u8]) -> Vec<usize> {
        let t0 = self.t0.as_ref().expect("it has started");
        let changed = |&at: &usize| {
            let old = self.old(at);
            self.covers(at as u64) && view[at..at + old.len()] != *old
        };
        (0..t0.len()).step_by(self.cluster_bytes()).filter(changed).collect()
    }

    /// Whether a slot of the fleece file holds the cluster that begins at byte `at`.
    fn is_in_fleece(&self, at: usize, world: &mut World) -> bool {
        let old = self.old(at);
        self.spec.fleece.is_some()
            && world.disk(self.fleece).view().chunks(self.cluster_bytes()).any(|slot| slot.starts_with(old))
    }

    fn is_on_target(&self, at: usize, world: &mut World) -> bool {
        let old = self.old(at);
        world.disk(self.target).view().get(at..at + old.len()) == Some(old)
    }

    fn is_on_medium(&self, at: usize, world: &mut World) -> bool {
        let old = self.old(at);
        world.disk(self.target).medium().get(at..at + old.len()) == Some(old)
    }

    /// Whatever of the disk is not as it was at t0 is kept already.
    pub(super) fn check_kept(&mut self, world: &mut World, seen: &mut Seen) -> Result<(), String> {
        for at in self.changed(world.disk(self.spec.disk).view()) {
            let cluster = at / self.cluster_bytes();
            let on_target = self.is_on_target(at, world);
            if on_target && !self.fleeced.contains(&at) {
                continue;
            }
            let in_fleece = self.is_in_fleece(at, world);
            if !on_target && !in_fleece {
                return Err(format!("cluster {cluster} has changed and is not on the target"));
            }
            if !on_target && self.fleeced.insert(at) {
                seen.fleeced += 1;
            }
            if !in_fleece && !self.is_on_medium(at, world) {
                return Err(format!("cluster {cluster} has left the fleece file and is not on the medium"));
            }
        }
        Ok(())
    }

    /// A guest changes `range` of the disk now: its old contents are kept, or nobody needs them.
    pub(crate) fn check_copied(
        &self,
        disk: usize,
        range: ByteRange,
        world: &SharedWorld,
    ) -> Result<(), String> {
        let concerned = self.spec.disk == disk && self.runs() && self.attached;
        if !concerned || self.handle.progress().skipped > 0 || range.is_empty() {
            return Ok(());
        }
        let length = self.t0.as_ref().expect("it runs").len() as u64;
        let first = range.offset / self.spec.cluster * self.spec.cluster;
        let mut world = world.borrow_mut();
        let lost = (first..range.end().min(length)).step_by(self.cluster_bytes()).find(|&at| {
            let start = usize::try_from(at).unwrap();
            self.covers(at) && !self.is_on_target(start, &mut world) && !self.is_in_fleece(start, &mut world)
        });
        match lost {
            None => Ok(()),
            Some(_) => Err(format!("{range} is changed before it is on target {}", self.target)),
        }
    }

    /// Of a copy of changes alone that was cancelled: what guests had changed until then is on the medium, or is listed.
    pub(super) fn check_changes(&self, world: &SharedWorld, result: &JobResult) -> Result<(), String> {
        let mut world = world.borrow_mut();
        if !world.disk(self.target).is_flushed() {
            return Err("what guests had copied is not on the medium".into());
        }
        let view = match &self.at_detach {
            Some(view) => view.clone(),
            None => world.disk(self.spec.disk).view().to_vec(),
        };
        let is_listed = |at: usize| {
            let cluster = ByteRange::new(at as u64, self.spec.cluster);
            result.skipped.iter().any(|skipped| skipped.range.intersection(cluster).is_some())
        };
        let changed = self.changed(&view);
        let lost = changed.into_iter().find(|&at| !is_listed(at) && !self.is_on_medium(at, &mut world));
        match lost {
            None => Ok(()),
            Some(at) => Err(format!(
                "cluster {} had changed before the copy of changes was cancelled, and is not on the medium",
                at / self.cluster_bytes()
            )),
        }
    }
}
