//! The client's side of the NBD protocol, as state machines without I/O: what an export of somebody else's server is asked, and what is made of
//! its answers.
//!
//! | module | its idea |
//! |---|---|
//! | [`uri`] | `nbd://` and `nbd+unix://`: where a server is, and which of its exports is meant. |
//! | [`negotiation`] | From the server's greeting to the choice of the export: what both can do. |
//! | [`transmission`] | Requests under their cookies, and replies in any order, in one piece or in chunks. |
//! | `coverage` | Which bytes of a read have come. |
//!
//! # Model
//! Both machines are shown the bytes that have come and were not taken yet. They say how many of them they have taken and what is next: more bytes
//! must come, something is to be sent, a range of a request's buffer is to be filled. Contents of disks never pass through a machine: whoever drives it
//! moves them from the stream to where they belong. So how a stream is cut makes no difference, which the tests show for every cut.
//!
//! # Hostile servers
//! A server may lie. No number of its own sizes anything: what is kept of a request is bounded by what was asked, of a message by
//! [`negotiation::MAX_REPLY_BYTES`], of a reply in chunks by [`transmission::MAX_EXTENTS`] and the like. A read counts as answered only when each of its bytes has
//! come exactly once. What breaks the protocol is a [`Violation`], after which the connection is of no use: nothing that follows could be
//! told from contents.

mod coverage;
pub mod negotiation;
pub mod transmission;
pub mod uri;

pub use negotiation::{Agreement, Negotiation, NegotiationError};
pub use transmission::{Answer, Request, Step, Transmission};
pub use uri::{Address, NbdUri};

/// What a server did that no server may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Violation(pub &'static str);
