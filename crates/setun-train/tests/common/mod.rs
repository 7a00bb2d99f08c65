//! Parameters, tapes and comparisons for the tests of this crate.
#![allow(dead_code)] // Each test file uses its own part.

use std::fmt::Write;
use std::path::Path;

use setun::config::{Activation, Family, ModelConfig, Rope, RopeTable, Shape};
use setun::model::Role;
use setun_train::config::TrainConfig;
use setun_train::engine::Engine;
use setun_train::params::{Kind, Param, ParamId, Params};
use setun_train::tape::{Gradients, Setting};
use setun_train::weights::Weights;

/// Deterministic numbers in [-1, 1).
pub fn noise(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12345);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// Free parameters and all that a tape needs.
pub struct Bench {
    pub engine: Engine,
    pub params: Params,
    weights: Weights,
    rope: RopeTable,
    ids: Vec<ParamId>,
}

impl Bench {
    pub fn new(threads: usize) -> Self {
        let mut rope = RopeTable::new(&Rope::new(10_000.0, 8));
        rope.prepare(1024);
        Self {
            engine: Engine::new(threads),
            params: Params::default(),
            weights: Weights::default(),
            rope,
            ids: Vec::new(),
        }
    }

    pub fn add(&mut self, name: &str, rows: usize, cols: usize, kind: Kind, values: Vec<f32>) -> ParamId {
        let id = self.params.add(Param { name: name.to_owned(), rows, cols, kind, values });
        self.ids.push(id);
        self.weights = Weights::new(&self.engine, &self.params);
        id
    }

    pub fn matrix(&mut self, name: &str, rows: usize, cols: usize, role: Role) -> ParamId {
        let values = noise(rows * cols, self.ids.len() as u32 + 7);
        self.add(name, rows, cols, Kind::Matrix(role), values)
    }

    pub fn vector(&mut self, name: &str, len: usize, kind: Kind) -> ParamId {
        let values = noise(len, self.ids.len() as u32 + 7);
        self.add(name, len, 1, kind, values)
    }

    pub fn ids(&self) -> Vec<ParamId> {
        self.ids.clone()
    }

    pub fn set(&mut self, id: ParamId, at: usize, value: f32) {
        self.params.values_mut(id)[at] = value;
    }

    pub fn gradients(&self) -> Gradients {
        Gradients::new(&self.params)
    }

    pub fn setting(&self, sequences: usize, seq_len: usize) -> Setting<'_> {
        let Self { engine, params, weights, rope, .. } = self;
        Setting { engine, params, weights, rope, sequences, seq_len }
    }
}

/// A model small enough for finite differences.
pub fn tiny(ternary: bool) -> ModelConfig {
    let shape = Shape {
        vocab_size: 13,
        hidden_size: 16,
        intermediate_size: 24,
        num_layers: 2,
        heads: 2,
        kv_heads: 1,
        max_positions: 64,
        rope_theta: 10_000.0,
        tied: true,
        sub_norms: true,
        activation: Activation::Relu2,
    };
    ModelConfig::fresh(&shape, ternary).unwrap()
}

/// The same size in Qwen3's shape: norms on heads, whose width does not follow from the others.
pub fn tiny_qwen3() -> ModelConfig {
    let mut config = tiny(false);
    (config.family, config.qk_norm, config.sub_norms) = (Family::Qwen3, true, false);
    (config.activation, config.head_dim, config.rope) = (Activation::Silu, 12, Rope::new(10_000.0, 12));
    config
}

/// `|found - expected| <= tolerance · max|expected|`, element by element.
pub fn assert_close(what: &str, found: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    let largest = expected.iter().fold(0f64, |m, x| m.max(x.abs()));
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(*f) - e).abs();
        assert!(
            error <= tolerance * largest + 1e-9,
            "{what}: [{i}] is {f}, expected {e} (largest {largest})"
        );
    }
}

/// A few hundred words to train on and a few to hold out.
pub fn write_corpus(folder: &Path) {
    let words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "birds", "in", "red", "tree"];
    for (file, documents) in [("train.txt", 60), ("valid.txt", 6)] {
        let mut text = String::new();
        for document in 0..documents {
            for word in 0..40 {
                let pick = (document * 7 + word * word * 3 + word * document) % words.len();
                write!(text, "{} ", words[pick]).unwrap();
            }
            text.push_str("\n<|endoftext|>\n");
        }
        std::fs::write(folder.join(file), text).unwrap();
    }
}

/// A run on that corpus that takes milliseconds a step.
pub fn run_config(folder: &Path, precision: &str, out: &str, steps: u64) -> TrainConfig {
    // Weight-only models are Llama-like.
    let (inner, form) = match precision {
        "ternary-weights" => (64, "sub_norms = false\ngroup_size = 32"),
        _ => (48, ""),
    };
    let text = format!(
        r#"
        [model]
        vocab_size = 300
        hidden_size = 32
        intermediate_size = {inner}
        num_layers = 2
        heads = 2
        max_positions = 64
        precision = "{precision}"
        {form}
        [data]
        seq_len = 24
        cache = "tokens"
        [[data.sources]]
        name = "train"
        path = "train.txt"
        [[data.valid]]
        name = "valid"
        path = "valid.txt"
        [optimizer]
        lr = 0.01
        warmup_steps = 2
        [train]
        steps = {steps}
        batch = 3
        accumulation = 2
        threads = 2
        checkpoint_every = 3
        eval_every = 0
        log_every = 1
        out = "{out}"
        "#
    );
    TrainConfig::parse(&text, folder).unwrap()
}
