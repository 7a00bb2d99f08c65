//! What a run writes about itself while it trains.

mod common;

use std::path::Path;

use common::{run_config, write_corpus};
use setun_train::census::LayerLine;
use setun_train::checkpoint::Checkpoints;
use setun_train::config::TrainConfig;
use setun_train::error::TrainError;
use setun_train::metrics::Metrics;
use setun_train::trainer::{Progress, StepReport, Trainer};
use setun_train::{lines, metrics, tensorboard};

/// Stops a run after so many steps, as a signal would.
struct StopAfter(u64);

impl Progress for StopAfter {
    fn step(&mut self, _: &StepReport) {
        self.0 -= 1;
    }
    fn stop(&mut self) -> bool {
        self.0 == 0
    }
}

/// The lines of a run without what depends on the clock.
fn timeless(out: &Path) -> Vec<Metrics> {
    let mut lines = metrics::read(&out.join("metrics.jsonl")).unwrap();
    for line in &mut lines {
        (line.tokens_per_s, line.elapsed, line.peak_share) = (None, None, None);
    }
    lines
}

fn layers(out: &Path) -> Vec<LayerLine> {
    lines::read(&out.join("layers.jsonl")).unwrap()
}

#[test]
fn every_line_of_a_ternary_run_counts_flips_zeros_scales_and_dead_rows_in_total_and_by_layer() {
    let folder = tempfile::tempdir().unwrap();
    write_corpus(folder.path());
    let mut trainer = Trainer::new(run_config(folder.path(), "ternary", "out", 6)).unwrap();
    trainer.run(&mut ()).unwrap();
    let out = folder.path().join("out");
    let (lines, layers) = (metrics::read(&out.join("metrics.jsonl")).unwrap(), layers(&out));
    assert_eq!(lines.len(), 6);
    assert_eq!(layers.iter().map(|l| l.step).collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6]);
    for (line, by_layer) in lines.iter().zip(&layers) {
        assert_eq!(by_layer.layers.len(), 2 * 7);
        let weights: u64 = by_layer.layers.iter().map(|l| l.weights).sum();
        let mean = |f: fn(&setun_train::census::Layer) -> f64| {
            by_layer.layers.iter().map(|l| f(l) * l.weights as f64).sum::<f64>() / weights as f64
        };
        for (total, mean) in [
            (line.flip_rate, mean(|l| l.flip_rate)),
            (line.zero_fraction, mean(|l| l.zero_fraction)),
            (line.scale, mean(|l| l.scale)),
        ] {
            assert!((total.unwrap() - mean).abs() < 1e-12, "{total:?} {mean}");
        }
        assert_eq!(line.dead_rows, Some(by_layer.layers.iter().map(|l| l.dead_rows).sum()));
        let flips = line.flip_rate.unwrap();
        // The last step's learning rate is the schedule's floor, 0.
        assert!((flips > 0.0 || line.step == 6) && flips < 0.5, "{flips} at step {}", line.step);
        assert!((0.1..0.6).contains(&line.zero_fraction.unwrap()), "{:?}", line.zero_fraction);
        assert!(line.peak_share.unwrap() > 0.0 && line.scale.unwrap() > 0.0);
    }
    assert!(layers[0].layers[0].name.starts_with("model.layers.0."), "{}", layers[0].layers[0].name);
}

#[test]
fn a_float_run_reports_its_share_of_the_peak_and_no_ternary_weights() {
    let folder = tempfile::tempdir().unwrap();
    write_corpus(folder.path());
    Trainer::new(run_config(folder.path(), "float", "out", 2)).unwrap().run(&mut ()).unwrap();
    let out = folder.path().join("out");
    let line = &metrics::read(&out.join("metrics.jsonl")).unwrap()[0];
    assert!(line.peak_share.unwrap() > 0.0 && line.grad_norm.unwrap() > 0.0);
    assert_eq!((line.flip_rate, line.dead_rows), (None, None));
    assert!(!out.join("layers.jsonl").exists());
}

#[test]
fn a_run_stopped_between_two_lines_writes_the_lines_that_it_would_have_written() {
    let folder = tempfile::tempdir().unwrap();
    write_corpus(folder.path());
    let run = |name: &str, stop: Option<u64>| {
        let mut config = run_config(folder.path(), "ternary", name, 8);
        config.train.log_every = 3;
        if let Some(steps) = stop {
            Trainer::new(config.clone()).unwrap().run(&mut StopAfter(steps)).unwrap();
            Trainer::resume(config).unwrap().run(&mut ()).unwrap();
        } else {
            Trainer::new(config).unwrap().run(&mut ()).unwrap();
        }
        folder.path().join(name)
    };
    let (whole, parts) = (run("whole", None), run("parts", Some(5)));
    assert_eq!(layers(&parts), layers(&whole));
    assert_eq!(timeless(&parts), timeless(&whole));
    assert_eq!(layers(&whole).iter().map(|l| l.step).collect::<Vec<_>>(), [3, 6, 8]);
    // The event file of TensorBoard holds the same lines.
    let files = tensorboard::event_files(&parts).unwrap();
    let events = tensorboard::read(&files[0]).unwrap();
    assert_eq!((files.len(), events.len()), (1, 4));
    for (event, line) in events[1..].iter().zip(timeless(&parts)) {
        let value = |tag: &str| event.scalars.iter().find(|(name, _)| name == tag).map(|(_, value)| *value);
        assert_eq!((event.step, value("train/loss")), (line.step, line.loss.map(|x| x as f32)));
        assert_eq!(value("train/flip_rate"), line.flip_rate.map(|x| x as f32));
        assert_eq!(value("eval/valid/bits_per_byte"), line.bits_per_byte("valid").map(|x| x as f32));
    }
}

#[test]
fn lines_after_the_last_checkpoint_of_a_killed_run_are_written_once() {
    let folder = tempfile::tempdir().unwrap();
    write_corpus(folder.path());
    let config = run_config(folder.path(), "ternary", "out", 8);
    let out = folder.path().join("out");
    Trainer::new(config.clone()).unwrap().run(&mut StopAfter(5)).unwrap();
    let last = Checkpoints::of(&out).path(5);
    std::fs::remove_dir_all(last).unwrap(); // As if it had been killed before that one was written.
    let mut resumed = Trainer::resume(config).unwrap();
    assert_eq!(resumed.steps_taken(), 3);
    resumed.run(&mut ()).unwrap();
    let steps: Vec<u64> = layers(&out).iter().map(|l| l.step).collect();
    assert_eq!(steps, [1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(timeless(&out).iter().map(|l| l.step).collect::<Vec<_>>(), steps);
}

/// A run whose learning rate becomes absurd in the middle: from step 41 on.
fn astray(folder: &Path, out: &str) -> TrainConfig {
    let mut config = run_config(folder, "ternary", out, 80);
    config.optimizer.lr = 5e-3;
    config.optimizer.lr_second = Some(2.0);
    (config.train.log_every, config.train.checkpoint_every) = (4, 3);
    (config.train.spike_window, config.train.spike_steps) = (20, 6);
    config
}

/// Where the run began to diverge, the step that was not taken, and the message.
fn divergence(result: Result<(), TrainError>) -> (u64, u64, String) {
    let error = result.unwrap_err();
    let message = error.to_string();
    match error {
        TrainError::Diverged { began, step, .. } => (began, step, message),
        _ => panic!("{message}"),
    }
}

#[test]
fn a_loss_that_rises_and_stays_stops_the_run_and_names_the_last_checkpoint_from_before() {
    let folder = tempfile::tempdir().unwrap();
    write_corpus(folder.path());
    let result = Trainer::new(astray(folder.path(), "out")).unwrap().run(&mut ());
    let (began, step, message) = divergence(result);
    assert!((42..50).contains(&began) && step == began + 5, "{message}");
    assert!(message.contains(&format!("diverged at step {began}: the loss rose above")), "{message}");
    let out = folder.path().join("out");
    let newest = *Checkpoints::of(&out).steps().unwrap().last().unwrap();
    assert!(newest < began, "no checkpoint of the spike: {newest}, {message}");
    assert!(message.contains("the last good checkpoint is"), "{message}");
    let named = message.split("step-").nth(1).unwrap()[..8].parse::<u64>().unwrap();
    assert!(named + 1 < began && named + 4 >= began - 1, "{message}");
    // The metrics hold the rise itself, to the last step taken.
    let lines = metrics::read(&out.join("metrics.jsonl")).unwrap();
    let calm = lines.iter().rfind(|l| l.step < began - 4).unwrap().loss.unwrap();
    let last = lines.last().unwrap();
    assert!(last.step == step - 1 && last.loss.unwrap() > calm + 0.2, "{lines:?}");
}

#[test]
fn a_run_resumed_while_its_loss_is_high_stops_where_it_would_have_stopped() {
    let folder = tempfile::tempdir().unwrap();
    write_corpus(folder.path());
    let whole = divergence(Trainer::new(astray(folder.path(), "whole")).unwrap().run(&mut ()));
    let config = astray(folder.path(), "parts");
    Trainer::new(config.clone()).unwrap().run(&mut StopAfter(whole.0 + 2)).unwrap();
    let mut resumed = Trainer::resume(config).unwrap();
    assert_eq!(resumed.steps_taken(), whole.0 + 2);
    let parts = divergence(resumed.run(&mut ()));
    assert_eq!((parts.0, parts.1), (whole.0, whole.1));
    assert!(parts.2.contains("not the newest"), "{}", parts.2);
}

#[test]
fn without_a_limit_a_high_loss_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    write_corpus(folder.path());
    let mut config = astray(folder.path(), "out");
    config.train.spike_deviations = 0.0;
    Trainer::new(config).unwrap().run(&mut ()).unwrap();
}
