//! From a tensor's bytes to floats, dense matrices and ternary matrices.
//!
//! The layouts are in the files beside this one: `dense_blocks` and `k_quants` for floats in few bits,
//! `ternary_blocks` for GGUF's ternary types, `hf_packed` and `mlx` for ternary weights in safetensors,
//! `tl` for TL1 and TL2, `fake_quant` for ternary weights kept as floats.

mod dense_blocks;
mod fake_quant;
mod hf_packed;
mod k_quants;
mod mlx;
mod ternary_blocks;
mod tl;

use std::borrow::Cow;
use std::ops::Range;

use half::vec::HalfBitsVecExt;
use half::{bf16, f16};
use setun_kernels::advise_huge_pages;
use setun_kernels::dense::{DenseData, DenseMatrix};
use setun_kernels::matrix::{Scales, TernaryMatrix};
use setun_kernels::threads::Pool;

pub(crate) use fake_quant::Sample;
pub use hf_packed::{ScaleConvention, hf_packed_to_ternary};
pub use mlx::mlx_to_ternary;
use ternary_blocks::Unit;
pub(crate) use tl::Tl;

use super::tensor::{Encoding, Rewrite, Tensor, TensorInfo};
use crate::error::ModelError;

/// Four canonical codes that are all 1: four zero weights.
pub(super) const ZEROS: u8 = 0b01_01_01_01;

/// The codes at bits `shift` and `shift + 1` of four bytes, as one byte, lowest bits first.
fn gather(bytes: [u8; 4], shift: usize) -> u8 {
    let codes = (u32::from_le_bytes(bytes) >> shift) & 0x0303_0303;
    (codes | codes >> 6 | codes >> 12 | codes >> 18) as u8
}

/// One row of canonical bytes from as many bytes as it has weights, each with its code at bit `shift`.
fn gather_row(stored: &[u8], shift: usize, out: &mut [u8]) {
    let (fours, rest) = stored.as_chunks::<4>();
    let mut last = [0u8; 4];
    last[..rest.len()].copy_from_slice(rest);
    let fours = fours.iter().chain((!rest.is_empty()).then_some(&last));
    for (out, &four) in out.iter_mut().zip(fours) {
        *out = gather(four, shift);
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

/// Swaps the codes 0 and 2, which changes every weight's sign. Fourth codes stay, to be counted later.
fn negate(codes: &mut [u8]) {
    codes.iter_mut().for_each(|byte| *byte ^= (!*byte & ZEROS) << 1);
}

fn f16_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// Bytes of decoded weights that a thread makes at a time, about.
const CHUNK: usize = 1 << 18;

/// `convert` of every `N` bytes, in memory that is touched by the threads that fill it only.
fn numbers<const N: usize, T: Copy + Default + Send>(
    data: &[u8],
    mut out: Vec<T>,
    convert: impl Fn([u8; N]) -> T + Sync,
    pool: &Pool,
) -> Vec<T> {
    advise_huge_pages(&mut out);
    pool.run_chunks_mut(&mut out, CHUNK, |chunk, out| {
        let stored = data[chunk * CHUNK * N..].as_chunks::<N>().0;
        out.iter_mut().zip(stored).for_each(|(out, &bytes)| *out = convert(bytes));
    });
    out
}

/// Decodes blocks of `B` bytes into `N` floats each.
fn blocks<const B: usize, const N: usize>(
    data: &[u8],
    count: usize,
    decode: fn(&[u8; B], &mut [f32; N]),
) -> Vec<f32> {
    let mut out = vec![0.0; count];
    let pairs = data.as_chunks::<B>().0.iter().zip(out.as_chunks_mut::<N>().0);
    pairs.for_each(|(block, out)| decode(block, out));
    out
}

impl Tensor<'_> {
    fn error(&self, what: impl Into<String>) -> ModelError {
        ModelError::tensor(self.name(), what)
    }

    /// Checks that the type is read and that there are as many bytes as encoding and shape need.
    fn check_len(&self) -> Result<(), ModelError> {
        match &self.info.encoding {
            Encoding::Other(name) => {
                return Err(self.error(format!("type {name} is not read: {} are", Encoding::READABLE)));
            }
            Encoding::Undecided { why, .. } => return Err(self.error(*why)),
            _ => {}
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

    /// Rows `rows` of the tensor, as a matrix that borrows its bytes: leading dimensions are taken for one, so that matrix `i` of
    /// a stack `[_, n, cols]` is rows `i * n` to `(i + 1) * n`.
    ///
    /// # Errors
    /// [`ModelError::Tensor`] if there are no such rows, for types that are not read, and for I2_S, which keeps one scale behind
    /// all rows.
    pub fn rows(&self, rows: Range<usize>) -> Result<Tensor<'_>, ModelError> {
        self.check_len()?;
        let [.., cols] = *self.shape() else { return Err(self.error("it is one number, which has no rows")) };
        let row_bytes = match &self.info.encoding {
            Encoding::I2S | Encoding::I2SNeon | Encoding::I2SRows4 | Encoding::Trit2 => {
                let encoding = &self.info.encoding;
                let what = format!(
                    "it is {encoding}, which has one scale for a whole tensor, but a stack of matrices with a scale each is \
                     expected: convert the model from its original to another type"
                );
                return Err(self.error(what));
            }
            encoding => encoding.byte_len(&[1, cols]).unwrap_or(0),
        };
        let bytes = rows.start.saturating_mul(row_bytes)..rows.end.saturating_mul(row_bytes);
        let Some(data) = self.data.get(bytes.clone()).filter(|_| rows.start <= rows.end) else {
            return Err(self.error(format!("rows {} to {} are outside it", rows.start, rows.end)));
        };
        let start = self.info.range.start;
        let info = TensorInfo {
            name: self.info.name.clone(),
            shape: vec![rows.len(), cols],
            encoding: self.info.encoding.clone(),
            file: self.info.file,
            range: start + bytes.start..start + bytes.end,
            rewrite: Rewrite::None,
        };
        Ok(Tensor { info: Cow::Owned(info), data: Cow::Borrowed(data) })
    }

    /// `(rows, cols)` of a matrix.
    fn matrix_shape(&self) -> Result<(usize, usize), ModelError> {
        match *self.shape() {
            [rows, cols] => Ok((rows, cols)),
            _ => Err(self.error(format!("has shape {:?}, but a matrix is expected", self.shape()))),
        }
    }

    /// Every element as an f32, row-major: exactly the number that the type defines, with f32 arithmetic in the
    /// types with several scales. Codes that are no trit decode as their formats say: twice the scale.
    ///
    /// # Errors
    /// [`ModelError::Tensor`] for types that are not read, and for I2_S with codes that are no trit,
    /// about which its decoders disagree.
    pub fn to_f32(&self) -> Result<Vec<f32>, ModelError> {
        self.check_len()?;
        let (data, count) = (&*self.data, self.info.element_count());
        Ok(match &self.info.encoding {
            Encoding::F32 => data.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
            Encoding::F16 => data.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b).to_f32()).collect(),
            Encoding::BF16 => data.as_chunks().0.iter().map(|&b| bf16::from_le_bytes(b).to_f32()).collect(),
            Encoding::U8 => data.iter().map(|&b| f32::from(b)).collect(),
            Encoding::I8 => data.iter().map(|&b| f32::from(b as i8)).collect(),
            Encoding::Q4_0 => blocks(data, count, dense_blocks::q4_0),
            Encoding::Q4_1 => blocks(data, count, dense_blocks::q4_1),
            Encoding::Q5_0 => blocks(data, count, dense_blocks::q5_0),
            Encoding::Q5_1 => blocks(data, count, dense_blocks::q5_1),
            Encoding::Q8_0 => blocks(data, count, dense_blocks::q8_0),
            Encoding::IQ4NL => blocks(data, count, dense_blocks::iq4_nl),
            Encoding::MXFP4 => blocks(data, count, dense_blocks::mxfp4),
            Encoding::Q2K => blocks(data, count, k_quants::q2_k),
            Encoding::Q3K => blocks(data, count, k_quants::q3_k),
            Encoding::Q4K => blocks(data, count, k_quants::q4_k),
            Encoding::Q5K => blocks(data, count, k_quants::q5_k),
            Encoding::Q6K => blocks(data, count, k_quants::q6_k),
            Encoding::I2S | Encoding::I2SNeon | Encoding::I2SRows4 | Encoding::Trit2 => {
                let matrix = self.to_ternary()?;
                let mut out = vec![0.0; count];
                for (r, row) in out.chunks_exact_mut(matrix.cols().max(1)).enumerate() {
                    matrix.dequantize_row(r, row);
                }
                out
            }
            encoding => {
                let cols = self.shape().last().copied().unwrap_or(1);
                let unit = Unit::of(encoding, cols).expect("`check_len` refuses types that are not read");
                let mut out = vec![0.0; count];
                let mut codes = vec![0; unit.weights / 4];
                let outs = out.chunks_exact_mut(unit.weights.max(1));
                for (stored, out) in data.chunks_exact(unit.bytes).zip(outs) {
                    let scale = unit.read(stored, &mut codes);
                    scaled_codes(&codes, scale, out);
                }
                out
            }
        })
    }

    /// The matrix of a float tensor: in the precision it is stored in for F32, F16, BF16, Q8_0 and Q4_0, as F32 for
    /// the other block types, whose values no narrower type holds.
    ///
    /// # Errors
    /// [`ModelError::Tensor`] if it is no matrix or no float type.
    pub fn to_dense(&self) -> Result<DenseMatrix, ModelError> {
        self.to_dense_on(&Pool::new(1))
    }

    /// [`to_dense`](Self::to_dense) on all threads of `pool`.
    ///
    /// # Errors
    /// As [`to_dense`](Self::to_dense).
    pub fn to_dense_on(&self, pool: &Pool) -> Result<DenseMatrix, ModelError> {
        self.check_len()?;
        let (rows, cols) = self.matrix_shape()?;
        let data = &*self.data;
        // Zeros of plain integers are memory that the system gives untouched; those of `f16` would be written first.
        let halves = || numbers(data, vec![0u16; data.len() / 2], u16::from_le_bytes, pool);
        let bytes = || numbers(data, vec![0u8; data.len()], |[b]| b, pool);
        let data = match &self.info.encoding {
            Encoding::F16 => DenseData::F16(halves().reinterpret_into::<f16>()),
            Encoding::BF16 => DenseData::BF16(halves().reinterpret_into::<bf16>()),
            Encoding::Q8_0 => DenseData::Q8_0(bytes()),
            // A row that is no whole number of blocks cannot be multiplied from them.
            Encoding::Q4_0 if cols.is_multiple_of(32) => DenseData::Q4_0(bytes()),
            Encoding::F32 => {
                DenseData::F32(numbers(data, vec![0f32; data.len() / 4], f32::from_le_bytes, pool))
            }
            encoding if encoding.is_float() => DenseData::F32(self.to_f32()?),
            encoding => return Err(self.error(format!("is {encoding}, but a float matrix is expected"))),
        };
        DenseMatrix::new(rows, cols, data).map_err(|e| self.error(e.to_string()))
    }

    /// The matrix of a tensor of a ternary type ([`Encoding::is_ternary`]; Q1_0 gives one without zeros).
    ///
    /// Scales of blocks or rows become the tensor's where all that have a weight other than 0 are equal, and stay
    /// one per block or row otherwise. Weights under a scale of 0 are 0, whatever their codes. A negative
    /// scale changes the signs of its weights and is kept as its absolute value, so scales are never negative.
    ///
    /// # Errors
    /// [`ModelError::Tensor`] if it is no matrix or not ternary, has a scale that is no finite number, or
    /// codes that are no trit (with their count).
    pub fn to_ternary(&self) -> Result<TernaryMatrix, ModelError> {
        self.to_ternary_on(&Pool::new(1))
    }

    /// [`to_ternary`](Self::to_ternary) on all threads of `pool`.
    ///
    /// # Errors
    /// As [`to_ternary`](Self::to_ternary).
    pub fn to_ternary_on(&self, pool: &Pool) -> Result<TernaryMatrix, ModelError> {
        self.check_len()?;
        let (rows, cols) = self.matrix_shape()?;
        let (codes, scales) = match &self.info.encoding {
            Encoding::Trit2 => {
                let (codes, scale) = self.data.split_at(self.data.len() - 4);
                self.one_scale(codes.to_vec(), scale)?
            }
            encoding @ (Encoding::I2S | Encoding::I2SNeon | Encoding::I2SRows4) => {
                let (stored, tail) = self.data.split_at(self.data.len() - 32);
                let row_bytes = cols.div_ceil(4).max(1);
                let mut codes = vec![0; rows * cols.div_ceil(4)];
                // A multiple of the four rows that may be interleaved, of `4 * rows` stored columns.
                let rows = 4 * (CHUNK / (4 * row_bytes)).max(1);
                pool.run_chunks_mut(&mut codes, rows * row_bytes, |chunk, codes| match encoding {
                    Encoding::I2S => ternary_blocks::i2_s(&stored[chunk * rows * row_bytes..], codes),
                    Encoding::I2SNeon => {
                        ternary_blocks::i2_s_neon(&stored[chunk * rows * row_bytes..], codes)
                    }
                    _ => ternary_blocks::i2_s_rows4(&stored[chunk * rows / 4 * cols..], cols, codes),
                });
                self.one_scale(codes, tail)?
            }
            encoding => match Unit::of(encoding, cols) {
                Some(unit) => self.unit_scales(&unit, rows, cols, pool)?,
                None => {
                    let what = format!("is {encoding}, but a ternary tensor is expected");
                    return Err(self.error(what));
                }
            },
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

    /// Canonical codes under the one f32 scale at the start of `scale`.
    fn one_scale(&self, mut codes: Vec<u8>, scale: &[u8]) -> Result<(Vec<u8>, Scales), ModelError> {
        let scale = f32::from_le_bytes([scale[0], scale[1], scale[2], scale[3]]);
        if !scale.is_finite() {
            return Err(self.error(format!("its scale is {scale}, which is no finite number")));
        }
        if scale < 0.0 {
            negate(&mut codes);
        }
        Ok((codes, Scales::Tensor(scale.abs())))
    }

    /// Canonical codes and scales of a type with a scale per block or row.
    fn unit_scales(
        &self,
        unit: &Unit,
        rows: usize,
        cols: usize,
        pool: &Pool,
    ) -> Result<(Vec<u8>, Scales), ModelError> {
        let mut codes = vec![0u8; rows * cols / 4];
        let units = (CHUNK / unit.bytes).max(1);
        let outs = codes.chunks_mut((units * unit.weights / 4).max(1));
        let mut parts: Vec<_> = self
            .data
            .chunks(units * unit.bytes)
            .zip(outs)
            .map(|piece| (piece, Ok(ScaleCollector::default())))
            .collect();
        pool.run_items(parts.iter_mut().collect(), |_, ((stored, codes), found)| {
            let mut scales = ScaleCollector::default();
            let outs = codes.chunks_exact_mut((unit.weights / 4).max(1));
            for (index, (stored, codes)) in stored.chunks_exact(unit.bytes).zip(outs).enumerate() {
                let d = unit.read(stored, codes);
                if !d.is_finite() {
                    *found = Err((index, d));
                    return;
                }
                scales.push(d, codes);
            }
            *found = Ok(scales);
        });
        let mut scales = ScaleCollector::default();
        for (part, (_, found)) in parts.into_iter().enumerate() {
            scales.append(found.map_err(|(index, d)| {
                let index = part * units + index;
                self.error(format!("{} {index} has scale {d}, which is no finite number", unit.name))
            })?);
        }
        Ok((codes, scales.finish(unit.weights, cols)))
    }
}

/// Scales of consecutive weights of a row, in the form that matrices are to have.
#[derive(Default)]
struct ScaleCollector {
    values: Vec<f32>,
    common: Option<f32>,
    mixed: bool,
}

impl ScaleCollector {
    /// Takes the next scale, a finite number, and makes its weights' canonical codes what they are under one
    /// that is not negative.
    fn push(&mut self, scale: f32, codes: &mut [u8]) {
        if scale < 0.0 {
            negate(codes);
        }
        let scale = scale.abs();
        if scale == 0.0 {
            codes.fill(ZEROS);
        } else if codes.iter().any(|&byte| byte != ZEROS) {
            self.mixed |= *self.common.get_or_insert(scale) != scale;
        }
        self.values.push(scale);
    }

    /// Takes the scales that another collector was given after this one's.
    fn append(&mut self, other: Self) {
        self.mixed |= other.mixed;
        if let Some(scale) = other.common {
            self.mixed |= *self.common.get_or_insert(scale) != scale;
        }
        self.values.extend(other.values);
    }

    /// The scales of a matrix of `cols` columns, one having been given for every `weights` of a row.
    fn finish(self, weights: usize, cols: usize) -> Scales {
        match self.common {
            _ if self.mixed && weights == cols => Scales::Row(self.values),
            _ if self.mixed => Scales::Block { rows: 1, cols: weights, values: self.values },
            Some(scale) => Scales::Tensor(scale),
            None => Scales::Tensor(1.0), // All weights are 0: any scale is right, and 1 can be divided by.
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::TensorSpec;

    #[test]
    fn negating_swaps_the_signs_and_keeps_zeros_and_fourth_codes() {
        let mut codes = [0b11_10_01_00u8];
        negate(&mut codes);
        assert_eq!(codes, [0b11_00_01_10]);
        negate(&mut codes);
        assert_eq!(codes, [0b11_10_01_00]);
    }

    #[test]
    fn a_row_is_gathered_to_its_last_column() {
        let mut out = [0u8; 2];
        gather_row(&[0b10_0000, 0b01_0000, 0, 0b11_0000, 0b10_0000], 4, &mut out);
        assert_eq!(out, [0b11_00_01_10, 0b10]);
    }

    #[test]
    fn rows_of_a_stack_are_the_rows_of_the_whole_in_every_type() {
        let mut state = 3u32;
        let mut byte = || {
            state = state.wrapping_mul(1664525).wrapping_add(1013904223);
            (state >> 24) as u8
        };
        let blocks = [
            Encoding::F32,
            Encoding::BF16,
            Encoding::I8,
            Encoding::Q4_0,
            Encoding::Q8_0,
            Encoding::Q4K,
            Encoding::Q6K,
            Encoding::Q1_0,
            Encoding::Q2_0G64,
            Encoding::Q2_0G128,
            Encoding::PQ2_0,
            Encoding::PTQ1_0,
            Encoding::TQ1_0,
            Encoding::TQ2_0,
            Encoding::IQ1BN,
            Encoding::IQ2BN,
        ];
        for encoding in blocks {
            let (shape, cols) = (vec![3, 4, 512], 512);
            let bytes: Vec<u8> = (0..encoding.byte_len(&shape).unwrap()).map(|_| byte()).collect();
            let spec = TensorSpec { name: "t".into(), shape, encoding: encoding.clone() };
            let stack = Tensor::new(spec, bytes);
            let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
            let whole = bits(stack.to_f32().unwrap());
            for (from, to) in [(0, 4), (4, 8), (8, 12), (5, 6), (3, 3)] {
                let part = stack.rows(from..to).unwrap();
                assert_eq!(part.shape(), [to - from, cols]);
                assert_eq!(part.info.range.len(), part.data.len());
                assert_eq!(bits(part.to_f32().unwrap()), whole[from * cols..to * cols], "{encoding}");
            }
            #[allow(clippy::reversed_empty_ranges)]
            for outside in [11..13, 12..usize::MAX, 2..1, usize::MAX..usize::MAX] {
                assert!(stack.rows(outside).unwrap_err().to_string().contains("outside"), "{encoding}");
            }
        }
        let spec = TensorSpec { name: "t".into(), shape: vec![2, 2, 128], encoding: Encoding::I2S };
        let error = Tensor::new(spec, vec![0x55; 128 + 32]).rows(0..2).unwrap_err().to_string();
        assert!(error.contains("one scale"), "{error}");
    }
}
