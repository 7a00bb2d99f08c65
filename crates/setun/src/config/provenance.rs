//! Where each fact about a model comes from: its file, its family, a default, another fact, or an assumption.
//!
//! The readers in `huggingface` and `gguf` decide; this module says how they did, key by key, for people who want to know what a
//! file itself says. A test binds the two: where the file is said to decide, changing the key changes the fact.

use serde::Serialize;
use serde_json::Value as Json;

use super::{Activation, ActivationType, Family, ModelConfig, Numerics, Storage};
use crate::error::ModelError;
use crate::format::Checkpoint;
use crate::format::gguf::Metadata;

/// Why a fact is what it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// A key, a tensor or a tensor's type in the model's files.
    File,
    /// The family fixes it; the file does not say it.
    Family,
    /// The file leaves it out, and this is what its absence means.
    Default,
    /// It follows from other facts.
    Derived,
    /// Nothing says it: what such files hold as a rule.
    Assumed,
}

/// A fact, and where it comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Fact {
    /// What it is about: `activation`, `rope base`.
    pub name: &'static str,
    /// Its value, for people.
    pub value: String,
    /// Why.
    pub origin: Origin,
    /// The key, tensor or reason.
    pub from: String,
}

impl ModelConfig {
    /// Where this configuration, read from `file`, has its facts from; in the order of a forward pass.
    ///
    /// # Errors
    /// As [`Checkpoint::config_json`].
    pub fn facts(&self, file: &Checkpoint) -> Result<Vec<Fact>, ModelError> {
        let mut facts = Facts { config: self, list: Vec::new() };
        match (file.gguf_metadata(), file.llama2c()) {
            (Some(meta), _) => facts.gguf(file, meta),
            (None, Some(_)) => facts.llama2c(),
            (None, None) => facts.json(&file.config_json()?.unwrap_or_default()),
        }
        Ok(facts.list)
    }
}

struct Facts<'a> {
    config: &'a ModelConfig,
    list: Vec<Fact>,
}

impl Facts<'_> {
    fn put(&mut self, name: &'static str, value: impl ToString, origin: Origin, from: impl Into<String>) {
        self.list.push(Fact { name, value: value.to_string(), origin, from: from.into() });
    }

    /// A fact that one of `keys` gives, or else has another origin.
    fn keyed(
        &mut self,
        name: &'static str,
        value: impl ToString,
        key: Option<&str>,
        (origin, why): (Origin, String),
    ) {
        match key {
            Some(key) => self.put(name, value, Origin::File, key),
            None => self.put(name, value, origin, why),
        }
    }

    /// What no key of any format gives.
    fn fixed(&mut self) {
        let c = self.config;
        let family = format!("{:?}", c.family);
        if c.sub_norms {
            self.put("sub-norms", true, Origin::Family, family.clone());
        }
        if c.qk_norm {
            self.put("norms on heads", true, Origin::Family, family.clone());
        }
        if c.attention_gate {
            self.put("gate on attention", true, Origin::Family, family);
        }
    }

    fn json(&mut self, json: &Json) {
        let c = self.config;
        let there = |key: &str| json.get(key).is_some_and(|value| !value.is_null());
        let first = |keys: &[&'static str]| keys.iter().copied().find(|key| there(key));
        let class = |key: &str| (Origin::Family, format!("{:?}: `{key}` is absent", c.family));
        self.keyed(
            "family",
            format!("{:?}", c.family),
            first(&["architectures", "model_type"]),
            class("architectures"),
        );
        for (name, value, key) in [
            ("vocabulary", c.vocab_size, "vocab_size"),
            ("width", c.hidden_size, "hidden_size"),
            ("feed-forward width", c.intermediate_size, "intermediate_size"),
            ("layers", c.num_layers, "num_hidden_layers"),
            ("query heads", c.heads, "num_attention_heads"),
        ] {
            self.put(name, value, Origin::File, key);
        }
        let explicit_null = |key: &str| json.get(key).is_some_and(Json::is_null);
        let heads = match (explicit_null("num_key_value_heads"), c.kv_heads == c.heads) {
            (true, _) | (_, true) if !there("num_key_value_heads") => {
                (Origin::Derived, "as many as query heads".to_owned())
            }
            _ => class("num_key_value_heads"),
        };
        self.keyed("key and value heads", c.kv_heads, first(&["num_key_value_heads"]), heads);
        let width = match matches!(c.family, Family::Qwen3 | Family::Qwen35) && !explicit_null("head_dim") {
            true => class("head_dim"),
            false => (Origin::Derived, "width over query heads".to_owned()),
        };
        self.keyed("head width", c.head_dim, first(&["head_dim"]), width);
        let context = first(&["max_position_embeddings"]);
        self.keyed("context", c.max_positions, context, class("max_position_embeddings"));
        self.put("norm epsilon", format!("{:e}", c.rms_norm_eps), Origin::File, "rms_norm_eps");
        self.keyed("activation", activation(c), first(&["hidden_act"]), class("hidden_act"));
        let section = first(&["rope_parameters", "rope_scaling"]);
        let base = match section.filter(|key| json[key].get("rope_theta").is_some()) {
            // One section per kind of layer, or one for all.
            Some(key) => Some(format!("{key}.rope_theta")),
            None if section == Some("rope_parameters") && nested_theta(&json["rope_parameters"]) => {
                Some("rope_parameters.*.rope_theta".to_owned())
            }
            None => first(&["rope_theta"]).map(str::to_owned),
        };
        self.keyed("rope base", c.rope.theta, base.as_deref(), class("rope_theta"));
        let unscaled = (Origin::Default, "neither `rope_scaling` nor `rope_parameters`".to_owned());
        self.keyed("rope scaling", scaling(c), section, unscaled);
        self.keyed("tied head", c.tied, first(&["tie_word_embeddings"]), class("tie_word_embeddings"));
        if let Some(window) = c.windows.iter().flatten().next() {
            let keys = first(&["sliding_window"]);
            self.keyed("sliding window", window, keys, class("sliding_window"));
        }
        match (c.qkv_bias, there("attention_bias")) {
            (true, true) if c.family != Family::Qwen2 => {
                self.put("attention biases", true, Origin::File, "attention_bias");
            }
            (true, _) => self.put("attention biases", true, Origin::Family, format!("{:?}", c.family)),
            _ => {}
        }
        self.fixed();
        if let Some(experts) = &c.experts {
            let value = format!("{} of {}", experts.used, experts.count);
            let key = first(&["num_experts", "num_local_experts"]).unwrap_or("num_experts");
            self.put("experts", value, Origin::File, key);
        }
        if c.hybrid.is_some() {
            let key = first(&["layer_types", "full_attention_interval"]).unwrap_or("layer_types");
            self.put("gated DeltaNet layers", true, Origin::File, key);
        }
        let Numerics::Ternary(ternary) = &c.numerics else {
            let why = "no `quantization_config`";
            return self.put("numerics", "float", Origin::Default, why);
        };
        match ternary.storage {
            Storage::FloatCopies => {
                let values = "every matrix of the blocks holds only 0 and ± a scale";
                self.put("weights", "ternary, stored as floats", Origin::File, values);
                return self.put(
                    "activations",
                    "float",
                    Origin::Assumed,
                    "no key says it; such models are weight-only",
                );
            }
            Storage::Mlx { group } => {
                self.put(
                    "weights",
                    format!("MLX's 2 bits, a scale per {group}"),
                    Origin::File,
                    "quantization",
                );
                return self.put(
                    "activations",
                    "float",
                    Origin::Assumed,
                    "no key says it; MLX quantises weights alone",
                );
            }
            Storage::Masters if !there("quantization_config") && c.inner_norm_eps.is_some() => {
                let norms = "norms inside linear layers, as BitDistill has them";
                self.put("weights", "float masters, rounded by absmean", Origin::File, norms);
                return self.put("activations", "int8", Origin::Assumed, norms);
            }
            _ => {}
        }
        if !there("quantization_config") {
            self.put("weights", "float masters, rounded by absmean", Origin::File, "weight_bits");
            return self.put("activations", "int8", Origin::File, "input_bits");
        }
        let storage = match ternary.storage {
            Storage::Masters => "float masters, rounded by absmean",
            Storage::Divide => "packed, divided by weight_scale",
            _ => "packed, multiplied by weight_scale",
        };
        let q = &json["quantization_config"];
        match q["linear_class"].as_str() {
            Some(_) => self.put("weights", storage, Origin::File, "quantization_config.linear_class"),
            None => {
                let why = "`quantization_config.linear_class` is absent, which means bitlinear";
                self.put("weights", storage, Origin::Default, why);
            }
        }
        let method = "quantization_config.quant_method: bitnet";
        self.put("activations", ternary.activations, Origin::File, method);
    }

    fn gguf(&mut self, file: &Checkpoint, meta: &Metadata) {
        let c = self.config;
        let arch = meta.str("general.architecture").ok().flatten().unwrap_or_default();
        let full = |key: &str| format!("{arch}.{key}");
        let there = |key: &str| Some(full(key)).filter(|key| meta.get(key).is_some());
        let tensor = |name: &str| file.info(name).is_some();
        let absent = |key: &str| (Origin::Default, format!("`{arch}.{key}` is absent"));
        let by = match c.family {
            Family::Mistral => full("attention.sliding_window"),
            _ => "general.architecture".to_owned(),
        };
        self.put("family", format!("{:?}", c.family), Origin::File, by);
        let rows = (Origin::File, "rows of token_embd.weight".to_owned());
        self.keyed("vocabulary", c.vocab_size, there("vocab_size").as_deref(), rows);
        for (name, value, key) in [
            ("width", c.hidden_size, "embedding_length"),
            ("feed-forward width", c.intermediate_size, "feed_forward_length"),
            ("layers", c.num_layers, "block_count"),
            ("query heads", c.heads, "attention.head_count"),
        ] {
            self.put(name, value, Origin::File, full(key));
        }
        let as_many = (Origin::Derived, "as many as query heads".to_owned());
        let kv = there("attention.head_count_kv");
        self.keyed("key and value heads", c.kv_heads, kv.as_deref(), as_many);
        let over = (Origin::Derived, "width over query heads".to_owned());
        self.keyed("head width", c.head_dim, there("attention.key_length").as_deref(), over);
        self.put("context", c.max_positions, Origin::File, full("context_length"));
        self.put(
            "norm epsilon",
            format!("{:e}", c.rms_norm_eps),
            Origin::File,
            full("attention.layer_norm_rms_epsilon"),
        );
        self.put(
            "activation",
            activation(c),
            Origin::Family,
            format!("{:?}: GGUF has no key for it", c.family),
        );
        let base = there("rope.freq_base");
        self.keyed("rope base", c.rope.theta, base.as_deref(), absent("rope.freq_base"));
        let scaled = match tensor("rope_freqs.weight") {
            true => Some("rope_freqs.weight".to_owned()),
            false => there("rope.scaling.type").or_else(|| there("rope.scaling.factor")),
        };
        self.keyed("rope scaling", scaling(c), scaled.as_deref(), absent("rope.scaling.type"));
        let head = if c.tied { "there is no output.weight" } else { "output.weight" };
        self.put("tied head", c.tied, Origin::File, head);
        if let Some(window) = c.windows.iter().flatten().next() {
            self.put("sliding window", window, Origin::File, full("attention.sliding_window"));
        }
        if c.qkv_bias {
            self.put("attention biases", true, Origin::File, "blk.0.attn_q.bias");
        }
        if let Some(experts) = &c.experts {
            let value = format!("{} of {}", experts.used, experts.count);
            self.put("experts", value, Origin::File, full("expert_count"));
        }
        if c.hybrid.is_some() {
            let key = there("attention.recurrent_layers").unwrap_or_else(|| full("full_attention_interval"));
            self.put("gated DeltaNet layers", true, Origin::File, key);
        }
        self.fixed();
        if let Some(rotation) = &c.rotation {
            let value = format!("{} matrices, blocks of {}", rotation.folded(), rotation.block());
            self.put("rotation", value, Origin::File, "prism.hadamard.*");
        }
        let Numerics::Ternary(ternary) = &c.numerics else {
            return self.put("numerics", "float", Origin::File, "no tensor is of a ternary type");
        };
        let mut types: Vec<&str> = file
            .tensors()
            .filter(|t| t.name.starts_with("blk.") && t.encoding.is_ternary())
            .map(|t| t.encoding.name())
            .collect();
        types.sort_unstable();
        types.dedup();
        let types = types.join(", ");
        match types.is_empty() {
            true => self.put("weights", "ternary", Origin::Family, format!("{:?}", c.family)),
            false => self.put("weights", "ternary", Origin::File, format!("tensors of type {types}")),
        }
        let bitnet = matches!(c.family, Family::BitNet | Family::BitNetSilu);
        let (origin, why) = match ternary.activations {
            ActivationType::Int8 if bitnet => (Origin::Family, format!("{:?}", c.family)),
            ActivationType::Int8 if types.contains("I2_S") || types.contains("_BN") => {
                (Origin::Assumed, format!("{types} is the type of programs that round activations"))
            }
            // No GGUF key says so.
            ActivationType::Int8 | ActivationType::Int4 => {
                let why = "no key says it; matrices with one scale are what BitNets store, weight-only models have several; \
                           --activations float runs it as W1.58A16";
                (Origin::Assumed, why.to_owned())
            }
            ActivationType::Float if c.rotation.is_some() => {
                (Origin::Assumed, "no key says it; rotated models are weight-only".to_owned())
            }
            ActivationType::Float => {
                let why = format!(
                    "no key says it; {types} with several scales in a matrix, or in {:?}, is weight-only",
                    c.family
                );
                (Origin::Assumed, why)
            }
        };
        self.put("activations", ternary.activations, origin, why);
    }

    fn llama2c(&mut self) {
        let c = self.config;
        for (name, value) in [
            ("vocabulary", c.vocab_size),
            ("width", c.hidden_size),
            ("feed-forward width", c.intermediate_size),
            ("layers", c.num_layers),
            ("query heads", c.heads),
            ("key and value heads", c.kv_heads),
            ("context", c.max_positions),
        ] {
            self.put(name, value, Origin::File, "header");
        }
        self.put("tied head", c.tied, Origin::File, "header");
        for (name, value) in [
            ("activation", activation(c).to_owned()),
            ("rope base", c.rope.theta.to_string()),
            ("norm epsilon", format!("{:e}", c.rms_norm_eps)),
            ("activations", c.activations().to_string()),
        ] {
            self.put(name, value, Origin::Family, "what the program that writes such files computes");
        }
    }
}

fn nested_theta(section: &Json) -> bool {
    section.as_object().is_some_and(|map| map.values().any(|v| v.get("rope_theta").is_some()))
}

fn activation(c: &ModelConfig) -> &'static str {
    match c.activation {
        Activation::Silu => "SiLU",
        Activation::Relu2 => "squared ReLU",
    }
}

fn scaling(c: &ModelConfig) -> &'static str {
    use super::RopeScaling as R;
    match &c.rope.scaling {
        R::Default => "none",
        R::Linear { .. } => "linear",
        R::Dynamic { .. } => "dynamic",
        R::Yarn { .. } => "YaRN",
        R::Llama3 { .. } => "Llama 3",
        R::Divisors(_) => "a divisor for every frequency",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::gguf::{Array, Value};

    const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../golden/");

    fn other(value: &Json) -> Json {
        match value {
            Json::Bool(b) => (!b).into(),
            Json::Number(n) => (n.as_f64().unwrap() * 2.0).into(),
            Json::String(_) => "another".into(),
            _ => Json::Array(vec!["another".into()]),
        }
    }

    #[test]
    fn what_is_said_to_come_from_config_json_changes_with_its_key() {
        let mut checked = 0;
        for folder in [
            "bitnet-tied-packed-small",
            "llama-bitnet-packed",
            "qwen2-bias",
            "mistral-sliding-window",
            "rope-llama-yarn",
        ] {
            let file = Checkpoint::open(format!("{GOLDEN}models/{folder}")).unwrap();
            let json = file.config_json().unwrap().unwrap();
            let config = ModelConfig::from_json(&json).unwrap();
            for fact in config.facts(&file).unwrap() {
                let key = fact.from.split('.').next().unwrap();
                if fact.origin == Origin::File {
                    let mut changed = json.clone();
                    changed[key] = other(&json[key]);
                    assert_ne!(
                        ModelConfig::from_json(&changed).ok(),
                        Some(config.clone()),
                        "{folder}: {fact:?}"
                    );
                    checked += 1;
                } else if let Some(key) =
                    fact.from.split('`').nth(1).filter(|_| fact.from.ends_with("is absent"))
                {
                    assert!(json.get(key).is_none(), "{folder}: {fact:?}");
                }
            }
        }
        assert!(checked > 40, "{checked}");
    }

    #[test]
    fn what_is_said_to_come_from_a_gguf_key_changes_with_it() {
        let mut checked = 0;
        for name in [
            "models/bitnet-tied-packed-small-gguf/bitnet-tied-packed-small-i2_s.gguf",
            "bonsai/qwen3-tied/model-tq1_0.gguf",
        ] {
            let file = Checkpoint::open(format!("{GOLDEN}{name}")).unwrap();
            let meta = file.gguf_metadata().unwrap();
            let config = ModelConfig::from_gguf(&file, meta).unwrap();
            for fact in config.facts(&file).unwrap() {
                let Some(value) = meta.get(&fact.from).filter(|_| fact.origin == Origin::File) else {
                    let key = fact.from.split('`').nth(1).unwrap_or_default();
                    assert!(meta.get(key).is_none(), "{fact:?}");
                    continue;
                };
                let mut changed = Metadata::new();
                for (key, value) in meta.iter() {
                    changed.insert(key, value.clone());
                }
                let other = match value {
                    Value::String(_) => Value::String("another".into()),
                    Value::Array(_) => Value::Array(Array::String(Vec::new())),
                    value => value.as_u64().map_or_else(
                        || Value::F32(value.as_f32().unwrap() * 2.0),
                        |n| Value::U32(n as u32 * 2),
                    ),
                };
                changed.insert(fact.from.clone(), other);
                assert_ne!(ModelConfig::from_gguf(&file, &changed).ok(), Some(config.clone()), "{fact:?}");
                checked += 1;
            }
        }
        assert!(checked > 18, "{checked}");
    }

    #[test]
    fn what_no_key_says_is_said_to_be_the_familys_or_assumed() {
        let fact = |name: &str, about: &str| {
            let file = Checkpoint::open(format!("{GOLDEN}{name}")).unwrap();
            let facts = ModelConfig::of(&file).unwrap().facts(&file).unwrap();
            let fact = facts.into_iter().find(|fact| fact.name == about).unwrap();
            (fact.value, fact.origin)
        };
        let bitnet = "models/bitnet-tied-packed-small-gguf/bitnet-tied-packed-small-i2_s.gguf";
        assert_eq!(fact(bitnet, "activation"), ("squared ReLU".into(), Origin::Family));
        assert_eq!(fact(bitnet, "activations"), ("int8".into(), Origin::Family));
        let llama = "models/llama-bitnet-packed-gguf/llama-bitnet-packed-tq2_0.gguf";
        assert_eq!(fact(llama, "activations"), ("int8".into(), Origin::Assumed));
        assert_eq!(
            fact("bonsai/qwen3-tied/model-tq1_0.gguf", "activations"),
            ("float".into(), Origin::Assumed)
        );
        assert_eq!(fact("models/llama-bitnet-packed", "activation"), ("SiLU".into(), Origin::File));
    }
}
