//! `compare`: run the engine's comparison beside the progress display.

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
    let watch = Watch::default();
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

fn open_and_follow(
    args: &CompareArgs,
    watch: &Watch,
    signalled: &Signalled,
    logging: bool,
) -> Result<Comparison, Error> {
    let (a, b) = (open(&args.a, args.force_share)?, open(&args.b, args.force_share)?);
    let (storage_a, storage_b) = (a.storage(), b.storage());
    let mut meter = Meter::new(args.output.progress, logging);
    let start = Instant::now();
    let (sender, receiver) = mpsc::channel();
    let found = thread::scope(|scope| {
        scope.spawn(move || {
            // Nobody has left: the receiver below waits for this.
            sender.send(compare(storage_a.as_ref(), storage_b.as_ref(), watch)).ok();
        });
        loop {
            match receiver.recv_timeout(TICK) {
                Ok(found) => return found,
                Err(RecvTimeoutError::Timeout) => {
                    meter.update(&snapshot("running", &counters(watch, start)));
                    if signalled.ending().is_some() {
                        watch.stop();
                    }
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Error::engine_died(args.a.as_str(), "the comparison ended without a result"));
                }
            }
        }
    });
    let status = if found.is_ok() { "concluded" } else { "aborting" };
    meter.finish(Some(&snapshot(status, &counters(watch, start)).at_the_end()));
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
