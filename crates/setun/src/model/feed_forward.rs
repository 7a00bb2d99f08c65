//! What a block does with each token alone: one gated layer, or a few of many.

use super::experts::Experts;
use super::{Source, linear, optional, project};
use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::ops::{Linear, Ops};

/// The feed-forward layer of one block.
#[derive(Debug, Clone)]
pub enum FeedForward<M, V> {
    /// The same weights for every token.
    Gated(Gated<M, V>),
    /// A mixture of experts.
    Experts(Experts<M, V>),
}

impl<M, V> FeedForward<M, V> {
    /// Asks `source` for the feed-forward layer of block `n`, which is called `layer` (`model.layers.0`).
    pub(super) fn build(
        c: &ModelConfig,
        n: usize,
        layer: &str,
        source: &mut impl Source<Matrix = M, Vector = V>,
    ) -> Result<Self, ModelError> {
        let name = format!("{layer}.mlp");
        Ok(match c.experts_in(n) {
            Some(experts) => Self::Experts(Experts::build(c, experts, &name, source)?),
            None => Self::Gated(Gated::build(c, c.intermediate_size, &name, source)?),
        })
    }

    pub(super) fn linears(&self) -> Vec<&Linear<M, V>> {
        match self {
            Self::Gated(layer) => layer.linears().into(),
            Self::Experts(layer) => layer.linears(),
        }
    }

    /// What the layer adds to the residual stream, given its normed input.
    pub(super) fn forward<O: Ops<Matrix = M, Vector = V>>(
        &self,
        c: &ModelConfig,
        ops: &mut O,
        normed: O::Buf,
    ) -> O::Buf {
        match self {
            Self::Gated(layer) => layer.forward(c, ops, normed),
            Self::Experts(layer) => layer.forward(c, ops, normed),
        }
    }
}

/// The weights of one gated layer: `down(act(gate(x)) * up(x))`.
#[derive(Debug, Clone)]
pub struct Gated<M, V> {
    /// Gate projection, `[width, hidden_size]`.
    pub gate: Linear<M, V>,
    /// Up projection, `[width, hidden_size]`.
    pub up: Linear<M, V>,
    /// BitNet's SubLN before the down projection.
    pub sub_norm: Option<V>,
    /// Down projection, `[hidden_size, width]`.
    pub down: Linear<M, V>,
}

impl<M, V> Gated<M, V> {
    /// Asks `source` for the layer called `name` (`model.layers.0.mlp`), `width` wide.
    pub(super) fn build(
        c: &ModelConfig,
        width: usize,
        name: &str,
        source: &mut impl Source<Matrix = M, Vector = V>,
    ) -> Result<Self, ModelError> {
        let hidden = c.hidden_size;
        let name = |part: &str| format!("{name}.{part}");
        Ok(Self {
            gate: linear(c, source, &name("gate_proj"), width, hidden, c.mlp_bias)?,
            up: linear(c, source, &name("up_proj"), width, hidden, c.mlp_bias)?,
            sub_norm: optional(c.sub_norms, source, &name("ffn_sub_norm.weight"), width)?,
            down: linear(c, source, &name("down_proj"), hidden, width, c.mlp_bias)?,
        })
    }

    pub(super) fn linears(&self) -> [&Linear<M, V>; 3] {
        [&self.gate, &self.up, &self.down]
    }

    pub(super) fn forward<O: Ops<Matrix = M, Vector = V>>(
        &self,
        c: &ModelConfig,
        ops: &mut O,
        normed: O::Buf,
    ) -> O::Buf {
        let [gate, up] = project(c, ops, &normed, [&self.gate, &self.up]);
        ops.release(normed);
        let gated = match &self.sub_norm {
            Some(weight) => ops.gate_normed(gate, up, c.activation, weight, c.rms_norm_eps),
            None => ops.gate(gate, up, c.activation),
        };
        let [out] = project(c, ops, &gated, [&self.down]);
        ops.release(gated);
        out
    }
}
