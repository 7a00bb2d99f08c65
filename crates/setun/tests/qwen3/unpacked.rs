//! Ternary weights kept as floats and in MLX's two bits: the same model as the GGUF file, to the bit.

use std::path::Path;

use setun::config::{ActivationType, ModelConfig, Numerics, Storage, Ternary};
use setun::convert::{ConvertOptions, Target, convert};
use setun::engine::{Engine, EngineOptions};
use setun::format::{Checkpoint, Encoding, FloatWeights, OpenOptions, SafetensorsWriter, TensorSpec};
use setun::inspect::survey;
use setun::kv_cache::KvType;

use super::*;

/// What a folder's tensors are changed to: `None` leaves them as they are.
type Change<'a> = &'a dyn Fn(&str, &mut Vec<f32>);

/// The tied model as a folder of floats, from its GGUF file.
fn float_folder(folder: &Path, encoding: Encoding, change: Change) {
    let file = Checkpoint::open(golden().join("qwen3-tied/model-tq1_0.gguf")).unwrap();
    std::fs::copy(golden().join("qwen3-tied/config.json"), folder.join("config.json")).unwrap();
    let names: Vec<(String, String)> =
        file.tensors().map(|t| (t.name.clone(), huggingface_name(&t.name))).collect();
    let spec = |(stored, name): &(String, String)| TensorSpec {
        name: name.clone(),
        shape: file.info(stored).unwrap().shape.clone(),
        encoding: encoding.clone(),
    };
    let specs = names.iter().map(spec).collect();
    let mut writer = SafetensorsWriter::create(&folder.join("model.safetensors"), &[], specs).unwrap();
    for (stored, name) in &names {
        let mut values = floats(&file, stored);
        change(name, &mut values);
        let bytes: Vec<u8> = match encoding {
            // Scales are bf16-exact in this model, so cutting is exact.
            Encoding::BF16 => values.iter().flat_map(|v| v.to_le_bytes()[2..].to_vec()).collect(),
            _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        };
        writer.tensor(&bytes).unwrap();
    }
    writer.finish().unwrap();
}

fn huggingface_name(gguf: &str) -> String {
    let parts = [
        ("token_embd", "model.embed_tokens"),
        ("output_norm", "model.norm"),
        ("blk.", "model.layers."),
        ("attn_q_norm", "self_attn.q_norm"),
        ("attn_k_norm", "self_attn.k_norm"),
        ("attn_norm", "input_layernorm"),
        ("ffn_norm", "post_attention_layernorm"),
        ("attn_output", "self_attn.o_proj"),
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("ffn_", "mlp."),
    ];
    let mut name = gguf.to_owned();
    for (from, to) in parts {
        name = name.replace(from, to);
    }
    for part in ["gate", "up", "down"] {
        name = name.replace(&format!("mlp.{part}."), &format!("mlp.{part}_proj."));
    }
    name
}

fn logits(file: &Checkpoint) -> Vec<u32> {
    let options = EngineOptions { threads: Some(2), ..EngineOptions::default() };
    let engine = Engine::load(file, ModelConfig::of(file).unwrap(), &options).unwrap();
    let facts = json(&golden().join("qwen3-tied/expected.json"));
    let mut session = engine.session(KvType::F32, None);
    let logits = session.feed_all(&ids(&facts["sequences"][0]["tokens"]), None).unwrap();
    logits.iter().map(|v| v.to_bits()).collect()
}

fn storage(file: &Checkpoint) -> Option<Storage> {
    match ModelConfig::of(file).unwrap().numerics {
        Numerics::Ternary(Ternary { storage, activations: ActivationType::Float, .. }) => Some(storage),
        Numerics::Float => None,
        other => panic!("{other:?}"),
    }
}

#[test]
fn float_copies_in_gguf_are_floats_unless_the_caller_insists_and_convert_either_way() {
    let folder = tempfile::tempdir().unwrap();
    let twin = Checkpoint::open(golden().join("qwen3-tied/model-tq1_0.gguf")).unwrap();
    let options = |linear_type: Option<Encoding>| ConvertOptions {
        embedding_type: linear_type.clone(),
        linear_type,
        verify: true,
        without_tokenizer: true,
        ..Default::default()
    };
    let copies = folder.path().join("copies.gguf");
    convert(&twin, &copies, &options(Some(Encoding::F16)), &mut |_| {}).unwrap();
    let plain = Checkpoint::open(&copies).unwrap();
    assert_eq!(storage(&plain), None);
    let to_folder = ConvertOptions { target: Target::HuggingFace, ..options(None) };
    convert(&plain, &folder.path().join("hf"), &to_folder, &mut |_| {}).unwrap();
    let insist = OpenOptions { weights: FloatWeights::Ternary, ..OpenOptions::default() };
    let insisted = Checkpoint::open_with(&copies, insist).unwrap();
    assert_eq!((storage(&insisted), logits(&insisted)), (Some(Storage::FloatCopies), logits(&twin)));
    let packed = folder.path().join("packed.gguf");
    convert(&insisted, &packed, &options(None), &mut |_| {}).unwrap();
    assert_eq!(logits(&Checkpoint::open(&packed).unwrap()), logits(&twin));
}

#[test]
fn unpacked_and_mlx_folders_compute_the_bits_of_their_gguf_twin_and_convert_to_it() {
    let folder = tempfile::tempdir().unwrap();
    let twin = Checkpoint::open(golden().join("qwen3-tied/model-tq1_0.gguf")).unwrap();
    let expected = logits(&twin);
    for (n, encoding) in [Encoding::BF16, Encoding::F32].into_iter().enumerate() {
        let unpacked = folder.path().join(n.to_string());
        std::fs::create_dir(&unpacked).unwrap();
        float_folder(&unpacked, encoding, &|_, _| {});
    }
    let mlx = golden().join("qwen3-tied/mlx-2bit");
    for (n, path) in [folder.path().join("0"), folder.path().join("1"), mlx].iter().enumerate() {
        let name = path.display();
        let file = Checkpoint::open(path).unwrap();
        let kind = if n == 2 { Storage::Mlx { group: 128 } } else { Storage::FloatCopies };
        assert_eq!(storage(&file), Some(kind), "{name}");
        assert_eq!(logits(&file), expected, "{name}");
        // The embedding is ternary too: 7 matrices in each of two layers, and it.
        let found = survey(&file, Some(&ModelConfig::of(&file).unwrap()), &|_| {}).unwrap();
        let ternary: usize = found.packing.values().filter(|g| g.zeros.is_some()).map(|g| g.tensors).sum();
        assert_eq!((ternary, found.unused.len()), (15, 0), "{name}: {found:?}");
        for (to, linear_type) in [
            ("q2", None),
            ("pq2", Some(Encoding::PQ2_0)),
            ("ptq1", Some(Encoding::PTQ1_0)),
            ("tq2", Some(Encoding::TQ2_0)),
        ] {
            let out = folder.path().join(format!("{n}-{to}.gguf"));
            let options =
                ConvertOptions { linear_type, verify: true, without_tokenizer: true, ..Default::default() };
            let report =
                convert(&file, &out, &options, &mut |_| {}).unwrap_or_else(|e| panic!("{name} {to}: {e}"));
            assert_eq!((report.ternary_layers, report.max_error), (15, None));
            assert_eq!(logits(&Checkpoint::open(&out).unwrap()), expected, "{name} {to}");
        }
        let copies = folder.path().join(format!("{n}-hf"));
        let options = ConvertOptions {
            target: Target::HuggingFace,
            verify: true,
            without_tokenizer: true,
            ..Default::default()
        };
        convert(&file, &copies, &options, &mut |_| {}).unwrap_or_else(|e| panic!("{name} to hf: {e}"));
        let copies = Checkpoint::open(&copies).unwrap();
        assert_eq!(storage(&copies), Some(Storage::FloatCopies), "{name}");
        let encoding = &copies.info("model.layers.0.mlp.up_proj.weight").unwrap().encoding;
        assert_eq!(*encoding, [Encoding::BF16, Encoding::F32, Encoding::F16][n], "{name}");
        assert_eq!(logits(&copies), expected, "{name}");
    }
}

#[test]
fn plain_floats_stay_floats_and_mixtures_are_refused_until_a_choice_is_made() {
    let open = |folder: &Path, weights| {
        Checkpoint::open_with(folder, OpenOptions { weights, ..OpenOptions::default() }).unwrap()
    };
    let make = |change: Change| {
        let folder = tempfile::tempdir().unwrap();
        float_folder(folder.path(), Encoding::F32, change);
        folder
    };
    // Every weight moved a little, as training does.
    let floats =
        make(&|_, values| values.iter_mut().enumerate().for_each(|(i, v)| *v += 1e-3 * (i % 7) as f32));
    assert_eq!(storage(&open(floats.path(), FloatWeights::Detect)), None);
    let error = ModelConfig::of(&open(floats.path(), FloatWeights::Ternary)).unwrap_err().to_string();
    assert!(
        error.contains("14 of its block matrices are not ternary") && error.contains("column"),
        "{error}"
    );
    // One float matrix among ternary ones.
    let mixed = make(&|name, values| {
        if name == "model.layers.1.mlp.up_proj.weight" {
            values[5] += 0.25;
        }
    });
    let error = ModelConfig::of(&open(mixed.path(), FloatWeights::Detect)).unwrap_err().to_string();
    for part in
        ["13 of its block matrices", "1 do not", "`model.layers.1.mlp.up_proj.weight`", "--weights float"]
    {
        assert!(error.contains(part), "{part}: {error}");
    }
    assert_eq!(storage(&open(mixed.path(), FloatWeights::Float)), None);
    // Floats that a sample of rows does not show are found when the matrix is read.
    let hidden = make(&|name, values| {
        if name == "model.layers.1.mlp.up_proj.weight" {
            values[3 * 256 + 9] = 0.7;
        }
    });
    let file = open(hidden.path(), FloatWeights::Detect);
    let error = Engine::load(&file, ModelConfig::of(&file).unwrap(), &EngineOptions::default())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("`model.layers.1.mlp.up_proj.weight`") && error.contains("row 3, column 9"),
        "{error}"
    );
    assert!(error.contains("--weights float"), "{error}");
    // Zeros say nothing: a ternary model may have a matrix of them, a float one too.
    let zeros = make(&|name, values| {
        if name.contains("v_proj") {
            values.fill(0.0);
        }
    });
    assert_eq!(storage(&open(zeros.path(), FloatWeights::Detect)), Some(Storage::FloatCopies));
    let nothing = make(&|_, values| values.fill(0.0));
    assert_eq!(storage(&open(nothing.path(), FloatWeights::Detect)), None);
    // A float embedding beside ternary layers is the usual case.
    let embedding = make(&|name, values| {
        if name.contains("embed_tokens") {
            values.iter_mut().enumerate().for_each(|(i, v)| *v += 1e-3 * (i % 5) as f32);
        }
    });
    let file = open(embedding.path(), FloatWeights::Ternary);
    let found = survey(&file, Some(&ModelConfig::of(&file).unwrap()), &|_| {}).unwrap();
    assert_eq!(found.packing["F32"].tensors, 1);
    assert_eq!(found.packing["F32 holding ternary values"].tensors, 14);
}

#[test]
fn mlx_settings_and_values_that_are_not_ternary_are_refused_by_name() {
    let source = golden().join("qwen3-tied/mlx-2bit");
    let folder = tempfile::tempdir().unwrap();
    let weights = folder.path().join("model.safetensors");
    let with = |settings: serde_json::Value, patch: &dyn Fn(&mut Vec<u8>)| {
        let mut config = json(&source.join("config.json"));
        config["quantization"] = settings;
        std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        let mut bytes = std::fs::read(source.join("model.safetensors")).unwrap();
        patch(&mut bytes);
        std::fs::write(&weights, bytes).unwrap();
        Engine::open(folder.path(), &EngineOptions::default()).map(|_| ()).map_err(|e| e.to_string())
    };
    let two = || serde_json::json!({"group_size": 128, "bits": 2});
    with(two(), &|_| {}).unwrap();
    with(serde_json::json!({"group_size": 128, "bits": 2, "mode": "affine", "lm_head": false}), &|_| {})
        .unwrap();
    for (settings, part) in [
        (serde_json::json!({"group_size": 128, "bits": 4}), "`quantization.bits` is 4"),
        (serde_json::json!({"group_size": 32, "bits": 2, "mode": "mxfp4"}), "`quantization.mode`"),
        (serde_json::json!({"bits": 2}), "`quantization.group_size` is missing"),
        (serde_json::json!({"group_size": 64, "bits": 2}), "shape [512, 2]"),
        (
            serde_json::json!({"group_size": 128, "bits": 2, "model.embed_tokens": {"bits": 6}}),
            "model.embed_tokens",
        ),
    ] {
        let error = with(settings, &|_| {}).unwrap_err();
        assert!(error.contains(part), "{part}: {error}");
    }
    let place = |name: &str| {
        let bytes = std::fs::read(source.join("model.safetensors")).unwrap();
        let start = 8 + u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
        let header: serde_json::Value = serde_json::from_slice(&bytes[8..start]).unwrap();
        start + header[name]["data_offsets"][0].as_u64().unwrap() as usize
    };
    let (weight, bias) =
        (place("model.layers.0.mlp.up_proj.weight"), place("model.layers.0.mlp.up_proj.biases"));
    let error = with(two(), &|bytes| bytes[weight] |= 0b11).unwrap_err();
    assert!(error.contains("`model.layers.0.mlp.up_proj.weight`") && error.contains('1'), "{error}");
    let error = with(two(), &|bytes| bytes[bias] ^= 1).unwrap_err();
    assert!(error.contains("`model.layers.0.mlp.up_proj.biases`") && error.contains("negated"), "{error}");
}

#[test]
fn a_llama_with_a_scale_per_shard_is_weight_only_and_keeps_its_bits_through_gguf() {
    let folder = tempfile::tempdir().unwrap();
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 128, "intermediate_size": 256,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32, "tie_word_embeddings": false, "torch_dtype": "float16",
    });
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let matrices = [
        ("model.embed_tokens", 64, 128),
        ("lm_head", 64, 128),
        ("model.layers.0.self_attn.q_proj", 128, 128),
        ("model.layers.0.self_attn.k_proj", 128, 128),
        ("model.layers.0.self_attn.v_proj", 128, 128),
        ("model.layers.0.self_attn.o_proj", 128, 128),
        ("model.layers.0.mlp.gate_proj", 256, 128),
        ("model.layers.0.mlp.up_proj", 256, 128),
        ("model.layers.0.mlp.down_proj", 128, 256),
    ];
    let norms = ["model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"];
    let mut tensors = Vec::new();
    for (n, (name, rows, cols)) in matrices.into_iter().enumerate() {
        let value = |i: usize| {
            let (row, noise) = (i / cols, (i as u32 + 977 * n as u32).wrapping_mul(2_654_435_761) >> 16);
            let trit = (noise % 3) as f32 - 1.0;
            match n {
                // Embedding and head are floats, as TriLM's are.
                0 | 1 => (noise % 101) as f32 / 64.0 - 0.75,
                // Shards of rows, one of which cuts through a head.
                _ => trit * if 4 * row < rows { 0.0625 } else { 0.125 },
            }
        };
        tensors.push((
            format!("{name}.weight"),
            vec![rows, cols],
            (0..rows * cols).map(value).collect::<Vec<_>>(),
        ));
    }
    tensors.extend(norms.map(|name| (format!("{name}.weight"), vec![128], vec![1.0; 128])));
    let spec = |(name, shape, _): &(String, Vec<usize>, Vec<f32>)| TensorSpec {
        name: name.clone(),
        shape: shape.clone(),
        encoding: Encoding::F32,
    };
    let path = folder.path().join("model.safetensors");
    let mut writer = SafetensorsWriter::create(&path, &[], tensors.iter().map(spec).collect()).unwrap();
    for (_, _, values) in &tensors {
        writer.tensor(&values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>()).unwrap();
    }
    writer.finish().unwrap();
    let bits = |file: &Checkpoint| {
        let options = EngineOptions { threads: Some(2), ..EngineOptions::default() };
        let engine = Engine::load(file, ModelConfig::of(file).unwrap(), &options).unwrap();
        assert_eq!(engine.activations(), ActivationType::Float);
        let mut session = engine.session(KvType::F32, None);
        let logits = session.feed_all(&[1, 60, 7, 7], None).unwrap();
        logits.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
    };
    let file = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(storage(&file), Some(Storage::FloatCopies));
    let found = survey(&file, Some(&ModelConfig::of(&file).unwrap()), &|_| {}).unwrap();
    let ternary = &found.packing["F32 holding ternary values"];
    assert_eq!((ternary.tensors, found.packing["F32"].tensors), (7, 2));
    assert_eq!(ternary.scales, ["block 32x128", "block 64x128", "block 32x256"]);
    let expected = bits(&file);
    let as_floats = OpenOptions { weights: FloatWeights::Float, ..OpenOptions::default() };
    let floats = Checkpoint::open_with(folder.path(), as_floats).unwrap();
    assert_eq!(bits(&floats), expected, "the same weights as floats");
    let out = folder.path().join("m.gguf");
    let options = ConvertOptions { verify: true, without_tokenizer: true, ..ConvertOptions::default() };
    let report = convert(&file, &out, &options, &mut |_| {}).unwrap();
    assert_eq!((report.ternary_layers, report.max_error), (7, None));
    assert_eq!(bits(&Checkpoint::open(&out).unwrap()), expected);
    // Scales of shards are applied in integer products too.
    let int8 = |path: &Path| {
        let options = EngineOptions { activations: Some(ActivationType::Int8), ..EngineOptions::default() };
        let engine = Engine::open(path, &options).unwrap();
        let mut session = engine.session(KvType::F32, None);
        session.feed_all(&[1, 60, 7, 7], None).unwrap().to_vec()
    };
    let exact: Vec<f32> = expected.iter().map(|&bits| f32::from_bits(bits)).collect();
    let spread = exact.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    for path in [folder.path(), &out] {
        let gap = largest_gap(&int8(path), &exact);
        assert!(gap > 0.0 && gap < 0.05 * spread, "{gap} of {spread}");
    }
}
