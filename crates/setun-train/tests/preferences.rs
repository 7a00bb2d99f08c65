//! Preference optimisation: the loss of the paper, its gradient, and that it changes what a model prefers.

mod common;

use std::path::{Path, PathBuf};

use common::{assert_close, noise};
use setun::config::RopeTable;
use setun::format::Checkpoint;
use setun::tokenizer::Tokenizer;
use setun_train::data::Batch;
use setun_train::engine::Engine;
use setun_train::feed::Feed;
use setun_train::finetune::lora::LoraSection;
use setun_train::finetune::{Base, Length, Settings};
use setun_train::loss::IGNORE;
use setun_train::params::Params;
use setun_train::tape::{Gradients, Setting, Tape};
use setun_train::trainer::{Progress, StepReport};
use setun_train::weights::Weights;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/models").join(name)
}

/// Words, for models that come without a tokenizer.
fn words() -> Tokenizer {
    let json = r#"{"version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": null, "decoder": null, "model": {"type": "WordLevel", "unk_token": "a",
        "vocab": {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4, "f": 5, "g": 6, "h": 7}}}"#;
    Tokenizer::from_json_bytes(json.as_bytes()).unwrap()
}

fn settings(folder: &Path, out: &str, steps: u64) -> Settings {
    let path = folder.join("pairs.jsonl");
    let line = |prompt: &str, chosen: &str, rejected: &str| {
        serde_json::json!({ "prompt": prompt, "chosen": chosen, "rejected": rejected }).to_string()
    };
    let lines = [line("a b c", "d e f", "g h"), line("b b", "c", "a d c"), line("f e", "a b", "b a c d")];
    std::fs::write(&path, lines.join("\n")).unwrap();
    Settings {
        data: vec![path],
        length: Length::Steps(steps),
        seq_len: Some(32),
        batch: 3,
        lr: 1e-3,
        threads: Some(2),
        log_every: 1,
        checkpoint_every: 2,
        out: folder.join(out),
        ..Settings::default()
    }
}

/// `Σ ln p` of a row's targets, from the logits, in f64.
fn log_prob(logits: &[f32], vocab: usize, targets: &[u32]) -> f64 {
    let each =
        logits.chunks_exact(vocab).zip(targets).filter(|(_, t)| **t != IGNORE).map(|(row, &target)| {
            let sum: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
            f64::from(row[target as usize]) - sum.ln()
        });
    each.sum()
}

#[test]
fn loss_and_gradient_are_those_of_the_formula() {
    let folder = tempfile::tempdir().unwrap();
    let file = Checkpoint::open(golden("rope-llama-default")).unwrap();
    let tokenizer = words();
    let base = Base::new(&file, &tokenizer, None).unwrap();
    let trainer = base.prefer(&settings(folder.path(), "out", 4), &mut |_| ()).unwrap();
    let model = trainer.model();
    let (engine, mut feed) = (Engine::new(2), trainer.feed().clone());
    let mut rope = RopeTable::new(&model.config.rope);
    rope.prepare(64);
    let item = feed.next_batch(0.0);
    let batch: Batch = item.as_ref().clone();
    let vocab = model.config.vocab_size;
    let rows = |params: &Params, weights: &Weights| -> Vec<f64> {
        let (sequences, seq_len) = (batch.batch, batch.seq_len);
        let on = Setting { engine: &engine, params, weights, rope: &rope, sequences, seq_len };
        let mut tape = Tape::forward_only(on);
        let hidden = model.hidden(&mut tape, &batch.ids);
        let logits = model.logits(&mut tape, &hidden);
        let per_row = logits.values().chunks_exact(seq_len * vocab).zip(batch.targets.chunks_exact(seq_len));
        per_row.map(|(logits, targets)| log_prob(logits, vocab, targets)).collect()
    };
    let start = trainer.params().clone();
    let reference = rows(&start, &Weights::new(&engine, &start));
    // The model, some way from where it began.
    let mut moved = start.clone();
    for id in start.ids() {
        let new = noise(start[id].values.len(), 5);
        moved.values_mut(id).iter_mut().zip(new).for_each(|(w, n)| *w *= 1.0 + 0.2 * n);
    }
    let beta = 0.1;
    let formula = |params: &Params| -> f64 {
        let now = rows(params, &Weights::new(&engine, params));
        let pair = |i: usize| {
            let h = beta * ((now[i] - reference[i]) - (now[i + 1] - reference[i + 1]));
            -(1.0 / (1.0 + (-h).exp())).ln()
        };
        (0..now.len()).step_by(2).map(pair).sum()
    };
    let (sequences, seq_len) = (batch.batch, batch.seq_len);
    let weights = Weights::new(&engine, &moved);
    let on = Setting { engine: &engine, params: &moved, weights: &weights, rope: &rope, sequences, seq_len };
    let mut gradients = Gradients::new(&moved);
    let mut tape = Tape::new(on, &mut gradients);
    let loss = feed.objective(model, &mut tape, &item, 1.0);
    tape.backward();
    let expected = formula(&moved);
    assert!((loss.sum - expected).abs() < 1e-5 * expected, "{} {expected}", loss.sum);
    assert!((loss.mean() - 2f64.ln()).abs() > 1e-3, "far enough from the start to matter: {}", loss.mean());

    for id in moved.ids() {
        let (name, count) = (moved[id].name.clone(), moved[id].values.len());
        let places: Vec<usize> = (0..4).map(|i| (i * 997 + 13) % count).collect();
        let found: Vec<f32> = places.iter().map(|&at| gradients.get(id)[at]).collect();
        let numeric: Vec<f64> = places
            .iter()
            .map(|&at| {
                let side = |h: f32| {
                    let mut changed = moved.clone();
                    changed.values_mut(id)[at] += h;
                    formula(&changed)
                };
                (side(4e-3) - side(-4e-3)) / 8e-3
            })
            .collect();
        // Places of the embedding that no token uses have no gradient at all.
        if numeric.iter().any(|n| n.abs() > 1e-4) {
            assert_close(&name, &found, &numeric, 2e-2);
        }
    }
}

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
fn chosen_answers_become_likelier_and_a_stopped_run_writes_the_same_lines() {
    let file = Checkpoint::open(golden("bitnet-tied-packed-small")).unwrap();
    let tokenizer = Tokenizer::of(&file).unwrap();
    let base = Base::new(&file, &tokenizer, None).unwrap();
    for lora in
        [None, Some(LoraSection { rank: 4, alpha: 8.0, targets: vec!["q_proj".into(), "up_proj".into()] })]
    {
        let folder = tempfile::tempdir().unwrap();
        let lines = |out: &str, stop: Option<u64>| {
            let settings = Settings { lora: lora.clone(), ..settings(folder.path(), out, 12) };
            let mut trainer = base.prefer(&settings, &mut |_| ()).unwrap();
            if let Some(steps) = stop {
                trainer.run(&mut StopAfter(steps)).unwrap();
                trainer = base.prefer(&settings, &mut |_| ()).unwrap();
            }
            trainer.run(&mut ()).unwrap();
            let lines = setun_train::metrics::read(&settings.out.join("metrics.jsonl")).unwrap();
            lines.iter().map(|line| (line.step, line.loss, line.other.clone())).collect::<Vec<_>>()
        };
        let whole = lines("whole", None);
        assert_eq!(lines("parts", Some(5)), whole);
        assert!(
            (whole[0].1.unwrap() - 2f64.ln()).abs() < 1e-9,
            "at the start nothing is preferred: {:?}",
            whole[0]
        );
        let last = &whole[11].2;
        assert!(last["dpo_margin"].as_f64().unwrap() > 0.05, "{last:?}");
        assert_eq!(last["dpo_accuracy"].as_f64().unwrap(), 1.0);
    }
}

#[test]
fn pairs_that_cannot_be_used_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = Checkpoint::open(golden("rope-llama-default")).unwrap();
    let tokenizer = words();
    let base = Base::new(&file, &tokenizer, None).unwrap();
    for (text, part) in [
        ("{\"prompt\": \"a\", \"chosen\": \"b\"}", "line 1: `rejected`"),
        ("{\"prompt\": \"a\", \"chosen\": \"b\", \"rejected\": \"b\"}", "the same"),
        ("", "--data"),
    ] {
        let settings = settings(folder.path(), "out", 1);
        std::fs::write(&settings.data[0], text).unwrap();
        let error = base.prefer(&settings, &mut |_| ()).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    let mut settings = settings(folder.path(), "out", 1);
    settings.beta = 0.0;
    let error = base.prefer(&settings, &mut |_| ()).unwrap_err().to_string();
    assert!(error.contains("--beta"), "{error}");
}
