//! The chat templates of a model's files: several names, several places, one precedence.
//!
//! For each name the first place that has it counts, newest convention first, as in `transformers`:
//! `chat_template.jinja` and `additional_chat_templates/NAME.jinja`, then `tokenizer_config.json` (one text, or a list of
//! names), then `chat_template.json`. GGUF: `tokenizer.chat_template` and `tokenizer.chat_template.NAME`.

use super::folder::optional_json;
use crate::error::ModelError;
use crate::format::gguf::{Array, Metadata, Value};
use serde_json::Value as Json;
use std::io::Read;
use std::path::Path;

/// The one that is used unless another is asked for.
pub const DEFAULT: &str = "default";
const KEY: &str = "tokenizer.chat_template";
const NAMES_KEY: &str = "tokenizer.chat_templates";
/// More than any template that is run may have; a longer file is no template.
const MAX_BYTES: u64 = 1 << 20;

/// A chat template, not parsed yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedTemplate {
    /// `default`, `tool_use`, …
    pub name: String,
    /// The file or key it was found in.
    pub origin: String,
    /// Jinja source.
    pub source: String,
}

/// All that were found, and what is to be said about them.
#[derive(Debug, Default)]
pub(super) struct Templates {
    pub(super) list: Vec<NamedTemplate>,
    pub(super) notes: Vec<String>,
}

impl Templates {
    pub(super) fn get(&self, name: &str) -> Option<&NamedTemplate> {
        self.list.iter().find(|template| template.name == name)
    }

    fn add(&mut self, name: &str, origin: &str, source: &str) {
        let Some(first) = self.get(name) else {
            let (name, origin, source) = (name.to_owned(), origin.to_owned(), source.to_owned());
            return self.list.push(NamedTemplate { name, origin, source });
        };
        if first.source.trim_end() != source.trim_end() {
            self.notes.push(format!(
                "{} and {origin} hold different chat templates named `{name}`: the one in {} is used, as transformers does",
                first.origin, first.origin
            ));
        }
    }

    /// One text, or a list (or map) of named ones.
    fn add_json(&mut self, value: &Json, origin: &str) {
        if let Some(source) = value.as_str() {
            self.add(DEFAULT, origin, source);
        }
        for entry in value.as_array().into_iter().flatten() {
            if let (Some(name), Some(source)) = (entry["name"].as_str(), entry["template"].as_str()) {
                self.add(name, origin, source);
            }
        }
        for (name, source) in value.as_object().into_iter().flatten() {
            if let Some(source) = source.as_str() {
                self.add(name, origin, source);
            }
        }
    }

    fn finish(mut self) -> Self {
        if !self.list.is_empty() && self.get(DEFAULT).is_none() {
            let names: Vec<String> = self.list.iter().map(|t| format!("`{}`", t.name)).collect();
            let what = "chat templates have names, but none is `default`, so one must be asked for";
            self.notes.push(format!("{what}: {}", names.join(", ")));
        }
        self
    }

    /// # Errors
    /// [`ModelError::Read`], or [`ModelError::Format`] for files that are no text or no JSON.
    pub(super) fn of_folder(folder: &Path, tokenizer_config: &Json) -> Result<Self, ModelError> {
        let mut found = Self::default();
        if let Some(source) = text(&folder.join("chat_template.jinja"))? {
            found.add(DEFAULT, "chat_template.jinja", &source);
        }
        let more = folder.join("additional_chat_templates");
        let mut files: Vec<_> = std::fs::read_dir(&more).into_iter().flatten().flatten().collect();
        files.sort_by_key(std::fs::DirEntry::file_name);
        for path in files.iter().map(std::fs::DirEntry::path) {
            let name = path.file_stem().and_then(|name| name.to_str());
            if let (Some(name), Some("jinja")) = (name, path.extension().and_then(|end| end.to_str()))
                && let Some(source) = text(&path)?
            {
                found.add(name, &format!("additional_chat_templates/{name}.jinja"), &source);
            }
        }
        found.add_json(&tokenizer_config["chat_template"], "tokenizer_config.json");
        let processor = optional_json(&folder.join("chat_template.json"))?;
        found.add_json(&processor["chat_template"], "chat_template.json");
        Ok(found.finish())
    }

    /// # Errors
    /// [`ModelError::Metadata`] for a key of another type.
    pub(super) fn of_gguf(metadata: &Metadata) -> Result<Self, ModelError> {
        let mut found = Self::default();
        if let Some(source) = metadata.str(KEY)? {
            found.add(DEFAULT, KEY, source);
        }
        let named = |key: &str| key.strip_prefix(KEY)?.strip_prefix('.').map(str::to_owned);
        for (key, name) in metadata.iter().filter_map(|(key, _)| Some((key, named(key)?))) {
            if let Some(source) = metadata.str(key)? {
                found.add(&name, key, source);
            }
        }
        Ok(found.finish())
    }

    /// The keys that [`Templates::of_gguf`] reads.
    pub(super) fn gguf_entries(&self) -> Vec<(String, Value)> {
        let mut names = Vec::new();
        let mut entries: Vec<(String, Value)> = Vec::new();
        for template in &self.list {
            let key = match template.name.as_str() {
                DEFAULT => KEY.to_owned(),
                name => {
                    names.push(name.to_owned());
                    format!("{KEY}.{name}")
                }
            };
            entries.push((key, Value::String(template.source.clone())));
        }
        if !names.is_empty() {
            entries.push((NAMES_KEY.to_owned(), Value::Array(Array::String(names))));
        }
        entries
    }
}

/// A text file that may be absent.
fn text(path: &Path) -> Result<Option<String>, ModelError> {
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(ModelError::read(path, source)),
    };
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(|source| ModelError::read(path, source))?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(ModelError::format(
            path,
            format!("longer than the {MAX_BYTES} bytes of any chat template"),
        ));
    }
    String::from_utf8(bytes).map(Some).map_err(|_| ModelError::format(path, "not UTF-8 text"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("additional_chat_templates")).unwrap();
        for (name, text) in files {
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        folder
    }

    #[test]
    fn the_newest_place_wins_and_a_contradiction_is_told() {
        let config = json!({ "chat_template": [{ "name": "default", "template": "B" }, { "name": "rag", "template": "R" }] });
        let files = [
            ("chat_template.jinja", "A"),
            ("chat_template.json", r#"{"chat_template": "A\n"}"#),
            ("additional_chat_templates/tool_use.jinja", "T"),
            ("additional_chat_templates/readme.md", "no template"),
        ];
        let found = Templates::of_folder(folder(&files).path(), &config).unwrap();
        let list: Vec<_> = found.list.iter().map(|t| (t.name.as_str(), t.source.as_str())).collect();
        assert_eq!(list, [("default", "A"), ("tool_use", "T"), ("rag", "R")]);
        assert_eq!(found.notes.len(), 1);
        assert!(
            found.notes[0].starts_with("chat_template.jinja and tokenizer_config.json"),
            "{:?}",
            found.notes
        );

        let older = Templates::of_folder(folder(&files[1..2]).path(), &Json::Null).unwrap();
        assert_eq!(older.get(DEFAULT).unwrap().origin, "chat_template.json");
        let config =
            Templates::of_folder(folder(&files[1..2]).path(), &json!({"chat_template": "C"})).unwrap();
        assert_eq!(config.get(DEFAULT).unwrap().source, "C");
    }

    #[test]
    fn names_without_a_default_are_told_and_files_that_are_no_text_refused() {
        let config = json!({ "chat_template": { "tool_use": "T" } });
        let found = Templates::of_folder(folder(&[]).path(), &config).unwrap();
        assert!(found.get(DEFAULT).is_none() && found.notes[0].contains("`tool_use`"));
        let broken = folder(&[]);
        std::fs::write(broken.path().join("chat_template.jinja"), [0xff, 0xfe]).unwrap();
        let error = Templates::of_folder(broken.path(), &Json::Null).unwrap_err().to_string();
        assert!(error.contains("chat_template.jinja") && error.contains("UTF-8"), "{error}");
    }

    #[test]
    fn named_templates_survive_gguf() {
        let config = json!({ "chat_template": [{ "name": "rag", "template": "R" }, { "name": "default", "template": "D" }] });
        let found = Templates::of_folder(folder(&[]).path(), &config).unwrap();
        let mut metadata = Metadata::new();
        for (key, value) in found.gguf_entries() {
            metadata.insert(key, value);
        }
        let again = Templates::of_gguf(&metadata).unwrap();
        for name in ["default", "rag"] {
            assert_eq!(again.get(name).unwrap().source, found.get(name).unwrap().source);
        }
        assert_eq!(again.get("rag").unwrap().origin, "tokenizer.chat_template.rag");
        assert_eq!(again.list.len(), 2);
    }
}
