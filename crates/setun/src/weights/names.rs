//! What tensors are called: the model asks in Hugging Face's spelling, files have their own.

use super::experts;
use crate::config::ModelConfig;
use crate::format::Checkpoint;

/// The name under which `file` holds what the model calls `name`; if it does not, the usual one of its container.
pub(crate) fn stored_name(file: &Checkpoint, hybrid: bool, name: &str) -> String {
    let there = |name: &String| file.info(name).is_some();
    if file.gguf_metadata().is_some() {
        let own = gguf_name_in(hybrid, name);
        // bitnet.cpp's name of norms inside linear layers.
        let other = own.strip_suffix(".rms_norm.weight").map(|module| format!("{module}_norm_in.weight"));
        return other.filter(|other| !there(&own) && there(other)).unwrap_or(own);
    }
    // 1bitLLM's names of the sub-norms, BitDistill's of the norms inside linear layers.
    let older = name
        .replace("self_attn.attn_sub_norm.", "self_attn.inner_attn_ln.")
        .replace("mlp.ffn_sub_norm.", "mlp.ffn_layernorm.")
        .replace("_proj.rms_norm.", "_proj.norm.");
    // Embedding models are saved without the head around them.
    let bare = |name: &str| name.strip_prefix("model.").unwrap_or(name).to_owned();
    let names = [name.to_owned(), older.clone(), bare(name), bare(&older)];
    names.into_iter().find(there).unwrap_or_else(|| name.to_owned())
}

/// GGUF's name of a tensor that Hugging Face calls `name`; that of the stack they are in for experts.
pub(crate) fn gguf_name(name: &str) -> String {
    const WHOLE: &[(&str, &str)] =
        &[("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")];
    const IN_LAYER: &[(&str, &str)] = &[
        ("input_layernorm", "attn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("self_attn.attn_sub_norm", "attn_sub_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("mlp.gate", "ffn_gate_inp"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("mlp.ffn_sub_norm", "ffn_sub_norm"),
        ("linear_attn.in_proj_qkv", "attn_qkv"),
        ("linear_attn.in_proj_z", "attn_gate"),
        ("linear_attn.in_proj_b", "ssm_beta"),
        ("linear_attn.in_proj_a", "ssm_alpha"),
        ("linear_attn.conv1d", "ssm_conv1d"),
        ("linear_attn.A_log", "ssm_a"),
        ("linear_attn.dt_bias", "ssm_dt.bias"),
        ("linear_attn.norm", "ssm_norm"),
        ("linear_attn.out_proj", "ssm_out"),
    ];
    let renamed = |rest: &str, table: &[(&str, &str)]| {
        table.iter().find_map(|(from, to)| {
            let tail = rest.strip_prefix(from).filter(|tail| tail.is_empty() || tail.starts_with('.'));
            tail.map(|tail| format!("{to}{tail}"))
        })
    };
    if let Some((layer, _, kind)) = experts::parse(name) {
        let one = gguf_name(&format!("{layer}.mlp.{kind}.weight"));
        return one.replace(".weight", "_exps.weight");
    }
    let in_layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'));
    match in_layer {
        Some((n, rest)) => renamed(rest, IN_LAYER).map(|rest| format!("blk.{n}.{rest}")),
        None => renamed(name, WHOLE),
    }
    .unwrap_or_else(|| name.to_owned())
}

/// [`gguf_name`], with what single families call differently.
pub(crate) fn gguf_name_in(hybrid: bool, name: &str) -> String {
    let stored = gguf_name(name);
    match hybrid {
        true => stored.replace(".ffn_norm.", ".post_attention_norm."),
        false => stored,
    }
}

/// The shape in which GGUF keeps the vector `name` of `len` elements: a convolution's taps are a dimension of their own.
pub(crate) fn vector_shape(config: &ModelConfig, name: &str, len: usize) -> Vec<usize> {
    match &config.hybrid {
        Some(hybrid) if name.ends_with("linear_attn.conv1d.weight") => {
            vec![len / hybrid.conv_kernel, hybrid.conv_kernel]
        }
        _ => vec![len],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_canonical_name_has_its_gguf_twin() {
        for (name, gguf) in [
            ("model.embed_tokens.weight", "token_embd.weight"),
            ("lm_head.weight", "output.weight"),
            ("model.layers.11.self_attn.q_proj.bias", "blk.11.attn_q.bias"),
            ("model.layers.0.mlp.ffn_sub_norm.weight", "blk.0.ffn_sub_norm.weight"),
            ("model.layers.7.mlp.gate.weight", "blk.7.ffn_gate_inp.weight"),
            ("model.layers.7.mlp.experts.12.gate_proj.weight", "blk.7.ffn_gate_exps.weight"),
            ("model.layers.7.mlp.experts.0.down_proj.weight", "blk.7.ffn_down_exps.weight"),
            ("model.layers.2.self_attn.k_norm.weight", "blk.2.attn_k_norm.weight"),
            ("model.layers.3.mlp.up_proj.rms_norm.weight", "blk.3.ffn_up.rms_norm.weight"),
            ("model.layers.5.linear_attn.in_proj_qkv.weight", "blk.5.attn_qkv.weight"),
            ("model.layers.5.linear_attn.A_log", "blk.5.ssm_a"),
            ("model.layers.5.linear_attn.dt_bias", "blk.5.ssm_dt.bias"),
        ] {
            assert_eq!(gguf_name(name), gguf);
        }
    }
}
