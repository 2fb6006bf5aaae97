//! Questions about the source that are not answered, and what a target that takes nothing, or has become shorter, is told with.

use engine::copy::SyncMode;
use engine::ring::ExtentQuery;

use super::*;

/// What became of a copy whose questions were answered as a test wants.
#[derive(Default)]
struct Seen {
    /// Questions: what about, from where on, and how much had been read by then.
    asked: Vec<(ExtentQuery, u64, u64)>,
    read: u64,
    notices: Vec<String>,
    uncovered: u64,
    complete: bool,
}

/// A copy of 64 clusters with nothing in them, of which 16 count as something where there is no answer. `fails` says of which question, and how often
/// such a one was asked before, the answer is an error.
fn copied(sync: SyncMode, live: bool, fails: impl Fn(ExtentQuery, usize) -> Option<Errno>) -> Seen {
    let scenario =
        Scenario { length: 64 * CLUSTER, sync, zero_detect: false, speed: None, ..Scenario::plain(43) };
    let plan = scenario.plan(blank());
    let limits = Limits { unanswered_bytes: 16 * CLUSTER, ..plan.limits };
    let live = live.then_some(LivePlan {
        on_cbw_error: CbwErrorPolicy::BreakSnapshot,
        cbw_timeout: None,
        reserved_slots: 1,
        space_reserved: false,
        may_unmap: true,
    });
    let allocate_ahead = plan.allocate_ahead && live.is_none();
    let plan = Plan { limits, live, allocate_ahead, ..plan };
    let set = Arc::new(IntervalSet::new(scenario.geometry().clusters()).unwrap());
    let mut copier = Copier::new(plan, set);
    let (arena, now, mut seen) = (Arena::new(1 << 20).unwrap(), Timestamp::default(), Seen::default());
    let mut ops = Vec::new();
    while !copier.is_finished() {
        while copier.poll(now, Places::alone(usize::MAX), &mut ops) {}
        let read = |op: &Op| if let Op::Read { buffer, .. } = op { u64::from(buffer.length) } else { 0 };
        seen.read += ops.iter().map(|(_, op)| read(op)).sum::<u64>();
        for (token, op) in ops.drain(..) {
            let result = match op {
                Op::Extents { range, query, .. } => {
                    let before = seen.asked.iter().filter(|(about, ..)| *about == query).count();
                    seen.asked.push((query, range.offset, seen.read));
                    let nothing = Output::Extents(vec![Extent { range, present: false }]);
                    let all = Output::Extents(vec![Extent { range, present: true }]);
                    // Holes are not what a test of layers is about.
                    let answer =
                        if query == ExtentQuery::Data && sync == SyncMode::Top { all } else { nothing };
                    fails(query, before).map_or(Ok(answer), Err)
                }
                Op::Read { buffer, .. } | Op::Write { buffer, .. } => Ok(Output::Bytes(buffer.length)),
                _ => Ok(Output::Done),
            };
            copier.on_completion(Completion { token, result }, &arena, now);
        }
        for event in copier.take_events() {
            match event {
                Event::Notice(notice) => seen.notices.push(notice),
                Event::Finished(ending) => seen.complete = matches!(ending, Ending::Complete),
                _ => {}
            }
        }
    }
    seen.uncovered = copier.counters().uncovered;
    seen
}

/// A server or a file system that fails once, as for want of memory, does not make all of a disk of holes data.
#[test]
fn holes_that_are_not_told_once_are_asked_for_again() {
    for live in [false, true] {
        let once = |_, before: usize| (before == 0).then_some(Errno::ENOMEM);
        let seen = copied(SyncMode::Full, live, once);
        assert!(seen.complete);
        assert_eq!(seen.read, 16 * CLUSTER, "what was not told, and no more");
        let from: Vec<u64> = seen.asked.iter().map(|&(_, from, _)| from).collect();
        assert_eq!(from, [0, 16 * CLUSTER]);
        let [notice] = &seen.notices[..] else { panic!("{:?}", seen.notices) };
        let words = "source: where its holes are cannot be found out for bytes 0..131072: ";
        assert!(notice.starts_with(words) && notice.contains("(ENOMEM); it is read"), "{notice}");
    }
}

/// One that never tells is asked once for each stretch, as the sweep comes to it, and told of once.
#[test]
fn a_source_that_never_tells_its_holes_is_asked_now_and_then() {
    let seen = copied(SyncMode::Full, false, |_, _| Some(Errno::EIO));
    assert!(seen.complete);
    assert_eq!(seen.read, 64 * CLUSTER);
    let asked: Vec<u64> = seen.asked.iter().map(|&(_, from, _)| from / CLUSTER).collect();
    assert_eq!(asked, [0, 16, 32, 48]);
    for (at, &(_, from, read)) in seen.asked.iter().enumerate().skip(1) {
        assert!(read + 8 * CLUSTER >= from, "question {at} is asked when {read} bytes were read");
    }
    assert_eq!(seen.notices.len(), 1, "{:?}", seen.notices);
}

#[test]
fn a_top_layer_that_is_not_told_once_is_asked_for_again() {
    for live in [false, true] {
        let once =
            |query, before: usize| (query == ExtentQuery::TopLayer && before == 0).then_some(Errno::EIO);
        let seen = copied(SyncMode::Top, live, once);
        assert!(seen.complete);
        assert_eq!(seen.read, 16 * CLUSTER, "what may be in the top layer, and no more");
        assert_eq!(seen.uncovered, 48 * CLUSTER);
        let [notice] = &seen.notices[..] else { panic!("{:?}", seen.notices) };
        assert!(notice.contains("what its top layer holds cannot be found out"), "{notice}");
        assert!(notice.contains("(EIO); all of it is copied"), "{notice}");
    }
}

/// Where the server is lost, the error of the copy says so.
#[test]
fn of_a_lost_server_no_notice_is_told_besides() {
    let scenario = Scenario { length: 64 * CLUSTER, ..Scenario::plain(43) };
    let mut plan = scenario.plan(blank());
    plan.source.remote = true;
    let set = Arc::new(IntervalSet::new(scenario.geometry().clusters()).unwrap());
    let mut copier = Copier::new(plan, set);
    let (arena, now, mut ops) = (Arena::new(1 << 20).unwrap(), Timestamp::default(), Vec::new());
    while !copier.is_finished() {
        while copier.poll(now, Places::alone(usize::MAX), &mut ops) {}
        for (token, _) in ops.drain(..) {
            let result = Err(Errno::ECONNRESET);
            copier.on_completion(Completion { token, result }, &arena, now);
        }
    }
    let notices = |event: &Event| matches!(event, Event::Notice(_));
    assert!(!copier.take_events().iter().any(notices));
}

/// The error that ends a verified copy whose writes, or whose reads of the target, come to nothing.
fn of_nothing(remote: bool, writes: bool) -> Arc<engine::error::Error> {
    let scenario = Scenario { length: 4 * CLUSTER, verify: true, zero_detect: false, ..Scenario::plain(44) };
    let mut plan = scenario.plan(blank());
    plan.target.remote = remote;
    let target = plan.target.file;
    let set = Arc::new(IntervalSet::new(scenario.geometry().clusters()).unwrap());
    let mut copier = Copier::new(plan, set);
    let (arena, now, mut ops) = (Arena::new(1 << 20).unwrap(), Timestamp::default(), Vec::new());
    while !copier.is_finished() {
        while copier.poll(now, Places::alone(usize::MAX), &mut ops) {}
        for (token, op) in ops.drain(..) {
            let output = match op {
                Op::Write { .. } if writes => Output::Bytes(0),
                Op::Read { file, .. } if file == target => Output::Bytes(0),
                Op::Read { buffer, .. } | Op::Write { buffer, .. } => Output::Bytes(buffer.length),
                Op::Extents { range, .. } => Output::Extents(vec![Extent { range, present: true }]),
                Op::Digest { buffer, chunk } => {
                    Output::Digests(vec![0; buffer.length.div_ceil(chunk) as usize])
                }
                _ => Output::Done,
            };
            copier.on_completion(Completion { token, result: Ok(output) }, &arena, now);
        }
    }
    let ended = copier.take_events().into_iter().find_map(|event| match event {
        Event::Finished(Ending::Failed(error)) => Some(error),
        _ => None,
    });
    ended.expect("it fails")
}

#[test]
fn a_target_that_takes_nothing_or_has_become_shorter_is_told_with_advice() {
    for (remote, log) in [(false, "see the kernel's log"), (true, "see the server's log")] {
        let error = of_nothing(remote, true).to_string();
        assert!(error.contains("nothing was written; ") && error.contains(log), "{error}");
    }
    let error = of_nothing(false, false).to_string();
    assert!(error.contains("the target has become shorter; see who truncates it"), "{error}");
}
