//! Completion scripts and man pages, from the definition of the command line.

mod manual;

use std::path::Path;

use clap::CommandFactory;
use clap_complete::Shell;

use crate::args::{Cli, CompletionsArgs, ManArgs};
use crate::out;
use crate::report::{DONE, FAILED};

/// The program's name.
const PROGRAM: &str = "engine-cli";

/// Print a completion script; gives the exit code.
pub(crate) fn completions(args: &CompletionsArgs) -> u8 {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), PROGRAM, &mut script);
    if args.shell == Shell::Bash {
        script = with_working_labels(&String::from_utf8_lossy(&script)).into_bytes();
    }
    print(&script)
}

/// The script for bash keeps the command that it has seen under one name and looks it up under another, since the generator
/// takes the dash in the program's name for the step from a command to its subcommand. Without this nothing
/// is completed behind a command.
fn with_working_labels(script: &str) -> String {
    let sought = format!("{}__subcmd__", PROGRAM.replace('-', "__subcmd__"));
    let set = format!("{}__subcmd__", PROGRAM.replace('-', "__"));
    script.replace(&sought, &set)
}

/// Print the main man page, or write all of them into a directory; gives the exit code.
pub(crate) fn man(args: &ManArgs) -> u8 {
    if let Some(directory) = &args.dir {
        return write_all(directory);
    }
    let mut page = Vec::new();
    match manual::render(&command(), &mut page) {
        Ok(()) => print(&page),
        Err(error) => failed(&format!("cannot make the man page: {}", out::reason(&error))),
    }
}

/// The definition, with the names of commands as users write them.
fn command() -> clap::Command {
    let mut command = Cli::command();
    command.build();
    command
}

fn write_all(directory: &Path) -> u8 {
    let name = out::one_line(&directory.to_string_lossy());
    let written = std::fs::create_dir_all(directory).and_then(|()| manual::write_all(&command(), directory));
    match written {
        Ok(()) => {
            out::say(format_args!("wrote the man pages into {name}"));
            DONE
        }
        Err(error) => failed(&format!("cannot write man pages into {name}: {}", out::reason(&error))),
    }
}

fn print(text: &[u8]) -> u8 {
    match out::print(text) {
        Ok(()) => DONE,
        Err(undelivered) => failed(&undelivered.to_string()),
    }
}

fn failed(message: &str) -> u8 {
    out::complain(message);
    FAILED
}
