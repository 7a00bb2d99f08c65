//! Text in, text out: prompt, sampling loop, streaming, stop conditions, speed.

use std::time::{Duration, Instant};

use crate::engine::Session;
use crate::error::ModelError;
use crate::sampler::Sampler;
use crate::tokenizer::{StreamDecoder, Tokenizer};

/// When to stop.
#[derive(Debug, Clone)]
pub struct Limits {
    /// New tokens at most.
    pub max_tokens: usize,
    /// Ids that end the text; they are not printed.
    pub stop_ids: Vec<u32>,
}

/// Why generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// The model produced an end token.
    EndOfText,
    /// `max_tokens` were produced.
    MaxTokens,
    /// The context has no room for another token.
    ContextFull,
    /// The receiver of the text asked for it.
    Asked,
}

/// What a generation did, and how fast.
#[derive(Debug, Clone)]
pub struct Report {
    /// Tokens of the prompt that were read.
    pub prompt_tokens: usize,
    /// Tokens produced, without the end token.
    pub new_ids: Vec<u32>,
    /// Time to read the prompt and have the first logits.
    pub prefill: Duration,
    /// Time for everything after.
    pub decode: Duration,
    /// Why it ended.
    pub stop: Stop,
}

impl Report {
    /// Tokens of the prompt read per second.
    pub fn prefill_rate(&self) -> f64 {
        self.prompt_tokens as f64 / self.prefill.as_secs_f64().max(1e-9)
    }

    /// Tokens produced per second after the first.
    pub fn decode_rate(&self) -> f64 {
        self.new_ids.len().saturating_sub(1) as f64 / self.decode.as_secs_f64().max(1e-9)
    }
}

/// Feeds `prompt` to `session` and samples until a limit; `emit` receives pieces of text, never half a character, and
/// returns whether to go on.
///
/// # Errors
/// When the prompt is empty, does not fit the context, or holds an unknown id; when a token cannot be decoded; and
/// what `emit` fails with, as [`ModelError::Write`].
pub fn generate(
    session: &mut Session,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    sampler: &mut Sampler,
    limits: &Limits,
    emit: &mut dyn FnMut(&str) -> bool,
) -> Result<Report, ModelError> {
    generate_showing(session, tokenizer, prompt, sampler, limits, &[], emit)
}

/// [`generate`], with the text of these control tokens, which it leaves out otherwise: tags that the receiver looks for.
///
/// # Errors
/// As [`generate`].
pub fn generate_showing(
    session: &mut Session,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    sampler: &mut Sampler,
    limits: &Limits,
    shown: &[u32],
    emit: &mut dyn FnMut(&str) -> bool,
) -> Result<Report, ModelError> {
    let started = Instant::now();
    session.feed_for(prompt, 1, &sampler.need_after(prompt))?;
    let prefill = started.elapsed();
    for &id in prompt {
        sampler.accept(id);
    }
    // The decoder sees the prompt too, so that a first word keeps its space.
    let mut stream = StreamDecoder::new(tokenizer, true).showing(shown);
    for &id in prompt {
        stream.push(id)?;
    }
    let mut new_ids = Vec::new();
    let started = Instant::now();
    let stop = loop {
        if new_ids.len() == limits.max_tokens {
            break Stop::MaxTokens;
        }
        let [candidates] = session.candidates() else { unreachable!("one position was asked for") };
        if !candidates.is_finite() {
            return Err(ModelError::NotFinite { tokens: session.len() });
        }
        let id = sampler.pick(candidates);
        sampler.accept(id);
        if limits.stop_ids.contains(&id) {
            break Stop::EndOfText;
        }
        new_ids.push(id);
        let text = stream.push(id)?;
        if !text.is_empty() && !emit(&text) {
            break Stop::Asked;
        }
        if new_ids.len() == limits.max_tokens {
            break Stop::MaxTokens;
        }
        if session.room() == 0 {
            break Stop::ContextFull;
        }
        session.feed_for(&[id], 1, &sampler.need())?;
    };
    let rest = stream.finish()?;
    if !rest.is_empty() {
        emit(&rest);
    }
    Ok(Report { prompt_tokens: prompt.len(), new_ids, prefill, decode: started.elapsed(), stop })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Activation, ModelConfig, Shape};
    use crate::cpu::CpuMatrix;
    use crate::engine::{Engine, EngineOptions};
    use crate::kv_cache::KvType;
    use crate::model::{Model, Role, Source};
    use crate::sampler::Sampling;
    use setun_kernels::dense::{DenseData, DenseMatrix};

    /// Weights that are all the same.
    struct Damaged(f32);

    impl Source for Damaged {
        type Matrix = CpuMatrix;
        type Vector = Vec<f32>;

        fn matrix(&mut self, _: &str, rows: usize, cols: usize, _: Role) -> Result<CpuMatrix, ModelError> {
            let values = DenseData::F32(vec![self.0; rows * cols]);
            Ok(CpuMatrix::Dense(DenseMatrix::new(rows, cols, values).unwrap()))
        }

        fn vector(&mut self, _: &str, len: usize) -> Result<Vec<f32>, ModelError> {
            Ok(vec![1.0; len])
        }
    }

    #[test]
    fn weights_that_are_not_numbers_end_in_an_error_not_in_text() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../golden/models/bitnet-tied-packed-small");
        let tokenizer = Tokenizer::from_folder(folder.as_ref()).unwrap();
        let shape = Shape {
            vocab_size: tokenizer.vocab_size(),
            hidden_size: 32,
            intermediate_size: 32,
            num_layers: 1,
            heads: 2,
            kv_heads: 1,
            max_positions: 16,
            rope_theta: 1e4,
            tied: true,
            sub_norms: false,
            activation: Activation::Silu,
        };
        for value in [f32::NAN, f32::INFINITY] {
            let config = ModelConfig::fresh(&shape, false).unwrap();
            let model = Model::build(config, &mut Damaged(value)).unwrap();
            let engine = Engine::from_model(model, &EngineOptions::default());
            let mut sampler = Sampler::new(Sampling::default()).unwrap();
            let limits = Limits { max_tokens: 4, stop_ids: Vec::new() };
            let mut session = engine.session(KvType::F16, None);
            let told = generate(&mut session, &tokenizer, &[1, 2], &mut sampler, &limits, &mut |_| true);
            let error = told.unwrap_err();
            assert!(matches!(error, ModelError::NotFinite { tokens: 2 }), "{error}");
        }
    }
}
