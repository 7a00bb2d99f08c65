//! Large tensors in pieces, so that memory depends on the piece and not on the tensor.

use std::ops::Range;

use setun_kernels::Kernels;
use setun_kernels::dense::{DenseData, DenseMatrix};
use setun_kernels::matrix::{Scales, TernaryMatrix};
use setun_kernels::quant::{AbsMean, ternarize_row};

use super::order::pick_rows;
use super::{Weight, Weights, expect_shape, split_pair_rows};
use crate::error::ModelError;
use crate::format::{Encoding, Tensor, TensorSpec};
use crate::model::Role;

/// Weights that are decoded at a time.
const PIECE: usize = 64 * AbsMean::PIECE;

impl Weights<'_> {
    /// [`Weights::dense_rows`] of `name` must begin and end at multiples of this many of its `rows`.
    pub(crate) fn row_unit(&self, name: &str, rows: usize) -> usize {
        let info = self.file.info(&self.stored_name(name));
        match (info.and_then(|info| info.encoding.block()), self.interleaved_heads(name)) {
            (None, _) => rows,
            // Heads change places.
            _ if self.value_heads(name).is_some() => rows,
            (_, Some(heads)) => rows / heads.max(1),
            (_, None) => 1,
        }
    }

    /// Some rows of a matrix that [`Weights::matrix`] gives as [`Weight::Dense`]; `shape` is the whole one's.
    ///
    /// # Errors
    /// As [`Weights::matrix`].
    pub(crate) fn dense_rows(
        &self,
        name: &str,
        [rows, cols]: [usize; 2],
        role: Role,
        part: Range<usize>,
    ) -> Result<DenseMatrix, ModelError> {
        if part.len() == rows {
            return match self.matrix(name, rows, cols, role)? {
                Weight::Dense(matrix) => Ok(matrix),
                Weight::Ternary(_) => Err(ModelError::tensor(name, "it is ternary, but floats are expected")),
            };
        }
        let whole = self.file.tensor(&self.stored_name(name))?;
        let expert = self.expert(&whole, name, rows, cols, role)?;
        let tensor = expert.as_ref().unwrap_or(&whole);
        expect_shape(tensor, &[rows, cols])?;
        let piece = elements(tensor, part.start * cols..part.end * cols, vec![part.len(), cols])?;
        let matrix = match tensor.info.encoding.is_ternary() {
            false => piece.to_dense()?,
            true => DenseMatrix::new(part.len(), cols, DenseData::F32(piece.to_f32()?))
                .map_err(|e| ModelError::tensor(name, e.to_string()))?,
        };
        self.file.release_part(&tensor.info, stored(tensor, part.start * cols..part.end * cols)?);
        Ok(match self.interleaved_heads(name) {
            None => matrix,
            Some(heads) => {
                let heads = part.len() / (rows / heads.max(1)).max(1);
                let from: Vec<usize> =
                    split_pair_rows(heads, self.config.rope.rotary_dim, part.len()).collect();
                match pick_rows(Weight::Dense(matrix), &from) {
                    Weight::Dense(matrix) => matrix,
                    Weight::Ternary(_) => unreachable!("rows are only reordered"),
                }
            }
        })
    }
}

/// Float masters rounded to ternary by absmean, without all of them in memory as f32.
pub(super) fn masters(tensor: &Tensor, rows: usize, cols: usize) -> Result<Weight, ModelError> {
    let count = rows * cols;
    let mut mean = AbsMean::default();
    for first in (0..count).step_by(PIECE) {
        let values = floats(tensor, first..count.min(first + PIECE))?;
        if let Some(index) = values.iter().position(|v| !v.is_finite()) {
            let (value, index) = (values[index], first + index);
            let what = format!("weight {index} is {value}, which cannot be rounded to ternary");
            return Err(ModelError::tensor(tensor.name(), what));
        }
        mean.push(&values);
    }
    let (kernels, scale, row_bytes) = (Kernels::best(), mean.scale(), cols.div_ceil(4));
    let mut codes = vec![0; rows * row_bytes];
    let some = (PIECE / cols.max(1)).max(1);
    for (block, codes) in codes.chunks_mut((some * row_bytes).max(1)).enumerate() {
        let first = block * some;
        let values = floats(tensor, first * cols..rows.min(first + some) * cols)?;
        for (row, codes) in values.chunks_exact(cols).zip(codes.chunks_exact_mut(row_bytes)) {
            ternarize_row(kernels, row, 1.0 / scale, codes);
        }
    }
    TernaryMatrix::new(rows, cols, codes, Scales::Tensor(scale))
        .map(Weight::Ternary)
        .map_err(|e| ModelError::tensor(tensor.name(), e.to_string()))
}

fn floats(tensor: &Tensor, range: Range<usize>) -> Result<Vec<f32>, ModelError> {
    let length = range.len();
    elements(tensor, range, vec![length])?.to_f32()
}

/// A run of elements as a tensor of its own. Types that are nothing but blocks have such runs; others have one, the
/// whole.
fn elements<'t>(
    tensor: &'t Tensor,
    range: Range<usize>,
    shape: Vec<usize>,
) -> Result<Tensor<'t>, ModelError> {
    let bytes = stored(tensor, range)?;
    let encoding: Encoding = tensor.info.encoding.clone();
    let spec = TensorSpec { name: tensor.name().to_owned(), shape, encoding };
    Ok(Tensor::new(spec, &tensor.data[bytes]))
}

/// Where a run of elements lies among the tensor's bytes.
fn stored(tensor: &Tensor, range: Range<usize>) -> Result<Range<usize>, ModelError> {
    let fits = |(weights, bytes): &(usize, usize)| {
        range.start.is_multiple_of(*weights)
            && range.end.is_multiple_of(*weights)
            && range.end / weights * bytes <= tensor.data.len()
    };
    match tensor.info.encoding.block().filter(fits) {
        Some((weights, bytes)) => Ok(range.start / weights * bytes..range.end / weights * bytes),
        None => {
            let what = format!("{} of it cannot be read by itself", tensor.info.encoding);
            Err(ModelError::tensor(tensor.name(), what))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use setun_kernels::quant::quantize_absmean;

    #[test]
    fn masters_in_pieces_have_the_bits_of_the_whole() {
        // Two pieces and a bit, in rows that no piece ends with.
        let (rows, cols) = (700, 3001);
        assert!(rows * cols > 2 * PIECE);
        let mut state = 9u32;
        let values: Vec<f32> = (0..rows * cols)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect();
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let spec = TensorSpec { name: "w".into(), shape: vec![rows, cols], encoding: Encoding::F32 };
        let Weight::Ternary(found) = masters(&Tensor::new(spec, bytes), rows, cols).unwrap() else {
            panic!("masters become ternary")
        };
        let (trits, scale) = quantize_absmean(&values);
        assert_eq!(found, TernaryMatrix::from_trits(rows, cols, &trits, Scales::Tensor(scale)).unwrap());
    }

    #[test]
    fn a_master_that_is_no_number_is_named_by_its_place() {
        let mut values = [0.5f32; 8];
        values[5] = f32::NAN;
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let spec = TensorSpec { name: "w".into(), shape: vec![2, 4], encoding: Encoding::F32 };
        let error = masters(&Tensor::new(spec, bytes), 2, 4).unwrap_err().to_string();
        assert!(error.contains("weight 5 is NaN"), "{error}");
    }
}
