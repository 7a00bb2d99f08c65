//! The output head with cross-entropy, a few hundred tokens at a time: logits of a whole batch are never kept.

use setun_kernels::gemm::{Into, View, ViewMut, gemm_on};

use crate::engine::{Floats, LANES, multiply, subtract, sum2, vectorised};
use crate::params::ParamId;
use crate::tape::{Tape, Var};

/// The target of a token whose prediction does not count.
pub const IGNORE: u32 = u32::MAX;

/// Tokens whose logits exist at the same time.
const TOKENS: usize = 512;

/// Cross-entropy of a batch.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Loss {
    /// Σ -ln p(target), in nats.
    pub sum: f64,
    /// Tokens that count.
    pub tokens: usize,
}

impl Loss {
    /// Nats per token.
    pub fn mean(&self) -> f64 {
        self.sum / self.tokens.max(1) as f64
    }
}

impl std::ops::AddAssign for Loss {
    fn add_assign(&mut self, other: Self) {
        self.sum += other.sum;
        self.tokens += other.tokens;
    }
}

impl Tape<'_> {
    /// `-ln softmax(hidden · headᵀ)[target]` over all tokens but those with [`IGNORE`].
    ///
    /// - `head`: `[vocab_size, width]` in floats, the embedding when tied.
    /// - `weight`: what a token's loss is multiplied with in the objective, normally one over the tokens of the step.
    ///   The sum returned is unweighted.
    ///
    /// A target outside the vocabulary has no probability: the loss becomes infinite.
    pub fn cross_entropy(&mut self, hidden: &Var, head: ParamId, targets: &[u32], weight: f32) -> Loss {
        let losses = self.head_pass(hidden, head, targets, Some(|_| weight));
        Loss { sum: losses.iter().sum(), tokens: targets.iter().filter(|&&t| t != IGNORE).count() }
    }

    /// [`Tape::cross_entropy`] of every token alone, without any gradient: 0 where the target is [`IGNORE`].
    pub fn token_losses(&mut self, hidden: &Var, head: ParamId, targets: &[u32]) -> Vec<f64> {
        self.head_pass(hidden, head, targets, None::<fn(usize) -> f32>)
    }

    /// [`Tape::cross_entropy`] with a weight for each token, by its place; weights may be negative.
    pub fn weighted_cross_entropy(
        &mut self,
        hidden: &Var,
        head: ParamId,
        targets: &[u32],
        weight: impl Fn(usize) -> f32 + Sync,
    ) -> Vec<f64> {
        self.head_pass(hidden, head, targets, Some(weight))
    }

    /// The tokens' losses; with weights, their gradient is ready to flow back.
    fn head_pass(
        &mut self,
        hidden: &Var,
        head: ParamId,
        targets: &[u32],
        weight: Option<impl Fn(usize) -> f32 + Sync>,
    ) -> Vec<f64> {
        assert_eq!(targets.len(), self.tokens(), "targets of {} tokens", self.tokens());
        let on = self.on;
        let (pool, records) = (&on.engine.pool, self.records() && weight.is_some());
        let (vocab, width) = (on.params[head].rows, on.params[head].cols);
        let table = View::new(&on.params[head].values, vocab, width, width);
        let mut losses = vec![0.0f64; targets.len()];
        let mut grad: Option<Floats> = records.then(|| on.engine.scratch(hidden.values().len()));
        let mut logits = on.engine.scratch(TOKENS.min(targets.len()) * vocab);
        for (part, targets) in targets.chunks(TOKENS).enumerate() {
            let count = targets.len();
            let rows = part * TOKENS..part * TOKENS + count;
            let logits = &mut logits[..count * vocab];
            let x = View::new(&hidden.values()[rows.start * width..], count, width, width);
            gemm_on(pool, ViewMut::new(logits, count, vocab, vocab), Into::Set, 1.0, x, table.t());
            let per_token = logits.chunks_exact_mut(vocab).zip(&mut losses[rows.clone()]).collect::<Vec<_>>();
            pool.run_items(per_token, |i, (row, loss)| {
                let weight = weight.as_ref().map_or(0.0, |weight| weight(rows.start + i));
                *loss = token(on.engine.kernels, row, targets[i], weight);
            });
            let Some(grad) = &mut grad else { continue };
            let slopes = View::new(logits, count, vocab, vocab);
            let dx = ViewMut::new(&mut grad[rows.start * width..rows.end * width], count, width, width);
            gemm_on(pool, dx, Into::Set, 1.0, slopes, table);
            if self.trains(head) {
                let dw = ViewMut::new(self.param_grad(head), vocab, width, width);
                gemm_on(pool, dw, Into::Add, 1.0, slopes.t(), x);
            }
        }
        if let Some(grad) = grad {
            self.give(hidden.id(), grad);
        }
        losses
    }
}

/// Turns a row into `weight · softmax(row)`; returns its largest value and the sum of the exponentials beyond it.
pub(crate) fn softmax(kernels: &setun_kernels::Kernels, row: &mut [f32], weight: f32) -> (f32, f32) {
    let top = vectorised(
        #[inline(always)]
        || {
            let top = largest(row);
            subtract(row, top);
            top
        },
    );
    kernels.exp_in_place(row);
    let sum = vectorised(
        #[inline(always)]
        || {
            let sum = sum2(row, row, |a, _| a);
            multiply(row, weight / sum);
            sum
        },
    );
    (top, sum)
}

/// One token's loss; turns its logits into `weight · (softmax - target)`.
fn token(kernels: &setun_kernels::Kernels, row: &mut [f32], target: u32, weight: f32) -> f64 {
    if target == IGNORE {
        row.fill(0.0);
        return 0.0;
    }
    let logit = row.get(target as usize).copied().unwrap_or(f32::NEG_INFINITY);
    let (top, sum) = softmax(kernels, row, weight);
    if let Some(p) = row.get_mut(target as usize) {
        *p -= weight;
    }
    f64::from(sum).ln() - f64::from(logit - top)
}

/// The largest element. NaN never wins, but then the sum is NaN and so is the loss.
#[inline(always)]
pub(crate) fn largest(row: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (groups, rest) = row.as_chunks::<LANES>();
    for group in groups {
        for i in 0..LANES {
            lanes[i] = if group[i] > lanes[i] { group[i] } else { lanes[i] };
        }
    }
    lanes.into_iter().chain(rest.iter().copied()).fold(f32::NEG_INFINITY, f32::max)
}
