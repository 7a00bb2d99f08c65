//! What a model is made of: the operations every executor provides, each written once per executor.
//!
//! [`crate::model`] calls these and nothing else, so the same page of code runs inference
//! ([`crate::cpu::CpuOps`]: packed weights, KV cache) and training (the tape of `setun-train`, which records the calls for the
//! backward pass). Operations are coarse on purpose: a few hundred calls per forward pass, each with
//! enough work inside that dispatch costs nothing.
//!
//! Rows of a buffer are the tokens of one batch, sequence after sequence; which sequence a row belongs to,
//! its position and its cached past are the executor's business, told to it before the pass.

use std::sync::Arc;

use setun_kernels::Kernels;
use setun_kernels::delta::DeltaShape;

use crate::config::{Activation, HeadOrder};

/// One linear layer: `y = x · Wᵀ + b`, with the RMS norm and the rotation of its own input that some ternary models put
/// inside it.
#[derive(Debug, Clone)]
pub struct Linear<M, V> {
    /// `[out_features, in_features]`.
    pub matrix: M,
    /// `[out_features]`.
    pub bias: Option<V>,
    /// Weight of an RMS norm over `[in_features]`, applied before the product (`use_rms_norm`).
    pub norm: Option<V>,
    /// Rotation of the input, before the product, that the matrix is folded with.
    pub rotation: Option<Rotate>,
    /// What is added to the product; never beside a norm or a rotation.
    pub adapter: Option<LowRank<M>>,
}

/// A low-rank addition to a linear layer (LoRA, <https://arxiv.org/abs/2106.09685>): `y + scale · (x · Aᵀ) · Bᵀ`, with `x` in
/// floats whatever the layer does with it.
#[derive(Debug, Clone)]
pub struct LowRank<M> {
    /// `A`, `[rank, in_features]`.
    pub a: M,
    /// `B`, `[out_features, rank]`.
    pub b: M,
    /// Factor.
    pub scale: f32,
}

impl<M, V> Linear<M, V> {
    /// A plain product, without bias, norm or rotation.
    pub fn plain(matrix: M) -> Self {
        Self { matrix, bias: None, norm: None, rotation: None, adapter: None }
    }
}

/// A rotation of rows: signs `s`, and blocks mixed by the orthonormal Walsh–Hadamard matrix `H` (see [`crate::config::Rotation`]).
#[derive(Debug, Clone, PartialEq)]
pub struct Rotate {
    /// Elements of a block, a power of two that divides the row.
    pub block: usize,
    /// ±1 for every element of a row; `None`: +1.
    pub signs: Option<Arc<[f32]>>,
}

/// Which way [`Ops::rotate`] turns. Each is the other's inverse, and its transpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// `H (s ⊙ x)`: into the basis of the folded weights.
    Forward,
    /// `s ⊙ H x`: out of it.
    Back,
}

impl Direction {
    /// The other way.
    pub fn reversed(self) -> Self {
        match self {
            Self::Forward => Self::Back,
            Self::Back => Self::Forward,
        }
    }
}

impl Rotate {
    /// Rotates one row in place. Panics unless it is whole blocks and as long as the signs.
    pub fn apply(&self, kernels: &Kernels, row: &mut [f32], direction: Direction) {
        if direction == Direction::Forward {
            self.sign(row);
        }
        kernels.hadamard(row, self.block);
        if direction == Direction::Back {
            self.sign(row);
        }
    }

    fn sign(&self, row: &mut [f32]) {
        let Some(signs) = &self.signs else { return };
        assert_eq!(row.len(), signs.len(), "signs of another width");
        for (x, sign) in row.iter_mut().zip(&signs[..]) {
            *x *= sign;
        }
    }
}

/// Shape of one layer's attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Attention {
    /// Index of the layer, which selects its part of the KV cache.
    pub layer: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; query head `h` reads key head `h / (heads / kv_heads)`.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Factor on `q·k`, normally `head_dim^-1/2`.
    pub scale: f32,
    /// With a window `w`, position `i` sees `j` with `i - w < j <= i`.
    pub window: Option<usize>,
}

/// How a router's scores pick the experts of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Routing {
    /// How many.
    pub used: usize,
    /// Whether their weights are divided by their sum.
    pub normalised: bool,
}

impl Routing {
    /// The experts of one token with their weights, in rising order of experts. `scores` become their softmax.
    ///
    /// Weights are the softmax over all experts; those of the [`used`](Self::used) largest stay, of equal ones those of the lower
    /// experts, and the sum for normalising runs from the largest down: `Qwen3MoeTopKRouter` of `transformers`, which leaves
    /// the order among equals open. Every step has the same bits on all machines and for every batch.
    pub fn pick(self, kernels: &Kernels, scores: &mut [f32]) -> Vec<(usize, f32)> {
        kernels.softmax_in_place(scores);
        let mut picked: Vec<(usize, f32)> = scores.iter().copied().enumerate().collect();
        let falling = |a: &(usize, f32), b: &(usize, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if self.used < picked.len() {
            picked.select_nth_unstable_by(self.used, falling);
            picked.truncate(self.used);
        }
        picked.sort_unstable_by(falling);
        if self.normalised {
            let sum: f32 = picked.iter().map(|(_, weight)| weight).sum();
            picked.iter_mut().for_each(|(_, weight)| *weight /= sum);
        }
        picked.sort_unstable_by_key(|&(expert, _)| expert);
        picked
    }
}

/// Shape of one gated DeltaNet layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeltaNet {
    /// Index of the layer, which selects its state.
    pub layer: usize,
    /// Query and key heads.
    pub key_heads: usize,
    /// Value heads, a multiple of the key heads.
    pub value_heads: usize,
    /// Width of one head, of keys and values alike.
    pub head_dim: usize,
    /// Tokens that the convolution sees, the current one included.
    pub conv_kernel: usize,
    /// Which value heads share a key head.
    pub order: HeadOrder,
}

impl DeltaNet {
    /// Width of queries, keys and values together: the channels of the convolution.
    pub fn channels(&self) -> usize {
        (2 * self.key_heads + self.value_heads) * self.head_dim
    }

    /// Parameters beside the matrices: convolution, decay, its bias, norm.
    pub fn vectors(&self) -> usize {
        self.channels() * self.conv_kernel + 2 * self.value_heads + self.head_dim
    }

    /// The same for the kernels.
    pub fn kernel_shape(&self) -> DeltaShape {
        DeltaShape {
            key_heads: self.key_heads,
            value_heads: self.value_heads,
            head_dim: self.head_dim,
            tiled: self.order == HeadOrder::Tiled,
        }
    }

    /// Floats of the layer's state: the convolution's last inputs, and the matrices of its heads.
    pub fn state_len(&self) -> [usize; 2] {
        [(self.conv_kernel - 1) * self.channels(), self.kernel_shape().state_len()]
    }

    /// Width of the output.
    pub fn values(&self) -> usize {
        self.value_heads * self.head_dim
    }
}

/// The vectors that a gated DeltaNet layer's state is driven by.
#[derive(Debug, Clone, Copy)]
pub struct DeltaWeights<'a, V> {
    /// Convolution, `[channels, conv_kernel]`, the current token's tap last.
    pub conv: &'a V,
    /// `−exp(A_log)`, `[value_heads]`.
    pub rate: &'a V,
    /// Added to `alpha` before its softplus, `[value_heads]`.
    pub dt_bias: &'a V,
}

/// The operations of one executor.
pub trait Ops {
    /// Activations of the batch: f32 `[tokens, width]`.
    type Buf;
    /// A weight matrix as this executor holds it: packed codes to run, a parameter to train.
    type Matrix;
    /// A weight vector: norm weights and biases.
    type Vector;

    /// Rows `ids` of the embedding `table`.
    fn embed(&mut self, table: &Self::Matrix, ids: &[u32]) -> Self::Buf;

    /// `x / sqrt(mean(x²) + eps) * weight`, row by row; a row of several heads as wide as `weight` is normalised head by head.
    fn rms_norm(&mut self, x: &Self::Buf, weight: &Self::Vector, eps: f32) -> Self::Buf;

    /// The products of one input with several matrices (q, k, v or gate, up): the input is quantised once. Inner norms and
    /// rotations are the caller's business: [`Linear::norm`] and [`Linear::rotation`] are ignored here.
    fn linear<const N: usize>(
        &mut self,
        x: &Self::Buf,
        layers: [&Linear<Self::Matrix, Self::Vector>; N],
    ) -> [Self::Buf; N];

    /// Rotates every row as [`Rotate`] says.
    fn rotate(&mut self, x: &Self::Buf, by: &Rotate, direction: Direction) -> Self::Buf;

    /// Rotates every head of every row to its row's position (RoPE, half-split pairs).
    fn rope(&mut self, x: Self::Buf, heads: usize, head_dim: usize) -> Self::Buf;

    /// Causal attention within each sequence: `q` `[tokens, heads * head_dim]`, `k` and `v` `[tokens, kv_heads * head_dim]`.
    fn attention(&mut self, q: Self::Buf, k: Self::Buf, v: Self::Buf, shape: Attention) -> Self::Buf;

    /// Each row's pieces of `width` elements, dealt out in turn: the first to one buffer, the second to the other, and so on.
    fn split(&mut self, x: Self::Buf, width: usize) -> [Self::Buf; 2];

    /// The gated delta rule within each sequence (arXiv 2412.06464), after a causal convolution over time with SiLU. Both have a
    /// state that is kept beside the KV cache. `qkv` is `[tokens, channels]` (queries, keys, values), `alpha` and `beta` are
    /// `[tokens, value_heads]`; the result is `[tokens, value_heads * head_dim]`, not normalised.
    fn delta_net(
        &mut self,
        qkv: Self::Buf,
        alpha: Self::Buf,
        beta: Self::Buf,
        weights: DeltaWeights<Self::Vector>,
        shape: DeltaNet,
    ) -> Self::Buf;

    /// `sigmoid(gate) * x`.
    fn sigmoid_gate(&mut self, gate: Self::Buf, x: Self::Buf) -> Self::Buf;

    /// `activation(gate) * up`.
    fn gate(&mut self, gate: Self::Buf, up: Self::Buf, activation: Activation) -> Self::Buf;

    /// [`Ops::gate`], then [`Ops::rms_norm`]: for executors that do both while a row is at hand.
    fn gate_normed(
        &mut self,
        gate: Self::Buf,
        up: Self::Buf,
        activation: Activation,
        weight: &Self::Vector,
        eps: f32,
    ) -> Self::Buf {
        let gated = self.gate(gate, up, activation);
        let normed = self.rms_norm(&gated, weight, eps);
        self.release(gated);
        normed
    }

    /// A mixture of experts: every row of `x` goes through the experts that [`Routing::pick`] gives for its row of `scores`
    /// `[tokens, experts]`, and the results, times their weights, are added up in rising order of experts.
    ///
    /// `expert(ops, e, rows)` is expert `e` on some rows, in the order of the batch. It is called once for each expert that a
    /// row needs, so that a batch reads the weights of an expert once; what a row gets does not depend on its company.
    fn mixture(
        &mut self,
        x: Self::Buf,
        scores: Self::Buf,
        routing: Routing,
        expert: impl FnMut(&mut Self, usize, Self::Buf) -> Self::Buf,
    ) -> Self::Buf;

    /// `x + y`: the residual stream.
    fn add(&mut self, x: Self::Buf, y: Self::Buf) -> Self::Buf;

    /// Called with every block's output (and the embedding and final norm) under the name that
    /// `setun logits --hidden` gives it. Executors that record nothing ignore it.
    fn tap(&mut self, _name: Tap, _x: &Self::Buf) {}

    /// Gives back a buffer that the model no longer needs.
    fn release(&mut self, _x: Self::Buf) {}
}

/// Where in the model a tapped buffer comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tap {
    /// The embedding, before the first block.
    Embed,
    /// Output of block `n`.
    Layer(usize),
    /// After the final norm.
    FinalNorm,
}

impl std::fmt::Display for Tap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Tap::Embed => f.write_str("embed"),
            Tap::Layer(n) => write!(f, "layer{n}"),
            Tap::FinalNorm => f.write_str("final_norm"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_scores_pick_the_lower_experts_and_weights_follow_the_softmax() {
        let pick = |used, normalised, scores: &[f32]| {
            Routing { used, normalised }.pick(Kernels::best(), &mut scores.to_vec())
        };
        let experts = |picked: Vec<(usize, f32)>| picked.into_iter().map(|(e, _)| e).collect::<Vec<_>>();
        assert_eq!(experts(pick(2, true, &[1.0; 5])), [0, 1]);
        assert_eq!(experts(pick(3, false, &[0.0, 2.0, 1.0, 2.0, 1.0])), [1, 2, 3]);
        assert_eq!(experts(pick(3, false, &[3.0, 2.0, 1.0])), [0, 1, 2]);
        // Softmax of 0, ln 2, ln 5 is 1/8, 2/8, 5/8.
        let scores = [0.0, 2f32.ln(), 5f32.ln()];
        let near = |found: Vec<(usize, f32)>, expected: [f32; 2]| {
            assert_eq!(experts(found.clone()), [1, 2]);
            assert!(found.iter().zip(expected).all(|((_, w), e)| (w - e).abs() < 1e-6), "{found:?}");
        };
        near(pick(2, false, &scores), [0.25, 0.625]);
        near(pick(2, true, &scores), [2.0 / 7.0, 5.0 / 7.0]);
    }

    #[test]
    fn scores_that_are_not_numbers_still_pick_as_many_experts_as_asked() {
        for scores in [[f32::NAN; 4], [f32::INFINITY; 4], [0.0, f32::NAN, 1.0, f32::NEG_INFINITY]] {
            let picked = Routing { used: 2, normalised: true }.pick(Kernels::best(), &mut scores.clone());
            assert!(picked.len() == 2 && picked[0].0 < picked[1].0, "{picked:?}");
        }
    }
}
