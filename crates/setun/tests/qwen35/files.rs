//! What files of the family may say, what is refused, and the ways between containers.

use std::collections::BTreeMap;

use serde_json::{Value as Json, json};
use setun::config::{HeadOrder, ModelConfig};
use setun::convert::{ConvertOptions, Target, convert};
use setun::format::gguf::{Array, Metadata, Value};
use setun::format::{Encoding, SafetensorsWriter, TensorSpec};
use setun::inspect::survey;
use setun::kv_cache::KvType;
use setun::weights::Weights;

use super::*;

fn with_keys(changes: &[(&str, Option<Value>)]) -> Result<ModelConfig, String> {
    let file = Checkpoint::open(gguf()).unwrap();
    let mut changed = Metadata::new();
    for (key, value) in file.gguf_metadata().unwrap().iter() {
        if !changes.iter().any(|(name, _)| key.strip_prefix("qwen35.") == Some(*name)) {
            changed.insert(key, value.clone());
        }
    }
    for (name, value) in changes {
        if let Some(value) = value {
            changed.insert(format!("qwen35.{name}"), value.clone());
        }
    }
    ModelConfig::from_gguf(&file, &changed).map_err(|error| error.to_string())
}

#[test]
fn layers_come_from_a_list_or_an_interval() {
    let layers = |changes: &[_]| with_keys(changes).map(|c| c.hybrid.unwrap().layers);
    assert_eq!(layers(&[]).unwrap(), [true, true, true, false]);
    assert_eq!(
        layers(&[("full_attention_interval", Some(Value::U32(2)))]).unwrap(),
        [true, false, true, false]
    );
    let list = |list: &[bool]| Some(Value::Array(Array::Bool(list.to_vec())));
    let given = ("attention.recurrent_layers", list(&[false, true, true, false]));
    assert_eq!(layers(std::slice::from_ref(&given)).unwrap(), [false, true, true, false]);
    assert_eq!(layers(&[given, ("full_attention_interval", None)]).unwrap(), [false, true, true, false]);
    // Blocks that only draft come last and are not run.
    let draft = [("nextn_predict_layers", Some(Value::U32(1)))];
    assert_eq!(with_keys(&draft).unwrap().num_layers, 3);
}

#[test]
fn missing_and_contradictory_keys_are_refused_by_name() {
    let number = |n: u32| Some(Value::U32(n));
    let cases = [
        ("full_attention_interval", None),
        ("full_attention_interval", number(0)),
        ("attention.recurrent_layers", Some(Value::Array(Array::Bool(vec![true; 3])))),
        ("attention.recurrent_layers", number(1)),
        ("ssm.conv_kernel", None),
        ("ssm.conv_kernel", number(0)),
        ("ssm.conv_kernel", number(17)),
        ("ssm.state_size", None),
        ("ssm.state_size", number(u32::MAX)),
        ("ssm.group_count", None),
        ("ssm.group_count", number(0)),
        ("ssm.group_count", number(3)),
        ("ssm.time_step_rank", None),
        ("ssm.inner_size", None),
        ("ssm.inner_size", number(128)),
        ("attention.head_count_kv", None),
        ("attention.key_length", None),
        ("rope.freq_base", None),
        ("rope.dimension_count", None),
        ("rope.dimension_sections", number(3)),
        ("nextn_predict_layers", number(4)),
        ("nextn_predict_layers", number(u32::MAX)),
    ];
    for (key, value) in cases {
        // The last part of a key: errors that two containers share name both.
        let part = key.rsplit('.').next().unwrap();
        let error = match with_keys(&[(key, value.clone())]) {
            Err(error) => error,
            Ok(config) => panic!("{key} = {value:?} gives {:?}", config.hybrid),
        };
        let by_inner = key.starts_with("ssm.") && error.contains("ssm.inner_size");
        assert!((error.contains(part) || by_inner) && error.len() < 400, "{key} = {value:?}: {error}");
    }
}

fn with_fields(changes: &[(&str, Json)]) -> Result<ModelConfig, String> {
    let mut json = json(&golden().join("config.json"));
    for (field, value) in changes {
        match value.as_str() {
            Some("absent") => drop(json.as_object_mut().unwrap().remove(*field)),
            _ => json[*field] = value.clone(),
        }
    }
    ModelConfig::from_json(&json).map_err(|error| error.to_string())
}

#[test]
fn a_config_json_says_the_same_as_the_gguf_keys_and_comes_back_from_what_is_written() {
    let config = with_fields(&[]).unwrap();
    let own = with_keys(&[]).unwrap();
    assert_eq!(config.hybrid.as_ref().unwrap().order, HeadOrder::Grouped);
    let (a, b) = (config.hybrid.clone().unwrap(), own.hybrid.clone().unwrap());
    assert_eq!(setun::config::Hybrid { order: HeadOrder::Tiled, ..a }, b);
    assert_eq!((&config.rope, config.head_dim, config.qk_norm), (&own.rope, own.head_dim, own.qk_norm));
    assert_eq!(config.parameters(), own.parameters());
    assert_eq!(ModelConfig::from_json(&config.to_json()).unwrap(), config);
    let interval = with_fields(&[("layer_types", json!("absent")), ("full_attention_interval", json!(4))]);
    assert_eq!(interval.unwrap(), config);
}

#[test]
fn fields_that_its_class_would_guess_are_demanded_by_name() {
    let none = || json!("absent");
    for (field, value) in [
        ("head_dim", none()),
        ("num_key_value_heads", none()),
        ("max_position_embeddings", none()),
        ("layer_types", none()),
        ("layer_types", json!(["linear_attention", "linear_attention", "full_attention", "recurrent"])),
        ("layer_types", json!(["linear_attention"])),
        ("linear_conv_kernel_dim", none()),
        ("linear_num_key_heads", none()),
        ("linear_num_value_heads", none()),
        ("linear_num_value_heads", json!(3)),
        ("linear_key_head_dim", none()),
        ("linear_value_head_dim", none()),
        ("linear_value_head_dim", json!(32)),
        ("attention_bias", json!(true)),
        ("attn_output_gate", json!(false)),
    ] {
        let error = with_fields(&[(field, value.clone())]).unwrap_err();
        assert!(error.contains(field), "{field} = {value}: {error}");
    }
    for (section, named) in [
        (json!({"rope_type": "default", "rope_theta": 1e7}), "partial_rotary_factor"),
        (json!({"rope_type": "default", "partial_rotary_factor": 0.25}), "rope_theta"),
    ] {
        let error = with_fields(&[("rope_parameters", section)]).unwrap_err();
        assert!(error.contains(named), "{error}");
    }
    let images = with_fields(&[("model_type", json!("qwen3_5"))]).unwrap_err();
    assert!(images.contains("image encoder"), "{images}");
}

#[test]
fn parameters_bytes_and_unused_tensors_are_those_of_the_file() {
    let file = Checkpoint::open(gguf()).unwrap();
    let config = ModelConfig::of(&file).unwrap();
    let elements: usize = file.tensors().map(|t| t.shape.iter().product::<usize>()).sum();
    assert_eq!(config.parameters(), elements);
    let found = survey(&file, Some(&config), &|_| {}).unwrap();
    assert!(found.unused.is_empty(), "{:?}", found.unused);
    assert_eq!(found.bytes.values().sum::<usize>(), file.tensors().map(|t| t.stored_bytes()).sum::<usize>());
    let matrices = file.tensors().filter(|t| t.shape.len() == 2 && !t.name.contains("conv1d"));
    let in_blocks = matrices.filter(|t| t.name.starts_with("blk."));
    assert_eq!(config.block_weights(), in_blocks.map(|t| t.shape.iter().product::<usize>()).sum::<usize>());
    // Of the matrices, decoding reads all but the embedding; ternary ones take two bits and a scale in memory.
    let weights = config.block_weights() + config.vocab_size * config.hidden_size;
    let bytes = engine(&gguf()).bytes_per_token();
    assert!(bytes > weights / 4 && bytes < weights * 3 / 8, "{bytes} for {weights}");
}

#[test]
fn a_drafting_block_is_left_out_and_conversion_says_so() {
    let file = Checkpoint::open(gguf()).unwrap();
    let config = with_keys(&[("nextn_predict_layers", Some(Value::U32(1)))]).unwrap();
    // The last block, taken for a drafting one, belongs to no part that is run; another one would be an error.
    Weights::new(&file, &config).check_all_used().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut metadata = file.gguf_metadata().unwrap().clone();
    metadata.insert("qwen35.nextn_predict_layers", Value::U32(1));
    let path = folder.path().join("draft.gguf");
    let specs = file.tensors().map(|t| TensorSpec {
        name: t.name.clone(),
        shape: t.shape.clone(),
        encoding: t.encoding.clone(),
    });
    let mut writer = setun::format::gguf::GgufWriter::create(&path, &metadata, specs.collect()).unwrap();
    while let Some(name) = writer.pending().map(|spec| spec.name.clone()) {
        writer.tensor(&file.tensor(&name).unwrap().data).unwrap();
    }
    writer.finish().unwrap();
    let draft = Checkpoint::open(&path).unwrap();
    assert_eq!(engine(&path).config().num_layers, 3);
    let options = ConvertOptions { verify: true, ..ConvertOptions::default() };
    let error =
        convert(&draft, &folder.path().join("x.gguf"), &options, &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("nextn_predict_layers"), "{error}");
    let options = ConvertOptions { allow_loss: true, ..options };
    let report = convert(&draft, &folder.path().join("x.gguf"), &options, &mut |_| {}).unwrap();
    assert!(report.losses.len() == 1 && report.losses[0].contains("nextn_predict_layers: 1"), "{report:?}");
}

fn logits(path: &Path) -> Vec<f32> {
    let engine = engine(path);
    let mut session = engine.session(KvType::F32, None);
    session.feed_all(&long(), None).unwrap().to_vec()
}

#[test]
fn gguf_goes_to_gguf_in_other_packings_with_the_same_bits_and_not_to_safetensors() {
    let file = Checkpoint::open(gguf()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let options = ConvertOptions { verify: true, ..ConvertOptions::default() };
    let expected = bits(&logits(&gguf()));
    for (name, linear_type) in
        [("same", None), ("ptq1", Some(Encoding::PTQ1_0)), ("f16", Some(Encoding::F16))]
    {
        let path = folder.path().join(format!("{name}.gguf"));
        let options = ConvertOptions { linear_type, ..options.clone() };
        let report = convert(&file, &path, &options, &mut |_| {}).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(report.tokenizer);
        let again = Checkpoint::open(&path).unwrap();
        let (before, after) = (file.gguf_metadata().unwrap(), again.gguf_metadata().unwrap());
        for (key, value) in before.iter().filter(|(key, _)| !key.starts_with("general.file_type")) {
            assert_eq!(after.get(key), Some(value), "{name}: {key}");
        }
        if name == "f16" {
            // The two small projections of each recurrent layer are floats that F16 rounds.
            assert!(largest_gap(&logits(&path), &logits(&gguf())) < 0.1);
        } else {
            assert_eq!(bits(&logits(&path)), expected, "{name}");
        }
    }
    let options = ConvertOptions { target: Target::HuggingFace, ..options };
    let error = convert(&file, &folder.path().join("hf"), &options, &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("gated DeltaNet"), "{error}");
}

/// The model as Hugging Face stores it: value heads in groups, norms as distances from 1, the decay's logarithm.
fn write_folder(folder: &Path) {
    let file = Checkpoint::open(gguf()).unwrap();
    let (keys, each, head) = (2, 2, 64);
    let grouped = |rows: usize, width: usize, first: usize| -> Vec<usize> {
        let head = (rows - first) / (keys * each);
        let row = |i: usize| match i.checked_sub(first) {
            None => i,
            Some(v) => first + (v / head % each * keys + v / head / each) * head + v % head,
        };
        (0..rows).flat_map(|i| row(i) * width..(row(i) + 1) * width).collect()
    };
    let mut tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)> = BTreeMap::new();
    for tensor in file.tensors() {
        let (mut shape, mut values) = (tensor.shape.clone(), floats(&file, &tensor.name));
        let (block, part) = match tensor.name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) {
            Some((block, part)) => (Some(block), part),
            None => (None, tensor.name.as_str()),
        };
        let name = match part {
            "token_embd.weight" => "model.embed_tokens.weight",
            "output_norm.weight" => "model.norm.weight",
            "output.weight" => "lm_head.weight",
            "attn_norm.weight" => "input_layernorm.weight",
            "post_attention_norm.weight" => "post_attention_layernorm.weight",
            "attn_q.weight" => "self_attn.q_proj.weight",
            "attn_k.weight" => "self_attn.k_proj.weight",
            "attn_v.weight" => "self_attn.v_proj.weight",
            "attn_output.weight" => "self_attn.o_proj.weight",
            "attn_q_norm.weight" => "self_attn.q_norm.weight",
            "attn_k_norm.weight" => "self_attn.k_norm.weight",
            "ffn_gate.weight" => "mlp.gate_proj.weight",
            "ffn_up.weight" => "mlp.up_proj.weight",
            "ffn_down.weight" => "mlp.down_proj.weight",
            "attn_qkv.weight" => "linear_attn.in_proj_qkv.weight",
            "attn_gate.weight" => "linear_attn.in_proj_z.weight",
            "ssm_alpha.weight" => "linear_attn.in_proj_a.weight",
            "ssm_beta.weight" => "linear_attn.in_proj_b.weight",
            "ssm_conv1d.weight" => "linear_attn.conv1d.weight",
            "ssm_a" => "linear_attn.A_log",
            "ssm_dt.bias" => "linear_attn.dt_bias",
            "ssm_norm.weight" => "linear_attn.norm.weight",
            "ssm_out.weight" => "linear_attn.out_proj.weight",
            other => panic!("{other}"),
        };
        let (rows, width) = (shape[0], values.len() / shape[0]);
        let order = match part {
            "attn_qkv.weight" | "ssm_conv1d.weight" => Some(grouped(rows, width, 2 * keys * head)),
            "attn_gate.weight" | "ssm_alpha.weight" | "ssm_beta.weight" | "ssm_a" | "ssm_dt.bias" => {
                Some(grouped(rows, width, 0))
            }
            "ssm_out.weight" => {
                let columns = grouped(width, 1, 0);
                Some(
                    (0..rows)
                        .flat_map(|row| columns.iter().map(move |c| row * width + c).collect::<Vec<_>>())
                        .collect(),
                )
            }
            _ => None,
        };
        if let Some(order) = order {
            values = order.iter().map(|&i| values[i]).collect();
        }
        if part.ends_with("norm.weight") && part != "ssm_norm.weight" {
            values.iter_mut().for_each(|w| *w -= 1.0);
        } else if part == "ssm_a" {
            values.iter_mut().for_each(|a| *a = (-*a).ln());
        } else if part == "ssm_conv1d.weight" {
            shape.insert(1, 1);
        }
        let name = block.map_or(name.to_owned(), |block| format!("model.layers.{block}.{name}"));
        tensors.insert(name, (shape, values));
    }
    let spec = |(name, (shape, _)): (&String, &(Vec<usize>, Vec<f32>))| TensorSpec {
        name: name.clone(),
        shape: shape.clone(),
        encoding: Encoding::F32,
    };
    let specs = tensors.iter().map(spec).collect();
    let mut writer = SafetensorsWriter::create(&folder.join("model.safetensors"), &[], specs).unwrap();
    while let Some(name) = writer.pending().map(|spec| spec.name.clone()) {
        writer.tensor(&tensors[&name].1.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>()).unwrap();
    }
    writer.finish().unwrap();
    std::fs::copy(golden().join("config.json"), folder.join("config.json")).unwrap();
}

#[test]
fn a_hugging_face_folder_gives_the_references_logits_and_so_does_the_gguf_made_of_it() {
    let folder = tempfile::tempdir().unwrap();
    write_folder(folder.path());
    let expected = Checkpoint::open(golden().join("expected.safetensors")).unwrap();
    let found = logits(folder.path());
    let gap = largest_gap(&found, &floats(&expected, "logits.5"));
    assert!(gap <= 2e-3, "logits are {gap} off");
    let file = Checkpoint::open(folder.path()).unwrap();
    let options = ConvertOptions { verify: true, without_tokenizer: true, ..ConvertOptions::default() };
    let path = folder.path().join("made.gguf");
    convert(&file, &path, &options, &mut |_| {}).unwrap();
    // Another order of an output projection's columns is another order of its sums.
    let gap = largest_gap(&logits(&path), &found);
    assert!(gap <= 1e-3, "{gap}");
    let made = Checkpoint::open(&path).unwrap();
    assert_eq!(made.info("blk.0.ssm_conv1d.weight").unwrap().shape, [512, 4]);
    assert_eq!(made.info("blk.0.ssm_out.weight").unwrap().encoding, Encoding::Q2_0G64);
    let original = Checkpoint::open(gguf()).unwrap();
    for name in
        ["blk.1.attn_qkv.weight", "blk.0.ssm_out.weight", "blk.2.ssm_beta.weight", "blk.0.ssm_conv1d.weight"]
    {
        assert_eq!(floats(&made, name), floats(&original, name), "{name}");
    }
    let error = convert(
        &file,
        &folder.path().join("hf"),
        &ConvertOptions { target: Target::HuggingFace, ..options },
        &mut |_| {},
    );
    assert!(error.unwrap_err().to_string().contains("gated DeltaNet"));
}

/// Loads `path` under a changed configuration and runs a few tokens; whatever happens, it must not panic.
fn try_config(path: &Path, config: Result<ModelConfig, String>) -> Result<(), String> {
    let file = Checkpoint::open(path).unwrap();
    let options = EngineOptions { threads: Some(1), ..EngineOptions::default() };
    let engine = Engine::load(&file, config?, &options).map_err(|e| e.to_string())?;
    let mut session = engine.session(KvType::F16, None);
    session.feed(&[1, 2, 3]).map(drop).map_err(|e| e.to_string())
}

#[test]
fn hostile_values_are_errors_or_harmless() {
    let values = [
        Value::U32(0),
        Value::U32(1),
        Value::U32(3),
        Value::U32(u32::MAX),
        Value::U64(u64::MAX),
        Value::I32(-1),
        Value::F32(f32::NAN),
        Value::String("x".into()),
        Value::Array(Array::U32(vec![u32::MAX; 4])),
        Value::Array(Array::Bool(vec![true; 4])),
    ];
    let metadata = Checkpoint::open(gguf()).unwrap().gguf_metadata().unwrap().clone();
    let mut keys: Vec<&str> = metadata.iter().filter_map(|(key, _)| key.strip_prefix("qwen35.")).collect();
    keys.extend(["attention.recurrent_layers", "nextn_predict_layers"]);
    assert!(keys.len() > 15);
    let mut refused = 0;
    for (key, value) in keys.iter().flat_map(|key| values.iter().map(move |value| (key, value))) {
        if let Err(error) = try_config(&gguf(), with_keys(&[(key, Some(value.clone()))])) {
            assert!(
                (error.contains('`') || error.contains("context is full")) && error.len() < 400,
                "{key} = {value:?}: {error}"
            );
            refused += 1;
        }
    }
    assert!(refused > 100, "{refused} refusals");
    let folder = tempfile::tempdir().unwrap();
    write_folder(folder.path());
    for field in [
        "layer_types",
        "full_attention_interval",
        "linear_conv_kernel_dim",
        "linear_num_key_heads",
        "linear_num_value_heads",
        "linear_key_head_dim",
        "linear_value_head_dim",
        "rope_parameters",
    ] {
        for value in
            [json!(null), json!(0), json!(3), json!(u64::MAX), json!("x"), json!([]), json!({}), json!([1])]
        {
            if let Err(error) = try_config(folder.path(), with_fields(&[(field, value.clone())])) {
                assert!(error.contains('`') && error.len() < 400, "{field} = {value}: {error}");
            }
        }
    }
}
