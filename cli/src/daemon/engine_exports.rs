//! The engine's NBD server behind the daemon's seam.

use engine::live::Engine;

use super::exports::{ExportOptions, Exported, Exports, Gone, NbdOptions};
use super::listen::Listener;

/// The engine's NBD server.
pub(super) struct EngineExports {
    _engine: Engine,
}

impl EngineExports {
    pub(super) fn new(engine: Engine) -> Self {
        Self { _engine: engine }
    }
}

impl Exports for EngineExports {
    fn start(&mut self, _listener: Listener, _options: &NbdOptions) -> Result<(), String> {
        Err("the NBD server is not in this version".to_owned())
    }

    fn add(&mut self, _export: ExportOptions, _gone: Gone) -> Result<Box<dyn Exported>, String> {
        Err("the NBD server is not in this version".to_owned())
    }

    fn stop(&mut self) {}
}
