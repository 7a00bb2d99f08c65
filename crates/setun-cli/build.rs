//! Tells the compiler whether `models/default.gguf` is there to be embedded.

use std::path::Path;

fn main() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/default.gguf");
    println!("cargo::rustc-check-cfg=cfg(default_model)");
    println!("cargo::rerun-if-changed={}", model.display());
    if model.is_file() {
        println!("cargo::rustc-cfg=default_model");
    }
}
