//! The crate's error: small, matchable, and a single line when printed.
//!
//! # Model
//! An [`Error`] is a [`ErrorKind`], on which callers decide (exit code, error policy, QMP error class), and the story for
//! the person who reads it: the operation, the path, the byte range, why it failed, and what to do about it. The cause
//! is kept as [`std::error::Error::source`]. The story lives behind one shared pointer, so an error is two words and a
//! discriminant, cheap to return and to hand to every waiter.
//!
//! # Rules
//! - [`Error::is_refusal`] holds exactly where nothing of the target was touched (exit code 2).
//! - Printed, an error is one line whatever a path contains: control characters are escaped.

mod system;

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use nix::errno::Errno;

use crate::units::ByteRange;

/// What the crate's fallible functions return.
pub type Result<T> = std::result::Result<T, Error>;

/// Why arguments or conditions were refused. In every case nothing of the target was touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refusal {
    /// A size, speed, name or combination of options that makes no sense.
    BadArgument,
    /// Something that must exist does not.
    NotFound,
    /// The system denies access.
    PermissionDenied,
    /// A directory, character device, FIFO or socket: no disk.
    NotADisk,
    /// The target exists and may not be overwritten without being told so.
    Exists,
    /// Source and target (or map file and disk) share their bytes.
    SameDisk,
    /// The target does not hold the source.
    TooSmall,
    /// Beyond a limit of the engine, the file system or the process.
    TooLarge,
    /// Mounted, claimed by another device, or locked by another program.
    InUse,
    /// A file system or a device that takes no writes.
    ReadOnly,
    /// Known, but not supported by this version or here.
    Unsupported,
    /// The system refused for another reason; the cause says which.
    Unavailable,
}

/// What kind of failure an [`Error`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Refused before anything was touched.
    Refused(Refusal),
    /// A map file that belongs to another pair, is damaged, or is from a newer version. Also a refusal.
    MapRefused,
    /// An I/O error.
    Io(Errno),
    /// The target is full, or a quota is.
    NoSpace,
    /// The source ended before its length.
    SourceShrank,
    /// The source was changed while it was copied.
    SourceChanged,
    /// The target's name does not mean the file that was written any more.
    TargetLost,
    /// What was read back is not what was written.
    VerifyMismatch,
    /// Data did not reach stable storage.
    FlushFailed(Errno),
    /// Ended on request.
    Cancelled,
    /// Something did not happen in its time.
    TimedOut,
    /// The ring thread is gone; nothing more can be done with this engine.
    EngineDied,
}

/// What was being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Operation {
    /// Making sense of an argument.
    Parse,
    /// Opening a disk of which nothing else is said.
    Open,
    /// Opening the source.
    OpenSource,
    /// Opening the target.
    OpenTarget,
    /// Opening the fleece file.
    OpenFleece,
    /// Creating a new target file.
    Create,
    /// Setting the target's length.
    Resize,
    /// Looking at a disk without copying it.
    Inspect,
    /// Reading.
    Read,
    /// Writing.
    Write,
    /// Making a range read as zeros.
    WriteZeroes,
    /// Giving a range back.
    Discard,
    /// Reserving space.
    Allocate,
    /// Bringing data to stable storage.
    Flush,
    /// Dropping data from the page cache.
    DropCache,
    /// Asking for holes and data.
    Extents,
    /// Comparing what was written with what was read back.
    Verify,
    /// Using a map file.
    UseMap,
    /// Writing a map file.
    WriteMap,
    /// Removing a file.
    Remove,
    /// The copy as a whole.
    Copy,
    /// Copying the old contents of what a guest is about to change.
    CopyBeforeWrite,
    /// Reading the disk as it was at t0.
    ReadSnapshot,
    /// Keeping old contents in the fleece file.
    WriteFleece,
    /// Reading old contents that are kept in the fleece file.
    ReadFleece,
    /// Taking a guest's request.
    Queue,
    /// Serving a disk to clients.
    Export,
}

impl Operation {
    /// As it reads after "cannot".
    #[must_use]
    pub fn verb(self) -> &'static str {
        match self {
            Self::Parse => "understand",
            Self::Open => "open",
            Self::OpenSource => "open source",
            Self::OpenTarget => "open target",
            Self::OpenFleece => "use as fleece file",
            Self::Create => "create",
            Self::Resize => "set the length of",
            Self::Inspect => "inspect",
            Self::Read => "read",
            Self::Write => "write",
            Self::WriteZeroes => "write zeroes to",
            Self::Discard => "discard",
            Self::Allocate => "allocate space in",
            Self::Flush => "flush",
            Self::DropCache => "write back",
            Self::Extents => "find the holes of",
            Self::Verify => "verify",
            Self::UseMap => "use map file",
            Self::WriteMap => "write map file",
            Self::Remove => "remove",
            Self::Copy => "copy",
            Self::WriteFleece => "keep old contents in the fleece file",
            Self::ReadFleece => "read old contents from the fleece file",
            Self::Queue => "take a request for",
            Self::Export => "export",
            Self::ReadSnapshot => "read the snapshot of",
            Self::CopyBeforeWrite => "copy the old contents before a guest's write to",
        }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.verb())
    }
}

/// Whether `errno`, met on an NBD export, tells that the connection to its server is lost. No reply of a server means one of these.
#[must_use]
pub fn is_lost_connection(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::ECONNRESET
            | Errno::ECONNABORTED
            | Errno::EPIPE
            | Errno::ENOTCONN
            | Errno::ETIMEDOUT
            | Errno::EHOSTUNREACH
            | Errno::EHOSTDOWN
            | Errno::ENETUNREACH
            | Errno::ENETDOWN
            | Errno::ENETRESET
            | Errno::EPROTO
    )
}

type Cause = Arc<dyn std::error::Error + Send + Sync>;

#[derive(Clone, Debug)]
struct Story {
    operation: Operation,
    path: String,
    range: Option<ByteRange>,
    reason: Cow<'static, str>,
    advice: Option<Cow<'static, str>>,
    cause: Option<Cause>,
}

/// What failed, on which path and range, why, and what to do. See the module's header.
#[derive(Clone, Debug)]
pub struct Error {
    kind: ErrorKind,
    story: Arc<Story>,
}

impl Error {
    /// An error of `kind`: `operation` on `path` failed because of `reason`.
    #[must_use]
    pub fn new(
        kind: ErrorKind,
        operation: Operation,
        path: impl Into<String>,
        reason: impl Into<Cow<'static, str>>,
    ) -> Self {
        let story = Story {
            operation,
            path: path.into(),
            range: None,
            reason: reason.into(),
            advice: None,
            cause: None,
        };
        Self { kind, story: Arc::new(story) }
    }

    /// A refusal: nothing of the target was touched.
    #[must_use]
    pub fn refused(
        refusal: Refusal,
        operation: Operation,
        path: impl Into<String>,
        reason: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self::new(ErrorKind::Refused(refusal), operation, path, reason)
    }

    /// A refusal because the system said `errno` before anything was touched.
    #[must_use]
    pub fn refused_by_system(operation: Operation, path: impl Into<String>, errno: Errno) -> Self {
        let (refusal, advice) = match errno {
            Errno::ENOENT | Errno::ENOTDIR | Errno::ENXIO | Errno::ENODEV | Errno::ENOMEDIUM => {
                (Refusal::NotFound, "check the path")
            }
            Errno::EACCES | Errno::EPERM => (
                Refusal::PermissionDenied,
                "check its permissions and those of its directory, or run as a user that may",
            ),
            Errno::EROFS => (Refusal::ReadOnly, "choose a place that can be written to"),
            Errno::EBUSY | Errno::ETXTBSY => (Refusal::InUse, "unmount it or stop the program that uses it"),
            Errno::EISDIR => (Refusal::NotADisk, "name a file or a block device"),
            Errno::ENOSPC | Errno::EDQUOT => {
                (Refusal::Unavailable, "free some space or raise the quota, or choose another place")
            }
            Errno::EMFILE | Errno::ENFILE => {
                (Refusal::Unavailable, "raise the limit on open files (ulimit -n)")
            }
            Errno::ENOMEM => (Refusal::Unavailable, "free some memory"),
            Errno::EFBIG | Errno::EOVERFLOW => (Refusal::TooLarge, "choose a file system with larger files"),
            Errno::ENAMETOOLONG | Errno::EINVAL | Errno::ELOOP => (Refusal::BadArgument, "check the path"),
            _ => (Refusal::Unavailable, "see the kernel's log for the cause"),
        };
        Self::refused(refusal, operation, path, describe(errno)).advise(advice).because(errno)
    }

    /// An I/O error in the middle of the work, sorted by what the system said.
    #[must_use]
    pub fn io(operation: Operation, path: impl Into<String>, range: Option<ByteRange>, errno: Errno) -> Self {
        let error = Self::by_system(operation, path, range, (errno, system::reason(operation, errno)));
        match system::advice(operation, errno) {
            Some(advice) => error.advise(advice),
            None => error,
        }
    }

    /// An I/O error with `reason`, sorted by `errno`, which is its cause.
    fn by_system(
        operation: Operation,
        path: impl Into<String>,
        range: Option<ByteRange>,
        (errno, reason): (Errno, String),
    ) -> Self {
        let kind = match (operation, errno) {
            (_, Errno::ENOSPC | Errno::EDQUOT) => ErrorKind::NoSpace,
            (Operation::Flush, _) => ErrorKind::FlushFailed(errno),
            _ => ErrorKind::Io(errno),
        };
        let mut error = Self::new(kind, operation, path, reason).because(errno);
        Arc::make_mut(&mut error.story).range = range;
        error
    }

    /// As [`Self::io`], of a disk at an NBD server: either its reply says so, or there is no connection any more ([`is_lost_connection`]). Of both the
    /// kernel's log here knows nothing.
    #[must_use]
    pub fn io_at_server(
        operation: Operation,
        path: impl Into<String>,
        range: Option<ByteRange>,
        errno: Errno,
    ) -> Self {
        let error = Self::by_system(operation, path, range, (errno, describe(errno)));
        match errno {
            Errno::EPROTO => {
                error.advise("the server does not keep to the protocol: use another, or see the log (-v)")
            }
            lost if lost == Errno::ESHUTDOWN || is_lost_connection(lost) => {
                error.advise("the server, or the way to it, is gone: see that it runs, then copy again")
            }
            Errno::EIO => error.advise("the server says that its disk is failing: see the server's log"),
            Errno::ENOSPC => error.advise("free some space at the server, or choose a larger target"),
            Errno::EPERM => {
                error.advise("the server does not allow it: see how it exports the disk, and its log")
            }
            Errno::ENOMEM => error.advise("the server is out of memory: see its log, then copy again"),
            _ => error.advise("the server does not take the request: see the server's log"),
        }
    }

    /// The source ended before the length that it had when it was opened.
    #[must_use]
    pub fn source_shrank(path: impl Into<String>, range: ByteRange) -> Self {
        Self::new(
            ErrorKind::SourceShrank,
            Operation::Read,
            path,
            "the source has become shorter since it was opened",
        )
        .at(range)
        .advise("copy again while nothing truncates it")
    }

    /// What was read back from `range` is not what was written there.
    #[must_use]
    pub fn verify_mismatch(path: impl Into<String>, range: ByteRange) -> Self {
        Self::new(
            ErrorKind::VerifyMismatch,
            Operation::Verify,
            path,
            "what was read back differs from what was written",
        )
        .at(range)
        .advise("do not trust this target: check its device, and who else writes to it")
    }

    /// The copy to `path` ended on request.
    #[must_use]
    pub fn cancelled(path: impl Into<String>) -> Self {
        Self::new(ErrorKind::Cancelled, Operation::Copy, path, "cancelled")
    }

    /// The engine's ring thread is gone.
    #[must_use]
    pub fn engine_died(path: impl Into<String>, reason: impl Into<Cow<'static, str>>) -> Self {
        Self::new(ErrorKind::EngineDied, Operation::Copy, path, reason).advise("start again")
    }

    /// Whether `other` says the same, of whatever range.
    #[must_use]
    pub(crate) fn tells_the_same_as(&self, other: &Self) -> bool {
        let (mine, others) = (&*self.story, &*other.story);
        (self.kind, mine.operation, &mine.path, &mine.reason)
            == (other.kind, others.operation, &others.path, &others.reason)
    }

    /// The same error, of another `operation`: for a caller that means something else by what was called.
    #[must_use]
    pub fn during(mut self, operation: Operation) -> Self {
        Arc::make_mut(&mut self.story).operation = operation;
        self
    }

    /// Adds the byte range concerned.
    #[must_use]
    pub fn at(mut self, range: ByteRange) -> Self {
        Arc::make_mut(&mut self.story).range = Some(range);
        self
    }

    /// Adds what to do about it.
    #[must_use]
    pub fn advise(mut self, advice: impl Into<Cow<'static, str>>) -> Self {
        Arc::make_mut(&mut self.story).advice = Some(advice.into());
        self
    }

    /// Adds the cause, as [`std::error::Error::source`] gives it.
    #[must_use]
    pub fn because(mut self, cause: impl std::error::Error + Send + Sync + 'static) -> Self {
        Arc::make_mut(&mut self.story).cause = Some(Arc::new(cause));
        self
    }

    /// What kind of failure it is.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Whether arguments or conditions were refused, with nothing of the target touched.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        matches!(self.kind, ErrorKind::Refused(_) | ErrorKind::MapRefused)
    }

    /// What was being done.
    #[must_use]
    pub fn operation(&self) -> Operation {
        self.story.operation
    }

    /// On which path.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.story.path
    }

    /// On which bytes, where that is known.
    #[must_use]
    pub fn range(&self) -> Option<ByteRange> {
        self.story.range
    }

    /// Why.
    #[must_use]
    pub fn reason(&self) -> &str {
        &self.story.reason
    }

    /// What to do about it.
    #[must_use]
    pub fn advice(&self) -> Option<&str> {
        self.story.advice.as_deref()
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.story.cause.as_deref().map(|cause| cause as _)
    }
}

/// One line: `cannot write disk.img, bytes 0..65536: no space left on device (ENOSPC); free some space, …`.
impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let story = &*self.story;
        // A name that ends in a colon (`null:`) would run into the next one.
        let quote = if story.path.ends_with(':') { "'" } else { "" };
        write!(f, "cannot {} {quote}{}{quote}", story.operation, OneLine(&story.path))?;
        if let Some(range) = story.range {
            write!(f, ", {range}")?;
        }
        write!(f, ": {}", OneLine(&story.reason))?;
        match &story.advice {
            Some(advice) => write!(f, "; {}", OneLine(advice)),
            None => Ok(()),
        }
    }
}

/// `errno` as a sentence reads it: its text with its name behind, as in `no space left on device (ENOSPC)`.
#[must_use]
pub fn describe(errno: Errno) -> String {
    let text = errno.desc();
    let mut letters = text.chars();
    // "No such file" begins a sentence in errno's table and continues one here; "I/O error" stays.
    let lowered = match (letters.next(), letters.clone().next()) {
        (Some(first), Some(second)) if second.is_lowercase() || second == ' ' => {
            first.to_lowercase().chain(letters).collect()
        }
        _ => text.to_owned(),
    };
    format!("{lowered} ({errno:?})")
}

/// Text with its control characters escaped, so that it stays on its line and cannot drive a terminal.
struct OneLine<'a>(&'a str);

impl fmt::Display for OneLine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for letter in self.0.chars() {
            if letter.is_control() {
                write!(f, "{}", letter.escape_default())?;
            } else {
                fmt::Write::write_char(f, letter)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_as_one_line_with_everything_in_it() {
        let error = Error::io(Operation::Write, "disk.img", Some(ByteRange::new(0, 65536)), Errno::ENOSPC);
        assert_eq!(
            error.to_string(),
            "cannot write disk.img, bytes 0..65536: no space left on device (ENOSPC); \
             free some space, or choose a larger target"
        );
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        assert!(!error.is_refusal());
        assert!(std::error::Error::source(&error).is_some());
    }

    #[test]
    fn a_name_that_ends_in_a_colon_is_quoted() {
        let error = Error::refused(Refusal::Unsupported, Operation::OpenTarget, "null:", "it keeps nothing");
        assert_eq!(error.to_string(), "cannot open target 'null:': it keeps nothing");
    }

    #[test]
    fn a_path_cannot_break_the_line() {
        let error = Error::refused_by_system(Operation::OpenSource, "a\nb\u{1b}[31m", Errno::ENOENT);
        assert_eq!(error.to_string().lines().count(), 1);
        assert!(!error.to_string().contains('\u{1b}'));
        assert!(error.is_refusal());
        assert_eq!(error.kind(), ErrorKind::Refused(Refusal::NotFound));
    }

    #[test]
    fn of_a_server_advice_sends_to_the_server() {
        for errno in [
            Errno::EPERM,
            Errno::EIO,
            Errno::ENOMEM,
            Errno::EINVAL,
            Errno::ENOSPC,
            Errno::EOVERFLOW,
            Errno::EOPNOTSUPP,
            Errno::ESHUTDOWN,
        ] {
            let error = Error::io_at_server(Operation::Write, "nbd://h/x", None, errno);
            assert!(error.advice().is_some_and(|advice| advice.contains("server")), "{error}");
            assert!(!error.to_string().contains("kernel"), "{error}");
            assert!(!is_lost_connection(errno), "a reply is no loss");
        }
        for errno in [Errno::ECONNRESET, Errno::EHOSTUNREACH, Errno::ENETUNREACH, Errno::ETIMEDOUT] {
            let error = Error::io_at_server(Operation::Flush, "nbd://h/x", None, errno);
            assert!(error.to_string().contains("the server, or the way to it, is gone"), "{error}");
            assert!(is_lost_connection(errno));
            // A disk of one's own has no server.
            assert!(!Error::io(Operation::Read, "/dev/sdb", None, errno).to_string().contains("server"));
        }
    }

    #[test]
    fn flush_errors_are_told_apart_and_errors_stay_small() {
        let error = Error::io(Operation::Flush, "t", None, Errno::EIO);
        assert_eq!(error.kind(), ErrorKind::FlushFailed(Errno::EIO));
        assert!(size_of::<Error>() <= 24, "{}", size_of::<Error>());
    }
}
