//! What a guest feels while its disk is copied, and what the copy gets, over the choices of the sweep's depth.
//!
//! A guest in this process writes 4 KiB at random places of a disk, without pause, before and during a full, unthrottled backup to
//! another file. Every choice of the depth takes its turn in every round, so that a drift of the machine hits all alike. The latencies
//! are corrected for coordinated omission ([`engine::live::Latencies::corrected`]). One table, and on request plots.
//!
//! `cargo bench -p benches --bench guest -- --help`

mod load;
mod plot;
mod table;
mod trial;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use engine::live::SweepDepth;
use engine::storage::locator;

use trial::{Choice, Setup, Trial};

/// Guest latency and backup throughput, over the choices of the sweep's depth.
#[derive(Debug, Parser)]
struct Options {
    /// Bytes of the disk
    #[arg(long, default_value = "4G", value_parser = size)]
    size: u64,
    /// Requests of the guest in flight
    #[arg(long, default_value = "1,16", value_delimiter = ',')]
    depths: Vec<u32>,
    /// Choices: auto; fleece (auto, and what the guest changes goes to a fleece file of 1 GiB beside the disk first); or fixed
    /// numbers of clusters in flight (64 KiB each)
    #[arg(long, default_value = "auto,4,8,16,64", value_delimiter = ',', value_parser = choice)]
    choices: Vec<Choice>,
    /// Rounds
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Where disks are made; on the disk that is to be measured
    #[arg(long, default_value = "/tmp")]
    workdir: PathBuf,
    /// A block device for the backups, which is overwritten, instead of new files beside the disk
    #[arg(long)]
    target: Option<PathBuf>,
    /// Write latencies.svg and timeline.svg here
    #[arg(long)]
    plots: Option<PathBuf>,
    /// Write every trial as JSON here
    #[arg(long)]
    json: Option<PathBuf>,
    /// Which benches are to run, when all of them are asked: parts of their names
    #[arg(hide = true)]
    filter: Vec<String>,
    /// Cargo says so.
    #[arg(long, hide = true)]
    bench: bool,
}

/// This bench's name, as a filter meets it.
const NAME: &str = "guest";

/// Options of Criterion, under which the other benches run: who gives one of them means those.
const OTHERS: [&str; 16] = [
    "--baseline",
    "--confidence-level",
    "--discard-baseline",
    "--exact",
    "--list",
    "--load-baseline",
    "--measurement-time",
    "--noise-threshold",
    "--noplot",
    "--nresamples",
    "--profile-time",
    "--quick",
    "--sample-size",
    "--save-baseline",
    "--significance-level",
    "--warm-up-time",
];

fn size(text: &str) -> Result<u64, String> {
    locator::parse_size(text).map(|length| length.0).map_err(|error| error.to_string())
}

/// The default.
fn auto() -> Choice {
    Choice { name: "auto".into(), depth: SweepDepth::Auto, fleece: false }
}

fn choice(text: &str) -> Result<Choice, String> {
    if text == "auto" {
        return Ok(auto());
    }
    if text == "fleece" {
        return Ok(Choice { name: text.to_owned(), fleece: true, ..auto() });
    }
    let clusters = text.parse().map_err(|_| "auto, fleece, or a number of clusters".to_owned())?;
    Ok(Choice { name: format!("{clusters} clusters"), depth: SweepDepth::Fixed(clusters), fleece: false })
}

fn main() -> ExitCode {
    let means_others = |argument: String| OTHERS.contains(&argument.split('=').next().expect("a first part"));
    if std::env::args().skip(1).any(means_others) {
        return ExitCode::SUCCESS;
    }
    let options = Options::parse();
    let is_meant = |filter: &String| NAME.contains(filter.as_str());
    if !options.filter.is_empty() && !options.filter.iter().any(is_meant) {
        return ExitCode::SUCCESS;
    }
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("guest: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<(), Box<dyn std::error::Error>> {
    let setup = Setup::make(&options.workdir, options.size, options.target.clone())?;
    let mut trials: Vec<Trial> = Vec::new();
    for round in 0..options.rounds {
        trials.push(told(setup.run(&auto(), 0, round)?));
        for &depth in &options.depths {
            for at in 0..options.choices.len() {
                let choice = &options.choices[(at + round as usize) % options.choices.len()];
                trials.push(told(setup.run(choice, depth, round)?));
            }
        }
    }
    println!("{}", table::table(&trials));
    if let Some(directory) = &options.plots {
        plot::latencies(&directory.join("latencies.svg"), &trials)?;
        plot::timeline(&directory.join("timeline.svg"), &trials)?;
    }
    if let Some(path) = &options.json {
        std::fs::write(path, serde_json::to_vec_pretty(&table::json(&trials))?)?;
    }
    Ok(())
}

fn told(trial: Trial) -> Trial {
    eprintln!("{}", table::line(&trial));
    trial
}
