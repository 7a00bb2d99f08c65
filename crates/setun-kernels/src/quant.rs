//! The two quantisers of BitNet b1.58 (<https://arxiv.org/abs/2402.17764>, section 2), operation by
//! operation as the published code rounds: products with reciprocals, ties to even.
//!
//! Weights: one absmean scale per tensor, [`absmean_scale`], then [`ternarize_row`]; or one for every group of a row's columns, as
//! weight-only models have them. Activations: one
//! absmax scale per token, [`Activations`]. Both give the same bits on every kernel and thread count.

use alloc::vec::Vec;

use half::f16;

use crate::kernels::{Isa, Kernels};
use crate::matrix::{MatrixError, Scales, TernaryMatrix};
use crate::pack::{TRITS_PER_BYTE, ZERO_BYTE};
use crate::threads::{Pool, SharedMut};

/// The floor of both scales, as in the published code: a clamp, not an added term.
const EPS: f32 = 1e-5;
/// Weights per partial sum of [`absmean_scale`]: fixed, so that threads do not change the result.
const SUM_CHUNK: usize = 1 << 14;
const ROOT_7: f32 = 2.645_751_3;
/// Activation rows are padded with zeros to this many columns, and at least to [`LONGEST_TILE`].
pub(crate) const COLUMN_PAD: usize = 64;
/// Columns of the longest tile of weights, all of whose activations must be readable.
const LONGEST_TILE: usize = 20;

/// `Σ |w|` of one chunk, in eight lanes folded in a fixed tree.
fn abs_sum(chunk: &[f32]) -> f64 {
    let mut lanes = [0f64; 8];
    let (groups, rest) = chunk.as_chunks::<8>();
    for group in groups {
        for (lane, w) in lanes.iter_mut().zip(group) {
            *lane += f64::from(w.abs());
        }
    }
    for (lane, w) in lanes.iter_mut().zip(rest) {
        *lane += f64::from(w.abs());
    }
    let [a, b, c, d, e, f, g, h] = lanes;
    ((a + b) + (c + d)) + ((e + f) + (g + h))
}

fn scale_of_sum(total: f64, count: usize) -> f32 {
    ((total / count.max(1) as f64) as f32).max(EPS)
}

/// `max(mean|w|, 1e-5)`: the scale of the absmean quantiser, summed in `f64`.
///
/// A NaN among the weights gives 1e-5, an infinity gives infinity; check for finite weights first.
pub fn absmean_scale(weights: &[f32]) -> f32 {
    let mut mean = AbsMean::default();
    mean.push(weights);
    mean.scale()
}

/// [`absmean_scale`] of weights that come in pieces, with the same bits.
#[derive(Debug, Clone, Copy, Default)]
pub struct AbsMean {
    total: f64,
    count: usize,
}

impl AbsMean {
    /// Every piece but the last must be a multiple of this many weights.
    pub const PIECE: usize = SUM_CHUNK;

    /// Takes the next piece. Panics after one that was no multiple of [`AbsMean::PIECE`].
    pub fn push(&mut self, weights: &[f32]) {
        assert!(self.count.is_multiple_of(SUM_CHUNK), "a piece after the last");
        self.total = weights.chunks(SUM_CHUNK).map(abs_sum).fold(self.total, |total, sum| total + sum);
        self.count += weights.len();
    }

    /// The scale of all pieces so far.
    pub fn scale(&self) -> f32 {
        scale_of_sum(self.total, self.count)
    }
}

/// [`absmean_scale`] on all threads of `pool`, with the same bits.
pub fn absmean_scale_parallel(weights: &[f32], pool: &Pool) -> f32 {
    let mut sums = alloc::vec![0f64; weights.len().div_ceil(SUM_CHUNK)];
    pool.run_chunks_mut(&mut sums, 8, |chunk, sums| {
        let chunks = weights.chunks(SUM_CHUNK).skip(chunk * 8);
        for (sum, weights) in sums.iter_mut().zip(chunks) {
            *sum = abs_sum(weights);
        }
    });
    scale_of_sum(sums.iter().sum(), weights.len())
}

/// `clamp(round(w · inverse), -1, 1) + 1` without rounding: ties to even put ±0.5 on 0 and ±1.5 on ±2.
#[inline(always)]
fn code(w: f32, inverse: f32) -> u8 {
    let v = w * inverse;
    1 + u8::from(v > 0.5) - u8::from(v < -0.5)
}

#[inline(always)]
fn ternarize_generic(row: &[f32], inverse: f32, codes: &mut [u8]) {
    let (groups, rest) = row.as_chunks::<32>();
    let (bytes, last_bytes) = codes.split_at_mut(groups.len() * 8);
    for (group, bytes) in groups.iter().zip(bytes.as_chunks_mut::<8>().0) {
        let mut c = [0u8; 32];
        for (c, &w) in c.iter_mut().zip(group) {
            *c = code(w, inverse);
        }
        for (byte, four) in bytes.iter_mut().zip(c.as_chunks::<4>().0) {
            // The multiplication puts the four codes side by side in the top byte.
            *byte = (u32::from_le_bytes(*four).wrapping_mul(0x0104_1040) >> 24) as u8;
        }
    }
    for (byte, four) in last_bytes.iter_mut().zip(rest.chunks(TRITS_PER_BYTE)) {
        *byte = ZERO_BYTE;
        for (i, &w) in four.iter().enumerate() {
            *byte = *byte & !(3 << (2 * i)) | code(w, inverse) << (2 * i);
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn ternarize_avx2(row: &[f32], inverse: f32, codes: &mut [u8]) {
    ternarize_generic(row, inverse, codes);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
fn ternarize_avx512(row: &[f32], inverse: f32, codes: &mut [u8]) {
    ternarize_generic(row, inverse, codes);
}

/// Writes the two-bit codes of `clamp(round(w · inverse), -1, 1)` for one row, padding included.
///
/// `inverse` is `1 / scale`; `codes` is a quarter as long as `row`, rounded up (else this panics).
/// A NaN gives the code of 0.
pub fn ternarize_row(kernels: &Kernels, row: &[f32], inverse: f32, codes: &mut [u8]) {
    assert_eq!(codes.len(), row.len().div_ceil(TRITS_PER_BYTE), "bytes of codes for a row");
    match kernels.isa {
        // SAFETY: a `Kernels` exists only when its instruction set was found.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { ternarize_avx512(row, inverse, codes) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { ternarize_avx2(row, inverse, codes) },
        // NEON is always there, so the plain body is compiled with it.
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => ternarize_generic(row, inverse, codes),
        Isa::Scalar => ternarize_generic(row, inverse, codes),
    }
}

/// Rounds a weight matrix to ternary: `q = clamp(round(w · (1 / s)), -1, 1)`, `s = max(mean|w|, 1e-5)`.
///
/// Returns `q`, same shape, and `s`, one per tensor, so that `w ≈ q · s`. NaNs give 0.
/// See [`TernaryMatrix::quantize`] for the fast form.
pub fn quantize_absmean(weights: &[f32]) -> (Vec<i8>, f32) {
    let scale = absmean_scale(weights);
    let inverse = 1.0 / scale;
    (weights.iter().map(|&w| code(w, inverse) as i8 - 1).collect(), scale)
}

impl TernaryMatrix {
    /// The absmean quantiser on a row-major `[rows, cols]` matrix, with one scale for the tensor.
    ///
    /// # Errors
    /// [`MatrixError::Length`] and [`MatrixError::TooLarge`].
    pub fn quantize(
        kernels: &Kernels,
        weights: &[f32],
        rows: usize,
        cols: usize,
        pool: &Pool,
    ) -> Result<Self, MatrixError> {
        Self::quantize_with(kernels, weights, rows, cols, Scales::Tensor(1.0), pool)
    }

    /// The same with a scale for every `group` columns of a row, a multiple of 4, each rounded to a half: what files of
    /// weight-only models hold.
    ///
    /// # Errors
    /// As [`TernaryMatrix::quantize`]. Panics when `group` is 0 or no multiple of 4.
    pub fn quantize_groups(
        kernels: &Kernels,
        weights: &[f32],
        rows: usize,
        cols: usize,
        group: usize,
        pool: &Pool,
    ) -> Result<Self, MatrixError> {
        assert!(group > 0 && group.is_multiple_of(TRITS_PER_BYTE), "groups of {group} columns");
        let values = alloc::vec![1.0; rows.saturating_mul(cols.div_ceil(group)).min(weights.len())];
        let scales = Scales::Block { rows: 1, cols: group, values };
        Self::quantize_with(kernels, weights, rows, cols, scales, pool)
    }

    fn quantize_with(
        kernels: &Kernels,
        weights: &[f32],
        rows: usize,
        cols: usize,
        scales: Scales,
        pool: &Pool,
    ) -> Result<Self, MatrixError> {
        let bytes = rows.checked_mul(cols.div_ceil(TRITS_PER_BYTE));
        let bytes = bytes.filter(|_| rows.checked_mul(cols) == Some(weights.len()));
        let Some(bytes) = bytes else {
            let (expected, found) = (rows.saturating_mul(cols), weights.len());
            return Err(MatrixError::Length { what: "weights", rows, cols, expected, found });
        };
        let mut matrix = Self::new(rows, cols, alloc::vec![ZERO_BYTE; bytes], scales)?;
        matrix.requantize(kernels, weights, pool);
        Ok(matrix)
    }

    /// [`TernaryMatrix::quantize`] into this matrix, or [`TernaryMatrix::quantize_groups`] where it was made by that, for a
    /// trainer's every step: nothing is allocated but a list of chunks. Panics unless there are `rows · cols` weights.
    pub fn requantize(&mut self, kernels: &Kernels, weights: &[f32], pool: &Pool) {
        let (cols, row_bytes) = (self.cols(), self.row_bytes());
        assert_eq!(weights.len(), self.rows() * cols, "weights of a requantised matrix");
        let (codes, scales) = self.parts_mut();
        let rows_per_chunk = SUM_CHUNK.div_ceil(cols.max(1));
        let weights_of = |chunk: usize| weights[chunk * rows_per_chunk * cols..].chunks_exact(cols);
        if let Scales::Block { rows: 1, cols: group, values } = scales
            && group.is_multiple_of(TRITS_PER_BYTE)
        {
            let (group, groups) = (*group, cols.div_ceil(*group));
            if weights.is_empty() {
                return;
            }
            let codes = codes.chunks_mut(rows_per_chunk * row_bytes);
            let chunks = codes.zip(values.chunks_mut(rows_per_chunk * groups)).collect();
            pool.run_items(chunks, |chunk, (codes, scales): (&mut [u8], &mut [f32])| {
                let rows = codes.chunks_exact_mut(row_bytes).zip(scales.chunks_exact_mut(groups));
                for (row, (codes, scales)) in weights_of(chunk).zip(rows) {
                    let codes = codes.chunks_mut(group / TRITS_PER_BYTE);
                    for ((weights, codes), scale) in row.chunks(group).zip(codes).zip(scales) {
                        *scale = half_scale(scale_of_sum(abs_sum(weights), weights.len()));
                        ternarize_row(kernels, weights, 1.0 / *scale, codes);
                    }
                }
            });
            return;
        }
        let scale = absmean_scale_parallel(weights, pool);
        *scales = Scales::Tensor(scale);
        if weights.is_empty() {
            return;
        }
        pool.run_chunks_mut(codes, rows_per_chunk * row_bytes, |chunk, codes| {
            for (row, codes) in weights_of(chunk).zip(codes.chunks_exact_mut(row_bytes)) {
                ternarize_row(kernels, row, 1.0 / scale, codes);
            }
        });
    }
}

/// The nearest half above 0 that is finite.
fn half_scale(scale: f32) -> f32 {
    f16::from_f32(scale.min(f16::MAX.to_f32())).to_f32()
}

#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
struct Line([i8; COLUMN_PAD]);

/// How activations are rounded, each token by itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Rounding {
    /// BitNet b1.58: `q = clamp(round(x · a), -128, 127)` with `a = 127 / max(max|x|, 1e-5)`.
    #[default]
    Int8,
    /// BitNet a4.8 (<https://arxiv.org/abs/2411.04965>, section 2.2) and v2: `q = clamp(round(x · a), -8, 7)` with
    /// `a = √7 / max(mean|x|, 1e-5)`.
    Int4,
}

/// Rounded activations, `[tokens, cols]`: the input of a ternary matrix product, in one byte each whatever their [`Rounding`].
///
/// A token that
/// holds a NaN or an infinity becomes all zero with an inverse of NaN, so that all its outputs are NaN.
/// Buffers are kept from one call to the next.
#[derive(Debug, Clone, Default)]
pub struct Activations {
    tokens: usize,
    cols: usize,
    /// Lines (of 64 columns) of a token.
    lines_per_token: usize,
    lines: Vec<Line>,
    inverses: Vec<f32>,
    sums: Vec<i32>,
    rounding: Rounding,
}

/// Codes of one token into `q` (as long as `x`). Returns the inverse and the sum of the codes.
#[inline(always)]
fn quantize_token(rounding: Rounding, x: &[f32], q: &mut [i8]) -> (f32, i32) {
    // As integers, magnitudes order like the numbers, with infinities and NaNs above all others.
    let largest = x.iter().fold(0, |m: i32, v| m.max((v.to_bits() & 0x7fff_ffff) as i32));
    let largest = f32::from_bits(largest as u32);
    if !largest.is_finite() {
        q.fill(0);
        return (f32::NAN, 0);
    }
    let a = match rounding {
        Rounding::Int8 => 127.0 / largest.max(EPS),
        Rounding::Int4 => ROOT_7 / scale_of_sum(abs_sum(x), x.len()),
    };
    // Clamped as floats: codes that are integers already stay what they are, and others may be too large to add to.
    let (least, most) = match rounding {
        Rounding::Int8 => (-128.0, 127.0),
        Rounding::Int4 => (-8.0, 7.0),
    };
    // Adding 1.5 · 2^23 rounds |v| ≤ 128 to an integer in the low mantissa bits, ties to even.
    const SHIFT: f32 = 12_582_912.0;
    let mut sum = 0i32;
    for (q, &v) in q.iter_mut().zip(x) {
        let rounded = ((v * a).clamp(least, most) + SHIFT).to_bits() as i32 - SHIFT.to_bits() as i32;
        *q = rounded as i8;
        sum += rounded;
    }
    (1.0 / a, sum)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn quantize_token_avx2(rounding: Rounding, x: &[f32], q: &mut [i8]) -> (f32, i32) {
    quantize_token(rounding, x, q)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2")]
fn quantize_token_avx512(rounding: Rounding, x: &[f32], q: &mut [i8]) -> (f32, i32) {
    quantize_token(rounding, x, q)
}

impl Activations {
    /// No tokens, to be rounded to int8.
    pub fn new() -> Self {
        Self::default()
    }

    /// No tokens, to be rounded like this.
    pub fn rounded(rounding: Rounding) -> Self {
        Self { rounding, ..Self::default() }
    }

    /// Sets the shape; rows keep zeros after their last column.
    fn reshape(&mut self, tokens: usize, cols: usize) {
        let lines_per_token = cols.next_multiple_of(LONGEST_TILE).div_ceil(COLUMN_PAD);
        let used = tokens * lines_per_token;
        if self.lines.len() < used {
            self.lines.resize(used, Line([0; COLUMN_PAD]));
        }
        if lines_per_token > 0 {
            // Other columns may have been written where zeros must be.
            for lines in self.lines[..used].chunks_exact_mut(lines_per_token) {
                lines[cols / COLUMN_PAD..].fill(Line([0; COLUMN_PAD]));
            }
        }
        self.inverses.resize(tokens, 0.0);
        self.sums.resize(tokens, 0);
        (self.tokens, self.cols, self.lines_per_token) = (tokens, cols, lines_per_token);
    }

    /// Quantises `x`, `[tokens, cols]`, on `pool` where there is enough of it.
    ///
    /// Panics when `x` has another length.
    pub fn quantize(
        &mut self,
        kernels: &Kernels,
        x: &[f32],
        tokens: usize,
        cols: usize,
        pool: Option<&Pool>,
    ) {
        assert_eq!(Some(x.len()), tokens.checked_mul(cols), "activations of {tokens} x {cols}");
        self.quantize_rows(kernels, tokens, cols, pool, |t| &x[t * cols..][..cols]);
    }

    /// [`Activations::quantize`] of what `fill(t, row)` writes to each row of `x`, while that is in the nearest cache.
    ///
    /// Panics when `x` has another length.
    pub fn quantize_filled(
        &mut self,
        kernels: &Kernels,
        x: &mut [f32],
        [tokens, cols]: [usize; 2],
        pool: Option<&Pool>,
        fill: impl Fn(usize, &mut [f32]) + Sync,
    ) {
        assert_eq!(Some(x.len()), tokens.checked_mul(cols), "activations of {tokens} x {cols}");
        let x = SharedMut::new(x);
        self.quantize_rows(kernels, tokens, cols, pool, |t| {
            // SAFETY: row `t` of `x`, which is borrowed mutably until all rows are done; each is asked for once.
            let row = unsafe { core::slice::from_raw_parts_mut(x.as_ptr().add(t * cols), cols) };
            fill(t, row);
            row
        });
    }

    /// Quantises `row(t)`, asked for once for each token.
    fn quantize_rows<'a>(
        &mut self,
        kernels: &Kernels,
        tokens: usize,
        cols: usize,
        pool: Option<&Pool>,
        row: impl Fn(usize) -> &'a [f32] + Sync,
    ) {
        self.reshape(tokens, cols);
        let stride = self.lines_per_token * COLUMN_PAD;
        let lines = SharedMut::new(&mut self.lines);
        let inverses = SharedMut::new(&mut self.inverses);
        let sums = SharedMut::new(&mut self.sums);
        let rounding = self.rounding;
        let one = |t: usize| {
            // SAFETY: row `t` of `lines`, `cols <= stride` bytes long; `one` runs once for each token.
            let q =
                unsafe { core::slice::from_raw_parts_mut(lines.as_ptr().cast::<i8>().add(t * stride), cols) };
            let x = row(t);
            let (inverse, sum) = match kernels.isa {
                // SAFETY: a `Kernels` exists only when its instruction set was found.
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => unsafe { quantize_token_avx512(rounding, x, q) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => unsafe { quantize_token_avx2(rounding, x, q) },
                #[cfg(target_arch = "aarch64")]
                Isa::Neon => quantize_token(rounding, x, q),
                Isa::Scalar => quantize_token(rounding, x, q),
            };
            // SAFETY: both hold `tokens` values; `one` runs once for each token.
            unsafe {
                *inverses.as_ptr().add(t) = inverse;
                *sums.as_ptr().add(t) = sum;
            }
        };
        // Some 32 K values take longer than a fork.
        let tokens_per_chunk = (1usize << 15).div_ceil(cols.max(1));
        match pool {
            Some(pool) if tokens > tokens_per_chunk => {
                pool.run(tokens.div_ceil(tokens_per_chunk), &|chunk| {
                    let first = chunk * tokens_per_chunk;
                    (first..tokens.min(first + tokens_per_chunk)).for_each(one);
                });
            }
            _ => (0..tokens).for_each(one),
        }
    }

    /// Activations from given codes `[tokens, cols]` and one inverse per token.
    ///
    /// Panics when the lengths do not agree.
    pub fn from_i8(codes: &[i8], inverses: &[f32], cols: usize) -> Self {
        let tokens = inverses.len();
        assert_eq!(Some(codes.len()), tokens.checked_mul(cols), "activations of {tokens} x {cols}");
        let mut this = Self::new();
        this.reshape(tokens, cols);
        this.inverses.copy_from_slice(inverses);
        for t in 0..tokens {
            let row = &codes[t * cols..][..cols];
            this.sums[t] = row.iter().map(|&q| i32::from(q)).sum();
            let lines = &mut this.lines[t * this.lines_per_token..][..this.lines_per_token];
            for (line, part) in lines.iter_mut().zip(row.chunks(COLUMN_PAD)) {
                line.0[..part.len()].copy_from_slice(part);
            }
        }
        this
    }

    /// Tokens (rows).
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The codes of token `t`. Panics when there is no such token.
    pub fn row(&self, t: usize) -> &[i8] {
        &self.padded_row(t)[..self.cols]
    }

    /// The codes of token `t` and the zeros after them, to a multiple of 64.
    pub(crate) fn padded_row(&self, t: usize) -> &[i8] {
        assert!(t < self.tokens, "token {t} of {}", self.tokens);
        let lines = &self.lines[t * self.lines_per_token..][..self.lines_per_token];
        lines.as_flattened_i8()
    }

    /// `1 / a = 1 / (127 / m)`: what a code of token `t` is multiplied with to give `x`.
    pub fn inverse(&self, t: usize) -> f32 {
        self.inverses[t]
    }

    /// The sum of the codes of token `t`.
    pub fn sum(&self, t: usize) -> i32 {
        self.sums[t]
    }
}

trait AsFlattened {
    fn as_flattened_i8(&self) -> &[i8];
}

impl AsFlattened for [Line] {
    fn as_flattened_i8(&self) -> &[i8] {
        // SAFETY: a `Line` is 64 bytes of `i8` without padding (size and alignment are both 64).
        unsafe { core::slice::from_raw_parts(self.as_ptr().cast(), self.len() * COLUMN_PAD) }
    }
}

#[cfg(test)]
mod tests;
