//! `setun bench`: how fast a model runs, and how near that is to what the machine can do.

mod machine;
mod measure;
mod random;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use serde::Serialize;
use setun::config::ActivationType;
use setun::config::ModelConfig;
use setun::engine::{Engine, EngineOptions};
use setun::kv_cache::KvType;
use setun_kernels::Kernels;
use setun_kernels::threads::physical_cores_allowed;

use crate::{WrongUsage, memory, model, output, progress, pull};
use machine::Machine;
use measure::{Measured, Peaks};

/// Measure how fast a model reads a prompt (prefill) and writes (decode), batch 1.
///
/// Every speed comes with its share of what this machine can do, measured in the same run: for decode, the weights read
/// per token against the read bandwidth; for prefill, integer multiply-adds and float operations against their peaks.
/// Times are the best of the repeats, medians beside them; nothing else should be running.
///
/// With --shape the weights are random (42 % zeros, as in trained models): speed does not depend on their values.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  setun bench --shape 2b4t
  setun bench model.gguf --prefill 128,512 --decode 64 --json
  setun bench --shape tiny --kernel all --threads 1,2

Shapes: tiny (6 M), 125m, 350m, 700m, 1.3b, 2b4t (BitNet-b1.58-2B-4T), 3b, 7b, 8b")]
pub struct BenchArgs {
    /// Model file, folder or hub name (OWNER/NAME[:FILE]) [default: the model in the program]
    #[arg(conflicts_with = "shape")]
    model: Option<PathBuf>,
    /// Random weights of this shape instead of a model
    #[arg(long, value_name = "NAME", value_parser = random::shape)]
    shape: Option<&'static random::NamedShape>,
    /// Lengths of the prompts to read, in tokens; 0 for none
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = length, default_value = "512")]
    prefill: Vec<usize>,
    /// Numbers of tokens to write, one after another; 0 for none
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = length, default_value = "128")]
    decode: Vec<usize>,
    /// Tokens in the context before the first one written
    #[arg(long, value_name = "N", value_parser = depth, default_value = "16")]
    depth: usize,
    /// How often each is measured
    #[arg(long, value_name = "N", value_parser = model::positive, default_value = "3")]
    repeats: usize,
    /// Kernel sets to measure: avx512vbmi, avx512, avxvnni, avx2, neoni8mm, neondot, neon, scalar, or all [default: the fastest this CPU has]
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    kernel: Vec<String>,
    /// Numbers of threads to measure [default: the physical cores this process may use]
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = model::threads)]
    threads: Vec<usize>,
    /// What ternary layers of a MODEL multiply with: int8, or float where the model is defined so
    #[arg(long, value_name = "TYPE", value_parser = model::activations, default_value = "int8")]
    activations: ActivationType,
    /// Type of the keys and values kept for attention: f16, int8, int4 or f32
    #[arg(long, value_name = "TYPE", value_parser = model::kv_type, default_value = "f16")]
    kv: KvType,
    /// Seed of the random weights and tokens
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    head: model::HeadArgs,
    #[command(flatten)]
    open: model::OpenArgs,
}

/// Bounded, because the cache for so many positions is taken before the first of them is measured.
fn length(text: &str) -> Result<usize, String> {
    const MOST: usize = 1 << 17;
    match text.trim().parse() {
        Ok(n) if n <= MOST => Ok(n),
        _ => Err(format!("a whole number from 0 to {MOST} is expected")),
    }
}

fn depth(text: &str) -> Result<usize, String> {
    model::positive(text).and_then(|_| length(text))
}

/// All that one run found; the shape of `--json`.
#[derive(Serialize)]
struct Report {
    machine: Machine,
    model: ModelFacts,
    load_seconds: f64,
    /// Pages of mapped files left out; before the machine's peaks are measured, which takes memory of its own.
    peak_rss_bytes: Option<usize>,
    #[serde(flatten)]
    peaks: Peaks,
    results: Vec<Measured>,
}

#[derive(Serialize)]
struct ModelFacts {
    name: String,
    parameters: usize,
    block_weights: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_layers: usize,
    heads: usize,
    kv_heads: usize,
    vocab_size: usize,
    ternary: bool,
    activations: String,
    kv: String,
}

pub fn bench(args: BenchArgs) -> Result<()> {
    if args.shape.is_some() && args.activations == ActivationType::Float {
        return Err(WrongUsage(
            "random weights are measured with int8 activations: --activations float needs a MODEL".into(),
        )
        .into());
    }
    let kernels = kernel_sets(&args.kernel)?;
    let threads = if args.threads.is_empty() { vec![physical_cores_allowed()] } else { args.threads.clone() };
    // Fetched before anything is drawn or measured.
    let model = args.model.as_deref().map(pull::local).transpose()?;
    let (busy, memory) = (progress::spinner(), memory::Watch::start());
    let (mut results, mut first) = (Vec::new(), None);
    for kernels in kernels {
        for &threads in &threads {
            busy.set_message(format!("{}, {threads} threads: loading", kernels.name()));
            let started = Instant::now();
            let options = EngineOptions {
                kernels: Some(kernels),
                threads: Some(threads),
                activations: Some(args.activations),
                head: args.head.head,
            };
            let engine = load(&args, model.as_deref(), &options)?;
            let load_seconds = started.elapsed().as_secs_f64();
            let runs = measure::all(&engine, &args.plan(), &|what| busy.set_message(what));
            let runs = runs?;
            let peak_rss_bytes = memory.peak();
            busy.set_message("measuring the machine");
            let peaks = Peaks::measure(&engine);
            results.extend(runs.iter().map(|run| run.against(&peaks, engine.config(), args.activations)));
            first.get_or_insert_with(|| (load_seconds, peak_rss_bytes, peaks, facts(&args, engine.config())));
        }
    }
    busy.finish_and_clear();
    let Some((load_seconds, peak_rss_bytes, peaks, model)) = first else {
        return Err(WrongUsage("no kernel set to measure".into()).into());
    };
    let report = Report { machine: Machine::here(), model, load_seconds, peak_rss_bytes, peaks, results };
    match args.json {
        true => output::print_json(&report),
        false => Ok(output::print(&table(&report))?),
    }
}

impl BenchArgs {
    fn plan(&self) -> measure::Plan<'_> {
        measure::Plan {
            prefill: &self.prefill,
            decode: &self.decode,
            depth: self.depth,
            repeats: self.repeats,
            kv: self.kv,
            seed: self.seed,
        }
    }
}

fn kernel_sets(names: &[String]) -> Result<Vec<&'static Kernels>> {
    if names.is_empty() {
        return Ok(vec![Kernels::best()]);
    }
    if names == ["all"] {
        return Ok(Kernels::available().collect());
    }
    let set = |name: &String| {
        model::kernels(name)
            .map_err(|known| WrongUsage(format!("no kernel set `{name}` here: {known}")).into())
    };
    names.iter().map(set).collect()
}

fn load(args: &BenchArgs, model: Option<&Path>, options: &EngineOptions) -> Result<Engine> {
    if let Some(shape) = args.shape {
        return random::engine(shape, options, args.seed);
    }
    let file = args.open.open(model)?;
    Ok(Engine::load(&file, ModelConfig::of(&file)?, options)?)
}

fn facts(args: &BenchArgs, c: &ModelConfig) -> ModelFacts {
    let name = match (args.shape, &args.model) {
        (Some(shape), _) => format!("{} (random)", shape.name),
        (None, Some(path)) => path.display().to_string(),
        (None, None) => crate::default_model::NAME.to_owned(),
    };
    ModelFacts {
        name,
        parameters: c.parameters(),
        block_weights: c.block_weights(),
        hidden_size: c.hidden_size,
        intermediate_size: c.intermediate_size,
        num_layers: c.num_layers,
        heads: c.heads,
        kv_heads: c.kv_heads,
        vocab_size: c.vocab_size,
        ternary: c.numerics != setun::config::Numerics::Float,
        activations: args.activations.to_string(),
        kv: args.kv.to_string(),
    }
}

fn table(report: &Report) -> String {
    let (m, machine) = (&report.model, &report.machine);
    let mut text = format!(
        "{}: {} parameters, {} layers, hidden {}, {} activations\n{}, {} cores; read {} GB/s, int8 {} GMAC/s, float {} GFLOP/s\n",
        m.name,
        output::count(m.parameters),
        m.num_layers,
        m.hidden_size,
        m.activations,
        machine.cpu.as_deref().unwrap_or("unknown CPU"),
        machine.physical_cores,
        output::rate(report.peaks.read_gb_per_s),
        output::rate(report.peaks.int8_gmac_per_s),
        output::rate(report.peaks.float_gflop_per_s),
    );
    let memory = report.peak_rss_bytes.map_or("unknown".into(), output::bytes);
    text +=
        &format!("loaded in {:.2} s, peak memory {memory} (mapped files left out)\n\n", report.load_seconds);
    text += "phase    tokens  kernel  threads     tok/s    median   share of limit\n";
    for r in &report.results {
        let limit = if r.phase == "decode" { "read bandwidth" } else { "arithmetic" };
        let (best, median) = (output::rate(r.tokens_per_s), output::rate(r.tokens_per_s_median));
        text += &format!(
            "{:8} {:6}  {:7} {:7} {best:>9} {median:>9}   {:5.1} % of {limit}\n",
            r.phase,
            r.tokens,
            r.kernel,
            r.threads,
            r.share * 100.0
        );
    }
    text
}
