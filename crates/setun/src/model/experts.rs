//! A mixture of experts: a router picks a few of many gated layers for each token (Qwen3-MoE).

use super::Source;
use super::feed_forward::Gated;
use crate::config::{self, ModelConfig};
use crate::error::ModelError;
use crate::model::Role;
use crate::ops::{Linear, Ops, Routing};

/// The weights of one expert layer: `Σ w(e) · expert_e(x)` over the experts `e` that the router picks for `x`.
#[derive(Debug, Clone)]
pub struct Experts<M, V> {
    /// Scores of all experts, `[experts, hidden_size]`; in floating point in every model.
    pub router: Linear<M, V>,
    /// How scores become a choice.
    pub routing: Routing,
    /// The experts, all of one shape.
    pub experts: Vec<Gated<M, V>>,
}

impl<M, V> Experts<M, V> {
    /// Asks `source` for the expert layer called `name` (`model.layers.0.mlp`).
    pub(super) fn build(
        c: &ModelConfig,
        experts: &config::Experts,
        name: &str,
        source: &mut impl Source<Matrix = M, Vector = V>,
    ) -> Result<Self, ModelError> {
        let router =
            source.matrix(&format!("{name}.gate.weight"), experts.count, c.hidden_size, Role::Float)?;
        let expert =
            |e: usize| Gated::build(c, experts.intermediate_size, &format!("{name}.experts.{e}"), source);
        Ok(Self {
            router: Linear::plain(router),
            routing: Routing { used: experts.used, normalised: experts.normalised },
            experts: (0..experts.count).map(expert).collect::<Result<_, _>>()?,
        })
    }

    pub(super) fn linears(&self) -> Vec<&Linear<M, V>> {
        std::iter::once(&self.router).chain(self.experts.iter().flat_map(Gated::linears)).collect()
    }

    /// What `size` adds up to over all experts.
    pub(crate) fn total(&self, size: impl Fn(&Linear<M, V>) -> usize) -> usize {
        self.experts.iter().flat_map(Gated::linears).map(size).sum()
    }

    pub(super) fn forward<O: Ops<Matrix = M, Vector = V>>(
        &self,
        c: &ModelConfig,
        ops: &mut O,
        normed: O::Buf,
    ) -> O::Buf {
        let [scores] = ops.linear(&normed, [&self.router]);
        ops.mixture(normed, scores, self.routing, |ops, e, rows| self.experts[e].forward(c, ops, rows))
    }
}
