//! `setun logits`: what a model computes, for comparison with other programs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use setun::engine::{Engine, Taps};
use setun::error::ModelError;
use setun::format::{Encoding, SafetensorsWriter, TensorSpec};
use setun::kv_cache::KvType;

use crate::model::{self, LoadArgs};
use crate::output;

/// Write a model's logits for given token ids: the tool for comparing with another program.
///
/// Each list of ids is computed as one sequence from position 0; no special token is added. The result holds
/// `logits.0`, `logits.1`, …, f32 [tokens, vocabulary] (none of an embedding model); with --hidden also `hidden.embed.0`, `hidden.layer0.0`
/// (outputs of the blocks), …, `hidden.final_norm.0`. Keys and values are kept in f32 unless --kv says otherwise.
#[derive(clap::Args)]
#[command(
    after_help = "Example: echo '[[1, 403, 407]]' > ids.json && setun logits MODEL --tokens ids.json --out o.safetensors"
)]
pub struct LogitsArgs {
    /// Model file (GGUF, safetensors, llama2.c), folder or hub name (OWNER/NAME[:FILE])
    model: Option<PathBuf>,
    /// JSON file with a list of lists of token ids
    #[arg(long, value_name = "FILE")]
    tokens: PathBuf,
    /// File to write: safetensors, or JSON if its name ends in .json [default: JSON to stdout]
    #[arg(long, short, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Also write the hidden states after the embedding, every block and the final norm
    #[arg(long)]
    hidden: bool,
    /// Print what was done, and how fast, as JSON on stdout
    #[arg(long, requires = "out")]
    json: bool,
    /// Type of the keys and values that attention reads: f32, f16, int8 or int4
    #[arg(long, value_name = "TYPE", value_parser = model::kv_type, default_value = "f32", help_heading = "Loading")]
    kv: KvType,
    #[command(flatten)]
    load: LoadArgs,
}

/// One result: its name, its shape `[rows, width]`, its values.
struct Output {
    name: String,
    width: usize,
    values: Vec<f32>,
}

pub fn logits(args: LogitsArgs) -> Result<()> {
    let sequences = read_ids(&args.tokens)?;
    let file = args.load.open.open(args.model.as_deref())?;
    let engine = args.load.engine(&file)?;
    if !args.hidden {
        model::needs_text(engine.config())?;
    }
    let longest = sequences.iter().map(Vec::len).max().unwrap_or(0);
    // Comparisons beyond the trained context are legitimate, so only --context limits the length.
    let limit = args.load.context.unwrap_or_else(|| longest.max(engine.config().max_positions));
    if longest > engine.config().max_positions {
        eprintln!(
            "note: {longest} tokens are more than the {} positions the model was made for",
            engine.config().max_positions
        );
    }
    let started = Instant::now();
    let mut outputs = Vec::new();
    for (n, ids) in sequences.iter().enumerate() {
        compute(&engine, args.kv, limit, ids, n, args.hidden, &mut outputs)
            .with_context(|| format!("sequence {n}"))?;
    }
    let seconds = started.elapsed().as_secs_f64();
    if let Some(output) = outputs.iter().find(|o| o.values.iter().any(|v| !v.is_finite())) {
        eprintln!(
            "note: {} holds values that are not finite numbers (null in JSON): `setun info` names the tensors at fault",
            output.name
        );
    }
    match &args.out {
        Some(path) if path.extension().is_some_and(|e| e == "json") => write_json(path, &outputs)?,
        Some(path) => write_safetensors(path, &outputs)?,
        None => output::print(&to_json(&outputs)?)?,
    }
    let tokens: usize = sequences.iter().map(Vec::len).sum();
    eprintln!("{} sequences, {tokens} tokens in {seconds:.2} s", sequences.len());
    if args.json {
        output::print_json(&serde_json::json!({
            "sequences": sequences.len(),
            "tokens": tokens,
            "seconds": seconds,
            "vocab_size": engine.config().vocab_size,
            "kernel": engine.kernels().name(),
            "threads": engine.pool().threads(),
            "activations": engine.activations().to_string(),
            "kv": args.kv.to_string(),
            "tensors": outputs.iter().map(|o| o.name.as_str()).collect::<Vec<_>>(),
        }))?;
    }
    Ok(())
}

fn compute(
    engine: &Engine,
    kv: KvType,
    limit: usize,
    ids: &[u32],
    n: usize,
    hidden: bool,
    outputs: &mut Vec<Output>,
) -> Result<(), ModelError> {
    let mut session = engine.session(kv, Some(limit));
    let mut taps = Taps::new();
    let values = session.feed_all(ids, hidden.then_some(&mut taps))?.to_vec();
    // Without a head there are no logits.
    if engine.config().pooling.is_none() {
        outputs.push(Output { name: format!("logits.{n}"), width: engine.config().vocab_size, values });
    }
    let width = engine.config().hidden_size;
    outputs.extend(taps.into_iter().map(|(tap, values)| Output {
        name: format!("hidden.{tap}.{n}"),
        width,
        values,
    }));
    Ok(())
}

fn read_ids(path: &Path) -> Result<Vec<Vec<u32>>> {
    let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let sequences: Vec<Vec<u32>> = serde_json::from_slice(&text).with_context(|| {
        format!("{}: a JSON list of lists of token ids is expected, like [[1, 2], [3]]", path.display())
    })?;
    if sequences.is_empty() {
        bail!("{}: there is no sequence in it", path.display());
    }
    Ok(sequences)
}

fn write_safetensors(path: &Path, outputs: &[Output]) -> Result<()> {
    let spec = |o: &Output| TensorSpec {
        name: o.name.clone(),
        shape: vec![o.values.len() / o.width, o.width],
        encoding: Encoding::F32,
    };
    // All are f32, so the writer keeps their order.
    let mut file = SafetensorsWriter::create(path, &[], outputs.iter().map(spec).collect())?;
    for output in outputs {
        let bytes: Vec<u8> = output.values.iter().flat_map(|v| v.to_le_bytes()).collect();
        file.tensor(&bytes)?;
    }
    Ok(file.finish()?)
}

fn write_json(path: &Path, outputs: &[Output]) -> Result<()> {
    let partial = path.with_extension(format!("json.{}.partial", std::process::id()));
    let written = std::fs::write(&partial, to_json(outputs)?).and_then(|()| std::fs::rename(&partial, path));
    written.with_context(|| {
        let _ = std::fs::remove_file(&partial);
        format!("cannot write {}", path.display())
    })
}

/// f32 values are written with the digits that f32 needs.
fn to_json(outputs: &[Output]) -> Result<String> {
    let rows = |o: &Output| o.values.chunks(o.width).map(<[f32]>::to_vec).collect::<Vec<_>>();
    let object: BTreeMap<&str, _> = outputs.iter().map(|o| (o.name.as_str(), rows(o))).collect();
    Ok(serde_json::to_string(&object)? + "\n")
}
