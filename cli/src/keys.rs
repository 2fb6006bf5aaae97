//! Enter on the terminal, for a copy or a backup that has paused.
//!
//! The terminal stays in its normal mode: it hands over whole lines, so a line that is there means Enter. Nothing is read
//! unless the program is in the foreground, since a read from the background would stop it.

use std::io::{self, IsTerminal, Read};
use std::os::fd::AsFd;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::termios::{FlushArg, tcflush};
use nix::unistd::{getpgrp, tcgetpgrp};

/// The keyboard.
#[derive(Default)]
pub(crate) struct Keys {
    /// Standard input has ended.
    ended: bool,
}

impl Keys {
    /// Forget what was typed before; gives whether there is a keyboard.
    pub(crate) fn begin(&mut self) -> bool {
        let there = self.is_there();
        if there {
            // Should it fail, an early Enter makes it try again at once, which does no harm.
            tcflush(io::stdin(), FlushArg::TCIFLUSH).ok();
        }
        there
    }

    /// Whether Enter was pressed.
    pub(crate) fn pressed(&mut self) -> bool {
        if !self.is_there() {
            return false;
        }
        let stdin = io::stdin();
        let mut look = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
        if !matches!(poll(&mut look, PollTimeout::ZERO), Ok(1..)) {
            return false;
        }
        match stdin.lock().read(&mut [0; 256]) {
            Ok(0) | Err(_) => {
                self.ended = true;
                false
            }
            Ok(_) => true,
        }
    }

    fn is_there(&self) -> bool {
        let stdin = io::stdin();
        !self.ended
            && stdin.is_terminal()
            && tcgetpgrp(&stdin).is_ok_and(|foreground| foreground == getpgrp())
    }
}
