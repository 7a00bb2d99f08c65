//! Where a model's tokenizer is: inside its GGUF file, in its folder, or in a file of its own.

use super::{Tokenizer, in_file};
use crate::error::ModelError;
use crate::format::{Checkpoint, gguf};
use std::path::Path;

impl Tokenizer {
    /// The tokenizer that belongs to `file`: from its GGUF metadata, else from the folder it lies in.
    ///
    /// # Errors
    /// [`ModelError::Unsupported`] if there is none; else as [`Tokenizer::from_gguf`] and [`Tokenizer::from_folder`].
    pub fn of(file: &Checkpoint) -> Result<Self, ModelError> {
        if let Some(metadata) = file.gguf_metadata()
            && metadata.get("tokenizer.ggml.model").is_some()
        {
            return Self::from_gguf(metadata).map_err(|error| in_file(file.path(), error));
        }
        match file.folder() {
            Some(folder) if holds_tokenizer(folder) => Self::from_folder(folder),
            _ => Err(ModelError::unsupported(
                file.path(),
                "the model comes without a tokenizer: neither its metadata nor a tokenizer.json or tokenizer.model beside it \
                 holds one, so name one",
            )),
        }
    }

    /// The tokenizer at `path`: a model folder, a GGUF file, a `tokenizer.json` or a SentencePiece model, told apart by
    /// their contents.
    ///
    /// # Errors
    /// [`ModelError::Read`] if it cannot be read; else as the readers of these formats.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let found = std::fs::metadata(path).map_err(|source| ModelError::read(path, source))?;
        if found.is_dir() {
            // A folder may hold a GGUF file alone, which carries its own.
            return if holds_tokenizer(path) {
                Self::from_folder(path)
            } else {
                Self::of(&Checkpoint::open(path)?)
            };
        }
        let mut start = [0; 64];
        let read = std::fs::File::open(path).and_then(|mut f| std::io::Read::read(&mut f, &mut start));
        let read = read.map_err(|source| ModelError::read(path, source))?;
        match &start[..read] {
            magic if magic.starts_with(gguf::MAGIC) => Self::of(&Checkpoint::open(path)?),
            // A SentencePiece model begins with a line feed too: the tag of its first field.
            text if text.trim_ascii_start().starts_with(b"{") => Self::from_json_file(path),
            _ => {
                let bytes = std::fs::read(path).map_err(|source| ModelError::read(path, source))?;
                Self::from_sentencepiece(&bytes).map_err(|error| in_file(path, error))
            }
        }
    }
}

fn holds_tokenizer(folder: &Path) -> bool {
    ["tokenizer.json", "tokenizer.model"].iter().any(|name| folder.join(name).exists())
}
