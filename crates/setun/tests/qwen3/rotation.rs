use std::path::{Path, PathBuf};

use setun::config::ModelConfig;
use setun::engine::{Engine, EngineOptions};
use setun::error::ModelError;
use setun::format::gguf::{Array, GgufWriter, Metadata, Value};
use setun::format::{Checkpoint, Encoding, TensorSpec};
use setun::kv_cache::KvType;
use setun::model::{Model, Role, Source};
use setun::ops::{Direction, Rotate};
use setun_kernels::Kernels;

use super::*;

fn signs(file: &Checkpoint, name: &str) -> Rotate {
    let signs: Vec<f32> = floats(file, name);
    Rotate { block: 0, signs: Some(signs.into()) }
}

#[test]
fn transforms_equal_the_reference_vectors_in_both_directions() {
    let file = Checkpoint::open(golden().join("transform/transform.safetensors")).unwrap();
    for case in 0..4 {
        let block = file.tensor(&format!("{case}.block")).unwrap().data[..8].try_into().unwrap();
        let by =
            Rotate { block: u64::from_le_bytes(block) as usize, ..signs(&file, &format!("{case}.signs")) };
        let width = by.signs.as_ref().unwrap().len();
        for (from, to, direction) in [("x", "forward", Direction::Forward), ("z", "inverse", Direction::Back)]
        {
            let expected = floats(&file, &format!("{case}.{to}"));
            for kernels in Kernels::available() {
                let mut found = floats(&file, &format!("{case}.{from}"));
                for row in found.chunks_exact_mut(width) {
                    by.apply(kernels, row, direction);
                }
                let gap = largest_gap(&found, &expected);
                assert!(gap <= 1e-5, "case {case} {to}, {}: {gap}", kernels.name());
            }
        }
    }
}

#[test]
fn transforms_have_the_bits_of_the_publishers_own_program() {
    let file = Checkpoint::open(golden().join("published-fragments/fragments.safetensors")).unwrap();
    let by = Rotate { block: 1024, ..signs(&file, "signs_5120") };
    for (to, direction) in [("forward_5120", Direction::Forward), ("inverse_5120", Direction::Back)] {
        for kernels in Kernels::available() {
            let mut found = floats(&file, "x_5120");
            by.apply(kernels, &mut found, direction);
            assert_eq!(found, floats(&file, to), "{to}, {}", kernels.name());
        }
    }
}

/// A key without its prefix, and its new value; `None` removes it.
type Change = (&'static str, Option<Value>);

/// A declaration as the converter of the released models writes it, with changes.
fn declaration(changes: &[(&str, Option<Value>)]) -> Result<ModelConfig, ModelError> {
    let file = Checkpoint::open(golden().join("declaration/ok-v1-explicit.gguf")).unwrap();
    let mut changed = Metadata::new();
    for (key, value) in file.gguf_metadata().unwrap().iter() {
        match changes.iter().find(|(name, _)| key.strip_prefix("prism.hadamard.") == Some(*name)) {
            None => drop(changed.insert(key, value.clone())),
            Some((_, Some(new))) => drop(changed.insert(key, new.clone())),
            Some((_, None)) => {}
        }
    }
    for (name, new) in changes {
        if let Some(new) = new {
            changed.insert(format!("prism.hadamard.{name}"), new.clone());
        }
    }
    ModelConfig::from_gguf(&file, &changed)
}

fn text(s: &str) -> Option<Value> {
    Some(Value::String(s.into()))
}

fn number(n: u32) -> Option<Value> {
    Some(Value::U32(n))
}

fn numbers(n: &[i32]) -> Option<Value> {
    Some(Value::Array(Array::I32(n.to_vec())))
}

fn names(names: &[&str]) -> Option<Value> {
    Some(Value::Array(Array::String(names.iter().map(|&name| name.into()).collect())))
}

#[test]
fn a_declaration_in_order_is_accepted_and_reads_back_from_what_is_written() {
    let config = declaration(&[]).unwrap();
    let rotation = config.rotation.as_ref().unwrap();
    assert_eq!((rotation.folded(), rotation.block()), (8, 64));
    let again = config.to_gguf().unwrap();
    let changes: Vec<(&str, Option<Value>)> = again
        .iter()
        .filter_map(|(k, v)| Some((k.strip_prefix("prism.hadamard.")?, Some(v.clone()))))
        .collect();
    assert_eq!(changes.len(), 9);
    assert_eq!(declaration(&changes).unwrap(), config);
    let identity = [("sign_mode", text("identity")), ("sign_widths", None), ("sign_values", None)];
    assert!(declaration(&identity).unwrap().rotation.is_some());
    // Other integer types hold the same numbers; false flags say nothing.
    let wide = [("version", Some(Value::U64(1))), ("tied_output", Some(Value::Bool(false)))];
    assert_eq!(declaration(&wide).unwrap(), config);
}

#[test]
fn every_contradiction_in_a_declaration_is_refused_by_name() {
    let head = "output.weight";
    let ones = |n: usize| numbers(&vec![1; n]);
    let cases: &[(&[Change], &str)] = &[
        (&[("version", None)], "version"),
        (&[("version", number(3))], "version"),
        (&[("version", number(0))], "version"),
        (&[("version", text("1"))], "version"),
        (&[("version", number(2))], "tied_output"),
        (&[("tied_output", Some(Value::Bool(true)))], "tied_output"),
        (&[("tied_output", number(1))], "tied_output"),
        (&[("version", number(2)), ("tied_output", Some(Value::Bool(true)))], head),
        (&[("transform", None)], "transform"),
        (&[("transform", text("dct"))], "transform"),
        (&[("axis", None)], "axis"),
        (&[("axis", text("output-first-dimension"))], "axis"),
        (&[("sign_mode", None)], "sign_mode"),
        (&[("sign_mode", text("random"))], "sign_mode"),
        (&[("sign_mode", text("identity"))], "sign_widths"),
        (&[("block_size", None)], "block_size"),
        (&[("block_size", number(0))], "block_size"),
        (&[("block_size", number(96))], "block_size"),
        (&[("block_size", number(256))], "sign_widths"),
        (&[("block_size", Some(Value::F32(64.0)))], "block_size"),
        (&[("sign_widths", None)], "sign_widths"),
        (&[("sign_widths", numbers(&[]))], "sign_widths"),
        (&[("sign_widths", numbers(&[128, 0])), ("sign_values", ones(128))], "sign_widths"),
        (&[("sign_widths", numbers(&[128, -256])), ("sign_values", ones(384))], "sign_widths"),
        (&[("sign_widths", numbers(&[128, i32::MAX]))], "sign_widths"),
        (&[("sign_widths", numbers(&[128, 128])), ("sign_values", ones(256))], "128 twice"),
        (&[("sign_widths", numbers(&[128])), ("sign_values", ones(128))], "blk.0.ffn_down.weight"),
        (&[("sign_widths", text("128"))], "sign_widths"),
        (&[("sign_widths", names(&["128"]))], "sign_widths"),
        (&[("sign_values", None)], "sign_values"),
        (&[("sign_values", ones(383))], "sign_values"),
        (&[("sign_values", ones(385))], "sign_values"),
        (&[("sign_values", numbers(&[0; 384]))], "sign_values"),
        (&[("sign_values", numbers(&[2; 384]))], "sign_values"),
        (&[("weight_names", None)], "weight_names"),
        (&[("weight_names", names(&[]))], "weight_names"),
        (&[("weight_names", numbers(&[1]))], "weight_names"),
        (&[("weight_names", names(&[head, head]))], "twice"),
        (&[("weight_names", names(&["blk.0.attn_norm.weight"]))], "attn_norm"),
        (&[("weight_names", names(&["blk.0.attn_q.bias"]))], "attn_q.bias"),
        (&[("weight_names", names(&["blk.1.attn_q.weight"]))], "N below 1"),
        (&[("weight_names", names(&["blk.00.attn_q.weight"]))], "blk.00"),
        (&[("weight_names", names(&["blk.0.ssm_out.weight"]))], "ssm_out"),
        (&[("weight_names", names(&[head, "token_embd.weight"]))], "token_embd.weight"),
        (&[("inverse_weight_names", names(&[head]))], "inverse_weight_names"),
        (&[("inverse_weight_names", names(&["token_embd.weight", "token_embd.weight"]))], "twice"),
        (&[("gdn_v_grouped", Some(Value::Bool(true)))], "gdn_v_grouped"),
        (&[("seed", number(1))], "seed"),
    ];
    for (changes, named) in cases {
        let error = declaration(changes).unwrap_err().to_string();
        assert!(error.contains(named) && error.len() < 400, "{changes:?}: {error}");
    }
}

#[test]
fn all_declarations_of_the_full_set_get_their_verdict() {
    let Some(full) = full() else { return };
    let cases = json(&full.join("declaration/cases.json"));
    let expected = Checkpoint::open(full.join("declaration/expected.safetensors")).unwrap();
    let (tokens, greedy) = (ids(&cases["tokens"]), ids(&cases["greedy"]));
    for case in cases["files"].as_array().unwrap() {
        let path = full.join("declaration").join(case["file"].as_str().unwrap());
        let config = Checkpoint::open(&path).and_then(|file| ModelConfig::of(&file));
        match case["verdict"].as_str().unwrap() {
            "accept" => {
                config.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
                accepted(&path, &tokens, &greedy, &floats(&expected, "logits"));
            }
            "refuse" => assert!(config.is_err(), "{}", path.display()),
            other => assert_eq!(other, "accept-or-refuse"),
        }
    }
}

#[test]
fn a_rotated_file_gives_the_references_logits() {
    let folder = golden().join("declaration");
    let expected = Checkpoint::open(folder.join("expected.safetensors")).unwrap();
    let path = folder.join("ok-v1-explicit.gguf");
    accepted(&path, &[3, 77, 150, 9], &[254, 109, 139, 11], &floats(&expected, "logits"));
}

fn accepted(path: &Path, tokens: &[u32], greedy: &[u32], expected: &[f32]) {
    let options = EngineOptions { threads: Some(2), ..EngineOptions::default() };
    let engine = Engine::open(path, &options).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut session = engine.session(KvType::F32, None);
    let gap = largest_gap(session.feed_all(tokens, None).unwrap(), expected);
    assert!(gap <= 2e-3, "{}: logits are {gap} off", path.display());
    let mut session = engine.session(KvType::F32, None);
    session.feed(tokens).unwrap();
    for &want in greedy {
        assert_eq!(argmax(session.logits()), want, "{}", path.display());
        session.feed(&[want]).unwrap();
    }
}

const HIDDEN: usize = 32;
const VOCAB: usize = 24;

/// What a test model of [`write`] has folded.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Fold {
    tied: bool,
    latent: bool,
    explicit: bool,
    /// Leaves k and the gate unfolded beside folded siblings.
    some: bool,
}

/// A float model of two layers, as it is or folded; both compute the same.
fn write(path: &Path, tied: bool, fold: Option<Fold>) {
    let noise = |seed: usize, n: usize, scale: f32| -> Vec<f32> {
        let mut state = (seed as u32).wrapping_mul(2_654_435_761).wrapping_add(7);
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next() * scale).collect()
    };
    // Heads times their width are not the hidden size, and the widths take different signs.
    let (heads, kv_heads, head_dim, ffn) = (4, 2, 16, 48);
    let mut tensors = vec![
        ("token_embd.weight".to_owned(), vec![VOCAB, HIDDEN]),
        ("output_norm.weight".into(), vec![HIDDEN]),
    ];
    if !tied {
        tensors.push(("output.weight".into(), vec![VOCAB, HIDDEN]));
    }
    for layer in 0..2 {
        for (name, shape) in [
            ("attn_norm", vec![HIDDEN]),
            ("attn_q", vec![heads * head_dim, HIDDEN]),
            ("attn_k", vec![kv_heads * head_dim, HIDDEN]),
            ("attn_v", vec![kv_heads * head_dim, HIDDEN]),
            ("attn_q_norm", vec![head_dim]),
            ("attn_k_norm", vec![head_dim]),
            ("attn_output", vec![HIDDEN, heads * head_dim]),
            ("ffn_norm", vec![HIDDEN]),
            ("ffn_gate", vec![ffn, HIDDEN]),
            ("ffn_up", vec![ffn, HIDDEN]),
            ("ffn_down", vec![HIDDEN, ffn]),
        ] {
            tensors.push((format!("blk.{layer}.{name}.weight"), shape));
        }
    }
    let rotation = |width: usize| {
        let explicit = fold.is_some_and(|fold| fold.explicit);
        let signs = noise(width, width, 1.0).into_iter().map(f32::signum).collect();
        Rotate { block: 16, signs: explicit.then_some(signs) }
    };
    let folded = |name: &str| match fold {
        None => false,
        Some(fold) if name == "token_embd.weight" => fold.latent,
        Some(fold) => {
            !name.contains("norm") && !(fold.some && (name.contains("attn_k") || name.contains("ffn_gate")))
        }
    };

    let mut metadata = Metadata::new();
    metadata.insert("general.architecture", Value::String("qwen3".into()));
    for (key, value) in [
        ("context_length", 64),
        ("embedding_length", HIDDEN),
        ("block_count", 2),
        ("feed_forward_length", ffn),
        ("attention.head_count", heads),
        ("attention.head_count_kv", kv_heads),
        ("attention.key_length", head_dim),
    ] {
        metadata.insert(format!("qwen3.{key}"), Value::U32(value as u32));
    }
    metadata.insert("qwen3.attention.layer_norm_rms_epsilon", Value::F32(1e-6));
    metadata.insert("qwen3.rope.freq_base", Value::F32(1e6));
    if let Some(fold) = fold {
        let mut put = |key: &str, value: Value| drop(metadata.insert(format!("prism.hadamard.{key}"), value));
        put("version", Value::U32(if fold.tied && fold.latent { 2 } else { 1 }));
        put("transform", Value::String("normalized-sylvester-walsh-hadamard".into()));
        put("axis", Value::String("input-last-dimension".into()));
        put("block_size", Value::U32(16));
        put("sign_mode", Value::String(if fold.explicit { "explicit" } else { "identity" }.into()));
        if fold.explicit {
            let widths = [HIDDEN, 64, 48];
            let values = widths.iter().flat_map(|&w| rotation(w).signs.unwrap().to_vec());
            put("sign_widths", Value::Array(Array::I32(widths.map(|w| w as i32).to_vec())));
            put("sign_values", Value::Array(Array::I32(values.map(|s| s as i32).collect())));
        }
        let listed = tensors.iter().map(|(name, _)| name.clone());
        let weights = listed.filter(|name| folded(name) && name != "token_embd.weight").collect();
        put("weight_names", Value::Array(Array::String(weights)));
        if fold.latent {
            put("inverse_weight_names", Value::Array(Array::String(vec!["token_embd.weight".into()])));
            put("tied_output", Value::Bool(fold.tied));
        }
    }
    let spec = |(name, shape): &(String, Vec<usize>)| TensorSpec {
        name: name.clone(),
        shape: shape.clone(),
        encoding: Encoding::F32,
    };
    let mut writer = GgufWriter::create(path, &metadata, tensors.iter().map(spec).collect()).unwrap();
    while let Some(spec) = writer.pending().cloned() {
        let at = tensors.iter().position(|(name, _)| *name == spec.name).unwrap();
        let width = *spec.shape.last().unwrap();
        let mut values =
            noise(at + 1, spec.shape.iter().product(), if spec.shape.len() == 1 { 0.3 } else { 0.25 });
        if spec.shape.len() == 1 {
            values.iter_mut().for_each(|v| *v += 1.0);
        }
        if folded(&spec.name) {
            // A row of W · diag(s) · H is H (s ⊙ row), and so is what a lookup turns back.
            for row in values.chunks_exact_mut(width) {
                rotation(width).apply(Kernels::best(), row, Direction::Forward);
            }
        }
        writer.tensor(&values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>()).unwrap();
    }
    writer.finish().unwrap();
}

fn logits(path: &PathBuf) -> Vec<f32> {
    let options = EngineOptions { threads: Some(2), ..EngineOptions::default() };
    let engine = Engine::open(path, &options).unwrap();
    let mut session = engine.session(KvType::F32, None);
    session.feed_all(&[1, 23, 7, 7, 0, 12, 5], None).unwrap().to_vec()
}

#[test]
fn a_folded_model_computes_what_the_plain_one_does() {
    let folder = tempfile::tempdir().unwrap();
    for tied in [false, true] {
        let plain = folder.path().join("plain.gguf");
        write(&plain, tied, None);
        let expected = logits(&plain);
        assert!(expected.iter().any(|x| x.abs() > 0.5));
        for latent in [false, true] {
            for explicit in [false, true] {
                for some in [false, true] {
                    let fold = Fold { tied, latent, explicit, some };
                    let path = folder.path().join("folded.gguf");
                    write(&path, tied, Some(fold));
                    let gap = largest_gap(&logits(&path), &expected);
                    assert!(gap < 1e-3, "{fold:?}: {gap}");
                }
            }
        }
        // Without the declaration the same weights are another model: what is tested is not the identity.
        let path = folder.path().join("folded.gguf");
        let file = Checkpoint::open(&path).unwrap();
        let meta = file.gguf_metadata().unwrap();
        let mut undeclared = Metadata::new();
        for (key, value) in meta.iter().filter(|(key, _)| !key.starts_with("prism.")) {
            undeclared.insert(key, value.clone());
        }
        let config = ModelConfig::from_gguf(&file, &undeclared).unwrap();
        let engine = Engine::load(&file, config, &EngineOptions::default()).unwrap();
        let mut session = engine.session(KvType::F32, None);
        let found = session.feed_all(&[1, 23, 7, 7, 0, 12, 5], None).unwrap();
        assert!(largest_gap(found, &expected) > 0.1);
    }
}

#[test]
fn rotated_models_convert_to_gguf_with_their_declaration_and_to_nothing_else() {
    use setun::convert::{ConvertOptions, Target, convert};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("folded.gguf");
    write(&path, true, Some(Fold { tied: true, latent: true, explicit: true, some: false }));
    let file = Checkpoint::open(&path).unwrap();
    let options = ConvertOptions { verify: true, without_tokenizer: true, ..ConvertOptions::default() };
    let output = folder.path().join("again.gguf");
    convert(&file, &output, &options, &mut |_| {}).unwrap();
    assert_eq!(logits(&output), logits(&path));
    let options = ConvertOptions { target: Target::HuggingFace, ..options };
    let error = convert(&file, &folder.path().join("hf"), &options, &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("rotation"), "{error}");
}

#[test]
fn sizes_that_contradict_the_signs_are_an_error_wherever_the_model_is_built() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("folded.gguf");
    write(&path, false, Some(Fold { tied: false, latent: true, explicit: true, some: false }));
    let file = Checkpoint::open(&path).unwrap();
    for (key, value) in [("embedding_length", 16), ("embedding_length", 40), ("feed_forward_length", 40)] {
        let mut changed = file.gguf_metadata().unwrap().clone();
        changed.insert(format!("qwen3.{key}"), Value::U32(value));
        let config = ModelConfig::from_gguf(&file, &changed).unwrap();
        assert!(Engine::load(&file, config.clone(), &EngineOptions::default()).is_err(), "{key} {value}");
        // A source that has every tensor in any shape.
        assert!(Model::build(config, &mut Anything).is_err(), "{key} {value}");
    }
}

struct Anything;

impl Source for Anything {
    type Matrix = ();
    type Vector = ();

    fn matrix(&mut self, _: &str, _: usize, _: usize, _: Role) -> Result<(), ModelError> {
        Ok(())
    }

    fn vector(&mut self, _: &str, _: usize) -> Result<(), ModelError> {
        Ok(())
    }
}

#[test]
fn an_architecture_that_does_not_rotate_refuses_rotated_weights() {
    let path = golden().join("../models/bitnet-tied-packed-small-gguf/bitnet-tied-packed-small-i2_s.gguf");
    let file = Checkpoint::open(path).unwrap();
    let mut changed = file.gguf_metadata().unwrap().clone();
    changed.insert("prism.hadamard.version", Value::U32(1));
    let error = ModelConfig::from_gguf(&file, &changed).unwrap_err().to_string();
    assert!(error.contains("rotated weights"), "{error}");
}

#[test]
fn a_checkpoint_beside_a_packing_that_says_it_is_rotated_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let source = golden().join("../models/rope-llama-default");
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(source.join(name), folder.path().join(name)).unwrap();
    }
    assert!(ModelConfig::of(&Checkpoint::open(folder.path()).unwrap()).is_ok());
    std::fs::write(folder.path().join("hadamard_packing.json"), "{}").unwrap();
    let error = ModelConfig::of(&Checkpoint::open(folder.path()).unwrap()).unwrap_err().to_string();
    assert!(error.contains("hadamard_packing.json") && error.contains("rotated"), "{error}");
}
