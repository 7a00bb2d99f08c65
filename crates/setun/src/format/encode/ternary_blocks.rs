//! Ternary matrices as GGUF's ternary types. The layouts are described in `decode`.

use half::f16;
use setun_kernels::matrix::{Scales, TernaryMatrix};

use super::{Scaling, refusal, single_scale};
use crate::error::ModelError;
use crate::format::Encoding;
use crate::format::decode::ZEROS;

/// A type with an f16 scale per block.
struct Blocks {
    scale_first: bool,
    put: fn(&[u8], &mut Vec<u8>),
}

impl Blocks {
    fn of(encoding: &Encoding) -> Option<Self> {
        let blocks = |scale_first, put| Self { scale_first, put };
        let canonical = |codes: &[u8], out: &mut Vec<u8>| out.extend_from_slice(codes);
        Some(match encoding {
            Encoding::Q2_0G64 | Encoding::Q2_0G128 | Encoding::PQ2_0 => blocks(true, canonical),
            Encoding::PTQ1_0 => blocks(false, put_ptq1_0),
            Encoding::TQ1_0 => blocks(false, put_tq1_0),
            Encoding::TQ2_0 => blocks(false, put_tq2_0),
            _ => return None,
        })
    }
}

/// Stores a ternary matrix as Q2_0 (either group size), PQ2_0, PTQ1_0, TQ1_0, TQ2_0 or I2_S, bit for bit as their
/// reference programs do.
///
/// All but I2_S repeat an f16 scale in every block of 64, 128 or 256 weights of a row (0 where all are 0); I2_S holds
/// one f32 scale, and its 28 unspecified bytes are 0 here.
///
/// # Errors
/// [`ModelError::CannotEncode`] if rows are not whole blocks, weights other than 0 that would share a scale have
/// different ones, or, unless `scaling` allows it, f16 would round a scale.
pub fn encode_ternary(
    name: &str,
    matrix: &TernaryMatrix,
    encoding: &Encoding,
    scaling: Scaling,
) -> Result<Vec<u8>, ModelError> {
    let blocks = Blocks::of(encoding);
    if blocks.is_none() && *encoding != Encoding::I2S {
        let why = format!(
            "ternary matrices are stored as TQ1_0, TQ2_0, Q2_0, PQ2_0, PTQ1_0 or I2_S, not {encoding}"
        );
        return Err(refusal(name, "a ternary type", why));
    }
    let (label, weights) = (encoding.name(), encoding.block_len());
    let (rows, cols) = (matrix.rows(), matrix.cols());
    if !cols.is_multiple_of(weights) {
        let why = format!("rows have {cols} columns, not a multiple of {weights}");
        return Err(refusal(name, label, why));
    }
    let mut out = Vec::with_capacity(encoding.byte_len(&[rows, cols]).unwrap_or(0));
    let Some(blocks) = blocks else {
        let scale = single_scale(matrix).ok_or_else(|| {
            refusal(name, label, "it has more than one scale, and the type holds one".into())
        })?;
        for block in matrix.codes().chunks_exact(32) {
            put_quarters(block, [6, 4, 2, 0], &mut out);
        }
        out.extend_from_slice(&scale.to_le_bytes());
        out.extend_from_slice(&[0; 28]);
        return Ok(out);
    };
    for row in 0..rows {
        for (index, codes) in matrix.row_codes(row).chunks_exact(weights / 4).enumerate() {
            let d =
                block_scale(name, encoding, matrix, codes, (row, index * weights), scaling)?.to_le_bytes();
            if blocks.scale_first {
                out.extend_from_slice(&d);
            }
            (blocks.put)(codes, &mut out);
            if !blocks.scale_first {
                out.extend_from_slice(&d);
            }
        }
    }
    Ok(out)
}

/// The scale of the weights of the block at (`row`, `first`), as f16. Those that are 0 ask for none.
fn block_scale(
    name: &str,
    encoding: &Encoding,
    matrix: &TernaryMatrix,
    codes: &[u8],
    (row, first): (usize, usize),
    scaling: Scaling,
) -> Result<f16, ModelError> {
    let mut scale = None;
    for (index, _) in codes.iter().enumerate().filter(|(_, byte)| **byte != ZEROS) {
        let weights = (first + 4 * index..).zip(0..4).filter(|(_, i)| codes[index] >> (2 * i) & 3 != 1);
        for (col, _) in weights {
            let here = scale_at(matrix, row, col);
            if scale.get_or_insert(here).to_bits() != here.to_bits() {
                let why = format!(
                    "the {} weights from row {row}, column {first} have more than one scale",
                    encoding.block_len()
                );
                return Err(refusal(name, encoding.name(), why));
            }
        }
        if !matches!(matrix.scales(), Scales::Block { .. }) {
            break;
        }
    }
    let Some(scale) = scale else { return Ok(f16::ZERO) };
    let d = f16::from_f32(scale);
    let exact = d.to_f32() == scale;
    // Rounding to 0 or infinity would lose the weights themselves, so no permission covers it.
    if exact || scaling == Scaling::Round && d.is_finite() && d.to_f32() != 0.0 {
        return Ok(d);
    }
    let why =
        format!("its scale {scale} would become {d} in half precision, so it needs permission to round");
    Err(refusal(name, encoding.name(), why))
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

/// 32 bytes for 128 weights in canonical bytes, quarter `q` at bit `shifts[q]`.
fn put_quarters(codes: &[u8], shifts: [usize; 4], out: &mut Vec<u8>) {
    let code = |e: usize| codes[e / 4] >> (2 * (e % 4)) & 3;
    out.extend((0..32).map(|p| (0..4).fold(0, |byte, q| byte | code(32 * q + p) << shifts[q])));
}

fn put_tq2_0(codes: &[u8], out: &mut Vec<u8>) {
    codes.chunks_exact(32).for_each(|half| put_quarters(half, [0, 2, 4, 6], out));
}

/// Base-3 bytes of stretches of (bytes, digits, first weight).
fn put_base3(codes: &[u8], stretches: [(usize, usize, usize); 3], out: &mut Vec<u8>) {
    let code = |e: usize| u32::from(codes[e / 4] >> (2 * (e % 4)) & 3);
    for (bytes, digits, first) in stretches {
        for m in 0..bytes {
            let number = (0..digits).fold(0, |number, n| 3 * number + code(first + bytes * n + m));
            let number = if digits == 4 { 3 * number } else { number }; // The fifth digit is 0.
            out.push((number * 256).div_ceil(243) as u8);
        }
    }
}

fn put_tq1_0(codes: &[u8], out: &mut Vec<u8>) {
    put_base3(codes, [(32, 5, 0), (16, 5, 160), (4, 4, 240)], out);
}

fn put_ptq1_0(codes: &[u8], out: &mut Vec<u8>) {
    put_base3(codes, [(16, 5, 0), (8, 5, 80), (2, 4, 120)], out);
}
