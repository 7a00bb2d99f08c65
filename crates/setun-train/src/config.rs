//! A training run as its TOML file describes it: model, tokenizer, data, optimiser, loop.
//!
//! Relative paths are relative to the TOML file, so a run means the same from every folder. Values are
//! checked once, in [`TrainConfig::check`], which every constructor ends with; unknown keys are errors.

mod check;

use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};
use setun::config::{Activation, ModelConfig, Shape};
use setun::recommended::Recommended;

use crate::error::TrainError;

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
    /// `[optimizer]`: AdamW and its schedules.
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
    /// `"ternary"` (BitNet b1.58) or `"float"` (its twin). Default: ternary.
    #[serde(default)]
    pub precision: Precision,
}

/// How the linear layers inside the blocks compute.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Weights −1, 0, +1 and int8 activations, trained through full-precision masters.
    #[default]
    Ternary,
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
    /// Folder for the trained tokenizer and the tokenised text; runs on the same data may share it.
    /// Default: `tokens` in the output folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<PathBuf>,
}

/// `[[data.sources]]`: one part of the mixture.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceSection {
    /// Its name in messages and cache files.
    pub name: String,
    /// Files or folders, one or a list: text with `<|endoftext|>` lines between documents, `.jsonl` with a
    /// `text` field per line, folders of `.txt` files.
    #[serde(deserialize_with = "one_or_many")]
    pub path: Vec<PathBuf>,
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
}

/// `[optimizer]`: AdamW.
///
/// The two-stage schedule is that of BitNet b1.58 ("The Era of 1-bit LLMs: Training Tips, Code and FAQ"): at
/// `switch` the learning rate drops to its second peak and weight decay ends.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerSection {
    /// `"two-stage"`, `"cosine"` or `"constant"`. Default: two-stage.
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
    /// Decay rates of the first and second moment.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Largest global gradient norm; larger gradients are scaled down to it. 0: no limit.
    pub clip: f64,
}

impl Default for OptimizerSection {
    fn default() -> Self {
        Self {
            schedule: ScheduleKind::TwoStage,
            lr: 2e-3,
            lr_second: None,
            switch: 0.5,
            final_fraction: 0.0,
            warmup_steps: 100,
            weight_decay: 0.1,
            betas: [0.9, 0.95],
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

/// How the learning rate moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScheduleKind {
    /// Two decays with a drop between them; weight decay in the first only.
    TwoStage,
    /// Half a cosine.
    Cosine,
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
        let ternary = self.model.precision == Precision::Ternary;
        Ok(ModelConfig::fresh(&self.shape(), ternary)?)
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
        if self.model.precision == Precision::Ternary {
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
