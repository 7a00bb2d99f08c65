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

mod blocks;
mod picked;
mod trits;

use blocks::{BLOCK, Block, Blocks, Q4_0, Q8_0};

/// Up to this many tokens, weights are converted as they are multiplied.
const FEW: usize = 5;
/// Bytes that memory moves at once.
const LINE: usize = 64;
/// How far ahead memory is asked for at most.
const AHEAD: usize = 12288;

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
    /// GGUF's Q4_0: blocks of 18 bytes for 32 columns, an f16 scale `d` (little endian) and 16 bytes, column `i < 16` in the low
    /// half of byte `i` and column `i + 16` in its high half; a weight is `d * (q - 8)`, exact in f32.
    Q4_0(Vec<u8>),
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
        /// Elements (bytes for blocks) that this shape takes; `None` if it overflows.
        expected: Option<usize>,
        /// Elements (bytes for blocks) there are.
        found: usize,
    },
    /// Rows of Q8_0 and Q4_0 hold whole blocks only.
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
                write!(
                    f,
                    "a Q8_0 or Q4_0 matrix has {cols} columns, but its blocks need a multiple of {BLOCK}"
                )
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
            DenseData::Q8_0(_) | DenseData::Q4_0(_) if !cols.is_multiple_of(BLOCK) => {
                return Err(DenseError::Blocks { cols });
            }
            DenseData::Q8_0(d) => (d.len(), (cols / BLOCK).saturating_mul(Q8_0::BYTES)),
            DenseData::Q4_0(d) => (d.len(), (cols / BLOCK).saturating_mul(Q4_0::BYTES)),
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
            DenseData::Q8_0(d) | DenseData::Q4_0(d) => d.len(),
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
            DenseData::Q8_0(d) => Q8_0::decode(&d[r * Q8_0::row_bytes(self.cols)..], out),
            DenseData::Q4_0(d) => Q4_0::decode(&d[r * Q4_0::row_bytes(self.cols)..], out),
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
            DenseData::Q8_0(d) => product.run::<Blocks<Q8_0>>(kernels, d, pool),
            DenseData::Q4_0(d) => product.run::<Blocks<Q4_0>>(kernels, d, pool),
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
    /// Chunks `2 i` and `2 i + 1`: two at a time, because that is what a block's scale is good for.
    #[inline(always)]
    fn load_two<S: Lanes>(self, s: S, i: usize) -> [S::V; 2] {
        [self.load(s, 2 * i), self.load(s, 2 * i + 1)]
    }
    /// The rest of the row padded with zeros, if there is one.
    fn tail(self) -> Option<Chunk>;
    /// Bytes of two chunks, about.
    const STEP: usize;
    /// Rows that one token multiplies side by side.
    const ROWS: usize;
    /// Where chunk `i` is stored.
    fn at(self, i: usize) -> *const u8;
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
    const STEP: usize = 2 * LANES * size_of::<T>();
    // Memory is fastest in one stream, and one chain of additions keeps up with it.
    const ROWS: usize = 1;
    #[inline(always)]
    fn at(self, i: usize) -> *const u8 {
        self.chunks.as_ptr().wrapping_add(i).cast()
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
            for i in 0..row.whole() / 2 {
                let [first, second] = row.load_two(s, i);
                s.store(first, &mut unpacked[2 * i]);
                s.store(second, &mut unpacked[2 * i + 1]);
            }
            if row.whole() % 2 == 1 {
                let last = row.whole() - 1;
                s.store(row.load(s, last), &mut unpacked[last]);
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
        if if T == 1 { W::ROWS == 4 } else { S::WIDE } {
            while r + 4 <= rows {
                self.tile::<S, W, 4, T>(s, [row(r), row(r + 1), row(r + 2), row(r + 3)], r, token, stream);
                r += 4;
            }
        }
        if if T == 1 { W::ROWS > 1 } else { S::WIDE || T == 2 } {
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
        let ahead = (W::bytes(self.product.cols) * R).min(AHEAD);
        let next = rows[0].at(0).wrapping_add(ahead);
        for i in 0..whole / 2 {
            let mut at = [[s.zero(); 2]; T];
            for t in 0..T {
                at[t] = [s.load(&x[t][2 * i]), s.load(&x[t][2 * i + 1])];
            }
            // Side by side or not, the rows that follow are asked for in the order of memory.
            if stream {
                for line in 0..(R * W::STEP).div_ceil(LINE) {
                    s.prefetch(next.wrapping_add(i * R * W::STEP + line * LINE));
                }
            }
            for j in 0..R {
                let w = rows[j].load_two(s, i);
                for t in 0..T {
                    sums[j][t] = s.fma(w[0], at[t][0], sums[j][t]);
                    sums[j][t] = s.fma(w[1], at[t][1], sums[j][t]);
                }
            }
        }
        if whole % 2 == 1 {
            for j in 0..R {
                let w = rows[j].load(s, whole - 1);
                for t in 0..T {
                    sums[j][t] = s.fma(w, s.load(&x[t][whole - 1]), sums[j][t]);
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
