//! Conversions between containers and packings: what goes in comes out, or is refused with its reason.

#[path = "convert/outputs.rs"]
mod outputs;

use std::path::{Path, PathBuf};

use setun::config::ActivationType;
use setun::config::ModelConfig;
use setun::convert::{ConvertOptions, ConvertReport, Target, convert};
use setun::engine::{Engine, EngineOptions};
use setun::format::gguf::{GgufWriter, Metadata, Value};
use setun::format::{Checkpoint, Encoding, ScaleConvention, TensorInfo, TensorSpec};
use setun::kv_cache::KvType;
use setun::recommended::Recommended;
use setun::tokenizer::Tokenizer;

fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden").join(path)
}

fn model(name: &str) -> PathBuf {
    golden("models").join(name)
}

fn run(input: &Path, output: &Path, options: ConvertOptions) -> Result<ConvertReport, String> {
    let file = Checkpoint::open(input).unwrap();
    let options = ConvertOptions { verify: true, ..options };
    convert(&file, output, &options, &mut |_| {}).map_err(|e| e.to_string())
}

fn gguf(linears: Option<Encoding>) -> ConvertOptions<'static> {
    ConvertOptions { linear_type: linears, ..ConvertOptions::default() }
}

fn huggingface(scales: Option<ScaleConvention>) -> ConvertOptions<'static> {
    ConvertOptions { target: Target::HuggingFace, scales, ..ConvertOptions::default() }
}

fn engine(path: &Path) -> Engine {
    let options = EngineOptions {
        threads: Some(1),
        activations: Some(ActivationType::Int8),
        ..EngineOptions::default()
    };
    Engine::open(path, &options).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Logits of ids 3, 10, 17, … for a whole sequence.
fn logits(path: &Path) -> Vec<f32> {
    let engine = engine(path);
    let ids: Vec<u32> = (0..40).map(|i| (3 + 7 * i) % engine.config().vocab_size as u32).collect();
    engine.session(KvType::F32, None).feed_all(&ids, None).unwrap().to_vec()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

fn entries(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

const TEXTS: [&str; 4] = ["Once upon a time", "naïve Straße 12345,  x\n\ty", "", "日本 🙂 it's"];

fn assert_same_tokenizer(a: &Path, b: &Path) {
    let of = |path| Tokenizer::of(&Checkpoint::open(path).unwrap()).unwrap();
    let (a, b) = (of(a), of(b));
    for text in TEXTS {
        assert_eq!(a.encode(text, true).unwrap(), b.encode(text, true).unwrap(), "{text:?}");
    }
    assert_eq!(a.bos(), b.bos());
    assert_eq!(a.eos_ids().first(), b.eos_ids().first());
    assert_eq!(a.chat_template(), b.chat_template());
}

#[test]
fn packed_folders_survive_the_way_through_gguf_and_back() {
    for (name, types) in [
        ("bitnet-tied-packed-small", vec![Encoding::I2S, Encoding::TQ2_0, Encoding::F32]),
        ("bitnet-untied-packed", vec![Encoding::I2S, Encoding::F32]),
        ("llama-bitnet-packed", vec![Encoding::I2S]),
        ("llama-bitnet-online-rmsnorm", vec![Encoding::I2S]),
    ] {
        let source = model(name);
        let expected = logits(&source);
        for linears in types {
            let folder = tempfile::tempdir().unwrap();
            let (file, back) = (folder.path().join("a.gguf"), folder.path().join("back"));
            let report =
                run(&source, &file, gguf(Some(linears.clone()))).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert!(
                report.max_error.is_none() && report.tokenizer && report.ternary_layers > 0,
                "{name}: {report:?}"
            );
            assert!(report.verified.unwrap().trits > 0 || !linears.is_ternary(), "{name}");
            assert_eq!(bits(&logits(&file)), bits(&expected), "{name} as GGUF {linears}");
            assert_same_tokenizer(&source, &file);
            for scales in [ScaleConvention::Multiply, ScaleConvention::Divide] {
                match run(&file, &back, ConvertOptions { force: true, ..huggingface(Some(scales)) }) {
                    Ok(_) => {
                        assert_eq!(
                            bits(&logits(&back)),
                            bits(&expected),
                            "{name} back from {linears}, {scales:?}"
                        );
                        assert_same_tokenizer(&source, &back);
                    }
                    // Not every number is the reciprocal of another.
                    Err(e) => {
                        assert!(scales == ScaleConvention::Divide && e.contains("--scales multiply"), "{e}")
                    }
                }
            }
            assert_eq!(entries(folder.path()), ["a.gguf", "back"], "nothing else is left behind");
        }
    }
}

#[test]
fn scales_that_half_precision_would_change_are_refused_unless_that_is_allowed() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("a.gguf");
    for linears in [Encoding::TQ1_0, Encoding::TQ2_0] {
        let source = model("llama-bitnet-packed");
        let error = run(&source, &out, gguf(Some(linears.clone()))).unwrap_err();
        assert!(
            error.contains("scale") && error.contains("half precision") && error.contains("i2_s"),
            "{error}"
        );
        assert!(!out.exists() && entries(folder.path()).is_empty());
        let options = ConvertOptions { allow_loss: true, force: true, ..gguf(Some(linears)) };
        let report = run(&source, &out, options).unwrap();
        assert!(report.max_scale_error > 0.0 && report.max_scale_error <= 0.0005, "{report:?}");
        std::fs::remove_file(&out).unwrap();
    }
}

#[test]
fn tq_files_become_other_types_exactly() {
    let source = model("llama-bitnet-packed-gguf/llama-bitnet-packed-tq2_0.gguf");
    let expected = bits(&logits(&source));
    let folder = tempfile::tempdir().unwrap();
    for linears in [Encoding::TQ1_0, Encoding::TQ2_0, Encoding::I2S] {
        let out = folder.path().join(format!("{linears}.gguf"));
        run(&source, &out, gguf(Some(linears))).unwrap();
        assert_eq!(bits(&logits(&out)), expected);
    }
    let back = folder.path().join("hf");
    run(&source, &back, huggingface(None)).unwrap();
    assert_eq!(bits(&logits(&back)), expected);
    let again = folder.path().join("again.gguf");
    run(&back, &again, gguf(Some(Encoding::TQ2_0))).unwrap();
    assert_eq!(bits(&logits(&again)), expected);
}

#[test]
fn bitllama2_tells_the_same_story_from_gguf() {
    let source = golden("bitllama2/bit_model_3M.bin");
    let tokenizer = Tokenizer::open(&golden("bitllama2/tok512.model")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (file, back) = (folder.path().join("story.gguf"), folder.path().join("story"));
    let given = |options| ConvertOptions { tokenizer: Some(&tokenizer), ..options };
    let greedy = |path: &Path| {
        let engine = engine(path);
        let mut session = engine.session(KvType::F32, None);
        session.feed(&[1]).unwrap();
        let mut ids = Vec::new();
        while ids.len() < 64 {
            ids.push(engine.kernels().argmax(session.logits()) as u32);
            session.feed(&ids[ids.len() - 1..]).unwrap();
        }
        ids
    };
    let expected = greedy(&source);
    assert_eq!(expected[..4], [403, 407, 261, 378]);
    let report = run(&source, &file, given(gguf(None))).unwrap();
    assert!(report.max_error.is_none());
    let written = Checkpoint::open(&file).unwrap();
    assert_eq!(written.gguf_metadata().unwrap().str("general.architecture").unwrap(), Some("bitnet"));
    assert_eq!(greedy(&file), expected);
    assert_eq!(bits(&logits(&file)), bits(&logits(&source)));
    let own = Tokenizer::of(&written).unwrap();
    for text in TEXTS {
        assert_eq!(own.encode(text, true).unwrap(), tokenizer.encode(text, true).unwrap());
    }
    run(&file, &back, huggingface(None)).unwrap();
    assert_eq!(greedy(&back), expected);
}

/// A llama2.c checkpoint with a separate head, as its exporter lays it out.
fn llama2c(path: &Path) {
    let (dim, hidden, layers, heads, kv_heads, vocab, context) = (32, 48, 2, 4, 2, 40, 64);
    let mut bytes: Vec<u8> = [dim, hidden, layers, heads, kv_heads, -vocab, context]
        .iter()
        .flat_map(|n: &i32| n.to_le_bytes())
        .collect();
    let kv = dim / heads * kv_heads;
    let per_layer = 2 * dim + 2 * dim * dim + 2 * dim * kv + 3 * dim * hidden;
    let floats = vocab * dim * 2 + layers * per_layer + dim + context * (dim / heads);
    let mut state = 1u32;
    for _ in 0..floats {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        bytes.extend(((state >> 8) as f32 / (1 << 23) as f32 - 1.0).to_le_bytes());
    }
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn float_llama2c_becomes_gguf_and_a_folder_with_equal_logits() {
    let folder = tempfile::tempdir().unwrap();
    let (source, file, back) =
        (folder.path().join("m.bin"), folder.path().join("m.gguf"), folder.path().join("m"));
    llama2c(&source);
    let expected = bits(&logits(&source));
    let report = run(&source, &file, gguf(Some(Encoding::F32))).unwrap();
    assert!(report.max_error.is_none() && report.notes.iter().any(|n| n.contains("tokenizer")), "{report:?}");
    assert_eq!(bits(&logits(&file)), expected);
    run(&file, &back, huggingface(None)).unwrap();
    assert_eq!(bits(&logits(&back)), expected);
}

#[test]
fn narrowed_floats_are_reported_with_their_error() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("m.bin");
    llama2c(&source);
    // Values are below 1: half of the last place of each type.
    for (to, most) in [(Encoding::F16, 2.5e-4), (Encoding::BF16, 2e-3), (Encoding::Q8_0, 5e-3)] {
        let out = folder.path().join(format!("{to}.gguf"));
        let options = ConvertOptions { embedding_type: Some(to.clone()), ..gguf(None) };
        let report = run(&source, &out, options).unwrap();
        let error = report.max_error.unwrap().error;
        assert!(error > 0.0 && error <= most, "{to}: {error}");
        assert_eq!(report.types[to.name()], 2, "embedding and head");
        let narrow = Checkpoint::open(&out).unwrap().tensor("token_embd.weight").unwrap().to_f32().unwrap();
        let wide =
            Checkpoint::open(&source).unwrap().tensor("model.embed_tokens.weight").unwrap().to_f32().unwrap();
        let apart = narrow.iter().zip(&wide).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(apart > 0.0 && apart <= error);
    }
}

#[test]
fn rope_variants_and_families_keep_their_logits() {
    let folder = tempfile::tempdir().unwrap();
    for (name, tolerance) in [
        ("rope-llama-default", 0.0),
        ("rope-llama-linear", 0.0),
        ("mistral-sliding-window", 0.0),
        // Frequencies go through f32 divisors, and YaRN's factor through f32.
        ("rope-llama-llama3", 1e-4),
        ("rope-llama-yarn", 1e-4),
    ] {
        let (source, out) = (model(name), folder.path().join(format!("{name}.gguf")));
        run(&source, &out, gguf(Some(Encoding::F32))).unwrap_or_else(|e| panic!("{name}: {e}"));
        let (a, b) = (logits(&source), logits(&out));
        let apart = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        eprintln!("{name}: {apart:e}");
        assert!(apart <= tolerance, "{name}: {apart}");
    }
}

#[test]
fn packed_folders_have_one_float_type_since_their_readers_cast_none() {
    let folder = tempfile::tempdir().unwrap();
    let (file, hf) = (folder.path().join("m.gguf"), folder.path().join("hf"));
    let narrowed = ConvertOptions { embedding_type: Some(Encoding::F16), ..gguf(None) };
    run(&model("bitnet-tied-packed-small"), &file, narrowed).unwrap();
    let report = run(&file, &hf, huggingface(None)).unwrap();
    assert_eq!(report.types.keys().collect::<Vec<_>>(), ["F32", "U8"]);
    assert_eq!(bits(&logits(&file)), bits(&logits(&hf)));
    // Asking for a mixture is allowed, and said.
    let mixed = ConvertOptions { embedding_type: Some(Encoding::F16), force: true, ..huggingface(None) };
    let report = run(&file, &hf, mixed).unwrap();
    assert!(report.notes.iter().any(|note| note.contains("--embedding-type")), "{:?}", report.notes);
    // A folder of one type keeps it, scales included.
    let report =
        run(&model("bitnet-untied-packed"), &folder.path().join("again"), huggingface(None)).unwrap();
    assert_eq!(report.types.keys().collect::<Vec<_>>(), ["BF16", "U8"]);
}

#[test]
fn tensors_without_a_place_in_the_model_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let cut = folder.path().join("cut.gguf");
    let file = Checkpoint::open(model("llama-bf16-gguf").join("llama-bf16-q8_0.gguf")).unwrap();
    let mut metadata = Metadata::new();
    for (key, value) in file.gguf_metadata().unwrap().iter() {
        metadata.insert(key, if key == "llama.block_count" { Value::U32(1) } else { value.clone() });
    }
    let spec = |t: &TensorInfo| TensorSpec {
        name: t.name.clone(),
        shape: t.shape.clone(),
        encoding: t.encoding.clone(),
    };
    let mut writer = GgufWriter::create(&cut, &metadata, file.tensors().map(spec).collect()).unwrap();
    while let Some(name) = writer.pending().map(|spec| spec.name.clone()) {
        writer.tensor(&file.tensor(&name).unwrap().data).unwrap();
    }
    writer.finish().unwrap();
    let file = Checkpoint::open(&cut).unwrap();
    let config = ModelConfig::of(&file).unwrap();
    let refused = [
        Engine::load(&file, config, &EngineOptions::default()).map(|_| ()).unwrap_err().to_string(),
        run(&cut, &folder.path().join("out"), huggingface(None)).unwrap_err(),
    ];
    // So is a scale beside a layer that has none.
    let scaled = folder.path().join("scaled.gguf");
    let file = Checkpoint::open(model("llama-bf16-gguf").join("llama-bf16-q8_0.gguf")).unwrap();
    let mut specs: Vec<TensorSpec> = file.tensors().map(spec).collect();
    specs.push(TensorSpec { name: "blk.0.attn_q.scale".into(), shape: vec![1], encoding: Encoding::F32 });
    let mut writer = GgufWriter::create(&scaled, file.gguf_metadata().unwrap(), specs).unwrap();
    while let Some(name) = writer.pending().map(|spec| spec.name.clone()) {
        match file.find(&name).unwrap() {
            Some(tensor) => writer.tensor(&tensor.data).unwrap(),
            None => writer.tensor(&3f32.to_le_bytes()).unwrap(),
        }
    }
    writer.finish().unwrap();
    let error = Engine::open(&scaled, &EngineOptions::default()).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("`blk.0.attn_q.scale`"), "{error}");
    for message in refused {
        assert!(message.contains("`blk.1.") && message.contains("1 layers"), "{message}");
    }
}

#[test]
fn grouped_types_hold_a_weight_only_model_exactly() {
    let folder = tempfile::tempdir().unwrap();
    let source = golden("bonsai/qwen3-tied/model-tq1_0.gguf");
    let logits = |path: &Path| {
        let engine = Engine::open(path, &EngineOptions::default()).unwrap();
        let ids: Vec<u32> = (0..20).map(|i| 3 + 7 * i).collect();
        bits(engine.session(KvType::F32, None).feed_all(&ids, None).unwrap())
    };
    let expected = logits(&source);
    for (n, to) in
        [Encoding::Q2_0G64, Encoding::PQ2_0, Encoding::PTQ1_0, Encoding::TQ2_0].into_iter().enumerate()
    {
        let out = folder.path().join(format!("{n}.gguf"));
        run(&source, &out, gguf(Some(to.clone()))).unwrap();
        assert_eq!(logits(&out), expected, "{to}");
    }
    // A packed folder's loaders would round activations; float copies compute the same.
    let packed = run(&source, &folder.path().join("hf"), huggingface(Some(ScaleConvention::Multiply)));
    assert!(packed.unwrap_err().contains("round activations"));
    run(&source, &folder.path().join("hf"), huggingface(None)).unwrap();
    assert_eq!(logits(&folder.path().join("hf")), expected);
}

#[test]
fn recommended_sampling_goes_along_both_ways() {
    let (folder, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for entry in std::fs::read_dir(model("bitnet-tied-packed-small")).unwrap().map(|e| e.unwrap().path()) {
        if entry.is_file() {
            std::fs::copy(&entry, folder.path().join(entry.file_name().unwrap())).unwrap();
        }
    }
    let generation =
        r#"{ "eos_token_id": 2, "do_sample": true, "temperature": 0.6, "top_p": 0.9, "top_k": null }"#;
    std::fs::write(folder.path().join("generation_config.json"), generation).unwrap();
    let (file, back) = (out.path().join("m.gguf"), out.path().join("back"));
    run(folder.path(), &file, gguf(None)).unwrap();
    run(&file, &back, huggingface(None)).unwrap();
    let expected = Recommended { temperature: Some(0.6), top_p: Some(0.9), ..Recommended::default() };
    for path in [folder.path(), &file, &back] {
        assert_eq!(
            Recommended::of(&Checkpoint::open(path).unwrap()).unwrap(),
            expected,
            "{}",
            path.display()
        );
    }
}

#[test]
fn what_gguf_cannot_say_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("a.gguf");
    for (name, linears, reason) in [
        ("rope-llama-dynamic", None, "dynamic"),
        ("rope-llama-default", Some(Encoding::I2S), "no conversion"),
        ("llama-bitnet-packed", Some(Encoding::F16), "activations"),
        ("bitnet-tied-packed-small", Some(Encoding::Q8_0), "its scale"),
    ] {
        let error = run(&model(name), &out, gguf(linears)).unwrap_err();
        assert!(error.contains(reason), "{name}: {error}");
        assert!(entries(folder.path()).is_empty(), "{name} left {:?}", entries(folder.path()));
    }
}

#[test]
fn windows_on_some_layers_survive_in_a_folder_and_are_refused_by_gguf() {
    let folder = tempfile::tempdir().unwrap();
    let [source, back, out] = ["m", "back", "a.gguf"].map(|n| folder.path().join(n));
    std::fs::create_dir(&source).unwrap();
    std::fs::copy(model("qwen2-bias/model.safetensors"), source.join("model.safetensors")).unwrap();
    let mut json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(model("qwen2-bias/config.json")).unwrap()).unwrap();
    for (key, value) in
        [("use_sliding_window", true.into()), ("sliding_window", 5.into()), ("max_window_layers", 1.into())]
    {
        json[key] = value;
    }
    json.as_object_mut().unwrap().remove("layer_types");
    std::fs::write(source.join("config.json"), json.to_string()).unwrap();
    let error = run(&source, &out, gguf(None)).unwrap_err();
    assert!(error.contains("one window for all layers"), "{error}");
    run(&source, &back, huggingface(None)).unwrap();
    assert_eq!(bits(&logits(&back)), bits(&logits(&source)));
    assert_eq!(entries(folder.path()), ["back", "m"]);
    // The same window everywhere, or none, is fine.
    run(&model("qwen2-bias"), &out, gguf(None)).unwrap();
    assert_eq!(bits(&logits(&out)), bits(&logits(&model("qwen2-bias"))));
}

#[test]
fn rows_that_are_not_whole_blocks_are_refused_with_the_number() {
    use setun::format::{SafetensorsWriter, TensorSpec};
    // A ternary Llama of width 32: valid, but no I2_S row is shorter than 128.
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("m");
    let float = folder.path().join("m.bin");
    llama2c(&float);
    run(&float, &source, huggingface(None)).unwrap();
    let mut json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(source.join("config.json")).unwrap()).unwrap();
    json["quantization_config"] = serde_json::json!({"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"});
    std::fs::write(source.join("config.json"), json.to_string()).unwrap();
    let out = folder.path().join("a.gguf");
    let error = run(&source, &out, gguf(None)).unwrap_err();
    assert!(error.contains("I2_S") && error.contains("32 columns"), "{error}");
    assert!(!out.exists());
    // Masters become packed, with the same logits.
    let packed = folder.path().join("packed");
    run(&source, &packed, huggingface(None)).unwrap();
    assert_eq!(bits(&logits(&packed)), bits(&logits(&source)));
    let file = Checkpoint::open(&packed).unwrap();
    assert_eq!(file.info("model.layers.0.mlp.up_proj.weight").unwrap().encoding, Encoding::U8);
    // A fourth code among them is found before anything is named.
    let spec = TensorSpec { name: "x".into(), shape: vec![1], encoding: Encoding::U8 };
    let mut writer = SafetensorsWriter::create(&packed.join("model.safetensors"), &[], vec![spec]).unwrap();
    writer.tensor(&[255]).unwrap();
    writer.finish().unwrap();
    let error = run(&packed, &out, gguf(Some(Encoding::F32))).unwrap_err();
    assert!(error.contains("missing") || error.contains("activations"), "{error}");
    assert!(!out.exists());
}

#[test]
fn an_existing_output_is_replaced_only_on_request_and_only_by_its_like() {
    let folder = tempfile::tempdir().unwrap();
    let (source, out) = (model("bitnet-tied-packed-small"), folder.path().join("out"));
    std::fs::write(&out, "mine").unwrap();
    let force = |options| ConvertOptions { force: true, ..options };
    assert!(run(&source, &out, gguf(None)).unwrap_err().contains("exists already"));
    assert!(run(&source, &out, force(huggingface(None))).unwrap_err().contains("is a file"));
    // A failing conversion leaves it alone, whatever was allowed.
    let failing = run(&model("rope-llama-dynamic"), &out, force(gguf(None)));
    assert!(failing.is_err());
    assert_eq!(std::fs::read(&out).unwrap(), b"mine");
    run(&source, &out, force(gguf(None))).unwrap();
    assert!(Checkpoint::open(&out).unwrap().gguf_metadata().is_some());

    let other = folder.path().join("photos");
    std::fs::create_dir(&other).unwrap();
    std::fs::write(other.join("cat.jpg"), "cat").unwrap();
    assert!(run(&source, &other, force(huggingface(None))).unwrap_err().contains("not replaced"));
    assert!(run(&source, &other, force(gguf(None))).unwrap_err().contains("is a folder"));
    let hf = folder.path().join("hf");
    run(&source, &hf, huggingface(None)).unwrap();
    run(&source, &hf, force(huggingface(None))).unwrap();
    std::fs::write(hf.join("thesis.txt"), "years").unwrap();
    assert!(run(&source, &hf, force(huggingface(None))).unwrap_err().contains("thesis.txt"));
    assert_eq!(std::fs::read(hf.join("thesis.txt")).unwrap(), b"years");
    let adapters = folder.path().join("photos");
    std::fs::remove_file(adapters.join("cat.jpg")).unwrap();
    std::fs::write(adapters.join("style.safetensors"), "mine").unwrap();
    assert!(run(&source, &adapters, force(huggingface(None))).unwrap_err().contains("style.safetensors"));
    std::fs::rename(adapters.join("style.safetensors"), adapters.join("model.safetensors")).unwrap();
    assert!(run(&source, &adapters, force(huggingface(None))).unwrap_err().contains("model.safetensors"));
    assert_eq!(entries(folder.path()), ["hf", "out", "photos"]);
}

#[test]
fn a_second_conversion_gives_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let [a, b, c] = ["a", "b", "c"].map(|n| folder.path().join(n));
    run(&model("bitnet-untied-packed"), &a, gguf(None)).unwrap();
    run(&model("bitnet-untied-packed"), &b, gguf(None)).unwrap();
    assert_eq!(std::fs::read(&a).unwrap(), std::fs::read(&b).unwrap());
    run(&a, &c, gguf(None)).unwrap();
    let bytes = |p: &Path| std::fs::metadata(p).unwrap().len();
    assert_eq!(bytes(&a), bytes(&c));
}

/// A vocabulary as `setun train` makes one: bytes, a few merges, digits one by one, `<|endoftext|>` before every text.
fn trained_tokenizer() -> String {
    let mut alphabet: Vec<char> =
        tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let mut tokens = vec!["<|endoftext|>".to_owned()];
    tokens.extend(alphabet.iter().map(char::to_string));
    tokens.extend(["on", "ce", "once", "Ġt"].map(str::to_owned));
    let vocab: serde_json::Map<_, _> =
        tokens.iter().enumerate().map(|(id, token)| (token.clone(), id.into())).collect();
    let end = "<|endoftext|>";
    serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": [{"id": 0, "content": end, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true}],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": true},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}]},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": end, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {end: {"id": end, "ids": [0], "tokens": [end]}}},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": [["o", "n"], ["c", "e"], ["on", "ce"], ["Ġ", "t"]]},
    })
    .to_string()
}

#[test]
fn the_tokenizer_of_a_trained_model_goes_through_gguf_with_equal_ids() {
    let own = Tokenizer::from_json_bytes(trained_tokenizer().as_bytes()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (file, back) = (folder.path().join("m.gguf"), folder.path().join("m"));
    let options = ConvertOptions {
        tokenizer: Some(&own),
        embedding_type: Some(Encoding::F16),
        ..gguf(Some(Encoding::I2S))
    };
    run(&model("bitnet-tied-packed-small"), &file, options).unwrap();
    let written = Checkpoint::open(&file).unwrap();
    let metadata = written.gguf_metadata().unwrap();
    assert_eq!(metadata.str("tokenizer.ggml.pre").unwrap(), Some("smollm"));
    assert_eq!(written.info("token_embd.weight").unwrap().encoding, Encoding::F16);
    run(&file, &back, huggingface(None)).unwrap();
    for path in [&file, &back] {
        let found = Tokenizer::of(&Checkpoint::open(path).unwrap()).unwrap();
        for text in TEXTS.into_iter().chain(["once 2026<|endoftext|> there"]) {
            assert_eq!(found.encode(text, true).unwrap(), own.encode(text, true).unwrap(), "{text:?}");
        }
        assert_eq!((found.bos(), found.eos_ids().first()), (own.bos(), own.eos_ids().first()));
    }
}
