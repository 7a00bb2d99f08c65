//! Tokenizers against ids that other programs computed, on the fixtures of this repository.

mod tokenizer_common;

use proptest::prelude::*;
use setun::chat::{Message, encode_chat};
use setun::format::gguf::{Array, Metadata, Value};
use setun::tokenizer::Tokenizer;
use std::path::PathBuf;
use tokenizer_common::*;

/// Folders with a `tokenizer.json` and expected ids.
fn folders() -> Vec<PathBuf> {
    let roots = ["models", "tokenizers"].map(|root| std::fs::read_dir(golden(root)).unwrap());
    let folders = roots.into_iter().flatten().map(|entry| entry.unwrap().path());
    folders.filter(|folder| folder.join("expected/tokenizer_cases.json").exists()).collect()
}

fn untied() -> Tokenizer {
    let folder = folders().into_iter().find(|folder| folder.ends_with("llama-bitnet-packed"));
    Tokenizer::from_folder(&folder.expect("golden/models/llama-bitnet-packed")).unwrap()
}

#[test]
fn folders_give_the_reference_ids_texts_and_chats() {
    let folders = folders();
    assert!(folders.len() >= 6, "{folders:?}");
    for folder in folders {
        let tokenizer = Tokenizer::from_folder(&folder).unwrap();
        assert!(check_cases(&tokenizer, &folder.join("expected/tokenizer_cases.json")) >= 5);
        let json = tokenizer.to_json().unwrap();
        let again = Tokenizer::from_json_bytes(json.as_bytes()).unwrap();
        for text in test_texts() {
            assert_eq!(tokenizer.encode(&text, true).unwrap(), again.encode(&text, true).unwrap());
        }
    }
}

#[test]
fn declared_and_well_known_end_tokens_are_found() {
    let tokenizer = untied();
    assert_eq!(tokenizer.bos(), tokenizer.token_to_id("<|begin_of_text|>"));
    let ends = ["<|end_of_text|>", "<|eot_id|>"].map(|name| tokenizer.token_to_id(name).unwrap());
    assert_eq!(tokenizer.eos_ids(), ends);
    assert!(ends.iter().all(|&id| tokenizer.is_special(id)) && !tokenizer.is_special(0));
}

#[test]
fn a_conversation_has_one_bos_whether_template_or_tokenizer_writes_it() {
    let tokenizer = untied();
    let bos = tokenizer.bos().unwrap();
    let ids = encode_chat(&tokenizer, &[Message::new("user", "Who is Jim?")]).unwrap();
    assert_eq!(ids.iter().filter(|&&id| id == bos).count(), 1);
    assert_eq!(
        tokenizer.decode(&ids, false).unwrap(),
        "<|begin_of_text|>User: Who is Jim?<|eot_id|>Assistant: "
    );
    let with = tokenizer.encode_prompt("<|begin_of_text|>User: hi").unwrap();
    assert_eq!(with, tokenizer.encode_prompt("User: hi").unwrap());
}

#[test]
fn byte_level_vocabularies_survive_gguf() {
    let mut checked = 0;
    for folder in folders() {
        let tokenizer = Tokenizer::from_folder(&folder).unwrap();
        if folder.ends_with("bert-mean") || folder.ends_with("t5-relu-tied") {
            let error = tokenizer.gguf_entries().unwrap_err().to_string();
            assert!(error.contains("GGUF has no name"), "{error}");
            continue;
        }
        let again = through_gguf(&tokenizer);
        check_same(&tokenizer, &again, &test_texts());
        assert_eq!(tokenizer.eos_ids(), again.eos_ids());
        assert_eq!(tokenizer.chat_template(), again.chat_template());
        checked += 1;
    }
    assert!(checked >= 4);
}

#[test]
fn phi_3_ids_equal_llama_cpps() {
    let tokenizer = gguf(&golden("tokenizers/ggml-vocab-phi-3.gguf"));
    check_out_file(&tokenizer, &golden("tokenizers/ggml-vocab-phi-3.out"));
    check_same(&tokenizer, &through_gguf(&tokenizer), &test_texts());
    assert_eq!(tokenizer.encode("Hello", true).unwrap()[0], 1);
    for text in test_texts() {
        let ids = tokenizer.encode(&text, false).unwrap();
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
    }
}

#[test]
fn phi_3_as_tokenizer_json_gives_the_same_ids() {
    let tokenizer = gguf(&golden("tokenizers/ggml-vocab-phi-3.gguf"));
    let again = Tokenizer::from_json_bytes(tokenizer.to_json().unwrap().as_bytes()).unwrap();
    let texts: Vec<String> = test_texts().into_iter().filter(|text| !text.is_empty()).collect();
    check_same(&tokenizer, &again, &texts);
}

#[test]
fn sentencepiece_files_give_sentencepieces_ids() {
    let expected = json(&golden("tokenizers/spm_cases.json"));
    for name in ["tok512.model", "botchan1000.model"] {
        let bytes = std::fs::read(golden("tokenizers").join(name)).unwrap();
        let tokenizer = Tokenizer::from_sentencepiece(&bytes).unwrap();
        for case in expected[name].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let found = tokenizer.encode(text, false).unwrap();
            assert_eq!(found, ids(&case["ids"]), "{name}: {text:?}");
            check_stream(&tokenizer, &found);
        }
    }
}

#[test]
fn ids_outside_the_vocabulary_give_no_text() {
    for tokenizer in [untied(), gguf(&golden("tokenizers/ggml-vocab-phi-3.gguf"))] {
        let mut ids = tokenizer.encode("Hello world", false).unwrap();
        ids.insert(1, tokenizer.vocab_size() as u32);
        ids.push(u32::MAX);
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), "Hello world");
        check_stream(&tokenizer, &ids);
    }
}

#[test]
fn long_runs_of_one_character_come_back() {
    let phi = gguf(&golden("tokenizers/ggml-vocab-phi-3.gguf"));
    for tokenizer in [untied(), phi] {
        for unit in [" ", "a", "\n", "é"] {
            let text = unit.repeat(100_000);
            let ids = tokenizer.encode(&text, false).unwrap();
            assert!(tokenizer.decode(&ids, false).unwrap() == text, "{unit:?}");
        }
    }
}

/// A small valid `llama` vocabulary: unknown, BOS, EOS, 256 bytes, `a`, `b`, `ab`, `▁`.
fn small_llama() -> Metadata {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
    tokens.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
    tokens.extend(["a", "b", "ab", "▁"].map(String::from));
    let mut types = vec![2, 3, 3];
    types.extend([6; 256]);
    types.extend([1; 4]);
    let scores = (0..tokens.len()).map(|id| -(id as f32)).collect();
    let mut metadata = Metadata::new();
    metadata.insert("tokenizer.ggml.model", Value::String("llama".into()));
    metadata.insert("tokenizer.ggml.tokens", Value::Array(Array::String(tokens)));
    metadata.insert("tokenizer.ggml.scores", Value::Array(Array::F32(scores)));
    metadata.insert("tokenizer.ggml.token_type", Value::Array(Array::I32(types)));
    metadata
}

#[test]
fn hostile_gguf_vocabularies_are_refused_with_the_key_at_fault() {
    assert!(Tokenizer::from_gguf(&small_llama()).is_ok());
    let text = |text: &str| Value::String(text.to_owned());
    let cases = [
        ("tokenizer.ggml.model", text("none")),
        ("tokenizer.ggml.model", text("rwkv")),
        ("tokenizer.ggml.model", Value::U32(1)),
        ("tokenizer.ggml.tokens", Value::Array(Array::String(Vec::new()))),
        ("tokenizer.ggml.tokens", Value::Array(Array::U32(vec![1]))),
        ("tokenizer.ggml.scores", Value::Array(Array::F32(vec![0.0]))),
        ("tokenizer.ggml.scores", Value::Array(Array::F32(vec![f32::NAN; 263]))),
        ("tokenizer.ggml.token_type", Value::Array(Array::I32(vec![9; 263]))),
        ("tokenizer.ggml.token_type", Value::Array(Array::I32(vec![6; 263]))),
        ("tokenizer.ggml.bos_token_id", Value::U32(263)),
        ("tokenizer.ggml.eos_token_id", Value::U64(1 << 40)),
        ("tokenizer.ggml.precompiled_charsmap", Value::Array(Array::U8(vec![255; 9]))),
    ];
    for (key, value) in cases {
        let mut metadata = small_llama();
        metadata.insert(key, value.clone());
        let error = Tokenizer::from_gguf(&metadata).err().unwrap_or_else(|| panic!("{key} {value:?}"));
        assert!(!error.to_string().is_empty());
    }
}

#[test]
fn unknown_split_rules_are_refused_by_name() {
    let mut metadata = Metadata::new();
    for (key, value) in untied().gguf_entries().unwrap() {
        metadata.insert(key, value);
    }
    metadata.insert("tokenizer.ggml.pre", Value::String("future-9".into()));
    let error = Tokenizer::from_gguf(&metadata).unwrap_err().to_string();
    assert!(error.contains("`future-9`") && error.contains("llama-bpe"), "{error}");
    let broken = Value::Array(Array::String(vec!["a zzzz".into()]));
    metadata.insert("tokenizer.ggml.pre", Value::String("llama-bpe".into()));
    metadata.insert("tokenizer.ggml.merges", broken);
    let error = Tokenizer::from_gguf(&metadata).unwrap_err().to_string();
    assert!(error.contains("`zzzz` is not a token"), "{error}");
}

#[test]
fn hostile_tokenizer_json_is_an_error_not_a_panic() {
    let model = |merges: &str| {
        format!(
            r#"{{"version": "1.0", "added_tokens": [], "model":
            {{"type": "BPE", "vocab": {{"a": 0, "b": 1}}, "merges": {merges}}}}}"#
        )
    };
    assert!(Tokenizer::from_json_bytes(model("[]").as_bytes()).is_ok());
    for text in [
        model(r#"[["a", "b"]]"#),
        model(r#"["a c"]"#),
        model(r#"[1]"#),
        String::new(),
        "{}".into(),
        "[]".into(),
        r#"{"version": "1.0", "model": {"type": "Unigram", "vocab": [], "unk_id": 7}}"#.into(),
    ] {
        let error = Tokenizer::from_json_bytes(text.as_bytes()).err();
        assert!(error.is_some(), "{text}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn decode_of_encode_is_identity_for_any_utf8(text in "(?s).{0,60}") {
        thread_local!(static TOKENIZER: Tokenizer = untied());
        TOKENIZER.with(|tokenizer| {
            let ids = tokenizer.encode(&text, false).unwrap();
            prop_assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
            Ok(())
        })?;
    }

    #[test]
    fn spm_decode_of_encode_is_identity_for_any_utf8(text in "[^\u{2581}]{0,60}") {
        thread_local!(static TOKENIZER: Tokenizer = Tokenizer::from_gguf(&small_llama()).unwrap());
        TOKENIZER.with(|tokenizer| {
            let ids = tokenizer.encode(&text, true).unwrap();
            prop_assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
            Ok(())
        })?;
    }

    #[test]
    fn streaming_any_ids_equals_decoding_them(ids in prop::collection::vec(0u32..400, 0..40)) {
        thread_local!(static ALL: Vec<Tokenizer> = {
            let folders = folders().into_iter().map(|folder| Tokenizer::from_folder(&folder).unwrap());
            folders.chain([Tokenizer::from_gguf(&small_llama()).unwrap()]).collect()
        });
        ALL.with(|all| all.iter().for_each(|tokenizer| check_stream(tokenizer, &ids)));
    }
}
