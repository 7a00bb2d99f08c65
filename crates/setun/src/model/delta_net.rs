//! Gated DeltaNet: linear attention whose past is a convolution's last inputs and one matrix per head (arXiv 2412.06464).

use super::{Source, linear, norm, project};
use crate::config::{Activation, ModelConfig};
use crate::error::ModelError;
use crate::ops::{self, DeltaWeights, Linear, Ops};

/// The weights of one gated DeltaNet layer.
#[derive(Debug, Clone)]
pub struct DeltaNet<M, V> {
    shape: ops::DeltaNet,
    /// Queries, keys and values, `[channels, hidden_size]`.
    pub qkv: Linear<M, V>,
    /// Output gate, `[value_heads * head_dim, hidden_size]`.
    pub z: Linear<M, V>,
    /// How much of a token is written, `[value_heads, hidden_size]`, before its sigmoid.
    pub beta: Linear<M, V>,
    /// How much of the past is kept, `[value_heads, hidden_size]`, before its softplus.
    pub alpha: Linear<M, V>,
    /// Convolution over time, `[channels * conv_kernel]`.
    pub conv: V,
    /// Bias of `alpha`, `[value_heads]`.
    pub dt_bias: V,
    /// `−exp(A_log)`, `[value_heads]`.
    pub rate: V,
    /// Norm of every head of the output, `[head_dim]`, before the gate.
    pub norm: V,
    /// Output projection, `[hidden_size, value_heads * head_dim]`.
    pub out: Linear<M, V>,
}

impl<M, V> DeltaNet<M, V> {
    /// Asks `source` for the layer of the block called `layer` (`model.layers.0`).
    pub(super) fn build(
        c: &ModelConfig,
        shape: ops::DeltaNet,
        layer: &str,
        source: &mut impl Source<Matrix = M, Vector = V>,
    ) -> Result<Self, ModelError> {
        let (hidden, channels, heads) = (c.hidden_size, shape.channels(), shape.value_heads);
        let name = |part: &str| format!("{layer}.linear_attn.{part}");
        let linear =
            |source: &mut _, part: &str, rows, cols| linear(c, source, &name(part), rows, cols, false);
        Ok(Self {
            shape,
            qkv: linear(source, "in_proj_qkv", channels, hidden)?,
            z: linear(source, "in_proj_z", shape.values(), hidden)?,
            beta: linear(source, "in_proj_b", heads, hidden)?,
            alpha: linear(source, "in_proj_a", heads, hidden)?,
            conv: source.vector(&name("conv1d.weight"), channels * shape.conv_kernel)?,
            dt_bias: source.vector(&name("dt_bias"), heads)?,
            rate: source.vector(&name("A_log"), heads)?,
            norm: source.vector(&name("norm.weight"), shape.head_dim)?,
            out: linear(source, "out_proj", hidden, shape.values())?,
        })
    }

    pub(super) fn linears(&self) -> [&Linear<M, V>; 5] {
        [&self.qkv, &self.z, &self.beta, &self.alpha, &self.out]
    }

    /// What the layer adds to the residual stream, given its normed input.
    pub(super) fn forward<O: Ops<Matrix = M, Vector = V>>(
        &self,
        c: &ModelConfig,
        ops: &mut O,
        normed: O::Buf,
    ) -> O::Buf {
        // Two groups: the small pair is never folded into a rotation, and stays in floating point.
        let [qkv, z] = project(c, ops, &normed, [&self.qkv, &self.z]);
        let [alpha, beta] = project(c, ops, &normed, [&self.alpha, &self.beta]);
        ops.release(normed);
        let weights = DeltaWeights { conv: &self.conv, rate: &self.rate, dt_bias: &self.dt_bias };
        let mixed = ops.delta_net(qkv, alpha, beta, weights, self.shape);
        let mixed = norm(c, ops, mixed, Some(&self.norm));
        let gated = ops.gate(z, mixed, Activation::Silu);
        let [out] = project(c, ops, &gated, [&self.out]);
        ops.release(gated);
        out
    }
}
