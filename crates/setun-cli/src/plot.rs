//! `setun plot`: pictures of training runs.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use setun_train::plot::{Axis, PlotOptions, plot_runs};

/// Draw one or more training runs, overlaid, as SVG.
///
/// One panel each for training loss, held-out bits per byte, learning rate, gradient norm, flip rate and zeros of the
/// ternary weights, speed and share of the machine's peak, as far as the runs have them; a colour per run, a mark per
/// held-out set. Runs that log every so many steps differently have flip rates over different intervals.
#[derive(clap::Args)]
#[command(
    after_help = "Example: setun plot out/default-model/ternary out/default-model/float --x hours --out twins.svg"
)]
pub struct PlotArgs {
    /// Output folders of training runs, or their metrics.jsonl files; a folder's name is its label
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// Horizontal axis [default: tokens, or steps where a run has no token counts]
    #[arg(long, value_name = "AXIS")]
    x: Option<X>,
    /// Lines of the metrics that one point is the mean of; 1: no smoothing [default: a fiftieth of the run's]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    smooth: Option<u32>,
    /// File to write, .svg
    #[arg(long, short, value_name = "FILE", default_value = "loss.svg")]
    out: PathBuf,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum X {
    Steps,
    Tokens,
    Hours,
}

pub fn plot(args: &PlotArgs) -> Result<()> {
    let mut runs = args.runs.iter().map(|run| labelled(run)).collect::<Result<Vec<_>>>()?;
    tell_apart(&mut runs, &args.runs);
    let axis = |x| match x {
        X::Steps => Axis::Steps,
        X::Tokens => Axis::Tokens,
        X::Hours => Axis::Hours,
    };
    let options = PlotOptions { x: args.x.map(axis), smooth: args.smooth.map(|n| n as usize) };
    plot_runs(&runs, &options, &args.out)?;
    eprintln!("{}", args.out.display());
    Ok(())
}

/// Runs whose folders have the same name are called as the user called them.
fn tell_apart(runs: &mut [(String, PathBuf)], given: &[PathBuf]) {
    let names: Vec<String> = runs.iter().map(|(name, _)| name.clone()).collect();
    for ((name, _), given) in runs.iter_mut().zip(given) {
        if names.iter().filter(|other| *other == name).count() > 1 {
            *name = given.display().to_string();
        }
    }
}

fn labelled(run: &Path) -> Result<(String, PathBuf)> {
    let file = if run.is_dir() { run.join("metrics.jsonl") } else { run.to_owned() };
    let folder = file.canonicalize().with_context(|| format!("cannot find {}", file.display()))?;
    let name = folder.parent().and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
    Ok((name.unwrap_or_else(|| "run".into()), file))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_in_folders_of_the_same_name_are_told_apart_by_their_paths() {
        let given: Vec<PathBuf> = ["a/out", "b/out", "c/other"].map(PathBuf::from).into();
        let name = |path: &PathBuf| path.file_name().unwrap().to_string_lossy().into_owned();
        let mut runs: Vec<_> = given.iter().map(|path| (name(path), path.clone())).collect();
        tell_apart(&mut runs, &given);
        assert_eq!(
            runs.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(),
            ["a/out", "b/out", "other"]
        );
    }
}
