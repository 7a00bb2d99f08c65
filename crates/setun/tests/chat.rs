//! Conversations: templates against `transformers`, where turns end, thinking, system messages.

use std::path::{Path, PathBuf};

use serde_json::Value;
use setun::chat::{Chat, ChatTemplate, Context, Message, TurnEnd};
use setun::config::ModelConfig;
use setun::format::Checkpoint;
use setun::format::gguf::Metadata;
use setun::tokenizer::Tokenizer;

fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden").join(path)
}

/// A real tokenizer with special tokens `<|begin_of_text|>`, `<|end_of_text|>` and `<|eot_id|>`.
fn tokenizer() -> Tokenizer {
    Tokenizer::from_folder(&golden("models/bitnet-tied-packed-small")).unwrap()
}

#[test]
fn templates_render_letter_for_letter_as_in_transformers() {
    let cases: Vec<Value> =
        serde_json::from_slice(&std::fs::read(golden("chat/cases.json")).unwrap()).unwrap();
    assert!(cases.len() >= 40);
    for case in &cases {
        let name = case["template"].as_str().unwrap();
        let source = std::fs::read_to_string(golden("chat/templates").join(name)).unwrap();
        let mut extra = case["context"].as_object().unwrap().clone();
        let messages = extra.remove("messages").unwrap();
        let text = |key: &str| case["context"][key].as_str().unwrap().to_owned();
        let context = Context {
            add_generation_prompt: case["context"]["add_generation_prompt"] == true,
            bos_token: text("bos_token"),
            eos_token: text("eos_token"),
            extra,
        };
        let rendered = ChatTemplate::new(&source).unwrap().render(messages.as_array().unwrap(), &context);
        match case["rendered"].as_str() {
            Some(expected) => assert_eq!(rendered.unwrap(), expected, "{name}: {}", case["context"]),
            None => {
                let (error, said) = (rendered.unwrap_err().to_string(), case["message"].as_str().unwrap());
                assert!(error.contains(said), "{name}: {error}, not {said}");
            }
        }
    }
}

#[test]
fn a_turn_ends_with_what_the_template_writes_behind_an_answer() {
    let tokenizer = tokenizer();
    let end = |source: &str| Chat::with_template(&tokenizer, source, "test").unwrap().turn_end().clone();
    let each = |after: &str| {
        format!("{{% for m in messages %}}{{{{ m.role }}}}: {{{{ m.content }}}}{after}{{% endfor %}}")
    };
    let id = |token: &str| TurnEnd::Token(tokenizer.token_to_id(token).unwrap());
    assert_eq!(end(&each("<|eot_id|>\n")), id("<|eot_id|>"));
    assert_eq!(end(&each(" {{ eos_token }}")), id("<|end_of_text|>"));
    assert_eq!(
        end(&each("\n<|im_end|>\n")),
        TurnEnd::Text("<|im_end|>".into()),
        "no token of this vocabulary"
    );
    assert_eq!(end(&each("\n")), TurnEnd::Unknown);
    assert_eq!(end(&each("\nso <b> it is")), TurnEnd::Unknown);
    assert_eq!(end("{{ raise_exception('never') }}"), TurnEnd::Unknown);
}

#[test]
fn a_2b_4t_without_a_template_has_that_of_its_model_card_and_others_have_none() {
    let file = |path: &str| Checkpoint::open(golden(path)).unwrap();
    let bitnet = file("models/bitnet-tied-packed-small-gguf/bitnet-tied-packed-small-i2_s.gguf");
    let mut metadata = Metadata::new();
    for (key, value) in
        bitnet.gguf_metadata().unwrap().iter().filter(|(key, _)| !key.contains("chat_template"))
    {
        metadata.insert(key, value.clone());
    }
    let tokenizer = Tokenizer::from_gguf(&metadata).unwrap();
    let config = ModelConfig::of(&bitnet).unwrap();
    let chat = Chat::of(&tokenizer, Some(&config), None).unwrap().unwrap();
    assert!(chat.origin().contains("model card"), "{}", chat.origin());
    let messages = [Message::new("system", "Be brief."), Message::new("user", " Who is Jim? ")];
    let expected = "System: Be brief.<|eot_id|>User: Who is Jim?<|eot_id|>Assistant: ";
    assert_eq!(chat.render(&messages, None, true).unwrap(), expected);
    let ids = chat.prompt(&messages, None).unwrap().ids;
    assert_eq!(ids.iter().filter(|&&id| Some(id) == tokenizer.bos()).count(), 1);
    assert_eq!(*chat.turn_end(), TurnEnd::Token(tokenizer.token_to_id("<|eot_id|>").unwrap()));

    let llama =
        ModelConfig::of(&file("models/llama-bitnet-packed-gguf/llama-bitnet-packed-tq2_0.gguf")).unwrap();
    assert!(Chat::of(&tokenizer, Some(&llama), None).unwrap().is_none());
    let error = Chat::of(&tokenizer, Some(&config), Some("tool_use")).unwrap_err().to_string();
    assert!(error.contains("`tool_use`") && error.contains("none"), "{error}");
}

#[test]
fn thinking_is_asked_for_by_the_template_and_begins_where_it_leaves_off() {
    let file = Checkpoint::open(golden("bonsai/qwen3-tied/model-tq1_0.gguf")).unwrap();
    let tokenizer = Tokenizer::of(&file).unwrap();
    let chat = Chat::of(&tokenizer, None, None).unwrap().unwrap();
    assert_eq!(chat.tags().unwrap().close, "</think>");
    let messages = [Message::new("user", "What does <think> mean?")];
    let end = |thinking| chat.render(&messages, thinking, true).unwrap();
    assert!(end(None).ends_with("<|im_start|>assistant\n") && end(None) == end(Some(true)));
    assert!(end(Some(false)).ends_with("<|im_start|>assistant\n<think>\n\n</think>\n\n"));
    for thinking in [None, Some(true), Some(false)] {
        assert!(!chat.prompt(&messages, thinking).unwrap().thinking, "the user's tag opens nothing");
    }
    let source = std::fs::read_to_string(golden("chat/templates/opens_think.jinja")).unwrap();
    let opening = Chat::with_template(&tokenizer, &source, "test").unwrap();
    assert!(opening.prompt(&messages, None).unwrap().thinking);
}

#[test]
fn a_system_message_that_does_not_arrive_is_an_error_with_the_reason() {
    let tokenizer = tokenizer();
    let check = |source: &str| Chat::with_template(&tokenizer, source, "test").unwrap().check_system();
    let source = std::fs::read_to_string(golden("chat/templates/alternating.jinja")).unwrap();
    let error = check(&source).unwrap_err().to_string();
    assert!(error.contains("System role not supported") && error.contains("first message"), "{error}");
    let silent = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}";
    assert!(check(silent).unwrap_err().to_string().contains("leaves system messages out"));
    check("{% for m in messages %}{{ m.content }}{% endfor %}").unwrap();
}

#[test]
fn every_place_that_names_an_end_token_counts_and_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let put = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    let from = golden("models/bitnet-tied-packed-small/tokenizer.json");
    std::fs::copy(from, folder.path().join("tokenizer.json")).unwrap();
    put("tokenizer_config.json", r#"{"eos_token": {"content": "<|end_of_text|>"}}"#);
    put("generation_config.json", r#"{"eos_token_id": [318, 7]}"#);
    put("config.json", r#"{"eos_token_id": 8}"#);
    let tokenizer = Tokenizer::from_folder(folder.path()).unwrap();
    assert_eq!(tokenizer.eos_ids(), [318, 7, 8, 319]);
    let sources: Vec<Vec<&str>> = tokenizer.ends().map(|(_, sources)| sources.to_vec()).collect();
    assert_eq!(sources[0][..2], ["tokenizer_config.json: eos_token", "generation_config.json: eos_token_id"]);
    assert_eq!(sources[2], ["config.json: eos_token_id"]);
    assert_eq!(sources[3], ["its name"]);

    let mut metadata = Metadata::new();
    for (key, value) in tokenizer.gguf_entries().unwrap() {
        metadata.insert(key, value);
    }
    use setun::format::gguf::{Array, Value};
    metadata.insert("tokenizer.ggml.eot_token_id", Value::U32(9));
    metadata.insert("tokenizer.ggml.eog_token_ids", Value::Array(Array::I32(vec![10, -1, 9])));
    let tokenizer = Tokenizer::from_gguf(&metadata).unwrap();
    assert_eq!(tokenizer.eos_ids(), [318, 9, 10, 319]);
}
