//! Float masters: what a training run learns, in the order of the forward pass.

use crate::random::{mix, unit};
use setun::config::ModelConfig;
use setun::error::ModelError;
use setun::model::{Model, Role, Source};

/// A parameter's place in its [`Params`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ParamId(pub(crate) usize);

/// What a parameter is, which decides how it is initialised, decayed and multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A matrix.
    Matrix(Role),
    /// Weight of a norm.
    Norm,
    /// Bias of a linear layer.
    Bias,
}

impl Kind {
    /// Whether weight decay applies: to linear layers, not to the embedding, norms and biases, whose size carries meaning of its own.
    pub fn decays(self) -> bool {
        matches!(self, Kind::Matrix(Role::Ternary | Role::Float))
    }
}

/// One tensor of the model in full precision.
#[derive(Debug, Clone, PartialEq)]
pub struct Param {
    /// Hugging Face spelling.
    pub name: String,
    /// `[rows, cols]`, or `[len, 1]` for a vector.
    pub rows: usize,
    /// See `rows`.
    pub cols: usize,
    /// What it is.
    pub kind: Kind,
    /// Row-major.
    pub values: Vec<f32>,
}

impl Param {
    /// The shape as files write it: vectors have one dimension.
    pub fn shape(&self) -> Vec<usize> {
        match self.kind {
            Kind::Matrix(_) => vec![self.rows, self.cols],
            Kind::Norm | Kind::Bias => vec![self.rows],
        }
    }
}

/// All parameters of a model.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Params {
    list: Vec<Param>,
    /// For each whether it stays as it is.
    frozen: Vec<bool>,
}

impl std::ops::Index<ParamId> for Params {
    type Output = Param;
    fn index(&self, id: ParamId) -> &Param {
        &self.list[id.0]
    }
}

impl Params {
    /// Every parameter, in the order of the forward pass.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Param> {
        self.list.iter()
    }

    pub(crate) fn iter_mut(&mut self) -> impl ExactSizeIterator<Item = &mut Param> {
        self.list.iter_mut()
    }

    /// Ids of all parameters, in their order.
    pub fn ids(&self) -> impl ExactSizeIterator<Item = ParamId> + use<> {
        (0..self.list.len()).map(ParamId)
    }

    /// The values of one parameter, to be changed.
    pub fn values_mut(&mut self, id: ParamId) -> &mut [f32] {
        &mut self.list[id.0].values
    }

    /// How many tensors.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// How many numbers.
    pub fn total(&self) -> usize {
        self.list.iter().map(|p| p.values.len()).sum()
    }

    /// Adds a parameter. Panics unless it has `rows * cols` values.
    pub fn add(&mut self, param: Param) -> ParamId {
        assert_eq!(param.values.len(), param.rows * param.cols, "values of `{}`", param.name);
        self.list.push(param);
        self.frozen.push(false);
        ParamId(self.list.len() - 1)
    }

    /// Adds a parameter that is not trained: it has no gradient and no moments, and checkpoints leave it out. A ternary matrix has
    /// no values either: its ternary form is with the [`crate::weights::Weights`]. Panics unless it has `rows * cols` values, or
    /// none.
    pub fn add_frozen(&mut self, param: Param) -> ParamId {
        let count = param.values.len();
        assert!(count == 0 || count == param.rows * param.cols, "values of `{}`", param.name);
        self.list.push(param);
        self.frozen.push(true);
        ParamId(self.list.len() - 1)
    }

    /// Whether a parameter stays as it is.
    pub fn is_frozen(&self, id: ParamId) -> bool {
        self.frozen[id.0]
    }

    /// How many numbers of a parameter are trained: all or none.
    pub fn trained(&self, id: ParamId) -> usize {
        if self.is_frozen(id) { 0 } else { self.list[id.0].values.len() }
    }

    /// The parameters that are trained.
    pub fn iter_trained(&self) -> impl Iterator<Item = &Param> {
        self.list.iter().zip(&self.frozen).filter(|(_, frozen)| !**frozen).map(|(param, _)| param)
    }
}

/// A model of parameters.
pub type TrainModel = Model<ParamId, ParamId>;

/// A fresh model: matrices from `N(0, 0.02²)`, norms 1, biases 0.
///
/// Matrices that write to the residual stream are smaller by `1 / sqrt(2 · layers)`, so that its variance does not grow
/// with depth (GPT-2, Radford et al., 2019, section 2.3). The values depend on `seed` and the tensor's name alone.
///
/// # Errors
/// As [`load`].
pub fn initialise(config: ModelConfig, seed: u64) -> Result<(TrainModel, Params), ModelError> {
    let residual = 1.0 / ((2 * config.num_layers) as f64).sqrt();
    load(config, |name, rows, cols, kind| {
        let count = rows * cols;
        Ok(match kind {
            Kind::Norm => vec![1.0; count],
            Kind::Bias => vec![0.0; count],
            Kind::Matrix(_) => {
                let writes_residual = name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight");
                normal(seed, name, count, if writes_residual { 0.02 * residual } else { 0.02 })
            }
        })
    })
}

/// A model whose tensors come from `tensor(name, rows, cols, kind)`: a checkpoint, a file to fine-tune.
///
/// # Errors
/// A model with layers that are run but have no backward pass (mixtures of experts, gated DeltaNet), the first error that `tensor`
/// returns, or a value of another length than `rows * cols`.
pub fn load<F>(config: ModelConfig, tensor: F) -> Result<(TrainModel, Params), ModelError>
where
    F: FnMut(&str, usize, usize, Kind) -> Result<Vec<f32>, ModelError>,
{
    check_trainable(&config)?;
    let mut source = From { params: Params::default(), tensor };
    let model = Model::build(config, &mut source)?;
    Ok((model, source.params))
}

/// Refuses a model with layers that are run but have no backward pass.
///
/// # Errors
/// Naming the configuration's field.
pub fn check_trainable(config: &ModelConfig) -> Result<(), ModelError> {
    let refuse = |field: &str, found: String, expected: &str| {
        Err(ModelError::ConfigValue { field: field.into(), found, expected: expected.into() })
    };
    if let Some(experts) = &config.experts {
        let expected = "absent: mixtures of experts are run, but this version cannot train them";
        return refuse("num_experts", experts.count.to_string(), expected);
    }
    if config.hybrid.is_some() || config.attention_gate {
        let found = "gated DeltaNet layers and gated attention".into();
        return refuse("layer_types", found, "attention without gates, which is what can be trained here");
    }
    Ok(())
}

struct From<F> {
    params: Params,
    tensor: F,
}

impl<F: FnMut(&str, usize, usize, Kind) -> Result<Vec<f32>, ModelError>> From<F> {
    fn add(&mut self, name: &str, rows: usize, cols: usize, kind: Kind) -> Result<ParamId, ModelError> {
        let values = (self.tensor)(name, rows, cols, kind)?;
        if values.len() != rows * cols {
            let (expected, found) = (vec![rows, cols], vec![values.len()]);
            return Err(ModelError::Shape { name: name.to_owned(), expected, found });
        }
        Ok(self.params.add(Param { name: name.to_owned(), rows, cols, kind, values }))
    }
}

impl<F: FnMut(&str, usize, usize, Kind) -> Result<Vec<f32>, ModelError>> Source for From<F> {
    type Matrix = ParamId;
    type Vector = ParamId;

    fn matrix(&mut self, name: &str, rows: usize, cols: usize, role: Role) -> Result<ParamId, ModelError> {
        self.add(name, rows, cols, Kind::Matrix(role))
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<ParamId, ModelError> {
        let kind = if name.ends_with(".bias") { Kind::Bias } else { Kind::Norm };
        self.add(name, len, 1, kind)
    }
}

/// `count` numbers from `N(0, deviation²)`: Box and Muller's method on a counter-based generator.
fn normal(seed: u64, name: &str, count: usize, deviation: f64) -> Vec<f32> {
    let stream = name.bytes().fold(mix(seed), |state, byte| mix(state ^ u64::from(byte)));
    let uniform = |index: u64| unit(mix(stream.wrapping_add(index)));
    let pair = |i: u64| {
        let radius = (-2.0 * (1.0 - uniform(2 * i)).ln()).sqrt() * deviation;
        let (sin, cos) = (std::f64::consts::TAU * uniform(2 * i + 1)).sin_cos();
        [(radius * cos) as f32, (radius * sin) as f32]
    };
    (0..count.div_ceil(2) as u64).flat_map(pair).take(count).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mixture_of_experts_is_refused_before_anything_is_made() {
        let json = serde_json::json!({
            "model_type": "qwen3_moe", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "rms_norm_eps": 1e-6, "num_experts": 8, "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
        });
        let config = ModelConfig::from_json(&json).unwrap();
        let error =
            load(config, |name, _, _, _| unreachable!("{name} is asked for")).unwrap_err().to_string();
        assert!(error.contains("`num_experts`") && error.contains("cannot train"), "{error}");
    }

    #[test]
    fn a_hybrid_is_refused_before_any_parameter_is_made() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../golden/bonsai/qwen35-basic/config.json");
        let json = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let config = ModelConfig::from_json(&json).unwrap();
        let error = load(config, |name, _, _, _| panic!("{name} was asked for")).unwrap_err().to_string();
        assert!(error.contains("`layer_types`") && error.contains("DeltaNet"), "{error}");
    }

    #[test]
    fn initial_values_have_the_deviation_asked_for_and_differ_by_name_and_seed() {
        let a = normal(1, "a", 100_001, 0.02);
        let mean = a.iter().map(|&x| f64::from(x)).sum::<f64>() / a.len() as f64;
        let variance = a.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / a.len() as f64;
        assert!(mean.abs() < 3e-4, "{mean}");
        assert!((variance.sqrt() - 0.02).abs() < 2e-4, "{variance}");
        assert_eq!(a, normal(1, "a", 100_001, 0.02));
        assert_ne!(a[..10], normal(1, "b", 10, 0.02)[..]);
        assert_ne!(a[..10], normal(2, "a", 10, 0.02)[..]);
    }
}
