//! A killed run goes on to the identical next step.

mod common;

use common::{run_config as config, write_corpus};
use setun_train::checkpoint::Checkpoints;

use setun_train::config::{OptimizerKind, Packing, TrainConfig, TrainSection};
use setun_train::error::TrainError;
use setun_train::trainer::{Progress, StepReport, Trainer};

fn bits(trainer: &Trainer) -> Vec<Vec<u32>> {
    trainer.params().iter().map(|p| p.values.iter().map(|x| x.to_bits()).collect()).collect()
}

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

#[test]
fn three_steps_a_stop_and_three_more_have_the_bits_of_six() {
    for precision in ["ternary", "float"] {
        let folder = tempfile::tempdir().unwrap();
        write_corpus(folder.path());
        let mut whole = Trainer::new(config(folder.path(), precision, "whole", 6)).unwrap();
        let losses: Vec<f64> = (0..6).map(|_| whole.step().unwrap().loss).collect();

        let mut first = Trainer::new(config(folder.path(), precision, "parts", 6)).unwrap();
        first.run(&mut StopAfter(3)).unwrap();
        drop(first);
        let mut second = Trainer::resume(config(folder.path(), precision, "parts", 6)).unwrap();
        assert_eq!(second.steps_taken(), 3);
        let rest: Vec<f64> = (0..3).map(|_| second.step().unwrap().loss).collect();
        assert_eq!(rest, losses[3..], "{precision}");
        assert!(bits(&second) == bits(&whole), "{precision}: weights differ");
    }
}

#[test]
fn a_stop_within_the_growth_of_rounding_and_with_muon_changes_nothing() {
    for precision in ["ternary", "ternary-weights"] {
        let folder = tempfile::tempdir().unwrap();
        write_corpus(folder.path());
        let config = |out: &str, threads| {
            let mut config = config(folder.path(), precision, out, 6);
            config.train.quantization_warmup_steps = 5;
            config.train.threads = Some(threads);
            config.optimizer.kind = OptimizerKind::Muon;
            config
        };
        let mut whole = Trainer::new(config("whole", 3)).unwrap();
        let losses: Vec<f64> = (0..6).map(|_| whole.step().unwrap().loss).collect();
        Trainer::new(config("parts", 1)).unwrap().run(&mut StopAfter(3)).unwrap();
        let mut second = Trainer::resume(config("parts", 2)).unwrap();
        let rest: Vec<f64> = (0..3).map(|_| second.step().unwrap().loss).collect();
        assert_eq!(rest, losses[3..], "{precision}");
        assert!(bits(&second) == bits(&whole), "{precision}: weights differ");
        let mut other = config("parts", 2);
        other.train.quantization_warmup_steps = 4;
        let error = Trainer::resume(other).unwrap_err().to_string();
        assert!(error.contains("`train.quantization_warmup_steps`"), "{error}");
    }
}

#[test]
fn a_run_on_packed_documents_resumes_to_the_same_bits_and_refuses_the_other_packing() {
    let folder = tempfile::tempdir().unwrap();
    write_corpus(folder.path());
    let of = |out: &str, packing| {
        let mut config = config(folder.path(), "ternary", out, 6);
        // Longer than a document, so that sequences hold several.
        (config.data.packing, config.data.seq_len) = (packing, 60);
        config
    };
    let mut whole = Trainer::new(of("whole", Packing::Documents)).unwrap();
    whole.run(&mut ()).unwrap();
    let mut stream = Trainer::new(of("stream", Packing::Stream)).unwrap();
    stream.run(&mut ()).unwrap();
    assert!(bits(&whole) != bits(&stream), "packing has no effect");
    for threads in [1, 3] {
        let config = TrainConfig {
            train: TrainSection { threads: Some(threads), ..of("parts", Packing::Documents).train },
            ..of("parts", Packing::Documents)
        };
        let mut first = Trainer::open(config.clone()).unwrap();
        first.run(&mut StopAfter(3)).unwrap();
        drop(first);
        let message = Trainer::resume(of("parts", Packing::Stream)).err().unwrap().to_string();
        assert!(message.contains("`data.packing`"), "{message}");
        let mut second = Trainer::resume(config).unwrap();
        second.run(&mut ()).unwrap();
        assert!(bits(&second) == bits(&whole), "{threads} threads: weights differ");
        assert_eq!(second.evaluate_all(None), whole.evaluate_all(None));
        std::fs::remove_dir_all(folder.path().join("parts")).unwrap();
    }
}

#[test]
fn a_stop_between_two_lines_of_metrics_changes_neither() {
    let folder = tempfile::tempdir().unwrap();
    write_corpus(folder.path());
    let losses = |name: &str, stop: Option<u64>| {
        let mut config = config(folder.path(), "ternary", name, 6);
        config.train.log_every = 4;
        if let Some(steps) = stop {
            Trainer::new(config.clone()).unwrap().run(&mut StopAfter(steps)).unwrap();
            Trainer::resume(config).unwrap().run(&mut ()).unwrap();
        } else {
            Trainer::new(config).unwrap().run(&mut ()).unwrap();
        }
        let lines = setun_train::metrics::read(&folder.path().join(name).join("metrics.jsonl")).unwrap();
        lines.iter().map(|line| (line.step, line.loss)).collect::<Vec<_>>()
    };
    assert_eq!(losses("stopped", Some(3)), losses("whole", None));
}

#[test]
fn a_run_keeps_its_newest_checkpoints_and_its_metrics() {
    let folder = tempfile::tempdir().unwrap();
    write_corpus(folder.path());
    let config = config(folder.path(), "ternary", "out", 10);
    let mut trainer = Trainer::new(config.clone()).unwrap();
    trainer.run(&mut ()).unwrap();
    let out = folder.path().join("out");
    assert_eq!(Checkpoints::of(&out).steps().unwrap(), [9, 10]);
    let metrics = setun_train::metrics::read(&out.join("metrics.jsonl")).unwrap();
    assert_eq!(metrics.len(), 10);
    assert!(metrics[9].loss.unwrap() < metrics[0].loss.unwrap());
    assert!(metrics[9].bits_per_byte("valid").unwrap() > 0.0);
    assert_eq!(trainer.best().unwrap().step, 10);

    // A finished run is not begun anew over its own checkpoints.
    assert!(matches!(Trainer::new(config), Err(TrainError::Setting { .. })));
}

#[test]
fn resuming_another_run_is_refused_with_the_setting_that_differs() {
    let folder = tempfile::tempdir().unwrap();
    write_corpus(folder.path());
    let made = config(folder.path(), "ternary", "out", 3);
    assert!(matches!(Trainer::resume(made.clone()), Err(TrainError::Resume { .. })));
    Trainer::new(made.clone()).unwrap().run(&mut ()).unwrap();
    let mut other = made.clone();
    other.optimizer.lr = 0.5;
    let message = Trainer::resume(other).unwrap_err().to_string();
    assert!(message.contains("`optimizer`"), "{message}");
    let mut other = made.clone();
    other.data.sources[0].weight *= 2.0;
    let message = Trainer::resume(other).unwrap_err().to_string();
    assert!(message.contains("`data.sources`"), "{message}");

    // A checkpoint cut short is named.
    let tensors = Checkpoints::of(&made.train.out).path(3).join("state.safetensors");
    let bytes = std::fs::read(&tensors).unwrap();
    std::fs::write(&tensors, &bytes[..bytes.len() / 2]).unwrap();
    let message = Trainer::resume(made).unwrap_err().to_string();
    assert!(message.contains("state.safetensors"), "{message}");
}

#[test]
fn a_step_that_diverges_stops_and_names_the_last_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    write_corpus(folder.path());
    let mut config = config(folder.path(), "float", "out", 60);
    config.optimizer.lr = 1e30;
    config.optimizer.warmup_steps = 0;
    config.train.checkpoint_every = 1;
    let mut trainer = Trainer::new(config).unwrap();
    let message = trainer.run(&mut ()).unwrap_err().to_string();
    assert!(message.contains("diverged at step") && message.contains("step-0000000"), "{message}");
}

#[test]
fn held_out_text_that_is_trained_on_is_refused_under_any_name() {
    let folder = tempfile::tempdir().unwrap();
    write_corpus(folder.path());
    let mut config = config(folder.path(), "ternary", "out", 3);
    // The folder holds the held-out file too, so the source reads it.
    config.data.sources[0].path = vec![folder.path().to_owned()];
    let held_out = config.data.valid[0].path[0].clone();
    config.data.valid[0].path[0] = folder.path().join(".").join(held_out.file_name().unwrap());
    let message = Trainer::new(config).err().unwrap().to_string();
    assert!(message.contains("data.valid.path") && message.contains("reads it too"), "{message}");
}

#[test]
fn a_damaged_newest_checkpoint_is_named_with_the_way_out() {
    let folder = tempfile::tempdir().unwrap();
    write_corpus(folder.path());
    let mut run = Trainer::new(config(folder.path(), "float", "damaged", 6)).unwrap();
    run.run(&mut StopAfter(2)).unwrap();
    let newest = Checkpoints::of(&run.config().train.out).path(2);
    drop(run);
    for file in std::fs::read_dir(&newest).unwrap().map(|f| f.unwrap().path()) {
        std::fs::write(&file, b"{").unwrap();
    }
    let error = Trainer::resume(config(folder.path(), "float", "damaged", 6)).unwrap_err().to_string();
    assert!(error.contains(&format!("delete {}", newest.display())), "{error}");
}
