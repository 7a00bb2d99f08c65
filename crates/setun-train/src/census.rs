//! What the ternary weights are doing: which changed, which are zero, which rows are dead.
//!
//! A look compares the canonical codes (two bits per weight) with those of the look before, 32 weights at a time: a
//! pass over a sixteenth of the bytes of the masters, once per line of the metrics. The codes of the last look are part
//! of a checkpoint, so that a resumed run reports the flips that it would have reported.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

use safetensors::{Dtype, SafeTensors, View};
use serde::{Deserialize, Serialize};
use setun_kernels::{Scales, TernaryMatrix};

use crate::engine::vectorised;
use crate::error::TrainError;
use crate::lines::Line;
use crate::params::{ParamId, Params};
use crate::weights::Weights;

/// One line of `layers.jsonl`: every ternary matrix after a step.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct LayerLine {
    /// Optimiser steps taken.
    pub step: u64,
    /// The matrices in the order of the forward pass.
    pub layers: Vec<Layer>,
}

impl Line for LayerLine {
    const WHAT: &str = "line of layers";

    fn step(&self) -> u64 {
        self.step
    }
}

/// One ternary matrix, or (with an empty name) all of them together.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Layer {
    /// Tensor name, Hugging Face spelling.
    pub name: String,
    /// How many weights.
    pub weights: u64,
    /// Share of them whose trit differs from that of the line before (of the initial weights, for the first line). A
    /// weight that changed and changed back is not counted.
    pub flip_rate: f64,
    /// Share of them that are zero.
    pub zero_fraction: f64,
    /// Scale; the mean where there are several.
    pub scale: f64,
    /// Rows without any weight but zeros: outputs that are always zero.
    pub dead_rows: u64,
}

/// The codes of the last look.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Census {
    /// By parameter; `None` where it is not ternary, or frozen.
    seen: Vec<Option<Vec<u8>>>,
}

impl Census {
    /// Looks at `weights` for the first time.
    pub fn new(params: &Params, weights: &Weights) -> Self {
        let changing = |id: ParamId| weights.matrix(id).filter(|_| !params.is_frozen(id));
        let codes = |id: ParamId| Some(changing(id)?.codes().to_vec());
        Self { seen: params.ids().map(codes).collect() }
    }

    /// Takes up `codes` by tensor name, as a checkpoint kept them; what it lacks is taken from `weights`.
    ///
    /// # Errors
    /// When there are codes of another length than the matrix has, naming `path`.
    pub fn restore(
        params: &Params,
        weights: &Weights,
        mut codes: HashMap<String, Vec<u8>>,
        path: &Path,
    ) -> Result<Self, TrainError> {
        let mut census = Self::new(params, weights);
        for (param, seen) in params.iter().zip(&mut census.seen) {
            let (Some(seen), Some(codes)) = (seen, codes.remove(&param.name)) else { continue };
            if codes.len() != seen.len() {
                let (name, found, expected) = (&param.name, codes.len(), seen.len());
                let what =
                    format!("tensor `{name}` has {found} bytes of codes, but its shape needs {expected}");
                return Err(TrainError::file(path, what));
            }
            *seen = codes;
        }
        Ok(census)
    }

    /// Whether no weight is ternary.
    pub fn is_empty(&self) -> bool {
        self.seen.iter().all(Option::is_none)
    }

    /// Looks again: every ternary matrix, and all of them together. `None` where no weight is ternary.
    pub fn look(&mut self, params: &Params, weights: &Weights) -> Option<(Layer, Vec<Layer>)> {
        let mut layers = Vec::new();
        let mut total = Layer::default();
        for (id, seen) in params.ids().zip(&mut self.seen) {
            let (Some(matrix), Some(seen)) = (weights.matrix(id), seen) else { continue };
            let counts = Counts::of(matrix, seen);
            seen.copy_from_slice(matrix.codes());
            let n = (matrix.rows() * matrix.cols()) as f64;
            let layer = Layer {
                name: params[id].name.clone(),
                weights: n as u64,
                flip_rate: counts.flips as f64 / n,
                zero_fraction: counts.zeros as f64 / n,
                scale: mean_scale(matrix.scales()),
                dead_rows: counts.dead_rows,
            };
            total.weights += layer.weights;
            total.flip_rate += counts.flips as f64;
            total.zero_fraction += counts.zeros as f64;
            total.scale += layer.scale * n;
            total.dead_rows += layer.dead_rows;
            layers.push(layer);
        }
        let n = total.weights as f64;
        for sum in [&mut total.flip_rate, &mut total.zero_fraction, &mut total.scale] {
            *sum /= n;
        }
        (total.weights > 0).then_some((total, layers))
    }

    /// Writes the codes of the last look; [`read_codes`] reads them.
    pub(crate) fn write(&self, params: &Params, path: &Path) -> std::io::Result<()> {
        let codes = params.iter().zip(&self.seen);
        let tensors =
            codes.filter_map(|(param, seen)| Some((param.name.as_str(), Codes::of(seen.as_deref()?))));
        safetensors::serialize_to_file(tensors, None, path).map_err(std::io::Error::other)?;
        std::fs::File::open(path)?.sync_all()
    }
}

/// Codes by tensor name; none where there is no such file, in checkpoints of runs from before it was written.
pub(crate) fn read_codes(path: &Path) -> Result<HashMap<String, Vec<u8>>, TrainError> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(HashMap::new()),
        Err(e) => return Err(TrainError::read(path, e)),
    };
    let file = SafeTensors::deserialize(&bytes).map_err(|e| TrainError::file(path, e.to_string()))?;
    Ok(file.iter().map(|(name, tensor)| (name.to_owned(), tensor.data().to_vec())).collect())
}

/// A tensor of bytes.
struct Codes<'a> {
    bytes: &'a [u8],
    shape: [usize; 1],
}

impl<'a> Codes<'a> {
    fn of(bytes: &'a [u8]) -> Self {
        Self { bytes, shape: [bytes.len()] }
    }
}

impl View for Codes<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::U8
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(self.bytes)
    }
    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

fn mean_scale(scales: &Scales) -> f64 {
    match scales {
        Scales::Tensor(scale) => f64::from(*scale),
        Scales::Row(values) | Scales::Block { values, .. } => {
            values.iter().map(|&s| f64::from(s)).sum::<f64>() / values.len().max(1) as f64
        }
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Counts {
    flips: u64,
    zeros: u64,
    dead_rows: u64,
}

impl Counts {
    /// `before`: as many bytes of codes as the matrix has.
    fn of(matrix: &TernaryMatrix, before: &[u8]) -> Self {
        let (cols, row_bytes) = (matrix.cols(), matrix.row_bytes());
        let mut counts = Self::default();
        if row_bytes == 0 {
            return counts;
        }
        // The codes after a row's last column are zero weights.
        let padding = (4 * row_bytes - cols) as u64;
        vectorised(
            #[inline(always)]
            || {
                for (now, before) in
                    matrix.codes().chunks_exact(row_bytes).zip(before.chunks_exact(row_bytes))
                {
                    let (flips, zeros) = row_counts(now, before);
                    counts.flips += flips;
                    counts.zeros += zeros - padding;
                    counts.dead_rows += u64::from(zeros - padding == cols as u64);
                }
            },
        );
        counts
    }
}

/// Codes that differ, and codes of zero weights in `now`.
#[inline(always)]
fn row_counts(now: &[u8], before: &[u8]) -> (u64, u64) {
    const LOW: u64 = 0x5555_5555_5555_5555;
    let (mut flips, mut zeros) = (0, 0);
    let mut word = |now: u64, before: u64| {
        let differs = now ^ before;
        flips += u64::from(((differs | differs >> 1) & LOW).count_ones());
        zeros += u64::from((now & !(now >> 1) & LOW).count_ones()); // Code 1 of 0, 1, 2.
    };
    let ((now, now_rest), (before, before_rest)) = (now.as_chunks::<8>(), before.as_chunks::<8>());
    for (now, before) in now.iter().zip(before) {
        word(u64::from_le_bytes(*now), u64::from_le_bytes(*before));
    }
    for (now, before) in now_rest.iter().zip(before_rest) {
        word(u64::from(*now), u64::from(*before)); // Above the byte stand codes 0: neither flip nor zero.
    }
    (flips, zeros)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Engine;
    use crate::params::{Kind, Param};
    use setun::model::Role;

    fn trits(n: usize, mut state: u32) -> Vec<i8> {
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 16) as u8 % 3
        };
        (0..n).map(|_| next() as i8 - 1).collect()
    }

    #[test]
    fn counts_equal_those_of_trits_one_by_one_for_any_width() {
        for cols in [1, 3, 4, 5, 31, 32, 33, 64, 130] {
            let rows = 5;
            let (mut now, before) = (trits(rows * cols, 1), trits(rows * cols, 2));
            now[2 * cols..3 * cols].fill(0);
            let matrix = |t: &[i8]| TernaryMatrix::from_trits(rows, cols, t, Scales::Tensor(0.5)).unwrap();
            let found = Counts::of(&matrix(&now), matrix(&before).codes());
            let dead = now.chunks(cols).filter(|row| row.iter().all(|&t| t == 0)).count();
            let expected = Counts {
                flips: now.iter().zip(&before).filter(|(a, b)| a != b).count() as u64,
                zeros: now.iter().filter(|&&t| t == 0).count() as u64,
                dead_rows: dead as u64,
            };
            assert_eq!(found, expected, "{cols} columns");
            assert!(dead > 0);
        }
    }

    #[test]
    fn a_look_reports_what_changed_since_the_look_before_by_layer_and_in_total() {
        let engine = Engine::new(1);
        let mut params = Params::default();
        let mut add = |name: &str, rows, cols, kind, values| {
            params.add(Param { name: String::from(name), rows, cols, kind, values })
        };
        let a = add("a", 2, 4, Kind::Matrix(Role::Ternary), vec![1.0; 8]);
        add("norm", 4, 1, Kind::Norm, vec![1.0; 4]);
        add("b", 4, 4, Kind::Matrix(Role::Ternary), vec![-1.0; 16]);
        let mut weights = Weights::new(&engine, &params);
        let mut census = Census::new(&params, &weights);
        let (total, _) = census.look(&params, &weights).unwrap();
        assert_eq!((total.flip_rate, total.zero_fraction, total.scale), (0.0, 0.0, 1.0));

        params.values_mut(a).copy_from_slice(&[1.0, -1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]);
        weights.refresh(&engine, &params);
        let (total, layers) = census.look(&params, &weights).unwrap();
        assert_eq!(layers.iter().map(|l| l.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!((layers[0].flip_rate, layers[0].zero_fraction), (5.0 / 8.0, 0.5));
        assert_eq!((layers[0].dead_rows, layers[0].scale), (1, 0.5));
        assert_eq!((layers[1].flip_rate, layers[1].dead_rows), (0.0, 0));
        assert_eq!((total.weights, total.flip_rate, total.dead_rows), (24, 5.0 / 24.0, 1));
        assert_eq!(census.look(&params, &weights).unwrap().0.flip_rate, 0.0, "compared with the last look");
    }

    #[test]
    fn a_model_without_ternary_weights_has_no_census() {
        let mut params = Params::default();
        let (kind, values) = (Kind::Matrix(Role::Float), vec![1.0; 4]);
        params.add(Param { name: "w".into(), rows: 2, cols: 2, kind, values });
        let weights = Weights::new(&Engine::new(1), &params);
        assert_eq!(Census::new(&params, &weights).look(&params, &weights), None);
    }
}
