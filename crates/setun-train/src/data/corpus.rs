//! A source's tokens: made once, in parallel, and kept in a cache file.
//!
//! The file, little-endian: `SETUNTOK`, u32 version, u32 bytes per token (2 or 4), u64 key, u64 documents,
//! u64 tokens; then for each document a u64, the token at which it ends; then the tokens. The key hashes the
//! tokenizer and the text, so a change to either rebuilds the file; so does damage. It is written beside
//! its place and renamed.
//!
//! Every document begins with the end-of-text token, so documents joined in any order are separated by it, and a
//! model learns to begin a text from it.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::documents::Documents;
use crate::error::TrainError;
use crate::vocabulary::{Vocabulary, write_whole};

const MAGIC: &[u8; 8] = b"SETUNTOK";
const VERSION: u32 = 1;
const HEADER: usize = 40;

/// Text handed to the threads at a time: enough to keep them busy, little enough to forget.
const CHUNK_BYTES: usize = 8 << 20;

/// Documents as ids, in memory.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Corpus {
    /// Where each document ends in `tokens`; the next one starts there.
    ends: Vec<u64>,
    tokens: Tokens,
    /// Hash of the tokenizer and the text.
    pub(crate) key: u64,
}

/// Ids, as narrow as the vocabulary allows.
#[derive(Debug, Clone, PartialEq)]
enum Tokens {
    Narrow(Vec<u16>),
    Wide(Vec<u32>),
}

impl Corpus {
    /// The corpus of `documents` from the cache file `path`, made and written there if it is absent, stale or damaged.
    /// `text` is the hash of the documents.
    pub(crate) fn cached(
        path: &Path,
        documents: Documents,
        text: u64,
        vocabulary: &Vocabulary,
        threads: usize,
    ) -> Result<Self, TrainError> {
        let key = key(text, vocabulary);
        if let Some(found) =
            std::fs::read(path).ok().and_then(|bytes| Self::from_bytes(&bytes, key, vocabulary.len()))
        {
            return Ok(found);
        }
        let made = Self::tokenize(documents, key, vocabulary, threads)?;
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(|e| TrainError::write(folder, e))?;
        }
        write_whole(path, &made.to_bytes())?;
        Ok(made)
    }

    fn tokenize(
        mut documents: Documents,
        key: u64,
        vocabulary: &Vocabulary,
        threads: usize,
    ) -> Result<Self, TrainError> {
        let narrow = vocabulary.len() <= 1 << 16;
        let mut corpus = Self {
            ends: Vec::new(),
            tokens: if narrow { Tokens::Narrow(Vec::new()) } else { Tokens::Wide(Vec::new()) },
            key,
        };
        loop {
            let (mut chunk, mut bytes) = (Vec::new(), 0);
            while bytes < CHUNK_BYTES
                && let Some(document) = documents.next().transpose()?
            {
                bytes += document.len();
                chunk.push(document);
            }
            if chunk.is_empty() {
                return Ok(corpus);
            }
            for ids in encode_all(&chunk, vocabulary, threads)? {
                corpus.push(vocabulary.end_of_text(), &ids);
            }
        }
    }

    fn push(&mut self, marker: u32, ids: &[u32]) {
        let all = std::iter::once(marker).chain(ids.iter().copied());
        match &mut self.tokens {
            // Narrow only where every id of the vocabulary fits.
            Tokens::Narrow(tokens) => tokens.extend(all.map(|id| id as u16)),
            Tokens::Wide(tokens) => tokens.extend(all),
        }
        self.ends.push(self.tokens.len() as u64);
    }

    /// Number of documents.
    pub(crate) fn documents(&self) -> usize {
        self.ends.len()
    }

    /// Number of tokens, one marker per document included.
    pub(crate) fn tokens(&self) -> usize {
        self.tokens.len()
    }

    /// Tokens of document `index`, its marker included.
    pub(crate) fn length(&self, index: usize) -> usize {
        let range = self.range(index);
        range.end - range.start
    }

    fn range(&self, index: usize) -> std::ops::Range<usize> {
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        start as usize..self.ends[index] as usize
    }

    /// Appends `count` tokens of document `index`, from its token `offset`, to `to`.
    pub(crate) fn copy(&self, index: usize, offset: usize, count: usize, to: &mut Vec<u32>) {
        let start = self.range(index).start + offset;
        match &self.tokens {
            Tokens::Narrow(all) => to.extend(all[start..start + count].iter().map(|&id| u32::from(id))),
            Tokens::Wide(all) => to.extend_from_slice(&all[start..start + count]),
        }
    }

    fn to_bytes(&self) -> Vec<u8> {
        let width = match self.tokens {
            Tokens::Narrow(_) => 2,
            Tokens::Wide(_) => 4,
        };
        let mut bytes = Vec::with_capacity(HEADER + 8 * self.ends.len() + width * self.tokens.len());
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&(width as u32).to_le_bytes());
        for number in [self.key, self.ends.len() as u64, self.tokens.len() as u64] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.extend(self.ends.iter().flat_map(|end| end.to_le_bytes()));
        match &self.tokens {
            Tokens::Narrow(all) => bytes.extend(all.iter().flat_map(|id| id.to_le_bytes())),
            Tokens::Wide(all) => bytes.extend(all.iter().flat_map(|id| id.to_le_bytes())),
        }
        bytes
    }

    /// `None` unless `bytes` are a whole file of this key whose ids are below `vocabulary`.
    fn from_bytes(bytes: &[u8], key: u64, vocabulary: usize) -> Option<Self> {
        let u32_at = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let u64_at = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
        if bytes.get(..8)? != MAGIC || u32_at(8)? != VERSION || u64_at(16)? != key {
            return None;
        }
        let (documents, count) = (usize::try_from(u64_at(24)?).ok()?, usize::try_from(u64_at(32)?).ok()?);
        let tokens_at = documents.checked_mul(8)?.checked_add(HEADER)?;
        let (ends, rest) = (bytes.get(HEADER..tokens_at)?, bytes.get(tokens_at..)?);
        let ends: Vec<u64> = chunks(ends).map(u64::from_le_bytes).collect();
        let tokens = match u32_at(12)? {
            2 if Some(rest.len()) == count.checked_mul(2) => {
                Tokens::Narrow(chunks(rest).map(u16::from_le_bytes).collect())
            }
            4 if Some(rest.len()) == count.checked_mul(4) => {
                Tokens::Wide(chunks(rest).map(u32::from_le_bytes).collect())
            }
            _ => return None,
        };
        let known = match &tokens {
            Tokens::Narrow(all) => all.iter().all(|&id| usize::from(id) < vocabulary),
            Tokens::Wide(all) => all.iter().all(|&id| (id as usize) < vocabulary),
        };
        let rising = ends.first() != Some(&0) && ends.windows(2).all(|pair| pair[0] < pair[1]);
        let complete = ends.last().copied().unwrap_or(0) == count as u64;
        (known && rising && complete).then_some(Self { ends, tokens, key })
    }
}

impl Tokens {
    fn len(&self) -> usize {
        match self {
            Self::Narrow(all) => all.len(),
            Self::Wide(all) => all.len(),
        }
    }
}

fn chunks<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = [u8; N]> {
    bytes.chunks_exact(N).map(|chunk| chunk.try_into().expect("chunks of N"))
}

fn key(text: u64, vocabulary: &Vocabulary) -> u64 {
    let mut hash = xxhash_rust::xxh3::Xxh3::new();
    hash.update(&text.to_le_bytes());
    hash.update(&vocabulary.end_of_text().to_le_bytes());
    hash.update(vocabulary.json().as_bytes());
    hash.digest()
}

/// Ids of every text, in order.
fn encode_all(
    texts: &[String],
    vocabulary: &Vocabulary,
    threads: usize,
) -> Result<Vec<Vec<u32>>, TrainError> {
    let next = AtomicUsize::new(0);
    let worker = || -> Result<Vec<(usize, Vec<u32>)>, TrainError> {
        let mut done = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(text) = texts.get(index) else {
                return Ok(done);
            };
            done.push((index, vocabulary.encode(text)?));
        }
    };
    let parts = std::thread::scope(|scope| {
        let handles: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(worker)).collect();
        let results = handles.into_iter().map(|handle| {
            handle.join().unwrap_or_else(|_| Err(TrainError::tokenizer("a tokenizing thread panicked")))
        });
        results.collect::<Result<Vec<_>, _>>()
    })?;
    let mut all = vec![Vec::new(); texts.len()];
    for (index, ids) in parts.into_iter().flatten() {
        all[index] = ids;
    }
    Ok(all)
}
