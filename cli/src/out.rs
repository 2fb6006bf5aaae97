//! The two ways out: results on standard output, messages on standard error.
//!
//! Nothing here panics when the other end is gone. A reader of standard output that has left (`| head`) is no error of ours; any
//! other failure to deliver the result is one, since whoever waits for it would miss it. A message on standard error
//! that cannot be delivered has no other place to go.

use std::io::{self, ErrorKind, Write};

/// The text could not be delivered on standard output.
#[derive(Debug)]
pub(crate) struct Undelivered(io::Error);

impl std::fmt::Display for Undelivered {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "cannot write to standard output: {}", self.0)
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

/// One message on standard error.
pub(crate) fn say(message: impl std::fmt::Display) {
    raw(&format!("engine-cli: {message}"));
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
