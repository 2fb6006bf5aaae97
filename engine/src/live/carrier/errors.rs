//! The words for what went wrong: operation, path, range and cause, in a guest's request.

use nix::errno::Errno;

use super::{Body, Carrier, Failure, Key};
use crate::error::{Error, ErrorKind, Operation};
use crate::piece::Fault;
use crate::units::ByteRange;

impl Body {
    /// What a guest wanted to do.
    pub(super) fn operation(&self) -> Operation {
        match self {
            Self::Read(_) => Operation::Read,
            Self::Write(_) => Operation::Write,
            Self::Flush => Operation::Flush,
            Self::Discard | Self::Deferred => Operation::Discard,
            Self::Zeroes { .. } => Operation::WriteZeroes,
        }
    }
}

impl<P> Carrier<P> {
    /// `range`, of a request of this kind, does not lie on the disk.
    pub(super) fn beyond(&self, body: &Body, range: ByteRange) -> Error {
        let operation = body.operation();
        let (kind, errno) = match operation {
            Operation::Write | Operation::WriteZeroes => (ErrorKind::NoSpace, Errno::ENOSPC),
            _ => (ErrorKind::Io(Errno::EINVAL), Errno::EINVAL),
        };
        // A range may come from outside, and reach beyond what can be counted.
        let told = ByteRange::new(range.offset, range.length.min(u64::MAX - range.offset));
        let reason = format!("the disk ends at byte {}", self.plan.length.0);
        Error::new(kind, operation, &*self.plan.file.name, reason).at(told).because(errno)
    }

    /// A request was cancelled before it was started.
    pub(super) fn cancelled(&self, key: Key) -> Error {
        let request = &self.requests[key];
        let operation = request.body.operation();
        let error = Error::new(ErrorKind::Cancelled, operation, &*self.plan.file.name, "cancelled");
        if operation == Operation::Flush { error } else { error.at(request.range) }
    }

    /// Zeros would have to be written, and the guest does not want that.
    pub(super) fn not_fast(&self, key: Key) -> Error {
        let reason = "the disk makes no zeros faster than by writing them";
        let kind = ErrorKind::Io(Errno::EOPNOTSUPP);
        let range = self.requests[key].range;
        Error::new(kind, Operation::WriteZeroes, &*self.plan.file.name, reason).at(range)
    }

    /// A window failed.
    pub(super) fn error_of(&self, failure: Failure) -> Error {
        let Failure { operation, range, fault } = failure;
        if let (Operation::Flush, Some(error)) = (operation, self.flushes.failed()) {
            return error.clone();
        }
        let path = &*self.plan.file.name;
        let io =
            |reason: &'static str| Error::new(ErrorKind::Io(Errno::EIO), operation, path, reason).at(range);
        match fault {
            Fault::Errno(errno) | Fault::Lost(errno) => {
                let range = (operation != Operation::Flush).then_some(range);
                Error::io(operation, path, range, errno)
            }
            Fault::EndOfStorage => io("the disk has become shorter since it was opened"),
            Fault::NothingWritten => io("nothing was written"),
            Fault::Mismatch => unreachable!("a carrier compares nothing"),
        }
    }
}
