//! `config.json` as Hugging Face models carry it, read and written.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::rope::{Rope, RopeScaling, yarn_attention};
use super::{Activation, Exceptions, Family, ModelConfig, Numerics, Storage, Ternary, value_error};
use crate::error::ModelError;

/// The fields that matter, each optional so that a missing one can be named.
#[derive(Deserialize)]
struct RawConfig {
    #[serde(default)]
    architectures: Vec<String>,
    model_type: Option<String>,
    hidden_act: Option<String>,
    vocab_size: Option<usize>,
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    max_position_embeddings: Option<usize>,
    rms_norm_eps: Option<f64>,
    tie_word_embeddings: Option<bool>,
    rope_theta: Option<f64>,
    rope_scaling: Option<RawRope>,
    rope_parameters: Option<RawRope>,
    partial_rotary_factor: Option<f64>,
    sliding_window: Option<usize>,
    use_sliding_window: Option<bool>,
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    quantization_config: Option<RawQuantization>,
    weight_bits: Option<u32>,
    input_bits: Option<u32>,
    bos_token_id: Option<Value>,
    eos_token_id: Option<Value>,
}

#[derive(Deserialize)]
struct RawRope {
    rope_type: Option<String>,
    r#type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    original_max_position_embeddings: Option<usize>,
    attention_factor: Option<f64>,
    beta_fast: Option<f64>,
    beta_slow: Option<f64>,
    mscale: Option<f64>,
    mscale_all_dim: Option<f64>,
    truncate: Option<bool>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    partial_rotary_factor: Option<f64>,
}

#[derive(Deserialize)]
struct RawQuantization {
    quant_method: Option<String>,
    linear_class: Option<String>,
    quantization_mode: Option<String>,
    modules_to_not_convert: Option<Vec<String>>,
    #[serde(default)]
    use_rms_norm: bool,
    rms_norm_eps: Option<f64>,
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
        let raw = RawConfig::deserialize(json)
            .map_err(|e| value_error("config.json", e, "an object of a model's settings in their usual types"))?;
        let family = family(&raw)?;
        let activation = match (raw.hidden_act.as_deref(), family) {
            (Some("silu" | "swish"), _) => Activation::Silu,
            (Some("relu2"), _) | (None, Family::BitNet) => Activation::Relu2,
            (Some(other), _) => return Err(value_error("hidden_act", other, "`silu` or `relu2`")),
            (None, _) => return Err(ModelError::ConfigMissing { field: "hidden_act".into() }),
        };
        let (hidden_size, heads) =
            (need(raw.hidden_size, "hidden_size")?, need(raw.num_attention_heads, "num_attention_heads")?);
        let head_dim = match raw.head_dim {
            Some(given) => given,
            None if heads > 0 && hidden_size % heads == 0 => hidden_size / heads,
            None => {
                let expected = format!("a multiple of num_attention_heads = {heads}, since head_dim is not given");
                return Err(value_error("hidden_size", hidden_size, expected));
            }
        };
        let num_layers = need(raw.num_hidden_layers, "num_hidden_layers")?;
        let max_positions = need(raw.max_position_embeddings, "max_position_embeddings")?;
        let bias = raw.attention_bias.unwrap_or(false);
        let config = Self {
            family,
            vocab_size: need(raw.vocab_size, "vocab_size")?,
            hidden_size,
            intermediate_size: need(raw.intermediate_size, "intermediate_size")?,
            num_layers,
            heads,
            kv_heads: raw.num_key_value_heads.unwrap_or(heads),
            head_dim,
            max_positions,
            rms_norm_eps: need(raw.rms_norm_eps, "rms_norm_eps")? as f32,
            // The class default of every family here, `transformers` included; files leave it out when false.
            tied: raw.tie_word_embeddings.unwrap_or(family == Family::BitNetSilu),
            activation,
            rope: rope(&raw, head_dim, max_positions)?,
            windows: windows(&raw, family, num_layers)?,
            sub_norms: matches!(family, Family::BitNet | Family::BitNetSilu),
            inner_norm_eps: raw
                .quantization_config
                .as_ref()
                .filter(|q| q.use_rms_norm)
                .map(|q| q.rms_norm_eps.unwrap_or(1e-6) as f32),
            qkv_bias: bias || family == Family::Qwen2,
            output_bias: bias && family != Family::Qwen2,
            mlp_bias: raw.mlp_bias.unwrap_or(false),
            numerics: numerics(&raw, family)?,
            bos: ids(&raw.bos_token_id, "bos_token_id")?.first().copied(),
            eos: ids(&raw.eos_token_id, "eos_token_id")?,
        };
        config.check()
    }

    /// The `config.json` that [`ModelConfig::from_json`] reads back to the same configuration, in the field's spelling.
    pub fn to_json(&self) -> Value {
        let (model_type, architecture) = match self.family {
            Family::Llama => ("llama", "LlamaForCausalLM"),
            Family::Mistral => ("mistral", "MistralForCausalLM"),
            Family::Qwen2 => ("qwen2", "Qwen2ForCausalLM"),
            Family::BitNet => ("bitnet", "BitNetForCausalLM"),
            Family::BitNetSilu => ("bitnet", "BitnetForCausalLM"),
        };
        let mut json = json!({
            "architectures": [architecture],
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
        if self.rope.rotary_dim != self.head_dim {
            let factor = self.rope.rotary_dim as f64 / self.head_dim as f64;
            map.insert("partial_rotary_factor".into(), json!(factor));
        }
        if let Some(scaling) = scaling_json(&self.rope.scaling) {
            map.insert("rope_scaling".into(), scaling);
        }
        self.windows_json(map);
        if let Numerics::Ternary(ternary) = &self.numerics {
            let (class, mode) = match ternary.storage {
                Storage::Masters => ("autobitlinear", "online"),
                Storage::Divide => ("bitlinear", "offline"),
                Storage::Multiply | Storage::SelfDescribed => ("autobitlinear", "offline"),
            };
            let mut quantization = json!({
                "quant_method": "bitnet", "linear_class": class, "quantization_mode": mode,
                "modules_to_not_convert": ternary.exceptions.as_ref().map(Exceptions::names),
            });
            if let Some(eps) = self.inner_norm_eps {
                quantization["use_rms_norm"] = json!(true);
                quantization["rms_norm_eps"] = json!(shortest(eps));
            }
            map.insert("quantization_config".into(), quantization);
        }
        json
    }

    fn windows_json(&self, map: &mut Map<String, Value>) {
        let Some(window) = self.windows.iter().flatten().next() else { return };
        map.insert("sliding_window".into(), json!(window));
        if self.family == Family::Qwen2 {
            map.insert("use_sliding_window".into(), json!(true));
        }
        if self.windows.iter().any(Option::is_none) {
            let kind = |w: &Option<usize>| if w.is_some() { "sliding_attention" } else { "full_attention" };
            map.insert("layer_types".into(), self.windows.iter().map(kind).collect());
        }
    }
}

/// `1e-5` rather than `9.999999747378752e-06`.
fn shortest(x: f32) -> f64 {
    x.to_string().parse().expect("a float's own text is a float")
}

fn family(raw: &RawConfig) -> Result<Family, ModelError> {
    // 1bitLLM's files say model_type "llama"; the class name, lower-case n, is what tells them apart.
    let class = raw.architectures.first().map(String::as_str);
    Ok(match (class, raw.model_type.as_deref()) {
        (Some("BitnetForCausalLM"), _) => Family::BitNetSilu,
        (Some("BitNetForCausalLM"), _) | (None, Some("bitnet")) => Family::BitNet,
        (Some("LlamaForCausalLM"), _) | (None, Some("llama")) => Family::Llama,
        (Some("MistralForCausalLM"), _) | (None, Some("mistral")) => Family::Mistral,
        (Some("Qwen2ForCausalLM"), _) | (None, Some("qwen2")) => Family::Qwen2,
        (None, None) => return Err(ModelError::ConfigMissing { field: "architectures".into() }),
        (class, model_type) => {
            let found = class.or(model_type).unwrap_or_default();
            let expected = "one of LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, BitNetForCausalLM and \
                            BitnetForCausalLM, the families this version runs";
            return Err(value_error("architectures", found, expected));
        }
    })
}

fn numerics(raw: &RawConfig, family: Family) -> Result<Numerics, ModelError> {
    let Some(q) = &raw.quantization_config else {
        return match (family, raw.weight_bits, raw.input_bits) {
            // 1bitLLM: float masters, quantised on the fly; nothing but these two keys says so.
            (Family::BitNetSilu, Some(1), Some(8)) => {
                Ok(Numerics::Ternary(Ternary { storage: Storage::Masters, exceptions: None }))
            }
            (Family::BitNetSilu, bits, input) => {
                let found = format!("weight_bits {bits:?}, input_bits {input:?}");
                Err(value_error("weight_bits / input_bits", found, "1 and 8, as the 1bitLLM models have"))
            }
            (Family::BitNet, ..) => Err(ModelError::ConfigMissing { field: "quantization_config".into() }),
            _ => Ok(Numerics::Float),
        };
    };
    match q.quant_method.as_deref() {
        Some("bitnet") => {}
        Some(other) => return Err(value_error("quantization_config.quant_method", other, "`bitnet`")),
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
            return Err(value_error("quantization_config.linear_class", class, "`bitlinear` or `autobitlinear`"));
        }
    };
    let exceptions = q.modules_to_not_convert.clone().map(Exceptions::new).transpose()?;
    Ok(Numerics::Ternary(Ternary { storage, exceptions }))
}

fn windows(raw: &RawConfig, family: Family, layers: usize) -> Result<Vec<Option<usize>>, ModelError> {
    let layers = layers.min(super::MAX_LAYERS);
    if let Some(types) = &raw.layer_types {
        let window = |kind: &String| match kind.as_str() {
            "full_attention" => Ok(None),
            "sliding_attention" => need(raw.sliding_window, "sliding_window").map(Some),
            other => Err(value_error("layer_types", other, "`full_attention` or `sliding_attention`")),
        };
        return types.iter().map(window).collect();
    }
    Ok(match family {
        Family::Mistral => vec![raw.sliding_window; layers],
        Family::Qwen2 if raw.use_sliding_window == Some(true) => {
            let (window, from) =
                (need(raw.sliding_window, "sliding_window")?, need(raw.max_window_layers, "max_window_layers")?);
            (0..layers).map(|n| (n >= from).then_some(window)).collect()
        }
        _ => vec![None; layers],
    })
}

fn rope(raw: &RawConfig, head_dim: usize, max_positions: usize) -> Result<Rope, ModelError> {
    let section = raw.rope_parameters.as_ref().or(raw.rope_scaling.as_ref());
    let theta = raw.rope_theta.or_else(|| section.and_then(|s| s.rope_theta));
    let partial = raw.partial_rotary_factor.or_else(|| section.and_then(|s| s.partial_rotary_factor)).unwrap_or(1.0);
    let scaling = match section {
        None => RopeScaling::Default,
        Some(section) => scaling(section, max_positions)?,
    };
    let rotary_dim = (head_dim as f64 * partial) as usize;
    Ok(Rope { theta: need(theta, "rope_theta")?, rotary_dim, scaling })
}

fn scaling(raw: &RawRope, max_positions: usize) -> Result<RopeScaling, ModelError> {
    let factor = || need(raw.factor, "rope_scaling.factor");
    let original = || need(raw.original_max_position_embeddings, "rope_scaling.original_max_position_embeddings");
    Ok(match raw.rope_type.as_deref().or(raw.r#type.as_deref()) {
        None | Some("default") => RopeScaling::Default,
        Some("linear") => RopeScaling::Linear { factor: factor()? },
        Some("dynamic") => RopeScaling::Dynamic { factor: factor()?, max_positions },
        Some("yarn") => {
            let original = raw.original_max_position_embeddings.unwrap_or(max_positions);
            let factor = raw.factor.unwrap_or(max_positions as f64 / original.max(1) as f64);
            RopeScaling::Yarn {
                factor,
                original,
                beta_fast: raw.beta_fast.unwrap_or(32.0),
                beta_slow: raw.beta_slow.unwrap_or(1.0),
                attention_factor: raw
                    .attention_factor
                    .unwrap_or_else(|| yarn_attention(factor, raw.mscale, raw.mscale_all_dim)),
                truncate: raw.truncate.unwrap_or(true),
            }
        }
        Some("llama3") => RopeScaling::Llama3 {
            factor: factor()?,
            original: original()?,
            low_freq: need(raw.low_freq_factor, "rope_scaling.low_freq_factor")?,
            high_freq: need(raw.high_freq_factor, "rope_scaling.high_freq_factor")?,
        },
        Some(other) => {
            let expected = "one of `default`, `linear`, `dynamic`, `yarn` and `llama3`";
            return Err(value_error("rope_scaling.rope_type", other, expected));
        }
    })
}

fn scaling_json(scaling: &RopeScaling) -> Option<Value> {
    Some(match scaling {
        // Divisors have no spelling here; a converter refuses them before it comes to this.
        RopeScaling::Default | RopeScaling::Divisors(_) => return None,
        RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
        RopeScaling::Dynamic { factor, .. } => json!({"rope_type": "dynamic", "factor": factor}),
        RopeScaling::Yarn { factor, original, beta_fast, beta_slow, attention_factor, truncate } => json!({
            "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original,
            "beta_fast": beta_fast, "beta_slow": beta_slow, "attention_factor": attention_factor,
            "truncate": truncate,
        }),
        RopeScaling::Llama3 { factor, original, low_freq, high_freq } => json!({
            "rope_type": "llama3", "factor": factor, "original_max_position_embeddings": original,
            "low_freq_factor": low_freq, "high_freq_factor": high_freq,
        }),
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
