//! Norms inside linear layers under the names they have in circulation, and models that end before the head.

use std::path::Path;

use serde_json::Value as Json;
use setun::config::{InnerNorms, ModelConfig, Pooling};
use setun::convert::{ConvertOptions, convert};
use setun::engine::{Engine, EngineOptions};
use setun::format::gguf::{GgufWriter, Metadata, Value};
use setun::format::{Checkpoint, SafetensorsWriter, TensorSpec};
use setun::kv_cache::KvType;

use super::*;

/// The model with norms inside all linear layers as a folder with other names (`None` leaves a tensor out) and settings.
fn folder(rename: &dyn Fn(&str) -> Option<String>, settings: &dyn Fn(&mut Json)) -> tempfile::TempDir {
    let source = golden().join("../models/llama-bitnet-online-rmsnorm");
    let file = Checkpoint::open(&source).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut config = json(&source.join("config.json"));
    settings(&mut config);
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let kept: Vec<(String, &str)> =
        file.tensors().filter_map(|t| Some((rename(&t.name)?, t.name.as_str()))).collect();
    let spec = |(name, old): &(String, &str)| {
        let info = file.info(old).unwrap();
        TensorSpec { name: name.clone(), shape: info.shape.clone(), encoding: info.encoding.clone() }
    };
    let path = folder.path().join("model.safetensors");
    let mut writer = SafetensorsWriter::create(&path, &[], kept.iter().map(spec).collect()).unwrap();
    for (_, old) in &kept {
        writer.tensor(&file.tensor(old).unwrap().data).unwrap();
    }
    writer.finish().unwrap();
    folder
}

fn same(name: &str) -> Option<String> {
    Some(name.to_owned())
}

/// Hidden states after the final norm, as bits.
fn hidden(path: &Path) -> (ModelConfig, Vec<u32>) {
    let engine = Engine::open(path, &EngineOptions { threads: Some(2), ..EngineOptions::default() }).unwrap();
    let mut taps = Vec::new();
    engine.session(KvType::F32, None).feed_all(&[5, 17, 380, 2], Some(&mut taps)).unwrap();
    let bits = taps.last().unwrap().1.iter().map(|v| v.to_bits()).collect();
    (engine.config().clone(), bits)
}

#[test]
fn a_bitdistill_student_is_a_bitnet_with_a_norm_in_every_linear_layer() {
    let student = folder(&|name| Some(name.replace(".rms_norm.", ".norm.")), &|config| {
        config.as_object_mut().unwrap().remove("quantization_config");
    });
    let twin = folder(&same, &|config| config["quantization_config"]["rms_norm_eps"] = 1e-8.into());
    let (config, found) = hidden(student.path());
    assert_eq!((config.inner_norm_eps, config.inner_norms), (Some(1e-8), InnerNorms::All));
    let (expected_config, expected) = hidden(twin.path());
    assert_eq!((config.numerics, found), (expected_config.numerics, expected));
}

#[test]
fn norms_inside_o_and_down_alone_are_the_sub_norms_of_a_bitnet() {
    let inside = |name: &str| name.contains(".rms_norm.");
    let kept = |name: &str| name.contains("o_proj") || name.contains("down_proj");
    let student = folder(
        &|name| (!inside(name) || kept(name)).then(|| name.replace(".rms_norm.", ".norm.")),
        &|config| {
            config["quantization_config"]["rms_norm_eps"] = config["rms_norm_eps"].clone();
        },
    );
    let twin = folder(
        &|name| {
            (!inside(name) || kept(name)).then(|| {
                name.replace("o_proj.rms_norm", "inner_attn_ln")
                    .replace("down_proj.rms_norm", "ffn_layernorm")
            })
        },
        &|config| {
            config.as_object_mut().unwrap().remove("quantization_config");
            config["architectures"] = serde_json::json!(["BitnetForCausalLM"]);
            (config["weight_bits"], config["input_bits"]) = (1.into(), 8.into());
        },
    );
    let (config, found) = hidden(student.path());
    assert_eq!(config.inner_norms, InnerNorms::OutputAndDown);
    assert_eq!(found, hidden(twin.path()).1);
    // GGUF keeps both the names and which layers they are in.
    let out = student.path().join("m.gguf");
    let options = ConvertOptions { verify: true, without_tokenizer: true, ..ConvertOptions::default() };
    convert(&Checkpoint::open(student.path()).unwrap(), &out, &options, &mut |_| {}).unwrap();
    let (config, again) = hidden(&out);
    assert_eq!((config.inner_norms, again), (InnerNorms::OutputAndDown, found));
}

#[test]
fn an_embedding_model_is_read_without_a_head_from_a_folder_and_from_bitnet_cpps_gguf() {
    let bare = |name: &str| {
        let name = name.replace(".rms_norm.", ".norm.");
        (name != "lm_head.weight").then(|| name.strip_prefix("model.").unwrap_or(&name).to_owned())
    };
    let student = folder(&bare, &|config| {
        config.as_object_mut().unwrap().remove("quantization_config");
        config["architectures"] = serde_json::json!(["LlamaModel"]);
    });
    std::fs::create_dir(student.path().join("1_Pooling")).unwrap();
    std::fs::write(student.path().join("1_Pooling/config.json"), r#"{"pooling_mode_lasttoken": true}"#)
        .unwrap();
    let (config, found) = hidden(student.path());
    assert_eq!((config.pooling, config.inner_norm_eps), (Some(Pooling::Last), Some(config.rms_norm_eps)));
    let twin = folder(&same, &|config| {
        config["quantization_config"]["rms_norm_eps"] = config["rms_norm_eps"].clone()
    });
    assert_eq!(found, hidden(twin.path()).1);

    let out = student.path().join("m.gguf");
    let options = ConvertOptions { verify: true, without_tokenizer: true, ..ConvertOptions::default() };
    convert(&Checkpoint::open(student.path()).unwrap(), &out, &options, &mut |_| {}).unwrap();
    let (config, again) = hidden(&out);
    assert_eq!((config.pooling, &again), (Some(Pooling::Last), &found));
    // bitnet.cpp's names of the norms, and no key for their ε.
    let file = Checkpoint::open(&out).unwrap();
    let mut metadata = Metadata::new();
    for (key, value) in
        file.gguf_metadata().unwrap().iter().filter(|(key, _)| !key.ends_with("inner_norm_rms_epsilon"))
    {
        metadata.insert(key, value.clone());
    }
    assert_eq!(metadata.get("llama.pooling_type"), Some(&Value::U32(3)));
    let specs = file.tensors().map(|t| TensorSpec {
        name: t.name.replace(".rms_norm.weight", "_norm_in.weight"),
        shape: t.shape.clone(),
        encoding: t.encoding.clone(),
    });
    let renamed = student.path().join("renamed.gguf");
    let mut writer = GgufWriter::create(&renamed, &metadata, specs.collect()).unwrap();
    for info in file.tensors() {
        writer.tensor(&file.tensor(&info.name).unwrap().data).unwrap();
    }
    writer.finish().unwrap();
    assert_eq!(hidden(&renamed).1, found);
}
