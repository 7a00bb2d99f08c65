//! Direct preference optimisation: pairs of answers of which one is to become likelier than the other.
//!
//! The objective is equation 7 of Rafailov et al. (<https://arxiv.org/abs/2305.18290>): with
//! `h = β · [(ln π(y_w|x) − ln π_ref(y_w|x)) − (ln π(y_l|x) − ln π_ref(y_l|x))]` the loss of a pair is `−ln σ(h)`, where `y_w` is chosen
//! and `y_l` rejected. Its gradient is that of the tokens' cross-entropies, weighted `β · σ(−h)` in the chosen answer and
//! `−β · σ(−h)` in the rejected one. `π_ref` is the model that the run starts from; its probabilities are computed once.

use std::path::PathBuf;

use serde_json::{Value, json};
use setun::chat::{Chat, Message};
use setun::config::ModelConfig;
use setun::tokenizer::Tokenizer;

use super::examples::{Example, check_same_data, damaged};
use super::{chat, read};
use crate::data::{Batch, documents, shuffled};
use crate::error::TrainError;
use crate::feed::Feed;
use crate::loss::{IGNORE, Loss};
use crate::params::TrainModel;
use crate::random::mix;
use crate::tape::Tape;
use crate::trainer::head;

/// An answer to prefer and one to avoid, each behind the same prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    /// `[chosen, rejected]`.
    pub answers: [Example; 2],
}

/// Reads pairs from `.jsonl` files: `{"prompt": …, "chosen": …, "rejected": …}`, strings. Where the model has a chat template the
/// prompt is a user's message and the answers are the assistant's; else they continue the prompt.
///
/// # Errors
/// When a file cannot be read or a line is no pair: with file and line.
pub(crate) fn read(
    paths: &[PathBuf],
    tokenizer: &Tokenizer,
    config: &ModelConfig,
    chat: Option<&Chat>,
) -> Result<Vec<Pair>, TrainError> {
    let mut found = Vec::new();
    for file in documents::files(paths, None)? {
        read::for_each_line(&file, |line| {
            let text = |name: &str| {
                let text = line[name].as_str().filter(|text| !text.trim().is_empty());
                text.ok_or_else(|| format!("`{name}` is to be a string that is not empty"))
            };
            let (prompt, chosen, rejected) = (text("prompt")?, text("chosen")?, text("rejected")?);
            if chosen == rejected {
                return Err("`chosen` and `rejected` are the same, so there is nothing to prefer".into());
            }
            let answer = |said: &str| match chat {
                Some(chat) => {
                    let messages = [Message::new("user", prompt), Message::new(chat::ASSISTANT, said)];
                    let made = chat::examples(chat, tokenizer, config, &messages)?;
                    made.into_iter()
                        .next()
                        .ok_or_else(|| "the chat template leaves the answer out".to_owned())
                }
                None => plain(tokenizer, config, prompt, said),
            };
            found.push(Pair { answers: [answer(chosen)?, answer(rejected)?] });
            Ok(())
        })?;
    }
    Ok(found)
}

fn plain(tokenizer: &Tokenizer, config: &ModelConfig, prompt: &str, said: &str) -> Result<Example, String> {
    let mut tokens = tokenizer.encode_prompt(prompt).map_err(|e| e.to_string())?;
    let before = tokens.len();
    tokens.extend(tokenizer.encode(said, false).map_err(|e| e.to_string())?);
    tokens.extend(read::end_of_text(tokenizer, config));
    let example = Example::new(&tokens, |i| i >= before, said.len() as u64, true);
    example.ok_or_else(|| "an answer has no token".to_owned())
}

/// The endless pairs of a run.
#[derive(Debug, Clone)]
pub struct Pairs {
    list: Vec<Pair>,
    /// `[ln π_ref(chosen), ln π_ref(rejected)]` of each.
    reference: Vec<[f64; 2]>,
    order: Vec<u32>,
    epoch: u64,
    index: usize,
    seed: u64,
    batch: usize,
    beta: f64,
    key: u64,
    sums: Sums,
}

/// Since the last line of the metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Serialize, serde::Deserialize)]
struct Sums {
    pairs: u64,
    margin: f64,
    right: u64,
}

/// Some pairs: rows `2i` and `2i + 1` are the chosen and the rejected answer of pair `i`.
#[derive(Debug, Clone)]
pub struct PairBatch {
    batch: Batch,
    reference: Vec<[f64; 2]>,
}

impl AsRef<Batch> for PairBatch {
    fn as_ref(&self) -> &Batch {
        &self.batch
    }
}

impl Pairs {
    /// `batch` pairs at a time; those longer than `seq_len` tokens are left out, of which `note` is told.
    pub(crate) fn new(
        list: Vec<Pair>,
        seq_len: usize,
        batch: usize,
        seed: u64,
        beta: f64,
        note: &mut dyn FnMut(String),
    ) -> Result<Self, TrainError> {
        if !(beta.is_finite() && beta > 0.0) {
            return Err(TrainError::setting("--beta", beta, "a number above 0"));
        }
        let count = list.len();
        let fits = |pair: &Pair| pair.answers.iter().all(|answer| answer.ids.len() <= seq_len);
        let list: Vec<Pair> = list.into_iter().filter(fits).collect();
        if list.len() < count {
            let long = count - list.len();
            note(format!("{long} of {count} pairs are longer than {seq_len} tokens and were left out"));
        }
        if list.is_empty() {
            return Err(TrainError::setting(
                "--data",
                "without any pair",
                "files with pairs that fit --seq-len",
            ));
        }
        let mut hash = xxhash_rust::xxh3::Xxh3::new();
        for example in list.iter().flat_map(|pair| &pair.answers) {
            hash.update(&(example.ids.len() as u64).to_le_bytes());
            example.ids.iter().chain(&example.targets).for_each(|id| hash.update(&id.to_le_bytes()));
        }
        let (reference, key) = (vec![[0.0; 2]; list.len()], hash.digest());
        let order = shuffled(list.len(), mix(seed ^ mix(0)));
        Ok(Self { list, reference, order, epoch: 0, index: 0, seed, batch, beta, key, sums: Sums::default() })
    }

    /// How many pairs.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether there is none; never true.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// The pairs.
    pub fn list(&self) -> &[Pair] {
        &self.list
    }

    /// `[ln π_ref(chosen), ln π_ref(rejected)]` of each pair.
    pub fn reference(&self) -> &[[f64; 2]] {
        &self.reference
    }

    /// Sets the reference: `log_probs` gives `ln π_ref` of the rows of a batch, a few pairs at a time.
    pub(crate) fn refer_to(&mut self, mut log_probs: impl FnMut(&Batch) -> Vec<f64>) {
        let all: Vec<usize> = (0..self.list.len()).collect();
        for some in all.chunks(self.batch) {
            let rows = log_probs(&self.rows(some));
            for (&n, pair) in some.iter().zip(rows.as_chunks::<2>().0) {
                self.reference[n] = *pair;
            }
        }
    }

    fn rows(&self, which: &[usize]) -> Batch {
        let examples = || which.iter().flat_map(|&n| &self.list[n].answers);
        // Whole multiples, so that few lengths of buffers are needed.
        let seq_len = examples().map(|e| e.ids.len()).max().unwrap_or(1).next_multiple_of(32);
        let mut batch = Batch { batch: 2 * which.len(), seq_len, ..Batch::default() };
        for example in examples() {
            let end = batch.ids.len() + seq_len;
            batch.ids.extend_from_slice(&example.ids);
            batch.targets.extend_from_slice(&example.targets);
            batch.ids.resize(end, 0);
            batch.targets.resize(end, IGNORE);
        }
        batch
    }
}

/// `Σ ln p` of each row's targets, from the tokens' cross-entropies.
pub(crate) fn row_sums(losses: &[f64], seq_len: usize) -> Vec<f64> {
    losses.chunks_exact(seq_len).map(|row| -row.iter().sum::<f64>()).collect()
}

impl Feed for Pairs {
    type Item = PairBatch;

    fn next_batch(&mut self, _: f64) -> PairBatch {
        let mut which = Vec::with_capacity(self.batch);
        for _ in 0..self.batch {
            which.push(self.order[self.index] as usize);
            self.index += 1;
            if self.index == self.order.len() {
                (self.index, self.epoch) = (0, self.epoch + 1);
                self.order = shuffled(self.list.len(), mix(self.seed ^ mix(self.epoch)));
            }
        }
        let reference = which.iter().map(|&n| self.reference[n]).collect();
        PairBatch { batch: self.rows(&which), reference }
    }

    fn counted(&self, item: &PairBatch) -> usize {
        item.reference.len()
    }

    fn objective(&mut self, model: &TrainModel, tape: &mut Tape, item: &PairBatch, weight: f32) -> Loss {
        let PairBatch { batch, reference } = item;
        let hidden = model.hidden(tape, &batch.ids);
        let losses = tape.token_losses(&hidden, head(model), &batch.targets);
        let rows = row_sums(&losses, batch.seq_len);
        let mut loss = Loss { sum: 0.0, tokens: reference.len() };
        let mut weights = Vec::with_capacity(rows.len());
        for (pair, reference) in rows.as_chunks::<2>().0.iter().zip(reference) {
            let h = self.beta * ((pair[0] - reference[0]) - (pair[1] - reference[1]));
            // −ln σ(h) without overflow, and σ(−h).
            loss.sum += (-h).max(0.0) + (-h.abs()).exp().ln_1p();
            let slope = self.beta / (1.0 + h.exp());
            weights.extend([slope as f32 * weight, -slope as f32 * weight]);
            self.sums.pairs += 1;
            self.sums.margin += h;
            self.sums.right += u64::from(h > 0.0);
        }
        tape.weighted_cross_entropy(&hidden, head(model), &batch.targets, |token| {
            weights[token / batch.seq_len]
        });
        loss
    }

    /// `dpo_margin`: mean of `h`, how much more likely the chosen answer became than the rejected one; `dpo_accuracy`: share of
    /// pairs where it is above 0.
    fn measures(&mut self) -> Vec<(&'static str, f64)> {
        let Sums { pairs, margin, right } = std::mem::take(&mut self.sums);
        let mean = |sum: f64| sum / pairs.max(1) as f64;
        vec![("dpo_margin", mean(margin)), ("dpo_accuracy", mean(right as f64))]
    }

    fn state(&self) -> Value {
        let (key, sums) = (format!("{:016x}", self.key), self.sums);
        json!({ "examples": key, "epoch": self.epoch, "index": self.index, "sums": sums })
    }

    fn restore(&mut self, state: &Value) -> Result<(), TrainError> {
        check_same_data(state, self.key)?;
        let sums = serde_json::from_value(state["sums"].clone());
        let (Some(epoch), Some(index), Ok(sums)) = (state["epoch"].as_u64(), state["index"].as_u64(), sums)
        else {
            return Err(damaged());
        };
        if index as usize >= self.list.len() {
            return Err(damaged());
        }
        (self.epoch, self.index, self.sums) = (epoch, index as usize, sums);
        self.order = shuffled(self.list.len(), mix(self.seed ^ mix(epoch)));
        Ok(())
    }
}
