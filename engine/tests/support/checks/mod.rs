//! The checks themselves, generic over the ring.

pub(crate) mod control;
pub(crate) mod listeners;
pub(crate) mod sockets;
pub(crate) mod transfer;
pub(crate) mod whole;
