//! Documents of text and JSONL files, compressed or not.

use std::io::{BufRead, BufReader, Read};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

use super::{LONGEST, TextFile, trimmed};
use crate::error::TrainError;
use crate::vocabulary::END_OF_TEXT;

pub(super) struct Lines {
    file: TextFile,
    json: bool,
    lines: BufReader<Box<dyn Read + Send>>,
    /// Lines read.
    line: usize,
    buffer: Vec<u8>,
}

impl Lines {
    pub(super) fn open(file: TextFile, json: bool, read: &Arc<AtomicU64>) -> Result<Self, TrainError> {
        let lines = BufReader::with_capacity(1 << 18, file.compression.open(&file.path, read)?);
        Ok(Self { file, json, lines, line: 0, buffer: Vec::new() })
    }

    /// The next line, without its end; `None` at the end of the file.
    fn line(&mut self) -> Result<Option<&str>, TrainError> {
        self.buffer.clear();
        let path = &self.file.path;
        let read = (&mut self.lines).take(LONGEST as u64 + 1).read_until(b'\n', &mut self.buffer);
        if read.map_err(|e| self.file.compression.failure(path, self.line, e))? == 0 {
            return Ok(None);
        }
        self.line += 1;
        if self.buffer.len() > LONGEST {
            let what = format!("line {} is longer than {} MiB", self.line, LONGEST >> 20);
            return Err(TrainError::file(path, what));
        }
        let bytes = if self.line == 1 {
            self.buffer.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&self.buffer)
        } else {
            &self.buffer
        };
        let bytes = bytes.strip_suffix(b"\n").unwrap_or(bytes);
        let bytes = bytes.strip_suffix(b"\r").unwrap_or(bytes);
        std::str::from_utf8(bytes).map(Some).map_err(|e| {
            let what = format!("line {} is not UTF-8 from its byte {}", self.line, e.valid_up_to() + 1);
            TrainError::file(path, what)
        })
    }

    pub(super) fn document(&mut self) -> Result<Option<String>, TrainError> {
        if self.json {
            return self.json_document();
        }
        let mut text = String::new();
        while let Some(line) = self.line()? {
            if line.trim() != END_OF_TEXT {
                text.push_str(line);
                text.push('\n');
                if text.len() < LONGEST {
                    continue;
                }
            }
            if let Some(document) = trimmed(&text) {
                return Ok(Some(document));
            }
            text.clear();
        }
        Ok(trimmed(&text))
    }

    fn json_document(&mut self) -> Result<Option<String>, TrainError> {
        let field = self.file.field.clone();
        while let Some(line) = self.line()? {
            if line.trim().is_empty() {
                continue;
            }
            let mut parser = serde_json::Deserializer::from_str(line);
            let text = parser.deserialize_map(Field(&field)).and_then(|text| parser.end().map(|()| text));
            let text = text.map_err(|e| {
                let what = format!("line {} is not a JSON object with a string `{field}`: {e}", self.line);
                TrainError::file(&self.file.path, what)
            })?;
            if let Some(document) = trimmed(&text) {
                return Ok(Some(document));
            }
        }
        Ok(None)
    }
}

/// Reads one string field of an object and passes over the others.
struct Field<'a>(&'a str);

impl<'de> Visitor<'de> for Field<'_> {
    type Value = String;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "an object with a string `{}`", self.0)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<String, A::Error> {
        use serde::de::Error;
        let (mut found, mut others) = (None, Vec::new());
        while let Some(key) = object.next_key::<String>()? {
            if key == self.0 {
                if found.replace(object.next_value()?).is_some() {
                    return Err(A::Error::custom(format!("`{key}` is there twice")));
                }
            } else {
                object.next_value::<IgnoredAny>()?;
                others.push(format!("`{key}`"));
            }
        }
        found.ok_or_else(|| match others.is_empty() {
            true => A::Error::custom("it has no fields"),
            false => {
                A::Error::custom(format!("its fields are {}; choose one by text_field", others.join(", ")))
            }
        })
    }
}
