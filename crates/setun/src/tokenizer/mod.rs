//! Text to token ids and back: `tokenizer.json`, `tokenizer.model`, and vocabularies inside GGUF.
//!
//! Two engines stand behind [`Tokenizer`]. The `tokenizers` crate runs whatever a `tokenizer.json`
//! describes, and the byte-level BPE and WordPiece vocabularies of GGUF. SentencePiece vocabularies run
//! on `spm`, because scores with ties cannot be written as a merge list. Which special tokens
//! go before and after a text is found once, at load, and is the same for both engines.
//!
//! Whatever a file claims is checked before it is used; docs/tokenizers.md lists what is refused.

mod decode;
mod ends;
mod find;
mod folder;
mod gguf;
mod hf;
mod pre;
mod sentencepiece;
mod spm;
mod stream;
mod templates;

pub use stream::StreamDecoder;
pub use templates::NamedTemplate;

use crate::error::ModelError;
use crate::format::gguf::{Metadata, Value};
use decode::{DecodeState, Spelling};
use ends::Ends;
use spm::{Kind, Spm};
use std::collections::HashSet;
use std::path::Path;
use templates::{DEFAULT, Templates};

/// A vocabulary with the rules for using it.
#[derive(Debug)]
pub struct Tokenizer {
    engine: Engine,
    /// How single tokens become bytes; `None` when only the whole sequence can be decoded.
    spelling: Option<Spelling>,
    special: HashSet<u32>,
    vocab_size: usize,
    bos: Option<u32>,
    ends: Ends,
    /// Ids that `add_special` puts before and after a text.
    before: Vec<u32>,
    after: Vec<u32>,
    templates: Templates,
}

#[derive(Debug)]
enum Engine {
    Hf(Box<tokenizers::Tokenizer>),
    Spm(Box<Spm>),
}

impl Tokenizer {
    /// Reads a `tokenizer.json` alone. BOS and EOS are then those that its post-processor adds, and the
    /// well-known names; [`Tokenizer::from_folder`] also reads the files beside it.
    ///
    /// # Errors
    /// [`ModelError::Read`], or [`ModelError::Tokenizer`] with what is wrong in the file.
    pub fn from_json_file(path: &Path) -> Result<Self, ModelError> {
        let bytes = std::fs::read(path).map_err(|source| ModelError::read(path, source))?;
        Self::from_json_bytes(&bytes).map_err(|error| in_file(path, error))
    }

    /// As [`Tokenizer::from_json_file`], from memory.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] with what is wrong.
    pub fn from_json_bytes(bytes: &[u8]) -> Result<Self, ModelError> {
        hf::from_json(bytes)
    }

    /// Reads the `tokenizer.ggml.*` keys of a GGUF file.
    ///
    /// Models `gpt2`, `llama`, `bert` and `t5` are read; `gpt2` only with a `pre` whose split rules are
    /// known. A missing `pre` beside a Llama-3 vocabulary means `llama-bpe`.
    ///
    /// # Errors
    /// [`ModelError::Metadata`] for keys that are missing or of the wrong type, [`ModelError::Tokenizer`]
    /// for contradictions and for models and `pre` rules that are not known.
    pub fn from_gguf(metadata: &Metadata) -> Result<Self, ModelError> {
        gguf::read(metadata)
    }

    /// Reads a SentencePiece model file (`tokenizer.model`): BPE or unigram.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] for damaged files and for other model types.
    pub fn from_sentencepiece(bytes: &[u8]) -> Result<Self, ModelError> {
        let spm = sentencepiece::read(bytes)?;
        let unigram = spm.rules.algorithm == spm::Algorithm::Unigram;
        let (before, after) = match (unigram, spm.bos, spm.eos) {
            // T5 and its kin end a text with EOS; Llama and its kin begin it with BOS.
            (true, _, eos) => (Vec::new(), eos.into_iter().collect()),
            (false, bos, _) => (bos.into_iter().collect(), Vec::new()),
        };
        Ok(Self::from_spm(spm, before, after))
    }

    /// Reads a model folder in Hugging Face's layout: `tokenizer.json`, else `tokenizer.model`; then BOS,
    /// EOS and the chat template from `tokenizer_config.json`, `generation_config.json`, `config.json`
    /// and `chat_template.jinja` (and its kin, see [`Tokenizer::chat_templates`]), as far as they exist.
    ///
    /// # Errors
    /// [`ModelError::Read`] if neither tokenizer file exists, [`ModelError::Tokenizer`] with the file's
    /// name if one is damaged.
    pub fn from_folder(folder: &Path) -> Result<Self, ModelError> {
        folder::read(folder)
    }

    fn from_spm(spm: Spm, before: Vec<u32>, after: Vec<u32>) -> Self {
        let special: HashSet<u32> = (0u32..)
            .zip(&spm.pieces)
            .filter(|(_, piece)| matches!(piece.kind, Kind::Control | Kind::Unknown))
            .map(|(id, _)| id)
            .collect();
        let mut tokenizer = Self {
            spelling: Some(Spelling::SentencePiece { strip: spm.rules.add_prefix }),
            special,
            vocab_size: spm.pieces.len(),
            bos: spm.bos,
            ends: Ends::of(spm.eos, "the vocabulary's own EOS"),
            before,
            after,
            templates: Templates::default(),
            engine: Engine::Spm(Box::new(spm)),
        };
        tokenizer.add_known_ends();
        tokenizer
    }

    /// Ids of `text`. Special tokens written out in the text are recognised. `add_special` adds what the
    /// model expects around a text, such as BOS.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] if the engine refuses, for example an unknown character in a vocabulary
    /// without an unknown token.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, ModelError> {
        let ids = self.encode_bare(text)?;
        if !add_special {
            return Ok(ids);
        }
        Ok([&self.before, ids.as_slice(), &self.after].concat())
    }

    /// Ids of a prompt to be continued: with what goes before a text but nothing after it, and without a
    /// second BOS when the text (a rendered chat template) begins with one.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        let ids = self.encode_bare(text)?;
        if ids.first().is_some_and(|first| self.before.contains(first) || self.bos == Some(*first)) {
            return Ok(ids);
        }
        Ok([self.before.as_slice(), &ids].concat())
    }

    fn encode_bare(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        match &self.engine {
            Engine::Hf(inner) => hf::encode(inner, text),
            Engine::Spm(spm) => Ok(spm.encode(text)),
        }
    }

    /// Text of `ids`; invalid UTF-8 becomes U+FFFD. Ids outside the vocabulary give no text (models pad
    /// their embeddings beyond it). `skip_special` leaves control tokens out.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] if the engine's decoder refuses.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, ModelError> {
        if self.spelling.is_none()
            && let Engine::Hf(inner) = &self.engine
        {
            return hf::decode(inner, ids, skip_special);
        }
        let (mut state, mut bytes) = (DecodeState::default(), Vec::new());
        for &id in ids {
            self.push_bytes(id, skip_special, &mut state, &mut bytes);
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Appends one token's bytes; `false` if this vocabulary can only be decoded in whole sequences.
    fn push_bytes(&self, id: u32, skip: bool, state: &mut DecodeState, out: &mut Vec<u8>) -> bool {
        let Some(spelling) = self.spelling else {
            return false;
        };
        let special = self.special.contains(&id);
        if special && skip {
            return true;
        }
        match &self.engine {
            Engine::Hf(inner) => {
                if let Some(token) = inner.id_to_token(id) {
                    spelling.push(&token, state, out);
                }
            }
            Engine::Spm(spm) => match spm.pieces.get(id as usize) {
                // A space after a control token is the tokenizer's own as well: not `started`.
                Some(piece) if special => out.extend_from_slice(piece.text.as_bytes()),
                Some(piece) => match spm.byte_of(id) {
                    Some(byte) => {
                        out.push(byte);
                        state.started = true;
                    }
                    None => spelling.push(&piece.text, state, out),
                },
                None => {}
            },
        }
        true
    }

    /// The token as the vocabulary spells it (`Ġthe`, `▁the`, `<0x0A>`); `None` outside the vocabulary.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        match &self.engine {
            Engine::Hf(inner) => inner.id_to_token(id),
            Engine::Spm(spm) => spm.pieces.get(id as usize).map(|piece| piece.text.clone()),
        }
    }

    /// The id of a token spelled as in the vocabulary.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        match &self.engine {
            Engine::Hf(inner) => inner.token_to_id(token),
            Engine::Spm(spm) => spm.id(token),
        }
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The token that begins a text, if the model has one (it may have one and not use it).
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// Every id that ends generation, the declared one first.
    pub fn eos_ids(&self) -> &[u32] {
        self.ends.ids()
    }

    /// [`Tokenizer::eos_ids`], each with the files and keys that name it.
    pub fn ends(&self) -> impl Iterator<Item = (u32, &[&'static str])> {
        self.ends.iter()
    }

    /// Whether the token is a control token (BOS, EOS, end of turn), which `skip_special` leaves out.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.contains(&id)
    }

    /// The model's chat template, as Jinja source; see [`crate::chat`].
    pub fn chat_template(&self) -> Option<&str> {
        self.templates.get(DEFAULT).map(|template| template.source.as_str())
    }

    /// Every chat template of the model's files by name; [`Tokenizer::chat_template`] is the one named `default`.
    pub fn chat_templates(&self) -> &[NamedTemplate] {
        &self.templates.list
    }

    /// What a user should know about where the templates are: places that contradict each other, say.
    pub fn template_notes(&self) -> &[String] {
        &self.templates.notes
    }

    /// Text of a `tokenizer.json` that encodes and decodes as this tokenizer does. Of a SentencePiece
    /// vocabulary the merges are derived from the scores; where two pieces share a score, the file merges
    /// the lower id first, while SentencePiece merges the leftmost.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] if the rules cannot be written in that format.
    pub fn to_json(&self) -> Result<String, ModelError> {
        hf::to_json(self)
    }

    /// The `tokenizer.*` keys of a GGUF file from which [`Tokenizer::from_gguf`] makes the same ids.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] if GGUF has no name for this tokenizer's rules.
    pub fn gguf_entries(&self) -> Result<Vec<(String, Value)>, ModelError> {
        gguf::write(self)
    }

    /// Adds the well-known end tokens that the vocabulary has as control tokens.
    fn add_known_ends(&mut self) {
        for name in ends::NAMES {
            match self.token_to_id(name) {
                Some(id) if self.special.contains(&id) => self.ends.add(id, "its name"),
                _ => {}
            }
        }
    }
}

fn in_file(path: &Path, error: ModelError) -> ModelError {
    match error {
        ModelError::Tokenizer { what } => ModelError::format(path, what),
        other => other,
    }
}

fn refused(what: impl Into<String>) -> ModelError {
    ModelError::Tokenizer { what: what.into() }
}
