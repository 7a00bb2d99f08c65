//! `setun finetune`: a model trained further.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use setun::tokenizer::Tokenizer;
use setun_train::data::Score;
use setun_train::export::{ExportOptions, export_of};
use setun_train::feed::Feed;
use setun_train::finetune::{Base, Length, Settings};
use setun_train::plot::plot_runs;
use setun_train::trainer::Trainer;

use crate::interrupt::Interrupt;
use crate::train::Watch;
use crate::{WrongUsage, model, output, progress};

/// Train a model further, on documents or on conversations: any ternary (BitNet) or float model of the Llama and Qwen kind.
///
/// Data is text (documents between lines that say <|endoftext|>), or .jsonl with one document, {"text": …}, or one conversation,
/// {"messages": [{"role": …, "content": …}, …]}, a line. Conversations are written by the model's chat template, only what the
/// assistant says counts, and several share a sequence. All weights are trained; ternary layers through masters: the
/// model's own where its file has them, else ones that round to the same weights.
///
/// A run that was stopped goes on from its newest checkpoint, to the same bits as if it had never stopped; Ctrl-C writes
/// one first. The output folder then holds `metrics.jsonl`, `loss.svg`, checkpoints, and the new model in `model/`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  setun finetune MODEL --data poems.txt --valid more-poems.txt --out poet && setun run poet/model -p 'O '
  setun finetune MODEL --data talks.jsonl --epochs 3 --out talker
  setun finetune --data talks.jsonl --chat-template chatml.jinja --out talker   the model in the program")]
pub struct FinetuneArgs {
    /// Model file (GGUF, safetensors), folder or hub name (OWNER/NAME[:FILE]) [default: the model in the program]
    model: Option<PathBuf>,
    /// Files or folders to train on
    #[arg(long, value_name = "FILE", num_args = 1.., required = true)]
    data: Vec<PathBuf>,
    /// Files or folders to measure on, never trained on
    #[arg(long, value_name = "FILE", num_args = 1..)]
    valid: Vec<PathBuf>,
    /// Output folder
    #[arg(long, value_name = "FOLDER", default_value = "out/finetune")]
    out: PathBuf,
    /// Optimiser steps, instead of --epochs
    #[arg(long, value_name = "N", conflicts_with = "epochs", value_parser = clap::value_parser!(u64).range(1..))]
    steps: Option<u64>,
    /// How often everything is read
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    epochs: f64,
    /// Learning rate at its peak; it rises over a fifteenth of the run and falls along half a cosine to zero [default: 5e-4]
    #[arg(long, value_name = "X")]
    lr: Option<f64>,
    /// Sequences per pass
    #[arg(long, value_name = "N", default_value_t = 8)]
    batch: usize,
    /// Passes whose gradients are averaged into one step
    #[arg(long, value_name = "N", default_value_t = 1)]
    accumulation: usize,
    /// Tokens of a sequence [default: 512, or the model's limit]
    #[arg(long, value_name = "N")]
    seq_len: Option<usize>,
    /// Decoupled weight decay
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    weight_decay: f64,
    /// Seed of the order of the data
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Steps between measurements on --valid; 0: before the first and after the last only
    #[arg(long, value_name = "N", default_value_t = 50)]
    eval_every: u64,
    /// Steps between checkpoints; 0: after the last only
    #[arg(long, value_name = "N", default_value_t = 100)]
    checkpoint_every: u64,
    /// Chat template for conversations, a file with Jinja source; the new model keeps it [default: the model's own]
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// Threads; any number gives the same result [default: the physical cores this process may use]
    #[arg(long, value_name = "N", value_parser = model::threads)]
    threads: Option<usize>,
    /// Tokenizer to use instead of the model's own: tokenizer.json, tokenizer.model, a GGUF file or a folder
    #[arg(long, value_name = "FILE", help_heading = "Loading")]
    tokenizer: Option<PathBuf>,
    #[command(flatten)]
    open: model::OpenArgs,
    /// Print a summary as one JSON object when done
    #[arg(long)]
    json: bool,
}

pub fn finetune(args: FinetuneArgs) -> Result<()> {
    let file = args.open.open(args.model.as_deref())?;
    let tokenizer = match &args.tokenizer {
        Some(path) => model::tokenizer_at(path)?,
        None => Tokenizer::of(&file)?,
    };
    let read = |path: &PathBuf| {
        std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the chat template {}", path.display()))
    };
    let template = args.chat_template.as_ref().map(read).transpose()?;
    let base = Base::new(&file, &tokenizer, template)?;
    let settings = args.settings()?;
    for (path, kind) in args
        .data
        .iter()
        .zip(std::iter::repeat("--data"))
        .chain(args.valid.iter().zip(std::iter::repeat("--valid")))
    {
        if !path.exists() {
            bail!("{kind} {}: there is no such file", path.display());
        }
    }
    let busy = progress::spinner();
    busy.set_message("reading the data and the model");
    let mut notes = Vec::new();
    let trainer = base.train(&settings, &mut |note| notes.push(note));
    busy.finish_and_clear();
    notes.iter().for_each(|note| eprintln!("note: {note}"));
    let mut trainer = trainer?;
    let [tokens, counted] = trainer.feed().tokens();
    eprintln!(
        "{} documents and conversations, {} tokens, {} of them to be predicted; {} steps",
        trainer.feed().len(),
        output::count(tokens),
        output::count(counted),
        trainer.config().total_steps()
    );
    let done = drive(&mut trainer)?;
    let folder = settings.out.join("model");
    export_of(&base, &folder, trainer.params(), &ExportOptions::default())?;
    done.report(&settings.out, &folder, args.json)
}

impl FinetuneArgs {
    fn settings(&self) -> Result<Settings> {
        if self.open.weights.is_some() && self.model.is_none() {
            return Err(WrongUsage("--weights needs a model to be about".into()).into());
        }
        let defaults = Settings::default();
        Ok(Settings {
            data: self.data.clone(),
            valid: self.valid.clone(),
            length: self.steps.map_or(Length::Epochs(self.epochs), Length::Steps),
            seq_len: self.seq_len,
            batch: self.batch,
            accumulation: self.accumulation,
            lr: self.lr.unwrap_or(defaults.lr),
            weight_decay: self.weight_decay,
            seed: self.seed,
            threads: self.threads,
            eval_every: self.eval_every,
            checkpoint_every: self.checkpoint_every,
            out: self.out.clone(),
            ..defaults
        })
    }
}

/// What a finished run did.
struct Done {
    before: Option<Score>,
    after: Option<Score>,
    steps: u64,
    loss: Option<f64>,
    seconds: Option<f64>,
}

/// Trains to the end, measuring before and after.
fn drive<F: Feed>(trainer: &mut Trainer<F>) -> Result<Done> {
    let (begun, total) = (trainer.steps_taken(), trainer.config().total_steps());
    let score = |trainer: &Trainer<F>| trainer.evaluate_all(None).first().map(|(_, score)| *score);
    let mut before = None;
    match begun {
        0 => {
            before = score(trainer);
            if let Some(score) = &before {
                eprintln!("before: held out {:.4} ({:.3} bits/byte)", score.loss(), score.bits_per_byte());
            }
        }
        _ => eprintln!("going on after step {begun} of {total}"),
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
    let (loss, seconds) = (last.map(|r| r.loss), last.map(|r| r.elapsed));
    Ok(Done { before, after: score(trainer), steps: total, loss, seconds })
}

impl Done {
    fn report(&self, out: &Path, made: &Path, json: bool) -> Result<()> {
        let curve = out.join("loss.svg");
        let label = out.file_name().map_or("run".into(), |name| name.to_string_lossy().into_owned());
        plot_runs(&[(label, out.join("metrics.jsonl"))], &curve)?;
        eprintln!("model in {}, loss curve in {}", made.display(), curve.display());
        if json {
            let score =
                |s: &Score| serde_json::json!({ "loss": s.loss(), "bits_per_byte": s.bits_per_byte() });
            output::print_json(&serde_json::json!({
                "steps": self.steps,
                "seconds": self.seconds,
                "loss": self.loss,
                "held_out_before": self.before.as_ref().map(score),
                "held_out": self.after.as_ref().map(score),
                "model": made,
                "curve": curve,
            }))?;
        }
        Ok(())
    }
}
