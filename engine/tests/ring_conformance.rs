//! One suite over every ring. A ring is added by a [`support::Fixture`] and one line at the end of this file.

mod support;

use engine::ring::threads::ThreadsRing;
use engine::ring::uring::UringRing;
use support::real::Real;
use support::simulated::Simulated;

macro_rules! suite {
    ($ring:ident, $fixture:ty: $($module:ident::$check:ident),* $(,)?) => {
        mod $ring {
            use super::*;
            $(
                #[test]
                fn $check() {
                    match <$fixture as support::Fixture>::unavailable() {
                        None => support::checks::$module::$check::<$fixture>(),
                        Some(reason) => support::skip(stringify!($ring), &reason),
                    }
                }
            )*
        }
    };
}

macro_rules! conformance {
    ($ring:ident, $fixture:ty) => {
        suite! { $ring, $fixture:
            transfer::reads_and_writes,
            transfer::unaligned_tails,
            transfer::end_of_file,
            transfer::errors_are_raw,
            transfer::direct_where_refused,
            transfer::many_in_any_order,
            transfer::null_storage,
            whole::write_zeroes,
            whole::zeroing_keeps_the_length,
            whole::discard,
            whole::allocate,
            whole::flush_and_drop_cache,
            whole::extents,
            whole::digests,
            whole::documents,
            control::cancel,
            control::dropped_in_flight,
            control::deadlines,
            control::woken_before,
            control::woken_during,
            control::helpers_wake,
            control::mixed_kinds,
            control::signals,
            control::misuse_panics,
            control::a_panic_breaks_the_ring,
            control::tables_are_bounded,
            sockets::receives_what_comes,
            sockets::receives_the_whole,
            sockets::sends_from_every_offset,
            sockets::a_send_waits_for_room,
            sockets::shutdown_ends_all,
            sockets::cancels_on_connections,
            sockets::a_reset_is_an_error,
            sockets::removal_closes,
            sockets::many_connections,
            sockets::beside_files,
            sockets::dropped_with_sockets,
            listeners::accepts,
            listeners::accepts_end,
            listeners::sockets_are_bounded,
            listeners::misuse_of_sockets_panics,
            sockets::what_is_there_comes_at_once,
        }
    };
}

conformance!(uring, Real<UringRing>);
conformance!(threads, Real<ThreadsRing>);

// In virtual time: without the checks that need other threads, signals, no time at all, or an operation that panics.
suite! { sim, Simulated:
    transfer::reads_and_writes,
    transfer::unaligned_tails,
    transfer::end_of_file,
    transfer::errors_are_raw,
    transfer::direct_where_refused,
    transfer::many_in_any_order,
    transfer::null_storage,
    whole::write_zeroes,
    whole::zeroing_keeps_the_length,
    whole::discard,
    whole::allocate,
    whole::flush_and_drop_cache,
    whole::extents,
    whole::digests,
    whole::documents,
    control::cancel,
    control::dropped_in_flight,
    control::deadlines,
    control::woken_before,
    control::mixed_kinds,
    control::misuse_panics,
    control::tables_are_bounded,
    sockets::receives_what_comes,
    sockets::receives_the_whole,
    sockets::sends_from_every_offset,
    sockets::a_send_waits_for_room,
    sockets::shutdown_ends_all,
    sockets::cancels_on_connections,
    sockets::a_reset_is_an_error,
    sockets::removal_closes,
    sockets::many_connections,
    sockets::beside_files,
    sockets::dropped_with_sockets,
    listeners::accepts,
    listeners::accepts_end,
    listeners::sockets_are_bounded,
    listeners::misuse_of_sockets_panics,
}
