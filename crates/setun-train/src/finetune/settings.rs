//! What a fine-tuning run is told.

use std::path::PathBuf;

use super::lora::LoraSection;

/// What a fine-tuning run is told.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Files and folders to train on, see [`read`].
    pub data: Vec<PathBuf>,
    /// Files and folders to measure on.
    pub valid: Vec<PathBuf>,
    /// How long.
    pub length: Length,
    /// Tokens of a sequence; `None`: 512, or the model's limit if that is less.
    pub seq_len: Option<usize>,
    /// Sequences per pass.
    pub batch: usize,
    /// Passes per step.
    pub accumulation: usize,
    /// Learning rate at its peak, reached after a fifteenth of the run (at most 100 steps) and followed by half a cosine to
    /// zero.
    pub lr: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Seed of the order of the examples.
    pub seed: u64,
    /// Threads; `None`: the physical cores that the process may use.
    pub threads: Option<usize>,
    /// Steps between held-out measurements; 0: after the last only.
    pub eval_every: u64,
    /// Steps between checkpoints; 0: after the last only.
    pub checkpoint_every: u64,
    /// Steps between lines of the metrics.
    pub log_every: u64,
    /// Output folder.
    pub out: PathBuf,
    /// Train adapters and leave the model as it is.
    pub lora: Option<LoraSection>,
    /// `β` where [`Base::prefer`] trains.
    pub beta: f64,
}

/// How long a run is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Length {
    /// Optimiser steps.
    Steps(u64),
    /// Times that everything is read, rounded up to whole steps.
    Epochs(f64),
}

/// Learning rate where all weights are trained; see docs/results.md.
pub const DEFAULT_LR: f64 = 5e-4;
/// Learning rate where adapters are trained.
pub const LORA_LR: f64 = 2e-3;

impl Default for Settings {
    fn default() -> Self {
        Self {
            data: Vec::new(),
            valid: Vec::new(),
            length: Length::Epochs(1.0),
            seq_len: None,
            batch: 8,
            accumulation: 1,
            lr: DEFAULT_LR,
            weight_decay: 0.0,
            seed: 1,
            threads: None,
            eval_every: 50,
            checkpoint_every: 100,
            log_every: 10,
            out: PathBuf::new(),
            lora: None,
            beta: 0.1,
        }
    }
}
