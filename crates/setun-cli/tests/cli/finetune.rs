//! `setun finetune`, and what it makes, run.

use super::*;

fn write(folder: &Path, name: &str, text: &str) -> String {
    let path = folder.join(name);
    std::fs::write(&path, text).unwrap();
    path.display().to_string()
}

#[test]
fn a_conversation_is_learnt_by_all_weights_or_by_an_adapter_and_answered() {
    let folder = tempfile::tempdir().unwrap();
    let talk =
        r#"{"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The cat"}]}"#;
    let talk = write(folder.path(), "talk.jsonl", talk);
    let out = |name: &str| folder.path().join(name).display().to_string();
    let (whole, lora, merged) = (out("whole"), out("lora"), out("merged"));
    let small = small();
    let common = ["--data", &talk, "--steps", "60", "--lr", "3e-3", "--seq-len", "64", "--batch", "1"];
    let common = [&common[..], &["--threads", "2", "--json"]].concat();
    let train = |more: &[&str]| json(&[&["finetune", &small], &common[..], more].concat());
    let done = train(&["--out", &whole]);
    assert!(done["loss"].as_f64().unwrap() < 0.1, "{done}");
    let model = format!("{whole}/model");
    let ask = ["--chat", "-p", "Who?", "-n", "12", "--temperature", "0"];
    assert_eq!(stdout(&[&["run", &model], &ask[..]].concat()).trim(), "The cat");

    let done = train(&["--out", &lora, "--lora", "8"]);
    // The frozen head hardly tells the end of a turn from tokens that this model was never trained on.
    assert!(done["loss"].as_f64().unwrap() < 0.4, "{done}");
    let adapter = format!("{lora}/adapter");
    let beside = ["run", &small, "--lora", &adapter];
    assert_eq!(stdout(&[&beside, &ask[..]].concat()).trim(), "The cat");

    let valid = write(folder.path(), "kept.jsonl", "{\"text\": \"The cat sat on the mat.\"}\n");
    let merge =
        json(&["finetune", &small, "--merge", &adapter, "--valid", &valid, "--out", &merged, "--json"]);
    for key in ["held_out_before", "held_out_with_adapter", "held_out"] {
        assert!(merge[key]["loss"].as_f64().unwrap() > 0.0, "{merge}");
    }
    assert!(merge["ternary_weights"].as_u64() > merge["changed"].as_u64(), "{merge}");
    assert!(Path::new(&merged).join("model/config.json").is_file());
}

#[test]
fn pairs_are_preferred_and_what_is_wrong_is_said_before_anything_starts() {
    let folder = tempfile::tempdir().unwrap();
    let pair = r#"{"prompt": "Who?", "chosen": "The cat", "rejected": "A dog"}"#;
    let pairs = write(folder.path(), "pairs.jsonl", pair);
    let (out, small) = (folder.path().join("out").display().to_string(), small());
    let tune = |data: &str, more: &[&str]| {
        let start = ["finetune", &small, "--data", data, "--out", &out, "--batch", "1", "--threads", "2"];
        [&start, more].concat().into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    let fails = |data: &str, more: &[&str], code: i32| {
        let args = tune(data, more);
        let message = failure(&args.iter().map(String::as_str).collect::<Vec<_>>(), code);
        assert!(!Path::new(&out).exists(), "{message}");
        message
    };
    assert!(fails(&pairs, &["--steps", "2"], 1).contains("pairs.jsonl: line 1"));
    assert!(fails("/nonexistent.txt", &[], 1).contains("--data /nonexistent.txt"));
    assert!(
        fails(&pairs, &["--dpo", "--lora", "4", "--lora-targets", "attention"], 1).contains("`attention`")
    );
    fails(&pairs, &["--beta", "1"], 2);
    fails(&pairs, &["--steps", "2", "--epochs", "1"], 2);

    let args = tune(&pairs, &["--dpo", "--steps", "30", "--lr", "1e-3", "--json"]);
    let done = json(&args.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(done["dpo_accuracy"], 1.0, "{done}");
    assert!(done["loss"].as_f64().unwrap() < 2f64.ln(), "{done}");
}
