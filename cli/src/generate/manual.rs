//! Man pages with the sections that readers look for.
//!
//! What `--help` has behind the options stands in a page under headings of its own: a line like `Examples:` begins one, and what comes before
//! the first is the notes. All of it keeps its lines.

use std::io::{self, Write};
use std::path::Path;

use clap::Command;
use clap_mangen::Man;
use roff::{Roff, roman};

/// What a heading of the help is called in a page.
const HEADINGS: [(&str, &str); 2] = [("Examples:", "EXAMPLES"), ("Exit codes:", "EXIT STATUS")];

/// Write the page of `command`.
pub(super) fn render(command: &Command, page: &mut dyn Write) -> io::Result<()> {
    let man = Man::new(command.clone());
    man.render_title(page)?;
    man.render_name_section(page)?;
    man.render_synopsis_section(page)?;
    man.render_description_section(page)?;
    man.render_options_section(page)?;
    if command.has_subcommands() {
        man.render_subcommands_section(page)?;
    }
    let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    for (title, lines) in sections(&help) {
        let mut section = Roff::new();
        section.control("SH", [title]).control("nf", []);
        for line in lines {
            section.text([roman(line)]);
        }
        section.control("fi", []);
        section.to_writer(page)?;
    }
    Ok(())
}

/// Write the pages of `command` and of all below it into `directory`.
pub(super) fn write_all(command: &Command, directory: &Path) -> io::Result<()> {
    for below in command.get_subcommands().filter(|below| !below.is_hide_set()) {
        write_all(below, directory)?;
    }
    let mut page = Vec::new();
    render(command, &mut page)?;
    std::fs::write(directory.join(Man::new(command.clone()).get_filename()), page)
}

/// The sections of a help text, without empty lines around them.
fn sections(help: &str) -> Vec<(&'static str, Vec<&str>)> {
    let mut sections = vec![("NOTES", Vec::new())];
    for line in help.lines() {
        match HEADINGS.iter().find(|(heading, _)| *heading == line) {
            Some(&(_, title)) => sections.push((title, Vec::new())),
            None => sections.last_mut().expect("the notes are there").1.push(line),
        }
    }
    for (_, lines) in &mut sections {
        while lines.last().is_some_and(|line| line.trim().is_empty()) {
            lines.pop();
        }
    }
    sections.retain(|(_, lines)| !lines.is_empty());
    sections
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn help_is_cut_at_its_headings() {
        let help = "Holes count.\n\nExamples:\n  a b\n\n  c\n\nExit codes:\n  0 done\n";
        let expected = vec![
            ("NOTES", vec!["Holes count."]),
            ("EXAMPLES", vec!["  a b", "", "  c"]),
            ("EXIT STATUS", vec!["  0 done"]),
        ];
        assert_eq!(sections(help), expected);
        assert_eq!(sections(""), vec![]);
    }
}
