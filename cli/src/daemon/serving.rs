//! The NBD server and its exports as QMP has them.

use std::path::PathBuf;

use engine::live::LiveDisk;
use serde::Deserialize;
use serde_json::{Value, json};

use super::control::Control;
use super::errands::Carried;
use super::exports::{ExportOptions, ExportSource, Exported, Exports, MAX_NAME, NbdOptions};
use super::listen::{Endpoint, Listener, SocketFile, listen};
use super::mailbox::{ExportSerial, Happening, JobSerial};
use super::nodes::{MAX_ID, MAX_NODE_NAME, busy, is_well_formed};
use crate::qmp::session::MAX_REPLY;
use crate::qmp::{Arguments, QmpError};

/// Most exports.
const MAX_EXPORTS: usize = 256;
/// Most bytes of what is told of an export, but for its id and its node.
const MAX_EXPORT_TEXT: usize = 256;
const _: () = assert!(MAX_EXPORTS * (MAX_ID + MAX_NODE_NAME + MAX_EXPORT_TEXT) <= MAX_REPLY);
/// Most connections at all, and where the command line does not say otherwise.
pub(crate) const MAX_CONNECTIONS: u32 = 1024;

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct AskedServer {
    addr: Address,
    #[serde(default)]
    max_connections: u32,
}

#[derive(Deserialize)]
#[serde(tag = "type", content = "data", rename_all = "kebab-case")]
enum Address {
    Inet { host: String, port: String },
    Unix { path: PathBuf },
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct AskedExport {
    id: String,
    node_name: String,
    #[serde(default)]
    writable: bool,
    name: Option<String>,
    description: Option<String>,
    x_snapshot: Option<String>,
}

struct Export {
    serial: ExportSerial,
    id: String,
    name: String,
    /// The node, and the disk that it reads, if it is no snapshot.
    node: String,
    reads: Option<String>,
    /// The job whose snapshot it shows.
    job: Option<JobSerial>,
    handle: Box<dyn Exported>,
    shutting_down: bool,
}

/// See the module's header.
pub(super) struct Serving {
    server: Box<dyn Exports>,
    /// Most connections: so many the engine has places for.
    most_connections: u32,
    running: bool,
    /// Stands while the server runs.
    file: Option<SocketFile>,
    exports: Vec<Export>,
    next: u64,
}

fn refuse<T>(text: impl Into<String>) -> Result<T, QmpError> {
    Err(QmpError::generic(text))
}

impl Serving {
    /// `most_connections`: what the engine has places for.
    pub(super) fn new(server: Box<dyn Exports>, most_connections: u32) -> Self {
        Self { server, most_connections, running: false, file: None, exports: Vec::new(), next: 0 }
    }

    /// Whether there are no exports.
    pub(super) fn is_empty(&self) -> bool {
        self.exports.is_empty()
    }

    /// `query-block-exports`, the newest first.
    pub(super) fn query(&self) -> Value {
        let newest = self.exports.iter().rev();
        newest
            .map(|export| {
                json!({
                    "id": export.id, "type": "nbd", "node-name": export.node,
                    "shutting-down": export.shutting_down,
                })
            })
            .collect()
    }

    /// Serve on a socket that is there already, from [`Self::open`] on.
    pub(super) fn start(
        &mut self,
        listener: Listener,
        file: Option<SocketFile>,
        options: &NbdOptions,
    ) -> Result<(), QmpError> {
        if self.running {
            return refuse("NBD server already running");
        }
        self.server.start(listener, options).map_err(QmpError::generic)?;
        (self.running, self.file) = (true, file);
        Ok(())
    }

    /// Let clients in.
    pub(super) fn open(&mut self) -> Result<(), QmpError> {
        self.server.open().map_err(QmpError::generic)
    }
}

impl Control {
    /// `nbd-server-start`.
    pub(super) fn start_server(&mut self, arguments: &Arguments) -> Result<(), QmpError> {
        if self.serving.running {
            return refuse("NBD server already running");
        }
        let asked: AskedServer = decode(arguments)?;
        let endpoint = match asked.addr {
            Address::Unix { path } => Endpoint::Unix(path),
            Address::Inet { host, port } => match port.parse() {
                Ok(port) => Endpoint::Tcp { host, port },
                Err(_) => {
                    return refuse(format!("address resolution failed for {host}:{port}: no such port"));
                }
            },
        };
        let limit = self.serving.most_connections;
        let max_connections = match asked.max_connections {
            0 => limit,
            most if most > limit => {
                return refuse(format!(
                    "max-connections: {most} is not supported; {limit} is the most (--max-connections of the daemon)"
                ));
            }
            most => most,
        };
        let (listener, file) = listen(&endpoint).map_err(QmpError::generic)?;
        let options = NbdOptions { max_connections, default_export: None, post: self.mailbox.post() };
        self.serving.start(listener, file, &options)?;
        self.serving.open()
    }

    /// `nbd-server-stop`: all exports go.
    pub(super) fn stop_server(&mut self) -> Result<(), QmpError> {
        if !self.serving.running {
            return refuse("NBD server not running");
        }
        self.shut_serving_down();
        Ok(())
    }

    /// Stop the server, if it runs, and have its exports gone.
    pub(super) fn shut_serving_down(&mut self) {
        if !std::mem::replace(&mut self.serving.running, false) {
            return;
        }
        for export in &mut self.serving.exports {
            export.shutting_down = true;
        }
        self.serving.server.stop();
        self.serving.file = None;
        self.await_exports(|_| true);
    }

    /// Wait for a moment until the exports that `which` takes are gone; those that are not yet will be told later.
    fn await_exports(&mut self, which: impl Fn(&str) -> bool) {
        let deadline = std::time::Instant::now() + super::control::PATIENCE;
        self.look_into_mailbox();
        while self.serving.exports.iter().any(|export| export.shutting_down && which(&export.id)) {
            let Some(letter) = self.await_letter(deadline) else { return };
            self.open(letter);
        }
    }

    /// `block-export-add`.
    pub(super) fn add_export(&mut self, arguments: &Arguments) -> Result<Carried, QmpError> {
        self.export(arguments, None)
    }

    /// The same, once more when its disk, that of a node at the bottom, is `opened`.
    pub(super) fn export(
        &mut self,
        arguments: &Arguments,
        opened: Option<(LiveDisk, &str)>,
    ) -> Result<Carried, QmpError> {
        let asked: AskedExport = decode(arguments)?;
        if !is_well_formed(&asked.id) {
            return refuse("Invalid block export id");
        }
        if asked.id.len() > MAX_ID {
            return refuse("Block export id too long");
        }
        if self.serving.exports.iter().any(|export| export.id == asked.id) {
            return refuse(format!("Block export id '{}' is already in use", asked.id));
        }
        // A job's filter may have gone meanwhile, and its name to another disk.
        let bottom = self.nodes.bottom_of(&asked.node_name).ok();
        let bottom = bottom.filter(|bottom| opened.as_ref().is_none_or(|(_, held)| held == bottom));
        let Some(bottom) = bottom else {
            return refuse(format!("Cannot find device='' nor node-name='{}'", asked.node_name));
        };
        if !self.serving.running {
            return refuse("NBD server not running");
        }
        if self.serving.exports.len() >= MAX_EXPORTS {
            return refuse(format!("{MAX_EXPORTS} exports are the most; delete some"));
        }
        let name = asked.name.unwrap_or_else(|| asked.node_name.clone());
        if name.len() > MAX_NAME {
            return refuse(format!("export name '{name}' too long"));
        }
        if asked.description.as_ref().is_some_and(|text| text.len() > MAX_NAME) {
            return refuse("description too long");
        }
        if self.serving.exports.iter().any(|export| export.name == name) {
            return refuse(format!("NBD server already has export named '{name}'"));
        }
        if asked.writable && (asked.x_snapshot.is_some() || self.nodes.is_read_only(&asked.node_name)?) {
            return refuse("Cannot export read-only node as writable");
        }
        let trim = self.nodes.may_trim(&asked.node_name)?;
        let node = self.nodes.lasting(&asked.node_name)?.to_owned();
        let (source, job) = match &asked.x_snapshot {
            None if self.nodes.is_target(&bottom)? => return Err(busy(&asked.node_name)),
            None => {
                let door = self.nodes.enter(&bottom)?;
                let Some(disk) = opened.map(|(disk, _)| disk).or_else(|| door.opened()) else {
                    return Ok(self.open_before_export(arguments, (node, bottom), door));
                };
                (ExportSource::Disk(disk), None)
            }
            Some(id) => {
                let job = self.jobs.by_id(id)?;
                if job.source != bottom || job.status.is_over() {
                    return refuse(format!("Job '{id}' does not copy node '{}'", asked.node_name));
                }
                (ExportSource::Snapshot(job.snapshot.clone()), Some(job.serial))
            }
        };
        self.serving.next += 1;
        let serial = ExportSerial(self.serving.next);
        let post = self.mailbox.post();
        let gone = Box::new(move || post.send(Happening::ExportGone(serial)));
        let (description, writable) = (asked.description, asked.writable);
        let options = ExportOptions { name: name.clone(), description, source, writable, trim };
        match self.serving.server.add(options, gone) {
            Ok(handle) => {
                let reads = job.is_none().then_some(bottom);
                self.nodes.count_export(&node, true);
                let id = asked.id;
                let export = Export { serial, id, name, node, reads, job, handle, shutting_down: false };
                self.serving.exports.push(export);
                Ok(Carried::Out(json!({})))
            }
            Err(why) => {
                if job.is_none() {
                    self.nodes.release(&bottom);
                }
                refuse(why)
            }
        }
    }

    /// `block-export-del`.
    pub(super) fn remove_export(&mut self, id: &str, hard: bool) -> Result<(), QmpError> {
        let Some(export) = self.serving.exports.iter_mut().find(|export| export.id == id) else {
            return refuse(format!("Export '{id}' is not found"));
        };
        if export.shutting_down {
            return refuse(format!("Export '{id}' is already shutting down"));
        }
        if export.handle.remove(hard).is_err() {
            return refuse(format!("export '{id}' still in use"));
        }
        export.shutting_down = true;
        let id = id.to_owned();
        self.await_exports(|other| *other == id);
        Ok(())
    }

    /// A job is over: what shows the disk at its t0 goes.
    pub(super) fn remove_snapshots_of(&mut self, job: JobSerial) {
        for export in self.serving.exports.iter_mut().filter(|export| export.job == Some(job)) {
            export.shutting_down = true;
            // With force it is never in use.
            export.handle.remove(true).ok();
        }
    }

    /// An export is gone; its id.
    pub(super) fn forget_export(&mut self, serial: ExportSerial) -> Option<String> {
        let at = self.serving.exports.iter().position(|export| export.serial == serial)?;
        let export = self.serving.exports.remove(at);
        self.nodes.count_export(&export.node, false);
        if let Some(bottom) = &export.reads {
            self.nodes.release(bottom);
        }
        Some(export.id)
    }
}

fn decode<T: for<'a> Deserialize<'a>>(arguments: &Arguments) -> Result<T, QmpError> {
    serde_json::from_value(Value::Object(arguments.clone()))
        .map_err(|error| QmpError::generic(error.to_string()))
}
