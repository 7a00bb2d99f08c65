//! The tokenizer of a training run: byte-level BPE learnt from the training text, or an existing `tokenizer.json`.
//!
//! A trained one splits text as GPT-2 does, with every digit by itself (SmolLM's rule, which GGUF readers know
//! as `smollm`), has all 256 bytes in its alphabet, so that any text survives a round trip, and one special
//! token, `<|endoftext|>`, id 0, which both starts and ends a text: the file's template puts it before prompts,
//! where training had it too. Training is deterministic: the same
//! documents give the same file. It reads the training sources only, never held-out text.

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, Tokenizer, TokenizerBuilder};

use crate::config::TrainConfig;
use crate::data::documents::{self, Documents};
use crate::error::TrainError;

/// The token between documents, and the line that separates them in text files.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// Entries of the smallest vocabulary that can be trained: every byte, and the end of text.
pub const SMALLEST: usize = 257;

/// Changes when training's rules do, so that cached tokenizers are trained again.
const RECIPE: u64 = 2;

/// A tokenizer and what training needs to know of it.
#[derive(Debug, Clone)]
pub struct Vocabulary {
    tokenizer: Tokenizer,
    json: String,
    end_of_text: u32,
}

impl Vocabulary {
    /// The tokenizer that `config` asks for: read from its file, taken from the run's cache, or trained now
    /// and cached.
    ///
    /// # Errors
    /// When a file cannot be read or written, the text is not usable, or the tokenizer does not fit the model.
    pub fn prepare(config: &TrainConfig) -> Result<Self, TrainError> {
        let vocabulary = match &config.tokenizer.path {
            Some(path) => Self::load(path, &config.tokenizer.end_of_text)?,
            None => Self::cached(config)?,
        };
        if vocabulary.len() > config.model.vocab_size {
            let expected = format!("at least {}, the tokenizer's entries", vocabulary.len());
            return Err(TrainError::setting("model.vocab_size", config.model.vocab_size, expected));
        }
        Ok(vocabulary)
    }

    fn cached(config: &TrainConfig) -> Result<Self, TrainError> {
        let cache = config.cache();
        let entries = config.tokenizer.vocab_size.unwrap_or(config.model.vocab_size);
        let end_of_text = &config.tokenizer.end_of_text;
        let mut files = Vec::new();
        for source in &config.data.sources {
            files.extend(documents::files(&source.path, source.text_field.as_deref())?);
        }
        let key = format!(
            "recipe {RECIPE}, entries {entries}, end {end_of_text}, text {:016x}\n",
            documents::fingerprint(&files)?
        );
        let (file, key_file) = (cache.join("tokenizer.json"), cache.join("tokenizer.key"));
        if std::fs::read_to_string(&key_file).is_ok_and(|found| found == key) {
            return Self::load(&file, end_of_text);
        }
        let trained = Self::train_with(Documents::new(files), entries, end_of_text)?;
        std::fs::create_dir_all(&cache).map_err(|e| TrainError::write(&cache, e))?;
        // The key goes last, so that an interrupted run trains again.
        let _ = std::fs::remove_file(&key_file);
        trained.save(&file)?;
        write_whole(&key_file, key.as_bytes())?;
        Ok(trained)
    }

    /// Trains on `documents`, to at most `entries` entries; little text gives fewer.
    ///
    /// # Errors
    /// The first error among `documents`, or the tokenizer library's own.
    pub fn train(
        documents: impl Iterator<Item = Result<String, TrainError>> + Send,
        entries: usize,
    ) -> Result<Self, TrainError> {
        Self::train_with(documents, entries, END_OF_TEXT)
    }

    fn train_with(
        documents: impl Iterator<Item = Result<String, TrainError>> + Send,
        entries: usize,
        end_of_text: &str,
    ) -> Result<Self, TrainError> {
        let split = Sequence::new(vec![Digits::new(true).into(), ByteLevel::new(false, true, true).into()]);
        // The first special token of a fresh vocabulary has id 0.
        let begin = TemplateProcessing::builder()
            .try_single(format!("{end_of_text} $A"))
            .map_err(TrainError::tokenizer)?
            .special_tokens(vec![(end_of_text, 0)])
            .build()
            .map_err(TrainError::tokenizer)?;
        let mut tokenizer = TokenizerBuilder::default()
            .with_model(BPE::default())
            .with_normalizer(None::<tokenizers::normalizers::NormalizerWrapper>)
            .with_pre_tokenizer(Some(split))
            .with_post_processor(Some(begin))
            .with_decoder(Some(ByteLevel::new(false, true, true)))
            .build()
            .map_err(TrainError::tokenizer)?;
        let mut trainer = BpeTrainer::builder()
            .vocab_size(entries)
            .min_frequency(2)
            .show_progress(false)
            .special_tokens(vec![AddedToken::from(end_of_text, true)])
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build();
        // The library takes plain strings: the first error stops the text and is handed over here.
        let failure = Mutex::new(None);
        let text = documents.map_while(|document| {
            document.map_err(|e| *failure.lock().expect("nothing panics while holding it") = Some(e)).ok()
        });
        tokenizer.train(&mut trainer, text).map_err(TrainError::tokenizer)?;
        if let Some(error) = failure.into_inner().expect("nothing panics while holding it") {
            return Err(error);
        }
        let json = tokenizer.to_string(true).map_err(TrainError::tokenizer)?;
        // Read back, so that a trained tokenizer and a loaded one are the same thing.
        Self::parse(json, end_of_text).map_err(TrainError::tokenizer)
    }

    /// Reads a `tokenizer.json`; `end_of_text` must be one of its tokens.
    ///
    /// # Errors
    /// When the file cannot be read, is no tokenizer, or lacks that token.
    pub fn load(path: &Path, end_of_text: &str) -> Result<Self, TrainError> {
        let json = std::fs::read_to_string(path).map_err(|e| TrainError::read(path, e))?;
        Self::parse(json, end_of_text).map_err(|what| TrainError::file(path, what))
    }

    fn parse(json: String, end_of_text: &str) -> Result<Self, String> {
        let mut tokenizer: Tokenizer =
            json.parse().map_err(|e| format!("not a usable tokenizer.json: {e}"))?;
        // In a training document `<|endoftext|>` is text: only this crate ends documents.
        tokenizer.set_encode_special_tokens(true);
        tokenizer.with_truncation(None).map_err(|e| format!("not a usable tokenizer.json: {e}"))?;
        tokenizer.with_padding(None);
        let end_of_text = tokenizer.token_to_id(end_of_text).ok_or_else(|| {
            format!(
                "the tokenizer has no token `{end_of_text}`; name its end of text in tokenizer.end_of_text"
            )
        })?;
        Ok(Self { tokenizer, json, end_of_text })
    }

    /// Writes `tokenizer.json`, whole or not at all.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self, path: &Path) -> Result<(), TrainError> {
        write_whole(path, self.json.as_bytes())
    }

    /// The file's text.
    pub fn json(&self) -> &str {
        &self.json
    }

    /// One more than the largest id: the rows that an embedding needs.
    pub fn len(&self) -> usize {
        let ids = self.tokenizer.get_vocab(true);
        ids.values().max().map_or(0, |&id| id as usize + 1)
    }

    /// Whether it has no token at all; never true of one that was loaded or trained.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Id of the token between documents.
    pub fn end_of_text(&self) -> u32 {
        self.end_of_text
    }

    /// Text of that token.
    pub fn end_of_text_token(&self) -> Result<String, TrainError> {
        let token = self.tokenizer.id_to_token(self.end_of_text);
        token.ok_or_else(|| TrainError::tokenizer("the end of text has no token"))
    }

    /// Ids of `text`, without any special token.
    ///
    /// # Errors
    /// The tokenizer library's own; byte-level tokenizers have none.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TrainError> {
        let encoding = self.tokenizer.encode_fast(text, false).map_err(TrainError::tokenizer)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Ids of `text` with the byte at which each one's text ends.
    ///
    /// # Errors
    /// The tokenizer library's own; byte-level tokenizers have none.
    pub fn encode_with_ends(&self, text: &str) -> Result<(Vec<u32>, Vec<usize>), TrainError> {
        let encoding = self.tokenizer.encode(text, false).map_err(TrainError::tokenizer)?;
        let ends = encoding.get_offsets().iter().map(|&(_, end)| end).collect();
        Ok((encoding.get_ids().to_vec(), ends))
    }

    /// Text of `ids`, special tokens left out.
    ///
    /// # Errors
    /// The tokenizer library's own.
    pub fn decode(&self, ids: &[u32]) -> Result<String, TrainError> {
        self.tokenizer.decode(ids, true).map_err(TrainError::tokenizer)
    }
}

/// Writes beside the target and renames.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), TrainError> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}.tmp", std::process::id()));
    let temporary = PathBuf::from(temporary);
    std::fs::write(&temporary, bytes).and_then(|()| std::fs::rename(&temporary, path)).map_err(|e| {
        let _ = std::fs::remove_file(&temporary);
        TrainError::write(path, e)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: [&str; 3] = [
        "Once upon a time there was a little girl. She had a cat, and the cat had a hat.",
        "The little cat sat upon the mat in 1923. It's the cat's mat, isn't it?",
        "Once there was a little boy who had 12 hats\n\nand a cat.",
    ];

    fn trained(entries: usize) -> Vocabulary {
        let documents = TEXT.iter().map(|text| Ok(text.to_string()));
        Vocabulary::train(documents, entries).unwrap()
    }

    #[test]
    fn the_same_text_trains_the_same_file() {
        let first = trained(280);
        assert_eq!(first.len(), 280);
        for _ in 0..5 {
            assert_eq!(trained(280).json(), first.json());
        }
        assert!(trained(1000).len() < 1000, "little text has few merges");
    }

    #[test]
    fn any_utf8_survives_encoding_and_decoding() {
        let vocabulary = trained(300);
        let everything: String = ('\0'..='\u{10ffff}').step_by(97).collect();
        let texts = [
            "",
            " ",
            "\n\n \t x",
            "cat <|endoftext|> cat",
            "日本語 العربية 🐈‍⬛ é e\u{301} \u{feff}\u{0}",
            &everything,
        ];
        for text in texts {
            let ids = vocabulary.encode(text).unwrap();
            assert_eq!(vocabulary.decode(&ids).unwrap(), text);
            assert!(!ids.contains(&vocabulary.end_of_text()), "{text}");
            let (same, ends) = vocabulary.encode_with_ends(text).unwrap();
            assert_eq!(same, ids);
            assert_eq!(ends.last().copied().unwrap_or(0), text.len());
            let prompt = vocabulary.tokenizer.encode(text, true).unwrap();
            assert_eq!(prompt.get_ids(), [&[0], &ids[..]].concat());
        }
    }

    #[test]
    fn every_digit_is_its_own_token() {
        let vocabulary = trained(400);
        let digits = vocabulary.encode("1923").unwrap();
        assert_eq!(digits.len(), 4);
        let word = vocabulary.encode(" little").unwrap();
        assert_eq!(word.len(), 1, "a frequent word with its space is one token");
    }

    #[test]
    fn the_end_of_text_is_token_0_and_must_exist() {
        let vocabulary = trained(SMALLEST);
        assert_eq!((vocabulary.end_of_text(), vocabulary.len()), (0, SMALLEST));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        vocabulary.save(&path).unwrap();
        assert_eq!(Vocabulary::load(&path, END_OF_TEXT).unwrap().json(), vocabulary.json());
        let error = Vocabulary::load(&path, "</s>").unwrap_err().to_string();
        assert!(error.contains("`</s>`") && error.contains("tokenizer.end_of_text"), "{error}");
        std::fs::write(&path, "{\"model\": 1}").unwrap();
        let error = Vocabulary::load(&path, END_OF_TEXT).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json"), "{error}");
    }

    #[test]
    fn an_unreadable_document_stops_training_with_its_error() {
        let documents = [Ok("fine".to_owned()), Err(TrainError::tokenizer("broken"))];
        let error = Vocabulary::train(documents.into_iter(), 300).unwrap_err();
        assert_eq!(error.to_string(), "tokenizer: broken");
    }
}
