//! What a folder's tensors say about a model and its `config.json` does not: norms inside linear layers, and ternary
//! weights kept as floats.
//!
//! Ternary models are passed on as ordinary float checkpoints ("unpacked", "fake-quant": TriLM, Ternary-Bonsai, CAT-Q)
//! whose configuration has no word about it. Their values are the evidence: every weight is 0 or ± a scale, which floats as
//! training leaves them are not in the first dozen weights. All matrices of the blocks are looked at, a few rows of each; each is
//! checked in full when it is read.

use super::{ActivationType, InnerNorms, ModelConfig, Numerics, Storage, Ternary};
use crate::error::ModelError;
use crate::format::{Checkpoint, FloatWeights, Sample};
use crate::model::{Model, Role, Source};
use crate::weights::stored_name;

/// ε of the norms inside linear layers that BitDistill's code fixes (<https://arxiv.org/abs/2510.13998>).
const BITDISTILL_EPS: f32 = 1e-8;

/// Which linear layers of the first block have a norm of their own inside, going by its tensors.
pub(super) fn inner_norms(file: &Checkpoint) -> Option<InnerNorms> {
    let has = |module: &str| {
        file.info(&stored_name(file, false, &format!("model.layers.0.{module}.rms_norm.weight"))).is_some()
    };
    match (has("self_attn.q_proj"), has("self_attn.o_proj")) {
        (true, _) => Some(InnerNorms::All),
        (false, true) => Some(InnerNorms::OutputAndDown),
        (false, false) => None,
    }
}

impl ModelConfig {
    /// `self`, which a `config.json` gave, with what the tensors beside it add.
    pub(super) fn with_tensors(mut self, file: &Checkpoint) -> Result<Self, ModelError> {
        if let Some(found) = inner_norms(file) {
            self.inner_norms = found;
            // BitDistill students and BitNet embedding models: masters to be rounded, in a configuration of their float parent.
            // bitnet.cpp computes the embedding model's inner norms with the ε of all others.
            let eps = if self.pooling.is_some() { self.rms_norm_eps } else { BITDISTILL_EPS };
            self.inner_norm_eps.get_or_insert(eps);
            if self.numerics == Numerics::Float {
                self.numerics = Numerics::Ternary(Ternary::bitnet(Storage::Masters, None));
            }
        }
        if self.numerics == Numerics::Float && file.float_weights() != FloatWeights::Float {
            self.numerics = recognised(file, &self)?;
        }
        self.check()
    }
}

impl ModelConfig {
    /// `self`, which GGUF metadata gave: floats there are floats unless the caller says that they hold ternary weights.
    pub(super) fn with_insistence(mut self, file: &Checkpoint) -> Result<Self, ModelError> {
        if self.numerics == Numerics::Float && file.float_weights() == FloatWeights::Ternary {
            self.numerics = recognised(file, &self)?;
        }
        Ok(self)
    }
}

/// Weight-only numerics if all matrices of the blocks hold ternary values, float if none does.
fn recognised(file: &Checkpoint, config: &ModelConfig) -> Result<Numerics, ModelError> {
    let mut seen =
        Seen { file, hybrid: config.hybrid.is_some(), ternary: 0, first_ternary: None, floats: Vec::new() };
    Model::build(config.clone(), &mut seen)?;
    let insisted = file.float_weights() == FloatWeights::Ternary;
    match (&seen.first_ternary, seen.floats.first()) {
        (None, _) if !insisted => Ok(Numerics::Float),
        (Some(_), None) => Ok(Numerics::Ternary(Ternary {
            activations: ActivationType::Float,
            storage: Storage::FloatCopies,
            exceptions: None,
        })),
        (None, None) => {
            let what = "no matrix of its blocks holds a weight other than 0, so there is nothing to take for ternary";
            Err(ModelError::unsupported(file.path(), what))
        }
        (_, Some((name, why))) if insisted => {
            let n = seen.floats.len();
            let what = format!(
                "{n} of its block matrices are not ternary, as was asked for (the first is `{name}`: {why})"
            );
            Err(ModelError::unsupported(file.path(), what))
        }
        (Some(ternary), Some((name, why))) => {
            let what = format!(
                "{} of its block matrices hold only 0 and ± a scale (`{ternary}` for one), but {} do not (the first is `{name}`: \
                 {why}), so it is neither a ternary model nor plainly a float one: --weights float runs all of them as floats",
                seen.ternary,
                seen.floats.len()
            );
            Err(ModelError::unsupported(file.path(), what))
        }
        (None, Some(_)) => Ok(Numerics::Float),
    }
}

/// Samples the matrices of the blocks.
struct Seen<'a> {
    file: &'a Checkpoint,
    hybrid: bool,
    ternary: usize,
    first_ternary: Option<String>,
    floats: Vec<(String, String)>,
}

impl Source for Seen<'_> {
    type Matrix = ();
    type Vector = ();

    fn matrix(&mut self, name: &str, _: usize, _: usize, role: Role) -> Result<(), ModelError> {
        // What is missing or misshapen is reported where it is needed.
        let Some(info) = self.file.info(&stored_name(self.file, self.hybrid, name)) else { return Ok(()) };
        let small = name.strip_suffix(".weight").is_some_and(super::stays_float);
        let linear = role != Role::Embedding && name.starts_with("model.layers.") && !small;
        if !linear || !info.encoding.is_float() || info.shape.len() != 2 || info.shape.contains(&0) {
            return Ok(());
        }
        match self.file.tensor(&info.name)?.sample_ternary()? {
            Sample::Zeros => {}
            Sample::Ternary => {
                self.ternary += 1;
                self.first_ternary.get_or_insert_with(|| info.name.clone());
            }
            Sample::Floats(misfit) => self.floats.push((info.name.clone(), misfit.to_string())),
        }
        Ok(())
    }

    fn vector(&mut self, _: &str, _: usize) -> Result<(), ModelError> {
        Ok(())
    }
}
