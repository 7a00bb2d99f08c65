//! GGUF: a builder of files, well-formed and not, and what becomes of them.

use setun::format::gguf::{Array, GgufWriter, Metadata, Value};
use setun::format::{Checkpoint, CheckpointKind, Encoding, I2sLayout, OpenOptions, TensorSpec};

use super::{assert_refused, open};

/// Bytes of a GGUF file, written field by field.
pub struct Builder(pub Vec<u8>);

impl Builder {
    pub fn new(version: u32, tensors: u64, keys: u64) -> Self {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(version.to_le_bytes());
        bytes.extend(tensors.to_le_bytes());
        bytes.extend(keys.to_le_bytes());
        Self(bytes)
    }

    pub fn u8(mut self, value: u8) -> Self {
        self.0.push(value);
        self
    }

    pub fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub fn text(mut self, text: impl AsRef<[u8]>) -> Self {
        self.0.extend((text.as_ref().len() as u64).to_le_bytes());
        self.0.extend(text.as_ref());
        self
    }

    /// An entry; `dims` fastest first, as in the file.
    pub fn tensor(self, name: &str, dims: &[u64], type_id: u32, offset: u64) -> Self {
        let start = self.text(name).u32(dims.len() as u32);
        dims.iter().fold(start, |b, &d| b.u64(d)).u32(type_id).u64(offset)
    }

    /// Padding to the alignment, then zeros for the data.
    pub fn data(mut self, alignment: usize, bytes: usize) -> Vec<u8> {
        self.0.resize(self.0.len().next_multiple_of(alignment) + bytes, 0);
        self.0
    }
}

/// A small file with every value type, a nested array, and two tensors.
pub fn valid() -> Vec<u8> {
    let builder = Builder::new(3, 2, 5).text("general.architecture").u32(8).text("llama");
    let builder = builder.text("a.number").u32(0).u8(7);
    let builder = builder.text("a.flag").u32(7).u8(1);
    let builder = builder.text("a.words").u32(9).u32(8).u64(2).text("x").text("yz");
    let builder = builder.text("a.nest").u32(9).u32(9).u64(1).u32(4).u64(2).u32(1).u32(2);
    let builder = builder.tensor("m", &[3, 2], 0, 0).tensor("v", &[4], 1, 32);
    builder.data(32, 40)
}

#[test]
fn versions_2_and_3_are_read_with_shapes_turned_row_major() {
    for version in [2u32, 3] {
        let mut bytes = valid();
        bytes[4..8].copy_from_slice(&version.to_le_bytes());
        let file = open(&bytes).unwrap();
        assert_eq!(file.kind(), CheckpointKind::Gguf);
        let metadata = file.gguf_metadata().unwrap();
        assert_eq!(metadata.str("general.architecture").unwrap(), Some("llama"));
        assert_eq!(metadata.u64("a.number").unwrap(), Some(7));
        assert_eq!(metadata.bool("a.flag").unwrap(), Some(true));
        let words = metadata.array("a.words").unwrap().unwrap();
        assert_eq!(words.as_strings().unwrap(), ["x", "yz"]);
        let nest = metadata.array("a.nest").unwrap().unwrap();
        assert_eq!(*nest, Array::Array(vec![Array::U32(vec![1, 2])]));
        let shapes: Vec<_> = file.tensors().map(|t| (t.name.as_str(), t.shape.clone())).collect();
        assert_eq!(shapes, [("m", vec![2, 3]), ("v", vec![4])]);
        assert_eq!(file.tensor("v").unwrap().data.len(), 8);
    }
}

#[test]
fn other_versions_and_byte_orders_are_refused_by_name() {
    assert_refused(&Builder::new(1, 0, 0).0, &["version 1"]);
    assert_refused(&Builder::new(4, 0, 0).0, &["version 4"]);
    assert_refused(&Builder::new(3u32.swap_bytes(), 0, 0).0, &["big-endian"]);
    assert_refused(&Builder::new(0, 0, 0).0, &["version 0"]);
}

#[test]
fn absurd_counts_are_refused_before_anything_is_reserved_for_them() {
    for count in [u64::MAX, 1 << 62, 1 << 40, 1000] {
        assert_refused(&Builder::new(3, count, 0).0, &["tensors", "do not fit"]);
        assert_refused(&Builder::new(3, 0, count).0, &["metadata keys", "do not fit"]);
        let string = Builder::new(3, 0, 1).text("k").u32(8).u64(count);
        assert_refused(&string.0, &["key `k`", "claims"]);
        for element in [0, 1, 4, 6, 7, 8, 9, 10, 12] {
            let array = Builder::new(3, 0, 1).text("k").u32(9).u32(element).u64(count);
            assert_refused(&array.0, &["key `k`", "elements"]);
        }
        let name = Builder::new(3, 0, 1).u64(count).u64(0).u64(0);
        assert_refused(&name.0, &["metadata key", "claims"]);
    }
}

#[test]
fn wrong_metadata_is_refused_naming_the_key() {
    let double = Builder::new(3, 0, 2).text("k").u32(0).u8(1).text("k").u32(0).u8(2);
    assert_refused(&double.0, &["`k` occurs twice"]);
    let unknown = Builder::new(3, 0, 1).text("k").u32(13).u64(0);
    assert_refused(&unknown.0, &["`k`", "unknown value type 13"]);
    let unknown = Builder::new(3, 0, 1).text("k").u32(9).u32(77).u64(0);
    assert_refused(&unknown.0, &["`k`", "unknown type 77"]);
    let boolean = Builder::new(3, 0, 1).text("k").u32(7).u8(2);
    assert_refused(&boolean.0, &["`k`", "boolean of value 2"]);
    assert_refused(&Builder::new(3, 0, 1).text(b"\xff\xfe").u32(0).u8(0).0, &["not UTF-8"]);
    assert_refused(&Builder::new(3, 0, 1).text("k").u32(8).text(b"\xc3").0, &["`k`", "not UTF-8"]);
    assert_refused(&Builder::new(3, 0, 1).text("").u32(0).u8(0).u64(0).0, &["is empty"]);
    let mut nested = Builder::new(3, 0, 1).text("k").u32(9);
    for _ in 0..50 {
        nested = nested.u32(9).u64(1);
    }
    assert_refused(&nested.0, &["`k`", "nests arrays"]);
    for alignment in [0, 3, 33, 1 << 31] {
        let builder = Builder::new(3, 0, 1).text("general.alignment").u32(4).u32(alignment);
        assert_refused(&builder.0, &["general.alignment", &alignment.to_string()]);
    }
    let text = Builder::new(3, 0, 1).text("general.alignment").u32(8).text("32");
    assert_refused(&text.0, &["general.alignment", "string"]);
}

#[test]
fn wrong_tensors_are_refused_naming_the_tensor() {
    let one =
        |dims: &[u64], type_id, offset| Builder::new(3, 1, 0).tensor("w", dims, type_id, offset).data(32, 64);
    assert_refused(&one(&[4, 5], 0, 0), &["`w`", "80 bytes", "64", "cut short"]);
    assert_refused(&one(&[4], 0, 64), &["`w`", "cut short"]);
    assert_refused(&one(&[4], 0, u64::MAX - 31), &["`w`", "cut short"]);
    assert_refused(&one(&[4], 0, 16), &["`w`", "multiple of the alignment 32"]);
    assert_refused(&one(&[1, 1, 1, 1, 1], 0, 0), &["`w`", "5 dimensions"]);
    assert_refused(&one(&[0, 4], 0, 0), &["`w`", "dimension of 0"]);
    assert_refused(&one(&[1 << 33, 1 << 33], 0, 0), &["`w`", "absurd shape"]);
    assert_refused(&one(&[1 << 61, 4], 0, 0), &["`w`", "absurd shape"]);
    assert_refused(&one(&[u64::MAX], 0, 0), &["`w`"]);
    assert_refused(&one(&[33], 8, 0), &["`w`", "multiple of 32"]);
    assert_refused(&one(&[128], 35, 0), &["`w`", "multiple of 256"]);
    assert_refused(&one(&[64, 2], 36, 0), &["`w`", "multiple of 128"]);
    let two = |a, b| Builder::new(3, 2, 0).tensor("a", &[8], 0, 0).tensor(b, &[8], 0, a).data(32, 64);
    assert!(open(&two(32, "b")).is_ok());
    assert_refused(&two(0, "b"), &["`a`", "`b`", "overlap"]);
    assert_refused(&two(32, "a"), &["`a` occurs twice"]);
    let nameless = Builder::new(3, 1, 0).tensor("", &[8], 0, 0).data(32, 32);
    assert_refused(&nameless, &["tensor name", "is empty"]);
}

#[test]
fn a_tensor_of_type_36_that_is_larger_than_i2_s_is_refused() {
    // 256 elements: I2_S takes 96 bytes, the type that once had this number 144.
    let file = |next| {
        let builder = Builder::new(3, 2, 0).tensor("a", &[256], 36, 0);
        builder.tensor("b", &[1], 0, next).data(32, 256)
    };
    assert!(open(&file(96)).is_ok());
    assert_refused(&file(160), &["`a`", "type 36", "I2_S"]);
    let last = |bytes| Builder::new(3, 1, 0).tensor("a", &[256], 36, 0).data(32, bytes);
    assert!(open(&last(96)).is_ok() && open(&last(200)).is_ok());
    assert_refused(&last(144), &["`a`", "type 36", "144 bytes"]);
}

#[test]
fn the_size_tells_what_38_and_39_are() {
    let file =
        |id, bytes| open(&Builder::new(3, 1, 0).tensor("a", &[256, 8], id, 0).data(32, bytes)).unwrap();
    for (id, bytes, name, words) in [
        (39, 1088, "MXFP4", "type 39 is MXFP4"),
        (39, 448, "TL2 (tiles unknown)", "TL2 of bitnet.cpp"),
        (38, 512, "TL1 (tiles unknown)", "TL1 of bitnet.cpp"),
        (38, 1152, "IQ4_NL_8_8 (removed)", "IQ4_NL_8_8"),
    ] {
        let file = file(id, bytes);
        assert_eq!(file.info("a").unwrap().encoding.name(), name);
        assert!(file.evidence()[0].contains(words), "{:?}", file.evidence());
        let tensor = file.tensor("a").unwrap();
        match tensor.to_f32() {
            Ok(values) => assert_eq!((name, values.len()), ("MXFP4", 2048)),
            Err(error) => {
                let error = error.to_string();
                assert!(error.contains("`a`") && error.contains(&name[..3]), "{error}");
                assert_eq!(name.contains("tiles"), error.contains("the option `tl_tiles` must"), "{error}");
            }
        }
    }
}

#[test]
fn the_layout_of_i2_s_is_the_published_one_unless_the_caller_says_otherwise() {
    let layout = |i2s, cols| {
        let bytes = Builder::new(3, 1, 0).tensor("a", &[cols, 4], 36, 0).data(32, cols as usize + 32);
        let options = OpenOptions { i2s, ..OpenOptions::default() };
        let file = Checkpoint::from_bytes_with("test", Vec::leak(bytes), options)?;
        assert_eq!(file.evidence().len(), 1);
        Ok::<_, setun::error::ModelError>((
            file.info("a").unwrap().encoding.clone(),
            file.evidence()[0].clone(),
        ))
    };
    let (encoding, evidence) = layout(I2sLayout::X86, 256).unwrap();
    assert_eq!(encoding, Encoding::I2S);
    assert!(evidence.contains("blocks of 128") && evidence.contains("option `i2s`"), "{evidence}");
    let (encoding, evidence) = layout(I2sLayout::Neon64, 192).unwrap();
    assert_eq!(encoding, Encoding::I2SNeon);
    assert!(evidence.contains("blocks of 64, because"), "{evidence}");
    assert_eq!(layout(I2sLayout::Rows4, 60).unwrap().0, Encoding::I2SRows4);
    let error = layout(I2sLayout::X86, 192).unwrap_err().to_string();
    assert!(error.contains("multiple of 128") && error.contains("neon64"), "{error}");
    let three = Builder::new(3, 1, 0).tensor("a", &[64, 3], 36, 0).data(32, 80);
    let options = OpenOptions { i2s: I2sLayout::Rows4, ..OpenOptions::default() };
    let error = Checkpoint::from_bytes_with("test", Vec::leak(three), options).unwrap_err().to_string();
    assert!(error.contains("3 rows") && error.contains("multiple of 4"), "{error}");
}

/// The default model with its I2_S tensors in another layout: `place` says at which byte and field a weight goes.
fn relaid(place: impl Fn(usize, usize, usize) -> (usize, usize)) -> Vec<u8> {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/default.gguf");
    let original: &'static [u8] = std::fs::read(path).unwrap().leak();
    let options = OpenOptions { i2s: I2sLayout::X86, ..OpenOptions::default() };
    let file = Checkpoint::from_bytes_with("test", original, options).unwrap();
    let mut bytes = original.to_vec();
    for info in file.tensors().filter(|t| t.encoding == Encoding::I2S) {
        let tensor = file.tensor(&info.name).unwrap();
        let start = tensor.data.as_ptr() as usize - original.as_ptr() as usize;
        let matrix = tensor.to_ternary().unwrap();
        let (rows, cols) = (matrix.rows(), matrix.cols());
        bytes[start..start + rows * cols / 4].fill(0);
        for (row, col) in (0..rows).flat_map(|row| (0..cols).map(move |col| (row, col))) {
            let (byte, field) = place(row, col, cols);
            bytes[start + byte] |= ((matrix.trit(row, col) + 1) as u8) << (6 - 2 * field);
        }
    }
    bytes
}

#[test]
fn trained_weights_tell_the_layouts_of_i2_s_apart() {
    let x86 = relaid(|row, col, cols| (row * cols / 4 + col / 128 * 32 + col % 32, col % 128 / 32));
    let neon = relaid(|row, col, cols| (row * cols / 4 + col / 64 * 16 + col % 16, col % 64 / 16));
    let rows4 = relaid(|row, col, cols| (row / 4 * cols + col, row % 4));
    for (bytes, encoding) in [(x86, Encoding::I2S), (neon, Encoding::I2SNeon), (rows4, Encoding::I2SRows4)] {
        let file = open(bytes.leak()).unwrap();
        assert_eq!(file.info("blk.0.ffn_up.weight").unwrap().encoding, encoding);
        assert!(file.evidence()[0].contains("correlation"), "{:?}", file.evidence());
    }
}

#[test]
fn a_tensor_of_unknown_size_has_its_place_in_the_file_too() {
    let bytes = Builder::new(3, 1, 0).tensor("odd", &[4, 4], 1000, 0).data(32, 0);
    for len in 0..=bytes.len() {
        if let Ok(file) = open(bytes[..len].to_vec().leak()) {
            assert!(file.tensor("odd").unwrap().to_f32().is_err());
        }
    }
    assert!(open(bytes[..bytes.len() - 1].to_vec().leak()).is_err());
}

#[test]
fn types_that_are_not_read_are_listed_but_refused_on_use_by_name() {
    let bytes = Builder::new(3, 3, 0)
        .tensor("iq", &[256], 23, 0)
        .tensor("ids", &[2], 26, 160)
        .tensor("odd", &[5], 999, 192)
        .data(32, 224);
    let file = open(&bytes).unwrap();
    for (name, kind) in [("iq", "IQ4_XS"), ("ids", "I32"), ("odd", "number 999")] {
        let tensor = file.tensor(name).unwrap();
        assert_eq!(tensor.info.encoding, Encoding::Other(kind.into()));
        let error = tensor.to_f32().unwrap_err().to_string();
        assert!(error.contains(kind) && error.contains("TQ2_0"), "{error}");
    }
}

#[test]
fn a_missing_tensor_is_reported_with_its_nearest_names() {
    let bytes = Builder::new(3, 2, 0)
        .tensor("blk.0.attn_q.weight", &[8], 0, 0)
        .tensor("output_norm.weight", &[8], 0, 32)
        .data(32, 64);
    let error = open(&bytes).unwrap().tensor("blk.0.attn_k.weight").unwrap_err().to_string();
    assert!(error.contains("`blk.0.attn_k.weight` is missing"), "{error}");
    assert!(error.contains("nearest are `blk.0.attn_q.weight`"), "{error}");
}

fn all_values() -> Metadata {
    let mut metadata = Metadata::new();
    let mut put = |key: &str, value| assert!(metadata.insert(key, value).is_none());
    put("u8", Value::U8(1));
    put("i8", Value::I8(-1));
    put("u16", Value::U16(2));
    put("i16", Value::I16(-2));
    put("u32", Value::U32(3));
    put("i32", Value::I32(-3));
    put("f32", Value::F32(0.5));
    put("bool", Value::Bool(true));
    put("text", Value::String("ünï".into()));
    put("u64", Value::U64(u64::MAX));
    put("i64", Value::I64(i64::MIN));
    put("f64", Value::F64(0.1));
    put("au8", Value::Array(Array::U8(vec![1, 2])));
    put("ai8", Value::Array(Array::I8(vec![-1, 2])));
    put("au16", Value::Array(Array::U16(vec![1, 2])));
    put("ai16", Value::Array(Array::I16(vec![-1])));
    put("au32", Value::Array(Array::U32(vec![])));
    put("ai32", Value::Array(Array::I32(vec![-1, 2, 3])));
    put("af32", Value::Array(Array::F32(vec![1.5])));
    put("abool", Value::Array(Array::Bool(vec![true, false])));
    put("atext", Value::Array(Array::String(vec![String::new(), "b".into()])));
    put("aa", Value::Array(Array::Array(vec![Array::I64(vec![9]), Array::F64(vec![])])));
    put("au64", Value::Array(Array::U64(vec![1])));
    metadata
}

fn write(path: &std::path::Path) {
    let spec = |name: &str, shape: &[usize], encoding| TensorSpec {
        name: name.into(),
        shape: shape.to_vec(),
        encoding,
    };
    let specs = vec![
        spec("a", &[2, 3], Encoding::F32),
        spec("b", &[1, 256], Encoding::TQ1_0),
        spec("c", &[5], Encoding::BF16),
    ];
    let mut writer = GgufWriter::create(path, &all_values(), specs).unwrap();
    while let Some(spec) = writer.pending() {
        let bytes: Vec<u8> = (0..spec.encoding.byte_len(&spec.shape).unwrap()).map(|i| i as u8).collect();
        writer.tensor(&bytes).unwrap();
    }
    writer.finish().unwrap();
}

#[test]
fn what_is_written_reads_back_and_equal_input_gives_equal_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (folder.path().join("1.gguf"), folder.path().join("2.gguf"));
    write(&first);
    write(&second);
    assert_eq!(std::fs::read(&first).unwrap(), std::fs::read(&second).unwrap());
    let file = Checkpoint::open(&first).unwrap();
    assert_eq!(file.gguf_metadata(), Some(&all_values()));
    let found: Vec<_> = file.tensors().map(|t| (t.name.as_str(), t.shape.clone())).collect();
    assert_eq!(found, [("a", vec![2, 3]), ("b", vec![1, 256]), ("c", vec![5])]);
    assert_eq!(file.tensor("b").unwrap().data[..], (0..54).collect::<Vec<u8>>());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2, "temporary files are left");
}

#[test]
fn an_unfinished_writer_leaves_the_old_file_and_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    std::fs::write(&path, "old").unwrap();
    let spec = TensorSpec { name: "a".into(), shape: vec![4], encoding: Encoding::F32 };
    let mut writer = GgufWriter::create(&path, &Metadata::new(), vec![spec]).unwrap();
    let error = writer.tensor(&[0; 15]).unwrap_err().to_string();
    assert!(error.contains("`a`") && error.contains("15") && error.contains("16"), "{error}");
    let error = writer.finish().unwrap_err().to_string();
    assert!(error.contains("`a` was not written"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn what_gguf_cannot_hold_is_refused_before_a_file_is_made() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let create = |shape: &[usize], encoding| {
        let spec = TensorSpec { name: "w".into(), shape: shape.to_vec(), encoding };
        GgufWriter::create(&path, &Metadata::new(), vec![spec]).unwrap_err().to_string()
    };
    assert!(create(&[4], Encoding::U8).contains("U8 is no GGUF type"));
    assert!(create(&[128], Encoding::TQ2_0).contains("multiple of 256"));
    assert!(create(&[1, 1, 1, 1, 1], Encoding::F32).contains("more than 4 dimensions"));
    assert!(create(&[2, 0], Encoding::F32).contains("or one of 0"));
    assert!(create(&[usize::MAX / 4], Encoding::F32).contains("too large"));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}
