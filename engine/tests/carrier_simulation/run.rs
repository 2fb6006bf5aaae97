//! One run: guests, jobs and a disk that misbehaves, from a seed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use engine::copier::plan::Side;
use engine::error::{Error, ErrorKind};
use engine::live::carrier::{Carrier, CarrierBug, CarrierLimits, CarrierPlan, IoId, IoOutcome, IoRequest};
use engine::ring::sim::{Disk, DiskTraits, FaultPlan, Rates, SharedWorld, SimRing, World};
use engine::ring::{BufferRange, FileId, Op, Ring, Token, Wait};
use engine::units::{ByteRange, ClusterSize, Geometry, Length};
use fastrand::Rng;

use crate::host::{Host, Permit, Seen};
use crate::shadow::{Content, Shadow, data};

/// More turns than any run takes: beyond it, something hangs.
const MAX_TURNS: u64 = 60_000;
/// More turns than it takes until all permits are back: beyond it, one is held by somebody who waits.
const MAX_BARRIER_TURNS: u64 = 3000;

/// What a guest waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    /// Also zeros.
    Write,
    Discard,
    Flush,
    /// Lies beyond the end.
    Beyond,
}

/// One simulated disk and its guests.
struct Scenario {
    length: u64,
    cluster: u64,
    alignment: Option<u32>,
    traits: DiskTraits,
    limits: CarrierLimits,
    buffers: u32,
    capacity: usize,
    requests: u64,
    at_a_time: usize,
    faults: FaultPlan,
    failing_copies: u8,
    starts_jobs: bool,
    /// The engine dies before this turn.
    dies_at: Option<u64>,
}

impl Scenario {
    fn random(rng: &mut Rng) -> Self {
        let alignment = [None, Some(512), Some(512), Some(4096)][rng.usize(..4)];
        let odd = [0, 0, 0, 1, 511, 513, 4095][rng.usize(..7)];
        let window = 4096 << rng.u32(0..3);
        let faulty = rng.bool();
        let rates = Rates {
            short: rng.u16(0..200),
            passing: rng.u16(0..60),
            eio: if rng.bool() { rng.u16(0..40) } else { 0 },
            nospace: if rng.bool() { rng.u16(0..30) } else { 0 },
            flush: if rng.bool() { rng.u16(0..200) } else { 0 },
            drop_cache: 0,
            publish: 0,
            unsupported: if rng.bool() { rng.u16(0..200) } else { 0 },
        };
        let at_a_time = rng.usize(1..12);
        Self {
            length: rng.u64(1..24) * 4096 + odd,
            cluster: 4096 << rng.u32(0..3),
            alignment,
            traits: DiskTraits {
                direct_alignment: alignment,
                unmaps: rng.u8(..4) > 0,
                zeroes: rng.u8(..4) > 0,
                fixed_length: rng.bool(),
            },
            limits: CarrierLimits {
                requests: at_a_time,
                slot_bytes: 4096,
                window_bytes: window,
                wide_window_bytes: window * 4,
                deferred_ranges: [1, 3, 100][rng.usize(..3)],
                deferred_grain: 4096,
                discard_checks: rng.u32(1..4),
                discard_pause: Duration::from_micros(rng.u64(100..3000)),
                steps_a_poll: rng.usize(1..8),
            },
            buffers: u32::try_from(window).unwrap() * rng.u32(1..4),
            capacity: rng.usize(1..24),
            requests: rng.u64(10..70),
            at_a_time,
            faults: if faulty { FaultPlan { rates, ..FaultPlan::default() } } else { FaultPlan::default() },
            failing_copies: [0, 0, 20][rng.usize(..3)],
            starts_jobs: rng.u8(..5) > 0,
            dies_at: (rng.u8(..12) == 0).then(|| rng.u64(..200)),
        }
    }

    /// Whether data of the disk goes through the page cache.
    fn is_cached(&self) -> bool {
        self.alignment.is_none_or(|block| !self.length.is_multiple_of(u64::from(block)))
    }
}

struct Run {
    scenario: Scenario,
    rng: Rng,
    world: SharedWorld,
    ring: SimRing,
    carrier: Carrier<Permit>,
    host: Host,
    shadow: Shadow,
    /// Operations in flight that change the disk.
    changing: BTreeMap<Token, ByteRange>,
    waiting: BTreeMap<IoId, Kind>,
    submitted: u64,
    /// Turns since the barrier was raised.
    barrier_turns: u64,
    dead: bool,
}

/// Run one seed to its end.
pub(crate) fn one_seed(seed: u64, planted: Option<CarrierBug>) -> Result<Seen, String> {
    let mut rng = Rng::with_seed(seed ^ 0xCA44);
    let scenario = Scenario::random(&mut rng);
    let mut run = Run::new(scenario, planted, seed, rng);
    let mut turns = 0;
    while run.submitted < run.scenario.requests || !run.carrier.is_idle() || run.host.barrier {
        if run.scenario.dies_at == Some(turns) {
            run.die()?;
        }
        run.guests();
        run.jobs()?;
        run.turn()?;
        turns += 1;
        if turns > MAX_TURNS {
            return Err(format!("hangs: {:?} {:?}", run.waiting, run.carrier.next_deadline(run.ring.now())));
        }
    }
    // What was put off is carried out once all is copied.
    run.host.end_jobs();
    while run.carrier.deferred_bytes() > 0 || !run.carrier.is_idle() {
        run.host.seen.discarded_late += u64::from(run.ring.in_flight() > 0);
        run.turn()?;
        turns += 1;
        if turns > 2 * MAX_TURNS {
            return Err("discards are never carried out".into());
        }
    }
    if run.carrier.next_deadline(run.ring.now()).is_some() {
        return Err("an idle carrier wants to be called".into());
    }
    let view = run.view();
    run.shadow.check(&view)?;
    Ok(run.host.seen)
}

impl Run {
    fn new(scenario: Scenario, planted: Option<CarrierBug>, seed: u64, mut rng: Rng) -> Self {
        let mut contents = vec![0; usize::try_from(scenario.length).unwrap()];
        rng.fill(&mut contents);
        let world = World::shared();
        world.borrow_mut().add_disk(Disk::new(contents.clone(), scenario.traits));
        let arena = 4096 + scenario.buffers as usize;
        let mut ring =
            SimRing::new(world.clone(), arena, scenario.capacity, seed ^ 0x1217, scenario.faults.clone());
        ring.add_file(0).unwrap();
        let carrier = Carrier::new(CarrierPlan {
            file: Side {
                file: FileId(0),
                name: Arc::from("disk"),
                direct_alignment: scenario.alignment,
                remote: false,
            },
            length: Length(scenario.length),
            keep_is_fast: true,
            buffers: BufferRange { start: 4096, length: scenario.buffers },
            limits: scenario.limits,
            planted,
        });
        let geometry = Geometry::new(Length(scenario.length), ClusterSize::new(scenario.cluster).unwrap());
        Self {
            host: Host::new(geometry, seed ^ 0x4057, scenario.failing_copies),
            shadow: Shadow::new(contents),
            scenario,
            rng,
            world,
            ring,
            carrier,
            changing: BTreeMap::new(),
            waiting: BTreeMap::new(),
            submitted: 0,
            barrier_turns: 0,
            dead: false,
        }
    }

    fn view(&self) -> Vec<u8> {
        self.world.borrow_mut().disk(0).view().to_vec()
    }

    /// The engine dies: everybody is told at once, and nothing more reaches the disk than what is in flight.
    fn die(&mut self) -> Result<(), String> {
        self.dead = true;
        self.carrier.fail_all(&Error::engine_died("disk", "it was told to"));
        self.outcomes()?;
        if self.waiting.is_empty() { Ok(()) } else { Err(format!("not told: {:?}", self.waiting)) }
    }

    /// Guests submit and cancel.
    fn guests(&mut self) {
        while self.submitted < self.scenario.requests
            && self.carrier.requests_under_way() < self.scenario.at_a_time
            && self.rng.u8(..3) > 0
        {
            self.submit();
        }
        if self.rng.u8(..60) == 0
            && let Some(&id) = self.waiting.keys().nth(self.rng.usize(..self.waiting.len().max(1)))
            && self.carrier.cancel(id)
        {
            self.host.seen.cancelled += 1;
            if matches!(self.waiting[&id], Kind::Write | Kind::Discard) {
                self.shadow.changed(id, None);
                // Its outcome tells nothing more.
                self.waiting.insert(id, Kind::Beyond);
            }
        }
    }

    fn range(&mut self) -> ByteRange {
        let length = self.scenario.length;
        let rng = &mut self.rng;
        let most = [700, 5000, 20_000, 80_000][rng.usize(..4)].min(length);
        let mut range = ByteRange::new(rng.u64(..length), rng.u64(..=most));
        if rng.u8(..3) == 0 {
            range = ByteRange::new(range.offset / 512 * 512, range.length.next_multiple_of(512));
        }
        ByteRange::between(range.offset, range.end().min(length))
    }

    fn submit(&mut self) {
        let id = IoId(self.submitted);
        self.submitted += 1;
        let range = self.range();
        let bytes = usize::try_from(range.length).unwrap();
        let (kind, request) = match self.rng.u8(..20) {
            0..8 => {
                let data = data(id, range);
                (Kind::Write, IoRequest::Write { offset: range.offset, data })
            }
            8..12 => (Kind::Read, IoRequest::Read { range, buffer: vec![0xEE; bytes] }),
            12..15 => (Kind::Discard, IoRequest::Discard { range }),
            15..18 => {
                (Kind::Write, IoRequest::WriteZeroes { range, may_unmap: self.rng.bool(), only_fast: false })
            }
            18 => (Kind::Flush, IoRequest::Flush),
            _ => {
                let range = ByteRange::new(range.offset, self.scenario.length + 1 - range.offset);
                (Kind::Beyond, IoRequest::Discard { range })
            }
        };
        match (kind, &request) {
            (Kind::Write, IoRequest::Write { .. }) => self.shadow.change(id, range, Content::Data(id)),
            (Kind::Write, _) => self.shadow.change(id, range, Content::Zeros),
            (Kind::Discard, _) => self.shadow.change(id, range, Content::Undefined),
            (Kind::Read, _) => self.shadow.look(id, range),
            (Kind::Flush, _) => self.shadow.look(id, ByteRange::new(0, self.scenario.length)),
            (Kind::Beyond, _) => {}
        }
        self.waiting.insert(id, kind);
        self.carrier.submit(id, request);
    }

    /// Jobs start, copy, answer and end.
    fn jobs(&mut self) -> Result<(), String> {
        let view = self.view();
        if self.host.barrier {
            self.barrier_turns += 1;
            if self.barrier_turns > MAX_BARRIER_TURNS {
                return Err(format!("permits do not come back: {:?}", self.host.ledger));
            }
            let given_up = self.rng.u8(..50) == 0;
            if self.host.ledger.borrow().is_empty() && self.rng.bool() {
                if !self.changing.is_empty() {
                    return Err(format!("t0, and {:?} in flight", self.changing));
                }
                self.host.start_job(&view);
                self.lower_barrier();
            } else if given_up {
                self.lower_barrier();
            }
            // Nobody who waits for a copy holds up t0: none is answered meanwhile.
            return Ok(());
        }
        if self.scenario.starts_jobs && self.rng.u8(..40) == 0 {
            self.host.barrier = true;
            self.barrier_turns = 0;
            return Ok(());
        }
        if self.rng.u8(..6) == 0 {
            self.host.sweep(&view)?;
        }
        while self.host.is_asked() && self.rng.u8(..3) == 0 {
            if let Some((wait, result)) = self.host.answer(&view)? {
                self.carrier.copied(wait, result);
            }
        }
        Ok(())
    }

    fn lower_barrier(&mut self) {
        self.host.barrier = false;
        self.carrier.barrier_lowered();
    }

    /// Poll, push, wait, and hand back what has completed.
    fn turn(&mut self) -> Result<(), String> {
        let now = self.ring.now();
        let room = self.ring.capacity() - self.ring.in_flight();
        let mut ops = Vec::new();
        let more = self.carrier.poll(now, room, self.ring.arena_mut(), &mut self.host, &mut ops);
        if self.dead && !ops.is_empty() {
            return Err(format!("{ops:?} after the end"));
        }
        if ops.len() > room {
            return Err(format!("{} operations for room of {room}", ops.len()));
        }
        for (token, op) in ops {
            let changes = match &op {
                Op::Write { offset, buffer, .. } => Some(ByteRange::new(*offset, u64::from(buffer.length))),
                Op::WriteZeroes { range, .. } | Op::Discard { range, .. } => Some(*range),
                _ => None,
            };
            self.changing.extend(changes.map(|range| (token, range)));
            self.ring.push(token, op);
        }
        self.check_permits()?;
        self.outcomes()?;
        let pause = now.after(Duration::from_micros(self.rng.u64(10..400)));
        let mut completions = Vec::new();
        self.ring.wait(if more { Wait::Poll } else { Wait::Until(pause) }, &mut completions).unwrap();
        // They have taken effect by now, so the permits must be out still.
        self.check_permits()?;
        for completion in completions {
            self.changing.remove(&completion.token);
            let now = self.ring.now();
            self.carrier.on_completion(completion, self.ring.arena_mut(), now);
            self.check_permits()?;
        }
        self.outcomes()
    }

    /// Whatever changes the disk has a permit for all of it.
    fn check_permits(&self) -> Result<(), String> {
        let permits = self.host.ledger.borrow();
        for range in self.changing.values() {
            if !permits.values().any(|permit| permit.intersection(*range) == Some(*range)) {
                return Err(format!("{range} is being changed without a permit: {permits:?}"));
            }
        }
        Ok(())
    }

    fn outcomes(&mut self) -> Result<(), String> {
        for (id, IoOutcome { result, .. }) in self.carrier.take_outcomes() {
            let kind = self.waiting.remove(&id).ok_or_else(|| format!("{id:?} ends twice"))?;
            if let Err(error) = &result {
                self.host.seen.failed += 1;
                self.check_error(kind, error)?;
            }
            let wrongly = |wrong: String| format!("{kind:?}: {wrong}");
            match kind {
                Kind::Write | Kind::Discard => self.shadow.changed(id, Some(result.is_ok())),
                Kind::Read => {
                    self.host.seen.read_back += 1;
                    self.shadow.looked(id, result.ok().as_deref()).map_err(wrongly)?;
                }
                Kind::Flush => {
                    // A flush that fails loses writes for good, and says so once. Where it was the page cache that lost them, none succeeds after it.
                    let told = self.scenario.faults.rates.flush == 0 || self.scenario.is_cached();
                    let whole = result.is_ok() && told;
                    self.host.seen.durable += u64::from(whole);
                    let medium = whole.then(|| self.world.borrow_mut().disk(0).medium().to_vec());
                    self.shadow.looked(id, medium.as_deref()).map_err(wrongly)?;
                }
                Kind::Beyond if result.is_ok() => return Err(format!("{id:?} lies beyond the end")),
                Kind::Beyond => {}
            }
        }
        Ok(())
    }

    /// Nothing fails but what was made to fail.
    fn check_error(&self, kind: Kind, error: &Error) -> Result<(), String> {
        let rates = &self.scenario.faults.rates;
        let text = error.to_string();
        let meant = match error.kind() {
            ErrorKind::EngineDied => self.dead,
            _ if kind == Kind::Beyond => {
                text.contains("the disk ends at byte") || text.ends_with("cancelled")
            }
            ErrorKind::Cancelled => true,
            _ if error.path() == "target" => self.scenario.failing_copies > 0,
            ErrorKind::FlushFailed(_) => rates.flush > 0,
            ErrorKind::NoSpace => rates.nospace > 0,
            // Several short results within a block in a row count as the end of the disk.
            ErrorKind::Io(nix::errno::Errno::EIO) => {
                rates.eio > 0 || (rates.short > 0 && self.scenario.alignment.is_some())
            }
            _ => false,
        };
        if meant { Ok(()) } else { Err(format!("{kind:?} failed for no reason: {text}")) }
    }
}
