//! Logits, hidden states and greedy text against values that independent programs computed (golden/models).
//!
//! Tolerances and their reasons: docs/numerics.md. Folders of the full set beyond those copied here are checked too
//! where it lies beside the project.

use std::path::{Path, PathBuf};

use setun::config::ActivationType;
use setun::config::ModelConfig;
use setun::engine::{Engine, EngineOptions};
use setun::error::ModelError;
use setun::format::Checkpoint;
use setun::format::gguf::{Array, Value};
use setun::kv_cache::KvType;
use setun_kernels::Kernels;

/// Expected tensors of one folder.
struct Expected(Checkpoint);

impl Expected {
    fn floats(&self, name: &str) -> Option<Vec<f32>> {
        self.0.find(name).unwrap().map(|t| t.to_f32().unwrap())
    }

    fn ids(&self, name: &str) -> Vec<u32> {
        let tensor = self.0.tensor(name).unwrap();
        tensor.data.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32).collect()
    }
}

/// How far two sets of logits may be apart.
struct Tolerance {
    max: f32,
    mean: f32,
    argmax: f32,
    margin: f32,
}

const TERNARY: Tolerance = Tolerance { max: 0.1, mean: 6e-3, argmax: 0.97, margin: 0.1 };
const FLOAT: Tolerance = Tolerance { max: 1e-3, mean: 1e-4, argmax: 1.0, margin: 1e-2 };
const DEQUANTISED: Tolerance = Tolerance { max: 2e-3, mean: 2e-4, argmax: 1.0, margin: 1e-2 };
/// bitnet.cpp itself keeps keys and values in f16 and sums in another order.
const BITNET_CPP: Tolerance = Tolerance { max: 0.2, mean: 2e-2, argmax: 0.97, margin: 0.1 };

fn argmax(row: &[f32]) -> usize {
    row.iter().enumerate().fold(0, |best, (i, &x)| if x > row[best] { i } else { best })
}

fn compare(what: &str, found: &[f32], expected: &[f32], width: usize, tolerance: &Tolerance) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let apart: Vec<f32> = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).collect();
    let max = apart.iter().copied().fold(0.0, f32::max);
    let mean = apart.iter().sum::<f32>() / apart.len() as f32;
    let rows = found.len() / width;
    let same =
        found.chunks(width).zip(expected.chunks(width)).filter(|(a, b)| argmax(a) == argmax(b)).count();
    eprintln!("{what}: max {max:.2e}, mean {mean:.2e}, argmax {same}/{rows}");
    assert!(max <= tolerance.max && mean <= tolerance.mean, "{what}: max {max}, mean {mean}");
    assert!(same as f32 >= tolerance.argmax * rows as f32, "{what}: argmax equal in {same} of {rows}");
}

fn engine(path: &Path, kernels: &'static Kernels, threads: usize, activations: ActivationType) -> Engine {
    let options = EngineOptions {
        kernels: Some(kernels),
        threads: Some(threads),
        activations: Some(activations),
        ..EngineOptions::default()
    };
    Engine::open(path, &options).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Logits and hidden states of a Hugging Face folder.
fn check_folder(folder: &Path) {
    let name = folder.file_name().unwrap().to_string_lossy().into_owned();
    let expected = Expected(Checkpoint::open(folder.join("expected/values.safetensors")).unwrap());
    let ids = expected.ids("input_ids");
    let engine = engine(folder, Kernels::best(), 2, ActivationType::Int8);
    let ternary = engine.config().numerics != setun::config::Numerics::Float;
    let tolerance = if ternary { TERNARY } else { FLOAT };
    let vocab = engine.config().vocab_size;

    if let Some(expected) = expected.floats("inv_freq") {
        let (found, _) = engine.config().rope.frequencies(ids.len());
        for (f, e) in found.iter().zip(&expected) {
            assert!((f - e).abs() <= 1e-6 * e.abs(), "{name}: inv_freq {f} instead of {e}");
        }
    }

    let mut session = engine.session(KvType::F32, Some(ids.len()));
    let mut taps = Vec::new();
    let logits = session.feed_all(&ids, Some(&mut taps)).unwrap().to_vec();
    compare(&name, &logits, &expected.floats("logits").unwrap(), vocab, &tolerance);
    for (tap, found) in &taps {
        let Some(expected) = expected.floats(&format!("hidden.{tap}")) else { continue };
        let n = expected.len() as f32;
        let deviation = (expected.iter().map(|x| x * x).sum::<f32>() / n).sqrt();
        let mean = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).sum::<f32>() / n;
        let limit = if tap.to_string() == "embed" { 1e-6 } else { 1e-2 * deviation };
        assert!(mean <= limit, "{name}: hidden.{tap} is {mean} off on average, limit {limit}");
    }
    if let Some(expected_short) = expected.floats("len40.logits") {
        let mut session = engine.session(KvType::F32, None);
        let ids = expected.ids("len40.input_ids");
        let logits = session.feed_all(&ids, None).unwrap();
        compare(&format!("{name} len40"), logits, &expected_short, vocab, &tolerance);
    }

    // Dynamic NTK re-rotates the past when the whole sequence is recomputed, as the reference did; a cache cannot.
    if name != "rope-llama-dynamic" {
        greedy(&name, &engine, &ids, &expected, tolerance.margin);
    }
}

/// Greedy ids agree until a step where the reference itself was nearly undecided.
fn greedy(name: &str, engine: &Engine, ids: &[u32], expected: &Expected, margin: f32) {
    let wanted = expected.ids("greedy_ids");
    let margins = expected.floats("greedy_margin").unwrap();
    let mut session = engine.session(KvType::F32, Some(ids.len() + wanted.len()));
    session.feed(ids).unwrap();
    for (step, (&want, &gap)) in wanted.iter().zip(&margins).enumerate() {
        let found = argmax(session.logits()) as u32;
        if found != want {
            assert!(gap < margin, "{name}: greedy step {step} gives {found} instead of {want}, margin {gap}");
            return;
        }
        if step + 1 < wanted.len() {
            session.feed(&[found]).unwrap();
        }
    }
}

/// Logits of the GGUF twins of a folder, under every numeric definition they were computed with.
fn check_ggufs(folder: &Path) {
    let expected = Expected(Checkpoint::open(folder.join("expected/values.safetensors")).unwrap());
    let ids = expected.ids("input_ids");
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|f| f.unwrap().path()).collect();
    files.retain(|f| f.extension().is_some_and(|e| e == "gguf"));
    files.sort();
    for file in files {
        let name = file.file_stem().unwrap().to_string_lossy().into_owned();
        if name.ends_with("q4_0") {
            eprintln!("skipped: {name}, since Q4_0 is not read yet");
            continue;
        }
        let kind = ["I2_S", "TQ1_0", "TQ2_0", "Q8_0", "F16"];
        let kind = kind.into_iter().find(|k| name.to_uppercase().contains(&format!("-{k}"))).unwrap();
        let variants = [
            ("logits_actq", ActivationType::Int8, TERNARY),
            ("logits_bitnetcpp", ActivationType::Int8, BITNET_CPP),
            ("logits_dequant", ActivationType::Float, DEQUANTISED),
        ];
        let mut checked = 0;
        for (variant, activations, tolerance) in variants {
            let Some(expected) = expected.floats(&format!("{kind}.{variant}")) else { continue };
            let engine = engine(&file, Kernels::best(), 2, activations);
            let mut session = engine.session(KvType::F32, None);
            let logits = session.feed_all(&ids, None).unwrap();
            compare(&format!("{name} {variant}"), logits, &expected, engine.config().vocab_size, &tolerance);
            checked += 1;
        }
        assert!(checked > 0, "{name}: nothing to compare with");
    }
}

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/models")
}

fn check_all(root: &Path) -> usize {
    let decoders = ["bitnet-", "llama-", "rope-", "mistral-", "qwen2-"];
    let mut folders: Vec<_> = std::fs::read_dir(root).unwrap().map(|f| f.unwrap().path()).collect();
    folders.retain(|f| {
        let name = f.file_name().unwrap().to_string_lossy();
        f.join("expected").is_dir() && decoders.iter().any(|d| name.starts_with(d))
    });
    folders.sort();
    for folder in &folders {
        if folder.join("config.json").exists() { check_folder(folder) } else { check_ggufs(folder) }
    }
    folders.len()
}

#[test]
fn logits_hidden_states_and_greedy_ids_equal_the_references() {
    assert_eq!(check_all(&golden()), 14);
}

#[test]
fn the_full_reference_set_agrees_where_it_is_at_hand() {
    let full = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/golden");
    if !full.is_dir() {
        eprintln!("skipped: the full reference set is not here");
        return;
    }
    assert!(check_all(&full) >= 14);
}

/// Every way of running one model.
fn all_ways() -> impl Iterator<Item = (&'static Kernels, usize, usize)> {
    Kernels::available()
        .flat_map(|k| [1, 2, 3].into_iter().flat_map(move |t| [1, 7, 512].map(move |b| (k, t, b))))
}

#[test]
fn logits_have_the_same_bits_on_every_kernel_thread_count_and_prefill_chunking() {
    for folder in [
        "bitnet-tied-packed-small",
        "llama-bitnet-online-rmsnorm",
        "mistral-sliding-window",
        "rope-llama-yarn",
    ] {
        let path = golden().join(folder);
        let expected = Expected(Checkpoint::open(path.join("expected/values.safetensors")).unwrap());
        let ids = expected.ids("input_ids");
        for kv in KvType::ALL {
            let mut first: Option<Vec<u32>> = None;
            for (kernels, threads, batch) in all_ways() {
                let engine = engine(&path, kernels, threads, ActivationType::Int8);
                let mut session = engine.session(kv, None);
                let logits = session.feed_in_batches(&ids, batch).unwrap();
                let bits: Vec<u32> = logits.iter().map(|x| x.to_bits()).collect();
                let what = format!(
                    "{folder}: {} with {threads} threads in batches of {batch}, {kv}",
                    kernels.name()
                );
                assert_eq!(first.get_or_insert_with(|| bits.clone()), &bits, "{what}");
            }
        }
    }
}

#[test]
fn a_full_context_is_an_error_and_leaves_the_session_usable() {
    let engine = engine(&golden().join("rope-llama-default"), Kernels::best(), 1, ActivationType::Int8);
    let mut session = engine.session(KvType::F16, Some(8));
    session.feed(&[1, 2, 3, 4, 5, 6]).unwrap();
    let error = session.feed(&[1, 2, 3]).unwrap_err().to_string();
    assert!(error.contains("8 positions"), "{error}");
    session.feed(&[1, 2]).unwrap();
    assert_eq!(session.room(), 0);
    assert!(session.feed(&[96]).is_err());
}

#[test]
fn configurations_survive_the_way_through_json() {
    for folder in std::fs::read_dir(golden()).unwrap().map(|f| f.unwrap().path()) {
        let Ok(text) = std::fs::read_to_string(folder.join("config.json")) else { continue };
        let config = ModelConfig::from_json(&serde_json::from_str(&text).unwrap()).unwrap();
        assert_eq!(ModelConfig::from_json(&config.to_json()).unwrap(), config, "{}", folder.display());
    }
}

/// Loads `path` under a changed configuration and runs a few tokens; whatever happens, it must not panic.
fn try_config(
    path: &Path,
    read: impl Fn(&Checkpoint) -> Result<ModelConfig, ModelError>,
) -> Result<(), String> {
    let file = Checkpoint::open(path).unwrap();
    let config = read(&file).map_err(|e| e.to_string())?;
    let options = EngineOptions { threads: Some(1), ..EngineOptions::default() };
    let engine = Engine::load(&file, config, &options).map_err(|e| e.to_string())?;
    let mut session = engine.session(KvType::F16, None);
    session.feed(&[1, 2, 3]).map_err(|e| e.to_string())?;
    session.feed(&[4]).map(drop).map_err(|e| e.to_string())
}

#[test]
fn hostile_values_in_a_config_are_errors_or_harmless() {
    use serde_json::json;
    let values = [
        json!(null),
        json!(0),
        json!(1),
        json!(-1),
        json!(3),
        json!(1u64 << 31),
        json!(u64::MAX),
        json!(1e300),
        json!(1e-300),
        json!(0.5),
        json!(true),
        json!("x"),
        json!([]),
        json!({}),
        json!([1, "x"]),
        json!([4_000_000_000u32]),
    ];
    let scalings = ["linear", "dynamic", "yarn", "llama3"].map(|kind| {
        json!({"rope_type": kind, "factor": 2.0, "original_max_position_embeddings": 2, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 1.0})
    });
    for name in ["llama-bitnet-packed", "qwen2-bias"] {
        let folder = golden().join(name);
        let text = std::fs::read_to_string(folder.join("config.json")).unwrap();
        let original: serde_json::Value = serde_json::from_str(&text).unwrap();
        let mut keys: Vec<String> = original.as_object().unwrap().keys().cloned().collect();
        keys.extend(
            ["head_dim", "partial_rotary_factor", "layer_types", "rope_parameters"].map(String::from),
        );
        for key in &keys {
            for value in &values {
                let mut json = original.clone();
                json[key] = value.clone();
                if let Err(error) = try_config(&folder, |_| ModelConfig::from_json(&json)) {
                    let named = error.contains('`') || error.contains("context is full");
                    assert!(named && error.len() < 400, "{key} = {value}: {error}");
                }
            }
        }
        for scaling in &scalings {
            for key in scaling.as_object().unwrap().keys() {
                for value in &values {
                    let mut json = original.clone();
                    json["max_position_embeddings"] = json!(64);
                    json["rope_scaling"] = scaling.clone();
                    json["rope_scaling"][key] = value.clone();
                    let _ = try_config(&folder, |_| ModelConfig::from_json(&json));
                }
            }
        }
    }
}

#[test]
fn hostile_values_in_gguf_keys_are_errors_or_harmless() {
    let values = [
        Value::U32(0),
        Value::U32(1),
        Value::U32(3),
        Value::I32(-1),
        Value::U32(u32::MAX),
        Value::U64(u64::MAX),
        Value::F32(0.0),
        Value::F32(-1.0),
        Value::F32(f32::NAN),
        Value::F32(f32::INFINITY),
        Value::F32(1e-38),
        Value::F32(0.5),
        Value::String("yarn".into()),
        Value::String("linear".into()),
        Value::String(String::new()),
        Value::Array(Array::U32(Vec::new())),
        Value::Array(Array::U32(vec![1, 2])),
        Value::Array(Array::U32(vec![u32::MAX; 2])),
    ];
    for name in ["llama-bf16-gguf", "bitnet-tied-packed-small-gguf"] {
        let mut files = std::fs::read_dir(golden().join(name)).unwrap().map(|f| f.unwrap().path());
        let path = files.find(|f| f.extension().is_some_and(|e| e == "gguf")).unwrap();
        let file = Checkpoint::open(&path).unwrap();
        let metadata = file.gguf_metadata().unwrap();
        let arch = metadata.str("general.architecture").unwrap().unwrap();
        let mut keys: Vec<String> = metadata.iter().map(|(key, _)| key.to_owned()).collect();
        keys.retain(|key| key.starts_with(arch) || key.ends_with("_token_id"));
        let more = [
            "rope.scaling.factor",
            "rope.scaling.type",
            "rope.scaling.attn_factor",
            "rope.scaling.yarn_beta_fast",
            "rope.scaling.original_context_length",
            "attention.key_length",
            "attention.sliding_window",
        ];
        keys.extend(more.map(|key| format!("{arch}.{key}")));
        for scaling in [None, Some("linear"), Some("yarn")] {
            for (key, value) in keys.iter().flat_map(|key| values.iter().map(move |value| (key, value))) {
                let mut changed = metadata.clone();
                if let Some(kind) = scaling {
                    changed.insert(format!("{arch}.rope.scaling.type"), Value::String(kind.into()));
                    changed.insert(format!("{arch}.rope.scaling.factor"), Value::F32(2.0));
                }
                changed.insert(key.clone(), value.clone());
                if let Err(error) = try_config(&path, |file| ModelConfig::from_gguf(file, &changed)) {
                    let named = error.contains('`') || error.contains("context is full");
                    assert!(named && error.len() < 400, "{key} = {value:?}: {error}");
                }
            }
        }
    }
}

#[test]
fn weights_overwritten_with_one_byte_are_an_error_or_run() {
    for name in ["rope-llama-default", "llama-bitnet-packed", "qwen2-bias"] {
        // Floats become NaN, huge, and 0; packed codes what no trit is.
        for byte in [0xff, 0x7f, 0x00] {
            let folder = tempfile::tempdir().unwrap();
            let source = golden().join(name);
            std::fs::copy(source.join("config.json"), folder.path().join("config.json")).unwrap();
            let mut bytes = std::fs::read(source.join("model.safetensors")).unwrap();
            let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            bytes[header..].fill(byte);
            std::fs::write(folder.path().join("model.safetensors"), &bytes).unwrap();
            if let Err(error) = try_config(folder.path(), ModelConfig::of) {
                assert!(name.contains("bitnet") && error.contains("q_proj.weight"), "{name}: {error}");
            }
        }
    }
}
