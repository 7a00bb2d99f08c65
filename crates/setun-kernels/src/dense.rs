//! Dense matrices: the language model's head, and models that are not ternary.
//!
//! Every output is the sixteen-lane dot product of [`float`](crate::float), of the weights converted exactly
//! to f32: the same bits for one token as for many. What differs is only how often a weight is read. Up to
//! five tokens multiply straight from the stored format, bound by memory; more tokens unpack a panel of rows
//! once and go over it in register tiles.

// Tiles are written by index: rows, tokens and lanes then look the same on both sides of an assignment.
#![allow(clippy::needless_range_loop)]

use crate::Kernels;
use crate::lanes::{Chunk, Job, LANES, Lanes, chunk_at};
use crate::scratch::{Parts, with_scratch};
use crate::threads::Pool;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

mod picked;
mod trits;

/// Bytes of a Q8_0 block: an f16 scale and [`Q8_0_LEN`] signed bytes.
const Q8_0_BYTES: usize = 34;
/// Weights of a Q8_0 block.
const Q8_0_LEN: usize = 32;
/// Up to this many tokens, weights are converted as they are multiplied.
const FEW: usize = 5;

/// The weights of a [`DenseMatrix`], row-major.
#[derive(Debug, Clone, PartialEq)]
pub enum DenseData {
    /// 32-bit floats.
    F32(Vec<f32>),
    /// IEEE half precision.
    F16(Vec<f16>),
    /// The upper half of an f32.
    BF16(Vec<bf16>),
    /// GGUF's Q8_0: blocks of 34 bytes for 32 columns, an f16 scale `d` (little endian) and 32 `i8`; a weight is
    /// `d * q`, exact in f32.
    Q8_0(Vec<u8>),
}

/// Why weights do not make a matrix.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum DenseError {
    /// The data's length is not what the shape asks for.
    Length {
        /// Rows asked for.
        rows: usize,
        /// Columns asked for.
        cols: usize,
        /// Elements (bytes for Q8_0) that this shape takes; `None` if it overflows.
        expected: Option<usize>,
        /// Elements (bytes for Q8_0) there are.
        found: usize,
    },
    /// Q8_0 rows hold whole blocks only.
    Blocks {
        /// Columns asked for.
        cols: usize,
    },
}

impl std::fmt::Display for DenseError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Length { rows, cols, expected: Some(expected), found } => {
                write!(
                    f,
                    "a dense matrix of {rows} x {cols} takes {expected} elements, but {found} were given"
                )
            }
            Self::Length { rows, cols, expected: None, .. } => {
                write!(f, "a dense matrix of {rows} x {cols} is larger than memory can address")
            }
            Self::Blocks { cols } => {
                write!(f, "a Q8_0 matrix has {cols} columns, but its blocks need a multiple of {Q8_0_LEN}")
            }
        }
    }
}

impl std::error::Error for DenseError {}

/// A matrix of `rows` outputs by `cols` inputs in a float format.
#[derive(Debug, Clone, PartialEq)]
pub struct DenseMatrix {
    rows: usize,
    cols: usize,
    data: DenseData,
}

impl DenseMatrix {
    /// Takes row-major weights of `rows x cols`.
    ///
    /// # Errors
    /// [`DenseError`] if the length does not fit the shape.
    pub fn new(rows: usize, cols: usize, data: DenseData) -> Result<Self, DenseError> {
        let (found, per_row) = match &data {
            DenseData::F32(d) => (d.len(), cols),
            DenseData::F16(d) => (d.len(), cols),
            DenseData::BF16(d) => (d.len(), cols),
            DenseData::Q8_0(_) if !cols.is_multiple_of(Q8_0_LEN) => {
                return Err(DenseError::Blocks { cols });
            }
            DenseData::Q8_0(d) => (d.len(), (cols / Q8_0_LEN).saturating_mul(Q8_0_BYTES)),
        };
        match rows.checked_mul(per_row) {
            Some(expected) if expected == found => Ok(Self { rows, cols, data }),
            expected => Err(DenseError::Length { rows, cols, expected, found }),
        }
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The stored weights.
    pub fn data(&self) -> &DenseData {
        &self.data
    }

    /// Bytes of the weights: what one token reads.
    pub fn bytes(&self) -> usize {
        match &self.data {
            DenseData::F32(d) => size_of_val(&d[..]),
            DenseData::F16(d) => size_of_val(&d[..]),
            DenseData::BF16(d) => size_of_val(&d[..]),
            DenseData::Q8_0(d) => d.len(),
        }
    }

    /// Row `r` in f32, exactly. Panics unless `r < rows` and `out` has `cols` elements.
    pub fn row_f32(&self, r: usize, out: &mut [f32]) {
        assert!(r < self.rows && out.len() == self.cols, "row_f32: no such row, or `out` is not one row");
        let cells = r * self.cols..(r + 1) * self.cols;
        match &self.data {
            DenseData::F32(d) => out.copy_from_slice(&d[cells]),
            DenseData::F16(d) => d[cells].convert_to_f32_slice(out),
            DenseData::BF16(d) => d[cells].convert_to_f32_slice(out),
            DenseData::Q8_0(d) => {
                let row = Blocks::row(d, self.cols, r);
                for (out, block) in out.chunks_exact_mut(Q8_0_LEN).zip(row.0) {
                    let scale = f16::from_le_bytes([block[0], block[1]]).to_f32();
                    out.iter_mut().zip(&block[2..]).for_each(|(o, &q)| *o = scale * f32::from(q as i8));
                }
            }
        }
    }

    /// `out = x Wᵀ`: `x` is `[tokens, cols]`, `out` is `[tokens, rows]`. Panics on other lengths.
    ///
    /// Each output has the bits of [`Kernels::dot`] on the row in f32, whatever `tokens` and `pool` are.
    pub fn matmul(&self, kernels: &Kernels, x: &[f32], tokens: usize, out: &mut [f32], pool: &Pool) {
        Product::with([self.rows, self.cols], x, tokens, out, |product| match &self.data {
            DenseData::F32(d) => product.run::<Numbers<f32>>(kernels, d, pool),
            DenseData::F16(d) => product.run::<Numbers<f16>>(kernels, d, pool),
            DenseData::BF16(d) => product.run::<Numbers<bf16>>(kernels, d, pool),
            DenseData::Q8_0(d) => product.run::<Blocks>(kernels, d, pool),
        });
    }
}

/// A row of stored weights, read in chunks of sixteen.
trait Row<'a>: Copy {
    /// What holds the weights of all rows.
    type Data: Sync + ?Sized + 'a;
    /// Bytes of a row of `cols` columns.
    fn bytes(cols: usize) -> usize;
    /// Row `r` of a matrix of `cols` columns.
    fn row(data: &'a Self::Data, cols: usize, r: usize) -> Self;
    /// Whole chunks.
    fn whole(self) -> usize;
    /// Chunk `i < whole()` in f32, exactly.
    fn load<S: Lanes>(self, s: S, i: usize) -> S::V;
    /// The rest of the row padded with zeros, if there is one.
    fn tail(self) -> Option<Chunk>;
    /// Asks for the line `bytes` after chunk `i`.
    fn prefetch<S: Lanes>(self, s: S, i: usize, bytes: usize);
}

/// A row of plain numbers.
#[derive(Clone, Copy)]
struct Numbers<'a, T> {
    chunks: &'a [[T; LANES]],
    tail: &'a [T],
}

/// A number format that vectors are loaded from.
trait Number: Copy + Sync + Into<f32> + 'static {
    fn load<S: Lanes>(s: S, p: &[Self; LANES]) -> S::V;
}

macro_rules! number {
    ($type:ty, $load:ident) => {
        impl Number for $type {
            #[inline(always)]
            fn load<S: Lanes>(s: S, p: &[Self; LANES]) -> S::V {
                s.$load(p)
            }
        }
    };
}
number!(f32, load);
number!(f16, load_f16);
number!(bf16, load_bf16);

impl<'a, T: Number> Row<'a> for Numbers<'a, T> {
    type Data = [T];
    #[inline(always)]
    fn bytes(cols: usize) -> usize {
        cols * size_of::<T>()
    }
    #[inline(always)]
    fn row(data: &'a [T], cols: usize, r: usize) -> Self {
        let (chunks, tail) = data[r * cols..(r + 1) * cols].as_chunks();
        Self { chunks, tail }
    }
    #[inline(always)]
    fn whole(self) -> usize {
        self.chunks.len()
    }
    #[inline(always)]
    fn load<S: Lanes>(self, s: S, i: usize) -> S::V {
        T::load(s, &self.chunks[i])
    }
    #[inline(always)]
    fn tail(self) -> Option<Chunk> {
        (!self.tail.is_empty()).then(|| {
            let mut padded = [0.0; LANES];
            padded.iter_mut().zip(self.tail).for_each(|(p, &w)| *p = w.into());
            padded
        })
    }
    #[inline(always)]
    fn prefetch<S: Lanes>(self, s: S, i: usize, bytes: usize) {
        s.prefetch(self.chunks.as_ptr().wrapping_add(i).cast::<u8>().wrapping_add(bytes));
    }
}

/// A row of Q8_0 blocks.
#[derive(Clone, Copy)]
struct Blocks<'a>(&'a [[u8; Q8_0_BYTES]]);

impl<'a> Row<'a> for Blocks<'a> {
    type Data = [u8];
    #[inline(always)]
    fn bytes(cols: usize) -> usize {
        cols / Q8_0_LEN * Q8_0_BYTES
    }
    #[inline(always)]
    fn row(data: &'a [u8], cols: usize, r: usize) -> Self {
        let per_row = cols / Q8_0_LEN;
        Self(&data.as_chunks().0[r * per_row..(r + 1) * per_row])
    }
    #[inline(always)]
    fn whole(self) -> usize {
        self.0.len() * (Q8_0_LEN / LANES)
    }
    #[inline(always)]
    fn load<S: Lanes>(self, s: S, i: usize) -> S::V {
        let block = &self.0[i / 2];
        let q: &[u8; LANES] =
            if i.is_multiple_of(2) { block[2..18].first_chunk() } else { block[18..].first_chunk() }
                .expect("a block has two chunks of quants");
        let scale = s.splat(s.widen(f16::from_le_bytes([block[0], block[1]])));
        s.mul(scale, s.load_i8(&q.map(|q| q as i8)))
    }
    #[inline(always)]
    fn tail(self) -> Option<Chunk> {
        None
    }
    #[inline(always)]
    fn prefetch<S: Lanes>(self, s: S, i: usize, bytes: usize) {
        s.prefetch(self.0.as_ptr().wrapping_add(i / 2).cast::<u8>().wrapping_add(bytes));
    }
}

/// One product on its way.
struct Product<'a> {
    rows: usize,
    cols: usize,
    /// `[tokens, cols / 16]`, padded.
    x: &'a [Chunk],
    tokens: usize,
    out: Parts<'a>,
}

impl Product<'_> {
    /// `f` with the product of a `[rows, cols]` matrix and `x` `[tokens, cols]`, unless there is nothing to compute. Panics on
    /// other lengths.
    fn with(
        [rows, cols]: [usize; 2],
        x: &[f32],
        tokens: usize,
        out: &mut [f32],
        f: impl FnOnce(&Product<'_>),
    ) {
        assert_eq!(Some(x.len()), tokens.checked_mul(cols), "matmul: x is not [tokens, cols]");
        assert_eq!(Some(out.len()), tokens.checked_mul(rows), "matmul: out is not [tokens, rows]");
        if out.is_empty() {
            return;
        }
        let per_row = cols.div_ceil(LANES);
        // Tokens in whole, aligned chunks: copying them once is nothing beside reading the weights.
        with_scratch(tokens * per_row, |packed| {
            if per_row > 0 {
                for (token, packed) in x.chunks_exact(cols).zip(packed.chunks_exact_mut(per_row)) {
                    packed.iter_mut().enumerate().for_each(|(i, chunk)| *chunk = chunk_at(token, i));
                }
            }
            f(&Product { rows, cols, x: packed, tokens, out: Parts::new(out) });
        });
    }

    fn run<'d, W: Row<'d>>(&self, kernels: &Kernels, data: &'d W::Data, pool: &Pool) {
        let per_row = self.cols.div_ceil(LANES);
        // Few tokens: enough work to hide the claiming of a task. Many: an unpacked panel of 512 KB, for L2.
        let step = if self.tokens <= FEW { 64 } else { (8192 / per_row.max(1) / 4 * 4).clamp(4, 64) };
        // Small matrices are still to be shared by all threads.
        let step = step.min(self.rows.div_ceil(pool.threads()).next_multiple_of(4));
        pool.run(self.rows.div_ceil(step), &|task| {
            let (from, to) = (task * step, self.rows.min((task + 1) * step));
            let panel = if self.tokens <= FEW { 0 } else { (to - from) * per_row };
            with_scratch(panel, |panel| kernels.lanes(Strip::<W> { product: self, data, from, to, panel }));
        });
    }
}

/// All tokens times rows `from..to`: one task.
struct Strip<'a, 'd, W: Row<'d>> {
    product: &'a Product<'a>,
    data: &'d W::Data,
    from: usize,
    to: usize,
    /// Room for these rows in f32, where many tokens make it worth unpacking them.
    panel: &'a mut [Chunk],
}

impl<'d, W: Row<'d>> Job for Strip<'_, 'd, W> {
    type Out = ();
    #[inline(always)]
    fn run<S: Lanes>(self, s: S) {
        let Self { product, data, from, to, panel } = self;
        let Product { cols, x, tokens, .. } = *product;
        let per_row = cols.div_ceil(LANES);
        let all = Tile { product, from, x, per_row };
        if tokens <= FEW {
            let row = |r: usize| W::row(data, cols, from + r);
            match tokens {
                1 => all.rows_of::<S, W, 1>(s, row, to - from, 0, true),
                2 => all.rows_of::<S, W, 2>(s, row, to - from, 0, true),
                3 => all.rows_of::<S, W, 3>(s, row, to - from, 0, true),
                4 => all.rows_of::<S, W, 4>(s, row, to - from, 0, true),
                _ => all.rows_of::<S, W, 5>(s, row, to - from, 0, true),
            }
            return;
        }
        for r in 0..to - from {
            let row = W::row(data, cols, from + r);
            let unpacked = &mut panel[r * per_row..(r + 1) * per_row];
            for i in 0..row.whole() {
                s.store(row.load(s, i), &mut unpacked[i]);
            }
            if let Some(tail) = row.tail() {
                unpacked[per_row - 1] = tail;
            }
        }
        let row = |r: usize| Numbers { chunks: &panel[r * per_row..(r + 1) * per_row], tail: &[] };
        let mut token = 0;
        // 4 rows by 6 tokens fill 32 registers, 2 by 2 fill 16 of half the width.
        if S::WIDE {
            while token + 6 <= tokens {
                all.rows_of::<S, Numbers<f32>, 6>(s, row, to - from, token, false);
                token += 6;
            }
        }
        while token + 2 <= tokens {
            all.rows_of::<S, Numbers<f32>, 2>(s, row, to - from, token, false);
            token += 2;
        }
        if token < tokens {
            all.rows_of::<S, Numbers<f32>, 1>(s, row, to - from, token, false);
        }
    }
}

/// What all tiles of one task share.
struct Tile<'a> {
    product: &'a Product<'a>,
    from: usize,
    x: &'a [Chunk],
    per_row: usize,
}

impl Tile<'_> {
    /// `T` tokens from `token` on times all rows of the task.
    #[inline(always)]
    fn rows_of<'d, S: Lanes, W: Row<'d>, const T: usize>(
        &self,
        s: S,
        row: impl Fn(usize) -> W,
        rows: usize,
        token: usize,
        stream: bool,
    ) {
        let mut r = 0;
        if S::WIDE || T == 1 {
            while r + 4 <= rows {
                self.tile::<S, W, 4, T>(s, [row(r), row(r + 1), row(r + 2), row(r + 3)], r, token, stream);
                r += 4;
            }
        }
        if S::WIDE || T <= 2 {
            while r + 2 <= rows {
                self.tile::<S, W, 2, T>(s, [row(r), row(r + 1)], r, token, stream);
                r += 2;
            }
        }
        while r < rows {
            self.tile::<S, W, 1, T>(s, [row(r)], r, token, stream);
            r += 1;
        }
    }

    /// `R` rows by `T` tokens in registers. `stream` says that the rows come from memory, in order.
    #[inline(always)]
    fn tile<'d, S: Lanes, W: Row<'d>, const R: usize, const T: usize>(
        &self,
        s: S,
        rows: [W; R],
        r: usize,
        token: usize,
        stream: bool,
    ) {
        let mut sums = [[s.zero(); T]; R];
        let whole = rows[0].whole();
        let x: [&[Chunk]; T] = std::array::from_fn(|t| {
            let start = (token + t) * self.per_row;
            &self.x[start..start + self.per_row]
        });
        let ahead = W::bytes(self.product.cols) * R;
        for i in 0..whole {
            let mut at = [s.zero(); T];
            for t in 0..T {
                at[t] = s.load(&x[t][i]);
            }
            for j in 0..R {
                if stream {
                    rows[j].prefetch(s, i, ahead);
                }
                let w = rows[j].load(s, i);
                for t in 0..T {
                    sums[j][t] = s.fma(w, at[t], sums[j][t]);
                }
            }
        }
        for j in 0..R {
            if let Some(tail) = rows[j].tail() {
                let w = s.load(&tail);
                for t in 0..T {
                    sums[j][t] = s.fma(w, s.load(&x[t][whole]), sums[j][t]);
                }
            }
        }
        for t in 0..T {
            // SAFETY: tasks own disjoint rows, and within a task tiles follow one another.
            let out = unsafe { self.product.out.get((token + t) * self.product.rows + self.from + r, R) };
            for j in 0..R {
                out[j] = s.fold(sums[j][t]);
            }
        }
    }
}

#[cfg(test)]
mod tests;
