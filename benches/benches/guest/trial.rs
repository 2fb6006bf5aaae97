//! One backup with a guest.

use std::error::Error;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use engine::job::Outcome;
use engine::live::{BackupOptions, DiskOptions, Engine, EngineOptions, FleeceOptions, Latencies, SweepDepth};
use tempfile::TempDir;

use super::load::{AFTER, DURING, Load};

/// How long the guest writes before the backup.
const LEAD: Duration = Duration::from_secs(1);
/// Spacing of the timeline.
const SAMPLE: Duration = Duration::from_millis(50);

/// What the sweep may have in flight.
#[derive(Clone, Debug)]
pub(crate) struct Choice {
    pub(crate) name: String,
    pub(crate) depth: SweepDepth,
    /// What guests change goes to a fleece file first.
    pub(crate) fleece: bool,
}

/// A point of the timeline.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    pub(crate) seconds: f64,
    pub(crate) done: u64,
    pub(crate) in_flight: u64,
}

/// What came of it.
pub(crate) struct Trial {
    pub(crate) choice: String,
    /// Guest's requests in flight; 0: no guest.
    pub(crate) depth: u32,
    pub(crate) round: u32,
    pub(crate) bytes: u64,
    pub(crate) seconds: f64,
    pub(crate) before: Latencies,
    pub(crate) during: Latencies,
    pub(crate) timeline: Vec<Sample>,
}

impl Trial {
    /// Bytes a second of sweep and copy-before-write together.
    pub(crate) fn rate(&self) -> f64 {
        self.bytes as f64 / self.seconds
    }
}

/// The disk, made once.
pub(crate) struct Setup {
    directory: TempDir,
    disk: PathBuf,
    size: u64,
    /// A device that takes all backups; otherwise each has a new file beside the disk.
    device: Option<PathBuf>,
}

impl Setup {
    pub(crate) fn make(workdir: &Path, size: u64, device: Option<PathBuf>) -> Result<Self, Box<dyn Error>> {
        let directory = tempfile::Builder::new().prefix("engine-guest-").tempdir_in(workdir)?;
        let disk = directory.path().join("disk.raw");
        let mut file = File::create(&disk)?;
        let mut random = fastrand::Rng::with_seed(1);
        let mut chunk = vec![0; 1 << 20];
        for _ in 0..size >> 20 {
            random.fill(&mut chunk);
            file.write_all(&chunk)?;
        }
        file.sync_all()?;
        Ok(Self { directory, disk, size, device })
    }

    pub(crate) fn run(&self, choice: &Choice, depth: u32, round: u32) -> Result<Trial, Box<dyn Error>> {
        let file = self.directory.path().join("target.raw");
        let target = self.device.as_ref().unwrap_or(&file);
        let engine = Engine::start(&EngineOptions::default())?;
        let disk =
            engine.open_disk(&DiskOptions { path: self.disk.display().to_string(), writable: true })?;
        nix::unistd::sync();
        let load = Load::start(&disk, depth, u64::from(round));
        std::thread::sleep(LEAD);
        let mut options = BackupOptions::new(target.display().to_string());
        options.depth = choice.depth;
        options.force = self.device.is_some();
        let fleece = self.directory.path().join("fleece");
        options.fleece = choice.fleece.then(|| FleeceOptions::new(fleece.display().to_string()));
        let backup = engine.start_backup(&disk, &options)?;
        let start = Instant::now();
        load.enter(DURING);
        let mut timeline = Vec::new();
        let result = loop {
            let progress = backup.job.progress();
            let seconds = start.elapsed().as_secs_f64();
            timeline.push(Sample { seconds, done: progress.done, in_flight: progress.in_flight });
            if let Some(result) = backup.job.wait_timeout(SAMPLE) {
                break result;
            }
        };
        let seconds = start.elapsed().as_secs_f64();
        load.enter(AFTER);
        let [before, during, _] = load.stop();
        if !matches!(result.outcome, Outcome::Complete) {
            return Err(format!("the backup did not complete: {:?}", result.outcome).into());
        }
        drop(disk);
        drop(engine);
        if self.device.is_none() {
            std::fs::remove_file(target)?;
        }
        Ok(Trial {
            choice: choice.name.clone(),
            depth,
            round,
            bytes: self.size,
            seconds,
            before,
            during,
            timeline,
        })
    }
}
