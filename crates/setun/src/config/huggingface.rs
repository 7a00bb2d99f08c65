//! `config.json` as Hugging Face models carry it, read and written.

mod hybrid;
mod mlx;
mod raw;
mod rope;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{
    Activation, ActivationType, Exceptions, Experts, Family, InnerNorms, ModelConfig, Numerics, Pooling,
    Rotation, Storage, Ternary, contradictions, known, value_error,
};
use crate::error::ModelError;
use raw::{RawConfig, RawHadamard};

/// What a family's class in `transformers` fills in for keys that a file leaves out; sizes have no sensible default.
struct Defaults {
    rope_theta: f64,
    max_positions: usize,
    activation: Activation,
    /// `None`: as many as query heads.
    kv_heads: Option<usize>,
    /// `None`: hidden size over query heads.
    head_dim: Option<usize>,
    sliding_window: Option<usize>,
}

impl Family {
    fn defaults(self) -> Defaults {
        let llama = Defaults {
            rope_theta: 10000.0,
            max_positions: 2048,
            activation: Activation::Silu,
            kv_heads: None,
            head_dim: None,
            sliding_window: None,
        };
        match self {
            Family::Llama | Family::BitNetSilu => llama,
            Family::Mistral => {
                Defaults { max_positions: 131_072, kv_heads: Some(8), sliding_window: Some(4096), ..llama }
            }
            Family::Qwen2 => {
                Defaults { max_positions: 32_768, kv_heads: Some(32), sliding_window: Some(4096), ..llama }
            }
            Family::Qwen3 => Defaults {
                max_positions: 32_768,
                kv_heads: Some(32),
                head_dim: Some(128),
                sliding_window: Some(4096),
                ..llama
            },
            Family::Qwen3Moe => {
                Defaults { max_positions: 32_768, kv_heads: Some(4), sliding_window: Some(4096), ..llama }
            }
            // Nothing is left to a default: see `hybrid::read`.
            Family::Qwen35 => llama,
            Family::BitNet => {
                Defaults { rope_theta: 500_000.0, activation: Activation::Relu2, kv_heads: Some(5), ..llama }
            }
        }
    }
}

fn need<T>(value: Option<T>, field: &str) -> Result<T, ModelError> {
    value.ok_or_else(|| ModelError::ConfigMissing { field: field.into() })
}

impl ModelConfig {
    /// Reads a parsed `config.json`. Unknown keys are ignored, as every loader of such files does.
    ///
    /// # Errors
    /// For a family, activation, rope type or quantisation that this version does not build, for a missing field, and
    /// for values that contradict each other: each names the field.
    pub fn from_json(json: &Value) -> Result<Self, ModelError> {
        let raw = RawConfig::deserialize(json).map_err(|e| wrong_type(json, &e))?;
        let family = family(&raw)?;
        contradictions::in_json(json)?;
        let defaults = family.defaults();
        let hybrid = if family == Family::Qwen35 { Some(hybrid::read(&raw)?) } else { None };
        let activation = match raw.hidden_act.as_deref() {
            Some("silu" | "swish") => Activation::Silu,
            Some("relu2") => Activation::Relu2,
            Some(other) => return Err(value_error("hidden_act", other, "`silu` or `relu2`")),
            None => defaults.activation,
        };
        let (hidden_size, heads) =
            (need(raw.hidden_size, "hidden_size")?, need(raw.num_attention_heads, "num_attention_heads")?);
        // Absent is the class default, but an explicit null is what follows from other sizes.
        let default = |key: &str, value: Option<usize>| value.filter(|_| json.get(key).is_none());
        let head_dim = match raw.head_dim.or(default("head_dim", defaults.head_dim)) {
            Some(given) => given,
            None if heads > 0 && hidden_size % heads == 0 => hidden_size / heads,
            None => {
                let expected =
                    format!("a multiple of num_attention_heads = {heads}, since head_dim is not given");
                return Err(value_error("hidden_size", hidden_size, expected));
            }
        };
        let num_layers = need(raw.num_hidden_layers, "num_hidden_layers")?;
        let max_positions = raw.max_position_embeddings.unwrap_or(defaults.max_positions);
        let kv_default = default("num_key_value_heads", defaults.kv_heads);
        let bias = raw.attention_bias.unwrap_or(false);
        let config = Self {
            family,
            vocab_size: need(raw.vocab_size, "vocab_size")?,
            hidden_size,
            intermediate_size: need(raw.intermediate_size, "intermediate_size")?,
            num_layers,
            heads,
            kv_heads: raw.num_key_value_heads.or(kv_default).unwrap_or(heads),
            head_dim,
            max_positions,
            rms_norm_eps: need(raw.rms_norm_eps, "rms_norm_eps")? as f32,
            // The class default of every family here, `transformers` included; files leave it out when false.
            // Without a head of its own an embedding model counts as tied.
            tied: headless(class(&raw)) || raw.tie_word_embeddings.unwrap_or(family == Family::BitNetSilu),
            activation,
            rope: rope::read(&raw, family, head_dim, max_positions, defaults.rope_theta)?,
            windows: windows(json, &raw, family, num_layers)?,
            sub_norms: matches!(family, Family::BitNet | Family::BitNetSilu),
            inner_norm_eps: raw
                .quantization_config
                .as_ref()
                .filter(|q| q.use_rms_norm == Some(true))
                .map(|q| q.rms_norm_eps.unwrap_or(1e-6) as f32),
            inner_norms: InnerNorms::All,
            qk_norm: family.has_qk_norm(),
            attention_gate: family == Family::Qwen35,
            hybrid,
            qkv_bias: bias || family == Family::Qwen2,
            output_bias: bias && family != Family::Qwen2,
            mlp_bias: raw.mlp_bias.unwrap_or(false),
            experts: match family {
                Family::Qwen3Moe => Some(Experts::from_json(json, num_layers)?),
                _ => None,
            },
            numerics: numerics(&raw, family)?,
            // Rotated weights of others are refused: see `ModelConfig::of`.
            rotation: rotation(&raw, num_layers)?,
            bos: ids(&raw.bos_token_id, "bos_token_id")?.first().copied(),
            eos: ids(&raw.eos_token_id, "eos_token_id")?,
            pooling: headless(class(&raw)).then_some(Pooling::Unstated),
        };
        config.check()
    }

    /// The `config.json` that [`ModelConfig::from_json`] reads back to the same configuration, in the field's spelling.
    pub fn to_json(&self) -> Value {
        let (model_type, architecture) = match self.family {
            Family::Llama => ("llama", "LlamaForCausalLM"),
            Family::Mistral => ("mistral", "MistralForCausalLM"),
            Family::Qwen2 => ("qwen2", "Qwen2ForCausalLM"),
            Family::Qwen3 => ("qwen3", "Qwen3ForCausalLM"),
            Family::Qwen3Moe => ("qwen3_moe", "Qwen3MoeForCausalLM"),
            Family::Qwen35 => ("qwen3_5_text", "Qwen3_5ForCausalLM"),
            Family::BitNet => ("bitnet", "BitNetForCausalLM"),
            Family::BitNetSilu => ("bitnet", "BitnetForCausalLM"),
        };
        let mut json = json!({
            "architectures": [match self.pooling {
                Some(_) => architecture.replace("ForCausalLM", "Model"),
                None => architecture.to_owned(),
            }],
            "model_type": model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": self.activation,
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": shortest(self.rms_norm_eps),
            "rope_theta": self.rope.theta,
            "tie_word_embeddings": self.tied,
            "attention_bias": if self.family == Family::Qwen2 { false } else { self.qkv_bias },
            "mlp_bias": self.mlp_bias,
            "bos_token_id": self.bos,
            "eos_token_id": match &self.eos[..] { [] => Value::Null, [one] => json!(one), many => json!(many) },
            "torch_dtype": "float32",
        });
        let map = json.as_object_mut().expect("built as an object");
        if self.hybrid.is_some() {
            let factor = self.rope.rotary_dim as f64 / self.head_dim as f64;
            map.insert("partial_rotary_factor".into(), json!(factor));
        }
        if let Some(scaling) = rope::scaling_json(&self.rope.scaling) {
            map.insert("rope_scaling".into(), scaling);
        }
        self.windows_json(map);
        if let Some(experts) = &self.experts {
            experts.to_json(map);
        }
        if let Some(hybrid) = &self.hybrid {
            hybrid::write(hybrid, map);
        }
        // Weight-only models have no such section: there is none that readers would not take for W1.58A8.
        if let Numerics::Ternary(ternary) = &self.numerics
            && ternary.activations != ActivationType::Float
        {
            let (class, mode) = match ternary.storage {
                Storage::Masters => ("autobitlinear", "online"),
                Storage::Divide => ("bitlinear", "offline"),
                Storage::Multiply | Storage::SelfDescribed | Storage::FloatCopies | Storage::Mlx { .. } => {
                    ("autobitlinear", "offline")
                }
            };
            let mut quantization = json!({
                "quant_method": "bitnet", "linear_class": class, "quantization_mode": mode,
                "modules_to_not_convert": ternary.exceptions.as_ref().map(Exceptions::names),
            });
            if ternary.activations == ActivationType::Int4 {
                quantization["activation_bits"] = json!(4);
            }
            if let Some(rotation) = &self.rotation {
                let modules = rotation.modules();
                quantization["quant_method"] = json!(BITNET_HADAMARD);
                quantization["hadamard"] = json!({ "block_size": rotation.block(), "modules": modules });
            }
            if let Some(eps) = self.inner_norm_eps {
                quantization["use_rms_norm"] = json!(true);
                quantization["rms_norm_eps"] = json!(shortest(eps));
            }
            map.insert("quantization_config".into(), quantization);
        }
        json
    }

    fn windows_json(&self, map: &mut Map<String, Value>) {
        let Some(window) = self.windows.iter().flatten().next() else {
            // Mistral's class has a window where the key is absent.
            if self.family == Family::Mistral {
                map.insert("sliding_window".into(), Value::Null);
            }
            return;
        };
        map.insert("sliding_window".into(), json!(window));
        if matches!(self.family, Family::Qwen2 | Family::Qwen3 | Family::Qwen3Moe) {
            map.insert("use_sliding_window".into(), json!(true));
        }
        // Qwen2's class would leave its lower layers without one.
        if self.family != Family::Mistral || self.windows.iter().any(Option::is_none) {
            let kind = |w: &Option<usize>| if w.is_some() { "sliding_attention" } else { "full_attention" };
            map.insert("layer_types".into(), self.windows.iter().map(kind).collect());
        }
    }
}

/// `1e-5` rather than `9.999999747378752e-06`.
fn shortest(x: f32) -> f64 {
    x.to_string().parse().expect("a float's own text is a float")
}

/// Names the field that serde leaves out: all are optional, so the one at fault is the one that fails by itself.
fn wrong_type(json: &Value, error: &serde_json::Error) -> ModelError {
    let alone = |(key, value): &(&String, &Value)| {
        RawConfig::deserialize(Value::Object(Map::from_iter([((*key).clone(), (*value).clone())]))).is_err()
    };
    match json.as_object().and_then(|map| map.iter().find(alone)) {
        Some((field, _)) => value_error(field, format!("not usable ({error})"), "of its usual type"),
        None => value_error("config.json", error, "an object of a model's settings"),
    }
}

fn family(raw: &RawConfig) -> Result<Family, ModelError> {
    let (class, model_type) = (class(raw), raw.model_type.as_deref());
    let by_class = class.and_then(|class| {
        Some(match class {
            "BitnetForCausalLM" => Family::BitNetSilu,
            "BitNetForCausalLM" => Family::BitNet,
            "LlamaForCausalLM" | "LlamaModel" => Family::Llama,
            "MistralForCausalLM" | "MistralModel" => Family::Mistral,
            "Qwen2ForCausalLM" | "Qwen2Model" => Family::Qwen2,
            "Qwen3ForCausalLM" | "Qwen3Model" => Family::Qwen3,
            "Qwen3MoeForCausalLM" => Family::Qwen3Moe,
            "Qwen3_5ForCausalLM" => Family::Qwen35,
            _ => return None,
        })
    });
    let by_type = model_type.and_then(|model_type| {
        Some(match model_type {
            "bitnet" => Family::BitNet,
            "llama" => Family::Llama,
            "mistral" => Family::Mistral,
            "qwen2" => Family::Qwen2,
            "qwen3" => Family::Qwen3,
            "qwen3_moe" => Family::Qwen3Moe,
            "qwen3_5_text" => Family::Qwen35,
            _ => return None,
        })
    });
    match (by_class, by_type) {
        // 1bitLLM's files say model_type "llama"; the class name, lower-case n, is what tells them apart.
        (Some(Family::BitNetSilu), None | Some(Family::Llama | Family::BitNet)) => Ok(Family::BitNetSilu),
        (Some(family), Some(other)) if family != other => {
            let expected = format!("the type of {}, which `architectures` names", class.unwrap_or_default());
            Err(value_error("model_type", model_type.unwrap_or_default(), expected))
        }
        (Some(family), _) => Ok(family),
        (None, Some(family)) if class.is_none() => Ok(family),
        (None, _) if class.or(model_type).is_none() => {
            Err(ModelError::ConfigMissing { field: "architectures".into() })
        }
        (None, _) => {
            let found = class.or(model_type).unwrap_or_default();
            let expected = "one of LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, \
                            Qwen3MoeForCausalLM, Qwen3_5ForCausalLM, BitNetForCausalLM and BitnetForCausalLM, the families this \
                            version runs";
            let expected = expected.to_owned() + &known::in_config(class, model_type);
            Err(value_error("architectures", found, expected))
        }
    }
}

fn class(raw: &RawConfig) -> Option<&str> {
    raw.architectures.as_ref().and_then(|names| names.first()).map(String::as_str)
}

/// Whether a class of `transformers` is a model without an output head: one for embeddings.
fn headless(class: Option<&str>) -> bool {
    class.is_some_and(|class| class.ends_with("Model"))
}

/// What sentence-transformers' `1_Pooling/config.json` says.
pub(super) fn pooling(json: &Value) -> Pooling {
    let modes = [
        ("pooling_mode_mean_tokens", Pooling::Mean),
        ("pooling_mode_cls_token", Pooling::First),
        ("pooling_mode_lasttoken", Pooling::Last),
    ];
    let set = modes.into_iter().filter(|(key, _)| json.get(key) == Some(&Value::Bool(true)));
    match set.map(|(_, pooling)| pooling).collect::<Vec<_>>()[..] {
        [one] => one,
        _ => Pooling::Unstated,
    }
}

fn numerics(raw: &RawConfig, family: Family) -> Result<Numerics, ModelError> {
    if let Some(section) = &raw.quantization {
        return match family {
            Family::BitNet | Family::BitNetSilu => Err(value_error(
                "quantization",
                "MLX's settings",
                "absent in a BitNet, which is packed by its own rule",
            )),
            _ => mlx::numerics(section),
        };
    }
    let Some(q) = &raw.quantization_config else {
        return match (family, raw.weight_bits, raw.input_bits) {
            // 1bitLLM: float masters, quantised on the fly; nothing but these two keys says so.
            (Family::BitNetSilu, Some(1.0), Some(8.0)) => {
                Ok(Numerics::Ternary(Ternary::bitnet(Storage::Masters, None)))
            }
            (Family::BitNetSilu, bits, input) => {
                let found = format!("weight_bits {bits:?}, input_bits {input:?}");
                Err(value_error("weight_bits / input_bits", found, "1 and 8, as the 1bitLLM models have"))
            }
            (Family::BitNet, ..) => Err(ModelError::ConfigMissing { field: "quantization_config".into() }),
            // Float copies of ternary weights (`-unpacked`, "fake-quant") come without a word about it: see `recognise`.
            _ => Ok(Numerics::Float),
        };
    };
    match q.quant_method.as_deref() {
        Some("bitnet" | BITNET_HADAMARD) => {}
        Some(other) => {
            let expected = format!("`bitnet` or `{BITNET_HADAMARD}`");
            return Err(value_error("quantization_config.quant_method", other, expected));
        }
        None => return Err(ModelError::ConfigMissing { field: "quantization_config.quant_method".into() }),
    }
    let storage = match (q.linear_class.as_deref(), q.quantization_mode.as_deref()) {
        // bitlinear exists packed only; `quantization_mode` says nothing about it.
        (None | Some("bitlinear"), _) => Storage::Divide,
        (Some("autobitlinear"), None | Some("offline")) => Storage::Multiply,
        (Some("autobitlinear"), Some("online")) => Storage::Masters,
        (Some("autobitlinear"), Some(mode)) => {
            return Err(value_error("quantization_config.quantization_mode", mode, "`online` or `offline`"));
        }
        (Some(class), _) => {
            return Err(value_error(
                "quantization_config.linear_class",
                class,
                "`bitlinear` or `autobitlinear`",
            ));
        }
    };
    let exceptions = q.modules_to_not_convert.clone().map(Exceptions::new).transpose()?;
    let activations = match q.activation_bits {
        None | Some(8) => ActivationType::Int8,
        Some(4) => ActivationType::Int4,
        Some(other) => return Err(value_error("quantization_config.activation_bits", other, "8 or 4")),
    };
    Ok(Numerics::Ternary(Ternary { activations, ..Ternary::bitnet(storage, exceptions) }))
}

/// BitNets whose inputs are rotated: a method of its own, so that programs that do not rotate refuse it.
const BITNET_HADAMARD: &str = "bitnet_hadamard";

fn rotation(raw: &RawConfig, layers: usize) -> Result<Option<Rotation>, ModelError> {
    let Some(q) = &raw.quantization_config else { return Ok(None) };
    let rotated = q.quant_method.as_deref() == Some(BITNET_HADAMARD);
    match &q.hadamard {
        None if rotated => Err(ModelError::ConfigMissing { field: "quantization_config.hadamard".into() }),
        Some(_) if !rotated => {
            let expected = format!("absent, unless quant_method is `{BITNET_HADAMARD}`");
            Err(value_error("quantization_config.hadamard", "present", expected))
        }
        None => Ok(None),
        Some(RawHadamard { block_size, modules }) => {
            Rotation::of_inputs(layers.min(super::MAX_LAYERS), modules, *block_size).map(Some)
        }
    }
}

fn windows(
    json: &Value,
    raw: &RawConfig,
    family: Family,
    layers: usize,
) -> Result<Vec<Option<usize>>, ModelError> {
    let layers = layers.min(super::MAX_LAYERS);
    // As for heads: absent is the class default, null is no window.
    let class = if json.get("sliding_window").is_some() { None } else { family.defaults().sliding_window };
    let given = raw.sliding_window.or(class);
    if let Some(types) = &raw.layer_types {
        let window = |kind: &String| match kind.as_str() {
            "full_attention" => Ok(None),
            "sliding_attention" => need(raw.sliding_window, "sliding_window").map(Some),
            "linear_attention" if family == Family::Qwen35 => Ok(None),
            other => Err(value_error("layer_types", other, "`full_attention` or `sliding_attention`")),
        };
        return types.iter().map(window).collect();
    }
    Ok(match family {
        Family::Mistral => vec![given; layers],
        // Its class knows no layers without one.
        Family::Qwen3Moe if raw.use_sliding_window == Some(true) => vec![given; layers],
        Family::Qwen2 | Family::Qwen3 if raw.use_sliding_window == Some(true) => {
            let from = raw.max_window_layers.unwrap_or(28);
            (0..layers).map(|n| given.filter(|_| n >= from)).collect()
        }
        _ => vec![None; layers],
    })
}

fn ids(value: &Option<Value>, field: &str) -> Result<Vec<u32>, ModelError> {
    let wrong = || value_error(field, value.as_ref().unwrap_or(&Value::Null), "a token id or a list of them");
    let one = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(wrong);
    match value {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(list)) => list.iter().map(one).collect(),
        Some(single) => Ok(vec![one(single)?]),
    }
}

#[cfg(test)]
mod tests;
