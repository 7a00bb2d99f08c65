//! Position encoding as `config.json` spells it: `rope_theta` with `rope_scaling`, or `rope_parameters` alone.

use serde_json::{Value, json};

use super::need;
use super::raw::{RawConfig, RawRope};
use crate::config::rope::{Rope, RopeScaling, yarn_attention};
use crate::config::{Family, value_error};
use crate::error::ModelError;

pub(super) fn read(
    raw: &RawConfig,
    family: Family,
    head_dim: usize,
    max_positions: usize,
    theta: f64,
) -> Result<Rope, ModelError> {
    let section = raw.rope_parameters.as_ref().or(raw.rope_scaling.as_ref());
    let theta = section.and_then(|s| s.rope_theta).or(raw.rope_theta).unwrap_or(theta);
    let scaling = match section {
        None => RopeScaling::Default,
        Some(section) => scaling(section, max_positions)?,
    };
    let partial = section.and_then(|s| s.partial_rotary_factor).or(raw.partial_rotary_factor);
    if family == Family::Qwen35 {
        return Ok(Rope { theta, rotary_dim: (head_dim as f64 * partial.unwrap_or(1.0)) as usize, scaling });
    }
    // The classes of the other families rotate whole heads and never look at the factor (`compute_default_rope_parameters` in
    // transformers 5.23, modeling_llama.py and its kin); with a scaled type they make tables that fit no head, and fail.
    if let Some(partial) = partial.filter(|&p| p != 1.0 && scaling != RopeScaling::Default) {
        let expected = "1 or absent beside a scaled rope_type, since these families rotate whole heads";
        return Err(value_error("partial_rotary_factor", partial, expected));
    }
    Ok(Rope { theta, rotary_dim: head_dim, scaling })
}

fn scaling(raw: &RawRope, max_positions: usize) -> Result<RopeScaling, ModelError> {
    let factor = || need(raw.factor, "rope_scaling.factor");
    let original =
        || need(raw.original_max_position_embeddings, "rope_scaling.original_max_position_embeddings");
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

pub(super) fn scaling_json(scaling: &RopeScaling) -> Option<Value> {
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
