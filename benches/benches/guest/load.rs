//! The guest: threads that each keep one write in flight.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use engine::live::{Latencies, LiveDisk};

/// Bytes of a write.
pub(crate) const BLOCK: usize = 4096;
/// Phases that are told apart.
pub(crate) const BEFORE: u8 = 0;
pub(crate) const DURING: u8 = 1;
pub(crate) const AFTER: u8 = 2;
const PHASES: usize = 3;

struct Control {
    stop: AtomicBool,
    phase: AtomicU8,
}

/// A guest that writes until it is stopped.
pub(crate) struct Load {
    control: Arc<Control>,
    threads: Vec<JoinHandle<[Latencies; PHASES]>>,
}

impl Load {
    /// `depth` threads that write to `disk`.
    pub(crate) fn start(disk: &LiveDisk, depth: u32, seed: u64) -> Self {
        let control = Arc::new(Control { stop: AtomicBool::new(false), phase: AtomicU8::new(BEFORE) });
        let threads = (0..depth)
            .map(|thread| {
                let (disk, control) = (disk.clone(), Arc::clone(&control));
                std::thread::spawn(move || write(&disk, &control, seed << 8 | u64::from(thread)))
            })
            .collect();
        Self { control, threads }
    }

    /// From now on latencies count for `phase`; a request counts for the phase in which it ended.
    pub(crate) fn enter(&self, phase: u8) {
        self.control.phase.store(phase, Ordering::Relaxed);
    }

    /// Stop, and give the latencies of the phases.
    pub(crate) fn stop(self) -> [Latencies; PHASES] {
        self.control.stop.store(true, Ordering::Relaxed);
        let mut all: [Latencies; PHASES] = Default::default();
        for thread in self.threads {
            let of_thread = thread.join().expect("a guest does not panic");
            for (sum, phase) in all.iter_mut().zip(&of_thread) {
                sum.merge(phase);
            }
        }
        all
    }
}

fn write(disk: &LiveDisk, control: &Control, seed: u64) -> [Latencies; PHASES] {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut latencies: [Latencies; PHASES] = Default::default();
    let blocks = disk.length().0 / BLOCK as u64;
    let mut data = vec![0; BLOCK];
    while !control.stop.load(Ordering::Relaxed) {
        random.fill(&mut data[..64]);
        let offset = random.u64(..blocks) * BLOCK as u64;
        let start = Instant::now();
        disk.write(offset, data.clone()).expect("the disk takes it");
        let phase = usize::from(control.phase.load(Ordering::Relaxed));
        latencies[phase].record(start.elapsed());
    }
    latencies
}
