//! Ternary weights as MLX quantises them to two bits: numbers q = 0 … 3 in u32, and per group a scale and a bias,
//! `w = scale · q + bias`.
//!
//! Sixteen q lie in a u32, the first in its lowest bits, so the bytes of a row are canonical codes already; they mean
//! −1, 0, +1 times the scale exactly where the bias is the negated scale.

use setun_kernels::matrix::TernaryMatrix;

use super::ScaleCollector;
use crate::error::ModelError;
use crate::format::tensor::{Encoding, Tensor};

/// The matrix of an MLX weight in two bits: `packed` is u32 `[out, cols / 16]`, `scales` and `biases` are floats
/// `[out, cols / group]`.
///
/// # Errors
/// [`ModelError::Shape`] for other shapes; [`ModelError::Tensor`] if `packed` is no U32, `group` does not divide rows
/// into multiples of 16, a bias is not the negated scale or neither is a finite number, or if there are codes 3 (with
/// their count): then the weights are not ternary.
pub fn mlx_to_ternary(
    packed: &Tensor<'_>,
    scales: &Tensor<'_>,
    biases: &Tensor<'_>,
    group: usize,
) -> Result<TernaryMatrix, ModelError> {
    let (rows, words) = packed.matrix_shape()?;
    match &packed.info.encoding {
        Encoding::Other(name) if name == "U32" => {}
        other => return Err(packed.error(format!("is {other}, but MLX packs its weights in U32"))),
    }
    let cols = words.saturating_mul(16);
    if group == 0 || !group.is_multiple_of(16) || !cols.is_multiple_of(group) {
        return Err(packed.error(format!("rows of {cols} weights are not in groups of {group}")));
    }
    if Some(packed.data.len()) != rows.checked_mul(words).and_then(|n| n.checked_mul(4)) {
        return Err(
            packed.error(format!("{} bytes are no U32 of shape [{rows}, {words}]", packed.data.len()))
        );
    }
    for tensor in [scales, biases] {
        let expected = vec![rows, cols / group];
        if tensor.shape() != expected {
            let (name, found) = (tensor.name().to_owned(), tensor.shape().to_vec());
            return Err(ModelError::Shape { name, expected, found });
        }
    }
    let mut codes = packed.data.to_vec();
    let (stored, offsets) = (scales.to_f32()?, biases.to_f32()?);
    let mut collected = ScaleCollector::default();
    let groups = codes.chunks_exact_mut(group / 4).zip(stored.iter().zip(&offsets));
    for (index, (codes, (&scale, &bias))) in groups.enumerate() {
        if bias != -scale || !scale.is_finite() {
            let groups = cols / group;
            return Err(biases.error(format!(
                "is {bias} at row {}, group {}, where the scale is {scale}: weights are ternary only where a bias is \
                 the negated scale",
                index / groups,
                index % groups
            )));
        }
        collected.push(scale, codes);
    }
    let scales = collected.finish(group, cols);
    TernaryMatrix::new(rows, cols, codes, scales).map_err(|e| packed.error(e.to_string()))
}
