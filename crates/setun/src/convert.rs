//! One model from any container and packing that is read into another, without changing what it computes.
//!
//! [`Model::build`](crate::model::Model::build) says which tensors a configuration has, [`Weights`] reads each in
//! its canonical form, and the target's types write it: so every pair of formats works without a table of pairs.
//! Trits and their scales come back bit for bit or the conversion is refused; floats are narrowed only to a type
//! that was asked for. What is lost on request is named in the report and in the output itself, see [`losses`].
//! Tensors are handled one at a time, large ones in pieces, into a hidden sibling of
//! the output that takes its name when everything, the read-back of its own header included, is right.
//!
//! What each target cannot say is in docs/format.md.

mod encode;
mod facts;
mod gguf;
mod huggingface;
mod losses;
mod plan;
mod regroup;
mod staging;
mod verify;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::config::{ActivationType, HeadOrder, ModelConfig, Numerics};
use crate::error::ModelError;
use crate::format::gguf::GgufWriter;
use crate::format::{
    Checkpoint, DEFAULT_SHARD_SIZE, Encoding, FloatWeights, OpenOptions, ScaleConvention, ShardedWriter,
    TensorSpec,
};
use crate::model::Role;
use crate::ops::Rotate;
use crate::tokenizer::Tokenizer;
use crate::weights::Weights;
use encode::Encoder;
#[cfg(feature = "hub")]
pub(crate) use huggingface::COMPANIONS;
pub use huggingface::write_companions;
pub use losses::losses;
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

impl Target {
    /// In which order it has the value heads of gated DeltaNet layers.
    fn order(self) -> HeadOrder {
        match self {
            Self::Gguf => HeadOrder::Tiled,
            Self::HuggingFace => HeadOrder::Grouped,
        }
    }
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
    /// Write what the target cannot hold without a loss, and name the loss in the report and the output: scales rounded
    /// or merged, other activations, a rotation turned back, end tokens without a key. What would make another model of
    /// it is refused all the same.
    pub allow_loss: bool,
    /// Bytes of tensors in one file of a Hugging Face folder; `None`: [`DEFAULT_SHARD_SIZE`].
    pub shard_size: Option<u64>,
    /// Replace an existing output.
    pub force: bool,
    /// Read the output back and compare every tensor before it gets its name.
    pub verify: bool,
    /// Becomes true when the conversion is to stop, which it does after the tensor at hand.
    pub stop: Option<&'a AtomicBool>,
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
    /// What was changed or left out, here and in conversions before this one, as the output says it too.
    pub losses: Vec<String>,
    /// What the reader of the output should know.
    pub notes: Vec<String>,
    /// What the comparison with the input covered, where it was asked for.
    pub verified: Option<Verified>,
}

/// Converts `file` to `output`, calling `progress` after every tensor.
///
/// # Errors
/// [`ModelError::CannotEncode`] and [`ModelError::ConfigValue`] name what the target cannot hold;
/// [`ModelError::Format`] an output that exists or does not read back; [`ModelError::Stopped`] where that was asked for; else as
/// reading `file` gives them. The output is then as it was before.
pub fn convert(
    file: &Checkpoint,
    output: &Path,
    options: &ConvertOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<ConvertReport, ModelError> {
    // Tensors go from the order of one file to that of the other, not to the one in which the model is run.
    let config = ModelConfig::of(file)?.with_order(options.target.order());
    let rounded_after = config.rotation.is_some() && config.activations() != ActivationType::Float;
    if rounded_after || config.activations() == ActivationType::Int4 {
        let what = "its activations are rounded to 4 bits or in a rotated basis, which no other container can say and programs would \
                    miss silently: keep the folder that `setun train` wrote";
        return Err(ModelError::unsupported(file.path(), what));
    }
    let weights = Weights::new(file, &config);
    weights.check_all_used()?;
    weights.check_scale_convention()?;
    let planned = plan::tensors(file, &config)?;
    let job = Job { file, config: &config, planned: &planned, options };
    check_types(&job)?;
    let staging = Staging::create(output, options.target == Target::HuggingFace, options.force)?;
    let report = build(&job, output, &staging, progress).map_err(|error| staging.outside(error))?;
    staging.finish()?;
    Ok(report)
}

/// What is to be written, decided before the first byte.
struct Prepared {
    items: Vec<Item>,
    scales: ScaleConvention,
    tokenizer: bool,
    losses: Vec<String>,
    notes: Vec<String>,
}

fn build(
    job: &Job,
    output: &Path,
    staging: &Staging,
    progress: &mut dyn FnMut(Progress),
) -> Result<ConvertReport, ModelError> {
    let options = job.options;
    let input_bytes = job.planned.iter().map(|p| p.bytes as u64).sum();
    let total = input_bytes * (1 + u64::from(options.verify));
    let mut at = 0;
    let mut done = |tensor: &str, bytes: u64| {
        at += bytes;
        progress(Progress { done: at, total, tensor });
        match options.stop.is_some_and(|stop| stop.load(Ordering::Relaxed)) {
            false => Ok(()),
            true => Err(ModelError::Stopped),
        }
    };
    let (prepared, encoder) = match options.target {
        Target::Gguf => {
            let (metadata, prepared) = gguf::prepare(job, output)?;
            let mut encoder = Encoder::new(job, prepared.scales);
            let writer = GgufWriter::create(&staging.path, &metadata, specs(&prepared.items))?;
            write(job, writer, &prepared.items, &mut encoder, &mut done)?;
            (prepared, encoder)
        }
        Target::HuggingFace => {
            let prepared = huggingface::prepare(job, &staging.path)?;
            let mut encoder = Encoder::new(job, prepared.scales);
            let size = options.shard_size.unwrap_or(DEFAULT_SHARD_SIZE);
            let header = huggingface::header(job);
            let writer = ShardedWriter::create(&staging.path, &header, specs(&prepared.items), size)?;
            write(job, writer, &prepared.items, &mut encoder, &mut done)?;
            (prepared, encoder)
        }
    };
    // Float weights stay what they were taken for.
    let weights = match job.config.numerics {
        Numerics::Float => FloatWeights::Float,
        Numerics::Ternary(_) => FloatWeights::Detect,
    };
    let written = Checkpoint::open_with(&staging.path, OpenOptions { weights, ..OpenOptions::default() })?;
    let read_back = ModelConfig::of(&written)?.with_order(options.target.order());
    let facts = facts::compare(job, &read_back);
    if let Some(field) = facts.iter().find(|(_, same)| !same).map(|(field, _)| field) {
        let what = format!("cannot hold this model: `{field}` would be read back differently");
        return Err(ModelError::format(output, what));
    }
    Weights::new(&written, &read_back).check_all_used()?;
    let verified = match options.verify {
        false => None,
        true => {
            let mut seen = verify::verify(job, &written, &read_back, &encoder, &mut done)?;
            seen.keys.extend(facts.iter().map(|(field, _)| *field));
            seen.keys.extend(facts::verify_files(job, &written, output, &prepared.losses)?);
            Some(seen)
        }
    };
    drop(written);
    let mut types = BTreeMap::new();
    for item in &prepared.items {
        *types.entry(item.spec.encoding.name().to_owned()).or_insert(0) += 1;
    }
    Ok(ConvertReport {
        input_bytes,
        output_bytes: staging.bytes()?,
        tensors: prepared.items.len(),
        ternary_layers: job.planned.iter().filter(|p| p.ternary).count(),
        types,
        max_error: encoder.tally.max_error(),
        max_scale_error: encoder.tally.scale_error(None),
        tokenizer: prepared.tokenizer,
        losses: prepared.losses,
        notes: prepared.notes,
        verified,
    })
}

fn specs(items: &[Item]) -> Vec<TensorSpec> {
    items.iter().map(|item| item.spec.clone()).collect()
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

    /// Whether ternary layers become the packed bytes of a Hugging Face folder. Their loaders round activations, so those of
    /// weight-only models do on request alone.
    fn packs(&self) -> bool {
        self.options.target == Target::HuggingFace
            && self.is_ternary()
            && (!self.is_weight_only() || self.options.scales.is_some())
    }

    /// The type asked for, for this matrix; none is for routers.
    fn asked(&self, planned: &Planned) -> Option<&Encoding> {
        match planned.is_block_linear() {
            true => self.options.linear_type.as_ref(),
            false => self.options.embedding_type.as_ref().filter(|_| !planned.is_router()),
        }
    }

    /// Whether rounding it was asked for with its type.
    fn asked_to_round(&self, planned: &Planned) -> bool {
        !planned.is_block_linear() && self.asked(planned).is_some()
    }

    /// The type of a matrix of floats, or of ternary weights that are written as floats.
    fn float_type(&self, planned: &Planned) -> Encoding {
        let turned = !matches!(self.unrotation(planned), Ok(None));
        match self.asked(planned).filter(|t| !t.is_ternary()) {
            Some(asked) => asked.clone(),
            None if turned => Encoding::F32,
            // As every GGUF program writes it.
            None if planned.is_router() && self.options.target == Target::Gguf => Encoding::F32,
            // GGUF holds every float type that is read.
            None if self.options.target == Target::Gguf && planned.stored.is_float() => {
                planned.stored.clone()
            }
            None if !planned.ternary => planned.own_float(),
            None => planned.copy_type(),
        }
    }

    /// What turns the rows of a rotated matrix back, where the target has no word for rotations.
    fn unrotation(&self, planned: &Planned) -> Result<Option<Rotate>, ModelError> {
        let (Some(rotation), Target::HuggingFace) = (&self.config.rotation, self.options.target) else {
            return Ok(None);
        };
        let (module, cols) = (planned.name.trim_end_matches(".weight"), planned.shape[1]);
        match planned.role {
            Some(Role::Embedding) => rotation.of_embedding(cols),
            Some(_) => rotation.of_linear(module, cols),
            None => Ok(None),
        }
    }

    /// Takes note of a loss, or refuses with `why` where none is allowed.
    fn lose(
        &self,
        losses: &mut Vec<String>,
        what: String,
        refusal: impl FnOnce() -> ModelError,
    ) -> Result<(), ModelError> {
        if !self.options.allow_loss {
            return Err(refusal());
        }
        losses.push(what);
        Ok(())
    }

    /// That the tokenizer was left out, where there was one.
    fn tokenizer_left_out(&self) -> Option<String> {
        let absent = || matches!(Tokenizer::of(self.file), Err(ModelError::Unsupported { .. }));
        (self.options.without_tokenizer && !absent()).then(|| "the tokenizer, as asked".to_owned())
    }

    /// What conversions before this one and this one lost.
    fn all_losses(
        &self,
        items: &[Item],
        scales: ScaleConvention,
        mut here: Vec<String>,
    ) -> Result<Vec<String>, ModelError> {
        let mut all = losses(self.file)?;
        here.extend(losses::survey(self, items, scales)?);
        all.extend(here);
        Ok(all)
    }
}

/// The two writers, which ask for tensors in their own order.
trait TensorWriter {
    fn pending(&self) -> Option<&TensorSpec>;
    fn part(&mut self, bytes: &[u8]) -> Result<(), ModelError>;
    fn finish(self) -> Result<(), ModelError>;
}

macro_rules! tensor_writer {
    ($writer:ty) => {
        impl TensorWriter for $writer {
            fn pending(&self) -> Option<&TensorSpec> {
                self.pending()
            }
            fn part(&mut self, bytes: &[u8]) -> Result<(), ModelError> {
                self.part(bytes)
            }
            fn finish(self) -> Result<(), ModelError> {
                self.finish()
            }
        }
    };
}
tensor_writer!(GgufWriter);
tensor_writer!(ShardedWriter);

/// Called with a tensor that is done and the bytes it took in the input.
type Done<'a> = dyn FnMut(&str, u64) -> Result<(), ModelError> + 'a;

fn write(
    job: &Job,
    mut writer: impl TensorWriter,
    items: &[Item],
    encoder: &mut Encoder,
    done: &mut Done,
) -> Result<(), ModelError> {
    let by_name: BTreeMap<&str, &Item> = items.iter().map(|i| (i.spec.name.as_str(), i)).collect();
    while let Some(item) = writer.pending().map(|spec| by_name[spec.name.as_str()]) {
        encoder.encode(item, &mut |bytes| writer.part(bytes))?;
        if writer.pending().is_some_and(|next| next.name == item.spec.name) {
            return Err(ModelError::tensor(&item.spec.name, "fewer bytes than its header entry says"));
        }
        let bytes: usize = item.part.planned().iter().map(|&index| job.planned[index].bytes).sum();
        done(&item.spec.name, bytes as u64)?;
    }
    writer.finish()
}

/// Types that do not suit the target or the model.
fn check_types(job: &Job) -> Result<(), ModelError> {
    let (options, ternary) = (job.options, job.is_ternary());
    let refuse = |name: &str, encoding: &Encoding, why: &str| {
        Err(ModelError::CannotEncode {
            name: name.to_owned(),
            encoding: encoding.to_string(),
            why: why.into(),
        })
    };
    let plain = [Encoding::F32, Encoding::F16, Encoding::BF16];
    if let Some(asked) = &options.embedding_type {
        let blocks = matches!(asked, Encoding::Q8_0 | Encoding::Q6K | Encoding::Q4_0);
        let offered = plain.contains(asked) || blocks && options.target == Target::Gguf;
        if !offered {
            let why = "a Hugging Face folder holds F32, F16 or BF16, and GGUF also Q8_0, Q6_K and Q4_0, for embedding and \
                       head";
            return refuse("model.embed_tokens.weight", asked, why);
        }
    }
    let first = job.planned.iter().find(|p| p.is_block_linear()).map_or("", |p| p.name.as_str());
    let folder = options.target == Target::HuggingFace;
    if folder && options.scales.is_some() && job.is_weight_only() && !options.allow_loss {
        let why = "loaders of packed layers round activations to int8, but this model defines float ones: leave --scales \
                   out for float copies of the weights, or accept that (--allow-loss)";
        return refuse(first, &Encoding::U8, why);
    }
    let Some(asked) = &options.linear_type else { return Ok(()) };
    if asked.is_ternary() && !ternary {
        let why = "the model's layers are in floating point, and rounding them to ternary is no conversion";
        return refuse(first, asked, why);
    }
    if folder && (job.packs() || !plain.contains(asked)) {
        let why = "a Hugging Face folder holds ternary layers packed, or as float copies where activations are floats too, \
                   and float layers as F32, F16 or BF16";
        return refuse(first, asked, why);
    }
    Ok(())
}
