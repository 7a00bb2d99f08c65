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
//! | `eval_NAME_loss` | held-out cross-entropy of the set NAME, nats per token |
//! | `eval_NAME_bits_per_byte` | the same in bits per UTF-8 byte of its text |
//!
//! Keys other than `step` may be absent. Every line is on its way to the disk before the next step begins.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::data::Score;
use crate::error::TrainError;
use crate::trainer::StepReport;
use crate::vocabulary::write_whole;

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
    /// Held-out measures and whatever else a run records, by key.
    #[serde(flatten)]
    pub other: BTreeMap<String, serde_json::Value>,
}

impl Metrics {
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
#[derive(Debug)]
pub struct MetricsWriter {
    path: PathBuf,
    file: File,
}

impl MetricsWriter {
    /// Opens `path` to go on after `step`: later lines, written by a run that was killed after its last checkpoint, are
    /// dropped, as is a line cut short. `step` 0 begins anew.
    ///
    /// # Errors
    /// When the file cannot be read or written, or holds a line that is no metrics line.
    pub fn open(path: &Path, step: u64) -> Result<Self, TrainError> {
        let bytes = match std::fs::read(path) {
            Ok(bytes) if step > 0 => bytes,
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(TrainError::read(path, e));
            }
            _ => Vec::new(),
        };
        let mut text = Vec::new();
        for (line, parsed) in parse(path, &bytes)? {
            if parsed.step > step {
                break;
            }
            // The bytes as they are: numbers parsed and printed again might differ.
            text.extend_from_slice(line);
            text.push(b'\n');
        }
        write_whole(path, &text)?;
        let file = OpenOptions::new().append(true).open(path);
        let file = file.map_err(|e| TrainError::write(path, e))?;
        let path = path.to_owned();
        Ok(Self { path, file })
    }

    /// Appends a line.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&mut self, line: &Metrics) -> Result<(), TrainError> {
        let mut text = Vec::new();
        push_line(&mut text, line);
        // One write call per line: a reader never sees half of it, and nothing waits in a buffer.
        let written = self.file.write_all(&text);
        written.map_err(|e| TrainError::write(&self.path, e))
    }
}

fn push_line(text: &mut Vec<u8>, line: &Metrics) {
    // Numbers, strings and maps with string keys always serialise; JSON has no NaN, so that becomes null.
    serde_json::to_writer(&mut *text, line).expect("metrics serialise");
    text.push(b'\n');
}

/// Reads a metrics file. A last line without its end, left by a killed run, is ignored.
///
/// # Errors
/// When the file cannot be read, or with the line that is no metrics line.
pub fn read(path: &Path) -> Result<Vec<Metrics>, TrainError> {
    let bytes = std::fs::read(path).map_err(|e| TrainError::read(path, e))?;
    Ok(parse(path, &bytes)?.into_iter().map(|(_, line)| line).collect())
}

/// The whole, non-empty lines of a file and what they say.
fn parse<'a>(path: &Path, bytes: &'a [u8]) -> Result<Vec<(&'a [u8], Metrics)>, TrainError> {
    let whole = bytes.iter().rposition(|&b| b == b'\n').map_or(0, |n| n + 1);
    let lines = bytes[..whole].split(|&b| b == b'\n').enumerate();
    let lines = lines.filter(|(_, line)| !line.trim_ascii().is_empty());
    let parsed = lines.map(|(number, line)| match serde_json::from_slice(line) {
        Ok(parsed) => Ok((line, parsed)),
        Err(e) => {
            let what = format!("line {} is no metrics line: {e}", number + 1);
            Err(TrainError::file(path, what))
        }
    });
    parsed.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

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
