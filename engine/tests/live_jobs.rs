//! Jobs of live disks as whoever steers them has them: targets that are overwritten where they are, what observers hear, jobs that end together.

use std::fs;
use std::num::NonZeroU64;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use engine::error::ErrorKind;
use engine::job::{JobEvent, JobHandle, Observer, Outcome, Status};
use engine::live::{
    BackupOptions, CallOff, DiskOptions, Engine, EngineOptions, FleeceOptions, GroupFailure, LiveDisk,
};
use engine::modes::SyncMode;
use engine::units::ByteRange;
use tempfile::TempDir;

const LENGTH: usize = 300_001;
const PATIENCE: Duration = Duration::from_secs(60);

struct Fixture {
    there: TempDir,
    engine: Engine,
    disk: LiveDisk,
    contents: Vec<u8>,
}

impl Fixture {
    /// An engine with a disk that is full of data.
    fn new() -> Self {
        let there = tempfile::tempdir().unwrap();
        let contents: Vec<u8> = (0..LENGTH).map(|at| u8::try_from(at % 250).unwrap() + 1).collect();
        fs::write(there.path().join("disk"), &contents).unwrap();
        let engine = Engine::start(&EngineOptions::default()).unwrap();
        let path = there.path().join("disk").display().to_string();
        let disk = engine.open_disk(&DiskOptions { path, writable: true }).unwrap();
        Self { there, engine, disk, contents }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.there.path().join(name)
    }

    fn in_place(&self, name: &str) -> BackupOptions {
        BackupOptions { in_place: true, ..BackupOptions::new(self.path(name).display().to_string()) }
    }
}

/// Everything that an observer hears, in a word each.
fn listen() -> (Observer, Arc<Mutex<Vec<String>>>) {
    let heard = Arc::new(Mutex::new(Vec::new()));
    let notes = Arc::clone(&heard);
    let observer = Observer::new(move |event| {
        let word = match event {
            JobEvent::Status(status) => status.to_string(),
            JobEvent::Error { action, .. } => format!("error {action:?}"),
            JobEvent::Ended(result) => match result.outcome {
                Outcome::Complete => "complete".to_owned(),
                Outcome::Cancelled => "was cancelled".to_owned(),
                _ => "failed".to_owned(),
            },
        };
        notes.lock().unwrap().push(word);
    });
    (observer, heard)
}

#[track_caller]
fn await_status(job: &JobHandle, wanted: Status) {
    let deadline = std::time::Instant::now() + PATIENCE;
    while job.status() != wanted {
        assert!(std::time::Instant::now() < deadline, "it is {}, not {wanted}", job.status());
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_target_is_overwritten_where_it_is() {
    let fixture = Fixture::new();
    for more in [0, 1000, 100_000] {
        let name = format!("target{more}");
        fs::write(fixture.path(&name), vec![9; LENGTH + more]).unwrap();
        let before = fs::metadata(fixture.path(&name)).unwrap();
        let backup = fixture.engine.start_backup(&fixture.disk, &fixture.in_place(&name)).unwrap();
        let result = backup.job.wait();
        assert!(matches!(result.outcome, Outcome::Complete), "{result:?}");
        let after = fs::metadata(fixture.path(&name)).unwrap();
        assert_eq!((after.ino(), after.len()), (before.ino(), before.len()));
        let copy = fs::read(fixture.path(&name)).unwrap();
        assert!(copy[..LENGTH] == fixture.contents && copy[LENGTH..] == vec![9; more]);
    }
}

#[test]
fn what_is_not_copied_stays_on_a_target_in_place() {
    let fixture = Fixture::new();
    fs::write(fixture.path("target"), vec![9; LENGTH]).unwrap();
    let options = BackupOptions { sync: SyncMode::None, ..fixture.in_place("target") };
    let backup = fixture.engine.start_backup(&fixture.disk, &options).unwrap();
    fixture.disk.write(70_000, vec![0xEE; 10]).unwrap();
    backup.job.cancel().unwrap();
    assert!(matches!(backup.job.wait().outcome, Outcome::Cancelled));
    let mut wanted = vec![9; LENGTH];
    wanted[65536..131_072].copy_from_slice(&fixture.contents[65536..131_072]);
    assert!(fs::read(fixture.path("target")).unwrap() == wanted);
}

#[test]
fn zeros_are_written_over_what_a_target_in_place_holds_and_not_over_nothing() {
    let there = tempfile::tempdir().unwrap();
    let path = |name: &str| there.path().join(name).display().to_string();
    fs::File::create(path("disk")).unwrap().set_len(1 << 20).unwrap();
    fs::write(path("full"), vec![9; 1 << 20]).unwrap();
    fs::File::create(path("blank")).unwrap().set_len(1 << 20).unwrap();
    let engine = Engine::start(&EngineOptions::default()).unwrap();
    let disk = engine.open_disk(&DiskOptions { path: path("disk"), writable: false }).unwrap();
    for target in ["full", "blank"] {
        let options = BackupOptions { in_place: true, ..BackupOptions::new(path(target)) };
        let backup = engine.start_backup(&disk, &options).unwrap();
        assert!(matches!(backup.job.wait().outcome, Outcome::Complete));
        assert!(fs::read(path(target)).unwrap() == vec![0; 1 << 20], "{target}");
    }
    assert_eq!(fs::metadata(path("blank")).unwrap().blocks(), 0);
}

#[test]
fn targets_in_place_must_be_there_and_long_enough() {
    let fixture = Fixture::new();
    let error = fixture.engine.start_backup(&fixture.disk, &fixture.in_place("none")).unwrap_err();
    assert!(error.is_refusal() && error.to_string().contains("does not exist"), "{error}");
    assert!(!fixture.path("none").exists());
    let sector = LENGTH / 512 * 512;
    fs::write(fixture.path("short"), vec![9; sector]).unwrap();
    let error = fixture.engine.start_backup(&fixture.disk, &fixture.in_place("short")).unwrap_err();
    assert!(error.is_refusal() && error.to_string().contains("fewer"), "{error}");
    assert_eq!(fs::read(fixture.path("short")).unwrap(), vec![9; sector]);
    // A last sector that has begun is made as long as it must be.
    fs::write(fixture.path("begun"), vec![9; sector + 1]).unwrap();
    let backup = fixture.engine.start_backup(&fixture.disk, &fixture.in_place("begun")).unwrap();
    assert!(matches!(backup.job.wait().outcome, Outcome::Complete));
    assert!(fs::read(fixture.path("begun")).unwrap() == fixture.contents);
}

#[test]
fn an_observer_hears_of_everything_in_order() {
    let fixture = Fixture::new();
    fs::write(fixture.path("target"), vec![9; LENGTH]).unwrap();
    let (observer, heard) = listen();
    let options = BackupOptions {
        observer: Some(observer),
        auto_finalize: false,
        auto_dismiss: false,
        ..fixture.in_place("target")
    };
    let backup = fixture.engine.start_backup(&fixture.disk, &options).unwrap();
    await_status(&backup.job, Status::Pending);
    assert_eq!(*heard.lock().unwrap(), ["running", "waiting", "pending"]);
    backup.job.finalize().unwrap();
    assert!(matches!(backup.job.wait().outcome, Outcome::Complete));
    backup.job.dismiss().unwrap();
    assert_eq!(heard.lock().unwrap()[3..], ["complete", "concluded", "null"]);

    let (observer, heard) = listen();
    let speed = NonZeroU64::new(1);
    let options =
        BackupOptions { observer: Some(observer), auto_dismiss: true, speed, ..fixture.in_place("target") };
    let backup = fixture.engine.start_backup(&fixture.disk, &options).unwrap();
    backup.job.pause().unwrap();
    await_status(&backup.job, Status::Paused);
    backup.job.resume().unwrap();
    backup.job.cancel().unwrap();
    assert!(matches!(backup.job.wait().outcome, Outcome::Cancelled));
    let wanted = ["running", "paused", "running", "aborting", "was cancelled", "concluded", "null"];
    assert_eq!(*heard.lock().unwrap(), wanted);
}

#[test]
fn what_guests_felt_before_and_during_a_job() {
    let fixture = Fixture::new();
    fs::write(fixture.path("target"), vec![9; LENGTH]).unwrap();
    for _ in 0..3 {
        fixture.disk.write(0, vec![1; 100]).unwrap();
    }
    let options = BackupOptions { speed: NonZeroU64::new(1), ..fixture.in_place("target") };
    let backup = fixture.engine.start_backup(&fixture.disk, &options).unwrap();
    for _ in 0..5 {
        fixture.disk.write(0, vec![2; 100]).unwrap();
    }
    backup.job.cancel().unwrap();
    let result = backup.job.wait();
    let guests = result.guests.as_ref().expect("the engine carries them");
    assert_eq!((guests.before.count(), guests.during.count()), (3, 5));
}

/// Two jobs that stand and fall together; the second is slow if `slow`.
fn pair(fixture: &Fixture, slow: bool, finalize: bool) -> Vec<JobHandle> {
    for name in ["a", "b"] {
        fs::write(fixture.path(name), vec![9; LENGTH]).unwrap();
    }
    let first = BackupOptions { auto_finalize: finalize, ..fixture.in_place("a") };
    let speed = if slow { NonZeroU64::new(1) } else { None };
    let second = BackupOptions { speed, ..fixture.in_place("b") };
    let group = [(fixture.disk.clone(), first), (fixture.disk.clone(), second)];
    let backups = fixture.engine.start_group(&group, GroupFailure::FailAll, PATIENCE).unwrap();
    backups.into_iter().map(|backup| backup.job).collect()
}

#[test]
fn one_that_is_done_waits_for_the_other_and_is_cancelled_with_it() {
    for cancelled in [0, 1] {
        let fixture = Fixture::new();
        let jobs = pair(&fixture, true, true);
        await_status(&jobs[0], Status::Waiting);
        // Guests do not wait for it any more.
        fixture.disk.write(0, vec![1; 10]).unwrap();
        assert!(jobs[0].wait_timeout(Duration::from_millis(50)).is_none());
        jobs[cancelled].cancel().unwrap();
        for job in &jobs {
            assert!(matches!(job.wait().outcome, Outcome::Cancelled), "{cancelled}");
        }
    }
}

#[test]
fn all_are_finalized_by_one() {
    let fixture = Fixture::new();
    let jobs = pair(&fixture, false, false);
    for job in &jobs {
        await_status(job, Status::Pending);
    }
    assert!(jobs[1].wait_timeout(Duration::from_millis(50)).is_none(), "it would conclude by itself");
    jobs[1].finalize().unwrap();
    for job in &jobs {
        assert!(matches!(job.wait().outcome, Outcome::Complete));
    }
    assert!(fs::read(fixture.path("a")).unwrap() == fixture.contents);
    assert!(fs::read(fixture.path("b")).unwrap() == fixture.contents);
}

#[test]
fn a_start_that_nobody_wants_any_more_touches_nothing() {
    let fixture = Fixture::new();
    fs::write(fixture.path("old"), b"old contents").unwrap();
    let onto = |name: &str| BackupOptions {
        force: true,
        ..BackupOptions::new(fixture.path(name).display().to_string())
    };
    let call_off = CallOff::default();
    call_off.all();
    for name in ["old", "new"] {
        let disks = [(fixture.disk.clone(), onto(name))];
        let start = fixture.engine.start_group_unless(&disks, GroupFailure::GoOn, PATIENCE, &call_off);
        assert_eq!(start.unwrap_err().kind(), ErrorKind::Cancelled, "{name}");
    }
    assert_eq!(fs::read(fixture.path("old")).unwrap(), b"old contents");
    assert!(!fixture.path("new").exists());
    // Its locks and its room are free again.
    let backup = fixture.engine.start_backup(&fixture.disk, &onto("old")).unwrap();
    assert!(matches!(backup.job.wait().outcome, Outcome::Complete));
    assert!(fs::read(fixture.path("old")).unwrap() == fixture.contents);
}

/// With targets enough that a call comes while they are emptied one after the other.
#[test]
fn a_start_that_nobody_wants_once_a_target_is_emptied_goes_on_and_is_cancelled() {
    const TARGETS: usize = 20;
    let there = tempfile::tempdir().unwrap();
    let path = |name: &str| there.path().join(name).display().to_string();
    fs::write(path("disk"), vec![7; LENGTH]).unwrap();
    let engine = Engine::start(&EngineOptions { memory: 256 << 20, ..EngineOptions::default() }).unwrap();
    let disk = engine.open_disk(&DiskOptions { path: path("disk"), writable: true }).unwrap();
    let (mut disks, mut heard) = (Vec::new(), Vec::new());
    for number in 0..TARGETS {
        let target = path(&format!("old{number}"));
        fs::write(&target, vec![9; 8 << 20]).unwrap();
        let (observer, words) = listen();
        heard.push(words);
        let options = BackupOptions { force: true, observer: Some(observer), ..BackupOptions::new(target) };
        disks.push((disk.clone(), options));
    }
    let call_off = CallOff::default();
    let backups = std::thread::scope(|scope| {
        scope.spawn(|| {
            let deadline = std::time::Instant::now() + PATIENCE;
            while fs::metadata(path("old0")).unwrap().len() == 8 << 20 {
                assert!(std::time::Instant::now() < deadline, "nothing is emptied");
            }
            call_off.all();
        });
        engine.start_group_unless(&disks, GroupFailure::GoOn, PATIENCE, &call_off)
    });
    // Its word would be that everything is as it was.
    for (backup, words) in backups.unwrap().iter().zip(heard) {
        assert!(matches!(backup.job.wait().outcome, Outcome::Cancelled), "{backup:?}");
        assert_eq!(backup.job.progress().copied, 0);
        assert_eq!(*words.lock().unwrap(), ["running", "aborting", "was cancelled", "concluded"]);
        let notice = backup.notices.last().expect("a word about it");
        assert!(notice.contains("had been emptied by then"), "{notice}");
    }
}

/// Whether a barrier is up: who comes now waits.
fn is_held_back(disk: &LiveDisk) -> bool {
    let let_in = Arc::new(AtomicBool::new(false));
    let teller = Arc::clone(&let_in);
    disk.begin_write_with(ByteRange::new(0, 1), move |_permit| teller.store(true, Ordering::Relaxed));
    !let_in.load(Ordering::Relaxed)
}

#[test]
fn what_is_called_off_before_its_instant_copies_nothing_and_leaves_no_new_file() {
    let fixture = Fixture::new();
    fs::write(fixture.path("old"), vec![9; LENGTH]).unwrap();
    let new = BackupOptions::new(fixture.path("new").display().to_string());
    for options in [fixture.in_place("old"), new] {
        let call_off = CallOff::default();
        let permit = fixture.disk.begin_write(ByteRange::new(0, 1)).unwrap();
        let backups = std::thread::scope(|scope| {
            let disks = [(fixture.disk.clone(), options)];
            let (engine, called) = (&fixture.engine, &call_off);
            let start =
                scope.spawn(move || engine.start_group_unless(&disks, GroupFailure::GoOn, PATIENCE, called));
            let deadline = std::time::Instant::now() + PATIENCE;
            while !is_held_back(&fixture.disk) {
                assert!(std::time::Instant::now() < deadline, "no barrier");
            }
            call_off.with(0).unwrap();
            drop(permit);
            start.join().unwrap()
        });
        let [backup] = &backups.unwrap()[..] else { panic!("one disk") };
        assert!(matches!(backup.job.wait().outcome, Outcome::Cancelled));
        // It is too late now.
        call_off.with(0).unwrap_err();
        call_off.all();
    }
    assert!(fs::read(fixture.path("old")).unwrap() == vec![9; LENGTH]);
    assert!(!fixture.path("new").exists());
}

/// What is there by the time the job has started is not the file that was taken.
#[test]
fn another_file_at_the_path_of_the_fleece_file_stays() {
    for replaced in [false, true] {
        let fixture = Fixture::new();
        fs::write(fixture.path("fleece"), b"").unwrap();
        let fleece = FleeceOptions {
            size: 8 << 20,
            ..FleeceOptions::new(fixture.path("fleece").display().to_string())
        };
        let new = BackupOptions::new(fixture.path("new").display().to_string());
        let options = BackupOptions { fleece: Some(fleece), ..new };
        let permit = fixture.disk.begin_write(ByteRange::new(0, 1)).unwrap();
        let backup = std::thread::scope(|scope| {
            let start = scope.spawn(|| fixture.engine.start_backup(&fixture.disk, &options));
            let deadline = std::time::Instant::now() + PATIENCE;
            while !is_held_back(&fixture.disk) {
                assert!(std::time::Instant::now() < deadline, "no barrier");
            }
            if replaced {
                fs::write(fixture.path("other"), b"somebody else's").unwrap();
                fs::rename(fixture.path("other"), fixture.path("fleece")).unwrap();
            }
            drop(permit);
            start.join().unwrap().unwrap()
        });
        assert!(matches!(backup.job.wait().outcome, Outcome::Complete));
        assert_eq!(
            fs::read(fixture.path("fleece")).ok().as_deref(),
            replaced.then_some(&b"somebody else's"[..])
        );
        let told = backup.notices.iter().any(|notice| notice.contains("another file is there by now"));
        assert_eq!(told, replaced, "{:?}", backup.notices);
    }
}
