//! Fewer scales than a ternary matrix has: the mean of each larger group, which changes weights and so must be allowed.

use setun_kernels::matrix::{Scales, TernaryMatrix};

/// The scales of `matrix` for groups of `group` weights of a row (`None`: for the whole matrix), the mean over the
/// weights other than 0 of each, and the largest relative change. `None` where a group never has two scales.
pub(super) fn merged(matrix: &TernaryMatrix, group: Option<usize>) -> Option<(Scales, f32)> {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let per_row = group.map_or(1, |group| cols.div_ceil(group));
    let place = |row: usize, col: usize| group.map_or(0, |group| row * per_row + col / group);
    let mut sums = vec![(0f64, 0u64); if group.is_some() { rows * per_row } else { 1 }];
    let mut several = false;
    let mut first = vec![None; sums.len()];
    each(matrix, |row, col, scale| {
        let at = place(row, col);
        sums[at].0 += f64::from(scale);
        sums[at].1 += 1;
        several |= *first[at].get_or_insert(scale) != scale;
    });
    if !several {
        return None;
    }
    let mean = |&(sum, count): &(f64, u64)| if count == 0 { 0.0 } else { (sum / count as f64) as f32 };
    let means: Vec<f32> = sums.iter().map(mean).collect();
    let mut change = 0.0f32;
    each(matrix, |row, col, scale| change = change.max((means[place(row, col)] - scale).abs() / scale));
    Some(match group {
        None => (Scales::Tensor(means[0]), change),
        Some(group) => (Scales::Block { rows: 1, cols: group, values: means }, change),
    })
}

/// Calls `with` for every weight other than 0 with its row, column and scale.
fn each(matrix: &TernaryMatrix, mut with: impl FnMut(usize, usize, f32)) {
    let cols = matrix.cols();
    for row in 0..matrix.rows() {
        let codes = matrix.row_codes(row);
        for col in (0..cols).filter(|col| codes[col / 4] >> (2 * (col % 4)) & 3 != 1) {
            with(
                row,
                col,
                match matrix.scales() {
                    Scales::Tensor(scale) => *scale,
                    Scales::Row(values) => values[row],
                    Scales::Block { rows, cols: width, values } => {
                        values[row / rows * cols.div_ceil(*width) + col / width]
                    }
                },
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_count_weights_other_than_zero_and_equal_scales_are_left_alone() {
        let trits = [1i8, 0, 0, 0, -1, 1, 1, 0];
        let scales = |values: Vec<f32>| Scales::Block { rows: 1, cols: 4, values };
        let matrix = TernaryMatrix::from_trits(1, 8, &trits, scales(vec![1.0, 3.0])).unwrap();
        assert_eq!(merged(&matrix, None), Some((Scales::Tensor(2.5), 1.5)));
        let wide = Scales::Block { rows: 1, cols: 8, values: vec![2.5] };
        assert_eq!(merged(&matrix, Some(8)), Some((wide, 1.5)));
        assert_eq!(merged(&matrix, Some(4)), None);
        let matrix = TernaryMatrix::from_trits(1, 8, &trits, scales(vec![3.0, 3.0])).unwrap();
        assert_eq!(merged(&matrix, None), None);
        // A group of zeros has no say.
        let matrix =
            TernaryMatrix::from_trits(1, 8, &[0, 0, 0, 0, 1, 1, 1, 1], scales(vec![9.0, 3.0])).unwrap();
        assert_eq!(merged(&matrix, None), None);
    }
}
