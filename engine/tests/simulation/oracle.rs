//! Whether the job's word is true.

use engine::copy::SyncMode;
use engine::job::{JobResult, Outcome, SkippedRange, TargetHolds};
use engine::ring::sim::SharedWorld;
use engine::ring::{ExtentQuery, Ring};
use engine::units::ByteRange;

use crate::scenario::Scenario;

/// What the target held before the first run.
pub(crate) struct Before {
    pub(crate) target: Vec<u8>,
    pub(crate) source: Vec<u8>,
}

impl Before {
    pub(crate) fn of(world: &SharedWorld) -> Self {
        let mut world = world.borrow_mut();
        Self { target: world.disk(1).view().to_vec(), source: world.disk(0).view().to_vec() }
    }
}

/// Why the job's word is not true; `Ok` if it is.
pub(crate) fn check(
    scenario: &Scenario,
    world: &SharedWorld,
    before: &Before,
    result: &JobResult,
) -> Result<(), String> {
    let progress = &result.progress;
    let complete = matches!(result.outcome, Outcome::Complete | Outcome::CompleteWithSkipped);
    if complete && progress.done + progress.skipped != progress.total {
        return Err(format!("done {} + skipped {} of {}", progress.done, progress.skipped, progress.total));
    }
    let listed: u64 = result.skipped.iter().map(|skipped| skipped.range.length).sum();
    if listed != progress.skipped {
        return Err(format!("{listed} bytes listed as skipped, {} counted", progress.skipped));
    }
    if !complete {
        return Ok(());
    }
    if matches!(result.outcome, Outcome::Complete) != result.skipped.is_empty() {
        return Err("the outcome contradicts the list of skipped ranges".into());
    }
    let skipped: Vec<ByteRange> = result.skipped.iter().map(|skipped| skipped.range).collect();
    compare(scenario, world, before, &skipped)?;
    left_out(world, before, &result.skipped)?;
    let map_gone = world.borrow().document(0).is_none();
    let told = result.notices.iter().any(|notice| notice.contains("map file"));
    if scenario.map && skipped.is_empty() && !map_gone && !told {
        return Err("the map of a complete copy is left behind".into());
    }
    Ok(())
}

/// Compare the target's medium with what it must hold everywhere but in `skipped`.
fn compare(
    scenario: &Scenario,
    world: &SharedWorld,
    before: &Before,
    skipped: &[ByteRange],
) -> Result<(), String> {
    let geometry = scenario.geometry();
    let uncovered = uncovered(scenario, world);
    let mut world = world.borrow_mut();
    let question_failed = world.question_failed();
    if scenario.target_is_zero && world.disk(1).space_end() > scenario.length.next_multiple_of(4096) {
        return Err("space is reserved beyond the target file's end".into());
    }
    let medium = world.disk(1).medium();
    for cluster in geometry.all().iter() {
        let range = geometry.bytes_of(engine::units::ClusterRange::new(cluster.0, cluster.0 + 1));
        if skipped.iter().any(|skip| skip.intersection(range).is_some()) {
            continue;
        }
        let bytes = usize::try_from(range.offset).unwrap()..usize::try_from(range.end()).unwrap();
        let alone = uncovered.contains(&cluster.0);
        // What a question that failed was about counts as allocated: an uncovered cluster may be copied, or half so.
        if alone && question_failed {
            continue;
        }
        let want = if alone { &before.target } else { &before.source };
        if medium.get(bytes.clone()) != Some(&want[bytes]) {
            return Err(format!("{cluster:?} is wrong on the target's medium"));
        }
    }
    let length = usize::try_from(scenario.length).unwrap();
    let beyond = &medium[length.min(medium.len())..];
    if scenario.target_is_zero && !beyond.is_empty() {
        return Err(format!("the target file is {} bytes too long", beyond.len()));
    }
    if !scenario.target_is_zero && beyond != &before.target[length..] {
        return Err("bytes beyond the source's end were changed on the target device".into());
    }
    Ok(())
}

/// Compare what is said to be on the target's medium in the ranges left out with what is there.
fn left_out(world: &SharedWorld, before: &Before, skipped: &[SkippedRange]) -> Result<(), String> {
    let mut world = world.borrow_mut();
    let medium = world.disk(1).medium();
    for SkippedRange { range, target, .. } in skipped {
        let bytes = usize::try_from(range.offset).unwrap()..usize::try_from(range.end()).unwrap();
        let there = &medium[bytes.clone()];
        let holds = match target {
            TargetHolds::Zeros => there.iter().all(|&byte| byte == 0),
            TargetHolds::Unchanged => *there == before.target[bytes],
            TargetHolds::Unknown => true,
        };
        if !holds {
            return Err(format!("{range} was left out, and does not hold {target:?}"));
        }
    }
    Ok(())
}

/// Clusters that sync `top` leaves alone.
fn uncovered(scenario: &Scenario, world: &SharedWorld) -> Vec<u64> {
    if scenario.sync == SyncMode::Full || scenario.length == 0 {
        return Vec::new();
    }
    let mut probe =
        engine::ring::sim::SimRing::new(world.clone(), 4096, 4, 0, engine::ring::sim::FaultPlan::default());
    let file = probe.add_file(0).unwrap();
    let geometry = scenario.geometry();
    let range = ByteRange::new(0, scenario.length);
    let op = engine::ring::Op::Extents { file, range, query: ExtentQuery::TopLayer, limit: usize::MAX };
    probe.push(engine::ring::Token(0), op);
    let mut completions = Vec::new();
    probe.wait(engine::ring::Wait::Forever, &mut completions).unwrap();
    let Ok(engine::ring::Output::Extents(extents)) = &completions[0].result else {
        panic!("{completions:?}")
    };
    geometry
        .all()
        .iter()
        .filter(|cluster| {
            let bytes = geometry.bytes_of(engine::units::ClusterRange::new(cluster.0, cluster.0 + 1));
            !extents.iter().any(|extent| extent.present && extent.range.intersection(bytes).is_some())
        })
        .map(|cluster| cluster.0)
        .collect()
}
