//! Perplexity of a text under a model, on the kernels that run it.

use crate::engine::Engine;
use crate::error::ModelError;
use crate::kv_cache::KvType;
use crate::tokenizer::Tokenizer;

/// How a text longer than the context is cut.
#[derive(Debug, Clone, Copy)]
pub struct Windows {
    /// Tokens of a window.
    pub context: usize,
    /// New tokens per window; the rest of a window is context that an earlier one has scored.
    pub stride: usize,
}

/// What a model thinks of a text.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Perplexity {
    /// Sum of −ln p over the scored tokens.
    pub nats: f64,
    /// Tokens scored: all but the first of the text.
    pub tokens: usize,
    /// Bytes of the text, the first token's included, which has no score where the tokenizer adds no start token.
    pub bytes: usize,
}

impl Perplexity {
    /// `exp(nats / tokens)`.
    pub fn perplexity(&self) -> f64 {
        libm::exp(self.nats / self.tokens.max(1) as f64)
    }

    /// Bits per byte of text: comparable between tokenizers.
    pub fn bits_per_byte(&self) -> f64 {
        self.nats / std::f64::consts::LN_2 / self.bytes.max(1) as f64
    }
}

/// Scores `text` in strided windows, the usual WikiText protocol: the whole text is one sequence of tokens (with a start token
/// if the tokenizer adds one), every token but the first is scored once, given up to `context - stride` tokens before its
/// window's new part and everything in between. Keys and values are kept as `kv`. `progress` receives tokens scored and their total.
///
/// # Errors
/// When the text has fewer than two tokens, the windows do not fit the model, the text cannot be tokenised, or the model's
/// logits are not numbers.
pub fn perplexity(
    engine: &Engine,
    tokenizer: &Tokenizer,
    text: &str,
    windows: Windows,
    kv: KvType,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Perplexity, ModelError> {
    let Windows { context, stride } = windows;
    let limit = engine.config().max_positions;
    if context < 2 || context > limit {
        let expected = format!("2 to {limit}, the model's own limit");
        return Err(ModelError::ConfigValue { field: "window".into(), found: context.to_string(), expected });
    }
    if stride == 0 || stride >= context {
        let expected = format!("1 to {}, below the window", context - 1);
        return Err(ModelError::ConfigValue { field: "stride".into(), found: stride.to_string(), expected });
    }
    let ids = tokenizer.encode(text, true)?;
    if ids.len() < 2 {
        return Err(ModelError::TooShort { tokens: ids.len() });
    }
    let vocab = engine.config().vocab_size;
    // Targets are looked up in the logits, the last one without ever being fed.
    if let Some(&id) = ids.iter().find(|&&id| id as usize >= vocab) {
        return Err(ModelError::UnknownToken { id, vocab_size: vocab });
    }
    let mut session = engine.session(kv, Some(context));
    let mut result = Perplexity { nats: 0.0, tokens: 0, bytes: text.len() };
    // `scored` tokens have been scored (the first counts, though it has nothing before it).
    let mut scored = 1;
    while scored < ids.len() {
        let end = if scored == 1 { context } else { scored + stride }.min(ids.len());
        let begin = end.saturating_sub(context);
        session.clear();
        let (targets, new) = (&ids[begin + 1..end], scored - begin - 1);
        session.feed_each(&ids[begin..end - 1], new, &mut |first, logits| {
            for (row, &target) in
                logits.chunks_exact(vocab).zip(&targets[first..]).skip(new.saturating_sub(first))
            {
                let log_sum = engine.kernels().log_sum_exp(row);
                result.nats += f64::from(log_sum - row[target as usize]);
                result.tokens += 1;
            }
        })?;
        scored = end;
        if !result.nats.is_finite() {
            return Err(ModelError::NotFinite { tokens: end });
        }
        progress(result.tokens, ids.len() - 1);
    }
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::EngineOptions;
    use std::path::Path;

    fn model() -> (Engine, Tokenizer) {
        let folder =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/models/bitnet-tied-packed-small");
        let engine = Engine::open(&folder, &EngineOptions::default()).unwrap();
        (engine, Tokenizer::from_folder(&folder).unwrap())
    }

    #[test]
    fn every_token_but_the_first_is_scored_once_whatever_the_stride() {
        let (engine, tokenizer) = model();
        let text = "The treasure of Captain Flint was buried on the island, and nobody had found it since.";
        let total = tokenizer.encode(text, true).unwrap().len() - 1;
        for (context, stride) in [(64, 63), (16, 8), (16, 1), (5, 4), (512, 100)] {
            let found = perplexity(
                &engine,
                &tokenizer,
                text,
                Windows { context, stride },
                KvType::F32,
                &mut |_, _| {},
            )
            .unwrap();
            assert_eq!(found.tokens, total, "context {context}, stride {stride}");
        }
    }

    #[test]
    fn one_window_equals_the_sum_over_its_logits() {
        let (engine, tokenizer) = model();
        let text = "him he had fallen back";
        let ids = tokenizer.encode(text, true).unwrap();
        let found = perplexity(
            &engine,
            &tokenizer,
            text,
            Windows { context: 128, stride: 64 },
            KvType::F32,
            &mut |_, _| {},
        )
        .unwrap();
        let mut session = engine.session(KvType::F32, None);
        let logits = session.feed_all(&ids[..ids.len() - 1], None).unwrap();
        let nats: f64 = logits
            .chunks(engine.config().vocab_size)
            .zip(&ids[1..])
            .map(|(row, &id)| {
                let sum: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
                sum.ln() - f64::from(row[id as usize])
            })
            .sum();
        assert!((found.nats - nats).abs() < 1e-3, "{} and {nats}", found.nats);
    }

    #[test]
    fn batches_of_a_long_window_give_the_sum_of_one_pass() {
        let (engine, tokenizer) = model();
        // Beyond the model's 512 positions, so that a window takes more than one batch.
        let mut config = engine.config().clone();
        config.max_positions = 2000;
        let folder =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/models/bitnet-tied-packed-small");
        let file = crate::format::Checkpoint::open(folder).unwrap();
        let engine = Engine::load(&file, config, &EngineOptions::default()).unwrap();
        let text = "He had fallen back, and nobody knew why. ".repeat(40);
        let ids = tokenizer.encode(&text, true).unwrap();
        assert!((600..2000).contains(&ids.len()), "{}", ids.len());
        let windows = Windows { context: 2000, stride: 1000 };
        let found = perplexity(&engine, &tokenizer, &text, windows, KvType::F32, &mut |_, _| {}).unwrap();
        let mut session = engine.session(KvType::F32, None);
        let logits = session.feed_all(&ids[..ids.len() - 1], None).unwrap();
        let rows = logits.chunks(engine.config().vocab_size).zip(&ids[1..]);
        let nats: f64 =
            rows.map(|(row, &id)| f64::from(engine.kernels().log_sum_exp(row) - row[id as usize])).sum();
        assert_eq!((found.nats, found.tokens), (nats, ids.len() - 1));
    }

    #[test]
    fn a_last_token_outside_the_vocabulary_is_an_error() {
        let (engine, _) = model();
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/bitllama2/tok512.model");
        let other = Tokenizer::from_sentencepiece(&std::fs::read(file).unwrap()).unwrap();
        let ids = other.encode("the日z", true).unwrap();
        let vocab = engine.config().vocab_size as u32;
        let (last, rest) = ids.split_last().unwrap();
        assert!(*last >= vocab && rest.iter().all(|&id| id < vocab), "{ids:?}");
        let found = perplexity(
            &engine,
            &other,
            "the日z",
            Windows { context: 64, stride: 32 },
            KvType::F32,
            &mut |_, _| {},
        );
        assert!(found.unwrap_err().to_string().contains("outside the vocabulary"));
    }

    #[test]
    fn windows_that_cannot_be_are_refused() {
        let (engine, tokenizer) = model();
        for (context, stride) in [(1, 1), (8, 8), (8, 0), (100_000, 10)] {
            assert!(
                perplexity(
                    &engine,
                    &tokenizer,
                    "some text",
                    Windows { context, stride },
                    KvType::F32,
                    &mut |_, _| {}
                )
                .is_err()
            );
        }
    }
}
