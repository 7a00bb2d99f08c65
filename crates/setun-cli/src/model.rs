//! Arguments that every command with a model shares, and how they become an engine.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use setun::config::ActivationType;
use setun::config::ModelConfig;
use setun::engine::{Engine, EngineOptions};
use setun::format::{Checkpoint, FloatWeights, I2sLayout, OpenOptions, TlTiles, Type42};
use setun::head::HeadMode;
use setun::kv_cache::KvType;
use setun::lora::Adapter;
use setun::tokenizer::Tokenizer;
use setun_kernels::Kernels;

use crate::{default_model, progress, pull};

/// What a file leaves open: the user's word, where the file's own evidence does not decide.
#[derive(clap::Args, Debug, Clone)]
pub struct OpenArgs {
    /// What GGUF tensors of type 42 are, where their sizes do not tell: group64 or group128 (Q2_0 in groups of so many weights)
    #[arg(long, value_name = "LAYOUT", value_parser = type42, help_heading = "Loading")]
    pub type42: Option<Type42>,
    /// Layout of I2_S tensors: x86, neon64 (ARM builds of bitnet.cpp since November 2025) or rows4 [default: what trained weights
    /// tell, else x86]
    #[arg(long, value_name = "LAYOUT", value_parser = i2s_layout, help_heading = "Loading")]
    pub i2s: Option<I2sLayout>,
    /// Tiles of TL1 and TL2 tensors of a shape, as the program was built with that is to run them: for example
    /// 3200x8640:160,64,32; once for each shape
    #[arg(long, value_name = "ROWSxCOLS:BM,BK,BMM", value_parser = tl_tiles, help_heading = "Loading")]
    pub tl_tiles: Vec<TlTiles>,
    /// What the layers of a float checkpoint are whose configuration says nothing: float, or ternary (refused where a matrix
    /// holds more than 0 and ± its scales) [default: what all of its matrices agree on]
    #[arg(long, value_name = "KIND", value_parser = float_weights, help_heading = "Loading")]
    pub weights: Option<FloatWeights>,
}

impl OpenArgs {
    /// Opens the model that the user named (fetched first, if that is a hub name), or the one in the program.
    pub fn open(&self, model: Option<&Path>) -> Result<Checkpoint> {
        let Some(path) = model else {
            return Ok(Checkpoint::from_bytes(default_model::NAME, default_model::BYTES)?);
        };
        let options = OpenOptions {
            type42: self.type42.unwrap_or_default(),
            i2s: self.i2s.unwrap_or_default(),
            weights: self.weights.unwrap_or_default(),
            tl_tiles: self.tl_tiles.clone(),
        };
        Ok(Checkpoint::open_with(pull::local(path)?, options)?)
    }
}

/// How a model is loaded and run.
#[derive(clap::Args, Debug, Clone)]
pub struct LoadArgs {
    /// Tokenizer to use instead of the model's own: tokenizer.json, tokenizer.model, a GGUF file or a folder
    #[arg(long, value_name = "FILE", help_heading = "Loading")]
    pub tokenizer: Option<PathBuf>,
    #[command(flatten)]
    pub open: OpenArgs,
    #[command(flatten)]
    pub compute: ComputeArgs,
    /// Adapter that is run beside the model: a folder as PEFT and `setun finetune --lora` write it
    #[arg(long, value_name = "FOLDER", help_heading = "Loading")]
    pub lora: Option<PathBuf>,
    /// Longest sequence in tokens; a longer one than the model was made for gives poor text [default: the model's own]
    #[arg(long, value_name = "N", value_parser = positive, help_heading = "Loading")]
    pub context: Option<usize>,
}

/// What computes, and with what precision.
#[derive(clap::Args, Debug, Clone)]
pub struct ComputeArgs {
    /// Kernel set: avx512vbmi, avx512, avxvnni, avx2, neoni8mm, neondot, neon or scalar; all give the same result [default: the fastest
    /// this CPU has]
    #[arg(long, value_name = "NAME", value_parser = kernels, help_heading = "Loading")]
    pub kernel: Option<&'static Kernels>,
    /// Threads; any number gives the same result [default: the physical cores this process may use]
    #[arg(long, value_name = "N", value_parser = threads, help_heading = "Loading")]
    pub threads: Option<usize>,
    /// What ternary layers multiply with: int8 (as BitNet models are trained) or float (slower) [default: what the model
    /// defines; `run` and `bench` take int8 for speed]
    #[arg(long, value_name = "TYPE", value_parser = activations, help_heading = "Loading")]
    pub activations: Option<ActivationType>,
}

impl ComputeArgs {
    pub fn options(&self) -> EngineOptions {
        // Overridden where a command chooses tokens; the others read all logits.
        let head = HeadMode::Exact;
        EngineOptions { kernels: self.kernel, threads: self.threads, activations: self.activations, head }
    }
}

/// How the output head finds the few logits that choosing a token needs.
#[derive(clap::Args, Debug, Clone, Copy)]
pub struct HeadArgs {
    /// Output head: exact (all logits are computed), shortlist (four bits for each weight bound all logits, the few that may be
    /// chosen are computed) or auto (shortlist for a large head that is not ternary); all give the same text
    #[arg(long, value_name = "HOW", value_parser = head_mode, default_value = "auto", help_heading = "Loading")]
    pub head: HeadMode,
}

/// Loads, saying so while it takes.
fn loading(
    file: &Checkpoint,
    config: ModelConfig,
    options: &EngineOptions,
    lora: Option<&Path>,
) -> Result<Engine> {
    let adapter = lora.map(Adapter::open).transpose()?;
    let bar = progress::weights(config.parameters() as u64);
    bar.set_message(format!("loading {}", file.path().display()));
    let engine = Engine::load_adapted(file, config, options, adapter.as_ref(), &mut |weights| {
        bar.inc(weights as u64);
    });
    bar.finish_and_clear();
    Ok(engine?)
}

impl LoadArgs {
    /// The engine for an opened model, computing as the model defines unless asked otherwise.
    pub fn engine(&self, file: &Checkpoint) -> Result<Engine> {
        loading(file, ModelConfig::of(file)?, &self.compute.options(), self.lora.as_deref())
    }

    /// The engine for speed: int8 activations unless asked otherwise, which is said where the model defines float.
    pub fn fast_engine(&self, file: &Checkpoint, config: ModelConfig, head: HeadArgs) -> Result<Engine> {
        let options = EngineOptions { head: head.head, ..fast(&config, self.compute.options()) };
        loading(file, config, &options, self.lora.as_deref())
    }

    /// The tokenizer asked for, or the model's own.
    pub fn tokenizer(&self, file: &Checkpoint) -> Result<Tokenizer> {
        match &self.tokenizer {
            Some(path) => tokenizer_at(path),
            None => Tokenizer::of(file).map_err(|error| match error {
                // Only the command knows by which flag one is named.
                error @ setun::error::ModelError::Unsupported { .. } => {
                    anyhow::anyhow!("{error} with --tokenizer FILE")
                }
                error => error.into(),
            }),
        }
    }

    /// Positions a session may have; says so when they are more than the model was made for.
    pub fn limit(&self, config: &ModelConfig) -> usize {
        let limit = self.context.unwrap_or(config.max_positions);
        if limit > config.max_positions {
            eprintln!(
                "note: the model was made for {} positions; text beyond them may be poor",
                config.max_positions
            );
        }
        limit
    }
}

/// `options` with int8 activations where they leave it open; says so where the model is defined with float ones.
pub fn fast(config: &ModelConfig, options: EngineOptions) -> EngineOptions {
    let defined = config.activations();
    if options.activations.is_none() && config.has_ternary_layers() && defined == ActivationType::Float {
        eprintln!(
            "note: activations are rounded to int8 for speed, but this model is defined with float ones: \
             --activations float computes as defined"
        );
    }
    let rounded = if defined == ActivationType::Float { ActivationType::Int8 } else { defined };
    EngineOptions { activations: Some(options.activations.unwrap_or(rounded)), ..options }
}

/// Refuses a model that gives vectors instead of text.
pub fn needs_text(config: &ModelConfig) -> Result<()> {
    match config.pooling {
        None => Ok(()),
        Some(_) => bail!(
            "this is an embedding model: it has no output head, so it gives no text; `setun logits --hidden` writes its hidden states"
        ),
    }
}

/// Opens a tokenizer in a file or folder of its own, or that of a model on a hub.
pub fn tokenizer_at(path: &Path) -> Result<Tokenizer> {
    let path = &pull::local(path)?;
    Tokenizer::open(path).with_context(|| format!("cannot use {} as a tokenizer", path.display()))
}

pub fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err("a whole number from 1 is expected".into()),
        Ok(n) => Ok(n),
    }
}

pub fn threads(text: &str) -> Result<usize, String> {
    const MOST: usize = 1024;
    match text.parse() {
        Ok(n) if (1..=MOST).contains(&n) => Ok(n),
        _ => Err(format!("a whole number from 1 to {MOST} is expected")),
    }
}

pub fn kernels(name: &str) -> Result<&'static Kernels, String> {
    Kernels::by_name(name).ok_or_else(|| {
        let names: Vec<&str> = Kernels::available().map(Kernels::name).collect();
        format!("this CPU runs {}", names.join(", "))
    })
}

pub fn activations(text: &str) -> Result<ActivationType, String> {
    match text {
        "int8" => Ok(ActivationType::Int8),
        "int4" => Ok(ActivationType::Int4),
        "float" => Ok(ActivationType::Float),
        _ => Err("int8, int4 or float is expected".into()),
    }
}

fn float_weights(text: &str) -> Result<FloatWeights, String> {
    match text {
        "float" => Ok(FloatWeights::Float),
        "ternary" => Ok(FloatWeights::Ternary),
        _ => Err("float or ternary is expected".into()),
    }
}

fn type42(text: &str) -> Result<Type42, String> {
    match text {
        "group64" => Ok(Type42::Group64),
        "group128" => Ok(Type42::Group128),
        _ => Err("group64 or group128 is expected".into()),
    }
}

fn i2s_layout(text: &str) -> Result<I2sLayout, String> {
    match text {
        "x86" => Ok(I2sLayout::X86),
        "neon64" => Ok(I2sLayout::Neon64),
        "rows4" => Ok(I2sLayout::Rows4),
        _ => Err("x86, neon64 or rows4 is expected".into()),
    }
}

fn tl_tiles(text: &str) -> Result<TlTiles, String> {
    let numbers = |text: &str, by| text.split(by).map(|n| n.parse().ok()).collect::<Option<Vec<usize>>>();
    let parts =
        text.split_once(':').and_then(|(shape, tiles)| Some((numbers(shape, 'x')?, numbers(tiles, ',')?)));
    match parts.as_ref().map(|(shape, tiles)| (&shape[..], &tiles[..])) {
        Some((&[rows, cols], &[bm, bk, bmm])) => Ok(TlTiles { rows, cols, bm, bk, bmm }),
        _ => Err("ROWSxCOLS:BM,BK,BMM is expected, for example 3200x8640:160,64,32".into()),
    }
}

fn head_mode(text: &str) -> Result<HeadMode, String> {
    text.parse()
}

pub fn kv_type(text: &str) -> Result<KvType, String> {
    text.parse()
}
