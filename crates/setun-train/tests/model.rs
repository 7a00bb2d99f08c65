//! The whole model: gradients, determinism, and that it learns.

mod common;

use common::{assert_close, noise, tiny, tiny_qwen3};
use setun::config::{ModelConfig, RopeTable};
use setun::model::Role;
use setun_train::config::OptimizerSection;
use setun_train::data::Batch;
use setun_train::engine::Engine;
use setun_train::optimizer::AdamW;
use setun_train::params::{self, Kind, ParamId, Params, TrainModel};
use setun_train::schedule::Rates;
use setun_train::tape::{Gradients, Setting, Tape};
use setun_train::trainer::forward;
use setun_train::weights::Weights;

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
        let mut optimizer = AdamW::new(&OptimizerSection::default(), &run.params);
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
    let mut optimizer = AdamW::new(&OptimizerSection::default(), &params);
    optimizer.step(&run.engine, &mut params, &zero, Rates { lr: 0.1, weight_decay: 0.5 });
    for (before, after) in run.params.iter().zip(params.iter()) {
        let factor = if matches!(before.kind, Kind::Matrix(Role::Ternary)) { 0.95 } else { 1.0 };
        let expected: Vec<f64> = before.values.iter().map(|w| f64::from(*w) * factor).collect();
        assert_close(&before.name, &after.values, &expected, 1e-6);
    }
}
