//! The keys of a `qwen35` file that say what its gated DeltaNet layers are.

use super::Keys;
use crate::config::{HeadOrder, Hybrid, value_error};
use crate::error::ModelError;
use crate::format::gguf::{Array, Value};

/// The gated DeltaNet layers of a `qwen35` file with `blocks` blocks, those for drafting included.
pub(super) fn read(keys: &Keys, blocks: usize) -> Result<Hybrid, ModelError> {
    let draft_layers = keys.size("nextn_predict_layers")?.unwrap_or(0);
    let Some(own @ 1..) = blocks.checked_sub(draft_layers) else {
        let expected = format!("below {} = {blocks}, which counts them", keys.name("block_count"));
        return Err(value_error(&keys.name("nextn_predict_layers"), draft_layers, expected));
    };
    let own = own.min(crate::config::MAX_LAYERS);
    let recurrent = keys.name("attention.recurrent_layers");
    let interval = keys.size("full_attention_interval")?;
    let layers = match (keys.meta.get(&recurrent), interval) {
        (Some(Value::Array(Array::Bool(list))), _) if list.len() >= own && list.len() <= blocks => {
            list[..own].to_vec()
        }
        (Some(_), _) => {
            return Err(value_error(
                &recurrent,
                "something else",
                format!("{blocks} booleans, one per block"),
            ));
        }
        (None, Some(interval @ 1..)) => (1..=own).map(|n| n % interval != 0).collect(),
        (None, Some(0)) => {
            return Err(value_error(&keys.name("full_attention_interval"), 0, "at least 1"));
        }
        (None, None) => return Err(missing(keys, "full_attention_interval")),
    };
    // Defaults for these are other families'.
    for key in ["attention.key_length", "attention.head_count_kv", "rope.dimension_count", "rope.freq_base"] {
        if keys.meta.get(&keys.name(key)).is_none() {
            return Err(missing(keys, key));
        }
    }
    let (value_heads, head_dim) = (keys.need_size("ssm.time_step_rank")?, keys.need_size("ssm.state_size")?);
    let inner = keys.need_size("ssm.inner_size")?;
    if value_heads.checked_mul(head_dim) != Some(inner) {
        let expected = format!("ssm.time_step_rank times ssm.state_size, {value_heads} times {head_dim}");
        return Err(value_error(&keys.name("ssm.inner_size"), inner, expected));
    }
    let sections = match keys.meta.get(&keys.name("rope.dimension_sections")) {
        None => Vec::new(),
        Some(value) => {
            let list = value.as_array().and_then(Array::to_u64s).unwrap_or_default();
            let sections: Vec<u32> = list.iter().filter_map(|&n| u32::try_from(n).ok()).collect();
            if sections.is_empty() || sections.len() != list.len() || list.len() > 4 {
                let expected = "up to four numbers of rotary pairs";
                return Err(value_error(&keys.name("rope.dimension_sections"), "something else", expected));
            }
            sections
        }
    };
    Ok(Hybrid {
        layers,
        key_heads: keys.need_size("ssm.group_count")?,
        value_heads,
        head_dim,
        conv_kernel: keys.need_size("ssm.conv_kernel")?,
        order: HeadOrder::Tiled,
        draft_layers,
        rope_sections: sections,
    })
}

fn missing(keys: &Keys, key: &str) -> ModelError {
    ModelError::Metadata { key: keys.name(key), what: "is missing".into() }
}

/// What [`read`] reads back.
pub(super) fn write(hybrid: &Hybrid, put: &mut impl FnMut(&str, Value)) {
    let size = |n: usize| Value::U32(n as u32);
    put("ssm.conv_kernel", size(hybrid.conv_kernel));
    put("ssm.state_size", size(hybrid.head_dim));
    put("ssm.group_count", size(hybrid.key_heads));
    put("ssm.time_step_rank", size(hybrid.value_heads));
    put("ssm.inner_size", size(hybrid.value_heads * hybrid.head_dim));
    // Readers that know no list of layers know the interval, which most models have.
    let first = hybrid.layers.iter().position(|own| !own).map_or(hybrid.layers.len() + 1, |n| n + 1);
    put("full_attention_interval", size(first));
    if hybrid.layers.iter().enumerate().any(|(n, &own)| own == (n + 1).is_multiple_of(first)) {
        put("attention.recurrent_layers", Value::Array(Array::Bool(hybrid.layers.clone())));
    }
    if !hybrid.rope_sections.is_empty() {
        let sections = hybrid.rope_sections.iter().map(|&n| n as i32).collect();
        put("rope.dimension_sections", Value::Array(Array::I32(sections)));
    }
}
