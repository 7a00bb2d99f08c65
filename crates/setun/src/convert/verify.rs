//! The output, read back by the reader that runs models, against the input.

use setun_kernels::matrix::TernaryMatrix;

use super::encode::{Encoder, Rows};
use super::{Done, Job};
use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::format::Checkpoint;
use crate::weights::Weights;

/// Floats that are compared at a time.
const PIECE: usize = 1 << 21;

/// What was compared and found to be as the report says.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Verified {
    /// Tensors of the model.
    pub tensors: usize,
    /// Ternary weights, equal in sign and scale, or in sign and within the change of scale that the report states.
    pub trits: u64,
    /// Floats, equal or within the error that the report states for their tensor.
    pub floats: u64,
    /// Facts beside the weights that were equal.
    pub keys: Vec<&'static str>,
}

pub(super) fn verify(
    job: &Job,
    written: &Checkpoint,
    config: &ModelConfig,
    encoder: &Encoder,
    done: &mut Done,
) -> Result<Verified, ModelError> {
    let (before, after) = (job.weights(), Weights::new(written, config));
    let planned_after = super::plan::tensors(written, config)?;
    let reread = Job { file: written, config, planned: &planned_after, options: job.options };
    let mut seen = Verified { tensors: 0, trits: 0, floats: 0, keys: Vec::new() };
    for (planned, found) in job.planned.iter().zip(&planned_after) {
        let name = planned.name.as_str();
        let differs = |what: String| ModelError::tensor(name, format!("the output does not hold it: {what}"));
        if (&planned.name, &planned.shape) != (&found.name, &found.shape) {
            return Err(differs(format!("`{}` is in its place", found.name)));
        }
        let count = planned.shape.iter().product::<usize>() as u64;
        let floats = encoder.tally.floats.get(name).map_or(0.0, |(_, error)| *error);
        match planned.role {
            None => {
                let (a, b) = (before.vector(name, planned.shape[0])?, after.vector(name, planned.shape[0])?);
                let rounded = encoder.tally.biases.get(name).copied().unwrap_or(0.0);
                let largest = a.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                compare(&a, &b, floats.max(rounded * largest * 1.001)).map_err(differs)?;
                seen.floats += count;
            }
            Some(role) => {
                if planned.ternary && job.unrotation(planned)?.is_none() {
                    seen.trits += count;
                } else {
                    seen.floats += count;
                }
                // The values, so that scales are compared however they are grouped.
                let there = found.role.unwrap_or(role);
                let (a, b) = (Rows::open(job, planned, role)?, Rows::open(&reread, found, there)?);
                if let (Rows::Ternary { matrix: a, .. }, Rows::Ternary { matrix: b, .. }) = (&a, &b) {
                    same_trits(a, b).map_err(differs)?;
                }
                let rounding = encoder.tally.scale_error(Some(name));
                let (rows, cols) = (planned.shape[0], planned.shape[1]);
                // Each is 1, the rows of a head or all rows.
                let unit = a.unit().max(b.unit()).max(1);
                let step = (PIECE / cols.max(1) / unit).max(1) * unit;
                for first in (0..rows).step_by(step) {
                    let part = first..rows.min(first + step);
                    let (a, b) = (a.values(part.clone())?, b.values(part)?);
                    for (row, (a, b)) in a.chunks(cols).zip(b.chunks(cols)).enumerate() {
                        let scale = a.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                        let allowed =
                            if planned.ternary { floats.max(rounding * scale * 1.001) } else { floats };
                        compare(a, b, allowed)
                            .map_err(|what| differs(format!("row {}, {what}", first + row)))?;
                    }
                }
            }
        }
        seen.tensors += 1;
        done(name, planned.bytes as u64)?;
    }
    Ok(seen)
}

fn same_trits(a: &TernaryMatrix, b: &TernaryMatrix) -> Result<(), String> {
    match (0..a.rows()).find(|&row| a.row_codes(row) != b.row_codes(row)) {
        None => Ok(()),
        Some(row) => Err(format!("ternary weights of row {row} differ")),
    }
}

fn compare(a: &[f32], b: &[f32], allowed: f32) -> Result<(), String> {
    let apart = |(x, y): (&f32, &f32)| !(x == y || (x - y).abs() <= allowed || x.is_nan() && y.is_nan());
    match a.iter().zip(b).position(apart) {
        None => Ok(()),
        Some(at) => Err(format!("element {at} is {} instead of {}", b[at], a[at])),
    }
}
