//! Qwen3 models, ternary throughout and rotated, against values that an independent program computed
//! (golden/bonsai); the same weights as floats and as MLX packs them; norms inside linear layers.
//!
//! The full set beside the project is checked too where it is there. Tolerances: golden/README.md.

mod inner_norms;
mod parity;
mod rotation;
mod unpacked;

use std::path::{Path, PathBuf};

use setun::format::Checkpoint;

/// The fixtures of the repository.
fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/bonsai")
}

/// The full set, or `None`, said aloud.
fn full() -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/golden/bonsai");
    if path.is_dir() {
        return Some(path);
    }
    eprintln!("skipped: ../shared/golden/bonsai is not there");
    None
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

fn argmax(row: &[f32]) -> u32 {
    row.iter().enumerate().fold(0, |best, (i, &x)| if x > row[best] { i } else { best }) as u32
}

fn largest_gap(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    // A NaN is the largest gap there is.
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, |m, gap| if gap <= m { m } else { gap })
}
