//! `setun plot`: pictures of training runs.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use setun_train::plot::plot_runs;

/// Draw the loss curves of one or more training runs, overlaid, as SVG.
///
/// Lines are training loss, marks are held-out losses, in nats per token over the training tokens seen.
#[derive(clap::Args)]
#[command(
    after_help = "Example: setun plot out/default-model/ternary out/default-model/float --out twins.svg"
)]
pub struct PlotArgs {
    /// Output folders of training runs, or their metrics.jsonl files; a folder's name is its label
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// SVG file to write
    #[arg(long, short, value_name = "FILE", default_value = "loss.svg")]
    out: PathBuf,
}

pub fn plot(args: &PlotArgs) -> Result<()> {
    let runs = args.runs.iter().map(|run| labelled(run)).collect::<Result<Vec<_>>>()?;
    plot_runs(&runs, &args.out)?;
    eprintln!("{}", args.out.display());
    Ok(())
}

fn labelled(run: &Path) -> Result<(String, PathBuf)> {
    let file = if run.is_dir() { run.join("metrics.jsonl") } else { run.to_owned() };
    let folder = file.canonicalize().with_context(|| format!("cannot find {}", file.display()))?;
    let name = folder.parent().and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
    Ok((name.unwrap_or_else(|| "run".into()), file))
}
