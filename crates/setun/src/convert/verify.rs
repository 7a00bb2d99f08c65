//! The output, read back by the reader that runs models, against the input.

use setun_kernels::matrix::TernaryMatrix;

use super::Job;
use super::encode::Encoder;
use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::format::Checkpoint;
use crate::weights::{Weight, Weights};

/// What was compared and found to be as the report says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Verified {
    /// Tensors of the model.
    pub tensors: usize,
    /// Ternary weights, equal in sign and scale.
    pub trits: u64,
    /// Floats, equal or within the error that the report states for their tensor.
    pub floats: u64,
}

pub(super) fn verify(
    job: &Job,
    written: &Checkpoint,
    config: &ModelConfig,
    encoder: &Encoder,
    done: &mut dyn FnMut(&str, u64),
) -> Result<Verified, ModelError> {
    let (before, after) = (job.weights(), Weights::new(written, config));
    let mut seen = Verified { tensors: 0, trits: 0, floats: 0 };
    for planned in job.planned {
        let name = planned.name.as_str();
        let allowed = encoder.errors.get(name).copied().unwrap_or(0.0);
        let differs = |what: String| ModelError::tensor(name, format!("the output does not hold it: {what}"));
        match planned.role {
            None => {
                let (a, b) = (before.vector(name, planned.shape[0])?, after.vector(name, planned.shape[0])?);
                compare(&a, &b, allowed).map_err(differs)?;
                seen.floats += a.len() as u64;
            }
            Some(role) => {
                let (rows, cols) = (planned.shape[0], planned.shape[1]);
                let pair = (before.matrix(name, rows, cols, role)?, after.matrix(name, rows, cols, role)?);
                if let (Weight::Ternary(a), Weight::Ternary(b)) = &pair {
                    same_trits(a, b).map_err(differs)?;
                    seen.trits += (rows * cols) as u64;
                } else {
                    seen.floats += (rows * cols) as u64;
                }
                // The values, so that scales are compared however they are grouped.
                let rounding = if job.options.lossy { encoder.scale_error } else { 0.0 };
                let (mut a, mut b) = (vec![0.0; cols], vec![0.0; cols]);
                for row in 0..rows {
                    row_values(&pair.0, row, &mut a);
                    row_values(&pair.1, row, &mut b);
                    let scale = a.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                    let allowed =
                        if planned.ternary { allowed.max(rounding * scale * 1.001) } else { allowed };
                    compare(&a, &b, allowed).map_err(|what| differs(format!("row {row}, {what}")))?;
                }
            }
        }
        seen.tensors += 1;
        done(name, planned.bytes as u64);
    }
    Ok(seen)
}

fn same_trits(a: &TernaryMatrix, b: &TernaryMatrix) -> Result<(), String> {
    match (0..a.rows()).find(|&row| a.row_codes(row) != b.row_codes(row)) {
        None => Ok(()),
        Some(row) => Err(format!("ternary weights of row {row} differ")),
    }
}

fn row_values(weight: &Weight, row: usize, out: &mut [f32]) {
    match weight {
        Weight::Ternary(matrix) => matrix.dequantize_row(row, out),
        Weight::Dense(matrix) => matrix.row_f32(row, out),
    }
}

fn compare(a: &[f32], b: &[f32], allowed: f32) -> Result<(), String> {
    let apart = |(x, y): (&f32, &f32)| !(x == y || (x - y).abs() <= allowed || x.is_nan() && y.is_nan());
    match a.iter().zip(b).position(apart) {
        None => Ok(()),
        Some(at) => Err(format!("element {at} is {} instead of {}", b[at], a[at])),
    }
}
