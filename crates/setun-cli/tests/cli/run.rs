//! Texts and conversations.

use super::*;

#[test]
fn greedy_text_is_the_reference_continuation_alone_on_stdout() {
    let greedy = ["-n", "32", "--temperature", "0", "--kv", "f32"];
    let text = stdout(&[&["run", &small(), "-p", PROMPT], &greedy[..]].concat());
    assert!(CONTINUATION.starts_with(&text) || text.starts_with(CONTINUATION), "{text:?}");
    assert!(text.len() > 20, "{text:?}");
    let piped = setun_reading(&[&["run", &small()], &greedy[..]].concat(), &format!("{PROMPT}\n"));
    assert_eq!(text_of(&piped), text, "a piped prompt is the prompt, without its line end");
}

#[test]
fn the_same_model_in_gguf_tells_the_same_text() {
    let gguf = golden("bitnet-tied-packed-small-gguf/bitnet-tied-packed-small-i2_s.gguf");
    let run = |model: &str| stdout(&["run", model, "-p", PROMPT, "-n", "16", "--temperature", "0"]);
    assert_eq!(run(gguf.to_str().unwrap()), run(&small()));
}

#[test]
fn guessing_ahead_changes_the_speed_and_never_the_text() {
    let (model, other) = (small(), golden("bitnet-untied-packed").display().to_string());
    let run = |more: &[&str]| {
        json(&[&["run", &model, "-p", PROMPT, "-n", "80", "--temperature", "0", "--json"], more].concat())
    };
    let off = run(&["--speculate", "off"]);
    assert_eq!(off["speculation"]["guesses"], 0);
    for how in [&["--speculate", "lookup"][..], &["--draft", &model], &[]] {
        let on = run(how);
        assert_eq!(on["ids"], off["ids"], "{how:?}");
        assert!(on["speculation"]["right"].as_u64() > Some(0), "{how:?}: {}", on["speculation"]);
    }
    let error = failure(&["run", &model, "-p", PROMPT, "--draft", &other], 1);
    assert!(
        error.contains("cannot guess for this model: token") && error.contains("same vocabulary"),
        "{error}"
    );
    let hybrid = golden("../bonsai/qwen35-basic/model-pq2_0.gguf").display().to_string();
    for (flag, value) in [("--speculate", "lookup"), ("--draft", &model)] {
        let error = failure(&["run", &hybrid, "-p", "x", flag, value, "--tokenizer", &model], 1);
        assert!(error.contains("recurrent") && error.contains(flag), "{error}");
        assert!(error.contains("leave it out"), "{error}");
    }
}

#[test]
fn same_seed_same_text_on_any_kernel_and_number_of_threads() {
    let run = |more: &[&str]| {
        stdout(&[&["run", &small(), "-p", "It was", "-n", "40", "--seed", "7"], more].concat())
    };
    let text = run(&[]);
    assert_eq!(text, run(&["--threads", "1"]));
    assert_eq!(text, run(&["--threads", "3", "--kernel", "scalar"]));
    for kernel in json(&["bench", "--shape", "tiny", "--prefill", "0", "--decode", "1", "--json"])["machine"]
        ["kernels"]
        .as_array()
        .unwrap()
    {
        assert_eq!(text, run(&["--kernel", kernel.as_str().unwrap()]), "{kernel}");
    }
    let other = stdout(&["run", &small(), "-p", "It was", "-n", "40", "--seed", "8"]);
    assert_ne!(text, other);
}

#[test]
fn a_drawn_seed_is_printed_and_repeats_the_text() {
    let output = setun(&["run", &small(), "-p", "It was", "-n", "20"]);
    let stderr = String::from_utf8(output.stderr.clone()).unwrap();
    let seed = stderr.trim().rsplit(' ').next().unwrap();
    assert_eq!(text_of(&output), stdout(&["run", &small(), "-p", "It was", "-n", "20", "--seed", seed]));
    for part in ["prompt 4 tokens at ", "20 new tokens at ", "first text after ", "memory "] {
        assert!(stderr.contains(part), "{stderr}");
    }
}

#[test]
fn either_head_gives_the_same_text_and_says_what_it_did() {
    let small = small();
    for more in [&["--temperature", "0"][..], &["--top-k", "5"], &["--repeat-penalty", "1.3"]] {
        let told = |head| {
            let args = ["run", &small, "-p", "It was", "-n", "30", "--seed", "7", "--json", "--head", head];
            json(&[&args[..], more].concat())
        };
        let (exact, listed, auto) = (told("exact"), told("shortlist"), told("auto"));
        assert_eq!(exact["ids"], listed["ids"], "{more:?}");
        assert_eq!((&exact["head"]["mode"], &listed["head"]["mode"]), (&"exact".into(), &"shortlist".into()));
        assert_eq!(auto["head"]["mode"], "exact", "a small head is read whole");
        assert!(listed["head"]["mean_rows"].as_f64().is_some());
    }
    assert!(failure(&["run", &small, "-p", "x", "--head", "some"], 2).contains("auto, exact or shortlist"));
}

#[test]
fn run_json_counts_what_it_did() {
    let out = json(&["run", &small(), "-p", "It was", "-n", "5", "--seed", "1", "--json"]);
    assert_eq!(out["new_tokens"], 5);
    assert_eq!(out["ids"].as_array().unwrap().len(), 5);
    assert_eq!((&out["stop"], &out["seed"]), (&"max_tokens".into(), &1.into()));
    for key in ["prefill_tokens_per_s", "decode_tokens_per_s", "seconds_to_first_text"] {
        assert!(out[key].as_f64().unwrap() > 0.0, "{key}");
    }
    assert_eq!(out["text"], stdout(&["run", &small(), "-p", "It was", "-n", "5", "--seed", "1"]));
}

#[test]
fn the_models_recommended_sampling_holds_unless_a_flag_says_otherwise() {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(golden(SMALL)).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_file())
    {
        std::fs::copy(&entry, folder.path().join(entry.file_name().unwrap())).unwrap();
    }
    let model = folder.path().display().to_string();
    let recommend = |text: &str| std::fs::write(folder.path().join("generation_config.json"), text).unwrap();
    recommend(r#"{ "temperature": 0, "top_k": 7 }"#);
    let told = |more: &[&str]| {
        json(&[&["run", &model, "-p", PROMPT, "-n", "20", "--kv", "f32", "--json"], more].concat())
    };
    let greedy = told(&[]);
    assert_eq!((&greedy["temperature"], &greedy["top_k"]), (&0.0.into(), &7.into()));
    assert!(CONTINUATION.starts_with(greedy["text"].as_str().unwrap()), "{greedy}");
    assert_eq!(told(&["--top-k", "3"])["top_k"], 3);
    assert!(stdout(&["info", &model]).contains("recommended: temperature 0, top_k 7"));
    recommend(r#"{ "top_p": 3 }"#);
    let message = failure(&["run", &model, "-p", PROMPT], 1);
    assert!(message.contains("generation_config.json: top_p"), "{message}");
}

#[test]
fn a_stop_string_ends_the_text_before_it() {
    let run = ["run", &small(), "-p", PROMPT, "-n", "32", "--temperature", "0"];
    let whole = stdout(&run);
    let text = stdout(&[&run[..], &["--stop", " and"]].concat());
    assert_eq!(text, whole[..whole.find(" and").unwrap()]);
}

#[test]
fn a_full_context_is_said_and_a_prompt_beyond_it_is_an_error() {
    let output = setun(&["run", &small(), "-p", "It was", "-n", "50", "--context", "10", "--ignore-eos"]);
    assert!(!text_of(&output).is_empty());
    assert!(String::from_utf8_lossy(&output.stderr).contains("the context of 10 tokens is full"));
    let error = failure(&["run", &small(), "-p", "It was", "--context", "2"], 1);
    assert!(error.contains("the context is full") && error.contains("2 positions"), "{error}");
}

#[test]
fn thinking_is_apart_from_the_answer_and_goes_to_stderr() {
    let folder = tempfile::tempdir().unwrap();
    let template = folder.path().join("t.jinja").display().to_string();
    let source = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}\
                  {% if add_generation_prompt and enable_thinking is false %}</think>{% endif %}";
    std::fs::write(&template, source).unwrap();
    let (model, template) = (small(), template.as_str());
    let run = |more: &[&str]| {
        let args = [
            &["run", &model, "-p", PROMPT, "-n", "8", "--temperature", "0", "--chat-template", template],
            more,
        ];
        setun(&args.concat())
    };
    // The template opens a thought, and so short a text does not end it.
    let thinking: Value = serde_json::from_str(&text_of(&run(&["--json"]))).unwrap();
    let thought = thinking["thinking"].as_str().unwrap().to_owned();
    assert_eq!((thinking["text"].as_str(), thought.is_empty()), (Some(""), false));
    let shown = run(&[]);
    assert!(text_of(&shown).is_empty() && String::from_utf8_lossy(&shown.stderr).contains(&thought));
    assert!(!String::from_utf8_lossy(&run(&["--thinking", "hide"]).stderr).contains(&thought));
    let off: Value = serde_json::from_str(&text_of(&run(&["--thinking", "off", "--json"]))).unwrap();
    assert!(off["thinking"].is_null() && !off["text"].as_str().unwrap().is_empty());
}

#[test]
fn conversations_without_a_place_for_what_is_asked_say_so() {
    let note = setun(&["run", "-p", "Hello", "--chat", "-n", "1"]);
    assert!(String::from_utf8_lossy(&note.stderr).contains("no chat template, so the prompt is continued"));
    let error = failure(&["run", "-p", "Hello", "--system", "Be brief.", "-n", "1"], 1);
    assert!(error.contains("--system"), "{error}");
    let template = golden("../chat/templates/alternating.jinja").display().to_string();
    let error = failure(&["run", &small(), "-p", "a", "--system", "b", "--chat-template", &template], 1);
    assert!(error.contains("System role not supported") && error.contains("first message"), "{error}");
    let error = failure(&["run", &small(), "-p", "a", "--chat-template", "rag"], 1);
    assert!(error.contains("`rag`") && error.contains("`default`"), "{error}");
}

#[test]
fn without_arguments_the_default_model_tells_a_story() {
    let output = setun(&[]);
    let story = text_of(&output);
    assert!(story.starts_with("Once upon a time") && story.len() > 100, "{story}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("tok/s"));
}

#[test]
fn the_default_model_tells_one_story_per_seed_on_every_kernel() {
    let story = |kernel: &str, seed: &str| {
        stdout(&[
            "run",
            "-p",
            "Once upon a time",
            "-n",
            "60",
            "--seed",
            seed,
            "--kernel",
            kernel,
            "--threads",
            "2",
        ])
    };
    let names: Vec<&str> = setun_kernels::Kernels::available().map(|k| k.name()).collect();
    for name in &names[1..] {
        assert_eq!(story(names[0], "7"), story(name, "7"), "{name}");
    }
    assert_ne!(story(names[0], "7"), story(names[0], "8"));
}

#[test]
fn a_weight_only_model_computes_as_defined_where_numbers_count_and_says_so_where_speed_does() {
    let model = golden("../bonsai/qwen3-tied/model-tq1_0.gguf").display().to_string();
    let facts = json(&["info", &model, "--json"]);
    assert_eq!(facts["model"]["family"], "qwen3");
    assert_eq!(facts["model"]["activations"], "float");
    assert_eq!(
        facts["odd"].as_array().unwrap().iter().filter(|o| o.to_string().contains("cannot")).count(),
        0
    );

    let folder = tempfile::tempdir().unwrap();
    let (ids, out) = (folder.path().join("ids.json"), folder.path().join("o.safetensors"));
    std::fs::write(&ids, "[[1, 2, 3]]").unwrap();
    let (ids, out) = (ids.display().to_string(), out.display().to_string());
    let defined = json(&["logits", &model, "--tokens", &ids, "--out", &out, "--json"]);
    assert_eq!(defined["activations"], "float");

    let run = ["run", &model, "-p", "a", "-n", "2", "--temperature", "0", "--json"];
    let fast = setun(&run);
    let report: Value = serde_json::from_str(&text_of(&fast)).unwrap();
    assert_eq!(report["activations"], "int8");
    assert!(String::from_utf8_lossy(&fast.stderr).contains("--activations float"));
    let exact = setun(&[&run[..], &["--activations", "float"]].concat());
    let report: Value = serde_json::from_str(&text_of(&exact)).unwrap();
    assert_eq!(report["activations"], "float");
    assert!(!String::from_utf8_lossy(&exact.stderr).contains("note:"));
}

/// A copy of a small model's folder.
fn copy(name: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(golden(name)).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_file()) {
        std::fs::copy(&entry, folder.path().join(entry.file_name().unwrap())).unwrap();
    }
    folder
}

#[test]
fn a_bad_recommended_setting_matters_only_where_no_flag_takes_its_place() {
    let folder = copy(SMALL);
    std::fs::write(folder.path().join("generation_config.json"), r#"{"top_p": 7}"#).unwrap();
    let path = folder.path().to_str().unwrap();
    let error = failure(&["run", path, "-p", PROMPT, "-n", "2"], 1);
    assert!(error.contains("top_p") && error.contains("--top-p"), "{error}");
    stdout(&["run", path, "-p", PROMPT, "-n", "2", "--top-p", "0.9", "--seed", "1"]);
}

#[test]
fn an_embedding_model_gives_hidden_states_and_no_text() {
    let folder = copy("rope-llama-default");
    let config = folder.path().join("config.json");
    let mut settings: Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
    settings["architectures"] = serde_json::json!(["LlamaModel"]);
    settings["tie_word_embeddings"] = true.into();
    std::fs::write(&config, settings.to_string()).unwrap();
    let (path, ids) = (folder.path().to_str().unwrap(), folder.path().join("ids.json"));
    std::fs::write(&ids, "[[1, 2, 3]]").unwrap();
    let ids = ids.to_str().unwrap();
    let tokenizer = golden(SMALL).join("tokenizer.json").display().to_string();
    for args in [&["run", path, "-p", "x", "--tokenizer", &tokenizer][..], &["logits", path, "--tokens", ids]]
    {
        let error = failure(args, 1);
        assert!(error.contains("embedding model") && error.contains("--hidden"), "{error}");
    }
    let values = json(&["logits", path, "--tokens", ids, "--hidden"]);
    assert!(values.get("hidden.final_norm.0").is_some() && values.get("logits.0").is_none());
}
