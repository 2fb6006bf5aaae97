//! The copy as an embedder drives it: real files, both real rings, the handle from other threads.

use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use engine::copy::{CopyOptions, IoEngine, start, start_with};
use engine::job::{Outcome, Refusal, Status};
use engine::units::Speed;

const LENGTH: usize = (5 << 20) + 777;

fn contents() -> Vec<u8> {
    let mut rng = fastrand::Rng::with_seed(7);
    let mut bytes = vec![0; LENGTH];
    rng.fill(&mut bytes);
    bytes
}

fn source_in(directory: &Path) -> PathBuf {
    let path = directory.join("source");
    std::fs::write(&path, contents()).unwrap();
    path
}

fn options(directory: &Path, io_engine: IoEngine) -> CopyOptions {
    let source = source_in(directory).display().to_string();
    let target = directory.join("target").display().to_string();
    CopyOptions { io_engine, ..CopyOptions::new(source, target) }
}

fn slow(options: CopyOptions) -> CopyOptions {
    CopyOptions { speed: Some(Speed(NonZeroU64::new(64 << 10).unwrap())), ..options }
}

fn each_engine(test: impl Fn(IoEngine)) {
    for io_engine in [IoEngine::Auto, IoEngine::Threads] {
        test(io_engine);
    }
}

#[test]
fn the_callback_comes_once_and_before_the_waiters_are_told() {
    each_engine(|io_engine| {
        let directory = tempfile::tempdir().unwrap();
        let calls = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&calls);
        let callback = Box::new(move |result: &engine::job::JobResult| {
            assert!(matches!(result.outcome, Outcome::Complete));
            counted.fetch_add(1, Ordering::SeqCst);
        });
        let copy = start_with(&options(directory.path(), io_engine), Some(callback)).unwrap();
        let result = copy.job.wait();
        assert_eq!(calls.load(Ordering::SeqCst), 1);
        assert!(matches!(result.outcome, Outcome::Complete));
        assert_eq!(result.progress.done, LENGTH as u64);
        assert_eq!(copy.job.status(), Status::Concluded);
        assert_eq!(std::fs::read(directory.path().join("target")).unwrap(), contents());
    });
}

#[test]
fn a_callback_that_panics_changes_nothing_of_the_result() {
    each_engine(|io_engine| {
        let directory = tempfile::tempdir().unwrap();
        let options = options(directory.path(), io_engine);
        let copy = start_with(&options, Some(Box::new(|_| panic!("the listener's own mistake")))).unwrap();
        let result = copy.job.wait();
        assert!(matches!(result.outcome, Outcome::Complete), "{result:?}");
        assert_eq!(result.progress.done, LENGTH as u64);
        let told = "the completion callback panicked: the listener's own mistake";
        assert!(result.notices.iter().any(|notice| notice == told), "{:?}", result.notices);
        assert_eq!(copy.job.status(), Status::Concluded);
        assert_eq!(std::fs::read(directory.path().join("target")).unwrap(), contents());
    });
}

#[test]
fn the_disks_are_free_the_moment_the_job_has_ended() {
    each_engine(|io_engine| {
        let directory = tempfile::tempdir().unwrap();
        let options = CopyOptions { force: true, ..options(directory.path(), io_engine) };
        for round in 0..40 {
            let copy = start(&options).unwrap_or_else(|error| panic!("round {round}: {error}"));
            assert!(matches!(copy.job.wait().outcome, Outcome::Complete));
        }
    });
}

#[test]
fn a_job_is_paused_sped_up_and_resumed_by_its_handle() {
    each_engine(|io_engine| {
        let directory = tempfile::tempdir().unwrap();
        let copy = start(&slow(options(directory.path(), io_engine))).unwrap();
        copy.job.pause().unwrap();
        assert_eq!(copy.job.pause(), Err(Refusal::AlreadyPaused));
        while copy.job.status() != Status::Paused {
            std::thread::yield_now();
        }
        let frozen = copy.job.progress().done;
        copy.job.set_speed(None).unwrap();
        assert!(copy.job.wait_timeout(Duration::from_millis(50)).is_none(), "a paused job does not end");
        assert_eq!(copy.job.progress().done, frozen, "nothing moves while it is paused");
        copy.job.resume().unwrap();
        assert!(matches!(copy.job.wait().outcome, Outcome::Complete));
        assert_eq!(std::fs::read(directory.path().join("target")).unwrap(), contents());
        assert!(copy.job.resume().is_err(), "a job that has ended takes no verbs");
    });
}

/// Also when nothing happens: a pause, or a device that does not answer.
#[test]
fn time_goes_on_for_whoever_looks() {
    let directory = tempfile::tempdir().unwrap();
    let copy = start(&slow(options(directory.path(), IoEngine::Auto))).unwrap();
    copy.job.pause().unwrap();
    while copy.job.status() != Status::Paused {
        std::thread::sleep(Duration::from_millis(1));
    }
    let before = copy.job.progress();
    std::thread::sleep(Duration::from_secs(1));
    let after = copy.job.progress();
    assert!(after.elapsed >= before.elapsed + Duration::from_millis(500), "{before:?} {after:?}");
    assert_eq!(after.done, before.done);
    copy.job.cancel().unwrap();
    assert!(matches!(copy.job.wait().outcome, Outcome::Cancelled));
}

#[test]
fn a_cancelled_copy_leaves_no_partial_file() {
    each_engine(|io_engine| {
        let directory = tempfile::tempdir().unwrap();
        let copy = start(&slow(options(directory.path(), io_engine))).unwrap();
        copy.job.cancel().unwrap();
        let result = copy.job.wait();
        assert!(matches!(result.outcome, Outcome::Cancelled));
        assert!(!result.resumable);
        assert!(!directory.path().join("target").exists(), "{:?}", result.notices);
        assert!(copy.job.cancel().is_err());
    });
}

/// Whenever it comes, down to the last steps of a copy.
#[test]
fn a_cancel_that_is_accepted_has_its_effect() {
    let mut rng = fastrand::Rng::with_seed(9);
    let (mut accepted, mut refused) = (0, 0);
    for round in 0..600 {
        if round >= 120 && accepted > 0 && refused > 0 {
            break;
        }
        let directory = tempfile::tempdir().unwrap();
        let map = (round % 2 == 0).then(|| directory.path().join("map"));
        let copy = start(&CopyOptions { map, ..options(directory.path(), IoEngine::Auto) }).unwrap();
        while copy.job.progress().done < LENGTH as u64 {
            std::thread::yield_now();
        }
        std::thread::sleep(Duration::from_micros(rng.u64(0..4000)));
        let cancelled = copy.job.cancel().is_ok();
        let result = copy.job.wait();
        let there = directory.path().join("target").exists();
        if cancelled {
            accepted += 1;
            assert!(matches!(result.outcome, Outcome::Cancelled), "round {round}: {:?}", result.outcome);
            // What is complete but for the user's word goes on from its map, and does not if it has none.
            assert_eq!((there, result.resumable), (round % 2 == 0, round % 2 == 0), "round {round}");
        } else {
            refused += 1;
            assert!(
                matches!(result.outcome, Outcome::Complete) && there,
                "round {round}: {:?}",
                result.outcome
            );
        }
    }
    assert!(accepted > 0 && refused > 0, "{accepted} cancels accepted, {refused} refused");
}

#[test]
fn a_cancelled_copy_with_a_map_goes_on() {
    each_engine(|io_engine| {
        let directory = tempfile::tempdir().unwrap();
        let map = directory.path().join("map");
        let with_map =
            CopyOptions { map: Some(map.clone()), verify: true, ..options(directory.path(), io_engine) };
        let copy = start(&slow(with_map.clone())).unwrap();
        while copy.job.progress().copied == 0 {
            std::thread::yield_now();
        }
        copy.job.cancel().unwrap();
        let first = copy.job.wait();
        assert!(matches!(first.outcome, Outcome::Cancelled) && first.resumable);
        let second = start(&with_map).unwrap().job.wait();
        assert!(matches!(second.outcome, Outcome::Complete) && second.verified);
        assert_eq!(second.progress.resumed, first.progress.copied, "what was done is not done again");
        assert_eq!(second.progress.resumed + second.progress.copied, LENGTH as u64);
        assert!(!map.exists(), "the map of a complete copy is removed");
        assert_eq!(std::fs::read(directory.path().join("target")).unwrap(), contents());
    });
}

#[test]
fn a_target_that_does_not_hold_what_the_map_says_is_refused_and_untouched() {
    use std::os::unix::fs::FileExt;
    each_engine(|io_engine| {
        let directory = tempfile::tempdir().unwrap();
        let with_map =
            CopyOptions { map: Some(directory.path().join("map")), ..options(directory.path(), io_engine) };
        let copy = start(&slow(with_map.clone())).unwrap();
        while copy.job.progress().copied < 1 << 16 {
            std::thread::yield_now();
        }
        copy.job.cancel().unwrap();
        let first = copy.job.wait();
        assert!(first.resumable, "{first:?}");
        let target = std::fs::OpenOptions::new().write(true).open(directory.path().join("target")).unwrap();
        // The first and the last byte of what is done: what another disk of the same name and length would not have.
        for at in [0, first.progress.copied - 1] {
            let right = contents()[usize::try_from(at).unwrap()];
            target.write_all_at(&[!right], at).unwrap();
            let before = std::fs::read(directory.path().join("target")).unwrap();
            let error = start(&with_map).unwrap_err();
            assert_eq!(error.kind(), engine::error::ErrorKind::MapRefused);
            let told = format!("differs from the source at byte {at}");
            assert!(error.to_string().contains(&told), "{error}");
            assert_eq!(std::fs::read(directory.path().join("target")).unwrap(), before);
            target.write_all_at(&[right], at).unwrap();
        }
        let second = start(&with_map).unwrap();
        let result = second.job.wait();
        assert!(matches!(result.outcome, Outcome::Complete), "{result:?}");
        assert_eq!(result.progress.resumed, first.progress.copied);
    });
}

#[test]
fn a_file_without_anything_in_it_is_taken_over_to_begin_a_copy_with_a_map() {
    let directory = tempfile::tempdir().unwrap();
    let options = options(directory.path(), IoEngine::Auto);
    let target = std::fs::File::create(directory.path().join("target")).unwrap();
    target.set_len(LENGTH as u64).unwrap();
    assert!(start(&options).unwrap_err().is_refusal(), "not without a map");
    let with_map = CopyOptions { map: Some(directory.path().join("map")), ..options.clone() };
    assert!(matches!(start(&with_map).unwrap().job.wait().outcome, Outcome::Complete));
    assert!(start(&with_map).unwrap_err().is_refusal(), "not when something is stored in it");
}

#[test]
fn a_source_written_to_meanwhile_is_no_success() {
    let directory = tempfile::tempdir().unwrap();
    let copy = start(&slow(options(directory.path(), IoEngine::Auto))).unwrap();
    let source = std::fs::OpenOptions::new().write(true).open(directory.path().join("source")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&source, b"new", 100).unwrap();
    copy.job.set_speed(None).unwrap();
    let result = copy.job.wait();
    let Outcome::Failed(error) = &result.outcome else { panic!("{result:?}") };
    assert_eq!(error.kind(), engine::error::ErrorKind::SourceChanged);
    assert!(directory.path().join("target").exists(), "the torn copy is kept, and said to be one");
}
