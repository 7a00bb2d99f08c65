//! Facts of a file that contradict each other, or that nothing here applies. Both are refused: a program that follows one of
//! two facts computes another model than a program that follows the other.

use serde_json::Value;

use super::value_error;
use crate::error::ModelError;
use crate::format::Checkpoint;
use crate::format::gguf::Metadata;

/// Refuses a `config.json` that says a thing twice and differently, or that scales or caps what these blocks do not.
pub(super) fn in_json(json: &Value) -> Result<(), ModelError> {
    const DOUBLE: [(&str, &str); 6] = [
        ("/rope_scaling/rope_type", "/rope_scaling/type"),
        ("/rope_parameters/rope_type", "/rope_parameters/type"),
        ("/rope_parameters/rope_type", "/rope_scaling/rope_type"),
        ("/rope_parameters/factor", "/rope_scaling/factor"),
        ("/rope_parameters/rope_theta", "/rope_theta"),
        ("/rope_parameters/partial_rotary_factor", "/partial_rotary_factor"),
    ];
    let given = |pointer: &str| json.pointer(pointer).filter(|value| !value.is_null());
    let dotted = |pointer: &str| pointer[1..].replace('/', ".");
    for (one, other) in DOUBLE {
        if let (Some(a), Some(b)) = (given(one), given(other))
            && !equal(a, b)
        {
            let expected = format!("{a}, as {} says, or absent", dotted(one));
            return Err(value_error(&dotted(other), b, expected));
        }
    }
    let classes = given("/architectures").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    if let [first, rest @ ..] = classes
        && let Some(other) = rest.iter().find(|class| *class != first)
    {
        return Err(value_error("architectures", other, format!("one class ({first} is named before it)")));
    }
    let number = |key: &str| given(key).and_then(Value::as_f64);
    let head_dim = number("/head_dim")
        .or_else(|| Some(number("/hidden_size")? / number("/num_attention_heads")?))
        .unwrap_or(f64::NAN);
    let neutral = [
        ("embedding_multiplier", 1.0),
        ("residual_multiplier", 1.0),
        ("logits_scaling", 1.0),
        ("logit_scale", 1.0),
        ("scale_emb", 1.0),
        ("dim_model_base", number("/hidden_size").unwrap_or(f64::NAN)),
        ("attention_multiplier", 1.0 / head_dim.sqrt()),
        ("query_pre_attn_scalar", head_dim),
        ("final_logit_softcapping", 0.0),
        ("attn_logit_softcapping", 0.0),
        ("clip_qkv", 0.0),
    ];
    for (key, neutral) in neutral {
        let Some(found) = given(&format!("/{key}")) else { continue };
        if found.as_f64().is_none_or(|found| (found - neutral).abs() > 1e-6 * neutral.abs()) {
            return Err(value_error(key, found, "absent, since nothing here applies it"));
        }
    }
    match given("/alibi") {
        Some(Value::Bool(true)) => {
            Err(value_error("alibi", true, "absent or false: positions are rotary here"))
        }
        _ => Ok(()),
    }
}

fn equal(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    }
}

/// Refuses a file that calls itself Bonsai 2, whose ternary weights are stored rotated, and has lost the word for it: it would run
/// to nonsense.
pub(super) fn lost_rotation(file: &Checkpoint, meta: &Metadata) -> Result<(), ModelError> {
    let said = |key: &str| meta.get(key).and_then(|value| value.as_str()).unwrap_or_default();
    let stem = file.path().file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    let plain = |name: &str| name.to_lowercase().replace(['-', '_', '.'], " ") + " ";
    let names = [said("general.name"), said("general.basename"), &stem].map(plain);
    let packed = file.tensors().any(|t| t.name.starts_with("blk.") && t.encoding.is_ternary());
    match names.iter().any(|name| name.contains("bonsai 2 ")) && packed {
        false => Ok(()),
        true => Err(ModelError::Metadata {
            key: "prism.hadamard.version".into(),
            what: "is missing, but the file calls itself Bonsai 2, whose weights are stored rotated: whoever made it lost the \
                   `prism.hadamard.*` keys, without which it is nonsense; take another copy"
                .into(),
        }),
    }
}

/// Refuses the same in GGUF metadata.
pub(super) fn in_gguf(meta: &Metadata, arch: &str) -> Result<(), ModelError> {
    let key = |name: &str| format!("{arch}.{name}");
    if let Some(parts) = meta.u64("split.count")?.filter(|&n| n > 1) {
        let expected = "absent or 1: join the parts first (`llama-gguf-split --merge`)";
        return Err(value_error("split.count", parts, expected));
    }
    if let Some(version) = meta.u64("general.quantization_version")?.filter(|&v| v != 2) {
        let expected = "2, the only version whose blocks this program knows";
        return Err(value_error("general.quantization_version", version, expected));
    }
    let (rms, plain) = (key("attention.layer_norm_rms_epsilon"), key("attention.layer_norm_epsilon"));
    if let (Some(rms_eps), Some(eps)) = (meta.f32(&rms)?, meta.f32(&plain)?)
        && rms_eps != eps
    {
        return Err(value_error(&plain, eps, format!("{rms_eps}, as {rms} says, or absent")));
    }
    if let Some(bias) = meta.f32(&key("attention.max_alibi_bias"))?.filter(|&bias| bias != 0.0) {
        let expected = "absent or 0: positions are rotary here";
        return Err(value_error(&key("attention.max_alibi_bias"), bias, expected));
    }
    match meta.bool(&key("use_parallel_residual"))? {
        Some(true) => {
            let expected = "absent or false: attention comes before the feed-forward layer here";
            Err(value_error(&key("use_parallel_residual"), true, expected))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::format::gguf::Value as Stored;

    #[test]
    fn a_thing_said_twice_and_differently_in_a_config_is_refused_by_name() {
        for (config, named) in [
            (json!({"rope_scaling": {"type": "linear", "rope_type": "yarn"}}), "rope_scaling.type"),
            (json!({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e4}}), "rope_theta"),
            (json!({"architectures": ["LlamaForCausalLM", "MistralForCausalLM"]}), "architectures"),
        ] {
            let error = in_json(&config).unwrap_err().to_string();
            assert!(error.contains(&format!("config field `{named}`")), "{error}");
        }
        in_json(&json!({"rope_theta": 10000, "rope_parameters": {"rope_theta": 1e4, "rope_type": null}}))
            .unwrap();
    }

    #[test]
    fn a_factor_that_no_block_applies_is_refused_unless_it_changes_nothing() {
        let sizes = json!({"hidden_size": 64, "num_attention_heads": 4});
        for (key, other, neutral) in [
            ("scale_emb", json!(12), json!(1)),
            ("logits_scaling", json!(8.0), json!(1.0)),
            ("attention_multiplier", json!(0.1), json!(0.25)),
            ("final_logit_softcapping", json!(30.0), json!(null)),
            ("clip_qkv", json!("wide"), json!(0)),
        ] {
            let with = |value: Value| {
                let mut config = sizes.clone();
                config[key] = value;
                in_json(&config)
            };
            assert!(with(other).unwrap_err().to_string().contains(key), "{key}");
            with(neutral).unwrap();
        }
    }

    #[test]
    fn contradictions_in_metadata_are_refused_by_key() {
        let both =
            [("llama.attention.layer_norm_rms_epsilon", 1e-5), ("llama.attention.layer_norm_epsilon", 1e-3)];
        let mut meta = Metadata::new();
        for (key, eps) in both {
            meta.insert(key, Stored::F32(eps));
        }
        assert!(in_gguf(&meta, "llama").unwrap_err().to_string().contains("layer_norm_epsilon"));
        in_gguf(&meta, "qwen3").unwrap();
        for (key, value) in [
            ("split.count", Stored::U16(3)),
            ("general.quantization_version", Stored::U32(3)),
            ("llama.attention.max_alibi_bias", Stored::F32(8.0)),
            ("llama.use_parallel_residual", Stored::Bool(true)),
        ] {
            let mut meta = Metadata::new();
            meta.insert(key, value);
            assert!(in_gguf(&meta, "llama").unwrap_err().to_string().contains(key), "{key}");
        }
    }
}
