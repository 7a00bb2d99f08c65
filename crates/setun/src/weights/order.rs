//! Rows and columns of a matrix in another order, whatever the matrix is packed in.

use setun_kernels::dense::{DenseData, DenseMatrix};
use setun_kernels::matrix::{Scales, TernaryMatrix};

use super::Weight;
use crate::error::ModelError;

/// The source of every row or column.
pub(super) enum Moved {
    Rows(Vec<usize>),
    Columns(Vec<usize>),
}

/// The rows of `weight` in the order `from`, which names each once.
pub(super) fn pick_rows(weight: Weight, from: &[usize]) -> Weight {
    let pick = |width: usize| from.iter().flat_map(move |&row| row * width..(row + 1) * width);
    let (rows, cols) = (from.len(), weight.cols());
    match weight {
        Weight::Dense(matrix) => {
            let data = match matrix.data() {
                DenseData::F32(values) => DenseData::F32(pick(cols).map(|i| values[i]).collect()),
                DenseData::F16(values) => DenseData::F16(pick(cols).map(|i| values[i]).collect()),
                DenseData::BF16(values) => DenseData::BF16(pick(cols).map(|i| values[i]).collect()),
                DenseData::Q8_0(bytes) => {
                    let row_bytes = bytes.len() / rows.max(1);
                    DenseData::Q8_0(pick(row_bytes).map(|i| bytes[i]).collect())
                }
            };
            Weight::Dense(DenseMatrix::new(rows, cols, data).expect("rows are only reordered"))
        }
        Weight::Ternary(matrix) => {
            let codes = pick(matrix.row_bytes()).map(|i| matrix.codes()[i]).collect();
            let scales = match matrix.scales() {
                Scales::Tensor(scale) => Scales::Tensor(*scale),
                Scales::Row(values) => Scales::Row(pick(1).map(|r| values[r]).collect()),
                Scales::Block { rows: 1, cols: width, values } => {
                    let values = pick(cols.div_ceil(*width)).map(|i| values[i]).collect();
                    Scales::Block { rows: 1, cols: *width, values }
                }
                // Blocks of several rows could only be reordered whole; no reader makes them for these families.
                block @ Scales::Block { .. } => block.clone(),
            };
            let matrix = TernaryMatrix::new(rows, cols, codes, scales);
            Weight::Ternary(matrix.expect("rows are only reordered"))
        }
    }
}

/// The columns of `weight` in the order `from`, which names each once.
pub(super) fn pick_columns(weight: Weight, from: &[usize], stored: &str) -> Result<Weight, ModelError> {
    fn pick<T: Copy>(values: &[T], from: &[usize]) -> Vec<T> {
        values.chunks_exact(from.len()).flat_map(|row| from.iter().map(|&col| row[col])).collect()
    }
    let refuse = || {
        let what = "its columns would have to be put into another order of heads, which is done for floats alone: keep the \
                    container it is in";
        Err(ModelError::tensor(stored, what))
    };
    let Weight::Dense(matrix) = weight else { return refuse() };
    let data = match matrix.data() {
        DenseData::F32(values) => DenseData::F32(pick(values, from)),
        DenseData::F16(values) => DenseData::F16(pick(values, from)),
        DenseData::BF16(values) => DenseData::BF16(pick(values, from)),
        DenseData::Q8_0(_) => return refuse(),
    };
    Ok(Weight::Dense(
        DenseMatrix::new(matrix.rows(), matrix.cols(), data).expect("columns are only reordered"),
    ))
}
