//! The same for programs: everything, under keys that stay.

use serde_json::{Value, json};
use setun::config::{Family, ModelConfig, Numerics};

use super::{Facts, text};
use crate::output;

pub(super) fn object(facts: &Facts) -> Value {
    let types = facts.types();
    let types =
        types.iter().map(|(name, (n, bytes))| (name.clone(), json!({ "tensors": n, "bytes": bytes })));
    let found = facts.found.as_ref();
    let evidence: Vec<String> = facts.file.evidence().iter().map(|what| output::flags(what)).collect();
    json!({
        "path": facts.file.path(),
        "container": text::container(facts.file.kind()),
        "bytes": facts.file.tensors().map(|t| t.stored_bytes()).sum::<usize>(),
        "types": types.collect::<serde_json::Map<_, _>>(),
        "runnable": facts.runnable,
        "model": facts.config.as_ref().map(config),
        "facts": facts.provenance,
        "packing": found.map(|f| &f.packing),
        "scale_range": found.map(|f| f.scale_range),
        "zero_fraction": found.map(|f| f.zero_fraction),
        "bytes_by_part": found.map(|f| &f.bytes),
        "kinds": found.map(|f| &f.kinds),
        "matrices": found.map(|f| f.tensors.iter().filter(|t| t.values.is_some()).collect::<Vec<_>>()),
        "not_finite_tensors": found.map(|f| &f.not_finite),
        "unused_tensors": found.map(|f| &f.unused),
        "tokenizer": facts.tokenizer.as_ref().map(|t| json!({
            "vocab_size": t.vocab_size(),
            "bos": t.bos(),
            "eos": t.eos_ids(),
            "chat_template": t.chat_template(),
        })),
        "chat": facts.chat.as_ref().map(|chat| json!({
            "origin": chat.origin,
            "templates": facts.tokenizer.iter().flat_map(|t| t.chat_templates()).map(|t| json!({
                "name": t.name, "origin": t.origin, "source": t.source,
            })).collect::<Vec<_>>(),
            "system": chat.system.is_none(),
            "thinking_tags": chat.tags.map(|tags| [tags.open, tags.close]),
            "turn_end": match &chat.turn_end {
                setun::chat::TurnEnd::Token(id) => json!({ "token": id }),
                setun::chat::TurnEnd::Text(text) => json!({ "text": text }),
                setun::chat::TurnEnd::Unknown => Value::Null,
            },
        })),
        "ends": facts.ends.iter().map(|end| json!({
            "id": end.id,
            "token": facts.tokenizer.as_ref().and_then(|t| t.id_to_token(end.id)),
            "sources": end.sources,
        })).collect::<Vec<_>>(),
        "evidence": evidence,
        "sampling": facts.sampling,
        "losses": facts.losses,
        "odd": facts.odd,
    })
}

/// Short and stable, for scripts.
fn family_key(family: Family) -> &'static str {
    match family {
        Family::Llama => "llama",
        Family::Mistral => "mistral",
        Family::Qwen2 => "qwen2",
        Family::Qwen3 => "qwen3",
        Family::Qwen3Moe => "qwen3-moe",
        Family::Qwen35 => "qwen3.5",
        Family::BitNet => "bitnet",
        Family::BitNetSilu => "bitnet-silu",
    }
}

fn config(c: &ModelConfig) -> Value {
    let (numerics, scaling) = (text::numerics(c), format!("{:?}", c.rope.scaling));
    json!({
        "family": family_key(c.family),
        "parameters": c.parameters(),
        "active_parameters": c.active_parameters(),
        "block_weights": c.block_weights(),
        "experts": c.experts.as_ref().map(|e| json!({
            "count": e.count, "used": e.used, "intermediate_size": e.intermediate_size, "normalised": e.normalised,
            "dense_layers": e.dense_layers,
        })),
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_layers": c.num_layers,
        "heads": c.heads,
        "kv_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "max_positions": c.max_positions,
        "rms_norm_eps": c.rms_norm_eps,
        "tied": c.tied,
        "activation": c.activation,
        "sub_norms": c.sub_norms,
        "inner_norms": c.inner_norm_eps.is_some(),
        "qk_norm": c.qk_norm,
        "attention_gate": c.attention_gate,
        "hybrid": c.hybrid.as_ref().map(|h| json!({
            "recurrent_layers": h.layers,
            "key_heads": h.key_heads,
            "value_heads": h.value_heads,
            "head_dim": h.head_dim,
            "conv_kernel": h.conv_kernel,
            "draft_layers": h.draft_layers,
            "state_bytes": h.state_bytes(),
        })),
        "qkv_bias": c.qkv_bias,
        "output_bias": c.output_bias,
        "mlp_bias": c.mlp_bias,
        "windows": c.windows,
        "rope_theta": c.rope.theta,
        "rope_scaling": scaling,
        "ternary": c.numerics != Numerics::Float,
        "numerics": numerics,
        "activations": c.activations().to_string(),
        "rotated_matrices": c.rotation.as_ref().map_or(0, |r| r.folded()),
        "bos": c.bos,
        "eos": c.eos,
        "embedding": c.pooling.is_some(),
    })
}
