//! Which rows of a dense matrix can have the largest products: an upper bound for every row, at a fraction of the bytes.
//!
//! A language model's head is the largest matrix that a token reads, and only its few largest logits matter. So a
//! second copy holds four bits for each weight. With `Δ` the step of a row's group of [`GROUP`] columns, and `u` in
//! [−½, ½) a pseudo-random number for each column, the same for all rows, it stores `k = round(w/Δ + 7.5 + u)`, 0 to 15,
//! and estimates `Σ w·x` as `Δ Σ (k − 7.5 − u) x`. Whatever `w` is, the errors `e = w/Δ + 7.5 + u − k` are then
//! independent over columns and uniform on an interval of length 1: that is what subtracting the dither is for. A sum
//! of them is sub-Gaussian with a known variance, so a logit exceeds its estimate by more than
//! `T = 2.8 √(Σ Δ² Σ x²) + slack` with probability below 4·10⁻²¹ over the choice of `u`. docs/numerics.md proves it, slack included.
//!
//! Layout: panels of 64 rows; in a panel, group after group, 64 steps (bf16, rounded up), then tiles of 8
//! columns: four bytes for each row, column `c` in the low nibble of byte `c`, column `4 + c` in the high one. So a 32-bit
//! lane is a row, as in [`ternary`](crate::ternary). Inputs are rounded to 16 bits, `x ≈ s (256 h + l)`, for two
//! products of unsigned codes and signed bytes. All sums are exact integers, and the floats after them have one order:
//! bounds have the same bits on every instruction set and number of threads.

// As in `dense`: rows and vectors then look the same on both sides of an assignment.
#![allow(clippy::needless_range_loop)]

use crate::buffer::Buffer;
use crate::dense::DenseMatrix;
use crate::kernels::{Kernels, Products};
use crate::lanes::{LANES, job};
use crate::scratch::{Parts, with_scratch};
use crate::threads::{Pool, SharedMut};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx_vnni;
#[cfg(target_arch = "aarch64")]
mod neon;

/// Columns that share a step.
pub const GROUP: usize = 128;
/// Rows of a panel.
const ROWS: usize = 64;
/// Columns of a tile, and its bytes.
const TILE_COLS: usize = 8;
const TILE_BYTES: usize = ROWS * TILE_COLS / 2;
/// Bytes of a panel's steps for one group.
const STEP_BYTES: usize = ROWS * 2;
/// Most tokens of one call of a kernel.
const MAX_TOKENS: usize = 2;
/// How far ahead codes are fetched, in bytes, as in the ternary products.
#[cfg(target_arch = "x86_64")]
const AHEAD: usize = 8 << 10;

/// Half the interval that a code covers, in steps: what a weight of the largest size is away from zero.
const REACH: f32 = 7.5;
/// Steps are at least this, weights at most [`MAX_WEIGHT`], so that no square under- or overflows.
const MIN_STEP: f32 = 1.0 / (1u64 << 36) as f32;
const MAX_WEIGHT: f32 = (1 << 20) as f32;
/// What the largest input may be; others have no bounds.
const INPUTS: std::ops::RangeInclusive<f32> = 1.0 / (1 << 20) as f32..=(1 << 30) as f32;
/// `T` in units of `√(Σ Δ² Σ x²)`.
const WIDTH: f32 = 2.8;
/// Largest code of an input: 127 · 256, so that both bytes are signed.
const INPUT_CODES: f32 = 32512.0;

/// `sums[t][row] = Σ k·(256 h + l)`.
type Sums<const T: usize> = [[i32; ROWS]; T];
/// High and low bytes of each token's inputs.
type Bytes<const T: usize> = [[*const i8; 2]; T];

/// One instruction set's way through a panel of so many columns: adds all groups to the totals of one or two tokens.
///
/// # Safety
/// The instruction set is there; panel and inputs are of that many columns.
type AddPanel = unsafe fn(&[u8], usize, &[Input], &mut [Totals; MAX_TOKENS]);

/// An [`AddPanel`] with the sums of `$dot`: `(tiles, their number, inputs, sums)`, with eight bytes of inputs for each tile.
/// Sums and what becomes of them are compiled together, since a call for each would take as long as the sums do.
macro_rules! add_panel {
    ($(#[$attribute:meta])* $name:ident, $dot:ident) => {
        /// # Safety
        /// As [`AddPanel`](super::AddPanel).
        $(#[$attribute])*
        pub(in crate::shortlist) unsafe fn $name(
            panel: &[u8],
            cols: usize,
            tokens: &[$crate::shortlist::Input],
            totals: &mut [$crate::shortlist::Totals; $crate::shortlist::MAX_TOKENS],
        ) {
            use $crate::shortlist::add_groups;
            // SAFETY (all): groups lie within the panel and the inputs, as the caller promises; so does the instruction set.
            match tokens {
                [a] => add_groups(panel, cols, [a], totals, |w, n, x, s| unsafe { $dot(w, n, x, s) }),
                [a, b] => add_groups(panel, cols, [a, b], totals, |w, n, x, s| unsafe { $dot(w, n, x, s) }),
                _ => unreachable!("one or two tokens"),
            }
        }
    };
}
use add_panel;

/// A four-bit copy of a dense matrix.
#[derive(Debug)]
pub struct Shortlist {
    rows: usize,
    cols: usize,
    /// `7.5 + u` of every column.
    offsets: Vec<f32>,
    data: Buffer,
}

/// Columns of every group.
fn groups(cols: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    (0..cols.div_ceil(GROUP)).map(move |g| g * GROUP..cols.min((g + 1) * GROUP))
}

fn panel_bytes(cols: usize) -> usize {
    groups(cols).map(|columns| STEP_BYTES + columns.len().div_ceil(TILE_COLS) * TILE_BYTES).sum()
}

/// Bytes that the copy of a `[rows, cols]` matrix takes, and that one token reads of it.
pub fn shortlist_bytes(rows: usize, cols: usize) -> usize {
    rows.div_ceil(ROWS).saturating_mul(panel_bytes(cols))
}

impl Shortlist {
    /// Makes the copy, on all threads. `None` if a weight is not finite, or larger than 2²⁰: there are no bounds then.
    pub fn new(matrix: &DenseMatrix, kernels: &Kernels, pool: &Pool) -> Option<Self> {
        let (rows, cols) = (matrix.rows(), matrix.cols());
        let mut state = 0x5e7u64;
        let offsets = std::iter::repeat_with(|| REACH + uniform(&mut state)).take(cols).collect();
        let panels = rows.div_ceil(ROWS);
        let mut list = Self { rows, cols, offsets, data: Buffer::zeroed(shortlist_bytes(rows, cols)) };
        let (bytes, chunks) = (panel_bytes(cols), cols.div_ceil(LANES));
        let (fine, offsets, data) = (AtomicBool::new(true), &list.offsets, SharedMut::new(&mut list.data));
        let mut padded = offsets.clone();
        padded.resize(chunks * LANES, REACH);
        pool.run(panels, &|panel| {
            // SAFETY: panels follow one another in `data`, and each is one task's.
            let out = unsafe { std::slice::from_raw_parts_mut(data.as_ptr().add(panel * bytes), bytes) };
            with_scratch(chunks, |weights| {
                for r in 0..ROWS.min(rows - panel * ROWS) {
                    matrix.row_chunks(kernels, panel * ROWS + r, weights);
                    let (weights, offsets) = (weights.as_flattened(), &padded[..]);
                    if !kernels.lanes(Encode { weights, offsets, r, panel: &mut *out }) {
                        fine.store(false, Relaxed);
                        return;
                    }
                }
            });
        });
        fine.into_inner().then_some(list)
    }

    /// Bytes that one token (or a few) reads.
    pub fn bytes(&self) -> usize {
        self.data.len()
    }

    /// Bounds of the products of all rows with each row of `x`, `[tokens, cols]`. Panics on another length.
    pub fn bounds(&self, kernels: &Kernels, x: &[f32], tokens: usize, bounds: &mut Bounds, pool: &Pool) {
        assert_eq!(Some(x.len()), tokens.checked_mul(self.cols), "bounds: x is not [tokens, cols]");
        bounds.reset(self, tokens);
        for t in 0..tokens {
            let x = &x[t * self.cols..(t + 1) * self.cols];
            bounds.inputs.push(kernels.lanes(Round { x, offsets: &self.offsets }));
        }
        let panels = self.rows.div_ceil(ROWS);
        let Bounds { inputs, estimates, uppers, most_estimate, most_upper, .. } = bounds;
        let out = [estimates, uppers, most_estimate, most_upper].map(|out| Parts::new(out));
        let work = Work { list: self, kernels, inputs, out: &out, panels };
        // SAFETY: panels are disjoint, and each is run once.
        pool.run_neighbours(panels, &|panel| unsafe { work.panel(panel) });
    }
}

/// Uniform on [−½, ½): SplitMix64's upper bits.
fn uniform(state: &mut u64) -> f32 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 40) as f32 / (1 << 24) as f32 - 0.5
}

/// The least bf16 that is not below `x` (positive, not near the largest).
fn bf16_above(x: f32) -> u16 {
    ((x.to_bits() + 0xffff) >> 16) as u16
}

fn bf16_to_f32(x: u16) -> f32 {
    f32::from_bits(u32::from(x) << 16)
}

// Plain loops: as jobs they are compiled for every instruction set.
job!(Encode { weights: &'a [f32], offsets: &'a [f32], r: usize, panel: &'a mut [u8] } -> bool, |_s| {
    let mut rest = panel;
    for (weights, offsets) in weights.chunks(GROUP).zip(offsets.chunks(GROUP)) {
        let words = weights.len() / TILE_COLS;
        // Columns that pad the last tile may be a tile of their own, which the panel has no room for.
        let tiles = words.min((rest.len() - STEP_BYTES) / TILE_BYTES);
        let (steps, after) = rest.split_at_mut(STEP_BYTES);
        let (codes, after) = after.split_at_mut(tiles * TILE_BYTES);
        rest = after;
        // As integers, magnitudes order like the numbers, with infinities and NaNs above all others.
        let largest = weights.iter().fold(0, |m: u32, w| m.max(w.to_bits() & 0x7fff_ffff));
        let largest = f32::from_bits(largest);
        if largest.is_nan() || largest > MAX_WEIGHT {
            return false;
        }
        // A little more than needed, so that rounding carries no code beyond 0 to 15.
        let step = bf16_above((largest * (1.0001 / REACH)).max(MIN_STEP));
        steps[2 * r..2 * r + 2].copy_from_slice(&step.to_le_bytes());
        let inverse = 1.0 / bf16_to_f32(step);
        let mut packed = [0u8; GROUP];
        for ((packed, &w), &offset) in packed.iter_mut().zip(weights).zip(offsets) {
            // Adding 1.5 · 2²³ rounds to an integer in the low bits of the mantissa, from −½ up as well.
            *packed = (w.mul_add(inverse, offset) + 12_582_912.0).to_bits() as u8;
        }
        for (tile, eight) in codes.chunks_exact_mut(TILE_BYTES).zip(packed.as_chunks::<8>().0) {
            let eight = u64::from_le_bytes(*eight);
            let word = eight as u32 | ((eight >> 32) as u32) << 4;
            tile[4 * r..4 * r + 4].copy_from_slice(&word.to_le_bytes());
        }
    }
    true
});

/// What all rows need to know of one group of inputs.
#[derive(Debug, Clone, Copy)]
struct InputGroup {
    /// `s`.
    scale: f32,
    /// `Σ (7.5 + u) (256 h + l)`: the nearest integer, and the rest.
    whole: i32,
    rest: f32,
    /// `(2.8)² Σ x²`.
    spread: f32,
    /// What is certain to cover all roundings, in steps.
    slack: f32,
}

/// One token's inputs, rounded.
#[derive(Debug)]
struct Input {
    usable: bool,
    /// Bytes `h` and `l`, padded to whole tiles.
    high: Vec<i8>,
    low: Vec<i8>,
    /// Zeros, where there are no bounds.
    groups: Vec<InputGroup>,
}

job!(Round { x: &'a [f32], offsets: &'a [f32] } -> Input, |_s| {
    let largest = x.iter().fold(0, |m: u32, v| m.max(v.to_bits() & 0x7fff_ffff));
    let usable = INPUTS.contains(&f32::from_bits(largest));
    let padded = x.len().next_multiple_of(TILE_COLS);
    let mut input = Input { usable, high: vec![0; padded], low: vec![0; padded], groups: Vec::new() };
    if !usable {
        let none = InputGroup { scale: 0.0, whole: 0, rest: 0.0, spread: 0.0, slack: 0.0 };
        input.groups = vec![none; x.len().div_ceil(GROUP)];
        return input;
    }
    // Additions of the exact product, of this one, and those of the estimate over groups, with room to spare.
    let roundings = x.len() / LANES + 4 * x.len().div_ceil(GROUP) + 64;
    for columns in groups(x.len()) {
        let (x, offsets) = (&x[columns.clone()], &offsets[columns.clone()]);
        let largest = x.iter().fold(0, |m: u32, v| m.max(v.to_bits() & 0x7fff_ffff));
        let largest = f32::from_bits(largest);
        let scale = largest / INPUT_CODES;
        // A scale that is no normal number would not be exact enough; such inputs count as zero, within `slack`.
        let inverse = if scale >= f32::MIN_POSITIVE { 1.0 / scale } else { 0.0 };
        let (mut correction, mut squares, mut sizes) = (0f64, 0f64, 0f64);
        for ((i, &v), &offset) in columns.zip(x).zip(offsets) {
            let q = (v * inverse).round_ties_even().clamp(-INPUT_CODES, INPUT_CODES) as i32;
            let high = (q + 128) >> 8;
            (input.high[i], input.low[i]) = (high as i8, (q - 256 * high) as i8);
            correction += f64::from(offset) * f64::from(q);
            squares += f64::from(v) * f64::from(v);
            sizes += f64::from(v.abs());
        }
        let error = if inverse == 0.0 { largest } else { 0.51 * scale } * x.len() as f32;
        let rounding = roundings as f32 / (1 << 24) as f32 * sizes as f32;
        input.groups.push(InputGroup {
            scale: if inverse == 0.0 { 0.0 } else { scale },
            whole: correction.round() as i32,
            rest: (correction - correction.round()) as f32,
            // The floor is for squares that a float cannot hold: beside large weights they still count.
            spread: WIDTH * WIDTH * (squares * 1.0001).max(1e-36) as f32,
            slack: 8.0 * (error + rounding),
        });
    }
    input
});

/// What all panels share.
struct Work<'a> {
    list: &'a Shortlist,
    kernels: &'a Kernels,
    inputs: &'a [Input],
    /// Estimates, upper bounds, and the largest of each in a panel.
    out: &'a [Parts<'a>; 4],
    panels: usize,
}

/// Sums over the groups so far, for 64 rows.
#[derive(Clone, Copy)]
struct Totals {
    estimate: [f32; ROWS],
    spread: [f32; ROWS],
    slack: [f32; ROWS],
}

const ZERO: Totals = Totals { estimate: [0.0; ROWS], spread: [0.0; ROWS], slack: [0.0; ROWS] };

/// One group's part of the totals.
#[inline(always)]
fn add(totals: &mut Totals, steps: &[u8; STEP_BYTES], sums: &[i32; ROWS], group: &InputGroup) {
    for r in 0..ROWS {
        let step = bf16_to_f32(u16::from_le_bytes([steps[2 * r], steps[2 * r + 1]]));
        let product = group.scale * ((sums[r] - group.whole) as f32 - group.rest);
        totals.estimate[r] = step.mul_add(product, totals.estimate[r]);
        totals.spread[r] = (step * step).mul_add(group.spread, totals.spread[r]);
        totals.slack[r] = step.mul_add(group.slack, totals.slack[r]);
    }
}

/// All groups of a panel: compiled as a part of its caller, for that one's instruction set.
#[inline(always)]
fn add_groups<const T: usize>(
    panel: &[u8],
    cols: usize,
    tokens: [&Input; T],
    totals: &mut [Totals; MAX_TOKENS],
    dot: impl Fn(*const u8, usize, Bytes<T>, &mut Sums<T>),
) {
    let (mut rest, mut sums) = (panel, [[0; ROWS]; T]);
    for (g, columns) in groups(cols).enumerate() {
        let (steps, after) = rest.split_first_chunk::<STEP_BYTES>().expect("whole groups");
        let tiles = columns.len().div_ceil(TILE_COLS);
        let (codes, after) = after.split_at(tiles * TILE_BYTES);
        rest = after;
        let inputs = tokens.map(|input| {
            let part = columns.start..columns.start + tiles * TILE_COLS;
            [input.high[part.clone()].as_ptr(), input.low[part].as_ptr()]
        });
        dot(codes.as_ptr(), tiles, inputs, &mut sums);
        for t in 0..T {
            add(&mut totals[t], steps, &sums[t], &tokens[t].groups[g]);
        }
    }
}

job!(Finish { totals: &'a Totals, estimates: &'a mut [f32], uppers: &'a mut [f32] } -> [f32; 2], |_s| {
    let mut bound = [0.0; ROWS];
    for r in 0..ROWS {
        bound[r] = totals.estimate[r] + (totals.spread[r].sqrt() + totals.slack[r]);
    }
    estimates.copy_from_slice(&totals.estimate[..estimates.len()]);
    uppers.copy_from_slice(&bound[..uppers.len()]);
    [estimates, uppers].map(|values| {
        let mut most = [f32::NEG_INFINITY; LANES];
        for values in values.chunks(LANES) {
            most.iter_mut().zip(values).for_each(|(most, &v)| *most = if v > *most { v } else { *most });
        }
        most.into_iter().fold(f32::NEG_INFINITY, f32::max)
    })
});

fn add_panel_of(kernels: &Kernels) -> AddPanel {
    match kernels.products {
        #[cfg(target_arch = "x86_64")]
        Products::Avx512Vbmi | Products::Avx512 => avx512::add_panel,
        #[cfg(target_arch = "x86_64")]
        Products::AvxVnni => avx_vnni::add_panel,
        #[cfg(target_arch = "x86_64")]
        Products::Avx2 => avx2::add_panel,
        #[cfg(target_arch = "aarch64")]
        Products::NeonI8mm | Products::NeonDot => neon::add_panel_by_dots,
        #[cfg(target_arch = "aarch64")]
        Products::Neon => neon::add_panel,
        Products::Scalar => add_panel_scalar,
    }
}

impl Work<'_> {
    /// # Safety
    /// No other call for this panel runs at the same time.
    unsafe fn panel(&self, panel: usize) {
        let mut t = 0;
        while t < self.inputs.len() {
            let tokens = &self.inputs[t..self.inputs.len().min(t + MAX_TOKENS)];
            // SAFETY: the caller's promise.
            unsafe { self.tokens(panel, t, tokens) };
            t += tokens.len();
        }
    }

    /// # Safety
    /// As [`Work::panel`].
    unsafe fn tokens(&self, panel: usize, first: usize, tokens: &[Input]) {
        let cols = self.list.cols;
        let bytes = panel_bytes(cols);
        let mut totals = [ZERO; MAX_TOKENS];
        let codes = &self.list.data[panel * bytes..(panel + 1) * bytes];
        // SAFETY: panel and inputs are of these columns; the instruction set was found, or there would be no `Kernels`.
        unsafe { add_panel_of(self.kernels)(codes, cols, tokens, &mut totals) };
        let rows = ROWS.min(self.list.rows - panel * ROWS);
        for (t, totals) in (first..).zip(&totals[..tokens.len()]) {
            let [estimates, uppers, most_estimate, most_upper] = self.out;
            let (at, most) = (t * self.list.rows + panel * ROWS, t * self.panels + panel);
            // SAFETY (all): this panel's parts, by the caller's promise.
            let (estimates, uppers) = unsafe { (estimates.get(at, rows), uppers.get(at, rows)) };
            let (most_estimate, most_upper) =
                unsafe { (most_estimate.get(most, 1), most_upper.get(most, 1)) };
            [most_estimate[0], most_upper[0]] = self.kernels.lanes(Finish { totals, estimates, uppers });
        }
    }
}

add_panel!(add_panel_scalar, dot_scalar);

/// Reference.
///
/// # Safety
/// Whole tiles, and eight bytes of inputs for each, are readable.
unsafe fn dot_scalar<const T: usize>(tiles: *const u8, count: usize, inputs: Bytes<T>, sums: &mut Sums<T>) {
    // SAFETY: whole tiles, as the caller promises.
    let tiles = unsafe { std::slice::from_raw_parts(tiles, count * TILE_BYTES) };
    for (inputs, sums) in inputs.iter().zip(sums) {
        // SAFETY: eight bytes of each for every tile, as the caller promises.
        let [high, low] = inputs.map(|p| unsafe { std::slice::from_raw_parts(p, count * TILE_COLS) });
        *sums = [0; ROWS];
        for (i, tile) in tiles.chunks_exact(TILE_BYTES).enumerate() {
            let x: [i32; TILE_COLS] = std::array::from_fn(|c| {
                256 * i32::from(high[i * TILE_COLS + c]) + i32::from(low[i * TILE_COLS + c])
            });
            for (sum, four) in sums.iter_mut().zip(tile.as_chunks::<4>().0) {
                for (b, &byte) in four.iter().enumerate() {
                    *sum += i32::from(byte & 15) * x[b] + i32::from(byte >> 4) * x[4 + b];
                }
            }
        }
    }
}

/// Bounds of all rows for some tokens; memory is kept for the next ones.
#[derive(Debug, Default)]
pub struct Bounds {
    rows: usize,
    inputs: Vec<Input>,
    /// `[tokens, rows]`.
    estimates: Vec<f32>,
    uppers: Vec<f32>,
    /// `[tokens, panels]`.
    most_estimate: Vec<f32>,
    most_upper: Vec<f32>,
}

impl Bounds {
    fn reset(&mut self, list: &Shortlist, tokens: usize) {
        self.rows = list.rows;
        self.inputs.clear();
        self.estimates.resize(tokens * list.rows, 0.0);
        self.uppers.resize(tokens * list.rows, 0.0);
        self.most_estimate.resize(tokens * list.rows.div_ceil(ROWS), 0.0);
        self.most_upper.resize(tokens * list.rows.div_ceil(ROWS), 0.0);
    }

    /// Whether there are bounds for token `t`: not if its inputs are not finite, all zero, or of an extraordinary size.
    pub fn usable(&self, t: usize) -> bool {
        self.inputs[t].usable
    }

    /// Estimates of token `t`, `[rows]`.
    pub fn estimates(&self, t: usize) -> &[f32] {
        &self.estimates[t * self.rows..(t + 1) * self.rows]
    }

    /// Upper bounds of token `t`, `[rows]`.
    pub fn uppers(&self, t: usize) -> &[f32] {
        &self.uppers[t * self.rows..(t + 1) * self.rows]
    }

    /// At least `count` rows (all, if there are not so many) with large estimates for token `t`, in rising order.
    pub fn likeliest(&self, t: usize, count: usize, out: &mut Vec<u32>) {
        let (estimates, panels) = (self.estimates(t), self.rows.div_ceil(ROWS));
        out.clear();
        if count == 0 || self.rows == 0 {
            return;
        }
        let kth = |mut values: Vec<f32>| {
            let at = count.min(values.len()) - 1;
            *values.select_nth_unstable_by(at, |a, b| b.total_cmp(a)).1
        };
        let most = &self.most_estimate[t * panels..(t + 1) * panels];
        // As many panels reach the limit as rows are wanted. That is not the limit of the best rows, but cheap and near.
        let limit = if panels >= count { kth(most.to_vec()) } else { kth(estimates.to_vec()) };
        collect(estimates, most, limit, usize::MAX, out);
    }

    /// The rows whose product with token `t` may reach `limit`, in rising order. `false`, with some of them, if there are more
    /// than `most`.
    pub fn reaching(&self, t: usize, limit: f32, most: usize, out: &mut Vec<u32>) -> bool {
        let panels = self.rows.div_ceil(ROWS);
        out.clear();
        collect(self.uppers(t), &self.most_upper[t * panels..(t + 1) * panels], limit, most, out)
    }
}

/// Rows whose value reaches `limit`, by way of their panels' largest. `false` when there are more than `most`.
fn collect(values: &[f32], largest: &[f32], limit: f32, most: usize, out: &mut Vec<u32>) -> bool {
    for (panel, _) in largest.iter().enumerate().filter(|(_, largest)| **largest >= limit) {
        let values = &values[panel * ROWS..values.len().min((panel + 1) * ROWS)];
        for (first, values) in (panel * ROWS..).step_by(LANES).zip(values.chunks(LANES)) {
            // Without a branch for each, since most pieces hold none.
            if values.iter().fold(false, |any, &v| any | (v >= limit)) {
                out.extend((first as u32..).zip(values).filter(|(_, v)| **v >= limit).map(|(r, _)| r));
            }
        }
        if out.len() > most {
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests;
