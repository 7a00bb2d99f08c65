//! Larger files beside the repository, where there are any.

use std::path::{Path, PathBuf};

use setun::format::{
    Checkpoint, Encoding, Llama2cKind, ScaleConvention, hf_packed_to_ternary, mlx_to_ternary,
};

/// A folder beside the repository, or `None`, said aloud.
fn shared(name: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared").join(name);
    if path.exists() {
        return Some(path);
    }
    eprintln!("skipped: ../shared/{name} is not there");
    None
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<_> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    paths.sort();
    paths
}

#[test]
fn collected_small_files_parse_or_are_refused() {
    for folder in ["data/models/gguf-small", "data/models/safetensors"] {
        let Some(folder) = shared(folder) else {
            continue;
        };
        for path in files(&folder) {
            match Checkpoint::open(&path) {
                Ok(file) => eprintln!("{}: {} tensors", path.display(), file.tensors().len()),
                Err(error) => eprintln!("{error}"),
            }
        }
    }
}

#[test]
fn collected_malformed_files_are_survived() {
    let Some(folder) = shared("data/models/gguf-malformed") else {
        return;
    };
    let unpacked = tempfile::tempdir().unwrap();
    for archive in files(&folder) {
        let mut tar = std::process::Command::new("tar");
        let done = tar.arg("xf").arg(&archive).arg("-C").arg(unpacked.path()).status();
        if !done.is_ok_and(|status| status.success()) {
            eprintln!("skipped: cannot unpack {}", archive.display());
            return;
        }
    }
    let mut seen = 0;
    for folder in files(unpacked.path()) {
        for path in files(&folder) {
            if let Ok(file) = Checkpoint::open(&path) {
                for info in file.tensors() {
                    let _ = file.tensor(&info.name).map(|t| t.to_f32().is_ok());
                }
            }
            seen += 1;
        }
    }
    assert!(seen > 100, "{seen} files");
}

#[test]
fn gguf_twins_hold_the_ternary_weights_of_their_packed_checkpoints() {
    let cases = [
        ("bitnet-untied-packed", ScaleConvention::Multiply, false),
        ("bitnet-tied-packed-small", ScaleConvention::Multiply, false),
        ("llama-bitnet-packed", ScaleConvention::Divide, true),
    ];
    for (name, convention, permuted) in cases {
        let Some(folder) = shared(&format!("golden/{name}")) else {
            return;
        };
        let packed = Checkpoint::open(&folder).unwrap();
        let twins = shared(&format!("golden/{name}-gguf")).unwrap();
        let twins = files(&twins).into_iter().filter(|p| p.extension().is_some_and(|e| e == "gguf"));
        for twin in twins {
            let gguf = Checkpoint::open(&twin).unwrap();
            for (theirs, ours) in [
                ("attn_output", "self_attn.o_proj"),
                ("ffn_down", "mlp.down_proj"),
                ("attn_v", "self_attn.v_proj"),
                ("attn_q", "self_attn.q_proj"),
            ] {
                if permuted && theirs == "attn_q" {
                    continue; // Its rows are reordered there; `weights` undoes that.
                }
                let tensor = gguf.tensor(&format!("blk.1.{theirs}.weight")).unwrap();
                assert!(tensor.info.encoding.is_ternary(), "{}", tensor.info.encoding);
                let [out, cols] = tensor.shape().try_into().unwrap();
                let weight = packed.tensor(&format!("model.layers.1.{ours}.weight")).unwrap();
                assert_eq!(weight.info.encoding, Encoding::U8);
                let scale = packed.tensor(&format!("model.layers.1.{ours}.weight_scale")).unwrap();
                let expected = hf_packed_to_ternary(&weight, &scale, convention, out, cols).unwrap();
                let found = tensor.to_ternary().unwrap();
                assert!(found.codes() == expected.codes(), "{} {theirs}", twin.display());
                let mut rows = (vec![0.0; cols], vec![0.0; cols]);
                found.dequantize_row(0, &mut rows.0);
                expected.dequantize_row(0, &mut rows.1);
                for (a, b) in rows.0.iter().zip(&rows.1) {
                    assert!((a - b).abs() <= 5e-3 * b.abs(), "{} {theirs}: {a} and {b}", twin.display());
                }
            }
        }
    }
}

#[test]
fn the_encodings_of_a_bonsai_model_hold_the_same_weights() {
    let models = [
        ("qwen3-tied", "f16", &["q2_0_g64", "q2_0_g128", "pq2_0", "ptq1_0", "tq1_0", "tq2_0"][..]),
        ("qwen3-untied-hd128", "q2_0_g64", &["q2_0_g128", "pq2_0", "ptq1_0"]),
        ("qwen35-basic", "q2_0_g64", &["pq2_0"]),
    ];
    for (model, first, others) in models {
        let Some(folder) = shared(&format!("golden/bonsai/{model}")) else {
            return;
        };
        let reference = Checkpoint::open(folder.join(format!("model-{first}.gguf"))).unwrap();
        for other in others {
            let file = Checkpoint::open(folder.join(format!("model-{other}.gguf"))).unwrap();
            let mut ternary = 0;
            for info in reference.tensors() {
                let expected = reference.tensor(&info.name).unwrap().to_f32().unwrap();
                let tensor = file.tensor(&info.name).unwrap();
                assert!(tensor.to_f32().unwrap() == expected, "{model} {other} {}", info.name);
                if tensor.info.encoding.is_ternary() {
                    let (matrix, mut row) = (tensor.to_ternary().unwrap(), vec![0.0; info.shape[1]]);
                    for (r, expected) in expected.chunks(row.len()).enumerate() {
                        matrix.dequantize_row(r, &mut row);
                        assert!(row == expected, "{model} {other} {} row {r}", info.name);
                    }
                    ternary += 1;
                }
            }
            assert!(ternary >= 14, "{model} {other}: {ternary}");
            assert_eq!(
                file.evidence().len(),
                usize::from(other.starts_with("q2_0")),
                "{:?}",
                file.evidence()
            );
        }
    }
}

#[test]
fn an_mlx_pack_holds_the_weights_of_its_gguf_twin() {
    let Some(folder) = shared("golden/bonsai/qwen3-tied") else {
        return;
    };
    let pack = Checkpoint::open(folder.join("mlx-2bit")).unwrap();
    let twin = Checkpoint::open(folder.join("model-pq2_0.gguf")).unwrap();
    for (theirs, ours) in [
        ("model.embed_tokens", "token_embd.weight"),
        ("model.layers.0.self_attn.q_proj", "blk.0.attn_q.weight"),
        ("model.layers.1.mlp.down_proj", "blk.1.ffn_down.weight"),
    ] {
        let part = |part: &str| pack.tensor(&format!("{theirs}.{part}")).unwrap();
        let found = mlx_to_ternary(&part("weight"), &part("scales"), &part("biases"), 128).unwrap();
        assert_eq!(found, twin.tensor(ours).unwrap().to_ternary().unwrap(), "{theirs}");
    }
}

#[test]
fn published_llama2c_checkpoints_open() {
    let Some(folder) = shared("data/models") else {
        return;
    };
    let float = Checkpoint::open(folder.join("stories260K/stories260K.bin")).unwrap();
    let facts = float.llama2c().unwrap();
    assert_eq!((facts.kind, facts.dim, facts.layers), (Llama2cKind::Float, 64, 5));
    let ternary = Checkpoint::open(folder.join("bitllama2/bit_model_3M.bin")).unwrap();
    let facts = ternary.llama2c().unwrap();
    assert_eq!((facts.kind, facts.dim, facts.layers, facts.tied), (Llama2cKind::Ternary, 256, 8, true));
    for info in ternary.tensors() {
        let tensor = ternary.tensor(&info.name).unwrap();
        if info.encoding == Encoding::Trit2 {
            let zeros = tensor.to_ternary().unwrap().zero_fraction();
            assert!((0.1..0.9).contains(&zeros), "{}: {zeros}", info.name);
        }
    }
    assert!(Checkpoint::open(folder.join("stories260K/tok512.bin")).is_err());
}
