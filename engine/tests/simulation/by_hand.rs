//! Orders of events that simulated runs seldom or never meet: the copier with every operation answered by hand, the driver with every
//! turn made by hand.

use std::sync::Arc;
use std::time::Duration;

use engine::copier::guests::CbwId;
use engine::copier::plan::{Checkpoint, Limits, LivePlan, Plan};
use engine::copier::snapshot::SnapshotId;
use engine::copier::{Copier, Ending, Event, Places};
use engine::copy::ErrorPolicy;
use engine::interval_set::IntervalSet;
use engine::job::{Status, TargetHolds};
use engine::live::CbwErrorPolicy;
use engine::ring::sim::{DiskTraits, FaultPlan};
use engine::ring::{Arena, BufferRange, Completion, Extent, Op, Output, Token, ZeroMethod};
use engine::units::{ByteRange, ClusterRange, ClusterSize, Geometry, Length, Timestamp};
use nix::errno::Errno;

use crate::run::driver_of;
use crate::scenario::{Scenario, decode};

mod lost;
mod unanswered;
mod zeros;

const CLUSTER: u64 = 8192;

/// Nothing done yet, on a blank target.
fn blank() -> Checkpoint {
    Checkpoint { done: Vec::new(), skipped: Vec::new(), blank_is_zero: true }
}

/// A copier whose operations wait for their answers.
struct ByHand {
    copier: Copier,
    arena: Arena,
    now: Timestamp,
    waiting: Vec<(Token, Op)>,
    /// Whether the source is a hole as a whole; else it is data as a whole, all of it zero.
    hole: bool,
    events: Vec<Event>,
}

impl ByHand {
    fn new(scenario: &Scenario, hole: bool) -> Self {
        let set = Arc::new(IntervalSet::new(scenario.geometry().clusters()).unwrap());
        let target_before = scenario.target_before(&scenario.world());
        let copier = Copier::new(Plan { target_before, ..scenario.plan(blank()) }, set);
        Self::of(copier, scenario, hole)
    }

    /// `copier` has a plan of `scenario`'s slots and clusters.
    fn of(copier: Copier, scenario: &Scenario, hole: bool) -> Self {
        let arena =
            Arena::new(usize::try_from(u64::from(scenario.slots) * scenario.cluster).unwrap()).unwrap();
        let mut new =
            Self { copier, arena, now: Timestamp::default(), waiting: Vec::new(), hole, events: Vec::new() };
        new.poll();
        new
    }

    /// Let it start whatever it can. What it wants to know about the source is answered at once.
    fn poll(&mut self) {
        loop {
            while self.copier.poll(self.now, Places::alone(usize::MAX), &mut self.waiting) {}
            self.events.extend(self.copier.take_events());
            let asks = |op: &Op| matches!(op, Op::Extents { .. });
            if self.count(asks) == 0 {
                return;
            }
            self.complete(asks, Ok(()));
        }
    }

    /// The operations that wait and that `pick` picks.
    fn count(&self, pick: impl Fn(&Op) -> bool) -> usize {
        self.waiting.iter().filter(|(_, op)| pick(op)).count()
    }

    /// Answer one with success.
    fn answer_token(&mut self, token: Token) {
        let at = self.waiting.iter().position(|(waits, _)| *waits == token).expect("it waits");
        let (token, op) = self.waiting.swap_remove(at);
        let result = Ok(self.success(&op));
        self.copier.on_completion(Completion { token, result }, &self.arena, self.now);
        self.poll();
    }

    fn complete(&mut self, pick: impl Fn(&Op) -> bool, result: Result<(), Errno>) {
        let picked: Vec<_> = self.waiting.extract_if(.., |(_, op)| pick(op)).collect();
        assert!(!picked.is_empty(), "nothing is picked of {:?}", self.waiting);
        for (token, op) in picked {
            let result = result.map(|()| self.success(&op));
            self.copier.on_completion(Completion { token, result }, &self.arena, self.now);
        }
    }

    /// Answer the operations that wait and that `pick` picks, all of them before the copier acts again.
    fn answer(&mut self, pick: impl Fn(&Op) -> bool, result: Result<(), Errno>) {
        self.complete(pick, result);
        self.poll();
    }

    fn success(&mut self, op: &Op) -> Output {
        match op {
            Op::Read { buffer, .. } => {
                self.arena.slice_mut(*buffer).fill(0);
                Output::Bytes(buffer.length)
            }
            Op::Write { buffer: BufferRange { length, .. }, .. } => Output::Bytes(*length),
            Op::Extents { range, .. } => Output::Extents(vec![Extent { range: *range, present: !self.hole }]),
            _ => Output::Done,
        }
    }

    /// Answer everything with success until it has ended; gives what was made zero meanwhile, by operations and as data.
    fn finish(&mut self) -> (Vec<ByteRange>, Vec<ByteRange>) {
        let (mut zeroed, mut written) = (Vec::new(), Vec::new());
        while !self.copier.is_finished() {
            for (_, op) in &self.waiting {
                match op {
                    Op::WriteZeroes { range, .. } => zeroed.push(*range),
                    Op::Write { offset, buffer, .. } => {
                        written.push(ByteRange::new(*offset, u64::from(buffer.length)));
                    }
                    _ => {}
                }
            }
            self.answer(|_| true, Ok(()));
        }
        let complete = |event: &Event| matches!(event, Event::Finished(Ending::Complete));
        assert!(self.events.iter().any(complete), "{:?}", self.events);
        (zeroed, written)
    }
}

/// The ring thread looks at what is asked for now and then. It has not seen the job go on, and yet that was so.
#[test]
fn a_pause_takes_hold_although_the_resume_before_it_went_unseen() {
    let scenario = Scenario::plain(33);
    let world = scenario.world();
    let plan = scenario.plan(blank());
    let (mut driver, job) = driver_of(&scenario, plan, &world, FaultPlan::default());
    for _ in 0..5 {
        assert!(!driver.turn().unwrap());
    }
    let mut until_paused = || (0..100).any(|_| !driver.turn().unwrap() && job.status() == Status::Paused);
    job.pause().unwrap();
    assert!(until_paused(), "{:?}", job.progress());
    for _ in 0..3 {
        job.resume().unwrap();
        job.pause().unwrap();
        assert_eq!(job.status(), Status::Running, "it is not known yet that nothing is in flight");
        assert!(until_paused(), "{:?}", job.progress());
    }
    job.resume().unwrap();
    driver.run().unwrap();
    assert!(matches!(job.wait().outcome, engine::job::Outcome::Complete));
}

/// What was written and taken back after a failed flush, and cannot be read any more then, is on the target or is not: nobody knows.
#[test]
fn of_what_was_written_and_taken_back_nobody_knows_what_the_target_holds() {
    let scenario = Scenario {
        length: 12 * CLUSTER,
        map: true,
        zero_detect: false,
        source_policy: ErrorPolicy::Ignore,
        target_policy: ErrorPolicy::Ignore,
        checkpoint_bytes: 6 * CLUSTER,
        ..Scenario::plain(31)
    };
    for (written, holds) in [(true, TargetHolds::Unknown), (false, TargetHolds::Zeros)] {
        let mut copy = ByHand::new(&scenario, false);
        let is_flush = |op: &Op| matches!(op, Op::Flush { .. });
        let is_read = |op: &Op| matches!(op, Op::Read { .. });
        while written && copy.count(is_flush) == 0 {
            copy.answer(|_| true, Ok(()));
        }
        if written {
            copy.answer(is_flush, Err(Errno::EIO));
        }
        while !copy.copier.is_finished() {
            copy.now = copy.now.after(Duration::from_secs(1));
            copy.poll();
            for (pick, result) in [(true, Err(Errno::EIO)), (false, Ok(()))] {
                if copy.count(|op| is_read(op) == pick) > 0 {
                    copy.answer(|op| is_read(op) == pick, result);
                }
            }
        }
        let skipped = copy.copier.skipped_ranges();
        assert!(!skipped.is_empty() && skipped.iter().all(|skipped| skipped.target == holds), "{skipped:?}");
    }
}

/// 16 million clusters that need no copy: little of them in each iteration of the ring thread, and at the end they are not all looked at at once.
#[test]
fn a_large_disk_with_nothing_in_it_does_not_hold_up_the_ring_thread() {
    let scenario = Scenario { cluster: 4096, ..Scenario::plain(35) };
    let clusters = 1 << 24;
    let geometry = Geometry::new(Length(clusters * 4096), ClusterSize::new(4096).unwrap());
    let set = Arc::new(IntervalSet::new(geometry.clusters()).unwrap());
    let mut copier = Copier::new(Plan { geometry, ..scenario.plan(blank()) }, set);
    let arena = Arena::new(4096).unwrap();
    let now = Timestamp::default();
    let (mut ops, mut done, mut after) = (Vec::new(), 0, 0);
    while !copier.is_finished() {
        let more = copier.poll(now, Places::alone(usize::MAX), &mut ops);
        let total = copier.counters().done;
        assert!(total - done <= 400_000 * 4096, "{} clusters at once", (total - done) / 4096);
        after += u32::from(done == clusters * 4096 && more);
        done = total;
        for (token, op) in ops.drain(..) {
            let output = match op {
                Op::Extents { range, .. } => Output::Extents(vec![Extent { range, present: false }]),
                _ => Output::Done,
            };
            copier.on_completion(Completion { token, result: Ok(output) }, &arena, now);
        }
    }
    assert_eq!(done, clusters * 4096);
    assert!(after >= 1, "all looked at at once");
}

/// A reader of the snapshot holds a cluster, his read is short, and what is left of the ring is for what guests wait for.
#[test]
fn the_rest_of_a_short_read_is_as_urgent_as_a_guest_has_made_it() {
    let scenario = Scenario { length: 32 * CLUSTER, ..Scenario::plain(36) };
    for guest_waits in [false, true] {
        let live = LivePlan {
            on_cbw_error: CbwErrorPolicy::BreakSnapshot,
            cbw_timeout: None,
            reserved_slots: 1,
            space_reserved: false,
            may_unmap: true,
        };
        let set = Arc::new(IntervalSet::new(scenario.geometry().clusters()).unwrap());
        let mut copier = Copier::new(Plan { live: Some(live), ..scenario.plan(blank()) }, set);
        let (arena, now, mut ops) = (Arena::new(1 << 20).unwrap(), Timestamp::default(), Vec::new());
        copier.read_snapshot(SnapshotId(0), ByteRange::new(30 * CLUSTER, CLUSTER));
        while copier.poll(now, Places::alone(usize::MAX), &mut ops) {}
        let is_read = |op: &Op, at: u64| matches!(op, Op::Read { offset, .. } if *offset == at);
        let reads: Vec<_> = ops.extract_if(.., |(_, op)| is_read(op, 30 * CLUSTER)).collect();
        assert!(reads.len() == 1 && !ops.is_empty(), "a read, and others that hang");
        // One place of each kind, which the others have of theirs.
        let places = Places { free: 1, common: 0, own: 1, most: usize::MAX };
        if guest_waits {
            copier.copy_before_write(CbwId(0), ClusterRange::new(30, 31), now);
            while copier.poll(now, places, &mut ops) {}
        }
        copier.on_completion(Completion { token: reads[0].0, result: Ok(Output::Bytes(512)) }, &arena, now);
        ops.clear();
        while copier.poll(now, places, &mut ops) {}
        let rest = ops.iter().any(|(_, op)| is_read(op, 30 * CLUSTER + 512));
        assert_eq!(rest, guest_waits, "{ops:?}");
    }
}

/// The ring thread stands still for longer than a guest may wait, while the last operation of his copy is on the ring.
#[test]
fn a_copy_that_is_complete_is_not_late_however_late_that_is_seen() {
    let scenario = Scenario { length: 32 * CLUSTER, ..Scenario::plain(36) };
    // What comes first when it goes on: what has completed, the next turn, or nothing ever.
    for first in ["completion", "turn", "nothing"] {
        let live = LivePlan {
            on_cbw_error: CbwErrorPolicy::BreakSnapshot,
            cbw_timeout: Some(Duration::from_secs(1)),
            reserved_slots: 1,
            space_reserved: false,
            may_unmap: true,
        };
        let set = Arc::new(IntervalSet::new(scenario.geometry().clusters()).unwrap());
        let mut copier = Copier::new(Plan { live: Some(live), ..scenario.plan(blank()) }, set);
        let (mut arena, mut now, mut ops) = (Arena::new(1 << 20).unwrap(), Timestamp::default(), Vec::new());
        copier.copy_before_write(CbwId(0), ClusterRange::new(30, 31), now);
        let write = loop {
            while copier.poll(now, Places::alone(usize::MAX), &mut ops) {}
            let of_guest = |op: &Op| matches!(op, Op::Read { offset, .. } | Op::Write { offset, .. } if *offset == 30 * CLUSTER);
            let (token, op) = ops.extract_if(.., |(_, op)| of_guest(op)).next().expect("he is served");
            let Op::Read { buffer, .. } = op else { break token };
            arena.slice_mut(buffer).fill(1);
            copier.on_completion(Completion { token, result: Ok(Output::Bytes(8192)) }, &arena, now);
        };
        now = now.after(Duration::from_secs(60));
        let written = Completion { token: write, result: Ok(Output::Bytes(8192)) };
        if first == "completion" {
            copier.on_completion(written, &arena, now);
        } else {
            copier.poll(now, Places::alone(usize::MAX), &mut ops);
            assert!(copier.take_cbw_outcomes().is_empty() && !copier.is_ending(), "nobody has looked yet");
            assert_eq!(copier.next_deadline(now), Some(Timestamp(Duration::from_secs(1))));
            if first == "turn" {
                copier.on_completion(written, &arena, now);
            }
        }
        copier.poll(now, Places::alone(usize::MAX), &mut ops);
        let outcomes = copier.take_cbw_outcomes();
        assert!(matches!(outcomes[..], [(CbwId(0), Ok(()))]), "{outcomes:?}");
        assert_eq!(copier.is_ending(), first == "nothing", "{first}");
    }
}

/// He has asked elsewhere for longer than he may wait here, and the sweep has copied everything meanwhile.
#[test]
fn one_who_asks_late_for_what_is_done_is_not_refused() {
    let scenario = Scenario { length: 32 * CLUSTER, ..Scenario::plain(36) };
    let live = LivePlan {
        on_cbw_error: CbwErrorPolicy::BreakGuestWrite,
        cbw_timeout: Some(Duration::from_secs(1)),
        reserved_slots: 1,
        space_reserved: false,
        may_unmap: true,
    };
    let set = Arc::new(IntervalSet::new(scenario.geometry().clusters()).unwrap());
    let mut copier = Copier::new(Plan { live: Some(live), ..scenario.plan(blank()) }, Arc::clone(&set));
    let now = Timestamp(Duration::from_secs(60));
    copier.poll(now, Places::alone(0), &mut Vec::new());
    set.mark_done(ClusterRange::new(30, 31));
    copier.copy_before_write(CbwId(0), ClusterRange::new(30, 31), Timestamp::default());
    copier.poll(now, Places::alone(0), &mut Vec::new());
    let outcomes = copier.take_cbw_outcomes();
    assert!(matches!(outcomes[..], [(CbwId(0), Ok(()))]), "{outcomes:?}");
}

/// A cancel that was accepted while the last checkpoint was on its way: the map stays, and the next run has nothing left to copy.
#[test]
fn whoever_carries_a_copy_has_a_say_before_it_is_complete() {
    for cancelled in [false, true] {
        let scenario = Scenario { length: 4 * CLUSTER, map: true, ..Scenario::plain(38) };
        let set = Arc::new(IntervalSet::new(scenario.geometry().clusters()).unwrap());
        let mut copier = Copier::new(scenario.plan(blank()), set);
        copier.ask_before_complete();
        let (arena, now) = (Arena::new(1 << 20).unwrap(), Timestamp::default());
        let (mut ops, mut maps, mut asked) = (Vec::new(), Vec::new(), 0);
        while !copier.is_finished() {
            let more = copier.poll(now, Places::alone(usize::MAX), &mut ops);
            if copier.asks_to_complete() {
                assert!(
                    more && ops.is_empty() && !copier.is_complete(),
                    "it does nothing before the word is given"
                );
                asked += 1;
                match (asked, cancelled) {
                    (1, _) => {}
                    (_, false) => copier.complete(),
                    (_, true) => assert!(copier.cancel()),
                }
            }
            for (token, op) in ops.drain(..) {
                let output = match op {
                    Op::Read { buffer, .. } | Op::Write { buffer, .. } => Output::Bytes(buffer.length),
                    Op::Extents { range, .. } => Output::Extents(vec![Extent { range, present: true }]),
                    Op::Publish { contents, .. } => {
                        maps.push(contents.map(|contents| decode(&contents).done));
                        Output::Done
                    }
                    _ => Output::Done,
                };
                copier.on_completion(Completion { token, result: Ok(output) }, &arena, now);
            }
        }
        assert_eq!(asked, 2, "once more each time it is polled");
        let ended = copier.take_events().into_iter().any(|event| match event {
            Event::Finished(Ending::Complete) => !cancelled,
            Event::Finished(Ending::Cancelled) => cancelled,
            _ => false,
        });
        assert!(ended && copier.is_resumable() == cancelled);
        assert_eq!(maps, [cancelled.then(|| vec![ClusterRange::new(0, 4)])], "{cancelled}");
    }
}

/// What was copied before a pause is on the map before the job says that it has paused.
#[test]
fn a_pause_begins_with_a_checkpoint() {
    let scenario = Scenario {
        length: 8 * CLUSTER,
        map: true,
        max_run: 1,
        target_policy: ErrorPolicy::Stop,
        checkpoint_bytes: 1 << 30,
        checkpoint_interval: Duration::from_secs(3600),
        zero_detect: false,
        ..Scenario::plain(39)
    };
    let mut copy = ByHand::new(&scenario, false);
    copy.answer(|op| matches!(op, Op::Read { .. }), Ok(()));
    let is_last = |op: &Op| matches!(op, Op::Write { offset, .. } if *offset == 7 * CLUSTER);
    copy.answer(is_last, Err(Errno::ENOSPC));
    copy.answer(|op| matches!(op, Op::Write { .. } | Op::Allocate { .. }), Ok(()));
    let drained = |event: &Event| matches!(event, Event::Drained);
    assert!(copy.events.iter().any(|event| matches!(event, Event::Stopped { .. })), "{:?}", copy.events);
    assert!(!copy.events.iter().any(drained), "it is not written down yet");
    copy.answer(|op| matches!(op, Op::Flush { .. }), Ok(()));
    let map = copy.waiting.iter().find_map(|(_, op)| match op {
        Op::Publish { contents: Some(contents), .. } => Some(decode(contents).done),
        _ => None,
    });
    assert_eq!(map, Some(vec![ClusterRange::new(0, 7)]));
    copy.answer(|_| true, Ok(()));
    assert!(copy.events.iter().any(drained) && copy.waiting.is_empty(), "{:?}", copy.events);
}

/// A flush of nothing, after one that failed, says nothing of whether the target takes anything.
#[test]
fn a_target_whose_flushes_fail_is_given_up_however_long_they_take() {
    let scenario = Scenario {
        length: 24 * CLUSTER,
        map: true,
        target_policy: ErrorPolicy::Ignore,
        checkpoint_bytes: 4 * CLUSTER,
        checkpoint_interval: Duration::from_secs(5),
        zero_detect: false,
        ..Scenario::plain(41)
    };
    let mut copy = ByHand::new(&scenario, false);
    let is_flush = |op: &Op| matches!(op, Op::Flush { .. });
    let (mut is_dirty, mut failed) = (false, 0);
    while !copy.copier.is_finished() {
        assert!(failed < 100, "it goes round");
        is_dirty |= copy.count(|op| matches!(op, Op::Write { .. })) > 0;
        if copy.count(|op| !is_flush(op)) > 0 {
            copy.answer(|op| !is_flush(op), Ok(()));
        } else if copy.count(is_flush) > 0 {
            // It takes so long that another checkpoint is due at its end, and the kernel tells once of what was lost.
            copy.now = copy.now.after(Duration::from_secs(6));
            failed += u32::from(is_dirty);
            let result = if std::mem::take(&mut is_dirty) { Err(Errno::EIO) } else { Ok(()) };
            copy.answer(is_flush, result);
        } else {
            copy.now = copy.now.after(Duration::from_secs(1));
            copy.poll();
        }
    }
    let failure = |event: &Event| matches!(event, Event::Finished(Ending::Failed(_)));
    assert!(copy.events.iter().any(failure), "{:?}", copy.events);
    assert_eq!(failed, 1 + scenario.plan(blank()).limits.retries);
}
