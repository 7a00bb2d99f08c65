//! Qwen3-MoE against values that `transformers` computed (golden/qwen3-moe), in every layout that files keep experts in.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Value as Json, json};
use setun::config::{ActivationType, Family, ModelConfig};
use setun::convert::{ConvertOptions, ConvertReport, Target, convert};
use setun::cpu::{CpuOps, CpuSource, Part, Workspace};
use setun::engine::{Engine, EngineOptions};
use setun::format::gguf::{GgufWriter, Metadata, Value};
use setun::format::{Checkpoint, Encoding, SafetensorsWriter, TensorSpec};
use setun::inspect::survey;
use setun::kv_cache::{KvCache, KvType};
use setun::model::Model;
use setun::ops::Tap;
use setun::weights::Weights;
use setun_kernels::Kernels;
use setun_kernels::threads::Pool;

fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/qwen3-moe").join(path)
}

fn ternary() -> PathBuf {
    golden("ternary/model-q2_0-g128.gguf")
}

fn json(path: &Path) -> Json {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn ids(list: &Json) -> Vec<u32> {
    list.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn engine(path: &Path) -> Engine {
    Engine::open(path, &EngineOptions { threads: Some(2), ..EngineOptions::default() })
        .unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn refusal(path: &Path) -> String {
    Engine::open(path, &EngineOptions { threads: Some(1), ..EngineOptions::default() })
        .err()
        .unwrap_or_else(|| panic!("{} loads", path.display()))
        .to_string()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Logits of a fixed text, as the model defines its numerics.
fn logits(path: &Path) -> Vec<u32> {
    let engine = engine(path);
    let tokens: Vec<u32> = (0..30).map(|i| 3 + 7 * i % 60).collect();
    bits(engine.session(KvType::F32, None).feed_all(&tokens, None).unwrap())
}

fn largest_gap(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    // A NaN is the largest gap there is.
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, |m, gap| if gap <= m { m } else { gap })
}

fn argmax(row: &[f32]) -> u32 {
    row.iter().enumerate().fold(0, |best, (i, &x)| if x > row[best] { i } else { best }) as u32
}

/// Logits, hidden states and greedy ids against `expected.*` in `folder`.
fn check(model: &Path, folder: &str) {
    let (engine, name) = (engine(model), model.display());
    assert_eq!((engine.config().family, engine.activations()), (Family::Qwen3Moe, ActivationType::Float));
    let values = Checkpoint::open(golden(folder).join("expected.safetensors")).unwrap();
    let floats = |key: &str| values.tensor(key).unwrap().to_f32().unwrap();
    let facts = json(&golden(folder).join("expected.json"));
    for (i, sequence) in facts["sequences"].as_array().unwrap().iter().enumerate() {
        let tokens = ids(&sequence["tokens"]);
        let mut taps = Vec::new();
        let mut session = engine.session(KvType::F32, None);
        let gap =
            largest_gap(session.feed_all(&tokens, Some(&mut taps)).unwrap(), &floats(&format!("logits.{i}")));
        assert!(gap <= 2e-3, "{name}, sequence {i}: logits are {gap} off");
        if i == 0 {
            let found: Vec<f32> =
                taps[..taps.len() - 2].iter().flat_map(|(_, x)| x.iter().copied()).collect();
            let gap = largest_gap(&found, &floats("hidden.0"));
            assert!(gap <= 2e-3, "{name}: hidden states are {gap} off");
        }
        let mut session = engine.session(KvType::F32, None);
        session.feed(&tokens).unwrap();
        for want in ids(&sequence["greedy"]) {
            assert_eq!(argmax(session.logits()), want, "{name}, sequence {i}");
            session.feed(&[want]).unwrap();
        }
    }
}

#[test]
fn logits_hidden_states_and_greedy_ids_equal_the_references() {
    check(&golden("float"), "float");
    check(&ternary(), "ternary");
}

#[test]
fn logits_have_the_same_bits_on_every_kernel_thread_count_and_prefill_chunking() {
    let tokens = ids(&json(&golden("ternary/expected.json"))["sequences"][0]["tokens"]);
    for (path, activations) in [
        (golden("float"), ActivationType::Float),
        (ternary(), ActivationType::Float),
        (ternary(), ActivationType::Int8),
    ] {
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
                let tokens: Vec<u32> =
                    tokens.iter().map(|id| id % engine.config().vocab_size as u32).collect();
                for batch in [1, 5, 512] {
                    let mut session = engine.session(KvType::F32, None);
                    let found = bits(session.feed_in_batches(&tokens, batch).unwrap());
                    let first = first.get_or_insert_with(|| found.clone());
                    assert!(found == *first, "{activations}, {}, {threads}, {batch}", kernels.name());
                }
            }
        }
    }
}

#[test]
fn a_sequence_gets_the_same_bits_alone_and_in_company() {
    let file = Checkpoint::open(ternary()).unwrap();
    let config = ModelConfig::of(&file).unwrap();
    let (kernels, pool) = (Kernels::best(), Pool::new(2));
    for activations in [ActivationType::Float, ActivationType::Int8] {
        let mut source = CpuSource::new(Weights::new(&file, &config), kernels, &pool, activations);
        let model = Model::build(config.clone(), &mut source).unwrap();
        let run = |sequences: &[&[u32]]| {
            let mut caches: Vec<KvCache> =
                sequences.iter().map(|_| KvCache::new(&config, KvType::F32, 64)).collect();
            let lengths = sequences.iter().map(|s| s.len());
            let mut parts: Vec<Part> = caches
                .iter_mut()
                .zip(lengths)
                .map(|(cache, n)| Part { cache, tokens: n, length: n })
                .collect();
            let (mut work, mut taps) = (Workspace::new(&config, activations), Vec::new());
            let mut ops = CpuOps::new(kernels, &pool, &mut work, &mut parts, Some(&mut taps));
            model.hidden(&mut ops, &sequences.concat());
            ops.finish();
            let (_, last) = taps.into_iter().find(|(tap, _)| *tap == Tap::FinalNorm).unwrap();
            bits(&last)
        };
        let (a, b): (Vec<u32>, Vec<u32>) = ((5..25).collect(), (30..43).collect());
        assert_eq!(run(&[&a, &b]), [run(&[&a]), run(&[&b])].concat(), "{activations}");
        assert_eq!(run(&[&b, &a, &b]), [run(&[&b]), run(&[&a]), run(&[&b])].concat(), "{activations}");
    }
}

#[test]
fn a_token_reads_only_the_experts_it_goes_through() {
    let engine = engine(&ternary());
    let c = engine.config();
    // 2 bits and an f32 scale for 128 weights; the router in f32, the head in f16.
    let linear = |weights: usize| weights / 4 + weights / 128 * 4;
    let experts = 3 * 128 * 128 * c.num_layers;
    let rest = linear(c.block_weights() - 4 * experts) + c.num_layers * 4 * 128 * 4 + 96 * 128 * 2;
    assert_eq!(engine.bytes_per_token(), linear(2 * experts) + rest);
    assert_eq!(engine.bytes_per_pass(512), linear(4 * experts) + rest);
    assert_eq!(c.parameters() - c.active_parameters(), 2 * experts);
}

/// The tensors of a model as they are stored, to be changed and written again.
type Tensors = BTreeMap<String, (Vec<usize>, Encoding, Vec<u8>)>;

fn tensors(path: &Path) -> Tensors {
    let file = Checkpoint::open(path).unwrap();
    let of = |name: &str| {
        let tensor = file.tensor(name).unwrap();
        (tensor.shape().to_vec(), tensor.info.encoding.clone(), tensor.data.to_vec())
    };
    file.tensors().map(|t| (t.name.clone(), of(&t.name))).collect()
}

fn specs(tensors: &Tensors) -> Vec<TensorSpec> {
    let spec = |(name, (shape, encoding, _)): (&String, &(Vec<usize>, Encoding, Vec<u8>))| TensorSpec {
        name: name.clone(),
        shape: shape.clone(),
        encoding: encoding.clone(),
    };
    tensors.iter().map(spec).collect()
}

fn write_folder(folder: &Path, config: &Json, tensors: &Tensors) {
    std::fs::create_dir_all(folder).unwrap();
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let mut writer =
        SafetensorsWriter::create(&folder.join("model.safetensors"), &[], specs(tensors)).unwrap();
    while let Some(name) = writer.pending().map(|spec| spec.name.clone()) {
        writer.tensor(&tensors[&name].2).unwrap();
    }
    writer.finish().unwrap();
}

fn write_gguf(path: &Path, keys: &[(&str, Option<Value>)], tensors: &Tensors) {
    let file = Checkpoint::open(ternary()).unwrap();
    let mut metadata = Metadata::new();
    for (key, value) in file.gguf_metadata().unwrap().iter() {
        let changed = keys.iter().find(|(name, _)| *name == key);
        if let Some(value) = changed.map_or(Some(value.clone()), |(_, value)| value.clone()) {
            metadata.insert(key, value);
        }
    }
    for (key, value) in keys {
        if let (None, Some(value)) = (metadata.get(key), value) {
            metadata.insert(*key, value.clone());
        }
    }
    let mut writer = GgufWriter::create(path, &metadata, specs(tensors)).unwrap();
    while let Some(name) = writer.pending().map(|spec| spec.name.clone()) {
        writer.tensor(&tensors[&name].2).unwrap();
    }
    writer.finish().unwrap();
}

/// The float model's configuration with these fields; `null` takes one away.
fn float_config(changes: Json) -> Json {
    let mut config = json(&golden("float/config.json"));
    for (key, value) in changes.as_object().unwrap() {
        match value {
            Json::Null => config.as_object_mut().unwrap().remove(key),
            value => config.as_object_mut().unwrap().insert(key.clone(), value.clone()),
        };
    }
    config
}

/// The float model without its dense layer, renormalising: what GGUF can say.
fn uniform() -> (Json, Tensors) {
    let layers = tensors(&golden("float"));
    let renamed = |name: &str| match name.strip_prefix("model.layers.2.") {
        Some(rest) => format!("model.layers.1.{rest}"),
        None => name.to_owned(),
    };
    let kept = layers.into_iter().filter(|(name, _)| !name.starts_with("model.layers.1."));
    let config = json!({"num_hidden_layers": 2, "mlp_only_layers": [], "norm_topk_prob": true});
    (float_config(config), kept.map(|(name, tensor)| (renamed(&name), tensor)).collect())
}

fn run(input: &Path, output: &Path, options: ConvertOptions) -> Result<ConvertReport, String> {
    let file = Checkpoint::open(input).unwrap();
    let options = ConvertOptions { verify: true, without_tokenizer: true, ..options };
    convert(&file, output, &options, &mut |_| {}).map_err(|e| e.to_string())
}

fn to_hf() -> ConvertOptions<'static> {
    ConvertOptions { target: Target::HuggingFace, ..ConvertOptions::default() }
}

#[test]
fn experts_are_stacked_for_gguf_and_come_apart_again_unchanged() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (config, tensors_in) = uniform();
    write_folder(&at("in"), &config, &tensors_in);
    run(&at("in"), &at("a.gguf"), ConvertOptions::default()).unwrap();
    let stacked = Checkpoint::open(at("a.gguf")).unwrap();
    let stack = stacked.info("blk.1.ffn_gate_exps.weight").unwrap();
    assert_eq!((stack.shape.clone(), stack.encoding.clone()), (vec![6, 20, 32], Encoding::BF16));
    let router = stacked.info("blk.0.ffn_gate_inp.weight").unwrap();
    assert_eq!((router.shape.clone(), router.encoding.clone()), (vec![6, 32], Encoding::F32));
    run(&at("a.gguf"), &at("out"), to_hf()).unwrap();
    let out = Checkpoint::open(at("out")).unwrap();
    let before = Checkpoint::open(at("in")).unwrap();
    assert_eq!(out.tensors().len(), before.tensors().len());
    for info in before.tensors() {
        let (a, b) = (before.tensor(&info.name).unwrap(), out.tensor(&info.name).unwrap());
        assert_eq!((a.shape(), a.to_f32().unwrap()), (b.shape(), b.to_f32().unwrap()), "{}", info.name);
        if info.name.contains("experts") {
            assert_eq!((&a.info.encoding, &a.data), (&b.info.encoding, &b.data), "{}", info.name);
        }
    }
    assert_eq!(logits(&at("in")), logits(&at("a.gguf")));
    assert_eq!(logits(&at("in")), logits(&at("out")));
    // From GGUF to GGUF stacks go along as they are.
    run(&at("a.gguf"), &at("same.gguf"), ConvertOptions::default()).unwrap();
    assert_eq!(tensors(&at("same.gguf")), tensors(&at("a.gguf")));
    // A second way through changes nothing.
    run(&at("out"), &at("b.gguf"), ConvertOptions::default()).unwrap();
    assert_eq!(
        tensors(&at("a.gguf"))["blk.0.ffn_down_exps.weight"],
        tensors(&at("b.gguf"))["blk.0.ffn_down_exps.weight"]
    );
}

#[test]
fn experts_of_several_float_types_are_stacked_in_the_one_that_holds_them_all() {
    let folder = tempfile::tempdir().unwrap();
    let (config, mut tensors) = uniform();
    let name = "model.layers.0.mlp.experts.2.up_proj.weight";
    let (_, encoding, bytes) = tensors.get_mut(name).unwrap();
    *bytes = bytes.chunks(2).flat_map(|b| [0, 0, b[0], b[1]]).collect();
    *encoding = Encoding::F32;
    write_folder(&folder.path().join("in"), &config, &tensors);
    let file = folder.path().join("a.gguf");
    run(&folder.path().join("in"), &file, ConvertOptions::default()).unwrap();
    let file = Checkpoint::open(&file).unwrap();
    assert_eq!(file.info("blk.0.ffn_up_exps.weight").unwrap().encoding, Encoding::F32);
    assert_eq!(file.info("blk.1.ffn_up_exps.weight").unwrap().encoding, Encoding::BF16);
    assert_eq!(logits(&folder.path().join("in")), logits(file.path()));
}

#[test]
fn what_gguf_cannot_say_of_experts_is_refused_and_a_folder_keeps_it() {
    let folder = tempfile::tempdir().unwrap();
    let error = run(&golden("float"), &folder.path().join("a.gguf"), ConvertOptions::default()).unwrap_err();
    assert!(error.contains("`norm_topk_prob`") && error.contains("--to hf"), "{error}");
    let out = folder.path().join("out");
    run(&golden("float"), &out, to_hf()).unwrap();
    check(&out, "float");
}

#[test]
fn stacks_of_ternary_experts_go_into_other_types_exactly() {
    let folder = tempfile::tempdir().unwrap();
    for linear_type in [
        None,
        Some(Encoding::Q2_0G64),
        Some(Encoding::PQ2_0),
        Some(Encoding::PTQ1_0),
        Some(Encoding::F16),
        Some(Encoding::F32),
    ] {
        let out = folder.path().join(format!("{linear_type:?}.gguf"));
        run(
            &ternary(),
            &out,
            ConvertOptions { linear_type: linear_type.clone(), ..ConvertOptions::default() },
        )
        .unwrap_or_else(|e| panic!("{linear_type:?}: {e}"));
        let stack = Checkpoint::open(&out).unwrap().info("blk.1.ffn_down_exps.weight").unwrap().clone();
        assert_eq!(stack.shape, [4, 128, 128]);
        assert_eq!(stack.encoding, linear_type.unwrap_or(Encoding::Q2_0G128));
        check(&out, "ternary");
        assert_eq!(logits(&out), logits(&ternary()));
    }
    // A folder has float copies, one expert by one; they are recognised, and go into stacks again.
    let (copies, again) = (folder.path().join("copies"), folder.path().join("again.gguf"));
    run(&ternary(), &copies, to_hf()).unwrap();
    check(&copies, "ternary");
    assert_eq!(logits(&copies), logits(&ternary()));
    run(&copies, &again, ConvertOptions::default()).unwrap();
    let stack = Checkpoint::open(&again).unwrap().info("blk.1.ffn_down_exps.weight").unwrap().clone();
    assert_eq!((stack.shape, stack.encoding), (vec![4, 128, 128], Encoding::Q2_0G64));
    assert_eq!(logits(&again), logits(&ternary()));
    let out = folder.path().join("no");
    let i2_s = ConvertOptions { linear_type: Some(Encoding::I2S), ..ConvertOptions::default() };
    let error = run(&ternary(), &out, i2_s).unwrap_err();
    assert!(error.contains("experts.0.gate_proj") && error.contains("a stack of experts"), "{error}");
    assert!(!out.exists());
}

#[test]
fn fused_experts_of_newer_folders_are_the_same_model() {
    let mut fused = tensors(&golden("float"));
    for layer in ["model.layers.0.mlp", "model.layers.2.mlp"] {
        let mut take = |e: usize, kind: &str| {
            fused.remove(&format!("{layer}.experts.{e}.{kind}_proj.weight")).unwrap().2
        };
        let gate_up = (0..6).flat_map(|e| [take(e, "gate"), take(e, "up")].concat()).collect::<Vec<u8>>();
        let down = (0..6).flat_map(|e| take(e, "down")).collect::<Vec<u8>>();
        fused.insert(format!("{layer}.experts.gate_up_proj"), (vec![6, 40, 32], Encoding::BF16, gate_up));
        fused.insert(format!("{layer}.experts.down_proj"), (vec![6, 32, 20], Encoding::BF16, down));
    }
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let config = float_config(json!({"num_experts": null, "num_local_experts": 6}));
    write_folder(&at("fused"), &config, &fused);
    assert_eq!(logits(&at("fused")), logits(&golden("float")));
    run(&at("fused"), &at("apart"), to_hf()).unwrap();
    assert_eq!(tensors(&at("apart")), tensors(&golden("float")));
    // The other way round it is another family's, or nobody's.
    let name = "model.layers.0.mlp.experts.gate_up_proj";
    fused.get_mut(name).unwrap().0 = vec![6, 32, 40];
    write_folder(&at("turned"), &config, &fused);
    let error = refusal(&at("turned"));
    assert!(error.contains(name) && error.contains("[6, 40, 32]"), "{error}");
    // And which layers are ternary would be a guess.
    let quantized = float_config(json!({"quantization_config": {"quant_method": "bitnet",
        "linear_class": "autobitlinear", "quantization_mode": "online"}}));
    fused.get_mut(name).unwrap().0 = vec![6, 40, 32];
    write_folder(&at("quantized"), &quantized, &fused);
    let error = refusal(&at("quantized"));
    assert!(error.contains(name) && error.contains("one by one"), "{error}");
}

#[test]
fn int8_mixtures_pack_into_a_folder_and_have_no_gguf() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let config = float_config(json!({"quantization_config": {"quant_method": "bitnet",
        "linear_class": "autobitlinear", "quantization_mode": "online"}}));
    write_folder(&at("masters"), &config, &tensors(&golden("float")));
    let model = engine(&at("masters"));
    assert_eq!(model.activations(), ActivationType::Int8);
    run(&at("masters"), &at("packed"), to_hf()).unwrap();
    let packed = Checkpoint::open(at("packed")).unwrap();
    let kind =
        |name: &str| packed.info(&format!("model.layers.0.mlp.{name}.weight")).unwrap().encoding.clone();
    assert_eq!((kind("experts.5.down_proj"), kind("gate")), (Encoding::U8, Encoding::BF16));
    let listed = &packed.config_json().unwrap().unwrap()["quantization_config"]["modules_to_not_convert"];
    assert_eq!(*listed, json!(["lm_head", "mlp.gate"]));
    assert_eq!(logits(&at("packed")), logits(&at("masters")));
    let uniform = float_config(json!({"quantization_config": config["quantization_config"],
        "num_hidden_layers": 2, "mlp_only_layers": [], "norm_topk_prob": true}));
    write_folder(&at("uniform"), &uniform, &self::uniform().1);
    let error = run(&at("uniform"), &at("a.gguf"), ConvertOptions::default()).unwrap_err();
    assert!(error.contains("self_attn") || error.contains("a stack of experts"), "{error}");
}

#[test]
fn a_survey_counts_every_byte_once_and_finds_nothing_unused() {
    for path in [ternary(), golden("float")] {
        let file = Checkpoint::open(&path).unwrap();
        let found = survey(&file, Some(&ModelConfig::of(&file).unwrap()), &|_| {}).unwrap();
        let total: usize = file.tensors().map(|t| t.stored_bytes()).sum();
        assert_eq!(found.bytes.values().sum::<usize>(), total);
        assert!(found.unused.is_empty() && found.not_finite.is_empty());
        let vectors: usize = file.tensors().filter(|t| t.shape.len() == 1).map(|t| t.stored_bytes()).sum();
        assert_eq!(found.packing.values().map(|group| group.bytes).sum::<usize>(), total - vectors);
    }
    let file = Checkpoint::open(ternary()).unwrap();
    let config = ModelConfig::of(&file).unwrap();
    let group = survey(&file, Some(&config), &|_| {}).unwrap().packing["Q2_0_g128"].clone();
    assert_eq!((group.elements, group.tensors), (config.block_weights(), 2 * (4 + 4 * 3)));
    assert_eq!(group.bytes, config.block_weights() / 128 * 34);
}

#[test]
fn damaged_folders_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |config: Json, change: &dyn Fn(&mut Tensors)| {
        let mut tensors = tensors(&golden("float"));
        change(&mut tensors);
        write_folder(&folder.path().join("m"), &float_config(config), &tensors);
        refusal(&folder.path().join("m"))
    };
    let expert = "model.layers.2.mlp.experts.3.up_proj.weight";
    let error = refused(json!({}), &|t| drop(t.remove(expert)));
    assert!(error.contains(&format!("`{expert}` is missing")), "{error}");
    let router = "model.layers.0.mlp.gate.weight";
    let error = refused(json!({}), &|t| {
        let (shape, _, bytes) = t.get_mut(router).unwrap();
        shape[0] = 5;
        bytes.truncate(5 * 64);
    });
    assert!(error.contains(router) && error.contains("[5, 32]"), "{error}");
    let error = refused(json!({}), &|t| {
        let (shape, ..) = t.get_mut(expert).unwrap();
        shape.reverse();
    });
    assert!(error.contains(expert) && error.contains("[32, 20]"), "{error}");
    // Fewer experts than there are: which ones is nobody's guess.
    let error = refused(json!({"num_experts": 5}), &|_| ());
    assert!(error.contains("experts.5") && error.contains("belongs to no part"), "{error}");
    let error = refused(json!({"num_experts": 7}), &|_| ());
    assert!(error.contains(router) || error.contains("experts.6"), "{error}");
    for (field, value) in
        [("num_experts_per_tok", json!(7)), ("num_experts", json!(0)), ("num_experts", json!(1e9))]
    {
        let error = refused(json!({field: value}), &|_| ());
        assert!(error.contains(&format!("`{field}`")), "{error}");
    }
    // A layer that the configuration calls dense, but that has experts, and the reverse.
    let error = refused(json!({"mlp_only_layers": [1, 2]}), &|_| ());
    assert!(error.contains("model.layers.2.mlp."), "{error}");
    let error = refused(json!({"mlp_only_layers": []}), &|_| ());
    assert!(error.contains("model.layers.1.mlp."), "{error}");
}

#[test]
fn damaged_gguf_files_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let refused = |keys: &[(&str, Option<Value>)], change: &dyn Fn(&mut Tensors)| {
        let mut tensors = tensors(&ternary());
        change(&mut tensors);
        write_gguf(&path, keys, &tensors);
        refusal(&path)
    };
    for (key, value) in [
        ("expert_count", Some(Value::U32(0))),
        ("expert_count", Some(Value::U32(u32::MAX))),
        ("expert_count", None),
        ("expert_used_count", Some(Value::U32(5))),
        ("expert_used_count", None),
        ("expert_feed_forward_length", None),
        ("expert_shared_count", Some(Value::U32(1))),
        ("expert_gating_func", Some(Value::U32(2))),
        ("expert_group_count", Some(Value::U32(4))),
        ("leading_dense_block_count", Some(Value::U32(1))),
        ("expert_weights_scale", Some(Value::F32(2.5))),
    ] {
        let error = refused(&[(&format!("qwen3moe.{key}"), value)], &|_| ());
        let fields = ["num_experts`", "num_experts_per_tok`", &format!("qwen3moe.{key}`")];
        assert!(fields.iter().any(|field| error.contains(field)), "{key}: {error}");
    }
    let stack = "blk.1.ffn_up_exps.weight";
    let error = refused(&[], &|t| drop(t.remove(stack)));
    assert!(error.contains(&format!("`{stack}` is missing")), "{error}");
    let error = refused(&[], &|t| {
        let (shape, _, bytes) = t.get_mut(stack).unwrap();
        shape[0] = 3;
        bytes.truncate(bytes.len() / 4 * 3);
    });
    assert!(error.contains(stack) && error.contains("[3, 128, 128]"), "{error}");
    let router = "blk.0.ffn_gate_inp.weight";
    let error = refused(&[], &|t| t.get_mut(router).unwrap().0.reverse());
    assert!(error.contains(router) && error.contains("[128, 4]"), "{error}");
    // A fourth code in one expert, and another type that has one scale for all of them.
    let error = refused(&[], &|t| t.get_mut(stack).unwrap().2[2 * 128 * 34 + 5] = 0xff);
    assert!(error.contains(&format!("{stack}[2]")) && error.contains("two-bit code 3"), "{error}");
    let error = refused(&[], &|t| {
        let (_, encoding, bytes) = t.get_mut(stack).unwrap();
        *encoding = Encoding::I2S;
        *bytes = [vec![0x55; 4 * 128 * 128 / 4], 1f32.to_le_bytes().to_vec(), vec![0; 28]].concat();
    });
    assert!(error.contains(stack) && error.contains("I2_S") && error.contains("one scale"), "{error}");
}
