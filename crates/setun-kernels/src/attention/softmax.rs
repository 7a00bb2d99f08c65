//! The softmax over one segment, and how segments are put together.

use super::store::WIDTH;
use super::{BLOCK, SEGMENT};
use crate::lanes::{Arithmetic, Chunk, Lanes, One};

/// Chunks of a row of scores.
pub(super) const SCORES: usize = SEGMENT / BLOCK * WIDTH;

/// `e^x` for `x <= 0`, at most 5e-7 relative off; exactly 0 below −87.7 (and for minus infinity), so that what a row does not see
/// weighs nothing. `2^n` times the Taylor polynomial of degree 6 on `|r| ≤ ln 2 / 2`.
#[inline(always)]
pub(super) fn exp_weight<S: Arithmetic>(s: S, x: S::V) -> S::V {
    // Adding 1.5 * 2^23 leaves the nearest integer in the lowest bits of the sum.
    const ROUND: f32 = 12_582_912.0;
    // At −88 the exponent field is 0, which makes the power a zero. The constant comes first to let a NaN through.
    let x = s.max(s.splat(-88.0), x);
    let shifted = s.fma(x, s.splat(std::f32::consts::LOG2_E), s.splat(ROUND));
    let r = s.fma(s.sub(shifted, s.splat(ROUND)), s.splat(-std::f32::consts::LN_2), x);
    let mut p = s.splat(1.0 / 720.0);
    for c in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = s.fma(p, r, s.splat(c));
    }
    s.mul(p, s.shift_to_exponent(s.add(shifted, s.splat(127.0))))
}

/// What a row has of one segment, or of several: the largest score and the sum of weights relative to it.
#[derive(Clone, Copy)]
pub(super) struct Total {
    pub max: f32,
    pub sum: f32,
}

impl Total {
    pub const NONE: Self = Self { max: f32::NEG_INFINITY, sum: 0.0 };
}

/// Replaces a row's scores in chunks `chunks`, of which it sees elements `seen`, by `e^(score - max)`.
#[inline(always)]
pub(super) fn softmax<S: Lanes>(
    s: S,
    scores: &mut [Chunk],
    chunks: std::ops::Range<usize>,
    seen: std::ops::Range<usize>,
) -> Total {
    let flat = scores.as_flattened_mut();
    flat[chunks.start * 16..seen.start.clamp(chunks.start * 16, chunks.end * 16)].fill(f32::NEG_INFINITY);
    flat[seen.end.clamp(chunks.start * 16, chunks.end * 16)..chunks.end * 16].fill(f32::NEG_INFINITY);
    let scores = &mut scores[chunks];
    if seen.is_empty() {
        scores.as_flattened_mut().fill(0.0);
        return Total::NONE;
    }
    let mut max = s.splat(f32::NEG_INFINITY);
    for chunk in scores.iter() {
        max = s.max(s.load(chunk), max);
    }
    let max = s.fold_max(max);
    let splat = s.splat(max);
    let mut sum = s.zero();
    for chunk in scores.iter_mut() {
        let p = exp_weight(s, s.sub(s.load(chunk), splat));
        s.store(p, chunk);
        sum = s.add(p, sum);
    }
    Total { max, sum: s.fold(sum) }
}

/// Adds a segment's weighted values to those of the segments before it, both relative to the larger maximum.
#[inline(always)]
pub(super) fn merge<S: Lanes>(s: S, total: &mut Total, sums: &mut [Chunk], part: Total, values: &[Chunk]) {
    if part.sum == 0.0 {
        return; // Nothing seen: the largest of anything seen weighs 1.
    }
    let max = if part.max > total.max { part.max } else { total.max };
    let [old, new] = [total.max, part.max].map(|m| exp_weight(One, m - max));
    total.sum = part.sum.mul_add(new, total.sum * old);
    total.max = max;
    let (old, new) = (s.splat(old), s.splat(new));
    for (sum, value) in sums.iter_mut().zip(values) {
        s.store(s.fma(s.load(value), new, s.mul(s.load(sum), old)), sum);
    }
}
