//! When a run has gone astray: a loss that is no number, or one that rises and stays.
//!
//! A loss is high when it lies above the median of the last calm losses by so many robust deviations (1.4826 times the
//! median distance from the median: the standard deviation, if the losses were normal). Single hard batches are high now
//! and then; only so many high losses in a row are a divergence. High losses do not enter the median, so a slow climb
//! cannot hide itself, and one look is a sort of a few hundred numbers.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::config::TrainSection;

/// The least deviation, in nats per token: losses of a memorised text hardly differ, and a little more is no divergence.
const LEAST_DEVIATION: f64 = 0.02;

/// Losses known before any is called high, if the window is not shorter.
const LEAST_KNOWN: usize = 32;

/// The losses so far, as far as a judgement needs them; part of a checkpoint, so that a resumed run stops where it would
/// have stopped.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Watch {
    /// Losses that were not high, oldest first. In f32, which JSON gives back to the bit.
    calm: VecDeque<f32>,
    /// The first step of the present row of high losses.
    began: Option<u64>,
}

/// A run that has gone astray.
#[derive(Debug, Clone, PartialEq)]
pub struct Divergence {
    /// The first step whose loss was high, or no number.
    pub began: u64,
    /// Weights of fewer steps than this were still good.
    pub good_before: u64,
    /// What was seen.
    pub what: String,
}

impl Watch {
    /// Judges the loss of `step`, nats per token, by `train.spike_…` of the settings.
    ///
    /// # Errors
    /// When the loss is no number, or the last of so many high ones.
    pub fn look(&mut self, settings: &TrainSection, step: u64, loss: f64) -> Result<(), Divergence> {
        if !loss.is_finite() {
            let what = format!("the loss is {loss}");
            // The loss of step n is that of the weights after n - 1 steps, so those are not good any more.
            return Err(Divergence {
                good_before: self.began.unwrap_or(step) - 1,
                ..self.not_finite(step, what)
            });
        }
        let (window, deviations) = (settings.spike_window, settings.spike_deviations);
        let known = self.calm.len() >= LEAST_KNOWN.min(window);
        let limit = if known && deviations > 0.0 { self.limit(deviations) } else { f64::INFINITY };
        if loss <= limit {
            self.began = None;
            self.calm.push_back(loss as f32);
            let surplus = self.calm.len().saturating_sub(window);
            self.calm.drain(..surplus);
            return Ok(());
        }
        let began = *self.began.get_or_insert(step);
        let steps = step + 1 - began;
        if steps < settings.spike_steps {
            return Ok(());
        }
        let what = format!(
            "the loss rose above {limit:.3} (the median of {} losses and {deviations} deviations, \
             train.spike_deviations) and stayed there for {steps} steps, the last at {loss:.3}",
            self.calm.len(),
        );
        Err(Divergence { began, good_before: began - 1, what })
    }

    /// A divergence because of a gradient at `step` that is not finite, after a loss that is.
    pub fn not_finite(&self, step: u64, what: String) -> Divergence {
        match self.began {
            Some(began) if began < step => {
                let what = format!("the loss rose and stayed high until, at step {step}, {what}");
                Divergence { began, good_before: began - 1, what }
            }
            _ => Divergence { began: step, good_before: step, what },
        }
    }

    /// Whether the last loss was high: what comes next decides.
    pub fn suspects(&self) -> bool {
        self.began.is_some()
    }

    /// Above it a loss is high.
    fn limit(&self, deviations: f64) -> f64 {
        let mut losses: Vec<f64> = self.calm.iter().map(|&loss| f64::from(loss)).collect();
        let middle = median(&mut losses);
        losses.iter_mut().for_each(|loss| *loss = (*loss - middle).abs());
        middle + deviations * (1.4826 * median(&mut losses)).max(LEAST_DEVIATION)
    }
}

/// The middle one of at least one number; the upper of two.
fn median(values: &mut [f64]) -> f64 {
    let middle = values.len() / 2;
    *values.select_nth_unstable_by(middle, f64::total_cmp).1
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn settings(window: usize, steps: u64, deviations: f64) -> TrainSection {
        let text = "steps = 1000\nout = 'out'";
        let defaults: TrainSection = toml::from_str(text).unwrap();
        assert_eq!(defaults.out, PathBuf::from("out"));
        let (spike_window, spike_steps, spike_deviations) = (window, steps, deviations);
        TrainSection { spike_window, spike_steps, spike_deviations, ..defaults }
    }

    /// A falling, noisy loss.
    fn usual(step: u64) -> f64 {
        2.0 + 6.0 * (-(step as f64) / 100.0).exp() + (step as f64 * 12.9898).sin() * 0.1
    }

    /// The divergence of `losses`, if there is one.
    fn watch(settings: &TrainSection, losses: impl Fn(u64) -> f64) -> Option<(u64, Divergence)> {
        let mut watch = Watch::default();
        (1..1000).find_map(|step| Some((step, watch.look(settings, step, losses(step)).err()?)))
    }

    #[test]
    fn a_loss_that_rises_and_stays_is_found_after_so_many_steps_with_its_beginning() {
        let settings = settings(200, 50, 8.0);
        let (step, found) = watch(&settings, |s| if s < 500 { usual(s) } else { 4.0 }).unwrap();
        assert_eq!((step, found.began, found.good_before), (549, 500, 499));
        assert!(found.what.contains("stayed there for 50 steps"), "{}", found.what);
    }

    #[test]
    fn hard_batches_noise_and_a_spike_that_heals_do_not_stop_a_run() {
        let settings = settings(200, 50, 8.0);
        assert_eq!(watch(&settings, usual), None);
        let hard = |s: u64| if s.is_multiple_of(10) { 5.0 } else { usual(s) };
        assert_eq!(watch(&settings, hard), None);
        let heals = |s: u64| if (500..549).contains(&s) { 6.0 } else { usual(s) };
        assert_eq!(watch(&settings, heals), None);
    }

    #[test]
    fn a_text_known_by_heart_may_be_forgotten_a_little() {
        let settings = settings(200, 5, 8.0);
        assert_eq!(watch(&settings, |s| if s < 500 { 0.01 } else { 0.1 }), None);
        assert!(watch(&settings, |s| if s < 500 { 0.01 } else { 0.5 }).is_some());
    }

    #[test]
    fn no_deviations_mean_that_only_what_is_no_number_stops() {
        let settings = settings(200, 5, 0.0);
        assert_eq!(watch(&settings, |s| if s < 500 { 1.0 } else { 100.0 }), None);
        let (step, found) = watch(&settings, |s| if s < 500 { 1.0 } else { f64::NAN }).unwrap();
        assert_eq!((step, found.began, found.good_before), (500, 500, 499));
        assert_eq!(Watch::default().not_finite(500, "the gradient".into()).good_before, 500);
        assert_eq!(found.what, "the loss is NaN");
    }

    #[test]
    fn a_loss_that_rises_before_it_is_no_number_went_astray_where_it_rose() {
        let losses = |s| match s {
            0..300 => usual(s),
            300..310 => 50.0,
            _ => f64::INFINITY,
        };
        let (step, found) = watch(&settings(200, 50, 8.0), losses).unwrap();
        assert_eq!((step, found.began, found.good_before), (310, 300, 299));
        assert!(found.what.contains("at step 310, the loss is inf"), "{}", found.what);
    }

    #[test]
    fn a_watch_read_back_from_json_judges_alike() {
        let settings = settings(100, 20, 8.0);
        let mut watch = Watch::default();
        (1..300).for_each(|s| watch.look(&settings, s, usual(s)).unwrap());
        (300..305).for_each(|s| watch.look(&settings, s, 9.0).unwrap());
        let read: Watch = serde_json::from_str(&serde_json::to_string(&watch).unwrap()).unwrap();
        assert_eq!(read, watch);
        assert!(read.suspects());
    }
}
