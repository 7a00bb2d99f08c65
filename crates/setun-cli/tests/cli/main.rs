//! The `setun` program as a user or a script meets it, on small models with known answers.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

mod bench;
mod finetune;
mod info;
mod run;

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
