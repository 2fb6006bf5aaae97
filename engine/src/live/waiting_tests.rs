//! Those who wait for a copy, for a barrier or for their turn, turn by turn, over the simulated ring: whom they may keep waiting, and whom not.

use std::time::Duration;

use super::GroupFailure;
use super::admission::Attempt;
use super::carrier::{IoOutcome, IoRequest};
use super::disk::read;
use super::sim::{Pending, SimDisk, SimJob};
use super::turns_tests::{Bench, CLUSTER, LENGTH, PATIENCE};
use crate::modes::ErrorPolicy;
use crate::ring::sim::{Disk, DiskTraits};
use crate::units::{ByteRange, Length};

/// More than the carrier of the disk takes at a time.
const CROWD: u64 = 20;

impl Bench {
    fn write_everywhere(&mut self) -> Vec<Pending<IoOutcome>> {
        let write = |cluster| IoRequest::Write { offset: cluster * CLUSTER, data: vec![1; 100] };
        let waiting = (0..CROWD).map(|cluster| self.engine.io(&self.disk, write(cluster))).collect();
        self.turn_for(Duration::from_millis(50));
        waiting
    }

    /// Others read, and have their data stored.
    fn others_are_served(&mut self) {
        for request in [read(100, 9000), IoRequest::Flush, read(0, 10)] {
            let asked = self.engine.io(&self.disk, request);
            self.turn_for(Duration::from_millis(50));
            assert!(asked.take().expect("it waits for others").result.is_ok());
        }
    }

    fn second_disk(&mut self) -> (SimDisk, usize) {
        let length = usize::try_from(LENGTH).unwrap();
        let file = 2;
        self.world.borrow_mut().add_disk(Disk::new(vec![8; length], DiskTraits::default()));
        for _ in 0..2 {
            self.world.borrow_mut().add_disk(Disk::sparse(length, DiskTraits::default()));
        }
        let (disk, added) = self.engine.add_disk(file, Length(LENGTH), Some(512));
        assert!(self.turn_until(|_| added.take()).is_ok());
        (disk, file + 1)
    }
}

#[test]
fn writes_that_wait_for_a_copy_are_in_nobodys_way() {
    let mut bench = Bench::new();
    bench.world.borrow_mut().disk(1).set_stuck();
    let (_handle, started) = bench.ask_for(bench.job(ErrorPolicy::Report, None), PATIENCE);
    assert!(bench.turn_until(|_| started.take()).is_ok());
    let waiting = bench.write_everywhere();
    assert!(waiting.iter().all(|write| write.take().is_none()), "the target does not answer");
    bench.others_are_served();
    bench.world.borrow_mut().disk(1).set_free();
    for write in waiting {
        assert!(bench.turn_until(|_| write.take()).result.is_ok());
    }
}

#[test]
fn writes_that_wait_at_the_barrier_are_in_nobodys_way() {
    let mut bench = Bench::new();
    let attempt = bench.engine.attempt(&bench.disk, ByteRange::new(0, 1));
    let Attempt::Granted(held) = attempt else { panic!("nothing is in the way") };
    let (_handle, started) = bench.ask_for(bench.job(ErrorPolicy::Report, None), PATIENCE);
    bench.turn();
    let waiting = bench.write_everywhere();
    assert!(waiting.iter().all(|write| write.take().is_none()) && started.take().is_none());
    bench.others_are_served();
    drop(held);
    assert!(bench.turn_until(|_| started.take()).is_ok());
    for write in waiting {
        assert!(bench.turn_until(|_| write.take()).result.is_ok());
    }
}

#[test]
fn callers_are_told_when_they_have_too_many_waiting() {
    let mut bench = Bench::new();
    bench.world.borrow_mut().disk(0).set_hung();
    let requests: Vec<_> = (0..=16_384).map(|_| bench.engine.io(&bench.disk, IoRequest::Flush)).collect();
    let refused = bench.turn_until(|_| requests[16_384].take()).result.unwrap_err();
    assert!(refused.to_string().contains("16384 requests are waiting already"), "{refused}");
    bench.world.borrow_mut().disk(0).set_free();
    for request in &requests[..16_384] {
        assert!(bench.turn_until(|_| request.take()).result.is_ok());
    }
    let asked = bench.engine.io(&bench.disk, IoRequest::Flush);
    assert!(bench.turn_until(|_| asked.take()).result.is_ok(), "there is room again");
}

/// While one of its disks rests, the other one has a start of its own that came later.
#[test]
fn a_group_is_not_overtaken_by_a_start_of_one_of_its_disks() {
    let mut bench = Bench::new();
    let (other, target) = bench.second_disk();
    let attempt = bench.engine.attempt(&bench.disk, ByteRange::new(0, 1));
    let Attempt::Granted(forgotten) = attempt else { panic!("nothing is in the way") };
    let timeout = Duration::from_millis(100);
    let late = bench.ask_for(bench.job(ErrorPolicy::Report, None), timeout);
    let beside = |bench: &Bench, target| SimJob {
        disk: other.clone(),
        target,
        ..bench.job(ErrorPolicy::Report, None)
    };
    let group = vec![bench.job(ErrorPolicy::Report, None), beside(&bench, target)];
    let (_handles, group) = bench.engine.start(group, GroupFailure::GoOn, PATIENCE);
    let single = bench.ask_for(beside(&bench, target + 1), PATIENCE);
    assert!(bench.turn_until(|_| late.1.take()).is_err(), "a permit was forgotten");
    drop(forgotten);
    let mut answers = Vec::new();
    while answers.len() < 2 {
        bench.turn();
        for (who, asked) in [("group", &group), ("single", &single.1)] {
            answers.extend(asked.take().map(|answer| {
                assert!(answer.is_ok(), "{who}: {answer:?}");
                who
            }));
        }
    }
    assert_eq!(answers, ["group", "single"]);
}
