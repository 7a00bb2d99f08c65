//! SentencePiece model files (`tokenizer.model`): the protobuf fields that decide token ids.
//!
//! A file is a `ModelProto` of google/sentencepiece: field 1 repeats the pieces (text, score, type) in
//! id order, field 2 holds the trainer's settings and field 3 the normalizer's. Everything else
//! (self-test samples, the denormalizer) is skipped. Defaults of absent fields are those of
//! `sentencepiece_model.proto`. Segmentation itself is in `spm`.

use super::spm::{Algorithm, Charsmap, Kind, Piece, Rules, Spm};
use crate::error::ModelError;

/// Reads a model file. `bytes` is the whole file.
pub(super) fn read(bytes: &[u8]) -> Result<Spm, ModelError> {
    let mut pieces = Vec::new();
    let mut trainer = Trainer::default();
    let mut normalizer = Normalizer::default();
    let mut fields = Fields::new(bytes, "model");
    while let Some((number, value)) = fields.next()? {
        match (number, value) {
            (1, Wire::Bytes(piece)) => pieces.push(read_piece(piece, pieces.len())?),
            (2, Wire::Bytes(spec)) => trainer.read(spec)?,
            (3, Wire::Bytes(spec)) => normalizer.read(spec)?,
            _ => {}
        }
    }
    if pieces.is_empty() {
        return Err(refused("a file without pieces, which is no SentencePiece model"));
    }
    let algorithm = match trainer.model_type {
        1 => Algorithm::Unigram,
        2 => Algorithm::Bpe,
        3 => {
            return Err(refused("model type `word`; only `bpe` and `unigram` are read"));
        }
        4 => {
            return Err(refused("model type `char`; only `bpe` and `unigram` are read"));
        }
        other => {
            let what = format!("model type {other}; only 1 (unigram) and 2 (bpe) are read");
            return Err(refused(&what));
        }
    };
    if trainer.whitespace_as_suffix {
        return Err(refused("`treat_whitespace_as_suffix`, which is not supported"));
    }
    let charsmap = match normalizer.charsmap {
        Some(blob) if !blob.is_empty() => Some(Charsmap::new(blob)?),
        _ => None,
    };
    let id = |id: i64| u32::try_from(id).ok().filter(|&id| (id as usize) < pieces.len());
    let rules = Rules {
        algorithm,
        add_prefix: normalizer.add_dummy_prefix,
        remove_extra_whitespaces: normalizer.remove_extra_whitespaces,
        escape_whitespaces: normalizer.escape_whitespaces,
        charsmap,
        inline_user_defined: true,
        unknown: pieces.iter().position(|p| p.kind == Kind::Unknown).map(|id| id as u32),
    };
    let (bos, eos) = (id(trainer.bos), id(trainer.eos));
    Spm::new(pieces, rules, bos, eos)
}

fn refused(what: &str) -> ModelError {
    ModelError::Tokenizer { what: format!("SentencePiece model has {what}") }
}

struct Trainer {
    model_type: i64,
    whitespace_as_suffix: bool,
    bos: i64,
    eos: i64,
}

impl Default for Trainer {
    fn default() -> Self {
        Self { model_type: 1, whitespace_as_suffix: false, bos: 1, eos: 2 }
    }
}

impl Trainer {
    fn read(&mut self, spec: &[u8]) -> Result<(), ModelError> {
        let mut fields = Fields::new(spec, "trainer_spec");
        while let Some((number, value)) = fields.next()? {
            match (number, value) {
                (3, Wire::Varint(v)) => self.model_type = v as i64,
                (24, Wire::Varint(v)) => self.whitespace_as_suffix = v != 0,
                // Negative int32 values arrive sign-extended to 64 bits.
                (41, Wire::Varint(v)) => self.bos = v as i64,
                (42, Wire::Varint(v)) => self.eos = v as i64,
                _ => {}
            }
        }
        Ok(())
    }
}

struct Normalizer<'a> {
    charsmap: Option<&'a [u8]>,
    add_dummy_prefix: bool,
    remove_extra_whitespaces: bool,
    escape_whitespaces: bool,
}

impl Default for Normalizer<'_> {
    fn default() -> Self {
        Self {
            charsmap: None,
            add_dummy_prefix: true,
            remove_extra_whitespaces: true,
            escape_whitespaces: true,
        }
    }
}

impl<'a> Normalizer<'a> {
    fn read(&mut self, spec: &'a [u8]) -> Result<(), ModelError> {
        let mut fields = Fields::new(spec, "normalizer_spec");
        while let Some((number, value)) = fields.next()? {
            match (number, value) {
                (2, Wire::Bytes(blob)) => self.charsmap = Some(blob),
                (3, Wire::Varint(v)) => self.add_dummy_prefix = v != 0,
                (4, Wire::Varint(v)) => self.remove_extra_whitespaces = v != 0,
                (5, Wire::Varint(v)) => self.escape_whitespaces = v != 0,
                _ => {}
            }
        }
        Ok(())
    }
}

fn read_piece(bytes: &[u8], id: usize) -> Result<Piece, ModelError> {
    let mut piece = Piece { text: String::new(), score: 0.0, kind: Kind::Normal };
    let mut fields = Fields::new(bytes, "piece");
    while let Some((number, value)) = fields.next()? {
        match (number, value) {
            (1, Wire::Bytes(text)) => {
                piece.text = std::str::from_utf8(text)
                    .map_err(|_| refused(&format!("piece {id}, whose text is not UTF-8")))?
                    .to_owned();
            }
            (2, Wire::Fixed32(bits)) => piece.score = f32::from_bits(bits),
            (3, Wire::Varint(kind)) => {
                piece.kind = i64::try_from(kind)
                    .ok()
                    .and_then(Kind::from_number)
                    .ok_or_else(|| refused(&format!("piece {id} of the unknown type {kind}")))?;
            }
            _ => {}
        }
    }
    Ok(piece)
}

/// One protobuf field's value, as the wire holds it.
enum Wire<'a> {
    Varint(u64),
    Fixed32(u32),
    Fixed64,
    Bytes(&'a [u8]),
}

/// Walks the fields of one protobuf message. `what` names the message in errors.
struct Fields<'a> {
    rest: &'a [u8],
    what: &'static str,
}

impl<'a> Fields<'a> {
    fn new(rest: &'a [u8], what: &'static str) -> Self {
        Self { rest, what }
    }

    fn next(&mut self) -> Result<Option<(u64, Wire<'a>)>, ModelError> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let tag = self.varint()?;
        let value = match tag & 7 {
            0 => Wire::Varint(self.varint()?),
            1 => {
                self.take(8)?;
                Wire::Fixed64
            }
            2 => {
                let length = self.varint()?;
                Wire::Bytes(self.take(length)?)
            }
            5 => {
                let mut bits = [0; 4];
                bits.copy_from_slice(self.take(4)?);
                Wire::Fixed32(u32::from_le_bytes(bits))
            }
            other => return Err(self.broken(&format!("wire type {other}"))),
        };
        Ok(Some((tag >> 3, value)))
    }

    fn varint(&mut self) -> Result<u64, ModelError> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(self.broken("an integer longer than 64 bits"))
    }

    fn take(&mut self, count: u64) -> Result<&'a [u8], ModelError> {
        let split = usize::try_from(count).ok().and_then(|n| self.rest.split_at_checked(n));
        let Some((head, tail)) = split else {
            let what = format!("a field of {count} bytes where {} are left", self.rest.len());
            return Err(self.broken(&what));
        };
        self.rest = tail;
        Ok(head)
    }

    fn broken(&self, what: &str) -> ModelError {
        refused(&format!("{what} in `{}`: the file is damaged or of another format", self.what))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `field` with a length-delimited payload.
    fn message(field: u8, payload: &[u8]) -> Vec<u8> {
        [&[field << 3 | 2, payload.len() as u8], payload].concat()
    }

    fn model(model_type: u8) -> Vec<u8> {
        let unknown = [message(1, b"<unk>"), vec![3 << 3, 2]].concat();
        let trainer = [3 << 3, model_type];
        [message(1, &unknown), message(1, &message(1, b"a")), message(2, &trainer)].concat()
    }

    #[test]
    fn word_and_char_models_are_refused_by_name() {
        assert!(read(&model(1)).is_ok() && read(&model(2)).is_ok());
        for (number, name) in [(3, "`word`"), (4, "`char`"), (9, "model type 9")] {
            let error = read(&model(number)).expect_err("refused").to_string();
            assert!(error.contains(name), "{error}");
        }
    }

    #[test]
    fn every_truncation_and_byte_change_is_an_error_or_a_model_never_a_panic() {
        let whole = model(2);
        for cut in 0..whole.len() {
            let _ = read(&whole[..cut]);
            for value in [0, 0x7f, 0x80, 0xff] {
                let mut changed = whole.clone();
                changed[cut] = value;
                let _ = read(&changed);
            }
        }
        assert!(read(&[]).is_err(), "no pieces");
        assert!(read(&[0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f]).is_err(), "piece of 4 GB");
    }
}
