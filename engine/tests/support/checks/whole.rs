//! Everything that is not a transfer: zeroing, discard, allocation, flush, extents, checksums, documents.

use engine::ring::{Extent, ExtentQuery, IoPath, Op, Output, Ring, ZeroMethod};
use engine::units::ByteRange;
use nix::errno::Errno;
use xxhash_rust::xxh3::xxh3_128;

use crate::support::{Fault, Fixture, TestDisk, buffer, pattern, run, skip};

const MIB: u64 = 1 << 20;

/// Both ways of zeroing leave zeros there, everything else as it was, and the space kept or given back.
pub(crate) fn write_zeroes<F: Fixture>() {
    let fixture = F::default();
    let mut ring = fixture.ring(1 << 20, 8);
    for method in [ZeroMethod::Keep, ZeroMethod::Unmap] {
        let disk = fixture.disk(MIB);
        let mut shadow = pattern(3, 1 << 20);
        disk.fill(0, &shadow);
        let before = disk.allocated();
        let file = ring.add_file(fixture.file(&disk)).unwrap();
        let range = ByteRange::new(65536, 262_144);
        assert_eq!(run(&mut ring, Op::WriteZeroes { file, range, method }), Ok(Output::Done));
        shadow[65536..65536 + 262_144].fill(0);
        assert!(disk.contents() == shadow, "{method:?}");
        if let (Some(before), Some(after)) = (before, disk.allocated()) {
            // Up to the file system's own blocks, in which it notes the hole.
            let given_back = if method == ZeroMethod::Keep { 0 } else { 262_144 };
            assert!(before.abs_diff(after + given_back) <= 65536, "{method:?}: {before} bytes, then {after}");
        }
    }
    let Some(storage) = fixture.faulty(Fault::NoZeroing) else {
        return skip("zeroing where there is none", "this host has no tmpfs at /dev/shm");
    };
    let file = ring.add_file(storage).unwrap();
    let range = ByteRange::new(0, 4096);
    let zero = Op::WriteZeroes { file, range, method: ZeroMethod::Keep };
    assert_eq!(run(&mut ring, zero), Err(Errno::EOPNOTSUPP));
}

/// Zeroing beyond the end succeeds without moving it.
pub(crate) fn zeroing_keeps_the_length<F: Fixture>() {
    let fixture = F::default();
    let mut ring = fixture.ring(1 << 20, 8);
    let disk = fixture.disk(5000);
    disk.fill(0, &[1; 5000]);
    let file = ring.add_file(fixture.file(&disk)).unwrap();
    for method in [ZeroMethod::Keep, ZeroMethod::Unmap] {
        let range = ByteRange::new(4096, 4096);
        assert_eq!(run(&mut ring, Op::WriteZeroes { file, range, method }), Ok(Output::Done));
    }
    let contents = disk.contents();
    assert_eq!(contents.len(), 5000);
    assert!(contents[..4096].iter().all(|&byte| byte == 1) && contents[4096..].iter().all(|&byte| byte == 0));
}

/// A discard leaves what is around it alone.
pub(crate) fn discard<F: Fixture>() {
    let fixture = F::default();
    let mut ring = fixture.ring(1 << 20, 8);
    let disk = fixture.disk(MIB);
    let shadow = pattern(4, 1 << 20);
    disk.fill(0, &shadow);
    let file = ring.add_file(fixture.file(&disk)).unwrap();
    let range = ByteRange::new(65536, 65536);
    assert_eq!(run(&mut ring, Op::Discard { file, range }), Ok(Output::Done));
    let contents = disk.contents();
    assert!(contents[..65536] == shadow[..65536] && contents[131_072..] == shadow[131_072..]);
}

/// Allocation takes space, and changes neither contents nor length.
pub(crate) fn allocate<F: Fixture>() {
    let fixture = F::default();
    let mut ring = fixture.ring(1 << 20, 8);
    let disk = fixture.disk(MIB);
    disk.fill(0, &[7; 4096]);
    let (contents, before) = (disk.contents(), disk.allocated());
    let file = ring.add_file(fixture.file(&disk)).unwrap();
    let ranges = vec![ByteRange::new(65536, 131_072), ByteRange::new(524_288, 2 * MIB)];
    let asked: u64 = ranges.iter().map(|range| range.length).sum();
    assert_eq!(run(&mut ring, Op::Allocate { file, ranges }), Ok(Output::Done));
    assert!(disk.contents() == contents, "allocated space reads as before, and the end stays");
    if let (Some(before), Some(after)) = (before, disk.allocated()) {
        assert!(after >= before + asked, "{before} bytes, then {after}");
    }
}

/// A flush succeeds, with and without anything to flush; so does dropping the cache.
pub(crate) fn flush_and_drop_cache<F: Fixture>() {
    let fixture = F::default();
    let mut ring = fixture.ring(1 << 20, 8);
    let disk = fixture.disk(MIB);
    let file = ring.add_file(fixture.file(&disk)).unwrap();
    assert_eq!(run(&mut ring, Op::Flush { file }), Ok(Output::Done));
    let part = buffer(0, 65536);
    ring.arena_mut().slice_mut(part).fill(9);
    let write = Op::Write { file, offset: 0, buffer: part, path: IoPath::Buffered };
    assert_eq!(run(&mut ring, write), Ok(Output::Bytes(65536)));
    assert_eq!(run(&mut ring, Op::Flush { file }), Ok(Output::Done));
    let range = ByteRange::new(0, 65536);
    assert_eq!(run(&mut ring, Op::DropCache { file, range }), Ok(Output::Done));
    assert!(disk.contents()[..65536].iter().all(|&byte| byte == 9));
}

/// Extents alternate between data and holes, start where asked, end where asked, or at the limit.
pub(crate) fn extents<F: Fixture>() {
    let fixture = F::default();
    let mut ring = fixture.ring(1 << 20, 8);
    let disk = fixture.disk(MIB);
    disk.fill(65536, &[1; 65536]);
    disk.fill(262_144, &[1; 65536]);
    let file = ring.add_file(fixture.file(&disk)).unwrap();
    let range = ByteRange::new(4096, MIB - 4096);
    let all = [
        (4096, 65536, false),
        (65536, 131_072, true),
        (131_072, 262_144, false),
        (262_144, 327_680, true),
        (327_680, MIB, false),
    ]
    .map(|(start, end, present)| Extent { range: ByteRange::between(start, end), present });
    for limit in [1, 2, 5, 100] {
        let found = run(&mut ring, Op::Extents { file, range, query: ExtentQuery::Data, limit });
        assert_eq!(found, Ok(Output::Extents(all[..limit.min(5)].to_vec())), "limit {limit}");
    }
    let found = run(&mut ring, Op::Extents { file, range, query: ExtentQuery::TopLayer, limit: 8 });
    assert_eq!(found, Ok(Output::Extents(vec![Extent { range, present: true }])));
}

/// A checksum for each chunk, the last one shorter.
pub(crate) fn digests<F: Fixture>() {
    let fixture = F::default();
    let mut ring = fixture.ring(1 << 20, 8);
    for (length, chunk) in [(262_144, 65536), (200_000, 65536), (4096, 65536), (1, 4096)] {
        let bytes = pattern(u64::from(chunk), length);
        let part = buffer(2, u32::try_from(length).unwrap());
        ring.arena_mut().slice_mut(part).copy_from_slice(&bytes);
        let expected = bytes.chunks(chunk as usize).map(xxh3_128).collect();
        assert_eq!(run(&mut ring, Op::Digest { buffer: part, chunk }), Ok(Output::Digests(expected)));
    }
}

/// A document is replaced as a whole and removed; that it is missing already is no error.
pub(crate) fn documents<F: Fixture>() {
    let fixture = F::default();
    let mut ring = fixture.ring(1 << 20, 8);
    let (document, inspect) = fixture.document();
    let document = ring.add_document(document).unwrap();
    assert_eq!(inspect(), None);
    for contents in [None, Some(b"first".to_vec()), Some(vec![7; 100_000]), Some(Vec::new()), None, None] {
        let publish = Op::Publish { document, contents: contents.clone() };
        assert_eq!(run(&mut ring, publish), Ok(Output::Done));
        assert_eq!(inspect(), contents);
    }
}
