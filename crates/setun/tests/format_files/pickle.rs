//! PyTorch checkpoints, written by PyTorch itself (golden/pytorch), and what must not be read of them.

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use setun::format::{Checkpoint, CheckpointKind, Encoding};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/pytorch")
}

fn open(name: &str) -> Result<Checkpoint, String> {
    Checkpoint::open(golden().join(name)).map_err(|e| e.to_string())
}

#[test]
fn every_kind_of_tensor_has_the_bytes_that_safetensors_has() {
    let expected = open("tensors.safetensors").unwrap();
    for name in ["tensors.pt", "wrapped.pth", "protocol4.pt"] {
        let file = open(name).unwrap();
        assert_eq!(file.kind(), CheckpointKind::PyTorch);
        for wanted in expected.tensors() {
            let found = file.tensor(&wanted.name).unwrap_or_else(|e| panic!("{name}: {e}"));
            let wanted = expected.tensor(&wanted.name).unwrap();
            assert_eq!(
                (found.shape(), &found.info.encoding),
                (wanted.shape(), &wanted.info.encoding),
                "{name}"
            );
            assert_eq!(found.data, wanted.data, "{name}: {}", wanted.name());
        }
    }
}

#[test]
fn what_is_no_tensor_or_lies_deeper_is_told() {
    let file = open("tensors.pt").unwrap();
    assert!(
        file.evidence()[0].contains("1 entries") && file.evidence()[0].contains("`step`"),
        "{:?}",
        file.evidence()
    );
    let file = open("wrapped.pth").unwrap();
    assert!(file.evidence()[0].contains("`state_dict`"), "{:?}", file.evidence());
}

#[test]
fn views_and_other_numbers_are_listed_and_refused_when_used() {
    let file = open("tensors.pt").unwrap();
    let refusal = |name: &str| file.tensor(name).unwrap().to_f32().unwrap_err().to_string();
    assert!(
        refusal("transposed").contains("`transposed`") && refusal("transposed").contains(".contiguous()")
    );
    assert!(refusal("f64").contains("F64") && refusal("i64").contains("I64"));
    assert_eq!(file.info("i64").unwrap().encoding, Encoding::Other("I64".into()));
}

#[test]
fn files_that_are_more_than_tensors_by_name_are_refused_with_what_they_ask_for() {
    for (name, parts) in [
        ("evil.pt", &["system`", "nothing in the file was run"][..]),
        ("module.pt", &["torch.nn.modules.linear.Linear", "state_dict"]),
        ("legacy.pt", &["before PyTorch 1.6", "save it again"]),
        ("script.pt", &["TorchScript"]),
        ("two.pth", &["`model`", "`state_dict`", "several"]),
        ("none.pth", &["no tensors by name", "`epoch`"]),
    ] {
        let error = open(name).unwrap_err();
        for part in parts {
            assert!(error.contains(part), "{name}: {error}");
        }
        assert!(!error.contains('\n'), "{error}");
    }
}

#[test]
fn a_folder_takes_its_weights_from_pytorchs_usual_names_alone() {
    let folder = tempfile::tempdir().unwrap();
    let put = |name: &str| std::fs::copy(golden().join("wrapped.pth"), folder.path().join(name)).unwrap();
    put("optimizer.pt");
    let error = Checkpoint::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("`optimizer.pt`") && error.contains("name the model"), "{error}");
    put("pytorch_model.bin");
    let file = Checkpoint::open(folder.path()).unwrap();
    assert_eq!((file.kind(), file.folder()), (CheckpointKind::PyTorch, Some(folder.path())));
    put("parameters.pth");
    let error = Checkpoint::open(folder.path().join("parameters.pth")).unwrap_err().to_string();
    assert!(error.contains("CAT-Q") && error.contains("catq-q2_0.gguf"), "{error}");
}

#[test]
fn shards_give_the_tensors_that_their_index_names() {
    let file = open("llama").unwrap();
    let twin = Checkpoint::open(golden().join("../models/rope-llama-default")).unwrap();
    assert_eq!(file.tensors().len(), twin.tensors().len());
    for info in twin.tensors() {
        assert_eq!(
            file.tensor(&info.name).unwrap().data,
            twin.tensor(&info.name).unwrap().data,
            "{}",
            info.name
        );
    }
}

/// A file of one stored zip entry per name.
fn archive(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut zip = rawzip::ZipArchiveWriter::new(&mut bytes);
    for (name, data) in entries {
        let (mut entry, config) =
            zip.new_file(name).compression_method(rawzip::CompressionMethod::STORE).start().unwrap();
        let mut writer = config.wrap(&mut entry);
        std::io::Write::write_all(&mut writer, data).unwrap();
        let (_, descriptor) = writer.finish().unwrap();
        entry.finish(descriptor).unwrap();
    }
    zip.finish().unwrap();
    bytes
}

/// A pickle of `{"w": tensor}`: storage of `elements` floats, offset, size and stride of one dimension.
fn one_tensor(elements: i32, offset: i32, size: i32, stride: i32) -> Vec<u8> {
    let int = |n: i32| [&b"J"[..], &n.to_le_bytes()].concat();
    let text = |t: &str| [&b"X"[..], &(t.len() as u32).to_le_bytes(), t.as_bytes()].concat();
    let storage = [
        &b"("[..],
        &text("storage"),
        b"ctorch\nFloatStorage\n",
        &text("0"),
        &text("cpu"),
        &int(elements),
        b"tQ",
    ];
    [
        &b"\x80\x02}"[..],
        &text("w"),
        b"ctorch._utils\n_rebuild_tensor_v2\n(",
        &storage.concat(),
        &int(offset),
        &[&int(size)[..], b"\x85"].concat(),
        &[&int(stride)[..], b"\x85"].concat(),
        b"\x89}tRs.",
    ]
    .concat()
}

fn read(bytes: Vec<u8>) -> Result<Vec<f32>, String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.pt");
    std::fs::write(&path, bytes).unwrap();
    let file = Checkpoint::open(&path).map_err(|e| e.to_string())?;
    file.tensor("w").and_then(|w| w.to_f32()).map_err(|e| e.to_string())
}

#[test]
fn places_and_shapes_are_checked_against_the_bytes() {
    let data: Vec<u8> = [1.0f32, 2.0, 3.0, 4.0].iter().flat_map(|v| v.to_le_bytes()).collect();
    let file = |pickle: &[u8]| archive(&[("m/data.pkl", pickle), ("m/data/0", &data)]);
    assert_eq!(read(file(&one_tensor(4, 1, 3, 1))).unwrap(), [2.0, 3.0, 4.0]);
    for (pickle, part) in [
        (one_tensor(4, 2, 3, 1), "elements 2 to 5 of a storage of 4"),
        (one_tensor(400, 0, 3, 1), "400 F32"),
        (one_tensor(4, 0, i32::MAX, 1), "elements 0 to 2147483647"),
        (one_tensor(4, -1, 3, 1), "no valid shape"),
        (one_tensor(4, 0, -3, 1), "no valid shape"),
        (one_tensor(-4, 0, 3, 1), "no storage"),
        (one_tensor(4, 0, 2, 2), ".contiguous()"),
    ] {
        let error = read(file(&pickle)).unwrap_err();
        assert!(error.contains(part), "{part}: {error}");
    }
    let good = one_tensor(4, 0, 4, 1);
    for (entries, part) in [
        (vec![("m/data.pkl", &good[..])], "storage `0`"),
        (vec![("m/data.pkl", &good[..]), ("n/data.pkl", &good)], "one `data.pkl`"),
        (vec![("m/data.txt", &good[..])], "no PyTorch checkpoint"),
        (vec![("m/data.pkl", &good[..]), ("m/data/0", &data), ("m/byteorder", b"big")], "\"big\"-endian"),
        (vec![("m/data.pkl", &good[..5])], "ends inside"),
    ] {
        let error = read(archive(&entries)).unwrap_err();
        assert!(error.contains(part), "{part}: {error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn damaged_checkpoints_are_errors_and_never_panics(
        flips in proptest::collection::vec((any::<proptest::sample::Index>(), 0u8..8), 1..6),
        cut in proptest::option::of(any::<proptest::sample::Index>()),
    ) {
        let mut bytes = std::fs::read(golden().join("tensors.pt")).unwrap();
        for (at, bit) in flips {
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.pt");
        std::fs::write(&path, bytes).unwrap();
        if let Ok(file) = Checkpoint::open(&path) {
            for info in file.tensors() {
                let _ = file.tensor(&info.name).unwrap().to_f32();
            }
        }
    }
}
