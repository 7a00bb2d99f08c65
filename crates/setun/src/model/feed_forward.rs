//! The gated feed-forward layer.

use super::{Source, linear, norm, optional, project};
use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::ops::{Linear, Ops};

/// The weights of one gated feed-forward layer: `down(act(gate(x)) * up(x))`.
#[derive(Debug, Clone)]
pub struct FeedForward<M, V> {
    /// Gate projection, `[intermediate_size, hidden_size]`.
    pub gate: Linear<M, V>,
    /// Up projection, `[intermediate_size, hidden_size]`.
    pub up: Linear<M, V>,
    /// BitNet's SubLN before the down projection.
    pub sub_norm: Option<V>,
    /// Down projection, `[hidden_size, intermediate_size]`.
    pub down: Linear<M, V>,
}

impl<M, V> FeedForward<M, V> {
    /// Asks `source` for the feed-forward layer of the block called `layer` (`model.layers.0`).
    pub(super) fn build(
        c: &ModelConfig,
        layer: &str,
        source: &mut impl Source<Matrix = M, Vector = V>,
    ) -> Result<Self, ModelError> {
        let (hidden, ffn) = (c.hidden_size, c.intermediate_size);
        let name = |part: &str| format!("{layer}.mlp.{part}");
        Ok(Self {
            gate: linear(c, source, &name("gate_proj"), ffn, hidden, c.mlp_bias)?,
            up: linear(c, source, &name("up_proj"), ffn, hidden, c.mlp_bias)?,
            sub_norm: optional(c.sub_norms, source, &name("ffn_sub_norm.weight"), ffn)?,
            down: linear(c, source, &name("down_proj"), hidden, ffn, c.mlp_bias)?,
        })
    }

    pub(super) fn linears(&self) -> [&Linear<M, V>; 3] {
        [&self.gate, &self.up, &self.down]
    }

    /// What the layer adds to the residual stream, given its normed input.
    pub(super) fn forward<O: Ops<Matrix = M, Vector = V>>(
        &self,
        c: &ModelConfig,
        ops: &mut O,
        normed: O::Buf,
    ) -> O::Buf {
        let [gate, up] = project(c, ops, &normed, [&self.gate, &self.up]);
        ops.release(normed);
        let gated = ops.gate(gate, up, c.activation);
        let gated = norm(c, ops, gated, self.sub_norm.as_ref());
        let [out] = project(c, ops, &gated, [&self.down]);
        ops.release(gated);
        out
    }
}
