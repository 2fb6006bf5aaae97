//! What is said when the command line makes no sense: one line with the mistake, one with where to read on.
//!
//! The parser's own messages run over several paragraphs; scripts log the first line and people miss the rest. Here the
//! first line holds the mistake and the possible values or the nearest spelling, and the second names the help to read.

use clap::error::{ContextKind, ContextValue, ErrorKind};
use serde_json::{Value, json};

use crate::out;
use crate::report::{DONE, FAILED, REFUSED};

/// Show help or version on standard output, or a mistake on standard error; gives the exit code.
pub(crate) fn report(error: &clap::Error, arguments: &[String]) -> u8 {
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        return match out::print(error.render().to_string().as_bytes()) {
            Ok(()) => DONE,
            Err(undelivered) => {
                out::complain(undelivered);
                FAILED
            }
        };
    }
    let of_job = arguments.get(1).is_some_and(|word| word == "job");
    let missing = matches!(
        error.kind(),
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand | ErrorKind::MissingSubcommand
    );
    if of_job && missing {
        let verbs =
            "a command is missing: list, pause, resume, cancel, finalize, dismiss, set-speed or watch";
        return refuse(verbs, arguments);
    }
    refuse(&mistake(error), arguments)
}

/// Refuse a command line because of `message`; gives the exit code.
pub(crate) fn refuse(message: &str, arguments: &[String]) -> u8 {
    // Parsing failed, so the options are known only as text. Whoever asked for JSON waits for an object.
    let options: Vec<&str> =
        arguments.iter().skip(1).map(String::as_str).take_while(|text| *text != "--").collect();
    if options.contains(&"--progress=json") || options.windows(2).any(|pair| pair == ["--progress", "json"]) {
        out::speak_json();
    }
    out::complain(message);
    out::say(hint(arguments));
    if options.contains(&"--json")
        && let Err(undelivered) = out::print(format!("{}\n", refusal(message)).as_bytes())
    {
        out::complain(undelivered);
    }
    REFUSED
}

fn refusal(message: &str) -> Value {
    json!({
        "result": "refused",
        "error": { "message": message, "kind": "usage" },
        "exit_code": REFUSED,
    })
}

/// The mistake in one line.
fn mistake(error: &clap::Error) -> String {
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(out::one_line(text)),
        Some(ContextValue::Strings(texts)) => {
            Some(texts.iter().map(|text| out::one_line(text)).collect::<Vec<_>>().join(", "))
        }
        _ => None,
    };
    let mut line = match error.kind() {
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand | ErrorKind::MissingSubcommand => {
            "a command is missing: copy, compare, info, demo, daemon, backup, job, completions or man"
                .to_owned()
        }
        ErrorKind::MissingRequiredArgument => {
            let missing = text(ContextKind::InvalidArg).unwrap_or_default();
            format!("missing {}", missing.replace(['<', '>'], ""))
        }
        // Several arguments of the form `invalid value … for …`, `unexpected argument …`: the parser's first paragraph.
        _ => first_paragraph(&error.render().to_string()),
    };
    for (kind, what) in [
        (ContextKind::SuggestedArg, "did you mean"),
        (ContextKind::SuggestedSubcommand, "did you mean"),
        (ContextKind::SuggestedValue, "did you mean"),
    ] {
        if let Some(suggestion) = text(kind) {
            line = format!("{line}; {what} {suggestion}?");
        }
    }
    line
}

/// The first paragraph without the parser's prefix, as one line.
fn first_paragraph(text: &str) -> String {
    let text = text.strip_prefix("error: ").unwrap_or(text);
    let lines: Vec<_> = text
        .lines()
        .take_while(|line| !line.trim().is_empty())
        .map(|line| out::one_line(line.trim()))
        .collect();
    lines.join(" ")
}

/// Where to read on: the help of the command that was tried.
fn hint(arguments: &[String]) -> String {
    let known = ["copy", "compare", "info", "demo", "daemon", "backup", "job", "completions", "man"];
    let command = arguments.iter().skip(1).find(|text| known.contains(&text.as_str()));
    let verbs = ["list", "pause", "resume", "cancel", "finalize", "dismiss", "set-speed", "watch"];
    let verb = arguments
        .iter()
        .find(|text| command.is_some_and(|name| name == "job") && verbs.contains(&text.as_str()));
    let name: String = command.into_iter().chain(verb).map(|name| format!(" {name}")).collect();
    let usage = match name.trim() {
        "copy" => ": engine-cli copy [OPTIONS] SOURCE TARGET",
        "compare" => ": engine-cli compare [OPTIONS] A B",
        _ => "",
    };
    format!("try 'engine-cli{name} --help'{usage}")
}
