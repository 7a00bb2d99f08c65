//! The whole model: gradients, determinism, and that it learns.

mod common;

use common::{assert_close, noise, tiny, tiny_qwen3};
use setun::config::{ActivationType, ModelConfig, RopeTable};
use setun::model::Role;
use setun::ops::{Linear, Ops};
use setun_train::config::OptimizerSection;
use setun_train::data::Batch;
use setun_train::engine::Engine;
use setun_train::optimizer::Optimizer;
use setun_train::params::{self, Kind, Param, ParamId, Params, TrainModel};
use setun_train::schedule::Rates;
use setun_train::tape::{Gradients, Setting, Tape};
use setun_train::trainer::forward;
use setun_train::weights::{Recipe, Weights};

struct Run {
    engine: Engine,
    model: TrainModel,
    params: Params,
    weights: Weights,
    rope: RopeTable,
}

impl Run {
    fn new(config: ModelConfig, threads: usize) -> Self {
        let engine = Engine::new(threads);
        let mut rope = RopeTable::new(&config.rope);
        rope.prepare(256);
        let (model, params) = params::initialise(config, 1).unwrap();
        let weights = Weights::new(&engine, &params);
        Self { engine, model, params, weights, rope }
    }

    fn setting(&self, batch: &Batch) -> Setting<'_> {
        let Self { engine, params, weights, rope, .. } = self;
        Setting { engine, params, weights, rope, sequences: batch.batch, seq_len: batch.seq_len }
    }

    fn loss(&self, batch: &Batch) -> f64 {
        forward(&self.model, &mut Tape::forward_only(self.setting(batch)), batch, 0.0).mean()
    }

    fn gradients(&self, batch: &Batch) -> Gradients {
        let mut gradients = Gradients::new(&self.params);
        let mut tape = Tape::new(self.setting(batch), &mut gradients);
        forward(&self.model, &mut tape, batch, 1.0 / batch.ids.len() as f32);
        tape.backward();
        gradients
    }
}

fn batch(sequences: usize, seq_len: usize, vocab: u32) -> Batch {
    let ids: Vec<u32> =
        noise(sequences * seq_len + 1, 3).iter().map(|x| ((x + 1.0) / 2.0 * vocab as f32) as u32).collect();
    let targets = ids[1..].to_vec();
    Batch { ids: ids[..sequences * seq_len].to_vec(), targets, starts: Vec::new(), batch: sequences, seq_len }
}

#[test]
fn the_gradient_of_a_float_model_is_that_of_its_loss() {
    [tiny(false), tiny_qwen3()].into_iter().for_each(gradient_is_that_of_the_loss);
}

fn gradient_is_that_of_the_loss(config: ModelConfig) {
    let mut run = Run::new(config, 2);
    // Larger weights than at the start of a run, so that every part matters.
    let ids: Vec<ParamId> = run.params.ids().collect();
    for (i, &id) in ids.iter().enumerate() {
        let new = noise(run.params[id].values.len(), 40 + i as u32);
        let norm = run.params[id].kind == Kind::Norm;
        for (w, n) in run.params.values_mut(id).iter_mut().zip(new) {
            *w = if norm { 1.0 + 0.3 * n } else { 0.5 * n };
        }
    }
    let batch = batch(2, 7, 13);
    let gradients = run.gradients(&batch);
    for id in ids {
        let name = run.params[id].name.clone();
        let h = 4e-3;
        let numeric: Vec<f64> = (0..run.params[id].values.len())
            .map(|at| {
                let mut side = |h: f32| {
                    let old = run.params[id].values[at];
                    run.params.values_mut(id)[at] = old + h;
                    let loss = run.loss(&batch);
                    run.params.values_mut(id)[at] = old;
                    loss
                };
                (side(h) - side(-h)) / f64::from(2.0 * h)
            })
            .collect();
        assert_close(&name, gradients.get(id), &numeric, 1e-2);
    }
}

#[test]
fn a_step_has_the_same_bits_for_any_number_of_threads() {
    for ternary in [true, false] {
        let gradients: Vec<Gradients> =
            [1, 2, 3].map(|threads| Run::new(tiny(ternary), threads).gradients(&batch(5, 33, 13))).into();
        for other in &gradients[1..] {
            assert!(gradients[0].iter().zip(other.iter()).all(|(a, b)| a == b), "ternary: {ternary}");
        }
    }
}

/// Two sequences of documents of the given lengths.
fn packed(lengths: &[usize]) -> Batch {
    let seq_len = lengths.iter().sum();
    let mut made = batch(2, seq_len, 13);
    let mut sequence = Vec::new();
    for &n in lengths {
        sequence.extend(std::iter::repeat_n(sequence.len() as u32, n));
    }
    made.starts = sequence.repeat(2);
    made
}

#[test]
fn packed_documents_have_the_losses_of_documents_alone() {
    for config in [tiny(true), tiny(false), tiny_qwen3()] {
        let run = Run::new(config, 2);
        let packed = packed(&[70, 1, 2, 40]);
        let mut alone = 0.0;
        for (sequence, (ids, targets)) in packed.ids.chunks(113).zip(packed.targets.chunks(113)).enumerate() {
            for document in [0..70, 70..71, 71..73, 73..113] {
                let (ids, targets) = (ids[document.clone()].to_vec(), targets[document.clone()].to_vec());
                let seq_len = ids.len();
                let single = Batch { ids, targets, batch: 1, seq_len, starts: Vec::new() };
                let loss = run.loss(&single);
                alone += loss * seq_len as f64;
                // This document alone counts, so that nothing cancels out.
                let mut only = packed.clone();
                let counted = sequence * 113 + document.start..sequence * 113 + document.end;
                for (i, target) in only.targets.iter_mut().enumerate() {
                    if !counted.contains(&i) {
                        *target = setun_train::loss::IGNORE;
                    }
                }
                // Ternary products are exact; the float ones of another number of rows may add in another order.
                let difference = (run.loss(&only) - loss).abs();
                assert!(difference < 1e-6 * loss, "{document:?}: {difference:e} of {loss}");
            }
        }
        assert!((run.loss(&packed) * 226.0 - alone).abs() < 1e-6 * alone);
        let joined = Batch { starts: Vec::new(), ..packed.clone() };
        assert!((run.loss(&joined) - run.loss(&packed)).abs() > 1e-4, "what precedes a document matters");
    }
}

#[test]
fn a_step_on_packed_documents_has_the_same_bits_for_any_number_of_threads() {
    for ternary in [true, false] {
        let batch = packed(&[3, 66, 1, 9]);
        let of = |threads| Run::new(tiny(ternary), threads).gradients(&batch);
        let first = of(1);
        for other in [2, 3].map(of) {
            assert!(first.iter().zip(other.iter()).all(|(a, b)| a == b), "ternary: {ternary}");
        }
    }
}

#[test]
fn one_batch_can_be_learnt_by_heart() {
    for ternary in [true, false] {
        let mut run = Run::new(tiny(ternary), 2);
        let batch = batch(2, 16, 13);
        let mut optimizer = Optimizer::new(&OptimizerSection::default(), &run.params);
        let first = run.loss(&batch);
        for _ in 0..300 {
            let gradients = run.gradients(&batch);
            optimizer.step(&run.engine, &mut run.params, &gradients, Rates { lr: 1e-2, weight_decay: 0.0 });
            run.weights.refresh(&run.engine, &run.params);
        }
        let last = run.loss(&batch);
        assert!(first > 2.0 && last < 0.1, "ternary: {ternary}, loss {first} -> {last}");
    }
}

#[test]
fn weight_decay_spares_embedding_norms_and_biases() {
    let run = Run::new(tiny(true), 1);
    let zero = Gradients::new(&run.params);
    let mut params = run.params.clone();
    let mut optimizer = Optimizer::new(&OptimizerSection::default(), &params);
    optimizer.step(&run.engine, &mut params, &zero, Rates { lr: 0.1, weight_decay: 0.5 });
    for (before, after) in run.params.iter().zip(params.iter()) {
        let factor = if matches!(before.kind, Kind::Matrix(Role::Ternary)) { 0.95 } else { 1.0 };
        let expected: Vec<f64> = before.values.iter().map(|w| f64::from(*w) * factor).collect();
        assert_close(&before.name, &after.values, &expected, 1e-6);
    }
}

#[test]
fn without_strength_a_ternary_model_is_its_float_twin_and_with_all_of_it_itself() {
    let batch = batch(2, 12, 13);
    let twin = Run::new(tiny(false), 2).loss(&batch);
    let mut run = Run::new(tiny(true), 2);
    let exact = run.loss(&batch);
    let mut at = |strength| {
        run.weights = Weights::with(&run.engine, &run.params, Recipe { strength, ..Recipe::default() });
        run.loss(&batch)
    };
    assert!((at(0.0) - twin).abs() < 1e-6, "{} {twin}", at(0.0));
    assert_eq!(at(1.0), exact);
    // Just below full strength products are of floats: no integer sums, the same numbers.
    assert!((at(0.999_999) - exact).abs() < 1e-4, "{} {exact}", at(0.999_999));
    assert!((at(0.5) - twin).abs() > 1e-6 && (at(0.5) - exact).abs() > 1e-6);
}

#[test]
fn gradients_of_every_recipe_are_those_of_the_float_model_with_its_weights_and_inputs() {
    // Straight-through: for a linear layer alone, y = x' W'ᵀ, dx = dy W', dW = dyᵀ x'.
    let (rows, cols, tokens) = (12, 20, 5);
    let (x, dy) = (noise(tokens * cols, 1), noise(tokens * rows, 2));
    for (group, activations, strength) in [
        (Some(8), ActivationType::Float, 1.0),
        (Some(8), ActivationType::Float, 0.3),
        (None, ActivationType::Int8, 0.3),
        (None, ActivationType::Int4, 1.0),
        (None, ActivationType::Int4, 0.3),
    ] {
        let (engine, mut params) = (Engine::new(2), Params::default());
        let (name, kind) = ("w".to_owned(), Kind::Matrix(Role::Ternary));
        let id = params.add(Param { name, rows, cols, kind, values: noise(rows * cols, 3) });
        let recipe = Recipe { group, activations, strength };
        let weights = Weights::with(&engine, &params, recipe);
        let w: Vec<f64> = {
            let matrix = recipe.quantize(&engine, &params[id]).unwrap();
            let mut row = vec![0.0; cols];
            let all = (0..rows).flat_map(|r| {
                matrix.dequantize_row(r, &mut row);
                row.clone()
            });
            let master = params[id].values.iter();
            all.zip(master).map(|(t, &m)| f64::from(m) + f64::from(strength) * f64::from(t - m)).collect()
        };
        let rounded: Vec<f64> = x
            .chunks(cols)
            .flat_map(|row| {
                let largest = row.iter().fold(0f32, |m, v| m.max(v.abs()));
                let mean = row.iter().map(|v| f64::from(v.abs())).sum::<f64>() / row.len() as f64;
                let (a, least, most) = match activations {
                    ActivationType::Int4 => (7f64.sqrt() / mean, -8.0, 7.0),
                    _ => (127.0 / f64::from(largest), -128.0, 127.0),
                };
                let one = move |&v: &f32| {
                    let v = f64::from(v);
                    let q = (v * a).round_ties_even().clamp(least, most) / a;
                    if activations == ActivationType::Float { v } else { v + f64::from(strength) * (q - v) }
                };
                row.iter().map(one).collect::<Vec<_>>()
            })
            .collect();
        let rope = RopeTable::new(&tiny(true).rope);
        let setting = Setting {
            engine: &engine,
            params: &params,
            weights: &weights,
            rope: &rope,
            sequences: 1,
            seq_len: tokens,
        };
        let mut gradients = Gradients::new(&params);
        let mut tape = Tape::new(setting, &mut gradients);
        let input = tape.input(&x, cols);
        let [y] = tape.linear(&input, [&Linear::plain(id)]);
        let product = |n: usize, m: usize, k: usize, f: &dyn Fn(usize, usize, usize) -> f64| -> Vec<f64> {
            (0..n * m).map(|i| (0..k).map(|l| f(i / m, i % m, l)).sum()).collect()
        };
        let dy64: Vec<f64> = dy.iter().map(|&v| f64::from(v)).collect();
        let expected = product(tokens, rows, cols, &|t, r, c| rounded[t * cols + c] * w[r * cols + c]);
        assert_close("y", y.values(), &expected, 1e-5);
        tape.seed(&y, &dy);
        let [dx] = tape.backward_to([&input]);
        let expected = product(tokens, cols, rows, &|t, c, r| dy64[t * rows + r] * w[r * cols + c]);
        assert_close("dx", &dx.unwrap(), &expected, 1e-5);
        let expected = product(rows, cols, tokens, &|r, c, t| dy64[t * rows + r] * rounded[t * cols + c]);
        assert_close("dw", gradients.get(id), &expected, 1e-5);
    }
}
