//! Moving bytes: reads and writes, lengths and offsets, the end of a file, errors, many at once.

use engine::ring::{IoPath, Op, Output, Ring, Token, ZeroMethod};
use engine::units::ByteRange;
use nix::errno::Errno;

use crate::support::{Fault, Fixture, Random, TestDisk, buffer, complete, pattern, run, skip};

const PATHS: [IoPath; 2] = [IoPath::Direct, IoPath::Buffered];

fn paths<F: Fixture>(fixture: &F) -> &'static [IoPath] {
    if fixture.has_direct() {
        return &PATHS;
    }
    skip("direct I/O", "the temporary directory's file system refuses it");
    &PATHS[1..]
}

/// What is written is there, and what is there is read, at any aligned place and length, in buffers of one page or many.
pub(crate) fn reads_and_writes<F: Fixture>() {
    let fixture = F::default();
    let mut ring = fixture.ring(4 << 20, 8);
    for &path in paths(&fixture) {
        let disk = fixture.disk(4 << 20);
        let file = ring.add_file(fixture.file(&disk)).unwrap();
        let mut shadow = vec![0; 4 << 20];
        for (round, (offset, length)) in
            [(0, 4096), (4096, 65536), (1 << 20, 1 << 20), (12288, 8192), ((4 << 20) - 4096, 4096)]
                .into_iter()
                .enumerate()
        {
            let bytes = pattern(round as u64, length);
            let (from, to) =
                (buffer(3, u32::try_from(length).unwrap()), buffer(512, u32::try_from(length).unwrap()));
            ring.arena_mut().slice_mut(from).copy_from_slice(&bytes);
            ring.arena_mut().slice_mut(to).fill(0xee);
            let done = Ok(Output::Bytes(u32::try_from(length).unwrap()));
            assert_eq!(run(&mut ring, Op::Write { file, offset, buffer: from, path }), done);
            let start = usize::try_from(offset).unwrap();
            shadow[start..start + length].copy_from_slice(&bytes);
            assert!(disk.contents() == shadow, "{path:?} write of {length} at {offset}");
            assert_eq!(run(&mut ring, Op::Read { file, offset, buffer: to, path }), done);
            assert!(ring.arena().slice(to) == bytes, "{path:?} read of {length} at {offset}");
        }
    }
}

/// Through the page cache, any offset and any length will do: the tail of a disk that ends in the middle of a sector.
pub(crate) fn unaligned_tails<F: Fixture>() {
    let fixture = F::default();
    let mut ring = fixture.ring(1 << 20, 8);
    for tail in [1, 511, 512, 513, 4095] {
        let length = 65536 + tail;
        let disk = fixture.disk(length);
        let file = ring.add_file(fixture.file(&disk)).unwrap();
        let bytes = pattern(tail, usize::try_from(tail).unwrap());
        let tail_buffer = buffer(0, u32::try_from(tail).unwrap());
        ring.arena_mut().slice_mut(tail_buffer).copy_from_slice(&bytes);
        let write = Op::Write { file, offset: 65536, buffer: tail_buffer, path: IoPath::Buffered };
        assert_eq!(run(&mut ring, write), Ok(Output::Bytes(tail_buffer.length)));
        let contents = disk.contents();
        assert_eq!(contents.len() as u64, length, "a write up to the end does not move it");
        assert!(contents[65536..] == bytes && contents[..65536].iter().all(|&byte| byte == 0));
        let odd = buffer(8, tail_buffer.length);
        let read = Op::Read { file, offset: 65535, buffer: odd, path: IoPath::Buffered };
        assert_eq!(run(&mut ring, read), Ok(Output::Bytes(odd.length)));
        assert_eq!(ring.arena().slice(odd)[1..], bytes[..bytes.len() - 1]);
    }
}

/// A read across the end is short, one past the end gives 0 bytes; neither is an error.
pub(crate) fn end_of_file<F: Fixture>() {
    let fixture = F::default();
    let mut ring = fixture.ring(1 << 20, 8);
    for &path in paths(&fixture) {
        let disk = fixture.disk(10_000);
        disk.fill(0, &pattern(5, 10_000));
        let file = ring.add_file(fixture.file(&disk)).unwrap();
        let whole = buffer(0, 65536);
        assert_eq!(
            run(&mut ring, Op::Read { file, offset: 0, buffer: whole, path }),
            Ok(Output::Bytes(10_000))
        );
        assert!(ring.arena().slice(whole.part(0, 10_000)) == pattern(5, 10_000));
        assert_eq!(
            run(&mut ring, Op::Read { file, offset: 8192, buffer: whole, path }),
            Ok(Output::Bytes(1808))
        );
        for offset in [12_288, 1 << 30] {
            assert_eq!(run(&mut ring, Op::Read { file, offset, buffer: whole, path }), Ok(Output::Bytes(0)));
        }
    }
}

/// Errors arrive as the kernel gave them, and the buffer comes back.
pub(crate) fn errors_are_raw<F: Fixture>() {
    let fixture = F::default();
    let mut ring = fixture.ring(1 << 20, 8);
    let page = buffer(0, 4096);
    let buffered = IoPath::Buffered;
    for (fault, read, errno) in [
        (Fault::WriteToReadOnly, false, Errno::EBADF),
        (Fault::UnreadableData, true, Errno::EIO),
        (Fault::Full, false, Errno::ENOSPC),
    ] {
        let Some(storage) = fixture.faulty(fault) else {
            skip(&format!("{fault:?}"), "this host has no such storage");
            continue;
        };
        let file = ring.add_file(storage).unwrap();
        let op = if read {
            Op::Read { file, offset: 0, buffer: page, path: buffered }
        } else {
            Op::Write { file, offset: 0, buffer: page, path: buffered }
        };
        assert_eq!(run(&mut ring, op), Err(errno), "{fault:?}");
        assert!(!ring.arena().is_lent(page));
    }
    let file = ring.add_file(fixture.file(&fixture.disk(8192))).unwrap();
    let nothing = Op::WriteZeroes { file, range: ByteRange::new(0, 0), method: ZeroMethod::Keep };
    assert_eq!(run(&mut ring, nothing), Err(Errno::EINVAL));
    for &path in paths(&fixture) {
        // Some file systems refuse misaligned direct I/O, some do it through the page cache.
        let misaligned = Op::Read { file, offset: 1, buffer: page, path };
        let result = run(&mut ring, misaligned);
        assert!(matches!(result, Err(Errno::EINVAL) | Ok(Output::Bytes(4096))), "{path:?} {result:?}");
    }
}

/// A direct transfer on a storage that refuses direct I/O is an error of the operation, not of the program.
pub(crate) fn direct_where_refused<F: Fixture>() {
    let fixture = F::default();
    let Some(blocked) = fixture.blocked() else {
        return skip("direct I/O where it is refused", "this ring has no storage without it");
    };
    let mut ring = fixture.ring(1 << 20, 8);
    let file = ring.add_file(blocked.file).unwrap();
    let page = buffer(0, 4096);
    let direct = Op::Read { file, offset: 0, buffer: page, path: IoPath::Direct };
    assert_eq!(run(&mut ring, direct), Err(Errno::EINVAL));
    assert!(!ring.arena().is_lent(page));
}

struct Pending {
    offset: u64,
    page: u32,
    length: u32,
    write: Option<Vec<u8>>,
    done: bool,
}

/// Many operations in random order and of random kinds, on disjoint parts of a disk: each completes exactly once, with the
/// contents that a shadow of the disk says.
pub(crate) fn many_in_any_order<F: Fixture>() {
    const CAPACITY: usize = 64;
    const AREA: u32 = 65536;
    let fixture = F::default();
    let mut ring = fixture.ring(CAPACITY * AREA as usize, CAPACITY);
    let paths = paths(&fixture);
    let disk = fixture.disk(u64::from(AREA) * CAPACITY as u64);
    let mut shadow = pattern(1, CAPACITY * AREA as usize);
    disk.fill(0, &shadow);
    let file = ring.add_file(fixture.file(&disk)).unwrap();
    let path = paths[0];
    let mut random = Random(0x5eed);
    for round in 0..40_u64 {
        let count = 1 + random.below(CAPACITY as u64);
        let mut pending = Vec::new();
        for index in 0..count {
            let pages = 1 + u32::try_from(random.below(16)).unwrap();
            let page = u32::try_from(index).unwrap() * (AREA / 4096);
            let skip_pages = random.below(u64::from(17 - pages));
            let offset = index * u64::from(AREA) + skip_pages * 4096;
            let length = pages * 4096;
            let write = (random.below(2) == 0).then(|| pattern(round << 8 | index, length as usize));
            let part = buffer(page, length);
            if let Some(bytes) = &write {
                ring.arena_mut().slice_mut(part).copy_from_slice(bytes);
                ring.push(Token(index), Op::Write { file, offset, buffer: part, path });
            } else {
                ring.push(Token(index), Op::Read { file, offset, buffer: part, path });
            }
            pending.push(Pending { offset, page, length, write, done: false });
        }
        assert_eq!(ring.in_flight() as u64, count);
        for completion in complete(&mut ring, usize::try_from(count).unwrap()) {
            let one = &mut pending[usize::try_from(completion.token.0).unwrap()];
            assert!(!std::mem::replace(&mut one.done, true), "{:?} completed twice", completion.token);
            assert_eq!(completion.result, Ok(Output::Bytes(one.length)));
            let start = usize::try_from(one.offset).unwrap();
            let there = &mut shadow[start..start + one.length as usize];
            match &one.write {
                Some(bytes) => there.copy_from_slice(bytes),
                None => assert!(ring.arena().slice(buffer(one.page, one.length)) == there),
            }
        }
        assert!(pending.iter().all(|one| one.done) && ring.in_flight() == 0);
    }
    assert!(disk.contents() == shadow);
}

/// A storage without descriptors takes any number of transfers at once.
pub(crate) fn null_storage<F: Fixture>() {
    let fixture = F::default();
    let Some(null) = fixture.null() else {
        return skip("null storage", "this ring has none");
    };
    let mut ring = fixture.ring(1 << 20, 16);
    let file = ring.add_file(null).unwrap();
    for _ in 0..100 {
        for index in 0..16_u32 {
            let part = buffer(index * 16, 65536);
            let (offset, path) = (u64::from(index) << 16, IoPath::Buffered);
            let op = if index % 2 == 0 {
                Op::Read { file, offset, buffer: part, path }
            } else {
                Op::Write { file, offset, buffer: part, path }
            };
            ring.push(Token(u64::from(index)), op);
            assert!(ring.arena().is_lent(part), "lent until the completion is returned");
        }
        let completions = complete(&mut ring, 16);
        assert!(completions.iter().all(|completion| completion.result == Ok(Output::Bytes(65536))));
        assert!(!ring.arena().is_lent(buffer(0, 1 << 20)));
    }
}
