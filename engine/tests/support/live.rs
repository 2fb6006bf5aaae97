//! An engine with a directory for its disks and targets, and how to wait for a future.

use std::future::Future;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread;
use std::time::{Duration, Instant};

use engine::live::{BackupOptions, DiskOptions, Engine, EngineOptions, LiveDisk};

/// Beyond this it counts as hung.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Fixture {
    directory: tempfile::TempDir,
    pub(crate) engine: Engine,
}

impl Fixture {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self { directory, engine: Engine::start(&EngineOptions::default()).unwrap() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The same as options take it.
    pub(crate) fn name(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// Open a disk that is there.
    pub(crate) fn open(&self, name: &str, writable: bool) -> LiveDisk {
        self.engine.open_disk(&DiskOptions { path: self.name(name), writable }).unwrap()
    }

    /// A disk with these contents.
    pub(crate) fn disk_of(&self, name: &str, contents: &[u8], writable: bool) -> LiveDisk {
        std::fs::write(self.path(name), contents).unwrap();
        self.open(name, writable)
    }

    pub(crate) fn options(&self, target: &str) -> BackupOptions {
        BackupOptions::new(self.name(target))
    }
}

/// Polls a future on this thread until it is ready.
pub(crate) fn block_on<F: Future>(future: F) -> F::Output {
    struct Unpark(thread::Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut context = Context::from_waker(&waker);
    let mut future = pin!(future);
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
            return output;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        assert!(!left.is_zero(), "it never comes");
        thread::park_timeout(left);
    }
}
