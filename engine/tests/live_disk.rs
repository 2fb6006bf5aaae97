//! The live disk as its users have it: permits, requests, starts, snapshots, on a real engine and real files.

#[path = "support/live.rs"]
mod support;

use std::fs;
use std::future::Future;
use std::pin::pin;
use std::sync::mpsc;
use std::task::{Context, Waker};
use std::thread;
use std::time::{Duration, Instant};

use engine::copy::SyncMode;
use engine::job::Outcome;
use engine::live::{DiskOptions, FleeceOptions, GroupFailure, IoRequest, LiveDisk, read};
use engine::units::ByteRange;
use support::{Fixture, PATIENCE, block_on};

const CLUSTER: u64 = 64 << 10;
const LENGTH: u64 = 20 * CLUSTER + 700;

/// A disk of random bytes, and these.
fn random_disk(fixture: &Fixture, name: &str, writable: bool) -> (LiveDisk, Vec<u8>) {
    let mut contents = vec![0; usize::try_from(LENGTH).unwrap()];
    fastrand::Rng::with_seed(7).fill(&mut contents);
    // A cluster of zeros.
    contents[3 << 16..4 << 16].fill(0);
    (fixture.disk_of(name, &contents, writable), contents)
}

/// Waits until a start has raised the disk's barrier.
fn await_barrier(disk: &LiveDisk) {
    let deadline = Instant::now() + PATIENCE;
    let mut context = Context::from_waker(Waker::noop());
    while pin!(disk.begin_write_async(ByteRange::new(0, 1))).poll(&mut context).is_ready() {
        assert!(Instant::now() < deadline, "the barrier was never raised");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_disk_nobody_writes_to_is_copied_whole() {
    let fixture = Fixture::new();
    let (disk, contents) = random_disk(&fixture, "disk", false);
    let backup = fixture.engine.start_backup(&disk, &fixture.options("backup")).unwrap();
    let result = backup.job.wait();
    assert!(matches!(result.outcome, Outcome::Complete), "{result:?}");
    assert_eq!(result.progress.done, LENGTH);
    assert_eq!(result.progress.zeros, CLUSTER);
    assert!(fs::read(fixture.path("backup")).unwrap() == contents);
}

/// Bytes of space that a file takes.
fn space(path: &std::path::Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    fs::File::open(path).unwrap().sync_all().unwrap();
    fs::metadata(path).unwrap().blocks() * 512
}

/// A disk that stores as many zeros as data, with nothing to show which is which.
fn half_zeros(fixture: &Fixture) -> (LiveDisk, Vec<u8>) {
    let mut contents = vec![0; 128 * usize::try_from(CLUSTER).unwrap()];
    for pair in contents.chunks_mut(8 * usize::try_from(CLUSTER).unwrap()) {
        fastrand::Rng::with_seed(7).fill(&mut pair[..4 * usize::try_from(CLUSTER).unwrap()]);
    }
    (fixture.disk_of("zeros", &contents, true), contents)
}

#[test]
fn zeros_take_no_space_in_a_backup() {
    let fixture = Fixture::new();
    let (disk, contents) = half_zeros(&fixture);
    assert!(space(&fixture.path("zeros")) >= 128 * CLUSTER, "the disk stores them");
    let backup = fixture.engine.start_backup(&disk, &fixture.options("backup")).unwrap();
    assert!(matches!(backup.job.wait().outcome, Outcome::Complete));
    assert!(fs::read(fixture.path("backup")).unwrap() == contents);
    let taken = space(&fixture.path("backup"));
    assert!(taken <= 64 * CLUSTER * 11 / 10, "{taken} bytes for {} of data", 64 * CLUSTER);
}

#[test]
fn what_no_guest_has_changed_takes_no_space_in_a_copy_of_old_contents_alone() {
    let fixture = Fixture::new();
    let (disk, contents) = half_zeros(&fixture);
    let mut options = fixture.options("backup");
    options.sync = SyncMode::None;
    let backup = fixture.engine.start_backup(&disk, &options).unwrap();
    disk.write(16 * CLUSTER + 5, vec![1; 70_000]).unwrap();
    backup.job.cancel().unwrap();
    assert!(matches!(backup.job.wait().outcome, Outcome::Cancelled));
    let copy = fs::read(fixture.path("backup")).unwrap();
    let old = 16 * (1 << 16)..18 * (1 << 16);
    assert!(copy[old.clone()] == contents[old], "what it has changed");
    let taken = space(&fixture.path("backup"));
    assert!(taken <= 3 * CLUSTER, "{taken} bytes for 2 clusters");
}

/// What it checks: where guests have changed everything, such a job still is not over. Why: whoever reads its snapshot decides when it is.
#[test]
fn a_copy_of_old_contents_alone_goes_on_until_it_is_cancelled() {
    let fixture = Fixture::new();
    let (disk, contents) = random_disk(&fixture, "disk", true);
    let mut options = fixture.options("backup");
    options.sync = SyncMode::None;
    let backup = fixture.engine.start_backup(&disk, &options).unwrap();
    disk.write(0, vec![0xEE; contents.len()]).unwrap();
    let ended = backup.job.wait_timeout(std::time::Duration::from_millis(300));
    assert!(ended.is_none(), "it has ended by itself: {ended:?}");
    assert!(backup.snapshot.read(0, contents.len()).unwrap() == contents, "its snapshot is there");
    backup.job.pause().unwrap();
    backup.job.resume().unwrap();
    backup.job.cancel().unwrap();
    assert!(matches!(backup.job.wait().outcome, Outcome::Cancelled));
    assert!(fs::read(fixture.path("backup")).unwrap() == contents);
}

#[test]
fn the_backup_is_of_the_start_and_the_disk_of_now() {
    let fixture = Fixture::new();
    let (disk, contents) = random_disk(&fixture, "disk", true);
    let mut options = fixture.options("backup");
    // Slow enough that the guest is there first.
    options.speed = std::num::NonZeroU64::new(4 * CLUSTER);
    let backup = fixture.engine.start_backup(&disk, &options).unwrap();
    let mut now = contents.clone();
    for (offset, length) in
        [(5 * CLUSTER + 17, 3000), (LENGTH - 700, 700), (10 * CLUSTER - 1, 2), (CLUSTER, 65536)]
    {
        let data = vec![0xEE; length];
        disk.write(offset, data.clone()).unwrap();
        now[usize::try_from(offset).unwrap()..][..length].copy_from_slice(&data);
    }
    disk.write_zeroes(ByteRange::new(12 * CLUSTER + 5, 2 * CLUSTER), true).unwrap();
    now[usize::try_from(12 * CLUSTER + 5).unwrap()..][..usize::try_from(2 * CLUSTER).unwrap()].fill(0);
    disk.flush().unwrap();
    assert!(disk.read(0, now.len()).unwrap() == now, "the guest reads what it wrote");
    // As of the start, whatever is copied by now.
    assert!(backup.snapshot.read(0, contents.len()).unwrap() == contents);
    assert!(
        block_on(backup.snapshot.read_async(5 * CLUSTER, 70_000)).unwrap() == contents[5 << 16..][..70_000]
    );
    backup.job.set_speed(None).unwrap();
    let result = backup.job.wait();
    assert!(matches!(result.outcome, Outcome::Complete), "{result:?}");
    assert!(fs::read(fixture.path("backup")).unwrap() == contents);
    assert!(fs::read(fixture.path("disk")).unwrap() == now);
    let error = backup.snapshot.read(0, 10).unwrap_err();
    assert!(error.to_string().contains("the job has ended"), "{error}");
}

#[test]
fn sync_none_copies_what_guests_change_and_keeps_it_when_it_is_cancelled() {
    let fixture = Fixture::new();
    let (disk, contents) = random_disk(&fixture, "disk", true);
    let mut options = fixture.options("old");
    options.sync = SyncMode::None;
    let backup = fixture.engine.start_backup(&disk, &options).unwrap();
    disk.write(6 * CLUSTER, vec![1; 10]).unwrap();
    disk.write(8 * CLUSTER - 5, vec![2; 10]).unwrap();
    assert!(backup.snapshot.read(0, contents.len()).unwrap() == contents, "of t0 in every mode");
    assert_eq!(backup.job.progress().done, 3 * CLUSTER, "nothing but what was changed");
    backup.job.cancel().unwrap();
    let result = backup.job.wait();
    assert!(matches!(result.outcome, Outcome::Cancelled), "{result:?}");
    let old = fs::read(fixture.path("old")).unwrap();
    assert_eq!(old.len(), contents.len());
    for cluster in [6, 7, 8] {
        assert!(old[cluster << 16..][..65536] == contents[cluster << 16..][..65536], "cluster {cluster}");
    }
    assert!(old[..65536].iter().all(|&byte| byte == 0), "never changed, never copied");
}

#[test]
fn requests_come_as_callbacks_and_futures_too() {
    let fixture = Fixture::new();
    let (disk, contents) = random_disk(&fixture, "disk", true);
    let (sender, receiver) = mpsc::channel();
    disk.request_with(read(100, 50), move |outcome| sender.send(outcome).unwrap());
    assert!(receiver.recv().unwrap().unwrap() == contents[100..150]);
    block_on(disk.request(IoRequest::Write { offset: 1, data: vec![9; 3] })).unwrap();
    assert_eq!(block_on(disk.request(read(0, 5))).unwrap(), [contents[0], 9, 9, 9, contents[4]]);
    drop(disk.request(IoRequest::Write { offset: 1000, data: vec![8; 1000] }));
    disk.flush().unwrap();
    let permit = block_on(disk.begin_write_async(ByteRange::new(0, 1))).unwrap();
    drop(permit);
    let (sender, receiver) = mpsc::channel();
    disk.begin_write_with(ByteRange::new(0, 1), move |permit| sender.send(permit.is_ok()).unwrap());
    assert!(receiver.recv().unwrap());
}

#[test]
fn a_start_waits_for_permits_and_gives_up_without_a_trace() {
    let fixture = Fixture::new();
    let (disk, contents) = random_disk(&fixture, "disk", false);
    let permit = disk.begin_write(ByteRange::new(0, 4096)).unwrap();
    let mut options = fixture.options("backup");
    options.start_timeout = Duration::from_millis(50);
    let error = fixture.engine.start_backup(&disk, &options).unwrap_err();
    assert!(error.to_string().contains("did not end within"), "{error}");
    assert!(!fixture.path("backup").exists(), "the new file is gone again");
    // A thread that holds a permit gets another through the raised barrier; others wait until it is down.
    let starting = thread::spawn({
        let (engine, disk, mut options) = (fixture.engine.clone(), disk.clone(), fixture.options("backup"));
        options.start_timeout = Duration::from_secs(60);
        move || engine.start_backup(&disk, &options).unwrap().job.wait()
    });
    await_barrier(&disk);
    let nested = disk.begin_write(ByteRange::new(0, 10)).unwrap();
    let waiting = thread::spawn({
        let disk = disk.clone();
        move || drop(disk.begin_write(ByteRange::new(0, 10)).unwrap())
    });
    thread::sleep(Duration::from_millis(50));
    assert!(!starting.is_finished() && !waiting.is_finished());
    drop(nested);
    // Dropped on another thread.
    thread::spawn(move || drop(permit)).join().unwrap();
    waiting.join().unwrap();
    assert!(matches!(starting.join().unwrap().outcome, Outcome::Complete));
    assert!(fs::read(fixture.path("backup")).unwrap() == contents);
}

#[test]
fn a_future_that_waits_at_the_barrier_may_be_dropped() {
    let fixture = Fixture::new();
    let (disk, _) = random_disk(&fixture, "disk", false);
    let permit = disk.begin_write(ByteRange::new(0, 4096)).unwrap();
    let starting = thread::spawn({
        let (engine, disk, mut options) = (fixture.engine.clone(), disk.clone(), fixture.options("backup"));
        options.start_timeout = Duration::from_secs(60);
        move || engine.start_backup(&disk, &options).unwrap().job.wait()
    });
    await_barrier(&disk);
    let mut context = Context::from_waker(Waker::noop());
    let mut dropped = Box::pin(disk.begin_write_async(ByteRange::new(0, 1)));
    assert!(dropped.as_mut().poll(&mut context).is_pending());
    drop(dropped);
    let kept = disk.begin_write_async(ByteRange::new(0, 1));
    drop(permit);
    drop(block_on(kept).unwrap());
    assert!(matches!(starting.join().unwrap().outcome, Outcome::Complete));
}

#[test]
fn a_group_starts_as_a_whole_or_not_at_all() {
    let fixture = Fixture::new();
    let (first, contents) = random_disk(&fixture, "first", false);
    let (second, _) = random_disk(&fixture, "second", false);
    fs::write(fixture.path("taken"), b"mine").unwrap();
    let group = [(first.clone(), fixture.options("a")), (second.clone(), fixture.options("taken"))];
    let timeout = Duration::from_secs(1);
    let error = fixture.engine.start_group(&group, GroupFailure::FailAll, timeout).unwrap_err();
    assert!(error.is_refusal(), "{error}");
    assert!(!fixture.path("a").exists(), "nothing of the group is left");
    assert_eq!(fs::read(fixture.path("taken")).unwrap(), b"mine");
    let permit = second.begin_write(ByteRange::new(0, 1)).unwrap();
    let group = [(first, fixture.options("a")), (second, fixture.options("b"))];
    let soon = Duration::from_millis(50);
    assert!(fixture.engine.start_group(&group, GroupFailure::FailAll, soon).is_err());
    assert!(!fixture.path("a").exists() && !fixture.path("b").exists());
    drop(permit);
    let backups = fixture.engine.start_group(&group, GroupFailure::FailAll, timeout).unwrap();
    for backup in &backups {
        assert!(matches!(backup.job.wait().outcome, Outcome::Complete));
    }
    assert!(
        fs::read(fixture.path("a")).unwrap() == contents && fs::read(fixture.path("b")).unwrap() == contents
    );
}

#[test]
fn what_cannot_be_is_refused() {
    let fixture = Fixture::new();
    let (disk, _) = random_disk(&fixture, "disk", false);
    let refused = disk.write(0, vec![1]).unwrap_err();
    assert!(refused.to_string().contains("opened for reading"), "{refused}");
    assert!(disk.read(LENGTH, 1).is_err());
    let (writable, _) = random_disk(&fixture, "other", true);
    let beyond = writable.write(LENGTH - 1, vec![1, 2]).unwrap_err();
    assert!(beyond.to_string().contains("other"), "{beyond}");
    let onto_itself = fixture.options("disk");
    assert!(fixture.engine.start_backup(&disk, &onto_itself).unwrap_err().is_refusal());
    let again = DiskOptions { path: fixture.name("other"), writable: true };
    let error = fixture.engine.open_disk(&again).unwrap_err();
    assert!(error.is_refusal(), "{error}");
}

#[test]
fn a_cancelled_job_lets_its_guests_go_and_removes_its_file() {
    let fixture = Fixture::new();
    let (disk, _) = random_disk(&fixture, "disk", true);
    let mut options = fixture.options("backup");
    options.speed = std::num::NonZeroU64::new(1);
    let backup = fixture.engine.start_backup(&disk, &options).unwrap();
    backup.job.cancel().unwrap();
    let began = Instant::now();
    disk.write(9 * CLUSTER, vec![1; 100]).unwrap();
    assert!(began.elapsed() < Duration::from_secs(5));
    assert!(matches!(backup.job.wait().outcome, Outcome::Cancelled));
    assert!(!fixture.path("backup").exists());
    // The engine and the disk serve on.
    let again = fixture.engine.start_backup(&disk, &fixture.options("backup")).unwrap();
    assert!(matches!(again.job.wait().outcome, Outcome::Complete));
}

/// Fleece options of `clusters` clusters.
fn fleece(fixture: &Fixture, name: &str, clusters: u64) -> FleeceOptions {
    FleeceOptions { size: clusters * CLUSTER, ..FleeceOptions::new(fixture.name(name)) }
}

#[test]
fn what_guests_change_goes_by_way_of_the_fleece_file() {
    for sync in [SyncMode::Full, SyncMode::None] {
        let fixture = Fixture::new();
        let (disk, contents) = random_disk(&fixture, "disk", true);
        let mut options = fixture.options("backup");
        options.sync = sync;
        // Neither the sweep nor the drain gets anywhere: the first cluster, or at most one more.
        options.speed = std::num::NonZeroU64::new(1);
        fs::write(fixture.path("empty"), b"").unwrap();
        options.fleece = Some(fleece(&fixture, if sync == SyncMode::Full { "fleece" } else { "empty" }, 16));
        let backup = fixture.engine.start_backup(&disk, &options).unwrap();
        assert!(!fixture.path("fleece").exists());
        assert_eq!(fixture.path("empty").exists(), sync == SyncMode::Full, "it has lost its name");
        let mut now = contents.clone();
        for cluster in [20, 5, 6, 7, 15, 3] {
            let offset = usize::try_from(cluster * CLUSTER + 100).unwrap();
            disk.write(offset as u64, vec![0x77; 300]).unwrap();
            now[offset..offset + 300].fill(0x77);
        }
        let progress = backup.job.progress();
        assert!(progress.done <= 4 * CLUSTER, "{progress:?}");
        assert!(backup.snapshot.read(0, contents.len()).unwrap() == contents, "held, copied or untouched");
        if sync == SyncMode::Full {
            backup.job.set_speed(None).unwrap();
            let result = backup.job.wait();
            assert!(matches!(result.outcome, Outcome::Complete), "{result:?}");
            assert!(result.notices.is_empty(), "{result:?}");
            assert!(fs::read(fixture.path("backup")).unwrap() == contents);
        } else {
            backup.job.cancel().unwrap();
            assert!(matches!(backup.job.wait().outcome, Outcome::Cancelled));
            let old = fs::read(fixture.path("backup")).unwrap();
            for cluster in [20_u64, 5, 6, 7, 15, 3] {
                let start = usize::try_from(cluster * CLUSTER).unwrap();
                let end = (start + 65536).min(old.len());
                assert!(old[start..end] == contents[start..end], "cluster {cluster}");
            }
        }
        assert!(fs::read(fixture.path("disk")).unwrap() == now);
    }
}

#[test]
fn a_fleece_file_that_cannot_be_is_refused_and_nothing_touched() {
    let fixture = Fixture::new();
    let (disk, contents) = random_disk(&fixture, "disk", true);
    fs::write(fixture.path("full"), b"mine").unwrap();
    fs::write(fixture.path("empty"), b"").unwrap();
    fs::write(fixture.path("overwritten"), b"old").unwrap();
    fs::hard_link(fixture.path("disk"), fixture.path("alias")).unwrap();
    let cases = [
        ("backup", fleece(&fixture, "disk", 16), "the disk of the copy"),
        ("backup", fleece(&fixture, "alias", 16), "the disk of the copy"),
        ("backup", fleece(&fixture, "backup", 16), "the target of the copy"),
        ("overwritten", fleece(&fixture, "overwritten", 16), "the target of the copy"),
        ("overwritten", fleece(&fixture, "full", 16), "exists already"),
        ("overwritten", fleece(&fixture, "new", 15), "960 KiB are not enough; give it 1.0 MiB to 64.0 GiB"),
        ("overwritten", fleece(&fixture, "new", (1 << 20) + 1), "are too much; give it 1.0 MiB to 64.0 GiB"),
        ("overwritten", fleece(&fixture, "no/such/directory", 16), "use as fleece file"),
        ("overwritten", FleeceOptions { path: "null:1G".into(), ..fleece(&fixture, "", 16) }, "null"),
    ];
    for (target, fleece, told) in cases {
        let mut options = fixture.options(target);
        options.force = true;
        options.fleece = Some(fleece);
        let error = fixture.engine.start_backup(&disk, &options).unwrap_err();
        assert!(error.is_refusal() && error.to_string().contains(told), "{error}");
    }
    // More than any file system here has room for, with clusters that allow it.
    for name in ["empty", "new"] {
        let mut options = fixture.options("overwritten");
        options.force = true;
        options.cluster_size = engine::units::ClusterSize::new(4 << 20).unwrap();
        options.fleece = Some(FleeceOptions { size: 4 << 40, ..fleece(&fixture, name, 0) });
        let error = fixture.engine.start_backup(&disk, &options).unwrap_err();
        assert!(error.is_refusal() && error.to_string().contains("4.0 TiB"), "{error}");
    }
    assert!(!fixture.path("backup").exists() && !fixture.path("new").exists());
    let left = |name: &str| fs::read(fixture.path(name)).unwrap();
    assert_eq!((left("full"), left("empty"), left("overwritten")), (b"mine".into(), vec![], b"old".into()));
    assert!(left("disk") == contents);
    // And the disk is none the worse for it.
    disk.write(0, vec![1]).unwrap();
}
