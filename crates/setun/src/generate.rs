//! Text in, text out: prompt, sampling loop, streaming, stop conditions, speed.

use std::time::{Duration, Instant};

use crate::engine::Session;
use crate::error::ModelError;
use crate::sampler::Sampler;
use crate::speculate::{Speculated, Speculator};
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
    /// What the speculator has done so far, in this generation and those before it.
    pub speculated: Speculated,
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
    generate_with(session, tokenizer, prompt, sampler, limits, Extras::default(), emit)
}

/// What a generation may have besides prompt, sampler and limits.
#[derive(Debug, Default)]
pub struct Extras<'a, 'd> {
    /// Control tokens whose text is passed on, which is left out otherwise: tags that the receiver looks for.
    pub shown: &'a [u32],
    /// Guesses several tokens ahead; the text is the same without.
    pub speculator: Option<&'a mut Speculator<'d>>,
}

/// [`generate`] with `extras`.
///
/// # Errors
/// As [`generate`].
pub fn generate_with(
    session: &mut Session,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    sampler: &mut Sampler,
    limits: &Limits,
    extras: Extras,
    emit: &mut dyn FnMut(&str) -> bool,
) -> Result<Report, ModelError> {
    let Extras { shown, mut speculator } = extras;
    let started = Instant::now();
    session.feed_for(prompt, 1, &sampler.need_after(prompt, 1))?;
    let prefill = started.elapsed();
    for &id in prompt {
        sampler.accept(id);
    }
    // The decoder sees the prompt too, so that a first word keeps its space.
    let mut stream = StreamDecoder::new(tokenizer, true).showing(shown);
    for &id in prompt {
        stream.push(id)?;
    }
    let (mut text, mut new_ids) = (session.ids().to_vec(), Vec::new());
    // The last pass read the token chosen before it, then `guesses`, in so many seconds.
    let (mut guesses, mut seconds) = (Vec::new(), None);
    let started = Instant::now();
    let stop = loop {
        let first = session.len() - guesses.len();
        let mut right = 0;
        let stop = loop {
            if new_ids.len() == limits.max_tokens {
                break Some(Stop::MaxTokens);
            }
            let candidates = &session.candidates()[right];
            if !candidates.is_finite() {
                return Err(ModelError::NotFinite { tokens: first + right });
            }
            let id = sampler.pick(candidates);
            sampler.accept(id);
            if limits.stop_ids.contains(&id) {
                break Some(Stop::EndOfText);
            }
            new_ids.push(id);
            text.push(id);
            let piece = stream.push(id)?;
            if !piece.is_empty() && !emit(&piece) {
                break Some(Stop::Asked);
            }
            if new_ids.len() == limits.max_tokens {
                break Some(Stop::MaxTokens);
            }
            if guesses.get(right) != Some(&id) {
                break None;
            }
            right += 1;
        };
        // What was guessed wrongly, or behind the end, is taken back.
        let _ = session.truncate(first + right);
        if let (Some(speculator), Some(seconds)) = (&mut speculator, seconds) {
            speculator.note(right, seconds);
        }
        if let Some(stop) = stop {
            break stop;
        }
        if session.room() == 0 {
            break Stop::ContextFull;
        }
        let pass = Instant::now();
        let mut ids = vec![*text.last().expect("a token was chosen")];
        if let Some(speculator) = &mut speculator {
            // Those behind the last token that will be chosen would be verified for nothing.
            let most = (limits.max_tokens - new_ids.len() - 1).min(session.room() - 1);
            ids.extend_from_slice(speculator.guess(&text, most)?);
        }
        guesses = ids.split_off(1);
        let need = sampler.need_after(&guesses, guesses.len() + 1);
        ids.extend_from_slice(&guesses);
        session.feed_for(&ids, ids.len(), &need)?;
        seconds = Some(pass.elapsed().as_secs_f64());
    };
    let rest = stream.finish()?;
    if !rest.is_empty() {
        emit(&rest);
    }
    let speculated = speculator.map(|speculator| speculator.total()).unwrap_or_default();
    let decode = started.elapsed();
    Ok(Report { prompt_tokens: prompt.len(), new_ids, prefill, decode, stop, speculated })
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
