//! An adapter merged into its model.

use setun::config::RopeTable;
use setun::error::ModelError;
use setun::lora::{Adapter, Update};
use setun::model::{Model, Role, Source};
use setun::weights::{Weight, Weights as Tensors};
use setun_kernels::gemm::{Into, View, ViewMut, gemm_on};
use setun_kernels::matrix::Scales;
use setun_kernels::{Pool, TernaryMatrix};

use super::lora::{Adapters, LoraSection, floats};
use super::masters::{masters_of, one_scale};
use super::{Base, Loaded, Settings, read};
use crate::data::Score;
use crate::engine::Engine;
use crate::error::TrainError;
use crate::params::{Kind, Param, ParamId, Params, TrainModel};
use crate::tape::Setting;
use crate::trainer::score;
use crate::weights::Weights;

/// How well a model does on the same text before and after an adapter was merged into it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Merge {
    /// As it was.
    pub before: Option<Score>,
    /// With the adapter beside it.
    pub with_adapter: Option<Score>,
    /// Merged.
    pub merged: Option<Score>,
    /// What merging changed.
    pub flips: Flips,
}

/// What merging did to the ternary layers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Flips {
    /// Ternary weights in layers with an adapter.
    pub weights: usize,
    /// How many of them are others now.
    pub changed: usize,
}

/// Reads a checkpoint as the model that it is with an adapter merged in: masters whose ternary form is the merged one.
struct Merging<'a> {
    tensors: Tensors<'a>,
    adapter: &'a Adapter,
    pool: &'a Pool,
    params: Params,
    flips: Flips,
}

impl Source for Merging<'_> {
    type Matrix = ParamId;
    type Vector = ParamId;

    fn matrix(&mut self, name: &str, rows: usize, cols: usize, role: Role) -> Result<ParamId, ModelError> {
        let module = name.strip_suffix(".weight").unwrap_or(name);
        let update = self.adapter.update(module, rows, cols)?;
        let values = match self.tensors.matrix(name, rows, cols, role)? {
            Weight::Ternary(matrix) if role == Role::Ternary => match update {
                None => masters_of(name, &matrix)?,
                Some(update) => {
                    let scale = one_scale(name, &matrix)?;
                    let mut values = floats(&matrix);
                    add(self.pool, &mut values, &update, rows, cols);
                    let (trits, scale) = reternarise(&values, scale);
                    let merged = TernaryMatrix::from_trits(rows, cols, &trits, Scales::Tensor(scale))
                        .map_err(|e| ModelError::Tensor { name: name.to_owned(), what: e.to_string() })?;
                    let mut before = vec![0; cols];
                    for (r, after) in trits.chunks_exact(cols.max(1)).enumerate() {
                        matrix.row_trits(r, &mut before);
                        self.flips.changed += before.iter().zip(after).filter(|(a, b)| a != b).count();
                    }
                    self.flips.weights += trits.len();
                    masters_of(name, &merged)?
                }
            },
            Weight::Ternary(matrix) => floats(&matrix),
            Weight::Dense(matrix) => {
                let mut values = vec![0.0; rows * cols];
                values.chunks_exact_mut(cols.max(1)).enumerate().for_each(|(r, row)| matrix.row_f32(r, row));
                if let Some(update) = update {
                    add(self.pool, &mut values, &update, rows, cols);
                }
                values
            }
        };
        super::finite(name, &values)?;
        Ok(self.params.add(Param { name: name.to_owned(), rows, cols, kind: Kind::Matrix(role), values }))
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<ParamId, ModelError> {
        let values = self.tensors.vector(name, len)?;
        let kind = if name.ends_with(".bias") { Kind::Bias } else { Kind::Norm };
        Ok(self.params.add(Param { name: name.to_owned(), rows: len, cols: 1, kind, values }))
    }
}

/// `w += scale · B A`.
fn add(pool: &Pool, w: &mut [f32], update: &Update, rows: usize, cols: usize) {
    let Update { rank, a, b, scale } = *update;
    let (a, b) = (View::new(a, rank, cols, cols), View::new(b, rows, rank, rank));
    gemm_on(pool, ViewMut::new(w, rows, cols, cols), Into::Add, scale, b, a);
}

impl Base<'_> {
    /// The model with `adapter` merged in, as masters whose ternary form is the merged model, and how well it does on `valid`:
    /// as it was, with the adapter beside it, and merged.
    ///
    /// A ternary layer cannot hold a sum exactly: it becomes the nearest trits with the best scale for them.
    ///
    /// # Errors
    /// When a file cannot be read, or the adapter was made for another model.
    pub fn merge(&self, adapter: &Adapter, settings: &Settings) -> Result<(Params, Merge), TrainError> {
        let seq_len = self.seq_len(settings)?;
        let threads = settings.threads.unwrap_or_else(setun_kernels::threads::physical_cores_allowed);
        let set = match settings.valid.is_empty() {
            true => None,
            false => {
                let chat = self.chat()?;
                let list = read::examples(&settings.valid, self.tokenizer, &self.config, chat.as_ref())?;
                Some(Self::held_out(&list, seq_len)?)
            }
        };
        let beside = self.load_frozen(Engine::new(threads), Adapters::Given(adapter))?;
        adapter.check_all_used()?;
        let mut rope = RopeTable::new(&self.config.rope);
        rope.prepare(seq_len);
        let measure = |model: &TrainModel, engine: &Engine, params: &Params, weights: &Weights| {
            let on = Setting { engine, params, weights, rope: &rope, sequences: 0, seq_len: 0 };
            set.as_ref().map(|set| score(model, on, set, settings.batch.max(1), None))
        };
        let Loaded { engine, model, params, weights } = &beside;
        let with_adapter = measure(model, engine, params, weights);
        // The same without its adapters is the model as it was.
        let tensors = Tensors::new(self.file, &self.config);
        let nothing = LoraSection { rank: 1, alpha: 1.0, targets: Vec::new() };
        let before = match &set {
            None => None,
            Some(_) => {
                let base = self.load_frozen(Engine::new(threads), Adapters::Fresh(&nothing, 0))?;
                measure(&base.model, &base.engine, &base.params, &base.weights)
            }
        };
        let (params, flips) = (Params::default(), Flips::default());
        let mut source = Merging { tensors, adapter, pool: &engine.pool, params, flips };
        let model = Model::build(self.config.clone(), &mut source)?;
        let Merging { params, flips, .. } = source;
        let merged = measure(&model, engine, &params, &Weights::new(engine, &params));
        Ok((params, Merge { before, with_adapter, merged, flips }))
    }
}

/// Trits `t` and a scale `γ` with a small `‖w − γ·t‖²`: from the scale before, in turn the best trits for the scale, `round(w/γ)`,
/// and the best scale for the trits, `Σw·t / Σt²`, until nothing changes. What is ternary with that scale stays as it is; absmean
/// would not leave it alone.
fn reternarise(w: &[f32], scale: f32) -> (Vec<i8>, f32) {
    const ROUNDS: usize = 30;
    let round = |scale: f32| -> Vec<i8> {
        w.iter().map(|w| (w / scale).round_ties_even().clamp(-1.0, 1.0) as i8).collect()
    };
    let mut scale = scale;
    for _ in 0..ROUNDS {
        let trits = round(scale);
        let (sum, count) = w
            .iter()
            .zip(&trits)
            .filter(|(_, t)| **t != 0)
            .fold((0f64, 0u64), |(sum, n), (w, t)| (sum + f64::from(*w) * f64::from(*t), n + 1));
        let best = (sum / count.max(1) as f64) as f32;
        if best == scale || !best.is_normal() || best < 1e-5 {
            break;
        }
        scale = best;
    }
    (round(scale), scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_ternary_already_stays_as_it_is() {
        let w: Vec<f32> = [1, 0, -1, 0, 0, 1, 1].map(|t: i8| f32::from(t) * 0.0371).into();
        let (trits, scale) = reternarise(&w, 0.0371);
        assert_eq!((trits, scale.to_bits()), (vec![1, 0, -1, 0, 0, 1, 1], 0.0371f32.to_bits()));
    }

    #[test]
    fn rounds_of_reternarising_never_lose_closeness() {
        let w: Vec<f32> = (0..500).map(|i| ((i * i * 37) % 1000) as f32 / 500.0 - 1.0).collect();
        let distance = |t: &[i8], s: f32| -> f64 {
            w.iter().zip(t).map(|(w, t)| f64::from(w - s * f32::from(*t)).powi(2)).sum()
        };
        let (trits, scale) = reternarise(&w, 0.4);
        let first: Vec<i8> = w.iter().map(|w| (w / 0.4).round().clamp(-1.0, 1.0) as i8).collect();
        assert!(distance(&trits, scale) < distance(&first, 0.4));
    }
}
