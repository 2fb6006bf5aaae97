//! What a client asks for, as the engine is asked for it.

use std::num::NonZeroU64;
use std::time::Duration;

use engine::live::{BackupOptions, SweepDepth};
use engine::modes::{CbwErrorPolicy, ErrorPolicy, SyncMode};
use engine::units::ClusterSize;
use serde_json::{Value, json};

use super::Fixture;

/// What the engine is asked for by a backup with `more`.
#[track_caller]
fn options(fixture: &mut Fixture, more: Value) -> BackupOptions {
    let arguments = Fixture::backup("j", "t", more);
    fixture.control.plan(arguments.as_object().expect("an object"), &[]).expect("planned").options
}

#[test]
fn how_long_a_guest_waits_for_a_copy_and_what_breaks_then() {
    let mut fixture = Fixture::new();
    let mut asked = |more| {
        let options = options(&mut fixture, more);
        (options.cbw_timeout, options.on_cbw_error)
    };
    // QEMU's defaults, not the engine's.
    assert_eq!(asked(json!({})), (None, CbwErrorPolicy::BreakGuestWrite));
    assert_eq!(asked(json!({ "cbw-timeout": 0 })).0, None);
    assert_eq!(asked(json!({ "cbw-timeout": 7 })).0, Some(Duration::from_secs(7)));
    let longest = Duration::from_secs(u32::MAX.into());
    assert_eq!(asked(json!({ "cbw-timeout": u32::MAX })).0, Some(longest));
    for (word, policy) in [
        ("break-guest-write", CbwErrorPolicy::BreakGuestWrite),
        ("break-snapshot", CbwErrorPolicy::BreakSnapshot),
    ] {
        assert_eq!(asked(json!({ "on-cbw-error": word })).1, policy);
    }
}

#[test]
fn how_fast_it_is_to_be_and_in_which_steps() {
    let mut fixture = Fixture::new();
    let plain = options(&mut fixture, json!({}));
    assert_eq!((plain.cluster_size, plain.max_request), (ClusterSize::DEFAULT, u64::MAX));
    assert_eq!((plain.depth, plain.speed), (SweepDepth::Auto, None));
    let perf = json!({ "max-workers": 8, "max-chunk": 1 << 18, "min-cluster-size": 1 << 17 });
    let tuned = options(&mut fixture, json!({ "x-perf": perf, "speed": 4096 }));
    assert_eq!((tuned.cluster_size.bytes(), tuned.max_request), (1 << 17, 1 << 18));
    assert_eq!((tuned.depth, tuned.speed), (SweepDepth::Fixed(8), NonZeroU64::new(4096)));
}

#[test]
fn what_is_copied_and_what_becomes_of_errors() {
    let mut fixture = Fixture::new();
    let plain = options(&mut fixture, json!({}));
    assert_eq!(plain.sync, SyncMode::Full);
    assert_eq!((plain.on_source_error, plain.on_target_error), (ErrorPolicy::Report, ErrorPolicy::Report));
    assert!(plain.auto_finalize && plain.auto_dismiss && plain.in_place && plain.may_unmap);
    let more = json!({
        "sync": "top", "on-source-error": "ignore", "on-target-error": "enospc",
        "auto-finalize": false, "auto-dismiss": false,
    });
    let other = options(&mut fixture, more);
    assert_eq!(other.sync, SyncMode::Top);
    assert_eq!((other.on_source_error, other.on_target_error), (ErrorPolicy::Ignore, ErrorPolicy::Enospc));
    assert!(!other.auto_finalize && !other.auto_dismiss);
}
