//! `compare`: run the engine's comparison beside the progress display.

use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use engine::compare::{Comparison, Watch, compare};
use engine::error::{Error, Operation, Refusal};
use engine::storage::{Locator, OpenedSource, SourceOptions, open_source};

use crate::args::CompareArgs;
use crate::out;
use crate::progress::{Meter, Snapshot};
use crate::report::compare::{Counters, Ended};
use crate::report::deliver;
use crate::report::units::average;
use crate::signals::Signalled;

/// How often progress is looked at.
const TICK: Duration = Duration::from_millis(100);

/// Carry out `compare`; gives the exit code.
pub(crate) fn run(args: &CompareArgs, logging: bool) -> u8 {
    let start = Instant::now();
    let watch = Arc::new(Watch::default());
    let (found, ending) = match Signalled::install() {
        Ok(signalled) => (open_and_follow(args, &watch, &signalled, logging), signalled.ending()),
        Err(error) => {
            let reason = out::reason(&error);
            (Err(Error::refused(Refusal::Unavailable, Operation::Inspect, args.a.as_str(), reason)), None)
        }
    };
    let ended = Ended { args, found: &found, ending, counters: counters(&watch, start) };
    ended.tell();
    let code = ended.exit_code();
    if args.output.json {
        return deliver(&ended.json(), code);
    }
    match ended.line().map(|line| out::print(format!("{line}\n").as_bytes())) {
        Some(Err(undelivered)) => {
            out::complain(undelivered);
            code.max(crate::report::FAILED)
        }
        _ => code,
    }
}

/// What the thread that compares tells.
enum Event {
    Opened,
    Found(Result<Comparison, Error>),
}

/// Opening may take its time, with a server that does not answer: it is done in the other thread as well. Nothing is changed by it, so a signal that comes
/// before its end is not waited for.
fn open_and_follow(
    args: &CompareArgs,
    watch: &Arc<Watch>,
    signalled: &Signalled,
    logging: bool,
) -> Result<Comparison, Error> {
    let (sender, receiver) = mpsc::channel();
    let (disks, force_share, watched) =
        ([args.a.clone(), args.b.clone()], args.force_share, Arc::clone(watch));
    let work = move || {
        let compared = open(&disks[0], force_share).and_then(|a| {
            let b = open(&disks[1], force_share)?;
            // Nobody listens any more where a signal came first.
            sender.send(Event::Opened).ok();
            compare(a.storage().as_ref(), b.storage().as_ref(), &watched)
        });
        sender.send(Event::Found(compared)).ok();
    };
    thread::Builder::new().name("compare".into()).spawn(work).map_err(|error| {
        let reason = "cannot start a thread";
        Error::refused(Refusal::Unavailable, Operation::Inspect, args.a.as_str(), reason).because(error)
    })?;
    let (mut start, mut meter) = (Instant::now(), None);
    let mut told_ending = false;
    let found = loop {
        match receiver.recv_timeout(TICK) {
            Ok(Event::Found(found)) => break found,
            Ok(Event::Opened) => {
                start = Instant::now();
                meter = Some(Meter::new(args.output.progress, logging));
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                break Err(Error::engine_died(args.a.as_str(), "the comparison ended without a result"));
            }
        }
        let ending = signalled.ending();
        let Some(meter) = &mut meter else {
            match ending {
                Some(_) => break Err(Error::cancelled(args.a.as_str())),
                None => continue,
            }
        };
        meter.update(&snapshot("running", &counters(watch, start)));
        if let Some(ending) = ending.filter(|_| !std::mem::replace(&mut told_ending, true)) {
            watch.stop();
            meter.say(format_args!("{}: ending; a second one ends at once", ending.name()));
        }
    };
    let status = if found.is_ok() { "concluded" } else { "aborting" };
    if let Some(meter) = meter {
        meter.finish(Some(&snapshot(status, &counters(watch, start)).at_the_end()));
    }
    found
}

fn open(text: &str, force_share: bool) -> Result<OpenedSource, Error> {
    let options = SourceOptions { force_share, ..SourceOptions::default() };
    // Neither of the two is a source.
    open_source(&Locator::parse(text)?, &options).map_err(|error| {
        if error.operation() == Operation::OpenSource { error.during(Operation::Open) } else { error }
    })
}

fn counters(watch: &Watch, start: Instant) -> Counters {
    Counters {
        total: watch.total(),
        settled: watch.settled(),
        holes: watch.holes(),
        elapsed: start.elapsed(),
    }
}

fn snapshot(status: &'static str, counters: &Counters) -> Snapshot {
    let rate = average(counters.settled, counters.elapsed);
    let left = counters.total.saturating_sub(counters.settled);
    let time_left = (rate > 0).then(|| Duration::from_secs_f64(left as f64 / rate as f64));
    Snapshot {
        total: counters.total,
        settled: counters.settled,
        holes: counters.holes,
        rate,
        time_left,
        counters: serde_json::json!({
            "status": status,
            "total": counters.total,
            "done": counters.settled,
            "holes": counters.holes,
            "rate": rate,
            "time_left": time_left.map(|left| left.as_secs_f64()),
            "seconds": counters.elapsed.as_secs_f64(),
        }),
        ..Snapshot::default()
    }
}
