//! LoRA on a frozen base: which layers get an adapter, its first values, its files.

use std::path::Path;

use serde::{Deserialize, Serialize};
use setun::error::ModelError;
use setun::lora::{Adapter, CONFIG, PREFIX, Update, WEIGHTS};
use setun::model::{Role, Source};
use setun::ops::LowRank;
use setun::weights::{Weight, Weights as Tensors};
use setun_kernels::TernaryMatrix;

use crate::checkpoint::Tensor;
use crate::error::TrainError;
use crate::params::{Kind, Param, ParamId, Params};
use crate::random::{mix, unit};

/// Every linear layer of a block.
pub const ALL_TARGETS: [&str; 7] =
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// Adapters to be trained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraSection {
    /// `r`.
    pub rank: usize,
    /// `α`; what an adapter adds is multiplied by `α / r`.
    pub alpha: f64,
    /// Last parts of the names of the layers that get one.
    pub targets: Vec<String>,
}

impl LoraSection {
    /// # Errors
    /// Naming the flag at fault.
    pub fn check(&self) -> Result<(), TrainError> {
        if self.rank == 0 || self.rank > 4096 {
            return Err(TrainError::setting("--lora", self.rank, "a rank from 1 to 4096"));
        }
        if !self.alpha.is_finite() || self.alpha <= 0.0 {
            return Err(TrainError::setting("--lora-alpha", self.alpha, "a number above 0"));
        }
        let all = ALL_TARGETS.join(", ");
        if self.targets.is_empty() {
            return Err(TrainError::setting("--lora-targets", "empty", format!("some of {all}")));
        }
        match self.targets.iter().find(|target| !ALL_TARGETS.contains(&target.as_str())) {
            Some(target) => {
                Err(TrainError::setting("--lora-targets", format!("`{target}`"), format!("some of {all}")))
            }
            None => Ok(()),
        }
    }

    fn scale(&self) -> f32 {
        (self.alpha / self.rank as f64) as f32
    }
}

/// Where a frozen model's adapters come from.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Adapters<'a> {
    /// New ones, by the run's seed.
    Fresh(&'a LoraSection, u64),
    /// Those of a folder.
    Given(&'a Adapter),
}

/// Reads a checkpoint as a model that stays as it is, with adapters that do not.
pub(crate) struct Frozen<'a> {
    pub(crate) tensors: Tensors<'a>,
    pub(crate) adapters: Adapters<'a>,
    pub(crate) params: Params,
    /// Ternary forms, for the run's weights.
    pub(crate) ternary: Vec<(ParamId, TernaryMatrix)>,
}

impl Source for Frozen<'_> {
    type Matrix = ParamId;
    type Vector = ParamId;

    fn matrix(&mut self, name: &str, rows: usize, cols: usize, role: Role) -> Result<ParamId, ModelError> {
        let kind = Kind::Matrix(role);
        let param = |values| Param { name: name.to_owned(), rows, cols, kind, values };
        Ok(match self.tensors.matrix(name, rows, cols, role)? {
            Weight::Ternary(matrix) if role == Role::Ternary => {
                let id = self.params.add_frozen(param(Vec::new()));
                self.ternary.push((id, matrix));
                id
            }
            Weight::Ternary(matrix) => self.params.add_frozen(param(floats(&matrix))),
            Weight::Dense(matrix) => {
                let mut values = vec![0.0; rows * cols];
                values.chunks_exact_mut(cols.max(1)).enumerate().for_each(|(r, row)| matrix.row_f32(r, row));
                super::finite(name, &values)?;
                self.params.add_frozen(param(values))
            }
        })
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<ParamId, ModelError> {
        let values = self.tensors.vector(name, len)?;
        super::finite(name, &values)?;
        let kind = if name.ends_with(".bias") { Kind::Bias } else { Kind::Norm };
        Ok(self.params.add_frozen(Param { name: name.to_owned(), rows: len, cols: 1, kind, values }))
    }

    fn adapter(
        &mut self,
        module: &str,
        rows: usize,
        cols: usize,
    ) -> Result<Option<LowRank<ParamId>>, ModelError> {
        let (rank, a, b, scale) = match self.adapters {
            Adapters::Fresh(section, seed) => {
                let last = module.rsplit('.').next().unwrap_or(module);
                if !section.targets.iter().any(|target| target == last) {
                    return Ok(None);
                }
                let a = uniform(seed, module, section.rank * cols, cols);
                (section.rank, a, vec![0.0; rows * section.rank], section.scale())
            }
            Adapters::Given(adapter) => match adapter.update(module, rows, cols)? {
                None => return Ok(None),
                Some(Update { rank, a, b, scale }) => (rank, a.to_vec(), b.to_vec(), scale),
            },
        };
        let mut add = |half: &str, rows, cols, values| {
            let name = format!("{PREFIX}{module}.lora_{half}.weight");
            self.params.add(Param { name, rows, cols, kind: Kind::Matrix(Role::Float), values })
        };
        Ok(Some(LowRank { a: add("A", rank, cols, a), b: add("B", rows, rank, b), scale }))
    }
}

/// Numbers from `U(-1/√width, 1/√width)`, as PEFT begins `A` (Kaiming's bound with a = √5); by seed and name alone.
fn uniform(seed: u64, name: &str, count: usize, width: usize) -> Vec<f32> {
    let stream = name.bytes().fold(mix(seed), |state, byte| mix(state ^ u64::from(byte)));
    let bound = 1.0 / (width.max(1) as f64).sqrt();
    let number = |i: u64| ((2.0 * unit(mix(stream.wrapping_add(i))) - 1.0) * bound) as f32;
    (0..count as u64).map(number).collect()
}

/// Writes the trained parameters among `params` as PEFT does.
///
/// # Errors
/// When a value is not finite or a file cannot be written.
pub(crate) fn save(
    folder: &Path,
    params: &Params,
    section: &LoraSection,
    model: &Path,
) -> Result<(), TrainError> {
    for param in params.iter_trained() {
        super::finite(&param.name, &param.values)?;
    }
    let config = serde_json::json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.display().to_string(),
        "r": section.rank,
        // A whole number as one, as PEFT declares it.
        "lora_alpha": if section.alpha.fract() == 0.0 { serde_json::json!(section.alpha as i64) } else { section.alpha.into() },
        "target_modules": section.targets,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": false,
        "init_lora_weights": true,
        "inference_mode": true,
        "modules_to_save": null,
        "use_rslora": false,
        "use_dora": false,
        "rank_pattern": {},
        "alpha_pattern": {},
    });
    let tensors =
        params.iter_trained().map(|p| (p.name.clone(), Tensor { shape: p.shape(), values: &p.values }));
    let header = std::collections::HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let path = folder.join(WEIGHTS);
    let bytes = safetensors::serialize(tensors, Some(header));
    let bytes = bytes.map_err(|e| TrainError::write(&path, std::io::Error::other(e)))?;
    crate::vocabulary::write_whole(&path, &bytes)?;
    crate::vocabulary::write_whole(&folder.join(CONFIG), format!("{config:#}\n").as_bytes())
}

pub(crate) fn floats(matrix: &TernaryMatrix) -> Vec<f32> {
    let cols = matrix.cols();
    let mut values = vec![0.0; matrix.rows() * cols];
    values.chunks_exact_mut(cols.max(1)).enumerate().for_each(|(r, row)| matrix.dequantize_row(r, row));
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_cannot_be_used_are_named() {
        let good = LoraSection { rank: 4, alpha: 8.0, targets: vec!["q_proj".into()] };
        good.check().unwrap();
        let refused = |section: LoraSection, flag: &str| {
            let error = section.check().unwrap_err().to_string();
            assert!(error.contains(flag), "{error}");
        };
        refused(LoraSection { rank: 0, ..good.clone() }, "--lora`");
        refused(LoraSection { alpha: -1.0, ..good.clone() }, "--lora-alpha");
        refused(LoraSection { targets: vec!["attn".into()], ..good }, "`attn`");
    }
}
