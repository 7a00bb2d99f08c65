//! A small hybrid of random floats, written plainly and folded: both compute the same. The plain one's path is held by the
//! references, so this binds the rotation and the order of heads that folded output projections keep.

use setun::config::{HeadOrder, ModelConfig};
use setun::format::gguf::{Array, GgufWriter, Metadata, Value};
use setun::format::{Encoding, TensorSpec};
use setun::kv_cache::KvType;
use setun::ops::{Direction, Rotate};
use setun_kernels::Kernels;

use super::*;

const HIDDEN: usize = 32;
const FFN: usize = 48;
const VOCAB: usize = 24;
const BLOCK: usize = 16;
/// Key heads, value heads of each, and their width.
const KEYS: usize = 2;
const EACH: usize = 3;
const HEAD: usize = 16;
const VALUES: usize = KEYS * EACH * HEAD;
const LAYERS: usize = 4;

#[derive(Clone, Copy, Debug, PartialEq)]
struct Fold {
    version: u32,
    latent: bool,
    /// Output projections keep their heads as they were trained (`gdn_v_grouped`).
    grouped: bool,
    /// Leaves block 1's output projection and gate as they are.
    some: bool,
}

fn tensors(tied: bool) -> Vec<(String, Vec<usize>)> {
    let mut all = vec![
        ("token_embd.weight".to_owned(), vec![VOCAB, HIDDEN]),
        ("output_norm.weight".into(), vec![HIDDEN]),
    ];
    all.extend((!tied).then(|| ("output.weight".into(), vec![VOCAB, HIDDEN])));
    for block in 0..LAYERS {
        let recurrent = [
            ("attn_qkv.weight", vec![2 * KEYS * HEAD + VALUES, HIDDEN]),
            ("attn_gate.weight", vec![VALUES, HIDDEN]),
            ("ssm_alpha.weight", vec![KEYS * EACH, HIDDEN]),
            ("ssm_beta.weight", vec![KEYS * EACH, HIDDEN]),
            ("ssm_conv1d.weight", vec![2 * KEYS * HEAD + VALUES, 4]),
            ("ssm_a", vec![KEYS * EACH]),
            ("ssm_dt.bias", vec![KEYS * EACH]),
            ("ssm_norm.weight", vec![HEAD]),
            ("ssm_out.weight", vec![HIDDEN, VALUES]),
        ];
        let attention = [
            ("attn_q.weight", vec![2 * 4 * HEAD, HIDDEN]),
            ("attn_k.weight", vec![2 * HEAD, HIDDEN]),
            ("attn_v.weight", vec![2 * HEAD, HIDDEN]),
            ("attn_q_norm.weight", vec![HEAD]),
            ("attn_k_norm.weight", vec![HEAD]),
            ("attn_output.weight", vec![HIDDEN, 4 * HEAD]),
        ];
        let both = [
            ("attn_norm.weight", vec![HIDDEN]),
            ("post_attention_norm.weight", vec![HIDDEN]),
            ("ffn_gate.weight", vec![FFN, HIDDEN]),
            ("ffn_up.weight", vec![FFN, HIDDEN]),
            ("ffn_down.weight", vec![HIDDEN, FFN]),
        ];
        let mixer = if block % 2 == 0 { recurrent.to_vec() } else { attention.to_vec() };
        // Block 1 is recurrent too: three kinds of neighbours in four blocks.
        let mixer = if block == 1 { recurrent.to_vec() } else { mixer };
        all.extend(mixer.into_iter().chain(both).map(|(name, shape)| (format!("blk.{block}.{name}"), shape)));
    }
    all
}

fn noise(seed: usize, n: usize, scale: f32) -> Vec<f32> {
    let mut state = (seed as u32).wrapping_mul(2_654_435_761).wrapping_add(7);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next() * scale).collect()
}

fn rotation(width: usize) -> Rotate {
    Rotate { block: BLOCK, signs: Some(noise(width, width, 1.0).into_iter().map(f32::signum).collect()) }
}

fn keys() -> Metadata {
    let mut metadata = Metadata::new();
    metadata.insert("general.architecture", Value::String("qwen35".into()));
    for (key, value) in [
        ("context_length", 64),
        ("embedding_length", HIDDEN),
        ("block_count", LAYERS),
        ("feed_forward_length", FFN),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
        ("attention.key_length", HEAD),
        ("rope.dimension_count", 8),
        ("ssm.conv_kernel", 4),
        ("ssm.state_size", HEAD),
        ("ssm.group_count", KEYS),
        ("ssm.time_step_rank", KEYS * EACH),
        ("ssm.inner_size", VALUES),
    ] {
        metadata.insert(format!("qwen35.{key}"), Value::U32(value as u32));
    }
    let recurrent = Value::Array(Array::Bool(vec![true, true, true, false]));
    metadata.insert("qwen35.attention.recurrent_layers", recurrent);
    metadata.insert("qwen35.attention.layer_norm_rms_epsilon", Value::F32(1e-6));
    metadata.insert("qwen35.rope.freq_base", Value::F32(1e7));
    metadata
}

impl Fold {
    fn of(self, name: &str) -> bool {
        const KINDS: [&str; 11] = [
            "attn_q.",
            "attn_k.",
            "attn_v.",
            "attn_output.",
            "ffn_gate.",
            "ffn_up.",
            "ffn_down.",
            "attn_qkv.",
            "attn_gate.",
            "ssm_out.",
            "output.weight",
        ];
        let left = self.some && ["blk.1.ssm_out.weight", "blk.1.attn_gate.weight"].contains(&name);
        match name {
            "token_embd.weight" => self.latent,
            _ => {
                !left
                    && KINDS
                        .iter()
                        .any(|kind| name.trim_start_matches(|c| c != '.').contains(kind) || name == *kind)
            }
        }
    }

    fn declare(self, metadata: &mut Metadata, names: Vec<String>) {
        let mut put = |key: &str, value: Value| drop(metadata.insert(format!("prism.hadamard.{key}"), value));
        put("version", Value::U32(self.version));
        put("transform", Value::String("normalized-sylvester-walsh-hadamard".into()));
        put("axis", Value::String("input-last-dimension".into()));
        put("block_size", Value::U32(BLOCK as u32));
        put("sign_mode", Value::String("explicit".into()));
        let widths = [HIDDEN, FFN, 4 * HEAD, VALUES];
        let values = widths.iter().flat_map(|&w| rotation(w).signs.unwrap().to_vec());
        put("sign_values", Value::Array(Array::I32(values.map(|s| s as i32).collect())));
        put("sign_widths", Value::Array(Array::I32(widths.map(|w| w as i32).to_vec())));
        put("weight_names", Value::Array(Array::String(names)));
        put("gdn_v_grouped", Value::Bool(self.grouped));
        put("tied_output", Value::Bool(self.version == 2));
        if self.latent {
            put("inverse_weight_names", Value::Array(Array::String(vec!["token_embd.weight".into()])));
        }
    }
}

fn write(path: &Path, tied: bool, fold: Option<Fold>) {
    let tensors = tensors(tied);
    let mut metadata = keys();
    let folded = |name: &str| fold.is_some_and(|fold| fold.of(name));
    if let Some(fold) = fold {
        let names = tensors.iter().map(|(name, _)| name.clone());
        fold.declare(
            &mut metadata,
            names.filter(|name| folded(name) && name != "token_embd.weight").collect(),
        );
    }
    let spec = |(name, shape): &(String, Vec<usize>)| TensorSpec {
        name: name.clone(),
        shape: shape.clone(),
        encoding: Encoding::F32,
    };
    let mut writer = GgufWriter::create(path, &metadata, tensors.iter().map(spec).collect()).unwrap();
    while let Some(spec) = writer.pending().cloned() {
        let at = tensors.iter().position(|(name, _)| *name == spec.name).unwrap();
        let (count, width) = (spec.shape.iter().product(), *spec.shape.last().unwrap());
        let mut values = match spec.name.rsplit('.').nth(1) {
            _ if spec.name.ends_with("ssm_a") => {
                noise(at + 1, count, 1.0).iter().map(|a| -a.abs() - 0.05).collect()
            }
            Some(part) if part.ends_with("norm") => {
                noise(at + 1, count, 0.3).iter().map(|w| w + 1.0).collect()
            }
            Some("ssm_conv1d") => noise(at + 1, count, 0.7),
            _ => noise(at + 1, count, 0.25),
        };
        for row in values.chunks_exact_mut(width).filter(|_| folded(&spec.name)) {
            if spec.name.contains("ssm_out") && fold.is_some_and(|fold| fold.grouped) {
                // From the converter's order of columns to the one in training.
                let tiled = row.to_vec();
                for (k, r, d) in (0..VALUES).map(|i| (i / (EACH * HEAD), i / HEAD % EACH, i % HEAD)) {
                    row[(k * EACH + r) * HEAD + d] = tiled[(r * KEYS + k) * HEAD + d];
                }
            }
            // A row of W · diag(s) · H is H (s ⊙ row), and so is what a lookup turns back.
            rotation(width).apply(Kernels::best(), row, Direction::Forward);
        }
        writer.tensor(&values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>()).unwrap();
    }
    writer.finish().unwrap();
}

fn logits(engine: &Engine) -> Vec<f32> {
    let mut session = engine.session(KvType::F32, None);
    session.feed_all(&[1, 23, 7, 7, 0, 12, 5], None).unwrap().to_vec()
}

#[test]
fn a_folded_hybrid_computes_what_the_plain_one_does_in_either_version_and_order_of_heads() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    for tied in [false, true] {
        write(&path, tied, None);
        let expected = logits(&engine(&path));
        assert!(expected.iter().any(|x| x.abs() > 0.5));
        for (latent, grouped, some) in [
            (true, true, false),
            (true, false, false),
            (true, true, true),
            (false, true, false),
            (false, false, true),
        ] {
            let version = if tied && latent { 2 } else { 1 };
            let fold = Fold { version, latent, grouped, some };
            write(&path, tied, Some(fold));
            let engine = engine(&path);
            let order = if grouped { HeadOrder::Grouped } else { HeadOrder::Tiled };
            assert_eq!(engine.config().hybrid.as_ref().unwrap().order, order);
            let gap = largest_gap(&logits(&engine), &expected);
            assert!(gap < 1e-3, "{fold:?}, tied {tied}: {gap}");
        }
    }
}

#[test]
fn the_flag_for_grouped_heads_changes_the_result_and_belongs_to_hybrids_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    write(&path, false, Some(Fold { version: 1, latent: true, grouped: true, some: false }));
    let file = Checkpoint::open(&path).unwrap();
    let expected = logits(&engine(&path));
    let change = |key: &str, value: Value| {
        let mut metadata = file.gguf_metadata().unwrap().clone();
        metadata.insert(format!("prism.hadamard.{key}"), value);
        ModelConfig::from_gguf(&file, &metadata)
    };
    let wrong = change("gdn_v_grouped", Value::Bool(false)).unwrap();
    let wrong = Engine::load(&file, wrong, &EngineOptions::default()).unwrap();
    assert!(largest_gap(&logits(&wrong), &expected) > 0.1);
    let names = |name: &str| Value::Array(Array::String(vec![name.into()]));
    for name in ["blk.0.ssm_alpha.weight", "blk.3.ssm_out.weight", "blk.0.ssm_conv1d.weight"] {
        let error = change("weight_names", names(name)).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
    }
}

#[test]
fn a_rotated_hybrid_keeps_its_declaration_and_every_value_from_gguf_to_gguf() {
    use setun::convert::{ConvertOptions, convert};
    let folder = tempfile::tempdir().unwrap();
    let (path, output) = (folder.path().join("m.gguf"), folder.path().join("again.gguf"));
    for (grouped, some) in [(true, false), (true, true), (false, false)] {
        write(&path, false, Some(Fold { version: 1, latent: true, grouped, some }));
        let file = Checkpoint::open(&path).unwrap();
        let options = ConvertOptions {
            verify: true,
            without_tokenizer: true,
            force: true,
            ..ConvertOptions::default()
        };
        convert(&file, &output, &options, &mut |_| {}).unwrap();
        let again = Checkpoint::open(&output).unwrap();
        assert_eq!(ModelConfig::of(&again).unwrap(), ModelConfig::of(&file).unwrap());
        for tensor in file.tensors() {
            assert_eq!(floats(&again, &tensor.name), floats(&file, &tensor.name), "{}", tensor.name);
            assert_eq!(again.info(&tensor.name).unwrap().shape, tensor.shape, "{}", tensor.name);
        }
    }
}
