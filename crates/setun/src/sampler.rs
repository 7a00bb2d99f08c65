//! Choosing the next token from logits: greedy, temperature, top-k, top-p, min-p and penalties.
//!
//! The same seed and the same logits give the same ids on every machine: the random numbers are
//! SplitMix64 (Steele, Lea, Flood 2014, <https://doi.org/10.1145/2660193.2660195>), `exp` is the
//! kernels' own, sums run in a fixed order in f64, and equal logits are ordered by id.
//!
//! Order of the steps: penalties, temperature, top-k, top-p, min-p, draw.
//!
//! Most settings leave only a few tokens to choose from, the largest logits and what penalties may lift among them:
//! [`Sampler::need`] says which, and [`Sampler::pick`] from these (or more) is [`Sampler::sample`] from all.

use crate::error::ModelError;
use crate::head::{Candidates, LogitsNeed};
use setun_kernels::float::exp;
use std::cmp::Ordering;
use std::collections::{HashMap, VecDeque};

/// How to choose. Any combination of valid values is valid.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Logits are divided by it; 0 means greedy (the first of the largest). Finite, not negative.
    pub temperature: f32,
    /// Only this many of the likeliest tokens are drawn from; 0 means all.
    pub top_k: usize,
    /// Only the likeliest tokens that together reach this probability; in (0, 1], 1 means all.
    pub top_p: f32,
    /// Only tokens at least this likely relative to the likeliest; in [0, 1], 0 means all.
    pub min_p: f32,
    /// Logits of recent tokens are divided by it if positive, multiplied if negative; over 0, 1 is off
    /// (CTRL, <https://arxiv.org/abs/1909.05858>, section 4.1).
    pub repetition_penalty: f32,
    /// Subtracted from a recent token's logit once for every occurrence; finite, 0 is off.
    pub frequency_penalty: f32,
    /// Subtracted from a recent token's logit once; finite, 0 is off.
    pub presence_penalty: f32,
    /// How many accepted tokens the penalties look back at; 0 turns them off.
    pub repeat_last_n: usize,
    /// Seed of the random numbers.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            repeat_last_n: 64,
            seed: 0,
        }
    }
}

impl Sampling {
    /// Always the likeliest token.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// # Errors
    /// [`ModelError::Sampling`] with the field that is out of the range its documentation gives.
    pub fn validate(&self) -> Result<(), ModelError> {
        let finite = f32::is_finite;
        let checks = [
            (
                "temperature",
                self.temperature,
                finite(self.temperature) && self.temperature >= 0.0,
                "0 or more",
            ),
            ("top_p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "more than 0, at most 1"),
            ("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "0 to 1"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                finite(self.repetition_penalty) && self.repetition_penalty > 0.0,
                "more than 0",
            ),
            ("frequency_penalty", self.frequency_penalty, finite(self.frequency_penalty), "a finite number"),
            ("presence_penalty", self.presence_penalty, finite(self.presence_penalty), "a finite number"),
        ];
        match checks.into_iter().find(|check| !check.2) {
            None => Ok(()),
            Some((name, value, _, expected)) => {
                Err(ModelError::Sampling { name, value: value.to_string(), expected })
            }
        }
    }

    fn penalises(&self) -> bool {
        let neutral =
            (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) == (1.0, 0.0, 0.0);
        self.repeat_last_n > 0 && !neutral
    }
}

/// Chooses tokens one after another, with the state that needs: random numbers and recent tokens.
#[derive(Clone, Debug)]
pub struct Sampler {
    sampling: Sampling,
    random: u64,
    recent: VecDeque<u32>,
    /// Reused between calls: (logit, id).
    candidates: Vec<(f32, u32)>,
}

impl Sampler {
    /// # Errors
    /// As [`Sampling::validate`].
    pub fn new(sampling: Sampling) -> Result<Self, ModelError> {
        sampling.validate()?;
        let random = sampling.seed;
        Ok(Self { sampling, random, recent: VecDeque::new(), candidates: Vec::new() })
    }

    /// Notes a token of the text (of the prompt, or one that was chosen) for the penalties.
    pub fn accept(&mut self, id: u32) {
        if !self.sampling.penalises() {
            return;
        }
        if self.recent.len() >= self.sampling.repeat_last_n {
            self.recent.pop_front();
        }
        self.recent.push_back(id);
    }

    /// The logits that the next choice can depend on.
    pub fn need(&self) -> LogitsNeed {
        self.need_after(&[], 1)
    }

    /// The logits that so many `choices` can depend on: the last one after all of `ids`, the one before without the last of them, and
    /// so on. None of `ids` is accepted yet.
    pub fn need_after(&self, ids: &[u32], choices: usize) -> LogitsNeed {
        let Sampling { temperature, top_k, top_p, min_p, repeat_last_n, .. } = self.sampling;
        // Penalties may move recent tokens anywhere, and leave the order of the others. So the `top_k` that remain after them
        // are recent ones or among the `top_k` largest of the others.
        let mut also = Vec::new();
        if self.sampling.penalises() {
            also.extend(&self.recent);
            // The first choice looks back further than the last.
            let back = repeat_last_n.saturating_add(choices.saturating_sub(1));
            also.extend(&ids[ids.len().saturating_sub(back)..]);
            also.sort_unstable();
            also.dedup();
        }
        // Weights below `min_p` go. With room for what rounding does to weights.
        let near = temperature * (0.01 - min_p.ln());
        let (count, within) = match (temperature, top_k, top_p < 1.0, min_p > 0.0) {
            (0.0, ..) => (1, f32::INFINITY),
            (_, 0, true, _) | (_, 0, _, false) => return LogitsNeed::All,
            (_, 0, false, true) => (usize::MAX, near),
            // Top-p counts the weights of all `top_k`, min-p does not.
            (_, k, true, _) | (_, k, _, false) => (k, f32::INFINITY),
            (_, k, false, true) => (k, near),
        };
        LogitsNeed::Top { count, within, also }
    }

    /// The next token. `logits` holds one value for each id and is changed by the penalties.
    ///
    /// NaN and −∞ are never chosen; if nothing else is there (or `logits` is empty) the answer is 0.
    /// Does not call [`Sampler::accept`].
    pub fn sample(&mut self, logits: &mut [f32]) -> u32 {
        for (id, count) in self.counts() {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit = self.penalised(*logit, count);
            }
        }
        if self.sampling.temperature == 0.0 {
            return first_largest(logits.iter().copied().zip(0..)).map_or(0, |(_, id)| id);
        }
        self.candidates.clear();
        self.candidates.extend(logits.iter().copied().zip(0..));
        self.choose()
    }

    /// [`Sampler::sample`] from what [`Sampler::need`] asks for: the id that it gives for all logits.
    pub fn pick(&mut self, from: &Candidates) -> u32 {
        self.candidates.clear();
        self.candidates.extend(from.iter().map(|(id, logit)| (logit, id)));
        for (id, count) in self.counts() {
            if let Some(at) = from.position(id) {
                self.candidates[at].0 = self.penalised(self.candidates[at].0, count);
            }
        }
        self.choose()
    }

    /// The next token out of `candidates`, which are in rising order of ids.
    fn choose(&mut self) -> u32 {
        let candidates = &mut self.candidates;
        let Some((largest, best)) = first_largest(candidates.iter().copied()) else {
            return 0;
        };
        let Sampling { temperature, top_k, top_p, min_p, .. } = self.sampling;
        if temperature == 0.0 || largest == f32::INFINITY {
            return best;
        }
        // Weight of the likeliest is 1, so min-p is a bound on the weight itself.
        let weight = |logit: f32| exp((logit - largest) / temperature);
        candidates.retain(|&(logit, _)| logit > f32::NEG_INFINITY);
        if top_k > 0 && top_k < candidates.len() {
            candidates.select_nth_unstable_by(top_k - 1, likelier);
            candidates.truncate(top_k);
            candidates.sort_unstable_by_key(|&(_, id)| id); // Selection leaves an order of its own.
        }
        for candidate in candidates.iter_mut() {
            candidate.0 = weight(candidate.0);
        }
        if top_p < 1.0 {
            keep_top_p(candidates, top_p);
        }
        if min_p > 0.0 {
            candidates.retain(|&(weight, _)| weight >= min_p);
        }
        let total: f64 = candidates.iter().map(|&(weight, _)| f64::from(weight)).sum();
        let target = self.uniform() * total;
        let mut sum = 0.0;
        for &(weight, id) in &self.candidates {
            sum += f64::from(weight);
            if target < sum {
                return id;
            }
        }
        best // Only if rounding carries `target` to the total itself.
    }

    /// How often each recent token occurs, where that matters.
    fn counts(&self) -> HashMap<u32, u32> {
        let mut counts = HashMap::new();
        if self.sampling.penalises() {
            self.recent.iter().for_each(|&id| *counts.entry(id).or_default() += 1);
        }
        counts
    }

    /// The logit of a token that occurs `count` times.
    fn penalised(&self, logit: f32, count: u32) -> f32 {
        let Sampling { repetition_penalty, frequency_penalty, presence_penalty, .. } = self.sampling;
        let logit = if logit > 0.0 { logit / repetition_penalty } else { logit * repetition_penalty };
        logit - (count as f32 * frequency_penalty + presence_penalty)
    }

    /// Uniform in [0, 1): the upper 53 bits of SplitMix64's next output.
    fn uniform(&mut self) -> f64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// The first of the largest logits that are neither NaN nor −∞, with its id.
fn first_largest(logits: impl Iterator<Item = (f32, u32)>) -> Option<(f32, u32)> {
    let mut best = None;
    let mut largest = f32::NEG_INFINITY;
    for (logit, id) in logits {
        if logit > largest {
            (best, largest) = (Some((logit, id)), logit);
        }
    }
    best
}

/// Larger first, then the smaller id.
fn likelier(a: &(f32, u32), b: &(f32, u32)) -> Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

/// Keeps the shortest list of likeliest candidates whose weights reach `top_p` of the total.
/// Leaves them likeliest first. Sorts only as many as it needs.
fn keep_top_p(candidates: &mut Vec<(f32, u32)>, top_p: f32) {
    let total: f64 = candidates.iter().map(|&(weight, _)| f64::from(weight)).sum();
    let target = f64::from(top_p) * total;
    let (mut sorted, mut sum) = (0, 0.0);
    while sorted < candidates.len() {
        let rest = &mut candidates[sorted..];
        let step = (sorted * 3).max(128).min(rest.len());
        if step < rest.len() {
            rest.select_nth_unstable_by(step - 1, likelier);
        }
        rest[..step].sort_unstable_by(likelier);
        for (index, &(weight, _)) in rest[..step].iter().enumerate() {
            sum += f64::from(weight);
            if sum >= target {
                candidates.truncate(sorted + index + 1);
                return;
            }
        }
        sorted += step;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(sampling: Sampling) -> Sampler {
        Sampler::new(sampling).expect("valid settings")
    }

    fn open(seed: u64) -> Sampling {
        Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed, ..Sampling::default() }
    }

    fn draws(sampling: Sampling, logits: &[f32], count: usize) -> Vec<u32> {
        let mut sampler = sampler(sampling);
        (0..count).map(|_| sampler.sample(&mut logits.to_vec())).collect()
    }

    /// Logits of a small fixed pseudo-random vocabulary.
    fn vocabulary(size: u32) -> Vec<f32> {
        (0..size).map(|i| (i.wrapping_mul(2654435761) >> 8) as f32 / (1 << 22) as f32 - 2.0).collect()
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        assert_eq!(sampler(Sampling::greedy()).sample(&mut [1.0, 3.0, f32::NAN, 3.0]), 1);
        assert_eq!(sampler(Sampling::greedy()).sample(&mut [-2.0, f32::NAN, -1.0]), 2);
    }

    #[test]
    fn nan_and_minus_infinity_are_never_chosen() {
        let logits = [f32::NAN, f32::NEG_INFINITY, 0.0, f32::NAN, 0.5];
        let ids = draws(open(3), &logits, 400);
        assert!(ids.iter().all(|id| [2, 4].contains(id)) && ids.contains(&2) && ids.contains(&4));
        for logits in [vec![], vec![f32::NEG_INFINITY; 3], vec![f32::NAN; 3]] {
            assert_eq!(draws(open(3), &logits, 1), [0]);
        }
        assert_eq!(draws(open(3), &[0.0, f32::INFINITY, 9.0], 1), [1]);
    }

    /// The ids of this seed are part of the interface: a change breaks everyone's reproducibility.
    #[test]
    fn a_seed_gives_these_ids_for_good() {
        let mut state = sampler(open(42));
        let first: Vec<u64> = (0..2).map(|_| (state.uniform() * (1u64 << 53) as f64) as u64).collect();
        // SplitMix64(42) = 13679457532755275413, 2949826092126892291 (reference implementation).
        assert_eq!(first, [13679457532755275413u64 >> 11, 2949826092126892291u64 >> 11]);
    }

    #[test]
    fn draws_follow_the_softmax() {
        let logits = [0.0, (2.0f32).ln(), (5.0f32).ln()];
        let ids = draws(open(7), &logits, 40_000);
        for (id, expected) in [(0, 1.0 / 8.0), (1, 2.0 / 8.0), (2, 5.0 / 8.0)] {
            let share = ids.iter().filter(|&&x| x == id).count() as f64 / ids.len() as f64;
            assert!((share - expected).abs() < 0.01, "id {id}: {share}, expected {expected}");
        }
    }

    #[test]
    fn top_k_keeps_the_largest_and_the_smaller_ids_among_equals() {
        let logits = [1.0, 2.0, 2.0, 2.0, 0.0];
        let ids = draws(Sampling { top_k: 2, ..open(1) }, &logits, 300);
        assert!(ids.iter().all(|id| [1, 2].contains(id)) && ids.contains(&1) && ids.contains(&2));
        assert!(draws(Sampling { top_k: 1, ..open(1) }, &logits, 50).iter().all(|&id| id == 1));
    }

    #[test]
    fn top_p_keeps_the_shortest_list_that_reaches_it() {
        let logits = [(0.5f32).ln(), (0.3f32).ln(), (0.2f32).ln()];
        for (top_p, allowed) in [(0.45, 1), (0.6, 2), (0.9, 3)] {
            let ids = draws(Sampling { top_p, ..open(5) }, &logits, 500);
            let distinct: std::collections::HashSet<_> = ids.into_iter().collect();
            assert_eq!(distinct, (0..allowed).collect(), "top_p {top_p}");
        }
    }

    #[test]
    fn top_p_by_parts_equals_top_p_by_a_full_sort() {
        let weights: Vec<(f32, u32)> = vocabulary(5000).iter().map(|&l| exp(l)).zip(0..).collect();
        for top_p in [0.01, 0.2, 0.5, 0.9, 0.999] {
            let mut parts = weights.clone();
            keep_top_p(&mut parts, top_p);
            let mut full = weights.clone();
            full.sort_by(likelier);
            let total: f64 = weights.iter().map(|w| f64::from(w.0)).sum();
            let mut sum = 0.0;
            let count = full.iter().take_while(|w| {
                let before = sum < f64::from(top_p) * total;
                sum += f64::from(w.0);
                before
            });
            let count = count.count();
            // The totals are summed in different orders, so the cut may differ by one candidate.
            assert!(parts.len().abs_diff(count) <= 1, "{} and {count}", parts.len());
            assert_eq!(parts, full[..parts.len()]);
        }
    }

    #[test]
    fn min_p_drops_what_is_far_below_the_likeliest() {
        let logits = [0.0, (0.2f32).ln(), (0.05f32).ln()];
        let ids = draws(Sampling { min_p: 0.1, ..open(5) }, &logits, 500);
        assert!(ids.contains(&1) && !ids.contains(&2));
    }

    #[test]
    fn penalties_change_only_recent_tokens_by_the_stated_amounts() {
        let settings = Sampling {
            repetition_penalty: 2.0,
            frequency_penalty: 0.5,
            presence_penalty: 0.25,
            repeat_last_n: 3,
            ..Sampling::greedy()
        };
        let mut sampler = sampler(settings);
        for id in [2, 0, 1, 1, 77] {
            sampler.accept(id); // 2 and 0 fall out of the window; 77 is outside the vocabulary.
        }
        let mut logits = [4.0, 4.0, -4.0];
        assert_eq!(sampler.sample(&mut logits), 0);
        assert_eq!(logits, [4.0, 4.0 / 2.0 - 2.0 * 0.5 - 0.25, -4.0]);
        sampler.accept(2);
        let mut logits = [0.0, 0.0, -4.0];
        sampler.sample(&mut logits);
        assert_eq!(logits, [0.0, -0.75, -8.0 - 0.75]);
    }

    #[test]
    fn what_is_needed_holds_all_that_penalties_reach_at_each_of_several_choices() {
        let guesses = [5, 6, 7, 8, 9];
        for repeat_last_n in [1, 2, 4, 64, usize::MAX] {
            let mut state = sampler(Sampling { presence_penalty: 1.0, repeat_last_n, ..Sampling::greedy() });
            [1, 2, 3].into_iter().for_each(|id| state.accept(id));
            let need = state.need_after(&guesses, guesses.len() + 1);
            let LogitsNeed::Top { also, .. } = need else { panic!("one logit is needed") };
            for id in guesses {
                assert!(state.recent.iter().all(|id| also.contains(id)), "{repeat_last_n}: {also:?}");
                state.accept(id);
            }
            assert!(state.recent.iter().all(|id| also.contains(id)), "{repeat_last_n}: {also:?}");
        }
        // Of a prompt, the choice behind it sees the end only.
        let state = sampler(Sampling { presence_penalty: 1.0, repeat_last_n: 2, ..Sampling::greedy() });
        let end = LogitsNeed::Top { count: 1, within: f32::INFINITY, also: vec![8, 9] };
        assert_eq!(state.need_after(&guesses, 1), end);
    }

    #[test]
    fn settings_out_of_range_are_refused_by_name() {
        let valid = Sampling::default();
        let cases = [
            ("temperature", Sampling { temperature: -1.0, ..valid.clone() }),
            ("temperature", Sampling { temperature: f32::NAN, ..valid.clone() }),
            ("top_p", Sampling { top_p: 0.0, ..valid.clone() }),
            ("min_p", Sampling { min_p: 1.5, ..valid.clone() }),
            ("repetition_penalty", Sampling { repetition_penalty: 0.0, ..valid.clone() }),
            ("presence_penalty", Sampling { presence_penalty: f32::INFINITY, ..valid.clone() }),
        ];
        assert!(valid.validate().is_ok());
        for (name, sampling) in cases {
            let error = Sampler::new(sampling).expect_err("refused").to_string();
            assert!(error.contains(name), "{error}");
        }
    }
}
