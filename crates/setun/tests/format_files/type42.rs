//! Telling the two layouts of type 42 apart, on golden/bonsai-blocks/type42 and on files made here.

use setun::error::ModelError;
use setun::format::gguf::{GgufWriter, Metadata};
use setun::format::{Checkpoint, Encoding, OpenOptions, TensorSpec, Type42};

use super::gguf::Builder;
use super::golden;

fn bytes_of(name: &str) -> Vec<u8> {
    std::fs::read(golden("bonsai-blocks/type42").join(name)).unwrap()
}

fn open_as(bytes: &[u8], type42: Type42) -> Result<Checkpoint, ModelError> {
    let options = OpenOptions { type42, ..OpenOptions::default() };
    Checkpoint::from_bytes_with("test", Vec::leak(bytes.to_vec()), options)
}

fn open(bytes: &[u8]) -> Result<Checkpoint, ModelError> {
    open_as(bytes, Type42::Detect)
}

/// Compares every tensor with the fixture's values and its encoding with the one expected.
fn assert_values(file: &Checkpoint, name: &str, encoding: &Encoding) {
    let weights = Checkpoint::open(golden("bonsai-blocks/type42/weights.safetensors")).unwrap();
    for info in file.tensors() {
        assert_eq!(info.encoding, *encoding, "{name}: {}", info.name);
        let found = file.tensor(&info.name).unwrap().to_f32().unwrap();
        let stem = name.trim_end_matches(".gguf");
        let expected = weights.tensor(&format!("{stem}:{}", info.name)).unwrap().to_f32().unwrap();
        assert!(found == expected, "{name}: {}", info.name);
    }
}

#[test]
fn sizes_decide_the_group_for_the_whole_file_and_the_evidence_is_told() {
    let cases = [
        ("g64-many.gguf", Encoding::Q2_0G64, "groups of 64"),
        ("g128-many.gguf", Encoding::Q2_0G128, "groups of 128"),
        ("g128-unpadded-end.gguf", Encoding::Q2_0G128, "groups of 128"),
    ];
    for (name, encoding, words) in cases {
        let file = open(&bytes_of(name)).unwrap();
        assert_values(&file, name, &encoding);
        let [evidence] = file.evidence() else { panic!("{name}: one decision") };
        assert!(evidence.contains(words) && evidence.contains("`t0.weight` takes"), "{evidence}");
        assert!(evidence.contains("blocks looked at"), "{evidence}");
    }
}

#[test]
fn sizes_that_fit_both_leave_tensors_unread_until_the_caller_decides() {
    let bytes = bytes_of("ambiguous-one-row.gguf");
    let file = open(&bytes).unwrap();
    assert!(file.evidence()[0].contains("not decided"), "{:?}", file.evidence());
    let tensor = file.tensor("t0.weight").unwrap();
    assert!(matches!(tensor.info.encoding, Encoding::Undecided { .. }) && !tensor.info.encoding.is_ternary());
    for error in
        [tensor.to_f32().unwrap_err(), tensor.to_ternary().unwrap_err(), tensor.to_dense().unwrap_err()]
    {
        let error = error.to_string();
        for part in ["`t0.weight`", "type 42", "option `type42`", "group64 or group128"] {
            assert!(error.contains(part), "{error}");
        }
    }
    let file = open_as(&bytes, Type42::Group64).unwrap();
    assert_values(&file, "ambiguous-one-row.gguf", &Encoding::Q2_0G64);
    assert!(file.evidence()[0].contains("because the option"), "{:?}", file.evidence());
    let file = open_as(&bytes, Type42::Group128).unwrap();
    assert_eq!(file.tensor("t0.weight").unwrap().info.encoding, Encoding::Q2_0G128);
}

#[test]
fn where_both_sizes_fit_the_codes_decide_if_there_are_enough() {
    let codes = (0..16).map(|i| [0b01_10_00_01, 0b10_01_00_10, 0b00_01_10_00][i % 3]);
    let block: Vec<u8> = [0x00, 0x2c].into_iter().chain(codes).collect();
    let build = |tensors: usize| {
        let mut header = Builder::new(3, tensors as u64, 0);
        for n in 0..tensors {
            header = header.tensor(&format!("t{n}"), &[128, 8], 42, 288 * n as u64);
        }
        let mut bytes = header.data(32, 288 * tensors);
        let start = bytes.len() - 288 * tensors;
        bytes[start..].chunks_exact_mut(18).for_each(|place| place.copy_from_slice(&block));
        bytes
    };
    let file = open(&build(3)).unwrap();
    assert_eq!(file.info("t1").unwrap().encoding, Encoding::Q2_0G64);
    assert!(file.evidence()[0].contains("both groups fit the sizes"), "{:?}", file.evidence());
    // Eight blocks of 128 are too few to tell.
    let file = open(&build(1)).unwrap();
    assert!(matches!(file.info("t0").unwrap().encoding, Encoding::Undecided { .. }));
}

#[test]
fn a_choice_that_the_sizes_contradict_is_refused() {
    for (name, wrong) in [("g64-many.gguf", Type42::Group128), ("g128-many.gguf", Type42::Group64)] {
        let error = open_as(&bytes_of(name), wrong).unwrap_err().to_string();
        assert!(error.contains("option `type42`") && error.contains("leave the option out"), "{error}");
    }
    let right = open_as(&bytes_of("g64-many.gguf"), Type42::Group64).unwrap();
    assert_values(&right, "g64-many.gguf", &Encoding::Q2_0G64);
}

#[test]
fn truncated_files_of_type_42_are_refused_at_every_length() {
    let cases = [
        ("g64-many.gguf", Encoding::Q2_0G64),
        ("g128-many.gguf", Encoding::Q2_0G128),
        ("g128-unpadded-end.gguf", Encoding::Q2_0G128),
    ];
    for (name, encoding) in cases {
        let bytes = bytes_of(name);
        for length in 0..bytes.len() {
            if let Ok(file) = open(&bytes[..length]) {
                // Only the padding after the last tensor may be missing.
                assert!(bytes.len() - length < 32, "{name}: {length} of {}", bytes.len());
                assert_values(&file, name, &encoding);
            }
        }
    }
}

#[test]
fn sizes_that_fit_neither_and_rows_that_are_no_groups_are_refused_by_name() {
    let one = |cols, bytes| Builder::new(3, 1, 0).tensor("w", &[cols, 16], 42, 0).data(32, bytes);
    for (cols, bytes) in [(256, 16 * 72 + 64), (256, 16 * 68 - 32), (96, 2000), (64, 16 * 18 - 32)] {
        let error = open(&one(cols, bytes)).unwrap_err().to_string();
        assert!(error.contains("`w`") && error.contains("neither layout"), "{cols}, {bytes}: {error}");
    }
    // Rows of 64 exclude groups of 128, whatever else fits.
    let file = open(&one(64, 16 * 18)).unwrap();
    assert_eq!(file.info("w").unwrap().encoding, Encoding::Q2_0G64);
    // With more room than either takes, the caller may still know.
    let roomy = one(256, 16 * 72 + 64);
    let file = open_as(&roomy, Type42::Group64).unwrap();
    assert!(file.evidence()[0].contains("although `w`"), "{:?}", file.evidence());
    assert!(open_as(&one(256, 100), Type42::Group128).is_err());
}

#[test]
fn two_tensors_that_contradict_each_other_are_refused() {
    let builder = Builder::new(3, 2, 0).tensor("a", &[256, 16], 42, 0).tensor("b", &[256, 16], 42, 1152);
    let error = open(&builder.data(32, 1152 + 16 * 68)).unwrap_err().to_string();
    assert!(error.contains("`a`") && error.contains("`b`") && error.contains("1088"), "{error}");
}

/// Blocks of 128 codes of all kinds and the scale 0.02, before or behind them.
fn groups_of_128(scale_first: bool, blocks: usize) -> Vec<u8> {
    let scale = half::f16::from_f32(0.02).to_le_bytes();
    let mut state = 1u32;
    let mut code = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8 % 3
    };
    let mut out = Vec::new();
    for _ in 0..blocks {
        let codes: Vec<u8> = (0..32).map(|_| (0..4).fold(0, |byte, i| byte | code() << (2 * i))).collect();
        out.extend(if scale_first { [&scale[..], &codes].concat() } else { [&codes, &scale[..]].concat() });
    }
    out
}

#[test]
fn scales_behind_their_codes_are_noticed_and_refused() {
    let file = |data: &[u8]| {
        let mut bytes = Builder::new(3, 1, 0).tensor("w", &[256, 32], 42, 0).data(32, 0);
        bytes.extend_from_slice(data);
        bytes
    };
    assert!(open(&file(&groups_of_128(true, 64))).unwrap().evidence()[0].contains("none of 64 blocks"));
    let error = open(&file(&groups_of_128(false, 64))).unwrap_err().to_string();
    assert!(error.contains("scales behind the codes") && error.contains("of 64 blocks"), "{error}");
}

#[test]
fn contents_that_contradict_the_sizes_are_refused() {
    // Groups of 64 cut off where groups of 128 would end.
    let scale = half::f16::from_f32(0.02).to_le_bytes();
    let block = [&scale[..], &[0b10_00_01_10; 16]].concat();
    let mut bytes = Builder::new(3, 1, 0).tensor("w", &[256, 32], 42, 0).data(32, 0);
    bytes.extend(block.repeat(128));
    assert!(open(&bytes).is_ok());
    bytes.truncate(bytes.len() - 128 * 18 + 64 * 34);
    let error = open(&bytes).unwrap_err().to_string();
    assert!(error.contains("sizes of Q2_0 in groups of 128") && error.contains("as groups of 64"), "{error}");
}

#[test]
fn only_files_that_readers_can_tell_are_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let spec = |name: &str, shape: &[usize], encoding: &Encoding| TensorSpec {
        name: name.into(),
        shape: shape.to_vec(),
        encoding: encoding.clone(),
    };
    for encoding in [Encoding::Q2_0G64, Encoding::Q2_0G128] {
        let specs = vec![spec("a", &[1, 128], &encoding), spec("b", &[16, 256], &encoding)];
        let mut writer = GgufWriter::create(&path, &Metadata::new(), specs).unwrap();
        while let Some(spec) = writer.pending() {
            writer.tensor(&vec![0; spec.encoding.byte_len(&spec.shape).unwrap()]).unwrap();
        }
        writer.finish().unwrap();
        let file = Checkpoint::open(&path).unwrap();
        assert!(file.tensors().all(|t| t.encoding == encoding), "{encoding}");
    }
    let refuse = |specs| GgufWriter::create(&path, &Metadata::new(), specs).unwrap_err().to_string();
    let small = refuse(vec![spec("a", &[1, 128], &Encoding::Q2_0G64)]);
    assert!(small.contains("no reader could tell"), "{small}");
    let mixed =
        refuse(vec![spec("a", &[16, 256], &Encoding::Q2_0G64), spec("b", &[16, 256], &Encoding::Q2_0G128)]);
    assert!(
        mixed.contains("`a`") && mixed.contains("`b`") && mixed.contains("share a type number"),
        "{mixed}"
    );
}
