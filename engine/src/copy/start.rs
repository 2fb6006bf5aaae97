//! Putting a copy together: check everything, open the ring, prepare the target, run.
//!
//! # Order
//! 1. On the caller's thread: every check that can refuse, changing nothing.
//! 2. On the new ring thread: the ring is opened (io_uring wants to be set up by the thread that uses it). Still nothing was changed.
//! 3. The target is prepared, and with a map its first version published, so that from here on a killed copy can go on. What fails
//!    before the first byte is copied takes a new target file and a new map with it.
//! 4. The caller gets its handle, and the loop runs.
//! 5. At the end, before anybody is told, [`super::end`] looks whether the source changed meanwhile, and clears up.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use crossbeam::channel::{Sender, bounded};

use super::end::at_end;
use super::{Copy, CopyOptions, StartToken, sample};
use crate::copier::Copier;
use crate::copier::plan::{Checkpoint, Limits, MapPlan, Plan, Side};
use crate::error::{Error, ErrorKind, Operation, Refusal};
use crate::interval_set::IntervalSet;
use crate::job::driver::Driver;
use crate::job::handle::{CompletionCallback, Shared, panic_text};
use crate::job::runner::empty_progress;
use crate::job::{JobHandle, Lifecycle, TargetHolds};
use crate::map::{Map, MapFile, MapHeader};
use crate::modes::SyncMode;
use crate::ring::select::{self, OpenedRing, RingConfig, SetupError};
use crate::ring::{Arena, DocumentId, FileId, Ring};
use crate::storage::locator::Place;
use crate::storage::{
    Document, Identity, Locator, OpenedSource, OpenedTarget, Resume, SourceOptions, Storage, TargetOptions,
    TargetPlan, alignment_of, open_source, plan_nbd, plan_target,
};
use crate::units::{ClusterRange, Geometry, Length};

/// Bytes in flight unless a depth is asked for: enough for a fast disk's best throughput on both sides, and together with the ring
/// within the 8 MiB that ordinary users may register with the kernel.
const DEFAULT_BYTES_IN_FLIGHT: u64 = 7 << 20;
/// Largest request, in bytes, unless one cluster is larger.
const MAX_REQUEST_BYTES: u64 = 1 << 20;
/// Largest request where a side is remote, unless one cluster is larger: so that there are as many at a time as helper threads to wait for them.
const MAX_REMOTE_REQUEST_BYTES: u64 = 512 << 10;
/// Fewest slots unless a depth is asked for.
const MIN_SLOTS: u64 = 4;
/// Most slots.
const MAX_SLOTS: u64 = 8192;

/// Everything checked, nothing touched.
struct Checked {
    options: CopyOptions,
    source: OpenedSource,
    target: TargetPlan,
    map: Option<Arc<MapFile>>,
    geometry: Geometry,
    slots: u32,
    /// Why what the map says could not be compared.
    uncompared: Option<String>,
    token: StartToken,
    callback: Option<CompletionCallback>,
}

/// Check `options`, then start the copy.
///
/// # Errors
/// A refusal (nothing was touched, [`Error::is_refusal`]) or a failure to prepare the target.
pub fn start(options: &CopyOptions) -> Result<Copy, Error> {
    begin(options, &StartToken::default(), None)
}

/// As [`start`], as long as it is not given up.
///
/// # Errors
/// As [`start`]; [`ErrorKind::Cancelled`] where it was given up.
pub fn start_unless_given_up(options: &CopyOptions, token: &StartToken) -> Result<Copy, Error> {
    begin(options, token, None)
}

/// As [`start`], with a callback that is called once with the result, on the ring thread, before waiters are told.
///
/// # Errors
/// As [`start`]. The callback is not called then.
pub fn start_with(options: &CopyOptions, callback: Option<CompletionCallback>) -> Result<Copy, Error> {
    begin(options, &StartToken::default(), callback)
}

fn begin(
    options: &CopyOptions,
    token: &StartToken,
    callback: Option<CompletionCallback>,
) -> Result<Copy, Error> {
    let checked = Checked { callback, ..check(options, token)? };
    let name = options.source.clone();
    let (started, outcome) = bounded(1);
    let thread = std::thread::Builder::new().name("engine-ring".into());
    let spawned = thread.spawn(move || carry_out(checked, &started));
    if let Err(error) = spawned {
        return Err(Error::refused(Refusal::Unavailable, Operation::Copy, name, "cannot start a thread")
            .because(error));
    }
    let died = |_| Err(Error::engine_died(name, "its thread ended before the copy began"));
    outcome.recv().unwrap_or_else(died)
}

fn check(options: &CopyOptions, token: &StartToken) -> Result<Checked, Error> {
    if options.sync == SyncMode::None {
        let reason = "sync mode none copies what guests are about to change, and nobody writes to the source of this copy";
        return Err(Error::refused(Refusal::BadArgument, Operation::Copy, options.source.clone(), reason)
            .advise("use full, or a live disk"));
    }
    let source_options = SourceOptions {
        format: options.source_format,
        force_share: options.force_share,
        layers: options.sync == SyncMode::Top,
    };
    let source = open_source(&Locator::parse(&options.source)?, &source_options)?;
    let target_locator = Locator::parse(&options.target)?;
    let geometry = Geometry::new(source.length(), options.cluster_size);
    let slots = slots_of(options)?;
    let map = open_map(options, &source, &target_locator, token)?;
    let found = map.as_ref().and_then(|map| map.map().map(|found| (found.header(), map.path())));
    if let Some((header, path)) = found {
        // First of all, as for the target below: of another pair nothing else that differs matters, and its map is not to be removed.
        let now = source.identity();
        if let Some(difference) = header.source.difference_as_source(now) {
            if header.source.path == now.path && difference.is_modification() {
                return Err(source_modified(path, now, &difference));
            }
            return Err(map_of_another(path, &header.source, now, &difference));
        }
    }
    let resume = found.map(|(header, map_path)| Resume { header, map_path });
    let target_options = TargetOptions {
        format: options.target_format,
        force: options.force,
        in_place: false,
        target_is_zero: options.target_is_zero,
        verify: options.verify,
        take_over_blank: map.is_some(),
        resume,
    };
    let target = match target_locator.place() {
        Place::Nbd(uri) => plan_nbd(&target_locator, uri, &source, &target_options)?,
        Place::Path(_) | Place::Null { .. } => plan_target(&target_locator, &source, &target_options)?,
    };
    refuse_without_flush(options, &target)?;
    if let Some((header, path)) = found {
        header.check_options(geometry, options.sync, options.verify, path)?;
    }
    let uncompared = match &map {
        Some(map) => sample::compare(map, &source, &target)?,
        None => None,
    };
    if let Some(map) = map.as_ref().filter(|map| map.map().is_none()) {
        // What the target will be is not known before it is prepared. The source stands in for it: such a map takes much the same room.
        let header = MapHeader {
            source: source.identity().clone(),
            target: source.identity().clone(),
            geometry,
            sync: options.sync,
            verify: options.verify,
            target_was_zero: false,
        };
        map.rehearse(&first_map(&header))
            .map_err(|errno| Error::refused_by_system(Operation::WriteMap, map.path(), errno))?;
    }
    let (options, token) = (options.clone(), token.clone());
    Ok(Checked { options, source, target, map, geometry, slots, uncompared, token, callback: None })
}

/// The map file, if one is asked for: found, or new.
fn open_map(
    options: &CopyOptions,
    source: &OpenedSource,
    target: &Locator,
    token: &StartToken,
) -> Result<Option<Arc<MapFile>>, Error> {
    match &options.map {
        Some(_) if matches!(target.place(), Place::Null { .. }) => Err(Error::refused(
            Refusal::Unsupported,
            Operation::OpenTarget,
            target.as_str(),
            "a null target keeps nothing that a copy could go on with",
        )
        .advise("leave out --map, or name a real target")),
        Some(path) => {
            let map = Arc::new(MapFile::open(path, source, target)?);
            if token.has_map(&map) { Ok(Some(map)) } else { Err(Error::cancelled(target.as_str())) }
        }
        None => Ok(None),
    }
}

/// What a map claims has been flushed.
fn refuse_without_flush(options: &CopyOptions, target: &TargetPlan) -> Result<(), Error> {
    if options.map.is_none() || target.can_be_flushed() {
        return Ok(());
    }
    let reason = "its server offers neither flush nor FUA: what a map calls done could be lost there";
    Err(Error::refused(Refusal::Unsupported, Operation::OpenTarget, options.target.as_str(), reason)
        .advise("leave out --map, or have it exported with a cache that can be flushed"))
}

fn source_modified(map: &str, source: &Identity, difference: &crate::storage::Difference) -> Error {
    let reason = format!("the source {} was modified since: {difference}", source.path);
    Error::new(ErrorKind::MapRefused, Operation::UseMap, map, reason)
        .advise("remove the map file and add --force to copy everything again")
}

fn map_of_another(
    path: &str,
    then: &Identity,
    now: &Identity,
    difference: &crate::storage::Difference,
) -> Error {
    let of = if then.path == now.path {
        "another source".to_owned()
    } else {
        format!("another source, {}", then.path)
    };
    let reason = format!("it belongs to a copy of {of}: {difference}");
    Error::new(ErrorKind::MapRefused, Operation::UseMap, path, reason)
        .advise("name the map of this copy, or remove the map file and add --force to copy everything again")
}

fn slots_of(options: &CopyOptions) -> Result<u32, Error> {
    let cluster = options.cluster_size.bytes();
    let most = (Arena::MAX_BYTES as u64 / cluster).min(MAX_SLOTS);
    let slots = match options.queue_depth {
        None => (DEFAULT_BYTES_IN_FLIGHT / cluster).clamp(MIN_SLOTS, MAX_SLOTS),
        Some(depth) => u64::from(depth),
    };
    if slots == 0 || slots > most {
        let reason = format!("a queue depth of {slots} is out of range");
        return Err(Error::refused(Refusal::BadArgument, Operation::Parse, "--queue-depth", reason)
            .advise(format!("choose 1 to {most} clusters of {} KiB", cluster >> 10)));
    }
    Ok(u32::try_from(slots).expect("at most MAX_SLOTS"))
}

/// How large a ring a copy wants.
fn ring_config(checked: &Checked) -> RingConfig {
    RingConfig {
        arena_bytes: usize::try_from(u64::from(checked.slots) * checked.options.cluster_size.bytes())
            .expect("at most 1 GiB"),
        capacity: (checked.slots as usize * 2 + 64).min(RingConfig::MAX_CAPACITY),
        threads: RingConfig::DEFAULT_THREADS.min(checked.slots as usize + 1),
        sockets: 0,
    }
}

/// The ring thread's life.
fn carry_out(checked: Checked, started: &Sender<Result<Copy, Error>>) {
    let opened = match select::open(checked.options.io_engine, &ring_config(&checked)) {
        Ok(opened) => opened,
        Err(error) => {
            // What was opened is given up, and a map file that stood in removed, before the caller hears of it.
            let refused = ring_refused(&checked.options, error);
            drop(checked);
            return tell(started, Err(refused));
        }
    };
    match opened.ring {
        OpenedRing::Uring(ring) => run_on(ring, checked, opened.notice, started),
        OpenedRing::Threads(ring) => run_on(ring, checked, opened.notice, started),
    }
}

fn ring_refused(options: &CopyOptions, error: SetupError) -> Error {
    let refused =
        Error::refused(Refusal::Unavailable, Operation::Copy, options.source.clone(), error.to_string());
    let refused =
        if error.is_refusal() { refused.advise("use --io-engine threads, or auto") } else { refused };
    refused.because(error)
}

/// The caller is waiting for this, unless it has gone away.
fn tell(started: &Sender<Result<Copy, Error>>, result: Result<Copy, Error>) {
    if started.send(result).is_err() {
        tracing::debug!("nobody waits for the copy to start");
    }
}

fn run_on<R>(ring: R, checked: Checked, notice: Option<String>, started: &Sender<Result<Copy, Error>>)
where
    R: Ring<File = Arc<dyn Storage>, Document = Arc<dyn Document>>,
{
    let engine = ring.name();
    let callback_and = Prepared::new(ring, checked, notice);
    let Prepared { mut driver, shared, notices, source_name } = match callback_and {
        Ok(prepared) => prepared,
        Err(error) => return tell(started, Err(error)),
    };
    tell(started, Ok(Copy { job: JobHandle::new(Arc::clone(&shared)), notices }));
    let _span = tracing::info_span!("copy", source = source_name, engine).entered();
    let ran = std::panic::catch_unwind(AssertUnwindSafe(|| driver.run()));
    let reason = match ran {
        Ok(Ok(())) => return,
        Ok(Err(failure)) => failure.to_string(),
        Err(panic) => format!("internal error: {}", panic_text(panic.as_ref())),
    };
    // The ring is broken: whoever waits must learn of it, whatever else is lost. The ring goes first, and with it what is in flight.
    let resumable = driver.copier().is_resumable();
    let resumable_bytes = driver.copier().mapped_bytes();
    let at_end = driver.take_at_end();
    if std::panic::catch_unwind(AssertUnwindSafe(|| drop(driver))).is_err() {
        tracing::error!("the ring could not be taken down");
    }
    shared.died(engine, Arc::new(Error::engine_died(source_name, reason)), |result| {
        result.resumable = resumable;
        result.resumable_bytes = resumable_bytes;
        if let Some(at_end) = at_end {
            at_end(result);
        }
    });
}

/// A driver that is ready to run.
struct Prepared<R: Ring> {
    driver: Driver<R>,
    shared: Arc<Shared>,
    notices: Vec<String>,
    source_name: String,
}

impl<R> Prepared<R>
where
    R: Ring<File = Arc<dyn Storage>, Document = Arc<dyn Document>>,
{
    fn new(mut ring: R, checked: Checked, notice: Option<String>) -> Result<Self, Error> {
        let Checked { options, source, target, map, geometry, slots, uncompared, token, callback } = checked;
        let mut notices: Vec<String> = source.warnings().to_vec();
        notices.extend(notice);
        let set = IntervalSet::new(geometry.clusters()).map_err(|error| {
            Error::refused(
                Refusal::Unavailable,
                Operation::Copy,
                options.source.clone(),
                "no memory for its clusters",
            )
            .because(error)
        })?;
        if !token.touch() {
            return Err(Error::cancelled(options.target));
        }
        let target = target.prepare()?;
        notices.extend(target.warnings().iter().cloned());
        let goes_on = map.as_ref().is_some_and(|map| map.map().is_some());
        let resumed: Vec<ClusterRange> =
            map.as_ref().and_then(|map| map.map()).map(|map| map.done().to_vec()).unwrap_or_default();
        let postponed: Vec<ClusterRange> =
            map.as_ref().and_then(|map| map.map()).map(|map| map.skipped().to_vec()).unwrap_or_default();
        let header = MapHeader {
            source: source.identity().clone(),
            target: target.identity().clone(),
            geometry,
            sync: options.sync,
            verify: options.verify,
            target_was_zero: target.known_zero(),
        };
        if let Some(map) = &map {
            notices.extend(going_on(map, geometry, &resumed));
            if map.was_found_empty() {
                notices.push(format!("map file {} is empty: starting from the beginning", map.path()));
            }
            notices.extend(uncompared);
        }
        let admitted = admit(&mut ring, &source, &target, map.as_ref()).map_err(|failure| {
            let error = Error::engine_died(options.source.clone(), failure.to_string());
            undone(&target, error)
        })?;
        if let Some(map) = &map {
            publish_first(map, &header, &target)?;
        }
        let Admitted { from, to, document } = admitted;
        if options.verify && to.direct_alignment.is_none() {
            notices.push(verified_through_cache(&to.name));
        }
        let target_is_file = target.storage().descriptors().is_some_and(|fds| !fds.block_device);
        let remote = source.storage().is_remote() || target.storage().is_remote();
        let plan = Plan {
            source: from,
            target: to,
            target_is_zero: target.known_zero(),
            allocate_ahead: target_is_file,
            target_shows_holes: target_is_file,
            target_before: target.holds_before(goes_on),
            map: document.zip(map.as_deref()).map(|(document, map)| map_plan(document, map, header)),
            resumed,
            postponed,
            ..plan_of(&options, geometry, slots, remote)
        };
        let copier = Copier::new(plan, Arc::new(set));
        let shared =
            Shared::new(Lifecycle::new(true, false), empty_progress(geometry.length().0), options.speed);
        if let Some(callback) = callback {
            shared.set_callback(callback);
        }
        let source_name = options.source;
        let at_end = at_end(source, target, map);
        let driver = Driver::attached(ring, copier, Arc::clone(&shared), Some(at_end));
        Ok(Self { driver, shared, notices, source_name })
    }
}

/// The parts of the plan that are just options; the rest is a placeholder that the caller fills in.
fn plan_of(options: &CopyOptions, geometry: Geometry, slots: u32, remote: bool) -> Plan {
    let nowhere = || Side { file: FileId(0), name: Arc::from(""), direct_alignment: None, remote: false };
    let cluster = options.cluster_size.bytes();
    let most = if remote { MAX_REMOTE_REQUEST_BYTES } else { MAX_REQUEST_BYTES };
    Plan {
        geometry,
        source: nowhere(),
        target: nowhere(),
        sync: options.sync,
        zero_detect: options.zero_detect,
        target_is_zero: false,
        allocate_ahead: false,
        target_shows_holes: false,
        target_before: TargetHolds::Unknown,
        slots,
        arena_start: 0,
        max_run: u32::try_from((most / cluster).max(1)).expect("small").min(slots.div_ceil(2)),
        on_source_error: options.on_source_error,
        on_target_error: options.on_target_error,
        speed: options.speed,
        verify: options.verify,
        map: None,
        resumed: Vec::new(),
        live: None,
        postponed: Vec::new(),
        limits: Limits::default(),
        #[cfg(feature = "sim")]
        planted: None,
    }
}

/// What a ring works on.
struct Admitted {
    from: Side,
    to: Side,
    document: Option<DocumentId>,
}

/// Give everything to the ring.
fn admit<R>(
    ring: &mut R,
    source: &OpenedSource,
    target: &OpenedTarget,
    map: Option<&Arc<MapFile>>,
) -> Result<Admitted, crate::ring::RingFailure>
where
    R: Ring<File = Arc<dyn Storage>, Document = Arc<dyn Document>>,
{
    let from = side(ring, source.storage())?;
    let to = side(ring, target.storage())?;
    let document = map.map(|map| ring.add_document(Arc::clone(map) as Arc<dyn Document>)).transpose()?;
    Ok(Admitted { from, to, document })
}

/// `error` keeps a copy from beginning: a target file that it has created goes again.
fn undone(target: &OpenedTarget, error: Error) -> Error {
    match target.discard_new_file() {
        Ok(_) => error,
        Err(left) => {
            tracing::warn!(%left, "new target file stays behind");
            error.advise(format!("remove {} by hand, which is new and empty", target.storage().name()))
        }
    }
}

fn side<R: Ring<File = Arc<dyn Storage>>>(
    ring: &mut R,
    storage: Arc<dyn Storage>,
) -> Result<Side, crate::ring::RingFailure> {
    let name = Arc::from(storage.name());
    let direct_alignment = alignment_of(storage.as_ref());
    let remote = storage.is_remote();
    let file = ring.add_file(storage)?;
    Ok(Side { file, name, direct_alignment, remote })
}

/// Said where a verification cannot ask the medium itself.
fn verified_through_cache(target: &str) -> String {
    format!(
        "{target}: without direct I/O, what is read back comes through the page cache; that is written back and \
         dropped first, but where the system keeps pages all the same, memory is compared and not the medium"
    )
}

fn map_plan(document: DocumentId, map: &MapFile, header: MapHeader) -> MapPlan {
    let encode = move |checkpoint: &Checkpoint| {
        let target_was_zero = header.target_was_zero && checkpoint.blank_is_zero;
        let header = MapHeader { target_was_zero, ..header.clone() };
        Map::new(header, checkpoint.done.clone(), checkpoint.skipped.clone())
            .expect("the copier's ranges ascend, are disjoint and lie on the disk")
            .encode()
    };
    MapPlan { document, name: Arc::from(map.path()), encode: Box::new(encode) }
}

fn going_on(map: &MapFile, geometry: Geometry, resumed: &[ClusterRange]) -> Option<String> {
    let found = map.map()?;
    let bytes: u64 = resumed.iter().map(|&range| geometry.bytes_of(range).length).sum();
    let again = match found.skipped().len() {
        0 => String::new(),
        1 => "; 1 range that was left out is tried again at the end".to_owned(),
        again => format!("; {again} ranges that were left out are tried again at the end"),
    };
    Some(format!(
        "going on from map file {}: {} of {} are done{again}",
        map.path(),
        Length(bytes),
        geometry.length()
    ))
}

/// Publish a map for a copy that begins, before any of its data is written. One that goes on has its map.
fn publish_first(map: &MapFile, header: &MapHeader, target: &OpenedTarget) -> Result<(), Error> {
    if map.map().is_some() {
        return Ok(());
    }
    map.publish(Some(&first_map(header))).map(drop).map_err(|errno| {
        // The new version may have the map's name already.
        if let Err(errno) = map.publish(None) {
            tracing::warn!(%errno, "map file stays behind");
        }
        let was_emptied = !target.is_new_file() && target.holds_before(false) == TargetHolds::Zeros;
        undone(
            target,
            if was_emptied {
                Error::io(Operation::WriteMap, map.path(), None, errno)
                    .advise(format!("{} was emptied already", target.storage().name()))
            } else {
                Error::refused_by_system(Operation::WriteMap, map.path(), errno)
            },
        )
    })
}

/// The map of a copy of which nothing is done.
fn first_map(header: &MapHeader) -> Vec<u8> {
    Map::new(header.clone(), Vec::new(), Vec::new()).expect("an empty map makes sense").encode()
}

#[cfg(test)]
#[path = "dying_ring_tests.rs"]
mod tests;
