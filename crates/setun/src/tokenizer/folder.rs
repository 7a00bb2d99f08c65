//! A model folder in Hugging Face's layout: the tokenizer and the files that complete it.

use super::{Tokenizer, in_file};
use crate::error::ModelError;
use serde_json::Value as Json;
use std::path::Path;

pub(super) fn read(folder: &Path) -> Result<Tokenizer, ModelError> {
    let (json, model) = (folder.join("tokenizer.json"), folder.join("tokenizer.model"));
    let mut tokenizer = if json.exists() || !model.exists() {
        Tokenizer::from_json_file(&json)?
    } else {
        let bytes = std::fs::read(&model).map_err(|source| ModelError::read(&model, source))?;
        Tokenizer::from_sentencepiece(&bytes).map_err(|error| in_file(&model, error))?
    };
    let config = optional_json(&folder.join("tokenizer_config.json"))?;
    let generation = optional_json(&folder.join("generation_config.json"))?;
    let shape = optional_json(&folder.join("config.json"))?;

    let named = |key: &str| {
        let value = &config[key];
        value.as_str().or_else(|| value["content"].as_str()).and_then(|text| tokenizer.token_to_id(text))
    };
    let (bos, eos) = (named("bos_token"), named("eos_token"));
    let numbered = |key: &str| -> Vec<u32> {
        let ids = [&generation[key], &shape[key]].into_iter().flat_map(|value| match value {
            Json::Array(ids) => ids.clone(),
            one => vec![one.clone()],
        });
        let in_vocabulary = |id: &u32| (*id as usize) < tokenizer.vocab_size();
        ids.filter_map(|id| u32::try_from(id.as_u64()?).ok()).filter(in_vocabulary).collect()
    };
    let (bos_ids, eos_ids) = (numbered("bos_token_id"), numbered("eos_token_id"));
    tokenizer.bos = bos.or(tokenizer.bos).or(bos_ids.first().copied());

    // What the files declare comes first, then what was found in the vocabulary.
    let mut ends = Vec::new();
    for id in eos.into_iter().chain(eos_ids).chain(std::mem::take(&mut tokenizer.eos)) {
        if !ends.contains(&id) {
            ends.push(id);
        }
    }
    tokenizer.eos = ends;

    // Without a post-processor the two switches decide; with one, it has the word.
    if tokenizer.before.is_empty() && tokenizer.after.is_empty() {
        if config["add_bos_token"] == true {
            tokenizer.before.extend(tokenizer.bos);
        }
        if config["add_eos_token"] == true {
            tokenizer.after.extend(tokenizer.eos.first());
        }
    }
    let template = folder.join("chat_template.jinja");
    tokenizer.chat_template = if template.exists() {
        Some(std::fs::read_to_string(&template).map_err(|source| ModelError::read(&template, source))?)
    } else {
        chat_template(&config["chat_template"])
    };
    Ok(tokenizer)
}

/// A template, or the one named `default` of several.
fn chat_template(value: &Json) -> Option<String> {
    let named = value.as_array().into_iter().flatten().find(|entry| entry["name"] == "default");
    value.as_str().or_else(|| named?["template"].as_str()).map(str::to_owned)
}

/// A file that may be absent (then null), but not damaged.
fn optional_json(path: &Path) -> Result<Json, ModelError> {
    match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map_err(|error| ModelError::format(path, format!("not valid JSON: {error}"))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Json::Null),
        Err(source) => Err(ModelError::read(path, source)),
    }
}
