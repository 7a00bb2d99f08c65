//! One model from any container and packing that is read into another, without changing what it computes.
//!
//! [`Model::build`](crate::model::Model::build) says which tensors a configuration has, [`Weights`] reads each in
//! its canonical form, and the target's types write it: so every pair of formats works without a table of pairs.
//! Trits and their scales come back bit for bit or the conversion is refused; floats are narrowed only to a type
//! that was asked for, and the report says by how much. Tensors are handled one at a time, into a hidden sibling of
//! the output that takes its name when everything, the read-back of its own header included, is right.
//!
//! What each target cannot say is in docs/format.md.

mod encode;
mod gguf;
mod huggingface;
mod plan;
mod staging;
mod verify;

use std::collections::BTreeMap;
use std::path::Path;

use crate::config::{ActivationType, HeadOrder, Hybrid, ModelConfig, Numerics, RopeScaling};
use crate::error::ModelError;
use crate::format::gguf::GgufWriter;
use crate::format::{Checkpoint, Encoding, SafetensorsWriter, ScaleConvention, TensorSpec};
use crate::tokenizer::Tokenizer;
use crate::weights::Weights;
use encode::Encoder;
#[cfg(feature = "hub")]
pub(crate) use huggingface::COMPANIONS;
use plan::{Item, Planned};
use staging::Staging;
pub use verify::Verified;

/// What is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Target {
    /// One GGUF file, tokenizer included.
    #[default]
    Gguf,
    /// A folder as Hugging Face models have it: safetensors, `config.json`, tokenizer files.
    HuggingFace,
}

/// What a conversion chooses. The default keeps every value.
#[derive(Debug, Clone, Default)]
pub struct ConvertOptions<'a> {
    /// What to write.
    pub target: Target,
    /// Type of the linear layers inside the blocks. `None`: I2_S (GGUF) or packed bytes (Hugging Face) for ternary
    /// layers, and for float layers the type they have, F32 where the target lacks it. A ternary type applies to the
    /// ternary layers, a float type to all.
    pub linear_type: Option<Encoding>,
    /// Type of the embedding and the output head. `None`: the one they have, F32 where the target lacks it.
    pub embedding_type: Option<Encoding>,
    /// Meaning of the scales beside packed layers (Hugging Face). `None`: the source's; else `Multiply`, unless ternary
    /// layers have biases.
    pub scales: Option<ScaleConvention>,
    /// The tokenizer to write instead of the model's own.
    pub tokenizer: Option<&'a Tokenizer>,
    /// Write none.
    pub without_tokenizer: bool,
    /// Allow scales to be rounded to the target's precision, and what the notes of the report then name.
    pub lossy: bool,
    /// Replace an existing output.
    pub force: bool,
    /// Read the output back and compare every tensor before it gets its name.
    pub verify: bool,
}

/// Where a conversion is.
#[derive(Debug, Clone, Copy)]
pub struct Progress<'a> {
    /// Bytes of the input's tensors dealt with; verification counts them again.
    pub done: u64,
    /// Of how many.
    pub total: u64,
    /// The tensor just written or compared.
    pub tensor: &'a str,
}

/// The largest difference that narrowing floats made.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct MaxError {
    /// In which tensor.
    pub tensor: String,
    /// `|written − read|`.
    pub error: f32,
}

/// What a conversion did.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct ConvertReport {
    /// Bytes of the tensors read.
    pub input_bytes: u64,
    /// Bytes of the file or folder written.
    pub output_bytes: u64,
    /// Tensors written.
    pub tensors: usize,
    /// Layers written as ternary.
    pub ternary_layers: usize,
    /// Tensors by type.
    pub types: BTreeMap<String, usize>,
    /// Largest error of narrowed floats; `None` when every value is kept.
    pub max_error: Option<MaxError>,
    /// Largest relative change of a ternary scale; 0 unless rounding was allowed.
    pub max_scale_error: f32,
    /// Whether a tokenizer was written.
    pub tokenizer: bool,
    /// What the reader of the output should know.
    pub notes: Vec<String>,
    /// What the comparison with the input covered, where it was asked for.
    pub verified: Option<Verified>,
}

/// Converts `file` to `output`, calling `progress` after every tensor.
///
/// # Errors
/// [`ModelError::CannotEncode`] and [`ModelError::ConfigValue`] name what the target cannot hold;
/// [`ModelError::Format`] an output that exists or does not read back; else as reading `file` gives them. The output
/// is then as it was before.
pub fn convert(
    file: &Checkpoint,
    output: &Path,
    options: &ConvertOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<ConvertReport, ModelError> {
    // Tensors go from the order of one file to that of the other, not to the one in which the model is run.
    let order = match options.target {
        Target::Gguf => HeadOrder::Tiled,
        Target::HuggingFace => HeadOrder::Grouped,
    };
    let config = ModelConfig::of(file)?.with_order(order);
    let weights = Weights::new(file, &config);
    weights.check_all_used()?;
    weights.check_scale_convention()?;
    let planned = plan::tensors(file, &config)?;
    check_types(&config, &planned, options)?;
    let job = Job { file, config: &config, planned: &planned, options };
    let folder = options.target == Target::HuggingFace;
    let mut notes = Vec::new();
    let staging = Staging::create(output, folder, options.force)?;
    let input_bytes = planned.iter().map(|p| p.bytes as u64).sum();
    let total = input_bytes * (1 + u64::from(options.verify));
    let mut encoder = Encoder::new(&job);
    let mut at = 0;
    let (items, tokenizer) = match options.target {
        Target::Gguf => {
            let (metadata, items, tokenizer) = gguf::prepare(&job, output, &mut notes)?;
            let specs = items.iter().map(|i| i.spec.clone()).collect();
            let writer = GgufWriter::create(&staging.path, &metadata, specs)?;
            write(&job, writer, &items, &mut encoder, &mut |tensor, bytes| {
                at += bytes;
                progress(Progress { done: at, total, tensor });
            })?;
            (items, tokenizer)
        }
        Target::HuggingFace => {
            let (items, scales) = huggingface::items(&job, &mut notes)?;
            encoder.convention = scales;
            let specs = items.iter().map(|i| i.spec.clone()).collect();
            let writer = SafetensorsWriter::create(&staging.path.join("model.safetensors"), &[], specs)?;
            write(&job, writer, &items, &mut encoder, &mut |tensor, bytes| {
                at += bytes;
                progress(Progress { done: at, total, tensor });
            })?;
            let tokenizer = huggingface::write_files(&job, &staging.path, &items, scales, &mut notes)?;
            (items, tokenizer)
        }
    };
    let written = Checkpoint::open(&staging.path)?;
    let read_back = ModelConfig::of(&written)?.with_order(order);
    if let Some(field) = difference(&job, &read_back) {
        let what = format!("cannot hold this model: `{field}` would be read back differently");
        return Err(ModelError::format(output, what));
    }
    let verified = match options.verify {
        false => None,
        true => Some(verify::verify(&job, &written, &read_back, &encoder, &mut |tensor, bytes| {
            at += bytes;
            progress(Progress { done: at, total, tensor });
        })?),
    };
    drop(written);
    let mut types = BTreeMap::new();
    for item in &items {
        *types.entry(item.spec.encoding.name().to_owned()).or_insert(0) += 1;
    }
    let report = ConvertReport {
        input_bytes,
        output_bytes: staging.bytes()?,
        tensors: items.len(),
        ternary_layers: planned.iter().filter(|p| p.ternary).count(),
        types,
        max_error: encoder.max_error(),
        max_scale_error: encoder.scale_error,
        tokenizer,
        notes,
        verified,
    };
    staging.finish()?;
    Ok(report)
}

/// What all steps of one conversion look at.
struct Job<'a> {
    file: &'a Checkpoint,
    config: &'a ModelConfig,
    planned: &'a [Planned],
    options: &'a ConvertOptions<'a>,
}

impl<'a> Job<'a> {
    fn weights(&self) -> Weights<'a> {
        Weights::new(self.file, self.config)
    }

    /// Ternary weights with float activations: any type that holds the values computes the same.
    fn is_weight_only(&self) -> bool {
        self.is_ternary() && self.config.activations() == ActivationType::Float
    }

    fn is_ternary(&self) -> bool {
        self.planned.iter().any(|p| p.ternary)
    }

    /// The type of a matrix of floats, or of ternary weights that are written as floats.
    fn float_type(&self, planned: &Planned) -> Encoding {
        if planned.is_router() {
            // As every GGUF program writes it.
            return if self.options.target == Target::Gguf { Encoding::F32 } else { planned.own_float() };
        }
        let asked = match planned.is_block_linear() {
            true => self.options.linear_type.as_ref().filter(|t| !t.is_ternary()),
            false => self.options.embedding_type.as_ref(),
        };
        match (asked, &planned.stored, self.options.target) {
            (Some(asked), ..) => asked.clone(),
            (None, Encoding::Q8_0, Target::Gguf) => Encoding::Q8_0,
            (None, ..) => planned.own_float(),
        }
    }
}

/// The two writers, which ask for tensors in their own order.
trait TensorWriter {
    fn pending(&self) -> Option<&TensorSpec>;
    fn tensor(&mut self, bytes: &[u8]) -> Result<(), ModelError>;
    fn finish(self) -> Result<(), ModelError>;
}

macro_rules! tensor_writer {
    ($writer:ty) => {
        impl TensorWriter for $writer {
            fn pending(&self) -> Option<&TensorSpec> {
                self.pending()
            }
            fn tensor(&mut self, bytes: &[u8]) -> Result<(), ModelError> {
                self.tensor(bytes)
            }
            fn finish(self) -> Result<(), ModelError> {
                self.finish()
            }
        }
    };
}
tensor_writer!(GgufWriter);
tensor_writer!(SafetensorsWriter);

fn write(
    job: &Job,
    mut writer: impl TensorWriter,
    items: &[Item],
    encoder: &mut Encoder,
    done: &mut dyn FnMut(&str, u64),
) -> Result<(), ModelError> {
    let by_name: BTreeMap<&str, &Item> = items.iter().map(|i| (i.spec.name.as_str(), i)).collect();
    while let Some(item) = writer.pending().map(|spec| by_name[spec.name.as_str()]) {
        writer.tensor(&encoder.encode(item)?)?;
        let bytes: usize = item.part.planned().iter().map(|&index| job.planned[index].bytes).sum();
        done(&item.spec.name, bytes as u64);
    }
    writer.finish()
}

/// Types that do not suit the target or the model.
fn check_types(
    config: &ModelConfig,
    planned: &[Planned],
    options: &ConvertOptions,
) -> Result<(), ModelError> {
    let refuse = |name: &str, encoding: &Encoding, why: String| {
        Err(ModelError::CannotEncode { name: name.to_owned(), encoding: encoding.to_string(), why })
    };
    let ternary = planned.iter().any(|p| p.ternary);
    let plain = [Encoding::F32, Encoding::F16, Encoding::BF16];
    if let Some(asked) = &options.embedding_type {
        let gguf = options.target == Target::Gguf
            && matches!(asked, Encoding::Q8_0 | Encoding::Q6K | Encoding::Q4_0);
        if !plain.contains(asked) && !gguf {
            return refuse("model.embed_tokens.weight", asked, format!("{asked} is not offered for it here"));
        }
    }
    let Some(asked) = &options.linear_type else { return Ok(()) };
    let first = planned.iter().find(|p| p.is_block_linear()).map_or("", |p| p.name.as_str());
    if asked.is_ternary() && !ternary {
        let why = "the model's layers are in floating point, and rounding them to ternary is no conversion";
        return refuse(first, asked, why.into());
    }
    if options.target == Target::HuggingFace {
        if ternary || !plain.contains(asked) {
            let why =
                "a Hugging Face folder holds ternary layers packed and float layers as F32, F16 or BF16";
            return refuse(first, asked, why.into());
        }
        return Ok(());
    }
    // Float copies of ternary weights: only an architecture that is ternary by name is still run as one.
    let rounds = config.activations() == ActivationType::Int8;
    if ternary && !asked.is_ternary() && rounds && !config.sub_norms && !options.lossy {
        let why = "GGUF's `llama` marks ternary layers by their type alone, so a reader would no longer quantise \
                   activations as the model defines: use i2_s, tq1_0 or tq2_0, or allow the change (--lossy)";
        return refuse(first, asked, why.into());
    }
    Ok(())
}

/// The first field in which the configuration read back is not the model's, beyond what containers spell differently.
fn difference(job: &Job, found: &ModelConfig) -> Option<&'static str> {
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
    if let Some(((field, _), _)) = sizes(expected).into_iter().zip(sizes(found)).find(|(a, b)| a != b) {
        return Some(field);
    }
    let checks = [
        ("num_experts", expected.experts == found.experts),
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
        ("eos_token_id", job.options.lossy || expected.eos.iter().all(|id| found.eos.contains(id))),
        ("linear_attention", same_hybrid(expected, found)),
        ("prism.hadamard", expected.rotation == found.rotation),
        ("quantization_config", same_numerics(job, found)),
    ];
    checks.into_iter().find(|(_, same)| !same).map(|(field, _)| field)
}

/// Whether the layers are still multiplied with what the model defines.
fn same_numerics(job: &Job, found: &ModelConfig) -> bool {
    // Float copies of ternary layers were allowed to change the numerics, with a note.
    if job.options.lossy && found.numerics == Numerics::Float {
        return true;
    }
    // Those of weight-only models change nothing.
    if job.is_weight_only() {
        return found.activations() == ActivationType::Float;
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
