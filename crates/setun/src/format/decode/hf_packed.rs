//! Packed Hugging Face tensors: four ternary codes in a byte, from four quarters of the rows.

use setun_kernels::matrix::{Scales, TernaryMatrix};

use super::gather_row;
use crate::error::ModelError;
use crate::format::tensor::{Encoding, Tensor};

/// What the `weight_scale` beside a packed Hugging Face tensor means; decided by the config's
/// `linear_class`, never by the value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScaleConvention {
    /// `bitlinear` and absent: outputs are divided by it, so a weight is `trit / weight_scale`.
    Divide,
    /// `autobitlinear`: outputs are multiplied by it, so a weight is `trit · weight_scale`.
    Multiply,
}

/// The matrix of a packed Hugging Face tensor: uint8 `[out / 4, in]`, whose byte (r, c) holds the codes of
/// rows `r`, `r + out/4`, `r + 2·out/4`, `r + 3·out/4` at column `c`, lowest bits first.
///
/// A tensor of full shape `[out, in]` whose values are −1, 0 and +1 is taken as unpacked, as the format's
/// own loader does. `scale` is the `weight_scale` beside it, one number.
///
/// # Errors
/// [`ModelError::Shape`] for other shapes; [`ModelError::Tensor`] if `out` is not a multiple of 4, the scale
/// is not one positive number, or codes are no trits (with their count).
pub fn hf_packed_to_ternary(
    packed: &Tensor<'_>,
    scale: &Tensor<'_>,
    convention: ScaleConvention,
    out: usize,
    cols: usize,
) -> Result<TernaryMatrix, ModelError> {
    let stored = match *scale.to_f32()? {
        [value] if value.is_finite() && value > 0.0 => value,
        [value] => {
            return Err(scale.error(format!("is {value}, but a positive number is expected")));
        }
        _ => {
            let what = format!("has shape {:?}, but one number is expected", scale.shape());
            return Err(scale.error(what));
        }
    };
    let value = match convention {
        ScaleConvention::Divide => 1.0 / stored,
        ScaleConvention::Multiply => stored,
    };
    if packed.shape() == [out, cols] && packed.info.encoding != Encoding::U8 {
        return packed.trits_to_ternary(value);
    }
    if !out.is_multiple_of(4) {
        let what = format!("{out} output rows cannot be packed: a multiple of 4 is needed");
        return Err(packed.error(what));
    }
    if packed.shape() != [out / 4, cols] {
        return Err(ModelError::Shape {
            name: packed.name().to_owned(),
            expected: vec![out / 4, cols],
            found: packed.shape().to_vec(),
        });
    }
    if packed.info.encoding != Encoding::U8 {
        let what = format!("is {}, but packed codes are U8", packed.info.encoding);
        return Err(packed.error(what));
    }
    packed.check_len()?;
    let row_bytes = cols.div_ceil(4);
    let mut codes = vec![0u8; out * row_bytes];
    let quarters = codes.chunks_exact_mut((out / 4 * row_bytes).max(1));
    for (quarter, codes) in quarters.enumerate() {
        let rows = packed.data.chunks_exact(cols.max(1)).zip(codes.chunks_exact_mut(row_bytes.max(1)));
        for (stored, codes) in rows {
            gather_row(stored, 2 * quarter, codes);
        }
    }
    TernaryMatrix::new(out, cols, codes, Scales::Tensor(value)).map_err(|e| packed.error(e.to_string()))
}
