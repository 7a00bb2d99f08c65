//! What `info` tells.

use super::*;

#[test]
fn info_tells_shape_packing_and_oddities() {
    let info = json(&["info", &small(), "--json"]);
    assert_eq!((&info["model"]["family"], &info["runnable"]), (&"bitnet".into(), &true.into()));
    assert_eq!((&info["model"]["parameters"], &info["model"]["hidden_size"]), (&805_120.into(), &256.into()));
    let packed = &info["packing"]["packed U8"];
    assert_eq!((&packed["tensors"], &packed["elements"]), (&14.into(), &720_896.into()));
    let zeros = info["zero_fraction"].as_f64().unwrap();
    assert!((0.2..0.5).contains(&zeros), "{zeros}");
    let parts = info["bytes_by_part"].as_object().unwrap();
    let sum: u64 = parts.values().map(|v| v.as_u64().unwrap()).sum();
    assert_eq!(Some(sum), info["bytes"].as_u64(), "every byte belongs to a part");
    assert_eq!(info["odd"], serde_json::json!([]));
    assert!(stdout(&["info", &small()]).contains("31.57 % zeros"));
    let bare = json(&["info", golden("rope-llama-yarn").to_str().unwrap(), "--json"]);
    assert!(bare["odd"][0].as_str().unwrap().contains("without a tokenizer"));
}

#[test]
fn a_hybrid_is_described_and_runs_with_the_same_ids_after_its_conversion() {
    let path = golden("../bonsai/qwen35-basic/model-pq2_0.gguf").display().to_string();
    let info = json(&["info", &path, "--json"]);
    let hybrid = &info["model"]["hybrid"];
    assert_eq!(hybrid["recurrent_layers"], serde_json::json!([true, true, true, false]));
    assert_eq!((&info["model"]["family"], &info["runnable"]), (&"qwen3.5".into(), &true.into()));
    assert_eq!((&info["odd"], &info["unused_tensors"]), (&serde_json::json!([]), &serde_json::json!([])));
    assert!(stdout(&["info", &path]).contains("3 of 4 layers are gated DeltaNets"));
    let folder = tempfile::tempdir().unwrap();
    let other = folder.path().join("other.gguf").display().to_string();
    stdout(&["convert", &path, &other, "--to", "gguf", "--type", "ptq1_0", "--verify"]);
    let run = |model: &str| stdout(&["run", model, "-p", "The king", "-n", "8", "--temperature", "0"]);
    assert_eq!(run(&other), run(&path));
    let rows = json(&["bench", &path, "--prefill", "8", "--decode", "4", "--repeats", "1", "--json"]);
    assert_eq!(rows["results"].as_array().map(Vec::len), Some(2));
}

#[test]
fn info_tells_where_facts_bytes_and_ends_come_from() {
    let info = json(&["info", &small(), "--json"]);
    let fact = |name: &str| {
        info["facts"].as_array().unwrap().iter().find(|fact| fact["name"] == name).unwrap()["origin"].clone()
    };
    assert_eq!(
        (fact("width"), fact("sub-norms"), fact("rope scaling")),
        ("file".into(), "family".into(), "default".into())
    );
    let kinds: Vec<_> =
        info["kinds"].as_array().unwrap().iter().map(|kind| kind["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds[..3], ["embed_tokens", "q_proj", "k_proj"]);
    let parts = info["bytes_by_part"].as_object().unwrap();
    assert_eq!(parts.keys().collect::<Vec<_>>(), ["embedding", "attention", "feed_forward", "norms"]);
    let matrix = &info["matrices"][1]["values"];
    let counts = ["minus", "zero", "plus"].map(|key| matrix[key].as_u64().unwrap());
    assert_eq!((matrix["values"].as_str(), counts.iter().sum()), (Some("ternary"), 256 * 256));
    assert_eq!(info["chat"]["turn_end"]["token"], 319);
    assert_eq!(info["ends"][1]["sources"], serde_json::json!(["its name", "the chat template"]));
    let screen = stdout(&["info", &small()]);
    assert!(
        screen.lines().count() <= 45 && screen.lines().all(|line| line.chars().count() <= 100),
        "{screen}"
    );
    assert!(stdout(&["info"]).contains("no chat template"));
}

#[test]
fn info_warns_of_scales_of_end_tokens_and_of_templates_that_cannot_be_right() {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(golden("llama-bitnet-packed")).unwrap().flatten() {
        if entry.path().is_file() {
            std::fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
        }
    }
    let model = folder.path().display().to_string();
    let config = std::fs::read_to_string(folder.path().join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    // The scales of this file divide; a config that says otherwise turns 0.03 into 33.
    config["quantization_config"]["linear_class"] = "autobitlinear".into();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let template = "{% for m in messages %}{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% endfor %}";
    std::fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
    let odd = json(&["info", &model, "--json"])["odd"].to_string();
    for part in ["scales are around 3", "inverse", "`<|im_start|>`, `<|im_end|>`, which are no tokens"] {
        assert!(odd.contains(part), "{part}: {odd}");
    }
}

#[test]
fn info_warns_of_a_rotated_model_whose_file_does_not_say_so() {
    let folder = tempfile::tempdir().unwrap();
    let rotated = folder.path().join("Ternary-Bonsai-2-27B.gguf");
    let odd = |path: &Path| json(&["info", path.to_str().unwrap(), "--json"])["odd"].to_string();
    let plain = golden("../bonsai/qwen3-tied/model-tq1_0.gguf");
    std::fs::copy(&plain, &rotated).unwrap();
    assert!(odd(&rotated).contains("prism.hadamard") && !odd(&plain).contains("prism.hadamard"));
}

#[test]
fn info_describes_what_it_cannot_run_and_draws_it() {
    let model = golden("../bonsai-blocks/type42/g64-many.gguf").display().to_string();
    let folder = tempfile::tempdir().unwrap();
    let picture = folder.path().join("weights.svg").display().to_string();
    let info = json(&["info", &model, "--json", "--plot", &picture]);
    assert_eq!(info["runnable"], false);
    assert!(info["odd"][0].as_str().unwrap().starts_with("cannot be run: "));
    assert!(info["zero_fraction"].as_f64().is_some_and(|zeros| (0.1..0.6).contains(&zeros)));
    assert!(std::fs::read_to_string(&picture).unwrap().contains("of all weights, by layer"));
    assert!(failure(&["info", &model, "--plot", "weights.png"], 2).contains(".svg"));
}
