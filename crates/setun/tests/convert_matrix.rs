//! Every packing that the fixtures have, or that can be made of them, into every one that is written.
//!
//! A conversion keeps every trit, scale and logit bit for bit, or is refused with a reason that names what would be lost;
//! where a loss can be allowed, the output verifies within it and names it. The tables below say which; they were
//! checked by hand against docs/format.md.

use std::path::{Path, PathBuf};

use setun::convert::{ConvertOptions, ConvertReport, Target, convert, losses};
use setun::engine::{Engine, EngineOptions};
use setun::format::gguf::GgufWriter;
use setun::format::{Checkpoint, Encoding, ScaleConvention, TensorSpec};
use setun::kv_cache::KvType;

/// The targets, in the order of the columns below.
fn targets() -> Vec<(&'static str, ConvertOptions<'static>)> {
    let gguf = |name, linear_type| (name, ConvertOptions { linear_type, ..ConvertOptions::default() });
    let folder = |name, scales, linear_type| {
        let target = Target::HuggingFace;
        (name, ConvertOptions { target, scales, linear_type, ..ConvertOptions::default() })
    };
    vec![
        gguf("gguf", None),
        gguf("i2_s", Some(Encoding::I2S)),
        gguf("tq1_0", Some(Encoding::TQ1_0)),
        gguf("tq2_0", Some(Encoding::TQ2_0)),
        gguf("q2_0", Some(Encoding::Q2_0G64)),
        gguf("q2_0_g128", Some(Encoding::Q2_0G128)),
        gguf("pq2_0", Some(Encoding::PQ2_0)),
        gguf("ptq1_0", Some(Encoding::PTQ1_0)),
        gguf("f32", Some(Encoding::F32)),
        gguf("f16", Some(Encoding::F16)),
        gguf("bf16", Some(Encoding::BF16)),
        gguf("q8_0", Some(Encoding::Q8_0)),
        gguf("q6_k", Some(Encoding::Q6K)),
        gguf("q4_0", Some(Encoding::Q4_0)),
        folder("hf", None, None),
        folder("hf-multiply", Some(ScaleConvention::Multiply), None),
        folder("hf-divide", Some(ScaleConvention::Divide), None),
        folder("hf-f32", None, Some(Encoding::F32)),
        folder("hf-f16", None, Some(Encoding::F16)),
        folder("hf-bf16", None, Some(Encoding::BF16)),
    ]
}

/// What a refusal may say, and whether its loss can be allowed.
const REASONS: [(&str, bool); 15] = [
    ("would be read back as", true),
    ("needs permission to round", true),
    ("weights would be off by", true),
    ("more than one scale", true),
    ("activations", true),
    ("a rotation of weights", true),
    ("not a multiple of", false),
    ("no conversion", false),
    ("extra norm", false),
    ("expect ternary values", false),
    ("dynamic", false),
    ("norm_topk_prob", false),
    ("a stack of experts", false),
    ("gated DeltaNet", false),
    ("a Hugging Face folder holds", false),
];

fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden").join(path)
}

fn logits(path: &Path) -> Vec<u32> {
    let options = EngineOptions { threads: Some(1), ..EngineOptions::default() };
    let engine = Engine::open(path, &options).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let ids: Vec<u32> = (0..12).map(|i| (3 + 7 * i) % engine.config().vocab_size as u32).collect();
    let mut session = engine.session(KvType::F32, None);
    session.feed_all(&ids, None).unwrap().iter().map(|v| v.to_bits()).collect()
}

fn run(input: &Path, output: &Path, options: ConvertOptions) -> Result<ConvertReport, String> {
    let file = Checkpoint::open(input).unwrap();
    let options = ConvertOptions { verify: true, force: true, ..options };
    convert(&file, output, &options, &mut |_| {}).map_err(|e| e.to_string())
}

fn clear(path: &Path) {
    let _ = if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
}

/// `=` exact, `~` rounded as its type asks, `l` refused but possible with a named loss, `x` refused.
fn cell(label: &str, source: &Path, expected: &[u32], output: &Path, target: &ConvertOptions) -> char {
    clear(output);
    let error = match run(source, output, target.clone()) {
        Ok(report) => {
            let seen = report.verified.expect("asked for");
            assert!(seen.tensors > 0 && seen.keys.contains(&"hidden_size"), "{label}");
            assert_eq!(losses(&Checkpoint::open(output).unwrap()).unwrap(), report.losses, "{label}");
            if report.losses.is_empty() {
                assert!(logits(output) == expected, "{label}: other logits");
                return '=';
            }
            assert!(report.max_error.is_some(), "{label}: {:?}", report.losses);
            return '~';
        }
        Err(error) => error,
    };
    assert!(!output.exists(), "{label} left an output");
    let reason = REASONS.iter().find(|(reason, _)| error.contains(reason));
    let (_, allowed) = reason.unwrap_or_else(|| panic!("{label}: no reason in: {error}"));
    let done = run(source, output, ConvertOptions { allow_loss: true, ..target.clone() });
    match (allowed, done) {
        (false, Err(_)) => 'x',
        (true, Ok(report)) => {
            assert!(!report.losses.is_empty() && error.contains("--allow-loss"), "{label}: {error}");
            assert_eq!(losses(&Checkpoint::open(output).unwrap()).unwrap(), report.losses, "{label}");
            'l'
        }
        // A loss was allowed, and then something stood in the way that cannot be.
        (true, Err(second)) => {
            let never = REASONS.iter().any(|(reason, allowed)| !allowed && second.contains(reason));
            assert!(never || second.contains("turned back"), "{label}: {error}; then {second}");
            'x'
        }
        (false, Ok(report)) => panic!("{label}: {error}, yet it was done: {report:?}"),
    }
}

fn row(label: &str, source: &Path, folder: &Path, keep: &mut dyn FnMut(&str, &Path)) -> String {
    let expected = logits(source);
    let mut cells = String::new();
    for (name, options) in targets() {
        let output = folder.join("out");
        let found = cell(&format!("{label} to {name}"), source, &expected, &output, &options);
        cells.push(found);
        if found == '=' {
            keep(name, &output);
        }
    }
    format!("{label:24} {cells}\n")
}

const FIXTURES: [(&str, &str); 20] = [
    ("hf packed, tied", "models/bitnet-tied-packed-small"),
    ("hf packed bf16", "models/bitnet-untied-packed"),
    ("hf packed, divided", "models/llama-bitnet-packed"),
    ("hf masters, norms", "models/llama-bitnet-online-rmsnorm"),
    ("gguf i2_s", "models/bitnet-tied-packed-small-gguf/bitnet-tied-packed-small-i2_s.gguf"),
    ("gguf tq1_0", "models/bitnet-tied-packed-small-gguf/bitnet-tied-packed-small-tq1_0.gguf"),
    ("gguf i2_s llama", "models/llama-bitnet-packed-gguf/llama-bitnet-packed-i2_s-by-bitnetcpp.gguf"),
    ("gguf tq2_0 llama", "models/llama-bitnet-packed-gguf/llama-bitnet-packed-tq2_0.gguf"),
    ("gguf q8_0", "models/llama-bf16-gguf/llama-bf16-q8_0.gguf"),
    ("hf f32", "models/rope-llama-default"),
    ("hf f32 dynamic rope", "models/rope-llama-dynamic"),
    ("llama2.c ternary", "bitllama2/bit_model_3M.bin"),
    ("gguf tq1_0 qwen3", "bonsai/qwen3-tied/model-tq1_0.gguf"),
    ("gguf ptq1_0 qwen3", "bonsai/qwen3-untied-hd128/model-ptq1_0.gguf"),
    ("gguf rotated", "bonsai/declaration/ok-v1-explicit.gguf"),
    ("mlx qwen3", "bonsai/qwen3-tied/mlx-2bit"),
    ("pytorch llama", "pytorch/llama"),
    ("gguf experts", "qwen3-moe/ternary/model-q2_0-g128.gguf"),
    ("hf experts", "qwen3-moe/float"),
    ("gguf pq2_0 hybrid", "bonsai/qwen35-basic/model-pq2_0.gguf"),
];

/// Columns: gguf i2_s tq1_0 tq2_0 q2_0 q2_0_g128 pq2_0 ptq1_0 f32 f16 bf16 q8_0 q6_k q4_0, then hf -multiply -divide -f32
/// -f16 -bf16.
const EXPECTED: &str = "\
hf packed, tied          ===========lxx==lxxx
hf packed bf16           ===========lxx==lxxx
hf packed, divided       ==llllllllllll===xxx
hf masters, norms        ==xxllllxxxxxx==lxxx
gguf i2_s                ===========lxx==lxxx
gguf tq1_0               ===========lxx==lxxx
gguf i2_s llama          ==llllllllllll===xxx
gguf tq2_0 llama         ====llllllllll==lxxx
gguf q8_0                =xxxxxxx=~~=~~====~~
hf f32                   =xxxxxxx=~~xxx====~~
hf f32 dynamic rope      xxxxxxxxxxxxxx====~~
llama2.c ternary         ==llllll=lllxx===xxx
gguf tq1_0 qwen3         =l=========lll=ll===
gguf ptq1_0 qwen3        =lxx======llxl=ll==l
gguf rotated             =lxx======llxllxxlll
mlx qwen3                =l=========lll=ll===
pytorch llama            =xxxxxxx=~~xxx====~~
gguf experts             =xxx======llxl=ll==l
hf experts               xxxxxxxxxxxxxx======
gguf pq2_0 hybrid        =lxx======llxlxxxxxx
";

#[test]
fn every_fixture_into_every_target_is_exact_or_refused_with_its_loss() {
    let folder = tempfile::tempdir().unwrap();
    let table: String = FIXTURES
        .iter()
        .map(|(label, path)| row(label, &fixture(path), folder.path(), &mut |_, _| {}))
        .collect();
    assert_eq!(table, EXPECTED, "\n{table}");
}

const EXPECTED_AGAIN: &str = "\
llama gguf               ====llllllllll==lxxx
llama i2_s               ====llllllllll==lxxx
llama tq1_0              ====llllllllll==lxxx
llama tq2_0              ====llllllllll==lxxx
llama hf                 ====llllllllll==lxxx
llama hf-multiply        ====llllllllll==lxxx
qwen3 gguf               =l=========lll=ll===
qwen3 tq1_0              =l=========lll=ll===
qwen3 tq2_0              =l=========lll=ll===
qwen3 q2_0               =l=========lll=ll===
qwen3 q2_0_g128          =l=========lll=ll===
qwen3 pq2_0              =l=========lll=ll===
qwen3 ptq1_0             =l=========lll=ll===
qwen3 q1_0               =l=========lll=ll===
llama iq2_bn             ====llllllllll===xxx
";

/// `source` with random weights of scale 1/32 in the place of its ternary ones.
fn rewrite(source: &Path, out: &Path, encoding: &Encoding) {
    let file = Checkpoint::open(source).unwrap();
    let specs = file.tensors().map(|t| TensorSpec {
        name: t.name.clone(),
        shape: t.shape.clone(),
        encoding: if t.encoding.is_ternary() { encoding.clone() } else { t.encoding.clone() },
    });
    let mut writer = GgufWriter::create(out, file.gguf_metadata().unwrap(), specs.collect()).unwrap();
    let mut state = 7u32;
    let mut random = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state >> 24
    };
    while let Some(spec) = writer.pending().cloned() {
        if spec.encoding != *encoding {
            writer.tensor(&file.tensor(&spec.name).unwrap().data).unwrap();
            continue;
        }
        let (rows, cols) = (spec.shape[0], spec.shape[1]);
        let mut bytes = Vec::new();
        for _ in 0..rows {
            if *encoding == Encoding::IQ2BN {
                bytes.extend(0.03125f32.to_le_bytes());
                bytes.extend(
                    (0..cols / 4).map(|_| (0..4).map(|n| ((random() % 3) << (2 * n)) as u8).sum::<u8>()),
                );
                continue;
            }
            for _ in 0..cols / 128 {
                bytes.extend(half::f16::from_f32(0.03125).to_le_bytes());
                bytes.extend((0..16).map(|_| random() as u8));
            }
        }
        writer.tensor(&bytes).unwrap();
    }
    writer.finish().unwrap();
}

#[test]
fn every_packing_made_from_a_fixture_goes_into_every_target_alike() {
    let folder = tempfile::tempdir().unwrap();
    let mut table = String::new();
    for (start, path) in [
        ("llama", "models/llama-bitnet-packed-gguf/llama-bitnet-packed-tq2_0.gguf"),
        ("qwen3", "bonsai/qwen3-tied/model-tq1_0.gguf"),
    ] {
        let mut made: Vec<(String, PathBuf)> = Vec::new();
        row(start, &fixture(path), folder.path(), &mut |name, output| {
            // Float copies are floats to their readers.
            if start == "qwen3" && (name.starts_with("hf") || ["f32", "f16", "bf16"].contains(&name)) {
                return;
            }
            let kept = folder.path().join(format!("{start} {name}"));
            std::fs::rename(output, &kept).unwrap();
            made.push((format!("{start} {name}"), kept));
        });
        assert!(made.len() > 4, "{start}: {made:?}");
        for (label, path) in &made {
            table += &row(label, path, folder.path(), &mut |_, _| {});
        }
    }
    // Types that are read but not written: the same models with other weights.
    for (label, path, encoding) in [
        ("qwen3 q1_0", "bonsai/qwen3-tied/model-tq1_0.gguf", Encoding::Q1_0),
        ("llama iq2_bn", "models/llama-bitnet-packed-gguf/llama-bitnet-packed-tq2_0.gguf", Encoding::IQ2BN),
    ] {
        let made = folder.path().join(label);
        rewrite(&fixture(path), &made, &encoding);
        table += &row(label, &made, folder.path(), &mut |_, _| {});
    }
    assert_eq!(table, EXPECTED_AGAIN, "\n{table}");
}
