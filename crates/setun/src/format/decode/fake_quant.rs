//! Ternary matrices kept as floats: every weight is 0 or ± the scale of its tensor, shard, row or group.

use setun_kernels::matrix::{Scales, TernaryMatrix};

use crate::error::ModelError;
use crate::format::tensor::{Tensor, TensorSpec};

/// Most shards of a matrix that are looked for: models trained in parallel have a scale for each part.
const MAX_SHARDS: usize = 8;
/// Groups of columns that are looked for, in this order.
const GROUPS: [usize; 5] = [512, 256, 128, 64, 32];

/// Columns of the smallest group that may have a scale of its own.
const FINEST: usize = 32;
/// Rows that a sample looks at.
const SAMPLED: usize = 8;
/// Rows decoded at a time.
const ROWS: usize = 64;

/// What a few rows of a float matrix say about whether it can be ternary.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Sample {
    /// Nothing: they are 0.
    Zeros,
    /// It can: no group has two magnitudes.
    Ternary,
    /// It cannot, for this one.
    Floats(Misfit),
}

/// Two magnitudes where there should be one, or a value that is no number.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Misfit {
    beside: f32,
    value: f32,
    row: usize,
    col: usize,
}

impl std::fmt::Display for Misfit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { beside, value, row, col } = self;
        match value.is_finite() {
            true => write!(f, "beside ±{beside} there is {value} at row {row}, column {col}"),
            false => write!(f, "{value} at row {row}, column {col} is no finite number"),
        }
    }
}

impl Tensor<'_> {
    /// The matrix of a float tensor whose values are all 0 or ± one scale per tensor, per shard of rows or columns (2 to
    /// 8 equal parts), per row, or per group of 512 to 32 columns: the coarsest of these that is exact.
    ///
    /// Scales are recovered exactly; a part without weights other than 0 has the scale 0, a tensor without any 1. Values are
    /// decoded some rows at a time, so memory holds little beside the result.
    ///
    /// # Errors
    /// [`ModelError::Tensor`] if it is no float matrix, has a value that is no finite number, or two different magnitudes in
    /// one group of 32 columns (with their place): then these are masters or plain floats.
    pub fn recognise_ternary(&self) -> Result<TernaryMatrix, ModelError> {
        let (rows, cols) = self.float_matrix()?;
        let mut parts = vec![(rows, cols)];
        parts.extend((2..=MAX_SHARDS).filter(|k| rows.is_multiple_of(*k)).map(|k| (rows / k, cols)));
        parts.extend((2..=MAX_SHARDS).filter(|k| cols.is_multiple_of(*k)).map(|k| (rows, cols / k)));
        parts.push((1, cols));
        parts.extend(GROUPS.into_iter().filter(|group| *group < cols).map(|group| (1, group)));
        let mut misfit = None;
        for (part_rows, part_cols) in parts {
            match self.magnitudes(rows, cols, part_rows, part_cols)? {
                Ok(scales) => {
                    let scales = match (part_rows, part_cols) {
                        (r, c) if (r, c) == (rows, cols) => {
                            Scales::Tensor(if scales[0] == 0.0 { 1.0 } else { scales[0] })
                        }
                        (1, c) if c == cols => Scales::Row(scales),
                        (rows, cols) => Scales::Block { rows, cols, values: scales },
                    };
                    return TernaryMatrix::new(rows, cols, self.signs(rows, cols)?, scales)
                        .map_err(|e| self.error(e.to_string()));
                }
                Err(found) if !found.value.is_finite() => return Err(self.error(found.to_string())),
                Err(found) => misfit = Some(found),
            }
        }
        let misfit = misfit.expect("the whole tensor was tried");
        Err(self.error(format!(
            "is not ternary: {misfit}, and no scale per tensor, shard, row or group of {FINEST} columns or more explains both"
        )))
    }

    /// Whether a few rows, spread over the matrix, allow that [`recognise_ternary`](Self::recognise_ternary) succeeds. Floats as
    /// training leaves them fail at the first weights.
    ///
    /// # Errors
    /// [`ModelError::Tensor`] if it is no float matrix.
    pub(crate) fn sample_ternary(&self) -> Result<Sample, ModelError> {
        let (rows, cols) = self.float_matrix()?;
        let shard = |k: usize| cols.is_multiple_of(k).then(|| cols / k);
        let shards: Vec<usize> = (2..=MAX_SHARDS).filter_map(shard).collect();
        let mut zeros = true;
        for row in (0..rows).step_by(rows.div_ceil(SAMPLED)) {
            let mut beside = 0.0;
            for (col, value) in self.rows_f32(row, 1, rows, cols)?.into_iter().enumerate() {
                if col.is_multiple_of(FINEST) || shards.iter().any(|shard| col.is_multiple_of(*shard)) {
                    beside = 0.0;
                }
                if !value.is_finite() || value != 0.0 && beside != 0.0 && value.abs() != beside {
                    return Ok(Sample::Floats(Misfit { beside, value, row, col }));
                }
                if value != 0.0 {
                    (beside, zeros) = (value.abs(), false);
                }
            }
        }
        Ok(if zeros { Sample::Zeros } else { Sample::Ternary })
    }

    fn float_matrix(&self) -> Result<(usize, usize), ModelError> {
        self.check_len()?;
        let (rows, cols) = self.matrix_shape()?;
        match self.info.encoding.is_float() {
            _ if rows == 0 || cols == 0 => {
                Err(self.error(format!("has shape {:?}, so there are no weights", self.shape())))
            }
            false => Err(self.error(format!("is {}, but floats are expected", self.info.encoding))),
            true => Ok((rows, cols)),
        }
    }

    /// `count` rows from `first` on of a matrix that [`float_matrix`](Self::float_matrix) let through, whose rows are whole blocks.
    fn rows_f32(&self, first: usize, count: usize, rows: usize, cols: usize) -> Result<Vec<f32>, ModelError> {
        let row_bytes = self.data.len() / rows;
        let encoding = self.info.encoding.clone();
        let spec = TensorSpec { name: self.name().to_owned(), shape: vec![count, cols], encoding };
        Tensor::new(spec, &self.data[first * row_bytes..(first + count) * row_bytes]).to_f32()
    }

    /// The magnitude in each part of `part_rows` × `part_cols`, 0 where all is 0; or, of the first part with two, where.
    fn magnitudes(
        &self,
        rows: usize,
        cols: usize,
        part_rows: usize,
        part_cols: usize,
    ) -> Result<Result<Vec<f32>, Misfit>, ModelError> {
        let across = cols.div_ceil(part_cols);
        let mut found = vec![0.0f32; rows.div_ceil(part_rows) * across];
        for first in (0..rows).step_by(ROWS) {
            let values = self.rows_f32(first, ROWS.min(rows - first), rows, cols)?;
            for (row, values) in (first..).zip(values.chunks_exact(cols)) {
                let found = &mut found[row / part_rows * across..][..across];
                for (part, (values, found)) in values.chunks(part_cols).zip(found).enumerate() {
                    for (at, &value) in values.iter().enumerate().filter(|(_, v)| **v != 0.0) {
                        if *found == 0.0 && value.is_finite() {
                            *found = value.abs();
                        } else if *found != value.abs() {
                            let col = part * part_cols + at;
                            return Ok(Err(Misfit { beside: *found, value, row, col }));
                        }
                    }
                }
            }
        }
        Ok(Ok(found))
    }

    /// Canonical codes of the values' signs.
    fn signs(&self, rows: usize, cols: usize) -> Result<Vec<u8>, ModelError> {
        let mut codes = vec![0u8; rows * cols.div_ceil(4)];
        for (first, codes) in (0..rows).step_by(ROWS).zip(codes.chunks_mut(ROWS * cols.div_ceil(4))) {
            let values = self.rows_f32(first, ROWS.min(rows - first), rows, cols)?;
            for (values, codes) in values.chunks_exact(cols).zip(codes.chunks_exact_mut(cols.div_ceil(4))) {
                for (four, code) in values.chunks(4).zip(codes) {
                    let sign = |v: f32| 1 + u8::from(v > 0.0) - u8::from(v < 0.0);
                    *code = four.iter().rev().fold(0, |code, &v| code << 2 | sign(v));
                }
            }
        }
        Ok(codes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Encoding;

    fn recognise(rows: usize, cols: usize, values: &[f32]) -> Result<TernaryMatrix, String> {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let spec = TensorSpec { name: "w".into(), shape: vec![rows, cols], encoding: Encoding::F32 };
        let tensor = Tensor::new(spec, bytes);
        let (sample, found) = (tensor.sample_ternary(), tensor.recognise_ternary());
        if found.is_ok() {
            assert!(
                !matches!(sample.unwrap(), Sample::Floats(_)),
                "a sample refuses nothing that is ternary"
            );
        }
        found.map_err(|e| e.to_string())
    }

    /// A 12 × 192 matrix with a scale for each place, its weights, and what is found in them.
    fn found(scale: impl Fn(usize, usize) -> f32) -> Scales {
        let trit = |r: usize, c: usize| [1.0f32, 0.0, -1.0, -1.0, 0.0, 1.0, 1.0][(5 * r + c) % 7];
        let values: Vec<f32> =
            (0..12 * 192).map(|i| trit(i / 192, i % 192) * scale(i / 192, i % 192)).collect();
        let matrix = recognise(12, 192, &values).unwrap();
        let mut row = vec![0.0; 192];
        for (r, expected) in values.chunks(192).enumerate() {
            matrix.dequantize_row(r, &mut row);
            assert_eq!(row, expected);
        }
        matrix.scales().clone()
    }

    #[test]
    fn the_coarsest_exact_scales_are_recovered() {
        assert_eq!(found(|_, _| 0.3), Scales::Tensor(0.3));
        let shards = found(|r, _| if r < 6 { 0.3 } else { 0.7 });
        assert_eq!(shards, Scales::Block { rows: 6, cols: 192, values: vec![0.3, 0.7] });
        let shards = found(|_, c| if c < 64 { 0.3 } else { 0.7 });
        assert_eq!(shards, Scales::Block { rows: 12, cols: 64, values: vec![0.3, 0.7, 0.7] });
        assert_eq!(found(|r, _| 1.0 + r as f32), Scales::Row((0..12).map(|r| 1.0 + r as f32).collect()));
        let groups = found(|r, c| (1 + r * 3 + c / 64) as f32);
        assert_eq!(groups, Scales::Block { rows: 1, cols: 64, values: (1..37).map(|v| v as f32).collect() });
        assert_eq!(recognise(2, 3, &[0.0, -0.0, 0.0, 0.0, 0.0, 0.0]).unwrap().scales(), &Scales::Tensor(1.0));
    }

    #[test]
    fn plain_floats_are_refused_with_their_place() {
        let mut values = vec![0.5f32; 2 * 64];
        values[64 + 40] = -0.25;
        let error = recognise(2, 64, &values).unwrap_err();
        assert!(error.contains("±0.5") && error.contains("-0.25 at row 1, column 40"), "{error}");
        values[3] = f32::NAN;
        let error = recognise(2, 64, &values).unwrap_err();
        assert!(error.contains("NaN at row 0, column 3"), "{error}");
        assert!(recognise(0, 4, &[]).unwrap_err().contains("no weights"));
    }

    #[test]
    fn a_sample_tells_floats_from_ternary_values_and_zeros() {
        let sample = |values: &[f32]| {
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            let spec = TensorSpec { name: "w".into(), shape: vec![2, 64], encoding: Encoding::F32 };
            Tensor::new(spec, bytes).sample_ternary().unwrap()
        };
        assert_eq!(sample(&[0.0; 128]), Sample::Zeros);
        let mut values = [0.5; 128];
        assert_eq!(sample(&values), Sample::Ternary);
        values[32..64].fill(-0.25);
        assert_eq!(sample(&values), Sample::Ternary);
        values[70] = 0.25;
        assert_eq!(sample(&values), Sample::Floats(Misfit { beside: 0.5, value: 0.25, row: 1, col: 6 }));
        values[70] = f32::INFINITY;
        assert!(matches!(sample(&values), Sample::Floats(_)));
    }

    #[test]
    fn shards_of_columns_that_are_no_multiple_of_32_pass_the_sample() {
        let values: Vec<f32> = (0..4 * 120).map(|i| if i % 120 < 60 { 0.5 } else { -2.0 }).collect();
        let scales = recognise(4, 120, &values).unwrap().scales().clone();
        assert_eq!(scales, Scales::Block { rows: 4, cols: 60, values: vec![0.5, 2.0] });
    }
}
