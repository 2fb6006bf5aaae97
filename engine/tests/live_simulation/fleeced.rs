//! What a fleece file is for: guests who do not wait for the target.

use std::time::Duration;

use engine::copy::ErrorPolicy;
use engine::live::{CbwErrorPolicy, GroupFailure};
use engine::units::ByteRange;

use crate::run::run;
use crate::scenario::{FleeceSpec, JobSpec, Path, Scenario, Stuck};

/// For so long the targets do not answer.
const STUCK: Duration = Duration::from_secs(2);
/// More than a guest waits for anything else, beside starts.
const PROMPT: Duration = Duration::from_millis(400);

/// Anything that is sound, with fleece files that take a whole disk each, and targets that are stuck from some time on.
fn roomy(seed: u64) -> Option<Scenario> {
    let mut scenario = Scenario::random(seed);
    let disks = scenario.disks.clone();
    for job in scenario.starts.iter_mut().flat_map(|start| &mut start.jobs) {
        let clusters = u32::try_from(job.geometry(&disks).clusters().0).unwrap();
        let from = job.stuck.map_or(Duration::from_millis(3), |stuck| stuck.from);
        job.stuck = Some(Stuck { from, until: Some(from + STUCK) });
        job.fleece = Some(FleeceSpec { stuck: None, slowness: 1, slots: clusters, ..FleeceSpec::plain(1) });
        job.cbw_timeout = Some(PROMPT);
        job.on_cbw_error = CbwErrorPolicy::BreakSnapshot;
    }
    for start in &mut scenario.starts {
        start.timeout = Duration::from_millis(20);
        start.on_failure = GroupFailure::GoOn;
    }
    for disk in &mut scenario.disks {
        disk.hold = disk.hold.min(Duration::from_millis(1));
    }
    scenario.capacity = 1024;
    scenario.tight = false;
    scenario.die_at = None;
    scenario.is_sound().then_some(scenario)
}

#[test]
fn guests_do_not_wait_for_a_target_while_there_is_room() {
    let (mut runs, mut fleeced) = (0, 0);
    for scenario in (0..150).filter_map(roomy) {
        let ended = run(&scenario).unwrap_or_else(|wrong| panic!("{wrong}"));
        assert!(ended.longest < PROMPT, "{:?}: {scenario:?}", ended.longest);
        assert_eq!(ended.seen.failed_jobs, 0, "{scenario:?}");
        runs += 1;
        fleeced += ended.seen.fleeced;
    }
    assert!(runs > 60 && fleeced > 50, "{fleeced} clusters in {runs} runs");
}

/// The old contents of all that guests change, beside a copy without a fleece file, whose target is slow.
#[test]
fn a_fleece_file_serves_its_own_job_only() {
    let mut fleeced = 0;
    for seed in 0..20 {
        let mut scenario = Scenario::plain(seed, Path::Both);
        let job = JobSpec { slowness: 20, speed: Some(4_000_000), ..scenario.starts[0].jobs[0].clone() };
        let fleece = Some(FleeceSpec::plain(64));
        scenario.starts[0].jobs = vec![JobSpec { fleece, ..job.clone() }, job];
        let ended = run(&scenario).unwrap_or_else(|wrong| panic!("{wrong}"));
        assert_eq!(ended.seen.complete, 2, "{:?}", ended.seen);
        fleeced += ended.seen.fleeced;
    }
    assert!(fleeced > 20, "{fleeced}");
}

/// Whatever the sweep writes fails until the operator comes, long after guests have filled the fleece file.
#[test]
fn a_full_fleece_file_of_a_job_that_is_stopped_breaks_what_it_is_to_break() {
    for on_cbw_error in [CbwErrorPolicy::BreakGuestWrite, CbwErrorPolicy::BreakSnapshot] {
        let (mut failed, mut refused) = (0, 0);
        for seed in 0..30 {
            let mut scenario = Scenario::plain(seed, Path::Carried);
            scenario.disks[0].requests = 100;
            scenario.mends_after = Duration::from_millis(20);
            scenario.mended_at = Duration::from_secs(100);
            let job = &mut scenario.starts[0].jobs[0];
            job.on_cbw_error = on_cbw_error;
            job.bad_target = vec![ByteRange::new(0, scenario.disks[0].length)];
            job.target_policy = ErrorPolicy::Stop;
            job.fleece = Some(FleeceSpec::plain(3));
            let ended = run(&scenario).unwrap_or_else(|wrong| panic!("{wrong}"));
            assert_eq!(ended.seen.complete + ended.seen.failed_jobs, 1, "{:?}", ended.seen);
            assert!(ended.longest < PROMPT, "{:?}", ended.longest);
            failed += ended.seen.failed_jobs;
            refused += ended.seen.fleece_refused;
        }
        assert!(refused > 20, "{refused}");
        assert_eq!(failed > 20, on_cbw_error == CbwErrorPolicy::BreakSnapshot, "{failed}");
    }
}
