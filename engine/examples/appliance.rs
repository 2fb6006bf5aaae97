//! A storage appliance in miniature, with the engine embedded: `cargo run --release --example appliance -p engine`.
//!
//! The appliance has an I/O path of its own: its threads write to its disks with `pwrite`, through descriptors of their own. The engine
//! carries none of that. It only has to be *asked before* each write, and *told after* it, and that is all it takes to back up
//! disks at one instant while they are written:
//!
//! 1. [`Engine::start`]: one thread with its memory, for all disks and backups of the appliance.
//! 2. [`Engine::open_disk`] for each disk, for reading: the engine reads it and never writes to it.
//! 3. Every write takes a permit first ([`LiveDisk::begin_write`]), and drops it when the data is on the disk. Without a backup that
//!    costs some nanoseconds. With one, it waits until the old contents of what it changes are in the backup, once a cluster.
//! 4. [`Engine::start_group`] takes one instant for several disks, all or none of them.
//!
//! How do we know that both backups are of the same instant? One thread keeps a journal on both disks: entry *n* goes to the data disk, then
//! to the log disk, then comes entry *n* + 1. So at every instant the data disk has either as many entries as the log disk or one more, and
//! neither lacks one in the middle. The two backups must be like that too, or they are worthless together. Other threads
//! write all over both disks meanwhile, so that the backups have something to fight with.

use std::error::Error;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use engine::job::Outcome;
use engine::live::{Backup, BackupOptions, DiskOptions, Engine, EngineOptions, GroupFailure, LiveDisk};
use engine::units::ByteRange;

type Result<T, E = Box<dyn Error + Send + Sync>> = std::result::Result<T, E>;

/// Bytes of a disk.
const DISK: u64 = 192 << 20;
/// Bytes of a write.
const BLOCK: usize = 4096;
/// The journal is a ring of so many places, spread over the disk so that its entries lie in many clusters.
const PLACES: u64 = 1024;
/// The other threads keep off the blocks of the journal.
const APART: u64 = DISK / PLACES;
/// How many of them there are for each disk.
const WRITERS: u64 = 2;

/// A disk of the appliance: what the engine knows of it, and the way by which the appliance writes to it.
struct Disk {
    live: LiveDisk,
    file: File,
}

impl Disk {
    /// Make a disk full of data, and have the engine watch over it.
    fn create(engine: &Engine, path: &Path) -> Result<Self> {
        let file = File::options().read(true).write(true).create_new(true).open(path)?;
        let mut random = fastrand::Rng::new();
        let mut piece = vec![0; 1 << 20];
        for offset in (0..DISK).step_by(piece.len()) {
            random.fill(&mut piece);
            file.write_all_at(&piece, offset)?;
        }
        for place in 0..PLACES {
            file.write_all_at(&0_u64.to_le_bytes(), place * APART)?;
        }
        file.sync_all()?;
        // Not writable: the engine would refuse to carry a write. Permits are all that we want of it.
        let live = engine.open_disk(&DiskOptions { path: path.display().to_string(), writable: false })?;
        Ok(Self { live, file })
    }

    /// The write path of the appliance. These three lines are what embedding comes down to.
    ///
    /// The permit says that the write is under way, so an instant is never taken in its middle: it must be taken before the first byte
    /// changes, for all bytes that may change, and dropped when the data is where the engine would read it. The page cache is such a
    /// place. If `begin_write` fails, nothing may be written; with the defaults it does not, since a backup is given up rather than a
    /// guest's write.
    fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        let permit = self.live.begin_write(ByteRange::new(offset, data.len() as u64))?;
        self.file.write_all_at(data, offset)?;
        drop(permit);
        Ok(())
    }
}

/// Entry after entry: to the data disk first, then to the log disk. A permit is held for one write, not for both: the instant may lie between.
fn keep_journal(data: &Disk, log: &Disk, stop: &AtomicBool) -> Result<u64> {
    let mut entry = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        entry += 1;
        let mut block = [0; BLOCK];
        block[..8].copy_from_slice(&entry.to_le_bytes());
        data.write(entry % PLACES * APART, &block)?;
        log.write(entry % PLACES * APART, &block)?;
    }
    Ok(entry)
}

/// All over the disk, except where the journal is.
fn write_at_random(disk: &Disk, stop: &AtomicBool, writes: &AtomicU64) -> Result<()> {
    let mut random = fastrand::Rng::new();
    let mut block = [0; BLOCK];
    while !stop.load(Ordering::Relaxed) {
        let offset = random.u64(..DISK / BLOCK as u64) * BLOCK as u64;
        if !offset.is_multiple_of(APART) {
            random.fill(&mut block);
            disk.write(offset, &block)?;
            writes.fetch_add(1, Ordering::Relaxed);
        }
    }
    Ok(())
}

/// Both disks at one instant; returns when both backups are complete and flushed.
fn back_up(engine: &Engine, disks: [&Disk; 2], targets: [&Path; 2]) -> Result<()> {
    // The defaults are made for appliances: a full copy, as fast as the devices let it, that steps back while guests write; a target
    // that fails or hangs breaks the backup after 30 s at the latest and never a guest's write. See `BackupOptions`.
    let wanted: Vec<_> = disks
        .into_iter()
        .zip(targets)
        .map(|(disk, target)| (disk.live.clone(), BackupOptions::new(target.display().to_string())))
        .collect();
    // Writes are held back for the moment that it takes those under way to finish, 2 s at most: if one hangs longer, nothing has
    // started and everything goes on. If one of the two fails later, the other is cancelled: alone it is of no use.
    let backups = engine.start_group(&wanted, GroupFailure::FailAll, Duration::from_secs(2))?;
    println!("backup:   both started, at one instant");
    // Watching is polling; `wait` or a callback would do as well. A backup can be paused, slowed down and cancelled by its `job`.
    while backups.iter().any(|backup| backup.job.wait_timeout(Duration::from_millis(250)).is_none()) {
        println!("progress: data {}, log {}", percent(&backups[0]), percent(&backups[1]));
    }
    for (backup, name) in backups.iter().zip(["data", "log"]) {
        let result = backup.job.wait();
        match &result.outcome {
            Outcome::Complete => println!(
                "backup:   {name} complete and flushed, {} MiB in {:.1} s",
                result.progress.done >> 20,
                result.elapsed.as_secs_f64()
            ),
            Outcome::Failed(error) => return Err(error.clone().into()),
            other => return Err(format!("the backup of {name} is not complete: {other:?}").into()),
        }
    }
    Ok(())
}

fn percent(backup: &Backup) -> String {
    let progress = backup.job.progress();
    format!("{:3} %", progress.done * 100 / progress.total.max(1))
}

/// How many entries the journal on this disk has, none missing.
fn entries(path: &Path) -> Result<u64> {
    let file = File::open(path)?;
    let read = |place: u64| -> io::Result<u64> {
        let mut entry = [0; 8];
        file.read_exact_at(&mut entry, place * APART)?;
        Ok(u64::from_le_bytes(entry))
    };
    let found = (0..PLACES).map(read).collect::<io::Result<Vec<u64>>>()?;
    let last = found.iter().copied().max().unwrap_or(0);
    for (place, &entry) in (0_u64..).zip(&found) {
        // The last entry up to `last` that belongs here; 0 before the first.
        let back = (last % PLACES + PLACES - place) % PLACES;
        let right = last.saturating_sub(back);
        if entry != right {
            return Err(format!("entry {right} is missing: place {place} has entry {entry}").into());
        }
    }
    Ok(last)
}

fn main() -> Result<()> {
    // Everything is below $TMPDIR or /tmp, and goes when `directory` does.
    let directory = tempfile::Builder::new().prefix("appliance-").tempdir()?;
    let path = |name: &str| directory.path().join(name);
    let engine = Engine::start(&EngineOptions::default())?;
    if let Some(notice) = engine.notice() {
        println!("notice:   {notice}");
    }
    let data = Disk::create(&engine, &path("data.img"))?;
    let log = Disk::create(&engine, &path("log.img"))?;
    println!("disks:    data and log, {} MiB each, in {}", DISK >> 20, directory.path().display());

    let (stop, writes) = (AtomicBool::new(false), AtomicU64::new(0));
    let (backed_up, journal, others) = thread::scope(|scope| {
        let journal = scope.spawn(|| keep_journal(&data, &log, &stop));
        let others: Vec<_> = [&data, &log]
            .into_iter()
            .flat_map(|disk| (0..WRITERS).map(move |_| disk))
            .map(|disk| scope.spawn(|| write_at_random(disk, &stop, &writes)))
            .collect();
        thread::sleep(Duration::from_millis(500));
        let backed_up = back_up(&engine, [&data, &log], [&path("data.backup"), &path("log.backup")]);
        thread::sleep(Duration::from_millis(500));
        stop.store(true, Ordering::Relaxed);
        let others: Vec<_> = others.into_iter().map(|writer| writer.join().expect("no panic")).collect();
        (backed_up, journal.join().expect("no panic"), others)
    });
    backed_up?;
    others.into_iter().collect::<Result<()>>()?;
    let (journal, writes) = (journal?, writes.into_inner());
    println!("writers:  {journal} entries in the journal, {writes} other writes, no error");

    let (in_data, in_log) = (entries(&path("data.backup"))?, entries(&path("log.backup"))?);
    println!("check:    entries in the backups: data {in_data}, log {in_log}; none is missing in between");
    if in_data != in_log && in_data != in_log + 1 {
        return Err("the backups are not of the same instant".into());
    }
    println!("          so both are of one instant, while the writers were at work");
    let now = (entries(&path("data.img"))?, entries(&path("log.img"))?);
    if now != (journal, journal) {
        return Err(format!("the disks have {now:?} entries instead of {journal}").into());
    }
    println!("          and the disks have all {journal} entries");
    // An error in the removal would be lost if `directory` were only dropped.
    directory.close()?;
    Ok(())
}
