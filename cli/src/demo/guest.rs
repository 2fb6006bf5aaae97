//! The guest: one thread that writes a random block, waits until that is acknowledged, writes the next, without pause.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use engine::error::{Error, Operation, Refusal};
use engine::live::{Latencies, LiveDisk};

use super::content::{BLOCK, Content};

/// The parts of the guest's life that are told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Before,
    During,
    After,
}

impl Phase {
    pub(crate) const ALL: [Self; 3] = [Self::Before, Self::During, Self::After];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Before => "before",
            Self::During => "during",
            Self::After => "after",
        }
    }
}

/// What the guest felt in one phase.
#[derive(Clone, Debug, Default)]
pub(crate) struct Felt {
    /// How long the phase took.
    pub(crate) time: Duration,
    /// How long each write took that began in it.
    pub(crate) waits: Latencies,
}

/// What the guest felt, by phase.
pub(crate) type FeltByPhase = [Felt; Phase::ALL.len()];

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    phase: AtomicUsize,
    acknowledged: AtomicU64,
}

type Thread = JoinHandle<Result<[Latencies; Phase::ALL.len()], Error>>;

/// A guest at work. Dropped, it stops.
pub(super) struct Guest {
    shared: Arc<Shared>,
    thread: Option<Thread>,
    /// When each phase began.
    began: Vec<Instant>,
}

impl Guest {
    /// Let it write to the `blocks` blocks of `disk`, which hold version 0 of `content`.
    pub(super) fn start(disk: LiveDisk, content: Content, blocks: u32) -> Result<Self, Error> {
        let shared = Arc::new(Shared::default());
        let its = Arc::clone(&shared);
        let name = disk.name().to_owned();
        let thread = thread::Builder::new()
            .name("guest".into())
            .spawn(move || write(&disk, content, blocks, &its))
            .map_err(|error| {
                let reason = format!("cannot start a thread: {error}");
                Error::refused(Refusal::Unavailable, Operation::Write, name, reason)
                    .advise("raise the limit on processes (ulimit -u)")
            })?;
        Ok(Self { shared, thread: Some(thread), began: vec![Instant::now()] })
    }

    /// What it writes from now on belongs to the next phase.
    pub(super) fn next_phase(&mut self) {
        self.shared.phase.store(self.began.len(), Ordering::SeqCst);
        self.began.push(Instant::now());
    }

    /// Writes acknowledged so far.
    pub(super) fn acknowledged(&self) -> u64 {
        self.shared.acknowledged.load(Ordering::SeqCst)
    }

    /// Whether it has stopped by itself, which it does after an error only.
    pub(super) fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Stop it; what it felt, or the error of the write that failed.
    pub(super) fn stop(mut self) -> Result<FeltByPhase, Error> {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.began.push(Instant::now());
        let waits = match self.thread.take().map(JoinHandle::join) {
            Some(Ok(waits)) => waits?,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => Default::default(),
        };
        let mut times = self.began.windows(2).map(|edges| edges[1] - edges[0]);
        Ok(waits.map(|waits| Felt { time: times.next().unwrap_or_default(), waits }))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            // Whatever made this end early is being told already.
            thread.join().ok();
        }
    }
}

/// The guest's life.
fn write(
    disk: &LiveDisk,
    content: Content,
    blocks: u32,
    shared: &Shared,
) -> Result<[Latencies; Phase::ALL.len()], Error> {
    let mut versions = vec![0_u32; blocks as usize];
    let mut waits: [Latencies; Phase::ALL.len()] = Default::default();
    for block in content.order(blocks) {
        if shared.stop.load(Ordering::SeqCst) {
            break;
        }
        let version = &mut versions[block as usize];
        *version += 1;
        let mut bytes = Box::new([0; BLOCK]);
        content.fill(u64::from(block), *version, &mut bytes);
        let phase = shared.phase.load(Ordering::SeqCst);
        let start = Instant::now();
        disk.write(u64::from(block) * BLOCK as u64, Vec::from(bytes as Box<[u8]>))?;
        waits[phase].record(start.elapsed());
        shared.acknowledged.fetch_add(1, Ordering::SeqCst);
    }
    Ok(waits)
}
