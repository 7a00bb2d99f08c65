//! Ternary matrices kept as floats: every weight is 0 or ± the scale of its tensor, shard, row or group.

use setun_kernels::matrix::{Scales, TernaryMatrix};

use crate::error::ModelError;
use crate::format::tensor::Tensor;

/// Most shards of a matrix that are looked for: models trained in parallel have a scale for each part.
const MAX_SHARDS: usize = 8;
/// Groups of columns that are looked for, in this order.
const GROUPS: [usize; 5] = [512, 256, 128, 64, 32];

impl Tensor<'_> {
    /// The matrix of a float tensor whose values are all 0 or ± one scale per tensor, per shard of rows or columns (2 to
    /// 8 equal parts), per row, or per group of 512 to 32 columns: the coarsest of these that is exact.
    ///
    /// Scales are recovered exactly; a part without weights other than 0 has the scale 0, a tensor without any 1.
    ///
    /// # Errors
    /// [`ModelError::Tensor`] if it is no matrix, has a value that is no finite number, or two different magnitudes in
    /// one group of 32 columns (with their place): then these are masters or plain floats.
    pub fn recognise_ternary(&self) -> Result<TernaryMatrix, ModelError> {
        let (rows, cols) = self.matrix_shape()?;
        let values = self.to_f32()?;
        if values.is_empty() {
            return Err(self.error(format!("has shape {:?}, so there are no weights", self.shape())));
        }
        if let Some(index) = values.iter().position(|v| !v.is_finite()) {
            let (row, col) = (index / cols, index % cols);
            let what = format!("is {} at row {row}, column {col}, which is no finite number", values[index]);
            return Err(self.error(what));
        }
        let mut parts = vec![(rows, cols)];
        parts.extend((2..=MAX_SHARDS).filter(|k| rows.is_multiple_of(*k)).map(|k| (rows / k, cols)));
        parts.extend((2..=MAX_SHARDS).filter(|k| cols.is_multiple_of(*k)).map(|k| (rows, cols / k)));
        parts.push((1, cols));
        parts.extend(GROUPS.into_iter().filter(|group| *group < cols).map(|group| (1, group)));
        let mut misfit = None;
        for (part_rows, part_cols) in parts {
            match magnitudes(&values, cols, part_rows, part_cols) {
                Ok(scales) => {
                    let scales = match (part_rows, part_cols) {
                        (r, c) if (r, c) == (rows, cols) => {
                            Scales::Tensor(if scales[0] == 0.0 { 1.0 } else { scales[0] })
                        }
                        (1, c) if c == cols => Scales::Row(scales),
                        (rows, cols) => Scales::Block { rows, cols, values: scales },
                    };
                    let trits: Vec<i8> =
                        values.iter().map(|&v| i8::from(v > 0.0) - i8::from(v < 0.0)).collect();
                    return TernaryMatrix::from_trits(rows, cols, &trits, scales)
                        .map_err(|e| self.error(e.to_string()));
                }
                Err(place) => misfit = Some(place),
            }
        }
        let (first, second) = misfit.expect("the whole tensor was tried");
        Err(self.error(format!(
            "is not ternary: beside ±{} there is {} at row {}, column {}, and no scale per tensor, shard, row or group of \
             32 columns or more explains both",
            first,
            values[second],
            second / cols,
            second % cols
        )))
    }
}

/// The magnitude in each part of `part_rows` × `part_cols`, 0 where all is 0; or, of the first part with two, one of
/// them and the index of the other.
fn magnitudes(
    values: &[f32],
    cols: usize,
    part_rows: usize,
    part_cols: usize,
) -> Result<Vec<f32>, (f32, usize)> {
    let across = cols.div_ceil(part_cols);
    let mut found = vec![0.0f32; (values.len() / cols).div_ceil(part_rows) * across];
    for (row, values) in values.chunks_exact(cols).enumerate() {
        let found = &mut found[row / part_rows * across..][..across];
        for (part, (values, found)) in values.chunks(part_cols).zip(found).enumerate() {
            for (col, value) in values.iter().map(|v| v.abs()).enumerate().filter(|(_, v)| *v != 0.0) {
                if *found == 0.0 {
                    *found = value;
                } else if *found != value {
                    return Err((*found, row * cols + part * part_cols + col));
                }
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{Encoding, TensorSpec};

    fn recognise(rows: usize, cols: usize, values: &[f32]) -> Result<TernaryMatrix, String> {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let spec = TensorSpec { name: "w".into(), shape: vec![rows, cols], encoding: Encoding::F32 };
        Tensor::new(spec, bytes).recognise_ternary().map_err(|e| e.to_string())
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
}
