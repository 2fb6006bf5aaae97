//! What commands have under way in threads of their own: the parts that touch paths.
//!
//! # Model
//! A path may not answer: its server is gone, or a program that should serve it hangs. Nobody can be called back from there. So the control thread sends
//! a thread of its own for each command that has to open something (an *errand*), goes on with other clients, and finishes the command when the thread is back
//! with what it [`Found`] ([`Control::on_back`]). Until then the command's client has no reply, and takes no other command. What an errand is about
//! to use counts as used meanwhile: ids, names of filters, disks as sources or targets.
//!
//! # Bounds
//! At most [`MAX_ERRANDS`] threads; more are refused, for a path that does not answer may keep its thread for ever. At the end of the daemon those that are not
//! back in time are left where they are.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;

use engine::live::{Backup, LiveDisk};
use serde_json::{Value, json};

use super::control::Control;
use super::doors::{Door, Opened};
use super::mailbox::{Happening, JobSerial};
use super::nodes::NodeOptions;
use super::starting::Start;
use crate::qmp::{Arguments, QmpError};

/// Most threads at a time.
pub(super) const MAX_ERRANDS: usize = 128;

/// Names an errand for as long as the daemon lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ErrandSerial(u64);

/// What a command comes to at first.
#[derive(Debug)]
pub(super) enum Carried {
    /// It is carried out.
    Out(Value),
    /// It will be when that errand is back.
    UnderWay(ErrandSerial),
}

/// What an errand is for.
pub(super) enum Purpose {
    /// `blockdev-add`: the bottom of the node.
    Node(NodeOptions),
    /// `block-export-add`: the disk of the node at the bottom, for which it is a reader, and the node, which has an export more meanwhile: names may
    /// mean other nodes else when it is back.
    Export { arguments: Arguments, bottom: String, node: String },
    /// Jobs: their disks and targets.
    Start(Start),
}

/// What an errand comes back with.
#[derive(Debug)]
pub(super) enum Found {
    /// For [`Purpose::Node`].
    Bottom(Opened),
    /// For [`Purpose::Export`].
    Disk(LiveDisk),
    /// For [`Purpose::Start`].
    Backups(Vec<Backup>),
}

/// See the module's header.
#[derive(Default)]
pub(super) struct Errands {
    list: Vec<(ErrandSerial, Purpose)>,
    next: u64,
    /// What commands came to whose errands are back, until they are told.
    finished: Vec<(ErrandSerial, Result<Value, QmpError>)>,
}

impl Errands {
    pub(super) fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// The starts of jobs among them, in order.
    pub(super) fn starts(&self) -> impl DoubleEndedIterator<Item = &Start> {
        self.list.iter().filter_map(|(_, purpose)| match purpose {
            Purpose::Start(start) => Some(start),
            Purpose::Node(_) | Purpose::Export { .. } => None,
        })
    }

    /// The start of the job `serial`.
    pub(super) fn start_of(&mut self, serial: JobSerial) -> Option<&mut Start> {
        self.list.iter_mut().find_map(|(_, purpose)| match purpose {
            Purpose::Start(start) if start.has(serial) => Some(start),
            _ => None,
        })
    }

    /// What commands came to since this was last asked.
    pub(super) fn take_finished(&mut self) -> Vec<(ErrandSerial, Result<Value, QmpError>)> {
        std::mem::take(&mut self.finished)
    }
}

impl Control {
    /// Send a thread off to do `work`. Where none is to be had, the errand is back at once, with an error.
    pub(super) fn send_off(
        &mut self,
        purpose: Purpose,
        work: impl FnOnce() -> Result<Found, QmpError> + Send + 'static,
    ) -> Carried {
        self.errands.next += 1;
        let serial = ErrandSerial(self.errands.next);
        let back = self.mailbox.post();
        let run = move || {
            // All that it holds is let go before it is back.
            let found = catch_unwind(AssertUnwindSafe(work));
            let found = found.unwrap_or_else(|_| Err(QmpError::generic("internal error: see the log")));
            back.send(Happening::Back(serial, Box::new(found)));
        };
        let sent = if self.errands.list.len() < MAX_ERRANDS {
            let sent = thread::Builder::new().name("paths".into()).spawn(run);
            sent.map(drop).map_err(|error| format!("cannot start a thread: {}", crate::out::reason(&error)))
        } else {
            Err(format!("{MAX_ERRANDS} commands wait for paths to be opened; see which do not answer"))
        };
        if let Err(why) = sent {
            let error = QmpError::generic(why);
            self.mailbox.post().send(Happening::Back(serial, Box::new(Err(error))));
        }
        self.errands.list.push((serial, purpose));
        Carried::UnderWay(serial)
    }

    /// An errand is back: finish its command.
    pub(super) fn on_back(&mut self, serial: ErrandSerial, found: Result<Found, QmpError>) {
        let Some(at) = self.errands.list.iter().position(|(other, _)| *other == serial) else { return };
        let (_, purpose) = self.errands.list.remove(at);
        let result = match (purpose, found) {
            (Purpose::Node(options), Ok(Found::Bottom(opened))) => self.nodes.add(&options, Some(opened)),
            (Purpose::Export { arguments, bottom, node }, found) => {
                let added = match found {
                    Ok(Found::Disk(disk)) => self.export(&arguments, Some((disk, bottom.as_str()))).map(drop),
                    found => found.map(drop),
                };
                self.nodes.count_export(&node, false);
                self.nodes.release(&bottom);
                added
            }
            (Purpose::Start(start), Ok(Found::Backups(backups))) => {
                self.started(start, backups);
                Ok(())
            }
            (Purpose::Start(start), found) => self.not_started(start, found.map(drop)),
            (Purpose::Node(_), found) => found.map(drop),
        };
        self.errands.finished.push((serial, result.map(|()| json!({}))));
    }

    /// `blockdev-add`.
    pub(super) fn add_node(&mut self, arguments: &Arguments) -> Result<Carried, QmpError> {
        let options = NodeOptions::of(arguments)?;
        self.nodes.may_add(&options)?;
        let Some(opening) = options.opening()? else {
            return self.nodes.add(&options, None).map(|()| Carried::Out(json!({})));
        };
        let work = move || opening.open().map(Found::Bottom);
        Ok(self.send_off(Purpose::Node(options), work))
    }

    /// Have the disk of the node `bottom`, over which `node` is, opened by way of `door`, before `block-export-add` is carried out.
    pub(super) fn open_before_export(
        &mut self,
        arguments: &Arguments,
        (node, bottom): (String, String),
        door: Arc<Door>,
    ) -> Carried {
        self.nodes.count_export(&node, true);
        let engine = self.engine.clone();
        let work = move || door.open(&engine).map(Found::Disk);
        self.send_off(Purpose::Export { arguments: arguments.clone(), bottom, node }, work)
    }

    /// Wait until a command is finished, where nobody else has to be served meanwhile.
    pub(super) fn finish(&mut self, carried: Carried) -> Result<Value, QmpError> {
        let serial = match carried {
            Carried::Out(value) => return Ok(value),
            Carried::UnderWay(serial) => serial,
        };
        loop {
            self.look_into_mailbox();
            let finished = &mut self.errands.finished;
            if let Some(at) = finished.iter().position(|(other, _)| *other == serial) {
                return finished.remove(at).1;
            }
            if let Some(letter) = self.mailbox.wait(super::control::PATIENCE) {
                self.open(letter);
            }
        }
    }

    /// The daemon ends: nobody wants what is under way any more.
    pub(super) fn call_errands_back(&self) {
        self.errands.starts().for_each(Start::call_off);
    }

    /// It ends without those that are not back. Their clients are told.
    pub(super) fn leave_errands(&mut self) {
        for (serial, _) in std::mem::take(&mut self.errands.list) {
            let ending = QmpError::generic("the daemon ends; the path has not answered by then");
            self.errands.finished.push((serial, Err(ending)));
        }
    }
}
