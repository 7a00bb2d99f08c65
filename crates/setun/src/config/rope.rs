//! Rotary position encoding: the frequencies of every variant, and the table of cosines a batch needs.
//!
//! Formulas are those of `transformers` (modeling_rope_utils.py); frequencies are f32 as there, computed here in
//! f64 and rounded once. Sines and cosines come from the `libm` crate, so that tables have the same bits on every machine.

use super::value_error;
use crate::error::ModelError;

/// Position encoding of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the geometric series of wavelengths.
    pub theta: f64,
    /// Dimensions of each head that are rotated, from the first; the rest pass through.
    pub rotary_dim: usize,
    /// How the series is stretched for long contexts.
    pub scaling: RopeScaling,
}

/// Context extension.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// None.
    Default,
    /// All frequencies divided by `factor`.
    Linear {
        /// Ratio of new to trained context.
        factor: f64,
    },
    /// NTK-aware: the base grows with the sequence once it is longer than `max_positions`.
    Dynamic {
        /// Ratio of new to trained context.
        factor: f64,
        /// Length up to which nothing changes.
        max_positions: usize,
    },
    /// YaRN (arXiv 2309.00071): interpolates long wavelengths, keeps short ones, scales attention.
    Yarn {
        /// Ratio of new to trained context.
        factor: f64,
        /// Context before extension.
        original: usize,
        /// Rotations above which a dimension is kept.
        beta_fast: f64,
        /// Rotations below which a dimension is interpolated.
        beta_slow: f64,
        /// Factor on cosines and sines.
        attention_factor: f64,
        /// Whether the ramp's ends are rounded to whole dimensions.
        truncate: bool,
    },
    /// Llama 3's smooth split by wavelength.
    Llama3 {
        /// Division of the long wavelengths.
        factor: f64,
        /// Context before extension.
        original: usize,
        /// Wavelengths longer than `original / low_freq` are divided by `factor`.
        low_freq: f64,
        /// Wavelengths shorter than `original / high_freq` are kept.
        high_freq: f64,
    },
    /// Explicit divisors, one per pair (GGUF's `rope_freqs.weight`).
    Divisors(Vec<f32>),
}

impl Rope {
    /// Plain rotation of whole heads.
    pub fn new(theta: f64, head_dim: usize) -> Self {
        Self { theta, rotary_dim: head_dim, scaling: RopeScaling::Default }
    }

    /// Frequencies `[rotary_dim / 2]` in radians per position, and the factor on cosines and sines.
    ///
    /// `length` is the whole sequence's, which only [`RopeScaling::Dynamic`] depends on.
    pub fn frequencies(&self, length: usize) -> (Vec<f32>, f32) {
        let pairs = self.rotary_dim / 2;
        let d = self.rotary_dim as f64;
        let series = |theta: f64| (0..pairs).map(move |j| libm::pow(theta, -2.0 * j as f64 / d));
        let base = series(self.theta);
        let mut attention = 1.0;
        let frequencies: Vec<f64> = match &self.scaling {
            RopeScaling::Default => base.collect(),
            RopeScaling::Linear { factor } => base.map(|f| f / factor).collect(),
            RopeScaling::Dynamic { factor, max_positions } => {
                let grown = factor * length as f64 / *max_positions as f64 - (factor - 1.0);
                let theta = match length > *max_positions && d > 2.0 {
                    true => self.theta * libm::pow(grown, d / (d - 2.0)),
                    false => self.theta,
                };
                series(theta).collect()
            }
            RopeScaling::Yarn { factor, original, beta_fast, beta_slow, attention_factor, truncate } => {
                attention = *attention_factor;
                let corrected = |rotations: f64| {
                    let turns = *original as f64 / (rotations * 2.0 * std::f64::consts::PI);
                    d * libm::log(turns) / (2.0 * libm::log(self.theta))
                };
                let (mut low, mut high) = (corrected(*beta_fast), corrected(*beta_slow));
                if *truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let (low, mut high) = (low.max(0.0), high.min(d - 1.0));
                if low == high {
                    high += 0.001;
                }
                let ramp = |j: usize| ((j as f64 - low) / (high - low)).clamp(0.0, 1.0);
                base.enumerate().map(|(j, f)| f / factor * ramp(j) + f * (1.0 - ramp(j))).collect()
            }
            RopeScaling::Llama3 { factor, original, low_freq, high_freq } => {
                let original = *original as f64;
                let stretch = |f: f64| {
                    let wavelength = 2.0 * std::f64::consts::PI / f;
                    if wavelength < original / high_freq {
                        f
                    } else if wavelength > original / low_freq {
                        f / factor
                    } else {
                        let smooth = (original / wavelength - low_freq) / (high_freq - low_freq);
                        (1.0 - smooth) * f / factor + smooth * f
                    }
                };
                base.map(stretch).collect()
            }
            RopeScaling::Divisors(divisors) => base.zip(divisors).map(|(f, &by)| f / f64::from(by)).collect(),
        };
        (frequencies.into_iter().map(|f| f as f32).collect(), attention as f32)
    }

    pub(super) fn check(&self, head_dim: usize) -> Result<(), ModelError> {
        if !(self.theta.is_finite() && self.theta > 0.0) {
            return Err(value_error("rope_theta", self.theta, "a positive number"));
        }
        if self.rotary_dim == 0 || self.rotary_dim > head_dim || !self.rotary_dim.is_multiple_of(2) {
            let expected = format!("an even number of dimensions up to head_dim = {head_dim}");
            return Err(value_error(
                "partial_rotary_factor / rope.dimension_count",
                self.rotary_dim,
                expected,
            ));
        }
        let positive = |field: &str, value: f64| match value.is_finite() && value > 0.0 {
            true => Ok(()),
            false => Err(value_error(&format!("rope_scaling.{field}"), value, "a positive number")),
        };
        match &self.scaling {
            RopeScaling::Default => Ok(()),
            RopeScaling::Linear { factor } => positive("factor", *factor),
            RopeScaling::Dynamic { factor, max_positions } => {
                positive("factor", *factor)?;
                positive("max_position_embeddings", *max_positions as f64)
            }
            RopeScaling::Yarn { factor, original, beta_fast, beta_slow, attention_factor, .. } => {
                positive("factor", *factor)?;
                positive("original_max_position_embeddings", *original as f64)?;
                positive("beta_fast", *beta_fast)?;
                positive("beta_slow", *beta_slow)?;
                positive("attention_factor", *attention_factor)
            }
            RopeScaling::Llama3 { factor, original, low_freq, high_freq } => {
                positive("factor", *factor)?;
                positive("original_max_position_embeddings", *original as f64)?;
                positive("low_freq_factor", *low_freq)?;
                positive("high_freq_factor", *high_freq)?;
                match high_freq > low_freq {
                    true => Ok(()),
                    false => {
                        Err(value_error("rope_scaling.high_freq_factor", high_freq, "above low_freq_factor"))
                    }
                }
            }
            RopeScaling::Divisors(divisors) if divisors.len() != self.rotary_dim / 2 => {
                let expected = format!("{} values, one per rotated pair", self.rotary_dim / 2);
                Err(value_error("rope_freqs.weight", divisors.len(), expected))
            }
            RopeScaling::Divisors(divisors) => {
                match divisors.iter().find(|by| !(by.is_finite() && **by > 0.0)) {
                    Some(by) => Err(value_error("rope_freqs.weight", by, "positive numbers")),
                    None => Ok(()),
                }
            }
        }
    }
}

/// YaRN's attention factor where the file gives none: `0.1·m·ln(factor) + 1`, a ratio where both `mscale`s are given.
pub(super) fn yarn_attention(factor: f64, mscale: Option<f64>, mscale_all_dim: Option<f64>) -> f64 {
    let g = |m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * libm::log(factor) + 1.0 };
    match (mscale, mscale_all_dim) {
        (Some(mscale), Some(all)) if mscale != 0.0 && all != 0.0 => g(mscale) / g(all),
        _ => g(1.0),
    }
}

/// Cosines and sines of a model's positions, made as far as they are needed.
#[derive(Debug, Clone)]
pub struct RopeTable {
    rope: Rope,
    /// Sequence length the frequencies hold for (dynamic scaling), else 0.
    length: usize,
    frequencies: Vec<f32>,
    attention: f32,
    /// `[positions, rotary_dim / 2]`.
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RopeTable {
    /// An empty table for `rope`.
    pub fn new(rope: &Rope) -> Self {
        let (frequencies, attention) = rope.frequencies(0);
        Self { rope: rope.clone(), length: 0, frequencies, attention, cos: Vec::new(), sin: Vec::new() }
    }

    /// Makes sure that positions below `length` are there, for a sequence that is `length` tokens long.
    pub fn prepare(&mut self, length: usize) {
        if matches!(self.rope.scaling, RopeScaling::Dynamic { max_positions, .. } if length.max(self.length) > max_positions)
            && length != self.length
        {
            (self.frequencies, self.attention) = self.rope.frequencies(length);
            self.cos.clear();
            self.sin.clear();
            self.length = length;
        }
        let pairs = self.frequencies.len();
        for position in self.cos.len() / pairs..length {
            for &frequency in &self.frequencies {
                let angle = f64::from(position as f32 * frequency);
                self.cos.push(libm::cos(angle) as f32 * self.attention);
                self.sin.push(libm::sin(angle) as f32 * self.attention);
            }
        }
    }

    /// Cosines and sines `[rotary_dim / 2]` of `position`, which [`RopeTable::prepare`] must have covered.
    pub fn at(&self, position: usize) -> (&[f32], &[f32]) {
        let pairs = self.frequencies.len();
        let range = position * pairs..(position + 1) * pairs;
        (&self.cos[range.clone()], &self.sin[range])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn yarn_keeps_fast_pairs_and_divides_slow_ones() {
        let scaling = RopeScaling::Yarn {
            factor: 4.0,
            original: 32,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: yarn_attention(4.0, None, None),
            truncate: true,
        };
        let rope = Rope { theta: 10000.0, rotary_dim: 64, scaling };
        let (plain, _) = Rope::new(10000.0, 64).frequencies(0);
        let (yarn, attention) = rope.frequencies(0);
        assert_eq!(yarn[0], plain[0]);
        assert!((yarn[31] - plain[31] / 4.0).abs() < 1e-9);
        assert!((attention - 1.138_629_4).abs() < 1e-6);
    }

    #[test]
    fn equal_mscales_cancel() {
        assert_eq!(yarn_attention(40.0, Some(1.0), Some(1.0)), 1.0);
        assert_eq!(yarn_attention(0.5, None, None), 1.0);
    }

    #[test]
    fn a_table_grown_in_steps_equals_one_made_at_once() {
        let rope = Rope::new(500_000.0, 16);
        let (mut steps, mut once) = (RopeTable::new(&rope), RopeTable::new(&rope));
        for length in [1, 2, 7, 40] {
            steps.prepare(length);
        }
        once.prepare(40);
        assert_eq!(steps.at(39), once.at(39));
        assert_eq!(steps.at(0), (&[1.0f32; 8][..], &[0.0f32; 8][..]));
    }

    #[test]
    fn dynamic_scaling_returns_to_the_plain_series_for_a_short_sequence() {
        let scaling = RopeScaling::Dynamic { factor: 2.0, max_positions: 8 };
        let rope = Rope { theta: 10000.0, rotary_dim: 8, scaling };
        let mut table = RopeTable::new(&rope);
        table.prepare(8);
        let plain = table.at(7).0.to_vec();
        table.prepare(20);
        assert_ne!(table.at(7).0, plain);
        table.prepare(8);
        assert_eq!(table.at(7).0, plain);
    }
}
