//! `engine-cli`: copies disks and images.
//!
//! A clean cut: `args` says what users may write, `copy`, `compare`, `info` and `demo` do the work through the engine, `daemon` serves
//! others, who speak `qmp`, as `client` does; `progress` shows how far it is, `report` how it ended, `signals` and `keys` bring in the outside. Here the parts meet, and each
//! way to end becomes an exit code.

mod args;
mod client;
mod compare;
mod copy;
mod daemon;
mod demo;
mod generate;
mod info;
mod keys;
mod logging;
mod out;
mod progress;
pub mod qmp;
mod report;
mod signals;
mod usage;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;

use args::{Cli, Command, ProgressKind};

/// The program: what the command line asks for, as an exit code.
#[must_use]
pub fn main() -> ExitCode {
    let command_line: Vec<String> =
        std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
    ExitCode::from(match Cli::try_parse_from(with_help(std::env::args_os())) {
        Ok(cli) => run(&cli, &command_line),
        Err(error) => usage::report(&error, &command_line),
    })
}

/// `help` and `help COMMAND` as the option that they stand for: as a command of their own they would come with completions and man pages.
fn with_help(words: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut words: Vec<_> = words.collect();
    if words.get(1).is_some_and(|word| word == "help") {
        words.remove(1);
        words.push("--help".into());
    }
    words
}

fn run(cli: &Cli, command_line: &[String]) -> u8 {
    if cli.command.progress() == Some(ProgressKind::Json) {
        out::speak_json();
    }
    let logging = match logging::start(&cli.log) {
        Ok(logging) => logging,
        Err(message) => return usage::refuse(&message, command_line),
    };
    match &cli.command {
        Command::Copy(args) => copy::run(args, command_line, logging),
        Command::Compare(args) => compare::run(args, logging),
        Command::Info(args) => info::run(args),
        Command::Demo(args) => demo::run(args, logging),
        Command::Daemon(args) => daemon::run(args, command_line),
        Command::Backup(args) => client::backup::run(args, logging),
        Command::Job(args) => client::job::run(args, logging),
        Command::Completions(args) => generate::completions(args),
        Command::Man(args) => generate::man(args),
    }
}
