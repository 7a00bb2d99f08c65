//! GGUF: names, row order, types and metadata, and the models that its keys cannot describe.

use std::collections::HashMap;
use std::path::Path;

use super::Job;
use super::plan::{Item, Part, Planned};
use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::format::gguf::{Array, Metadata, Value};
use crate::format::{Encoding, TensorSpec};
use crate::recommended::Recommended;
use crate::tokenizer::Tokenizer;
use crate::weights::{experts, gguf_name_in, vector_shape};

/// The header, the tensors in the order of the file, and whether there is a tokenizer.
pub(super) fn prepare(
    job: &Job,
    output: &Path,
    notes: &mut Vec<String>,
) -> Result<(Metadata, Vec<Item>, bool), ModelError> {
    check(job)?;
    let keys = job.config.to_gguf()?;
    let items = items(job, notes)?;
    let mut metadata = Metadata::new();
    for (key, value) in keys.iter().filter(|(key, _)| key == "general.architecture") {
        metadata.insert(key.clone(), value.clone());
    }
    general(job, output, &items, &mut metadata);
    // From GGUF to GGUF it is among the keys that go along as they are.
    if job.file.gguf_metadata().is_none() {
        for (key, value) in Recommended::of(job.file)?.to_gguf() {
            metadata.insert(key, value);
        }
    }
    for (key, value) in keys.into_iter().filter(|(key, _)| key != "general.architecture") {
        metadata.insert(key, value);
    }
    let tokenizer = tokenizer(job, &mut metadata, notes)?;
    Ok((metadata, items, tokenizer))
}

/// Models whose layers GGUF would describe wrongly.
fn check(job: &Job) -> Result<(), ModelError> {
    let refuse = |planned: &Planned, why: &str| {
        let encoding = "part of a GGUF model".to_owned();
        Err(ModelError::CannotEncode { name: planned.name.clone(), encoding, why: why.into() })
    };
    if job.config.hybrid.as_ref().is_some_and(|h| h.draft_layers > 0) && !job.options.lossy {
        return Err(ModelError::ConfigValue {
            field: "nextn_predict_layers".into(),
            found: "blocks that only draft tokens".into(),
            expected: "0, since they would be left out: allow it (--lossy)".into(),
        });
    }
    for planned in job.planned {
        if planned.ternary && !planned.is_block_linear() && !job.is_weight_only() {
            return refuse(
                planned,
                "it is ternary, but readers of GGUF take the output head for floating point",
            );
        }
        let float = planned.is_block_linear() && !planned.ternary;
        if float && job.config.sub_norms {
            return refuse(
                planned,
                "it is in floating point, but GGUF's BitNet architectures are ternary in every layer: use --to hf",
            );
        }
        if float && job.config.inner_norm_eps.is_some() {
            return refuse(
                planned,
                "it is in floating point beside layers with inner norms, which GGUF cannot tell apart: use --to hf",
            );
        }
    }
    Ok(())
}

fn items(job: &Job, notes: &mut Vec<String>) -> Result<Vec<Item>, ModelError> {
    let mut items: Vec<Item> = Vec::with_capacity(job.planned.len() + 1);
    let mut stacks: HashMap<String, usize> = HashMap::new();
    if let Some(divisors) = job.config.rope_divisors() {
        let name = "rope_freqs.weight".to_owned();
        let spec = TensorSpec { name, shape: vec![divisors.len()], encoding: Encoding::F32 };
        items.push(Item { spec, part: Part::Given(divisors), interleave: None });
    }
    for (index, planned) in job.planned.iter().enumerate() {
        let cols = planned.shape.last().copied().unwrap_or(0);
        let encoding = match (planned.role, planned.ternary) {
            // Readers expect vectors in full precision.
            (None, _) => Encoding::F32,
            (Some(_), true) => {
                let asked = match planned.is_block_linear() {
                    true => job.options.linear_type.clone(),
                    // Where embedding and head are ternary too, one type is meant for all.
                    false => job.options.embedding_type.clone().or(job.options.linear_type.clone()),
                };
                let own = match job.is_weight_only() {
                    // I2_S says that activations are rounded, which weight-only models do not do.
                    false => Encoding::I2S,
                    true if planned.stored.is_ternary() => planned.stored.clone(),
                    // Recognised in floats, or packed as GGUF has no word for: the finest groups, which every program reads.
                    true if cols.is_multiple_of(64) => Encoding::Q2_0G64,
                    true => planned.own_float(),
                };
                asked.unwrap_or(own)
            }
            (Some(_), false) => job.float_type(planned),
        };
        if !cols.is_multiple_of(encoding.block_len()) {
            return Err(no_whole_blocks(planned, cols, &encoding));
        }
        let name = gguf_name_in(job.config.hybrid.is_some(), &planned.name);
        if experts::parse(&planned.name).is_some() {
            match stacks.get(&name) {
                Some(&at) => add_expert(&mut items[at], index, planned, encoding)?,
                None => {
                    stacks.insert(name.clone(), items.len());
                    items.push(first_expert(name, index, planned, encoding)?);
                }
            }
            continue;
        }
        let shape = match planned.role {
            Some(_) => planned.shape.clone(),
            None => vector_shape(job.config, &planned.name, cols),
        };
        let spec = TensorSpec { name, shape, encoding };
        let interleave = match job.config.gguf_interleaves_rotary_pairs() {
            true => heads(job.config, &planned.name),
            false => None,
        };
        items.push(Item { spec, part: Part::Tensor(index), interleave });
    }
    let copies = |i: &Item| {
        !i.spec.encoding.is_ternary() && i.part.planned().first().is_some_and(|&n| job.planned[n].ternary)
    };
    if !job.config.sub_norms && !job.is_weight_only() && items.iter().any(copies) {
        let note = "ternary layers are written as floats that readers of `llama` no longer take for ternary: their \
                    activations are not quantised any more";
        notes.push(note.into());
    }
    Ok(items)
}

/// The stack of which `planned` is the first matrix.
fn first_expert(
    stored: String,
    index: usize,
    planned: &Planned,
    encoding: Encoding,
) -> Result<Item, ModelError> {
    if encoding == Encoding::I2S {
        let why = "I2_S has one scale for a tensor, but a stack of experts has one for each: use --to hf, or, where activations \
                   are float, tq1_0, tq2_0, q2_0, pq2_0 or ptq1_0";
        let name = planned.name.clone();
        return Err(ModelError::CannotEncode { name, encoding: encoding.to_string(), why: why.into() });
    }
    let shape = vec![1, planned.shape[0], planned.shape[1]];
    let spec = TensorSpec { name: stored, shape, encoding };
    Ok(Item { spec, part: Part::Stack(vec![index]), interleave: None })
}

/// Adds the next expert. Floats of several types become F32, which holds them all.
fn add_expert(
    stack: &mut Item,
    index: usize,
    planned: &Planned,
    encoding: Encoding,
) -> Result<(), ModelError> {
    if stack.spec.encoding != encoding {
        if encoding.is_ternary() || stack.spec.encoding.is_ternary() {
            let why = format!("experts before it are {}, and a stack has one type", stack.spec.encoding);
            let name = planned.name.clone();
            return Err(ModelError::CannotEncode { name, encoding: encoding.to_string(), why });
        }
        stack.spec.encoding = Encoding::F32;
    }
    stack.spec.shape[0] += 1;
    if let Part::Stack(indices) = &mut stack.part {
        indices.push(index);
    }
    Ok(())
}

fn no_whole_blocks(planned: &Planned, cols: usize, encoding: &Encoding) -> ModelError {
    let advice = match encoding {
        Encoding::I2S => "use f32 or f16 (BitNet architectures), or --to hf",
        Encoding::TQ1_0 | Encoding::TQ2_0 => "use i2_s where rows are multiples of 128",
        Encoding::PQ2_0 | Encoding::PTQ1_0 => "use q2_0 where rows are multiples of 64",
        Encoding::Q6K => "use q8_0 where rows are multiples of 32",
        _ => "use f16",
    };
    let why = format!("rows have {cols} columns, not a multiple of {}: {advice}", encoding.block_len());
    ModelError::CannotEncode { name: planned.name.clone(), encoding: encoding.to_string(), why }
}

/// Heads of a tensor whose rows rotate.
fn heads(config: &ModelConfig, name: &str) -> Option<usize> {
    match name.split('.').rev().collect::<Vec<_>>()[..] {
        ["weight" | "bias", "q_proj", ..] => Some(config.heads),
        ["weight" | "bias", "k_proj", ..] => Some(config.kv_heads),
        _ => None,
    }
}

fn general(job: &Job, output: &Path, items: &[Item], metadata: &mut Metadata) {
    const OURS: [&str; 4] =
        ["general.architecture", "general.file_type", "general.quantization_version", "general.alignment"];
    // What a model says about itself (name, licence, authors) goes along.
    for (key, value) in job.file.gguf_metadata().into_iter().flat_map(Metadata::iter) {
        if key.starts_with("general.") && !OURS.contains(&key) {
            metadata.insert(key, value.clone());
        }
    }
    if metadata.get("general.name").is_none() {
        let path = job.file.path();
        let named = if path.is_dir() { path.file_name() } else { path.file_stem() };
        let name = named.or(output.file_stem()).map_or("model".into(), |n| n.to_string_lossy());
        metadata.insert("general.name", Value::String(name.into_owned()));
    }
    // The type of the linear layers, in the numbering of llama.cpp and, for I2_S, bitnet.cpp.
    let linear = items.iter().find(|i| {
        let first = i.part.planned().first().map(|&n| &job.planned[n]);
        first.is_some_and(|p| p.is_block_linear() && (p.ternary || !job.is_ternary()))
    });
    let file_type = match linear.map(|i| &i.spec.encoding) {
        Some(Encoding::F16) => 1,
        Some(Encoding::Q4_0) => 2,
        Some(Encoding::Q8_0) => 7,
        Some(Encoding::Q6K) => 18,
        Some(Encoding::BF16) => 32,
        Some(Encoding::TQ1_0) => 36,
        Some(Encoding::TQ2_0) => 37,
        Some(Encoding::Q1_0) => 40,
        Some(Encoding::Q2_0G64 | Encoding::Q2_0G128) => 41,
        Some(Encoding::PQ2_0) => 141,
        Some(Encoding::PTQ1_0) => 143,
        Some(Encoding::I2S) => 40,
        _ => 0,
    };
    metadata.insert("general.file_type", Value::U32(file_type));
    metadata.insert("general.quantization_version", Value::U32(2));
}

fn tokenizer(job: &Job, metadata: &mut Metadata, notes: &mut Vec<String>) -> Result<bool, ModelError> {
    let options = job.options;
    let own;
    let tokenizer = match (options.tokenizer, job.file.gguf_metadata()) {
        _ if options.without_tokenizer => None,
        (Some(given), _) => Some(given),
        // From GGUF to GGUF the keys are the same, known or not.
        (None, Some(source)) if source.get("tokenizer.ggml.model").is_some() => {
            for (key, value) in source.iter().filter(|(key, _)| key.starts_with("tokenizer.")) {
                metadata.insert(key, value.clone());
            }
            return Ok(true);
        }
        (None, _) => match Tokenizer::of(job.file) {
            Ok(found) => {
                own = found;
                Some(&own)
            }
            Err(ModelError::Unsupported { .. }) => None,
            Err(error) => return Err(error),
        },
    };
    match tokenizer {
        Some(tokenizer) => {
            for (key, value) in tokenizer.gguf_entries()? {
                let value = padded(&key, value, job.config.vocab_size)?;
                metadata.insert(key, value);
            }
        }
        None => notes.push("there is no tokenizer in it".into()),
    }
    token_ids(job, tokenizer, metadata)?;
    Ok(tokenizer.is_some())
}

/// Readers expect as many tokens as the embedding has rows; models often have more rows than tokens.
fn padded(key: &str, value: Value, vocab_size: usize) -> Result<Value, ModelError> {
    const UNUSED: i32 = 5;
    let Value::Array(array) = value else { return Ok(value) };
    let array = match (key, array) {
        ("tokenizer.ggml.tokens", Array::String(mut tokens)) => {
            if tokens.len() > vocab_size {
                let what = format!(
                    "it has {} entries, but the model's embedding has {vocab_size} rows, so it belongs to another model",
                    tokens.len()
                );
                return Err(ModelError::Tokenizer { what });
            }
            tokens.extend((tokens.len()..vocab_size).map(|id| format!("[PAD{id}]")));
            Array::String(tokens)
        }
        ("tokenizer.ggml.token_type", Array::I32(mut types)) => {
            types.resize(vocab_size, UNUSED);
            Array::I32(types)
        }
        ("tokenizer.ggml.scores", Array::F32(mut scores)) => {
            // Never merged: below every real piece.
            scores.resize(vocab_size, -1e6);
            Array::F32(scores)
        }
        (_, other) => other,
    };
    Ok(Value::Array(array))
}

/// The ids that the model's own files name and the tokenizer's keys do not yet.
fn token_ids(job: &Job, tokenizer: Option<&Tokenizer>, metadata: &mut Metadata) -> Result<(), ModelError> {
    const BOS: &str = "tokenizer.ggml.bos_token_id";
    if let (None, Some(id)) = (metadata.get(BOS), job.config.bos) {
        metadata.insert(BOS, Value::U32(id));
    }
    let mut ends: Vec<u32> = job.config.eos.clone();
    ends.extend(tokenizer.map_or(&[][..], Tokenizer::eos_ids));
    let keys = ["eos_token_id", "eot_token_id", "eom_token_id"].map(|key| format!("tokenizer.ggml.{key}"));
    let mut written: Vec<u32> = Vec::new();
    for id in &keys {
        written.extend(metadata.u64(id)?.and_then(|id| u32::try_from(id).ok()));
    }
    for id in ends {
        if written.contains(&id) {
            continue;
        }
        if let Some(key) = keys.iter().find(|key| metadata.get(key).is_none()) {
            metadata.insert(key.clone(), Value::U32(id));
            written.push(id);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vocabularies_are_padded_to_the_embedding_and_larger_ones_refused() {
        let tokens = || Value::Array(Array::String(vec!["a".into(), "b".into()]));
        let Value::Array(Array::String(found)) = padded("tokenizer.ggml.tokens", tokens(), 3).unwrap() else {
            panic!("still strings")
        };
        assert_eq!(found, ["a", "b", "[PAD2]"]);
        let error = padded("tokenizer.ggml.tokens", tokens(), 1).unwrap_err().to_string();
        assert!(error.contains("2 entries") && error.contains("1 rows"), "{error}");
    }

    #[test]
    fn only_the_rotated_projections_are_interleaved() {
        let config = ModelConfig::fresh(
            &crate::config::Shape {
                vocab_size: 8,
                hidden_size: 8,
                intermediate_size: 8,
                num_layers: 1,
                heads: 4,
                kv_heads: 2,
                max_positions: 8,
                rope_theta: 1e4,
                tied: true,
                sub_norms: false,
                activation: crate::config::Activation::Silu,
            },
            false,
        )
        .unwrap();
        let heads = |name: &str| heads(&config, &format!("model.layers.0.self_attn.{name}"));
        assert_eq!([heads("q_proj.weight"), heads("k_proj.bias")], [Some(4), Some(2)]);
        assert_eq!([heads("v_proj.weight"), heads("q_proj.rms_norm.weight")], [None, None]);
    }
}
