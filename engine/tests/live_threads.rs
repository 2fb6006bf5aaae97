//! Real guest threads on a real engine: the backup is the disk at one instant, the disk holds every acknowledged write.
//!
//! Every block carries its number and version. Each thread has blocks of its own, so its writes are in order; begin and end of every
//! write are stamped by one counter. The backup is of one instant if no write that it lacks had ended before a write that it has began.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use engine::job::Outcome;
use engine::live::{BackupOptions, DiskOptions, Engine, EngineOptions, LiveDisk};
use engine::units::ByteRange;

const BLOCK: usize = 4096;

fn content(block: u64, version: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(block << 32 | version);
    let mut bytes = vec![0; BLOCK];
    random.fill(&mut bytes);
    bytes[..8].copy_from_slice(&version.to_le_bytes());
    bytes
}

fn make_disk(path: &Path, blocks: u64) {
    let file = File::create(path).unwrap();
    for block in 0..blocks {
        file.write_all_at(&content(block, 0), block * BLOCK as u64).unwrap();
    }
    file.sync_all().unwrap();
}

/// A write of a guest.
struct Written {
    block: u64,
    version: u64,
    began: u64,
    ended: u64,
}

/// How a guest writes.
#[derive(Clone, Copy, PartialEq)]
enum Path_ {
    /// Through the engine.
    Carried,
    /// By itself, under a permit.
    Own,
}

struct Guests {
    stop: AtomicBool,
    clock: AtomicU64,
}

fn guest(
    disk: &LiveDisk,
    file: Option<&File>,
    guests: &Guests,
    blocks: std::ops::Range<u64>,
    seed: u64,
) -> Vec<Written> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut versions = vec![0_u64; usize::try_from(blocks.end - blocks.start).unwrap()];
    let mut log = Vec::new();
    while !guests.stop.load(Ordering::Relaxed) {
        let block = random.u64(blocks.clone());
        let version = &mut versions[usize::try_from(block - blocks.start).unwrap()];
        *version += 1;
        let (offset, data) = (block * BLOCK as u64, content(block, *version));
        let began = guests.clock.fetch_add(1, Ordering::SeqCst);
        match file {
            Some(file) => {
                let _permit = disk.begin_write(ByteRange::new(offset, BLOCK as u64)).unwrap();
                file.write_all_at(&data, offset).unwrap();
            }
            None => disk.write(offset, data).unwrap(),
        }
        let ended = guests.clock.fetch_add(1, Ordering::SeqCst);
        log.push(Written { block, version: *version, began, ended });
    }
    log
}

fn version_of(file: &File, block: u64) -> u64 {
    let mut bytes = vec![0; BLOCK];
    file.read_exact_at(&mut bytes, block * BLOCK as u64).unwrap();
    let version = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    assert!(bytes == content(block, version), "block {block} is torn or of another place");
    version
}

fn check_backup(file: &File, logs: &[Vec<Written>], blocks: u64) {
    let versions: Vec<u64> = (0..blocks).map(|block| version_of(file, block)).collect();
    let mut last_begun = 0;
    let mut first_missing = u64::MAX;
    for written in logs.iter().flatten() {
        if versions[usize::try_from(written.block).unwrap()] >= written.version {
            last_begun = last_begun.max(written.began);
        } else {
            first_missing = first_missing.min(written.ended);
        }
    }
    assert!(
        first_missing >= last_begun,
        "the backup lacks a write that ended at {first_missing} and has one that began at {last_begun}"
    );
}

fn run(how: Path_, threads: u64, mebibytes: u64, rounds: u32) {
    let directory = tempfile::tempdir_in(std::env::var("TMPDIR").unwrap_or_else(|_| "/tmp".into())).unwrap();
    let path = directory.path().join("disk.img");
    let blocks = mebibytes << 20 >> 12;
    make_disk(&path, blocks);
    let engine = Engine::start(&EngineOptions::default()).unwrap();
    let disk = engine
        .open_disk(&DiskOptions { path: path.display().to_string(), writable: how == Path_::Carried })
        .unwrap();
    let guests = Arc::new(Guests { stop: AtomicBool::new(false), clock: AtomicU64::new(0) });
    let share = blocks / threads;
    let running: Vec<_> = (0..threads)
        .map(|thread| {
            let (disk, guests) = (disk.clone(), Arc::clone(&guests));
            let file = (how == Path_::Own).then(|| File::options().write(true).open(&path).unwrap());
            std::thread::spawn(move || {
                guest(&disk, file.as_ref(), &guests, thread * share..(thread + 1) * share, thread)
            })
        })
        .collect();
    let targets: Vec<_> = (0..rounds)
        .map(|round| {
            std::thread::sleep(Duration::from_millis(50));
            let target = directory.path().join(format!("backup{round}.img"));
            let options = BackupOptions::new(target.display().to_string());
            let backup = engine.start_backup(&disk, &options).unwrap();
            let result = backup.job.wait();
            assert!(matches!(result.outcome, Outcome::Complete), "{result:?}");
            target
        })
        .collect();
    guests.stop.store(true, Ordering::Relaxed);
    let logs: Vec<Vec<Written>> = running.into_iter().map(|thread| thread.join().unwrap()).collect();
    assert!(logs.iter().all(|log| !log.is_empty()), "every guest got on");
    for target in &targets {
        check_backup(&File::open(target).unwrap(), &logs, blocks);
    }
    let file = File::open(&path).unwrap();
    for log in &logs {
        let mut last = std::collections::BTreeMap::new();
        log.iter().for_each(|written| {
            last.insert(written.block, written.version);
        });
        for (block, version) in last {
            assert_eq!(version_of(&file, block), version, "an acknowledged write is missing");
        }
    }
}

#[test]
fn backups_of_a_disk_with_carried_writes_are_of_one_instant() {
    run(Path_::Carried, 8, 64, 3);
}

#[test]
fn backups_of_a_disk_with_writers_of_their_own_are_of_one_instant() {
    run(Path_::Own, 8, 64, 3);
}
