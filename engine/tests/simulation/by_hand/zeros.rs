//! How clusters are made zero on a target that is not known to be: ways that fail, places that cannot, runs and their sizes.

use super::*;

/// A copy of 24 clusters to a device full of old data.
fn to_a_device() -> Scenario {
    Scenario {
        length: 24 * CLUSTER,
        target_is_zero: false,
        target: DiskTraits { fixed_length: true, ..DiskTraits::default() },
        ..Scenario::plain(31)
    }
}

fn zeroes_by(method: ZeroMethod) -> impl Fn(&Op) -> bool {
    move |op| matches!(op, Op::WriteZeroes { method: by, .. } if *by == method)
}

fn is_zeroing(op: &Op) -> bool {
    matches!(op, Op::WriteZeroes { .. })
}

fn bytes(ranges: &[ByteRange]) -> u64 {
    ranges.iter().map(|range| range.length).sum()
}

/// Several operations are in flight when the first of them says that its method is not to be had: all of them together are one step.
#[test]
fn each_zero_method_is_given_up_once_however_many_operations_of_it_fail() {
    let scenario = to_a_device();
    let mut copy = ByHand::new(&scenario, true);
    assert_eq!(copy.count(zeroes_by(ZeroMethod::Unmap)), 4);
    copy.answer(zeroes_by(ZeroMethod::Unmap), Err(Errno::EOPNOTSUPP));
    assert_eq!((copy.count(zeroes_by(ZeroMethod::Keep)), copy.waiting.len()), (4, 4), "{:?}", copy.waiting);
    let (zeroed, written) = copy.finish();
    assert_eq!((bytes(&zeroed), written), (scenario.length, vec![]));
    assert_eq!(copy.copier.counters().holes, scenario.length);
}

/// Whether all is written as data once the operations in flight have failed so, one kind after the other.
fn ends_as_data(failures: &[(ZeroMethod, Errno)]) -> bool {
    let scenario = to_a_device();
    let mut copy = ByHand::new(&scenario, true);
    for &(method, errno) in failures {
        copy.answer(zeroes_by(method), Err(errno));
    }
    let (zeroed, written) = copy.finish();
    zeroed.is_empty() && bytes(&written) == scenario.length
}

#[test]
fn where_no_method_is_to_be_had_zeros_are_written_as_data() {
    let unsupported = Errno::EOPNOTSUPP;
    assert!(ends_as_data(&[(ZeroMethod::Unmap, unsupported), (ZeroMethod::Keep, unsupported)]));
    assert!(
        ends_as_data(&[(ZeroMethod::Unmap, Errno::EIO)]),
        "an error says nothing good of the next method"
    );
    assert!(!ends_as_data(&[(ZeroMethod::Unmap, unsupported)]));
}

/// As the first of these tests, for clusters that were read and found to be zero.
#[test]
fn clusters_of_zeros_give_a_method_up_once_and_are_written_themselves() {
    let scenario = to_a_device();
    let mut copy = ByHand::new(&scenario, false);
    copy.answer(|op| matches!(op, Op::Read { .. }), Ok(()));
    let failing = copy.count(zeroes_by(ZeroMethod::Unmap));
    assert!(failing > 1, "{:?}", copy.waiting);
    copy.answer(zeroes_by(ZeroMethod::Unmap), Err(Errno::EOPNOTSUPP));
    assert_eq!(copy.count(|op| matches!(op, Op::Write { .. })), failing);
    let (zeroed, written) = copy.finish();
    assert!(!zeroed.is_empty(), "the second method is used for the rest");
    assert_eq!(bytes(&zeroed) + bytes(&written), scenario.length);
}

/// What a failed flush may have lost of zeros that were on their way meanwhile is made zero again.
#[test]
fn zeros_in_flight_while_a_flush_fails_are_not_believed() {
    let scenario = Scenario {
        length: 60 * CLUSTER,
        map: true,
        target_policy: ErrorPolicy::Ignore,
        checkpoint_bytes: 6 * CLUSTER,
        ..to_a_device()
    };
    let mut copy = ByHand::new(&scenario, true);
    let first = |op: &Op| matches!(op, Op::WriteZeroes { range, .. } if range.offset == 0);
    copy.answer(first, Ok(()));
    assert_eq!(copy.copier.counters().holes, 6 * CLUSTER);
    let in_flight = copy.count(is_zeroing);
    assert!(in_flight >= 3, "{:?}", copy.waiting);
    copy.answer(|op| matches!(op, Op::Flush { .. }), Err(Errno::EIO));
    assert_eq!(copy.copier.counters().done, 0, "what the flush was to cover is withdrawn");
    // Its pause over, nothing new is started that could not be told from what is in flight.
    copy.now = copy.now.after(Duration::from_secs(1));
    copy.answer(|op| matches!(op, Op::WriteZeroes { range, .. } if range.offset == 6 * CLUSTER), Ok(()));
    assert_eq!(copy.count(is_zeroing), in_flight - 1);
    copy.answer(is_zeroing, Ok(()));
    assert_eq!(copy.copier.counters().done, 0, "what was in flight is not believed");
    let (zeroed, written) = copy.finish();
    assert_eq!((bytes(&zeroed), written), (scenario.length, vec![]), "everything is made zero again");
}

/// The largest run of zeros, in bytes, of a live copy of a large hole to a target that takes so long over each, when guests have nothing to ask for.
fn largest_zero_run(each: Duration) -> u64 {
    let scenario = Scenario { cluster: 65_536, slots: 4, ..Scenario::plain(37) };
    let geometry = Geometry::new(Length(4 << 30), ClusterSize::new(65_536).unwrap());
    let live = LivePlan {
        on_cbw_error: CbwErrorPolicy::BreakSnapshot,
        cbw_timeout: None,
        reserved_slots: 1,
        space_reserved: false,
        may_unmap: true,
    };
    let plan = scenario.plan(blank());
    let limits = Limits { zero_run_bytes: 32 << 20, ..plan.limits };
    let plan = Plan { geometry, live: Some(live), target_is_zero: false, limits, ..plan };
    let mut copier = Copier::new(plan, Arc::new(IntervalSet::new(geometry.clusters()).unwrap()));
    let arena = Arena::new(4 << 16).unwrap();
    let (mut now, mut ops, mut largest) = (Timestamp::default(), Vec::new(), 0);
    for _ in 0..200 {
        while copier.poll(now, Places::alone(usize::MAX), &mut ops) {}
        now = now.after(each);
        for (token, op) in ops.drain(..) {
            let output = match op {
                Op::Extents { range, .. } => Output::Extents(vec![Extent { range, present: false }]),
                Op::WriteZeroes { range, .. } => {
                    largest = largest.max(range.length);
                    Output::Done
                }
                _ => Output::Done,
            };
            copier.on_completion(Completion { token, result: Ok(output) }, &arena, now);
        }
    }
    largest
}

#[test]
fn runs_of_zeros_are_as_large_as_the_target_is_quick_with_them() {
    assert_eq!(largest_zero_run(Duration::from_micros(100)), 32 << 20);
    assert_eq!(largest_zero_run(Duration::from_millis(4)), 512 << 10, "it is not quick with the first");
    assert_eq!(largest_zero_run(Duration::from_millis(50)), 512 << 10);
}

/// How a live copy makes zeros on its target: of a hole, or of data that is zero.
fn ways_of_zeros(may_unmap: bool, is_new: bool, hole: bool) -> Vec<ZeroMethod> {
    let scenario = Scenario { length: 32 * CLUSTER, ..Scenario::plain(39) };
    let live = LivePlan {
        on_cbw_error: CbwErrorPolicy::BreakSnapshot,
        cbw_timeout: None,
        reserved_slots: 1,
        space_reserved: is_new,
        may_unmap,
    };
    let plan = Plan {
        live: Some(live),
        target_is_zero: is_new,
        allocate_ahead: false,
        zero_detect: true,
        ..scenario.plan(blank())
    };
    let mut copier = Copier::new(plan, Arc::new(IntervalSet::new(scenario.geometry().clusters()).unwrap()));
    let (arena, now) = (Arena::new(1 << 20).unwrap(), Timestamp::default());
    let (mut ops, mut ways) = (Vec::new(), Vec::new());
    while !copier.is_finished() {
        while copier.poll(now, Places::alone(usize::MAX), &mut ops) {}
        for (token, op) in ops.drain(..) {
            let output = match op {
                Op::Extents { range, .. } => Output::Extents(vec![Extent { range, present: !hole }]),
                Op::Read { buffer, .. } => Output::Bytes(buffer.length),
                Op::Write { .. } => panic!("zeros as data"),
                Op::WriteZeroes { method, .. } => {
                    ways.push(method);
                    Output::Done
                }
                _ => Output::Done,
            };
            copier.on_completion(Completion { token, result: Ok(output) }, &arena, now);
        }
    }
    ways.dedup();
    ways
}

#[test]
fn space_of_a_target_that_may_not_be_given_back_is_kept() {
    for hole in [true, false] {
        assert_eq!(ways_of_zeros(true, false, hole), [ZeroMethod::Unmap]);
        assert_eq!(ways_of_zeros(false, false, hole), [ZeroMethod::Keep]);
        // What was reserved, and nothing was written to.
        assert_eq!(ways_of_zeros(true, true, hole), [ZeroMethod::Unmap]);
        assert_eq!(ways_of_zeros(false, true, hole), []);
    }
}

/// One that fails for want of memory says nothing of the next, and one place that cannot be made zero nothing of the others.
#[test]
fn a_zero_operation_that_fails_once_is_tried_again() {
    for (failures, as_data) in [(1, false), (2, true)] {
        let mut copy = ByHand::new(&to_a_device(), true);
        let first = |op: &Op| matches!(op, Op::WriteZeroes { range, .. } if range.offset == 0);
        for _ in 0..failures {
            copy.answer(first, Err(Errno::ENOMEM));
        }
        let (_, written) = copy.finish();
        assert_eq!(!written.is_empty(), as_data, "{failures} failures");
    }
}

/// However many others succeed between its failures.
#[test]
fn a_place_that_cannot_be_made_zero_is_written_and_the_others_are_made_zero() {
    let scenario = to_a_device();
    let geometry = scenario.geometry();
    let limits = Limits { zero_run_bytes: 2 * CLUSTER, ..scenario.plan(blank()).limits };
    let set = Arc::new(IntervalSet::new(geometry.clusters()).unwrap());
    let target_before = scenario.target_before(&scenario.world());
    let copier = Copier::new(Plan { limits, target_before, ..scenario.plan(blank()) }, set);
    let mut copy = ByHand::of(copier, &scenario, true);
    let bad = ByteRange::new(4 * CLUSTER, 2 * CLUSTER);
    let is_bad = |op: &Op| matches!(op, Op::WriteZeroes { range, .. } if range.intersection(bad).is_some());
    let (mut attempts, mut zeroed, mut written) = (0, 0, 0);
    for _ in 0..200 {
        if copy.copier.is_finished() {
            break;
        }
        // The others first, one at a time, so that there is always one that has just succeeded.
        if let Some((token, op)) = copy.waiting.iter().find(|(_, op)| !is_bad(op)) {
            match op {
                Op::WriteZeroes { range, .. } => zeroed += range.length,
                Op::Write { offset, buffer, .. } => {
                    let range = ByteRange::new(*offset, u64::from(buffer.length));
                    assert!(range.intersection(bad).is_some(), "{range} is made zero");
                    written += range.length;
                }
                _ => {}
            }
            copy.answer_token(*token);
        }
        if copy.count(is_bad) > 0 {
            attempts += copy.count(is_bad);
            copy.answer(is_bad, Err(Errno::EIO));
        }
    }
    assert!(copy.copier.is_finished(), "{attempts} attempts, {:?}", copy.waiting);
    assert_eq!((attempts, zeroed, written), (2, 22 * CLUSTER, 2 * CLUSTER));
}
