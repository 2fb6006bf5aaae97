//! The engine's NBD server behind the daemon's seam.

use engine::error::Error;
use engine::live::{self, Engine, NbdListener, NbdServer, NotAccepted, Removal};

use super::control::PATIENCE;
use super::exports::{ExportOptions, ExportSource, Exported, Exports, Gone, NbdOptions, StillInUse};
use super::listen::Listener;
use super::mailbox::Happening;

/// The engine's NBD server.
pub(super) struct EngineExports {
    engine: Engine,
    server: Option<NbdServer>,
}

impl EngineExports {
    pub(super) fn new(engine: Engine) -> Self {
        Self { engine, server: None }
    }
}

impl Exports for EngineExports {
    fn start(&mut self, listener: Listener, options: &NbdOptions) -> Result<(), String> {
        let listener = match listener {
            Listener::Unix(listener) => NbdListener::Unix(listener),
            Listener::Tcp(listener) => NbdListener::Tcp(listener),
        };
        let post = options.post.clone();
        let told = move |error: &Error| post.send(Happening::NotAccepted(error.reason().to_owned()));
        let options = live::NbdOptions {
            on_not_accepted: Some(NotAccepted::new(told)),
            clients: options.max_connections as usize,
            default_export: options.default_export.clone(),
            closed: true,
            ..live::NbdOptions::default()
        };
        let server = self.engine.start_nbd(listener, options).map_err(|error| error.to_string())?;
        self.server = Some(server);
        Ok(())
    }

    fn open(&mut self) -> Result<(), String> {
        let server = self.server.as_ref().ok_or("the NBD server is not running")?;
        server.open().map_err(|error| error.to_string())
    }

    fn add(&mut self, export: ExportOptions, gone: Gone) -> Result<Box<dyn Exported>, String> {
        let server = self.server.as_ref().ok_or("the NBD server is not running")?;
        let options = live::ExportOptions {
            name: export.name,
            description: export.description.unwrap_or_default(),
            source: match export.source {
                ExportSource::Disk(disk) => live::ExportSource::Disk(disk),
                ExportSource::Snapshot(snapshot) => live::ExportSource::Snapshot(snapshot),
            },
            writable: export.writable,
            trim: export.trim,
            on_gone: Some(gone),
        };
        Ok(Box::new(server.add_export(options).map_err(|error| error.to_string())?))
    }

    fn stop(&mut self) {
        if let Some(server) = self.server.take() {
            // Whoever takes longer to leave is told of when it has. The only error is that the engine has died, which the control loop tells.
            server.stop_within(PATIENCE).ok();
        }
    }
}

impl Exported for live::Export {
    fn remove(&self, hard: bool) -> Result<(), StillInUse> {
        let removal = if hard { Removal::Disconnect } else { Removal::IfUnused };
        live::Export::remove(self, removal).map_err(|_| StillInUse)
    }
}
