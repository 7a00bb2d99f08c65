//! `setun eval`: how well a model predicts a text.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use setun::eval::{Windows, perplexity};
use setun::kv_cache::KvType;

use crate::model::{self, LoadArgs};
use crate::{output, progress};

/// Measure a model on the kernels that run it.
#[derive(clap::Args)]
pub struct EvalArgs {
    #[command(subcommand)]
    task: Task,
}

#[derive(clap::Subcommand)]
enum Task {
    Ppl(PplArgs),
}

/// Perplexity and bits per byte of a text file.
///
/// Protocol `strided`: the file is one sequence of tokens, with a start token if the tokenizer adds one, cut into windows of
/// --window tokens that advance by --stride; every token but the first is scored once, with at least window - stride tokens
/// before it (fewer at the start of the text). Bits per byte do not depend on the tokenizer.
#[derive(clap::Args)]
#[command(
    after_help = "Example: setun eval ppl --model MODEL --file wiki.test.raw --window 2048 --stride 1024"
)]
struct PplArgs {
    /// Model file (GGUF, safetensors, llama2.c), folder or hub name (OWNER/NAME[:FILE]) [default: the model in the program]
    #[arg(long, value_name = "MODEL")]
    model: Option<PathBuf>,
    /// Text file, UTF-8
    #[arg(long, value_name = "FILE")]
    file: PathBuf,
    /// Tokens of a window [default: what the model was made for]
    #[arg(long, value_name = "N", value_parser = model::positive)]
    window: Option<usize>,
    /// New tokens per window [default: half of it]
    #[arg(long, value_name = "N", value_parser = model::positive)]
    stride: Option<usize>,
    /// Print one JSON object instead of a line of text
    #[arg(long)]
    json: bool,
    /// Type of the keys and values kept for attention: f32, f16, int8 or int4
    #[arg(long, value_name = "TYPE", value_parser = model::kv_type, default_value = "f32", help_heading = "Loading")]
    kv: KvType,
    #[command(flatten)]
    load: LoadArgs,
}

pub fn eval(args: EvalArgs) -> Result<()> {
    match args.task {
        Task::Ppl(args) => ppl(&args),
    }
}

fn ppl(args: &PplArgs) -> Result<()> {
    let text = std::fs::read_to_string(&args.file)
        .with_context(|| format!("cannot read {} as UTF-8 text", args.file.display()))?;
    let file = args.load.open.open(args.model.as_deref())?;
    let tokenizer = args.load.tokenizer(&file)?;
    let engine = args.load.engine(&file)?;
    model::needs_text(engine.config())?;
    let context = args.window.or(args.load.context).unwrap_or(engine.config().max_positions);
    let windows = Windows { context, stride: args.stride.unwrap_or((context / 2).max(1)) };
    let started = Instant::now();
    let bar = progress::steps(0, 0);
    let found = perplexity(&engine, &tokenizer, &text, windows, args.kv, &mut |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    })
    .with_context(|| args.file.display().to_string())?;
    bar.finish_and_clear();
    let seconds = started.elapsed().as_secs_f64();
    if args.json {
        return output::print_json(&serde_json::json!({
            "perplexity": found.perplexity(),
            "bits_per_byte": found.bits_per_byte(),
            "nats_per_token": found.nats / found.tokens as f64,
            "tokens": found.tokens,
            "bytes": found.bytes,
            "protocol": "strided",
            "window": windows.context,
            "stride": windows.stride,
            "kv": args.kv.to_string(),
            "kernel": engine.kernels().name(),
            "activations": engine.activations().to_string(),
            "seconds": seconds,
        }));
    }
    output::print(&format!(
        "perplexity {:.3}, {:.4} bits per byte over {} tokens ({} bytes), strided windows of {} by {}\n",
        found.perplexity(),
        found.bits_per_byte(),
        found.tokens,
        found.bytes,
        windows.context,
        windows.stride
    ))?;
    eprintln!("{:.1} s, {:.0} tokens/s", seconds, found.tokens as f64 / seconds);
    Ok(())
}
