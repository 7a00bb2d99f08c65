//! The softmax over one segment, and how segments are put together.

// Rows are counted by index: they lie side by side in several arrays.
#![allow(clippy::needless_range_loop)]

use super::store::WIDTH;
use super::{BLOCK, SEGMENT};
use crate::lanes::{Arithmetic, Chunk, LANES, Lanes, chunk_at};
use std::ops::Range;

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

/// Replaces the scores of `R` rows in chunks `chunks`, of which row `i` sees elements `seen[i]`, by `e^(score - max)`.
#[inline(always)]
pub(super) fn softmax<S: Lanes, const R: usize>(
    s: S,
    scores: &mut [Chunk],
    chunks: Range<usize>,
    seen: &[(usize, usize); R],
) -> [Total; R] {
    let mut totals = [Total::NONE; R];
    let of = |i: usize| i * SCORES + chunks.start..i * SCORES + chunks.end;
    // All maxima before the first exponential: rows then do not wait for each other.
    for i in 0..R {
        let scores = &mut scores[of(i)];
        let (start, end) = (chunks.start * LANES, chunks.end * LANES);
        scores.as_flattened_mut()[..seen[i].0.clamp(start, end) - start].fill(f32::NEG_INFINITY);
        scores.as_flattened_mut()[seen[i].1.clamp(start, end) - start..].fill(f32::NEG_INFINITY);
        let mut max = s.splat(f32::NEG_INFINITY);
        for chunk in scores.iter() {
            max = s.max(s.load(chunk), max);
        }
        totals[i].max = s.fold_max(max);
    }
    for i in 0..R {
        let scores = &mut scores[of(i)];
        if seen[i].0 >= seen[i].1 {
            scores.as_flattened_mut().fill(0.0);
            continue;
        }
        let max = s.splat(totals[i].max);
        let mut sum = s.zero();
        for chunk in scores.iter_mut() {
            let p = exp_weight(s, s.sub(s.load(chunk), max));
            s.store(p, chunk);
            sum = s.add(p, sum);
        }
        totals[i].sum = s.fold(sum);
    }
    totals
}

/// Adds a segment's weighted values `[R, dims]` to those of the segments before it, each relative to the larger maximum. A record
/// is `dims` chunks of values and one of maximum and sum.
#[inline(always)]
pub(super) fn merge<S: Lanes, const R: usize>(
    s: S,
    records: &mut [Chunk],
    parts: &[Total; R],
    values: &[Chunk],
) {
    let row = records.len() / R;
    let (mut old, mut new) = ([0.0; LANES], [0.0; LANES]);
    for (i, part) in parts.iter().enumerate() {
        let before = records[(i + 1) * row - 1][0];
        let max = if part.max > before { part.max } else { before };
        (old[i], new[i]) = (before - max, part.max - max);
    }
    s.store(exp_weight(s, s.load(&old)), &mut old);
    s.store(exp_weight(s, s.load(&new)), &mut new);
    for (i, part) in parts.iter().enumerate() {
        if part.sum == 0.0 {
            continue; // Nothing seen: the largest of anything seen weighs 1.
        }
        let (record, total) = records[i * row..(i + 1) * row].split_at_mut(row - 1);
        let [max, sum, ..] = &mut total[0];
        *max = if part.max > *max { part.max } else { *max };
        *sum = part.sum.mul_add(new[i], *sum * old[i]);
        let (old, new) = (s.splat(old[i]), s.splat(new[i]));
        for (sum, value) in record.iter_mut().zip(&values[i * (row - 1)..]) {
            s.store(s.fma(s.load(value), new, s.mul(s.load(sum), old)), sum);
        }
    }
}

/// The largest magnitude; NaN never wins.
#[inline(always)]
pub(super) fn largest<S: Lanes>(s: S, x: &[f32]) -> f32 {
    let mut max = s.zero();
    for i in 0..x.len().div_ceil(LANES) {
        let v = s.load(&chunk_at(x, i));
        max = s.max(s.max(v, s.sub(s.zero(), v)), max);
    }
    s.fold_max(max)
}

#[inline(always)]
pub(super) fn all_finite(x: &[f32]) -> bool {
    x.iter().fold(true, |finite, x| finite & x.is_finite())
}
