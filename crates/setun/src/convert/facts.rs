//! What the output says about the model beside its weights, read back and compared.

use std::collections::BTreeMap;
use std::path::Path;

use super::huggingface::template_file;
use super::{Job, Target, losses};
use crate::config::{Hybrid, ModelConfig, Numerics, RopeScaling};
use crate::error::ModelError;
use crate::format::Checkpoint;
use crate::format::gguf::Value;
use crate::recommended::Recommended;
use crate::tokenizer::Tokenizer;

/// Each fact by the name of its field, and whether the configuration read back has it as the model does, beyond what
/// containers spell differently or what was allowed to be lost.
pub(super) fn compare(job: &Job, found: &ModelConfig) -> Vec<(&'static str, bool)> {
    let expected = job.config;
    let sizes = |c: &ModelConfig| {
        [
            ("vocab_size", c.vocab_size),
            ("hidden_size", c.hidden_size),
            ("intermediate_size", c.intermediate_size),
            ("num_hidden_layers", c.num_layers),
            ("num_attention_heads", c.heads),
            ("num_key_value_heads", c.kv_heads),
            ("head_dim", c.head_dim),
            ("max_position_embeddings", c.max_positions),
            ("tie_word_embeddings", usize::from(c.tied)),
            ("sub_norms", usize::from(c.sub_norms)),
            ("q_norm", usize::from(c.qk_norm)),
            ("attention_bias", usize::from(c.qkv_bias) + 2 * usize::from(c.output_bias)),
            ("mlp_bias", usize::from(c.mlp_bias)),
        ]
    };
    let mut facts: Vec<(&str, bool)> =
        sizes(expected).into_iter().zip(sizes(found)).map(|((field, a), (_, b))| (field, a == b)).collect();
    let unrotated = job.options.allow_loss && job.options.target == Target::HuggingFace;
    facts.extend([
        ("num_experts", expected.experts == found.experts),
        ("linear_attention", same_hybrid(expected, found)),
        ("rms_norm_eps", expected.rms_norm_eps == found.rms_norm_eps),
        ("hidden_act", expected.activation == found.activation),
        ("quantization_config.rms_norm_eps", expected.inner_norm_eps == found.inner_norm_eps),
        ("inner_norms", expected.inner_norm_eps.is_none() || expected.inner_norms == found.inner_norms),
        ("pooling", expected.pooling.is_some() == found.pooling.is_some()),
        ("layer_types", expected.windows == found.windows),
        ("rope", same_rope(expected, found)),
        (
            "bos_token_id",
            expected.bos.is_none_or(|id| found.bos == Some(id)) || job.options.tokenizer.is_some(),
        ),
        ("eos_token_id", job.options.allow_loss || expected.eos.iter().all(|id| found.eos.contains(id))),
        ("prism.hadamard", expected.rotation == found.rotation || unrotated && found.rotation.is_none()),
        ("quantization_config", job.options.allow_loss || same_numerics(job, found)),
    ]);
    facts
}

/// Whether the layers are still multiplied with what the model defines.
fn same_numerics(job: &Job, found: &ModelConfig) -> bool {
    // Float copies of weight-only models change nothing.
    if job.is_weight_only() {
        return found.activations() == job.config.activations();
    }
    let ternary = match job.options.target {
        Target::Gguf => job.is_ternary(),
        Target::HuggingFace => job.config.numerics != Numerics::Float,
    };
    ternary == (found.numerics != Numerics::Float)
        && (!ternary || found.activations() == job.config.activations())
}

/// Equal layers; drafting ones are not written.
fn same_hybrid(expected: &ModelConfig, found: &ModelConfig) -> bool {
    let own = |c: &ModelConfig| c.hybrid.clone().map(|hybrid| Hybrid { draft_layers: 0, ..hybrid });
    expected.attention_gate == found.attention_gate && own(expected) == own(found)
}

/// Equal frequencies, whichever way they are written; GGUF keeps the base and the factors as f32.
fn same_rope(a: &ModelConfig, b: &ModelConfig) -> bool {
    let dynamic = |c: &ModelConfig| matches!(c.rope.scaling, RopeScaling::Dynamic { .. });
    if a.rope == b.rope || dynamic(a) || dynamic(b) {
        return a.rope == b.rope;
    }
    let ((fa, sa), (fb, sb)) = (a.rope.frequencies(0), b.rope.frequencies(0));
    let near = |x: f32, y: f32| (x - y).abs() <= 1e-6 * x.abs();
    fa.len() == fb.len() && fa.iter().zip(&fb).all(|(&x, &y)| near(x, y)) && near(sa, sb)
}

/// Texts in which tokenizers differ if they do: spaces, digits, accents, scripts without spaces, bytes without a token.
const TEXTS: [&str; 4] = [
    "Once upon a time,  there\n\twere 12345 dogs.",
    "naïve Straße — it's",
    "日本語 текст",
    "🙂 <s></s> [INST]",
];

/// Compares what lies beside weights and configuration; gives the names of what was compared.
pub(super) fn verify_files(
    job: &Job,
    written: &Checkpoint,
    output: &Path,
    named: &[String],
) -> Result<Vec<&'static str>, ModelError> {
    let differs = |what: &str| {
        let what = format!("failed its verification: the {what} read back differently, so it was not kept");
        Err(ModelError::format(output, what))
    };
    let mut seen = vec!["sampling", "losses"];
    if Recommended::of(job.file)? != Recommended::of(written)? {
        return differs("recommended sampling");
    }
    if losses(written)? != named {
        return differs("losses");
    }
    if job.options.without_tokenizer {
        return Ok(seen);
    }
    // From GGUF to GGUF its keys go along as they are, whether or not they are understood here.
    if let (None, Some(a), Some(b)) =
        (job.options.tokenizer, job.file.gguf_metadata(), written.gguf_metadata())
    {
        let keys = |metadata: &crate::format::gguf::Metadata| -> Vec<(String, Value)> {
            let own = metadata.iter().filter(|(key, _)| key.starts_with("tokenizer."));
            own.map(|(key, value)| (key.to_owned(), value.clone())).collect()
        };
        let (a, b) = (keys(a), keys(b));
        if !a.is_empty() {
            if a != b {
                return differs("tokenizer keys");
            }
            seen.push("tokenizer");
            return Ok(seen);
        }
    }
    let own;
    let expected = match job.options.tokenizer {
        Some(given) => given,
        None => match Tokenizer::of(job.file) {
            Ok(found) => {
                own = found;
                &own
            }
            Err(ModelError::Unsupported { .. }) => return Ok(seen),
            Err(error) => return Err(error),
        },
    };
    let found = Tokenizer::of(written)?;
    for text in TEXTS {
        // A vocabulary may have no way to say a text; then neither has its copy.
        if expected.encode(text, true).ok() != found.encode(text, true).ok() {
            return differs(&format!("token ids of {text:?}"));
        }
    }
    let templates = |tokenizer: &Tokenizer| -> BTreeMap<String, String> {
        let all = tokenizer.chat_templates().iter();
        let kept = all.filter(|t| job.options.target == Target::Gguf || template_file(&t.name).is_some());
        kept.map(|t| (t.name.clone(), t.source.clone())).collect()
    };
    if templates(expected) != templates(&found) {
        return differs("chat templates");
    }
    if expected.bos() != found.bos() || expected.eos_ids().first() != found.eos_ids().first() {
        return differs("ids that begin and end a text");
    }
    seen.extend(["tokenizer", "chat_template", "bos", "eos"]);
    Ok(seen)
}
