//! Models that others trained, against the text they are known to write. Skipped where a file is not at hand.

use std::path::{Path, PathBuf};

use setun::config::ActivationType;
use setun::engine::{Engine, EngineOptions};
use setun::kv_cache::KvType;
use setun::tokenizer::Tokenizer;
use setun_kernels::Kernels;

fn data(path: &str) -> Option<PathBuf> {
    let full = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/models").join(path);
    if !full.exists() {
        eprintln!("skipped: {path} is not here");
        return None;
    }
    Some(full)
}

fn greedy(engine: &Engine, prompt: &[u32], steps: usize) -> Vec<u32> {
    let mut session = engine.session(KvType::F32, None);
    session.feed(prompt).unwrap();
    let mut ids = Vec::new();
    while ids.len() < steps {
        let id = engine.kernels().argmax(session.logits()) as u32;
        ids.push(id);
        session.feed(&[id]).unwrap();
    }
    ids
}

#[test]
fn bitllama2_tells_its_known_story() {
    let expected = [
        403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315, 421, 395, 317, 426, 338, 401, 396, 267, 337,
        410, 408, 419, 292, 411, 269, 344, 444, 427, 421, 414, 276, 265, 263, 304, 341, 261, 420, 277, 264,
        311, 426, 385, 328, 432, 358, 394, 261, 370, 432, 352, 266, 268, 388, 426, 338, 286, 384, 393, 269,
        391, 266, 267, 337,
    ];
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/bitllama2");
    let (model, vocabulary) = (folder.join("bit_model_3M.bin"), folder.join("tok512.model"));
    for kernels in Kernels::available() {
        let options = EngineOptions {
            kernels: Some(kernels),
            threads: Some(2),
            activations: Some(ActivationType::Int8),
            ..EngineOptions::default()
        };
        let engine = Engine::open(&model, &options).unwrap();
        let found = greedy(&engine, &[1], expected.len());
        assert_eq!(found, expected, "{}", kernels.name());
    }
    let tokenizer = Tokenizer::from_sentencepiece(&std::fs::read(vocabulary).unwrap()).unwrap();
    let text = tokenizer.decode(&expected, true).unwrap();
    assert!(text.trim_start().starts_with("Once upon a time, there was a little girl named Lily."), "{text}");
}

#[test]
fn stories260k_writes_english() {
    let (Some(model), Some(vocabulary)) =
        (data("stories260K/stories260K.bin"), data("stories260K/tok512.model"))
    else {
        return;
    };
    let engine = Engine::open(&model, &EngineOptions::default()).unwrap();
    let tokenizer = Tokenizer::from_sentencepiece(&std::fs::read(vocabulary).unwrap()).unwrap();
    let text = tokenizer.decode(&greedy(&engine, &[1], 40), true).unwrap();
    assert!(text.contains("Once upon a time, there was a"), "{text}");
}
