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
                DenseData::Q4_0(bytes) => {
                    let row_bytes = bytes.len() / rows.max(1);
                    DenseData::Q4_0(pick(row_bytes).map(|i| bytes[i]).collect())
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
    let refuse = |why: &str| {
        let what = format!(
            "its columns would have to be put into another order of heads, which {why}: keep the container it is in"
        );
        Err(ModelError::tensor(stored, what))
    };
    let matrix = match weight {
        Weight::Dense(matrix) => matrix,
        Weight::Ternary(matrix) => match pick_ternary_columns(&matrix, from) {
            Some(matrix) => return Ok(Weight::Ternary(matrix)),
            None => return refuse("tears the groups apart that share a scale"),
        },
    };
    let data = match matrix.data() {
        DenseData::F32(values) => DenseData::F32(pick(values, from)),
        DenseData::F16(values) => DenseData::F16(pick(values, from)),
        DenseData::BF16(values) => DenseData::BF16(pick(values, from)),
        DenseData::Q8_0(_) => return refuse("tears blocks of Q8_0 apart"),
        DenseData::Q4_0(_) => return refuse("tears blocks of Q4_0 apart"),
    };
    Ok(Weight::Dense(
        DenseMatrix::new(matrix.rows(), matrix.cols(), data).expect("columns are only reordered"),
    ))
}

/// As [`pick_columns`]; groups become as small as the runs of columns that stay together, 16 at the least.
fn pick_ternary_columns(matrix: &TernaryMatrix, from: &[usize]) -> Option<TernaryMatrix> {
    let (rows, cols) = (matrix.rows(), from.len());
    let scales = match matrix.scales() {
        whole @ (Scales::Tensor(_) | Scales::Row(_)) => whole.clone(),
        Scales::Block { rows: 1, cols: group, values } => {
            // Whole and inside one group where they come from.
            let together = |run: &[usize], width: usize| {
                run[0].is_multiple_of(width)
                    && run.iter().zip(run[0]..).all(|(&col, expected)| col == expected)
            };
            let halves = std::iter::successors(Some(*group), |width| (width % 2 == 0).then_some(width / 2));
            let mut widths = halves.take_while(|&width| width >= 16);
            let width = widths.find(|&width| {
                cols.is_multiple_of(width) && from.chunks(width).all(|run| together(run, width))
            })?;
            let per_row = cols.div_ceil(*group);
            let of = |r: usize| from.iter().step_by(width).map(move |col| values[r * per_row + col / group]);
            Scales::Block { rows: 1, cols: width, values: (0..rows).flat_map(of).collect() }
        }
        Scales::Block { .. } => return None,
    };
    let trits: Vec<i8> = (0..rows).flat_map(|r| from.iter().map(move |&col| matrix.trit(r, col))).collect();
    TernaryMatrix::from_trits(rows, cols, &trits, scales).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ternary_columns_move_with_their_scales_and_groups_shrink_to_what_stays_together() {
        let trits: Vec<i8> = (0..2 * 128).map(|i| (i % 3) as i8 - 1).collect();
        let scales = Scales::Block { rows: 1, cols: 64, values: vec![1.0, 2.0, 3.0, 4.0] };
        let matrix = TernaryMatrix::from_trits(2, 128, &trits, scales).unwrap();
        let value = |m: &TernaryMatrix, r, c| {
            let mut row = vec![0.0; 128];
            m.dequantize_row(r, &mut row);
            row[c]
        };
        let from: Vec<usize> = [2, 0, 3, 1].iter().flat_map(|run| run * 32..(run + 1) * 32).collect();
        let Weight::Ternary(moved) = pick_columns(Weight::Ternary(matrix.clone()), &from, "w").unwrap()
        else {
            panic!("it stays ternary")
        };
        assert!(matches!(moved.scales(), Scales::Block { rows: 1, cols: 32, .. }));
        for (r, c) in [(0, 0), (0, 40), (1, 70), (1, 127)] {
            assert_eq!(value(&moved, r, c), value(&matrix, r, from[c]));
        }
        let torn: Vec<usize> = (0..128).rev().collect();
        let error = pick_columns(Weight::Ternary(matrix), &torn, "w").unwrap_err().to_string();
        assert!(error.contains("share a scale"), "{error}");
    }
}
