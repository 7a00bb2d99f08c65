//! Softmax attention over the KV cache, with grouped key and value heads.

use super::{Source, linear, norm, optional, project};
use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::ops::{Linear, Ops};

/// The weights of one attention layer.
#[derive(Debug, Clone)]
pub struct Attention<M, V> {
    /// Query projection, `[heads * head_dim, hidden_size]`; with an output gate, each head's rows are followed by as many of its gate.
    pub q: Linear<M, V>,
    /// Key projection, `[kv_heads * head_dim, hidden_size]`.
    pub k: Linear<M, V>,
    /// Value projection, `[kv_heads * head_dim, hidden_size]`.
    pub v: Linear<M, V>,
    /// Norm of every query head, `[head_dim]`, before RoPE (Qwen3).
    pub q_norm: Option<V>,
    /// Norm of every key head, `[head_dim]`, before RoPE (Qwen3).
    pub k_norm: Option<V>,
    /// BitNet's SubLN over the concatenated heads, before the output projection.
    pub sub_norm: Option<V>,
    /// Output projection, `[hidden_size, heads * head_dim]`.
    pub o: Linear<M, V>,
}

impl<M, V> Attention<M, V> {
    /// Asks `source` for the attention of the block called `layer` (`model.layers.0`).
    pub(super) fn build(
        c: &ModelConfig,
        layer: &str,
        source: &mut impl Source<Matrix = M, Vector = V>,
    ) -> Result<Self, ModelError> {
        let (q_out, kv_out) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let name = |part: &str| format!("{layer}.self_attn.{part}");
        let gated = 1 + usize::from(c.attention_gate);
        let linear =
            |source: &mut _, part: &str, rows, cols, bias| linear(c, source, &name(part), rows, cols, bias);
        Ok(Self {
            q: linear(source, "q_proj", gated * q_out, c.hidden_size, c.qkv_bias)?,
            k: linear(source, "k_proj", kv_out, c.hidden_size, c.qkv_bias)?,
            v: linear(source, "v_proj", kv_out, c.hidden_size, c.qkv_bias)?,
            q_norm: optional(c.qk_norm, source, &name("q_norm.weight"), c.head_dim)?,
            k_norm: optional(c.qk_norm, source, &name("k_norm.weight"), c.head_dim)?,
            sub_norm: optional(c.sub_norms, source, &name("attn_sub_norm.weight"), q_out)?,
            o: linear(source, "o_proj", c.hidden_size, q_out, c.output_bias)?,
        })
    }

    pub(super) fn linears(&self) -> [&Linear<M, V>; 4] {
        [&self.q, &self.k, &self.v, &self.o]
    }

    /// What layer `n` adds to the residual stream, given its normed input.
    pub(super) fn forward<O: Ops<Matrix = M, Vector = V>>(
        &self,
        c: &ModelConfig,
        n: usize,
        ops: &mut O,
        normed: O::Buf,
    ) -> O::Buf {
        let [q, k, v] = project(c, ops, &normed, [&self.q, &self.k, &self.v]);
        ops.release(normed);
        let (q, gate) = match c.attention_gate {
            true => {
                let [q, gate] = ops.split(q, c.head_dim);
                (q, Some(gate))
            }
            false => (q, None),
        };
        let (q, k) = (norm(c, ops, q, self.q_norm.as_ref()), norm(c, ops, k, self.k_norm.as_ref()));
        let (q, k) = (ops.rope(q, c.heads, c.head_dim), ops.rope(k, c.kv_heads, c.head_dim));
        let mixed = ops.attention(q, k, v, c.attention(n));
        let mixed = match gate {
            Some(gate) => ops.sigmoid_gate(gate, mixed),
            None => mixed,
        };
        let mixed = norm(c, ops, mixed, self.sub_norm.as_ref());
        let [out] = project(c, ops, &mixed, [&self.o]);
        ops.release(mixed);
        out
    }
}
