//! A file's holes as the kernel tells them, and against a file that changes, or lies, between any two calls: the answer
//! stays contiguous, ascending, within bounds, and never calls a hole what lies beyond the end.

use std::cell::RefCell;
use std::os::unix::fs::FileExt;

use proptest::prelude::*;

use super::*;

fn open(file: &tempfile::NamedTempFile) -> FileStorage {
    FileStorage::from_files("test", file.reopen().expect("reopen"), None).expect("storage")
}

fn data(storage: &FileStorage, offset: u64, length: u64, limit: usize) -> Vec<(u64, u64, bool)> {
    let extents = storage.extents(ByteRange::new(offset, length), ExtentQuery::Data, limit).expect("extents");
    extents.iter().map(|e| (e.range.offset, e.range.end(), e.present)).collect()
}

#[test]
fn holes_are_found_and_the_answer_is_bounded() {
    let file = tempfile::NamedTempFile::new().expect("file");
    file.as_file().set_len(1 << 20).expect("length");
    file.as_file().write_all_at(&[1; 65536], 256 << 10).expect("write");
    let storage = open(&file);
    let (k, mib) = (1 << 10, 1 << 20);
    assert_eq!(
        data(&storage, 0, mib, 10),
        [(0, 256 * k, false), (256 * k, 320 * k, true), (320 * k, mib, false)]
    );
    assert_eq!(data(&storage, 0, mib, 1), [(0, 256 * k, false)]);
    assert_eq!(data(&storage, 300 * k, 4 * k, 8), [(300 * k, 304 * k, true)]);
    let top = storage.extents(ByteRange::new(0, mib), ExtentQuery::TopLayer, 1).expect("top");
    assert_eq!(top, [Extent { range: ByteRange::new(0, mib), present: true }]);
}

#[test]
fn what_lies_beyond_the_end_is_data() {
    let file = tempfile::NamedTempFile::new().expect("file");
    file.as_file().set_len(1 << 20).expect("length");
    let storage = open(&file);
    file.as_file().set_len(512 << 10).expect("shrink");
    assert_eq!(data(&storage, 0, 1 << 20, 10), [(0, 512 << 10, false), (512 << 10, 1 << 20, true)]);
    assert_eq!(data(&storage, 768 << 10, 4096, 10), [(768 << 10, (768 << 10) + 4096, true)]);
    let mut buffer = [0; 4096];
    assert_eq!(storage.read_at(IoPath::Buffered, 768 << 10, &mut buffer), Ok(0));
}

#[test]
fn zeroing_allocating_and_dropping_leave_the_right_bytes() {
    let file = tempfile::NamedTempFile::new().expect("file");
    file.as_file().write_all_at(&[7; 16384], 0).expect("write");
    let storage = open(&file);
    let part = ByteRange::new(4096, 4096);
    for method in [ZeroMethod::Unmap, ZeroMethod::Keep] {
        match storage.write_zeroes(part, method) {
            Ok(()) => {
                let mut buffer = [1; 4096];
                assert_eq!(storage.read_at(IoPath::Buffered, 4096, &mut buffer), Ok(4096));
                assert_eq!(buffer, [0; 4096], "{method:?}");
                assert_eq!(storage.write_at(IoPath::Buffered, 4096, &[7; 4096]), Ok(4096));
            }
            Err(error) => assert_eq!(error, Errno::EOPNOTSUPP),
        }
    }
    match storage.allocate(&[ByteRange::new(0, 4096), ByteRange::new(65536, 65536)]) {
        Ok(()) | Err(Errno::EOPNOTSUPP) => {}
        Err(error) => panic!("{error}"),
    }
    storage.flush().expect("flush");
    storage.drop_cache(ByteRange::new(0, 16384)).expect("drop");
    assert_eq!(file.as_file().metadata().expect("metadata").len(), 16384, "the length is kept");
    assert_eq!(storage.read_at(IoPath::Direct, 0, &mut [0; 512]), Err(Errno::EINVAL), "no direct I/O here");
}

/// Answers from a list of random numbers: a file that changes under the hands, or a file system that lies.
struct Liar {
    answers: RefCell<Vec<(u8, u64)>>,
}

impl Liar {
    fn answer(&self) -> Result<u64, Errno> {
        let (kind, value) = self.answers.borrow_mut().pop().unwrap_or((3, 0));
        match kind % 6 {
            0..=2 => Ok(value),
            3 => Err(Errno::ENXIO),
            4 => Err(Errno::EINVAL),
            _ => Err(Errno::EIO),
        }
    }
}

impl Seek for Liar {
    fn size(&self) -> Result<u64, Errno> {
        self.answer().or(Ok(0))
    }

    fn seek(&self, _: u64, _: Whence) -> Result<u64, Errno> {
        self.answer()
    }
}

/// A file of `size` bytes whose byte ranges alternate between hole and data at `borders`.
struct Model {
    size: u64,
    borders: Vec<u64>,
}

impl Model {
    fn is_data(&self, at: u64) -> bool {
        self.borders.iter().filter(|&&border| border <= at).count() % 2 == 1
    }
}

impl Seek for Model {
    fn size(&self) -> Result<u64, Errno> {
        Ok(self.size)
    }

    fn seek(&self, offset: u64, whence: Whence) -> Result<u64, Errno> {
        let wants_data = matches!(whence, Whence::SeekData);
        match (offset..self.size).find(|&at| self.is_data(at) == wants_data) {
            Some(at) => Ok(at),
            None if wants_data || offset >= self.size => Err(Errno::ENXIO),
            None => Ok(self.size),
        }
    }
}

proptest! {
    #[test]
    fn the_answer_is_contiguous_whatever_the_file_does(
        answers in proptest::collection::vec((0_u8..6, 0_u64..3000), 0..40),
        offset in 0_u64..1000, length in 1_u64..2000, limit in 1_usize..6,
    ) {
        let range = ByteRange::new(offset, length);
        if let Ok(extents) = seek_extents(&Liar { answers: RefCell::new(answers) }, range, limit) {
            prop_assert!(!extents.is_empty() && extents.len() <= limit);
            let mut at = offset;
            for extent in &extents {
                prop_assert_eq!(extent.range.offset, at);
                prop_assert!(!extent.range.is_empty());
                at = extent.range.end();
            }
            prop_assert!(at <= range.end() && (extents.len() == limit || at == range.end()));
        }
    }

    #[test]
    fn every_byte_is_told_as_it_is(
        mut borders in proptest::collection::vec(0_u64..300, 0..12),
        size in 0_u64..300, offset in 0_u64..300, length in 1_u64..300,
    ) {
        borders.sort_unstable();
        let file = Model { size, borders };
        let range = ByteRange::new(offset, length);
        let extents = seek_extents(&file, range, usize::MAX).expect("a model has no errors");
        for extent in &extents {
            for at in extent.range.offset..extent.range.end() {
                prop_assert_eq!(extent.present, at >= size || file.is_data(at), "byte {}", at);
            }
        }
        prop_assert_eq!(extents.last().map(|last| last.range.end()), Some(range.end()));
        prop_assert!(extents.windows(2).all(|pair| pair[0].present != pair[1].present), "joined");
    }
}
