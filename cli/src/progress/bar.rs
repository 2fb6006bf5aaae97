//! The bar on a terminal, and its stand-in where there is none.
//!
//! The bar takes one line: bar, percentage, and in words what is done, how fast, how long it will take, what was found.
//! `indicatif` draws it, cuts it to the terminal's width and follows changes of that. Rate and time left are the
//! engine's, which knows about pauses and limits.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::Snapshot;
use crate::out;

/// Most redraws a second.
const REDRAWS: u8 = 10;
/// Time between two lines where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// A bar.
pub(crate) struct Bar {
    bar: ProgressBar,
}

impl Bar {
    /// A bar that appears with the first update.
    pub(crate) fn new() -> Self {
        let style = ProgressStyle::with_template("[{bar:20}] {wide_msg}")
            .map_or_else(|_| ProgressStyle::default_bar(), |style| style.progress_chars("=> "));
        let bar = ProgressBar::with_draw_target(Some(1), ProgressDrawTarget::stderr_with_hz(REDRAWS))
            .with_style(style);
        Self { bar }
    }

    pub(crate) fn update(&mut self, snapshot: &Snapshot) {
        // A disk without bytes is done as soon as it is looked at.
        let (total, settled) =
            if snapshot.total == 0 { (1, 1) } else { (snapshot.total, snapshot.settled.min(snapshot.total)) };
        // Message and position are drawn one after the other, and not both each time: the percentage stands with the words that it goes with.
        self.bar.set_message(format!("{}%, {}", snapshot.percent(), snapshot.words()));
        if self.bar.length() != Some(total) {
            self.bar.set_length(total);
        }
        self.bar.set_position(settled);
    }

    /// Take the bar away while `print` prints.
    pub(crate) fn suspend(&self, print: impl FnOnce()) {
        self.bar.suspend(print);
    }

    /// Take the bar away.
    pub(crate) fn finish(self) {
        self.bar.finish_and_clear();
    }
}

/// Lines of text instead of a bar.
#[derive(Default)]
pub(crate) struct Lines {
    last: Option<Instant>,
}

impl Lines {
    pub(crate) fn update(&mut self, snapshot: &Snapshot) {
        if self.last.is_none_or(|last| last.elapsed() >= LINE_EVERY) {
            self.last = Some(Instant::now());
            out::say(format_args!("{}%, {}", snapshot.percent(), snapshot.words()));
        }
    }
}
