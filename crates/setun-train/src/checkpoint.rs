//! Everything the next step depends on, in a folder per checkpoint.
//!
//! `OUT/checkpoints/step-00000500/` holds `state.safetensors` (`param.NAME`, `adam_m.NAME`, `adam_v.NAME`, with Muon `muon_m.NAME`, all f32) and
//! `state.json` (step, place in the data, settings). Ternary runs add `codes.safetensors`, the codes that the next line of the
//! metrics counts flips from. A folder is written under a temporary name, synced and renamed, so one that
//! has its name is whole. The newest few are kept, and the best on held-out text.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors, View};
use serde::{Deserialize, Serialize};

use crate::census::{Census, read_codes};
use crate::config::TrainConfig;
use crate::divergence::Watch;
use crate::error::TrainError;
use crate::metrics::Window;
use crate::optimizer::Optimizer;
use crate::params::Params;

const TENSORS: &str = "state.safetensors";
const STATE: &str = "state.json";
const CODES: &str = "codes.safetensors";
/// Version of this layout.
pub(crate) const FORMAT: u32 = 1;

/// What a checkpoint holds besides tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Version of this layout.
    pub(crate) format: u32,
    /// Optimiser steps taken.
    pub step: u64,
    /// Training tokens seen.
    pub tokens: u64,
    /// Seconds of training so far.
    pub elapsed: f64,
    /// What the next line of the metrics already averages.
    #[serde(default)]
    pub window: Window,
    /// The losses that decide whether the next one is high.
    #[serde(default)]
    pub watch: Watch,
    /// Place in the training data, as [`crate::data::Batches::state`] gives it.
    pub data: serde_json::Value,
    /// The best held-out measurement so far.
    pub best: Option<Best>,
    /// Settings of the run.
    pub config: TrainConfig,
}

/// The best held-out measurement of a run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// After which step.
    pub step: u64,
    /// Mean over the sets, bits per byte.
    pub bits_per_byte: f64,
}

/// The checkpoints of one run.
#[derive(Debug, Clone)]
pub struct Checkpoints {
    folder: PathBuf,
}

impl Checkpoints {
    /// Those below `out`, the run's output folder. Nothing is created.
    pub fn of(out: &Path) -> Self {
        Self { folder: out.join("checkpoints") }
    }

    /// The folder of the checkpoint after `step`.
    pub fn path(&self, step: u64) -> PathBuf {
        self.folder.join(format!("step-{step:08}"))
    }

    /// Steps that have a whole checkpoint, oldest first.
    ///
    /// # Errors
    /// When the folder exists and cannot be read.
    pub fn steps(&self) -> Result<Vec<u64>, TrainError> {
        let entries = match std::fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(TrainError::read(&self.folder, e)),
        };
        let mut steps = Vec::new();
        for entry in entries {
            let name = entry.map_err(|e| TrainError::read(&self.folder, e))?.file_name();
            steps.extend(
                name.to_str().and_then(|n| n.strip_prefix("step-")).and_then(|n| n.parse::<u64>().ok()),
            );
        }
        steps.sort_unstable();
        Ok(steps)
    }

    /// Writes a checkpoint, then removes all but the newest `keep` and the best.
    ///
    /// # Errors
    /// When something cannot be written; an unfinished folder never has a checkpoint's name.
    pub fn save(
        &self,
        state: &State,
        params: &Params,
        optimizer: &Optimizer,
        census: &Census,
        keep: usize,
    ) -> Result<PathBuf, TrainError> {
        let target = self.path(state.step);
        let temporary = self.folder.join(format!(".step-{:08}.{}.tmp", state.step, std::process::id()));
        let written = write(&temporary, state, params, optimizer).and_then(|()| {
            census.write(params, &temporary.join(CODES))?;
            // Only a checkpoint of this very step can be in the way, from a run that was started again.
            if target.exists() {
                std::fs::remove_dir_all(&target)?;
            }
            std::fs::rename(&temporary, &target)?;
            std::fs::File::open(&self.folder)?.sync_all()
        });
        if let Err(e) = written {
            let _ = std::fs::remove_dir_all(&temporary);
            return Err(TrainError::write(&target, e));
        }
        let steps = self.steps()?;
        for &step in &steps[..steps.len().saturating_sub(keep)] {
            if state.best.is_none_or(|best| best.step != step) && step != state.step {
                let old = self.path(step);
                std::fs::remove_dir_all(&old).map_err(|e| TrainError::write(&old, e))?;
            }
        }
        Ok(target)
    }

    /// Reads the checkpoint after `step`.
    ///
    /// # Errors
    /// When it cannot be read or is of another version.
    pub fn load(&self, step: u64) -> Result<Checkpoint, TrainError> {
        Checkpoint::read(&self.path(step))
    }
}

fn write(folder: &Path, state: &State, params: &Params, optimizer: &Optimizer) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    let [first, second] = &optimizer.moments;
    let trained = params.ids().filter(|&id| !params.is_frozen(id));
    let tensors = trained.flat_map(|id| {
        let param = &params[id];
        let names = optimizer.moment_names(param);
        let tensors = [(Some("param"), &param.values), (names[0], &first[id.0]), (names[1], &second[id.0])];
        tensors.into_iter().filter_map(|(kind, values)| {
            let tensor = Tensor { shape: param.shape(), values };
            Some((format!("{}.{}", kind?, param.name), tensor))
        })
    });
    let path = folder.join(TENSORS);
    safetensors::serialize_to_file(tensors, None, &path).map_err(std::io::Error::other)?;
    std::fs::File::open(&path)?.sync_all()?;
    let path = folder.join(STATE);
    std::fs::write(&path, serde_json::to_vec_pretty(state)?)?;
    std::fs::File::open(&path)?.sync_all()
}

pub(crate) struct Tensor<'a> {
    pub(crate) shape: Vec<usize>,
    pub(crate) values: &'a [f32],
}

impl View for Tensor<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        self.values.iter().flat_map(|x| x.to_le_bytes()).collect()
    }
    fn data_len(&self) -> usize {
        size_of_val(self.values)
    }
}

/// A checkpoint in memory.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    /// All but the tensors.
    pub state: State,
    tensors: HashMap<String, (Vec<usize>, Vec<f32>)>,
    /// Codes of the ternary matrices at the last line of the metrics, by name.
    pub(crate) codes: HashMap<String, Vec<u8>>,
}

impl Checkpoint {
    /// Reads a checkpoint's folder.
    ///
    /// # Errors
    /// When a file cannot be read, or is damaged or of another version.
    pub fn read(folder: &Path) -> Result<Self, TrainError> {
        let path = folder.join(STATE);
        let text = std::fs::read(&path).map_err(|e| TrainError::read(&path, e))?;
        let state: State =
            serde_json::from_slice(&text).map_err(|e| TrainError::file(&path, e.to_string()))?;
        if state.format != FORMAT {
            let what = format!("is of checkpoint format {}, but this version reads {FORMAT}", state.format);
            return Err(TrainError::file(&path, what));
        }
        let path = folder.join(TENSORS);
        let bytes = std::fs::read(&path).map_err(|e| TrainError::read(&path, e))?;
        let file = SafeTensors::deserialize(&bytes).map_err(|e| TrainError::file(&path, e.to_string()))?;
        let mut tensors = HashMap::new();
        for (name, tensor) in file.iter() {
            if tensor.dtype() != Dtype::F32 {
                let what = format!("tensor `{name}` is {:?}, but a checkpoint holds F32", tensor.dtype());
                return Err(TrainError::file(&path, what));
            }
            let values = tensor.data().as_chunks::<4>().0.iter().map(|x| f32::from_le_bytes(*x)).collect();
            tensors.insert(name.to_owned(), (tensor.shape().to_vec(), values));
        }
        let codes = read_codes(&folder.join(CODES))?;
        Ok(Self { path, state, tensors, codes })
    }

    /// The file that [`Checkpoint::codes`] come from.
    pub(crate) fn codes_path(&self) -> PathBuf {
        self.path.with_file_name(CODES)
    }

    /// Takes the tensor `kind.name` out: `kind` is `param`, `adam_m`, `adam_v` or `muon_m`.
    ///
    /// # Errors
    /// When it is missing or of another shape.
    pub fn take(&mut self, kind: &str, name: &str, shape: &[usize]) -> Result<Vec<f32>, TrainError> {
        let name = format!("{kind}.{name}");
        match self.tensors.remove(&name) {
            Some((found, values)) if found == shape => Ok(values),
            Some((found, _)) => {
                let what =
                    format!("tensor `{name}` has shape {found:?}, but the run's model asks for {shape:?}");
                Err(TrainError::file(&self.path, what))
            }
            None => Err(TrainError::file(&self.path, format!("tensor `{name}` is missing"))),
        }
    }
}
