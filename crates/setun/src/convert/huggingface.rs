//! A Hugging Face folder: safetensors in one file or several, `config.json` and the tokenizer's files.

use std::path::Path;

use serde_json::{Value, json};

use super::encode::cannot;
use super::losses::JSON_KEY;
use super::plan::{Item, Part, Planned};
use super::{Job, Prepared};
use crate::config::{Exceptions, ModelConfig, Numerics, RopeScaling, Storage, Ternary};
use crate::error::ModelError;
use crate::format::{Checkpoint, CheckpointKind, Encoding, ScaleConvention, TensorSpec};
use crate::recommended::Recommended;
use crate::tokenizer::Tokenizer;

/// Files that belong to a model and say nothing about how its weights are stored.
pub(crate) const COMPANIONS: [&str; 13] = [
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
];

/// The folder of chat templates that are not the usual one.
pub(super) const MORE_TEMPLATES: &str = "additional_chat_templates";

/// Writes everything but the weights into `folder`, and says what those are to be.
pub(super) fn prepare(job: &Job, folder: &Path) -> Result<Prepared, ModelError> {
    let (mut losses, mut notes) = (Vec::new(), Vec::new());
    // What config.json cannot say is refused before anything is written.
    let scales = convention(job);
    let config = config(job, scales, &mut losses)?;
    let items = items(job, scales, &mut notes)?;
    losses.extend(job.tokenizer_left_out());
    let own = own_tokenizer(job)?;
    let tokenizer = job.options.tokenizer.filter(|_| !job.options.without_tokenizer).or(own.as_ref());
    for template in tokenizer.map_or(&[][..], Tokenizer::chat_templates) {
        if template_file(&template.name).is_none() {
            let what = format!("the chat template `{}`, whose name is no file name", template.name);
            job.lose(&mut losses, what, || ModelError::ConfigValue {
                field: template.origin.clone(),
                found: format!("a chat template named `{}`", template.name),
                expected: "letters, digits, - and _, since such a folder keeps it in a file of that name: convert to GGUF, or \
                           leave it out (--allow-loss)"
                    .into(),
            })?;
        }
    }
    let losses = job.all_losses(&items, scales, losses)?;
    let tokenizer = write_files(job, folder, &items, &config, &losses, tokenizer, &mut notes)?;
    Ok(Prepared { items, scales, tokenizer, losses, notes })
}

/// The folder whose tokenizer files are copied as they are.
fn companions<'a>(job: &Job<'a>) -> Option<&'a Path> {
    let options = job.options;
    let ours = matches!(job.file.kind(), CheckpointKind::Safetensors | CheckpointKind::PyTorch);
    job.file.folder().filter(|_| ours && options.tokenizer.is_none() && !options.without_tokenizer)
}

/// The model's own tokenizer, where its files are to be made.
fn own_tokenizer(job: &Job) -> Result<Option<Tokenizer>, ModelError> {
    if job.options.tokenizer.is_some() || job.options.without_tokenizer || companions(job).is_some() {
        return Ok(None);
    }
    match Tokenizer::of(job.file) {
        Ok(found) => Ok(Some(found)),
        Err(ModelError::Unsupported { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Where a folder keeps the chat template of this name; a name from a file is no path.
pub(super) fn template_file(name: &str) -> Option<String> {
    let plain = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c));
    match name {
        "default" => Some("chat_template.jinja".into()),
        _ => plain.then(|| format!("{MORE_TEMPLATES}/{name}.jinja")),
    }
}

/// What a GGUF file says about the model (name, licence, authors), for the header of the weights.
pub(super) fn header(job: &Job) -> Vec<(String, String)> {
    let strings = job.file.gguf_metadata().into_iter().flat_map(|metadata| metadata.iter());
    let ours = strings.filter(|(key, _)| key.starts_with("general.") && *key != "general.architecture");
    let texts = ours.filter_map(|(key, value)| Some((key.to_owned(), value.as_str()?.to_owned())));
    let carried = job.file.header_metadata().iter().filter(|(key, _)| key.starts_with("general."));
    texts.chain(carried.cloned()).collect()
}

fn items(job: &Job, scales: ScaleConvention, notes: &mut Vec<String>) -> Result<Vec<Item>, ModelError> {
    let widen = job.packs() && floats_differ(job);
    let mut items = Vec::with_capacity(job.planned.len() * 2);
    for (index, planned) in job.planned.iter().enumerate() {
        let spec = |name: String, shape: Vec<usize>, encoding| TensorSpec { name, shape, encoding };
        let mut put = |spec, part| items.push(Item { spec, part, interleave: None });
        let name = planned.name.clone();
        match packed(job, planned) {
            true => {
                let (rows, cols) = (planned.shape[0], planned.shape[1]);
                if !rows.is_multiple_of(4) {
                    return Err(cannot(
                        planned,
                        "packed uint8",
                        format!("{rows} rows are not a multiple of 4"),
                    ));
                }
                let scale_type = if widen { Encoding::F32 } else { scale_type(job, planned, scales) };
                // Codes first: their scale is then known.
                let part = Part::Packed(index, scale_type.clone());
                put(spec(name.clone(), vec![rows / 4, cols], Encoding::U8), part);
                put(spec(format!("{name}_scale"), vec![1], scale_type), Part::Scale(index));
            }
            false => {
                let own = float_type(job, planned);
                let asked = planned.role.is_some() && job.asked(planned).is_some();
                let encoding = if widen && !asked { Encoding::F32 } else { own };
                put(spec(name, planned.shape.clone(), encoding), Part::Tensor(index));
            }
        }
    }
    if widen && job.options.embedding_type.as_ref().is_some_and(|asked| *asked != Encoding::F32) {
        let note = "embedding and norms have different float types, with which `transformers` cannot run a packed model: leave \
                    --embedding-type out, or ask for f32";
        notes.push(note.into());
    }
    Ok(items)
}

fn packed(job: &Job, planned: &Planned) -> bool {
    planned.ternary && planned.is_block_linear() && job.packs()
}

fn float_type(job: &Job, planned: &Planned) -> Encoding {
    if planned.role.is_some() { job.float_type(planned) } else { vector_type(job, planned) }
}

/// Whether the tensors that stay floats would have several types. `transformers` casts those of a float model to one as it
/// loads them, but those of a packed one not, and its products then refuse their operands.
fn floats_differ(job: &Job) -> bool {
    let mut types = job.planned.iter().filter(|p| !packed(job, p)).map(|p| float_type(job, p));
    let first = types.next();
    types.any(|other| Some(other) != first)
}

/// The scale's own type in the source, which holds it exactly; F32 where it is another number there, or none.
fn scale_type(job: &Job, planned: &Planned, scales: ScaleConvention) -> Encoding {
    let own = match &job.config.numerics {
        Numerics::Ternary(Ternary { storage: Storage::Divide, .. }) => Some(ScaleConvention::Divide),
        Numerics::Ternary(Ternary { storage: Storage::Multiply, .. }) => Some(ScaleConvention::Multiply),
        _ => None,
    };
    match job.file.info(&format!("{}_scale", planned.name)).map(|info| &info.encoding) {
        Some(half @ (Encoding::F16 | Encoding::BF16)) if own == Some(scales) => half.clone(),
        _ => Encoding::F32,
    }
}

/// Vectors keep their type, but a bias that a scale was multiplied into is an f32 product.
fn vector_type(job: &Job, planned: &Planned) -> Encoding {
    if planned.name.ends_with(".bias") && job.packs() { Encoding::F32 } else { planned.own_float() }
}

fn convention(job: &Job) -> ScaleConvention {
    let biases = job.planned.iter().any(|p| p.name.ends_with("_proj.bias"));
    match (job.options.scales, &job.config.numerics) {
        (Some(asked), _) => asked,
        (None, Numerics::Ternary(Ternary { storage: Storage::Divide, .. })) => ScaleConvention::Divide,
        (None, Numerics::Ternary(Ternary { storage: Storage::Multiply, .. })) => ScaleConvention::Multiply,
        // Dividing leaves biases alone.
        (None, _) if biases => ScaleConvention::Divide,
        (None, _) => ScaleConvention::Multiply,
    }
}

/// The configuration as the folder has it.
fn config(job: &Job, scales: ScaleConvention, losses: &mut Vec<String>) -> Result<ModelConfig, ModelError> {
    let mut config = job.config.clone();
    if let RopeScaling::Divisors(_) = config.rope.scaling {
        return Err(ModelError::ConfigValue {
            field: "rope_freqs.weight".into(),
            found: "a list of divisors".into(),
            expected: "absent, since a config.json has a rope_type but no such list: convert from the original folder".into(),
        });
    }
    if config.hybrid.is_some() {
        return Err(ModelError::ConfigValue {
            field: "linear_attention".into(),
            found: "gated DeltaNet layers".into(),
            expected: "none, since their decay and this family's norms are stored there in forms from which the numbers do not \
                       come back exactly: convert to GGUF"
                .into(),
        });
    }
    if let Some(rotation) = config.rotation.take() {
        let what = format!(
            "rotation metadata (prism.hadamard): {} matrices are turned back into the plain basis and are floats, no longer \
             ternary",
            rotation.folded()
        );
        job.lose(losses, what, || ModelError::ConfigValue {
            field: "prism.hadamard".into(),
            found: "a rotation of weights".into(),
            expected: "absent, since no loader of such folders would apply it: convert to GGUF, or accept weights that are turned \
                       back and no longer ternary (--allow-loss)"
                .into(),
        })?;
        if job.packs() {
            let first = job.planned.iter().find(|p| p.is_block_linear()).expect("a model has layers");
            let why = "it is rotated, and turned back it is no longer ternary: leave --scales out";
            return Err(cannot(first, "packed uint8", why.into()));
        }
    }
    if job.is_weight_only() {
        if !job.packs() {
            config.numerics = Numerics::Float;
            return Ok(config);
        }
        losses.push("float activations: loaders of packed layers multiply them with int8 ones".into());
        config.numerics = Numerics::Ternary(Ternary::bitnet(Storage::Multiply, None));
    }
    if let Numerics::Ternary(ternary) = &mut config.numerics {
        // Layers that a GGUF file keeps in float have to be listed here, and a list replaces the default.
        let float = |p: &&Planned| p.is_block_linear() && !p.ternary;
        let mut listed: Vec<String> =
            job.planned.iter().filter(float).map(|p| module(&p.name).to_owned()).collect();
        if (ternary.storage == Storage::SelfDescribed || job.is_weight_only()) && !listed.is_empty() {
            listed.push("lm_head".into());
            ternary.exceptions = Some(Exceptions::new(listed)?);
        }
        // Loaders would make ternary layers of the routers too.
        if job.config.experts.is_some() && job.is_ternary() {
            let listed = ternary.exceptions.as_ref().map(|listed| listed.names().to_vec());
            let mut names = listed.unwrap_or_else(|| vec!["lm_head".to_owned()]);
            if !names.iter().any(|name| name == "mlp.gate") {
                names.push("mlp.gate".into());
            }
            ternary.exceptions = Some(Exceptions::new(names)?);
        }
        // With no packed layer at all there is no scale, and masters say that too (a float twin's folder).
        if job.is_ternary() {
            ternary.storage = match scales {
                ScaleConvention::Divide => Storage::Divide,
                ScaleConvention::Multiply => Storage::Multiply,
            };
        }
    }
    Ok(config)
}

fn module(name: &str) -> &str {
    name.strip_suffix(".weight").unwrap_or(name)
}

/// Writes everything but the weights. Returns whether there is a tokenizer.
fn write_files(
    job: &Job,
    folder: &Path,
    items: &[Item],
    config: &ModelConfig,
    losses: &[String],
    tokenizer: Option<&Tokenizer>,
    notes: &mut Vec<String>,
) -> Result<bool, ModelError> {
    let mut json = config.to_json();
    // Loaders cast to it, so it must hold every tensor.
    let floats =
        items.iter().filter(|i| i.spec.encoding != Encoding::U8 && !matches!(i.part, Part::Scale(_)));
    let mut types = floats.map(|i| &i.spec.encoding);
    let first = types.next();
    json["torch_dtype"] = match first.filter(|first| types.all(|other| other == *first)) {
        Some(Encoding::F16) => "float16".into(),
        Some(Encoding::BF16) => "bfloat16".into(),
        _ => "float32".into(),
    };
    if !losses.is_empty() {
        json[JSON_KEY] = json!(losses);
    }
    write_json(&folder.join("config.json"), &json)?;
    if let Some(source) = companions(job) {
        return copy_companions(source, folder, notes);
    }
    if tokenizer.is_none() {
        notes.push("there is no tokenizer in it".into());
    }
    make_companions(job.file, job.config, tokenizer, folder)
}

/// Writes the files that a model folder holds beside `config.json` and the weights: the tokenizer, chat templates, end tokens and
/// recommended sampling of `file`. Those of a Hugging Face folder are copied as they are, others made. For programs that write
/// weights of their own, as a trainer does.
///
/// # Errors
/// When a file cannot be read or written, or the tokenizer does not fit `config`.
pub fn write_companions(
    file: &Checkpoint,
    config: &ModelConfig,
    tokenizer: &Tokenizer,
    folder: &Path,
) -> Result<(), ModelError> {
    if let (CheckpointKind::Safetensors | CheckpointKind::PyTorch, Some(source)) =
        (file.kind(), file.folder())
        && copy_companions(source, folder, &mut Vec::new())?
    {
        return Ok(());
    }
    make_companions(file, config, Some(tokenizer), folder).map(drop)
}

fn make_companions(
    file: &Checkpoint,
    config: &ModelConfig,
    tokenizer: Option<&Tokenizer>,
    folder: &Path,
) -> Result<bool, ModelError> {
    let mut ends = config.eos.clone();
    ends.extend(tokenizer.map_or(&[][..], Tokenizer::eos_ids).iter().filter(|id| !config.eos.contains(id)));
    let bos = tokenizer.and_then(Tokenizer::bos).or(config.bos);
    let mut generation = Recommended::of(file)?.to_json();
    generation.insert("bos_token_id".into(), json!(bos));
    generation.insert("eos_token_id".into(), json!(ends));
    write_json(&folder.join("generation_config.json"), &generation.into())?;
    let Some(tokenizer) = tokenizer else { return Ok(false) };
    if tokenizer.vocab_size() > config.vocab_size {
        let what = format!(
            "it has {} entries, but the model's embedding has {} rows, so it belongs to another model",
            tokenizer.vocab_size(),
            config.vocab_size
        );
        return Err(ModelError::Tokenizer { what });
    }
    write_text(&folder.join("tokenizer.json"), &tokenizer.to_json()?)?;
    let token = |id: Option<u32>| id.and_then(|id| tokenizer.id_to_token(id));
    write_json(
        &folder.join("tokenizer_config.json"),
        &json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": token(tokenizer.bos()),
            "eos_token": token(tokenizer.eos_ids().first().copied()),
            "clean_up_tokenization_spaces": false,
            "model_max_length": config.max_positions,
        }),
    )?;
    for template in tokenizer.chat_templates() {
        let Some(path) = template_file(&template.name).map(|file| folder.join(file)) else { continue };
        let place = path.parent().unwrap_or(folder);
        std::fs::create_dir_all(place).map_err(|e| ModelError::write(place, e))?;
        write_text(&path, &template.source)?;
    }
    Ok(true)
}

fn copy_companions(from: &Path, to: &Path, notes: &mut Vec<String>) -> Result<bool, ModelError> {
    for name in COMPANIONS {
        let (source, target) = (from.join(name), to.join(name));
        if source.is_file() {
            std::fs::copy(&source, &target).map_err(|e| ModelError::write(&target, e))?;
        }
    }
    let more = MORE_TEMPLATES;
    for entry in std::fs::read_dir(from.join(more)).into_iter().flatten().flatten() {
        let target = to.join(more).join(entry.file_name());
        if entry.path().extension().is_some_and(|end| end == "jinja") && entry.path().is_file() {
            std::fs::create_dir_all(to.join(more)).map_err(|e| ModelError::write(&to.join(more), e))?;
            std::fs::copy(entry.path(), &target).map_err(|e| ModelError::write(&target, e))?;
        }
    }
    let found = ["tokenizer.json", "tokenizer.model"].iter().any(|name| to.join(name).exists());
    if !found {
        notes.push("there is no tokenizer in it".into());
    }
    Ok(found)
}

fn write_json(path: &Path, value: &Value) -> Result<(), ModelError> {
    write_text(path, &format!("{value:#}\n"))
}

fn write_text(path: &Path, text: &str) -> Result<(), ModelError> {
    std::fs::write(path, text).map_err(|e| ModelError::write(path, e))
}
