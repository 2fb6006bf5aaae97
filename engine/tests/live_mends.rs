//! What embedders get wrong, and what goes wrong around them: on a real engine and real files.

#[path = "support/live.rs"]
mod support;

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use engine::copy::SyncMode;
use engine::error::ErrorKind;
use engine::job::{JobHandle, JobResult, Outcome};
use engine::live::{
    Backup, BackupOptions, DiskOptions, FleeceOptions, GroupFailure, IoRequest, LiveDisk, read,
};
use engine::units::{ByteRange, ClusterSize};
use support::{Fixture, PATIENCE, block_on};

const CLUSTER: u64 = 64 << 10;
const LENGTH: u64 = 20 * CLUSTER;

fn disk_of_sevens(fixture: &Fixture, writable: bool) -> LiveDisk {
    fixture.disk_of("disk", &vec![7; usize::try_from(LENGTH).unwrap()], writable)
}

/// A backup whose sweep gets nowhere.
fn slow_backup(fixture: &Fixture, disk: &LiveDisk) -> Backup {
    let mut options = fixture.options("backup");
    options.speed = std::num::NonZeroU64::new(1);
    fixture.engine.start_backup(disk, &options).unwrap()
}

fn end(job: &JobHandle) -> Arc<JobResult> {
    job.wait_timeout(PATIENCE).expect("it ends")
}

#[test]
fn a_disk_of_another_engine_is_refused() {
    let (here, there) = (Fixture::new(), Fixture::new());
    let (_own, theirs) = (disk_of_sevens(&here, true), disk_of_sevens(&there, true));
    let error = here.engine.start_backup(&theirs, &here.options("backup")).unwrap_err();
    assert!(error.is_refusal() && error.to_string().contains("another engine"), "{error}");
    assert!(!here.path("backup").exists());
    let backup = there.engine.start_backup(&theirs, &here.options("backup")).unwrap();
    assert!(matches!(end(&backup.job).outcome, Outcome::Complete));
}

#[test]
fn a_discard_that_was_put_off_spares_what_its_guest_wrote_by_himself_since() {
    let fixture = Fixture::new();
    let disk = disk_of_sevens(&fixture, true);
    let file = fs::File::options().write(true).open(fixture.path("disk")).unwrap();
    let backup = slow_backup(&fixture, &disk);
    disk.discard(ByteRange::new(4 * CLUSTER, 12 * CLUSTER)).unwrap();
    // Three clusters of these, in each of the three forms.
    let at = |cluster: u64| ByteRange::new(cluster * CLUSTER, CLUSTER);
    let write = |range: ByteRange| file.write_all_at(&vec![9; 65_536], range.offset).unwrap();
    let permit = disk.begin_write(at(5)).unwrap();
    write(at(5));
    drop(permit);
    let (sender, receiver) = mpsc::channel();
    disk.begin_write_with(at(7), move |permit| sender.send(permit.unwrap()).unwrap());
    let permit = receiver.recv_timeout(PATIENCE).unwrap();
    write(at(7));
    drop(permit);
    let permit = block_on(disk.begin_write_async(at(9))).unwrap();
    write(at(9));
    drop(permit);
    backup.job.cancel().unwrap();
    end(&backup.job);
    // What was put off is carried out by now.
    let deadline = Instant::now() + PATIENCE;
    while disk.read(4 * CLUSTER, 1).unwrap() != [0] {
        assert!(Instant::now() < deadline, "the file system here has no holes, or the discard is lost");
        thread::sleep(Duration::from_millis(5));
    }
    thread::sleep(Duration::from_millis(200));
    let now = fs::read(fixture.path("disk")).unwrap();
    for cluster in 4..16 {
        let byte = if [5, 7, 9].contains(&cluster) { 9 } else { 0 };
        assert!(now[cluster << 16..][..65_536].iter().all(|&here| here == byte), "cluster {cluster}");
    }
}

#[test]
fn arguments_that_make_no_sense_are_errors_and_harm_nobody() {
    let fixture = Fixture::new();
    let disk = disk_of_sevens(&fixture, true);
    let backup = slow_backup(&fixture, &disk);
    let request = IoRequest::Read { range: ByteRange::new(0, 100), buffer: vec![0; 10] };
    let error = block_on(disk.request(request)).unwrap_err();
    assert!(error.is_refusal() && error.to_string().contains("10 bytes"), "{error}");
    let nowhere = ByteRange::new(u64::MAX, 2);
    for (offset, length) in [(u64::MAX, 2), (0, usize::MAX), (LENGTH - 1, 2), (LENGTH + 1, 0)] {
        let error = backup.snapshot.read(offset, length).unwrap_err();
        assert!(error.to_string().contains("beyond the end"), "{error}");
        let error = disk.read(offset, length).unwrap_err();
        assert!(error.to_string().contains("ends at byte"), "{error}");
    }
    assert!(disk.discard(nowhere).is_err() && disk.write_zeroes(nowhere, true).is_err());
    assert!(disk.write(u64::MAX, vec![1, 2]).is_err());
    assert!(disk.begin_write(nowhere).is_err());
    assert!(block_on(disk.begin_write_async(nowhere)).is_err());
    let (sender, receiver) = mpsc::channel();
    disk.begin_write_with(nowhere, move |permit| sender.send(permit.is_err()).unwrap());
    assert!(receiver.recv_timeout(PATIENCE).unwrap());
    // What may be is: beyond the end, since a disk may have grown.
    drop(disk.begin_write(ByteRange::new(LENGTH, 10)).unwrap());
    backup.job.set_speed(None).unwrap();
    assert!(matches!(end(&backup.job).outcome, Outcome::Complete), "the engine lives");
}

#[test]
fn a_snapshot_is_read_within_bounds() {
    let fixture = Fixture::new();
    fs::File::create(fixture.path("large")).unwrap().set_len(1 << 30).unwrap();
    let disk = fixture.open("large", true);
    let mut options = fixture.options("backup");
    options.sync = SyncMode::None;
    let backup = fixture.engine.start_backup(&disk, &options).unwrap();
    let error = backup.snapshot.read(0, 257 << 20).unwrap_err();
    assert!(error.to_string().contains("at a time"), "{error}");
    assert!(backup.snapshot.read(0, 2 << 20).unwrap().iter().all(|&byte| byte == 0));
    backup.job.cancel().unwrap();
    end(&backup.job);
}

#[test]
fn callbacks_that_panic_or_wait_harm_only_themselves() {
    let fixture = Fixture::new();
    let disk = disk_of_sevens(&fixture, true);
    let backup = slow_backup(&fixture, &disk);
    let (sender, receiver) = mpsc::channel();
    for number in 0..8 {
        let (sender, waits) = (sender.clone(), disk.clone());
        disk.request_with(read(LENGTH, 1), move |result| {
            sender.send(()).unwrap();
            if number % 2 == 0 {
                // It would wait for the thread that it is on.
                waits.flush().unwrap();
            }
            result.unwrap();
        });
    }
    let told = sender.clone();
    disk.begin_write_with(ByteRange::new(10 * CLUSTER, 1), move |_permit| {
        told.send(()).unwrap();
        panic!("as planned");
    });
    for _ in 0..9 {
        receiver.recv_timeout(PATIENCE).unwrap();
    }
    let (sender, refused) = mpsc::channel();
    let the_end = fixture.engine.end();
    disk.request_with(read(0, 1), move |_| {
        let waits = || the_end.wait(Duration::ZERO);
        let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(waits));
        sender.send(panic.is_err()).unwrap();
    });
    assert_eq!(refused.recv_timeout(PATIENCE), Ok(true), "it waits for the thread that it is on, too");
    assert_eq!(disk.read(0, 3).unwrap(), [7; 3]);
    backup.job.set_speed(None).unwrap();
    assert!(matches!(end(&backup.job).outcome, Outcome::Complete), "the engine lives");
}

/// In a callback, on the ring thread.
#[test]
fn what_may_not_wait_does_nothing() {
    let fixture = Fixture::new();
    let disk = disk_of_sevens(&fixture, true);
    fs::write(fixture.path("another"), vec![1; 4096]).unwrap();
    let backup = slow_backup(&fixture, &disk);
    let (engine, waits, job) = (fixture.engine.clone(), disk.clone(), backup.job.clone());
    let another = DiskOptions { path: fixture.name("another"), writable: true };
    let (second, snapshot) = (fixture.options("second"), backup.snapshot.clone());
    let (sender, receiver) = mpsc::channel();
    disk.request_with(read(0, 1), move |_| {
        let calls: [(&str, &dyn Fn()); 11] = [
            ("open_disk", &|| drop(engine.open_disk(&another))),
            ("start_backup", &|| drop(engine.start_backup(&waits, &second))),
            ("jobs", &|| drop(engine.jobs())),
            ("latencies", &|| drop(waits.latencies())),
            ("read", &|| drop(waits.read(0, 1))),
            ("write", &|| drop(waits.write(0, vec![9; 4096]))),
            ("discard", &|| drop(waits.discard(ByteRange::new(0, 4096)))),
            ("write_zeroes", &|| drop(waits.write_zeroes(ByteRange::new(0, 4096), true))),
            ("begin_write", &|| drop(waits.begin_write(ByteRange::new(9 * CLUSTER, 1)))),
            ("snapshot", &|| drop(snapshot.read(0, 1))),
            ("wait", &|| drop(job.wait())),
        ];
        for (name, call) in calls {
            let ran = std::panic::catch_unwind(std::panic::AssertUnwindSafe(call));
            sender.send((name, ran.is_err())).unwrap();
        }
    });
    let told: Vec<_> = receiver.iter().collect();
    assert!(told.len() == 11 && told.iter().all(|&(_, panicked)| panicked), "{told:?}");
    assert!(!fixture.path("second").exists());
    assert_eq!(fixture.engine.jobs().unwrap().len(), 1);
    assert_eq!(disk.read(0, 4096).unwrap(), [7; 4096]);
    drop(fixture.open("another", true));
    backup.job.cancel().unwrap();
    end(&backup.job);
    let the_end = fixture.engine.end();
    drop((fixture, disk, backup));
    assert!(the_end.wait(PATIENCE), "nothing is left that keeps it");
}

#[test]
fn a_copy_whose_target_has_lost_its_name_is_none() {
    for (sync, replaced) in [(SyncMode::Full, false), (SyncMode::Full, true), (SyncMode::None, false)] {
        let fixture = Fixture::new();
        let disk = disk_of_sevens(&fixture, true);
        let mut options = fixture.options("backup");
        options.speed = std::num::NonZeroU64::new(1);
        options.sync = sync;
        let backup = fixture.engine.start_backup(&disk, &options).unwrap();
        if replaced {
            fs::write(fixture.path("other"), b"other").unwrap();
            fs::rename(fixture.path("other"), fixture.path("backup")).unwrap();
        } else {
            fs::remove_file(fixture.path("backup")).unwrap();
        }
        if sync == SyncMode::None {
            backup.job.cancel().unwrap();
        } else {
            backup.job.set_speed(None).unwrap();
        }
        let result = end(&backup.job);
        let Outcome::Failed(error) = &result.outcome else { panic!("{sync:?}: {result:?}") };
        assert_eq!(error.kind(), ErrorKind::TargetLost);
        if replaced {
            assert_eq!(fs::read(fixture.path("backup")).unwrap(), b"other");
        }
    }
}

/// The others of its group are not told that they are complete, and leave nothing behind.
#[test]
fn a_target_that_has_lost_its_name_is_the_end_of_its_group() {
    for lost in [0, 1] {
        let fixture = Fixture::new();
        let disks = ["one", "two"].map(|name| fixture.disk_of(name, &[7; 1 << 20], false));
        let targets = ["backup0", "backup1"];
        let slow = |target| BackupOptions { speed: std::num::NonZeroU64::new(1), ..fixture.options(target) };
        let group: Vec<_> = disks.into_iter().zip(targets.map(slow)).collect();
        let backups = fixture.engine.start_group(&group, GroupFailure::FailAll, PATIENCE).unwrap();
        fs::rename(fixture.path(targets[lost]), fixture.path("elsewhere")).unwrap();
        for backup in &backups {
            backup.job.set_speed(None).unwrap();
        }
        let result = end(&backups[lost].job);
        let Outcome::Failed(error) = &result.outcome else { panic!("{result:?}") };
        assert_eq!(error.kind(), ErrorKind::TargetLost);
        let other = end(&backups[1 - lost].job);
        assert!(matches!(other.outcome, Outcome::Cancelled), "{other:?}");
        assert!(!fixture.path(targets[1 - lost]).exists());
    }
}

/// A write that hangs is looked for on the disk that is named.
#[test]
fn a_start_that_finds_no_instant_names_the_disk_whose_writes_go_on() {
    let fixture = Fixture::new();
    let disks = ["one", "two"].map(|name| fixture.disk_of(name, &[7; 1 << 20], false));
    for busy in [0, 1] {
        let permit = disks[busy].begin_write(ByteRange::new(0, 1)).unwrap();
        let options = ["backup0", "backup1"].map(|target| fixture.options(target));
        let group: Vec<_> = disks.iter().cloned().zip(options).collect();
        let start = fixture.engine.start_group(&group, GroupFailure::GoOn, Duration::from_millis(50));
        let error = start.unwrap_err().to_string();
        assert!(error.contains("no point in time"), "{error}");
        let named = ["one", "two"].map(|name| error.contains(&fixture.name(name)));
        assert_eq!(named, [busy == 0, busy == 1], "{error}");
        drop(permit);
    }
}

#[test]
fn what_is_refused_leaves_the_old_backup_as_it_was() {
    let fixture = Fixture::new();
    let disk = disk_of_sevens(&fixture, true);
    let old = vec![3; 100_000];
    fs::write(fixture.path("old"), &old).unwrap();
    fs::write(fixture.path("empty"), b"").unwrap();
    let forced = |cluster: u64| {
        let mut options = fixture.options("old");
        options.force = true;
        options.cluster_size = ClusterSize::new(cluster).unwrap();
        options.fleece =
            Some(FleeceOptions { size: 16 * cluster, ..FleeceOptions::new(fixture.name("empty")) });
        options
    };
    let times = || {
        let old = fs::metadata(fixture.path("old")).unwrap();
        (old.len(), old.mtime(), old.mtime_nsec(), old.ctime(), old.ctime_nsec())
    };
    let before = times();
    let untouched = || {
        assert_eq!(times(), before);
        assert!(fs::read(fixture.path("old")).unwrap() == old);
        assert_eq!(fs::read(fixture.path("empty")).unwrap(), b"");
    };
    // More memory than the engine has: eight clusters of 4 MiB, and the disk.
    let error = fixture.engine.start_backup(&disk, &forced(4 << 20)).unwrap_err();
    assert!(error.is_refusal() && error.to_string().contains("no memory left"), "{error}");
    untouched();
    // No instant without writes.
    let permit = disk.begin_write(ByteRange::new(0, 1)).unwrap();
    let mut options = forced(CLUSTER);
    options.start_timeout = Duration::from_millis(50);
    let error = fixture.engine.start_backup(&disk, &options).unwrap_err();
    assert!(error.to_string().contains("no point in time"), "{error}");
    untouched();
    drop(permit);
    // Another of the group cannot be had: two targets of one name.
    let group = [forced(CLUSTER), fixture.options("new"), fixture.options("new")]
        .map(|options| (disk.clone(), options));
    let error = fixture.engine.start_group(&group, GroupFailure::FailAll, PATIENCE).unwrap_err();
    assert!(error.is_refusal() && error.to_string().contains("created it meanwhile"), "{error}");
    untouched();
    assert!(!fixture.path("new").exists());
    // And then it is overwritten.
    let backup = fixture.engine.start_backup(&disk, &forced(CLUSTER)).unwrap();
    assert!(matches!(end(&backup.job).outcome, Outcome::Complete));
    assert!(fs::read(fixture.path("old")).unwrap() == fs::read(fixture.path("disk")).unwrap());
    assert!(!fixture.path("empty").exists(), "a fleece file loses its name");
}

#[test]
fn a_disk_is_open_once_on_an_engine() {
    let fixture = Fixture::new();
    let disk = disk_of_sevens(&fixture, false);
    fs::hard_link(fixture.path("disk"), fixture.path("alias")).unwrap();
    std::os::unix::fs::symlink(fixture.path("disk"), fixture.path("link")).unwrap();
    for name in ["disk", "alias", "link"] {
        let options = DiskOptions { path: fixture.name(name), writable: false };
        let error = fixture.engine.open_disk(&options).unwrap_err();
        assert!(error.is_refusal() && error.to_string().contains("open already"), "{error}");
    }
    // A job keeps it beyond its handles.
    let backup = slow_backup(&fixture, &disk);
    drop(disk);
    let options = DiskOptions { path: fixture.name("disk"), writable: false };
    let error = fixture.engine.open_disk(&options).unwrap_err();
    assert!(error.to_string().contains("still carries jobs"), "{error}");
    backup.job.cancel().unwrap();
    end(&backup.job);
    for _ in 0..20 {
        drop(fixture.open("alias", false));
    }
}

#[test]
fn a_job_without_handles_can_be_found_and_ended() {
    let fixture = Fixture::new();
    let disk = disk_of_sevens(&fixture, true);
    assert!(fixture.engine.jobs().unwrap().is_empty());
    let mut options = fixture.options("backup");
    options.sync = SyncMode::None;
    drop(fixture.engine.start_backup(&disk, &options).unwrap());
    let jobs = fixture.engine.jobs().unwrap();
    let [found] = &jobs[..] else { panic!("{jobs:?}") };
    assert_eq!((found.disk.as_str(), found.target.as_str()), (disk.name(), options.target.as_str()));
    found.job.cancel().unwrap();
    assert!(matches!(end(&found.job).outcome, Outcome::Cancelled));
    assert!(fixture.engine.jobs().unwrap().is_empty());
}

/// They go while the ring thread is held up, so that it has not begun their copies.
#[test]
fn a_future_that_is_dropped_before_its_copy_has_begun_has_none_made() {
    let fixture = Fixture::new();
    let disk = disk_of_sevens(&fixture, true);
    let backup = slow_backup(&fixture, &disk);
    let done = || backup.job.progress().done / CLUSTER;
    let (held_up, is_held_up) = mpsc::channel();
    let (let_go, held) = mpsc::channel::<()>();
    disk.request_with(read(0, 1), move |_| {
        held_up.send(()).unwrap();
        held.recv_timeout(PATIENCE).unwrap();
    });
    is_held_up.recv_timeout(PATIENCE).unwrap();
    let at = |cluster: u64| ByteRange::new(cluster * CLUSTER, 1);
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    for cluster in 10..20 {
        let mut future = std::pin::pin!(disk.begin_write_async(at(cluster)));
        assert!(future.as_mut().poll(&mut context).is_pending());
    }
    // One who stays has his made, after theirs would have been.
    let mut stays = std::pin::pin!(disk.begin_write_async(at(9)));
    assert!(stays.as_mut().poll(&mut context).is_pending());
    let before = done();
    let_go.send(()).unwrap();
    drop(block_on(stays).unwrap());
    for _ in 0..20 {
        disk.flush().unwrap();
        thread::sleep(Duration::from_millis(5));
    }
    // His, and what the sweep has had in flight.
    let copied = done() - before;
    assert!((1..=3).contains(&copied), "{copied} clusters");
    backup.job.set_speed(None).unwrap();
    assert!(matches!(end(&backup.job).outcome, Outcome::Complete));
}

/// A source whose space is taken, in which there is nothing but zeros here and there.
#[test]
fn zeros_take_no_space_in_a_backup() {
    let fixture = Fixture::new();
    let mut contents = vec![0; usize::try_from(LENGTH).unwrap()];
    contents[..65_536].fill(1);
    let space = |name: &str| fs::metadata(fixture.path(name)).unwrap().blocks() * 512;
    let disk = fixture.disk_of("disk", &contents, true);
    let backup = fixture.engine.start_backup(&disk, &fixture.options("backup")).unwrap();
    assert!(matches!(end(&backup.job).outcome, Outcome::Complete));
    assert!(fs::read(fixture.path("backup")).unwrap() == contents);
    assert!(space("disk") >= LENGTH, "the file system here stores no zeros");
    assert!(space("backup") <= 4 * CLUSTER, "{} bytes", space("backup"));
}
