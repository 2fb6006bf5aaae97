//! What the operator's side of a daemon takes.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use engine::storage::locator::parse_speed;
use engine::units::{Length, Speed};
use serde_json::{Value, json};

use super::daemon::qmp_socket;
use super::{OutputArgs, Policy, ProgressKind, whole_number, why};
use crate::client::ClientError;

pub(super) const BACKUP_HELP: &str = "\
The backup shows the disk as it is when the command starts, although guests go on writing. A new target file is made as long \
as the disk; it is removed again when the backup does not succeed. With --sync none the job goes on until it is cancelled: by \
'job cancel', which is success, or by a signal; the target is kept either way, unless its flush fails.

Examples:
  engine-cli backup --qmp unix:/run/engine.qmp --disk vda --target /backup/vda.img
  engine-cli backup --qmp unix:/run/engine.qmp --disk vda --target /mnt/nas/vda.img \\
      --fleece /var/tmp/vda.fleece --speed 100M

Exit codes:
  0    the backup is complete and on stable storage
  1    it failed, or somebody else cancelled it (but with --sync none: 0)
  2    wrong usage, or refused by the daemon
  3    complete, but for ranges that were skipped (policy ignore), or, with --sync none, that could not be kept at the cancel
  129, 130, 143
       interrupted by SIGHUP, SIGINT (Ctrl-C), SIGTERM; the job is cancelled";

pub(super) const JOB_HELP: &str = "\
Examples:
  engine-cli job list --qmp unix:/run/engine.qmp
  engine-cli job set-speed --qmp unix:/run/engine.qmp backup-4711 50M
  engine-cli job watch --qmp unix:/run/engine.qmp backup-4711

Exit codes:
  0    done; of watch: the job is complete
  1    the daemon is not there; of watch: the job failed or was cancelled
  2    wrong usage, or refused by the daemon
  3    of watch: complete, but for ranges that were skipped";

/// `backup`.
#[derive(Args, Debug)]
pub(crate) struct BackupArgs {
    /// Which daemon.
    #[command(flatten)]
    pub(crate) socket: Socket,
    /// The disk, as the daemon calls it
    #[arg(long, value_name = "NAME")]
    pub(crate) disk: String,
    /// Where to: a file (new, or with --force an existing one) or a block device, on the daemon's host
    #[arg(long, value_name = "PATH")]
    pub(crate) target: String,
    /// What is covered
    #[arg(long, value_name = "MODE", value_enum, default_value_t = LiveSync::Full)]
    sync: LiveSync,
    /// Speed limit in bytes a second, like 200M; none: no limit. What guests are about to change is copied at once all the same
    #[arg(long, value_name = "RATE", default_value = "none", value_parser = speed_or_none)]
    speed: SpeedLimit,
    /// What to do when the disk cannot be read
    #[arg(long, value_name = "POLICY", value_enum, default_value_t = Policy::Report)]
    on_source_error: Policy,
    /// What to do when the target cannot be written. Also with stop and enospc a guest's write to what is not copied yet needs the target:
    /// what happens then is --on-cbw-error's
    #[arg(long, value_name = "POLICY", value_enum, default_value_t = Policy::Report)]
    on_target_error: Policy,
    /// What breaks when the old contents of what a guest writes cannot be copied first
    #[arg(long, value_name = "WHAT", value_enum, default_value_t = OnCbwError::BreakSnapshot)]
    on_cbw_error: OnCbwError,
    /// How long a guest's request waits for that at most, in seconds, however large it is; 0: for ever
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = cbw_timeout)]
    cbw_timeout: u32,
    /// Copy what guests are about to change here first, a file that does not exist, so that they do not wait for the target
    #[arg(long, value_name = "FILE")]
    fleece: Option<PathBuf>,
    /// Most bytes of the fleece file
    #[arg(long, value_name = "SIZE", requires = "fleece", default_value = "1G", value_parser = size)]
    fleece_size: Length,
    /// How long to watch the guests after the end, in seconds, where there are any; 0: not at all
    #[arg(long, value_name = "SECONDS", default_value_t = 2, value_parser = seconds_after)]
    pub(crate) after: u32,
    /// What the job is called (default: made up)
    #[arg(long, value_name = "ID")]
    pub(crate) job_id: Option<String>,
    /// Overwrite a target file that exists
    #[arg(long)]
    pub(crate) force: bool,
    /// What is shown.
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

impl BackupArgs {
    /// The arguments of `x-backup`.
    ///
    /// # Errors
    /// When a path cannot be told to somebody in another directory.
    pub(crate) fn request(&self, id: &str) -> Result<Value, ClientError> {
        // The daemon may be in another directory.
        let absolute = |path: &Path| {
            let refused = |why: &str| ClientError::Refused(format!("'{}': {why}", path.display()));
            let absolute = std::path::absolute(path)
                .map_err(|error| refused(&crate::out::reason(&error).to_string()))?;
            let told = absolute.into_os_string().into_string();
            told.map_err(|_| refused("the path as a whole is not UTF-8, and QMP knows no other"))
        };
        let mut request = json!({
            "job-id": id, "device": self.disk, "path": absolute(Path::new(&self.target))?, "force": self.force,
            "sync": match self.sync {
                LiveSync::Full => "full",
                LiveSync::Top => "top",
                LiveSync::None => "none",
            },
            "speed": self.speed.bytes(),
            "on-source-error": self.on_source_error.name(),
            "on-target-error": self.on_target_error.name(),
            "on-cbw-error": match self.on_cbw_error {
                OnCbwError::BreakSnapshot => "break-snapshot",
                OnCbwError::BreakGuestWrite => "break-guest-write",
            },
            "cbw-timeout": self.cbw_timeout,
        });
        if let Some(path) = &self.fleece {
            request["x-fleece"] = json!({ "path": absolute(path)?, "size": self.fleece_size.0 });
        }
        Ok(request)
    }

    /// Whether what was copied until a cancel is what was asked for.
    pub(crate) fn keeps_partial(&self) -> bool {
        self.sync == LiveSync::None
    }

    /// Whether a guest that cannot have something copied first is the end of it, and finds no other way.
    pub(crate) fn breaks_on_guests(&self) -> bool {
        matches!(self.on_cbw_error, OnCbwError::BreakSnapshot) && self.fleece.is_none()
    }
}

/// `--sync` of a live disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum LiveSync {
    /// The whole disk
    Full,
    /// What is allocated in the top layer; a raw disk is allocated as a whole
    Top,
    /// Only what guests are about to change, until the job is cancelled, which is its success; the target is kept
    None,
}

/// `--on-cbw-error`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum OnCbwError {
    /// The backup fails, the guest's write goes on
    BreakSnapshot,
    /// The guest's write fails, the backup goes on
    BreakGuestWrite,
}

/// Which daemon.
#[derive(Args, Debug)]
pub(crate) struct Socket {
    /// The daemon's socket: unix:PATH, or the path alone
    #[arg(long = "qmp", value_name = "SOCKET", value_parser = daemon_socket)]
    pub(crate) path: PathBuf,
}

/// `job`.
#[derive(Args, Debug)]
pub(crate) struct JobArgs {
    /// What to do.
    #[command(subcommand)]
    pub(crate) action: JobAction,
}

/// One job.
#[derive(Args, Debug)]
pub(crate) struct OneJob {
    /// The job, as list shows it
    pub(crate) job: String,
    /// Where it is.
    #[command(flatten)]
    pub(crate) socket: Socket,
}

/// What to do with jobs.
#[derive(Debug, Subcommand)]
pub(crate) enum JobAction {
    /// Show all jobs, a line each
    List {
        /// Print one JSON array, as query-block-jobs gives it
        #[arg(long)]
        json: bool,
        /// Which daemon.
        #[command(flatten)]
        socket: Socket,
    },
    /// Copy no more until it is resumed; what guests are about to change is still copied
    Pause(OneJob),
    /// Go on after a pause, asked for or on an error
    Resume(OneJob),
    /// End a job: without a result, but for one of sync mode none, whose good end this is
    Cancel(OneJob),
    /// Let a job that is pending end as it has been decided: one that was started over QMP with auto-finalize off
    Finalize(OneJob),
    /// Forget a job that has ended: one that was started over QMP with auto-dismiss off
    Dismiss(OneJob),
    /// Change the speed limit of a job
    SetSpeed {
        /// Which job.
        #[command(flatten)]
        which: OneJob,
        /// Bytes a second, like 200M; none: no limit
        #[arg(value_parser = speed_or_none)]
        speed: SpeedLimit,
    },
    /// Show how far a job is until it ends
    Watch {
        /// Which job.
        #[command(flatten)]
        which: OneJob,
        /// Progress on standard error; auto: a bar on a terminal, else nothing; json: a line at most twice a second
        #[arg(long, value_name = "KIND", value_enum, default_value_t = ProgressKind::Auto)]
        progress: ProgressKind,
    },
}

impl JobAction {
    /// The daemon's socket.
    pub(crate) fn socket(&self) -> &PathBuf {
        match self {
            Self::List { socket, .. } => &socket.path,
            Self::Pause(which)
            | Self::Resume(which)
            | Self::Cancel(which)
            | Self::Finalize(which)
            | Self::Dismiss(which) => &which.socket.path,
            Self::SetSpeed { which, .. } | Self::Watch { which, .. } => &which.socket.path,
        }
    }

    /// The job that it is about; `None`: all of them.
    pub(crate) fn job(&self) -> Option<&str> {
        match self {
            Self::List { .. } => None,
            Self::Pause(which)
            | Self::Resume(which)
            | Self::Cancel(which)
            | Self::Finalize(which)
            | Self::Dismiss(which)
            | Self::SetSpeed { which, .. }
            | Self::Watch { which, .. } => Some(&which.job),
        }
    }
}

/// A socket of a daemon that runs: as the daemon takes it, or its path alone.
fn daemon_socket(text: &str) -> Result<PathBuf, String> {
    let is_path = !text.is_empty() && !text.starts_with("unix:") && !text.starts_with("tcp:");
    if is_path { Ok(text.into()) } else { qmp_socket(text) }
}

/// Most seconds that the guests are watched after the end.
const MAX_AFTER: u32 = 60;

fn seconds_after(text: &str) -> Result<u32, String> {
    whole_number(text, 0, MAX_AFTER)
}

fn cbw_timeout(text: &str) -> Result<u32, String> {
    whole_number(text, 0, u32::MAX)
}

/// A speed limit, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SpeedLimit(pub(crate) Option<Speed>);

impl SpeedLimit {
    /// As QMP has it: bytes a second, 0 for no limit.
    pub(crate) fn bytes(self) -> u64 {
        self.0.map_or(0, |speed| speed.0.get())
    }
}

fn speed_or_none(text: &str) -> Result<SpeedLimit, String> {
    if text == "none" {
        return Ok(SpeedLimit(None));
    }
    let advice = "write bytes a second like 500K, 200M or 1.5G, or none for no limit";
    let speed = parse_speed(text).map_err(|error| format!("{}; {advice}", error.reason()))?;
    Ok(SpeedLimit(Some(speed)))
}

fn size(text: &str) -> Result<Length, String> {
    engine::storage::locator::parse_size(text).map_err(|error| why(&error))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: BackupArgs,
    }

    /// What the daemon is asked for by `backup` with `more`.
    fn request(more: &[&str]) -> Value {
        let line = ["backup", "--qmp", "q", "--disk", "vda", "--target", "/t"];
        let line = Line::try_parse_from(line.iter().chain(more)).expect("well-formed");
        line.args.request("j").expect("paths that can be told")
    }

    /// An operator's guests come first, and do not wait for ever: other defaults than those of QMP.
    #[test]
    fn a_backup_as_the_daemon_is_asked_for_it() {
        let plain = json!({
            "job-id": "j", "device": "vda", "path": "/t", "force": false, "sync": "full", "speed": 0,
            "on-source-error": "report", "on-target-error": "report",
            "on-cbw-error": "break-snapshot", "cbw-timeout": 30,
        });
        assert_eq!(request(&[]), plain);
        let more = [
            "--force",
            "--sync",
            "top",
            "--speed",
            "1M",
            "--on-source-error",
            "ignore",
            "--on-target-error",
            "stop",
            "--on-cbw-error",
            "break-guest-write",
            "--cbw-timeout",
            "0",
            "--fleece",
            "/f",
            "--fleece-size",
            "2M",
        ];
        let other = json!({
            "job-id": "j", "device": "vda", "path": "/t", "force": true, "sync": "top", "speed": 1 << 20,
            "on-source-error": "ignore", "on-target-error": "stop",
            "on-cbw-error": "break-guest-write", "cbw-timeout": 0,
            "x-fleece": { "path": "/f", "size": 2 << 20 },
        });
        assert_eq!(request(&more), other);
    }

    #[test]
    fn sockets_and_speeds_as_users_write_them() {
        for text in ["q", "./q", "/run/q", "unix:q"] {
            let path = text.strip_prefix("unix:").unwrap_or(text);
            assert_eq!(daemon_socket(text), Ok(path.into()), "{text}");
        }
        for text in ["", "unix:", "tcp:7"] {
            assert!(daemon_socket(text).is_err(), "{text}");
        }
        assert_eq!(speed_or_none("none").map(SpeedLimit::bytes), Ok(0));
        assert_eq!(speed_or_none("1M").map(SpeedLimit::bytes), Ok(1 << 20));
        for text in ["0", "abc"] {
            assert!(speed_or_none(text).is_err_and(|why| why.ends_with("none for no limit")), "{text}");
        }
        assert_eq!((seconds_after("0"), seconds_after("60")), (Ok(0), Ok(60)));
        assert_eq!(seconds_after("61"), Err("it is out of range; choose 0 to 60".into()));
    }
}
