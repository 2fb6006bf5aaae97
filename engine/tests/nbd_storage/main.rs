//! An export as a storage, beside a server that is told how to behave: what it is asked, and what becomes of its answers and its end.

#![allow(clippy::cast_possible_truncation, reason = "lengths and offsets in these tests are small")]

mod fake;
#[allow(dead_code, reason = "the tests of the protocol use more of it")]
#[path = "../nbd_client/server.rs"]
mod server;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use engine::copy::{CopyOptions, ErrorPolicy, IoEngine, start};
use engine::error::{Error, ErrorKind, Refusal};
use engine::job::Outcome;
use engine::ring::{Extent, ExtentQuery, IoPath, ZeroMethod};
use engine::storage::{Locator, OpenedSource, SourceOptions, Storage, open_source};
use engine::units::{ByteRange, ClusterSize};
use fake::{Behaviour, Fake, Seen, flag};
use nix::errno::Errno;

fn open(fake: &Fake) -> Result<OpenedSource, Error> {
    open_source(&Locator::parse(&fake.uri("disk")).expect("a URI"), &SourceOptions::default())
}

fn storage(fake: &Fake) -> Arc<dyn Storage> {
    open(fake).expect("it opens").storage()
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at % 249) as u8 + 1).collect()
}

fn read_all(storage: &dyn Storage, offset: u64, length: usize) -> Vec<u8> {
    let mut contents = vec![0xee; length];
    let mut done = 0;
    while done < length {
        let read = storage.read_at(IoPath::Direct, offset + done as u64, &mut contents[done..]);
        match read.expect("readable") {
            0 => break,
            count => done += count,
        }
    }
    contents.truncate(done);
    contents
}

fn write_all(storage: &dyn Storage, offset: u64, contents: &[u8]) {
    let mut done = 0;
    while done < contents.len() {
        done += storage.write_at(IoPath::Direct, offset + done as u64, &contents[done..]).expect("written");
    }
}

#[test]
fn reads_and_writes_of_any_alignment() {
    for block in [1, 512, 4096, 65536] {
        for structured in [true, false] {
            let length = 3 * 65536;
            let behaviour = Behaviour { block, structured, payload: 65536, ..Behaviour::default() };
            let fake = Fake::start(pattern(length), behaviour);
            let disk = storage(&fake);
            let mut expected = pattern(length);
            for (offset, count) in
                [(0, 1), (511, 2), (0, length), (65535, 2), (4096, 8192), (length - 1, 1), (1, 65536)]
            {
                let range = offset..offset + count;
                assert_eq!(
                    read_all(disk.as_ref(), offset as u64, count),
                    expected[range.clone()],
                    "{block} {range:?}"
                );
                let fresh: Vec<u8> = (0..count).map(|at| (at * 7 + offset) as u8).collect();
                write_all(disk.as_ref(), offset as u64, &fresh);
                expected[range].copy_from_slice(&fresh);
            }
            assert_eq!(fake.contents(), expected, "blocks of {block}");
            assert_eq!(read_all(disk.as_ref(), length as u64 - 5, 100).len(), 5, "short at the end");
            assert_eq!(disk.read_at(IoPath::Direct, length as u64, &mut [0; 9]), Ok(0));
            assert_eq!(disk.write_at(IoPath::Direct, length as u64, &[0; 9]), Err(Errno::ENOSPC));
            assert_eq!(disk.flush(), Ok(()));
            assert_eq!(
                fake.seen().refused,
                0,
                "blocks of {block}: no request was against the server's rules"
            );
        }
    }
}

#[test]
fn zeros_and_discards_keep_to_whole_blocks() {
    for (block, range) in
        [(1, 5..70_000), (4096, 5..70_000), (4096, 4097..4099), (65536, 0..131_072), (512, 512..1024)]
    {
        let fake = Fake::start(pattern(131_072), Behaviour { block, ..Behaviour::default() });
        let disk = storage(&fake);
        let bytes = ByteRange::between(range.start as u64, range.end as u64);
        assert_eq!(disk.write_zeroes(bytes, ZeroMethod::Unmap), Ok(()));
        let mut expected = pattern(131_072);
        expected[range].fill(0);
        assert_eq!(fake.contents(), expected, "{block} {bytes}");
        assert_eq!(disk.discard(bytes), Ok(()));
        assert_eq!(fake.seen().refused, 0);
    }
    let fake = Fake::start(pattern(4096), Behaviour { flags: flag::HAS, ..Behaviour::default() });
    let disk = storage(&fake);
    let all = ByteRange::new(0, 4096);
    assert_eq!(disk.write_zeroes(all, ZeroMethod::Unmap), Err(Errno::EOPNOTSUPP));
    assert_eq!(disk.discard(all), Err(Errno::EOPNOTSUPP));
}

#[test]
fn holes_are_what_reads_as_zeros() {
    let mut contents = pattern(1 << 20);
    contents[65536..131_072].fill(0);
    contents[900_000..].fill(0);
    for block in [1, 4096] {
        let fake = Fake::start(contents.clone(), Behaviour { block, ..Behaviour::default() });
        let disk = storage(&fake);
        let extents = |range, limit| disk.extents(range, ExtentQuery::Data, limit).expect("told");
        let extent = |start, end, present| Extent { range: ByteRange::between(start, end), present };
        let told = extents(ByteRange::new(100, 200_000), 9);
        assert_eq!(
            told,
            [extent(100, 65536, true), extent(65536, 131_072, false), extent(131_072, 200_100, true)]
        );
        assert_eq!(extents(ByteRange::new(70_000, 10), 9), [extent(70_000, 70_010, false)]);
        assert_eq!(extents(ByteRange::new(0, 1 << 20), 1), [extent(0, 65536, true)]);
        let whole = ByteRange::new(0, 1 << 20);
        let top = disk.extents(whole, ExtentQuery::TopLayer, 9);
        assert_eq!(top, Ok(vec![Extent { range: whole, present: true }]));
    }
    let fake = Fake::start(contents, Behaviour { structured: false, ..Behaviour::default() });
    let all = ByteRange::new(0, 1 << 20);
    let told = storage(&fake).extents(all, ExtentQuery::Data, 9);
    assert_eq!(told, Ok(vec![Extent { range: all, present: true }]));
}

/// Threads that read and write their own parts of one storage at a time.
fn hammer(disk: &dyn Storage, threads: usize, rounds: usize) {
    thread::scope(|scope| {
        for number in 0..threads {
            scope.spawn(move || {
                let base = number as u64 * 65536;
                for round in 0..rounds {
                    let fresh: Vec<u8> = (0..30_000).map(|at| (at + round * 31 + number) as u8).collect();
                    write_all(disk, base, &fresh);
                    assert_eq!(read_all(disk, base, fresh.len()), fresh, "thread {number}, round {round}");
                }
            });
        }
    });
}

#[test]
fn requests_of_many_threads_are_under_way_together() {
    for structured in [true, false] {
        let behaviour = Behaviour { structured, shuffles: true, ..Behaviour::default() };
        let fake = Fake::start(vec![0; 12 * 65536], behaviour);
        let disk = storage(&fake);
        hammer(disk.as_ref(), 12, 20);
        let Seen { together, connections, .. } = fake.seen();
        assert!(together >= 8, "{together} at a time");
        assert_eq!(connections, 1);
    }
}

#[test]
fn several_connections_where_the_server_allows_them() {
    let behaviour = Behaviour { flags: flag::ALL | flag::MULTI, shuffles: true, ..Behaviour::default() };
    let fake = Fake::start(vec![0; 12 * 65536], behaviour.clone());
    hammer(storage(&fake).as_ref(), 12, 20);
    assert!((2..=4).contains(&fake.seen().connections), "{:?}", fake.seen());
    // One that says so and takes no more than one all the same costs a moment, not the copy.
    let fake = Fake::start(vec![0; 12 * 65536], Behaviour { clients: 1, ..behaviour });
    hammer(storage(&fake).as_ref(), 12, 3);
}

/// `condition` comes true soon.
fn until(condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "it does not come true");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Of a server that takes several connections for one disk, and promises no more than the protocol: a flush covers what came over its own connection.
#[test]
fn a_flush_covers_what_was_written_over_any_connection() {
    let behaviour = Behaviour { flags: flag::ALL | flag::MULTI, shuffles: true, ..Behaviour::default() };
    let fake = Fake::start(vec![0; 12 * 65536], behaviour);
    let disk = storage(&fake);
    hammer(disk.as_ref(), 12, 20);
    assert!(fake.seen().connections > 1, "{:?}", fake.seen());
    let written = fake.contents();
    assert_eq!(disk.flush(), Ok(()));
    fake.lose_power();
    assert!(fake.contents() == written, "what was flushed is there");
}

/// The server has started anew, which the first connection has not heard of when there is a second request, a write or the flush itself.
#[test]
fn a_flush_does_not_succeed_on_a_server_that_has_started_anew() {
    for writes_anew in [false, true] {
        let behaviour = Behaviour { flags: flag::ALL | flag::MULTI, ..Behaviour::default() };
        let fake = Fake::start(vec![0; 65536], behaviour);
        let disk = storage(&fake);
        write_all(disk.as_ref(), 0, &[1; 4096]);
        fake.lose_power();
        assert!(fake.contents().iter().all(|&byte| byte == 0), "it was not flushed");
        thread::scope(|scope| {
            scope.spawn(|| disk.write_at(IoPath::Direct, 8192, &[2; 4096]).expect_err("nobody answers"));
            until(|| fake.seen().swallowed == 1);
            if writes_anew {
                write_all(disk.as_ref(), 16384, &[3; 4096]);
            }
            let flush = scope.spawn(|| disk.flush());
            thread::sleep(Duration::from_millis(50));
            fake.end_old_connections();
            let flushed = flush.join().expect("no panic");
            assert!(matches!(flushed, Err(Errno::ECONNRESET | Errno::EPIPE)), "{flushed:?}");
        });
        assert!(disk.flush().is_err(), "nor later");
        assert!(disk.read_at(IoPath::Direct, 0, &mut [0; 512]).is_err());
    }
}

#[test]
fn one_lost_connection_of_several_fails_the_flush() {
    let behaviour = Behaviour { flags: flag::ALL | flag::MULTI, shuffles: true, ..Behaviour::default() };
    for number in 1..=2 {
        let fake = Fake::start(vec![0; 12 * 65536], behaviour.clone());
        let disk = storage(&fake);
        hammer(disk.as_ref(), 12, 3);
        let before = fake.seen().connections;
        assert!(before > 1);
        fake.end_connection(number);
        assert!(disk.flush().is_err());
        assert_eq!(fake.seen().connections, before, "no other takes its place");
    }
}

#[test]
fn errors_of_the_server_are_the_systems() {
    for (code, errno) in [
        (1, Errno::EPERM),
        (5, Errno::EIO),
        (28, Errno::ENOSPC),
        (108, Errno::ESHUTDOWN),
        (4711, Errno::EINVAL),
    ] {
        let fake = Fake::start(
            pattern(65536),
            Behaviour { fails: Some((4096..8192, code)), ..Behaviour::default() },
        );
        let disk = storage(&fake);
        assert_eq!(disk.read_at(IoPath::Direct, 4096, &mut [0; 512]), Err(errno));
        assert_eq!(disk.write_at(IoPath::Direct, 8191, &[1; 1]), Err(errno));
        assert_eq!(disk.read_at(IoPath::Direct, 0, &mut [0; 512]), Ok(512), "the connection stands");
    }
}

#[test]
fn a_server_that_goes_away_fails_every_request_at_once() {
    let fake = Fake::start(pattern(1 << 20), Behaviour { dies_after: Some(5), ..Behaviour::default() });
    let disk = storage(&fake);
    thread::scope(|scope| {
        for number in 0..8 {
            let disk = &disk;
            scope.spawn(move || {
                let failed =
                    (0..10).find_map(|_| disk.read_at(IoPath::Direct, number * 4096, &mut [0; 4096]).err());
                assert!(matches!(failed, Some(Errno::ECONNRESET | Errno::EPIPE)), "{failed:?}");
            });
        }
    });
    assert!(disk.flush().is_err(), "what it had not flushed may be gone");
}

#[test]
fn a_server_that_lies_is_left() {
    let fake = Fake::start(pattern(1 << 20), Behaviour { lies_after: Some(2), ..Behaviour::default() });
    let disk = storage(&fake);
    let failed = (0..9).find_map(|_| disk.read_at(IoPath::Direct, 0, &mut [0; 4096]).err());
    assert_eq!(failed, Some(Errno::EPROTO));
    assert_eq!(disk.flush(), Err(Errno::EPROTO));
}

#[test]
fn what_cannot_be_opened() {
    let refused = |fake: &Fake, refusal, text: &str| {
        let error = open(fake).expect_err(text);
        assert_eq!(error.kind(), ErrorKind::Refused(refusal), "{error}");
        assert!(error.to_string().contains(text), "{error}");
        assert_eq!(error.to_string().lines().count(), 1);
    };
    let fake = |behaviour| Fake::start(vec![0; 512], behaviour);
    let unknown = (1 << 31) + 6;
    refused(
        &fake(Behaviour { refuses: Some(unknown), ..Behaviour::default() }),
        Refusal::NotFound,
        "no such export",
    );
    let tls = (1 << 31) + 5;
    refused(&fake(Behaviour { refuses: Some(tls), ..Behaviour::default() }), Refusal::Unsupported, "TLS");
    refused(
        &fake(Behaviour { greeting: b"HTTP/1.1 400 Bad Request\r\n", ..Behaviour::default() }),
        Refusal::NotADisk,
        "no NBD server",
    );
    refused(
        &fake(Behaviour { greeting: b"NBD", ..Behaviour::default() }),
        Refusal::Unavailable,
        "closed the connection",
    );
    refused(
        &fake(Behaviour { says_length: Some(u64::MAX), ..Behaviour::default() }),
        Refusal::TooLarge,
        "more than the largest disk",
    );
    let gone = Locator::parse("nbd+unix:///x?socket=/nowhere/socket").expect("a URI");
    let error = open_source(&gone, &SourceOptions::default()).expect_err("nothing there");
    assert_eq!(error.kind(), ErrorKind::Refused(Refusal::NotFound), "{error}");
    let closed = Locator::parse("nbd://127.0.0.1:1/x").expect("a URI");
    let error = open_source(&closed, &SourceOptions::default()).expect_err("nobody listens");
    assert!(error.to_string().contains("ECONNREFUSED"), "{error}");
}

/// Neither does a pause wait for a resume that cannot help, nor is each of the other clusters tried again and left out.
#[test]
fn a_server_that_goes_away_ends_the_copy_whatever_the_policy() {
    let length = 32 << 20;
    for policy in [ErrorPolicy::Stop, ErrorPolicy::Ignore, ErrorPolicy::Auto] {
        for source_dies in [true, false] {
            let behaviour = |dies: bool| Behaviour { dies_after: dies.then_some(20), ..Behaviour::default() };
            let from = Fake::start(pattern(length), behaviour(source_dies));
            let to = Fake::start(vec![0xaa; length], behaviour(!source_dies));
            let options = CopyOptions {
                on_source_error: policy,
                on_target_error: policy,
                ..CopyOptions::new(from.uri("disk"), to.uri("disk"))
            };
            let job = start(&options).expect("it starts").job;
            let result = job.wait_timeout(Duration::from_secs(20)).expect("it ends");
            let Outcome::Failed(error) = &result.outcome else { panic!("{policy:?}: {result:?}") };
            assert!(error.to_string().contains("the server, or the way to it, is gone"), "{error}");
            assert_eq!(result.progress.retries, 0);
        }
    }
}

fn copy(source: &str, target: &str, io_engine: IoEngine) -> Result<Outcome, Error> {
    let options =
        CopyOptions { io_engine, cluster_size: ClusterSize::DEFAULT, ..CopyOptions::new(source, target) };
    start(&options).map(|copy| copy.job.wait().outcome.clone())
}

/// Whole copies over both rings, between servers with blocks and payloads of all kinds.
#[test]
fn copies_between_servers() {
    let length = (5 << 20) + 512 * 3;
    let mut contents = pattern(length);
    contents[(1 << 20)..(3 << 20)].fill(0);
    for (block, io_engine) in
        [(1, IoEngine::Auto), (512, IoEngine::Threads), (65536, IoEngine::Auto), (65536, IoEngine::Threads)]
    {
        let length = length - length % block as usize;
        let contents = contents[..length].to_vec();
        let from = Fake::start(
            contents.clone(),
            Behaviour { shuffles: true, payload: 1 << 18, ..Behaviour::default() },
        );
        let behaviour = Behaviour { block, payload: 1 << 17, ..Behaviour::default() };
        let to = Fake::start(vec![0xaa; length + 65536], behaviour);
        let outcome = copy(&from.uri("disk"), &to.uri("disk"), io_engine).expect("it starts");
        assert!(matches!(outcome, Outcome::Complete), "{outcome:?}");
        assert!(to.contents()[..length] == contents, "blocks of {block}");
        assert!(to.contents()[length..].iter().all(|&byte| byte == 0xaa), "the rest is as it was");
        let seen = to.seen();
        assert!(seen.flushes > 0 && seen.refused == 0, "{seen:?}");
        assert!(seen.flushed_last, "nothing is written behind the last flush");
        let read = from.seen().read_bytes;
        assert!(read < length as u64 - (1 << 20), "holes are not read: {read}");
    }
}

#[test]
fn without_a_flush_every_write_is_durable_by_itself_or_nothing_is_promised() {
    let there = tempfile::tempdir().expect("a directory");
    let source = there.path().join("a");
    std::fs::write(&source, pattern(300_000)).expect("written");
    let source = source.to_str().expect("text");
    let fua =
        Fake::start(vec![0xaa; 300_000], Behaviour { flags: flag::HAS | flag::FUA, ..Behaviour::default() });
    let outcome = copy(source, &fua.uri(""), IoEngine::Auto).expect("it starts");
    assert!(matches!(outcome, Outcome::Complete), "{outcome:?}");
    assert!(fua.contents() == pattern(300_000));
    let Seen { writes, durable_writes, .. } = fua.seen();
    assert_eq!((writes > 0, writes), (true, durable_writes));
    let nothing = Fake::start(vec![0xaa; 300_000], Behaviour { flags: flag::HAS, ..Behaviour::default() });
    let copy = start(&CopyOptions::new(source, nothing.uri(""))).expect("it starts");
    assert!(copy.notices.iter().any(|notice| notice.contains("offers no flush")), "{:?}", copy.notices);
    let result = copy.job.wait();
    assert!(matches!(result.outcome, Outcome::Complete) && !result.durable, "{result:?}");
    let Seen { durable_writes, writes, .. } = nothing.seen();
    assert_eq!(durable_writes, 0);
    // A map would claim what nobody can promise.
    let map = there.path().join("m");
    let with_map = |to: &Fake| CopyOptions { map: Some(map.clone()), ..CopyOptions::new(source, to.uri("")) };
    let error = start(&with_map(&nothing)).expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::Refused(Refusal::Unsupported), "{error}");
    assert!(error.to_string().contains("leave out --map"), "{error}");
    assert_eq!((nothing.seen().writes, map.exists()), (writes, false), "untouched");
    let result = start(&with_map(&fua)).expect("it starts").job.wait();
    assert!(matches!(result.outcome, Outcome::Complete) && result.durable, "{result:?}");
}

#[test]
fn targets_that_are_refused_are_untouched() {
    let from = Fake::start(pattern(65536), Behaviour::default());
    let refused = |to: &Fake, refusal| {
        let error = copy(&from.uri("disk"), &to.uri("disk"), IoEngine::Auto).expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::Refused(refusal), "{error}");
        assert_eq!(to.seen().writes, 0);
    };
    let read_only = Behaviour { flags: flag::ALL | flag::READ_ONLY, ..Behaviour::default() };
    refused(&Fake::start(pattern(65536), read_only), Refusal::ReadOnly);
    refused(&Fake::start(pattern(65535), Behaviour::default()), Refusal::TooSmall);
    refused(&from, Refusal::SameDisk);
}
