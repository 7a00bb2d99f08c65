//! Ternary weights times floats: models whose activations are not rounded (W1.58A16).
//!
//! Codes are unpacked in registers as they are multiplied, so a matrix takes its two bits per weight in memory too. A weight is
//! `trit · scale`, exact in f32: results have the bits of the same matrix expanded to a [`DenseMatrix`](super::DenseMatrix).

use super::{Product, Row};
use crate::Kernels;
use crate::lanes::{Chunk, LANES, Lanes};
use crate::matrix::{Scales, TernaryMatrix};
use crate::pack::TRITS_PER_BYTE;
use crate::threads::Pool;

/// Bytes that hold the codes of a chunk.
const CHUNK_BYTES: usize = LANES / TRITS_PER_BYTE;

impl TernaryMatrix {
    /// Bytes of codes and scales: what one token reads.
    pub fn bytes(&self) -> usize {
        let scales = match self.scales() {
            Scales::Tensor(_) => 1,
            Scales::Row(values) | Scales::Block { values, .. } => values.len(),
        };
        self.codes().len() + scales * size_of::<f32>()
    }

    /// `out = x Wᵀ` with float `x` `[tokens, cols]`; `out` is `[tokens, rows]`. Panics on other lengths.
    ///
    /// Each output has the bits of [`Kernels::dot`] on the row in f32, whatever `tokens` and `pool` are.
    pub fn matmul_float(&self, kernels: &Kernels, x: &[f32], tokens: usize, out: &mut [f32], pool: &Pool) {
        Product::with([self.rows(), self.cols()], x, tokens, out, |product| {
            product.run::<Trits>(kernels, self, pool);
        });
    }
}

/// A row of two-bit codes with its scales.
#[derive(Clone, Copy)]
struct Trits<'a> {
    chunks: &'a [[u8; CHUNK_BYTES]],
    tail: &'a [u8],
    /// Columns in `tail`.
    tail_cols: usize,
    scales: &'a [f32],
    /// Columns that share a scale.
    group: usize,
    /// Chunk `i` has scale `i >> shift`, where groups are whole chunks and a power of two of them.
    shift: Option<u32>,
}

impl Trits<'_> {
    fn scale_of(&self, col: usize) -> f32 {
        self.scales[col / self.group]
    }
}

impl<'a> Row<'a> for Trits<'a> {
    type Data = TernaryMatrix;
    #[inline(always)]
    fn bytes(cols: usize) -> usize {
        cols.div_ceil(TRITS_PER_BYTE)
    }
    #[inline(always)]
    fn row(matrix: &'a TernaryMatrix, cols: usize, r: usize) -> Self {
        let (whole, rest) = matrix.row_codes(r).split_at(cols / LANES * CHUNK_BYTES);
        let (scales, group) = match matrix.scales() {
            Scales::Tensor(scale) => (std::slice::from_ref(scale), cols),
            Scales::Row(values) => (&values[r..=r], cols),
            Scales::Block { rows, cols: group, values } => {
                let per_row = cols.div_ceil(*group);
                (&values[r / rows * per_row..][..per_row], *group)
            }
        };
        let chunks = group / LANES;
        let shift = match scales.len() {
            0 | 1 => Some(usize::BITS - 1),
            _ => (group.is_multiple_of(LANES) && chunks.is_power_of_two()).then(|| chunks.trailing_zeros()),
        };
        let chunks = whole.as_chunks().0;
        Self { chunks, tail: rest, tail_cols: cols % LANES, scales, group: group.max(1), shift }
    }
    #[inline(always)]
    fn whole(self) -> usize {
        self.chunks.len()
    }
    #[inline(always)]
    fn load<S: Lanes>(self, s: S, i: usize) -> S::V {
        let trits = s.load_trits(u32::from_le_bytes(self.chunks[i]));
        if let Some(shift) = self.shift {
            return s.mul(trits, s.splat(self.scales[i >> shift]));
        }
        let mut scales = [0.0; LANES];
        scales.iter_mut().enumerate().for_each(|(j, scale)| *scale = self.scale_of(i * LANES + j));
        s.mul(trits, s.load(&scales))
    }
    #[inline(always)]
    fn tail(self) -> Option<Chunk> {
        (self.tail_cols > 0).then(|| {
            let mut padded = [0.0; LANES];
            for (j, w) in padded[..self.tail_cols].iter_mut().enumerate() {
                let code = self.tail[j / TRITS_PER_BYTE] >> (2 * (j % TRITS_PER_BYTE)) & 3;
                *w = f32::from(code as i8 - 1) * self.scale_of(self.chunks.len() * LANES + j);
            }
            padded
        })
    }
    const STEP: usize = 2 * CHUNK_BYTES;
    const ROWS: usize = 4;
    #[inline(always)]
    fn at(self, i: usize) -> *const u8 {
        self.chunks.as_ptr().wrapping_add(i).cast()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dense::{DenseData, DenseMatrix};

    fn random(seed: u32) -> impl FnMut() -> u32 {
        let mut state = seed;
        move || {
            state = state.wrapping_mul(1664525).wrapping_add(1013904223);
            state >> 8
        }
    }

    /// A matrix of each kind of scales.
    fn matrices(rows: usize, cols: usize) -> Vec<TernaryMatrix> {
        let mut next = random(5);
        let trits: Vec<i8> = (0..rows * cols).map(|_| (next() % 3) as i8 - 1).collect();
        let mut values = |n: usize| (0..n).map(|_| next() as f32 / 1e7 - 0.5).collect::<Vec<f32>>();
        let mut all = vec![Scales::Tensor(0.3), Scales::Row(values(rows))];
        for (r, c) in [(1, 16), (1, 32), (1, 128), (1, 48), (1, 7), (2, 20), (3, 1000)] {
            all.push(Scales::Block { rows: r, cols: c, values: values(rows.div_ceil(r) * cols.div_ceil(c)) });
        }
        all.into_iter().map(|s| TernaryMatrix::from_trits(rows, cols, &trits, s).unwrap()).collect()
    }

    #[test]
    fn products_with_floats_have_the_bits_of_the_expanded_matrix() {
        for (rows, cols) in [(0, 5), (2, 0), (1, 1), (5, 16), (7, 33), (9, 130), (70, 384)] {
            for matrix in matrices(rows, cols) {
                let mut values = vec![0.0; rows * cols];
                for (r, row) in values.chunks_mut(cols.max(1)).enumerate() {
                    matrix.dequantize_row(r, row);
                }
                let dense = DenseMatrix::new(rows, cols, DenseData::F32(values)).unwrap();
                for tokens in [0, 1, 3, 5, 6, 13] {
                    let mut next = random(9);
                    let x: Vec<f32> = (0..tokens * cols).map(|_| next() as f32 / 8e6 - 1.0).collect();
                    for k in Kernels::available() {
                        for pool in [1, 3].map(Pool::new) {
                            let mut found = vec![f32::NAN; tokens * rows];
                            let mut expected = found.clone();
                            matrix.matmul_float(k, &x, tokens, &mut found, &pool);
                            dense.matmul(k, &x, tokens, &mut expected, &pool);
                            let same = found.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits());
                            assert!(
                                same,
                                "{}, {rows} x {cols}, {tokens} tokens, {:.50}",
                                k.name(),
                                format!("{:?}", matrix.scales())
                            );
                        }
                    }
                }
            }
        }
    }
}
