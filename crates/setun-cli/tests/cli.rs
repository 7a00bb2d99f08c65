//! The `setun` program as a user or a script meets it, on small models with known answers.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

const SMALL: &str = "bitnet-tied-packed-small";
/// With its continuation as `transformers` computed it (golden/models/bitnet-tied-packed-small/expected/info.json).
const PROMPT: &str = "Dick returned, one after another of the trio took the pan";
const CONTINUATION: &str = "ce, and it, and it, and it, and it, and it, and it, and it's";

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/models").join(name)
}

fn small() -> String {
    golden(SMALL).display().to_string()
}

fn setun(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_setun"));
    command.env("HF_HUB_OFFLINE", "1").env("HF_HOME", "/nonexistent"); // No test of this file asks a hub.
    command.args(args).stdin(Stdio::null()).output().unwrap()
}

fn setun_reading(args: &[&str], input: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_setun"));
    let pipes = command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = pipes.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

/// Stdout of a run that must succeed.
fn stdout(args: &[&str]) -> String {
    text_of(&setun(args))
}

fn text_of(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn json(args: &[&str]) -> Value {
    serde_json::from_str(&stdout(args)).unwrap()
}

/// Stderr of a run that must fail with `code`, without a panic and without text on stdout.
fn failure(args: &[&str], code: i32) -> String {
    let output = setun(args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
    assert!(output.stdout.is_empty(), "{args:?} printed {:?}", String::from_utf8_lossy(&output.stdout));
    assert!(!stderr.contains("panicked"), "{stderr}");
    stderr
}

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
    let error = failure(&["run", &hybrid, "-p", "x", "--speculate", "lookup", "--tokenizer", &model], 1);
    assert!(error.contains("recurrent") && error.contains("--speculate off"), "{error}");
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
fn wrong_usage_exits_with_2_and_failures_with_1() {
    let small = small();
    for (args, code, said) in [
        (&["run", &small, "-p", "x", "--kernel", "sse9"][..], 2, "this CPU runs"),
        (&["run", &small, "-p", "x", "--no-such-flag"], 2, "--no-such-flag"),
        (&["run", &small, "-p", "x", "--temperature", "-1"], 2, "temperature"),
        (&["run", &small, "-p", "x", "--top-p", "2"], 2, "top_p"),
        (&["run", &small, "-p", "x", "--threads", "0"], 2, "1 to 1024"),
        (&["run", &small], 2, "no prompt"),
        (&["run", &small, "-p", "x", "--seed", "-1"], 2, "invalid value '-1' for '--seed"),
        (&["run", &small, "-p", "x", "--min-p", "-1"], 2, "min_p"),
        (&["bench", "--shape", "9t"], 2, "known shapes"),
        (&["bench", "--shape", "tiny", "--prefill", "100000000000"], 2, "0 to 131072"),
        (&["bench", "--shape", "tiny", "--decode", "18446744073709551615"], 2, "0 to 131072"),
        (&["bench", "--shape", "tiny", "--depth", "10000000000"], 2, "0 to 131072"),
        (&["bench", "--shape", "tiny", "--kernel", "sse9"], 2, "sse9"),
        (&["bench", "--shape", "tiny", "--batch", "0"], 2, "1 to 1024"),
        (&["bench", "--shape", "tiny", "--svg", "roof.png"], 2, ".svg"),
        (&["bench", "--ladder", "--shape", "tiny", "--threads", "1,2"], 2, "--threads"),
        (&["tokenize", &small, "--decode", "1 x"], 2, "`x` is not a token id"),
        (&["run", "no/such/model", "-p", "x"], 1, "no/such/model"),
        (&["run", "someone/some-model", "-p", "x"], 1, "HF_HUB_OFFLINE"),
        (&["logits", &small, "--tokens", "no-such.json"], 1, "no-such.json"),
    ] {
        let error = failure(args, code);
        assert!(error.contains(said), "{args:?}: {error}");
        assert!(error.starts_with("error: "), "{error}");
        assert!(code == 2 || error.trim_end().lines().count() == 1, "{error}");
    }
}

#[test]
fn truncated_and_foreign_files_are_errors_that_name_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let whole =
        std::fs::read(golden("bitnet-tied-packed-small-gguf/bitnet-tied-packed-small-i2_s.gguf")).unwrap();
    for (name, bytes) in [
        ("cut.gguf", &whole[..whole.len() / 2]),
        ("header.gguf", &whole[..40]),
        ("empty.gguf", &[]),
        ("text.gguf", b"hello, I am no model"),
    ] {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let path = path.to_str().unwrap();
        for command in ["run", "info", "logits", "bench"] {
            let more: &[&str] = match command {
                "run" => &["-p", "x"],
                "logits" => &["--tokens", "x.json"],
                _ => &[],
            };
            let error = failure(&[&[command, path], more].concat(), 1);
            assert!(error.contains(if command == "logits" { "x.json" } else { name }), "{command}: {error}");
        }
    }
}

#[test]
fn a_model_without_a_tokenizer_says_how_to_name_one() {
    let model = golden("rope-llama-default").display().to_string();
    let error = failure(&["run", &model, "-p", "x"], 1);
    assert!(error.contains("--tokenizer FILE"), "{error}");
}

#[test]
fn logits_have_the_stated_names_and_shapes() {
    let folder = tempfile::tempdir().unwrap();
    let (ids, out) = (folder.path().join("ids.json"), folder.path().join("o.safetensors"));
    std::fs::write(&ids, "[[317, 1, 2], [5]]").unwrap();
    let (ids, out_name) = (ids.to_str().unwrap(), out.to_str().unwrap());
    let args = ["logits", &small(), "--tokens", ids, "--out", out_name, "--hidden", "--json"];
    assert_eq!(json(&args)["tokens"], 4);
    let bytes = std::fs::read(&out).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    for (n, tokens) in [3, 1].into_iter().enumerate() {
        assert_eq!(file.tensor(&format!("logits.{n}")).unwrap().shape(), [tokens, 320]);
        for name in ["embed", "layer0", "layer1", "final_norm"] {
            let hidden = file.tensor(&format!("hidden.{name}.{n}")).unwrap();
            assert_eq!((hidden.shape(), hidden.dtype()), (&[tokens, 256][..], safetensors::Dtype::F32));
        }
    }
    assert_eq!(file.names().len(), 10);

    let json = json(&["logits", &small(), "--tokens", ids]);
    let binary: Vec<f32> = file
        .tensor("logits.0")
        .unwrap()
        .data()
        .chunks(4)
        .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
        .collect();
    let rows = json["logits.0"].as_array().unwrap();
    let flat = rows.iter().flat_map(|row| row.as_array().unwrap()).map(|v| v.as_f64().unwrap() as f32);
    assert!(flat.eq(binary), "JSON and safetensors hold the same numbers");
}

#[test]
fn bad_token_files_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    for (text, said) in [
        ("[]", "no sequence"),
        ("[1, 2]", "list of lists"),
        ("[[1], []]", "sequence 1"),
        ("[[320]]", "token id 320 is outside the vocabulary of 320"),
        ("[[1]", "list of lists"),
    ] {
        let ids = folder.path().join("ids.json");
        std::fs::write(&ids, text).unwrap();
        let error = failure(&["logits", &small(), "--tokens", ids.to_str().unwrap()], 1);
        assert!(error.contains(said), "{text}: {error}");
    }
}

#[test]
fn tokenize_and_back_is_the_same_text() {
    let text = "  naïve café\n\n12345";
    let ids = stdout(&["tokenize", &small(), text, "--ids", "--no-special"]);
    assert_eq!(stdout(&["tokenize", &small(), "--decode", ids.trim()]), format!("{text}\n"));
    let with_bos = json(&["tokenize", &small(), "Hello world", "--json"]);
    assert_eq!(with_bos["ids"], serde_json::json!([317, 39, 68, 280, 78, 262, 285, 312]));
    assert_eq!(with_bos["tokens"][0], "<|begin_of_text|>");
    let piped = text_of(&setun_reading(&["tokenize", &small(), "-", "--json"], "Hello world"));
    assert_eq!(serde_json::from_str::<Value>(&piped).unwrap(), with_bos);
}

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
fn errors_name_the_flag_that_decides() {
    let model = golden("../bonsai-blocks/type42/ambiguous-one-row.gguf").display().to_string();
    let info = stdout(&["info", &model]);
    assert!(info.contains("its one") && !info.contains("option `type42`"), "{info}");
}

#[test]
fn the_attribution_of_the_default_model_travels_with_the_program() {
    let works = stdout(&["info", "--attribution"]);
    for licence in ["CDLA-Sharing-1.0", "creativecommons.org/licenses/by/4.0", "public domain in the US"] {
        assert!(works.contains(licence), "{licence}");
    }
    assert!(stdout(&["info"]).contains("setun info --attribution"));
    assert!(!stdout(&["info", &small()]).contains("--attribution"));
}

#[test]
fn bench_json_has_the_stated_keys() {
    let args = ["bench", "--shape", "tiny", "--prefill", "32", "--decode", "4", "--repeats", "1", "--json"];
    let out = json(&args);
    for key in ["load_seconds", "peak_rss_bytes", "read_gb_per_s", "int8_gmac_per_s"] {
        assert!(out[key].as_f64().unwrap() > 0.0, "{key}");
    }
    assert!(out["machine"].is_object() && out["model"].is_object());
    let results = out["results"].as_array().unwrap();
    let phases: Vec<_> =
        results.iter().map(|r| (r["phase"].as_str().unwrap(), r["tokens"].as_u64().unwrap())).collect();
    assert_eq!(phases, [("prefill", 32), ("decode", 4)]);
    for r in results {
        assert_eq!(r["batch"], 1);
        assert!(r["kernel"].is_string() && r["threads"].as_u64().unwrap() >= 1);
        for key in ["tokens_per_s", "bytes_per_token", "share"] {
            assert!(r[key].as_f64().unwrap() > 0.0, "{key}");
        }
    }
    let table = stdout(&["bench", &small(), "--prefill", "16", "--decode", "4", "--repeats", "1"]);
    assert!(table.contains("% of read bandwidth") && table.contains("% of arithmetic"), "{table}");
}

#[test]
fn bench_measures_batches_and_depths_and_draws_them() {
    let folder = tempfile::tempdir().unwrap();
    let svg = folder.path().join("roof.svg").display().to_string();
    let mut args =
        vec!["bench", "--shape", "tiny", "--prefill", "0", "--decode", "2", "--repeats", "1", "--json"];
    args.extend(["--batch", "1,3", "--depth", "4,9", "--svg", &svg]);
    let out = json(&args);
    let results = out["results"].as_array().unwrap();
    let of = |key: &str| results.iter().map(|r| r[key].as_u64().unwrap()).collect::<Vec<_>>();
    assert_eq!((of("batch"), of("depth")), (vec![1, 3, 1, 3], vec![4, 4, 9, 9]));
    let number = |at: usize, key: &str| results[at][key].as_f64().unwrap();
    assert!(number(0, "weight_bytes_per_token") > 2.9 * number(1, "weight_bytes_per_token"));
    assert!(number(2, "kv_bytes_per_token") > number(0, "kv_bytes_per_token"));
    assert!(
        out["warnings"].is_array() && out["energy_estimate_per_token"]["joules_7nm"].as_f64().unwrap() > 0.0
    );
    let picture = std::fs::read_to_string(&svg).unwrap();
    assert!(picture.starts_with("<svg") && picture.contains("3 at once after 9"));
}

#[test]
fn the_ladder_has_every_rung_that_the_shape_allows_and_names_the_others() {
    let folder = tempfile::tempdir().unwrap();
    let svg = folder.path().join("ladder.svg").display().to_string();
    let lengths = ["--prefill", "4", "--decode", "1", "--repeats", "1"];
    let mut args = vec!["bench", "--ladder", "--shape", "tiny", "--json", "--svg", &svg];
    args.extend(lengths);
    let out = json(&args);
    let names = |key: &str| {
        out[key]
            .as_array()
            .unwrap()
            .iter()
            .map(|r| r["weights"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(names("rungs"), ["F32", "F16", "BF16", "ternary"]);
    assert_eq!(names("skipped"), ["Q8_0", "Q4_0"]);
    assert!(std::fs::read_to_string(&svg).unwrap().contains("ternary"));
    let mut args = vec!["bench", "--ladder", "--shape", "tiny"];
    args.extend(lengths);
    assert!(stdout(&args).contains("Energy is an estimate"));
}

#[test]
fn closed_stdout_ends_quietly() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_setun"));
    command.args(["run", &small(), "-p", "It was", "-n", "400", "--ignore-eos"]).stdin(Stdio::null());
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

#[test]
fn every_command_explains_itself() {
    for command in ["run", "info", "logits", "tokenize", "bench", "train", "convert"] {
        let help = stdout(&[command, "--help"]);
        assert!(help.contains("Example"), "{command}: no example");
    }
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
fn perplexity_of_the_default_model_on_a_simple_story_is_low_and_does_not_depend_on_the_kernel() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(
        file.path(),
        "Once upon a time, there was a little girl named Lily. She loved to play with her toys.",
    )
    .unwrap();
    let path = file.path().display().to_string();
    let found = |kernel: &str| json(&["eval", "ppl", "--file", &path, "--json", "--kernel", kernel]);
    let best = found(setun_kernels::Kernels::best().name());
    assert!(best["perplexity"].as_f64().unwrap() < 20.0, "{best}");
    assert_eq!(best["perplexity"], found("scalar")["perplexity"]);
    assert_eq!(best["protocol"], "strided");
}

#[test]
fn plots_of_runs_are_svg_and_a_missing_run_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("first");
    std::fs::create_dir(&run).unwrap();
    let lines = "{\"step\":1,\"tokens\":10,\"loss\":5.0}\n{\"step\":2,\"tokens\":20,\"loss\":4.0}\n";
    std::fs::write(run.join("metrics.jsonl"), lines).unwrap();
    let (run, picture) = (run.display().to_string(), folder.path().join("p.svg"));
    stdout(&["plot", &run, "--out", &picture.display().to_string()]);
    let svg = std::fs::read_to_string(&picture).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("first"), "{svg}");
    assert!(failure(&["plot", "no-such-run", "-o", "x.svg"], 1).contains("no-such-run"));
}

#[test]
fn a_text_too_short_to_score_is_an_error_that_names_the_file() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().display().to_string();
    let error = failure(&["eval", "ppl", "--file", &path], 1);
    assert!(error.contains(&path) && error.contains("at least 2"), "{error}");
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

#[test]
fn weights_says_what_float_matrices_are() {
    let path = golden("rope-llama-default").display().to_string();
    assert_eq!(json(&["info", &path, "--json"])["model"]["numerics"], "float");
    assert_eq!(json(&["info", &path, "--json", "--weights", "float"])["model"]["numerics"], "float");
    let error =
        json(&["info", &path, "--json", "--weights", "ternary"])["odd"][0].as_str().unwrap().to_owned();
    assert!(error.contains("not ternary") && error.contains("layers.0"), "{error}");
    assert!(failure(&["info", &path, "--weights", "binary"], 2).contains("float or ternary"));
    let pickles =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/pytorch/llama").display().to_string();
    assert_eq!(json(&["info", &pickles, "--json"])["container"], "PyTorch");
    let mlx = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../golden/bonsai/qwen3-tied/mlx-2bit")
        .display()
        .to_string();
    let facts = json(&["info", &mlx, "--json"]);
    assert_eq!(facts["packing"]["MLX 2-bit"]["tensors"], 15);
    assert!(facts["model"]["numerics"].as_str().unwrap().starts_with("W1.58A16"), "{facts}");
}

#[cfg(unix)]
#[test]
fn a_disk_that_refuses_more_bytes_ends_in_a_message_and_no_half_file() {
    let folder = tempfile::tempdir().unwrap();
    for (to, out) in [("gguf", "m.gguf"), ("hf", "m")] {
        let out = folder.path().join(out);
        // Files may have 50 KiB, the model needs 300.
        let script = "ulimit -f 100; trap '' XFSZ; exec \"$0\" \"$@\"";
        let mut command = Command::new("sh");
        command.args(["-c", script, env!("CARGO_BIN_EXE_setun"), "convert", &small()]);
        let output = command.arg(&out).args(["--to", to]).stdin(Stdio::null()).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert!(error.contains("cannot write") && error.contains("File too large"), "{error}");
        assert!(error.contains(&out.display().to_string()) && !error.contains(".converting"), "{error}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}

#[test]
fn convert_refuses_a_loss_by_name_and_prints_the_one_that_was_allowed() {
    let folder = tempfile::tempdir().unwrap();
    let (source, out) = (golden("llama-bitnet-packed"), folder.path().join("m.gguf").display().to_string());
    let source = source.display().to_string();
    let args = ["convert", &source, &out, "--to", "gguf", "--type", "tq2_0", "--verify"];
    assert!(failure(&args, 1).contains("half precision"));
    let done = setun(&[&args[..], &["--allow-loss", "--json"]].concat());
    let report: Value = serde_json::from_str(&text_of(&done)).unwrap();
    let said = String::from_utf8(done.stderr).unwrap();
    let loss = report["losses"][0].as_str().unwrap();
    assert!(said.contains(&format!("loss: {loss}")) && loss.contains("ternary scales"), "{said}");
    assert_eq!(json(&["info", &out, "--json"])["losses"], report["losses"]);
    assert!(stdout(&["info", &out]).contains("ternary scales"));
    let keys = report["verified"]["keys"].as_array().unwrap();
    assert!(keys.len() > 20 && said.contains(&format!("{} facts", keys.len())), "{said}");
    for (wrong, hint) in [(["--shard-size", "big"], "5GB"), (["--type", "tl1"], "tq1_0")] {
        let args = ["convert", &source, &out, "--to", "hf", wrong[0], wrong[1]];
        assert!(failure(&args, 2).contains(hint));
    }
}
