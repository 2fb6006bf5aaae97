//! Who excludes whom: our roles each other, and programs that lock as QEMU does, from either side.

use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use super::*;

const ROLES: [Role; 4] = [Role::Source, Role::ForcedSource, Role::LiveDisk, Role::Target];

/// A file that is opened many times, each time as another program would.
struct Place(tempfile::NamedTempFile);

impl Place {
    fn new() -> Self {
        Self(tempfile::NamedTempFile::new().expect("file"))
    }

    fn open(&self) -> File {
        self.0.reopen().expect("reopened")
    }

    /// Bytes of the protocol that somebody holds.
    fn held(&self) -> Vec<i64> {
        let file = self.open();
        let is_held =
            |&at: &i64| lock::obstacle(&file, Kind::Exclusive, Bytes::one(at)).expect("asked").is_some();
        (USED..BEHIND).filter(is_held).collect()
    }
}

fn taken(file: &File, role: Role) -> Announced {
    match attempt(file, role).expect("asked") {
        Taken::Held(announced) => announced,
        other => panic!("{role:?}: {other:?}"),
    }
}

fn conflict(file: &File, role: Role) -> Option<Conflict> {
    match attempt(file, role).expect("asked") {
        Taken::Held(_) => None,
        Taken::Refused(conflict) => Some(conflict),
        Taken::Unsupported => panic!("no locks here"),
    }
}

/// A program that locks as QEMU does, with these bytes.
fn foreign(place: &Place, bytes: &[i64]) -> File {
    let file = place.open();
    for &at in bytes {
        assert_eq!(lock::set(&file, Kind::Shared, Bytes::one(at)), Ok(Lock::Held), "byte {at}");
    }
    file
}

/// Whether such a program that comes later finds the opposite of one of its bytes.
fn foreign_is_refused(place: &Place, bytes: &[i64]) -> bool {
    let file = foreign(place, bytes);
    let opposite = |at: i64| if at < NOT_SHARED { at - USED + NOT_SHARED } else { at - NOT_SHARED + USED };
    bytes
        .iter()
        .any(|&at| lock::obstacle(&file, Kind::Exclusive, Bytes::one(opposite(at))).expect("asked").is_some())
}

#[test]
fn the_bytes_are_those_of_the_protocol() {
    let place = Place::new();
    for (role, bytes) in [
        (Role::Source, &[100, 201, 203][..]),
        (Role::ForcedSource, &[100]),
        (Role::LiveDisk, &[100, 101, 201, 203]),
        (Role::Target, &[101, 103, 200, 201, 203]),
    ] {
        let announced = taken(&place.open(), role);
        assert_eq!(place.held(), bytes, "{role:?}");
        drop(announced);
        assert_eq!(place.held(), [0_i64; 0], "{role:?} let go");
    }
}

#[test]
fn our_roles_exclude_each_other() {
    use Role::{ForcedSource, LiveDisk, Source, Target};
    let together = |first, second| {
        matches!(
            (first, second),
            (Source | ForcedSource, Source | ForcedSource)
                | (ForcedSource, LiveDisk)
                | (LiveDisk, ForcedSource)
        )
    };
    for first in ROLES {
        for second in ROLES {
            let place = Place::new();
            let (one, other) = (place.open(), place.open());
            let announced = taken(&one, first);
            let before = place.held();
            let found = conflict(&other, second);
            assert_eq!(found.is_none(), together(first, second), "{first:?}, then {second:?}: {found:?}");
            // By which a user is told that it is a copy.
            if [first, second].contains(&Target) {
                assert_eq!(found, Some(Conflict::Locked), "{first:?}, then {second:?}");
            }
            assert_eq!(place.held(), before, "{first:?} has what it had, {second:?} nothing");
            drop((announced, one));
            assert_eq!(conflict(&other, second), None, "{second:?} once {first:?} has gone");
        }
    }
}

/// Programs of QEMU, what they hold, and which of our roles may have the disk beside them.
const PROGRAMS: [(&str, &[i64], &[Role]); 6] = [
    ("a virtual machine", &[100, 101, 201], &[Role::ForcedSource]),
    ("an image with a format", &[100, 101, 103, 201, 203], &[Role::ForcedSource]),
    ("a writable export", &[100, 101, 203], &[Role::ForcedSource]),
    ("a program that writes and shares all", &[100, 101], &[Role::ForcedSource]),
    ("a read-only export", &[100, 203], &[Role::Source, Role::ForcedSource, Role::LiveDisk]),
    ("the target of another's copy", &[101, 200], &[]),
];

#[test]
fn programs_of_qemu_exclude_and_are_excluded() {
    for (program, bytes, beside) in PROGRAMS {
        for role in ROLES {
            let place = Place::new();
            let may = beside.contains(&role);
            let file = foreign(&place, bytes);
            let found = conflict(&place.open(), role);
            assert_eq!(found.is_none(), may, "{program}, then {role:?}: {found:?}");
            assert_eq!(place.held(), bytes, "{program}: {role:?} has left nothing");
            drop(file);
            let announced = taken(&place.open(), role);
            assert_eq!(foreign_is_refused(&place, bytes), !may, "{role:?}, then {program}");
            drop(announced);
        }
    }
}

#[test]
fn who_reads_and_shares_reads_beside_all_but_targets() {
    for role in ROLES {
        let place = Place::new();
        let _announced = taken(&place.open(), role);
        assert_eq!(foreign_is_refused(&place, &[100]), role == Role::Target, "{role:?}");
    }
}

#[test]
fn a_refusal_says_what_matters_most() {
    use Conflict::{DoesNotShare, Uses};
    for (role, bytes, expected) in [
        (Role::Source, &[100, 101, 103, 201, 203][..], Uses(Permission::Write)),
        (Role::Target, &[100, 101, 201], Uses(Permission::Write)),
        (Role::Target, &[100, 201, 203], DoesNotShare(Permission::Write)),
        (Role::Target, &[203], DoesNotShare(Permission::Resize)),
        (Role::Target, &[100], Uses(Permission::ConsistentRead)),
        (Role::Source, &[103], Uses(Permission::Resize)),
        (Role::LiveDisk, &[201], DoesNotShare(Permission::Write)),
        (Role::ForcedSource, &[101, 200], DoesNotShare(Permission::ConsistentRead)),
    ] {
        let place = Place::new();
        let _program = foreign(&place, bytes);
        assert_eq!(conflict(&place.open(), role), Some(expected), "{role:?} beside {bytes:?}");
    }
}

#[test]
fn other_ways_of_locking_are_respected() {
    // All bytes for one alone, as map files, fleece files and some hypervisors have it: in nobody's way of reading.
    for role in ROLES {
        let place = Place::new();
        let file = place.open();
        assert_eq!(lock::exclusive(&file), Ok(Lock::Held));
        assert_eq!(conflict(&place.open(), role), Some(Conflict::Locked), "{role:?}");
        drop(file);
        let _announced = taken(&place.open(), role);
        assert_eq!(lock::exclusive(&place.open()), Ok(Lock::Busy), "{role:?}");
    }
    // All bytes for reading: whoever insists may read, too.
    for role in ROLES {
        let place = Place::new();
        let reader = place.open();
        assert_eq!(lock::set(&reader, Kind::Shared, Bytes::ALL), Ok(Lock::Held));
        assert_eq!(conflict(&place.open(), role).is_none(), role == Role::ForcedSource, "{role:?}");
    }
    // Some byte of the data, as databases have it.
    let place = Place::new();
    let _database = {
        let file = place.open();
        assert_eq!(lock::set(&file, Kind::Shared, Bytes::one(1 << 30)), Ok(Lock::Held));
        file
    };
    assert_eq!(conflict(&place.open(), Role::Target), Some(Conflict::Locked));
    assert_eq!(conflict(&place.open(), Role::Source), None);
}

#[test]
fn one_program_takes_several_disks_and_one_disk_several_times() {
    let (source, target) = (Place::new(), Place::new());
    let _sources = [taken(&source.open(), Role::Source), taken(&source.open(), Role::Source)];
    let file = target.open();
    let _target = taken(&file, Role::Target);
    // The descriptors of one description are one: nobody is in his own way.
    assert_eq!(look(&file.try_clone().expect("dup"), Role::Target), Ok(None));
}

/// The locks end with [`Announced`] although descriptors are left, as a ring may have some for a while.
#[test]
fn the_disk_is_free_before_all_descriptors_are_gone() {
    let place = Place::new();
    let lingering = place.open();
    let announced = taken(&lingering, Role::Source);
    assert!(foreign_is_refused(&place, &[100, 101]));
    drop(announced);
    assert!(!foreign_is_refused(&place, &[100, 101]));
    drop(lingering);
}

#[test]
fn a_disk_that_is_given_up_within_a_moment_is_waited_for() {
    let place = Place::new();
    let file = foreign(&place, &[100, 101, 201]);
    let ending = thread::spawn(move || {
        thread::sleep(std::time::Duration::from_millis(100));
        drop(file);
    });
    assert!(matches!(take(&place.open(), Role::Source), Ok(Taken::Held(_))));
    ending.join().expect("ended");
}

/// A program that looks while we wait would be refused by what we say: we say nothing.
#[test]
fn who_waits_says_nothing() {
    let place = Place::new();
    let _machine = foreign(&place, &[100, 101, 201]);
    let watcher = place.open();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            for _ in 0..2000 {
                assert_eq!(conflict(&place.open(), Role::Source), Some(Conflict::Uses(Permission::Write)));
            }
        });
        while !waiting.is_finished() {
            let said = lock::obstacle(&watcher, Kind::Exclusive, Permission::Resize.not_shared());
            assert_eq!(said, Ok(None));
        }
    });
}

/// Two at the same time, in roles that exclude each other: never both.
#[test]
fn of_two_at_the_same_time_at_most_one_has_it() {
    const ROUNDS: usize = 4000;
    let pairs = [
        (Role::Target, Role::Target),
        (Role::LiveDisk, Role::LiveDisk),
        (Role::Source, Role::LiveDisk),
        (Role::Source, Role::Target),
    ];
    for (first, second) in pairs {
        let place = Place::new();
        let barrier = Barrier::new(2);
        let holders = AtomicUsize::new(0);
        let run = |role: Role| {
            let mut outcomes = Vec::new();
            for _ in 0..ROUNDS {
                let file = place.open();
                barrier.wait();
                let outcome = attempt(&file, role).expect("asked");
                let is_held = matches!(outcome, Taken::Held(_));
                holders.fetch_add(usize::from(is_held), Ordering::SeqCst);
                // Kept until the other has tried, too.
                barrier.wait();
                let all_refused = holders.load(Ordering::SeqCst) == 0;
                let left = lock::obstacle(&place.open(), Kind::Exclusive, Bytes::ALL) != Ok(None);
                barrier.wait();
                holders.fetch_sub(usize::from(is_held), Ordering::SeqCst);
                outcomes.push((is_held, all_refused && left));
            }
            outcomes
        };
        let (ours, theirs) = thread::scope(|scope| {
            let other = scope.spawn(|| run(second));
            (run(first), other.join().expect("ended"))
        });
        let both = ours.iter().zip(&theirs).filter(|(ours, theirs)| ours.0 && theirs.0).count();
        assert_eq!(both, 0, "{first:?} and {second:?}");
        let mut all = ours.iter().chain(&theirs);
        assert!(all.clone().any(|outcome| outcome.0), "somebody had it some time");
        assert!(all.all(|outcome| !outcome.1), "both were refused and one has left something");
    }
}
