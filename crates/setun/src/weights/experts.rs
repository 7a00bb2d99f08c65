//! Experts that a file keeps together.
//!
//! The model asks for `model.layers.0.mlp.experts.5.up_proj.weight`. GGUF stacks the experts of a layer, `[experts, rows, cols]`;
//! `transformers` 5 has such stacks in memory, gate above up in one tensor, and writes them so where it is told not to
//! restore the names of the original files.

use super::{Weights, expect_shape};
use crate::error::ModelError;
use crate::format::{Tensor, TensorInfo};
use crate::model::Role;

/// The layer and the kind (`up_proj`) of one expert's matrix, and which expert it is.
pub(crate) fn parse(name: &str) -> Option<(&str, usize, &str)> {
    let (layer, rest) = name.split_once(".mlp.experts.")?;
    let (expert, rest) = rest.split_once('.')?;
    Some((layer, expert.parse().ok()?, rest.strip_suffix(".weight")?))
}

/// Whether `name` is the matrix that chooses experts.
pub(crate) fn is_router(name: &str) -> bool {
    name.ends_with(".mlp.gate.weight")
}

/// One matrix in a tensor of all experts of a layer: part `part` of `parts` of expert `expert`.
struct Place {
    expert: usize,
    part: usize,
    parts: usize,
}

impl Weights<'_> {
    /// The fused tensor that a Hugging Face folder has instead of `name`.
    pub(super) fn fused_name(&self, name: &str) -> Option<String> {
        let (layer, _, kind) = parse(name)?;
        let kind = if kind == "down_proj" { kind } else { "gate_up_proj" };
        let fused = format!("{layer}.mlp.experts.{kind}");
        (self.file.info(name).is_none() && self.file.info(&fused).is_some()).then_some(fused)
    }

    fn place(&self, name: &str) -> Option<Place> {
        let (_, expert, kind) = parse(name)?;
        let (part, parts) = match (self.file.gguf_metadata(), kind) {
            (Some(_), _) => (0, 1),
            (None, _) if self.fused_name(name).is_none() => return None,
            (None, "gate_proj") => (0, 2),
            (None, "up_proj") => (1, 2),
            (None, _) => (0, 1),
        };
        Some(Place { expert, part, parts })
    }

    /// The part of `whole` that is the matrix `name`; `None` if it is all of it.
    pub(super) fn expert<'t>(
        &self,
        whole: &'t Tensor,
        name: &str,
        rows: usize,
        cols: usize,
        role: Role,
    ) -> Result<Option<Tensor<'t>>, ModelError> {
        let (Some(place), Some(experts)) = (self.place(name), &self.config.experts) else { return Ok(None) };
        let Place { expert, part, parts } = place;
        if role == Role::Ternary && self.file.gguf_metadata().is_none() {
            let what = "it holds all experts of a layer, of which the loader that `quantization_config` speaks of makes no \
                        ternary layers: save the experts one by one";
            return Err(ModelError::tensor(whole.name(), what));
        }
        expect_shape(whole, &[experts.count, parts * rows, cols])?;
        let first = (expert * parts + part) * rows;
        let mut matrix = whole.rows(first..first + rows)?;
        matrix.info.to_mut().name = format!("{}[{expert}]", whole.name());
        Ok(Some(matrix))
    }

    /// Bytes that the file spends on `name`: its share where it is kept with others, 0 if it is not there.
    pub(crate) fn stored_bytes(&self, name: &str) -> usize {
        let bytes = self.file.info(&self.stored_name(name)).map_or(0, TensorInfo::stored_bytes);
        let experts = self.config.experts.as_ref().map_or(1, |experts| experts.count);
        self.place(name).map_or(bytes, |place| bytes / (experts * place.parts).max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_experts_are_told_from_those_of_other_layers() {
        let name = "model.layers.11.mlp.experts.5.down_proj.weight";
        assert_eq!(parse(name), Some(("model.layers.11", 5, "down_proj")));
        for other in [
            "model.layers.0.mlp.down_proj.weight",
            "model.layers.0.mlp.experts.down_proj",
            "model.layers.0.mlp.experts.x.down_proj.weight",
            "model.layers.0.mlp.experts.1.down_proj.bias",
        ] {
            assert_eq!(parse(other), None, "{other}");
        }
        assert!(
            is_router("model.layers.0.mlp.gate.weight") && !is_router("model.layers.0.mlp.gate_proj.weight")
        );
    }
}
