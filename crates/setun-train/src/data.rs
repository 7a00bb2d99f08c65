//! Training data: text → documents → tokens → batches.
//!
//! Each source's documents are shuffled anew every epoch and joined into one endless stream, the end-of-text token
//! between them; a sequence continues where the last one of its source stopped, so every token is a target
//! once per epoch. Which source a sequence comes from is drawn by the mixture's weights. With [`Packing::Documents`] a
//! batch says where documents start, so that none sees another; the sequences themselves are the same.
//!
//! However much text there is, little of it is in memory: tokens lie in mapped cache files, and beyond a few million
//! documents the order of an epoch is computed, not listed. Held-out sets are loaded, 12 bytes per token.
//!
//! Everything random is a function of the seed and of how much was read, so the state is a few numbers and a
//! restored [`Batches`] goes on exactly as the saved one would have.

pub(crate) mod corpus;
pub(crate) mod documents;
mod held_out;
mod order;

use std::path::Path;

use serde_json::{Value, json};

pub use held_out::{HeldOut, HeldOutBatch, Score};

use crate::config::{Packing, TrainConfig};
use crate::error::TrainError;
use crate::random::{mix, unit};
use crate::vocabulary::Vocabulary;
use corpus::{CHUNK_BYTES, Corpus, Text};
use documents::Documents;
pub(crate) use order::shuffled;
use order::{LISTED, Order};

/// Sequences of one length; rows follow each other.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// What the model sees, `[batch * seq_len]`.
    pub ids: Vec<u32>,
    /// What it is to predict at each place, `[batch * seq_len]`: the next token.
    pub targets: Vec<u32>,
    /// Where in its sequence each token's document starts, `[batch * seq_len]`, see [`crate::tape::Tape::documents`]; a document
    /// that goes on from an earlier sequence starts at 0. Empty: documents are not told apart.
    pub starts: Vec<u32>,
    /// Number of sequences.
    pub batch: usize,
    /// Their length.
    pub seq_len: usize,
}

/// The endless training data of a run.
#[derive(Debug, Clone)]
pub struct Batches {
    streams: Vec<Stream>,
    seed: u64,
    /// Sequences drawn so far.
    drawn: u64,
    batch: usize,
    seq_len: usize,
    packing: Packing,
}

/// What happens before the first step, for displays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Preparing<'a> {
    /// A cache of tokens cannot be used.
    Remaking {
        /// Its file.
        cache: &'a Path,
        /// Why not.
        reason: &'a str,
    },
    /// Some of a source's text goes through the tokenizer.
    Tokenizing {
        /// Name of the source.
        source: &'a str,
        /// Bytes of its files read so far.
        read: u64,
        /// Bytes of its files.
        total: u64,
    },
    /// A source's tokens are in their cache.
    Tokenized {
        /// Name of the source.
        source: &'a str,
        /// Its documents.
        documents: usize,
        /// Its tokens.
        tokens: u64,
    },
}

/// One source of the mixture, as [`Batches::sources`] reports it.
#[derive(Debug, Clone, PartialEq)]
pub struct SourceInfo {
    /// Its name.
    pub name: String,
    /// Documents in it.
    pub documents: usize,
    /// Tokens in it, one end-of-text token per document included.
    pub tokens: usize,
    /// How often it has been read so far, fractions included.
    pub epochs: f64,
}

impl Batches {
    /// Reads `config`'s sources, from the cache where it is fresh.
    ///
    /// # Errors
    /// When a file cannot be read or written, its text is not usable, or a source holds no document.
    pub fn new(config: &TrainConfig, vocabulary: &Vocabulary) -> Result<Self, TrainError> {
        Self::watched(config, vocabulary, &mut |_| ())
    }

    /// [`Batches::new`], telling `watch` how it goes.
    ///
    /// # Errors
    /// Those of [`Batches::new`].
    pub fn watched(
        config: &TrainConfig,
        vocabulary: &Vocabulary,
        watch: &mut dyn FnMut(Preparing),
    ) -> Result<Self, TrainError> {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        let threads = config.train.threads.unwrap_or_else(cores);
        let mut streams = Vec::new();
        for source in &config.data.sources {
            let files = documents::files(&source.path, source.text_field.as_deref())?;
            let hash = documents::fingerprint(&files)?;
            let cache = config.cache().join(format!("{}.tokens", source.name));
            let text = Text {
                source: &source.name,
                documents: Documents::new(files),
                hash,
                chunk_bytes: CHUNK_BYTES,
            };
            let corpus = Corpus::cached(&cache, text, vocabulary, threads, watch)?;
            if corpus.documents() == 0 {
                let path = source.path.first().cloned().unwrap_or_default();
                let what = format!("source `{}` holds no document", source.name);
                return Err(TrainError::file(&path, what));
            }
            let weights = [source.weight, source.weight_end.unwrap_or(source.weight)];
            streams.push(Stream::new(
                &source.name,
                corpus,
                weights,
                vocabulary.end_of_text(),
                config.train.seed,
            ));
        }
        Ok(Self {
            streams,
            seed: config.train.seed,
            drawn: 0,
            batch: config.train.batch,
            seq_len: config.data.seq_len,
            packing: config.data.packing,
        })
    }

    /// The next batch. `progress`, from 0 to 1, is how far the run is, for mixtures that move.
    pub fn next_batch(&mut self, progress: f64) -> Batch {
        let mut made = Batch {
            ids: Vec::with_capacity(self.batch * self.seq_len),
            targets: Vec::with_capacity(self.batch * self.seq_len),
            starts: Vec::new(),
            batch: self.batch,
            seq_len: self.seq_len,
        };
        for _ in 0..self.batch {
            let source = self.pick(progress.clamp(0.0, 1.0));
            self.drawn += 1;
            self.streams[source].sequence(self.seq_len, self.packing, &mut made);
        }
        made
    }

    /// Which source the next sequence comes from.
    fn pick(&self, progress: f64) -> usize {
        let weights = || self.streams.iter().map(|s| s.weight(progress));
        let mut rest = unit(mix(self.seed ^ mix(self.drawn))) * weights().sum::<f64>();
        let mut last = 0;
        for (n, weight) in weights().enumerate().filter(|&(_, weight)| weight > 0.0) {
            last = n;
            if rest < weight {
                break;
            }
            rest -= weight;
        }
        last
    }

    /// What each source holds, and how much of it was read.
    pub fn sources(&self) -> impl Iterator<Item = SourceInfo> + '_ {
        self.streams.iter().map(Stream::info)
    }

    /// Everything that the next batches depend on besides the config and the text.
    pub fn state(&self) -> Value {
        let sources: Vec<Value> = self.streams.iter().map(Stream::state).collect();
        json!({ "seed": self.seed, "drawn": self.drawn, "sources": sources })
    }

    /// Goes on where `state` was taken, with the same batches.
    ///
    /// # Errors
    /// When the state is damaged, or of another seed, text, tokenizer or list of sources; then nothing changes.
    pub fn restore(&mut self, state: &Value) -> Result<(), TrainError> {
        let damaged = || TrainError::Resume {
            what: "the checkpoint's data state is damaged; use an older checkpoint".into(),
        };
        let number = |name: &str| state[name].as_u64().ok_or_else(damaged);
        let (seed, drawn) = (number("seed")?, number("drawn")?);
        let sources = state["sources"].as_array().ok_or_else(damaged)?;
        if seed != self.seed {
            let what =
                format!("the checkpoint was made with train.seed = {seed}, this run has {}", self.seed);
            return Err(TrainError::Resume { what });
        }
        let names = |found: Vec<&str>| found.join(", ");
        let saved = names(sources.iter().filter_map(|s| s["name"].as_str()).collect());
        let here = names(self.streams.iter().map(|s| s.name.as_str()).collect());
        if saved != here || sources.len() != self.streams.len() {
            let what = format!("the checkpoint read the sources {saved}, this run has {here}");
            return Err(TrainError::Resume { what });
        }
        let places = self.streams.iter().zip(sources).map(|(stream, state)| stream.place(state, damaged));
        let places = places.collect::<Result<Vec<_>, _>>()?;
        for (stream, place) in self.streams.iter_mut().zip(places) {
            stream.go_to(place);
        }
        self.drawn = drawn;
        Ok(())
    }
}

/// A source's documents in shuffled order, without end.
#[derive(Debug, Clone)]
struct Stream {
    name: String,
    corpus: Corpus,
    /// Weight at the start and at the end of the run.
    weights: [f64; 2],
    end_of_text: u32,
    seed: u64,
    /// This epoch's order of the documents.
    order: Order,
    /// Documents up to which an order is listed.
    listed: usize,
    place: Place,
}

/// Where a stream stands: the token `offset` of the document that the order has at `document`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    epoch: u64,
    document: usize,
    offset: usize,
    /// Tokens read in this epoch, for reports.
    read: usize,
}

impl Stream {
    fn new(name: &str, corpus: Corpus, weights: [f64; 2], end_of_text: u32, seed: u64) -> Self {
        // Named, so that adding a source leaves the order of the others alone.
        let seed = mix(seed ^ xxhash_rust::xxh3::xxh3_64(name.as_bytes()));
        let start = Place { epoch: 0, document: 0, offset: 0, read: 0 };
        let mut made = Self {
            name: name.to_owned(),
            corpus,
            weights,
            end_of_text,
            seed,
            order: Order::new(0, 0, LISTED),
            listed: LISTED,
            place: start,
        };
        made.order = made.order_of(0);
        made
    }

    fn weight(&self, progress: f64) -> f64 {
        let [start, end] = self.weights;
        start + (end - start) * progress
    }

    /// Appends one sequence and its targets.
    fn sequence(&mut self, length: usize, packing: Packing, to: &mut Batch) {
        let (start, mut document_start) = (to.ids.len(), 0);
        let mut missing = length;
        while missing > 0 {
            let mut document = self.order.at(self.place.document);
            if self.place.offset == self.corpus.length(document) {
                self.next_document();
                document = self.order.at(self.place.document);
            }
            if self.place.offset == 0 {
                document_start = length - missing;
            }
            let count = missing.min(self.corpus.length(document) - self.place.offset);
            self.corpus.copy(document, self.place.offset, count, &mut to.ids);
            if packing == Packing::Documents {
                to.starts.extend(std::iter::repeat_n(document_start as u32, count));
            }
            self.place.offset += count;
            self.place.read += count;
            missing -= count;
        }
        to.targets.extend_from_slice(&to.ids[start + 1..]);
        let document = self.order.at(self.place.document);
        if self.place.offset < self.corpus.length(document) {
            self.corpus.copy(document, self.place.offset, 1, &mut to.targets);
        } else {
            // Whichever document follows, it begins with the marker.
            to.targets.push(self.end_of_text);
        }
    }

    fn next_document(&mut self) {
        self.place.offset = 0;
        self.place.document += 1;
        if self.place.document == self.order.len() {
            self.place.document = 0;
            self.place.epoch += 1;
            self.order = self.order_of(self.place.epoch);
            self.place.read = 0;
        }
    }

    fn info(&self) -> SourceInfo {
        let tokens = self.corpus.tokens();
        SourceInfo {
            name: self.name.clone(),
            documents: self.corpus.documents(),
            tokens,
            epochs: self.place.epoch as f64 + self.place.read as f64 / tokens as f64,
        }
    }

    fn state(&self) -> Value {
        let Place { epoch, document, offset, read } = self.place;
        let text = format!("{:016x}", self.corpus.key);
        json!({
            "name": self.name,
            "text": text,
            "order": self.order_name(),
            "epoch": epoch,
            "document": document,
            "offset": offset,
            "read": read,
        })
    }

    /// How documents are shuffled, since a place means nothing in an order of another kind.
    fn order_name(&self) -> &'static str {
        match self.order {
            Order::Listed(_) => "listed",
            Order::Keyed { .. } => "keyed",
        }
    }

    /// The place that `state` says, if it is one of this text.
    fn place(&self, state: &Value, damaged: impl Fn() -> TrainError) -> Result<Place, TrainError> {
        if state["text"] != json!(format!("{:016x}", self.corpus.key)) {
            let what = format!(
                "the text of source `{}` or the tokenizer has changed since the checkpoint",
                self.name
            );
            return Err(TrainError::Resume { what });
        }
        // Checkpoints that do not say how listed everything.
        let (order, here) = (state.get("order").map_or(Some("listed"), Value::as_str), self.order_name());
        if order != Some(here) {
            let what = format!(
                "the checkpoint's documents of source `{}` are in an order of another kind than `{here}`; use the program that wrote it",
                self.name
            );
            return Err(TrainError::Resume { what });
        }
        let number = |name: &str| state[name].as_u64().ok_or_else(&damaged);
        let index = |name: &str| number(name).map(|n| usize::try_from(n).unwrap_or(usize::MAX));
        let (epoch, document, offset) = (number("epoch")?, index("document")?, index("offset")?);
        let order = self.order_of(epoch);
        if document >= order.len() || offset > self.corpus.length(order.at(document)) {
            return Err(damaged());
        }
        let read = match state.get("read") {
            Some(_) => index("read")?,
            None => (0..document).map(|n| self.corpus.length(order.at(n))).sum::<usize>() + offset,
        };
        if read > self.corpus.tokens() {
            return Err(damaged());
        }
        Ok(Place { epoch, document, offset, read })
    }

    fn order_of(&self, epoch: u64) -> Order {
        Order::new(self.corpus.documents(), mix(self.seed ^ mix(epoch)), self.listed)
    }

    fn go_to(&mut self, place: Place) {
        self.order = self.order_of(place.epoch);
        self.place = place;
    }
}

#[cfg(test)]
mod tests;
