//! Speed and memory of a training step on random tokens: `train_speed [ternary|float] [steps] [threads]`.
//!
//! The model is the one that docs/results.md compares trainers with: vocabulary 4096, hidden 256, 6 layers, feed-forward 768,
//! 4 heads, tied, 16 sequences of 256 tokens. What limits a step is arithmetic, so the last line says how much of it there was.

use std::time::Instant;

use setun::config::{Activation, ModelConfig, RopeTable, Shape};
use setun_train::census::Census;
use setun_train::config::OptimizerSection;
use setun_train::data::Batch;
use setun_train::engine::Engine;
use setun_train::optimizer::Optimizer;
use setun_train::params;
use setun_train::schedule::Rates;
use setun_train::tape::{Gradients, Setting, Tape};
use setun_train::trainer::forward;
use setun_train::weights::Weights;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let ternary = args.first().is_none_or(|a| a != "float");
    let number = |i: usize, default: usize| args.get(i).and_then(|a| a.parse().ok()).unwrap_or(default);
    let (steps, threads) = (number(1, 10), number(2, setun_kernels::threads::physical_cores_allowed()));
    let shape = Shape {
        vocab_size: 4096,
        hidden_size: 256,
        intermediate_size: 768,
        num_layers: 6,
        heads: 4,
        kv_heads: 4,
        max_positions: 256,
        rope_theta: 10_000.0,
        tied: true,
        sub_norms: true,
        activation: Activation::Relu2,
    };
    let config = ModelConfig::fresh(&shape, ternary).expect("the shape is sound");
    let (sequences, seq_len) = (16, 256);
    let tokens = sequences * seq_len;
    let ids: Vec<u32> = (0..=tokens as u32).map(|i| i.wrapping_mul(2_654_435_761) >> 20).collect();
    let (ids, targets) = (ids[..tokens].to_vec(), ids[1..].to_vec());
    let batch = Batch { ids, targets, starts: Vec::new(), batch: sequences, seq_len };

    let engine = Engine::new(threads);
    let mut rope = RopeTable::new(&config.rope);
    rope.prepare(seq_len);
    let block_weights = config.block_weights();
    let (model, mut params) = params::initialise(config, 1).expect("the model builds");
    let mut weights = Weights::new(&engine, &params);
    let mut gradients = Gradients::new(&params);
    let mut optimizer = Optimizer::new(&OptimizerSection::default(), &params);
    let mut census = Census::new(&params, &weights);
    let mut times = Vec::new();
    for step in 0..steps {
        let mut marks = vec![Instant::now()];
        gradients.clear(&engine);
        let on =
            Setting { engine: &engine, params: &params, weights: &weights, rope: &rope, sequences, seq_len };
        let mut tape = Tape::new(on, &mut gradients);
        let loss = forward(&model, &mut tape, &batch, 1.0 / tokens as f32);
        marks.push(Instant::now());
        tape.backward();
        marks.push(Instant::now());
        optimizer.step(&engine, &mut params, &gradients, Rates { lr: 1e-3, weight_decay: 0.1 });
        marks.push(Instant::now());
        weights.refresh(&engine, &params);
        marks.push(Instant::now());
        census.look(&params, &weights);
        marks.push(Instant::now());
        let parts: Vec<String> =
            marks.windows(2).map(|m| format!("{:.2}", (m[1] - m[0]).as_secs_f64() * 1e3)).collect();
        let seconds = (marks[5] - marks[0]).as_secs_f64();
        eprintln!(
            "step {step}: loss {:.4}, {:.0} tokens/s; ms forward and head, backward, optimiser, ternarise, census: {}",
            loss.mean(),
            tokens as f64 / seconds,
            parts.join(", ")
        );
        times.push(seconds);
    }
    times.sort_by(f64::total_cmp);
    let (best, median) = (times[0], times[times.len() / 2]);
    let flops = tokens as f64 * 6.0 * (block_weights + shape.vocab_size * shape.hidden_size) as f64;
    println!(
        "{} {threads} threads: {:.0} tokens/s median, {:.0} best; {:.0} GFLOP/s of matrix products at the median; peak memory {}",
        if ternary { "ternary" } else { "float" },
        tokens as f64 / median,
        tokens as f64 / best,
        flops / median / 1e9,
        peak_memory().unwrap_or_default()
    );
}

/// The process's largest resident size, where the system tells it.
fn peak_memory() -> Option<String> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    Some(status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?.trim().to_owned())
}
