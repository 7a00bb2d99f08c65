//! Pictures of training runs: one panel per measure, several runs in every panel.

mod draw;
mod panels;

use std::path::{Path, PathBuf};

use crate::error::TrainError;
use crate::metrics;
use crate::vocabulary::write_whole;

/// What a picture's horizontal axis counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Axis {
    /// Optimiser steps.
    Steps,
    /// Training tokens.
    Tokens,
    /// Hours of training.
    Hours,
}

/// How runs are drawn.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PlotOptions {
    /// The horizontal axis. `None`: tokens, or steps where a run has no token counts.
    pub x: Option<Axis>,
    /// How many lines of the metrics one point of a line is the mean of; the values themselves stay as a faint line. 1: no
    /// smoothing. `None`: a fiftieth of the run's lines. Held-out measures and learning rates are never smoothed.
    pub smooth: Option<usize>,
}

/// Draws the runs of `runs`, (label, metrics file), into `out`, an `.svg` file: panels of training loss,
/// held-out bits per byte, learning rate, gradient norm, flip rate, zero weights, speed and share of the peak, as far as
/// the runs have them.
///
/// # Errors
/// When a metrics file cannot be read or there is nothing to draw, or when `out` has another ending or cannot be written.
pub fn plot_runs(runs: &[(String, PathBuf)], options: &PlotOptions, out: &Path) -> Result<(), TrainError> {
    let refuse = |what: String| TrainError::Plot { path: out.to_owned(), what };
    if !out.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("svg")) {
        return Err(refuse("the name must end in .svg".into()));
    }
    let mut lines = Vec::new();
    for (label, path) in runs {
        lines.push((label.clone(), metrics::read(path)?));
    }
    let sheet = panels::Sheet::new(&lines, options).map_err(refuse)?;
    let mut svg = String::new();
    draw::draw(&sheet, &mut svg).map_err(|e| refuse(e.to_string()))?;
    write_whole(out, svg.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Score;
    use crate::metrics::{Metrics, MetricsWriter};

    /// A ternary run whose loss falls from `ln 4096` towards `floor`.
    fn run(path: &Path, floor: f64) {
        let mut writer = MetricsWriter::open(path, 0).unwrap();
        for step in (10u64..=2000).step_by(10) {
            let t = step as f64;
            let noise = (t * 12.9898).sin() * 0.06;
            let loss = floor + (8.3 - floor) * (-t / 180.0).exp();
            let mut line = Metrics {
                step,
                tokens: Some(step * 4096),
                loss: Some(loss + noise),
                lr: Some(2e-3 * (t / 100.0).min(1.0) * (1.0 - t / 2000.0)),
                grad_norm: Some(0.3 + 3.0 * (-t / 100.0).exp() + noise.abs()),
                tokens_per_s: Some(9000.0 + 2000.0 * noise),
                elapsed: Some(t * 0.45),
                peak_share: Some(0.6 + noise),
                flip_rate: Some(0.02 * (-t / 300.0).exp() * (1.0 + noise)),
                zero_fraction: Some(0.31 + 0.05 * t / 2000.0 + noise * 0.001),
                ..Metrics::default()
            };
            if step % 200 == 0 {
                for (set, extra) in [("stories", 0.05), ("books", 0.9)] {
                    let score = Score { nats: (loss + extra) * 100.0, tokens: 100, bytes: 400 };
                    line.add_eval(set, &score);
                }
            }
            writer.write(&line).unwrap();
        }
    }

    const TITLES: [&str; 8] = [
        "training loss (nats per token)",
        "held out (bits per byte)",
        "learning rate",
        "gradient norm",
        "flip rate (% of ternary weights",
        "zero weights (%)",
        "tokens per second",
        "share of the machine",
    ];

    #[test]
    fn the_picture_names_every_run_set_panel_and_axis() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        run(&at("a.jsonl"), 2.0);
        run(&at("b.jsonl"), 1.9);
        let runs = [("ternary <1>".into(), at("a.jsonl")), ("wider".into(), at("b.jsonl"))];
        for (x, title) in [
            (None, "training tokens (millions)"),
            (Some(Axis::Steps), "steps"),
            (Some(Axis::Hours), "hours of training"),
        ] {
            let options = PlotOptions { x, smooth: None };
            plot_runs(&runs, &options, &at("runs.svg")).unwrap();
            let svg = std::fs::read_to_string(at("runs.svg")).unwrap();
            for text in ["ternary &lt;1&gt;", "wider", "stories", "books", title].iter().chain(&TITLES) {
                assert!(svg.contains(text), "{text}");
            }
            assert!(svg.trim_end().ends_with("</svg>") && !svg.contains("NaN"));
        }
        // Kept for the eye where asked.
        if let Some(copy) = std::env::var_os("SETUN_KEEP_PLOT") {
            std::fs::copy(at("runs.svg"), copy).unwrap();
        }
    }

    #[test]
    fn smoothing_leaves_the_values_themselves_as_a_faint_line() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        run(&at("a.jsonl"), 2.0);
        let lines = |smooth| {
            let options = PlotOptions { x: None, smooth: Some(smooth) };
            plot_runs(&[("a".into(), at("a.jsonl"))], &options, &at("a.svg")).unwrap();
            std::fs::read_to_string(at("a.svg")).unwrap().matches("opacity=\"0.25\"").count()
        };
        assert_eq!(lines(1), 0);
        assert!(lines(20) >= 6);
    }

    #[test]
    fn a_run_of_one_line_and_one_without_token_counts_are_drawn() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("one.jsonl"), "{\"step\":0,\"loss\":8.0}\n").unwrap();
        let runs = [("one".into(), at("one.jsonl"))];
        plot_runs(&runs, &PlotOptions::default(), &at("one.svg")).unwrap();
        let svg = std::fs::read_to_string(at("one.svg")).unwrap();
        assert!(svg.contains("steps") && !svg.contains("NaN") && !svg.contains(TITLES[1]));
        let hours = PlotOptions { x: Some(Axis::Hours), smooth: None };
        let error = plot_runs(&runs, &hours, &at("two.svg")).unwrap_err().to_string();
        assert!(error.contains("`one` have no `elapsed`"), "{error}");
    }

    #[test]
    fn metrics_without_numbers_and_unknown_endings_are_errors_and_leave_no_picture() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("a.jsonl"), "{\"step\":1}\n").unwrap();
        for (out, expected) in
            [("a.svg", "no numbers to draw"), ("a.png", "end in .svg"), ("a", "end in .svg")]
        {
            let runs = [("a".into(), at("a.jsonl"))];
            let error = plot_runs(&runs, &PlotOptions::default(), &at(out)).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
            assert!(!at(out).exists());
        }
    }
}
