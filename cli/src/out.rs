//! The two ways out: results on standard output, messages on standard error.
//!
//! Nothing here panics when the other end is gone. A reader of standard output that has left (`| head`) is no error of ours; any
//! other failure to deliver the result is one, since whoever waits for it would miss it. A message on standard error
//! that cannot be delivered has no other place to go.
//!
//! With `--progress json` a program reads standard error: from then on each line there is one JSON object, whatever it is: progress, a
//! message, a line of the log.

use std::io::{self, ErrorKind, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use engine::error::describe;
use nix::errno::Errno;
use serde_json::json;

/// Whether standard error takes JSON lines only.
static JSON: AtomicBool = AtomicBool::new(false);

/// What a message is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    /// Why something failed, was refused or has paused.
    Error,
    /// Everything else that is worth telling.
    Notice,
}

impl Level {
    fn name(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Notice => "notice",
        }
    }
}

/// One message for standard error.
#[derive(Clone, Debug)]
pub(crate) struct Message {
    level: Level,
    text: String,
}

impl Message {
    /// Why something failed, was refused or has paused.
    pub(crate) fn error(text: impl std::fmt::Display) -> Self {
        Self { level: Level::Error, text: text.to_string() }
    }
}

impl<T: std::fmt::Display> From<T> for Message {
    fn from(text: T) -> Self {
        Self { level: Level::Notice, text: text.to_string() }
    }
}

/// The text could not be delivered on standard output.
#[derive(Debug)]
pub(crate) struct Undelivered(io::Error);

impl std::fmt::Display for Undelivered {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "cannot write to standard output: {}", reason(&self.0))
    }
}

/// Print `text` as it is on standard output.
pub(crate) fn print(text: &[u8]) -> Result<(), Undelivered> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(Undelivered(error)),
        _ => Ok(()),
    }
}

/// From now on standard error is for a program.
pub(crate) fn speak_json() {
    JSON.store(true, Ordering::Relaxed);
}

/// One message on standard error.
pub(crate) fn say(message: impl Into<Message>) {
    let Message { level, text } = message.into();
    if JSON.load(Ordering::Relaxed) {
        raw(&json!({ "event": "message", "level": level.name(), "message": text }).to_string());
    } else {
        raw(&format!("engine-cli: {}", one_line(&text)));
    }
}

/// Why something failed, on standard error.
pub(crate) fn complain(error: impl std::fmt::Display) {
    say(Message::error(error));
}

/// Takes the lines of the log to standard error.
#[derive(Debug)]
pub(crate) struct Log;

impl Write for Log {
    /// The log writes a line at a time.
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        if !JSON.load(Ordering::Relaxed) {
            return io::stderr().lock().write(text);
        }
        for line in String::from_utf8_lossy(text).lines() {
            raw(&json!({ "event": "log", "message": line }).to_string());
        }
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// An error of the standard library as the engine's messages have it.
pub(crate) fn reason(error: &io::Error) -> String {
    match (error.raw_os_error(), error.get_ref()) {
        (Some(number), _) => describe(Errno::from_raw(number)),
        // Made by the library itself, or around one of the system's.
        (None, Some(inner)) => {
            let inner: Option<&io::Error> = inner.downcast_ref();
            inner.map_or_else(|| error.to_string(), reason)
        }
        (None, None) => error.to_string(),
    }
}

/// An error of the system in its own words, which are QEMU's, and not always those of our messages.
pub(crate) fn strerror(errno: Errno) -> String {
    if errno == Errno::UnknownErrno {
        return errno.desc().to_owned();
    }
    let text = io::Error::from_raw_os_error(errno as i32).to_string();
    let words = text.rfind(" (os error").map_or(text.as_str(), |end| &text[..end]);
    words.to_owned()
}

/// One line on standard error as it is.
pub(crate) fn raw(line: &str) {
    // One write a line, so that lines of several programs do not mix. See the header for why the result does not matter.
    io::stderr().lock().write_all(format!("{line}\n").as_bytes()).ok();
}

/// `text` with its control characters escaped, so that it stays on its line and cannot drive a terminal.
pub(crate) fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for letter in text.chars() {
        if letter.is_control() {
            line.extend(letter.escape_default());
        } else {
            line.push(letter);
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_system_has_its_own_words() {
        assert_eq!(strerror(Errno::EIO), "Input/output error");
        assert_eq!(strerror(Errno::EDQUOT), "Disk quota exceeded");
        assert_eq!(strerror(Errno::ENOSPC), "No space left on device");
    }
}
