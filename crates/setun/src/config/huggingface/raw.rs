//! The fields of a `config.json`, in the types that programs write them in.

use serde::{Deserialize, Deserializer};
use serde_json::Value;

/// The fields that matter, each optional so that a missing one can be named.
#[derive(Deserialize)]
pub(super) struct RawConfig {
    pub(super) architectures: Option<Vec<String>>,
    pub(super) model_type: Option<String>,
    pub(super) hidden_act: Option<String>,
    #[serde(default, deserialize_with = "whole")]
    pub(super) vocab_size: Option<usize>,
    #[serde(default, deserialize_with = "whole")]
    pub(super) hidden_size: Option<usize>,
    #[serde(default, deserialize_with = "whole")]
    pub(super) intermediate_size: Option<usize>,
    #[serde(default, deserialize_with = "whole")]
    pub(super) num_hidden_layers: Option<usize>,
    #[serde(default, deserialize_with = "whole")]
    pub(super) num_attention_heads: Option<usize>,
    #[serde(default, deserialize_with = "whole")]
    pub(super) num_key_value_heads: Option<usize>,
    #[serde(default, deserialize_with = "whole")]
    pub(super) head_dim: Option<usize>,
    #[serde(default, deserialize_with = "whole")]
    pub(super) max_position_embeddings: Option<usize>,
    pub(super) rms_norm_eps: Option<f64>,
    pub(super) tie_word_embeddings: Option<bool>,
    pub(super) rope_theta: Option<f64>,
    pub(super) rope_scaling: Option<RawRope>,
    #[serde(default, deserialize_with = "one_for_all_layers")]
    pub(super) rope_parameters: Option<RawRope>,
    pub(super) partial_rotary_factor: Option<f64>,
    #[serde(default, deserialize_with = "whole")]
    pub(super) sliding_window: Option<usize>,
    pub(super) use_sliding_window: Option<bool>,
    #[serde(default, deserialize_with = "whole")]
    pub(super) max_window_layers: Option<usize>,
    pub(super) layer_types: Option<Vec<String>>,
    #[serde(default, deserialize_with = "whole")]
    pub(super) full_attention_interval: Option<usize>,
    pub(super) attn_output_gate: Option<bool>,
    #[serde(default, deserialize_with = "whole")]
    pub(super) linear_conv_kernel_dim: Option<usize>,
    #[serde(default, deserialize_with = "whole")]
    pub(super) linear_num_key_heads: Option<usize>,
    #[serde(default, deserialize_with = "whole")]
    pub(super) linear_num_value_heads: Option<usize>,
    #[serde(default, deserialize_with = "whole")]
    pub(super) linear_key_head_dim: Option<usize>,
    #[serde(default, deserialize_with = "whole")]
    pub(super) linear_value_head_dim: Option<usize>,
    pub(super) attention_bias: Option<bool>,
    pub(super) mlp_bias: Option<bool>,
    pub(super) quantization_config: Option<RawQuantization>,
    /// MLX's own section.
    pub(super) quantization: Option<serde_json::Map<String, Value>>,
    pub(super) weight_bits: Option<f64>,
    pub(super) input_bits: Option<f64>,
    pub(super) bos_token_id: Option<Value>,
    pub(super) eos_token_id: Option<Value>,
}

#[derive(Deserialize)]
pub(super) struct RawRope {
    pub(super) rope_type: Option<String>,
    pub(super) r#type: Option<String>,
    pub(super) rope_theta: Option<f64>,
    pub(super) factor: Option<f64>,
    #[serde(default, deserialize_with = "whole")]
    pub(super) original_max_position_embeddings: Option<usize>,
    pub(super) attention_factor: Option<f64>,
    pub(super) beta_fast: Option<f64>,
    pub(super) beta_slow: Option<f64>,
    pub(super) mscale: Option<f64>,
    pub(super) mscale_all_dim: Option<f64>,
    pub(super) truncate: Option<bool>,
    pub(super) low_freq_factor: Option<f64>,
    pub(super) high_freq_factor: Option<f64>,
    pub(super) partial_rotary_factor: Option<f64>,
    pub(super) mrope_section: Option<Vec<u32>>,
}

#[derive(Deserialize)]
pub(super) struct RawQuantization {
    pub(super) quant_method: Option<String>,
    pub(super) linear_class: Option<String>,
    pub(super) quantization_mode: Option<String>,
    pub(super) modules_to_not_convert: Option<Vec<String>>,
    pub(super) use_rms_norm: Option<bool>,
    pub(super) rms_norm_eps: Option<f64>,
    /// Ours, beside `quant_method` `bitnet`: 8 where it is absent, or 4.
    pub(super) activation_bits: Option<u64>,
    /// Ours, with `quant_method` `bitnet_hadamard`.
    pub(super) hadamard: Option<RawHadamard>,
}

/// Which inputs are rotated before they are rounded.
#[derive(Deserialize)]
pub(super) struct RawHadamard {
    pub(super) block_size: usize,
    pub(super) modules: Vec<String>,
}

/// A size, also where a program wrote it as a float (`2048.0`, `1e4`).
fn whole<'de, D: Deserializer<'de>>(from: D) -> Result<Option<usize>, D::Error> {
    let Some(number) = Option::<serde_json::Number>::deserialize(from)? else { return Ok(None) };
    let float = number.as_f64().filter(|x| x.fract() == 0.0 && (0.0..9e15).contains(x)).map(|x| x as u64);
    let size = number.as_u64().or(float).and_then(|n| usize::try_from(n).ok());
    size.map(Some).ok_or_else(|| serde::de::Error::custom(format!("{number} is not a whole number from 0")))
}

/// `rope_parameters`, which may hold one section per kind of layer; sections that differ cannot be run.
fn one_for_all_layers<'de, D: Deserializer<'de>>(from: D) -> Result<Option<RawRope>, D::Error> {
    use serde::de::Error;
    let value = Value::deserialize(from)?;
    let nested = value.as_object().map(|map| map.values().filter(|v| v.is_object()).collect::<Vec<_>>());
    let flat = match nested.as_deref() {
        Some([first, rest @ ..]) => match rest.iter().all(|section| section == first) {
            true => *first,
            false => {
                return Err(D::Error::custom(
                    "layers differ in it, but one section for all layers is what this version runs",
                ));
            }
        },
        _ => &value,
    };
    Option::<RawRope>::deserialize(flat).map_err(D::Error::custom)
}
