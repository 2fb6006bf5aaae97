//! One suite over every ring. A ring is added by a [`support::Fixture`] and one line at the end of this file.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use engine::ring::select::RingConfig;
use engine::ring::threads::ThreadsRing;
use engine::ring::uring::UringRing;
use engine::ring::{ExtentQuery, IoPath, Op, Output, Token, Wait, ZeroMethod};
use engine::storage::Storage;
use engine::units::ByteRange;
use nix::errno::Errno;
use parking_lot::{Condvar, Mutex};
use support::real::{Real, RealRing, config};
use support::simulated::Simulated;
use support::storage::Odd;

macro_rules! suite {
    ($ring:ident, $fixture:ty: $($module:ident::$check:ident),* $(,)?) => {
        mod $ring {
            use super::*;
            $(
                #[test]
                fn $check() {
                    match <$fixture as support::Fixture>::unavailable() {
                        None => support::checks::$module::$check::<$fixture>(),
                        Some(reason) => support::skip(stringify!($ring), &reason),
                    }
                }
            )*
        }
    };
}

macro_rules! conformance {
    ($ring:ident, $fixture:ty) => {
        suite! { $ring, $fixture:
            transfer::reads_and_writes,
            transfer::unaligned_tails,
            transfer::end_of_file,
            transfer::errors_are_raw,
            transfer::direct_where_refused,
            transfer::many_in_any_order,
            transfer::null_storage,
            whole::write_zeroes,
            whole::zeroing_keeps_the_length,
            whole::discard,
            whole::allocate,
            whole::flush_and_drop_cache,
            whole::extents,
            whole::digests,
            whole::documents,
            control::cancel,
            control::dropped_in_flight,
            control::deadlines,
            control::woken_before,
            control::woken_during,
            control::helpers_wake,
            control::mixed_kinds,
            control::signals,
            control::misuse_panics,
            control::a_panic_breaks_the_ring,
            control::tables_are_bounded,
            sockets::receives_what_comes,
            sockets::receives_the_whole,
            sockets::sends_from_every_offset,
            sockets::a_send_waits_for_room,
            sockets::shutdown_ends_all,
            sockets::cancels_on_connections,
            sockets::a_reset_is_an_error,
            sockets::removal_closes,
            sockets::many_connections,
            sockets::beside_files,
            sockets::dropped_with_sockets,
            listeners::accepts,
            listeners::accepts_end,
            listeners::sockets_are_bounded,
            listeners::misuse_of_sockets_panics,
            sockets::what_is_there_comes_at_once,
        }
    };
}

conformance!(uring, Real<UringRing>);
conformance!(threads, Real<ThreadsRing>);

/// A storage whose flush is more than one system call is asked to flush itself.
fn a_flush_that_is_more_than_one_call_is_the_storages_own<R: RealRing>() {
    if let Some(reason) = <Real<R> as support::Fixture>::unavailable() {
        return support::skip("its own flush", &reason);
    }
    let mut ring = R::open(&config(4096, 4, 0)).unwrap();
    let storage = Arc::new(Odd::FlushesItself(tempfile::tempfile().unwrap(), AtomicU32::new(0)));
    let file = ring.add_file(Arc::clone(&storage) as Arc<dyn Storage>).unwrap();
    assert_eq!(support::run(&mut ring, Op::Flush { file }), Err(Errno::EIO));
    let Odd::FlushesItself(_, flushes) = &*storage else { unreachable!("made so") };
    assert_eq!(flushes.load(Ordering::SeqCst), 1);
}

#[test]
fn flushes_of_storages_on_uring() {
    a_flush_that_is_more_than_one_call_is_the_storages_own::<UringRing>();
}

#[test]
fn flushes_of_storages_on_threads() {
    a_flush_that_is_more_than_one_call_is_the_storages_own::<ThreadsRing>();
}

/// All that is done with a remote storage is done by helper threads, of which there are as many as the ring was made for; the ring's own thread goes on.
fn a_remote_storage_is_waited_for_by_helpers<R: RealRing>() {
    if let Some(reason) = <Real<R> as support::Fixture>::unavailable() {
        return support::skip("remote storages", &reason);
    }
    let mut ring = R::open(&RingConfig { threads: 8, ..config(16 * 4096, 16, 0) }).unwrap();
    let gate = Arc::new((Mutex::new(false), Condvar::new()));
    let storage = Arc::new(Odd::Remote(Arc::clone(&gate), AtomicU32::new(0)));
    let Odd::Remote(_, begun) = &*storage else { unreachable!("made so") };
    let file = ring.add_file(Arc::clone(&storage) as Arc<dyn Storage>).unwrap();
    for number in 0..12 {
        let op = Op::Read { file, offset: 0, buffer: support::buffer(number, 4096), path: IoPath::Direct };
        ring.push(Token(u64::from(number)), op);
    }
    let (start, mut completions) = (Instant::now(), Vec::new());
    while begun.load(Ordering::SeqCst) < 6 {
        assert!(start.elapsed() < support::PATIENCE, "{begun:?} at a time");
        ring.wait(Wait::Until(ring.now().after(Duration::from_millis(1))), &mut completions).unwrap();
    }
    assert!(completions.is_empty(), "{completions:?}");
    *gate.0.lock() = true;
    gate.1.notify_all();
    let completions = support::complete(&mut ring, 12);
    assert!(completions.iter().all(|one| one.result == Ok(Output::Bytes(4096))), "{completions:?}");
    let buffer = support::buffer(0, 4096);
    let write = Op::Write { file, offset: 0, buffer, path: IoPath::Direct };
    assert_eq!(support::run(&mut ring, write), Ok(Output::Bytes(4096)));
    assert_eq!(support::run(&mut ring, Op::Flush { file }), Ok(Output::Done));
    let range = ByteRange::new(0, 4096);
    let zeroes = Op::WriteZeroes { file, range, method: ZeroMethod::Unmap };
    assert_eq!(support::run(&mut ring, zeroes), Ok(Output::Done));
    let extents = Op::Extents { file, range, query: ExtentQuery::Data, limit: 1 };
    assert!(matches!(support::run(&mut ring, extents), Ok(Output::Extents(_))));
    assert_eq!(support::run(&mut ring, Op::Discard { file, range }), Ok(Output::Done));
}

#[test]
fn remote_storages_on_uring() {
    a_remote_storage_is_waited_for_by_helpers::<UringRing>();
}

#[test]
fn remote_storages_on_threads() {
    a_remote_storage_is_waited_for_by_helpers::<ThreadsRing>();
}

// In virtual time: without the checks that need other threads, signals, no time at all, or an operation that panics.
suite! { sim, Simulated:
    transfer::reads_and_writes,
    transfer::unaligned_tails,
    transfer::end_of_file,
    transfer::errors_are_raw,
    transfer::direct_where_refused,
    transfer::many_in_any_order,
    transfer::null_storage,
    whole::write_zeroes,
    whole::zeroing_keeps_the_length,
    whole::discard,
    whole::allocate,
    whole::flush_and_drop_cache,
    whole::extents,
    whole::digests,
    whole::documents,
    control::cancel,
    control::dropped_in_flight,
    control::deadlines,
    control::woken_before,
    control::mixed_kinds,
    control::misuse_panics,
    control::tables_are_bounded,
    sockets::receives_what_comes,
    sockets::receives_the_whole,
    sockets::sends_from_every_offset,
    sockets::a_send_waits_for_room,
    sockets::shutdown_ends_all,
    sockets::cancels_on_connections,
    sockets::a_reset_is_an_error,
    sockets::removal_closes,
    sockets::many_connections,
    sockets::beside_files,
    sockets::dropped_with_sockets,
    listeners::accepts,
    listeners::accepts_end,
    listeners::sockets_are_bounded,
    listeners::misuse_of_sockets_panics,
}
