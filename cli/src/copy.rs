//! `copy`: start the engine's job, watch it, steer it, tell how it ended.
//!
//! A start may take its time, with servers that do not answer and a sample to compare: it has a thread of its own, so that a signal ends it at once as long
//! as it has touched nothing. Behind that it goes to its end, and the copy is cancelled.
//!
//! The main thread looks at the job ten times a second; that is all the work there is here while the engine copies. A
//! job that pauses on an error (policy `stop`) is announced once a pause, with what makes it go on: SIGCONT, or Enter where
//! somebody sits at the terminal.

use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use engine::copy::{Copy, StartToken, start_unless_given_up};
use engine::error::{Error, ErrorKind, Operation, Refusal};
use engine::job::{IoStatus, JobResult, Progress, Status};

use crate::args::CopyArgs;
use crate::keys::Keys;
use crate::out;
use crate::progress::{Meter, Snapshot};
use crate::report::copy::{Ended, missing_hint, not_started_json};
use crate::report::{deliver, exit_code};
use crate::signals::{Ending, Signalled};

/// How often the job is looked at.
const TICK: Duration = Duration::from_millis(100);
/// How long a start that was given up has to let go of what it has, such as an empty map file. Whatever stays does no harm.
const GRACE: Duration = Duration::from_millis(500);

/// Carry out `copy`; gives the exit code. `command_line` is how the program was called, `logging` whether it logs.
pub(crate) fn run(args: &CopyArgs, command_line: &[String], logging: bool) -> u8 {
    let signalled = match Signalled::install() {
        Ok(signalled) => signalled,
        Err(error) => {
            let refused = Error::refused(
                Refusal::Unavailable,
                Operation::Copy,
                args.source.as_str(),
                out::reason(&error),
            );
            return not_started(args, &refused, None);
        }
    };
    let mut told_ending = false;
    let started = check_target(args).and_then(|()| start(args, &signalled, &mut told_ending));
    let copy = match started {
        Ok(copy) => copy,
        Err(error) => return not_started(args, &error, signalled.ending()),
    };
    signalled.steer(&copy.job);
    let mut meter = Meter::new(args.output.progress, logging);
    for notice in &copy.notices {
        meter.say(notice);
    }
    let mut told = copy.notices.clone();
    let result = follow(&copy, &signalled, &mut meter, &mut told, told_ending);
    meter.finish(Some(&Snapshot::of_copy(&result.progress).at_the_end()));
    let ended = Ended { args, result: &result, told: &told, ending: signalled.ending(), command_line };
    for message in ended.messages() {
        out::say(message);
    }
    let code = ended.exit_code();
    if args.output.json { deliver(&ended.json(), code) } else { code }
}

/// Start the copy; `told_ending`: it was told that a signal ends it.
///
/// # Errors
/// As [`engine::copy::start`]; of kind [`ErrorKind::Cancelled`] where a signal came before anything was touched.
fn start(args: &CopyArgs, signalled: &Signalled, told_ending: &mut bool) -> Result<Copy, Error> {
    let (options, token) = (args.options(), StartToken::default());
    let (sender, receiver) = mpsc::channel();
    let starts = token.clone();
    let start = move || {
        // Nobody waits any more for one that was given up.
        sender.send(start_unless_given_up(&options, &starts)).ok();
    };
    thread::Builder::new().name("start".into()).spawn(start).map_err(|error| {
        let reason = "cannot start a thread";
        Error::refused(Refusal::Unavailable, Operation::Copy, args.source.as_str(), reason).because(error)
    })?;
    loop {
        match receiver.recv_timeout(TICK) {
            Ok(started) => return started,
            Err(RecvTimeoutError::Disconnected) => {
                let reason = "its thread ended before the copy began";
                return Err(Error::engine_died(args.source.as_str(), reason));
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
        let Some(ending) = signalled.ending().filter(|_| !*told_ending) else { continue };
        if token.give_up() {
            receiver.recv_timeout(GRACE).ok();
            return Err(Error::cancelled(args.target.as_str()));
        }
        *told_ending = true;
        out::say(ends_cleanly(ending));
    }
}

fn ends_cleanly(ending: Ending) -> String {
    format!("{}: ending cleanly; a second one ends at once", ending.name())
}

/// `ending`: a signal that came meanwhile.
fn not_started(args: &CopyArgs, error: &Error, ending: Option<Ending>) -> u8 {
    let given_up = ending.filter(|_| error.kind() == ErrorKind::Cancelled);
    match given_up {
        Some(ending) => out::say(format_args!("ended by {} before anything was touched", ending.name())),
        None => out::complain(error),
    }
    if error.kind() == ErrorKind::Refused(Refusal::NotFound)
        && let Some(hint) = missing_hint(args)
    {
        out::say(hint);
    }
    let code = given_up.map_or_else(|| exit_code(error), Ending::exit_code);
    if args.output.json { deliver(&not_started_json(args, error, ending, code), code) } else { code }
}

/// Standard output as the target, as other programs take it, and a directory, as `cp` does, get their answer here, where the source's name is at hand.
fn check_target(args: &CopyArgs) -> Result<(), Error> {
    if args.target == "-" {
        let reason = "standard output is no target";
        return Err(Error::refused(
            Refusal::BadArgument,
            Operation::OpenTarget,
            args.target.as_str(),
            reason,
        )
        .advise("name a file or a block device; write ./- for a file of that name"));
    }
    let path = Path::new(&args.target);
    if args.target.is_empty() || !path.is_dir() {
        return Ok(());
    }
    let name = Path::new(&args.source).file_name().map_or_else(|| "disk.img".into(), OsStr::to_string_lossy);
    Err(Error::refused(Refusal::NotADisk, Operation::OpenTarget, args.target.as_str(), "it is a directory")
        .advise(format!("name a file in it, e.g. {}", path.join(&*name).display())))
}

/// Watch the job to its end, and tell what is worth it meanwhile; `told` gets that too. `told_ending`: see [`start`].
fn follow(
    copy: &Copy,
    signalled: &Signalled,
    meter: &mut Meter,
    told: &mut Vec<String>,
    mut told_ending: bool,
) -> Arc<JobResult> {
    let mut pauses = Pauses::default();
    let mut seen = 0;
    loop {
        if let Some(result) = copy.job.wait_timeout(TICK) {
            return result;
        }
        let (lifted, progress) = observe(|| signalled.resumes(), || copy.job.progress());
        meter.update(&Snapshot::of_copy(&progress));
        for notice in copy.job.notices(seen) {
            meter.say(&notice);
            told.push(notice);
            seen += 1;
        }
        if let (false, Some(ending)) = (told_ending, signalled.ending()) {
            told_ending = true;
            meter.say(ends_cleanly(ending));
        }
        if !told_ending {
            pauses.look(&progress, lifted, signalled, meter);
        }
    }
}

/// How many pauses were lifted, and how the job stands. In this order: a pause that is lifted between the two is not taken for another one.
fn observe<P>(lifted: impl FnOnce() -> u64, progress: impl FnOnce() -> P) -> (u64, P) {
    let lifted = lifted();
    (lifted, progress())
}

/// Announces pauses on an error and takes the key that ends them.
#[derive(Default)]
struct Pauses {
    /// How many pauses had been lifted when the last one was announced.
    announced: Option<u64>,
    /// The same of when it was told how to lift it.
    told_how: Option<u64>,
    keys: Keys,
}

impl Pauses {
    /// `lifted`: how many pauses had been lifted before `progress` was taken.
    fn look(&mut self, progress: &Progress, lifted: u64, signalled: &Signalled, meter: &Meter) {
        if progress.io_status == IoStatus::Ok {
            return;
        }
        // At once: what is in flight, and the checkpoint before the pause, may take long.
        if self.is_another(lifted) {
            let reason = progress.paused_on.as_deref().unwrap_or("an error");
            meter.say(out::Message::error(format_args!("paused: {}", out::one_line(reason))));
        }
        if progress.status != Status::Paused {
            return;
        }
        if self.told_how.replace(lifted) != Some(lifted) {
            let enter = if self.keys.begin() { "press Enter, or run: " } else { "run: " };
            meter.say(format_args!("to try again {enter}kill -CONT {}", std::process::id()));
        } else if self.keys.pressed() {
            signalled.go_on();
        }
    }

    /// Whether the pause that was found after so many were lifted was not announced yet; it is now.
    fn is_another(&mut self, lifted: u64) -> bool {
        self.announced.replace(lifted) != Some(lifted)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// A job that pauses, and one who looks at it.
    struct Looked {
        signalled: Signalled,
        paused: Cell<bool>,
        pauses: Pauses,
        announced: usize,
    }

    impl Looked {
        /// One look; what `between` does happens in the midst of it.
        fn look(&mut self, between: impl Fn(&Self)) {
            let done = Cell::new(false);
            let then = || {
                if !done.replace(true) {
                    between(self);
                }
            };
            let lifted = || {
                let lifted = self.signalled.resumes();
                then();
                lifted
            };
            let paused = || {
                let paused = self.paused.get();
                then();
                paused
            };
            let (lifted, paused) = observe(lifted, paused);
            self.announced += usize::from(paused && self.pauses.is_another(lifted));
        }

        fn go_on(&self) {
            self.signalled.lift(|| self.paused.replace(false));
        }
    }

    #[test]
    fn a_pause_is_announced_once_whenever_it_is_lifted() {
        let signalled = Signalled::without_signals();
        let paused = Cell::new(true);
        let mut looked = Looked { signalled, paused, pauses: Pauses::default(), announced: 0 };
        let nothing = |_: &Looked| {};
        looked.look(nothing);
        looked.look(nothing);
        assert_eq!(looked.announced, 1);
        // It is lifted in the midst of a look, and asked to be once more.
        looked.look(|looked| {
            looked.go_on();
            looked.go_on();
        });
        assert_eq!((looked.announced, looked.signalled.resumes()), (1, 1));
        // The next one is another, and is looked at in the midst of being lifted.
        looked.paused.set(true);
        looked.look(nothing);
        assert_eq!(looked.announced, 2);
        looked.signalled.clone().lift(|| {
            looked.look(nothing);
            looked.paused.set(false);
            looked.look(nothing);
            true
        });
        assert_eq!(looked.announced, 2);
        looked.paused.set(true);
        looked.look(nothing);
        assert_eq!(looked.announced, 3);
    }
}
