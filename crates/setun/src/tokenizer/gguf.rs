//! Vocabularies in GGUF metadata: reading `tokenizer.ggml.*`, and writing it.

use super::ends::Ends;
use super::hf::{self, Added};
use super::pre::{self, Pre};
use super::spm::{Algorithm, Charsmap, Kind, Piece, Rules, SPACE, Spm};
use super::templates::Templates;
use super::{Engine, Tokenizer, refused};
use crate::error::ModelError;
use crate::format::gguf::metadata::required;
use crate::format::gguf::{Array, Metadata, Value};
use serde_json::{Value as Json, json};
use std::collections::HashSet;
use tokenizers::models::bpe::Vocab;

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const SCORES: &str = "tokenizer.ggml.scores";
const TYPES: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";
const BOS: &str = "tokenizer.ggml.bos_token_id";
const EOS: &str = "tokenizer.ggml.eos_token_id";
const UNKNOWN: &str = "tokenizer.ggml.unknown_token_id";
const ADD_BOS: &str = "tokenizer.ggml.add_bos_token";
const ADD_EOS: &str = "tokenizer.ggml.add_eos_token";
const ADD_SPACE_PREFIX: &str = "tokenizer.ggml.add_space_prefix";
const REMOVE_WHITESPACES: &str = "tokenizer.ggml.remove_extra_whitespaces";
const CHARSMAP: &str = "tokenizer.ggml.precompiled_charsmap";
/// Other tokens that end generation: end of turn, of message, of text; one id or a list.
const MORE_ENDS: [&str; 5] = [
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.eom_token_id",
    "tokenizer.ggml.eog_token_id",
    "tokenizer.ggml.eog_token_ids",
    "tokenizer.ggml.eos_token_ids",
];

pub(super) fn read(metadata: &Metadata) -> Result<Tokenizer, ModelError> {
    let model = required(MODEL, metadata.str(MODEL)?)?;
    let vocabulary = match model {
        "gpt2" | "llama" | "bert" | "t5" => Vocabulary::read(metadata)?,
        "none" => {
            return Err(refused("the file says it has none (tokenizer.ggml.model is `none`)"));
        }
        other => {
            let what = format!("tokenizer.ggml.model is `{other}`, but gpt2, llama, bert and t5 are read");
            return Err(refused(what));
        }
    };
    let mut tokenizer = match model {
        "gpt2" => byte_level(metadata, &vocabulary)?,
        "bert" => word_piece(metadata, &vocabulary)?,
        "llama" => sentence_piece(metadata, vocabulary, Algorithm::Bpe)?,
        _ => sentence_piece(metadata, vocabulary, Algorithm::Unigram)?,
    };
    for key in MORE_ENDS {
        let ids = match metadata.get(key).and_then(Value::as_array) {
            Some(ids) => ids.to_i64s().unwrap_or_default(),
            None => token_id(metadata, key, tokenizer.vocab_size)?.map(i64::from).into_iter().collect(),
        };
        let within = ids.into_iter().filter_map(|id| u32::try_from(id).ok());
        tokenizer.ends.extend(within.filter(|&id| (id as usize) < tokenizer.vocab_size), key);
    }
    tokenizer.add_known_ends();
    tokenizer.templates = Templates::of_gguf(metadata)?;
    Ok(tokenizer)
}

/// The arrays, checked to be of one length.
struct Vocabulary {
    tokens: Vec<String>,
    scores: Option<Vec<f32>>,
    kinds: Option<Vec<Kind>>,
}

impl Vocabulary {
    fn read(metadata: &Metadata) -> Result<Self, ModelError> {
        let wrong = |key: &str, what: String| ModelError::Metadata { key: key.to_owned(), what };
        let tokens = required(TOKENS, metadata.array(TOKENS)?)?;
        let tokens = tokens
            .as_strings()
            .ok_or_else(|| wrong(TOKENS, "is not an array of strings".to_owned()))?
            .to_vec();
        if tokens.is_empty() {
            return Err(wrong(TOKENS, "is empty".to_owned()));
        }
        let same_length = |key: &str, length: usize| {
            if length == tokens.len() {
                return Ok(());
            }
            Err(wrong(key, format!("has {length} entries, but there are {} tokens", tokens.len())))
        };
        let scores = metadata.array(SCORES)?.map(|array| {
            same_length(SCORES, array.len())?;
            array.to_f32s().ok_or_else(|| wrong(SCORES, "is not an array of floats".to_owned()))
        });
        let kinds = metadata.array(TYPES)?.map(|array| {
            same_length(TYPES, array.len())?;
            let numbers = array.to_i64s();
            let numbers = numbers.ok_or_else(|| wrong(TYPES, "is not an array of integers".to_owned()))?;
            let kind = |(index, number): (usize, &i64)| {
                // 0 ("undefined") is what some writers give every token.
                let kind = if *number == 0 { Some(Kind::Normal) } else { Kind::from_number(*number) };
                kind.ok_or_else(|| {
                    wrong(TYPES, format!("has the value {number} at {index}; 1 to 6 are known"))
                })
            };
            numbers.iter().enumerate().map(kind).collect::<Result<Vec<_>, _>>()
        });
        Ok(Self { scores: scores.transpose()?, kinds: kinds.transpose()?, tokens })
    }

    fn kind(&self, id: usize) -> Kind {
        self.kinds.as_ref().map_or(Kind::Normal, |kinds| kinds[id])
    }

    /// Control and user-defined tokens, which are matched before anything else.
    fn added(&self) -> Vec<Added> {
        let all = self.tokens.iter().enumerate();
        all.filter_map(|(id, text)| {
            let kind = self.kind(id);
            let special = kind == Kind::Control;
            (special || kind == Kind::UserDefined).then(|| Added { text: text.clone(), special })
        })
        .collect()
    }
}

fn token_id(metadata: &Metadata, key: &str, vocab_size: usize) -> Result<Option<u32>, ModelError> {
    // Writers put -1 or 2^32 - 1 where there is no such token.
    let Some(id) = metadata.get(key).and_then(Value::as_u64) else {
        return Ok(None);
    };
    if id == u64::from(u32::MAX) {
        return Ok(None);
    }
    match u32::try_from(id) {
        Ok(id) if (id as usize) < vocab_size => Ok(Some(id)),
        _ => {
            let what = format!("is {id}, but the vocabulary has {vocab_size} tokens");
            Err(ModelError::Metadata { key: key.to_owned(), what })
        }
    }
}

/// BOS, EOS and whether they are added.
fn set_ends(
    tokenizer: &mut Tokenizer,
    metadata: &Metadata,
    defaults: (bool, bool),
) -> Result<(), ModelError> {
    tokenizer.bos = token_id(metadata, BOS, tokenizer.vocab_size)?.or(tokenizer.bos);
    let eos = token_id(metadata, EOS, tokenizer.vocab_size)?;
    let mut ends = Ends::of(eos, EOS);
    ends.append(&tokenizer.ends);
    tokenizer.ends = ends;
    let before = metadata.bool(ADD_BOS)?.unwrap_or(defaults.0);
    let after = metadata.bool(ADD_EOS)?.unwrap_or(defaults.1);
    tokenizer.before = tokenizer.bos.filter(|_| before).into_iter().collect();
    tokenizer.after = tokenizer.ends.first().filter(|_| after).into_iter().collect();
    Ok(())
}

fn byte_level(metadata: &Metadata, vocabulary: &Vocabulary) -> Result<Tokenizer, ModelError> {
    let pre = match metadata.str(PRE)? {
        Some(name) => Pre::named(name).ok_or_else(|| {
            let known = Pre::known_names();
            refused(format!("the split rules `{name}` (tokenizer.ggml.pre) are not known; known are {known}"))
        })?,
        // bitnet.cpp's converters write no `pre` for the Llama-3 vocabulary.
        None if vocabulary.tokens.iter().any(|token| token == "<|begin_of_text|>") => {
            Pre::named("llama-bpe").ok_or_else(|| refused("no rules for llama-bpe"))?
        }
        None => {
            let what = "tokenizer.ggml.pre is missing, and without it a byte-level vocabulary cannot be used \
                        exactly; write the key, for example with `gpt-2`";
            return Err(refused(what));
        }
    };
    let mut vocab = Vocab::default();
    for (id, token) in (0u32..).zip(&vocabulary.tokens) {
        vocab.entry(token.clone()).or_insert(id);
    }
    let merges = required(MERGES, metadata.array(MERGES)?)?;
    let merges = merges.as_strings().ok_or_else(|| ModelError::Metadata {
        key: MERGES.to_owned(),
        what: "is not an array of strings".to_owned(),
    })?;
    let mut pairs = Vec::with_capacity(merges.len());
    for (index, merge) in merges.iter().enumerate() {
        let broken = |what: &str| ModelError::Metadata {
            key: MERGES.to_owned(),
            what: format!("has `{merge}` at {index}, {what}"),
        };
        let (left, right) = merge.split_once(' ').ok_or_else(|| broken("which is not `left right`"))?;
        for part in [left, right, &[left, right].concat()] {
            if !vocab.contains_key(part) {
                return Err(broken(&format!("but `{part}` is not a token")));
            }
        }
        pairs.push((left.to_owned(), right.to_owned()));
    }
    let inner = hf::byte_level_bpe(vocab, pairs, pre, vocabulary.added())?;
    let mut tokenizer = hf::wrap(inner)?;
    tokenizer.vocab_size = vocabulary.tokens.len();
    set_ends(&mut tokenizer, metadata, (pre.add_bos, false))?;
    Ok(tokenizer)
}

/// WordPiece as llama.cpp stores it: `▁` before pieces that start a word, nothing before the others.
fn word_piece(metadata: &Metadata, vocabulary: &Vocabulary) -> Result<Tokenizer, ModelError> {
    let mut vocab = serde_json::Map::new();
    for (id, token) in vocabulary.tokens.iter().enumerate() {
        let bracketed = token.starts_with('[') && token.ends_with(']');
        let spelled = match token.strip_prefix(SPACE) {
            Some(word) => word.to_owned(),
            None if bracketed || vocabulary.kind(id) == Kind::Control => token.clone(),
            None => format!("##{token}"),
        };
        vocab.entry(spelled).or_insert(json!(id));
    }
    let size = vocabulary.tokens.len();
    let spelled = |id: Option<u32>| id.map(|id| vocabulary.tokens[id as usize].clone());
    let unknown = spelled(token_id(metadata, UNKNOWN, size)?).unwrap_or_else(|| "[UNK]".to_owned());
    if !vocab.contains_key(&unknown) {
        return Err(refused(format!("the vocabulary lacks its unknown token `{unknown}`")));
    }
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
            "strip_accents": true, "lowercase": true},
        "pre_tokenizer": {"type": "BertPreTokenizer"}, "post_processor": null,
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": unknown, "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": vocab},
    });
    let mut inner = hf::from_value(&json)?;
    hf::add_tokens(&mut inner, vocabulary.added())?;
    let mut tokenizer = hf::wrap(inner)?;
    tokenizer.vocab_size = size;
    let id = |key: &str, name: &str| -> Result<Option<u32>, ModelError> {
        Ok(token_id(metadata, key, size)?.or_else(|| tokenizer.token_to_id(name)))
    };
    let cls = id("tokenizer.ggml.cls_token_id", "[CLS]")?.or(token_id(metadata, BOS, size)?);
    let sep = id("tokenizer.ggml.seperator_token_id", "[SEP]")?.or(token_id(metadata, EOS, size)?);
    tokenizer.bos = cls;
    tokenizer.ends = Ends::of(sep, "the separator");
    tokenizer.before = cls.into_iter().collect();
    tokenizer.after = sep.into_iter().collect();
    Ok(tokenizer)
}

fn sentence_piece(
    metadata: &Metadata,
    vocabulary: Vocabulary,
    algorithm: Algorithm,
) -> Result<Tokenizer, ModelError> {
    let scores = vocabulary.scores.clone();
    let scores = required(SCORES, scores)?;
    let kinds: Vec<Kind> = (0..scores.len()).map(|id| vocabulary.kind(id)).collect();
    let pieces: Vec<Piece> = vocabulary
        .tokens
        .into_iter()
        .zip(scores.into_iter().zip(kinds))
        .map(|(text, (score, kind))| Piece { text, score, kind })
        .collect();
    let size = pieces.len();
    // llama.cpp's defaults when a key is missing.
    let control = |id: u32| pieces.get(id as usize).filter(|p| p.kind == Kind::Control).map(|_| id);
    let bpe = algorithm == Algorithm::Bpe;
    let bos = token_id(metadata, BOS, size)?.or_else(|| control(1).filter(|_| bpe));
    let eos = token_id(metadata, EOS, size)?.or_else(|| control(if bpe { 2 } else { 1 }));
    let found = pieces.iter().position(|piece| piece.kind == Kind::Unknown).map(|id| id as u32);
    let charsmap = match metadata.array(CHARSMAP)? {
        Some(Array::U8(bytes)) => Some(Charsmap::new(bytes)?),
        Some(Array::I8(bytes)) => {
            let bytes: Vec<u8> = bytes.iter().map(|&byte| byte as u8).collect();
            Some(Charsmap::new(&bytes)?)
        }
        Some(_) => {
            let what = "is not an array of bytes".to_owned();
            return Err(ModelError::Metadata { key: CHARSMAP.to_owned(), what });
        }
        None => None,
    };
    let rules = Rules {
        algorithm,
        add_prefix: metadata.bool(ADD_SPACE_PREFIX)?.unwrap_or(true),
        remove_extra_whitespaces: metadata.bool(REMOVE_WHITESPACES)?.unwrap_or(false),
        escape_whitespaces: true,
        charsmap,
        inline_user_defined: !bpe,
        unknown: token_id(metadata, UNKNOWN, size)?.or(found),
    };
    let spm = Spm::new(pieces, rules, bos, eos)?;
    let mut tokenizer = Tokenizer::from_spm(spm, Vec::new(), Vec::new());
    set_ends(&mut tokenizer, metadata, (bpe, !bpe))?;
    Ok(tokenizer)
}

pub(super) fn write(tokenizer: &Tokenizer) -> Result<Vec<(String, Value)>, ModelError> {
    let mut entries = Vec::new();
    let mut put = |key: &str, value: Value| entries.push((key.to_owned(), value));
    match &tokenizer.engine {
        Engine::Spm(spm) => {
            let bpe = spm.rules.algorithm == Algorithm::Bpe;
            if bpe && spm.rules.charsmap.is_some() {
                return Err(refused("it maps characters, which GGUF's `llama` vocabularies cannot say"));
            }
            let model = if bpe { "llama" } else { "t5" };
            put(MODEL, Value::String(model.to_owned()));
            put(PRE, Value::String("default".to_owned()));
            let pieces = &spm.pieces;
            let texts = pieces.iter().map(|piece| piece.text.clone()).collect();
            put(TOKENS, Value::Array(Array::String(texts)));
            put(SCORES, Value::Array(Array::F32(pieces.iter().map(|piece| piece.score).collect())));
            put(TYPES, Value::Array(Array::I32(pieces.iter().map(|piece| piece.kind as i32).collect())));
            put(ADD_SPACE_PREFIX, Value::Bool(spm.rules.add_prefix));
            // Programs that do not know the key in a `llama` vocabulary differ on repeated spaces only.
            if !bpe || spm.rules.remove_extra_whitespaces {
                put(REMOVE_WHITESPACES, Value::Bool(spm.rules.remove_extra_whitespaces));
            }
            if let Some(map) = &spm.rules.charsmap {
                put(CHARSMAP, Value::Array(Array::U8(map.blob().to_vec())));
            }
            if let Some(unknown) = spm.rules.unknown {
                put(UNKNOWN, Value::U32(unknown));
            }
        }
        Engine::Hf(inner) => {
            let json = serde_json::to_value(inner.as_ref()).map_err(|error| refused(error.to_string()))?;
            let (pre, merges) = byte_level_facts(&json)?;
            put(MODEL, Value::String("gpt2".to_owned()));
            put(PRE, Value::String(pre.names[0].to_owned()));
            let added = inner.get_added_tokens_decoder();
            let (mut texts, mut types) = (Vec::new(), Vec::new());
            for id in 0..tokenizer.vocab_size as u32 {
                let (text, kind) = match (inner.id_to_token(id), added.get(&id)) {
                    (Some(text), Some(token)) if token.special => (text, Kind::Control),
                    (Some(text), Some(_)) => (text, Kind::UserDefined),
                    (Some(text), None) => (text, Kind::Normal),
                    (None, _) => (format!("[PAD{id}]"), Kind::Unused),
                };
                texts.push(text);
                types.push(kind as i32);
            }
            put(TOKENS, Value::Array(Array::String(texts)));
            put(TYPES, Value::Array(Array::I32(types)));
            put(MERGES, Value::Array(Array::String(merges)));
        }
    }
    if let Some(bos) = tokenizer.bos {
        put(BOS, Value::U32(bos));
    }
    if let Some(eos) = tokenizer.ends.first() {
        put(EOS, Value::U32(eos));
    }
    let expected_before: Vec<u32> = tokenizer.bos.into_iter().collect();
    let expected_after: Vec<u32> = tokenizer.ends.first().into_iter().collect();
    for (key, ids, expected) in
        [(ADD_BOS, &tokenizer.before, expected_before), (ADD_EOS, &tokenizer.after, expected_after)]
    {
        if !ids.is_empty() && *ids != expected {
            return Err(refused("GGUF can add one BOS and one EOS to a text, but this adds other tokens"));
        }
        put(key, Value::Bool(!ids.is_empty()));
    }
    entries.extend(tokenizer.templates.gguf_entries());
    Ok(entries)
}

/// The split rules' GGUF name and the merges, if the file is byte-level BPE with rules that have a name.
fn byte_level_facts(json: &Json) -> Result<(&'static Pre, Vec<String>), ModelError> {
    let unknown = |what: &str| refused(format!("{what}, for which GGUF has no name"));
    let model = &json["model"];
    if model["type"] != "BPE" || model["byte_fallback"] == true {
        return Err(unknown("it is not byte-level BPE"));
    }
    let steps = &json["pre_tokenizer"];
    let single = [steps.clone()];
    let steps = steps["pretokenizers"].as_array().map_or(single.as_slice(), Vec::as_slice);
    let (mut patterns, mut byte_level) = (Vec::new(), false);
    for step in steps {
        match step["type"].as_str() {
            Some("Split") if step["behavior"] == "Isolated" && step["invert"] != true => {
                let pattern = step["pattern"]["Regex"].as_str();
                patterns.push(pattern.ok_or_else(|| unknown("it splits at a fixed string"))?.to_owned());
            }
            Some("Digits") => {
                let each = step["individual_digits"] == true;
                patterns.push(if each { r"\p{N}" } else { r"\p{N}+" }.to_owned());
            }
            Some("ByteLevel") if step["add_prefix_space"] != true => {
                byte_level = true;
                if step["use_regex"] != false {
                    patterns.push(pre::GPT2.to_owned());
                }
            }
            _ => return Err(unknown(&format!("it has the pre-tokenizer {step}"))),
        }
    }
    if !byte_level {
        return Err(unknown("it is not byte-level BPE"));
    }
    let nfc = match json["normalizer"]["type"].as_str() {
        None => false,
        Some("NFC") => true,
        Some(other) => return Err(unknown(&format!("it has the normalizer {other}"))),
    };
    let ignore_merges = model["ignore_merges"] == true;
    let pre = Pre::with_rules(&patterns, ignore_merges, nfc).ok_or_else(|| {
        unknown(&format!("it splits text by {patterns:?} (merges ignored: {ignore_merges}, NFC: {nfc})"))
    })?;
    let merges = model["merges"].as_array().map_or(&[][..], Vec::as_slice);
    let mut texts = Vec::with_capacity(merges.len());
    let mut seen = HashSet::new();
    for merge in merges {
        let text = match merge {
            Json::String(text) => text.clone(),
            pair => {
                format!("{} {}", pair[0].as_str().unwrap_or_default(), pair[1].as_str().unwrap_or_default())
            }
        };
        if text.split(' ').count() != 2 || !seen.insert(text.clone()) {
            return Err(refused(format!("the merge `{text}` cannot be written as `left right`")));
        }
        texts.push(text);
    }
    Ok((pre, texts))
}
