//! What a pass cannot do without: the numerator of every share of arithmetic.

use setun::config::{ActivationType, ModelConfig, Numerics};

use super::energy::{Arithmetic, Estimate, estimate};
use super::random::Kind;

/// Matrix products, attention's two products, and the head. Norms, softmax and the like are overhead, so they count against the
/// share.
pub struct Work {
    pub int8_macs: f64,
    pub float_flops: f64,
}

/// How a model is computed.
#[derive(Clone, Copy)]
pub struct Precision {
    pub activations: ActivationType,
    /// Whether the head is ternary although the configuration does not say so.
    pub ternary_head: bool,
}

impl Work {
    /// Of `tokens` tokens after `start` others, `heads` of which get logits.
    pub fn of(c: &ModelConfig, [tokens, start, heads]: [usize; 3], precision: Precision) -> Self {
        let mut work = Self { int8_macs: 0.0, float_flops: 0.0 };
        let mut product = |name: &str, rows: usize, macs: f64| {
            let ternary = c.is_ternary(name) || name == "lm_head" && precision.ternary_head;
            match ternary && precision.activations != ActivationType::Float {
                true => work.int8_macs += rows as f64 * macs,
                false => work.float_flops += 2.0 * rows as f64 * macs,
            }
        };
        for n in 0..c.num_layers {
            for (name, outputs, inputs) in c.mixer_weights(n) {
                product(&format!("model.layers.{n}.{name}"), tokens, (inputs * outputs) as f64);
            }
            // One expert stands for all: the experts of a token are as wide together as their number says.
            let (mlp, width) = match c.experts_in(n) {
                None => (format!("model.layers.{n}.mlp"), c.intermediate_size),
                Some(experts) => {
                    product(
                        &format!("model.layers.{n}.mlp.gate"),
                        tokens,
                        (c.hidden_size * experts.count) as f64,
                    );
                    (format!("model.layers.{n}.mlp.experts.0"), experts.used * experts.intermediate_size)
                }
            };
            for name in ["gate_proj", "up_proj", "down_proj"] {
                product(&format!("{mlp}.{name}"), tokens, (c.hidden_size * width) as f64);
            }
        }
        product("lm_head", heads, (c.hidden_size * c.vocab_size) as f64);
        for (n, window) in c.windows.iter().enumerate() {
            work.float_flops += match c.delta_net(n) {
                // Two products with the state and its update, the decay in one of them.
                Some(net) => 7.0 * (tokens * net.values() * net.head_dim) as f64,
                None => {
                    let seen: usize =
                        (start + 1..=start + tokens).map(|t| window.map_or(t, |w| t.min(w))).sum();
                    4.0 * (seen * c.heads * c.head_dim) as f64
                }
            };
        }
        work
    }

    /// Seconds that this takes at least, in operations per second.
    pub fn seconds(&self, int8_macs: f64, float_flops: f64) -> f64 {
        self.int8_macs / int8_macs + self.float_flops / float_flops
    }
}

/// The estimated energy of one token's matrix products. Dense weights are counted in their own type's arithmetic, whatever
/// this engine multiplies them in.
pub fn energy(c: &ModelConfig, kind: Option<Kind>, precision: Precision) -> Estimate {
    let ternary = match precision.activations {
        // The papers give no constants for four bits.
        ActivationType::Int8 | ActivationType::Int4 => Arithmetic::TernaryInt8,
        ActivationType::Float => Arithmetic::TernaryFp16,
    };
    let (blocks, head) = match kind {
        Some(Kind::F32) => (Arithmetic::Fp32, Arithmetic::Fp32),
        Some(Kind::F16 | Kind::Bf16) => (Arithmetic::Fp16, Arithmetic::Fp16),
        Some(Kind::Q8_0 | Kind::Q4_0) => (Arithmetic::Int8, Arithmetic::Int8),
        _ if c.numerics == Numerics::Float => (Arithmetic::Fp16, Arithmetic::Fp16),
        _ if precision.ternary_head => (ternary, ternary),
        _ => (ternary, Arithmetic::Fp16),
    };
    let head_weights = c.vocab_size * c.hidden_size;
    let embeddings = head_weights * (2 - usize::from(c.tied));
    // Of experts only those of a token; norms are too few to matter.
    let in_blocks = c.active_parameters().saturating_sub(embeddings).min(c.block_weights());
    estimate(&[(blocks, in_blocks), (head, head_weights)])
}

#[cfg(test)]
mod tests {
    use super::super::random;
    use super::*;

    const INT8: Precision = Precision { activations: ActivationType::Int8, ternary_head: false };

    #[test]
    fn prefill_multiplies_every_weight_once_per_token() {
        let config = &random::shape("tiny").unwrap().config(Kind::Ternary).unwrap();
        let tokens = 3;
        let work = Work::of(config, [tokens, 0, 1], INT8);
        assert_eq!(work.int8_macs, (tokens * config.block_weights()) as f64);
        let head = 2 * config.hidden_size * config.vocab_size;
        let attention = config.num_layers * 4 * (1 + 2 + 3) * config.hidden_size;
        assert_eq!(work.float_flops, (head + attention) as f64);
        let float = Precision { activations: ActivationType::Float, ..INT8 };
        assert_eq!(Work::of(config, [tokens, 0, 1], float).int8_macs, 0.0);
        // Token by token it is the same, but for the heads.
        let step = |start| Work::of(config, [1, start, 1], INT8).float_flops;
        assert_eq!(step(0) + step(1) + step(2), (3 * head + attention) as f64);
    }

    #[test]
    fn fewer_bits_never_take_more_energy() {
        let config = &random::shape("2b4t").unwrap().config(Kind::Ternary).unwrap();
        let kinds = [Kind::F32, Kind::Bf16, Kind::Q8_0];
        let falling: Vec<f64> = kinds.iter().map(|k| energy(config, Some(*k), INT8).joules_7nm).collect();
        assert!(falling.is_sorted_by(|a, b| a > b), "{falling:?}");
        // 2.08e9 additions of 0.007 pJ, and a head of 0.33e9 multiply-adds of 0.5 pJ.
        let ternary = energy(config, Some(Kind::Ternary), INT8).joules_7nm;
        assert!((ternary - (2.084e9 * 0.007e-12 + 0.3283e9 * 0.5e-12)).abs() < 1e-6, "{ternary}");
    }
}
