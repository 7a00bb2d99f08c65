//! Held-out text, cut into fixed windows, and the measures taken on it.
//!
//! Protocol: the set's documents in file order, joined as in training (the end-of-text token before each and after
//! the last), are one stream `s[0..=n]`. Window `k` of length `L` feeds `s[kL..(k+1)L]` and scores
//! `s[kL+1..(k+1)L+1]`; the last window may be shorter. So every token of every document and its end marker is
//! scored exactly once, with at most `L` tokens before it. Bits per byte divides by the UTF-8 bytes
//! of the documents; end markers cost bits and add no bytes, so a tokenizer cannot gain by them.
//!
//! With [`Packing::Documents`] a token sees those of its own document only, as in training: the windows and what is scored
//! stay the same, the context gets shorter.

use super::Batch;
use super::documents::{self, Documents};
use crate::config::{Packing, ValidSection};
use crate::error::TrainError;
use crate::loss::IGNORE;
use crate::vocabulary::Vocabulary;

/// One held-out set.
#[derive(Debug, Clone)]
pub struct HeldOut {
    name: String,
    stream: Vec<u32>,
    /// Bytes of text before each position of the stream, so that any run of targets knows its bytes.
    bytes_before: Vec<u64>,
    /// Where documents start in the stream, rising from 0.
    starts: Vec<usize>,
    packing: Packing,
    seq_len: usize,
    /// Instead of a stream: batches of one row each, all of one length, whose targets may be masked.
    rows: Vec<HeldOutBatch>,
}

impl HeldOut {
    /// Reads and tokenises a set, for windows of `seq_len` tokens.
    ///
    /// # Errors
    /// When a file cannot be used, or the set holds no document.
    pub fn load(set: &ValidSection, vocabulary: &Vocabulary, seq_len: usize) -> Result<Self, TrainError> {
        let documents = Documents::new(documents::files(&set.path, set.text_field.as_deref())?);
        let made = Self::new(&set.name, documents, vocabulary, seq_len)?;
        if made.tokens() == 0 {
            let path = set.path.first().cloned().unwrap_or_default();
            return Err(TrainError::file(&path, format!("held-out set `{}` holds no document", set.name)));
        }
        Ok(made)
    }

    /// A set of documents that are in no file. Windows of `seq_len` tokens, at least 1.
    ///
    /// # Errors
    /// The first error among `documents`, or the tokenizer's.
    pub fn new(
        name: &str,
        documents: impl IntoIterator<Item = Result<String, TrainError>>,
        vocabulary: &Vocabulary,
        seq_len: usize,
    ) -> Result<Self, TrainError> {
        let marker = vocabulary.end_of_text();
        // Position i of `bytes_before` counts the text of the targets before position i: of s[1..i].
        let (mut stream, mut bytes_before, mut total) = (vec![marker], vec![0, 0], 0);
        let mut starts = vec![0];
        for document in documents {
            let document = document?;
            let (ids, ends) = vocabulary.encode_with_ends(&document)?;
            stream.extend(ids);
            // Offsets of odd normalisers may step back; bytes are counted where they are first reached.
            bytes_before.extend(ends.iter().scan(0, |reached, &end| {
                *reached = end.min(document.len()).max(*reached);
                Some(total + *reached as u64)
            }));
            // Text that no token covers (a normaliser may drop some) counts with the end marker.
            total += document.len() as u64;
            starts.push(stream.len());
            stream.push(marker);
            bytes_before.push(total);
        }
        let (name, seq_len) = (name.to_owned(), seq_len.max(1));
        Ok(Self { name, stream, bytes_before, starts, packing: Packing::Stream, seq_len, rows: Vec::new() })
    }

    /// A set of ready rows, one sequence each and all of one length; bytes are those of the targets that count.
    pub(crate) fn of_rows(name: &str, rows: Vec<HeldOutBatch>) -> Self {
        let seq_len = rows.first().map_or(1, |row| row.batch.seq_len);
        Self {
            name: name.to_owned(),
            stream: Vec::new(),
            bytes_before: Vec::new(),
            starts: Vec::new(),
            packing: Packing::Stream,
            seq_len,
            rows,
        }
    }

    /// The same set with documents told apart or not; at first they are not.
    pub fn packed(self, packing: Packing) -> Self {
        Self { packing, ..self }
    }

    /// Where the documents of the tokens `window` start, counted from its beginning.
    fn starts_in(&self, window: std::ops::Range<usize>) -> impl Iterator<Item = u32> {
        let first = self.starts.partition_point(|&start| start <= window.start);
        let inside = self.starts[first..].iter().copied().take_while(move |&start| start < window.end);
        let (mut inside, mut start) = (inside.peekable(), window.start);
        let from = window.start;
        window.map(move |token| {
            start = inside.next_if_eq(&token).unwrap_or(start);
            (start - from) as u32
        })
    }

    /// Its name in metrics.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Tokens that are scored.
    pub fn tokens(&self) -> usize {
        match self.rows.is_empty() {
            true => self.stream.len().saturating_sub(1),
            false => self.rows.iter().map(HeldOutBatch::counted).sum(),
        }
    }

    /// UTF-8 bytes of the documents.
    pub fn bytes(&self) -> u64 {
        match self.rows.is_empty() {
            true => self.bytes_before.last().copied().unwrap_or(0),
            false => self.rows.iter().map(|row| row.bytes).sum(),
        }
    }

    /// The windows, at most `batch` at a time; all of one batch have one length. With `limit`, about so many tokens, in
    /// windows taken evenly from the whole set, the same ones every time.
    pub fn batches(&self, batch: usize, limit: Option<usize>) -> impl Iterator<Item = HeldOutBatch> + '_ {
        let windows = match self.rows.is_empty() {
            true => self.tokens().div_ceil(self.seq_len),
            false => self.rows.len(),
        };
        let wanted = limit.map_or(windows, |tokens| tokens.div_ceil(self.seq_len).clamp(1, windows.max(1)));
        let wanted = wanted.min(windows);
        let batch = batch.max(1);
        let mut next = 0;
        std::iter::from_fn(move || {
            let mut made = HeldOutBatch { batch: Batch::default(), bytes: 0 };
            while next < wanted && made.batch.batch < batch {
                if !self.rows.is_empty() {
                    let row = &self.rows[(next as u128 * windows as u128 / wanted as u128) as usize];
                    made.batch.seq_len = row.batch.seq_len;
                    made.batch.batch += 1;
                    made.batch.ids.extend_from_slice(&row.batch.ids);
                    made.batch.targets.extend_from_slice(&row.batch.targets);
                    made.batch.starts.extend_from_slice(&row.batch.starts);
                    made.bytes += row.bytes;
                    next += 1;
                    continue;
                }
                // Window ⌊next · windows / wanted⌋: all of them when all are wanted.
                let start = (next as u128 * windows as u128 / wanted as u128) as usize * self.seq_len;
                let end = (start + self.seq_len).min(self.tokens());
                if made.batch.batch > 0 && end - start != made.batch.seq_len {
                    break;
                }
                made.batch.seq_len = end - start;
                made.batch.batch += 1;
                made.batch.ids.extend_from_slice(&self.stream[start..end]);
                made.batch.targets.extend_from_slice(&self.stream[start + 1..end + 1]);
                if self.packing == Packing::Documents {
                    made.batch.starts.extend(self.starts_in(start..end));
                }
                made.bytes += self.bytes_before[end + 1] - self.bytes_before[start + 1];
                next += 1;
            }
            (made.batch.batch > 0).then_some(made)
        })
    }
}

/// Some windows of a held-out set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldOutBatch {
    /// Ids and targets; the last batch may have fewer and shorter sequences.
    pub batch: Batch,
    /// UTF-8 bytes of the text that the targets stand for.
    pub bytes: u64,
}

impl HeldOutBatch {
    /// Targets that are scored.
    pub fn counted(&self) -> usize {
        self.batch.targets.iter().filter(|&&target| target != IGNORE).count()
    }
}

/// Sums over held-out batches.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Score {
    /// Total cross-entropy, in nats.
    pub nats: f64,
    /// Targets scored.
    pub tokens: u64,
    /// Their UTF-8 bytes.
    pub bytes: u64,
}

impl Score {
    /// Adds a batch whose cross-entropy, summed over its targets, is `nats`.
    pub fn add(&mut self, nats: f64, of: &HeldOutBatch) {
        self.nats += nats;
        self.tokens += of.counted() as u64;
        self.bytes += of.bytes;
    }

    /// Nats per token; not a number before anything was added.
    pub fn loss(&self) -> f64 {
        self.nats / self.tokens as f64
    }

    /// Bits per UTF-8 byte: comparable between tokenizers.
    pub fn bits_per_byte(&self) -> f64 {
        self.nats / std::f64::consts::LN_2 / self.bytes as f64
    }
}
