//! Flushes, one that fails above all.

use super::*;

fn flush(rig: &mut Rig, id: u64) {
    rig.submit(id, IoRequest::Flush);
}

/// The one of the operations in flight that was given out at `place` ends.
fn end(rig: &mut Rig, place: usize, result: Result<Output, Errno>) {
    let (token, op) = rig.ops.remove(place);
    assert_eq!(shape(&op), ("flush", 0, 0));
    rig.complete(token, result);
}

/// What has ended since the last call, and whether it has succeeded.
fn ended(rig: &mut Rig) -> Vec<(u64, bool)> {
    let outcomes = rig.carrier.take_outcomes().into_iter();
    outcomes.map(|(id, outcome)| (id.0, outcome.result.is_ok())).collect()
}

/// The kernel tells it once, to whoever comes first, and has the pages for clean then.
#[test]
fn after_a_flush_of_the_page_cache_that_failed_none_is_believed() {
    // The second has a last block of its own, which goes through the page cache.
    for alignment in [None, Some(512)] {
        let mut rig = Rig::new(alignment);
        flush(&mut rig, 1);
        let first = rig.fail(Errno::EIO).outcome(1).expect_err("it has failed");
        assert_eq!(first.kind(), ErrorKind::FlushFailed(Errno::EIO));
        assert_eq!(
            first.to_string(),
            "cannot flush disk.img: I/O error (EIO); what was written before may be lost, and no flush of this disk succeeds any more: \
             see the kernel's log, mend the cause, then close the disk and open it again"
        );
        // The guest of another request, who was told that it is written.
        flush(&mut rig, 2);
        assert!(rig.ops.is_empty(), "the kernel would say that all is well");
        let second = rig.outcome(2).expect_err("nobody knows what is stored");
        assert_eq!((second.kind(), second.to_string()), (first.kind(), first.to_string()));
        // All else goes on.
        rig.write(3, 0, &[1; 512]).succeed();
        assert!(rig.outcome(3).is_ok());
        flush(&mut rig, 4);
        assert!(rig.outcome(4).is_err() && rig.carrier.is_idle());
    }
}

#[test]
fn of_flushes_that_are_in_flight_together_none_is_believed_where_one_fails() {
    for fails_first in [false, true] {
        let mut rig = Rig::new(None);
        flush(&mut rig, 1);
        flush(&mut rig, 2);
        if fails_first {
            end(&mut rig, 0, Err(Errno::ENOSPC));
            assert_eq!(ended(&mut rig), [(1, false)]);
            end(&mut rig, 0, Ok(Output::Done));
            assert_eq!(ended(&mut rig), [(2, false)]);
        } else {
            end(&mut rig, 1, Ok(Output::Done));
            assert_eq!(ended(&mut rig), [], "the other may have been told of what concerns it");
            end(&mut rig, 0, Err(Errno::ENOSPC));
            assert_eq!(ended(&mut rig), [(1, false), (2, false)]);
        }
        assert!(rig.carrier.is_idle());
    }
}

#[test]
fn a_flush_waits_for_those_that_were_in_flight_with_it_and_for_no_more() {
    let mut rig = Rig::new(None);
    flush(&mut rig, 1);
    flush(&mut rig, 2);
    end(&mut rig, 1, Ok(Output::Done));
    flush(&mut rig, 3);
    assert_eq!(ended(&mut rig), []);
    end(&mut rig, 0, Ok(Output::Done));
    assert_eq!(ended(&mut rig), [(2, true)], "the first was in flight with the third");
    end(&mut rig, 0, Ok(Output::Done));
    assert_eq!(ended(&mut rig), [(1, true), (3, true)]);
    assert!(rig.carrier.is_idle());
}

/// Of these each write says itself what has failed.
#[test]
fn flushes_of_direct_io_have_nothing_to_do_with_each_other() {
    // Of such blocks the disk has whole ones only.
    let mut rig = Rig::new(Some(32));
    flush(&mut rig, 1);
    flush(&mut rig, 2);
    end(&mut rig, 1, Ok(Output::Done));
    assert_eq!(ended(&mut rig), [(2, true)]);
    end(&mut rig, 0, Err(Errno::EIO));
    let error = rig.outcome(1).expect_err("it has failed");
    assert!(
        error
            .to_string()
            .ends_with("I/O error (EIO); the device or its connection is failing: see the kernel's log")
    );
    flush(&mut rig, 3);
    rig.succeed();
    assert!(rig.outcome(3).is_ok());
}

/// A file system writes the rest of such a block by way of the page cache.
#[test]
fn zeros_that_end_within_a_block_of_the_file_system_go_through_the_page_cache() {
    for (offset, length, cached) in [(0, 8192, false), (512, 3584, true), (4096, 512, true)] {
        let mut rig = Rig::new(Some(32));
        rig.submit(
            1,
            IoRequest::WriteZeroes {
                range: ByteRange::new(offset, length),
                may_unmap: true,
                only_fast: false,
            },
        );
        assert_eq!(shape(&rig.succeed()), ("unmap", offset, length));
        assert!(rig.outcome(1).is_ok());
        flush(&mut rig, 2);
        assert!(rig.fail(Errno::EIO).outcome(2).is_err());
        flush(&mut rig, 3);
        if !cached {
            rig.succeed();
        }
        assert_eq!(rig.outcome(3).is_err(), cached, "{offset} {length}");
    }
}

#[test]
fn one_that_waits_for_another_is_told_of_the_end() {
    let mut rig = Rig::new(None);
    flush(&mut rig, 1);
    flush(&mut rig, 2);
    end(&mut rig, 1, Ok(Output::Done));
    rig.carrier.fail_all(&Error::engine_died("disk.img", "the ring broke"));
    assert_eq!(ended(&mut rig), [(1, false), (2, false)]);
    assert!(!rig.carrier.is_idle());
    end(&mut rig, 0, Ok(Output::Done));
    assert!(rig.carrier.is_idle() && ended(&mut rig).is_empty());
}

#[test]
fn no_more_is_given_out_than_there_is_room_for() {
    let mut rig = Rig::new(Some(512));
    for id in 0..4 {
        rig.carrier.submit(IoId(id), IoRequest::Flush);
    }
    for want in 1..=4 {
        assert!(!rig.carrier.poll(rig.now, 1, &mut rig.arena, &mut rig.host, &mut rig.ops));
        assert_eq!(rig.ops.len(), want);
    }
}
