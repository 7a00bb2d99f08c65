//! Adapters on a frozen base: gradients, files, serving beside the model, merging.

mod common;

use std::path::{Path, PathBuf};

use common::{Bench, assert_close, noise, write_corpus};
use setun::config::{ModelConfig, RopeTable};
use setun::engine::{Engine, EngineOptions};
use setun::format::Checkpoint;
use setun::kv_cache::KvType;
use setun::lora::Adapter;
use setun::model::Role;
use setun::ops::{Linear, LowRank, Ops};
use setun::tokenizer::Tokenizer;
use setun_kernels::Kernels;
use setun_train::export::{ExportOptions, export_of};
use setun_train::finetune::examples::Examples;
use setun_train::finetune::lora::LoraSection;
use setun_train::finetune::{Base, Length, Settings};
use setun_train::params::{Kind, ParamId};
use setun_train::tape::{Setting, Tape};
use setun_train::trainer::Trainer;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/models").join(name)
}

/// Tied, with sub-norms; and one whose layers are read from a GGUF file, where the rows of q and k have another order.
const MODELS: [&str; 2] =
    ["bitnet-tied-packed-small", "llama-bitnet-packed-gguf/llama-bitnet-packed-i2_s-by-bitnetcpp.gguf"];

fn settings(folder: &Path, out: &str, steps: u64) -> Settings {
    let targets = ["q_proj", "v_proj", "down_proj"].map(str::to_owned).into();
    Settings {
        data: vec![folder.join("train.txt")],
        valid: vec![folder.join("valid.txt")],
        length: Length::Steps(steps),
        seq_len: Some(24),
        batch: 2,
        lr: 1e-2,
        threads: Some(2),
        checkpoint_every: 2,
        out: folder.join(out),
        lora: Some(LoraSection { rank: 4, alpha: 8.0, targets }),
        ..Settings::default()
    }
}

fn ids() -> Vec<u32> {
    (0..40u32).map(|i| (i * i * 7 + 3 * i + 1) % 300).collect()
}

fn logits(path: &Path, adapter: Option<&Path>, kernels: &'static Kernels, batch: usize) -> Vec<f32> {
    let file = Checkpoint::open(path).unwrap();
    let options = EngineOptions { kernels: Some(kernels), threads: Some(2), ..EngineOptions::default() };
    let adapter = adapter.map(|folder| Adapter::open(folder).unwrap());
    let config = ModelConfig::of(&file).unwrap();
    let engine = Engine::load_adapted(&file, config, &options, adapter.as_ref(), &mut |_| ()).unwrap();
    engine.session(KvType::F32, None).feed_in_batches(&ids(), batch).unwrap().to_vec()
}

fn trained_logits(trainer: &Trainer<Examples>) -> Vec<f32> {
    let (engine, ids) = (setun_train::engine::Engine::new(2), ids());
    let (params, weights) = (trainer.params(), trainer.weights());
    let mut rope = RopeTable::new(&trainer.model().config.rope);
    rope.prepare(ids.len());
    let on = Setting { engine: &engine, params, weights, rope: &rope, sequences: 1, seq_len: ids.len() };
    let mut tape = Tape::forward_only(on);
    let hidden = trainer.model().hidden(&mut tape, &ids);
    let all = trainer.model().logits(&mut tape, &hidden);
    all.values()[all.values().len() - all.width()..].to_vec()
}

#[test]
fn gradients_of_an_adapter_are_those_of_finite_differences() {
    for role in [Role::Float, Role::Ternary] {
        let mut bench = Bench::new(2);
        let w = bench.matrix("w", 12, 16, role);
        let (a, b) = (bench.matrix("a", 3, 16, Role::Float), bench.matrix("b", 12, 3, Role::Float));
        let x = bench.matrix("x", 5, 16, Role::Float);
        let of = noise(5 * 12, 77);
        let forward = |bench: &Bench, tape: &mut Tape| {
            let input = tape.input(&bench.params[x].values, 16);
            let adapter = Some(LowRank { a, b, scale: 1.5 });
            let [y] = tape.linear(&input, [&Linear { adapter, ..Linear::plain(w) }]);
            (input, y)
        };
        let loss = |bench: &Bench| -> f64 {
            let (_, y) = forward(bench, &mut Tape::forward_only(bench.setting(1, 5)));
            y.values().iter().zip(&of).map(|(y, g)| f64::from(*y) * f64::from(*g)).sum()
        };
        let mut gradients = bench.gradients();
        let mut tape = Tape::new(bench.setting(1, 5), &mut gradients);
        let (input, y) = forward(&bench, &mut tape);
        tape.seed(&y, &of);
        let [dx] = tape.backward_to([&input]);
        let mut numeric = |id: ParamId| -> Vec<f64> {
            let count = bench.params[id].values.len();
            let slope = |at: usize| {
                let (old, h) = (bench.params[id].values[at], 1e-2);
                bench.set(id, at, old + h);
                let above = loss(&bench);
                bench.set(id, at, old - h);
                let below = loss(&bench);
                bench.set(id, at, old);
                (above - below) / f64::from(2.0 * h)
            };
            (0..count).map(slope).collect()
        };
        assert_close("A", gradients.get(a), &numeric(a), 1e-3);
        assert_close("B", gradients.get(b), &numeric(b), 1e-3);
        if role == Role::Float {
            assert_close("x", &dx.unwrap(), &numeric(x), 1e-3);
        }
    }
}

#[test]
fn an_adapter_learns_beside_a_base_that_holds_no_floats_and_resumes_to_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    write_corpus(folder.path());
    let file = Checkpoint::open(golden(MODELS[0])).unwrap();
    let tokenizer = Tokenizer::of(&file).unwrap();
    let base = Base::new(&file, &tokenizer, None).unwrap();
    let none = &mut |_| ();
    let mut whole = base.train(&settings(folder.path(), "whole", 30), none).unwrap();
    for param in whole.params().iter() {
        let layer = param.kind == Kind::Matrix(Role::Ternary);
        assert_eq!(param.values.is_empty(), layer, "{}", param.name);
    }
    let trained: Vec<&str> = whole.params().iter_trained().map(|p| p.name.as_str()).collect();
    assert_eq!(trained.len(), 6 * base.config().num_layers);
    assert_eq!(trained[0], "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight");

    let before = whole.evaluate_all(None)[0].1.loss();
    (0..15).for_each(|_| _ = whole.step().unwrap());
    whole.save().unwrap();
    let checkpoint = folder.path().join("whole/checkpoints/step-00000015/state.safetensors");
    let saved: usize = whole.params().iter_trained().map(|p| 12 * p.values.len()).sum();
    let bytes = std::fs::metadata(checkpoint).unwrap().len() as usize;
    assert!(bytes < saved + 20_000, "{bytes} bytes for {saved} of adapters and moments");
    let mut again = base.train(&settings(folder.path(), "whole", 30), none).unwrap();
    for _ in 15..30 {
        assert_eq!(whole.step().unwrap().loss, again.step().unwrap().loss);
    }
    assert!(whole.params() == again.params());
    let after = whole.evaluate_all(None)[0].1.loss();
    assert!(after < before - 0.5, "{before} -> {after}");
}

#[test]
fn a_served_adapter_has_the_trainers_logits_with_the_same_bits_everywhere() {
    for name in MODELS {
        let folder = tempfile::tempdir().unwrap();
        write_corpus(folder.path());
        let (model, adapter) = (golden(name), folder.path().join("adapter"));
        let file = Checkpoint::open(&model).unwrap();
        let tokenizer = Tokenizer::of(&file).unwrap();
        let base = Base::new(&file, &tokenizer, None).unwrap();
        let mut trainer = base.train(&settings(folder.path(), "out", 10), &mut |_| ()).unwrap();

        // Before the first step B is zero.
        base.export_adapter(&trainer, &adapter, &model).unwrap();
        let plain = logits(&model, None, Kernels::best(), 64);
        for kernels in Kernels::available() {
            for batch in [1, 7, 64] {
                assert_eq!(
                    logits(&model, Some(&adapter), kernels, batch),
                    plain,
                    "{name}: {}",
                    kernels.name()
                );
            }
        }
        (0..10).for_each(|_| _ = trainer.step().unwrap());
        base.export_adapter(&trainer, &adapter, &model).unwrap();
        let served = logits(&model, Some(&adapter), Kernels::best(), 64);
        assert_ne!(served, plain);
        for kernels in Kernels::available() {
            for batch in [1, 7] {
                assert_eq!(
                    logits(&model, Some(&adapter), kernels, batch),
                    served,
                    "{name}: {}",
                    kernels.name()
                );
            }
        }
        let size = served.iter().fold(0f32, |m, x| m.max(x.abs()));
        let trained = trained_logits(&trainer);
        let difference = served.iter().zip(&trained).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        eprintln!("{name}: {difference:e} of {size}");
        assert!(difference <= 0.05 * size, "{name}: {difference} of {size}");
    }
}

#[test]
fn merging_nothing_changes_nothing_and_merging_something_is_measured() {
    for name in MODELS {
        let folder = tempfile::tempdir().unwrap();
        write_corpus(folder.path());
        let (model, adapter) = (golden(name), folder.path().join("adapter"));
        let file = Checkpoint::open(&model).unwrap();
        let tokenizer = Tokenizer::of(&file).unwrap();
        let base = Base::new(&file, &tokenizer, None).unwrap();
        let settings = settings(folder.path(), "out", 20);
        let mut trainer = base.train(&settings, &mut |_| ()).unwrap();
        base.export_adapter(&trainer, &adapter, &model).unwrap();
        let (params, merge) = base.merge(&Adapter::open(&adapter).unwrap(), &settings).unwrap();
        assert_eq!(merge.flips.changed, 0);
        assert!(merge.flips.weights > 0);
        let merged = folder.path().join("merged");
        export_of(&base, &merged, &params, &ExportOptions::default()).unwrap();
        let best = Kernels::best();
        assert_eq!(logits(&merged, None, best, 64), logits(&model, None, best, 64), "{name}");

        (0..20).for_each(|_| _ = trainer.step().unwrap());
        base.export_adapter(&trainer, &adapter, &model).unwrap();
        let (_, merge) = base.merge(&Adapter::open(&adapter).unwrap(), &settings).unwrap();
        let loss = |score: Option<setun_train::data::Score>| score.unwrap().loss();
        assert_eq!(loss(merge.with_adapter), trainer.evaluate_all(None)[0].1.loss());
        eprintln!(
            "{name}: {} -> {} beside, {} merged, {:?}",
            loss(merge.before),
            loss(merge.with_adapter),
            loss(merge.merged),
            merge.flips
        );
        assert!(loss(merge.with_adapter) < loss(merge.before) && merge.flips.changed > 0);
    }
}

#[test]
fn adapters_of_another_model_are_refused_with_what_differs() {
    let folder = tempfile::tempdir().unwrap();
    write_corpus(folder.path());
    let adapter = folder.path().join("adapter");
    let file = Checkpoint::open(golden(MODELS[0])).unwrap();
    let tokenizer = Tokenizer::of(&file).unwrap();
    let base = Base::new(&file, &tokenizer, None).unwrap();
    let trainer = base.train(&settings(folder.path(), "out", 1), &mut |_| ()).unwrap();
    base.export_adapter(&trainer, &adapter, &golden(MODELS[0])).unwrap();
    let load = |name: &str| {
        let file = Checkpoint::open(golden(name)).unwrap();
        let (config, adapter) = (ModelConfig::of(&file).unwrap(), Adapter::open(&adapter).unwrap());
        let options = EngineOptions::default();
        Engine::load_adapted(&file, config, &options, Some(&adapter), &mut |_| ()).unwrap_err().to_string()
    };
    let error = load("qwen2-bias");
    assert!(error.contains("lora_") && error.contains("shape"), "{error}");
    let error = load("llama-bitnet-online-rmsnorm");
    assert!(error.contains("q_proj"), "{error}");

    let config = adapter.join("adapter_config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text.replace("\"r\": 4", "\"r\": 8")).unwrap();
    let error = Adapter::open(&adapter).unwrap_err().to_string();
    assert!(error.contains("lora_A.weight") && error.contains('8'), "{error}");
    std::fs::remove_file(&config).unwrap();
    let error = Adapter::open(&adapter).unwrap_err().to_string();
    assert!(error.contains("adapter_config.json"), "{error}");
}
