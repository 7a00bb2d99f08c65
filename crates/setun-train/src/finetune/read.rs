//! Files to examples.
//!
//! - `NAME.jsonl`: a line is a document, `{"text": …}`, or a conversation, `{"messages": [{"role": …, "content": …}, …]}`.
//! - other files and folders: as in pre-training, text with `<|endoftext|>` lines between documents, Parquet; all of them may be compressed.
//!
//! A document begins as the tokenizer begins a prompt (with BOS, where it has one) and ends with the model's end of text.
//! Special tokens written out in text are recognised, as they are in prompts.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;

use serde_json::Value;
use setun::chat::{Chat, Message};
use setun::config::ModelConfig;
use setun::tokenizer::Tokenizer;

use super::chat;
use super::examples::Example;
use crate::data::documents::{self, Documents, TextFile};
use crate::error::TrainError;

/// Everything in `paths`.
///
/// # Errors
/// When a file cannot be read, a line is none of these, or a conversation cannot be rendered: with file and line.
pub fn examples(
    paths: &[PathBuf],
    tokenizer: &Tokenizer,
    config: &ModelConfig,
    chat: Option<&Chat>,
) -> Result<Vec<Example>, TrainError> {
    let mut found = Vec::new();
    for file in documents::files(paths, None)? {
        if !file.is_jsonl() {
            for document in Documents::new(vec![file]) {
                found.extend(self::document(&document?, tokenizer, config)?);
            }
            continue;
        }
        for_each_line(&file, |line| match (&line["text"], &line["messages"]) {
            (Value::String(text), Value::Null) => {
                let made = self::document(text.trim(), tokenizer, config).map_err(|e| e.to_string())?;
                found.extend(made);
                Ok(())
            }
            (Value::Null, Value::Array(_)) => {
                let Some(chat) = chat else {
                    return Err(
                        "it holds a conversation, but the model has no chat template: name one with \
                                --chat-template"
                            .into(),
                    );
                };
                found.extend(chat::examples(chat, tokenizer, config, &messages(&line["messages"])?)?);
                Ok(())
            }
            _ => Err("a `text` (a string) or `messages` (a list) is expected, and not both".into()),
        })?;
    }
    Ok(found)
}

/// A document; none of an empty one.
fn document(text: &str, tokenizer: &Tokenizer, config: &ModelConfig) -> Result<Option<Example>, TrainError> {
    if text.is_empty() {
        return Ok(None);
    }
    let mut tokens = tokenizer.encode_prompt(text)?;
    tokens.extend(end_of_text(tokenizer, config));
    Ok(Example::new(&tokens, |_| true, text.len() as u64, false))
}

/// The token that ends a text.
pub(crate) fn end_of_text(tokenizer: &Tokenizer, config: &ModelConfig) -> Option<u32> {
    config.eos.first().or(tokenizer.eos_ids().first()).copied()
}

/// The messages of a conversation.
pub(crate) fn messages(list: &Value) -> Result<Vec<Message>, String> {
    let all = list.as_array().map(Vec::as_slice).unwrap_or_default();
    let message = |(n, m): (usize, &Value)| match (m["role"].as_str(), m["content"].as_str()) {
        (Some(role), Some(content)) => Ok(Message::new(role, content)),
        _ => Err(format!("message {} has no `role` and `content` that are strings", n + 1)),
    };
    let messages: Vec<Message> = all.iter().enumerate().map(message).collect::<Result<_, _>>()?;
    match messages.iter().any(|m| m.role == chat::ASSISTANT) {
        true => Ok(messages),
        false => Err("none of its messages has the role `assistant`, so there is nothing to learn".into()),
    }
}

/// Hands every JSON object of a file to `take`, whose complaint becomes an error with file and line.
pub(crate) fn for_each_line(
    file: &TextFile,
    mut take: impl FnMut(Value) -> Result<(), String>,
) -> Result<(), TrainError> {
    let path = file.path();
    let mut lines = BufReader::with_capacity(1 << 20, file.open()?);
    let mut bytes = Vec::new();
    for number in 1.. {
        bytes.clear();
        if lines.read_until(b'\n', &mut bytes).map_err(|e| TrainError::read(path, e))? == 0 {
            break;
        }
        let at = |what: String| TrainError::file(path, format!("line {number}: {what}"));
        let text = bytes.strip_prefix(b"\xef\xbb\xbf").filter(|_| number == 1).unwrap_or(&bytes);
        if text.trim_ascii().is_empty() {
            continue;
        }
        let line: Value = serde_json::from_slice(text).map_err(|e| at(format!("not a JSON object: {e}")))?;
        if !line.is_object() {
            return Err(at("a JSON object is expected".into()));
        }
        take(line).map_err(at)?;
    }
    Ok(())
}
