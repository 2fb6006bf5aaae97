//! The jobs of these tests.

use std::num::NonZeroU64;
use std::sync::Arc;

use engine::copier::plan::{Limits, LivePlan, Plan, Side};
use engine::job::TargetHolds;
use engine::live::sim::{SimDisk, SimJob};
use engine::live::{CbwErrorPolicy, SweepDepth};
use engine::modes::{ErrorPolicy, SyncMode};
use engine::ring::{BufferRange, FileId};
use engine::units::{Geometry, Speed};

/// One that copies `disk` to file 1 of the world, and by itself next to nothing, but for what `change` makes of it.
pub(crate) fn job(
    disk: SimDisk,
    geometry: Geometry,
    slots: u32,
    change: impl FnOnce(&mut Plan) + Send + 'static,
) -> SimJob {
    let plan = move |source: Side, file: FileId, memory: BufferRange| {
        let mut plan = Plan {
            geometry,
            source,
            target: Side { file, name: Arc::from("target"), direct_alignment: None, remote: false },
            sync: SyncMode::None,
            zero_detect: true,
            target_is_zero: true,
            target_before: TargetHolds::Zeros,
            allocate_ahead: false,
            target_shows_holes: false,
            slots,
            arena_start: memory.start,
            max_run: 2,
            on_source_error: ErrorPolicy::Report,
            on_target_error: ErrorPolicy::Report,
            speed: NonZeroU64::new(1).map(Speed),
            verify: false,
            map: None,
            resumed: Vec::new(),
            postponed: Vec::new(),
            live: Some(LivePlan {
                on_cbw_error: CbwErrorPolicy::BreakSnapshot,
                cbw_timeout: None,
                reserved_slots: 2,
                space_reserved: false,
                may_unmap: true,
            }),
            limits: Limits::default(),
            planted: None,
        };
        change(&mut plan);
        plan
    };
    SimJob { disk, target: 1, geometry, slots, depth: SweepDepth::Auto, plan: Box::new(plan) }
}
