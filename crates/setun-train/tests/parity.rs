//! Training and inference are one model: exported weights give the same logits in both.

mod common;

use common::{run_config, write_corpus};
use setun::config::RopeTable;
use setun::engine::{Engine, EngineOptions};
use setun::kv_cache::KvType;
use setun_train::export::{ExportOptions, TernaryForm, export};
use setun_train::tape::{Setting, Tape};
use setun_train::trainer::Trainer;
use setun_train::weights::Weights;

/// Logits `[tokens, vocab_size]` of one sequence as the trainer computes them.
fn trained_logits(trainer: &Trainer, ids: &[u32]) -> Vec<f32> {
    let engine = setun_train::engine::Engine::new(2);
    let weights = Weights::with(&engine, trainer.params(), trainer.config().recipe(trainer.steps_taken()));
    let mut rope = RopeTable::new(&trainer.model().config.rope);
    rope.prepare(ids.len());
    let on = Setting {
        engine: &engine,
        params: trainer.params(),
        weights: &weights,
        rope: &rope,
        sequences: 1,
        seq_len: ids.len(),
    };
    let mut tape = Tape::forward_only(on);
    let hidden = trainer.model().hidden(&mut tape, ids);
    trainer.model().logits(&mut tape, &hidden).values().to_vec()
}

#[test]
fn train_and_infer_logits_agree_after_export() {
    for precision in ["ternary", "four bits", "ternary-weights", "float"] {
        let folder = tempfile::tempdir().unwrap();
        write_corpus(folder.path());
        let four_bits = precision == "four bits";
        let mut run = run_config(folder.path(), if four_bits { "ternary" } else { precision }, "out", 40);
        if four_bits {
            (run.model.activation_bits, run.model.hadamard) = (Some(4), true);
        }
        let mut trainer = Trainer::new(run).unwrap();
        trainer.run(&mut ()).unwrap();
        let text = "the cat sat on a mat and saw two birds in the red tree";
        let ids = trainer.vocabulary().encode(text).unwrap();
        let expected = trained_logits(&trainer, &ids);
        let group = trainer.config().recipe(0).group;
        for ternary in [TernaryForm::Packed, TernaryForm::Masters] {
            if group.is_some() && ternary == TernaryForm::Masters {
                continue; // Masters of weight-only models look like any float model's.
            }
            let model = folder.path().join(format!("model-{ternary:?}"));
            let options = ExportOptions { ternary, group, ..ExportOptions::default() };
            let config = &trainer.model().config;
            export(&model, config, trainer.params(), trainer.vocabulary(), &options).unwrap();
            let engine = Engine::open(&model, &EngineOptions::default()).unwrap();
            let mut session = engine.session(KvType::F32, None);
            let found = session.feed_all(&ids, None).unwrap();
            assert_eq!(found.len(), expected.len());
            let differences: Vec<f32> = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).collect();
            let largest = differences.iter().copied().fold(0.0, f32::max);
            let mean = differences.iter().sum::<f32>() / differences.len() as f32;
            let size = expected.iter().copied().fold(0.0f32, |m, x| m.max(x.abs()));
            eprintln!("{precision}, {ternary:?}: mean {mean:e}, largest {largest:e}, logits up to {size}");
            // A rounding of activations may fall the other way where float sums differ in their last bit.
            let (mean_limit, limit) = match precision {
                "ternary" => (6e-3, 0.1),
                "four bits" => (3e-2, 0.5),
                _ => (1e-5, 1e-4),
            };
            assert!(mean < mean_limit && largest < limit, "{precision}: mean {mean}, largest {largest}");
        }
    }
}
