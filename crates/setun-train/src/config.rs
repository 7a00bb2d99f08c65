//! A training run as its TOML file describes it: model, tokenizer, data, optimiser, loop.
//!
//! Relative paths are relative to the TOML file, so a run means the same from every folder. Values are
//! checked once, in [`TrainConfig::check`], which every constructor ends with; unknown keys are errors.

mod check;

use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};
use setun::config::{Activation, ActivationType, ModelConfig, Numerics, Rotation, Shape, Storage, Ternary};
use setun::recommended::Recommended;

use crate::error::TrainError;
use crate::weights::Recipe;

/// Weights that share a scale where a weight-only run says nothing else: Ternary-Bonsai's and CAT-Q's.
const GROUP_SIZE: usize = 128;

/// A whole run. Read it freely; constructors guarantee what [`TrainConfig::check`] checks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// The model that a fine-tuning run starts from; a run described by a file has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<crate::finetune::BaseSection>,
    /// `[model]`: what is trained.
    pub model: ModelSection,
    /// `[tokenizer]`: trained on the corpus unless a file is named.
    #[serde(default)]
    pub tokenizer: TokenizerSection,
    /// `[data]`: what it reads.
    pub data: DataSection,
    /// `[optimizer]`: how it learns.
    #[serde(default)]
    pub optimizer: OptimizerSection,
    /// `[train]`: the loop.
    pub train: TrainSection,
    /// `[sampling]`: what the finished model recommends to those who run it (temperature, top_k, top_p, min_p,
    /// repetition_penalty); it goes into the exported `generation_config.json`.
    #[serde(default)]
    pub sampling: Recommended,
}

/// `[model]`: the shape of [`Shape`], and the precision of its linear layers.
///
/// Sizes of ternary models are best multiples of 256, the block of GGUF's ternary types: otherwise
/// [`TrainConfig::warnings`] says that not every packing can hold the model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSection {
    /// Rows of the embedding; a trained tokenizer gets at most so many entries.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads. Default: as many as query heads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_heads: Option<usize>,
    /// Longest context that the model claims.
    pub max_positions: usize,
    /// Base of the rotary frequencies. Default: 10000.
    #[serde(default = "ten_thousand")]
    pub rope_theta: f64,
    /// Output head shared with the embedding. Default: true.
    #[serde(default = "yes")]
    pub tied: bool,
    /// BitNet's norms before the output and down projections. Default: true.
    #[serde(default = "yes")]
    pub sub_norms: bool,
    /// Gate activation, `"relu2"` or `"silu"`. Default: relu2.
    #[serde(default = "relu2")]
    pub activation: Activation,
    /// `"ternary"` (BitNet b1.58, W1.58A8), `"ternary-weights"` (weights alone, in groups, W1.58A16) or `"float"` (their twin).
    /// Default: ternary.
    #[serde(default)]
    pub precision: Precision,
    /// Bits of the activations that ternary layers round, with `"ternary"`: 8, or 4 (BitNet a4.8's and v2's). Default: 8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub activation_bits: Option<u8>,
    /// Inputs of the output and down projections rotated by Hadamard matrices before they are rounded (BitNet v2), with `"ternary"`.
    /// Default: false.
    #[serde(default)]
    pub hadamard: bool,
    /// Weights of a row that share a scale, with `"ternary-weights"`: from 32, a divisor of both sizes. Default: 128.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group_size: Option<usize>,
}

/// How the linear layers inside the blocks compute.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Precision {
    /// Weights −1, 0, +1 and int8 activations, trained through full-precision masters.
    #[default]
    Ternary,
    /// Weights −1, 0, +1 with a scale for every group of a row's columns, and float activations: the form of Ternary-Bonsai and CAT-Q.
    /// Such files are Llama-like: without `sub_norms`.
    TernaryWeights,
    /// Full precision.
    Float,
}

/// `[tokenizer]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TokenizerSection {
    /// An existing `tokenizer.json`; without it a byte-level BPE is trained on the training sources.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Entries of the trained tokenizer. Default: `model.vocab_size`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vocab_size: Option<usize>,
    /// The token between documents. Default: `<|endoftext|>`, the line that separates documents in text files.
    pub end_of_text: String,
}

impl Default for TokenizerSection {
    fn default() -> Self {
        Self { path: None, vocab_size: None, end_of_text: crate::vocabulary::END_OF_TEXT.to_owned() }
    }
}

/// `[data]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataSection {
    /// `[[data.sources]]`: training text.
    pub sources: Vec<SourceSection>,
    /// `[[data.valid]]`: held-out text, never trained on and never shown to the tokenizer's training.
    #[serde(default)]
    pub valid: Vec<ValidSection>,
    /// Tokens per training sequence.
    pub seq_len: usize,
    /// What a token sees of the other documents in its sequence: `"stream"` or `"documents"`. Default: stream.
    #[serde(default)]
    pub packing: Packing,
    /// Folder for the trained tokenizer and the tokenised text; runs on the same data may share it.
    /// Default: `tokens` in the output folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<PathBuf>,
}

/// How documents share a training sequence. Both feed the same tokens in the same order.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Packing {
    /// Joined by the end-of-text token; what precedes a document in its sequence is seen, and positions run on.
    #[default]
    Stream,
    /// Attention stays within a document, and positions start anew at each.
    Documents,
}

/// `[[data.sources]]`: one part of the mixture.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceSection {
    /// Its name in messages and cache files.
    pub name: String,
    /// Files or folders, one or a list: text with `<|endoftext|>` lines between documents, `.jsonl` with a field of text per
    /// line, `.parquet` with a column of text; the first two also as `.gz`, `.zst`, `.xz` or `.bz2`; folders of these.
    #[serde(deserialize_with = "one_or_many")]
    pub path: Vec<PathBuf>,
    /// The field of JSONL lines, or the column of Parquet files (`a.b` inside a struct), that holds the text. Default: text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text_field: Option<String>,
    /// Share of the training sequences, relative to the other sources, at the start. Default: 1.
    #[serde(default = "one")]
    pub weight: f64,
    /// The same at the end, reached linearly. Default: `weight`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight_end: Option<f64>,
}

/// `[[data.valid]]`: one held-out set, measured by itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ValidSection {
    /// Its name in the metrics: `eval_NAME_loss`.
    pub name: String,
    /// Files or folders, as in [`SourceSection::path`].
    #[serde(deserialize_with = "one_or_many")]
    pub path: Vec<PathBuf>,
    /// As in [`SourceSection::text_field`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text_field: Option<String>,
}

/// `[optimizer]`: AdamW or Muon, and their schedules.
///
/// The two-stage schedule is that of BitNet b1.58 ("The Era of 1-bit LLMs: Training Tips, Code and FAQ"): at
/// `switch` the learning rate drops to its second peak and weight decay ends.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerSection {
    /// `"adamw"`, or `"muon"`: the matrices of the blocks by Muon (one moment instead of two), the rest by AdamW. Default: adamw.
    pub kind: OptimizerKind,
    /// `"two-stage"`, `"cosine"`, `"linear"` or `"constant"`. Default: two-stage.
    pub schedule: ScheduleKind,
    /// Learning rate at its (first) peak.
    pub lr: f64,
    /// Peak of the second stage. Default: two thirds of `lr`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr_second: Option<f64>,
    /// Where the second stage begins, as a fraction of the run.
    pub switch: f64,
    /// Learning rate of the last step, as a fraction of `lr`.
    pub final_fraction: f64,
    /// Steps from zero to `lr`.
    pub warmup_steps: u64,
    /// Decoupled weight decay, of matrices only; the two-stage schedule ends it at `switch`.
    pub weight_decay: f64,
    /// Decay rates of AdamW's first and second moment.
    pub betas: [f64; 2],
    /// Decay rate of Muon's momentum. Default: 0.95.
    pub momentum: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Largest global gradient norm; larger gradients are scaled down to it. 0: no limit.
    pub clip: f64,
}

impl Default for OptimizerSection {
    fn default() -> Self {
        Self {
            kind: OptimizerKind::AdamW,
            schedule: ScheduleKind::TwoStage,
            lr: 2e-3,
            lr_second: None,
            switch: 0.5,
            final_fraction: 0.0,
            warmup_steps: 100,
            weight_decay: 0.1,
            betas: [0.9, 0.95],
            momentum: 0.95,
            eps: 1e-8,
            clip: 1.0,
        }
    }
}

impl OptimizerSection {
    /// Peak of the second stage, with its default filled in.
    pub fn second_lr(&self) -> f64 {
        self.lr_second.unwrap_or(self.lr * 2.0 / 3.0)
    }
}

/// What turns gradients into steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// AdamW for every parameter.
    AdamW,
    /// Muon for the matrices of the blocks.
    Muon,
}

/// How the learning rate moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScheduleKind {
    /// Two decays with a drop between them; weight decay in the first only.
    TwoStage,
    /// Half a cosine.
    Cosine,
    /// A straight line.
    Linear,
    /// No decay after the warm-up.
    Constant,
}

/// `[train]`: the loop.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainSection {
    /// Optimiser steps. Either this or `tokens`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steps: Option<u64>,
    /// Training tokens, rounded up to whole steps. Either this or `steps`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<u64>,
    /// Sequences per pass.
    #[serde(default = "sixteen")]
    pub batch: usize,
    /// Passes whose gradients are averaged into one step. Default: 1.
    #[serde(default = "one_usize")]
    pub accumulation: usize,
    /// Steps over which rounding grows from none to all of it, linearly: for training on from a float model, whose loss would leap
    /// otherwise. Default: 0.
    #[serde(default)]
    pub quantization_warmup_steps: u64,
    /// Seed of everything random: weights, document order, mixture. Default: 1.
    #[serde(default = "one_u64")]
    pub seed: u64,
    /// Threads. Default: the physical cores that the process may use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
    /// Steps between held-out measurements (also after the last step). 0: only after the last. Default: 250.
    #[serde(default = "two_fifty")]
    pub eval_every: u64,
    /// Held-out tokens per set and measurement, taken evenly from the whole set; the last measurement
    /// uses all. Default: 65536.
    #[serde(default = "sixty_four_k")]
    pub eval_tokens: usize,
    /// Steps between checkpoints (also after the last step). 0: only after the last. Default: 500.
    #[serde(default = "five_hundred")]
    pub checkpoint_every: u64,
    /// Checkpoints kept; older ones are deleted. Default: 2.
    #[serde(default = "two")]
    pub keep: usize,
    /// Steps between lines of the metrics file. Default: 10.
    #[serde(default = "ten")]
    pub log_every: u64,
    /// A loss is high when it lies above the median of the last ones by so many robust deviations (of 0.02 nats at least).
    /// 0: only a loss that is no number stops a run. Default: 8.
    #[serde(default = "eight")]
    pub spike_deviations: f64,
    /// High losses in a row that stop a run as diverged. Default: 50.
    #[serde(default = "fifty")]
    pub spike_steps: u64,
    /// Steps whose losses make the median. Default: 200.
    #[serde(default = "two_hundred")]
    pub spike_window: usize,
    /// Output folder: checkpoints, metrics, tokenizer, exported model.
    pub out: PathBuf,
}

fn yes() -> bool {
    true
}
fn relu2() -> Activation {
    Activation::Relu2
}
fn ten_thousand() -> f64 {
    10_000.0
}
fn one() -> f64 {
    1.0
}
fn one_usize() -> usize {
    1
}
fn one_u64() -> u64 {
    1
}
fn two() -> usize {
    2
}
fn ten() -> u64 {
    10
}
fn eight() -> f64 {
    8.0
}
fn fifty() -> u64 {
    50
}
fn two_hundred() -> usize {
    200
}
fn sixteen() -> usize {
    16
}
fn two_fifty() -> u64 {
    250
}
fn five_hundred() -> u64 {
    500
}
fn sixty_four_k() -> usize {
    65_536
}

/// Accepts `path = "a"` and `path = ["a", "b"]`.
fn one_or_many<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Vec<PathBuf>, D::Error> {
    struct Paths;
    impl<'de> serde::de::Visitor<'de> for Paths {
        type Value = Vec<PathBuf>;
        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("a path or a list of paths")
        }
        fn visit_str<E: serde::de::Error>(self, one: &str) -> Result<Self::Value, E> {
            Ok(vec![one.into()])
        }
        fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut all: A) -> Result<Self::Value, A::Error> {
            let mut paths = Vec::new();
            while let Some(path) = all.next_element()? {
                paths.push(path);
            }
            Ok(paths)
        }
    }
    from.deserialize_any(Paths)
}

/// `runs/../out` as `out`, which is how the user thinks of it.
fn tidy(path: &Path) -> PathBuf {
    let mut tidied = PathBuf::new();
    for part in path.components() {
        match (part, tidied.components().next_back()) {
            (Component::ParentDir, Some(Component::Normal(_))) => {
                tidied.pop();
            }
            _ => tidied.push(part),
        }
    }
    tidied
}

impl TrainConfig {
    /// Reads and checks a run's TOML file; relative paths become relative to its folder.
    ///
    /// # Errors
    /// When the file cannot be read, or with the line and field that cannot be used.
    pub fn load(path: &Path) -> Result<Self, TrainError> {
        let text = std::fs::read_to_string(path).map_err(|e| TrainError::read(path, e))?;
        let config = Self::parse(&text, path.parent().unwrap_or(Path::new("")))
            .map_err(|e| TrainError::file(path, e.to_string()))?;
        Ok(config)
    }

    /// The same from text, with the folder that relative paths start from.
    ///
    /// # Errors
    /// With the line and field that cannot be used.
    pub fn parse(text: &str, folder: &Path) -> Result<Self, TrainError> {
        let mut config: Self = toml::from_str(text).map_err(|e| syntax_error(text, &e))?;
        let anchor = |path: &mut PathBuf| *path = tidy(&folder.join(&*path));
        config.tokenizer.path.iter_mut().for_each(anchor);
        config.data.cache.iter_mut().for_each(anchor);
        let sources = config.data.sources.iter_mut().map(|s| &mut s.path);
        let valid = config.data.valid.iter_mut().map(|s| &mut s.path);
        sources.chain(valid).flatten().for_each(anchor);
        anchor(&mut config.train.out);
        config.check()?;
        Ok(config)
    }

    /// The model's shape, defaults filled in.
    pub fn shape(&self) -> Shape {
        let m = &self.model;
        Shape {
            vocab_size: m.vocab_size,
            hidden_size: m.hidden_size,
            intermediate_size: m.intermediate_size,
            num_layers: m.num_layers,
            heads: m.heads,
            kv_heads: m.kv_heads.unwrap_or(m.heads),
            max_positions: m.max_positions,
            rope_theta: m.rope_theta,
            tied: m.tied,
            sub_norms: m.sub_norms,
            activation: m.activation,
        }
    }

    /// The model's definition; `end_of_text` both starts and ends a text.
    ///
    /// # Errors
    /// When the shape contradicts itself, or `end_of_text` is not below `model.vocab_size`.
    pub fn model_config(&self, end_of_text: u32) -> Result<ModelConfig, TrainError> {
        if end_of_text as usize >= self.model.vocab_size {
            let expected = format!("above {end_of_text}, the id of the end of text");
            let found = self.model.vocab_size;
            return Err(TrainError::setting("model.vocab_size", found, expected));
        }
        let mut config = self.fresh()?;
        config.bos = Some(end_of_text);
        config.eos = vec![end_of_text];
        Ok(config)
    }

    fn fresh(&self) -> Result<ModelConfig, TrainError> {
        let mut config = ModelConfig::fresh(&self.shape(), self.model.precision == Precision::Ternary)?;
        if self.model.precision == Precision::TernaryWeights {
            let (activations, storage) = (ActivationType::Float, Storage::FloatCopies);
            config.numerics = Numerics::Ternary(Ternary { activations, storage, exceptions: None });
        }
        if let Numerics::Ternary(ternary) = &mut config.numerics {
            ternary.activations = self.activations();
        }
        if self.model.hadamard {
            let modules = ["o_proj", "down_proj"].map(str::to_owned);
            config.rotation = Some(Rotation::of_inputs(config.num_layers, &modules, self.hadamard_block())?);
        }
        Ok(config)
    }

    fn activations(&self) -> ActivationType {
        match (self.model.precision, self.model.activation_bits) {
            (Precision::Ternary, Some(4)) => ActivationType::Int4,
            (Precision::Ternary, _) => ActivationType::Int8,
            _ => ActivationType::Float,
        }
    }

    /// The largest power of two that divides both widths.
    fn hadamard_block(&self) -> usize {
        let widths = self.model.hidden_size | self.model.intermediate_size;
        1 << widths.trailing_zeros().min(usize::BITS - 1)
    }

    /// How masters become weights in the pass after `step` steps.
    pub fn recipe(&self, step: u64) -> Recipe {
        let alone = self.model.precision == Precision::TernaryWeights;
        Recipe {
            group: alone.then(|| self.model.group_size.unwrap_or(GROUP_SIZE)),
            activations: self.activations(),
            strength: match self.train.quantization_warmup_steps {
                0 => 1.0,
                steps => (step as f64 / steps as f64).min(1.0) as f32,
            },
        }
    }

    /// Tokens that one optimiser step sees.
    pub fn tokens_per_step(&self) -> u64 {
        let factors = [self.train.batch, self.train.accumulation, self.data.seq_len];
        factors.iter().fold(1, |n, &f| u64::saturating_mul(n, f as u64))
    }

    /// Optimiser steps of the whole run.
    pub fn total_steps(&self) -> u64 {
        let from_tokens = |tokens: u64| tokens.div_ceil(self.tokens_per_step());
        self.train.steps.or(self.train.tokens.map(from_tokens)).unwrap_or(0)
    }

    /// Folder of the tokenizer and the tokenised text.
    pub fn cache(&self) -> PathBuf {
        let own = || self.train.out.join("tokens");
        self.data.cache.clone().unwrap_or_else(own)
    }

    /// What is allowed but probably not meant, as sentences for the user.
    pub fn warnings(&self) -> Vec<String> {
        let mut found = Vec::new();
        if self.model.precision != Precision::Float {
            let sizes = [
                ("hidden_size", self.model.hidden_size),
                ("intermediate_size", self.model.intermediate_size),
            ];
            for (field, size) in sizes {
                let lost = match size {
                    _ if size.is_multiple_of(256) => continue,
                    _ if size.is_multiple_of(128) => "256, so GGUF's TQ1_0 and TQ2_0 cannot",
                    _ => "128, so no ternary type of GGUF can",
                };
                found.push(format!("model.{field} = {size} is not a multiple of {lost} hold the model"));
            }
        }
        if self.data.valid.is_empty() {
            found.push("no [[data.valid]]: nothing will be measured on held-out text".into());
        }
        found
    }
}

/// One line: where, what it says there, and what is wrong with it.
fn syntax_error(text: &str, error: &toml::de::Error) -> TrainError {
    let message = error.message().trim().replace('\n', ", ");
    let place = error.span().map(|span| {
        let start = span.start.min(text.len());
        let number = text[..start].matches('\n').count();
        let line = text.lines().nth(number).unwrap_or("").trim();
        format!("line {}, `{line}`: ", number + 1)
    });
    TrainError::Syntax { what: format!("{}{message}", place.unwrap_or_default()) }
}

#[cfg(test)]
mod tests;
