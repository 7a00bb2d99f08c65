//! `tokenizer.json` on the `tokenizers` crate: checks before it, and what it does not tell.
//!
//! The crate trusts its input in places (merge lengths, charsmap offsets, template ids), so those are
//! checked here first; anything else that panics inside it is caught and becomes an error.

use super::decode::Spelling;
use super::ends::Ends;
use super::spm::{Algorithm, Charsmap, Kind, SPACE, Spm};
use super::{Engine, Tokenizer, refused};
use crate::error::ModelError;
use base64::prelude::{BASE64_STANDARD as BASE64, Engine as _};
use serde_json::{Value as Json, json};
use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior};

use super::pre::Pre;
use super::templates::Templates;

type Inner = tokenizers::Tokenizer;

pub(super) fn from_json(bytes: &[u8]) -> Result<Tokenizer, ModelError> {
    let json: Json =
        serde_json::from_slice(bytes).map_err(|error| refused(format!("not valid JSON: {error}")))?;
    check(&json)?;
    let mut inner = guard(|| Inner::from_bytes(bytes))?;
    // Limits for training batches; a prompt is never cut or padded.
    inner.with_padding(None);
    inner.with_truncation(None).map_err(|error| refused(error.to_string()))?;
    let mut tokenizer = wrap(inner)?;
    (tokenizer.before, tokenizer.after) = surroundings(&tokenizer)?;
    tokenizer.bos = tokenizer.before.first().copied();
    tokenizer.ends = Ends::of(tokenizer.after.last().copied(), "tokenizer.json: post_processor");
    tokenizer.add_known_ends();
    Ok(tokenizer)
}

/// The crate's tokenizer from JSON that this library wrote itself.
pub(super) fn from_value(json: &Json) -> Result<Inner, ModelError> {
    guard(|| Inner::from_bytes(json.to_string()))
}

/// A tokenizer without BOS, EOS and template, which the caller knows or looks up.
pub(super) fn wrap(inner: Inner) -> Result<Tokenizer, ModelError> {
    let special = inner.get_added_tokens_decoder().into_iter().filter(|(_, token)| token.special);
    let largest = inner.get_vocab(true).into_values().max();
    let decoder = serde_json::to_value(inner.get_decoder()).unwrap_or_default();
    Ok(Tokenizer {
        spelling: spelling(&decoder),
        special: special.map(|(id, _)| id).collect(),
        vocab_size: largest.map_or(0, |id| id as usize + 1),
        bos: None,
        ends: Ends::default(),
        before: Vec::new(),
        after: Vec::new(),
        templates: Templates::default(),
        engine: Engine::Hf(Box::new(inner)),
    })
}

pub(super) fn encode(inner: &Inner, text: &str) -> Result<Vec<u32>, ModelError> {
    guard(|| inner.encode_fast(text, false)).map(|encoding| encoding.get_ids().to_vec())
}

pub(super) fn decode(inner: &Inner, ids: &[u32], skip_special: bool) -> Result<String, ModelError> {
    guard(|| inner.decode(ids, skip_special))
}

/// Runs the crate; its errors and panics become ours.
fn guard<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, ModelError> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(|error| refused(error.to_string())),
        Err(_) => Err(refused("the vocabulary or its rules contradict themselves")),
    }
}

/// What the post-processor puts around a text, found by trying.
fn surroundings(tokenizer: &Tokenizer) -> Result<(Vec<u32>, Vec<u32>), ModelError> {
    let Engine::Hf(inner) = &tokenizer.engine else {
        return Ok(Default::default());
    };
    if inner.get_post_processor().is_none() {
        return Ok(Default::default());
    }
    let bare = encode(inner, "a")?;
    let whole = guard(|| inner.encode_fast("a", true))?.get_ids().to_vec();
    let at = whole.windows(bare.len().max(1)).position(|window| window == bare);
    match at {
        Some(at) => Ok((whole[..at].to_vec(), whole[at + bare.len()..].to_vec())),
        None => Ok((whole, Vec::new())), // `a` has no token at all.
    }
}

/// Whether single tokens can be decoded, from the decoder's JSON.
fn spelling(decoder: &Json) -> Option<Spelling> {
    if decoder["type"] == "ByteLevel" {
        return Some(Spelling::ByteLevel);
    }
    let steps = decoder["decoders"].as_array()?;
    let (mut replaces, mut strip) = (false, false);
    for step in steps {
        match step["type"].as_str()? {
            "Replace" if step["pattern"]["String"] == "▁" && step["content"] == " " => replaces = true,
            "ByteFallback" | "Fuse" => {}
            "Strip" if step["content"] == " " && step["start"] == 1 && step["stop"] == 0 => strip = true,
            _ => return None,
        }
    }
    replaces.then_some(Spelling::SentencePiece { strip })
}

/// Refuses what would make the crate panic or reserve memory without bound.
fn check(json: &Json) -> Result<(), ModelError> {
    let model = &json["model"];
    if let (Some(vocab), Some(merges)) = (model["vocab"].as_object(), model["merges"].as_array()) {
        let prefix = model["continuing_subword_prefix"].as_str().unwrap_or_default();
        for (index, merge) in merges.iter().enumerate() {
            let pair = match merge {
                Json::String(both) => both.split_once(' '),
                Json::Array(pair) => match pair.as_slice() {
                    [Json::String(left), Json::String(right)] => Some((left.as_str(), right.as_str())),
                    _ => None,
                },
                _ => None,
            };
            let Some((left, right)) = pair else {
                return Err(refused(format!("merge {index} is not a pair of tokens: {merge}")));
            };
            let joined = right.strip_prefix(prefix).map(|rest| [left, rest].concat());
            for part in [Some(left.to_owned()), Some(right.to_owned()), joined] {
                if !part.as_ref().is_some_and(|part| vocab.contains_key(part)) {
                    let part = part.unwrap_or_else(|| right.to_owned());
                    let what =
                        format!("merge {index} needs the token `{part}`, which is not in the vocabulary");
                    return Err(refused(what));
                }
            }
        }
    }
    check_parts(&json["normalizer"])?;
    check_parts(&json["pre_tokenizer"])?;
    check_parts(&json["post_processor"])
}

/// Checks one step of the pipeline and the steps inside it.
fn check_parts(part: &Json) -> Result<(), ModelError> {
    for list in ["normalizers", "pretokenizers", "processors"] {
        for inner in part[list].as_array().into_iter().flatten() {
            check_parts(inner)?;
        }
    }
    match part["type"].as_str() {
        Some("Precompiled") => {
            let text = part["precompiled_charsmap"].as_str().unwrap_or_default();
            if !text.is_empty()
                && !BASE64.decode(text).is_ok_and(|b| Charsmap::new(&b).is_ok_and(|m| m.is_sound()))
            {
                return Err(refused("the normalizer's `precompiled_charsmap` is damaged"));
            }
        }
        Some("FixedLength") if part["length"].as_u64() == Some(0) => {
            return Err(refused("the pre-tokenizer `FixedLength` has the length 0"));
        }
        Some("TemplateProcessing") => {
            let pieces = ["single", "pair"].iter().filter_map(|list| part[*list].as_array()).flatten();
            for id in pieces.filter_map(|piece| piece["SpecialToken"]["id"].as_str()) {
                if part["special_tokens"].get(id).is_none() {
                    let what =
                        format!("the post-processor uses `{id}`, which its `special_tokens` do not define");
                    return Err(refused(what));
                }
            }
        }
        _ => {}
    }
    Ok(())
}

/// A token of a GGUF vocabulary that is matched in the text before splitting.
pub(super) struct Added {
    pub(super) text: String,
    pub(super) special: bool,
}

/// Byte-level BPE from a list of tokens (in GPT-2's byte alphabet) and merges.
pub(super) fn byte_level_bpe(
    vocab: Vocab,
    merges: Merges,
    pre: &Pre,
    added: Vec<Added>,
) -> Result<Inner, ModelError> {
    let model =
        guard(|| BPE::builder().vocab_and_merges(vocab, merges).ignore_merges(pre.ignore_merges).build())?;
    let mut inner = Inner::new(model);
    let mut steps = Vec::new();
    for pattern in pre.patterns {
        let pattern = SplitPattern::Regex((*pattern).to_owned());
        let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false);
        steps.push(PreTokenizerWrapper::Split(split.map_err(|error| refused(error.to_string()))?));
    }
    steps.push(PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, false)));
    inner.with_pre_tokenizer(Some(tokenizers::pre_tokenizers::sequence::Sequence::new(steps)));
    if pre.nfc {
        let nfc = NormalizerWrapper::NFC(tokenizers::normalizers::NFC);
        inner.with_normalizer(Some(nfc)).map_err(|error| refused(error.to_string()))?;
    }
    inner.with_decoder(Some(ByteLevel::new(false, true, false)));
    add_tokens(&mut inner, added)?;
    Ok(inner)
}

pub(super) fn add_tokens(inner: &mut Inner, added: Vec<Added>) -> Result<(), ModelError> {
    let tokens = added
        .into_iter()
        .map(|token| AddedToken::from(token.text, token.special).normalized(false))
        .collect::<Vec<_>>();
    guard(|| inner.add_tokens(tokens)).map(drop)
}

pub(super) fn to_json(tokenizer: &Tokenizer) -> Result<String, ModelError> {
    let mut json = match &tokenizer.engine {
        Engine::Hf(inner) => serde_json::to_value(inner.as_ref())
            .map_err(|error| refused(format!("cannot be written as JSON: {error}")))?,
        Engine::Spm(spm) => spm_json(spm)?,
    };
    if !(tokenizer.before.is_empty() && tokenizer.after.is_empty()) && json["post_processor"].is_null() {
        json["post_processor"] = template(tokenizer);
    }
    serde_json::to_string_pretty(&json)
        .map_err(|error| refused(format!("cannot be written as JSON: {error}")))
}

/// A `TemplateProcessing` step that adds what belongs around a text.
fn template(tokenizer: &Tokenizer) -> Json {
    let name = |id: u32| tokenizer.id_to_token(id).unwrap_or_default();
    let special = |id: &u32| json!({"SpecialToken": {"id": name(*id), "type_id": 0}});
    let sequence = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
    let around = |id: &str| -> Vec<Json> {
        let before = tokenizer.before.iter().map(special);
        before.chain([sequence(id)]).chain(tokenizer.after.iter().map(special)).collect()
    };
    let mut tokens = serde_json::Map::new();
    for &id in tokenizer.before.iter().chain(&tokenizer.after) {
        tokens.insert(name(id), json!({"id": name(id), "ids": [id], "tokens": [name(id)]}));
    }
    let pair = [around("A"), around("B")].concat();
    json!({"type": "TemplateProcessing", "single": around("A"), "pair": pair, "special_tokens": tokens})
}

/// A SentencePiece vocabulary in the terms of `tokenizer.json`.
fn spm_json(spm: &Spm) -> Result<Json, ModelError> {
    let mut seen = HashSet::new();
    for piece in &spm.pieces {
        if !seen.insert(piece.text.as_str()) {
            let what = format!("two pieces are spelled `{}`, which tokenizer.json cannot hold", piece.text);
            return Err(refused(what));
        }
    }
    let mut normalizers = Vec::new();
    if let Some(map) = &spm.rules.charsmap {
        let map = BASE64.encode(map.blob());
        normalizers.push(json!({"type": "Precompiled", "precompiled_charsmap": map}));
    }
    if spm.rules.remove_extra_whitespaces {
        normalizers.push(json!({"type": "Strip", "strip_left": true, "strip_right": true}));
        normalizers.push(json!({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}));
    }
    if spm.rules.add_prefix {
        normalizers.push(json!({"type": "Prepend", "prepend": SPACE.to_string()}));
    }
    normalizers.push(json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE.to_string()}));
    let unknown = spm.rules.unknown.map(|id| spm.pieces[id as usize].text.as_str());
    let model = match spm.rules.algorithm {
        Algorithm::Bpe => {
            let vocab: serde_json::Map<String, Json> =
                spm.pieces.iter().zip(0u32..).map(|(piece, id)| (piece.text.clone(), json!(id))).collect();
            json!({"type": "BPE", "unk_token": unknown, "fuse_unk": true,
                "byte_fallback": spm.has_byte_fallback(), "vocab": vocab, "merges": merges(spm)})
        }
        Algorithm::Unigram => {
            let pieces = spm.pieces.iter().map(|piece| json!([piece.text, piece.score]));
            json!({"type": "Unigram", "unk_id": spm.rules.unknown,
                "byte_fallback": spm.has_byte_fallback(), "vocab": pieces.collect::<Vec<_>>()})
        }
    };
    let added: Vec<Json> = (0u32..)
        .zip(&spm.pieces)
        .filter(|(_, piece)| matches!(piece.kind, Kind::Control | Kind::Unknown | Kind::UserDefined))
        .map(|(id, piece)| {
            json!({"id": id, "content": piece.text, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": piece.kind != Kind::UserDefined})
        })
        .collect();
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": SPACE.to_string()}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if spm.rules.add_prefix {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": decoders}, "model": model,
    }))
}

/// Every way to join two pieces into a third, best score first.
fn merges(spm: &Spm) -> Vec<[String; 2]> {
    let mut order: Vec<usize> =
        (0..spm.pieces.len()).filter(|&i| matches!(spm.pieces[i].kind, Kind::Normal)).collect();
    order.sort_by(|&a, &b| spm.pieces[b].score.total_cmp(&spm.pieces[a].score)); // Stable: ties by id.
    let known = |text: &str| spm.id(text).is_some_and(|id| spm.pieces[id as usize].kind == Kind::Normal);
    let mut merges = Vec::new();
    for &index in &order {
        let text = &spm.pieces[index].text;
        for (cut, _) in text.char_indices().skip(1) {
            let (left, right) = text.split_at(cut);
            if known(left) && known(right) {
                merges.push([left.to_owned(), right.to_owned()]);
            }
        }
    }
    merges
}
