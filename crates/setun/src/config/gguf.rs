//! A model's configuration from GGUF metadata, and back.
//!
//! GGUF says some things by which tensors are there (biases, an untied head, Llama 3's frequency divisors), so the
//! reader takes the whole checkpoint. Keys: ../../docs/format.md.

mod hybrid;

use setun_kernels::matrix::Scales;

use super::rope::{Rope, RopeScaling, yarn_attention};
use super::{
    Activation, ActivationType, Experts, Family, HeadOrder, ModelConfig, Numerics, Pooling, Rotation,
    Storage, Ternary, contradictions, known, recognise, value_error,
};
use crate::error::ModelError;
use crate::format::gguf::{Array, Metadata, Value, required};
use crate::format::{Checkpoint, Encoding};

/// Families by `general.architecture`, and the name written for each.
const ARCHITECTURES: &[(&str, Family)] = &[
    ("llama", Family::Llama),
    ("llama", Family::Mistral),
    ("qwen2", Family::Qwen2),
    ("qwen3", Family::Qwen3),
    ("qwen3moe", Family::Qwen3Moe),
    ("qwen35", Family::Qwen35),
    ("bitnet-b1.58", Family::BitNet),
    ("bitnet-25", Family::BitNet),
    ("bitnet", Family::BitNetSilu),
];

impl ModelConfig {
    /// Reads a GGUF checkpoint's metadata and tensor list.
    ///
    /// # Errors
    /// For an architecture or rope type this version does not build, a missing key, or contradictory values.
    pub fn from_gguf(file: &Checkpoint, meta: &Metadata) -> Result<Self, ModelError> {
        let arch = required("general.architecture", meta.str("general.architecture")?)?;
        let &(_, family) = ARCHITECTURES.iter().find(|(name, _)| *name == arch).ok_or_else(|| {
            let expected = "one of `llama`, `qwen2`, `qwen3`, `qwen3moe`, `qwen35`, `bitnet`, `bitnet-25` and `bitnet-b1.58`, the ones this version runs";
            value_error("general.architecture", arch, expected.to_owned() + &known::in_gguf(arch))
        })?;
        let keys = Keys { meta, arch };
        let family = match (family, keys.size("attention.sliding_window")?) {
            (Family::Llama, Some(1..)) => Family::Mistral,
            _ => family,
        };
        let blocks = keys.need_size("block_count")?;
        let mut hybrid = match family {
            Family::Qwen35 => Some(hybrid::read(&keys, blocks)?),
            _ => None,
        };
        let num_layers = blocks - hybrid.as_ref().map_or(0, |h| h.draft_layers);
        let rotation = Rotation::from_gguf(file, meta, family, num_layers)?;
        if let (Some(hybrid), true) = (&mut hybrid, rotation.as_ref().is_some_and(Rotation::keeps_groups)) {
            // Their output projections are stored for heads in this order, which no fold can be taken back from.
            hybrid.order = HeadOrder::Grouped;
        }
        let need_uniform = |key: &str| required(&keys.name(key), keys.per_layer(key, blocks)?);
        let (hidden_size, heads) =
            (keys.need_size("embedding_length")?, need_uniform("attention.head_count")?);
        let head_dim = match keys.size("attention.key_length")? {
            Some(given) => given,
            None if heads > 0 && hidden_size % heads == 0 => hidden_size / heads,
            None => {
                let expected = format!("a multiple of {arch}.attention.head_count = {heads}");
                return Err(value_error(&keys.name("embedding_length"), hidden_size, expected));
            }
        };
        if let Some(value_dim) = keys.size("attention.value_length")?.filter(|&n| n != head_dim) {
            let expected = format!("{head_dim}, as attention.key_length is");
            return Err(value_error(&keys.name("attention.value_length"), value_dim, expected));
        }
        contradictions::in_gguf(meta, arch)?;
        if rotation.is_none() {
            contradictions::lost_rotation(file, meta)?;
        }
        refuse_unknown_numerics(&keys, head_dim)?;
        let experts = match family {
            Family::Qwen3Moe => Some(Experts::from_gguf(meta, arch)?),
            _ => no_experts(&keys)?,
        };
        let has = |name: &str| file.info(name).is_some();
        let max_positions = keys.need_size("context_length")?;
        let tokenizer_id = |key: &str| -> Result<Option<u32>, ModelError> {
            Ok(meta.u64(&format!("tokenizer.ggml.{key}"))?.and_then(|id| u32::try_from(id).ok()))
        };
        let rms_norm_eps = required(
            &keys.name("attention.layer_norm_rms_epsilon"),
            keys.float("attention.layer_norm_rms_epsilon")?,
        )?;
        let inner_norms = recognise::inner_norms(file);
        let mut eos: Vec<u32> = Vec::new();
        for key in ["eos_token_id", "eot_token_id", "eom_token_id"] {
            eos.extend(tokenizer_id(key)?.filter(|id| !eos.contains(id)));
        }
        let config = Self {
            family,
            vocab_size: match keys.size("vocab_size")? {
                Some(given) => given,
                None => file.tensor("token_embd.weight")?.shape().first().copied().unwrap_or(0),
            },
            hidden_size,
            intermediate_size: need_uniform("feed_forward_length")?,
            num_layers,
            heads,
            kv_heads: keys.per_layer("attention.head_count_kv", blocks)?.unwrap_or(heads),
            head_dim,
            max_positions,
            rms_norm_eps,
            tied: !has("output.weight"),
            activation: if family == Family::BitNet { Activation::Relu2 } else { Activation::Silu },
            rope: rope(&keys, file, head_dim, max_positions)?,
            windows: match keys.size("attention.sliding_window")? {
                Some(window @ 1..) => vec![Some(window); num_layers.min(super::MAX_LAYERS)],
                _ => vec![None; num_layers.min(super::MAX_LAYERS)],
            },
            sub_norms: matches!(family, Family::BitNet | Family::BitNetSilu),
            inner_norm_eps: match (inner_norms, keys.float("attention.inner_norm_rms_epsilon")?) {
                (None, _) => None,
                (Some(_), Some(eps)) => Some(eps),
                // Under bitnet.cpp's names they are computed with the ε of all norms.
                (Some(_), None) if has("blk.0.attn_output_norm_in.weight") => Some(rms_norm_eps),
                (Some(_), None) => Some(1e-6),
            },
            inner_norms: inner_norms.unwrap_or_default(),
            qk_norm: family.has_qk_norm(),
            attention_gate: family == Family::Qwen35,
            hybrid,
            qkv_bias: has("blk.0.attn_q.bias"),
            output_bias: has("blk.0.attn_output.bias"),
            mlp_bias: has("blk.0.ffn_up.bias"),
            experts,
            numerics: numerics(file, family, rotation.is_some()),
            rotation,
            bos: tokenizer_id("bos_token_id")?,
            eos,
            pooling: pooling(&keys)?,
        };
        config.check()
    }

    /// The metadata that [`ModelConfig::from_gguf`] reads back to the same configuration, without tokenizer keys.
    ///
    /// # Errors
    /// When GGUF has no key for something this configuration needs, naming it.
    pub fn to_gguf(&self) -> Result<Vec<(String, Value)>, ModelError> {
        let arch = match (self.family, self.activation) {
            // Names differ by activation, not by class: a SubLN model with SiLU is `bitnet` whoever trained it.
            (Family::BitNet | Family::BitNetSilu, Activation::Relu2) => "bitnet-b1.58",
            (Family::BitNet | Family::BitNetSilu, Activation::Silu) => "bitnet",
            (Family::Qwen2, _) => "qwen2",
            (Family::Qwen3, _) => "qwen3",
            (Family::Qwen3Moe, _) => "qwen3moe",
            (Family::Qwen35, _) => "qwen35",
            (Family::Llama | Family::Mistral, _) => "llama",
        };
        if !self.sub_norms && self.activation != Activation::Silu {
            return Err(value_error(
                "hidden_act",
                format!("{:?}", self.activation),
                format!("what GGUF `{arch}` fixes"),
            ));
        }
        if self.qk_norm != self.family.has_qk_norm() {
            return Err(value_error("q_norm", self.qk_norm, format!("what GGUF `{arch}` fixes")));
        }
        let window = self.windows[0];
        if self.windows.iter().any(|w| *w != window) {
            return Err(value_error(
                "layer_types",
                "mixed",
                "one window for all layers, which is all GGUF can say",
            ));
        }
        let mut out = vec![("general.architecture".to_owned(), Value::String(arch.into()))];
        let mut put = |key: &str, value: Value| out.push((format!("{arch}.{key}"), value));
        let size = |n: usize| Value::U32(n as u32);
        put("vocab_size", size(self.vocab_size));
        put("context_length", size(self.max_positions));
        put("embedding_length", size(self.hidden_size));
        put("block_count", size(self.num_layers));
        put("feed_forward_length", size(self.intermediate_size));
        put("attention.head_count", size(self.heads));
        put("attention.head_count_kv", size(self.kv_heads));
        put("attention.key_length", size(self.head_dim));
        put("attention.value_length", size(self.head_dim));
        put("attention.layer_norm_rms_epsilon", Value::F32(self.rms_norm_eps));
        put("rope.freq_base", Value::F32(self.rope.theta as f32));
        put("rope.dimension_count", size(self.rope.rotary_dim));
        if let Some(window) = window {
            put("attention.sliding_window", size(window));
        }
        for (key, value) in self.experts.as_ref().map(Experts::to_gguf).transpose()?.into_iter().flatten() {
            put(key, value);
        }
        if let Some(eps) = self.inner_norm_eps {
            put("attention.inner_norm_rms_epsilon", Value::F32(eps));
        }
        match &self.rope.scaling {
            // Llama 3's scaling is the tensor `rope_freqs.weight`, as explicit divisors are.
            RopeScaling::Default | RopeScaling::Divisors(_) | RopeScaling::Llama3 { .. } => {}
            RopeScaling::Linear { factor } => {
                put("rope.scaling.type", Value::String("linear".into()));
                put("rope.scaling.factor", Value::F32(*factor as f32));
            }
            RopeScaling::Yarn {
                factor,
                original,
                beta_fast,
                beta_slow,
                attention_factor,
                truncate: true,
            } => {
                put("rope.scaling.type", Value::String("yarn".into()));
                put("rope.scaling.factor", Value::F32(*factor as f32));
                put("rope.scaling.original_context_length", size(*original));
                put("rope.scaling.yarn_beta_fast", Value::F32(*beta_fast as f32));
                put("rope.scaling.yarn_beta_slow", Value::F32(*beta_slow as f32));
                // The key holds a factor on top of YaRN's own.
                let own = yarn_attention(*factor, None, None);
                put("rope.scaling.attn_factor", Value::F32((attention_factor / own) as f32));
            }
            RopeScaling::Yarn { .. } => {
                return Err(value_error("rope_scaling.truncate", false, "true, which is all GGUF can say"));
            }
            RopeScaling::Dynamic { .. } => {
                return Err(value_error("rope_scaling.rope_type", "dynamic", "a type GGUF has a name for"));
            }
        }
        if let Some(hybrid) = &self.hybrid {
            hybrid::write(hybrid, &mut put);
        }
        let number = |p| Pooling::GGUF.iter().find(|(_, pooling)| *pooling == p).map(|&(n, _)| n as usize);
        if let Some(pooling) = self.pooling {
            let number = number(pooling).ok_or_else(|| {
                let expected = "stated in 1_Pooling/config.json, since GGUF knows embedding models by it";
                value_error("pooling", "unknown", expected)
            })?;
            out.push((format!("{arch}.pooling_type"), size(number)));
        }
        out.extend(self.rotation.iter().flat_map(Rotation::to_gguf));
        Ok(out)
    }

    /// Divisors of the rotary frequencies that GGUF keeps in `rope_freqs.weight`, where this configuration has any.
    pub fn rope_divisors(&self) -> Option<Vec<f32>> {
        match &self.rope.scaling {
            RopeScaling::Divisors(divisors) => Some(divisors.clone()),
            RopeScaling::Llama3 { .. } => {
                let plain = Rope { scaling: RopeScaling::Default, ..self.rope.clone() }.frequencies(0).0;
                Some(plain.iter().zip(self.rope.frequencies(0).0).map(|(f, scaled)| f / scaled).collect())
            }
            _ => None,
        }
    }

    /// Whether GGUF stores this family's q and k rows in neighbouring-pair order.
    pub(crate) fn gguf_interleaves_rotary_pairs(&self) -> bool {
        matches!(self.family, Family::Llama | Family::Mistral)
    }
}

/// Metadata under one architecture's prefix.
struct Keys<'a> {
    meta: &'a Metadata,
    arch: &'a str,
}

impl Keys<'_> {
    fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.arch)
    }

    fn size(&self, key: &str) -> Result<Option<usize>, ModelError> {
        let name = self.name(key);
        let Some(value) = self.meta.u64(&name)? else { return Ok(None) };
        usize::try_from(value)
            .map(Some)
            .map_err(|_| value_error(&name, value, "a size this machine can hold"))
    }

    fn need_size(&self, key: &str) -> Result<usize, ModelError> {
        required(&self.name(key), self.size(key)?)
    }

    fn float(&self, key: &str) -> Result<Option<f32>, ModelError> {
        self.meta.f32(&self.name(key))
    }

    /// A size that may be given per layer, so long as all layers agree.
    fn per_layer(&self, key: &str, layers: usize) -> Result<Option<usize>, ModelError> {
        let name = self.name(key);
        let Some(values) = self.meta.get(&name).and_then(Value::as_array).and_then(Array::to_u64s) else {
            return self.size(key);
        };
        match values.split_first() {
            Some((first, rest)) if values.len() == layers && rest.iter().all(|v| v == first) => {
                Ok(Some(usize::try_from(*first).unwrap_or(usize::MAX)))
            }
            _ => {
                let shown: Vec<String> = values.iter().take(8).map(u64::to_string).collect();
                let found = format!("{} values ({} ...)", values.len(), shown.join(", "));
                Err(value_error(&name, found, format!("one value, the same for all {layers} layers")))
            }
        }
    }
}

/// How an embedding model pools; `None` for one that gives text.
fn pooling(keys: &Keys) -> Result<Option<Pooling>, ModelError> {
    match keys.size("pooling_type")? {
        None | Some(0) => Ok(None),
        Some(number) => match Pooling::GGUF.iter().find(|(n, _)| *n == number as u64) {
            Some(&(_, pooling)) => Ok(Some(pooling)),
            None => Err(value_error(&keys.name("pooling_type"), number, "0 to 4")),
        },
    }
}

/// Refuses keys of other families by which a model computes something else than the blocks here.
fn refuse_unknown_numerics(keys: &Keys, head_dim: usize) -> Result<(), ModelError> {
    let own_scale = 1.0 / (head_dim as f32).sqrt();
    let neutral: [(&str, &[f32]); 7] = [
        ("logit_scale", &[1.0]),
        ("embedding_scale", &[1.0]),
        ("residual_scale", &[1.0]),
        ("attn_logit_softcapping", &[0.0]),
        ("final_logit_softcapping", &[0.0]),
        ("attention.scale", &[0.0, own_scale]),
        ("attention.clamp_kqv", &[0.0]),
    ];
    for (key, neutral) in neutral {
        if let Some(found) = keys.float(key)?
            && !neutral.iter().any(|n| (found - n).abs() <= 1e-6 * n.abs())
        {
            let expected = format!("absent or {}, since nothing here applies it", neutral[0]);
            return Err(value_error(&keys.name(key), found, expected));
        }
    }
    if keys.meta.bool(&keys.name("attention.causal"))? == Some(false) {
        return Err(value_error(
            &keys.name("attention.causal"),
            false,
            "absent or true: encoders are not run",
        ));
    }
    Ok(())
}

/// Refuses experts in an architecture whose experts are not run.
fn no_experts(keys: &Keys) -> Result<Option<Experts>, ModelError> {
    match keys.size("expert_count")?.filter(|&n| n > 0) {
        None => Ok(None),
        Some(experts) => {
            let expected =
                format!("absent or 0: mixtures of experts are run in `qwen3moe`, not in `{}`", keys.arch);
            Err(value_error(&keys.name("expert_count"), experts, expected))
        }
    }
}

/// Types with a scale for 64 or 128 weights, which models are packed in whose weights alone were made ternary or binary
/// (Bonsai, CAT-Q). Names of one layout among several go on after these.
const WEIGHT_ONLY: [&str; 4] = ["Q1_0", "Q2_0", "PQ2_0", "PTQ1_0"];
/// Types of programs that round activations to int8 whatever the model (bitnet.cpp, ik_llama.cpp).
const BITNET: [&str; 3] = ["I2_S", "IQ1_BN", "IQ2_BN"];

/// Ternary by its tensors; a BitNet architecture is ternary even where a file stores float copies of the weights.
///
/// No key says what ternary layers are multiplied with, so it follows from who makes such files: BitNet architectures and
/// types are W1.58A8, the other grouped types and rotated weights W1.58A16. TQ1_0 and TQ2_0 hold either, and follow the family:
/// Qwen3's ternary models, with experts or without, are weight-only, Llama's are BitNets unless a matrix has several scales (TriLM), which no BitNet has.
fn numerics(file: &Checkpoint, family: Family, rotated: bool) -> Numerics {
    let in_blocks = file.tensors().filter(|t| t.name.starts_with("blk.") && t.encoding.is_ternary());
    let types: Vec<&Encoding> = in_blocks.map(|t| &t.encoding).collect();
    match gguf_activations(family, &types, rotated, || has_several_scales(file)) {
        None => Numerics::Float,
        Some(activations) => {
            Numerics::Ternary(Ternary { activations, storage: Storage::SelfDescribed, exceptions: None })
        }
    }
}

/// What ternary layers of a GGUF file are multiplied with, by the family and the ternary types in its blocks; `None` where
/// nothing in it is ternary.
pub(crate) fn gguf_activations(
    family: Family,
    types: &[&Encoding],
    rotated: bool,
    several_scales: impl FnOnce() -> bool,
) -> Option<ActivationType> {
    let bitnet = matches!(family, Family::BitNet | Family::BitNetSilu);
    if types.is_empty() && !bitnet {
        return None;
    }
    let any_of = |names: &[&str]| types.iter().any(|t| names.iter().any(|name| t.name().starts_with(name)));
    let weights_alone = rotated
        || any_of(&WEIGHT_ONLY)
        || !any_of(&BITNET) && (family.has_qk_norm() || !bitnet && several_scales());
    Some(match weights_alone && !bitnet {
        true => ActivationType::Float,
        false => ActivationType::Int8,
    })
}

/// Whether the first ternary matrix of the blocks has more than one scale.
fn has_several_scales(file: &Checkpoint) -> bool {
    let first = file.tensors().find(|t| t.name.starts_with("blk.") && t.encoding.is_ternary());
    let matrix = first.and_then(|t| file.tensor(&t.name).ok()?.to_ternary().ok());
    matrix.is_some_and(|m| !matches!(m.scales(), Scales::Tensor(_)))
}

fn rope(keys: &Keys, file: &Checkpoint, head_dim: usize, max_positions: usize) -> Result<Rope, ModelError> {
    let theta = keys.float("rope.freq_base")?.unwrap_or(10000.0);
    let rotary_dim = keys.size("rope.dimension_count")?.unwrap_or(head_dim);
    let kind = keys.meta.str(&keys.name("rope.scaling.type"))?;
    let factor = match keys.float("rope.scaling.factor")? {
        Some(factor) => Some(factor),
        None => keys.float("rope.scale_linear")?,
    };
    let scaling = match (kind, factor) {
        (Some("none"), _) | (None, None | Some(0.0)) => RopeScaling::Default,
        (Some("linear") | None, Some(factor)) => RopeScaling::Linear { factor: f64::from(factor) },
        (Some("yarn"), Some(factor)) => {
            // What llama.cpp can also be told, and what it means there by default.
            for (key, neutral) in [
                ("yarn_ext_factor", &[-1.0, 1.0][..]),
                ("yarn_attn_factor", &[1.0]),
                ("yarn_log_multiplier", &[0.0]),
            ] {
                let key = format!("rope.scaling.{key}");
                if let Some(found) = keys.float(&key)?.filter(|found| !neutral.contains(found)) {
                    let expected =
                        format!("absent or {}, since nothing here applies it", neutral[neutral.len() - 1]);
                    return Err(value_error(&keys.name(&key), found, expected));
                }
            }
            let factor = f64::from(factor);
            let extra = keys.float("rope.scaling.attn_factor")?.unwrap_or(1.0);
            let original = keys.size("rope.scaling.original_context_length")?.unwrap_or(max_positions);
            RopeScaling::Yarn {
                factor,
                original,
                beta_fast: f64::from(keys.float("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0)),
                beta_slow: f64::from(keys.float("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0)),
                attention_factor: f64::from(extra) * yarn_attention(factor, None, None),
                truncate: true,
            }
        }
        (Some(_), None) => {
            return Err(ModelError::Metadata {
                key: keys.name("rope.scaling.factor"),
                what: "is missing".into(),
            });
        }
        (Some(other), _) => {
            return Err(value_error(&keys.name("rope.scaling.type"), other, "`none`, `linear` or `yarn`"));
        }
    };
    let scaling = match (file.find("rope_freqs.weight")?, scaling) {
        (None, scaling) => scaling,
        (Some(divisors), RopeScaling::Default) if divisors.info.encoding == Encoding::F32 => {
            RopeScaling::Divisors(divisors.to_f32()?)
        }
        (Some(_), RopeScaling::Default) => return Err(value_error("rope_freqs.weight", "not F32", "F32")),
        (Some(_), _) => {
            let key = keys.name("rope.scaling.type");
            return Err(value_error(
                &key,
                kind.unwrap_or_default(),
                "absent beside a tensor `rope_freqs.weight`",
            ));
        }
    };
    Ok(Rope { theta: f64::from(theta), rotary_dim, scaling })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Shape;
    use crate::format::TensorSpec;
    use crate::format::gguf::GgufWriter;

    fn llama() -> ModelConfig {
        let shape = Shape {
            vocab_size: 8,
            hidden_size: 8,
            intermediate_size: 16,
            num_layers: 2,
            heads: 2,
            kv_heads: 1,
            max_positions: 64,
            rope_theta: 1e4,
            tied: true,
            sub_norms: false,
            activation: Activation::Silu,
        };
        ModelConfig::fresh(&shape, false).unwrap()
    }

    /// The configuration of a file with the keys of [`llama`] and these on top.
    fn read(keys: &[(&str, Value)]) -> Result<ModelConfig, ModelError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.gguf");
        let mut metadata = Metadata::new();
        for (key, value) in llama().to_gguf().unwrap() {
            metadata.insert(key, value);
        }
        for (key, value) in keys {
            metadata.insert(format!("llama.{key}"), value.clone());
        }
        let embedding =
            TensorSpec { name: "token_embd.weight".into(), shape: vec![8, 8], encoding: Encoding::F32 };
        let mut writer = GgufWriter::create(&path, &metadata, vec![embedding]).unwrap();
        writer.tensor(&[0; 256]).unwrap();
        writer.finish().unwrap();
        let file = Checkpoint::open(&path).unwrap();
        ModelConfig::from_gguf(&file, file.gguf_metadata().unwrap())
    }

    #[test]
    fn sizes_may_be_given_per_layer_where_layers_agree() {
        let each = |n: u32, m: u32| Value::Array(Array::U32(vec![n, m]));
        for key in ["attention.head_count", "attention.head_count_kv", "feed_forward_length"] {
            let config = read(&[(key, each(2, 2))]).unwrap();
            assert!([config.heads, config.kv_heads, config.intermediate_size].contains(&2), "{key}");
            let error = read(&[(key, each(2, 1))]).unwrap_err().to_string();
            assert!(error.contains(key) && error.contains("all 2 layers"), "{error}");
        }
    }

    #[test]
    fn keys_that_change_what_is_computed_are_refused_unless_neutral() {
        for (key, other, neutral) in [
            ("logit_scale", Value::F32(0.25), Value::F32(1.0)),
            ("attention.scale", Value::F32(0.1), Value::F32(0.5)),
            ("final_logit_softcapping", Value::F32(30.0), Value::F32(0.0)),
            ("expert_count", Value::U32(8), Value::U32(0)),
            ("attention.causal", Value::Bool(false), Value::Bool(true)),
        ] {
            let error = read(&[(key, other)]).unwrap_err().to_string();
            assert!(error.contains(&format!("llama.{key}")), "{error}");
            assert_eq!(read(&[(key, neutral)]).unwrap(), read(&[]).unwrap(), "{key}");
        }
    }

    #[test]
    fn yarn_without_an_original_context_extends_the_context_length() {
        let keys =
            [("rope.scaling.type", Value::String("yarn".into())), ("rope.scaling.factor", Value::F32(4.0))];
        let scaling = read(&keys).unwrap().rope.scaling;
        assert!(matches!(scaling, RopeScaling::Yarn { original: 64, .. }), "{scaling:?}");
    }

    #[test]
    fn yarn_settings_that_nothing_here_applies_are_refused_unless_neutral() {
        for (key, neutral) in
            [("yarn_ext_factor", -1.0), ("yarn_attn_factor", 1.0), ("yarn_log_multiplier", 0.0)]
        {
            let with = |value| {
                let key = format!("rope.scaling.{key}");
                read(&[
                    ("rope.scaling.type", Value::String("yarn".into())),
                    ("rope.scaling.factor", Value::F32(4.0)),
                    (&key, Value::F32(value)),
                ])
            };
            let error = with(0.5).unwrap_err().to_string();
            assert!(error.contains(&format!("llama.rope.scaling.{key}")), "{error}");
            assert!(with(neutral).is_ok(), "{key}");
        }
    }

    #[test]
    fn a_pooling_type_makes_an_embedding_model_and_survives() {
        assert_eq!(read(&[("pooling_type", Value::U32(0))]).unwrap().pooling, None);
        let config = read(&[("pooling_type", Value::U32(3))]).unwrap();
        assert_eq!(config.pooling, Some(Pooling::Last));
        assert!(config.to_gguf().unwrap().contains(&("llama.pooling_type".into(), Value::U32(3))));
        assert!(
            read(&[("pooling_type", Value::U32(9))]).unwrap_err().to_string().contains("llama.pooling_type")
        );
        let unstated = ModelConfig { pooling: Some(Pooling::Unstated), ..config };
        assert!(unstated.to_gguf().unwrap_err().to_string().contains("1_Pooling"));
    }

    #[test]
    fn the_architecture_of_a_subln_model_follows_its_activation() {
        for (activation, arch) in [(Activation::Silu, "bitnet"), (Activation::Relu2, "bitnet-b1.58")] {
            for family in [Family::BitNet, Family::BitNetSilu] {
                let config = ModelConfig { family, activation, sub_norms: true, ..llama() };
                assert_eq!(config.to_gguf().unwrap()[0].1, Value::String(arch.into()));
            }
        }
        assert!(ModelConfig { activation: Activation::Relu2, ..llama() }.to_gguf().is_err());
    }
}
