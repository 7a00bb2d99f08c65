//! Qwen3.5 hybrids, gated DeltaNet layers between gated attention, against values that transformers computed (golden/bonsai).
//!
//! The full set beside the project is checked too where it is there. Tolerances: golden/README.md.

mod files;
mod parity;
mod rotation;

use std::path::{Path, PathBuf};

use setun::engine::{Engine, EngineOptions};
use setun::format::Checkpoint;

/// The fixture of the repository.
fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/bonsai/qwen35-basic")
}

fn gguf() -> PathBuf {
    golden().join("model-pq2_0.gguf")
}

/// The full set's folder, or `None`, said aloud.
fn full() -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/golden/bonsai/qwen35-basic");
    if path.is_dir() {
        return Some(path);
    }
    eprintln!("skipped: ../shared/golden/bonsai/qwen35-basic is not there");
    None
}

fn engine(path: &Path) -> Engine {
    let options = EngineOptions { threads: Some(2), ..EngineOptions::default() };
    Engine::open(path, &options).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn floats(file: &Checkpoint, name: &str) -> Vec<f32> {
    file.tensor(name).unwrap().to_f32().unwrap()
}

fn json(path: &Path) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn ids(list: &serde_json::Value) -> Vec<u32> {
    list.as_array().map_or(Vec::new(), |ids| ids.iter().map(|id| id.as_u64().unwrap() as u32).collect())
}

/// The sequence of 70 tokens.
fn long() -> Vec<u32> {
    ids(&json(&golden().join("expected.json"))["sequences"][5]["tokens"])
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

fn argmax(row: &[f32]) -> u32 {
    row.iter().enumerate().fold(0, |best, (i, &x)| if x > row[best] { i } else { best }) as u32
}

fn largest_gap(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    // A NaN is the largest gap there is.
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, |m, gap| if gap <= m { m } else { gap })
}
