//! Continues a text from Rust: `cargo run --release -p setun --example generate models/default.gguf "Once upon a time"`.

use setun::engine::{Engine, EngineOptions};
use setun::format::Checkpoint;
use setun::generate::{Limits, generate};
use setun::kv_cache::KvType;
use setun::sampler::{Sampler, Sampling};
use setun::tokenizer::Tokenizer;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(path), Some(prompt)) = (args.next(), args.next()) else {
        return Err("usage: generate MODEL PROMPT".into());
    };
    let tokenizer = Tokenizer::of(&Checkpoint::open(&path)?)?;
    let engine = Engine::open(&path, &EngineOptions::default())?;
    let mut session = engine.session(KvType::F16, None);
    let mut sampler = Sampler::new(Sampling { seed: 1, ..Sampling::default() })?;
    let limits = Limits { max_tokens: 200, stop_ids: tokenizer.eos_ids().to_vec() };
    let ids = tokenizer.encode_prompt(&prompt)?;
    let report = generate(&mut session, &tokenizer, &ids, &mut sampler, &limits, &mut |text| {
        print!("{text}");
        true
    })?;
    println!("\n{:.0} tokens/s", report.decode_rate());
    Ok(())
}
