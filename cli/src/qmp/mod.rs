//! QMP, the JSON protocol that QEMU's tools speak: bytes in, bytes out, without any I/O.
//!
//! | module | its idea |
//! |---|---|
//! | `lexer`, `parser` | A stream of bytes becomes values, one at a time, within limits. |
//! | `session` | One client: greeting, negotiation, requests, replies, events, and what is still to be sent. |
//! | `schema`, `check` | What arguments a command takes, as a table, and whether some given ones fit it. |
//! | `introspect` | The same table as `query-qmp-schema` shows it. |
//! | `commands` | The table. |
//!
//! What a command does is not here, but in the daemon.

mod check;
pub mod commands;
mod introspect;
mod lexer;
mod parser;
pub mod schema;
pub mod session;

use std::fmt;

use serde_json::{Map, Value, json};

pub use check::check;
pub use introspect::{query_commands, query_qmp_schema};
pub use parser::{Limits, MAX_DEPTH, Reader, SyntaxError};

/// The arguments of a command, or what stands in an object.
pub type Arguments = Map<String, Value>;

/// What clients tell errors apart by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorClass {
    /// No such command, or not now.
    CommandNotFound,
    /// A `block-job-*` command for a job that does not exist.
    DeviceNotActive,
    /// All else.
    GenericError,
}

impl ErrorClass {
    /// As it stands in a reply.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::CommandNotFound => "CommandNotFound",
            Self::DeviceNotActive => "DeviceNotActive",
            Self::GenericError => "GenericError",
        }
    }
}

/// Why a command was refused or failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QmpError {
    /// For programs.
    pub class: ErrorClass,
    /// For people, one line.
    pub text: String,
}

impl QmpError {
    /// A `GenericError`.
    pub fn generic(text: impl Into<String>) -> Self {
        Self { class: ErrorClass::GenericError, text: text.into() }
    }

    /// A `CommandNotFound`.
    pub fn not_found(text: impl Into<String>) -> Self {
        Self { class: ErrorClass::CommandNotFound, text: text.into() }
    }

    /// As the member `error` of a reply.
    #[must_use]
    pub fn value(&self) -> Value {
        json!({ "class": self.class.as_str(), "desc": self.text })
    }
}

impl fmt::Display for QmpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// The version of QEMU whose behaviour this is: what clients look at to find out what they may use.
#[must_use]
pub fn version() -> Value {
    json!({
        "qemu": { "major": 10, "minor": 0, "micro": 2 },
        "package": concat!("engine-cli ", env!("CARGO_PKG_VERSION")),
    })
}
