//! What a model is: shape and numerics, from `config.json`, GGUF metadata or a trainer's settings.
//!
//! Invariants are checked once, in [`ModelConfig::check`], which every constructor ends with; later code relies on
//! them. A missing key is an error that names it, except where a family fixes the value (one table, `Family`).

mod activations;
mod contradictions;
mod experts;
mod gguf;
mod huggingface;
mod hybrid;
mod known;
mod provenance;
mod recognise;
mod rope;
mod rotation;
mod size;

pub use activations::ActivationType;
pub use experts::Experts;
pub(crate) use gguf::gguf_activations;
pub use hybrid::{HeadOrder, Hybrid, MAX_CONV_KERNEL};
pub use provenance::{Fact, Origin};
pub use rope::{Rope, RopeScaling, RopeTable};
pub use rotation::Rotation;

use crate::error::ModelError;
use crate::format::{Checkpoint, Llama2cFacts, Llama2cKind};
use crate::ops::{Attention, DeltaNet};

/// The nonlinearity of a feed-forward layer's gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Activation {
    /// `x · sigmoid(x)`, Llama's and Qwen's.
    Silu,
    /// `max(x, 0)²`, BitNet-2B-4T's.
    Relu2,
}

/// Families whose blocks this version builds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Llama blocks: RMS norm, GQA, gated feed-forward. Falcon-E and HF1BitLLM models are of this family.
    Llama,
    /// Llama with a sliding window.
    Mistral,
    /// Llama with biases on q, k and v, and windows on the upper layers.
    Qwen2,
    /// Llama with a norm on every query and key head, and heads of a width of their own. Ternary-Bonsai 1.7B to 8B and CAT-Q's
    /// Qwen3 are of this family.
    Qwen3,
    /// Qwen3 with mixtures of experts for feed-forward layers. CAT-Q's Qwen3-30B-A3B and 235B-A22B are of this family.
    Qwen3Moe,
    /// Qwen3 with an output gate on its attention, rotating a part of each head, between gated DeltaNet layers (Qwen3.5 and later).
    /// Ternary-Bonsai-27B and Ternary-Bonsai-2-27B are of this family.
    Qwen35,
    /// `BitNetForCausalLM` (2B-4T): SubLN, squared ReLU.
    BitNet,
    /// The first BitNet b1.58 models (1bitLLM) and their kin: SubLN, SiLU.
    BitNetSilu,
}

impl Family {
    /// Whether its attention norms every query and key head before RoPE.
    fn has_qk_norm(self) -> bool {
        matches!(self, Family::Qwen3 | Family::Qwen3Moe | Family::Qwen35)
    }
}

/// How the linear layers are computed.
#[derive(Debug, Clone, PartialEq)]
pub enum Numerics {
    /// Everything in floating point.
    Float,
    /// Ternary weights: BitNet's W1.58A8, or weights alone (W1.58A16).
    Ternary(Ternary),
}

/// Which layers are ternary, and what their tensors hold.
#[derive(Debug, Clone, PartialEq)]
pub struct Ternary {
    /// What the model is defined to multiply them with. Embedding and head may be ternary too where it is
    /// [`ActivationType::Float`].
    pub activations: ActivationType,
    /// What the file holds for a ternary layer.
    pub storage: Storage,
    /// Layers left in float, by `modules_to_not_convert`'s rules; `None`: all but the output head.
    pub exceptions: Option<Exceptions>,
}

impl Ternary {
    /// W1.58A8 with these tensors.
    pub fn bitnet(storage: Storage, exceptions: Option<Exceptions>) -> Self {
        Self { activations: ActivationType::Int8, storage, exceptions }
    }
}

/// What a file holds for a ternary layer. GGUF types say it themselves; for safetensors the config does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// Float master weights, ternarised by absmean at load (`quantization_mode: online`).
    Masters,
    /// Ternary codes with a `weight_scale` that the product is divided by, 1/γ (`linear_class: bitlinear`).
    Divide,
    /// Ternary codes with a `weight_scale` that the product is multiplied by, γ (`linear_class: autobitlinear`).
    Multiply,
    /// The tensor's own type (GGUF).
    SelfDescribed,
    /// Floats that are all 0 or ± a scale of their tensor, shard, row or group ("unpacked"), recognised by their values.
    FloatCopies,
    /// MLX's 2-bit numbers in U32, with a scale and a bias for every `group` weights of a row; layers without them are floats.
    Mlx {
        /// Weights per scale.
        group: usize,
    },
}

/// Which linear layers have a norm of their own, where [`ModelConfig::inner_norm_eps`] says that there are any.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum InnerNorms {
    /// Every ternary one.
    #[default]
    All,
    /// The output projection of attention and the down projection (BitDistill's `standard_bitnet`).
    OutputAndDown,
}

/// How an embedding model makes one vector of a text's hidden states.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// Its files do not say.
    Unstated,
    /// Their mean.
    Mean,
    /// The first token's.
    First,
    /// The last token's.
    Last,
    /// A score for ranking.
    Rank,
}

impl Pooling {
    /// Numbers of GGUF's `pooling_type`; 0 is none.
    pub(crate) const GGUF: [(u64, Self); 4] =
        [(1, Self::Mean), (2, Self::First), (3, Self::Last), (4, Self::Rank)];
}

/// `modules_to_not_convert`, compiled.
#[derive(Debug, Clone)]
pub struct Exceptions {
    names: Vec<String>,
    patterns: Vec<regex::Regex>,
}

impl PartialEq for Exceptions {
    fn eq(&self, other: &Self) -> bool {
        self.names == other.names
    }
}

impl Exceptions {
    /// # Errors
    /// When a name is neither plain nor a valid regular expression.
    pub fn new(names: Vec<String>) -> Result<Self, ModelError> {
        let refuse = |found: String, expected: &str| ModelError::ConfigValue {
            field: "quantization_config.modules_to_not_convert".into(),
            found,
            expected: expected.into(),
        };
        // Real lists have a handful of names; these bounds keep a hostile one from costing seconds and gigabytes.
        if names.len() > 1024 {
            return Err(refuse(format!("{} names", names.len()), "at most 1024"));
        }
        let patterns = names.iter().map(|name| {
            let pattern = format!(r"^(?:{name})(?:\.|$)");
            let regex =
                regex::RegexBuilder::new(&pattern).size_limit(1 << 16).dfa_size_limit(1 << 16).build();
            regex.map_err(|_| refuse(format!("`{name}`"), "a module name or a short regular expression"))
        });
        Ok(Self { patterns: patterns.collect::<Result<_, _>>()?, names })
    }

    /// A name matches as a prefix up to a dot, as a regular expression with such a boundary, or as a suffix.
    fn contains(&self, module: &str) -> bool {
        self.names.iter().any(|name| module.ends_with(name.as_str()))
            || self.patterns.iter().any(|pattern| pattern.is_match(module))
    }

    /// The names as given.
    pub fn names(&self) -> &[String] {
        &self.names
    }
}

/// A model's shape and numerics. Read it freely; constructors guarantee what [`ModelConfig::check`] checks.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ModelConfig {
    /// Which family's blocks.
    pub family: Family,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of one head; `heads * head_dim` may differ from `hidden_size`.
    pub head_dim: usize,
    /// Positions the model was made for.
    pub max_positions: usize,
    /// ε of every block norm.
    pub rms_norm_eps: f32,
    /// Output head shared with the embedding.
    pub tied: bool,
    /// Gate activation.
    pub activation: Activation,
    /// Position encoding.
    pub rope: Rope,
    /// Sliding window of each layer.
    pub windows: Vec<Option<usize>>,
    /// BitNet's norms before the output and down projections.
    pub sub_norms: bool,
    /// ε of the norm inside every ternary linear layer (`use_rms_norm`), where there is one.
    pub inner_norm_eps: Option<f32>,
    /// Which layers [`inner_norm_eps`](Self::inner_norm_eps) is about.
    pub inner_norms: InnerNorms,
    /// Norms of every query and key head before RoPE.
    pub qk_norm: bool,
    /// A gate on attention's output, from the query projection (Qwen3.5).
    pub attention_gate: bool,
    /// Which layers are gated DeltaNets instead of attention, and their shape.
    pub hybrid: Option<Hybrid>,
    /// Biases on q, k and v.
    pub qkv_bias: bool,
    /// Bias on the output projection.
    pub output_bias: bool,
    /// Biases on gate, up and down.
    pub mlp_bias: bool,
    /// Expert layers, where there are any; [`ModelConfig::experts_in`] says where.
    pub experts: Option<Experts>,
    /// How linear layers are computed.
    pub numerics: Numerics,
    /// The rotated basis that weights are stored in, where they are.
    pub rotation: Option<Rotation>,
    /// Start-of-text id, where the file names one.
    pub bos: Option<u32>,
    /// Ids that end generation.
    pub eos: Vec<u32>,
    /// Of an embedding model, which gives vectors and has no head to give text with: how it pools.
    pub pooling: Option<Pooling>,
}

/// The numbers that make a fresh model (see [`ModelConfig::fresh`]).
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shape {
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Longest context.
    pub max_positions: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Output head shared with the embedding.
    pub tied: bool,
    /// BitNet's norms before the output and down projections.
    pub sub_norms: bool,
    /// Gate activation.
    pub activation: Activation,
}

impl ModelConfig {
    /// A model to be trained from nothing: ternary (BitNet b1.58) or its float twin of the same shape.
    ///
    /// # Errors
    /// When the shape contradicts itself, naming the field.
    pub fn fresh(shape: &Shape, ternary: bool) -> Result<Self, ModelError> {
        let head_dim = shape.hidden_size.checked_div(shape.heads).unwrap_or(0);
        let config = Self {
            family: match (shape.sub_norms, shape.activation) {
                (true, Activation::Relu2) => Family::BitNet,
                (true, Activation::Silu) => Family::BitNetSilu,
                (false, _) => Family::Llama,
            },
            vocab_size: shape.vocab_size,
            hidden_size: shape.hidden_size,
            intermediate_size: shape.intermediate_size,
            num_layers: shape.num_layers,
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            head_dim,
            max_positions: shape.max_positions,
            rms_norm_eps: 1e-5,
            tied: shape.tied,
            activation: shape.activation,
            rope: Rope::new(shape.rope_theta, head_dim),
            windows: vec![None; shape.num_layers.min(MAX_LAYERS)],
            sub_norms: shape.sub_norms,
            inner_norm_eps: None,
            inner_norms: InnerNorms::All,
            qk_norm: false,
            attention_gate: false,
            hybrid: None,
            qkv_bias: false,
            output_bias: false,
            mlp_bias: false,
            experts: None,
            numerics: match ternary {
                true => Numerics::Ternary(Ternary::bitnet(Storage::Masters, None)),
                false => Numerics::Float,
            },
            rotation: None,
            bos: None,
            eos: Vec::new(),
            pooling: None,
        };
        config.check()
    }

    /// The configuration of a checkpoint, from wherever its container keeps it.
    ///
    /// # Errors
    /// As [`ModelConfig::from_json`] and [`ModelConfig::from_gguf`]; a safetensors file without a `config.json` beside it.
    pub fn of(file: &Checkpoint) -> Result<Self, ModelError> {
        if let Some(meta) = file.gguf_metadata() {
            return Self::from_gguf(file, meta)?.with_insistence(file);
        }
        if let Some(facts) = file.llama2c() {
            return Self::from_llama2c(facts);
        }
        let json = file.config_json()?.ok_or_else(|| {
            let what = "there is no config.json beside it, so the model's shape is unknown: put the one it came with there";
            ModelError::Unsupported { path: file.path().to_owned(), what: what.into() }
        })?;
        // Loaders that do not know these files run the weights as they are, and print nonsense.
        for name in ["hadamard_packing.json", "hadamard.json"] {
            if let Some(path) = file.folder().map(|folder| folder.join(name)).filter(|path| path.exists()) {
                let what = "it says that the weights beside it are stored in a rotated basis, which is read from GGUF files \
                            alone: take the model's GGUF file";
                return Err(ModelError::unsupported(&path, what));
            }
        }
        let mut config = Self::from_json(&json)?;
        // Generation settings may name more end tokens than the model's own config does (`<|eot_id|>`).
        if let Some(ids) =
            file.json_beside("generation_config.json")?.as_ref().and_then(|g| g.get("eos_token_id"))
        {
            let ids = ids.as_array().map_or(std::slice::from_ref(ids), Vec::as_slice);
            for id in
                ids.iter().filter_map(serde_json::Value::as_u64).filter(|&id| id < config.vocab_size as u64)
            {
                if !config.eos.contains(&(id as u32)) {
                    config.eos.push(id as u32);
                }
            }
        }
        if config.pooling.is_some()
            && let Some(pooling) = file.json_beside("1_Pooling/config.json")?
        {
            config.pooling = Some(huggingface::pooling(&pooling));
        }
        config.with_tensors(file)
    }

    /// llama2.c checkpoints say only their sizes; the program that made them fixes the rest.
    fn from_llama2c(facts: &Llama2cFacts) -> Result<Self, ModelError> {
        let ternary = facts.kind == Llama2cKind::Ternary;
        let shape = Shape {
            vocab_size: facts.vocab,
            hidden_size: facts.dim,
            intermediate_size: facts.hidden_dim,
            num_layers: facts.layers,
            heads: facts.heads,
            kv_heads: facts.kv_heads,
            max_positions: facts.seq_len,
            rope_theta: 10000.0,
            tied: facts.tied,
            // The ternary ones normalise the input of every linear layer, which is where SubLN has its norms.
            sub_norms: ternary,
            activation: Activation::Silu,
        };
        // Ids of the SentencePiece vocabularies these models are trained with.
        let mut config = Self { bos: Some(1), eos: vec![1, 2], ..Self::fresh(&shape, ternary)? };
        if ternary {
            // Their layers divide by the bare root mean square, of inputs as small as 1e-3; only a zero row needs an ε. The final
            // norm has 1e-5 in the original, which scales all logits of a position alike by some 1e-6.
            config.rms_norm_eps = 1e-20;
            config.numerics = Numerics::Ternary(Ternary::bitnet(Storage::SelfDescribed, None));
        }
        config.check()
    }

    /// What ternary layers multiply with by the model's definition; float where there are none.
    pub fn activations(&self) -> ActivationType {
        match &self.numerics {
            Numerics::Ternary(ternary) => ternary.activations,
            Numerics::Float => ActivationType::Float,
        }
    }

    /// Whether the linear layer `module` (`model.layers.0.mlp.up_proj`, `lm_head`) is ternary. Routers of experts never are.
    pub fn is_ternary(&self, module: &str) -> bool {
        match &self.numerics {
            _ if module.ends_with(".mlp.gate") => false,
            Numerics::Float => false,
            Numerics::Ternary(Ternary { exceptions: None, .. }) => {
                module != "lm_head" && !stays_float(module)
            }
            Numerics::Ternary(Ternary { exceptions: Some(listed), .. }) => !listed.contains(module),
        }
    }

    /// Whether any linear layer is ternary: a BitNet-shaped float model excepts every one of them.
    pub fn has_ternary_layers(&self) -> bool {
        const FEED_FORWARD: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];
        (0..self.num_layers).any(|n| {
            let ternary = |part: &str| self.is_ternary(&format!("model.layers.{n}.{part}"));
            let any = |of: &str| FEED_FORWARD.iter().any(|part| ternary(&format!("{of}.{part}")));
            self.mixer_weights(n).iter().any(|(part, ..)| ternary(part))
                || match self.experts_in(n) {
                    None => any("mlp"),
                    Some(experts) => (0..experts.count).any(|e| any(&format!("mlp.experts.{e}"))),
                }
        })
    }

    /// Whether the ternary layer `module` has a norm inside.
    pub(crate) fn has_inner_norm(&self, module: &str) -> bool {
        let included = match self.inner_norms {
            InnerNorms::All => true,
            InnerNorms::OutputAndDown => module.ends_with(".o_proj") || module.ends_with(".down_proj"),
        };
        self.inner_norm_eps.is_some() && included
    }

    /// Attention as layer `layer` does it.
    pub fn attention(&self, layer: usize) -> Attention {
        Attention {
            layer,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            scale: 1.0 / (self.head_dim as f32).sqrt(),
            window: self.windows[layer],
        }
    }

    /// The gated DeltaNet that layer `layer` is; `None` where it is attention.
    pub fn delta_net(&self, layer: usize) -> Option<DeltaNet> {
        self.hybrid.as_ref()?.layer(layer)
    }

    /// The same with value heads of gated DeltaNets in another order, which [`crate::weights::Weights`] then reads tensors in.
    pub(crate) fn with_order(mut self, order: HeadOrder) -> Self {
        if let Some(hybrid) = &mut self.hybrid {
            hybrid.order = order;
        }
        self
    }

    /// The last step of every constructor: what later code relies on.
    pub(crate) fn check(self) -> Result<Self, ModelError> {
        let sizes = [
            ("vocab_size", self.vocab_size, 1 << 24),
            ("hidden_size", self.hidden_size, 1 << 20),
            ("intermediate_size", self.intermediate_size, 1 << 22),
            ("num_hidden_layers", self.num_layers, MAX_LAYERS),
            ("num_attention_heads", self.heads, 1 << 14),
            ("num_key_value_heads", self.kv_heads, 1 << 14),
            ("head_dim", self.head_dim, 1 << 14),
            ("max_position_embeddings", self.max_positions, 1 << 31),
        ];
        for (field, value, most) in sizes {
            if value == 0 || value > most {
                return Err(value_error(field, value, format!("a number from 1 to {most}")));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let expected = format!("a divisor of num_attention_heads = {}", self.heads);
            return Err(value_error("num_key_value_heads", self.kv_heads, expected));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(value_error("head_dim", self.head_dim, "an even number, since RoPE rotates pairs"));
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps >= 0.0) {
            return Err(value_error("rms_norm_eps", self.rms_norm_eps, "a small positive number"));
        }
        if let Some(eps) = self.inner_norm_eps.filter(|eps| !(eps.is_finite() && *eps >= 0.0)) {
            return Err(value_error("quantization_config.rms_norm_eps", eps, "a small positive number"));
        }
        if self.windows.len() != self.num_layers {
            return Err(value_error(
                "layer_types",
                self.windows.len(),
                format!("{} layers", self.num_layers),
            ));
        }
        if self.windows.contains(&Some(0)) {
            return Err(value_error("sliding_window", 0, "at least 1"));
        }
        if let Some(id) = self.bos.iter().chain(&self.eos).find(|&&id| id as usize >= self.vocab_size) {
            return Err(value_error(
                "bos_token_id / eos_token_id",
                id,
                format!("below vocab_size = {}", self.vocab_size),
            ));
        }
        if let Some(experts) = &self.experts {
            experts.check(&self)?;
        }
        self.rope.check(self.head_dim)?;
        if let Some(hybrid) = &self.hybrid {
            hybrid.check(self.num_layers)?;
        }
        Ok(self)
    }
}

/// Small linear layers that ternary models keep in floating point: routers, and the two rows per head by which a gated DeltaNet
/// forgets and learns.
fn stays_float(module: &str) -> bool {
    [".mlp.gate", ".linear_attn.in_proj_a", ".linear_attn.in_proj_b"].iter().any(|end| module.ends_with(end))
}

const MAX_LAYERS: usize = 4096;

fn value_error(field: &str, found: impl ToString, expected: impl Into<String>) -> ModelError {
    ModelError::ConfigValue { field: field.into(), found: found.to_string(), expected: expected.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_exceptions_replaces_the_default_and_may_leave_nothing_ternary() {
        let shape = Shape {
            vocab_size: 8,
            hidden_size: 8,
            intermediate_size: 8,
            num_layers: 2,
            heads: 2,
            kv_heads: 1,
            max_positions: 8,
            rope_theta: 1e4,
            tied: false,
            sub_norms: true,
            activation: Activation::Relu2,
        };
        let with = |names: &[&str]| {
            let names = names.iter().map(|&name| name.to_owned()).collect();
            let exceptions = Some(Exceptions::new(names).unwrap());
            let mut config = ModelConfig::fresh(&shape, true).unwrap();
            config.numerics = Numerics::Ternary(Ternary::bitnet(Storage::Masters, exceptions));
            config
        };
        let default = ModelConfig::fresh(&shape, true).unwrap();
        assert!(default.has_ternary_layers() && !default.is_ternary("lm_head"));
        assert!(with(&["model.layers.1"]).is_ternary("lm_head"));
        assert!(!with(&["model.layers.1"]).is_ternary("model.layers.1.mlp.up_proj"));
        assert!(with(&["model.layers.1"]).is_ternary("model.layers.10.mlp.up_proj"));
        let all = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"];
        assert!(with(&all[..7]).is_ternary("lm_head") && !with(&all).has_ternary_layers());
        assert!(Exceptions::new(vec!["(".into()]).is_err());
    }
}
