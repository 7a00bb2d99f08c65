use std::path::{Path, PathBuf};

use setun::config::{ActivationType, Family, ModelConfig, Numerics};
use setun::engine::{Engine, EngineOptions};
use setun::format::{Checkpoint, Encoding};
use setun::kv_cache::KvType;
use setun_kernels::Kernels;

use super::*;

const FOLDERS: [&str; 3] = ["qwen3-tied", "qwen3-untied-hd128", "qwen3-hadamard-v1"];

fn engine(path: &Path, activations: Option<ActivationType>) -> Result<Engine, setun::error::ModelError> {
    Engine::open(path, &EngineOptions { threads: Some(2), activations, ..EngineOptions::default() })
}

/// Everything that runs in a folder of the set.
fn models(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
    let mut models: Vec<PathBuf> = entries
        .filter(|p| {
            p.extension().is_some_and(|e| e == "gguf")
                || p.file_name().is_some_and(|n| n == "hf-unpacked" || n == "mlx-2bit")
        })
        .collect();
    models.sort();
    models
}

fn check(model: &Path, expected: &Path) {
    let name = model.display().to_string();
    let engine = engine(model, None).unwrap_or_else(|error| panic!("{name}: {error}"));
    assert_eq!(engine.config().family, Family::Qwen3);
    // All of these models are weight-only, whatever they are packed in.
    assert_eq!(engine.activations(), ActivationType::Float, "{name}");
    let values = Checkpoint::open(expected.join("expected.safetensors")).unwrap();
    let facts = json(&expected.join("expected.json"));
    let sequences = facts["sequences"].as_array().unwrap();
    for (i, sequence) in sequences.iter().enumerate() {
        let tokens = ids(&sequence["tokens"]);
        let mut session = engine.session(KvType::F32, None);
        let mut taps = Vec::new();
        let logits = session.feed_all(&tokens, Some(&mut taps)).unwrap();
        let gap = largest_gap(logits, &floats(&values, &format!("logits.{i}")));
        assert!(gap <= 2e-3, "{name}, sequence {i}: logits are {gap} off");
        if values.info(&format!("hidden.{i}")).is_some() {
            let hidden = floats(&values, &format!("hidden.{i}"));
            // The reference has no output of the last layer before the norm.
            let last = taps.len() - 2;
            let found = taps.iter().enumerate().filter(|(n, _)| *n != last).flat_map(|(_, (_, x))| x.clone());
            let gap = largest_gap(&found.collect::<Vec<_>>(), &hidden);
            assert!(gap <= 2e-3, "{name}, sequence {i}: hidden states are {gap} off");
        }
        let greedy = ids(&sequence["greedy"]);
        let mut session = engine.session(KvType::F32, None);
        session.feed(&tokens).unwrap();
        for (step, &want) in greedy.iter().enumerate() {
            let found = argmax(session.logits());
            assert_eq!(found, want, "{name}, sequence {i}, greedy step {step}");
            session.feed(&[found]).unwrap();
        }
    }
    if engine.config().numerics != Numerics::Float {
        check_int8(model, &values, &facts);
    }
}

/// int8 activations: within twice what the reference says that rounding per token costs.
fn check_int8(model: &Path, values: &Checkpoint, facts: &serde_json::Value) {
    let engine = engine(model, Some(ActivationType::Int8)).unwrap();
    let cost =
        facts["activation_int8_sensitivity"]["q8_per_token"]["max_abs_logit_err"].as_f64().unwrap() as f32;
    let (mut same, mut steps) = (0, 0);
    for (i, sequence) in facts["sequences"].as_array().unwrap().iter().enumerate().take(5) {
        let (tokens, greedy) = (ids(&sequence["tokens"]), ids(&sequence["greedy"]));
        let mut session = engine.session(KvType::F32, None);
        let gap =
            largest_gap(session.feed_all(&tokens, None).unwrap(), &floats(values, &format!("logits.{i}")));
        assert!(gap > 0.0 && gap <= 2.0 * cost, "{}, sequence {i}: int8 is {gap} off", model.display());
        let mut session = engine.session(KvType::F32, None);
        session.feed(&tokens).unwrap();
        for &want in &greedy {
            same += usize::from(argmax(session.logits()) == want);
            steps += 1;
            session.feed(&[want]).unwrap();
        }
    }
    assert!(same * 10 >= steps * 9, "{}: {same} of {steps} greedy tokens", model.display());
}

#[test]
fn logits_hidden_states_and_greedy_ids_equal_the_references() {
    let mut read = 0;
    for folder in FOLDERS.map(|name| golden().join(name)).iter().filter(|folder| folder.is_dir()) {
        for model in models(folder) {
            check(&model, folder);
            read += 1;
        }
    }
    assert!(read >= 2, "no model was read");
}

#[test]
fn the_full_set_agrees_where_it_is_at_hand() {
    let Some(full) = full() else { return };
    for folder in FOLDERS.map(|name| full.join(name)) {
        for model in models(&folder) {
            check(&model, &folder);
        }
    }
}

#[test]
fn a_ternary_embedding_stays_ternary_in_memory_with_either_kind_of_activations() {
    let path = golden().join("qwen3-tied/model-tq1_0.gguf");
    for activations in [ActivationType::Float, ActivationType::Int8] {
        let engine = engine(&path, Some(activations)).unwrap();
        let config = engine.config();
        let weights = config.block_weights() + config.vocab_size * config.hidden_size;
        // Two bits and a scale for every 256 weights; the layouts of kernels pad a little.
        assert!(engine.bytes_per_token() < weights * 3 / 8, "{} for {weights}", engine.bytes_per_token());
    }
}

#[test]
fn weight_only_logits_have_the_same_bits_on_every_kernel_thread_count_and_prefill_chunking() {
    let path = golden().join("qwen3-tied/model-tq1_0.gguf");
    let facts = json(&golden().join("qwen3-tied/expected.json"));
    let tokens = ids(&facts["sequences"][0]["tokens"]);
    for activations in [ActivationType::Float, ActivationType::Int8] {
        let mut first: Option<Vec<u32>> = None;
        for kernels in Kernels::available() {
            for threads in [1, 3] {
                let options = EngineOptions {
                    kernels: Some(kernels),
                    threads: Some(threads),
                    activations: Some(activations),
                    ..EngineOptions::default()
                };
                let engine = Engine::open(&path, &options).unwrap();
                for batch in [1, 7, 512] {
                    let mut session = engine.session(KvType::F16, None);
                    let logits = session.feed_in_batches(&tokens, batch).unwrap();
                    let bits: Vec<u32> = logits.iter().map(|x| x.to_bits()).collect();
                    let what =
                        format!("{}, {threads} threads, batches of {batch}, {activations}", kernels.name());
                    assert_eq!(first.get_or_insert_with(|| bits.clone()), &bits, "{what}");
                }
            }
        }
    }
}

#[test]
fn what_ternary_layers_multiply_with_follows_from_family_and_type() {
    let models = golden().join("../models");
    for (path, expected) in [
        (golden().join("qwen3-tied/model-tq1_0.gguf"), ActivationType::Float),
        (models.join("llama-bitnet-packed-gguf/llama-bitnet-packed-tq2_0.gguf"), ActivationType::Int8),
        (
            models.join("bitnet-tied-packed-small-gguf/bitnet-tied-packed-small-i2_s.gguf"),
            ActivationType::Int8,
        ),
        (models.join("bitnet-tied-packed-small"), ActivationType::Int8),
    ] {
        let file = Checkpoint::open(&path).unwrap();
        let config = ModelConfig::of(&file).unwrap();
        assert_eq!(config.activations(), expected, "{}", path.display());
        assert!(config.has_ternary_layers(), "{}", path.display());
    }
}

#[test]
fn configurations_survive_the_way_through_json() {
    for name in ["qwen3-tied", "qwen3-untied-hd128"] {
        let config = ModelConfig::from_json(&json(&golden().join(name).join("config.json"))).unwrap();
        assert_eq!(ModelConfig::from_json(&config.to_json()).unwrap(), config, "{name}");
        assert_eq!((config.family, config.qk_norm), (Family::Qwen3, true));
    }
}

#[test]
fn yarn_of_the_published_8b_keeps_its_first_dimensions_and_stretches_its_last() {
    let json = serde_json::json!({
        "model_type": "qwen3", "vocab_size": 8, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 128, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0,
            "original_max_position_embeddings": 16384},
    });
    let (found, factor) = ModelConfig::from_json(&json).unwrap().rope.frequencies(1);
    assert!((factor - 1.138_629).abs() < 1e-6, "{factor}");
    for (i, found) in found.iter().enumerate() {
        let plain = 1e6f64.powf(-2.0 * i as f64 / 128.0);
        let ramp = ((i as f64 - 20.0) / 17.0).clamp(0.0, 1.0);
        let expected = plain * (1.0 - ramp) + plain / 4.0 * ramp;
        assert!((f64::from(*found) - expected).abs() <= 1e-6 * expected, "{i}: {found}, {expected}");
    }
}

#[test]
fn a_ternary_qwen3_goes_through_gguf_again_and_is_refused_where_its_numerics_would_be_lost() {
    use setun::convert::{ConvertOptions, Target, convert};
    let file = Checkpoint::open(golden().join("qwen3-tied/model-tq1_0.gguf")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let options = ConvertOptions { verify: true, without_tokenizer: true, ..ConvertOptions::default() };
    for (name, linear_type) in [("same", None), ("tq2", Some(Encoding::TQ2_0)), ("f16", Some(Encoding::F16))]
    {
        let path = folder.path().join(format!("{name}.gguf"));
        let options = ConvertOptions { linear_type, ..options.clone() };
        convert(&file, &path, &options, &mut |_| {}).unwrap_or_else(|e| panic!("{name}: {e}"));
        check(&path, &golden().join("qwen3-tied"));
    }
    let scales = Some(setun::format::ScaleConvention::Multiply);
    let options = ConvertOptions { target: Target::HuggingFace, scales, ..options };
    let error = convert(&file, &folder.path().join("hf"), &options, &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("round activations"), "{error}");
}
