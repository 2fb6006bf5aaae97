//! A storage whose flush is more than one system call is asked to flush itself, whichever ring it is on.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use engine::ring::select::{IoEngine, OpenedRing, RingConfig, open};
use engine::ring::{Extent, ExtentQuery, IoPath, Op, Output, Ring, Token, Wait, ZeroMethod};
use engine::storage::{Descriptors, Document, Limits, Storage};
use engine::units::{ByteRange, Length};
use nix::errno::Errno;

/// Its flush fails; one by the kernel, on its descriptor, would succeed.
struct Apart {
    file: File,
    flushes: AtomicU32,
}

impl Storage for Apart {
    fn name(&self) -> &'static str {
        "apart"
    }
    fn limits(&self) -> Limits {
        Limits { length: Length(0), direct_alignment: None }
    }
    fn descriptors(&self) -> Option<Descriptors<'_>> {
        Some(Descriptors { direct: None, buffered: self.file.as_fd(), block_device: false })
    }
    fn read_at(&self, _: IoPath, _: u64, _: &mut [u8]) -> Result<usize, Errno> {
        Ok(0)
    }
    fn write_at(&self, _: IoPath, _: u64, buffer: &[u8]) -> Result<usize, Errno> {
        Ok(buffer.len())
    }
    fn write_zeroes(&self, _: ByteRange, _: ZeroMethod) -> Result<(), Errno> {
        Ok(())
    }
    fn discard(&self, _: ByteRange) -> Result<(), Errno> {
        Ok(())
    }
    fn allocate(&self, _: &[ByteRange]) -> Result<(), Errno> {
        Ok(())
    }
    fn flush(&self) -> Result<(), Errno> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        Err(Errno::EIO)
    }
    fn flush_is_plain(&self) -> bool {
        false
    }
    fn drop_cache(&self, _: ByteRange) -> Result<(), Errno> {
        Ok(())
    }
    fn extents(&self, range: ByteRange, _: ExtentQuery, _: usize) -> Result<Vec<Extent>, Errno> {
        Ok(vec![Extent { range, present: true }])
    }
}

fn flush_on(
    ring: &mut impl Ring<File = Arc<dyn Storage>, Document = Arc<dyn Document>>,
) -> Result<Output, Errno> {
    let storage = Arc::new(Apart { file: tempfile::tempfile().unwrap(), flushes: AtomicU32::new(0) });
    let file = ring.add_file(Arc::clone(&storage) as Arc<dyn Storage>).unwrap();
    ring.push(Token(7), Op::Flush { file });
    let mut completions = Vec::new();
    ring.wait(Wait::Forever, &mut completions).unwrap();
    assert_eq!(storage.flushes.load(Ordering::SeqCst), 1);
    completions.remove(0).result
}

#[test]
fn a_flush_that_is_more_than_one_call_is_the_storages_own() {
    for engine in [IoEngine::Auto, IoEngine::Threads] {
        let config = RingConfig { arena_bytes: 4096, capacity: 4, threads: 1, sockets: 0 };
        let result = match open(engine, &config).unwrap().ring {
            OpenedRing::Uring(mut ring) => flush_on(&mut ring),
            OpenedRing::Threads(mut ring) => flush_on(&mut ring),
        };
        assert_eq!(result, Err(Errno::EIO), "{engine:?}");
    }
}
