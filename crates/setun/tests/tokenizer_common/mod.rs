//! What the tokenizer tests share: fixtures, and checks that hold for every tokenizer.
#![allow(dead_code)] // Each test binary uses its part.

use setun::chat::{ChatTemplate, Context, Message};
use setun::format::Checkpoint;
use setun::format::gguf::Metadata;
use setun::tokenizer::{StreamDecoder, Tokenizer};
use std::path::{Path, PathBuf};

pub fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden").join(path)
}

/// A file of the larger collection beside the repository; says so when it is absent.
pub fn shared(path: &str) -> Option<PathBuf> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared").join(path);
    if !file.exists() {
        eprintln!("skipped: ../shared/{path} is not there");
        return None;
    }
    Some(file)
}

pub fn json(path: &Path) -> serde_json::Value {
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

pub fn gguf(path: &Path) -> Tokenizer {
    let checkpoint = Checkpoint::open(path).unwrap();
    Tokenizer::from_gguf(checkpoint.gguf_metadata().expect("a GGUF file")).unwrap()
}

pub fn ids(value: &serde_json::Value) -> Vec<u32> {
    value.as_array().expect("ids").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

/// The strings of `vocab_test.inp`.
pub fn test_texts() -> Vec<String> {
    let all = std::fs::read_to_string(golden("tokenizers/vocab_test.inp")).unwrap();
    let mut texts: Vec<String> = all.split("\n__ggml_vocab_test__\n").map(str::to_owned).collect();
    assert_eq!(texts.pop().as_deref(), Some(""));
    assert_eq!(texts.len(), 46);
    texts
}

/// Compares with a `.out` file of llama.cpp: line n holds the ids of string n.
pub fn check_out_file(tokenizer: &Tokenizer, out: &Path) {
    let expected = std::fs::read_to_string(out).unwrap();
    let texts = test_texts();
    assert_eq!(expected.lines().count(), texts.len());
    let mut wrong = Vec::new();
    for (text, line) in texts.iter().zip(expected.lines()) {
        let expected: Vec<u32> = line.split_whitespace().map(|id| id.parse().unwrap()).collect();
        let found = tokenizer.encode(text, false).unwrap();
        if found != expected {
            wrong.push(format!("{text:?}\n  expected {expected:?}\n  found    {found:?}"));
        }
        check_stream(tokenizer, &found);
    }
    assert!(wrong.is_empty(), "{}: {} wrong\n{}", out.display(), wrong.len(), wrong.join("\n"));
}

/// Streaming gives the text of `decode`, whole characters at a time.
pub fn check_stream(tokenizer: &Tokenizer, ids: &[u32]) {
    for skip in [false, true] {
        let mut stream = StreamDecoder::new(tokenizer, skip);
        let mut text = String::new();
        for &id in ids {
            text += &stream.push(id).unwrap();
        }
        text += &stream.finish().unwrap();
        assert_eq!(text, tokenizer.decode(ids, skip).unwrap(), "{ids:?}");
    }
}

/// Compares with a `tokenizer_cases.json`; returns how many strings it had.
pub fn check_cases(tokenizer: &Tokenizer, path: &Path) -> usize {
    let file = json(path);
    let cases = file.as_array().or_else(|| file["cases"].as_array()).expect("cases");
    for case in cases {
        let text = case["text"].as_str().unwrap();
        let expected = ids(&case["ids"]);
        let context = format!("{}: {text:?}", path.display());
        assert_eq!(tokenizer.encode(text, true).unwrap(), expected, "{context}");
        if let Some(bare) = case.get("ids_no_special") {
            assert_eq!(tokenizer.encode(text, false).unwrap(), ids(bare), "{context}, no special");
        }
        for (key, skip) in [("decoded", false), ("decoded_skip_special", true)] {
            // `decoded` is of the ids without special tokens where both are listed.
            let Some(decoded) = case[key].as_str() else {
                continue;
            };
            let from = case.get("ids_no_special").filter(|_| !skip).map_or(expected.clone(), ids);
            assert_eq!(tokenizer.decode(&from, skip).unwrap(), decoded, "{context}, {key}");
        }
        check_stream(tokenizer, &expected);
    }
    if let Some(chat) = file.get("chat").filter(|chat| !chat.is_null()) {
        let source = tokenizer.chat_template().expect("a template beside chat cases");
        let template = ChatTemplate::new(source).unwrap();
        let messages: Vec<Message> = chat["messages"].as_array().unwrap().iter().map(message).collect();
        for (key, add_generation_prompt) in [("rendered", true), ("rendered_no_gen", false)] {
            let Some(expected) = chat[key].as_str() else {
                continue;
            };
            let context = Context { add_generation_prompt, ..Context::default() };
            assert_eq!(template.render(&messages, &context).unwrap(), expected, "{}", path.display());
        }
    }
    cases.len()
}

fn message(value: &serde_json::Value) -> Message {
    let text = |key: &str| value[key].as_str().unwrap().to_owned();
    Message::new(text("role"), text("content"))
}

/// The tokenizer that `gguf_entries` describes.
pub fn through_gguf(tokenizer: &Tokenizer) -> Tokenizer {
    let mut metadata = Metadata::new();
    for (key, value) in tokenizer.gguf_entries().unwrap() {
        metadata.insert(key, value);
    }
    Tokenizer::from_gguf(&metadata).unwrap()
}

/// Both give the same ids and text for every string, and agree on BOS, EOS and size.
pub fn check_same(a: &Tokenizer, b: &Tokenizer, texts: &[String]) {
    assert_eq!((a.bos(), a.vocab_size()), (b.bos(), b.vocab_size()));
    for text in texts {
        for special in [false, true] {
            let ids = a.encode(text, special).unwrap();
            assert_eq!(ids, b.encode(text, special).unwrap(), "{text:?}, special {special}");
            assert_eq!(a.decode(&ids, true).unwrap(), b.decode(&ids, true).unwrap(), "{text:?}");
        }
    }
}
