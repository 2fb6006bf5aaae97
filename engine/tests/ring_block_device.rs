//! Rings on a real block device (a loop device over a file; needs root): zeroing, discard by command and by ioctl.

#[path = "support/plain.rs"]
mod plain;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use engine::ring::select::{IoEngine, OpenedRing, RingConfig, open};
use engine::ring::{BufferRange, FileId, IoPath, Op, Output, Ring, Token, Wait, ZeroMethod};
use engine::storage::Storage;
use engine::units::ByteRange;
use nix::errno::Errno;
use plain::PlainFile;

const BYTES: usize = 8 << 20;

const CONFIG: RingConfig = RingConfig { arena_bytes: BYTES, capacity: 8, threads: 2, sockets: 0 };

/// A loop device over a file full of ones; gone when dropped.
struct Loop {
    device: PathBuf,
    backing: tempfile::NamedTempFile,
}

impl Loop {
    fn new() -> Option<Self> {
        let backing = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(backing.path(), vec![1; BYTES]).unwrap();
        let output = Command::new("losetup").args(["--find", "--show"]).arg(backing.path()).output();
        match output {
            Ok(output) if output.status.success() => {
                let device = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim());
                Some(Self { device, backing })
            }
            failed => {
                eprintln!("skipped: block devices: no loop device to be had here: {failed:?}");
                None
            }
        }
    }

    fn allocated(&self) -> u64 {
        let file = self.backing.as_file();
        file.sync_all().unwrap();
        std::fs::metadata(self.backing.path()).unwrap().blocks() * 512
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let status = Command::new("losetup").arg("--detach").arg(&self.device).status();
        assert!(status.is_ok_and(|status| status.success()), "{} is left behind", self.device.display());
    }
}

fn run<R: Ring>(ring: &mut R, op: Op) -> Result<Output, Errno> {
    let mut completions = Vec::new();
    ring.push(Token(0), op);
    while completions.is_empty() {
        ring.wait(Wait::Forever, &mut completions).unwrap();
    }
    completions.remove(0).result
}

/// What the whole device holds: for each MiB its byte, the same throughout.
fn bytes<R: Ring>(ring: &mut R, file: FileId) -> Vec<u8> {
    let whole = BufferRange { start: 0, length: 8 << 20 };
    let read = Op::Read { file, offset: 0, buffer: whole, path: IoPath::Direct };
    assert_eq!(run(ring, read), Ok(Output::Bytes(8 << 20)));
    ring.arena()
        .slice(whole)
        .chunks(1 << 20)
        .map(|chunk| {
            assert!(chunk.iter().all(|&byte| byte == chunk[0]));
            chunk[0]
        })
        .collect()
}

fn device<R: Ring<File = Arc<dyn Storage>>>(ring: &mut R, path: &Path, disk: &Loop) {
    const MIB: u64 = 1 << 20;
    let storage = Arc::new(PlainFile::open(path, true).unwrap());
    assert!(storage.descriptors().unwrap().block_device);
    let file = ring.add_file(Arc::clone(&storage) as Arc<dyn Storage>).unwrap();
    assert_eq!(bytes(ring, file), [1; 8]);

    let (method, range) = (ZeroMethod::Keep, ByteRange::new(MIB, MIB));
    assert_eq!(run(ring, Op::WriteZeroes { file, range, method }), Ok(Output::Done));
    let (method, range) = (ZeroMethod::Unmap, ByteRange::new(3 * MIB, MIB));
    assert_eq!(run(ring, Op::WriteZeroes { file, range, method }), Ok(Output::Done));
    assert_eq!(bytes(ring, file), [1, 0, 1, 0, 1, 1, 1, 1]);

    let before = disk.allocated();
    assert_eq!(run(ring, Op::Discard { file, range: ByteRange::new(5 * MIB, MIB) }), Ok(Output::Done));
    assert_eq!(bytes(ring, file), [1, 0, 1, 0, 1, 0, 1, 1], "loop devices read discarded ranges as zeros");
    // Up to the file system's own blocks, in which it notes the hole.
    assert!(before - disk.allocated() >= MIB - 65536);
    println!("{}: {} discards by ioctl", ring.name(), storage.discards.load(Ordering::Relaxed));

    // What the command refuses is left to the ioctl, whose word is final.
    let before = storage.discards.load(Ordering::Relaxed);
    let odd = Op::Discard { file, range: ByteRange::new(1, MIB) };
    assert_eq!(run(ring, odd), Err(Errno::EINVAL));
    assert_eq!(storage.discards.load(Ordering::Relaxed), before + 1);
    let again = Op::Discard { file, range: ByteRange::new(6 * MIB, MIB) };
    assert_eq!(run(ring, again), Ok(Output::Done));
    assert_eq!(bytes(ring, file), [1, 0, 1, 0, 1, 0, 0, 1]);
    assert_eq!(run(ring, Op::Flush { file }), Ok(Output::Done));
}

#[test]
fn a_block_device_under_each_ring() {
    for engine in [IoEngine::Auto, IoEngine::Threads] {
        let Some(disk) = Loop::new() else { return };
        match open(engine, &CONFIG).unwrap().ring {
            OpenedRing::Uring(mut ring) => device(&mut ring, &disk.device, &disk),
            OpenedRing::Threads(mut ring) => device(&mut ring, &disk.device, &disk),
        }
    }
}
