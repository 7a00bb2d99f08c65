//! Writes a GGUF file of BitNet-b1.58-2B-4T's shape with random I2_S weights, an f16 embedding (1.2 GB) and a vocabulary of bytes and
//! made-up words, to measure loading and generation: `cargo run --release -p setun --example random_model -- FILE && setun run FILE -p "a"`.
//!
//! With `echo` as a second argument the blocks add next to nothing to the embedding, so that the model repeats its last token: text that
//! speculation guesses right, at the speed of any other.

use setun::format::gguf::{Array, GgufWriter, Metadata, Value};
use setun::format::{Encoding, TensorSpec};

const HIDDEN: usize = 2560;
const INNER: usize = 6912;
const LAYERS: usize = 30;
const KV: usize = 640;
const VOCABULARY: usize = 128_256;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path =
        std::env::args().nth(1).filter(|path| !path.starts_with('-')).ok_or("usage: random_model FILE")?;
    let scale: f32 = if std::env::args().nth(2).as_deref() == Some("echo") { 1e-20 } else { 0.02 };
    let mut metadata = Metadata::new();
    metadata.insert("general.architecture", Value::String("bitnet-b1.58".into()));
    for (key, value) in [
        ("vocab_size", VOCABULARY),
        ("context_length", 4096),
        ("embedding_length", HIDDEN),
        ("block_count", LAYERS),
        ("feed_forward_length", INNER),
        ("attention.head_count", 20),
        ("attention.head_count_kv", 5),
        ("rope.dimension_count", 128),
    ] {
        metadata.insert(format!("bitnet-b1.58.{key}"), Value::U32(value as u32));
    }
    metadata.insert("bitnet-b1.58.rope.freq_base", Value::F32(500_000.0));
    metadata.insert("bitnet-b1.58.attention.layer_norm_rms_epsilon", Value::F32(1e-5));
    // Bytes as byte-level BPE spells them: printable ones as themselves, the others from U+0100 on.
    let printable = |byte: u32| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let mut others = 0x100..;
    let bytes =
        (0..=0xff).filter_map(|byte| char::from_u32(if printable(byte) { byte } else { others.next()? }));
    let words = (257..VOCABULARY).map(|n| format!("\u{120}w{n}"));
    let tokens = bytes.map(String::from).chain(["\u{120}w".into()]).chain(words).collect();
    metadata.insert("tokenizer.ggml.model", Value::String("gpt2".into()));
    metadata.insert("tokenizer.ggml.pre", Value::String("gpt-2".into()));
    metadata.insert("tokenizer.ggml.tokens", Value::Array(Array::String(tokens)));
    metadata.insert("tokenizer.ggml.merges", Value::Array(Array::String(vec!["\u{120} w".into()])));

    let spec = |name: String, shape: &[usize], encoding| TensorSpec { name, shape: shape.to_vec(), encoding };
    let mut specs = vec![
        spec("token_embd.weight".into(), &[VOCABULARY, HIDDEN], Encoding::F16),
        spec("output_norm.weight".into(), &[HIDDEN], Encoding::F32),
    ];
    for layer in 0..LAYERS {
        for (name, width) in
            [("attn_norm", HIDDEN), ("attn_sub_norm", HIDDEN), ("ffn_norm", HIDDEN), ("ffn_sub_norm", INNER)]
        {
            specs.push(spec(format!("blk.{layer}.{name}.weight"), &[width], Encoding::F32));
        }
        for (name, shape) in [
            ("attn_q", [HIDDEN, HIDDEN]),
            ("attn_k", [KV, HIDDEN]),
            ("attn_v", [KV, HIDDEN]),
            ("attn_output", [HIDDEN, HIDDEN]),
            ("ffn_gate", [INNER, HIDDEN]),
            ("ffn_up", [INNER, HIDDEN]),
            ("ffn_down", [HIDDEN, INNER]),
        ] {
            specs.push(spec(format!("blk.{layer}.{name}.weight"), &shape, Encoding::I2S));
        }
    }
    let mut writer = GgufWriter::create(path.as_ref(), &metadata, specs)?;
    let mut state = 1u64;
    let mut random = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 33
    };
    while let Some(spec) = writer.pending().cloned() {
        let count: usize = spec.shape.iter().product();
        let bytes: Vec<u8> = match spec.encoding {
            Encoding::F32 => 1f32.to_le_bytes().repeat(count),
            // Between ± 0.0078 and ± 0.03: exponents 8 and 9.
            Encoding::F16 => {
                (0..count).flat_map(|_| (0x2000 | random() as u16 & 0x87ff).to_le_bytes()).collect()
            }
            // Four codes of 0 to 2, then the scale and its padding.
            _ => {
                let code = |bits: u64| (bits % 3) as u8;
                let byte = |r: u64| code(r) | code(r >> 7) << 2 | code(r >> 14) << 4 | code(r >> 21) << 6;
                let codes = (0..count / 4).map(|_| byte(random()));
                codes.chain(scale.to_le_bytes()).chain([0; 28]).collect()
            }
        };
        writer.tensor(&bytes)?;
    }
    writer.finish()?;
    Ok(())
}
