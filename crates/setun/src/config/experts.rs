//! Feed-forward layers that are mixtures of experts (Qwen3-MoE): sizes, routing, and which layers are none.
//!
//! The definition is `Qwen3MoeSparseMoeBlock` of `transformers`; llama.cpp's `qwen3moe` is the same with two facts fixed:
//! every layer has experts, and their weights are always renormalised.

use std::collections::HashSet;

use serde_json::{Map, Value as Json, json};

use super::{MAX_LAYERS, ModelConfig, Numerics, value_error};
use crate::error::ModelError;
use crate::format::gguf::{Metadata, Value, required};

/// Shape and routing of a model's expert layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Experts {
    /// Experts of a layer.
    pub count: usize,
    /// Experts that every token goes through.
    pub used: usize,
    /// Width of one expert.
    pub intermediate_size: usize,
    /// Whether the weights of a token's experts are divided by their sum.
    pub normalised: bool,
    /// Layers with a plain feed-forward layer instead, in rising order.
    pub dense_layers: Vec<usize>,
}

/// Experts of all layers together: known models have up to 25 thousand, and every one costs memory before a tensor is read.
const MOST: usize = 1 << 15;
/// Names in `modules_to_not_convert` times the layers that are compared with them.
const MOST_COMPARISONS: usize = 1 << 24;

impl Experts {
    /// From a `config.json`; `num_local_experts` is how `transformers` 5 writes `num_experts`.
    pub(super) fn from_json(json: &Json, layers: usize) -> Result<Self, ModelError> {
        let need =
            |key: &str| size(json, key)?.ok_or_else(|| ModelError::ConfigMissing { field: key.into() });
        let count = match (size(json, "num_experts")?, size(json, "num_local_experts")?) {
            (Some(one), Some(other)) if one != other => {
                return Err(value_error("num_local_experts", other, format!("num_experts = {one}")));
            }
            (Some(count), _) | (None, Some(count)) => count,
            (None, None) => need("num_experts")?,
        };
        // Absent keys are the class's defaults.
        let step = size(json, "decoder_sparse_step")?.unwrap_or(1);
        if step == 0 {
            return Err(value_error("decoder_sparse_step", 0, "at least 1"));
        }
        let normalised = match json.get("norm_topk_prob") {
            None => false,
            Some(Json::Bool(given)) => *given,
            Some(other) => return Err(value_error("norm_topk_prob", other, "true or false")),
        };
        let dense = dense_layers(json, layers)?;
        let is_dense = |n: &usize| dense.contains(n) || !(n + 1).is_multiple_of(step);
        Ok(Self {
            count,
            used: need("num_experts_per_tok")?,
            intermediate_size: need("moe_intermediate_size")?,
            normalised,
            dense_layers: (0..layers.min(MAX_LAYERS)).filter(is_dense).collect(),
        })
    }

    /// From the keys of a GGUF file of the architecture `arch`.
    pub(super) fn from_gguf(meta: &Metadata, arch: &str) -> Result<Self, ModelError> {
        let name = |key: &str| format!("{arch}.{key}");
        let size = |key: &str| -> Result<usize, ModelError> {
            let value = required(&name(key), meta.u64(&name(key))?)?;
            usize::try_from(value).map_err(|_| value_error(&name(key), value, "a size this machine can hold"))
        };
        // What other architectures do with experts and this one does not.
        for (key, neutral) in [
            ("expert_shared_count", &[0][..]),
            ("expert_group_count", &[0, 1]),
            ("leading_dense_block_count", &[0]),
            // 1 is softmax.
            ("expert_gating_func", &[0, 1]),
        ] {
            if let Some(found) = meta.u64(&name(key))?.filter(|found| !neutral.contains(found)) {
                let expected = format!("absent or {}, as `{arch}` has it", neutral[neutral.len() - 1]);
                return Err(value_error(&name(key), found, expected));
            }
        }
        let scale = meta.f32(&name("expert_weights_scale"))?;
        if let Some(found) = scale.filter(|scale| ![0.0, 1.0].contains(scale)) {
            return Err(value_error(
                &name("expert_weights_scale"),
                found,
                "absent or 1, since nothing applies it",
            ));
        }
        Ok(Self {
            count: size("expert_count")?,
            used: size("expert_used_count")?,
            intermediate_size: size("expert_feed_forward_length")?,
            normalised: meta.bool(&name("expert_weights_norm"))?.unwrap_or(true),
            dense_layers: Vec::new(),
        })
    }

    /// The keys that [`Experts::from_json`] reads back.
    pub(super) fn to_json(&self, map: &mut Map<String, Json>) {
        for (key, value) in [
            ("num_experts", json!(self.count)),
            ("num_experts_per_tok", json!(self.used)),
            ("moe_intermediate_size", json!(self.intermediate_size)),
            ("norm_topk_prob", json!(self.normalised)),
            ("decoder_sparse_step", json!(1)),
            ("mlp_only_layers", json!(self.dense_layers)),
        ] {
            map.insert(key.into(), value);
        }
    }

    /// The keys that [`Experts::from_gguf`] reads back, without the architecture's prefix.
    pub(super) fn to_gguf(&self) -> Result<[(&'static str, Value); 3], ModelError> {
        if !self.normalised {
            let expected =
                "true, since readers of GGUF `qwen3moe` renormalise whatever the file says: use --to hf";
            return Err(value_error("norm_topk_prob", false, expected));
        }
        if !self.dense_layers.is_empty() {
            let expected = "empty, since GGUF `qwen3moe` has experts in every layer: use --to hf";
            return Err(value_error("mlp_only_layers", format!("{:?}", self.dense_layers), expected));
        }
        let size = |n: usize| Value::U32(n as u32);
        Ok([
            ("expert_count", size(self.count)),
            ("expert_used_count", size(self.used)),
            ("expert_feed_forward_length", size(self.intermediate_size)),
        ])
    }

    /// Whether block `layer` has experts.
    pub fn are_in(&self, layer: usize) -> bool {
        self.dense_layers.binary_search(&layer).is_err()
    }

    /// Part of [`ModelConfig::check`].
    pub(super) fn check(&self, c: &ModelConfig) -> Result<(), ModelError> {
        let most = MOST / c.num_layers.max(1);
        if self.count == 0 || self.count > most {
            let expected = format!("a number from 1 to {most} with {} layers", c.num_layers);
            return Err(value_error("num_experts", self.count, expected));
        }
        if self.used == 0 || self.used > self.count {
            let expected = format!("a number from 1 to num_experts = {}", self.count);
            return Err(value_error("num_experts_per_tok", self.used, expected));
        }
        if self.intermediate_size == 0 || self.intermediate_size > 1 << 22 {
            let expected = format!("a number from 1 to {}", 1 << 22);
            return Err(value_error("moe_intermediate_size", self.intermediate_size, expected));
        }
        for (field, given) in [
            ("mlp_bias", c.mlp_bias),
            ("quantization_config.use_rms_norm", c.inner_norm_eps.is_some()),
            ("sub_norms", c.sub_norms),
        ] {
            if given {
                return Err(value_error(
                    field,
                    true,
                    "absent or false, since experts have neither biases nor norms",
                ));
            }
        }
        let names = match &c.numerics {
            Numerics::Ternary(ternary) => ternary.exceptions.as_ref().map_or(0, |e| e.names().len()),
            Numerics::Float => 0,
        };
        if names * self.count * c.num_layers > MOST_COMPARISONS {
            let found = format!("{names} names for {} experts", self.count * c.num_layers);
            let expected = "short: patterns that cover many layers at once";
            return Err(value_error("quantization_config.modules_to_not_convert", found, expected));
        }
        Ok(())
    }
}

impl ModelConfig {
    /// The expert layer of block `layer`; `None` where the feed-forward layer is a plain one.
    pub fn experts_in(&self, layer: usize) -> Option<&Experts> {
        self.experts.as_ref().filter(|experts| experts.are_in(layer))
    }

    /// Widths of the feed-forward matrices of block `layer`, added up: of the experts that one token goes through, or of all.
    fn feed_forward_width(&self, layer: usize, active: bool) -> usize {
        self.experts_in(layer).map_or(self.intermediate_size, |experts| {
            experts.intermediate_size * if active { experts.used } else { experts.count }
        })
    }

    /// [`ModelConfig::feed_forward_width`] of all blocks.
    pub(super) fn feed_forward_widths(&self, active: bool) -> usize {
        (0..self.num_layers).map(|n| self.feed_forward_width(n, active)).sum()
    }

    /// Weights of all routers.
    pub(super) fn router_weights(&self) -> usize {
        let of = |n: usize| self.experts_in(n).map_or(0, |experts| experts.count * self.hidden_size);
        (0..self.num_layers).map(of).sum()
    }
}

/// A size, also where a program wrote it as a float; null is absent.
fn size(json: &Json, key: &str) -> Result<Option<usize>, ModelError> {
    match json.get(key) {
        None | Some(Json::Null) => Ok(None),
        Some(value) => whole(value).map(Some).ok_or_else(|| value_error(key, value, "a whole number from 0")),
    }
}

fn whole(value: &Json) -> Option<usize> {
    let float = value.as_f64().filter(|x| x.fract() == 0.0 && (0.0..9e15).contains(x)).map(|x| x as u64);
    value.as_u64().or(float).and_then(|n| usize::try_from(n).ok())
}

fn dense_layers(json: &Json, layers: usize) -> Result<HashSet<usize>, ModelError> {
    const FIELD: &str = "mlp_only_layers";
    let expected = || format!("a list of layers below num_hidden_layers = {layers}");
    match json.get(FIELD) {
        None | Some(Json::Null) => Ok(HashSet::new()),
        Some(Json::Array(list)) => list
            .iter()
            .map(|n| whole(n).filter(|&n| n < layers).ok_or_else(|| value_error(FIELD, n, expected())))
            .collect(),
        Some(_) => Err(value_error(FIELD, "no list", expected())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(changes: Json) -> Result<ModelConfig, ModelError> {
        let mut json = json!({
            "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
            "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": true,
        });
        for (key, value) in changes.as_object().unwrap() {
            match value.as_str() {
                Some("absent") => json.as_object_mut().unwrap().remove(key),
                _ => json.as_object_mut().unwrap().insert(key.clone(), value.clone()),
            };
        }
        ModelConfig::from_json(&json)
    }

    #[test]
    fn layers_have_experts_as_step_and_list_say() {
        let dense = |changes| read(changes).unwrap().experts.unwrap().dense_layers;
        assert_eq!(dense(json!({})), [0usize; 0]);
        assert_eq!(dense(json!({"decoder_sparse_step": 2})), [0, 2]);
        assert_eq!(dense(json!({"mlp_only_layers": [3, 0, 3]})), [0, 3]);
        assert_eq!(dense(json!({"decoder_sparse_step": 2, "mlp_only_layers": [1]})), [0, 1, 2]);
        let config = read(json!({"mlp_only_layers": [1]})).unwrap();
        assert!(config.experts_in(0).is_some() && config.experts_in(1).is_none());
        assert_eq!(ModelConfig::from_json(&config.to_json()).unwrap(), config);
    }

    #[test]
    fn the_newer_name_of_the_count_is_read_and_must_not_contradict_the_older() {
        let config = read(json!({"num_experts": "absent", "num_local_experts": 8})).unwrap();
        assert_eq!(config, read(json!({})).unwrap());
        let error = read(json!({"num_local_experts": 4})).unwrap_err().to_string();
        assert!(error.contains("`num_local_experts`") && error.contains("num_experts = 8"), "{error}");
    }

    #[test]
    fn keys_left_out_have_the_class_defaults_and_sizes_have_none() {
        let experts = read(json!({"norm_topk_prob": "absent"})).unwrap().experts.unwrap();
        assert!(!experts.normalised);
        for field in ["num_experts", "num_experts_per_tok", "moe_intermediate_size"] {
            let error = read(json!({field: "absent"})).unwrap_err().to_string();
            assert!(error.contains(&format!("`{field}` is missing")), "{error}");
        }
    }

    #[test]
    fn sizes_that_make_no_sense_are_refused_by_name() {
        for (field, value) in [
            ("num_experts", json!(0)),
            ("num_experts", json!(1 << 14)),
            ("num_experts", json!(1u64 << 60)),
            ("num_experts", json!(2.5)),
            ("num_experts_per_tok", json!(0)),
            ("num_experts_per_tok", json!(9)),
            ("moe_intermediate_size", json!(0)),
            ("moe_intermediate_size", json!(1u64 << 40)),
            ("decoder_sparse_step", json!(0)),
            ("mlp_only_layers", json!([4])),
            ("mlp_only_layers", json!(["0"])),
            ("mlp_only_layers", json!(1)),
            ("norm_topk_prob", json!("yes")),
            ("mlp_bias", json!(true)),
        ] {
            let error = read(json!({field: value})).unwrap_err().to_string();
            assert!(error.contains(&format!("`{field}`")), "{error}");
        }
    }

    #[test]
    fn the_router_is_never_ternary_and_experts_are_like_other_layers() {
        let quantized =
            json!({"quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear"}});
        let config = read(quantized).unwrap();
        assert!(!config.is_ternary("model.layers.0.mlp.gate"));
        assert!(config.is_ternary("model.layers.0.mlp.experts.7.gate_proj") && config.has_ternary_layers());
    }

    #[test]
    fn parameters_count_every_expert_and_active_ones_those_of_a_token() {
        // 30B-A3B by its published config; its name gives the two numbers.
        let config = read(json!({
            "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "head_dim": 128,
            "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
        }));
        let config = config.unwrap();
        assert_eq!(config.parameters(), 30_532_122_624);
        assert_eq!(config.active_parameters(), 3_353_032_704);
    }

    #[test]
    fn gguf_says_what_it_can_and_refuses_the_rest() {
        assert!(read(json!({})).unwrap().to_gguf().is_ok());
        for (field, value) in [("norm_topk_prob", json!(false)), ("mlp_only_layers", json!([0]))] {
            let error = read(json!({field: value})).unwrap().to_gguf().unwrap_err().to_string();
            assert!(error.contains(&format!("`{field}`")), "{error}");
        }
    }
}
