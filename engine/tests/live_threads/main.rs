//! Real guest threads on a real engine, over a file and over a loop device: each backup is the disk at one instant, byte for byte, the snapshot
//! shows the same while the job runs, and in the end the disk holds every acknowledged write.
//!
//! Each thread has a part of the disk of its own, so it knows at any time what that holds (`shadow`), and logs what it does with the times
//! at which it began and ended, by one counter for all. Afterwards the log is played back to find after which of its requests a part was as the
//! backup has it; of all parts that must have been at the same time (`instant`).
//!
//! `LIVE_THREADS_SECONDS=450 cargo test -p engine --test live_threads -- --test-threads 1` runs each of the four for so long.

mod guest;
mod instant;
mod media;
mod shadow;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use engine::job::Outcome;
use engine::live::{Backup, BackupOptions, DiskOptions, Engine, EngineOptions, FleeceOptions, LiveDisk};
use engine::units::{ByteRange, ClusterSize};
use guest::{Guest, How, Shared};
use instant::Replay;
use media::Medium;

const THREADS: u64 = 8;
/// Of the disk; each thread has an eighth.
const BYTES: u64 = 32 << 20;
/// Backups at least.
const ROUNDS: u32 = 4;
/// Most reads of a snapshot in a round.
const READS: usize = 400;

/// A different job each time.
fn options(directory: &Path, round: u32) -> BackupOptions {
    let mut options = BackupOptions::new(directory.join(format!("backup{round}")).display().to_string());
    match round % 4 {
        1 => {
            let path = directory.join(format!("fleece{round}")).display().to_string();
            options.fleece = Some(FleeceOptions { path, size: 4 << 20 });
        }
        2 => {
            options.cluster_size = ClusterSize::new(4096).unwrap();
            options.speed = std::num::NonZeroU64::new(48 << 20);
        }
        3 => options.cluster_size = ClusterSize::new(1 << 20).unwrap(),
        _ => {}
    }
    options
}

/// Read here and there until the job is over: where, and what was there at t0.
fn read_snapshot(backup: &Backup, random: &mut fastrand::Rng) -> Vec<(u64, Vec<u8>)> {
    let mut reads = Vec::new();
    while backup.job.wait_timeout(Duration::ZERO).is_none() && reads.len() < READS {
        let offset = random.u64(..BYTES);
        let length = random.u64(1..300_000).min(BYTES - offset);
        match backup.snapshot.read(offset, usize::try_from(length).unwrap()) {
            Ok(bytes) => reads.push((offset, bytes)),
            Err(error) => assert!(error.to_string().contains("has ended"), "{error}"),
        }
    }
    reads
}

/// One backup, and what it must be. How many reads of its snapshot there were.
fn back_up(
    engine: &Engine,
    disk: &LiveDisk,
    options: &BackupOptions,
    shared: &Shared,
    replays: &mut [Replay],
    random: &mut fastrand::Rng,
) -> usize {
    let before = shared.clock.fetch_add(1, Ordering::SeqCst);
    let backup = engine.start_backup(disk, options).unwrap();
    let after = shared.clock.fetch_add(1, Ordering::SeqCst);
    let reads = read_snapshot(&backup, random);
    let result = backup.job.wait();
    assert!(matches!(result.outcome, Outcome::Complete), "{result:?}");
    let copy = std::fs::read(&options.target).unwrap();
    assert_eq!(copy.len() as u64, BYTES);
    for (offset, bytes) in &reads {
        let start = usize::try_from(*offset).unwrap();
        assert!(copy[start..start + bytes.len()] == **bytes, "the snapshot at {offset} is not the backup");
    }
    shared.wait_for_logs_after(after);
    let candidates: Vec<_> = replays
        .iter_mut()
        .zip(&shared.logs)
        .map(|(replay, log)| replay.candidates(std::mem::take(&mut *log.lock()), before, after, &copy))
        .collect();
    instant::check(&candidates);
    std::fs::remove_file(&options.target).unwrap();
    reads.len()
}

fn run(medium: &Medium, how: How) {
    let seconds =
        std::env::var("LIVE_THREADS_SECONDS").map_or(0, |seconds| seconds.parse().expect("a number"));
    let end = Instant::now() + Duration::from_secs(seconds);
    let path = medium.path();
    let engine = Engine::start(&EngineOptions::default()).unwrap();
    let disk = engine
        .open_disk(&DiskOptions { path: path.display().to_string(), writable: how == How::Carried })
        .unwrap();
    let initial = std::fs::read(path).unwrap();
    let shared = Arc::new(Shared::new(THREADS));
    let share = BYTES / THREADS;
    let part = |thread: u64| ByteRange::new(thread * share, share);
    let mut replays: Vec<_> = (0..THREADS).map(|thread| Replay::new(part(thread), &initial)).collect();
    let guests: Vec<_> = (0..THREADS)
        .map(|thread| {
            let file = (how == How::Own).then(|| File::options().write(true).open(path).unwrap());
            let guest = Guest::new(disk.clone(), file, thread, part(thread), &initial);
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || guest.run(&shared))
        })
        .collect();
    let mut random = fastrand::Rng::with_seed(17);
    let (mut rounds, mut reads) = (0, 0);
    while rounds < ROUNDS || Instant::now() < end {
        std::thread::sleep(Duration::from_millis(random.u64(..60)));
        let options = options(medium.directory(), rounds);
        reads += back_up(&engine, &disk, &options, &shared, &mut replays, &mut random);
        rounds += 1;
    }
    shared.stop.store(true, Ordering::Relaxed);
    let ended: Vec<_> = guests.into_iter().map(|guest| guest.join().unwrap()).collect();
    drop(disk);
    drop(engine);
    let mut requests = 0;
    let file = File::open(path).unwrap();
    for (thread, (shadow, count)) in (0..).zip(ended) {
        let mut bytes = vec![0; usize::try_from(share).unwrap()];
        file.read_exact_at(&mut bytes, thread * share).unwrap();
        assert_eq!(
            shadow.first_difference(&bytes),
            None,
            "an acknowledged write of guest {thread} is missing"
        );
        assert!(count > 20, "guest {thread} got on");
        requests += count;
    }
    println!("{medium:?}, {how:?}: {rounds} backups, {requests} requests, {reads} reads of snapshots");
    assert!(reads > 10, "the snapshots were read");
}

#[test]
fn a_file_whose_guests_the_engine_carries() {
    run(&Medium::file(BYTES), How::Carried);
}

#[test]
fn a_file_whose_guests_write_by_themselves() {
    run(&Medium::file(BYTES), How::Own);
}

#[test]
fn a_loop_device_whose_guests_the_engine_carries() {
    if let Some(medium) = Medium::loop_device(BYTES) {
        run(&medium, How::Carried);
    }
}

#[test]
fn a_loop_device_whose_guests_write_by_themselves() {
    if let Some(medium) = Medium::loop_device(BYTES) {
        run(&medium, How::Own);
    }
}
