//! Vectors lent to the kernel: what a receive or a send in flight holds.
//!
//! # Model
//! The kernel gets addresses within a vector when the operation is pushed, and uses them until it completes. From then until it is
//! taken apart by value, nobody makes a reference to those bytes. A value that is lost (a ring broke) leaks its memory rather than free what
//! the kernel may still write to: that is what `ManuallyDrop` is for here.

use std::mem::ManuallyDrop;

use super::socket::rest;
use super::{MAX_SEND_PARTS, MAX_SOCKET_BYTES, Output};

/// What a receive in flight holds.
pub(crate) struct Receiving {
    buffer: ManuallyDrop<Vec<u8>>,
    filled: usize,
}

impl Receiving {
    /// Lend what of `buffer` lies behind byte `filled`.
    pub(crate) fn new(buffer: Vec<u8>, filled: usize) -> Self {
        Self { buffer: ManuallyDrop::new(buffer), filled }
    }

    /// Address and length of what is to be filled, for the kernel.
    pub(crate) fn target(&mut self) -> (*mut u8, u32) {
        let left = &mut self.buffer[self.filled..];
        (left.as_mut_ptr(), u32::try_from(left.len()).expect("at most MAX_SOCKET_BYTES"))
    }

    /// The kernel is done with it.
    ///
    /// # Panics
    /// If it says that it received more than there was room for.
    pub(crate) fn received(self, bytes: u32) -> Output {
        let room = self.buffer.len() - self.filled;
        assert!(bytes as usize <= room, "{bytes} bytes were received where {room} were asked for");
        Output::Received { buffer: self.release(), bytes }
    }

    /// The kernel is done with it.
    pub(crate) fn release(self) -> Vec<u8> {
        ManuallyDrop::into_inner(self.buffer)
    }
}

/// A message in several parts as the kernel takes it. Never moves: the kernel has the address of the header.
struct Message {
    parts: Vec<Vec<u8>>,
    /// Into `parts`.
    vectors: Vec<libc::iovec>,
    /// Names `vectors`.
    header: libc::msghdr,
}

// SAFETY: the addresses in it lead to what it owns itself, and nothing of that is tied to a thread.
unsafe impl Send for Message {}

/// What a send in flight holds.
pub(crate) struct Sending(ManuallyDrop<Box<Message>>);

/// What the kernel is to be told to send.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Outgoing {
    /// Contiguous bytes.
    Bytes(*const u8, u32),
    /// A message in parts.
    Message(*const libc::msghdr),
}

impl Sending {
    /// Lend what of `parts` lies behind the first `skip` bytes.
    pub(crate) fn new(parts: Vec<Vec<u8>>, skip: usize) -> Self {
        let vectors: Vec<libc::iovec> = rest(&parts, skip)
            .take(MAX_SEND_PARTS)
            .map(|slice| libc::iovec { iov_base: slice.as_ptr().cast_mut().cast(), iov_len: slice.len() })
            .collect();
        // SAFETY: numbers and addresses, for which zero means that there is none.
        let header: libc::msghdr = unsafe { std::mem::zeroed() };
        let mut message = Box::new(Message { parts, vectors, header });
        message.header.msg_iov = message.vectors.as_mut_ptr();
        message.header.msg_iovlen = message.vectors.len() as _;
        Self(ManuallyDrop::new(message))
    }

    /// What to tell the kernel. The addresses hold until [`Sending::sent`] or [`Sending::release`].
    pub(crate) fn outgoing(&self) -> Outgoing {
        match self.0.vectors.as_slice() {
            [one] => Outgoing::Bytes(
                one.iov_base.cast_const().cast(),
                u32::try_from(one.iov_len).expect("at most MAX_SOCKET_BYTES"),
            ),
            _ => Outgoing::Message(&raw const self.0.header),
        }
    }

    /// The kernel is done with it.
    pub(crate) fn sent(self, bytes: u32) -> Output {
        Output::Sent { parts: self.release(), bytes }
    }

    /// The kernel is done with it.
    pub(crate) fn release(self) -> Vec<Vec<u8>> {
        ManuallyDrop::into_inner(self.0).parts
    }
}

const _: () = assert!(MAX_SOCKET_BYTES <= u32::MAX as usize);

#[cfg(test)]
mod tests {
    use super::*;

    /// The bytes that the kernel would find.
    fn seen(sending: &Sending) -> Vec<u8> {
        sending
            .0
            .vectors
            .iter()
            .flat_map(|vector| {
                // SAFETY: made from a slice of the parts, which live and are not changed.
                unsafe { std::slice::from_raw_parts(vector.iov_base.cast::<u8>(), vector.iov_len) }
            })
            .copied()
            .collect()
    }

    #[test]
    fn a_message_holds_what_is_left_of_its_parts() {
        let parts = vec![b"head".to_vec(), Vec::new(), b"payload".to_vec()];
        for skip in 0..11 {
            let sending = Sending::new(parts.clone(), skip);
            assert_eq!(seen(&sending), b"headpayload"[skip..]);
            let one = matches!(sending.outgoing(), Outgoing::Bytes(..));
            assert_eq!(one, skip >= 4, "{skip}: one part needs no message");
            assert_eq!(sending.release(), parts);
        }
    }

    #[test]
    fn no_message_has_more_parts_than_the_kernel_takes() {
        let parts = vec![vec![1]; MAX_SEND_PARTS + 5];
        let sending = Sending::new(parts, 2);
        assert_eq!(seen(&sending).len(), MAX_SEND_PARTS);
        assert_eq!(sending.0.header.msg_iovlen as usize, MAX_SEND_PARTS);
        drop(sending.release());
    }
}
