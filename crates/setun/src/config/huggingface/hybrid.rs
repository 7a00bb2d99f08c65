//! The fields of Qwen3.5's gated DeltaNet layers.

use serde_json::{Map, Value, json};

use super::need;
use super::raw::RawConfig;
use crate::config::{HeadOrder, Hybrid, MAX_LAYERS, value_error};
use crate::error::ModelError;

/// The gated DeltaNet layers of a Qwen3.5 model. What its class would fill in has to be there: the class's defaults are those
/// of one size, and a model run with another's is another model.
pub(super) fn read(raw: &RawConfig) -> Result<Hybrid, ModelError> {
    let rope = raw.rope_parameters.as_ref().or(raw.rope_scaling.as_ref());
    need(raw.head_dim, "head_dim")?;
    need(raw.num_key_value_heads, "num_key_value_heads")?;
    need(raw.max_position_embeddings, "max_position_embeddings")?;
    need(raw.rope_theta.or(rope.and_then(|r| r.rope_theta)), "rope_theta")?;
    let partial = raw.partial_rotary_factor.or(rope.and_then(|r| r.partial_rotary_factor));
    need(partial, "partial_rotary_factor")?;
    let fixed =
        [("attention_bias", raw.attention_bias, false), ("attn_output_gate", raw.attn_output_gate, true)];
    for (field, found, expected) in fixed {
        if found.is_some_and(|found| found != expected) {
            return Err(value_error(field, !expected, format!("{expected} or absent in a Qwen3.5 model")));
        }
    }
    let num_layers = need(raw.num_hidden_layers, "num_hidden_layers")?.min(MAX_LAYERS);
    let layers = match (&raw.layer_types, raw.full_attention_interval) {
        (Some(types), _) => types.iter().map(|kind| kind == "linear_attention").collect(),
        (None, Some(interval @ 1..)) => (1..=num_layers).map(|n| n % interval != 0).collect(),
        (None, Some(0)) => return Err(value_error("full_attention_interval", 0, "at least 1")),
        (None, None) => return Err(ModelError::ConfigMissing { field: "layer_types".into() }),
    };
    let head_dim = need(raw.linear_key_head_dim, "linear_key_head_dim")?;
    let value_dim = need(raw.linear_value_head_dim, "linear_value_head_dim")?;
    if value_dim != head_dim {
        let expected = format!("{head_dim}, as linear_key_head_dim is");
        return Err(value_error("linear_value_head_dim", value_dim, expected));
    }
    let rope_sections = match rope.and_then(|r| r.mrope_section.as_deref()) {
        None => Vec::new(),
        // GGUF has a fourth, which nothing uses.
        Some(&[time, height, width]) => vec![time, height, width, 0],
        Some(other) => return Err(value_error("mrope_section", format!("{} numbers", other.len()), "three")),
    };
    Ok(Hybrid {
        layers,
        key_heads: need(raw.linear_num_key_heads, "linear_num_key_heads")?,
        value_heads: need(raw.linear_num_value_heads, "linear_num_value_heads")?,
        head_dim,
        conv_kernel: need(raw.linear_conv_kernel_dim, "linear_conv_kernel_dim")?,
        order: HeadOrder::Grouped,
        draft_layers: 0,
        rope_sections,
    })
}

/// The fields that [`read`] reads back.
pub(super) fn write(hybrid: &Hybrid, map: &mut Map<String, Value>) {
    let kind = |own: &bool| if *own { "linear_attention" } else { "full_attention" };
    map.insert("layer_types".into(), hybrid.layers.iter().map(kind).collect());
    for (key, value) in [
        ("linear_conv_kernel_dim", hybrid.conv_kernel),
        ("linear_num_key_heads", hybrid.key_heads),
        ("linear_num_value_heads", hybrid.value_heads),
        ("linear_key_head_dim", hybrid.head_dim),
        ("linear_value_head_dim", hybrid.head_dim),
    ] {
        map.insert(key.into(), json!(value));
    }
    let [time, height, width, 0] = hybrid.rope_sections[..] else { return };
    let mut rope = map.remove("rope_scaling").unwrap_or_else(|| json!({"rope_type": "default"}));
    rope["mrope_section"] = json!([time, height, width]);
    map.insert("rope_scaling".into(), rope);
}
