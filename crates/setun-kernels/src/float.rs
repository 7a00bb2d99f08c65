//! The float steps between integer products: norms, gates, softmax, rotary positions.
//!
//! Each has one order of operations, whatever the instruction set: sums run over sixteen lanes (lane = index
//! mod 16, each a chain of fused multiply-adds, the tail padded with zeros) and are folded 8 + 8, 4 + 4,
//! 2 + 2, 1 + 1; the exponential is our own polynomial. So results have the same bits everywhere, except
//! that a NaN is only promised to be a NaN. Infinities and NaN in the input follow IEEE 754 and never panic.
//!
//! All functions work on one row; slices of different lengths are a caller's mistake and panic.

use crate::Kernels;
use crate::lanes::{Arithmetic, LANES, Lanes, One, chunk_at, job};

/// `e^x` with the bits of the vector kernels: at most 1 ulp off over the normal range, 1 ulp (of 2⁻¹⁴⁹) in
/// the denormal one, infinity from 88.73 upwards, zero below −104.
pub fn exp(x: f32) -> f32 {
    exp_lanes(One, x)
}

/// `e^x = 2^n e^r` with `n` the integer nearest to `x / ln 2` and `e^r` by its Taylor polynomial of degree 7
/// (remainder below 7e-9 for `|r| ≤ ln 2 / 2`).
#[inline(always)]
pub(crate) fn exp_lanes<S: Arithmetic>(s: S, x: S::V) -> S::V {
    // Adding 1.5 * 2^23 leaves the nearest integer in the lowest bits of the sum.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two floats; the fused product with the first is exact for every n that occurs.
    const LN2_LOW: f32 = -1.904_654_3e-9;
    // Constants first and NaN second: `min` and `max` then let a NaN through.
    let x = s.max(s.splat(-104.0), s.min(s.splat(89.0), x));
    let round = s.splat(ROUND);
    let n = s.sub(s.fma(x, s.splat(std::f32::consts::LOG2_E), round), round);
    let r = s.fma(n, s.splat(-std::f32::consts::LN_2), x);
    let r = s.fma(n, s.splat(-LN2_LOW), r);
    let mut p = s.splat(1.0 / 5040.0);
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = s.fma(p, r, s.splat(c));
    }
    // 2^n in two factors, because n reaches beyond the exponents of normal floats at both ends. The first
    // product is exact, so that a denormal result is rounded once.
    let half = s.sub(s.fma(n, s.splat(0.5), round), round);
    let power = |n| s.shift_to_exponent(s.add(n, s.splat(ROUND + 127.0)));
    s.mul(s.mul(p, power(half)), power(s.sub(n, half)))
}

/// Natural logarithm of a positive normal float, by `ln m = 2 artanh((m - 1) / (m + 1))` in f64: no platform's
/// `ln` is involved.
fn ln(x: f32) -> f32 {
    if !(x.is_normal() && x > 0.0) {
        return if x == 0.0 {
            f32::NEG_INFINITY
        } else if x > 0.0 {
            x
        } else {
            f32::NAN
        };
    }
    let mut exponent = ((x.to_bits() >> 23) as i32) - 127;
    let mut mantissa = f64::from(f32::from_bits((x.to_bits() & 0x7F_FFFF) | 0x3F80_0000));
    if mantissa > std::f64::consts::SQRT_2 {
        mantissa *= 0.5;
        exponent += 1;
    }
    let t = (mantissa - 1.0) / (mantissa + 1.0);
    let square = t * t;
    let mut series = 0.0;
    for odd in [15.0, 13.0, 11.0, 9.0, 7.0, 5.0, 3.0, 1.0] {
        series = series * square + 1.0 / odd;
    }
    (f64::from(exponent) * std::f64::consts::LN_2 + 2.0 * t * series) as f32
}

#[inline(always)]
pub(crate) fn dot_lanes<S: Lanes>(s: S, a: &[f32], b: &[f32]) -> f32 {
    let ((a_chunks, a_tail), (b_chunks, b_tail)) = (a.as_chunks(), b.as_chunks());
    let mut sum = s.zero();
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        sum = s.fma(s.load(a), s.load(b), sum);
    }
    if !a_tail.is_empty() {
        sum = s.fma(s.load(&chunk_at(a_tail, 0)), s.load(&chunk_at(b_tail, 0)), sum);
    }
    s.fold(sum)
}

#[inline(always)]
fn sum_lanes<S: Lanes>(s: S, x: &[f32]) -> f32 {
    let (chunks, tail) = x.as_chunks();
    let mut sum = s.zero();
    for chunk in chunks {
        sum = s.add(s.load(chunk), sum);
    }
    s.fold(s.add(s.load(&chunk_at(tail, 0)), sum))
}

/// The largest value, ignoring NaN; minus infinity if there is none.
#[inline(always)]
fn max_lanes<S: Lanes>(s: S, x: &[f32]) -> f32 {
    let (chunks, tail) = x.as_chunks();
    let mut max = s.splat(f32::NEG_INFINITY);
    for chunk in chunks {
        max = s.max(s.load(chunk), max);
    }
    if !tail.is_empty() {
        let mut padded = [f32::NEG_INFINITY; LANES];
        padded[..tail.len()].copy_from_slice(tail);
        max = s.max(s.load(&padded), max);
    }
    s.fold_max(max)
}

/// `x[i] = op(x[i])`, sixteen at a time.
#[inline(always)]
fn map_lanes<S: Lanes>(s: S, x: &mut [f32], op: impl Fn(S::V) -> S::V) {
    let (chunks, tail) = x.as_chunks_mut();
    for chunk in chunks {
        let v = op(s.load(chunk));
        s.store(v, chunk);
    }
    if !tail.is_empty() {
        let mut padded = chunk_at(tail, 0);
        let v = op(s.load(&padded));
        s.store(v, &mut padded);
        tail.copy_from_slice(&padded[..tail.len()]);
    }
}

/// `out[i] = op(a[i], b[i])`, sixteen at a time.
#[inline(always)]
fn zip_lanes<S: Lanes>(s: S, a: &[f32], b: &[f32], out: &mut [f32], op: impl Fn(S::V, S::V) -> S::V) {
    let ((a_chunks, a_tail), (b_chunks, b_tail)) = (a.as_chunks(), b.as_chunks());
    let (out_chunks, out_tail) = out.as_chunks_mut();
    for ((a, b), out) in a_chunks.iter().zip(b_chunks).zip(out_chunks) {
        s.store(op(s.load(a), s.load(b)), out);
    }
    if !a_tail.is_empty() {
        let mut padded = [0.0; LANES];
        s.store(op(s.load(&chunk_at(a_tail, 0)), s.load(&chunk_at(b_tail, 0))), &mut padded);
        out_tail.copy_from_slice(&padded[..a_tail.len()]);
    }
}

job!(Dot { a: &'a [f32], b: &'a [f32] } -> f32, |s| { dot_lanes(s, a, b) });

job!(RmsNorm { x: &'a [f32], weight: Option<&'a [f32]>, eps: f32, out: &'a mut [f32] } -> (), |s| {
    // Weights were last read a token ago: they come from memory while the squares are summed.
    for chunk in weight.unwrap_or_default().chunks(LANES) {
        s.prefetch(chunk.as_ptr());
    }
    let inverse = 1.0 / (dot_lanes(s, x, x) / x.len() as f32 + eps).sqrt();
    let inverse = s.splat(inverse);
    match weight {
        Some(weight) => zip_lanes(s, x, weight, out, #[inline(always)] |x, w| s.mul(s.mul(x, inverse), w)),
        None => zip_lanes(s, x, x, out, #[inline(always)] |x, _| s.mul(x, inverse)),
    }
});

job!(RmsNormAssign { x: &'a mut [f32], weight: &'a [f32], eps: f32 } -> (), |s| {
    let inverse = 1.0 / (dot_lanes(s, x, x) / x.len() as f32 + eps).sqrt();
    let ((x_chunks, x_tail), (w_chunks, w_tail)) = (x.as_chunks_mut(), weight.as_chunks());
    let splat = s.splat(inverse);
    for (x, w) in x_chunks.iter_mut().zip(w_chunks) {
        let normed = s.mul(s.mul(s.load(x), splat), s.load(w));
        s.store(normed, x);
    }
    for (x, w) in x_tail.iter_mut().zip(w_tail) {
        *x = *x * inverse * w;
    }
});

job!(AddAssign { x: &'a mut [f32], y: &'a [f32] } -> (), |s| {
    let ((x_chunks, x_tail), (y_chunks, y_tail)) = (x.as_chunks_mut(), y.as_chunks());
    for (x, y) in x_chunks.iter_mut().zip(y_chunks) {
        let sum = s.add(s.load(x), s.load(y));
        s.store(sum, x);
    }
    for (x, y) in x_tail.iter_mut().zip(y_tail) {
        *x += y;
    }
});

job!(ScaleAssign { x: &'a mut [f32], factor: f32 } -> (), |s| {
    let factor = s.splat(factor);
    map_lanes(s, x, #[inline(always)] |x| s.mul(x, factor));
});

job!(SiluGate { gate: &'a [f32], up: &'a [f32], out: &'a mut [f32] } -> (), |s| {
    let one = s.splat(1.0);
    zip_lanes(s, gate, up, out, #[inline(always)] |g, u| {
        let denominator = s.add(one, exp_lanes(s, s.sub(s.zero(), g)));
        s.mul(s.div(g, denominator), u)
    });
});

job!(SigmoidGate { gate: &'a [f32], x: &'a [f32], out: &'a mut [f32] } -> (), |s| {
    let one = s.splat(1.0);
    zip_lanes(s, gate, x, out, #[inline(always)] |g, x| {
        s.div(x, s.add(one, exp_lanes(s, s.sub(s.zero(), g))))
    });
});

job!(Relu2Gate { gate: &'a [f32], up: &'a [f32], out: &'a mut [f32] } -> (), |s| {
    zip_lanes(s, gate, up, out, #[inline(always)] |g, u| {
        let positive = s.max(s.zero(), g);
        s.mul(s.mul(positive, positive), u)
    });
});

job!(ExpInPlace { x: &'a mut [f32] } -> (), |s| { map_lanes(s, x, #[inline(always)] |x| exp_lanes(s, x)) });

/// Replaces `x` by `e^(x - max)`; returns the maximum (0 where there is none above minus infinity) and the sum.
#[inline(always)]
fn exp_from_max<S: Lanes>(s: S, x: &mut [f32]) -> (f32, f32) {
    let max = max_lanes(s, x);
    let max = if max == f32::NEG_INFINITY { 0.0 } else { max };
    let splat = s.splat(max);
    map_lanes(
        s,
        x,
        #[inline(always)]
        |x| exp_lanes(s, s.sub(x, splat)),
    );
    (max, sum_lanes(s, x))
}

job!(Softmax { x: &'a mut [f32] } -> (), |s| {
    let (_, sum) = exp_from_max(s, x);
    if sum != 0.0 {
        let sum = s.splat(sum);
        map_lanes(s, x, #[inline(always)] |x| s.div(x, sum));
    }
});

job!(LogSumExp { x: &'a [f32] } -> f32, |s| {
    let max = max_lanes(s, x);
    if max.is_infinite() {
        // All masked, or one infinitely likely; a NaN anywhere still wins.
        return if x.iter().any(|x| x.is_nan()) { f32::NAN } else { max };
    }
    let (chunks, tail) = x.as_chunks();
    let splat = s.splat(max);
    let mut sum = s.zero();
    for chunk in chunks {
        sum = s.add(exp_lanes(s, s.sub(s.load(chunk), splat)), sum);
    }
    let mut padded = [f32::NEG_INFINITY; LANES];
    padded[..tail.len()].copy_from_slice(tail);
    max + ln(s.fold(s.add(exp_lanes(s, s.sub(s.load(&padded), splat)), sum)))
});

job!(Rope { x: &'a mut [f32], head_dim: usize, cos: &'a [f32], sin: &'a [f32] } -> (), |s| {
    let pairs = cos.len();
    let ((cos_chunks, cos_tail), (sin_chunks, sin_tail)) = (cos.as_chunks(), sin.as_chunks());
    let minus = s.splat(-0.0);
    let rotate = |a, b, cos, sin| {
        // `-0 - sin` is the exact negative.
        (s.fma(b, s.sub(minus, sin), s.mul(a, cos)), s.fma(a, sin, s.mul(b, cos)))
    };
    for head in x.chunks_exact_mut(head_dim) {
        let (first, rest) = head.split_at_mut(pairs);
        let ((a_chunks, a_tail), (b_chunks, b_tail)) = (first.as_chunks_mut(), rest[..pairs].as_chunks_mut());
        for (((a, b), cos), sin) in a_chunks.iter_mut().zip(b_chunks).zip(cos_chunks).zip(sin_chunks) {
            let (new_a, new_b) = rotate(s.load(a), s.load(b), s.load(cos), s.load(sin));
            s.store(new_a, a);
            s.store(new_b, b);
        }
        if !a_tail.is_empty() {
            let load = |tail: &[f32]| s.load(&chunk_at(tail, 0));
            let (new_a, new_b) = rotate(load(a_tail), load(b_tail), load(cos_tail), load(sin_tail));
            let mut padded = [0.0; LANES];
            s.store(new_a, &mut padded);
            a_tail.copy_from_slice(&padded[..a_tail.len()]);
            s.store(new_b, &mut padded);
            b_tail.copy_from_slice(&padded[..b_tail.len()]);
        }
    }
});

job!(ArgMax { x: &'a [f32] } -> usize, |s| {
    let max = max_lanes(s, x);
    // Whole blocks first: a loop that may stop at any element is not vectorised.
    let block = x.chunks(256).position(|block| block.iter().fold(false, |found, &v| found | (v == max)));
    block.map_or(0, |block| {
        let start = block * 256;
        start + x[start..].iter().position(|&v| v == max).unwrap_or(0)
    })
});

/// Adds and subtracts elements `h` apart, for every `h` below the length, a power of two.
#[inline(always)]
fn butterflies(x: &mut [f32]) {
    let mut h = 1;
    while h < x.len() {
        for pairs in x.chunks_exact_mut(2 * h) {
            let (low, high) = pairs.split_at_mut(h);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        h *= 2;
    }
}

job!(Hadamard { x: &'a mut [f32], block: usize } -> (), |s| {
    let factor = (1.0 / (block as f64).sqrt()) as f32;
    if block < LANES {
        for x in x.chunks_exact_mut(block) {
            x.iter_mut().for_each(|x| *x *= factor);
            butterflies(x);
        }
        return;
    }
    let factor = s.splat(factor);
    for x in x.chunks_exact_mut(block) {
        let chunks = x.as_chunks_mut::<LANES>().0;
        for chunk in chunks.iter_mut() {
            s.store(s.mul(s.load(chunk), factor), chunk);
            butterflies(chunk);
        }
        let mut h = 1;
        while h < chunks.len() {
            for pairs in chunks.chunks_exact_mut(2 * h) {
                let (low, high) = pairs.split_at_mut(h);
                for (low, high) in low.iter_mut().zip(high) {
                    let (a, b) = (s.load(low), s.load(high));
                    s.store(s.add(a, b), low);
                    s.store(s.sub(a, b), high);
                }
            }
            h *= 2;
        }
    }
});

impl Kernels {
    /// `Σ a·b`. Empty slices give 0.
    pub fn dot(&self, a: &[f32], b: &[f32]) -> f32 {
        assert_eq!(a.len(), b.len(), "dot: lengths differ");
        self.lanes(Dot { a, b })
    }

    /// `Σ x²`.
    pub fn sum_of_squares(&self, x: &[f32]) -> f32 {
        self.lanes(Dot { a: x, b: x })
    }

    /// RMSNorm of one row: `out = x * (1 / sqrt(mean(x²) + eps)) * weight`, without `weight` where there is none.
    ///
    /// Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019 (<https://arxiv.org/abs/1910.07467>).
    /// `eps` is added to the mean, as in Llama.
    pub fn rms_norm(&self, x: &[f32], weight: Option<&[f32]>, eps: f32, out: &mut [f32]) {
        assert_eq!(x.len(), out.len(), "rms_norm: lengths differ");
        assert!(weight.is_none_or(|w| w.len() == x.len()), "rms_norm: weight has another length");
        self.lanes(RmsNorm { x, weight, eps, out });
    }

    /// [`Kernels::rms_norm`] in place, with the same bits.
    pub fn rms_norm_assign(&self, x: &mut [f32], weight: &[f32], eps: f32) {
        assert_eq!(x.len(), weight.len(), "rms_norm_assign: weight has another length");
        self.lanes(RmsNormAssign { x, weight, eps });
    }

    /// `x += y`.
    pub fn add_assign(&self, x: &mut [f32], y: &[f32]) {
        assert_eq!(x.len(), y.len(), "add_assign: lengths differ");
        self.lanes(AddAssign { x, y });
    }

    /// `x *= factor`.
    pub fn scale_assign(&self, x: &mut [f32], factor: f32) {
        self.lanes(ScaleAssign { x, factor });
    }

    /// SwiGLU's gate: `out = gate / (1 + e^-gate) * up` (Shazeer, 2020, <https://arxiv.org/abs/2002.05202>).
    /// A gate of minus infinity gives NaN.
    pub fn silu_gate(&self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        assert!(gate.len() == up.len() && up.len() == out.len(), "silu_gate: lengths differ");
        self.lanes(SiluGate { gate, up, out });
    }

    /// The output gate of Qwen3.5's attention: `out = x / (1 + e^-gate)`.
    pub fn sigmoid_gate(&self, gate: &[f32], x: &[f32], out: &mut [f32]) {
        assert!(gate.len() == x.len() && x.len() == out.len(), "sigmoid_gate: lengths differ");
        self.lanes(SigmoidGate { gate, x, out });
    }

    /// The squared ReLU gate of BitNet b1.58 2B4T: `out = max(gate, 0)² * up`
    /// (<https://arxiv.org/abs/2504.12285>, section 2).
    pub fn relu2_gate(&self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        assert!(gate.len() == up.len() && up.len() == out.len(), "relu2_gate: lengths differ");
        self.lanes(Relu2Gate { gate, up, out });
    }

    /// [`exp`] of every element.
    pub fn exp_in_place(&self, x: &mut [f32]) {
        self.lanes(ExpInPlace { x });
    }

    /// `e^x / Σ e^x`. Minus infinity gives exactly 0, also where every element is masked so.
    pub fn softmax_in_place(&self, x: &mut [f32]) {
        self.lanes(Softmax { x });
    }

    /// `ln Σ e^x`, without overflow. Minus infinity where `x` is empty or all masked.
    pub fn log_sum_exp(&self, x: &[f32]) -> f32 {
        self.lanes(LogSumExp { x })
    }

    /// Rotates the heads of one token in place (RoFormer, <https://arxiv.org/abs/2104.09864>).
    ///
    /// - `x`: `[heads, head_dim]`.
    /// - `cos`, `sin`: this position's `rotary_dim / 2` values. Element `j` pairs with `j + rotary_dim / 2` ("half
    ///   split", as GPT-NeoX and the Hugging Face Llama); elements from `rotary_dim` on stay as they are.
    ///
    /// Panics unless `2 * cos.len() <= head_dim`.
    pub fn rope(&self, x: &mut [f32], heads: usize, head_dim: usize, cos: &[f32], sin: &[f32]) {
        assert_eq!(x.len(), heads * head_dim, "rope: x is not [heads, head_dim]");
        assert!(cos.len() == sin.len() && 2 * cos.len() <= head_dim, "rope: tables do not fit the head");
        if head_dim > 0 {
            self.lanes(Rope { x, head_dim, cos, sin });
        }
    }

    /// Multiplies every block of `block` elements by the orthonormal Walsh–Hadamard matrix in natural order,
    /// `H[i][j] = (-1)^popcount(i & j) / sqrt(block)`, which is its own inverse.
    ///
    /// Scaled first, then added and subtracted at distances 1, 2, 4, …, which fixes the bits. Panics unless `block` is a power
    /// of two that divides the length.
    pub fn hadamard(&self, x: &mut [f32], block: usize) {
        assert!(block.is_power_of_two(), "hadamard: blocks of {block}");
        assert!(x.len().is_multiple_of(block), "hadamard: {} elements in blocks of {block}", x.len());
        self.lanes(Hadamard { x, block });
    }

    /// Index of the largest element, the first of equals. NaN never wins; 0 where nothing else is there.
    pub fn argmax(&self, x: &[f32]) -> usize {
        self.lanes(ArgMax { x })
    }
}

#[cfg(test)]
mod tests;
