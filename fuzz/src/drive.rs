//! The library's entry points for foreign files, each driven through everything that loading a model does.
//!
//! Nothing is expected of the results: an input passes if no call panics, hangs or takes too much memory. What the
//! functions return is how far they came: whether a model ran, a tokenizer was made, a template was rendered. The repository's own tests replay `regressions/` through these functions, so this file uses nothing of libFuzzer.

use std::path::Path;

use setun::chat::{ChatTemplate, Context, Message};
use setun::config::ModelConfig;
use setun::engine::{Engine, EngineOptions};
use setun::format::Checkpoint;
use setun::kv_cache::KvType;
use setun::recommended::Recommended;
use setun::tokenizer::{StreamDecoder, Tokenizer};

/// Files that an input for a folder may hold, by the number that introduces each.
pub const NAMES: [&str; 10] = [
    "model.safetensors",
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "tokenizer.model",
];

/// A GGUF file.
pub fn gguf(data: &[u8]) -> bool {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, data).expect("room in the temporary folder");
    open(&path)
}

/// A folder, or a lone safetensors file: input that starts with a number of [`NAMES`] is records of such a number, a
/// little-endian u32 length, and as many bytes (or those that are left); any other is `model.safetensors`.
pub fn safetensors(data: &[u8]) -> bool {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let write = |name: &str, bytes: &[u8]| {
        std::fs::write(folder.path().join(name), bytes).expect("room in the temporary folder");
    };
    if data.get(4..9).is_some_and(|b| b[..4] == [0; 4] && b[4] == b'{') {
        write(NAMES[0], data);
        return open(&folder.path().join(NAMES[0]));
    }
    let mut rest = data;
    while let [name, a, b, c, d, tail @ ..] = rest {
        let length = (u32::from_le_bytes([*a, *b, *c, *d]) as usize).min(tail.len());
        write(NAMES[usize::from(*name) % NAMES.len()], &tail[..length]);
        rest = &tail[length..];
    }
    open(folder.path())
}

/// A tokenizer: a GGUF file's, a tokenizer.json (by its brace), or a SentencePiece model.
pub fn tokenizer_json(data: &[u8]) -> bool {
    let tokenizer = match data {
        [b'G', b'G', b'U', b'F', ..] => {
            let folder = tempfile::tempdir().expect("a temporary folder");
            let path = folder.path().join("vocabulary.gguf");
            std::fs::write(&path, data).expect("room in the temporary folder");
            Tokenizer::open(&path)
        }
        [b'{', ..] => Tokenizer::from_json_bytes(data),
        _ => Tokenizer::from_sentencepiece(data),
    };
    tokenizer.is_ok_and(|tokenizer| {
        // Some of the input is text too, so that pieces of the vocabulary occur in it.
        let tail = String::from_utf8_lossy(&data[data.len().saturating_sub(200)..]).into_owned();
        use_tokenizer(
            &tokenizer,
            &["Once upon a  time, café 12345\n\n", "<s>[INST] 日本語 \u{1f600}\u{301}</s>", &tail],
        );
        true
    })
}

/// A chat template; after a zero byte, the messages as JSON.
pub fn chat_template(data: &[u8]) -> bool {
    let mut parts = data.splitn(2, |&b| b == 0);
    let Some(Ok(source)) = parts.next().map(std::str::from_utf8) else { return false };
    let given = parts.next().and_then(|json| serde_json::from_slice::<Vec<[String; 2]>>(json).ok());
    let messages = given.map_or_else(
        || {
            vec![
                Message::new("system", "Be brief."),
                Message::new("user", "Hi\n"),
                Message::new("assistant", "<think>a</think>b"),
            ]
        },
        |pairs| pairs.into_iter().map(|[role, content]| Message::new(role, content)).collect(),
    );
    render(source, &messages)
}

/// Everything about the model at `path` that `run`, `info` and `logits` ask for.
fn open(path: &Path) -> bool {
    let Ok(file) = Checkpoint::open(path) else { return false };
    for info in file.tensors() {
        let Ok(tensor) = file.tensor(&info.name) else { continue };
        // One after another: each decoded form goes before the next is made.
        let _ = tensor.to_ternary().map(drop);
        let _ = tensor.to_dense().map(drop);
        let _ = tensor.recognise_ternary().map(drop);
        let _ = tensor.to_f32().map(drop);
    }
    if let Ok(tokenizer) = Tokenizer::of(&file) {
        use_tokenizer(&tokenizer, &["Hello  world"]);
        if let Some(template) = tokenizer.chat_template() {
            render(template, &[Message::new("user", "Hi")]);
        }
    }
    let _ = Recommended::of(&file);
    let Ok(config) = ModelConfig::of(&file) else { return false };
    let _ = setun::inspect::survey(&file, Some(&config), &|_| {}).map(drop);
    let vocabulary = config.vocab_size as u32;
    let options = EngineOptions { threads: Some(1), ..EngineOptions::default() };
    let Ok(engine) = Engine::load(&file, config, &options) else { return false };
    let mut session = engine.session(KvType::F16, Some(4));
    let _ = session.feed(&[0, vocabulary.saturating_sub(1)]).map(drop);
    session.feed(&[1]).is_ok()
}

fn use_tokenizer(tokenizer: &Tokenizer, texts: &[&str]) {
    for text in texts {
        for ids in [tokenizer.encode(text, true), tokenizer.encode_prompt(text)].into_iter().flatten() {
            let _ = tokenizer.decode(&ids, false);
            let mut stream = StreamDecoder::new(tokenizer, true);
            for &id in ids.iter().take(1000) {
                let _ = stream.push(id);
            }
            let _ = stream.finish();
        }
    }
    let _ = tokenizer.decode(&[0, 1, u32::MAX], true);
    let _ = tokenizer.id_to_token(tokenizer.vocab_size() as u32);
    let _ = tokenizer.to_json().map(drop);
    let _ = tokenizer.gguf_entries().map(drop);
}

fn render(source: &str, messages: &[Message]) -> bool {
    let Ok(template) = ChatTemplate::new(source) else { return false };
    let tools = serde_json::json!({"tools": [{"name": "f", "parameters": {"a": [1, 2.5, null, true]}}]});
    [true, false].into_iter().all(|add_generation_prompt| {
        let context = Context {
            add_generation_prompt,
            bos_token: "<s>".into(),
            eos_token: "</s>".into(),
            extra: tools.as_object().cloned().unwrap_or_default(),
        };
        template.render(messages, &context).is_ok()
    })
}
