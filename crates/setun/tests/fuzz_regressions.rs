//! Inputs that once crashed, hung or took too much memory, replayed without a fuzzer; and the fuzzers' own entry points
//! on whole fixtures, so that they are known to reach what they are for.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

#[path = "../../../fuzz/src/drive.rs"]
mod drive;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn replay(target: &str, run: fn(&[u8]) -> bool) {
    let folder = root().join("fuzz/regressions").join(target);
    let mut paths: Vec<PathBuf> = std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().path()).collect();
    paths.sort();
    for path in paths {
        let started = Instant::now();
        run(&std::fs::read(&path).unwrap());
        // A hang is what this is to find; the machine may be slow and the code not optimised.
        assert!(started.elapsed() < Duration::from_secs(30), "{}: {:?}", path.display(), started.elapsed());
    }
}

#[test]
fn past_findings_in_gguf_files_stay_fixed() {
    replay("gguf", drive::gguf);
}

#[test]
fn past_findings_in_safetensors_folders_stay_fixed() {
    replay("safetensors", drive::safetensors);
}

#[test]
fn past_findings_in_tokenizers_stay_fixed() {
    replay("tokenizer_json", drive::tokenizer_json);
}

#[test]
fn past_findings_in_chat_templates_stay_fixed() {
    replay("chat_template", drive::chat_template);
}

#[test]
fn the_entry_points_run_whole_models() {
    let gguf = root().join("golden/models/bitnet-tied-packed-small-gguf/bitnet-tied-packed-small-i2_s.gguf");
    let bytes = std::fs::read(&gguf).unwrap();
    assert!(drive::gguf(&bytes));
    assert!(drive::tokenizer_json(&bytes));
    let folder = root().join("golden/models/bitnet-tied-packed-small");
    let mut records = Vec::new();
    for (number, name) in drive::NAMES.iter().enumerate() {
        if let Ok(bytes) = std::fs::read(folder.join(name)) {
            records.push(number as u8);
            records.extend((bytes.len() as u32).to_le_bytes());
            records.extend(bytes);
        }
    }
    assert!(drive::safetensors(&records));
    assert!(drive::tokenizer_json(&std::fs::read(folder.join("tokenizer.json")).unwrap()));
    assert!(drive::chat_template(&std::fs::read(folder.join("chat_template.jinja")).unwrap()));
}
