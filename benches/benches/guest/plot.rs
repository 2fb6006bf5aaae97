//! Plots: the distribution of the guest's waits, and the backup over time.

use std::error::Error;
use std::path::Path;

use engine::live::Latencies;
use plotters::coord::Shift;
use plotters::prelude::*;

use super::trial::Trial;

type Result = std::result::Result<(), Box<dyn Error>>;
type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

const SIZE: (u32, u32) = (900, 420);
const MIB: f64 = 1_048_576.0;

/// The guest's depths, and the choices of the sweep's.
fn keys(trials: &[Trial]) -> (Vec<u32>, Vec<&str>) {
    let (mut depths, mut choices) = (Vec::new(), Vec::new());
    for trial in trials.iter().filter(|trial| trial.depth > 0) {
        if !depths.contains(&trial.depth) {
            depths.push(trial.depth);
        }
        if !choices.contains(&trial.choice.as_str()) {
            choices.push(trial.choice.as_str());
        }
    }
    (depths, choices)
}

fn colour(index: usize) -> RGBAColor {
    Palette99::pick(index).to_rgba()
}

/// Share of the instants at which a request would wait longer, over that wait; one picture for each depth of the guest.
pub(crate) fn latencies(path: &Path, trials: &[Trial]) -> Result {
    let (depths, choices) = keys(trials);
    let root =
        SVGBackend::new(path, (SIZE.0, SIZE.1 * u32::try_from(depths.len().max(1))?)).into_drawing_area();
    root.fill(&WHITE)?;
    for (area, &depth) in root.split_evenly((depths.len().max(1), 1)).iter().zip(&depths) {
        distribution(area, trials, depth, &choices)?;
    }
    root.present()?;
    Ok(())
}

fn distribution(area: &Area<'_>, trials: &[Trial], depth: u32, choices: &[&str]) -> Result {
    let mut chart = ChartBuilder::on(area)
        .caption(format!("4 KiB random writes, depth {depth}: waits during a backup"), ("sans-serif", 18))
        .margin(10)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d((0.01..1000.0).log_scale(), (0.0001..1.0).log_scale())?;
    chart.configure_mesh().x_desc("wait, ms").y_desc("share of instants that wait longer").draw()?;
    for (index, choice) in choices.iter().enumerate() {
        let mut all = Latencies::default();
        let of = trials.iter().filter(|trial| trial.depth == depth && trial.choice == *choice);
        of.for_each(|trial| all.merge(&trial.during));
        let points = (0..=160).map(|step| {
            let share = 10_f64.powf(-f64::from(step) / 40.0);
            (all.corrected(1.0 - share).as_secs_f64() * 1e3, share)
        });
        let points: Vec<(f64, f64)> = points.filter(|(wait, _)| *wait > 0.0).collect();
        chart
            .draw_series(LineSeries::new(points, colour(index).stroke_width(2)))?
            .label((*choice).to_owned())
            .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 20, y)], colour(index).stroke_width(2)));
    }
    chart.configure_series_labels().background_style(WHITE).border_style(BLACK).draw()?;
    Ok(())
}

/// Throughput, and bytes in flight, over the time of the first round; one row for each depth of the guest.
pub(crate) fn timeline(path: &Path, trials: &[Trial]) -> Result {
    let (depths, choices) = keys(trials);
    let rows = depths.len().max(1);
    let root = SVGBackend::new(path, (SIZE.0 * 2, SIZE.1 * u32::try_from(rows)?)).into_drawing_area();
    root.fill(&WHITE)?;
    let areas = root.split_evenly((rows, 2));
    for (row, &depth) in depths.iter().enumerate() {
        let of: Vec<&Trial> =
            trials.iter().filter(|trial| trial.depth == depth && trial.round == 0).collect();
        let rate = |trial: &Trial| {
            let pairs = trial.timeline.windows(5).step_by(2);
            let points = pairs.map(|pair| {
                let (first, last) = (pair[0], pair[4]);
                let bytes = last.done.saturating_sub(first.done) as f64;
                (last.seconds, bytes / (last.seconds - first.seconds) / MIB)
            });
            points.collect::<Vec<_>>()
        };
        let flight = |trial: &Trial| {
            trial.timeline.iter().map(|sample| (sample.seconds, sample.in_flight as f64 / MIB)).collect()
        };
        over_time(&areas[row * 2], &of, &choices, &format!("backup at depth {depth}, MiB/s"), &rate)?;
        over_time(&areas[row * 2 + 1], &of, &choices, &format!("in flight at depth {depth}, MiB"), &flight)?;
    }
    root.present()?;
    Ok(())
}

fn over_time(
    area: &Area<'_>,
    trials: &[&Trial],
    choices: &[&str],
    caption: &str,
    points: &dyn Fn(&Trial) -> Vec<(f64, f64)>,
) -> Result {
    let lines: Vec<(usize, Vec<(f64, f64)>)> = trials
        .iter()
        .filter_map(|trial| Some((choices.iter().position(|choice| *choice == trial.choice)?, points(trial))))
        .collect();
    let largest =
        |of: fn(&(f64, f64)) -> f64| lines.iter().flat_map(|(_, points)| points).map(of).fold(1e-9, f64::max);
    let mut chart = ChartBuilder::on(area)
        .caption(caption, ("sans-serif", 18))
        .margin(10)
        .x_label_area_size(30)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..largest(|point| point.0), 0.0..largest(|point| point.1) * 1.1)?;
    chart.configure_mesh().x_desc("seconds").draw()?;
    for (index, points) in lines {
        chart
            .draw_series(LineSeries::new(points, colour(index).stroke_width(2)))?
            .label(choices[index].to_owned())
            .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 20, y)], colour(index).stroke_width(2)));
    }
    chart.configure_series_labels().background_style(WHITE).border_style(BLACK).draw()?;
    Ok(())
}
