//! `demo`: a disk, a guest that writes to it without pause, a backup of it, and the proof that the backup shows one instant.
//!
//! Everything lies in a directory of its own below `$TMPDIR` or `/tmp` that goes at the end, however that comes about, short of a kill. The
//! proof knows nothing of the engine: it reads the two files and goes through the guest's writes again.

mod content;
mod guest;
mod proof;

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use engine::error::{Error, Operation, Refusal};
use engine::job::{JobResult, Outcome};
use engine::live::{Backup, BackupOptions, DiskOptions, Engine, EngineOptions, LiveDisk};
use engine::units::ByteRange;
use nix::errno::Errno;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::statvfs::statvfs;

use crate::args::DemoArgs;
use crate::out;
use crate::progress::{Meter, Snapshot};
use crate::report::demo::{Account, Shown};
use crate::report::units::bytes;
use crate::report::{FAILED, deliver, exit_code};
use crate::signals::{Ending, Signalled};
pub(crate) use content::BLOCK;
use content::Content;
use guest::Guest;
pub(crate) use guest::{Felt, FeltByPhase, Phase};
use proof::Unread;

/// How often signals are looked for.
const TICK: Duration = Duration::from_millis(50);
/// Bytes written at a time when the disk is made.
const PIECE: usize = 1 << 20;

/// Why the demo ended before its end.
pub(crate) enum Stop {
    /// An error, and the exit code that it stands for.
    Error(Error, u8),
    /// The user wanted it.
    Signal(Ending),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        let code = exit_code(&error);
        Self::Error(error, code)
    }
}

/// Carry out `demo`; gives the exit code.
pub(crate) fn run(args: &DemoArgs, logging: bool) -> u8 {
    let mut demo = Demo { args, logging, account: Account::new(args), undelivered: false };
    let stop = match Signalled::install() {
        Ok(signalled) => demo.perform_in_a_directory(&signalled).err(),
        Err(error) => {
            let reason = out::reason(&error);
            Some(Error::refused(Refusal::Unavailable, Operation::Inspect, "signals", reason).into())
        }
    };
    demo.account.stop = stop;
    for message in demo.account.messages() {
        out::say(message);
    }
    let code = demo.account.exit_code();
    if args.output.json {
        return deliver(&demo.account.json(), code);
    }
    if demo.undelivered { code.max(FAILED) } else { code }
}

struct Demo<'a> {
    args: &'a DemoArgs,
    logging: bool,
    /// What has happened so far.
    account: Account<'a>,
    /// A line could not be printed.
    undelivered: bool,
}

impl Demo<'_> {
    /// A line for people on standard output.
    fn tell(&mut self, lines: &str) {
        if self.args.output.json || self.undelivered {
            return;
        }
        if let Err(undelivered) = out::print(format!("{lines}\n").as_bytes()) {
            out::complain(undelivered);
            self.undelivered = true;
        }
    }

    fn perform_in_a_directory(&mut self, signalled: &Signalled) -> Result<(), Stop> {
        let parent = std::env::temp_dir();
        check_space(&parent, self.args.size.0)?;
        let directory = tempfile::Builder::new()
            .prefix("engine-demo-")
            .tempdir_in(&parent)
            .map_err(|error| no_directory(&parent, errno_of(&error)))?;
        let path = directory.path().to_owned();
        self.account.directory = Some(path.clone());
        let performed = self.perform(directory.path(), signalled);
        self.account.left = directory
            .close()
            .err()
            .map(|error| io_error(Operation::Remove, &path, None, &error).advise("remove it with rm -r"));
        performed
    }

    fn perform(&mut self, directory: &Path, signalled: &Signalled) -> Result<(), Stop> {
        let (disk_path, backup_path) = (directory.join("disk.img"), directory.join("backup.img"));
        let content = Content::new(fastrand::u64(..));
        self.tell(&self.account.making());
        make_disk(&disk_path, content, self.args.blocks(), signalled)?;
        let engine = Engine::start(&EngineOptions::default())?;
        self.account.notices.extend(engine.notice().map(str::to_owned));
        let disk = engine.open_disk(&DiskOptions { path: text(&disk_path)?, writable: true })?;
        let backup = BackupOptions::new(text(&backup_path)?);
        let (at_call, at_return) = self.exercise(&engine, &disk, &backup, content, signalled)?;
        disk.flush()?;
        // What follows is to depend on the files alone.
        drop((disk, engine));
        self.prove_backup(&backup_path, content, (at_call, at_return), signalled)?;
        self.prove_disk(&disk_path, content, signalled)
    }

    /// The guest at work, with a backup in the middle; gives how many writes were acknowledged when its start was called, and when it returned.
    fn exercise(
        &mut self,
        engine: &Engine,
        disk: &LiveDisk,
        options: &BackupOptions,
        content: Content,
        signalled: &Signalled,
    ) -> Result<(u64, u64), Stop> {
        self.tell(&self.account.exercise());
        let mut guest = Guest::start(disk.clone(), content, self.args.blocks())?;
        let phases = self.phases(engine, disk, options, &mut guest, signalled);
        match (phases, guest.stop()) {
            (Err(Stop::Signal(ending)), _) => Err(Stop::Signal(ending)),
            // A guest that failed is the cause of what failed then.
            (_, Err(error)) => Err(Stop::Error(error, FAILED)),
            (phases, Ok(felt)) => {
                self.account.felt = Some(felt);
                let acknowledged = phases?;
                self.tell(&self.account.waits());
                Ok(acknowledged)
            }
        }
    }

    fn phases(
        &mut self,
        engine: &Engine,
        disk: &LiveDisk,
        options: &BackupOptions,
        guest: &mut Guest,
        signalled: &Signalled,
    ) -> Result<(u64, u64), Stop> {
        pass(self.args.seconds, guest, signalled)?;
        let mut meter = Meter::new(self.args.output.progress, self.logging);
        guest.next_phase();
        let at_call = guest.acknowledged();
        let backup = engine.start_backup(disk, options)?;
        let at_return = guest.acknowledged();
        signalled.steer(&backup.job);
        self.account.notices.extend_from_slice(&backup.notices);
        let result = follow(&backup, &mut meter);
        meter.finish(Some(&Snapshot::of_copy(&result.progress)));
        guest.next_phase();
        match &result.outcome {
            Outcome::Complete | Outcome::CompleteWithSkipped => {}
            Outcome::Failed(error) => return Err(Stop::Error(Error::clone(error), FAILED)),
            Outcome::Cancelled => {
                let cancelled = || Stop::Error(Error::cancelled(options.target.as_str()), FAILED);
                return Err(signalled.ending().map_or_else(cancelled, Stop::Signal));
            }
        }
        self.account.backup = Some(result);
        self.tell(&self.account.backed_up());
        pass(self.args.seconds, guest, signalled)?;
        Ok((at_call, at_return))
    }

    fn prove_backup(
        &mut self,
        path: &Path,
        content: Content,
        (at_call, at_return): (u64, u64),
        signalled: &Signalled,
    ) -> Result<(), Stop> {
        let order = content.order(self.args.blocks()).take(as_usize(self.account.writes()));
        // The write under way when the start returned may have been acknowledged before it was counted.
        let shown = read_versions(path, content, self.args.blocks(), signalled)?.and_then(|found| {
            proof::prefix_within(&found, order, at_call, at_return + 1).map_err(|flaw| flaw.error(path))
        });
        self.account.shown = Some(shown.map(|writes| Shown { writes, at_call, at_return }));
        self.tell_if_any(self.account.shown_line());
        Ok(())
    }

    fn prove_disk(&mut self, path: &Path, content: Content, signalled: &Signalled) -> Result<(), Stop> {
        let writes = self.account.writes();
        let order = content.order(self.args.blocks()).take(as_usize(writes));
        let kept = read_versions(path, content, self.args.blocks(), signalled)?.and_then(|found| {
            proof::prefix_within(&found, order, writes, writes).map_err(|flaw| flaw.error(path))
        });
        self.account.kept = Some(kept);
        self.tell_if_any(self.account.kept_line());
        Ok(())
    }

    fn tell_if_any(&mut self, line: Option<String>) {
        if let Some(line) = line {
            self.tell(&line);
        }
    }
}

/// The versions on a disk; the inner error is a flaw of it, which is a finding and ends nothing.
fn read_versions(
    path: &Path,
    content: Content,
    blocks: u32,
    signalled: &Signalled,
) -> Result<Result<Vec<u32>, Error>, Stop> {
    match proof::versions(path, content, blocks, || signalled.ending().is_none()) {
        Ok(versions) => Ok(Ok(versions)),
        Err(Unread::Flaw(flaw)) => Ok(Err(flaw.error(path))),
        Err(Unread::Error(error)) => Err(Stop::Error(error, FAILED)),
        Err(Unread::Stopped) => Err(interrupted(signalled)),
    }
}

/// Let the guest work for some time.
fn pass(seconds: u64, guest: &Guest, signalled: &Signalled) -> Result<(), Stop> {
    let end = Instant::now() + Duration::from_secs(seconds);
    loop {
        if let Some(ending) = signalled.ending() {
            return Err(Stop::Signal(ending));
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() || guest.has_ended() {
            return Ok(());
        }
        thread::sleep(left.min(TICK));
    }
}

/// Watch the backup to its end.
fn follow(backup: &Backup, meter: &mut Meter) -> Arc<JobResult> {
    loop {
        if let Some(result) = backup.job.wait_timeout(TICK) {
            return result;
        }
        meter.update(&Snapshot::of_copy(&backup.job.progress()));
    }
}

/// Refuse what does not fit below `parent`: two disks, and what a file system needs beside them.
fn check_space(parent: &Path, size: u64) -> Result<(), Error> {
    let found =
        statvfs(parent).map_err(|errno| Error::refused_by_system(Operation::Create, name(parent), errno))?;
    let free = found.blocks_available().saturating_mul(found.fragment_size());
    let needed = needed(size);
    if needed <= free {
        return Ok(());
    }
    let reason = format!(
        "no space for a disk of {} and its backup: {} are free, {} are needed",
        bytes(size),
        bytes(free),
        bytes(needed)
    );
    Err(Error::refused(
        Refusal::TooSmall,
        Operation::Create,
        format!("{}/engine-demo-*", name(parent)),
        reason,
    )
    .advise("choose a smaller --size, or set TMPDIR to a directory with more space"))
}

fn no_directory(parent: &Path, errno: Errno) -> Error {
    Error::refused_by_system(Operation::Create, format!("{}/engine-demo-*", name(parent)), errno)
        .advise("set TMPDIR to a directory that can be written to")
}

/// Bytes for a disk of `size` and its backup.
fn needed(size: u64) -> u64 {
    2 * size + size / 64 + (16 << 20)
}

fn make_disk(path: &Path, content: Content, blocks: u32, signalled: &Signalled) -> Result<(), Stop> {
    let failed =
        |operation, range, error: &io::Error| Stop::Error(io_error(operation, path, range, error), FAILED);
    let mut file = File::create_new(path).map_err(|error| failed(Operation::Create, None, &error))?;
    let mut piece = vec![0; PIECE];
    let blocks_of_a_piece = (PIECE / BLOCK) as u64;
    for first in (0..u64::from(blocks)).step_by(PIECE / BLOCK) {
        if signalled.ending().is_some() {
            return Err(interrupted(signalled));
        }
        let numbers = first..u64::from(blocks).min(first + blocks_of_a_piece);
        let length = as_usize(numbers.end - numbers.start) * BLOCK;
        let (whole, _) = piece[..length].as_chunks_mut::<BLOCK>();
        whole.iter_mut().zip(numbers).for_each(|(bytes, block)| content.fill(block, 0, bytes));
        let range = ByteRange::new(first * BLOCK as u64, length as u64);
        file.write_all(&piece[..length]).map_err(|error| failed(Operation::Write, Some(range), &error))?;
    }
    file.sync_all().map_err(|error| failed(Operation::Flush, None, &error))?;
    // The backup is to read the device, as it would with a disk that is not in memory; where that cannot be had, it reads memory.
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).ok();
    Ok(())
}

fn interrupted(signalled: &Signalled) -> Stop {
    let ending = signalled.ending();
    ending.map_or_else(|| Stop::Error(Error::cancelled("the demo"), FAILED), Stop::Signal)
}

/// A path as the engine takes it.
fn text(path: &Path) -> Result<String, Error> {
    path.to_str().map(str::to_owned).ok_or_else(|| {
        Error::refused(Refusal::BadArgument, Operation::Create, name(path), "its path is no UTF-8")
            .advise("set TMPDIR to a directory with another name")
    })
}

fn name(path: &Path) -> String {
    path.display().to_string()
}

fn as_usize(count: u64) -> usize {
    usize::try_from(count).expect("bounded by what was written")
}

fn errno_of(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

fn io_error(operation: Operation, path: &Path, range: Option<ByteRange>, error: &io::Error) -> Error {
    Error::io(operation, name(path), range, errno_of(error))
}
