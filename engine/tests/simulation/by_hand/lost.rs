//! A side at a server whose connection is lost.

use engine::error::ErrorKind;

use super::*;

const POLICIES: [ErrorPolicy; 5] =
    [ErrorPolicy::Report, ErrorPolicy::Stop, ErrorPolicy::Enospc, ErrorPolicy::Auto, ErrorPolicy::Ignore];

type Pick = fn(&Op) -> bool;

fn is_read(op: &Op) -> bool {
    matches!(op, Op::Read { .. })
}

fn is_write(op: &Op) -> bool {
    matches!(op, Op::Write { .. })
}

fn is_flush(op: &Op) -> bool {
    matches!(op, Op::Flush { .. })
}

fn with_servers(policy: ErrorPolicy, remote: bool) -> ByHand {
    let scenario = Scenario {
        length: 64 * CLUSTER,
        map: true,
        zero_detect: false,
        source_policy: policy,
        target_policy: policy,
        checkpoint_bytes: 16 * CLUSTER,
        ..Scenario::plain(41)
    };
    let mut plan = scenario.plan(blank());
    plan.source.remote = remote;
    plan.target.remote = remote;
    let set = Arc::new(IntervalSet::new(scenario.geometry().clusters()).unwrap());
    ByHand::of(Copier::new(plan, set), &scenario, false)
}

/// No time passes: nothing is tried again after a pause, and nobody is asked to resume. And no cluster is left out.
#[test]
fn a_side_that_is_lost_ends_the_copy_whatever_the_policy() {
    let lost: [(Pick, Errno); 3] =
        [(is_read, Errno::EPIPE), (is_write, Errno::ECONNRESET), (is_flush, Errno::ETIMEDOUT)];
    for policy in POLICIES {
        for (is_lost, errno) in lost {
            let mut copy = with_servers(policy, true);
            for _ in 0..3 {
                copy.answer(|op| !is_flush(op), Ok(()));
            }
            let mut rounds = 0;
            while !copy.copier.is_finished() {
                rounds += 1;
                assert!(rounds < 100, "{policy:?} {errno}: {:?}", copy.events);
                for fails in [true, false] {
                    if copy.count(|op| is_lost(op) == fails) > 0 {
                        let result = if fails { Err(errno) } else { Ok(()) };
                        copy.answer(|op| is_lost(op) == fails, result);
                    }
                }
            }
            let ended = copy.events.iter().find_map(|event| match event {
                Event::Finished(Ending::Failed(error)) => Some(error),
                _ => None,
            });
            let error = ended.unwrap_or_else(|| panic!("{policy:?}: {:?}", copy.events));
            let kind =
                if errno == Errno::ETIMEDOUT { ErrorKind::FlushFailed(errno) } else { ErrorKind::Io(errno) };
            assert_eq!(error.kind(), kind, "{error}");
            assert!(error.to_string().contains("the server, or the way to it, is gone"), "{error}");
            assert!(!copy.events.iter().any(|event| matches!(event, Event::Stopped { .. })));
            assert!(copy.copier.skipped_ranges().is_empty());
        }
    }
}

/// A device that says the same comes back, perhaps.
#[test]
fn a_device_is_never_lost() {
    let mut copy = with_servers(ErrorPolicy::Stop, false);
    while !copy.events.iter().any(|event| matches!(event, Event::Stopped { .. })) {
        assert!(!copy.copier.is_finished(), "{:?}", copy.events);
        copy.answer(|_| true, Err(Errno::ETIMEDOUT));
    }
}
