//! From floats and ternary matrices to the bytes of a tensor: the inverse of [`decode`](super::decode).
//!
//! A ternary matrix is stored exactly or not at all. Where a type keeps less than f32 of a scale,
//! the caller must say that rounding it is acceptable. The layouts are in the files beside this one:
//! `quantise` for floats in few bits, `ternary_blocks` for GGUF's ternary types.

mod quantise;
mod ternary_blocks;

use half::{bf16, f16};
use setun_kernels::matrix::{Scales, TernaryMatrix};

pub use ternary_blocks::encode_ternary;

use super::decode::ScaleConvention;
use super::tensor::Encoding;
use crate::error::ModelError;

/// Whether a scale may be rounded to the precision of the type that stores it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scaling {
    /// Refuse a scale that the type cannot hold.
    Exact,
    /// Round it to the nearest, ties to even.
    Round,
}

fn refusal(name: &str, encoding: &str, why: String) -> ModelError {
    ModelError::CannotEncode { name: name.to_owned(), encoding: encoding.to_owned(), why }
}

/// Stores floats as F32, F16 or BF16 (rounded to even), or in blocks: Q8_0 (`d = max|x| / 127`), Q4_0 (`d = x / −8`
/// for the x of largest size) or Q6_K (scales that make the squared error small, `d` from the largest of them).
///
/// `cols` is the length of a row.
///
/// # Errors
/// [`ModelError::CannotEncode`] for other encodings, rows that are not whole blocks, finite values beyond
/// the range of F16 or of a block's f16 scale, and NaN or infinities in blocks.
pub fn encode_floats(
    name: &str,
    values: &[f32],
    cols: usize,
    encoding: &Encoding,
) -> Result<Vec<u8>, ModelError> {
    match encoding {
        Encoding::F32 => Ok(values.iter().flat_map(|v| v.to_le_bytes()).collect()),
        Encoding::BF16 => Ok(values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect()),
        Encoding::F16 => {
            let beyond = |v: &f32| v.is_finite() && f16::from_f32(*v).is_infinite();
            if let Some(index) = values.iter().position(beyond) {
                let why = format!("value {} at index {index} is beyond its range", values[index]);
                return Err(refusal(name, "F16", why));
            }
            Ok(values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect())
        }
        Encoding::Q8_0 => blocks(name, values, cols, encoding, quantise::q8_0),
        Encoding::Q4_0 => blocks(name, values, cols, encoding, quantise::q4_0),
        Encoding::Q6K => blocks(name, values, cols, encoding, quantise::q6_k),
        _ => {
            let why = format!("floats are stored as F32, F16, BF16, Q8_0, Q4_0 or Q6_K, not {encoding}");
            Err(refusal(name, "a float type", why))
        }
    }
}

/// Encodes blocks of `N` finite floats into `B` bytes each; `quantise` gives none where its scale overflows.
fn blocks<const N: usize, const B: usize>(
    name: &str,
    values: &[f32],
    cols: usize,
    encoding: &Encoding,
    quantise: fn(&[f32; N]) -> Option<[u8; B]>,
) -> Result<Vec<u8>, ModelError> {
    let label = encoding.name();
    if !cols.is_multiple_of(N) || !values.len().is_multiple_of(N) {
        let why = format!("rows have {cols} columns, not a multiple of {N}");
        return Err(refusal(name, label, why));
    }
    let mut out = Vec::with_capacity(values.len() / N * B);
    for (index, block) in values.as_chunks::<N>().0.iter().enumerate() {
        if let Some(value) = block.iter().find(|v| !v.is_finite()) {
            return Err(refusal(
                name,
                label,
                format!("block {index} holds {value}, which is no finite number"),
            ));
        }
        let bytes = quantise(block).ok_or_else(|| {
            let largest = block.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            let why = format!("block {index} has a largest value of {largest}, beyond its range");
            refusal(name, label, why)
        })?;
        out.extend_from_slice(&bytes);
    }
    Ok(out)
}

/// The one scale of a matrix, if all its scales are equal.
fn single_scale(matrix: &TernaryMatrix) -> Option<f32> {
    match matrix.scales() {
        Scales::Tensor(scale) => Some(*scale),
        Scales::Row(values) | Scales::Block { values, .. } => {
            let first = *values.first()?;
            values.iter().all(|v| v.to_bits() == first.to_bits()).then_some(first)
        }
    }
}

/// Stores a ternary matrix as a packed Hugging Face pair: the uint8 codes `[out / 4, in]`, and one
/// `weight_scale` in `scale_encoding` (F32, F16 or BF16) with the meaning of `convention`.
///
/// # Errors
/// [`ModelError::CannotEncode`] if `out` is not a multiple of 4, there is more than one scale, or, unless
/// `scaling` allows it, the scale read back would differ.
pub fn encode_hf_packed(
    name: &str,
    matrix: &TernaryMatrix,
    convention: ScaleConvention,
    scale_encoding: &Encoding,
    scaling: Scaling,
) -> Result<(Vec<u8>, Vec<u8>), ModelError> {
    const LABEL: &str = "packed uint8";
    let (rows, cols) = (matrix.rows(), matrix.cols());
    if !rows.is_multiple_of(4) {
        return Err(refusal(name, LABEL, format!("{rows} rows are not a multiple of 4")));
    }
    let scale = single_scale(matrix)
        .ok_or_else(|| refusal(name, LABEL, "it has more than one scale, and the type holds one".into()))?;
    let quarter = rows / 4;
    let mut packed = vec![0u8; quarter * cols];
    for row in 0..rows {
        let codes = matrix.row_codes(row);
        let out = &mut packed[row % quarter * cols..][..cols];
        for (c, out) in out.iter_mut().enumerate() {
            *out |= (codes[c / 4] >> (2 * (c % 4)) & 3) << (2 * (row / quarter));
        }
    }
    let round = |v: f32| match scale_encoding {
        Encoding::F16 => f16::from_f32(v).to_f32(),
        Encoding::BF16 => bf16::from_f32(v).to_f32(),
        _ => v,
    };
    let stored = match convention {
        ScaleConvention::Multiply => round(scale),
        ScaleConvention::Divide => reciprocal(scale, round),
    };
    let read_back = match convention {
        ScaleConvention::Multiply => stored,
        ScaleConvention::Divide => 1.0 / stored,
    };
    let usable = stored.is_finite() && stored > 0.0 && read_back.is_finite();
    if !usable || scaling == Scaling::Exact && read_back != scale {
        let why = format!("its scale {scale} would be read back as {read_back} from {scale_encoding}");
        return Err(refusal(name, LABEL, why));
    }
    Ok((packed, encode_floats(name, &[stored], 1, scale_encoding)?))
}

/// A number that `round` leaves alone and whose reciprocal is `scale`, if there is one near; else the
/// nearest to `1 / scale`. Scales that were read as `1 / x` thus give `x` back.
fn reciprocal(scale: f32, round: impl Fn(f32) -> f32) -> f32 {
    let nearest = 1.0 / scale;
    // Shortest first: published scales are bf16 even where a file keeps them as f32.
    let short = bf16::from_f32(nearest).to_f32();
    let around = (-2i32..=2).map(|step| f32::from_bits(nearest.to_bits().wrapping_add_signed(step)));
    let found = [short].into_iter().chain(around).find(|&x| round(x) == x && 1.0 / x == scale);
    found.unwrap_or_else(|| round(nearest))
}
