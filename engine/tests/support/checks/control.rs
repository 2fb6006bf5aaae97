//! Being in flight: cancelling, waiting, waking, limits, and what happens when things break.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use engine::ring::{ExtentQuery, IoPath, Op, Output, Ring, Token, Wait};
use engine::units::ByteRange;
use nix::errno::Errno;

use crate::support::{Fault, Fixture, PATIENCE, buffer, complete, pattern, run, skip};

/// A read that is stuck, or stands behind stuck ones, can be cancelled; the others go on. Cancelling what has ended, or never
/// was, says `ENOENT`.
pub(crate) fn cancel<F: Fixture>() {
    let fixture = F::default();
    let Some(blocked) = fixture.blocked() else {
        return skip("cancel", "this ring has no storage that blocks");
    };
    let mut ring = fixture.ring(1 << 20, 16);
    let file = ring.add_file(blocked.file).unwrap();
    let stuck = blocked.beyond_recall as u64;
    let read = |token: u64| {
        let part = buffer(u32::try_from(token).unwrap(), 4096);
        Op::Read { file, offset: 0, buffer: part, path: IoPath::Buffered }
    };
    for token in 0..=stuck {
        ring.push(Token(token), read(token));
    }
    let mut completions = Vec::new();
    let soon = ring.now().after(Duration::from_millis(50));
    while ring.now() < soon {
        ring.wait(Wait::Until(soon), &mut completions).unwrap();
    }
    assert!(completions.is_empty(), "{completions:?}");

    ring.push(Token(100), Op::Cancel { target: Token(stuck) });
    ring.push(Token(101), Op::Cancel { target: Token(55) });
    let mut completions = complete(&mut ring, 3);
    completions.sort_by_key(|completion| completion.token);
    let results: Vec<_> = completions.into_iter().map(|one| (one.token.0, one.result)).collect();
    let expected = [(stuck, Err(Errno::ECANCELED)), (100, Ok(Output::Done)), (101, Err(Errno::ENOENT))];
    assert_eq!(results, expected);
    assert!(!ring.arena().is_lent(buffer(u32::try_from(stuck).unwrap(), 4096)), "its buffer came back");

    // Pushed and cancelled in one batch: cancelled or done, but both complete.
    ring.push(Token(stuck), read(stuck));
    ring.push(Token(102), Op::Cancel { target: Token(stuck) });
    let completions = complete(&mut ring, 2);
    assert!(completions.iter().any(|one| one.token == Token(102) && one.result == Ok(Output::Done)));
    (blocked.release)();
    complete(&mut ring, blocked.beyond_recall);
    assert_eq!(run(&mut ring, Op::Cancel { target: Token(stuck) }), Err(Errno::ENOENT));
}

/// A ring that is dropped with operations in flight neither hangs nor lets go of memory in use.
pub(crate) fn dropped_in_flight<F: Fixture>() {
    let fixture = F::default();
    let Some(blocked) = fixture.blocked() else {
        return skip("drop in flight", "this ring has no storage that blocks");
    };
    let mut ring = fixture.ring(1 << 20, 16);
    let file = ring.add_file(blocked.file).unwrap();
    for index in 0..8_u32 {
        let part = buffer(index, 4096);
        let op = Op::Read { file, offset: 0, buffer: part, path: IoPath::Buffered };
        ring.push(Token(u64::from(index)), op);
        if index == 3 {
            ring.wait(Wait::Poll, &mut Vec::new()).unwrap();
        }
    }
    if blocked.beyond_recall > 0 {
        (blocked.release)();
    }
    let start = Instant::now();
    drop(ring);
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
}

/// With nothing to wait for, `wait` returns at the deadline, not before it, and `Poll` at once.
pub(crate) fn deadlines<F: Fixture>() {
    let fixture = F::default();
    let mut ring = fixture.ring(1 << 20, 8);
    let mut completions = Vec::new();
    for milliseconds in [0, 1, 30] {
        let until = ring.now().after(Duration::from_millis(milliseconds));
        ring.wait(Wait::Until(until), &mut completions).unwrap();
        assert!(ring.now() >= until && ring.now().since(until) < Duration::from_secs(2));
    }
    let before = ring.now();
    for _ in 0..100 {
        ring.wait(Wait::Poll, &mut completions).unwrap();
    }
    assert!(ring.now().since(before) < Duration::from_secs(2));
    assert!(completions.is_empty());
}

/// A wake-up before `wait` is kept for it, once; several count as one.
pub(crate) fn woken_before<F: Fixture>() {
    let fixture = F::default();
    let mut ring = fixture.ring(1 << 20, 8);
    let waker = ring.waker();
    for _ in 0..100 {
        waker.wake();
        waker.wake();
        let deadline = ring.now().after(PATIENCE);
        ring.wait(Wait::Until(deadline), &mut Vec::new()).unwrap();
        assert!(ring.now() < deadline, "the wake-up was lost");
    }
    let until = ring.now().after(Duration::from_millis(20));
    ring.wait(Wait::Until(until), &mut Vec::new()).unwrap();
    assert!(ring.now() >= until, "a wake-up was delivered twice");
}

/// A wake-up from another thread arrives, however it falls against the start of `wait`.
pub(crate) fn woken_during<F: Fixture>() {
    let fixture = F::default();
    let mut ring = fixture.ring(1 << 20, 8);
    let waker = ring.waker();
    let (go, started) = mpsc::channel::<u32>();
    let thread = std::thread::spawn(move || {
        for round in started {
            for _ in 0..round % 997 {
                std::hint::spin_loop();
            }
            waker.wake();
        }
    });
    for round in 0..3000_u32 {
        go.send(round.wrapping_mul(31)).unwrap();
        let deadline = ring.now().after(PATIENCE);
        ring.wait(Wait::Until(deadline), &mut Vec::new()).unwrap();
        assert!(ring.now() < deadline, "wake-up {round} was lost");
    }
    drop(go);
    thread.join().unwrap();
}

/// Helper threads' completions interrupt `wait` as well, a thousand times in a row.
pub(crate) fn helpers_wake<F: Fixture>() {
    let fixture = F::default();
    let mut ring = fixture.ring(1 << 20, 8);
    for round in 0..1000 {
        let part = buffer(0, 4096);
        ring.arena_mut().slice_mut(part).copy_from_slice(&pattern(round, 4096));
        assert!(run(&mut ring, Op::Digest { buffer: part, chunk: 4096 }).is_ok());
    }
}

/// Signals that a handler takes neither break a ring nor end a `wait` early.
pub(crate) fn signals<F: Fixture>() {
    extern "C" fn ignore(_: libc::c_int) {}
    let fixture = F::default();
    let mut ring = fixture.ring(1 << 20, 8);
    let handler: extern "C" fn(libc::c_int) = ignore;
    // SAFETY: all-zero is a valid `sigaction`: no flags (no restart of system calls), nothing masked.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as usize;
    // SAFETY: `action` is initialised, the handler does nothing.
    assert_eq!(unsafe { libc::sigaction(libc::SIGUSR2, &raw const action, std::ptr::null_mut()) }, 0);
    // SAFETY: always sound.
    let thread: libc::pthread_t = unsafe { libc::pthread_self() };
    let sender = std::thread::spawn(move || {
        for _ in 0..20 {
            std::thread::sleep(Duration::from_millis(2));
            // SAFETY: the thread lives: it joins this one.
            assert_eq!(unsafe { libc::pthread_kill(thread, libc::SIGUSR2) }, 0);
        }
    });
    let until = ring.now().after(Duration::from_millis(80));
    ring.wait(Wait::Until(until), &mut Vec::new()).unwrap();
    assert!(ring.now() >= until, "a signal ended the wait");
    sender.join().unwrap();
}

/// Operations that need the kernel, helpers and nobody, mixed, all complete, once.
pub(crate) fn mixed_kinds<F: Fixture>() {
    let fixture = F::default();
    let mut ring = fixture.ring(1 << 20, 32);
    let disk = fixture.disk(1 << 20);
    let file = ring.add_file(fixture.file(&disk)).unwrap();
    let null = fixture.null().map(|null| ring.add_file(null).unwrap());
    let range = ByteRange::new(0, 65536);
    for _ in 0..50 {
        let mut ops = vec![
            Op::Flush { file },
            Op::Digest { buffer: buffer(0, 65536), chunk: 4096 },
            Op::Write { file, offset: 0, buffer: buffer(0, 65536), path: IoPath::Buffered },
            Op::Extents { file, range, query: ExtentQuery::Data, limit: 4 },
            Op::Read { file, offset: 65536, buffer: buffer(16, 65536), path: IoPath::Buffered },
        ];
        ops.extend(null.map(|file| Op::Flush { file }));
        let count = ops.len();
        for (index, op) in ops.into_iter().enumerate() {
            ring.push(Token(index as u64), op);
        }
        let mut tokens: Vec<_> = complete(&mut ring, count)
            .into_iter()
            .map(|completion| {
                assert!(completion.result.is_ok(), "{completion:?}");
                completion.token.0
            })
            .collect();
        tokens.sort_unstable();
        assert_eq!(tokens, (0..count as u64).collect::<Vec<_>>());
    }
}

fn panics(action: impl FnOnce()) -> bool {
    catch_unwind(AssertUnwindSafe(action)).is_err()
}

/// Misuse is caught: more operations than the ring holds, a token or a buffer used twice, a buffer outside.
pub(crate) fn misuse_panics<F: Fixture>() {
    let fixture = F::default();
    let disk = fixture.disk(1 << 20);
    let mut ring = fixture.ring(1 << 20, 4);
    assert_eq!(ring.capacity(), 4);
    let file = ring.add_file(fixture.file(&disk)).unwrap();
    let read = |page| Op::Read { file, offset: 0, buffer: buffer(page, 4096), path: IoPath::Buffered };
    ring.push(Token(0), read(0));
    assert!(panics(|| ring.push(Token(1), read(0))), "a buffer used twice");
    assert!(panics(|| ring.push(Token(1), read(10_000))), "a buffer outside");
    if cfg!(debug_assertions) {
        assert!(panics(|| ring.push(Token(0), read(1))), "a token used twice");
    }
    for token in 1..4 {
        ring.push(Token(token), read(u32::try_from(token).unwrap()));
    }
    assert!(panics(|| ring.push(Token(4), read(4))), "beyond the capacity");
    assert_eq!(complete(&mut ring, 4).len(), 4);
}

/// A panic in an operation breaks the ring, audibly; it hangs nobody, now or later.
pub(crate) fn a_panic_breaks_the_ring<F: Fixture>() {
    let fixture = F::default();
    let Some(storage) = fixture.faulty(Fault::Panics) else {
        return skip("a panic in an operation", "operations of this ring run no foreign code");
    };
    let mut ring = fixture.ring(1 << 20, 4);
    let file = ring.add_file(storage).unwrap();
    let range = ByteRange::new(0, 4096);
    ring.push(Token(0), Op::Extents { file, range, query: ExtentQuery::Data, limit: 1 });
    let deadline = ring.now().after(PATIENCE);
    let failure = ring.wait(Wait::Until(deadline), &mut Vec::new()).unwrap_err();
    assert_eq!(failure.ring, ring.name());
    assert_eq!(ring.wait(Wait::Forever, &mut Vec::new()), Err(failure), "and stays broken");
}

/// The tables hold 64 each, and refuse more.
pub(crate) fn tables_are_bounded<F: Fixture>() {
    let fixture = F::default();
    let mut ring = fixture.ring(1 << 20, 4);
    let disk = fixture.disk(4096);
    for _ in 0..64 {
        ring.add_file(fixture.file(&disk)).unwrap();
        ring.add_document(fixture.document().0).unwrap();
    }
    assert!(ring.add_file(fixture.file(&disk)).is_err());
    assert!(ring.add_document(fixture.document().0).is_err());
}
