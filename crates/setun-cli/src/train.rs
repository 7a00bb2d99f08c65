//! `setun train`: a training run from its TOML file.

mod live;

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use indicatif::ProgressBar;
use setun_train::config::TrainConfig;
use setun_train::data::Score;
use setun_train::export::{ExportOptions, export};
use setun_train::feed::Feed;
use setun_train::metrics::Metrics;
use setun_train::plot::{PlotOptions, plot_runs};
use setun_train::trainer::{Progress, StepReport, Trainer};

use self::live::Live;
use crate::interrupt::Interrupt;
use crate::prepare::Prepare;
use crate::{model, output, progress};

/// Train a model as a TOML file says: ternary (BitNet b1.58), or its float twin.
///
/// A run that was stopped goes on from its newest checkpoint, to the same bits as if it had never stopped. Ctrl-C
/// writes a checkpoint first. A loss that rises and stays, or is no number, stops it too, and the message names the last
/// good checkpoint (`spike_deviations`, `spike_steps` and `spike_window` under `[train]`). The output folder then holds
/// `metrics.jsonl`, of ternary models every matrix in `layers.jsonl`, the same for TensorBoard, the curves `loss.svg`,
/// checkpoints, and the trained model in `model/`, which every other command and the transformers library read.
#[derive(clap::Args)]
#[command(after_help = "Example: setun train runs/smoke.toml && setun run out/smoke/model -p 'Once'")]
pub struct TrainArgs {
    /// Settings of the run; paths in it are relative to its folder
    config: PathBuf,
    /// Threads, instead of what the file says
    #[arg(long, value_name = "N", value_parser = model::threads)]
    threads: Option<usize>,
    /// Output folder, instead of what the file says
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// Print a summary as one JSON object when done
    #[arg(long)]
    json: bool,
}

pub fn train(args: TrainArgs) -> Result<()> {
    let mut config = TrainConfig::load(&args.config)?;
    config.train.threads = args.threads.or(config.train.threads);
    if let Some(out) = args.out {
        config.train.out = out;
    }
    for warning in config.warnings() {
        eprintln!("note: {warning}");
    }
    let mut prepare = Prepare::new();
    let mut trainer = Trainer::open_watched(config, &mut |now| prepare.show(now))?;
    drop(prepare);
    let (begun, total) = (trainer.steps_taken(), trainer.config().total_steps());
    if begun > 0 {
        eprintln!("going on after step {begun} of {total}");
    }
    let last = watched(&mut trainer)?;

    let out = trainer.config().train.out.clone();
    let folder = out.join("model");
    let shape = trainer.config().model_config(trainer.vocabulary().end_of_text())?;
    let (sampling, group) = (trainer.config().sampling, trainer.config().recipe(trainer.steps_taken()).group);
    let options = ExportOptions { sampling, group, ..ExportOptions::default() };
    export(&folder, &shape, trainer.params(), trainer.vocabulary(), &options)?;
    let curve = out.join("loss.svg");
    let label = out.file_name().map_or("run".into(), |name| name.to_string_lossy().into_owned());
    plot_runs(&[(label, out.join("metrics.jsonl"))], &PlotOptions::default(), &curve)?;
    eprintln!("model in {}, curves in {}", folder.display(), curve.display());
    if args.json {
        let scores = trainer.evaluate_all(None);
        let scores: serde_json::Map<_, _> = scores
            .iter()
            .map(|(name, s)| {
                (name.clone(), serde_json::json!({ "loss": s.loss(), "bits_per_byte": s.bits_per_byte() }))
            })
            .collect();
        output::print_json(&serde_json::json!({
            "steps": total,
            "tokens": last.map(|r| r.tokens),
            "seconds": last.map(|r| r.elapsed),
            "loss": last.map(|r| r.loss),
            "held_out": scores,
            "model": folder,
            "curve": curve,
        }))?;
    }
    Ok(())
}

/// Trains to the end, shown on stderr; returns the last step, if there was one.
pub fn watched<F: Feed>(trainer: &mut Trainer<F>) -> Result<Option<StepReport>> {
    let (begun, total) = (trainer.steps_taken(), trainer.config().total_steps());
    let interrupt = Interrupt::install()?;
    let bar = progress::training(begun, total);
    interrupt.begin();
    let mut watch = Watch { bar: &bar, interrupt: &interrupt, live: Live::default(), total };
    let ran = trainer.run(&mut watch);
    let last = watch.live.last();
    interrupt.end();
    bar.finish_and_clear();
    ran?;
    if trainer.steps_taken() < total {
        bail!("stopped after step {} of {total}: the same command goes on from there", trainer.steps_taken());
    }
    Ok(last)
}

/// Shows a run on stderr: a panel for people, lines for log files.
struct Watch<'a> {
    bar: &'a ProgressBar,
    interrupt: &'a Interrupt,
    live: Live,
    total: u64,
}

impl Progress for Watch<'_> {
    fn step(&mut self, report: &StepReport) {
        self.live.step(report);
        self.bar.set_position(report.step);
        self.bar.set_message(self.live.panel());
    }

    fn evaluated(&mut self, step: u64, scores: &[(String, Score)]) {
        self.live.evaluated(step, scores);
        let loss = self.live.last().map_or(f64::NAN, |report| report.loss);
        let held_out = live::held_out(scores);
        // Stays above the panel, so that a long run can be read back.
        self.bar.suspend(|| eprintln!("step {step}: training loss {loss:.3}, held out {held_out}"));
    }

    fn logged(&mut self, line: &Metrics) {
        self.live.logged(line);
        self.bar.set_message(self.live.panel());
        if self.bar.is_hidden()
            && let Some(text) = live::plain(line, self.total)
        {
            eprintln!("{text}");
        }
    }

    fn saved(&mut self, folder: &Path) {
        if self.bar.is_hidden() {
            eprintln!("checkpoint {}", folder.display());
        }
    }

    fn stop(&mut self) -> bool {
        self.interrupt.asked()
    }
}
