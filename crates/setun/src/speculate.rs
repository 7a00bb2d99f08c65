//! Speculation: guesses of the next tokens, verified by one pass that costs little more than a single token's.
//!
//! A pass over one token waits for memory, so a few more tokens cost little (Leviathan et al.,
//! <https://arxiv.org/abs/2211.17192>). [`crate::generate`] feeds guesses behind the token it has just chosen, chooses from the
//! logits of each position as it would without them, and goes on as long as the choice is the guess. What is chosen never
//! depends on the guesses, and every choice takes its own random number, so the text is the plain one: the same ids for the
//! same seed, not only the same distribution.
//!
//! Guesses come from a [`Drafter`]: [`PromptLookup`] finds where the last tokens stood before and copies what followed them,
//! [`DraftModel`] asks a smaller model. [`Pace`] decides how many are worth their time.

use std::collections::HashMap;

use crate::config::RopeScaling;
use crate::engine::{Engine, Session};
use crate::error::ModelError;

/// Most guesses of one pass: together with the chosen token, what the products take at nearly the price of one.
pub const MOST_GUESSES: usize = 7;

/// Kinds of guesses that are told apart by how often they are right.
const KINDS: usize = 4;

/// Where guesses come from.
pub trait Drafter {
    /// Looks at what is known after `history` grew; the kind of the guesses there would be, less than 4, the surer the higher.
    fn look(&mut self, history: &[u32]) -> Option<usize>;

    /// Adds at most `most` guesses of what follows `history`, just looked at, to `guesses`.
    ///
    /// # Errors
    /// What a draft model fails with.
    fn propose(&mut self, history: &[u32], most: usize, guesses: &mut Vec<u32>) -> Result<(), ModelError>;
}

/// Copies what followed the last tokens where they stood before, in the prompt or in the text so far (prompt-lookup
/// decoding, Saxena 2023): summaries, edits and code repeat much.
#[derive(Debug, Default)]
pub struct PromptLookup {
    /// Where a pair of ids ended last.
    last: HashMap<[u32; 2], usize>,
    /// For every position, where the pair that ends there ended before; 0 for nowhere, as no pair ends there.
    before: Vec<usize>,
    /// Position after the best match.
    found: Option<usize>,
}

impl PromptLookup {
    /// Earlier places that are compared, the latest first.
    const PLACES: usize = 32;
    /// Ids that two places are compared in.
    const LONGEST: usize = 16;

    /// Nothing seen yet.
    pub fn new() -> Self {
        Self::default()
    }

    fn learn(&mut self, history: &[u32]) {
        if history.len() < self.before.len() {
            *self = Self::default();
        }
        for end in self.before.len()..history.len() {
            let pair = end.checked_sub(1).map(|start| [history[start], history[end]]);
            self.before.push(pair.and_then(|pair| self.last.insert(pair, end)).unwrap_or(0));
        }
    }
}

impl Drafter for PromptLookup {
    /// By the length of the match: 2, 3, 4 to 7, or more ids.
    fn look(&mut self, history: &[u32]) -> Option<usize> {
        self.learn(history);
        self.found = None;
        let end = history.len().checked_sub(1)?;
        let (mut place, mut longest) = (self.before[end], 0);
        for _ in 0..Self::PLACES {
            if place == 0 {
                break;
            }
            let pairs = history[..=place].iter().rev().zip(history.iter().rev()).take(Self::LONGEST);
            let length = pairs.take_while(|(a, b)| a == b).count();
            if length > longest {
                (longest, self.found) = (length, Some(place + 1));
            }
            place = self.before[place];
        }
        self.found.map(|_| [0, 0, 0, 1, 2, 2, 2, 2, 3][longest.min(8)])
    }

    fn propose(&mut self, history: &[u32], most: usize, guesses: &mut Vec<u32>) -> Result<(), ModelError> {
        if let Some(from) = self.found {
            // Where the match reaches into the last tokens, they repeat themselves.
            guesses.extend(history[from..].iter().cycle().take(most));
        }
        Ok(())
    }
}

/// A smaller model with the same vocabulary, which guesses its likeliest tokens while it is sure of them.
#[derive(Debug)]
pub struct DraftModel<'e> {
    session: Session<'e>,
}

impl<'e> DraftModel<'e> {
    /// Guesses that it gives less than this probability are not worth a place, unless they are the first.
    const SURE: f32 = 0.4;

    /// A drafter that runs on `session`, which is empty or knows some of the text.
    pub fn new(session: Session<'e>) -> Self {
        Self { session }
    }
}

impl Drafter for DraftModel<'_> {
    fn look(&mut self, history: &[u32]) -> Option<usize> {
        let limit = self.session.len() + self.session.room();
        (!history.is_empty() && history.len() + MOST_GUESSES <= limit).then_some(KINDS - 1)
    }

    fn propose(&mut self, history: &[u32], most: usize, guesses: &mut Vec<u32>) -> Result<(), ModelError> {
        let common = self.session.ids().iter().zip(history).take_while(|(a, b)| a == b).count();
        // At least one token is fed, so that there are logits.
        let known = self.session.truncate(common.min(history.len() - 1));
        // An id that only the larger model has a row for leaves nothing to guess from.
        let vocab_size = self.session.engine().config().vocab_size;
        if history[known..].iter().any(|&id| id as usize >= vocab_size) {
            return Ok(());
        }
        let mut logits = self.session.feed(&history[known..])?;
        for first in std::iter::once(true).chain(std::iter::repeat(false)).take(most) {
            let Some((id, &best)) = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)) else {
                break;
            };
            let sum: f32 = logits.iter().map(|logit| (logit - best).exp()).sum();
            // A model that gives no numbers gives no guesses.
            if !sum.is_finite() || !first && sum.recip() < Self::SURE {
                break;
            }
            guesses.push(id as u32);
            if guesses.len() < most {
                logits = self.session.feed(&[id as u32])?;
            }
        }
        Ok(())
    }
}

/// How many guesses a pass is worth: from how often guesses of a kind were right, and what they cost.
#[derive(Debug, Clone)]
pub struct Pace {
    /// Probability that a guess is right if those before it were.
    right: [f64; KINDS],
    /// Seconds of a pass without guesses, and how many such there were.
    plain: f64,
    plain_passes: u32,
    /// What a guess adds to a pass, as a share of a plain one.
    extra: f64,
    /// Time lost to guesses less time won by them, in plain passes.
    lost: f64,
    tokens: f64,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            right: [0.35, 0.5, 0.7, 0.8],
            plain: 0.0,
            plain_passes: 0,
            extra: 0.15,
            lost: 0.0,
            tokens: 0.0,
        }
    }
}

impl Pace {
    /// Share of the time that may be lost where guesses do not help; with what plain passes cost besides, less than 3 %.
    const LOSS: f64 = 0.01;
    /// Weight of the latest observation.
    const NEW: f64 = 0.15;
    /// Passes without guesses that tell what one costs; the first after a prompt is often slow.
    const FIRST: u32 = 3;

    /// Guesses of this kind that are worth verifying now, at most [`MOST_GUESSES`].
    pub fn most(&self, kind: usize) -> usize {
        if self.plain_passes < Self::FIRST {
            return 0;
        }
        let right = self.right[kind.min(KINDS - 1)];
        let (mut gain, mut chance) = (1.0, 1.0);
        let (mut best, mut most) = (1.02, 0);
        for count in 1..=MOST_GUESSES {
            chance *= right;
            gain += chance;
            let value = gain / (1.0 + self.extra * count as f64);
            if value > best {
                (best, most) = (value, count);
            }
        }
        let affordable = self.lost < 0.5 + Self::LOSS * self.tokens;
        // Now and then one guess finds out whether the text has begun to repeat itself.
        match (most, affordable) {
            (0, _) if self.lost < Self::LOSS * self.tokens - self.extra => 1,
            (_, false) => 0,
            (most, true) => most,
        }
    }

    /// Takes note of a pass of `seconds`, guessing included, in which `right` of `guesses` of this kind were right.
    pub fn note(&mut self, kind: usize, guesses: usize, right: usize, seconds: f64) {
        self.tokens += 1.0 + right as f64;
        if guesses == 0 {
            self.plain = match self.plain_passes {
                0 => seconds,
                passes if passes < Self::FIRST => self.plain.min(seconds),
                // A pass that the system interrupted says nothing.
                _ => self.plain + Self::NEW * (seconds.min(2.0 * self.plain) - self.plain),
            };
            self.plain_passes = self.plain_passes.saturating_add(1);
            return;
        }
        let cost = (seconds / self.plain - 1.0).clamp(0.0, 2.0 * guesses as f64);
        self.lost = (self.lost + cost - right as f64).max(-2.0);
        self.extra += Self::NEW * (cost / guesses as f64 - self.extra);
        let known = &mut self.right[kind.min(KINDS - 1)];
        for guess in 0..guesses.min(right + 1) {
            *known += Self::NEW * (f64::from(u8::from(guess < right)) - *known);
        }
    }
}

/// How much speculation did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Speculated {
    /// Guesses that were verified.
    pub guesses: usize,
    /// Those that were right.
    pub right: usize,
}

/// A drafter with its pace, for one text.
pub struct Speculator<'a> {
    drafter: Box<dyn Drafter + 'a>,
    pace: Pace,
    /// So many guesses every time, instead of what the pace says.
    always: Option<usize>,
    vocab_size: usize,
    kind: usize,
    guesses: Vec<u32>,
    total: Speculated,
}

impl<'a> Speculator<'a> {
    /// Speculation with guesses of `drafter`, for generating with `engine`'s sessions.
    ///
    /// # Errors
    /// Why that model cannot verify guesses: [`can_verify`].
    pub fn new(engine: &Engine, drafter: impl Drafter + 'a) -> Result<Self, ModelError> {
        can_verify(engine)?;
        let (pace, total) = (Pace::default(), Speculated::default());
        let vocab_size = engine.config().vocab_size;
        let (drafter, guesses) = (Box::new(drafter), Vec::new());
        Ok(Self { drafter, pace, always: None, vocab_size, kind: 0, guesses, total })
    }

    /// The same with `count` guesses in every pass that has some, whatever they cost.
    pub fn always(self, count: usize) -> Self {
        Self { always: Some(count.min(MOST_GUESSES)), ..self }
    }

    /// Guesses of what follows `history`, at most `most`, none where they are not worth it.
    ///
    /// # Errors
    /// What a draft model fails with.
    pub fn guess(&mut self, history: &[u32], most: usize) -> Result<&[u32], ModelError> {
        self.guesses.clear();
        if let Some(kind) = self.drafter.look(history) {
            self.kind = kind;
            let most = most.min(self.always.unwrap_or_else(|| self.pace.most(kind)));
            if most > 0 {
                self.drafter.propose(history, most, &mut self.guesses)?;
                // Another model's embeddings may be padded to more rows than this one's.
                let known = self.guesses.iter().take_while(|&&id| (id as usize) < self.vocab_size).count();
                self.guesses.truncate(known);
            }
        }
        Ok(&self.guesses)
    }

    /// Takes note of the pass over the last guesses: `seconds` that they and it took, and how many were right.
    pub fn note(&mut self, right: usize, seconds: f64) {
        self.pace.note(self.kind, self.guesses.len(), right, seconds);
        self.total.guesses += self.guesses.len();
        self.total.right += right;
    }

    /// What it did so far.
    pub fn total(&self) -> Speculated {
        self.total
    }
}

impl std::fmt::Debug for Speculator<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Speculator").field("pace", &self.pace).field("total", &self.total).finish()
    }
}

/// Whether wrong guesses can be taken back.
///
/// # Errors
/// [`ModelError::Speculation`]: recurrent states cannot be rewound, and dynamic RoPE scaling lets tokens depend on how many
/// follow them.
pub fn can_verify(engine: &Engine) -> Result<(), ModelError> {
    let config = engine.config();
    let why = if (0..config.num_layers).any(|n| config.delta_net(n).is_some()) {
        "its recurrent layers cannot take wrong guesses back"
    } else if matches!(config.rope.scaling, RopeScaling::Dynamic { .. }) {
        "with dynamic RoPE scaling a token depends on how many follow it"
    } else {
        return Ok(());
    };
    Err(ModelError::Speculation { why })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guesses(lookup: &mut PromptLookup, history: &[u32], most: usize) -> Option<(usize, Vec<u32>)> {
        let kind = lookup.look(history)?;
        let mut out = Vec::new();
        lookup.propose(history, most, &mut out).unwrap();
        Some((kind, out))
    }

    #[test]
    fn the_longest_match_is_continued_and_among_equals_the_latest() {
        let mut lookup = PromptLookup::new();
        assert_eq!(guesses(&mut lookup, &[], 4), None);
        assert_eq!(guesses(&mut lookup, &[1, 2, 3], 4), None);
        assert_eq!(guesses(&mut lookup, &[1, 2, 3, 1], 4), None, "one id is no match");
        assert_eq!(guesses(&mut lookup, &[1, 2, 3, 1, 2], 2), Some((0, vec![3, 1])));
        // 1 2 3 stood before with 9 behind it, 8 2 3 later with 7: the longer match wins.
        let text = [5, 1, 2, 3, 9, 8, 2, 3, 7, 1, 2, 3];
        assert_eq!(guesses(&mut PromptLookup::new(), &text, 1), Some((1, vec![9])));
        let text = [1, 2, 9, 1, 2, 8, 1, 2];
        assert_eq!(guesses(&mut PromptLookup::new(), &text, 1), Some((0, vec![8])));
    }

    #[test]
    fn a_repetition_continues_into_itself_and_is_surest() {
        let history: Vec<u32> = (0..30).map(|i| i % 3).collect();
        assert_eq!(guesses(&mut PromptLookup::new(), &history, 7), Some((3, vec![0, 1, 2, 0, 1, 2, 0])));
        assert_eq!(guesses(&mut PromptLookup::new(), &[4, 9, 9, 9], 3), Some((0, vec![9, 9, 9])));
    }

    #[test]
    fn another_text_starts_afresh() {
        let mut lookup = PromptLookup::new();
        lookup.look(&[1, 2, 3, 4, 1, 2]).unwrap();
        assert_eq!(guesses(&mut lookup, &[7, 1, 2], 3), None);
    }

    #[test]
    fn right_guesses_grow_and_wrong_ones_soon_stop() {
        let mut pace = Pace::default();
        (0..20).for_each(|_| pace.note(0, 0, 0, 0.01));
        for _ in 0..40 {
            let most = pace.most(3);
            pace.note(3, most, most, 0.01 * (1.0 + 0.1 * most as f64));
        }
        assert_eq!(pace.most(3), MOST_GUESSES);
        let mut pace = Pace::default();
        (0..20).for_each(|_| pace.note(0, 0, 0, 0.01));
        let (mut seconds, mut passes) = (0.0, 0.0);
        for _ in 0..1000 {
            let most = pace.most(1);
            let time = 0.01 * (1.0 + 0.3 * most as f64);
            pace.note(1, most, 0, time);
            (seconds, passes) = (seconds + time, passes + 1.0);
        }
        assert!(seconds < 0.01 * passes * 1.02, "{seconds} s for {passes} plain passes");
        assert!(seconds > 0.01 * passes, "it still tries now and then");
    }

    #[test]
    fn dear_guesses_are_not_made() {
        let mut pace = Pace::default();
        (0..20).for_each(|_| pace.note(0, 0, 0, 0.01));
        for _ in 0..20 {
            let most = pace.most(1);
            pace.note(1, most, most / 2, 0.01 * (1.0 + 1.5 * most as f64));
        }
        assert_eq!(pace.most(1), 0);
    }

    #[test]
    fn nothing_is_guessed_before_a_plain_pass_is_known() {
        let mut pace = Pace::default();
        assert_eq!(pace.most(3), 0);
        (0..3).for_each(|_| pace.note(3, 0, 0, 0.01));
        assert!(pace.most(3) > 0);
    }
}
