//! A copier's operations on their way to the ring, and the places that they have there.
//!
//! # Model
//! Operations are of three *kinds*: those that guests wait for and the target has no part in (the source is read, the fleece file is
//! written), those that guests wait for and that work on the target, and those of the sweep. They leave in this order, each kind in the order in
//! which it came.
//!
//! A target that does not answer keeps every place that it was given. What it does not have it cannot keep from others: so the
//! sweep has at most three quarters of the places that the job may have, and it and guests' writes to the target together seven eighths. What is
//! left are places for those guests who need nothing of the target. Beside that, of each kind a job has some places of its own,
//! which no other job takes, whatever becomes of the ring's common ones: see [`Places`].
//!
//! The sweep begins nothing for which there is no place, lest guests find claimed what nobody is copying yet.

use std::collections::VecDeque;

use slab::Slab;

use super::Task;
use crate::ring::{FileId, Op, Token, file_of};

/// Places on the ring that a copier's operations may take now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Places {
    /// That are free on the ring.
    pub free: usize,
    /// That are free for whoever comes first.
    pub common: usize,
    /// That it has of each kind, whatever others do: so many operations of a kind take none of the common ones.
    pub own: usize,
    /// Most that it may have in all, unless its own are more.
    pub most: usize,
}

impl Places {
    /// For a copier that is alone on a ring on which so many are free.
    #[must_use]
    pub fn alone(free: usize) -> Self {
        Self { free, common: free, own: 0, most: usize::MAX }
    }
}

/// What an operation is to the guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// One waits for it, and the target has no part in it.
    Guests = 0,
    /// One waits for it, and for the target.
    GuestsOnTarget = 1,
    /// Nobody waits for it.
    Sweep = 2,
}

const KINDS: [Kind; 3] = [Kind::Guests, Kind::GuestsOnTarget, Kind::Sweep];

/// Of the places that a copier may have, these parts are not for the sweep, and not for what works on the target.
const KEPT_FROM_SWEEP: usize = 4;
const KEPT_FROM_TARGET: usize = 8;

#[derive(Debug)]
struct Entry {
    task: Task,
    /// As what it is on the ring; `None`: it is not.
    flies: Option<Kind>,
}

/// See the module's header.
#[derive(Debug)]
pub(super) struct Queue {
    target: FileId,
    entries: Slab<Entry>,
    /// By kind.
    waiting: [VecDeque<(Token, Op)>; 3],
    /// By kind.
    flying: [usize; 3],
}

impl Queue {
    pub(super) fn new(target: FileId) -> Self {
        Self { target, entries: Slab::new(), waiting: Default::default(), flying: [0; 3] }
    }

    /// Queue `op`, which is for `task`. `urgent`: a guest waits for it.
    pub(super) fn push(&mut self, task: Task, op: Op, urgent: bool) {
        let token = Token(self.entries.insert(Entry { task, flies: None }) as u64);
        let kind = self.kind_of(&op, urgent);
        self.waiting[kind as usize].push_back((token, op));
    }

    fn kind_of(&self, op: &Op, urgent: bool) -> Kind {
        match urgent {
            true if file_of(op) == Some(self.target) => Kind::GuestsOnTarget,
            true => Kind::Guests,
            false => Kind::Sweep,
        }
    }

    /// What has completed under `token`.
    ///
    /// # Panics
    /// If nothing is in flight under it.
    pub(super) fn complete(&mut self, token: Token) -> Task {
        let index = usize::try_from(token.0).expect("our own token");
        let Entry { task, flies } = self.entries.remove(index);
        self.flying[flies.expect("it was on the ring") as usize] -= 1;
        task
    }

    /// Guests wait for what of the sweep is of `them`, from now on.
    pub(super) fn promote(&mut self, them: impl Fn(&Task) -> bool) {
        let sweep = std::mem::take(&mut self.waiting[Kind::Sweep as usize]);
        for (token, op) in sweep {
            let entry = usize::try_from(token.0).ok().and_then(|index| self.entries.get(index));
            let urgent = entry.is_some_and(|entry| them(&entry.task));
            let kind = self.kind_of(&op, urgent);
            self.waiting[kind as usize].push_back((token, op));
        }
    }

    /// How many places there are for one more of `kind`.
    fn room_for(&self, kind: Kind, places: &Places) -> usize {
        let [guests, on_target, sweep] = self.flying;
        let own = places.own.saturating_sub(self.flying[kind as usize]);
        let most = places.most;
        let but = |part: usize| (most - most.div_ceil(part)).max(1);
        let on_target = sweep + on_target;
        let left = most.saturating_sub(guests + on_target);
        let left_on_target = but(KEPT_FROM_TARGET).saturating_sub(on_target).min(left);
        let common = match kind {
            Kind::Guests => left,
            Kind::GuestsOnTarget => left_on_target,
            Kind::Sweep => but(KEPT_FROM_SWEEP).saturating_sub(sweep).min(left_on_target),
        };
        own.max(common.min(places.common.saturating_add(own))).min(places.free)
    }

    /// Whether there is a place for one more operation of the sweep than wait already.
    pub(super) fn has_place_for_sweep(&self, places: &Places) -> bool {
        self.waiting[Kind::Sweep as usize].len() < self.room_for(Kind::Sweep, places)
    }

    /// Hand over what finds a place.
    pub(super) fn take(&mut self, mut places: Places, out: &mut Vec<(Token, Op)>) {
        for kind in KINDS {
            while self.room_for(kind, &places) > 0 {
                let Some((token, op)) = self.waiting[kind as usize].pop_front() else { break };
                let index = usize::try_from(token.0).expect("our own token");
                self.entries[index].flies = Some(kind);
                let flying = &mut self.flying[kind as usize];
                places.common -= usize::from(*flying >= places.own);
                places.free -= 1;
                *flying += 1;
                out.push((token, op));
            }
        }
    }

    /// How many places it has besides its `own` of each kind.
    pub(super) fn beyond(&self, own: usize) -> usize {
        self.flying.iter().map(|flying| flying.saturating_sub(own)).sum()
    }

    /// Whether nothing is on the ring or on its way there.
    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// What is under way, whatever it is: the copier is going away.
    pub(super) fn drain(&mut self) -> impl Iterator<Item = Task> {
        self.entries.drain().map(|entry| entry.task)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::ByteRange;

    const TARGET: FileId = FileId(1);

    fn flush(file: u16) -> Op {
        Op::Discard { file: FileId(file), range: ByteRange::new(0, 1) }
    }

    /// With so many of each kind waiting.
    fn queue(guests: usize, on_target: usize, sweep: usize) -> Queue {
        let mut queue = Queue::new(TARGET);
        for (count, file, urgent) in [(guests, 0, true), (on_target, 1, true), (sweep, 1, false)] {
            (0..count).for_each(|_| queue.push(Task::Flush, flush(file), urgent));
        }
        queue
    }

    fn taken(queue: &mut Queue, places: Places) -> [usize; 3] {
        let before = queue.flying;
        let mut out = Vec::new();
        queue.take(places, &mut out);
        let taken: Vec<usize> = queue.flying.iter().zip(before).map(|(now, before)| now - before).collect();
        assert_eq!(out.len(), taken.iter().sum::<usize>());
        taken.try_into().unwrap()
    }

    #[test]
    fn what_a_target_keeps_leaves_places_to_guests() {
        let places = Places { free: 1000, common: 1000, own: 0, most: 128 };
        let mut stuck = queue(0, 0, 200);
        assert_eq!(taken(&mut stuck, places), [0, 0, 96]);
        assert!(!stuck.has_place_for_sweep(&places));
        for urgent in 0..200 {
            stuck.push(Task::Flush, flush(u16::from(urgent % 2 == 0)), true);
        }
        assert_eq!(taken(&mut stuck, places), [32, 0, 0], "those first who need nothing of the target");
        let mut stuck = queue(0, 200, 200);
        assert_eq!(taken(&mut stuck, places), [0, 112, 0]);
        stuck.push(Task::Flush, flush(0), true);
        assert_eq!(taken(&mut stuck, places), [1, 0, 0]);
    }

    #[test]
    fn what_is_ones_own_is_had_when_others_have_all_else() {
        let places = Places { free: 50, common: 0, own: 2, most: 128 };
        let mut queue = queue(9, 9, 9);
        assert_eq!(taken(&mut queue, places), [2, 2, 2]);
        assert_eq!(queue.beyond(2), 0);
        assert_eq!(taken(&mut queue, places), [0, 0, 0]);
        assert_eq!(taken(&mut queue, Places { common: 3, ..places }), [3, 0, 0]);
        assert_eq!(queue.beyond(2), 3);
    }

    #[test]
    fn few_places_are_used_as_well() {
        for most in 1..8 {
            let mut queue = queue(0, 0, 20);
            let places = Places { free: 20, common: 20, own: 0, most };
            let [_, _, sweep] = taken(&mut queue, places);
            assert!(sweep >= 1 && (sweep < most || most == 1), "{sweep} of {most}");
        }
        let mut queue = queue(3, 3, 3);
        assert_eq!(taken(&mut queue, Places::alone(4)), [3, 1, 0], "alone, in the order of kinds");
        assert_eq!(taken(&mut queue, Places::alone(9)), [0, 2, 3]);
    }

    #[test]
    fn what_completes_gives_its_place_back_as_what_it_was() {
        let places = Places { free: 9, common: 9, own: 0, most: 4 };
        let mut queue = queue(0, 0, 9);
        let mut out = Vec::new();
        queue.take(places, &mut out);
        queue.promote(|_| true);
        assert!(queue.waiting[Kind::Sweep as usize].is_empty());
        for (token, _) in out {
            assert!(matches!(queue.complete(token), Task::Flush));
        }
        assert_eq!(queue.flying, [0; 3]);
        assert_eq!(taken(&mut queue, places), [0, 3, 0]);
    }
}
