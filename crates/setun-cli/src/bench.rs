//! `setun bench`: how fast a model runs, and how near that is to what the machine can do.

mod busy;
mod energy;
mod ladder;
mod machine;
mod measure;
mod picture;
mod random;
mod work;

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
use work::Precision;

/// Measure how fast a model reads a prompt (prefill) and writes (decode).
///
/// Every speed comes with its share of what this machine can do, measured in the same run: for decode, the weights and cached
/// keys and values read per token against the read bandwidth; for prefill, integer multiply-adds and float operations against
/// their peaks. Peaks are measured before and after, and the higher ones count. Times are the best of the repeats, with median
/// and slowest beside them; nothing else should be running, and a warning tells if something was.
///
/// With --shape the weights are random (42 % zeros, as in trained models): speed does not depend on their values. With --ladder
/// that shape runs with F32, F16, BF16, Q8_0, Q4_0 and ternary weights, one after the other, each multiplied with floats but the
/// ternary ones with int8. Types that memory does not hold are left out, aloud.
///
/// Energy is measured where the system lets the processor's counters be read (all that it did counts), and always estimated
/// from the number of operations: arithmetic of the matrix products alone, without memory traffic, by the energies per
/// operation of the BitNet papers (arXiv 2310.11453 and 2402.17764) for 7 and 45 nm.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  setun bench --shape 2b4t --svg roofline.svg
  setun bench model.gguf --prefill 128,512 --decode 64 --depth 16,4096 --json
  setun bench --shape 2b4t --prefill 0 --decode 32 --batch 1,4,16
  setun bench --shape tiny --kernel all --threads 1,2
  setun bench --ladder --shape 700m --svg ladder.svg

Shapes: tiny (6 M), 125m, 350m, 700m, 1.3b, 2b4t (BitNet-b1.58-2B-4T), 3b, 7b, 8b; with a scale for every 128 weights, embedding
and head ternary too: qwen3-1.7b, qwen3-4b, qwen3-8b")]
pub struct BenchArgs {
    /// Model file, folder or hub name (OWNER/NAME[:FILE]) [default: the model in the program]
    #[arg(conflicts_with_all = ["shape", "ladder"])]
    model: Option<PathBuf>,
    /// Random weights of this shape instead of a model
    #[arg(long, value_name = "NAME", value_parser = random::shape)]
    shape: Option<&'static random::NamedShape>,
    /// Measure the shape (2b4t unless --shape says another) in all precisions, from F32 to ternary
    #[arg(long)]
    ladder: bool,
    /// Lengths of the prompts to read, in tokens; 0 for none
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = length, default_value = "512")]
    prefill: Vec<usize>,
    /// Numbers of tokens to write, one after another; 0 for none [default: 128, with --ladder 16]
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = length)]
    decode: Vec<usize>,
    /// Tokens in the context before the first one written
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = depth, default_value = "16")]
    depth: Vec<usize>,
    /// Numbers of sequences to write at once, one pass for all; speed is that of all together
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = batch, default_value = "1")]
    batch: Vec<usize>,
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
    /// Draw a picture too: the roofline of this machine with every result on it, or the ladder as bars
    #[arg(long, value_name = "FILE.svg")]
    svg: Option<PathBuf>,
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

fn batch(text: &str) -> Result<usize, String> {
    const MOST: usize = 1024;
    match text.trim().parse() {
        Ok(n) if (1..=MOST).contains(&n) => Ok(n),
        _ => Err(format!("a whole number from 1 to {MOST} is expected")),
    }
}

/// All that one run found; the shape of `--json`.
#[derive(Serialize)]
struct Report {
    machine: Machine,
    model: ModelFacts,
    load_seconds: f64,
    /// Pages of mapped files left out; before the machine's peaks are measured, which takes memory of its own.
    peak_rss_bytes: Option<usize>,
    /// From the start of loading to the logits after a prompt of 16 tokens.
    first_token_seconds: f64,
    energy_estimate_per_token: energy::Estimate,
    energy_source: &'static str,
    /// What makes the figures doubtful.
    warnings: Vec<String>,
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

pub fn bench(mut args: BenchArgs) -> Result<()> {
    if (args.shape.is_some() || args.ladder) && args.activations == ActivationType::Float {
        return Err(WrongUsage(
            "random weights are measured with int8 activations: --activations float needs a MODEL".into(),
        )
        .into());
    }
    if let Some(path) = &args.svg {
        output::check_svg(path)?;
    }
    if args.decode.is_empty() {
        args.decode = vec![if args.ladder { 16 } else { 128 }];
    }
    let kernels = kernel_sets(&args.kernel)?;
    let threads = if args.threads.is_empty() { vec![physical_cores_allowed()] } else { args.threads.clone() };
    if args.ladder {
        return climb(&args, &kernels, &threads);
    }
    // Fetched before anything is drawn or measured.
    let model = args.model.as_deref().map(pull::local).transpose()?;
    let (busy, memory) = (progress::spinner(), memory::Watch::start());
    let (watch, mut drift) = (busy::Watch::start(), Vec::new());
    let (mut results, mut report) = (Vec::new(), None);
    for kernels in kernels {
        for &threads in &threads {
            busy.set_message(format!("{}, {threads} threads: loading", kernels.name()));
            let started = Instant::now();
            let options = args.options(kernels, threads);
            let engine = load(&args, model.as_deref(), &options)?;
            let load_seconds = started.elapsed().as_secs_f64();
            let plan = args.plan(&memory);
            let first_token_seconds = load_seconds + measure::first_pass(&engine, &plan)?;
            let runs = measure::all(&engine, &plan, &|what| busy.set_message(what))?;
            let peak_rss_bytes = memory.peak();
            let peaks = Peaks::of(&runs).unwrap_or_else(|| Peaks::measure(&engine));
            // Kernel sets differ in their peaks: only those of one are compared.
            if report.is_none() {
                drift.extend(runs.iter().flat_map(measure::Run::peaks).map(Peaks::drifting));
            }
            results.extend(runs.iter().map(measure::Run::measured));
            report.get_or_insert_with(|| Report {
                machine: Machine::here(),
                model: facts(&args, engine.config()),
                load_seconds,
                peak_rss_bytes,
                first_token_seconds,
                energy_estimate_per_token: work::energy(engine.config(), None, args.precision()),
                energy_source: energy::SOURCE,
                warnings: Vec::new(),
                peaks,
                results: Vec::new(),
            });
        }
    }
    busy.finish_and_clear();
    let Some(mut report) = report else {
        return Err(WrongUsage("no kernel set to measure".into()).into());
    };
    report.results = results;
    report.warnings = watch.warnings(&drift);
    warn(&report.warnings);
    if let Some(path) = &args.svg {
        let title = format!("{} on {}", report.model.name, report.machine.title());
        picture::roofline(&title, &report.peaks, &report.results, path)?;
    }
    match args.json {
        true => output::print_json(&report),
        false => Ok(output::print(&table(&report))?),
    }
}

/// `--ladder`.
fn climb(args: &BenchArgs, kernels: &[&'static Kernels], threads: &[usize]) -> Result<()> {
    let (&[kernels], &[threads]) = (kernels, threads) else {
        let what = "--ladder compares weights: one --kernel and one number of --threads are expected";
        return Err(WrongUsage(what.into()).into());
    };
    let shape = match args.shape {
        Some(shape) => shape,
        None => random::shape("2b4t").map_err(WrongUsage)?,
    };
    let (busy, memory) = (progress::spinner(), memory::Watch::start());
    let plan = measure::Plan { precision: precision(Some(shape), args.activations), ..args.plan(&memory) };
    let ladder =
        ladder::climb(shape, &args.options(kernels, threads), &plan, &|what| busy.set_message(what))?;
    busy.finish_and_clear();
    warn(&ladder.warnings);
    if let Some(path) = &args.svg {
        picture::ladder(&ladder, path)?;
    }
    match args.json {
        true => output::print_json(&ladder),
        false => Ok(output::print(&ladder::table(&ladder))?),
    }
}

fn warn(warnings: &[String]) {
    warnings.iter().for_each(|warning| eprintln!("warning: {warning}"));
}

fn precision(shape: Option<&random::NamedShape>, activations: ActivationType) -> Precision {
    Precision { activations, ternary_head: shape.is_some_and(random::NamedShape::ternary_head) }
}

impl BenchArgs {
    fn plan<'a>(&'a self, memory: &'a memory::Watch) -> measure::Plan<'a> {
        measure::Plan {
            prefill: &self.prefill,
            decode: &self.decode,
            depths: &self.depth,
            batches: &self.batch,
            repeats: self.repeats,
            kv: self.kv,
            seed: self.seed,
            precision: self.precision(),
            memory,
        }
    }

    fn precision(&self) -> Precision {
        precision(self.shape, self.activations)
    }

    fn options(&self, kernels: &'static Kernels, threads: usize) -> EngineOptions {
        EngineOptions {
            kernels: Some(kernels),
            threads: Some(threads),
            activations: Some(self.activations),
            head: self.head.head,
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
        return random::engine(shape, random::Kind::Ternary, options, args.seed);
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
        "{}: {} parameters, {} layers, hidden {}, {} activations, {} cache\n{}; read {} GB/s, int8 {} GMAC/s, float {} GFLOP/s\n",
        m.name,
        output::count(m.parameters),
        m.num_layers,
        m.hidden_size,
        m.activations,
        m.kv,
        machine.title(),
        output::rate(report.peaks.read_gb_per_s),
        output::rate(report.peaks.int8_gmac_per_s),
        output::rate(report.peaks.float_gflop_per_s),
    );
    let memory = report.peak_rss_bytes.map_or("unknown".into(), output::bytes);
    text += &format!(
        "loaded in {:.2} s, first token after {:.2} s, peak memory {memory} (mapped files left out)\n\n",
        report.load_seconds, report.first_token_seconds
    );
    text += "phase    tokens  depth  batch  kernel  threads     tok/s    median   slowest   read/token    GB/s   share of limit\n";
    for r in &report.results {
        let limit = if r.phase == "decode" { "read bandwidth" } else { "arithmetic" };
        let [best, median, least, rate] =
            [r.tokens_per_s, r.tokens_per_s_median, r.tokens_per_s_least, r.gb_per_s].map(output::rate);
        text += &format!(
            "{:8} {:6} {:6} {:6}  {:7} {:7} {best:>9} {median:>9} {least:>9} {:>12} {rate:>7}   {:5.1} % of {limit}",
            r.phase,
            r.tokens,
            r.depth,
            r.batch,
            r.kernel,
            r.threads,
            output::bytes(r.bytes_per_token as usize),
            r.share * 100.0
        );
        // With several sequences, either may be what limits.
        if r.phase == "decode" && r.batch > 1 {
            text += &format!(", {:.1} % of arithmetic", r.arithmetic_share * 100.0);
        }
        if let Some(joules) = r.joules_per_token_measured {
            text += &format!(", {joules:.3} J per token measured");
        }
        text += "\n";
    }
    let e = &report.energy_estimate_per_token;
    text + &format!(
        "\nEnergy per token, an estimate: {:.3} mJ at 7 nm, {:.3} mJ at 45 nm ({})\n",
        e.joules_7nm * 1e3,
        e.joules_45nm * 1e3,
        report.energy_source
    )
}
