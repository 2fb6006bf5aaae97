//! `daemon`: disks for guests, control by QMP.
//!
//! | module | its idea |
//! |---|---|
//! | `control` | What the daemon knows and does: one thread, one command after the other. |
//! | `nodes`, `doors` | The disks by name, and who uses them; their paths, and their ways into the engine. |
//! | `backup`, `starting`, `jobs`, `report` | Jobs: what is asked for, how they begin, what clients know of them, how they ended. |
//! | `errands` | What is under way in threads of its own, since it touches paths. |
//! | `serving`, `exports` | The NBD server, and the seam to the engine's. |
//! | `monitors` | The loop: clients, signals, and what other threads tell. |
//! | `mailbox` | What other threads tell. |
//! | `listen`, `notify` | Sockets; the service manager. |
//! | `same` | Disks of the command line that are one and the same, or share bytes. |
//!
//! The ring thread is the engine's. The control thread waits for it where a command needs its answer, never the other way round. If it dies, nothing is
//! left to serve: the control thread is told, tells clients how their jobs ended, and the daemon ends as one that has failed.

mod backup;
mod control;
mod doors;
mod engine_exports;
mod errands;
pub(crate) mod exports;
mod jobs;
pub(crate) mod listen;
mod mailbox;
mod monitors;
mod nodes;
mod notify;
mod report;
mod same;
mod serving;
mod starting;
#[cfg(test)]
mod tests;

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use engine::error::Error;
use engine::live::{Engine, EngineEnd, EngineOptions};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use serde_json::json;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::flag;

use crate::args::DaemonArgs;
use crate::out;
use crate::report::{DONE, FAILED, REFUSED, exit_code};
use crate::signals::is_ignored;
use control::Control;
use engine_exports::EngineExports;
use exports::NbdOptions;
use listen::{Endpoint, Listener, activated, listen, listen_unix};
use mailbox::{Happening, Post};
pub(crate) use monitors::MAX_MONITORS;
use monitors::Monitors;
use nodes::NodeOptions;
pub(crate) use serving::MAX_CONNECTIONS;

/// Why the daemon did not start.
enum NotStarted {
    /// Refused by the engine.
    Engine(Error),
    /// The command line makes no sense.
    Usage(&'static str),
    /// Anything else, in one line.
    Refused(String),
}

impl From<String> for NotStarted {
    fn from(reason: String) -> Self {
        Self::Refused(reason)
    }
}

impl From<Error> for NotStarted {
    fn from(error: Error) -> Self {
        Self::Engine(error)
    }
}

/// Carry out `daemon`; gives the exit code. `command_line` is how the program was called.
pub(crate) fn run(args: &DaemonArgs, command_line: &[String]) -> u8 {
    match serve(args) {
        Ok(code) => code,
        Err(NotStarted::Engine(error)) => {
            out::say(&error);
            exit_code(&error)
        }
        Err(NotStarted::Usage(mistake)) => crate::usage::refuse(mistake, command_line),
        Err(NotStarted::Refused(reason)) => {
            out::say(reason);
            REFUSED
        }
    }
}

/// Serve to the end; gives the exit code.
fn serve(args: &DaemonArgs) -> Result<u8, NotStarted> {
    // First of all: what is handed over has a number that others might take.
    let handed_over = activated()?;
    let signals =
        Signals::install().map_err(|error| format!("cannot take signals: {}", crate::out::reason(&error)))?;
    if let (Some(qmp), Some(Endpoint::Unix(nbd))) = (&args.qmp, &args.nbd)
        && qmp == nbd
    {
        let mistake = "--qmp and --nbd are the same socket; give each a path of its own";
        return Err(NotStarted::Usage(mistake));
    }
    let listens = args.nbd.is_some() != handed_over.is_some();
    if listens && args.qmp.is_none() && args.disks.is_empty() {
        let mistake = "there is nothing to serve, and no way to add anything: give --disk NAME=PATH, or --qmp unix:PATH";
        return Err(NotStarted::Usage(mistake));
    }
    same::refuse_same(&args.disks)?;
    let nbd = match (&args.nbd, handed_over) {
        (Some(endpoint), None) => {
            let bound = listen(endpoint)?;
            tell_port(endpoint, &bound.0);
            Some(bound)
        }
        (None, Some(listener)) => Some((listener, None)),
        (None, None) => None,
        (Some(endpoint), Some(_)) => {
            return Err(
                format!("{endpoint} and a socket that was handed over (LISTEN_FDS): choose one").into()
            );
        }
    };
    if args.qmp.is_none() && nbd.is_none() {
        let mistake = "there is no way in: give --qmp unix:PATH, --nbd, or a socket (LISTEN_FDS)";
        return Err(NotStarted::Usage(mistake));
    }
    let qmp = args.qmp.as_deref().map(listen_unix).transpose()?;
    let clients = args.max_connections as usize;
    allow_descriptors(clients);
    let options = EngineOptions { io_engine: args.io_engine(), memory: args.memory.0, clients };
    let engine = Engine::start(&options)?;
    if let Some(notice) = engine.notice() {
        out::say(notice);
    }
    let end = engine.end();
    let exports = Box::new(EngineExports::new(engine.clone()));
    let mut control = Control::new(engine, exports, args.max_connections)
        .map_err(|error| format!("cannot begin: {}", crate::out::reason(&error)))?;
    watch_over(&end, control.mailbox.post())
        .map_err(|error| format!("cannot begin: {}", crate::out::reason(&error)))?;
    set_up(args, &mut control, nbd)?;
    let listener = qmp.as_ref().map(|(listener, _)| listener);
    let mut monitors = Monitors::new(listener, &signals)
        .map_err(|error| format!("cannot listen: {}", crate::out::reason(&error)))?;
    notify::notify(notify::READY);
    let ran = monitors.run(&mut control);
    // However it ended, jobs and exports end in good order.
    control.quit();
    let died = control.death().is_some();
    drop((monitors, control));
    if !end.wait(END_PATIENCE) {
        out::say("the engine takes its time to end; disks may be locked for a moment longer");
    }
    if let Err(error) = &ran {
        out::complain(format_args!(
            "the control loop has failed: {}; start the daemon again",
            crate::out::reason(error)
        ));
    }
    Ok(if died || ran.is_err() { FAILED } else { DONE })
}

/// Have the control thread told if the engine dies. Nobody waits for the thread that does: it ends with the engine.
fn watch_over(end: &EngineEnd, post: Post) -> io::Result<()> {
    let end = end.clone();
    let watch = move || {
        if let Some(why) = end.wait_for_death() {
            post.send(Happening::EngineDied(why));
        }
    };
    thread::Builder::new().name("engine-watch".into()).spawn(watch).map(drop)
}

/// Whoever left the choice of the port to the system wants to know it.
fn tell_port(endpoint: &Endpoint, listener: &Listener) {
    if let (Endpoint::Tcp { port: 0, .. }, Listener::Tcp(listener)) = (endpoint, listener)
        && let Ok(address) = listener.local_addr()
    {
        out::say(format_args!("NBD is served on tcp:{address}"));
    }
}

/// Raise the soft limit on open files to what so many clients need, as far as the hard one lets us.
fn allow_descriptors(clients: usize) {
    let needed = (clients + RESERVED_DESCRIPTORS) as u64;
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return };
    if soft >= needed {
        return;
    }
    let raised = needed.min(hard);
    if setrlimit(Resource::RLIMIT_NOFILE, raised, hard).is_err() || raised < needed {
        out::say(format!(
            "{clients} connections need {needed} open files, of which {raised} are allowed (RLIMIT_NOFILE); raise the limit, or lower --max-connections"
        ));
    }
}

/// The disks of the command line, and the NBD server with an export for each.
fn set_up(
    args: &DaemonArgs,
    control: &mut Control,
    nbd: Option<(Listener, Option<listen::SocketFile>)>,
) -> Result<(), NotStarted> {
    let told = |what: &str, error: crate::qmp::QmpError| NotStarted::Refused(format!("{what}: {error}"));
    for disk in &args.disks {
        // Nobody is there yet to be kept waiting, and a second signal ends this.
        let options = NodeOptions::of_path(&disk.name, &disk.path);
        let added = options.and_then(|options| control.nodes.open_and_add(&options));
        added.map_err(|error| told(&format!("--disk {}={}", disk.name, disk.path), error))?;
    }
    let Some((listener, file)) = nbd else { return Ok(()) };
    // A client that does not ask for a name means the only disk that there is.
    let default_export = match &args.disks[..] {
        [disk] => Some(disk.name.clone()),
        _ => None,
    };
    let post = control.mailbox.post();
    let options = NbdOptions { max_connections: args.max_connections, default_export, post };
    control.serving.start(listener, file, &options).map_err(|error| told("--nbd", error))?;
    for disk in &args.disks {
        let writable = !control.nodes.is_read_only(&disk.name).unwrap_or(true);
        if !writable {
            let (name, path) = (&disk.name, &disk.path);
            out::say(format!(
                "--disk {name}={path} cannot be opened for writing, so guests may only read it; \
                 see its permissions, and whether its device or file system is read-only"
            ));
        }
        let export = json!({ "type": "nbd", "id": disk.name, "node-name": disk.name, "writable": writable });
        let added = control.add_export(export.as_object().expect("an object"));
        let added = added.and_then(|carried| control.finish(carried));
        added.map_err(|error| told(&format!("--disk {}={}", disk.name, disk.path), error))?;
    }
    // Clients may be waiting already: whoever had the socket handed over, or saw it appear.
    control.serving.open().map_err(|error| told("--nbd", error))
}

/// How long the engine may take to let go of the disks.
const END_PATIENCE: Duration = Duration::from_secs(2);

/// Open files besides those of clients: disks and targets, twice each, monitors, and the engine's own.
const RESERVED_DESCRIPTORS: usize = 512;

/// Signals within this time after the first one count as the same request.
const SAME_SIGNAL: Duration = Duration::from_millis(200);

/// The first signal that asks for the end makes a pipe readable; a second one, a while later, ends the process inside the signal handler.
///
/// A thread of its own arms the second one: the control thread may be where nothing answers, with a disk of the command line on a server that is gone.
/// It alone hears signals: a thread that waits for a path could be the one that the system chooses, and would not get to it.
struct Signals {
    pipe: UnixStream,
    heard: Arc<AtomicBool>,
}

impl Signals {
    fn install() -> io::Result<Self> {
        let (signals, mut write) = Self::unsignalled()?;
        let armed = Arc::new(AtomicBool::new(false));
        let mut ending = vec![SIGINT, SIGTERM];
        if !is_ignored(SIGHUP) {
            ending.push(SIGHUP);
        }
        for &signal in &ending {
            flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&armed))?;
        }
        flag::register(SIGXFSZ, Arc::default())?;
        let alone: SigSet = ending.iter().filter_map(|&signal| Signal::try_from(signal).ok()).collect();
        let mut coming = signal_hook::iterator::Signals::new(ending)?;
        // Threads that are started from here on inherit it.
        alone.thread_block()?;
        let heard = Arc::clone(&signals.heard);
        thread::Builder::new().name("signals".into()).spawn(move || {
            alone.thread_unblock().expect("they were blocked in the same way");
            if coming.forever().next().is_none() {
                return;
            }
            // It fails only where nobody listens any more.
            write.write_all(&[0]).ok();
            thread::sleep(SAME_SIGNAL);
            // Before anything is said: standard error may be stuck, too.
            armed.store(true, Ordering::SeqCst);
            if !heard.load(Ordering::SeqCst) {
                out::say("ending has to wait for what is under way; a second signal ends at once");
            }
            // For the second one.
            loop {
                thread::park();
            }
        })?;
        Ok(signals)
    }

    /// The pipe alone, and what makes it readable.
    fn unsignalled() -> io::Result<(Self, UnixStream)> {
        let (pipe, write) = UnixStream::pair()?;
        Ok((Self { pipe, heard: Arc::default() }, write))
    }

    /// The control thread knows.
    fn heard(&self) {
        self.heard.store(true, Ordering::SeqCst);
    }
}
