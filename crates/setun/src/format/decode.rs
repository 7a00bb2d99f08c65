//! From a tensor's bytes to floats, dense matrices and ternary matrices.
//!
//! The two-bit layouts differ only in which four weights share a byte, and all of them hold four
//! consecutive columns in four consecutive bytes: [`gather`] moves them into one canonical byte.

use half::{bf16, f16};
use setun_kernels::dense::{DenseData, DenseMatrix};
use setun_kernels::matrix::{Scales, TernaryMatrix};

use super::tensor::{Encoding, Tensor};
use crate::error::ModelError;

/// Four canonical codes that are all 1: four zero weights.
pub(super) const ZEROS: u8 = 0b01_01_01_01;
/// Weights in a block of TQ1_0 and TQ2_0.
pub(super) const TQ_BLOCK: usize = 256;

/// What the `weight_scale` beside a packed Hugging Face tensor means; decided by the config's
/// `linear_class`, never by the value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScaleConvention {
    /// `bitlinear` and absent: outputs are divided by it, so a weight is `trit / weight_scale`.
    Divide,
    /// `autobitlinear`: outputs are multiplied by it, so a weight is `trit · weight_scale`.
    Multiply,
}

/// The codes at bits `shift` and `shift + 1` of four bytes, as one byte, lowest bits first.
fn gather(bytes: [u8; 4], shift: usize) -> u8 {
    let codes = (u32::from_le_bytes(bytes) >> shift) & 0x0303_0303;
    (codes | codes >> 6 | codes >> 12 | codes >> 18) as u8
}

/// Canonical bytes of 128 weights in 32 bytes whose quarter `q` sits at bit `shifts[q]`.
fn gather_quarters(stored: &[u8], shifts: [usize; 4], out: &mut [u8]) {
    for (shift, out) in shifts.into_iter().zip(out.chunks_exact_mut(8)) {
        for (&four, out) in stored.as_chunks::<4>().0.iter().zip(out) {
            *out = gather(four, shift);
        }
    }
}

/// Canonical bytes of one TQ2_0 block's 64 bytes of codes.
fn tq2_codes(stored: &[u8], out: &mut [u8]) {
    for (stored, out) in stored.chunks_exact(32).zip(out.chunks_exact_mut(32)) {
        gather_quarters(stored, [0, 2, 4, 6], out);
    }
}

/// Canonical bytes of one TQ1_0 block's 52 bytes of trits: a byte is a fixed-point fraction of 1
/// whose base-3 digits are the codes, most significant first.
fn tq1_codes(stored: &[u8], out: &mut [u8]) {
    let mut codes = [0u8; TQ_BLOCK];
    // (first byte, bytes, digits, first weight) of the three parts of a block.
    for (at, bytes, digits, first) in [(0, 32, 5, 0), (32, 16, 5, 160), (48, 4, 4, 240)] {
        for (m, &byte) in stored[at..at + bytes].iter().enumerate() {
            let mut fraction = byte;
            for n in 0..digits {
                codes[first + bytes * n + m] = ((u16::from(fraction) * 3) >> 8) as u8;
                fraction = fraction.wrapping_mul(3);
            }
        }
    }
    for (out, four) in out.iter_mut().zip(codes.as_chunks::<4>().0) {
        *out = four[0] | four[1] << 2 | four[2] << 4 | four[3] << 6;
    }
}

/// Writes `(code − 1) · scale` for canonical bytes; a fourth code gives `2 · scale`.
fn scaled_codes(codes: &[u8], scale: f32, out: &mut [f32]) {
    for (&byte, out) in codes.iter().zip(out.chunks_mut(4)) {
        for (i, out) in out.iter_mut().enumerate() {
            *out = (f32::from(byte >> (2 * i) & 3) - 1.0) * scale;
        }
    }
}

fn f16_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

impl Tensor<'_> {
    fn error(&self, what: impl Into<String>) -> ModelError {
        ModelError::tensor(self.name(), what)
    }

    fn not_read(&self) -> ModelError {
        let what = format!("type {} is not read: {} are", self.info.encoding, Encoding::READABLE);
        self.error(what)
    }

    /// Checks that there are as many bytes as encoding and shape need.
    fn check_len(&self) -> Result<(), ModelError> {
        if matches!(self.info.encoding, Encoding::Other(_)) {
            return Err(self.not_read());
        }
        let expected = self.info.encoding.byte_len(&self.info.shape);
        if expected != Some(self.data.len()) {
            return Err(self.error(format!(
                "{} bytes are no {} of shape {:?}",
                self.data.len(),
                self.info.encoding,
                self.info.shape
            )));
        }
        Ok(())
    }

    /// `(rows, cols)` of a matrix.
    fn matrix_shape(&self) -> Result<(usize, usize), ModelError> {
        match *self.shape() {
            [rows, cols] => Ok((rows, cols)),
            _ => Err(self.error(format!("has shape {:?}, but a matrix is expected", self.shape()))),
        }
    }

    /// Every element as an f32, row-major. Exact for all encodings; codes that are no trit decode
    /// as their formats say (TQ2_0: twice the scale).
    ///
    /// # Errors
    /// [`ModelError::Tensor`] for types that are not read, and for I2_S with codes that are no trit,
    /// about which its decoders disagree.
    pub fn to_f32(&self) -> Result<Vec<f32>, ModelError> {
        self.check_len()?;
        let data = &*self.data;
        Ok(match self.info.encoding {
            Encoding::F32 => data.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
            Encoding::F16 => data.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b).to_f32()).collect(),
            Encoding::BF16 => data.as_chunks().0.iter().map(|&b| bf16::from_le_bytes(b).to_f32()).collect(),
            Encoding::U8 => data.iter().map(|&b| f32::from(b)).collect(),
            Encoding::I8 => data.iter().map(|&b| f32::from(b as i8)).collect(),
            Encoding::Q8_0 => {
                let blocks = data.chunks_exact(34);
                blocks
                    .flat_map(|block| {
                        let d = f16_at(block, 0);
                        block[2..].iter().map(move |&q| d * f32::from(q as i8))
                    })
                    .collect()
            }
            Encoding::TQ1_0 | Encoding::TQ2_0 => {
                let mut out = vec![0.0; self.info.element_count()];
                let mut codes = [0u8; TQ_BLOCK / 4];
                for (block, out) in self.tq_blocks().zip(out.chunks_exact_mut(TQ_BLOCK)) {
                    let d = self.tq_block(block, &mut codes);
                    scaled_codes(&codes, d, out);
                }
                out
            }
            Encoding::I2S | Encoding::Trit2 => {
                let matrix = self.to_ternary()?;
                let mut out = vec![0.0; self.info.element_count()];
                for (r, row) in out.chunks_exact_mut(matrix.cols().max(1)).enumerate() {
                    matrix.dequantize_row(r, row);
                }
                out
            }
            Encoding::Other(_) => return Err(self.not_read()),
        })
    }

    /// The matrix of a float tensor, in the precision it is stored in.
    ///
    /// # Errors
    /// [`ModelError::Tensor`] if it is no matrix or no float type (F32, F16, BF16, Q8_0).
    pub fn to_dense(&self) -> Result<DenseMatrix, ModelError> {
        self.check_len()?;
        let (rows, cols) = self.matrix_shape()?;
        let data = &*self.data;
        let data = match self.info.encoding {
            Encoding::F32 => DenseData::F32(self.to_f32()?),
            Encoding::F16 => {
                DenseData::F16(data.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b)).collect())
            }
            Encoding::BF16 => {
                DenseData::BF16(data.as_chunks().0.iter().map(|&b| bf16::from_le_bytes(b)).collect())
            }
            Encoding::Q8_0 => DenseData::Q8_0(data.to_vec()),
            _ => {
                let what = format!("is {}, but a float matrix is expected", self.info.encoding);
                return Err(self.error(what));
            }
        };
        DenseMatrix::new(rows, cols, data).map_err(|e| self.error(e.to_string()))
    }

    /// The matrix of a ternary tensor (TQ1_0, TQ2_0, I2_S, Trit2).
    ///
    /// TQ types keep a scale per 256 weights; where all blocks with a weight other than 0 have the same,
    /// it is the tensor's scale. Weights of a block with scale 0 are 0, whatever their codes.
    ///
    /// # Errors
    /// [`ModelError::Tensor`] if it is no matrix or not ternary, has a scale that is no finite number, or
    /// codes that are no trit (with their count).
    pub fn to_ternary(&self) -> Result<TernaryMatrix, ModelError> {
        self.check_len()?;
        let (rows, cols) = self.matrix_shape()?;
        let (codes, scales) = match self.info.encoding {
            Encoding::TQ1_0 | Encoding::TQ2_0 => self.tq_codes()?,
            Encoding::I2S => {
                let (stored, tail) = self.data.split_at(self.data.len() - 32);
                let mut codes = vec![0; stored.len()];
                for (stored, out) in stored.chunks_exact(32).zip(codes.chunks_exact_mut(32)) {
                    gather_quarters(stored, [6, 4, 2, 0], out);
                }
                (codes, self.tensor_scale(tail)?)
            }
            Encoding::Trit2 => {
                let (codes, scale) = self.data.split_at(self.data.len() - 4);
                (codes.to_vec(), self.tensor_scale(scale)?)
            }
            _ => {
                let what = format!("is {}, but a ternary tensor is expected", self.info.encoding);
                return Err(self.error(what));
            }
        };
        TernaryMatrix::new(rows, cols, codes, scales).map_err(|e| self.error(e.to_string()))
    }

    /// The matrix of a tensor of plain numbers that are all −1, 0 or +1, with `scale` for all.
    ///
    /// # Errors
    /// [`ModelError::Tensor`] with the count and first place of other values.
    pub fn trits_to_ternary(&self, scale: f32) -> Result<TernaryMatrix, ModelError> {
        let (rows, cols) = self.matrix_shape()?;
        let values = self.to_f32()?;
        let is_trit = |v: &f32| *v == 0.0 || v.abs() == 1.0;
        let bad = values.iter().filter(|v| !is_trit(v)).count();
        if let Some(first) = values.iter().position(|v| !is_trit(v)) {
            return Err(self.error(format!(
                "{bad} values are not -1, 0 or 1 (the first is {}, at row {}, column {})",
                values[first],
                first / cols,
                first % cols
            )));
        }
        let trits: Vec<i8> = values.into_iter().map(|v| v as i8).collect();
        let matrix = TernaryMatrix::from_trits(rows, cols, &trits, Scales::Tensor(scale));
        matrix.map_err(|e| self.error(e.to_string()))
    }

    fn tensor_scale(&self, bytes: &[u8]) -> Result<Scales, ModelError> {
        let scale = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        if !scale.is_finite() {
            return Err(self.error(format!("its scale is {scale}, which is no finite number")));
        }
        Ok(Scales::Tensor(scale))
    }

    fn tq_blocks(&self) -> std::slice::ChunksExact<'_, u8> {
        let bytes = if self.info.encoding == Encoding::TQ1_0 { 54 } else { 66 };
        self.data.chunks_exact(bytes)
    }

    /// Canonical codes of one block; returns its scale.
    fn tq_block(&self, block: &[u8], codes: &mut [u8]) -> f32 {
        let (stored, scale) = block.split_at(block.len() - 2);
        match self.info.encoding {
            Encoding::TQ1_0 => tq1_codes(stored, codes),
            _ => tq2_codes(stored, codes),
        }
        f16_at(scale, 0)
    }

    fn tq_codes(&self) -> Result<(Vec<u8>, Scales), ModelError> {
        let count = self.info.element_count();
        let mut codes = vec![0u8; count / 4];
        let mut values = Vec::with_capacity(count / TQ_BLOCK);
        let (mut common, mut uniform) = (None, true);
        let blocks = self.tq_blocks().zip(codes.chunks_exact_mut(TQ_BLOCK / 4));
        for (index, (block, codes)) in blocks.enumerate() {
            let d = self.tq_block(block, codes);
            if !d.is_finite() {
                let what = format!("block {index} has scale {d}, which is no finite number");
                return Err(self.error(what));
            }
            if d == 0.0 {
                codes.fill(ZEROS);
            } else if codes.iter().any(|&byte| byte != ZEROS) {
                uniform &= *common.get_or_insert(d) == d;
            }
            values.push(d);
        }
        let scales = match common {
            _ if !uniform => Scales::Block { rows: 1, cols: TQ_BLOCK, values },
            Some(scale) => Scales::Tensor(scale),
            None => Scales::Tensor(1.0), // All weights are 0: any scale is right, and 1 can be divided by.
        };
        Ok((codes, scales))
    }
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
            let (fours, rest) = stored.as_chunks::<4>();
            let mut last = [0u8; 4];
            last[..rest.len()].copy_from_slice(rest);
            let fours = fours.iter().chain((!rest.is_empty()).then_some(&last));
            for (out, &four) in codes.iter_mut().zip(fours) {
                *out = gather(four, 2 * quarter);
            }
        }
    }
    TernaryMatrix::new(out, cols, codes, Scales::Tensor(value)).map_err(|e| packed.error(e.to_string()))
}
