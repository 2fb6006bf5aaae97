//! Live disks: guests go on writing while they are copied.

pub mod carrier;
