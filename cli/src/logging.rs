//! The engine's trace events on standard error, off unless asked for.
//!
//! Without a subscriber an event costs one load, so nothing is installed by default. The filter comes from `--log`,
//! else `-v`, else the environment variable `ENGINE_LOG`.

use tracing_subscriber::EnvFilter;

use crate::args::LogArgs;
use crate::out;

/// Name of the environment variable.
const VARIABLE: &str = "ENGINE_LOG";

/// Start logging if it was asked for; gives whether it was.
///
/// # Errors
/// A filter that makes no sense, in one line.
pub(crate) fn start(args: &LogArgs) -> Result<bool, String> {
    let from_environment = || std::env::var(VARIABLE).ok().filter(|filter| !filter.is_empty());
    let (filter, origin) = match (&args.log, args.verbose) {
        (Some(filter), _) => (filter.clone(), "--log"),
        (None, 1) => ("info".to_owned(), "-v"),
        (None, 2) => ("debug".to_owned(), "-v"),
        (None, 3..) => ("trace".to_owned(), "-v"),
        (None, 0) => match from_environment() {
            Some(filter) => (filter, VARIABLE),
            None => return Ok(false),
        },
    };
    let parsed = EnvFilter::builder().parse(&filter).map_err(|error| {
        format!("invalid value '{filter}' for {origin}: {error}; write it like debug or engine::copy=trace")
    })?;
    tracing_subscriber::fmt()
        .with_env_filter(parsed)
        .with_writer(|| out::Log)
        .with_ansi(false)
        // A standard error that is gone must not end the copy.
        .log_internal_errors(false)
        .try_init()
        .map_err(|error| format!("cannot start logging: {error}"))?;
    Ok(true)
}
