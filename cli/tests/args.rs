//! The command line: help that works, mistakes that are refused in one line with a hint, nothing touched.

mod support;

use support::{code, dense, directory, run, run_in, stderr, stdout};

/// Refused with exit code 2, and a message in one line and a hint in another.
#[track_caller]
fn refused(arguments: &[&str], expected: &str) {
    let output = run(arguments);
    let messages = stderr(&output);
    assert_eq!(code(&output), 2, "{arguments:?}: {messages}");
    let lines: Vec<_> = messages.lines().collect();
    assert_eq!(lines.len(), 2, "{arguments:?}: {messages}");
    assert!(lines.iter().all(|line| line.starts_with("engine-cli: ")), "{messages}");
    assert!(lines[0].contains(expected), "{arguments:?}: {expected:?} in {messages}");
    assert!(lines[1].contains("--help"), "{messages}");
    assert!(output.stdout.is_empty());
}

#[test]
fn help_of_every_command_has_an_example_and_exit_codes() {
    for command in ["copy", "compare", "info", "daemon", "backup", "job", "completions", "man"] {
        for flag in ["-h", "--help"] {
            let output = run(&[command, flag]);
            let help = stdout(&output);
            assert_eq!(code(&output), 0, "{command}");
            for part in
                ["Usage: engine-cli", "Examples:", &format!("\n  engine-cli {command} "), "Exit codes:"]
            {
                assert!(help.contains(part), "{command}: {part} in {help}");
            }
        }
    }
    let help = stdout(&run(&["--help"]));
    assert!(help.contains("copy") && help.contains("Exit codes:"));
    assert_eq!(stdout(&run(&["-V"])), format!("engine-cli {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn help_is_a_word_too() {
    assert_eq!(stdout(&run(&["help"])), stdout(&run(&["--help"])));
    assert_eq!(stdout(&run(&["help", "copy"])), stdout(&run(&["copy", "--help"])));
    assert_eq!(code(&run(&["help", "copy"])), 0);
}

#[test]
fn all_options_of_copy_are_in_its_help() {
    let help = stdout(&run(&["copy", "--help"]));
    for option in [
        "--sync",
        "--cluster-size",
        "--queue-depth",
        "--speed",
        "--on-source-error",
        "--on-target-error",
        "--map",
        "--verify",
        "--no-zero-detect",
        "--target-is-zero",
        "--force",
        "--force-share",
        "--io-engine",
        "--source-format",
        "--target-format",
        "--progress",
        "--json",
        "io_uring",
    ] {
        assert!(help.contains(option), "{option}");
    }
}

#[test]
fn missing_and_superfluous_arguments() {
    refused(&[], "a command is missing");
    refused(&["copy"], "missing SOURCE, TARGET");
    refused(&["copy", "a"], "missing TARGET");
    refused(&["copy", "a", "b", "c"], "unexpected argument 'c'");
    refused(&["compare", "a"], "missing B");
    refused(&["info"], "missing PATH");
    refused(&["cpy", "a", "b"], "did you mean copy?");
    refused(&["copy", "--forse", "a", "b"], "did you mean --force?");
    refused(&["copy", "a", "b", "--map"], "--map <FILE>");
    refused(&["serve"], "unrecognized subcommand 'serve'");
    refused(&["daemon"], "there is no way in");
    refused(&["daemon", "--nbd", "unix:nbd.sock"], "there is nothing to serve");
    let hint = stderr(&run(&["job", "set-speed", "--qmp", "unix:q", "j"]));
    assert!(
        hint.contains("missing SPEED") && hint.contains("try 'engine-cli job set-speed --help'"),
        "{hint}"
    );
    refused(&["backup", "--disk", "vda"], "missing --qmp SOCKET, --target PATH");
    refused(&["job", "pause", "--qmp", "unix:q"], "missing JOB");
    refused(&["job"], "a command is missing: list, pause");
}

#[test]
fn bad_values_name_what_is_allowed() {
    let copy = |option: &str, value: &str, expected: &str| {
        refused(&["copy", option, value, "/nonexistent/a", "/nonexistent/b"], expected);
    };
    copy("--speed", "0", "a speed of 0 never ends");
    copy("--speed", "fast", "bytes a second");
    copy("--speed", "99999999999G", "larger than any disk");
    copy("--cluster-size", "3K", "no power of two; use");
    copy("--cluster-size", "2K", "out of range; use a power of two from 4K to 4M");
    copy("--cluster-size", "8M", "out of range");
    copy("--cluster-size", "64Q", "64Q");
    copy("--queue-depth", "0", "nothing would ever be copied");
    copy("--queue-depth", "many", "no whole number");
    copy("--queue-depth", "99999999999", "no whole number");
    copy("--on-source-error", "skip", "report, stop, enospc, auto, ignore");
    copy("--on-target-error", "retry", "report, stop, enospc, auto, ignore");
    copy("--sync", "none", "full, top");
    copy("--io-engine", "aio", "auto, io_uring, threads");
    copy("--source-format", "vmdk", "raw, qcow2");
    copy("--progress", "dots", "auto, bar, json, none");
    copy("--log", "a=b=c", "--log");
}

#[test]
fn negative_numbers_are_values_not_options() {
    refused(&["copy", "--speed=-1", "a", "b"], "negative");
    refused(&["copy", "--queue-depth=-1", "a", "b"], "no whole number");
}

#[test]
fn sizes_may_be_lower_case() {
    // Understood: what is refused is the missing source.
    let output =
        run(&["copy", "--cluster-size", "64k", "--speed", "200m", "/nonexistent/a", "/nonexistent/b"]);
    assert!(!stderr(&output).contains("invalid value"), "{}", stderr(&output));
}

#[test]
fn control_characters_do_not_reach_the_terminal() {
    let output = run(&["copy", "--sync", "a\u{1b}[31m\nb", "x", "y"]);
    assert_eq!(code(&output), 2);
    assert!(!stderr(&output).contains('\u{1b}'), "{:?}", stderr(&output));
    assert_eq!(stderr(&output).lines().count(), 2, "{:?}", stderr(&output));
}

#[test]
fn usage_errors_are_json_too() {
    let output = run(&["copy", "--json", "--speed", "0", "a", "b"]);
    let object = support::json(&output);
    assert_eq!(code(&output), 2);
    assert_eq!(object["result"], "refused");
    assert_eq!(object["exit_code"], 2);
    assert_eq!(object["error"]["kind"], "usage");
    assert!(object["error"]["message"].as_str().is_some_and(|message| message.contains("a speed of 0")));
    // Behind `--` it is a name, not an option.
    assert!(run(&["copy", "--speed", "0", "--", "--json", "b"]).stdout.is_empty());
}

#[test]
fn completions_and_man_pages_come_from_the_same_definition() {
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let output = run(&["completions", shell]);
        assert_eq!(code(&output), 0, "{shell}");
        assert!(stdout(&output).contains("on-source-error"), "{shell}");
    }
    refused(&["completions", "tcsh"], "bash, elvish, fish, powershell, zsh");
    let page = stdout(&run(&["man"]));
    assert!(page.contains(".TH engine-cli 1"), "{page}");
    let there = directory();
    let output = run_in(there.path(), &["man", "pages"]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    for page in [
        "engine-cli.1",
        "engine-cli-copy.1",
        "engine-cli-compare.1",
        "engine-cli-info.1",
        "engine-cli-demo.1",
        "engine-cli-daemon.1",
        "engine-cli-backup.1",
        "engine-cli-job.1",
    ] {
        let text = std::fs::read_to_string(there.path().join("pages").join(page)).expect(page);
        for section in ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXAMPLES", "\"EXIT STATUS\""] {
            assert!(text.contains(&format!(".SH {section}\n")), "{page} has {section}: {text}");
        }
    }
    std::fs::write(there.path().join("file"), "x").expect("written");
    let output = run_in(there.path(), &["man", "file"]);
    assert_eq!(code(&output), 1);
    assert!(stderr(&output).contains("cannot write man pages into file"), "{}", stderr(&output));
}

/// What bash offers for the last of `words`, with the script as a user sources it.
fn completed_by_bash(words: &[&str]) -> Vec<String> {
    let there = directory();
    std::fs::write(there.path().join("script"), run(&["completions", "bash"]).stdout).expect("written");
    // As bash calls a completion function: the command, the word that is completed, the one before it.
    let complete = r#"
        source ./script || exit 1
        read -r _ function _ <<< "$(complete -p engine-cli | sed 's/.*\(-F\)/\1/')"
        COMP_WORDS=("$@")
        COMP_CWORD=$(($# - 1))
        "$function" "$1" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
        printf '%s\n' "${COMPREPLY[@]}"
    "#;
    let output = std::process::Command::new("bash")
        .args(["--norc", "-c", complete, "bash"])
        .args(words)
        .current_dir(there.path())
        .output()
        .expect("bash runs");
    assert!(output.status.success() && output.stderr.is_empty(), "{words:?}: {}", stderr(&output));
    stdout(&output).split_whitespace().map(str::to_owned).collect()
}

#[test]
fn bash_completes_commands_options_and_values() {
    if !support::has("bash") {
        return;
    }
    assert_eq!(completed_by_bash(&["engine-cli", "com"]), ["compare", "completions"]);
    assert_eq!(completed_by_bash(&["engine-cli", "copy", "--ver"]), ["--verify"]);
    assert_eq!(completed_by_bash(&["engine-cli", "copy", "a", "b", "--forc"]), ["--force", "--force-share"]);
    assert_eq!(completed_by_bash(&["engine-cli", "copy", "--progress", "j"]), ["json"]);
    assert_eq!(completed_by_bash(&["engine-cli", "compare", "--js"]), ["--json"]);
    assert_eq!(completed_by_bash(&["engine-cli", "info", "--form"]), ["--format"]);
    assert_eq!(completed_by_bash(&["engine-cli", "demo", "--siz"]), ["--size"]);
    assert_eq!(completed_by_bash(&["engine-cli", "completions", "fi"]), ["fish"]);
}

#[test]
fn a_reader_that_leaves_is_no_error_and_a_full_disk_is() {
    let program = support::program();
    let shell =
        |script: String| std::process::Command::new("sh").args(["-c", &script]).output().expect("sh runs");
    let output = shell(format!("{0} completions bash | true; {0} --help | true", program.display()));
    assert_eq!(stderr(&output), "");
    let output = shell(format!("{} info --json {0} > /dev/full", program.display()));
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains("cannot write to standard output"), "{}", stderr(&output));
}

#[test]
fn standard_error_may_be_closed_or_gone() {
    let program = support::program();
    for redirection in ["2>&-", "2>/dev/full", "2>&- >&- <&-"] {
        for arguments in [
            "copy a",
            "copy /nonexistent/a /nonexistent/b",
            "compare -vvv /nonexistent/a b",
            "info /dev/null",
        ] {
            let script = format!("{} {arguments} {redirection}", program.display());
            let status = std::process::Command::new("sh").args(["-c", &script]).status().expect("sh runs");
            assert_eq!(status.code(), Some(2), "{script}");
        }
    }
}

#[test]
fn logging_is_off_by_default_and_comes_when_asked_for() {
    let there = directory();
    dense(&there.path().join("a"), 4096, 0);
    let output = run_in(there.path(), &["compare", "a", "a"]);
    assert_eq!(stderr(&output), "");
    let output = run_in(there.path(), &["-vvv", "info", "a"]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    assert!(stderr(&output).contains("TRACE") || stderr(&output).contains("DEBUG"), "{}", stderr(&output));
    refused(&["-v", "--log", "debug", "info", "a"], "cannot be used with");
    let output = std::process::Command::new(support::program())
        .args(["info", "/nonexistent"])
        .env("ENGINE_LOG", "a=b=c")
        .output()
        .expect("runs");
    assert_eq!(code(&output), 2);
    assert!(stderr(&output).contains("ENGINE_LOG"), "{}", stderr(&output));
}
