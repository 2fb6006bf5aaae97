//! What an engine has room for: parts of its ring's arena, and places for storages on the ring.
//!
//! Whoever wants to have a disk or a job carried takes its share first, in its own thread, and hands it over. So what does not fit is refused
//! before anything is touched, and what was refused or has ended gives its share back by dropping it. A share is dropped after the
//! storages that it was for have left the ring.

use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;

use super::memory::Memory;
use crate::error::{Error, Operation, Refusal};
use crate::ring::{BufferRange, MAX_FILES};

struct State {
    memory: Memory,
    places: usize,
}

/// See the module's header.
pub(super) struct Room(Mutex<State>);

impl Room {
    /// Over an arena of `bytes`.
    pub(super) fn new(bytes: u32) -> Arc<Self> {
        Arc::new(Self(Mutex::new(State { memory: Memory::new(bytes), places: MAX_FILES })))
    }

    /// `bytes` of the arena and `places` on the ring, for what `operation` does with `name`.
    ///
    /// # Errors
    /// A refusal where there is no room.
    pub(super) fn take(
        self: &Arc<Self>,
        bytes: u32,
        places: usize,
        operation: Operation,
        name: &str,
    ) -> Result<Share, Error> {
        let refused = |reason: &'static str| {
            Error::refused(Refusal::Unavailable, operation, name.to_owned(), reason)
                .advise("wait until a job has ended, close other disks, or give the engine more memory (the daemon: --memory)")
        };
        let mut state = self.0.lock();
        let Some(left) = state.places.checked_sub(places) else {
            return Err(refused("the engine carries as many disks as it can"));
        };
        let memory =
            state.memory.take(bytes).ok_or_else(|| refused("the engine has no memory left for it"))?;
        state.places = left;
        Ok(Share { memory, places, room: Arc::clone(self) })
    }

    /// How many parts of the arena are handed out.
    #[cfg(feature = "sim")]
    pub(super) fn parts(&self) -> usize {
        self.0.lock().memory.parts()
    }
}

/// A part of an engine's room, until it is dropped.
pub(super) struct Share {
    memory: BufferRange,
    places: usize,
    room: Arc<Room>,
}

impl Share {
    /// Its part of the arena.
    pub(super) fn memory(&self) -> BufferRange {
        self.memory
    }
}

impl fmt::Debug for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Share").field("memory", &self.memory).field("places", &self.places).finish()
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut state = self.room.0.lock();
        state.memory.give_back(self.memory);
        state.places += self.places;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_had_as_a_whole_or_not_at_all_and_comes_back() {
        let room = Room::new(1 << 20);
        let take = |bytes, places| room.take(bytes, places, Operation::Copy, "disk");
        let most = take(1 << 19, MAX_FILES - 1).unwrap();
        assert_eq!(most.memory(), BufferRange { start: 0, length: 1 << 19 });
        let error = take(1 << 16, 2).unwrap_err();
        assert!(error.is_refusal() && error.to_string().contains("as many disks as it can"), "{error}");
        let error = take((1 << 19) + 1, 1).unwrap_err();
        assert!(error.is_refusal() && error.to_string().contains("no memory left"), "{error}");
        let rest = take(1 << 19, 1).expect("what was refused took nothing");
        drop(most);
        assert!(take(1 << 19, MAX_FILES - 1).is_ok());
        drop(rest);
        assert!(take(1 << 20, MAX_FILES).is_ok());
    }
}
