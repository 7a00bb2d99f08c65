//! How much arithmetic a training step is, and how much this machine could do: the share of the peak that a run reaches.
//!
//! Only matrix products count, each once: what the backward pass computes again (attention's scores) does not. With `T`
//! tokens in sequences of `n`, a matrix `[r, c]` and attention of `h` heads of width `d`:
//!
//! | product | forward | backward |
//! |---|---|---|
//! | ternary matrix | `T·r·c` integer multiply-adds | `2 · 2·T·r·c` float operations (input and weight gradient) |
//! | float matrix, output head | `2·T·r·c` float operations | twice that |
//! | attention, a layer | `2 · 2·h·d · T·(n+1)/2` float operations (scores and mixing, causal half) | twice that |
//!
//! The share is `(integer multiply-adds / integer peak + float operations / float peak) / seconds`: the time that the
//! arithmetic would take at the peaks over the time that the step took.

use setun_kernels::peak;

use crate::engine::Engine;
use crate::params::{Kind, Params, TrainModel};
use crate::trainer::head;
use crate::weights::Weights;
use setun::model::Role;

/// Arithmetic of one token, forward and backward.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Work {
    /// Int8 multiply-adds.
    pub int8_macs: f64,
    /// Float operations, two for a multiply-add.
    pub float_flops: f64,
}

impl Work {
    /// What training `model` on sequences of `seq_len` tokens takes per token.
    pub fn per_token(model: &TrainModel, params: &Params, weights: &Weights, seq_len: usize) -> Self {
        let mut work = Self::default();
        for id in params.ids() {
            let param = &params[id];
            let size = (param.rows * param.cols) as f64;
            let multiplied = matches!(param.kind, Kind::Matrix(role) if role != Role::Embedding);
            if weights.matrix(id).is_some() {
                work.int8_macs += size;
                work.float_flops += 4.0 * size;
            } else if multiplied || id == head(model) {
                work.float_flops += 6.0 * size; // Embeddings are looked up, but the head's product is one.
            }
        }
        let config = &model.config;
        let attention = 4.0 * (config.heads * config.head_dim) as f64 * (seq_len + 1) as f64 / 2.0;
        work.float_flops += 3.0 * config.num_layers as f64 * attention;
        work
    }
}

/// What this machine can do at most with the run's threads, from registers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Peaks {
    /// Int8 multiply-adds per second.
    pub int8_macs: f64,
    /// Float operations per second.
    pub float_flops: f64,
}

impl Peaks {
    /// Measures both; takes some hundredths of a second. What else runs on the machine lowers them.
    pub fn measure(engine: &Engine) -> Self {
        let (kernels, pool) = (engine.kernels, &engine.pool);
        Self { int8_macs: peak::int8_peak(kernels, pool), float_flops: peak::float_peak(kernels, pool) }
    }

    /// The share of them that so many tokens per second make.
    pub fn share(&self, work: Work, tokens_per_s: f64) -> f64 {
        tokens_per_s * (work.int8_macs / self.int8_macs + work.float_flops / self.float_flops)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::initialise;
    use setun::config::{Activation, ModelConfig, Shape};

    #[test]
    fn the_work_of_a_small_model_is_what_its_shape_says_by_hand() {
        let mut shape = Shape {
            vocab_size: 100,
            hidden_size: 16,
            intermediate_size: 24,
            num_layers: 2,
            heads: 4,
            kv_heads: 2,
            max_positions: 64,
            rope_theta: 10_000.0,
            tied: true,
            sub_norms: true,
            activation: Activation::Relu2,
        };
        let engine = Engine::new(1);
        let work = |shape: &Shape, ternary: bool| {
            let (model, params) = initialise(ModelConfig::fresh(shape, ternary).unwrap(), 1).unwrap();
            Work::per_token(&model, &params, &Weights::new(&engine, &params), 9)
        };
        // q and o 16×16, k and v 8×16, gate, up and down 24×16.
        let block = 2.0 * (2.0 * 256.0 + 2.0 * 128.0 + 3.0 * 384.0);
        let head = 6.0 * 1600.0;
        let attention = 2.0 * 3.0 * 4.0 * 16.0 * 5.0; // A token sees five keys in the mean.
        let ternary = Work { int8_macs: block, float_flops: 4.0 * block + head + attention };
        let float = Work { int8_macs: 0.0, float_flops: 6.0 * block + head + attention };
        assert_eq!(work(&shape, true), ternary);
        assert_eq!(work(&shape, false), float);
        shape.tied = false; // The embedding is only looked up, the head is as large as before.
        assert_eq!(work(&shape, true), ternary);
    }

    #[test]
    fn a_step_that_takes_as_long_as_its_arithmetic_at_the_peaks_is_a_share_of_one() {
        let (peaks, work) =
            (Peaks { int8_macs: 100.0, float_flops: 50.0 }, Work { int8_macs: 10.0, float_flops: 20.0 });
        assert!((peaks.share(work, 2.0) - 1.0).abs() < 1e-12);
    }
}
