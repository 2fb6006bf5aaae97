//! `blockdev-backup`, `x-backup` and `transaction`: what is asked for becomes jobs of the engine, all at one instant or none. This is what can be told
//! without a look at a path; `starting` does the rest.
//!
//! # Targets
//! A node is overwritten where it is, as with QEMU: it has to be as long as the source. Of a path (`x-backup`) the engine makes a target as `copy` does:
//! it checks everything, takes the locks, and only then makes the file, or gives it the source's length; a new file goes again if the job does not
//! succeed. No client can do that from outside without changing a file that is then refused.
//!
//! # Order
//! Each action is checked in turn, against the nodes and jobs as they are and against those before it. Only when all are fine are paths looked at, and is the
//! engine asked, which checks the rest (locks, sizes, room) before it touches any target. A client hears of a job `created` for each action
//! that was fine, and when the whole does not come about, of its end; nothing was copied then, and no target touched.

use std::num::NonZeroU64;
use std::path::Path;
use std::time::{Duration, SystemTime};

use engine::job::Status;
use engine::live::{BackupOptions, FleeceOptions, GroupFailure};
use engine::modes::{CbwErrorPolicy, ErrorPolicy, SyncMode};
use engine::units::ClusterSize;
use serde::Deserialize;
use serde_json::{Value, json};

use super::control::Control;
use super::errands::Carried;
use super::jobs::MAX_JOBS;
use super::mailbox::JobSerial;
use super::nodes::{MAX_ID, SECTOR, busy, is_well_formed};
use crate::qmp::{Arguments, QmpError};

/// How long guests may wait, at the start, for writes that are under way.
pub(super) const START_TIMEOUT: Duration = Duration::from_secs(5);
/// Most jobs of one transaction.
const MAX_ACTIONS: usize = 64;

/// What `blockdev-backup` and `x-backup` take; checked before.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Asked {
    #[serde(default)]
    pub(super) job_id: String,
    device: String,
    /// A node; empty where `path` is given.
    #[serde(default)]
    target: String,
    path: Option<String>,
    #[serde(default)]
    force: bool,
    sync: String,
    #[serde(default)]
    pub(super) speed: i64,
    #[serde(default = "report")]
    on_source_error: String,
    #[serde(default = "report")]
    on_target_error: String,
    on_cbw_error: Option<String>,
    #[serde(default)]
    cbw_timeout: u32,
    #[serde(default = "yes")]
    pub(super) auto_finalize: bool,
    #[serde(default = "yes")]
    pub(super) auto_dismiss: bool,
    pub(super) filter_node_name: Option<String>,
    x_perf: Option<Perf>,
    x_fleece: Option<Fleece>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Perf {
    #[serde(default = "default_workers")]
    max_workers: i64,
    #[serde(default)]
    max_chunk: i64,
    #[serde(default)]
    min_cluster_size: i64,
}

#[derive(Clone, Debug, Deserialize)]
struct Fleece {
    path: String,
    size: Option<i64>,
}

fn report() -> String {
    "report".to_owned()
}

fn yes() -> bool {
    true
}

fn default_workers() -> i64 {
    64
}

#[derive(Deserialize)]
struct Transaction {
    actions: Vec<Action>,
    properties: Option<Properties>,
}

#[derive(Deserialize)]
struct Action {
    #[serde(rename = "type")]
    kind: String,
    data: Arguments,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Properties {
    completion_mode: Option<String>,
}

/// A job that was checked.
pub(super) struct Planned {
    pub(super) asked: Asked,
    pub(super) serial: JobSerial,
    pub(super) source: String,
    /// The node, if it is one.
    pub(super) target: Option<String>,
    pub(super) options: BackupOptions,
}

fn refuse<T>(text: impl Into<String>) -> Result<T, QmpError> {
    Err(QmpError::generic(text))
}

impl Control {
    /// `blockdev-backup` and `x-backup`.
    pub(super) fn backup(&mut self, arguments: &Arguments) -> Result<Carried, QmpError> {
        let planned = self.plan(arguments, &[])?;
        self.start(vec![planned], GroupFailure::GoOn)
    }

    /// `transaction`.
    pub(super) fn transaction(&mut self, arguments: &Arguments) -> Result<Carried, QmpError> {
        let asked: Transaction = decode(arguments)?;
        if asked.actions.len() > MAX_ACTIONS {
            return refuse(format!("{MAX_ACTIONS} actions are the most in a transaction"));
        }
        let mode = asked.properties.and_then(|properties| properties.completion_mode);
        let on_failure =
            if mode.as_deref() == Some("grouped") { GroupFailure::FailAll } else { GroupFailure::GoOn };
        let mut planned: Vec<Planned> = Vec::new();
        for action in &asked.actions {
            let next = match action.kind.as_str() {
                "abort" => refuse("Transaction aborted using Abort action"),
                _ => self.plan(&action.data, &planned),
            };
            match next {
                Ok(next) => planned.push(next),
                Err(error) => {
                    self.tell_aborted(&planned);
                    return Err(error);
                }
            }
        }
        if planned.is_empty() { Ok(Carried::Out(json!({}))) } else { self.start(planned, on_failure) }
    }

    /// Jobs that were fine and do not come about, for another's sake.
    pub(super) fn tell_aborted(&mut self, planned: &[Planned]) {
        let now = SystemTime::now();
        for job in planned {
            self.tell_status(now, &job.asked.job_id, Status::Created);
        }
        for job in planned {
            for status in [Status::Aborting, Status::Concluded, Status::Null] {
                self.tell_status(now, &job.asked.job_id, status);
            }
        }
    }

    /// Check everything that can be told from here about a job that comes after those `before` it.
    pub(super) fn plan(&mut self, arguments: &Arguments, before: &[Planned]) -> Result<Planned, QmpError> {
        let asked: Asked = decode(arguments)?;
        let nodes = &self.nodes;
        let (source, length) = (nodes.bottom_of(&asked.device)?, nodes.length_of(&asked.device)?);
        let target = match &asked.path {
            Some(path) => {
                check_absolute("path", path)?;
                None
            }
            None => Some(nodes.bottom_of(&asked.target)?),
        };
        if target.as_ref() == Some(&source) {
            return refuse("Source and target cannot be the same");
        }
        let target_in = |node: &str| before.iter().any(|other| other.target.as_deref() == Some(node));
        let source_in = |node: &str| before.iter().any(|other| other.source == node);
        if nodes.is_target(&asked.device)? || target_in(&source) {
            return Err(busy(&asked.device));
        }
        if let Some(target) = &target {
            if nodes.is_target(&asked.target)? || target_in(target) {
                return Err(busy(&asked.target));
            }
            let sectors = |bytes: u64| bytes.div_ceil(SECTOR);
            if sectors(length) != sectors(nodes.length_of(&asked.target)?) {
                return refuse("Source and target image have different sizes");
            }
        }
        let perf = perf_of(asked.x_perf.as_ref())?;
        if let Some(filter) = &asked.filter_node_name {
            let taken = before.iter().any(|other| other.asked.filter_node_name.as_ref() == Some(filter));
            let fine = if taken {
                refuse(format!("Duplicate nodes with node-name='{filter}'"))
            } else {
                nodes.check_name(filter)
            };
            fine.map_err(|why| QmpError::generic(format!("Could not create node: {why}")))?;
        }
        if let Some(target) = &target {
            if nodes.is_read_only(&asked.target)? {
                return refuse("Could not create node: Block node is read-only");
            }
            if nodes.is_read(&asked.target)? || source_in(target) {
                let name = &asked.target;
                return refuse(format!("Node '{name}' is busy: it is the source of a job, or exported"));
            }
        }
        self.check_job_id(&asked.job_id, before)?;
        if asked.speed < 0 {
            // A job that is there for a moment only, as QEMU has it.
            let now = SystemTime::now();
            self.tell_status(now, &asked.job_id, Status::Created);
            self.tell_status(now, &asked.job_id, Status::Null);
            return refuse("Parameter 'speed' expects a non-negative value");
        }
        let options = self.options_of(&asked, &perf)?;
        Ok(Planned { serial: self.jobs.next_serial(), asked, source, target, options })
    }

    fn check_job_id(&self, id: &str, before: &[Planned]) -> Result<(), QmpError> {
        if !is_well_formed(id) {
            return refuse(format!("Invalid job ID '{id}'"));
        }
        if id.len() > MAX_ID {
            return refuse("Job ID too long");
        }
        let taken = self.jobs.by_id(id).is_ok() || self.starting(id).is_some();
        if taken || before.iter().any(|other| other.asked.job_id == id) {
            return refuse(format!("Job ID '{id}' already in use"));
        }
        if self.jobs.list.len() + self.count_starting() + before.len() >= MAX_JOBS {
            return refuse(format!("{MAX_JOBS} jobs are the most; dismiss some"));
        }
        Ok(())
    }

    fn options_of(&self, asked: &Asked, perf: &PerfOptions) -> Result<BackupOptions, QmpError> {
        let fleece = match &asked.x_fleece {
            None => None,
            Some(fleece) => {
                check_absolute("x-fleece.path", &fleece.path)?;
                let mut options = FleeceOptions::new(fleece.path.clone());
                if let Some(size) = fleece.size {
                    options.size = u64::try_from(size).map_err(|_| {
                        QmpError::generic("Parameter 'x-fleece.size' expects a non-negative value")
                    })?;
                }
                Some(options)
            }
        };
        let break_snapshot = asked.on_cbw_error.as_deref() == Some("break-snapshot");
        Ok(BackupOptions {
            sync: match asked.sync.as_str() {
                "none" => SyncMode::None,
                "top" => SyncMode::Top,
                _ => SyncMode::Full,
            },
            cluster_size: perf.cluster,
            max_request: perf.max_request,
            depth: perf.depth,
            speed: NonZeroU64::new(asked.speed.unsigned_abs()),
            on_source_error: policy_of(&asked.on_source_error),
            on_target_error: policy_of(&asked.on_target_error),
            on_cbw_error: if break_snapshot {
                CbwErrorPolicy::BreakSnapshot
            } else {
                CbwErrorPolicy::BreakGuestWrite
            },
            cbw_timeout: (asked.cbw_timeout > 0).then(|| Duration::from_secs(asked.cbw_timeout.into())),
            start_timeout: START_TIMEOUT,
            // As for guests: where a node on the way to the disk ignores discards, its space stays taken.
            may_unmap: asked.path.is_some() || self.nodes.may_trim(&asked.target)?,
            in_place: asked.path.is_none(),
            force: asked.force,
            auto_finalize: asked.auto_finalize,
            auto_dismiss: asked.auto_dismiss,
            fleece,
            ..BackupOptions::new(match &asked.path {
                Some(path) => path.clone(),
                None => self.nodes.site_of(&asked.target)?.locator().to_owned(),
            })
        })
    }
}

fn decode<T: for<'a> Deserialize<'a>>(arguments: &Arguments) -> Result<T, QmpError> {
    serde_json::from_value(Value::Object(arguments.clone()))
        .map_err(|error| QmpError::generic(error.to_string()))
}

/// A path that a client gives is no matter of the daemon's directory, of which the client knows nothing.
fn check_absolute(parameter: &str, path: &str) -> Result<(), QmpError> {
    if !Path::new(path).is_absolute() {
        return refuse(format!("Parameter '{parameter}' expects an absolute path, not '{path}'"));
    }
    Ok(())
}

fn policy_of(word: &str) -> ErrorPolicy {
    match word {
        "stop" => ErrorPolicy::Stop,
        "enospc" => ErrorPolicy::Enospc,
        "auto" => ErrorPolicy::Auto,
        "ignore" => ErrorPolicy::Ignore,
        _ => ErrorPolicy::Report,
    }
}

/// What `x-perf` comes to.
struct PerfOptions {
    cluster: ClusterSize,
    max_request: u64,
    depth: engine::live::SweepDepth,
}

fn perf_of(perf: Option<&Perf>) -> Result<PerfOptions, QmpError> {
    use engine::live::SweepDepth;
    let auto = PerfOptions { cluster: ClusterSize::DEFAULT, max_request: u64::MAX, depth: SweepDepth::Auto };
    let Some(perf) = perf else { return Ok(auto) };
    let Some(workers) = u32::try_from(perf.max_workers).ok().filter(|n| (1..=i32::MAX as u32).contains(n))
    else {
        return refuse(format!("max-workers must be between 1 and {}", i32::MAX));
    };
    let Ok(chunk) = u64::try_from(perf.max_chunk) else {
        return refuse("max-chunk must be zero (which means no limit) or positive");
    };
    let smallest = u64::try_from(perf.min_cluster_size).ok().filter(|n| *n == 0 || n.is_power_of_two());
    let Some(smallest) = smallest else {
        let why = "Cannot create block-copy-state: min-cluster-size needs to be a power of 2";
        return refuse(format!("Could not create node: {why}"));
    };
    let bytes = smallest.max(ClusterSize::DEFAULT.bytes());
    let Some(cluster) = ClusterSize::new(bytes) else {
        return refuse(format!("min-cluster-size: {smallest} is not supported; 4194304 is the most"));
    };
    if chunk > 0 && chunk < cluster.bytes() {
        return refuse(format!("Required max-chunk ({chunk}) is less than backup cluster size ({bytes})"));
    }
    // What QEMU does without being asked is no reason to leave our own ways.
    let fixed = i64::from(workers) != default_workers();
    Ok(PerfOptions {
        cluster,
        max_request: if chunk == 0 { u64::MAX } else { chunk },
        depth: if fixed { SweepDepth::Fixed(workers) } else { SweepDepth::Auto },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn perf(max_workers: i64, max_chunk: i64, min_cluster_size: i64) -> Result<PerfOptions, String> {
        perf_of(Some(&Perf { max_workers, max_chunk, min_cluster_size })).map_err(|error| error.text)
    }

    #[test]
    fn what_perf_comes_to() {
        let found = perf(8, 1 << 17, 1 << 17).expect("fine");
        assert_eq!(found.cluster.bytes(), 1 << 17);
        assert_eq!(found.max_request, 1 << 17);
        assert_eq!(found.depth, engine::live::SweepDepth::Fixed(8));
        let found = perf(64, 0, 4096).expect("fine");
        assert_eq!((found.cluster.bytes(), found.max_request), (1 << 16, u64::MAX));
        assert_eq!(found.depth, engine::live::SweepDepth::Auto);
        for (options, why) in [
            ((0, 0, 0), "max-workers must be between 1 and 2147483647"),
            ((1 << 31, 0, 0), "max-workers must be between 1 and 2147483647"),
            ((1, -1, 0), "max-chunk must be zero (which means no limit) or positive"),
            ((1, 1, 0), "Required max-chunk (1) is less than backup cluster size (65536)"),
            ((1, 1 << 16, 1 << 17), "Required max-chunk (65536) is less than backup cluster size (131072)"),
            (
                (1, 0, 100),
                "Could not create node: Cannot create block-copy-state: min-cluster-size needs to be a power of 2",
            ),
            (
                (1, 0, -4),
                "Could not create node: Cannot create block-copy-state: min-cluster-size needs to be a power of 2",
            ),
            ((1, 0, 1 << 23), "min-cluster-size: 8388608 is not supported; 4194304 is the most"),
        ] {
            assert_eq!(perf(options.0, options.1, options.2).err().as_deref(), Some(why), "{options:?}");
        }
    }
}
