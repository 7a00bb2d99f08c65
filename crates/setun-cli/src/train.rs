//! `setun train`: a training run from its TOML file.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use indicatif::ProgressBar;
use setun_train::config::TrainConfig;
use setun_train::data::Score;
use setun_train::export::{ExportOptions, export};
use setun_train::plot::plot_runs;
use setun_train::trainer::{Progress, StepReport, Trainer};

use crate::interrupt::Interrupt;
use crate::{model, output, progress};

/// Train a model as a TOML file says: ternary (BitNet b1.58), or its float twin.
///
/// A run that was stopped goes on from its newest checkpoint, to the same bits as if it had never stopped. Ctrl-C
/// writes a checkpoint first. The output folder then holds `metrics.jsonl`, the loss curve `loss.svg`, checkpoints, and the
/// trained model in `model/`, which every other command and the transformers library read.
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
    let busy = progress::spinner();
    busy.set_message("preparing tokenizer and text");
    let mut trainer = Trainer::open(config)?;
    busy.finish_and_clear();
    let (begun, total) = (trainer.steps_taken(), trainer.config().total_steps());
    if begun > 0 {
        eprintln!("going on after step {begun} of {total}");
    }
    let interrupt = Interrupt::install()?;
    let bar = progress::steps(begun, total);
    interrupt.begin();
    let mut watch = Watch { bar: &bar, interrupt: &interrupt, last: None };
    trainer.run(&mut watch)?;
    let last = watch.last;
    interrupt.end();
    bar.finish_and_clear();
    if trainer.steps_taken() < total {
        bail!("stopped after step {} of {total}: the same command goes on from there", trainer.steps_taken());
    }

    let out = trainer.config().train.out.clone();
    let folder = out.join("model");
    let shape = trainer.config().model_config(trainer.vocabulary().end_of_text())?;
    let options = ExportOptions { sampling: trainer.config().sampling, ..ExportOptions::default() };
    export(&folder, &shape, trainer.params(), trainer.vocabulary(), &options)?;
    let curve = out.join("loss.svg");
    let label = out.file_name().map_or("run".into(), |name| name.to_string_lossy().into_owned());
    plot_runs(&[(label, out.join("metrics.jsonl"))], &curve)?;
    eprintln!("model in {}, loss curve in {}", folder.display(), curve.display());
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

/// Shows a run on stderr: a bar for people, lines for log files.
pub struct Watch<'a> {
    pub bar: &'a ProgressBar,
    pub interrupt: &'a Interrupt,
    pub last: Option<StepReport>,
}

impl Progress for Watch<'_> {
    fn step(&mut self, report: &StepReport) {
        self.bar.set_position(report.step);
        self.bar.set_message(format!("loss {:.3}, {} tok/s", report.loss, output::rate(report.tokens_per_s)));
        self.last = Some(*report);
    }

    fn evaluated(&mut self, step: u64, scores: &[(String, Score)]) {
        let loss = self.last.map_or(f64::NAN, |report| report.loss);
        let held_out = scores
            .iter()
            .map(|(name, s)| format!("{name} {:.4} ({:.3} bits/byte)", s.loss(), s.bits_per_byte()));
        let held_out: Vec<String> = held_out.collect();
        self.bar
            .suspend(|| eprintln!("step {step}: training loss {loss:.3}, held out {}", held_out.join(", ")));
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
