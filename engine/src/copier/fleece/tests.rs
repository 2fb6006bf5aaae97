use std::sync::Arc;

use super::*;
use crate::ring::FileId;

const NOW: Timestamp = Timestamp(Duration::ZERO);

fn fleece(slots: u32) -> Fleece {
    let side =
        Side { file: FileId(2), name: Arc::from("fleece"), direct_alignment: Some(512), remote: false };
    Fleece::new(FleecePlan { side, slots }, 65536, false)
}

/// Hold each of `clusters` in the next slot.
fn hold(fleece: &mut Fleece, clusters: impl IntoIterator<Item = u64>) {
    for cluster in clusters {
        let (slot, _) = fleece.space.take(1).unwrap();
        fleece.hold(ClusterIndex(cluster), slot, State::InFleece);
    }
}

#[test]
fn adjacent_clusters_are_drained_together_and_in_turn() {
    let mut fleece = fleece(20);
    hold(&mut fleece, [7, 3, 4, 5, 9]);
    assert_eq!(fleece.next_run(2, NOW, 8), Some((ClusterRange::new(3, 5), None)));
    hold(&mut fleece, [0]);
    assert_eq!(fleece.next_run(9, NOW, 8), Some((ClusterRange::new(5, 6), None)));
    assert_eq!(fleece.next_run(9, NOW, 8), Some((ClusterRange::new(7, 8), None)));
    assert_eq!(fleece.next_run(9, NOW, 8), Some((ClusterRange::new(9, 10), None)));
    assert_eq!(fleece.next_run(9, NOW, 8), Some((ClusterRange::new(0, 1), None)), "from the start again");
    assert_eq!(fleece.next_run(9, NOW, 8), None);
    assert_eq!(fleece.undrained(), 6);
}

#[test]
fn a_slot_is_free_after_the_flush_that_covers_its_cluster_and_not_before() {
    let mut fleece = fleece(16);
    hold(&mut fleece, 0..4);
    assert_eq!(fleece.next_run(4, NOW, 8), Some((ClusterRange::new(0, 4), None)));
    fleece.written(ClusterIndex(0));
    assert_eq!(fleece.slot_of(ClusterIndex(0)), None, "read from the target from now on");
    assert!(!fleece.flush_is_due(NOW, false) && fleece.flush_is_due(NOW.after(FLUSH_INTERVAL), false));
    assert!(fleece.flush_is_due(NOW, true), "nothing is going to be added");
    fleece.capture(NOW);
    fleece.written(ClusterIndex(1));
    assert_eq!(fleece.space.free_count(), 12);
    fleece.flushed();
    assert!(!fleece.free_some());
    assert_eq!(fleece.space.free_count(), 13, "what was written during the flush is not covered");
    assert!(
        fleece.still_holds(ClusterRange::new(1, 4), 1) && !fleece.still_holds(ClusterRange::new(0, 2), 0)
    );
    fleece.flushed();
    assert!(!fleece.free_some());
    assert_eq!(fleece.space.free_count(), 13);
    fleece.capture(NOW);
    fleece.flushed();
    assert!(!fleece.free_some());
    assert_eq!(fleece.space.free_count(), 14);
}

#[test]
fn a_flush_is_due_at_once_when_space_is_short() {
    let mut fleece = fleece(16);
    hold(&mut fleece, 0..13);
    assert!(!fleece.flush_is_due(NOW, false), "it would free nothing");
    assert_eq!(fleece.next_run(1, NOW, 8), Some((ClusterRange::new(0, 1), None)));
    fleece.written(ClusterIndex(0));
    assert!(fleece.flush_is_due(NOW, false));
}

#[test]
fn what_failed_is_tried_again_alone_and_may_be_left_out() {
    let mut fleece = fleece(16);
    hold(&mut fleece, 0..3);
    assert_eq!(fleece.next_run(2, NOW, 8), Some((ClusterRange::new(0, 2), None)));
    let later = NOW.after(Duration::from_secs(3));
    fleece.try_again(ClusterIndex(0), 2, later);
    fleece.try_again(ClusterIndex(1), 0, NOW);
    assert_eq!(fleece.next_run(4, NOW, 8), Some((ClusterRange::new(1, 2), Some(0))));
    assert_eq!(fleece.next_run(4, NOW, 1), None, "one is to be tried again already");
    assert_eq!(fleece.next_run(4, later, 1), Some((ClusterRange::new(0, 1), Some(2))));
    fleece.leave_out(ClusterIndex(0));
    assert_eq!((fleece.undrained(), fleece.space.free_count()), (2, 14));
}

#[test]
fn runs_are_as_their_slots_are() {
    let mut fleece = fleece(16);
    hold(&mut fleece, [4, 5, 8, 6, 7]);
    let all = ClusterRange::new(4, 9);
    assert_eq!(fleece.first_run(all), Some((0, 2)));
    assert_eq!(fleece.first_run(ClusterRange::new(6, 9)), Some((3, 2)));
    assert_eq!(fleece.first_run(ClusterRange::new(8, 9)), Some((2, 1)));
    assert_eq!(fleece.first_run(ClusterRange::new(9, 10)), None);
    assert_eq!(fleece.place(3, 700), ByteRange::new(3 << 16, 1024));
}

#[test]
fn many_slots_come_free_little_by_little() {
    let mut fleece = fleece(10_000);
    hold(&mut fleece, 0..10_000);
    while let Some((clusters, _)) = fleece.next_run(100, NOW, 8) {
        clusters.iter().for_each(|cluster| fleece.written(cluster));
    }
    fleece.capture(NOW);
    fleece.flushed();
    assert_eq!(fleece.space.free_count(), 0);
    let mut times = 0;
    while fleece.free_some() {
        assert!(fleece.has_unflushed(), "there will be more room");
        times += 1;
        assert!(fleece.space.free_count() <= times * 4096);
    }
    assert_eq!((times, fleece.space.free_count(), fleece.has_unflushed()), (2, 10_000, false));
}
