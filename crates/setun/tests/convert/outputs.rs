//! What outputs say of themselves and how they come about: named losses, types of embeddings, split folders, stops.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

#[test]
fn a_loss_that_was_allowed_is_named_in_the_output_and_goes_along() {
    let folder = tempfile::tempdir().unwrap();
    let [a, b, c] = ["a.gguf", "b", "c.gguf"].map(|n| folder.path().join(n));
    let allowed = |options| ConvertOptions { allow_loss: true, ..options };
    let first = run(&model("llama-bitnet-packed"), &a, allowed(gguf(Some(Encoding::TQ2_0)))).unwrap();
    assert!(first.losses[0].contains("ternary scales of 14 tensors rounded"), "{:?}", first.losses);
    let file = Checkpoint::open(&a).unwrap();
    let key = file.gguf_metadata().unwrap().get("setun.convert.losses").unwrap().clone();
    assert_eq!(key.as_array().unwrap().as_strings().unwrap(), first.losses);
    // From here on nothing is lost, but what was stays named.
    let second = run(&a, &b, huggingface(None)).unwrap();
    assert_eq!(second.losses, first.losses);
    let json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(b.join("config.json")).unwrap()).unwrap();
    assert_eq!(json["setun_convert_losses"], serde_json::json!(first.losses));
    let narrowed = ConvertOptions { embedding_type: Some(Encoding::Q4_0), ..gguf(None) };
    let third = run(&b, &c, narrowed).unwrap();
    assert_eq!(third.losses[0], first.losses[0]);
    assert!(third.losses[1].contains("floats of 2 tensors rounded to Q4_0"), "{:?}", third.losses);
    let fourth = ConvertOptions { without_tokenizer: true, force: true, ..gguf(None) };
    let fourth = run(&model("bitnet-tied-packed-small"), &c, fourth).unwrap();
    assert_eq!(fourth.losses, ["the tokenizer, as asked"]);
    // A lossless conversion says nothing.
    assert!(
        run(&model("bitnet-tied-packed-small"), &folder.path().join("d"), gguf(None))
            .unwrap()
            .losses
            .is_empty()
    );
}

#[test]
fn embeddings_of_every_type_offered_are_read_back_and_named_as_a_loss_where_they_are_one() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("a.gguf");
    for (to, lossless) in [
        (Encoding::F32, true),
        (Encoding::F16, false),
        (Encoding::BF16, true),
        (Encoding::Q8_0, false),
        (Encoding::Q6K, false),
        (Encoding::Q4_0, false),
    ] {
        let options = ConvertOptions { embedding_type: Some(to.clone()), force: true, ..gguf(None) };
        let report = run(&model("bitnet-untied-packed"), &out, options).unwrap();
        let file = Checkpoint::open(&out).unwrap();
        for name in ["token_embd.weight", "output.weight"] {
            assert_eq!(file.info(name).unwrap().encoding, to);
        }
        // bf16 values that f16 happens to hold would be no loss either.
        let lost = report.losses.iter().any(|line| line.contains(&format!("rounded to {to}")));
        assert!(lost != lossless || to == Encoding::F16, "{to}: {:?}", report.losses);
        assert_eq!(lost, report.max_error.is_some());
        // And from there they go on as they are, whatever their type.
        let again = folder.path().join("again.gguf");
        let report = run(&out, &again, ConvertOptions { force: true, ..gguf(None) }).unwrap();
        assert!(report.max_error.is_none());
        let (a, b) = (Checkpoint::open(&out).unwrap(), Checkpoint::open(&again).unwrap());
        assert_eq!(a.tensor("output.weight").unwrap().data, b.tensor("output.weight").unwrap().data);
        assert_eq!(b.info("output.weight").unwrap().encoding, to);
    }
}

#[test]
fn folders_are_split_into_files_with_an_index_and_read_back() {
    let folder = tempfile::tempdir().unwrap();
    let [split, whole, file] = ["split", "whole", "m.gguf"].map(|n| folder.path().join(n));
    let source = model("bitnet-untied-packed");
    let of = |size| ConvertOptions { shard_size: Some(size), force: true, ..huggingface(None) };
    let report = run(&source, &split, of(200_000)).unwrap();
    let shards: Vec<String> =
        entries(&split).into_iter().filter(|name| name.ends_with(".safetensors")).collect();
    assert!(shards.len() > 2 && shards[0] == format!("model-00001-of-{:05}.safetensors", shards.len()));
    let index = std::fs::read(split.join("model.safetensors.index.json")).unwrap();
    let index: serde_json::Value = serde_json::from_slice(&index).unwrap();
    assert_eq!(index["weight_map"].as_object().unwrap().len(), report.tensors);
    let stored: usize = Checkpoint::open(&split).unwrap().tensors().map(TensorInfo::stored_bytes).sum();
    assert_eq!(index["metadata"]["total_size"], stored);
    for shard in &shards {
        let largest = std::fs::metadata(split.join(shard)).unwrap().len();
        let tensors = index["weight_map"].as_object().unwrap().values().filter(|v| *v == shard).count();
        assert!(largest < 204_000 || tensors == 1, "{shard}: {largest} bytes, {tensors} tensors");
    }
    assert_eq!(bits(&logits(&split)), bits(&logits(&source)));
    // A split folder goes on like any other, and is replaced whole by one with fewer files.
    run(&split, &file, gguf(None)).unwrap();
    assert_eq!(bits(&logits(&file)), bits(&logits(&source)));
    run(&split, &whole, of(u64::MAX)).unwrap();
    run(&whole, &split, of(u64::MAX)).unwrap();
    let names = entries(&split);
    assert!(
        names.contains(&"model.safetensors".into()) && !names.iter().any(|n| n.contains("-of-")),
        "{names:?}"
    );
    assert_eq!(entries(folder.path()), ["m.gguf", "split", "whole"]);
}

#[test]
fn a_conversion_that_is_stopped_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    for options in [gguf(None), huggingface(None)] {
        for last in [1, 20, 40] {
            let file = Checkpoint::open(model("bitnet-tied-packed-small")).unwrap();
            let (mut seen, stop) = (0, AtomicBool::new(false));
            let options = ConvertOptions { verify: true, stop: Some(&stop), ..options.clone() };
            let error = convert(&file, &folder.path().join("out"), &options, &mut |_| {
                seen += 1;
                stop.store(seen == last, Ordering::Relaxed);
            });
            assert!(error.unwrap_err().to_string().contains("stopped"));
            assert!(entries(folder.path()).is_empty(), "{:?}", entries(folder.path()));
        }
    }
}

#[test]
fn what_a_gguf_file_says_of_itself_survives_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let [named, hf, back] = ["named.gguf", "hf", "back.gguf"].map(|n| folder.path().join(n));
    let file = Checkpoint::open(model("llama-bf16-gguf").join("llama-bf16-q8_0.gguf")).unwrap();
    let mut metadata = file.gguf_metadata().unwrap().clone();
    metadata.insert("general.license", Value::String("apache-2.0".into()));
    metadata.insert("general.name", Value::String("A name".into()));
    let spec = |t: &TensorInfo| TensorSpec {
        name: t.name.clone(),
        shape: t.shape.clone(),
        encoding: t.encoding.clone(),
    };
    let mut writer = GgufWriter::create(&named, &metadata, file.tensors().map(spec).collect()).unwrap();
    while let Some(name) = writer.pending().map(|spec| spec.name.clone()) {
        writer.tensor(&file.tensor(&name).unwrap().data).unwrap();
    }
    writer.finish().unwrap();
    let split = ConvertOptions { shard_size: Some(300_000), ..huggingface(None) };
    run(&named, &hf, split).unwrap();
    assert!(hf.join("model.safetensors.index.json").exists());
    run(&hf, &back, gguf(None)).unwrap();
    let back = Checkpoint::open(&back).unwrap();
    for (key, expected) in [("general.license", "apache-2.0"), ("general.name", "A name")] {
        assert_eq!(back.gguf_metadata().unwrap().str(key).unwrap(), Some(expected));
    }
}

#[test]
fn rotated_weights_are_turned_back_into_a_plain_float_folder_only_when_that_is_allowed() {
    let folder = tempfile::tempdir().unwrap();
    let (source, out) = (golden("bonsai/declaration/ok-v1-explicit.gguf"), folder.path().join("hf"));
    let error = run(&source, &out, huggingface(None)).unwrap_err();
    assert!(error.contains("prism.hadamard") && error.contains("--allow-loss"), "{error}");
    let report = run(&source, &out, ConvertOptions { allow_loss: true, ..huggingface(None) }).unwrap();
    assert!(report.losses[0].contains("prism.hadamard"), "{:?}", report.losses);
    let logits = |path: &Path| {
        let engine = Engine::open(path, &EngineOptions::default()).unwrap();
        assert_eq!(engine.config().activations(), ActivationType::Float);
        let ids: Vec<u32> = (0..20).map(|i| 3 + 7 * i).collect();
        engine.session(KvType::F32, None).feed_all(&ids, None).unwrap().to_vec()
    };
    let (a, b) = (logits(&source), logits(&out));
    let apart = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(apart <= 1e-4, "{apart}");
}

#[test]
fn chat_templates_keep_their_names_and_one_that_is_no_file_name_is_a_named_loss() {
    let folder = tempfile::tempdir().unwrap();
    let [plain, named, out, back] = ["a.gguf", "b.gguf", "hf", "c.gguf"].map(|n| folder.path().join(n));
    run(&model("bitnet-tied-packed-small"), &plain, gguf(None)).unwrap();
    let with = |names: &[&str]| {
        let file = Checkpoint::open(&plain).unwrap();
        let mut metadata = file.gguf_metadata().unwrap().clone();
        metadata.insert("tokenizer.chat_template", Value::String("{{ messages }}".into()));
        for name in names {
            metadata.insert(format!("tokenizer.chat_template.{name}"), Value::String(format!("{name}!")));
        }
        let specs = file.tensors().map(|t| TensorSpec {
            name: t.name.clone(),
            shape: t.shape.clone(),
            encoding: t.encoding.clone(),
        });
        let mut writer = GgufWriter::create(&named, &metadata, specs.collect()).unwrap();
        while let Some(name) = writer.pending().map(|spec| spec.name.clone()) {
            writer.tensor(&file.tensor(&name).unwrap().data).unwrap();
        }
        writer.finish().unwrap();
    };
    let templates = |path: &Path| {
        let tokenizer = Tokenizer::of(&Checkpoint::open(path).unwrap()).unwrap();
        let all = tokenizer.chat_templates().iter().map(|t| (t.name.clone(), t.source.clone()));
        all.collect::<std::collections::BTreeMap<_, _>>()
    };
    with(&["tool_use"]);
    assert!(run(&named, &out, huggingface(None)).unwrap().losses.is_empty());
    assert!(out.join("additional_chat_templates/tool_use.jinja").is_file());
    assert_eq!(templates(&out), templates(&named));
    assert_eq!(templates(&out).len(), 2);
    run(&out, &back, gguf(None)).unwrap();
    assert_eq!(templates(&back), templates(&named));
    with(&["tool_use", "../x"]);
    let options = ConvertOptions { force: true, ..huggingface(None) };
    let error = run(&named, &out, options.clone()).unwrap_err();
    assert!(error.contains("tokenizer.chat_template.../x") && error.contains("--allow-loss"), "{error}");
    let report = run(&named, &out, ConvertOptions { allow_loss: true, ..options }).unwrap();
    assert!(report.losses.len() == 1 && report.losses[0].contains("`../x`"), "{:?}", report.losses);
    assert_eq!(templates(&out).len(), 2);
}
