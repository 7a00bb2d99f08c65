//! The bytes of one output tensor, and what was lost in them.

use std::collections::BTreeMap;

use half::slice::HalfFloatSliceExt;
use setun_kernels::dense::{DenseData, DenseMatrix};
use setun_kernels::matrix::{Scales, TernaryMatrix};

use super::plan::{Item, Part, Planned, interleave};
use super::{Job, MaxError};
use crate::error::ModelError;
use crate::format::{
    Encoding, ScaleConvention, Scaling, Tensor, TensorSpec, encode_floats, encode_hf_packed, encode_ternary,
};
use crate::model::Role;
use crate::weights::Weight;

/// Rows that are converted at a time.
const ROWS: usize = 64;

pub(super) struct Encoder<'a> {
    job: &'a Job<'a>,
    pub convention: ScaleConvention,
    /// Largest error by canonical name, where there is one.
    pub errors: BTreeMap<String, f32>,
    /// Largest relative change of a ternary scale.
    pub scale_error: f32,
}

impl<'a> Encoder<'a> {
    pub(super) fn new(job: &'a Job<'a>) -> Self {
        Self { job, convention: ScaleConvention::Multiply, errors: BTreeMap::new(), scale_error: 0.0 }
    }

    pub(super) fn max_error(&self) -> Option<MaxError> {
        let (tensor, &error) = self.errors.iter().max_by(|a, b| a.1.total_cmp(b.1))?;
        Some(MaxError { tensor: tensor.clone(), error })
    }

    pub(super) fn encode(&mut self, item: &Item) -> Result<Vec<u8>, ModelError> {
        let (spec, job) = (&item.spec, self.job);
        let bytes = match &item.part {
            Part::Given(values) => encode_floats(&spec.name, values, values.len(), &spec.encoding)?,
            Part::Scale(index) => self.packed(&job.planned[*index], &spec.encoding)?.1,
            Part::Tensor(index) => self.tensor(&job.planned[*index], &spec.encoding)?,
            Part::Stack(indices) => {
                let mut bytes = Vec::with_capacity(spec.encoding.byte_len(&spec.shape).unwrap_or(0));
                for &index in indices {
                    bytes.extend(self.tensor(&job.planned[index], &spec.encoding)?);
                }
                bytes
            }
        };
        let tail = if spec.encoding == Encoding::I2S { 32 } else { 0 };
        Ok(match item.interleave {
            Some(heads) => interleave(&bytes, spec.shape[0], heads, job.config.rope.rotary_dim, tail),
            None => bytes,
        })
    }

    /// The bytes of one planned tensor.
    fn tensor(&mut self, planned: &Planned, to: &Encoding) -> Result<Vec<u8>, ModelError> {
        let job = self.job;
        match (planned.role, planned.ternary) {
            (None, _) => {
                let mut values = job.weights().vector(&planned.name, planned.shape[0])?;
                self.unscale_bias(&planned.name, &mut values)?;
                self.floats(planned, &values, values.len(), to)
            }
            (Some(_), true) if *to == Encoding::U8 => Ok(self.packed(planned, &Encoding::F32)?.0),
            (Some(role), true) => self.ternary(&read_ternary(job, planned, role)?, planned, to),
            (Some(role), false) => {
                match job.weights().matrix(&planned.name, planned.shape[0], planned.shape[1], role)? {
                    Weight::Dense(matrix) => self.dense(&matrix, planned, to),
                    Weight::Ternary(_) => Err(unexpected(planned)),
                }
            }
        }
    }

    fn scaling(&self) -> Scaling {
        if self.job.options.lossy { Scaling::Round } else { Scaling::Exact }
    }

    fn ternary(
        &mut self,
        matrix: &TernaryMatrix,
        planned: &Planned,
        to: &Encoding,
    ) -> Result<Vec<u8>, ModelError> {
        if to.is_ternary() {
            let bytes =
                encode_ternary(&planned.name, matrix, to, self.scaling()).map_err(|error| match to {
                    Encoding::I2S => advise(error, "tq1_0 and tq2_0 hold a scale per 256 weights of a row, pq2_0 and ptq1_0 per 128, q2_0 per 64"),
                    _ => advise(error, "i2_s keeps any single scale, q2_0, pq2_0 and ptq1_0 keep scales of smaller groups, and --lossy allows rounding"),
                })?;
            if *to != Encoding::I2S && self.job.options.lossy {
                let each: &[f32] = match matrix.scales() {
                    Scales::Tensor(scale) => std::slice::from_ref(scale),
                    Scales::Row(values) | Scales::Block { values, .. } => values,
                };
                let change = each.iter().map(|&s| (half::f16::from_f32(s).to_f32() - s).abs() / s);
                self.scale_error = change.fold(self.scale_error, f32::max);
            }
            return Ok(bytes);
        }
        // Float copies of weight-only models are plain floats to their readers, which look for no scale.
        let one = matches!(matrix.scales(), Scales::Tensor(_));
        if !one && !self.job.is_weight_only() {
            return Err(ModelError::CannotEncode {
                name: planned.name.clone(),
                encoding: "floats".into(),
                why: "it has more than one scale, which readers of float copies do not expect: use tq2_0"
                    .into(),
            });
        }
        let mut values = vec![0.0; matrix.rows() * matrix.cols()];
        for (row, out) in values.chunks_mut(matrix.cols().max(1)).enumerate() {
            matrix.dequantize_row(row, out);
        }
        let before = self.errors.get(&planned.name).copied();
        let bytes = self.floats(planned, &values, matrix.cols(), to)?;
        let after = self.errors.get(&planned.name).copied();
        if after != before && !self.job.options.lossy {
            return Err(ModelError::CannotEncode {
                name: planned.name.clone(),
                encoding: "floats".into(),
                why: format!(
                    "its scale is not a number that {to} has, so weights would be off by {}: use f32 or i2_s, or allow \
                     it (--lossy)",
                    after.unwrap_or_default()
                ),
            });
        }
        Ok(bytes)
    }

    /// Codes and the scale beside them, that in the type `scale`.
    fn packed(&mut self, planned: &Planned, scale: &Encoding) -> Result<(Vec<u8>, Vec<u8>), ModelError> {
        let matrix = read_ternary(self.job, planned, Role::Ternary)?;
        let done = encode_hf_packed(&planned.name, &matrix, self.convention, scale, self.scaling());
        let done = done.map_err(|error| match self.convention {
            ScaleConvention::Divide => advise(error, "--scales multiply keeps any scale"),
            ScaleConvention::Multiply => error,
        })?;
        if let (Scales::Tensor(scale), &[a, b, c, d]) = (matrix.scales(), &done.1[..]) {
            let stored = f32::from_le_bytes([a, b, c, d]);
            let read = if self.convention == ScaleConvention::Divide { 1.0 / stored } else { stored };
            self.scale_error = self.scale_error.max((read - scale).abs() / scale);
        }
        Ok(done)
    }

    fn dense(
        &mut self,
        matrix: &DenseMatrix,
        planned: &Planned,
        to: &Encoding,
    ) -> Result<Vec<u8>, ModelError> {
        // Same type: the bytes themselves, NaN payloads included.
        match (matrix.data(), to) {
            (DenseData::F32(values), Encoding::F32) => {
                return encode_floats(&planned.name, values, matrix.cols(), to);
            }
            (DenseData::F16(values), Encoding::F16) => return Ok(le_bytes(values.reinterpret_cast())),
            (DenseData::BF16(values), Encoding::BF16) => return Ok(le_bytes(values.reinterpret_cast())),
            (DenseData::Q8_0(bytes), Encoding::Q8_0) => return Ok(bytes.clone()),
            _ => {}
        }
        let (rows, cols) = (matrix.rows(), matrix.cols());
        let mut out = Vec::with_capacity(to.byte_len(&[rows, cols]).unwrap_or(0));
        let mut values = vec![0.0; ROWS * cols];
        for first in (0..rows).step_by(ROWS) {
            let values = &mut values[..ROWS.min(rows - first) * cols];
            for (row, out) in (first..).zip(values.chunks_mut(cols)) {
                matrix.row_f32(row, out);
            }
            out.extend(self.floats(planned, values, cols, to)?);
        }
        Ok(out)
    }

    /// Encodes floats and remembers the largest error.
    fn floats(
        &mut self,
        planned: &Planned,
        values: &[f32],
        cols: usize,
        to: &Encoding,
    ) -> Result<Vec<u8>, ModelError> {
        let bytes = encode_floats(&planned.name, values, cols, to)?;
        if *to != Encoding::F32 {
            let shape = vec![values.len() / cols.max(1), cols];
            let spec = TensorSpec { name: planned.name.clone(), shape, encoding: to.clone() };
            let read = Tensor::new(spec, &bytes[..]).to_f32()?;
            let error = values.iter().zip(&read).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            if error > 0.0 {
                let largest = self.errors.entry(planned.name.clone()).or_insert(0.0);
                *largest = largest.max(error);
            }
        }
        Ok(bytes)
    }

    /// `autobitlinear` multiplies the bias by the scale too, so what is stored is divided by it.
    fn unscale_bias(&self, name: &str, values: &mut [f32]) -> Result<(), ModelError> {
        let huggingface = self.job.options.target == super::Target::HuggingFace;
        let Some(module) = name.strip_suffix(".bias") else { return Ok(()) };
        let matrix = format!("{module}.weight");
        let planned = self.job.planned.iter().find(|p| p.name == matrix && p.ternary);
        let (Some(planned), true, ScaleConvention::Multiply) = (planned, huggingface, self.convention) else {
            return Ok(());
        };
        let matrix = read_ternary(self.job, planned, Role::Ternary)?;
        let Scales::Tensor(scale) = *matrix.scales() else { return Ok(()) };
        for value in values {
            let quotient = *value / scale;
            let near = (-2i32..=2).map(|step| f32::from_bits(quotient.to_bits().wrapping_add_signed(step)));
            let exact = [quotient].into_iter().chain(near).find(|q| q * scale == *value);
            *value = match exact {
                Some(stored) => stored,
                None if self.job.options.lossy => quotient,
                None => {
                    let why = format!("no number times the scale {scale} is {value}: use --scales divide");
                    return Err(ModelError::CannotEncode {
                        name: name.into(),
                        encoding: "a scaled bias".into(),
                        why,
                    });
                }
            };
        }
        Ok(())
    }
}

pub(super) fn read_ternary(job: &Job, planned: &Planned, role: Role) -> Result<TernaryMatrix, ModelError> {
    match job.weights().matrix(&planned.name, planned.shape[0], planned.shape[1], role)? {
        Weight::Ternary(matrix) => Ok(matrix),
        Weight::Dense(_) => Err(unexpected(planned)),
    }
}

/// The plan and the reader decide alike; this says so should they ever differ.
fn unexpected(planned: &Planned) -> ModelError {
    ModelError::tensor(&planned.name, "its values are not of the kind that its header announces")
}

fn le_bytes(words: &[u16]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

fn advise(error: ModelError, advice: &str) -> ModelError {
    match error {
        ModelError::CannotEncode { name, encoding, why } => {
            ModelError::CannotEncode { name, encoding, why: format!("{why}; {advice}") }
        }
        other => other,
    }
}
