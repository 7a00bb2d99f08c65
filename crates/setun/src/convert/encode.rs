//! The bytes of one output tensor, in pieces, and what was lost in them.

use std::collections::BTreeMap;
use std::ops::Range;

use half::slice::HalfFloatSliceExt;
use setun_kernels::Kernels;
use setun_kernels::dense::{DenseData, DenseMatrix};
use setun_kernels::matrix::{Scales, TernaryMatrix};

use super::losses::Tally;
use super::plan::{Item, Part, Planned, interleave};
use super::{Job, regroup};
use crate::error::ModelError;
use crate::format::{
    Encoding, ScaleConvention, Scaling, Tensor, TensorSpec, encode_floats, encode_hf_packed, encode_ternary,
};
use crate::model::Role;
use crate::ops::{Direction, Rotate};
use crate::weights::Weight;

/// Floats that are converted at a time.
const PIECE: usize = 1 << 21;

/// Where bytes go.
pub(super) type Sink<'s> = dyn FnMut(&[u8]) -> Result<(), ModelError> + 's;

pub(super) struct Encoder<'a> {
    job: &'a Job<'a>,
    convention: ScaleConvention,
    pub tally: Tally,
    /// Encoded scales of packed layers, from when their codes were made until they are asked for.
    scales: BTreeMap<usize, Vec<u8>>,
}

impl<'a> Encoder<'a> {
    pub(super) fn new(job: &'a Job<'a>, convention: ScaleConvention) -> Self {
        Self { job, convention, tally: Tally::default(), scales: BTreeMap::new() }
    }

    /// Gives the bytes of `item` to `sink`.
    pub(super) fn encode(&mut self, item: &Item, sink: &mut Sink) -> Result<(), ModelError> {
        let (spec, job) = (&item.spec, self.job);
        match &item.part {
            Part::Given(values) => sink(&encode_floats(&spec.name, values, values.len(), &spec.encoding)?),
            Part::Scale(index) => {
                let scale = match self.scales.remove(index) {
                    Some(scale) => scale,
                    None => self.packed(&job.planned[*index], &spec.encoding)?.1,
                };
                sink(&scale)
            }
            Part::Packed(index, scale) => {
                let (codes, scale) = self.packed(&job.planned[*index], scale)?;
                self.scales.insert(*index, scale);
                sink(&codes)
            }
            Part::Verbatim(indices) => {
                let tensor = job.file.tensor(&job.weights().stored_name(&job.planned[indices[0]].name))?;
                for (n, piece) in tensor.data.chunks(4 * PIECE).enumerate() {
                    sink(piece)?;
                    job.file.release_part(&tensor.info, n * 4 * PIECE..n * 4 * PIECE + piece.len());
                }
                Ok(())
            }
            Part::Tensor(index) => self.tensor(item, &job.planned[*index], sink),
            Part::Stack(indices) => {
                indices.iter().try_for_each(|&index| self.tensor(item, &job.planned[index], sink))
            }
        }
    }

    /// The bytes of one planned tensor, which is `item` or one of its stack.
    fn tensor(&mut self, item: &Item, planned: &Planned, sink: &mut Sink) -> Result<(), ModelError> {
        let (spec, job) = (&item.spec, self.job);
        match planned.role {
            None => {
                let mut values = job.weights().vector(&planned.name, planned.shape[0])?;
                self.unscale_bias(&planned.name, &mut values)?;
                let bytes = self.floats(planned, &values, values.len(), &spec.encoding)?;
                sink(&interleaved(item, job, bytes, spec.shape[0]))
            }
            Some(role) if spec.encoding.is_ternary() => {
                let bytes = self.ternary(read_ternary(job, planned, role)?, planned, &spec.encoding)?;
                sink(&interleaved(item, job, bytes, spec.shape[0]))
            }
            Some(role) => self.matrix(item, planned, role, sink),
        }
    }

    fn scaling(&self) -> Scaling {
        if self.job.options.allow_loss { Scaling::Round } else { Scaling::Exact }
    }

    fn ternary(
        &mut self,
        mut matrix: TernaryMatrix,
        planned: &Planned,
        to: &Encoding,
    ) -> Result<Vec<u8>, ModelError> {
        let group = if *to == Encoding::I2S { None } else { Some(to.block_len()) };
        self.regroup(&mut matrix, planned, group)?;
        let bytes = encode_ternary(&planned.name, &matrix, to, self.scaling()).map_err(|error| match to {
            Encoding::I2S => advise(
                error,
                "tq1_0 and tq2_0 hold a scale per 256 weights of a row, pq2_0 and ptq1_0 per 128, q2_0 per 64, and \
                 --allow-loss puts their mean in the place of several",
            ),
            _ => advise(
                error,
                "i2_s keeps any single scale, q2_0, pq2_0 and ptq1_0 keep scales of smaller groups, and --allow-loss \
                 allows rounding",
            ),
        })?;
        if *to != Encoding::I2S && self.job.options.allow_loss {
            let each: &[f32] = match matrix.scales() {
                Scales::Tensor(scale) => std::slice::from_ref(scale),
                Scales::Row(values) | Scales::Block { values, .. } => values,
            };
            let change = each.iter().map(|&s| (half::f16::from_f32(s).to_f32() - s).abs() / s);
            Tally::note(&mut self.tally.scales, &planned.name, change.fold(0.0, f32::max));
        }
        Ok(bytes)
    }

    /// One scale for every `group` weights of a row (or the whole), where that is allowed and there are more.
    fn regroup(
        &mut self,
        matrix: &mut TernaryMatrix,
        planned: &Planned,
        group: Option<usize>,
    ) -> Result<(), ModelError> {
        if self.job.options.allow_loss
            && let Some((merged, change)) = regroup::merged(matrix, group)
        {
            Tally::note(&mut self.tally.groups, &planned.name, change);
            *matrix = TernaryMatrix::new(matrix.rows(), matrix.cols(), matrix.codes().to_vec(), merged)
                .map_err(|e| ModelError::tensor(&planned.name, e.to_string()))?;
        }
        Ok(())
    }

    /// Codes and the scale beside them, that in the type `scale`.
    fn packed(&mut self, planned: &Planned, scale: &Encoding) -> Result<(Vec<u8>, Vec<u8>), ModelError> {
        let mut matrix = read_ternary(self.job, planned, Role::Ternary)?;
        self.regroup(&mut matrix, planned, None)?;
        let done = encode_hf_packed(&planned.name, &matrix, self.convention, scale, self.scaling());
        let done = done.map_err(|error| match self.convention {
            ScaleConvention::Divide => {
                advise(error, "--scales multiply keeps any scale, and --allow-loss allows rounding")
            }
            ScaleConvention::Multiply => error,
        })?;
        if let (Scales::Tensor(scale), &[a, b, c, d]) = (matrix.scales(), &done.1[..]) {
            let stored = f32::from_le_bytes([a, b, c, d]);
            let read = if self.convention == ScaleConvention::Divide { 1.0 / stored } else { stored };
            Tally::note(&mut self.tally.scales, &planned.name, (read - scale).abs() / scale);
        }
        Ok(done)
    }

    /// A matrix as floats, some rows at a time.
    fn matrix(
        &mut self,
        item: &Item,
        planned: &Planned,
        role: Role,
        sink: &mut Sink,
    ) -> Result<(), ModelError> {
        let (job, to) = (self.job, &item.spec.encoding);
        let rows = Rows::open(job, planned, role)?;
        let may_round = !planned.ternary || job.options.allow_loss || job.asked_to_round(planned);
        // Float copies of weight-only models are plain floats to their readers, which look for no scale.
        if let Rows::Ternary { matrix, .. } = &rows
            && !matches!(matrix.scales(), Scales::Tensor(_))
            && !job.is_weight_only()
        {
            let why = "it has more than one scale, which readers of float copies do not expect: use tq2_0";
            return Err(cannot(planned, "floats", why.into()));
        }
        let count = planned.shape[0];
        let unit = item.interleave.map_or(1, |heads| count / heads.max(1)).max(rows.unit());
        let step = (PIECE / planned.shape[1].max(1) / unit.max(1)).max(1) * unit;
        for first in (0..count).step_by(step.max(1)) {
            let part = first..count.min(first + step);
            let length = part.len();
            let bytes = self.rows(&rows, part, planned, to)?;
            sink(&interleaved(item, job, bytes, length))?;
        }
        match self.tally.floats.get(&planned.name) {
            Some((_, error)) if !may_round => {
                let why = format!(
                    "its scale is not a number that {to} has, so weights would be off by {error}: use f32 or i2_s, or allow \
                     it (--allow-loss)"
                );
                Err(cannot(planned, "floats", why))
            }
            _ => Ok(()),
        }
    }

    fn rows(
        &mut self,
        rows: &Rows,
        part: Range<usize>,
        planned: &Planned,
        to: &Encoding,
    ) -> Result<Vec<u8>, ModelError> {
        let cols = planned.shape[1];
        let matrix = match rows {
            Rows::Dense { .. } => rows.dense(part)?,
            Rows::Ternary { .. } => {
                let values = rows.values(part)?;
                return self.floats(planned, &values, cols, to);
            }
        };
        // Same type: the bytes themselves, NaN payloads included.
        match (matrix.data(), to) {
            (DenseData::F32(values), Encoding::F32) => encode_floats(&planned.name, values, cols, to),
            (DenseData::F16(values), Encoding::F16) => Ok(le_bytes(values.reinterpret_cast())),
            (DenseData::BF16(values), Encoding::BF16) => Ok(le_bytes(values.reinterpret_cast())),
            (DenseData::Q8_0(bytes), Encoding::Q8_0) | (DenseData::Q4_0(bytes), Encoding::Q4_0) => {
                Ok(bytes.clone())
            }
            _ => self.floats(planned, &dense_values(&matrix), cols, to),
        }
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
            self.tally.note_floats(&planned.name, to, error);
        }
        Ok(bytes)
    }

    /// `autobitlinear` multiplies the bias by the scale too, so what is stored is divided by it.
    fn unscale_bias(&mut self, name: &str, values: &mut [f32]) -> Result<(), ModelError> {
        let Some(module) = name.strip_suffix(".bias") else { return Ok(()) };
        let matrix = format!("{module}.weight");
        let planned = self.job.planned.iter().find(|p| p.name == matrix && p.ternary);
        let (Some(planned), true, ScaleConvention::Multiply) = (planned, self.job.packs(), self.convention)
        else {
            return Ok(());
        };
        let mut matrix = read_ternary(self.job, planned, Role::Ternary)?;
        self.regroup(&mut matrix, planned, None)?;
        let Scales::Tensor(scale) = *matrix.scales() else { return Ok(()) };
        for value in values {
            let quotient = *value / scale;
            let near = (-2i32..=2).map(|step| f32::from_bits(quotient.to_bits().wrapping_add_signed(step)));
            let exact = [quotient].into_iter().chain(near).find(|q| q * scale == *value);
            match exact {
                Some(stored) => *value = stored,
                None if self.job.options.allow_loss => {
                    let change = (quotient * scale - *value).abs() / value.abs();
                    Tally::note(&mut self.tally.biases, name, change);
                    *value = quotient;
                }
                None => {
                    let why = format!(
                        "no number times the scale {scale} is {value}: use --scales divide, or allow rounding (--allow-loss)"
                    );
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

/// A matrix of the input whose rows are asked for in runs, in the basis that the output has.
pub(super) enum Rows<'a> {
    Ternary { matrix: TernaryMatrix, rotation: Option<Rotate> },
    Dense { job: &'a Job<'a>, planned: &'a Planned, role: Role, rotation: Option<Rotate> },
}

impl<'a> Rows<'a> {
    pub(super) fn open(job: &'a Job<'a>, planned: &'a Planned, role: Role) -> Result<Self, ModelError> {
        let rotation = job.unrotation(planned)?;
        Ok(match planned.ternary {
            true => Self::Ternary { matrix: read_ternary(job, planned, role)?, rotation },
            false => Self::Dense { job, planned, role, rotation },
        })
    }

    /// Runs begin and end at multiples of this.
    pub(super) fn unit(&self) -> usize {
        match self {
            Self::Ternary { .. } => 1,
            Self::Dense { job, planned, .. } => job.weights().row_unit(&planned.name, planned.shape[0]),
        }
    }

    fn dense(&self, part: Range<usize>) -> Result<DenseMatrix, ModelError> {
        let Self::Dense { job, planned, role, rotation } = self else { unreachable!("only asked of floats") };
        let (rows, cols) = (planned.shape[0], planned.shape[1]);
        let matrix = job.weights().dense_rows(&planned.name, [rows, cols], *role, part)?;
        match rotation {
            None => Ok(matrix),
            Some(rotation) => {
                let mut values = dense_values(&matrix);
                rotate_back(&mut values, cols, rotation);
                DenseMatrix::new(matrix.rows(), cols, DenseData::F32(values))
                    .map_err(|e| ModelError::tensor(&planned.name, e.to_string()))
            }
        }
    }

    /// The values of rows, as f32.
    pub(super) fn values(&self, part: Range<usize>) -> Result<Vec<f32>, ModelError> {
        match self {
            Self::Dense { .. } => Ok(dense_values(&self.dense(part)?)),
            Self::Ternary { matrix, rotation } => {
                let cols = matrix.cols();
                let mut values = vec![0.0; part.len() * cols];
                for (row, out) in part.zip(values.chunks_mut(cols.max(1))) {
                    matrix.dequantize_row(row, out);
                }
                if let Some(rotation) = rotation {
                    rotate_back(&mut values, cols, rotation);
                }
                Ok(values)
            }
        }
    }
}

/// Stored rows are `w · diag(s) · H` of the plain ones, and `H` is its own inverse.
fn rotate_back(values: &mut [f32], cols: usize, rotation: &Rotate) {
    let kernels = Kernels::best();
    values.chunks_mut(cols.max(1)).for_each(|row| rotation.apply(kernels, row, Direction::Back));
}

fn dense_values(matrix: &DenseMatrix) -> Vec<f32> {
    let mut values = vec![0.0; matrix.rows() * matrix.cols()];
    for (row, out) in values.chunks_mut(matrix.cols().max(1)).enumerate() {
        matrix.row_f32(row, out);
    }
    values
}

/// `bytes` of `rows` whole heads' rows, in the order that the output has.
fn interleaved(item: &Item, job: &Job, bytes: Vec<u8>, rows: usize) -> Vec<u8> {
    let Some(heads) = item.interleave else { return bytes };
    let tail = if item.spec.encoding == Encoding::I2S { 32 } else { 0 };
    let heads = heads * rows / item.spec.shape[0];
    interleave(&bytes, rows, heads, job.config.rope.rotary_dim, tail)
}

pub(super) fn read_ternary(job: &Job, planned: &Planned, role: Role) -> Result<TernaryMatrix, ModelError> {
    match job.weights().matrix(&planned.name, planned.shape[0], planned.shape[1], role)? {
        Weight::Ternary(matrix) => Ok(matrix),
        // The plan and the reader decide alike; this says so should they ever differ.
        Weight::Dense(_) => {
            Err(ModelError::tensor(&planned.name, "its values are not of the kind that its header announces"))
        }
    }
}

pub(super) fn cannot(planned: &Planned, encoding: &str, why: String) -> ModelError {
    ModelError::CannotEncode { name: planned.name.clone(), encoding: encoding.to_owned(), why }
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
