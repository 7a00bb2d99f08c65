//! Folders whose files contradict each other are refused, with the field that decides.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use setun::config::ModelConfig;
use setun::convert::{ConvertOptions, convert};
use setun::format::Checkpoint;
use setun::weights::Weights;

/// A copy of a golden folder with a changed `config.json`, and what its weights are refused with.
fn refusal(model: &str, change: impl Fn(&mut Value)) -> Option<String> {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/models").join(model);
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap).filter(|e| e.path().is_file()) {
        fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    let path = folder.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut config);
    fs::write(&path, config.to_string()).unwrap();
    let file = Checkpoint::open(folder.path()).unwrap();
    let config = ModelConfig::of(&file).unwrap();
    let weights = Weights::new(&file, &config);
    weights.check_all_used().and_then(|()| weights.check_scale_convention()).err().map(|e| e.to_string())
}

#[test]
fn scales_that_make_sense_only_under_the_other_convention_are_refused() {
    let class = |name: &'static str| {
        move |config: &mut Value| config["quantization_config"]["linear_class"] = json!(name)
    };
    for (model, right, wrong) in [
        ("llama-bitnet-packed", "bitlinear", "autobitlinear"),
        ("bitnet-untied-packed", "autobitlinear", "bitlinear"),
    ] {
        assert_eq!(refusal(model, class(right)), None);
        let error = refusal(model, class(wrong)).expect("refused");
        assert!(error.contains("linear_class") && error.contains(&format!("`{right}`")), "{error}");
    }
}

#[test]
fn a_head_beside_a_tied_embedding_is_a_copy_of_it_or_refused() {
    let error = refusal("llama-bitnet-packed", |config| config["tie_word_embeddings"] = json!(true))
        .expect("refused");
    assert!(error.contains("`lm_head.weight`") && error.contains("tie_word_embeddings"), "{error}");
}

#[test]
fn a_vocabulary_with_a_huge_id_is_refused_before_a_list_is_made_of_it() {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/models/llama-bitnet-packed");
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap).filter(|e| e.path().is_file()) {
        fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    let path = folder.path().join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    tokenizer["model"]["vocab"]["zzzz"] = json!(1u32 << 31);
    fs::write(&path, tokenizer.to_string()).unwrap();
    let file = Checkpoint::open(folder.path()).unwrap();
    let out = tempfile::tempdir().unwrap();
    let error =
        convert(&file, &out.path().join("m.gguf"), &ConvertOptions::default(), &mut |_| {}).unwrap_err();
    assert!(error.to_string().contains("belongs to another model"), "{error}");
}
