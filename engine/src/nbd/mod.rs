//! NBD, as state machines without I/O. The server's side: what a hypervisor or a tool says, and what it is answered. The client's: what an
//! export of somebody else's server is asked when it is a side of a copy.
//!
//! | module | its idea |
//! |---|---|
//! | [`wire`] | Numbers and headers. |
//! | [`export`] | What is offered, and where it is looked up. |
//! | `handshake` | Options, up to the choice of an export. |
//! | [`connection`] | A connection as a whole, as its driver sees it. |
//! | [`limits`] | How much of everything it may have, and the bytes that all connections share. |
//! | [`client`] | The other side: choosing an export, and replies to requests. |
//!
//! What comes from a peer is hostile: no number in it is believed before it is bounded, and nothing that it does or leaves undone takes more
//! than [`limits::ConnectionLimits`], or harms another connection.

pub mod client;
pub mod connection;
pub mod export;
mod handshake;
pub mod limits;
pub mod wire;

pub use self::connection::{
    Action, CloseReason, Connection, IoId, IoKind, Outcome, PayloadBuffer, Receive, StatusExtent,
};
pub use self::export::{BlockSizes, Export, Exports, Features, MetaContext};
pub use self::limits::{ConnectionLimits, SharedBytes};
pub use self::wire::WireError;
