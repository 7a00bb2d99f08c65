//! Some rows of a dense matrix: the logits of a shortlist, and rows on their way to another form.

use super::blocks::{Blocks, Q4_0, Q8_0};
use super::{DenseData, DenseMatrix, Numbers, Row};
use crate::Kernels;
use crate::lanes::{Chunk, Job, LANES, Lanes, chunk_at};
use crate::scratch::{Parts, with_scratch};
use crate::threads::Pool;
use half::{bf16, f16};

/// Rows that are multiplied together.
const TILE: usize = 4;

/// `$do!(W, data)` with the row type of what the matrix holds.
macro_rules! by_type {
    ($matrix:expr, $do:ident) => {
        match &$matrix.data {
            DenseData::F32(d) => $do!(Numbers<f32>, d),
            DenseData::F16(d) => $do!(Numbers<f16>, d),
            DenseData::BF16(d) => $do!(Numbers<bf16>, d),
            DenseData::Q8_0(d) => $do!(Blocks<Q8_0>, d),
            DenseData::Q4_0(d) => $do!(Blocks<Q4_0>, d),
        }
    };
}

impl DenseMatrix {
    /// `out[i]` = row `rows[i]` times `x`, with the bits that [`DenseMatrix::matmul`] gives them. `x` is `[cols]`, `out` as long
    /// as `rows`; panics otherwise, and for a row that is not there.
    pub fn dots(&self, kernels: &Kernels, x: &[f32], rows: &[u32], out: &mut [f32], pool: &Pool) {
        assert!(x.len() == self.cols && out.len() == rows.len(), "dots: x is not one row, or out not rows");
        let step = rows.len().div_ceil(4 * pool.threads()).clamp(TILE, 8 * TILE);
        with_scratch(self.cols.div_ceil(LANES), |packed| {
            packed.iter_mut().enumerate().for_each(|(i, chunk)| *chunk = chunk_at(x, i));
            let (x, parts) = (&*packed, Parts::new(out));
            pool.run(rows.len().div_ceil(step), &|task| {
                let (from, to) = (task * step, rows.len().min((task + 1) * step));
                // SAFETY: tasks own disjoint parts.
                let out = unsafe { parts.get(from, to - from) };
                macro_rules! run {
                    ($row:ty, $data:expr) => {
                        kernels.lanes(Picked::<$row> {
                            data: $data,
                            cols: self.cols,
                            rows: &rows[from..to],
                            x,
                            out,
                        })
                    };
                }
                by_type!(self, run);
            });
        });
    }

    /// Row `r` in f32, exactly, padded with zeros to whole chunks: `cols / 16`, rounded up.
    pub(crate) fn row_chunks(&self, kernels: &Kernels, r: usize, out: &mut [Chunk]) {
        assert!(r < self.rows && out.len() == self.cols.div_ceil(LANES), "row_chunks: no such row");
        macro_rules! run {
            ($row:ty, $data:expr) => {
                kernels.lanes(Unpacked { row: <$row>::row($data, self.cols, r), out })
            };
        }
        by_type!(self, run);
    }
}

/// One row converted.
struct Unpacked<'a, W> {
    row: W,
    out: &'a mut [Chunk],
}

impl<'d, W: Row<'d>> Job for Unpacked<'_, W> {
    type Out = ();
    #[inline(always)]
    fn run<S: Lanes>(self, s: S) {
        let Self { row, out } = self;
        for i in 0..row.whole() {
            s.store(row.load(s, i), &mut out[i]);
        }
        if let (Some(tail), Some(last)) = (row.tail(), out.last_mut()) {
            *last = tail;
        }
    }
}

/// One task: some rows from anywhere in the matrix.
struct Picked<'a, 'd, W: Row<'d>> {
    data: &'d W::Data,
    cols: usize,
    rows: &'a [u32],
    /// Padded to whole chunks.
    x: &'a [Chunk],
    out: &'a mut [f32],
}

impl<'d, W: Row<'d>> Job for Picked<'_, 'd, W> {
    type Out = ();
    #[inline(always)]
    fn run<S: Lanes>(self, s: S) {
        let Self { data, cols, rows, x, out } = self;
        let row = |i: usize| W::row(data, cols, rows[i.min(rows.len() - 1)] as usize);
        for (tile, out) in out.chunks_mut(TILE).enumerate() {
            // A short last tile repeats its last row. Rows lie anywhere, so the next ones are asked for by address.
            let now: [W; TILE] = std::array::from_fn(|j| row(tile * TILE + j));
            let next: [W; TILE] = std::array::from_fn(|j| row((tile + 1) * TILE + j));
            let mut sums = [s.zero(); TILE];
            for (i, x) in x.iter().enumerate().take(now[0].whole()) {
                let x = s.load(x);
                for j in 0..TILE {
                    s.prefetch(next[j].at(i));
                    sums[j] = s.fma(now[j].load(s, i), x, sums[j]);
                }
            }
            for j in 0..TILE {
                if let Some(tail) = now[j].tail() {
                    sums[j] = s.fma(s.load(&tail), s.load(&x[now[j].whole()]), sums[j]);
                }
            }
            out.iter_mut().zip(sums).for_each(|(out, sum)| *out = s.fold(sum));
        }
    }
}
