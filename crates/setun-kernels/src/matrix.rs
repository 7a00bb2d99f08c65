//! The canonical ternary matrix: what every file format is read into and every kernel packs from.
//!
//! Codes are `w + 1` (0, 1, 2), two bits each, row-major, lowest bits first; every row starts on a
//! byte, and the codes after its last column are 1 (a zero weight). Two equal matrices therefore have
//! equal bytes.

use alloc::vec::Vec;
use core::fmt;

use crate::pack::{TRITS_PER_BYTE, ZERO_BYTE};

/// What a code is multiplied with to give a weight.
#[derive(Debug, Clone, PartialEq)]
pub enum Scales {
    /// One for the whole matrix (BitNet).
    Tensor(f32),
    /// One per row.
    Row(Vec<f32>),
    /// One per block of `rows` × `cols` weights. Groups of 128 columns are `rows: 1, cols: 128`.
    Block {
        /// Rows in a block.
        rows: usize,
        /// Columns in a block.
        cols: usize,
        /// Row-major `[matrix rows / rows, matrix cols / cols]`, both rounded up.
        values: Vec<f32>,
    },
}

impl Scales {
    /// The scale of the weight at (`row`, `col`) of a matrix with `matrix_cols` columns.
    #[inline]
    pub(crate) fn at(&self, row: usize, col: usize, matrix_cols: usize) -> f32 {
        match self {
            Self::Tensor(scale) => *scale,
            Self::Row(values) => values[row],
            Self::Block { rows, cols, values } => {
                values[row / rows * matrix_cols.div_ceil(*cols) + col / cols]
            }
        }
    }
}

/// Why codes and scales are not a ternary matrix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MatrixError {
    /// Not as many bytes (or trits) as the shape needs.
    Length {
        /// `codes` or `trits`.
        what: &'static str,
        /// Rows of the matrix.
        rows: usize,
        /// Columns of the matrix.
        cols: usize,
        /// Elements that shape needs.
        expected: usize,
        /// Elements given.
        found: usize,
    },
    /// Not as many scales as the shape needs.
    ScaleCount {
        /// Scales needed.
        expected: usize,
        /// Scales given.
        found: usize,
    },
    /// A scale block with no rows or no columns.
    EmptyBlock,
    /// More columns than a 32-bit sum of int8 activations can hold, or a shape whose size overflows.
    TooLarge {
        /// Rows of the matrix.
        rows: usize,
        /// Columns of the matrix.
        cols: usize,
    },
    /// Codes that are no trit.
    FourthCode {
        /// How many there are.
        count: usize,
        /// Row of the first.
        row: usize,
        /// Column of the first.
        col: usize,
    },
    /// A value other than -1, 0 or +1.
    NotATrit {
        /// Its row.
        row: usize,
        /// Its column.
        col: usize,
        /// What stands there.
        value: i8,
    },
}

impl fmt::Display for MatrixError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Length { what, rows, cols, expected, found } => {
                write!(
                    f,
                    "a ternary matrix of {rows} x {cols} needs {expected} {what}, but there are {found}"
                )
            }
            Self::ScaleCount { expected, found } => {
                write!(f, "the matrix needs {expected} scales, but there are {found}")
            }
            Self::EmptyBlock => write!(f, "a scale block needs at least one row and one column"),
            Self::TooLarge { rows, cols } => write!(
                f,
                "a ternary matrix of {rows} x {cols} is too large: at most {MAX_COLS} columns, and its bytes must be addressable"
            ),
            Self::FourthCode { count, row, col } => write!(
                f,
                "{count} weights have the two-bit code 3, which is not ternary (the first at row {row}, column {col})"
            ),
            Self::NotATrit { row, col, value } => {
                write!(
                    f,
                    "the weight at row {row}, column {col} is {value}, but a ternary weight is -1, 0 or 1"
                )
            }
        }
    }
}

impl core::error::Error for MatrixError {}

/// The most columns: `MAX_COLS · 128` still fits an `i32`, so no sum of products can overflow.
pub const MAX_COLS: usize = (1 << 24) - 1;

/// A matrix of weights -1, 0, +1 with scales: `W[r, c] = trit(r, c) · scale(r, c)`.
#[derive(Debug, Clone, PartialEq)]
pub struct TernaryMatrix {
    rows: usize,
    cols: usize,
    codes: Vec<u8>,
    scales: Scales,
}

/// Bytes of a row, after checking that the whole matrix can exist.
fn checked_row_bytes(rows: usize, cols: usize) -> Result<usize, MatrixError> {
    let row_bytes = cols.div_ceil(TRITS_PER_BYTE);
    let fits = cols <= MAX_COLS && rows.checked_mul(cols).is_some_and(|n| n <= isize::MAX as usize);
    if fits { Ok(row_bytes) } else { Err(MatrixError::TooLarge { rows, cols }) }
}

fn check_scales(scales: &Scales, rows: usize, cols: usize) -> Result<(), MatrixError> {
    let (expected, found) = match scales {
        Scales::Tensor(_) => return Ok(()),
        Scales::Row(values) => (rows, values.len()),
        Scales::Block { rows: 0, .. } | Scales::Block { cols: 0, .. } => {
            return Err(MatrixError::EmptyBlock);
        }
        Scales::Block { rows: r, cols: c, values } => (rows.div_ceil(*r) * cols.div_ceil(*c), values.len()),
    };
    if expected == found { Ok(()) } else { Err(MatrixError::ScaleCount { expected, found }) }
}

/// Codes 3 among the four of a byte, one bit for each (bit 0, 2, 4, 6).
fn fourth_codes(byte: u8) -> u8 {
    byte & (byte >> 1) & 0b01_01_01_01
}

impl TernaryMatrix {
    /// Takes row-major two-bit codes, rows padded to bytes, and scales.
    ///
    /// The codes after a row's last column may be anything; they are set to 1.
    ///
    /// # Errors
    /// A shape that is too large, wrong lengths, an empty scale block, or codes 3 (with their count).
    pub fn new(rows: usize, cols: usize, mut codes: Vec<u8>, scales: Scales) -> Result<Self, MatrixError> {
        let row_bytes = checked_row_bytes(rows, cols)?;
        let (expected, found) = (rows * row_bytes, codes.len());
        if expected != found {
            return Err(MatrixError::Length { what: "bytes of codes", rows, cols, expected, found });
        }
        check_scales(&scales, rows, cols)?;
        let tail = cols % TRITS_PER_BYTE;
        if tail != 0 {
            let keep = (1u8 << (2 * tail)) - 1;
            for row in codes.chunks_exact_mut(row_bytes) {
                let last = row.last_mut().expect("cols > 0, so a row has bytes");
                *last = *last & keep | ZERO_BYTE & !keep;
            }
        }
        // Counted only where there are some: looking is several times faster than counting.
        if codes.iter().fold(0, |found, &b| found | fourth_codes(b)) != 0 {
            let count = codes.iter().map(|&b| fourth_codes(b).count_ones() as usize).sum();
            let byte = codes.iter().position(|&b| fourth_codes(b) != 0).expect("there are some");
            let col =
                byte % row_bytes * TRITS_PER_BYTE + fourth_codes(codes[byte]).trailing_zeros() as usize / 2;
            return Err(MatrixError::FourthCode { count, row: byte / row_bytes, col });
        }
        Ok(Self { rows, cols, codes, scales })
    }

    /// Packs row-major trits.
    ///
    /// # Errors
    /// As [`TernaryMatrix::new`], and the first value that is not -1, 0 or +1.
    pub fn from_trits(rows: usize, cols: usize, trits: &[i8], scales: Scales) -> Result<Self, MatrixError> {
        let row_bytes = checked_row_bytes(rows, cols)?;
        let (expected, found) = (rows * cols, trits.len());
        if expected != found {
            return Err(MatrixError::Length { what: "trits", rows, cols, expected, found });
        }
        let mut codes = alloc::vec![0u8; rows * row_bytes];
        if cols > 0 {
            let rows_of = trits.chunks_exact(cols).zip(codes.chunks_exact_mut(row_bytes));
            for (row, (trits, codes)) in rows_of.enumerate() {
                crate::pack::pack_2bit(trits, codes).map_err(|_| {
                    let col = trits.iter().position(|t| !(-1..=1).contains(t));
                    let col = col.expect("lengths agree, so a value is wrong");
                    MatrixError::NotATrit { row, col, value: trits[col] }
                })?;
            }
        }
        Self::new(rows, cols, codes, scales)
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes of a row of codes: `cols / 4`, rounded up.
    pub fn row_bytes(&self) -> usize {
        self.cols.div_ceil(TRITS_PER_BYTE)
    }

    /// All codes, `rows · row_bytes` bytes.
    pub fn codes(&self) -> &[u8] {
        &self.codes
    }

    /// The codes of row `r`. Panics when there is no such row.
    pub fn row_codes(&self, r: usize) -> &[u8] {
        assert!(r < self.rows, "row {r} of {}", self.rows);
        &self.codes[r * self.row_bytes()..][..self.row_bytes()]
    }

    /// The scales.
    pub fn scales(&self) -> &Scales {
        &self.scales
    }

    /// Codes and scales for a quantiser of this crate, which writes canonical ones.
    pub(crate) fn parts_mut(&mut self) -> (&mut [u8], &mut Scales) {
        (&mut self.codes, &mut self.scales)
    }

    /// The weight at row `r`, column `c`, without its scale. Panics outside the matrix.
    pub fn trit(&self, r: usize, c: usize) -> i8 {
        assert!(c < self.cols, "column {c} of {}", self.cols);
        let byte = self.row_codes(r)[c / TRITS_PER_BYTE];
        ((byte >> (2 * (c % TRITS_PER_BYTE))) & 3) as i8 - 1
    }

    /// Writes row `r` without scales to `out`, `cols` long. Panics when the row or length is wrong.
    pub fn row_trits(&self, r: usize, out: &mut [i8]) {
        assert_eq!(out.len(), self.cols, "length of the output row");
        for (&byte, group) in self.row_codes(r).iter().zip(out.chunks_mut(TRITS_PER_BYTE)) {
            for (i, t) in group.iter_mut().enumerate() {
                *t = ((byte >> (2 * i)) & 3) as i8 - 1;
            }
        }
    }

    /// Writes row `r` with scales to `out`, `cols` long. Panics when the row or length is wrong.
    pub fn dequantize_row(&self, r: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.cols, "length of the output row");
        let codes = self.row_codes(r);
        let block = match &self.scales {
            Scales::Block { cols, .. } => *cols,
            _ => self.cols.max(1),
        };
        for (b, part) in out.chunks_mut(block).enumerate() {
            let first = b * block;
            let scale = self.scales.at(r, first, self.cols);
            for (i, w) in part.iter_mut().enumerate() {
                let c = first + i;
                let code = (codes[c / TRITS_PER_BYTE] >> (2 * (c % TRITS_PER_BYTE))) & 3;
                *w = f32::from(code as i8 - 1) * scale;
            }
        }
    }

    /// The share of weights that are 0, or 0 for a matrix without weights.
    pub fn zero_fraction(&self) -> f64 {
        let weights = self.rows * self.cols;
        if weights == 0 {
            return 0.0;
        }
        let ones: usize = self.codes.iter().map(|&b| (b & 0b01_01_01_01).count_ones() as usize).sum();
        let padding = self.codes.len() * TRITS_PER_BYTE - weights;
        (ones - padding) as f64 / weights as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::{string::ToString, vec};

    #[test]
    fn trits_come_back_from_every_accessor() {
        let trits = [1, 0, -1, -1, 1, 0, 0, 0, 1, 1, -1, 0, 1, 1];
        let m = TernaryMatrix::from_trits(2, 7, &trits, Scales::Row(vec![2.0, 0.5])).unwrap();
        assert_eq!(m.row_bytes(), 2);
        let mut row = [9i8; 7];
        let mut weights = [9f32; 7];
        for (r, scale) in [(0, 2.0), (1, 0.5)] {
            m.row_trits(r, &mut row);
            m.dequantize_row(r, &mut weights);
            for c in 0..7 {
                assert_eq!(row[c], trits[r * 7 + c]);
                assert_eq!(m.trit(r, c), row[c]);
                assert_eq!(weights[c], f32::from(row[c]) * scale);
            }
        }
        assert_eq!(m.zero_fraction(), 5.0 / 14.0);
    }

    #[test]
    fn padding_codes_are_canonical_and_never_counted_as_fourth_codes() {
        let a = TernaryMatrix::new(2, 3, vec![0b11_10_01_00; 2], Scales::Tensor(1.0)).unwrap();
        let b = TernaryMatrix::new(2, 3, vec![0b00_10_01_00; 2], Scales::Tensor(1.0)).unwrap();
        assert_eq!(a, b);
        assert_eq!(a.codes(), [0b01_10_01_00; 2]);
    }

    #[test]
    fn fourth_codes_are_refused_with_count_and_place() {
        let codes = vec![0, 0, 0b11_00_11_00, 0b11];
        let error = TernaryMatrix::new(2, 8, codes, Scales::Tensor(1.0)).unwrap_err();
        assert_eq!(error, MatrixError::FourthCode { count: 3, row: 1, col: 1 });
        assert!(error.to_string().starts_with("3 weights"));
    }

    #[test]
    fn wrong_lengths_and_absurd_shapes_are_errors() {
        let block = |rows, cols, n| Scales::Block { rows, cols, values: vec![1.0; n] };
        assert!(TernaryMatrix::new(2, 5, vec![0; 3], Scales::Tensor(1.0)).is_err());
        assert!(TernaryMatrix::new(2, 5, vec![0; 4], Scales::Row(vec![1.0])).is_err());
        assert!(TernaryMatrix::new(2, 5, vec![0; 4], block(0, 2, 0)).is_err());
        assert!(TernaryMatrix::new(2, 5, vec![0; 4], block(1, 2, 5)).is_err());
        assert!(TernaryMatrix::new(2, 5, vec![0; 4], block(1, 2, 6)).is_ok());
        assert!(TernaryMatrix::new(3, 5, vec![0; 6], block(2, 4, 4)).is_ok());
        assert!(TernaryMatrix::new(usize::MAX, 5, vec![], Scales::Tensor(1.0)).is_err());
        assert!(TernaryMatrix::new(0, 1 << 24, vec![], Scales::Tensor(1.0)).is_err());
        let error = TernaryMatrix::from_trits(1, 2, &[0, 3], Scales::Tensor(1.0)).unwrap_err();
        assert_eq!(error, MatrixError::NotATrit { row: 0, col: 1, value: 3 });
        for (rows, cols) in [(0, 0), (0, 7), (7, 0)] {
            let m = TernaryMatrix::from_trits(rows, cols, &[], Scales::Tensor(1.0)).unwrap();
            assert_eq!(m.zero_fraction(), 0.0);
        }
    }

    #[test]
    fn block_scales_apply_to_their_rows_and_columns() {
        let values = vec![1.0, 2.0, 3.0, 4.0];
        let scales = Scales::Block { rows: 2, cols: 3, values };
        let m = TernaryMatrix::from_trits(3, 5, &[1; 15], scales).unwrap();
        let mut row = [0.0; 5];
        m.dequantize_row(1, &mut row);
        assert_eq!(row, [1.0, 1.0, 1.0, 2.0, 2.0]);
        m.dequantize_row(2, &mut row);
        assert_eq!(row, [3.0, 3.0, 3.0, 4.0, 4.0]);
    }
}
