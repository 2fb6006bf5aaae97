//! Copies with a map that are killed at random times, again and again, and brought to their end.
//!
//! Eight kills by default. More, and the same again: `KILL_ROUNDS=200 KILL_SEED=1 cargo test -p engine-cli --test faults kills -- --nocapture`.
//!
//! Copies are slowed down so that kills fall before, between and behind checkpoints (5 s apart), and several run at a time. What is
//! checked: every result equals the source; no run does again more than the last checkpoint interval, that is, what the
//! killed run had told as done [`INTERVAL`] and some [`SLACK`] before its death (twice that with `--verify`) is not copied again.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use fastrand::Rng;
use serde_json::Value;

use crate::kernel::{LoopDevice, is_root};
use crate::support::{Running, code, directory, run_in, stderr, stdout};
use crate::{KIB, MIB};

/// Longest time between two checkpoints.
const INTERVAL: f64 = 5.0;
/// What the flush, the map and a busy machine may take on top.
const SLACK: f64 = 2.5;
/// Time that a whole copy takes.
const SECONDS: usize = 12;
/// Copies at a time.
const LANES: usize = 8;

/// What became of the kills.
#[derive(Debug, Default)]
struct Seen {
    kills: u32,
    copies: u32,
    /// The run had ended before it was killed.
    too_late: u32,
    /// Killed after the target was created and before the first map, and the next run did not take it over: must not happen.
    before_the_map: u32,
    /// Killed after the map was removed: the copy is complete.
    after_the_map: u32,
    /// Runs that went on from a checkpoint with something in it.
    went_on: u32,
    /// Most bytes told as done that a next run did again.
    most_again: u64,
}

/// One copy: what is copied and how.
struct Case {
    place: PathBuf,
    options: Vec<String>,
    target: String,
    /// Where the target's bytes are found.
    result: PathBuf,
    length: usize,
    speed: String,
    _device: Option<LoopDevice>,
}

impl Case {
    fn random(place: &Path, rng: &mut Rng, devices: bool) -> Self {
        let length = rng.usize(8 * MIB..24 * MIB);
        let sparse = rng.bool();
        let data = make_source(&place.join("a"), length, sparse, rng);
        let cluster = (4 * KIB) << rng.u32(0..9);
        let mut options = vec!["--cluster-size".to_owned(), cluster.to_string()];
        if rng.bool() {
            options.push("--verify".to_owned());
        }
        if rng.u8(0..4) == 0 {
            options.extend(["--io-engine".to_owned(), "threads".to_owned()]);
        }
        let device = (devices && rng.bool()).then(|| {
            let beyond = if rng.bool() { 0 } else { 70_000 };
            fs::write(place.join("disk"), vec![0xee; (length + beyond).next_multiple_of(512)])
                .expect("written");
            LoopDevice::over(&place.join("disk"))
        });
        let (target, result) = match &device {
            Some(device) => (device.text().to_owned(), place.join("disk")),
            None => ("b".to_owned(), place.join("b")),
        };
        let speed = (data / SECONDS).max(64 * KIB).to_string();
        Self { place: place.to_owned(), options, target, result, length, speed, _device: device }
    }

    fn arguments<'a>(&'a self, more: &[&'a str]) -> Vec<&'a str> {
        let mut arguments = vec!["copy", "--map", "m", "--progress", "json", "--json"];
        arguments.extend(self.options.iter().map(String::as_str));
        arguments.extend(more);
        arguments.extend(["a", &self.target]);
        arguments
    }

    /// The result is the source, and beyond it nothing was touched.
    fn check(&self) {
        let (mut expected, found) =
            (fs::read(self.place.join("a")).expect("read"), fs::read(&self.result).expect("read"));
        if self.target != "b" {
            expected.resize(found.len(), 0xee);
        }
        assert_eq!(found.len(), expected.len());
        let at = found.iter().zip(&expected).position(|(found, expected)| found != expected);
        assert_eq!(at, None, "{:?} of {} bytes differs", self.options, self.length);
    }
}

/// Random bytes, in pieces with holes between them if `sparse`; gives how many bytes of data there are.
fn make_source(path: &Path, length: usize, sparse: bool, rng: &mut Rng) -> usize {
    let file = File::create(path).expect("created");
    file.set_len(length as u64).expect("set");
    let (mut at, mut data) = (0, 0);
    while at < length {
        let piece = if sparse { rng.usize(1..MIB) } else { MIB }.min(length - at);
        let bytes: Vec<u8> = std::iter::repeat_with(|| rng.u8(..)).take(piece).collect();
        file.write_all_at(&bytes, at as u64).expect("written");
        data += piece;
        at += piece + if sparse { rng.usize(1..MIB) } else { 0 };
    }
    data
}

/// What the killed run had told: pairs of seconds and bytes done.
fn told(lines: &[String]) -> Vec<(f64, u64)> {
    lines
        .iter()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter_map(|value| Some((value["seconds"].as_f64()?, value["done"].as_u64()?)))
        .collect()
}

/// What the map must hold after a run that told this. What is read back first goes at the same speed, so it takes as long again.
fn promised(told: &[(f64, u64)], verify: bool) -> u64 {
    let interval = if verify { 2.0 * INTERVAL } else { INTERVAL };
    let Some(&(end, _)) = told.last() else { return 0 };
    told.iter()
        .filter(|(seconds, _)| seconds + interval + SLACK <= end)
        .map(|&(_, done)| done)
        .max()
        .unwrap_or(0)
}

/// Kill one copy until there were `rounds` kills or it has had its share, then let it end.
fn one_copy(rng: &mut Rng, rounds: u32, seen: &Mutex<Seen>, devices: bool) {
    let there = directory();
    let case = Case::random(there.path(), rng, devices);
    seen.lock().expect("sound").copies += 1;
    let (mut promise, mut force, mut last_told) = (0, false, 0);
    let kills = rng.u32(2..6);
    for round in 0..=kills {
        let last = round == kills || seen.lock().expect("sound").kills >= rounds;
        let force_option: &[&str] = if force { &["--force"] } else { &[] };
        if last {
            let output = run_in(&case.place, &case.arguments(force_option));
            let exists = code(&output) == 2 && stderr(&output).contains("it exists already");
            if exists && !case.place.join("m").exists() {
                if ended_equal(&case) {
                    seen.lock().expect("sound").after_the_map += 1;
                } else {
                    seen.lock().expect("sound").before_the_map += 1;
                    let output = run_in(&case.place, &case.arguments(&["--force"]));
                    assert_eq!(code(&output), 0, "{}", stderr(&output));
                }
            } else {
                assert_eq!(code(&output), 0, "{:?}: {}", case.options, stderr(&output));
                let object: Value = serde_json::from_str(&stdout(&output)).expect("JSON");
                account(&object, promise, last_told, seen);
            }
            case.check();
            assert!(!case.place.join("m").exists());
            return;
        }
        // A third of the kills fall into the first moments, where files and maps come into being.
        let after = if rng.u8(0..3) == 0 { rng.u64(0..200) } else { rng.u64(200..11_000) };
        let running = Running::program(
            &case.place,
            &case.arguments(&[&["--speed", &case.speed], force_option].concat()),
        );
        thread::sleep(Duration::from_millis(after));
        let (killed, lines) = running.kill();
        let refused = lines.iter().any(|line| line.contains("it exists already"));
        let mut now = seen.lock().expect("sound");
        if !killed && refused {
            // The window between the target's creation and the first map, or a copy that was complete already.
            force = true;
            drop(now);
            if ended_equal(&case) {
                seen.lock().expect("sound").after_the_map += 1;
            } else {
                seen.lock().expect("sound").before_the_map += 1;
            }
            (promise, last_told) = (0, 0);
            continue;
        }
        if !killed {
            assert!(lines.iter().any(|line| line.contains("\"final\":true")), "ended by itself: {lines:?}");
            assert!(lines.iter().any(|line| line.contains("copied ")), "ended well: {lines:?}");
            now.too_late += 1;
            drop(now);
            case.check();
            return;
        }
        now.kills += 1;
        drop(now);
        force = false;
        let told = told(&lines);
        let first = lines.iter().find_map(|line| serde_json::from_str::<Value>(line).ok());
        if let Some(first) = first {
            account(&first, promise, last_told, seen);
        }
        promise = promise.max(promised(&told, case.options.iter().any(|option| option == "--verify")));
        last_told = told.last().map_or(last_told, |&(_, done)| done);
        if promise > 0 && !case.place.join("m").exists() {
            // Killed behind the end: there is nothing to go on with.
            assert!(ended_equal(&case), "the map goes when the copy is complete");
            seen.lock().expect("sound").after_the_map += 1;
            (promise, last_told) = (0, 0);
        }
    }
}

/// Check what a run went on from against what was promised, and note what it does again.
fn account(run: &Value, promise: u64, last_told: u64, seen: &Mutex<Seen>) {
    let resumed = run["resumed"].as_u64().expect("a number");
    assert!(
        resumed >= promise,
        "{promise} bytes were done a checkpoint ago, {resumed} are not done again: {run}"
    );
    let mut seen = seen.lock().expect("sound");
    seen.went_on += u32::from(resumed > 0);
    seen.most_again = seen.most_again.max(last_told.saturating_sub(resumed));
}

fn ended_equal(case: &Case) -> bool {
    let found = fs::read(&case.result).expect("read");
    found.get(..case.length).is_some_and(|found| found == fs::read(case.place.join("a")).expect("read"))
}

#[test]
fn killed_at_random_times_every_copy_comes_to_its_end() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse().expect("a whole number"));
    let rounds: u64 = number("KILL_ROUNDS").unwrap_or(8);
    let seed: u64 = number("KILL_SEED").unwrap_or_else(|| fastrand::u64(0..1 << 32));
    println!("KILL_ROUNDS={rounds} KILL_SEED={seed}");
    let devices = is_root();
    let rounds = u32::try_from(rounds).expect("not that many");
    let seen = Mutex::new(Seen::default());
    thread::scope(|scope| {
        for lane in 0..LANES as u64 {
            let seen = &seen;
            scope.spawn(move || {
                let mut rng = Rng::with_seed(seed ^ lane << 32);
                while seen.lock().expect("sound").kills < rounds {
                    one_copy(&mut rng, rounds, seen, devices);
                }
            });
        }
    });
    let seen = seen.into_inner().expect("sound");
    println!("{seen:#?}");
    assert_eq!(seen.before_the_map, 0, "{seen:?}");
    assert!(seen.kills >= rounds, "{seen:?}");
}
