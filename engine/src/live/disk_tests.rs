//! What a disk's handle leaves for the ring thread.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Waker};

use super::DiskId;
use super::asks::Wish;
use super::command::{Command, Inbox};
use super::disk::{DiskShared, Inner, LiveDisk};
use super::jobs::{JobId, Watch};
use crate::interval_set::IntervalSet;
use crate::ring::Wake;
use crate::storage::{LiveAccess, Locator, open_live};
use crate::units::{ByteRange, ClusterRange, ClusterSize, Geometry};

struct Nobody;

impl Wake for Nobody {
    fn wake(&self) {}
}

#[test]
fn a_future_that_goes_while_it_waits_for_a_copy_says_so() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let source = open_live(&Locator::path(file.path()), LiveAccess::Permits).unwrap();
    let waker: Arc<dyn Wake> = Arc::new(Nobody);
    let shared = DiskShared::new(DiskId(0), Arc::from("disk"), source.length(), Arc::clone(&waker));
    let inbox = Inbox::new(waker);
    let geometry = Geometry::new(source.length(), ClusterSize::DEFAULT);
    let set = Arc::new(IntervalSet::new(geometry.clusters()).unwrap());
    shared.jobs().attach(Arc::new(Watch::new(JobId(5), set, geometry)));
    let source = Some(Box::new(source));
    let inner = Inner { shared, inbox: Arc::clone(&inbox), source, opened: None, writable: false };
    let disk = LiveDisk { inner: Arc::new(inner) };
    let asked;
    {
        let mut future = pin!(disk.begin_write_async(ByteRange::new(65_536, 1)));
        assert!(future.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        asked = inbox.take();
        assert!(matches!(
            &asked,
            Some(Command::Copy { wish: Wish { job: JobId(5), clusters, range }, answer, .. })
                if *clusters == ClusterRange::new(1, 2) && range.offset == 65_536 && answer.is_wanted()
        ));
        assert!(inbox.take().is_none() && !inbox.has_someone_left());
    }
    assert!(matches!(&asked, Some(Command::Copy { answer, .. }) if !answer.is_wanted()));
    assert!(inbox.has_someone_left(), "it goes before its answer is there");
    assert!(inbox.take().is_none(), "the ring thread is not woken for that");
    // Whoever drops the last handle, be it the ring thread, closes nothing.
    drop(disk);
    assert!(matches!(inbox.take(), Some(Command::RemoveDisk { disk: DiskId(0), source: Some(_) })));
}
