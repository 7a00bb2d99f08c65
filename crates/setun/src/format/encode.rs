//! From floats and ternary matrices to the bytes of a tensor: the inverse of [`decode`](super::decode).
//!
//! A ternary matrix is stored exactly or not at all. Where a type keeps less than f32 of a scale,
//! the caller must say that rounding it is acceptable.

use half::{bf16, f16};
use setun_kernels::matrix::{Scales, TernaryMatrix};

use super::decode::{ScaleConvention, TQ_BLOCK, ZEROS};
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

fn refusal(name: &str, encoding: &'static str, why: String) -> ModelError {
    ModelError::CannotEncode { name: name.to_owned(), encoding, why }
}

/// Stores floats as F32, F16, BF16 (rounded to even) or Q8_0 (blocks of 32, `d = max|x| / 127` as f16,
/// `q = round(x · 127/max|x|)`, ties away from zero).
///
/// `cols` is the length of a row.
///
/// # Errors
/// [`ModelError::CannotEncode`] for other encodings, rows that are not whole blocks, finite values beyond
/// F16, and NaN or infinities in Q8_0.
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
        Encoding::Q8_0 => encode_q8_0(name, values, cols),
        _ => {
            let why = format!("floats are stored as F32, F16, BF16 or Q8_0, not {encoding}");
            Err(refusal(name, "a float type", why))
        }
    }
}

fn encode_q8_0(name: &str, values: &[f32], cols: usize) -> Result<Vec<u8>, ModelError> {
    if !cols.is_multiple_of(32) {
        let why = format!("rows have {cols} columns, not a multiple of 32");
        return Err(refusal(name, "Q8_0", why));
    }
    let mut out = Vec::with_capacity(values.len() / 32 * 34);
    for (index, block) in values.chunks(32).enumerate() {
        let largest = block.iter().fold(0.0f32, |m, v| if v.abs() <= m { m } else { v.abs() });
        let d = largest / 127.0;
        if !f16::from_f32(d).is_finite() {
            let why = format!("block {index} has a largest value of {largest}, beyond its range");
            return Err(refusal(name, "Q8_0", why));
        }
        let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
        out.extend_from_slice(&f16::from_f32(d).to_le_bytes());
        // Ties away from zero: what the type's reference quantiser does. The cast saturates, which
        // matters only for subnormal blocks whose inverse overflows.
        out.extend(block.iter().map(|v| (v * inverse).round() as i8 as u8));
    }
    Ok(out)
}

/// Stores a ternary matrix as TQ1_0, TQ2_0 or I2_S, bit for bit as their reference programs do.
///
/// TQ types repeat an f16 scale in every block of 256 weights of a row (0 where all are 0); I2_S holds one
/// f32 scale, and its 28 unspecified bytes are 0 here.
///
/// # Errors
/// [`ModelError::CannotEncode`] if rows are not whole blocks (256; 128 for I2_S), the matrix has finer
/// scales than the type, or, unless `scaling` allows it, a scale that f16 would round.
pub fn encode_ternary(
    name: &str,
    matrix: &TernaryMatrix,
    encoding: &Encoding,
    scaling: Scaling,
) -> Result<Vec<u8>, ModelError> {
    let (label, block) = match encoding {
        Encoding::TQ1_0 => ("TQ1_0", TQ_BLOCK),
        Encoding::TQ2_0 => ("TQ2_0", TQ_BLOCK),
        Encoding::I2S => ("I2_S", 128),
        _ => {
            let why = format!("ternary matrices are stored as TQ1_0, TQ2_0 or I2_S, not {encoding}");
            return Err(refusal(name, "a ternary type", why));
        }
    };
    let (rows, cols) = (matrix.rows(), matrix.cols());
    if !cols.is_multiple_of(block) {
        let why = format!("rows have {cols} columns, not a multiple of {block}");
        return Err(refusal(name, label, why));
    }
    let mut out = Vec::with_capacity(encoding.byte_len(&[rows, cols]).unwrap_or(0));
    if *encoding == Encoding::I2S {
        let scale = single_scale(matrix).ok_or_else(|| {
            refusal(name, label, "it has more than one scale, and the type holds one".into())
        })?;
        for block in matrix.codes().chunks_exact(32) {
            put_quarters(block, [6, 4, 2, 0], &mut out);
        }
        out.extend_from_slice(&scale.to_le_bytes());
        out.extend_from_slice(&[0; 28]);
        return Ok(out);
    }
    for row in 0..rows {
        for (index, codes) in matrix.row_codes(row).chunks_exact(TQ_BLOCK / 4).enumerate() {
            if *encoding == Encoding::TQ1_0 {
                put_tq1(codes, &mut out);
            } else {
                for half in codes.chunks_exact(32) {
                    put_quarters(half, [0, 2, 4, 6], &mut out);
                }
            }
            let d = if codes.iter().all(|&byte| byte == ZEROS) {
                f16::ZERO
            } else {
                tq_scale(name, label, matrix, row, index * TQ_BLOCK, scaling)?
            };
            out.extend_from_slice(&d.to_le_bytes());
        }
    }
    Ok(out)
}

/// The scale of the 256 weights at (`row`, `col`), as f16.
fn tq_scale(
    name: &str,
    label: &'static str,
    matrix: &TernaryMatrix,
    row: usize,
    col: usize,
    scaling: Scaling,
) -> Result<f16, ModelError> {
    let scale = scale_at(matrix, row, col);
    if (col..col + TQ_BLOCK).any(|c| scale_at(matrix, row, c).to_bits() != scale.to_bits()) {
        let why = format!("the 256 weights from row {row}, column {col} have more than one scale");
        return Err(refusal(name, label, why));
    }
    let d = f16::from_f32(scale);
    let exact = d.to_f32() == scale;
    // Rounding to 0 or infinity would lose the weights themselves, so no permission covers it.
    if exact || scaling == Scaling::Round && d.is_finite() && d.to_f32() != 0.0 {
        return Ok(d);
    }
    let why =
        format!("its scale {scale} would become {d} in half precision, so it needs permission to round");
    Err(refusal(name, label, why))
}

fn scale_at(matrix: &TernaryMatrix, row: usize, col: usize) -> f32 {
    match matrix.scales() {
        Scales::Tensor(scale) => *scale,
        Scales::Row(values) => values[row],
        Scales::Block { rows, cols, values } => {
            values[row / rows * matrix.cols().div_ceil(*cols) + col / cols]
        }
    }
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

/// 32 bytes for 128 weights in canonical bytes, quarter `q` at bit `shifts[q]`.
fn put_quarters(codes: &[u8], shifts: [usize; 4], out: &mut Vec<u8>) {
    let code = |e: usize| codes[e / 4] >> (2 * (e % 4)) & 3;
    out.extend((0..32).map(|p| (0..4).fold(0, |byte, q| byte | code(32 * q + p) << shifts[q])));
}

fn put_tq1(codes: &[u8], out: &mut Vec<u8>) {
    let code = |e: usize| u32::from(codes[e / 4] >> (2 * (e % 4)) & 3);
    for (bytes, digits, first) in [(32, 5, 0), (16, 5, 160), (4, 4, 240)] {
        for m in 0..bytes {
            let number = (0..digits).fold(0, |number, n| 3 * number + code(first + bytes * n + m));
            let number = if digits == 4 { 3 * number } else { number }; // The fifth digit is 0.
            out.push((number * 256).div_ceil(243) as u8);
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
