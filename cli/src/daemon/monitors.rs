//! The loop of the control thread: clients of QMP, what other threads tell, and signals.
//!
//! # Model
//! One `poll` over the listening socket, the clients, the mailbox and the pipe of signals. A client is a [`Session`] with a socket that
//! never blocks. Whatever has happened goes to all clients as events before the next command is carried out, and the events of a command
//! go out before its reply, as with QEMU. A client whose command waits for a path ([`Carried::UnderWay`]) has its reply later, and its next command is
//! taken after that; the others go on.
//!
//! # Bounds
//! [`MAX_MONITORS`] clients; whoever comes after waits to be accepted, as everybody does for a moment ([`ACCEPT_PAUSE`]) when the host has no
//! descriptor for him. One that does not read is not listened to, and given up when too many events wait for it ([`Session`]). A client is served
//! a bounded number of commands in turn, and none after one that has waited to take hold. What they have sent half and left unread takes
//! [`OWN_BYTES`] of memory each, and [`SHARED_BYTES`] of all together beyond that: where it is more, who has most is given up. A reply that is being
//! made comes on top of that, one at a time.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::Signals;
use super::control::Control;
use super::errands::{Carried, ErrandSerial};
use crate::out;
use crate::qmp::session::{MAX_EVENTS, MAX_INPUT, MAX_REPLY, Request, Session};

/// Most clients at a time.
pub(crate) const MAX_MONITORS: usize = 32;
/// Most commands of a client before the next has its turn.
const TURN: usize = 64;
/// Bytes of memory that each client may have.
const OWN_BYTES: usize = 1 << 20;
/// Bytes of memory that all clients may have together beyond that: room for the largest reply, with what comes behind it.
const SHARED_BYTES: usize = 48 << 20;
const _: () = assert!(2 * (MAX_REPLY + MAX_EVENTS) <= SHARED_BYTES);
/// Pause after an accept that failed: what the host lacks does not come back at once, and the listener stays readable.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long clients may take at the end to read what is waiting for them.
const FAREWELL: Duration = Duration::from_secs(1);

struct Monitor {
    number: u64,
    stream: UnixStream,
    session: Session,
    /// The command that is under way, with its errand.
    awaits: Option<(ErrandSerial, Request)>,
    /// It sends no more; what it sent is still answered.
    ended: bool,
    gone: bool,
}

/// See the module's header.
pub(super) struct Monitors<'a> {
    listener: Option<&'a UnixListener>,
    signals: &'a Signals,
    list: Vec<Monitor>,
    next: u64,
    /// Nobody is accepted before; set while accepting fails.
    deaf_until: Option<Instant>,
}

impl<'a> Monitors<'a> {
    pub(super) fn new(listener: Option<&'a UnixListener>, signals: &'a Signals) -> io::Result<Self> {
        if let Some(listener) = listener {
            listener.set_nonblocking(true)?;
        }
        Ok(Self { listener, signals, list: Vec::new(), next: 0, deaf_until: None })
    }

    /// Serve until a client or a signal ends the daemon, or the engine has died ([`Control::death`]).
    pub(super) fn run(&mut self, control: &mut Control) -> io::Result<()> {
        loop {
            if let Some(why) = control.death() {
                out::complain(format_args!(
                    "the engine has died: {why}; jobs have failed and no disk is served any more: start the daemon again"
                ));
                super::notify::notify(super::notify::STOPPING);
                control.quit();
            }
            if control.is_quitting() {
                break;
            }
            let ready = self.wait(control)?;
            if ready.signalled {
                self.signals.heard();
                let what = match (control.jobs.running().is_empty(), control.errands.is_empty()) {
                    (false, _) => ": cancelling jobs",
                    (true, false) => ": waiting for paths that are being opened",
                    (true, true) => "",
                };
                out::say(format_args!("ending{what}; a second signal ends at once"));
                super::notify::notify(super::notify::STOPPING);
                control.quit();
            }
            control.look_into_mailbox();
            self.broadcast(control);
            if ready.accept {
                self.accept();
            }
            for at in 0..self.list.len() {
                let monitor = &mut self.list[at];
                match ready.monitors.get(at) {
                    // Nobody is there to be told, and it would be seen again and again until then.
                    Some(Sign::Hung) if monitor.awaits.is_some() => monitor.gone = true,
                    Some(Sign::Something | Sign::Hung) => monitor.receive(),
                    Some(Sign::Nothing) | None => {}
                }
                self.serve(at, control);
                self.curb();
            }
            self.list.iter_mut().for_each(Monitor::send);
            self.list.retain(|monitor| !monitor.gone);
        }
        self.say_farewell(control);
        Ok(())
    }

    /// Carry out what a client has asked for.
    fn serve(&mut self, at: usize, control: &mut Control) {
        for _ in 0..TURN {
            if control.is_quitting() || self.list[at].awaits.is_some() || self.list[at].gone {
                return;
            }
            let Some(request) = self.list[at].session.next_request() else { return };
            if request.name == "quit" {
                super::notify::notify(super::notify::STOPPING);
            }
            let result = match control.execute(&request.name, &request.arguments) {
                Ok(Carried::UnderWay(errand)) => {
                    self.list[at].awaits = Some((errand, request));
                    return self.broadcast(control);
                }
                Ok(Carried::Out(value)) => Ok(value),
                Err(error) => Err(error),
            };
            self.broadcast(control);
            self.list[at].session.answer(&request, result);
            if control.has_waited() {
                return;
            }
        }
    }

    /// Tell all clients what has happened, then those who wait for it what their commands came to.
    fn broadcast(&mut self, control: &mut Control) {
        for event in control.take_events() {
            for monitor in &mut self.list {
                monitor.session.event(&event);
            }
        }
        for (errand, result) in control.errands.take_finished() {
            let waits =
                |monitor: &&mut Monitor| monitor.awaits.as_ref().is_some_and(|(own, _)| *own == errand);
            // Who has left meanwhile is not told.
            let Some(monitor) = self.list.iter_mut().find(waits) else { continue };
            let (_, request) = monitor.awaits.take().expect("it waits");
            monitor.session.answer(&request, result);
        }
        for monitor in self.list.iter_mut().filter(|monitor| monitor.session.is_overrun() && !monitor.gone) {
            out::say(format_args!("QMP client {} does not read its events: disconnected", monitor.number));
            monitor.gone = true;
        }
    }

    /// See that the memory of all stays within its bounds.
    fn curb(&mut self) {
        let beyond = |monitor: &Monitor| monitor.session.heap_bytes().saturating_sub(OWN_BYTES);
        while self.list.iter().map(beyond).sum::<usize>() > SHARED_BYTES {
            let greediest =
                self.list.iter_mut().max_by_key(|monitor| beyond(monitor)).expect("somebody has it");
            let number = greediest.number;
            out::say(format_args!(
                "QMP client {number} leaves too much unread, or its commands half: disconnected"
            ));
            greediest.session.give_up();
            greediest.gone = true;
        }
    }

    fn accept(&mut self) {
        let Some(listener) = self.listener else { return };
        while self.list.len() < MAX_MONITORS {
            let stream = match listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.deaf_until = None;
                    return;
                }
                Err(error) => return self.be_deaf(&error),
            };
            self.deaf_until = None;
            if let Err(error) = stream.set_nonblocking(true) {
                out::say(format_args!("cannot serve a QMP client: {}", crate::out::reason(&error)));
                continue;
            }
            self.next += 1;
            let (number, session) = (self.next, Session::new());
            self.list.push(Monitor { number, stream, session, awaits: None, ended: false, gone: false });
        }
    }

    /// Accepting has failed: leave it for a while. Told once until it succeeds again.
    fn be_deaf(&mut self, error: &io::Error) {
        if self.deaf_until.replace(Instant::now() + ACCEPT_PAUSE).is_none() {
            let why = crate::out::reason(error);
            out::say(format_args!("cannot accept a QMP client: {why}; who comes waits until that is over"));
        }
    }

    fn wait(&self, control: &Control) -> io::Result<Ready> {
        let mut fds: Vec<PollFd<'_>> = vec![
            PollFd::new(self.signals.pipe.as_fd(), PollFlags::POLLIN),
            PollFd::new(control.mailbox.wake(), PollFlags::POLLIN),
        ];
        fds.extend(self.list.iter().map(Monitor::poll_fd));
        let monitors = self.list.len();
        let pause = self.deaf_until.map(|until| until.saturating_duration_since(Instant::now()));
        let pause = pause.filter(|pause| !pause.is_zero());
        let accepts = self.listener.filter(|_| monitors < MAX_MONITORS && pause.is_none());
        fds.extend(accepts.map(|listener| PollFd::new(listener.as_fd(), PollFlags::POLLIN)));
        let busy = self.list.iter().any(Monitor::has_work);
        let timeout = match pause {
            _ if busy => PollTimeout::ZERO,
            // Rounded down to milliseconds, and the last part of one would be none.
            Some(pause) => {
                PollTimeout::try_from(pause + Duration::from_millis(1)).unwrap_or(PollTimeout::ZERO)
            }
            None => PollTimeout::NONE,
        };
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let ready = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
        let sign = |fd: &PollFd<'_>| match fd.revents() {
            Some(events) if events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR) => Sign::Hung,
            _ if ready(fd) => Sign::Something,
            _ => Sign::Nothing,
        };
        Ok(Ready {
            signalled: ready(&fds[0]),
            monitors: fds[2..2 + monitors].iter().map(sign).collect(),
            accept: accepts.is_some() && fds.last().is_some_and(ready),
        })
    }

    /// Send what is waiting, for a while.
    fn say_farewell(&mut self, control: &mut Control) {
        self.broadcast(control);
        let deadline = Instant::now() + FAREWELL;
        loop {
            self.list.iter_mut().for_each(Monitor::send);
            self.list.retain(|monitor| !monitor.gone && !monitor.session.output().is_empty());
            let left = deadline.saturating_duration_since(Instant::now());
            if self.list.is_empty() || left.is_zero() {
                return;
            }
            let mut fds: Vec<PollFd<'_>> =
                self.list.iter().map(|monitor| PollFd::new(monitor.fd(), PollFlags::POLLOUT)).collect();
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
            if !matches!(poll(&mut fds, timeout), Ok(_) | Err(Errno::EINTR)) {
                return;
            }
        }
    }
}

struct Ready {
    signalled: bool,
    /// For each client.
    monitors: Vec<Sign>,
    accept: bool,
}

/// What is to be seen of a client.
enum Sign {
    Nothing,
    /// It has sent something, or reads.
    Something,
    /// It has closed its end altogether.
    Hung,
}

impl Monitor {
    fn fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// Whether a command could be carried out without hearing more from it.
    fn has_work(&self) -> bool {
        self.awaits.is_none() && self.session.has_input() && self.session.takes_requests()
    }

    fn poll_fd(&self) -> PollFd<'_> {
        let mut events = PollFlags::empty();
        if self.session.wants_input() && !self.ended {
            events |= PollFlags::POLLIN;
        }
        if !self.session.output().is_empty() {
            events |= PollFlags::POLLOUT;
        }
        PollFd::new(self.fd(), events)
    }

    fn receive(&mut self) {
        if self.ended || !self.session.wants_input() {
            return;
        }
        let mut buffer = [0; MAX_INPUT];
        match self.stream.read(&mut buffer) {
            Ok(0) => self.ended = true,
            Ok(bytes) => self.session.receive(&buffer[..bytes]),
            Err(error) if is_transient(&error) => {}
            Err(_) => self.gone = true,
        }
    }

    fn send(&mut self) {
        while !self.gone && !self.session.output().is_empty() {
            match self.stream.write(self.session.output()) {
                Ok(bytes) => self.session.sent(bytes),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if is_transient(&error) => return,
                // It has hung up: nobody is there to tell.
                Err(_) => self.gone = true,
            }
        }
        if self.ended && self.awaits.is_none() && !self.has_work() {
            self.gone = true;
        }
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests {
    use engine::live::{Engine, EngineOptions};
    use serde_json::json;

    use super::super::engine_exports::EngineExports;
    use super::*;

    fn monitor(number: u64) -> Monitor {
        let (stream, _) = UnixStream::pair().expect("a pair");
        let mut session = Session::new();
        session.receive(br#"{"execute":"qmp_capabilities"}"#);
        assert_eq!(session.next_request(), None);
        Monitor { number, stream, session, awaits: None, ended: false, gone: false }
    }

    /// It has asked for something, and leaves so many bytes of the reply unread.
    fn ask(monitor: &mut Monitor, bytes: usize) {
        monitor.session.receive(br#"{"execute":"x"}"#);
        let request = monitor.session.next_request().expect("one");
        monitor.session.answer(&request, Ok(json!("x".repeat(bytes))));
    }

    #[test]
    fn a_client_that_does_not_read_its_events_is_disconnected() {
        let engine = Engine::start(&EngineOptions::default()).expect("an engine");
        let exports = Box::new(EngineExports::new(engine.clone()));
        let mut control = Control::new(engine, exports, 1).expect("a control");
        let (signals, _write) = Signals::unsignalled().expect("a pipe");
        let mut monitors = Monitors::new(None, &signals).expect("monitors");
        monitors.list = vec![monitor(0), monitor(1)];
        let gone = |monitors: &Monitors<'_>| -> Vec<bool> {
            monitors.list.iter().map(|monitor| monitor.gone).collect()
        };
        let event = json!({ "event": "x".repeat(1 << 20) });
        // All but what is one too many.
        (1..MAX_EVENTS >> 20).for_each(|_| monitors.list[1].session.event(&event));
        monitors.broadcast(&mut control);
        assert_eq!(gone(&monitors), [false, false]);
        monitors.list[1].session.event(&event);
        assert!(monitors.list[1].session.is_overrun());
        monitors.broadcast(&mut control);
        assert_eq!(gone(&monitors), [false, true], "and nobody else");
    }

    #[test]
    fn clients_together_take_bounded_memory() {
        let (signals, _write) = Signals::unsignalled().expect("a pipe");
        let mut monitors = Monitors::new(None, &signals).expect("monitors");
        monitors.list = (0..).take(MAX_MONITORS).map(monitor).collect();
        let total = |monitors: &Monitors<'_>| -> usize {
            monitors.list.iter().map(|monitor| monitor.session.heap_bytes()).sum()
        };
        let gone = |monitors: &Monitors<'_>| -> Vec<u64> {
            monitors.list.iter().filter(|monitor| monitor.gone).map(|monitor| monitor.number).collect()
        };
        // What is usual takes nothing of what they share.
        monitors.list.iter_mut().for_each(|monitor| ask(monitor, 200 << 10));
        monitors.curb();
        assert!(gone(&monitors).is_empty());
        // The largest reply, and as many events as wait for anybody.
        ask(&mut monitors.list[3], MAX_REPLY - 100);
        let event = json!({ "event": "x".repeat(1000) });
        (0..MAX_EVENTS / 1100).for_each(|_| monitors.list[3].session.event(&event));
        monitors.curb();
        assert!(gone(&monitors).is_empty());
        // Half a message, in many tokens.
        for number in 5..MAX_MONITORS {
            monitors.list[number].session.receive(format!("[{}", "1,".repeat(16_000)).as_bytes());
            assert_eq!(monitors.list[number].session.next_request(), None);
        }
        monitors.curb();
        assert!(total(&monitors) <= MAX_MONITORS * OWN_BYTES + SHARED_BYTES, "{}", total(&monitors));
        ask(&mut monitors.list[4], MAX_REPLY - 100);
        monitors.curb();
        assert_eq!(gone(&monitors), [3], "who has most");
        assert!(total(&monitors) <= MAX_MONITORS * OWN_BYTES + SHARED_BYTES, "{}", total(&monitors));
    }
}
