//! GGUF: names, row order, types and metadata, and the models that its keys cannot describe.

use std::collections::HashMap;
use std::path::Path;

use setun_kernels::matrix::Scales;

use super::encode::{cannot, read_ternary};
use super::losses::GGUF_KEY;
use super::plan::{Item, Part, Planned};
use super::{Job, Prepared};
use crate::config::{ActivationType, ModelConfig, gguf_activations};
use crate::error::ModelError;
use crate::format::gguf::{Array, Metadata, Value};
use crate::format::{Encoding, ScaleConvention, TensorSpec};
use crate::recommended::Recommended;
use crate::tokenizer::Tokenizer;
use crate::weights::{experts, gguf_name_in, vector_shape};

/// The header, and the tensors in the order of the file.
pub(super) fn prepare(job: &Job, output: &Path) -> Result<(Metadata, Prepared), ModelError> {
    let (mut losses, mut notes) = (Vec::new(), Vec::new());
    check(job, &mut losses)?;
    let keys = job.config.to_gguf()?;
    let items = items(job)?;
    check_activations(job, &items, &mut losses)?;
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
    let tokenizer = tokenizer(job, &mut metadata, &mut losses, &mut notes)?;
    let scales = ScaleConvention::Multiply;
    let losses = job.all_losses(&items, scales, losses)?;
    if !losses.is_empty() {
        metadata.insert(GGUF_KEY, Value::Array(Array::String(losses.clone())));
    }
    Ok((metadata, Prepared { items, scales, tokenizer, losses, notes }))
}

/// Readers of GGUF tell from the types what layers are multiplied with, so some types would change that.
fn check_activations(job: &Job, items: &[Item], losses: &mut Vec<String>) -> Result<(), ModelError> {
    let Some(first) = job.planned.iter().find(|p| p.is_block_linear() && p.ternary) else { return Ok(()) };
    let in_blocks = items.iter().filter(|item| item.spec.name.starts_with("blk."));
    let types: Vec<&Encoding> =
        in_blocks.map(|item| &item.spec.encoding).filter(|encoding| encoding.is_ternary()).collect();
    let several = || {
        let matrix = first.role.map(|role| read_ternary(job, first, role));
        matches!(matrix, Some(Ok(matrix)) if !matches!(matrix.scales(), Scales::Tensor(_)))
    };
    let rotated = job.config.rotation.is_some();
    let found = gguf_activations(job.config.family, &types, rotated, several);
    let (found, defined) = (found.unwrap_or(ActivationType::Float), job.config.activations());
    if found == defined {
        return Ok(());
    }
    let name = gguf_name_in(job.config.hybrid.is_some(), &first.name);
    let written = items.iter().find(|item| item.spec.name == name);
    let encoding = written.map_or("GGUF", |item| item.spec.encoding.name());
    let advice = match defined {
        ActivationType::Int8 | ActivationType::Int4 => "i2_s, or tq1_0 or tq2_0 outside Qwen3",
        ActivationType::Float => "q2_0, pq2_0 or ptq1_0, tq1_0 or tq2_0 in Qwen3, or f16",
    };
    job.lose(losses, format!("{defined} activations: readers multiply these layers with {found} ones"), || {
        let why = format!(
            "readers of GGUF would multiply it with {found} activations, but the model defines {defined} ones: use {advice}, \
             or accept that (--allow-loss)"
        );
        cannot(first, encoding, why)
    })
}

/// Models whose layers GGUF would describe wrongly.
fn check(job: &Job, losses: &mut Vec<String>) -> Result<(), ModelError> {
    let refuse = |planned: &Planned, why: &str| {
        let encoding = "part of a GGUF model".to_owned();
        Err(ModelError::CannotEncode { name: planned.name.clone(), encoding, why: why.into() })
    };
    let drafts = job.config.hybrid.as_ref().map_or(0, |hybrid| hybrid.draft_layers);
    if drafts > 0 {
        let what = format!("blocks that only draft tokens (nextn_predict_layers: {drafts}), left out");
        job.lose(losses, what, || ModelError::ConfigValue {
            field: "nextn_predict_layers".into(),
            found: "blocks that only draft tokens".into(),
            expected: "0, since they would be left out: allow it (--allow-loss)".into(),
        })?;
    }
    for planned in job.planned {
        if planned.ternary && !planned.is_block_linear() && !job.is_weight_only() {
            return refuse(
                planned,
                "it is ternary, but readers of GGUF take the output head for floating point",
            );
        }
        let rounding = matches!(job.options.linear_type, Some(Encoding::Q6K | Encoding::Q4_0));
        if planned.ternary && planned.is_block_linear() && job.config.sub_norms && rounding {
            return refuse(
                planned,
                "readers of GGUF's BitNet architectures expect ternary values, which q6_k and q4_0 do not keep: use i2_s, tq1_0, \
                 tq2_0, f32, f16, bf16 or q8_0",
            );
        }
        let ternary = |encoding: &Encoding| encoding.is_ternary();
        if planned.ternary
            && job.config.inner_norm_eps.is_some()
            && !job.options.linear_type.as_ref().is_none_or(ternary)
        {
            return refuse(
                planned,
                "readers look for the extra norm inside it beside ternary types alone: use i2_s, tq1_0 or tq2_0",
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

fn items(job: &Job) -> Result<Vec<Item>, ModelError> {
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
            (Some(_), true) => match ternary_type(job, planned) {
                Some(encoding) => encoding,
                None => job.float_type(planned),
            },
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
                    items.push(first_expert(job, name, index, planned, encoding)?);
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
        // Blocks of floats have no other form that keeps them as small, so they go along as they are.
        let same = is_verbatim(job, planned, &spec.encoding);
        items.push(match same {
            true => Item { spec, part: Part::Verbatim(vec![index]), interleave: None },
            false => Item { spec, part: Part::Tensor(index), interleave },
        });
    }
    Ok(items)
}

/// Whether the bytes of a GGUF file are those of the output: floats that keep their type. Experts that are stacked there
/// have one type, and then so has their stack here.
fn is_verbatim(job: &Job, planned: &Planned, encoding: &Encoding) -> bool {
    let floats = planned.role.is_some() && !planned.ternary;
    job.file.gguf_metadata().is_some() && floats && *encoding == planned.stored
}

/// The stack of which `planned` is the first matrix.
fn first_expert(
    job: &Job,
    stored: String,
    index: usize,
    planned: &Planned,
    encoding: Encoding,
) -> Result<Item, ModelError> {
    if encoding == Encoding::I2S {
        let why = "I2_S has one scale for a tensor, but a stack of experts has one for each: use --to hf, or, where activations                    are float or may become it (--allow-loss), tq1_0, tq2_0, q2_0, pq2_0 or ptq1_0";
        return Err(cannot(planned, encoding.name(), why.into()));
    }
    let part = match is_verbatim(job, planned, &encoding) {
        true => Part::Verbatim(vec![index]),
        false => Part::Stack(vec![index]),
    };
    let shape = vec![1, planned.shape[0], planned.shape[1]];
    Ok(Item { spec: TensorSpec { name: stored, shape, encoding }, part, interleave: None })
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
            return Err(cannot(planned, encoding.name(), why));
        }
        stack.spec.encoding = Encoding::F32;
    }
    stack.spec.shape[0] += 1;
    if let Part::Stack(indices) | Part::Verbatim(indices) = &mut stack.part {
        indices.push(index);
    }
    Ok(())
}

/// The ternary type of a ternary matrix; `None` where it becomes floats.
fn ternary_type(job: &Job, planned: &Planned) -> Option<Encoding> {
    let linear = job.options.linear_type.as_ref();
    if planned.is_block_linear() {
        // I2_S says that activations are rounded, which weight-only models do not do.
        let own = || match job.is_weight_only() {
            true => own_ternary(planned),
            false => Some(Encoding::I2S),
        };
        return linear.cloned().or_else(own).filter(Encoding::is_ternary);
    }
    if planned.is_router() || job.options.embedding_type.is_some() {
        return None;
    }
    match linear {
        // Where embedding and head are ternary too, one type is meant for all; but readers of I2_S expect floats there.
        Some(Encoding::I2S) => None,
        Some(asked) => Some(asked.clone()).filter(Encoding::is_ternary),
        None => own_ternary(planned),
    }
}

/// The type of a weight-only ternary matrix that was not asked for another: its own where that is written. Ternary values
/// in another container go into the smallest groups, which hold every larger one; rows that are no whole groups, into none.
fn own_ternary(planned: &Planned) -> Option<Encoding> {
    let cols = planned.shape[1];
    match &planned.stored {
        Encoding::Q1_0 => Some(Encoding::PQ2_0),
        own if own.is_ternary() && own.block().is_some() => Some(own.clone()),
        _ => Some(Encoding::Q2_0G64).filter(|groups| cols.is_multiple_of(groups.block_len())),
    }
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
    // What a model says about itself (name, licence, authors) goes along, and keys that are nobody's here.
    for (key, value) in job.file.gguf_metadata().into_iter().flat_map(Metadata::iter) {
        let group = key.split('.').next().unwrap_or(key);
        let handled = ["tokenizer", "prism", "setun", "split", "quantize"].contains(&group);
        let own = job.file.gguf_metadata().and_then(|m| m.str("general.architecture").ok().flatten())
            == Some(group);
        if !OURS.contains(&key) && !handled && !own {
            metadata.insert(key, value.clone());
        }
    }
    for (key, value) in job.file.header_metadata().iter().filter(|(key, _)| key.starts_with("general.")) {
        if !OURS.contains(&key.as_str()) {
            metadata.insert(key.clone(), Value::String(value.clone()));
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
        Some(Encoding::Q4_1) => 3,
        Some(Encoding::Q8_0) => 7,
        Some(Encoding::Q5_0) => 8,
        Some(Encoding::Q5_1) => 9,
        Some(Encoding::Q2K) => 10,
        Some(Encoding::Q3K) => 12,
        Some(Encoding::Q4K) => 15,
        Some(Encoding::Q5K) => 17,
        Some(Encoding::Q6K) => 18,
        Some(Encoding::IQ4NL) => 25,
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

fn tokenizer(
    job: &Job,
    metadata: &mut Metadata,
    losses: &mut Vec<String>,
    notes: &mut Vec<String>,
) -> Result<bool, ModelError> {
    let options = job.options;
    losses.extend(job.tokenizer_left_out());
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
            let (tokens, rows) = (tokenizer.vocab_size(), job.config.vocab_size);
            if tokens > rows {
                let what = format!(
                    "it has {tokens} entries, but the model's embedding has {rows} rows, so it belongs to another model"
                );
                return Err(ModelError::Tokenizer { what });
            }
            for (key, value) in tokenizer.gguf_entries()? {
                let value = padded(&key, value, job.config.vocab_size);
                metadata.insert(key, value);
            }
        }
        None => notes.push("there is no tokenizer in it".into()),
    }
    token_ids(job, tokenizer, metadata, losses)?;
    Ok(tokenizer.is_some())
}

/// Readers expect as many tokens as the embedding has rows; models often have more rows than tokens.
fn padded(key: &str, value: Value, vocab_size: usize) -> Value {
    const UNUSED: i32 = 5;
    let Value::Array(array) = value else { return value };
    let array = match (key, array) {
        ("tokenizer.ggml.tokens", Array::String(mut tokens)) => {
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
    Value::Array(array)
}

/// The ids that the model's own files name and the tokenizer's keys do not yet.
fn token_ids(
    job: &Job,
    tokenizer: Option<&Tokenizer>,
    metadata: &mut Metadata,
    losses: &mut Vec<String>,
) -> Result<(), ModelError> {
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
    let mut homeless = Vec::new();
    for id in ends {
        if written.contains(&id) {
            continue;
        }
        written.push(id);
        match keys.iter().find(|key| metadata.get(key).is_none()) {
            Some(key) => {
                metadata.insert(key.clone(), Value::U32(id));
            }
            // Those that readers find by their names need no key.
            None if job.config.eos.contains(&id) => homeless.push(id),
            None => {}
        }
    }
    if homeless.is_empty() {
        return Ok(());
    }
    job.lose(losses, format!("end tokens: GGUF has no key for the ids {homeless:?}"), || {
        ModelError::ConfigValue {
            field: "eos_token_id".into(),
            found: format!("{} ids", job.config.eos.len()),
            expected: "at most 3, for which GGUF has keys: leave some out, or accept that (--allow-loss)"
                .into(),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vocabularies_are_padded_to_the_embedding() {
        let tokens = || Value::Array(Array::String(vec!["a".into(), "b".into()]));
        let Value::Array(Array::String(found)) = padded("tokenizer.ggml.tokens", tokens(), 3) else {
            panic!("still strings")
        };
        assert_eq!(found, ["a", "b", "[PAD2]"]);
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
