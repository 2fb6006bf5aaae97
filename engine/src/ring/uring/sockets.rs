//! Sockets on the kernel's ring.
//!
//! # Model
//! Descriptors are named by number: connections come and go too often to be worth a place in the ring's table. What an operation
//! receives into or sends from lies in the record of operations in flight (see `held`) until the kernel says that it is done. A socket
//! cannot be removed, hence not be closed, before that.

use std::os::fd::AsRawFd;

use nix::errno::Errno;

use super::super::base::{Base, Task};
use super::super::held::{Receiving, Sending};
use super::super::socket::{Place, check_bytes};
use super::super::{Completion, Op, Output, SocketId, Token};
use super::UringRing;
use super::sys::{self, Request};

impl UringRing {
    /// Push an operation that takes `place`.
    pub(super) fn push_on_socket(&mut self, token: Token, op: Op, place: Place) {
        self.base.admit_on_socket(token);
        check_bytes(&op);
        self.base.sockets.begin(place);
        if matches!(op, Op::Accept { .. }) && self.base.sockets.is_closed_listener(place.socket) {
            let completion = Completion { token, result: Err(Errno::ECANCELED) };
            return self.base.push_ready_on(place, completion);
        }
        let (task, all) = match op {
            Op::Accept { listener } => (Task::Accept(listener), false),
            Op::Receive { socket, buffer, filled, whole } => {
                (Task::Receive(socket, Receiving::new(buffer, filled)), whole)
            }
            Op::Send { socket, parts, skip } => (Task::Send(socket, Sending::new(parts, skip)), false),
            other => unreachable!("{other:?} takes no place"),
        };
        let key = self.base.flight.insert(token, task);
        self.base.sockets.fly(place, key);
        let number = self.base.sockets.descriptor(place.socket).as_raw_fd();
        // Addresses are taken where the operation stays until it ends.
        let request = match self.base.flight.get_mut(key) {
            Some((_, Task::Accept(_))) => Request::Accept { listener: number },
            Some((_, Task::Receive(_, receiving))) => {
                let (address, length) = receiving.target();
                Request::Receive { socket: number, address, length, whole: all }
            }
            Some((_, Task::Send(_, sending))) => {
                Request::Send { socket: number, outgoing: sending.outgoing() }
            }
            _ => unreachable!("it was just inserted"),
        };
        // SAFETY: the flight holds the memory until `reap` is told of the end of `key`, and never frees it if the ring is dropped
        // before that; until then the place is taken, so the socket stays in the table and open.
        unsafe { self.kernel.push(key, &request) };
    }

    pub(super) fn shut_down(&mut self, socket: SocketId) {
        if let Some(key) = self.base.sockets.shut_down(socket) {
            assert!(self.kernel.push_cancel(key), "the submission queue has room for one for each listener");
        }
    }
}

/// The kernel is done with an accept.
pub(super) fn accepted(
    base: &mut Base,
    listener: SocketId,
    result: Result<u32, Errno>,
) -> Result<Output, Errno> {
    // SAFETY: called once for the end of an accept.
    let connection = unsafe { sys::connection(result?) };
    base.sockets.add_accepted(listener, connection).map(Output::Accepted)
}

/// The kernel is done with a receive.
pub(super) fn received(receiving: Receiving, result: Result<u32, Errno>) -> Result<Output, Errno> {
    match result {
        Ok(bytes) => Ok(receiving.received(bytes)),
        Err(errno) => {
            drop(receiving.release());
            Err(errno)
        }
    }
}

/// The kernel is done with a send.
pub(super) fn sent(sending: Sending, result: Result<u32, Errno>) -> Result<Output, Errno> {
    match result {
        Ok(bytes) => Ok(sending.sent(bytes)),
        Err(errno) => {
            drop(sending.release());
            Err(errno)
        }
    }
}
