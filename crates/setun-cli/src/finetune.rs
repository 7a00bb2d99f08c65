//! `setun finetune`: a model trained further.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use setun::lora::Adapter;
use setun::tokenizer::Tokenizer;
use setun_train::data::Score;
use setun_train::export::{ExportOptions, export_of};
use setun_train::feed::Feed;
use setun_train::finetune::lora::LoraSection;
use setun_train::finetune::merge::Flips;
use setun_train::finetune::{Base, DEFAULT_LR, LORA_LR, Length, Settings};
use setun_train::plot::{PlotOptions, plot_runs};
use setun_train::trainer::Trainer;

use crate::train::watched;
use crate::{WrongUsage, default_model, model, output, progress};

/// Train a model further, on documents or on conversations: any ternary (BitNet) or float model of the Llama and Qwen kind.
///
/// Data is text (documents between lines that say <|endoftext|>), or .jsonl with one document, {"text": …}, or one conversation,
/// {"messages": [{"role": …, "content": …}, …]}, a line. Conversations are written by the model's chat template, only what the
/// assistant says counts, and several share a sequence. All weights are trained; ternary layers through masters: the
/// model's own where its file has them, else ones that round to the same weights.
///
/// With --lora the model stays as it is, in its two bits per weight, and small adapters are trained beside it: `adapter/` then holds
/// them as PEFT does, for `setun run MODEL --lora FOLDER`. --merge makes one model of both.
///
/// With --dpo, data is .jsonl with one pair, {"prompt": …, "chosen": …, "rejected": …}, a line, and the model learns to prefer the
/// chosen answers (direct preference optimisation); `metrics.jsonl` has the margin and the share of pairs it gets right.
///
/// A run that was stopped goes on from its newest checkpoint, to the same bits as if it had never stopped; Ctrl-C writes
/// one first. The output folder then holds `metrics.jsonl`, `loss.svg`, checkpoints, and the new model in `model/`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  setun finetune MODEL --data poems.txt --valid more-poems.txt --out poet && setun run poet/model -p 'O '
  setun finetune MODEL --data talks.jsonl --epochs 3 --out talker
  setun finetune --data talks.jsonl --chat-template chatml.jinja --out talker   the model in the program
  setun finetune MODEL --data talks.jsonl --lora 16 --out small && setun run MODEL --lora small/adapter
  setun finetune MODEL --merge small/adapter --valid talks-kept-back.jsonl --out merged
  setun finetune MODEL --data pairs.jsonl --dpo --out preferring")]
pub struct FinetuneArgs {
    /// Model file (GGUF, safetensors), folder or hub name (OWNER/NAME[:FILE]) [default: the model in the program]
    model: Option<PathBuf>,
    /// Files or folders to train on
    #[arg(long, value_name = "FILE", num_args = 1.., required_unless_present = "merge")]
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
    /// Learning rate at its peak; it rises over a fifteenth of the run and falls along half a cosine to zero [default: 5e-4; 2e-3 with
    /// --lora; a tenth of that with --dpo]
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
    /// Train adapters of this rank and leave the model as it is
    #[arg(long, value_name = "RANK", help_heading = "Adapters")]
    lora: Option<usize>,
    /// What adapters add is multiplied by this over the rank [default: twice the rank]
    #[arg(long, value_name = "X", requires = "lora", help_heading = "Adapters")]
    lora_alpha: Option<f64>,
    /// Layers that get an adapter
    #[arg(
        long,
        value_name = "NAMES",
        requires = "lora",
        value_delimiter = ',',
        default_value = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
        help_heading = "Adapters"
    )]
    lora_targets: Vec<String>,
    /// Train nothing: merge this adapter into the model, ternary layers into the nearest ternary ones, and measure the loss on --valid
    /// before and after
    #[arg(long, value_name = "FOLDER", conflicts_with_all = ["data", "lora", "dpo"], help_heading = "Adapters")]
    merge: Option<PathBuf>,
    /// Learn to prefer one answer to another, from pairs
    #[arg(long, help_heading = "Preferences")]
    dpo: bool,
    /// How much a preference counts against staying as it was
    #[arg(long, value_name = "X", default_value_t = 0.1, requires = "dpo", help_heading = "Preferences")]
    beta: f64,
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
    if let Some(folder) = &args.merge {
        return merge(&base, folder, &settings, args.json);
    }
    let busy = progress::spinner();
    busy.set_message("reading the data and the model");
    let mut notes = Vec::new();
    let told = &mut |note| notes.push(note);
    let name = args.model.as_deref().unwrap_or(Path::new(default_model::NAME));
    if args.dpo {
        let trainer = base.prefer(&settings, told);
        busy.finish_and_clear();
        notes.iter().for_each(|note| eprintln!("note: {note}"));
        let mut trainer = trainer?;
        eprintln!("{} pairs; {} steps", trainer.feed().len(), trainer.config().total_steps());
        let done = drive(&mut trainer)?;
        return done.report(&settings.out, &save(&base, &trainer, &settings, name)?, args.json);
    }
    let trainer = base.train(&settings, told);
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
    done.report(&settings.out, &save(&base, &trainer, &settings, name)?, args.json)
}

/// Writes the model, or its adapters.
fn save<F: Feed>(base: &Base, trainer: &Trainer<F>, settings: &Settings, name: &Path) -> Result<PathBuf> {
    if settings.lora.is_some() {
        let folder = settings.out.join("adapter");
        base.export_adapter(trainer, &folder, name)?;
        return Ok(folder);
    }
    let folder = settings.out.join("model");
    export_of(base, &folder, trainer.params(), &ExportOptions::default())?;
    Ok(folder)
}

fn merge(base: &Base, adapter: &Path, settings: &Settings, json: bool) -> Result<()> {
    let adapter = Adapter::open(adapter)?;
    let (params, merge) = base.merge(&adapter, settings)?;
    let folder = settings.out.join("model");
    std::fs::create_dir_all(&settings.out)
        .with_context(|| format!("cannot create {}", settings.out.display()))?;
    export_of(base, &folder, &params, &ExportOptions::default())?;
    for (what, score) in
        [("before", merge.before), ("with the adapter", merge.with_adapter), ("merged", merge.merged)]
    {
        if let Some(score) = score {
            eprintln!("{what}: held out {:.4} ({:.3} bits/byte)", score.loss(), score.bits_per_byte());
        }
    }
    let Flips { weights, changed } = merge.flips;
    eprintln!(
        "{} of {} ternary weights changed; model in {}",
        output::count(changed),
        output::count(weights),
        folder.display()
    );
    if json {
        let score = |s: Option<Score>| {
            s.map(|s| serde_json::json!({ "loss": s.loss(), "bits_per_byte": s.bits_per_byte() }))
        };
        output::print_json(&serde_json::json!({
            "held_out_before": score(merge.before),
            "held_out_with_adapter": score(merge.with_adapter),
            "held_out": score(merge.merged),
            "ternary_weights": weights,
            "changed": changed,
            "model": folder,
        }))?;
    }
    Ok(())
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
            lr: self.lr.unwrap_or_else(|| {
                let lr = if self.lora.is_some() { LORA_LR } else { DEFAULT_LR };
                if self.dpo { lr / 10.0 } else { lr }
            }),
            weight_decay: self.weight_decay,
            seed: self.seed,
            threads: self.threads,
            eval_every: self.eval_every,
            checkpoint_every: self.checkpoint_every,
            out: self.out.clone(),
            lora: self.lora.map(|rank| LoraSection {
                rank,
                alpha: self.lora_alpha.unwrap_or(2.0 * rank as f64),
                targets: self.lora_targets.clone(),
            }),
            beta: self.beta,
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
    let last = watched(trainer)?;
    let (loss, seconds) = (last.map(|r| r.loss), last.map(|r| r.elapsed));
    Ok(Done { before, after: score(trainer), steps: total, loss, seconds })
}

impl Done {
    fn report(&self, out: &Path, made: &Path, json: bool) -> Result<()> {
        let curve = out.join("loss.svg");
        let label = out.file_name().map_or("run".into(), |name| name.to_string_lossy().into_owned());
        plot_runs(&[(label, out.join("metrics.jsonl"))], &PlotOptions::default(), &curve)?;
        let last = setun_train::metrics::read(&out.join("metrics.jsonl"))?.pop();
        let measure = |name: &str| last.as_ref().and_then(|line| line.other.get(name)?.as_f64());
        if let (Some(margin), Some(accuracy)) = (measure("dpo_margin"), measure("dpo_accuracy")) {
            eprintln!(
                "last steps: margin {margin:.3}, {:.0} % of the pairs in the right order",
                100.0 * accuracy
            );
        }
        let what = if made.ends_with("adapter") { "adapter" } else { "model" };
        eprintln!("{what} in {}, loss curve in {}", made.display(), curve.display());
        if json {
            let score =
                |s: &Score| serde_json::json!({ "loss": s.loss(), "bits_per_byte": s.bits_per_byte() });
            output::print_json(&serde_json::json!({
                "steps": self.steps,
                "seconds": self.seconds,
                "loss": self.loss,
                "held_out_before": self.before.as_ref().map(score),
                "held_out": self.after.as_ref().map(score),
                "dpo_margin": measure("dpo_margin"),
                "dpo_accuracy": measure("dpo_accuracy"),
                "model": made,
                "curve": curve,
            }))?;
        }
        Ok(())
    }
}
