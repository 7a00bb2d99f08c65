//! Text from ids as they are generated, never half a character.

use super::Tokenizer;
use super::decode::{DecodeState, lossy_prefix};
use crate::error::ModelError;

/// Tokens looked back at when a decoder needs context (WordPiece, unigram files).
const WINDOW: usize = 8;

/// Decodes ids one at a time. The pieces put together equal [`Tokenizer::decode`] of all the ids.
///
/// Bytes of a character that is not complete yet are held back until it is, or until it cannot become
/// one (then U+FFFD stands for it, once per invalid sequence as in `String::from_utf8_lossy`).
pub struct StreamDecoder<'t> {
    tokenizer: &'t Tokenizer,
    skip_special: bool,
    /// Special tokens that give text all the same.
    shown: Vec<u32>,
    state: DecodeState,
    bytes: Vec<u8>,
    // Only for decoders that need neighbours: ids since `emitted` characters of their text were given out.
    ids: Vec<u32>,
    emitted: String,
}

impl<'t> StreamDecoder<'t> {
    /// Starts at the beginning of a text. With `skip_special`, control tokens give no text.
    pub fn new(tokenizer: &'t Tokenizer, skip_special: bool) -> Self {
        let (shown, bytes, ids, emitted) = Default::default();
        Self { tokenizer, skip_special, shown, state: DecodeState::default(), bytes, ids, emitted }
    }

    /// Lets these control tokens through: tags that the reader of the text looks for.
    pub fn showing(mut self, ids: &[u32]) -> Self {
        self.shown = ids.to_vec();
        self
    }

    /// Takes the next id and returns the text that has become certain, possibly none.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] if the tokenizer's decoder refuses.
    pub fn push(&mut self, id: u32) -> Result<String, ModelError> {
        let skip = self.skip_special && !self.shown.contains(&id);
        if self.tokenizer.push_bytes(id, skip, &mut self.state, &mut self.bytes) {
            return Ok(lossy_prefix(&mut self.bytes));
        }
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids, self.skip_special)?;
        // A trailing U+FFFD may be a character in the making.
        let certain = text.trim_end_matches('\u{fffd}');
        let Some(fresh) = certain.strip_prefix(self.emitted.as_str()) else {
            return Ok(String::new()); // The decoder changed its mind about the past: wait.
        };
        let fresh = fresh.to_owned();
        self.emitted.push_str(&fresh);
        if self.ids.len() > 2 * WINDOW && certain.len() == text.len() {
            self.shorten()?;
        }
        Ok(fresh)
    }

    /// Ends the text: what was held back, an incomplete character as U+FFFD.
    ///
    /// # Errors
    /// As [`StreamDecoder::push`].
    pub fn finish(mut self) -> Result<String, ModelError> {
        if !self.ids.is_empty() {
            let text = self.tokenizer.decode(&self.ids, self.skip_special)?;
            return Ok(text.strip_prefix(self.emitted.as_str()).unwrap_or_default().to_owned());
        }
        let mut text = lossy_prefix(&mut self.bytes);
        if !self.bytes.is_empty() {
            text.push('\u{fffd}');
        }
        Ok(text)
    }

    /// Forgets old ids, if the rest decodes to the end of what was given out (so nothing can differ later).
    fn shorten(&mut self) -> Result<(), ModelError> {
        let recent = self.ids[self.ids.len() - WINDOW..].to_vec();
        let text = self.tokenizer.decode(&recent, self.skip_special)?;
        if !text.is_empty() && self.emitted.ends_with(&text) {
            self.ids = recent;
            self.emitted = text;
        }
        Ok(())
    }
}
