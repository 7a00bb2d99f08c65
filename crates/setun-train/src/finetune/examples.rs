//! Examples packed into sequences, shuffled anew every epoch. They do not see each other.
//!
//! An example is what the model sees and what it is to predict at each place, [`IGNORE`] where that does not count. Documents
//! fill sequences to the brim and go on in the next one; conversations are never divided, so a sequence that the next one does
//! not fit into is padded.
//!
//! The order is a function of the seed and the epoch, so the state is three numbers.

use std::iter::repeat_n;

use serde_json::{Value, json};

use crate::data::{Batch, HeldOutBatch, shuffled};
use crate::error::TrainError;
use crate::feed::Feed;
use crate::loss::IGNORE;
use crate::random::mix;

/// One document or conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// What the model sees.
    pub ids: Vec<u32>,
    /// What it is to predict at each place; as long as `ids`.
    pub targets: Vec<u32>,
    /// UTF-8 bytes of the text that counts.
    pub bytes: u64,
    /// Whether it has to stay in one sequence.
    pub whole: bool,
}

impl Example {
    /// Of tokens in a row, of which those count (as targets) that `counts` says. `None` where nothing is left to predict.
    pub(crate) fn new(
        tokens: &[u32],
        counts: impl Fn(usize) -> bool,
        bytes: u64,
        whole: bool,
    ) -> Option<Self> {
        let targets: Vec<u32> =
            (1..tokens.len()).map(|i| if counts(i) { tokens[i] } else { IGNORE }).collect();
        let any = targets.iter().any(|&target| target != IGNORE);
        any.then(|| Self { ids: tokens[..tokens.len() - 1].to_vec(), targets, bytes, whole })
    }

    fn counted(&self) -> usize {
        self.targets.iter().filter(|&&target| target != IGNORE).count()
    }

    /// Shortens one that has to stay whole to `seq_len`. `None` where nothing is left to predict.
    fn fit(mut self, seq_len: usize) -> Option<Self> {
        if !self.whole || self.ids.len() <= seq_len {
            return Some(self);
        }
        let before = self.counted() as u64;
        self.ids.truncate(seq_len);
        self.targets.truncate(seq_len);
        let left = self.counted() as u64;
        self.bytes = self.bytes * left / before.max(1);
        (left > 0).then_some(self)
    }
}

/// Where reading stands: the token `offset` of the example `order[index]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    epoch: u64,
    index: usize,
    offset: usize,
}

/// The endless examples of a run.
#[derive(Debug, Clone)]
pub struct Examples {
    list: Vec<Example>,
    order: Vec<u32>,
    place: Place,
    seed: u64,
    batch: usize,
    seq_len: usize,
    /// Hash of the examples.
    key: u64,
}

impl Examples {
    /// Sequences of `seq_len` tokens, `batch` at a time. Conversations longer than that are cut, of which `note` is told.
    ///
    /// # Errors
    /// When nothing is left to predict.
    pub fn new(
        list: Vec<Example>,
        seq_len: usize,
        batch: usize,
        seed: u64,
        note: &mut dyn FnMut(String),
    ) -> Result<Self, TrainError> {
        let count = list.len();
        let long = list.iter().filter(|e| e.whole && e.ids.len() > seq_len).count();
        let list: Vec<Example> = list.into_iter().filter_map(|e| e.fit(seq_len)).collect();
        if long > 0 {
            let lost = match count - list.len() {
                0 => String::new(),
                lost => format!("; nothing that counts is left of {lost}"),
            };
            note(format!(
                "{long} of {count} examples are longer than {seq_len} tokens and were cut there{lost}"
            ));
        }
        if list.is_empty() {
            return Err(TrainError::setting("--data", "without any text", "files with something to predict"));
        }
        let mut hash = xxhash_rust::xxh3::Xxh3::new();
        for example in &list {
            hash.update(&(example.ids.len() as u64).to_le_bytes());
            example.ids.iter().chain(&example.targets).for_each(|id| hash.update(&id.to_le_bytes()));
        }
        let place = Place { epoch: 0, index: 0, offset: 0 };
        let mut made = Self { list, order: Vec::new(), place, seed, batch, seq_len, key: hash.digest() };
        made.order = made.order_of(0);
        Ok(made)
    }

    /// Documents and conversations.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether there is none; never true.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Tokens, and how many of them count.
    pub fn tokens(&self) -> [usize; 2] {
        [self.list.iter().map(|e| e.ids.len()).sum(), self.list.iter().map(Example::counted).sum()]
    }

    /// Sequences that the first epoch takes.
    pub fn rows_per_epoch(&self) -> usize {
        let mut copy = self.clone();
        copy.go_to(Place { epoch: 0, index: 0, offset: 0 });
        let mut batch = Batch { seq_len: self.seq_len, ..Batch::default() };
        let mut rows = 0;
        while copy.place.epoch == 0 {
            copy.row(&mut batch);
            batch.ids.clear();
            batch.targets.clear();
            batch.starts.clear();
            rows += 1;
        }
        rows
    }

    /// Appends one sequence.
    fn row(&mut self, to: &mut Batch) {
        let (first, end) = (to.ids.len(), to.ids.len() + self.seq_len);
        while to.ids.len() < end {
            let example = &self.list[self.order[self.place.index] as usize];
            let (room, rest) = (end - to.ids.len(), example.ids.len() - self.place.offset);
            if example.whole && rest > room {
                break;
            }
            let part = self.place.offset..self.place.offset + rest.min(room);
            to.starts.extend(repeat_n((to.ids.len() - first) as u32, part.len()));
            to.ids.extend_from_slice(&example.ids[part.clone()]);
            to.targets.extend_from_slice(&example.targets[part.clone()]);
            self.place.offset = part.end;
            if part.end == example.ids.len() {
                self.next_example();
            }
        }
        // After everything that counts, so that nothing sees it.
        to.starts.extend(repeat_n((to.ids.len() - first) as u32, end - to.ids.len()));
        to.ids.resize(end, 0);
        to.targets.resize(end, IGNORE);
    }

    fn next_example(&mut self) {
        self.place.offset = 0;
        self.place.index += 1;
        if self.place.index == self.order.len() {
            self.place.index = 0;
            self.place.epoch += 1;
            self.order = self.order_of(self.place.epoch);
        }
    }

    fn order_of(&self, epoch: u64) -> Vec<u32> {
        shuffled(self.list.len(), mix(self.seed ^ mix(epoch)))
    }

    fn go_to(&mut self, place: Place) {
        self.order = self.order_of(place.epoch);
        self.place = place;
    }
}

impl Feed for Examples {
    type Item = Batch;

    fn next_batch(&mut self, _: f64) -> Batch {
        let (batch, seq_len) = (self.batch, self.seq_len);
        let mut made = Batch { batch, seq_len, ..Batch::default() };
        (0..batch).for_each(|_| self.row(&mut made));
        made
    }

    fn state(&self) -> Value {
        let Place { epoch, index, offset } = self.place;
        json!({ "examples": format!("{:016x}", self.key), "epoch": epoch, "index": index, "offset": offset })
    }

    fn restore(&mut self, state: &Value) -> Result<(), TrainError> {
        check_same_data(state, self.key)?;
        let number = |name: &str| state[name].as_u64();
        let (Some(epoch), Some(index), Some(offset)) = (number("epoch"), number("index"), number("offset"))
        else {
            return Err(damaged());
        };
        let (index, offset) = (index as usize, offset as usize);
        let order = self.order_of(epoch);
        if order.get(index).is_none_or(|&n| offset >= self.list[n as usize].ids.len()) {
            return Err(damaged());
        }
        self.go_to(Place { epoch, index, offset });
        Ok(())
    }
}

/// Refuses a state that was taken on other examples.
pub(crate) fn check_same_data(state: &Value, key: u64) -> Result<(), TrainError> {
    match state["examples"] == json!(format!("{key:016x}")) {
        true => Ok(()),
        false => {
            let what = "the data, the tokenizer, the chat template or --seq-len has changed since the checkpoint; restore it, or \
                        name another --out";
            Err(TrainError::Resume { what: what.into() })
        }
    }
}

pub(crate) fn damaged() -> TrainError {
    TrainError::Resume { what: "the checkpoint's data state is damaged; use an older checkpoint".into() }
}

/// The examples in their order, packed as they are in training: a held-out set.
pub(crate) fn held_out_rows(examples: &[Example], seq_len: usize) -> Vec<HeldOutBatch> {
    let mut rows: Vec<HeldOutBatch> = Vec::new();
    let fresh = || HeldOutBatch { batch: Batch { batch: 1, seq_len, ..Batch::default() }, bytes: 0 };
    for example in examples.iter().filter_map(|e| e.clone().fit(seq_len)) {
        let mut offset = 0;
        while offset < example.ids.len() {
            let used = rows.last().map_or(seq_len, |row| row.batch.ids.len());
            let rest = example.ids.len() - offset;
            if used == seq_len || example.whole && rest > seq_len - used {
                rows.push(fresh());
                continue;
            }
            let part = offset..offset + rest.min(seq_len - used);
            if let Some(row) = rows.last_mut() {
                let start = row.batch.ids.len() as u32;
                row.batch.starts.extend(repeat_n(start, part.len()));
                row.batch.ids.extend_from_slice(&example.ids[part.clone()]);
                row.batch.targets.extend_from_slice(&example.targets[part.clone()]);
                let before = |at: usize| example.bytes * at as u64 / example.ids.len() as u64;
                row.bytes += before(part.end) - before(part.start);
            }
            offset = part.end;
        }
    }
    for row in &mut rows {
        let used = row.batch.ids.len();
        row.batch.starts.extend(repeat_n(used as u32, seq_len - used));
        row.batch.ids.resize(seq_len, 0);
        row.batch.targets.resize(seq_len, IGNORE);
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    fn documents(lengths: &[usize], whole: bool) -> Vec<Example> {
        let mut next = 0u32;
        let example = |&length: &usize| {
            let tokens: Vec<u32> = (next..next + length as u32 + 1).collect();
            next += 100;
            Example::new(&tokens, |_| true, 10, whole).unwrap()
        };
        lengths.iter().map(example).collect()
    }

    fn feed(lengths: &[usize], whole: bool) -> Examples {
        Examples::new(documents(lengths, whole), 8, 1, 7, &mut |_| ()).unwrap()
    }

    #[test]
    fn an_epoch_of_documents_predicts_every_token_once() {
        let mut feed = feed(&[3, 20, 9, 1], false);
        assert_eq!(feed.rows_per_epoch(), 5);
        let mut seen: Vec<u32> = Vec::new();
        while seen.len() < 33 {
            let batch = feed.next_batch(0.0);
            assert!(batch.ids.iter().zip(&batch.targets).all(|(id, target)| id + 1 == *target));
            seen.extend(batch.targets);
        }
        seen.truncate(33);
        seen.sort_unstable();
        let expected: Vec<u32> = (1..4).chain(101..121).chain(201..210).chain([301]).collect();
        assert_eq!(seen, expected);
    }

    #[test]
    fn conversations_stay_in_one_sequence_and_the_rest_is_ignored() {
        let mut feed = feed(&[5, 5, 3, 8], true);
        for _ in 0..20 {
            let batch = feed.next_batch(0.0);
            let starts =
                (0..8).filter(|&i| batch.ids[i].is_multiple_of(100) && batch.targets[i] != IGNORE).count();
            let counted = batch.targets.iter().filter(|&&t| t != IGNORE).count();
            assert!([(1, 5), (1, 8), (2, 8), (1, 3)].contains(&(starts, counted)), "{batch:?}");
        }
    }

    #[test]
    fn what_is_too_long_is_cut_and_told() {
        let mut told = Vec::new();
        let mut list = documents(&[12, 4], true);
        // Nothing within the first 8 counts.
        list.push(Example::new(&(0..12).collect::<Vec<_>>(), |i| i > 9, 10, true).unwrap());
        let feed = Examples::new(list.clone(), 8, 1, 7, &mut |note| told.push(note)).unwrap();
        assert_eq!((feed.len(), feed.tokens()), (2, [12, 12]));
        assert_eq!(
            told,
            ["2 of 3 examples are longer than 8 tokens and were cut there; nothing that counts is left of 1"]
        );
        let error = Examples::new(list.split_off(2), 8, 1, 7, &mut |_| ()).unwrap_err().to_string();
        assert!(error.contains("--data"), "{error}");
    }

    #[test]
    fn a_restored_feed_goes_on_as_the_saved_one_and_refuses_other_data() {
        let mut one = feed(&[3, 20, 9, 1], false);
        (0..7).for_each(|_| drop(one.next_batch(0.0)));
        let state = one.state();
        let mut other = feed(&[3, 20, 9, 1], false);
        other.restore(&state).unwrap();
        for _ in 0..9 {
            assert_eq!(one.next_batch(0.0), other.next_batch(0.0));
        }
        let error = feed(&[3, 20, 9, 2], false).restore(&state).unwrap_err().to_string();
        assert!(error.contains("has changed"), "{error}");
        let mut broken = state.clone();
        broken["index"] = json!(77);
        assert!(other.restore(&broken).unwrap_err().to_string().contains("damaged"));
    }

    #[test]
    fn held_out_rows_hold_everything_once_with_its_bytes() {
        for whole in [true, false] {
            let rows = held_out_rows(&documents(&[3, 7, 2, 8], whole), 8);
            assert_eq!(rows.iter().map(HeldOutBatch::counted).sum::<usize>(), 20);
            assert_eq!(rows.iter().map(|r| r.bytes).sum::<u64>(), 40);
            assert!(rows.iter().all(|r| r.batch.ids.len() == 8 && r.batch.targets.len() == 8));
            assert_eq!(rows.len(), if whole { 4 } else { 3 });
        }
    }
}
