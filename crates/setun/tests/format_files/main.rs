//! Containers and block types: what is read is right, what is wrong is refused by name.

mod blocks;
mod bonsai;
mod gguf;
mod hostile;
mod llama2c;
mod pickle;
mod safetensors;
mod shared;
mod tl;
mod type42;

use std::path::{Path, PathBuf};

use setun::error::ModelError;
use setun::format::Checkpoint;

/// Opens bytes as a checkpoint. They are leaked: tests are few and files are tiny.
fn open(bytes: &[u8]) -> Result<Checkpoint, ModelError> {
    Checkpoint::from_bytes("test", Vec::leak(bytes.to_vec()))
}

/// The message with which bytes are refused.
fn refusal(bytes: &[u8]) -> String {
    let error = open(bytes).expect_err("these bytes must be refused").to_string();
    assert!(!error.contains('\n') && !error.ends_with('.'), "{error}");
    error
}

/// Asserts that bytes are refused with a message that contains every part.
#[track_caller]
fn assert_refused(bytes: &[u8], parts: &[&str]) {
    let error = refusal(bytes);
    for part in parts {
        assert!(error.contains(part), "`{part}` is not in: {error}");
    }
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden").join(name)
}
