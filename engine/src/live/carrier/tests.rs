//! The carrier by hand: every step of a request, and the words for what goes wrong.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use nix::errno::Errno;

use super::super::jobs::JobId;
use super::*;
use crate::copier::plan::Side;
use crate::error::ErrorKind;
use crate::ring::{Arena, Completion, FileId, IoPath, Output};
use crate::units::{ClusterRange, Length};

mod flushes;

const LENGTH: u64 = 100_000;

/// Permits that are out.
#[derive(Clone, Debug, Default)]
struct Ledger(Rc<RefCell<Vec<ByteRange>>>);

struct Permit(Ledger, ByteRange);

impl Drop for Permit {
    fn drop(&mut self) {
        let mut out = self.0.0.borrow_mut();
        let at = out.iter().position(|&range| range == self.1).expect("given once, dropped once");
        out.remove(at);
    }
}

#[derive(Default)]
struct Host {
    out: Ledger,
    barrier: bool,
    to_copy: Option<ClusterRange>,
    asked: Vec<CopyWait>,
    attempts: Vec<ByteRange>,
    discardable: Option<ByteRange>,
}

impl AdmissionHost for Host {
    type Permit = Permit;

    fn attempt(&mut self, range: ByteRange) -> Attempt<Permit> {
        self.attempts.push(range);
        if self.barrier {
            return Attempt::AtBarrier;
        }
        if let Some(clusters) = self.to_copy {
            return Attempt::Copy(JobId(7), clusters);
        }
        self.out.0.borrow_mut().push(range);
        Attempt::Granted(Permit(self.out.clone(), range))
    }

    fn copy(&mut self, job: JobId, _clusters: ClusterRange, _range: ByteRange, wait: CopyWait) {
        assert_eq!(job, JobId(7));
        self.asked.push(wait);
    }

    fn discards(&mut self, range: ByteRange) -> DiscardRule {
        DiscardRule { now: self.discardable.and_then(|free| free.intersection(range)) }
    }
}

struct Rig {
    carrier: Carrier<Permit>,
    host: Host,
    arena: Arena,
    now: Timestamp,
    ops: Vec<(Token, Op)>,
}

impl Rig {
    fn new(alignment: Option<u32>) -> Self {
        Self::with(alignment, true)
    }

    fn with(alignment: Option<u32>, keep_is_fast: bool) -> Self {
        let limits = CarrierLimits {
            requests: 8,
            slot_bytes: 4096,
            window_bytes: 8192,
            wide_window_bytes: 32768,
            ..CarrierLimits::default()
        };
        let plan = CarrierPlan {
            file: Side {
                file: FileId(3),
                name: Arc::from("disk.img"),
                direct_alignment: alignment,
                remote: false,
            },
            length: Length(LENGTH),
            keep_is_fast,
            buffers: BufferRange { start: 4096, length: 16384 },
            limits,
            planted: None,
        };
        Self {
            carrier: Carrier::new(plan),
            host: Host { discardable: Some(ByteRange::new(0, LENGTH)), ..Host::default() },
            arena: Arena::new(20480).unwrap(),
            now: Timestamp::default(),
            ops: Vec::new(),
        }
    }

    fn submit(&mut self, id: u64, request: IoRequest) -> &mut Self {
        self.carrier.submit(IoId(id), request);
        self.poll()
    }

    fn write(&mut self, id: u64, offset: u64, data: &[u8]) -> &mut Self {
        self.submit(id, IoRequest::Write { offset, data: data.to_vec() })
    }

    fn poll(&mut self) -> &mut Self {
        let more = self.carrier.poll(self.now, 32, &mut self.arena, &mut self.host, &mut self.ops);
        assert!(!more);
        self
    }

    /// The only operation that was given out.
    fn one(&mut self) -> (Token, Op) {
        assert_eq!(self.ops.len(), 1, "{:?}", self.ops);
        self.ops.remove(0)
    }

    fn complete(&mut self, token: Token, result: Result<Output, Errno>) -> &mut Self {
        self.carrier.on_completion(Completion { token, result }, &mut self.arena, self.now);
        self.poll()
    }

    /// The only operation given out succeeds as a whole.
    fn succeed(&mut self) -> Op {
        let (token, op) = self.one();
        let output = match &op {
            Op::Read { buffer, .. } | Op::Write { buffer, .. } => Output::Bytes(buffer.length),
            _ => Output::Done,
        };
        self.complete(token, Ok(output));
        op
    }

    fn fail(&mut self, errno: Errno) -> &mut Self {
        let (token, _) = self.one();
        self.complete(token, Err(errno))
    }

    fn outcome(&mut self, id: u64) -> Result<Vec<u8>, Error> {
        let mut outcomes = self.carrier.take_outcomes();
        assert_eq!(outcomes.len(), 1, "{outcomes:?}");
        let (of, outcome) = outcomes.remove(0);
        assert_eq!(of, IoId(id));
        outcome.result
    }

    fn permits(&self) -> Vec<ByteRange> {
        self.host.out.0.borrow().clone()
    }
}

fn shape(op: &Op) -> (&'static str, u64, u64) {
    match op {
        Op::Read { offset, buffer, .. } => ("read", *offset, u64::from(buffer.length)),
        Op::Write { offset, buffer, .. } => ("write", *offset, u64::from(buffer.length)),
        Op::WriteZeroes { range, method: ZeroMethod::Unmap, .. } => ("unmap", range.offset, range.length),
        Op::WriteZeroes { range, method: ZeroMethod::Keep, .. } => ("zero", range.offset, range.length),
        Op::Discard { range, .. } => ("discard", range.offset, range.length),
        Op::Flush { .. } => ("flush", 0, 0),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_whole_block_is_written_under_a_permit() {
    let mut rig = Rig::new(Some(512));
    rig.write(1, 512, &[7; 512]);
    assert_eq!(rig.permits(), [ByteRange::new(512, 512)]);
    let op = rig.succeed();
    assert_eq!(shape(&op), ("write", 512, 512));
    let Op::Write { buffer, path, .. } = op else { unreachable!() };
    assert_eq!(path, IoPath::Direct);
    assert_eq!(rig.arena.slice(buffer), [7; 512]);
    assert_eq!(rig.permits(), []);
    assert_eq!(rig.outcome(1).unwrap(), [7; 512], "its buffer comes back");
    assert!(rig.carrier.is_idle());
}

#[test]
fn what_is_covered_in_part_is_read_first_and_nobody_else_writes_there() {
    let mut rig = Rig::new(Some(512));
    rig.write(1, 1000, &[7; 100]);
    rig.write(2, 1024, &[9; 512]);
    assert_eq!(rig.permits(), [ByteRange::new(512, 1024)], "the second waits, without one");
    let (token, op) = rig.one();
    assert_eq!(shape(&op), ("read", 512, 1024));
    let Op::Read { buffer, .. } = op else { unreachable!() };
    rig.arena.slice_mut(buffer).fill(1);
    rig.complete(token, Ok(Output::Bytes(1024)));
    let (token, op) = rig.one();
    assert_eq!(shape(&op), ("write", 512, 1024));
    let Op::Write { buffer, .. } = op else { unreachable!() };
    let bytes = rig.arena.slice(buffer).to_vec();
    assert!(bytes[..488].iter().chain(&bytes[588..]).all(|&byte| byte == 1));
    assert!(bytes[488..588].iter().all(|&byte| byte == 7));
    rig.complete(token, Ok(Output::Bytes(1024)));
    assert!(rig.outcome(1).is_ok());
    assert_eq!(shape(&rig.succeed()), ("write", 1024, 512));
    assert!(rig.outcome(2).is_ok());
}

#[test]
fn a_read_of_any_alignment_needs_no_permit() {
    let mut rig = Rig::new(Some(512));
    rig.host.barrier = true;
    rig.submit(1, IoRequest::Read { range: ByteRange::between(99_990, LENGTH), buffer: vec![0; 10] });
    let (token, op) = rig.one();
    assert_eq!(shape(&op), ("read", 99_840, 512));
    let Op::Read { buffer, .. } = op else { unreachable!() };
    for (at, byte) in rig.arena.slice_mut(buffer).iter_mut().enumerate() {
        *byte = u8::try_from(at % 251).unwrap();
    }
    rig.complete(token, Ok(Output::Bytes(160)));
    let want: Vec<u8> = (150..160).collect();
    assert_eq!(rig.outcome(1).unwrap(), want);
}

#[test]
fn without_direct_io_bytes_go_as_they_are() {
    let mut rig = Rig::new(None);
    rig.write(1, 1000, &[7; 100]);
    let op = rig.succeed();
    assert_eq!(shape(&op), ("write", 1000, 100));
    assert!(matches!(op, Op::Write { path: IoPath::Buffered, .. }));
}

#[test]
fn at_the_barrier_nothing_is_held() {
    let mut rig = Rig::new(Some(512));
    rig.host.barrier = true;
    rig.write(1, 0, &[7; 100]).write(2, 100, &[8; 100]);
    assert!(rig.ops.is_empty() && rig.permits().is_empty());
    assert!(rig.carrier.buffers.all_free() && rig.carrier.locks.is_empty());
    rig.host.barrier = false;
    rig.poll();
    assert!(rig.ops.is_empty(), "it was not told");
    rig.carrier.barrier_lowered();
    rig.poll();
    assert_eq!(shape(&rig.succeed()), ("read", 0, 512));
    assert_eq!(shape(&rig.succeed()), ("write", 0, 512));
    assert!(rig.outcome(1).is_ok());
    assert_eq!(shape(&rig.succeed()), ("read", 0, 512));
}

#[test]
fn clusters_are_copied_first() {
    let mut rig = Rig::new(Some(512));
    rig.now = Timestamp::default().after(std::time::Duration::from_secs(3));
    rig.host.to_copy = Some(ClusterRange::new(0, 1));
    rig.write(1, 0, &[7; 512]).write(2, 512, &[8; 512]);
    assert!(rig.ops.is_empty() && rig.carrier.buffers.all_free() && rig.carrier.locks.is_empty());
    let asked = rig.host.asked.clone();
    assert_eq!(asked.len(), 2);
    let error = Error::io(Operation::Write, "target.img", Some(ByteRange::new(0, 65536)), Errno::EIO);
    rig.carrier.copied(asked[1].clone(), Err(Arc::new(error.clone())));
    assert_eq!(rig.outcome(2).unwrap_err().to_string(), error.to_string());
    rig.host.to_copy = None;
    rig.carrier.copied(asked[0].clone(), Ok(()));
    rig.poll();
    assert_eq!(shape(&rig.succeed()), ("write", 0, 512));
    assert!(rig.outcome(1).is_ok());
    rig.carrier.copied(asked[0].clone(), Ok(()));
    assert!(rig.carrier.is_idle(), "answered twice is passed over");
}

#[test]
fn a_large_request_goes_window_by_window() {
    let mut rig = Rig::new(Some(4096));
    rig.write(1, 100, &[7; 17_000]);
    let mut seen = Vec::new();
    while let Some((token, op)) = rig.ops.pop() {
        assert!(rig.ops.is_empty() && rig.permits().len() == 1);
        seen.push(shape(&op));
        let (Op::Read { buffer, .. } | Op::Write { buffer, .. }) = &op else { unreachable!() };
        let length = buffer.length;
        rig.complete(token, Ok(Output::Bytes(length)));
    }
    let want = [("read", 0, 4096), ("write", 0, 8192), ("write", 8192, 8192)];
    assert_eq!(seen[..3], want);
    assert_eq!(seen[3..], [("read", 16384, 4096), ("write", 16384, 4096)]);
    assert_eq!(rig.outcome(1).unwrap(), vec![7; 17_000]);
}

#[test]
fn who_finds_no_buffer_holds_no_permit_and_is_not_overtaken() {
    let mut rig = Rig::new(Some(512));
    rig.write(1, 0, &[1; 8192])
        .write(2, 8192, &[2; 4096])
        .write(3, 16384, &[3; 8192])
        .write(4, 32768, &[4; 512]);
    assert_eq!(rig.ops.len(), 2, "one slot is left, the third needs two");
    assert_eq!(rig.permits().len(), 2);
    let (token, _) = rig.ops.remove(1);
    rig.complete(token, Ok(Output::Bytes(4096)));
    assert_eq!(rig.ops.len(), 2);
    assert_eq!(shape(&rig.ops[1].1), ("write", 16384, 8192));
}

#[test]
fn zeros_step_down_to_data() {
    let mut rig = Rig::new(Some(512));
    let range = ByteRange::new(512, 16384);
    rig.submit(1, IoRequest::WriteZeroes { range, may_unmap: true, only_fast: false });
    assert_eq!(shape(&rig.ops[0].1), ("unmap", 512, 16384), "wide, since all is copied");
    rig.fail(Errno::EINTR);
    assert_eq!(shape(&rig.ops[0].1), ("unmap", 512, 16384));
    rig.fail(Errno::EOPNOTSUPP);
    assert_eq!(shape(&rig.ops[0].1), ("zero", 512, 16384));
    rig.fail(Errno::EOPNOTSUPP);
    assert_eq!(shape(&rig.ops[0].1), ("write", 512, 8192));
    let Op::Write { buffer, .. } = rig.succeed() else { unreachable!() };
    assert!(rig.arena.slice(buffer).iter().all(|&byte| byte == 0));
    assert_eq!(shape(&rig.succeed()), ("write", 8704, 8192));
    assert!(rig.outcome(1).unwrap().is_empty());
    rig.submit(
        2,
        IoRequest::WriteZeroes { range: ByteRange::new(0, 512), may_unmap: true, only_fast: false },
    );
    assert_eq!(shape(&rig.succeed()), ("write", 0, 512), "it is remembered");
}

/// Of a block device nobody knows whether the kernel would write them.
#[test]
fn zeros_that_keep_their_space_are_fast_on_files_alone() {
    for keep_is_fast in [true, false] {
        let mut rig = Rig::with(Some(512), keep_is_fast);
        let zeroes = |may_unmap: bool, only_fast: bool| {
            let range = ByteRange::new(0, 512);
            IoRequest::WriteZeroes { range, may_unmap, only_fast }
        };
        rig.submit(1, zeroes(true, true));
        assert_eq!(shape(&rig.succeed()), ("unmap", 0, 512));
        assert!(rig.outcome(1).is_ok());
        // Neither asked for as a hole, nor where the disk makes none.
        for (id, may_unmap) in [(2, false), (3, true)] {
            rig.submit(id, zeroes(may_unmap, true));
            if may_unmap {
                rig.fail(Errno::EOPNOTSUPP);
            }
            if keep_is_fast {
                assert_eq!(shape(&rig.succeed()), ("zero", 0, 512));
            }
            let told = rig.outcome(id).map_err(|error| error.kind());
            assert_eq!(told.is_ok(), keep_is_fast, "{told:?}");
            assert!(told.is_ok() || told == Err(ErrorKind::Io(Errno::EOPNOTSUPP)));
        }
        rig.submit(4, zeroes(true, false));
        assert_eq!(shape(&rig.succeed()), ("zero", 0, 512), "slow ones are wanted even so");
        assert!(rig.outcome(4).is_ok());
    }
}

#[test]
fn a_job_that_starts_meanwhile_makes_windows_small_again() {
    let mut rig = Rig::new(Some(512));
    rig.write(1, 100, &[1; 100]);
    rig.submit(
        2,
        IoRequest::WriteZeroes { range: ByteRange::new(0, 32768), may_unmap: true, only_fast: false },
    );
    rig.host.to_copy = Some(ClusterRange::new(0, 1));
    rig.succeed();
    rig.succeed();
    assert!(rig.outcome(1).is_ok() && rig.ops.is_empty() && rig.permits().is_empty());
    assert_eq!(rig.host.asked.len(), 1);
    assert_eq!(rig.host.attempts[1..], [ByteRange::new(0, 32768), ByteRange::new(0, 8192)]);
    rig.host.to_copy = None;
    rig.carrier.copied(rig.host.asked[0].clone(), Ok(()));
    rig.poll();
    assert_eq!(shape(&rig.succeed()), ("unmap", 0, 8192));
    assert_eq!(shape(&rig.succeed()), ("unmap", 8192, 24576));
    assert!(rig.outcome(2).is_ok());
}

#[test]
fn a_discard_is_done_now_or_put_off_and_a_write_takes_it_back() {
    let mut rig = Rig::new(Some(512));
    rig.submit(1, IoRequest::Discard { range: ByteRange::between(100, 5000) });
    assert_eq!(rig.permits(), [ByteRange::between(512, 4608)]);
    assert_eq!(shape(&rig.succeed()), ("discard", 512, 4096));
    assert!(rig.outcome(1).is_ok());
    rig.host.discardable = None;
    rig.submit(2, IoRequest::Discard { range: ByteRange::new(0, 8192) });
    assert!(rig.outcome(2).is_ok() && rig.ops.is_empty(), "told at once");
    rig.write(3, 1100, &[1; 10]);
    assert_eq!(rig.carrier.deferred_bytes(), 8192 - 512);
    rig.succeed();
    rig.succeed();
    assert!(rig.outcome(3).is_ok());
    assert!(rig.ops.is_empty(), "still not to be discarded");
    let due = rig.carrier.next_deadline(rig.now).unwrap();
    assert!(due > rig.now);
    rig.host.discardable = Some(ByteRange::new(0, LENGTH));
    rig.now = due;
    rig.poll();
    assert_eq!(shape(&rig.succeed()), ("discard", 0, 1024));
    assert_eq!(shape(&rig.succeed()), ("discard", 1536, 8192 - 1536));
    assert_eq!((rig.carrier.deferred_bytes(), rig.carrier.next_deadline(rig.now)), (0, None));
    assert!(rig.carrier.is_idle());
}

#[test]
fn a_discard_waits_for_nothing_and_excludes_writes_while_it_runs() {
    let mut rig = Rig::new(Some(512));
    rig.write(1, 0, &[1; 512]);
    rig.submit(2, IoRequest::Discard { range: ByteRange::new(0, 4096) });
    assert!(rig.outcome(2).is_ok(), "a write is in its way: later");
    rig.submit(3, IoRequest::Discard { range: ByteRange::new(8192, 4096) });
    rig.write(4, 8192, &[2; 512]);
    assert_eq!(rig.ops.len(), 2, "the second write waits for the discard");
    let (token, _) = rig.ops.remove(1);
    rig.complete(token, Err(Errno::EOPNOTSUPP));
    let outcomes = rig.carrier.take_outcomes();
    assert!(outcomes.iter().all(|(id, outcome)| *id == IoId(3) && outcome.result.is_ok()));
    assert_eq!(shape(&rig.ops[1].1), ("write", 8192, 512));
    assert_eq!(rig.carrier.deferred_bytes(), 0, "this disk discards nothing");
}

#[test]
fn a_request_that_was_not_started_can_be_cancelled() {
    let mut rig = Rig::new(Some(512));
    rig.host.to_copy = Some(ClusterRange::new(0, 1));
    rig.write(1, 0, &[1; 512]);
    assert!(rig.carrier.cancel(IoId(1)));
    let error = rig.outcome(1).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
    assert_eq!(error.to_string(), "cannot write disk.img, bytes 0..512: cancelled");
    rig.carrier.copied(rig.host.asked[0].clone(), Ok(()));
    assert!(rig.carrier.is_idle());
    rig.host.to_copy = None;
    rig.write(2, 0, &[1; 100]).write(3, 100, &[1; 100]);
    assert!(!rig.carrier.cancel(IoId(2)), "in flight");
    assert!(rig.carrier.cancel(IoId(3)), "waits for its lock");
    assert!(rig.outcome(3).is_err());
    rig.succeed();
    rig.succeed();
    assert!(rig.outcome(2).is_ok());
    assert!(!rig.carrier.cancel(IoId(2)), "over");
}

#[test]
fn at_the_end_everybody_is_told_and_what_is_in_flight_leads_to_nothing() {
    let mut rig = Rig::new(Some(512));
    rig.write(1, 10, &[1; 10]).write(2, 30, &[1; 10]);
    rig.host.barrier = true;
    rig.write(3, 8192, &[1; 10]);
    rig.host.discardable = None;
    rig.submit(4, IoRequest::Discard { range: ByteRange::new(0, 4096) });
    assert!(rig.outcome(4).is_ok());
    let error = Error::engine_died("disk.img", "the ring broke");
    rig.carrier.fail_all(&error);
    let outcomes = rig.carrier.take_outcomes();
    assert_eq!(outcomes.len(), 3);
    assert!(
        outcomes
            .iter()
            .all(|(_, outcome)| { outcome.result.as_ref().unwrap_err().to_string() == error.to_string() })
    );
    assert!(!rig.carrier.is_idle());
    assert_eq!(rig.permits().len(), 1, "its read is still in flight");
    rig.succeed();
    assert!(rig.ops.is_empty() && rig.permits().is_empty(), "nothing is written any more");
    assert!(rig.carrier.is_idle() && rig.carrier.take_outcomes().is_empty());
    assert_eq!(rig.carrier.next_deadline(rig.now), None);
    rig.write(5, 0, &[1; 512]);
    assert_eq!(rig.outcome(5).unwrap_err().kind(), ErrorKind::EngineDied);
}

#[test]
fn no_bytes_are_no_work_and_bytes_beyond_the_end_are_refused() {
    let mut rig = Rig::new(Some(512));
    assert!(rig.write(1, LENGTH, &[]).outcome(1).is_ok());
    let read = IoRequest::Read { range: ByteRange::new(LENGTH - 1, 2), buffer: vec![0; 2] };
    let error = rig.submit(2, read).outcome(2).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io(Errno::EINVAL));
    assert_eq!(error.to_string(), "cannot read disk.img, bytes 99999..100001: the disk ends at byte 100000");
    let error = rig.write(3, LENGTH, &[0]).outcome(3).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    let range = ByteRange::new(u64::MAX - 1, u64::MAX);
    let error = rig
        .submit(4, IoRequest::WriteZeroes { range, may_unmap: true, only_fast: false })
        .outcome(4)
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    assert_eq!(
        error.to_string(),
        "cannot write zeroes to disk.img, bytes 18446744073709551614..18446744073709551615: \
         the disk ends at byte 100000"
    );
    let error = rig.submit(5, IoRequest::Discard { range }).outcome(5).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io(Errno::EINVAL));
}

#[test]
fn errors_name_what_was_done_where_and_why() {
    let mut rig = Rig::new(Some(512));
    rig.write(1, 700, &[1; 100]).fail(Errno::EIO);
    assert_eq!(
        rig.outcome(1).unwrap_err().to_string(),
        "cannot read disk.img, bytes 512..1024: I/O error (EIO); \
         the device or its connection is failing: see the kernel's log"
    );
    rig.write(2, 1024, &[1; 512]).fail(Errno::ENOSPC);
    let error = rig.outcome(2).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    assert_eq!((error.operation(), error.range()), (Operation::Write, Some(ByteRange::new(1024, 512))));
    rig.submit(3, IoRequest::Flush).fail(Errno::EIO);
    let error = rig.outcome(3).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FlushFailed(Errno::EIO));
    assert!(error.to_string().starts_with("cannot flush disk.img: I/O error (EIO)"), "{error}");
    rig.submit(4, IoRequest::Read { range: ByteRange::new(0, 10), buffer: vec![0; 10] });
    let (token, _) = rig.one();
    rig.complete(token, Ok(Output::Bytes(0)));
    assert_eq!(
        rig.outcome(4).unwrap_err().to_string(),
        "cannot read disk.img, bytes 0..10: the disk has become shorter since it was opened"
    );
    rig.submit(
        5,
        IoRequest::WriteZeroes { range: ByteRange::new(0, 512), may_unmap: false, only_fast: false },
    )
    .fail(Errno::EIO);
    let text = rig.outcome(5).unwrap_err().to_string();
    assert!(text.starts_with("cannot write zeroes to disk.img, bytes 0..512: I/O error"), "{text}");
    assert!(rig.permits().is_empty() && rig.carrier.is_idle());
}

#[test]
fn the_time_of_copies_counts_for_the_whole_request() {
    let mut rig = Rig::new(Some(512));
    rig.host.to_copy = Some(ClusterRange::new(0, 1));
    rig.write(1, 0, &[1; 16384]);
    assert_eq!(rig.host.asked[0].waited, Waited::default());
    let waited = Waited::of_test(JobId(7), 1);
    rig.carrier.copied(CopyWait { waited: waited.clone(), ..rig.host.asked[0] }, Ok(()));
    rig.poll();
    assert_eq!(rig.host.asked[1].waited, waited, "the clock goes on, whatever is asked for next");
    rig.host.to_copy = None;
    rig.carrier.copied(rig.host.asked[1].clone(), Ok(()));
    rig.poll();
    rig.host.to_copy = Some(ClusterRange::new(1, 2));
    rig.succeed();
    assert_eq!(rig.host.asked[2].waited, waited, "another window of the same request");
    rig.host.to_copy = None;
    rig.carrier.copied(rig.host.asked[2].clone(), Ok(()));
    rig.poll().succeed();
    assert!(rig.outcome(1).is_ok());
    rig.host.to_copy = Some(ClusterRange::new(0, 1));
    rig.write(2, 0, &[1; 512]);
    assert_eq!(rig.host.asked[3].waited, Waited::default(), "another request");
}

#[test]
fn discards_put_off_are_forgotten_for_those_who_write_by_themselves() {
    let mut rig = Rig::new(Some(512));
    rig.host.discardable = None;
    rig.submit(1, IoRequest::Discard { range: ByteRange::new(0, 65_536) });
    assert!(rig.outcome(1).is_ok() && rig.carrier.has_discards_put_off());
    assert!(rig.carrier.forget_discards(ByteRange::new(10, 4000)), "none is under way");
    assert!(rig.carrier.forget_discards(ByteRange::new(LENGTH, u64::MAX)), "beyond the end there is none");
    assert_eq!(rig.carrier.deferred_bytes(), 65_536 - 4096);
    rig.host.discardable = Some(ByteRange::new(0, LENGTH));
    rig.now = Timestamp(std::time::Duration::from_secs(1));
    rig.poll();
    let (token, op) = rig.one();
    assert!(matches!(op, Op::Discard { range, .. } if range == ByteRange::between(4096, 32_768)), "{op:?}");
    assert!(rig.carrier.forget_discards(ByteRange::new(0, 4096)), "it is carried out elsewhere");
    assert!(!rig.carrier.forget_discards(ByteRange::new(8192, 1)), "it is being carried out here");
    assert!(rig.carrier.forget_discards(ByteRange::between(32_768, 65_536)));
    rig.carrier.on_completion(Completion { token, result: Ok(Output::Done) }, &mut rig.arena, rig.now);
    assert!(rig.carrier.forget_discards(ByteRange::new(8192, 1)));
    assert!(!rig.carrier.has_discards_put_off());
}

#[test]
#[should_panic(expected = "the caller bounds its requests")]
fn too_many_requests_are_the_callers_bug() {
    let mut rig = Rig::new(Some(512));
    for id in 0..9 {
        rig.write(id, 0, &[0; 512]);
    }
}
