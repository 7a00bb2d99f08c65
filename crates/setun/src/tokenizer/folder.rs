//! A model folder in Hugging Face's layout: the tokenizer and the files that complete it.

use super::ends::Ends;
use super::templates::Templates;
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
    let map = optional_json(&folder.join("special_tokens_map.json"))?;

    let named = |file: &Json, key: &str| {
        let value = &file[key];
        value.as_str().or_else(|| value["content"].as_str()).and_then(|text| tokenizer.token_to_id(text))
    };
    let numbered = |file: &Json, key: &str| -> Vec<u32> {
        let ids = file[key].as_array().map_or(std::slice::from_ref(&file[key]), Vec::as_slice);
        let in_vocabulary = |id: &u32| (*id as usize) < tokenizer.vocab_size();
        ids.iter().filter_map(|id| u32::try_from(id.as_u64()?).ok()).filter(in_vocabulary).collect()
    };
    let bos_ids = [&generation, &shape].map(|file| numbered(file, "bos_token_id"));
    let bos = named(&config, "bos_token").or_else(|| named(&map, "bos_token"));
    let bos = bos.or(tokenizer.bos).or(bos_ids.concat().first().copied());

    // What the files declare comes first, then what was found in the vocabulary.
    let mut ends = Ends::of(named(&config, "eos_token"), "tokenizer_config.json: eos_token");
    ends.extend(named(&map, "eos_token"), "special_tokens_map.json: eos_token");
    ends.extend(numbered(&generation, "eos_token_id"), "generation_config.json: eos_token_id");
    ends.extend(numbered(&shape, "eos_token_id"), "config.json: eos_token_id");
    ends.append(&tokenizer.ends);
    (tokenizer.bos, tokenizer.ends) = (bos, ends);

    // Without a post-processor the two switches decide; with one, it has the word.
    if tokenizer.before.is_empty() && tokenizer.after.is_empty() {
        if config["add_bos_token"] == true {
            tokenizer.before.extend(tokenizer.bos);
        }
        if config["add_eos_token"] == true {
            tokenizer.after.extend(tokenizer.ends.first());
        }
    }
    tokenizer.templates = Templates::of_folder(folder, &config)?;
    Ok(tokenizer)
}

/// A file that may be absent (then null), but not damaged.
pub(super) fn optional_json(path: &Path) -> Result<Json, ModelError> {
    match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map_err(|error| ModelError::format(path, format!("not valid JSON: {error}"))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Json::Null),
        Err(source) => Err(ModelError::read(path, source)),
    }
}
