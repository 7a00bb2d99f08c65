//! The metrics file of a run: one JSON object per line, `metrics.jsonl`.
//!
//! | key | meaning |
//! |---|---|
//! | `step` | optimiser steps taken; rises from line to line |
//! | `tokens` | training tokens seen |
//! | `loss` | training cross-entropy, nats per token, mean since the last line |
//! | `lr` | learning rate of this step |
//! | `grad_norm` | global gradient norm before clipping |
//! | `tokens_per_s` | training speed since the last line |
//! | `elapsed` | seconds of training, over all sessions of the run |
//! | `peak_share` | share of the machine's integer and float peak, as [`crate::work`] defines it |
//! | `flip_rate` | ternary runs: share of the ternary weights whose trit differs from that of the last line |
//! | `zero_fraction` | share of them that are zero |
//! | `scale` | mean of their scales |
//! | `dead_rows` | rows of ternary matrices that hold nothing but zeros |
//! | `eval_NAME_loss` | held-out cross-entropy of the set NAME, nats per token |
//! | `eval_NAME_bits_per_byte` | the same in bits per UTF-8 byte of its text |
//!
//! Keys other than `step` may be absent. Ternary runs write the last four for every matrix into `layers.jsonl`
//! ([`LayerLine`]) at the same steps. Every line is on its way to the disk before the next step begins.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::census::Layer;
#[cfg(doc)]
use crate::census::LayerLine;
use crate::data::Score;
use crate::error::TrainError;
use crate::lines::{self, Line, LineWriter};
use crate::trainer::StepReport;

/// One line.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// Optimiser steps taken.
    pub step: u64,
    /// Training tokens seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<u64>,
    /// Training cross-entropy, nats per token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    /// Learning rate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,
    /// Global gradient norm before clipping.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grad_norm: Option<f64>,
    /// Training tokens per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_per_s: Option<f64>,
    /// Seconds of training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub elapsed: Option<f64>,
    /// Share of the machine's peak.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_share: Option<f64>,
    /// Share of the ternary weights that changed since the last line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flip_rate: Option<f64>,
    /// Share of the ternary weights that are zero.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zero_fraction: Option<f64>,
    /// Mean scale of the ternary weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<f64>,
    /// Rows of ternary matrices that are all zero.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dead_rows: Option<u64>,
    /// Held-out measures and whatever else a run records, by key.
    #[serde(flatten)]
    pub other: BTreeMap<String, serde_json::Value>,
}

impl Line for Metrics {
    const WHAT: &str = "metrics line";

    fn step(&self) -> u64 {
        self.step
    }
}

impl Metrics {
    /// Adds what is known of all ternary weights together.
    pub fn add_ternary(&mut self, total: &Layer) {
        self.flip_rate = Some(total.flip_rate);
        self.zero_fraction = Some(total.zero_fraction);
        self.scale = Some(total.scale);
        self.dead_rows = Some(total.dead_rows);
    }

    /// Adds the loss and the bits per byte of the held-out set `name`.
    pub fn add_eval(&mut self, name: &str, score: &Score) {
        let values = [("loss", score.loss()), ("bits_per_byte", score.bits_per_byte())];
        for (measure, value) in values {
            self.other.insert(format!("eval_{name}_{measure}"), value.into());
        }
    }

    /// Held-out losses, as (set, nats per token).
    pub fn eval_losses(&self) -> impl Iterator<Item = (&str, f64)> {
        self.other.iter().filter_map(|(key, value)| {
            let name = key.strip_prefix("eval_")?.strip_suffix("_loss")?;
            Some((name, value.as_f64()?))
        })
    }

    /// Bits per byte of the held-out set `name`, if this line has it.
    pub fn bits_per_byte(&self, name: &str) -> Option<f64> {
        let value = self.other.get(&format!("eval_{name}_bits_per_byte"))?;
        value.as_f64()
    }
}

/// The steps since the last line; part of a checkpoint, so that a resumed run writes the line it would have written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Window {
    loss: f64,
    steps: u64,
    tokens: u64,
    seconds: f64,
}

impl Window {
    /// Counts a step of so many tokens.
    pub fn add(&mut self, report: &StepReport, tokens: u64) {
        self.loss += report.loss;
        self.steps += 1;
        self.tokens += tokens;
        self.seconds += tokens as f64 / report.tokens_per_s;
    }

    /// Whether no step was counted since the last line.
    pub fn is_empty(&self) -> bool {
        self.steps == 0
    }

    /// The line after the step `report`, with the means of all steps counted, which must be one at least; begins anew.
    pub fn take_line(&mut self, report: &StepReport) -> Metrics {
        let Self { loss, steps, tokens, seconds } = std::mem::take(self);
        Metrics {
            step: report.step,
            tokens: Some(report.tokens),
            loss: Some(loss / steps as f64),
            lr: Some(report.lr),
            grad_norm: Some(report.grad_norm),
            tokens_per_s: Some(tokens as f64 / seconds),
            elapsed: Some(report.elapsed),
            ..Metrics::default()
        }
    }
}

/// Appends to a metrics file.
pub type MetricsWriter = LineWriter<Metrics>;

/// Reads a metrics file; see [`lines::read`].
///
/// # Errors
/// When the file cannot be read, or with the line that is no metrics line.
pub fn read(path: &Path) -> Result<Vec<Metrics>, TrainError> {
    lines::read(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;
    use std::io::Write;

    fn line(step: u64) -> Metrics {
        let mut line =
            Metrics { step, tokens: Some(step * 4096), loss: Some(8.0 / step as f64), ..Metrics::default() };
        if step.is_multiple_of(2) {
            let score = Score { nats: 20.0, tokens: 10, bytes: 40 };
            line.add_eval("short-stories_2", &score);
        }
        line
    }

    #[test]
    fn resuming_drops_later_lines_and_one_cut_short() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut writer = MetricsWriter::open(&path, 7).unwrap();
        for step in 1..=5 {
            writer.write(&line(step)).unwrap();
        }
        drop(writer);
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(b"{\"step\": 6, \"lo").unwrap();
        assert_eq!(read(&path).unwrap().len(), 5);
        let before = std::fs::read_to_string(&path).unwrap();
        let mut writer = MetricsWriter::open(&path, 3).unwrap();
        writer.write(&line(4)).unwrap();
        let after = std::fs::read_to_string(&path).unwrap();
        let four: Vec<_> = before.lines().take(4).collect();
        assert_eq!(after.lines().collect::<Vec<_>>(), four, "to the last digit");
        MetricsWriter::open(&path, 0).unwrap();
        assert_eq!(read(&path).unwrap(), []);
    }

    #[test]
    fn held_out_measures_are_found_by_set() {
        let line = line(2);
        let losses: Vec<_> = line.eval_losses().collect();
        assert_eq!(losses, [("short-stories_2", 2.0)]);
        let bits = line.bits_per_byte("short-stories_2").unwrap();
        assert!((bits - 0.5 / std::f64::consts::LN_2).abs() < 1e-12);
        assert_eq!(line.bits_per_byte("absent"), None);
    }

    #[test]
    fn a_loss_that_is_not_a_number_is_written_as_null_and_read_back_as_absent() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut writer = MetricsWriter::open(&path, 0).unwrap();
        let broken = Metrics { step: 1, loss: Some(f64::NAN), ..Metrics::default() };
        writer.write(&broken).unwrap();
        assert_eq!(read(&path).unwrap()[0].loss, None);
    }

    #[test]
    fn a_line_that_is_no_metrics_line_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        std::fs::write(&path, "{\"step\":1}\n[]\n").unwrap();
        let error = read(&path).unwrap_err().to_string();
        assert!(error.contains("metrics.jsonl: line 2"), "{error}");
    }
}
