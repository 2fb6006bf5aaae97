//! A copy of a live disk as its starter has it: options, target, handle.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;

use super::DiskId;
use super::ask::{Answer, ask, ask_with, may_wait};
use super::carrier::IoOutcome;
use super::command::{Command, NewFleece, NewJob};
use super::controller::SweepDepth;
use super::disk::{File, Io, LiveDisk, LiveInbox};
use super::ends::{at_end, last_look};
use super::jobs::JobId;
use super::room::{Room, Share};
use crate::copier::fleece::{MAX_SLOTS, MIN_SLOTS as MIN_FLEECE_SLOTS};
use crate::copier::plan::{Limits, LivePlan, Plan, Side};
use crate::error::{Error, ErrorKind, Operation, Refusal};
use crate::interval_set::IntervalSet;
use crate::job::handle::Shared;
use crate::job::runner::empty_progress;
use crate::job::{JobHandle, Lifecycle, Observer};
use crate::modes::{CbwErrorPolicy, ErrorPolicy, Format, SyncMode};
use crate::ring::{ExtentQuery, FileId};
use crate::storage::{
    Locator, OpenedFleece, OpenedSource, OpenedTarget, Storage, TargetOptions, TargetPlan, alignment_of,
    open_fleece, plan_target,
};
use crate::units::{ByteRange, ClusterSize, Geometry, Length, Speed};

/// Bytes in flight of a job, those of guests' copies included.
const BYTES_IN_FLIGHT: u64 = 5 << 20;
/// Of these the part that the sweep leaves to guests.
const RESERVED_PART: u64 = 5;
/// Fewest slots.
const MIN_SLOTS: u64 = 8;
/// Largest request of the sweep in bytes, unless one cluster is larger.
const MAX_REQUEST_BYTES: u64 = 1 << 20;

/// Where the old contents of what guests change go first, so that guests wait for local storage only and not for the target: a
/// place of its own, which is free again after the job.
///
/// A job that has stopped because its target is full or broken goes on as long as there is room in it. What finds no room goes to the
/// target as without a fleece file.
#[derive(Clone, Debug)]
pub struct FleeceOptions {
    /// A file that does not exist or is empty, which loses its name at once, or a block device of its own.
    pub path: String,
    /// Bytes of it; of a device at most that many. At least 16 clusters, at most 1,048,576. Those of a file are reserved at the start.
    pub size: u64,
}

impl FleeceOptions {
    /// 1 GiB at `path`.
    #[must_use]
    pub fn new(path: impl Into<String>) -> Self {
        Self { path: path.into(), size: 1 << 30 }
    }
}

/// What to copy, where to, and how.
#[derive(Clone, Debug)]
pub struct BackupOptions {
    /// The target: a path of a file or a block device.
    pub target: String,
    /// What is covered.
    pub sync: SyncMode,
    /// Unit of copying.
    pub cluster_size: ClusterSize,
    /// Speed limit of the sweep.
    pub speed: Option<NonZeroU64>,
    /// What the sweep does about an error of the disk.
    pub on_source_error: ErrorPolicy,
    /// What the sweep does about an error of the target.
    pub on_target_error: ErrorPolicy,
    /// What becomes of a guest's write whose old contents cannot be copied.
    ///
    /// Where several jobs copy a disk, a guest waits for the first of them that has not copied what it is about to change, while the others copy
    /// beside that one: should the copy of one of the others fail or run out of its time meanwhile, with [`CbwErrorPolicy::BreakGuestWrite`], the
    /// guest's write waits for the first job all the same, and fails only after that. By then an error is tried once more, and a copy that was
    /// late but is there by then does no harm.
    pub on_cbw_error: CbwErrorPolicy,
    /// How long a guest's request waits for its copies at most, counted from the moment it asks, however large it is: a write, or zeros. (A discard waits for
    /// none.) So it has to do for the largest request that guests make: 4 GiB of zeros at once, as NBD has them, are copied MiB by MiB, and take more than
    /// half a minute where each takes more than 7 ms.
    ///
    /// What counts is the time in which this job is asked: neither the barrier of a start, nor the time for which another job of the disk keeps the request where
    /// this one has copied meanwhile, nor what the request does between its copies; nor while the process
    /// stands still for half a second or longer (but for a quarter of a second each time).
    pub cbw_timeout: Option<Duration>,
    /// How long guests may wait, at the start, for writes that are under way; counted from the start's turn. (A group has its own.)
    pub start_timeout: Duration,
    /// What the sweep may have in flight.
    pub depth: SweepDepth,
    /// Look for zeros.
    pub zero_detect: bool,
    /// The target reads as zeros.
    pub target_is_zero: bool,
    /// Zeros may be made on the target by giving its space back, as a hole or an unmapped range. If not, they take the space that they are
    /// written to: by an operation that keeps it, or as data. What reads as zeros already, and a hole is left alone either way.
    pub may_unmap: bool,
    /// Overwrite an existing file: it is emptied before the start, and stays so should that find no instant without writes after all
    /// (it was tried before).
    pub force: bool,
    /// Overwrite what exists where it is, without emptying it first: a file keeps its length and what is not copied. It must exist.
    pub in_place: bool,
    /// Largest request of the sweep in bytes; at least a cluster is one all the same.
    pub max_request: u64,
    /// Conclude without being asked to.
    pub auto_finalize: bool,
    /// Go to [`crate::job::Status::Null`] at the end without being asked to.
    pub auto_dismiss: bool,
    /// Who hears of what happens to the job.
    pub observer: Option<Observer>,
    /// Copy what guests are about to change to a fleece file first.
    pub fleece: Option<FleeceOptions>,
}

impl BackupOptions {
    /// A full copy to `target` with the defaults: a snapshot that cannot be kept is given up rather than a guest's write, after
    /// 30 seconds at the latest; a start waits 5 seconds for writes under way.
    #[must_use]
    pub fn new(target: impl Into<String>) -> Self {
        Self {
            target: target.into(),
            sync: SyncMode::Full,
            cluster_size: ClusterSize::DEFAULT,
            speed: None,
            on_source_error: ErrorPolicy::Report,
            on_target_error: ErrorPolicy::Report,
            on_cbw_error: CbwErrorPolicy::BreakSnapshot,
            cbw_timeout: Some(Duration::from_secs(30)),
            start_timeout: Duration::from_secs(5),
            depth: SweepDepth::Auto,
            zero_detect: true,
            target_is_zero: false,
            may_unmap: true,
            force: false,
            in_place: false,
            max_request: MAX_REQUEST_BYTES,
            auto_finalize: true,
            auto_dismiss: false,
            observer: None,
            fleece: None,
        }
    }
}

/// A copy of a live disk that was started. Dropped, it runs on, to its end or until it is cancelled by another handle
/// ([`Engine::jobs`](super::Engine::jobs) has one).
#[derive(Debug)]
pub struct Backup {
    /// To steer it and to wait for it.
    pub job: JobHandle,
    /// What the user should know, a line each.
    pub notices: Vec<String>,
    /// To read the disk as it was when the job started, while the job runs.
    pub snapshot: Snapshot,
}

/// The disk as it was at the t0 of a job. Cheap to clone; may outlive the job, but tells then that it has ended. What sync `top` does not
/// cover is an error once the sweep or a guest has come there.
#[derive(Clone)]
pub struct Snapshot {
    job: JobId,
    disk: DiskId,
    inbox: Arc<LiveInbox>,
    length: Length,
}

impl std::fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Snapshot").field("job", &self.job).finish_non_exhaustive()
    }
}

impl Snapshot {
    /// Length of the disk in bytes.
    #[must_use]
    pub fn length(&self) -> Length {
        self.length
    }

    /// Whose t0 it shows.
    pub(super) fn job(&self) -> JobId {
        self.job
    }

    /// What its job copies.
    pub(super) fn disk(&self) -> DiskId {
        self.disk
    }

    /// Read `length` bytes from `offset` on, as they were at t0.
    ///
    /// # Errors
    /// An I/O error of either side, a range beyond the end or left out of the copy, a job that has ended.
    ///
    /// # Panics
    /// In a callback on the ring thread, before anything is done: it would wait for itself.
    pub fn read(&self, offset: u64, length: usize) -> Result<Vec<u8>, Error> {
        may_wait();
        let (answer, asked) = ask();
        self.send(offset, length, answer);
        asked.wait().result
    }

    /// As [`Self::read`], with a callback, called on the ring thread.
    pub fn read_with(
        &self,
        offset: u64,
        length: usize,
        call: impl FnOnce(Result<Vec<u8>, Error>) + Send + 'static,
    ) {
        self.send(offset, length, ask_with(move |outcome: IoOutcome| call(outcome.result)));
    }

    /// As [`Self::read`], as a future.
    pub fn read_async(&self, offset: u64, length: usize) -> Io {
        let (answer, asked) = ask();
        self.send(offset, length, answer);
        Io::new(asked)
    }

    fn send(&self, offset: u64, length: usize, answer: Answer<IoOutcome>) {
        let range = ByteRange::new(offset, length as u64);
        if range.checked_end().is_none_or(|end| end > self.length.0) {
            let (kind, reason) = (ErrorKind::Io(Errno::EINVAL), "it lies beyond the end of the disk");
            let error = Error::new(kind, Operation::ReadSnapshot, "the disk", reason).at(range);
            return answer.give(IoOutcome::new(Err(error)));
        }
        self.inbox.send(Command::Snapshot { job: self.job, range, answer });
    }
}

/// A job whose target is ready.
pub(super) struct Prepared {
    job: NewJob<File>,
    starting: Starting,
}

impl Prepared {
    pub(super) fn split(self) -> (NewJob<File>, Starting) {
        (self.job, self.starting)
    }
}

/// What is kept of a job until it has started.
pub(super) struct Starting {
    disk: DiskId,
    target: Arc<OpenedTarget>,
    job: JobHandle,
    notices: Vec<String>,
    length: Length,
    fleece: Option<OpenedFleece>,
    /// The target held something that is gone.
    destroyed: bool,
}

impl Starting {
    pub(super) fn job(&self) -> JobHandle {
        self.job.clone()
    }

    /// Nobody wants it any more, and it starts all the same.
    pub(super) fn called_off(&mut self) {
        if self.destroyed {
            let name = self.target.storage().name().to_owned();
            self.notices.push(format!(
                "it was cancelled while it started, and {name} had been emptied by then: the old contents are gone"
            ));
        }
    }

    pub(super) fn started(mut self, number: JobId, inbox: Arc<LiveInbox>) -> Backup {
        if let Some(fleece) = &mut self.fleece {
            if let Err(error) = fleece.keep() {
                self.notices.push(format!("the fleece file keeps its name: {error}"));
            }
            fleece.in_use();
        }
        let snapshot = Snapshot { job: number, disk: self.disk, inbox, length: self.length };
        Backup { job: self.job, notices: self.notices, snapshot }
    }

    /// It has not started: a new file goes again.
    pub(super) fn undo(self) {
        if let Err(error) = self.target.discard_new_file() {
            tracing::warn!(%error, "the new target file stays");
        }
    }
}

/// A job about which everything was checked, with nothing touched.
pub(super) struct Checked<'a> {
    disk: &'a LiveDisk,
    options: &'a BackupOptions,
    target: TargetPlan,
    fleece: Option<OpenedFleece>,
    set: IntervalSet,
    slots: u32,
    share: Share,
}

impl Checked<'_> {
    /// Whether preparing it destroys what the target holds now.
    pub(super) fn destroys(&self) -> bool {
        self.target.destroys()
    }

    /// Whether preparing it changes what cannot be changed back.
    pub(super) fn leaves_a_mark(&self) -> bool {
        self.target.leaves_a_mark()
    }
}

/// Check everything, and have room kept for it.
pub(super) fn check<'a>(
    disk: &'a LiveDisk,
    options: &'a BackupOptions,
    room: &Arc<Room>,
) -> Result<Checked<'a>, Error> {
    let source = disk.inner.source();
    let target_options = TargetOptions {
        format: Format::Raw,
        force: options.force,
        in_place: options.in_place,
        target_is_zero: options.target_is_zero,
        verify: false,
        take_over_blank: false,
        resume: None,
    };
    let geometry = Geometry::new(source.length(), options.cluster_size);
    let set = IntervalSet::new(geometry.clusters()).map_err(|error| {
        Error::refused(Refusal::Unavailable, Operation::Copy, disk.name(), "no memory for its clusters")
            .because(error)
    })?;
    let target = plan_target(&Locator::parse(&options.target)?, source, &target_options)?;
    let fleece =
        options.fleece.as_ref().map(|fleece| check_fleece(fleece, options.cluster_size, source, &target));
    let fleece = fleece.transpose()?;
    let cluster = options.cluster_size.bytes();
    let slots = u32::try_from((BYTES_IN_FLIGHT / cluster).max(MIN_SLOTS)).expect("at most 5 MiB of 4 KiB");
    let bytes = u32::try_from(u64::from(slots) * cluster).expect("at most 32 MiB");
    let share = room.take(bytes, 1 + usize::from(fleece.is_some()), Operation::Copy, disk.name())?;
    Ok(Checked { disk, options, target, fleece, set, slots, share })
}

/// Open the fleece file: nothing is left of that if the job does not start.
fn check_fleece(
    fleece: &FleeceOptions,
    cluster_size: ClusterSize,
    source: &OpenedSource,
    target: &TargetPlan,
) -> Result<OpenedFleece, Error> {
    let locator = Locator::parse(&fleece.path)?;
    let check = |bytes: u64| {
        let clusters = bytes / cluster_size.bytes();
        let room = |clusters: u32| Length(u64::from(clusters) * cluster_size.bytes());
        if (u64::from(MIN_FLEECE_SLOTS)..=u64::from(MAX_SLOTS)).contains(&clusters) {
            return Ok(());
        }
        let what = if clusters < u64::from(MIN_FLEECE_SLOTS) { "not enough" } else { "too much" };
        let reason = format!("{} are {what}", Length(bytes));
        Err(Error::refused(Refusal::BadArgument, Operation::OpenFleece, locator.as_str(), reason)
            .advise(format!("give it {} to {}", room(MIN_FLEECE_SLOTS), room(MAX_SLOTS))))
    };
    check(fleece.size)?;
    let opened = open_fleece(&locator, fleece.size, source, target)?;
    check(opened.length().0)?;
    Ok(opened)
}

/// The fleece file as the ring thread takes it.
fn new_fleece(fleece: &OpenedFleece, cluster_size: ClusterSize) -> NewFleece<File> {
    let storage = fleece.storage();
    NewFleece {
        name: Arc::from(storage.name()),
        direct_alignment: alignment_of(storage.as_ref()),
        slots: u32::try_from(fleece.length().0 / cluster_size.bytes()).expect("checked"),
        file: storage,
    }
}

/// Make the targets of a group ready, or leave them all as they were (but for a file system that only tells of its limits when a file is
/// lengthened: then others may have been emptied). What cannot be undone comes last: nothing of it is left to fail for a
/// reason that could be known.
pub(super) fn prepare_all(checked: Vec<Checked<'_>>) -> Result<Vec<Prepared>, Error> {
    checked.iter().try_for_each(|checked| checked.target.check_length())?;
    let mut prepared: Vec<Option<Prepared>> = checked.iter().map(|_| None).collect();
    let mut left: Vec<(usize, Checked<'_>)> = checked.into_iter().enumerate().collect();
    left.sort_by_key(|(_, checked)| checked.destroys());
    for (at, checked) in left {
        match prepare(checked) {
            Ok(one) => prepared[at] = Some(one),
            Err(error) => {
                prepared.into_iter().flatten().for_each(|one| one.starting.undo());
                return Err(error);
            }
        }
    }
    Ok(prepared.into_iter().flatten().collect())
}

/// Make the target ready.
fn prepare(checked: Checked<'_>) -> Result<Prepared, Error> {
    let Checked { disk, options, target, fleece, set, slots, share } = checked;
    let source = disk.inner.source();
    let geometry = Geometry::new(source.length(), options.cluster_size);
    let cluster = options.cluster_size.bytes();
    let destroyed = target.destroys();
    let target = target.prepare()?;
    let space_reserved = target.is_new_file();
    if space_reserved {
        reserve(source.storage().as_ref(), target.storage().as_ref());
    }
    let notices = target.warnings().to_vec();
    let target = Arc::new(target);
    let shared = Shared::new(
        Lifecycle::new(options.auto_finalize, options.auto_dismiss),
        empty_progress(geometry.length().0),
        options.speed.map(Speed),
    );
    if let Some(observer) = &options.observer {
        shared.set_observer(observer.clone());
    }
    let handle = JobHandle::new(Arc::clone(&shared));
    let storage = target.storage();
    let name: Arc<str> = Arc::from(storage.name());
    let alignment = alignment_of(storage.as_ref());
    let (known_zero, target_before) = (target.known_zero(), target.holds_before(false));
    let (sweep_depth, sync, cluster_size) = (options.depth, options.sync, options.cluster_size);
    let options = options.clone();
    let plan = move |source: Side, file: FileId, memory: crate::ring::BufferRange| Plan {
        geometry,
        source,
        target: Side { file, name, direct_alignment: alignment, remote: false },
        sync: options.sync,
        zero_detect: options.zero_detect,
        target_is_zero: known_zero,
        allocate_ahead: false,
        target_shows_holes: false,
        target_before,
        slots,
        arena_start: memory.start,
        max_run: u32::try_from((options.max_request.min(MAX_REQUEST_BYTES) / cluster).max(1))
            .expect("small")
            .min(slots.div_ceil(4)),
        on_source_error: options.on_source_error,
        on_target_error: options.on_target_error,
        speed: options.speed.map(Speed),
        verify: false,
        map: None,
        resumed: Vec::new(),
        postponed: Vec::new(),
        live: Some(LivePlan {
            on_cbw_error: options.on_cbw_error,
            cbw_timeout: options.cbw_timeout,
            reserved_slots: (slots / u32::try_from(RESERVED_PART).expect("small")).max(1),
            space_reserved,
            may_unmap: options.may_unmap,
        }),
        limits: Limits::default(),
        #[cfg(feature = "sim")]
        planted: None,
    };
    let at_end = at_end(Arc::clone(&target), fleece.as_ref().map(OpenedFleece::storage), sync);
    let last_look = Some(last_look(Arc::clone(&target)));
    let job = NewJob {
        disk: disk.inner.shared.id(),
        target: storage,
        fleece: fleece.as_ref().map(|fleece| new_fleece(fleece, cluster_size)),
        geometry,
        set: Arc::new(set),
        shared,
        share,
        depth: sweep_depth,
        plan: Box::new(plan),
        at_end: Some(at_end),
        last_look,
    };
    let length = geometry.length();
    let disk = job.disk;
    Ok(Prepared { job, starting: Starting { disk, target, job: handle, notices, length, fleece, destroyed } })
}

/// Reserve space on a new file for the data of the source as it is now, before guests wait for anything: some file systems keep direct I/O
/// from a file while space is reserved on it. An optimisation: when it fails, the writes will tell.
fn reserve(source: &dyn Storage, target: &dyn Storage) {
    const EXTENTS: usize = 1024;
    let end = source.limits().length.0;
    let mut at = 0;
    while at < end {
        let rest = ByteRange::between(at, end);
        let Ok(extents) = source.extents(rest, ExtentQuery::Data, EXTENTS) else { return };
        let Some(last) = extents.last() else { return };
        at = last.range.end();
        let data: Vec<ByteRange> =
            extents.iter().filter(|extent| extent.present).map(|extent| extent.range).collect();
        if let Err(errno) = target.allocate(&data) {
            tracing::debug!(%errno, "space not reserved");
            return;
        }
    }
}
