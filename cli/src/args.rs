//! The command line as users write it: one definition, from which help, completions and man pages are generated too.
//!
//! Values are understood here, by the engine's own parsers, so that a mistake is refused (exit code 2) before anything
//! is opened. What an option *means* is the engine's business: this file only translates.

mod daemon;
mod operate;

use std::fmt::Display;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use engine::copy::{CopyOptions, ErrorPolicy, Format, IoEngine, SyncMode};
use engine::error::Error;
use engine::storage::locator;
use engine::units::{ClusterSize, Length, Speed};

use crate::demo::BLOCK;

use daemon::DAEMON_HELP;
pub(crate) use daemon::{DaemonArgs, DiskArg};
use operate::{BACKUP_HELP, JOB_HELP};
pub(crate) use operate::{BackupArgs, JobAction, JobArgs};

/// Exit codes, as `--help` of every command that does work shows them.
const COPY_EXIT_CODES: &str = "\
Exit codes:
  0    the copy is complete and on stable storage
  1    it failed
  2    wrong usage, or refused before anything of the target was touched
  3    complete, but for ranges that were skipped (policy ignore)
  129, 130, 143
       interrupted by SIGHUP, SIGINT (Ctrl-C), SIGTERM; with --map a later run goes on";

const COPY_EXAMPLES: &str = "\
An NBD export is written nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH. As a target it is treated like a
device: it exists, and must be large enough.

Examples:
  engine-cli copy disk.img backup.img
  engine-cli copy --verify --map backup.map /dev/vg0/data /mnt/backup/data.img
  engine-cli copy nbd://backup.example/vm1 vm1.img
  engine-cli copy --map up.map disk.img 'nbd+unix:///disk?socket=/run/nbd.sock'
  engine-cli copy --speed 200M --on-source-error ignore --json failing.img rescued.img";

const COMPARE_HELP: &str = "\
Holes count as zeros. Disks of different lengths differ.

Examples:
  engine-cli compare disk.img backup.img
  engine-cli compare --json /dev/vg0/data data.img

Exit codes:
  0    equal
  1    something could not be read
  2    wrong usage, or refused
  3    they differ
  129, 130, 143
       interrupted by SIGHUP, SIGINT (Ctrl-C), SIGTERM";

const INFO_HELP: &str = "\
Examples:
  engine-cli info disk.img
  engine-cli info --json /dev/vg0/data

Exit codes:
  0    told
  1    something could not be read
  2    wrong usage, or refused";

const DEMO_HELP: &str = "\
A disk of random data is made in a directory of its own below $TMPDIR (else /tmp), which goes at the end. \
Every block that the guest writes carries its number and its version, so the proof finds what is missing, torn, too old \
or too new. Twice the size is needed; what does not fit is refused before anything is written.

Examples:
  engine-cli demo
  engine-cli demo --size 8G --seconds 10
  TMPDIR=/mnt/nvme engine-cli demo --json

Exit codes:
  0    the backup shows one instant, and the disk has every acknowledged write
  1    a proof failed, or something else did
  2    wrong usage, no space, or refused
  129, 130, 143
       interrupted by SIGHUP, SIGINT (Ctrl-C), SIGTERM; the files are removed";

const COMPLETIONS_HELP: &str = "\
Examples:
  engine-cli completions bash > /etc/bash_completion.d/engine-cli
  engine-cli completions zsh > ~/.zfunc/_engine-cli

Exit codes:
  0    printed
  1    could not be printed
  2    wrong usage";

const MAN_HELP: &str = "\
Examples:
  engine-cli man | man -l -
  engine-cli man /usr/local/share/man/man1

Exit codes:
  0    printed or written
  1    could not be written
  2    wrong usage";

const MAIN_HELP: &str = "\
Sizes are written like 4096, 64K, 1.5G (powers of 1024), speeds the same, a second.

Examples:
  engine-cli demo
  engine-cli copy disk.img backup.img
  engine-cli compare disk.img backup.img
  engine-cli copy --help

Exit codes:
  0 done; 1 failed; 2 wrong usage or refused; 3 complete with skipped ranges, or a difference;
  129, 130, 143 interrupted";

/// Copies disks and images at the device's limit: verified, resumable, explained.
#[derive(Debug, Parser)]
#[command(name = "engine-cli", version, about, after_help = MAIN_HELP)]
#[command(subcommand_required = true, disable_help_subcommand = true)]
pub(crate) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
    /// How much to log.
    #[command(flatten)]
    pub(crate) log: LogArgs,
}

/// Logging, the same for every command.
#[derive(Args, Debug)]
pub(crate) struct LogArgs {
    /// Log what happens inside to standard error; twice: more, three times: everything
    #[arg(short, action = clap::ArgAction::Count, global = true, conflicts_with = "log", display_order = 900)]
    pub(crate) verbose: u8,
    /// Log by a filter like debug or engine::copy=trace (default: $ENGINE_LOG, else nothing)
    #[arg(long, value_name = "FILTER", global = true, display_order = 901)]
    pub(crate) log: Option<String>,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Copy a disk or an image
    #[command(after_help = format!("{COPY_EXAMPLES}\n\n{COPY_EXIT_CODES}"))]
    Copy(CopyArgs),
    /// Find the first byte in which two disks differ
    #[command(after_help = COMPARE_HELP)]
    Compare(CompareArgs),
    /// Tell what is known about a disk, and what this host offers for copying it
    #[command(after_help = INFO_HELP)]
    Info(InfoArgs),
    /// Back up a disk while a guest writes to it, and prove that the backup shows one instant
    #[command(after_help = DEMO_HELP)]
    Demo(DemoArgs),
    /// Serve disks to guests over NBD, with backups of them, and take commands over QMP
    #[command(after_help = DAEMON_HELP)]
    Daemon(DaemonArgs),
    /// Back up a disk of a running daemon while guests write to it
    #[command(after_help = BACKUP_HELP)]
    Backup(BackupArgs),
    /// Show, steer and watch the jobs of a running daemon
    #[command(after_help = JOB_HELP, disable_help_subcommand = true)]
    Job(JobArgs),
    /// Print a completion script for a shell
    #[command(after_help = COMPLETIONS_HELP)]
    Completions(CompletionsArgs),
    /// Print the man page, or write one for each command into a directory
    #[command(after_help = MAN_HELP)]
    Man(ManArgs),
}

impl Command {
    /// How progress is shown, for a command that shows any.
    pub(crate) fn progress(&self) -> Option<ProgressKind> {
        match self {
            Self::Copy(args) => Some(args.output.progress),
            Self::Compare(args) => Some(args.output.progress),
            Self::Demo(args) => Some(args.output.progress),
            Self::Backup(args) => Some(args.output.progress),
            Self::Info(_) | Self::Daemon(_) | Self::Job(_) | Self::Completions(_) | Self::Man(_) => None,
        }
    }
}

/// `copy`.
#[derive(Args, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is an independent switch of the command line")]
pub(crate) struct CopyArgs {
    /// What to copy: a file, a block device, an NBD export, or null:SIZE
    pub(crate) source: String,
    /// Where to: a file (new, or with --force an existing one), a block device, an NBD export, or null:
    pub(crate) target: String,

    /// What is covered: the whole disk, or what the top layer of the source holds
    #[arg(long, value_name = "MODE", value_enum, default_value_t = Sync::Full)]
    sync: Sync,
    /// Unit of copying: a power of two from 4K to 4M
    #[arg(long, value_name = "SIZE", default_value = "64K", value_parser = cluster_size)]
    cluster_size: ClusterSize,
    /// Most clusters in flight: 1 to 8192, and at most 1 GiB of them (default: chosen from the cluster size)
    #[arg(long, value_name = "N", value_parser = queue_depth)]
    queue_depth: Option<u32>,
    /// Speed limit in bytes a second, like 200M; what --verify reads back counts too (default: none)
    #[arg(long, value_name = "RATE", value_parser = speed)]
    speed: Option<Speed>,
    /// What to do when the source cannot be read
    #[arg(long, value_name = "POLICY", value_enum, default_value_t = Policy::Report)]
    on_source_error: Policy,
    /// What to do when the target cannot be written
    #[arg(long, value_name = "POLICY", value_enum, default_value_t = Policy::Report)]
    on_target_error: Policy,
    /// Keep in FILE how far the copy is, so that it can go on after an interruption; before it does, a sample of what is done is
    /// compared. Removed when the copy is complete
    #[arg(long, value_name = "FILE")]
    pub(crate) map: Option<PathBuf>,
    /// Read back what was written and compare it by checksum
    #[arg(long)]
    verify: bool,
    /// Write clusters of zeros as they are instead of making holes of them
    #[arg(long)]
    no_zero_detect: bool,
    /// The target device or export reads as zeros already: do not write any (a file is empty at the start in any case)
    #[arg(long)]
    target_is_zero: bool,
    /// Overwrite a target file that exists
    #[arg(long)]
    force: bool,
    /// Read a source that another program has open for writing, like a running virtual machine; a file that changes meanwhile makes the copy
    /// fail
    #[arg(long)]
    force_share: bool,
    /// What carries the I/O; auto: io_uring where the system allows it, else threads
    #[arg(long, value_name = "ENGINE", value_enum, default_value_t = Carrier::Auto)]
    io_engine: Carrier,
    /// Image format of the source; never guessed from its contents
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t = ImageFormat::Raw)]
    source_format: ImageFormat,
    /// Image format of the target
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t = ImageFormat::Raw)]
    target_format: ImageFormat,
    /// What is shown.
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// `compare`.
#[derive(Args, Debug)]
pub(crate) struct CompareArgs {
    /// One disk: a file, a block device, or an NBD export
    #[arg(value_name = "A")]
    pub(crate) a: String,
    /// The other
    #[arg(value_name = "B")]
    pub(crate) b: String,
    /// Read disks that another program has open for writing, like a running virtual machine
    #[arg(long)]
    pub(crate) force_share: bool,
    /// What is shown.
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// `info`.
#[derive(Args, Debug)]
pub(crate) struct InfoArgs {
    /// A file, a block device, or an NBD export
    pub(crate) path: String,
    /// Its image format; never guessed from its contents
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t = ImageFormat::Raw)]
    pub(crate) format: ImageFormat,
    /// Print one JSON object on standard output
    #[arg(long)]
    pub(crate) json: bool,
}

/// `demo`.
#[derive(Args, Debug)]
pub(crate) struct DemoArgs {
    /// How large the disk is, 1M to 64G
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = demo_size)]
    pub(crate) size: Length,
    /// How long the guest writes before the backup, and once more after it, 1 to 3600
    #[arg(long, value_name = "N", default_value = "3", value_parser = demo_seconds)]
    pub(crate) seconds: u64,
    /// What is shown.
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

impl DemoArgs {
    /// Blocks of the disk.
    pub(crate) fn blocks(&self) -> u32 {
        u32::try_from(self.size.0 / BLOCK as u64).expect("at most 64 GiB")
    }
}

/// `completions`.
#[derive(Args, Debug)]
pub(crate) struct CompletionsArgs {
    /// For which shell
    #[arg(value_enum)]
    pub(crate) shell: Shell,
}

/// `man`.
#[derive(Args, Debug)]
pub(crate) struct ManArgs {
    /// Write engine-cli.1, engine-cli-copy.1, … here instead of printing the main page
    pub(crate) dir: Option<PathBuf>,
}

/// What `copy`, `compare` and `demo` show while they work and at the end.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct OutputArgs {
    /// Progress on standard error; auto: a bar on a terminal, else nothing; json: JSON lines, and nothing but
    /// JSON lines there
    #[arg(long, value_name = "KIND", value_enum, default_value_t = ProgressKind::Auto)]
    pub(crate) progress: ProgressKind,
    /// Print one JSON object on standard output at the end, also after a failure
    #[arg(long)]
    pub(crate) json: bool,
}

/// `--progress`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ProgressKind {
    /// A bar on a terminal, else nothing
    Auto,
    /// A bar; where there is no terminal, a line every few seconds
    Bar,
    /// JSON lines and nothing else, messages and the log included; progress at most twice a second
    Json,
    /// Nothing
    None,
}

/// `--sync`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Sync {
    /// The whole disk
    Full,
    /// What is allocated in the top layer; a raw source is allocated as a whole
    Top,
}

/// `--on-source-error`, `--on-target-error`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Policy {
    /// The copy fails
    Report,
    /// The copy pauses; SIGCONT or Enter tries again
    Stop,
    /// Stop when out of space, else report
    Enospc,
    /// As enospc
    Auto,
    /// Try a few times, then leave the cluster out, list it with what the target holds there, and go on
    Ignore,
}

/// `--io-engine`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Carrier {
    /// io_uring where the system allows it, else threads
    Auto,
    /// io_uring, or refused
    #[value(name = "io_uring")]
    IoUring,
    /// A pool of threads
    Threads,
}

impl Carrier {
    /// As the engine takes it.
    fn engine(self) -> IoEngine {
        match self {
            Self::Auto => IoEngine::Auto,
            Self::IoUring => IoEngine::IoUring,
            Self::Threads => IoEngine::Threads,
        }
    }
}

/// `--source-format`, `--target-format`, `--format`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ImageFormat {
    /// The bytes as they are
    Raw,
    /// QEMU's qcow2 (not in this version)
    Qcow2,
}

impl ImageFormat {
    /// As users write it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }

    /// As the engine names it.
    pub(crate) fn format(self) -> Format {
        match self {
            Self::Raw => Format::Raw,
            Self::Qcow2 => Format::Qcow2,
        }
    }
}

impl Policy {
    /// As QMP spells it.
    fn name(self) -> &'static str {
        match self {
            Self::Report => "report",
            Self::Stop => "stop",
            Self::Enospc => "enospc",
            Self::Auto => "auto",
            Self::Ignore => "ignore",
        }
    }

    fn policy(self) -> ErrorPolicy {
        match self {
            Self::Report => ErrorPolicy::Report,
            Self::Stop => ErrorPolicy::Stop,
            Self::Enospc => ErrorPolicy::Enospc,
            Self::Auto => ErrorPolicy::Auto,
            Self::Ignore => ErrorPolicy::Ignore,
        }
    }
}

impl CopyArgs {
    /// Whether an existing target may be overwritten.
    pub(crate) fn force(&self) -> bool {
        self.force
    }

    /// As the engine takes them.
    pub(crate) fn options(&self) -> CopyOptions {
        CopyOptions {
            source_format: self.source_format.format(),
            target_format: self.target_format.format(),
            sync: match self.sync {
                Sync::Full => SyncMode::Full,
                Sync::Top => SyncMode::Top,
            },
            cluster_size: self.cluster_size,
            queue_depth: self.queue_depth,
            speed: self.speed,
            on_source_error: self.on_source_error.policy(),
            on_target_error: self.on_target_error.policy(),
            map: self.map.clone(),
            verify: self.verify,
            zero_detect: !self.no_zero_detect,
            target_is_zero: self.target_is_zero,
            force: self.force,
            force_share: self.force_share,
            io_engine: self.io_engine.engine(),
            ..CopyOptions::new(self.source.as_str(), self.target.as_str())
        }
    }
}

fn cluster_size(text: &str) -> Result<ClusterSize, String> {
    locator::parse_cluster_size(text).map_err(|error| why(&error))
}

fn speed(text: &str) -> Result<Speed, String> {
    locator::parse_speed(text).map_err(|error| why(&error))
}

fn queue_depth(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(0) => Err("nothing would ever be copied; use 1 or more, or leave the option out".to_owned()),
        Ok(depth) => Ok(depth),
        Err(_) => Err("it is no whole number; use 1 or more, or leave the option out".to_owned()),
    }
}

/// Large enough for some clusters; small enough for the versions of all blocks in memory.
fn demo_size(text: &str) -> Result<Length, String> {
    let size = locator::parse_size(text).map_err(|error| why(&error))?;
    if !(1 << 20..=64 << 30).contains(&size.0) {
        return Err("it is out of range; choose 1M to 64G".to_owned());
    }
    if !size.0.is_multiple_of(BLOCK as u64) {
        return Err("it is no multiple of the guest's blocks; choose a multiple of 4K".to_owned());
    }
    Ok(size)
}

fn demo_seconds(text: &str) -> Result<u64, String> {
    whole_number(text, 1, 3600)
}

/// A whole number from `least` to `most`.
fn whole_number<T: FromStr + PartialOrd + Display>(text: &str, least: T, most: T) -> Result<T, String> {
    let wrong = match text.parse() {
        Ok(number) if (&least..=&most).contains(&&number) => return Ok(number),
        Ok(_) => "it is out of range",
        Err(_) if !text.is_empty() && text.bytes().all(|letter| letter.is_ascii_digit()) => {
            "it is out of range"
        }
        Err(_) => "it is no whole number",
    };
    Err(format!("{wrong}; choose {least} to {most}"))
}

/// The part of an error that does not repeat the value: the usage message names option and value already.
fn why(error: &Error) -> String {
    match error.advice() {
        Some(advice) => format!("{}; {advice}", error.reason()),
        None => error.reason().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn defaults_are_the_engines() {
        let cli = Cli::try_parse_from(["engine-cli", "copy", "a", "b"]).expect("parses");
        let Command::Copy(copy) = cli.command else { panic!("not copy") };
        assert_eq!(format!("{:?}", copy.options()), format!("{:?}", CopyOptions::new("a", "b")));
    }

    #[test]
    fn every_option_reaches_the_engine() {
        let line = "engine-cli copy a b --sync top --cluster-size 1m --queue-depth 8 --speed 1.5g \
                    --on-source-error ignore --on-target-error stop --map m --verify --no-zero-detect --target-is-zero --force-share \
                    --force --io-engine io_uring --source-format qcow2 --target-format qcow2";
        let cli = Cli::try_parse_from(line.split_whitespace()).expect("parses");
        let Command::Copy(copy) = cli.command else { panic!("not copy") };
        let options = copy.options();
        assert_eq!(options.sync, SyncMode::Top);
        assert_eq!(options.cluster_size.bytes(), 1 << 20);
        assert_eq!(options.queue_depth, Some(8));
        assert_eq!(options.speed.map(|speed| speed.0.get()), Some(3 << 29));
        assert_eq!(options.on_source_error, ErrorPolicy::Ignore);
        assert_eq!(options.on_target_error, ErrorPolicy::Stop);
        assert_eq!(options.map, Some(PathBuf::from("m")));
        assert!(options.verify && !options.zero_detect && options.target_is_zero);
        assert!(options.force && options.force_share);
        assert_eq!(options.io_engine, IoEngine::IoUring);
        assert_eq!((options.source_format, options.target_format), (Format::Qcow2, Format::Qcow2));
    }
}
